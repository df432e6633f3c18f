//! From a frame's bytes back to its records.

use std::cell::RefCell;
use std::ops::Range;

use uuid::Uuid;
use zstd::bulk::Decompressor;

use super::build::parts;
use super::group::{Group, GroupHeader, decode_group};
use super::{
    CODEC_LZ4, CODEC_PLAIN, CODEC_ZSTD, FORM_DIRECTORY, FORM_PLAIN, FORMAT, FORMAT_ZSTD, FRAME_ALIGN_BYTES,
    FRAME_BYTES_MAX, FRAME_GROUPS_MAX, FRAME_HEADER_BYTES, FRAME_RECORDS_MAX, FRAME_TAIL_BYTES_MAX,
    FRAME_ZEROED_BYTES_MAX, GROUP_BYTES_MAX, GROUP_CONTENT_BYTES_MAX, GROUP_ENTRY_BYTES, GROUP_HEADER_BYTES,
    RECORD_ENTRY_BYTES, Record, bytes_at, i64_at, u32_at, u64_at,
};
use crate::types::{BootNs, Seq, WallNs};

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Fewer bytes than the frame has.
    #[error("cut short")]
    Short,
    /// The magic, the header's checksum or its numbers are wrong.
    #[error("bad frame header")]
    Header,
    /// Written by a newer version of this program.
    #[error("frame format {0} is newer than this build reads")]
    TooNew(u32),
    /// The record table does not match its checksum.
    #[error("bad checksum of a record table")]
    Table,
    /// The record table's checksum is right and yet it makes no sense.
    #[error("a record table that makes no sense")]
    Record,
    /// A data group does not match its checksum.
    #[error("bad checksum of data group {0}")]
    Group(usize),
    /// A data group's checksum is right and yet its directory makes no sense.
    #[error("data group {0} makes no sense")]
    Directory(usize),
}

/// First bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// First record.
    pub first_seq: Seq,
    /// The whole frame.
    pub frame_bytes: usize,
    /// Records in it.
    pub record_count: usize,
    /// Which boot of the host its times belong to.
    pub boot_id: Uuid,
    /// Wall time = boot time + this.
    pub wall_offset_ns: i64,
    /// Smallest time of a record.
    pub boot_ns_min: BootNs,
    /// Largest time of a record.
    pub boot_ns_max: BootNs,
    /// That it takes to read it.
    format: u32,
    group_count: usize,
    table_raw_bytes: usize,
    table_bytes: usize,
    table_crc: u32,
    table_codec: u8,
}

impl FrameHeader {
    /// Bytes that [`FrameHeader::decode`] needs.
    pub const BYTES: usize = FRAME_HEADER_BYTES;

    /// Checks and reads the header at the start of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        if bytes.len() < FRAME_HEADER_BYTES {
            return Err(FrameError::Short);
        }
        if bytes[..4] != *b"CDPF" {
            return Err(FrameError::Header);
        }
        if crc32c::crc32c(&bytes[..92]) != u32_at(bytes, 92) {
            return Err(FrameError::Header);
        }
        let format = u32_at(bytes, 4);
        if format > FORMAT {
            return Err(FrameError::TooNew(format));
        }
        let header = Self {
            format,
            first_seq: Seq::new(u64_at(bytes, 8)).ok_or(FrameError::Header)?,
            frame_bytes: u32_at(bytes, 16) as usize,
            record_count: u32_at(bytes, 20) as usize,
            group_count: u32_at(bytes, 24) as usize,
            table_raw_bytes: u32_at(bytes, 28) as usize,
            table_bytes: u32_at(bytes, 32) as usize,
            table_crc: u32_at(bytes, 36),
            table_codec: bytes[40],
            boot_id: Uuid::from_bytes(bytes_at(bytes, 48)),
            wall_offset_ns: i64_at(bytes, 64),
            boot_ns_min: BootNs(u64_at(bytes, 72)),
            boot_ns_max: BootNs(u64_at(bytes, 80)),
        };
        if header.is_sound() {
            Ok(header)
        } else {
            Err(FrameError::Header)
        }
    }

    fn is_sound(&self) -> bool {
        let fixed_bytes = self.record_count * RECORD_ENTRY_BYTES + self.group_count * GROUP_ENTRY_BYTES;
        (1..=FRAME_RECORDS_MAX).contains(&self.record_count)
            && self.group_count <= FRAME_GROUPS_MAX
            && (fixed_bytes..=fixed_bytes + FRAME_TAIL_BYTES_MAX).contains(&self.table_raw_bytes)
            && (FRAME_HEADER_BYTES + self.table_bytes..=FRAME_BYTES_MAX).contains(&self.frame_bytes)
            && self.frame_bytes.is_multiple_of(FRAME_ALIGN_BYTES)
            && matches!(self.table_codec, CODEC_PLAIN | CODEC_LZ4)
    }

    /// Last record.
    pub fn last_seq(&self) -> Seq {
        self.first_seq.plus(self.record_count as u64 - 1)
    }

    /// Header and record table: what [`Frame::parse`] needs.
    pub fn prefix_bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.table_bytes
    }
}

