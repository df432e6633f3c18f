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

mod probe;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
