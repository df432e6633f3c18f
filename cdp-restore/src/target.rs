//! What `image` and `rewind` write to.
//!
//! Always true:
//! - T1: under a file's final name lies either what was there before or the whole image, on disk.
//! - T2: a device is opened exclusively: the kernel refuses it while it, a part of it, or the disk it is
//!   part of is mounted, swapped to, or held by another driver.
//! - T3: nothing is written before the target's kind, size and use were checked.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::units::{Bytes, ExactBytes};

mod device;
mod file;
mod flush;
mod in_place;

pub(crate) use device::{DeviceInProgress, DeviceNumber, DeviceTarget, unescape};
pub(crate) use file::{FileInProgress, FileTarget};
pub(crate) use in_place::DeviceInPlace;

/// What is written where zeroes must be; for anything this short, asking the device to zero costs more.
static ZEROES: [u8; 256 << 10] = [0; 256 << 10];

/// Why a target cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum TargetError {
    #[error(
        "{path} is {target}, {volume} was {needed} at that instant; give a target of at least {needed}",
        path = path.display(), target = ExactBytes(*target_bytes), needed = ExactBytes(*volume_bytes)
    )]
    TooSmall {
        path: PathBuf,
        target_bytes: u64,
        volume: String,
        volume_bytes: u64,
    },
    #[error("{path} is in use: {by}; nothing was written", path = path.display())]
    InUse { path: PathBuf, by: String },
    #[error("{path} is read-only; nothing was written", path = path.display())]
    ReadOnly { path: PathBuf },
    #[error("{path} is {kind}; give a file or a block device", path = path.display())]
    NotATarget { path: PathBuf, kind: &'static str },
    #[error("{path} has no name to write a file under; give a file or a block device", path = path.display())]
    NoName { path: PathBuf },
    #[error("{path}: no such folder; make it first", path = path.display())]
    NoFolder { path: PathBuf },
    #[error(
        "{path}: the disk is full; the image needs up to {needed} there and {free} were free; \
         nothing was left behind",
        path = path.display(), needed = Bytes(*needed_bytes), free = Bytes(*free_bytes)
    )]
    Full {
        path: PathBuf,
        needed_bytes: u64,
        free_bytes: u64,
    },
    #[error("interrupted; {left}")]
    Interrupted { left: String },
    #[error("{action} {path}", path = path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl TargetError {
    fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> TargetError {
        move |source| TargetError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// A checked target, not yet opened for writing.
#[derive(Debug)]
pub(crate) enum Target {
    /// A file, new or to be replaced.
    File(FileTarget),
    /// A block device.
    Device(DeviceTarget),
}

impl Target {
    /// Finds out what `path` is and whether an image of `volume_bytes` may be written there.
    pub(crate) fn inspect(path: &Path, volume: &str, volume_bytes: u64) -> Result<Target, TargetError> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return FileTarget::new_file(path).map(Target::File);
            }
            Err(source) => return Err(TargetError::io("look at", path)(source)),
        };
        let kind = metadata.file_type();
        if kind.is_file() {
            return FileTarget::replacing(path, &metadata).map(Target::File);
        }
        if kind.is_block_device() {
            return DeviceTarget::inspect(path, &metadata, volume, volume_bytes).map(Target::Device);
        }
        let kind = match () {
            () if kind.is_dir() => "a folder",
            () if kind.is_char_device() => "a character device",
            () if kind.is_fifo() => "a pipe",
            () if kind.is_socket() => "a socket",
            () => "neither",
        };
        Err(TargetError::NotATarget {
            path: path.to_owned(),
            kind,
        })
    }
}

/// Makes a range of a device read as zero: a long one by unmapping it where the device promises zeroes after
/// that, else by its own zeroing; a short one, or where it offers neither, by writing zeroes.
fn zero_device_range(device: &File, offset: u64, len: u64) -> io::Result<()> {
    if len > ZEROES.len() as u64 {
        for mode in [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE] {
            match rustix::fs::fallocate(device, mode | FallocateFlags::KEEP_SIZE, offset, len) {
                Ok(()) => return Ok(()),
                // Not offered, or the range is not made of the device's own blocks.
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::NODEV) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    let mut at = offset;
    while at < offset + len {
        let piece = (offset + len - at).min(ZEROES.len() as u64);
        device.write_all_at(&ZEROES[..piece as usize], at)?;
        at += piece;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zeroed_range_is_zero_and_its_neighbours_stay() {
        for (offset, len) in [(512, 512), (4096, 4096), (512, 1 << 20), (8192, (1 << 20) + 512)] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&vec![0xee; 2 << 20], 0).unwrap();
            zero_device_range(&file, offset, len).unwrap();
            let mut content = vec![0; 2 << 20];
            file.read_exact_at(&mut content, 0).unwrap();
            let (before, rest) = content.split_at(offset as usize);
            let (zeroed, after) = rest.split_at(len as usize);
            assert!(zeroed.iter().all(|byte| *byte == 0), "{len} bytes at {offset}");
            assert!(
                before.iter().chain(after).all(|byte| *byte == 0xee),
                "{len} bytes at {offset}"
            );
        }
    }

    #[test]
    fn only_files_and_block_devices_are_targets() {
        for (path, says) in [
            ("/", "/ is a folder"),
            ("/dev/null", "/dev/null is a character device"),
            ("/nowhere/at/all.img", "/nowhere/at: no such folder"),
        ] {
            let error = Target::inspect(Path::new(path), "pg", 4096)
                .unwrap_err()
                .to_string();
            assert!(error.starts_with(says), "{error}");
        }
    }

    #[test]
    fn a_target_that_is_too_small_is_told_both_sizes() {
        let error = TargetError::TooSmall {
            path: "disk.img".into(),
            target_bytes: 8 << 30,
            volume: "web01".into(),
            volume_bytes: 20 << 30,
        };
        assert_eq!(
            error.to_string(),
            "disk.img is 8 GiB, web01 was 20 GiB at that instant; give a target of at least 20 GiB"
        );
    }
}
