//! What a server costs: how far it is behind a database, what travels to it, and how fast it takes in.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use cdp_tests::agent::{Agent, AgentPlan, TargetStatus};
use cdp_tests::process::{cmd, poll_until};
use cdp_tests::server::Server;

use super::measure::{Bench, RAW_BYTES, cost_so_far, forget_caches};
use super::report::{median, spread, verdict};

const LAG_P50_MS_MAX: f64 = 30.0;
const LAG_P99_MS_MAX: f64 = 150.0;
const OF_CAPTURED_MAX: f64 = 0.12;
const OF_WAL_MAX: f64 = 0.5;
const CPU_PER_GIB_MAX: f64 = 4.0;
const INGEST_RATIO_MIN: f64 = 0.6;
const STREAM_RATIO_MIN: f64 = 0.8;
/// How often the lag is asked for. Each question is a process of its own, which the database feels.
const ASK_INTERVAL: Duration = Duration::from_millis(100);
const SHIP_TIMEOUT: Duration = Duration::from_secs(300);

/// What a server on loopback cost while a database worked.
#[derive(Clone, Debug)]
pub(super) struct Shipped {
    lags_ms: Vec<f64>,
    captured_bytes: u64,
    wal_bytes: u64,
    sent_bytes: u64,
    agent_cpu: Duration,
    dropped_writes: u64,
}

/// Bytes each second of the same bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ingest {
    /// From an agent's log to a server's: from when the two were connected until all of it was durable there.
    pub(super) shipped: f64,
    /// `dd conv=fsync`.
    pub(super) copied: f64,
    /// One QUIC stream between two threads that do nothing else.
    pub(super) streamed: f64,
}

/// The value that `part` of all values do not exceed.
fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last as f64 * part).ceil() as usize)
        .copied()
        .unwrap_or(0.0)
}

/// The page's part on servers.
pub(super) fn table(shipped: Option<&Shipped>, ingests: &[Ingest], time: Duration) -> String {
    let mut text = String::from("| what | figure | target | |\n|---|---:|---:|---|\n");
    let mut row = |what: &str, figure: f64, unit: &str, target: f64, met: bool| {
        text.push_str(&format!(
            "| {what} | {figure:.3}{unit} | {target}{unit} | {} |\n",
            verdict(met)
        ));
    };
    if let Some(shipped) = shipped {
        let of = |bytes: u64| shipped.sent_bytes as f64 / bytes.max(1) as f64;
        let (p50, p99) = (quantile(&shipped.lags_ms, 0.5), quantile(&shipped.lags_ms, 0.99));
        let cpu = shipped.agent_cpu.as_secs_f64() * f64::from(1 << 30) / shipped.captured_bytes.max(1) as f64;
        let (captured, wal) = (of(shipped.captured_bytes), of(shipped.wal_bytes));
        row("lag, p50", p50, " ms", LAG_P50_MS_MAX, p50 <= LAG_P50_MS_MAX);
        row("lag, p99", p99, " ms", LAG_P99_MS_MAX, p99 <= LAG_P99_MS_MAX);
        row(
            "sent, of what was captured",
            captured,
            "",
            OF_CAPTURED_MAX,
            captured <= OF_CAPTURED_MAX,
        );
        row("sent, of the WAL", wal, "", OF_WAL_MAX, wal <= OF_WAL_MAX);
        row(
            "agent CPU for each GiB captured",
            cpu,
            " s",
            CPU_PER_GIB_MAX,
            cpu <= CPU_PER_GIB_MAX,
        );
    }
    let shipped_rates: Vec<f64> = ingests.iter().map(|ingest| ingest.shipped / 1e6).collect();
    let copied_rates: Vec<f64> = ingests.iter().map(|ingest| ingest.copied / 1e6).collect();
    let streamed_rates: Vec<f64> = ingests.iter().map(|ingest| ingest.streamed / 1e6).collect();
    for (what, rates, target) in [
        (
            "taking in, against `dd conv=fsync`",
            &copied_rates,
            INGEST_RATIO_MIN,
        ),
        (
            "taking in, against a QUIC stream of nothing",
            &streamed_rates,
            STREAM_RATIO_MIN,
        ),
    ] {
        let ratio = median(&shipped_rates) / median(rates);
        row(what, ratio, "", target, ratio >= target);
    }
    let asked = shipped.map_or(0, |shipped| shipped.lags_ms.len());
    let dropped = shipped.map_or(0, |shipped| shipped.dropped_writes);
    format!(
        "A server on loopback; both its folder and the agent's on one disk. pgbench (scale 20, 4 clients) for {} s, the \
         lag asked for {asked} times meanwhile; {dropped} writes dropped. Taking in: {} MB/s against {} MB/s of `dd`, and {} MB/s of one QUIC \
         stream between two threads that do nothing else.\n\n{text}",
        time.as_secs(),
        spread(&shipped_rates),
        spread(&copied_rates),
        spread(&streamed_rates),
    )
}

