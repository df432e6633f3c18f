//! What a device holds otherwise than a moment does: found, written, and proven gone.
//!
//! Always true:
//! - F1: finding reads every byte of the moment that is asked about, checked, and writes nothing.
//! - F2: only blocks that differ are written.
//! - F3: what is compared is what the device holds, past the page cache.

use std::io;
use std::ops::Range;
use std::thread;

use cdp_journal::view::{CopyError, CopyOptions, Sink, View};
use parking_lot::Mutex;

use crate::disk::BLOCK_BYTES;
use crate::interrupt::Interrupt;
use crate::memory;
use crate::target::DeviceInPlace;

/// What must be written is kept in memory up to this; more is read from the history again.
const KEPT_BYTES_MAX: usize = 256 << 20;
/// What a kept piece costs beside its bytes.
const PIECE_COST_BYTES: usize = 64;
/// Stretches that are told apart; beyond, those that lie close together are taken for one, and compared again.
const RANGES_MAX: usize = 1 << 20;
const GAP_BYTES_MIN: u64 = 64 << 10;

static ZERO_BLOCK: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];

/// What a device must hold somewhere.
#[derive(Clone, Debug)]
enum Piece {
    Data(Box<[u8]>),
    Zero(u64),
}

/// Device and moment, and how they are read.
pub(crate) struct Both<'a> {
    pub(crate) device: &'a DeviceInPlace,
    pub(crate) view: &'a View,
    pub(crate) threads: usize,
    pub(crate) interrupt: &'a Interrupt,
    /// Told of every so many bytes that are done.
    pub(crate) progress: &'a (dyn Fn(u64) + Sync),
}

/// Where device and moment differ.
#[derive(Debug, Default)]
pub(crate) struct Differences {
    /// All of it, in order, and perhaps more.
    ranges: Vec<Range<u64>>,
    /// Bytes that differ.
    bytes: u64,
    /// What must be there, by offset; `None` if that is too much to keep.
    kept: Option<Vec<(u64, Piece)>>,
    stranger: Option<u64>,
}

/// What is found so far.
#[derive(Debug)]
struct Found {
    differences: Differences,
    kept_bytes: usize,
    gap_bytes: u64,
}

impl Differences {
    /// Bytes that differ.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// First byte that differs where nothing was expected to.
    pub(crate) fn stranger(&self) -> Option<u64> {
        self.stranger
    }

    /// Finds out where the device differs within `ranges`, which are in order; within `expected`, in order too, that is
    /// no wonder.
    pub(crate) fn find(
        both: &Both<'_>,
        ranges: &[Range<u64>],
        expected: &[Range<u64>],
    ) -> Result<Self, CopyError> {
        let found = Mutex::new(Found {
            differences: Differences {
                kept: Some(Vec::new()),
                ..Differences::default()
            },
            kept_bytes: 0,
            gap_bytes: 0,
        });
        both.compare(ranges, &|range, wanted| {
            let stranger = first_outside(&range, expected);
            found.lock().add(range, wanted, stranger);
            Ok(())
        })?;
        let mut found = found.into_inner();
        found.merge();
        if let Some(kept) = &mut found.differences.kept {
            kept.sort_unstable_by_key(|(offset, _)| *offset);
        }
        Ok(found.differences)
    }

    /// Writes what differs. It is on its way then, not on the device.
    pub(crate) fn write(&self, both: &Both<'_>) -> Result<(), CopyError> {
        let write = |range: Range<u64>, wanted: Option<&[u8]>| match wanted {
            Some(data) => both.device.write_at(range.start, data),
            None => both.device.zero(range.start, range.end - range.start),
        };
        let Some(kept) = &self.kept else {
            return both.compare(&self.ranges, &write);
        };
        for (offset, piece) in kept {
            let (len, wanted) = piece.parts();
            both.interrupt
                .check()
                .and_then(|()| write(*offset..*offset + len, wanted))
                .map_err(|source| CopyError::Write {
                    offset: *offset,
                    len,
                    source,
                })?;
            (both.progress)(len);
        }
        Ok(())
    }

    /// Reads what was written back from the device; the first byte at which it is not what it must be, if any.
    pub(crate) fn unproven(&self, both: &Both<'_>) -> Result<Option<u64>, CopyError> {
        let first = Mutex::new(None);
        let note = |range: Range<u64>, _: Option<&[u8]>| {
            let mut first = first.lock();
            *first = Some(first.map_or(range.start, |first: u64| first.min(range.start)));
            Ok(())
        };
        match &self.kept {
            None => both.compare(&self.ranges, &note)?,
            Some(kept) => both.compare_pieces(kept, &note)?,
        }
        Ok(first.into_inner())
    }
}

impl Found {
    fn add(&mut self, range: Range<u64>, wanted: Option<&[u8]>, stranger: Option<u64>) {
        let found = &mut self.differences;
        found.stranger = match (found.stranger, stranger) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        let len = range.end - range.start;
        found.bytes += len;
        self.kept_bytes += PIECE_COST_BYTES + wanted.map_or(0, <[u8]>::len);
        if self.kept_bytes > KEPT_BYTES_MAX {
            found.kept = None;
        }
        if let Some(kept) = &mut found.kept {
            let piece = wanted.map_or(Piece::Zero(len), |data| Piece::Data(data.into()));
            kept.push((range.start, piece));
        }
        found.ranges.push(range);
        while self.differences.ranges.len() > RANGES_MAX {
            self.gap_bytes = (2 * self.gap_bytes).max(GAP_BYTES_MIN);
            self.merge();
        }
    }

