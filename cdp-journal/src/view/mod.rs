//! A volume at a [`Seq`], readable at any offset.

mod blocks;
mod cache;
mod changes;
mod content;
mod copy;
mod gather;
mod plan;
mod source;
#[cfg(test)]
mod tests;
mod windows;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::error::ReadError;
use crate::types::{BLOCK_BYTES, Seq, VolumeId};

pub(crate) use blocks::{Blocks, GROUPS_MAX, GroupName, GroupPlace, PlacedGroup, SegmentBytes};
pub(crate) use cache::GroupCache;
pub(crate) use changes::Between;
pub(crate) use content::{Wanted, read as read_content};
pub(crate) use plan::{GroupRange, Item};
pub(crate) use source::{GROUP_STORED_BYTES_MAX, ViewStore, read_full};

/// What a stretch of a view is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Known to be all zeroes, or never written.
    Zero,
    /// Bytes lie in the log.
    Data,
}

/// A stretch of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What is there.
    pub kind: ExtentKind,
}

/// Where [`View::copy_to`] puts a view. Called from several threads, ranges never overlap, in any order.
pub trait Sink: Sync {
    /// Bytes at an offset.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Zeroes at an offset. May do nothing where the target is known to be zero.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Asked now and then, also while nothing is ready to be written: an error ends the copy.
    fn go_on(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Bounds of [`View::copy_to`].
#[derive(Clone, Copy, Debug)]
pub struct CopyOptions {
    /// Threads that read, decompress and write.
    pub threads: usize,
    /// Bytes of data whose index entries are held at a time, while as many are looked up.
    pub window_bytes: u64,
    /// Memory in which pieces that lie scattered in the log are put together; a long range of them reaches the sink
    /// as stretches of two mebibytes. Where it is less than what is scattered in a window, the log is read again for
    /// each part that fits; where that would be often, or with 0, they are handed on as they come.
    pub gather_bytes_max: u64,
    /// One thread gives the sink data at a time, while the others read and unpack: for a sink whose writers would
    /// only wait for each other.
    pub one_writer: bool,
}

impl Default for CopyOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        Self {
            threads: threads.clamp(1, 8),
            window_bytes: 2 << 30,
            gather_bytes_max: 256 << 20,
            one_writer: true,
        }
    }
}

/// What [`View::copy_to`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyReport {
    /// Bytes given to [`Sink::write_at`].
    pub data_bytes: u64,
    /// Bytes given to [`Sink::zero`].
    pub zero_bytes: u64,
}

/// A copy stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The view could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The target could not be written.
    #[error("write {len} bytes at byte {offset} of the target")]
    Write {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Not all of it reached the target, for no reason that is known. Never seen; looked for all the same.
    #[error(
        "{done_bytes} of {wanted_bytes} bytes reached the target: this is an error of the program, please tell us"
    )]
    Incomplete {
        /// Written, as data or as zeroes.
        done_bytes: u64,
        /// What should have been.
        wanted_bytes: u64,
    },
}

/// A volume at a [`Seq`].
#[derive(Debug, Clone)]
pub struct View {
    store: Arc<dyn Blocks>,
    volume: VolumeId,
    seq: Seq,
    bytes: u64,
}

impl View {
    pub(crate) fn new(store: Arc<dyn Blocks>, volume: VolumeId, seq: Seq, bytes: u64) -> Self {
        Self {
            store,
            volume,
            seq,
            bytes,
        }
    }

    /// Which volume.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// At which record.
    pub fn seq(&self) -> Seq {
        self.seq
    }

