//! What lies on a disk: a file system, or partitions with one each. No I/O of its own.
//!
//! Only what is needed to mount: which kind, and from where to where. Whether it is sound is for the kernel to find out.

use std::fmt;

use crate::bytes::{le32, le64};

/// Entries of a partition table that are looked at, logical partitions included.
const PARTITIONS_MAX: u32 = 128;
/// Bytes that tell what a file system is.
const HEAD_BYTES: usize = 128 << 10;

/// Fills a buffer with the bytes at an offset.
pub(crate) type ReadAt<'a, E> = &'a dyn Fn(u64, &mut [u8]) -> Result<(), E>;

/// What was found somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// A file system that can be mounted, by the kernel's name for it.
    FileSystem(&'static str),
    /// Something that is known and not mounted here.
    Other(&'static str),
    Unknown,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Found::FileSystem(kind) => kind,
            Found::Other(what) => what,
            Found::Unknown => "nothing that is known",
        })
    }
}

/// A stretch of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Of a partition, as the kernel counts; `None` for the whole disk.
    pub(crate) number: Option<u32>,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) found: Found,
}

/// Finds the file system of a disk, or its partitions with theirs.
pub(crate) fn probe<E>(read_at: ReadAt<'_, E>, disk_bytes: u64) -> Result<Vec<Part>, E> {
    let whole = Part {
        number: None,
        offset: 0,
        len: disk_bytes,
        found: identify(read_at, 0, disk_bytes)?,
    };
    if whole.found != Found::Unknown {
        return Ok(vec![whole]);
    }
    for sector_bytes in [512, 4096] {
        let table = Table {
            read_at,
            disk_bytes,
            sector_bytes,
        };
        let mut parts = table.gpt()?;
        if parts.is_empty() {
            parts = table.mbr()?;
        }
        for part in &mut parts {
            part.found = identify(read_at, part.offset, part.len)?;
        }
        // A table read with the wrong sectors leads nowhere.
        if parts.iter().any(|part| part.found != Found::Unknown) {
            return Ok(parts);
        }
    }
    Ok(vec![whole])
}

