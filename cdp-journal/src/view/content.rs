//! From groups to the data in them, through any deltas.
//!
//! Deltas are walked all together, one step at a time: the groups that a step needs are asked for in one go, so that a
//! store far away is asked once for each step of the longest chain, not for each delta.

use std::ops::Range;

use super::{Blocks, GROUPS_MAX, GroupName, GroupPlace, PlacedGroup};
use crate::error::ReadError;
use crate::format::{Block, DELTA_DEPTH_MAX, Delta, Piece, Stored, apply_patch};
use crate::types::{BLOCK_BYTES, Seq};

/// Deltas that wait at once: their patches take 16 MiB at most.
const WAITING_MAX: usize = 1024;

/// Data that is wanted.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) place: GroupPlace,
    /// First byte in the data of that group.
    pub(crate) from: usize,
    /// Where it goes.
    pub(crate) target: Range<usize>,
}

/// Fills stretches of `buf`.
pub(crate) fn read(blocks: &dyn Blocks, wanted: &[Wanted], buf: &mut [u8]) -> Result<(), ReadError> {
    let mut reading = Reading::new(blocks);
    for some in wanted.chunks(GROUPS_MAX) {
        let mut names: Vec<_> = some.iter().map(|wanted| GroupName::At(wanted.place)).collect();
        names.sort_unstable();
        names.dedup();
        let groups = blocks.groups(&names)?;
        for wanted in some {
            let found = names.binary_search(&GroupName::At(wanted.place)).ok();
            let group = found.and_then(|index| groups.get(index)?.as_ref());
            let group = group.ok_or_else(|| blocks.damage(&wanted.place, "a data group that is missing"))?;
            reading.take(group, wanted.from, buf, wanted.target.clone())?;
        }
        reading.finish(buf)?;
    }
    Ok(())
}

/// Data on its way into a buffer.
#[derive(Debug)]
pub(super) struct Reading<'a> {
    blocks: &'a dyn Blocks,
    /// Deltas whose bases lie in other groups.
    waiting: Vec<Waiting>,
}

/// A delta that is walked.
#[derive(Debug)]
struct Waiting {
    /// The group that it was found in.
    place: GroupPlace,
    /// Of the content that comes out.
    crc: u32,
    /// Where the bytes go, and which of the block they are.
    target: usize,
    bytes: Range<usize>,
    /// What makes the content from that of the base, in the order of the walk.
    patches: Vec<Vec<u8>>,
    /// The last delta that was met, the group that holds it, and that of its base.
    delta: Delta,
    within: GroupPlace,
    base: GroupName,
    /// The first Seq of the base's frame.
    base_first_seq: u64,
}

impl<'a> Reading<'a> {
    pub(super) fn new(blocks: &'a dyn Blocks) -> Self {
        Self {
            blocks,
            waiting: Vec::new(),
        }
    }

    /// Takes the data of `group` from byte `from` on to `target` of `buf`, which is the same for all until
    /// [`Reading::finish`]: only then everything is there.
    pub(super) fn take(
        &mut self,
        group: &PlacedGroup,
        from: usize,
        buf: &mut [u8],
        target: Range<usize>,
    ) -> Result<(), ReadError> {
        let mut at = target.start;
        while at < target.end {
            let rest = &mut buf[at..target.end];
            let piece = group.1.piece(from + (at - target.start), rest.len());
            let too_short = || self.blocks.damage(&group.0, "a data group that is too short");
            at += match piece.ok_or_else(too_short)? {
                Piece::Bytes(bytes) => {
                    rest[..bytes.len()].copy_from_slice(bytes);
                    bytes.len()
                }
                Piece::Zero(bytes) => {
                    rest[..bytes].fill(0);
                    bytes
                }
                Piece::Delta { delta, patch, bytes } => {
                    let len = bytes.len();
                    let waiting = Waiting {
                        place: group.0,
                        crc: delta.crc,
                        target: at,
                        bytes,
                        patches: vec![group.1.patch(&patch).to_vec()],
                        delta: *delta,
                        within: group.0,
                        base: GroupName::At(group.0),
                        base_first_seq: 0,
                    };
                    self.walk(waiting, *delta, group, buf)?;
                    len
                }
            };
        }
        match self.waiting.len() < WAITING_MAX {
            true => Ok(()),
            false => self.finish(buf),
        }
    }

