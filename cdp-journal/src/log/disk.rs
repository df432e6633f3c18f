//! The few things the log asks of a file system, so that tests can take them away.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, FallocateFlags};

/// A folder of segments.
pub(crate) trait Disk: Debug + Send + Sync {
    /// For messages.
    fn path(&self, name: &str) -> PathBuf;
    /// Names of all files.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes a file that does not exist.
    fn create(&self, name: &str) -> io::Result<Box<dyn DiskFile>>;
    /// Opens one that does.
    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>>;
    /// Removes one.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes names durable.
    fn sync_names(&self) -> io::Result<()>;
    /// Bytes that may still be written.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// A segment.
pub(crate) trait DiskFile: Debug + Send + Sync {
    /// Reads until `buf` is full or the file ends.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
    /// Writes both slices one after the other.
    fn write_at(&self, offset: u64, first: &[u8], second: &[u8]) -> io::Result<()>;
    /// Bytes in the file.
    fn len(&self) -> io::Result<u64>;
    /// Cuts what lies behind, allocated space included.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes contents and length durable.
    fn sync(&self) -> io::Result<()>;
    /// Asks for space ahead; may do nothing.
    fn reserve(&self, _offset: u64, _len: u64) {}
    /// Asks for write-out to begin; may do nothing.
    fn start_write_out(&self, _offset: u64, _len: u64) {}
}

/// A folder of the real file system.
#[derive(Debug)]
pub(crate) struct RealDisk {
    dir: PathBuf,
    writable: bool,
}

impl RealDisk {
    pub(crate) fn writable(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            writable: true,
        }
    }

    /// Can only list and open, and what it opens can only be read.
    pub(crate) fn read_only(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            writable: false,
        }
    }
}

impl Disk for RealDisk {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.dir)?;
        entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(self.path(name))?;
        Ok(Box::new(RealFile(file)))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(self.writable)
            .open(self.path(name))?;
        if self.writable {
            // After a failed fsync the cache may hold what the disk does not: recovery must see the disk. Where the
            // advice is refused, only that protection is missing.
            let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
        }
        Ok(Box::new(RealFile(file)))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path(name))
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.dir)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

#[derive(Debug)]
struct RealFile(File);

impl DiskFile for RealFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.0.read_at(&mut buf[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(bytes) => filled += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn write_at(&self, offset: u64, first: &[u8], second: &[u8]) -> io::Result<()> {
        let written = rustix::io::pwritev(&self.0, &[IoSlice::new(first), IoSlice::new(second)], offset)?;
        // A short write is rare (a signal, or the last free blocks): finish it plainly.
        if written < first.len() {
            self.0.write_all_at(&first[written..], offset + written as u64)?;
        }
        let done = written.saturating_sub(first.len());
        if done < second.len() {
            self.0
                .write_all_at(&second[done..], offset + (first.len() + done) as u64)?;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn reserve(&self, offset: u64, len: u64) {
        // Only a hint: an append that finds no space says so itself.
        let _ = rustix::fs::fallocate(&self.0, FallocateFlags::KEEP_SIZE, offset, len);
    }

    fn start_write_out(&self, offset: u64, len: u64) {
        start_write_out(&self.0, offset, len);
    }
}

#[allow(
    unsafe_code,
    reason = "sync_file_range has no safe wrapper among our dependencies"
)]
fn start_write_out(file: &File, offset: u64, len: u64) {
    use std::os::fd::AsRawFd;
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return;
    };
    // SAFETY: takes no pointers; the descriptor is open for as long as `file` is borrowed. It is a hint, so its
    // result does not matter: the fdatasync that follows reports every failure.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
}
