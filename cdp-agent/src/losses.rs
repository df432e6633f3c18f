//! Writes that could not be captured, counted by why.

use std::fmt;

use cdp_ebpf::Cause;
use cdp_ebpf::map::CAUSES;
use serde::{Deserialize, Serialize};

/// What the probe's counters say of one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Losses {
    /// Bios dropped, by [`Cause`].
    pub(crate) dropped: [u64; CAUSES],
    pub(crate) lost_completions: u64,
}

impl Losses {
    /// Those that were not counted yet when these were.
    pub(crate) fn since(self, earlier: Self) -> Self {
        let causes = Cause::ALL.map(|cause| cause as usize);
        Self {
            dropped: causes.map(|at| self.dropped[at].saturating_sub(earlier.dropped[at])),
            lost_completions: self.lost_completions.saturating_sub(earlier.lost_completions),
        }
    }
}

/// What a volume lost since the agent started. The probe counts by disk: of a disk with several volumes, what it
/// dropped between two looks at its counters counts for every volume of which a region is marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LossCounts {
    /// The ring had no room.
    pub(crate) ring_full: u64,
    /// A page of the write could not be read.
    pub(crate) unreadable: u64,
    /// The write had more parts than the probe walks.
    pub(crate) bound: u64,
    /// An operation that the probe does not know.
    pub(crate) unsupported: u64,
    /// Times at which the kernel was found to have skipped the probe.
    pub(crate) skipped: u64,
    /// The device failed them.
    pub(crate) failed: u64,
    /// They came while the store was full.
    pub(crate) store_full: u64,
    /// Ends of writes that found no room in the ring; no write by themselves.
    pub(crate) lost_completions: u64,
}

impl LossCounts {
    /// Adds what a disk's counters have gone up by.
    pub(crate) fn add(&mut self, new: &Losses) {
        for cause in Cause::ALL {
            *self.of(cause) += new.dropped[cause as usize];
        }
        self.lost_completions += new.lost_completions;
    }

    fn of(&mut self, cause: Cause) -> &mut u64 {
        match cause {
            Cause::RingFull => &mut self.ring_full,
            Cause::Unreadable => &mut self.unreadable,
            Cause::Bound => &mut self.bound,
            Cause::Unsupported => &mut self.unsupported,
        }
    }

    /// All writes among them.
    pub(crate) fn writes(&self) -> u64 {
        self.named()[..7].iter().map(|(count, _)| count).sum()
    }

    /// What came since `earlier`.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        Self {
            ring_full: self.ring_full.saturating_sub(earlier.ring_full),
            unreadable: self.unreadable.saturating_sub(earlier.unreadable),
            bound: self.bound.saturating_sub(earlier.bound),
            unsupported: self.unsupported.saturating_sub(earlier.unsupported),
            skipped: self.skipped.saturating_sub(earlier.skipped),
            failed: self.failed.saturating_sub(earlier.failed),
            store_full: self.store_full.saturating_sub(earlier.store_full),
            lost_completions: self.lost_completions.saturating_sub(earlier.lost_completions),
        }
    }

    /// With names for messages; writes first.
    fn named(&self) -> [(u64, &'static str); 8] {
        [
            (self.ring_full, "ring full"),
            (self.unreadable, "unreadable"),
            (self.bound, "too many parts"),
            (self.unsupported, "unknown operation"),
            (self.skipped, "skipped by the kernel"),
            (self.failed, "failed"),
            (self.store_full, "store full"),
            (self.lost_completions, "ends lost"),
        ]
    }
}

impl fmt::Display for LossCounts {
    /// What is not zero: `12 ring full, 1 failed`; nothing if all is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = self.named();
        let some = named.iter().filter(|(count, _)| *count > 0);
        for (i, (count, name)) in some.enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{count} {name}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_counters_went_up_by_is_told_by_cause() {
        let before = Losses {
            dropped: [5, 0, 7, 0],
            lost_completions: 1,
        };
        let now = Losses {
            dropped: [8, 1, 7, 2],
            lost_completions: 4,
        };
        let mut counts = LossCounts {
            failed: 1,
            ..LossCounts::default()
        };
        counts.add(&now.since(before));
        assert_eq!(counts.writes(), 3 + 1 + 2 + 1);
        assert_eq!(
            counts.to_string(),
            "3 ring full, 1 unreadable, 2 unknown operation, 1 failed, 3 ends lost"
        );
        let mut later = counts;
        later.skipped += 1;
        assert_eq!(later.since(&counts).to_string(), "1 skipped by the kernel");
        assert_eq!(LossCounts::default().to_string(), "");
    }
}
