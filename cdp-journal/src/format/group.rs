//! Data groups: from their bytes to what they hold. Their layout is described in [`super`].

use std::ops::Range;

use super::delta::{self, Block};
use super::frame::{decompress_dense_into, decompress_into};
use super::{
    CODEC_LZ4, CODEC_PLAIN, CODEC_ZSTD, DELTA_DEPTH_MAX, DIRECTORY_ENTRY_BYTES, FORM_DIRECTORY, FORM_PLAIN,
    GROUP_BYTES_MAX, GROUP_CONTENT_BYTES_MAX, GROUP_HEADER_BYTES, u16_at, u32_at, u64_at,
};
use crate::types::{BLOCK_BYTES, SECTOR_BYTES, SECTORS_PER_BLOCK};

/// First bytes of a data group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupHeader {
    pub(crate) crc: u32,
    pub(crate) stored_bytes: usize,
    pub(crate) raw_bytes: usize,
    pub(crate) number: usize,
    pub(crate) codec: u8,
    pub(crate) form: u8,
    pub(crate) first_seq: u64,
}

impl GroupHeader {
    /// Reads a header; not checked beyond the bounds of its lengths.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < GROUP_HEADER_BYTES {
            return None;
        }
        let header = Self {
            crc: u32_at(bytes, 0),
            stored_bytes: u32_at(bytes, 4) as usize,
            raw_bytes: u32_at(bytes, 8) as usize,
            number: usize::from(u16_at(bytes, 12)),
            codec: bytes[14],
            form: bytes[15],
            first_seq: u64_at(bytes, 16),
        };
        let sound =
            (1..=GROUP_BYTES_MAX).contains(&header.raw_bytes) && header.stored_bytes <= header.raw_bytes;
        sound.then_some(header)
    }

    /// Bytes of the group in the log, this header included.
    pub(crate) fn group_bytes(&self) -> usize {
        GROUP_HEADER_BYTES + self.stored_bytes
    }

    /// Are its raw bytes the data itself?
    pub(crate) fn is_plain(&self) -> bool {
        self.form == FORM_PLAIN
    }
}

/// Bytes of the group at the start of `bytes`, header included; nothing is checked. All of `bytes` if that is no group.
pub(crate) fn stored_group_bytes(bytes: &[u8]) -> usize {
    let header = GroupHeader::decode(bytes);
    header.map_or(bytes.len(), |header| bytes.len().min(header.group_bytes()))
}

/// Checks the group at the start of `bytes` and puts its raw bytes at the start of `raw`. `crc` comes from elsewhere
/// than the group, so that a good group in a wrong place fails too; without it, the group's own counts.
pub(crate) fn decode_group(bytes: &[u8], crc: Option<u32>, raw: &mut [u8]) -> Option<GroupHeader> {
    let header = GroupHeader::decode(bytes)?;
    let stored = bytes.get(GROUP_HEADER_BYTES..header.group_bytes())?;
    let found = crc32c::crc32c_append(crc32c::crc32c(&bytes[4..GROUP_HEADER_BYTES]), stored);
    if found != header.crc || crc.is_some_and(|crc| found != crc) {
        return None;
    }
    if !matches!(header.form, FORM_PLAIN | FORM_DIRECTORY) {
        return None;
    }
    let raw = raw.get_mut(..header.raw_bytes)?;
    match header.codec {
        CODEC_PLAIN if stored.len() == raw.len() => raw.copy_from_slice(stored),
        CODEC_LZ4 => decompress_into(stored, raw)?,
        CODEC_ZSTD => decompress_dense_into(stored, raw)?,
        _ => return None,
    }
    Some(header)
}

/// A block that is told by what differs from an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Delta {
    /// How many Seqs before the group's frame that of the base begins; 0: it is the same frame.
    pub(crate) frames_back: u32,
    /// Where the group of the base begins: in its frame, from the end of the record table; in the same frame, how
    /// many bytes before this group.
    pub(crate) group: u32,
    /// Where in the content of that group the base begins.
    pub(crate) sector: u16,
    /// Deltas to walk until whole bytes; more than those of the base.
    pub(crate) depth: u8,
    /// Of the content that comes out.
    pub(crate) crc: u32,
}

/// A stretch of a group's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Its bytes begin at this place of the raw bytes.
    Bytes(u32),
    Zero,
    /// Its patch lies there in the raw bytes.
    Delta(Delta, u32, u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// First byte of the content.
    at: u32,
    bytes: u32,
    kind: Kind,
}

