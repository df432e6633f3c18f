//! Which files differ between two moments of a file system, both of them mounted.
//!
//! Always true:
//! - G1: what is told is what the two trees hold: a file counts as changed if its bytes differ, whoever wrote them and
//!   whatever its times say; and so for its size, kind, mode, owner, time of change and extended attributes.
//! - G2: of a file on both sides only those bytes are read that can differ: which lie elsewhere, or where the volume
//!   was written to in between.
//!
//! One exception to G2: if nothing of that tells why a file's time of change is another, all of it is compared. Bytes
//! that lie in the journal of the file system alone (ext4 with `data=journal`) are in no place of the file yet.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use serde::Serialize;

use crate::interrupt::Interrupt;
use crate::placement::{Placement, Stretch};
use crate::walk::{Pair, WalkError, open, walk};

/// Files that are told; beyond, it is only said that there are more.
pub(crate) const FILES_MAX: usize = 100_000;
/// Stretches of a file that are told apart; one of more pieces is compared whole.
const STRETCHES_MAX: usize = 1 << 18;
const PIECE_BYTES: u64 = 1 << 20;

/// One side: a mounted file system.
#[derive(Debug)]
pub(crate) struct Side<'a> {
    pub(crate) root: &'a Path,
    pub(crate) placement: Placement,
}

/// What became of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Change {
    Added,
    Removed,
    Changed,
}

impl Change {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Change::Added => "added",
            Change::Removed => "removed",
            Change::Changed => "changed",
        }
    }
}

/// What of a file is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Aspect {
    /// It is something else now: a folder in place of a file, say.
    Kind,
    /// Its bytes; of a symbolic link, where it leads; of a device, which one it is.
    Content,
    Mode,
    Owner,
    /// The time at which it was changed. Not told of folders, whose content is.
    Time,
    Xattr,
}

impl Aspect {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Aspect::Kind => "kind",
            Aspect::Content => "content",
            Aspect::Mode => "mode",
            Aspect::Owner => "owner",
            Aspect::Time => "time",
            Aspect::Xattr => "xattr",
        }
    }
}

/// A file, folder, or whatever else has a name, that is not as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ChangedFile {
    /// Below the root; of a folder with a slash at its end.
    pub(crate) path: String,
    pub(crate) change: Change,
    /// Of what is there on both sides.
    pub(crate) what: Vec<Aspect>,
    /// Sizes; nothing where it is not there.
    pub(crate) bytes_before: Option<u64>,
    pub(crate) bytes_after: Option<u64>,
}

/// What differs; in the order of the paths.
#[derive(Debug, Default)]
pub(crate) struct ChangedFiles {
    pub(crate) files: Vec<ChangedFile>,
    /// There are more.
    pub(crate) truncated: bool,
}

/// The comparison of two trees.
pub(crate) struct Comparison<'a> {
    /// Before and after.
    pub(crate) sides: [Option<Side<'a>>; 2],
    /// Where the volume differs, in order.
    pub(crate) changed: &'a [Range<u64>],
    pub(crate) interrupt: &'a Interrupt,
}

