//! P2, honest: whatever could not be captured is a gap with its cause, and every moment outside of gaps
//! stays exact.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{Agent, AgentPlan, PROTECT_TIMEOUT};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fio::Fio;
use cdp_tests::moments::{QuietMoment, WallNs};
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::process::poll_until;
use cdp_tests::refused::expect_refused;
use cdp_tests::restore::{Gap, Restore};
use cdp_tests::small::{NOTICE_TIMEOUT, device, job, plan, wait_for_gap, write};
use cdp_tests::{Scene, system_test};

/// Goal: a full ring loses nothing silently. Method: stop the agent's process while fio writes far more
/// than the ring holds; the loss must be counted, be a gap, refuse its moments with exit code 3 and name
/// exact ones, and leave earlier moments exact; the gap ends by itself, and a restart keeps all of that.
#[test]
fn a_full_ring_is_a_gap_that_is_counted_named_and_refused() {
    system_test("honest: ring full", &["fio"], |scene| {
        let device = device(scene)?;
        let plan = plan(scene, &device)?.flag("--ring-bytes", "1048576");
        let mut agent = plan.protect()?;
        write(scene, &device, "before", 512 << 10)?;
        let before = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        agent.pause()?;
        write(scene, &device, "flood", 24 * MIB)?;
        let inside = WallNs::now();
        agent.resume()?;
        poll_until("the loss to be counted", NOTICE_TIMEOUT, || {
            agent.check_alive()?;
            Ok((agent.volume("v")?.dropped_writes > 0).then_some(()))
        })?;
        let restore = Restore::from(plan.store())?;
        wait_for_gap(&restore, "ring-overflow")?;
        let told = agent.volume("v")?;
        ensure!(
            told.gaps >= 1 && told.losses.ring_full == told.dropped_writes,
            "status counts no gap, or other losses: {told:?}"
        );
        expect_refused(scene, &restore, inside, "ring-overflow", &before)?;
        before.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        // It reads back what it lost, by itself; from then on history is exact again.
        agent.wait_protected(PROTECT_TIMEOUT)?;
        let repaired = QuietMoment::of_raw("v", device.path())?;
        agent.wait_synced()?;
        repaired.check_at(&restore, "latest", &scene.path("image"))?;
        agent.stop()?;
        let mut agent = plan.protect()?;
        write(scene, &device, "after", 512 << 10)?;
        let after = QuietMoment::of_raw("v", device.path())?;
        agent.wait_synced()?;
        for moment in [&before, &repaired, &after] {
            moment.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        }
        after.check_at(&restore, "latest", &scene.path("image"))?;
        expect_refused(scene, &restore, inside, "ring-overflow", &before)?;
        agent.stop()
    });
}

/// Goal: a ring that overflows while production writes on, small and at random and large and in a row, is one gap, and
/// all around it is exact. Method: the agent's process is stopped for 5 s of it; the moments before, and after each
/// load has ended, are checked, `latest` last.
#[test]
fn a_ring_that_overflows_under_load_is_a_gap_and_all_around_it_is_exact() {
    system_test("honest: ring full under load", &["fio"], |scene| {
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(192 * MIB))?;
        write(scene, &device, "old", 8 * MIB)?;
        let plan = plan(scene, &device)?.flag("--ring-bytes", "1048576");
        let mut agent = plan.protect()?;
        let restore = Restore::from(plan.store())?;
        let load = |name: &str, rw: &str, block: &str, offset: &str, seconds: u32| {
            Fio::new(name, device.path(), rw)
                .option("bs", block)
                .option("offset", offset)
                .option("size", "96m")
                .option("time_based", 1)
                .option("runtime", seconds)
                .direct(8)
                .seed(scene.seed())
        };
        let mut around = Vec::new();
        for part in 0..3u64 {
            write(scene, &device, &format!("before{part}"), 256 << 10)?;
            around.push(QuietMoment::of_raw("v", device.path())?);
        }
        agent.wait_and_check()?;
        let small = load("small", "randwrite", "4k", "0", 7).start(scene.dir())?;
        let large = load("large", "write", "1m", "96m", 7).start(scene.dir())?;
        agent.pause()?;
        // As long as the agent stands still: a third writer tells when it is over.
        load("while_stopped", "randwrite", "4k", "0", 5)
            .option("rate_iops", 1000)
            .run(scene.dir())?;
        agent.resume()?;
        small.finish(NOTICE_TIMEOUT)?;
        large.finish(NOTICE_TIMEOUT)?;
        wait_for_gap(&restore, "ring-overflow")?;
        agent.wait_protected(PROTECT_TIMEOUT)?;
        for part in 0..3u64 {
            around.push(QuietMoment::of_raw("v", device.path())?);
            write(scene, &device, &format!("after{part}"), 256 << 10)?;
        }
        let last = QuietMoment::of_raw("v", device.path())?;
        agent.wait_synced()?;
        for moment in &around {
            moment.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        }
        last.check_at(&restore, "latest", &scene.path("image"))?;
        agent.stop()
    });
}

