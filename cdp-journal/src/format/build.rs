//! From records to a frame.
//!
//! [`FrameBuilder::push`] runs on the thread that drains the ring: it copies the data once, to near where it will lie in
//! the frame. Deltas, compression and checksums wait for [`FrameBuilder::seal_with`], on another thread, which works in
//! place.

use std::cell::RefCell;

use uuid::Uuid;

use super::encode::{Extent, GroupEncoder, Scratch, compress};
use super::{
    Body, CODEC_LZ4, CODEC_PLAIN, DeltaCache, FRAME_ALIGN_BYTES, FRAME_BYTES_MAX, FRAME_DATA_BYTES_MAX,
    FRAME_GROUPS_MAX, FRAME_HEADER_BYTES, FRAME_RECORDS_MAX, FRAME_TAIL_BYTES_MAX, FRAME_ZEROED_BYTES_MAX,
    Frame, FrameError, GROUP_ENTRY_BYTES, GROUP_HEADER_BYTES, Origin, PackedUnit, Record, RecordFlags,
    TAIL_BYTES_MAX,
};
use crate::types::{BLOCK_BYTES, BootNs, Seq, UNIT_BYTES, VolumeId};

/// A record was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// The frame has no room for it: seal this one and push to the next.
    #[error("the frame is full")]
    Full,
    /// The data is not as long as the body says.
    #[error("the body tells of {expected} bytes of data, {found} were given")]
    DataLength {
        /// By the body.
        expected: u64,
        /// By the slices.
        found: u64,
    },
    /// No frame can hold this record.
    #[error("not a valid record: {0}")]
    Invalid(&'static str),
}

/// Splits a record's data into parts: a whole aligned unit, or a block, or the piece of one.
pub(crate) fn parts(offset: u64, len: u64) -> impl Iterator<Item = (u64, usize)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let part_end = if at.is_multiple_of(UNIT_BYTES) && end - at >= UNIT_BYTES {
            at + UNIT_BYTES
        } else {
            end.min((at / BLOCK_BYTES + 1) * BLOCK_BYTES)
        };
        let part = (at, (part_end - at) as usize);
        at = part_end;
        Some(part)
    })
}

/// Memory that a frame with data begins with: what a caller that seals at 1 MiB fills.
const FRAME_DATA_RESERVE: usize = FRAME_DATA_BYTES_MAX / 2 + FRAME_DATA_BYTES_MAX / 8;
/// Room for header and table before the groups: enough for those of 1 MiB in records of 4 KiB. A longer head costs
/// a copy.
const HEAD_ROOM: usize = 20 << 10;

/// Where data lies before it is encoded. What is stored is never longer than what was there, but for the headers of
/// groups: with room for those before the data, it never overtakes what is still to be done.
const DATA_AT: usize = HEAD_ROOM + FRAME_GROUPS_MAX * GROUP_HEADER_BYTES;

/// Collects records into a frame.
#[derive(Debug)]
pub struct FrameBuilder {
    first_seq: Seq,
    record_count: usize,
    /// Fixed entries of the records pushed.
    entries: Vec<u8>,
    tails: Vec<u8>,
    /// Room for the head and the headers of groups, then the data of all records. Empty while no record has data.
    data: Vec<u8>,
    /// What the data is, record by record.
    extents: Vec<Extent>,
    raw_bytes: usize,
    zeroed_bytes: u64,
    boot_ns: Option<(BootNs, BootNs)>,
}

impl FrameBuilder {
    /// A frame whose first record will be `first_seq`.
    pub fn new(first_seq: Seq) -> Self {
        Self {
            first_seq,
            record_count: 0,
            entries: Vec::new(),
            tails: Vec::new(),
            data: Vec::new(),
            extents: Vec::new(),
            raw_bytes: 0,
            zeroed_bytes: 0,
            boot_ns: None,
        }
    }

    /// Adds a record whose data, in one or more slices, is as long as `body` says. Returns its Seq.
    pub fn push(
        &mut self,
        boot_ns: BootNs,
        volume: Option<VolumeId>,
        origin: Origin,
        flags: RecordFlags,
        body: Body,
        data: &[&[u8]],
    ) -> Result<Seq, PushError> {
        if let Some(fault) = body.fault() {
            return Err(PushError::Invalid(fault));
        }
        let (expected, found) = (
            body.data_bytes(),
            data.iter().map(|slice| slice.len() as u64).sum(),
        );
        if expected != found {
            return Err(PushError::DataLength { expected, found });
        }
        let tail = body.tail();
        if tail.len() > TAIL_BYTES_MAX {
            return Err(PushError::Invalid("a name, path or label is too long"));
        }
        if self.record_count == FRAME_RECORDS_MAX
            || self.raw_bytes as u64 + expected > FRAME_DATA_BYTES_MAX as u64
            || self.tails.len() + tail.len() > FRAME_TAIL_BYTES_MAX
            || self.zeroed_bytes + body.zeroed_bytes() > FRAME_ZEROED_BYTES_MAX
        {
            return Err(PushError::Full);
        }
        if expected > 0 {
            self.extents.push(Extent {
                volume: volume.map_or(0, VolumeId::get),
                offset: body.data_offset(),
                len: expected,
                is_captured: matches!(body, Body::Write { .. }),
            });
            self.push_data(data);
        }
        self.zeroed_bytes += body.zeroed_bytes();
        let record = Record {
            seq: self.next_seq(),
            boot_ns,
            volume,
            origin,
            flags,
            body,
        };
        self.entries.extend_from_slice(&record.encode_entry(tail.len()));
        self.tails.extend_from_slice(&tail);
        self.record_count += 1;
        let (earliest, latest) = self.boot_ns.unwrap_or((boot_ns, boot_ns));
        self.boot_ns = Some((earliest.min(boot_ns), latest.max(boot_ns)));
        Ok(record.seq)
    }

