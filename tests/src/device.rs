//! Block devices to protect: loop devices over sparse files, their partitions, zram.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::process::{cmd, poll_until};

/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;

/// How a loop device is set up.
#[derive(Clone, Copy, Debug)]
pub struct LoopOptions {
    /// Size of the device.
    pub bytes: u64,
    /// Logical sector size: 512 or 4096.
    pub sector_bytes: u32,
    /// Does the loop driver bypass the page cache of the backing file?
    pub direct_io: bool,
    /// Are partitions looked for?
    pub partitions: bool,
}

impl LoopOptions {
    /// A device of `bytes` with 512-byte sectors, over the page cache.
    pub fn of_bytes(bytes: u64) -> LoopOptions {
        LoopOptions {
            bytes,
            sector_bytes: 512,
            direct_io: false,
            partitions: false,
        }
    }

    /// The same with another sector size.
    pub fn sectors(self, sector_bytes: u32) -> LoopOptions {
        LoopOptions { sector_bytes, ..self }
    }

    /// The same with direct I/O on the backing file.
    pub fn direct(self) -> LoopOptions {
        LoopOptions {
            direct_io: true,
            ..self
        }
    }

    /// The same, with partitions.
    pub fn partitioned(self) -> LoopOptions {
        LoopOptions {
            partitions: true,
            ..self
        }
    }
}

/// A loop device; detached when the guard goes.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    backing: PathBuf,
    remove_backing: bool,
}

impl LoopDevice {
    /// A device over a new sparse file `backing`, which goes with it.
    pub fn create(backing: &Path, options: LoopOptions) -> Result<LoopDevice> {
        let file = File::create_new(backing).with_context(|| format!("create {}", backing.display()))?;
        file.set_len(options.bytes)
            .context("set the size of a backing file")?;
        LoopDevice::attach_as(backing, options, true)
    }

    /// A device over a file that is there (an image that was restored) and stays.
    pub fn attach(backing: &Path) -> Result<LoopDevice> {
        let bytes = std::fs::metadata(backing)
            .with_context(|| format!("look at {}", backing.display()))?
            .len();
        LoopDevice::attach_as(backing, LoopOptions::of_bytes(bytes), false)
    }

    fn attach_as(backing: &Path, options: LoopOptions, remove_backing: bool) -> Result<LoopDevice> {
        let mut losetup = cmd("losetup")
            .args(["--find", "--show", "--sector-size"])
            .arg(options.sector_bytes.to_string());
        if options.direct_io {
            losetup = losetup.arg("--direct-io=on");
        }
        if options.partitions {
            losetup = losetup.arg("--partscan");
        }
        let path = losetup.arg(backing).output().context("set up a loop device")?;
        Ok(LoopDevice {
            path: path.into(),
            backing: backing.to_owned(),
            remove_backing,
        })
    }

    /// Its device file, such as `/dev/loop0`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its backing file.
    pub fn backing(&self) -> &Path {
        &self.backing
    }

    /// Gives it another size, under whoever uses it.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        let file = File::options().write(true).open(&self.backing);
        file.and_then(|file| file.set_len(bytes))
            .with_context(|| format!("set the size of {}", self.backing.display()))?;
        cmd("losetup")
            .arg("--set-capacity")
            .arg(&self.path)
            .run()?
            .success()
            .map(drop)
    }

    /// Writes a GPT with one partition for each of `mib` (0: the rest) and gives their device files.
    pub fn partition(&self, mib: &[u64]) -> Result<Vec<PathBuf>> {
        let mut table = "label: gpt\n".to_owned();
        for size in mib {
            table.push_str(&if *size == 0 {
                "type=linux\n".to_owned()
            } else {
                format!("size={size}MiB, type=linux\n")
            });
        }
        cmd("sfdisk")
            .arg("--quiet")
            .arg(&self.path)
            .stdin(table)
            .run()?
            .success()
            .context("write a partition table")?;
        // Some kernels read the new table by themselves, some only when told; told twice, partx may complain.
        let told = cmd("partx").arg("--update").arg(&self.path).run()?;
        let paths: Vec<PathBuf> = (1..=mib.len())
            .map(|number| format!("{}p{number}", self.path.display()).into())
            .collect();
        poll_until("the partitions' device files", Duration::from_secs(10), || {
            Ok(paths
                .iter()
                .all(|path| bytes_of(path).is_ok_and(|bytes| bytes > 0))
                .then_some(()))
        })
        .with_context(|| told.transcript())?;
        Ok(paths)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Not by `Cmd`: clearing up goes on after an interrupt.
        let detached = std::process::Command::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("{} stays attached", self.path.display());
        }
        if self.remove_backing {
            let _ = std::fs::remove_file(&self.backing);
        }
    }
}

