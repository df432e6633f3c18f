//! Putting small pieces together, so that a sink gets long stretches.
//!
//! Blocks that were written at random lie in the log in no order of the volume. Handed on one by one they cost the
//! target's file system more than all else that a copy does: a call and a page each, and before the last of them has
//! come the kernel begins to write back what there is, a block here and a block there. So they are put together in
//! memory, and a stretch is handed on once, when the last of its bytes has come.
//!
//! Memory is bounded: who plans asks for room first ([`Gather::expect`]), and a stretch gives its room back when it
//! has been written.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use memmap2::{Advice, MmapMut};
use parking_lot::{Condvar, Mutex, RwLock};

use super::Item;

/// Stretches begin and end at multiples of this: a huge page of most processors. Page by page it would take the kernel
/// as long to find the memory as a copy to fill it.
pub(super) const STRETCH_BYTES: u64 = 2 << 20;
/// Where it would take more batches, pieces are handed on as they come: for each batch the log is read again.
const BATCHES_MAX: u64 = 4;
/// A range is scattered if its pieces are smaller than this on average...
const SCATTERED_PIECE_BYTES: u64 = 32 << 10;
/// ... and it is at least this long.
const SCATTERED_BYTES_MIN: u64 = 1 << 20;

/// The stretches that are being put together.
#[derive(Debug, Default)]
pub(super) struct Gather {
    bytes_max: u64,
    /// By their first bytes; they do not overlap.
    stretches: RwLock<BTreeMap<u64, Arc<Stretch>>>,
    open: Mutex<Open>,
    room: Condvar,
}

#[derive(Debug, Default)]
struct Open {
    /// Of all stretches that were asked for and not let go.
    bytes: u64,
    /// Sent to workers and not done.
    jobs: u64,
    stopped: bool,
}

#[derive(Debug)]
struct Stretch {
    range: Range<u64>,
    filled: Mutex<Filled>,
}

#[derive(Debug)]
struct Filled {
    /// `None` once all of them were given away.
    bytes: Option<MmapMut>,
    missing_bytes: u64,
}

/// A stretch all of whose bytes have come. Its room is given back when it is dropped.
#[derive(Debug)]
pub(super) struct Complete<'a> {
    gather: &'a Gather,
    pub(super) offset: u64,
    bytes: MmapMut,
}

impl Complete<'_> {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Complete<'_> {
    fn drop(&mut self) {
        self.gather.let_go(self.bytes.len() as u64);
    }
}

impl Gather {
    /// One that holds so many bytes at most; with less than a stretch, none.
    pub(super) fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            ..Self::default()
        }
    }

    /// What is scattered of `data`, which is in the order of the volume, cut into stretches. Nothing if that is too much
    /// for the memory there is, sooner where the log is not `near`.
    pub(super) fn scattered(&self, data: &[Item], near: bool) -> Vec<Range<u64>> {
        let (mut stretches, mut scattered_bytes) = (Vec::new(), 0);
        if self.bytes_max < STRETCH_BYTES {
            return stretches;
        }
        for range in data.chunk_by(|one, next| one.offset + one.len == next.offset) {
            let (start, bytes) = (range[0].offset, range.iter().map(|item| item.len).sum::<u64>());
            if bytes < SCATTERED_BYTES_MIN || bytes / range.len() as u64 >= SCATTERED_PIECE_BYTES {
                continue;
            }
            scattered_bytes += bytes;
            let (mut at, end) = (start, start + bytes);
            while at < end {
                let next = end.min((at / STRETCH_BYTES + 1) * STRETCH_BYTES);
                stretches.push(at..next);
                at = next;
            }
        }
        let batches_max = if near { BATCHES_MAX } else { 1 };
        if scattered_bytes > batches_max.saturating_mul(self.bytes_max) {
            stretches.clear();
        }
        stretches
    }

    /// How many of the first of these stretches there may be at once.
    pub(super) fn batch(&self, stretches: &[Range<u64>]) -> usize {
        let mut bytes = 0;
        let fits = |stretch: &&Range<u64>| {
            bytes += stretch.end - stretch.start;
            bytes <= self.bytes_max
        };
        stretches.iter().take_while(fits).count()
    }

    /// Makes ready for a batch of stretches; waits until others have given back the room for it. What the kernel has
    /// no memory for is not expected: its pieces are handed on as they come.
    pub(super) fn expect(&self, batch: &[Range<u64>]) {
        let more: u64 = batch.iter().map(|stretch| stretch.end - stretch.start).sum();
        let mut open = self.open.lock();
        // With no job under way nothing more will come: whoever copies finds out that something is missing.
        while open.bytes + more > self.bytes_max && open.bytes > 0 && open.jobs > 0 && !open.stopped {
            self.room.wait(&mut open);
        }
        open.bytes += more;
        drop(open);
        let stretches = batch.iter().filter_map(|range| {
            let missing_bytes = range.end - range.start;
            let Ok(bytes) = MmapMut::map_anon(missing_bytes as usize) else {
                self.let_go(missing_bytes);
                return None;
            };
            // A hint.
            let _ = bytes.advise(Advice::HugePage);
            let filled = Mutex::new(Filled {
                bytes: Some(bytes),
                missing_bytes,
            });
            let range = range.clone();
            Some((range.start, Arc::new(Stretch { range, filled })))
        });
        self.stretches.write().extend(stretches);
    }

    /// Takes of `bytes`, which belong to `offset`, what lies in expected stretches, and tells `complete` of those
    /// that miss nothing any more; gives `other` the parts that lie in none.
    pub(super) fn take<'a>(
        &'a self,
        offset: u64,
        bytes: &[u8],
        complete: &mut Vec<Complete<'a>>,
        mut other: impl FnMut(Range<usize>),
    ) {
        let (mut at, end) = (offset, offset + bytes.len() as u64);
        while at < end {
            let (stretch, part_end) = self.around(at, end);
            let part = (at - offset) as usize..(part_end - offset) as usize;
            match stretch {
                None => other(part),
                Some(stretch) => {
                    if let Some(bytes) = stretch.put(at, &bytes[part]) {
                        self.stretches.write().remove(&stretch.range.start);
                        complete.push(Complete {
                            gather: self,
                            offset: stretch.range.start,
                            bytes,
                        });
                    }
                }
            }
            at = part_end;
        }
    }

    /// The stretch that `at` lies in, if any, and where that (or what lies in none) ends, at `end` at the latest.
    fn around(&self, at: u64, end: u64) -> (Option<Arc<Stretch>>, u64) {
        let stretches = self.stretches.read();
        match stretches.range(..=at).next_back() {
            Some((_, stretch)) if at < stretch.range.end => {
                (Some(Arc::clone(stretch)), end.min(stretch.range.end))
            }
            _ => {
                let next = stretches.range(at..end).next();
                (None, next.map_or(end, |(start, _)| *start))
            }
        }
    }

    fn let_go(&self, bytes: u64) {
        self.open.lock().bytes -= bytes;
        self.room.notify_all();
    }

    /// A job is about to be sent.
    pub(super) fn job_begins(&self) {
        self.open.lock().jobs += 1;
    }

    /// A job is done.
    pub(super) fn job_ends(&self) {
        self.open.lock().jobs -= 1;
        self.room.notify_all();
    }

    /// Nobody waits for room any more.
    pub(super) fn stop(&self) {
        self.open.lock().stopped = true;
        self.room.notify_all();
    }
}

