//! The agent's threads, one small step at a time: what `pipeline` and `readback` do between two holds of the
//! recorder's lock is one step here. A change there needs its change here.

use std::collections::VecDeque;
use std::ops::Range;

use cdp_journal::format::VolumeKind;

use super::super::size::Look;
use super::super::*;
use super::job::{Job, Phase};
use super::kernel::{Counters, Kernel, RingEvent};
use super::model::{Content, Ended, Model};
use super::notes::Notes;
use super::{DISK, Planted, Profile, REGION_SECTORS, Rng, SECTORS, SLOT, START, volume_id};
use crate::losses::Losses;

/// As in `readback`, but for a device of a few blocks.
const RUN_BYTES_MAX: u64 = 32 << 10;
const COMPARE_BLOCKS_MAX: usize = 3;
const FLIGHT_NS_MAX: u64 = 10_000_000_000;
const RETRY_NS: u64 = 1_000_000_000;
const IDLE_NS: u64 = 10_000_000;
const MISSES_INTERVAL_NS: u64 = 1_000_000_000;
/// Frames before the log.
const QUEUE_FRAMES: usize = 4;

#[derive(Debug)]
enum Capture {
    Top,
    /// The counters were read, after where the ring ended (`target`); the recorder is locked until `Marks` is done.
    Counters(BootNs, u64, Counters),
    Marks(BootNs, u64, Counters),
    Drain {
        now: BootNs,
        target: u64,
    },
    Forward(BootNs, bool),
}

#[derive(Debug)]
enum ReadBack {
    Suspects,
    Run,
    Job(Box<Job>),
    Closing { target: u64, drained_ns: u64 },
    Sleep(u64),
}

#[derive(Clone, Copy, Debug)]
enum StoreChange {
    Full { next: Seq, epoch: Epoch },
    Room,
}

#[derive(Debug)]
struct Frame {
    next_seq: u64,
    position: u64,
    has_data: bool,
    epoch: Epoch,
}

/// The store's side: what of the log is where.
#[derive(Debug, Default)]
struct Store {
    queue: VecDeque<Frame>,
    appended: u64,
    /// Behind the last event of what is appended.
    position: u64,
    durable: u64,
    applied: u64,
    epoch: Epoch,
    is_full: bool,
    change: Option<StoreChange>,
    /// Ends of frames that were appended and are not durable.
    ends: Vec<u64>,
}

#[derive(Debug)]
pub(super) struct Agent {
    pub(super) recorder: Recorder,
    capture: Capture,
    readback: ReadBack,
    /// Of the volume, as far as it is known.
    sectors: usize,
    /// As `check_devices`: since when it is being looked at, and what it was found to be, and when.
    look: Option<Look>,
    found_size: Option<(usize, u64)>,
    store: Store,
    seen: Counters,
    misses: u64,
    misses_at_ns: u64,
    misses_seq: Option<Seq>,
    idle_at: Option<BootNs>,
    /// Until then the device is not read: it failed a read.
    resting_until_ns: u64,
    /// Writes that were in flight at some time: since when, and the last record by then.
    lingering: Option<(u64, Option<Seq>)>,
    drained_ns: u64,
    sealed_next: u64,
    /// How often it gave up writes that have not ended.
    given_up: u64,
    pub(super) notes: Notes,
    /// As `Agent::begin`, when what was waiting in the ring is recorded.
    is_to_begin: bool,
    ring_units: u64,
    is_bio_based: bool,
    planted: Option<Planted>,
}

/// As the configuration has it.
pub(super) fn volume(sectors: usize) -> NewVolume {
    NewVolume {
        id: volume_id(),
        name: "v".into(),
        path: "/dev/v".into(),
        disk: DISK,
        start_sector: START,
        bytes: sectors as u64 * SECTOR_BYTES,
        region_bytes: REGION_SECTORS * SECTOR_BYTES,
        blank: false,
        gaps: 0,
        last_exact: None,
        inexact_since: None,
        cause: None,
        exact: None,
    }
}

fn start() -> Body {
    let (agent, boot_id) = (uuid::Uuid::nil(), uuid::Uuid::nil());
    Body::Start { agent, boot_id }
}

pub(super) fn sectors_of(bytes: &Range<u64>) -> Range<usize> {
    (bytes.start / SECTOR_BYTES) as usize..(bytes.end / SECTOR_BYTES) as usize
}

