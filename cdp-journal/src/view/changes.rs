//! Where a volume can have changed between two moments.
//!
//! A block has changed if the index has a version of it, of whatever level, later than the one moment and not later
//! than the other: then the version that the later moment shows is one of those, and otherwise both show the same. Two
//! ways tell:
//!
//! - [`looked_up`]: the version that the later moment shows of every block. Costs what the volume is long.
//! - [`recorded`]: the record tables of the log after the first moment, which name every place that got such a version.
//!   Costs what was recorded since. A read-back counts where it is valid, so those that come after the later moment are
//!   looked at as well.
//!
//! The index was made from the same records, so both tell the same.

use std::ops::Range;

use super::Blocks;
use super::plan::{blocks_of, chunks};
use super::source::ViewStore;
use crate::error::ReadError;
use crate::format::{Body, Frame};
use crate::index::{BlockVersion, EventBody, FrameEntry};
use crate::types::{BLOCK_BYTES, Seq, VolumeId};

/// Two moments of a volume, and where their differences are looked for.
#[derive(Clone, Debug)]
pub(crate) struct Between {
    pub(crate) volume: VolumeId,
    /// Versions later than this; `None`: than before everything.
    pub(crate) after: Option<Seq>,
    /// Versions not later than this.
    pub(crate) until: Seq,
    /// Bytes of the volume.
    pub(crate) range: Range<u64>,
}

/// What reading the records may cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    frames: u64,
    records: u64,
}

impl Bound {
    /// To read the table of a frame costs as much as to look up so many blocks, ...
    const BLOCKS_PER_FRAME: u64 = 512;
    /// ... and each of its records as much as these.
    const BLOCKS_PER_RECORD: u64 = 4;
    /// So few are read in no time.
    const LEAST: Self = Self {
        frames: 16,
        records: 256,
    };
    /// What is kept in memory of so many is 128 MiB.
    const MOST: Self = Self {
        frames: 1 << 18,
        records: 1 << 22,
    };

    /// Above that, looking up every block of the range costs less.
    fn of(range: &Range<u64>) -> Self {
        let blocks = (range.end - range.start) / BLOCK_BYTES;
        let (least, most) = (Self::LEAST, Self::MOST);
        Self {
            frames: (blocks / 2 / Self::BLOCKS_PER_FRAME).clamp(least.frames, most.frames),
            records: (blocks / 2 / Self::BLOCKS_PER_RECORD).clamp(least.records, most.records),
        }
    }
}

/// Ranges (of whole blocks but for the ends of the range, merged, in order) that have changed.
pub(super) fn changed(store: &ViewStore, between: &Between) -> Result<Vec<Range<u64>>, ReadError> {
    match recorded(store, between, Bound::of(&between.range)) {
        Ok(Some(changed)) => return Ok(changed),
        Ok(None) => {}
        // The index may be whole all the same.
        Err(error) => tracing::debug!(%error, "what has changed is asked of the index"),
    }
    looked_up(store, between)
}

/// Tells it by the versions of all blocks.
pub(crate) fn looked_up<B: Blocks + ?Sized>(
    store: &B,
    between: &Between,
) -> Result<Vec<Range<u64>>, ReadError> {
    let after = Seq::number_of(between.after);
    let mut changed = Vec::new();
    let mut versions: Vec<BlockVersion> = Vec::new();
    for chunk in chunks(between.range.clone()) {
        let blocks = blocks_of(&chunk);
        store.versions(between.volume, Some(between.until), blocks.clone(), &mut versions)?;
        for (block, version) in blocks.zip(&versions) {
            if version.seq > after {
                add(&mut changed, block..block + 1, &between.range);
            }
        }
    }
    Ok(changed)
}

/// Tells it by the records; `None` if there are more of them than `bound`.
fn recorded(
    store: &ViewStore,
    between: &Between,
    bound: Bound,
) -> Result<Option<Vec<Range<u64>>>, ReadError> {
    let Some(frames) = frames_after(store, between.after, bound)? else {
        return Ok(None);
    };
    let mut blocks = cut_off(store, between)?;
    for entry in &frames {
        let (frame, _) = store.frame_head(entry)?;
        blocks.extend(blocks_in(&frame, between));
    }
    blocks.sort_unstable_by_key(|blocks| blocks.start);
    let mut changed = Vec::new();
    for blocks in blocks {
        add(&mut changed, blocks, &between.range);
    }
    Ok(Some(changed))
}

