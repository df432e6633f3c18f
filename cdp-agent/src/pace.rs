//! When the read-back may go on: as fast as its own limit allows, and while no server is far behind.
//!
//! Read-backs have their places in the same dense order as captured writes, and logs are shipped in that order, so on the
//! wire nothing can overtake them. Live goes before read-back because read-back is not recorded in the first place while
//! a server that is connected has more than [`BACKLOG_HIGH`] to get: a captured write then finds about that before it. A
//! server that is away, refuses, or has no room holds nothing up; and one that never comes nearer, because more is
//! written than its line takes, does not keep a gap open for ever: [`FLOOR_BYTES`] go in each [`FLOOR_INTERVAL`].

use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use cdp_journal::format::{Body, Frame, SealedFrame};
use cdp_journal::net::Throttle;
use cdp_journal::ship::{Rate, Schedule};
use parking_lot::Mutex;

use crate::ship::Ships;

/// At this much of the log that a server has still to get, reading back rests...
const BACKLOG_HIGH: u64 = 8 << 20;
/// ... until it is down to this.
const BACKLOG_LOW: u64 = 4 << 20;
/// What is read back all the same ...
const FLOOR_BYTES: u64 = 1 << 20;
/// ... in so long.
const FLOOR_INTERVAL: Duration = Duration::from_secs(1);
/// Read back at once where there is a limit: what it allows in a second, and this at least.
const LIMITED_STEP_BYTES_MIN: u64 = 64 << 10;
/// Read back at once where there are servers or a limit ...
const STEP_BYTES: u64 = 4 << 20;
/// ... and where little of what was read had to be recorded: zeroes, or what the log has.
const STEP_BYTES_MAX: u64 = 32 << 20;

const _: () = assert!(STEP_BYTES <= BACKLOG_LOW);

/// See the module's head.
#[derive(Default)]
pub(crate) struct Pace {
    throttle: Throttle,
    gate: Mutex<Gate>,
    step: Mutex<Step>,
    ships: OnceLock<Weak<Ships>>,
}

/// Closes at one backlog and opens at another, so that the read-back does not stop and go with each frame.
#[derive(Debug, Default)]
struct Gate {
    /// The server that is waited for.
    closed_by: Option<String>,
    /// When it closed, or something went through all the same.
    since: Option<Instant>,
}

/// How much is read back at once: the more, the less of it had to be recorded.
#[derive(Debug)]
struct Step {
    bytes: u64,
    /// Of this one, so far.
    recorded: u64,
}

impl Default for Step {
    fn default() -> Self {
        Self {
            bytes: STEP_BYTES,
            recorded: 0,
        }
    }
}

impl Step {
    fn done(&mut self) {
        let recorded = std::mem::take(&mut self.recorded);
        self.bytes = match recorded * 4 < self.bytes {
            true => (self.bytes * 2).min(STEP_BYTES_MAX),
            false => STEP_BYTES,
        };
    }
}

impl Gate {
    /// How much may go through now, given the largest backlog of all servers.
    fn bytes_now(&mut self, largest: Option<(u64, String)>, now: Instant) -> u64 {
        let bound = match self.closed_by {
            Some(_) => BACKLOG_LOW,
            None => BACKLOG_HIGH,
        };
        self.closed_by = largest
            .filter(|(backlog, _)| *backlog > bound)
            .map(|(_, server)| server);
        if self.closed_by.is_none() {
            self.since = None;
            return u64::MAX;
        }
        let since = *self.since.get_or_insert(now);
        if now.saturating_duration_since(since) < FLOOR_INTERVAL {
            return 0;
        }
        self.since = Some(now);
        FLOOR_BYTES
    }
}

impl Pace {
    /// Looks at these servers from now on.
    pub(crate) fn look_at(&self, ships: &Arc<Ships>) {
        // Once, at the start.
        let _ = self.ships.set(Arc::downgrade(ships));
    }

    pub(crate) fn set(&self, schedule: Schedule) {
        self.throttle.set(schedule);
    }

    /// The limit in force.
    pub(crate) fn limit(&self) -> Option<Rate> {
        self.throttle.limit()
    }

    /// The server that reading back waits for.
    pub(crate) fn waits_for(&self) -> Option<String> {
        self.gate.lock().closed_by.clone()
    }

    /// How much may be read back now.
    pub(crate) fn bytes_now(&self) -> u64 {
        if !self.throttle.wait().is_zero() {
            return 0;
        }
        let ships = self.ships.get().and_then(Weak::upgrade);
        let largest = ships.and_then(|ships| ships.largest_backlog());
        let limit = self.throttle.limit();
        let step = match (&largest, limit) {
            (None, None) => u64::MAX,
            _ => self.step.lock().bytes,
        };
        let second = limit.map_or(u64::MAX, |limit| {
            limit.bytes_per_second().max(LIMITED_STEP_BYTES_MIN)
        });
        let now = self.gate.lock().bytes_now(largest, Instant::now());
        now.min(step).min(second)
    }

