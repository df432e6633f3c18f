//! Times as they are shown: always in a form that can be pasted after `--at`.

use std::fmt;
use std::time::Duration;

use cdp_journal::WallNs;
use jiff::tz::TimeZone;
use serde::{Serialize, Serializer};

/// A moment. As JSON: RFC 3339 in UTC; as text: RFC 3339 in the local time zone. Both have all nine
/// digits: a shortened time would name an earlier moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time(pub(crate) WallNs);

impl Time {
    /// As text in a time zone.
    pub(crate) fn in_zone(self, zone: &TimeZone) -> String {
        let zoned = self.0.timestamp().to_zoned(zone.clone());
        zoned.strftime("%Y-%m-%dT%H:%M:%S.%9f%:z").to_string()
    }

    /// How long it is from this moment to a later one; nothing if that one is earlier.
    pub(crate) fn until(self, later: Time) -> Duration {
        Duration::from_nanos(u64::try_from(later.0.0.saturating_sub(self.0.0)).unwrap_or(0))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.in_zone(&TimeZone::system()))
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_reads_back_as_the_same_nanosecond() {
        let time = Time(WallNs(1_795_227_303_123_456_789));
        let zone = TimeZone::fixed(jiff::tz::offset(8));
        assert_eq!(time.in_zone(&zone), "2026-11-21T10:15:03.123456789+08:00");
        assert_eq!(
            serde_json::to_string(&time).unwrap(),
            "\"2026-11-21T02:15:03.123456789Z\""
        );
        for text in [time.to_string(), time.0.to_string()] {
            let back: jiff::Timestamp = text.parse().unwrap();
            assert_eq!(WallNs::from(back), time.0);
        }
    }

    #[test]
    fn a_whole_second_keeps_its_nine_digits() {
        let text = Time(WallNs(1_795_227_303_000_000_000)).in_zone(&TimeZone::UTC);
        assert_eq!(text, "2026-11-21T02:15:03.000000000+00:00");
    }

    #[test]
    fn a_length_of_time_is_never_negative() {
        let (earlier, later) = (Time(WallNs(5)), Time(WallNs(12)));
        assert_eq!(earlier.until(later), Duration::from_nanos(7));
        assert_eq!(later.until(earlier), Duration::ZERO);
    }
}
