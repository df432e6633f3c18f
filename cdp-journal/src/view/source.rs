//! What views read from: the index, and the groups of the log.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::error::ReadError;
use crate::format::{GROUP_BYTES_MAX, GROUP_HEADER_BYTES, decode_group};
use crate::index::{Db, Lookup, Overlay, Place};
use crate::types::{SegmentId, Seq};

/// Decoded groups that are kept for the next read: 4 MiB.
const CACHED_GROUPS_MAX: usize = 64;
/// Segments that are kept open.
const OPEN_SEGMENTS_MAX: usize = 128;
/// A group with its header at most.
pub(crate) const GROUP_STORED_BYTES_MAX: usize = GROUP_HEADER_BYTES + GROUP_BYTES_MAX;

/// Shared by the views of one store.
#[derive(Debug)]
pub(crate) struct ViewStore {
    log_dir: PathBuf,
    db: Option<Arc<Db>>,
    overlay: RwLock<Overlay>,
    segments: Mutex<HashMap<u64, Arc<File>>>,
    groups: Mutex<GroupCache>,
}

type GroupKey = (u64, u32);

#[derive(Debug, Default)]
struct GroupCache {
    groups: HashMap<GroupKey, Arc<Vec<u8>>>,
    order: VecDeque<GroupKey>,
}

impl ViewStore {
    pub(crate) fn new(log_dir: &Path, db: Option<Arc<Db>>) -> Self {
        Self {
            log_dir: log_dir.to_owned(),
            db,
            overlay: RwLock::new(Overlay::default()),
            segments: Mutex::default(),
            groups: Mutex::default(),
        }
    }

    /// Asks the index. No answer waits for the disk of the log.
    pub(crate) fn ask<T>(&self, question: impl FnOnce(Lookup<'_>) -> T) -> T {
        let overlay = self.overlay.read();
        question(Lookup {
            overlay: &overlay,
            db: self.db.as_deref(),
        })
    }

    /// Changes what lies over the database.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Overlay, Option<&Db>) -> T) -> T {
        change(&mut self.overlay.write(), self.db.as_deref())
    }

    pub(crate) fn segment_path(&self, segment: u64) -> PathBuf {
        let name = Seq::new(segment).map_or_else(|| "0.seg".to_owned(), |seq| SegmentId(seq).file_name());
        self.log_dir.join(name)
    }

    pub(crate) fn segment(&self, segment: u64) -> Result<Arc<File>, ReadError> {
        let mut segments = self.segments.lock();
        if let Some(file) = segments.get(&segment) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(self.open_segment(segment)?);
        if segments.len() >= OPEN_SEGMENTS_MAX {
            segments.clear();
        }
        segments.insert(segment, Arc::clone(&file));
        Ok(file)
    }

    /// Opens a segment apart from those that are kept open.
    pub(crate) fn open_segment(&self, segment: u64) -> Result<File, ReadError> {
        let path = self.segment_path(segment);
        File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ReadError::Damaged {
                path,
                offset: 0,
                what: "the segment is missing".to_owned(),
                seqs: None,
            },
            _ => ReadError::Io { path, source },
        })
    }

    /// Reads from the file of a segment until `buf` is full or the segment ends.
    pub(crate) fn read(
        &self,
        file: &File,
        segment: u64,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize, ReadError> {
        let mut filled = 0;
        while filled < buf.len() {
            match file.read_at(&mut buf[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(bytes) => filled += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(ReadError::Io {
                        path: self.segment_path(segment),
                        source,
                    });
                }
            }
        }
        Ok(filled)
    }

    /// The checked raw bytes of the group at `place`.
    pub(crate) fn group(&self, place: &Place) -> Result<Arc<Vec<u8>>, ReadError> {
        let key = (place.segment, place.group_offset);
        if let Some(group) = self.groups.lock().groups.get(&key) {
            return Ok(Arc::clone(group));
        }
        let mut stored = vec![0; GROUP_STORED_BYTES_MAX];
        let file = self.segment(place.segment)?;
        let filled = self.read(&file, place.segment, u64::from(place.group_offset), &mut stored)?;
        let mut raw = vec![0; GROUP_BYTES_MAX];
        let header = decode_group(&stored[..filled], place.group_crc, &mut raw);
        let header = header.ok_or_else(|| self.damage(place))?;
        raw.truncate(header.raw_bytes);
        let group = Arc::new(raw);
        let mut cache = self.groups.lock();
        while cache.order.len() >= CACHED_GROUPS_MAX {
            if let Some(oldest) = cache.order.pop_front() {
                cache.groups.remove(&oldest);
            }
        }
        if cache.groups.insert(key, Arc::clone(&group)).is_none() {
            cache.order.push_back(key);
        }
        Ok(group)
    }

    /// The error that says that the group at `place` is damaged.
    pub(crate) fn damage(&self, place: &Place) -> ReadError {
        ReadError::Damaged {
            path: self.segment_path(place.segment),
            offset: u64::from(place.group_offset),
            what: "bad checksum of a data group".to_owned(),
            seqs: self.frame_around(place),
        }
    }

    /// First and last record of the frame that holds a group. A walk, for messages only.
    fn frame_around(&self, place: &Place) -> Option<(Seq, Seq)> {
        let mut around = None;
        let mut from = place.segment;
        self.ask(|lookup| {
            while let Ok(Some(entry)) = lookup.frame_at_or_after(from) {
                if entry.segment != place.segment || entry.offset > u64::from(place.group_offset) {
                    break;
                }
                around = Some((Seq::new(entry.first_seq)?, Seq::new(entry.last_seq)?));
                from = entry.last_seq + 1;
            }
            around
        })
    }
}
