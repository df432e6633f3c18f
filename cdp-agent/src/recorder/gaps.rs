//! When a gap opens, and where it begins: writes that were lost, that failed, or that nobody captured.

use std::ops::Range;

use cdp_journal::format::{Body, GapCause, Origin, RecordFlags};
use cdp_journal::{BootNs, SECTOR_BYTES, Seq};

use super::volume::PendingGap;
use super::{RECENT_TIME, Recorder, State};
use crate::capture::{DiskNumber, Slot};
use crate::inflight::Sectors;
use crate::losses::Losses;

impl Recorder {
    /// A write ended of which we do not have the bytes.
    pub(super) fn unknown(&mut self, disk: DiskNumber, range: Sectors, at: BootNs) {
        for i in 0..self.volumes.len() {
            let volume = &mut self.volumes[i];
            if volume.disk != disk {
                continue;
            }
            let Some(bytes) = volume.clip(range) else { continue };
            volume.mark(bytes);
            volume.unseen.add(at);
            // What was lost may be what ended, but not before it was lost.
            let is_explained = volume.pending.is_some_and(|pending| at >= pending.at);
            if let State::Exact { seq, .. } = volume.state
                && !is_explained
            {
                // It had been on its way while we called the volume exact: that was never true.
                let cause = volume.last_cause;
                self.open_gap(i, cause, seq.prev(), at);
            }
            self.reach_back(i, at);
        }
    }

    /// Captured writes ended: while others are on their way, it may have been those.
    pub(super) fn ended_among_unseen(&mut self, disk: DiskNumber, range: Sectors, at: BootNs) {
        for volume in self.volumes.iter_mut().filter(|volume| volume.disk == disk) {
            if !matches!(volume.state, State::Exact { .. })
                && let Some(bytes) = volume.clip(range)
            {
                volume.unseen.ended(volume.regions_of(&bytes), at);
            }
        }
    }

    pub(super) fn write_failed(
        &mut self,
        disk: DiskNumber,
        range: Sectors,
        last_exact: Option<Seq>,
        at: BootNs,
    ) {
        for i in 0..self.volumes.len() {
            let volume = &mut self.volumes[i];
            if volume.disk != disk {
                continue;
            }
            let Some(bytes) = volume.clip(range) else { continue };
            volume.mark(bytes);
            volume.losses.failed += 1;
            self.open_gap(i, GapCause::IoError, last_exact, at);
        }
    }

    /// What the probe's counters say was lost since the last call, read before the ring is drained. `ring_position`:
    /// when the ring has been emptied to here, everything queued before this call has been seen. `marks`: regions of
    /// the disk (in bytes). `now`: after they were taken, since some may be of losses that are counted later.
    pub(crate) fn losses(
        &mut self,
        slot: Slot,
        losses: Losses,
        first_at: Option<BootNs>,
        now: BootNs,
        ring_position: u64,
        marks: &[Range<u64>],
    ) {
        let Some(number) = self
            .disks
            .iter()
            .find(|disk| disk.slot == slot)
            .map(|disk| disk.number)
        else {
            return;
        };
        let floor = self.recent.front().map_or(now, |&(at, _)| at);
        for i in 0..self.volumes.len() {
            let volume = &mut self.volumes[i];
            if volume.disk != number {
                continue;
            }
            let mut touched = false;
            for mark in marks {
                let range = Sectors {
                    start: mark.start / SECTOR_BYTES,
                    end: mark.end.div_ceil(SECTOR_BYTES),
                };
                if let Some(bytes) = volume.clip(range) {
                    volume.mark(bytes);
                    touched = true;
                }
            }
            if !touched {
                self.begin_before(i, first_at, now);
                continue;
            }
            volume.losses.add(&losses);
            volume.unseen.add(now);
            volume.last_cause = GapCause::RingOverflow;
            if matches!(volume.state, State::Exact { .. }) && volume.pending.is_none() {
                volume.pending = Some(PendingGap {
                    cause: GapCause::RingOverflow,
                    at: first_at.unwrap_or(floor),
                    ring_position,
                });
            }
            if !matches!(self.volumes[i].state, State::Exact { .. }) {
                self.doubt_in_flight(i);
            }
            self.begin_before(i, first_at, now);
        }
    }

