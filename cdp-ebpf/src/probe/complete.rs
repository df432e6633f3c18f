//! A write has ended, well or badly.

use core::ffi::c_void;
use core::ptr::read_volatile;

use aya_ebpf::helpers::{bpf_loop, bpf_probe_read_kernel};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::BtfTracePointContext;
use cdp_ebpf::event::{CompleteEvent, EventKind, Op};
use cdp_ebpf::map::Counter;

use super::kernel::{boot_ns, disk_of, field, kernel, op_of, this_cpu};
use super::loss::{add, counter_index, mark};
use super::maps::{DISKS, EVENTS, ring_flags};
use super::pages;

/// Bios of one request whose discards are listed one by one.
const REQUEST_BIOS_MAX: u32 = 1 << 10;

/// One for each CPU; the agent sets the count.
#[map]
pub(super) static WALK: Array<Walk> = Array::with_max_entries(1, 0);

/// State of the walk along a request's bios.
#[repr(C)]
pub(super) struct Walk {
    bio: u64,
    remaining: u32,
    disk: u32,
    slot: u32,
    region_shift: u32,
    op: u8,
    failed: u8,
    reserved: [u8; 6],
}

/// A request-based driver has ended (a part of) a request.
#[btf_tracepoint(function = "block_rq_complete")]
pub(super) fn request_completed(ctx: BtfTracePointContext) -> i32 {
    let request: *const u8 = ctx.arg(0);
    let error: u32 = ctx.arg(1);
    let bytes: u32 = ctx.arg(2);
    // SAFETY: the tracepoint's argument, a `struct request`.
    let (opf, bio): (u32, *const u8) = unsafe {
        (
            field(request, kernel!(rq_cmd_flags)),
            field(request, kernel!(rq_bio)),
        )
    };
    if opf & 1 == 0 || bio.is_null() || bytes == 0 {
        return 0;
    }
    // SAFETY: the request's first bio, loaded from it; the sector as above.
    let (bdev, sector): (*const u8, u64) =
        unsafe { (field(bio, kernel!(bio_bdev)), field(request, kernel!(rq_sector))) };
    let disk = disk_of(bdev);
    // SAFETY: as in `watched`.
    let Some(filter) = (unsafe { DISKS.get(disk) }) else {
        return 0;
    };
    let Some(op) = op_of(opf, bytes) else {
        return 0;
    };
    let (slot, region_shift) = (filter.slot, filter.region_shift);
    let failed = u8::from(error != 0);
    if op as u8 == Op::Discard as u8 {
        // Discards of one request need not lie side by side: list its bios.
        let cpu = this_cpu();
        let Some(walk) = WALK.get_ptr_mut(cpu) else {
            return 0;
        };
        // SAFETY: this CPU's own, see the module's head; written before bpf_loop runs.
        unsafe {
            *walk = Walk {
                bio: bio as u64,
                remaining: bytes,
                disk,
                slot,
                region_shift,
                op: op as u8,
                failed,
                reserved: [0; 6],
            };
        }
        // SAFETY: `walk_step` has the signature that bpf_loop asks for and takes no context.
        unsafe {
            bpf_loop(
                REQUEST_BIOS_MAX,
                walk_step as *mut c_void,
                core::ptr::null_mut(),
                0,
            );
        }
        // SAFETY: as above. Through the raw pointer, because `walk_step` has changed what it points at.
        if unsafe { read_volatile(&raw const (*walk).remaining) } != 0 {
            // More bios than we list: the agent forgets what is in flight rather than wait for ever.
            add(counter_index(slot, Counter::LostCompletions as u32), 1);
        }
        return 0;
    }
    let event = ended(op as u8, failed, disk, sector, bytes);
    let is_plain = failed != 0 || op as u8 != Op::Write as u8;
    if is_plain || pages::look_at_request(slot, region_shift, &event, bio) {
        complete(slot, region_shift, event);
    } else {
        unsaid(slot);
    }
    0
}