/// Where a data group lies in its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupRef {
    /// Of its header, from the start of the frame.
    pub offset_in_frame: usize,
    /// After the header.
    pub stored_bytes: usize,
    /// Bytes of data in it.
    pub content_bytes: usize,
    /// Checksum, also in the group's header.
    pub crc: u32,
    /// Is some of the data told by a directory, rather than all of it stored as it is?
    pub has_directory: bool,
}

/// A piece of a record's data that lies in one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// First byte on the device.
    pub offset: u64,
    /// Bytes: a unit, or at most a block.
    pub len: usize,
    /// Group of the frame.
    pub group: usize,
    /// First byte in the group's content.
    pub in_group: usize,
}

/// A record and where its data lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedRecord {
    /// The record.
    pub record: Record,
    /// Its wall time.
    pub wall: WallNs,
    /// Its data, in order: which of [`Frame::parts`].
    pub parts: Range<usize>,
}

/// A frame whose header and record table have been checked. Its data has not: that happens where the data is
/// read.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The header.
    pub header: FrameHeader,
    /// The data groups.
    pub groups: Vec<GroupRef>,
    /// The records.
    pub records: Vec<PlacedRecord>,
    /// The data of all records, in order.
    pub parts: Vec<Part>,
}

/// Where the parts of a frame's data lie: one behind the other, group by group.
struct Places<'a> {
    groups: &'a [GroupRef],
    group: usize,
    in_group: usize,
}

impl<'a> Places<'a> {
    fn new(groups: &'a [GroupRef]) -> Self {
        Self {
            groups,
            group: 0,
            in_group: 0,
        }
    }

    /// The group of the next part, and where in it the part begins. `None` if it lies in no one group.
    fn next(&mut self, part_bytes: usize) -> Option<(usize, usize)> {
        if self.in_group == self.groups.get(self.group)?.content_bytes {
            self.group += 1;
            self.in_group = 0;
        }
        let place = (self.group, self.in_group);
        self.in_group += part_bytes;
        (self.in_group <= self.groups.get(self.group)?.content_bytes).then_some(place)
    }

    /// Does every group hold as much as it says?
    fn are_full(&self) -> bool {
        match self.groups.last() {
            Some(last) => self.group + 1 == self.groups.len() && self.in_group == last.content_bytes,
            None => true,
        }
    }
}

