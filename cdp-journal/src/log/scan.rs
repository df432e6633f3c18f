//! Reading frames out of segments: for recovery, for readers, for verification.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use uuid::Uuid;

use super::FrameLocation;
use super::disk::{Disk, DiskFile};
use crate::error::{OpenError, ReadError};
use crate::format::{
    ENVELOPE_BYTES, Envelope, FORMAT, Frame, FrameError, FrameHeader, SEGMENT_HEADER_BYTES, SegmentHeader,
    SegmentHeaderError,
};
use crate::types::{SegmentId, Seq};

/// First read of a frame: usually enough for its header and table.
const PROBE_BYTES: usize = 4096;
const RESYNC_CHUNK_BYTES: usize = 1 << 20;

const _: () = assert!(PROBE_BYTES >= ENVELOPE_BYTES + FrameHeader::BYTES);

/// How much of a frame to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Header and record table.
    Table,
    /// Its data as well.
    Data,
}

/// What lies at a place in a segment.
#[derive(Debug)]
pub(crate) enum Found {
    /// Nothing: the file ends here.
    End,
    /// A frame. With [`Depth::Data`], `bad_data` tells what is wrong with its data.
    Frame(Box<FoundFrame>),
    /// Something else, or a frame whose header or table is bad.
    Bad(String),
}

/// A frame that was read.
#[derive(Debug)]
pub(crate) struct FoundFrame {
    pub(crate) envelope: Envelope,
    pub(crate) frame: Frame,
    pub(crate) location: FrameLocation,
    pub(crate) bad_data: Option<String>,
    /// Where the next one begins.
    pub(crate) end: u64,
}

/// An open segment.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) id: SegmentId,
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<dyn DiskFile>,
}

/// What the header of a segment says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum HeaderState {
    Good,
    /// Short, or its checksum fails, and no frame follows: the making of the segment is not finished, or was
    /// interrupted. Frames are appended only once the header is durable.
    Unmade,
    /// The same with frames behind it: damaged.
    Bad,
    TooNew(u32),
    /// It belongs to another store, or under another name.
    Stranger,
}

impl Segment {
    pub(crate) fn open(disk: &dyn Disk, id: SegmentId) -> io::Result<Self> {
        let name = id.file_name();
        Ok(Self {
            id,
            path: disk.path(&name),
            file: Arc::from(disk.open(&name)?),
        })
    }

    pub(crate) fn header(&self, store: Uuid) -> io::Result<HeaderState> {
        let header = self.header_itself(store)?;
        if header != HeaderState::Bad {
            return Ok(header);
        }
        if self.resync(0)?.is_none() {
            return Ok(HeaderState::Unmade);
        }
        // The writer may have made it and gone on while we looked.
        self.header_itself(store)
    }

    fn header_itself(&self, store: Uuid) -> io::Result<HeaderState> {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        let filled = self.file.read_at(0, &mut bytes)?;
        Ok(match SegmentHeader::decode(&bytes[..filled]) {
            Ok(header) if header.store == store && header.first_seq == self.id.0 => HeaderState::Good,
            Ok(_) => HeaderState::Stranger,
            Err(SegmentHeaderError::Bad) => HeaderState::Bad,
            Err(SegmentHeaderError::TooNew(format)) => HeaderState::TooNew(format),
        })
    }

    /// Was it made by a build that knew no format as new as [`FORMAT`]? What is newer does not belong in it: that build
    /// would have refused it by its header.
    pub(crate) fn is_of_older_format(&self) -> io::Result<bool> {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        let filled = self.file.read_at(0, &mut bytes)?;
        Ok(SegmentHeader::format(&bytes[..filled]).is_some_and(|format| format < FORMAT))
    }

    /// Reads the frame whose envelope begins at `at`. A frame of a newer format than this build knows is an error: it is
    /// neither damaged nor torn.
    pub(crate) fn read(&self, at: u64, depth: Depth) -> io::Result<Found> {
        let mut bytes = vec![0; PROBE_BYTES];
        let filled = self.file.read_at(at, &mut bytes)?;
        bytes.truncate(filled);
        if bytes.is_empty() {
            return Ok(Found::End);
        }
        let Some(envelope) = Envelope::decode(&bytes) else {
            return Ok(Found::Bad("no envelope of a frame".to_owned()));
        };
        let header = match FrameHeader::decode(&bytes[ENVELOPE_BYTES..]) {
            Ok(header) => header,
            Err(FrameError::TooNew(found)) => return Err(newer_frame(at, found)),
            Err(error) => return Ok(Found::Bad(error.to_string())),
        };
        if header.frame_bytes as u64 != envelope.frame_bytes || header.first_seq != envelope.first_seq {
            return Ok(Found::Bad("an envelope of another frame".to_owned()));
        }
        let needed = ENVELOPE_BYTES
            + if depth == Depth::Data {
                header.frame_bytes
            } else {
                header.prefix_bytes()
            };
        let end = at + ENVELOPE_BYTES as u64 + envelope.frame_bytes;
        if bytes.len() < needed {
            let have = bytes.len();
            bytes.resize(needed, 0);
            let filled = self.file.read_at(at + have as u64, &mut bytes[have..])?;
            bytes.truncate(have + filled);
        }
        if depth == Depth::Table && self.file.len()? < end {
            return Ok(Found::Bad("cut short".to_owned()));
        }
        let bytes = &bytes[ENVELOPE_BYTES..];
        let frame = match Frame::parse(bytes) {
            Ok(frame) => frame,
            Err(error) => return Ok(Found::Bad(error.to_string())),
        };
        let bad_data = match depth {
            Depth::Table => None,
            Depth::Data => frame.check_groups(bytes).err().map(|error| error.to_string()),
        };
        let location = FrameLocation {
            segment: self.id,
            offset: at + ENVELOPE_BYTES as u64,
        };
        Ok(Found::Frame(Box::new(FoundFrame {
            envelope,
            frame,
            location,
            bad_data,
            end,
        })))
    }

