//! Events of the probe → records, and everything that is decided on the way: what is in flight, what must be
//! read back, when a gap opens and when it closes.
//!
//! No clock, no device, no thread: times and events come in, frames go out. The threads in `pipeline` and
//! `readback` only ask.
//!
//! Always true:
//! - R1: records leave in the order of their Seq, and an event's record has the event's time.
//! - R2: a volume that is not `Exact` has an open gap in its history (or was never exact).
//! - R3: a block that the disk may have taken otherwise than it was seen is compared with the device; where it
//!   differs, the record that wrote it is corrected.
//! - R4: a gap closes only when nothing of the volume is dirty or being read, and no write that we did not
//!   capture can still be on its way.

mod compare;
mod declared;
mod end;
mod full;
mod gaps;
#[cfg(test)]
mod sim;
mod size;
mod suspects;
#[cfg(test)]
mod tests;
mod unseen;
mod volume;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use cdp_ebpf::event::{CompleteEvent, FLAG_FUA, FLAG_PREFLUSH, FLAG_SYNC, Op, WriteEvent};
use cdp_journal::format::{Body, FrameBuilder, GapCause, Origin, RecordFlags};
use cdp_journal::{BootNs, SECTOR_BYTES, Seq, VolumeId, WallNs};

use crate::capture::{DiskNumber, RingPosition, Slot};
use crate::event::Event;
use crate::inflight::{InFlight, Sectors, WholeBio};
use crate::losses::LossCounts;
use crate::regions::Regions;
use declared::Declared;
pub(crate) use end::End;
pub(crate) use suspects::SUSPECT_BLOCKS_MAX;
use suspects::Suspects;
use unseen::Unseen;
pub(crate) use volume::{NewVolume, State, VolumeRun};

/// A frame is sealed when it holds this much, so that a chunk still fits.
pub(crate) const FRAME_BYTES_SEAL: usize = 1 << 20;
/// Sealed frames that wait for the encoder before the ring is left alone.
const SEALED_MAX: usize = 4;
/// Times of recent records, kept to place the beginning of a gap.
const RECENT_MAX: usize = 1 << 16;
/// For how long they are kept at least, if they are not too many.
const RECENT_TIME: Duration = Duration::from_secs(1);
/// A write that we did not capture and that shows no sign for this long is taken to have ended. If it ends
/// later all the same, its region is read again and the gap reaches back.
const STRANGER_QUIET: Duration = Duration::from_secs(3);
/// The disk's own count of writes in flight says nothing about bios that wait in a task's plug; those are
/// handed on within this time.
pub(crate) const PLUG_TIME: Duration = Duration::from_millis(100);

/// How long a write is waited for whose end was not seen.
pub(crate) const FLIGHT_TIME_MAX: Duration = Duration::from_secs(10);
/// Writes that were given up are remembered for about so long.
const MEMORY_TIME: Duration = Duration::from_secs(60);

/// Idle times are covered by ticks: after a write at least this long apart, then ever more seldom, so that
/// what is not covered yet is at most a quarter of the idle time.
const TICK_MIN: Duration = Duration::from_millis(50);
/// And at the latest after this long.
const TICK_MAX: Duration = Duration::from_secs(1);

const _: () = assert!(
    FRAME_BYTES_SEAL + cdp_ebpf::event::CHUNK_BYTES as usize <= cdp_journal::format::FRAME_DATA_BYTES_MAX
);

#[derive(Debug)]
struct DiskRun {
    number: DiskNumber,
    slot: Slot,
    /// Its driver completes whole bios rather than requests.
    bio_based: bool,
    in_flight: InFlight,
    /// The bio whose chunks are coming in.
    open_bio: Option<u64>,
}

impl DiskRun {
    /// The bio that a chunk belongs to, if its driver completes whole bios.
    fn whole_bio(&mut self, write: &WriteEvent) -> Option<WholeBio> {
        let first = self.open_bio != Some(write.bio);
        self.open_bio = (write.last == 0).then_some(write.bio);
        self.bio_based.then_some(WholeBio {
            address: write.bio,
            first,
            last: write.last != 0,
        })
    }
}

