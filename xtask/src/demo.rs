//! `cargo xtask demo`: a database loses a table, and gets it back as it was one millisecond earlier.
//!
//! The story is told on stdout with its times and sizes; everything happens in a scene of its own (a loop
//! device, a private database) that is gone at the end, also after a failure or an interrupt.

mod postgres;
mod sqlite;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use cdp_tests::Scene;
use cdp_tests::agent::{AgentPlan, PROTECT_TIMEOUT, use_binaries_in};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::moments::WallNs;
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::postgres::Installation;
use cdp_tests::process::{catch_interrupts, poll_until};
use cdp_tests::restore::Restore;
use cdp_tests::scene::missing_here;

use crate::workspace::Workspace;
use crate::{setup, sh};

const VOLUME_BYTES: u64 = 512 * MIB;
/// Payments that are made before the accident, and again after it.
const PAYMENTS: u64 = 1_500;
/// How long payments may take on a slow machine.
const PAYMENTS_TIMEOUT: Duration = Duration::from_secs(120);

/// How to run the demo.
#[derive(clap::Args, Default)]
pub(crate) struct DemoArgs {
    /// With SQLite, though PostgreSQL may be there
    #[arg(long)]
    sqlite: bool,
    /// The machine and the binaries are ready (said by the demo itself to its own second half)
    #[arg(long, hide = true)]
    prepared: bool,
}

/// Prepares the machine, builds, and plays the story.
pub(crate) fn run(workspace: &Workspace, args: &DemoArgs) -> Result<()> {
    if !args.prepared {
        prepare(workspace)?;
    }
    if !sh::is_root() {
        let sqlite = args.sqlite.then(|| "--sqlite".to_owned());
        let again = ["demo", "--prepared"]
            .map(str::to_owned)
            .into_iter()
            .chain(sqlite);
        return again_as_root(workspace, &again.collect::<Vec<_>>());
    }
    let story = Story::begin();
    let programs = ["mkfs.ext4", "losetup", "setpriv"];
    on_a_scene(workspace, &programs, |scene| play(scene, &story, args.sqlite))?;
    story.tell("Nothing of this is left on the machine: no device, no mount, no process, no file.");
    Ok(())
}

/// Plays on a scene of its own, with the release binaries. It is gone afterwards; of a failure its logs are shown.
pub(crate) fn on_a_scene<T>(
    workspace: &Workspace,
    programs: &[&str],
    play: impl FnOnce(&Scene) -> Result<T>,
) -> Result<T> {
    if let Some(why) = missing_here(programs) {
        bail!("this cannot run here: {why}");
    }
    use_binaries_in(&workspace.target().join("release"));
    catch_interrupts();
    let scene = Scene::new(1)?;
    let played = play(&scene);
    if played.is_err() {
        scene.show_logs();
    }
    let cleared = scene.clear();
    let played = played?;
    cleared?;
    Ok(played)
}

/// Gets what is missing and builds the release binaries.
pub(crate) fn prepare(workspace: &Workspace) -> Result<()> {
    setup::run(workspace, false)?;
    sh::step("build cdp-agent and cdp-restore", || {
        let mut build = workspace.cargo("build");
        sh::run(build.args(["--release", "--package", "cdp-agent", "--package", "cdp-restore"]))
    })
}

/// Runs this program once more as root, with the given arguments: block devices need root, building must
/// not have it.
pub(crate) fn again_as_root(workspace: &Workspace, args: &[String]) -> Result<()> {
    let own = std::env::current_exe().context("where this program lies")?;
    let mut command = sh::as_root("env")?;
    command.arg(format!("CARGO_TARGET_DIR={}", workspace.target().display()));
    command.arg(format!("CDP_CACHE={}", workspace.cache.display()));
    // rustup's programs look for their toolchains in these.
    for name in ["PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN"] {
        if let Ok(value) = std::env::var(name) {
            command.arg(format!("{name}={value}"));
        }
    }
    command.arg(own).args(args).current_dir(&workspace.root);
    sh::show(&command);
    let status = command.status().context("start as root")?;
    ensure!(status.success(), "as root: {status}");
    Ok(())
}

/// Tells what happens, with the time since the beginning.
pub(crate) struct Story {
    started: Instant,
}

impl Story {
    pub(crate) fn begin() -> Story {
        Story {
            started: Instant::now(),
        }
    }

    pub(crate) fn tell(&self, text: impl AsRef<str>) {
        println!(
            "{:6.1} s  {}",
            self.started.elapsed().as_secs_f64(),
            text.as_ref()
        );
    }
}

/// What the table holds that is going to be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Invoices {
    count: u64,
    cents: u64,
}

impl Invoices {
    /// Reads a row `count|sum`.
    fn parse(rows: &[String]) -> Result<Invoices> {
        let fields = rows
            .first()
            .and_then(|row| row.split_once('|'))
            .context("a row of two numbers")?;
        Ok(Invoices {
            count: fields.0.parse()?,
            cents: fields.1.parse()?,
        })
    }
}

impl std::fmt::Display for Invoices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} invoices worth {}.{:02}",
            self.count,
            self.cents / 100,
            self.cents % 100
        )
    }
}

