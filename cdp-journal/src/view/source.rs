//! What views read from: the index, and the groups of the log.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use rustix::fs::{Advice, fadvise};

use super::changes::{self, Between};
use super::plan::plan;
use super::{Blocks, GroupCache, GroupName, GroupPlace, Item, PlacedGroup, SegmentBytes};
use crate::error::ReadError;
use crate::format::{Frame, FrameError, FrameHeader, GROUP_BYTES_MAX, GROUP_HEADER_BYTES, GroupHeader};
use crate::index::{BlockVersion, Db, FrameEntry, Lookup, Overlay};
use crate::types::{SegmentId, Seq, VolumeId};

/// Decoded groups that are kept for the next read: 16 MiB. Deltas go back to groups that their neighbours go back to.
const CACHED_GROUPS_MAX: usize = 256;
/// Segments that are kept open.
const OPEN_SEGMENTS_MAX: usize = 128;
/// A group with its header at most.
pub(crate) const GROUP_STORED_BYTES_MAX: usize = GROUP_HEADER_BYTES + GROUP_BYTES_MAX;

/// What is read of a group before it is known how long it is: most are shorter.
const FIRST_READ_BYTES: usize = 16 << 10;

const _: () = assert!(FIRST_READ_BYTES > GROUP_HEADER_BYTES && FIRST_READ_BYTES < GROUP_STORED_BYTES_MAX);

thread_local! {
    /// Where a thread reads groups to.
    static STORED: RefCell<Vec<u8>> = RefCell::new(vec![0; GROUP_STORED_BYTES_MAX]);
}

/// Shared by the views of one store.
#[derive(Debug)]
pub(crate) struct ViewStore {
    log_dir: PathBuf,
    db: Option<Arc<Db>>,
    overlay: RwLock<Overlay>,
    segments: Mutex<HashMap<u64, Arc<File>>>,
    groups: GroupCache,
}

impl ViewStore {
    pub(crate) fn new(log_dir: &Path, db: Option<Arc<Db>>) -> Self {
        Self {
            log_dir: log_dir.to_owned(),
            db,
            overlay: RwLock::new(Overlay::default()),
            segments: Mutex::default(),
            groups: GroupCache::new(CACHED_GROUPS_MAX),
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
        read_full(file, offset, buf).map_err(|source| ReadError::Io {
            path: self.segment_path(segment),
            source,
        })
    }

    /// A frame that the index knows, and its header and record table as they lie in the log.
    pub(crate) fn frame_head(&self, entry: &FrameEntry) -> Result<(Frame, Vec<u8>), ReadError> {
        let damage = |what: &str| ReadError::Damaged {
            path: self.segment_path(entry.segment),
            offset: entry.offset,
            what: what.to_owned(),
            seqs: Seq::new(entry.first_seq).zip(Seq::new(entry.last_seq)),
        };
        let damaged = |error: FrameError| damage(&error.to_string());
        let file = self.segment(entry.segment)?;
        let mut head = vec![0; FrameHeader::BYTES];
        self.read(&file, entry.segment, entry.offset, &mut head)?;
        let header = FrameHeader::decode(&head).map_err(damaged)?;
        head.resize(header.prefix_bytes(), 0);
        self.read(&file, entry.segment, entry.offset, &mut head)?;
        let frame = Frame::parse(&head).map_err(damaged)?;
        if (frame.header.first_seq.get(), frame.header.last_seq().get()) != (entry.first_seq, entry.last_seq)
        {
            return Err(damage("another frame than the index says"));
        }
        Ok((frame, head))
    }

    /// Where the group of that name lies; `None` if there is no such frame.
    pub(crate) fn place_of(&self, name: &GroupName) -> Result<Option<GroupPlace>, ReadError> {
        let known = self.groups.place_of(name);
        let (None, GroupName::InFrame(first, offset)) = (known, name) else {
            return Ok(known);
        };
        let entry = self.ask(|lookup| lookup.frame_at_or_after(first.get()))?;
        let frame = entry
            .filter(|entry| entry.first_seq == first.get())
            .map(|entry| entry.groups());
        Ok(frame.map(|frame| {
            self.groups.put_frame(frame);
            GroupPlace::behind(&frame, *offset)
        }))
    }

    fn group(&self, name: &GroupName) -> Result<Option<PlacedGroup>, ReadError> {
        let Some(place) = self.place_of(name)? else {
            return Ok(None);
        };
        if let Some(group) = self.groups.get(&place) {
            return Ok(Some(group));
        }
        let file = self.segment(place.segment)?;
        STORED.with_borrow_mut(|stored| {
            let (first, rest) = stored.split_at_mut(FIRST_READ_BYTES);
            let mut filled = self.read(&file, place.segment, place.offset, first)?;
            // What makes no sense is told by who decodes it.
            let header = GroupHeader::decode(&first[..filled]);
            let missing = header.map_or(0, |header| header.group_bytes().saturating_sub(FIRST_READ_BYTES));
            if missing > 0 {
                let rest = rest.get_mut(..missing).unwrap_or_default();
                let offset = place.offset + FIRST_READ_BYTES as u64;
                filled += self.read(&file, place.segment, offset, rest)?;
            }
            let damage = |what: &str| self.damage(&place, what);
            self.groups.take_in(place, &stored[..filled], damage).map(Some)
        })
    }

    /// First and last record of the frame that holds a group. A walk, for messages only.
    fn frame_around(&self, place: &GroupPlace) -> Option<(Seq, Seq)> {
        let mut around = None;
        let mut from = place.segment;
        self.ask(|lookup| {
            while let Ok(Some(entry)) = lookup.frame_at_or_after(from) {
                if entry.segment != place.segment || entry.offset > place.offset {
                    break;
                }
                around = Some((Seq::new(entry.first_seq)?, Seq::new(entry.last_seq)?));
                from = entry.last_seq + 1;
            }
            around
        })
    }
}

impl Blocks for ViewStore {
    fn plan(
        &self,
        volume: VolumeId,
        seq: Seq,
        range: Range<u64>,
        visit: &mut dyn FnMut(Item),
    ) -> Result<(), ReadError> {
        plan(self, volume, seq, range, visit)
    }

