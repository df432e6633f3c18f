//! Making durable what was appended, apart from appending: it can take the disk far longer than a write.

use std::path::PathBuf;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::LogError;
use super::disk::DiskFile;
use crate::store::StoreLock;
use crate::types::Seq;

/// A sync that was begun ([`LogWriter::begin_sync`](super::LogWriter::begin_sync)). It is done by [`SyncJob::run`]; one
/// that is dropped instead ends the log, as one that fails does.
#[derive(Debug)]
#[must_use]
pub struct SyncJob {
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    appended: Option<Seq>,
    tell: Sender<Result<Option<Seq>, String>>,
    /// Nobody else opens the store meanwhile.
    _lock: Option<Arc<StoreLock>>,
}

impl SyncJob {
    pub(super) fn new(
        file: Arc<dyn DiskFile>,
        path: PathBuf,
        appended: Option<Seq>,
        lock: Option<Arc<StoreLock>>,
    ) -> (Self, Receiver<Result<Option<Seq>, String>>) {
        let (tell, outcome) = bounded(1);
        let job = Self {
            file,
            path,
            appended,
            tell,
            _lock: lock,
        };
        (job, outcome)
    }

    /// Waits for the disk. Returns the last record that was appended before the sync was begun; it is durable now.
    ///
    /// A failure is final, and the writer knows of it.
    pub fn run(self) -> Result<Option<Seq>, LogError> {
        let result = self.file.sync();
        let told = match &result {
            Ok(()) => Ok(self.appended),
            Err(error) => Err(error.to_string()),
        };
        // A writer that is gone reports nothing any more.
        let _ = self.tell.send(told);
        match result {
            Ok(()) => Ok(self.appended),
            Err(source) => Err(LogError::Io {
                action: "sync",
                path: self.path,
                source,
            }),
        }
    }
}