    /// The next place after `at` where a frame with a good header and table begins.
    pub(crate) fn resync(&self, at: u64) -> io::Result<Option<u64>> {
        let mut chunk = vec![0; RESYNC_CHUNK_BYTES + ENVELOPE_BYTES];
        let mut chunk_at = at + 8;
        loop {
            let filled = self.file.read_at(chunk_at, &mut chunk)?;
            if filled < ENVELOPE_BYTES {
                return Ok(None);
            }
            let starts = (0..=filled - ENVELOPE_BYTES)
                .step_by(8)
                .take_while(|start| *start < RESYNC_CHUNK_BYTES);
            for start in starts {
                let is_envelope = Envelope::decode(&chunk[start..]).is_some();
                if is_envelope && matches!(self.read(chunk_at + start as u64, Depth::Table)?, Found::Frame(_))
                {
                    return Ok(Some(chunk_at + start as u64));
                }
            }
            chunk_at += RESYNC_CHUNK_BYTES as u64;
        }
    }

    /// The envelope at `at`, whatever follows it. It was written after what it vouches for, so it counts even where
    /// its own frame is torn.
    pub(crate) fn envelope(&self, at: u64) -> io::Result<Option<Envelope>> {
        let mut bytes = [0; ENVELOPE_BYTES];
        let filled = self.file.read_at(at, &mut bytes)?;
        Ok(Envelope::decode(&bytes[..filled]))
    }

    /// Does anything from `at` on, where an envelope should be, say that `seq` had been durable?
    pub(crate) fn later_frame_vouches_for(&self, seq: Seq, at: u64) -> io::Result<bool> {
        let mut at = at;
        loop {
            while let Some(envelope) = self.envelope(at)? {
                if envelope.durable >= Some(seq) {
                    return Ok(true);
                }
                at += ENVELOPE_BYTES as u64 + envelope.frame_bytes;
            }
            match self.resync(at)? {
                Some(found_at) => at = found_at,
                None => return Ok(false),
            }
        }
    }
}

fn newer_frame(at: u64, found: u32) -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        format!(
            "the frame at byte {at} is of format {found}, and this program reads up to {FORMAT}: use a newer one"
        ),
    )
}

/// The segments of a folder, in order.
pub(crate) fn segments(disk: &dyn Disk) -> io::Result<Vec<SegmentId>> {
    let mut ids: Vec<_> = disk
        .list()?
        .iter()
        .filter_map(|name| SegmentId::from_file_name(name))
        .collect();
    ids.sort_unstable();
    Ok(ids)
}

/// Follows a log that may still be written to.
#[derive(Debug)]
pub(crate) struct Tail {
    store: Uuid,
    /// Where to go on; `None` until the first segment was seen.
    at: Option<(SegmentId, u64)>,
    last: Option<Seq>,
    /// Records up to here are known to have been durable: if their data is bad, it is damaged, not torn.
    vouched: Option<Seq>,
}

impl Tail {
    /// Goes on after the frame that ends at `end` in `segment` with record `last`.
    pub(crate) fn after(store: Uuid, segment: SegmentId, end: u64, last: Seq) -> Self {
        Self {
            store,
            at: Some((segment, end)),
            last: Some(last),
            vouched: Some(last),
        }
    }

    pub(crate) fn from_start(store: Uuid) -> Self {
        Self {
            store,
            at: None,
            last: None,
            vouched: None,
        }
    }

    /// Takes everything up to `seq` for durable, whether or not the log says so.
    pub(crate) fn vouched_until(mut self, seq: Option<Seq>) -> Self {
        self.vouched = self.vouched.max(seq);
        self
    }