/// Goal: a write that the device fails is a gap that ends by itself. Method: the loop device's file lies on a
/// tmpfs that has no room, so that new blocks fail with a real error; with room again the state returns to
/// protected and `latest` equals the device.
#[test]
fn a_failed_write_is_a_gap_and_converges() {
    system_test("honest: write failed", &["fio"], |scene| {
        let disk = Mount::with_options(Path::new("none"), "tmpfs", &scene.path("small"), "size=48m")?;
        let device = LoopDevice::create(&disk.dir().join("disk"), LoopOptions::of_bytes(32 * MIB))?;
        let plan = plan(scene, &device)?;
        let mut agent = plan.protect()?;
        let restore = Restore::from(plan.store())?;
        write_at(&device, 0, MIB)?;
        let before = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        let filler = disk.dir().join("filler");
        let full = std::fs::write(&filler, vec![1; 64 << 20]);
        ensure!(full.is_err(), "the tmpfs took more than it holds");
        ensure!(
            write_at(&device, 16 * MIB, MIB).is_err(),
            "a write without room did not fail"
        );
        let inside = WallNs::now();
        wait_for_gap(&restore, "io-error")?;
        std::fs::remove_file(&filler)?;
        agent.wait_protected(PROTECT_TIMEOUT)?;
        write_at(&device, 24 * MIB, MIB)?;
        let after = QuietMoment::of_raw("v", device.path())?;
        agent.wait_synced()?;
        for moment in [&before, &after] {
            moment.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        }
        after.check_at(&restore, "latest", &scene.path("image"))?;
        ensure!(inside < after.from, "the moments are in order");
        agent.stop()?;
        drop(device);
        disk.unmount()
    });
}

/// Writes `bytes` past the page cache, so that the error is the writer's own.
fn write_at(device: &LoopDevice, offset: u64, bytes: u64) -> Result<()> {
    cdp_tests::process::cmd("dd")
        .args(["if=/dev/urandom", "bs=64k", "oflag=direct", "conv=notrunc"])
        .arg(format!("of={}", device.path().display()))
        .arg(format!("count={}", bytes >> 16))
        .arg(format!("seek={}", offset >> 16))
        .run()?
        .success()
        .map(drop)
}

