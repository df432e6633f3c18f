//! Where the files of a mounted moment lie on its volume.
//!
//! Asked of the kernel by FIEMAP, which ext4, xfs and btrfs answer alike. What btrfs calls a place is an address of its
//! own, which its chunks turn into places on the device.

mod btrfs;
mod fiemap;

use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::Path;

use btrfs::Chunk;
use fiemap::Flags;
use rustix::io::Errno;

/// At most so much of a file is packed into one stretch of the disk (btrfs).
const PACKED_BYTES_MAX: u64 = 128 << 10;

/// Where some bytes of a file lie on the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Byte by byte from there on.
    At(u64),
    /// Packed, somewhere in there.
    Within(Range<u64>),
    /// Among the file system's own structures, or where nobody tells.
    Elsewhere,
}

/// Bytes of a file, and where they lie. What is in no stretch reads as zeroes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) in_file: Range<u64>,
    pub(crate) place: Place,
}

impl Stretch {
    /// Where on the volume its bytes lie, if that is known.
    pub(crate) fn on_volume(&self) -> Option<Range<u64>> {
        match &self.place {
            Place::At(offset) => Some(*offset..offset + (self.in_file.end - self.in_file.start)),
            Place::Within(range) => Some(range.clone()),
            Place::Elsewhere => None,
        }
    }
}

/// A mounted file system, which knows where its files lie.
#[derive(Debug)]
pub(crate) struct Placement {
    /// Where it begins on the volume.
    offset: u64,
    /// Of a btrfs.
    chunks: Option<Vec<Chunk>>,
}

impl Placement {
    /// Of the file system of that kind that is mounted at `root` and begins at `offset` of the volume.
    pub(crate) fn of(root: &Path, kind: &str, offset: u64) -> io::Result<Self> {
        let chunks = (kind == "btrfs")
            .then(|| btrfs::chunks(&File::open(root)?))
            .transpose()?;
        Ok(Placement { offset, chunks })
    }

    /// Gives `visit` each stretch of a file or folder, in order, until it breaks; one that lies in several places comes
    /// once for each. `false`: this file system does not tell.
    pub(crate) fn each(
        &self,
        file: &File,
        mut visit: impl FnMut(Stretch) -> ControlFlow<()>,
    ) -> io::Result<bool> {
        let mut last_end = 0;
        let told = fiemap::each(file, |extent| {
            // A file that grows while it is asked about could be told twice.
            let skip = u64::saturating_sub(last_end, extent.in_file.start);
            last_end = extent.in_file.end.max(last_end);
            if extent.in_file.start + skip >= extent.in_file.end || extent.flags.contains(Flags::UNWRITTEN) {
                return ControlFlow::Continue(());
            }
            let in_file = extent.in_file.start + skip..extent.in_file.end;
            let unknown = Flags::UNKNOWN | Flags::INLINE | Flags::NOT_ALIGNED | Flags::ENCRYPTED;
            if extent.flags.intersects(unknown) {
                let place = Place::Elsewhere;
                return visit(Stretch { in_file, place });
            }
            let is_packed = extent.flags.contains(Flags::ENCODED);
            self.each_place(in_file, extent.place + skip, is_packed, &mut visit)
        });
        match told {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn each_place(
        &self,
        in_file: Range<u64>,
        address: u64,
        is_packed: bool,
        visit: &mut impl FnMut(Stretch) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let place = |offset: u64, len: u64| match is_packed {
            true => Place::Within(offset..offset + len.max(PACKED_BYTES_MAX)),
            false => Place::At(offset),
        };
        let len = in_file.end - in_file.start;
        let Some(chunks) = &self.chunks else {
            let place = place(self.offset + address, len);
            return visit(Stretch { in_file, place });
        };
        let mut done = 0;
        while done < len {
            let rest = in_file.start + done..in_file.end;
            let Some(chunk) = Chunk::around(chunks, address + done) else {
                let place = Place::Elsewhere;
                return visit(Stretch { in_file: rest, place });
            };
            // What lies in neighbouring chunks may be told as one.
            let here = (chunk.addresses.end - (address + done)).min(len - done);
            for copy in chunk.places(address + done) {
                visit(Stretch {
                    in_file: rest.start..rest.start + here,
                    place: copy.map_or(Place::Elsewhere, |copy| place(self.offset + copy, here)),
                })?;
            }
            done += here;
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two chunks that touch, the first of them held twice, and one that is striped.
    fn striped() -> Placement {
        let chunk = |addresses: Range<u64>, copies: &[u64], is_striped| Chunk {
            addresses,
            copies: copies.to_vec(),
            is_striped,
        };
        let chunks = vec![
            chunk(1000..2000, &[50_000, 60_000], false),
            chunk(2000..3000, &[70_000], false),
            chunk(5000..6000, &[0, 1], true),
        ];
        Placement {
            offset: 1_000_000,
            chunks: Some(chunks),
        }
    }

    fn places(address: u64, in_file: Range<u64>, is_packed: bool) -> Vec<Stretch> {
        let mut told = Vec::new();
        let _ = striped().each_place(in_file, address, is_packed, &mut |stretch| {
            told.push(stretch);
            ControlFlow::Continue(())
        });
        told
    }

    #[test]
    fn an_address_of_btrfs_lies_where_its_chunk_says_in_every_copy() {
        let at = |in_file, place| Stretch { in_file, place };
        assert_eq!(
            places(1900, 0..300, false),
            [
                at(0..100, Place::At(1_050_900)),
                at(0..100, Place::At(1_060_900)),
                at(100..300, Place::At(1_070_000)),
            ]
        );
        let packed = Place::Within(1_070_000..1_070_000 + PACKED_BYTES_MAX);
        assert_eq!(places(2000, 0..10, true), [at(0..10, packed)]);
        for address in [5000, 4000, 9000] {
            assert_eq!(places(address, 7..8, false), [at(7..8, Place::Elsewhere)]);
        }
    }

    /// Goal: what is told is where the bytes are. Method: a file with a hole on this machine's own disk; its stretches
    /// cover its data and not the hole.
    #[test]
    fn the_stretches_of_a_file_cover_its_data_and_not_its_holes() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        file.write_all_at(&[2; 8192], 1 << 20).unwrap();
        file.sync_all().unwrap();
        let placement = Placement {
            offset: 0,
            chunks: None,
        };
        let mut told = Vec::new();
        let is_told = placement.each(&file, |stretch| {
            told.push(stretch.in_file);
            ControlFlow::Continue(())
        });
        if !is_told.unwrap() {
            return eprintln!("SKIPPED (part): the disk of temporary files does not tell where they lie");
        }
        let is_in = |at: u64| told.iter().any(|range| range.contains(&at));
        assert!(is_in(0) && is_in(8191) && is_in(1 << 20), "{told:?}");
        assert!(!is_in(512 << 10), "{told:?}");
    }
}
