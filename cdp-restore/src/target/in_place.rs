//! A device that is changed here and there: read past the page cache, written through it, flushed.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use rustix::fs::OFlags;

use super::device::open_exclusively;
use super::{DeviceTarget, TargetError, zero_device_range};

/// Reads past the page cache begin and end at multiples of this, in the device and in memory.
const ALIGN_BYTES: u64 = 4096;
/// One read of the device.
pub(crate) const PIECE_BYTES: u64 = 1 << 20;

thread_local! {
    /// Where a thread reads to; aligned within.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A device that is ours alone until this is dropped.
#[derive(Debug)]
pub(crate) struct DeviceInPlace {
    path: PathBuf,
    file: File,
    /// The same device, past the page cache: what is read is what the device holds.
    direct: File,
    bytes: u64,
}

impl DeviceTarget {
    /// Opens the device to change parts of it. Whatever was written to it before is on it then.
    pub(crate) fn open_in_place(self) -> Result<DeviceInPlace, TargetError> {
        let file = open_exclusively(&self.path, OpenOptions::new().read(true).write(true))?;
        file.sync_all().map_err(TargetError::io("flush", &self.path))?;
        let direct = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::DIRECT.bits() as i32)
            .open(&self.path)
            .map_err(TargetError::io("open past the page cache", &self.path))?;
        Ok(DeviceInPlace {
            path: self.path,
            file,
            direct,
            bytes: self.bytes,
        })
    }
}

impl DeviceInPlace {
    /// Gives `visit` what the device holds in a range, piece by piece.
    pub(crate) fn each_piece(
        &self,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize((PIECE_BYTES + 3 * ALIGN_BYTES) as usize, 0);
            let skip = scratch.as_ptr().align_offset(ALIGN_BYTES as usize);
            let aligned = scratch.get_mut(skip..).unwrap_or_default();
            let (mut at, end) = (offset, offset + len);
            while at < end {
                let piece_end = end.min(at + PIECE_BYTES);
                let first = at / ALIGN_BYTES * ALIGN_BYTES;
                let last = piece_end.next_multiple_of(ALIGN_BYTES).min(self.bytes);
                let bytes = &mut aligned[..(last - first) as usize];
                self.direct.read_exact_at(bytes, first)?;
                visit(at, &bytes[(at - first) as usize..(piece_end - first) as usize])?;
                at = piece_end;
            }
            Ok(())
        })
    }

    /// Writes `data` at `offset`.
    pub(crate) fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Makes a range read as zero.
    pub(crate) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        zero_device_range(&self.file, offset, len)
    }

    /// Waits until everything is on the device.
    pub(crate) fn flush(&self) -> Result<(), TargetError> {
        self.file.sync_all().map_err(TargetError::io("flush", &self.path))
    }
}