/// What lies somewhere in a group.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    Bytes(&'a [u8]),
    /// That many zeroes.
    Zero(usize),
    /// These bytes of a block, which a patch at that place of the raw bytes makes.
    Delta {
        delta: &'a Delta,
        patch: Range<usize>,
        bytes: Range<usize>,
    },
}

/// A decoded group.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) header: GroupHeader,
    raw: Vec<u8>,
    /// Empty for a plain group.
    entries: Vec<Entry>,
    content_bytes: usize,
}

impl Group {
    /// Takes the raw bytes that [`decode_group`] gave. `None` if they make no sense.
    pub(crate) fn new(header: GroupHeader, raw: Vec<u8>) -> Option<Self> {
        let (entries, content_bytes) = if header.is_plain() {
            (Vec::new(), raw.len())
        } else {
            directory(&raw)?
        };
        Some(Self {
            header,
            raw,
            entries,
            content_bytes,
        })
    }

    #[cfg(test)]
    pub(crate) fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// Bytes of data in it.
    pub(crate) fn content_bytes(&self) -> usize {
        self.content_bytes
    }

    /// The patch of a delta that [`Group::piece`] or [`Group::block`] gave.
    pub(crate) fn patch(&self, patch: &Range<usize>) -> &[u8] {
        &self.raw[patch.clone()]
    }

    /// What the content holds at byte `at`, and at most `len` bytes of it; `None` past the end.
    pub(crate) fn piece(&self, at: usize, len: usize) -> Option<Piece<'_>> {
        if self.header.is_plain() {
            let end = self.raw.len().min(at.checked_add(len)?);
            return self
                .raw
                .get(at..end)
                .filter(|bytes| !bytes.is_empty())
                .map(Piece::Bytes);
        }
        let next = self.entries.partition_point(|entry| entry.at as usize <= at);
        let entry = self.entries.get(next.checked_sub(1)?)?;
        let skip = at - entry.at as usize;
        let len = len.min((entry.bytes as usize).checked_sub(skip)?);
        if len == 0 {
            return None;
        }
        Some(match &entry.kind {
            Kind::Bytes(from) => Piece::Bytes(self.raw.get(*from as usize + skip..)?.get(..len)?),
            Kind::Zero => Piece::Zero(len),
            Kind::Delta(delta, patch, patch_bytes) => Piece::Delta {
                delta,
                patch: *patch as usize..*patch as usize + usize::from(*patch_bytes),
                bytes: skip..skip + len,
            },
        })
    }
}

/// Reads the directory that begins `raw`. `None` unless it tells of each byte behind it just once.
fn directory(raw: &[u8]) -> Option<(Vec<Entry>, usize)> {
    let count = u32_at(raw.get(..4)?, 0) as usize;
    let table = raw.get(4..count.checked_mul(DIRECTORY_ENTRY_BYTES)?.checked_add(4)?)?;
    let mut entries = Vec::with_capacity(count);
    let mut from = 4 + table.len();
    let mut at = 0usize;
    for entry in table.chunks_exact(DIRECTORY_ENTRY_BYTES) {
        let number = u16_at(entry, 2);
        let run_bytes = usize::from(number) * SECTOR_BYTES as usize;
        let is_run = entry[1] == 0 && entry[4..].iter().all(|byte| *byte == 0) && number > 0;
        let (bytes, kind, taken) = match entry[0] {
            0 if is_run => (run_bytes, Kind::Bytes(from as u32), run_bytes),
            1 if is_run => (run_bytes, Kind::Zero, 0),
            2 => {
                let delta = Delta {
                    depth: entry[1],
                    sector: number,
                    frames_back: u32_at(entry, 4),
                    group: u32_at(entry, 8),
                    crc: u32_at(entry, 12),
                };
                let goes_back = delta.frames_back > 0
                    || delta.group > 0
                    || (u64::from(number) + SECTORS_PER_BLOCK) * SECTOR_BYTES <= at as u64;
                if !(1..=DELTA_DEPTH_MAX).contains(&delta.depth) || !goes_back {
                    return None;
                }
                let patch_bytes = delta::patch_bytes(raw.get(from..)?)?;
                let kind = Kind::Delta(delta, from as u32, u16::try_from(patch_bytes).ok()?);
                (BLOCK_BYTES as usize, kind, patch_bytes)
            }
            _ => return None,
        };
        entries.push(Entry {
            at: at as u32,
            bytes: bytes as u32,
            kind,
        });
        at += bytes;
        from += taken;
        if from > raw.len() || at > GROUP_CONTENT_BYTES_MAX {
            return None;
        }
    }
    (from == raw.len() && at > 0).then_some((entries, at))
}

