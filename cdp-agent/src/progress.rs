//! How fast a volume is read back, when it will be done, and what of that is worth a line in the log.
//!
//! No clock: whoever looks at a volume from time to time hands in what it sees.
//!
//! Always true: a line about progress, and one about losses, is given at most every [`LINE_INTERVAL`].

use std::collections::VecDeque;
use std::time::Duration;

use cdp_journal::BootNs;

use crate::losses::LossCounts;

/// Between two lines of one kind in the log.
pub(crate) const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Between two samples that are kept.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// The rate is that of the last ten seconds.
const SAMPLES_MAX: usize = 11;

/// A volume at some time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) at: BootNs,
    /// It is not exact: being copied or resynced.
    pub(crate) is_behind: bool,
    /// Bytes read back since the agent started.
    pub(crate) read_bytes: u64,
    /// Bytes still to be read.
    pub(crate) left_bytes: u64,
    /// What it lost since the agent started.
    pub(crate) losses: LossCounts,
}

/// What is worth a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lines {
    /// It is still behind.
    pub(crate) is_progress_due: bool,
    /// Writes were lost since the last such line.
    pub(crate) lost: Option<LossCounts>,
}

/// One volume's.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    samples: VecDeque<(BootNs, u64)>,
    left_bytes: u64,
    /// Of the last line about progress, or since when it is behind.
    said_at: Option<BootNs>,
    losses_said_at: Option<BootNs>,
    losses_said: LossCounts,
}

impl Progress {
    /// Takes in how the volume is now.
    pub(crate) fn look(&mut self, seen: &Seen) -> Lines {
        let lost = self.lost(seen);
        if !seen.is_behind {
            self.samples.clear();
            self.said_at = None;
            return Lines {
                is_progress_due: false,
                lost,
            };
        }
        self.left_bytes = seen.left_bytes;
        let newest = self.samples.back().copied();
        if newest.is_none_or(|(at, _)| since(at, seen.at) >= SAMPLE_INTERVAL) {
            if self.samples.len() == SAMPLES_MAX {
                self.samples.pop_front();
            }
            self.samples.push_back((seen.at, seen.read_bytes));
        }
        let said_at = *self.said_at.get_or_insert(seen.at);
        let is_progress_due = since(said_at, seen.at) >= LINE_INTERVAL;
        if is_progress_due {
            self.said_at = Some(seen.at);
        }
        Lines {
            is_progress_due,
            lost,
        }
    }

    fn lost(&mut self, seen: &Seen) -> Option<LossCounts> {
        let is_due = self
            .losses_said_at
            .is_none_or(|at| since(at, seen.at) >= LINE_INTERVAL);
        if seen.losses == self.losses_said || !is_due {
            return None;
        }
        let lost = seen.losses.since(&self.losses_said);
        self.losses_said = seen.losses;
        self.losses_said_at = Some(seen.at);
        Some(lost)
    }

    /// Bytes read back each second, of late; `None` where that cannot be told yet, or nothing is read.
    pub(crate) fn bytes_per_second(&self) -> Option<f64> {
        let (&(first_at, first), &(last_at, last)) = (self.samples.front()?, self.samples.back()?);
        let seconds = since(first_at, last_at).as_secs_f64();
        (seconds > 0.0 && last > first).then(|| (last - first) as f64 / seconds)
    }

    /// When it will be done if it goes on like this and nothing more is lost.
    pub(crate) fn time_left(&self) -> Option<Duration> {
        let seconds = self.left_bytes as f64 / self.bytes_per_second()?;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

fn since(then: BootNs, now: BootNs) -> Duration {
    Duration::from_nanos(now.0.saturating_sub(then.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const MIB: u64 = 1 << 20;

    fn seen(at_ms: u64, read_bytes: u64, left_bytes: u64) -> Seen {
        Seen {
            at: BootNs(at_ms * MS),
            is_behind: true,
            read_bytes,
            left_bytes,
            losses: LossCounts::default(),
        }
    }

    #[test]
    fn rate_and_time_left_are_those_of_the_last_ten_seconds() {
        let mut progress = Progress::default();
        progress.look(&seen(0, 0, 1000 * MIB));
        assert_eq!(progress.time_left(), None, "one look tells no rate");
        for second in 1..=40u64 {
            // 20 MiB/s, and from the 21st second on 10 MiB/s.
            let read = (20 * second.min(20) + 10 * second.saturating_sub(20)) * MIB;
            progress.look(&seen(second * 1000, read, 1000 * MIB - read));
            match second {
                20 => assert_eq!(progress.bytes_per_second(), Some(20.0 * MIB as f64)),
                40 => {
                    assert_eq!(progress.bytes_per_second(), Some(10.0 * MIB as f64));
                    assert_eq!(progress.time_left(), Some(Duration::from_secs(40)));
                }
                _ => {}
            }
        }
        // A device that answers nothing: no time is made up.
        for second in 41..60 {
            progress.look(&seen(second * 1000, 600 * MIB, 400 * MIB));
        }
        assert_eq!(progress.time_left(), None);
    }

    #[test]
    fn a_line_is_due_every_ten_seconds_of_being_behind_and_never_sooner() {
        let mut progress = Progress::default();
        let mut due = Vec::new();
        for tenth in 0..450u64 {
            let is_behind = !(150..200).contains(&tenth);
            let lines = progress.look(&Seen {
                is_behind,
                ..seen(tenth * 100, 0, 1)
            });
            if lines.is_progress_due {
                due.push(tenth);
            }
        }
        assert_eq!(due, [100, 300, 400]);
    }

    #[test]
    fn losses_are_told_at_once_and_then_together() {
        let mut progress = Progress::default();
        let mut told = Vec::new();
        for second in 0..40u64 {
            let losses = LossCounts {
                ring_full: second.min(25),
                ..LossCounts::default()
            };
            let lines = progress.look(&Seen {
                losses,
                ..seen(second * 1000, 0, 1)
            });
            told.extend(lines.lost.map(|lost| (second, lost.ring_full)));
        }
        assert_eq!(told, [(1, 1), (11, 10), (21, 10), (31, 4)]);
    }
}
