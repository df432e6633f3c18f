//! An ext2, ext3 or ext4 file system, read without the kernel: for users who may not mount.
//!
//! Layouts are those of the kernel's documentation (`Documentation/filesystems/ext4/`), named beside the code that
//! reads them.
//!
//! Always true:
//! - E1: a file system whose journal holds what its blocks do not is read with its journal replayed, or not at all.
//! - E2: what its features do not allow to be read right is refused by name, never guessed at.
//! - E3: whatever carries a checksum is checked, and bad bytes are an error: no panic, no endless loop, no bytes that
//!   belong to nobody.
//! - E4: memory is bounded by the journal, by one directory's block and by one piece of a file, whatever their sizes.

mod checksum;
mod dir;
mod inode;
mod journal;
mod map;
mod superblock;
#[cfg(test)]
mod tests;
mod xattr;

use std::collections::HashMap;

use cdp_journal::ReadError;
use parking_lot::Mutex;

pub(crate) use inode::{Inode, Kind, Timestamp};
use journal::Replay;
use superblock::Superblock;
pub(crate) use xattr::Attribute;

use crate::bytes::{le16, le32};

/// Fills a buffer with the bytes of the file system at an offset.
pub(crate) type ReadAt<'a> = Box<dyn Fn(u64, &mut [u8]) -> Result<(), ReadError> + 'a>;

/// Gets bytes of a file, and their offset in it.
type Show<'s, E> = &'s mut dyn FnMut(u64, &[u8]) -> Result<(), E>;

/// The inode of the topmost folder.
pub(crate) const ROOT: u32 = 2;

/// Bytes of a file that are read at once.
const PIECE_BYTES: u64 = 1 << 20;
/// Tables of inodes whose places are kept.
const GROUPS_MAX: usize = 65_536;

/// Why something could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Ext4Error {
    /// The bytes could not be had.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The kernel knows how to read this, and this program does not.
    #[error("{0}, which takes the kernel to read")]
    Unsupported(String),
    /// It is not as it must be.
    #[error("the file system is damaged: {0}")]
    Corrupt(String),
}

/// A file system, open for reading.
pub(crate) struct Ext4<'a> {
    read_at: ReadAt<'a>,
    superblock: Superblock,
    replay: Replay,
    /// Where the inodes of a group lie.
    tables: Mutex<HashMap<u32, u64>>,
}

impl<'a> Ext4<'a> {
    /// Opens what lies on so many bytes, and replays its journal in memory.
    pub(crate) fn open(read_at: ReadAt<'a>, bytes_max: u64) -> Result<Self, Ext4Error> {
        let mut bytes = [0; superblock::BYTES];
        if bytes_max < superblock::OFFSET + bytes.len() as u64 {
            return Err(corrupt("there is no room for a superblock"));
        }
        read_at(superblock::OFFSET, &mut bytes)?;
        let superblock = Superblock::parse(&bytes)?;
        superblock.check_fits(bytes_max)?;
        let needs_recovery = superblock.needs_recovery;
        let mut opened = Ext4 {
            read_at,
            superblock,
            replay: Replay::default(),
            tables: Mutex::default(),
        };
        if needs_recovery {
            opened.replay = journal::load(&opened)?;
            // As the journal left it.
            let block_bytes = opened.superblock.block_bytes;
            let mut block = vec![0; block_bytes as usize];
            let (number, at) = match block_bytes {
                superblock::OFFSET => (1, 0),
                _ => (0, superblock::OFFSET as usize),
            };
            opened.read_blocks(number, &mut block)?;
            opened.superblock = Superblock::parse(&block[at..])?;
            if opened.superblock.block_bytes != block_bytes {
                return Err(corrupt("its journal changes the size of its blocks"));
            }
            opened.superblock.check_fits(bytes_max)?;
            opened.tables.lock().clear();
        }
        Ok(opened)
    }

    /// Reads whole blocks, as the journal left them.
    fn read_blocks(&self, first: u64, buf: &mut [u8]) -> Result<(), Ext4Error> {
        let block_bytes = self.superblock.block_bytes;
        let count = buf.len() as u64 / block_bytes;
        let is_inside = first
            .checked_add(count)
            .is_some_and(|end| end <= self.superblock.blocks);
        if !is_inside {
            return Err(corrupt(format!("block {first} lies beyond its end")));
        }
        if self.replay.is_empty() {
            return Ok((self.read_at)(first * block_bytes, buf)?);
        }
        // Neighbours that the journal knows nothing of are read at once.
        let mut start = 0;
        for index in 0..=count {
            let known = (index < count).then(|| self.replay.find(first + index)).flatten();
            if known.is_none() && index < count {
                continue;
            }
            let (from, to) = ((start * block_bytes) as usize, (index * block_bytes) as usize);
            if from < to {
                (self.read_at)((first + start) * block_bytes, &mut buf[from..to])?;
            }
            if let Some(copy) = known {
                let block = &mut buf[to..to + block_bytes as usize];
                (self.read_at)(copy.block * block_bytes, block)?;
                copy.unescape(block);
            }
            start = index + 1;
        }
        Ok(())
    }

