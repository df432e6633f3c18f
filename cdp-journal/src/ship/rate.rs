//! How many bytes may be sent in a second, by the time of the week. Decisions only: no clock, no socket.
//!
//! A limit is written `[DAYS] [HH:MM-HH:MM] NUMBER UNIT`: `mon-fri 08:00-18:00 20 Mbit/s`, `sat,sun 1 Gbit/s`, `5 MiB/s`.
//! Without days it holds on every day, without hours all day; hours that end before they begin reach into the next day.
//! Of several that hold at a time the lowest counts, so their order does not matter; where none holds there is no limit.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::Deserialize;

/// Limits of one schedule at most.
pub const WINDOWS_MAX: usize = 64;

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const DAY_MINUTES: u16 = 24 * 60;
/// Units, and how many bytes in a second each is, as a fraction.
const UNITS: [(&str, u64, u64); 8] = [
    ("bit/s", 1, 8),
    ("kbit/s", 1000, 8),
    ("Mbit/s", 1_000_000, 8),
    ("Gbit/s", 1_000_000_000, 8),
    ("B/s", 1, 1),
    ("KiB/s", 1 << 10, 1),
    ("MiB/s", 1 << 20, 1),
    ("GiB/s", 1 << 30, 1),
];
/// What is not used is kept for so long.
const BURST: Duration = Duration::from_millis(250);
/// A wait is never longer, so that a limit that ends is noticed.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Bytes in a second; 1 KiB at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(u64);

impl Rate {
    /// The lowest rate: below it, connections would time out.
    pub const MIN: Self = Self(1 << 10);

    /// That many bytes in a second, [`Rate::MIN`] at least.
    pub fn new(bytes_per_second: u64) -> Self {
        Self(bytes_per_second).max(Self::MIN)
    }

    /// Bytes in a second.
    pub fn bytes_per_second(self) -> u64 {
        self.0
    }

    fn bytes_in(self, time: Duration) -> f64 {
        self.0 as f64 * time.as_secs_f64()
    }
}

/// A minute of the week, as clocks on the wall show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeekMinute {
    day: u8,
    minute: u16,
}

impl WeekMinute {
    /// `day`: 0 for Monday to 6 for Sunday. `minute`: of that day.
    pub fn new(day: u8, minute: u16) -> Self {
        Self {
            day: day % 7,
            minute: minute % DAY_MINUTES,
        }
    }
}

/// A text is not a limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?}: {why}; write it like \"mon-fri 08:00-18:00 20 Mbit/s\" or \"5 MiB/s\"")]
pub struct BadWindow {
    text: String,
    why: String,
}

/// A limit and when it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Bit 0 is Monday.
    days: u8,
    start: u16,
    /// Not after `start`: of the next day.
    end: u16,
    rate: Rate,
}

impl Window {
    fn holds_at(&self, at: WeekMinute) -> bool {
        let on = |day: u8| self.days & (1 << (day % 7)) != 0;
        if self.start < self.end {
            return on(at.day) && (self.start..self.end).contains(&at.minute);
        }
        on(at.day) && at.minute >= self.start || on(at.day + 6) && at.minute < self.end
    }
}

impl FromStr for Window {
    type Err = BadWindow;

    fn from_str(text: &str) -> Result<Self, BadWindow> {
        let bad = |why: String| BadWindow {
            text: text.to_owned(),
            why,
        };
        let mut words = text.split_whitespace().peekable();
        let days = match words.next_if(|word| word.starts_with(|c: char| c.is_ascii_alphabetic())) {
            Some(word) => days(word).map_err(bad)?,
            None => 0x7f,
        };
        let (start, end) = match words.next_if(|word| word.contains(':')) {
            Some(word) => hours(word).map_err(bad)?,
            None => (0, DAY_MINUTES),
        };
        let rate = rate(&words.collect::<String>()).map_err(bad)?;
        Ok(Self {
            days,
            start,
            end,
            rate,
        })
    }
}

/// `mon-fri`, `sat,sun`, `sun-tue`.
fn days(word: &str) -> Result<u8, String> {
    let day = |name: &str| {
        let found = DAYS.iter().position(|day| name.eq_ignore_ascii_case(day));
        found.ok_or_else(|| format!("{name:?} is no day of {}", DAYS.join(" ")))
    };
    let mut days = 0;
    for part in word.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        for offset in 0..=(last + 7 - first) % 7 {
            days |= 1 << ((first + offset) % 7);
        }
    }
    Ok(days)
}

/// `08:00-18:00`, `22:00-06:00`, `00:00-24:00`.
fn hours(word: &str) -> Result<(u16, u16), String> {
    let time = |text: &str| {
        let parts = text.split_once(':');
        let parts =
            parts.and_then(|(hour, minute)| Some((hour.parse::<u16>().ok()?, minute.parse::<u16>().ok()?)));
        let minutes = parts.filter(|(hour, minute)| *hour <= 24 && *minute < 60);
        let minutes = minutes.map(|(hour, minute)| hour * 60 + minute);
        let minutes = minutes.filter(|minutes| *minutes <= DAY_MINUTES);
        minutes.ok_or_else(|| format!("{text:?} is no time of the day"))
    };
    let (start, end) = word
        .split_once('-')
        .ok_or_else(|| format!("{word:?} has no end"))?;
    let (start, end) = (time(start)?, time(end)?);
    if start == end || start == DAY_MINUTES {
        return Err(format!("{word:?} is no time at all"));
    }
    Ok((start, end))
}

