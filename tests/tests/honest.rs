//! P2, honest: whatever could not be captured is a gap with its cause, and every moment outside of gaps
//! stays exact.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{Agent, AgentPlan, PROTECT_TIMEOUT};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fio::Fio;
use cdp_tests::moments::{QuietMoment, WallNs};
use cdp_tests::mount::Mount;
use cdp_tests::process::{Outcome, poll_until};
use cdp_tests::restore::{NOT_EXACT, Restore};
use cdp_tests::{Scene, system_test};

/// How long a fault may take to show in status and history.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(60);

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

/// Goal: nothing happens unseen while no agent runs. Method: stop it cleanly, write, start it again: the
/// stretch is a gap, the moments around it are exact, `latest` equals the device.
#[test]
fn a_stopped_agent_leaves_a_gap_and_comes_back_to_protected() {
    agent_is_down("honest: agent stopped", Agent::stop);
}

/// Goal: a crash of the agent is as honest as a stop. Method: the same by SIGKILL.
#[test]
fn a_killed_agent_leaves_a_gap_and_comes_back_to_protected() {
    agent_is_down("honest: agent killed", Agent::kill);
}

fn agent_is_down(name: &str, end: fn(Agent) -> Result<()>) {
    system_test(name, &["fio"], |scene| {
        let device = device(scene)?;
        let plan = plan(scene, &device)?;
        let restore = Restore::from(plan.store())?;
        let mut moments = Vec::new();
        let mut unseen = Vec::new();
        for round in 0..2 {
            let mut agent = plan.protect()?;
            write(scene, &device, &format!("seen-{round}"), 2 * MIB)?;
            moments.push(QuietMoment::of_raw("v", device.path())?);
            agent.wait_and_check()?;
            end(agent)?;
            write(scene, &device, &format!("unseen-{round}"), 2 * MIB)?;
            unseen.push((WallNs::now(), moments[round].clone()));
            // Nobody is alive who could still cover this time.
            let refused = restore.image("v", &WallNs::now().to_string(), &scene.path("image"))?;
            refused.expect_code(NOT_EXACT)?;
        }
        let mut agent = plan.protect()?;
        moments.push(QuietMoment::of_raw("v", device.path())?);
        agent.wait_and_check()?;
        for moment in &moments {
            moment.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        }
        moments[2].check_at(&restore, "latest", &scene.path("image"))?;
        let points = restore.points("v")?;
        let down = points.gaps.iter().filter(|gap| gap.cause == "agent-down").count();
        ensure!(
            down == 2 && points.exact.len() == 3,
            "two gaps and three exact stretches, not {points:?}"
        );
        for (at, before) in &unseen {
            expect_refused(scene, &restore, *at, "agent-down", before)?;
        }
        agent.stop()
    });
}

/// Goal: a kill in the midst of writes loses nothing that was durable and invents nothing. Method: SIGKILL
/// under load, again and again on one store; each time the moments noted before stay exact, and after the
/// restart `latest` equals the device.
#[test]
fn kills_under_load_never_cost_an_exact_moment() {
    system_test("honest: killed under load", &["fio"], |scene| {
        let device = device(scene)?;
        let plan = plan(scene, &device)?;
        let restore = Restore::from(plan.store())?;
        let mut moments: Vec<QuietMoment> = Vec::new();
        for round in 0..3 {
            let mut agent = plan.protect()?;
            let quiet = QuietMoment::of_raw("v", device.path())?;
            agent.wait_and_check()?;
            quiet.check_at(&restore, "latest", &scene.path("image"))?;
            moments.push(quiet);
            let load = job(&device, &format!("load-{round}"), 400 * MIB)
                .option("rate", "60m")
                .start(scene.dir())?;
            let captured = agent.volume("v")?.captured_bytes;
            poll_until("the load to be captured", NOTICE_TIMEOUT, || {
                Ok((agent.volume("v")?.captured_bytes > captured + 4 * MIB).then_some(()))
            })?;
            agent.kill()?;
            load.stop()?;
            for moment in &moments {
                moment.check(&restore, &mut scene.rng(), &scene.path("image"))?;
            }
            restore.verify()?.success()?;
        }
        Ok(())
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
        write(scene, &device, "flood", 400 * MIB)?;
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
        Ok((told.losses.store_full > 0 && told.losses.store_full == told.dropped_writes).then_some(()))
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

fn device(scene: &Scene) -> Result<LoopDevice> {
    let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(32 * MIB))?;
    write(scene, &device, "old", 8 * MIB)?;
    Ok(device)
}

fn plan(scene: &Scene, device: &LoopDevice) -> Result<AgentPlan> {
    Ok(AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path()))
}

fn job(device: &LoopDevice, name: &str, bytes: u64) -> Fio {
    let fio = Fio::new(name, device.path(), "randwrite")
        .option("bs", "16k")
        .option("io_size", bytes);
    fio.option("size", "100%")
        .direct(4)
        .seed(bytes + name.len() as u64)
}

fn write(scene: &Scene, device: &LoopDevice, name: &str, bytes: u64) -> Result<()> {
    job(device, name, bytes).run(scene.dir()).map(drop)
}

fn wait_for_gap(restore: &Restore, cause: &str) -> Result<()> {
    poll_until(&format!("a gap {cause} in the history"), NOTICE_TIMEOUT, || {
        Ok(restore
            .points("v")?
            .gaps
            .iter()
            .any(|gap| gap.cause == cause)
            .then_some(()))
    })
}

/// A moment inside a gap: exit code 3, nothing written, the cause named, and exact moments named that can
/// indeed be restored; the nearest one before is not older than `before`.
fn expect_refused(
    scene: &Scene,
    restore: &Restore,
    at: WallNs,
    cause: &str,
    before: &QuietMoment,
) -> Result<()> {
    let image = scene.path("refused");
    let refused = restore
        .image("v", &at.to_string(), &image)?
        .expect_code(NOT_EXACT)?
        .expect_message(&[cause])?;
    ensure!(
        !image.exists(),
        "a refused image was written\n{}",
        refused.transcript()
    );
    let named = times_named(&refused);
    let earlier = named.iter().filter(|time| time.0 < at).max();
    let (nearest, text) =
        earlier.with_context(|| format!("no exact moment before is named\n{}", refused.transcript()))?;
    ensure!(
        *nearest >= before.from,
        "{text} is older than an exact moment at {}",
        before.from
    );
    restore
        .image("v", text, &image)?
        .success()
        .context("the moment that the message recommends")?;
    std::fs::remove_file(&image).context("remove the image")
}

/// Every RFC 3339 time in a message.
fn times_named(outcome: &Outcome) -> Vec<(WallNs, String)> {
    let words = outcome
        .stderr
        .split(|c: char| c.is_whitespace() || "(),;\"'`".contains(c));
    let words = words.map(|word| word.trim_end_matches(['.', ':']));
    words
        .filter_map(|word| Some((WallNs::parse(word).ok()?, word.to_owned())))
        .collect()
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
