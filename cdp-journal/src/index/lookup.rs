//! Questions to the index, whichever layers it has.

use std::collections::BTreeMap;
use std::ops::Range;

use super::IndexError;
use super::db::Db;
use super::event::{Event, StoredEvent};
use super::key::{CHUNK_BLOCKS, Level, be_u64, event_key, frame_key, wall_key};
use super::overlay::{DbCursor, Overlay, for_each_newest, newest};
use super::version::{Source, Version};
use crate::format::{i64_at, u64_at};
use crate::types::{Seq, VolumeId, WallNs};

/// Where a frame lies. Stored as six little-endian numbers of eight bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameEntry {
    pub(crate) segment: u64,
    pub(crate) offset: u64,
    pub(crate) first_seq: u64,
    pub(crate) last_seq: u64,
    /// Running maximum of wall time, this frame included.
    pub(crate) wall_max: i64,
    /// Header and record table: the groups begin behind them.
    pub(crate) head_bytes: u64,
}

impl FrameEntry {
    /// Where its groups lie.
    pub(crate) fn groups(&self) -> FrameGroups {
        FrameGroups {
            first_seq: self.first_seq,
            segment: self.segment,
            offset: self.offset + self.head_bytes,
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let numbers = [
            self.segment,
            self.offset,
            self.first_seq,
            self.last_seq,
            self.wall_max.cast_unsigned(),
            self.head_bytes,
        ];
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    fn decode(bytes: &[u8]) -> Result<Self, IndexError> {
        if bytes.len() != 48 {
            return Err(IndexError::Corrupt("a frame entry that makes no sense"));
        }
        Ok(Self {
            segment: u64_at(bytes, 0),
            offset: u64_at(bytes, 8),
            first_seq: u64_at(bytes, 16),
            last_seq: u64_at(bytes, 24),
            wall_max: i64_at(bytes, 32),
            head_bytes: u64_at(bytes, 40),
        })
    }
}

/// Where the groups of a frame lie, one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameGroups {
    /// First Seq of the frame.
    pub(crate) first_seq: u64,
    /// First Seq of the segment.
    pub(crate) segment: u64,
    /// Of the first of them, in the segment.
    pub(crate) offset: u64,
}

/// The version of a block that a view shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockVersion {
    /// The record it comes from; 0: before everything.
    pub(crate) seq: u64,
    pub(crate) version: Version,
}

const NEVER_WRITTEN: BlockVersion = BlockVersion {
    seq: 0,
    version: Version::Whole(Source::Zero),
};

/// A key and its value.
type Pair = (Vec<u8>, Vec<u8>);

/// Both layers, for reading.
#[derive(Clone, Copy)]
pub(crate) struct Lookup<'a> {
    pub(crate) overlay: &'a Overlay,
    pub(crate) db: Option<&'a Db>,
}

