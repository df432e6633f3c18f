//! Keys, values and sizes of the maps that the probe and the agent share.

/// How many disks can be watched at once.
pub const DISKS_MAX: u32 = 16;

/// How many ranges (volumes) of one disk can be watched at once.
pub const RANGES_MAX: usize = 8;

/// Sectors `start..end` of a disk.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SectorRange {
    /// First sector in.
    pub start: u64,
    /// First sector out.
    pub end: u64,
}

/// Value of the map `DISKS`, whose key is the disk's number. A bio is captured when it touches any of the
/// ranges; the agent cuts it to each volume.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskFilter {
    /// Which row of counters and which stretch of the dirty map are this disk's; below [`DISKS_MAX`].
    pub slot: u32,
    /// A region of the dirty map is `512 << region_shift` bytes.
    pub region_shift: u32,
    /// Unused ranges are empty (0..0).
    pub ranges: [SectorRange; RANGES_MAX],
}

/// Why a write could not be captured.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The ring had no room.
    RingFull = 0,
    /// A page of the bio could not be read.
    Unreadable = 1,
    /// The bio had more parts than the probe walks.
    Bound = 2,
    /// An operation that the probe does not know (zone append, zone reset).
    Unsupported = 3,
}

/// How many values [`Cause`] has.
pub const CAUSES: usize = 4;

impl Cause {
    /// All causes, in the order of their numbers.
    pub const ALL: [Self; CAUSES] = [Self::RingFull, Self::Unreadable, Self::Bound, Self::Unsupported];
}

/// A row of the map `COUNTERS`: index `slot * COUNTERS_PER_DISK + counter`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Bios captured whole.
    CapturedBios = 0,
    /// Bytes of them.
    CapturedBytes = 1,
    /// Completions that did not fit in the ring.
    LostCompletions = 2,
    /// Boot time of the first drop since the agent last set this to 0.
    FirstDropNs = 3,
    /// Bios dropped, by [`Cause`]: this one and the following [`CAUSES`] - 1.
    Dropped = 8,
}

/// Counters of one disk.
pub const COUNTERS_PER_DISK: u32 = 16;

const _: () = assert!(Counter::Dropped as usize + CAUSES <= COUNTERS_PER_DISK as usize);

/// 64-bit words of the dirty map that each disk has. The region size grows with the disk so that they
/// suffice: 8 388 608 regions, 512 GiB at 64 KiB.
pub const DIRTY_WORDS_PER_DISK: u32 = 1 << 17;

/// 64-bit words of the map `NOTES`, in which an agent notes what the agent after it needs.
pub const NOTES_WORDS: u32 = 2048;
