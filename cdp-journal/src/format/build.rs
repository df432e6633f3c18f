//! From records to a frame.
//!
//! [`FrameBuilder::push`] runs on the thread that drains the ring: it copies the data once and computes
//! where parts fall. Compression and checksums wait for [`FrameBuilder::seal`], on another thread.

use uuid::Uuid;

use super::{
    Body, CODEC_LZ4, CODEC_PLAIN, FORMAT, FRAME_ALIGN_BYTES, FRAME_BYTES_MAX, FRAME_DATA_BYTES_MAX,
    FRAME_GROUPS_MAX, FRAME_HEADER_BYTES, FRAME_RECORDS_MAX, FRAME_TAIL_BYTES_MAX, GROUP_BYTES_MAX,
    GROUP_ENTRY_BYTES, GROUP_HEADER_BYTES, Origin, Record, RecordFlags, TAIL_BYTES_MAX,
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

/// Where groups begin. Both sides run this, so the places of parts are not stored.
#[derive(Debug, Default)]
pub(crate) struct Placement {
    /// Raw bytes of each closed group.
    closed: Vec<u32>,
    open_bytes: usize,
}

impl Placement {
    /// Places a part; returns its group and where in it the part begins.
    pub(crate) fn place(&mut self, part_bytes: usize) -> (usize, usize) {
        if self.open_bytes + part_bytes > GROUP_BYTES_MAX {
            self.closed.push(self.open_bytes as u32);
            self.open_bytes = 0;
        }
        let at = self.open_bytes;
        self.open_bytes += part_bytes;
        (self.closed.len(), at)
    }

    pub(crate) fn finish(mut self) -> Vec<u32> {
        if self.open_bytes > 0 {
            self.closed.push(self.open_bytes as u32);
        }
        self.closed
    }
}

/// Memory that a frame with data begins with: what a caller that seals at 1 MiB fills.
const FRAME_DATA_RESERVE: usize = FRAME_DATA_BYTES_MAX / 2 + FRAME_DATA_BYTES_MAX / 8;

/// Collects records into a frame.
#[derive(Debug)]
pub struct FrameBuilder {
    first_seq: Seq,
    record_count: usize,
    /// Fixed entries of the records pushed.
    entries: Vec<u8>,
    tails: Vec<u8>,
    /// Data of the records, in order: the groups are consecutive ranges of it.
    data: Vec<u8>,
    placement: Placement,
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
            placement: Placement::default(),
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
            || self.data.len() as u64 + expected > FRAME_DATA_BYTES_MAX as u64
            || self.tails.len() + tail.len() > FRAME_TAIL_BYTES_MAX
        {
            return Err(PushError::Full);
        }
        for (_, part_bytes) in parts(body.data_offset(), expected) {
            self.placement.place(part_bytes);
        }
        if self.data.capacity() == 0 && expected > 0 {
            self.data.reserve(FRAME_DATA_BYTES_MAX); // or it would be copied each time it grows
        }
        if self.data.capacity() == 0 && expected > 0 {
            // Once, so that a busy frame does not grow by copying.
            self.data.reserve_exact(FRAME_DATA_RESERVE);
        }
        for slice in data {
            self.data.extend_from_slice(slice);
        }
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

    /// The Seq that the next record gets.
    pub fn next_seq(&self) -> Seq {
        self.first_seq.plus(self.record_count as u64)
    }

    /// Data pushed so far.
    pub fn raw_bytes(&self) -> usize {
        self.data.len()
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
        self.record_count < FRAME_RECORDS_MAX && self.data.len() + data_bytes <= FRAME_DATA_BYTES_MAX
    }

    /// Compresses and checksums. `None` if nothing was pushed: a frame holds a record at least.
    pub fn seal(self, boot_id: Uuid, wall_offset_ns: i64) -> Option<SealedFrame> {
        let (boot_ns_min, boot_ns_max) = self.boot_ns?;
        let last_seq = self.first_seq.plus(self.record_count as u64 - 1);
        let has_data = !self.data.is_empty();
        let placed = self.placement.finish();
        debug_assert!(placed.len() <= FRAME_GROUPS_MAX);
        let mut table = self.entries;
        let table_bytes = table.len() + placed.len() * GROUP_ENTRY_BYTES + self.tails.len();
        // How long the table is as stored is known last: the groups are laid down behind room for the
        // longest, and header and table are put right before them, so nothing is copied twice.
        let mut stored_table = vec![0; lz4_flex::block::get_maximum_output_size(table_bytes)];
        let groups_at = FRAME_HEADER_BYTES + stored_table.len();
        let mut bytes = Vec::with_capacity(
            groups_at + self.data.len() + placed.len() * GROUP_HEADER_BYTES + FRAME_ALIGN_BYTES,
        );
        bytes.resize(groups_at, 0);
        encode_groups(self.first_seq, &self.data, &placed, &mut bytes, &mut table);
        table.extend_from_slice(&self.tails);
        let (codec, stored_table) = match lz4_flex::block::compress_into(&table, &mut stored_table) {
            Ok(bytes) if bytes < table.len() => (CODEC_LZ4, &stored_table[..bytes]),
            _ => (CODEC_PLAIN, &table[..]),
        };
        let start = groups_at - stored_table.len() - FRAME_HEADER_BYTES;
        let frame_bytes = (bytes.len() - start).next_multiple_of(FRAME_ALIGN_BYTES);
        debug_assert!(frame_bytes <= FRAME_BYTES_MAX);
        bytes.resize(start + frame_bytes, 0);

        let mut header = Vec::with_capacity(FRAME_HEADER_BYTES);
        header.extend_from_slice(b"CDPF");
        header.extend_from_slice(&FORMAT.to_le_bytes());
        header.extend_from_slice(&self.first_seq.get().to_le_bytes());
        header.extend_from_slice(&(frame_bytes as u32).to_le_bytes());
        header.extend_from_slice(&(self.record_count as u32).to_le_bytes());
        header.extend_from_slice(&(placed.len() as u32).to_le_bytes());
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
            head_bytes: groups_at - start,
            first_seq: self.first_seq,
            last_seq,
            has_data,
        })
    }
}

