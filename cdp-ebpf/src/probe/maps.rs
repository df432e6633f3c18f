//! The maps that the probe shares with the agent.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, RingBuf};
use cdp_ebpf::event::SECTOR_BYTES;
use cdp_ebpf::map::{
    COUNTERS_PER_DISK, DIRTY_WORDS_PER_DISK, DISKS_MAX, DiskFilter, NOTES_WORDS, RANGES_MAX,
};

use super::kernel::kernel;

const BPF_F_MMAPABLE: u32 = 1 << 10;
pub(super) const BPF_RB_NO_WAKEUP: u64 = 1;
const BPF_RB_FORCE_WAKEUP: u64 = 2;
const BPF_RB_AVAIL_DATA: u64 = 0;

/// Captured events. The agent sets the size.
#[map]
pub(super) static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// Watched disks by number.
#[map]
pub(super) static DISKS: HashMap<u32, DiskFilter> = HashMap::with_max_entries(DISKS_MAX, 0);

/// `Counter`s, a row for each disk.
#[map]
pub(super) static COUNTERS: Array<u64> =
    Array::with_max_entries(DISKS_MAX * COUNTERS_PER_DISK, BPF_F_MMAPABLE);

/// One bit for each region of each watched disk: set, and the region's bytes are not what the ring says.
#[map]
pub(super) static DIRTY: Array<u64> =
    Array::with_max_entries(DISKS_MAX * DIRTY_WORDS_PER_DISK, BPF_F_MMAPABLE);

#[inline(always)]
pub(super) fn watched(disk: u32, sector: u64, bytes: u32) -> Option<(u32, u32)> {
    // SAFETY: the reference ends with this program's run; entries are only replaced as a whole.
    let filter = unsafe { DISKS.get(disk) }?;
    let end = sector + u64::from(bytes).div_ceil(SECTOR_BYTES);
    let mut hit = false;
    for i in 0..RANGES_MAX {
        let range = &filter.ranges[i];
        hit |= sector < range.end && end > range.start;
        // An empty flush lies nowhere: it concerns every volume of the disk.
        hit |= bytes == 0 && range.end > range.start;
    }
    if hit {
        Some((filter.slot, filter.region_shift))
    } else {
        None
    }
}

/// Wakes the agent only when a quarter of the ring waits: it comes by itself every few milliseconds, and
/// a wake-up for each write would cost production more than the capture.
#[inline(always)]
pub(super) fn ring_flags() -> u64 {
    if EVENTS.query(BPF_RB_AVAIL_DATA) > kernel!(ring_bytes) / 4 {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    }
}

/// What the agent notes for the agent after it; the probe does not look at it. It lives as long as the rest.
#[map]
pub(super) static NOTES: Array<u64> = Array::with_max_entries(NOTES_WORDS, BPF_F_MMAPABLE);
