//! What is known of a volume over time: where history is exact, and why not elsewhere.

use serde::{Deserialize, Serialize};

use crate::format::{GapCause, VolumeKind};
use crate::types::{Seq, VolumeId, WallNs};

/// A volume as last declared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its number in the store.
    pub id: VolumeId,
    /// The user's name for it.
    pub name: String,
    /// Block device or directory.
    pub kind: VolumeKind,
    /// Where it was found.
    pub path: String,
    /// Its size.
    pub bytes: u64,
}

/// A stretch of history in which every moment is exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExactInterval {
    /// Time of the first record in it.
    pub from: WallNs,
    /// Until when it is known to be exact.
    pub to: WallNs,
    /// First record.
    pub from_seq: Seq,
    /// Last record.
    pub to_seq: Seq,
    /// It reaches the head of the log and goes on.
    pub open: bool,
}

/// A stretch of history that is not exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Last time known to be exact.
    pub from: WallNs,
    /// When history became exact again; `None`: not yet.
    pub to: Option<WallNs>,
    /// Last exact record, if any.
    pub from_seq: Option<Seq>,
    /// First exact record after.
    pub to_seq: Option<Seq>,
    /// Why (the first cause, if there were several).
    pub cause: GapCause,
}

/// A named moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bookmark {
    /// Its name.
    pub label: String,
    /// When.
    pub at: WallNs,
    /// The record that names it.
    pub seq: Seq,
}

/// The volume's size from a record on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resize {
    /// When.
    pub at: WallNs,
    /// The record.
    pub seq: Seq,
    /// The size from there on.
    pub bytes: u64,
}

/// Something else worth knowing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// When.
    pub at: WallNs,
    /// The record.
    pub seq: Seq,
    /// What.
    pub text: String,
}

/// A volume over time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// The volume as last declared.
    pub volume: VolumeInfo,
    /// Where history is exact, in order.
    pub exact: Vec<ExactInterval>,
    /// Where it is not, and why, in order. The first copy is not listed.
    pub gaps: Vec<Gap>,
    /// Named moments.
    pub bookmarks: Vec<Bookmark>,
    /// Sizes, the first one included.
    pub resizes: Vec<Resize>,
    /// Starts, stops, steps of the clock.
    pub notes: Vec<Note>,
}
