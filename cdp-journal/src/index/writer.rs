//! Keeping the index up with the log.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::IndexError;
use super::apply::{Applied, Applier, HeadCache};
use super::db::{self, Db};
use super::overlay::DbCursor;
use crate::error::ReadError;
use crate::format::Frame;
use crate::log::FrameLocation;
use crate::store::StoreLock;
use crate::types::{Seq, VolumeId};
use crate::view::{View, ViewStore};

/// Log bytes after which the index is flushed, so that a reader has no more than that to replay.
const FLUSH_LOG_BYTES: u64 = 128 << 20;
/// The same in time.
const FLUSH_EVERY: Duration = Duration::from_secs(10);
/// The same in keys, which are in memory until then: some 100 bytes each.
const FLUSH_KEYS: usize = 1 << 17;

/// Keys that may be in memory where the file system has no room for them...
const UNFLUSHED_KEYS_MAX: usize = 4 * FLUSH_KEYS;
/// ... and how often it is asked for some.
const ROOM_INTERVAL: Duration = Duration::from_secs(1);

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
    heads: HeadCache,
    /// Its overlay holds what was applied since the last flush.
    views: Arc<ViewStore>,
    /// A frame was applied in part: nothing of it may reach the disk.
    failed: bool,
    index_bytes: Arc<AtomicU64>,
    flushed_at: Instant,
    /// The last flush found no room.
    has_no_room: bool,
    tried_at: Instant,
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
            heads: HeadCache::default(),
            failed: false,
            index_bytes,
            flushed_at: Instant::now(),
            has_no_room: false,
            tried_at: Instant::now(),
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
        self.refuse_if_failed()?;
        let Self {
            views,
            applied,
            heads,
            ..
        } = self;
        let (result, keys) = views.change(|overlay, db| {
            let mut applier = Applier {
                applied,
                overlay,
                db: DbCursor::new(db),
                heads,
            };
            let result = applier.apply(frame, location);
            drop(applier);
            (result, overlay.len())
        });
        self.failed = result.is_err();
        result?;
        self.unflushed_log_bytes += frame.header.frame_bytes as u64;
        let segment = Some(location.segment.0.get());
        let rolled = self.segment.replace(location.segment.0.get()) != segment;
        let is_due = match self.has_no_room {
            true => self.tried_at.elapsed() >= ROOM_INTERVAL,
            false => {
                rolled
                    || keys >= FLUSH_KEYS
                    || self.unflushed_log_bytes >= FLUSH_LOG_BYTES
                    || self.flushed_at.elapsed() >= FLUSH_EVERY
            }
        };
        match is_due {
            true => self.flush_if_there_is_room(keys),
            false => Ok(()),
        }
    }

    /// What finds no room stays in memory, within a bound: a log without room gets few frames more.
    fn flush_if_there_is_room(&mut self, keys: usize) -> Result<(), IndexError> {
        self.tried_at = Instant::now();
        match self.flush() {
            Err(error) if error.is_no_space() && keys < UNFLUSHED_KEYS_MAX => {
                if !self.has_no_room {
                    tracing::warn!("{error}: the index stays in memory until there is room");
                }
                self.has_no_room = true;
                Ok(())
            }
            flushed => {
                self.has_no_room = false;
                flushed
            }
        }
    }

    /// Writes what is in memory to disk, so that readers have less to replay.
    pub fn flush(&mut self) -> Result<(), IndexError> {
        self.refuse_if_failed()?;
        // Views go on meanwhile. Until memory is cleared they find the same in both layers.
        let flushed = self.views.ask(|lookup| match lookup.overlay.is_empty() {
            true => Ok(false),
            false => self
                .db
                .add_run(|put| lookup.overlay.for_each_encoded(put))
                .map(|()| true),
        })?;
        if flushed {
            self.views.change(|overlay, _| overlay.clear());
            self.index_bytes.store(self.db.file_bytes(), Ordering::Relaxed);
        }
        self.flushed_at = Instant::now();
        self.unflushed_log_bytes = 0;
        Ok(())
    }

    fn refuse_if_failed(&self) -> Result<(), IndexError> {
        if self.failed {
            return Err(IndexError::Frame(
                "an earlier frame failed; open the store again".to_owned(),
            ));
        }
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
        Ok(View::new(Arc::clone(&self.views) as _, volume, seq, bytes))
    }
}
