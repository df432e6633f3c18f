//! Appending frames and making them durable.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::{Receiver, TryRecvError};
use uuid::Uuid;

use super::disk::Disk;
use super::recover::LogState;
use super::scan::{Segment, segments};
use super::sync::SyncJob;
use super::{FrameLocation, LogError, Room};
use crate::format::{
    ENVELOPE_BYTES, Envelope, FRAME_BYTES_MAX, SEGMENT_HEADER_BYTES, SealedFrame, SegmentHeader,
};
use crate::store::StoreLock;
use crate::types::{SegmentId, Seq};

/// Room that only frames without data may use, so that a full store can still say that it is full.
const CONTROL_RESERVE_BYTES: u64 = 1 << 20;
/// Space asked for ahead of the end of a segment.
const RESERVE_STEP_BYTES: u64 = 16 << 20;

/// A segment may become longer by this part of its bound while the device is busy.
pub(crate) const SEGMENT_LATE_PART: u64 = 2;
/// Why a log takes no more whose sync was begun and never run.
const ABANDONED: &str = "it was begun and not done";

const _: () = assert!(RESERVE_STEP_BYTES > (FRAME_BYTES_MAX + ENVELOPE_BYTES) as u64);

/// Bounds of a log.
#[derive(Debug, Clone)]
pub(crate) struct LogLimits {
    pub(crate) segment_bytes_max: u64,
    pub(crate) store_bytes_max: Option<u64>,
    pub(crate) free_bytes_min: u64,
    /// What the index holds beside the log; kept by the index.
    pub(crate) index_bytes: Arc<AtomicU64>,
}

/// Appends frames. One per store.
#[derive(Debug)]
pub struct LogWriter {
    disk: Arc<dyn Disk>,
    store: Uuid,
    limits: LogLimits,
    newest: Option<(Segment, u64)>,
    /// The newest segment is of an older format: nothing is appended to it.
    is_older: bool,
    /// Bytes of the segments before the newest.
    closed_bytes: u64,
    /// Space is asked for up to here.
    reserved_until: u64,
    appended: Option<Seq>,
    durable: Option<Seq>,
    /// How the sync ends that was begun.
    syncing: Option<Receiver<Result<Option<Seq>, String>>>,
    poison: Option<String>,
    /// Held for as long as the writer lives.
    lock: Option<Arc<StoreLock>>,
}

