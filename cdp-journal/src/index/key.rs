//! Keys of the index. Big-endian, so that they sort as the numbers do.
//!
//! | key                                             | value                                         |
//! |-------------------------------------------------|-----------------------------------------------|
//! | `v` volume(2) level(1) unit(8) inverted Seq(8)  | where the bytes lie, see [`super::version`]   |
//! | `f` first Seq(8)                                | where a frame lies, see [`super::FrameEntry`] |
//! | `w` running maximum of wall time(8) first Seq(8)| nothing; only where the maximum rises         |
//! | `h` volume(2) Seq(8) kind(1)                    | an event of history, JSON                     |
//! | `m` name                                        | the index's own state                         |

use std::cmp::Ordering;

use crate::types::{BLOCK_BYTES, UNIT_BYTES};

/// The sizes of range that one key can speak of. Data uses the first two, zeroes all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Level {
    /// 4 KiB.
    Block = 0,
    /// 64 KiB.
    Unit = 1,
    /// 16 MiB.
    Span = 2,
    /// 4 GiB.
    Region = 3,
}

impl Level {
    /// From the largest to the smallest.
    pub(crate) const DOWN: [Level; 4] = [Level::Region, Level::Span, Level::Unit, Level::Block];

    /// Blocks in one unit of this level, as a power of two.
    pub(crate) const fn block_bits(self) -> u32 {
        match self {
            Self::Block => 0,
            Self::Unit => 4,
            Self::Span => 12,
            Self::Region => 20,
        }
    }

    pub(crate) const fn blocks(self) -> u64 {
        1 << self.block_bits()
    }

    pub(crate) const fn bytes(self) -> u64 {
        self.blocks() * BLOCK_BYTES
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::DOWN.into_iter().find(|level| *level as u8 == code)
    }
}

const _: () = assert!(Level::Unit.bytes() == UNIT_BYTES);
const _: () = assert!(Level::Span.blocks() == CHUNK_BLOCKS);

/// Blocks that are looked up together.
pub(crate) const CHUNK_BLOCKS: u64 = 4096;

/// Names a version of a unit. Sorts the newest version first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VersionKey {
    pub(crate) volume: u16,
    pub(crate) level: Level,
    pub(crate) unit: u64,
    inverted_seq: u64,
}

impl VersionKey {
    pub(crate) const BYTES: usize = 20;
    pub(crate) const PREFIX: u8 = b'v';

    /// `seq` 0 is the version before everything.
    pub(crate) fn new(volume: u16, level: Level, unit: u64, seq: u64) -> Self {
        Self {
            volume,
            level,
            unit,
            inverted_seq: !seq,
        }
    }

    /// Sorts before every version of the unit.
    pub(crate) fn newest_of(volume: u16, level: Level, unit: u64) -> Self {
        Self::new(volume, level, unit, u64::MAX)
    }

    pub(crate) fn seq(&self) -> u64 {
        !self.inverted_seq
    }

    pub(crate) fn same_unit(&self, other: &Self) -> bool {
        (self.volume, self.level, self.unit) == (other.volume, other.level, other.unit)
    }

    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = Self::PREFIX;
        bytes[1..3].copy_from_slice(&self.volume.to_be_bytes());
        bytes[3] = self.level as u8;
        bytes[4..12].copy_from_slice(&self.unit.to_be_bytes());
        bytes[12..20].copy_from_slice(&self.inverted_seq.to_be_bytes());
        bytes
    }

    /// All but the Seq, as one number that sorts as the parts do one by one.
    fn place(&self) -> u128 {
        u128::from(self.volume) << 72 | u128::from(self.level as u8) << 64 | u128::from(self.unit)
    }

    /// `None` if it is a key of another kind.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != Self::BYTES || bytes[0] != Self::PREFIX {
            return None;
        }
        Some(Self {
            volume: u16::from_be_bytes(bytes[1..3].try_into().ok()?),
            level: Level::from_code(bytes[3])?,
            unit: be_u64(&bytes[4..12])?,
            inverted_seq: be_u64(&bytes[12..20])?,
        })
    }
}

/// The order of the encoded keys; compared as numbers, since memory is searched for them all the time.
impl Ord for VersionKey {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.place(), self.inverted_seq).cmp(&(other.place(), other.inverted_seq))
    }
}

impl PartialOrd for VersionKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

pub(crate) fn be_u64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

pub(crate) fn frame_key(first_seq: u64) -> [u8; 9] {
    let mut key = [b'f'; 9];
    key[1..].copy_from_slice(&first_seq.to_be_bytes());
    key
}

/// `wall_ns` is biased so that negative times sort first.
pub(crate) fn wall_key(wall_ns: i64, first_seq: u64) -> [u8; 17] {
    let mut key = [b'w'; 17];
    let biased = wall_ns.cast_unsigned() ^ (1 << 63);
    key[1..9].copy_from_slice(&biased.to_be_bytes());
    key[9..].copy_from_slice(&first_seq.to_be_bytes());
    key
}

pub(crate) fn event_key(volume: u16, seq: u64, kind: u8) -> [u8; 12] {
    let mut key = [b'h'; 12];
    key[1..3].copy_from_slice(&volume.to_be_bytes());
    key[3..11].copy_from_slice(&seq.to_be_bytes());
    key[11] = kind;
    key
}

pub(crate) const META_IDENTITY: &[u8] = b"midentity";
pub(crate) const META_APPLIED: &[u8] = b"mapplied";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_by_place_and_then_newest_first() {
        let keys = [
            VersionKey::newest_of(1, Level::Block, 7),
            VersionKey::new(1, Level::Block, 7, 300),
            VersionKey::new(1, Level::Block, 7, 2),
            VersionKey::new(1, Level::Block, 7, 0),
            VersionKey::new(1, Level::Block, 256, 9),
            VersionKey::new(1, Level::Unit, 0, 9),
            VersionKey::new(2, Level::Block, 0, 9),
        ];
        assert!(keys.is_sorted());
        assert!(keys.map(|key| key.encode()).is_sorted());
        for key in keys {
            assert_eq!(VersionKey::decode(&key.encode()), Some(key));
        }
    }

    #[test]
    fn wall_keys_sort_by_time() {
        assert!(
            [i64::MIN, -1, 0, 1, i64::MAX]
                .map(|wall| wall_key(wall, 5))
                .is_sorted()
        );
    }
}