/// The frames that hold the records after `after`; `None` if they or their records are more than `bound`.
fn frames_after(
    store: &ViewStore,
    after: Option<Seq>,
    bound: Bound,
) -> Result<Option<Vec<FrameEntry>>, ReadError> {
    let after = Seq::number_of(after);
    store.ask(|lookup| {
        let Some(last) = lookup.frame_at_or_before(u64::MAX)? else {
            return Ok(Some(Vec::new()));
        };
        if last.last_seq.saturating_sub(after) > bound.records {
            return Ok(None);
        }
        let first = lookup.frame_at_or_before(after.saturating_add(1))?;
        let from = first.map_or(0, |first| first.first_seq);
        let mut frames = lookup.frames_from(from, bound.frames.saturating_add(2))?;
        frames.retain(|frame| frame.last_seq > after);
        Ok((frames.len() as u64 <= bound.frames).then_some(frames))
    })
}

/// What smaller sizes cut off.
fn cut_off(store: &ViewStore, between: &Between) -> Result<Vec<Range<u64>>, ReadError> {
    let events = store.ask(|lookup| lookup.events(between.volume.get()))?;
    let mut blocks = Vec::new();
    let mut before = 0;
    for event in events {
        let (EventBody::Volume { bytes, .. } | EventBody::Resize { bytes }) = event.body else {
            continue;
        };
        if bytes < before && between.has(Some(event.seq)) {
            blocks.push(blocks_of(&(bytes..before)));
        }
        before = bytes;
    }
    Ok(blocks)
}

/// Blocks that a record of `frame` gave a version between the two moments.
fn blocks_in<'a>(frame: &'a Frame, between: &'a Between) -> impl Iterator<Item = Range<u64>> + 'a {
    let of_volume = frame.records.iter().map(|placed| &placed.record);
    let of_volume = of_volume.filter(|record| record.volume == Some(between.volume));
    of_volume.filter_map(|record| {
        let (offset, len, valid_after) = match record.body {
            Body::Write { offset, len } | Body::Zero { offset, len } | Body::Discard { offset, len } => {
                (offset, len, Some(record.seq))
            }
            Body::ReadBack { offset, len, as_of } | Body::ReadBackZero { offset, len, as_of } => {
                (offset, len, as_of)
            }
            // Sizes are told by events; the others change nothing.
            Body::Resize { .. }
            | Body::Volume { .. }
            | Body::GapOpen { .. }
            | Body::GapClose
            | Body::Bookmark { .. }
            | Body::Start { .. }
            | Body::Stop
            | Body::Tick
            | Body::Barrier => return None,
        };
        let is_between = between.has(valid_after) && len > 0;
        is_between.then(|| blocks_of(&(offset..offset + len)))
    })
}

impl Between {
    /// Is that later than the one, and not later than the other?
    fn has(&self, seq: Option<Seq>) -> bool {
        seq > self.after && seq <= Some(self.until)
    }
}

