//! How long it takes until a database runs again: a mount of the moment, against what users would take instead.
//!
//! Always true:
//! - Every way has the same data and the same disk, starts from a cold page cache, and takes its turn in every round.
//! - A time counts only if the database then holds, to the last row, what it held at the moment that the way brings back.

mod ways;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use cdp_tests::Scene;
use cdp_tests::agent::AgentPlan;
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::moments::WallNs;
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::postgres::{Installation, Server};
use cdp_tests::process::poll_until;

use super::measure::forget_caches;
use super::report::{median, verdict};
use super::restore::{milliseconds, spread};
use crate::{apt, sh};

use ways::{Backups, Way};

/// A mount must be that much faster than every other way.
const SPEEDUP_MIN: f64 = 3.0;
/// pgbench's data of scale 1 is some 15 MiB; the rest is WAL and free room.
const VOLUME_BYTES_PER_SCALE: u64 = 30 * MIB;
const VOLUME_BYTES_MIN: u64 = 1024 * MIB;
/// PostgreSQL's own choice.
const WAL_SEGMENT_MIB: u32 = 16;
/// As much WAL as PostgreSQL lets a crash recovery read. Its own choice is 1 GB, which the few minutes here would not
/// fill even once; with this, checkpoints come several times between backup and moment, as they do in a day.
const MAX_WAL_SIZE: &str = "max_wal_size=128MB";
const CLIENTS: u64 = 4;
const LOAD_TIMEOUT: Duration = Duration::from_secs(900);
const ARCHIVE_TIMEOUT: Duration = Duration::from_secs(120);

/// Answered as soon as the database is there.
const PAYMENTS: &str = "select count(*), coalesce(sum(delta), 0) from pgbench_history";
/// Needs every page of the largest table.
const ACCOUNTS: &str = "select count(*), sum(abalance) from pgbench_accounts";

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecoveryEffort {
    pub(super) rounds: usize,
    /// pgbench's, one database each: 100 000 accounts, some 15 MiB, for each one of it.
    pub(super) scales: &'static [u64],
    /// Between the backups and the moment; a tenth of it follows.
    pub(super) transactions: u64,
}

/// Gets what is compared with; what cannot be had is left out of the comparison later.
pub(super) fn get_rivals() {
    let packages = Way::ALL.iter().filter_map(|way| way.package());
    let get = || -> Result<()> {
        let packages: Vec<&str> = packages.collect();
        let missing = apt::missing(&packages)?;
        if missing.is_empty() {
            return Ok(());
        }
        sh::step(&format!("get {}", missing.join(", ")), || apt::install(&missing))
    };
    if apt::is_here()
        && let Err(error) = get()
    {
        sh::say(format!("going on without: {error:#}"));
    }
}

/// What a database holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Content {
    payments: Vec<String>,
    accounts: Vec<String>,
}

impl Content {
    fn of(server: &Server) -> Result<Content> {
        Ok(Content {
            payments: server.sql(PAYMENTS)?,
            accounts: server.sql(ACCOUNTS)?,
        })
    }
}

/// The moment that is gone back to, and how far it is from the backups.
#[derive(Clone, Copy, Debug)]
struct Distance {
    /// Since the backups.
    wal_bytes: u64,
    /// Since the last checkpoint began: what a crash recovery reads.
    redo_bytes: u64,
    /// Of the data folder, when it was backed up.
    data_bytes: u64,
}

/// What one way took, since the decision to take it.
#[derive(Clone, Copy, Debug)]
struct Times {
    /// The database's files can be opened.
    files: Duration,
    /// The database takes writes, and has answered a question about the payments.
    answered: Duration,
    /// It has read every account.
    read: Duration,
}

/// Everything that is there before the decision.
struct Stage<'a> {
    scene: &'a Scene,
    postgres: Installation,
    backups: Backups<'a>,
    at_backup: Content,
    at_moment: Content,
}

/// Measures and gives the tables.
pub(super) fn measure(seed: u64, effort: RecoveryEffort) -> Result<String> {
    let Some(postgres) = Installation::find()? else {
        bail!("how soon a database runs again cannot be measured: PostgreSQL is missing");
    };
    let mut text = how(&postgres.version()?, effort);
    for &scale in effort.scales {
        // Of a database that was measured nothing is left on the disk when the next one is filled.
        let scene = Scene::new(seed)?;
        let measured = measure_at(&scene, &postgres, effort, scale);
        if measured.is_err() {
            scene.show_logs();
        }
        let cleared = scene.clear();
        text.push_str(&measured?);
        cleared?;
    }
    Ok(text)
}

