//! Reading everything to see whether it is good.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::ReadError;
use crate::format::SEGMENT_HEADER_BYTES;
use crate::log::{Depth, Disk, Found, FoundFrame, HeaderState, Segment, header_error, segments};
use crate::types::Seq;

/// A stretch of the log that does not match its checksums.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// The segment.
    pub path: PathBuf,
    /// Where in it the damage begins.
    pub offset: u64,
    /// How far the damage reaches at most.
    pub bytes: u64,
    /// Records affected, where known.
    pub seqs: Option<(Seq, Seq)>,
    /// What failed.
    pub what: String,
}

/// What reading the whole log found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Files of the log.
    pub segments: u64,
    /// Frames that were good.
    pub frames: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What was not good.
    pub damages: Vec<Damage>,
}

/// Reads every frame of the log. Records up to `vouched` are known to have been durable, and so are those that an
/// envelope vouches for; the log ends where a frame is bad that nobody vouches for. `deltas` says what is wrong with the
/// deltas of a frame that is good by itself.
pub(crate) fn verify_log(
    disk: &dyn Disk,
    store: Uuid,
    vouched: Option<Seq>,
    deltas: &dyn Fn(&FoundFrame) -> Option<String>,
    progress: &mut dyn FnMut(u64),
) -> Result<VerifyReport, ReadError> {
    let mut report = VerifyReport::default();
    let ids = segments(disk).map_err(ReadError::io(disk.path("")))?;
    let (mut next, mut last_path, mut last_bytes) = (Seq::FIRST, disk.path(""), 0);
    for (index, id) in ids.iter().enumerate() {
        let path = disk.path(&id.file_name());
        let segment = Segment::open(disk, *id).map_err(ReadError::io(&path))?;
        let vouched = if index + 1 == ids.len() {
            vouched
        } else {
            Some(id.0.plus(u64::MAX))
        };
        let header = segment.header(store).map_err(ReadError::io(&path))?;
        if matches!(header, HeaderState::TooNew(_)) {
            return Err(header_error(&segment, &header));
        }
        next = verify_segment(&segment, &header, vouched, deltas, &mut report, progress)
            .map_err(ReadError::io(&path))?;
        last_bytes = segment.file.len().map_err(ReadError::io(&path))?;
        last_path = path;
        report.segments += 1;
    }
    // What is missing at the end has no bytes that could be bad.
    if let Some(last) = vouched.filter(|last| *last >= next && report.damages.is_empty()) {
        report.damages.push(Damage {
            path: last_path,
            offset: last_bytes,
            bytes: 0,
            seqs: Some((next, last)),
            what: "the log ends here, and the index knows of later records".to_owned(),
        });
    }
    Ok(report)
}

/// Reads one segment; the record that comes after it.
fn verify_segment(
    segment: &Segment,
    header: &HeaderState,
    vouched: Option<Seq>,
    deltas: &dyn Fn(&FoundFrame) -> Option<String>,
    report: &mut VerifyReport,
    progress: &mut dyn FnMut(u64),
) -> io::Result<Seq> {
    if *header == HeaderState::Unmade && vouched < Some(segment.id.0) {
        return Ok(segment.id.0);
    }
    if *header != HeaderState::Good {
        report.damages.push(Damage {
            path: segment.path.clone(),
            offset: 0,
            bytes: SEGMENT_HEADER_BYTES as u64,
            seqs: None,
            what: "bad segment header".to_owned(),
        });
    }
    let mut at = SEGMENT_HEADER_BYTES as u64;
    report.bytes += at;
    let mut expected = segment.id.0;
    let mut vouched = vouched;
    loop {
        match segment.read(at, Depth::Data)? {
            Found::End => return Ok(expected),
            Found::Frame(found) => {
                let header = &found.frame.header;
                vouched = vouched.max(found.envelope.durable);
                if found.bad_data.is_some() && vouched < Some(header.last_seq()) {
                    if !segment.later_frame_vouches_for(header.last_seq(), found.end)? {
                        // An append in progress, or one that a kill or a power loss cut short.
                        return Ok(expected);
                    }
                    // The writer may have finished it while we looked.
                    vouched = Some(header.last_seq());
                    continue;
                }
                report.bytes += found.end - at;
                progress(found.end - at);
                expected = header.last_seq().next();
                let bad = found.bad_data.clone().or_else(|| deltas(&found));
                match bad {
                    None => {
                        report.frames += 1;
                        report.records += header.record_count as u64;
                    }
                    Some(what) => report.damages.push(Damage {
                        path: segment.path.clone(),
                        offset: found.location.offset,
                        bytes: header.frame_bytes as u64,
                        seqs: Some((header.first_seq, header.last_seq())),
                        what,
                    }),
                }
                at = found.end;
            }
            Found::Bad(what) => {
                // An append in progress, or a torn one, unless somebody vouches for it.
                if vouched < Some(expected) && !segment.later_frame_vouches_for(expected, at)? {
                    return Ok(expected);
                }
                let next = segment.resync(at)?;
                // The writer may have finished it while we looked.
                if !matches!(segment.read(at, Depth::Data)?, Found::Bad(_)) {
                    continue;
                }
                let end = match next {
                    Some(next) => next,
                    None => segment.file.len()?,
                };
                let next_seq = match next.map(|next| segment.read(next, Depth::Table)).transpose()? {
                    Some(Found::Frame(found)) => found.frame.header.first_seq.prev(),
                    _ => None,
                };
                report.damages.push(Damage {
                    path: segment.path.clone(),
                    offset: at,
                    bytes: end - at,
                    seqs: next_seq
                        .filter(|last| *last >= expected)
                        .map(|last| (expected, last)),
                    what,
                });
                progress(end - at);
                at = end;
            }
        }
    }
}
