//! What the host does to the engine: reboots, and devices that grow and shrink.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{Agent, AgentPlan, PROTECT_TIMEOUT};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::moments::{QuietMoment, WallNs};
use cdp_tests::process::{cmd, poll_until};
use cdp_tests::restore::{NOT_EXACT, Points, Restore};
use cdp_tests::rng::Rng;
use cdp_tests::{Scene, system_test};

/// What the log may grow by beside the bytes that changed: frames, ticks, records of start and gap.
const OVERHEAD_BYTES: u64 = 256 << 10;

/// Goal: a device that changed over a reboot costs a gap and the bytes that changed. Method: kill the agent (then,
/// in another round, stop it), change some MiB of the device, start it in a mount name space in which the kernel's
/// boot id is another: the gap is `reboot`, `latest` equals the device, earlier quiet moments stay exact, and the
/// log grew by at most 1.2 times of what changed.
#[test]
fn a_reboot_is_a_gap_that_costs_what_changed() {
    system_test("host: reboot", &["unshare"], |scene| {
        let mut rng = scene.rng();
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(64 * MIB))?;
        write(scene, &mut rng, &device, 0, 16 * MIB)?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let restore = Restore::from(plan.store())?;
        let mut agent = plan.protect()?;
        let mut moments = Vec::new();
        let ends: [fn(Agent) -> Result<()>; 2] = [Agent::kill, Agent::stop];
        for (round, end) in ends.into_iter().enumerate() {
            write(scene, &mut rng, &device, 20 * MIB + round as u64 * MIB, MIB)?;
            let before = QuietMoment::of_raw("v", device.path())?;
            agent.wait_and_check()?;
            let log_bytes = agent.status()?.store_bytes;
            end(agent)?;
            // Scattered, and in part over what the log holds as something else.
            let places = [MIB, 7 * MIB + 4096, 40 * MIB, 63 * MIB];
            for place in places {
                write(scene, &mut rng, &device, place, MIB)?;
            }
            let inside = WallNs::now();
            let boot_id = uuid_of(scene, round)?;
            agent = plan.clone().boot_id(&boot_id).protect()?;
            let after = QuietMoment::of_raw("v", device.path())?;
            agent.wait_and_check()?;
            let told = agent.status()?.boot_id;
            ensure!(
                told == std::fs::read_to_string(&boot_id)?,
                "the agent sees boot {told}"
            );
            expect_gaps(&restore.points("v")?, &["reboot"; 2][..=round])?;
            after.check_at(&restore, "latest", &scene.path("image"))?;
            moments.extend([before, after]);
            for moment in &moments {
                moment.check(&restore, &mut rng, &scene.path("image"))?;
            }
            let refused = restore.image("v", &inside.to_string(), &scene.path("image"))?;
            refused.expect_code(NOT_EXACT)?.expect_message(&["reboot"])?;
            let grown = agent.status()?.store_bytes - log_bytes;
            let changed = places.len() as u64 * MIB;
            ensure!(
                (changed..changed * 6 / 5 + OVERHEAD_BYTES).contains(&grown),
                "{changed} bytes changed, the log grew by {grown}"
            );
        }
        agent.stop()
    });
}

/// Goal: history has the size of its moment. Method: let a device grow under the agent, write to what it gained,
/// shrink it again: growing is a gap `resized` that ends by itself, `latest` equals the device each time, and
/// earlier moments keep their size and content.
#[test]
fn a_device_that_grows_and_shrinks_keeps_the_size_of_every_moment() {
    system_test("host: resized", &[], |scene| {
        let mut rng = scene.rng();
        let (small, large, smaller) = (24 * MIB, 40 * MIB + 512, 12 * MIB + 4096);
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(small))?;
        write(scene, &mut rng, &device, 0, 4 * MIB)?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let restore = Restore::from(plan.store())?;
        let mut agent = plan.protect()?;
        write(scene, &mut rng, &device, small - MIB, MIB)?;
        let mut moments = vec![QuietMoment::of_raw("v", device.path())?];
        agent.wait_and_check()?;

        // What it gains is not blank, and it is written to while it is read.
        File::options()
            .write(true)
            .open(device.backing())?
            .write_all_at(&noise(&mut rng, MIB), large - MIB)?;
        device.resize(large)?;
        write(scene, &mut rng, &device, small - MIB / 2, MIB)?;
        wait_for_size(&mut agent, large)?;
        agent.wait_protected(PROTECT_TIMEOUT)?;
        write(scene, &mut rng, &device, small + 4 * MIB, MIB)?;
        moments.push(QuietMoment::of_raw("v", device.path())?);
        agent.wait_and_check()?;
        expect_gaps(&restore.points("v")?, &["resized"])?;
        moments[1].check_at(&restore, "latest", &scene.path("image"))?;

        device.resize(smaller)?;
        wait_for_size(&mut agent, smaller)?;
        agent.wait_protected(PROTECT_TIMEOUT)?;
        write(scene, &mut rng, &device, smaller - MIB, MIB)?;
        moments.push(QuietMoment::of_raw("v", device.path())?);
        agent.wait_and_check()?;
        moments[2].check_at(&restore, "latest", &scene.path("image"))?;

        // While nobody looks, it grows again.
        agent.stop()?;
        device.resize(large)?;
        write(scene, &mut rng, &device, large - 2 * MIB - 512, MIB)?;
        let mut agent = plan.protect()?;
        moments.push(QuietMoment::of_raw("v", device.path())?);
        agent.wait_and_check()?;
        moments[3].check_at(&restore, "latest", &scene.path("image"))?;
        expect_gaps(&restore.points("v")?, &["resized", "resized", "agent-down"])?;
        for moment in &moments {
            moment.check(&restore, &mut rng, &scene.path("image"))?;
        }
        restore.verify()?.success()?;
        agent.stop()
    });
}

