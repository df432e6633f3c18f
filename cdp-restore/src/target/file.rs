//! A file as the target: written without a name, named when it is complete and on disk.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags};
use rustix::io::Errno;

use super::TargetError;
use super::flush::Flushed;

/// A new image is readable by its owner only: what lies on a device is for root's eyes.
const MODE: u32 = 0o600;

/// A file to be made or replaced.
#[derive(Debug)]
pub(crate) struct FileTarget {
    /// As the user gave it, for messages.
    shown: PathBuf,
    folder: PathBuf,
    name: OsString,
    /// Mode, user and group of the file that is replaced.
    replaces: Option<(u32, u32, u32)>,
}

impl FileTarget {
    pub(super) fn new_file(path: &Path) -> Result<Self, TargetError> {
        if path.is_symlink() {
            // A link to nowhere: say so rather than guess which of the two names was meant.
            return Err(TargetError::NotATarget {
                path: path.to_owned(),
                kind: "a link to a file that is not there",
            });
        }
        FileTarget::at(path, path, None)
    }

    pub(super) fn replacing(path: &Path, metadata: &Metadata) -> Result<Self, TargetError> {
        let real = fs::canonicalize(path).map_err(TargetError::io("look at", path))?;
        let owner = (
            metadata.permissions().mode() & 0o7777,
            metadata.uid(),
            metadata.gid(),
        );
        FileTarget::at(path, &real, Some(owner))
    }

    fn at(shown: &Path, real: &Path, replaces: Option<(u32, u32, u32)>) -> Result<Self, TargetError> {
        let name = real.file_name().ok_or_else(|| TargetError::NoName {
            path: shown.to_owned(),
        })?;
        let folder = match real.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        if !folder.is_dir() {
            return Err(TargetError::NoFolder {
                path: folder.to_owned(),
            });
        }
        Ok(FileTarget {
            shown: shown.to_owned(),
            folder: folder.to_owned(),
            name: name.to_owned(),
            replaces,
        })
    }

    /// Whether a file of that name is there already.
    pub(crate) fn replaces(&self) -> bool {
        self.replaces.is_some()
    }

    /// Bytes that are free where the file will lie, if the file system tells.
    pub(crate) fn free_bytes(&self) -> Option<u64> {
        let stat = rustix::fs::statvfs(&self.folder).ok()?;
        stat.f_bavail.checked_mul(stat.f_frsize)
    }

    /// Makes the file, `bytes` long and zero, without a name where the file system can do that.
    pub(crate) fn create(self, bytes: u64) -> Result<FileInProgress, TargetError> {
        let (file, temporary) = self.open()?;
        let guard = TemporaryName(temporary);
        let prepare = || -> io::Result<Flushed> {
            if let Some((mode, user, group)) = self.replaces {
                // Only root may give files away; others keep what they can.
                let _ = std::os::unix::fs::fchown(&file, Some(user), Some(group));
                file.set_permissions(fs::Permissions::from_mode(mode))?;
            }
            file.set_len(bytes)?;
            Flushed::new(file, bytes)
        };
        let file = prepare().map_err(TargetError::io("prepare", &self.shown))?;
        Ok(FileInProgress {
            target: self,
            file,
            temporary: guard,
        })
    }

    fn open(&self) -> Result<(File, Option<PathBuf>), TargetError> {
        let mut options = OpenOptions::new();
        options.write(true).mode(MODE);
        match options
            .clone()
            .custom_flags(OFlags::TMPFILE.bits() as i32)
            .open(&self.folder)
        {
            Ok(file) => return Ok((file, None)),
            // Not every file system has unnamed files; each says so in its own way.
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT | Errno::NOSYS)
                ) => {}
            Err(source) => return Err(TargetError::io("make a file in", &self.folder)(source)),
        }
        let path = self.temporary_path();
        match options.create_new(true).open(&path) {
            Ok(file) => Ok((file, Some(path))),
            Err(source) => Err(TargetError::io("make", &path)(source)),
        }
    }

    fn temporary_path(&self) -> PathBuf {
        let mut name = OsString::from(".");
        name.push(&self.name);
        name.push(format!(".partial-{}", std::process::id()));
        self.folder.join(name)
    }
}