    /// Walks what waits to its end.
    pub(super) fn finish(&mut self, buf: &mut [u8]) -> Result<(), ReadError> {
        while !self.waiting.is_empty() {
            let mut step = std::mem::take(&mut self.waiting);
            step.sort_unstable_by_key(|waiting| waiting.base);
            let mut names: Vec<_> = step.iter().map(|waiting| waiting.base).collect();
            names.dedup();
            let mut step = step.into_iter().peekable();
            for names in names.chunks(GROUPS_MAX) {
                for (name, group) in names.iter().zip(self.blocks.groups(names)?) {
                    while let Some(waiting) = step.next_if(|waiting| waiting.base == *name) {
                        let group = group.as_ref().ok_or_else(|| self.missing(&waiting.within))?;
                        self.take_base(waiting, group, buf)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn missing(&self, within: &GroupPlace) -> ReadError {
        self.blocks.damage(within, "a delta whose base is missing")
    }

    /// Goes on from `delta`, which lies in `group`: as far as that group goes, then it waits for the next.
    fn walk(
        &mut self,
        mut waiting: Waiting,
        delta: Delta,
        group: &PlacedGroup,
        buf: &mut [u8],
    ) -> Result<(), ReadError> {
        let name = base_of(group, &delta);
        (waiting.base, waiting.base_first_seq) = name.ok_or_else(|| self.missing(&group.0))?;
        (waiting.delta, waiting.within) = (delta, group.0);
        if delta.frames_back == 0 && delta.group == 0 {
            return self.take_base(waiting, group, buf);
        }
        self.waiting.push(waiting);
        Ok(())
    }

    /// The base lies in `group`: ends there, or goes on if it is a delta too.
    fn take_base(
        &mut self,
        mut waiting: Waiting,
        group: &PlacedGroup,
        buf: &mut [u8],
    ) -> Result<(), ReadError> {
        let bad = |what: &str| self.blocks.damage(&waiting.within, what);
        if group.1.header.first_seq != waiting.base_first_seq {
            return Err(bad("a delta whose base is in another frame"));
        }
        let mut block: Block = match group.1.block(waiting.delta.sector) {
            Some(Stored::Bytes(bytes)) => *bytes,
            Some(Stored::Zero) => [0; BLOCK_BYTES as usize],
            Some(Stored::Delta(deeper, patch)) if deeper.depth < waiting.delta.depth => {
                waiting.patches.push(group.1.patch(&patch).to_vec());
                debug_assert!(waiting.patches.len() <= usize::from(DELTA_DEPTH_MAX));
                return self.walk(waiting, *deeper, group, buf);
            }
            Some(Stored::Delta(..)) => return Err(bad("a chain of deltas that does not end")),
            None => return Err(bad("a delta whose base is no block")),
        };
        for patch in waiting.patches.iter().rev() {
            apply_patch(patch, &mut block);
        }
        if crc32c::crc32c(&block) != waiting.crc {
            return Err(self
                .blocks
                .damage(&waiting.place, "a delta that does not fit its base"));
        }
        let bytes = &block[waiting.bytes];
        buf[waiting.target..waiting.target + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

/// The group that holds the base of a delta of `group`, and the first Seq of its frame. `None`: there can be none.
fn base_of(group: &PlacedGroup, delta: &Delta) -> Option<(GroupName, u64)> {
    let (place, first_seq) = (&group.0, group.1.header.first_seq);
    if delta.frames_back == 0 {
        let offset = place.offset.checked_sub(u64::from(delta.group))?;
        let place = GroupPlace {
            offset,
            crc: None,
            ..*place
        };
        return Some((GroupName::At(place), first_seq));
    }
    let first = Seq::new(first_seq.checked_sub(u64::from(delta.frames_back))?)?;
    Some((GroupName::InFrame(first, delta.group), first.get()))
}
