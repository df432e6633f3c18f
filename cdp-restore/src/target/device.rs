//! A block device as the target: checked for size and use, then written exclusively.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, major, minor};
use rustix::io::Errno;

use super::flush::Flushed;
use super::{TargetError, zero_device_range};

/// A block device that may be written over.
#[derive(Debug)]
pub(crate) struct DeviceTarget {
    pub(super) path: PathBuf,
    number: DeviceNumber,
    pub(super) bytes: u64,
}

/// A device's major and minor number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DeviceNumber(u32, u32);

impl DeviceNumber {
    /// The number of the block device at `path`, if there is one.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        metadata
            .file_type()
            .is_block_device()
            .then(|| DeviceNumber::from_raw(metadata.rdev()))
    }

    fn from_raw(raw: u64) -> Self {
        DeviceNumber(major(raw), minor(raw))
    }

    /// Reads `8:1`.
    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(DeviceNumber(major.parse().ok()?, minor.parse().ok()?))
    }

    fn sysfs(self) -> PathBuf {
        PathBuf::from(format!("/sys/dev/block/{}:{}", self.0, self.1))
    }
}

impl DeviceTarget {
    pub(super) fn inspect(
        path: &Path,
        metadata: &Metadata,
        volume: &str,
        volume_bytes: u64,
    ) -> Result<Self, TargetError> {
        let number = DeviceNumber::from_raw(metadata.rdev());
        let in_use = |by| TargetError::InUse {
            path: path.to_owned(),
            by,
        };
        if let Some(by) = used_by(number) {
            return Err(in_use(by));
        }
        let mut device = open_exclusively(path, OpenOptions::new().read(true))?;
        let bytes = device
            .seek(SeekFrom::End(0))
            .map_err(TargetError::io("measure", path))?;
        if bytes < volume_bytes {
            let (path, volume) = (path.to_owned(), volume.to_owned());
            return Err(TargetError::TooSmall {
                path,
                target_bytes: bytes,
                volume,
                volume_bytes,
            });
        }
        if fs::read_to_string(number.sysfs().join("ro")).is_ok_and(|text| text.trim() == "1") {
            return Err(TargetError::ReadOnly {
                path: path.to_owned(),
            });
        }
        Ok(DeviceTarget {
            path: path.to_owned(),
            number,
            bytes,
        })
    }

    /// The device's size.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The device's number.
    pub(crate) fn number(&self) -> DeviceNumber {
        self.number
    }

    /// Opens the device for writing; it stays ours alone until it is dropped.
    pub(crate) fn open(self) -> Result<DeviceInProgress, TargetError> {
        let device = open_exclusively(&self.path, OpenOptions::new().write(true))?;
        let metadata = device
            .metadata()
            .map_err(TargetError::io("look at", &self.path))?;
        if DeviceNumber::from_raw(metadata.rdev()) != self.number {
            return Err(TargetError::InUse {
                path: self.path,
                by: "the name stands for another device than a moment ago".to_owned(),
            });
        }
        let device = Flushed::new(device, self.bytes).map_err(TargetError::io("write", &self.path))?;
        Ok(DeviceInProgress {
            path: self.path,
            device,
        })
    }
}

/// A device that is being written over.
#[derive(Debug)]
pub(crate) struct DeviceInProgress {
    path: PathBuf,
    device: Flushed,
}

impl DeviceInProgress {
    /// Writes `data` at `offset`, zeroes and all: what lies there now is a stranger's.
    pub(crate) fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.device.file().write_all_at(data, offset)?;
        self.device.wrote(offset, data.len() as u64)
    }

    /// Makes a range read as zero.
    pub(crate) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        zero_device_range(self.device.file(), offset, len)?;
        self.device.left_out(offset, len)
    }

    /// Waits until everything is on the device.
    pub(crate) fn finish(self) -> Result<(), TargetError> {
        self.device
            .finish()
            .map_err(TargetError::io("flush", &self.path))?;
        Ok(())
    }
}

pub(super) fn open_exclusively(path: &Path, options: &mut OpenOptions) -> Result<File, TargetError> {
    options
        .custom_flags(OFlags::EXCL.bits() as i32)
        .open(path)
        .map_err(|source| match Errno::from_io_error(&source) {
            Some(Errno::BUSY) => {
                let by =
                    "the kernel holds it (mounted in another namespace, swap, RAID, LVM or device mapper)";
                TargetError::InUse {
                    path: path.to_owned(),
                    by: by.to_owned(),
                }
            }
            _ => TargetError::io("open", path)(source),
        })
}

/// Who uses a device, as far as the kernel's lists tell; the exclusive open has the last word.
fn used_by(device: DeviceNumber) -> Option<String> {
    let related = related_devices(device);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    mounted_at(&mounts, &related)
        .map(|point| format!("mounted at {point}"))
        .or_else(|| swapped_to(&swaps, &related).map(|path| format!("{path} is swap")))
        .or_else(|| held_by(&related).map(|holder| format!("{holder} is built on it")))
}

