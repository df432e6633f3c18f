//! Reading a store, also beside a live writer.

use std::io;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use super::records::{FrameData, FrameRecords, Records};
use super::timeline::Timeline;
use super::{INDEX_DIR, LOCK_FILE, LOG_DIR, StoreFile, StoreLock};
use crate::error::{OpenError, ReadError};
use crate::history::{History, VolumeInfo};
use crate::index::{
    Applied, Applier, BlockVersion, DbCursor, EventBody, FrameEntry, HeadCache, IndexError, open_reader,
};
use crate::log::{Disk, FoundFrame, RealDisk, Tail, open_error, segments};
use crate::types::{SegmentId, Seq, VolumeId, WallNs};
use crate::verify::{self, VerifyReport};
use crate::view::{Blocks, GroupName, GroupPlace, View, ViewStore};
use crate::when::{Moment, NotExact, NotExactCause, Point, When, WhenError};

/// How long a live writer is given to cover a moment that has just passed.
const COVER_WAIT_MAX: Duration = Duration::from_secs(5);
const COVER_POLL: Duration = Duration::from_millis(20);
/// Keys in memory after which the index is opened afresh, for the writer will have flushed them.
const OVERLAY_KEYS_MAX: usize = 1 << 20;

/// A store opened for reading. Never touches the folder.
#[derive(Debug)]
pub struct StoreReader {
    dir: PathBuf,
    store: Uuid,
    disk: RealDisk,
    /// Last record that the index knew to be durable when the store was opened.
    indexed: Option<Seq>,
    state: RwLock<Arc<ViewStore>>,
    progress: Mutex<Progress>,
}

/// How far the log was read.
#[derive(Debug)]
struct Progress {
    tail: Tail,
    applied: Applied,
    heads: HeadCache,
}

