//! The recorder's part in comparing blocks with the device: what becomes a suspect, what is compared next, and
//! what its outcome corrects. The set itself is in `suspects`, the reading in `readback`.

use std::time::Duration;

use cdp_ebpf::event::CompleteEvent;
use cdp_journal::format::GapCause;
use cdp_journal::{BLOCK_BYTES, BootNs, SECTOR_BYTES, Seq, VolumeId};

use super::{
    DiskRun, FLIGHT_TIME_MAX, MEMORY_TIME, Recorder, Run, State, Suspicion, SuspicionMark, VolumeRun,
};
use crate::capture::DiskNumber;
use crate::inflight::Sectors;

/// For this long after the last sign of a write that we did not capture, a split of a bio is taken for another.
const DOUBT_TIME: Duration = Duration::from_secs(30);

const GIVEN_UP_KEPT: usize = (MEMORY_TIME.as_secs() / FLIGHT_TIME_MAX.as_secs()) as usize;

impl Recorder {
    /// Pages were changed while they were written. The event stands before the one of their completion.
    pub(super) fn changed(&mut self, changed: &CompleteEvent) {
        let Some(disk) = self.disks.iter().find(|disk| disk.number.0 == changed.disk) else {
            return;
        };
        let number = disk.number;
        let ranges = if changed.whole_bio != 0 {
            disk.in_flight.ranges_of_bio(changed.bio)
        } else {
            vec![Sectors {
                start: changed.sector,
                end: changed.sector + u64::from(changed.bytes).div_ceil(SECTOR_BYTES),
            }]
        };
        for range in ranges {
            self.suspect(number, range, BootNs(changed.boot_ns));
        }
    }

    /// The disk may hold other bytes here than were captured.
    pub(super) fn suspect(&mut self, disk: DiskNumber, range: Sectors, at: BootNs) {
        let known = self.disks.iter().find(|known| known.number == disk);
        // A write that was never captured is in a dirty region, and no record is in doubt.
        if let Some(since) = known.and_then(|disk| disk.in_flight.oldest_ever(range)) {
            self.suspect_since(disk, range, since, at);
        }
    }

    /// As [`Recorder::suspect`], where no write before `since` is in doubt.
    pub(super) fn suspect_since(&mut self, disk: DiskNumber, range: Sectors, since: Seq, at: BootNs) {
        for i in 0..self.volumes.len() {
            let volume = &mut self.volumes[i];
            if volume.disk != disk {
                continue;
            }
            let Some(bytes) = volume.clip(range) else { continue };
            self.reopened = self.reopened.into_iter().chain([since]).min();
            let to_compare = volume.outside_dirty(&bytes);
            // What is read back there hides from the compare how the write ended.
            if to_compare.first() != Some(&bytes) || volume.is_being_read(&bytes) {
                volume.doubt_since(Some(since));
                self.reach_back(i, at);
            }
            for bytes in to_compare {
                let volume = &mut self.volumes[i];
                if !volume.suspects.raise(&bytes, since) {
                    volume.mark(bytes);
                    volume.doubt_since(Some(since));
                    self.open_gap(i, GapCause::ChangedInFlight, self.last_seq, at);
                }
            }
        }
    }

    /// The disk counts no write up to `last` any more: those whose end was not seen have ended all the same. Whether
    /// their pages were changed meanwhile nobody saw.
    pub(crate) fn give_up(&mut self, disk: DiskNumber, last: Option<Seq>) {
        self.give_up_as(disk, last, true);
    }

    /// Writes up to `last` are not waited for any longer: taken to have ended.
    pub(super) fn give_up_overdue_on(&mut self, disk: DiskNumber, last: Option<Seq>) {
        self.give_up_as(disk, last, false);
    }

    fn give_up_as(&mut self, disk: DiskNumber, last: Option<Seq>, as_youngest: bool) {
        let Some(known) = self.disks.iter_mut().find(|known| known.number == disk) else {
            return;
        };
        for (range, seq) in known.in_flight.give_up(last, as_youngest) {
            self.suspect_since(disk, range, seq, self.latest);
        }
    }

    /// The oldest write to a disk whose end was not seen.
    pub(crate) fn oldest_in_flight(&self, disk: DiskNumber) -> Option<Seq> {
        let known = self.disks.iter().find(|known| known.number == disk)?;
        known.in_flight.oldest_on_its_way()
    }

    /// Have all captured writes up to `last` ended, as far as anybody will know?
    pub(crate) fn have_ended(&self, last: Option<Seq>) -> bool {
        let oldest = |disk: &DiskRun| disk.in_flight.oldest_on_its_way();
        self.disks
            .iter()
            .filter_map(oldest)
            .all(|oldest| Some(oldest) > last)
    }

