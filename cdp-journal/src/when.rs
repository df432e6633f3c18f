//! Moments as the user names them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};
use serde::{Deserialize, Serialize};

use crate::error::ReadError;
use crate::format::GapCause;
use crate::types::{Seq, WallNs};

/// How a user names a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// The head of the log.
    Latest,
    /// Every record whose time is at or before this one, up to the first that is later.
    At(WallNs),
    /// So long before now.
    Ago(Duration),
    /// A record.
    Seq(Seq),
    /// The record that carries the label; the newest if several do.
    Bookmark(String),
}

/// A text names no moment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{text}\" names no moment ({reason}); give one like latest, 2026-11-21T10:15:03+08:00, -90s, seq:123456 or bookmark:LABEL"
)]
pub struct WhenParseError {
    text: String,
    reason: String,
}

impl FromStr for When {
    type Err = WhenParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |reason: &str| WhenParseError {
            text: text.to_owned(),
            reason: reason.to_owned(),
        };
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(number) = text.strip_prefix("seq:") {
            let seq = number.parse().ok().and_then(Seq::new);
            return seq
                .map(Self::Seq)
                .ok_or_else(|| error("a seq is a number from 1 on"));
        }
        if let Some(label) = text.strip_prefix("bookmark:") {
            return if label.is_empty() {
                Err(error("an empty label"))
            } else {
                Ok(Self::Bookmark(label.to_owned()))
            };
        }
        if let Some(ago) = text.strip_prefix('-') {
            return parse_ago(ago)
                .map(Self::Ago)
                .ok_or_else(|| error("a time ago is like -90s, -5m or -2h"));
        }
        parse_time(text).map(Self::At).map_err(|reason| error(&reason))
    }
}

fn parse_ago(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.find(|c: char| !c.is_ascii_digit() && c != '.')?)?;
    let secs_per_unit = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * secs_per_unit).ok()
}

fn parse_time(text: &str) -> Result<WallNs, String> {
    // The parser would take it for the second before.
    let time = text.split(['T', 't', ' ']).nth(1).unwrap_or_default();
    let digits = time
        .split(['Z', 'z', '+', '-', '.', ',', '['])
        .next()
        .unwrap_or_default();
    if digits.replace(':', "").get(4..6) == Some("60") {
        return Err("leap seconds have no number here: say the second after or before".to_owned());
    }
    if let Ok(timestamp) = text.parse::<jiff::Timestamp>() {
        return Ok(WallNs::from(timestamp));
    }
    let local = text.parse().map_err(|error: jiff::Error| error.to_string())?;
    time_in(local, &TimeZone::system())
}

/// A local time that clocks showed exactly once.
fn time_in(local: DateTime, zone: &TimeZone) -> Result<WallNs, String> {
    let offset = match zone.to_ambiguous_timestamp(local).offset() {
        AmbiguousOffset::Unambiguous { offset } => offset,
        AmbiguousOffset::Gap { before, after } => {
            return Err(format!(
                "clocks went from offset {before} to {after} and never showed it"
            ));
        }
        AmbiguousOffset::Fold { before, after } => {
            let readings = [before, after].map(|offset| {
                let timestamp = offset.to_timestamp(local).unwrap_or_default();
                timestamp.display_with_offset(offset).to_string()
            });
            return Err(format!("clocks showed it twice: say {}", readings.join(" or ")));
        }
    };
    let timestamp = offset.to_timestamp(local);
    timestamp.map(WallNs::from).map_err(|error| error.to_string())
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::At(wall) => wall.fmt(f),
            Self::Ago(ago) => write!(f, "-{}s", ago.as_secs_f64()),
            Self::Seq(seq) => write!(f, "seq:{seq}"),
            Self::Bookmark(label) => write!(f, "bookmark:{label}"),
        }
    }
}

/// A moment that a [`When`] was found to name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Last record that belongs to it; `None` if it lies before the first.
    pub seq: Option<Seq>,
    /// The time asked for, or the time of the record.
    pub wall: WallNs,
    /// Was it asked for by time? Then it is exact only as far as history covers that time.
    pub by_time: bool,
}

/// A place in history, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// The record.
    pub seq: Seq,
    /// Its time.
    pub wall: WallNs,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (seq:{})", self.wall, self.seq)
    }
}

/// Why a moment is not exact, and what is nearest to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotExact {
    /// The moment asked for.
    pub moment: Moment,
    /// Why.
    pub cause: NotExactCause,
    /// Where the inexact stretch begins and ends, in time; `None`: open.
    pub gap: (Option<WallNs>, Option<WallNs>),
    /// Nearest exact moment before.
    pub before: Option<Point>,
    /// Nearest exact moment after.
    pub after: Option<Point>,
}

/// Why a moment is not exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NotExactCause {
    /// It lies in a gap.
    Gap(GapCause),
    /// It lies before the first record.
    BeforeHistory,
    /// Nothing was captured that late, and nobody is capturing.
    AfterHistory {
        /// Until when history reaches.
        covered_until: Option<WallNs>,
    },
}

