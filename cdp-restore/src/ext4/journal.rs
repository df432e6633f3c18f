//! The journal (jbd2), replayed in memory: which blocks of the file system lie in it, newer than in their place.
//!
//! A moment of a mounted file system is what a power cut would have left: what it had committed may lie in the journal
//! alone. The rules are those of the kernel's `fs/jbd2/recovery.c`:
//!
//! - J1: a transaction counts if its commit block is there, and none after the first that is not.
//! - J2: a block that a transaction revokes is not taken from it or any before it.
//! - J3: of several copies the last one counts.
//! - J4: a copy that begins like a block of the journal itself has lost those four bytes; they are put back.
//!
//! What lies behind the newest transaction is left from earlier rounds, and is told by its number, or by the time of
//! its commit. Numbers are big-endian here, unlike everywhere else in ext4.

use std::collections::HashMap;

use super::checksum::Seed;
use super::map::Run;
use super::{Ext4, Ext4Error, check, corrupt};
use crate::bytes::{be16, be32, be64};

const MAGIC: u32 = 0xc03b_3998;
const HEAD_BYTES: usize = 12;
const SUPERBLOCK_BYTES: usize = 1024;

/// Kinds of blocks.
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_1: u32 = 3;
const SUPERBLOCK_2: u32 = 4;
const REVOKE: u32 = 5;

/// Features.
const COMPATIBLE_CHECKSUM: u32 = 0x1;
const BITS_64: u32 = 0x2;
const ASYNC_COMMIT: u32 = 0x4;
const CHECKSUM_2: u32 = 0x8;
const CHECKSUM_3: u32 = 0x10;
const FAST_COMMIT: u32 = 0x20;
const KNOWN: u32 = 0x1 | BITS_64 | ASYNC_COMMIT | CHECKSUM_2 | CHECKSUM_3 | FAST_COMMIT;

/// Flags of a tag.
const ESCAPED: u32 = 0x1;
const SAME_UUID: u32 = 0x2;
const LAST: u32 = 0x8;

/// Blocks of a journal that is read: 64 GiB of 4 KiB each. The kernel's tools make none above 1 GiB by themselves.
const BLOCKS_MAX: u32 = 16 << 20;
/// Copies and revocations kept, some 40 bytes each: those of 16 GiB of journal, in blocks of 4 KiB.
const ENTRIES_MAX: usize = 4 << 20;

/// A block of the file system that lies in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InJournal {
    /// Where.
    pub(super) block: u64,
    is_escaped: bool,
}

impl InJournal {
    /// Puts back what escaping took.
    pub(super) fn unescape(self, block: &mut [u8]) {
        if self.is_escaped {
            block[..4].copy_from_slice(&MAGIC.to_be_bytes());
        }
    }
}

/// What the journal knows better.
#[derive(Debug, Default)]
pub(super) struct Replay(HashMap<u64, InJournal>);

impl Replay {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn find(&self, block: u64) -> Option<InJournal> {
        self.0.get(&block).copied()
    }
}

