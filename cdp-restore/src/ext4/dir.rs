//! Directories: names, and the inodes that they stand for.
//!
//! Read from end to end. The index of a large one hides in what looks like unused entries, so nothing is lost by that.

use super::inode::{Inode, Kind};
use super::{Ext4, Ext4Error, check, corrupt};
use crate::bytes::{le16, le32};

/// Of an entry, before its name.
const HEAD_BYTES: usize = 8;
/// An unused entry at the end of a block that holds its checksum.
const TAIL_BYTES: usize = 12;
const TAIL_KIND: u8 = 0xde;
/// The parent's number, where the directory lies in its inode.
const PARENT_BYTES: usize = 4;

/// Gets an entry's name and inode.
type Show<'s, E> = &'s mut dyn FnMut(&[u8], u32) -> Result<(), E>;

/// Ends a walk early.
enum Stop {
    Found,
    Failed(Ext4Error),
}

impl From<Ext4Error> for Stop {
    fn from(error: Ext4Error) -> Self {
        Stop::Failed(error)
    }
}

impl Ext4<'_> {
    /// Shows every entry of a directory but itself and its parent. No name has a slash or a zero byte in it.
    pub(crate) fn entries<E: From<Ext4Error>>(&self, dir: &Inode, show: Show<'_, E>) -> Result<(), E> {
        if dir.kind() != Kind::Directory {
            return Err(corrupt(format!("{dir} is no directory")).into());
        }
        dir.refuse_encrypted()?;
        if dir.is_inline() {
            let bytes = self.inline_data(dir)?;
            let (first, second) = bytes.split_at(bytes.len().min(super::inode::MAP_BYTES));
            let first = first.get(PARENT_BYTES..).unwrap_or_default();
            self.block_entries(dir, first, show)?;
            return self.block_entries(dir, second, show);
        }
        let block_bytes = self.superblock.block_bytes as usize;
        self.content(dir, &mut |_, bytes| {
            bytes
                .chunks(block_bytes)
                .try_for_each(|block| self.checked_block(dir, block, show))
        })
    }

    /// The inode that a name stands for.
    pub(crate) fn find(&self, dir: &Inode, wanted: &[u8]) -> Result<Option<u32>, Ext4Error> {
        let mut found = None;
        let walked = self.entries(dir, &mut |name, number| {
            if name != wanted {
                return Ok(());
            }
            found = Some(number);
            Err(Stop::Found)
        });
        match walked {
            Ok(()) | Err(Stop::Found) => Ok(found),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    fn checked_block<E: From<Ext4Error>>(
        &self,
        dir: &Inode,
        block: &[u8],
        show: Show<'_, E>,
    ) -> Result<(), E> {
        let end = block.len().saturating_sub(TAIL_BYTES);
        let tail = &block[end..];
        let has_tail = le32(tail, 0) == 0
            && usize::from(le16(tail, 4)) == TAIL_BYTES
            && tail.get(6..8) == Some(&[0, TAIL_KIND]);
        if let Some(seed) = dir.seed().filter(|_| has_tail) {
            let matches = seed.add(&block[..end]).value() == le32(tail, 8);
            check(matches, || format!("a block of the directory {dir}"))?;
        }
        self.block_entries(dir, block, show)
    }

    fn block_entries<E: From<Ext4Error>>(
        &self,
        dir: &Inode,
        block: &[u8],
        show: Show<'_, E>,
    ) -> Result<(), E> {
        let mut rest = block;
        while !rest.is_empty() {
            let (number, name_bytes) = (le32(rest, 0), usize::from(rest.get(6).copied().unwrap_or(0)));
            // 64 KiB do not fit into 16 bits.
            let entry_bytes = match le16(rest, 4) {
                0 | u16::MAX if block.len() == 1 << 16 => block.len(),
                told => usize::from(told),
            };
            let is_sound = entry_bytes >= HEAD_BYTES + if number == 0 { 0 } else { name_bytes }
                && entry_bytes.is_multiple_of(4)
                && entry_bytes <= rest.len();
            if !is_sound {
                return Err(corrupt(format!("an entry of the directory {dir} makes no sense")).into());
            }
            let (entry, after) = rest.split_at(entry_bytes);
            rest = after;
            if number == 0 {
                continue;
            }
            let name = &entry[HEAD_BYTES..HEAD_BYTES + name_bytes];
            if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
                return Err(corrupt(format!("a name in the directory {dir} makes no sense")).into());
            }
            if name != b"." && name != b".." {
                show(name, number)?;
            }
        }
        Ok(())
    }
}
