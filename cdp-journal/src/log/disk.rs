//! The few things the log asks of a file system, so that tests can take them away.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::{Advice, AtFlags, FallocateFlags, OFlags, StatxFlags};

/// Writes from here on go past the page cache. Shorter ones would wait for the disk more often than they save.
const DIRECT_BYTES_MIN: usize = 128 << 10;
/// Direct writes begin and end at multiples of this, so that no page is written both ways at a time.
const DIRECT_ALIGN_BYTES: u64 = 4096;
/// What is copied at a time where the memory is not aligned as the device wants it.
const DIRECT_COPY_BYTES: usize = 512 << 10;

/// A direct write that takes as long finds the device busy with others; one of 1 MiB takes a few milliseconds at most.
const BUSY_WRITE_TIME: Duration = Duration::from_millis(10);
/// And so does a sync.
const BUSY_SYNC_TIME: Duration = Duration::from_millis(30);

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
    /// Does what must wait for the device take long just now?
    fn is_busy(&self) -> bool {
        false
    }
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
    /// Asks for space ahead. True if there is that space now, whoever else takes some.
    fn reserve(&self, _offset: u64, _len: u64) -> bool {
        false
    }
}

/// A folder of the real file system.
#[derive(Debug)]
pub(crate) struct RealDisk {
    dir: PathBuf,
    writable: bool,
    busy: Arc<Busy>,
}

impl RealDisk {
    pub(crate) fn writable(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            writable: true,
            busy: Arc::default(),
        }
    }

    /// Can only list and open, and what it opens can only be read.
    pub(crate) fn read_only(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            writable: false,
            busy: Arc::default(),
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
        let direct = Direct::open(&self.path(name));
        let busy = Arc::clone(&self.busy);
        Ok(Box::new(RealFile { file, direct, busy }))
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
        let direct = self.writable.then(|| Direct::open(&self.path(name))).flatten();
        let busy = Arc::clone(&self.busy);
        Ok(Box::new(RealFile { file, direct, busy }))
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

    fn is_busy(&self) -> bool {
        self.busy.is()
    }
}

/// Is the device busy with others, such as the host's write-out of what was written in half a minute? What waits for the
/// device then waits behind all of that; what goes by way of the page cache does not, and the kernel bounds how much
/// that may hold back.
#[derive(Debug, Default)]
struct Busy(AtomicBool);