    fn push_data(&mut self, data: &[&[u8]]) {
        if self.data.is_empty() {
            // Once, so that a busy frame does not grow by copying.
            self.data.reserve_exact(DATA_AT + FRAME_DATA_RESERVE);
            self.data.resize(DATA_AT, 0);
        }
        for slice in data {
            self.data.extend_from_slice(slice);
            self.raw_bytes += slice.len();
        }
    }

    /// The Seq that the next record gets.
    pub fn next_seq(&self) -> Seq {
        self.first_seq.plus(self.record_count as u64)
    }

    /// Data pushed so far.
    pub fn raw_bytes(&self) -> usize {
        self.raw_bytes
    }

    /// Records pushed so far.
    pub fn record_count(&self) -> usize {
        self.record_count
    }

    /// Nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.record_count == 0
    }

    /// Would one more record with `data_bytes` of data and no tail fit?
    pub fn fits(&self, data_bytes: usize) -> bool {
        self.record_count < FRAME_RECORDS_MAX && self.raw_bytes + data_bytes <= FRAME_DATA_BYTES_MAX
    }

    /// Compresses and checksums. `None` if nothing was pushed: a frame holds a record at least.
    pub fn seal(self, boot_id: Uuid, wall_offset_ns: i64) -> Option<SealedFrame> {
        self.seal_with(&mut DeltaCache::new(0), boot_id, wall_offset_ns)
    }

    /// The same, with deltas against what `cache` holds. The frames that one cache sees must come into one log, in that
    /// order: see [`DeltaCache`].
    pub fn seal_with(
        self,
        cache: &mut DeltaCache,
        boot_id: Uuid,
        wall_offset_ns: i64,
    ) -> Option<SealedFrame> {
        let (boot_ns_min, boot_ns_max) = self.boot_ns?;
        let last_seq = self.first_seq.plus(self.record_count as u64 - 1);
        let has_data = self.raw_bytes > 0;
        let mut bytes = self.data;
        let mut table = self.entries;
        let mut groups_at = HEAD_ROOM.min(bytes.len());
        cache.begin(self.first_seq, last_seq);
        let (group_count, format, stored_table) = SCRATCH.with_borrow_mut(|scratch| {
            let mut encoder =
                GroupEncoder::new(self.first_seq, &mut bytes, groups_at, DATA_AT, cache, scratch);
            encoder.encode(&self.extents);
            let (entries, format) = encoder.finish();
            let group_count = entries.len() / GROUP_ENTRY_BYTES;
            table.extend_from_slice(&entries);
            table.extend_from_slice(&self.tails);
            let shorter = compress(&table, &mut scratch.stored).map(|stored| stored.to_vec());
            scratch.shrink();
            (group_count, format, shorter)
        });
        debug_assert!(group_count <= FRAME_GROUPS_MAX);
        let (codec, stored_table) = match &stored_table {
            Some(stored) => (CODEC_LZ4, &stored[..]),
            None => (CODEC_PLAIN, &table[..]),
        };
        let head_bytes = FRAME_HEADER_BYTES + stored_table.len();
        if head_bytes > groups_at {
            let longer = head_bytes - groups_at;
            bytes.splice(..0, std::iter::repeat_n(0, longer));
            groups_at += longer;
        }
        let start = groups_at - head_bytes;
        let frame_bytes = (bytes.len() - start).next_multiple_of(FRAME_ALIGN_BYTES);
        debug_assert!(frame_bytes <= FRAME_BYTES_MAX);
        bytes.resize(start + frame_bytes, 0);

        let mut header = Vec::with_capacity(FRAME_HEADER_BYTES);
        header.extend_from_slice(b"CDPF");
        header.extend_from_slice(&format.to_le_bytes());
        header.extend_from_slice(&self.first_seq.get().to_le_bytes());
        header.extend_from_slice(&(frame_bytes as u32).to_le_bytes());
        header.extend_from_slice(&(self.record_count as u32).to_le_bytes());
        header.extend_from_slice(&(group_count as u32).to_le_bytes());
        header.extend_from_slice(&(table.len() as u32).to_le_bytes());
        header.extend_from_slice(&(stored_table.len() as u32).to_le_bytes());
        header.extend_from_slice(&crc32c::crc32c(stored_table).to_le_bytes());
        header.extend_from_slice(&[codec, 0, 0, 0, 0, 0, 0, 0]);
        header.extend_from_slice(boot_id.as_bytes());
        header.extend_from_slice(&wall_offset_ns.to_le_bytes());
        header.extend_from_slice(&boot_ns_min.0.to_le_bytes());
        header.extend_from_slice(&boot_ns_max.0.to_le_bytes());
        header.extend_from_slice(&[0; 4]);
        let header_crc = crc32c::crc32c(&header);
        header.extend_from_slice(&header_crc.to_le_bytes());
        debug_assert_eq!(header.len(), FRAME_HEADER_BYTES);
        bytes[start..start + FRAME_HEADER_BYTES].copy_from_slice(&header);
        bytes[start + FRAME_HEADER_BYTES..groups_at].copy_from_slice(stored_table);
        Some(SealedFrame {
            bytes,
            start,
            head_bytes,
            first_seq: self.first_seq,
            last_seq,
            has_data,
        })
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
}

