//! Facts about block devices, from sysfs.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::capture::DiskNumber;

/// How deep devices may be stacked on one another.
const STACK_DEPTH_MAX: u32 = 16;

/// Reads and writes that a disk has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Requests {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
}

/// A block device to be protected.
#[derive(Clone, Debug)]
pub(crate) struct BlockDevice {
    pub(crate) path: PathBuf,
    dev: u64,
    /// The whole disk that it lies on, as the kernel numbers it.
    pub(crate) disk: DiskNumber,
    disk_sysfs: PathBuf,
    /// Where it begins on that disk; 0 for the disk itself.
    pub(crate) start_sector: u64,
    pub(crate) bytes: u64,
    /// Which of all disks that ever were it is; none on kernels that do not count them.
    disk_seq: Option<u64>,
    /// Its driver completes whole bios (md, dm, zram) rather than requests.
    pub(crate) bio_based: bool,
}

fn sysfs_of(dev: u64) -> PathBuf {
    PathBuf::from(format!(
        "/sys/dev/block/{}:{}",
        rustix::fs::major(dev),
        rustix::fs::minor(dev)
    ))
}

fn read_number(path: &Path) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.trim()
        .parse()
        .with_context(|| format!("{} holds no number", path.display()))
}

fn parse_dev(text: &str) -> Option<u64> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

impl BlockDevice {
    /// Looks a device up by its path.
    pub(crate) fn find(path: &Path) -> anyhow::Result<Self> {
        let metadata = std::fs::metadata(path)
            .with_context(|| format!("no device {}: give the path of a block device", path.display()))?;
        if metadata.is_dir() {
            bail!(
                "{} is a directory: this build protects block devices; give the device that it lies on",
                path.display()
            );
        }
        if !metadata.file_type().is_block_device() {
            bail!("{} is not a block device", path.display());
        }
        let dev = metadata.rdev();
        let sysfs = std::fs::canonicalize(sysfs_of(dev)).with_context(|| {
            format!(
                "{}: the kernel knows no device {}",
                path.display(),
                sysfs_of(dev).display()
            )
        })?;
        let is_partition = sysfs.join("partition").exists();
        let disk_sysfs = match sysfs.parent() {
            Some(parent) if is_partition => parent.to_path_buf(),
            _ => sysfs.clone(),
        };
        let disk_dev = std::fs::read_to_string(disk_sysfs.join("dev"))
            .ok()
            .and_then(|text| parse_dev(&text))
            .with_context(|| format!("{}: which disk it lies on is not told by sysfs", path.display()))?;
        let device = Self {
            path: path.to_path_buf(),
            dev,
            disk: DiskNumber::from_dev(disk_dev),
            start_sector: if is_partition {
                read_number(&sysfs.join("start"))?
            } else {
                0
            },
            bytes: 0,
            disk_seq: DiskNumber::from_dev(disk_dev).seq(),
            bio_based: !disk_sysfs.join("mq").exists(),
            disk_sysfs,
        };
        let bytes = device.size()?;
        if bytes == 0 {
            bail!("{} has no size: nothing is attached to it", path.display());
        }
        Ok(Self { bytes, ..device })
    }

    /// Its size now. Asked of sysfs: opening a device that nobody has open, and closing it, empties its cache.
    pub(crate) fn size(&self) -> anyhow::Result<u64> {
        Ok(read_number(&sysfs_of(self.dev).join("size"))? * cdp_journal::SECTOR_BYTES)
    }

    /// Size of the whole disk now.
    pub(crate) fn disk_bytes(&self) -> anyhow::Result<u64> {
        Ok(read_number(&self.disk_sysfs.join("size"))? * cdp_journal::SECTOR_BYTES)
    }

    /// Opens it for reading past the page cache.
    pub(crate) fn open_direct(&self) -> anyhow::Result<File> {
        File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .open(&self.path)
            .with_context(|| format!("open {}", self.path.display()))
    }

    /// Why this is not the device any more that was found; `None` if it is.
    pub(crate) fn why_gone(&self) -> Option<&'static str> {
        let sysfs = sysfs_of(self.dev);
        if !sysfs.exists() {
            return Some("its device has gone away");
        }
        if self.size().is_ok_and(|bytes| bytes == 0) {
            return Some("nothing is attached to its device");
        }
        if self.disk.seq() != self.disk_seq {
            return Some("another disk has the number of its device");
        }
        if read_number(&sysfs.join("start")).unwrap_or(0) != self.start_sector {
            return Some("its partition lies elsewhere");
        }
        // A name may be away for a moment while it is made anew.
        let named = std::fs::metadata(&self.path).ok();
        let is_other =
            named.is_some_and(|named| named.file_type().is_block_device() && named.rdev() != self.dev);
        is_other.then_some("its path names another device")
    }

    /// Writes that the disk itself counts as in flight.
    pub(crate) fn writes_in_flight(&self) -> Option<u64> {
        let text = std::fs::read_to_string(self.disk_sysfs.join("inflight")).ok()?;
        text.split_whitespace().nth(1)?.parse().ok()
    }

    /// What the disk has completed so far: tells whether production is using it.
    pub(crate) fn requests_done(&self) -> Option<Requests> {
        let text = std::fs::read_to_string(self.disk_sysfs.join("stat")).ok()?;
        let numbers: Vec<u64> = text
            .split_whitespace()
            .filter_map(|number| number.parse().ok())
            .collect();
        Some(Requests {
            reads: *numbers.first()?,
            writes: *numbers.get(4)?,
        })
    }
}

