//! Copying a whole view, in the order that the log's disk likes.
//!
//! The view is planned window by window; a window's pieces are sorted by where they lie in the log, so that
//! every group is read and unpacked once, in runs of neighbours. Workers read, check, unpack and write; two jobs
//! for each of them wait at most, of [`JOB_BYTES`] each, so memory is bounded whatever the size of the volume.
//!
//! Workers write one at a time. Those of one file would otherwise wait for each other in the kernel, spinning,
//! and for blocks written at random that costs more than it gains; so one writes while the others read and unpack.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::cache::{BAD_CHECKSUM, BAD_DIRECTORY};
use super::content::Reading;
use super::plan::plan_ranges;
use super::source::GROUP_STORED_BYTES_MAX;
use super::{
    Blocks, CopyError, CopyOptions, CopyReport, GroupPlace, Item, PlacedGroup, SegmentBytes, Sink, View,
};
use crate::error::ReadError;
use crate::format::{GROUP_BYTES_MAX, GROUP_CONTENT_BYTES_MAX, Group, decode_group};
use crate::types::BLOCK_BYTES;

/// One read of the log, and what is unpacked before it is written. A worker's three buffers (stored, unpacked, put
/// in order) stay in its processor's own cache: copies through memory cost more than all else that it does.
const JOB_BYTES: usize = 512 << 10;
/// Bytes between two groups that are read along rather than skipped.
const JOB_HOLE_BYTES: u32 = 128 << 10;
/// Bytes at the begin of a stretch that the kernel is asked to read before a worker does.
const STRETCH_AHEAD_BYTES: u64 = 2 << 20;
/// A range is scattered if its pieces are smaller than this on average...
const SCATTERED_PIECE_BYTES: u64 = 32 << 10;
/// ... and it is at least this long.
const SCATTERED_BYTES_MIN: u64 = 1 << 20;

const _: () = assert!(JOB_BYTES >= 2 * GROUP_STORED_BYTES_MAX);
const _: () = assert!(JOB_BYTES >= GROUP_BYTES_MAX + GROUP_CONTENT_BYTES_MAX);

/// What a block is compared with.
static ZERO_BLOCK: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];

/// Work for one thread.
enum Job {
    Zero(Vec<Range<u64>>),
    /// Pieces of one run of neighbouring groups, sorted by place, and the file that they lie in.
    Data(Arc<dyn SegmentBytes>, Vec<Item>),
}

struct Shared<'a> {
    view: &'a View,
    sink: &'a dyn Sink,
    progress: &'a (dyn Fn(u64) + Sync),
    /// Held by the worker that writes, if they take turns.
    writing: Option<Mutex<()>>,
    stop: AtomicBool,
    error: Mutex<Option<CopyError>>,
    data_bytes: AtomicU64,
    zero_bytes: AtomicU64,
}

