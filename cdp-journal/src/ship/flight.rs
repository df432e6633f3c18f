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
    /// Its length.
    pub bytes: u64,
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
    /// When how much had been acknowledged, over [`RATE_WINDOW`].
    noted: VecDeque<(Instant, u64)>,
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
        self.bytes_on_their_way += frame.bytes;
        self.on_their_way.push_back(frame);
    }

    /// Everything up to `durable` is durable at the other end.
    pub fn acked(&mut self, durable: Option<Seq>, now: Instant) -> Result<(), AckedTooMuch> {
        while let Some(frame) = self
            .on_their_way
            .pop_front_if(|frame| Some(frame.last) <= durable)
        {
            self.bytes_on_their_way -= frame.bytes;
            self.acked_bytes += frame.bytes;
            (self.acked, self.acked_end) = (Some(frame.last), Some(frame.end));
        }
        if durable > self.acked && self.on_their_way.is_empty() {
            return Err(AckedTooMuch {
                acked: Seq::number_of(durable),
                sent: Seq::number_of(self.acked),
            });
        }
        if self.noted.back().is_none_or(|(at, _)| now >= *at + RATE_STEP) {
            self.noted.push_back((now, self.acked_bytes));
        }
        while self
            .noted
            .pop_front_if(|(at, _)| *at + RATE_WINDOW < now)
            .is_some()
        {}
        Ok(())
    }

    /// Last record known to be durable at the other end.
    pub fn acked_seq(&self) -> Option<Seq> {
        self.acked
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

    /// Bytes acknowledged in a second, of late; `None` if that is not known.
    pub fn bytes_per_second(&self, now: Instant) -> Option<f64> {
        let (since, before) = *self.noted.front()?;
        let seconds = now.checked_duration_since(since)?.as_secs_f64();
        (seconds > 0.0).then(|| (self.acked_bytes - before) as f64 / seconds)
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
        flight.acked(Seq::new(15), now).unwrap();
        assert_eq!(
            (flight.acked_seq(), flight.acked_end(), flight.oldest_on_its_way()),
            (Seq::new(15), Some((1, 1500)), Some(WallNs(20)))
        );
        flight.acked(Seq::new(15), now).unwrap();
        flight.acked(Seq::new(20), now).unwrap();
        assert_eq!(flight.oldest_on_its_way(), None);
        assert!(
            flight.acked(Seq::new(21), now).is_err(),
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

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let (mut flight, start) = (Flight::default(), Instant::now());
        assert_eq!(flight.bytes_per_second(start), None);
        for second in 0..60u64 {
            flight.sent(frame(second + 1, 1000 * (second + 1)));
            let now = start + Duration::from_secs(second);
            flight.acked(Seq::new(second + 1), now).unwrap();
        }
        let rate = flight.bytes_per_second(start + Duration::from_secs(59)).unwrap();
        assert!((50_000.0..60_000.0).contains(&rate), "{rate}");
        assert!(flight.noted.len() <= 12);
    }
}
