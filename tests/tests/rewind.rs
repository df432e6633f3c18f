//! `rewind`: a protected device goes back to a moment, and forward again, while its agent runs.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{Agent, AgentPlan};
use cdp_tests::device::{self, LoopDevice, LoopOptions, MIB};
use cdp_tests::fingerprint::Fingerprint;
use cdp_tests::moments::QuietMoment;
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::process::{Cmd, cmd, poll_until};
use cdp_tests::restore::Restore;
use cdp_tests::rng::Rng;
use cdp_tests::workload::Mix;
use cdp_tests::{Scene, system_test};
use rustix::process::Signal;

const DEVICE_BYTES: u64 = 96 * MIB;
const WRITER_BYTES_PER_SECOND: u64 = 8 * MIB;
const END_TIMEOUT: Duration = Duration::from_secs(120);

/// Goal: whatever was done to a device, it goes back to any moment, and forward again. Method: rounds of random damage
/// (files overwritten, raw noise, zeroes, another file system over it), each undone by the history alone; SHA-256 of the
/// device against the one taken at the moment, and of the state before against its bookmark's.
#[test]
fn rounds_of_random_damage_are_undone() {
    system_test(
        "rewind: rounds of damage",
        &["mkfs.ext4", "blkdiscard"],
        |scene| {
            let mut rng = scene.rng();
            let (device, plan, mut agent) = stage(scene)?;
            let restore = Restore::from(plan.store())?;
            let moment = fill(scene, &device, &mut rng)?;
            for round in 0..if scene.is_long_run() { 20 } else { 5 } {
                damage(scene, device.path(), &mut rng)?;
                device::flush_cache(device.path())?;
                let damaged = Fingerprint::of_device(device.path())?;
                let ran = rewind(&restore, &moment.to.to_string(), device.path(), &[])
                    .run()?
                    .success()?;
                let told: serde_json::Value = serde_json::from_str(&ran.stdout)?;
                ensure!(
                    told["proof"]["kind"] == "written",
                    "round {round}: the history was not used: {told}"
                );
                expect_held(&moment, device.path(), &format!("round {round}"))?;
                agent.wait_synced()?;
                moment.check_at(&restore, "latest", &scene.path("image"))?;
                let undo = told["undo"].as_str().context("no bookmark of the state before")?;
                if rng.one_in(2) {
                    let way = *rng.pick(&[&["--compare-all"][..], &[]]);
                    rewind(&restore, undo, device.path(), way).run()?.success()?;
                    let held = Fingerprint::of_device(device.path())?;
                    damaged.expect_same(&held, &format!("round {round}: undone"))?;
                }
            }
            agent.expect_nothing_dropped()?;
            agent.stop()
        },
    );
}

/// Goal: no undo is promised that cannot be had. Method: rewind while a gap is open: it says so, names none, and the device
/// holds the moment all the same.
#[test]
fn a_rewind_within_a_gap_promises_no_undo() {
    system_test("rewind: within a gap", &["mkfs.ext4"], |scene| {
        let mut rng = scene.rng();
        let (device, plan, agent) = stage(scene)?;
        let restore = Restore::from(plan.store())?;
        let moment = fill(scene, &device, &mut rng)?;
        agent.stop()?;
        plan.unload()?;
        overwrite(device.path(), &mut rng, 0, 4 * MIB)?;
        let slow = plan.clone().flag("--rate-readback", "128 KiB/s");
        let agent = slow.start()?;
        poll_until("the gap to be open", END_TIMEOUT, || {
            let told = agent.status().ok();
            let is_open = told.is_some_and(|told| told.volumes.iter().any(|v| v.state == "resyncing"));
            Ok(is_open.then_some(()))
        })?;
        let ran = rewind(&restore, &moment.to.to_string(), device.path(), &[])
            .run()?
            .success()?;
        let told: serde_json::Value = serde_json::from_str(&ran.stdout)?;
        ensure!(told["undo"].is_null(), "{told}");
        ran.expect_message(&["this cannot be undone", "agent-down"])?;
        expect_held(&moment, device.path(), "within a gap")?;
        agent.stop()
    });
}

