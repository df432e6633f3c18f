//! Moments: when they were, and what a device held then.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};

use crate::fingerprint::Fingerprint;
use crate::mount::Mount;
use crate::restore::Restore;
use crate::rng::Rng;

/// A time of the wall clock, in nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WallNs(pub i64);

impl WallNs {
    /// The time now (CLOCK_REALTIME, the clock that the host's users read).
    pub fn now() -> WallNs {
        let now = clock_gettime(ClockId::Realtime);
        WallNs(now.tv_sec * 1_000_000_000 + now.tv_nsec)
    }

    /// The same time `ms` milliseconds earlier.
    pub fn minus_ms(self, ms: i64) -> WallNs {
        WallNs(self.0 - ms * 1_000_000)
    }

    /// A random time in `first..=last`.
    pub fn random_between(rng: &mut Rng, first: WallNs, last: WallNs) -> WallNs {
        let span = u64::try_from(last.0 - first.0).unwrap_or(0);
        WallNs(first.0 + rng.between(0, span) as i64)
    }

    /// Reads an RFC 3339 time, as the product prints it.
    pub fn parse(text: &str) -> Result<WallNs> {
        let time: jiff::Timestamp = text.parse().with_context(|| format!("a time: {text:?}"))?;
        Ok(WallNs(
            i64::try_from(time.as_nanosecond()).context("a time in this age")?,
        ))
    }
}

impl fmt::Display for WallNs {
    /// RFC 3339 with nanoseconds: a WHEN of the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_nanosecond(self.0.into()) {
            Ok(time) => write!(f, "{time:.9}"),
            Err(_) => Err(fmt::Error),
        }
    }
}

/// A stretch of time in which a device did not change, and what it held.
#[derive(Clone, Debug)]
pub struct QuietMoment {
    /// The volume that the device is.
    pub volume: String,
    /// When it had become quiet.
    pub from: WallNs,
    /// When it was still quiet.
    pub to: WallNs,
    /// What it held.
    pub content: Fingerprint,
}

impl QuietMoment {
    /// Freezes `mount`, reads its device, thaws it.
    pub fn of_mount(volume: &str, device: &Path, mount: &Mount) -> Result<QuietMoment> {
        let frozen = mount.freeze()?;
        let moment = QuietMoment::of_quiet_device(volume, device)?;
        drop(frozen);
        Ok(moment)
    }

    /// Writes what the page cache holds for a raw device that nobody writes to, then reads it.
    pub fn of_raw(volume: &str, device: &Path) -> Result<QuietMoment> {
        crate::device::flush_cache(device)?;
        QuietMoment::of_quiet_device(volume, device)
    }

    /// Reads a device that is quiet: frozen, or flushed with nobody writing.
    pub fn of_quiet_device(volume: &str, device: &Path) -> Result<QuietMoment> {
        let from = WallNs::now();
        let content = Fingerprint::of_quiet_device(device)?;
        Ok(QuietMoment {
            volume: volume.to_owned(),
            from,
            to: WallNs::now(),
            content,
        })
    }

    /// Restores a random time of the stretch into `image` and compares; the file is gone afterwards.
    pub fn check(&self, restore: &Restore, rng: &mut Rng, image: &Path) -> Result<()> {
        let at = WallNs::random_between(rng, self.from, self.to);
        self.check_at(restore, &at.to_string(), image)
    }

    /// Restores moment `when` into `image` and compares; the file is gone afterwards.
    pub fn check_at(&self, restore: &Restore, when: &str, image: &Path) -> Result<()> {
        restore.image(&self.volume, when, image)?.success()?;
        let what = format!(
            "{} at {when} (quiet from {} to {})",
            self.volume, self.from, self.to
        );
        self.content.expect_same(&Fingerprint::of_file(image)?, &what)?;
        std::fs::remove_file(image).context("remove the image")
    }
}

#[cfg(test)]
mod tests {
    use super::WallNs;
    use crate::rng::Rng;

    /// Goal: times lose no nanosecond on their way. Method: print and parse one with nine digits.
    #[test]
    fn a_time_keeps_its_nanoseconds() {
        let time = WallNs(1_795_234_503_123_456_789);
        assert_eq!(time.to_string(), "2026-11-21T04:15:03.123456789Z");
        assert_eq!(WallNs::parse(&time.to_string()).expect("own form"), time);
        assert_eq!(
            WallNs::parse("2026-11-21T12:15:03.123456789+08:00").expect("with an offset"),
            time
        );
    }

    /// Goal: random moments stay inside. Method: many draws from a short stretch.
    #[test]
    fn a_random_time_lies_in_its_stretch() {
        let mut rng = Rng::new(3);
        let (first, last) = (WallNs(100), WallNs(103));
        let drawn: Vec<WallNs> = (0..100)
            .map(|_| WallNs::random_between(&mut rng, first, last))
            .collect();
        assert!(drawn.iter().all(|time| (first..=last).contains(time)));
        assert!(drawn.contains(&first) && drawn.contains(&last));
    }
}
