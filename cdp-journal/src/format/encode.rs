//! From the data of records to groups.
//!
//! Works in place: the data lies behind the room where the groups go, and what is stored of a group is never longer than
//! its data and a header.

use zstd::bulk::Compressor;

use super::bases::{DeltaCache, Home, Packing};
use super::delta::{self, Block};
use super::group::{Add, Delta, Directory};
use super::{
    ALONE_BYTES_MIN, CODEC_LZ4, CODEC_PLAIN, CODEC_ZSTD, DELTA_DEPTH_MAX, FORM_DIRECTORY, FORM_PLAIN,
    FORMAT_FIRST, FORMAT_ZSTD, GROUP_BYTES_MAX, GROUP_HEADER_BYTES,
};
use crate::format::build::parts;
use crate::types::{BLOCK_BYTES, SECTOR_BYTES, Seq, UNIT_BYTES};

const BLOCK: usize = BLOCK_BYTES as usize;
/// What is tried of a group before all of it is compressed.
const SAMPLE_BYTES: usize = 4096;
/// Samples must get shorter by one part in so many: less is not worth the host's time.
const SAVED_PART_MIN: usize = 8;
/// Of zstd: higher ones take far more time and save little.
const ZSTD_LEVEL: i32 = 1;
/// What a thread keeps at most to compress into: enough for a group.
const SCRATCH_KEPT_BYTES: usize = 2 * GROUP_BYTES_MAX;

/// The data of one record.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub(super) volume: u16,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// It was captured; else it was read back, to mend what history lacks.
    pub(super) is_captured: bool,
}

/// Memory of a thread that encodes.
pub(super) struct Scratch {
    pub(super) stored: Vec<u8>,
    /// Made when it is first needed.
    dense: Option<Compressor<'static>>,
    raw: Vec<u8>,
    patches: Vec<u8>,
    adds: Vec<Add>,
}

impl Scratch {
    pub(super) const fn new() -> Self {
        Self {
            stored: Vec::new(),
            dense: None,
            raw: Vec::new(),
            patches: Vec::new(),
            adds: Vec::new(),
        }
    }

    pub(super) fn shrink(&mut self) {
        if self.stored.len() > SCRATCH_KEPT_BYTES {
            self.stored = Vec::new();
        }
    }
}

/// LZ4 of `raw` at the start of `scratch`, if it is shorter.
pub(super) fn compress<'s>(raw: &[u8], scratch: &'s mut Vec<u8>) -> Option<&'s [u8]> {
    let bytes_max = lz4::block::compress_bound(raw.len()).ok()?;
    if scratch.len() < bytes_max {
        scratch.resize(bytes_max, 0);
    }
    // The C encoder takes about half the time of a safe one in Rust.
    let bytes = lz4::block::compress_to_buffer(raw, None, false, scratch).ok()?;
    (bytes < raw.len()).then(|| &scratch[..bytes])
}

/// zstd of `raw` at the start of `scratch`, if it is shorter.
fn compress_densely<'s>(
    raw: &[u8],
    scratch: &'s mut Vec<u8>,
    dense: &mut Option<Compressor<'static>>,
) -> Option<&'s [u8]> {
    let bytes_max = zstd::zstd_safe::compress_bound(raw.len());
    if scratch.len() < bytes_max {
        scratch.resize(bytes_max, 0);
    }
    let compressor = match dense {
        Some(compressor) => compressor,
        None => dense.insert(Compressor::new(ZSTD_LEVEL).ok()?),
    };
    let bytes = compressor.compress_to_buffer(raw, &mut scratch[..]).ok()?;
    (bytes < raw.len()).then(|| &scratch[..bytes])
}

