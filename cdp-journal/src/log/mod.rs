//! The log: frames in segments, the only truth.
//!
//! Always true:
//! - L1: a frame is appended after the frame before it, its beginning last: who follows the log finds all of it or none.
//! - L2: a segment is durable before its successor exists.
//! - L3: what [`LogWriter::sync`] reported is found by every later recovery, whatever the disk did with the
//!   rest (`a_crash_at_any_disk_operation_keeps_what_was_durable`).
//! - L4: once a sync has failed nothing is reported durable any more, and the writer writes nothing once it knows of it.
//! - L5: a frame that is not whole and that nobody vouches for (no later envelope, no later segment, not the index)
//!   is a torn append: recovery cuts it, readers do not see it, verification does not call it damage.

mod disk;
mod recover;
mod scan;
mod sync;
mod writer;

#[cfg(test)]
mod fault;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

use crate::types::{SegmentId, Seq};

pub(crate) use disk::{Disk, RealDisk};
pub(crate) use recover::{LogState, recover};
pub(crate) use scan::{
    Depth, Found, FoundFrame, HeaderState, Segment, Tail, header_error, open_error, segments,
};
pub use sync::SyncJob;
pub use writer::LogWriter;
pub(crate) use writer::{LogLimits, SEGMENT_LATE_PART};

/// Where a frame lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLocation {
    /// In which segment.
    pub segment: SegmentId,
    /// First byte of the frame itself in the segment's file.
    pub offset: u64,
}

/// How full a store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes of log and index.
    pub used_bytes: u64,
    /// It is full when it has this many: by its own bound, or because its file system has no more.
    pub limit_bytes: u64,
}

/// A frame was not appended, or the log not synced.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// No room, by `store_bytes_max` or on the file system. The log is as it was; try again when there is room.
    #[error("the store is full: {used_bytes} bytes used, {limit}; free some space or raise store_bytes_max")]
    StoreFull {
        /// Bytes the store holds.
        used_bytes: u64,
        /// Which bound was met.
        limit: String,
    },
    /// The frame does not follow the last one.
    #[error("frame begins at seq {found}, the log goes on at {expected}")]
    OutOfOrder {
        /// Next in the log.
        expected: Seq,
        /// First of the frame.
        found: Seq,
    },
    /// The file system failed. After a failed sync or a write that could not be undone, the writer is poisoned.
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
    /// An earlier failure: what is on disk is unknown. Open the store again.
    #[error("the log stopped after a failure ({reason}); reopen the store")]
    Poisoned {
        /// The failure.
        reason: String,
    },
}

impl LogError {
    /// Nothing was changed and a later append may succeed.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::StoreFull { .. })
    }
}
