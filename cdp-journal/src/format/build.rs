//! From records to a frame.
//!
//! [`FrameBuilder::push`] runs on the thread that drains the ring: it copies the data once, to where it will lie in
//! the frame unless something before it gets shorter. Compression and checksums wait for [`FrameBuilder::seal`], on
//! another thread, which moves only what compression has made room for.

use std::cell::RefCell;

use uuid::Uuid;

use super::{
    Body, CODEC_LZ4, CODEC_PLAIN, FORMAT, FRAME_ALIGN_BYTES, FRAME_BYTES_MAX, FRAME_DATA_BYTES_MAX,
    FRAME_GROUPS_MAX, FRAME_HEADER_BYTES, FRAME_RECORDS_MAX, FRAME_TAIL_BYTES_MAX, Frame, FrameError,
    GROUP_BYTES_MAX, GROUP_HEADER_BYTES, Origin, Record, RecordFlags, TAIL_BYTES_MAX,
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
/// Room for header and table before the groups: enough for those of 1 MiB in records of 4 KiB. A longer head costs
/// a copy.
const HEAD_ROOM: usize = 20 << 10;

/// Collects records into a frame.
#[derive(Debug)]
pub struct FrameBuilder {
    first_seq: Seq,
    record_count: usize,
    /// Fixed entries of the records pushed.
    entries: Vec<u8>,
    tails: Vec<u8>,
    /// Room for the head, then the groups as they would be stored plain, each with room for its header. Empty
    /// while no record has data.
    groups: Vec<u8>,
    raw_bytes: usize,
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
            groups: Vec::new(),
            raw_bytes: 0,
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
            || self.raw_bytes as u64 + expected > FRAME_DATA_BYTES_MAX as u64
            || self.tails.len() + tail.len() > FRAME_TAIL_BYTES_MAX
        {
            return Err(PushError::Full);
        }
        if expected > 0 {
            self.push_data(body.data_offset(), data);
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

    fn push_data(&mut self, offset: u64, data: &[&[u8]]) {
        if self.groups.is_empty() {
            // Once, so that a busy frame does not grow by copying.
            self.groups.reserve_exact(HEAD_ROOM + FRAME_DATA_RESERVE);
            self.groups.resize(HEAD_ROOM, 0);
        }
        let len = data.iter().map(|slice| slice.len()).sum::<usize>();
        self.raw_bytes += len;
        let mut slices = data.iter().copied();
        let mut slice: &[u8] = &[];
        for (_, mut part_bytes) in parts(offset, len as u64) {
            let (_, at) = self.placement.place(part_bytes);
            if at == 0 {
                self.groups.extend_from_slice(&[0; GROUP_HEADER_BYTES]);
            }
            while part_bytes > 0 {
                let Some((taken, rest)) = slice.split_at_checked(part_bytes) else {
                    self.groups.extend_from_slice(slice);
                    part_bytes -= slice.len();
                    slice = slices.next().unwrap_or_default();
                    continue;
                };
                self.groups.extend_from_slice(taken);
                part_bytes = 0;
                slice = rest;
            }
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
        let (boot_ns_min, boot_ns_max) = self.boot_ns?;
        let last_seq = self.first_seq.plus(self.record_count as u64 - 1);
        let has_data = self.raw_bytes > 0;
        let placed = self.placement.finish();
        debug_assert!(placed.len() <= FRAME_GROUPS_MAX);
        let mut bytes = self.groups;
        let mut table = self.entries;
        let mut groups_at = HEAD_ROOM.min(bytes.len());
        let stored_table = SCRATCH.with_borrow_mut(|scratch| {
            encode_groups(
                self.first_seq,
                &placed,
                &mut bytes,
                groups_at,
                scratch,
                &mut table,
            );
            table.extend_from_slice(&self.tails);
            let shorter = compress(&table, scratch).map(|stored| stored.to_vec());
            if scratch.len() > SCRATCH_KEPT_BYTES {
                *scratch = Vec::new();
            }
            shorter
        });
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
            head_bytes,
            first_seq: self.first_seq,
            last_seq,
            has_data,
        })
    }
}

/// What is tried of a group before all of it is compressed.
const SAMPLE_BYTES: usize = 4096;
/// What a thread keeps at most to compress into: enough for a group.
const SCRATCH_KEPT_BYTES: usize = 2 * GROUP_BYTES_MAX;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// LZ4 of `raw` at the start of `scratch`, if it is shorter.
fn compress<'s>(raw: &[u8], scratch: &'s mut Vec<u8>) -> Option<&'s [u8]> {
    let bytes_max = lz4::block::compress_bound(raw.len()).ok()?;
    if scratch.len() < bytes_max {
        scratch.resize(bytes_max, 0);
    }
    // The C encoder takes about half the time of a safe one in Rust.
    let bytes = lz4::block::compress_to_buffer(raw, None, false, scratch).ok()?;
    (bytes < raw.len()).then(|| &scratch[..bytes])
}