/// How the journal is written.
struct Form {
    has_64_bits: bool,
    /// Commits do not wait for what they commit.
    is_async: bool,
    checksums: Checksums,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Checksums {
    None,
    Two(Seed),
    Three(Seed),
}

impl Checksums {
    fn seed(self) -> Option<Seed> {
        match self {
            Checksums::None => None,
            Checksums::Two(seed) | Checksums::Three(seed) => Some(seed),
        }
    }
}

/// One copy that a descriptor block tells of.
struct Tag {
    /// In the file system.
    block: u64,
    is_escaped: bool,
    checksum: u32,
}

/// One copy, as it was found.
struct Copy {
    tag: Tag,
    place: u64,
}

/// The journal, being read from its start.
struct Scan<'s, 'a> {
    fs: &'s Ext4<'a>,
    form: Form,
    /// Where its blocks lie.
    runs: Vec<Run>,
    first: u32,
    end: u32,
    /// The next block.
    at: u32,
    /// Blocks passed so far: no more than there are.
    passed: u32,
    /// The transaction being read.
    sequence: u32,
    /// What is whole so far: copies with the number of their transaction, and the last to revoke each block.
    copies: Vec<(u32, Copy)>,
    revoked: HashMap<u64, u32>,
    last_commit_time: u64,
}

/// What a transaction holds, until its commit block is found.
#[derive(Default)]
struct Transaction {
    copies: Vec<Copy>,
    revoked: Vec<u64>,
    /// Something in it does not match its checksum: what earlier rounds have left looks like that.
    is_doubtful: bool,
}

/// Reads the journal of a file system that was not unmounted.
pub(super) fn load(fs: &Ext4<'_>) -> Result<Replay, Ext4Error> {
    let inode = fs.inode(fs.superblock.journal)?;
    let mut runs = Vec::new();
    fs.runs(&inode, &mut |run| {
        runs.push(run);
        match runs.len() > ENTRIES_MAX {
            true => Err(corrupt("its journal lies in too many places")),
            false => Ok(()),
        }
    })?;
    let Some(mut scan) = Scan::begin(fs, runs)? else {
        return Ok(Replay::default());
    };
    while scan.transaction()? {}
    scan.finish()
}

impl<'s, 'a> Scan<'s, 'a> {
    /// `None` if there is nothing to replay.
    fn begin(fs: &'s Ext4<'a>, runs: Vec<Run>) -> Result<Option<Self>, Ext4Error> {
        let mut scan = Scan {
            fs,
            form: Form {
                has_64_bits: false,
                is_async: false,
                checksums: Checksums::None,
            },
            runs,
            first: 0,
            end: BLOCKS_MAX,
            at: 0,
            passed: 0,
            sequence: 0,
            copies: Vec::new(),
            revoked: HashMap::new(),
            last_commit_time: 0,
        };
        let block = scan.read(0)?;
        let kind = be32(&block, 4);
        if be32(&block, 0) != MAGIC || !matches!(kind, SUPERBLOCK_1 | SUPERBLOCK_2) {
            return Err(corrupt("its journal has no superblock"));
        }
        if u64::from(be32(&block, 0xc)) != fs.superblock.block_bytes {
            return Err(corrupt("the blocks of its journal are of another size"));
        }
        let features = |at| if kind == SUPERBLOCK_2 { be32(&block, at) } else { 0 };
        scan.form = Form::of(&block, features(0x24), features(0x28))?;
        (scan.end, scan.first) = (be32(&block, 0x10), be32(&block, 0x14));
        scan.sequence = be32(&block, 0x18);
        scan.at = be32(&block, 0x1c);
        if scan.at == 0 {
            return Ok(None);
        }
        let is_sound = scan.end <= BLOCKS_MAX && (1..scan.end).contains(&scan.first);
        match is_sound && (scan.first..scan.end).contains(&scan.at) {
            true => Ok(Some(scan)),
            false => Err(corrupt("the superblock of its journal makes no sense")),
        }
    }

    /// Where a block of the journal lies.
    fn place(&self, number: u32) -> Result<u64, Ext4Error> {
        let number = u64::from(number);
        let after = self.runs.partition_point(|run| run.logical <= number);
        let run = after.checked_sub(1).map(|index| self.runs[index]);
        let run = run.filter(|run| number - run.logical < run.blocks);
        let place = run.map(|run| run.physical + (number - run.logical));
        let place = place.filter(|place| *place < self.fs.superblock.blocks);
        place.ok_or_else(|| corrupt(format!("its journal lacks block {number}")))
    }

    fn read(&self, number: u32) -> Result<Vec<u8>, Ext4Error> {
        self.fs.read_block(self.place(number)?)
    }

    /// Passes a block, around the end; `None` when all of them were passed.
    fn pass(&mut self) -> Option<u32> {
        let number = self.at;
        self.passed += 1;
        if self.passed > self.end - self.first {
            return None;
        }
        self.at = if number + 1 < self.end {
            number + 1
        } else {
            self.first
        };
        Some(number)
    }

