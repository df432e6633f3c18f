//! Loop devices and mounts, as the kernel tells of them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::Unmountable;
use super::probe::Part;
use crate::target::unescape;

/// Shown as the source of what is mounted by us: the image, and the tmpfs that holds a folder for each partition.
pub(super) const SOURCE: &str = "cdp-restore";
/// The kernel lets go of a device a moment after its last user has.
const LET_GO_TIME_MAX: Duration = Duration::from_secs(5);
const LET_GO_POLL: Duration = Duration::from_millis(10);

/// A loop device over an image.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    name: String,
}

impl LoopDevice {
    /// Makes a loop device over a part of an image. Past the image's page cache, where the kernel can: what lies inside
    /// has one of its own, and many requests are on their way at once where that cache would wait for each.
    pub(crate) fn attach(image: &Path, part: &Part) -> anyhow::Result<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(format!("--offset={}", part.offset))
            .arg(format!("--sizelimit={}", part.len))
            .arg(image)
            .output()
            .context("run losetup")?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        let path = said(&output.stdout);
        let Some(name) = path.strip_prefix("/dev/").filter(|_| output.status.success()) else {
            bail!(
                "make a loop device over {}: {}",
                image.display(),
                said(&output.stderr)
            );
        };
        // It works without, and slower.
        match Command::new("losetup").args(["--direct-io=on", &path]).output() {
            Ok(output) if output.status.success() => {}
            refused => tracing::debug!(?refused, "no direct I/O on {path}"),
        }
        Ok(LoopDevice {
            name: name.to_owned(),
        })
    }

    /// All that lie over an image.
    pub(crate) fn over(image: &Path) -> anyhow::Result<Vec<Self>> {
        let mut devices = Vec::new();
        for entry in fs::read_dir("/sys/block").context("list the block devices")? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let backing = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"));
            if backing.is_ok_and(|backing| Path::new(backing.trim_end_matches('\n')) == image) {
                devices.push(LoopDevice { name });
            }
        }
        Ok(devices)
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// Detaches it, and waits until that is done.
    pub(crate) fn detach(self) -> anyhow::Result<()> {
        let path = self.path();
        let output = Command::new("losetup")
            .arg("--detach")
            .arg(&path)
            .output()
            .context("run losetup")?;
        let backing = format!("/sys/block/{}/loop/backing_file", self.name);
        let is_gone = wait_until(|| !Path::new(&backing).exists());
        if !is_gone {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            bail!(
                "{} is still in use; stop what uses it and run this again: {said}",
                path.display()
            );
        }
        Ok(())
    }
}

fn wait_until(mut is_done: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    loop {
        if is_done() {
            return true;
        }
        if started.elapsed() >= LET_GO_TIME_MAX {
            return false;
        }
        thread::sleep(LET_GO_POLL);
    }
}

/// One line of the kernel's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mounted {
    pub(crate) at: PathBuf,
    pub(crate) kind: String,
    pub(crate) source: String,
}

impl Mounted {
    /// Is it the folders of partitions?
    pub(crate) fn is_folders(&self) -> bool {
        self.kind == "tmpfs" && self.source == SOURCE
    }

    pub(crate) fn is_image(&self) -> bool {
        // With a subtype where fusermount3 has mounted it.
        self.kind.split('.').next() == Some("fuse") && self.source == SOURCE
    }
}

/// Everything that is mounted, in the order in which it was.
pub(crate) fn mounts() -> anyhow::Result<Vec<Mounted>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("list the mounts")?;
    Ok(text.lines().filter_map(parse_mount).collect())
}

fn parse_mount(line: &str) -> Option<Mounted> {
    let (place, what) = line.split_once(" - ")?;
    let mut what = what.split(' ');
    Some(Mounted {
        at: PathBuf::from(unescape(place.split(' ').nth(4)?)),
        kind: what.next()?.to_owned(),
        source: unescape(what.next()?),
    })
}

/// Mounts the file system on a device.
pub(crate) fn mount_file_system(
    device: &Path,
    kind: &str,
    at: &Path,
    is_writable: bool,
) -> anyhow::Result<()> {
    // The original is often mounted here too: xfs would refuse a second one of the same UUID.
    let data = (kind == "xfs").then_some(c"nouuid");
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    if !is_writable {
        flags |= MountFlags::RDONLY;
    }
    let Err(errno) = rustix::mount::mount(device, at, kind, flags, data) else {
        return Ok(());
    };
    let why = match errno {
        Errno::EXIST if kind == "btrfs" => {
            "a btrfs of the same id is mounted, and this kernel takes only one (Linux 6.7 takes more); unmount \
             that one, or use --raw on another host"
        }
        Errno::NODEV => "this kernel has no such file system",
        Errno::NOMEM | Errno::PERM | Errno::ACCESS | Errno::BUSY | Errno::MFILE | Errno::NFILE => {
            "the kernel could not"
        }
        _ => {
            let (kind, at, source) = (kind.to_owned(), at.to_owned(), errno.into());
            return Err(Unmountable::Refused { kind, at, source }.into());
        }
    };
    let error = anyhow::Error::new(io::Error::from(errno));
    Err(error.context(format!("mount the {kind} at {}: {why}", at.display())))
}

/// Mounts a small file system at `at` with empty folders of these names.
pub(crate) fn mount_folders(at: &Path, names: &[String]) -> anyhow::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount(SOURCE, at, "tmpfs", flags, c"mode=755,size=64k")
        .with_context(|| format!("mount folders at {}", at.display()))?;
    for name in names {
        let folder = at.join(name);
        fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
    }
    rustix::mount::mount_remount(at, flags | MountFlags::RDONLY, c"")
        .with_context(|| format!("make {} read-only", at.display()))
}

/// Unmounts what was mounted last at a place; what is just being let go of is waited for.
pub(crate) fn unmount(at: &Path) -> anyhow::Result<()> {
    let mut outcome = Ok(());
    wait_until(|| {
        outcome = rustix::mount::unmount(at, UnmountFlags::NOFOLLOW);
        if outcome == Err(Errno::PERM) && unmount_fuse(at) {
            outcome = Ok(());
        }
        outcome != Err(Errno::BUSY)
    });
    match outcome {
        // Somebody else was faster.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(Errno::BUSY) => bail!(
            "{} is in use; stop what uses it (fuser -vm {}) and run this again",
            at.display(),
            at.display()
        ),
        Err(errno) => Err(errno).with_context(|| format!("unmount {}", at.display())),
    }
}

/// The same for users who are not root, and may unmount what they have mounted by FUSE.
fn unmount_fuse(at: &Path) -> bool {
    let output = Command::new("fusermount3").arg("-u").arg(at).output();
    output.is_ok_and(|output| output.status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line = "36 35 98:0 /sub /mnt/my\\040mount rw,noatime master:1 - fuse cdp-restore rw,user_id=0";
        let mounted = parse_mount(line).unwrap();
        assert_eq!(mounted.at, Path::new("/mnt/my mount"));
        assert!(mounted.is_image() && mounted.source == "cdp-restore");
        assert_eq!(parse_mount("nonsense"), None);
    }
}
