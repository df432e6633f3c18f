//! Walking the records of the log in order.

use std::borrow::Cow;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;

use crate::error::ReadError;
use crate::format::{
    ENVELOPE_BYTES, Frame, FrameHeader, GROUP_HEADER_BYTES, GroupRef, Part, PlacedRecord, decode_group,
};
use crate::index::{FrameEntry, IndexError};
use crate::log::{Depth, Disk, Found, FoundFrame, Segment};
use crate::types::{SegmentId, Seq};
use crate::view::ViewStore;

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
    /// All groups, one after the other.
    raw: Vec<u8>,
    /// Where each of them begins.
    starts: Vec<usize>,
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
    /// checks it. `read` fills a buffer with what lies at an offset of a segment, as far as there is anything; `path`
    /// names the segment in messages.
    pub(crate) fn read_data(
        &self,
        path: &Path,
        read: impl FnOnce(u64, u64, &mut [u8]) -> Result<usize, ReadError>,
    ) -> Result<FrameData, ReadError> {
        let damaged = |what: String| ReadError::Damaged {
            path: path.to_owned(),
            offset: self.offset,
            what,
            seqs: Some((self.header.first_seq, self.header.last_seq())),
        };
        let mut stored = vec![0; self.header.frame_bytes];
        let filled = read(self.segment, self.offset, &mut stored)?;
        stored.truncate(filled);
        let total = self.groups.iter().map(|group| group.raw_bytes).sum();
        let (mut raw, mut starts) = (vec![0; total], Vec::with_capacity(self.groups.len()));
        let mut start = 0;
        for (number, group) in self.groups.iter().enumerate() {
            let bytes =
                group.offset_in_frame..group.offset_in_frame + GROUP_HEADER_BYTES + group.stored_bytes;
            let target = &mut raw[start..start + group.raw_bytes];
            let header = stored
                .get(bytes)
                .and_then(|bytes| decode_group(bytes, group.crc, target))
                .filter(|header| header.raw_bytes == group.raw_bytes);
            if header.is_none() {
                return Err(damaged(format!("bad checksum of data group {number}")));
            }
            starts.push(start);
            start += group.raw_bytes;
        }
        Ok(FrameData { raw, starts })
    }

    /// The segment that the frame lies in.
    pub(crate) fn segment(&self) -> u64 {
        self.segment
    }

    /// The data of one of [`Self::records`]: nothing for a record that has none.
    pub fn data_of<'a>(&self, record: &PlacedRecord, data: &'a FrameData) -> Cow<'a, [u8]> {
        let piece = |part: &Part| {
            let start = data
                .starts
                .get(part.group)
                .map_or(0, |start| start + part.in_group);
            data.raw.get(start..start + part.len).unwrap_or_default()
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