fn measure_at(scene: &Scene, postgres: &Installation, effort: RecoveryEffort, scale: u64) -> Result<String> {
    let volume_bytes = (scale * VOLUME_BYTES_PER_SCALE).max(VOLUME_BYTES_MIN);
    let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(volume_bytes))?;
    FileSystem::Ext4.make(device.path())?;
    let mount = Mount::new(device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
    let store = scene.path("store");
    let mut agent = AgentPlan::new(scene, &store)?
        .volume("v", device.path())
        .protect()?;
    let data = mount.dir().join("data");
    postgres.create_cluster_with(&data, WAL_SEGMENT_MIB)?;
    let mut backups = Backups::new(scene, &store, &data)?;
    let run = |name: &str| -> Result<Server> {
        let archive = format!("archive_command=cp %p {}/%f", backups.archive().display());
        let settings = ["archive_mode=on", &archive, MAX_WAL_SIZE];
        postgres.start(&data, &scene.path("sockets"), &settings, &scene.log(name))
    };

    let server = run("fill")?;
    let fill = server
        .client("pgbench")
        .args(["--initialize", "--quiet", "--scale", &scale.to_string()]);
    fill.timeout(LOAD_TIMEOUT).run()?.success()?;
    let at_backup = Content::of(&server)?;
    server.stop()?;
    // What is copied file by file is whole only while nobody writes: PostgreSQL is down for it, and so starts without a
    // recovery from it.
    sh::step("back up with restic and borg", || backups.copy_files())?;
    let data_bytes = folder_bytes(&data)?;
    let server = run("postgres")?;
    let from = lsn(&server)?;
    sh::step("pg_basebackup", || backups.copy_base(&server))?;
    load(&server, effort.transactions)?;
    let at_moment = Content::of(&server)?;
    let distance = Distance {
        wal_bytes: lsn(&server)? - from,
        redo_bytes: lsn(&server)? - number(&server, REDO)?,
        data_bytes,
    };
    backups.moment = Some(WallNs::now());
    load(&server, effort.transactions / 10)?;
    wait_archived(&server)?;
    agent.wait_synced()?;

    let stage = Stage {
        scene,
        postgres: postgres.clone(),
        backups,
        at_backup,
        at_moment,
    };
    let figures = stage.all_ways(effort.rounds)?;
    server.stop()?;
    mount.unmount()?;
    agent.stop()?;
    Ok(format!("\n{}\n{}", what(scale, distance), table(&figures)))
}

impl Stage<'_> {
    fn all_ways(&self, rounds: usize) -> Result<Vec<(Way, Vec<Times>)>> {
        let mut figures: Vec<(Way, Vec<Times>)> = Way::ALL.map(|way| (way, Vec::new())).into();
        let count = figures.len();
        for round in 0..rounds {
            for turn in 0..count {
                // Nobody always comes first.
                let (way, of_way) = &mut figures[(round + turn) % count];
                if !way.is_here() {
                    continue;
                }
                let times = self.take(*way).with_context(|| way.in_words().to_owned())?;
                sh::say(format!(
                    "round {} of {rounds}: {}: {times}",
                    round + 1,
                    way.in_words()
                ));
                of_way.push(times);
            }
        }
        Ok(figures)
    }

    fn take(&self, way: Way) -> Result<Times> {
        let expected = if way.brings_any_moment() {
            &self.at_moment
        } else {
            &self.at_backup
        };
        forget_caches()?;
        let started = Instant::now();
        let place = self.backups.bring(way)?;
        let files = started.elapsed();
        let settings: Vec<&str> = place.settings.iter().map(String::as_str).collect();
        let log = self.scene.log("restored");
        let server = self
            .postgres
            .start(&place.data, &self.scene.path("sockets-2"), &settings, &log)?;
        let payments = server.sql(PAYMENTS)?;
        let answered = started.elapsed();
        let accounts = server.sql(ACCOUNTS)?;
        let read = started.elapsed();
        let found = Content { payments, accounts };
        ensure!(found == *expected, "{found:?} came back, it was {expected:?}");
        ensure!(
            server.sql("select pg_is_in_recovery()")? == ["f"],
            "it takes no writes"
        );
        server.stop()?;
        self.backups.clear(place)?;
        Ok(Times {
            files,
            answered,
            read,
        })
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [files, answered, read] = [self.files, self.answered, self.read].map(|time| time.as_millis());
        write!(
            f,
            "files {files} ms, first answer {answered} ms, every account {read} ms"
        )
    }
}

const REDO: &str = "select redo_lsn - '0/0'::pg_lsn from pg_control_checkpoint()";

fn number(server: &Server, sql: &str) -> Result<u64> {
    let rows = server.sql(sql)?;
    let row = rows.first().context("a row")?;
    row.parse().with_context(|| format!("a number: {row:?}"))
}

/// Bytes of WAL so far.
fn lsn(server: &Server) -> Result<u64> {
    number(server, "select pg_current_wal_lsn() - '0/0'::pg_lsn")
}

fn load(server: &Server, transactions: u64) -> Result<()> {
    let of_each = format!("--transactions={}", (transactions / CLIENTS).max(1));
    let clients = format!("--client={CLIENTS}");
    server
        .client("pgbench")
        .args([&clients, "--jobs=2", "--no-vacuum", &of_each])
        .timeout(LOAD_TIMEOUT)
        .run()?
        .success()
        .map(drop)
}

