//! What the kernel tells, as the loader set it, and steps through its objects.

use core::ptr::read_volatile;

use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_boot_ns, bpf_probe_read_kernel};
use cdp_ebpf::event::Op;
use cdp_ebpf::kernel::Kernel;

/// `REQ_OP_MASK`: the kernel keeps the operation in the low 8 bits of its flags (since 4.10).
pub(super) const OP_MASK: u32 = 0xff;

#[unsafe(no_mangle)]
pub(super) static KERNEL: Kernel = Kernel {
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

/// Volatile, so that the compiler does not take the zeroes above for the value.
#[inline(always)]
pub(super) fn loaded<T: Copy>(of_kernel: &T) -> T {
    // SAFETY: a field of a static that only the loader writes, before the program exists.
    unsafe { read_volatile(of_kernel) }
}

macro_rules! kernel {
    ($field:ident) => {
        $crate::probe::kernel::loaded(&$crate::probe::kernel::KERNEL.$field)
    };
}

/// Reads a field of a kernel object through a pointer that the verifier knows by its BTF type.
///
/// # Safety
/// `object` is an argument of a BTF tracepoint or was loaded from one, and `offset` is that of a `T` in it,
/// by the kernel's BTF. The verifier checks both, and a bad address reads as zero.
#[inline(always)]
pub(super) unsafe fn field<T: Copy>(object: *const u8, offset: u32) -> T {
    // SAFETY: the caller's promise.
    unsafe { read_volatile(object.add(offset as usize).cast::<T>()) }
}

/// Boot-time clock.
#[inline(always)]
pub(super) fn boot_ns() -> u64 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// The CPU that runs this program, and no other until it ends.
#[inline(always)]
pub(super) fn this_cpu() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { bpf_get_smp_processor_id() as u32 }
}

/// Direct-map address of the first byte of a page.
#[inline(always)]
pub(super) fn page_bytes(page: u64) -> u64 {
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
pub(super) fn disk_of(bdev: *const u8) -> u32 {
    // SAFETY: `bdev` was loaded from a bio; each step follows the kernel's BTF.
    unsafe {
        let disk: *const u8 = field(bdev, kernel!(bdev_disk));
        let whole: *const u8 = field(disk, kernel!(disk_part0));
        field(whole, kernel!(bdev_dev))
    }
}

#[inline(always)]
pub(super) fn op_of(opf: u32, bytes: u32) -> Option<Op> {
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

/// Page, length and offset of one part of a bio.
#[inline(always)]
pub(super) fn part_at(bvec: u64) -> Option<(u64, u32, u32)> {
    // SAFETY: probe reads fail cleanly on any address; these lie in the bio's vector.
    unsafe {
        Some((
            bpf_probe_read_kernel((bvec + u64::from(kernel!(bvec_page))) as *const u64).ok()?,
            bpf_probe_read_kernel((bvec + u64::from(kernel!(bvec_len))) as *const u32).ok()?,
            bpf_probe_read_kernel((bvec + u64::from(kernel!(bvec_offset))) as *const u32).ok()?,
        ))
    }
}

pub(super) use kernel;
