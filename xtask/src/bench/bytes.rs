//! How many bytes of log a database's writes become: what is stored, and what travels.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use cdp_tests::agent::AgentPlan;
use cdp_tests::process::cmd;

use super::measure::Bench;

/// At most that much of what was captured.
const OF_CAPTURED_MAX: f64 = 0.12;
/// At most that much of the write-ahead log that the database wrote meanwhile.
const OF_WAL_MAX: f64 = 0.5;
/// Rows of the table of noise.
const NOISE_ROWS: u32 = 200_000;

/// What the database does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transactions {
    /// pgbench's own.
    Pgbench,
    /// Updates of rows of which most bytes are noise.
    Noise,
}

impl Transactions {
    pub(super) const ALL: [Transactions; 2] = [Transactions::Pgbench, Transactions::Noise];

    fn name(self) -> &'static str {
        match self {
            Transactions::Pgbench => "pgbench, scale 20, 4 clients",
            Transactions::Noise => "updates of rows of noise, 4 clients",
        }
    }
}

/// Bytes of one run.
#[derive(Clone, Copy, Debug)]
pub(super) struct ByteFigures {
    pub(super) transactions: Transactions,
    captured_bytes: u64,
    log_bytes: u64,
    wal_bytes: u64,
    cpu: Duration,
    dropped_writes: u64,
    peak_memory_bytes: u64,
}

impl ByteFigures {
    /// One line of a table; the last columns say what is aimed at.
    fn cells(&self) -> [String; 8] {
        let of = |bytes: u64| self.log_bytes as f64 / bytes.max(1) as f64;
        let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
        let cpu_per_gib = self.cpu.as_secs_f64() * f64::from(1 << 30) / self.captured_bytes.max(1) as f64;
        [
            self.transactions.name().to_owned(),
            mb(self.captured_bytes),
            mb(self.wal_bytes),
            mb(self.log_bytes),
            format!("{:.3}", of(self.captured_bytes)),
            format!("{:.2}", of(self.wal_bytes)),
            format!("{cpu_per_gib:.2} s"),
            format!(
                "{:.0} MiB, {} dropped",
                self.peak_memory_bytes as f64 / f64::from(1 << 20),
                self.dropped_writes
            ),
        ]
    }
}

impl fmt::Display for ByteFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cells().join(", "))
    }
}

/// The table of all runs.
pub(super) fn table(runs: &[ByteFigures], time: Duration) -> String {
    let mut text = format!(
        "{} s of transactions each. Aimed at: {OF_CAPTURED_MAX} of what was captured, {OF_WAL_MAX} of the WAL, 4 CPU s \
         of the agent for each GiB captured.\n\n\
         | transactions | captured | WAL | log | of captured | of WAL | agent CPU/GiB | agent |\n\
         |---|---|---|---|---|---|---|---|\n",
        time.as_secs()
    );
    for run in runs {
        text.push_str(&format!("| {} |\n", run.cells().join(" | ")));
    }
    text
}

impl Bench<'_> {
    /// One run beside an agent that protects the database; `None` where there is no database.
    pub(super) fn bytes(&self, transactions: Transactions, time: Duration) -> Result<Option<ByteFigures>> {
        let Some(server) = &self.server else {
            return Ok(None);
        };
        let seconds = format!("--time={}", time.as_secs());
        let mut client = server
            .client("pgbench")
            .args(["--client=4", "--jobs=2", "--no-vacuum", &seconds]);
        if transactions == Transactions::Noise {
            let rows = format!(
                "create table if not exists noise as select id, 0 as n, (select decode(string_agg(md5(random()::text \
                 || part || id), ''), 'hex') from generate_series(1, 12) part) as filler \
                 from generate_series(1, {NOISE_ROWS}) id"
            );
            server.sql(&rows)?;
            server.sql("create unique index if not exists noise_id on noise (id)")?;
            let script = self.scene.path("noise.sql");
            let text =
                format!("\\set id random(1, {NOISE_ROWS})\nupdate noise set n = n + 1 where id = :id;\n");
            std::fs::write(&script, text).context("write the script")?;
            client = client.arg("--file").arg(&script);
        }
        let store = self.scene.path("store");
        let mut agent = AgentPlan::new(self.scene, &store)?
            .volume("bench", self.database.path())
            .protect()?;
        // What the set-up left in memory is written before anything is counted.
        server.sql("checkpoint")?;
        cmd("sync").timeout(Duration::from_secs(300)).run()?.success()?;
        agent.wait_synced()?;
        let (before, log_before, wal) = (
            super::measure::cost_so_far(&agent)?,
            log_bytes(&store)?,
            wal_place(server)?,
        );
        client.timeout(time + Duration::from_secs(60)).output()?;
        let wal_bytes = server.sql(&format!("select pg_current_wal_lsn() - '{wal}'::pg_lsn"))?;
        agent.wait_synced()?;
        let after = super::measure::cost_so_far(&agent)?;
        let figures = ByteFigures {
            transactions,
            captured_bytes: after.captured_bytes - before.captured_bytes,
            log_bytes: log_bytes(&store)? - log_before,
            wal_bytes: wal_bytes.concat().parse().context("bytes of WAL")?,
            cpu: after.cpu.saturating_sub(before.cpu),
            dropped_writes: after.dropped_writes - before.dropped_writes,
            peak_memory_bytes: after.peak_memory_bytes,
        };
        agent.stop()?;
        std::fs::remove_dir_all(&store).context("remove the store")?;
        Ok(Some(figures))
    }
}

fn wal_place(server: &cdp_tests::postgres::Server) -> Result<String> {
    Ok(server.sql("select pg_current_wal_lsn()")?.concat())
}

fn log_bytes(store: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(store.join("log")).context("list the log")? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes)
}
