//! What the read-back thread of the simulated agent is at, as in `readback`.

use std::collections::VecDeque;
use std::ops::Range;

use cdp_journal::BLOCK_BYTES;

use super::super::*;
use super::agent::sectors_of;
use super::model::{Content, Model};

const READ_BYTES: u64 = 16 << 10;
const UNIT_BYTES: u64 = 8 << 10;

#[derive(Clone, Copy, Debug)]
pub(super) enum Phase {
    Drain,
    Ended(usize),
    Head,
    Read(usize),
    Polls(u64),
    DrainAgain(u64),
    Emit,
}

/// What the read-back thread is at.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) volume: VolumeId,
    /// Of `take_run`; else suspects are compared.
    pub(super) run: Option<Run>,
    pub(super) epoch: Epoch,
    /// Runs under one note of `s`, and those after them.
    pub(super) batch: Vec<Run>,
    pub(super) later: VecDeque<Vec<Run>>,
    pub(super) phase: Phase,
    pub(super) target: u64,
    pub(super) as_of: Option<Seq>,
    pub(super) began_ns: u64,
    /// The disk was found idle, or nobody waits any longer: the ring is emptied to here first.
    pub(super) idle_target: Option<(u64, bool)>,
    /// What a disk that counts no write has ended, and since when it was noted.
    pub(super) noted: Option<Seq>,
    pub(super) noted_ns: u64,
    /// When the first of it was read.
    pub(super) read_ns: u64,
    pub(super) applied: u64,
    pub(super) read: Vec<Content>,
    pub(super) to_record: VecDeque<(Run, Option<Seq>, Vec<Content>)>,
}

impl Job {
    pub(super) fn new(
        volume: VolumeId,
        epoch: Epoch,
        run: Option<Run>,
        mut later: VecDeque<Vec<Run>>,
    ) -> Self {
        Self {
            volume,
            run,
            epoch,
            batch: later.pop_front().unwrap_or_default(),
            later,
            phase: Phase::Drain,
            target: u64::MAX,
            as_of: None,
            began_ns: 0,
            idle_target: None,
            noted: None,
            noted_ns: 0,
            read_ns: u64::MAX,
            applied: 0,
            read: Vec::new(),
            to_record: VecDeque::new(),
        }
    }

    /// What lies beyond the volume's end, as far as that is known, is not compared.
    pub(super) fn compare(suspicion: &Suspicion, sectors: usize) -> Self {
        let mut batches: VecDeque<Vec<Run>> = VecDeque::new();
        let mut bytes = u64::MAX;
        let end = sectors as u64 * SECTOR_BYTES;
        for mut piece in suspicion.ranges.iter().flat_map(pieces_of) {
            piece.end = piece.end.min(end);
            if piece.is_empty() {
                continue;
            }
            let length = piece.end - piece.start;
            let run = Run {
                volume: suspicion.volume,
                bytes: piece,
                blank: false,
                epoch: suspicion.epoch,
            };
            match batches.back_mut() {
                Some(batch) if bytes + length <= READ_BYTES => batch.push(run),
                _ => {
                    batches.push_back(vec![run]);
                    bytes = 0;
                }
            }
            bytes += length;
        }
        Self::new(suspicion.volume, suspicion.epoch, None, batches)
    }

    pub(super) fn read(run: Run) -> Self {
        // All pieces are read under one note of `s`.
        let pieces = pieces_of(&run.bytes)
            .map(|bytes| Run { bytes, ..run.clone() })
            .collect();
        Self::new(run.volume, run.epoch, Some(run), VecDeque::from([pieces]))
    }

    pub(super) fn record_changed(&mut self, piece: usize, read: Vec<Content>, model: &Model) {
        let run = self.batch.remove(piece);
        let step = if run.blank { UNIT_BYTES } else { BLOCK_BYTES } / SECTOR_BYTES;
        let first = sectors_of(&run.bytes).start;
        let mut runs: Vec<Range<usize>> = Vec::new();
        for start in (0..read.len()).step_by(step as usize) {
            let end = read.len().min(start + step as usize);
            let differs = (start..end).any(|at| {
                let known = if run.blank {
                    0
                } else {
                    model.head(first + at, self.applied).0
                };
                read[at] != known
            });
            match runs.last_mut() {
                _ if !differs => {}
                Some(last) if last.end == start => last.end = end,
                _ => runs.push(start..end),
            }
        }
        for range in runs {
            let offset = |at: usize| run.bytes.start + at as u64 * SECTOR_BYTES;
            let bytes = offset(range.start)..offset(range.end);
            self.to_record
                .push_back((Run { bytes, ..run.clone() }, self.as_of, read[range].to_vec()));
        }
    }

    pub(super) fn correct_changed(&mut self, model: &Model) {
        let read = std::mem::take(&mut self.read);
        let mut read = &read[..];
        for run in &self.batch {
            for at in run.bytes.clone().step_by(BLOCK_BYTES as usize) {
                let (block, rest) = read.split_at(8);
                read = rest;
                let bytes = at..at + BLOCK_BYTES;
                let last = sectors_of(&bytes).end;
                if model.size_at(self.applied).is_some_and(|size| size < last) {
                    continue;
                }
                let head: Vec<(Content, u64)> = sectors_of(&bytes)
                    .map(|sector| model.head(sector, self.applied))
                    .collect();
                if head.iter().zip(block).all(|((known, _), now)| known == now) {
                    continue;
                }
                let written_by = head.iter().map(|(_, seq)| *seq).max().and_then(Seq::new);
                self.to_record
                    .push_back((Run { bytes, ..run.clone() }, written_by, block.to_vec()));
            }
        }
    }

    pub(super) fn go_on(&mut self) -> Option<Result<(), ()>> {
        if self.run.is_some() {
            if self.batch.is_empty() {
                return Some(Ok(()));
            }
            self.phase = Phase::Read(0);
            return None;
        }
        let Some(next) = self.later.pop_front() else {
            return Some(Ok(()));
        };
        self.batch = next;
        self.target = u64::MAX;
        self.phase = Phase::Drain;
        None
    }
}

fn pieces_of(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let end = range.end;
    (range.start..end)
        .step_by(READ_BYTES as usize)
        .map(move |at| at..end.min(at + READ_BYTES))
}
