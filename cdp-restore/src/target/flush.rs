//! Bringing what is written to disk while more is being written.
//!
//! One flush at the very end would leave a long silent wait, and until then fill the host's memory with pages
//! that are not on disk, which slows everybody on it. So a thread sends every long run on its way to the disk as
//! soon as it is written, and every [`STEP_BYTES`] it flushes what is there; who writes waits once it is far ahead.
//!
//! Short runs wait for a flush: their neighbours are probably still to come, and pages sent one by one would be
//! many small writes to the disk, and many extents in the file.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use rustix::fs::{Advice, fadvise};

/// Bytes between two flushes. Smaller steps cost more than they save: pages are flushed half filled.
const STEP_BYTES: u64 = 1 << 30;
/// A run that is worth a way of its own to the disk.
const RUN_BYTES_MIN: u64 = 256 << 10;
/// Runs that wait to be sent.
const RUNS_MAX: usize = 4;

/// What the thread is to do.
#[derive(Debug)]
enum Step {
    /// Send bytes at an offset on their way.
    Start(u64, NonZeroU64),
    /// Wait until everything that was written is on disk.
    Flush,
}

/// A file and the thread that flushes it.
#[derive(Debug)]
pub(super) struct Flushed {
    file: Arc<File>,
    written_bytes: AtomicU64,
    steps: SyncSender<Step>,
    /// The operating system's number of the error that ended the thread.
    failed: Arc<OnceLock<i32>>,
    thread: JoinHandle<()>,
}

impl Flushed {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let file = Arc::new(file);
        let (steps, due) = sync_channel(RUNS_MAX);
        let flushed = Arc::clone(&file);
        // A failed flush is told once and never tried again: a later success could lie. It ends the thread,
        // which the next step finds out.
        let failed = Arc::new(OnceLock::new());
        let failure = Arc::clone(&failed);
        let take = move |step| match step {
            Step::Start(offset, bytes) => {
                // Starts the writing of what is dirty there, and lets go of what is not. It is a hint: what comes
                // of the writing is told by the flush.
                let _ = fadvise(&*flushed, offset, Some(bytes), Advice::DontNeed);
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
        let before = self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before / STEP_BYTES != (before + bytes) / STEP_BYTES {
            self.send(Step::Flush)
        } else if let Some(run) = NonZeroU64::new(bytes).filter(|run| run.get() >= RUN_BYTES_MIN) {
            self.send(Step::Start(offset, run))
        } else {
            Ok(())
        }
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
        let flushed = Flushed::new(File::create(&path).unwrap()).unwrap();
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

    /// Goal: a flush that fails is never forgotten. Method: a descriptor that cannot be flushed at all.
    #[test]
    fn a_failed_flush_fails_the_file() {
        let (_reader, writer) = io::pipe().unwrap();
        let flushed = Flushed::new(File::from(std::os::fd::OwnedFd::from(writer))).unwrap();
        let error = std::iter::repeat_with(|| flushed.wrote(0, STEP_BYTES))
            .find_map(Result::err)
            .unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(flushed.finish().unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
