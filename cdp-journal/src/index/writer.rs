//! Keeping the index up with the log.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::IndexError;
use super::apply::{Applied, Applier, HeadCache};
use super::db::{self, Db};
use super::overlay::{DbCursor, Overlay};
use crate::error::ReadError;
use crate::format::Frame;
use crate::log::FrameLocation;
use crate::store::StoreLock;
use crate::types::{Seq, VolumeId};
use crate::view::{View, ViewStore};

/// Log bytes after which the index is flushed, so that a reader has no more than that to replay.
const FLUSH_LOG_BYTES: u64 = 64 << 20;
/// The same in time.
const FLUSH_EVERY: Duration = Duration::from_secs(10);

/// An index that was opened.
#[derive(Debug)]
pub(crate) struct IndexParts {
    pub(crate) db: Db,
    pub(crate) applied: Applied,
    /// Why it had to be made anew.
    pub(crate) rebuilt: Option<String>,
}

/// Opens the index in `dir`, or makes it anew.
pub(crate) fn open_index(dir: &Path, store: Uuid, is_new_store: bool) -> Result<IndexParts, IndexError> {
    if is_new_store {
        return Ok(IndexParts {
            db: db::create(dir, store)?,
            applied: Applied::default(),
            rebuilt: None,
        });
    }
    let opened = db::open_writer(dir, store).and_then(|db| {
        let applied = db.applied().map_err(|error| error.to_string())?;
        Ok((db, applied))
    });
    match opened {
        Ok((db, applied)) => Ok(IndexParts {
            db,
            applied,
            rebuilt: None,
        }),
        Err(reason) => rebuild_index(dir, store, reason),
    }
}

/// Makes an empty index in place of an unusable one.
pub(crate) fn rebuild_index(dir: &Path, store: Uuid, reason: String) -> Result<IndexParts, IndexError> {
    tracing::warn!(index = %dir.display(), reason, "rebuilding the index from the log");
    Ok(IndexParts {
        db: db::create(dir, store)?,
        applied: Applied::default(),
        rebuilt: Some(reason),
    })
}

/// Keeps the index up with the log. One per store.
#[derive(Debug)]
pub struct IndexWriter {
    db: Arc<Db>,
    applied: Applied,
    /// Empty between frames.
    overlay: Overlay,
    heads: HeadCache,
    views: Arc<ViewStore>,
    index_bytes: Arc<AtomicU64>,
    flushed_at: Instant,
    unflushed_log_bytes: u64,
    segment: Option<u64>,
    /// Held for as long as the writer lives.
    _lock: Arc<StoreLock>,
}

impl IndexWriter {
    pub(crate) fn new(
        parts: IndexParts,
        log_dir: &Path,
        index_bytes: Arc<AtomicU64>,
        lock: Arc<StoreLock>,
    ) -> Self {
        let db = Arc::new(parts.db);
        index_bytes.store(db.file_bytes(), Ordering::Relaxed);
        Self {
            views: Arc::new(ViewStore::new(log_dir, Some(Arc::clone(&db)))),
            db,
            segment: parts.applied.end.map(|(segment, _)| segment),
            applied: parts.applied,
            overlay: Overlay::default(),
            heads: HeadCache::default(),
            index_bytes,
            flushed_at: Instant::now(),
            unflushed_log_bytes: 0,
            _lock: lock,
        }
    }

    /// Adds the records of a durable frame (its header and record table suffice).
    pub fn apply(&mut self, frame: &[u8], location: &FrameLocation) -> Result<(), IndexError> {
        let frame = Frame::parse(frame).map_err(|error| IndexError::Frame(error.to_string()))?;
        self.apply_frame(&frame, location)
    }

    pub(crate) fn apply_frame(&mut self, frame: &Frame, location: &FrameLocation) -> Result<(), IndexError> {
        let mut applier = Applier {
            applied: &mut self.applied,
            overlay: &mut self.overlay,
            db: DbCursor::new(Some(&self.db)),
            heads: &mut self.heads,
        };
        applier.apply(frame, location)?;
        drop(applier);
        let mut batch = rocksdb::WriteBatch::default();
        let mut value = Vec::with_capacity(64);
        for (key, version) in std::mem::take(&mut self.overlay.versions) {
            value.clear();
            version.encode(&mut value);
            batch.put(key.encode(), &value);
        }
        for (key, value) in std::mem::take(&mut self.overlay.others) {
            batch.put(key, value);
        }
        self.db.db.write_without_wal(batch)?;
        self.unflushed_log_bytes += frame.header.frame_bytes as u64;
        let segment = Some(location.segment.0.get());
        let rolled = self.segment.replace(location.segment.0.get()) != segment;
        if rolled || self.unflushed_log_bytes >= FLUSH_LOG_BYTES || self.flushed_at.elapsed() >= FLUSH_EVERY {
            self.start_flush(false)?;
        }
        Ok(())
    }

    /// Writes what is in memory to disk, so that readers have less to replay.
    pub fn flush(&mut self) -> Result<(), IndexError> {
        self.start_flush(true)
    }

    fn start_flush(&mut self, wait: bool) -> Result<(), IndexError> {
        let mut options = rocksdb::FlushOptions::default();
        options.set_wait(wait);
        self.db.db.flush_opt(&options)?;
        self.index_bytes.store(self.db.file_bytes(), Ordering::Relaxed);
        self.flushed_at = Instant::now();
        self.unflushed_log_bytes = 0;
        Ok(())
    }

    /// Last record applied.
    pub fn applied(&self) -> Option<Seq> {
        self.applied.last
    }

    pub(crate) fn state(&self) -> &Applied {
        &self.applied
    }

    pub(crate) fn views(&self) -> &Arc<ViewStore> {
        &self.views
    }

    /// A volume as of the last record applied.
    pub fn head_view(&self, volume: VolumeId) -> Result<View, ReadError> {
        let seq = self.applied.last.unwrap_or(Seq::FIRST);
        let bytes = self.applied.volume_bytes.get(&volume.get()).copied();
        let bytes = bytes.ok_or(ReadError::NoVolume { volume, seq })?;
        Ok(View::new(Arc::clone(&self.views), volume, seq, bytes))
    }
}
