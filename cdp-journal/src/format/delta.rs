//! What differs between two contents of a block.
//!
//! A *patch* turns one content into the other:
//!
//! | at    | bytes | patch        | note                                                      |
//! |------:|------:|--------------|-----------------------------------------------------------|
//! |     0 |     2 | range count  | 0: the contents are the same                              |
//! |     2 | 4 × … | ranges       | first byte (2) and bytes (2); in order, apart, not empty  |
//! |     … |     … | new bytes    | of all ranges, in order                                   |

use super::u16_at;
use crate::types::BLOCK_BYTES;

/// The content of a block.
pub(crate) type Block = [u8; BLOCK_BYTES as usize];

/// A patch longer than this saves too little for what it costs to read.
pub(crate) const PATCH_BYTES_MAX: usize = 2048;
/// Equal bytes between two ranges that cost less than another range.
const JOINED_BYTES: usize = 8;
/// What is compared at once where nothing differs.
const STRIDE_BYTES: usize = 64;
const COUNT_BYTES: usize = 2;
const RANGE_BYTES: usize = 4;
/// A patch that changes nothing.
pub(crate) const EMPTY_BYTES: usize = COUNT_BYTES;

const _: () = assert!((BLOCK_BYTES as usize).is_multiple_of(STRIDE_BYTES));
const _: () = assert!(BLOCK_BYTES <= u16::MAX as u64);

/// Appends the patch from `old` to `new` to `out`. False, and nothing is appended, if it would be longer than
/// [`PATCH_BYTES_MAX`].
pub(crate) fn diff(old: &Block, new: &Block, out: &mut Vec<u8>) -> bool {
    let mut ranges = [(0u16, 0u16); PATCH_BYTES_MAX / RANGE_BYTES];
    let (mut count, mut patch_bytes) = (0, COUNT_BYTES);
    let mut at = 0;
    while at < old.len() {
        let stride = at..(at + STRIDE_BYTES).min(old.len());
        if old[stride.clone()] == new[stride.clone()] {
            at = stride.end;
            continue;
        }
        let words = old[stride.clone()].as_chunks::<8>().0.iter();
        for (word, (was, is)) in words.zip(new[stride.clone()].as_chunks::<8>().0).enumerate() {
            let differs = u64::from_le_bytes(*was) ^ u64::from_le_bytes(*is);
            if differs == 0 {
                continue;
            }
            let first = at + word * 8 + differs.trailing_zeros() as usize / 8;
            let past = at + word * 8 + 8 - differs.leading_zeros() as usize / 8;
            match ranges[..count].last_mut() {
                Some((_, last)) if first - usize::from(*last) < JOINED_BYTES => {
                    patch_bytes += past - usize::from(*last);
                    *last = past as u16;
                }
                _ => {
                    patch_bytes += RANGE_BYTES + past - first;
                    if patch_bytes > PATCH_BYTES_MAX {
                        return false;
                    }
                    ranges[count] = (first as u16, past as u16);
                    count += 1;
                }
            }
        }
        if patch_bytes > PATCH_BYTES_MAX {
            return false;
        }
        at = stride.end;
    }
    out.extend_from_slice(&(count as u16).to_le_bytes());
    for (first, past) in &ranges[..count] {
        out.extend_from_slice(&first.to_le_bytes());
        out.extend_from_slice(&(past - first).to_le_bytes());
    }
    for (first, past) in &ranges[..count] {
        out.extend_from_slice(&new[usize::from(*first)..usize::from(*past)]);
    }
    true
}

