//! Bytes ↔ records. No I/O.
//!
//! All integers are little-endian. Checksums are CRC-32C.
//!
//! # Versions
//!
//! | Format | First in | Change | Read | Written |
//! |-------:|----------|--------|------|---------|
//! |      1 | 0.1      | first  | yes  | yes     |
//! |      2 | 0.1      | groups may be zstd | yes | segments, and frames with such a group |
//!
//! # Segment
//!
//! A file of the log, named by the first Seq in it: a header, then for every frame an *envelope* and the
//! frame. The envelope belongs to this log alone; the frame's bytes are the same wherever they lie.
//!
//! | at | bytes | segment header  | note                                                        |
//! |---:|------:|-----------------|-------------------------------------------------------------|
//! |  0 |     4 | magic           | `CDPS`                                                      |
//! |  4 |     4 | format          | readable knowing nothing else                               |
//! |  8 |    16 | store uuid      | a segment of another store is not read                      |
//! | 24 |     8 | first Seq       | equals the file's name                                      |
//! | 32 |    28 | zero            |                                                             |
//! | 60 |     4 | CRC             | of bytes 0..60                                              |
//!
//! | at | bytes | envelope        | note                                                        |
//! |---:|------:|-----------------|-------------------------------------------------------------|
//! |  0 |     4 | magic           | `CDPE`                                                      |
//! |  4 |     4 | CRC             | of bytes 8..32                                              |
//! |  8 |     8 | frame bytes     |                                                             |
//! | 16 |     8 | first Seq       | of the frame                                                |
//! | 24 |     8 | durable Seq     | last record known to be durable when this was written, or 0 |
//!
//! The durable Seq decides recovery: writes that were not synced may land out of order, so a bad frame
//! before a good one is damage only if some later envelope says that it had been durable.
//!
//! # Frame
//!
//! | at  | bytes | frame header     | note                                                      |
//! |----:|------:|------------------|-----------------------------------------------------------|
//! |   0 |     4 | magic            | `CDPF`                                                    |
//! |   4 |     4 | format           | readable knowing nothing else                             |
//! |   8 |     8 | first Seq        | records are numbered from here on                         |
//! |  16 |     4 | frame bytes      | all of it; a multiple of 8                                |
//! |  20 |     4 | record count     | 1 to 8192                                                 |
//! |  24 |     4 | group count      |                                                           |
//! |  28 |     4 | table raw bytes  |                                                           |
//! |  32 |     4 | table bytes      | as stored                                                 |
//! |  36 |     4 | table CRC        | of the bytes as stored                                    |
//! |  40 |     1 | table codec      | 0 plain, 1 LZ4 block                                      |
//! |  41 |     7 | zero             |                                                           |
//! |  48 |    16 | boot id          |                                                           |
//! |  64 |     8 | wall offset ns   | wall time = boot time + this; sampled at the seal         |
//! |  72 |     8 | smallest boot ns |                                                           |
//! |  80 |     8 | largest boot ns  |                                                           |
//! |  88 |     4 | zero             |                                                           |
//! |  92 |     4 | header CRC       | of bytes 0..92, so a torn length is never trusted         |
//!
//! Then the table as stored, then the groups, then zeroes up to a multiple of 8.
//!
//! The raw table is one entry for each record, one for each group, then the tails of the records.
//!
//! | at | bytes | record          | note                                                        |
//! |---:|------:|-----------------|-------------------------------------------------------------|
//! |  0 |     1 | kind            | see [`Body`]                                                |
//! |  1 |     1 | detail          | gap cause, volume kind                                      |
//! |  2 |     2 | volume          | 0: none                                                     |
//! |  4 |     4 | pid             | thread group id                                             |
//! |  8 |     8 | boot ns         |                                                             |
//! | 16 |     8 | offset          |                                                             |
//! | 24 |     8 | length          | or the volume's bytes                                       |
//! | 32 |     8 | other Seq       | `as_of`, `last_exact`; 0: before everything                 |
//! | 40 |    16 | command name    | zero padded                                                 |
//! | 56 |     4 | flags           | see [`RecordFlags`]                                         |
//! | 60 |     4 | tail bytes      |                                                             |
//!
//! A group's entry is its stored bytes (4), its CRC (4), the bytes of data in it (4), its form (1) and zero (3), so that
//! the index needs no look at the groups.
//!
//! Tails: a volume's is the length of its name (2), the name, the path; a bookmark's is its label; a
//! start's is the agent's uuid (16) and the boot id (16).
//!
//! # Groups
//!
//! | at | bytes | group header    | note                                                        |
//! |---:|------:|-----------------|-------------------------------------------------------------|
//! |  0 |     4 | CRC             | of bytes 4..24 and the bytes as stored                      |
//! |  4 |     4 | stored bytes    |                                                             |
//! |  8 |     4 | raw bytes       | 1 to 65536                                                  |
//! | 12 |     2 | group number    | in the frame                                                |
//! | 14 |     1 | codec           | 0 plain, 1 LZ4 block, 2 zstd frame (from format 2 on)       |
//! | 15 |     1 | form            | 0 plain, 1 directory                                        |
//! | 16 |     8 | first Seq       | of the frame                                                |
//!
//! The data of a frame's records, in order, cut into groups that are compressed apart, so that one block
//! is read back cheaply. The data of a record is cut at device addresses into *parts*: a whole aligned unit
//! (64 KiB) is one part, else every block (4 KiB, or the piece of it) is one. A group holds whole parts, so
//! no block ever straddles groups. Which parts follows from the bytes of data that the table tells of each group.
//!
//! Raw bytes of the plain form are the data itself. Those of the other are the number of entries of a directory (4),
//! the entries, and behind them, in the same order, what each of them takes. Together the entries tell of all data of
//! the group, piece by piece:
//!
//! | at | bytes | entry           | note                                                        |
//! |---:|------:|-----------------|-------------------------------------------------------------|
//! |  0 |     1 | kind            | 0 bytes, 1 zeroes, 2 delta                                  |
//! |  1 |     1 | depth           | of a delta: 1 to 8, more than its base has; else 0          |
//! |  2 |     2 | sectors         | of a delta: where in its group's data the base begins       |
//! |  4 |     4 | frames back     | of a delta, see below; else 0                               |
//! |  8 |     4 | group           | the same                                                    |
//! | 12 |     4 | content CRC     | the same                                                    |
//!
//! Bytes take themselves, zeroes nothing, a delta its patch, whose layout `delta.rs` tells.
//!
//! # Deltas
//!
//! A *delta* is a whole block told by what differs from its *base*, a whole block of earlier data. The base is named by
//! where it lies, the same wherever the frames lie: the frame that begins so many Seqs earlier; in it the group that
//! begins so many bytes behind the record table, or, in the delta's own frame, so many bytes before the delta's own group
//! (0: in that very group, before the delta); in its data the sector. So a base is always earlier, and never changes.
//! Which block of which volume it was does not matter: the content CRC says whether what comes out is what was captured.
//! The base may be a delta too, of a smaller depth.
//!
//! Data that was read back, and pieces of blocks, are never deltas: what mends history must not rest on it.
//!
//! A whole unit that was read back, of which `ALONE_BYTES_MIN` or more are not zero, gets a group of its own, so that the
//! same content is stored as the same bytes wherever it lies in a frame: see `packed.rs`. A reader does not rely on it.
//!
//! Golden bytes: `frame_1_is_exactly_these_bytes`, `directories_1_are_exactly_these_bytes`,
//! `segment_2_is_exactly_these_bytes`, `frame_2_is_read`.

