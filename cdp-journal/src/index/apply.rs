//! From a frame's records to keys.

use std::collections::{BTreeMap, HashMap};

use super::IndexError;
use super::event::{EventBody, StoredEvent};
use super::key::{Level, META_APPLIED, VersionKey, event_key, frame_key, wall_key};
use super::lookup::FrameEntry;
use super::overlay::{DbCursor, Overlay, newest, since};
use super::version::{Place, Source, Version};
use crate::format::{Body, Frame, PlacedRecord, bytes_at, i64_at, u64_at};
use crate::log::FrameLocation;
use crate::types::{BLOCK_BYTES, SECTOR_BYTES, SECTORS_PER_BLOCK, Seq, UNIT_BYTES, VolumeId};

/// A change of the wall clock against the boot clock that is worth a note.
const CLOCK_STEP_NS_MIN: u64 = 100_000_000;
/// Newest versions of partly written blocks that are remembered.
const HEAD_CACHE_BLOCKS: usize = 1 << 16;

/// How far the index has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    pub(crate) last: Option<Seq>,
    /// Running maximum of wall time.
    pub(crate) wall_max: Option<i64>,
    /// Boot and clock offset of the last frame.
    pub(crate) clock: Option<(uuid::Uuid, i64)>,
    /// Where the last frame lies, and its end.
    pub(crate) end: Option<(u64, u64)>,
    pub(crate) volume_bytes: BTreeMap<u16, u64>,
}

impl Applied {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        let (segment, end) = self.end.unwrap_or((0, 0));
        let (boot_id, offset) = self.clock.unwrap_or_default();
        out.extend_from_slice(&Seq::number_of(self.last).to_le_bytes());
        out.extend_from_slice(&self.wall_max.unwrap_or(i64::MIN).to_le_bytes());
        out.extend_from_slice(&segment.to_le_bytes());
        out.extend_from_slice(&end.to_le_bytes());
        out.extend_from_slice(boot_id.as_bytes());
        out.extend_from_slice(&offset.to_le_bytes());
        for (volume, bytes) in &self.volume_bytes {
            out.extend_from_slice(&volume.to_le_bytes());
            out.extend_from_slice(&bytes.to_le_bytes());
        }
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < 56 || !(bytes.len() - 56).is_multiple_of(10) {
            return None;
        }
        let last = Seq::new(u64_at(bytes, 0))?;
        let volumes = bytes[56..].chunks_exact(10);
        Some(Self {
            last: Some(last),
            wall_max: Some(i64_at(bytes, 8)),
            end: Some((u64_at(bytes, 16), u64_at(bytes, 24))),
            clock: Some((uuid::Uuid::from_bytes(bytes_at(bytes, 32)), i64_at(bytes, 48))),
            volume_bytes: volumes
                .map(|v| (u16::from_le_bytes(bytes_at(v, 0)), u64_at(v, 2)))
                .collect(),
        })
    }
}

/// Newest versions of blocks that were written in part: such blocks (a database's log, a file system's
/// superblock) are written again and again.
#[derive(Debug, Default)]
pub(crate) struct HeadCache {
    young: HashMap<(u16, u64), (u64, Version)>,
    old: HashMap<(u16, u64), (u64, Version)>,
}

impl HeadCache {
    fn get(&mut self, block: (u16, u64)) -> Option<(u64, Version)> {
        if let Some(version) = self.young.get(&block) {
            return Some(version.clone());
        }
        let version = self.old.remove(&block)?;
        self.put(block, version.clone());
        Some(version)
    }

    fn put(&mut self, block: (u16, u64), version: (u64, Version)) {
        if self.young.len() >= HEAD_CACHE_BLOCKS / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.old.remove(&block);
        self.young.insert(block, version);
    }

    fn forget(&mut self, volume: u16, blocks: std::ops::Range<u64>) {
        if self.young.is_empty() && self.old.is_empty() {
            return;
        }
        if blocks.end - blocks.start > 4096 {
            self.young.clear();
            self.old.clear();
            return;
        }
        for block in blocks {
            self.young.remove(&(volume, block));
            self.old.remove(&(volume, block));
        }
    }
}

/// A range, cut the way the index addresses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    level: Level,
    unit: u64,
    /// Sectors of the block; all of them on other levels.
    mask: u8,
}

