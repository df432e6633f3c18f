//! `status`, `wait` and `bookmark`: ask the running agent.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use cdp_journal::net::{TargetState, TargetStatus};
use cdp_journal::ship::Rate;
use cdp_journal::store::StoreReader;

use crate::cli::WaitFor;
use crate::control::{self, Answer, Request, Status, VolumeStatus};
use crate::losses::LossCounts;

const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// Prints how the volumes are; of a store whose agent does not run, what it holds.
pub(crate) fn status(store: &Path, json: bool) -> anyhow::Result<()> {
    let status = match control::ask(store, &Request::Status, ANSWER_TIMEOUT)? {
        Some(Answer::Status(status)) => status,
        Some(other) => bail!("the agent gave an answer of another kind: {other:?}"),
        None => status_of_store(store)?,
    };
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&status)?)?;
    } else {
        print_status(&mut out, &status)?;
    }
    Ok(())
}

fn status_of_store(store: &Path) -> anyhow::Result<Status> {
    let reader = StoreReader::open(store)?;
    let seq = reader.head().map_or(0, |head| head.seq.get());
    let mut volumes = Vec::new();
    for info in reader.volumes()? {
        let history = reader.history(info.id)?;
        volumes.push(VolumeStatus {
            kind: info.kind.to_string(),
            path: info.path,
            bytes: info.bytes,
            gaps: history.as_ref().map_or(0, |history| history.gaps.len() as u64),
            gap_cause: Some("agent-down".into()),
            gap_since: history
                .and_then(|history| history.exact.last().map(|exact| exact.to))
                .map(|last_exact| last_exact.to_string()),
            ..VolumeStatus::stopped(&info.name)
        });
    }
    Ok(Status {
        agent: reader.uuid().to_string(),
        boot_id: String::new(),
        seq,
        durable_seq: seq,
        store_bytes: reader.log_bytes()?,
        store: None,
        volumes,
        targets: Vec::new(),
        rate_bytes_per_s: None,
        rate_readback_bytes_per_s: None,
        readback_waits_for: None,
    })
}

fn print_status(out: &mut impl std::io::Write, status: &Status) -> std::io::Result<()> {
    writeln!(
        out,
        "agent {}  seq {}  durable {}",
        status.agent, status.seq, status.durable_seq
    )?;
    if let Some(store) = &status.store {
        writeln!(
            out,
            "store {} of {} used{}",
            human(store.used_bytes),
            human(store.limit_bytes),
            if store.is_nearly_full { ", NEARLY FULL" } else { "" }
        )?;
    }
    for volume in &status.volumes {
        print_volume(out, volume)?;
    }
    for target in &status.targets {
        print_target(out, target)?;
    }
    let limits = [
        ("rate", status.rate_bytes_per_s),
        ("rate_readback", status.rate_readback_bytes_per_s),
    ];
    for (key, limit) in limits {
        if let Some(limit) = limit {
            writeln!(out, "{key:<16} {} now", Rate::new(limit))?;
        }
    }
    if let Some(server) = &status.readback_waits_for {
        writeln!(out, "reading back waits for {server} to come nearer")?;
    }
    Ok(())
}

fn print_volume(out: &mut impl std::io::Write, volume: &VolumeStatus) -> std::io::Result<()> {
    write!(out, "{:<16} {:<10}", volume.name, volume.state)?;
    if volume.state == "seeding" || volume.state == "resyncing" {
        write!(out, " {:.0} %", volume.progress * 100.0)?;
        write!(out, ", {} left", human(volume.dirty_bytes))?;
        if let Some(rate) = volume.readback_bytes_per_s {
            write!(out, " at {}/s", human(rate as u64))?;
        }
        if let Some(left_s) = volume.resync_left_s {
            write!(out, ", about {}", span(left_s))?;
        }
    }
    if let Some(cause) = &volume.gap_cause {
        write!(out, " ({cause}")?;
        if let Some(since) = &volume.gap_since {
            write!(out, " since {since}")?;
        }
        write!(out, ")")?;
    }
    write!(
        out,
        "  {}  {} captured in {} writes, {} dropped",
        volume.path,
        human(volume.captured_bytes),
        volume.captured_writes,
        volume.dropped_writes,
    )?;
    if volume.losses != LossCounts::default() {
        write!(out, " ({})", volume.losses)?;
    }
    let gaps = if volume.gaps == 1 { "gap" } else { "gaps" };
    write!(out, ", {} {gaps}", volume.gaps)?;
    if let Some(since) = &volume.exact_since {
        write!(out, ", exact since {since}")?;
    }
    match &volume.why {
        Some(why) => writeln!(out, ": {why}"),
        None => writeln!(out),
    }
}

