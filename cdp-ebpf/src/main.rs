//! The probe: every write bio of a watched disk goes into the ring, with its bytes.
//!
//! Always true:
//! - A bio of a watched range is either in the ring whole, or counted as dropped by its cause and its whole
//!   range marked in the dirty map. There is no third way out.
//! - The programs write to nothing but their own maps, and never wait.
//! - No offset and no operation code of the kernel is a literal: they come in [`KERNEL`].
//!
//! One program runs on one CPU at a time and does not interrupt itself (the kernel counts the events that
//! it skips for that in `recursion_misses`), so a scratch area for each CPU and program is safe.
#![no_std]
#![no_main]
#![allow(
    internal_features,
    reason = "core offers no read-modify-write atomics on the BPF target"
)]
#![allow(missing_docs, reason = "the program macros make undocumented functions")]
#![feature(core_intrinsics)]
#![allow(
    unsafe_code,
    reason = "reads kernel memory and map values through raw pointers"
)]

use core::ffi::c_void;
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_or, atomic_xadd};
use core::mem::size_of;
use core::ptr::{addr_of, addr_of_mut, read_volatile};

use aya_ebpf::helpers::{
    bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_smp_processor_id, bpf_ktime_get_boot_ns,
    bpf_loop, bpf_probe_read_kernel, generated,
};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap, RingBuf};
use aya_ebpf::programs::BtfTracePointContext;
use cdp_ebpf::event::{
    CHUNK_ALIGN_BYTES, CHUNK_BYTES, CompleteEvent, EventKind, FLAG_FUA, FLAG_META, FLAG_PREFLUSH, FLAG_SYNC,
    Op, SECTOR_BYTES, WriteEvent,
};
use cdp_ebpf::kernel::Kernel;
use cdp_ebpf::map::{
    COUNTERS_PER_DISK, Cause, Counter, DIRTY_WORDS_PER_DISK, DISKS_MAX, DiskFilter, RANGES_MAX,
};

const SEQ_CST: AtomicOrdering = AtomicOrdering::SeqCst;

/// The most bytes that one step copies: a step's place in the scratch area is below `CHUNK_BYTES`, so the
/// area has this much slack behind it and the verifier need not relate place to length.
const STEP_BYTES: u32 = 64 * 1024;
/// A bio of this many bytes in one part takes the short way.
const SMALL_BYTES: u32 = 4096;
/// Steps that a bio may take: one for each of its parts and each chunk. 4 GiB in 4 KiB parts.
const STEPS_MAX: u32 = 1 << 20;
/// Bios of one request whose discards are listed one by one.
const REQUEST_BIOS_MAX: u32 = 1 << 10;
/// Words that one bio can mark: 4 GiB of 512-byte regions would be 131 072.
const MARK_WORDS_MAX: u32 = DIRTY_WORDS_PER_DISK;

const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_RB_NO_WAKEUP: u64 = 1;
const BPF_RB_FORCE_WAKEUP: u64 = 2;
const BPF_RB_AVAIL_DATA: u64 = 0;

/// `REQ_OP_MASK`: the kernel keeps the operation in the low 8 bits of its flags (since 4.10).
const OP_MASK: u32 = 0xff;

#[unsafe(no_mangle)]
static KERNEL: Kernel = Kernel {
    bio_next: 0,
    bio_bdev: 0,
    bio_opf: 0,
    bio_status: 0,
    bio_sector: 0,
    bio_size: 0,
    bio_idx: 0,
    bio_bvec_done: 0,
    bio_io_vec: 0,
    bio_flags: 0,
    bio_vcnt: 0,
    bio_pinned: 0,
    bvec_bytes: 0,
    bvec_page: 0,
    bvec_len: 0,
    bvec_offset: 0,
    bdev_disk: 0,
    bdev_dev: 0,
    disk_part0: 0,
    rq_bio: 0,
    rq_sector: 0,
    rq_cmd_flags: 0,
    bh_page: 0,
    bh_data: 0,
    bh_bdev: 0,
    op_write: 0,
    op_flush: 0,
    op_discard: 0,
    op_secure_erase: 0,
    op_write_zeroes: 0,
    flag_preflush: 0,
    flag_fua: 0,
    flag_sync: 0,
    flag_meta: 0,
    page_flags: 0,
    page_compound_head: 0,
    page_writeback: 0,
    page_changing: 0,
    page_struct_bytes: 0,
    page_shift: 0,
    calibrate_disk: 0,
    reserved: 0,
    page_address: 0,
    page_bytes_address: 0,
    ring_bytes: 0,
};

/// Captured events. The agent sets the size.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// Watched disks by number.
#[map]
static DISKS: HashMap<u32, DiskFilter> = HashMap::with_max_entries(DISKS_MAX, 0);

