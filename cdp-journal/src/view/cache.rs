//! What reads keep of the log for the next ones.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{GroupName, GroupPlace, PlacedGroup};
use crate::error::ReadError;
use crate::format::{GROUP_BYTES_MAX, Group, decode_group};
use crate::index::FrameGroups;

/// Frames whose places are kept: some 4 MiB.
const CACHED_FRAMES_MAX: usize = 1 << 16;
/// What is said of a group that is not what was stored.
pub(super) const BAD_CHECKSUM: &str = "bad checksum of a data group";
/// What is said of one whose checksum is right.
pub(super) const BAD_DIRECTORY: &str = "a data group that makes no sense";

thread_local! {
    /// Where a thread unpacks a group, before its bytes get a place of their own.
    static RAW: RefCell<Vec<u8>> = RefCell::new(vec![0; GROUP_BYTES_MAX]);
}

/// The groups that were decoded last, and where frames lie that deltas went back to.
#[derive(Debug)]
pub(crate) struct GroupCache {
    groups_max: usize,
    kept: Mutex<Kept>,
}

/// Segment and offset in it.
type Key = (u64, u64);

#[derive(Debug, Default)]
struct Kept {
    groups: HashMap<Key, Arc<Group>>,
    order: VecDeque<Key>,
    /// By the first Seq of each frame.
    frames: HashMap<u64, FrameGroups>,
}

impl GroupCache {
    /// One that keeps so many groups.
    pub(crate) fn new(groups_max: usize) -> Self {
        Self {
            groups_max,
            kept: Mutex::default(),
        }
    }

    /// Where the group of that name lies, if that is known.
    pub(crate) fn place_of(&self, name: &GroupName) -> Option<GroupPlace> {
        match name {
            GroupName::At(place) => Some(*place),
            GroupName::InFrame(first, offset) => {
                let kept = self.kept.lock();
                kept.frames
                    .get(&first.get())
                    .map(|frame| GroupPlace::behind(frame, *offset))
            }
        }
    }

    /// The group at `place`, if it is kept and its checksum is the one that is wanted.
    pub(crate) fn get(&self, place: &GroupPlace) -> Option<PlacedGroup> {
        let kept = self.kept.lock();
        let group = kept.groups.get(&(place.segment, place.offset))?;
        let is_wanted = place.crc.is_none_or(|crc| crc == group.header.crc);
        is_wanted.then(|| (*place, Arc::clone(group)))
    }

    /// Checks, decodes and keeps the group at `place`, whose bytes `stored` begins with.
    pub(crate) fn take_in(
        &self,
        place: GroupPlace,
        stored: &[u8],
        damage: impl Fn(&str) -> ReadError,
    ) -> Result<PlacedGroup, ReadError> {
        let unpack = |raw: &mut Vec<u8>| {
            let header = decode_group(stored, place.crc, raw)?;
            Some((header, raw.get(..header.raw_bytes)?.to_vec()))
        };
        let unpacked = RAW.with_borrow_mut(unpack);
        let (header, raw) = unpacked.ok_or_else(|| damage(BAD_CHECKSUM))?;
        let group = Arc::new(Group::new(header, raw).ok_or_else(|| damage(BAD_DIRECTORY))?);
        let mut kept = self.kept.lock();
        while kept.order.len() >= self.groups_max {
            if let Some(oldest) = kept.order.pop_front() {
                kept.groups.remove(&oldest);
            }
        }
        let key = (place.segment, place.offset);
        if kept.groups.insert(key, Arc::clone(&group)).is_none() {
            kept.order.push_back(key);
        }
        Ok((place, group))
    }

    /// Keeps where a frame lies.
    pub(crate) fn put_frame(&self, frame: FrameGroups) {
        let mut kept = self.kept.lock();
        if kept.frames.len() >= CACHED_FRAMES_MAX {
            kept.frames.clear();
        }
        kept.frames.insert(frame.first_seq, frame);
    }
}
