//! Writers that do everything to a file system or a device that software does to them, in random order.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate};

use crate::device;
use crate::process::poll_until;
use crate::rng::Rng;

/// The most bytes that a writer has in one file.
const FILE_BYTES_MAX: u64 = 3 << 20;
/// Files of each writer.
const FILES: u64 = 12;
/// The most bytes of one write.
const WRITE_BYTES_MAX: u64 = 512 << 10;
/// Buffers for direct I/O begin at a multiple of this.
const ALIGN_BYTES: usize = 4096;

/// A buffer that direct I/O takes.
#[derive(Debug)]
struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    fn new(bytes: usize) -> AlignedBuffer {
        let memory = vec![0; bytes + ALIGN_BYTES];
        let start = memory.as_ptr().align_offset(ALIGN_BYTES);
        AlignedBuffer { memory, start }
    }

    fn filled(&mut self, rng: &mut Rng, bytes: u64) -> &[u8] {
        let slice = &mut self.memory[self.start..self.start + bytes as usize];
        rng.fill(slice);
        slice
    }
}

/// Shared between the writers of a mix and the test.
#[derive(Debug, Default)]
struct Progress {
    stop: AtomicBool,
    bytes: AtomicU64,
    steps: AtomicU64,
}

/// Writers at work in the background; stopped when the guard goes.
#[derive(Debug)]
pub struct Mix {
    progress: Arc<Progress>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Mix {
    /// `threads` writers of files in folder `dir`, each held near `bytes_per_second`.
    pub fn on_files(dir: &Path, rng: &mut Rng, threads: usize, bytes_per_second: u64) -> Result<Mix> {
        let mut mix = Mix {
            progress: Arc::default(),
            threads: Vec::new(),
        };
        for number in 0..threads {
            let home = dir.join(format!("writer-{number}"));
            std::fs::create_dir_all(&home).with_context(|| format!("make {}", home.display()))?;
            let mut writer = FileWriter::new(home, rng.fork());
            mix.spawn(bytes_per_second, move || writer.step());
        }
        Ok(mix)
    }

    /// `threads` writers of the raw `device`, each in a part of its own, each held near `bytes_per_second`.
    pub fn on_device(device: &Path, rng: &mut Rng, threads: usize, bytes_per_second: u64) -> Result<Mix> {
        let bytes = device::bytes_of(device)?;
        let mut mix = Mix {
            progress: Arc::default(),
            threads: Vec::new(),
        };
        let part_bytes = bytes / threads as u64 / device::MIB * device::MIB;
        for number in 0..threads as u64 {
            let start = number * part_bytes;
            let end = if number + 1 == threads as u64 {
                bytes
            } else {
                start + part_bytes
            };
            let mut writer = DeviceWriter::open(device, start, end, rng.fork())?;
            mix.spawn(bytes_per_second, move || writer.step());
        }
        Ok(mix)
    }

    fn spawn(&mut self, bytes_per_second: u64, mut step: impl FnMut() -> Result<u64> + Send + 'static) {
        let progress = Arc::clone(&self.progress);
        self.threads.push(std::thread::spawn(move || {
            let started = Instant::now();
            let mut written = 0;
            while !progress.stop.load(Ordering::SeqCst) {
                let bytes = step()?;
                written += bytes;
                progress.bytes.fetch_add(bytes, Ordering::SeqCst);
                progress.steps.fetch_add(1, Ordering::SeqCst);
                let due = Duration::from_secs_f64(written as f64 / bytes_per_second as f64);
                // Held to a rate; capped, so that a stop is followed soon.
                std::thread::sleep(
                    due.saturating_sub(started.elapsed())
                        .min(Duration::from_millis(50)),
                );
            }
            Ok(())
        }));
    }

    /// Waits until `bytes` more bytes have been written.
    pub fn wait_for_bytes(&self, bytes: u64) -> Result<()> {
        let goal = self.progress.bytes.load(Ordering::SeqCst) + bytes;
        poll_until(
            &format!("{bytes} more bytes written"),
            Duration::from_secs(120),
            || {
                let dead = self.threads.iter().any(JoinHandle::is_finished);
                ensure!(!dead, "a writer ended early");
                Ok((self.progress.bytes.load(Ordering::SeqCst) >= goal).then_some(()))
            },
        )
    }

    /// How many operations were done so far.
    pub fn steps(&self) -> u64 {
        self.progress.steps.load(Ordering::SeqCst)
    }

    /// Stops the writers; an error if one had failed.
    pub fn stop(mut self) -> Result<()> {
        self.progress.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| anyhow!("a writer panicked"))??;
        }
        Ok(())
    }
}