mod bases;
mod build;
mod delta;
mod encode;
mod frame;
mod group;
mod packed;
mod record;
mod segment;

pub use bases::{DeltaCache, EncodedBlocks, Packing};
pub use build::{FrameBuilder, PushError, SealedFrame};
pub(crate) use delta::{Block, apply as apply_patch};
pub use frame::{Frame, FrameError, FrameHeader, GroupRef, Part, PlacedRecord};
pub(crate) use group::{Delta, Group, GroupHeader, Piece, Stored, decode_group, stored_group_bytes};
pub(crate) use packed::refill;
pub use packed::{FRAME_UNITS_MAX, PackedUnit, RefillError, UnitHash};
pub use record::{Body, GapCause, Origin, Record, RecordFlags, VolumeKind};
pub(crate) use segment::{Envelope, SegmentHeader, SegmentHeaderError};

/// The newest format that this build reads, and that of its segments. A frame has the oldest that can tell it.
pub const FORMAT: u32 = 2;
pub(crate) const FORMAT_FIRST: u32 = 1;
pub(crate) const FORMAT_ZSTD: u32 = 2;
/// Data of one record at most; longer bios become several records of one time.
pub const RECORD_DATA_BYTES_MAX: usize = 1 << 20;
/// A volume at most (1 PiB): what is zeroed in one record costs the index an entry for each 4 GiB.
pub const VOLUME_BYTES_MAX: u64 = 1 << 50;
/// Zeroed without data by all records of one frame together, at most (1 PiB), for the same reason.
pub const FRAME_ZEROED_BYTES_MAX: u64 = VOLUME_BYTES_MAX;
/// Data of one frame at most.
pub const FRAME_DATA_BYTES_MAX: usize = 2 << 20;
/// Records in one frame at most.
pub const FRAME_RECORDS_MAX: usize = 8192;
/// Name, path or label of a record at most.
pub const TAIL_BYTES_MAX: usize = 8192;
/// Tails of one frame at most.
pub const FRAME_TAIL_BYTES_MAX: usize = 256 << 10;
/// Raw bytes of one group at most.
pub const GROUP_BYTES_MAX: usize = 64 << 10;
/// Data of one group at most: of which that much is stored, or told by less.
pub const GROUP_CONTENT_BYTES_MAX: usize = 256 << 10;
/// Deltas to walk at most until whole bytes.
pub const DELTA_DEPTH_MAX: u8 = 8;
/// Whole frame at most: what a reader allocates before it has checked more than the header.
pub const FRAME_BYTES_MAX: usize = 4 << 20;