    /// So many bytes were read back and recorded.
    pub(crate) fn recorded(&self, bytes: u64) {
        self.throttle.charge(bytes);
        self.step.lock().recorded += bytes;
    }

    /// What was taken to be read back has been.
    pub(crate) fn run_done(&self) {
        self.step.lock().done();
    }

    /// A frame is encoded: what its read-backs are smaller now need not have waited.
    pub(crate) fn encoded(&self, frame: &SealedFrame) {
        if self.throttle.limit().is_some() {
            self.throttle.refund(saved_bytes(frame));
        }
    }
}

/// By how much encoding has made the read-backs of a frame smaller, their share of everything beside the data included.
fn saved_bytes(frame: &SealedFrame) -> u64 {
    let Ok(parsed) = Frame::parse(frame.head()) else {
        return 0;
    };
    let (mut all, mut read_back) = (0u64, 0u64);
    for placed in &parsed.records {
        match placed.record.body {
            Body::Write { len, .. } => all += len,
            Body::ReadBack { len, .. } => (all, read_back) = (all + len, read_back + len),
            _ => {}
        }
    }
    if read_back == 0 {
        return 0;
    }
    let share = read_back as f64 / all as f64;
    read_back.saturating_sub((frame.bytes().len() as f64 * share) as u64)
}

#[cfg(test)]
mod tests {
    use cdp_journal::format::{FrameBuilder, Origin, RecordFlags};
    use cdp_journal::{BootNs, Seq, VolumeId};
    use uuid::Uuid;

    use super::*;

    #[test]
    fn the_read_back_rests_while_a_server_is_far_behind_and_not_for_every_frame() {
        let (mut gate, now) = (Gate::default(), Instant::now());
        let server = |backlog| Some((backlog, "dr1:7443".to_owned()));
        assert_eq!(gate.bytes_now(None, now), u64::MAX);
        assert_eq!(gate.bytes_now(server(BACKLOG_HIGH), now), u64::MAX);
        assert_eq!(gate.bytes_now(server(BACKLOG_HIGH + 1), now), 0);
        assert_eq!(gate.closed_by.as_deref(), Some("dr1:7443"));
        assert_eq!(gate.bytes_now(server(BACKLOG_LOW + 1), now), 0);
        assert_eq!(gate.bytes_now(server(BACKLOG_LOW), now), u64::MAX);
        assert_eq!(gate.bytes_now(server(BACKLOG_HIGH), now), u64::MAX);
        assert_eq!(gate.bytes_now(server(u64::MAX), now), 0);
        assert_eq!(
            gate.bytes_now(None, now),
            u64::MAX,
            "it is away now, and holds nothing up"
        );
    }

    #[test]
    fn much_is_read_at_once_where_little_of_it_is_recorded() {
        let mut step = Step::default();
        let mut after = |recorded| {
            step.recorded = recorded;
            step.done();
            step.bytes >> 20
        };
        assert_eq!([0, 0, 1 << 20, 0].map(&mut after), [8, 16, 32, 32]);
        assert_eq!([32 << 20, 4 << 20].map(&mut after), [4, 4]);
    }

    #[test]
    fn under_a_limit_no_more_than_a_seconds_worth_is_read_at_once() {
        let pace = Pace::default();
        pace.set(Schedule::parse(&["1 MiB/s".to_owned()]).unwrap());
        for _ in 0..8 {
            pace.run_done();
            assert_eq!(pace.bytes_now(), 1 << 20);
        }
        pace.recorded(1 << 20);
        assert_eq!(pace.bytes_now(), 0);
    }

    /// Goal: a line that is too slow for what is written keeps no gap open for ever.
    #[test]
    fn a_little_is_read_back_however_far_behind_a_server_is() {
        let (mut gate, start) = (Gate::default(), Instant::now());
        let times = (0..10_000).map(|ms| start + Duration::from_millis(ms));
        let bytes: u64 = times
            .map(|now| gate.bytes_now(Some((1 << 40, "dr1:7443".to_owned())), now))
            .sum();
        assert_eq!(bytes, 9 * FLOOR_BYTES);
    }

    #[test]
    fn only_what_read_backs_save_is_given_back() {
        let frame = |read_back: bool| {
            let mut frame = FrameBuilder::new(Seq::FIRST);
            let (len, as_of) = (65536, None);
            let body = match read_back {
                true => Body::ReadBack {
                    offset: 0,
                    len,
                    as_of,
                },
                false => Body::Write { offset: 0, len },
            };
            let (origin, flags) = (Origin::default(), RecordFlags::default());
            frame
                .push(BootNs(1), VolumeId::new(1), origin, flags, body, &[&[7; 65536]])
                .unwrap();
            frame.seal(Uuid::nil(), 0).unwrap()
        };
        assert_eq!(saved_bytes(&frame(false)), 0);
        let saved = saved_bytes(&frame(true));
        assert!((60_000..65_536).contains(&saved), "{saved}");
    }
}
