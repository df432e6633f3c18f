//! Memory shared with the kernel: maps that both sides write with atomics, and the ring's two ends.
#![expect(
    unsafe_code,
    reason = "mmap of BPF maps, and one bpf(2) call that aya does not offer"
)]

use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use rustix::mm::{MapFlags, ProtFlags};

/// A mapping that is undone when the last user is gone.
struct Mapping {
    start: NonNull<std::ffi::c_void>,
    bytes: usize,
}

// SAFETY: the mapping is only read and written through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, offset: u64, bytes: usize, prot: ProtFlags) -> anyhow::Result<Self> {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, MapFlags::SHARED, fd, offset) }
                .context("map a BPF map into memory")?;
        let start = NonNull::new(start).context("map a BPF map into memory: no address")?;
        Ok(Self { start, bytes })
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(
            (index + 1) * 8 <= self.bytes,
            "word {index} of a mapping of {} bytes",
            self.bytes
        );
        // SAFETY: inside the mapping (checked), aligned (the mapping starts a page), alive as long as self;
        // the kernel, too, touches these words atomically only.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().cast::<u64>().add(index)) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.bytes) };
    }
}

/// An array map of 64-bit words.
pub(super) struct SharedWords(Mapping);

impl SharedWords {
    pub(super) fn new(fd: BorrowedFd<'_>, words: usize) -> anyhow::Result<Self> {
        Mapping::new(fd, 0, words * 8, ProtFlags::READ | ProtFlags::WRITE).map(Self)
    }

    pub(super) fn load(&self, index: usize) -> u64 {
        self.0.word(index).load(Ordering::SeqCst)
    }

    pub(super) fn take(&self, index: usize) -> u64 {
        self.0.word(index).swap(0, Ordering::SeqCst)
    }
}

/// How far the ring has been filled and emptied, in bytes since it was made.
#[derive(Clone)]
pub(crate) struct RingPositions {
    consumer: Arc<Mapping>,
    producer: Arc<Mapping>,
}

impl RingPositions {
    pub(super) fn new(ring: BorrowedFd<'_>) -> anyhow::Result<Self> {
        let page_bytes = rustix::param::page_size();
        Ok(Self {
            consumer: Arc::new(Mapping::new(ring, 0, page_bytes, ProtFlags::READ)?),
            producer: Arc::new(Mapping::new(
                ring,
                page_bytes as u64,
                page_bytes,
                ProtFlags::READ,
            )?),
        })
    }

    /// Everything that the kernel reserved before this call lies before this position.
    pub(crate) fn produced(&self) -> u64 {
        self.producer.word(0).load(Ordering::SeqCst)
    }

    /// Everything before this position has been taken out.
    pub(crate) fn consumed(&self) -> u64 {
        self.consumer.word(0).load(Ordering::SeqCst)
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
