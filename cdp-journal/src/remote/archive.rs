//! Stores at a server, as their readers see them.

use std::collections::VecDeque;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::blocks::{RemoteBlocks, read_error};
use super::line::{AskError, Line};
use super::{About, Ask, Told, decode_placed};
use crate::error::ReadError;
use crate::format::Frame;
use crate::history::{History, VolumeInfo};
use crate::net::LinkError;
use crate::store::{Archive, FrameData, FrameRecords, RecordsOf};
use crate::types::{Seq, VolumeId, WallNs};
use crate::verify::VerifyReport;
use crate::view::View;
use crate::when::{Moment, Point, When, WhenError};
use crate::wire::Kind;

/// What a certificate lets us read at a server.
#[derive(Debug)]
pub struct RemoteSite {
    line: Arc<Line>,
}

impl RemoteSite {
    /// Connects to `server` (HOST:PORT) with the certificate in the folder `identity`. A question whose connection is
    /// lost is asked again on a new one, for `patience` at most. Blocks; must not be called from within a runtime, nor
    /// may what it gives.
    pub fn open(server: &str, identity: &Path, patience: Duration) -> Result<Self, LinkError> {
        let line = Arc::new(Line::open(server, identity, patience)?);
        Ok(Self { line })
    }

    /// The histories of the certificate's agent, the newest first: how each is called, how many newer ones there are,
    /// and the store itself.
    pub fn stores(&self) -> Result<Vec<(String, usize, RemoteArchive)>, ReadError> {
        let server = &self.line.server;
        let (_, told) = self
            .line
            .ask::<Vec<Told>>(&Ask::Stores, &mut |_| {})
            .map_err(|error| read_error(server, error))?;
        told.into_iter()
            .map(|told| {
                let archive = RemoteArchive {
                    blocks: Arc::new(RemoteBlocks::new(&self.line, told.log)),
                    head: Mutex::new(None),
                };
                archive.about()?;
                Ok((told.label, told.age, archive))
            })
            .collect()
    }
}

/// A store at a server.
#[derive(Debug)]
pub struct RemoteArchive {
    blocks: Arc<RemoteBlocks>,
    /// As last told.
    head: Mutex<Option<Point>>,
}

impl RemoteArchive {
    fn server(&self) -> &str {
        &self.blocks.line.server
    }

    fn ask<T: DeserializeOwned>(&self, ask: &Ask) -> Result<T, AskError> {
        let (_, answer) = self.blocks.line.ask(ask, &mut |_| {})?;
        Ok(answer)
    }

    fn read<T: DeserializeOwned>(&self, ask: &Ask) -> Result<T, ReadError> {
        self.ask(ask).map_err(|error| read_error(self.server(), error))
    }

    fn about(&self) -> Result<About, ReadError> {
        let about: About = self.read(&Ask::About { log: self.blocks.log })?;
        *self.head.lock() = about.head;
        Ok(about)
    }

    fn moment(&self, ask: &Ask) -> Result<Moment, WhenError> {
        self.ask(ask).map_err(|error| match error {
            AskError::Fault(fault) => fault.into_when(self.server()),
            error => WhenError::Read(read_error(self.server(), error)),
        })
    }
}

/// As text. "Ago" is by our own clock.
fn told(when: &When) -> String {
    match when {
        When::Ago(ago) => When::At(WallNs::now().saturating_sub(*ago)).to_string(),
        when => when.to_string(),
    }
}

impl Archive for RemoteArchive {
    fn uuid(&self) -> Uuid {
        self.blocks.log
    }

    fn refresh(&self) -> Result<(), ReadError> {
        // The server takes in what its log has before it answers.
        self.about().map(drop)
    }

    fn writer_alive(&self) -> io::Result<bool> {
        self.about().map(|about| about.live).map_err(io::Error::other)
    }

    fn log_bytes(&self) -> Result<u64, ReadError> {
        self.about().map(|about| about.log_bytes)
    }

    fn head(&self) -> Option<Point> {
        *self.head.lock()
    }

    fn volumes(&self) -> Result<Vec<VolumeInfo>, ReadError> {
        self.read(&Ask::Volumes { log: self.blocks.log })
    }

    fn history(&self, volume: VolumeId) -> Result<Option<History>, ReadError> {
        let log = self.blocks.log;
        self.read(&Ask::History { log, volume })
    }

    fn resolve(&self, volume: VolumeId, when: &When) -> Result<Moment, WhenError> {
        let (log, when) = (self.blocks.log, told(when));
        self.moment(&Ask::Resolve { log, volume, when })
    }

    fn locate(&self, when: &When) -> Result<Moment, WhenError> {
        let (log, when) = (self.blocks.log, told(when));
        self.moment(&Ask::Locate { log, when })
    }

    fn view(&self, volume: VolumeId, seq: Seq) -> Result<View, ReadError> {
        let log = self.blocks.log;
        let bytes = self.read(&Ask::View { log, volume, seq })?;
        Ok(View::new(
            Arc::new(self.blocks.of_view(bytes)),
            volume,
            seq,
            bytes,
        ))
    }

    fn records(&self, seqs: RangeInclusive<Seq>) -> RecordsOf<'_> {
        Box::new(RemoteRecords {
            archive: self,
            rest: (!seqs.is_empty()).then_some(seqs),
            found: VecDeque::new(),
        })
    }

    fn frame_data(&self, frame: &FrameRecords) -> Result<FrameData, ReadError> {
        frame.read_data(&*self.blocks)
    }

    fn verify_log(&self, progress: &mut dyn FnMut(u64)) -> Result<VerifyReport, ReadError> {
        let ask = Ask::Verify { log: self.blocks.log };
        let asked = self.blocks.line.ask(&ask, progress);
        let (_, report) = asked.map_err(|error| read_error(self.server(), error))?;
        Ok(report)
    }
}

/// Records, some frames at a time.
struct RemoteRecords<'a> {
    archive: &'a RemoteArchive,
    rest: Option<RangeInclusive<Seq>>,
    found: VecDeque<FrameRecords>,
}

impl RemoteRecords<'_> {
    fn fetch(&mut self, seqs: RangeInclusive<Seq>) -> Result<(), ReadError> {
        let blocks = &self.archive.blocks;
        let ask = Ask::Heads {
            log: blocks.log,
            seqs: seqs.clone(),
        };
        let asked = blocks.line.ask::<Option<Seq>>(&ask, &mut |_| {});
        let (heads, next) = asked.map_err(|error| read_error(self.archive.server(), error))?;
        for (kind, head) in heads {
            let placed = decode_placed(&head).filter(|_| kind == Kind::Head);
            let frame =
                placed.and_then(|(segment, offset, head)| Some((Frame::parse(head).ok()?, segment, offset)));
            let (frame, segment, offset) = frame.ok_or_else(|| ReadError::Server {
                server: self.archive.server().to_owned(),
                why: "the answer makes no sense: no record table".to_owned(),
            })?;
            let frame = FrameRecords::new(frame, &seqs, segment, offset);
            if !frame.records.is_empty() {
                self.found.push_back(frame);
            }
        }
        // A server that does not get on would be asked for ever.
        self.rest = next
            .filter(|next| next > seqs.start())
            .map(|next| next..=*seqs.end());
        Ok(())
    }
}

impl Iterator for RemoteRecords<'_> {
    type Item = Result<FrameRecords, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.found.is_empty() {
            let seqs = self.rest.take()?;
            if let Err(error) = self.fetch(seqs) {
                return Some(Err(error));
            }
        }
        self.found.pop_front().map(Ok)
    }
}
