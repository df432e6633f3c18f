//! Finds the kernel's direct map, and proves that what the probe reads through it is what was written.
//!
//! A `struct page` tells its bytes' address only to who knows one such pair. The pair is learned once, from a
//! buffer head that names both, on a loop device of our own, then frozen into the probe as a constant: a pair
//! that is updated while capture runs can be torn, and a torn pair reads a stranger's page.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use aya::maps::Array;
use cdp_ebpf::event::{EventKind, SECTOR_BYTES};
use cdp_ebpf::map::SectorRange;
use cdp_ebpf::{DiskFilter, Kernel};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use super::loopdev::{LOOP_BYTES, LoopDevice};
use super::{KernelGlobal, OBJECT, Probe, load_program, loader, possible_cpus};
use crate::event::Event;

/// Bytes written to prove the pair: many pages, so that a wrong factor shows.
const PROOF_BYTES: usize = 512 * 1024;
/// Of these written at once; the rest page by page.
const PROOF_LARGE_BYTES: usize = 384 * 1024;
const PROOF_TIMEOUT: Duration = Duration::from_secs(10);
const PAGE_BYTES: usize = 4096;
/// The kernel names a buffer only when it finds it in the CPU's own short list, so not the first time.
const TOUCHED_FILES: u32 = 8;

/// Sets `page_address` and `page_bytes_address`.
pub(crate) fn learn(kernel: &mut Kernel, btf: &aya::Btf) -> anyhow::Result<()> {
    let device = LoopDevice::new()?;
    kernel.calibrate_disk = device.disk()?.0;
    let global = KernelGlobal::new(*kernel);
    let mut ebpf = loader(&global, possible_cpus()?)
        .load(OBJECT)
        .context("load the calibration program")?;
    load_program(&mut ebpf, "buffer_touched", "block_touch_buffer", btf)?;
    let learned: Array<_, u64> = Array::try_from(
        ebpf.map("LEARNED")
            .context("the probe's object has no map LEARNED")?,
    )?;
    make_file_system(&device)?;
    std::thread::scope(|scope| scope.spawn(|| touch_buffers(&device)).join())
        .map_err(|_| anyhow::anyhow!("the calibration thread panicked"))??;
    ensure!(
        learned.get(&2, 0)? != 0,
        "the kernel touched no buffer of an ext4 file system on {}: where the direct map lies cannot be learned",
        device.path.display()
    );
    kernel.page_address = learned.get(&0, 0)?;
    kernel.page_bytes_address = learned.get(&1, 0)?;
    kernel.calibrate_disk = 0;
    Ok(())
}

fn make_file_system(device: &LoopDevice) -> anyhow::Result<()> {
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-b", "4096", "-O", "^has_journal"])
        .arg(&device.path)
        .output()
        .context("run mkfs.ext4 on a loop device of our own, to learn the direct map; install e2fsprogs")?;
    ensure!(
        output.status.success(),
        "mkfs.ext4 failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Makes the kernel use buffer heads of the device, inside a mount name space that ends with this thread.
fn touch_buffers(device: &LoopDevice) -> anyhow::Result<()> {
    leave_mount_namespace()?;
    let place = Path::new("/tmp");
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .context("make this thread's mounts private")?;
    rustix::mount::mount(&device.path, place, "ext4", MountFlags::empty(), None)
        .with_context(|| format!("mount {} for calibration", device.path.display()))?;
    for i in 0..TOUCHED_FILES {
        let path = place.join(i.to_string());
        let file = std::fs::File::create(&path).context("create a file for calibration")?;
        file.sync_all().context("sync a file for calibration")?;
    }
    rustix::mount::unmount(place, UnmountFlags::DETACH).context("unmount the calibration file system")
}

#[expect(
    unsafe_code,
    reason = "unshare(2) may leave file descriptors of other threads behind"
)]
fn leave_mount_namespace() -> anyhow::Result<()> {
    // SAFETY: CLONE_NEWNS and CLONE_FS touch only this thread's view of mounts and its working directory;
    // descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
        .context("make a mount name space for calibration")
}

/// Writes known bytes to a loop device of our own and compares what the probe saw of them.
pub(crate) fn prove(probe: &mut Probe) -> anyhow::Result<()> {
    let device = LoopDevice::new()?;
    let disk = device.disk()?;
    let mut filter = DiskFilter {
        slot: cdp_ebpf::map::DISKS_MAX - 1,
        region_shift: 7,
        ..DiskFilter::default()
    };
    filter.ranges[0] = SectorRange {
        start: 0,
        end: LOOP_BYTES / SECTOR_BYTES,
    };
    probe.watch(disk, filter)?;
    let mut memory = vec![0u8; PROOF_BYTES + PAGE_BYTES];
    let start = memory.as_ptr().align_offset(PAGE_BYTES);
    let pattern = &mut memory[start..start + PROOF_BYTES];
    rustix::rand::getrandom(&mut *pattern, rustix::rand::GetRandomFlags::empty())?;
    // getrandom may stop early on large requests: any bytes do, as long as no two pages agree.
    for (i, page) in pattern.chunks_mut(PAGE_BYTES).enumerate() {
        page[..8].copy_from_slice(&(0x5eed_0000_0000_0000 + i as u64).to_le_bytes());
    }
    // Large bios and single pages take different ways through the probe.
    let (large, small) = pattern.split_at(PROOF_LARGE_BYTES);
    device.write_direct(large, 0)?;
    for (i, page) in small.chunks(PAGE_BYTES).enumerate() {
        device.write_direct(page, (PROOF_LARGE_BYTES + i * PAGE_BYTES) as u64)?;
    }
    let mut seen = vec![0u8; PROOF_BYTES];
    let mut seen_bytes = 0;
    let deadline = Instant::now() + PROOF_TIMEOUT;
    while seen_bytes < PROOF_BYTES && Instant::now() < deadline {
        let mut failure = None;
        let got = probe.next_event(|bytes, _| match Event::parse(bytes) {
            Ok(Event::Write(write, data)) if write.kind == EventKind::Write as u8 && write.disk == disk.0 => {
                let at = (write.sector * SECTOR_BYTES) as usize;
                if let Some(place) = seen.get_mut(at..at + data.len()) {
                    place.copy_from_slice(data);
                    seen_bytes += data.len();
                }
            }
            Ok(_) => {}
            Err(error) => failure = Some(error),
        });
        if let Some(error) = failure {
            return Err(error.into());
        }
        if !got {
            std::thread::yield_now();
        }
    }
    probe.unwatch(disk)?;
    if seen_bytes < PROOF_BYTES {
        bail!(
            "the probe saw {seen_bytes} of {PROOF_BYTES} bytes written to {}",
            device.path.display()
        );
    }
    ensure!(
        seen == pattern,
        "the probe read other bytes than were written to {}",
        device.path.display()
    );
    Ok(())
}
