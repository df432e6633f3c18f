//! The threads between the ring and the disk.
//!
//! ```text
//! ring → capture (order, time) → encode (deltas, zstd, CRC) → log (write) → sync (fsync) → index
//! ```
//!
//! Each arrow is a queue with a bound. When one is full the stage before it waits, down to the ring; when
//! the ring is full the probe drops, counts and marks. The host's writers never wait.

mod capture;
mod log;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cdp_ebpf::DiskFilter;
use cdp_journal::format::{DeltaCache, Packing, SealedFrame};
use cdp_journal::index::IndexWriter;
use cdp_journal::log::{FrameLocation, LogWriter, Room, SyncJob};
use cdp_journal::view::View;
use cdp_journal::{BootNs, Seq, VolumeId, WallNs};
use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::{Condvar, Mutex};

pub(crate) use self::capture::Capture;
use self::log::{LogStage, sync_loop};
use crate::capture::{DiskNumber, RingPosition, RingPositions, Slot};
use crate::clock;
use crate::pace::Pace;
use crate::priority;
use crate::recorder::{Epoch, FRAME_BYTES_SEAL, Recorder, Sealed};

/// Frames, or requests, between two other stages.
const QUEUE_FRAMES: usize = 8;
/// Frames that the index may be behind.
const INDEX_QUEUE_FRAMES: usize = 1024;

/// What all threads share.
pub(crate) struct Shared {
    pub(crate) recorder: Mutex<Recorder>,
    pub(crate) positions: RingPositions,
    pub(crate) stop: AtomicBool,
    durable: Mutex<Durable>,
    changed: Condvar,
    applied: AtomicU64,
    /// Last record that was appended to the log: it survives the end of this process.
    appended: AtomicU64,
    /// The events before this position in the ring are in the records up to that one.
    appended_position: AtomicU64,
    pub(crate) commit_interval_ms: AtomicU64,
    /// Somebody waits until the frame under construction is durable.
    hurries: AtomicBool,
    pub(crate) log_bytes: AtomicU64,
    /// How full the store is, once it was asked.
    pub(crate) room: Mutex<Option<Room>>,
    /// Volumes whose device is not there.
    pub(crate) absent: Mutex<Vec<String>>,
    /// How fast the read-back may go.
    pub(crate) pace: Pace,
    store: Mutex<Option<StoreChange>>,
    /// The log waits for the sync under way to begin the next.
    awaits_sync: AtomicBool,
    /// What a sync takes, in nanoseconds: the longest of late.
    sync_ns: AtomicU64,
    /// What was queued before this time is recorded.
    drained_at_ns: AtomicU64,
    /// The last record when that was noted which the next agent need not doubt.
    noted: AtomicU64,
    /// Somebody waits for that note.
    awaits_note: AtomicBool,
    /// How many wait until what is suspect is compared.
    await_clear: AtomicUsize,
}

/// What the log stage tells the capture stage.
#[derive(Clone, Copy, Debug)]
enum StoreChange {
    /// The log ends before `next`; frames of an older epoch are void.
    Full { next: Seq, epoch: Epoch },
    /// The log can go on.
    Room,
}

#[derive(Debug, Default)]
struct Durable {
    seq: Option<Seq>,
    failure: Option<String>,
    /// Frames that are not durable: their last record, and the time of the first.
    waiting: VecDeque<(Seq, WallNs)>,
}

/// What the capture thread is asked to do.
pub(crate) enum Request {
    /// Watch a disk with this filter, or no more.
    Watch(DiskNumber, Option<DiskFilter>, Sender<anyhow::Result<()>>),
    /// Also poll the counters of this slot.
    Slot(Slot, DiskNumber, u32),
}

/// What the index thread is asked to do.
pub(crate) enum IndexRequest {
    /// Header and table of a durable frame.
    Frame(Box<[u8]>, FrameLocation),
    /// A view that holds at least everything up to the Seq.
    HeadView(VolumeId, Sender<anyhow::Result<View>>),
}

