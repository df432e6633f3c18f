//! What views of a remote store read from.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::line::{AskError, Line};
use super::{Ask, Fault, GroupAt, decode_items, decode_placed, decode_versions};
use crate::error::ReadError;
use crate::index::{BlockVersion, FrameGroups};
use crate::types::{SegmentId, Seq, VolumeId};
use crate::view::{Blocks, GroupCache, GroupName, GroupPlace, Item, PlacedGroup, SegmentBytes};
use crate::wire::{Kind, READ_BYTES_MAX};

/// Groups that are kept for the next read: 32 MiB.
const CACHED_GROUPS_MAX: usize = 512;
/// What is planned together for a small read, so that its neighbours need not ask again.
const WINDOW_BYTES: u64 = 1 << 20;
/// Windows whose plans are kept.
const WINDOWS_MAX: usize = 64;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct RemoteBlocks {
    pub(crate) line: Arc<Line>,
    pub(crate) log: Uuid,
    groups: Arc<GroupCache>,
    /// Of a view, its size; else 0.
    view_bytes: u64,
    plans: Mutex<Plans>,
}

/// The windows of a view that were planned last.
#[derive(Debug, Default)]
struct Plans {
    windows: HashMap<u64, Arc<Vec<Item>>>,
    order: VecDeque<u64>,
}

impl RemoteBlocks {
    pub(crate) fn new(line: &Arc<Line>, log: Uuid) -> Self {
        Self {
            line: Arc::clone(line),
            log,
            groups: Arc::new(GroupCache::new(CACHED_GROUPS_MAX)),
            view_bytes: 0,
            plans: Mutex::default(),
        }
    }

    /// The same for one view of `bytes`.
    pub(crate) fn of_view(&self, bytes: u64) -> Self {
        Self {
            line: Arc::clone(&self.line),
            log: self.log,
            groups: Arc::clone(&self.groups),
            view_bytes: bytes,
            plans: Mutex::default(),
        }
    }

    /// The plan of a window of a view.
    fn window(&self, volume: VolumeId, seq: Seq, start: u64) -> Result<Arc<Vec<Item>>, ReadError> {
        if let Some(items) = self.plans.lock().windows.get(&start) {
            return Ok(Arc::clone(items));
        }
        let end = self.view_bytes.min(start + WINDOW_BYTES);
        let mut items = Vec::new();
        self.ask_plan(volume, seq, start..end, &mut |item| items.push(item))?;
        let items = Arc::new(items);
        let mut plans = self.plans.lock();
        if plans.windows.insert(start, Arc::clone(&items)).is_none() {
            plans.order.push_back(start);
        }
        if plans.order.len() > WINDOWS_MAX
            && let Some(oldest) = plans.order.pop_front()
        {
            plans.windows.remove(&oldest);
        }
        Ok(items)
    }

    fn ask_plan(
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

    /// Takes in the group of that name, as the server told it.
    fn take_in(&self, name: &GroupName, told: &[u8]) -> Result<Option<PlacedGroup>, ReadError> {
        if told.is_empty() && matches!(name, GroupName::InFrame(..)) {
            return Ok(None);
        }
        let placed = decode_placed(told);
        let (segment, offset, stored) = placed.ok_or_else(|| self.nonsense("no data group"))?;
        let place = match *name {
            GroupName::At(place) if (place.segment, place.offset) == (segment, offset) => place,
            GroupName::At(_) => return Err(self.nonsense("another data group")),
            GroupName::InFrame(first, behind) => {
                let frame = offset.checked_sub(u64::from(behind)).map(|offset| FrameGroups {
                    first_seq: first.get(),
                    segment,
                    offset,
                });
                let frame = frame.ok_or_else(|| self.nonsense("a data group outside of its frame"))?;
                self.groups.put_frame(frame);
                GroupPlace::behind(&frame, behind)
            }
        };
        let damage = |what: &str| self.damage(&place, what);
        self.groups.take_in(place, stored, damage).map(Some)
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

    /// What a segment is called in messages.
    fn segment_path(&self, segment: u64) -> PathBuf {
        let segment = Seq::new(segment).map_or_else(String::new, |seq| SegmentId(seq).file_name());
        PathBuf::from(format!("{}/{}/log/{segment}", self.line.server, self.log))
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

/// How the server is asked for a group.
fn at(name: &GroupName) -> GroupAt {
    match *name {
        GroupName::At(GroupPlace { segment, offset, .. }) => GroupAt::Place { segment, offset },
        GroupName::InFrame(first, offset) => GroupAt::Frame { first, offset },
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
        if self.view_bytes == 0 || range.end - range.start > WINDOW_BYTES {
            return self.ask_plan(volume, seq, range, visit);
        }
        let mut start = range.start / WINDOW_BYTES * WINDOW_BYTES;
        while start < range.end {
            let items = self.window(volume, seq, start)?;
            items
                .iter()
                .filter_map(|item| item.clipped(&range))
                .for_each(&mut *visit);
            start += WINDOW_BYTES;
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

    fn groups(&self, names: &[GroupName]) -> Result<Vec<Option<PlacedGroup>>, ReadError> {
        let kept = |name| self.groups.get(&self.groups.place_of(name)?);
        let mut found: Vec<_> = names.iter().map(kept).collect();
        let (groups, wanted): (_, Vec<_>) = (names.iter().zip(&mut found))
            .filter(|(_, found)| found.is_none())
            .map(|(name, found)| (at(name), (name, found)))
            .unzip();
        if wanted.is_empty() {
            return Ok(found);
        }
        let log = self.log;
        let told = self.messages(&Ask::Groups { log, groups }, Kind::Bytes)?;
        if told.len() != wanted.len() {
            return Err(self.nonsense("another number of groups"));
        }
        for ((name, found), told) in wanted.into_iter().zip(told) {
            *found = self.take_in(name, &told)?;
        }
        Ok(found)
    }

    fn segment_bytes(&self, segment: u64) -> Result<Arc<dyn SegmentBytes>, ReadError> {
        let blocks = Self::new(&self.line, self.log);
        Ok(Arc::new(RemoteSegment { blocks, segment }))
    }

    fn damage(&self, place: &GroupPlace, what: &str) -> ReadError {
        let fault = Fault::Damaged {
            path: self.segment_path(place.segment),
            offset: place.offset,
            what: what.to_owned(),
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