/// Blocks of the volume that a range of the disk touches, a bit for each.
fn blocks_of(start: u64, sectors: u64) -> u64 {
    let own = (start..start + sectors).filter(|sector| (START..START + SECTORS as u64).contains(sector));
    own.fold(0, |bits, sector| bits | 1 << ((sector - START) / 8))
}

fn bytes_of(contents: &[Content]) -> Vec<u8> {
    let mut bytes = vec![0; contents.len() * SECTOR_BYTES as usize];
    for (sector, content) in bytes.chunks_mut(SECTOR_BYTES as usize).zip(contents) {
        sector[..8].copy_from_slice(&content.to_le_bytes());
    }
    bytes
}

impl Agent {
    /// Starts on what the store holds, as `agent::protect` does.
    pub(super) fn start(kernel: &mut Kernel, model: &mut Model, profile: &Profile) -> Self {
        let durable = model.last_seq();
        let now = BootNs(kernel.instant());
        let known = model.is_declared();
        let mut recorder = Recorder::new(Seq::new(durable), 0);
        recorder.note(now, None, start());
        let id = Some(volume_id());
        if known && model.is_exact() {
            recorder.note(
                now,
                id,
                Body::GapOpen {
                    cause: GapCause::AgentDown,
                    last_exact: Seq::new(durable),
                },
            );
        }
        let bytes = kernel.size_looked_at() as u64 * SECTOR_BYTES;
        let declared = Body::Volume {
            kind: VolumeKind::Block,
            bytes,
            name: "v".into(),
            path: "/dev/v".into(),
        };
        recorder.note(now, id, declared);
        recorder.add_disk(DISK, SLOT, profile.bio_based);
        recorder.add_volume(
            NewVolume {
                blank: !known,
                last_exact: model.last_exact(durable),
                cause: known.then_some(GapCause::AgentDown),
                ..volume(kernel.size)
            },
            now,
        );
        let nothing = (Counters::default(), 0, Seq::new(durable));
        let notes = Notes::of_new_probe(Seq::new(durable));
        let mut agent = Self::over(recorder, notes, nothing, durable, kernel.consumed, now);
        agent.sectors = kernel.size;
        agent.ring_units = profile.ring_units;
        agent.is_bio_based = profile.bio_based;
        agent.planted = profile.planted;
        agent.is_to_begin = false;
        agent.tapped(model, None);
        agent
    }

    /// Goes on behind `last`, with what is known of the probe's counters, of skipped events, and when those were looked
    /// for.
    fn over(
        recorder: Recorder,
        notes: Notes,
        (seen, misses, misses_seq): (Counters, u64, Option<Seq>),
        last: u64,
        position: u64,
        now: BootNs,
    ) -> Self {
        Self {
            recorder,
            capture: Capture::Top,
            readback: ReadBack::Suspects,
            sectors: 0,
            look: None,
            found_size: None,
            store: Store {
                appended: last,
                position,
                durable: last,
                applied: last,
                ..Store::default()
            },
            seen,
            misses,
            misses_at_ns: now.0,
            misses_seq,
            idle_at: None,
            resting_until_ns: 0,
            lingering: None,
            drained_ns: 0,
            sealed_next: last + 1,
            given_up: 0,
            notes,
            is_to_begin: true,
            ring_units: 0,
            is_bio_based: false,
            planted: None,
        }
    }

    /// The agent after this one, which takes the probe over.
    pub(super) fn next(
        &self,
        recorder: Recorder,
        notes: Notes,
        known: (Counters, u64, Option<Seq>),
        last: u64,
        position: u64,
        now: BootNs,
    ) -> Self {
        Self {
            ring_units: self.ring_units,
            is_bio_based: self.is_bio_based,
            planted: self.planted,
            // Else it is not taken over.
            sectors: (recorder.volumes[0].bytes / SECTOR_BYTES) as usize,
            ..Self::over(recorder, notes, known, last, position, now)
        }
    }

    pub(super) fn is_bio_based(&self) -> bool {
        self.is_bio_based
    }

    /// What a kill leaves.
    pub(super) fn appended(&self) -> u64 {
        self.store.appended
    }

