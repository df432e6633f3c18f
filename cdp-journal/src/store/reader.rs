//! Reading a store, also beside a live writer.

use std::io;
use std::path::Path;

use uuid::Uuid;

use crate::error::{OpenError, ReadError};
use crate::history::{History, VolumeInfo};
use crate::types::{Seq, VolumeId, WallNs};
use crate::verify::VerifyReport;
use crate::view::View;
use crate::when::{Moment, Point, When, WhenError};

/// A store opened for reading. Never touches the folder.
#[derive(Debug)]
pub struct StoreReader {}

impl StoreReader {
    /// Opens the store in `dir` as far as its log reaches now.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let _ = dir;
        unimplemented!()
    }

    /// The store's own id.
    pub fn uuid(&self) -> Uuid {
        unimplemented!()
    }

    /// Takes in what was appended since.
    pub fn refresh(&self) -> Result<(), ReadError> {
        unimplemented!()
    }

    /// The volumes, by number.
    pub fn volumes(&self) -> Result<Vec<VolumeInfo>, ReadError> {
        unimplemented!()
    }

    /// The volume with that name.
    pub fn volume(&self, name: &str) -> Result<Option<VolumeInfo>, ReadError> {
        let _ = name;
        unimplemented!()
    }

    /// A volume over time; `None` if there is no such volume.
    pub fn history(&self, volume: VolumeId) -> Result<Option<History>, ReadError> {
        let _ = volume;
        unimplemented!()
    }

    /// The newest record.
    pub fn head(&self) -> Option<Point> {
        unimplemented!()
    }

    /// Until when history reaches.
    pub fn covered_until(&self) -> Option<WallNs> {
        unimplemented!()
    }

    /// Is somebody writing to the store? Asks without taking the lock.
    pub fn writer_alive(&self) -> io::Result<bool> {
        unimplemented!()
    }

    /// The moment that `when` names, if it can be restored exactly. Waits up to 5 s for a live writer to cover it.
    pub fn resolve(&self, volume: VolumeId, when: &When) -> Result<Moment, WhenError> {
        let _ = (volume, when);
        unimplemented!()
    }

    /// The same without asking whether the moment is exact.
    pub fn locate(&self, when: &When) -> Result<Moment, WhenError> {
        let _ = when;
        unimplemented!()
    }

    /// A volume at a record.
    pub fn view(&self, volume: VolumeId, seq: Seq) -> Result<View, ReadError> {
        let _ = (volume, seq);
        unimplemented!()
    }

    /// Reads the whole log. `progress` is told how many more bytes were read.
    pub fn verify_log(&self, progress: &mut dyn FnMut(u64)) -> Result<VerifyReport, ReadError> {
        let _ = progress;
        unimplemented!()
    }

    /// Bytes of the log.
    pub fn log_bytes(&self) -> Result<u64, ReadError> {
        unimplemented!()
    }
}
