//! How the agent is, as `status` tells it; and the lines of the log that come by themselves: progress of what is
//! read back, losses, a store that fills up.

use std::collections::HashMap;

use cdp_journal::log::Room;
use cdp_journal::{BootNs, VolumeId};

use crate::control::{StoreStatus, VolumeStatus};
use crate::progress::{Progress, Seen};
use crate::recorder::{Recorder, State, VolumeRun};
use crate::watermark::{Watermark, percent_used};

/// What was seen of volumes and store so far.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    progress: HashMap<VolumeId, Progress>,
    store: Watermark,
}

impl Watch {
    /// Looks at everything, and says in the log what is due.
    pub(crate) fn look(&mut self, recorder: &Recorder, room: Option<Room>, now: BootNs) {
        let volumes = recorder.volumes();
        self.progress
            .retain(|id, _| volumes.iter().any(|volume| volume.id == *id));
        for volume in volumes {
            self.look_at(volume, now);
        }
        if let Some(room) = room
            && self.store.crossed(&room)
        {
            tracing::warn!(
                used_bytes = room.used_bytes,
                limit_bytes = room.limit_bytes,
                "the store is {} % full: at 100 % nothing more is journaled until there is room; give it more room or \
                 raise store_bytes_max",
                percent_used(&room)
            );
        }
    }

    fn look_at(&mut self, volume: &VolumeRun, now: BootNs) {
        let progress = self.progress.entry(volume.id).or_default();
        let lines = progress.look(&Seen {
            at: now,
            is_behind: !matches!(volume.state, State::Exact { .. }),
            read_bytes: volume.read_bytes,
            left_bytes: volume.left_bytes(),
            losses: volume.losses,
        });
        if let Some(lost) = lines.lost {
            tracing::warn!(volume = %volume.name, "writes were not captured: {lost}");
        }
        if lines.is_progress_due {
            let state = state_name(volume.state);
            let percent = (volume.progress() * 100.0) as u64;
            tracing::info!(
                volume = %volume.name,
                left_bytes = volume.left_bytes(),
                bytes_per_s = progress.bytes_per_second().map(|rate| rate as u64),
                left_s = progress.time_left().map(|left| left.as_secs()),
                "{state}, {percent} % done"
            );
        }
    }

    /// The store, once it was looked at.
    pub(crate) fn store_status(&self, room: Option<Room>) -> Option<StoreStatus> {
        room.map(|room| StoreStatus {
            used_bytes: room.used_bytes,
            limit_bytes: room.limit_bytes,
            is_nearly_full: self.store.is_high(),
        })
    }

    /// One volume.
    pub(crate) fn volume_status(&self, volume: &VolumeRun) -> VolumeStatus {
        let (exact_since, cause) = match volume.state {
            State::Seeding => (None, None),
            State::Exact { since, .. } => (Some(since.to_string()), None),
            State::Resyncing(cause) => (None, Some(cause.to_string())),
        };
        let progress = self.progress.get(&volume.id).filter(|_| exact_since.is_none());
        let gap_since = volume.inexact_since.filter(|_| cause.is_some());
        VolumeStatus {
            name: volume.name.clone(),
            kind: "block".into(),
            path: volume.path.display().to_string(),
            bytes: volume.bytes,
            state: state_name(volume.state).into(),
            progress: volume.progress(),
            captured_bytes: volume.captured_bytes,
            captured_writes: volume.captured_writes,
            dropped_writes: volume.losses.writes(),
            losses: volume.losses,
            exact_since,
            gaps: volume.gaps,
            gap_cause: cause,
            gap_since: gap_since.map(|since| since.to_string()),
            dirty_bytes: volume.left_bytes(),
            readback_bytes: volume.read_bytes,
            readback_bytes_per_s: progress.and_then(Progress::bytes_per_second),
            resync_left_s: progress
                .and_then(Progress::time_left)
                .map(|left| left.as_secs_f64()),
            compared_blocks: volume.compared_blocks,
            corrected_blocks: volume.corrected_blocks,
            why: None,
        }
    }
}

fn state_name(state: State) -> &'static str {
    match state {
        State::Seeding => "seeding",
        State::Exact { .. } => "protected",
        State::Resyncing(_) => "resyncing",
    }
}