/// Seconds, as a person says them.
fn span(seconds: f64) -> String {
    let seconds = seconds.ceil() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

fn print_target(out: &mut impl std::io::Write, target: &TargetStatus) -> std::io::Result<()> {
    let state = match target.state {
        TargetState::Connected if target.full => "full",
        TargetState::Connected => "connected",
        TargetState::Connecting => "connecting",
        TargetState::Refused => "refused",
    };
    write!(
        out,
        "{:<16} {state:<10}  acked {}, lag {:.3} s, {} sent, {} to go",
        target.server,
        target.acked_seq,
        target.lag_seconds,
        human(target.sent_bytes),
        human(target.backlog_bytes),
    )?;
    if target.saved_bytes > 0 {
        write!(out, ", {} were there", human(target.saved_bytes))?;
    }
    if let Some(seconds) = target.catch_up_seconds.filter(|seconds| *seconds >= 1.0) {
        write!(out, " (about {seconds:.0} s)")?;
    }
    match &target.why {
        Some(why) => writeln!(out, ": {why}"),
        None => writeln!(out),
    }
}

fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// Waits for a state.
pub(crate) fn wait(
    store: &Path,
    volume: Option<&str>,
    state: WaitFor,
    timeout: Duration,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + timeout;
    let mut last = String::from("no agent is running on it");
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let done = match state {
            WaitFor::Protected => {
                // What was said to be durable is no more if the store came to be full meanwhile.
                is_protected(store, volume, &mut last)?
                    && is_durable(store, left, &mut last)?
                    && is_protected(store, volume, &mut last)?
            }
            WaitFor::Synced => is_synced(store, volume, left, &mut last)?,
        };
        if done {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!(
                "{}: not reached within {} s: {last}",
                store.display(),
                timeout.as_secs_f64()
            );
        }
        std::thread::sleep(POLL);
    }
}

fn running_status(store: &Path) -> anyhow::Result<Option<Status>> {
    match control::ask(store, &Request::Status, ANSWER_TIMEOUT)? {
        Some(Answer::Status(status)) => Ok(Some(status)),
        _ => Ok(None),
    }
}

fn chosen<'a>(status: &'a Status, volume: Option<&str>) -> anyhow::Result<Vec<&'a VolumeStatus>> {
    let Some(name) = volume else {
        return Ok(status.volumes.iter().collect());
    };
    let found = status.volumes.iter().find(|volume| volume.name == name);
    let names: Vec<&str> = status.volumes.iter().map(|volume| volume.name.as_str()).collect();
    Ok(vec![found.with_context(|| {
        format!("no volume {name}; there is {}", names.join(", "))
    })?])
}

fn is_protected(store: &Path, volume: Option<&str>, last: &mut String) -> anyhow::Result<bool> {
    let Some(status) = running_status(store)? else {
        return Ok(false);
    };
    let volumes = chosen(&status, volume)?;
    if let Some(other) = volumes.iter().find(|volume| volume.state != "protected") {
        *last = match &other.why {
            Some(why) => format!("{} is {}: {why}", other.name, other.state),
            None => format!(
                "{} is {} ({}{:.0} %)",
                other.name,
                other.state,
                other
                    .gap_cause
                    .as_ref()
                    .map_or(String::new(), |cause| format!("{cause}, ")),
                other.progress * 100.0
            ),
        };
        return Ok(false);
    }
    Ok(true)
}

fn is_synced(store: &Path, volume: Option<&str>, left: Duration, last: &mut String) -> anyhow::Result<bool> {
    // What was written before the call and is not captured, or not read yet, is in no store.
    if !is_protected(store, volume, last)? {
        return Ok(false);
    }
    let request = Request::Sync {
        timeout_ms: left.as_millis() as u64,
        whole: true,
        volume: volume.map(str::to_owned),
    };
    is_answered(store, &request, left, last)
}

/// Does the store know of it? So that it is known still if the agent ends in the next moment.
fn is_durable(store: &Path, left: Duration, last: &mut String) -> anyhow::Result<bool> {
    let timeout_ms = left.as_millis() as u64;
    is_answered(store, &Request::Durable { timeout_ms }, left, last)
}