/// A frame as it lies in a log and travels on a wire: [`FrameBuilder::seal`] makes it, [`SealedFrame::check`] takes
/// one that came from elsewhere.
#[derive(Clone, Debug)]
pub struct SealedFrame {
    pub(super) bytes: Vec<u8>,
    /// Where in `bytes` the frame begins.
    pub(super) start: usize,
    pub(super) head_bytes: usize,
    pub(super) first_seq: Seq,
    pub(super) last_seq: Seq,
    pub(super) has_data: bool,
}

impl SealedFrame {
    /// Takes bytes for a frame after checking every byte of them.
    pub fn check(bytes: Vec<u8>) -> Result<Self, FrameError> {
        Self::check_units(bytes, 0, false).map(|(frame, _)| frame)
    }

    /// The same, of the bytes from `start` on; gives its packed units too, and where in the frame the group of each begins,
    /// if `are_wanted`.
    pub(crate) fn check_units(
        bytes: Vec<u8>,
        start: usize,
        are_wanted: bool,
    ) -> Result<(Self, Vec<(PackedUnit, usize)>), FrameError> {
        let whole = bytes.get(start..).ok_or(FrameError::Short)?;
        let frame = Frame::parse(whole)?;
        if whole.len() != frame.header.frame_bytes {
            return Err(FrameError::Short);
        }
        frame.check_groups(whole)?;
        let units = match are_wanted {
            true => frame.packed_units(whole),
            false => Vec::new(),
        };
        let place = |unit: &PackedUnit| frame.groups[usize::from(unit.group)].offset_in_frame;
        let units = units.into_iter().map(|unit| (unit, place(&unit))).collect();
        let sealed = Self {
            start,
            head_bytes: frame.header.prefix_bytes(),
            first_seq: frame.header.first_seq,
            last_seq: frame.header.last_seq(),
            has_data: !frame.groups.is_empty(),
            bytes,
        };
        Ok((sealed, units))
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Header and record table: what the index needs.
    pub fn head(&self) -> &[u8] {
        &self.bytes()[..self.head_bytes]
    }

    /// First record in it.
    pub fn first_seq(&self) -> Seq {
        self.first_seq
    }

    /// Last record in it.
    pub fn last_seq(&self) -> Seq {
        self.last_seq
    }

    /// Does any of its records carry data?
    pub fn has_data(&self) -> bool {
        self.has_data
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::FRAME_ZEROED_BYTES_MAX;

    /// Many ranges as large as the largest volume would cost the index more memory than there is.
    #[test]
    fn the_zeroes_of_a_frame_have_a_bound() {
        let mut frame = FrameBuilder::new(Seq::FIRST);
        let zero = |frame: &mut FrameBuilder, len| {
            let body = Body::Discard { offset: 0, len };
            frame.push(
                BootNs(1),
                VolumeId::new(1),
                Origin::default(),
                RecordFlags::default(),
                body,
                &[],
            )
        };
        zero(&mut frame, FRAME_ZEROED_BYTES_MAX - 512).unwrap();
        assert_eq!(zero(&mut frame, 1024), Err(PushError::Full));
        zero(&mut frame, 512).unwrap();
        for (more, is_good) in [(0, true), (512, false)] {
            let mut frame = FrameBuilder::new(Seq::FIRST);
            zero(&mut frame, FRAME_ZEROED_BYTES_MAX).unwrap();
            // As somebody who does not keep to it would.
            frame.zeroed_bytes = 0;
            if more > 0 {
                zero(&mut frame, more).unwrap();
            }
            let sealed = frame.seal(Uuid::nil(), 0).unwrap();
            assert_eq!(Frame::parse(sealed.bytes()).is_ok(), is_good);
        }
    }
}