/// The zram device (a driver that takes bios and has no requests); reset when the guard goes.
#[derive(Debug)]
pub struct Zram {
    path: PathBuf,
}

impl Zram {
    /// Gives an unused zram device the size `bytes`; `None` if there is none.
    pub fn create(bytes: u64) -> Result<Option<Zram>> {
        let control = Path::new("/sys/block/zram0");
        if !control.exists() || !Path::new("/dev/zram0").exists() {
            return Ok(None);
        }
        if std::fs::read_to_string(control.join("initstate"))
            .context("read initstate")?
            .trim()
            != "0"
        {
            return Ok(None); // somebody's swap, perhaps
        }
        std::fs::write(control.join("disksize"), bytes.to_string()).context("set the size of zram0")?;
        Ok(Some(Zram {
            path: "/dev/zram0".into(),
        }))
    }

    /// Its device file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write("/sys/block/zram0/reset", "1") {
            eprintln!("zram0 is not reset: {error}");
        }
    }
}

/// Size of a block device.
pub fn bytes_of(device: &Path) -> Result<u64> {
    let text = cmd("blockdev").arg("--getsize64").arg(device).output()?;
    text.parse()
        .with_context(|| format!("size of {}: {text:?}", device.display()))
}

/// Major and minor number of a device file.
pub fn device_number(device: &Path) -> Result<(u32, u32)> {
    let stat = rustix::fs::stat(device).with_context(|| format!("look at {}", device.display()))?;
    Ok((rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)))
}

/// Writes what the page cache holds for `device` and forgets it, so that the next read asks the device.
pub fn flush_cache(device: &Path) -> Result<()> {
    cmd("blockdev")
        .arg("--flushbufs")
        .arg(device)
        .run()?
        .success()
        .map(drop)
}

/// Lets `device` take this many requests at a time; further ones wait in the kernel.
pub fn set_queue_depth(device: &Path, requests: u32) -> Result<()> {
    let name = device
        .file_name()
        .and_then(|name| name.to_str())
        .context("a device has a name")?;
    let path = format!("/sys/block/{name}/queue/nr_requests");
    std::fs::write(&path, requests.to_string()).with_context(|| format!("write {path}"))
}

/// Discards a range (bytes) of `device`: its content becomes zeroes, or whatever the driver makes of it.
pub fn discard(device: &Path, offset: u64, bytes: u64) -> Result<()> {
    blkdiscard(device, offset, bytes, &[])
}

/// Zeroes a range (bytes) of `device` without sending zeroes.
pub fn zero_out(device: &Path, offset: u64, bytes: u64) -> Result<()> {
    blkdiscard(device, offset, bytes, &["--zeroout"])
}

fn blkdiscard(device: &Path, offset: u64, bytes: u64, flags: &[&str]) -> Result<()> {
    let range = [format!("--offset={offset}"), format!("--length={bytes}")];
    cmd("blkdiscard")
        .args(flags)
        .args(range)
        .arg("--force")
        .arg(device)
        .run()?
        .success()
        .map(drop)
}

/// Names a device's part in a message; an error if it is not a block device.
pub fn require_block_device(device: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let kind = std::fs::metadata(device)
        .with_context(|| format!("look at {}", device.display()))?
        .file_type();
    if !kind.is_block_device() {
        bail!("{} is not a block device", device.display());
    }
    ensure!(bytes_of(device)? > 0, "{} is empty", device.display());
    Ok(())
}
