//! File systems on devices: made, mounted, frozen, and always let go.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::device::MIB;
use crate::process::{cmd, poll_until};

/// The file systems that are tested on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4 with its journal.
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
}

impl FileSystem {
    /// As `mount -t` names it.
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
            FileSystem::Btrfs => "btrfs",
        }
    }

    /// The programs that making it needs.
    pub fn programs(self) -> &'static [&'static str] {
        match self {
            FileSystem::Ext4 => &["mkfs.ext4"],
            FileSystem::Xfs => &["mkfs.xfs"],
            FileSystem::Btrfs => &["mkfs.btrfs"],
        }
    }

    /// A size that is small, so that all of it is soon read, and yet enough for it.
    pub fn bytes_min(self) -> u64 {
        match self {
            FileSystem::Ext4 => 96 * MIB,
            FileSystem::Xfs => 304 * MIB, // mkfs.xfs refuses less than 300
            FileSystem::Btrfs => 144 * MIB,
        }
    }

    /// Makes one on `device`.
    pub fn make(self, device: &Path) -> Result<()> {
        let flags: &[&str] = match self {
            FileSystem::Ext4 => &["-q", "-F"],
            FileSystem::Xfs | FileSystem::Btrfs => &["-q", "-f"],
        };
        cmd(format!("mkfs.{}", self.name()))
            .args(flags)
            .arg(device)
            .run()?
            .success()
            .map(drop)
    }
}

/// A mounted file system; unmounted when the guard goes.
#[derive(Debug)]
pub struct Mount {
    dir: PathBuf,
    mounted: bool,
}

impl Mount {
    /// Mounts `device` at `dir`, which is made if need be.
    pub fn new(device: &Path, file_system: FileSystem, dir: &Path) -> Result<Mount> {
        Mount::with_options(device, file_system.name(), dir, "defaults")
    }

    /// The same with the options of `mount -o`, for any kind of file system (`tmpfs`, say).
    pub fn with_options(device: &Path, kind: &str, dir: &Path, options: &str) -> Result<Mount> {
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        cmd("mount")
            .args(["-t", kind, "-o", options])
            .arg(device)
            .arg(dir)
            .run()?
            .success()?;
        Ok(Mount {
            dir: dir.to_owned(),
            mounted: true,
        })
    }

    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes everything and lets nothing more be written until the guard goes.
    pub fn freeze(&self) -> Result<Frozen<'_>> {
        cmd("fsfreeze").arg("--freeze").arg(&self.dir).run()?.success()?;
        Ok(Frozen { mount: self })
    }

    /// Writes everything that is dirty in this file system.
    pub fn sync(&self) -> Result<()> {
        cmd("sync")
            .arg("--file-system")
            .arg(&self.dir)
            .run()?
            .success()
            .map(drop)
    }

    /// Tells the device which blocks are free.
    pub fn trim(&self) -> Result<()> {
        cmd("fstrim").arg(&self.dir).run()?.success().map(drop)
    }

    /// Unmounts it now; an error if it stays busy.
    pub fn unmount(mut self) -> Result<()> {
        poll_until("the file system to be idle", Duration::from_secs(20), || {
            Ok((cmd("umount").arg(&self.dir).run()?.code == 0).then_some(()))
        })?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.mounted {
            return;
        }
        let umount = |flags: &[&str]| {
            let output = Command::new("umount").args(flags).arg(&self.dir).output();
            output.is_ok_and(|output| output.status.success())
        };
        // Lazily at worst: the machine must not keep our mount.
        if !umount(&[]) && !umount(&["--lazy"]) {
            eprintln!("{} stays mounted", self.dir.display());
        }
    }
}

/// A frozen file system; thawed when the guard goes.
#[derive(Debug)]
pub struct Frozen<'a> {
    mount: &'a Mount,
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let thawed = Command::new("fsfreeze")
            .arg("--unfreeze")
            .arg(&self.mount.dir)
            .status();
        if !thawed.is_ok_and(|status| status.success()) {
            eprintln!("{} stays frozen", self.mount.dir.display());
        }
    }
}
