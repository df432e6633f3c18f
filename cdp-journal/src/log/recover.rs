//! What opening a log for writing finds, and does.
//!
//! | # | where                               | found                                   | case        | done                                     |
//! |--:|-------------------------------------|-----------------------------------------|-------------|------------------------------------------|
//! | 1 | no segment                          |                                         | new         | starts at the Seq after the index's last |
//! | 2 | newest segment                      | short or bad header, no frame; or the   | torn birth  | removed, the one before is the newest    |
//! |   |                                     | header of an older format, no frame     |             |                                          |
//! | 3 | newest segment                      | short or bad frame, never durable       | torn tail   | cut to the last good frame               |
//! | 4 | newest segment                      | bad header or table of a durable frame, | corrupt     | stop, name it, cut nothing               |
//! |   |                                     | or header of a segment with frames      |             |                                          |
//! | 5 | newest segment                      | bad data of a durable frame             | damaged     | kept, named; reads of that data fail     |
//! | 6 | newest segment                      | Seq is not the last + 1, but later      | hole        | both sides kept; a gap `log-hole`        |
//! | 7 | newest segment                      | Seq goes back                           | corrupt     | stop                                     |
//! | 8 | newest segment                      | another store's, or it or a frame of it | stranger    | stop, cut nothing                        |
//! |   |                                     | of a newer format                       |             |                                          |
//! | 9 | newest segment ends early           | the index knows later durable records   | lost        | goes on after them; a gap `log-hole`     |
//!
//! "Durable" is what a later envelope or the index vouches for. The newest segment alone is read, in full:
//! earlier ones were synced before their successor was made. Their damage is found where they are read.

use uuid::Uuid;

use super::disk::Disk;
use super::scan::{Depth, Found, FoundFrame, HeaderState, Segment, segments};
use crate::error::OpenError;
use crate::format::{ENVELOPE_BYTES, FORMAT, SEGMENT_HEADER_BYTES};
use crate::store::Cut;
use crate::types::Seq;
use crate::verify::Damage;

/// A log as recovery left it.
#[derive(Debug)]
pub(crate) struct LogState {
    /// Last record; everything up to it is durable.
    pub(crate) last: Option<Seq>,
    /// The segment to append to, and where.
    pub(crate) newest: Option<(Segment, u64)>,
    pub(crate) cut: Option<Cut>,
    pub(crate) damages: Vec<Damage>,
    /// The log ends before records that the index knows to have been durable: case 9.
    pub(crate) lost_after: Option<Option<Seq>>,
}

/// Recovers a log. `indexed` is the last record that the index vouches for.
pub(crate) fn recover(disk: &dyn Disk, store: Uuid, indexed: Option<Seq>) -> Result<LogState, OpenError> {
    let mut cut = None;
    loop {
        let ids = segments(disk).map_err(OpenError::io("list", disk.path("")))?;
        let Some(id) = ids.last().copied() else {
            let lost_after = indexed.map(|_| None);
            return Ok(LogState {
                last: indexed,
                newest: None,
                cut,
                damages: Vec::new(),
                lost_after,
            });
        };
        let path = disk.path(&id.file_name());
        let segment = Segment::open(disk, id).map_err(OpenError::io("open", &path))?;
        let corrupt = |what: &str| OpenError::Corrupt {
            path: path.clone(),
            offset: 0,
            what: what.to_owned(),
            last_good: id.0.prev(),
        };
        let remove = || {
            disk.remove(&id.file_name())
                .map_err(OpenError::io("remove", &path))?;
            disk.sync_names().map_err(OpenError::io("sync", disk.path("")))
        };
        match segment.header(store).map_err(OpenError::io("read", &path))? {
            HeaderState::Good => {
                // Who made it may have been killed before its name was durable.
                disk.sync_names().map_err(OpenError::io("sync", disk.path("")))?;
                let is_older = segment
                    .is_of_older_format()
                    .map_err(OpenError::io("read", &path))?;
                let state = recover_newest(segment, indexed, cut.take())?;
                let is_empty = |(_, end): &(Segment, u64)| *end == SEGMENT_HEADER_BYTES as u64;
                let is_named_as_the_next =
                    indexed < Some(id.0) && state.newest.as_ref().is_some_and(is_empty);
                if !(is_older && is_named_as_the_next) {
                    return Ok(state);
                }
                // The next one has its name, and another header.
                remove()?;
                tracing::info!(path = %path.display(), "removed an empty segment of an older format");
                cut = state.cut;
            }
            HeaderState::TooNew(found) => {
                return Err(OpenError::TooNew {
                    path,
                    found,
                    newest: FORMAT,
                });
            }
            HeaderState::Stranger => return Err(corrupt("a segment of another store or another name")),
            HeaderState::Bad => return Err(corrupt("bad segment header")),
            HeaderState::Unmade if indexed >= Some(id.0) => return Err(corrupt("bad segment header")),
            HeaderState::Unmade => {
                let bytes = segment.file.len().map_err(OpenError::io("read", &path))?;
                remove()?;
                tracing::info!(path = %path.display(), bytes, "removed a segment whose making was interrupted");
                cut = Some(Cut {
                    path,
                    offset: 0,
                    bytes,
                });
            }
        }
    }
}

