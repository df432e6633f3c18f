//! The capture thread: from the ring to sealed frames.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cdp_journal::format::Body;
use cdp_journal::{BootNs, Seq};
use crossbeam_channel::{Receiver, Sender};
use rustix::event::{Timespec, epoll};

use super::{Request, Shared, StoreChange};
use crate::capture::{DiskNumber, NextUnsettled, Probe, Slot, WatchedDisk};
use crate::clock;
use crate::event::Event;
use crate::losses::Losses;
use crate::recorder::{Recorder, Sealed};

/// Events taken from the ring before the lock is given up.
const EVENTS_PER_TURN: usize = 64;
/// How long the capture thread sleeps at most: others wait for it, such as who asks for the counters or the ring's end.
const NAP_MAX: Duration = Duration::from_millis(20);
/// How often it looks whether the log has what waits for it.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);
/// What was repaired last is noted before the end, if the log is not slower than this.
const STOP_NOTE_WAIT_MAX: Duration = Duration::from_millis(200);
/// How often the kernel is asked for skipped events.
const MISSES_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is noted for the agent after this one what is settled.
const NOTES_INTERVAL: Duration = Duration::from_millis(50);

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
    unsettled: NextUnsettled,
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
            unsettled: NextUnsettled::default(),
        })
    }

    pub(super) fn run(
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
                        self.unsettled.forget();
                        shared.none_on_its_way_from(next);
                        recorder.store_full(next, epoch, now);
                    }
                    Some(StoreChange::Room) => recorder.room_again(now),
                    None => {}
                }
                self.poll_losses(&mut recorder);
                self.note(shared, &recorder);
            }
            self.probe.release(shared.appended_position());
            let (events, empty) = self.drain(shared, to_encode, target)?;
            let mut recorder = shared.recorder.lock();
            recorder.drained_to(self.probe.positions().consumed(), now);
            if self.probe.positions().consumed() >= target {
                shared.drained_at_ns.store(now.0, Ordering::SeqCst);
            }
            if empty {
                recorder.tick(now);
            }
            let unkept = self.probe.positions().consumed() - shared.appended_position().0;
            let hurries = shared.hurries.swap(false, Ordering::SeqCst);
            // What there is goes into one frame before a nap, unless there is time for what comes during the nap.
            // Asked once: it follows the disk.
            let gather = shared.gather_interval();
            let nap_max = gather.min(NAP_MAX);
            let age_max = if stopping || hurries || unkept > self.probe.ring_bytes() / 4 {
                Duration::ZERO
            } else if empty {
                gather - nap_max
            } else {
                gather
            };
            recorder.seal_if_older(clock::boot_ns(), age_max);
            drop(recorder);
            self.forward(shared, to_encode)?;
            // What was queued before the stop is recorded; others may never stop writing.
            if stopping {
                let mut recorder = shared.recorder.lock();
                recorder.note(clock::boot_ns(), None, Body::Stop);
                recorder.seal_if_older(clock::boot_ns(), Duration::ZERO);
                let last = recorder.last_seq();
                drop(recorder);
                self.forward(shared, to_encode)?;
                let begun = Instant::now();
                while shared.appended() < last && begun.elapsed() < STOP_NOTE_WAIT_MAX {
                    self.sleep(LOOK_INTERVAL);
                }
                self.note(shared, &shared.recorder.lock());
                return Ok(());
            }
            if empty {
                // The kernel wakes it earlier when a quarter of the ring waits. What of the ring is recorded is given back
                // once the log has it, and soon where that is much.
                let unkept = self.probe.positions().consumed() - shared.appended_position().0;
                let nap = if unkept > self.probe.ring_bytes() / 8 {
                    LOOK_INTERVAL
                } else if events > 0 {
                    nap_max
                } else {
                    NAP_MAX.min(shared.commit_interval())
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

    fn poll_losses(&mut self, recorder: &mut Recorder) {
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
                clock::boot_ns(),
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
                        // Some may have been skipped since the counters were read.
                        recorder.everything_unknown(self.misses_seq, clock::boot_ns());
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

    /// Notes for the agent after this one what it need not care about. What is repaired is noted at once: who was told that
    /// a volume is protected may end the agent in the next moment.
    fn note(&mut self, shared: &Shared, recorder: &Recorder) {
        let (notes, appended) = (self.probe.notes(), shared.appended());
        for (&disk, watched) in &mut self.watched {
            if !watched.is_settled && recorder.is_settled(Some(disk), appended) {
                notes.settle(watched.slot, watched.seen);
                watched.is_settled = true;
            }
        }
        if notes.misses() != self.misses && recorder.is_settled(None, appended) {
            notes.set_misses(self.misses);
        }
        let is_awaited = shared.awaits_note.swap(false, Ordering::SeqCst);
        if !is_awaited && self.noted_at.elapsed() < NOTES_INTERVAL {
            return;
        }
        self.noted_at = Instant::now();
        let look = || (recorder.unsettled(), recorder.last_seq());
        if let Some((first, last)) = self.unsettled.take(appended, look) {
            notes.set_unsettled(first);
            shared.noted.store(last.map_or(0, Seq::get), Ordering::SeqCst);
        }
    }

    /// Hands sealed frames to the encoder. Waits while it is busy: the ring takes what comes meanwhile.
    fn forward(&mut self, shared: &Shared, to_encode: &Sender<Sealed>) -> anyhow::Result<()> {
        loop {
            let (sealed, reopened) = {
                let mut recorder = shared.recorder.lock();
                let sealed = recorder.take_sealed();
                sealed.iter().for_each(|sealed| shared.on_its_way(sealed));
                (sealed, recorder.take_reopened())
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
        self.unsettled.reopen(reopened);
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
            tv_sec: nap.as_secs() as i64,
            tv_nsec: i64::from(nap.subsec_nanos()),
        };
        let mut events = Vec::with_capacity(1);
        let _ = epoll::wait(
            &self.alarm,
            rustix::buffer::spare_capacity(&mut events),
            Some(&timeout),
        );
    }
}
