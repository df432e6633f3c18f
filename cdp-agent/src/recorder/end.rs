//! A volume is not watched any more: where its history ends.

use cdp_journal::format::{Body, GapCause};
use cdp_journal::{BootNs, Seq, VolumeId, WallNs};

use super::{Recorder, State};

/// Why a volume's history ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Nobody wants it any more. What was captured up to now is exact.
    NotWanted,
    /// Its device was found to be gone, or another one: so it may have been since the look before.
    Detached,
}

impl End {
    /// The cause of the gap that follows.
    pub(crate) fn cause(self) -> GapCause {
        match self {
            End::NotWanted => GapCause::AgentDown,
            End::Detached => GapCause::Detached,
        }
    }
}

/// A volume that was forgotten.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) bytes: u64,
    pub(crate) path: std::path::PathBuf,
    /// Why the gap is open that it leaves.
    pub(crate) cause: GapCause,
    /// Its last exact record, and when that was.
    pub(crate) last_exact: Option<Seq>,
    pub(crate) last_exact_at: Option<WallNs>,
    pub(crate) gaps: u64,
}

impl Recorder {
    /// A volume that the store knows is not watched: its history is not exact after `last_exact`.
    pub(crate) fn unwatched(&mut self, id: VolumeId, cause: GapCause, last_exact: Option<Seq>, now: BootNs) {
        let body = Body::GapOpen { cause, last_exact };
        let seq = self.note(now, Some(id), body.clone());
        self.declared.ended(Some(seq), id, body);
    }

    /// A volume's device was found to be gone, or another one: so it may have been since the look before, and no moment since
    /// then is exact, whatever is recorded before the volume is forgotten. Nothing of it is read.
    pub(crate) fn device_gone(&mut self, id: VolumeId, now: BootNs) {
        let Some(i) = self.volumes.iter().position(|volume| volume.id == id) else {
            return;
        };
        self.doubt_unsettled(i);
        let volume = &mut self.volumes[i];
        volume.attached = false;
        volume.mark_all();
        let seen = volume.size_seen;
        // Also where a gap is open: it may have begun later.
        volume.doubt_since(Some(Seq::after(seen)));
        // After the last exact moment, not at the same time.
        self.open_gap(i, GapCause::Detached, seen, BootNs(now.0.saturating_add(1)));
    }

    /// How writes ended that are in flight, or that wait to be compared with the device, nobody will see.
    fn doubt_unsettled(&mut self, i: usize) {
        let volume = &mut self.volumes[i];
        let (disk, sectors) = (volume.disk, volume.sectors());
        let suspect = volume.suspects.clear();
        volume.doubt_since(suspect);
        let in_flight = self.disks.iter().find(|known| known.number == disk);
        let in_flight = in_flight.and_then(|disk| disk.in_flight.oldest(sectors));
        self.volumes[i].doubt_since(in_flight);
    }

    /// Forgets a volume; its history ends with a gap that is open, so that no later moment counts as exact. `None` if
    /// there is no such volume. The gap begins before writes in flight.
    pub(crate) fn end_volume(&mut self, id: VolumeId, end: End, now: BootNs) -> Option<Ended> {
        let i = self.volumes.iter().position(|volume| volume.id == id)?;
        match end {
            End::Detached => self.device_gone(id, now),
            End::NotWanted => self.doubt_unsettled(i),
        }
        let last_exact = match end {
            End::Detached => self.volumes[i].size_seen,
            // So that the time up to now is covered.
            End::NotWanted if matches!(self.volumes[i].state, State::Exact { .. }) => {
                Some(self.note(now, None, Body::Tick))
            }
            End::NotWanted => self.last_seq,
        };
        // After the last exact moment, not at the same time.
        self.open_gap(i, end.cause(), last_exact, BootNs(now.0.saturating_add(1)));
        let volume = self.volumes.remove(i);
        let cause = match volume.state {
            State::Resyncing(cause) => cause,
            State::Seeding | State::Exact { .. } => end.cause(),
        };
        let body = Body::GapOpen {
            cause,
            last_exact: volume.gap_from,
        };
        self.declared.ended(self.last_seq, id, body);
        self.disks
            .retain(|disk| self.volumes.iter().any(|volume| volume.disk == disk.number));
        Some(Ended {
            bytes: volume.bytes,
            path: volume.path,
            cause,
            last_exact: volume.gap_from,
            last_exact_at: volume.inexact_since,
            gaps: volume.gaps,
        })
    }
}
