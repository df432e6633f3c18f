//! The blocks that were encoded last, so that the next content of each can be told by what differs.
//!
//! Only decides: what it holds is a content and where in the log that content lies. A delta names that place, not a
//! state of the volume, so whatever happens to the volume in between (a discard, a write of some sectors, a gap) makes
//! a base less useful and never wrong.
//!
//! Always true:
//! - What is held lies in frames that were encoded one after the other. A frame that does not follow the last one means
//!   that some of them never came into the log (it was full): then everything is forgotten.
//! - Memory stays below the bound that was given.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use super::DELTA_DEPTH_MAX;
use super::delta::Block;
use crate::types::{BLOCK_BYTES, Seq};

/// What a block costs beside its content: its slot, and its place in the map, which is half empty at worst.
const SLOT_EXTRA_BYTES: usize = 128;

/// Where a content lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Home {
    /// First Seq of the frame.
    pub(super) frame: Seq,
    /// Of the group, from the end of the frame's record table.
    pub(super) group: u32,
    /// First sector in the group's content.
    pub(super) sector: u16,
    /// Deltas that lead to it.
    pub(super) depth: u8,
}

/// A block of a volume.
pub(super) type BlockName = (u16, u64);

#[derive(Debug)]
struct Slot {
    name: BlockName,
    home: Home,
    /// It was asked for since the hand passed.
    was_used: bool,
}

// A map has a power of two of places for pairs, a byte beside each, and up to 7/8 of them are taken: at worst, with
// one pair more, it has 16/7 places for each.
const _: () = assert!(size_of::<Slot>() + (size_of::<(BlockName, u32)>() + 1) * 16 / 7 <= SLOT_EXTRA_BYTES);

/// How blocks were encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodedBlocks {
    /// As they are.
    pub whole: u64,
    /// Of zeroes.
    pub zero: u64,
    /// By what differs from an earlier content.
    pub patched: u64,
    /// By an earlier content, which is the same.
    pub repeated: u64,
    /// Those of [`EncodedBlocks::whole`] that ended a chain of [`DELTA_DEPTH_MAX`] deltas.
    pub at_depth_max: u64,
}

/// How frames are packed: what takes less room takes more time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Packing {
    /// Deltas, and nothing is compressed.
    Plain,
    /// LZ4.
    #[default]
    Quick,
    /// zstd.
    Dense,
}

/// The last contents of blocks, within a bound.
#[derive(Debug)]
pub struct DeltaCache {
    contents: Vec<u8>,
    slots: Vec<Slot>,
    /// Hashed by another seed in each process: who writes cannot know what collides.
    places: HashMap<BlockName, u32, RandomState>,
    slots_max: usize,
    /// Where to look for a slot to give away.
    hand: usize,
    /// The Seq that follows the last frame encoded.
    next: Option<Seq>,
    pub(super) packing: Packing,
    pub(super) counts: EncodedBlocks,
}

impl DeltaCache {
    /// A cache that takes at most `bytes_max` of memory; 0: no deltas. Memory is taken when it is first needed.
    pub fn new(bytes_max: u64) -> Self {
        let slots_max =
            (bytes_max / (BLOCK_BYTES + SLOT_EXTRA_BYTES as u64)).min(u64::from(u32::MAX)) as usize;
        Self {
            contents: vec![0; slots_max * BLOCK_BYTES as usize],
            slots: Vec::with_capacity(slots_max),
            places: HashMap::with_capacity_and_hasher(slots_max, RandomState::default()),
            slots_max,
            hand: 0,
            next: None,
            packing: Packing::default(),
            counts: EncodedBlocks::default(),
        }
    }

    /// How the next frames are packed. Units that were read back are always packed by LZ4.
    pub fn pack(&mut self, packing: Packing) {
        self.packing = packing;
    }

    /// How the blocks so far were encoded.
    pub fn counts(&self) -> EncodedBlocks {
        self.counts
    }

    /// A frame of these records is encoded next.
    pub(super) fn begin(&mut self, first: Seq, last: Seq) {
        if self.next != Some(first) {
            self.places.clear();
            self.slots.clear();
            self.hand = 0;
        }
        self.next = Some(last.next());
    }

    fn content(&self, slot: usize) -> &Block {
        let at = slot * BLOCK_BYTES as usize;
        // Slots are made within `contents`.
        self.contents[at..]
            .first_chunk()
            .unwrap_or(&[0; BLOCK_BYTES as usize])
    }

    /// The last content of a block.
    pub(super) fn get(&mut self, name: BlockName) -> Option<(&Block, Home)> {
        let slot = *self.places.get(&name)? as usize;
        self.slots[slot].was_used = true;
        let home = self.slots[slot].home;
        Some((self.content(slot), home))
    }

    /// Takes a new content of a block. One that `may_displace` nothing is kept only while there is room.
    pub(super) fn put(&mut self, name: BlockName, content: &Block, home: Home, may_displace: bool) {
        debug_assert!(home.depth <= DELTA_DEPTH_MAX);
        let slot = match self.places.get(&name) {
            Some(slot) => *slot as usize,
            None => match self.free_slot(may_displace) {
                Some(slot) => slot,
                None => return,
            },
        };
        let taken = Slot {
            name,
            home,
            was_used: false,
        };
        if slot == self.slots.len() {
            self.slots.push(taken);
            self.places.insert(name, slot as u32);
        } else if self.slots[slot].name == name {
            self.slots[slot].home = home;
        } else {
            self.places.remove(&self.slots[slot].name);
            self.slots[slot] = taken;
            self.places.insert(name, slot as u32);
        }
        let at = slot * BLOCK_BYTES as usize;
        self.contents[at..at + BLOCK_BYTES as usize].copy_from_slice(content);
    }

    /// A slot for another block: one never used, else the next one that nobody asked for in a whole round.
    fn free_slot(&mut self, may_displace: bool) -> Option<usize> {
        if self.slots.len() < self.slots_max {
            return Some(self.slots.len());
        }
        if !may_displace || self.slots.is_empty() {
            return None;
        }
        loop {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            if !std::mem::take(&mut self.slots[slot].was_used) {
                return Some(slot);
            }
        }
    }
}