    /// Its size at that moment.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Fills `buf` with the bytes at `offset`, all checked against their checksums.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let range = self.checked(offset, buf.len() as u64)?;
        let mut wanted = Vec::new();
        self.store.plan(self.volume, self.seq, range, &mut |item| {
            let start = (item.offset - offset) as usize;
            let target = start..start + item.len as usize;
            match item.data {
                None => buf[target].fill(0),
                Some(data) => wanted.push(Wanted {
                    place: GroupPlace::of(&data.place),
                    from: data.in_group as usize,
                    target,
                }),
            }
        })?;
        read_content(&*self.store, &wanted, buf)
    }

    /// Reads so many bytes at most of what tells where blocks lie, the smallest files first, from a disk that may be slow into the
    /// kernel's memory: a block that is read later then costs one read of the disk, where it would cost several. Returns when
    /// that is done, or soon after `goes_on` is false; to be called on a thread of its own. Does nothing for a store that is
    /// not on this host.
    pub fn read_index_ahead(&self, bytes_max: u64, mut goes_on: impl FnMut() -> bool) {
        self.store.read_index_ahead(bytes_max, &mut goes_on);
    }

    fn checked(&self, offset: u64, len: u64) -> Result<Range<u64>, ReadError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.bytes => Ok(offset..end),
            _ => Err(ReadError::OutOfRange {
                offset,
                len,
                bytes: self.bytes,
            }),
        }
    }

    /// Where the bytes of a range lie, in order, without holes.
    pub(crate) fn items(&self, range: Range<u64>, visit: &mut dyn FnMut(Item)) -> Result<(), ReadError> {
        let range = self.checked(range.start, range.end.saturating_sub(range.start))?;
        self.store.plan(self.volume, self.seq, range, visit)
    }

    /// What lies in a range, in order, without holes.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, ReadError> {
        let range = self.checked(range.start, range.end.saturating_sub(range.start))?;
        let mut extents: Vec<Extent> = Vec::new();
        self.store.plan(self.volume, self.seq, range, &mut |item| {
            let kind = if item.data.is_some() {
                ExtentKind::Data
            } else {
                ExtentKind::Zero
            };
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.len += item.len,
                _ => extents.push(Extent {
                    offset: item.offset,
                    len: item.len,
                    kind,
                }),
            }
        })?;
        Ok(extents)
    }

    /// The record that wrote the block at `offset` last; of bytes that were read back, the one they are valid
    /// after. `None` if it was never written.
    pub fn written_by(&self, offset: u64) -> Result<Option<Seq>, ReadError> {
        let block = self.checked(offset, 1)?.start / BLOCK_BYTES;
        let mut versions = Vec::new();
        self.store
            .versions(self.volume, Some(self.seq), block..block + 1, &mut versions)?;
        Ok(versions.first().and_then(|version| Seq::new(version.seq)))
    }

    /// Copies everything. `progress` is told how many more bytes are done, from several threads; what is put together in
    /// memory first (see [`CopyOptions::gather_bytes_max`]) counts as done there.
    pub fn copy_to(
        &self,
        sink: &dyn Sink,
        options: &CopyOptions,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<CopyReport, CopyError> {
        copy::copy(self, std::iter::once(0..self.bytes), sink, options, progress)
    }

    /// Copies some ranges, which must be in order and not overlap; otherwise as [`View::copy_to`].
    pub fn copy_ranges_to(
        &self,
        ranges: &[Range<u64>],
        sink: &dyn Sink,
        options: &CopyOptions,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<CopyReport, CopyError> {
        for range in ranges {
            self.checked(range.start, range.end.saturating_sub(range.start))?;
        }
        copy::copy(self, ranges.iter().cloned(), sink, options, progress)
    }

    /// Ranges (of whole blocks, merged, in order) whose stored version at this moment is another than at `older`
    /// (`None`: before everything): all that can differ. The bytes may be equal all the same. Costs what was recorded
    /// since or what the range is long, whichever is less.
    pub fn changed_since(&self, older: Option<Seq>, range: Range<u64>) -> Result<Vec<Range<u64>>, ReadError> {
        let range = self.checked(range.start, range.end.saturating_sub(range.start))?;
        let here = Some(self.seq);
        self.store.changed(&Between {
            volume: self.volume,
            after: older.min(here),
            until: self.seq.max(older.unwrap_or(Seq::FIRST)),
            range,
        })
    }
}
