//! The stage itself, without the product: what the other tests conclude is worth what these show.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use cdp_tests::commits::{CommitLog, Committers, PRESENT, SCHEMA, TORN, numbers, session_log};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fingerprint::Fingerprint;
use cdp_tests::fio::Fio;
use cdp_tests::moments::{QuietMoment, WallNs};
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::postgres::Installation;
use cdp_tests::sqlite::{Database, Journal};
use cdp_tests::trace::BioTrace;
use cdp_tests::workload::Mix;
use cdp_tests::{Scene, system_test};

/// Goal: a frozen device does not change, though writers are at work. Method: read it twice within each
/// of a few freezes; between freezes it must have changed, or the writers did nothing.
#[test]
fn a_frozen_device_holds_still_and_a_thawed_one_goes_on() {
    for file_system in [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs] {
        system_test(
            "harness: frozen devices hold still",
            file_system.programs(),
            |scene| {
                let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(320 * MIB))?;
                file_system.make(device.path())?;
                let mount = Mount::new(device.path(), file_system, &scene.path("mnt"))?;
                let mut rng = scene.rng();
                let writers = Mix::on_files(mount.dir(), &mut rng, 2, 60 * MIB)?;
                let mut last: Option<Fingerprint> = None;
                for _ in 0..2 {
                    writers.wait_for_bytes(8 * MIB)?;
                    let frozen = mount.freeze()?;
                    let first = Fingerprint::of_quiet_device(device.path())?;
                    let second = Fingerprint::of_quiet_device(device.path())?;
                    drop(frozen);
                    first.expect_same(&second, "read twice")?;
                    ensure!(
                        last.as_ref() != Some(&first),
                        "nothing changed between two freezes"
                    );
                    last = Some(first);
                }
                writers.stop()?;
                mount.unmount()
            },
        );
    }
}

/// Goal: the raw mix writes what it says, in its own part only. Method: two writers on a device of
/// 4096-byte sectors; afterwards it is quiet, reads alike twice, and is no longer blank.
#[test]
fn raw_writers_leave_a_quiet_device() {
    system_test("harness: raw writers", &["blkdiscard"], |scene| {
        for sector_bytes in [512, 4096] {
            let options = LoopOptions::of_bytes(64 * MIB + 4096).sectors(sector_bytes);
            let device = LoopDevice::create(&scene.path("disk"), options)?;
            let blank = Fingerprint::of_device(device.path())?;
            let writers = Mix::on_device(device.path(), &mut scene.rng(), 2, 60 * MIB)?;
            writers.wait_for_bytes(16 * MIB)?;
            writers.stop()?;
            let first = QuietMoment::of_raw("raw", device.path())?;
            let second = QuietMoment::of_raw("raw", device.path())?;
            first.content.expect_same(&second.content, "read twice")?;
            ensure!(
                first.content != blank && first.to <= second.from,
                "nothing was written"
            );
        }
        Ok(())
    });
}

/// Goal: partitions come and go with their device, and fio reports what it wrote. Method: two
/// partitions, each written by fio; the table and the other partition stay as they were.
#[test]
fn partitions_are_devices_of_their_own() {
    system_test("harness: partitions", &["sfdisk", "fio"], |scene| {
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(96 * MIB).partitioned())?;
        let parts = device.partition(&[32, 0])?;
        let second = Fingerprint::of_device(&parts[1])?;
        let fio = Fio::new("part", &parts[0], "randwrite")
            .option("bs", "4k")
            .option("size", "8m")
            .direct(8);
        let report = fio.seed(scene.seed()).run(scene.dir())?;
        ensure!(report.bytes == 8 * MIB && report.iops > 0.0, "{report:?}");
        second.expect_same(&Fingerprint::of_device(&parts[1])?, "the other partition")
    });
}

/// Goal: the large-bio test can prove what it covers. Method: one large buffered write on xfs must show
/// a bio above 16 MiB in the trace, a small one none.
#[test]
fn a_large_write_on_xfs_is_seen_as_a_large_bio() {
    system_test("harness: large bios", &["mkfs.xfs", "fio"], |scene| {
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(512 * MIB))?;
        FileSystem::Xfs.make(device.path())?;
        let mount = Mount::new(device.path(), FileSystem::Xfs, &scene.path("mnt"))?;
        let trace = BioTrace::start(device.path(), 16 * MIB, &scene.path("tracefs"))?;
        let Some(trace) = trace else {
            cdp_tests::scene::skip_part("harness: large bios", "no tracefs");
            return Ok(());
        };
        let write = |name: &str, bytes: &str| {
            let file = mount.dir().join(name);
            Fio::new(name, &file, "write")
                .option("bs", bytes)
                .option("size", bytes)
                .option("end_fsync", 1)
                .run(scene.dir())
        };
        write("small", "1m")?;
        ensure!(trace.sizes()?.is_empty(), "{:?}", trace.sizes()?);
        write("large", "64m")?;
        ensure!(!trace.sizes()?.is_empty(), "no bio above 16 MiB");
        Ok(())
    });
}

