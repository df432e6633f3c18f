//! Blocks of which the disk may hold other bytes than the log says, although every write to them was captured:
//! their pages were changed while they were written, or two writes to them were on their way at once.
//!
//! They are read back and compared. Where a block differs and was not written meanwhile, what was read
//! corrects the record that wrote it last, so that every moment since then is right. Where it cannot be compared,
//! no moment since the first write that is in doubt may count as exact: so each block has that write's Seq.
//!
//! Always true: a block that was raised is waiting, due or being checked until it was compared, written anew, or became
//! part of a dirty region.
//!
//! They are taken in rounds: all that wait become due, and are taken some at a time, so that nobody who shares the reader
//! waits for all of them. What is raised meanwhile waits for the next round.

use std::collections::BTreeMap;
use std::ops::Range;

use cdp_journal::{BLOCK_BYTES, Seq};

/// More of one volume (1 GiB) are not kept: the range becomes dirty, and a gap opens. Some 10 MiB of memory.
pub(crate) const SUSPECT_BLOCKS_MAX: usize = 1 << 18;

/// The suspects of one volume.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    /// By block: no write before this Seq is in doubt.
    waiting: BTreeMap<u64, Seq>,
    /// Of this round, and not taken yet.
    due: BTreeMap<u64, Seq>,
    /// Being read; a block that is written meanwhile leaves.
    checking: BTreeMap<u64, Seq>,
    /// How often blocks were raised …
    raised: u64,
    /// … and the count when this round began …
    begun_at: u64,
    /// … and the one up to which all were checked.
    cleared: u64,
    /// Of this round, one waits again: it was written in part, or could not be compared.
    has_put_back: bool,
}

fn blocks_around(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / BLOCK_BYTES..bytes.end.div_ceil(BLOCK_BYTES)
}

impl Suspects {
    /// These bytes may differ, since a write that is not older than `since`. False if there is no room for them.
    pub(super) fn raise(&mut self, bytes: &Range<u64>, since: Seq) -> bool {
        let blocks = blocks_around(bytes);
        let new = (blocks.end - blocks.start) as usize;
        if self.blocks() + new > SUSPECT_BLOCKS_MAX {
            return false;
        }
        for block in blocks {
            if let Some(known) = self.due.get_mut(&block) {
                *known = since.min(*known);
                continue;
            }
            // What is being read just now has to be read again.
            let before = self.checking.remove(&block);
            let first = before.map_or(since, |before| before.min(since));
            self.waiting
                .entry(block)
                .and_modify(|known| *known = first.min(*known))
                .or_insert(first);
        }
        self.raised += 1;
        true
    }

    /// These bytes are written anew.
    pub(super) fn written(&mut self, bytes: &Range<u64>) {
        if self.blocks() == 0 {
            return;
        }
        let touched = blocks_around(bytes);
        let whole = bytes.start.div_ceil(BLOCK_BYTES)..bytes.end / BLOCK_BYTES;
        if touched.end - touched.start > self.blocks() as u64 {
            self.waiting.retain(|block, _| !whole.contains(block));
            self.due.retain(|block, _| !whole.contains(block));
            let checking = std::mem::take(&mut self.checking);
            let (hit, rest) = checking
                .into_iter()
                .partition(|(block, _)| touched.contains(block));
            self.checking = rest;
            let hit: BTreeMap<u64, Seq> = hit;
            let before = self.waiting.len();
            self.waiting
                .extend(hit.into_iter().filter(|(block, _)| !whole.contains(block)));
            self.has_put_back |= self.waiting.len() > before;
            return;
        }
        for block in touched {
            let was_checked = self.checking.remove(&block);
            if whole.contains(&block) {
                self.waiting.remove(&block);
                self.due.remove(&block);
            } else if let Some(since) = was_checked {
                self.waiting.insert(block, since);
                self.has_put_back = true;
            }
        }
    }