    /// Gives up writes that have been on their way for longer than `FLIGHT_TIME_MAX`, twice that at most.
    pub(super) fn give_up_overdue(&mut self, now: BootNs) {
        if self.full || now < self.overdue_at {
            return;
        }
        self.overdue_at = BootNs(now.0.saturating_add(FLIGHT_TIME_MAX.as_nanos() as u64));
        let overdue = self.overdue.back().copied().flatten();
        self.overdue.push_back(self.last_seq);
        let forgotten = match self.overdue.len() {
            ..=GIVEN_UP_KEPT => None,
            _ => self.overdue.pop_front().flatten(),
        };
        for disk in 0..self.disks.len() {
            self.give_up_overdue_on(self.disks[disk].number, overdue);
            self.disks[disk].in_flight.forget(forgotten);
        }
    }

    /// Chooses what to compare with the device next: so many blocks at most, of a volume that `may` be read. Volumes take
    /// turns.
    pub(crate) fn take_suspects(
        &mut self,
        blocks_max: usize,
        may: impl Fn(VolumeId) -> bool,
    ) -> Option<Suspicion> {
        if self.full {
            return None;
        }
        let count = self.volumes.len();
        for turn in 0..count {
            let i = (self.suspects_turn + turn) % count;
            let volume = &mut self.volumes[i];
            if !may(volume.id) {
                continue;
            }
            let ranges = volume.suspects.take(blocks_max);
            if !ranges.is_empty() {
                let (volume, epoch) = (volume.id, self.epoch);
                self.suspects_turn = i + 1;
                return Some(Suspicion {
                    volume,
                    ranges,
                    epoch,
                });
            }
        }
        None
    }

    /// What was taken by [`Recorder::take_suspects`] was compared, or could not be.
    pub(crate) fn suspects_done(&mut self, volume: VolumeId, compared: bool) {
        if let Some(volume) = self.volumes.iter_mut().find(|known| known.id == volume) {
            if compared {
                volume.compared_blocks += volume.suspects.checked();
            } else {
                volume.suspects.put_back();
            }
        }
    }

    /// How many blocks of a volume wait to be compared, or are being.
    pub(crate) fn suspect_blocks(&self, volume: VolumeId) -> usize {
        let volume = self.volumes.iter().find(|known| known.id == volume);
        volume.map_or(0, |volume| volume.suspects.blocks())
    }

    /// Corrects what record `written_by` wrote: the device holds `data` there, and nothing was written since.
    /// Does nothing if something was. False if there is no room just now.
    pub(crate) fn correct(
        &mut self,
        run: &Run,
        written_by: Option<Seq>,
        data: Option<&[u8]>,
        now: BootNs,
    ) -> bool {
        let block = run.bytes.start / BLOCK_BYTES;
        let Some(volume) = self.volumes.iter_mut().find(|volume| volume.id == run.volume) else {
            return true;
        };
        if !volume.suspects.is_untouched(block) {
            return true;
        }
        let corrected = self.read_back(run, run.bytes.clone(), written_by, data, now);
        if corrected && let Some(volume) = self.volumes.iter_mut().find(|volume| volume.id == run.volume) {
            volume.corrected_blocks += 1;
        }
        corrected
    }

    /// What is suspect now, to be waited for with [`Recorder::is_clear`].
    pub(crate) fn suspicions(&self) -> SuspicionMark {
        let marks = self
            .volumes
            .iter()
            .map(|volume| (volume.id, volume.suspects.raised()));
        SuspicionMark(marks.collect())
    }

    /// Has all that was suspect at `mark` been settled?
    pub(crate) fn is_clear(&self, mark: &SuspicionMark) -> bool {
        mark.0.iter().all(|&(id, raised)| {
            let volume = self.volumes.iter().find(|volume| volume.id == id);
            // What was forgotten is settled when the gap has its place.
            volume.is_none_or(|volume| volume.suspects.is_clear(raised) && volume.in_doubt.is_none())
        })
    }

    /// All losses up to now are known when [`Recorder::polls`] says what this returns: also the skipped events, which
    /// are looked for less often otherwise.
    pub(crate) fn ask_for_losses(&mut self) -> u64 {
        self.are_losses_asked_for = true;
        // The look that is under way may have begun before the call.
        self.polls + 2
    }

    /// Does somebody wait to know of skipped events?
    pub(crate) fn are_losses_asked_for(&self) -> bool {
        self.are_losses_asked_for
    }

    /// The probe's counters have been looked at; what they told is known.
    pub(crate) fn polled(&mut self) {
        self.polls += 1;
        self.are_losses_asked_for = false;
    }

    pub(crate) fn polls(&self) -> u64 {
        self.polls
    }

    /// A split of a bio of ours has ended, or a stranger over it: while there may be strangers, it is compared.
    pub(super) fn doubt(&mut self, disk: DiskNumber, range: Sectors, at: BootNs) {
        let doubt_ns = DOUBT_TIME.as_nanos() as u64;
        let may_be_stranger = |volume: &VolumeRun| {
            volume.disk == disk
                && (!matches!(volume.state, State::Exact { .. })
                    || at.0 <= volume.unseen.since().0.saturating_add(doubt_ns))
        };
        if self.volumes.iter().any(may_be_stranger) {
            self.suspect(disk, range, at);
        }
    }
}