/// Goal: a disk that is taken away ends a volume's history, the disk that takes its place is no part of it, and other
/// volumes go on. Method: detach a loop device, attach another file of the same size under its number and write to it:
/// `stopped` until it is back, a gap `detached` that begins before the first byte of the other one, `latest` equal to
/// what is there; the same over a restart of the agent.
#[test]
fn a_disk_that_is_exchanged_is_a_gap_and_never_taken_for_the_old_one() {
    system_test("host: exchanged disk", &["losetup"], |scene| {
        let mut rng = scene.rng();
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(24 * MIB))?;
        let steady = LoopDevice::create(&scene.path("steady"), LoopOptions::of_bytes(16 * MIB))?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?
            .volume("v", device.path())
            .volume("w", steady.path());
        let restore = Restore::from(plan.store())?;
        write(scene, &mut rng, &device, 0, 4 * MIB)?;
        let mut agent = plan.protect()?;
        write(scene, &mut rng, &device, 8 * MIB, MIB)?;
        let mut moments = vec![QuietMoment::of_raw("v", device.path())?];
        agent.wait_and_check()?;

        for (round, is_restarted) in [false, true].into_iter().enumerate() {
            detach(&device)?;
            if is_restarted {
                agent.stop()?;
                agent = plan.start()?;
            }
            wait_for_state(&mut agent, "v", "stopped")?;
            wait_for_state(&mut agent, "w", "protected")?;
            write(scene, &mut rng, &steady, round as u64 * MIB, MIB)?;
            let held = QuietMoment::of_raw("w", steady.path())?;
            let inside = WallNs::now();
            let other = scene.path(&format!("other{round}"));
            std::fs::write(&other, noise(&mut rng, 24 * MIB))?;
            attach(&device, &other)?;
            write(scene, &mut rng, &device, MIB, MIB)?;
            agent.wait_protected(PROTECT_TIMEOUT)?;
            write(scene, &mut rng, &device, 12 * MIB, MIB)?;
            moments.push(QuietMoment::of_raw("v", device.path())?);
            agent.wait_and_check()?;
            for moment in moments.iter().chain([&held]) {
                moment.check(&restore, &mut rng, &scene.path("image"))?;
            }
            moments[round + 1].check_at(&restore, "latest", &scene.path("image"))?;
            let refused = restore.image("v", &inside.to_string(), &scene.path("image"))?;
            refused.expect_code(NOT_EXACT)?.expect_message(&["detached"])?;
            expect_gaps(&restore.points("v")?, &["detached"; 2][..=round])?;
        }
        restore.verify()?.success()?;
        agent.stop()
    });
}

/// Goal: what waited in the ring while a disk was exchanged is no history of that disk, however often agents are killed.
/// Method: exchange one while the agent stands still, fill the ring with writes to the other, kill the agent, and kill the
/// next one while it records them.
#[test]
fn a_disk_that_is_exchanged_while_agents_are_killed_keeps_no_later_moment() {
    system_test("host: exchanged disk, killed agents", &["losetup"], |scene| {
        let mut rng = scene.rng();
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(16 * MIB))?;
        let steady = LoopDevice::create(&scene.path("steady"), LoopOptions::of_bytes(128 * MIB))?;
        let other = scene.path("other");
        std::fs::write(&other, noise(&mut rng, 16 * MIB))?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?
            .volume("v", device.path())
            .volume("w", steady.path());
        let restore = Restore::from(plan.store())?;
        let mut agent = plan.protect()?;
        write(scene, &mut rng, &device, 0, MIB)?;
        let moment = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        agent.pause()?;
        detach(&device)?;
        attach(&device, &other)?;
        let exchanged = WallNs::now();
        write(scene, &mut rng, &steady, 0, 96 * MIB)?;
        agent.kill()?;
        let found_bytes = log_bytes(plan.store())?;
        let mut agent = plan.start()?;
        poll_until("the log to grow", PROTECT_TIMEOUT, || {
            agent.check_alive()?;
            Ok((log_bytes(plan.store())? > found_bytes + MIB).then_some(()))
        })?;
        agent.kill()?;
        let mut agent = plan.protect()?;
        let held = QuietMoment::of_raw("w", steady.path())?;
        agent.wait_and_check()?;
        let refused = restore.image("v", &exchanged.to_string(), &scene.path("image"))?;
        refused.expect_code(NOT_EXACT)?;
        moment.check(&restore, &mut rng, &scene.path("image"))?;
        held.check_at(&restore, "latest", &scene.path("image"))?;
        restore.verify()?.success()?;
        agent.stop()
    });
}