/// Is it worth while to compress a group? Two samples tell noise (encrypted or compressed data) from the rest, so
/// that it costs a fraction of the time to find that nothing is gained.
fn is_noise(raw: &[u8], scratch: &mut Vec<u8>) -> bool {
    let mut saves = |sample: &[u8]| {
        compress(sample, scratch).is_some_and(|shorter| shorter.len() < sample.len() - sample.len() / 32)
    };
    let middle = raw.len() / 2;
    raw.len() >= 4 * SAMPLE_BYTES
        && !saves(&raw[..SAMPLE_BYTES])
        && !saves(&raw[middle..middle + SAMPLE_BYTES])
}

/// Turns the groups that begin at `at` in `bytes`, each with room for its header, into what is stored, and appends
/// their entries to `table`.
fn encode_groups(
    first_seq: Seq,
    raw_bytes_of_groups: &[u32],
    bytes: &mut Vec<u8>,
    at: usize,
    scratch: &mut Vec<u8>,
    table: &mut Vec<u8>,
) {
    // What is stored is never longer than what was there, so the end never overtakes what is still to be done.
    let (mut from, mut end) = (at, at);
    for (number, raw_bytes) in raw_bytes_of_groups.iter().enumerate() {
        let raw = from + GROUP_HEADER_BYTES..from + GROUP_HEADER_BYTES + *raw_bytes as usize;
        from = raw.end;
        let stored_at = end + GROUP_HEADER_BYTES;
        let shorter = match is_noise(&bytes[raw.clone()], scratch) {
            true => None,
            false => compress(&bytes[raw.clone()], scratch),
        };
        let codec = match shorter {
            Some(stored) => {
                bytes[stored_at..stored_at + stored.len()].copy_from_slice(stored);
                end = stored_at + stored.len();
                CODEC_LZ4
            }
            None => {
                end = stored_at + raw.len();
                if stored_at != raw.start {
                    bytes.copy_within(raw, stored_at);
                }
                CODEC_PLAIN
            }
        };
        let (header, stored) = bytes[stored_at - GROUP_HEADER_BYTES..end].split_at_mut(GROUP_HEADER_BYTES);
        header.fill(0);
        header[4..8].copy_from_slice(&(stored.len() as u32).to_le_bytes());
        header[8..12].copy_from_slice(&raw_bytes.to_le_bytes());
        header[12..14].copy_from_slice(&(number as u16).to_le_bytes());
        header[14] = codec;
        header[16..24].copy_from_slice(&first_seq.get().to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[4..]), stored);
        header[..4].copy_from_slice(&crc.to_le_bytes());
        table.extend_from_slice(&(stored.len() as u32).to_le_bytes());
        table.extend_from_slice(&crc.to_le_bytes());
    }
    bytes.truncate(end);
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
        let frame = Frame::parse(&bytes)?;
        if bytes.len() != frame.header.frame_bytes {
            return Err(FrameError::Short);
        }
        frame.check_groups(&bytes)?;
        Ok(Self {
            start: 0,
            head_bytes: frame.header.prefix_bytes(),
            first_seq: frame.header.first_seq,
            last_seq: frame.header.last_seq(),
            has_data: !frame.groups.is_empty(),
            bytes,
        })
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