impl LogWriter {
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        store: Uuid,
        limits: LogLimits,
        state: LogState,
        lock: Option<Arc<StoreLock>>,
    ) -> io::Result<Self> {
        let mut closed_bytes = 0;
        for id in segments(&*disk)? {
            if state.newest.as_ref().is_none_or(|(newest, _)| newest.id != id) {
                closed_bytes += disk.open(&id.file_name())?.len()?;
            }
        }
        let end = state.newest.as_ref().map_or(0, |(_, end)| *end);
        let is_older = match &state.newest {
            // Recovery has removed one whose name the next one gets.
            Some((segment, _)) => segment.is_of_older_format()?,
            None => false,
        };
        Ok(Self {
            disk,
            store,
            limits,
            newest: state.newest,
            is_older,
            closed_bytes,
            reserved_until: end,
            appended: state.last,
            durable: state.last,
            syncing: None,
            poison: None,
            lock,
        })
    }

    /// Appends a frame. It is durable after the next [`LogWriter::sync`].
    pub fn append(&mut self, frame: &SealedFrame) -> Result<FrameLocation, LogError> {
        self.append_after(frame.first_seq().prev(), frame)
    }

    /// Appends a frame of another log, in which it comes after `previous`. That may be less than the Seq before it:
    /// then that log has lost records, and this one has the same hole.
    pub fn append_after(
        &mut self,
        previous: Option<Seq>,
        frame: &SealedFrame,
    ) -> Result<FrameLocation, LogError> {
        self.refuse_if_poisoned()?;
        if previous != self.appended || previous >= Some(frame.first_seq()) {
            return Err(LogError::OutOfOrder {
                expected: self.next_seq(),
                found: frame.first_seq(),
            });
        }
        let bytes = (ENVELOPE_BYTES + frame.bytes().len()) as u64;
        if frame.has_data() || !self.is_reserved(bytes) {
            self.refuse_if_full(bytes, frame.has_data())?;
        }
        if !self.fits(bytes) {
            self.roll()?;
        }
        let Some((segment, end)) = &mut self.newest else {
            return Err(poisoned("no segment"));
        };
        if *end + bytes > self.reserved_until {
            let ahead = RESERVE_STEP_BYTES
                .min(self.limits.segment_bytes_max.saturating_sub(*end))
                .max(bytes);
            self.reserved_until = match segment.file.reserve(*end, ahead) {
                true => *end + ahead,
                false => *end,
            };
        }
        let envelope = Envelope {
            frame_bytes: frame.bytes().len() as u64,
            first_seq: frame.first_seq(),
            durable: self.durable,
        };
        if let Err(source) = segment.file.write_at(*end, &envelope.encode(), frame.bytes()) {
            if let Err(error) = segment.file.set_len(*end) {
                self.poison = Some(format!("a failed append could not be undone: {error}"));
            }
            self.reserved_until = *end;
            let used_bytes = self.closed_bytes + *end;
            return Err(if is_no_space(&source) {
                LogError::StoreFull {
                    used_bytes,
                    limit: source.to_string(),
                }
            } else {
                LogError::Io {
                    action: "append to",
                    path: segment.path.clone(),
                    source,
                }
            });
        }
        let location = FrameLocation {
            segment: segment.id,
            offset: *end + ENVELOPE_BYTES as u64,
        };
        *end += bytes;
        self.appended = Some(frame.last_seq());
        Ok(location)
    }

    /// Is there room in the newest segment for a frame that takes so many bytes? While the device is busy there is some
    /// beyond its bound: a new segment would wait for it several times.
    pub(super) fn fits(&self, bytes: u64) -> bool {
        let late_bytes = match self.disk.is_busy() {
            true => self.limits.segment_bytes_max / SEGMENT_LATE_PART,
            false => 0,
        };
        let newest = self.newest.as_ref().filter(|_| !self.is_older);
        newest.is_some_and(|(_, end)| {
            end + bytes <= self.limits.segment_bytes_max + late_bytes || *end == SEGMENT_HEADER_BYTES as u64
        })
    }

    /// Was space asked for ahead for so many bytes more? Then they find it, whoever else has filled the file system.
    fn is_reserved(&self, bytes: u64) -> bool {
        let end = self.newest.as_ref().map(|(_, end)| *end + bytes);
        self.limits.store_bytes_max.is_none()
            && self.fits(bytes)
            && end.is_some_and(|end| end <= self.reserved_until)
    }

    /// Makes everything appended durable. Returns the last durable record. Waits for a sync that was begun before.
    ///
    /// A failure is final: the kernel may have dropped the pages, so a later success could lie.
    pub fn sync(&mut self) -> Result<Option<Seq>, LogError> {
        self.finish_sync()?;
        if self.durable == self.appended {
            return Ok(self.durable);
        }
        let Some(job) = self.begin_sync()? else {
            return Ok(self.durable);
        };
        let result = job.run();
        // The same, for who runs it elsewhere.
        let noted = self.finish_sync();
        result?;
        noted?;
        Ok(self.durable)
    }

    /// What is to be done to make everything durable that was appended so far; it can be done on another thread, while
    /// more is appended. None if there is no segment yet. There is one at a time: waits for the one before, which
    /// another thread runs, or which was run or dropped.
    pub fn begin_sync(&mut self) -> Result<Option<SyncJob>, LogError> {
        self.finish_sync()?;
        let Some((segment, _)) = &self.newest else {
            return Ok(None);
        };
        let (file, path) = (Arc::clone(&segment.file), segment.path.clone());
        let (job, outcome) = SyncJob::new(file, path, self.appended, self.lock.clone());
        self.syncing = Some(outcome);
        Ok(Some(job))
    }

    /// Has the sync that was begun ended? True as well if there is none.
    pub fn is_synced(&mut self) -> Result<bool, LogError> {
        let outcome = self.syncing.as_ref().map(Receiver::try_recv);
        match outcome {
            Some(Err(TryRecvError::Empty)) => return Ok(false),
            Some(Err(TryRecvError::Disconnected)) => self.note_synced(Err(ABANDONED.to_owned())),
            Some(Ok(result)) => self.note_synced(result),
            None => {}
        }
        self.refuse_if_poisoned()?;
        Ok(true)
    }

    /// Waits until the sync that was begun has ended.
    fn finish_sync(&mut self) -> Result<(), LogError> {
        if let Some(outcome) = &self.syncing {
            let result = outcome.recv().unwrap_or_else(|_| Err(ABANDONED.to_owned()));
            self.note_synced(result);
        }
        self.refuse_if_poisoned()
    }

    fn note_synced(&mut self, result: Result<Option<Seq>, String>) {
        self.syncing = None;
        match result {
            Ok(durable) => self.durable = durable,
            Err(reason) => self.poison = Some(format!("sync: {reason}")),
        }
    }

    /// Finishes the newest segment and begins the next. On failure the newest stays, or the log is poisoned.
    fn roll(&mut self) -> Result<(), LogError> {
        self.sync()?;
        let id = SegmentId(self.next_seq());
        let path = self.disk.path(&id.file_name());
        if let Some((segment, end)) = &self.newest {
            // Gives back what was asked for ahead; only space is lost where that fails.
            if let Err(error) = segment.file.set_len(*end) {
                tracing::debug!(path = %segment.path.display(), %error, "the end of a segment was not trimmed");
            }
            self.reserved_until = *end;
        }
        let header = SegmentHeader {
            store: self.store,
            first_seq: id.0,
        }
        .encode();
        let made = self.disk.create(&id.file_name()).and_then(|file| {
            file.write_at(0, &header, &[])?;
            file.sync()?;
            Ok(file)
        });
        let file = match made {
            Ok(file) => file,
            Err(source) => {
                let full = is_no_space(&source);
                if let Err(error) = self.unmake(id) {
                    self.poison = Some(format!(
                        "a segment that could not be made could not be removed: {error}"
                    ));
                }
                return Err(if full {
                    LogError::StoreFull {
                        used_bytes: self.log_bytes(),
                        limit: source.to_string(),
                    }
                } else {
                    LogError::Io {
                        action: "make",
                        path,
                        source,
                    }
                });
            }
        };
        if let Err(source) = self.disk.sync_names() {
            // Tried again, to remove the segment, it could lie; and appended to, the one before could be hidden.
            self.poison = Some(format!("sync of names: {source}"));
            return Err(LogError::Io {
                action: "sync the name of",
                path,
                source,
            });
        }
        self.closed_bytes = self.log_bytes();
        let file = Arc::from(file);
        self.newest = Some((Segment { id, path, file }, SEGMENT_HEADER_BYTES as u64));
        self.is_older = false;
        self.reserved_until = SEGMENT_HEADER_BYTES as u64;
        Ok(())
    }

    /// Removes a segment that was not finished: were it to come back after a crash, it would hide what the
    /// segment before it goes on to hold.
    fn unmake(&self, id: SegmentId) -> io::Result<()> {
        match self.disk.remove(&id.file_name()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.disk.sync_names()
    }

    fn refuse_if_poisoned(&self) -> Result<(), LogError> {
        match &self.poison {
            Some(reason) => Err(poisoned(reason)),
            None => Ok(()),
        }
    }

    fn used_bytes(&self) -> u64 {
        self.log_bytes() + self.limits.index_bytes.load(Ordering::Relaxed)
    }

    fn free_bytes(&self) -> Result<u64, LogError> {
        self.disk.free_bytes().map_err(|source| LogError::Io {
            action: "ask for free space of",
            path: self.disk.path(""),
            source,
        })
    }

    /// How much is used, and how much can be.
    pub fn room(&self) -> Result<Room, LogError> {
        let used_bytes = self.used_bytes();
        let free_bytes = self.free_bytes()?.saturating_sub(self.limits.free_bytes_min);
        let by_file_system = used_bytes.saturating_add(free_bytes);
        let by_bound = self
            .limits
            .store_bytes_max
            .map_or(u64::MAX, |max| max - control_reserve(max));
        Ok(Room {
            used_bytes,
            limit_bytes: by_file_system.min(by_bound),
        })
    }

    fn refuse_if_full(&self, bytes: u64, has_data: bool) -> Result<(), LogError> {
        let used_bytes = self.used_bytes();
        if let Some(max) = self.limits.store_bytes_max {
            let reserve = if has_data { control_reserve(max) } else { 0 };
            if used_bytes + bytes > max - reserve {
                return Err(LogError::StoreFull {
                    used_bytes,
                    limit: format!("store_bytes_max is {max}"),
                });
            }
        }
        let free_bytes = self.free_bytes()?;
        let min = self.limits.free_bytes_min / if has_data { 1 } else { 2 };
        if free_bytes < min.saturating_add(bytes) {
            let limit = format!("the file system has {free_bytes} bytes left, {min} are kept free");
            return Err(LogError::StoreFull { used_bytes, limit });
        }
        Ok(())
    }

    /// Would frames with `bytes` of data find room?
    pub fn has_room(&self, bytes: u64) -> bool {
        self.poison.is_none() && self.refuse_if_full(bytes, true).is_ok()
    }

    /// Would this frame, which is without data, find room, by what the file system says?
    pub fn has_control_room(&self, frame: &SealedFrame) -> bool {
        let bytes = (ENVELOPE_BYTES + frame.bytes().len()) as u64;
        self.refuse_if_full(bytes, false).is_ok()
    }

    /// The Seq that the next frame must begin with.
    pub fn next_seq(&self) -> Seq {
        Seq::after(self.appended)
    }

    /// Last record appended.
    pub fn appended(&self) -> Option<Seq> {
        self.appended
    }

    /// Last record known to be durable.
    pub fn durable(&self) -> Option<Seq> {
        self.durable
    }

    /// Bytes of all segments.
    pub fn log_bytes(&self) -> u64 {
        self.closed_bytes + self.newest.as_ref().map_or(0, |(_, end)| *end)
    }

    /// Did a failure stop the log for good?
    pub fn is_poisoned(&self) -> bool {
        self.poison.is_some()
    }
}

/// What of a bound is kept for frames without data.
fn control_reserve(store_bytes_max: u64) -> u64 {
    CONTROL_RESERVE_BYTES.min(store_bytes_max / 4)
}

fn poisoned(reason: &str) -> LogError {
    LogError::Poisoned {
        reason: reason.to_owned(),
    }
}

fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}
