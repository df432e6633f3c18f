//! Copying a whole view, in the order that the log's disk likes.
//!
//! The view is planned window by window; a window's pieces are sorted by where they lie in the log, so that
//! every group is read and unpacked once for each batch, in runs of neighbours. Workers read, check, unpack and write; the jobs that
//! wait for them, of [`JOB_BYTES`] each, are bounded, so memory is, whatever the size of the volume.
//!
//! What lies in the log as small pieces in no order is put together first (see [`Gather`]). Where it is more than there
//! is memory for, a window is read in several batches.
//!
//! Workers write one at a time. Those of one file would otherwise wait for each other in the kernel, spinning,
//! and for blocks written at random that costs more than it gains; so one writes while the others read and unpack.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use parking_lot::Mutex;

use super::cache::{BAD_CHECKSUM, BAD_DIRECTORY};
use super::content::Reading;
use super::gather::{Complete, Gather};
use super::source::GROUP_STORED_BYTES_MAX;
use super::windows::{Cut, Window, plan_windows};
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
/// Jobs that wait for a worker. Each may keep a segment open.
const JOBS_MAX: usize = 16;
/// Of the memory in which pieces are put together, this part may lie in the page cache besides: what the kernel was asked
/// to read and no worker has come to yet. So much as jobs may wait, at least.
const AHEAD_SHARE: u64 = 4;
/// Holes that are one job.
const ZERO_BYTES: u64 = 256 << 20;

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
    gather: Gather,
    stop: AtomicBool,
    error: Mutex<Option<CopyError>>,
    wanted_bytes: AtomicU64,
    data_bytes: AtomicU64,
    zero_bytes: AtomicU64,
}

pub(super) fn copy(
    view: &View,
    ranges: impl Iterator<Item = Range<u64>> + Send,
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
        gather: Gather::new(options.gather_bytes_max),
        stop: AtomicBool::new(false),
        error: Mutex::new(None),
        wanted_bytes: AtomicU64::new(0),
        data_bytes: AtomicU64::new(0),
        zero_bytes: AtomicU64::new(0),
    };
    std::thread::scope(|scope| {
        let jobs_ahead = (options.gather_bytes_max / AHEAD_SHARE) as usize / JOB_BYTES;
        let jobs_ahead = jobs_ahead.max(JOBS_MAX);
        let (sender, receiver) = bounded(JOBS_MAX);
        for _ in 0..threads {
            let (shared, receiver) = (&shared, receiver.clone());
            scope.spawn(move || shared.run(&receiver));
        }
        drop(receiver);
        // Nothing waits in between: while one window is copied the next is planned, and no more.
        let (planned, windows) = bounded(0);
        let window_bytes = options.window_bytes.max(1);
        let first = move |items: &[Item]| read_first(&*view.store, items, jobs_ahead);
        let stop = &shared.stop;
        scope.spawn(move || plan_windows(view, ranges, window_bytes, stop, first, &planned));
        for window in windows {
            if let Ok(window) = &window {
                shared.wanted_bytes.fetch_add(window.bytes(), Ordering::Relaxed);
            }
            let sent = window.and_then(|window| shared.send_window(window, jobs_ahead, &sender));
            match sent {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => shared.fail(error.into()),
            }
        }
    });
    if let Some(error) = shared.error.into_inner() {
        return Err(error);
    }
    let report = CopyReport {
        data_bytes: shared.data_bytes.into_inner(),
        zero_bytes: shared.zero_bytes.into_inner(),
    };
    let (done_bytes, wanted_bytes) = (
        report.data_bytes + report.zero_bytes,
        shared.wanted_bytes.into_inner(),
    );
    if done_bytes == wanted_bytes {
        Ok(report)
    } else {
        Err(CopyError::Incomplete {
            done_bytes,
            wanted_bytes,
        })
    }
}

