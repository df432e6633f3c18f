//! What a volume of the second store must hold.

use cdp_journal::{BootNs, Seq};
use cdp_tests::rng::Rng;
use rustix::time::{ClockId, clock_gettime};

/// A write to the volume.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    /// Where.
    pub(crate) offset: u64,
    /// What.
    pub(crate) bytes: Vec<u8>,
}

impl Write {
    /// A write of `len` random bytes at `offset`.
    pub(crate) fn random(rng: &mut Rng, offset: u64, len: u64) -> Write {
        let mut bytes = vec![0; len as usize];
        rng.fill(&mut bytes);
        Write { offset, bytes }
    }
}

/// A moment at which the second store had said that something was durable.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    /// When the word had come back.
    pub(crate) at: BootNs,
    /// The last record that was durable.
    pub(crate) seq: Seq,
    /// How many writes it stands for.
    pub(crate) writes: usize,
}

/// What was done to a volume.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// Every write.
    pub(crate) writes: Vec<Write>,
    /// Everything that was said to be durable, in order.
    pub(crate) reports: Vec<Report>,
}

impl Log {
    /// Notes that `seq`, which stands for all the first `writes`, has just been told to be durable.
    pub(crate) fn durable(&mut self, seq: Seq, writes: usize) {
        let at = boot_now();
        self.reports.push(Report { at, seq, writes });
    }
}

/// The time now by the clock that the probe reads.
pub(crate) fn boot_now() -> BootNs {
    let now = clock_gettime(ClockId::Boottime);
    BootNs(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
}

/// The volume after any number of the writes.
#[derive(Debug)]
pub(crate) struct Replay<'a> {
    writes: &'a [Write],
    bytes: Vec<u8>,
    done: usize,
}

impl<'a> Replay<'a> {
    /// A volume of `bytes` that begins as zeroes.
    pub(crate) fn new(writes: &'a [Write], bytes: u64) -> Replay<'a> {
        Replay {
            writes,
            bytes: vec![0; bytes as usize],
            done: 0,
        }
    }

    /// What it holds after the first `writes`.
    pub(crate) fn after(&mut self, writes: usize) -> &[u8] {
        if writes < self.done {
            self.bytes.fill(0);
            self.done = 0;
        }
        for write in &self.writes[self.done..writes] {
            let at = write.offset as usize;
            self.bytes[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
        }
        self.done = writes;
        &self.bytes
    }
}