    /// Reads one transaction; false at the end of what counts.
    fn transaction(&mut self) -> Result<bool, Ext4Error> {
        let mut open = Transaction::default();
        while let Some(number) = self.pass() {
            let block = self.read(number)?;
            if be32(&block, 0) != MAGIC || be32(&block, 8) != self.sequence {
                return Ok(false);
            }
            match be32(&block, 4) {
                DESCRIPTOR => {
                    open.is_doubtful |= !self.form.tail_matches(&block);
                    for tag in self.form.tags(&block) {
                        let Some(number) = self.pass() else {
                            return Ok(false);
                        };
                        let place = self.place(number)?;
                        open.copies.push(Copy { tag, place });
                    }
                }
                REVOKE => {
                    open.is_doubtful |= !self.form.tail_matches(&block);
                    open.revoked.extend(self.form.revoked(&block)?);
                }
                COMMIT => return self.commit(&block, open),
                // What earlier rounds have left.
                _ => return Ok(false),
            }
            if self.copies.len() + open.copies.len() + self.revoked.len() + open.revoked.len() > ENTRIES_MAX {
                return Err(Ext4Error::Unsupported(
                    "its journal holds more than is replayed here".to_owned(),
                ));
            }
        }
        Ok(false)
    }

    fn commit(&mut self, block: &[u8], open: Transaction) -> Result<bool, Ext4Error> {
        let time = be64(block, 0x30);
        let is_torn = !self.form.commit_matches(block);
        if open.is_doubtful || is_torn {
            let is_left_over = time < self.last_commit_time;
            // A commit that did not wait for what it commits may come alone.
            return match is_left_over || (!open.is_doubtful && self.form.is_async) {
                true => Ok(false),
                false => Err(corrupt("its journal does not match its checksums")),
            };
        }
        self.last_commit_time = time;
        let sequence = self.sequence;
        self.copies
            .extend(open.copies.into_iter().map(|copy| (sequence, copy)));
        self.revoked
            .extend(open.revoked.into_iter().map(|number| (number, sequence)));
        self.sequence = self.sequence.wrapping_add(1);
        Ok(true)
    }

    fn finish(self) -> Result<Replay, Ext4Error> {
        let mut replay = HashMap::new();
        for (sequence, Copy { tag, place }) in self.copies {
            // Numbers wrap: the kernel's `tid_gt`.
            let is_after = |revoked: u32| sequence.wrapping_sub(revoked).cast_signed() > 0;
            if self
                .revoked
                .get(&tag.block)
                .is_some_and(|revoked| !is_after(*revoked))
            {
                continue;
            }
            self.form.check_copy(self.fs, place, sequence, tag.checksum)?;
            let copy = InJournal {
                block: place,
                is_escaped: tag.is_escaped,
            };
            replay.insert(tag.block, copy);
        }
        Ok(Replay(replay))
    }
}

impl Form {
    fn of(superblock: &[u8], compatible: u32, incompatible: u32) -> Result<Self, Ext4Error> {
        let unsupported = |what: &str| Err(Ext4Error::Unsupported(format!("its journal {what}")));
        if incompatible & !KNOWN != 0 {
            return unsupported("has features that are not known here");
        }
        if incompatible & FAST_COMMIT != 0 {
            return unsupported("has fast commits");
        }
        let seed = Seed::ONES.add(&superblock[0x30..0x40]);
        let checksums = match (incompatible & CHECKSUM_2 != 0, incompatible & CHECKSUM_3 != 0) {
            (true, true) => return Err(corrupt("its journal has checksums of two kinds")),
            (true, false) => Checksums::Two(seed),
            (false, true) => Checksums::Three(seed),
            (false, false) => Checksums::None,
        };
        if checksums == Checksums::None
            && (compatible & COMPATIBLE_CHECKSUM | incompatible & ASYNC_COMMIT) != 0
        {
            return unsupported("has checksums of the first kind, or commits that do not wait");
        }
        if checksums != Checksums::None {
            const CRC32C: u8 = 4;
            let told = be32(superblock, 0xfc);
            let mut bytes = superblock[..SUPERBLOCK_BYTES].to_vec();
            bytes[0xfc..0x100].fill(0);
            let matches = superblock[0x50] == CRC32C && Seed::ONES.add(&bytes).value() == told;
            check(matches, || "superblock of the journal".to_owned())?;
        }
        Ok(Form {
            has_64_bits: incompatible & BITS_64 != 0,
            is_async: incompatible & ASYNC_COMMIT != 0,
            checksums,
        })
    }

