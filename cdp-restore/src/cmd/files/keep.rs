//! What belongs to a file beside its content: owner, attributes, mode, times.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, lchown};
use std::path::Path;

use anyhow::Context;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use crate::ext4::{Attribute, Inode, Kind, Timestamp};
use crate::report::Report;
use crate::units::count;

/// Only for who owns a file.
const OWNERS_BITS: u32 = 0o7000;

/// What a user could not keep, for only root may.
#[derive(Debug, Default)]
pub(super) struct Lost {
    owners: u64,
    attributes: u64,
    /// The name of one of them.
    attribute: String,
}

impl Lost {
    pub(super) fn owners(&self) -> u64 {
        self.owners
    }

    pub(super) fn attributes(&self) -> u64 {
        self.attributes
    }

    pub(super) fn tell(&self, report: &Report) {
        if self.owners > 0 {
            report.warn(format!(
                "{} of other owners belong to you now: only root may give them away",
                count(self.owners, "path")
            ));
        }
        if self.attributes > 0 {
            report.warn(format!(
                "{} could not be kept ({} is one): only root may set them",
                count(self.attributes, "extended attribute"),
                self.attribute
            ));
        }
    }

    /// Gives a path what its inode says. Of a folder that is done last, for its times change with what is put into it.
    pub(super) fn keep(
        &mut self,
        path: &Path,
        inode: &Inode,
        attributes: &[Attribute],
    ) -> anyhow::Result<()> {
        let is_kept = self.owner(path, inode)?;
        for attribute in attributes {
            self.attribute(path, attribute)?;
        }
        if inode.kind() != Kind::Symlink {
            // As `cp` does: what a program may do as its owner, it must not as another.
            let dropped = if is_kept { 0 } else { OWNERS_BITS };
            let permissions = Permissions::from_mode(inode.mode() & !dropped);
            fs::set_permissions(path, permissions).context("set its mode")?;
        }
        let times = Timestamps {
            last_access: timespec(inode.accessed()),
            last_modification: timespec(inode.modified()),
        };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).context("set its times")
    }

    /// Is it the right one?
    fn owner(&mut self, path: &Path, inode: &Inode) -> anyhow::Result<bool> {
        let Err(error) = lchown(path, Some(inode.uid()), Some(inode.gid())) else {
            return Ok(true);
        };
        // Not allowed, or there is no such owner in this name space.
        if !matches!(Errno::from_io_error(&error), Some(Errno::PERM | Errno::INVAL)) {
            return Err(error).context("set its owner");
        }
        self.owners += 1;
        // Their own groups are for users to choose.
        let _ = lchown(path, None, Some(inode.gid()));
        Ok(false)
    }

    fn attribute(&mut self, path: &Path, attribute: &Attribute) -> anyhow::Result<()> {
        let Attribute { name, value } = attribute;
        let told = || String::from_utf8_lossy(name).into_owned();
        let Err(errno) = rustix::fs::lsetxattr(path, name.as_slice(), value, XattrFlags::empty()) else {
            return Ok(());
        };
        let is_for_users = name.starts_with(b"user.") || name.starts_with(b"system.posix_acl_");
        if is_for_users || !matches!(errno, Errno::PERM | Errno::OPNOTSUPP | Errno::INVAL) {
            return Err(io::Error::from(errno)).with_context(|| format!("set its attribute {}", told()));
        }
        if self.attributes == 0 {
            self.attribute = format!("{} of {}", told(), path.file_name().unwrap_or_default().display());
        }
        self.attributes += 1;
        Ok(())
    }
}

fn timespec(time: Timestamp) -> Timespec {
    Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    }
}
