//! Looking for bytes in what was written: frame after frame, on several threads, told in order.
//!
//! A pattern is found within a record, across the blocks and groups that its data lies in, and across records that one
//! write was cut into. Such records follow each other closely, each beginning where one before it ended.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use cdp_journal::ReadError;
use cdp_journal::VolumeId;
use cdp_journal::format::{Body, Origin, PlacedRecord};
use cdp_journal::store::{Archive, FrameRecords, RecordsOf};
use memchr::memmem::Finder;

/// Frames that wait for each thread, and what was found in them.
const FRAMES_AHEAD: usize = 4;
/// Records whose ends are kept, to go on where they ended.
const ENDS_MAX: usize = 64;

/// A place where the pattern was written.
#[derive(Clone, Debug)]
pub(crate) struct Hit {
    /// The record that wrote it; of several, the last.
    pub(crate) record: PlacedRecord,
    /// First byte on the volume.
    pub(crate) offset: u64,
}

/// How much was searched.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Searched {
    pub(crate) records: u64,
    pub(crate) bytes: u64,
}

/// What a search comes by, in the order of the records.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A record that changes bytes at an offset, or (`u64::MAX` bytes) ends the volume there.
    Changed {
        record: PlacedRecord,
        offset: u64,
        len: u64,
    },
    Hit(Hit),
}

/// What is known of a record after its thread has searched it.
struct Scanned {
    record: PlacedRecord,
    offset: u64,
    len: u64,
    /// Where in the record the pattern begins.
    at: Vec<usize>,
    /// Its first and last bytes, one less than the pattern has.
    head: Vec<u8>,
    tail: Vec<u8>,
}

/// The end of a record.
struct End {
    at: u64,
    origin: Origin,
    /// The bytes before it, one less than the pattern has or all that are known.
    tail: Vec<u8>,
}

/// Gives `visit` every place where `pattern` was written to the volume by one of `records`, after every change that a
/// record makes, in order, until it says `false`. `progress` is told of every so many bytes of the log that are done.
pub(crate) fn search(
    store: &dyn Archive,
    volume: VolumeId,
    records: RecordsOf<'_>,
    pattern: &[u8],
    threads: usize,
    progress: &dyn Fn(u64),
    mut visit: impl FnMut(Event) -> Result<bool, ReadError>,
) -> Result<Searched, ReadError> {
    let finder = Finder::new(pattern);
    thread::scope(|scope| {
        let (mut inboxes, mut results) = (Vec::new(), Vec::new());
        for _ in 0..threads.max(1) {
            let (inbox, frames) = sync_channel::<FrameRecords>(FRAMES_AHEAD);
            let (sender, result) = sync_channel(FRAMES_AHEAD);
            let finder = &finder;
            scope.spawn(move || scan_all(store, volume, finder, &frames, &sender));
            inboxes.push(inbox);
            results.push(result);
        }
        // Walks the tables, and ends when nobody listens.
        let walk = scope.spawn(move || {
            for (frame, inbox) in records.zip(inboxes.iter().cycle()) {
                if inbox.send(frame?).is_err() {
                    break;
                }
            }
            Ok(())
        });
        let mut joiner = Joiner {
            pattern_bytes: pattern.len(),
            finder: &finder,
            ends: VecDeque::new(),
            searched: Searched::default(),
        };
        // Frame n is that of thread n modulo their number; the first that has no more is past the end.
        'all: for result in results.iter().cycle() {
            let Ok(scanned) = result.recv() else { break };
            let (frame_bytes, records) = scanned?;
            for scanned in records {
                let changed = Event::Changed {
                    record: scanned.record.clone(),
                    offset: scanned.offset,
                    len: scanned.len,
                };
                let hits = joiner.take(scanned).into_iter().map(Event::Hit);
                for event in std::iter::once(changed).chain(hits) {
                    if !visit(event)? {
                        break 'all;
                    }
                }
            }
            progress(frame_bytes);
        }
        drop(results);
        let walked: Result<(), ReadError> = walk
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        walked.map(|()| joiner.searched)
    })
}

type FrameScan = Result<(u64, Vec<Scanned>), ReadError>;

