//! From (volume, block, Seq) to where the bytes lie.

use crate::error::ReadError;
use crate::log::FrameLocation;
use crate::types::{Seq, VolumeId};
use crate::view::View;

/// The index failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// RocksDB says so.
    #[error("index: {0}")]
    Db(#[from] rocksdb::Error),
    /// A key or value makes no sense.
    #[error("index: {0}; delete the index folder, it is rebuilt from the log")]
    Corrupt(&'static str),
    /// A frame that does not follow the last one applied, or is not one.
    #[error("index: {0}")]
    Frame(String),
}

/// Keeps the index up with the log. One per store.
#[derive(Debug)]
pub struct IndexWriter {}

impl IndexWriter {
    /// Adds the records of a durable frame (header and record table suffice).
    pub fn apply(&mut self, frame: &[u8], location: &FrameLocation) -> Result<(), IndexError> {
        let _ = (frame, location);
        unimplemented!()
    }

    /// Writes what is in memory to disk, so that readers have less to replay.
    pub fn flush(&mut self) -> Result<(), IndexError> {
        unimplemented!()
    }

    /// Last record applied.
    pub fn applied(&self) -> Option<Seq> {
        unimplemented!()
    }

    /// A volume as of the last record applied.
    pub fn head_view(&self, volume: VolumeId) -> Result<View, ReadError> {
        let _ = volume;
        unimplemented!()
    }
}
