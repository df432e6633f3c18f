//! A loop device over memory, of our own: the probe is calibrated and proven on it before it looks at
//! anybody's disk. It goes away with its last user, also when the agent is killed.
#![expect(unsafe_code, reason = "ioctls of the loop driver")]

use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;

use anyhow::Context as _;
use rustix::fs::{MemfdFlags, memfd_create};

use super::{DiskNumber, loop_path};

/// Size of the device.
pub(super) const LOOP_BYTES: u64 = 1 << 20;

// uapi/linux/loop.h
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// `struct loop_config`: fd, block_size, `struct loop_info64`, 8 reserved words.
const CONFIG_WORDS: usize = 304 / 4;
/// `lo_flags` in it, counted in 32-bit words.
const CONFIG_FLAGS_WORD: usize = 60 / 4;
const ATTEMPTS_MAX: u32 = 16;

/// The device, open.
pub(super) struct LoopDevice {
    pub(super) device: File,
    pub(super) path: PathBuf,
    _memory: OwnedFd,
}

impl LoopDevice {
    pub(super) fn new() -> anyhow::Result<Self> {
        let memory = memfd_create("cdp-selftest", MemfdFlags::CLOEXEC).context("make a memory file")?;
        rustix::fs::ftruncate(&memory, LOOP_BYTES)?;
        let control = File::options()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .context("open /dev/loop-control: the probe is proven on a loop device first")?;
        for _ in 0..ATTEMPTS_MAX {
            // SAFETY: an ioctl without argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                return Err(std::io::Error::last_os_error()).context("find a free loop device");
            }
            let path = loop_path(number as u32);
            let device = File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
                .open(&path)
                .with_context(|| format!("open {}", path.display()))?;
            let mut config = [0u32; CONFIG_WORDS];
            config[0] = memory.as_raw_fd() as u32;
            config[1] = 4096;
            config[CONFIG_FLAGS_WORD] = LO_FLAGS_AUTOCLEAR;
            // SAFETY: the argument is a `struct loop_config`, all of it initialised.
            if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, config.as_ptr()) } == 0 {
                return Ok(Self {
                    device,
                    path,
                    _memory: memory,
                });
            }
            let error = std::io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EBUSY) {
                return Err(error).with_context(|| format!("set up {}", path.display()));
            }
        }
        anyhow::bail!("somebody else took every free loop device, {ATTEMPTS_MAX} times in a row")
    }

    pub(super) fn disk(&self) -> anyhow::Result<DiskNumber> {
        Ok(DiskNumber::from_dev(self.device.metadata()?.rdev()))
    }

    /// Writes straight to the device; `bytes` and `offset` are multiples of 4096 and `bytes` is page-aligned.
    pub(super) fn write_direct(&self, bytes: &[u8], offset: u64) -> anyhow::Result<()> {
        self.device
            .write_all_at(bytes, offset)
            .context("write to the self-test's loop device")
    }
}