    fn note(&mut self) {
        self.notes
            .keep(&self.recorder, &self.seen, self.misses, self.store.appended);
    }

    /// The probe watches.
    pub(super) fn attach(&mut self, kernel: &mut Kernel) {
        if self.is_watched(kernel) {
            let now_ns = kernel.instant();
            self.recorder.attached(DISK, BootNs(now_ns));
            kernel.all_unseen_known(now_ns);
            return;
        }
        kernel.watched = self.sectors();
        if !std::mem::replace(&mut kernel.is_watched, true) {
            self.notes.watch();
        }
    }

    fn sectors(&self) -> usize {
        (self.recorder.volumes[0].bytes / SECTOR_BYTES) as usize
    }

    /// Does the probe watch the volume as large as it is known to be?
    fn is_watched(&self, kernel: &Kernel) -> bool {
        kernel.is_watched && kernel.watched == self.sectors()
    }

    pub(super) fn is_attached(&self, kernel: &Kernel) -> bool {
        self.recorder.volumes[0].attached && self.is_watched(kernel)
    }

    /// One step of who looks after the devices.
    pub(super) fn sizing_step(&mut self, rng: &mut Rng, kernel: &mut Kernel, model: &mut Model) {
        if matches!(self.capture, Capture::Counters(..) | Capture::Marks(..)) {
            return; // the recorder is locked
        }
        let now_ns = kernel.instant();
        let Some(look) = self.look else {
            // What is watched of it is changed before it is looked at again.
            self.look = self.is_attached(kernel).then(|| self.recorder.look());
            return;
        };
        let Some((sectors, seen_ns)) = self.found_size.take() else {
            // It may not be there just now.
            if rng.one_in(4) {
                self.look = None;
            } else {
                self.found_size = Some((kernel.size_looked_at(), now_ns));
            }
            return;
        };
        self.look = None;
        self.sectors = sectors;
        let bytes = sectors as u64 * SECTOR_BYTES;
        self.recorder.size_found(volume_id(), bytes, look, BootNs(now_ns));
        self.tapped(model, None);
        kernel.size_known(seen_ns, model.last_seq());
    }

    /// Nothing is left to do.
    pub(super) fn is_settled(&self, kernel: &Kernel) -> bool {
        let volume = &self.recorder.volumes[0];
        kernel.ring.is_empty()
            && self.sectors() == kernel.size
            && self.is_watched(kernel)
            && kernel.skipped().next().is_none()
            && matches!(volume.state, State::Exact { .. })
            && volume.dirty.is_empty()
            && volume.suspects.held().next().is_none()
            && volume.in_doubt.is_none()
            && matches!(self.readback, ReadBack::Sleep(_))
    }

    /// The blocks that wait to be compared, a bit for each.
    pub(super) fn suspects(&self) -> u64 {
        self.recorder.volumes[0]
            .suspects
            .held()
            .fold(0, |bits, block| bits | 1 << block)
    }

    /// The blocks that wait to be compared, or for a gap that will say that they are not.
    pub(super) fn unsettled(&self, kernel: &Kernel) -> u64 {
        match self.recorder.volumes[0].in_doubt {
            Some(_) => u64::MAX,
            None => self.perhaps_suspects(kernel),
        }
    }

    /// The blocks that wait to be compared, or will when the agent gives up a write whose end was skipped.
    fn perhaps_suspects(&self, kernel: &Kernel) -> u64 {
        kernel.skipped().fold(self.suspects(), |bits, range| {
            bits | blocks_of(range.start, range.end - range.start)
        })
    }

    /// Which frames survive a crash: the Seq after the last record.
    pub(super) fn survives(&self, rng: &mut Rng) -> u64 {
        let unsynced = &self.store.ends;
        match rng.below(unsynced.len() as u64 + 1) as usize {
            0 => self.store.durable,
            n => unsynced[n - 1],
        }
    }

    /// Hands new records to the model.
    fn tapped(&mut self, model: &mut Model, bio: Option<usize>) {
        for (seq, at, body, data) in std::mem::take(&mut self.recorder.tap) {
            let is_written = matches!(
                body,
                Body::Write { .. } | Body::Zero { .. } | Body::Discard { .. }
            );
            model.record(seq.get(), at.0, body, &data, self.drained_ns);
            if let Some(bio) = bio.filter(|_| is_written) {
                model.captured(bio, seq.get());
            }
        }
    }