pub(super) extern "C" fn walk_step(_step: u64, _context: *mut c_void) -> i64 {
    let cpu = this_cpu();
    let Some(walk) = WALK.get_ptr_mut(cpu) else {
        return 1;
    };
    // SAFETY: as in `copy_step`.
    let walk = unsafe { &mut *walk };
    if walk.bio == 0 || walk.remaining == 0 {
        return 1;
    }
    let (next, sector, bytes): (Result<u64, i32>, Result<u64, i32>, Result<u32, i32>) = unsafe {
        // SAFETY: probe reads fail cleanly on any address.
        (
            bpf_probe_read_kernel((walk.bio + u64::from(kernel!(bio_next))) as *const u64),
            bpf_probe_read_kernel((walk.bio + u64::from(kernel!(bio_sector))) as *const u64),
            bpf_probe_read_kernel((walk.bio + u64::from(kernel!(bio_size))) as *const u32),
        )
    };
    let (Ok(next), Ok(sector), Ok(mut bytes)) = (next, sector, bytes) else {
        return 1;
    };
    if bytes > walk.remaining {
        bytes = walk.remaining;
    }
    walk.remaining -= bytes;
    walk.bio = next;
    complete(
        walk.slot,
        walk.region_shift,
        ended(walk.op, walk.failed, walk.disk, sector, bytes),
    );
    0
}

/// A bio-based driver has ended a bio. Request-based drivers do not come by here.
#[btf_tracepoint(function = "block_bio_complete")]
pub(super) fn bio_completed(ctx: BtfTracePointContext) -> i32 {
    let bio: *const u8 = ctx.arg(1);
    // SAFETY: the tracepoint's argument, a `struct bio`.
    let (opf, bdev): (u32, *const u8) =
        unsafe { (field(bio, kernel!(bio_opf)), field(bio, kernel!(bio_bdev))) };
    if opf & 1 == 0 || bdev.is_null() {
        return 0;
    }
    let disk = disk_of(bdev);
    // SAFETY: as in `watched`.
    let Some(filter) = (unsafe { DISKS.get(disk) }) else {
        return 0;
    };
    // SAFETY: as above.
    let (sector, bytes, status): (u64, u32, u8) = unsafe {
        (
            field(bio, kernel!(bio_sector)),
            field(bio, kernel!(bio_size)),
            field(bio, kernel!(bio_status)),
        )
    };
    // The driver may have moved the bio's iterator to its end: the length is what is left of it.
    let op = match op_of(opf, 1) {
        Some(op) => op as u8,
        None => return 0,
    };
    let (slot, region_shift) = (filter.slot, filter.region_shift);
    let event = CompleteEvent {
        whole_bio: 1,
        bio: bio as u64,
        ..ended(op, u8::from(status != 0), disk, sector, bytes)
    };
    let is_plain = status != 0 || op != Op::Write as u8;
    if is_plain || pages::look_at_bio(slot, region_shift, &event, bio) {
        complete(slot, region_shift, event);
    } else {
        unsaid(slot);
    }
    0
}

/// An end without the news that pages were changed would say that all is well: neither is told, so that the write
/// counts as in flight until it is compared.
#[inline(always)]
fn unsaid(slot: u32) {
    add(counter_index(slot, Counter::LostCompletions as u32), 1);
}

/// This range has ended, now.
#[inline(always)]
fn ended(op: u8, failed: u8, disk: u32, sector: u64, bytes: u32) -> CompleteEvent {
    CompleteEvent {
        kind: EventKind::Complete as u8,
        op,
        failed,
        whole_bio: 0,
        disk,
        bio: 0,
        boot_ns: boot_ns(),
        sector,
        bytes,
        reserved: 0,
    }
}

/// Puts a completion in the ring; one that does not fit leaves a mark, like any loss.
#[inline(always)]
pub(super) fn complete(slot: u32, region_shift: u32, event: CompleteEvent) {
    let flags = ring_flags();
    match EVENTS.reserve::<CompleteEvent>(0) {
        Some(mut entry) => {
            entry.write(event);
            entry.submit(flags);
        }
        None => {
            mark(slot, region_shift, event.sector, event.bytes);
            add(counter_index(slot, Counter::LostCompletions as u32), 1);
        }
    }
}
