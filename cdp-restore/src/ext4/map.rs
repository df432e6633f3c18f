//! Where the content of a file lies: a tree of extents, or the older map of blocks.

use super::checksum::Seed;
use super::inode::Inode;
use super::{Ext4, Ext4Error, check, corrupt};
use crate::bytes::{le16, le32};

const MAGIC: u16 = 0xf30a;
/// Of a node's header, and of each entry.
const ENTRY_BYTES: usize = 12;
const DEPTH_MAX: u16 = 5;
/// An extent of more blocks than this was reserved and not written: it reads as zero.
const WRITTEN_MAX: u16 = 32_768;

/// Blocks of a file that lie side by side. What no run covers is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// In the file.
    pub(super) logical: u64,
    /// In the file system.
    pub(super) physical: u64,
    pub(super) blocks: u64,
}

/// Shows runs in the order of the file.
struct Walk<'w, 'a, E> {
    fs: &'w Ext4<'a>,
    inode: &'w Inode,
    show: &'w mut dyn FnMut(Run) -> Result<(), E>,
    /// The first block of the file that was not passed yet.
    next_logical: u64,
}

impl Ext4<'_> {
    /// Shows where the content of a file lies, in its order, up to its last written block.
    pub(super) fn runs<E: From<Ext4Error>>(
        &self,
        inode: &Inode,
        show: &mut dyn FnMut(Run) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut walk = Walk {
            fs: self,
            inode,
            show,
            next_logical: 0,
        };
        match inode.has_extents() {
            true => walk.node(inode.map(), None),
            false => walk.block_map(),
        }
    }
}

impl<E: From<Ext4Error>> Walk<'_, '_, E> {
    fn bad(&self, what: &str) -> E {
        corrupt(format!("{}: {what}", self.inode)).into()
    }

    /// A node of the tree, which lies so deep if it is not the root.
    fn node(&mut self, node: &[u8], expected_depth: Option<u16>) -> Result<(), E> {
        let (entries, depth) = (le16(node, 2), le16(node, 6));
        let end = ENTRY_BYTES * (1 + usize::from(entries));
        let is_sound = le16(node, 0) == MAGIC
            && depth <= DEPTH_MAX
            && end <= node.len()
            // A node without entries would let a tree be endless.
            && expected_depth.is_none_or(|expected| depth == expected && entries > 0);
        if !is_sound {
            return Err(self.bad("a node of its extents makes no sense"));
        }
        for entry in node[ENTRY_BYTES..end].chunks_exact(ENTRY_BYTES) {
            if depth == 0 {
                self.extent(entry)?;
                continue;
            }
            let child = u64::from(le32(entry, 4)) | u64::from(le16(entry, 8)) << 32;
            let child = self.fs.read_block(child)?;
            if let Some(seed) = self.inode.seed() {
                self.check_node(&child, seed)?;
            }
            self.node(&child, Some(depth - 1))?;
        }
        Ok(())
    }

    /// The checksum follows the entries that there is room for.
    fn check_node(&self, node: &[u8], seed: Seed) -> Result<(), E> {
        let end = ENTRY_BYTES * (1 + usize::from(le16(node, 4)));
        let matches = end + 4 <= node.len() && seed.add(&node[..end]).value() == le32(node, end);
        Ok(check(matches, || {
            format!("a node of the extents of {}", self.inode)
        })?)
    }

    fn extent(&mut self, entry: &[u8]) -> Result<(), E> {
        let logical = u64::from(le32(entry, 0));
        let told = le16(entry, 4);
        let physical = u64::from(le32(entry, 8)) | u64::from(le16(entry, 6)) << 32;
        let blocks = u64::from(if told > WRITTEN_MAX {
            told - WRITTEN_MAX
        } else {
            told
        });
        if blocks == 0 || logical < self.next_logical || physical == 0 {
            return Err(self.bad("an extent of it makes no sense"));
        }
        self.next_logical = logical + blocks;
        match told > WRITTEN_MAX {
            true => Ok(()),
            false => (self.show)(Run {
                logical,
                physical,
                blocks,
            }),
        }
    }

    /// Twelve blocks, and three that name blocks, over as many more levels.
    fn block_map(&mut self) -> Result<(), E> {
        let blocks = self
            .inode
            .size()
            .div_ceil(self.fs.superblock.block_bytes)
            .min(1 << 32);
        let mut open: Option<Run> = None;
        for index in 0..15 {
            let block = u64::from(le32(self.inode.map(), index * 4));
            self.branch(block, (index as u32).saturating_sub(11), blocks, &mut open)?;
        }
        open.map_or(Ok(()), |run| (self.show)(run))
    }

    fn branch(&mut self, block: u64, level: u32, blocks_max: u64, open: &mut Option<Run>) -> Result<(), E> {
        if self.next_logical >= blocks_max {
            return Ok(());
        }
        let per_block = self.fs.superblock.block_bytes / 4;
        if block == 0 {
            self.next_logical += per_block.pow(level);
            return Ok(());
        }
        if level > 0 {
            let names = self.fs.read_block(block)?;
            for index in 0..per_block as usize {
                let named = u64::from(le32(&names, index * 4));
                self.branch(named, level - 1, blocks_max, open)?;
            }
            return Ok(());
        }
        let logical = self.next_logical;
        self.next_logical += 1;
        match open {
            Some(run) if (run.logical + run.blocks, run.physical + run.blocks) == (logical, block) => {
                run.blocks += 1;
            }
            _ => {
                let done = open.replace(Run {
                    logical,
                    physical: block,
                    blocks: 1,
                });
                if let Some(done) = done {
                    (self.show)(done)?;
                }
            }
        }
        Ok(())
    }
}