    /// What was written anew before somebody compared it stays as it was issued.
    fn overwritten(model: &mut Model, blocks: u64, at_ns: u64) {
        for block in (0..SECTORS / 8).filter(|block| blocks >> block & 1 == 1) {
            model.exempt(block * 8..block * 8 + 8, at_ns, Ended::Changed);
        }
    }

    /// One step of the capture thread.
    pub(super) fn capture_step(&mut self, rng: &mut Rng, kernel: &mut Kernel, model: &mut Model) {
        let now_ns = kernel.instant();
        let state = std::mem::replace(&mut self.capture, Capture::Top);
        self.capture = match state {
            Capture::Top => {
                let now = BootNs(now_ns);
                match self.store.change.take() {
                    Some(StoreChange::Full { next, epoch }) => {
                        model.interrupted(now_ns, next.get());
                        kernel.forget_captured(|_| true);
                        self.notes.forget_after(next.get() - 1);
                        self.recorder.store_full(next, epoch, now);
                        self.sealed_next = next.get();
                    }
                    Some(StoreChange::Room) => {
                        self.recorder.room_again(now);
                        kernel.all_unseen_known(now_ns);
                    }
                    None => {}
                }
                self.tapped(model, None);
                if kernel.is_watched {
                    Capture::Counters(now, kernel.produced, kernel.counters.clone())
                } else {
                    Capture::Forward(now, true)
                }
            }
            Capture::Counters(now, target, mut found) => {
                let is_new = found.dropped != self.seen.dropped
                    || found.lost_completions != self.seen.lost_completions;
                if is_new {
                    found.first_drop_ns = std::mem::take(&mut kernel.counters.first_drop_ns);
                    self.notes.take_marks();
                    Capture::Marks(now, target, found)
                } else {
                    self.recorder.no_loss();
                    self.polled(kernel, model);
                    self.note();
                    kernel.release(self.store.position, self.ring_units);
                    Capture::Drain { now, target }
                }
            }
            Capture::Marks(now, target, found) => {
                let region_bytes = REGION_SECTORS * SECTOR_BYTES;
                let forgotten = usize::from(self.planted == Some(Planted::ForgetMark));
                let marks: Vec<Range<u64>> = std::mem::take(&mut kernel.counters.marks)
                    .into_iter()
                    .skip(forgotten)
                    .map(|region| region * region_bytes..(region + 1) * region_bytes)
                    .collect();
                let losses = Losses {
                    dropped: [found.dropped - self.seen.dropped, 0, 0, 0],
                    lost_completions: found.lost_completions - self.seen.lost_completions,
                };
                let first_at = (found.first_drop_ns != 0).then_some(BootNs(found.first_drop_ns));
                // Its clock is read once more.
                let taken = BootNs(now_ns);
                self.recorder
                    .losses(SLOT, losses, first_at, taken, kernel.produced, &marks);
                self.tapped(model, None);
                let counted = (found.dropped + found.lost_completions)
                    - (self.seen.dropped + self.seen.lost_completions);
                self.seen = found;
                let last_ns = kernel.losses_taken(counted as usize);
                kernel.dropped_known(last_ns, now_ns);
                self.polled(kernel, model);
                self.note();
                kernel.release(self.store.position, self.ring_units);
                Capture::Drain { now, target }
            }
            Capture::Drain { now, target } => self.drain(rng, kernel, model, now, target),
            Capture::Forward(now, empty) => {
                if self.forward() {
                    let overdue_at = self.recorder.overdue_at;
                    self.recorder.drained_to(kernel.consumed, now);
                    self.given_up += u64::from(self.recorder.overdue_at != overdue_at);
                    kernel.given_up(self.given_up);
                    if empty {
                        self.recorder.tick(now);
                    }
                    if empty && std::mem::take(&mut self.is_to_begin) {
                        self.recorder.note(now, None, start());
                    }
                    self.recorder
                        .seal_if_older(BootNs(now_ns), Duration::from_millis(5));
                    self.tapped(model, None);
                    let _ = self.forward();
                    Capture::Top
                } else {
                    Capture::Forward(now, empty)
                }
            }
        };
    }