impl Frame {
    /// Reads header and table from the first [`FrameHeader::prefix_bytes`] of a frame, or from all of it.
    pub fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        let header = FrameHeader::decode(bytes)?;
        let stored = bytes
            .get(FRAME_HEADER_BYTES..header.prefix_bytes())
            .ok_or(FrameError::Short)?;
        if crc32c::crc32c(stored) != header.table_crc {
            return Err(FrameError::Table);
        }
        let unpacked;
        let table = if header.table_codec == CODEC_LZ4 {
            unpacked = decompress(stored, header.table_raw_bytes).ok_or(FrameError::Table)?;
            &unpacked[..]
        } else {
            stored
        };
        if table.len() != header.table_raw_bytes {
            return Err(FrameError::Table);
        }
        Self::from_table(header, table).ok_or(FrameError::Record)
    }

    fn from_table(header: FrameHeader, table: &[u8]) -> Option<Self> {
        let (entries, rest) = table.split_at(header.record_count * RECORD_ENTRY_BYTES);
        let (group_entries, mut tails) = rest.split_at(header.group_count * GROUP_ENTRY_BYTES);
        let mut offset_in_frame = header.prefix_bytes();
        let mut groups = Vec::with_capacity(header.group_count);
        for entry in group_entries.chunks_exact(GROUP_ENTRY_BYTES) {
            let (stored_bytes, content_bytes) = (u32_at(entry, 0) as usize, u32_at(entry, 8) as usize);
            let form = entry[12];
            let is_sound = stored_bytes <= content_bytes
                && (1..=GROUP_CONTENT_BYTES_MAX).contains(&content_bytes)
                && matches!(form, FORM_PLAIN | FORM_DIRECTORY)
                && entry[13..] == [0; 3];
            if !is_sound {
                return None;
            }
            groups.push(GroupRef {
                offset_in_frame,
                stored_bytes,
                content_bytes,
                crc: u32_at(entry, 4),
                has_directory: form == FORM_DIRECTORY,
            });
            offset_in_frame += GROUP_HEADER_BYTES + stored_bytes;
        }
        let mut places = Places::new(&groups);
        let mut records = Vec::with_capacity(header.record_count);
        let mut placed_parts = Vec::with_capacity(header.record_count);
        let mut zeroed_bytes = 0;
        for (index, entry) in entries.chunks_exact(RECORD_ENTRY_BYTES).enumerate() {
            let (tail, rest) = tails.split_at_checked(Record::tail_bytes_of(entry))?;
            tails = rest;
            let record = Record::decode(header.first_seq.plus(index as u64), entry, tail)?;
            zeroed_bytes += record.body.zeroed_bytes();
            if zeroed_bytes > FRAME_ZEROED_BYTES_MAX {
                return None;
            }
            let first_part = placed_parts.len();
            for (offset, len) in parts(record.body.data_offset(), record.body.data_bytes()) {
                let (group, in_group) = places.next(len)?;
                placed_parts.push(Part {
                    offset,
                    len,
                    group,
                    in_group,
                });
            }
            records.push(PlacedRecord {
                wall: record.boot_ns.at_offset(header.wall_offset_ns),
                record,
                parts: first_part..placed_parts.len(),
            });
        }
        if !places.are_full() || !tails.is_empty() {
            return None;
        }
        (offset_in_frame.next_multiple_of(FRAME_ALIGN_BYTES) == header.frame_bytes).then_some(Self {
            header,
            groups,
            records,
            parts: placed_parts,
        })
    }

    /// Checks every group of the whole frame `bytes`, and the padding.
    pub fn check_groups(&self, bytes: &[u8]) -> Result<(), FrameError> {
        if bytes.len() < self.header.frame_bytes {
            return Err(FrameError::Short);
        }
        let mut raw = vec![0; GROUP_BYTES_MAX];
        let mut end = self.header.prefix_bytes();
        for (number, group) in self.groups.iter().enumerate() {
            end = group.offset_in_frame + GROUP_HEADER_BYTES + group.stored_bytes;
            let stored = &bytes[group.offset_in_frame..end];
            let bad = || FrameError::Group(number);
            let header = decode_group(stored, Some(group.crc), &mut raw).ok_or_else(bad)?;
            if header.codec == CODEC_ZSTD && self.header.format < FORMAT_ZSTD {
                return Err(bad());
            }
            let expected = GroupHeader {
                crc: group.crc,
                stored_bytes: group.stored_bytes,
                raw_bytes: header.raw_bytes,
                number,
                codec: header.codec,
                form: if group.has_directory {
                    FORM_DIRECTORY
                } else {
                    FORM_PLAIN
                },
                first_seq: self.header.first_seq.get(),
            };
            let content_bytes = match header.is_plain() {
                true => header.raw_bytes,
                false => Group::new(header, raw[..header.raw_bytes].to_vec())
                    .ok_or(FrameError::Directory(number))?
                    .content_bytes(),
            };
            if header != expected || content_bytes != group.content_bytes {
                return Err(bad());
            }
        }
        if bytes[end..self.header.frame_bytes].iter().any(|byte| *byte != 0) {
            return Err(FrameError::Header);
        }
        Ok(())
    }
}

fn decompress(stored: &[u8], raw_bytes: usize) -> Option<Vec<u8>> {
    let mut raw = vec![0; raw_bytes];
    decompress_into(stored, &mut raw)?;
    Some(raw)
}

/// `None` unless that fills `raw`.
pub(super) fn decompress_into(stored: &[u8], raw: &mut [u8]) -> Option<()> {
    // The C decoder, which checks all bounds too, takes a half to a quarter of the time of a safe one in Rust.
    let bytes = lz4::block::decompress_to_buffer(stored, Some(i32::try_from(raw.len()).ok()?), raw).ok()?;
    (bytes == raw.len()).then_some(())
}

thread_local! {
    /// Made when it is first needed.
    static DENSE: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// The same of zstd: of one frame, and nothing behind it.
pub(super) fn decompress_dense_into(stored: &[u8], raw: &mut [u8]) -> Option<()> {
    if zstd::zstd_safe::find_frame_compressed_size(stored).ok()? != stored.len() {
        return None;
    }
    DENSE.with_borrow_mut(|dense| {
        let decompressor = match dense {
            Some(decompressor) => decompressor,
            None => dense.insert(Decompressor::new().ok()?),
        };
        let bytes = decompressor.decompress_to_buffer(stored, raw).ok()?;
        (bytes == raw.len()).then_some(())
    })
}
