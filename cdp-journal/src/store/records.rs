//! Walking the records of the log in order.

use std::borrow::Cow;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::error::ReadError;
use crate::format::{ENVELOPE_BYTES, Frame, FrameHeader, GroupRef, Part, PlacedRecord};
use crate::index::{FrameEntry, IndexError};
use crate::log::{Depth, Disk, Found, FoundFrame, Segment};
use crate::types::{SegmentId, Seq};
use crate::view::{Blocks, GroupPlace, ViewStore, Wanted, read_content};

/// Records that lie in one frame.
#[derive(Clone, Debug)]
pub struct FrameRecords {
    /// The frame: its boot, its clock and its times, also of records that were not asked for.
    pub header: FrameHeader,
    /// Those of its records that were asked for, in order, never none.
    pub records: Vec<PlacedRecord>,
    groups: Vec<GroupRef>,
    parts: Vec<Part>,
    segment: u64,
    /// Of the frame, in the segment.
    offset: u64,
}

/// The data of a frame's records, checked.
#[derive(Clone, Debug)]
pub struct FrameData {
    /// That of all groups, one after the other.
    data: Vec<u8>,
    /// Where each of them begins.
    starts: Vec<usize>,
}

/// All data of a group of the frame at `offset` of a segment, to go to `start`.
fn whole_of(segment: u64, offset: u64, group: &GroupRef, start: usize) -> Wanted {
    Wanted {
        place: GroupPlace {
            segment,
            offset: offset + group.offset_in_frame as u64,
            crc: Some(group.crc),
        },
        from: 0,
        target: start..start + group.content_bytes,
    }
}

impl FrameRecords {
    /// Those records of a frame that lie in `seqs`. The frame begins at `offset` of a segment.
    pub(crate) fn new(frame: Frame, seqs: &RangeInclusive<Seq>, segment: u64, offset: u64) -> Self {
        let mut records = frame.records;
        records.retain(|placed| seqs.contains(&placed.record.seq));
        Self {
            header: frame.header,
            records,
            groups: frame.groups,
            parts: frame.parts,
            segment,
            offset,
        }
    }

    /// Reads the data of the whole frame, at most [`FRAME_DATA_BYTES_MAX`](crate::format::FRAME_DATA_BYTES_MAX), and
    /// checks it.
    pub(crate) fn read_data(&self, blocks: &dyn Blocks) -> Result<FrameData, ReadError> {
        let total = self.groups.iter().map(|group| group.content_bytes).sum();
        let (mut data, mut starts) = (vec![0; total], Vec::with_capacity(self.groups.len()));
        let mut wanted = Vec::with_capacity(self.groups.len());
        let mut start = 0;
        for group in &self.groups {
            starts.push(start);
            wanted.push(whole_of(self.segment, self.offset, group, start));
            start += group.content_bytes;
        }
        read_content(blocks, &wanted, &mut data).map_err(|error| self.tell_seqs(error))?;
        Ok(FrameData { data, starts })
    }

    /// Damage far away says no more than where it is.
    fn tell_seqs(&self, error: ReadError) -> ReadError {
        match error {
            ReadError::Damaged {
                path,
                offset,
                what,
                seqs: None,
            } => ReadError::Damaged {
                path,
                offset,
                what,
                seqs: Some((self.header.first_seq, self.header.last_seq())),
            },
            error => error,
        }
    }

    /// Resolves the deltas of a frame whose groups are good by themselves.
    pub(super) fn check_deltas(found: &FoundFrame, blocks: &dyn Blocks) -> Result<(), ReadError> {
        let (segment, offset) = (found.location.segment.0.get(), found.location.offset);
        let mut wanted = Vec::new();
        let mut end = 0;
        for group in found.frame.groups.iter().filter(|group| group.has_directory) {
            wanted.push(whole_of(segment, offset, group, end));
            end += group.content_bytes;
        }
        read_content(blocks, &wanted, &mut vec![0; end])
    }

