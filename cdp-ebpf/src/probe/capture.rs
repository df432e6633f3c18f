//! A write is queued: its bytes go into the ring, in chunks.

use core::ffi::c_void;
use core::mem::size_of;
use core::ptr::{addr_of, addr_of_mut, read_volatile};

use aya_ebpf::helpers::{bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_loop, generated};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::BtfTracePointContext;
use cdp_ebpf::event::{
    CHUNK_ALIGN_BYTES, CHUNK_BYTES, EventKind, FLAG_FUA, FLAG_META, FLAG_PREFLUSH, FLAG_SYNC, Op,
    SECTOR_BYTES, WriteEvent,
};
use cdp_ebpf::map::{Cause, Counter};

use super::STEPS_MAX;
use super::kernel::{OP_MASK, boot_ns, disk_of, field, kernel, op_of, page_bytes, part_at, this_cpu};
use super::loss::{add, counter_index, drop_write};
use super::maps::{BPF_RB_NO_WAKEUP, EVENTS, ring_flags, watched};

/// The most bytes that one step copies: a step's place in the scratch area is below `CHUNK_BYTES`, so the
/// area has this much slack behind it and the verifier need not relate place to length.
const STEP_BYTES: u32 = 64 * 1024;
/// A bio of this many bytes in one part takes the short way.
const SMALL_BYTES: u32 = 4096;

/// One area for each CPU; the agent sets the count.
#[map]
pub(super) static SCRATCH: Array<Scratch> = Array::with_max_entries(1, 0);

/// A small write and its bytes.
#[repr(C)]
pub(super) struct SmallWrite {
    event: WriteEvent,
    data: [u8; SMALL_BYTES as usize],
}

/// State of the copy of one bio, and the event under construction.
#[repr(C)]
pub(super) struct Scratch {
    bvec_address: u64,
    bvec_done: u32,
    remaining: u32,
    fill: u32,
    limit: u32,
    cause: u32,
    reserved: u32,
    event: WriteEvent,
    data: [u8; (CHUNK_BYTES + STEP_BYTES) as usize],
}

/// `cause` while nothing has gone wrong.
pub(super) const CAUSE_NONE: u32 = u32::MAX;

/// Fires once for each bio of each driver, its data still in its pages.
#[btf_tracepoint(function = "block_bio_queue")]
pub(super) fn write_queued(ctx: BtfTracePointContext) -> i32 {
    let bio: *const u8 = ctx.arg(0);
    // SAFETY: the tracepoint's argument, a `struct bio`.
    let (opf, bdev): (u32, *const u8) =
        unsafe { (field(bio, kernel!(bio_opf)), field(bio, kernel!(bio_bdev))) };
    // The kernel gives all operations that change a disk odd numbers, flush apart.
    if opf & 1 == 0 && opf & OP_MASK != kernel!(op_flush) {
        return 0;
    }
    let disk = disk_of(bdev);
    // SAFETY: as above.
    let (sector, bytes): (u64, u32) =
        unsafe { (field(bio, kernel!(bio_sector)), field(bio, kernel!(bio_size))) };
    let Some((slot, region_shift)) = watched(disk, sector, bytes) else {
        return 0;
    };
    let now_ns = boot_ns();
    let Some(op) = op_of(opf, bytes) else {
        drop_write(
            slot,
            region_shift,
            sector,
            bytes,
            Cause::Unsupported as u32,
            now_ns,
        );
        return 0;
    };
    let cpu = this_cpu();
    let Some(scratch) = SCRATCH.get_ptr_mut(cpu) else {
        drop_write(slot, region_shift, sector, bytes, Cause::Bound as u32, now_ns);
        return 0;
    };
    // SAFETY: this CPU's own area, see the module's head; the reference ends before bpf_loop runs.
    let event = unsafe { &mut (*scratch).event };
    event.kind = EventKind::Write as u8;
    event.op = op as u8;
    event.flags = flags_of(opf);
    event.last = 1;
    event.disk = disk;
    event.bio = bio as u64;
    event.boot_ns = now_ns;
    event.sector = sector;
    event.bytes = bytes;
    event.pid = (bpf_get_current_pid_tgid() >> 32) as u32;
    event.comm = bpf_get_current_comm().unwrap_or_default();
    let cause = if op as u8 != Op::Write as u8 {
        put(scratch, 0)
    } else if bytes != SMALL_BYTES {
        copy_bio(bio, scratch, sector, bytes)
    } else {
        match put_small(bio, event) {
            Some(cause) => cause,
            None => copy_bio(bio, scratch, sector, bytes),
        }
    };
    if cause != CAUSE_NONE {
        drop_write(slot, region_shift, sector, bytes, cause, now_ns);
    } else if bytes != 0 {
        add(counter_index(slot, Counter::CapturedBios as u32), 1);
        add(
            counter_index(slot, Counter::CapturedBytes as u32),
            u64::from(bytes),
        );
    }
    0
}

