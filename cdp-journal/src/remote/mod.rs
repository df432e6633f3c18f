//! Reading a store that lies at a server.
//!
//! The server is asked for three things: what its index knows (moments, gaps, where the bytes of a view lie), bytes of
//! the log as they are, compressed, and the record tables of frames. Data groups are checked here, against the
//! checksums of the index. Each question is a stream of its own, so many are on their way at once; a question whose
//! connection was cut is asked again on the next.
//!
//! A question is an `Ask` in JSON. Before the answer, which is JSON too, come:
//!
//! | question   | messages                                                                                     |
//! |------------|----------------------------------------------------------------------------------------------|
//! | `plan`     | `Items`, each stretch: offset (8), bytes (8), segment or 0 for zeroes (8), group offset (4), group CRC (4), first byte in the group (4), zero (4) |
//! | `versions` | `Bytes`, of each block: Seq or 0 (8), length (2) and bytes of its version as the index stores it |
//! | `read`     | `Bytes` of the segment                                                                       |
//! | `groups`   | `Bytes` of each group, as asked for, `GROUPS_MAX` at most: segment (8), offset in it (8), header and stored bytes; nothing where there is no such frame |
//! | `heads`    | `Head` of each frame, [`HEADS_MAX`] at most                                                  |
//! | `verify`   | `Progress`                                                                                   |

mod archive;
mod blocks;
mod items;
mod line;

use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::ReadError;
use crate::site::AgentName;
use crate::types::{Seq, VolumeId, WallNs};
pub(crate) use crate::view::GROUPS_MAX;
use crate::when::{NotExact, Point, WhenError};

pub use archive::{RemoteArchive, RemoteSite};
pub(crate) use items::{
    decode_items, decode_placed, decode_versions, encode_item, encode_placed, encode_version,
};
pub(crate) use line::{AskError, ask_once};

/// Frames whose tables answer one question at most.
pub const HEADS_MAX: usize = 256;

/// A group that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum GroupAt {
    /// At an offset of a segment.
    Place { segment: u64, offset: u64 },
    /// So many bytes behind the record table of the frame that begins with `first`.
    Frame { first: Seq, offset: u32 },
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
#[allow(missing_docs, reason = "as the methods of `Archive` and `Blocks`")]
pub(crate) enum Ask {
    /// Which histories are there? Answer: a list of [`Told`].
    Stores,
    /// Which histories of all agents are there to follow? Answer: a list of [`Listed`]. For servers that follow alone.
    Histories,
    /// Answer: [`About`].
    About { log: Uuid },
    /// Answer: a list of volumes.
    Volumes { log: Uuid },
    /// Answer: a history, or none.
    History { log: Uuid, volume: VolumeId },
    /// Answer: a moment.
    Resolve {
        log: Uuid,
        volume: VolumeId,
        when: String,
    },
    /// Answer: a moment.
    Locate { log: Uuid, when: String },
    /// Answer: bytes of the volume then.
    View { log: Uuid, volume: VolumeId, seq: Seq },
    /// Answer: nothing.
    Plan {
        log: Uuid,
        volume: VolumeId,
        seq: Seq,
        from: u64,
        to: u64,
    },
    /// Answer: nothing.
    Versions {
        log: Uuid,
        volume: VolumeId,
        seq: Option<Seq>,
        from: u64,
        to: u64,
    },
    /// Answer: nothing.
    Read {
        log: Uuid,
        segment: u64,
        offset: u64,
        bytes: u64,
    },
    /// Answer: nothing.
    Groups { log: Uuid, groups: Vec<GroupAt> },
    /// Answer: the Seq to go on from, or none.
    Heads { log: Uuid, seqs: RangeInclusive<Seq> },
    /// Answer: a report.
    Verify { log: Uuid },
}

/// One history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Told {
    pub(crate) label: String,
    pub(crate) age: usize,
    pub(crate) log: Uuid,
}

