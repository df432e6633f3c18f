//! P1, exact, under load: restored to any moment and recovered, a database holds every transaction that
//! had been committed by then, and none that had not begun.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{Agent, AgentPlan};
use cdp_tests::commits::{CommitLog, Committers, PRESENT, SCHEMA, TORN, numbers, session_log};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::moments::WallNs;
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::network::{self, Network};
use cdp_tests::postgres::{self, Installation};
use cdp_tests::restore::Restore;
use cdp_tests::rng::Rng;
use cdp_tests::server::Server;
use cdp_tests::sqlite::{Database, Journal};
use cdp_tests::view::View;
use cdp_tests::{Scene, system_test};

/// Sessions of PostgreSQL that commit at once.
const SESSIONS: u64 = 3;
/// Transactions for each moment that is checked, so that moments fall far apart.
const COMMITS_PER_MOMENT: u64 = 60;
/// The link to a server elsewhere: that of a hospital.
const LINK_MEGABITS: u64 = 50;

/// Goal: P1 for PostgreSQL. Method: sessions commit numbered transactions on a protected ext4, with log
/// segments so small that checkpoints and recycling happen all the time; then images of random moments are
/// mounted, the server recovers on each, and its rows are compared with what the clients had seen.
#[test]
fn postgresql_restored_to_any_moment_has_exactly_the_commits_until_then() {
    postgresql_has_exactly_the_commits("commits: PostgreSQL", false);
}

/// Goal: P1 and P4 when the production host is gone. Method: as above; the agent ships over a link of 50 Mbit/s to a
/// server on another host, is killed, its store is deleted, and every moment comes from the server, over that link.
#[test]
fn postgresql_restored_from_the_server_alone_has_exactly_the_commits_until_then() {
    postgresql_has_exactly_the_commits("commits: PostgreSQL, from the server alone", true);
}

fn postgresql_has_exactly_the_commits(name: &str, is_far: bool) {
    system_test(name, &programs(&["mkfs.ext4", "psql"], is_far), |scene| {
        let (postgres, mut rng) = (postgres()?, scene.rng());
        let (device, mount) = ext4(scene, 256 * MIB)?;
        let server = start_postgres(scene, &postgres, &mount)?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("pg", device.path());
        let history = History::arrange(scene, plan, is_far)?;
        let mut agent = history.plan.protect()?;
        let committers = commit(scene, &server, &mut rng);
        let moments = scene.moments();
        committers.wait_for(moments as u64 * COMMITS_PER_MOMENT)?;
        let log = committers.stop()?;
        agent.wait_and_check()?;
        let (agent, restore) = history.restore(agent)?;
        for number in 0..moments {
            let at = log.random_moment(&mut rng)?;
            with_restored(scene, &restore, "pg", at, |dir| {
                let logfile = scene.log(&format!("restored-{number}"));
                let copy = postgres.start(&dir.join("data"), &scene.path("sock2"), &[], &logfile)?;
                judge(&log, at, &copy.sql(PRESENT)?, &copy.sql(TORN)?)?;
                copy.stop()?;
                std::fs::remove_file(logfile).context("remove the log of a recovery that went well")
            })?;
        }
        drop(server);
        mount.unmount()?;
        agent.map_or(Ok(()), Agent::stop)
    });
}

/// Goal: P1 for PostgreSQL started on a mount of a moment, while production and the agent go on. Method: sessions commit
/// without a pause; random moments since the beginning are mounted with `--rw`, the server recovers on each mount; its
/// rows are compared in the end with what the clients had seen.
#[test]
fn postgresql_on_a_mount_of_any_moment_has_exactly_the_commits_until_then() {
    let name = "commits: PostgreSQL on a mount";
    system_test(name, &["mkfs.ext4", "psql"], |scene| {
        let (postgres, mut rng) = (postgres()?, scene.rng());
        let (device, mount) = ext4(scene, 256 * MIB)?;
        let server = start_postgres(scene, &postgres, &mount)?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        let committers = commit(scene, &server, &mut rng);
        let view = View::new(scene, Restore::from(plan.store())?)?;
        let mut seen = Vec::new();
        for number in 0..scene.moments() {
            committers.wait_for(COMMITS_PER_MOMENT / 3)?;
            let at = committers.so_far().random_moment(&mut rng)?;
            view.mount(&at.to_string(), &["--rw"])?.success()?;
            let logfile = scene.log(&format!("mounted-{number}"));
            let copy = postgres.start(&view.dir().join("data"), &scene.path("sock2"), &[], &logfile)?;
            seen.push((at, copy.sql(PRESENT)?, copy.sql(TORN)?));
            copy.stop().with_context(|| format!("mounted at {at}"))?;
            std::fs::remove_file(logfile).context("remove the log of a recovery that went well")?;
            view.unmount()?;
        }
        let log = committers.stop()?;
        for (at, present, torn) in &seen {
            judge(&log, *at, present, torn)?;
        }
        agent.wait_and_check()?;
        drop(server);
        mount.unmount()?;
        agent.stop()
    });
}

/// Goal: P1 for SQLite with a write-ahead log. Method: as for PostgreSQL, with one session.
#[test]
fn sqlite_with_a_write_ahead_log_has_exactly_the_commits_until_then() {
    sqlite_has_exactly_the_commits("commits: SQLite, write-ahead log", &[Journal::Wal], false);
}

/// Goal: as for PostgreSQL from the server alone, with one session of SQLite.
#[test]
fn sqlite_restored_from_the_server_alone_has_exactly_the_commits_until_then() {
    let name = "commits: SQLite, from the server alone";
    sqlite_has_exactly_the_commits(name, &[Journal::Wal], true);
}

