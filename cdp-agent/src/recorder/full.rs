//! The recorder's part when the store fills up: what is lost then, and how far back that reaches.

use cdp_ebpf::event::WriteEvent;
use cdp_journal::format::{Body, FrameBuilder, GapCause};
use cdp_journal::{BootNs, Seq};

use super::{Epoch, Recorder, State};
use crate::inflight::InFlight;
use crate::regions::Regions;

impl Recorder {
    pub(super) fn drop_while_full(&mut self, write: &WriteEvent) {
        for volume in self
            .volumes
            .iter_mut()
            .filter(|volume| volume.disk.0 == write.disk)
        {
            volume.losses.store_full += u64::from(write.last);
        }
    }

    /// The store is full: the log goes on at `next`, whatever was given a Seq from there on is lost.
    pub(crate) fn store_full(&mut self, next: Seq, epoch: Epoch, now: BootNs) {
        // Also where a gap is open already: its record may be among those that are lost.
        let gaps: Vec<_> = (0..self.volumes.len())
            .map(|i| {
                let volume = &mut self.volumes[i];
                // All of the volume will be read when there is room.
                let forgotten = volume.suspects.clear();
                volume.doubt_since(forgotten);
                let in_doubt = volume.in_doubt.take().filter(|&first| first < next);
                let last_exact = self.known_exact(i, in_doubt.unwrap_or(next).prev());
                let at = self.time_of(last_exact, now).at_offset(self.wall_offset_ns);
                (last_exact, at)
            })
            .collect();
        self.builder = FrameBuilder::new(next);
        self.opened_at = None;
        self.sealed.clear();
        self.recent.clear();
        self.last_seq = next.prev();
        self.epoch = epoch;
        self.overdue.clear();
        self.forget_looks_from(next);
        for disk in &mut self.disks {
            disk.in_flight = InFlight::default();
        }
        for (volume, body) in self.declared.take_from(next) {
            match (volume, body) {
                (Some(id), Body::GapOpen { cause, last_exact }) => self.unwatched(id, cause, last_exact, now),
                (volume, body) => {
                    self.note(now, volume, body);
                }
            }
        }
        for (i, (last_exact, last_exact_at)) in gaps.into_iter().enumerate() {
            let volume = &mut self.volumes[i];
            volume.pending = None;
            // What the store knows is not clear any more: what is read gets compared.
            volume.blank = Regions::new(volume.bytes.div_ceil(volume.region_bytes));
            if matches!(volume.state, State::Exact { .. }) {
                volume.gaps += 1;
                volume.inexact_since = Some(last_exact_at);
            }
            if volume.state != State::Seeding {
                volume.state = State::Resyncing(GapCause::SpoolFull);
            }
            volume.last_cause = GapCause::SpoolFull;
            volume.gap_from = last_exact;
            let (id, cause) = (volume.id, GapCause::SpoolFull);
            self.note(now, Some(id), Body::GapOpen { cause, last_exact });
        }
        self.full = true;
        self.seal();
        tracing::error!(
            next = next.get(),
            "the store is full: nothing is journaled until there is room"
        );
    }

    /// The last record up to `last` at which a volume is known to be exact if nothing more is heard of it: before
    /// every write in flight, which may fail yet, and before a gap that is open, or waits for its place.
    fn known_exact(&self, volume: usize, last: Option<Seq>) -> Option<Seq> {
        let volume = &self.volumes[volume];
        let disk = self.disks.iter().find(|disk| disk.number == volume.disk);
        let in_flight = disk.and_then(|disk| disk.in_flight.oldest(volume.sectors()));
        let open = (!matches!(volume.state, State::Exact { .. })).then_some(volume.gap_from);
        let pending = volume.pending.map(|pending| self.last_seq_before(pending.at));
        [in_flight.map(Seq::prev), open, pending]
            .into_iter()
            .flatten()
            .fold(last, Option::min)
    }

    /// The store has room again: everything may have changed meanwhile.
    pub(crate) fn room_again(&mut self, now: BootNs) {
        if !self.full {
            return;
        }
        self.full = false;
        for i in 0..self.volumes.len() {
            let volume = &mut self.volumes[i];
            volume.mark_all();
            volume.dirty_at_start = volume.dirty.len();
            volume.unseen.add(now);
            self.reach_back(i, now);
        }
        tracing::info!("the store has room again: resyncing");
    }
}