    fn polled(&mut self, kernel: &mut Kernel, model: &mut Model) {
        if self.recorder.are_losses_asked_for() || kernel.now_ns - self.misses_at_ns >= MISSES_INTERVAL_NS {
            self.misses_at_ns = kernel.now_ns;
            if kernel.counters.misses > self.misses {
                // Its clock is read once more.
                let now_ns = kernel.instant();
                self.recorder.everything_unknown(self.misses_seq, BootNs(now_ns));
                self.tapped(model, None);
                kernel.missed_known(now_ns);
            }
            self.misses = kernel.counters.misses;
            kernel.misses_ns.clear();
            for (_, _, known) in &mut kernel.missed {
                known.get_or_insert(model.last_seq());
            }
            self.misses_seq = self.recorder.last_seq();
            self.notes.looked(self.misses, self.misses_seq);
        }
        self.recorder.polled();
    }

    fn drain(
        &mut self,
        rng: &mut Rng,
        kernel: &mut Kernel,
        model: &mut Model,
        now: BootNs,
        target: u64,
    ) -> Capture {
        for _ in 0..1 + rng.below(6) {
            if kernel.consumed >= target {
                return Capture::Forward(now, kernel.ring.is_empty());
            }
            if !self.recorder.has_room() {
                break;
            }
            let Some(next) = kernel.read() else {
                return Capture::Forward(now, true);
            };
            let behind = RingPosition(kernel.consumed);
            let before = self.perhaps_suspects(kernel);
            let mut touched = 0;
            match next.event {
                RingEvent::Write(event, content, number) => {
                    let sectors = u64::from(event.bytes) / SECTOR_BYTES;
                    touched = blocks_of(event.sector, sectors);
                    let data = if event.op == Op::Write as u8 {
                        bytes_of(&vec![content; sectors as usize])
                    } else {
                        Vec::new()
                    };
                    let was_full = self.recorder.is_full();
                    self.recorder.event(&Event::Write(event, &data), behind);
                    self.tapped(model, Some(number));
                    if was_full {
                        kernel.never_captured(number);
                    }
                }
                RingEvent::Complete(event) => {
                    self.recorder.event(&Event::Complete(event), behind);
                }
                RingEvent::Changed(event) => {
                    self.recorder.event(&Event::Changed(event), behind);
                }
            }
            self.tapped(model, None);
            Self::overwritten(model, before & touched, next.at_ns);
        }
        if !self.forward() {
            return Capture::Drain { now, target };
        }
        Capture::Drain { now, target }
    }

    /// Hands sealed frames on; false while there is no room for them.
    fn forward(&mut self) -> bool {
        if let Some(reopened) = self.recorder.take_reopened() {
            self.notes.unsettle(reopened);
        }
        while self.store.queue.len() < QUEUE_FRAMES {
            let Some(sealed) = self.recorder.take_sealed() else {
                return true;
            };
            let next_seq = sealed.builder.next_seq().get();
            assert_eq!(
                next_seq - sealed.builder.record_count() as u64,
                self.sealed_next,
                "frames follow one another"
            );
            self.sealed_next = next_seq;
            self.notes.frame(next_seq - 1, sealed.position.0);
            self.store.queue.push_back(Frame {
                next_seq,
                position: sealed.position.0,
                has_data: sealed.builder.raw_bytes() > 0,
                epoch: sealed.epoch,
            });
        }
        self.recorder.sealed.is_empty()
    }

    /// One step of the threads behind the recorder.
    pub(super) fn store_step(&mut self, rng: &mut Rng, has_room: bool) {
        let store = &mut self.store;
        match rng.below(3) {
            0 => {
                let Some(frame) = store.queue.pop_front() else {
                    return;
                };
                if frame.epoch < store.epoch {
                    return;
                }
                if !has_room && frame.has_data {
                    store.durable = store.appended;
                    store.ends.clear();
                    store.epoch = Epoch(store.epoch.0 + 1);
                    store.is_full = true;
                    store.change = Some(StoreChange::Full {
                        next: Seq::after(Seq::new(store.appended)),
                        epoch: store.epoch,
                    });
                    return;
                }
                store.appended = frame.next_seq - 1;
                store.position = frame.position;
                store.ends.push(store.appended);
            }
            1 => {
                store.durable = store.appended;
                store.ends.clear();
                if store.is_full && has_room && store.change.is_none() {
                    store.is_full = false;
                    store.change = Some(StoreChange::Room);
                }
            }
            _ => store.applied = store.durable,
        }
    }