impl StoreReader {
    /// Opens the store in `dir` as far as its log reaches now.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let store = StoreFile::read(dir)?.ok_or_else(|| OpenError::NotAStore { path: dir.to_owned() })?;
        let disk = RealDisk::read_only(&dir.join(LOG_DIR));
        let (state, progress, indexed) = open_state(dir, store.uuid, &disk)?;
        let reader = Self {
            dir: dir.to_owned(),
            store: store.uuid,
            disk,
            indexed,
            state: RwLock::new(Arc::new(state)),
            progress: Mutex::new(progress),
        };
        reader
            .refresh()
            .map_err(|error| open_error(error, reader.head().map(|head| head.seq)))?;
        let head = reader.head().map(|head| head.seq);
        if indexed > head {
            // Only what is durable is indexed.
            tracing::warn!(
                store = %dir.display(),
                "the log ends at seq:{}, and its index knows of seq:{}: what was recorded in between is gone, as after an interrupted copy; all moments are of what is left",
                Seq::number_of(head),
                Seq::number_of(indexed)
            );
        }
        Ok(reader)
    }

    /// The store's own id.
    pub fn uuid(&self) -> Uuid {
        self.store
    }

    /// Takes in what was appended since.
    pub fn refresh(&self) -> Result<(), ReadError> {
        let mut progress = self.progress.lock();
        let state = self.state();
        if state.ask(|lookup| lookup.overlay.len()) > OVERLAY_KEYS_MAX {
            self.reopen(&mut progress)?;
        }
        self.follow(&self.state(), &mut progress)
    }

    /// Opens the index again if the writer has brought it further meanwhile.
    fn reopen(&self, progress: &mut Progress) -> Result<(), ReadError> {
        let Ok((state, fresh, _)) = open_state(&self.dir, self.store, &self.disk) else {
            return Ok(());
        };
        let mut fresh = fresh;
        self.follow(&state, &mut fresh)?;
        if state.ask(|lookup| lookup.overlay.len()) < OVERLAY_KEYS_MAX / 2 {
            *self.state.write() = Arc::new(state);
            *progress = fresh;
        }
        Ok(())
    }

    fn follow(&self, state: &ViewStore, progress: &mut Progress) -> Result<(), ReadError> {
        let Progress { tail, applied, heads } = progress;
        tail.follow(&self.disk, |found| -> Result<(), ReadError> {
            state.change(|overlay, db| {
                let mut applier = Applier {
                    applied,
                    overlay,
                    db: DbCursor::new(db),
                    heads,
                };
                applier.apply(&found.frame, &found.location)
            })?;
            Ok(())
        })
    }

    fn state(&self) -> Arc<ViewStore> {
        Arc::clone(&self.state.read())
    }

    fn timeline<T>(&self, ask: impl FnOnce(&Timeline<'_>) -> T) -> T {
        let head = self.head();
        ask(&Timeline {
            store: &self.state(),
            disk: &self.disk,
            head,
        })
    }

    /// The volumes, by number.
    pub fn volumes(&self) -> Result<Vec<VolumeInfo>, ReadError> {
        self.timeline(|timeline| timeline.volumes())
    }

    /// The volume with that name.
    pub fn volume(&self, name: &str) -> Result<Option<VolumeInfo>, ReadError> {
        Ok(self.volumes()?.into_iter().rfind(|volume| volume.name == name))
    }

    /// A volume over time; `None` if there is no such volume.
    pub fn history(&self, volume: VolumeId) -> Result<Option<History>, ReadError> {
        self.timeline(|timeline| timeline.history(volume))
    }

    /// The newest record, and the latest time of any.
    pub fn head(&self) -> Option<Point> {
        let progress = self.progress.lock();
        let applied = &progress.applied;
        applied.last.map(|seq| Point {
            seq,
            wall: WallNs(applied.wall_max.unwrap_or(i64::MIN)),
        })
    }

    /// Until when history reaches.
    pub fn covered_until(&self) -> Option<WallNs> {
        self.head().map(|head| head.wall)
    }

    /// Is somebody writing to the store? Asks without taking the lock.
    pub fn writer_alive(&self) -> io::Result<bool> {
        StoreLock::is_held(&self.dir.join(LOCK_FILE))
    }

    /// The moment that `when` names, if it can be restored exactly. Waits up to 5 s for a live writer to cover it.
    pub fn resolve(&self, volume: VolumeId, when: &When) -> Result<Moment, WhenError> {
        let moment = match self.locate(when) {
            // A writer that journals nothing because its store is full covers no time, but an open gap does.
            Err(WhenError::NotCovered { wall, covered_until }) => {
                let seq = self.head().map(|head| head.seq);
                let moment = Moment {
                    seq,
                    wall,
                    by_time: true,
                };
                return match self.inexactness(volume, moment)? {
                    Some(reason) => Err(WhenError::NotExact(Box::new(reason))),
                    None => Err(WhenError::NotCovered { wall, covered_until }),
                };
            }
            located => located?,
        };
        match self.inexactness(volume, moment)? {
            None => Ok(moment),
            Some(reason) => Err(WhenError::NotExact(Box::new(reason))),
        }
    }

    /// Why the volume cannot be restored exactly as of `moment`; `None` if it can.
    pub fn inexactness(&self, volume: VolumeId, moment: Moment) -> Result<Option<NotExact>, ReadError> {
        let Some(history) = self.history(volume)? else {
            let seq = moment.seq.unwrap_or(Seq::FIRST);
            return Err(ReadError::NoVolume { volume, seq });
        };
        Ok(self.timeline(|timeline| timeline.inexactness(&history, moment)))
    }

    /// The same without asking whether the moment is exact.
    pub fn locate(&self, when: &When) -> Result<Moment, WhenError> {
        self.refresh()?;
        match when {
            When::Latest => {
                let head = self.head().ok_or_else(|| self.not_covered(WallNs::now()))?;
                Ok(Moment {
                    seq: Some(head.seq),
                    wall: head.wall,
                    by_time: false,
                })
            }
            When::Seq(seq) => {
                let head = self.head().map(|head| head.seq);
                if Some(*seq) > head {
                    return Err(WhenError::BeyondHead { seq: *seq, head });
                }
                self.moment_of(*seq)
            }
            When::Bookmark(label) => match self.timeline(|timeline| timeline.bookmark(label))? {
                Some((seq, _)) => self.moment_of(seq),
                None => Err(WhenError::NoBookmark { label: label.clone() }),
            },
            When::At(wall) => self.locate_time(*wall),
            When::Ago(ago) => self.locate_time(WallNs::now().saturating_sub(*ago)),
        }
    }

    fn moment_of(&self, seq: Seq) -> Result<Moment, WhenError> {
        let wall = self
            .timeline(|timeline| timeline.wall_until(seq))?
            .unwrap_or(WallNs::MIN);
        Ok(Moment {
            seq: Some(seq),
            wall,
            by_time: false,
        })
    }

    fn locate_time(&self, wall: WallNs) -> Result<Moment, WhenError> {
        self.wait_until_covered(wall)?;
        let seq = self.timeline(|timeline| timeline.seq_at(wall))?;
        Ok(Moment {
            seq,
            wall,
            by_time: true,
        })
    }

    fn wait_until_covered(&self, wall: WallNs) -> Result<(), WhenError> {
        let started = Instant::now();
        loop {
            // Asked before the log is read: a writer that has just stopped has written all it will.
            let is_alive = self
                .writer_alive()
                .map_err(ReadError::io(self.dir.join(LOCK_FILE)))?;
            self.refresh()?;
            let covered_until = self.covered_until();
            if covered_until >= Some(wall) {
                return Ok(());
            }
            if wall > WallNs::now().saturating_add(COVER_WAIT_MAX) {
                return Err(WhenError::Future { wall, covered_until });
            }
            if !is_alive {
                return Err(self.not_covered(wall));
            }
            if started.elapsed() >= COVER_WAIT_MAX {
                return Err(WhenError::NotCovered { wall, covered_until });
            }
            std::thread::sleep(COVER_POLL);
        }
    }

    fn not_covered(&self, wall: WallNs) -> WhenError {
        let head = self.head();
        WhenError::NotExact(Box::new(NotExact {
            moment: Moment {
                seq: head.map(|head| head.seq),
                wall,
                by_time: true,
            },
            cause: NotExactCause::AfterHistory {
                covered_until: head.map(|head| head.wall),
            },
            gap: (head.map(|head| head.wall), None),
            before: head,
            after: None,
        }))
    }

    /// A volume at a record.
    pub fn view(&self, volume: VolumeId, seq: Seq) -> Result<View, ReadError> {
        let state = self.state();
        let events = state.ask(|lookup| lookup.events(volume.get()))?;
        let bytes = events
            .iter()
            .rev()
            .filter(|event| event.seq <= seq)
            .find_map(|event| match event.body {
                EventBody::Volume { bytes, .. } | EventBody::Resize { bytes } => Some(bytes),
                _ => None,
            });
        let bytes = bytes.ok_or(ReadError::NoVolume { volume, seq })?;
        Ok(View::new(state, volume, seq, bytes))
    }

    /// The records of `seqs`, frame by frame in order, as far as the store was read. Only the frames' record tables
    /// are read and checked; the data is left alone. Records that the log has lost (a gap `log-hole`) are left out;
    /// damage is an error, and ends the walk.
    pub fn records(&self, seqs: RangeInclusive<Seq>) -> Records<'_> {
        // What lies behind the head may not be there for good.
        let head = self.head().map_or(Seq::FIRST, |head| head.seq);
        let seqs = *seqs.start()..=head.min(*seqs.end());
        Records::new(self.state(), &self.disk, seqs)
    }

    /// The versions that a view of `volume` at `seq` shows in `blocks`, which lie in one run of the index.
    pub(crate) fn versions(
        &self,
        volume: VolumeId,
        seq: Option<Seq>,
        blocks: Range<u64>,
    ) -> Result<Vec<BlockVersion>, ReadError> {
        let mut versions = Vec::new();
        self.state().versions(volume, seq, blocks, &mut versions)?;
        Ok(versions)
    }

    /// Where the frame that begins with `seq` lies, and its header and record table.
    pub(crate) fn frame_head(&self, seq: Seq) -> Result<(FrameEntry, Vec<u8>), ReadError> {
        let state = self.state();
        let entry = state.ask(|lookup| lookup.frame_at_or_before(seq.get()))?;
        let entry = entry.ok_or(IndexError::Corrupt("a frame that is not there"))?;
        let (_, head) = state.frame_head(&entry)?;
        Ok((entry, head))
    }

    /// Where the group lies that `offset` bytes behind the record table of the frame of `first` begins; `None` if
    /// there is no such frame.
    pub(crate) fn place_in_frame(&self, first: Seq, offset: u32) -> Result<Option<GroupPlace>, ReadError> {
        self.state().place_of(&GroupName::InFrame(first, offset))
    }

    /// Reads and checks the data of a frame that [`StoreReader::records`] gave.
    pub fn frame_data(&self, frame: &FrameRecords) -> Result<FrameData, ReadError> {
        frame.read_data(&*self.state())
    }

    /// Reads the whole log. `progress` is told how many more bytes were read.
    pub fn verify_log(&self, progress: &mut dyn FnMut(u64)) -> Result<VerifyReport, ReadError> {
        let (state, head) = (self.state(), self.head().map(|head| head.seq));
        let deltas = |found: &FoundFrame| {
            // What was appended since the store was opened is not known to the index.
            if Some(found.frame.header.last_seq()) > head {
                return None;
            }
            FrameRecords::check_deltas(found, &*state)
                .err()
                .map(|error| match error {
                    ReadError::Damaged { what, .. } => what,
                    error => error.to_string(),
                })
        };
        verify::verify_log(&self.disk, self.store, self.indexed, &deltas, progress)
    }

    /// Bytes of the log.
    pub fn log_bytes(&self) -> Result<u64, ReadError> {
        let measure = || {
            let lens = segments(&self.disk)?
                .into_iter()
                .map(|id| self.disk.open(&id.file_name())?.len());
            lens.sum::<io::Result<u64>>()
        };
        measure().map_err(ReadError::io(self.disk.path("")))
    }
}