impl Cell {
    fn is_whole(self) -> bool {
        self.mask == 0xff
    }

    fn blocks(self) -> std::ops::Range<u64> {
        let first = self.unit << self.level.block_bits();
        first..first + self.level.blocks()
    }
}

/// Cuts a range into the fewest cells of at most `largest`.
fn cells(offset: u64, len: u64, largest: Level) -> impl Iterator<Item = Cell> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let fits = |level: &Level| {
            *level <= largest && at.is_multiple_of(level.bytes()) && end - at >= level.bytes()
        };
        if let Some(level) = Level::DOWN.into_iter().find(fits) {
            let cell = Cell {
                level,
                unit: at / level.bytes(),
                mask: 0xff,
            };
            at += level.bytes();
            return Some(cell);
        }
        let unit = at / BLOCK_BYTES;
        let first = at % BLOCK_BYTES / SECTOR_BYTES;
        let past = (end.min((unit + 1) * BLOCK_BYTES) - unit * BLOCK_BYTES) / SECTOR_BYTES;
        at = end.min((unit + 1) * BLOCK_BYTES);
        let mask = (((1u32 << past) - 1) & !((1 << first) - 1)) as u8;
        Some(Cell {
            level: Level::Block,
            unit,
            mask,
        })
    })
}

/// Applies one frame.
pub(crate) struct Applier<'a, 'd> {
    pub(crate) applied: &'a mut Applied,
    pub(crate) overlay: &'a mut Overlay,
    pub(crate) db: DbCursor<'d>,
    pub(crate) heads: &'a mut HeadCache,
}

impl Applier<'_, '_> {
    /// Adds the records of `frame` to the overlay. Records before it may be missing: that becomes a gap.
    pub(crate) fn apply(&mut self, frame: &Frame, location: &FrameLocation) -> Result<(), IndexError> {
        let header = &frame.header;
        let expected = Seq::after(self.applied.last);
        if header.first_seq < expected {
            let found = header.first_seq;
            return Err(IndexError::Frame(format!(
                "the frame of seq {found} comes after seq {expected} was applied"
            )));
        }
        let first_wall_ns = frame.records.first().map_or(0, |placed| placed.wall.0);
        if header.first_seq > expected {
            let hole = EventBody::Hole {
                last: Seq::number_of(self.applied.last),
            };
            self.put_event(0, header.first_seq, first_wall_ns, hole)?;
        }
        if let Some((boot_id, offset)) = self.applied.clock
            && boot_id == header.boot_id
        {
            let by_ns = header.wall_offset_ns.saturating_sub(offset);
            if by_ns.unsigned_abs() >= CLOCK_STEP_NS_MIN {
                self.put_event(0, header.first_seq, first_wall_ns, EventBody::ClockStep { by_ns })?;
            }
        }
        let frame_sources = FrameSources { frame, location };
        for placed in &frame.records {
            self.record(placed, &frame_sources)?;
        }
        self.finish(frame, location);
        Ok(())
    }

    fn finish(&mut self, frame: &Frame, location: &FrameLocation) {
        let header = &frame.header;
        let before = self.applied.wall_max;
        let wall_max = frame
            .records
            .iter()
            .map(|placed| placed.wall.0)
            .chain(before)
            .max()
            .unwrap_or(i64::MIN);
        let first_seq = header.first_seq.get();
        let entry = FrameEntry {
            segment: location.segment.0.get(),
            offset: location.offset,
            first_seq,
            last_seq: header.last_seq().get(),
            wall_max,
            head_bytes: header.prefix_bytes() as u64,
        };
        self.overlay.put_other(&frame_key(first_seq), entry.encode());
        if Some(wall_max) > before {
            self.overlay.put_other(&wall_key(wall_max, first_seq), Vec::new());
        }
        self.applied.last = Some(header.last_seq());
        self.applied.wall_max = Some(wall_max);
        self.applied.clock = Some((header.boot_id, header.wall_offset_ns));
        self.applied.end = Some((entry.segment, location.offset + header.frame_bytes as u64));
        self.overlay.put_other(META_APPLIED, self.applied.encode());
    }

