//! Memory shared with the kernel: maps that both sides write with atomics.
#![expect(
    unsafe_code,
    reason = "mmap of BPF maps, and one bpf(2) call that aya does not offer"
)]

use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use aya::maps::MapData;
use rustix::mm::{MapFlags, ProtFlags};

/// A mapping that is undone when the last user is gone.
pub(crate) struct Mapping {
    start: NonNull<std::ffi::c_void>,
    bytes: usize,
}

// SAFETY: the mapping is only read and written through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(super) fn new(
        fd: BorrowedFd<'_>,
        offset: u64,
        bytes: usize,
        prot: ProtFlags,
    ) -> anyhow::Result<Self> {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, MapFlags::SHARED, fd, offset) }
                .context("map a BPF map into memory")?;
        let start = NonNull::new(start).context("map a BPF map into memory: no address")?;
        Ok(Self { start, bytes })
    }

    pub(super) fn word(&self, index: usize) -> &AtomicU64 {
        assert!(
            (index + 1) * 8 <= self.bytes,
            "word {index} of a mapping of {} bytes",
            self.bytes
        );
        // SAFETY: inside the mapping (checked), aligned (the mapping starts a page), alive as long as self;
        // the kernel, too, touches these words atomically only.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().cast::<u64>().add(index)) }
    }

    /// # Safety
    /// Nobody writes there while the slice is borrowed.
    pub(super) unsafe fn bytes(&self, range: Range<usize>) -> &[u8] {
        assert!(
            range.start <= range.end && range.end <= self.bytes,
            "bytes {range:?} of a mapping of {} bytes",
            self.bytes
        );
        // SAFETY: inside the mapping (checked), which lives as long as self; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast::<u8>().add(range.start), range.len()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.bytes) };
    }
}

/// An array map of 64-bit words.
pub(crate) struct SharedWords(Mapping);

impl SharedWords {
    pub(super) fn of_map(map: &MapData, words: usize) -> anyhow::Result<Self> {
        Self::new(map.fd().as_fd(), words)
    }

    fn new(fd: BorrowedFd<'_>, words: usize) -> anyhow::Result<Self> {
        Mapping::new(fd, 0, words * 8, ProtFlags::READ | ProtFlags::WRITE).map(Self)
    }

    pub(super) fn load(&self, index: usize) -> u64 {
        self.0.word(index).load(Ordering::SeqCst)
    }

    pub(super) fn take(&self, index: usize) -> u64 {
        self.0.word(index).swap(0, Ordering::SeqCst)
    }

    pub(super) fn store(&self, index: usize, value: u64) {
        self.0.word(index).store(value, Ordering::SeqCst);
    }
}

/// `recursion_misses` of a program's info.
pub(super) fn recursion_misses(program: BorrowedFd<'_>) -> anyhow::Result<u64> {
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
    /// `struct bpf_prog_info` up to `recursion_misses` (uapi/linux/bpf.h): offset 208.
    const INFO_BYTES: usize = 232;
    const RECURSION_MISSES_AT: usize = 208;
    #[repr(C)]
    struct Attr {
        fd: u32,
        info_bytes: u32,
        info: u64,
    }
    let mut info = [0u64; INFO_BYTES / 8];
    let mut attr = Attr {
        fd: program.as_raw_fd() as u32,
        info_bytes: INFO_BYTES as u32,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: the call of bpf(2) with an attribute of its size; it writes at most INFO_BYTES to `info`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_OBJ_GET_INFO_BY_FD,
            std::ptr::from_mut(&mut attr),
            size_of::<Attr>(),
        )
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).context("ask the kernel about the probe's programs");
    }
    Ok(info[RECURSION_MISSES_AT / 8])
}