impl Drop for Mix {
    fn drop(&mut self) {
        self.progress.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            if let Ok(Err(error)) = thread.join() {
                eprintln!("a writer had failed: {error:#}");
            }
        }
    }
}

/// Writes, cuts, copies, renames and removes files in one folder.
struct FileWriter {
    home: PathBuf,
    rng: Rng,
    buffer: AlignedBuffer,
}

impl FileWriter {
    fn new(home: PathBuf, rng: Rng) -> FileWriter {
        FileWriter {
            home,
            rng,
            buffer: AlignedBuffer::new(WRITE_BYTES_MAX as usize),
        }
    }

    fn file(&mut self) -> PathBuf {
        self.home.join(format!("file-{}", self.rng.below(FILES)))
    }

    /// One random operation; gives the bytes written. A full file system is emptied and used again.
    fn step(&mut self) -> Result<u64> {
        match self.try_step() {
            Err(error) if is_full(&error) => {
                self.empty()?;
                Ok(0)
            }
            done => done,
        }
    }

    fn try_step(&mut self) -> Result<u64> {
        let path = self.file();
        match self.rng.below(20) {
            0..=5 => self.write(&path, OFlags::empty(), 1),
            6..=7 => self.write(&path, OFlags::DIRECT, ALIGN_BYTES as u64),
            8 => self.write(&path, OFlags::DSYNC, 1),
            9 => self.write(&path, OFlags::DIRECT | OFlags::DSYNC, ALIGN_BYTES as u64),
            10..=11 => self.fsync(&path),
            12 => self.truncate(&path),
            13 => self.fallocate(&path),
            14 => self.copy(&path),
            15 => self.rename(&path),
            16 => ignore_missing(std::fs::remove_file(&path)),
            17 => self.link(&path),
            18 => self.small_files(),
            _ => self.remove_small_files(),
        }
    }

    fn open(&self, path: &Path, flags: OFlags) -> Result<File> {
        let flags = flags | OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(rustix::fs::open(path, flags, mode)
            .with_context(|| format!("open {}", path.display()))?
            .into())
    }

    fn write(&mut self, path: &Path, flags: OFlags, unit_bytes: u64) -> Result<u64> {
        let bytes_max = if self.rng.one_in(4) {
            WRITE_BYTES_MAX
        } else {
            16 << 10
        };
        let bytes = self.rng.between(1, bytes_max).next_multiple_of(unit_bytes);
        let offset = self.rng.below(FILE_BYTES_MAX - bytes + 1) / unit_bytes * unit_bytes;
        let file = self.open(path, flags)?;
        file.write_all_at(self.buffer.filled(&mut self.rng, bytes), offset)
            .context("write a file")?;
        Ok(bytes)
    }

    fn fsync(&mut self, path: &Path) -> Result<u64> {
        self.open(path, OFlags::empty())?.sync_all().context("fsync")?;
        Ok(0)
    }

    fn truncate(&mut self, path: &Path) -> Result<u64> {
        let bytes = self.rng.below(FILE_BYTES_MAX);
        self.open(path, OFlags::empty())?
            .set_len(bytes)
            .context("truncate")?;
        Ok(0)
    }

    fn fallocate(&mut self, path: &Path) -> Result<u64> {
        let keep = FallocateFlags::KEEP_SIZE;
        let kinds = [
            FallocateFlags::empty(),
            keep,
            keep | FallocateFlags::PUNCH_HOLE,
            FallocateFlags::ZERO_RANGE,
        ];
        let kind = *self.rng.pick(&kinds);
        let offset = self.rng.below(FILE_BYTES_MAX / 2);
        let bytes = self.rng.between(1, FILE_BYTES_MAX / 2);
        match fallocate(self.open(path, OFlags::empty())?, kind, offset, bytes) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(0),
            Err(error) => Err(std::io::Error::from(error)).context("fallocate"),
        }
    }

    fn copy(&mut self, path: &Path) -> Result<u64> {
        let to = self.file();
        if to == path {
            return Ok(0);
        }
        match std::fs::copy(path, &to) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
            copied => copied.context("copy"),
        }
    }

    fn rename(&mut self, path: &Path) -> Result<u64> {
        let to = self.file();
        ignore_missing(std::fs::rename(path, to))
    }

    fn link(&mut self, path: &Path) -> Result<u64> {
        let to = self.file();
        ignore_missing(std::fs::remove_file(&to))?;
        ignore_missing(std::fs::hard_link(path, to))
    }

    fn small_files(&mut self) -> Result<u64> {
        let folder = self.home.join(format!("folder-{}", self.rng.below(4)));
        std::fs::create_dir_all(&folder).context("make a folder")?;
        let mut written = 0;
        for number in 0..self.rng.between(1, 40) {
            let bytes = self.rng.between(0, 6000);
            std::fs::write(
                folder.join(format!("small-{number}")),
                self.buffer.filled(&mut self.rng, bytes),
            )
            .context("write a small file")?;
            written += bytes;
        }
        Ok(written)
    }

    fn remove_small_files(&mut self) -> Result<u64> {
        ignore_missing(std::fs::remove_dir_all(
            self.home.join(format!("folder-{}", self.rng.below(4))),
        ))
    }

    fn empty(&mut self) -> Result<()> {
        std::fs::remove_dir_all(&self.home).context("empty a folder")?;
        std::fs::create_dir(&self.home).context("make a folder again")
    }
}

