//! A volume at a [`Seq`], readable at any offset.

use std::io;
use std::ops::Range;

use crate::error::ReadError;
use crate::types::{Seq, VolumeId};

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
}

/// Bounds of [`View::copy_to`].
#[derive(Clone, Copy, Debug)]
pub struct CopyOptions {
    /// Threads that read, decompress and write.
    pub threads: usize,
    /// Bytes of the volume whose index entries are held at a time.
    pub window_bytes: u64,
}

impl Default for CopyOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        Self {
            threads: threads.clamp(1, 8),
            window_bytes: 2 << 30,
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
}

/// A volume at a [`Seq`].
#[derive(Debug)]
pub struct View {
    volume: VolumeId,
    seq: Seq,
    bytes: u64,
}

impl View {
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
        let _ = (offset, buf);
        unimplemented!()
    }

    /// What lies in a range, in order, without holes.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, ReadError> {
        let _ = range;
        unimplemented!()
    }

    /// Copies everything. `progress` is told how many more bytes are done, from several threads.
    pub fn copy_to(
        &self,
        sink: &dyn Sink,
        options: &CopyOptions,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<CopyReport, CopyError> {
        let _ = (sink, options, progress);
        unimplemented!()
    }

    /// Ranges (of whole sectors, merged, in order) whose stored version at this moment is another than at `older`: all that can
    /// differ. The bytes may be equal all the same.
    pub fn changed_since(&self, older: Option<Seq>, range: Range<u64>) -> Result<Vec<Range<u64>>, ReadError> {
        let _ = (older, range);
        unimplemented!()
    }
}
