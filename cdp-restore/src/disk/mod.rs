//! A moment of a volume as a disk: readable, and writable where a throw-away layer lies over it.
//!
//! `nbd` and `mount` both serve one of these.
//!
//! Always true:
//! - D1: nothing that is written here reaches the history: it lies in the layer, which is gone with the process.
//! - D2: what was not written is what the view shows, every byte of it checked.

use std::io;
use std::ops::Range;

use cdp_journal::ReadError;
use cdp_journal::view::{Extent, ExtentKind, View};
use rustix::io::Errno;

use crate::units::ExactBytes;

mod complaints;
mod layer;

pub(crate) use complaints::{Complaints, complaints_in};
pub(crate) use layer::Layer;
use layer::Place;

/// What a disk is cut into where it is written: the layer holds whole blocks.
pub(crate) const BLOCK_BYTES: u64 = cdp_journal::BLOCK_BYTES;

/// Why a request to a disk failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum DiskError {
    /// The history could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The layer's file could not be read or written.
    #[error("the throw-away layer")]
    Layer(#[source] io::Error),
    #[error(
        "the throw-away layer is full: it holds {}; give a larger --layer-bytes-max", ExactBytes(*bytes_max)
    )]
    Full {
        /// Its bound.
        bytes_max: u64,
    },
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("bytes {offset}..{} are beyond the end of the disk", offset.saturating_add(*len))]
    OutOfRange { offset: u64, len: u64 },
}

impl DiskError {
    /// The number that the kernel would give.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            DiskError::Read(_) => Errno::IO,
            DiskError::Layer(error) => Errno::from_io_error(error).unwrap_or(Errno::IO),
            DiskError::Full { .. } => Errno::NOSPC,
            DiskError::ReadOnly => Errno::PERM,
            DiskError::OutOfRange { .. } => Errno::INVAL,
        }
    }
}

/// A moment of a volume as a disk.
#[derive(Debug)]
pub(crate) struct Disk {
    view: View,
    layer: Option<Layer>,
}

impl Disk {
    /// The disk that `view` shows; with a layer it can be written to.
    pub(crate) fn new(view: View, layer: Option<Layer>) -> Self {
        Disk { view, layer }
    }

    /// Its size.
    pub(crate) fn bytes(&self) -> u64 {
        self.view.bytes()
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.layer.is_some()
    }

    /// Fills `buf` with what lies at `offset`.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let range = self.checked(offset, buf.len() as u64)?;
        let Some(layer) = &self.layer else {
            return Ok(self.view.read_at(offset, buf)?);
        };
        for below in layer.read_at(range, buf).map_err(DiskError::Layer)? {
            let (start, end) = ((below.start - offset) as usize, (below.end - offset) as usize);
            self.view.read_at(below.start, &mut buf[start..end])?;
        }
        Ok(())
    }

    /// Writes `data` at `offset` of the layer.
    pub(crate) fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let range = self.checked(offset, data.len() as u64)?;
        self.writable()?.write_at(range, data, &self.view)
    }

    /// Makes a range read as zero.
    pub(crate) fn zero(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        static ZEROES: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
        let range = self.checked(offset, len)?;
        let layer = self.writable()?;
        // Whole blocks are only marked; what is left at both ends is written.
        let first = range.start.next_multiple_of(BLOCK_BYTES).min(range.end);
        let last = if range.end == self.bytes() {
            range.end
        } else {
            (range.end / BLOCK_BYTES * BLOCK_BYTES).max(first)
        };
        for part in [range.start..first, last..range.end] {
            if !part.is_empty() {
                let zeroes = &ZEROES[..(part.end - part.start) as usize];
                layer.write_at(part, zeroes, &self.view)?;
            }
        }
        if first < last {
            layer.zero(first..last)?;
        }
        Ok(())
    }

    /// What lies in a range, in order, without holes. Takes time and memory by the length of the range.
    pub(crate) fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, DiskError> {
        let range = self.checked(range.start, range.end.saturating_sub(range.start))?;
        let Some(layer) = &self.layer else {
            return Ok(self.view.extents(range)?);
        };
        let mut extents: Vec<Extent> = Vec::new();
        let mut push = |extent: Extent| match extents.last_mut() {
            Some(last) if last.kind == extent.kind => last.len += extent.len,
            _ => extents.push(extent),
        };
        for (run, place) in layer.runs(range) {
            let kind = match place {
                Place::Below => {
                    self.view.extents(run)?.into_iter().for_each(&mut push);
                    continue;
                }
                Place::File => ExtentKind::Data,
                Place::Zero => ExtentKind::Zero,
            };
            push(Extent {
                offset: run.start,
                len: run.end - run.start,
                kind,
            });
        }
        Ok(extents)
    }

    fn writable(&self) -> Result<&Layer, DiskError> {
        self.layer.as_ref().ok_or(DiskError::ReadOnly)
    }

    fn checked(&self, offset: u64, len: u64) -> Result<Range<u64>, DiskError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.bytes() => Ok(offset..end),
            _ => Err(DiskError::OutOfRange { offset, len }),
        }
    }
}