    /// Losses are not told in the order in which they were queued, and a mark may be found before its loss is counted: a
    /// gap that waits for its place, or is open, begins before this one too.
    fn begin_before(&mut self, i: usize, first_at: Option<BootNs>, now: BootNs) {
        let before = first_at.and_then(|at| self.last_seq_before(at));
        let volume = &mut self.volumes[i];
        if let (Some(pending), Some(at)) = (&mut volume.pending, first_at) {
            pending.at = pending.at.min(at);
        } else if before.is_some() && !matches!(volume.state, State::Exact { .. }) {
            volume.doubt_since(Some(Seq::after(before)));
        }
        self.reach_back(i, now);
    }

    /// Events were lost, and nobody knows of which disk: since `since`.
    pub(crate) fn everything_unknown(&mut self, since: Option<Seq>, now: BootNs) {
        for i in 0..self.volumes.len() {
            let volume = &mut self.volumes[i];
            volume.mark_all();
            volume.unseen.add(now);
            volume.losses.skipped += 1;
            // A gap that is open may have begun after the first of them.
            volume.doubt_since(Some(Seq::after(since)));
            self.open_gap(i, GapCause::RingOverflow, since, now);
        }
    }

    /// What was written to a disk lately is not known.
    pub(crate) fn disk_unknown(&mut self, disk: DiskNumber, now: BootNs) {
        for i in 0..self.volumes.len() {
            let volume = &mut self.volumes[i];
            if volume.disk == disk {
                volume.mark_all();
                volume.unseen.add(now);
                let last_exact = self.last_seq;
                self.open_gap(i, GapCause::RingOverflow, last_exact, now);
            }
        }
    }

    /// Opens the gaps whose place is reached: a record of time `at` comes next.
    pub(super) fn open_pending_gaps(&mut self, at: BootNs) {
        for i in 0..self.volumes.len() {
            if let Some(pending) = self.volumes[i].pending
                && at >= pending.at
            {
                self.place_gap(i, pending, at);
            }
        }
    }

    fn place_gap(&mut self, i: usize, pending: PendingGap, at: BootNs) {
        self.doubt_in_flight(i);
        self.volumes[i].pending = None;
        let last_exact = self.last_exact_before(i, pending);
        self.open_gap(i, pending.cause, last_exact, at);
    }

    /// What was lost may have told that a write in flight was taken otherwise than it was seen.
    fn doubt_in_flight(&mut self, i: usize) {
        let volume = &mut self.volumes[i];
        let Some(disk) = self.disks.iter().find(|disk| disk.number == volume.disk) else {
            return;
        };
        let oldest = disk.in_flight.oldest_where(volume.sectors(), |range| {
            volume
                .clip(range)
                .is_some_and(|bytes| volume.touches_dirty(&bytes))
        });
        volume.doubt_since(oldest);
    }

    /// The ring has been emptied up to `position`.
    pub(crate) fn drained_to(&mut self, position: u64, now: BootNs) {
        for i in 0..self.volumes.len() {
            if let Some(pending) = self.volumes[i].pending
                && position >= pending.ring_position
            {
                self.place_gap(i, pending, now);
            }
        }
        self.give_up_overdue(now);
    }

    /// The counters showed no loss: what was recorded a while ago will not be doubted by a later one. A bio
    /// is copied within `RECENT_TIME`, so the first chunks of one that is dropped half-way are still here.
    pub(crate) fn no_loss(&mut self) {
        if self.volumes.iter().any(|volume| volume.pending.is_some()) {
            return;
        }
        let oldest = BootNs(self.latest.0.saturating_sub(RECENT_TIME.as_nanos() as u64));
        let old = self.recent.partition_point(|&(time, _)| time < oldest);
        // The last of them stays: it may turn out to be the last exact one.
        self.recent.drain(..old.saturating_sub(1));
    }

