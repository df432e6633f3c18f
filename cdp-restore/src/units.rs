//! Numbers as people read them.

use std::fmt;
use std::time::Duration;

/// Bytes, rounded to what tells them apart at a glance: `8 GiB`, `1.46 MiB`, `512 B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u64);

/// Bytes to compare with others: rounded as [`Bytes`], with the exact number beside it where rounding
/// dropped anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExactBytes(pub(crate) u64);

const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&match UNITS.iter().find(|(_, shift)| self.0 >> shift > 0) {
            None => format!("{} B", self.0),
            Some((unit, shift)) if self.0 & ((1 << shift) - 1) == 0 => format!("{} {unit}", self.0 >> shift),
            Some((unit, shift)) => {
                let value = self.0 as f64 / (1u64 << shift) as f64;
                let decimals = if value < 10.0 {
                    2
                } else if value < 100.0 {
                    1
                } else {
                    0
                };
                format!("{value:.decimals$} {unit}")
            }
        })
    }
}

impl fmt::Display for ExactBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = UNITS
            .iter()
            .find(|(_, shift)| self.0 >> shift > 0)
            .is_none_or(|(_, shift)| self.0 & ((1 << shift) - 1) == 0);
        if exact {
            return Bytes(self.0).fmt(f);
        }
        write!(f, "{} ({} bytes)", Bytes(self.0), self.0)
    }
}

/// A length of time: `0.4 ms`, `3.2 s`, `5 min 1 s`, `2 h 5 min`, `3 d 4 h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Elapsed(pub(crate) Duration);

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
        f.pad(&if days > 0 {
            format!("{days} d {hours} h")
        } else if hours > 0 {
            format!("{hours} h {minutes} min")
        } else if minutes > 0 {
            format!("{minutes} min {} s", seconds % 60)
        } else if seconds > 0 {
            format!("{:.1} s", self.0.as_secs_f64())
        } else {
            format!("{:.1} ms", self.0.as_secs_f64() * 1e3)
        })
    }
}

/// Bytes per second over a stretch of time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    pub(crate) bytes: u64,
    pub(crate) elapsed: Duration,
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A stretch too short to measure would give a rate nobody can believe.
        let seconds = self.elapsed.as_secs_f64().max(1e-3);
        write!(f, "{}/s", Bytes((self.bytes as f64 / seconds) as u64))
    }
}

/// A count with its noun: `1 write`, `2 writes`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_at_a_glance() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (4096, "4 KiB"),
            (1536, "1.50 KiB"),
            (8 << 30, "8 GiB"),
            ((8 << 30) + 1, "8.00 GiB"),
            (12_345_678, "11.8 MiB"),
            (3 << 42, "12 TiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }

    #[test]
    fn compared_bytes_never_look_equal_when_they_are_not() {
        assert_eq!(ExactBytes(8 << 30).to_string(), "8 GiB");
        assert_eq!(
            ExactBytes((8 << 30) - 512).to_string(),
            "8.00 GiB (8589934080 bytes)"
        );
    }

    #[test]
    fn times_read_at_a_glance() {
        for (milliseconds, text) in [
            (0, "0.0 ms"),
            (3_250, "3.2 s"),
            (301_000, "5 min 1 s"),
            (7_500_000, "2 h 5 min"),
            (273_600_000, "3 d 4 h"),
        ] {
            assert_eq!(Elapsed(Duration::from_millis(milliseconds)).to_string(), text);
        }
        let rate = Rate {
            bytes: 3 << 20,
            elapsed: Duration::from_secs(2),
        };
        assert_eq!(rate.to_string(), "1.50 MiB/s");
        assert_eq!(
            Rate {
                bytes: 0,
                elapsed: Duration::ZERO
            }
            .to_string(),
            "0 B/s"
        );
    }
}
