//! The host's clocks. Decisions elsewhere are given times; only here are they read.

use cdp_journal::BootNs;
use rustix::time::{ClockId, clock_gettime};

fn ns(clock: ClockId) -> i64 {
    let time = clock_gettime(clock);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// Boot-time clock: goes on while the host sleeps, never steps.
pub(crate) fn boot_ns() -> BootNs {
    BootNs(ns(ClockId::Boottime) as u64)
}

/// What to add to boot time to get wall time, now. The narrowest of a few samples.
pub(crate) fn wall_offset_ns() -> i64 {
    let sample = || {
        let before = ns(ClockId::Boottime);
        let wall = ns(ClockId::Realtime);
        let after = ns(ClockId::Boottime);
        (after - before, wall - (before + (after - before) / 2))
    };
    (0..3)
        .map(|_| sample())
        .min_by_key(|(width, _)| *width)
        .map_or(0, |(_, offset)| offset)
}

/// Identity of this boot of the host.
pub(crate) fn boot_id() -> anyhow::Result<uuid::Uuid> {
    use anyhow::Context as _;
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{path} holds no uuid"))
}