    /// The data of one of [`Self::records`]: nothing for a record that has none.
    pub fn data_of<'a>(&self, record: &PlacedRecord, data: &'a FrameData) -> Cow<'a, [u8]> {
        let piece = |part: &Part| {
            let start = data
                .starts
                .get(part.group)
                .map_or(0, |start| start + part.in_group);
            data.data.get(start..start + part.len).unwrap_or_default()
        };
        match self.parts.get(record.parts.clone()).unwrap_or_default() {
            [] => Cow::Borrowed(&[]),
            [part] => Cow::Borrowed(piece(part)),
            parts => Cow::Owned(parts.iter().flat_map(piece).copied().collect()),
        }
    }
}

/// A walk over records; see [`StoreReader::records`](super::StoreReader::records).
#[derive(Debug)]
pub struct Records<'a> {
    store: Arc<ViewStore>,
    disk: &'a dyn Disk,
    /// What is still to come; `None` at the end or after an error.
    rest: Option<RangeInclusive<Seq>>,
    /// Where the last frame ended: the next one usually begins there.
    end: Option<(Segment, u64)>,
}

impl<'a> Records<'a> {
    pub(super) fn new(store: Arc<ViewStore>, disk: &'a dyn Disk, seqs: RangeInclusive<Seq>) -> Self {
        Self {
            store,
            disk,
            rest: Some(seqs),
            end: None,
        }
    }

    fn advance(&mut self) -> Result<Option<FrameRecords>, ReadError> {
        let Some(rest) = self.rest.take().filter(|rest| !rest.is_empty()) else {
            return Ok(None);
        };
        let Some((segment, found)) = self.frame_from(*rest.start())? else {
            return Ok(None);
        };
        let FoundFrame {
            frame, end, location, ..
        } = found;
        if frame.header.first_seq > *rest.end() {
            return Ok(None);
        }
        self.end = Some((segment, end));
        self.rest = Some(frame.header.last_seq().next()..=*rest.end());
        let segment = location.segment.0.get();
        Ok(Some(FrameRecords::new(frame, &rest, segment, location.offset)))
    }

    /// The frame that holds `seq`, or the first one after it.
    fn frame_from(&mut self, seq: Seq) -> Result<Option<(Segment, FoundFrame)>, ReadError> {
        if let Some((segment, end)) = self.end.take() {
            let found = segment.read(end, Depth::Table);
            match found.map_err(ReadError::io(&segment.path))? {
                Found::Frame(found) if found.frame.header.first_seq == seq => {
                    return Ok(Some((segment, *found)));
                }
                _ => {}
            }
        }
        let entry = self
            .store
            .ask(|lookup| match lookup.frame_at_or_before(seq.get())? {
                Some(entry) if entry.last_seq >= seq.get() => Ok(Some(entry)),
                _ => lookup.frame_at_or_after(seq.get()),
            })?;
        entry.map(|entry| read_frame(self.disk, &entry)).transpose()
    }
}

impl Iterator for Records<'_> {
    type Item = Result<FrameRecords, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}

/// Header and record table of a frame that the index knows.
pub(super) fn read_frame(disk: &dyn Disk, entry: &FrameEntry) -> Result<(Segment, FoundFrame), ReadError> {
    let segment_seq = Seq::new(entry.segment).ok_or(IndexError::Corrupt("a frame in no segment"))?;
    let id = SegmentId(segment_seq);
    let path = disk.path(&id.file_name());
    let damaged = |what: &str| ReadError::Damaged {
        path: path.clone(),
        offset: entry.offset,
        what: what.to_owned(),
        seqs: Seq::new(entry.first_seq).zip(Seq::new(entry.last_seq)),
    };
    let segment = match Segment::open(disk, id) {
        Ok(segment) => segment,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(damaged("the segment is missing"));
        }
        Err(source) => return Err(ReadError::Io { path, source }),
    };
    let at = entry.offset - ENVELOPE_BYTES as u64;
    match segment.read(at, Depth::Table).map_err(ReadError::io(&path))? {
        Found::Frame(found) if found.frame.header.first_seq.get() == entry.first_seq => Ok((segment, *found)),
        Found::Frame(_) => Err(damaged("another frame than the index says")),
        Found::End => Err(damaged("the segment is cut short")),
        Found::Bad(what) => Err(damaged(&what)),
    }
}
