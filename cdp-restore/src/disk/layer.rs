//! The throw-away layer: what was written over a moment, in a file without a name.
//!
//! Always true:
//! - L1: the file has no name in any folder: it is gone with the process, however that ends.
//! - L2: it holds at most `bytes_max`; a write that needs more is refused and changes nothing.
//! - L3: a block is marked as lying in the file only after its bytes are there.
//!
//! A block lies in the file at its own offset, so neighbours stay neighbours. Which blocks do is told by two bits
//! for each, kept for stretches of 16 MiB that were written to: at most 1 KiB of memory for each.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cdp_journal::view::View;
use parking_lot::RwLock;
use rustix::fs::FallocateFlags;

use super::{BLOCK_BYTES, DiskError};

/// Blocks whose marks are kept together.
const CHUNK_BLOCKS: u64 = 4096;
const CHUNK_WORDS: usize = CHUNK_BLOCKS as usize / 64;

/// Where a block's newest bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the moment itself.
    Below,
    /// In the layer's file.
    File,
    /// Nowhere: it was zeroed.
    Zero,
}

/// The layer over one disk.
#[derive(Debug)]
pub(crate) struct Layer {
    file: File,
    bytes_max: u64,
    marks: RwLock<Marks>,
}

/// Which blocks lie where.
#[derive(Debug, Default)]
struct Marks {
    /// Chunks of which every block was zeroed.
    zeroed: HashSet<u64>,
    /// Other chunks that were written to.
    chunks: HashMap<u64, Box<Bits>>,
    /// Blocks in the file.
    file_blocks: u64,
}

/// A block is in the file, or zero, or (neither) below.
#[derive(Clone, Debug)]
struct Bits {
    file: [u64; CHUNK_WORDS],
    zero: [u64; CHUNK_WORDS],
}

impl Layer {
    /// A layer of at most `bytes_max` for a disk of `disk_bytes`, in a file without a name in `folder`.
    pub(crate) fn new(folder: &Path, disk_bytes: u64, bytes_max: u64) -> io::Result<Self> {
        let file = tempfile::tempfile_in(folder)?;
        file.set_len(disk_bytes)?;
        Ok(Layer {
            file,
            bytes_max,
            marks: RwLock::default(),
        })
    }

    /// Fills those parts of `buf` that the layer knows; the other ranges are returned.
    pub(super) fn read_at(&self, range: Range<u64>, buf: &mut [u8]) -> io::Result<Vec<Range<u64>>> {
        let mut below = Vec::new();
        let marks = self.marks.read();
        for (run, place) in marks.runs(range.clone()) {
            let target = &mut buf[(run.start - range.start) as usize..(run.end - range.start) as usize];
            match place {
                Place::Below => below.push(run),
                Place::File => self.file.read_exact_at(target, run.start)?,
                Place::Zero => target.fill(0),
            }
        }
        Ok(below)
    }

    /// What lies where in a range, in order.
    pub(super) fn runs(&self, range: Range<u64>) -> Vec<(Range<u64>, Place)> {
        self.marks.read().runs(range)
    }

    /// Writes `data` to `range`; blocks that are written only in part are filled up from `view`.
    pub(super) fn write_at(&self, range: Range<u64>, data: &[u8], view: &View) -> Result<(), DiskError> {
        if range.is_empty() {
            return Ok(());
        }
        let blocks = range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES);
        // Read before the lock is taken: the view never changes, and a block that lies in the layer stays there.
        let mut edges = Vec::new();
        for block in [blocks.start, blocks.end - 1] {
            let whole = block * BLOCK_BYTES..((block + 1) * BLOCK_BYTES).min(view.bytes());
            let is_whole = range.start <= whole.start && whole.end <= range.end;
            let is_known = || self.marks.read().place(block) != Place::Below;
            if !is_whole && edges.iter().all(|(known, _, _)| *known != block) && !is_known() {
                let mut bytes = vec![0; (whole.end - whole.start) as usize];
                view.read_at(whole.start, &mut bytes)?;
                edges.push((block, whole.start, bytes));
            }
        }
        let mut marks = self.marks.write();
        let new_blocks = blocks
            .clone()
            .filter(|block| marks.place(*block) != Place::File)
            .count() as u64;
        if (marks.file_blocks + new_blocks).saturating_mul(BLOCK_BYTES) > self.bytes_max {
            let bytes_max = self.bytes_max;
            return Err(DiskError::Full { bytes_max });
        }
        for (block, offset, bytes) in &edges {
            if marks.place(*block) == Place::Below {
                self.file.write_all_at(bytes, *offset).map_err(DiskError::Layer)?;
            }
        }
        self.file
            .write_all_at(data, range.start)
            .map_err(DiskError::Layer)?;
        for block in blocks {
            marks.mark_file(block);
        }
        Ok(())
    }

    /// Makes whole blocks read as zero, and gives their room back.
    pub(super) fn zero(&self, range: Range<u64>) -> Result<(), DiskError> {
        let mut marks = self.marks.write();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Also where nothing was marked: a write that failed may have left bytes there.
        rustix::fs::fallocate(&self.file, flags, range.start, range.end - range.start)
            .map_err(|errno| DiskError::Layer(errno.into()))?;
        marks.mark_zero(range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES));
        Ok(())
    }
}

