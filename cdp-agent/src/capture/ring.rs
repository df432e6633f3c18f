//! The ring between probe and agent, read without giving it back: what was read stays in it until whoever reads
//! says that it is kept elsewhere. So an agent that dies leaves to the next one all that had not reached the log.
//!
//! The layout is the kernel's (`kernel/bpf/ringbuf.c`): a page with the consumer's position, one with the
//! producer's, then the data, mapped twice in a row so that a record never wraps. A record is a header of 8 bytes,
//! whose first word is its length and two flags, and its bytes, at multiples of 8. Of the second time only as much is
//! mapped here as one record can take: all that is mapped counts as memory of the process.
#![expect(
    unsafe_code,
    reason = "borrows records that lie in memory shared with the kernel"
)]

use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::ensure;
use aya::maps::MapData;
use cdp_ebpf::event::{CHUNK_BYTES, WriteEvent};
use rustix::mm::ProtFlags;

use super::maps::Mapping;

/// Set in a record's length while the kernel still writes it.
const BUSY: u32 = 1 << 31;
/// Set in a record's length when the kernel has thrown it away.
const DISCARDED: u32 = 1 << 30;
const HEADER_BYTES: u64 = 8;
/// What the probe puts into the ring at once, at most.
const RECORD_BYTES_MAX: usize = HEADER_BYTES as usize + size_of::<WriteEvent>() + CHUNK_BYTES as usize;

/// A place in the ring, in bytes since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RingPosition(pub(crate) u64);

/// How far the ring has been filled and read.
#[derive(Clone)]
pub(crate) struct RingPositions {
    producer: Arc<Mapping>,
    read: Arc<AtomicU64>,
}

impl RingPositions {
    /// Everything that the kernel reserved before this call lies before this position.
    pub(crate) fn produced(&self) -> u64 {
        self.producer.word(0).load(Ordering::SeqCst)
    }

    /// Everything before this position has been read.
    pub(crate) fn consumed(&self) -> u64 {
        self.read.load(Ordering::SeqCst)
    }
}

/// See the module's head.
pub(super) struct Ring {
    map: MapData,
    consumer: Mapping,
    /// The producer's page, then the data, then the first of it again.
    producer: Arc<Mapping>,
    page_bytes: usize,
    ring_bytes: u64,
    read: Arc<AtomicU64>,
}

impl Ring {
    /// `ring_bytes`: the map's size. Reads on from where the consumer's position stands.
    pub(super) fn new(map: MapData, ring_bytes: u32) -> anyhow::Result<Self> {
        let page_bytes = rustix::param::page_size();
        let fd = map.fd().as_fd();
        let consumer = Mapping::new(fd, 0, page_bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        let again_bytes = RECORD_BYTES_MAX
            .next_multiple_of(page_bytes)
            .min(ring_bytes as usize);
        let bytes = page_bytes + ring_bytes as usize + again_bytes;
        let producer = Arc::new(Mapping::new(fd, page_bytes as u64, bytes, ProtFlags::READ)?);
        let read = Arc::new(AtomicU64::new(consumer.word(0).load(Ordering::SeqCst)));
        Ok(Self {
            map,
            consumer,
            producer,
            page_bytes,
            ring_bytes: u64::from(ring_bytes),
            read,
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.map.fd().as_fd()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.ring_bytes
    }

    pub(super) fn positions(&self) -> RingPositions {
        RingPositions {
            producer: Arc::clone(&self.producer),
            read: Arc::clone(&self.read),
        }
    }

    /// The next record, if there is one; the position behind it.
    pub(super) fn next(&mut self) -> Option<(&[u8], RingPosition)> {
        loop {
            let at = self.read.load(Ordering::SeqCst);
            if at >= self.producer.word(0).load(Ordering::SeqCst) {
                return None;
            }
            let place = self.page_bytes + (at % self.ring_bytes) as usize;
            let header = self.producer.word(place / 8).load(Ordering::SeqCst) as u32;
            if header & BUSY != 0 {
                return None;
            }
            let length = u64::from(header & !DISCARDED);
            let behind = at + (HEADER_BYTES + length).next_multiple_of(8);
            self.read.store(behind, Ordering::SeqCst);
            if header & DISCARDED == 0 {
                let start = place + HEADER_BYTES as usize;
                // SAFETY: a record that is not busy is written by nobody until the consumer's position, which only
                // `release` moves, has passed it; and that borrows self.
                let bytes = unsafe { self.producer.bytes(start..start + length as usize) };
                return Some((bytes, RingPosition(behind)));
            }
        }
    }

    /// Goes on at a place behind what was given back, and not behind what is there.
    pub(super) fn skip_to(&mut self, position: RingPosition) -> anyhow::Result<()> {
        let (from, to) = (self.released(), self.positions().produced());
        ensure!(
            (from.0..=to).contains(&position.0),
            "the ring holds {} to {to}, not {}",
            from.0,
            position.0
        );
        self.read.store(position.0, Ordering::SeqCst);
        Ok(())
    }

    /// Everything before this position was given back.
    pub(super) fn released(&self) -> RingPosition {
        RingPosition(self.consumer.word(0).load(Ordering::SeqCst))
    }

    /// Gives back what lies before `kept` and was read. So that the ring holds what comes, it also gives back what
    /// was read and not kept beyond half of the ring.
    pub(super) fn release(&mut self, kept: RingPosition) {
        let read = self.read.load(Ordering::SeqCst);
        let until = kept.0.min(read).max(read.saturating_sub(self.ring_bytes / 2));
        if until > self.released().0 {
            self.consumer.word(0).store(until, Ordering::SeqCst);
        }
    }
}