    /// One whole block.
    fn read_block(&self, number: u64) -> Result<Vec<u8>, Ext4Error> {
        let mut block = vec![0; self.superblock.block_bytes as usize];
        self.read_blocks(number, &mut block)?;
        Ok(block)
    }

    /// Reads an inode that is in use.
    pub(crate) fn inode(&self, number: u32) -> Result<Inode, Ext4Error> {
        let superblock = &self.superblock;
        if number == 0 || number > superblock.inodes {
            return Err(corrupt(format!("there is no inode {number}")));
        }
        let group = (number - 1) / superblock.inodes_per_group;
        let index = u64::from((number - 1) % superblock.inodes_per_group);
        let inode_bytes = u64::from(superblock.inode_bytes);
        let per_block = superblock.block_bytes / inode_bytes;
        let block = self.table(group)?.checked_add(index / per_block);
        let block = block.ok_or_else(|| corrupt(format!("the inodes of group {group} lie nowhere")))?;
        let at = (index % per_block * inode_bytes) as usize;
        let raw = self.read_block(block)?[at..at + inode_bytes as usize].to_vec();
        let seed = superblock.seed.map(|seed| {
            let generation = le32(&raw, 0x64);
            seed.add(&number.to_le_bytes()).add(&generation.to_le_bytes())
        });
        Inode::parse(number, raw, seed)
    }

    /// Where the inodes of a group begin.
    fn table(&self, group: u32) -> Result<u64, Ext4Error> {
        if let Some(table) = self.tables.lock().get(&group) {
            return Ok(*table);
        }
        let superblock = &self.superblock;
        let (block, at) = superblock.descriptor(group);
        let block = self.read_block(block)?;
        let bytes = usize::from(superblock.descriptor_bytes);
        let mut descriptor = block[at..at + bytes].to_vec();
        let table = u64::from(le32(&descriptor, 0x8)) | u64::from(le32(&descriptor, 0x28)) << 32;
        if let Some(seed) = superblock.seed {
            let told = le16(&descriptor, 0x1e);
            descriptor[0x1e..0x20].fill(0);
            let seed = seed.add(&group.to_le_bytes()).add(&descriptor);
            check(seed.value() as u16 == told, || {
                format!("descriptor of group {group}")
            })?;
        }
        let mut tables = self.tables.lock();
        if tables.len() >= GROUPS_MAX {
            tables.clear();
        }
        tables.insert(group, table);
        Ok(table)
    }

    /// Shows each stretch of a file's content that is not a hole, in order: its offset, and its bytes.
    pub(crate) fn content<E: From<Ext4Error>>(&self, inode: &Inode, show: Show<'_, E>) -> Result<(), E> {
        inode.refuse_encrypted()?;
        let size = inode.size();
        if inode.is_inline() {
            let bytes = self.inline_data(inode)?;
            let len = size.min(bytes.len() as u64) as usize;
            return show(0, &bytes[..len]);
        }
        let block_bytes = self.superblock.block_bytes;
        let mut buf = Vec::new();
        self.runs(inode, &mut |run| {
            let (mut done, blocks_max) = (0, PIECE_BYTES / block_bytes);
            while done < run.blocks {
                // No more than 2^32 blocks of 64 KiB.
                let offset = (run.logical + done) * block_bytes;
                let Some(left) = size.checked_sub(offset).filter(|left| *left > 0) else {
                    break;
                };
                let blocks = (run.blocks - done)
                    .min(blocks_max)
                    .min(left.div_ceil(block_bytes));
                buf.resize((blocks * block_bytes) as usize, 0);
                self.read_blocks(run.physical + done, &mut buf)?;
                let len = left.min(buf.len() as u64) as usize;
                show(offset, &buf[..len])?;
                done += blocks;
            }
            Ok(())
        })
    }

    /// All of a content of at most `bytes_max`.
    fn small_content(&self, inode: &Inode, bytes_max: u64) -> Result<Vec<u8>, Ext4Error> {
        let size = inode.size();
        if size > bytes_max {
            return Err(corrupt(format!(
                "{inode} holds {size} bytes, and {bytes_max} are the most"
            )));
        }
        let mut whole = vec![0; size as usize];
        self.content(inode, &mut |offset, bytes| {
            let at = offset as usize;
            whole[at..at + bytes.len()].copy_from_slice(bytes);
            Ok::<_, Ext4Error>(())
        })?;
        Ok(whole)
    }

    /// What a symbolic link says.
    pub(crate) fn link_target(&self, inode: &Inode) -> Result<Vec<u8>, Ext4Error> {
        inode.refuse_encrypted()?;
        let target = match inode.fast_link() {
            Some(target) => target.to_vec(),
            None => self.small_content(inode, self.superblock.block_bytes)?,
        };
        match target.is_empty() || target.contains(&0) {
            true => Err(corrupt(format!("{inode} is a symbolic link to nowhere"))),
            false => Ok(target),
        }
    }
}

fn corrupt(what: impl Into<String>) -> Ext4Error {
    Ext4Error::Corrupt(what.into())
}

/// Fails with the name of what does not match its checksum.
fn check(matches: bool, what: impl FnOnce() -> String) -> Result<(), Ext4Error> {
    match matches {
        true => Ok(()),
        false => Err(corrupt(format!("{} does not match its checksum", what()))),
    }
}
