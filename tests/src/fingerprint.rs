//! What a device or an image holds, in a form to compare: the SHA-256 of all of it, and a digest of
//! each block so that a difference can be told by place.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags};
use sha2::{Digest, Sha256};

use crate::device;

/// Bytes of a block: the unit in which a difference is told.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes read at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Differing stretches that a message names.
const STRETCHES_NAMED: usize = 8;

/// The content of a device or an image at one moment.
#[derive(Clone, PartialEq, Eq)]
pub struct Fingerprint {
    bytes: u64,
    sha256: [u8; 32],
    blocks: Vec<u64>,
}

impl Fingerprint {
    /// Reads a block device past every cache: what its page cache holds is written first.
    pub fn of_device(path: &Path) -> Result<Fingerprint> {
        device::flush_cache(path)?;
        Fingerprint::of_quiet_device(path)
    }

    /// Reads a block device by direct I/O, with nothing written first: for a device that is quiet already
    /// (frozen), where a flush could only add a write of ours.
    pub fn of_quiet_device(path: &Path) -> Result<Fingerprint> {
        let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty())
            .with_context(|| format!("open {}", path.display()))?;
        let fingerprint =
            Fingerprint::of_reader(File::from(file)).with_context(|| format!("read {}", path.display()))?;
        let bytes = device::bytes_of(path)?;
        ensure!(
            fingerprint.bytes == bytes,
            "read {} of {bytes} bytes of {}",
            fingerprint.bytes,
            path.display()
        );
        Ok(fingerprint)
    }

    /// Reads an image file.
    pub fn of_file(path: &Path) -> Result<Fingerprint> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        Fingerprint::of_reader(file).with_context(|| format!("read {}", path.display()))
    }

    fn of_reader(mut reader: impl Read) -> Result<Fingerprint> {
        let mut memory = vec![0_u8; CHUNK_BYTES + BLOCK_BYTES];
        let aligned = memory.as_ptr().align_offset(BLOCK_BYTES);
        let chunk = &mut memory[aligned..aligned + CHUNK_BYTES];
        let mut fingerprint = Fingerprint {
            bytes: 0,
            sha256: [0; 32],
            blocks: Vec::new(),
        };
        let mut sha256 = Sha256::new();
        loop {
            let filled = fill(&mut reader, chunk)?;
            sha256.update(&chunk[..filled]);
            fingerprint
                .blocks
                .extend(chunk[..filled].chunks(BLOCK_BYTES).map(block_digest));
            fingerprint.bytes += filled as u64;
            if filled < CHUNK_BYTES {
                break;
            }
        }
        fingerprint.sha256 = sha256.finalize().into();
        Ok(fingerprint)
    }

    /// The size of what was read.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The SHA-256 in hexadecimal.
    pub fn sha256(&self) -> String {
        self.sha256.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The numbers of the blocks that differ; blocks that only one side has count.
    pub fn blocks_differing(&self, other: &Fingerprint) -> Vec<u64> {
        let longest = self.blocks.len().max(other.blocks.len());
        (0..longest)
            .filter(|&at| self.blocks.get(at) != other.blocks.get(at))
            .map(|at| at as u64)
            .collect()
    }

    /// An error that names size, sums and places if `restored` is not what `self` is.
    pub fn expect_same(&self, restored: &Fingerprint, what: &str) -> Result<()> {
        if self == restored {
            return Ok(());
        }
        let differing = self.blocks_differing(restored);
        Err(anyhow::anyhow!(
            "{what}: restored {restored}, the device was {self}; {} blocks differ: {}",
            differing.len(),
            stretches(&differing)
        ))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, sha256 {}…", self.bytes, &self.sha256()[..16])
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// Reads until `chunk` is full or the end; gives the bytes read.
fn fill(reader: &mut impl Read, chunk: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < chunk.len() {
        match reader.read(&mut chunk[filled..]) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(filled)
}

/// Only to tell places apart in a message; the verdict is SHA-256's.
fn block_digest(block: &[u8]) -> u64 {
    block.chunks(8).fold(block.len() as u64, |digest, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (digest.rotate_left(23) ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

fn stretches(blocks: &[u64]) -> String {
    let mut found: Vec<(u64, u64)> = Vec::new();
    for &block in blocks {
        match found.last_mut() {
            Some((_, last)) if *last + 1 == block => *last = block,
            _ => found.push((block, block)),
        }
    }
    let named: Vec<String> = found
        .iter()
        .take(STRETCHES_NAMED)
        .map(|(first, last)| {
            format!(
                "bytes {:#x}..{:#x}",
                first * BLOCK_BYTES as u64,
                (last + 1) * BLOCK_BYTES as u64
            )
        })
        .collect();
    let more = found.len().saturating_sub(STRETCHES_NAMED);
    named.join(", ")
        + &if more > 0 {
            format!(" and {more} more stretches")
        } else {
            String::new()
        }
}

#[cfg(test)]
mod tests {
    use super::Fingerprint;

    /// Goal: a difference is found and told by place. Method: two images of three blocks and a bit that
    /// differ in one byte of the third.
    #[test]
    fn a_single_byte_is_told_by_its_place() {
        let first = vec![7_u8; 3 * 4096 + 512];
        let mut second = first.clone();
        second[2 * 4096 + 5] = 8;
        let read = |bytes: &[u8]| Fingerprint::of_reader(bytes).expect("memory is readable");
        assert!(read(&first).expect_same(&read(&first), "same").is_ok());
        let error = read(&first)
            .expect_same(&read(&second), "moment 1")
            .expect_err("they differ");
        let text = error.to_string();
        assert!(text.contains("1 blocks differ: bytes 0x2000..0x3000"), "{text}");
        assert_eq!(read(&first).blocks_differing(&read(&first[..4096])), [1, 2, 3]);
    }

    /// Goal: the sum is SHA-256 as everybody has it. Method: the known sum of "abc".
    #[test]
    fn the_sum_is_sha256() {
        let sum = Fingerprint::of_reader(&b"abc"[..]).expect("readable").sha256();
        assert_eq!(
            sum,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