impl Comparison<'_> {
    /// Adds what differs to `found`, each path with `prefix` before it.
    pub(crate) fn find(&self, prefix: &str, found: &mut ChangedFiles) -> Result<(), WalkError> {
        let roots = [0, 1].map(|side| self.sides[side].as_ref().map(|side| side.root));
        walk(roots, |pair| {
            self.interrupt.check().map_err(WalkError::at(&pair.path))?;
            let Some(mut file) = self.compare(pair)? else {
                return Ok(());
            };
            if found.files.len() >= FILES_MAX {
                found.truncated = true;
                return Ok(());
            }
            file.path.insert_str(0, prefix);
            found.files.push(file);
            Ok(())
        })
    }

    fn compare(&self, pair: &Pair) -> Result<Option<ChangedFile>, WalkError> {
        let (change, what) = match &pair.sides {
            [None, None] => return Ok(None),
            [None, Some(_)] => (Change::Added, Vec::new()),
            [Some(_), None] => (Change::Removed, Vec::new()),
            [Some(before), Some(after)] => match self.aspects(&pair.path, before, after)? {
                what if what.is_empty() => return Ok(None),
                what => (Change::Changed, what),
            },
        };
        let [bytes_before, bytes_after] = [0, 1].map(|side| pair.sides[side].as_ref().map(Metadata::len));
        let mut path = pair.path.display().to_string();
        if pair.sides.iter().flatten().last().is_some_and(Metadata::is_dir) {
            path.push('/');
        }
        Ok(Some(ChangedFile {
            path,
            change,
            what,
            bytes_before,
            bytes_after,
        }))
    }

    fn aspects(&self, path: &Path, before: &Metadata, after: &Metadata) -> Result<Vec<Aspect>, WalkError> {
        const KIND: u32 = 0o170_000;
        if before.mode() & KIND != after.mode() & KIND {
            return Ok(vec![Aspect::Kind]);
        }
        let is_same_time = times(before) == times(after);
        let mut found = Vec::new();
        let mut note = |differs: bool, aspect| found.extend(differs.then_some(aspect));
        note(self.content_differs(path, before, after)?, Aspect::Content);
        note(before.mode() != after.mode(), Aspect::Mode);
        let owner = |metadata: &Metadata| (metadata.uid(), metadata.gid());
        note(owner(before) != owner(after), Aspect::Owner);
        note(!before.is_dir() && !is_same_time, Aspect::Time);
        // Whatever changes them sets the time of the last change of the inode as well.
        let inode_time = |metadata: &Metadata| (metadata.ctime(), metadata.ctime_nsec(), metadata.ino());
        if inode_time(before) != inode_time(after) {
            note(
                self.of_both(path, xattrs)?
                    .is_some_and(|[one, other]| one != other),
                Aspect::Xattr,
            );
        }
        Ok(found)
    }

    /// Asks something of the same path on both sides, where there are two.
    fn of_both<T>(
        &self,
        path: &Path,
        ask: impl Fn(&Path) -> io::Result<T>,
    ) -> Result<Option<[T; 2]>, WalkError> {
        let [Some(before), Some(after)] = &self.sides else {
            return Ok(None);
        };
        let ask = |side: &Side<'_>| {
            let path = side.root.join(path);
            ask(&path).map_err(WalkError::at(&path))
        };
        Ok(Some([ask(before)?, ask(after)?]))
    }

    fn content_differs(&self, path: &Path, before: &Metadata, after: &Metadata) -> Result<bool, WalkError> {
        let kind = after.file_type();
        if kind.is_symlink() {
            let links = self.of_both(path, |path| fs::read_link(path))?;
            return Ok(links.is_some_and(|[one, other]| one != other));
        }
        if kind.is_block_device() || kind.is_char_device() {
            return Ok(before.rdev() != after.rdev());
        }
        if !kind.is_file() {
            return Ok(false);
        }
        if before.len() != after.len() {
            return Ok(true);
        }
        let [Some(one), Some(other)] = &self.sides else {
            return Ok(false);
        };
        let files = [
            (open(&one.root.join(path))?, &one.placement),
            (open(&other.root.join(path))?, &other.placement),
        ];
        let differs = || -> io::Result<bool> {
            let whole = 0..after.len();
            let suspects = match (stretches(&files[0])?, stretches(&files[1])?) {
                (Some(one), Some(other)) => self.suspects(&one, &other),
                _ => vec![whole.clone()],
            };
            let [one, other] = files.each_ref().map(|(file, _)| file);
            for range in &suspects {
                if self.bytes_differ(one, other, range.start..range.end.min(after.len()))? {
                    return Ok(true);
                }
            }
            Ok(times(before) != times(after) && self.bytes_differ(one, other, whole)?)
        };
        differs().map_err(WalkError::at(path))
    }

    /// Which bytes of a file may differ, by where they lie.
    fn suspects(&self, before: &[Stretch], after: &[Stretch]) -> Vec<Range<u64>> {
        let mut suspects = Vec::new();
        for (these, those) in [(before, after), (after, before)] {
            let mut those = those.iter().peekable();
            for stretch in these {
                while those
                    .next_if(|other| other.in_file.start < stretch.in_file.start)
                    .is_some()
                {}
                let is_where_it_was = those
                    .clone()
                    .take_while(|other| other.in_file.start == stretch.in_file.start)
                    .any(|other| other == stretch);
                let is_untouched = stretch
                    .on_volume()
                    .is_some_and(|range| !touches(self.changed, &range));
                if !(is_where_it_was && is_untouched) {
                    suspects.push(stretch.in_file.clone());
                }
            }
        }
        suspects
    }

    fn bytes_differ(&self, one: &File, other: &File, range: Range<u64>) -> io::Result<bool> {
        let mut at = range.start;
        let mut pieces = [Vec::new(), Vec::new()];
        while at < range.end {
            self.interrupt.check()?;
            let len = PIECE_BYTES.min(range.end - at) as usize;
            for (piece, file) in pieces.iter_mut().zip([one, other]) {
                piece.resize(len, 0);
                file.read_exact_at(piece, at)?;
            }
            if pieces[0] != pieces[1] {
                return Ok(true);
            }
            at += len as u64;
        }
        Ok(false)
    }
}