    fn versions(
        &self,
        volume: VolumeId,
        seq: Option<Seq>,
        blocks: Range<u64>,
        out: &mut Vec<BlockVersion>,
    ) -> Result<(), ReadError> {
        let seq = Seq::number_of(seq);
        Ok(self.ask(|lookup| lookup.blocks(&mut lookup.cursor(), volume, blocks, seq, out))?)
    }

    fn changed(&self, between: &Between) -> Result<Vec<Range<u64>>, ReadError> {
        changes::changed(self, between)
    }

    fn groups(&self, names: &[GroupName]) -> Result<Vec<Option<PlacedGroup>>, ReadError> {
        names.iter().map(|name| self.group(name)).collect()
    }

    fn segment_bytes(&self, segment: u64) -> Result<Arc<dyn SegmentBytes>, ReadError> {
        let file = self.open_segment(segment)?;
        // Hints may fail: all is read all the same.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        let path = self.segment_path(segment);
        Ok(Arc::new(LocalSegment { file, path }))
    }

    fn read_index_ahead(&self, bytes_max: u64, goes_on: &mut dyn FnMut() -> bool) {
        if let Some(db) = &self.db {
            db.read_ahead(bytes_max, goes_on);
        }
    }

    fn is_near(&self) -> bool {
        true
    }

    fn damage(&self, place: &GroupPlace, what: &str) -> ReadError {
        ReadError::Damaged {
            path: self.segment_path(place.segment),
            offset: place.offset,
            what: what.to_owned(),
            seqs: self.frame_around(place),
        }
    }
}

struct LocalSegment {
    file: File,
    path: PathBuf,
}

impl SegmentBytes for LocalSegment {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize, ReadError> {
        read_full(&self.file, offset, buf).map_err(ReadError::io(&self.path))
    }

    fn will_read(&self, offset: u64, len: u64) {
        let _ = fadvise(&self.file, offset, NonZeroU64::new(len), Advice::WillNeed);
    }
}

/// Reads until `buf` is full or the file ends.
pub(crate) fn read_full(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match file.read_at(&mut buf[filled..], offset.saturating_add(filled as u64)) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
