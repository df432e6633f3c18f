//! From (volume, block, Seq) to where the bytes lie.
//!
//! Only durable frames are applied. What they give is kept in memory and added to RocksDB as one sorted file, together
//! with how far it reaches, so the index on disk is always the exact state after some frame; the rest is replayed from
//! the log. It is never repaired: an index
//! that is damaged, of another format or ahead of the log is made anew.
//!
//! The same code serves the writer, whose overlay empties into RocksDB from time to time, and a reader, who keeps the
//! log's tail in the overlay.

mod apply;
mod db;
mod event;
mod key;
mod lookup;
mod overlay;
mod version;
mod writer;

pub(crate) use apply::{Applied, Applier, HeadCache};
pub(crate) use db::{Db, open_reader};
pub(crate) use event::{Event, EventBody};
pub(crate) use key::CHUNK_BLOCKS;
pub(crate) use lookup::{BlockVersion, FrameEntry, FrameGroups, Lookup};
pub(crate) use overlay::{DbCursor, Overlay};
pub(crate) use version::{Place, Source, Version};
pub use writer::IndexWriter;
pub(crate) use writer::{IndexParts, open_index, rebuild_index};

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
    /// An unusable index, or what a crash left of one, could not be removed.
    #[error("remove what is left of the index")]
    Remove(#[source] std::io::Error),
}

impl IndexError {
    /// Did it find no room? RocksDB tells that in the words of the C library.
    pub fn is_no_space(&self) -> bool {
        let says = |error: &rocksdb::Error| {
            let text = error.to_string();
            text.contains("No space left on device") || text.contains("Disk quota exceeded")
        };
        matches!(self, Self::Db(error) if says(error))
    }
}
