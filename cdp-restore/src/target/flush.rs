//! Bringing what is written to disk while more is being written.
//!
//! One flush at the very end would leave a long silent wait, and until then fill the host's memory with pages
//! that are not on disk, which slows everybody on it. So a thread sends every stretch of [`STRETCH_BYTES`] on its
//! way to the disk as soon as all of it is written, and every [`STEP_BYTES`] it flushes what is there; who writes
//! waits once it is far ahead.
//!
//! A stretch of which a part is still to come waits: pages sent one by one would be many small writes to the disk,
//! and many extents in the file.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use rustix::fs::{Advice, fadvise};

/// Bytes between two flushes. Smaller steps cost more than they save: pages are flushed half filled.
const STEP_BYTES: u64 = 1 << 30;
/// What is sent on its way at once.
const STRETCH_BYTES: u64 = 1 << 20;
/// Stretches that wait to be sent.
const STRETCHES_MAX: usize = 4;

/// What the thread is to do.
#[derive(Debug)]
enum Step {
    /// Send the stretch at an offset on its way.
    Start(u64),
    /// Wait until everything that was written is on disk.
    Flush,
}

/// A file and the thread that flushes it.
#[derive(Debug)]
pub(super) struct Flushed {
    file: Arc<File>,
    written_bytes: AtomicU64,
    /// Bytes of each stretch that are still to come.
    missing: Vec<AtomicU32>,
    steps: SyncSender<Step>,
    /// The operating system's number of the error that ended the thread.
    failed: Arc<OnceLock<i32>>,
    thread: JoinHandle<()>,
}

impl Flushed {
    /// Every one of the first `bytes` will be told of once, as written or as a hole.
    pub(super) fn new(file: File, bytes: u64) -> io::Result<Self> {
        let file = Arc::new(file);
        let missing = (0..bytes.div_ceil(STRETCH_BYTES))
            .map(|index| AtomicU32::new((bytes - index * STRETCH_BYTES).min(STRETCH_BYTES) as u32))
            .collect();
        let (steps, due) = sync_channel(STRETCHES_MAX);
        let flushed = Arc::clone(&file);
        // A failed flush is told once and never tried again: a later success could lie. It ends the thread,
        // which the next step finds out.
        let failed = Arc::new(OnceLock::new());
        let failure = Arc::clone(&failed);
        let take = move |step| match step {
            Step::Start(offset) => {
                // Starts the writing of what is dirty there, and lets go of what is not. It is a hint: what comes
                // of the writing is told by the flush.
                let _ = fadvise(
                    &*flushed,
                    offset,
                    NonZeroU64::new(STRETCH_BYTES),
                    Advice::DontNeed,
                );
                Ok(())
            }
            Step::Flush => flushed.sync_data(),
        };
        let flush = move || {
            if let Err(error) = due.iter().try_for_each(take) {
                let _ = failure.set(error.raw_os_error().unwrap_or(0));
            }
        };
        let thread = thread::Builder::new().name("flush".to_owned()).spawn(flush)?;
        Ok(Flushed {
            file,
            written_bytes: AtomicU64::new(0),
            missing,
            steps,
            failed,
            thread,
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Tells that so many bytes were written at an offset; may wait for the disk.
    pub(super) fn wrote(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.settled(offset, bytes, true)?;
        let before = self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before / STEP_BYTES != (before + bytes) / STEP_BYTES {
            self.send(Step::Flush)?;
        }
        Ok(())
    }

    /// Tells that nothing will be written to a range; may wait for the disk.
    pub(super) fn left_out(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.settled(offset, bytes, false)
    }

    fn settled(&self, offset: u64, bytes: u64, written: bool) -> io::Result<()> {
        let (mut at, end) = (offset, offset + bytes);
        while at < end {
            let index = at / STRETCH_BYTES;
            let part_bytes = end.min((index + 1) * STRETCH_BYTES) - at;
            at += part_bytes;
            let Some(missing) = self.missing.get(index as usize) else {
                break;
            };
            let before = missing.fetch_sub(part_bytes as u32, Ordering::Relaxed);
            // Of a stretch that is one hole there is nothing to send.
            if u64::from(before) == part_bytes && (written || part_bytes < STRETCH_BYTES) {
                self.send(Step::Start(index * STRETCH_BYTES))?;
            }
        }
        Ok(())
    }

    fn send(&self, step: Step) -> io::Result<()> {
        // The thread listens for as long as it has not failed.
        self.steps.send(step).map_err(|_| self.failure())
    }

    fn failure(&self) -> io::Error {
        match self.failed.get() {
            Some(number) => io::Error::from_raw_os_error(*number),
            None => io::Error::other("flushing stopped"),
        }
    }

    /// Waits until all of it is on disk; fails if any flush did.
    pub(super) fn finish(self) -> io::Result<Arc<File>> {
        let Flushed {
            file,
            steps,
            failed,
            thread,
            ..
        } = self;
        drop(steps);
        thread
            .join()
            .map_err(|_| io::Error::other("the flushing thread panicked"))?;
        if let Some(number) = failed.get() {
            return Err(io::Error::from_raw_os_error(*number));
        }
        file.sync_all()?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_is_written_over_many_steps_is_all_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let flushed = Flushed::new(File::create(&path).unwrap(), 5 * STEP_BYTES).unwrap();
        for step in 0..5 {
            flushed
                .file()
                .write_all_at(&[step as u8 + 1], step * STEP_BYTES)
                .unwrap();
            flushed.wrote(step * STEP_BYTES, STEP_BYTES).unwrap();
        }
        assert_eq!(
            flushed.finish().unwrap().metadata().unwrap().len(),
            4 * STEP_BYTES + 1
        );
        assert_eq!(fs::metadata(&path).unwrap().len(), 4 * STEP_BYTES + 1);
    }

    /// Goal: a stretch is sent when its last part has come, once, and one that is a hole never. Method: parts in no
    /// order over the borders of stretches; what is missing of each.
    #[test]
    fn a_stretch_is_complete_when_all_its_parts_have_come() {
        const LAST_BYTES: u64 = 4096;
        let file = tempfile::tempfile().unwrap();
        let flushed = Flushed::new(file, 4 * STRETCH_BYTES + LAST_BYTES).unwrap();
        let missing = || -> Vec<u64> {
            let left = flushed.missing.iter();
            left.map(|bytes| bytes.load(Ordering::Relaxed).into()).collect()
        };
        flushed.wrote(STRETCH_BYTES / 2, STRETCH_BYTES).unwrap();
        assert_eq!(
            missing(),
            [
                STRETCH_BYTES / 2,
                STRETCH_BYTES / 2,
                STRETCH_BYTES,
                STRETCH_BYTES,
                LAST_BYTES
            ]
        );
        flushed.left_out(0, STRETCH_BYTES / 2).unwrap();
        flushed
            .left_out(3 * STRETCH_BYTES / 2, 5 * STRETCH_BYTES / 2)
            .unwrap();
        flushed.wrote(4 * STRETCH_BYTES, LAST_BYTES).unwrap();
        assert_eq!(missing(), [0; 5]);
        flushed.finish().unwrap();
    }

    /// Goal: a flush that fails is never forgotten. Method: a descriptor that cannot be flushed at all.
    #[test]
    fn a_failed_flush_fails_the_file() {
        let (_reader, writer) = io::pipe().unwrap();
        let flushed = Flushed::new(File::from(std::os::fd::OwnedFd::from(writer)), 0).unwrap();
        let error = std::iter::repeat_with(|| flushed.wrote(0, STEP_BYTES))
            .find_map(Result::err)
            .unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(flushed.finish().unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
