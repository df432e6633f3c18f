//! From a range of a view to where its bytes lie.

use std::ops::Range;

use super::source::ViewStore;
use crate::error::ReadError;
use crate::index::{BlockVersion, CHUNK_BLOCKS, Lookup, Place, Source, Version};
use crate::types::{BLOCK_BYTES, SECTOR_BYTES, SECTORS_PER_BLOCK, Seq, VolumeId};

/// Bytes that are looked up together.
pub(crate) const CHUNK_BYTES: u64 = CHUNK_BLOCKS * BLOCK_BYTES;

/// A stretch of a view that lies in one piece, or is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// `None`: zeroes.
    pub(crate) data: Option<GroupRange>,
}

/// Where data begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupRange {
    pub(crate) place: Place,
    /// First byte in the group.
    pub(crate) in_group: u32,
}

impl Item {
    /// Takes in `next` if it goes on where this one ends.
    fn extend(&mut self, next: &Item) -> bool {
        let goes_on = self.offset + self.len == next.offset
            && match (&self.data, &next.data) {
                (None, None) => true,
                (Some(this), Some(next)) => {
                    this.place.segment == next.place.segment
                        && this.place.group_offset == next.place.group_offset
                        && u64::from(this.in_group) + self.len == u64::from(next.in_group)
                }
                _ => false,
            };
        if goes_on {
            self.len += next.len;
        }
        goes_on
    }

    /// The part of it that lies in `range`.
    pub(crate) fn clipped(self, range: &Range<u64>) -> Option<Item> {
        let start = self.offset.max(range.start);
        let end = (self.offset + self.len).min(range.end);
        if start >= end {
            return None;
        }
        let skipped = (start - self.offset) as u32;
        let data = self.data.map(|data| GroupRange {
            in_group: data.in_group + skipped,
            ..data
        });
        Some(Item {
            offset: start,
            len: end - start,
            data,
        })
    }
}

/// Splits a range at chunk borders.
pub(crate) fn chunks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let end = range.end.min((at / CHUNK_BYTES + 1) * CHUNK_BYTES);
        let chunk = at..end;
        at = end;
        Some(chunk)
    })
}

pub(crate) fn blocks_of(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
}

/// What a view shows in `range`, in order, handed to `visit` item by item.
pub(crate) fn plan(
    store: &ViewStore,
    volume: VolumeId,
    seq: Seq,
    range: Range<u64>,
    mut visit: impl FnMut(Item),
) -> Result<(), ReadError> {
    let mut versions = Vec::new();
    let mut pending: Option<Item> = None;
    let mut push = |item: Item| {
        let Some(item) = item.clipped(&range) else { return };
        if pending.as_mut().is_some_and(|last: &mut Item| last.extend(&item)) {
            return;
        }
        if let Some(done) = pending.replace(item) {
            visit(done);
        }
    };
    // Chunk by chunk, so that nobody who wants to change the overlay waits for long.
    for chunk in chunks(range.clone()) {
        let blocks = blocks_of(&chunk);
        store.ask(|lookup: Lookup<'_>| {
            lookup.blocks(
                &mut lookup.cursor(),
                volume,
                blocks.clone(),
                seq.get(),
                &mut versions,
            )
        })?;
        for (block, version) in blocks.zip(&versions) {
            block_items(block * BLOCK_BYTES, version, &mut push);
        }
    }
    if let Some(last) = pending {
        visit(last);
    }
    Ok(())
}

/// The same for several ranges, which are in order and do not overlap. Those that begin in one chunk are looked up
/// together: one by one, many small ones would cost far more.
pub(crate) fn plan_ranges(
    ranges: &[Range<u64>],
    mut plan: impl FnMut(Range<u64>, &mut dyn FnMut(Item)) -> Result<(), ReadError>,
    mut visit: impl FnMut(Item),
) -> Result<(), ReadError> {
    for near in ranges.chunk_by(|one, next| one.start / CHUNK_BYTES == next.start / CHUNK_BYTES) {
        let (Some(first), Some(last)) = (near.first(), near.last()) else {
            continue;
        };
        let mut rest = near;
        plan(first.start..last.end, &mut |item| {
            let passed = rest.iter().take_while(|range| range.end <= item.offset).count();
            rest = &rest[passed..];
            let reached = rest
                .iter()
                .take_while(|range| range.start < item.offset + item.len);
            reached
                .filter_map(|range| item.clipped(range))
                .for_each(&mut visit);
        })?;
    }
    Ok(())
}

fn block_items(offset: u64, version: &BlockVersion, push: &mut impl FnMut(Item)) {
    match &version.version {
        Version::Whole(source) => push(item(offset, 0, SECTORS_PER_BLOCK, source)),
        Version::Pieces(pieces) => {
            let mut sector = 0;
            while sector < SECTORS_PER_BLOCK {
                let Some(piece) = pieces.iter().find(|piece| piece.mask & (1 << sector) != 0) else {
                    return;
                };
                let sectors = u64::from((piece.mask >> sector).trailing_ones());
                push(item(offset, sector, sectors, &piece.source));
                sector += sectors;
            }
        }
    }
}

fn item(block_offset: u64, sector: u64, sectors: u64, source: &Source) -> Item {
    let data = match source {
        Source::Zero => None,
        Source::Data(place) => Some(GroupRange {
            place: *place,
            in_group: ((i64::from(place.first_sector) + sector as i64) * SECTOR_BYTES as i64) as u32,
        }),
    };
    Item {
        offset: block_offset + sector * SECTOR_BYTES,
        len: sectors * SECTOR_BYTES,
        data,
    }
}
