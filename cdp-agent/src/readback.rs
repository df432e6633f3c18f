//! Reading volumes back: the first copy, and whatever became dirty.
//!
//! Bytes read at some time belong before every write still to be captured. The rule, for each run of regions:
//! take the marks, empty the ring of all that was queued by then and note the Seq `s`, wait until every
//! captured write up to `s` to these regions has ended, read past the page cache, and record the bytes as of
//! `s`. Writes after `s` lie on top of them; a write that nobody captured leaves a new mark when it ends.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use cdp_journal::view::View;
use cdp_journal::{BLOCK_BYTES, BootNs, SECTOR_BYTES, Seq, UNIT_BYTES, VolumeId};
use crossbeam_channel::Sender;
use parking_lot::Mutex;

use crate::capture::DiskNumber;
use crate::clock;
use crate::device::{BlockDevice, Requests};
use crate::pipeline::{IndexRequest, Shared};
use crate::priority;
use crate::recorder::{FLIGHT_TIME_MAX, PLUG_TIME, Run, SUSPECT_BLOCKS_MAX, Suspicion};

/// Read under one note of `s`.
const RUN_BYTES_MAX: u64 = 32 << 20;
/// One read, and at most one record.
const READ_BYTES: u64 = 1 << 20;
/// One read of ours is split into a few requests at most.
const REQUESTS_PER_READ: u64 = 16;
/// With more of a volume's blocks to compare than this no way is given: until they are compared nothing is exact, and
/// there may only be so many.
const UNHURRIED_BLOCKS_MAX: usize = SUSPECT_BLOCKS_MAX / 8;
/// Suspects that are compared at once (16 MiB). To know what was written meanwhile takes a tenth of a second, however
/// many they are; and where all of a large table is written while it is changed, ten thousand blocks become suspect
/// each second.
const COMPARE_BLOCKS_MAX: usize = 4096;
/// One read while others use the disk: as long as it takes, a write may have to wait behind it.
const BUSY_READ_BYTES: u64 = 64 << 10;
/// How fast it goes on then: what is read is compared, encoded and written as well. So that fewer than one write in a
/// hundred meets a read of ours on a disk that takes 40 µs for each.
const BUSY_BYTES_PER_S: f64 = (16 << 20) as f64;
/// For so long after a request of others they count as using the disk.
const BUSY_TIME: Duration = Duration::from_millis(250);
/// Memory that O_DIRECT may want its buffers aligned to.
const ALIGN_BYTES: usize = 4096;
/// How long the thread sleeps when nothing is dirty: first...
const IDLE: Duration = Duration::from_millis(10);
/// ... and when nothing has been for a while.
const IDLE_MAX: Duration = Duration::from_millis(40);
/// How long to wait before a device that failed a read is read again.
const RETRY: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(1);

/// The devices of the volumes, by volume; shared with who adds and removes them.
pub(crate) type Devices = Arc<Mutex<HashMap<VolumeId, BlockDevice>>>;

/// The read-back thread.
pub(crate) struct ReadBack {
    pub(crate) shared: Arc<Shared>,
    pub(crate) index: Sender<IndexRequest>,
    pub(crate) devices: Devices,
}

/// The agent is stopping.
#[derive(Debug, thiserror::Error)]
#[error("the agent is stopping")]
struct Stopping;

/// Writes that were in flight at some time.
struct Lingering {
    since: Instant,
    last: Option<Seq>,
}

/// Volumes whose device failed a read: others are read meanwhile.
#[derive(Debug, Default)]
struct Resting(HashMap<VolumeId, Instant>);

impl Resting {
    fn rest(&mut self, volume: VolumeId) {
        self.0.insert(volume, Instant::now() + RETRY);
    }

    fn contains(&self, volume: VolumeId) -> bool {
        self.0.get(&volume).is_some_and(|&until| Instant::now() < until)
    }
}

/// Makes reading back give way to production: while others use the disk, it goes on in small reads and at a rate that
/// they do not feel.
#[derive(Default)]
struct Pace {
    others_at: Option<Instant>,
    /// What the disk had completed after the last read of ours.
    done: Option<Requests>,
}

/// Reads of ours, one behind the other.
struct Reads {
    began: Instant,
    bytes: u64,
    /// Which the disk counts, at most.
    requests: u64,
}

impl Reads {
    fn begin() -> Self {
        Self {
            began: Instant::now(),
            bytes: 0,
            requests: 0,
        }
    }

    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.requests += (bytes / BLOCK_BYTES).clamp(1, REQUESTS_PER_READ);
    }
}

