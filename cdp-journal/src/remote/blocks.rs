//! What views of a remote store read from.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::line::{AskError, Line};
use super::{Ask, Fault, GROUPS_MAX, decode_items, decode_versions};
use crate::error::ReadError;
use crate::index::{BlockVersion, Place};
use crate::types::{SegmentId, Seq, VolumeId};
use crate::view::{Blocks, GroupCache, Item, SegmentBytes, group_through};
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
    groups: Arc<Mutex<GroupCache>>,
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
            groups: Arc::new(Mutex::new(GroupCache::of(CACHED_GROUPS_MAX))),
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

    /// Fetches groups into the cache, checked.
    fn fetch(&self, places: &[Place]) -> Result<(), ReadError> {
        let ask = Ask::Groups {
            log: self.log,
            places: places
                .iter()
                .map(|place| (place.segment, u64::from(place.group_offset)))
                .collect(),
        };
        let groups = self.messages(&ask, Kind::Bytes)?;
        if groups.len() != places.len() {
            return Err(self.nonsense("another number of groups"));
        }
        for (place, stored) in places.iter().zip(groups) {
            self.take_in(place, &stored)?;
        }
        Ok(())
    }

    fn take_in(&self, place: &Place, stored: &[u8]) -> Result<Arc<Vec<u8>>, ReadError> {
        let read = |buf: &mut [u8]| {
            let bytes = stored.len().min(buf.len());
            buf[..bytes].copy_from_slice(&stored[..bytes]);
            Ok(bytes)
        };
        group_through(&self.groups, place, read, || self.damage(place))
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
    pub(super) fn segment_path(&self, segment: u64) -> PathBuf {
        let segment = Seq::new(segment).map_or_else(String::new, |seq| SegmentId(seq).file_name());
        PathBuf::from(format!("{}/{}/log/{segment}", self.line.server, self.log))
    }

    fn nonsense(&self, what: &str) -> ReadError {
        ReadError::Server {
            server: self.line.server.clone(),
            why: format!("the answer makes no sense: {what}"),
        }
    }

    pub(super) fn read(&self, segment: u64, offset: u64, buf: &mut [u8]) -> Result<usize, ReadError> {
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

    fn will_need(&self, items: &[Item]) -> Result<(), ReadError> {
        let mut wanted: Vec<Place> = items.iter().filter_map(|item| Some(item.data?.place)).collect();
        wanted.sort_unstable_by_key(|place| (place.segment, place.group_offset));
        wanted.dedup_by_key(|place| (place.segment, place.group_offset));
        let cached = self.groups.lock();
        wanted.retain(|place| !cached.has(place));
        drop(cached);
        wanted
            .chunks(GROUPS_MAX)
            .try_for_each(|places| self.fetch(places))
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
        if let Some(group) = self.groups.lock().get(place) {
            return Ok(group);
        }
        let ask = Ask::Groups {
            log: self.log,
            places: vec![(place.segment, u64::from(place.group_offset))],
        };
        let stored = self.messages(&ask, Kind::Bytes)?.concat();
        self.take_in(place, &stored)
    }

    fn segment_bytes(&self, segment: u64) -> Result<Arc<dyn SegmentBytes>, ReadError> {
        let blocks = Self::new(&self.line, self.log);
        Ok(Arc::new(RemoteSegment { blocks, segment }))
    }

    fn damage(&self, place: &Place) -> ReadError {
        let fault = Fault::Damaged {
            path: self.segment_path(place.segment),
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