    /// Bytes of a block that a descriptor or a revocation may use.
    fn used(&self, block: &[u8]) -> usize {
        block.len() - if self.checksums == Checksums::None { 0 } else { 4 }
    }

    /// The checksum at the end of descriptors and revocations.
    fn tail_matches(&self, block: &[u8]) -> bool {
        let Some(seed) = self.checksums.seed() else {
            return true;
        };
        let end = block.len() - 4;
        seed.add(&block[..end]).add(&[0; 4]).value() == be32(block, end)
    }

    fn commit_matches(&self, block: &[u8]) -> bool {
        const HEAD_BYTES: usize = 60;
        let Some(seed) = self.checksums.seed() else {
            return true;
        };
        let told = be32(block, 0x10);
        let mut bytes = block.to_vec();
        bytes[0x10..0x14].fill(0);
        // Older kernels left other bytes behind the head, after they had summed zeroes.
        let whole = seed.add(&bytes).value() == told;
        bytes[HEAD_BYTES..].fill(0);
        whole || seed.add(&bytes).value() == told
    }

    fn tags(&self, block: &[u8]) -> Vec<Tag> {
        let tag_bytes = match (self.checksums, self.has_64_bits) {
            (Checksums::Three(_), _) => 16,
            (Checksums::Two(_), true) => 14,
            (Checksums::Two(_), false) => 10,
            (Checksums::None, true) => 12,
            (Checksums::None, false) => 8,
        };
        let is_three = matches!(self.checksums, Checksums::Three(_));
        let (mut tags, mut at) = (Vec::new(), HEAD_BYTES);
        while at + tag_bytes <= self.used(block) {
            let (flags, checksum) = match is_three {
                true => (be32(block, at + 4), be32(block, at + 12)),
                false => (be16(block, at + 6).into(), be16(block, at + 4).into()),
            };
            let high = if self.has_64_bits { be32(block, at + 8) } else { 0 };
            tags.push(Tag {
                block: u64::from(be32(block, at)) | u64::from(high) << 32,
                is_escaped: flags & ESCAPED != 0,
                checksum,
            });
            if flags & LAST != 0 {
                break;
            }
            at += tag_bytes + if flags & SAME_UUID != 0 { 0 } else { 16 };
        }
        tags
    }

    fn revoked(&self, block: &[u8]) -> Result<Vec<u64>, Ext4Error> {
        let end = be32(block, HEAD_BYTES) as usize;
        if end > self.used(block) {
            return Err(corrupt("a block of its journal makes no sense"));
        }
        let entries = block.get(HEAD_BYTES + 4..end).unwrap_or_default();
        Ok(match self.has_64_bits {
            true => entries.chunks_exact(8).map(|entry| be64(entry, 0)).collect(),
            false => entries
                .chunks_exact(4)
                .map(|entry| be32(entry, 0).into())
                .collect(),
        })
    }

    fn check_copy(&self, fs: &Ext4<'_>, block: u64, sequence: u32, told: u32) -> Result<(), Ext4Error> {
        let sum = |seed: Seed| -> Result<u32, Ext4Error> {
            let bytes = fs.read_block(block)?;
            Ok(seed.add(&sequence.to_be_bytes()).add(&bytes).value())
        };
        let matches = match self.checksums {
            Checksums::None => true,
            Checksums::Two(seed) => sum(seed)? & 0xffff == told,
            Checksums::Three(seed) => sum(seed)? == told,
        };
        check(matches, || format!("a block of its journal ({block})"))
    }
}