fn ignore_missing(done: std::io::Result<()>) -> Result<u64> {
    match done {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(0),
    }
}

fn is_full(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let kind = cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        let errno = cause.downcast_ref::<rustix::io::Errno>();
        matches!(kind, Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
            || matches!(errno, Some(&rustix::io::Errno::NOSPC | &rustix::io::Errno::DQUOT))
    })
}

/// Writes, zeroes and discards in one part of a device, down to single sectors.
struct DeviceWriter {
    path: PathBuf,
    direct: File,
    buffered: File,
    start: u64,
    end: u64,
    sector_bytes: u64,
    rng: Rng,
    buffer: AlignedBuffer,
}

impl DeviceWriter {
    fn open(path: &Path, start: u64, end: u64, rng: Rng) -> Result<DeviceWriter> {
        let open = |flags: OFlags| -> Result<File> {
            let flags = flags | OFlags::RDWR | OFlags::CLOEXEC;
            Ok(rustix::fs::open(path, flags, Mode::empty())
                .with_context(|| format!("open {}", path.display()))?
                .into())
        };
        let sectors = crate::process::cmd("blockdev")
            .arg("--getss")
            .arg(path)
            .output()?;
        Ok(DeviceWriter {
            path: path.to_owned(),
            direct: open(OFlags::DIRECT)?,
            buffered: open(OFlags::empty())?,
            start,
            end,
            sector_bytes: sectors.parse().context("sector size")?,
            rng,
            buffer: AlignedBuffer::new(4 << 20),
        })
    }

    /// A random range in whole units of `unit_bytes`.
    fn range(&mut self, unit_bytes: u64, bytes_max: u64) -> (u64, u64) {
        let bytes_max = bytes_max.min((self.end - self.start) / 2);
        let bytes = self.rng.between(1, bytes_max).next_multiple_of(unit_bytes);
        let offset = self.start + self.rng.below(self.end - self.start - bytes + 1) / unit_bytes * unit_bytes;
        (offset, bytes)
    }

    /// One random operation; gives the bytes written.
    fn step(&mut self) -> Result<u64> {
        match self.rng.below(24) {
            // Mostly near the start of the part, so that ranges overlap often.
            0..=7 => self.write(true, self.sector_bytes, 8 << 10),
            8..=11 => self.write(true, 4096, 128 << 10),
            12 => self.write(true, self.sector_bytes, 4 << 20),
            13..=16 => self.write(false, 1, 64 << 10),
            17..=18 => {
                self.buffered.sync_data().context("fdatasync a device")?;
                Ok(0)
            }
            19 => self.fallocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE),
            20 => self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE),
            21 => {
                let (offset, bytes) = self.range(self.sector_bytes, 1 << 20);
                device::zero_out(&self.path, offset, bytes).map(|()| 0)
            }
            22 => {
                let (offset, bytes) = self.range(4096, 2 << 20);
                device::discard(&self.path, offset, bytes).map(|()| 0)
            }
            _ => {
                let (offset, bytes) = self.range(self.sector_bytes, 64 << 10);
                device::discard(&self.path, offset, bytes).map(|()| 0)
            }
        }
    }

    fn write(&mut self, direct: bool, unit_bytes: u64, bytes_max: u64) -> Result<u64> {
        let (mut offset, bytes) = self.range(unit_bytes, bytes_max);
        if self.rng.one_in(2) {
            let near = (self.start + (1 << 20)).min(self.end - bytes);
            offset = offset.min(near / unit_bytes * unit_bytes).max(self.start);
        }
        let data = self.buffer.filled(&mut self.rng, bytes);
        let file = if direct { &self.direct } else { &self.buffered };
        file.write_all_at(data, offset)
            .with_context(|| format!("write {bytes} bytes at {offset}"))?;
        Ok(bytes)
    }

    fn fallocate(&mut self, kind: FallocateFlags) -> Result<u64> {
        let (offset, bytes) = self.range(self.sector_bytes, 1 << 20);
        match fallocate(&self.buffered, kind, offset, bytes) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(0),
            Err(error) => Err(error).with_context(|| format!("fallocate {kind:?} {bytes} bytes at {offset}")),
        }
    }
}