/// Is so little to be gained from compressing a group that it is stored as it is? Two samples tell noise (encrypted or
/// compressed data) from the rest, so that it costs a fraction of the time to find that.
fn is_noise(raw: &[u8], packing: Packing, scratch: &mut Vec<u8>) -> bool {
    let mut saves = |sample: &[u8]| {
        compress(sample, scratch)
            .is_some_and(|shorter| shorter.len() <= sample.len() - sample.len() / SAVED_PART_MIN)
            || packing == Packing::Dense && has_few_bytes(sample)
    };
    let middle = raw.len() / 2;
    raw.len() >= 4 * SAMPLE_BYTES
        && !saves(&raw[..SAMPLE_BYTES])
        && !saves(&raw[middle..middle + SAMPLE_BYTES])
}

/// Are some byte values so frequent that codes of different lengths save one part in [`SAVED_PART_MIN`], as of digits and
/// text? Of zstd, that is: LZ4 has no such codes.
fn has_few_bytes(sample: &[u8]) -> bool {
    let mut counts = [0u16; 256];
    for byte in sample {
        counts[usize::from(*byte)] += 1;
    }
    let bytes = sample.len() as f32;
    let bits: f32 = counts
        .iter()
        .filter(|count| **count > 0)
        .map(|&count| f32::from(count) * (bytes / f32::from(count)).log2())
        .sum();
    bits <= 8.0 * bytes * (1.0 - 1.0 / SAVED_PART_MIN as f32)
}

const _: () = assert!(SAMPLE_BYTES <= u16::MAX as usize);

/// Where the bytes lie that an entry of the open group's directory takes.
#[derive(Clone, Copy, Debug)]
enum Behind {
    /// In the data.
    Data(usize, usize),
    /// Among the patches.
    Patch(usize, usize),
}

/// Turns data into groups.
pub(super) struct GroupEncoder<'a> {
    first_seq: Seq,
    /// Room, data; then groups, and data that is still to be done.
    bytes: &'a mut Vec<u8>,
    /// Where the first group begins.
    groups_at: usize,
    /// Where the next group goes.
    end: usize,
    /// The data that was not looked at yet.
    next: usize,
    cache: &'a mut DeltaCache,
    scratch: &'a mut Scratch,
    open: Directory,
    /// The open group is for the unit in it alone.
    open_is_alone: bool,
    /// Where the data of the open group begins.
    open_from: usize,
    behind: Vec<Behind>,
    number: u16,
    entries: Vec<u8>,
    /// That it takes to tell the groups.
    format: u32,
}

impl<'a> GroupEncoder<'a> {
    /// Groups go to `groups_at` of `bytes`, whose data begins at `data_at`.
    pub(super) fn new(
        first_seq: Seq,
        bytes: &'a mut Vec<u8>,
        groups_at: usize,
        data_at: usize,
        cache: &'a mut DeltaCache,
        scratch: &'a mut Scratch,
    ) -> Self {
        scratch.patches.clear();
        Self {
            first_seq,
            bytes,
            groups_at,
            end: groups_at,
            next: data_at,
            cache,
            scratch,
            open: Directory::new(),
            open_is_alone: false,
            open_from: data_at,
            behind: Vec::new(),
            number: 0,
            entries: Vec::new(),
            format: FORMAT_FIRST,
        }
    }

    pub(super) fn encode(&mut self, extents: &[Extent]) {
        for extent in extents {
            for (offset, len) in parts(extent.offset, extent.len) {
                self.part(extent, offset, len);
            }
        }
    }

    /// Writes the last group; the groups' entries in the record table, and the format that it takes to tell them.
    pub(super) fn finish(mut self) -> (Vec<u8>, u32) {
        self.close();
        self.bytes.truncate(self.end);
        (self.entries, self.format)
    }

