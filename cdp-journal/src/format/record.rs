//! One captured change, and its fixed entry in a frame's table.

use std::fmt;

use uuid::Uuid;

use super::{
    RECORD_DATA_BYTES_MAX, RECORD_ENTRY_BYTES, TAIL_BYTES_MAX, VOLUME_BYTES_MAX, bytes_at, u16_at, u32_at,
    u64_at,
};
use crate::types::{BootNs, SECTOR_BYTES, Seq, VolumeId};

/// Who did it. For writeback that is the kernel's flusher, not who dirtied the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Thread group id.
    pub pid: u32,
    /// Command name, zero padded.
    pub comm: [u8; 16],
}

impl Origin {
    /// The command name as text.
    pub fn command(&self) -> String {
        let end = self
            .comm
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(self.comm.len());
        String::from_utf8_lossy(&self.comm[..end]).into_owned()
    }
}

/// What the request carried besides its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordFlags(pub u32);

impl RecordFlags {
    /// A flush of the device's cache came before.
    pub const PREFLUSH: RecordFlags = RecordFlags(1);
    /// Durable on completion (force unit access).
    pub const FUA: RecordFlags = RecordFlags(2);
    /// Somebody waits for it.
    pub const SYNC: RecordFlags = RecordFlags(4);

    /// Both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Are all flags of `other` set?
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What kind of thing a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeKind {
    /// A block device.
    Block,
    /// A directory.
    Tree,
}

impl VolumeKind {
    fn code(self) -> u8 {
        match self {
            Self::Block => 1,
            Self::Tree => 2,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Block),
            2 => Some(Self::Tree),
            _ => None,
        }
    }
}

impl fmt::Display for VolumeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Block => "block",
            Self::Tree => "tree",
        })
    }
}

/// Why history is not exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GapCause {
    /// The first copy was not complete. Never in a [`Body::GapOpen`]: every volume begins so.
    Seeding,
    /// The ring buffer was full, or another bound of the probe was met.
    RingOverflow,
    /// The agent did not run.
    AgentDown,
    /// The host was restarted.
    Reboot,
    /// The device failed a write.
    IoError,
    /// The store was full.
    SpoolFull,
    /// Records are missing from the log.
    LogHole,
    /// The volume was found to have another size: it may have been written to beyond its end since the last look, and what
    /// it gained was not read yet.
    Resized,
    /// More was changed while it was written than could be compared with the device.
    ChangedInFlight,
    /// The volume's device went away, or another one has taken its place.
    Detached,
}

impl GapCause {
    /// The word that the command line uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Seeding => "seeding",
            Self::RingOverflow => "ring-overflow",
            Self::AgentDown => "agent-down",
            Self::Reboot => "reboot",
            Self::IoError => "io-error",
            Self::SpoolFull => "spool-full",
            Self::LogHole => "log-hole",
            Self::Resized => "resized",
            Self::ChangedInFlight => "changed-in-flight",
            Self::Detached => "detached",
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::Seeding => 0,
            Self::RingOverflow => 1,
            Self::AgentDown => 2,
            Self::Reboot => 3,
            Self::IoError => 4,
            Self::SpoolFull => 5,
            Self::LogHole => 6,
            Self::Resized => 7,
            Self::ChangedInFlight => 8,
            Self::Detached => 9,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [
            Self::Seeding,
            Self::RingOverflow,
            Self::AgentDown,
            Self::Reboot,
            Self::IoError,
            Self::SpoolFull,
            Self::LogHole,
            Self::Resized,
            Self::ChangedInFlight,
            Self::Detached,
        ]
        .into_iter()
        .find(|cause| cause.code() == code)
    }
}

