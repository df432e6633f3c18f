//! What a view reads from: an index and a log, here or at a server.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::plan::Item;
use crate::error::ReadError;
use crate::index::{BlockVersion, Place};
use crate::types::{Seq, VolumeId};

/// Where the bytes of views come from. What it gives is not trusted: every byte is checked against the checksum that
/// the index holds for it.
pub(crate) trait Blocks: Debug + Send + Sync {
    /// What a view shows in `range`, in order.
    fn plan(
        &self,
        volume: VolumeId,
        seq: Seq,
        range: Range<u64>,
        visit: &mut dyn FnMut(Item),
    ) -> Result<(), ReadError>;

    /// The versions that a view shows in `blocks`, which lie in one aligned run of
    /// [`CHUNK_BLOCKS`](crate::index::CHUNK_BLOCKS). `None`: before everything.
    fn versions(
        &self,
        volume: VolumeId,
        seq: Option<Seq>,
        blocks: Range<u64>,
        out: &mut Vec<BlockVersion>,
    ) -> Result<(), ReadError>;

    /// The data of these will be read soon. May fetch it all at once, where each would take a way of its own.
    fn will_need(&self, _items: &[Item]) -> Result<(), ReadError> {
        Ok(())
    }

    /// The checked raw bytes of the group at `place`.
    fn group(&self, place: &Place) -> Result<Arc<Vec<u8>>, ReadError>;

    /// A segment, to be read in long runs.
    fn segment_bytes(&self, segment: u64) -> Result<Arc<dyn SegmentBytes>, ReadError>;

    /// The error that says that the group at `place` is damaged.
    fn damage(&self, place: &Place) -> ReadError;
}

/// The bytes of one segment as they lie in the log.
pub(crate) trait SegmentBytes: Send + Sync {
    /// Reads until `buf` is full or the segment ends.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize, ReadError>;
    /// That much will be read soon; may do nothing.
    fn will_read(&self, _offset: u64, _len: u64) {}
}