/// A group under construction: what its directory says, and where the bytes it needs lie.
#[derive(Debug, Default)]
pub(super) struct Directory {
    entries: Vec<u8>,
    count: u32,
    /// Sectors of the last entry, if it is a run.
    last_run: Option<(u8, u16)>,
    is_plain: bool,
    /// Bytes of the runs and patches.
    behind_bytes: usize,
    content_bytes: usize,
}

/// What is put into a [`Directory`].
#[derive(Clone, Copy, Debug)]
pub(super) enum Add {
    /// Bytes as they are.
    Bytes(usize),
    /// Zeroes.
    Zero(usize),
    /// A block by a patch of so many bytes.
    Delta(Delta, usize),
}

impl Directory {
    pub(super) fn new() -> Self {
        Self {
            is_plain: true,
            ..Self::default()
        }
    }

    /// Would these, and `content_bytes` of data in them, fit?
    pub(super) fn fits(&self, adds: &[Add]) -> bool {
        let (mut behind, mut content, mut is_plain) = (self.behind_bytes, self.content_bytes, self.is_plain);
        for add in adds {
            match add {
                Add::Bytes(bytes) => (behind, content) = (behind + bytes, content + bytes),
                Add::Zero(bytes) => (content, is_plain) = (content + bytes, false),
                Add::Delta(_, patch_bytes) => {
                    (behind, content) = (behind + patch_bytes, content + BLOCK_BYTES as usize);
                    is_plain = false;
                }
            }
        }
        let directory = match is_plain {
            true => 0,
            // As if no run went on.
            false => 4 + self.entries.len() + adds.len() * DIRECTORY_ENTRY_BYTES,
        };
        directory + behind <= GROUP_BYTES_MAX && content <= GROUP_CONTENT_BYTES_MAX
    }

    pub(super) fn add(&mut self, add: &Add) {
        match add {
            Add::Bytes(bytes) => {
                self.add_run(0, *bytes);
                self.behind_bytes += bytes;
            }
            Add::Zero(bytes) => {
                self.is_plain = false;
                self.add_run(1, *bytes);
            }
            Add::Delta(delta, patch_bytes) => {
                self.is_plain = false;
                self.last_run = None;
                self.add_entry(
                    2,
                    delta.depth,
                    delta.sector,
                    [delta.frames_back, delta.group, delta.crc],
                );
                self.behind_bytes += patch_bytes;
                self.content_bytes += BLOCK_BYTES as usize;
            }
        }
    }

    fn add_run(&mut self, kind: u8, bytes: usize) {
        let sectors = (bytes / SECTOR_BYTES as usize) as u16;
        self.content_bytes += bytes;
        match &mut self.last_run {
            Some((last, run)) if *last == kind => {
                *run += sectors;
                let at = self.entries.len() - DIRECTORY_ENTRY_BYTES + 2;
                self.entries[at..at + 2].copy_from_slice(&run.to_le_bytes());
            }
            _ => {
                self.add_entry(kind, 0, sectors, [0; 3]);
                self.last_run = Some((kind, sectors));
            }
        }
    }

    fn add_entry(&mut self, kind: u8, depth: u8, number: u16, rest: [u32; 3]) {
        self.count += 1;
        self.entries.extend_from_slice(&[kind, depth]);
        self.entries.extend_from_slice(&number.to_le_bytes());
        for number in rest {
            self.entries.extend_from_slice(&number.to_le_bytes());
        }
    }

    pub(super) fn is_plain(&self) -> bool {
        self.is_plain
    }

    pub(super) fn content_bytes(&self) -> usize {
        self.content_bytes
    }

    /// The directory as it is stored before the bytes it tells of.
    pub(super) fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(&self.entries);
    }
}

/// The block that begins at `sector` of the content, as it lies there; `None` if none does.
pub(crate) enum Stored<'a> {
    Bytes(&'a Block),
    Zero,
    /// A delta, and where its patch lies in the raw bytes.
    Delta(&'a Delta, Range<usize>),
}

impl Group {
    /// A whole block of the content; `None` if there is none at `sector`.
    pub(crate) fn block(&self, sector: u16) -> Option<Stored<'_>> {
        let block_bytes = BLOCK_BYTES as usize;
        match self.piece(usize::from(sector) * SECTOR_BYTES as usize, block_bytes)? {
            Piece::Bytes(bytes) => bytes.try_into().ok().map(Stored::Bytes),
            Piece::Zero(bytes) if bytes == block_bytes => Some(Stored::Zero),
            Piece::Delta { delta, patch, bytes } if bytes == (0..block_bytes) => {
                Some(Stored::Delta(delta, patch))
            }
            _ => None,
        }
    }
}
