//! What was sent and is not acknowledged, and how far behind the other end is. Decisions only: no clock, no socket.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::types::{Seq, WallNs};

/// Frames that may be on their way at once...
const FRAMES_MAX: usize = 4096;
/// ... and bytes.
const BYTES_MAX: u64 = 64 << 20;
/// Over how long the rate is measured.
const RATE_WINDOW: Duration = Duration::from_secs(10);
/// How often it is noted.
const RATE_STEP: Duration = Duration::from_millis(200);

/// A frame that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Its last record.
    pub last: Seq,
    /// Time of its oldest record.
    pub wall: WallNs,
    /// What was sent of it.
    pub bytes: u64,
    /// What was not, as the other end has it.
    pub saved_bytes: u64,
    /// The segment it lies in, and where in it the next frame begins.
    pub end: (u64, u64),
}

/// An acknowledgement of what was never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server acknowledges seq {acked}, and was sent up to {sent} only")]
pub struct AckedTooMuch {
    acked: u64,
    sent: u64,
}

/// One target of a log.
#[derive(Debug, Default)]
pub struct Flight {
    acked: Option<Seq>,
    acked_end: Option<(u64, u64)>,
    acked_bytes: u64,
    on_their_way: VecDeque<Sent>,
    bytes_on_their_way: u64,
    sent_bytes: u64,
    saved_bytes: u64,
    /// When how much had been acknowledged, and how long the log was, over [`RATE_WINDOW`].
    noted: VecDeque<(Instant, u64, u64)>,
}

impl Flight {
    /// The other end was found to hold everything up to `held`, whose frame ends at `end`.
    pub fn restart(&mut self, held: Option<Seq>, end: Option<(u64, u64)>) {
        (self.acked, self.acked_end) = (held, end);
        self.on_their_way.clear();
        self.bytes_on_their_way = 0;
        self.noted.clear();
    }

    /// May one more frame be sent?
    pub fn has_room(&self) -> bool {
        self.on_their_way.len() < FRAMES_MAX && self.bytes_on_their_way < BYTES_MAX
    }

    /// A frame was sent.
    pub fn sent(&mut self, frame: Sent) {
        self.sent_bytes += frame.bytes;
        self.saved_bytes += frame.saved_bytes;
        self.bytes_on_their_way += frame.bytes;
        self.on_their_way.push_back(frame);
    }

    /// Everything up to `durable` is durable at the other end. `log_bytes`: of the whole log, by now.
    pub fn acked(&mut self, durable: Option<Seq>, now: Instant, log_bytes: u64) -> Result<(), AckedTooMuch> {
        while let Some(frame) = self
            .on_their_way
            .pop_front_if(|frame| Some(frame.last) <= durable)
        {
            self.bytes_on_their_way -= frame.bytes;
            self.acked_bytes += match self.acked_end {
                Some((segment, offset)) if segment == frame.end.0 => frame.end.1.saturating_sub(offset),
                _ => frame.end.1,
            };
            (self.acked, self.acked_end) = (Some(frame.last), Some(frame.end));
        }
        if durable > self.acked && self.on_their_way.is_empty() {
            return Err(AckedTooMuch {
                acked: Seq::number_of(durable),
                sent: Seq::number_of(self.acked),
            });
        }
        if self.noted.back().is_none_or(|(at, ..)| now >= *at + RATE_STEP) {
            self.noted.push_back((now, self.acked_bytes, log_bytes));
        }
        while self
            .noted
            .pop_front_if(|(at, ..)| *at + RATE_WINDOW < now)
            .is_some()
        {}
        Ok(())
    }

    /// Last record known to be durable at the other end.
    pub fn acked_seq(&self) -> Option<Seq> {
        self.acked
    }

    /// Bytes of the log acknowledged so far: what lies between the frames included.
    pub fn acked_bytes(&self) -> u64 {
        self.acked_bytes
    }

    /// Where in the log what it holds ends.
    pub fn acked_end(&self) -> Option<(u64, u64)> {
        self.acked_end
    }