impl Shared {
    pub(crate) fn new(recorder: Recorder, positions: RingPositions, commit_interval: Duration) -> Self {
        Self {
            recorder: Mutex::new(recorder),
            positions,
            stop: AtomicBool::new(false),
            durable: Mutex::new(Durable::default()),
            changed: Condvar::new(),
            applied: AtomicU64::new(0),
            appended: AtomicU64::new(0),
            appended_position: AtomicU64::new(0),
            commit_interval_ms: AtomicU64::new(commit_interval.as_millis() as u64),
            hurries: AtomicBool::new(false),
            log_bytes: AtomicU64::new(0),
            room: Mutex::new(None),
            absent: Mutex::new(Vec::new()),
            pace: Pace::default(),
            store: Mutex::new(None),
            awaits_sync: AtomicBool::new(false),
            // Until one is known, as slow as may be.
            sync_ns: AtomicU64::new(commit_interval.as_nanos() as u64),
            drained_at_ns: AtomicU64::new(clock::boot_ns().0),
            noted: AtomicU64::new(0),
            awaits_note: AtomicBool::new(false),
            await_clear: AtomicUsize::new(0),
        }
    }

    /// Last record that survives a power loss.
    pub(crate) fn durable(&self) -> Option<Seq> {
        self.durable.lock().seq
    }

    /// Last record in the index.
    pub(crate) fn applied(&self) -> Option<Seq> {
        Seq::new(self.applied.load(Ordering::SeqCst))
    }

    pub(crate) fn set_appended(&self, seq: Option<Seq>, position: RingPosition) {
        self.appended.store(seq.map_or(0, Seq::get), Ordering::SeqCst);
        self.appended_position.store(position.0, Ordering::SeqCst);
    }

    /// Last record that survives the end of this process.
    fn appended(&self) -> Option<Seq> {
        Seq::new(self.appended.load(Ordering::SeqCst))
    }

    fn appended_position(&self) -> RingPosition {
        RingPosition(self.appended_position.load(Ordering::SeqCst))
    }

    /// Why the agent must end, if it must.
    pub(crate) fn failure(&self) -> Option<String> {
        self.durable.lock().failure.clone()
    }