    /// Takes ranges that lie close enough together for one.
    fn merge(&mut self) {
        let ranges = &mut self.differences.ranges;
        ranges.sort_unstable_by_key(|range| range.start);
        let gap_bytes = self.gap_bytes;
        ranges.dedup_by(|next, last| {
            let is_close = next.start <= last.end + gap_bytes;
            if is_close {
                last.end = last.end.max(next.end);
            }
            is_close
        });
    }
}

/// The first byte of a range that is in none of some others, which are in order.
fn first_outside(range: &Range<u64>, others: &[Range<u64>]) -> Option<u64> {
    let mut at = range.start;
    let mut others = &others[others.partition_point(|other| other.end <= at)..];
    while at < range.end {
        match others.split_first() {
            Some((other, rest)) if other.start <= at => (at, others) = (other.end, rest),
            _ => return Some(at),
        }
    }
    None
}

impl Piece {
    fn parts(&self) -> (u64, Option<&[u8]>) {
        match self {
            Piece::Data(data) => (data.len() as u64, Some(data)),
            Piece::Zero(len) => (*len, None),
        }
    }
}

/// Told of a stretch that differs, and what must be there (`None`: zeroes).
type Visit<'a> = &'a (dyn Fn(Range<u64>, Option<&[u8]>) -> io::Result<()> + Sync);

impl Both<'_> {
    fn compare(&self, ranges: &[Range<u64>], visit: Visit<'_>) -> Result<(), CopyError> {
        let options = CopyOptions {
            threads: self.threads,
            one_writer: false,
            gather_bytes_max: memory::to_gather_bytes(),
            ..CopyOptions::default()
        };
        let sink = Compare { both: self, visit };
        self.view
            .copy_ranges_to(ranges, &sink, &options, self.progress)
            .map(drop)
    }

    fn compare_pieces(&self, pieces: &[(u64, Piece)], visit: Visit<'_>) -> Result<(), CopyError> {
        let sink = Compare { both: self, visit };
        let compare = |pieces: &[(u64, Piece)]| {
            for (offset, piece) in pieces {
                let (len, wanted) = piece.parts();
                sink.compare(*offset, len, wanted)
                    .map_err(|source| CopyError::Write {
                        offset: *offset,
                        len,
                        source,
                    })?;
                (self.progress)(len);
            }
            Ok(())
        };
        let share = pieces.len().div_ceil(self.threads.max(1)).max(1);
        thread::scope(|scope| {
            let threads: Vec<_> = pieces
                .chunks(share)
                .map(|share| scope.spawn(|| compare(share)))
                .collect();
            threads.into_iter().try_for_each(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })
    }
}

/// Compares what a view gives with what the device holds there.
struct Compare<'a> {
    both: &'a Both<'a>,
    visit: Visit<'a>,
}

impl Compare<'_> {
    fn compare(&self, offset: u64, len: u64, wanted: Option<&[u8]>) -> io::Result<()> {
        self.both.device.each_piece(offset, len, |at, held| {
            self.both.interrupt.check()?;
            let wanted_here = |range: &Range<u64>| {
                wanted.map(|data| &data[(range.start - offset) as usize..(range.end - offset) as usize])
            };
            let mut run: Option<Range<u64>> = None;
            let (mut from, end) = (at, at + held.len() as u64);
            while from < end {
                let block = from..end.min((from / BLOCK_BYTES + 1) * BLOCK_BYTES);
                let held = &held[(block.start - at) as usize..(block.end - at) as usize];
                let is_equal = match wanted_here(&block) {
                    Some(wanted) => held == wanted,
                    None => *held == ZERO_BLOCK[..held.len()],
                };
                from = block.end;
                match &mut run {
                    Some(run) if !is_equal => run.end = block.end,
                    None if !is_equal => run = Some(block),
                    run => {
                        if let Some(run) = run.take() {
                            (self.visit)(run.clone(), wanted_here(&run))?;
                        }
                    }
                }
            }
            run.map_or(Ok(()), |run| (self.visit)(run.clone(), wanted_here(&run)))
        })
    }
}

impl Sink for Compare<'_> {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.compare(offset, data.len() as u64, Some(data))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.compare(offset, len, None)
    }

    fn go_on(&self) -> io::Result<()> {
        self.both.interrupt.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_beside_an_expected_range_is_a_stranger() {
        let others = [10..20, 20..30, 40..50];
        for (range, outside) in [
            (10..30, None),
            (12..13, None),
            (19..21, None),
            (45..50, None),
            (0..5, Some(0)),
            (5..15, Some(5)),
            (15..31, Some(30)),
            (29..45, Some(30)),
            (49..60, Some(50)),
            (50..60, Some(50)),
        ] {
            assert_eq!(first_outside(&range, &others), outside, "{range:?}");
        }
    }
}
