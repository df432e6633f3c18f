//! The captured history of the disk that holds the second store, and the power cuts that it tells of.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use cdp_journal::format::{Body, RecordFlags};
use cdp_journal::store::StoreReader;
use cdp_journal::{BLOCK_BYTES, BootNs, Seq, VolumeId};
use cdp_tests::rng::Rng;

/// Blocks of a disk: where each lies, and what it holds.
pub(crate) type Blocks = Vec<(u64, Vec<u8>)>;

/// What the disk held right after a record, as far as it had been written in order.
#[derive(Clone, Debug)]
pub(crate) struct State {
    /// The record.
    pub(crate) seq: Seq,
    /// The last record before the next change: nothing happens to the disk until then.
    pub(crate) until: Seq,
    /// The last flush of the disk's cache that was asked for by `until`: what came before it is on the disk.
    barrier: Seq,
    /// What the record changed.
    pub(crate) changed: Vec<Range<u64>>,
}

/// The history of one volume in the store of an agent that has stopped.
#[derive(Debug)]
pub(crate) struct Captured {
    reader: StoreReader,
    volume: VolumeId,
    /// Size of the volume.
    pub(crate) bytes: u64,
    /// Before the first state.
    pub(crate) first: Seq,
    /// Every state, in order.
    pub(crate) states: Vec<State>,
    /// When each write and flush was asked for.
    times: Vec<(BootNs, Seq)>,
}

impl Captured {
    /// Reads the history of volume `name`; an error if it is not exact from end to end.
    pub(crate) fn open(store: &Path, name: &str) -> Result<Captured> {
        let reader = StoreReader::open(store).context("open the first store")?;
        let volume = reader.volume(name)?.context("the volume is in the store")?;
        let history = reader.history(volume.id)?.context("it has a history")?;
        ensure!(
            history.exact.len() == 1 && history.gaps.is_empty(),
            "the history is not exact from end to end: {history:?}"
        );
        let (first, last) = (history.exact[0].from_seq, history.exact[0].to_seq);
        let mut changes: BTreeMap<Seq, Vec<Range<u64>>> = BTreeMap::new();
        let (mut times, mut barriers) = (Vec::new(), vec![first]);
        for frame in reader.records(first.next()..=last) {
            for record in frame?.records.into_iter().map(|placed| placed.record) {
                if record.volume.is_some_and(|of| of != volume.id) {
                    continue;
                }
                match record.body {
                    Body::Write { offset, len }
                    | Body::Zero { offset, len }
                    | Body::Discard { offset, len } => {
                        changes.entry(record.seq).or_default().push(offset..offset + len);
                        times.push((record.boot_ns, record.seq));
                    }
                    // What a page that changed in flight was on the disk: part of the write that it corrects.
                    Body::ReadBack { offset, len, as_of } | Body::ReadBackZero { offset, len, as_of } => {
                        let seq = as_of.filter(|seq| *seq > first);
                        let seq = seq.context("read back, though nothing was lost")?;
                        changes.entry(seq).or_default().push(offset..offset + len);
                    }
                    Body::Barrier => times.push((record.boot_ns, record.seq)),
                    _ => {}
                }
                if record.body == Body::Barrier || record.flags.contains(RecordFlags::PREFLUSH) {
                    barriers.push(record.seq);
                }
            }
        }
        let mut states = Vec::with_capacity(changes.len());
        let ends: Vec<Seq> = changes.keys().skip(1).filter_map(|seq| seq.prev()).collect();
        let ends = ends.into_iter().chain([last]);
        for ((seq, changed), until) in changes.into_iter().zip(ends) {
            let barrier = barriers[barriers.partition_point(|barrier| *barrier <= until) - 1];
            states.push(State {
                seq,
                until,
                barrier,
                changed,
            });
        }
        Ok(Captured {
            bytes: volume.bytes,
            reader,
            volume: volume.id,
            first,
            states,
            times,
        })
    }

    /// The last write or flush that was asked for by `time`: in each state from there on, all of them are done
    /// that had returned to somebody by then.
    pub(crate) fn asked_by(&self, time: BootNs) -> Seq {
        let asked = self.times.iter().filter(|(at, _)| *at <= time);
        asked.map(|(_, seq)| *seq).max().unwrap_or(self.first)
    }

    /// Reads `range` of the disk as it was at `seq`.
    pub(crate) fn read(&self, seq: Seq, range: &Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let view = self.reader.view(self.volume, seq)?;
        view.read_at(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// What else a disk may hold that lost its power in `states[index]`: of what was written since its cache was
    /// flushed, each block as any of these writes left it, or as it was before. None if nothing was.
    pub(crate) fn reordered(&self, index: usize, rng: &mut Rng) -> Result<Blocks> {
        let barrier = self.states[index].barrier;
        let unflushed = self.states[..=index]
            .iter()
            .rev()
            .take_while(|state| state.seq > barrier);
        let mut versions: BTreeMap<u64, Vec<Seq>> = BTreeMap::new();
        for state in unflushed {
            for range in &state.changed {
                for block in range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES) {
                    versions
                        .entry(block)
                        .or_insert_with(|| vec![barrier])
                        .push(state.seq);
                }
            }
        }
        let mut blocks = Blocks::with_capacity(versions.len());
        for (block, seqs) in versions {
            let offset = block * BLOCK_BYTES;
            let range = offset..(offset + BLOCK_BYTES).min(self.bytes);
            blocks.push((offset, self.read(*rng.pick(&seqs), &range)?));
        }
        Ok(blocks)
    }
}