/// `Counter`s, a row for each disk.
#[map]
static COUNTERS: Array<u64> = Array::with_max_entries(DISKS_MAX * COUNTERS_PER_DISK, BPF_F_MMAPABLE);

/// One bit for each region of each watched disk: set, and the region's bytes are not what the ring says.
#[map]
static DIRTY: Array<u64> = Array::with_max_entries(DISKS_MAX * DIRTY_WORDS_PER_DISK, BPF_F_MMAPABLE);

/// One area for each CPU; the agent sets the count.
#[map]
static SCRATCH: Array<Scratch> = Array::with_max_entries(1, 0);

/// One for each CPU; the agent sets the count.
#[map]
static WALK: Array<Walk> = Array::with_max_entries(1, 0);

/// One for each CPU; the agent sets the count.
#[map]
static PAGES_OF_REQUEST: Array<PageWalk> = Array::with_max_entries(1, 0);

/// One for each CPU; the agent sets the count.
#[map]
static PAGES_OF_BIO: Array<PageWalk> = Array::with_max_entries(1, 0);

/// What calibration learned: [page address, address of its bytes, count].
#[map]
static LEARNED: Array<u64> = Array::with_max_entries(4, 0);

/// A small write and its bytes.
#[repr(C)]
struct SmallWrite {
    event: WriteEvent,
    data: [u8; SMALL_BYTES as usize],
}

/// State of the copy of one bio, and the event under construction.
#[repr(C)]
struct Scratch {
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

/// State of the walk along a request's bios.
#[repr(C)]
struct Walk {
    bio: u64,
    remaining: u32,
    disk: u32,
    slot: u32,
    region_shift: u32,
    op: u8,
    failed: u8,
    reserved: [u8; 6],
}

/// State of the look at the pages of what was written.
#[repr(C)]
struct PageWalk {
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

/// State of marking, on the stack of the caller: plain numbers only.
#[repr(C)]
struct Marking {
    word: u64,
    word_end: u64,
    first_bit: u64,
    last_bit: u64,
    base: u64,
}

/// `cause` while nothing has gone wrong.
const CAUSE_NONE: u32 = u32::MAX;

/// Volatile, so that the compiler does not take the zeroes above for the value.
#[inline(always)]
fn loaded<T: Copy>(of_kernel: &T) -> T {
    // SAFETY: a field of a static that only the loader writes, before the program exists.
    unsafe { read_volatile(of_kernel) }
}

macro_rules! kernel {
    ($field:ident) => {
        loaded(&KERNEL.$field)
    };
}

/// Reads a field of a kernel object through a pointer that the verifier knows by its BTF type.
///
/// # Safety
/// `object` is an argument of a BTF tracepoint or was loaded from one, and `offset` is that of a `T` in it,
/// by the kernel's BTF. The verifier checks both, and a bad address reads as zero.
#[inline(always)]
unsafe fn field<T: Copy>(object: *const u8, offset: u32) -> T {
    // SAFETY: the caller's promise.
    unsafe { read_volatile(object.add(offset as usize).cast::<T>()) }
}

#[inline(always)]
fn add(index: u32, amount: u64) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a live, aligned map value. SeqCst: a relaxed add returns its operand in BPF.
        unsafe { atomic_xadd::<u64, u64, SEQ_CST>(counter, amount) };
    }
}

#[inline(always)]
fn counter_index(slot: u32, counter: u32) -> u32 {
    slot * COUNTERS_PER_DISK + counter
}

/// Boot-time clock.
#[inline(always)]
fn boot_ns() -> u64 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// The CPU that runs this program, and no other until it ends.
#[inline(always)]
fn this_cpu() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { bpf_get_smp_processor_id() as u32 }
}

/// Direct-map address of the first byte of a page.
#[inline(always)]
fn page_bytes(page: u64) -> u64 {
    let (known, bytes) = (kernel!(page_address), kernel!(page_bytes_address));
    let (size, shift) = (
        u64::from(kernel!(page_struct_bytes)),
        u64::from(kernel!(page_shift)),
    );
    if page >= known {
        bytes.wrapping_add((page - known).checked_div(size).unwrap_or(0) << shift)
    } else {
        bytes.wrapping_sub((known - page).checked_div(size).unwrap_or(0) << shift)
    }
}

/// Number of the whole disk that a block device lies on.
#[inline(always)]
fn disk_of(bdev: *const u8) -> u32 {
    // SAFETY: `bdev` was loaded from a bio; each step follows the kernel's BTF.
    unsafe {
        let disk: *const u8 = field(bdev, kernel!(bdev_disk));
        let whole: *const u8 = field(disk, kernel!(disk_part0));
        field(whole, kernel!(bdev_dev))
    }
}