    /// One step of the read-back thread.
    pub(super) fn readback_step(
        &mut self,
        rng: &mut Rng,
        kernel: &mut Kernel,
        model: &mut Model,
        errors: bool,
    ) {
        if matches!(self.capture, Capture::Counters(..) | Capture::Marks(..)) {
            return; // the recorder is locked
        }
        let now_ns = kernel.instant();
        let may = |_| now_ns >= self.resting_until_ns;
        let state = std::mem::replace(&mut self.readback, ReadBack::Suspects);
        self.readback = match state {
            ReadBack::Sleep(until_ns) if now_ns < until_ns => ReadBack::Sleep(until_ns),
            ReadBack::Sleep(_) => ReadBack::Suspects,
            ReadBack::Suspects => match self.recorder.take_suspects(COMPARE_BLOCKS_MAX, may) {
                Some(suspicion) => ReadBack::Job(Box::new(Job::compare(&suspicion, self.sectors))),
                None => ReadBack::Run,
            },
            ReadBack::Run => match self.recorder.take_run(RUN_BYTES_MAX, may) {
                Some(run) => ReadBack::Job(Box::new(Job::read(run))),
                None if self.recorder.waiting_to_close().is_empty() => {
                    self.give_up_lingering(kernel);
                    ReadBack::Sleep(now_ns + IDLE_NS)
                }
                None => {
                    if kernel.writes_in_flight() == 0 || self.planted == Some(Planted::CloseEarly) {
                        self.idle_at = Some(BootNs(now_ns));
                    }
                    ReadBack::Closing {
                        target: kernel.produced,
                        drained_ns: now_ns,
                    }
                }
            },
            ReadBack::Closing { target, drained_ns } if kernel.consumed < target => {
                ReadBack::Closing { target, drained_ns }
            }
            ReadBack::Closing { drained_ns, .. } => {
                self.drained_ns = drained_ns;
                if self.recorder.try_close(volume_id(), self.idle_at, BootNs(now_ns)) {
                    let quiet_ns = STRANGER_QUIET.as_nanos() as u64;
                    for since_ns in kernel.unseen(self.sectors()) {
                        assert!(
                            since_ns == u64::MAX || now_ns > since_ns + quiet_ns,
                            "R4: closed at {now_ns} while a write is on its way that was not seen, as the \
                             recorder knows since {since_ns}"
                        );
                    }
                }
                self.tapped(model, None);
                ReadBack::Sleep(now_ns + IDLE_NS)
            }
            ReadBack::Job(mut job) => {
                let has_failed = errors && rng.one_in(50);
                match self.job_step(&mut job, kernel, model, has_failed) {
                    None => ReadBack::Job(job),
                    Some(result) => {
                        let before = self.suspects();
                        match &job.run {
                            Some(run) => self.recorder.run_done(run, result.is_err()),
                            None => self.recorder.suspects_done(job.volume, result.is_ok()),
                        }
                        let after = self.suspects();
                        for block in (0..SECTORS / 8).filter(|block| before & !after & 1 << block != 0) {
                            if result.is_ok() {
                                model.settled(block * 8..block * 8 + 8, job.read_ns);
                            }
                        }
                        if result.is_err() {
                            self.resting_until_ns = now_ns + RETRY_NS;
                        }
                        if job.run.is_none() {
                            ReadBack::Run
                        } else {
                            ReadBack::Suspects
                        }
                    }
                }
            }
        };
    }

    /// As `readback::give_up_lingering`.
    fn give_up_lingering(&mut self, kernel: &Kernel) {
        let last = self.recorder.last_seq();
        let Some(oldest) = self.recorder.oldest_in_flight(DISK) else {
            self.lingering = None;
            return;
        };
        let (since_ns, noted) = *self.lingering.get_or_insert((kernel.now_ns, last));
        if Some(oldest) > noted {
            self.lingering = Some((kernel.now_ns, last));
        } else if kernel.now_ns - since_ns > PLUG_TIME.as_nanos() as u64
            && kernel.writes_in_flight() == 0
            && kernel.consumed == kernel.produced
        {
            self.lingering = None;
            self.recorder.give_up(DISK, noted);
        }
    }