#[inline(always)]
pub(super) fn flags_of(opf: u32) -> u8 {
    let mut flags = 0;
    if opf & kernel!(flag_preflush) != 0 {
        flags |= FLAG_PREFLUSH;
    }
    if opf & kernel!(flag_fua) != 0 {
        flags |= FLAG_FUA;
    }
    if opf & kernel!(flag_sync) != 0 {
        flags |= FLAG_SYNC;
    }
    if opf & kernel!(flag_meta) != 0 {
        flags |= FLAG_META;
    }
    flags
}

/// Puts the event and the `data_bytes` behind it in the ring.
#[inline(always)]
pub(super) fn put(scratch: *mut Scratch, data_bytes: u32) -> u32 {
    if data_bytes > CHUNK_BYTES {
        return Cause::Bound as u32;
    }
    let size = size_of::<WriteEvent>() as u64 + u64::from(data_bytes);
    // SAFETY: `event` and `data` lie behind one another, `data` is at least `CHUNK_BYTES` long.
    let failed = unsafe {
        generated::bpf_ringbuf_output(
            addr_of!(EVENTS).cast_mut().cast(),
            addr_of_mut!((*scratch).event).cast(),
            size,
            ring_flags(),
        )
    };
    if failed == 0 {
        CAUSE_NONE
    } else {
        Cause::RingFull as u32
    }
}

/// Puts the most common bio, one part of [`SMALL_BYTES`], straight into the ring: half the copying. None if
/// it has more parts.
#[inline(always)]
pub(super) fn put_small(bio: *const u8, event: &WriteEvent) -> Option<u32> {
    // SAFETY: the tracepoint's argument.
    let (bvec, done): (u64, u32) = unsafe {
        let index: u32 = field(bio, kernel!(bio_idx));
        let vectors: u64 = field(bio, kernel!(bio_io_vec));
        (
            vectors + u64::from(index) * u64::from(kernel!(bvec_bytes)),
            field(bio, kernel!(bio_bvec_done)),
        )
    };
    let (page, length, offset) = part_at(bvec)?;
    if length < done || length - done < SMALL_BYTES {
        return None;
    }
    let Some(mut entry) = EVENTS.reserve::<SmallWrite>(0) else {
        return Some(Cause::RingFull as u32);
    };
    let small = entry.as_mut_ptr();
    let from = page_bytes(page) + u64::from(offset) + u64::from(done);
    // SAFETY: the entry is ours until it is submitted, and as long as `SmallWrite`.
    let failed = unsafe {
        addr_of_mut!((*small).event).write(*event);
        generated::bpf_probe_read_kernel(
            addr_of_mut!((*small).data).cast(),
            SMALL_BYTES,
            from as *const c_void,
        )
    };
    if failed != 0 {
        entry.discard(BPF_RB_NO_WAKEUP);
        return Some(Cause::Unreadable as u32);
    }
    entry.submit(ring_flags());
    Some(CAUSE_NONE)
}

