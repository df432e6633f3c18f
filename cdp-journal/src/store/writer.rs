//! Opening a store to append to it.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::OpenError;
use crate::format::GapCause;
use crate::history::VolumeInfo;
use crate::index::IndexWriter;
use crate::log::LogWriter;
use crate::types::Seq;

/// Bounds of a store.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// A segment is closed when the next frame would make it longer than this.
    pub segment_bytes_max: u64,
    /// The store is full when log and index have this many bytes. `None`: no bound but the file system.
    pub store_bytes_max: Option<u64>,
    /// The store is full when the file system has fewer bytes left.
    pub free_bytes_min: u64,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            segment_bytes_max: 256 << 20,
            store_bytes_max: None,
            free_bytes_min: 32 << 20,
        }
    }
}

/// Bytes that recovery cut off the end of the log: an append that a crash had interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The segment.
    pub path: PathBuf,
    /// Where it ends now.
    pub offset: u64,
    /// Bytes cut.
    pub bytes: u64,
}

/// What a volume's history looked like when the store was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeState {
    /// The volume as last declared.
    pub info: VolumeInfo,
    /// Why the head is not exact; `None` if it is.
    pub inexact: Option<GapCause>,
    /// The last record at which history was exact.
    pub last_exact: Option<Seq>,
    /// Gaps so far, an open one included.
    pub gaps: u64,
}

/// What was found when a store was opened for writing.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// Last record in the log.
    pub last_seq: Option<Seq>,
    /// The volumes it tells of.
    pub volumes: Vec<VolumeState>,
    /// What had to be cut.
    pub cut: Option<Cut>,
    /// Durable data that does not match its checksum; the moments that need it are refused.
    pub damages: Vec<crate::verify::Damage>,
    /// The agent of the newest start record, and the boot id.
    pub agent: Option<Uuid>,
    /// The boot of the host that the last frame was captured in.
    pub boot_id: Option<Uuid>,
    /// Was the last record a clean stop?
    pub stopped: bool,
    /// The index had to be rebuilt, and why.
    pub index_rebuilt: Option<String>,
    /// The folder was empty.
    pub created: bool,
}

/// A store, locked against other writers.
#[derive(Debug)]
pub struct StoreWriter {}

impl StoreWriter {
    /// Opens the store in `dir`, or makes one, and recovers it.
    pub fn open(dir: &Path, options: &WriterOptions) -> Result<(Self, Recovered), OpenError> {
        let _ = (dir, options);
        unimplemented!()
    }

    /// The store's own id.
    pub fn uuid(&self) -> Uuid {
        unimplemented!()
    }

    /// Both halves, for a thread each. The lock is held until both are dropped.
    pub fn split(self) -> (LogWriter, IndexWriter) {
        unimplemented!()
    }
}
