//! What the index keeps of a volume's history besides its blocks.

use serde::{Deserialize, Serialize};

use crate::format::{GapCause, VolumeKind};
use crate::types::{Seq, WallNs};

/// An event, as it is stored: in JSON, for there are few.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredEvent {
    pub(crate) wall_ns: i64,
    pub(crate) body: EventBody,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// 0: of all volumes.
    pub(crate) volume: u16,
    pub(crate) seq: Seq,
    pub(crate) wall: WallNs,
    pub(crate) body: EventBody,
}

/// What happened. Several kinds can share a Seq: a clock step is noticed at the first record after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum EventBody {
    Volume {
        kind: VolumeKind,
        bytes: u64,
        name: String,
        path: String,
    },
    Resize {
        bytes: u64,
    },
    GapOpen {
        cause: GapCause,
        last_exact: u64,
    },
    GapClose,
    Bookmark {
        label: String,
    },
    Start {
        agent: uuid::Uuid,
        boot_id: uuid::Uuid,
    },
    Stop,
    ClockStep {
        by_ns: i64,
    },
    Hole {
        last: u64,
    },
}

impl EventBody {
    /// Keeps events of one Seq apart.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Hole { .. } => 0,
            Self::ClockStep { .. } => 1,
            _ => 2,
        }
    }
}