fn log_bytes(store: &Path) -> Result<u64> {
    let mut bytes = 0;
    for file in std::fs::read_dir(store.join("log")).context("read the folder of the log")? {
        bytes += file?.metadata()?.len();
    }
    Ok(bytes)
}

/// Goal: every end of an exact stretch that is told can be asked for. Method: take a volume out, and ask for the time at
/// which its history ends.
#[test]
fn the_last_moment_of_a_volume_that_is_taken_out_can_be_restored() {
    system_test("host: last moment", &[], |scene| {
        let mut rng = scene.rng();
        let create = |name| LoopDevice::create(&scene.path(name), LoopOptions::of_bytes(16 * MIB));
        let (device, other) = (create("disk")?, create("other")?);
        let config = scene.path("config");
        let volumes = |both: bool| {
            let w = format!(", \"w={}\"", other.path().display());
            let more = if both { &w } else { "" };
            let text = format!("volume = [\"v={}\"{more}]\n", device.path().display());
            std::fs::write(&config, text)
        };
        volumes(true)?;
        let plan =
            AgentPlan::new(scene, &scene.path("store"))?.flag("--config", &config.display().to_string());
        let restore = Restore::from(plan.store())?;
        let mut agent = plan.protect()?;
        write(scene, &mut rng, &other, MIB, MIB)?;
        let last = QuietMoment::of_raw("w", other.path())?;
        agent.wait_synced()?;
        volumes(false)?;
        agent.reload()?;
        poll_until("the end of w's history", PROTECT_TIMEOUT, || {
            Ok((!restore.points("w")?.gaps.is_empty()).then_some(()))
        })?;
        let points = restore.points("w")?;
        let end = points.exact.last().context("an exact stretch")?.to.to_string();
        last.check_at(&restore, &end, &scene.path("image"))?;
        agent.stop()
    });
}

fn detach(device: &LoopDevice) -> Result<()> {
    cmd("losetup").arg("-d").arg(device.path()).run()?.success()?;
    Ok(())
}

fn attach(device: &LoopDevice, backing: &Path) -> Result<()> {
    cmd("losetup").arg(device.path()).arg(backing).run()?.success()?;
    Ok(())
}

fn wait_for_state(agent: &mut Agent, volume: &str, state: &str) -> Result<()> {
    poll_until(&format!("{volume} to be {state}"), PROTECT_TIMEOUT, || {
        agent.check_alive()?;
        let told = agent.volume(volume).ok();
        Ok(told.filter(|told| told.state == state).map(drop))
    })
}

fn wait_for_size(agent: &mut Agent, bytes: u64) -> Result<()> {
    poll_until("the new size in status", PROTECT_TIMEOUT, || {
        agent.check_alive()?;
        Ok((agent.volume("v")?.bytes == bytes).then_some(()))
    })
}

/// Random bytes past the page cache, and onto the disk before it returns.
fn write(scene: &Scene, rng: &mut Rng, device: &LoopDevice, offset: u64, bytes: u64) -> Result<()> {
    let source = scene.path("random");
    std::fs::write(&source, noise(rng, bytes)).context("write random bytes")?;
    let written = cdp_tests::process::cmd("dd")
        .args(["bs=256k", "oflag=direct,seek_bytes", "conv=notrunc,fsync"])
        .arg(format!("if={}", source.display()))
        .arg(format!("of={}", device.path().display()))
        .arg(format!("seek={offset}"))
        .run()?
        .success();
    std::fs::remove_file(&source).context("remove random bytes")?;
    written.map(drop)
}

fn noise(rng: &mut Rng, bytes: u64) -> Vec<u8> {
    let mut noise = vec![0; bytes as usize];
    rng.fill_noise(&mut noise);
    noise
}

/// A file with a boot id of its own for each round.
fn uuid_of(scene: &Scene, round: usize) -> Result<PathBuf> {
    let path = scene.path(&format!("boot-{round}"));
    let number = scene.seed() + round as u64;
    std::fs::write(
        &path,
        format!("6f9c1e52-7d7a-4b0e-9c3d-{:012x}", number & 0xffff_ffff_ffff),
    )
    .with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

fn expect_gaps(points: &Points, causes: &[&str]) -> Result<()> {
    let found: Vec<&str> = points.gaps.iter().map(|gap| gap.cause.as_str()).collect();
    ensure!(
        found == causes && points.exact.len() == causes.len() + 1,
        "gaps {causes:?} and exact stretches around them, not {points:?}"
    );
    Ok(())
}
