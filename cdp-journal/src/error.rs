//! What can go wrong when a store is opened or read.

use std::io;
use std::path::PathBuf;

use crate::types::{Seq, VolumeId};

/// A store could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Written by a newer version of this program.
    #[error("{path}: format {found}, this build reads up to {newest}; upgrade to read this store")]
    TooNew {
        /// The file that says so.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format this build reads.
        newest: u32,
    },
    /// No store lies there.
    #[error("{path} is not a store (no store.json in it); give the folder that cdp-agent writes to")]
    NotAStore {
        /// The folder.
        path: PathBuf,
    },
    /// `store.json` cannot be understood.
    #[error("{path}: {reason}")]
    BadStoreFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another writer has the store.
    #[error("{path} is being written to by {holder}; stop it first, or give another --store")]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// `process 123`, or `another process`.
        holder: String,
    },
    /// Bytes that had been durable are damaged.
    #[error(
        "{path}: damaged at byte {offset} ({what}); good up to seq {}; nothing was cut, \
         run `cdp-restore verify` to see the extent",
        last_good.map_or_else(|| "none".to_owned(), |seq| seq.to_string())
    )]
    Corrupt {
        /// The segment.
        path: PathBuf,
        /// Where the damage begins.
        offset: u64,
        /// What failed.
        what: String,
        /// Last record before the damage.
        last_good: Option<Seq>,
    },
    /// The operating system refused.
    #[error("{action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The index could neither be opened nor made anew.
    #[error("open the index")]
    Index(#[from] crate::index::IndexError),
}

impl OpenError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// Are bytes of the store damaged (exit code 4)?
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Corrupt { .. })
    }
}

/// History could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Bytes of the log do not match their checksum.
    #[error("{path}: damaged at byte {offset} ({what}){}; the data was not returned", moments(*seqs))]
    Damaged {
        /// The segment.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What failed.
        what: String,
        /// First and last record of the frame that is damaged, where known.
        seqs: Option<(Seq, Seq)>,
    },
    /// Written by a newer version of this program.
    #[error("{path}: format {found}, this build reads up to {newest}; upgrade to read this store")]
    TooNew {
        /// The file that says so.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format this build reads.
        newest: u32,
    },
    /// A range beyond the end of the volume.
    #[error("bytes {offset}..{} are beyond the end of the volume ({bytes} bytes)", offset + len)]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes the volume has.
        bytes: u64,
    },
    /// The volume was not there at that moment.
    #[error("volume {volume} did not exist at seq {seq}")]
    NoVolume {
        /// The volume.
        volume: VolumeId,
        /// The moment.
        seq: Seq,
    },
    /// The operating system refused.
    #[error("read {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The index failed.
    #[error("read the index")]
    Index(#[from] crate::index::IndexError),
    /// A server did not answer, or could not.
    #[error("{server}: {why}")]
    Server {
        /// HOST:PORT.
        server: String,
        /// Why.
        why: String,
    },
}

fn moments(seqs: Option<(Seq, Seq)>) -> String {
    seqs.map_or_else(String::new, |(first, last)| {
        format!(", in the frame of seq {first} to {last}")
    })
}

impl ReadError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// Are bytes of the store damaged (exit code 4)?
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }
}