    pub(crate) fn fail(&self, what: &str, error: &anyhow::Error) {
        let mut durable = self.durable.lock();
        durable
            .failure
            .get_or_insert_with(|| format!("{what}: {error:#}"));
        self.stop.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Runs what the agent cannot do without: if that fails, or panics, the agent must end. The next one goes on with what
    /// waits in the ring.
    pub(crate) fn run(&self, what: &str, work: impl FnOnce() -> anyhow::Result<()>) {
        if let Err(error) = contained(work) {
            tracing::error!("{what}: {error:#}");
            self.fail(what, &error);
        }
    }

    pub(crate) fn set_durable(&self, seq: Option<Seq>) {
        let mut durable = self.durable.lock();
        if seq > durable.seq {
            durable.seq = seq;
            while durable
                .waiting
                .front()
                .is_some_and(|&(last, _)| Some(last) <= seq)
            {
                durable.waiting.pop_front();
            }
            self.changed.notify_all();
        }
    }

    /// A frame is on its way to the log. For who holds the recorder.
    fn on_its_way(&self, sealed: &Sealed) {
        if let Some(last) = sealed.builder.next_seq().prev() {
            let begun = sealed.begun.at_offset(sealed.wall_offset_ns);
            self.durable.lock().waiting.push_back((last, begun));
        }
    }

    /// What is on its way to the log will not get there, from this record on.
    fn none_on_its_way_from(&self, next: Seq) {
        self.durable.lock().waiting.retain(|&(last, _)| last < next);
    }

    /// Time of the oldest write that was captured and is not durable. Of those that wait in the ring: since when they may.
    pub(crate) fn oldest_not_durable(&self) -> Option<WallNs> {
        let recorder = self.recorder.lock();
        let waiting = self.durable.lock().waiting.front().map(|&(_, begun)| begun);
        let in_ring = || {
            let drained_at = BootNs(self.drained_at_ns.load(Ordering::SeqCst));
            let is_empty = self.positions.consumed() >= self.positions.produced();
            (!is_empty).then(|| recorder.wall_of(drained_at))
        };
        waiting.or_else(|| recorder.oldest_here()).or_else(in_ring)
    }

    /// Asks every millisecond until `done`; false after `deadline` or when the agent stops first.
    fn poll(&self, deadline: Option<Instant>, mut done: impl FnMut() -> bool) -> bool {
        while !done() {
            if self.stop.load(Ordering::SeqCst) || deadline.is_some_and(|deadline| Instant::now() >= deadline)
            {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Waits until the ring has been emptied of all that was in it at the call; the last Seq by then.
    /// None if the agent stops meanwhile.
    pub(crate) fn drained(&self) -> Option<Option<Seq>> {
        self.drained_until(None)
    }

    fn drained_until(&self, deadline: Option<Instant>) -> Option<Option<Seq>> {
        let target = self.positions.produced();
        let mut last = None;
        self.poll(deadline, || {
            let recorder = self.recorder.lock();
            if self.positions.consumed() >= target {
                last = Some(recorder.last_seq());
            }
            last.is_some()
        });
        last
    }

    /// Waits until every loss of a write that was queued before the call is known to the recorder, and every
    /// write captured by then has come to it. None if the agent stops meanwhile.
    pub(crate) fn losses_known(&self) -> Option<()> {
        self.losses_known_until(None)
    }

    /// The same for who must not wait for a log that stalls: None after `timeout` as well.
    pub(crate) fn losses_known_within(&self, timeout: Duration) -> Option<()> {
        self.losses_known_until(Some(Instant::now() + timeout))
    }

    fn losses_known_until(&self, deadline: Option<Instant>) -> Option<()> {
        let target = self.recorder.lock().ask_for_losses();
        self.poll(deadline, || self.recorder.lock().polls() >= target)
            .then(|| self.drained_until(deadline).map(drop))
            .flatten()
    }

    /// Waits until every captured write up to `last` has ended or was given up; false after `timeout` or when the agent
    /// ends first.
    pub(crate) fn wait_ended(&self, last: Option<Seq>, timeout: Duration) -> bool {
        self.poll(Some(Instant::now() + timeout), || {
            self.recorder.lock().have_ended(last)
        })
    }

    /// Waits until all that is suspect now is settled; false after `timeout` or when the agent ends first.
    pub(crate) fn wait_clear(&self, timeout: Duration) -> bool {
        let mark = self.recorder.lock().suspicions();
        self.await_clear.fetch_add(1, Ordering::SeqCst);
        let is_clear = self.poll(Some(Instant::now() + timeout), || {
            self.recorder.lock().is_clear(&mark)
        });
        self.await_clear.fetch_sub(1, Ordering::SeqCst);
        is_clear
    }

    /// Does somebody wait until what is suspect is compared?
    pub(crate) fn awaits_clear(&self) -> bool {
        self.await_clear.load(Ordering::SeqCst) > 0
    }

    /// Waits until the next agent would know which writes had ended as the log says when `seq` was recorded: those that it
    /// does not know of are in doubt when something is lost before it starts. False after `timeout` or when the agent ends
    /// first.
    pub(crate) fn wait_noted(&self, seq: Option<Seq>, timeout: Duration) -> bool {
        self.poll(Some(Instant::now() + timeout), || {
            let is_noted = Seq::new(self.noted.load(Ordering::SeqCst)) >= seq;
            if !is_noted {
                self.hurry();
                self.awaits_note.store(true, Ordering::SeqCst);
            }
            is_noted
        })
    }

    /// Has what is recorded by now made durable without waiting for more.
    pub(crate) fn hurry(&self) {
        self.hurries.store(true, Ordering::SeqCst);
    }

    /// Waits until `seq` is durable; false after `timeout` or when the agent ends first.
    pub(crate) fn wait_durable(&self, seq: Option<Seq>, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut durable = self.durable.lock();
        while durable.seq < seq {
            if durable.failure.is_some() || self.changed.wait_until(&mut durable, deadline).timed_out() {
                return durable.seq >= seq;
            }
        }
        true
    }

    /// For how long records are gathered for one frame.
    fn gather_interval(&self) -> Duration {
        let sync = Duration::from_nanos(self.sync_ns.load(Ordering::Relaxed));
        gather_interval(self.commit_interval(), sync)
    }

    /// A sync took so long.
    fn synced_in(&self, took: Duration) {
        let before = Duration::from_nanos(self.sync_ns.load(Ordering::Relaxed));
        let now = slowest(before, took).as_nanos();
        self.sync_ns
            .store(u64::try_from(now).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn commit_interval(&self) -> Duration {
        Duration::from_millis(self.commit_interval_ms.load(Ordering::Relaxed).max(1))
    }
}

/// A frame on its way to the log.
struct Encoded {
    frame: SealedFrame,
    epoch: Epoch,
    position: RingPosition,
}

/// Frames that a sync makes durable.
struct Group {
    job: SyncJob,
    /// Header and table of each, and where it lies.
    frames: Vec<(Box<[u8]>, FrameLocation)>,
}

/// How frames are encoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Encoding {
    pub(crate) boot_id: uuid::Uuid,
    /// Captured writes that may wait for it.
    pub(crate) queue_bytes: u64,
    /// Memory for what deltas are made against.
    pub(crate) delta_cache_bytes: u64,
}

/// Name of the stage that empties the ring.
const CAPTURE: &str = "capture";

/// As short as may be, unless that keeps the ring waiting. What is longer does not help where the log is what all wait for.
fn packing(waiting: usize, waiting_max: usize, is_log_behind: bool) -> Packing {
    match waiting * 4 / waiting_max.max(1) {
        0 => Packing::Dense,
        1 => Packing::Quick,
        _ if is_log_behind => Packing::Quick,
        _ => Packing::Plain,
    }
}

/// A panic is an error as others are.
fn contained(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    // Nobody goes on with what it leaves behind: the agent ends.
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    ended.unwrap_or_else(|_| {
        Err(anyhow::anyhow!(
            "it panicked: this is a fault of the agent, please report it"
        ))
    })
}

/// How long records are gathered for one frame: what a sync leaves of the commit interval, within bounds. The fewer frames,
/// the less each captured byte costs.
fn gather_interval(commit_interval: Duration, sync: Duration) -> Duration {
    let left = commit_interval.saturating_sub(sync);
    left.clamp(commit_interval / 2, commit_interval * 7 / 8)
}

/// The longest of late: one slow sync counts less and less.
fn slowest(before: Duration, took: Duration) -> Duration {
    took.max(before - before / 8)
}

/// What one thread does.
type Stage = Box<dyn FnOnce(&Shared) -> anyhow::Result<()> + Send>;

/// The running threads; joined in order by [`Pipeline::finish`].
pub(crate) struct Pipeline {
    pub(crate) shared: Arc<Shared>,
    pub(crate) requests: Sender<Request>,
    pub(crate) index: Sender<IndexRequest>,
    threads: Vec<(&'static str, JoinHandle<()>)>,
}

impl Pipeline {
    /// Starts capture, encode, log, sync and index.
    pub(crate) fn start(
        shared: &Arc<Shared>,
        capture: Capture,
        encoding: Encoding,
        log: LogWriter,
        index: IndexWriter,
    ) -> anyhow::Result<Self> {
        // Servers lack what comes on top of it.
        shared.log_bytes.store(log.log_bytes(), Ordering::Relaxed);
        // What a burst may hold beside the ring.
        let encode_queue_frames = (encoding.queue_bytes as usize / FRAME_BYTES_SEAL).max(1);
        let (to_encode, encode_queue) = bounded::<Sealed>(encode_queue_frames);
        let (to_log, log_queue) = bounded::<Encoded>(QUEUE_FRAMES);
        let (to_index, index_queue) = bounded::<IndexRequest>(INDEX_QUEUE_FRAMES);
        let (requests, request_queue) = bounded::<Request>(QUEUE_FRAMES);
        let mut threads = Vec::new();
        let mut spawn = |name: &'static str, work: Stage| {
            let shared = Arc::clone(shared);
            let run = move || {
                // The ring does not wait for the capture thread; all others may wait a little.
                if name != CAPTURE {
                    priority::give_way();
                }
                shared.run(name, || work(&shared));
            };
            std::thread::Builder::new()
                .name(format!("cdp-{name}"))
                .spawn(run)
                .map(|handle| threads.push((name, handle)))
                .with_context(|| format!("start the {name} thread"))
        };
        let index_sender = to_index.clone();
        spawn(
            "index",
            Box::new(move |shared| index_loop(shared, index, &index_queue)),
        )?;
        // There is one at a time.
        let (to_sync, sync_queue) = bounded::<Group>(1);
        let (tell_synced, synced) = bounded::<()>(1);
        spawn(
            "sync",
            Box::new(move |shared| sync_loop(shared, &sync_queue, &tell_synced, &to_index)),
        )?;
        spawn(
            "log",
            Box::new(move |shared| {
                let stage = LogStage {
                    shared,
                    log,
                    to_sync: &to_sync,
                    synced: &synced,
                    unsynced: Vec::new(),
                    begun: None,
                    epoch: Epoch::default(),
                    full_since: None,
                    has_appended: false,
                };
                stage.run(&log_queue)
            }),
        )?;
        spawn(
            "encode",
            Box::new(move |_| {
                let mut cache = DeltaCache::new(encoding.delta_cache_bytes);
                for sealed in &encode_queue {
                    let is_log_behind = to_log.len() > QUEUE_FRAMES / 2;
                    cache.pack(packing(encode_queue.len(), encode_queue_frames, is_log_behind));
                    let Sealed { epoch, position, .. } = sealed;
                    let frame = sealed
                        .builder
                        .seal_with(&mut cache, encoding.boot_id, sealed.wall_offset_ns);
                    let encoded = frame.map(|frame| Encoded {
                        frame,
                        epoch,
                        position,
                    });
                    if encoded.is_some_and(|encoded| to_log.send(encoded).is_err()) {
                        break;
                    }
                }
                Ok(())
            }),
        )?;
        spawn(
            CAPTURE,
            Box::new(move |shared| capture.run(shared, &request_queue, &to_encode)),
        )?;
        Ok(Self {
            shared: Arc::clone(shared),
            requests,
            index: index_sender,
            threads,
        })
    }

    /// Stops capture, writes out what is under way, and waits for all threads.
    pub(crate) fn finish(self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.requests);
        drop(self.index);
        // The capture thread was started last and ends first: each stage ends when its queue is closed.
        for (name, handle) in self.threads.into_iter().rev() {
            if handle.join().is_err() {
                tracing::error!("the {name} thread panicked");
            }
        }
    }
}

fn index_loop(shared: &Shared, mut index: IndexWriter, queue: &Receiver<IndexRequest>) -> anyhow::Result<()> {
    for request in queue {
        match request {
            IndexRequest::Frame(frame, location) => {
                index.apply(&frame, &location)?;
                shared
                    .applied
                    .store(index.applied().map_or(0, Seq::get), Ordering::SeqCst);
            }
            IndexRequest::HeadView(volume, reply) => {
                let _ = reply.send(index.head_view(volume).map_err(Into::into));
            }
        }
    }
    match index.flush() {
        // The next agent replays what is missing from the log.
        Err(error) if error.is_no_space() => {
            tracing::warn!("{error}");
            Ok(())
        }
        flushed => Ok(flushed?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_packed_less_while_the_ring_would_wait_and_not_where_the_log_is_late() {
        let packed = |waiting| [false, true].map(|is_log_behind| packing(waiting, 64, is_log_behind));
        assert_eq!(packed(15), [Packing::Dense; 2]);
        assert_eq!(packed(16), [Packing::Quick; 2]);
        assert_eq!(packed(31), [Packing::Quick; 2]);
        assert_eq!(packed(32), [Packing::Plain, Packing::Quick]);
        assert_eq!(packed(64), [Packing::Plain, Packing::Quick]);
        assert_eq!(packing(0, 1, false), Packing::Dense);
    }

    #[test]
    fn records_are_gathered_for_as_long_as_the_disk_leaves_time() {
        let ms = Duration::from_millis;
        let gathered = |sync| gather_interval(ms(16), ms(sync)).as_millis();
        assert_eq!([0, 2, 5, 8, 20].map(gathered), [14, 14, 11, 8, 8]);
    }

    /// Goal: an agent one of whose threads is gone does not go on as if nothing were.
    #[test]
    fn a_panic_is_a_failure() {
        assert!(contained(|| Ok(())).is_ok());
        let error = contained(|| panic!("on purpose")).unwrap_err();
        assert!(error.to_string().contains("panicked"), "{error}");
    }

    #[test]
    fn a_slow_sync_counts_at_once_and_less_and_less() {
        let ms = Duration::from_millis;
        assert_eq!(slowest(ms(8), ms(100)), ms(100));
        assert_eq!(slowest(ms(80), ms(1)), ms(70));
        let settled = (0..40).fold(ms(100), |before, _| slowest(before, ms(1)));
        assert_eq!(settled, ms(1));
    }
}
