//! Reading the frames of a log in order, beside its writer.

use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{OpenError, ReadError};
use crate::format::{Frame, FrameHeader, SEGMENT_HEADER_BYTES};
use crate::log::{Depth, Disk, Found, FrameLocation, HeaderState, RealDisk, Segment, header_error, segments};
use crate::store::{self, LOG_DIR};
use crate::types::{BootNs, SegmentId, Seq, WallNs};
use crate::wire::FrameId;

/// A frame as it lies in the log.
#[derive(Clone, Debug)]
pub struct TailFrame {
    /// The last record before it in this log.
    pub previous: Option<Seq>,
    /// Its last record.
    pub last: Seq,
    /// Time of its oldest record.
    pub wall: WallNs,
    /// All of it.
    pub bytes: Vec<u8>,
    /// Where it lies.
    pub location: FrameLocation,
}

impl TailFrame {
    /// Where the next one begins, in the same segment.
    pub fn end(&self) -> (u64, u64) {
        (
            self.location.segment.0.get(),
            self.location.offset + self.bytes.len() as u64,
        )
    }
}

/// A log cannot be followed from where that was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TailError {
    /// The log could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The two ends do not have the same history.
    #[error(
        "the history there is not that of this store: it holds seq {} to {}, and this store {found}; \
         it is kept as it is, start with a new --store to begin another",
        .held.first, .held.last
    )]
    Diverged {
        /// The other end's last frame.
        held: FrameId,
        /// What is here in its place.
        found: String,
    },
}

/// Reads frames one by one. Opens files for reading only.
#[derive(Debug)]
pub struct LogTail {
    disk: RealDisk,
    store: Uuid,
    /// Where the next frame begins; `None`: at the begin of the log.
    at: Option<(Segment, u64)>,
    last: Option<Seq>,
}