/// Goal: the judge of databases agrees with a copy that is right by construction. Method: freeze the file
/// system while sessions commit, copy the device, recover the database from the copy.
#[test]
fn a_frozen_copy_holds_what_had_been_committed() {
    system_test("harness: PostgreSQL on a frozen copy", &["mkfs.ext4"], |scene| {
        let postgres = Installation::find()?.context("PostgreSQL is not installed")?;
        let settings = ["max_wal_size=8MB", "min_wal_size=2MB"];
        let (device, mount) = ext4(scene)?;
        let data = mount.dir().join("data");
        postgres.create_cluster(&data)?;
        let server = std::sync::Arc::new(postgres.start(
            &data,
            &scene.path("sock"),
            &settings,
            &scene.log("postgres"),
        )?);
        server.sql(SCHEMA)?;
        let (sessions, logs) = (std::sync::Arc::clone(&server), scene.dir().to_owned());
        let committers = Committers::start(2, &mut scene.rng(), move |session| {
            sessions.session(&session_log(&logs, session))
        });
        committers.wait_for(50)?;
        let at = frozen_copy(&device, &mount, &scene.path("copy"))?;
        committers.wait_for(10)?;
        let log = committers.stop()?;
        with_restored(scene, &scene.path("copy"), |dir| {
            let copy = postgres.start(
                &dir.join("data"),
                &scene.path("sock2"),
                &[],
                &scene.log("restored"),
            )?;
            judge(&log, at, &copy.sql(PRESENT)?, &copy.sql(TORN)?)?;
            copy.stop()
        })
    });
}

/// Goal: the same for SQLite in each of its journal modes. Method: the same.
#[test]
fn a_frozen_copy_holds_what_sqlite_had_committed() {
    for journal in [Journal::Wal, Journal::Delete, Journal::Persist] {
        system_test(
            "harness: SQLite on a frozen copy",
            &["mkfs.ext4", "sqlite3"],
            |scene| {
                let (device, mount) = ext4(scene)?;
                let path = mount.dir().join("entries.db");
                let database = Database::new(&path, journal);
                let mut setup = database.session(&scene.log("sqlite"))?;
                setup.ask(&format!("{SCHEMA}\nselect 'made';\n"), "made")?;
                setup.finish(std::time::Duration::from_secs(10))?;
                let (sessions, logs) = (database.clone(), scene.dir().to_owned());
                let committers = Committers::start(1, &mut scene.rng(), move |session| {
                    sessions.session(&session_log(&logs, session))
                });
                committers.wait_for(50)?;
                let at = frozen_copy(&device, &mount, &scene.path("copy"))?;
                committers.wait_for(10)?;
                let log = committers.stop()?;
                with_restored(scene, &scene.path("copy"), |dir| {
                    let copy = Database::new(&dir.join("entries.db"), journal);
                    copy.check_integrity()?;
                    judge(&log, at, &copy.sql(PRESENT)?, &copy.sql(TORN)?)
                })
            },
        );
    }
}

fn ext4(scene: &Scene) -> Result<(LoopDevice, Mount)> {
    let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(256 * MIB))?;
    FileSystem::Ext4.make(device.path())?;
    let mount = Mount::new(device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
    Ok((device, mount))
}

/// Copies a device while its file system is frozen; gives a time within.
fn frozen_copy(device: &LoopDevice, mount: &Mount, to: &Path) -> Result<WallNs> {
    let frozen = mount.freeze()?;
    let at = WallNs::now();
    let mut from = std::fs::File::open(device.path()).context("open the device")?;
    std::io::copy(&mut from, &mut std::fs::File::create(to)?).context("copy the device")?;
    drop(frozen);
    Ok(at)
}

fn with_restored(scene: &Scene, image: &Path, look: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let device = LoopDevice::attach(image)?;
    let mount = Mount::new(device.path(), FileSystem::Ext4, &scene.path("restored"))?;
    look(mount.dir())?;
    mount.unmount()
}

fn judge(log: &CommitLog, at: WallNs, present: &[String], torn: &[String]) -> Result<()> {
    ensure!(torn.is_empty(), "half a transaction: {torn:?}");
    let present = numbers(present)?;
    ensure!(
        !present.is_empty() && present.len() < log.len(),
        "{} of {} prove nothing",
        present.len(),
        log.len()
    );
    log.check(at, &present)
}
