//! What a write takes while the engine is in trouble: reading back what it lost, with a store that is full, or without
//! its server.
//!
//! The load is held well below what the machine can do, as a database's is: at full speed a second busy process costs
//! its share of the processors, whatever it does.

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cdp_tests::agent::{Agent, AgentPlan, PROTECT_TIMEOUT};
use cdp_tests::device::MIB;
use cdp_tests::fio::Fio;
use cdp_tests::process::{cmd, poll_until};
use cdp_tests::server::Server;

use super::measure::{Bench, RAW_BYTES};
use super::ship::{forget, target};

/// Writes each second.
const RATE_IOPS: u32 = 2000;
/// The load runs for so long before it is timed. What the engine did at full speed, when nobody used the disk, takes the
/// disks a while to write; one write in a hundred is what a tenth of a second makes.
const SETTLE: Duration = Duration::from_secs(2);
/// Room for the first copy, a resync of all of it, and a little more.
const STORE_BYTES_MAX: u64 = 2 * RAW_BYTES + 256 * MIB;
/// So small that one write over the device fills it while the agent stands still.
const RING_BYTES: &str = "1MiB";
const NOTICE_TIMEOUT: Duration = Duration::from_secs(60);

/// What the engine is doing while the writes are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Plight {
    /// It protects another device, where nothing happens.
    Unprotected,
    /// All is well.
    Protected,
    /// It reads back what was lost.
    Resync,
    /// Its store is full.
    StoreFull,
    /// Its server has gone.
    ServerAway,
}

impl Plight {
    pub(super) const ALL: [Plight; 5] = [
        Plight::Unprotected,
        Plight::Protected,
        Plight::Resync,
        Plight::StoreFull,
        Plight::ServerAway,
    ];

    /// As the table names it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Plight::Unprotected => "unprotected",
            Plight::Protected => "protected",
            Plight::Resync => "while a resync runs",
            Plight::StoreFull => "while the store is full",
            Plight::ServerAway => "while the server is away",
        }
    }
}

/// Times of single writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Latency {
    /// Median, in microseconds.
    pub(super) p50_us: f64,
    /// What 99 of 100 stayed under, in microseconds.
    pub(super) p99_us: f64,
    /// The engine was in this plight to the end of the measurement.
    pub(super) lasted: bool,
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Latency {
            p50_us,
            p99_us,
            lasted,
        } = self;
        let lasted = if *lasted { "" } else { " (not to the end)" };
        write!(f, "p50 {p50_us:.0} µs, p99 {p99_us:.0} µs{lasted}")
    }
}

impl Bench<'_> {
    /// One round of all plights, the unprotected side first or last.
    pub(super) fn latencies(&self, is_unprotected_first: bool) -> Result<Vec<(Plight, Latency)>> {
        let mut all = Vec::new();
        if is_unprotected_first {
            all.push((Plight::Unprotected, self.latency_beside_idle_agent()?));
        }
        all.extend(self.latencies_in_trouble()?);
        all.push((Plight::ServerAway, self.latency_without_server()?));
        if !is_unprotected_first {
            all.push((Plight::Unprotected, self.latency_beside_idle_agent()?));
        }
        Ok(all)
    }

    fn latency_beside_idle_agent(&self) -> Result<Latency> {
        let store = self.scene.path("store");
        let plan = AgentPlan::new(self.scene, &store)?.volume("bench", self.idle.path());
        let agent = plan.protect()?;
        let latency = self.time_writes(|| Ok(true))?;
        agent.stop()?;
        std::fs::remove_dir_all(&store).context("remove the store")?;
        Ok(latency)
    }

    fn latencies_in_trouble(&self) -> Result<Vec<(Plight, Latency)>> {
        let store = self.scene.path("store");
        let plan = AgentPlan::new(self.scene, &store)?
            .volume("bench", self.raw.path())
            .flag("--store-bytes-max", &STORE_BYTES_MAX.to_string())
            .flag("--ring-bytes", RING_BYTES);
        let mut agent = plan.protect()?;
        let protected = self.time_writes(|| is_in(&agent, "protected", None))?;
        // All of the device is written anew while the agent stands still.
        agent.pause()?;
        self.write_all_over(1)?;
        agent.resume()?;
        poll_until("a resync", NOTICE_TIMEOUT, || {
            agent.check_alive()?;
            is_in(&agent, "resyncing", Some("ring-overflow")).map(|is| is.then_some(()))
        })?;
        let resync = self.time_writes(|| is_in(&agent, "resyncing", Some("ring-overflow")))?;
        agent.wait_protected(PROTECT_TIMEOUT)?;
        for pass in 2..10 {
            if is_in(&agent, "resyncing", Some("spool-full"))? {
                break;
            }
            self.write_all_over(pass)?;
        }
        ensure!(
            is_in(&agent, "resyncing", Some("spool-full"))?,
            "the store is not full"
        );
        let full = self.time_writes(|| is_in(&agent, "resyncing", Some("spool-full")))?;
        agent.stop()?;
        std::fs::remove_dir_all(&store).context("remove the store")?;
        Ok(vec![
            (Plight::Protected, protected),
            (Plight::Resync, resync),
            (Plight::StoreFull, full),
        ])
    }

    fn latency_without_server(&self) -> Result<Latency> {
        let (store, site) = (self.scene.path("store"), self.scene.path("site"));
        let mut server = Server::start(self.scene, &site)?;
        let (identity, reading) = server.enroll_both(self.scene, "bench")?;
        let mut agent = AgentPlan::new(self.scene, &store)?
            .volume("bench", self.raw.path())
            .ships_to(server.address(), &identity)
            .protect()?;
        agent.wait_synced()?;
        server.kill()?;
        let is_away = || Ok(target(&agent)?.state == "connecting");
        poll_until("the agent to miss its server", NOTICE_TIMEOUT, || {
            is_away().map(|is_away| is_away.then_some(()))
        })?;
        let latency = self.time_writes(is_away)?;
        agent.stop()?;
        forget(&[&store, &site, &identity, &reading])?;
        Ok(latency)
    }

    fn write_all_over(&self, seed: u64) -> Result<()> {
        let fio = Fio::new("over", self.raw.path(), "write")
            .option("bs", "1m")
            .option("size", "100%");
        fio.direct(4).seed(seed).run(self.scene.dir()).map(drop)
    }

    fn time_writes(&self, lasts: impl Fn() -> Result<bool>) -> Result<Latency> {
        // The host's own writes are none of the engine's.
        cmd("sync").timeout(Duration::from_secs(300)).run()?.success()?;
        let report = self
            .job("4k", "randwrite", 1, self.effort.latency)
            .option("rate_iops", RATE_IOPS)
            .option("ramp_time", SETTLE.as_secs())
            .run(self.scene.dir())?;
        Ok(Latency {
            p50_us: report.latency_p50_us,
            p99_us: report.latency_p99_us,
            lasted: lasts()?,
        })
    }
}

fn is_in(agent: &Agent, state: &str, cause: Option<&str>) -> Result<bool> {
    let volume = agent.volume("bench")?;
    Ok(volume.state == state && volume.gap_cause.as_deref() == cause)
}
