//! Were the pages of what was written changed on the way?

use core::ffi::c_void;
use core::ptr::read_volatile;

use aya_ebpf::helpers::{bpf_loop, bpf_probe_read_kernel};
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use cdp_ebpf::event::{CompleteEvent, EventKind, SECTOR_BYTES};
use cdp_ebpf::map::Cause;

use super::STEPS_MAX;
use super::kernel::{field, kernel, part_at, this_cpu};
use super::loss::drop_write;
use super::maps::{EVENTS, ring_flags};

/// One for each CPU; the agent sets the count.
#[map]
pub(super) static PAGES_OF_REQUEST: Array<PageWalk> = Array::with_max_entries(1, 0);

/// One for each CPU; the agent sets the count.
#[map]
pub(super) static PAGES_OF_BIO: Array<PageWalk> = Array::with_max_entries(1, 0);

/// State of the look at the pages of what was written.
#[repr(C)]
pub(super) struct PageWalk {
    /// The next bio to look at, 0 for none.
    bio: u64,
    bvec_address: u64,
    bvec_done: u32,
    /// Parts of the bio that are left; they end with `left_in_bio` where that is known.
    bvecs_left: u32,
    left_in_bio: u32,
    /// Bytes of the range that are left.
    left: u32,
    /// Bytes of the range that were looked at.
    at: u32,
    /// The changed pages lie between these, in bytes of the range.
    first: u32,
    end: u32,
    reserved: u32,
}

/// Is all that was written one bio over a user's own buffer (direct I/O)? Its pages are not of the page
/// cache, and tell nothing.
#[inline(always)]
pub(super) fn is_pinned(bio: *const u8, bytes: u32) -> bool {
    // SAFETY: the request's first bio.
    let (flags, size): (u16, u32) =
        unsafe { (field(bio, kernel!(bio_flags)), field(bio, kernel!(bio_size))) };
    u32::from(flags) & kernel!(bio_pinned) != 0 && size >= bytes
}

/// Looks at what a request wrote, from its first bio on. False if it was changed and there was no room to tell.
#[inline(always)]
pub(super) fn look_at_request(slot: u32, region_shift: u32, event: &CompleteEvent, bio: *const u8) -> bool {
    let cpu = this_cpu();
    if is_pinned(bio, event.bytes) {
        return true;
    }
    if let Some(area) = PAGES_OF_REQUEST.get_ptr_mut(cpu) {
        let walk = PageWalk {
            bio: bio as u64,
            bvec_address: 0,
            bvec_done: 0,
            bvecs_left: u32::MAX,
            left_in_bio: 0,
            left: event.bytes,
            at: 0,
            first: u32::MAX,
            end: 0,
            reserved: 0,
        };
        return look_for_changes(slot, region_shift, event, area, page_of_request, walk);
    }
    true
}

/// As [`look_at_request`], of a whole bio: its driver may have moved its iterator, so at all of its parts.
#[inline(always)]
pub(super) fn look_at_bio(slot: u32, region_shift: u32, event: &CompleteEvent, bio: *const u8) -> bool {
    let cpu = this_cpu();
    if is_pinned(bio, 0) {
        return true;
    }
    if let Some(area) = PAGES_OF_BIO.get_ptr_mut(cpu) {
        // SAFETY: the tracepoint's argument, a `struct bio`.
        let (bvecs, vectors): (u16, u64) =
            unsafe { (field(bio, kernel!(bio_vcnt)), field(bio, kernel!(bio_io_vec))) };
        let walk = PageWalk {
            bio: 0,
            bvec_address: vectors,
            bvec_done: 0,
            bvecs_left: u32::from(bvecs),
            left_in_bio: if bvecs == 0 { 0 } else { u32::MAX },
            left: u32::MAX,
            at: 0,
            first: u32::MAX,
            end: 0,
            reserved: 0,
        };
        return look_for_changes(slot, region_shift, event, area, page_of_bio, walk);
    }
    true
}

/// A page of the page cache may be changed while it is written, unless its file system keeps it stable: the
/// disk then gets what we did not see. Such a page is dirty again, or locked by who is about to say so.
/// False if it could not be told.
#[inline(always)]
pub(super) fn look_for_changes(
    slot: u32,
    region_shift: u32,
    event: &CompleteEvent,
    area: *mut PageWalk,
    step: extern "C" fn(u64, *mut c_void) -> i64,
    walk: PageWalk,
) -> bool {
    // SAFETY: this CPU's own area, see the module's head; written before bpf_loop runs, which gets a function
    // of the signature that it asks for. Read through the raw pointer, because the steps have changed it.
    let (first, end) = unsafe {
        *area = walk;
        bpf_loop(STEPS_MAX, step as *mut c_void, core::ptr::null_mut(), 0);
        (
            read_volatile(&raw const (*area).first),
            read_volatile(&raw const (*area).end),
        )
    };
    if end <= first {
        return true;
    }
    let changed = CompleteEvent {
        kind: EventKind::Changed as u8,
        sector: event.sector + u64::from(first) / SECTOR_BYTES,
        bytes: if event.whole_bio == 0 {
            end - first
        } else {
            event.bytes
        },
        ..*event
    };
    match EVENTS.reserve::<CompleteEvent>(0) {
        Some(mut entry) => {
            entry.write(changed);
            entry.submit(ring_flags());
            true
        }
        None => {
            drop_write(
                slot,
                region_shift,
                event.sector,
                event.bytes,
                Cause::RingFull as u32,
                event.boot_ns,
            );
            false
        }
    }
}

