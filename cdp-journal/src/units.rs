//! Numbers with units, as they are given on command lines and in configuration files.

use std::time::Duration;

/// Reads a size: `4096`, `64MiB`, `64M`, `10 GiB`.
///
/// # Errors
/// What its form is to be, where it has another; also where it is beyond 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("give a number of bytes, or one with KiB, MiB, GiB or TiB, such as 10GiB; not {text:?}");
    let (number, unit) = split(text.trim());
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" | "K" => 10,
        "MiB" | "M" => 20,
        "GiB" | "G" => 30,
        "TiB" | "T" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// Reads a length of time: `250ms`, `60s` or `60`, `15m`, `2h`, `365d`, `1h 30m`.
///
/// # Errors
/// What its form is to be, where it has another; also where it is beyond 64 bits of milliseconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("give a length of time, a number with ms, s, m, h or d, such as 60s; not {text:?}");
    let (number, unit) = split(text.trim());
    let unit_ms = match unit.trim() {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        // Of several units.
        _ => {
            let told = text.parse::<jiff::SignedDuration>().map_err(|_| wrong())?;
            return Duration::try_from(told).map_err(|_| wrong());
        }
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let time_ms = number.checked_mul(unit_ms).ok_or_else(wrong)?;
    Ok(Duration::from_millis(time_ms))
}

/// Digits, and what follows them.
fn split(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_a_unit() {
        for (text, bytes) in [
            ("4096", 4096),
            ("64MiB", 64 << 20),
            ("64M", 64 << 20),
            ("10 GiB", 10 << 30),
            ("512 B", 512),
            ("0", 0),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
        for wrong in ["", "GiB", "1.5GiB", "10GB", "-1", "1 parsec", "99999999999TiB"] {
            let error = parse_bytes(wrong).unwrap_err();
            assert!(error.contains("such as 10GiB"), "{wrong:?}: {error}");
        }
    }

    #[test]
    fn times_are_read_with_their_units() {
        for (text, seconds) in [
            ("60", 60),
            ("60s", 60),
            ("15m", 900),
            ("2h", 7200),
            ("2d", 172_800),
            ("1h 30m", 5400),
            ("0s", 0),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)));
        }
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        for wrong in ["", "soon", "-5s", "5y", "99999999999999999999d"] {
            let error = parse_duration(wrong).unwrap_err();
            assert!(error.contains("such as 60s"), "{wrong:?}: {error}");
        }
    }
}