    fn part(&mut self, extent: &Extent, offset: u64, len: usize) {
        let from = self.next;
        let patches_from = self.scratch.patches.len();
        self.scratch.adds.clear();
        for at in (0..len).step_by(BLOCK) {
            let add = match self.bytes[from + at..].first_chunk::<BLOCK>() {
                Some(content) if len - at >= BLOCK => {
                    let name = (extent.volume, (offset + at as u64) / BLOCK_BYTES);
                    let scratch = &mut *self.scratch;
                    decide(
                        self.first_seq,
                        self.cache,
                        name,
                        content,
                        extent.is_captured,
                        &mut scratch.patches,
                    )
                }
                _ => Add::Bytes((len - at).min(BLOCK)),
            };
            self.scratch.adds.push(add);
        }
        let is_alone = !extent.is_captured && is_alone(&self.scratch.adds);
        if !is_alone && !self.open_is_alone && self.open.fits(&self.scratch.adds) {
            self.place(extent, offset, patches_from);
        } else {
            self.close();
            self.scratch.patches.drain(..patches_from);
            self.place(extent, offset, 0);
            self.open_is_alone = is_alone;
        }
        self.next = from + len;
    }

    /// Puts what was decided on into the open group.
    fn place(&mut self, extent: &Extent, offset: u64, patches_from: usize) {
        let group = (self.end - self.groups_at) as u32;
        let adds = std::mem::take(&mut self.scratch.adds);
        let (mut data_at, mut patch_at) = (self.next, patches_from);
        for (index, add) in adds.iter().enumerate() {
            let sector = (self.open.content_bytes() as u64 / SECTOR_BYTES) as u16;
            let (mut add, mut depth, mut bytes) = (*add, 0, BLOCK);
            let is_base = match &mut add {
                Add::Bytes(len) => {
                    bytes = *len;
                    self.behind.push(Behind::Data(data_at, *len));
                    *len == BLOCK
                }
                Add::Zero(_) => false,
                Add::Delta(delta, patch_bytes) => {
                    depth = delta.depth;
                    if delta.frames_back == 0 {
                        delta.group = group - delta.group;
                    }
                    self.behind.push(Behind::Patch(patch_at, *patch_bytes));
                    patch_at += *patch_bytes;
                    // The same content lies with fewer deltas to walk where it was.
                    *patch_bytes > delta::EMPTY_BYTES
                }
            };
            self.open.add(&add);
            if is_base && let Some(content) = self.bytes[data_at..].first_chunk::<BLOCK>() {
                let name = (extent.volume, (offset + (index * BLOCK) as u64) / BLOCK_BYTES);
                let home = Home {
                    frame: self.first_seq,
                    group,
                    sector,
                    depth,
                };
                self.cache.put(name, content, home, extent.is_captured);
            }
            data_at += bytes;
        }
        self.scratch.adds = adds;
    }