impl Bench<'_> {
    /// pgbench beside an agent that protects the database and ships; `None` where there is no database.
    pub(super) fn ship(&self, time: Duration) -> Result<Option<Shipped>> {
        let Some(database) = &self.server else {
            return Ok(None);
        };
        let (store, site) = (self.scene.path("store"), self.scene.path("site"));
        let mut server = Server::start(self.scene, &site)?;
        let (identity, reading) = server.enroll_both(self.scene, "bench")?;
        let mut agent = AgentPlan::new(self.scene, &store)?
            .volume("bench", self.database.path())
            .ships_to(server.address(), &identity)
            .protect()?;
        database.sql("checkpoint")?;
        cmd("sync").timeout(SHIP_TIMEOUT).run()?.success()?;
        agent.wait_synced()?;
        let (before, sent_before) = (cost_so_far(&agent)?, target(&agent)?.sent_bytes);
        let wal = database.sql("select pg_current_wal_lsn()")?.concat();
        let seconds = format!("--time={}", time.as_secs());
        let mut client = database
            .client("pgbench")
            .args(["--client=4", "--jobs=2", "--no-vacuum", &seconds])
            .spawn(&self.scene.log("pgbench"))?;
        let mut lags_ms = Vec::new();
        while client.try_code()?.is_none() {
            lags_ms.push(target(&agent)?.lag_seconds * 1e3);
            thread::sleep(ASK_INTERVAL);
        }
        client.wait_success(Duration::from_secs(60))?;
        let wal_bytes = database.sql(&format!("select pg_current_wal_lsn() - '{wal}'::pg_lsn"))?;
        agent.wait_synced()?;
        let after = cost_so_far(&agent)?;
        let shipped = Shipped {
            lags_ms,
            captured_bytes: after.captured_bytes - before.captured_bytes,
            wal_bytes: wal_bytes.concat().parse().context("bytes of WAL")?,
            sent_bytes: target(&agent)?.sent_bytes - sent_before,
            agent_cpu: after.cpu.saturating_sub(before.cpu),
            dropped_writes: after.dropped_writes - before.dropped_writes,
        };
        agent.stop()?;
        server.stop()?;
        forget(&[&store, &site, &identity, &reading])?;
        Ok(Some(shipped))
    }

    /// A log of noise as large as the raw device, shipped to an empty server; then `dd` of as many bytes; then as many
    /// through `stream`.
    pub(super) fn ingest(&self, stream: &Path) -> Result<Ingest> {
        let (store, site) = (self.scene.path("store"), self.scene.path("site"));
        let alone = AgentPlan::new(self.scene, &store)?.volume("bench", self.raw.path());
        alone.protect()?.stop()?;
        let mut server = Server::start(self.scene, &site)?;
        let (identity, reading) = server.enroll_both(self.scene, "bench")?;
        forget_caches()?;
        let agent = alone.ships_to(server.address(), &identity).start()?;
        let mut connected = None;
        let (sent, ship_time) = poll_until("the server to have everything", SHIP_TIMEOUT, || {
            // Until it listens, the store answers for it.
            let status = agent.status().ok();
            let Some(target) = status.as_ref().and_then(|status| status.targets.first()) else {
                return Ok(None);
            };
            if target.state != "connected" {
                return Ok(None);
            }
            let (since, sent_before) = *connected.get_or_insert((Instant::now(), target.sent_bytes));
            let has_all = target.acked_seq > 0 && target.backlog_bytes == 0;
            Ok(has_all.then(|| (target.sent_bytes - sent_before, since.elapsed())))
        })?;
        agent.stop()?;
        server.stop()?;
        forget_caches()?;
        let copy = self.scene.path("copy");
        let started = Instant::now();
        cmd("dd")
            .args(["bs=1M", "conv=fsync", "status=none"])
            .arg(format!("if={}", self.raw.backing().display()))
            .arg(format!("of={}", copy.display()))
            .timeout(SHIP_TIMEOUT)
            .run()?
            .success()?;
        let copy_time = started.elapsed();
        std::fs::remove_file(&copy)?;
        forget(&[&store, &site, &identity, &reading])?;
        Ok(Ingest {
            shipped: sent as f64 / ship_time.as_secs_f64(),
            copied: RAW_BYTES as f64 / copy_time.as_secs_f64(),
            streamed: stream_of_nothing(stream)?,
        })
    }
}

