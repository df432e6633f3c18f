//! What an agent leaves to the next one, and how that takes over: as `capture::notes`, `pipeline`, and `takeover`.

use super::super::*;
use super::agent::{Agent, volume};
use super::kernel::{Counters, Kernel};
use super::model::Model;
use super::{DISK, SLOT, volume_id};
use crate::capture::NextUnsettled;

/// As `Notes`.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes {
    /// By their last record: the position in the ring behind their last event.
    frames: Vec<(u64, u64)>,
    unsettled: Option<u64>,
    next_unsettled: NextUnsettled,
    settled: Counters,
    is_settled: bool,
    marks_taken: bool,
    misses: u64,
    /// Skipped events were looked for when this was the last record.
    looked: Option<Seq>,
}

impl Notes {
    pub(super) fn of_new_probe(last: Option<Seq>) -> Self {
        Self {
            looked: last,
            ..Self::default()
        }
    }

    pub(super) fn frame(&mut self, last: u64, position: u64) {
        self.frames.push((last, position));
    }

    pub(super) fn forget_after(&mut self, last: u64) {
        self.next_unsettled.forget();
        self.looked = self.looked.min(Seq::new(last));
        self.frames.retain(|&(seq, _)| seq <= last);
    }

    pub(super) fn take_marks(&mut self) {
        self.marks_taken = true;
        self.is_settled = false;
    }

    /// The disk is watched from now on.
    pub(super) fn watch(&mut self) {
        self.take_marks();
    }

    pub(super) fn looked(&mut self, misses: u64, last: Option<Seq>) {
        if misses == self.misses {
            self.looked = last;
        }
    }

    /// As `Capture::unsettle`.
    pub(super) fn unsettle(&mut self, reopened: Seq) {
        self.next_unsettled.reopen(reopened);
        self.unsettled = self.unsettled.map(|first| first.min(reopened.get()));
    }

    /// As `Capture::note`.
    pub(super) fn keep(&mut self, recorder: &Recorder, seen: &Counters, misses: u64, appended: u64) {
        let appended = Seq::new(appended);
        let look = || (recorder.unsettled(), recorder.last_seq());
        if let Some((first, _)) = self.next_unsettled.take(appended, look) {
            self.unsettled = Some(first.get());
        }
        if !self.is_settled && recorder.is_settled(Some(DISK), appended) {
            self.settled = seen.clone();
            self.marks_taken = false;
            self.is_settled = true;
        }
        if self.misses != misses && recorder.is_settled(None, appended) {
            self.misses = misses;
        }
    }
}

impl Agent {
    /// It is killed, and the next one takes the probe over where it can. What was appended survives.
    pub(super) fn killed(&self, kernel: &mut Kernel, model: &mut Model) -> Option<Self> {
        let last = self.appended();
        let found = self.notes.frames.iter().rev().find(|&&(seq, _)| seq == last);
        model.killed(last + 1);
        let exact = model.exact_since().filter(|_| !self.notes.marks_taken);
        let position = found.map(|&(_, position)| position);
        let is_same_size = model.size_at(last) == Some(kernel.size) && kernel.watched == kernel.size;
        let is_watched = kernel.is_watched && is_same_size;
        if let (true, Some(exact), Some(position)) = (is_watched, exact, position)
            && kernel.skip_to(position)
        {
            let at_ns = kernel.instant();
            kernel.forget_growth(model, last + 1, at_ns);
            kernel.misses_forgotten(last + 1);
            kernel.size_looked_at();
            return Some(self.take_over(kernel, model, last, exact, position));
        }
        kernel.goes_down(model, last + 1);
        None
    }

    /// As `takeover::hand_to`.
    fn take_over(&self, kernel: &mut Kernel, model: &Model, last: u64, exact: u64, position: u64) -> Self {
        let now = BootNs(kernel.instant());
        let mut recorder = Recorder::new(Seq::new(last), 0);
        recorder.read_from(RingPosition(position));
        recorder.resume_after(BootNs(model.latest_ns()));
        recorder.add_disk(DISK, SLOT, self.is_bio_based());
        let exact = Seq::new(exact).map(|seq| (WallNs(now.0 as i64), seq));
        recorder.add_volume(
            NewVolume {
                last_exact: Seq::new(last),
                exact,
                ..volume(kernel.size)
            },
            now,
        );
        for (seq, at_ns, bytes) in self
            .notes
            .unsettled
            .into_iter()
            .flat_map(|first| model.writes_from(first))
        {
            if let Some(seq) = Seq::new(seq) {
                let age = Duration::from_nanos(now.0.saturating_sub(at_ns));
                recorder.recorded_before(volume_id(), &bytes, seq, age);
            }
        }
        let mut notes = self.notes.clone();
        notes.forget_after(last);
        let known = (notes.settled.clone(), notes.misses, notes.looked);
        self.next(recorder, notes, known, last, position, now)
    }
}