impl fmt::Display for GapCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a record says. Offsets and lengths are in bytes and multiples of [`SECTOR_BYTES`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// 1: Bytes were written.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// 2: A range was set to zeroes.
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// 3: A range was discarded; it reads as zeroes.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// 4: The volume has a new size. What lies beyond a smaller one is gone.
    Resize {
        /// The new size.
        bytes: u64,
    },
    /// 5: Bytes read from the device, valid after every record up to `as_of` and before the ones after.
    ReadBack {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// `None`: before everything.
        as_of: Option<Seq>,
    },
    /// 6: The same for a range that read as zeroes.
    ReadBackZero {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// `None`: before everything.
        as_of: Option<Seq>,
    },
    /// 7: Declares a volume, or tells what has changed about it.
    Volume {
        /// Block device or directory.
        kind: VolumeKind,
        /// Its size.
        bytes: u64,
        /// The user's name for it.
        name: String,
        /// Where it was found.
        path: String,
    },
    /// 8: History stops being exact.
    GapOpen {
        /// Why.
        cause: GapCause,
        /// Last record for which it still is.
        last_exact: Option<Seq>,
    },
    /// 9: History is exact from this record on.
    GapClose,
    /// 10: A name for this moment.
    Bookmark {
        /// The name.
        label: String,
    },
    /// 11: The agent started.
    Start {
        /// Which agent.
        agent: Uuid,
        /// Which boot of the host.
        boot_id: Uuid,
    },
    /// 12: The agent stopped as asked.
    Stop,
    /// 13: Nothing happened until here.
    Tick,
    /// 14: A flush without data.
    Barrier,
}

impl Body {
    /// Bytes of data that come with the record.
    pub fn data_bytes(&self) -> u64 {
        match self {
            Self::Write { len, .. } | Self::ReadBack { len, .. } => *len,
            _ => 0,
        }
    }

    /// Bytes that become zeroes without data.
    pub(crate) fn zeroed_bytes(&self) -> u64 {
        match self {
            Self::Zero { len, .. } | Self::Discard { len, .. } | Self::ReadBackZero { len, .. } => *len,
            _ => 0,
        }
    }

    /// Device range the data lies at.
    pub(crate) fn data_offset(&self) -> u64 {
        match self {
            Self::Write { offset, .. } | Self::ReadBack { offset, .. } => *offset,
            _ => 0,
        }
    }

    /// Why this body cannot be stored, if so.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        match self {
            Self::Write { offset, len } | Self::ReadBack { offset, len, .. } => {
                if *len > RECORD_DATA_BYTES_MAX as u64 {
                    return Some("more than 1 MiB of data");
                }
                range_fault(*offset, *len)
            }
            Self::Zero { offset, len }
            | Self::Discard { offset, len }
            | Self::ReadBackZero { offset, len, .. } => range_fault(*offset, *len),
            Self::Resize { bytes } | Self::Volume { bytes, .. } if !bytes.is_multiple_of(SECTOR_BYTES) => {
                Some("the size is not a multiple of 512")
            }
            Self::Resize { bytes } | Self::Volume { bytes, .. } if *bytes > VOLUME_BYTES_MAX => {
                Some("a volume of more than 1 PiB")
            }
            Self::Volume { name, .. } if name.len() > u16::MAX as usize => Some("the name is too long"),
            Self::GapOpen {
                cause: GapCause::Seeding,
                ..
            } => Some("seeding is not a gap to open"),
            _ => None,
        }
    }

    pub(crate) fn tail(&self) -> Vec<u8> {
        match self {
            Self::Volume { name, path, .. } => {
                let name_bytes = u16::try_from(name.len()).unwrap_or(u16::MAX);
                [&name_bytes.to_le_bytes()[..], name.as_bytes(), path.as_bytes()].concat()
            }
            Self::Bookmark { label } => label.as_bytes().to_vec(),
            Self::Start { agent, boot_id } => [agent.as_bytes().as_slice(), boot_id.as_bytes()].concat(),
            _ => Vec::new(),
        }
    }
}

fn range_fault(offset: u64, len: u64) -> Option<&'static str> {
    if len == 0 {
        Some("an empty range")
    } else if !offset.is_multiple_of(SECTOR_BYTES) || !len.is_multiple_of(SECTOR_BYTES) {
        Some("not a multiple of 512")
    } else if offset.checked_add(len).is_none_or(|end| end > VOLUME_BYTES_MAX) {
        Some("beyond the largest volume, 1 PiB")
    } else {
        None
    }
}

/// One captured change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its place in the agent's order.
    pub seq: Seq,
    /// When.
    pub boot_ns: BootNs,
    /// On which volume; `None` for what concerns all.
    pub volume: Option<VolumeId>,
    /// By whom.
    pub origin: Origin,
    /// What the request carried besides.
    pub flags: RecordFlags,
    /// What.
    pub body: Body,
}