    fn record(&mut self, placed: &PlacedRecord, sources: &FrameSources<'_>) -> Result<(), IndexError> {
        let record = &placed.record;
        let volume = record.volume.map_or(0, VolumeId::get);
        let seq = record.seq.get();
        let event = match &record.body {
            Body::Write { .. } => {
                for (cell, source) in sources.of(placed) {
                    self.overwrite(volume, seq, cell, source)?;
                }
                return Ok(());
            }
            Body::Zero { offset, len } | Body::Discard { offset, len } => {
                return self.zero(volume, seq, *offset, *len);
            }
            Body::ReadBack { as_of, .. } => {
                for (cell, source) in sources.of(placed) {
                    self.read_back(volume, Seq::number_of(*as_of), cell, source)?;
                }
                return Ok(());
            }
            Body::ReadBackZero { offset, len, as_of } => {
                for cell in cells(*offset, *len, Level::Region) {
                    self.read_back(volume, Seq::number_of(*as_of), cell, Source::Zero)?;
                }
                return Ok(());
            }
            Body::Tick | Body::Barrier => return Ok(()),
            Body::Resize { bytes } => {
                self.resize(volume, seq, *bytes)?;
                EventBody::Resize { bytes: *bytes }
            }
            Body::Volume {
                kind,
                bytes,
                name,
                path,
            } => {
                self.resize(volume, seq, *bytes)?;
                EventBody::Volume {
                    kind: *kind,
                    bytes: *bytes,
                    name: name.clone(),
                    path: path.clone(),
                }
            }
            Body::GapOpen { cause, last_exact } => EventBody::GapOpen {
                cause: *cause,
                last_exact: Seq::number_of(*last_exact),
            },
            Body::GapClose => EventBody::GapClose,
            Body::Bookmark { label } => EventBody::Bookmark { label: label.clone() },
            Body::Start { agent, boot_id } => EventBody::Start {
                agent: *agent,
                boot_id: *boot_id,
            },
            Body::Stop => EventBody::Stop,
        };
        self.put_event(volume, record.seq, placed.wall.0, event)
    }

    fn put_event(&mut self, volume: u16, seq: Seq, wall_ns: i64, body: EventBody) -> Result<(), IndexError> {
        let key = event_key(volume, seq.get(), body.code());
        let value = serde_json::to_vec(&StoredEvent { wall_ns, body })
            .map_err(|_| IndexError::Corrupt("an event that cannot be stored"))?;
        self.overlay.put_other(&key, value);
        Ok(())
    }

    fn zero(&mut self, volume: u16, seq: u64, offset: u64, len: u64) -> Result<(), IndexError> {
        cells(offset, len, Level::Region).try_for_each(|cell| self.overwrite(volume, seq, cell, Source::Zero))
    }

    /// What lies beyond a smaller size is gone.
    fn resize(&mut self, volume: u16, seq: u64, bytes: u64) -> Result<(), IndexError> {
        let before = self.applied.volume_bytes.insert(volume, bytes).unwrap_or(0);
        if bytes < before {
            self.zero(volume, seq, bytes, before - bytes)
        } else {
            Ok(())
        }
    }

    fn overwrite(&mut self, volume: u16, seq: u64, cell: Cell, source: Source) -> Result<(), IndexError> {
        let key = VersionKey::new(volume, cell.level, cell.unit, seq);
        if cell.is_whole() {
            self.heads.forget(volume, cell.blocks());
            self.overlay.put(key, Version::Whole(source));
            return Ok(());
        }
        let block = (volume, cell.unit);
        let base = match self.heads.get(block) {
            Some(head) => Some(head),
            None => self.newest(volume, cell.unit, u64::MAX)?,
        };
        let base = base.as_ref().map(|(base_seq, version)| (*base_seq, version));
        let version = Version::overwritten(base, cell.mask, seq, source);
        self.heads.put(block, (seq, version.clone()));
        self.overlay.put(key, version);
        Ok(())
    }

    /// The newest version of a block at or before `seq`, as a version of that block.
    fn newest(&mut self, volume: u16, block: u64, seq: u64) -> Result<Option<(u64, Version)>, IndexError> {
        let mut best: Option<(u64, Version)> = None;
        for level in Level::DOWN {
            let unit = block >> level.block_bits();
            // Where levels tie, the smaller one was written to correct the larger.
            if let Some((at, version)) = newest(self.overlay, &mut self.db, volume, level, unit, seq)?
                && best.as_ref().is_none_or(|(best_at, _)| at >= *best_at)
            {
                let version = match version {
                    Version::Whole(source) => {
                        Version::Whole(source.block_further(block - (unit << level.block_bits())))
                    }
                    pieces => pieces,
                };
                best = Some((at, version));
            }
        }
        Ok(best)
    }

