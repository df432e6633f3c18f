//! The measurements: each starts its agent, waits until it protects, and leaves nothing running.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use cdp_tests::Scene;
use cdp_tests::agent::{Agent, AgentPlan};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fio::Fio;
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::postgres::{Installation, Server};
use cdp_tests::process::cmd;
use cdp_tests::restore::Restore;

use super::Effort;

pub(super) const RAW_BYTES: u64 = 1024 * MIB;
const DATABASE_BYTES: u64 = 1536 * MIB;
const IDLE_BYTES: u64 = 16 * MIB;
/// 100 000 accounts each: some 300 MiB.
const PGBENCH_SCALE: &str = "20";

/// Which device an agent protects meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    /// Another one, where nothing happens.
    Unprotected,
    /// The one that is measured.
    Protected,
}

impl Side {
    pub(super) const BOTH: [Side; 2] = [Side::Unprotected, Side::Protected];
}

/// A load that runs as fast as it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Load {
    /// fio: 4 KiB random writes, direct, one at a time.
    Random1,
    /// fio: 4 KiB random writes, direct, 32 at a time.
    Random32,
    /// fio: 1 MiB sequential writes, direct.
    Sequential,
    /// pgbench, its transactions each second.
    Pgbench,
}

impl Load {
    pub(super) const ALL: [Load; 4] = [Load::Random1, Load::Random32, Load::Sequential, Load::Pgbench];
}

/// A load that is held at a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum HeldLoad {
    /// 4 KiB random writes at 100 MB/s.
    Random,
    /// 1 MiB sequential writes at 200 MB/s.
    Sequential,
}

impl HeldLoad {
    pub(super) const ALL: [HeldLoad; 2] = [HeldLoad::Random, HeldLoad::Sequential];

    /// The rate that is asked for.
    pub(super) fn bytes_per_second(self) -> u64 {
        match self {
            HeldLoad::Random => 100_000_000,
            HeldLoad::Sequential => 200_000_000,
        }
    }
}

/// What one measurement gave.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Figures {
    /// Requests or transactions each second.
    pub(super) rate: f64,
    /// Bytes written each second; 0 where that was not asked.
    pub(super) bytes_per_second: f64,
    /// What the agent took; 0 on the unprotected side.
    pub(super) agent: AgentCost,
}

/// Bytes each second of copies of the same bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copies {
    /// `cdp-restore image`, which ends when the image is on disk.
    pub(super) image: f64,
    /// `cp`, which leaves what it wrote in the page cache.
    pub(super) copy: f64,
    /// `cp`, then `sync` of the copy.
    pub(super) synced: f64,
}

impl fmt::Display for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Copies { image, copy, synced } = *self;
        let (image, copy, synced) = (image / 1e6, copy / 1e6, synced / 1e6);
        write!(
            f,
            "image {image:.0} MB/s, cp {copy:.0} MB/s, cp and sync {synced:.0} MB/s"
        )
    }
}

/// What an agent took while it protected.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AgentCost {
    /// CPU time, user and system.
    pub(super) cpu: Duration,
    /// Bytes captured meanwhile.
    pub(super) captured_bytes: u64,
    /// Writes lost meanwhile.
    pub(super) dropped_writes: u64,
    /// The most memory it has held.
    pub(super) peak_memory_bytes: u64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0}/s, {:.0} MB/s", self.rate, self.bytes_per_second / 1e6)?;
        if self.agent.captured_bytes > 0 {
            let AgentCost {
                cpu,
                captured_bytes,
                dropped_writes,
                ..
            } = self.agent;
            let (cpu, captured) = (cpu.as_secs_f64(), captured_bytes / MIB);
            write!(
                f,
                ", agent {cpu:.1} CPU s for {captured} MiB, {dropped_writes} dropped"
            )?;
        }
        Ok(())
    }
}

/// The devices and the database that are measured.
pub(super) struct Bench<'a> {
    pub(super) scene: &'a Scene,
    pub(super) effort: Effort,
    // In the order in which they are let go.
    pub(super) server: Option<Server>,
    _mount: Mount,
    pub(super) database: LoopDevice,
    pub(super) raw: LoopDevice,
    pub(super) idle: LoopDevice,
}

