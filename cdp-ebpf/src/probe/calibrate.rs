//! Where the bytes of a page lie: learned from a buffer of a device of our own.

use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::BtfTracePointContext;

use super::kernel::{disk_of, field, kernel};

/// What calibration learned: [page address, address of its bytes, count].
#[map]
pub(super) static LEARNED: Array<u64> = Array::with_max_entries(4, 0);

/// Calibration only: learns where the bytes of one page lie, from a buffer that names both.
#[btf_tracepoint(function = "block_touch_buffer")]
pub(super) fn buffer_touched(ctx: BtfTracePointContext) -> i32 {
    let buffer: *const u8 = ctx.arg(0);
    // SAFETY: the tracepoint's argument, a `struct buffer_head`.
    let (page, data, bdev): (u64, u64, *const u8) = unsafe {
        (
            field(buffer, kernel!(bh_page)),
            field(buffer, kernel!(bh_data)),
            field(buffer, kernel!(bh_bdev)),
        )
    };
    if disk_of(bdev) != kernel!(calibrate_disk) {
        return 0;
    }
    let first = data >> kernel!(page_shift) << kernel!(page_shift);
    if LEARNED.set(0, page, 0).is_ok() && LEARNED.set(1, first, 0).is_ok() {
        let _ = LEARNED.set(2, 1, 0);
    }
    0
}