fn scan_all(
    store: &dyn Archive,
    volume: VolumeId,
    finder: &Finder<'_>,
    frames: &Receiver<FrameRecords>,
    sender: &SyncSender<FrameScan>,
) {
    for frame in frames {
        let scanned =
            scan(store, volume, finder, &frame).map(|found| (frame.header.frame_bytes as u64, found));
        if sender.send(scanned).is_err() {
            return;
        }
    }
}

fn scan(
    store: &dyn Archive,
    volume: VolumeId,
    finder: &Finder<'_>,
    frame: &FrameRecords,
) -> Result<Vec<Scanned>, ReadError> {
    let wanted: Vec<_> = frame
        .records
        .iter()
        .filter(|placed| placed.record.volume == Some(volume))
        .filter_map(|placed| Some((placed, change(&placed.record.body)?)))
        .collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let has_data = wanted
        .iter()
        .any(|(placed, _)| placed.record.body.data_bytes() > 0);
    let data = has_data.then(|| store.frame_data(frame)).transpose()?;
    let keep = finder.needle().len() - 1;
    let scanned = wanted.into_iter().map(|(placed, (offset, len))| {
        let bytes = match &data {
            Some(data) if placed.record.body.data_bytes() > 0 => frame.data_of(placed, data),
            _ => Cow::default(),
        };
        Scanned {
            record: placed.clone(),
            offset,
            len,
            at: finder.find_iter(&bytes).collect(),
            head: bytes[..keep.min(bytes.len())].to_vec(),
            tail: bytes[bytes.len() - keep.min(bytes.len())..].to_vec(),
        }
    });
    Ok(scanned.collect())
}

/// Which bytes a record changes, if any: offset and length.
fn change(body: &Body) -> Option<(u64, u64)> {
    match *body {
        Body::Write { offset, len }
        | Body::Zero { offset, len }
        | Body::Discard { offset, len }
        | Body::ReadBack { offset, len, .. }
        | Body::ReadBackZero { offset, len, .. } => Some((offset, len)),
        Body::Resize { bytes } => Some((bytes, u64::MAX)),
        _ => None,
    }
}

/// Puts together what was cut apart.
struct Joiner<'a> {
    pattern_bytes: usize,
    finder: &'a Finder<'a>,
    ends: VecDeque<End>,
    searched: Searched,
}

impl Joiner<'_> {
    /// The hits that end in a record.
    fn take(&mut self, scanned: Scanned) -> Vec<Hit> {
        if scanned.record.record.body.data_bytes() == 0 {
            return Vec::new();
        }
        self.searched.records += 1;
        self.searched.bytes += scanned.len;
        let origin = scanned.record.record.origin;
        let before = self
            .ends
            .iter()
            .rposition(|end| end.at == scanned.offset && end.origin == origin);
        let before = before
            .and_then(|index| self.ends.remove(index))
            .map_or_else(Vec::new, |end| end.tail);
        let hit = |offset| Hit {
            record: scanned.record.clone(),
            offset,
        };
        // Over the border: at most one byte less than the pattern on either side.
        let joined = [&before[..], &scanned.head].concat();
        let begins = scanned.offset - before.len() as u64;
        let mut hits: Vec<Hit> = self
            .finder
            .find_iter(&joined)
            .filter(|at| *at < before.len() && at + self.pattern_bytes > before.len())
            .map(|at| hit(begins + at as u64))
            .collect();
        hits.extend(scanned.at.iter().map(|at| hit(scanned.offset + *at as u64)));
        let mut tail = [&before[..], &scanned.tail].concat();
        if scanned.tail.len() as u64 == scanned.len {
            // A record shorter than the pattern: what lies before it counts as well.
            let keep = (self.pattern_bytes - 1).min(tail.len());
            tail.drain(..tail.len() - keep);
        } else {
            tail = scanned.tail;
        }
        if self.ends.len() >= ENDS_MAX {
            self.ends.pop_front();
        }
        self.ends.push_back(End {
            at: scanned.offset + scanned.len,
            origin,
            tail,
        });
        hits
    }
}