    /// Writes the open group, if it holds anything.
    fn close(&mut self) {
        let open = std::mem::replace(&mut self.open, Directory::new());
        let content_bytes = open.content_bytes();
        if content_bytes == 0 {
            return;
        }
        let Scratch {
            stored,
            dense,
            raw,
            patches,
            ..
        } = &mut *self.scratch;
        let plain = self.open_from..self.open_from + content_bytes;
        raw.clear();
        let mut behind_at = 0;
        if !open.is_plain() {
            open.encode_into(raw);
            behind_at = raw.len();
            for behind in &self.behind {
                raw.extend_from_slice(match behind {
                    Behind::Data(at, len) => &self.bytes[*at..at + len],
                    Behind::Patch(at, len) => &patches[*at..at + len],
                });
            }
        }
        let (data, probe) = match open.is_plain() {
            true => (&self.bytes[plain.clone()], &self.bytes[plain.clone()]),
            false => (&raw[..], &raw[behind_at..]),
        };
        let raw_bytes = data.len();
        // A unit by itself is the same bytes wherever its content is read back: always by the same codec.
        let packing = match self.open_is_alone {
            true => Packing::Quick,
            false => self.cache.packing,
        };
        let shorter = match packing {
            Packing::Plain => None,
            _ if is_noise(probe, packing, stored) => None,
            Packing::Quick => compress(data, stored),
            Packing::Dense => compress_densely(data, stored, dense),
        };
        let stored_at = self.end + GROUP_HEADER_BYTES;
        debug_assert!(stored_at + shorter.map_or(raw_bytes, <[u8]>::len) <= plain.end);
        let codec = match shorter {
            Some(stored) => {
                self.end = stored_at + stored.len();
                self.bytes[stored_at..self.end].copy_from_slice(stored);
                match packing {
                    Packing::Dense => CODEC_ZSTD,
                    Packing::Plain | Packing::Quick => CODEC_LZ4,
                }
            }
            None => {
                self.end = stored_at + raw_bytes;
                match open.is_plain() {
                    true => self.bytes.copy_within(plain.clone(), stored_at),
                    false => self.bytes[stored_at..self.end].copy_from_slice(raw),
                }
                CODEC_PLAIN
            }
        };
        let form = if open.is_plain() {
            FORM_PLAIN
        } else {
            FORM_DIRECTORY
        };
        let (header, stored) =
            self.bytes[stored_at - GROUP_HEADER_BYTES..self.end].split_at_mut(GROUP_HEADER_BYTES);
        if codec == CODEC_ZSTD {
            self.format = FORMAT_ZSTD;
        }
        header.fill(0);
        header[4..8].copy_from_slice(&(stored.len() as u32).to_le_bytes());
        header[8..12].copy_from_slice(&(raw_bytes as u32).to_le_bytes());
        header[12..14].copy_from_slice(&self.number.to_le_bytes());
        header[14] = codec;
        header[15] = form;
        header[16..24].copy_from_slice(&self.first_seq.get().to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[4..]), stored);
        header[..4].copy_from_slice(&crc.to_le_bytes());
        for number in [stored.len() as u32, crc, content_bytes as u32, u32::from(form)] {
            self.entries.extend_from_slice(&number.to_le_bytes());
        }
        self.number += 1;
        self.open_from = plain.end;
        self.behind.clear();
    }
}

/// Does what was read back get a group of its own? A whole unit does that is not nearly all zeroes.
fn is_alone(adds: &[Add]) -> bool {
    let bytes = adds.iter().map(|add| match add {
        Add::Bytes(bytes) => (*bytes, *bytes),
        Add::Zero(bytes) => (0, *bytes),
        Add::Delta(_, patch_bytes) => (*patch_bytes, BLOCK),
    });
    let (taken, told) = bytes.fold((0, 0), |sum, add| (sum.0 + add.0, sum.1 + add.1));
    told == UNIT_BYTES as usize && taken >= ALONE_BYTES_MIN
}

/// How to store a block. Of a base in the same frame, `group` is where the base's group begins.
fn decide(
    first_seq: Seq,
    cache: &mut DeltaCache,
    name: (u16, u64),
    content: &Block,
    is_captured: bool,
    patches: &mut Vec<u8>,
) -> Add {
    if *content == [0; BLOCK] {
        cache.counts.zero += 1;
        return Add::Zero(BLOCK);
    }
    let delta = is_captured
        .then(|| delta_to(first_seq, cache, name, content, patches))
        .flatten();
    if delta.is_none() {
        cache.counts.whole += 1;
    }
    delta.unwrap_or(Add::Bytes(BLOCK))
}

fn delta_to(
    first_seq: Seq,
    cache: &mut DeltaCache,
    name: (u16, u64),
    content: &Block,
    patches: &mut Vec<u8>,
) -> Option<Add> {
    let (base, home) = cache.get(name)?;
    let frames_back = u32::try_from(first_seq.get() - home.frame.get()).ok()?;
    if home.depth >= DELTA_DEPTH_MAX {
        cache.counts.at_depth_max += 1;
        return None;
    }
    let from = patches.len();
    if !delta::diff(base, content, patches) {
        return None;
    }
    let patch_bytes = patches.len() - from;
    match patch_bytes {
        delta::EMPTY_BYTES => cache.counts.repeated += 1,
        _ => cache.counts.patched += 1,
    }
    let delta = Delta {
        frames_back,
        group: home.group,
        sector: home.sector,
        depth: home.depth + 1,
        crc: crc32c::crc32c(content),
    };
    Some(Add::Delta(delta, patch_bytes))
}
