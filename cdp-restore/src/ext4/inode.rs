//! An inode: what is known of a file beside its content.

use std::fmt;

use super::checksum::Seed;
use super::{Ext4Error, check, corrupt};
use crate::bytes::{le16, le32};

/// Flags.
const ENCRYPTED: u32 = 0x800;
const EXTENTS: u32 = 0x8_0000;
const ATTRIBUTE: u32 = 0x20_0000;
const INLINE: u32 = 0x1000_0000;

/// Bytes in it that say where the content lies, or are the content.
pub(super) const MAP_BYTES: usize = 60;
const MAP_AT: usize = 0x28;
/// What every inode has.
const BASE_BYTES: usize = 128;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    Regular,
    Symlink,
    Fifo,
    Socket,
    CharacterDevice,
    BlockDevice,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Directory => "directory",
            Kind::Regular => "regular file",
            Kind::Symlink => "symbolic link",
            Kind::Fifo => "named pipe",
            Kind::Socket => "socket",
            Kind::CharacterDevice => "character device",
            Kind::BlockDevice => "block device",
        })
    }
}

/// A time of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timestamp {
    /// Since 1970.
    pub(crate) seconds: i64,
    /// Below 10^9.
    pub(crate) nanoseconds: u32,
}

/// An inode, as it lies in its table.
#[derive(Clone, Debug)]
pub(crate) struct Inode {
    number: u32,
    kind: Kind,
    raw: Vec<u8>,
    /// Of the checksums of what belongs to it.
    seed: Option<Seed>,
}

impl fmt::Display for Inode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode {}", self.number)
    }
}

impl Inode {
    pub(super) fn parse(number: u32, raw: Vec<u8>, seed: Option<Seed>) -> Result<Self, Ext4Error> {
        let kind = match le16(&raw, 0) >> 12 {
            0x1 => Kind::Fifo,
            0x2 => Kind::CharacterDevice,
            0x4 => Kind::Directory,
            0x6 => Kind::BlockDevice,
            0x8 => Kind::Regular,
            0xa => Kind::Symlink,
            0xc => Kind::Socket,
            _ => return Err(corrupt(format!("inode {number} is of no known kind"))),
        };
        let inode = Inode {
            number,
            kind,
            raw,
            seed,
        };
        if BASE_BYTES + inode.extra_bytes() > inode.raw.len() {
            return Err(corrupt(format!("{inode} is larger than it can be")));
        }
        inode.check_sum()?;
        if inode.links() == 0 && inode.flags() & ATTRIBUTE == 0 {
            return Err(corrupt(format!("{inode} has a name and was deleted")));
        }
        Ok(inode)
    }

    fn check_sum(&self) -> Result<(), Ext4Error> {
        let Some(seed) = self.seed else { return Ok(()) };
        let mut bytes = self.raw.clone();
        let has_high = self.extra_bytes() >= 4;
        let mut told = u32::from(le16(&bytes, 0x7c));
        bytes[0x7c..0x7e].fill(0);
        let mut mask = 0xffff;
        if has_high {
            told |= u32::from(le16(&bytes, 0x82)) << 16;
            bytes[0x82..0x84].fill(0);
            mask = u32::MAX;
        }
        check(seed.add(&bytes).value() & mask == told, || self.to_string())
    }

    #[cfg(test)]
    pub(super) fn raw_for_tests(&self) -> &[u8] {
        &self.raw
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Permissions, set-user-ID and its kin.
    pub(crate) fn mode(&self) -> u32 {
        u32::from(le16(&self.raw, 0)) & 0o7777
    }

    pub(crate) fn uid(&self) -> u32 {
        u32::from(le16(&self.raw, 0x2)) | u32::from(le16(&self.raw, 0x78)) << 16
    }

    pub(crate) fn gid(&self) -> u32 {
        u32::from(le16(&self.raw, 0x18)) | u32::from(le16(&self.raw, 0x7a)) << 16
    }

    /// Names that it has.
    pub(crate) fn links(&self) -> u16 {
        le16(&self.raw, 0x1a)
    }

    pub(crate) fn size(&self) -> u64 {
        let high = match self.kind {
            Kind::Regular | Kind::Directory => le32(&self.raw, 0x6c),
            _ => 0,
        };
        u64::from(le32(&self.raw, 0x4)) | u64::from(high) << 32
    }

    pub(crate) fn accessed(&self) -> Timestamp {
        self.time(0x8, 0x8c)
    }

    pub(crate) fn modified(&self) -> Timestamp {
        self.time(0x10, 0x88)
    }

    /// Major and minor number of a device.
    pub(crate) fn device(&self) -> (u32, u32) {
        let (old, new) = (le32(self.map(), 0), le32(self.map(), 4));
        match old {
            0 => (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xf_ff00),
            old => (old >> 8 & 0xff, old & 0xff),
        }
    }

    /// The low half has 32 bits with a sign; the high one two more, and nanoseconds.
    fn time(&self, at: usize, extra_at: usize) -> Timestamp {
        let seconds = i64::from(le32(&self.raw, at).cast_signed());
        let has_extra = extra_at + 4 <= BASE_BYTES + self.extra_bytes();
        let extra = if has_extra { le32(&self.raw, extra_at) } else { 0 };
        Timestamp {
            seconds: seconds + (i64::from(extra & 3) << 32),
            nanoseconds: (extra >> 2).min(999_999_999),
        }
    }

    /// Bytes in use after the first 128.
    pub(super) fn extra_bytes(&self) -> usize {
        match self.raw.len() > BASE_BYTES {
            true => usize::from(le16(&self.raw, 0x80)),
            false => 0,
        }
    }

    /// Where attributes in the inode itself begin, and up to where they may go.
    pub(super) fn attribute_area(&self) -> &[u8] {
        &self.raw[BASE_BYTES + self.extra_bytes()..]
    }

    /// The block with further attributes.
    pub(super) fn attribute_block(&self) -> Option<u64> {
        let block = u64::from(le32(&self.raw, 0x68)) | u64::from(le16(&self.raw, 0x76)) << 32;
        (block != 0).then_some(block)
    }

    /// What the inode of an attribute's value says of that.
    pub(super) fn attribute_hash(&self) -> Option<u32> {
        (self.flags() & ATTRIBUTE != 0).then(|| le32(&self.raw, 0x8))
    }

    pub(super) fn map(&self) -> &[u8] {
        &self.raw[MAP_AT..MAP_AT + MAP_BYTES]
    }

    pub(super) fn seed(&self) -> Option<Seed> {
        self.seed
    }

    fn flags(&self) -> u32 {
        le32(&self.raw, 0x20)
    }

    pub(super) fn has_extents(&self) -> bool {
        self.flags() & EXTENTS != 0
    }

    pub(super) fn is_inline(&self) -> bool {
        self.flags() & INLINE != 0
    }

    /// The target of a symbolic link that has no other place than the inode.
    pub(super) fn fast_link(&self) -> Option<&[u8]> {
        let is_fast = !self.is_inline() && !self.has_extents() && self.size() < MAP_BYTES as u64;
        is_fast.then(|| &self.map()[..self.size() as usize])
    }

    pub(super) fn refuse_encrypted(&self) -> Result<(), Ext4Error> {
        match self.flags() & ENCRYPTED {
            0 => Ok(()),
            _ => Err(Ext4Error::Unsupported(format!("{self} is encrypted"))),
        }
    }
}