fn identify<E>(read_at: ReadAt<'_, E>, offset: u64, len: u64) -> Result<Found, E> {
    let mut head = vec![0; HEAD_BYTES];
    let known = len.min(HEAD_BYTES as u64) as usize;
    read_at(offset, &mut head[..known])?;
    let is = |at: usize, magic: &[u8]| head[at..].starts_with(magic);
    let lvm = (0..4).any(|sector| is(sector * 512, b"LABELONE") && is(sector * 512 + 24, b"LVM2 001"));
    let other = [
        (lvm, "an LVM physical volume"),
        (is(0, b"LUKS\xba\xbe"), "an encrypted volume (LUKS)"),
        (is(4096, b"\xfc\x4e\x2b\xa9"), "a member of a RAID (md)"),
        (is(4086, b"SWAPSPACE2"), "swap"),
        (is(3, b"NTFS    "), "NTFS"),
        (is(3, b"EXFAT   "), "exFAT"),
    ];
    let file_systems = [
        (is(0x438, b"\x53\xef"), "ext4"),
        (is(0, b"XFSB"), "xfs"),
        (is(0x10040, b"_BHRfS_M"), "btrfs"),
        (
            is(82, b"FAT32   ") || is(54, b"FAT16   ") || is(54, b"FAT12   "),
            "vfat",
        ),
    ];
    let first = |list: &[(bool, &'static str)]| list.iter().find(|(is, _)| *is).map(|(_, name)| *name);
    Ok(match (first(&other), first(&file_systems)) {
        (Some(other), _) => Found::Other(other),
        (None, Some(kind)) => Found::FileSystem(kind),
        (None, None) => Found::Unknown,
    })
}

struct Table<'a, E> {
    read_at: ReadAt<'a, E>,
    disk_bytes: u64,
    sector_bytes: u64,
}

impl<E> Table<'_, E> {
    /// `None` where the disk has no such sector.
    fn read<const N: usize>(&self, sector: u64, skip: u64) -> Result<Option<[u8; N]>, E> {
        let offset = sector
            .checked_mul(self.sector_bytes)
            .and_then(|offset| offset.checked_add(skip));
        let Some(offset) = offset.filter(|offset| {
            offset
                .checked_add(N as u64)
                .is_some_and(|end| end <= self.disk_bytes)
        }) else {
            return Ok(None);
        };
        let mut bytes = [0; N];
        (self.read_at)(offset, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// A partition of so many sectors, unless it does not fit on the disk.
    fn part(&self, number: u32, first_sector: u64, sectors: u64) -> Option<Part> {
        let offset = first_sector.checked_mul(self.sector_bytes)?;
        let len = sectors.checked_mul(self.sector_bytes)?;
        let fits = len > 0 && offset > 0 && offset.checked_add(len)? <= self.disk_bytes;
        fits.then_some(Part {
            number: Some(number),
            offset,
            len,
            found: Found::Unknown,
        })
    }

    fn gpt(&self) -> Result<Vec<Part>, E> {
        let Some(header) = self
            .read::<92>(1, 0)?
            .filter(|header| header.starts_with(b"EFI PART"))
        else {
            return Ok(Vec::new());
        };
        let (table_sector, entry_bytes) = (le64(&header, 72), u64::from(le32(&header, 84)));
        let mut parts = Vec::new();
        for index in 0..le32(&header, 80).min(PARTITIONS_MAX) {
            let Some(entry) = self.read::<48>(table_sector, u64::from(index) * entry_bytes)? else {
                break;
            };
            let (first, last) = (le64(&entry, 32), le64(&entry, 40));
            if entry[..16] != [0; 16] && last >= first {
                parts.extend(self.part(index + 1, first, (last - first).saturating_add(1)));
            }
        }
        Ok(parts)
    }

    fn mbr(&self) -> Result<Vec<Part>, E> {
        let mut parts = Vec::new();
        let Some(entries) = self.entries(0)? else {
            return Ok(parts);
        };
        let mut extended = None;
        for (number, entry) in (1..).zip(entries) {
            match entry.kind {
                0 | 0xee => {}
                0x05 | 0x0f | 0x85 => extended = Some(entry.first_sector),
                _ => parts.extend(self.part(number, entry.first_sector, entry.sectors)),
            }
        }
        // Logical partitions: a chain, each link with one of them and the next link.
        let Some(base) = extended else { return Ok(parts) };
        let mut link = Some(base);
        for number in 5..PARTITIONS_MAX {
            let Some(at) = link.take() else { break };
            let Some([logical, next, ..]) = self.entries(at)? else {
                break;
            };
            parts.extend(self.part(number, at + logical.first_sector, logical.sectors));
            link = (next.kind != 0).then(|| base + next.first_sector);
        }
        Ok(parts)
    }

    /// The four entries in a boot sector, if it is one.
    fn entries(&self, sector: u64) -> Result<Option<[Entry; 4]>, E> {
        let boot = self
            .read::<512>(sector, 0)?
            .filter(|boot| boot[510..] == [0x55, 0xaa]);
        Ok(boot.map(|boot| {
            [446, 462, 478, 494].map(|at| Entry {
                kind: boot[at + 4],
                first_sector: le32(&boot, at + 8).into(),
                sectors: le32(&boot, at + 12).into(),
            })
        }))
    }
}

struct Entry {
    kind: u8,
    first_sector: u64,
    sectors: u64,
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::process::{Command, Stdio};

    use super::*;

    fn probe_bytes(disk: &[u8]) -> Vec<Part> {
        let read_at = |offset: u64, buf: &mut [u8]| {
            buf.copy_from_slice(&disk[offset as usize..offset as usize + buf.len()]);
            Ok::<_, ()>(())
        };
        probe(&read_at, disk.len() as u64).unwrap()
    }

    /// Goal: partitions are found where sfdisk says that they are. Method: tables that it has written, with the magic of
    /// ext4 everywhere, against its own listing.
    #[test]
    fn partitions_are_found_where_sfdisk_puts_them() {
        for (label, script, count) in [
            ("gpt", "size=8MiB\nsize=4MiB\nsize=16MiB\n", 3),
            (
                "dos",
                "1 : size=8MiB\n2 : size=32MiB,type=5\n5 : size=4MiB\n6 : size=6MiB\n7 : size=2MiB\n",
                4,
            ),
        ] {
            let disk = tempfile::NamedTempFile::new().unwrap();
            disk.as_file().set_len(64 << 20).unwrap();
            let sfdisk = |arguments: &[&str], input: &str| {
                let mut sfdisk = Command::new("sfdisk")
                    .args(arguments)
                    .arg(disk.path())
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap();
                sfdisk.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
                let output = sfdisk.wait_with_output().unwrap();
                assert!(output.status.success());
                output.stdout
            };
            sfdisk(&["--quiet", "--label", label], script);
            // The first MiB is the disk's own.
            for mib in 1..64 {
                disk.as_file()
                    .write_all_at(b"\x53\xef", (mib << 20) + 0x438)
                    .unwrap();
            }
            let listing: serde_json::Value = serde_json::from_slice(&sfdisk(&["--json"], "")).unwrap();
            let listed = listing["partitiontable"]["partitions"].as_array().unwrap();
            let expected: Vec<_> = listed
                .iter()
                .filter(|entry| entry["type"] != "5")
                .map(|entry| Part {
                    number: entry["node"]
                        .as_str()
                        .and_then(|node| node.chars().last()?.to_digit(10)),
                    offset: entry["start"].as_u64().unwrap() * 512,
                    len: entry["size"].as_u64().unwrap() * 512,
                    found: Found::FileSystem("ext4"),
                })
                .collect();
            assert_eq!(expected.len(), count, "{label}: {listing:#}");
            assert_eq!(
                probe_bytes(&std::fs::read(disk.path()).unwrap()),
                expected,
                "{label}"
            );
        }
    }

    #[test]
    fn what_is_not_a_table_makes_no_partitions() {
        let mut disk = vec![0; 1 << 20];
        assert_eq!(probe_bytes(&disk)[0].found, Found::Unknown);
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[584..592].fill(0xff);
        disk[592..600].fill(0xff);
        disk[446..510].fill(0xff);
        assert_eq!(probe_bytes(&disk).len(), 1);
        // A chain of logical partitions that leads back to itself.
        disk[446..510].fill(0);
        disk[450] = 5;
        disk[454] = 8;
        disk[458] = 8;
        disk[8 * 512 + 510..8 * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
        disk[8 * 512 + 462 + 4] = 5;
        assert_eq!(probe_bytes(&disk).len(), 1);
    }

    #[test]
    fn what_cannot_be_mounted_is_named() {
        for (at, magic, says) in [
            (512, &b"LABELONE"[..], "an LVM physical volume"),
            (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
            (4086, b"SWAPSPACE2", "swap"),
        ] {
            let mut disk = vec![0; 1 << 20];
            disk[at..at + magic.len()].copy_from_slice(magic);
            disk[512 + 24..512 + 32].copy_from_slice(b"LVM2 001");
            assert_eq!(probe_bytes(&disk)[0].found, Found::Other(says));
        }
    }
}