pub(crate) const FRAME_HEADER_BYTES: usize = 96;
pub(crate) const RECORD_ENTRY_BYTES: usize = 64;
pub(crate) const GROUP_ENTRY_BYTES: usize = 16;
pub(crate) const GROUP_HEADER_BYTES: usize = 24;
pub(crate) const DIRECTORY_ENTRY_BYTES: usize = 16;
/// Bytes before the first envelope of a segment.
pub(crate) const SEGMENT_HEADER_BYTES: usize = 64;
/// Bytes before each frame in a segment.
pub(crate) const ENVELOPE_BYTES: usize = 32;
pub(crate) const FRAME_ALIGN_BYTES: usize = 8;

pub(crate) const CODEC_PLAIN: u8 = 0;
pub(crate) const CODEC_LZ4: u8 = 1;
pub(crate) const CODEC_ZSTD: u8 = 2;

pub(crate) const FORM_PLAIN: u8 = 0;
pub(crate) const FORM_DIRECTORY: u8 = 1;

/// Bytes that a whole unit that was read back must take to get a group of its own.
pub(crate) const ALONE_BYTES_MIN: usize = 16 << 10;

/// Groups of one frame at most. A group that is closed and the one after it hold nearly more than one group's worth
/// together (what a directory tells is never less than it takes, and the directory itself is small), so there are hardly
/// twice as many as would fit exactly. A unit with a group of its own is a group's worth by itself: it and the group that
/// it closes early are no more than two for what it holds.
pub(crate) const FRAME_GROUPS_MAX: usize = 2 * FRAME_DATA_BYTES_MAX / GROUP_BYTES_MAX + 8;

const _: () = assert!(GROUP_BYTES_MAX as u64 == crate::UNIT_BYTES); // a unit lies in one group
const _: () = assert!(GROUP_CONTENT_BYTES_MAX / 512 <= i16::MAX as usize); // as the index tells a place in it
const _: () = assert!(FRAME_DATA_BYTES_MAX >= RECORD_DATA_BYTES_MAX); // every record fits a frame
const _: () = assert!(FRAME_ZEROED_BYTES_MAX >= VOLUME_BYTES_MAX); // also one that zeroes the largest volume
const _: () = assert!(FRAME_GROUPS_MAX <= u16::MAX as usize);
const _: () = assert!(FRAME_HEADER_BYTES.is_multiple_of(FRAME_ALIGN_BYTES));
const _: () = assert!(ENVELOPE_BYTES.is_multiple_of(FRAME_ALIGN_BYTES));
const _: () = assert!(
    FRAME_BYTES_MAX
        >= FRAME_HEADER_BYTES
            + FRAME_RECORDS_MAX * RECORD_ENTRY_BYTES
            + FRAME_TAIL_BYTES_MAX
            + FRAME_DATA_BYTES_MAX
            + FRAME_GROUPS_MAX * (GROUP_ENTRY_BYTES + GROUP_HEADER_BYTES)
            + FRAME_ALIGN_BYTES
);

/// Reads `N` bytes at `at`; a short slice is a bug of the caller, who has checked the length.
pub(crate) fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, at))
}

pub(crate) fn i64_at(bytes: &[u8], at: usize) -> i64 {
    i64::from_le_bytes(bytes_at(bytes, at))
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::with_raw_group;