/// Goal: a full store disk costs history, never the host's writes, and is told. Method: the store lies on
/// a small tmpfs; write more than it holds: fio succeeds, the gap is `spool-full`, earlier moments stay
/// exact and readable from the full disk. `status` warns, and tells cause, time and counts.
#[test]
fn a_full_store_disk_is_a_gap_and_harms_nobody() {
    system_test("honest: store disk full", &["fio"], |scene| {
        let device = device(scene)?;
        let disk = Mount::with_options(Path::new("none"), "tmpfs", &scene.path("small"), "size=128m")?;
        let plan = AgentPlan::new(scene, &disk.dir().join("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        write(scene, &device, "before", 4 * MIB)?;
        let before = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        // Not faster than the ring is emptied: it is the store that is to be full.
        job(&device, "flood", 400 * MIB)
            .option("rate", "100m")
            .run(scene.dir())?;
        let restore = Restore::from(plan.store())?;
        let inside = WallNs::now();
        wait_for_gap(&restore, "spool-full")?;
        expect_refused(scene, &restore, inside, "spool-full", &before)?;
        before.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        write(scene, &device, "later", 4 * MIB)?;
        restore.verify()?.success()?;
        expect_full_store_told(&mut agent, &plan, &restore, &before)?;
        // With room again it goes on by itself.
        cdp_tests::process::cmd("mount")
            .args(["-o", "remount,size=512m"])
            .arg(disk.dir())
            .run()?
            .success()?;
        agent.wait_protected(PROTECT_TIMEOUT)?;
        let after = QuietMoment::of_raw("v", device.path())?;
        agent.wait_synced()?;
        after.check_at(&restore, "latest", &scene.path("image"))?;
        before.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        agent.stop()?;
        disk.unmount()
    });
}

/// Goal: whoever else fills the store's file system, to its last block and at once, costs history, and the agent goes on by
/// itself when there is room. Method: a file takes all there is while writes come; then it is removed. On an ext4, and on a
/// tmpfs, where nothing can be asked for ahead.
#[test]
fn a_store_disk_that_others_fill_to_the_last_block_is_a_gap_that_ends_by_itself() {
    let name = "honest: store disk filled by others";
    system_test(name, &["mkfs.ext4", "fio"], |scene| {
        let disk = LoopDevice::create(&scene.path("store-disk"), LoopOptions::of_bytes(256 * MIB))?;
        FileSystem::Ext4.make(disk.path())?;
        let mount = Mount::new(disk.path(), FileSystem::Ext4, &scene.path("small"))?;
        filled_by_others(scene, mount)
    });
    system_test(name, &["fio"], |scene| {
        let none = Path::new("none");
        let mount = Mount::with_options(none, "tmpfs", &scene.path("small"), "size=256m")?;
        filled_by_others(scene, mount)
    });
}

fn filled_by_others(scene: &Scene, mount: Mount) -> Result<()> {
    let device = device(scene)?;
    let plan = AgentPlan::new(scene, &mount.dir().join("store"))?.volume("v", device.path());
    let mut agent = plan.protect()?;
    write(scene, &device, "before", 4 * MIB)?;
    let before = QuietMoment::of_raw("v", device.path())?;
    agent.wait_and_check()?;
    let filler = mount.dir().join("filler");
    let full = std::fs::write(&filler, vec![1; 300 << 20]);
    ensure!(full.is_err(), "the disk took more than it holds");
    write(scene, &device, "flood", 100 * MIB)?;
    poll_until("the lost writes to be counted", NOTICE_TIMEOUT, || {
        agent.check_alive()?;
        Ok((agent.volume("v")?.dropped_writes > 0).then_some(()))
    })?;
    let inside = WallNs::now();
    let told = agent.volume("v")?;
    ensure!(told.gap_cause.as_deref() == Some("spool-full"), "{told:?}");
    std::fs::remove_file(&filler)?;
    agent.wait_protected(PROTECT_TIMEOUT)?;
    let after = QuietMoment::of_raw("v", device.path())?;
    agent.wait_synced()?;
    let restore = Restore::from(plan.store())?;
    restore.verify()?.success()?;
    expect_refused(scene, &restore, inside, "spool-full", &before)?;
    before.check(&restore, &mut scene.rng(), &scene.path("image"))?;
    after.check_at(&restore, "latest", &scene.path("image"))?;
    agent.stop()?;
    mount.unmount()
}

/// Goal: a store whose disk fails a write costs nothing that was durable, nor the host's writers, and nothing is tried
/// again on a file that could not be synced. Method: the store's file system lies on a loop device that lies on a tmpfs
/// without room; the agent must end. With room again, and the file system mounted anew, it goes on.
#[test]
fn a_store_disk_that_fails_ends_the_agent_and_costs_nothing_durable() {
    system_test("honest: store disk fails", &["mkfs.ext4", "fio"], |scene| {
        let device = device(scene)?;
        let memory = Mount::with_options(Path::new("none"), "tmpfs", &scene.path("small"), "size=128m")?;
        let disk = LoopDevice::create(&memory.dir().join("store-disk"), LoopOptions::of_bytes(192 * MIB))?;
        FileSystem::Ext4.make(disk.path())?;
        let mount = Mount::new(disk.path(), FileSystem::Ext4, &scene.path("store-disk"))?;
        let plan = AgentPlan::new(scene, &mount.dir().join("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        write(scene, &device, "before", MIB)?;
        let before = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        let filler = memory.dir().join("filler");
        let full = std::fs::write(&filler, vec![1; 160 << 20]);
        ensure!(full.is_err(), "the tmpfs took more than it holds");
        let code = poll_until("the agent to end", NOTICE_TIMEOUT, || {
            write_at(&device, 16 * MIB, 64 << 10)?;
            agent.try_code()
        })?;
        let said = cdp_tests::process::tail(&scene.log("agent"), 10);
        let is_told = said.contains("log: ") || said.contains("index: ");
        ensure!(code == 1 && is_told, "exit code {code}\n{said}");
        std::fs::remove_file(&filler)?;
        mount.unmount()?;
        let mount = Mount::new(disk.path(), FileSystem::Ext4, &scene.path("store-disk"))?;
        let mut agent = plan.protect()?;
        let after = QuietMoment::of_raw("v", device.path())?;
        agent.wait_synced()?;
        let restore = Restore::from(plan.store())?;
        restore.verify()?.success()?;
        // A write of the log that finds no room is known at once, by a full store; a sync alone may tell of it too.
        // What was not durable may still be in the ring: then there is no gap at all.
        let gaps = restore.points("v")?.gaps;
        let is_told =
            |gap: &Gap| ["agent-down", "spool-full"].contains(&gap.cause.as_str()) && gap.to.is_some();
        ensure!(gaps.iter().all(is_told), "{gaps:?}");
        before.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        after.check_at(&restore, "latest", &scene.path("image"))?;
        agent.stop()?;
        mount.unmount()?;
        drop(disk);
        memory.unmount()
    });
}

/// While the store is full: what `status`, the log and `points` say.
fn expect_full_store_told(
    agent: &mut Agent,
    plan: &AgentPlan,
    restore: &Restore,
    before: &QuietMoment,
) -> Result<()> {
    poll_until("the lost writes to be counted", NOTICE_TIMEOUT, || {
        agent.check_alive()?;
        let told = agent.volume("v")?;
        // On a machine that is slow just then the ring may be full besides.
        let named = told.losses.store_full + told.losses.ring_full;
        Ok((told.losses.store_full > 0 && named == told.dropped_writes).then_some(()))
    })?;
    let told = agent.volume("v")?;
    let since = WallNs::parse(told.gap_since.as_deref().context("since when the gap is open")?)?;
    ensure!(
        told.gap_cause.as_deref() == Some("spool-full") && since >= before.from && since <= WallNs::now(),
        "the open gap in status: {told:?}"
    );
    let store = agent.status()?.store.context("how full the store is")?;
    ensure!(
        store.is_nearly_full && store.used_bytes * 5 >= store.limit_bytes * 4,
        "no warning of a full store: {store:?}"
    );
    let log = std::fs::read_to_string(plan.log_file()).context("read the agent's log")?;
    let warnings = log
        .lines()
        .filter(|line| line.contains("% full: at 100 %"))
        .count();
    ensure!(
        warnings == 1,
        "{warnings} warnings of a store that fills up\n{log}"
    );
    let open: Vec<_> = restore
        .points("v")?
        .gaps
        .into_iter()
        .filter(|gap| gap.to.is_none())
        .collect();
    ensure!(
        matches!(&open[..], [gap] if gap.cause == "spool-full" && gap.from.is_some()),
        "the open gap in points: {open:?}"
    );
    Ok(())
}

/// Goal: `wait --for protected` means it. Method: right after it returns, a write is at once part of
/// exact history.
#[test]
fn what_is_written_right_after_protected_is_exact() {
    system_test("honest: protected means protected", &["fio"], |scene| {
        let device = device(scene)?;
        let plan = plan(scene, &device)?;
        let mut agent = plan.start()?;
        let load = job(&device, "load", 400 * MIB)
            .option("rate", "30m")
            .start(scene.dir())?;
        agent.wait_protected(PROTECT_TIMEOUT)?;
        let protected = WallNs::now();
        load.stop()?;
        let quiet = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        let restore = Restore::from(plan.store())?;
        quiet.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        restore
            .image("v", &protected.to_string(), &scene.path("image"))?
            .success()?;
        let points = restore.points("v")?;
        ensure!(
            points.gaps.is_empty() && points.exact.len() == 1,
            "no gap, one exact stretch: {points:?}"
        );
        agent.stop()
    });
}