impl Record {
    pub(crate) fn encode_entry(&self, tail_bytes: usize) -> [u8; RECORD_ENTRY_BYTES] {
        let mut detail = 0;
        let (mut offset_field, mut len_field, mut other_seq) = (0, 0, 0);
        let kind: u8 = match &self.body {
            Body::Write { offset, len } => {
                (offset_field, len_field) = (*offset, *len);
                1
            }
            Body::Zero { offset, len } => {
                (offset_field, len_field) = (*offset, *len);
                2
            }
            Body::Discard { offset, len } => {
                (offset_field, len_field) = (*offset, *len);
                3
            }
            Body::Resize { bytes } => {
                len_field = *bytes;
                4
            }
            Body::ReadBack { offset, len, as_of } => {
                (offset_field, len_field, other_seq) = (*offset, *len, Seq::number_of(*as_of));
                5
            }
            Body::ReadBackZero { offset, len, as_of } => {
                (offset_field, len_field, other_seq) = (*offset, *len, Seq::number_of(*as_of));
                6
            }
            Body::Volume { kind, bytes, .. } => {
                (detail, len_field) = (kind.code(), *bytes);
                7
            }
            Body::GapOpen { cause, last_exact } => {
                (detail, other_seq) = (cause.code(), Seq::number_of(*last_exact));
                8
            }
            Body::GapClose => 9,
            Body::Bookmark { .. } => 10,
            Body::Start { .. } => 11,
            Body::Stop => 12,
            Body::Tick => 13,
            Body::Barrier => 14,
        };
        let mut entry = [0; RECORD_ENTRY_BYTES];
        entry[0] = kind;
        entry[1] = detail;
        entry[2..4].copy_from_slice(&self.volume.map_or(0, VolumeId::get).to_le_bytes());
        entry[4..8].copy_from_slice(&self.origin.pid.to_le_bytes());
        entry[8..16].copy_from_slice(&self.boot_ns.0.to_le_bytes());
        entry[16..24].copy_from_slice(&offset_field.to_le_bytes());
        entry[24..32].copy_from_slice(&len_field.to_le_bytes());
        entry[32..40].copy_from_slice(&other_seq.to_le_bytes());
        entry[40..56].copy_from_slice(&self.origin.comm);
        entry[56..60].copy_from_slice(&self.flags.0.to_le_bytes());
        entry[60..64].copy_from_slice(&(tail_bytes as u32).to_le_bytes());
        entry
    }

    pub(crate) fn tail_bytes_of(entry: &[u8]) -> usize {
        u32_at(entry, 60) as usize
    }

    /// `None` if the entry or its tail make no sense.
    pub(crate) fn decode(seq: Seq, entry: &[u8], tail: &[u8]) -> Option<Self> {
        if tail.len() > TAIL_BYTES_MAX {
            return None;
        }
        let (offset, len, other) = (u64_at(entry, 16), u64_at(entry, 24), Seq::new(u64_at(entry, 32)));
        let body = match entry[0] {
            1 => Body::Write { offset, len },
            2 => Body::Zero { offset, len },
            3 => Body::Discard { offset, len },
            4 => Body::Resize { bytes: len },
            5 => Body::ReadBack {
                offset,
                len,
                as_of: other,
            },
            6 => Body::ReadBackZero {
                offset,
                len,
                as_of: other,
            },
            7 => {
                let name_bytes = usize::from(u16_at(tail.get(..2)?, 0));
                let name = tail.get(2..2 + name_bytes)?;
                Body::Volume {
                    kind: VolumeKind::from_code(entry[1])?,
                    bytes: len,
                    name: String::from_utf8(name.to_vec()).ok()?,
                    path: String::from_utf8(tail[2 + name_bytes..].to_vec()).ok()?,
                }
            }
            8 => Body::GapOpen {
                cause: GapCause::from_code(entry[1])?,
                last_exact: other,
            },
            9 => Body::GapClose,
            10 => Body::Bookmark {
                label: String::from_utf8(tail.to_vec()).ok()?,
            },
            11 if tail.len() == 32 => Body::Start {
                agent: Uuid::from_bytes(bytes_at(tail, 0)),
                boot_id: Uuid::from_bytes(bytes_at(tail, 16)),
            },
            12 => Body::Stop,
            13 => Body::Tick,
            14 => Body::Barrier,
            _ => return None,
        };
        if body.fault().is_some() {
            return None;
        }
        Some(Self {
            seq,
            boot_ns: BootNs(u64_at(entry, 8)),
            volume: VolumeId::new(u16_at(entry, 2)),
            origin: Origin {
                pid: u32_at(entry, 4),
                comm: bytes_at(entry, 40),
            },
            flags: RecordFlags(u32_at(entry, 56)),
            body,
        })
    }
}
