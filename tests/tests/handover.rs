//! P2 and P6 while no agent runs: the probe stays in the kernel, and the next agent goes on where the last one
//! ended. What it can no longer know is a gap.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{Agent, AgentPlan, PINS, PROTECT_TIMEOUT};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::moments::{QuietMoment, WallNs};
use cdp_tests::process::{cmd, poll_until};
use cdp_tests::refused::expect_refused;
use cdp_tests::restore::{NOT_EXACT, Restore};
use cdp_tests::small::{NOTICE_TIMEOUT, device, job, plan, wait_for_gap, write};
use cdp_tests::{Scene, system_test};

/// Goal: a restart of the agent costs nothing. Method: end it, write, note quiet moments, start it again: no gap,
/// and the moments at which no agent ran are exact as well.
fn agent_is_away(name: &str, end: fn(Agent) -> Result<()>) {
    system_test(name, &["fio"], |scene| {
        let device = device(scene)?;
        let plan = plan(scene, &device)?;
        let restore = Restore::from(plan.store())?;
        let mut moments = Vec::new();
        for round in 0..3 {
            let mut agent = plan.protect()?;
            write(scene, &device, &format!("seen-{round}"), 2 * MIB)?;
            moments.push(QuietMoment::of_raw("v", device.path())?);
            agent.wait_and_check()?;
            end(agent)?;
            // One to whom nothing happens.
            end(plan.protect()?)?;
            // Nobody is alive who could cover this time.
            let refused = restore.image("v", &WallNs::now().to_string(), &scene.path("image"))?;
            refused.expect_code(NOT_EXACT)?;
            write(scene, &device, &format!("away-{round}"), 2 * MIB)?;
            moments.push(QuietMoment::of_raw("v", device.path())?);
        }
        let mut agent = plan.protect()?;
        agent.wait_and_check()?;
        expect_no_gap(&restore)?;
        let last = moments.last().context("a moment")?;
        last.check_at(&restore, "latest", &scene.path("image"))?;
        for moment in &moments {
            moment.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        }
        restore.verify()?.success()?;
        agent.stop()
    });
}

#[test]
fn a_stopped_agent_misses_nothing() {
    agent_is_away("handover: agent stopped", Agent::stop);
}

#[test]
fn a_killed_agent_misses_nothing() {
    agent_is_away("handover: agent killed", Agent::kill);
}

fn expect_no_gap(restore: &Restore) -> Result<()> {
    let points = restore.points("v")?;
    ensure!(
        points.gaps.is_empty() && points.exact.len() == 1,
        "a gap where the ring held every write: {points:?}"
    );
    Ok(())
}

/// Goal: a kill at any instant under load loses no write. Method: SIGKILL while fio writes, again and again on one
/// store, each time with a restart under load; then what the device holds is compared, and every quiet moment of
/// the rounds before. `CDP_KILLS` rounds (default 8; 200 is the long run).
#[test]
fn kills_under_load_leave_no_gap() {
    system_test("handover: killed under load", &["fio"], |scene| {
        let rounds = std::env::var("CDP_KILLS").map_or(Ok(8), |rounds| rounds.parse())?;
        let mut rng = scene.rng();
        let device = device(scene)?;
        let plan = plan(scene, &device)?.flag("--ring-bytes", "536870912");
        let restore = Restore::from(plan.store())?;
        let mut moments: Vec<QuietMoment> = Vec::new();
        let mut agent = plan.protect()?;
        for round in 0..rounds {
            // Less than the ring holds, however long the next agent takes to come, and long enough that it comes under load.
            let load = job(&device, &format!("load-{round}"), 400 * MIB)
                .option("rate", "40m")
                .start(scene.dir())?;
            let captured = agent.volume("v")?.captured_bytes;
            let wanted = captured + rng.below(4 * MIB);
            poll_until("the load to be captured", NOTICE_TIMEOUT, || {
                Ok((agent.volume("v")?.captured_bytes > wanted).then_some(()))
            })?;
            agent.kill()?;
            agent = plan.protect()?;
            load.stop()?;
            let quiet = QuietMoment::of_raw("v", device.path())?;
            agent.wait_and_check()?;
            quiet.check_at(&restore, "latest", &scene.path("image"))?;
            expect_no_gap(&restore).with_context(|| format!("round {round}"))?;
            if let Some(earlier) = moments.get(rng.below(moments.len().max(1) as u64) as usize) {
                earlier.check(&restore, &mut rng, &scene.path("image"))?;
            }
            moments.push(quiet);
        }
        restore.verify()?.success()?;
        agent.stop()
    });
}