    /// Puts bytes that were valid after record `as_of` (0: before everything) where they belong.
    fn read_back(&mut self, volume: u16, as_of: u64, cell: Cell, source: Source) -> Result<(), IndexError> {
        self.heads.forget(volume, cell.blocks());
        // Later versions of a block that was written in part still hold what lay there before.
        let mut own_is_patched = false;
        for (key, version) in since(
            self.overlay,
            &mut self.db,
            (volume, Level::Block),
            cell.blocks(),
            as_of,
        )? {
            let source = source.block_further(key.unit - cell.blocks().start);
            own_is_patched |= cell.level == Level::Block && key.seq() == as_of;
            if let Some(version) = version.read_back_under(key.seq(), cell.mask, as_of, source) {
                self.overlay.put(key, version);
            }
        }
        // A larger version of exactly that record; smaller levels win where Seqs tie, so those must agree.
        for level in [Level::Unit, Level::Span, Level::Region]
            .into_iter()
            .filter(|level| *level < cell.level)
        {
            let blocks = cell.blocks();
            let units = blocks.start >> level.block_bits()..blocks.end >> level.block_bits();
            for (key, _) in since(self.overlay, &mut self.db, (volume, level), units, as_of)? {
                if key.seq() == as_of {
                    self.overlay.put(key, Version::Whole(Source::Zero));
                }
            }
        }
        if own_is_patched {
            return Ok(());
        }
        let version = if cell.is_whole() {
            Version::Whole(source)
        } else {
            let base = self.newest(volume, cell.unit, as_of)?;
            let base = base.as_ref().map(|(base_seq, version)| (*base_seq, version));
            Version::overwritten(base, cell.mask, as_of, source)
        };
        self.overlay
            .put(VersionKey::new(volume, cell.level, cell.unit, as_of), version);
        Ok(())
    }
}

/// Where the data of a frame's records lies.
struct FrameSources<'a> {
    frame: &'a Frame,
    location: &'a FrameLocation,
}

impl FrameSources<'_> {
    fn of<'p>(&'p self, placed: &'p PlacedRecord) -> impl Iterator<Item = (Cell, Source)> + 'p {
        self.frame.parts[placed.parts.clone()]
            .iter()
            .flat_map(move |part| {
                let level = if part.len as u64 == UNIT_BYTES {
                    Level::Unit
                } else {
                    Level::Block
                };
                let group = &self.frame.groups[part.group];
                let sector_in_cell = part.offset % level.bytes() / SECTOR_BYTES;
                let place = Place {
                    segment: self.location.segment.0.get(),
                    group_offset: (self.location.offset + group.offset_in_frame as u64) as u32,
                    group_crc: group.crc,
                    first_sector: (part.in_group as u64 / SECTOR_BYTES) as i16 - sector_in_cell as i16,
                };
                cells(part.offset, part.len as u64, level).map(move |cell| (cell, Source::Data(place)))
            })
    }
}

const _: () = assert!(SECTORS_PER_BLOCK == 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_into_the_fewest_cells() {
        let tib: u64 = 1 << 40;
        assert_eq!(cells(0, tib, Level::Region).count(), 256);
        let odd: Vec<_> = cells(65536 - 512, 512 + 65536 + 1024, Level::Region).collect();
        assert_eq!(
            odd,
            [
                Cell {
                    level: Level::Block,
                    unit: 15,
                    mask: 0x80
                },
                Cell {
                    level: Level::Unit,
                    unit: 1,
                    mask: 0xff
                },
                Cell {
                    level: Level::Block,
                    unit: 32,
                    mask: 0x03
                },
            ]
        );
    }

    #[test]
    fn applied_reads_back() {
        let applied = Applied {
            last: Seq::new(9),
            wall_max: Some(-5),
            clock: Some((uuid::Uuid::from_bytes([3; 16]), 77)),
            end: Some((1, 4096)),
            volume_bytes: [(1, 4096), (7, 1 << 40)].into(),
        };
        assert_eq!(Applied::decode(&applied.encode()), Some(applied));
    }
}