impl LogTail {
    /// At the begin of the log of the store in `dir`.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let identity = store::identity(dir)?.ok_or_else(|| OpenError::NotAStore { path: dir.to_owned() })?;
        Ok(Self {
            disk: RealDisk::read_only(&dir.join(LOG_DIR)),
            store: identity.uuid,
            at: None,
            last: None,
        })
    }

    /// The store's id.
    pub fn store(&self) -> Uuid {
        self.store
    }

    /// Where the next frame begins: its segment and the place in it.
    pub fn position(&self) -> Option<(u64, u64)> {
        self.at.as_ref().map(|(segment, at)| (segment.id.0.get(), *at))
    }

    /// Goes on after the frame that the other end holds last, if this log has that very frame among those up to
    /// `durable`.
    pub fn skip_to(&mut self, held: Option<&FrameId>, durable: Option<Seq>) -> Result<(), TailError> {
        (self.at, self.last) = (None, None);
        let Some(held) = held else { return Ok(()) };
        let diverged = |found: String| TailError::Diverged { held: *held, found };
        if Some(held.last) > durable {
            let last = durable.map_or_else(|| "nothing".to_owned(), |last| format!("only up to {last}"));
            return Err(diverged(format!("holds {last}")));
        }
        let ids = segments(&self.disk).map_err(ReadError::io(self.disk.path("")))?;
        let Some(id) = ids.into_iter().rfind(|id| id.0 <= held.first) else {
            return Err(diverged("begins later".to_owned()));
        };
        self.at = Some((self.open_segment(id)?, SEGMENT_HEADER_BYTES as u64));
        self.last = id.0.prev();
        while let Some((segment, at)) = &self.at {
            let Found::Frame(found) = read(segment, *at)? else {
                break;
            };
            let header = &found.frame.header;
            self.last = Some(header.last_seq());
            if header.last_seq() >= held.last {
                let head = read_bytes(segment, found.location.offset, header.prefix_bytes())?;
                let here = FrameId::of(header.first_seq, header.last_seq(), &head);
                if here != *held {
                    return Err(diverged(format!(
                        "another frame there, seq {} to {}",
                        here.first, here.last
                    )));
                }
                if let Some((_, at)) = &mut self.at {
                    *at = found.end;
                }
                return Ok(());
            }
            let end = found.end;
            if let Some((_, at)) = &mut self.at {
                *at = end;
            }
        }
        Err(diverged("ends before that".to_owned()))
    }

    /// The next frame, if it is durable: no later than `durable`. Its data is not checked here: who takes it in does
    /// that.
    pub fn next(&mut self, durable: Option<Seq>) -> Result<Option<TailFrame>, ReadError> {
        // What is durable by now lies in a segment that is there by now.
        if self.last >= durable {
            return Ok(None);
        }
        loop {
            let Some((segment, at)) = &self.at else {
                let ids = segments(&self.disk).map_err(ReadError::io(self.disk.path("")))?;
                let Some(first) = ids.first() else { return Ok(None) };
                self.at = Some((self.open_segment(*first)?, SEGMENT_HEADER_BYTES as u64));
                continue;
            };
            match read(segment, *at)? {
                Found::Frame(found) => {
                    let Frame { header, .. } = &found.frame;
                    if Some(header.last_seq()) > durable {
                        return Ok(None);
                    }
                    let frame = self.take(segment, header, found.location)?;
                    self.last = Some(frame.last);
                    if let Some((_, at)) = &mut self.at {
                        *at = found.end;
                    }
                    return Ok(Some(frame));
                }
                Found::End => {
                    let ids = segments(&self.disk).map_err(ReadError::io(self.disk.path("")))?;
                    let Some(next) = ids.into_iter().find(|id| *id > segment.id) else {
                        return Ok(None);
                    };
                    // Between the two looks the end of this segment may have been written.
                    if matches!(read(segment, *at)?, Found::End) {
                        self.at = Some((self.open_segment(next)?, SEGMENT_HEADER_BYTES as u64));
                    }
                }
                Found::Bad(what) => {
                    return Err(ReadError::Damaged {
                        path: segment.path.clone(),
                        offset: *at,
                        what,
                        seqs: None,
                    });
                }
            }
        }
    }

    fn take(
        &self,
        segment: &Segment,
        header: &FrameHeader,
        location: FrameLocation,
    ) -> Result<TailFrame, ReadError> {
        Ok(TailFrame {
            previous: self.last,
            last: header.last_seq(),
            wall: BootNs(header.boot_ns_min.0).at_offset(header.wall_offset_ns),
            bytes: read_bytes(segment, location.offset, header.frame_bytes)?,
            location,
        })
    }

    fn open_segment(&self, id: SegmentId) -> Result<Segment, ReadError> {
        let io = ReadError::io(self.disk.path(&id.file_name()));
        let segment = Segment::open(&self.disk, id).map_err(io)?;
        match segment.header(self.store).map_err(ReadError::io(&segment.path))? {
            HeaderState::Good => Ok(segment),
            state => Err(header_error(&segment, &state)),
        }
    }

    /// Time of the oldest record of the first frame after `end`; of the log if `None`.
    pub fn wall_after(
        dir: &Path,
        end: Option<(u64, u64)>,
        durable: Option<Seq>,
    ) -> Result<Option<WallNs>, TailError> {
        let mut tail = Self::open(dir)?;
        if let Some((segment, offset)) = end {
            let id = SegmentId(Seq::new(segment).unwrap_or(Seq::FIRST));
            tail.at = Some((tail.open_segment(id)?, offset));
        }
        let next = tail.next(durable)?;
        Ok(next.map(|frame| frame.wall))
    }

    /// Bytes of the log after `end` (a segment, and a place in it); all of them if `None`.
    pub fn bytes_after(dir: &Path, end: Option<(u64, u64)>) -> Result<u64, ReadError> {
        let disk = RealDisk::read_only(&dir.join(LOG_DIR));
        let measure = || -> io::Result<u64> {
            let mut bytes = 0;
            for id in segments(&disk)? {
                if end.is_some_and(|(segment, _)| id.0.get() < segment) {
                    continue;
                }
                let len = std::fs::metadata(disk.path(&id.file_name()))?.len();
                bytes += match end {
                    Some((segment, offset)) if id.0.get() == segment => len.saturating_sub(offset),
                    _ => len,
                };
            }
            Ok(bytes)
        };
        measure().map_err(ReadError::io(disk.path("")))
    }
}

impl From<OpenError> for TailError {
    fn from(error: OpenError) -> Self {
        Self::Read(match error {
            OpenError::Io { path, source, .. } => ReadError::Io { path, source },
            other => ReadError::Io {
                path: PathBuf::new(),
                source: io::Error::other(other),
            },
        })
    }
}

fn read(segment: &Segment, at: u64) -> Result<Found, ReadError> {
    segment
        .read(at, Depth::Table)
        .map_err(ReadError::io(&segment.path))
}

fn read_bytes(segment: &Segment, offset: u64, len: usize) -> Result<Vec<u8>, ReadError> {
    let mut bytes = vec![0; len];
    let filled = segment
        .file
        .read_at(offset, &mut bytes)
        .map_err(ReadError::io(&segment.path))?;
    if filled < len {
        return Err(ReadError::Damaged {
            path: segment.path.clone(),
            offset,
            what: "cut short".to_owned(),
            seqs: None,
        });
    }
    Ok(bytes)
}
