//! The log: frames in segments, the only truth.

use std::io;
use std::path::PathBuf;

use crate::format::SealedFrame;
use crate::types::{SegmentId, Seq};

/// Where a frame lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLocation {
    /// In which segment.
    pub segment: SegmentId,
    /// First byte of the frame itself in the segment's file.
    pub offset: u64,
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

/// Appends frames. One per store.
#[derive(Debug)]
pub struct LogWriter {}

impl LogWriter {
    /// Appends a frame with a single write. It is durable after the next [`LogWriter::sync`].
    pub fn append(&mut self, frame: &SealedFrame) -> Result<FrameLocation, LogError> {
        let _ = frame;
        unimplemented!()
    }

    /// Makes everything appended durable. Returns the last durable record.
    pub fn sync(&mut self) -> Result<Option<Seq>, LogError> {
        unimplemented!()
    }

    /// The Seq that the next frame must begin with.
    pub fn next_seq(&self) -> Seq {
        unimplemented!()
    }

    /// Last record appended.
    pub fn appended(&self) -> Option<Seq> {
        unimplemented!()
    }

    /// Last record known to be durable.
    pub fn durable(&self) -> Option<Seq> {
        unimplemented!()
    }

    /// Bytes of all segments.
    pub fn log_bytes(&self) -> u64 {
        unimplemented!()
    }
}