    fn job_step(
        &mut self,
        job: &mut Job,
        kernel: &mut Kernel,
        model: &mut Model,
        has_failed: bool,
    ) -> Option<Result<(), ()>> {
        let is_void = self.recorder.epoch() != job.epoch;
        match job.phase {
            Phase::Drain => {
                if kernel.consumed >= job.target.min(kernel.produced) && job.target != u64::MAX {
                    job.as_of = self.recorder.last_seq();
                    job.began_ns = kernel.now_ns;
                    (job.noted, job.noted_ns) = (job.as_of, kernel.now_ns);
                    job.phase = Phase::Ended(0);
                } else if job.target == u64::MAX {
                    job.target = kernel.produced;
                }
            }
            Phase::Ended(i) => {
                let Some(run) = job.batch.get(i) else {
                    job.phase = Phase::Head;
                    return None;
                };
                let plug_ns = PLUG_TIME.as_nanos() as u64;
                let is_overdue = kernel.now_ns - job.began_ns > FLIGHT_NS_MAX;
                let is_idle = kernel.now_ns - job.noted_ns > plug_ns && kernel.writes_in_flight() == 0;
                let waits = self.planted != Some(Planted::SkipInFlight);
                if waits && self.recorder.in_flight(run, job.as_of).is_some() {
                    match job.idle_target {
                        None if is_idle || is_overdue => job.idle_target = Some((kernel.produced, is_idle)),
                        Some((target, was_idle)) if kernel.consumed >= target => {
                            match was_idle && !is_overdue {
                                true => self.recorder.ended(run, job.noted),
                                false => self.recorder.overdue(run, job.as_of),
                            }
                            (job.noted, job.noted_ns) = (self.recorder.last_seq(), kernel.now_ns);
                            job.idle_target = None;
                        }
                        _ => {}
                    }
                    return is_void.then_some(Err(()));
                }
                job.idle_target = None;
                (job.noted, job.noted_ns) = (job.as_of, kernel.now_ns);
                job.phase = Phase::Ended(i + 1);
                job.began_ns = kernel.now_ns;
            }
            Phase::Head => {
                let is_blank = job.run.as_ref().is_some_and(|run| run.blank);
                if !is_blank && self.store.applied < job.as_of.map_or(0, Seq::get) {
                    return is_void.then_some(Err(()));
                }
                job.applied = self.store.applied;
                job.phase = Phase::Read(0);
            }
            Phase::Read(i) => {
                if has_failed {
                    return Some(Err(()));
                }
                let Some(run) = job.batch.get(i) else {
                    if job.run.is_some() {
                        return Some(Ok(()));
                    }
                    job.phase = Phase::Polls(self.recorder.ask_for_losses());
                    return None;
                };
                job.read_ns = job.read_ns.min(kernel.now_ns);
                let Some(contents) = kernel.volume().get(sectors_of(&run.bytes)) else {
                    return Some(Err(())); // it has become smaller
                };
                if job.run.is_some() {
                    job.record_changed(i, contents.to_vec(), model);
                    job.phase = Phase::Emit;
                } else {
                    job.read.extend_from_slice(contents);
                    job.phase = Phase::Read(i + 1);
                }
            }
            Phase::Polls(polls) => {
                if self.recorder.polls() >= polls {
                    job.phase = Phase::DrainAgain(kernel.produced);
                }
            }
            Phase::DrainAgain(target) => {
                if kernel.consumed >= target {
                    job.correct_changed(model);
                    job.phase = Phase::Emit;
                }
            }
            Phase::Emit => {
                let Some((run, as_of, contents)) = job.to_record.front() else {
                    return job.go_on();
                };
                let data = bytes_of(contents);
                let data = contents.iter().any(|&content| content != 0).then_some(&data[..]);
                let now = BootNs(kernel.now_ns);
                let is_done = if job.run.is_some() {
                    self.recorder.read_back(run, run.bytes.clone(), *as_of, data, now)
                } else {
                    self.recorder.correct(run, *as_of, data, now)
                };
                self.tapped(model, None);
                if is_done {
                    job.to_record.pop_front();
                } else if is_void {
                    return Some(Err(()));
                }
            }
        }
        None
    }
}