impl Shared<'_> {
    fn fail(&self, error: CopyError) {
        self.stop.store(true, Ordering::Relaxed);
        self.error.lock().get_or_insert(error);
        self.gather.stop();
    }

    /// Sends the jobs of a window; `false` if nobody takes them any more.
    fn send_window(&self, window: Window, jobs_ahead: usize, jobs: &Sender<Job>) -> Result<bool, ReadError> {
        let Window { zeroes, mut data, .. } = window;
        let mut zeroes = Cut::new(zeroes.into_iter());
        while let Some(some) = zeroes.take(ZERO_BYTES) {
            if jobs.send(Job::Zero(some)).is_err() {
                return Ok(false);
            }
        }
        let stretches = self.gather.scattered(&data, self.view.store.is_near());
        let mut stretches = &stretches[..];
        loop {
            let (batch, later) = stretches.split_at(self.gather.batch(stretches));
            let rest = match (batch.last(), later.is_empty()) {
                (Some(last), false) => split_items(&mut data, last.end),
                _ => Vec::new(),
            };
            self.gather.expect(batch);
            if !self.send_batch(data, jobs_ahead, jobs)? {
                return Ok(false);
            }
            if rest.is_empty() {
                return Ok(true);
            }
            (data, stretches) = (rest, later);
        }
    }

    fn send_batch(
        &self,
        mut data: Vec<Item>,
        jobs_ahead: usize,
        jobs: &Sender<Job>,
    ) -> Result<bool, ReadError> {
        sort_by_place(&mut data);
        let store = &*self.view.store;
        let (mut files, mut hints) = (Files::default(), Files::default());
        let mut soon = data.chunk_by(run_together(&data)).enumerate().peekable();
        for (number, run) in data.chunk_by(run_together(&data)).enumerate() {
            let mut job = Job::Data(files.of(store, run)?, run.to_vec());
            self.gather.job_begins();
            soon.next_if(|(soon, _)| *soon <= number);
            // While all workers are busy the kernel is told what they need next, so many jobs ahead as it may read.
            let is_sent = loop {
                if self.stop.load(Ordering::Relaxed) {
                    break false;
                }
                match jobs.try_send(job) {
                    Err(TrySendError::Full(back)) => job = back,
                    sent => break sent.is_ok(),
                }
                match soon.next_if(|(soon, _)| *soon <= number + jobs_ahead) {
                    Some((_, run)) => hints.will_read(store, run)?,
                    None => break jobs.send(job).is_ok(),
                }
            };
            // Nobody takes jobs any more once every worker has stopped, and the reason is known.
            if !is_sent {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn run(&self, jobs: &Receiver<Job>) {
        let mut worker = Worker::new(&*self.view.store, &self.gather);
        for job in jobs {
            // After a failure the jobs that wait are only drained.
            if self.stop.load(Ordering::Relaxed) {
                continue;
            }
            let done = match job {
                Job::Zero(ranges) => ranges.into_iter().try_for_each(|range| self.zero_told(range)),
                Job::Data(file, items) => {
                    let _ends = JobEnds(self);
                    worker.copy(self, &*file, &items)
                }
            };
            if let Err(error) = done {
                self.fail(error);
            }
        }
    }

    fn zero(&self, range: Range<u64>) -> Result<(), CopyError> {
        let (offset, len) = (range.start, range.end - range.start);
        self.sink
            .zero(offset, len)
            .map_err(|source| CopyError::Write { offset, len, source })?;
        self.zero_bytes.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    fn zero_told(&self, range: Range<u64>) -> Result<(), CopyError> {
        let len = range.end - range.start;
        self.zero(range)?;
        (self.progress)(len);
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), CopyError> {
        let len = bytes.len() as u64;
        self.sink
            .write_at(offset, bytes)
            .map_err(|source| CopyError::Write { offset, len, source })?;
        self.data_bytes.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    fn write_told(&self, offset: u64, bytes: &[u8]) -> Result<(), CopyError> {
        self.write(offset, bytes)?;
        (self.progress)(bytes.len() as u64);
        Ok(())
    }

    /// Progress was told as its pieces came.
    fn write_stretch(&self, stretch: &Complete<'_>) -> Result<(), CopyError> {
        let _writing = self.writing.as_ref().map(Mutex::lock);
        let mut runs = Vec::new();
        split_zeroes(stretch.offset, stretch.bytes(), |range, is_zero| {
            runs.push((range, is_zero))
        });
        runs.into_iter().try_for_each(|(range, is_zero)| {
            let (start, end) = (
                stretch.offset + range.start as u64,
                stretch.offset + range.end as u64,
            );
            if is_zero {
                self.zero(start..end)
            } else {
                self.write(start, &stretch.bytes()[range])
            }
        })
    }
}

/// Takes away what lies at `offset` or later, cutting the item that it lies in.
fn split_items(items: &mut Vec<Item>, offset: u64) -> Vec<Item> {
    let mut rest = items.split_off(items.partition_point(|item| item.offset < offset));
    if let Some(last) = items.pop() {
        let end = last.offset + last.len;
        items.extend(last.clipped(&(last.offset..offset)));
        if let Some(cut) = last.clipped(&(offset..end)) {
            rest.insert(0, cut);
        }
    }
    rest
}

fn place_of(item: &Item) -> (u64, u32, u32) {
    item.data.map_or((0, 0, 0), |data| {
        (data.place.segment, data.place.group_offset, data.in_group)
    })
}

/// In the order of the log. Newer segments first: what was overwritten here and there comes before the long runs that it
/// lies in, so that these are complete as they are written.
fn sort_by_place(items: &mut [Item]) {
    items.sort_unstable_by_key(|item| {
        let (segment, group, in_group) = place_of(item);
        (Reverse(segment), group, in_group)
    });
}

/// Has the kernel read what the first of all items need, for they and the next ones lie among each other. What comes of
/// it does not matter: whoever reads them in earnest finds out.
fn read_first(store: &dyn Blocks, items: &[Item], jobs_max: usize) {
    let mut items = items.to_vec();
    sort_by_place(&mut items);
    let mut hints = Files::default();
    let mut runs = items.chunk_by(run_together(&items)).take(jobs_max);
    let _ = runs.try_for_each(|run| hints.will_read(store, run));
}

/// Opens segments one after the other, each once while it is read.
#[derive(Default)]
struct Files {
    /// The segment that is being read, and where its last run ended.
    current: Option<(u64, Arc<dyn SegmentBytes>, u32)>,
}

impl Files {
    /// The file that a run lies in.
    fn of(&mut self, store: &dyn Blocks, run: &[Item]) -> Result<Arc<dyn SegmentBytes>, ReadError> {
        self.next(store, run).map(|(file, _)| file)
    }

    /// Tells the kernel that a run is soon read.
    fn will_read(&mut self, store: &dyn Blocks, run: &[Item]) -> Result<(), ReadError> {
        let (file, bytes) = self.next(store, run)?;
        file.will_read(u64::from(bytes.start), u64::from(bytes.end - bytes.start));
        Ok(())
    }

    /// The file of a run, and where it lies there without what it shares with the run before.
    fn next(
        &mut self,
        store: &dyn Blocks,
        run: &[Item],
    ) -> Result<(Arc<dyn SegmentBytes>, Range<u32>), ReadError> {
        let (segment, start, _) = run.first().map_or((0, 0, 0), place_of);
        let end = run.last().map_or(0, |item| place_of(item).1);
        let end = end.saturating_add(GROUP_STORED_BYTES_MAX as u32);
        let (file, last_end) = match self.current.take() {
            Some((current, file, last_end)) if current == segment => (file, last_end),
            _ => (store.segment_bytes(segment)?, 0),
        };
        self.current = Some((segment, Arc::clone(&file), end));
        Ok((file, start.max(last_end.min(end))..end))
    }
}

/// A job is over, however it ends.
struct JobEnds<'a>(&'a Shared<'a>);

impl Drop for JobEnds<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The others end, and whoever waits for them: the panic is for who asked for the copy.
            self.0.stop.store(true, Ordering::Relaxed);
            self.0.gather.stop();
        }
        self.0.gather.job_ends();
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
    gather: &'a Gather,
    /// Stretches that can be written.
    complete: Vec<Complete<'a>>,
    /// Bytes that were put together since that was last told.
    gathered_bytes: u64,
}

/// Cuts the bytes at `offset` into runs of blocks that are all zero and runs that are not.
fn split_zeroes(offset: u64, bytes: &[u8], mut visit: impl FnMut(Range<usize>, bool)) {
    let is_zero = |block: &[u8]| *block == ZERO_BLOCK[..block.len()];
    let mut run: Option<(Range<usize>, bool)> = None;
    let mut next = 0;
    while next < bytes.len() {
        let start = next;
        let in_block = ((offset + start as u64) % BLOCK_BYTES) as usize;
        next = bytes.len().min(start + BLOCK_BYTES as usize - in_block);
        let (range, zero) = (start..next, is_zero(&bytes[start..next]));
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
    fn new(store: &'a dyn Blocks, gather: &'a Gather) -> Self {
        Self {
            stored: Vec::new(),
            raw: Vec::new(),
            raw_bytes: 0,
            reading: Reading::new(store),
            told: Vec::new(),
            targets: Vec::new(),
            gathered: Vec::new(),
            zeroes: Vec::new(),
            gather,
            complete: Vec::new(),
            gathered_bytes: 0,
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
        shared.sink.go_on().map_err(|source| CopyError::Write {
            offset: first.offset,
            len: first.len,
            source,
        })?;
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
        self.gathered_bytes += item.len;
        self.gather.take(item.offset, bytes, &mut self.complete, |part| {
            self.gathered_bytes -= part.len() as u64;
            let part_start = part.start;
            split_zeroes(item.offset + part_start as u64, &bytes[part], |range, is_zero| {
                let start = part_start + range.start;
                let (offset, len) = (item.offset + start as u64, range.len());
                if is_zero {
                    self.zeroes.push(offset..offset + len as u64);
                } else {
                    self.targets.push((offset, from + start, len));
                }
            });
        });
    }

    /// Writes what was unpacked, neighbours in one go.
    fn write_out(&mut self, shared: &Shared<'_>) -> Result<(), CopyError> {
        self.reading.finish(&mut self.raw)?;
        for (item, from) in std::mem::take(&mut self.told) {
            self.take(&item, from);
        }
        (shared.progress)(std::mem::take(&mut self.gathered_bytes));
        self.targets.sort_unstable();
        let writing = shared.writing.as_ref().map(Mutex::lock);
        for run in self.targets.chunk_by(|one, next| one.0 + one.2 as u64 == next.0) {
            let (offset, first_start, _) = run[0];
            let bytes: usize = run.iter().map(|(_, _, bytes)| bytes).sum();
            let in_order = run.windows(2).all(|pair| pair[0].1 + pair[0].2 == pair[1].1);
            if in_order {
                shared.write_told(offset, &self.raw[first_start..first_start + bytes])?;
            } else {
                self.gathered.clear();
                for (_, start, bytes) in run {
                    self.gathered.extend_from_slice(&self.raw[*start..start + bytes]);
                }
                shared.write_told(offset, &self.gathered)?;
            }
        }
        drop(writing);
        self.targets.clear();
        self.raw_bytes = 0;
        for stretch in std::mem::take(&mut self.complete) {
            shared.write_stretch(&stretch)?;
        }
        let mut zeroes = std::mem::take(&mut self.zeroes).into_iter();
        zeroes.try_for_each(|range| shared.zero_told(range))
    }
}
