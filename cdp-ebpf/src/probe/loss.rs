//! Writes that could not be captured: counted by cause, their range marked.

use core::ffi::c_void;
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_or, atomic_xadd};
use core::ptr::addr_of_mut;

use aya_ebpf::helpers::bpf_loop;
use cdp_ebpf::event::SECTOR_BYTES;
use cdp_ebpf::map::{COUNTERS_PER_DISK, Counter, DIRTY_WORDS_PER_DISK};

use super::maps::{COUNTERS, DIRTY};

const SEQ_CST: AtomicOrdering = AtomicOrdering::SeqCst;
/// Words that one bio can mark: 4 GiB of 512-byte regions would be 131 072.
const MARK_WORDS_MAX: u32 = DIRTY_WORDS_PER_DISK;

/// Each try that fails is one in which another CPU, or the agent, was first.
const LOWER_TRIES: u32 = 16;

/// State of marking, on the stack of the caller: plain numbers only.
#[repr(C)]
pub(super) struct Marking {
    word: u64,
    word_end: u64,
    first_bit: u64,
    last_bit: u64,
    base: u64,
}

#[inline(always)]
pub(super) fn add(index: u32, amount: u64) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a live, aligned map value. SeqCst: a relaxed add returns its operand in BPF.
        unsafe { atomic_xadd::<u64, u64, SEQ_CST>(counter, amount) };
    }
}

#[inline(always)]
pub(super) fn counter_index(slot: u32, counter: u32) -> u32 {
    slot * COUNTERS_PER_DISK + counter
}

/// Counts a drop and marks its whole range.
#[inline(always)]
pub(super) fn drop_write(slot: u32, region_shift: u32, sector: u64, bytes: u32, cause: u32, now_ns: u64) {
    mark(slot, region_shift, sector, bytes);
    if let Some(first) = COUNTERS.get_ptr_mut(counter_index(slot, Counter::FirstDropNs as u32)) {
        lower(first, now_ns);
    }
    // Last, so that who sees the count finds the marks and the time.
    add(counter_index(slot, Counter::Dropped as u32 + cause), 1);
}

/// Keeps the earlier time; 0 is none. Who is told first need not have been queued first: a long bio is copied before it
/// finds no room.
#[inline(always)]
fn lower(first: *mut u64, now_ns: u64) {
    for _ in 0..LOWER_TRIES {
        // SAFETY: a live, aligned map value, as in `add`; nobody writes it but by atomic operations.
        let known = unsafe { first.read_volatile() };
        if known != 0 && known <= now_ns {
            return;
        }
        // SAFETY: as above.
        let (found, _) = unsafe { atomic_cxchg::<u64, SEQ_CST, SEQ_CST>(first, known, now_ns) };
        if found == known {
            return;
        }
    }
}

#[inline(always)]
pub(super) fn mark(slot: u32, region_shift: u32, sector: u64, bytes: u32) {
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

pub(super) extern "C" fn mark_word(_step: u64, context: *mut c_void) -> i64 {
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
