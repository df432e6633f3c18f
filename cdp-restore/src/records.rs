//! The records between two moments, read from the tables of the log's frames. Data is not touched.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cdp_journal::format::{Frame, FrameHeader, PlacedRecord};
use cdp_journal::{ReadError, SegmentId, Seq};

/// Where a store keeps its segments.
const LOG_FOLDER: &str = "log";
/// A segment's header; see the tables in `cdp_journal::format`.
const SEGMENT_HEADER_BYTES: u64 = 64;
/// What lies before each frame of a segment.
const ENVELOPE_BYTES: u64 = 32;

/// Hands out the records `after < seq <= until`, in order. All of them must be in the log already.
pub(crate) fn between(
    store: &Path,
    after: Seq,
    until: Seq,
    each: &mut dyn FnMut(&PlacedRecord),
) -> Result<(), ReadError> {
    let segments = segments_from(&store.join(LOG_FOLDER), after.next())?;
    let mut next = after.next();
    for (_, path) in segments {
        if next > until {
            break;
        }
        next = segment_records(&path, next, until, each)?;
    }
    Ok(())
}

/// The segments that hold `first` or anything later, in order.
fn segments_from(log: &Path, first: Seq) -> Result<Vec<(SegmentId, PathBuf)>, ReadError> {
    let io = |source| ReadError::Io {
        path: log.to_owned(),
        source,
    };
    let mut segments = Vec::new();
    for entry in fs::read_dir(log).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        segments.extend(name.and_then(SegmentId::from_file_name).map(|id| (id, path)));
    }
    segments.sort_by_key(|(id, _)| *id);
    let earlier = segments.partition_point(|(id, _)| id.0 <= first);
    Ok(segments.split_off(earlier.saturating_sub(1)))
}

/// Hands out what a segment holds from `next` to `until`; returns the first Seq that it does not hold.
fn segment_records(
    path: &Path,
    next: Seq,
    until: Seq,
    each: &mut dyn FnMut(&PlacedRecord),
) -> Result<Seq, ReadError> {
    let io = |source| ReadError::Io {
        path: path.to_owned(),
        source,
    };
    let damaged = |offset, what: String| ReadError::Damaged {
        path: path.to_owned(),
        offset,
        what,
        seqs: None,
    };
    let file = File::open(path).map_err(io)?;
    let end = file.metadata().map_err(io)?.len();
    let (mut at, mut next) = (SEGMENT_HEADER_BYTES + ENVELOPE_BYTES, next);
    while at < end && next <= until {
        let bytes = read(&file, at, FrameHeader::BYTES).map_err(io)?;
        let header = FrameHeader::decode(&bytes).map_err(|error| damaged(at, error.to_string()))?;
        if header.last_seq() >= next {
            let bytes = read(&file, at, header.prefix_bytes()).map_err(io)?;
            let frame = Frame::parse(&bytes).map_err(|error| damaged(at, error.to_string()))?;
            let wanted = |placed: &&PlacedRecord| (next..=until).contains(&placed.record.seq);
            frame.records.iter().filter(wanted).for_each(&mut *each);
            next = header.last_seq().next();
        }
        at += header.frame_bytes as u64 + ENVELOPE_BYTES;
    }
    Ok(next)
}

fn read(file: &File, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; bytes];
    file.read_exact_at(&mut buffer, at)?;
    Ok(buffer)
}