fn times(metadata: &Metadata) -> (i64, i64) {
    (metadata.mtime(), metadata.mtime_nsec())
}

/// Does a range meet any of some that are in order?
fn touches(changed: &[Range<u64>], range: &Range<u64>) -> bool {
    let after = changed.partition_point(|changed| changed.end <= range.start);
    changed
        .get(after)
        .is_some_and(|changed| changed.start < range.end)
}

/// Where a file lies; `None` if nobody tells, or in too many places.
fn stretches((file, placement): &(File, &Placement)) -> io::Result<Option<Vec<Stretch>>> {
    let mut stretches = Vec::new();
    let is_told = placement.each(file, |stretch| {
        stretches.push(stretch);
        match stretches.len() > STRETCHES_MAX {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    })?;
    Ok((is_told && stretches.len() <= STRETCHES_MAX).then_some(stretches))
}

type Xattrs = BTreeMap<OsString, Vec<u8>>;

fn xattrs(path: &Path) -> io::Result<Xattrs> {
    // As large as the kernel lets them be.
    let mut buffer = vec![0; 64 << 10];
    let mut found = Xattrs::new();
    let names = match rustix::fs::llistxattr(path, &mut buffer[..]) {
        Ok(len) => buffer[..len].to_vec(),
        Err(rustix::io::Errno::NOTSUP) => return Ok(found),
        Err(errno) => return Err(errno.into()),
    };
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let len = rustix::fs::lgetxattr(path, name, &mut buffer[..])?;
        let name = std::os::unix::ffi::OsStringExt::from_vec(name.to_vec());
        found.insert(name, buffer[..len].to_vec());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Place;

    fn at(in_file: Range<u64>, offset: u64) -> Stretch {
        let place = Place::At(offset);
        Stretch { in_file, place }
    }

    /// Goal: no byte that may differ is left out, and none is suspected that cannot. Method: one stretch after the
    /// other made suspect, for each reason there is.
    #[test]
    fn only_what_moved_or_was_written_is_suspected() {
        let interrupt = Interrupt::default();
        let suspects = |before: &[Stretch], after: &[Stretch], changed: &[(u64, u64)]| {
            let changed: Vec<_> = changed.iter().map(|(start, end)| *start..*end).collect();
            let comparison = Comparison {
                sides: [None, None],
                changed: &changed,
                interrupt: &interrupt,
            };
            let mut suspects = comparison.suspects(before, after);
            suspects.sort_by_key(|range| range.start);
            suspects.dedup();
            suspects
                .iter()
                .map(|range| (range.start, range.end))
                .collect::<Vec<_>>()
        };
        let file = [at(0..10, 100), at(10..20, 300), at(40..50, 200)];
        assert_eq!(
            suspects(&file, &file, &[(0, 100), (110, 200), (210, 300), (310, 400)]),
            []
        );
        assert_eq!(suspects(&file, &file, &[(0, 100), (309, 310)]), [(10, 20)]);
        assert_eq!(
            suspects(&file, &file, &[(0, 1000)]),
            [(0, 10), (10, 20), (40, 50)]
        );
        let moved = [at(0..10, 100), at(10..20, 301), at(40..50, 200)];
        assert_eq!(suspects(&file, &moved, &[]), [(10, 20)]);
        let punched = [at(0..10, 100), at(40..50, 200)];
        assert_eq!(suspects(&file, &punched, &[]), [(10, 20)]);
        assert_eq!(suspects(&punched, &file, &[]), [(10, 20)]);
        let place = Place::Elsewhere;
        let inline = [Stretch { in_file: 0..9, place }];
        assert_eq!(suspects(&inline, &inline, &[]), [(0, 9)]);
        let place = Place::Within(100..200);
        let packed = [Stretch { in_file: 0..9, place }];
        assert_eq!(suspects(&packed, &packed, &[(200, 300)]), []);
        assert_eq!(suspects(&packed, &packed, &[(199, 200)]), [(0, 9)]);
        // Two copies of the same bytes.
        let twice = [at(0..10, 100), at(0..10, 500)];
        assert_eq!(suspects(&twice, &twice, &[(0, 1)]), []);
        assert_eq!(suspects(&twice, &twice, &[(501, 502)]), [(0, 10)]);
    }
}