impl Pace {
    fn is_busy(&self) -> bool {
        self.others_at.is_some_and(|at| at.elapsed() < BUSY_TIME)
    }

    /// How much to read at once.
    fn read_bytes(&self) -> u64 {
        match self.is_busy() {
            true => BUSY_READ_BYTES,
            false => READ_BYTES,
        }
    }

    /// These reads are done. Sleeps while others use the disk, unless ours are urgent.
    fn give_way(&mut self, device: &BlockDevice, reads: &Reads, is_urgent: bool) {
        let now = device.requests_done();
        let others = now.zip(self.done).is_some_and(|(now, then)| {
            now.writes > then.writes || now.reads.saturating_sub(then.reads) > reads.requests
        });
        self.done = now;
        if others {
            self.others_at = Some(Instant::now());
        }
        if self.is_busy() && !is_urgent {
            let time = Duration::from_secs_f64(reads.bytes as f64 / BUSY_BYTES_PER_S);
            std::thread::sleep(time.saturating_sub(reads.began.elapsed()));
        }
    }
}

impl ReadBack {
    /// Runs until the agent stops.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        priority::give_way();
        priority::read_when_idle();
        let mut idle_at: HashMap<VolumeId, BootNs> = HashMap::new();
        let mut paces: HashMap<VolumeId, Pace> = HashMap::new();
        let mut lingering: HashMap<DiskNumber, Lingering> = HashMap::new();
        let mut resting = Resting::default();
        let mut idle = IDLE;
        while !self.shared.stop.load(Ordering::SeqCst) {
            let Ok(is_more_suspect) = self.check_suspects(&mut paces, &mut resting) else {
                return Ok(());
            };
            let bytes = self.shared.pace.bytes_now().min(RUN_BYTES_MAX);
            let may = |volume| !resting.contains(volume);
            let run = (bytes > 0).then(|| self.shared.recorder.lock().take_run(bytes, may));
            let Some(run) = run.flatten() else {
                let is_waiting = self.close_gaps(&mut idle_at);
                self.give_up_lingering(&mut lingering);
                idle = if is_waiting {
                    IDLE
                } else {
                    (idle * 2).min(IDLE_MAX)
                };
                if !is_more_suspect {
                    std::thread::sleep(idle);
                }
                continue;
            };
            idle = IDLE;
            let result = self.read_run(&run, paces.entry(run.volume).or_default());
            self.shared.pace.run_done();
            self.shared.recorder.lock().run_done(&run, result.is_err());
            match result {
                Ok(()) => {}
                Err(error) if error.is::<Stopping>() => return Ok(()),
                Err(error) => {
                    tracing::warn!("read back bytes {:?}: {error:#}; trying again", run.bytes);
                    resting.rest(run.volume);
                }
            }
        }
        Ok(())
    }

    /// Compares with the device some of what it may have taken otherwise than it was seen. Is there likely more?
    fn check_suspects(
        &self,
        paces: &mut HashMap<VolumeId, Pace>,
        resting: &mut Resting,
    ) -> Result<bool, Stopping> {
        let may = |volume| !resting.contains(volume);
        let taken = self.shared.recorder.lock().take_suspects(COMPARE_BLOCKS_MAX, may);
        let Some(suspicion) = taken else {
            return Ok(false);
        };
        let volume = suspicion.volume;
        let bytes: u64 = suspicion.ranges.iter().map(|range| range.end - range.start).sum();
        let result = self.compare(suspicion, paces.entry(volume).or_default());
        self.shared.recorder.lock().suspects_done(volume, result.is_ok());
        match result {
            Ok(()) => {}
            Err(error) if error.is::<Stopping>() => return Err(Stopping),
            Err(error) => {
                tracing::warn!("compare blocks that changed in flight: {error:#}; trying again");
                resting.rest(volume);
            }
        }
        Ok(bytes >= COMPARE_BLOCKS_MAX as u64 * BLOCK_BYTES)
    }

    /// As [`ReadBack::read_run`], of several places, and only what was not written meanwhile counts: it stands
    /// for the record that wrote it last.
    fn compare(&self, suspicion: Suspicion, pace: &mut Pace) -> anyhow::Result<()> {
        let device = self.device(suspicion.volume)?;
        let file = device.open_direct()?;
        let as_of = self.shared.drained().ok_or(Stopping)?;
        let runs: Vec<Run> = suspicion
            .ranges
            .iter()
            .flat_map(pieces_of)
            .map(|bytes| Run {
                volume: suspicion.volume,
                bytes,
                blank: false,
                epoch: suspicion.epoch,
            })
            .collect();
        for run in &runs {
            self.wait_until_ended(run, as_of, &device)?;
        }
        let Some(first) = runs.first() else { return Ok(()) };
        let view = self.head_view(first, as_of)?;
        let bytes: u64 = runs.iter().map(|run| run.bytes.end - run.bytes.start).sum();
        let mut buffer = AlignedBuffer::new(bytes as usize);
        let mut places = Vec::with_capacity(runs.len());
        let mut filled = 0;
        let mut reads = Reads::begin();
        for run in &runs {
            self.is_wanted(run)?;
            let end = run.bytes.end.min(device.bytes);
            let length = end.saturating_sub(run.bytes.start) as usize;
            let bytes = &mut buffer.slice(filled + length)[filled..];
            let mut at = run.bytes.start;
            for bytes in bytes.chunks_mut(pace.read_bytes() as usize) {
                read_device(&file, bytes, at)
                    .with_context(|| format!("read {} at byte {at}", device.path.display()))?;
                at += bytes.len() as u64;
                reads.add(bytes.len() as u64);
                if reads.bytes >= pace.read_bytes() {
                    let reads = std::mem::replace(&mut reads, Reads::begin());
                    pace.give_way(&device, &reads, self.is_urgent(suspicion.volume));
                }
            }
            places.push(filled..filled + length);
            filled += length.next_multiple_of(BLOCK_BYTES as usize);
        }
        // Only now it is known what was written, or lost, while we read.
        self.shared.losses_known().ok_or(Stopping)?;
        // Another disk says nothing of what this one took.
        if let Some(why) = device.why_gone() {
            bail!("{}: {why}", device.path.display());
        }
        let bytes = buffer.slice(filled);
        for (run, place) in runs.iter().zip(places) {
            self.correct_changed(run, &bytes[place], &view)?;
        }
        Ok(())
    }

    /// Does somebody wait until blocks are compared, or wait more of them than can while others come first?
    fn is_urgent(&self, volume: VolumeId) -> bool {
        self.shared.awaits_clear()
            || self.shared.recorder.lock().suspect_blocks(volume) > UNHURRIED_BLOCKS_MAX
    }

    fn correct_changed(&self, run: &Run, bytes: &[u8], view: &View) -> anyhow::Result<()> {
        // Blocks that the volume does not have, or not whole, are nobody's.
        let had = view.bytes().saturating_sub(run.bytes.start);
        let bytes = match had < bytes.len() as u64 {
            true => &bytes[..(had - had % BLOCK_BYTES) as usize],
            false => bytes,
        };
        let mut known = vec![0u8; bytes.len()];
        // Where a part cannot be read, each block is asked for.
        let is_known = view.read_at(run.bytes.start, &mut known).is_ok();
        let blocks = bytes.chunks(BLOCK_BYTES as usize);
        let known = known.chunks_mut(BLOCK_BYTES as usize);
        let places = (run.bytes.start..).step_by(BLOCK_BYTES as usize);
        for ((block, known), at) in blocks.zip(known).zip(places) {
            if (is_known || view.read_at(at, known).is_ok()) && known == block {
                continue;
            }
            let written_by = view.written_by(at)?;
            let data = (!is_zero(block)).then_some(block);
            let run = Run {
                bytes: at..at + block.len() as u64,
                ..run.clone()
            };
            tracing::debug!(at, ?written_by, "a block changed while it was written");
            self.wait_until(&run, || {
                let mut recorder = self.shared.recorder.lock();
                recorder.correct(&run, written_by, data, clock::boot_ns())
            })?;
        }
        Ok(())
    }

    fn device(&self, volume: VolumeId) -> anyhow::Result<BlockDevice> {
        self.devices
            .lock()
            .get(&volume)
            .cloned()
            .context("the volume is not protected any more")
    }

    fn read_run(&self, run: &Run, pace: &mut Pace) -> anyhow::Result<()> {
        let device = self.device(run.volume)?;
        let file = device.open_direct()?;
        let as_of = self.shared.drained().ok_or(Stopping)?;
        self.wait_until_ended(run, as_of, &device)?;
        let known = if run.blank {
            None
        } else {
            Some(self.head_view(run, as_of)?)
        };
        let mut buffer = AlignedBuffer::new(READ_BYTES as usize);
        let mut at = run.bytes.start;
        while at < run.bytes.end {
            let mut reads = Reads::begin();
            let length = pace.read_bytes().min(run.bytes.end - at);
            let bytes = buffer.slice(length as usize);
            read_device(&file, bytes, at)
                .with_context(|| format!("read {} at byte {at}", device.path.display()))?;
            match &known {
                None => self.record_nonzero(run, at, bytes, as_of)?,
                Some(view) => self.record_changed(run, at, bytes, as_of, view)?,
            }
            at += length;
            reads.add(length);
            pace.give_way(&device, &reads, false);
        }
        Ok(())
    }

    /// A view that holds every record up to `as_of`.
    fn head_view(&self, run: &Run, as_of: Option<Seq>) -> anyhow::Result<View> {
        self.wait_until(run, || self.shared.applied() >= as_of)?;
        let (reply, answer) = crossbeam_channel::bounded(1);
        self.index
            .send(IndexRequest::HeadView(run.volume, reply))
            .ok()
            .context("the index stage has ended")?;
        answer.recv().context("the index stage has ended")?
    }

    /// The first copy: only what is not zero is recorded, unit by unit.
    fn record_nonzero(&self, run: &Run, at: u64, bytes: &[u8], as_of: Option<Seq>) -> anyhow::Result<()> {
        for piece in runs_of(bytes, UNIT_BYTES as usize, |unit| !is_zero(unit)) {
            self.record(run, at, piece, bytes, as_of)?;
        }
        Ok(())
    }

    /// A resync: only what differs from the head of the log is recorded, block by block.
    fn record_changed(
        &self,
        run: &Run,
        at: u64,
        bytes: &[u8],
        as_of: Option<Seq>,
        view: &View,
    ) -> anyhow::Result<()> {
        let mut known = vec![0u8; bytes.len()];
        let readable = view.bytes().saturating_sub(at).min(bytes.len() as u64) as usize;
        // Damaged history must not stop the repair: what cannot be read is recorded anew.
        let damaged = view.read_at(at, &mut known[..readable]).is_err();
        let block = BLOCK_BYTES as usize;
        let mut index = 0;
        let differs: Vec<bool> = bytes
            .chunks(block)
            .zip(known.chunks(block))
            .map(|(now, then)| damaged || now != then)
            .collect();
        for piece in runs_of(bytes, block, |_| {
            index += 1;
            differs[index - 1]
        }) {
            self.record(run, at, piece, bytes, as_of)?;
        }
        Ok(())
    }

    fn record(
        &self,
        run: &Run,
        at: u64,
        piece: Range<usize>,
        bytes: &[u8],
        as_of: Option<Seq>,
    ) -> anyhow::Result<()> {
        let data = &bytes[piece.clone()];
        let data = (!is_zero(data)).then_some(data);
        let place = at + piece.start as u64..at + piece.end as u64;
        // Live frames go first: there is room for ours when the encoder has kept up.
        self.wait_until(run, || {
            self.shared
                .recorder
                .lock()
                .read_back(run, place.clone(), as_of, data, clock::boot_ns())
        })?;
        self.shared.pace.recorded(data.map_or(0, <[u8]>::len) as u64);
        Ok(())
    }

    /// Waits until every write up to `as_of` to this run has ended. A kernel may skip the probe now and then
    /// without counting that, and a completion goes unseen: what the disk itself no longer counts has ended,
    /// and so has, as far as we wait, what takes longer than [`FLIGHT_TIME_MAX`].
    fn wait_until_ended(&self, run: &Run, as_of: Option<Seq>, device: &BlockDevice) -> anyhow::Result<()> {
        let began = Instant::now();
        // What the disk counts none of is what came up to here, and so long before.
        let (mut noted, mut noted_at) = (as_of, began);
        self.wait_until(run, || {
            let Some((sectors, seq)) = self.shared.recorder.lock().in_flight(run, as_of) else {
                return true;
            };
            let is_idle = noted_at.elapsed() > PLUG_TIME && device.writes_in_flight() == Some(0);
            let is_overdue = began.elapsed() > FLIGHT_TIME_MAX;
            if !is_idle && !is_overdue {
                return false;
            }
            // Its end may wait in the ring; given up before it is seen, it would pass for the end of a later write.
            if self.shared.drained().is_none() {
                return true;
            }
            let mut recorder = self.shared.recorder.lock();
            if recorder.in_flight(run, as_of).is_none() {
                return true;
            }
            tracing::debug!(
                seq = seq.get(),
                ?sectors,
                is_idle,
                "the end of a write was not seen"
            );
            match is_overdue {
                true => recorder.overdue(run, as_of),
                false => recorder.ended(run, noted),
            }
            (noted, noted_at) = (recorder.last_seq(), Instant::now());
            recorder.in_flight(run, as_of).is_none()
        })
    }

    fn wait_until(&self, run: &Run, mut done: impl FnMut() -> bool) -> anyhow::Result<()> {
        while !done() {
            self.is_wanted(run)?;
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// An error if what is read of a run would be of no use any more.
    fn is_wanted(&self, run: &Run) -> anyhow::Result<()> {
        if self.shared.stop.load(Ordering::SeqCst) {
            bail!(Stopping);
        }
        if self.shared.recorder.lock().epoch() != run.epoch {
            bail!("the store filled up meanwhile");
        }
        Ok(())
    }

    /// Writes that the disk counts no more, and whose end was not seen, are given up as soon as that is known: they are
    /// compared then. On a disk that is never idle they are overdue some time.
    fn give_up_lingering(&self, lingering: &mut HashMap<DiskNumber, Lingering>) {
        let devices: Vec<BlockDevice> = self.devices.lock().values().cloned().collect();
        for device in devices {
            let (oldest, last) = {
                let recorder = self.shared.recorder.lock();
                (recorder.oldest_in_flight(device.disk), recorder.last_seq())
            };
            let Some(oldest) = oldest else {
                lingering.remove(&device.disk);
                continue;
            };
            let since = Instant::now();
            let found = lingering.entry(device.disk).or_insert(Lingering { since, last });
            if Some(oldest) > found.last {
                *found = Lingering { since, last };
            } else if found.since.elapsed() > PLUG_TIME && device.writes_in_flight() == Some(0) {
                let last = found.last;
                lingering.remove(&device.disk);
                // What did end shows in the ring.
                if self.shared.drained().is_some() {
                    self.shared.recorder.lock().give_up(device.disk, last);
                }
            }
        }
    }

    /// Closes the gaps that can be. Is there one that cannot be yet?
    fn close_gaps(&self, idle_at: &mut HashMap<VolumeId, BootNs>) -> bool {
        let waiting = self.shared.recorder.lock().waiting_to_close();
        let is_waiting = !waiting.is_empty();
        for (volume, _) in waiting {
            let Ok(device) = self.device(volume) else { continue };
            let asked_at = clock::boot_ns();
            if device.writes_in_flight() == Some(0) {
                idle_at.insert(volume, asked_at);
            }
            if self.shared.drained().is_none() {
                return is_waiting;
            }
            self.shared
                .recorder
                .lock()
                .try_close(volume, idle_at.get(&volume).copied(), clock::boot_ns());
        }
        is_waiting
    }
}

/// A range, in pieces of [`READ_BYTES`] at most.
fn pieces_of(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let end = range.end;
    (range.start..end)
        .step_by(READ_BYTES as usize)
        .map(move |at| at..end.min(at + READ_BYTES))
}

/// Reads exactly `bytes.len()` bytes. The last sectors of a device may be fewer than O_DIRECT reads at once.
fn read_device(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
    debug_assert!(at.is_multiple_of(SECTOR_BYTES));
    file.read_exact_at(bytes, at)
}

fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|&byte| byte == 0) && chunks.iter().all(|chunk| *chunk == [0; 64])
}