/// What is tried of a group before all of it is compressed.
const SAMPLE_BYTES: usize = 4096;

/// LZ4, if it makes the group shorter. Two samples tell noise (encrypted or compressed data) from the rest, so
/// that it costs a fraction of the time to find that nothing is gained.
fn compress(raw: &[u8], out: &mut [u8]) -> Option<usize> {
    let saves = |bytes: &[u8], out: &mut [u8]| {
        lz4_flex::block::compress_into(bytes, out)
            .is_ok_and(|shorter| shorter < bytes.len() - bytes.len() / 32)
    };
    if raw.len() >= 4 * SAMPLE_BYTES {
        let middle = raw.len() / 2;
        if !saves(&raw[..SAMPLE_BYTES], out) && !saves(&raw[middle..middle + SAMPLE_BYTES], out) {
            return None;
        }
    }
    let bytes = lz4_flex::block::compress_into(raw, out).ok()?;
    (bytes < raw.len()).then_some(bytes)
}

/// Appends the groups to `bytes` and their entries to `table`.
fn encode_groups(
    first_seq: Seq,
    data: &[u8],
    raw_bytes_of_groups: &[u32],
    bytes: &mut Vec<u8>,
    table: &mut Vec<u8>,
) {
    let mut compressed = vec![0; lz4_flex::block::get_maximum_output_size(GROUP_BYTES_MAX)];
    let mut at = 0;
    for (number, raw_bytes) in raw_bytes_of_groups.iter().enumerate() {
        let raw = &data[at..at + *raw_bytes as usize];
        at += raw.len();
        let (codec, stored) = match compress(raw, &mut compressed) {
            Some(bytes) => (CODEC_LZ4, &compressed[..bytes]),
            None => (CODEC_PLAIN, raw),
        };
        let mut header = [0; GROUP_HEADER_BYTES];
        header[4..8].copy_from_slice(&(stored.len() as u32).to_le_bytes());
        header[8..12].copy_from_slice(&raw_bytes.to_le_bytes());
        header[12..14].copy_from_slice(&(number as u16).to_le_bytes());
        header[14] = codec;
        header[16..24].copy_from_slice(&first_seq.get().to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[4..]), stored);
        header[..4].copy_from_slice(&crc.to_le_bytes());
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(stored);
        table.extend_from_slice(&(stored.len() as u32).to_le_bytes());
        table.extend_from_slice(&crc.to_le_bytes());
    }
}

/// A frame as it lies in a log and travels on a wire. Only [`FrameBuilder::seal`] makes one.
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