/// Goal: what the ring cannot hold while no agent runs is marked in the kernel, and repaired by the next agent.
/// Method: kill the agent, write far more than the ring holds; the gap is `ring-overflow`, begins after the moments
/// that the ring held, and ends by itself.
#[test]
fn a_ring_that_fills_up_while_no_agent_runs_is_a_gap() {
    system_test("handover: ring full", &["fio"], |scene| {
        let device = device(scene)?;
        let plan = plan(scene, &device)?.flag("--ring-bytes", "1048576");
        let restore = Restore::from(plan.store())?;
        let mut agent = plan.protect()?;
        write(scene, &device, "before", 512 << 10)?;
        let before = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        agent.kill()?;
        write(scene, &device, "held", 256 << 10)?;
        let held = QuietMoment::of_raw("v", device.path())?;
        write(scene, &device, "flood", 16 * MIB)?;
        let inside = WallNs::now();
        let mut agent = plan.start()?;
        wait_for_gap(&restore, "ring-overflow")?;
        agent.wait_protected(PROTECT_TIMEOUT)?;
        let after = QuietMoment::of_raw("v", device.path())?;
        agent.wait_synced()?;
        ensure!(
            agent.volume("v")?.dropped_writes > 0,
            "no dropped write is counted"
        );
        after.check_at(&restore, "latest", &scene.path("image"))?;
        for moment in [&before, &held, &after] {
            moment.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        }
        expect_refused(scene, &restore, inside, "ring-overflow", &held)?;
        agent.stop()
    });
}

/// What happens between two agents that the second one must not overlook.
struct Break {
    name: &'static str,
    /// Flags of the first agent.
    first: &'static [&'static str],
    unload: bool,
}

/// Goal: where the probe did not go on, the stretch is a gap, and nothing is guessed. Method: end the agent, unload
/// its probe (or start the next one so that it cannot take it up), write, start again.
fn history_breaks(case: &Break) {
    system_test(case.name, &["fio"], |scene| {
        let device = device(scene)?;
        let plan = plan(scene, &device)?;
        let first = case
            .first
            .chunks(2)
            .fold(plan.clone(), |plan, flag| plan.flag(flag[0], flag[1]));
        let restore = Restore::from(plan.store())?;
        let mut agent = first.protect()?;
        write(scene, &device, "seen", 2 * MIB)?;
        let before = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        ensure!(pinned()? > 0, "no probe is pinned");
        agent.stop()?;
        if case.unload {
            plan.unload()?;
        }
        write(scene, &device, "unseen", 2 * MIB)?;
        let inside = WallNs::now();
        let mut agent = plan.protect()?;
        let after = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        after.check_at(&restore, "latest", &scene.path("image"))?;
        before.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        let points = restore.points("v")?;
        ensure!(
            points.gaps.len() == 1 && points.gaps[0].cause == "agent-down",
            "one gap agent-down, not {points:?}"
        );
        expect_refused(scene, &restore, inside, "agent-down", &before)?;
        agent.stop()
    });
}

/// Sets of pinned probes on this host.
fn pinned() -> Result<usize> {
    if !Path::new(PINS).exists() {
        return Ok(0);
    }
    Ok(std::fs::read_dir(PINS)?.count())
}

#[test]
fn an_unloaded_probe_leaves_a_gap() {
    history_breaks(&Break {
        name: "handover: probe unloaded",
        first: &[],
        unload: true,
    });
}

#[test]
fn a_probe_that_cannot_be_taken_up_leaves_a_gap() {
    history_breaks(&Break {
        name: "handover: another ring",
        first: &["--ring-bytes", "4194304"],
        unload: false,
    });
}

/// Goal: what `wait --for protected` said holds if the agent is killed in the next moment. Method: with frames gathered for
/// two seconds, kill it as soon as the wait returns; without another agent the device is in the store.
#[test]
fn what_was_said_to_be_protected_outlives_the_agent() {
    system_test("handover: protected, killed", &["fio"], |scene| {
        let device = device(scene)?;
        let plan = plan(scene, &device)?.flag("--commit-interval-ms", "2000");
        let held = QuietMoment::of_raw("v", device.path())?;
        plan.protect()?.kill()?;
        let restore = Restore::from(plan.store())?;
        held.check_at(&restore, "latest", &scene.path("image"))
    });
}