fn recover_newest(segment: Segment, indexed: Option<Seq>, cut: Option<Cut>) -> Result<LogState, OpenError> {
    let path = segment.path.clone();
    let mut state = LogState {
        last: segment.id.0.prev(),
        newest: None,
        cut,
        damages: Vec::new(),
        lost_after: None,
    };
    let mut at = SEGMENT_HEADER_BYTES as u64;
    let mut vouched = indexed;
    let mut unsure: Vec<BadData> = Vec::new();
    let corrupt = |offset: u64, what: String, last_good: Option<Seq>| OpenError::Corrupt {
        path: path.clone(),
        offset,
        what,
        last_good,
    };
    let what = loop {
        let expected = Seq::after(state.last);
        match segment
            .read(at, Depth::Data)
            .map_err(OpenError::io("read", &path))?
        {
            Found::End => break None,
            Found::Bad(what) => {
                // Torn or not, it was begun after the frames that its envelope vouches for.
                let envelope = segment.envelope(at).map_err(OpenError::io("read", &path))?;
                vouched = vouched.max(envelope.and_then(|envelope| envelope.durable));
                break Some(what);
            }
            Found::Frame(found) if found.frame.header.first_seq < expected => {
                return Err(corrupt(
                    at,
                    format!("goes back behind seq {expected}"),
                    state.last,
                ));
            }
            Found::Frame(found) => {
                vouched = vouched.max(found.envelope.durable);
                if let Some(bad) = BadData::of(&found, at, state.last) {
                    unsure.push(bad);
                }
                state.last = Some(found.frame.header.last_seq());
                at = found.end;
            }
        }
    };
    if let Some(what) = what {
        let expected = Seq::after(state.last);
        let later = || {
            segment
                .later_frame_vouches_for(expected, at)
                .map_err(OpenError::io("read", &path))
        };
        if vouched >= Some(expected) || later()? {
            return Err(corrupt(at, what, state.last));
        }
    }
    // Data that nobody vouches for never was durable: the log ends before it.
    for bad in unsure {
        if vouched >= Some(bad.last_seq) {
            state.damages.push(bad.damage(&segment));
        } else {
            (at, state.last) = (bad.at, bad.before);
            break;
        }
    }
    let len = segment.file.len().map_err(OpenError::io("read", &path))?;
    if len > at {
        segment.file.set_len(at).map_err(OpenError::io("cut", &path))?;
        tracing::info!(path = %path.display(), offset = at, bytes = len - at, "cut an append that was interrupted");
        state.cut = Some(Cut {
            path: path.clone(),
            offset: at,
            bytes: len - at,
        });
    }
    // What was found good may still be in the cache only.
    segment.file.sync().map_err(OpenError::io("sync", &path))?;
    if indexed > state.last {
        tracing::warn!(path = %path.display(), ?indexed, last = ?state.last, "the log ends before what had been durable");
        state.lost_after = Some(state.last);
        state.last = indexed;
    }
    state.newest = Some((segment, at));
    Ok(state)
}

struct BadData {
    at: u64,
    end: u64,
    first_seq: Seq,
    last_seq: Seq,
    before: Option<Seq>,
    what: String,
}

impl BadData {
    fn of(found: &FoundFrame, at: u64, before: Option<Seq>) -> Option<Self> {
        let what = found.bad_data.clone()?;
        let header = &found.frame.header;
        Some(Self {
            at,
            end: found.end,
            first_seq: header.first_seq,
            last_seq: header.last_seq(),
            before,
            what,
        })
    }

    fn damage(self, segment: &Segment) -> Damage {
        Damage {
            path: segment.path.clone(),
            offset: self.at + ENVELOPE_BYTES as u64,
            bytes: self.end - self.at - ENVELOPE_BYTES as u64,
            seqs: Some((self.first_seq, self.last_seq)),
            what: self.what,
        }
    }
}