/// A database in use: a table of invoices, and payments coming in all the time.
trait Shop {
    /// What it is, such as `PostgreSQL 15.8 under pgbench`.
    fn about(&self) -> &str;
    /// The table of invoices now; an error once it is dropped.
    fn invoices(&self) -> Result<Invoices>;
    /// How many payments were made so far.
    fn payments(&self) -> Result<u64>;
    /// The accident.
    fn drop_invoices(&self) -> Result<()>;
    /// Opens a restored copy of the database in folder `dir`: what it holds, how many payments were made,
    /// and how long it took until it answered.
    fn open_restored(&self, dir: &Path) -> Result<(Invoices, u64, Duration)>;
    /// Ends the payments and the database.
    fn close(self: Box<Self>) -> Result<()>;
}

fn open_shop(scene: &Scene, dir: &Path, sqlite: bool) -> Result<Box<dyn Shop>> {
    let postgres = if sqlite { None } else { Installation::find()? };
    match postgres {
        Some(postgres) => Ok(Box::new(postgres::Shop::open(scene, dir, postgres)?)),
        None => {
            if !sqlite {
                println!("          PostgreSQL is not to be had on this machine: SQLite stands in.");
            }
            Ok(Box::new(sqlite::Shop::open(scene, dir)?))
        }
    }
}

fn play(scene: &Scene, story: &Story, sqlite: bool) -> Result<()> {
    let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(VOLUME_BYTES))?;
    FileSystem::Ext4.make(device.path())?;
    let mount = Mount::new(device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
    let shop = open_shop(scene, mount.dir(), sqlite)?;
    let path = device.path().display();
    story.tell(format!(
        "{} runs on {path}, a device of {} with ext4.",
        shop.about(),
        mib(VOLUME_BYTES)
    ));

    let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("shop", device.path());
    let started = Instant::now();
    let mut agent = plan.start()?;
    agent.wait_protected(PROTECT_TIMEOUT)?;
    let took = started.elapsed().as_secs_f64();
    story.tell(format!(
        "cdp-agent protects it, without stopping anything: first copy done in {took:.1} s."
    ));

    let before = shop.invoices()?;
    let from = shop.payments()?;
    wait_for_payments(shop.as_ref(), from + PAYMENTS)?;
    story.tell(format!(
        "{} payments later there are {before}.",
        shop.payments()? - from
    ));

    let accident = WallNs::now();
    shop.drop_invoices()?;
    ensure!(shop.invoices().is_err(), "the table is still there");
    story.tell(format!(
        "{}: somebody drops the table of invoices. It is gone.",
        clock(accident)
    ));
    let now = shop.payments()?;
    wait_for_payments(shop.as_ref(), now + PAYMENTS / 5)?;
    story.tell("Payments go on meanwhile; the device changes with every one.");

    let wanted = accident.minus_ms(1);
    let image = scene.path("restored.img");
    let started = Instant::now();
    Restore::from(plan.store())?
        .image("shop", &wanted.to_string(), &image)?
        .success()?;
    let took = started.elapsed().as_secs_f64();
    story.tell(format!(
        "cdp-restore image --at {wanted}: {} in {took:.1} s.",
        mib(VOLUME_BYTES)
    ));

    let restored_device = LoopDevice::attach(&image)?;
    let restored = Mount::new(restored_device.path(), FileSystem::Ext4, &scene.path("restored"))?;
    let (found, payments, ready) = shop.open_restored(restored.dir())?;
    ensure!(found == before, "{found} came back, there were {before}");
    let ready = ready.as_secs_f64();
    story.tell(format!(
        "The database starts on the image and recovers in {ready:.1} s: {found} are back."
    ));
    story.tell(format!(
        "So are all {payments} payments made until {}, one millisecond before.",
        clock(wanted)
    ));

    restored.unmount()?;
    let status = agent.volume("shop")?;
    let store_bytes = folder_bytes(plan.store())?;
    shop.close()?;
    mount.unmount()?;
    agent.stop()?;
    story.tell(format!(
        "In between {} writes of {} were captured, {} lost; the store of all of history takes {}.",
        status.captured_writes,
        mib(status.captured_bytes),
        status.dropped_writes,
        mib(store_bytes),
    ));
    Ok(())
}

fn wait_for_payments(shop: &dyn Shop, goal: u64) -> Result<()> {
    poll_until("payments", PAYMENTS_TIMEOUT, || {
        Ok((shop.payments()? >= goal).then_some(()))
    })
}

/// The time of day with milliseconds, in the zone of whoever looks on.
fn clock(time: WallNs) -> String {
    match jiff::Timestamp::from_nanosecond(time.0.into()) {
        Ok(stamp) => stamp
            .to_zoned(jiff::tz::TimeZone::system())
            .strftime("%H:%M:%S%.3f")
            .to_string(),
        Err(_) => time.to_string(),
    }
}

/// A size for people.
pub(crate) fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(MIB))
}

fn folder_bytes(folder: &Path) -> Result<u64> {
    let text = sh::capture(Command::new("du").arg("-sk").arg(folder))?;
    let kib: u64 = text
        .split_whitespace()
        .next()
        .context("du's answer")?
        .parse()
        .context("du's number")?;
    Ok(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::Invoices;

    /// Goal: amounts are told right. Method: a row as the databases give it.
    #[test]
    fn a_row_of_two_numbers_is_told_as_an_amount() {
        let invoices = Invoices::parse(&["20000|1234505".to_owned()]).expect("two numbers");
        assert_eq!(invoices.to_string(), "20000 invoices worth 12345.05");
        assert!(Invoices::parse(&[]).is_err());
    }
}