/// Is there no device under this path, or one that nothing is attached to? Both may change.
pub(crate) fn may_come_back(path: &Path) -> bool {
    std::fs::metadata(path).map_or(true, |metadata| metadata.file_type().is_block_device())
}

/// Does the folder lie on (a part of, or a file system on) this device? Then journaling a write would cause
/// the next one. Follows partitions, stacked devices and loop devices down to the disks.
pub(crate) fn lies_on(folder: &Path, device: &BlockDevice) -> anyhow::Result<bool> {
    let Some(dev) = backing_device(folder)? else {
        return Ok(false);
    };
    stack_contains(dev, device, 0)
}

/// The block device under a folder; None for file systems without one.
fn backing_device(folder: &Path) -> anyhow::Result<Option<u64>> {
    let dev = std::fs::metadata(folder)
        .with_context(|| format!("look at {}", folder.display()))?
        .dev();
    if sysfs_of(dev).exists() {
        return Ok(Some(dev));
    }
    // btrfs and others give their files a number of their own: the mount table names the device.
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let source = table.lines().rev().find_map(|line| {
        let (head, tail) = line.split_once(" - ")?;
        let number = parse_dev(head.split_whitespace().nth(2)?)?;
        (number == dev).then(|| tail.split_whitespace().nth(1).map(str::to_owned))?
    });
    let metadata = source.and_then(|path| std::fs::metadata(path).ok());
    Ok(metadata
        .filter(|metadata| metadata.file_type().is_block_device())
        .map(|metadata| metadata.rdev()))
}

fn stack_contains(dev: u64, device: &BlockDevice, depth: u32) -> anyhow::Result<bool> {
    if depth > STACK_DEPTH_MAX {
        bail!("devices are stacked more than {STACK_DEPTH_MAX} deep under the store");
    }
    if dev == device.dev {
        return Ok(true);
    }
    let Ok(sysfs) = std::fs::canonicalize(sysfs_of(dev)) else {
        return Ok(false);
    };
    let mut below = Vec::new();
    if sysfs.join("partition").exists()
        && let Some(disk) = sysfs.parent()
    {
        // A partition lies on its disk, but two partitions of one disk are apart.
        if DiskNumber::from_dev(number_of(disk)?) == device.disk && device.disk_sysfs == sysfs_or_same(device)
        {
            return Ok(true);
        }
        if DiskNumber::from_dev(number_of(disk)?) == device.disk {
            return Ok(false);
        }
        below.push(number_of(disk)?);
    }
    if let Ok(slaves) = std::fs::read_dir(sysfs.join("slaves")) {
        for slave in slaves {
            below.push(number_of(&slave?.path())?);
        }
    }
    if let Ok(file) = std::fs::read_to_string(sysfs.join("loop/backing_file"))
        && let Some(parent) = Path::new(file.trim()).parent()
        && let Ok(Some(under)) = backing_device(parent)
    {
        below.push(under);
    }
    for dev in below {
        if stack_contains(dev, device, depth + 1)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn sysfs_or_same(device: &BlockDevice) -> PathBuf {
    std::fs::canonicalize(sysfs_of(device.dev)).unwrap_or_else(|_| device.disk_sysfs.clone())
}

fn number_of(sysfs: &Path) -> anyhow::Result<u64> {
    let path = sysfs.join("dev");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    parse_dev(&text).with_context(|| format!("{} holds no device number", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_read() {
        assert_eq!(parse_dev("7:12\n"), Some(rustix::fs::makedev(7, 12)));
        assert_eq!(parse_dev("7"), None);
    }

    #[test]
    fn what_is_no_block_device_is_refused_by_name() {
        for (path, word) in [
            ("/nonexistent-device", "no device"),
            ("/tmp", "directory"),
            ("/etc/hostname", "not a block"),
        ] {
            if path == "/etc/hostname" && !Path::new(path).exists() {
                continue;
            }
            let error = format!("{:#}", BlockDevice::find(Path::new(path)).unwrap_err());
            assert!(error.contains(word) && error.contains(path), "{error}");
        }
    }
}