fn is_answered(store: &Path, request: &Request, left: Duration, last: &mut String) -> anyhow::Result<bool> {
    match control::ask(store, request, left + ANSWER_TIMEOUT)? {
        Some(Answer::Synced { .. }) => Ok(true),
        Some(Answer::Failed { why }) => {
            *last = why;
            Ok(false)
        }
        _ => Ok(false),
    }
}

/// Names this moment.
pub(crate) fn bookmark(store: &Path, label: &str) -> anyhow::Result<()> {
    let request = Request::Bookmark {
        label: label.to_owned(),
    };
    match control::ask(store, &request, 4 * ANSWER_TIMEOUT)? {
        Some(Answer::Bookmarked { seq, at, inexact }) => {
            for volume in inexact {
                tracing::warn!(
                    %volume,
                    "is not exact now (see `cdp-agent status`): this moment of it cannot be restored"
                );
            }
            writeln!(std::io::stdout(), "bookmark:{label}  seq:{seq}  {at}")?;
            Ok(())
        }
        Some(Answer::Failed { why }) => bail!("bookmark {label:?} not set: {why}"),
        Some(other) => bail!("the agent gave an answer of another kind: {other:?}"),
        None => bail!(
            "no agent is running on {}: start `cdp-agent run` first",
            store.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(state: &str) -> VolumeStatus {
        VolumeStatus {
            name: "pg".into(),
            kind: "block".into(),
            path: "/dev/vdb".into(),
            bytes: 4 << 30,
            state: state.into(),
            progress: 0.25,
            captured_bytes: 1 << 20,
            captured_writes: 7,
            dropped_writes: 3,
            losses: LossCounts {
                ring_full: 2,
                failed: 1,
                ..LossCounts::default()
            },
            exact_since: None,
            gaps: 1,
            gap_cause: Some("ring-overflow".into()),
            gap_since: Some("2026-11-21T10:15:00.000000000Z".into()),
            dirty_bytes: 3 << 30,
            readback_bytes: 1 << 30,
            readback_bytes_per_s: Some(40.0 * 1024.0 * 1024.0),
            resync_left_s: Some(76.8),
            compared_blocks: 0,
            corrected_blocks: 0,
            why: None,
        }
    }

    fn printed(volume: &VolumeStatus) -> String {
        let mut out = Vec::new();
        print_volume(&mut out, volume).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_resync_tells_its_cause_since_when_and_how_long_it_takes() {
        assert_eq!(
            printed(&volume("resyncing")),
            "pg               resyncing  25 %, 3.0 GiB left at 40.0 MiB/s, about 1 min 17 s (ring-overflow since \
             2026-11-21T10:15:00.000000000Z)  /dev/vdb  1.0 MiB captured in 7 writes, 3 dropped (2 ring full, 1 \
             failed), 1 gap\n"
        );
    }

    #[test]
    fn where_all_is_well_nothing_is_said_of_gaps_and_losses() {
        let fine = VolumeStatus {
            dropped_writes: 0,
            losses: LossCounts::default(),
            exact_since: Some("2026-11-21T10:16:00Z".into()),
            gap_cause: None,
            gap_since: None,
            gaps: 2,
            ..volume("protected")
        };
        assert_eq!(
            printed(&fine),
            "pg               protected   /dev/vdb  1.0 MiB captured in 7 writes, 0 dropped, 2 gaps, exact since \
             2026-11-21T10:16:00Z\n"
        );
    }

    #[test]
    fn a_server_that_had_some_of_it_is_told_of_with_how_much() {
        let printed = |saved_bytes| {
            let mut out = Vec::new();
            let target = TargetStatus {
                server: "dr1:7443".into(),
                state: TargetState::Connected,
                acked_seq: 120,
                lag_seconds: 0.004,
                sent_bytes: 1 << 20,
                saved_bytes,
                backlog_bytes: 4096,
                catch_up_seconds: None,
                full: false,
                why: None,
            };
            print_target(&mut out, &target).unwrap();
            String::from_utf8(out).unwrap()
        };
        let plain = "dr1:7443         connected   acked 120, lag 0.004 s, 1.0 MiB sent, 4.0 KiB to go";
        assert_eq!(printed(0), format!("{plain}\n"));
        assert_eq!(printed(3 << 20), format!("{plain}, 3.0 MiB were there\n"));
    }

    #[test]
    fn spans_are_rounded_up_and_short() {
        let spans: Vec<String> = [0.2, 59.0, 61.0, 7384.0].into_iter().map(span).collect();
        assert_eq!(spans, ["1 s", "59 s", "1 min 1 s", "2 h 3 min"]);
    }
}
