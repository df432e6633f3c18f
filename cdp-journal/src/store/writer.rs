//! Opening a store to append to it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use uuid::Uuid;

use super::timeline::Timeline;
use super::{INDEX_DIR, LOCK_FILE, LOG_DIR, STORE_FILE, StoreFile, StoreLock};
use crate::error::{OpenError, ReadError};
use crate::format::{FRAME_BYTES_MAX, GapCause};
use crate::history::VolumeInfo;
use crate::index::{Event, EventBody, IndexError, IndexParts, IndexWriter, open_index, rebuild_index};
use crate::log::{
    Disk, LogLimits, LogState, LogWriter, RealDisk, SEGMENT_LATE_PART, Tail, open_error, recover,
};
use crate::types::{BootNs, SegmentId, Seq, WallNs};
use crate::verify::Damage;
use crate::when::Point;
use crate::wire::FrameId;

/// The index addresses a segment with 32 bits; and a smaller one than a frame makes no sense.
const SEGMENT_BYTES_RANGE: std::ops::RangeInclusive<u64> = 1 << 16..=1 << 31;

const _: () = {
    let bytes_max = *SEGMENT_BYTES_RANGE.end();
    assert!(bytes_max + bytes_max / SEGMENT_LATE_PART + (FRAME_BYTES_MAX as u64) < u32::MAX as u64);
};

/// Bounds of a store.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// A segment is closed when the next frame would make it longer than this; while the device is busy with others, up
    /// to half of it later.
    pub segment_bytes_max: u64,
    /// The store is full when log and index have this many bytes. `None`: no bound but the file system.
    pub store_bytes_max: Option<u64>,
    /// The store is full when the file system has fewer bytes left.
    pub free_bytes_min: u64,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            segment_bytes_max: 256 << 20,
            store_bytes_max: None,
            free_bytes_min: 32 << 20,
        }
    }
}

/// Bytes that recovery cut off the end of the log: an append that a crash had interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The segment.
    pub path: PathBuf,
    /// Where it ends now.
    pub offset: u64,
    /// Bytes cut.
    pub bytes: u64,
}

/// What a volume's history looked like when the store was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeState {
    /// The volume as last declared.
    pub info: VolumeInfo,
    /// Why the head is not exact; `None` if it is.
    pub inexact: Option<GapCause>,
    /// The last record at which history was exact.
    pub last_exact: Option<Seq>,
    /// Where the newest exact stretch began.
    pub exact_since: Option<Point>,
    /// And its time.
    pub last_exact_at: Option<WallNs>,
    /// Gaps so far, an open one included.
    pub gaps: u64,
}

/// What was found when a store was opened for writing.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// Last record in the log.
    pub last_seq: Option<Seq>,
    /// The volumes it tells of.
    pub volumes: Vec<VolumeState>,
    /// What had to be cut.
    pub cut: Option<Cut>,
    /// Durable data that does not match its checksum; the moments that need it are refused.
    pub damages: Vec<Damage>,
    /// The agent of the newest start record, and the boot id.
    pub agent: Option<Uuid>,
    /// The boot of the host that the last frame was captured in.
    pub boot_id: Option<Uuid>,
    /// The latest time in the last frame.
    pub latest: Option<BootNs>,
    /// Was the last record a clean stop?
    pub stopped: bool,
    /// The index had to be rebuilt, and why.
    pub index_rebuilt: Option<String>,
    /// The folder was empty.
    pub created: bool,
}

/// A store, locked against other writers.
#[derive(Debug)]
pub struct StoreWriter {
    uuid: Uuid,
    log: LogWriter,
    index: IndexWriter,
}

impl StoreWriter {
    /// Opens the store in `dir`, or makes one, and recovers it.
    pub fn open(dir: &Path, options: &WriterOptions) -> Result<(Self, Recovered), OpenError> {
        Self::open_as(dir, None, None, options)
    }

