//! A volume while the agent runs: how exact its history is, and what of it must be read.

use std::ops::Range;
use std::path::PathBuf;

use cdp_journal::format::GapCause;
use cdp_journal::store::VolumeState;
use cdp_journal::{BootNs, SECTOR_BYTES, Seq, VolumeId, WallNs};

use super::suspects::Suspects;
use super::unseen::Unseen;
use crate::capture::DiskNumber;
use crate::config::VolumeConfig;
use crate::device::BlockDevice;
use crate::inflight::Sectors;
use crate::losses::LossCounts;
use crate::regions::Regions;

/// How exact a volume's history is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The first copy is under way.
    Seeding,
    /// Every moment from `since` on is exact.
    Exact { since: WallNs, seq: Seq },
    /// A gap is open.
    Resyncing(GapCause),
}

/// A loss that was noticed, but whose place among the records is not reached yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingGap {
    pub(super) cause: GapCause,
    /// The first loss happened then; records of that time and later are not exact.
    pub(super) at: BootNs,
    /// When the ring has been emptied to here, the loss lies behind all records.
    pub(super) ring_position: u64,
}

/// A protected volume while the agent runs.
#[derive(Debug)]
pub(crate) struct VolumeRun {
    pub(crate) id: VolumeId,
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) disk: DiskNumber,
    /// Where the volume begins on its disk.
    pub(crate) start_sector: u64,
    pub(crate) bytes: u64,
    /// It had this size after this record was made.
    pub(super) size_seen: Option<Seq>,
    pub(crate) state: State,
    pub(crate) captured_writes: u64,
    pub(crate) captured_bytes: u64,
    /// What was written and could not be captured.
    pub(crate) losses: LossCounts,
    pub(crate) gaps: u64,
    /// The last exact time before the present gap, or before the last one; where that is longer ago than the times
    /// that are kept, the oldest of them. `None`: there was no gap.
    pub(crate) inexact_since: Option<WallNs>,
    /// Bytes read back.
    pub(crate) read_bytes: u64,
    pub(super) region_bytes: u64,
    pub(super) dirty: Regions,
    /// Regions that have never been read and of which the store knows nothing: zeroes need no record.
    pub(super) blank: Regions,
    pub(super) reading: Option<Range<u64>>,
    /// The probe watches all of it. What is read before would miss the writes between.
    pub(super) attached: bool,
    /// Blocks to compare with the device.
    pub(super) suspects: Suspects,
    /// Blocks that were compared with the device, because they might differ.
    pub(crate) compared_blocks: u64,
    /// Blocks that the device was found to have taken otherwise than they were seen.
    pub(crate) corrected_blocks: u64,
    /// Regions to read when the present gap (or the first copy) began.
    pub(super) dirty_at_start: u64,
    pub(super) unseen: Unseen,
    pub(super) pending: Option<PendingGap>,
    /// Where the gap that is open begins: its last exact record. None where that is not known, or none is open.
    pub(crate) gap_from: Option<Seq>,
    /// The oldest suspect that was forgotten: no gap that is opened may begin after it.
    pub(super) in_doubt: Option<Seq>,
    pub(super) last_cause: GapCause,
}

impl VolumeRun {
    pub(super) fn sectors(&self) -> Sectors {
        Sectors {
            start: self.start_sector,
            end: self.start_sector + self.bytes / SECTOR_BYTES,
        }
    }

    /// Cuts a range of the disk to the volume: bytes from the volume's start.
    pub(super) fn clip(&self, range: Sectors) -> Option<Range<u64>> {
        let own = self.sectors();
        let (start, end) = (range.start.max(own.start), range.end.min(own.end));
        (start < end).then(|| (start - own.start) * SECTOR_BYTES..(end - own.start) * SECTOR_BYTES)
    }

    /// What lies there is not known any more. What the device holds now says nothing of the records that wrote
    /// there last, so suspects are not compared: they are read back with the rest, and the gap begins before them.
    pub(super) fn mark(&mut self, bytes: Range<u64>) {
        self.mark_regions(self.regions_of(&bytes));
    }

    pub(super) fn regions_of(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start / self.region_bytes..bytes.end.div_ceil(self.region_bytes)
    }

    /// As [`VolumeRun::mark`].
    pub(super) fn mark_regions(&mut self, regions: Range<u64>) {
        let in_doubt = self
            .suspects
            .forget(&(regions.start * self.region_bytes..regions.end * self.region_bytes));
        self.doubt_since(in_doubt);
        for region in regions {
            self.dirty.insert(region);
            // Zeroes may lie over a captured write now: what is read gets compared.
            self.blank.remove(region);
        }
    }

