//! FIEMAP: where the bytes of a file lie on the device of its file system, as the kernel tells
//! (`linux/fiemap.h`).

#![expect(unsafe_code, reason = "an ioctl")]

use std::fs::File;
use std::ops::{BitOr, ControlFlow, Range};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// Extents that are asked for at once.
const EXTENTS: usize = 128;
/// The head of [`Request`] counts for the number of the call.
const FS_IOC_FIEMAP: Opcode = opcode::read_write::<[u64; 4]>(b'f', 11);

/// What is special about an extent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Flags(u32);

impl Flags {
    /// The last of the file.
    const LAST: Flags = Flags(0x1);
    /// Nobody knows where it is, yet (which includes what waits to be given a place).
    pub(super) const UNKNOWN: Flags = Flags(0x2 | 0x4);
    /// Packed or otherwise not byte by byte on the disk.
    pub(super) const ENCODED: Flags = Flags(0x8);
    pub(super) const ENCRYPTED: Flags = Flags(0x80);
    /// May begin anywhere.
    pub(super) const NOT_ALIGNED: Flags = Flags(0x100);
    /// Among the file system's own structures.
    pub(super) const INLINE: Flags = Flags(0x200 | 0x400);
    /// Reserved, and read as zeroes.
    pub(super) const UNWRITTEN: Flags = Flags(0x800);

    pub(super) fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    pub(super) fn intersects(self, other: Flags) -> bool {
        self.0 & other.0 != 0
    }
}

impl BitOr for Flags {
    type Output = Flags;

    fn bitor(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }
}

/// Bytes of a file that lie together.
#[derive(Clone, Debug)]
pub(super) struct Extent {
    pub(super) in_file: Range<u64>,
    /// The first of them, as the file system counts.
    pub(super) place: u64,
    pub(super) flags: Flags,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap`, with its extents.
#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [RawExtent; EXTENTS],
}

const _: () = assert!(size_of::<RawExtent>() == 56);
const _: () = assert!(size_of::<Request>() == size_of::<[u64; 4]>() + EXTENTS * size_of::<RawExtent>());

/// Gives `visit` each extent, in order, until it breaks.
pub(super) fn each(file: &File, mut visit: impl FnMut(Extent) -> ControlFlow<()>) -> Result<(), Errno> {
    let mut start = 0;
    loop {
        let mut request = Box::new(Request {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped_extents: 0,
            extent_count: EXTENTS as u32,
            reserved: 0,
            extents: [RawExtent::default(); EXTENTS],
        });
        // SAFETY: `Request` is laid out as the kernel wants it, and has room for as many extents as it says.
        unsafe { ioctl(file, Updater::<FS_IOC_FIEMAP, Request>::new(&mut *request))? };
        let count = (request.mapped_extents as usize).min(EXTENTS);
        for raw in &request.extents[..count] {
            let extent = Extent {
                in_file: raw.logical..raw.logical.saturating_add(raw.length),
                place: raw.physical,
                flags: Flags(raw.flags),
            };
            // An extent that does not go on would have us ask for ever.
            let goes_on = extent.in_file.end > start;
            start = extent.in_file.end.max(start);
            let is_last = extent.flags.contains(Flags::LAST);
            if visit(extent).is_break() || is_last || !goes_on {
                return Ok(());
            }
        }
        if count < EXTENTS {
            return Ok(());
        }
    }
}