/// `20Mbit/s`.
fn rate(text: &str) -> Result<Rate, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let known = || UNITS.map(|(name, ..)| name).join(", ");
    let (_, bytes, of) = UNITS
        .into_iter()
        .find(|(name, ..)| *name == unit)
        .ok_or_else(|| format!("{unit:?} is no unit of {}", known()))?;
    let number: u64 = number.parse().map_err(|_| format!("{number:?} is no number"))?;
    let bytes = number
        .checked_mul(bytes)
        .ok_or_else(|| format!("{text} is too much"))?
        / of;
    let rate = Rate(bytes);
    if rate < Rate::MIN {
        return Err(format!("{text} is less than 1 KiB/s"));
    }
    Ok(rate)
}

/// Limits by the time of the week.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule(Vec<Window>);

/// Limits that make no schedule.
#[derive(Debug, thiserror::Error)]
pub enum BadSchedule {
    /// One of them is none.
    #[error(transparent)]
    Window(#[from] BadWindow),
    /// More than [`WINDOWS_MAX`].
    #[error("{0} limits; {WINDOWS_MAX} at most can be given")]
    TooMany(usize),
}

/// Limits as a file has them: one, a list of them, or a table of windows and the rate in each.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Limits {
    /// `"mon-fri 08:00-18:00 20 Mbit/s"`
    One(String),
    /// Several of that form.
    List(Vec<String>),
    /// `"mon-fri 08:00-18:00" = "20 Mbit/s"`
    Table(BTreeMap<String, String>),
}

impl From<Limits> for Vec<String> {
    fn from(limits: Limits) -> Self {
        match limits {
            Limits::One(limit) => vec![limit],
            Limits::List(list) => list,
            Limits::Table(table) => table
                .into_iter()
                .map(|(window, limit)| format!("{window} {limit}"))
                .collect(),
        }
    }
}

impl Schedule {
    /// Of limits as they are written.
    pub fn parse(limits: &[String]) -> Result<Self, BadSchedule> {
        let windows = limits.iter().map(|text| text.parse());
        let windows = windows.collect::<Result<Vec<Window>, _>>()?;
        Self::new(windows).ok_or(BadSchedule::TooMany(limits.len()))
    }

    /// Of those limits; of [`WINDOWS_MAX`] at most.
    pub fn new(windows: Vec<Window>) -> Option<Self> {
        (windows.len() <= WINDOWS_MAX).then_some(Self(windows))
    }

    /// Is there no limit at any time?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The limit in force; `None` if there is none.
    pub fn limit_at(&self, at: WeekMinute) -> Option<Rate> {
        let holding = self.0.iter().filter(|window| window.holds_at(at));
        holding.map(|window| window.rate).min()
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} Mbit/s", self.0 as f64 * 8.0 / 1e6)
    }
}

/// A token bucket that may be overdrawn by one piece: nothing goes while it owes something.
///
/// In any stretch of time `t` under a limit, what goes is at most `limit * (t + BURST)` and the last piece.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    /// Bytes that may go at once; negative: owed.
    balance: f64,
    at: Option<Instant>,
}

impl Bucket {
    /// How long to wait before the next piece may go; zero if it may go now. After a wait, ask again.
    pub fn wait(&mut self, now: Instant, limit: Option<Rate>) -> Duration {
        let passed = self
            .at
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.at = Some(self.at.map_or(now, |at| at.max(now)));
        let Some(limit) = limit else {
            self.balance = 0.0;
            return Duration::ZERO;
        };
        self.balance = (self.balance + limit.bytes_in(passed)).min(limit.bytes_in(BURST));
        if self.balance >= 0.0 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64(-self.balance / limit.0 as f64).clamp(Duration::from_millis(1), WAIT_MAX)
    }

    /// A piece has gone.
    pub fn charge(&mut self, bytes: u64) {
        self.balance -= bytes as f64;
    }