    /// Time of the oldest record that was sent and is not acknowledged.
    pub fn oldest_on_its_way(&self) -> Option<WallNs> {
        self.on_their_way.front().map(|frame| frame.wall)
    }

    /// Bytes sent so far, what had to be sent again included.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Bytes that were not sent, as the other end had them; counted like [`Flight::sent_bytes`].
    pub fn saved_bytes(&self) -> u64 {
        self.saved_bytes
    }

    /// By how many bytes a second the other end has come nearer of late, the log having `log_bytes` now: what it
    /// acknowledged less what was added; negative if it falls behind, `None` if that is not known.
    pub fn gain_per_second(&self, now: Instant, log_bytes: u64) -> Option<f64> {
        // Nothing acknowledged for so long: nobody knows.
        let recent = |noted: &&(Instant, u64, u64)| noted.0 + RATE_WINDOW >= now;
        let (since, acked, had) = *self.noted.iter().find(recent)?;
        let seconds = now.checked_duration_since(since)?.as_secs_f64();
        let gain = (self.acked_bytes - acked) as f64 - (log_bytes as f64 - had as f64);
        (seconds > 0.0).then_some(gain / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(last: u64, bytes: u64) -> Sent {
        Sent {
            last: Seq::new(last).unwrap(),
            wall: WallNs(last as i64),
            bytes,
            saved_bytes: 0,
            end: (1, last * 100),
        }
    }

    #[test]
    fn an_ack_covers_everything_up_to_it_and_nothing_after() {
        let (mut flight, now) = (Flight::default(), Instant::now());
        flight.restart(Seq::new(10), Some((1, 1000)));
        for last in [12, 15, 20] {
            flight.sent(frame(last, 5));
        }
        assert_eq!(flight.oldest_on_its_way(), Some(WallNs(12)));
        flight.acked(Seq::new(15), now, 0).unwrap();
        assert_eq!(
            (flight.acked_seq(), flight.acked_end(), flight.oldest_on_its_way()),
            (Seq::new(15), Some((1, 1500)), Some(WallNs(20)))
        );
        flight.acked(Seq::new(15), now, 0).unwrap();
        flight.acked(Seq::new(20), now, 0).unwrap();
        assert_eq!(flight.oldest_on_its_way(), None);
        assert!(
            flight.acked(Seq::new(21), now, 0).is_err(),
            "nobody was sent that much"
        );
    }

    #[test]
    fn what_is_on_its_way_is_bounded() {
        let mut flight = Flight::default();
        while flight.has_room() {
            flight.sent(frame(1, 1 << 20));
        }
        assert_eq!(flight.bytes_on_their_way, BYTES_MAX);
        let mut flight = Flight::default();
        while flight.has_room() {
            flight.sent(frame(1, 1));
        }
        assert_eq!(flight.on_their_way.len(), FRAMES_MAX);
    }

    /// Goal: the time to catch up is what it takes, also while more comes in. Method: a minute in which so much is
    /// acknowledged, and so much added, in each second.
    #[test]
    fn the_gain_is_that_of_the_last_seconds_less_what_came_in() {
        for (added, expected) in [(0, 95.0..105.0), (40, 55.0..65.0), (140, -45.0..-35.0)] {
            let (mut flight, start) = (Flight::default(), Instant::now());
            assert_eq!(flight.gain_per_second(start, 0), None);
            for second in 0..60u64 {
                flight.sent(frame(second + 1, 1));
                let now = start + Duration::from_secs(second);
                flight.acked(Seq::new(second + 1), now, added * second).unwrap();
            }
            let now = start + Duration::from_secs(59);
            let gain = flight.gain_per_second(now, added * 59).unwrap();
            assert!(expected.contains(&gain), "{added}: {gain}");
            assert!(flight.noted.len() <= 12);
            let later = now + RATE_WINDOW + Duration::from_secs(1);
            assert_eq!(flight.gain_per_second(later, added * 59), None);
        }
    }
}