/// Adds blocks that begin no earlier than the last ones, as far as they lie in `range`.
fn add(changed: &mut Vec<Range<u64>>, blocks: Range<u64>, range: &Range<u64>) {
    let start = (blocks.start * BLOCK_BYTES).max(range.start);
    let end = (blocks.end * BLOCK_BYTES).min(range.end);
    if start >= end {
        return;
    }
    match changed.last_mut() {
        Some(last) if start <= last.end => last.end = last.end.max(end),
        _ => changed.push(start..end),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;

    use uuid::Uuid;

    use super::*;
    use crate::format::{
        DeltaCache, FrameBuilder, FrameHeader, Origin, RecordFlags, SealedFrame, VolumeKind,
    };
    use crate::store::{LOG_DIR, StoreWriter, WriterOptions};
    use crate::types::BootNs;

    const BYTES: u64 = 1 << 20;

    fn volume(number: u16) -> VolumeId {
        VolumeId::new(number).unwrap()
    }

    fn frame(first: Seq, records: &[(u16, Body)]) -> SealedFrame {
        let mut frame = FrameBuilder::new(first);
        for (volume, body) in records {
            let data = match body {
                Body::Write { len, .. } | Body::ReadBack { len, .. } => vec![7; *len as usize],
                _ => Vec::new(),
            };
            let (origin, flags) = (Origin::default(), RecordFlags::default());
            let volume = VolumeId::new(*volume);
            frame
                .push(BootNs(1), volume, origin, flags, body.clone(), &[&data])
                .unwrap();
        }
        let mut cache = DeltaCache::new(1 << 20);
        frame.seal_with(&mut cache, Uuid::nil(), 0).unwrap()
    }

    fn declared(number: u16) -> (u16, Body) {
        let body = Body::Volume {
            kind: VolumeKind::Block,
            bytes: BYTES,
            name: format!("v{number}"),
            path: "/dev/vdb".to_owned(),
        };
        (number, body)
    }

    /// Goal: the records tell what the index does, of their volume alone, also where a read-back comes after both moments,
    /// and a damaged record table costs nothing but time. Method: a few frames, partly in RocksDB; both ways for every
    /// two moments; then a byte of the last table is another. Random histories: `it/replay.rs`.
    #[test]
    fn records_and_index_tell_the_same_and_damage_is_gone_round() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = StoreWriter::open(dir.path(), &WriterOptions::default()).unwrap();
        let (mut log, mut index) = store.split();
        let write = |volume, offset, len| (volume, Body::Write { offset, len });
        let frames = [
            vec![declared(1), declared(2), write(1, 0, 512), write(2, 8192, 4096)],
            vec![write(1, 65536 - 512, 1024), write(2, 0, 65536), (1, Body::Tick)],
            vec![
                (
                    1,
                    Body::Resize {
                        bytes: BYTES / 2 - 512,
                    },
                ),
                (1, Body::Resize { bytes: BYTES }),
                write(1, 4096, 4096),
            ],
            vec![
                (
                    1,
                    Body::ReadBack {
                        offset: 1 << 19,
                        len: 8192,
                        as_of: Seq::new(5),
                    },
                ),
                (
                    1,
                    Body::ReadBackZero {
                        offset: 0,
                        len: 12288,
                        as_of: Seq::new(2),
                    },
                ),
            ],
        ];
        let mut last = None;
        let mut damage_at = 0;
        for (number, records) in frames.iter().enumerate() {
            let frame = frame(Seq::after(last), records);
            let location = log.append(&frame).unwrap();
            log.sync().unwrap();
            index.apply(frame.head(), &location).unwrap();
            if number == 1 {
                index.flush().unwrap();
            }
            last = Some(frame.last_seq());
            damage_at = location.offset + FrameHeader::BYTES as u64;
        }
        let views = index.views();
        let last = last.unwrap().get();
        let every = || {
            let moments = (0..=last).flat_map(|after| (after.max(1)..=last).map(move |until| (after, until)));
            moments.flat_map(|(after, until)| {
                let ranges = [0..BYTES, 5000..70_000];
                [1, 2]
                    .into_iter()
                    .zip(ranges)
                    .map(move |(number, range)| Between {
                        volume: volume(number),
                        after: Seq::new(after),
                        until: Seq::new(until).unwrap(),
                        range,
                    })
            })
        };
        let mut found = 0;
        for between in every() {
            let told = recorded(views, &between, Bound::MOST).unwrap().unwrap();
            assert_eq!(told, looked_up(&**views, &between).unwrap(), "{between:?}");
            found += told.len();
        }
        assert!(found > 100, "{found}");
        let all = every().next().unwrap();
        for bound in [
            Bound {
                frames: 3,
                ..Bound::MOST
            },
            Bound {
                records: last - 1,
                ..Bound::MOST
            },
        ] {
            assert_eq!(recorded(views, &all, bound).unwrap(), None, "{bound:?}");
        }
        let segment = fs::read_dir(dir.path().join(LOG_DIR)).unwrap().next().unwrap();
        let segment = File::options()
            .read(true)
            .write(true)
            .open(segment.unwrap().path());
        let segment = segment.unwrap();
        let mut byte = [0];
        segment.read_exact_at(&mut byte, damage_at).unwrap();
        segment.write_all_at(&[!byte[0]], damage_at).unwrap();
        for between in every() {
            let told = recorded(views, &between, Bound::MOST);
            assert_eq!(told.is_err(), Seq::number_of(between.after) < last, "{between:?}");
            assert_eq!(
                changed(views, &between).unwrap(),
                looked_up(&**views, &between).unwrap()
            );
        }
    }
}