    /// Opens the copy of another store, or begins one. Records that it has lost can be had again from where it is a
    /// copy of: it goes on after the last that is there. `created`: when the history was begun, if that was not now.
    pub fn open_copy(
        dir: &Path,
        of: Uuid,
        created: Option<jiff::Timestamp>,
        options: &WriterOptions,
    ) -> Result<(Self, Recovered), OpenError> {
        Self::open_as(dir, Some(of), created, options)
    }

    fn open_as(
        dir: &Path,
        copy_of: Option<Uuid>,
        begun: Option<jiff::Timestamp>,
        options: &WriterOptions,
    ) -> Result<(Self, Recovered), OpenError> {
        std::fs::create_dir_all(dir).map_err(OpenError::io("make", dir))?;
        // The format first: a store of a newer one is not even locked.
        let known = StoreFile::read(dir)?;
        let lock = Arc::new(StoreLock::take(&dir.join(LOCK_FILE))?);
        let created = known.is_none();
        let store = match known {
            Some(store) => store,
            None => {
                let begun = begun.unwrap_or_else(jiff::Timestamp::now);
                StoreFile::create(dir, copy_of.unwrap_or_else(Uuid::new_v4), begun)?
            }
        };
        if let Some(other) = copy_of.filter(|uuid| *uuid != store.uuid) {
            return Err(OpenError::BadStoreFile {
                path: dir.join(STORE_FILE),
                reason: format!("it is the store {}, not {other}", store.uuid),
            });
        }
        let (log_dir, index_dir) = (dir.join(LOG_DIR), dir.join(INDEX_DIR));
        std::fs::create_dir_all(&log_dir).map_err(OpenError::io("make", &log_dir))?;
        sync_names(dir)?;

        let disk = Arc::new(RealDisk::writable(&log_dir));
        let is_new_store = created || !index_dir.exists() && is_empty(&*disk)?;
        let parts = open_index(&index_dir, store.uuid, is_new_store)?;
        let mut state = recover(&*disk, store.uuid, parts.applied.last)?;
        if let (Some(_), Some(last)) = (copy_of, state.lost_after) {
            state.last = last;
        }
        let parts = match &state.lost_after {
            Some(last) => {
                let last = last.map_or(0, Seq::get);
                // It cannot be made anew while it is open.
                drop(parts);
                rebuild_index(
                    &index_dir,
                    store.uuid,
                    format!("the log ends at seq {last}, before the index does"),
                )?
            }
            None => parts,
        };
        let index_rebuilt = parts.rebuilt.clone();
        let index_bytes = Arc::new(AtomicU64::new(0));
        let mut index = open_at(parts, &log_dir, &index_bytes, &lock);
        catch_up(&mut index, &*disk, store.uuid, state.last)?;
        index.flush()?;
        let recovered = describe(&index, &*disk, &state, index_rebuilt, created)?;
        let limits = LogLimits {
            segment_bytes_max: options
                .segment_bytes_max
                .clamp(*SEGMENT_BYTES_RANGE.start(), *SEGMENT_BYTES_RANGE.end()),
            store_bytes_max: options.store_bytes_max,
            free_bytes_min: options.free_bytes_min,
            index_bytes,
        };
        let log = LogWriter::new(disk, store.uuid, limits, state, Some(lock))
            .map_err(OpenError::io("measure", &log_dir))?;
        Ok((
            Self {
                uuid: store.uuid,
                log,
                index,
            },
            recovered,
        ))
    }

    /// The store's own id.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Bytes of all segments.
    pub fn log_bytes(&self) -> u64 {
        self.log.log_bytes()
    }

    /// The last frame of the log, as another log knows it.
    pub fn last_frame(&self) -> Result<Option<FrameId>, ReadError> {
        let Some(last) = self.log.appended() else {
            return Ok(None);
        };
        let views = self.index.views();
        let entry = views.ask(|lookup| lookup.frame_at_or_before(last.get()))?;
        let found = entry.map(|entry| views.frame_head(&entry)).transpose()?;
        Ok(found.map(|(frame, head)| FrameId::of(frame.header.first_seq, frame.header.last_seq(), &head)))
    }