    /// Visits every whole frame there is. One that is torn and that nobody vouches for is just not there yet, and
    /// neither is what follows it.
    pub(crate) fn follow<E: From<ReadError>>(
        &mut self,
        disk: &dyn Disk,
        mut visit: impl FnMut(&FoundFrame) -> Result<(), E>,
    ) -> Result<(), E> {
        // Listed before anything is read: what is durable by now lies in one of these.
        let ids = segments(disk).map_err(ReadError::io(disk.path("")))?;
        let mut at = match (self.at, ids.first()) {
            (Some(at), _) => at,
            (None, Some(id)) => (*id, 0),
            (None, None) => return Ok(()),
        };
        loop {
            let io = |source| ReadError::Io {
                path: disk.path(&at.0.file_name()),
                source,
            };
            let next = ids.iter().copied().find(|id| *id > at.0);
            let segment = Segment::open(disk, at.0).map_err(io)?;
            if at.1 == 0 {
                match segment.header(self.store).map_err(io)? {
                    HeaderState::Good => at.1 = SEGMENT_HEADER_BYTES as u64,
                    // The newest segment is being made just now.
                    HeaderState::Unmade if next.is_none() => return Ok(()),
                    state => return Err(header_error(&segment, &state).into()),
                }
            }
            self.at = Some(at);
            self.follow_segment(&segment, next.is_some(), &mut visit)?;
            match next {
                Some(next) => at = (next, 0),
                None => return Ok(()),
            }
        }
    }

    /// A segment is durable, all of it, before the next one is made: then it `is_finished`.
    fn follow_segment<E: From<ReadError>>(
        &mut self,
        segment: &Segment,
        is_finished: bool,
        visit: &mut impl FnMut(&FoundFrame) -> Result<(), E>,
    ) -> Result<(), E> {
        let io = |source| ReadError::Io {
            path: segment.path.clone(),
            source,
        };
        let mut scout = self.at.map_or(SEGMENT_HEADER_BYTES as u64, |(_, at)| at);
        loop {
            let at = self.at.map_or(SEGMENT_HEADER_BYTES as u64, |(_, at)| at);
            let expected = Seq::after(self.last);
            match segment.read(at, Depth::Table).map_err(io)? {
                Found::End => return Ok(()),
                Found::Frame(found) if found.frame.header.first_seq >= expected => {
                    let last = found.frame.header.last_seq();
                    if !is_finished {
                        self.scout(segment, &mut scout, last).map_err(io)?;
                        if self.vouched < Some(last) && !is_real(segment, at, &found).map_err(io)? {
                            return Ok(());
                        }
                    }
                    visit(&found)?;
                    self.at = Some((segment.id, found.end));
                    self.last = Some(last);
                }
                Found::Frame(_) => {
                    return Err(damage(segment, at, format!("goes back behind seq {expected}")).into());
                }
                Found::Bad(_) => {
                    let is_vouched = is_finished
                        || self.vouched >= Some(expected)
                        || segment.later_frame_vouches_for(expected, at).map_err(io)?;
                    // Read again: the writer may have finished this frame before it wrote the one that vouches.
                    let still_bad = match segment.read(at, Depth::Table).map_err(io)? {
                        Found::Bad(what) => what,
                        _ => continue,
                    };
                    if !is_vouched {
                        return Ok(());
                    }
                    return Err(damage(segment, at, still_bad).into());
                }
            }
        }
    }

    /// Goes ahead from envelope to envelope until one vouches for `seq`, or the log ends.
    fn scout(&mut self, segment: &Segment, scout: &mut u64, seq: Seq) -> io::Result<()> {
        while self.vouched < Some(seq) {
            let Some(envelope) = segment.envelope(*scout)? else {
                break;
            };
            self.vouched = self.vouched.max(envelope.durable);
            *scout += ENVELOPE_BYTES as u64 + envelope.frame_bytes;
        }
        Ok(())
    }
}

/// Is the frame at `at`, that no envelope in the row after it vouches for, more than the torn end of an append?
fn is_real(segment: &Segment, at: u64, found: &FoundFrame) -> io::Result<bool> {
    match segment.read(at, Depth::Data)? {
        Found::Frame(whole) if whole.bad_data.is_none() && whole.frame.header == found.frame.header => {
            Ok(true)
        }
        _ => segment.later_frame_vouches_for(found.frame.header.last_seq(), found.end),
    }
}

fn damage(segment: &Segment, offset: u64, what: String) -> ReadError {
    ReadError::Damaged {
        path: segment.path.clone(),
        offset,
        what,
        seqs: None,
    }
}

/// What a segment's header that is not [`HeaderState::Good`] keeps from being read.
pub(crate) fn header_error(segment: &Segment, state: &HeaderState) -> ReadError {
    match state {
        HeaderState::TooNew(found) => ReadError::TooNew {
            path: segment.path.clone(),
            found: *found,
            newest: FORMAT,
        },
        HeaderState::Stranger => damage(
            segment,
            0,
            "a segment of another store or another name".to_owned(),
        ),
        _ => damage(segment, 0, "bad segment header".to_owned()),
    }
}

/// Damage met while opening, as an error of opening.
pub(crate) fn open_error(error: ReadError, last_good: Option<Seq>) -> OpenError {
    match error {
        ReadError::Damaged {
            path, offset, what, ..
        } => OpenError::Corrupt {
            path,
            offset,
            what,
            last_good,
        },
        ReadError::TooNew { path, found, newest } => OpenError::TooNew { path, found, newest },
        ReadError::Io { path, source } => OpenError::Io {
            action: "read",
            path,
            source,
        },
        ReadError::Index(error) => OpenError::Index(error),
        other => OpenError::BadStoreFile {
            path: PathBuf::new(),
            reason: other.to_string(),
        },
    }
}
