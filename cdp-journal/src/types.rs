//! A type for every number that must not be mixed up with another.

use std::fmt;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// Smallest unit of a write to a block device.
pub const SECTOR_BYTES: u64 = 512;
/// What the index addresses: one key per block and version.
pub const BLOCK_BYTES: u64 = 4096;
/// An aligned run of blocks that the index can address with one key.
pub const UNIT_BYTES: u64 = 65536;
/// Sectors in a block.
pub const SECTORS_PER_BLOCK: u64 = BLOCK_BYTES / SECTOR_BYTES;
/// Blocks in a unit.
pub const BLOCKS_PER_UNIT: u64 = UNIT_BYTES / BLOCK_BYTES;

const _: () = assert!(SECTORS_PER_BLOCK == 8); // a block's sectors fit a mask of one byte

/// Place of a record in its agent's order. Dense from 1: a missing number is a lost record.
///
/// "Nothing yet" is spelled `Option<Seq>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Seq(NonZeroU64);

impl Seq {
    /// The first record of a store.
    pub const FIRST: Seq = Seq(NonZeroU64::MIN);

    /// `None` if `number` is 0.
    pub const fn new(number: u64) -> Option<Self> {
        match NonZeroU64::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// The Seq after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        self.plus(1)
    }

    /// The Seq before this one; `None` for the first.
    pub const fn prev(self) -> Option<Self> {
        Self::new(self.get() - 1)
    }

    /// The Seq `count` records later. (2^64 records are out of reach: it saturates.)
    #[must_use]
    pub const fn plus(self, count: u64) -> Self {
        Self(self.0.saturating_add(count))
    }

    /// The Seq that follows `last`, which is the first one if there is none.
    #[must_use]
    pub const fn after(last: Option<Self>) -> Self {
        match last {
            Some(last) => last.next(),
            None => Self::FIRST,
        }
    }

    /// As a number in which 0 stands for "nothing yet", as formats store it.
    pub(crate) const fn number_of(seq: Option<Self>) -> u64 {
        match seq {
            Some(seq) => seq.get(),
            None => 0,
        }
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names a volume inside one store. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VolumeId(std::num::NonZeroU16);

impl VolumeId {
    /// `None` if `number` is 0, which stands for "no volume".
    pub const fn new(number: u16) -> Option<Self> {
        match std::num::NonZeroU16::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `CLOCK_BOOTTIME` of the host at capture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootNs(pub u64);

impl BootNs {
    /// Wall time, given the offset of the frame that holds the record.
    pub fn at_offset(self, wall_offset_ns: i64) -> WallNs {
        let ns = i128::from(self.0) + i128::from(wall_offset_ns);
        WallNs(ns.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64)
    }
}

/// Nanoseconds since 1970-01-01T00:00:00Z. Names moments; order comes from [`Seq`] alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WallNs(pub i64);

impl WallNs {
    /// Before every time.
    pub const MIN: WallNs = WallNs(i64::MIN);

    /// The system's clock.
    pub fn now() -> Self {
        Self::from(jiff::Timestamp::now())
    }

    /// As a timestamp, for printing.
    pub fn timestamp(self) -> jiff::Timestamp {
        jiff::Timestamp::from_nanosecond(i128::from(self.0)).unwrap_or(jiff::Timestamp::UNIX_EPOCH)
    }

    /// This time and `duration` later.
    #[must_use]
    pub fn saturating_add(self, duration: std::time::Duration) -> Self {
        Self(
            self.0
                .saturating_add(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)),
        )
    }

    /// This time and `duration` earlier.
    #[must_use]
    pub fn saturating_sub(self, duration: std::time::Duration) -> Self {
        Self(
            self.0
                .saturating_sub(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)),
        )
    }
}

impl From<jiff::Timestamp> for WallNs {
    fn from(timestamp: jiff::Timestamp) -> Self {
        let ns = timestamp.as_nanosecond();
        Self(ns.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64)
    }
}

/// RFC 3339 with nine digits of a second, in UTC.
impl fmt::Display for WallNs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.9}", self.timestamp())
    }
}

/// Names a segment by the first [`Seq`] it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub Seq);

impl SegmentId {
    /// `00000000000000000001.seg`: sorts as the numbers do.
    pub fn file_name(self) -> String {
        format!("{:020}.seg", self.0.get())
    }

    /// The reverse of [`SegmentId::file_name`].
    pub fn from_file_name(name: &str) -> Option<Self> {
        let digits = name.strip_suffix(".seg").filter(|digits| digits.len() == 20)?;
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        Seq::new(digits.parse().ok()?).map(Self)
    }
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_name_reads_back() {
        let id = SegmentId(Seq::new(42).unwrap());
        assert_eq!(id.file_name(), "00000000000000000042.seg");
        assert_eq!(SegmentId::from_file_name(&id.file_name()), Some(id));
        for name in [
            "42.seg",
            "00000000000000000000.seg",
            "0000000000000000004x.seg",
            "x",
        ] {
            assert_eq!(SegmentId::from_file_name(name), None, "{name}");
        }
    }

    #[test]
    fn wall_time_prints_nine_digits() {
        assert_eq!(
            WallNs(1_500_000_000).to_string(),
            "1970-01-01T00:00:01.500000000Z"
        );
        assert_eq!(BootNs(5).at_offset(-2), WallNs(3));
    }
}