impl Busy {
    fn is(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn wrote(&self, took: Duration) {
        if took >= BUSY_WRITE_TIME {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    fn synced(&self, took: Duration) {
        self.0.store(took >= BUSY_SYNC_TIME, Ordering::Relaxed);
    }
}

/// The same file, past the page cache: what is written once and seldom read soon need not be copied there, nor push
/// out what the host wants to keep.
#[derive(Debug)]
struct Direct {
    file: File,
    memory_align: usize,
    /// For what does not lie in memory as the device wants it.
    copy: Mutex<Vec<u8>>,
    refused: AtomicBool,
}

impl Direct {
    /// `None` where the file system does not say that it can.
    fn open(path: &Path) -> Option<Self> {
        let stat = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::DIOALIGN).ok()?;
        let offset_align = u64::from(stat.stx_dio_offset_align);
        if offset_align == 0 || !DIRECT_ALIGN_BYTES.is_multiple_of(offset_align) {
            return None;
        }
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(OFlags::DIRECT.bits().cast_signed())
            .open(path)
            .ok()?;
        Some(Self {
            file,
            memory_align: stat.stx_dio_mem_align.max(1) as usize,
            copy: Mutex::default(),
            refused: AtomicBool::new(false),
        })
    }

    /// Writes bytes whose place and length are multiples of [`DIRECT_ALIGN_BYTES`]. False if the file system will
    /// not have it.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<bool> {
        if self.refused.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let result = if bytes.as_ptr().addr().is_multiple_of(self.memory_align) {
            self.file.write_all_at(bytes, offset)
        } else {
            self.write_copy_at(offset, bytes)
        };
        match result {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                self.refused.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn write_copy_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut copy = self.copy.lock();
        if copy.is_empty() {
            copy.resize(DIRECT_COPY_BYTES + self.memory_align, 0);
        }
        let start = copy.as_ptr().addr().next_multiple_of(self.memory_align) - copy.as_ptr().addr();
        for (number, piece) in bytes.chunks(DIRECT_COPY_BYTES).enumerate() {
            let aligned = &mut copy[start..start + piece.len()];
            aligned.copy_from_slice(piece);
            self.file
                .write_all_at(aligned, offset + (number * DIRECT_COPY_BYTES) as u64)?;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct RealFile {
    file: File,
    direct: Option<Direct>,
    busy: Arc<Busy>,
}

impl RealFile {
    fn write_cached_at(&self, offset: u64, first: &[u8], second: &[u8]) -> io::Result<()> {
        let written = rustix::io::pwritev(&self.file, &[IoSlice::new(first), IoSlice::new(second)], offset)?;
        // A short write is rare (a signal, or the last free blocks): finish it plainly.
        if written < first.len() {
            self.file
                .write_all_at(&first[written..], offset + written as u64)?;
        }
        let done = written.saturating_sub(first.len());
        if done < second.len() {
            self.file
                .write_all_at(&second[done..], offset + (first.len() + done) as u64)?;
        }
        Ok(())
    }

    /// Writes what of `second` fills whole pages past the page cache, what is left at both ends by way of it.
    fn write_direct_at(&self, direct: &Direct, offset: u64, first: &[u8], second: &[u8]) -> io::Result<bool> {
        let second_at = offset + first.len() as u64;
        let (from, to) = (
            second_at.next_multiple_of(DIRECT_ALIGN_BYTES),
            (second_at + second.len() as u64) / DIRECT_ALIGN_BYTES * DIRECT_ALIGN_BYTES,
        );
        let (head, rest) = second.split_at((from - second_at) as usize);
        let (pages, tail) = rest.split_at((to - from) as usize);
        let begun = Instant::now();
        if !direct.write_at(from, pages)? {
            return Ok(false);
        }
        self.busy.wrote(begun.elapsed());
        if !tail.is_empty() {
            self.file.write_all_at(tail, to)?;
        }
        // Last, so that who follows the log finds all of it once there is a beginning.
        self.write_cached_at(offset, first, head)?;
        Ok(true)
    }
}

impl DiskFile for RealFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.file.read_at(&mut buf[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(bytes) => filled += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn write_at(&self, offset: u64, first: &[u8], second: &[u8]) -> io::Result<()> {
        if let Some(direct) = &self.direct
            && second.len() >= DIRECT_BYTES_MIN
            && !self.busy.is()
            && self.write_direct_at(direct, offset, first, second)?
        {
            return Ok(());
        }
        self.write_cached_at(offset, first, second)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        let begun = Instant::now();
        let result = self.file.sync_data();
        self.busy.synced(begun.elapsed());
        result
    }

    fn reserve(&self, offset: u64, len: u64) -> bool {
        // Only a hint: an append that finds no space says so itself.
        rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, offset, len).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::fault::Random;

    /// Goal: what is written past the page cache, by way of it, and both in one write lies where it should, also
    /// where the memory is not as the device wants it, and while the device is busy now and then. Method: writes of
    /// all kinds one behind the other, compared with the same in memory. Where the file system cannot, all go by way
    /// of the cache.
    #[test]
    fn writes_past_the_page_cache_lie_where_the_others_do() {
        let dir = tempfile::tempdir().unwrap();
        let disk = RealDisk::writable(dir.path());
        let mut random = Random(3);
        let source: Vec<u8> = (0..2 << 20).map(|_| random.next() as u8).collect();
        let mut file = disk.create("1").unwrap();
        file.write_at(0, &source[..64], &[]).unwrap();
        let mut expected = source[..64].to_vec();
        let page = DIRECT_ALIGN_BYTES as usize;
        for round in 0..60 {
            let from = random.below(4096) as usize;
            let to_page = expected.len().next_multiple_of(page) - expected.len();
            let len = match round % 6 {
                0 => 8 * (1 + random.below(600) as usize),
                1 => DIRECT_BYTES_MIN - 8,
                2 => DIRECT_BYTES_MIN,
                3 => to_page + DIRECT_BYTES_MIN, // ends with a page
                4 => DIRECT_COPY_BYTES + 8 * random.below(60_000) as usize,
                _ => (1 << 20) + 8 * random.below(60_000) as usize,
            };
            let (first, second) = (&source[..32], &source[from..from + len]);
            let took = if random.below(3) == 0 {
                BUSY_SYNC_TIME
            } else {
                Duration::ZERO
            };
            disk.busy.synced(took);
            file.reserve(expected.len() as u64, 4 << 20);
            file.write_at(expected.len() as u64, first, second).unwrap();
            expected.extend_from_slice(first);
            expected.extend_from_slice(second);
            if round % 7 == 0 {
                file.sync().unwrap();
                file = disk.open("1").unwrap();
            }
        }
        assert_eq!(file.len().unwrap(), expected.len() as u64);
        let mut found = vec![0; expected.len()];
        assert_eq!(file.read_at(0, &mut found).unwrap(), found.len());
        assert!(found == expected, "what was read is not what was written");
    }
}