/// Goal: a running agent keeps its probe, whoever else starts and does not see its store: that of a container, or of
/// another mount namespace. Method: another agent starts where the folder of the store is empty; what is written then is in
/// the history.
#[test]
fn a_running_agent_keeps_its_probe_where_others_do_not_see_its_store() {
    system_test("handover: store out of sight", &["fio"], |scene| {
        let device = device(scene)?;
        let hidden = scene.path("hidden");
        std::fs::create_dir(&hidden)?;
        let plan = AgentPlan::new(scene, &hidden.join("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        let other_device = LoopDevice::create(&scene.path("other-disk"), LoopOptions::of_bytes(8 * MIB))?;
        let other = AgentPlan::new(scene, &scene.path("other"))?.volume("o", other_device.path());
        let other = other.log(scene.log("other-agent")).blind_to(&hidden);
        let other_agent = other.protect()?;
        write(scene, &device, "seen", 2 * MIB)?;
        let after = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        let restore = Restore::from(plan.store())?;
        after.check_at(&restore, "latest", &scene.path("image"))?;
        let gaps = restore.points("v")?.gaps;
        ensure!(gaps.is_empty(), "{gaps:?}");
        other_agent.stop()?;
        agent.stop()
    });
}

/// Goal: another disk under the same name is not taken for the one that was watched. Method: end the agent, put
/// another file under the same loop device.
#[test]
fn another_disk_of_the_same_name_is_compared() {
    system_test("handover: another disk", &["fio", "losetup"], |scene| {
        let device = device(scene)?;
        let plan = plan(scene, &device)?;
        let restore = Restore::from(plan.store())?;
        let mut agent = plan.protect()?;
        let before = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        agent.stop()?;
        exchange(scene, &device)?;
        let inside = WallNs::now();
        let mut agent = plan.protect()?;
        let after = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        ensure!(after.content != before.content, "the disk is the same");
        after.check_at(&restore, "latest", &scene.path("image"))?;
        before.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        expect_refused(scene, &restore, inside, "agent-down", &before)?;
        agent.stop()
    });
}

/// Another file of the same size under the same device number.
fn exchange(scene: &Scene, device: &LoopDevice) -> Result<()> {
    let other = scene.path("other");
    std::fs::copy(device.backing(), &other)?;
    let file = std::fs::File::options().write(true).open(&other)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x5a; 4096], MIB)?;
    let losetup = || cmd("losetup").timeout(NOTICE_TIMEOUT);
    losetup().arg("--detach").arg(device.path()).run()?.success()?;
    poll_until("the device to be free", NOTICE_TIMEOUT, || {
        let free = losetup().arg(device.path()).run()?.success().is_err();
        Ok(free.then_some(()))
    })?;
    losetup().arg(device.path()).arg(&other).run()?.success()?;
    Ok(())
}

/// Goal: a volume that is configured no more ends in a gap, whatever the others do. Method: two volumes, restart
/// with one of them.
#[test]
fn a_volume_that_is_left_out_ends_in_a_gap() {
    system_test("handover: volume left out", &["fio"], |scene| {
        let device = device(scene)?;
        let other = LoopDevice::create(
            &scene.path("other"),
            cdp_tests::device::LoopOptions::of_bytes(8 * MIB),
        )?;
        let one = plan(scene, &device)?;
        let both = one.clone().volume("w", other.path());
        let restore = Restore::from(one.store())?;
        let mut agent = both.protect()?;
        let before = QuietMoment::of_raw("w", other.path())?;
        agent.wait_and_check()?;
        agent.stop()?;
        let mut agent = one.protect()?;
        write(scene, &device, "later", MIB)?;
        let kept = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        let inside = WallNs::now();
        expect_no_gap(&restore)?;
        kept.check_at(&restore, "latest", &scene.path("image"))?;
        before.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        let refused = restore.image("w", &inside.to_string(), &scene.path("image"))?;
        refused.expect_code(NOT_EXACT)?.expect_message(&["agent-down"])?;
        agent.stop()
    });
}

/// Goal: nothing stays in the kernel. Method: unload while the agent runs is refused, and afterwards leaves no pin, also
/// of a set whose making was interrupted.
#[test]
fn unload_leaves_nothing_in_the_kernel() {
    system_test("handover: unload", &["fio"], |scene| {
        let device = device(scene)?;
        let plan = plan(scene, &device)?;
        let before = pinned()?;
        let agent = plan.protect()?;
        ensure!(pinned()? == before + 1, "one more set of pins");
        ensure!(plan.unload().is_err(), "unloaded under a running agent");
        let unfinished = Path::new(PINS).join(format!("{}-new", agent.status()?.agent));
        agent.stop()?;
        std::fs::create_dir(&unfinished).context("make a set that holds nothing yet")?;
        plan.unload()?;
        ensure!(pinned()? == before, "pins are left");
        Ok(())
    });
}
