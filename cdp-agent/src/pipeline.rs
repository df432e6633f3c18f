//! The threads between the ring and the disk.
//!
//! ```text
//! ring → capture (order, time) → encode (deltas, LZ4, CRC) → log (write) → sync (fsync) → index
//! ```
//!
//! Each arrow is a queue with a bound. When one is full the stage before it waits, down to the ring; when
//! the ring is full the probe drops, counts and marks. The host's writers never wait.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cdp_ebpf::DiskFilter;
use cdp_journal::format::{Body, DeltaCache, SealedFrame};
use cdp_journal::index::IndexWriter;
use cdp_journal::log::{FrameLocation, LogWriter, Room, SyncJob};
use cdp_journal::view::View;
use cdp_journal::{BootNs, Seq, VolumeId};
use crossbeam_channel::{Receiver, Sender, bounded, select};
use parking_lot::{Condvar, Mutex};
use rustix::event::{Timespec, epoll};

use crate::capture::{DiskNumber, Probe, RingPosition, RingPositions, Slot, WatchedDisk};
use crate::clock;
use crate::event::Event;
use crate::losses::Losses;
use crate::pace::Pace;
use crate::priority;
use crate::recorder::{Epoch, FRAME_BYTES_SEAL, Recorder, Sealed};

/// Frames, or requests, between two other stages.
const QUEUE_FRAMES: usize = 8;
/// Frames that the index may be behind.
const INDEX_QUEUE_FRAMES: usize = 1024;
/// Events taken from the ring before the lock is given up.
const EVENTS_PER_TURN: usize = 64;
/// How long the capture thread sleeps when the last turn found something; the kernel wakes it earlier when a
/// quarter of the ring waits.
const NAP_BUSY: Duration = Duration::from_millis(4);
/// How long it sleeps when nothing happens.
const NAP_IDLE: Duration = Duration::from_millis(20);
/// How often a full store is asked for room.
const ROOM_INTERVAL: Duration = Duration::from_secs(1);
/// Room that a full store must have before the log goes on: a resync that fills it at once helps nobody.
const ROOM_BYTES_MIN: u64 = 64 << 20;
/// How often the kernel is asked for skipped events.
const MISSES_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is noted for the agent after this one what is settled.
const NOTES_INTERVAL: Duration = Duration::from_millis(50);

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
    /// How fast the read-back may go.
    pub(crate) pace: Pace,
    store: Mutex<Option<StoreChange>>,
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
            pace: Pace::default(),
            store: Mutex::new(None),
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

    fn set_appended(&self, seq: Option<Seq>, position: RingPosition) {
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

    pub(crate) fn set_durable(&self, seq: Option<Seq>) {
        let mut durable = self.durable.lock();
        if seq > durable.seq {
            durable.seq = seq;
            self.changed.notify_all();
        }
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
        let target = self.positions.produced();
        let mut last = None;
        self.poll(None, || {
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
        let target = self.recorder.lock().ask_for_losses();
        self.poll(None, || self.recorder.lock().polls() >= target)
            .then(|| self.drained().map(drop))
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
        self.poll(Some(Instant::now() + timeout), || {
            self.recorder.lock().is_clear(&mark)
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
                    priority::do_not_preempt();
                }
                if let Err(error) = work(&shared) {
                    tracing::error!("{name}: {error:#}");
                    shared.fail(name, &error);
                }
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
                    oldest: None,
                    epoch: Epoch::default(),
                    full_since: None,
                };
                stage.run(&log_queue)
            }),
        )?;
        spawn(
            "encode",
            Box::new(move |_| {
                let mut cache = DeltaCache::new(encoding.delta_cache_bytes);
                for sealed in encode_queue {
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

struct Watched {
    slot: Slot,
    region_shift: u32,
    seen: Losses,
    /// It is noted that what was seen no longer matters.
    is_settled: bool,
}

/// The capture thread's own state.
pub(crate) struct Capture {
    probe: Probe,
    alarm: OwnedFd,
    watched: HashMap<DiskNumber, Watched>,
    misses: u64,
    misses_at: Instant,
    misses_seq: Option<Seq>,
    noted_at: Instant,
    /// What is to be noted as unsettled, once this record is appended.
    unsettled: Option<(Seq, Option<Seq>)>,
}

impl Capture {
    /// `resumed`: disks that the probe watches already, for an agent before this one, which recorded up to `last`.
    pub(crate) fn new(probe: Probe, resumed: &[WatchedDisk], last: Option<Seq>) -> anyhow::Result<Self> {
        let alarm = epoll::create(epoll::CreateFlags::CLOEXEC).context("make an epoll descriptor")?;
        let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&alarm, probe.ring_fd(), epoll::EventData::new_u64(0), edges).context("watch the ring")?;
        // Of a probe that was just loaded, nothing counts yet.
        let misses = match resumed {
            [] => {
                probe.notes().set_looked(last);
                probe.recursion_misses()?
            }
            _ => probe.notes().misses(),
        };
        let misses_seq = probe.notes().looked();
        let watched = resumed.iter().map(|disk| {
            let watched = Watched {
                slot: disk.slot,
                region_shift: disk.region_shift,
                seen: disk.settled,
                is_settled: true,
            };
            (disk.disk, watched)
        });
        Ok(Self {
            watched: watched.collect(),
            probe,
            alarm,
            misses,
            misses_at: Instant::now(),
            misses_seq,
            noted_at: Instant::now(),
            unsettled: None,
        })
    }

    fn run(
        mut self,
        shared: &Shared,
        requests: &Receiver<Request>,
        to_encode: &Sender<Sealed>,
    ) -> anyhow::Result<()> {
        loop {
            let stopping = shared.stop.load(Ordering::SeqCst);
            while let Ok(request) = requests.try_recv() {
                self.request(shared, request);
            }
            let now = clock::boot_ns();
            // Only what was queued before the counters are read is drained: no record gets ahead of a loss before it.
            let target = self.probe.positions().produced();
            {
                let mut recorder = shared.recorder.lock();
                recorder.set_wall_offset(clock::wall_offset_ns());
                match shared.store.lock().take() {
                    Some(StoreChange::Full { next, epoch }) => {
                        self.probe.notes().forget_after(next.prev());
                        recorder.store_full(next, epoch, now);
                    }
                    Some(StoreChange::Room) => recorder.room_again(now),
                    None => {}
                }
                self.poll_losses(&mut recorder, now);
                self.note(&recorder, shared.appended());
            }
            self.probe.release(shared.appended_position());
            let (events, empty) = self.drain(shared, to_encode, target)?;
            let mut recorder = shared.recorder.lock();
            recorder.drained_to(self.probe.positions().consumed(), now);
            if empty {
                recorder.tick(now);
            }
            let unkept = self.probe.positions().consumed() - shared.appended_position().0;
            let hurries = shared.hurries.swap(false, Ordering::SeqCst);
            let age_max = if stopping || hurries || unkept > self.probe.ring_bytes() / 4 {
                Duration::ZERO
            } else {
                shared.commit_interval() / 2
            };
            recorder.seal_if_older(clock::boot_ns(), age_max);
            drop(recorder);
            self.forward(shared, to_encode)?;
            // What was queued before the stop is recorded; others may never stop writing.
            if stopping {
                let mut recorder = shared.recorder.lock();
                recorder.note(clock::boot_ns(), None, Body::Stop);
                recorder.seal_if_older(clock::boot_ns(), Duration::ZERO);
                drop(recorder);
                return self.forward(shared, to_encode);
            }
            if empty {
                let nap = if events > 0 {
                    NAP_BUSY.min(shared.commit_interval() / 4)
                } else {
                    NAP_IDLE
                };
                self.sleep(nap);
            }
        }
    }

    fn request(&mut self, shared: &Shared, request: Request) {
        match request {
            Request::Watch(disk, filter, reply) => {
                let result = match filter {
                    Some(filter) => self.probe.watch(disk, filter),
                    None => {
                        if let Some(watched) = self.watched.remove(&disk) {
                            self.probe.notes().clear_disk(watched.slot);
                        }
                        self.probe.unwatch(disk)
                    }
                };
                let _ = reply.send(result);
            }
            Request::Slot(slot, disk, region_shift) => match self.watched.get_mut(&disk) {
                Some(watched) if watched.region_shift == region_shift => {}
                Some(watched) => {
                    // Marks on either side of the change are of another scale: all of the disk is read.
                    watched.region_shift = region_shift;
                    watched.is_settled = false;
                    self.probe.notes().take_marks(slot);
                    shared.recorder.lock().disk_unknown(disk, clock::boot_ns());
                }
                None => {
                    self.probe.take_marks(slot, |_| {});
                    let seen = self.probe.losses(slot);
                    self.probe.notes().set_disk(&WatchedDisk {
                        disk,
                        slot,
                        disk_seq: disk.seq().unwrap_or(0),
                        region_shift,
                        settled: seen,
                        marks_taken: true,
                    });
                    self.watched.insert(
                        disk,
                        Watched {
                            slot,
                            region_shift,
                            seen,
                            is_settled: false,
                        },
                    );
                }
            },
        }
    }

    fn poll_losses(&mut self, recorder: &mut Recorder, now: BootNs) {
        let mut quiet = true;
        let slots: Vec<DiskNumber> = self.watched.keys().copied().collect();
        for disk in slots {
            let Some(watched) = self.watched.get(&disk) else {
                continue;
            };
            let (slot, region_shift) = (watched.slot, watched.region_shift);
            let losses = self.probe.losses(slot);
            let Some(watched) = self.watched.get_mut(&disk) else {
                continue;
            };
            if losses == watched.seen {
                continue;
            }
            let new = losses.since(watched.seen);
            watched.seen = losses;
            watched.is_settled = false;
            quiet = false;
            self.probe.notes().take_marks(slot);
            let first = self.probe.take_first_drop_ns(slot);
            let mut marks = Vec::new();
            self.probe.take_marks(slot, |region| {
                let bytes = 512u64 << region_shift;
                marks.push(region * bytes..(region + 1) * bytes);
            });
            let first_at = (first != 0).then_some(BootNs(first));
            recorder.losses(
                slot,
                new,
                first_at,
                now,
                self.probe.positions().produced(),
                &marks,
            );
        }
        if quiet {
            recorder.no_loss();
        }
        if recorder.are_losses_asked_for() || self.misses_at.elapsed() >= MISSES_INTERVAL {
            self.misses_at = Instant::now();
            match self.probe.recursion_misses() {
                Ok(misses) => {
                    if misses > self.misses {
                        recorder.everything_unknown(self.misses_seq, now);
                    }
                    self.misses = misses;
                    self.misses_seq = recorder.last_seq();
                    if misses == self.probe.notes().misses() {
                        self.probe.notes().set_looked(self.misses_seq);
                    }
                }
                // What was skipped since the last look counts from there when the next one succeeds.
                Err(error) => tracing::error!("cannot look for skipped events: {error:#}; trying again"),
            }
        }
        recorder.polled();
    }

    /// Notes for the agent after this one what it need not care about.
    fn note(&mut self, recorder: &Recorder, appended: Option<Seq>) {
        if self.noted_at.elapsed() < NOTES_INTERVAL {
            return;
        }
        self.noted_at = Instant::now();
        let notes = self.probe.notes();
        match self.unsettled {
            Some((_, last)) if appended < last => {}
            Some((first, _)) => {
                notes.set_unsettled(first);
                self.unsettled = None;
            }
            None => self.unsettled = Some((recorder.unsettled(), recorder.last_seq())),
        }
        for (&disk, watched) in &mut self.watched {
            if !watched.is_settled && recorder.is_settled(Some(disk), appended) {
                notes.settle(watched.slot, watched.seen);
                watched.is_settled = true;
            }
        }
        if notes.misses() != self.misses && recorder.is_settled(None, appended) {
            notes.set_misses(self.misses);
        }
    }

    /// Hands sealed frames to the encoder. Waits while it is busy: the ring takes what comes meanwhile.
    fn forward(&mut self, shared: &Shared, to_encode: &Sender<Sealed>) -> anyhow::Result<()> {
        loop {
            let (sealed, reopened) = {
                let mut recorder = shared.recorder.lock();
                (recorder.take_sealed(), recorder.take_reopened())
            };
            // Before a frame gives back the event that told of it.
            if let Some(reopened) = reopened {
                self.unsettle(reopened);
            }
            let Some(sealed) = sealed else {
                return Ok(());
            };
            if let Some(last) = sealed.builder.next_seq().prev() {
                self.probe.notes().frame(last, sealed.position);
            }
            to_encode
                .send(sealed)
                .ok()
                .context("the encode stage has ended")?;
        }
    }

    /// A write came to be in doubt that the notes may call settled.
    fn unsettle(&mut self, reopened: Seq) {
        if let Some((first, _)) = &mut self.unsettled {
            *first = reopened.min(*first);
        }
        let notes = self.probe.notes();
        if notes.unsettled() > Some(reopened) {
            notes.set_unsettled(reopened);
        }
    }

    /// Records the events before `target`. How many there were, and whether the ring is empty now.
    fn drain(
        &mut self,
        shared: &Shared,
        to_encode: &Sender<Sealed>,
        target: u64,
    ) -> anyhow::Result<(u64, bool)> {
        let mut events = 0;
        loop {
            {
                let mut recorder = shared.recorder.lock();
                for _ in 0..EVENTS_PER_TURN {
                    let consumed = self.probe.positions().consumed();
                    if consumed >= target {
                        return Ok((events, self.probe.positions().produced() == consumed));
                    }
                    if !recorder.has_room() {
                        break;
                    }
                    let mut foreign = None;
                    let any = self.probe.next_event(|bytes, behind| match Event::parse(bytes) {
                        Ok(event) => recorder.event(&event, behind),
                        Err(error) => foreign = Some(error),
                    });
                    if let Some(error) = foreign {
                        return Err(error.into());
                    }
                    if !any {
                        return Ok((events, true));
                    }
                    events += 1;
                }
            }
            self.forward(shared, to_encode)?;
        }
    }

    /// Sleeps, or until the probe raises the alarm that a quarter of the ring waits. Edge-triggered: the
    /// data that waits below that mark does not wake us.
    fn sleep(&self, nap: Duration) {
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: nap.as_nanos() as i64,
        };
        let mut events = Vec::with_capacity(1);
        let _ = epoll::wait(
            &self.alarm,
            rustix::buffer::spare_capacity(&mut events),
            Some(&timeout),
        );
    }
}

/// Appends frames, and has them made durable in groups.
struct LogStage<'a> {
    shared: &'a Shared,
    log: LogWriter,
    to_sync: &'a Sender<Group>,
    /// Something comes when a sync has ended.
    synced: &'a Receiver<()>,
    unsynced: Vec<(Box<[u8]>, FrameLocation)>,
    oldest: Option<Instant>,
    epoch: Epoch,
    full_since: Option<Instant>,
}

impl LogStage<'_> {
    fn run(mut self, queue: &Receiver<Encoded>) -> anyhow::Result<()> {
        self.tell_room();
        loop {
            let is_synced = self.log.is_synced().context("make the log durable")?;
            let is_due = self.due_in().is_some_and(|wait| wait.is_zero());
            if is_synced && is_due || self.unsynced.len() >= INDEX_QUEUE_FRAMES / 2 {
                self.commit()?;
            }
            let wait = self.due_in().filter(|_| is_synced).unwrap_or(ROOM_INTERVAL);
            select! {
                recv(queue) -> encoded => match encoded {
                    Ok(encoded) if encoded.epoch >= self.epoch => self.append(encoded)?,
                    Ok(_) => {}
                    Err(_) => return self.commit(),
                },
                recv(self.synced) -> told => told.context("the sync stage has ended")?,
                default(wait) => {}
            }
            self.look_for_room();
        }
    }

    /// When the next sync is to begin, if one is to.
    fn due_in(&self) -> Option<Duration> {
        let interval = self.shared.commit_interval() / 2;
        self.oldest
            .map(|oldest| interval.saturating_sub(oldest.elapsed()))
    }

    fn append(&mut self, encoded: Encoded) -> anyhow::Result<()> {
        let frame = encoded.frame;
        match self.log.append(&frame) {
            Ok(location) => {
                self.shared
                    .set_appended(self.log.next_seq().prev(), encoded.position);
                self.shared.pace.encoded(&frame);
                self.unsynced.push((frame.head().into(), location));
                self.oldest.get_or_insert_with(Instant::now);
                Ok(())
            }
            Err(error) if error.is_full() && frame.has_data() => {
                tracing::error!("{error}");
                self.commit()?;
                self.epoch = Epoch(self.epoch.0 + 1);
                self.full_since = Some(Instant::now());
                *self.shared.store.lock() = Some(StoreChange::Full {
                    next: self.log.next_seq(),
                    epoch: self.epoch,
                });
                Ok(())
            }
            // Not even the record of the gap found room: the next start of the agent will open it.
            Err(error) => Err(error).context("append to the log"),
        }
    }

    /// Has everything made durable that was appended so far. Waits for the sync before, if one is under way.
    fn commit(&mut self) -> anyhow::Result<()> {
        self.oldest = None;
        if self.unsynced.is_empty() {
            return Ok(());
        }
        self.tell_room();
        let Some(job) = self.log.begin_sync().context("make the log durable")? else {
            return Ok(());
        };
        let frames = std::mem::take(&mut self.unsynced);
        let group = Group { job, frames };
        self.to_sync.send(group).ok().context("the sync stage has ended")
    }

    /// What `status` and the warnings say of the store.
    fn tell_room(&self) {
        self.shared
            .log_bytes
            .store(self.log.log_bytes(), Ordering::Relaxed);
        match self.log.room() {
            Ok(room) => *self.shared.room.lock() = Some(room),
            Err(error) => tracing::debug!(%error, "how full the store is could not be asked"),
        }
    }

    fn look_for_room(&mut self) {
        if self
            .full_since
            .is_some_and(|since| since.elapsed() >= ROOM_INTERVAL)
        {
            self.full_since = Some(Instant::now());
            self.tell_room();
            let mut change = self.shared.store.lock();
            if change.is_none() && self.log.has_room(ROOM_BYTES_MIN) {
                *change = Some(StoreChange::Room);
                self.full_since = None;
            }
        }
    }
}

/// Makes groups of frames durable, and hands them to the index.
fn sync_loop(
    shared: &Shared,
    queue: &Receiver<Group>,
    tell_synced: &Sender<()>,
    to_index: &Sender<IndexRequest>,
) -> anyhow::Result<()> {
    for Group { job, frames } in queue {
        let durable = job.run().context("make the log durable")?;
        shared.set_durable(durable);
        // One word that is not heard yet is enough.
        let _ = tell_synced.try_send(());
        for (frame, location) in frames {
            to_index
                .send(IndexRequest::Frame(frame, location))
                .ok()
                .context("the index stage has ended")?;
        }
    }
    Ok(())
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
    index.flush()?;
    Ok(())
}
