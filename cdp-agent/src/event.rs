//! Bytes of the ring → events.

use cdp_ebpf::event::{CompleteEvent, EventKind, Op, WriteEvent};
use cdp_journal::BootNs;

/// One event, as the probe put it into the ring.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    /// A bio, or one chunk of it, and its bytes (none but for [`Op::Write`]).
    Write(WriteEvent, &'a [u8]),
    /// A write has ended.
    Complete(CompleteEvent),
    /// A write is about to end whose pages were changed on the way.
    Changed(CompleteEvent),
}

/// The ring holds what this build's probe does not write.
#[derive(Debug, thiserror::Error)]
#[error("an event of {bytes} bytes, kind {kind:?}, in the probe's ring: the probe is not of this build")]
pub(crate) struct ForeignEvent {
    bytes: usize,
    kind: Option<u8>,
}

/// Little-endian fields, one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }
    fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }
    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

impl<'a> Event<'a> {
    /// When it happened.
    pub(crate) fn at(&self) -> BootNs {
        match self {
            Self::Write(write, _) => BootNs(write.boot_ns),
            Self::Complete(ended) | Self::Changed(ended) => BootNs(ended.boot_ns),
        }
    }

    /// Reads one ring record.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, ForeignEvent> {
        let foreign = || ForeignEvent {
            bytes: bytes.len(),
            kind: bytes.first().copied(),
        };
        match bytes.first() {
            Some(&kind) if kind == EventKind::Write as u8 => Self::write(bytes).ok_or_else(foreign),
            Some(&kind) if kind == EventKind::Complete as u8 => {
                Self::complete(bytes).map(Self::Complete).ok_or_else(foreign)
            }
            Some(&kind) if kind == EventKind::Changed as u8 => {
                Self::complete(bytes).map(Self::Changed).ok_or_else(foreign)
            }
            _ => Err(foreign()),
        }
    }

    fn write(bytes: &'a [u8]) -> Option<Self> {
        let mut f = Fields(bytes);
        let event = WriteEvent {
            kind: f.u8()?,
            op: f.u8()?,
            flags: f.u8()?,
            last: f.u8()?,
            disk: f.u32()?,
            bio: f.u64()?,
            boot_ns: f.u64()?,
            sector: f.u64()?,
            bytes: f.u32()?,
            pid: f.u32()?,
            comm: f.take()?,
        };
        let op = Op::from_code(event.op)?;
        let data = if op == Op::Write {
            f.0.get(..event.bytes as usize)?
        } else {
            &[]
        };
        Some(Self::Write(event, data))
    }

    fn complete(bytes: &'a [u8]) -> Option<CompleteEvent> {
        let mut f = Fields(bytes);
        let event = CompleteEvent {
            kind: f.u8()?,
            op: f.u8()?,
            failed: f.u8()?,
            whole_bio: f.u8()?,
            disk: f.u32()?,
            bio: f.u64()?,
            boot_ns: f.u64()?,
            sector: f.u64()?,
            bytes: f.u32()?,
            reserved: f.u32()?,
        };
        Op::from_code(event.op)?;
        Some(event)
    }
}
