//! From an error to what the user gets: an exit code, and a message with every cause in it.

use std::fmt;
use std::process::ExitCode;

use cdp_journal::view::CopyError;
use cdp_journal::when::WhenError;
use cdp_journal::{OpenError, ReadError};

use crate::cmd::{Damaged, NotExactHere};
use crate::disk::DiskError;
use crate::ext4::Ext4Error;

/// The exit codes that scripts rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Done,
    /// Failed.
    Failed,
    /// Wrong usage.
    Usage,
    /// That moment cannot be restored exactly.
    NotExact,
    /// The data read does not match its checksum.
    Damaged,
}

/// The command line asks for something that cannot be meant.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

impl Exit {
    /// The number that the shell sees.
    pub(crate) fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::NotExact => 3,
            Exit::Damaged => 4,
        }
    }

    /// How a command that ended in `error` exits: by the first cause that has a code of its own.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        error.chain().find_map(of_cause).unwrap_or(Exit::Failed)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if cause.is::<UsageError>() {
        return Some(Exit::Usage);
    }
    let not_exact = cause.is::<NotExactHere>()
        || matches!(
            cause.downcast_ref::<WhenError>(),
            Some(WhenError::NotExact(_) | WhenError::NotCovered { .. })
        );
    if not_exact {
        return Some(Exit::NotExact);
    }
    let damaged = cause.is::<Damaged>()
        || cause.downcast_ref::<OpenError>().is_some_and(OpenError::is_damage)
        || cause.downcast_ref::<ReadError>().is_some_and(ReadError::is_damage)
        // These show the read error as themselves, so that one is not in the chain.
        || matches!(cause.downcast_ref::<CopyError>(), Some(CopyError::Read(read)) if read.is_damage())
        || matches!(cause.downcast_ref::<DiskError>(), Some(DiskError::Read(read)) if read.is_damage())
        || matches!(cause.downcast_ref::<Ext4Error>(), Some(Ext4Error::Read(read)) if read.is_damage());
    damaged.then_some(Exit::Damaged)
}

/// An error and its causes, as `what: why: why`; a cause that its error has already told is not repeated.
pub(crate) struct Chain<'a>(pub(crate) &'a anyhow::Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut told = String::new();
        for cause in self.0.chain() {
            let text = cause.to_string();
            if !told.is_empty() {
                if told.ends_with(&text) {
                    continue;
                }
                told.push_str(": ");
            }
            told.push_str(&text);
        }
        f.write_str(&told)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use anyhow::{Context, anyhow};
    use cdp_journal::Seq;

    use super::*;

    fn damaged() -> ReadError {
        ReadError::Damaged {
            path: "/store/log/00000000000000000001.seg".into(),
            offset: 4096,
            what: "group checksum".to_owned(),
            seqs: Some((Seq::FIRST, Seq::FIRST)),
        }
    }

    #[test]
    fn every_kind_of_error_has_its_exit_code() {
        let too_new = OpenError::TooNew {
            path: "store.json".into(),
            found: 9,
            newest: 1,
        };
        let corrupt = OpenError::Corrupt {
            path: "x.seg".into(),
            offset: 0,
            what: "header".to_owned(),
            last_good: None,
        };
        let write = CopyError::Write {
            offset: 0,
            len: 1,
            source: io::ErrorKind::StorageFull.into(),
        };
        let segment_too_new = ReadError::TooNew {
            path: "x.seg".into(),
            found: 9,
            newest: 1,
        };
        let cases: [(anyhow::Error, Exit); 11] = [
            (anyhow!("anything"), Exit::Failed),
            (too_new.into(), Exit::Failed),
            (segment_too_new.into(), Exit::Failed),
            (write.into(), Exit::Failed),
            (
                WhenError::NoBookmark {
                    label: "x".to_owned(),
                }
                .into(),
                Exit::Failed,
            ),
            (UsageError("swap them".to_owned()).into(), Exit::Usage),
            (corrupt.into(), Exit::Damaged),
            (damaged().into(), Exit::Damaged),
            (CopyError::Read(damaged()).into(), Exit::Damaged),
            (WhenError::Read(damaged()).into(), Exit::Damaged),
            (Ext4Error::Read(damaged()).into(), Exit::Damaged),
        ];
        for (error, exit) in cases {
            let error = error.context("write the image");
            assert_eq!(Exit::of(&error), exit, "{}", Chain(&error));
        }
    }

    #[test]
    fn a_message_tells_each_cause_once() {
        let inner = anyhow!("permission denied").context("read /store/log: permission denied");
        assert_eq!(
            Chain(&inner.context("open the store")).to_string(),
            "open the store: read /store/log: permission denied"
        );
        let plain: Result<(), io::Error> = Err(io::Error::other("broken"));
        let error = plain.context("read").unwrap_err();
        assert_eq!(Chain(&error).to_string(), "read: broken");
    }
}
