//! One limit for all that an agent sends, to however many servers; or for all that a follower takes from its upstream.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quinn::{Connection, RecvStream, VarInt};

use super::link::{self, LinkError};
use super::tls::WINDOW_BYTES;
use crate::ship::{Bucket, Rate, Schedule, WeekMinute};
use crate::wire::Kind;

/// Written, or read, at once where there is a limit.
pub(crate) const PIECE_BYTES: usize = 16 << 10;
/// What may be on its way to who reads under a limit: as much as it reads in a second, and this at least.
const LIMITED_WINDOW_BYTES_MIN: u32 = 64 << 10;

const _: () =
    assert!(PIECE_BYTES <= LIMITED_WINDOW_BYTES_MIN as usize && LIMITED_WINDOW_BYTES_MIN < WINDOW_BYTES);

/// Holds senders back to what a schedule allows. Its hours are those of this host's time zone.
#[derive(Debug, Default)]
pub struct Throttle {
    schedule: Mutex<Schedule>,
    bucket: Mutex<Bucket>,
}

impl Throttle {
    /// Another schedule from now on.
    pub fn set(&self, schedule: Schedule) {
        *self.schedule.lock() = schedule;
    }

    /// The limit in force now.
    pub fn limit(&self) -> Option<Rate> {
        let schedule = self.schedule.lock();
        if schedule.is_empty() {
            return None;
        }
        let now = jiff::Zoned::now();
        let day = now.weekday().to_monday_zero_offset();
        let minute = i16::from(now.hour()) * 60 + i16::from(now.minute());
        schedule.limit_at(WeekMinute::new(day.unsigned_abs(), minute.unsigned_abs()))
    }

    /// How long to wait before anything more may be sent; zero if it may be now.
    pub fn wait(&self) -> Duration {
        let limit = self.limit();
        self.bucket.lock().wait(Instant::now(), limit)
    }

    /// So many bytes were sent.
    pub fn charge(&self, bytes: u64) {
        self.bucket.lock().charge(bytes);
    }

    /// Of what was charged, so much was not sent after all.
    pub fn refund(&self, bytes: u64) {
        self.bucket.lock().refund(bytes);
    }

    /// Waits until anything more may be sent.
    pub(crate) async fn turn(&self) {
        loop {
            let wait = self.wait();
            if wait.is_zero() {
                return;
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// How many bytes may be on their way to who reads no faster than this allows now.
    pub(crate) fn window_bytes(&self) -> u32 {
        window_bytes(self.limit())
    }
}

fn window_bytes(limit: Option<Rate>) -> u32 {
    let bytes = limit.map(|limit| u32::try_from(limit.bytes_per_second()).unwrap_or(WINDOW_BYTES));
    bytes.map_or(WINDOW_BYTES, |bytes| {
        bytes.clamp(LIMITED_WINDOW_BYTES_MIN, WINDOW_BYTES)
    })
}

/// What a connection counts against a limit: what was written to it (read from it) or, where that is more, what has left
/// the host for it (has come), headers and all that was sent again included.
#[derive(Debug, Default)]
pub(crate) struct Charge {
    written: u64,
    charged: u64,
}

impl Charge {
    /// What is due after a piece was written (read), of a connection that has sent (received) `sent` bytes so far.
    pub(crate) fn due(&mut self, piece: u64, sent: u64) -> u64 {
        self.written += piece;
        let due = self.written.max(sent).saturating_sub(self.charged);
        self.charged += due;
        due
    }
}

/// Holds the other end of a connection back, by reading late what it sends: QUIC lets it send no more ahead than the
/// window, which follows the limit.
pub(crate) struct PacedReader<'c> {
    throttle: &'c Throttle,
    connection: &'c Connection,
    charge: Charge,
    window_bytes: u32,
}

impl<'c> PacedReader<'c> {
    /// Gives the connection the window of now: that of when it was made may be of another time of the schedule.
    pub(crate) fn new(throttle: &'c Throttle, connection: &'c Connection) -> Self {
        let window_bytes = throttle.window_bytes();
        connection.set_receive_window(VarInt::from_u32(window_bytes));
        Self {
            throttle,
            connection,
            charge: Charge::default(),
            window_bytes,
        }
    }

    /// As [`link::read_message`], as fast as is allowed.
    pub(crate) async fn read_message(
        &mut self,
        stream: &mut RecvStream,
    ) -> Result<Option<(Kind, Vec<u8>)>, LinkError> {
        let Some(header) = link::read_header(stream).await? else {
            return Ok(None);
        };
        let mut body = vec![0; header.body_bytes];
        for piece in body.chunks_mut(PIECE_BYTES) {
            self.throttle.turn().await;
            stream.read_exact(piece).await?;
            let received_bytes = self.connection.stats().udp_rx.bytes;
            self.throttle
                .charge(self.charge.due(piece.len() as u64, received_bytes));
            self.follow_limit();
        }
        Ok(Some((header.kind, body)))
    }

    fn follow_limit(&mut self) {
        let window_bytes = self.throttle.window_bytes();
        if window_bytes != self.window_bytes {
            self.window_bytes = window_bytes;
            self.connection.set_receive_window(VarInt::from_u32(window_bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_left_the_host_is_charged_once() {
        let mut charge = Charge::default();
        assert_eq!(charge.due(1000, 0), 1000, "still in a buffer");
        assert_eq!(charge.due(1000, 1500), 1000);
        assert_eq!(
            charge.due(1000, 3300),
            1300,
            "headers, and what was lost on the way"
        );
        assert_eq!(charge.due(1000, 3300), 700);
    }

    /// Goal: what comes ahead of a limit is a second of it at most. Method: who reads as [`PacedReader`] does, of a sender that
    /// fills the window at once, again and again; the times are made up.
    #[test]
    fn what_is_read_late_keeps_to_the_limit() {
        for bytes_per_second in [1 << 10, 100 << 10, 5 << 20, 1 << 30] {
            let limit = Rate::new(bytes_per_second);
            let window = u64::from(window_bytes(Some(limit)));
            assert!(window <= bytes_per_second.max(u64::from(LIMITED_WINDOW_BYTES_MIN)));
            let (mut bucket, mut charge) = (Bucket::default(), Charge::default());
            let (start, mut read_bytes) = (Instant::now(), 0);
            let mut now = start;
            while read_bytes < 20 * window {
                let wait = bucket.wait(now, Some(limit));
                now += wait;
                if !wait.is_zero() {
                    continue;
                }
                let received_bytes = read_bytes + window;
                read_bytes += PIECE_BYTES as u64;
                bucket.charge(charge.due(PIECE_BYTES as u64, received_bytes));
                // A quarter of a second may go at once.
                let may = limit.bytes_per_second() as f64 * ((now - start).as_secs_f64() + 0.25);
                assert!(received_bytes as f64 <= may + (window + PIECE_BYTES as u64) as f64 + 1.0);
            }
        }
        assert_eq!(window_bytes(None), WINDOW_BYTES);
    }
}