impl fmt::Display for NotExact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause {
            NotExactCause::BeforeHistory => write!(f, "{} lies before history begins", self.moment.wall)?,
            NotExactCause::AfterHistory {
                covered_until: Some(until),
            } => {
                write!(
                    f,
                    "{} cannot be restored: nothing was captured after {until}",
                    self.moment.wall
                )?;
            }
            NotExactCause::AfterHistory { covered_until: None } => f.write_str("nothing was captured yet")?,
            NotExactCause::Gap(cause) => {
                match self.moment.seq {
                    Some(seq) if !self.moment.by_time => write!(f, "seq:{seq}")?,
                    _ => write!(f, "{}", self.moment.wall)?,
                }
                f.write_str(" cannot be restored exactly: it lies in a gap")?;
                if let Some(from) = self.gap.0 {
                    write!(f, " from {from}")?;
                }
                match self.gap.1 {
                    Some(to) => write!(f, " to {to}")?,
                    None => f.write_str(" that is still open")?,
                }
                write!(f, " (cause: {cause})")?;
            }
        }
        match &self.before {
            Some(point) => write!(f, "; nearest exact moment before: {point}")?,
            None => f.write_str("; no exact moment before")?,
        }
        match &self.after {
            Some(point) => write!(f, ", after: {point}"),
            None => f.write_str(", none after"),
        }
    }
}

/// A [`When`] names no moment that can be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WhenError {
    /// That moment is known not to be exact (exit code 3).
    #[error("{0}")]
    NotExact(Box<NotExact>),
    /// A time that has not come yet.
    #[error("{wall} lies in the future; history reaches to {}", covered_until.map_or_else(|| "nothing".to_owned(), |wall| wall.to_string()))]
    Future {
        /// The time.
        wall: WallNs,
        /// Until when history reaches.
        covered_until: Option<WallNs>,
    },
    /// A writer is alive and yet history did not reach that time while we waited (exit code 3).
    #[error("{wall} is not covered yet: history reaches to {}, which is the nearest moment before; whoever writes it, an agent or the line from it, seems to be stuck: see `cdp-agent status`, or `cdp-journal status`", covered_until.map_or_else(|| "nothing".to_owned(), |wall| wall.to_string()))]
    NotCovered {
        /// The time.
        wall: WallNs,
        /// Until when history reaches.
        covered_until: Option<WallNs>,
    },
    /// A record that was not written yet.
    #[error("seq:{seq} does not exist yet; the newest is {}", head.map_or_else(|| "none".to_owned(), |seq| seq.to_string()))]
    BeyondHead {
        /// The record.
        seq: Seq,
        /// The newest record.
        head: Option<Seq>,
    },
    /// No record carries that label.
    #[error("no bookmark \"{label}\"; `cdp-restore points` lists those there are")]
    NoBookmark {
        /// The label.
        label: String,
    },
    /// History could not be read.
    #[error("look the moment up")]
    Read(#[from] ReadError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_when_is_read() {
        let parse = |text: &str| text.parse::<When>().unwrap();
        assert_eq!(parse("latest"), When::Latest);
        assert_eq!(parse("seq:12"), When::Seq(Seq::new(12).unwrap()));
        assert_eq!(
            parse("bookmark:before upgrade"),
            When::Bookmark("before upgrade".to_owned())
        );
        assert_eq!(parse("-90s"), When::Ago(Duration::from_secs(90)));
        assert_eq!(parse("-5m"), When::Ago(Duration::from_secs(300)));
        assert_eq!(parse("-2h"), When::Ago(Duration::from_secs(7200)));
        assert_eq!(parse("-1.5s"), When::Ago(Duration::from_millis(1500)));
        assert_eq!(
            parse("1970-01-01T00:00:01.000000005Z"),
            When::At(WallNs(1_000_000_005))
        );
        assert_eq!(
            parse("1970-01-01T08:00:01+08:00"),
            When::At(WallNs(1_000_000_000))
        );
        assert!(
            matches!(parse("2026-11-21T10:15:03"), When::At(_)),
            "the offset may be left out"
        );
        assert!(
            matches!(parse("2026-11-21 10:15:03.5"), When::At(_)),
            "as printed by others"
        );
    }

    /// Goal: nobody gets an hour that was not meant. Method: the hours around both changes of summer time.
    #[test]
    fn a_local_time_that_clocks_did_not_show_once_is_refused() {
        let berlin = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let time = |text: &str| time_in(text.parse().unwrap(), &berlin);
        let at = |text: &str| WallNs::from(text.parse::<jiff::Timestamp>().unwrap());
        assert_eq!(time("2026-03-29T01:59:59"), Ok(at("2026-03-29T00:59:59Z")));
        assert_eq!(time("2026-03-29T03:00:00"), Ok(at("2026-03-29T01:00:00Z")));
        let never = time("2026-03-29T02:30:00").unwrap_err();
        assert!(never.contains("never showed"), "{never}");
        assert_eq!(time("2026-10-25T01:59:59"), Ok(at("2026-10-24T23:59:59Z")));
        assert_eq!(time("2026-10-25T03:00:00"), Ok(at("2026-10-25T02:00:00Z")));
        let twice = time("2026-10-25T02:30:00").unwrap_err();
        for offered in ["2026-10-25T02:30:00+02:00", "2026-10-25T02:30:00+01:00"] {
            assert!(twice.contains(offered), "{twice}");
            assert!(offered.parse::<When>().is_ok());
        }
    }

    #[test]
    fn what_names_no_moment_is_refused() {
        for text in [
            "",
            "seq:0",
            "seq:x",
            "bookmark:",
            "-5",
            "-5y",
            "-s",
            "yesterday",
            "2026-13-01T00:00:00Z",
            "2026-11-21T01:15:60Z",
            "20261121T011560Z",
            "+002026-11-21 01:15:60.5+01:00",
        ] {
            let message = text.parse::<When>().unwrap_err().to_string();
            assert!(message.contains("names no moment"), "{text}: {message}");
        }
    }

    #[test]
    fn a_when_prints_as_it_is_read() {
        for text in [
            "latest",
            "seq:5",
            "bookmark:a",
            "-90s",
            "1970-01-01T00:00:01.000000005Z",
        ] {
            assert_eq!(text.parse::<When>().unwrap().to_string(), text);
        }
    }
}