/// Bytes of the patch that begins `bytes`; `None` if there is no sound one.
pub(crate) fn patch_bytes(bytes: &[u8]) -> Option<usize> {
    let count = usize::from(u16_at(bytes.get(..COUNT_BYTES)?, 0));
    let ranges = bytes.get(COUNT_BYTES..COUNT_BYTES + count * RANGE_BYTES)?;
    let (mut past, mut new_bytes) = (0, 0);
    for range in ranges.chunks_exact(RANGE_BYTES) {
        let (first, len) = (usize::from(u16_at(range, 0)), usize::from(u16_at(range, 2)));
        if len == 0 || (new_bytes > 0 && first <= past) || first + len > BLOCK_BYTES as usize {
            return None;
        }
        past = first + len;
        new_bytes += len;
    }
    let patch_bytes = COUNT_BYTES + ranges.len() + new_bytes;
    (patch_bytes <= bytes.len()).then_some(patch_bytes)
}

/// Applies a patch that [`patch_bytes`] has found sound.
pub(crate) fn apply(patch: &[u8], block: &mut Block) {
    let count = usize::from(u16_at(patch, 0));
    let (ranges, mut new) = patch[COUNT_BYTES..].split_at(count * RANGE_BYTES);
    for range in ranges.chunks_exact(RANGE_BYTES) {
        let (first, len) = (usize::from(u16_at(range, 0)), usize::from(u16_at(range, 2)));
        let (bytes, rest) = new.split_at(len);
        block[first..first + len].copy_from_slice(bytes);
        new = rest;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(edits: &[(usize, u8, usize)]) -> Block {
        let mut block: Block = std::array::from_fn(|at| (at / 7) as u8);
        for (at, byte, len) in edits {
            let end = (at + len).min(block.len());
            block[*at..end].fill(*byte);
        }
        block
    }

    fn edits() -> impl Strategy<Value = Vec<(usize, u8, usize)>> {
        prop::collection::vec((0..4096usize, any::<u8>(), 1..200usize), 0..12)
    }

    proptest! {
        #[test]
        fn a_patch_turns_one_content_into_the_other(old in edits(), new in edits()) {
            let (old, new) = (block(&old), block(&new));
            let mut patch = vec![0xee];
            if diff(&old, &new, &mut patch) {
                prop_assert!(patch.len() <= PATCH_BYTES_MAX + 1);
                // What follows it is not taken for a part of it.
                patch.push(0xee);
                prop_assert_eq!(patch_bytes(&patch[1..]), Some(patch.len() - 2));
                let mut found = old;
                apply(&patch[1..patch.len() - 1], &mut found);
                prop_assert!(found == new);
            } else {
                prop_assert_eq!(patch, vec![0xee]);
                let differing = (0..4096).filter(|at| old[*at] != new[*at]).count();
                prop_assert!(differing * (1 + RANGE_BYTES + JOINED_BYTES) > PATCH_BYTES_MAX);
            }
        }

        #[test]
        fn any_bytes_are_a_patch_or_none(bytes in prop::collection::vec(any::<u8>(), 0..64), few in 0..6u8) {
            let mut bytes = bytes;
            if let [first, second, ..] = &mut bytes[..] {
                (*first, *second) = (few, 0);
            }
            if let Some(len) = patch_bytes(&bytes) {
                apply(&bytes[..len], &mut block(&[]));
            }
        }
    }

    #[test]
    fn unsound_patches_are_refused() {
        let patch = |ranges: &[(u16, u16)], new: usize| {
            let mut patch = (ranges.len() as u16).to_le_bytes().to_vec();
            for (first, len) in ranges {
                patch.extend_from_slice(&first.to_le_bytes());
                patch.extend_from_slice(&len.to_le_bytes());
            }
            patch.resize(patch.len() + new, 7);
            patch
        };
        assert_eq!(patch_bytes(&patch(&[(0, 1), (4095, 1)], 2)), Some(12));
        let unsound: [(&[(u16, u16)], usize); 6] = [
            (&[(4095, 2)], 2),
            (&[(u16::MAX, u16::MAX)], 4096),
            (&[(5, 0)], 0),
            (&[(5, 2), (6, 2)], 4),
            (&[(9, 2), (5, 2)], 4),
            (&[(0, 9)], 8),
        ];
        for (ranges, new) in unsound {
            assert_eq!(patch_bytes(&patch(ranges, new)), None, "{ranges:?}");
        }
    }
}
