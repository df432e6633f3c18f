//! Chunks of btrfs: from its own addresses to places on the device (`linux/btrfs_tree.h`).
//!
//! Only a btrfs of one device can be mounted from one volume, so which device a copy lies on is not asked.

#![expect(unsafe_code, reason = "an ioctl")]

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

const CHUNK_TREE: u64 = 3;
const FIRST_CHUNK: u64 = 256;
const CHUNK_ITEM: u32 = 228;
/// RAID 0, 10, 5 and 6: what lies behind each other is spread over copies.
const STRIPED: u64 = 1 << 3 | 1 << 6 | 1 << 7 | 1 << 8;
/// Chunks of one file system that are looked at; there are some thousands on a disk of many TiB.
const CHUNKS_MAX: usize = 1 << 20;
const HEADER_BYTES: usize = 32;
const STRIPE_BYTES: usize = 32;
const BTRFS_IOC_TREE_SEARCH: Opcode = opcode::read_write::<Search>(0x94, 17);

/// A stretch of addresses, and where on the device it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) addresses: Range<u64>,
    pub(super) copies: Vec<u64>,
    pub(super) is_striped: bool,
}

impl Chunk {
    /// The chunk that holds an address, of some that are in order.
    pub(super) fn around(chunks: &[Chunk], address: u64) -> Option<&Chunk> {
        let after = chunks.partition_point(|chunk| chunk.addresses.end <= address);
        chunks.get(after).filter(|chunk| chunk.addresses.start <= address)
    }

    /// Where an address of it lies: once for each copy, `None` if that is not told by its begin.
    pub(super) fn places(&self, address: u64) -> impl Iterator<Item = Option<u64>> {
        let copies = if self.is_striped {
            &self.copies[..1]
        } else {
            &self.copies[..]
        };
        let further = address - self.addresses.start;
        copies
            .iter()
            .map(move |copy| (!self.is_striped).then_some(copy + further))
    }
}

/// `struct btrfs_ioctl_search_args`.
#[repr(C)]
struct Search {
    tree: u64,
    objects: [u64; 2],
    offsets: [u64; 2],
    transactions: [u64; 2],
    kinds: [u32; 2],
    items: u32,
    unused: u32,
    unused_more: [u64; 4],
    found: [u8; 4096 - 104],
}

const _: () = assert!(size_of::<Search>() == 4096);

/// All chunks of the file system that `folder` lies on, in order. Takes root.
pub(super) fn chunks(folder: &File) -> io::Result<Vec<Chunk>> {
    let mut chunks: Vec<Chunk> = Vec::new();
    let mut from = 0;
    loop {
        let mut search = Box::new(Search {
            tree: CHUNK_TREE,
            objects: [FIRST_CHUNK; 2],
            offsets: [from, u64::MAX],
            transactions: [0, u64::MAX],
            kinds: [CHUNK_ITEM; 2],
            items: u32::MAX,
            unused: 0,
            unused_more: [0; 4],
            found: [0; 4096 - 104],
        });
        // SAFETY: `Search` is laid out as the kernel wants it, and of the size that is part of the call's number.
        unsafe {
            ioctl(
                folder,
                Updater::<BTRFS_IOC_TREE_SEARCH, Search>::new(&mut *search),
            )?
        };
        if search.items == 0 {
            return Ok(chunks);
        }
        let mut rest = &search.found[..];
        for _ in 0..search.items {
            let (address, chunk) = take(&mut rest).ok_or_else(|| bad("a chunk that makes no sense"))?;
            chunks.extend(chunk);
            match address.checked_add(1) {
                Some(next) => from = next,
                None => return Ok(chunks),
            }
        }
        if chunks.len() > CHUNKS_MAX {
            return Err(bad("more chunks than a btrfs has"));
        }
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The next item: the address it is about, and the chunk, if it is one.
fn take(rest: &mut &[u8]) -> Option<(u64, Option<Chunk>)> {
    let header = rest.get(..HEADER_BYTES)?;
    let address = u64_at(header, 16)?;
    let (kind, len) = (u32_at(header, 24)?, u32_at(header, 28)? as usize);
    let item = rest.get(HEADER_BYTES..HEADER_BYTES + len)?;
    *rest = &rest[HEADER_BYTES + len..];
    if kind != CHUNK_ITEM {
        return Some((address, None));
    }
    let (bytes, profile) = (u64_at(item, 0)?, u64_at(item, 24)?);
    let count = usize::from(u16::from_le_bytes(*item.get(44..)?.first_chunk()?));
    let copies: Option<Vec<_>> = (0..count)
        .map(|index| u64_at(item, 48 + index * STRIPE_BYTES + 8))
        .collect();
    let copies = copies.filter(|copies| !copies.is_empty())?;
    let chunk = Chunk {
        addresses: address..address.checked_add(bytes)?,
        is_striped: profile & STRIPED != 0 && copies.len() > 1,
        copies,
    };
    Some((address, Some(chunk)))
}

// Items lie there as on the disk; their headers are in the host's order, which is the same on all hosts supported.
const _: () = assert!(cfg!(target_endian = "little"));

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