    /// As [`VolumeRun::mark`], of everything.
    pub(super) fn mark_all(&mut self) {
        let in_doubt = self.suspects.clear();
        self.doubt_since(in_doubt);
        self.dirty.insert_all();
        self.blank = Regions::new(self.bytes.div_ceil(self.region_bytes));
    }

    /// This write, and none before it, may have ended otherwise than the log says, and will not be compared.
    pub(super) fn doubt_since(&mut self, write: Option<Seq>) {
        self.in_doubt = self.in_doubt.into_iter().chain(write).min();
    }

    /// The oldest write that may have ended otherwise than the log says.
    pub(super) fn oldest_in_doubt(&self) -> Option<Seq> {
        self.suspects.oldest().into_iter().chain(self.in_doubt).min()
    }

    /// What of this will not be read back and compared anyway, after every write that came up to now.
    pub(super) fn outside_dirty(&self, bytes: &Range<u64>) -> Vec<Range<u64>> {
        let mut outside: Vec<Range<u64>> = Vec::new();
        for region in self.regions_of(bytes) {
            if self.dirty.contains(region) && !self.blank.contains(region) {
                continue;
            }
            let start = bytes.start.max(region * self.region_bytes);
            let end = bytes.end.min((region + 1) * self.region_bytes);
            match outside.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => outside.push(start..end),
            }
        }
        outside
    }

    /// Is any of this being read back?
    pub(super) fn is_being_read(&self, bytes: &Range<u64>) -> bool {
        let regions = self.regions_of(bytes);
        self.reading
            .as_ref()
            .is_some_and(|run| run.start < regions.end && regions.start < run.end)
    }

    /// Is any of this waiting to be read back?
    pub(super) fn touches_dirty(&self, bytes: &Range<u64>) -> bool {
        self.regions_of(bytes).any(|region| self.dirty.contains(region))
    }

    /// Is every moment exact from some time on, as far as is known?
    pub(crate) fn is_exact(&self) -> bool {
        matches!(self.state, State::Exact { .. }) && self.pending.is_none()
    }

    /// The record since which every moment is exact, if it is.
    pub(crate) fn exact_from(&self) -> Option<Seq> {
        match self.state {
            State::Exact { seq, .. } => Some(seq),
            _ => None,
        }
    }

    fn regions_left(&self) -> u64 {
        self.dirty.len() + self.reading.as_ref().map_or(0, |run| run.end - run.start)
    }

    /// Bytes that are still to be read back.
    pub(crate) fn left_bytes(&self) -> u64 {
        (self.regions_left() * self.region_bytes).min(self.bytes)
    }

    /// How much of the first copy or of the resync is done.
    pub(crate) fn progress(&self) -> f64 {
        if matches!(self.state, State::Exact { .. }) {
            return 1.0;
        }
        let left = self.regions_left();
        if self.dirty_at_start == 0 {
            0.0
        } else {
            (1.0 - left as f64 / self.dirty_at_start as f64).max(0.0)
        }
    }
}

/// What a new volume brings along.
#[derive(Clone, Debug)]
pub(crate) struct NewVolume {
    pub(crate) id: VolumeId,
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) disk: DiskNumber,
    pub(crate) start_sector: u64,
    pub(crate) bytes: u64,
    pub(crate) region_bytes: u64,
    /// The store knows nothing of it: absent means zero.
    pub(crate) blank: bool,
    /// Gaps that its history has already.
    pub(crate) gaps: u64,
    /// Its last exact record and time, if its history is interrupted.
    pub(crate) last_exact: Option<Seq>,
    pub(crate) inexact_since: Option<WallNs>,
    /// Why its history is interrupted, if it is.
    pub(crate) cause: Option<GapCause>,
    /// It is not: the probe has watched it all the time since this record, which began the exact stretch.
    pub(crate) exact: Option<(WallNs, Seq)>,
}

impl NewVolume {
    /// A volume of which the store knows nothing.
    pub(crate) fn of_device(
        id: VolumeId,
        volume: &VolumeConfig,
        device: &BlockDevice,
        region_bytes: u64,
    ) -> Self {
        Self {
            id,
            name: volume.name.clone(),
            path: device.path.clone(),
            disk: device.disk,
            start_sector: device.start_sector,
            bytes: device.bytes,
            region_bytes,
            blank: true,
            gaps: 0,
            last_exact: None,
            inexact_since: None,
            cause: None,
            exact: None,
        }
    }

    /// The store knows it, and why its history is interrupted, if it is.
    pub(crate) fn known(self, state: &VolumeState, cause: Option<GapCause>) -> Self {
        Self {
            blank: false,
            gaps: state.gaps,
            last_exact: state.last_exact,
            inexact_since: state.last_exact_at,
            cause,
            ..self
        }
    }
}