/// Runs of neighbouring pieces of `piece` bytes that are `wanted`.
fn runs_of(bytes: &[u8], piece: usize, mut wanted: impl FnMut(&[u8]) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (i, chunk) in bytes.chunks(piece).enumerate() {
        if !wanted(chunk) {
            continue;
        }
        let start = i * piece;
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = start + chunk.len(),
            _ => runs.push(start..start + chunk.len()),
        }
    }
    runs
}

/// Memory that O_DIRECT takes.
struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    fn new(length: usize) -> Self {
        let bytes = vec![0; length + ALIGN_BYTES];
        let start = bytes.as_ptr().align_offset(ALIGN_BYTES);
        Self { bytes, start }
    }

    fn slice(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_neighbours_and_keep_the_short_end() {
        let bytes = [1, 1, 0, 0, 2, 2, 3, 3, 0, 0, 4];
        assert_eq!(
            runs_of(&bytes, 2, |piece| !is_zero(piece)),
            vec![0..2, 4..8, 10..11]
        );
    }

    #[test]
    fn zero_is_zero_to_the_last_byte() {
        for length in [0, 1, 63, 64, 65, 4096] {
            let mut bytes = vec![0u8; length];
            assert!(is_zero(&bytes));
            if let Some(last) = bytes.last_mut() {
                *last = 1;
                assert!(!is_zero(&bytes));
            }
        }
    }
}