pub(super) fn copy(
    view: &View,
    ranges: impl Iterator<Item = Range<u64>>,
    sink: &dyn Sink,
    options: &CopyOptions,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<CopyReport, CopyError> {
    let threads = options.threads.max(1);
    let shared = Shared {
        view,
        sink,
        progress,
        writing: options.one_writer.then(Mutex::default),
        stop: AtomicBool::new(false),
        error: Mutex::new(None),
        data_bytes: AtomicU64::new(0),
        zero_bytes: AtomicU64::new(0),
    };
    std::thread::scope(|scope| {
        let (sender, receiver) = bounded(2 * threads);
        for _ in 0..threads {
            let (shared, receiver) = (&shared, receiver.clone());
            scope.spawn(move || shared.run(&receiver));
        }
        drop(receiver);
        if let Err(error) = shared.plan_jobs(ranges, options.window_bytes.max(1), &sender) {
            shared.fail(error);
        }
    });
    match shared.error.into_inner() {
        Some(error) => Err(error),
        None => Ok(CopyReport {
            data_bytes: shared.data_bytes.into_inner(),
            zero_bytes: shared.zero_bytes.into_inner(),
        }),
    }
}

impl Shared<'_> {
    fn fail(&self, error: CopyError) {
        self.stop.store(true, Ordering::Relaxed);
        self.error.lock().get_or_insert(error);
    }

    fn plan_jobs(
        &self,
        mut ranges: impl Iterator<Item = Range<u64>>,
        window_bytes: u64,
        jobs: &Sender<Job>,
    ) -> Result<(), CopyError> {
        let mut ahead = ReadAhead::default();
        let mut rest = ranges.next();
        while rest.is_some() {
            let (mut parts, mut planned_bytes) = (Vec::new(), 0);
            // A window: what comes of the ranges until there is enough.
            while planned_bytes < window_bytes
                && let Some(range) = rest.take()
            {
                let part = range.start
                    ..range
                        .end
                        .min(range.start.saturating_add(window_bytes - planned_bytes));
                planned_bytes += part.end - part.start;
                rest = if part.end < range.end {
                    Some(part.end..range.end)
                } else {
                    ranges.next()
                };
                parts.push(part);
            }
            let (mut zeroes, mut data) = (Vec::new(), Vec::new());
            let mut sort = |item: Item| match item.data {
                Some(_) => data.push(item),
                None => zeroes.push(item.offset..item.offset + item.len),
            };
            let View { volume, seq, .. } = *self.view;
            let store = &self.view.store;
            plan_ranges(
                &parts,
                |range, visit| store.plan(volume, seq, range, visit),
                &mut sort,
            )?;
            self.tell_scattered(&data);
            // Newer segments first: what was overwritten here and there comes before the long runs that it lies in,
            // so that these are complete as they are written.
            data.sort_unstable_by_key(|item| {
                let (segment, group, in_group) = place_of(item);
                (Reverse(segment), group, in_group)
            });
            if !zeroes.is_empty() && jobs.send(Job::Zero(zeroes)).is_err() {
                return Ok(());
            }
            for run in data.chunk_by(run_together(&data)) {
                let file = ahead.file(&*self.view.store, run)?;
                // A closed channel means that every worker has stopped, and the reason is known.
                if self.stop.load(Ordering::Relaxed) || jobs.send(Job::Data(file, run.to_vec())).is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Tells the sink of ranges that will come in small pieces. `data` is in the order of the volume.
    fn tell_scattered(&self, data: &[Item]) {
        for range in data.chunk_by(|one, next| one.offset + one.len == next.offset) {
            let bytes = range.iter().map(|item| item.len).sum::<u64>();
            if bytes >= SCATTERED_BYTES_MIN && bytes / (range.len() as u64) < SCATTERED_PIECE_BYTES {
                self.sink.scattered(range[0].offset, bytes);
            }
        }
    }

    fn run(&self, jobs: &Receiver<Job>) {
        let mut worker = Worker::new(&*self.view.store);
        for job in jobs {
            // After a failure the jobs that wait are only drained.
            if self.stop.load(Ordering::Relaxed) {
                continue;
            }
            let done = match job {
                Job::Zero(ranges) => self.zero(&ranges),
                Job::Data(file, items) => worker.copy(self, &*file, &items),
            };
            if let Err(error) = done {
                self.fail(error);
            }
        }
    }

    fn zero(&self, ranges: &[Range<u64>]) -> Result<(), CopyError> {
        for range in ranges {
            let (offset, len) = (range.start, range.end - range.start);
            self.sink
                .zero(offset, len)
                .map_err(|source| CopyError::Write { offset, len, source })?;
            self.zero_bytes.fetch_add(len, Ordering::Relaxed);
            (self.progress)(len);
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), CopyError> {
        let len = bytes.len() as u64;
        self.sink
            .write_at(offset, bytes)
            .map_err(|source| CopyError::Write { offset, len, source })?;
        self.data_bytes.fetch_add(len, Ordering::Relaxed);
        (self.progress)(len);
        Ok(())
    }
}

fn place_of(item: &Item) -> (u64, u32, u32) {
    item.data.map_or((0, 0, 0), |data| {
        (data.place.segment, data.place.group_offset, data.in_group)
    })
}

/// Tells the kernel what will be read.
#[derive(Default)]
struct ReadAhead {
    /// The segment that is being read, and where its last run ended.
    current: Option<(u64, Arc<dyn SegmentBytes>, u32)>,
}

impl ReadAhead {
    /// The file that a run lies in, which is soon read.
    fn file(&mut self, store: &dyn Blocks, run: &[Item]) -> Result<Arc<dyn SegmentBytes>, ReadError> {
        let (segment, start, _) = run.first().map_or((0, 0, 0), place_of);
        let end = run.last().map_or(0, |item| place_of(item).1);
        let end = end.saturating_add(GROUP_STORED_BYTES_MAX as u32);
        let (file, last_end) = match self.current.take() {
            Some((current, file, last_end)) if current == segment => (file, last_end),
            _ => (store.segment_bytes(segment)?, 0),
        };
        // Within a stretch the kernel reads ahead by itself, but it cannot know where the next one begins.
        if start.saturating_sub(last_end) > JOB_HOLE_BYTES || last_end == 0 {
            file.will_read(u64::from(start), u64::from(end - start).min(STRETCH_AHEAD_BYTES));
        }
        self.current = Some((segment, Arc::clone(&file), end));
        Ok(file)
    }
}

/// Do two neighbours belong to one job? Remembers where the current job began.
fn run_together(items: &[Item]) -> impl FnMut(&Item, &Item) -> bool + use<> {
    let mut first = items.first().map_or((0, 0, 0), place_of);
    move |one, next| {
        let (one, next) = (place_of(one), place_of(next));
        let together = one.0 == next.0
            && next.1 - first.1 <= (JOB_BYTES - GROUP_STORED_BYTES_MAX) as u32
            && next.1 - one.1 <= GROUP_STORED_BYTES_MAX as u32 + JOB_HOLE_BYTES;
        if !together {
            first = next;
        }
        together
    }
}

/// Buffers of one thread.
struct Worker<'a> {
    stored: Vec<u8>,
    raw: Vec<u8>,
    raw_bytes: usize,
    /// What is still to come to `raw`, and for which items it is, from where on.
    reading: Reading<'a>,
    told: Vec<(Item, usize)>,
    /// Where stretches of `raw` go: offset in the view, start in `raw`, bytes.
    targets: Vec<(u64, usize, usize)>,
    gathered: Vec<u8>,
    /// Blocks that were written with zeroes: a sparse target need not hold them.
    zeroes: Vec<Range<u64>>,
}

/// Cuts bytes into runs of blocks that are all zero and runs that are not.
fn split_zeroes(bytes: &[u8], mut visit: impl FnMut(Range<usize>, bool)) {
    let is_zero = |block: &[u8]| *block == ZERO_BLOCK[..block.len()];
    let mut run: Option<(Range<usize>, bool)> = None;
    for (index, block) in bytes.chunks(BLOCK_BYTES as usize).enumerate() {
        let start = index * BLOCK_BYTES as usize;
        let (range, zero) = (start..start + block.len(), is_zero(block));
        match &mut run {
            Some((run, run_zero)) if *run_zero == zero => run.end = range.end,
            run => {
                if let Some((range, zero)) = run.replace((range, zero)) {
                    visit(range, zero);
                }
            }
        }
    }
    if let Some((range, zero)) = run {
        visit(range, zero);
    }
}

impl<'a> Worker<'a> {
    fn new(store: &'a dyn Blocks) -> Self {
        Self {
            stored: Vec::new(),
            raw: Vec::new(),
            raw_bytes: 0,
            reading: Reading::new(store),
            told: Vec::new(),
            targets: Vec::new(),
            gathered: Vec::new(),
            zeroes: Vec::new(),
        }
    }

    fn copy(
        &mut self,
        shared: &Shared<'_>,
        file: &dyn SegmentBytes,
        items: &[Item],
    ) -> Result<(), CopyError> {
        let (Some(first), Some(last)) = (items.first(), items.last()) else {
            return Ok(());
        };
        let ((_, start, _), (_, last_start, _)) = (place_of(first), place_of(last));
        let store = &shared.view.store;
        let wanted = (last_start - start) as usize + GROUP_STORED_BYTES_MAX;
        self.stored.resize(JOB_BYTES, 0);
        self.raw.resize(JOB_BYTES, 0);
        let filled = file.read(u64::from(start), &mut self.stored[..wanted])?;
        for group in items.chunk_by(|one, next| place_of(one).1 == place_of(next).1) {
            let Some(data) = group[0].data else { continue };
            if self.raw_bytes + GROUP_BYTES_MAX > self.raw.len() {
                self.write_out(shared)?;
            }
            let place = GroupPlace::of(&data.place);
            let at = (data.place.group_offset - start) as usize;
            let stored = self.stored.get(at..filled).unwrap_or(&[]);
            let raw = &mut self.raw[self.raw_bytes..];
            let header =
                decode_group(stored, place.crc, raw).ok_or_else(|| store.damage(&place, BAD_CHECKSUM))?;
            if header.is_plain() {
                self.take_plain(group, header.raw_bytes)
                    .ok_or_else(|| store.damage(&place, BAD_CHECKSUM))?;
            } else {
                let raw = self.raw[self.raw_bytes..self.raw_bytes + header.raw_bytes].to_vec();
                let unpacked = Group::new(header, raw).ok_or_else(|| store.damage(&place, BAD_DIRECTORY))?;
                self.take_told(shared, group, &(place, Arc::new(unpacked)))?;
            }
        }
        self.write_out(shared)
    }

    /// Takes stretches of the plain group that was unpacked behind the others; `None` if one lies outside of it.
    fn take_plain(&mut self, items: &[Item], group_bytes: usize) -> Option<()> {
        for item in items {
            let in_group = item.data.map_or(0, |data| data.in_group as usize);
            if in_group + item.len as usize > group_bytes {
                return None;
            }
            self.take(item, self.raw_bytes + in_group);
        }
        self.raw_bytes += group_bytes;
        Some(())
    }

    /// Takes stretches of a group that tells them by a directory. They are there when all is written out.
    fn take_told(
        &mut self,
        shared: &Shared<'_>,
        items: &[Item],
        group: &PlacedGroup,
    ) -> Result<(), CopyError> {
        for item in items {
            let len = item.len as usize;
            if self.raw_bytes + len > self.raw.len() {
                self.write_out(shared)?;
            }
            // No group holds more than fits; a store elsewhere may say otherwise.
            let target = self.raw_bytes..self.raw_bytes + len;
            if target.end > self.raw.len() {
                return Err(shared.view.store.damage(&group.0, BAD_DIRECTORY).into());
            }
            let in_group = item.data.map_or(0, |data| data.in_group as usize);
            self.reading.take(group, in_group, &mut self.raw, target)?;
            self.told.push((*item, self.raw_bytes));
            self.raw_bytes += len;
        }
        Ok(())
    }

    /// Takes a stretch that was unpacked to `from`.
    fn take(&mut self, item: &Item, from: usize) {
        let bytes = &self.raw[from..from + item.len as usize];
        split_zeroes(bytes, |range, is_zero| {
            let (offset, len) = (item.offset + range.start as u64, range.len());
            if is_zero {
                self.zeroes.push(offset..offset + len as u64);
            } else {
                self.targets.push((offset, from + range.start, len));
            }
        });
    }

    /// Writes what was unpacked, neighbours in one go.
    fn write_out(&mut self, shared: &Shared<'_>) -> Result<(), CopyError> {
        self.reading.finish(&mut self.raw)?;
        for (item, from) in std::mem::take(&mut self.told) {
            self.take(&item, from);
        }
        self.targets.sort_unstable();
        let writing = shared.writing.as_ref().map(Mutex::lock);
        for run in self.targets.chunk_by(|one, next| one.0 + one.2 as u64 == next.0) {
            let (offset, first_start, _) = run[0];
            let bytes: usize = run.iter().map(|(_, _, bytes)| bytes).sum();
            let in_order = run.windows(2).all(|pair| pair[0].1 + pair[0].2 == pair[1].1);
            if in_order {
                shared.write(offset, &self.raw[first_start..first_start + bytes])?;
            } else {
                self.gathered.clear();
                for (_, start, bytes) in run {
                    self.gathered.extend_from_slice(&self.raw[*start..start + bytes]);
                }
                shared.write(offset, &self.gathered)?;
            }
        }
        drop(writing);
        self.targets.clear();
        self.raw_bytes = 0;
        shared.zero(&std::mem::take(&mut self.zeroes))
    }
}