    /// Both halves, for a thread each. The lock is held until both are dropped.
    pub fn split(self) -> (LogWriter, IndexWriter) {
        (self.log, self.index)
    }
}

fn open_at(
    parts: IndexParts,
    log_dir: &Path,
    index_bytes: &Arc<AtomicU64>,
    lock: &Arc<StoreLock>,
) -> IndexWriter {
    IndexWriter::new(parts, log_dir, Arc::clone(index_bytes), Arc::clone(lock))
}

fn sync_names(dir: &Path) -> Result<(), OpenError> {
    std::fs::File::open(dir)
        .and_then(|file| file.sync_all())
        .map_err(OpenError::io("sync", dir))
}

fn is_empty(disk: &dyn Disk) -> Result<bool, OpenError> {
    Ok(crate::log::segments(disk)
        .map_err(OpenError::io("list", disk.path("")))?
        .is_empty())
}

/// What stops [`catch_up`].
enum CatchUpError {
    Read(ReadError),
    Index(IndexError),
}

impl From<ReadError> for CatchUpError {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

/// Applies what the log has and the index has not. Everything in the log is durable by now: up to `last`.
fn catch_up(
    index: &mut IndexWriter,
    disk: &dyn Disk,
    store: Uuid,
    last: Option<Seq>,
) -> Result<(), OpenError> {
    let tail = match (index.state().end, index.applied()) {
        (Some((segment, end)), Some(last)) => Tail::after(
            store,
            SegmentId(Seq::new(segment).unwrap_or(Seq::FIRST)),
            end,
            last,
        ),
        _ => Tail::from_start(store),
    };
    let followed = tail.vouched_until(last).follow(disk, |found| {
        index
            .apply_frame(&found.frame, &found.location)
            .map_err(CatchUpError::Index)
    });
    followed.map_err(|error| match error {
        CatchUpError::Read(error) => open_error(error, index.applied()),
        CatchUpError::Index(error) => OpenError::Index(error),
    })
}

fn describe(
    index: &IndexWriter,
    disk: &dyn Disk,
    state: &LogState,
    index_rebuilt: Option<String>,
    created: bool,
) -> Result<Recovered, OpenError> {
    let applied = index.state();
    let head = applied.last.map(|seq| Point {
        seq,
        wall: WallNs(applied.wall_max.unwrap_or(i64::MIN)),
    });
    let timeline = Timeline {
        store: index.views(),
        disk,
        head,
    };
    let look = || -> Result<(Vec<VolumeState>, Vec<Event>), ReadError> {
        let mut volumes = Vec::new();
        for info in timeline.volumes()? {
            let Some(history) = timeline.history(info.id)? else {
                continue;
            };
            let is_exact = history.exact.last().is_some_and(|exact| exact.open);
            let cause = history.gaps.last().map_or(GapCause::Seeding, |gap| gap.cause);
            volumes.push(VolumeState {
                inexact: (!is_exact).then_some(cause),
                last_exact: history.exact.last().map(|exact| exact.to_seq),
                exact_since: history.exact.last().map(|exact| Point {
                    seq: exact.from_seq,
                    wall: exact.from,
                }),
                last_exact_at: history.exact.last().map(|exact| exact.to),
                gaps: history.gaps.len() as u64,
                info,
            });
        }
        Ok((volumes, index.views().ask(|lookup| lookup.events(0))?))
    };
    let (volumes, events) = look().map_err(|error| open_error(error, applied.last))?;
    let latest = timeline
        .last_boot_ns()
        .map_err(|error| open_error(error, applied.last))?;
    let agent = events.iter().rev().find_map(|event| match event.body {
        EventBody::Start { agent, .. } => Some(agent),
        _ => None,
    });
    let stopped = events
        .last()
        .is_some_and(|event| event.body == EventBody::Stop && Some(event.seq) == applied.last);
    Ok(Recovered {
        last_seq: state.last,
        volumes,
        cut: state.cut.clone(),
        damages: state.damages.clone(),
        agent,
        boot_id: applied.clock.map(|(boot_id, _)| boot_id),
        latest,
        stopped,
        index_rebuilt,
        created,
    })
}