    /// The last record before a time; None if that is too long ago to tell.
    pub(super) fn last_seq_before(&self, at: BootNs) -> Option<Seq> {
        let before = self.recent.partition_point(|&(time, _)| time < at);
        before.checked_sub(1).map(|last| self.recent[last].1)
    }

    /// The last record before a loss. Where that is too long ago to tell, all of the exact stretch is in doubt; none
    /// before it, which ended with everything known that had been lost.
    fn last_exact_before(&self, i: usize, pending: PendingGap) -> Option<Seq> {
        let before_stretch = match self.volumes[i].state {
            State::Exact { seq, .. } => seq.prev(),
            State::Seeding | State::Resyncing(_) => None,
        };
        self.last_seq_before(pending.at).or(before_stretch)
    }

    /// When a record was made. Of one that is older than what is kept: the oldest time that is kept, or `now`.
    pub(super) fn time_of(&self, seq: Option<Seq>, now: BootNs) -> BootNs {
        let up_to = self.recent.partition_point(|&(_, other)| Some(other) <= seq);
        let found = self.recent.get(up_to.saturating_sub(1));
        found.map_or(now, |&(at, _)| at.min(now))
    }

    pub(super) fn open_gap(&mut self, i: usize, cause: GapCause, last_exact: Option<Seq>, at: BootNs) {
        // A loss whose place is not reached yet may lie before this one.
        let pending = self.volumes[i].pending;
        if pending.is_some() {
            self.doubt_in_flight(i);
        }
        let last_exact = pending.map_or(last_exact, |pending| {
            last_exact.min(self.last_exact_before(i, pending))
        });
        let volume = &mut self.volumes[i];
        volume.last_cause = cause;
        let State::Exact { seq: exact_from, .. } = volume.state else {
            self.reach_back(i, at);
            return;
        };
        let in_doubt = volume.in_doubt.take().map(Seq::prev);
        let last_exact = in_doubt.map_or(last_exact, |before| before.min(last_exact));
        let last_exact_at = self.time_of(last_exact, at).at_offset(self.wall_offset_ns);
        let volume = &mut self.volumes[i];
        // A gap that reaches back to before the exact stretch began is the one before it, and goes on.
        if last_exact >= Some(exact_from) || volume.inexact_since.is_none() {
            volume.inexact_since = Some(last_exact_at);
        }
        volume.gap_from = last_exact;
        volume.state = State::Resyncing(cause);
        volume.dirty_at_start = volume.dirty.len();
        volume.gaps += 1;
        volume.pending = None;
        let (id, name) = (volume.id, volume.name.clone());
        let body = Body::GapOpen { cause, last_exact };
        let seq = self.push(at, Some(id), Origin::default(), RecordFlags::default(), body, &[]);
        tracing::warn!(volume = %name, %cause, seq = seq.get(), last_exact = last_exact.map(Seq::get), "gap opened");
    }

    /// A gap that is open begins earlier than was said, if a write before it came to be in doubt.
    pub(super) fn reach_back(&mut self, i: usize, at: BootNs) {
        let volume = &mut self.volumes[i];
        if matches!(volume.state, State::Exact { .. }) {
            return;
        }
        let Some(first) = volume
            .in_doubt
            .take()
            .filter(|&first| Some(first) <= volume.gap_from)
        else {
            return;
        };
        volume.gap_from = first.prev();
        let body = Body::GapOpen {
            cause: volume.last_cause,
            last_exact: first.prev(),
        };
        let (id, name) = (volume.id, volume.name.clone());
        self.push(at, Some(id), Origin::default(), RecordFlags::default(), body, &[]);
        tracing::warn!(volume = %name, last_exact = first.prev().map(Seq::get), "the gap began earlier");
    }
}
