//! What views of a remote store read from.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::line::{AskError, Line};
use super::{Ask, Fault, decode_items, decode_versions};
use crate::error::ReadError;
use crate::index::{BlockVersion, Place};
use crate::types::{SegmentId, Seq, VolumeId};
use crate::view::{Blocks, GroupCache, Item, SegmentBytes, group_through};
use crate::wire::{Kind, READ_BYTES_MAX};

/// See the module's head.
#[derive(Debug)]
pub(crate) struct RemoteBlocks {
    pub(crate) line: Arc<Line>,
    pub(crate) log: Uuid,
    groups: Mutex<GroupCache>,
}

impl RemoteBlocks {
    pub(crate) fn new(line: &Arc<Line>, log: Uuid) -> Self {
        Self {
            line: Arc::clone(line),
            log,
            groups: Mutex::default(),
        }
    }

    /// Asks for messages of one kind.
    fn messages(&self, ask: &Ask, kind: Kind) -> Result<Vec<Vec<u8>>, ReadError> {
        let asked = self.line.ask::<()>(ask, &mut |_| {});
        let (messages, ()) = asked.map_err(|error| read_error(&self.line.server, error))?;
        let bodies = messages
            .into_iter()
            .map(|(found, body)| (found == kind).then_some(body));
        bodies
            .collect::<Option<_>>()
            .ok_or_else(|| self.nonsense("messages of another kind"))
    }

    fn nonsense(&self, what: &str) -> ReadError {
        ReadError::Server {
            server: self.line.server.clone(),
            why: format!("the answer makes no sense: {what}"),
        }
    }

    fn read(&self, segment: u64, offset: u64, buf: &mut [u8]) -> Result<usize, ReadError> {
        let mut filled = 0;
        for piece in buf.chunks_mut(READ_BYTES_MAX) {
            let ask = Ask::Read {
                log: self.log,
                segment,
                offset: offset + filled as u64,
                bytes: piece.len() as u64,
            };
            let bytes = self.messages(&ask, Kind::Bytes)?.concat();
            let target = piece.get_mut(..bytes.len());
            target
                .ok_or_else(|| self.nonsense("more bytes than were asked for"))?
                .copy_from_slice(&bytes);
            filled += bytes.len();
            if bytes.len() < piece.len() {
                break;
            }
        }
        Ok(filled)
    }
}

pub(super) fn read_error(server: &str, error: AskError) -> ReadError {
    match error {
        AskError::Fault(fault) => fault.into_read(server),
        AskError::Link(error) => ReadError::Server {
            server: server.to_owned(),
            why: error.to_string(),
        },
    }
}

impl Blocks for RemoteBlocks {
    fn plan(
        &self,
        volume: VolumeId,
        seq: Seq,
        range: Range<u64>,
        visit: &mut dyn FnMut(Item),
    ) -> Result<(), ReadError> {
        let ask = Ask::Plan {
            log: self.log,
            volume,
            seq,
            from: range.start,
            to: range.end,
        };
        let mut at = range.start;
        for body in self.messages(&ask, Kind::Items)? {
            for item in decode_items(&body).ok_or_else(|| self.nonsense("no stretches"))? {
                // Whoever takes them in relies on this.
                let follows = item.offset == at && item.len > 0 && item.len <= range.end - at;
                if !follows {
                    return Err(self.nonsense("stretches that do not follow each other"));
                }
                at += item.len;
                visit(item);
            }
        }
        if at < range.end {
            return Err(self.nonsense("stretches that end early"));
        }
        Ok(())
    }

    fn versions(
        &self,
        volume: VolumeId,
        seq: Option<Seq>,
        blocks: Range<u64>,
        out: &mut Vec<BlockVersion>,
    ) -> Result<(), ReadError> {
        let ask = Ask::Versions {
            log: self.log,
            volume,
            seq,
            from: blocks.start,
            to: blocks.end,
        };
        let bytes = self.messages(&ask, Kind::Bytes)?.concat();
        *out = decode_versions(&bytes)
            .filter(|versions| versions.len() as u64 == blocks.end - blocks.start)
            .ok_or_else(|| self.nonsense("no versions"))?;
        Ok(())
    }

    fn group(&self, place: &Place) -> Result<Arc<Vec<u8>>, ReadError> {
        let read = |buf: &mut [u8]| self.read(place.segment, u64::from(place.group_offset), buf);
        group_through(&self.groups, place, read, || self.damage(place))
    }

    fn segment_bytes(&self, segment: u64) -> Result<Arc<dyn SegmentBytes>, ReadError> {
        let blocks = Self::new(&self.line, self.log);
        Ok(Arc::new(RemoteSegment { blocks, segment }))
    }

    fn damage(&self, place: &Place) -> ReadError {
        let segment = Seq::new(place.segment).map_or_else(String::new, |seq| SegmentId(seq).file_name());
        let fault = Fault::Damaged {
            path: PathBuf::from(format!("{}/{}/log/{segment}", self.line.server, self.log)),
            offset: u64::from(place.group_offset),
            what: "bad checksum of a data group".to_owned(),
            seqs: None,
        };
        fault.into_read(&self.line.server)
    }
}

struct RemoteSegment {
    blocks: RemoteBlocks,
    segment: u64,
}

impl SegmentBytes for RemoteSegment {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize, ReadError> {
        self.blocks.read(self.segment, offset, buf)
    }
}
