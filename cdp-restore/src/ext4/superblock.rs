//! The superblock: sizes, features, and where groups are described.

use super::checksum::Seed;
use super::{Ext4Error, check, corrupt};
use crate::bytes::{le16, le32};

/// Where it lies, and its size.
pub(super) const OFFSET: u64 = 1024;
pub(super) const BYTES: usize = 1024;

/// Features that do not keep anybody from reading, as far as they are known here.
const READABLE: u32 = 0x2 // file types in directories
    | RECOVER
    | META_BG
    | 0x40 // extents
    | BITS_64
    | 0x100 // protection against two mounts at once
    | 0x200 // flexible groups
    | 0x400 // large attributes in inodes of their own
    | CHECKSUM_SEED
    | 0x4000 // directories of three levels, above 2 GiB
    | 0x8000 // data in inodes
    | 0x1_0000 // encryption: refused where it is found
    | 0x2_0000; // folded names: looked up here as they are written
const RECOVER: u32 = 0x4;
const JOURNAL_DEVICE: u32 = 0x8;
const META_BG: u32 = 0x10;
const BITS_64: u32 = 0x80;
const CHECKSUM_SEED: u32 = 0x2000;

/// Compatible features.
const HAS_JOURNAL: u32 = 0x4;
const SPARSE_SUPER_2: u32 = 0x200;

/// Features that matter to who writes.
const SPARSE_SUPER: u32 = 0x1;
const METADATA_CHECKSUMS: u32 = 0x400;

#[derive(Debug)]
pub(super) struct Superblock {
    pub(super) block_bytes: u64,
    pub(super) blocks: u64,
    pub(super) inodes: u32,
    pub(super) inodes_per_group: u32,
    pub(super) inode_bytes: u16,
    pub(super) descriptor_bytes: u16,
    /// The journal holds what the blocks do not.
    pub(super) needs_recovery: bool,
    /// The inode that the journal is in.
    pub(super) journal: u32,
    /// Of metadata checksums, where there are any.
    pub(super) seed: Option<Seed>,
    blocks_per_group: u32,
    first_data_block: u32,
    /// Descriptors from this block of them on lie in the groups that they describe.
    first_meta_group: Option<u32>,
    is_sparse: bool,
}

impl Superblock {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Ext4Error> {
        if le16(bytes, 0x38) != 0xef53 || bytes.len() < BYTES {
            return Err(corrupt("there is no superblock"));
        }
        let has_features = le32(bytes, 0x4c) > 0;
        let features = |at| if has_features { le32(bytes, at) } else { 0 };
        let (compatible, incompatible, read_only) = (features(0x5c), features(0x60), features(0x64));
        if incompatible & JOURNAL_DEVICE != 0 {
            return Err(Ext4Error::Unsupported("it is the journal of another".to_owned()));
        }
        if incompatible & !READABLE != 0 {
            return Err(Ext4Error::Unsupported(format!(
                "it has features ({:#x}) that are not known here",
                incompatible & !READABLE
            )));
        }
        let seed = (read_only & METADATA_CHECKSUMS != 0).then(|| match incompatible & CHECKSUM_SEED {
            0 => Seed::ONES.add(&bytes[0x68..0x78]),
            _ => Seed::of(le32(bytes, 0x270)),
        });
        if seed.is_some() {
            let told = le32(bytes, 0x3fc);
            check(Seed::ONES.add(&bytes[..0x3fc]).value() == told, || {
                "superblock".to_owned()
            })?;
        }
        let block_shift = le32(bytes, 0x18);
        if block_shift > 6 {
            return Err(corrupt(format!("its blocks have 2^{block_shift} KiB")));
        }
        let block_bytes = 1024 << block_shift;
        let is_64 = incompatible & BITS_64 != 0;
        let blocks_high = if is_64 { le32(bytes, 0x150) } else { 0 };
        let superblock = Superblock {
            block_bytes,
            blocks: u64::from(le32(bytes, 0x4)) | u64::from(blocks_high) << 32,
            inodes: le32(bytes, 0),
            inodes_per_group: le32(bytes, 0x28),
            inode_bytes: if has_features { le16(bytes, 0x58) } else { 128 },
            descriptor_bytes: if is_64 { le16(bytes, 0xfe) } else { 32 },
            needs_recovery: incompatible & RECOVER != 0,
            journal: le32(bytes, 0xe0),
            seed,
            blocks_per_group: le32(bytes, 0x20),
            first_data_block: le32(bytes, 0x14),
            first_meta_group: (incompatible & META_BG != 0).then(|| le32(bytes, 0x104)),
            is_sparse: read_only & SPARSE_SUPER != 0,
        };
        if superblock.needs_recovery && compatible & HAS_JOURNAL == 0 {
            return Err(corrupt("its journal is gone"));
        }
        if superblock.needs_recovery && superblock.journal == 0 {
            return Err(Ext4Error::Unsupported(
                "its journal is on another device".to_owned(),
            ));
        }
        if superblock.first_meta_group.is_some() && compatible & SPARSE_SUPER_2 != 0 {
            return Err(Ext4Error::Unsupported(
                "it has both meta_bg and sparse_super2".to_owned(),
            ));
        }
        let inode_bytes = u64::from(superblock.inode_bytes);
        let descriptor_bytes = u64::from(superblock.descriptor_bytes);
        let fits = |bytes: u64| bytes.is_power_of_two() && bytes <= block_bytes;
        let is_sound = inode_bytes >= 128
            && fits(inode_bytes)
            && descriptor_bytes >= if is_64 { 64 } else { 32 }
            && fits(descriptor_bytes)
            && superblock.inodes_per_group > 0
            && superblock.blocks_per_group > 0
            && superblock.blocks < 1 << 48;
        match is_sound {
            true => Ok(superblock),
            false => Err(corrupt("the sizes in its superblock make no sense")),
        }
    }

    /// Fails if the file system is larger than the place that it lies on: what is missing was cut off.
    pub(super) fn check_fits(&self, bytes_max: u64) -> Result<(), Ext4Error> {
        let bytes = self.blocks.checked_mul(self.block_bytes);
        match bytes.is_some_and(|bytes| bytes <= bytes_max) {
            true => Ok(()),
            false => Err(corrupt(format!(
                "it has {} blocks of {} bytes, and lies on {bytes_max} bytes",
                self.blocks, self.block_bytes
            ))),
        }
    }

    /// The block that a group's descriptor lies in, and where in it.
    pub(super) fn descriptor(&self, group: u32) -> (u64, usize) {
        let per_block = (self.block_bytes / u64::from(self.descriptor_bytes)) as u32;
        let (index, at) = (group / per_block, group % per_block);
        let at = at as usize * usize::from(self.descriptor_bytes);
        let superblock_at = OFFSET / self.block_bytes;
        if self.first_meta_group.is_none_or(|first| index < first) {
            return (superblock_at + 1 + u64::from(index), at);
        }
        let group = index * per_block;
        let group_start = u64::from(group) * u64::from(self.blocks_per_group);
        let mut skip = u64::from(self.has_superblock(group));
        if group == 0 && superblock_at == 1 && self.first_data_block == 0 {
            skip += 1;
        }
        (u64::from(self.first_data_block) + group_start + skip, at)
    }

    /// Does the group begin with a copy of the superblock?
    fn has_superblock(&self, group: u32) -> bool {
        let is_power_of = |base: u32| {
            let mut rest = group;
            while rest.is_multiple_of(base) {
                rest /= base;
            }
            rest == 1
        };
        group <= 1 || !self.is_sparse || [3, 5, 7].into_iter().any(is_power_of)
    }
}
