//! What a view reads from: an index and a log, here or at a server.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::changes::{Between, looked_up};
use super::plan::Item;
use crate::error::ReadError;
use crate::format::Group;
use crate::index::{BlockVersion, FrameGroups, Place};
use crate::types::{Seq, VolumeId};

/// Groups that are asked for together at most: 4 MiB.
pub(crate) const GROUPS_MAX: usize = 64;

/// Where a group lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct GroupPlace {
    /// First Seq of the segment.
    pub(crate) segment: u64,
    /// Of the group's header, in the segment.
    pub(crate) offset: u64,
    /// Its checksum; of the base of a delta it is not known, and what comes out has a checksum of its own.
    pub(crate) crc: Option<u32>,
}

impl GroupPlace {
    pub(crate) fn of(place: &Place) -> Self {
        Self {
            segment: place.segment,
            offset: u64::from(place.group_offset),
            crc: Some(place.group_crc),
        }
    }

    /// So many bytes behind the record table of a frame.
    pub(crate) fn behind(frame: &FrameGroups, offset: u32) -> Self {
        Self {
            segment: frame.segment,
            offset: frame.offset + u64::from(offset),
            crc: None,
        }
    }
}

/// How a group is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum GroupName {
    At(GroupPlace),
    /// In the frame that begins with a Seq, so many bytes behind its record table: as deltas name what they rest on.
    InFrame(Seq, u32),
}

/// A decoded group, and where it lies.
pub(crate) type PlacedGroup = (GroupPlace, Arc<Group>);

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

    /// Ranges (of whole blocks but for the ends of the range, merged, in order) that got another version between.
    fn changed(&self, between: &Between) -> Result<Vec<Range<u64>>, ReadError> {
        looked_up(self, between)
    }

    /// The checked groups of these names, [`GROUPS_MAX`] at most, in their order. `None` for a frame that is not there.
    fn groups(&self, names: &[GroupName]) -> Result<Vec<Option<PlacedGroup>>, ReadError>;

    /// A segment, to be read in long runs.
    fn segment_bytes(&self, segment: u64) -> Result<Arc<dyn SegmentBytes>, ReadError>;

    /// Has the kernel keep what tells where blocks lie, so many bytes of it at most, if it lies on this host; as long as
    /// `goes_on`.
    fn read_index_ahead(&self, _bytes_max: u64, _goes_on: &mut dyn FnMut() -> bool) {}

    /// Does what was read once cost little to read again?
    fn is_near(&self) -> bool {
        false
    }

    /// The error that says what is wrong with the group at `place`.
    fn damage(&self, place: &GroupPlace, what: &str) -> ReadError;
}

/// The bytes of one segment as they lie in the log.
pub(crate) trait SegmentBytes: Send + Sync {
    /// Reads until `buf` is full or the segment ends.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize, ReadError>;
    /// That much will be read soon; may do nothing.
    fn will_read(&self, _offset: u64, _len: u64) {}
}