impl Stretch {
    /// Puts bytes in their place; gives all of them if these were the last.
    fn put(&self, offset: u64, bytes: &[u8]) -> Option<MmapMut> {
        let mut filled = self.filled.lock();
        let start = (offset - self.range.start) as usize;
        filled.bytes.as_mut()?[start..start + bytes.len()].copy_from_slice(bytes);
        filled.missing_bytes -= bytes.len() as u64;
        let is_complete = filled.missing_bytes == 0;
        filled.bytes.take_if(|_| is_complete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = STRETCH_BYTES as usize;

    fn stretch(index: u64) -> Vec<Range<u64>> {
        std::iter::once(index * STRETCH_BYTES..(index + 1) * STRETCH_BYTES).collect()
    }

    /// Goal: memory stays within its bound, and nobody waits for ever. Method: room for one stretch; who expects the
    /// next one waits until the first is let go, and who waits when a copy fails is let go too.
    #[test]
    fn the_next_stretch_waits_for_the_room_of_the_one_before() {
        let gather = Gather::new(STRETCH_BYTES);
        gather.job_begins();
        gather.expect(&stretch(0));
        let mut complete = Vec::new();
        gather.take(0, &[7; LEN], &mut complete, |part| {
            panic!("{part:?} was expected")
        });
        assert_eq!(complete.len(), 1);
        std::thread::scope(|scope| {
            let next = scope.spawn(|| {
                gather.expect(&stretch(1));
                gather.open.lock().bytes
            });
            let first = complete.pop().unwrap();
            assert_eq!((first.offset, first.bytes()), (0, &[7; LEN][..]));
            drop(first);
            assert_eq!(next.join().unwrap(), STRETCH_BYTES);
            let waits = scope.spawn(|| gather.expect(&stretch(2)));
            gather.stop();
            waits.join().unwrap();
        });
    }

    /// Goal: bytes are put where they belong, and what nobody expects is left to the caller. Method: two stretches
    /// with a stranger between them, filled by pieces over their borders.
    #[test]
    fn pieces_are_cut_where_stretches_end() {
        let gather = Gather::new(4 * STRETCH_BYTES);
        gather.expect(&[100..200, 300..400]);
        let (mut complete, mut others) = (Vec::new(), Vec::new());
        let bytes: Vec<u8> = (0..=255).cycle().take(500).collect();
        for range in [150..350, 0..150, 350..500] {
            let offset = range.start as u64;
            gather.take(offset, &bytes[range.clone()], &mut complete, |part| {
                others.push(range.start + part.start..range.start + part.end);
            });
        }
        assert_eq!(others, [200..300, 0..100, 400..500]);
        let put: Vec<_> = complete
            .iter()
            .map(|stretch| (stretch.offset, stretch.bytes()))
            .collect();
        assert_eq!(put, [(100, &bytes[100..200]), (300, &bytes[300..400])]);
        drop(complete);
        assert_eq!(gather.open.lock().bytes, 0);
        assert!(gather.stretches.read().is_empty());
    }
}
