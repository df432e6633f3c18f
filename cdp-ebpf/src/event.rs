//! The events in the ring, in the order in which the kernel reserved them.
//!
//! A write bio is one [`WriteEvent`] with its bytes behind it, or several (*chunks*) where it is larger
//! than [`CHUNK_BYTES`]; all chunks of a bio carry the same `bio` and `boot_ns`. Each part of a bio that
//! completes is one [`CompleteEvent`]; where its pages were changed meanwhile, one of kind
//! [`EventKind::Changed`] stands before it. The kernel rounds records up to 8 bytes, so a length is always
//! taken from the event itself.

use core::mem::size_of;

/// The unit of all kernel addresses on a disk.
pub const SECTOR_BYTES: u64 = 512;

/// The most bytes of one bio that travel in one event. Chunks end at multiples of [`CHUNK_ALIGN_BYTES`]
/// on the disk, so that a large sequential write is cut where the index cuts it.
pub const CHUNK_BYTES: u32 = 256 * 1024;

/// See [`CHUNK_BYTES`]; a power of two.
pub const CHUNK_ALIGN_BYTES: u32 = 64 * 1024;

const _: () = assert!(CHUNK_BYTES.is_multiple_of(CHUNK_ALIGN_BYTES));
const _: () = assert!(CHUNK_ALIGN_BYTES.is_power_of_two());

/// First field of every event.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A [`WriteEvent`], its data behind it.
    Write = 1,
    /// A [`CompleteEvent`].
    Complete = 2,
    /// A [`CompleteEvent`] that tells where pages of the page cache were changed while they were written:
    /// the disk may have got other bytes than the [`WriteEvent`] holds.
    Changed = 3,
}

/// What a bio does to the disk, in our own codes: the kernel's differ between versions.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Bytes follow.
    Write = 1,
    /// The range reads as zeroes afterwards; no bytes.
    Zero = 2,
    /// The range is given up (discard, secure erase); no bytes.
    Discard = 3,
    /// A flush without data.
    Flush = 4,
}

impl Op {
    /// The operation with this code.
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Write),
            2 => Some(Self::Zero),
            3 => Some(Self::Discard),
            4 => Some(Self::Flush),
            _ => None,
        }
    }
}

/// The bio asked for a flush of the disk's cache first.
pub const FLAG_PREFLUSH: u8 = 1;
/// The bio asked to be on stable media when it completes.
pub const FLAG_FUA: u8 = 2;
/// The bio was marked synchronous: somebody waits for it.
pub const FLAG_SYNC: u8 = 4;
/// The bio carries a file system's metadata.
pub const FLAG_META: u8 = 8;

/// One write bio, or one chunk of it, as it was queued.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WriteEvent {
    /// [`EventKind::Write`].
    pub kind: u8,
    /// An [`Op`].
    pub op: u8,
    /// `FLAG_*`.
    pub flags: u8,
    /// 1 in the last chunk of its bio.
    pub last: u8,
    /// The whole disk, as the kernel numbers it: major in the upper 12 bits, minor in the lower 20.
    pub disk: u32,
    /// The bio's address: its identity while it is in flight.
    pub bio: u64,
    /// Boot-time clock when the bio was queued.
    pub boot_ns: u64,
    /// First sector of this chunk, counted from the start of the disk.
    pub sector: u64,
    /// Bytes of the range that this event speaks of; for [`Op::Write`] as many follow.
    pub bytes: u32,
    /// Process (thread group) that queued the bio. For writeback this is the kernel's flusher, not the
    /// process that dirtied the page.
    pub pid: u32,
    /// Command name of the task that queued the bio, padded with zeroes.
    pub comm: [u8; 16],
}

/// A part of the disk whose write has ended, well or badly.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CompleteEvent {
    /// [`EventKind::Complete`] or [`EventKind::Changed`].
    pub kind: u8,
    /// An [`Op`].
    pub op: u8,
    /// 0 if the write succeeded.
    pub failed: u8,
    /// 1 if a bio-based driver completed the bio as a whole: match by `bio`; else match by range.
    pub whole_bio: u8,
    /// As in [`WriteEvent`].
    pub disk: u32,
    /// The bio's address if `whole_bio`, else 0.
    pub bio: u64,
    /// Boot-time clock.
    pub boot_ns: u64,
    /// First sector, counted from the start of the disk.
    pub sector: u64,
    /// Length of the range. [`EventKind::Changed`] of a whole bio speaks of all of it.
    pub bytes: u32,
    /// Always 0.
    pub reserved: u32,
}

// No padding: it would carry bytes of the kernel's stack to user space.
const _: () = assert!(size_of::<WriteEvent>() == 4 + 4 + 8 + 8 + 8 + 4 + 4 + 16);
const _: () = assert!(size_of::<CompleteEvent>() == 4 + 4 + 8 + 8 + 8 + 4 + 4);