/// Waits until all WAL so far is in the archive.
fn wait_archived(server: &Server) -> Result<()> {
    let last = server.sql("select pg_walfile_name(pg_switch_wal())")?.concat();
    let is_archived = format!("select last_archived_wal >= '{last}' from pg_stat_archiver");
    poll_until("the archive to have all WAL", ARCHIVE_TIMEOUT, || {
        Ok((server.sql(&is_archived)? == ["t"]).then_some(()))
    })
}

fn folder_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    let mut folders: Vec<PathBuf> = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                bytes += entry.metadata()?.len();
            }
        }
    }
    Ok(bytes)
}

fn how(version: &str, effort: RecoveryEffort) -> String {
    format!(
        "{version} with pgbench's tables on a protected volume. It is backed up; then come {} transactions; then the moment; \
         then {} more transactions. {MAX_WAL_SIZE}, else PostgreSQL's own settings. restic and borg (without encryption) \
         backed up the data folder while PostgreSQL was stopped, so nothing has to recover; they bring back their backup, \
         and every transaction since is lost. All repositories, archives, copies and the store lie on one disk; copies are \
         not synced. {} rounds; medians, and in brackets the smallest and largest, in milliseconds since the decision, from \
         a cold page cache. First answer: the database takes writes and has told sum and number of the payments, which are \
         right; so are all accounts, read after that.\n",
        effort.transactions,
        effort.transactions / 10,
        effort.rounds,
    )
}

fn what(scale: u64, distance: Distance) -> String {
    let mib = |bytes: u64| bytes / MIB;
    format!(
        "Scale {scale}: {} MiB of data when it was backed up; {} MiB of WAL until the moment, {} MiB of it since the last \
         checkpoint.\n",
        mib(distance.data_bytes),
        mib(distance.wal_bytes),
        mib(distance.redo_bytes),
    )
}

/// Every way against the first.
fn table(figures: &[(Way, Vec<Times>)]) -> String {
    let mut text = String::from(
        "| to a running database | brings back | files are there | first answer | every account read | the mount is faster by | target | |\n\
         |---|---|---:|---:|---:|---:|---:|---|\n",
    );
    let of = |times: &[Times], value: fn(&Times) -> Duration| times.iter().map(value).collect::<Vec<_>>();
    let answered_ms = |times: &[Times]| median(&milliseconds(&of(times, |times| times.answered)));
    let ours = figures.iter().find(|(way, _)| *way == Way::Mount);
    let ours_ms = ours.map_or(0.0, |(_, times)| answered_ms(times));
    for (way, times) in figures {
        let name = way.in_words();
        if times.is_empty() {
            text.push_str(&format!("| {name} | not measured: not installed | | | | | | |\n"));
            continue;
        }
        let moment = if way.brings_any_moment() {
            "the moment"
        } else {
            "its backup"
        };
        let speedup = match way {
            Way::Mount => "| |".to_owned(),
            _ => {
                let speedup = answered_ms(times) / ours_ms;
                let met = verdict(speedup >= SPEEDUP_MIN);
                format!("{speedup:.1} | {SPEEDUP_MIN:.1} | {met}")
            }
        };
        text.push_str(&format!(
            "| {name} | {moment} | {} | {} | {} | {speedup} |\n",
            spread(&of(times, |times| times.files)),
            spread(&of(times, |times| times.answered)),
            spread(&of(times, |times| times.read)),
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a way that is not three times slower is told as missed, one that was not there as not measured, and which
    /// moment each brings back. Method: times with a known outcome.
    #[test]
    fn a_mount_that_is_not_fast_enough_is_told_as_missed() {
        let times = |answered: u64| Times {
            files: Duration::from_millis(answered / 2),
            answered: Duration::from_millis(answered),
            read: Duration::from_millis(answered * 2),
        };
        let page = table(&[
            (Way::Mount, vec![times(1000), times(4000), times(800)]),
            (Way::Restic, vec![times(3000)]),
            (Way::Borg, vec![]),
            (Way::Replay, vec![times(2900)]),
        ]);
        for row in [
            "| `cdp-restore mount --rw` | the moment | 500 (400 to 2000) | 1000 (800 to 4000) | 2000 (1600 to 8000) | | | |\n",
            "| `restic restore` | its backup | 1500 (1500 to 1500) | 3000 (3000 to 3000) | 6000 (6000 to 6000) | 3.0 | 3.0 | met |\n",
            "| `borg extract` | not measured: not installed | | | | | | |\n",
            "| copy of `pg_basebackup`, WAL replayed | the moment | 1450 (1450 to 1450) | 2900 (2900 to 2900) | 5800 (5800 to 5800) | 2.9 | 3.0 | **missed** |\n",
        ] {
            assert!(page.contains(row), "{row} in {page}");
        }
    }
}