/// The name of a file that is not complete, if it has one; the file goes with it.
#[derive(Debug)]
struct TemporaryName(Option<PathBuf>);

impl Drop for TemporaryName {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

/// A file that is being written; gone when dropped before [`FileInProgress::finish`].
#[derive(Debug)]
pub(crate) struct FileInProgress {
    target: FileTarget,
    file: Flushed,
    temporary: TemporaryName,
}

impl FileInProgress {
    /// Writes `data` at `offset`. What is never written is a hole.
    pub(crate) fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.file().write_all_at(data, offset)?;
        self.file.wrote(offset, data.len() as u64)
    }

    /// Tells that a range stays a hole.
    pub(crate) fn leave_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.left_out(offset, len)
    }

    /// Puts the file on disk, then under its name.
    pub(crate) fn finish(self) -> Result<(), TargetError> {
        let FileInProgress {
            target,
            file,
            mut temporary,
            ..
        } = self;
        let file = file.finish().map_err(TargetError::io("flush", &target.shown))?;
        let path = match &temporary.0 {
            Some(path) => path.clone(),
            None => {
                let path = target.temporary_path();
                let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
                rustix::fs::linkat(CWD, unnamed, CWD, &path, AtFlags::SYMLINK_FOLLOW)
                    .map_err(|errno| TargetError::io("name", &path)(errno.into()))?;
                temporary.0 = Some(path.clone());
                path
            }
        };
        let name = target.folder.join(&target.name);
        fs::rename(&path, &name).map_err(TargetError::io("name", &name))?;
        temporary.0 = None;
        File::open(&target.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(TargetError::io("flush the folder of", &target.shown))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_in(folder: &Path) -> Vec<OsString> {
        fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect()
    }

    #[test]
    fn a_file_has_its_name_only_once_it_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        let target = FileTarget::new_file(&path).unwrap();
        let file = target.create(1 << 20).unwrap();
        file.write_at(4096, &[7; 4096]).unwrap();
        assert!(!path.exists());
        file.finish().unwrap();
        assert_eq!(names_in(folder.path()), ["disk.img"]);
        let content = fs::read(&path).unwrap();
        assert_eq!(content.len(), 1 << 20);
        assert!(content[4096..8192].iter().all(|byte| *byte == 7));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
    }

    #[test]
    fn a_file_that_is_given_up_leaves_the_old_one_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        fs::write(&path, "before").unwrap();
        let target = FileTarget::replacing(&path, &fs::metadata(&path).unwrap()).unwrap();
        let file = target.create(4096).unwrap();
        file.write_at(0, &[7; 4096]).unwrap();
        drop(file);
        assert_eq!(names_in(folder.path()), ["disk.img"]);
        assert_eq!(fs::read(&path).unwrap(), b"before");
    }

    #[test]
    fn a_temporary_name_is_removed_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        let target = FileTarget::new_file(&path).unwrap();
        let temporary = target.temporary_path();
        let file = Flushed::new(File::create_new(&temporary).unwrap(), 0).unwrap();
        drop(FileInProgress {
            target,
            file,
            temporary: TemporaryName(Some(temporary)),
        });
        assert_eq!(names_in(folder.path()), Vec::<OsString>::new());
    }

    #[test]
    fn a_replaced_file_keeps_its_mode_and_its_links_still_lead_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let (real, link) = (folder.path().join("real.img"), folder.path().join("link.img"));
        fs::write(&real, "before").unwrap();
        fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("real.img", &link).unwrap();
        let target = FileTarget::replacing(&link, &fs::metadata(&link).unwrap()).unwrap();
        assert!(target.replaces());
        target.create(512).unwrap().finish().unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&real).unwrap(), [0; 512]);
        assert_eq!(fs::metadata(&real).unwrap().permissions().mode() & 0o7777, 0o640);
    }
}