#[inline(always)]
fn watched(disk: u32, sector: u64, bytes: u32) -> Option<(u32, u32)> {
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

#[inline(always)]
fn op_of(opf: u32, bytes: u32) -> Option<Op> {
    let code = opf & OP_MASK;
    if code == kernel!(op_write) {
        Some(if bytes == 0 { Op::Flush } else { Op::Write })
    } else if code == kernel!(op_flush) {
        Some(Op::Flush)
    } else if code == kernel!(op_discard) || code == kernel!(op_secure_erase) {
        Some(Op::Discard)
    } else if code == kernel!(op_write_zeroes) {
        Some(Op::Zero)
    } else {
        None
    }
}

/// Wakes the agent only when a quarter of the ring waits: it comes by itself every few milliseconds, and
/// a wake-up for each write would cost production more than the capture.
#[inline(always)]
fn ring_flags() -> u64 {
    if EVENTS.query(BPF_RB_AVAIL_DATA) > kernel!(ring_bytes) / 4 {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    }
}

/// Counts a drop and marks its whole range.
#[inline(always)]
fn drop_write(slot: u32, region_shift: u32, sector: u64, bytes: u32, cause: u32, now_ns: u64) {
    mark(slot, region_shift, sector, bytes);
    if let Some(first) = COUNTERS.get_ptr_mut(counter_index(slot, Counter::FirstDropNs as u32)) {
        // SAFETY: as in `add`.
        unsafe { atomic_cxchg::<u64, SEQ_CST, SEQ_CST>(first, 0, now_ns) };
    }
    // Last, so that who sees the count finds the marks and the time.
    add(counter_index(slot, Counter::Dropped as u32 + cause), 1);
}

#[inline(always)]
fn mark(slot: u32, region_shift: u32, sector: u64, bytes: u32) {
    if bytes == 0 {
        return;
    }
    let last_sector = sector + (u64::from(bytes) - 1) / SECTOR_BYTES;
    let (first_bit, last_bit) = (sector >> (region_shift & 63), last_sector >> (region_shift & 63));
    let mut marking = Marking {
        word: first_bit / 64,
        word_end: last_bit / 64 + 1,
        first_bit,
        last_bit,
        base: u64::from(slot) * u64::from(DIRTY_WORDS_PER_DISK),
    };
    // SAFETY: `mark_word` has the signature that bpf_loop asks for; `marking` outlives the call.
    unsafe {
        bpf_loop(
            MARK_WORDS_MAX,
            mark_word as *mut c_void,
            addr_of_mut!(marking).cast(),
            0,
        );
    }
}

extern "C" fn mark_word(_step: u64, context: *mut c_void) -> i64 {
    // SAFETY: `context` is `mark`'s own `Marking`.
    let marking = unsafe { &mut *context.cast::<Marking>() };
    if marking.word >= marking.word_end || marking.word >= u64::from(DIRTY_WORDS_PER_DISK) {
        return 1;
    }
    let mut bits = u64::MAX;
    if marking.word == marking.first_bit / 64 {
        bits &= u64::MAX << (marking.first_bit % 64);
    }
    if marking.word == marking.last_bit / 64 {
        bits &= u64::MAX >> (63 - marking.last_bit % 64);
    }
    if let Some(word) = DIRTY.get_ptr_mut((marking.base + marking.word) as u32) {
        // SAFETY: as in `add`.
        unsafe { atomic_or::<u64, u64, SEQ_CST>(word, bits) };
    }
    marking.word += 1;
    0
}

/// Fires once for each bio of each driver, its data still in its pages.
#[btf_tracepoint(function = "block_bio_queue")]
fn write_queued(ctx: BtfTracePointContext) -> i32 {
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
fn flags_of(opf: u32) -> u8 {
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
fn put(scratch: *mut Scratch, data_bytes: u32) -> u32 {
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
fn put_small(bio: *const u8, event: &WriteEvent) -> Option<u32> {
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

/// Page, length and offset of one part of a bio.
#[inline(always)]
fn part_at(bvec: u64) -> Option<(u64, u32, u32)> {
    // SAFETY: probe reads fail cleanly on any address; these lie in the bio's vector.
    unsafe {
        Some((
            bpf_probe_read_kernel((bvec + u64::from(kernel!(bvec_page))) as *const u64).ok()?,
            bpf_probe_read_kernel((bvec + u64::from(kernel!(bvec_len))) as *const u32).ok()?,
            bpf_probe_read_kernel((bvec + u64::from(kernel!(bvec_offset))) as *const u32).ok()?,
        ))
    }
}

#[inline(always)]
fn copy_bio(bio: *const u8, scratch: *mut Scratch, sector: u64, bytes: u32) -> u32 {
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
extern "C" fn copy_step(_step: u64, _context: *mut c_void) -> i64 {
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

/// A request-based driver has ended (a part of) a request.
#[btf_tracepoint(function = "block_rq_complete")]
fn request_completed(ctx: BtfTracePointContext) -> i32 {
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
    let event = CompleteEvent {
        kind: EventKind::Complete as u8,
        op: op as u8,
        failed,
        whole_bio: 0,
        disk,
        bio: 0,
        boot_ns: boot_ns(),
        sector,
        bytes,
        reserved: 0,
    };
    let cpu = this_cpu();
    if failed == 0
        && op as u8 == Op::Write as u8
        && !is_pinned(bio, bytes)
        && let Some(area) = PAGES_OF_REQUEST.get_ptr_mut(cpu)
    {
        look_for_changes(
            slot,
            region_shift,
            &event,
            area,
            page_of_request,
            PageWalk {
                bio: bio as u64,
                bvec_address: 0,
                bvec_done: 0,
                bvecs_left: u32::MAX,
                left_in_bio: 0,
                left: bytes,
                at: 0,
                first: u32::MAX,
                end: 0,
                reserved: 0,
            },
        );
    }
    complete(slot, region_shift, event);
    0
}

/// Is all that was written one bio over a user's own buffer (direct I/O)? Its pages are not of the page
/// cache, and tell nothing.
#[inline(always)]
fn is_pinned(bio: *const u8, bytes: u32) -> bool {
    // SAFETY: the request's first bio.
    let (flags, size): (u16, u32) =
        unsafe { (field(bio, kernel!(bio_flags)), field(bio, kernel!(bio_size))) };
    u32::from(flags) & kernel!(bio_pinned) != 0 && size >= bytes
}

/// A page of the page cache may be changed while it is written, unless its file system keeps it stable: the
/// disk then gets what we did not see. Such a page is dirty again, or locked by who is about to say so.
#[inline(always)]
fn look_for_changes(
    slot: u32,
    region_shift: u32,
    event: &CompleteEvent,
    area: *mut PageWalk,
    step: extern "C" fn(u64, *mut c_void) -> i64,
    walk: PageWalk,
) {
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
        return;
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
        }
        None => drop_write(
            slot,
            region_shift,
            event.sector,
            event.bytes,
            Cause::RingFull as u32,
            event.boot_ns,
        ),
    }
}

extern "C" fn page_of_request(_step: u64, _context: *mut c_void) -> i64 {
    let cpu = this_cpu();
    match PAGES_OF_REQUEST.get_ptr_mut(cpu) {
        Some(walk) => page_step(walk),
        None => 1,
    }
}

extern "C" fn page_of_bio(_step: u64, _context: *mut c_void) -> i64 {
    let cpu = this_cpu();
    match PAGES_OF_BIO.get_ptr_mut(cpu) {
        Some(walk) => page_step(walk),
        None => 1,
    }
}

/// Looks at one page, or goes on to the next part or bio.
#[inline(always)]
fn page_step(walk: *mut PageWalk) -> i64 {
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
fn next_bio(walk: &mut PageWalk) -> i64 {
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
fn is_changing(page: u64) -> bool {
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

extern "C" fn walk_step(_step: u64, _context: *mut c_void) -> i64 {
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
        CompleteEvent {
            kind: EventKind::Complete as u8,
            op: walk.op,
            failed: walk.failed,
            whole_bio: 0,
            disk: walk.disk,
            bio: 0,
            boot_ns: boot_ns(),
            sector,
            bytes,
            reserved: 0,
        },
    );
    0
}

/// A bio-based driver has ended a bio. Request-based drivers do not come by here.
#[btf_tracepoint(function = "block_bio_complete")]
fn bio_completed(ctx: BtfTracePointContext) -> i32 {
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
        kind: EventKind::Complete as u8,
        op,
        failed: u8::from(status != 0),
        whole_bio: 1,
        disk,
        bio: bio as u64,
        boot_ns: boot_ns(),
        sector,
        bytes,
        reserved: 0,
    };
    let cpu = this_cpu();
    if status == 0
        && op == Op::Write as u8
        && !is_pinned(bio, 0)
        && let Some(area) = PAGES_OF_BIO.get_ptr_mut(cpu)
    {
        // SAFETY: as above.
        let (bvecs, vectors): (u16, u64) =
            unsafe { (field(bio, kernel!(bio_vcnt)), field(bio, kernel!(bio_io_vec))) };
        look_for_changes(
            slot,
            region_shift,
            &event,
            area,
            page_of_bio,
            PageWalk {
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
            },
        );
    }
    complete(slot, region_shift, event);
    0
}

/// Puts a completion in the ring; one that does not fit leaves a mark, like any loss.
#[inline(always)]
fn complete(slot: u32, region_shift: u32, event: CompleteEvent) {
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

/// Calibration only: learns where the bytes of one page lie, from a buffer that names both.
#[btf_tracepoint(function = "block_touch_buffer")]
fn buffer_touched(ctx: BtfTracePointContext) -> i32 {
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

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