    /// Of what was charged, so much did not go after all.
    pub fn refund(&mut self, bytes: u64) {
        self.balance += bytes as f64;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn schedule(windows: &[&str]) -> Schedule {
        Schedule::new(windows.iter().map(|text| text.parse().unwrap()).collect()).unwrap()
    }

    fn at(day: u8, hour: u16, minute: u16) -> WeekMinute {
        WeekMinute::new(day, hour * 60 + minute)
    }

    #[test]
    fn a_limit_holds_in_its_hours_and_at_no_other_time() {
        let week = schedule(&[
            "mon-fri 08:00-18:00 20 Mbit/s",
            "100Mbit/s",
            "sat,sun 22:00-06:00 1 MiB/s",
        ]);
        let limit = |at| week.limit_at(at).map(Rate::bytes_per_second);
        assert_eq!(limit(at(0, 7, 59)), Some(12_500_000));
        assert_eq!(limit(at(0, 8, 0)), Some(2_500_000));
        assert_eq!(limit(at(4, 17, 59)), Some(2_500_000));
        assert_eq!(limit(at(4, 18, 0)), Some(12_500_000));
        assert_eq!(limit(at(5, 9, 0)), Some(12_500_000));
        assert_eq!(limit(at(5, 22, 0)), Some(1 << 20), "Saturday night");
        assert_eq!(limit(at(0, 5, 59)), Some(1 << 20), "reaches into Monday");
        assert_eq!(limit(at(0, 6, 0)), Some(12_500_000));
        assert_eq!(limit(at(5, 5, 0)), Some(12_500_000), "Friday has no such night");
        let early = schedule(&["sun-tue 64 kbit/s"]);
        assert_eq!(early.limit_at(at(1, 23, 59)), Some(Rate(8000)));
        assert_eq!(early.limit_at(at(2, 0, 0)), None);
        assert_eq!(Schedule::default().limit_at(at(0, 0, 0)), None);
    }

    #[test]
    fn what_is_no_limit_is_named() {
        for (text, why) in [
            ("20", "no unit"),
            ("20 Mbps", "no unit"),
            ("Mbit/s", "no day"),
            ("noday 1 MiB/s", "no day"),
            ("mon 25:00-26:00 1 MiB/s", "no time"),
            ("08:00-08:00 1 MiB/s", "no time at all"),
            ("08:00 1 MiB/s", "no end"),
            ("100 B/s", "less than"),
            ("99999999999999999999 B/s", "no number"),
            ("9999999999999999999 GiB/s", "too much"),
        ] {
            let error = text.parse::<Window>().unwrap_err().to_string();
            assert!(
                error.contains(why) && error.contains("mon-fri"),
                "{text}: {error}"
            );
        }
    }

    proptest! {
        /// Goal: a schedule is what it says, minute by minute. Method: against a naive look at the clock.
        #[test]
        fn hours_are_those_of_the_day_they_begin_on(
            days in 1u8..128, start in 0u16..1440, end in 0u16..=1440, day in 0u8..7, minute in 0u16..1440,
        ) {
            prop_assume!(start != end);
            let window = Window { days, start, end, rate: Rate::MIN };
            // Walks from each beginning to its end.
            let mut holds = false;
            for begin in (0..7u16).filter(|begin| days & (1 << begin) != 0) {
                let length = if start < end { end - start } else { end + 1440 - start };
                let now = u16::from(day) * 1440 + minute;
                let since = (now + 7 * 1440 - (begin * 1440 + start)) % (7 * 1440);
                holds |= since < length;
            }
            prop_assert_eq!(window.holds_at(WeekMinute::new(day, minute)), holds);
        }

        /// Goal: never more than the limit. Method: whoever wants to send all the time, in pieces of any size, looked at
        /// after each; and it is not much less either.
        #[test]
        fn no_stretch_of_time_has_more_than_its_limit(
            bytes_per_second in 1024u64..1_000_000_000,
            pieces in proptest::collection::vec((1u64..100_000, 0u64..50_000), 1..200),
        ) {
            let limit = Rate::new(bytes_per_second);
            let (mut bucket, start) = (Bucket::default(), Instant::now());
            let (mut now, mut sent, mut largest) = (start, 0, 0);
            for (bytes, idle_us) in pieces {
                now += Duration::from_micros(idle_us);
                loop {
                    let wait = bucket.wait(now, Some(limit));
                    if wait.is_zero() {
                        break;
                    }
                    prop_assert!(wait <= WAIT_MAX);
                    now += wait;
                }
                bucket.charge(bytes);
                sent += bytes;
                largest = largest.max(bytes);
                let may = limit.bytes_in(now - start + BURST) + largest as f64;
                prop_assert!(sent as f64 <= may + 1.0, "{} of {}", sent, may);
            }
        }

        /// Goal: whoever has enough to send uses the limit.
        #[test]
        fn a_limit_is_used(bytes_per_second in 1024u64..1_000_000_000, piece in 1u64..100_000) {
            let limit = Rate::new(bytes_per_second);
            let (mut bucket, start) = (Bucket::default(), Instant::now());
            let (mut now, mut sent) = (start, 0);
            for _ in 0..1000 {
                let wait = bucket.wait(now, Some(limit));
                now += wait;
                if wait.is_zero() {
                    bucket.charge(piece);
                    sent += piece;
                }
            }
            // A wait is a millisecond at least, which small pieces at a high rate fall short of.
            let lost = limit.bytes_in(Duration::from_millis(1)) * 1000.0;
            prop_assert!(sent as f64 + lost >= limit.bytes_in(now - start) * 0.99);
        }
    }

    #[test]
    fn without_a_limit_nothing_waits_and_nothing_is_owed_later() {
        let (mut bucket, now) = (Bucket::default(), Instant::now());
        bucket.charge(1 << 30);
        assert_eq!(bucket.wait(now, None), Duration::ZERO);
        assert_eq!(bucket.wait(now, Some(Rate::MIN)), Duration::ZERO);
    }
}
