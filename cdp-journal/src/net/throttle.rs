//! One limit for all that an agent sends, to however many servers.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::ship::{Bucket, Rate, Schedule, WeekMinute};

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
}