pub(super) extern "C" fn page_of_request(_step: u64, _context: *mut c_void) -> i64 {
    let cpu = this_cpu();
    match PAGES_OF_REQUEST.get_ptr_mut(cpu) {
        Some(walk) => page_step(walk),
        None => 1,
    }
}

pub(super) extern "C" fn page_of_bio(_step: u64, _context: *mut c_void) -> i64 {
    let cpu = this_cpu();
    match PAGES_OF_BIO.get_ptr_mut(cpu) {
        Some(walk) => page_step(walk),
        None => 1,
    }
}

/// Looks at one page, or goes on to the next part or bio.
#[inline(always)]
pub(super) fn page_step(walk: *mut PageWalk) -> i64 {
    // SAFETY: as in `copy_step`.
    let walk = unsafe { &mut *walk };
    if walk.left == 0 {
        return 1;
    }
    if walk.left_in_bio == 0 {
        return next_bio(walk);
    }
    let Some((page, length, offset)) = part_at(walk.bvec_address) else {
        return 1;
    };
    let done = walk.bvec_done;
    if length <= done {
        if walk.bvecs_left <= 1 {
            return 1;
        }
        walk.bvecs_left -= 1;
        walk.bvec_address += u64::from(kernel!(bvec_bytes));
        walk.bvec_done = 0;
        return 0;
    }
    let page_bytes = 1u32 << (kernel!(page_shift) & 31);
    let place = offset.wrapping_add(done);
    let mut n = page_bytes - (place & (page_bytes - 1));
    if n > length - done {
        n = length - done;
    }
    if n > walk.left_in_bio {
        n = walk.left_in_bio;
    }
    let index = u64::from(place >> (kernel!(page_shift) & 31));
    if is_changing(page + index * u64::from(kernel!(page_struct_bytes))) {
        if walk.first == u32::MAX {
            walk.first = walk.at;
        }
        walk.end = walk.at + n;
    }
    walk.at += n;
    walk.left -= n;
    walk.left_in_bio -= n;
    walk.bvec_done = done + n;
    0
}

#[inline(always)]
pub(super) fn next_bio(walk: &mut PageWalk) -> i64 {
    let bio = walk.bio;
    if bio == 0 {
        return 1;
    }
    // SAFETY: probe reads fail cleanly on any address.
    let read = unsafe {
        (
            bpf_probe_read_kernel((bio + u64::from(kernel!(bio_next))) as *const u64),
            bpf_probe_read_kernel((bio + u64::from(kernel!(bio_flags))) as *const u16),
            bpf_probe_read_kernel((bio + u64::from(kernel!(bio_size))) as *const u32),
            bpf_probe_read_kernel((bio + u64::from(kernel!(bio_idx))) as *const u32),
            bpf_probe_read_kernel((bio + u64::from(kernel!(bio_bvec_done))) as *const u32),
            bpf_probe_read_kernel((bio + u64::from(kernel!(bio_io_vec))) as *const u64),
        )
    };
    let (Ok(next), Ok(flags), Ok(mut bytes), Ok(index), Ok(done), Ok(vectors)) = read else {
        return 1;
    };
    if bytes > walk.left {
        bytes = walk.left;
    }
    walk.bio = next;
    if u32::from(flags) & kernel!(bio_pinned) != 0 {
        walk.at += bytes;
        walk.left -= bytes;
        return 0;
    }
    walk.bvec_address = vectors + u64::from(index) * u64::from(kernel!(bvec_bytes));
    walk.bvec_done = done;
    walk.left_in_bio = bytes;
    0
}

#[inline(always)]
pub(super) fn is_changing(page: u64) -> bool {
    let (flags, head) = unsafe {
        // SAFETY: probe reads fail cleanly on any address.
        (
            bpf_probe_read_kernel((page + u64::from(kernel!(page_flags))) as *const u64),
            bpf_probe_read_kernel((page + u64::from(kernel!(page_compound_head))) as *const u64),
        )
    };
    let (Ok(mut flags), Ok(head)) = (flags, head) else {
        return false;
    };
    // The flags of a large folio are those of its first page; the others lead there.
    if head & 1 != 0 {
        // SAFETY: as above.
        match unsafe { bpf_probe_read_kernel((head - 1 + u64::from(kernel!(page_flags))) as *const u64) } {
            Ok(of_head) => flags = of_head,
            Err(_) => return false,
        }
    }
    flags & u64::from(kernel!(page_writeback)) != 0 && flags & u64::from(kernel!(page_changing)) != 0
}