impl<'a> Bench<'a> {
    pub(super) fn set_up(scene: &'a Scene, effort: Effort) -> Result<Bench<'a>> {
        let create = |name: &str, bytes| LoopDevice::create(&scene.path(name), LoopOptions::of_bytes(bytes));
        let (raw, idle) = (create("raw", RAW_BYTES)?, create("idle", IDLE_BYTES)?);
        // Written once, so that nothing measures how the host finds room for a sparse file.
        let fill = Fio::new("fill", raw.path(), "write")
            .option("bs", "1m")
            .option("size", "100%");
        fill.direct(1).seed(1).run(scene.dir())?;
        let database = create("database", DATABASE_BYTES)?;
        FileSystem::Ext4.make(database.path())?;
        let mount = Mount::new(database.path(), FileSystem::Ext4, &scene.path("mnt"))?;
        let server = match Installation::find()? {
            Some(postgres) => Some(start_database(scene, &postgres, mount.dir())?),
            None => None,
        };
        Ok(Bench {
            scene,
            effort,
            server,
            _mount: mount,
            database,
            raw,
            idle,
        })
    }

    /// One measurement of `load`, an agent protecting its device or the idle one.
    pub(super) fn measure(&mut self, load: Load, side: Side) -> Result<Figures> {
        let target = if load == Load::Pgbench {
            self.database.path()
        } else {
            self.raw.path()
        };
        let protected = if side == Side::Protected {
            target
        } else {
            self.idle.path()
        };
        self.beside_agent(protected, side, || match load {
            Load::Random1 => self.fio("4k", "randwrite", 1),
            Load::Random32 => self.fio("4k", "randwrite", 32),
            Load::Sequential => self.fio("1m", "write", 4),
            Load::Pgbench => self.pgbench(),
        })
    }

    /// Writes at a held rate to a protected device.
    pub(super) fn hold(&mut self, load: HeldLoad) -> Result<Figures> {
        let (size, pattern) = match load {
            HeldLoad::Random => ("4k", "randwrite"),
            HeldLoad::Sequential => ("1m", "write"),
        };
        self.beside_agent(self.raw.path(), Side::Protected, || {
            let fio = self.job(size, pattern, 4, self.effort.sustained);
            let report = fio
                .option("rate", load.bytes_per_second())
                .run(self.scene.dir())?;
            Ok(Figures {
                rate: report.iops,
                bytes_per_second: report.bytes_per_second,
                agent: AgentCost::default(),
            })
        })
    }

    fn beside_agent(
        &self,
        device: &Path,
        side: Side,
        load: impl FnOnce() -> Result<Figures>,
    ) -> Result<Figures> {
        let store = self.scene.path("store");
        let plan = AgentPlan::new(self.scene, &store)?.volume("bench", device);
        let agent = plan.protect()?;
        // Both sides begin with the host's own writes done.
        cmd("sync").timeout(Duration::from_secs(300)).run()?.success()?;
        let before = cost_so_far(&agent)?;
        let mut figures = load()?;
        let after = cost_so_far(&agent)?;
        if side == Side::Protected {
            figures.agent = AgentCost {
                cpu: after.cpu.saturating_sub(before.cpu),
                captured_bytes: after.captured_bytes - before.captured_bytes,
                dropped_writes: after.dropped_writes - before.dropped_writes,
                peak_memory_bytes: after.peak_memory_bytes,
            };
            ensure!(
                figures.agent.captured_bytes > 0,
                "nothing was captured: this measured no protection"
            );
        }
        agent.stop()?;
        std::fs::remove_dir_all(&store).context("remove the store")?;
        Ok(figures)
    }

    /// A job of fio on the raw device.
    pub(super) fn job(&self, size: &str, pattern: &str, depth: u32, time: Duration) -> Fio {
        Fio::new("bench", self.raw.path(), pattern)
            .option("bs", size)
            .option("size", "100%")
            .option("direct", 1)
            .option("ioengine", "libaio")
            .option("iodepth", depth)
            .option("time_based", 1)
            .option("runtime", time.as_secs())
            .option("norandommap", 1)
            .option("randrepeat", 0)
    }

    fn fio(&self, size: &str, pattern: &str, depth: u32) -> Result<Figures> {
        let report = self
            .job(size, pattern, depth, self.effort.fio)
            .run(self.scene.dir())?;
        Ok(Figures {
            rate: report.iops,
            bytes_per_second: report.bytes_per_second,
            agent: AgentCost::default(),
        })
    }

    fn pgbench(&self) -> Result<Figures> {
        let Some(server) = &self.server else {
            return Ok(Figures::default());
        };
        server.sql("checkpoint")?;
        let seconds = format!("--time={}", self.effort.pgbench.as_secs());
        let run = server
            .client("pgbench")
            .args(["--client=4", "--jobs=2", "--no-vacuum", &seconds]);
        let told = run
            .timeout(self.effort.pgbench + Duration::from_secs(60))
            .output()?;
        Ok(Figures {
            rate: transactions_per_second(&told)?,
            ..Figures::default()
        })
    }

    /// A full image from a store with some history, and `cp` of the same bytes, from a cold cache.
    pub(super) fn image_and_copy(&mut self) -> Result<Copies> {
        let store = self.scene.path("store");
        let plan = AgentPlan::new(self.scene, &store)?.volume("bench", self.raw.path());
        let mut agent = plan.protect()?;
        let some = self
            .job("4k", "randwrite", 4, Duration::from_secs(5))
            .option("rate", "40m");
        some.run(self.scene.dir())?;
        agent.wait_synced()?;
        agent.stop()?;
        let (image, copy) = (self.scene.path("image"), self.scene.path("copy"));
        forget_caches()?;
        let started = Instant::now();
        Restore::from(&store)?
            .image("bench", "latest", &image)?
            .success()?;
        let image_time = started.elapsed();
        let (copy_time, synced_time) = time_copy(self.raw.backing(), &copy, "--sparse=never")?;
        cmd("cmp")
            .args([&image, &copy])
            .timeout(COPY_TIMEOUT)
            .run()?
            .success()
            .context("the image is not the device")?;
        for path in [&image, &copy] {
            std::fs::remove_file(path)?;
        }
        std::fs::remove_dir_all(&store).context("remove the store")?;
        let speed = |time: Duration| RAW_BYTES as f64 / time.as_secs_f64();
        Ok(Copies {
            image: speed(image_time),
            copy: speed(copy_time),
            synced: speed(synced_time),
        })
    }
}

const COPY_TIMEOUT: Duration = Duration::from_secs(300);

fn start_database(scene: &Scene, postgres: &Installation, dir: &Path) -> Result<Server> {
    let data = dir.join("data");
    postgres.create_cluster(&data)?;
    // No checkpoint falls into one measurement and not into the next.
    let settings = ["max_wal_size=512MB", "checkpoint_timeout=1h", "autovacuum=off"];
    let server = postgres.start(&data, &scene.path("sockets"), &settings, &scene.log("postgres"))?;
    let fill = server
        .client("pgbench")
        .args(["--initialize", "--quiet", "--scale", PGBENCH_SCALE]);
    fill.timeout(Duration::from_secs(300)).run()?.success()?;
    Ok(server)
}

pub(super) fn cost_so_far(agent: &Agent) -> Result<AgentCost> {
    let volume = agent.volume("bench")?;
    Ok(AgentCost {
        cpu: agent.cpu_time()?,
        captured_bytes: volume.captured_bytes,
        dropped_writes: volume.dropped_writes,
        peak_memory_bytes: agent.peak_memory_bytes()?,
    })
}

/// Copies a file from a cold cache: how long until `cp` ends, and until `sync` of the copy does.
pub(super) fn time_copy(from: &Path, to: &Path, holes: &str) -> Result<(Duration, Duration)> {
    forget_caches()?;
    let started = Instant::now();
    cmd("cp")
        .args([holes, "--reflink=never"])
        .args([from, to])
        .timeout(COPY_TIMEOUT)
        .run()?
        .success()?;
    let copied = started.elapsed();
    cmd("sync").arg(to).timeout(COPY_TIMEOUT).run()?.success()?;
    Ok((copied, started.elapsed()))
}

pub(super) fn forget_caches() -> Result<()> {
    cmd("sync").timeout(COPY_TIMEOUT).run()?.success()?;
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("forget the page cache")
}

/// From pgbench's last lines: `tps = 1234.567 (without initial connection time)`.
fn transactions_per_second(told: &str) -> Result<f64> {
    let line = told
        .lines()
        .find_map(|line| line.strip_prefix("tps = "))
        .context("pgbench told no tps")?;
    line.split(' ')
        .next()
        .unwrap_or_default()
        .parse()
        .with_context(|| format!("tps = {line}"))
}

#[cfg(test)]
mod tests {
    use super::transactions_per_second;

    /// Goal: pgbench's answer is read right. Method: its own words.
    #[test]
    fn transactions_are_read_from_what_pgbench_says() {
        let told = "latency average = 3.2 ms\ninitial connection time = 4 ms\n\
                    tps = 1234.567 (without initial connection time)\n";
        assert_eq!(transactions_per_second(told).ok(), Some(1234.567));
        assert!(transactions_per_second("nothing").is_err());
    }
}
