//! A store that can be read, wherever it lies.

use std::fmt::Debug;
use std::io;
use std::ops::RangeInclusive;

use uuid::Uuid;

use super::{FrameData, FrameRecords, StoreReader};
use crate::error::ReadError;
use crate::history::{History, VolumeInfo};
use crate::types::{Seq, VolumeId, WallNs};
use crate::verify::VerifyReport;
use crate::view::View;
use crate::when::{Moment, Point, When, WhenError};

/// Records, frame by frame; see [`StoreReader::records`].
pub type RecordsOf<'a> = Box<dyn Iterator<Item = Result<FrameRecords, ReadError>> + Send + 'a>;

/// What a store answers, whether its folder is here ([`StoreReader`]) or at a server.
pub trait Archive: Debug + Send + Sync {
    /// The store's id.
    fn uuid(&self) -> Uuid;
    /// Takes in what was appended since.
    fn refresh(&self) -> Result<(), ReadError>;
    /// Is somebody writing to it?
    fn writer_alive(&self) -> io::Result<bool>;
    /// Bytes of its log.
    fn log_bytes(&self) -> Result<u64, ReadError>;
    /// The newest record, and the latest time of any.
    fn head(&self) -> Option<Point>;
    /// The volumes, by number.
    fn volumes(&self) -> Result<Vec<VolumeInfo>, ReadError>;
    /// A volume over time; `None` if there is no such volume.
    fn history(&self, volume: VolumeId) -> Result<Option<History>, ReadError>;
    /// The moment that `when` names, if it can be restored exactly; see [`StoreReader::resolve`].
    fn resolve(&self, volume: VolumeId, when: &When) -> Result<Moment, WhenError>;
    /// The same without asking whether the moment is exact.
    fn locate(&self, when: &When) -> Result<Moment, WhenError>;
    /// A volume at a record.
    fn view(&self, volume: VolumeId, seq: Seq) -> Result<View, ReadError>;
    /// The records of `seqs`; see [`StoreReader::records`].
    fn records(&self, seqs: RangeInclusive<Seq>) -> RecordsOf<'_>;
    /// Reads and checks the data of a frame that [`Archive::records`] gave.
    fn frame_data(&self, frame: &FrameRecords) -> Result<FrameData, ReadError>;
    /// Reads the whole log. `progress` is told how many more bytes were read.
    fn verify_log(&self, progress: &mut dyn FnMut(u64)) -> Result<VerifyReport, ReadError>;

    /// Until when history reaches.
    fn covered_until(&self) -> Option<WallNs> {
        self.head().map(|head| head.wall)
    }

    /// The volume with that name.
    fn volume(&self, name: &str) -> Result<Option<VolumeInfo>, ReadError> {
        Ok(self.volumes()?.into_iter().rfind(|volume| volume.name == name))
    }
}

impl Archive for StoreReader {
    fn uuid(&self) -> Uuid {
        self.uuid()
    }

    fn refresh(&self) -> Result<(), ReadError> {
        self.refresh()
    }

    fn writer_alive(&self) -> io::Result<bool> {
        self.writer_alive()
    }

    fn log_bytes(&self) -> Result<u64, ReadError> {
        self.log_bytes()
    }

    fn head(&self) -> Option<Point> {
        self.head()
    }

    fn volumes(&self) -> Result<Vec<VolumeInfo>, ReadError> {
        self.volumes()
    }

    fn history(&self, volume: VolumeId) -> Result<Option<History>, ReadError> {
        self.history(volume)
    }

    fn resolve(&self, volume: VolumeId, when: &When) -> Result<Moment, WhenError> {
        self.resolve(volume, when)
    }

    fn locate(&self, when: &When) -> Result<Moment, WhenError> {
        self.locate(when)
    }

    fn view(&self, volume: VolumeId, seq: Seq) -> Result<View, ReadError> {
        self.view(volume, seq)
    }

    fn records(&self, seqs: RangeInclusive<Seq>) -> RecordsOf<'_> {
        Box::new(self.records(seqs))
    }

    fn frame_data(&self, frame: &FrameRecords) -> Result<FrameData, ReadError> {
        self.frame_data(frame)
    }

    fn verify_log(&self, progress: &mut dyn FnMut(u64)) -> Result<VerifyReport, ReadError> {
        self.verify_log(progress)
    }
}
