//! Writes to a volume that nobody captured and that may be on their way.
//!
//! Where a driver tells no more of an end than its place, an end over a captured write may have been that of such
//! a write: the captured one is then still on its way, and what was read there too early. That shows when it ends,
//! unless the kernel skips the probe just then. So such places are read once more before the gap closes, when
//! neither can be on its way any more.

use std::ops::Range;
use std::time::Duration;

use cdp_journal::BootNs;

use super::{PLUG_TIME, STRANGER_QUIET};
use crate::regions::Regions;

/// See the module's head.
#[derive(Debug)]
pub(super) struct Unseen {
    /// They were queued by then.
    since: BootNs,
    /// None has been on its way since then: the disk was found idle.
    over: Option<BootNs>,
    /// Where writes have ended meanwhile that may be on their way all the same.
    stolen: Regions,
    stolen_at: BootNs,
}

impl Unseen {
    /// All of them were queued by `since`.
    pub(super) fn new(regions: u64, since: BootNs) -> Self {
        Self {
            since,
            over: None,
            stolen: Regions::new(regions),
            stolen_at: since,
        }
    }

    /// There may be more, queued by then.
    pub(super) fn add(&mut self, at: BootNs) {
        self.since = self.since.max(at);
        self.over = None;
    }

    pub(super) fn since(&self) -> BootNs {
        self.since
    }

    /// Captured writes to these regions ended, or one of these did.
    pub(super) fn ended(&mut self, regions: Range<u64>, at: BootNs) {
        if self.over.unwrap_or(after(self.since, STRANGER_QUIET)) < at {
            return;
        }
        for region in regions {
            self.stolen.insert(region);
        }
        self.stolen_at = self.stolen_at.max(at);
    }

    /// Has everything ended that was not captured, and everything that was taken for it? `idle_at`: a time at
    /// which the disk itself counted no write in flight.
    pub(super) fn is_over(&mut self, idle_at: Option<BootNs>, now: BootNs) -> bool {
        let is_over = |since: BootNs| {
            idle_at.is_some_and(|at| at > after(since, PLUG_TIME)) || now > after(since, STRANGER_QUIET)
        };
        if self.over.is_none() && idle_at.is_some_and(|at| at > after(self.since, PLUG_TIME)) {
            self.over = idle_at;
        }
        is_over(self.since) && (self.stolen.is_empty() || is_over(self.stolen_at))
    }

    /// Where to read once more, as soon as all is over.
    pub(super) fn take_stolen(&mut self) -> Option<Range<u64>> {
        self.stolen.take_run(u64::MAX)
    }

    pub(super) fn resize(&mut self, regions: u64) {
        self.stolen.resize(regions);
    }
}

fn after(time: BootNs, by: Duration) -> BootNs {
    BootNs(time.0.saturating_add(by.as_nanos() as u64))
}