#[inline(always)]
pub(super) fn copy_bio(bio: *const u8, scratch: *mut Scratch, sector: u64, bytes: u32) -> u32 {
    // SAFETY: the tracepoint's argument; this CPU's own area, written before bpf_loop runs.
    unsafe {
        let scratch = &mut *scratch;
        let index: u32 = field(bio, kernel!(bio_idx));
        let vectors: u64 = field(bio, kernel!(bio_io_vec));
        scratch.bvec_address = vectors + u64::from(index) * u64::from(kernel!(bvec_bytes));
        scratch.bvec_done = field(bio, kernel!(bio_bvec_done));
        scratch.remaining = bytes;
        scratch.fill = 0;
        // The first chunk ends where the later ones begin: at a multiple of the alignment on the disk.
        scratch.limit = CHUNK_BYTES - ((sector * SECTOR_BYTES) as u32 & (CHUNK_ALIGN_BYTES - 1));
        scratch.cause = CAUSE_NONE;
    }
    // SAFETY: `copy_step` has the signature that bpf_loop asks for and takes no context.
    unsafe {
        bpf_loop(STEPS_MAX, copy_step as *mut c_void, core::ptr::null_mut(), 0);
    }
    // SAFETY: as above. Through the raw pointer, because `copy_step` has changed what it points at.
    let (cause, remaining) = unsafe {
        (
            read_volatile(&raw const (*scratch).cause),
            read_volatile(&raw const (*scratch).remaining),
        )
    };
    if cause != CAUSE_NONE {
        return cause;
    }
    if remaining != 0 {
        Cause::Bound as u32
    } else {
        CAUSE_NONE
    }
}

/// Copies one physically contiguous piece of the bio; puts the chunk in the ring when it is full.
pub(super) extern "C" fn copy_step(_step: u64, _context: *mut c_void) -> i64 {
    let cpu = this_cpu();
    let Some(scratch) = SCRATCH.get_ptr_mut(cpu) else {
        return 1;
    };
    // SAFETY: this CPU's own area, and no reference to it is in use while bpf_loop runs.
    let scratch = unsafe { &mut *scratch };
    if scratch.remaining == 0 {
        return 1;
    }
    let bvec = scratch.bvec_address;
    let Some((page, length, offset)) = part_at(bvec) else {
        scratch.cause = Cause::Unreadable as u32;
        return 1;
    };
    let done = scratch.bvec_done;
    if length <= done {
        // An empty part: go on to the next.
        scratch.bvec_address = bvec + u64::from(kernel!(bvec_bytes));
        scratch.bvec_done = 0;
        return 0;
    }
    let fill = scratch.fill;
    let limit = scratch.limit;
    if fill >= CHUNK_BYTES || limit <= fill {
        scratch.cause = Cause::Bound as u32;
        return 1;
    }
    let mut n = length - done;
    if n > scratch.remaining {
        n = scratch.remaining;
    }
    if n > limit - fill {
        n = limit - fill;
    }
    if n > STEP_BYTES {
        n = STEP_BYTES;
    }
    let from = page_bytes(page) + u64::from(offset) + u64::from(done);
    // SAFETY: fill < CHUNK_BYTES and n <= STEP_BYTES, and `data` is as long as both together.
    let failed = unsafe {
        generated::bpf_probe_read_kernel(
            addr_of_mut!(scratch.data).cast::<u8>().add(fill as usize).cast(),
            n,
            from as *const c_void,
        )
    };
    if failed != 0 {
        scratch.cause = Cause::Unreadable as u32;
        return 1;
    }
    let filled = fill + n;
    scratch.fill = filled;
    scratch.remaining -= n;
    if done + n == length {
        scratch.bvec_address = bvec + u64::from(kernel!(bvec_bytes));
        scratch.bvec_done = 0;
    } else {
        scratch.bvec_done = done + n;
    }
    let last = scratch.remaining == 0;
    if filled == limit || last {
        scratch.event.bytes = filled;
        scratch.event.last = u8::from(last);
        let cause = put(scratch, filled);
        if cause != CAUSE_NONE {
            scratch.cause = cause;
            return 1;
        }
        scratch.event.sector += u64::from(filled) / SECTOR_BYTES;
        scratch.fill = 0;
        scratch.limit = CHUNK_BYTES;
    }
    0
}