/// The store, how far it was read, and the last record that the index knows of, usable or not.
fn open_state(
    dir: &Path,
    store: Uuid,
    disk: &RealDisk,
) -> Result<(ViewStore, Progress, Option<Seq>), OpenError> {
    let mut indexed = None;
    let opened = open_reader(&dir.join(INDEX_DIR), store).and_then(|db| {
        let applied = db.applied().map_err(|error: IndexError| error.to_string())?;
        indexed = applied.last;
        match usable(disk, &applied) {
            Ok(true) => Ok((db, applied)),
            Ok(false) => Err("it is ahead of the log".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    });
    let (db, applied) = match opened {
        Ok((db, applied)) => (Some(Arc::new(db)), applied),
        Err(reason) => {
            let is_empty = segments(disk)
                .map_err(OpenError::io("list", disk.path("")))?
                .is_empty();
            if !is_empty {
                tracing::info!(reason, "reading the whole log: the index cannot be used");
            }
            (None, Applied::default())
        }
    };
    let tail = match (applied.end, applied.last) {
        (Some((segment, end)), Some(last)) => Tail::after(
            store,
            SegmentId(Seq::new(segment).unwrap_or(Seq::FIRST)),
            end,
            last,
        ),
        _ => Tail::from_start(store),
    };
    Ok((
        ViewStore::new(&dir.join(LOG_DIR), db),
        Progress {
            tail,
            applied,
            heads: HeadCache::default(),
        },
        indexed,
    ))
}

/// Does the log reach as far as the index says?
fn usable(disk: &RealDisk, applied: &Applied) -> io::Result<bool> {
    let Some((segment, end)) = applied.end else {
        return Ok(true);
    };
    let name = SegmentId(Seq::new(segment).unwrap_or(Seq::FIRST)).file_name();
    match disk.open(&name) {
        Ok(file) => Ok(file.len()? >= end),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