/// Bytes each second of the best of three ways to set up a stream: datagrams for any network, for large frames, and for the
/// loopback.
fn stream_of_nothing(program: &Path) -> Result<f64> {
    let mut best = 0.0;
    for mtu_max in ["1452", "6500", "65527"] {
        let mut stream = cmd(program.display().to_string());
        stream = stream.args([&RAW_BYTES.to_string(), mtu_max, "16777216"]);
        let told = stream.timeout(SHIP_TIMEOUT).run()?.success()?;
        best = f64::max(best, told.stdout.trim().parse().context("bytes each second")?);
    }
    Ok(best)
}

/// Makes room for the next run.
pub(super) fn forget(folders: &[&Path]) -> Result<()> {
    folders.iter().try_for_each(|folder| {
        std::fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))
    })
}

/// What the agent says of its server.
pub(super) fn target(agent: &Agent) -> Result<TargetStatus> {
    agent.status()?.targets.into_iter().next().context("a target")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: quantiles, ratios and misses are told right. Method: figures with a known outcome.
    #[test]
    fn what_was_missed_is_told() {
        let shipped = Shipped {
            lags_ms: (1..=200).map(f64::from).collect(),
            captured_bytes: 1 << 30,
            wal_bytes: 1 << 28,
            sent_bytes: 1 << 27,
            agent_cpu: Duration::from_secs(3),
            dropped_writes: 0,
        };
        let ingest = Ingest {
            shipped: 5e8,
            copied: 1e9,
            streamed: 6e8,
        };
        let page = table(Some(&shipped), &[ingest], Duration::from_secs(60));
        for row in [
            "| lag, p50 | 101.000 ms | 30 ms | **missed** |",
            "| lag, p99 | 199.000 ms | 150 ms | **missed** |",
            "| sent, of what was captured | 0.125 | 0.12 | **missed** |",
            "| sent, of the WAL | 0.500 | 0.5 | met |",
            "| agent CPU for each GiB captured | 3.000 s | 4 s | met |",
            "| taking in, against `dd conv=fsync` | 0.500 | 0.6 | **missed** |",
            "| taking in, against a QUIC stream of nothing | 0.833 | 0.8 | met |",
        ] {
            assert!(page.contains(row), "{row} in {page}");
        }
    }
}
