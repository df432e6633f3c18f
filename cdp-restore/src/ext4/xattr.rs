//! Extended attributes, in the inode, in a block of their own, or (large values) in inodes of their own.

use super::inode::Inode;
use super::{Ext4, Ext4Error, check, corrupt};
use crate::bytes::{le16, le32};

const MAGIC: u32 = 0xea02_0000;
/// Before the entries of a block.
const BLOCK_HEAD_BYTES: usize = 32;
/// Of an entry, before its name.
const ENTRY_HEAD_BYTES: usize = 16;
/// No value is larger (the kernel's `XATTR_SIZE_MAX`).
const VALUE_BYTES_MAX: u64 = 64 << 10;

/// Kinds of names.
const ACL_ACCESS: u8 = 2;
const ACL_DEFAULT: u8 = 3;
const SYSTEM: u8 = 7;
const ENCRYPTION: u8 = 9;

/// The attribute that the content of a small file goes on in.
const INLINE_NAME: &[u8] = b"data";

/// An extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attribute {
    /// With its name space, as `user.colour`.
    pub(crate) name: Vec<u8>,
    /// As `setxattr` takes it.
    pub(crate) value: Vec<u8>,
}

/// As it lies on the disk.
struct Raw {
    kind: u8,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Ext4<'_> {
    /// The extended attributes of a file, lists of access rights among them.
    pub(crate) fn attributes(&self, inode: &Inode) -> Result<Vec<Attribute>, Ext4Error> {
        let mut found = self.in_inode(inode)?;
        if let Some(number) = inode.attribute_block() {
            let mut block = self.read_block(number)?;
            if le32(&block, 0) != MAGIC {
                return Err(bad(inode));
            }
            if let Some(seed) = self.superblock.seed {
                let told = le32(&block, 0x10);
                block[0x10..0x14].fill(0);
                let seed = seed.add(&number.to_le_bytes()).add(&block);
                check(seed.value() == told, || format!("the attributes of {inode}"))?;
            }
            self.list(inode, &block, BLOCK_HEAD_BYTES, 0, &mut found)?;
        }
        found.retain(|raw| !(raw.kind == SYSTEM && raw.name == INLINE_NAME) && raw.kind != ENCRYPTION);
        found.into_iter().map(|raw| raw.told(inode)).collect()
    }

    /// The content of a file, or of a directory, that lies in its inode. What its size has beyond that is a hole.
    pub(super) fn inline_data(&self, inode: &Inode) -> Result<Vec<u8>, Ext4Error> {
        let mut bytes = inode.map().to_vec();
        let more = self.in_inode(inode)?;
        let more = more
            .into_iter()
            .find(|raw| raw.kind == SYSTEM && raw.name == INLINE_NAME);
        bytes.extend(more.map_or_else(Vec::new, |raw| raw.value));
        Ok(bytes)
    }

    fn in_inode(&self, inode: &Inode) -> Result<Vec<Raw>, Ext4Error> {
        let area = inode.attribute_area();
        let mut found = Vec::new();
        if le32(area, 0) == MAGIC {
            self.list(inode, area, 4, 4, &mut found)?;
        }
        Ok(found)
    }

    /// Entries from `at` on; their values lie at offsets from `base`.
    fn list(
        &self,
        inode: &Inode,
        area: &[u8],
        at: usize,
        base: usize,
        found: &mut Vec<Raw>,
    ) -> Result<(), Ext4Error> {
        let mut at = at;
        // Four bytes of zero end them, or the area does.
        while le32(area, at) != 0 {
            let name_at = at + ENTRY_HEAD_BYTES;
            let (name_bytes, kind) = (usize::from(area[at]), area[at + 1]);
            let name = area
                .get(name_at..name_at + name_bytes)
                .ok_or_else(|| bad(inode))?;
            let (value_at, value_inode) = (base + usize::from(le16(area, at + 2)), le32(area, at + 4));
            let value_bytes = le32(area, at + 8) as usize;
            let value = match value_inode {
                0 if value_bytes == 0 => Vec::new(),
                0 => {
                    let value = area.get(value_at..).and_then(|rest| rest.get(..value_bytes));
                    value.ok_or_else(|| bad(inode))?.to_vec()
                }
                number => self.large_value(inode, number, value_bytes)?,
            };
            found.push(Raw {
                kind,
                name: name.to_vec(),
                value,
            });
            at = (name_at + name_bytes).next_multiple_of(4);
        }
        Ok(())
    }

    fn large_value(&self, inode: &Inode, number: u32, bytes: usize) -> Result<Vec<u8>, Ext4Error> {
        let holder = self.inode(number)?;
        let hash = holder.attribute_hash().ok_or_else(|| bad(inode))?;
        let value = self.small_content(&holder, VALUE_BYTES_MAX)?;
        if value.len() != bytes {
            return Err(bad(inode));
        }
        if let Some(seed) = self.superblock.seed {
            check(seed.add(&value).value() == hash, || {
                format!("an attribute of {inode}")
            })?;
        }
        Ok(value)
    }
}

fn bad(inode: &Inode) -> Ext4Error {
    corrupt(format!("an attribute of {inode} makes no sense"))
}

impl Raw {
    /// As the kernel tells it.
    fn told(self, inode: &Inode) -> Result<Attribute, Ext4Error> {
        let prefix: &[u8] = match self.kind {
            0 => b"",
            1 => b"user.",
            ACL_ACCESS => b"system.posix_acl_access",
            ACL_DEFAULT => b"system.posix_acl_default",
            4 => b"trusted.",
            6 => b"security.",
            SYSTEM => b"system.",
            8 => b"system.richacl",
            kind => {
                return Err(Ext4Error::Unsupported(format!(
                    "{inode} has an attribute of the unknown kind {kind}"
                )));
            }
        };
        let value = match self.kind {
            ACL_ACCESS | ACL_DEFAULT => access_list(&self.value).ok_or_else(|| bad(inode))?,
            _ => self.value,
        };
        Ok(Attribute {
            name: [prefix, &self.name].concat(),
            value,
        })
    }
}

/// From ext4's form of a list of access rights (version 1: entries of 4 bytes, or of 8 where they name somebody) to
/// that of `setxattr` (version 2: entries of 8).
fn access_list(stored: &[u8]) -> Option<Vec<u8>> {
    const USER: u16 = 0x2;
    const GROUP: u16 = 0x8;
    const NOBODY: u32 = u32::MAX;
    if stored.len() < 4 || le32(stored, 0) != 1 {
        return None;
    }
    let mut told = 2_u32.to_le_bytes().to_vec();
    let mut rest = &stored[4..];
    while !rest.is_empty() {
        let tag = le16(rest, 0);
        let is_named = matches!(tag, USER | GROUP);
        let (entry, after) = rest.split_at_checked(if is_named { 8 } else { 4 })?;
        let id = if is_named { le32(entry, 4) } else { NOBODY };
        told.extend_from_slice(&entry[..4]);
        told.extend_from_slice(&id.to_le_bytes());
        rest = after;
    }
    Some(told)
}