    /// The next ones, `blocks_max` at most, to be read; as ranges of bytes.
    pub(super) fn take(&mut self, blocks_max: usize) -> Vec<Range<u64>> {
        if !self.checking.is_empty() {
            return Vec::new();
        }
        if self.due.is_empty() {
            self.round_ended();
            self.due = std::mem::take(&mut self.waiting);
            self.begun_at = self.raised;
            self.has_put_back = false;
        }
        let mut ranges: Vec<Range<u64>> = Vec::new();
        while self.checking.len() < blocks_max
            && let Some((block, since)) = self.due.pop_first()
        {
            self.checking.insert(block, since);
            let (start, end) = (block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    /// All that had been raised when the round began is settled, unless some of it waits again.
    fn round_ended(&mut self) {
        if !self.has_put_back {
            self.cleared = self.cleared.max(self.begun_at);
        }
    }

    /// How many there are.
    pub(super) fn blocks(&self) -> usize {
        self.waiting.len() + self.due.len() + self.checking.len()
    }

    /// Was this block not written since it was taken?
    pub(super) fn is_untouched(&self, block: u64) -> bool {
        self.checking.contains_key(&block)
    }

    /// What was taken has been compared. Returns how many blocks that were.
    pub(super) fn checked(&mut self) -> u64 {
        let blocks = self.checking.len() as u64;
        self.checking.clear();
        if self.due.is_empty() {
            self.round_ended();
        }
        blocks
    }

    /// What was taken could not be compared: it waits again.
    pub(super) fn put_back(&mut self) {
        let mut checking = std::mem::take(&mut self.checking);
        self.has_put_back |= !checking.is_empty();
        self.waiting.append(&mut checking);
    }

    /// What these blocks held is not known any more, and they will be read. Returns the oldest write in doubt.
    #[must_use]
    pub(super) fn forget(&mut self, bytes: &Range<u64>) -> Option<Seq> {
        let blocks = blocks_around(bytes);
        let waiting = self.waiting.extract_if(blocks.clone(), |_, _| true);
        let due = self.due.extract_if(blocks.clone(), |_, _| true);
        let checking = self.checking.extract_if(blocks, |_, _| true);
        waiting.chain(due).chain(checking).map(|(_, since)| since).min()
    }

    /// Forgets everything: all of the volume will be read. Returns the oldest write in doubt.
    #[must_use]
    pub(super) fn clear(&mut self) -> Option<Seq> {
        self.cleared = self.raised;
        self.forget(&(0..u64::MAX))
    }

    /// The oldest write in doubt.
    pub(super) fn oldest(&self) -> Option<Seq> {
        self.all().map(|(_, &since)| since).min()
    }

    fn all(&self) -> impl Iterator<Item = (&u64, &Seq)> {
        self.waiting.iter().chain(&self.due).chain(&self.checking)
    }

    /// Every block that waits, is due or is being checked.
    #[cfg(test)]
    pub(super) fn held(&self) -> impl Iterator<Item = u64> {
        self.all().map(|(&block, _)| block)
    }

    /// A mark to wait for with [`Suspects::is_clear`].
    pub(super) fn raised(&self) -> u64 {
        self.raised
    }

    /// Has everything that was raised up to this mark been settled?
    pub(super) fn is_clear(&self, mark: u64) -> bool {
        self.cleared >= mark || self.blocks() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: u64 = BLOCK_BYTES;
    const ALL: usize = SUSPECT_BLOCKS_MAX;

    #[test]
    fn what_was_raised_is_settled_only_by_a_check_or_a_whole_write() {
        let mut suspects = Suspects::default();
        assert!(suspects.raise(&(B + 512..3 * B), Seq::FIRST));
        let mark = suspects.raised();
        assert!(!suspects.is_clear(mark));
        suspects.written(&(B..B + 512));
        suspects.written(&(2 * B..3 * B));
        assert_eq!(suspects.take(ALL), vec![B..2 * B]);
        assert!(!suspects.is_clear(mark));
        suspects.checked();
        assert!(suspects.is_clear(mark));
    }

    #[test]
    fn a_block_that_is_written_while_it_is_read_is_not_judged() {
        let mut suspects = Suspects::default();
        assert!(suspects.raise(&(0..4 * B), Seq::FIRST));
        assert_eq!(suspects.take(ALL), vec![0..4 * B]);
        suspects.written(&(0..B));
        suspects.written(&(B..B + 512));
        assert!(suspects.raise(&(2 * B..3 * B), Seq::FIRST));
        let untouched: Vec<u64> = (0..4).filter(|&block| suspects.is_untouched(block)).collect();
        assert_eq!(untouched, [3]);
        let mark = suspects.raised();
        suspects.checked();
        assert!(!suspects.is_clear(mark), "two blocks wait for the next check");
        assert_eq!(suspects.take(ALL), vec![B..3 * B]);
        suspects.put_back();
        assert_eq!(suspects.take(ALL), vec![B..3 * B]);
    }

    /// Whoever waits for a block waits on when it is written in part while it is read.
    #[test]
    fn a_block_that_is_written_in_part_while_it_is_read_is_not_settled() {
        for bytes in [512..1024, 512..(SUSPECT_BLOCKS_MAX as u64 + 9) * BLOCK_BYTES] {
            let mut suspects = Suspects::default();
            suspects.raise(&(0..BLOCK_BYTES), Seq::FIRST);
            let mark = suspects.raised();
            suspects.take(ALL);
            suspects.written(&bytes);
            suspects.checked();
            assert!(!suspects.is_clear(mark), "{bytes:?}");
            suspects.take(ALL);
            suspects.checked();
            assert!(suspects.is_clear(mark), "{bytes:?}");
        }
    }

    /// Goal: who waits for a mark waits for all that had been raised by then, and for no more. Method: five blocks, taken two
    /// at a time; others are raised meanwhile, written anew, written in part, and not compared.
    #[test]
    fn a_mark_is_reached_when_its_round_is_over() {
        let mut suspects = Suspects::default();
        assert!(suspects.raise(&(0..5 * B), Seq::FIRST));
        let mark = suspects.raised();
        assert_eq!(suspects.take(2), vec![0..2 * B]);
        assert_eq!(suspects.take(2), [], "two are being checked");
        // Before all that is due: it waits for the next round. Of what is due: no other round is needed.
        assert!(suspects.raise(&(0..B), Seq::FIRST));
        assert!(suspects.raise(&(3 * B..4 * B), Seq::FIRST));
        let later = suspects.raised();
        suspects.checked();
        suspects.written(&(2 * B..3 * B));
        suspects.written(&(3 * B + 512..4 * B));
        assert_eq!(suspects.take(2), vec![3 * B..5 * B]);
        assert!(!suspects.is_clear(mark));
        suspects.checked();
        assert!(suspects.is_clear(mark));
        assert!(!suspects.is_clear(later));
        assert_eq!(suspects.take(2), vec![0..B]);
        suspects.put_back();
        assert!(!suspects.is_clear(later));
        assert_eq!(suspects.take(2), vec![0..B]);
        suspects.checked();
        assert!(suspects.is_clear(later));
        assert_eq!(suspects.blocks(), 0);
    }

    /// Goal: what is due and not taken counts, and can be forgotten, as what waits. Method: the oldest write in doubt.
    #[test]
    fn what_is_due_is_in_doubt() {
        let (old, new) = (Seq::FIRST, Seq::FIRST.next());
        let mut suspects = Suspects::default();
        assert!(suspects.raise(&(0..2 * B), new));
        assert_eq!(suspects.take(1), vec![0..B]);
        assert!(suspects.raise(&(B..2 * B), old));
        assert_eq!((suspects.oldest(), suspects.blocks()), (Some(old), 2));
        assert_eq!(suspects.forget(&(B..2 * B)), Some(old));
        assert_eq!((suspects.oldest(), suspects.blocks()), (Some(new), 1));
        assert!(suspects.raise(&(5 * B..7 * B), new));
        suspects.checked();
        assert_eq!(suspects.take(1), vec![5 * B..6 * B]);
        suspects.written(&(0..(SUSPECT_BLOCKS_MAX as u64 + 9) * B));
        assert_eq!(suspects.blocks(), 0, "a long write settles it as well");
    }

    #[test]
    fn a_very_long_write_settles_the_same_as_many_short_ones() {
        let far = 2 * SUSPECT_BLOCKS_MAX as u64;
        let mut suspects = Suspects::default();
        assert!(suspects.raise(&(5 * B..6 * B), Seq::FIRST));
        assert!(suspects.raise(&(far * B..(far + 1) * B), Seq::FIRST));
        suspects.written(&(512..(far + 1) * B - 512));
        assert_eq!(suspects.take(ALL), vec![far * B..(far + 1) * B]);
        suspects.written(&(512..(far + 1) * B - 512));
        assert!(!suspects.is_untouched(far));
        suspects.checked();
        assert_eq!(suspects.take(ALL), vec![far * B..(far + 1) * B]);
    }

    #[test]
    fn more_than_the_bound_is_refused() {
        let mut suspects = Suspects::default();
        let most = SUSPECT_BLOCKS_MAX as u64 * B;
        assert!(!suspects.raise(&(0..most + 1), Seq::FIRST));
        assert!(suspects.raise(&(0..most), Seq::FIRST));
        assert!(!suspects.raise(&(most..most + 512), Seq::FIRST));
    }
}