/// One history, for a server that follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listed {
    pub(crate) agent: AgentName,
    pub(crate) log: Uuid,
    pub(crate) created: jiff::Timestamp,
    /// Its last durable record, 0 if there is none; nothing while nobody has asked for its records.
    pub(crate) durable: Option<u64>,
    /// Somebody writes to it.
    pub(crate) live: bool,
    /// See [`crate::site::Upstream`].
    pub(crate) via: Vec<String>,
    /// How far behind where it comes from it is itself; nothing where that is not known, and from earlier builds.
    #[serde(default)]
    pub(crate) behind: Option<Behind>,
}

/// How far behind its source a history is at the server that lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Behind {
    /// Last durable record of the source, 0 if there is none.
    pub(crate) source_seq: u64,
    pub(crate) lag_ns: u64,
    pub(crate) backlog_bytes: u64,
}

/// A store as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct About {
    pub(crate) live: bool,
    pub(crate) log_bytes: u64,
    pub(crate) head: Option<Point>,
}

/// Why a question was not answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "kebab-case")]
pub(crate) enum Fault {
    Damaged {
        path: PathBuf,
        offset: u64,
        what: String,
        seqs: Option<(Seq, Seq)>,
    },
    OutOfRange {
        offset: u64,
        len: u64,
        bytes: u64,
    },
    NoVolume {
        volume: VolumeId,
        seq: Seq,
    },
    NotExact {
        reason: Box<NotExact>,
    },
    Future {
        wall: WallNs,
        covered_until: Option<WallNs>,
    },
    NotCovered {
        wall: WallNs,
        covered_until: Option<WallNs>,
    },
    BeyondHead {
        seq: Seq,
        head: Option<Seq>,
    },
    NoBookmark {
        label: String,
    },
    Other {
        why: String,
    },
}

impl From<ReadError> for Fault {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Damaged {
                path,
                offset,
                what,
                seqs,
            } => Self::Damaged {
                path,
                offset,
                what,
                seqs,
            },
            ReadError::OutOfRange { offset, len, bytes } => Self::OutOfRange { offset, len, bytes },
            ReadError::NoVolume { volume, seq } => Self::NoVolume { volume, seq },
            other => Self::other(&other),
        }
    }
}

impl From<WhenError> for Fault {
    fn from(error: WhenError) -> Self {
        match error {
            WhenError::NotExact(reason) => Self::NotExact { reason },
            WhenError::Future { wall, covered_until } => Self::Future { wall, covered_until },
            WhenError::NotCovered { wall, covered_until } => Self::NotCovered { wall, covered_until },
            WhenError::BeyondHead { seq, head } => Self::BeyondHead { seq, head },
            WhenError::NoBookmark { label } => Self::NoBookmark { label },
            WhenError::Read(error) => error.into(),
        }
    }
}

impl Fault {
    /// With every cause of it, for what has no form of its own.
    pub(crate) fn other(error: &dyn std::error::Error) -> Self {
        let mut why = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            why.push_str(&format!(": {error}"));
            cause = error.source();
        }
        Self::Other { why }
    }

    fn into_read(self, server: &str) -> ReadError {
        match self {
            Self::Damaged {
                path,
                offset,
                what,
                seqs,
            } => ReadError::Damaged {
                path,
                offset,
                what,
                seqs,
            },
            Self::OutOfRange { offset, len, bytes } => ReadError::OutOfRange { offset, len, bytes },
            Self::NoVolume { volume, seq } => ReadError::NoVolume { volume, seq },
            Self::Other { why } => ReadError::Server {
                server: server.to_owned(),
                why,
            },
            other => ReadError::Server {
                server: server.to_owned(),
                why: format!("an answer to another question: {other:?}"),
            },
        }
    }

    fn into_when(self, server: &str) -> WhenError {
        match self {
            Self::NotExact { reason } => WhenError::NotExact(reason),
            Self::Future { wall, covered_until } => WhenError::Future { wall, covered_until },
            Self::NotCovered { wall, covered_until } => WhenError::NotCovered { wall, covered_until },
            Self::BeyondHead { seq, head } => WhenError::BeyondHead { seq, head },
            Self::NoBookmark { label } => WhenError::NoBookmark { label },
            other => WhenError::Read(other.into_read(server)),
        }
    }
}