/// Goal: P1 for SQLite with a rollback journal, deleted or kept at each commit. Method: as for PostgreSQL,
/// with one session.
#[test]
fn sqlite_with_a_rollback_journal_has_exactly_the_commits_until_then() {
    sqlite_has_exactly_the_commits(
        "commits: SQLite, rollback journal",
        &[Journal::Delete, Journal::Persist],
        false,
    );
}

fn sqlite_has_exactly_the_commits(name: &str, journals: &[Journal], is_far: bool) {
    for &journal in journals {
        system_test(name, &programs(&["mkfs.ext4", "sqlite3"], is_far), |scene| {
            let mut rng = scene.rng();
            let (device, mount) = ext4(scene, 64 * MIB)?;
            let database = Database::new(&mount.dir().join("entries.db"), journal);
            let mut setup = database.session(&scene.log("sqlite"))?;
            setup.ask(&format!("{SCHEMA}\nselect 'made';\n"), "made")?;
            setup.finish(Duration::from_secs(10))?;
            let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("db", device.path());
            let history = History::arrange(scene, plan, is_far)?;
            let mut agent = history.plan.protect()?;
            let (sessions, logs) = (database.clone(), scene.dir().to_owned());
            let open = move |session| sessions.session(&session_log(&logs, session));
            let committers = Committers::start(1, &mut rng, open);
            let moments = scene.moments();
            committers.wait_for(moments as u64 * COMMITS_PER_MOMENT / 2)?;
            let log = committers.stop()?;
            agent.wait_and_check()?;
            let (agent, restore) = history.restore(agent)?;
            for _ in 0..moments {
                let at = log.random_moment(&mut rng)?;
                with_restored(scene, &restore, "db", at, |dir| {
                    let copy = Database::new(&dir.join("entries.db"), journal);
                    copy.check_integrity()?;
                    judge(&log, at, &copy.sql(PRESENT)?, &copy.sql(TORN)?)
                })?;
            }
            mount.unmount()?;
            agent.map_or(Ok(()), Agent::stop)
        });
    }
}

fn programs<'a>(own: &[&'a str], is_far: bool) -> Vec<&'a str> {
    let network: &[&str] = if is_far { &network::PROGRAMS } else { &[] };
    [own, network].concat()
}

/// Where the history of a test lies.
struct History {
    plan: AgentPlan,
    /// What restores from another host.
    far: Option<(Server, Restore)>,
}

impl History {
    fn arrange(scene: &Scene, plan: AgentPlan, is_far: bool) -> Result<History> {
        if !is_far {
            return Ok(History { plan, far: None });
        }
        let network = Rc::new(Network::new(scene)?);
        network.shape(LINK_MEGABITS)?;
        let server = Server::start_in(scene, &scene.path("site"), &network)?;
        let (ship, read) = server.enroll_both(scene, "db01")?;
        let restore = Restore::from_server(server.address(), &read)?.on(network.agent);
        Ok(History {
            plan: plan.on(network.agent).ships_to(server.address(), &ship),
            far: Some((server, restore)),
        })
    }

    /// What to restore with, beside the agent; of a history elsewhere, once agent and store are gone.
    fn restore(&self, agent: Agent) -> Result<(Option<Agent>, Restore)> {
        let Some((_, restore)) = &self.far else {
            return Ok((Some(agent), Restore::from(self.plan.store())?));
        };
        agent.kill()?;
        std::fs::remove_dir_all(self.plan.store()).context("delete the agent's store")?;
        Ok((None, restore.clone()))
    }
}

fn postgres() -> Result<Installation> {
    Installation::find()?.context("PostgreSQL is not installed (cargo xtask setup gets it)")
}

/// A cluster with log segments so small that checkpoints and recycling happen all the time.
fn start_postgres(scene: &Scene, postgres: &Installation, mount: &Mount) -> Result<Arc<postgres::Server>> {
    let data = mount.dir().join("data");
    postgres.create_cluster(&data)?;
    let settings = ["max_wal_size=4MB", "min_wal_size=2MB", "checkpoint_timeout=30s"];
    let server = postgres.start(&data, &scene.path("sock"), &settings, &scene.log("postgres"))?;
    server.sql(SCHEMA)?;
    Ok(Arc::new(server))
}

fn commit(scene: &Scene, server: &Arc<postgres::Server>, rng: &mut Rng) -> Committers {
    let (sessions, logs) = (Arc::clone(server), scene.dir().to_owned());
    let open = move |session| sessions.session(&session_log(&logs, session));
    Committers::start(SESSIONS, rng, open)
}

fn ext4(scene: &Scene, bytes: u64) -> Result<(LoopDevice, Mount)> {
    let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(bytes))?;
    FileSystem::Ext4.make(device.path())?;
    let mount = Mount::new(device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
    Ok((device, mount))
}

/// Restores `volume` to `at`, mounts the image (the file system recovers by its journal) and looks at it.
fn with_restored(
    scene: &Scene,
    restore: &Restore,
    volume: &str,
    at: WallNs,
    look: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let image = scene.path("image");
    restore.image(volume, &at.to_string(), &image)?.success()?;
    let device = LoopDevice::attach(&image)?;
    let mount = Mount::new(device.path(), FileSystem::Ext4, &scene.path("restored"))?;
    look(mount.dir()).with_context(|| format!("restored to {at}"))?;
    mount.unmount()?;
    drop(device);
    std::fs::remove_file(image).context("remove the image")
}

fn judge(log: &CommitLog, at: WallNs, present: &[String], torn: &[String]) -> Result<()> {
    ensure!(torn.is_empty(), "half a transaction: {torn:?}");
    log.check(at, &numbers(present)?)
}