/// A frame ready to be encoded.
#[derive(Debug)]
pub(crate) struct Sealed {
    pub(crate) builder: FrameBuilder,
    pub(crate) wall_offset_ns: i64,
    pub(crate) epoch: Epoch,
    /// All events before this position in the ring are in this frame or an earlier one.
    pub(crate) position: RingPosition,
    /// Time of its first record.
    pub(crate) begun: BootNs,
}

/// Goes up when the store filled up: frames and reads of an older epoch are void, their Seqs are given anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Epoch(pub(crate) u64);

/// Regions to read back, decided by [`Recorder::take_run`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) volume: VolumeId,
    pub(crate) bytes: Range<u64>,
    /// Zeroes need no record.
    pub(crate) blank: bool,
    pub(crate) epoch: Epoch,
}

/// Blocks to compare with the device, decided by [`Recorder::take_suspects`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Suspicion {
    pub(crate) volume: VolumeId,
    pub(crate) ranges: Vec<Range<u64>>,
    pub(crate) epoch: Epoch,
}

/// A mark of what was suspect at some time: see [`Recorder::suspicions`].
#[derive(Clone, Debug)]
pub(crate) struct SuspicionMark(Vec<(VolumeId, u64)>);

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Recorder {
    builder: FrameBuilder,
    opened_at: Option<BootNs>,
    sealed: VecDeque<Sealed>,
    last_seq: Option<Seq>,
    latest: BootNs,
    recent: VecDeque<(BootNs, Seq)>,
    wall_offset_ns: i64,
    declared: Declared,
    volumes: Vec<VolumeRun>,
    disks: Vec<DiskRun>,
    epoch: Epoch,
    /// The store takes no more: events are counted as dropped until there is room.
    full: bool,
    last_write: BootNs,
    /// Whose suspects are compared next, by its place among the volumes.
    suspects_turn: usize,
    /// The last record, each time that [`Recorder::give_up_overdue`] looked: next at `overdue_at`.
    overdue: VecDeque<Option<Seq>>,
    overdue_at: BootNs,
    /// The oldest write that came to be in doubt since [`Recorder::take_reopened`].
    reopened: Option<Seq>,
    /// How often the probe's counters were looked at.
    polls: u64,
    are_losses_asked_for: bool,
    /// Behind the last event that was recorded whole.
    position: RingPosition,
    /// An event is being recorded: frames are sealed behind it, if it fits.
    is_in_event: bool,
    /// Every record with its data, for the simulator.
    #[cfg(test)]
    tap: Vec<(Seq, BootNs, Body, Vec<u8>)>,
}