impl Marks {
    fn place(&self, block: u64) -> Place {
        let chunk = block / CHUNK_BLOCKS;
        let Some(bits) = self.chunks.get(&chunk) else {
            return self.place_of_chunk(chunk);
        };
        let (word, bit) = word_of(block);
        match (bits.file[word] & bit != 0, bits.zero[word] & bit != 0) {
            (true, _) => Place::File,
            (false, true) => Place::Zero,
            (false, false) => Place::Below,
        }
    }

    /// Of a chunk whose blocks are all alike.
    fn place_of_chunk(&self, chunk: u64) -> Place {
        if self.zeroed.contains(&chunk) {
            Place::Zero
        } else {
            Place::Below
        }
    }

    fn runs(&self, range: Range<u64>) -> Vec<(Range<u64>, Place)> {
        let mut runs: Vec<(Range<u64>, Place)> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let block = at / BLOCK_BYTES;
            let chunk = block / CHUNK_BLOCKS;
            let (end_block, place) = if self.chunks.contains_key(&chunk) {
                (block + 1, self.place(block))
            } else {
                ((chunk + 1) * CHUNK_BLOCKS, self.place_of_chunk(chunk))
            };
            let end = end_block.saturating_mul(BLOCK_BYTES).min(range.end);
            match runs.last_mut() {
                Some((run, last)) if *last == place => run.end = end,
                _ => runs.push((at..end, place)),
            }
            at = end;
        }
        runs
    }

    fn mark_file(&mut self, block: u64) {
        let bits = self.bits(block / CHUNK_BLOCKS);
        let (word, bit) = word_of(block);
        let is_new = bits.file[word] & bit == 0;
        bits.file[word] |= bit;
        bits.zero[word] &= !bit;
        self.file_blocks += u64::from(is_new);
    }

    fn mark_zero(&mut self, blocks: Range<u64>) {
        let mut block = blocks.start;
        while block < blocks.end {
            let chunk = block / CHUNK_BLOCKS;
            let whole = chunk * CHUNK_BLOCKS..(chunk + 1) * CHUNK_BLOCKS;
            if block == whole.start && whole.end <= blocks.end {
                self.zeroed.insert(chunk);
                if let Some(bits) = self.chunks.remove(&chunk) {
                    self.file_blocks -= bits
                        .file
                        .iter()
                        .map(|word| u64::from(word.count_ones()))
                        .sum::<u64>();
                }
                block = whole.end;
                continue;
            }
            let bits = self.bits(chunk);
            let (word, bit) = word_of(block);
            let was_in_file = bits.file[word] & bit != 0;
            bits.file[word] &= !bit;
            bits.zero[word] |= bit;
            self.file_blocks -= u64::from(was_in_file);
            block += 1;
        }
    }

    /// The marks of a chunk whose blocks are about to differ.
    fn bits(&mut self, chunk: u64) -> &mut Bits {
        let was_zeroed = self.zeroed.remove(&chunk);
        self.chunks.entry(chunk).or_insert_with(|| {
            Box::new(Bits {
                file: [0; CHUNK_WORDS],
                zero: [if was_zeroed { u64::MAX } else { 0 }; CHUNK_WORDS],
            })
        })
    }
}

/// The word of a chunk that a block's bit lies in, and the bit.
fn word_of(block: u64) -> (usize, u64) {
    let in_chunk = block % CHUNK_BLOCKS;
    (in_chunk as usize / 64, 1 << (in_chunk % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::random;

    /// Goal: marks tell of every block what happened to it last. Method: random marking over a few chunks, compared
    /// with one entry for each block.
    #[test]
    fn marks_agree_with_a_model() {
        const BLOCKS: u64 = 3 * CHUNK_BLOCKS + 100;
        for seed in 1..50u64 {
            let mut next = random(seed);
            let mut marks = Marks::default();
            let mut model = vec![Place::Below; BLOCKS as usize];
            for _ in 0..20 {
                let start = next(BLOCKS);
                let end = (start + 1 + next(2 * CHUNK_BLOCKS)).min(BLOCKS);
                let is_zero = next(2) == 0;
                if is_zero {
                    marks.mark_zero(start..end);
                } else {
                    (start..end).for_each(|block| marks.mark_file(block));
                }
                model[start as usize..end as usize].fill(if is_zero { Place::Zero } else { Place::File });
            }
            let in_file = model.iter().filter(|place| **place == Place::File).count();
            assert_eq!(marks.file_blocks, in_file as u64, "seed {seed}");
            let mut at = 0;
            for (run, place) in marks.runs(0..BLOCKS * BLOCK_BYTES) {
                assert_eq!(run.start, at, "seed {seed}");
                at = run.end;
                let blocks = (run.start / BLOCK_BYTES) as usize..(run.end / BLOCK_BYTES) as usize;
                assert!(
                    model[blocks].iter().all(|expected| *expected == place),
                    "seed {seed}"
                );
            }
            assert_eq!(at, BLOCKS * BLOCK_BYTES, "seed {seed}");
        }
    }
}