/// Goal: a rewind that was killed is finished by the same command. Method: SIGKILL once a random number of bytes has
/// been captured from it, several times, then to its end.
#[test]
fn a_rewind_killed_at_any_point_goes_on() {
    system_test("rewind: killed", &["mkfs.ext4", "blkdiscard"], |scene| {
        let mut rng = scene.rng();
        let (device, plan, mut agent) = stage(scene)?;
        let restore = Restore::from(plan.store())?;
        let moment = fill(scene, &device, &mut rng)?;
        let mut killed = 0;
        for round in 0..4 {
            // Much to write back, so that there is a middle.
            overwrite(device.path(), &mut rng, 0, DEVICE_BYTES / 2)?;
            agent.wait_synced()?;
            let before = agent.volume("v")?.captured_bytes;
            let until = rng.below(DEVICE_BYTES / 2);
            let log = scene.log(&format!("rewind-{round}"));
            let mut running = rewind(&restore, &moment.to.to_string(), device.path(), &[]).spawn(&log)?;
            let code = loop {
                if let Some(code) = running.try_code()? {
                    break code;
                }
                if agent.volume("v")?.captured_bytes - before >= until {
                    break running.stop(Signal::KILL, END_TIMEOUT)?;
                }
            };
            killed += usize::from(code != 0);
            if rng.one_in(2) {
                rewind(&restore, &moment.to.to_string(), device.path(), &[])
                    .run()?
                    .success()?;
                expect_held(&moment, device.path(), &format!("round {round}, killed: {code}"))?;
            }
        }
        rewind(&restore, &moment.to.to_string(), device.path(), &[])
            .run()?
            .success()?;
        expect_held(&moment, device.path(), "the end")?;
        eprintln!("rewind: {killed} of 4 were killed on their way");
        agent.stop()
    });
}

/// Goal: the history is not believed where the device disagrees with it. Method: change the backing file behind the
/// agent's back, everywhere; the sample must find it and everything be compared.
#[test]
fn what_the_history_does_not_know_is_found() {
    system_test("rewind: behind the agent's back", &["mkfs.ext4"], |scene| {
        let mut rng = scene.rng();
        let (device, plan, agent) = stage(scene)?;
        let restore = Restore::from(plan.store())?;
        let moment = fill(scene, &device, &mut rng)?;
        let mut noise = vec![0; DEVICE_BYTES as usize / 2];
        rng.fill_noise(&mut noise);
        let file = std::fs::File::options().write(true).open(device.backing())?;
        std::os::unix::fs::FileExt::write_all_at(&file, &noise, DEVICE_BYTES / 4)?;
        file.sync_all()?;
        device::flush_cache(device.path())?;
        let ran = rewind(&restore, &moment.to.to_string(), device.path(), &[])
            .run()?
            .success()?;
        ensure!(
            ran.stderr.contains("history does not know"),
            "{}",
            ran.transcript()
        );
        let told: serde_json::Value = serde_json::from_str(&ran.stdout)?;
        ensure!(told["proof"]["kind"] == "whole", "{told}");
        expect_held(&moment, device.path(), "after it")?;
        agent.stop()
    });
}

fn stage(scene: &Scene) -> Result<(LoopDevice, AgentPlan, Agent)> {
    let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(DEVICE_BYTES))?;
    let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
    let agent = plan.protect()?;
    Ok((device, plan, agent))
}

/// A file system with something in it, and the moment at which it was let go.
fn fill(scene: &Scene, device: &LoopDevice, rng: &mut Rng) -> Result<QuietMoment> {
    FileSystem::Ext4.make(device.path())?;
    write_files(scene, device.path(), rng)?;
    QuietMoment::of_raw("v", device.path())
}

fn write_files(scene: &Scene, device: &Path, rng: &mut Rng) -> Result<()> {
    let mount = Mount::new(device, FileSystem::Ext4, &scene.path("mnt"))?;
    let writers = Mix::on_files(mount.dir(), rng, 2, WRITER_BYTES_PER_SECOND)?;
    writers.wait_for_bytes(rng.between(2 * MIB, 8 * MIB))?;
    writers.stop()?;
    mount.unmount()
}

fn damage(scene: &Scene, device: &Path, rng: &mut Rng) -> Result<()> {
    for _ in 0..rng.between(1, 3) {
        match rng.below(4) {
            0 => {
                FileSystem::Ext4.make(device)?;
                write_files(scene, device, rng)?;
            }
            1 => {
                let start = rng.below(DEVICE_BYTES / 4096) * 4096;
                let bytes = rng.between(1, 2048) * 4096;
                overwrite(device, rng, start, bytes.min(DEVICE_BYTES - start))?;
            }
            2 => {
                let start = rng.below(DEVICE_BYTES / 2 / 4096) * 4096;
                device::discard(device, start, rng.between(1, 4096) * 4096)?;
            }
            _ => {
                cmd("mkfs.ext4")
                    .args(["-q", "-F", "-b", "1024"])
                    .arg(device)
                    .run()?
                    .success()?;
            }
        }
    }
    Ok(())
}

fn overwrite(device: &Path, rng: &mut Rng, start: u64, bytes: u64) -> Result<()> {
    let mut noise = vec![0; bytes as usize];
    rng.fill_noise(&mut noise);
    let file = std::fs::File::options().write(true).open(device)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &noise, start)?;
    Ok(file.sync_all()?)
}

fn rewind(restore: &Restore, when: &str, device: &Path, more: &[&str]) -> Cmd {
    restore
        .command("rewind")
        .args(["v", "--at", when, "--yes", "--json", "--to"])
        .arg(device)
        .args(more)
}

fn expect_held(moment: &QuietMoment, device: &Path, what: &str) -> Result<()> {
    device::flush_cache(device)?;
    moment.content.expect_same(&Fingerprint::of_device(device)?, what)
}
