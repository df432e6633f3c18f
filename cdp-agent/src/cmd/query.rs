//! `status`, `wait` and `bookmark`: ask the running agent.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use cdp_journal::net::{TargetState, TargetStatus};
use cdp_journal::store::StoreReader;

use crate::cli::WaitFor;
use crate::control::{self, Answer, Request, Status, VolumeStatus};

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
            name: info.name,
            kind: info.kind.to_string(),
            path: info.path,
            bytes: info.bytes,
            state: "stopped".into(),
            progress: 0.0,
            captured_bytes: 0,
            captured_writes: 0,
            dropped_writes: 0,
            exact_since: None,
            gaps: history.map_or(0, |history| history.gaps.len() as u64),
            gap_cause: Some("agent-down".into()),
            compared_blocks: 0,
            corrected_blocks: 0,
        });
    }
    Ok(Status {
        agent: reader.uuid().to_string(),
        boot_id: String::new(),
        seq,
        durable_seq: seq,
        store_bytes: reader.log_bytes()?,
        volumes,
        targets: Vec::new(),
    })
}

fn print_status(out: &mut impl std::io::Write, status: &Status) -> std::io::Result<()> {
    writeln!(
        out,
        "agent {}  seq {}  durable {}",
        status.agent, status.seq, status.durable_seq
    )?;
    for volume in &status.volumes {
        write!(out, "{:<16} {:<10}", volume.name, volume.state)?;
        if volume.state == "seeding" || volume.state == "resyncing" {
            write!(out, " {:.0} %", volume.progress * 100.0)?;
        }
        if let Some(cause) = &volume.gap_cause {
            write!(out, " ({cause})")?;
        }
        writeln!(
            out,
            "  {}  {} captured in {} writes, {} dropped, {} gaps{}",
            volume.path,
            human(volume.captured_bytes),
            volume.captured_writes,
            volume.dropped_writes,
            volume.gaps,
            volume
                .exact_since
                .as_ref()
                .map_or(String::new(), |since| format!(", exact since {since}")),
        )?;
    }
    for target in &status.targets {
        print_target(out, target)?;
    }
    Ok(())
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
            WaitFor::Protected => is_protected(store, volume, &mut last)?,
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
        *last = format!(
            "{} is {} ({:.0} %)",
            other.name,
            other.state,
            other.progress * 100.0
        );
        return Ok(false);
    }
    Ok(true)
}

fn is_synced(store: &Path, volume: Option<&str>, left: Duration, last: &mut String) -> anyhow::Result<bool> {
    if volume.is_some() {
        let Some(status) = running_status(store)? else {
            return Ok(false);
        };
        chosen(&status, volume)?;
    }
    let request = Request::Sync {
        timeout_ms: left.as_millis() as u64,
    };
    match control::ask(store, &request, left + ANSWER_TIMEOUT)? {
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
        Some(Answer::Bookmarked { seq, at }) => {
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