impl Recorder {
    /// Goes on after `last_seq`.
    pub(crate) fn new(last_seq: Option<Seq>, wall_offset_ns: i64) -> Self {
        Self {
            builder: FrameBuilder::new(Seq::after(last_seq)),
            opened_at: None,
            sealed: VecDeque::new(),
            last_seq,
            latest: BootNs(0),
            recent: VecDeque::new(),
            wall_offset_ns,
            declared: Declared::default(),
            volumes: Vec::new(),
            disks: Vec::new(),
            epoch: Epoch::default(),
            full: false,
            last_write: BootNs(0),
            suspects_turn: 0,
            overdue: VecDeque::new(),
            overdue_at: BootNs(0),
            reopened: None,
            polls: 0,
            are_losses_asked_for: false,
            position: RingPosition::default(),
            is_in_event: false,
            #[cfg(test)]
            tap: Vec::new(),
        }
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub(crate) fn is_full(&self) -> bool {
        self.full
    }

    pub(crate) fn volumes(&self) -> &[VolumeRun] {
        &self.volumes
    }

    pub(crate) fn last_seq(&self) -> Option<Seq> {
        self.last_seq
    }

    /// The newest sample of the wall clock's distance from boot time; frames sealed from now on carry it.
    pub(crate) fn set_wall_offset(&mut self, wall_offset_ns: i64) {
        self.wall_offset_ns = wall_offset_ns;
    }

    /// The ring is read from `position` on: what lies before is in the log, or nobody's.
    pub(crate) fn read_from(&mut self, position: RingPosition) {
        self.position = position;
    }

    /// Events that come next may be no later than those that another agent recorded before: up to `last_seq`, at
    /// `latest`.
    pub(crate) fn resume_after(&mut self, latest: BootNs) {
        self.latest = latest;
        self.recent.extend(self.last_seq.map(|last| (latest, last)));
    }

    /// Adds a disk before it is watched.
    pub(crate) fn add_disk(&mut self, number: DiskNumber, slot: Slot, bio_based: bool) {
        if self.disks.iter().all(|disk| disk.number != number) {
            self.disks.push(DiskRun {
                number,
                slot,
                bio_based,
                in_flight: InFlight::default(),
                open_bio: None,
            });
        }
    }

    /// Adds a volume before it is watched: all of it has to be read. Or one that has been watched since it was last
    /// exact.
    pub(crate) fn add_volume(&mut self, new: NewVolume, now: BootNs) {
        let regions = new.bytes.div_ceil(new.region_bytes);
        let mut dirty = Regions::new(regions);
        if new.exact.is_none() {
            dirty.insert_all();
        }
        let mut blank = Regions::new(regions);
        if new.blank {
            blank.insert_all();
        }
        self.volumes.push(VolumeRun {
            id: new.id,
            name: new.name,
            path: new.path,
            disk: new.disk,
            start_sector: new.start_sector,
            bytes: new.bytes,
            size_seen: self.last_seq,
            state: match (new.exact, new.cause) {
                (Some((since, seq)), _) => State::Exact { since, seq },
                (None, Some(cause)) => State::Resyncing(cause),
                (None, None) => State::Seeding,
            },
            captured_writes: 0,
            captured_bytes: 0,
            losses: LossCounts::default(),
            gaps: new.gaps,
            inexact_since: new.inexact_since,
            read_bytes: 0,
            suspects: Suspects::default(),
            compared_blocks: 0,
            corrected_blocks: 0,
            region_bytes: new.region_bytes,
            dirty_at_start: dirty.len(),
            dirty,
            blank,
            reading: None,
            attached: new.exact.is_some(),
            unseen: Unseen::new(regions, now),
            pending: None,
            gap_from: new.last_exact,
            in_doubt: None,
            last_cause: new.cause.unwrap_or(GapCause::AgentDown),
        });
    }

    /// The probe watches these volumes of a disk from before `now` on.
    pub(crate) fn attached(&mut self, disk: DiskNumber, now: BootNs) {
        for volume in self
            .volumes
            .iter_mut()
            .filter(|volume| volume.disk == disk && !volume.attached)
        {
            volume.attached = true;
            volume.unseen.add(now);
        }
    }

    /// An agent before this one recorded this write so long ago, and may not have seen its end: nor whether the disk took
    /// it as it was seen. In their order, before anything else is recorded.
    ///
    /// What that agent would have given up is given up as soon as the ring has been emptied once, and what it would have
    /// forgotten is only compared. Or agents that live for a short time each would hand on ever more writes.
    pub(crate) fn recorded_before(&mut self, volume: VolumeId, bytes: &Range<u64>, seq: Seq, age: Duration) {
        let Some(volume) = self.volumes.iter().find(|known| known.id == volume) else {
            return;
        };
        let range = Sectors {
            start: volume.start_sector + bytes.start / SECTOR_BYTES,
            end: volume.start_sector + bytes.end.div_ceil(SECTOR_BYTES),
        };
        let (number, at) = (volume.disk, self.latest);
        if age > MEMORY_TIME {
            return self.suspect_since(number, range, seq, at);
        }
        for disk in self.disks.iter_mut().filter(|disk| disk.number == number) {
            disk.in_flight.queued(range, seq, None);
        }
        self.suspect(number, range, at);
        if age > FLIGHT_TIME_MAX {
            self.overdue = VecDeque::from([Some(seq)]);
        }
    }

    /// No write before this Seq is in flight, or in doubt.
    pub(crate) fn unsettled(&self) -> Seq {
        let in_flight = self
            .disks
            .iter()
            .filter_map(|disk| disk.in_flight.oldest_of_all());
        let in_doubt = self.volumes.iter().filter_map(VolumeRun::oldest_in_doubt);
        in_flight
            .chain(in_doubt)
            .min()
            .unwrap_or(Seq::after(self.last_seq))
    }

    /// The oldest write that came to be in doubt since the last call: [`Recorder::unsettled`] may have said that it was
    /// not.
    pub(crate) fn take_reopened(&mut self) -> Option<Seq> {
        self.reopened.take()
    }

    /// Does the log, which holds everything up to `appended`, say that all volumes of the disk (of all disks) are
    /// exact?
    pub(crate) fn is_settled(&self, disk: Option<DiskNumber>, appended: Option<Seq>) -> bool {
        let mut volumes = self
            .volumes
            .iter()
            .filter(|volume| disk.is_none_or(|disk| volume.disk == disk));
        !self.full
            && volumes.all(|volume| {
                volume.pending.is_none()
                    && matches!(volume.state, State::Exact { seq, .. } if Some(seq) <= appended)
            })
    }

    /// One event of the ring, and the position behind it.
    pub(crate) fn event(&mut self, event: &Event<'_>, behind: RingPosition) {
        self.is_in_event = true;
        self.record(event);
        self.is_in_event = false;
        self.position = behind;
        self.seal_if_large();
    }

    fn record(&mut self, event: &Event<'_>) {
        if !self.full {
            self.open_pending_gaps(event.at());
        }
        match event {
            Event::Write(write, data) => self.write(write, data),
            Event::Complete(complete) => self.complete(complete),
            Event::Changed(changed) => self.changed(changed),
        }
    }

    fn write(&mut self, write: &WriteEvent, data: &[u8]) {
        let Some(disk) = self.disks.iter().position(|disk| disk.number.0 == write.disk) else {
            return;
        };
        let at = BootNs(write.boot_ns);
        self.last_write = self.last_write.max(at);
        if self.full {
            self.drop_while_full(write);
            return;
        }
        let origin = Origin {
            pid: write.pid,
            comm: write.comm,
        };
        let flags = flags_of(write.flags);
        let range = Sectors {
            start: write.sector,
            end: write.sector + u64::from(write.bytes) / SECTOR_BYTES,
        };
        let mut seq = None;
        for i in 0..self.volumes.len() {
            let volume = &mut self.volumes[i];
            if volume.disk.0 != write.disk {
                continue;
            }
            let id = Some(volume.id);
            if write.op == Op::Flush as u8 {
                self.push(at, id, origin, flags, Body::Barrier, &[]);
                continue;
            }
            let Some(bytes) = volume.clip(range) else { continue };
            volume.captured_writes += u64::from(write.last);
            volume.captured_bytes += bytes.end - bytes.start;
            volume.suspects.written(&bytes);
            let (offset, len) = (bytes.start, bytes.end - bytes.start);
            let body = match Op::from_code(write.op) {
                Some(Op::Zero) => Body::Zero { offset, len },
                Some(Op::Discard) => Body::Discard { offset, len },
                _ => Body::Write { offset, len },
            };
            let skipped = (volume.start_sector.saturating_sub(range.start) * SECTOR_BYTES) as usize;
            let data = data
                .get(skipped..skipped + body.data_bytes() as usize)
                .unwrap_or_default();
            seq = Some(self.push(at, id, origin, flags, body, data));
        }
        let disk = &mut self.disks[disk];
        let whole_bio = disk.whole_bio(write);
        let number = disk.number;
        if let Some(seq) = seq
            && disk.in_flight.queued(range, seq, whole_bio)
        {
            self.suspect(number, range, at);
        }
    }

    fn complete(&mut self, complete: &CompleteEvent) {
        let Some(disk) = self.disks.iter_mut().find(|disk| disk.number.0 == complete.disk) else {
            return;
        };
        let range = Sectors {
            start: complete.sector,
            end: complete.sector + u64::from(complete.bytes).div_ceil(SECTOR_BYTES),
        };
        let at = BootNs(complete.boot_ns);
        // Which of several writes to one place failed is not told.
        let oldest = disk.in_flight.oldest_ever(range);
        let ended = if complete.whole_bio != 0 {
            disk.in_flight.bio_ended(complete.bio, range)
        } else {
            disk.in_flight.range_ended(range)
        };
        let number = disk.number;
        if complete.whole_bio == 0 && !ended.writes.is_empty() {
            self.ended_among_unseen(number, range, at);
        }
        for (range, seq) in ended.late {
            self.suspect_since(number, range, seq, at);
        }
        for stranger in ended.strangers {
            self.unknown(number, stranger, at);
        }
        if let Some(range) = ended.doubtful {
            self.doubt(number, range, at);
        }
        if complete.failed != 0 {
            let first = ended.writes.iter().copied().chain(oldest).min();
            let last_exact = first.and_then(Seq::prev);
            let ranges = if ended.ranges.is_empty() {
                vec![range]
            } else {
                ended.ranges
            };
            for range in ranges {
                self.write_failed(number, range, last_exact, at);
            }
        }
    }

    /// Chooses what to read back next: the first volume with something dirty, at most `bytes_max` of it.
    pub(crate) fn take_run(&mut self, bytes_max: u64, may: impl Fn(VolumeId) -> bool) -> Option<Run> {
        if self.full {
            return None;
        }
        // Bytes read before the gap has its place among the records would count as of its last exact moment.
        let ready = |volume: &&mut VolumeRun| {
            volume.attached
                && may(volume.id)
                && !volume.dirty.is_empty()
                && volume.reading.is_none()
                && volume.pending.is_none()
        };
        let volume = self.volumes.iter_mut().find(ready)?;
        let mut run = volume.dirty.take_run((bytes_max / volume.region_bytes).max(1))?;
        let blank = volume.blank.contains(run.start);
        if let Some(other) = run.clone().find(|&region| volume.blank.contains(region) != blank) {
            for region in other..run.end {
                volume.dirty.insert(region);
            }
            run.end = other;
        }
        for region in run.clone() {
            volume.blank.remove(region);
        }
        let bytes = run.start * volume.region_bytes..(run.end * volume.region_bytes).min(volume.bytes);
        volume.reading = Some(run);
        Some(Run {
            volume: volume.id,
            bytes,
            blank,
            epoch: self.epoch,
        })
    }

    /// A write up to `last` to these bytes of a volume that is still in flight.
    pub(crate) fn in_flight(&self, run: &Run, last: Option<Seq>) -> Option<(Sectors, Seq)> {
        let volume = self.volumes.iter().find(|volume| volume.id == run.volume)?;
        let range = Sectors {
            start: volume.start_sector + run.bytes.start / SECTOR_BYTES,
            end: volume.start_sector + run.bytes.end.div_ceil(SECTOR_BYTES),
        };
        self.disks.iter().find_map(|disk| {
            disk.in_flight
                .find(range, last)
                .filter(|_| disk.number == volume.disk)
        })
    }

    /// Writes up to `last` to the disk of this run have ended, whatever the probe saw: the disk counts none any more.
    pub(crate) fn ended(&mut self, run: &Run, last: Option<Seq>) {
        if let Some(volume) = self.volumes.iter().find(|volume| volume.id == run.volume) {
            self.give_up(volume.disk, last);
        }
    }

    /// Writes up to `last` to the disk of this run are not waited for any longer.
    pub(crate) fn overdue(&mut self, run: &Run, last: Option<Seq>) {
        if let Some(volume) = self.volumes.iter().find(|volume| volume.id == run.volume) {
            self.give_up_overdue_on(volume.disk, last);
        }
    }

    /// Adds what was read of the device: `None` for zeroes. False if there is no room just now.
    pub(crate) fn read_back(
        &mut self,
        run: &Run,
        bytes: Range<u64>,
        as_of: Option<Seq>,
        data: Option<&[u8]>,
        now: BootNs,
    ) -> bool {
        if self.full || run.epoch != self.epoch {
            // Void: the regions are dirty again, and will be read again.
            return true;
        }
        if !self.has_room() {
            return false;
        }
        let (offset, len) = (bytes.start, bytes.end - bytes.start);
        let body = match data {
            Some(_) => Body::ReadBack { offset, len, as_of },
            None => Body::ReadBackZero { offset, len, as_of },
        };
        self.push(
            now,
            Some(run.volume),
            Origin::default(),
            RecordFlags::default(),
            body,
            data.unwrap_or_default(),
        );
        true
    }

    /// A run was read; or it failed, and must be read again.
    pub(crate) fn run_done(&mut self, run: &Run, failed: bool) {
        let Some(i) = self.volumes.iter().position(|volume| volume.id == run.volume) else {
            return;
        };
        let volume = &mut self.volumes[i];
        volume.reading = None;
        if failed || run.epoch != self.epoch {
            volume.mark(run.bytes.clone());
            if !self.full {
                self.reach_back(i, self.latest);
            }
        } else {
            volume.read_bytes += run.bytes.end - run.bytes.start;
        }
    }

    /// Volumes that would be exact if nothing unknown is on its way to their disk any more.
    pub(crate) fn waiting_to_close(&self) -> Vec<(VolumeId, DiskNumber)> {
        let waits = |volume: &&VolumeRun| {
            !matches!(volume.state, State::Exact { .. })
                && volume.attached
                && volume.dirty.is_empty()
                && volume.reading.is_none()
                && volume.pending.is_none()
                && !self.full
        };
        self.volumes
            .iter()
            .filter(waits)
            .map(|volume| (volume.id, volume.disk))
            .collect()
    }

    /// Closes a gap if R4 allows. The ring has been drained since the last read-back.
    /// `idle_at`: a time at which the disk itself counted no write in flight, if there was one.
    pub(crate) fn try_close(&mut self, id: VolumeId, idle_at: Option<BootNs>, now: BootNs) -> bool {
        if !self.waiting_to_close().iter().any(|&(waiting, _)| waiting == id) {
            return false;
        }
        let Some(i) = self.volumes.iter().position(|volume| volume.id == id) else {
            return false;
        };
        let volume = &mut self.volumes[i];
        if !volume.unseen.is_over(idle_at, now) {
            return false;
        }
        while let Some(regions) = volume.unseen.take_stolen() {
            volume.mark_regions(regions);
        }
        if !volume.dirty.is_empty() {
            self.reach_back(i, now);
            return false;
        }
        let name = volume.name.clone();
        let (seq, since) = self.note_at_once(now, Some(id), Body::GapClose);
        if let Some(volume) = self.volumes.iter_mut().find(|volume| volume.id == id) {
            volume.state = State::Exact { since, seq };
        }
        tracing::info!(volume = %name, seq = seq.get(), "protected");
        true
    }

    /// A record that concerns no write: a start, a bookmark, a tick.
    pub(crate) fn note(&mut self, now: BootNs, volume: Option<VolumeId>, body: Body) -> Seq {
        self.push(now, volume, Origin::default(), RecordFlags::default(), body, &[])
    }

    /// The same, no earlier than any record before it, and last in its frame: its time in the log is known now.
    pub(crate) fn note_at_once(
        &mut self,
        now: BootNs,
        volume: Option<VolumeId>,
        body: Body,
    ) -> (Seq, WallNs) {
        let at = now.max(self.latest);
        let seq = self.note(at, volume, body);
        self.seal();
        (seq, at.at_offset(self.wall_offset_ns))
    }

    fn push(
        &mut self,
        at: BootNs,
        volume: Option<VolumeId>,
        origin: Origin,
        flags: RecordFlags,
        body: Body,
        data: &[u8],
    ) -> Seq {
        if !self.builder.fits(data.len()) {
            self.seal();
        }
        self.declared.note(self.builder.next_seq(), volume, &body);
        #[cfg(test)]
        self.tap
            .push((self.builder.next_seq(), at, body.clone(), data.to_vec()));
        let pushed = self
            .builder
            .push(at, volume, origin, flags, body.clone(), &[data])
            .or_else(|_| {
                // Names and labels have a bound of their own in a frame: a new one takes them.
                self.seal();
                self.builder.push(at, volume, origin, flags, body, &[data])
            });
        let seq = match pushed {
            Ok(seq) => seq,
            Err(error) => {
                // Only a record that is wrong by itself gets here. Its place is kept, so that the volume's
                // history shows that something is missing.
                tracing::error!(%error, "a record could not be encoded");
                self.replace_by_gap(at, volume)
            }
        };
        self.last_seq = Some(seq);
        self.opened_at.get_or_insert(at);
        self.latest = self.latest.max(at);
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back((self.latest, seq));
        self.seal_if_large();
        seq
    }

    fn seal_if_large(&mut self) {
        if self.builder.raw_bytes() >= FRAME_BYTES_SEAL && !self.is_in_event {
            self.seal();
        }
    }

    fn replace_by_gap(&mut self, at: BootNs, volume: Option<VolumeId>) -> Seq {
        let body = Body::GapOpen {
            cause: GapCause::RingOverflow,
            last_exact: self.last_seq,
        };
        let none = (Origin::default(), RecordFlags::default());
        self.builder
            .push(at, volume, none.0, none.1, body, &[])
            .unwrap_or_else(|_| self.builder.next_seq())
    }

    fn seal(&mut self) {
        if self.builder.is_empty() {
            return;
        }
        let next = FrameBuilder::new(self.builder.next_seq());
        let builder = std::mem::replace(&mut self.builder, next);
        let begun = self.opened_at.take().unwrap_or(self.latest);
        self.sealed.push_back(Sealed {
            builder,
            wall_offset_ns: self.wall_offset_ns,
            epoch: self.epoch,
            position: self.position,
            begun,
        });
    }

    /// Time of the oldest record that is in no frame that was taken.
    pub(crate) fn oldest_here(&self) -> Option<WallNs> {
        let sealed = self.sealed.front().map(|sealed| sealed.begun);
        sealed.or(self.opened_at).map(|begun| self.wall_of(begun))
    }

    /// What the wall clock said then, by how far apart the clocks are now.
    pub(crate) fn wall_of(&self, at: BootNs) -> WallNs {
        at.at_offset(self.wall_offset_ns)
    }

    /// Seals the frame under construction if it is older than `age_max`.
    pub(crate) fn seal_if_older(&mut self, now: BootNs, age_max: Duration) {
        if self
            .opened_at
            .is_some_and(|at| now.0.saturating_sub(at.0) >= age_max.as_nanos() as u64)
        {
            self.seal();
        }
    }

    /// The next frame to encode.
    pub(crate) fn take_sealed(&mut self) -> Option<Sealed> {
        self.sealed.pop_front()
    }

    /// May more be drained? If not, the ring holds what comes.
    pub(crate) fn has_room(&self) -> bool {
        self.sealed.len() < SEALED_MAX
    }

    /// Records that the time up to `now` is covered, if it is time to say so. The ring was found empty after
    /// `now`.
    pub(crate) fn tick(&mut self, now: BootNs) {
        let since = |then: BootNs| Duration::from_nanos(now.0.saturating_sub(then.0));
        let interval = (since(self.last_write) / 4).clamp(TICK_MIN, TICK_MAX);
        if !self.full && since(self.latest) >= interval {
            self.note(now, None, Body::Tick);
        }
    }
}

fn flags_of(flags: u8) -> RecordFlags {
    [
        (FLAG_PREFLUSH, RecordFlags::PREFLUSH),
        (FLAG_FUA, RecordFlags::FUA),
        (FLAG_SYNC, RecordFlags::SYNC),
    ]
    .into_iter()
    .filter(|(bit, _)| flags & bit != 0)
    .fold(RecordFlags::default(), |all, (_, flag)| all.with(flag))
}