impl<'a> Lookup<'a> {
    pub(crate) fn cursor(&self) -> DbCursor<'a> {
        DbCursor::new(self.db)
    }

    /// The versions that a view at `seq` shows in `blocks`, which must lie in one aligned run of
    /// [`CHUNK_BLOCKS`].
    pub(crate) fn blocks(
        &self,
        db: &mut DbCursor<'_>,
        volume: VolumeId,
        blocks: Range<u64>,
        seq: u64,
        out: &mut Vec<BlockVersion>,
    ) -> Result<(), IndexError> {
        debug_assert!(blocks.is_empty() || blocks.start / CHUNK_BLOCKS == (blocks.end - 1) / CHUNK_BLOCKS);
        let volume = volume.get();
        let mut floor = NEVER_WRITTEN;
        for level in [Level::Region, Level::Span] {
            let unit = blocks.start >> level.block_bits();
            if let Some((at, version)) = newest(self.overlay, db, volume, level, unit, seq)?
                && at >= floor.seq
            {
                floor = BlockVersion { seq: at, version };
            }
        }
        out.clear();
        out.resize((blocks.end - blocks.start) as usize, floor);
        let bits = Level::Unit.block_bits();
        let units = blocks.start >> bits..(blocks.end + Level::Unit.blocks() - 1) >> bits;
        for_each_newest(
            self.overlay,
            db,
            (volume, Level::Unit),
            units,
            seq,
            |unit, at, version| {
                let Version::Whole(source) = version else { return };
                for index in 0..Level::Unit.blocks() {
                    let block = (unit << bits) + index;
                    let slot = block
                        .checked_sub(blocks.start)
                        .and_then(|slot| out.get_mut(slot as usize));
                    if let Some(slot) = slot.filter(|slot| at >= slot.seq) {
                        *slot = BlockVersion {
                            seq: at,
                            version: Version::Whole(source.block_further(index)),
                        };
                    }
                }
            },
        )?;
        for_each_newest(
            self.overlay,
            db,
            (volume, Level::Block),
            blocks.clone(),
            seq,
            |block, at, version| {
                let slot = &mut out[(block - blocks.start) as usize];
                if at >= slot.seq {
                    *slot = BlockVersion { seq: at, version };
                }
            },
        )
    }

    /// The first pair at or after `from` whose key begins with `prefix`.
    fn first_from(&self, from: &[u8], prefix: u8) -> Result<Option<Pair>, IndexError> {
        let over = self.overlay.others.range(from.to_vec()..).next();
        let over = over.map(|(key, value)| (key.clone(), value.clone()));
        let under = match self.db {
            Some(db) => {
                let mut iterator = db.db.raw_iterator();
                iterator.seek(from);
                let pair = iterator.item().map(|(key, value)| (key.to_vec(), value.to_vec()));
                iterator.status()?;
                pair
            }
            None => None,
        };
        let of_kind = |pair: Option<Pair>| pair.filter(|(key, _)| key.first() == Some(&prefix));
        Ok(match (of_kind(over), of_kind(under)) {
            (Some(over), Some(under)) => Some(if under.0 < over.0 { under } else { over }),
            (over, under) => over.or(under),
        })
    }

    /// The last pair at or before `to` whose key begins with `prefix`.
    fn last_to(&self, to: &[u8], prefix: u8) -> Result<Option<Pair>, IndexError> {
        let over = self.overlay.others.range(..=to.to_vec()).next_back();
        let over = over.map(|(key, value)| (key.clone(), value.clone()));
        let under = match self.db {
            Some(db) => {
                let mut iterator = db.db.raw_iterator();
                iterator.seek_for_prev(to);
                let pair = iterator.item().map(|(key, value)| (key.to_vec(), value.to_vec()));
                iterator.status()?;
                pair
            }
            None => None,
        };
        let of_kind = |pair: Option<Pair>| pair.filter(|(key, _)| key.first() == Some(&prefix));
        Ok(match (of_kind(over), of_kind(under)) {
            (Some(over), Some(under)) => Some(if under.0 > over.0 { under } else { over }),
            (over, under) => over.or(under),
        })
    }

    /// The last frame that begins at or before `seq`.
    pub(crate) fn frame_at_or_before(&self, seq: u64) -> Result<Option<FrameEntry>, IndexError> {
        let found = self.last_to(&frame_key(seq), b'f')?;
        found.map(|(_, value)| FrameEntry::decode(&value)).transpose()
    }

    /// The first frame that begins at or after `seq`.
    pub(crate) fn frame_at_or_after(&self, seq: u64) -> Result<Option<FrameEntry>, IndexError> {
        let found = self.first_from(&frame_key(seq), b'f')?;
        found.map(|(_, value)| FrameEntry::decode(&value)).transpose()
    }

    /// The frames that begin at or after `seq`, in order, `most` of them at most.
    pub(crate) fn frames_from(&self, seq: u64, most: u64) -> Result<Vec<FrameEntry>, IndexError> {
        let pairs = self.pairs_between(&frame_key(seq), &frame_key(u64::MAX), most)?;
        pairs.values().map(|value| FrameEntry::decode(value)).collect()
    }

    /// The first frame in which some record is later than `wall`.
    pub(crate) fn first_frame_later_than(&self, wall: WallNs) -> Result<Option<FrameEntry>, IndexError> {
        let Some(later) = wall.0.checked_add(1) else {
            return Ok(None);
        };
        let Some((key, _)) = self.first_from(&wall_key(later, 0), b'w')? else {
            return Ok(None);
        };
        let first_seq = key
            .get(9..)
            .and_then(be_u64)
            .ok_or(IndexError::Corrupt("a time key that makes no sense"))?;
        let frame = self.frame_at_or_before(first_seq)?;
        frame
            .map(Some)
            .ok_or(IndexError::Corrupt("a time without its frame"))
    }

    /// Events of one volume, or with 0 those of all volumes, in order.
    pub(crate) fn events(&self, volume: u16) -> Result<Vec<Event>, IndexError> {
        self.events_between(&event_key(volume, 0, 0), &event_key(volume, u64::MAX, u8::MAX))
    }

    /// Every event there is, volume by volume.
    pub(crate) fn all_events(&self) -> Result<Vec<Event>, IndexError> {
        self.events_between(&event_key(0, 0, 0), &event_key(u16::MAX, u64::MAX, u8::MAX))
    }

    fn events_between(&self, from: &[u8], to: &[u8]) -> Result<Vec<Event>, IndexError> {
        let pairs = self.pairs_between(from, to, u64::MAX)?;
        pairs
            .iter()
            .map(|(key, value)| decode_event(key, value))
            .collect()
    }

    /// The pairs of both layers between two keys, themselves included: the first `most` of them. No versions.
    fn pairs_between(
        &self,
        from: &[u8],
        to: &[u8],
        most: u64,
    ) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, IndexError> {
        let mut pairs = BTreeMap::new();
        if let Some(db) = self.db {
            let mut iterator = db.db.raw_iterator();
            iterator.seek(from);
            while let Some((key, value)) = iterator.item().filter(|(key, _)| *key <= to)
                && (pairs.len() as u64) < most
            {
                pairs.insert(key.to_vec(), value.to_vec());
                iterator.next();
            }
            iterator.status()?;
        }
        let over = self.overlay.others.range(from.to_vec()..=to.to_vec());
        let over = over.take(usize::try_from(most).unwrap_or(usize::MAX));
        pairs.extend(over.map(|(key, value)| (key.clone(), value.clone())));
        while pairs.len() as u64 > most {
            pairs.pop_last();
        }
        Ok(pairs)
    }
}

fn decode_event(key: &[u8], value: &[u8]) -> Result<Event, IndexError> {
    let bad = || IndexError::Corrupt("an event that makes no sense");
    if key.len() != 12 {
        return Err(bad());
    }
    let stored: StoredEvent = serde_json::from_slice(value).map_err(|_| bad())?;
    Ok(Event {
        volume: u16::from_be_bytes([key[1], key[2]]),
        seq: be_u64(&key[3..11]).and_then(Seq::new).ok_or_else(bad)?,
        wall: WallNs(stored.wall_ns),
        body: stored.body,
    })
}