/// The device, its partitions, the disk it is a partition of, and all loop devices that lie on one of them.
fn related_devices(device: DeviceNumber) -> BTreeSet<DeviceNumber> {
    let mut related = parts_and_whole(device);
    let loops = loops_over_devices();
    // A loop device may lie on another.
    loop {
        let on_it = loops.iter().filter(|(_, backing)| related.contains(backing));
        let more: Vec<_> = on_it
            .map(|(number, _)| *number)
            .filter(|number| !related.contains(number))
            .collect();
        if more.is_empty() {
            return related;
        }
        related.extend(more.into_iter().flat_map(parts_and_whole));
    }
}

/// Loop devices over other devices: which, over which.
fn loops_over_devices() -> Vec<(DeviceNumber, DeviceNumber)> {
    let blocks = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let over_device = |block: fs::DirEntry| {
        let backing = fs::read_to_string(block.path().join("loop/backing_file")).ok()?;
        let number = fs::read_to_string(block.path().join("dev")).ok()?;
        let backing = DeviceNumber::of(Path::new(backing.trim_end_matches('\n')))?;
        Some((DeviceNumber::parse(&number)?, backing))
    };
    blocks.filter_map(over_device).collect()
}

fn parts_and_whole(device: DeviceNumber) -> BTreeSet<DeviceNumber> {
    let number_in = |folder: &Path| DeviceNumber::parse(&fs::read_to_string(folder.join("dev")).ok()?);
    let folder = device.sysfs();
    let mut related = BTreeSet::from([device]);
    if folder.join("partition").exists()
        && let Ok(real) = fs::canonicalize(&folder)
    {
        related.extend(real.parent().and_then(number_in));
    }
    for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists() {
            related.extend(number_in(&entry.path()));
        }
    }
    related
}

/// Where one of the devices is mounted, from the text of `/proc/self/mountinfo`.
fn mounted_at(mountinfo: &str, devices: &BTreeSet<DeviceNumber>) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let number = fields.nth(2).and_then(DeviceNumber::parse);
        let point = fields.nth(1)?;
        // btrfs shows a number of its own; its source still names the device.
        let source = line
            .split_once(" - ")
            .and_then(|(_, rest)| rest.split(' ').nth(1));
        let source_number = source.and_then(|source| DeviceNumber::of(Path::new(&unescape(source))));
        [number, source_number]
            .into_iter()
            .flatten()
            .any(|n| devices.contains(&n))
            .then(|| unescape(point))
    })
}

/// Which swap area lies on one of the devices, from the text of `/proc/swaps`.
fn swapped_to(swaps: &str, devices: &BTreeSet<DeviceNumber>) -> Option<String> {
    swaps.lines().skip(1).find_map(|line| {
        let path = unescape(line.split_whitespace().next()?);
        devices
            .contains(&DeviceNumber::of(Path::new(&path))?)
            .then_some(path)
    })
}

/// Which device stands on top of one of the devices.
fn held_by(devices: &BTreeSet<DeviceNumber>) -> Option<String> {
    devices.iter().find_map(|device| {
        let mut holders = fs::read_dir(device.sysfs().join("holders")).ok()?;
        Some(holders.next()?.ok()?.file_name().to_string_lossy().into_owned())
    })
}

/// Undoes the kernel's octal escapes of blanks: `\040` is a space.
pub(crate) fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 27 0:21 / /proc rw,nosuid shared:5 - proc proc rw
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
98 27 8:17 / /mnt/my\\040disk rw - xfs /dev/sdb1 rw
";

    #[test]
    fn a_mount_is_found_by_its_device_number() {
        let found = |major, minor| mounted_at(MOUNTINFO, &BTreeSet::from([DeviceNumber(major, minor)]));
        assert_eq!(found(8, 1).as_deref(), Some("/"));
        assert_eq!(found(8, 17).as_deref(), Some("/mnt/my disk"));
        assert_eq!(found(8, 2), None);
    }

    #[test]
    fn escapes_of_the_kernel_are_undone() {
        for (escaped, plain) in [
            ("/a", "/a"),
            ("/a\\040b", "/a b"),
            ("\\134", "\\"),
            ("/x\\9", "/x\\9"),
            ("\\", "\\"),
            ("\\04", "\\04"),
        ] {
            assert_eq!(unescape(escaped), plain);
        }
    }

    #[test]
    fn device_numbers_are_read_as_sysfs_writes_them() {
        assert_eq!(DeviceNumber::parse("259:3\n"), Some(DeviceNumber(259, 3)));
        assert_eq!(DeviceNumber::parse("x"), None);
        assert_eq!(DeviceNumber::of(Path::new("/dev/null")), None);
    }
}
