//! Reading beside the writer: what is durable is readable at once, and nobody is disturbed.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::AgentPlan;
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fingerprint::Fingerprint;
use cdp_tests::fio::{Fio, write_randomly};
use cdp_tests::moments::{QuietMoment, WallNs};
use cdp_tests::mount::Mount;
use cdp_tests::process::{cmd, poll_until};
use cdp_tests::restore::{DONE, Restore};
use cdp_tests::workload::Mix;
use cdp_tests::{Scene, system_test};

/// Goal: a store is read in place while an agent writes to it. Method: `ls`, `points`, `image` and
/// `verify`, again and again under load, each a success; the agent drops nothing and goes on.
#[test]
fn every_command_reads_beside_a_busy_agent() {
    system_test("live: reading under load", &["fio"], |scene| {
        let device = device(scene, "disk", 32 * MIB)?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        let start = WallNs::now();
        let writers = Mix::on_device(device.path(), &mut scene.rng(), 2, 10 * MIB)?;
        let restore = Restore::from(plan.store())?;
        let image = scene.path("image");
        for _ in 0..4 {
            writers.wait_for_bytes(2 * MIB)?;
            // The present moment may not be covered yet: it is waited for.
            for when in ["latest", &start.to_string(), &WallNs::now().to_string()] {
                restore.image("v", when, &image)?.success()?;
                ensure!(
                    std::fs::metadata(&image)?.len() == 32 * MIB,
                    "the image has another size than the volume"
                );
            }
            restore.verify()?.success()?;
            restore.points("v")?;
            let listed = restore.command("ls").arg("--json").output()?;
            let listed: serde_json::Value = serde_json::from_str(&listed).context("ls --json")?;
            ensure!(listed.to_string().contains("\"v\""), "{listed}");
        }
        writers.stop()?;
        let quiet = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        quiet.check_at(&restore, "latest", &image)?;
        agent.stop()
    });
}

/// Goal: reading never changes a store. Method: every reading command on a stopped agent's store that is
/// mounted read-only, and a listing of every file with its sum before and after.
#[test]
fn reading_a_store_leaves_every_byte_of_it() {
    system_test("live: reading changes nothing", &["fio"], |scene| {
        let device = device(scene, "disk", 16 * MIB)?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        write(scene, device.path(), "load", 8 * MIB)?;
        agent.wait_and_check()?;
        let quiet = QuietMoment::of_raw("v", device.path())?;
        agent.stop()?;
        let before = listing(plan.store())?;
        let read_only = scene.path("read-only");
        let mount = Mount::with_options(plan.store(), "none", &read_only, "bind")?;
        cmd("mount")
            .args(["-o", "remount,bind,ro"])
            .arg(&read_only)
            .run()?
            .success()?;
        for store in [plan.store(), &read_only] {
            let restore = Restore::from(store)?;
            quiet.check_at(&restore, "latest", &scene.path("image"))?;
            restore.verify()?.success()?;
            restore.points("v")?;
            restore.command("ls").run()?.success()?;
        }
        mount.unmount()?;
        let after = listing(plan.store())?;
        ensure!(before == after, "the store changed:\n{before}\n{after}");
        Ok(())
    });
}

/// Goal: a bookmark names a moment exactly. Method: set some at quiet moments, write on, restore each by
/// its label and by the Seq that `points` tells for it.
#[test]
fn a_bookmark_brings_its_moment_back() {
    system_test("live: bookmarks", &["fio"], |scene| {
        let device = device(scene, "disk", 16 * MIB)?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let agent = plan.protect()?;
        let labels = ["before-upgrade", "payday", "日本語 label"];
        let mut moments = Vec::new();
        for label in labels {
            write(scene, device.path(), "load", 2 * MIB)?;
            moments.push(QuietMoment::of_raw("v", device.path())?);
            agent.bookmark(label)?;
        }
        write(scene, device.path(), "load", 2 * MIB)?;
        let restore = Restore::from(plan.store())?;
        let marks = restore.points("v")?.bookmarks;
        ensure!(
            marks.iter().map(|mark| mark.label.as_str()).eq(labels),
            "not our labels: {marks:?}"
        );
        for (mark, moment) in marks.iter().zip(&moments) {
            moment.check_at(
                &restore,
                &format!("bookmark:{}", mark.label),
                &scene.path("image"),
            )?;
            moment.check_at(&restore, &format!("seq:{}", mark.seq), &scene.path("image"))?;
            moment.check_at(&restore, &mark.at, &scene.path("image"))?;
            ensure!(
                WallNs::parse(&mark.at)? >= moment.to,
                "set after the moment, told as before: {mark:?}"
            );
        }
        agent.stop()
    });
}

/// Goal: `wait --for synced` means durable. Method: kill the agent right after it returns; a copy of the
/// store alone brings the device back.
#[test]
fn what_was_synced_is_in_the_store_whatever_becomes_of_the_agent() {
    system_test("live: synced is durable", &["fio"], |scene| {
        let device = device(scene, "disk", 16 * MIB)?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        write(scene, device.path(), "load", 8 * MIB)?;
        cdp_tests::device::flush_cache(device.path())?;
        agent.wait_synced()?;
        agent.kill()?;
        let copy = scene.path("copy");
        cmd("cp")
            .arg("-r")
            .arg(plan.store())
            .arg(&copy)
            .run()?
            .success()?;
        let quiet = QuietMoment::of_raw("v", device.path())?;
        quiet.check_at(&Restore::from(&copy)?, "latest", &scene.path("image"))
    });
}

/// Goal: `status --json` keeps its contract. Method: every key named in cli.md is there, with the kind
/// of value it had, and numbers that can be known are right.
#[test]
fn status_tells_every_key_of_the_contract() {
    system_test("live: status", &["fio"], |scene| {
        let device = device(scene, "disk", 16 * MIB)?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("pg", device.path());
        let mut agent = plan.protect()?;
        let before = agent.volume("pg")?;
        write(scene, device.path(), "load", 4 * MIB)?;
        agent.wait_synced()?;
        let status = agent.status()?;
        let volume = status.volume("pg")?;
        ensure!(
            volume.kind == "block" && volume.bytes == 16 * MIB && volume.state == "protected",
            "{volume:?}"
        );
        ensure!(Path::new(&volume.path) == device.path(), "{volume:?}");
        ensure!(
            volume.captured_bytes - before.captured_bytes == 4 * MIB,
            "{before:?} {volume:?}"
        );
        ensure!(
            volume.captured_writes - before.captured_writes >= 4 * MIB / 16384,
            "{before:?} {volume:?}"
        );
        ensure!(
            volume.dropped_writes == 0 && volume.gaps == 0 && volume.progress >= 1.0,
            "{volume:?}"
        );
        ensure!(
            status.durable_seq <= status.seq && status.durable_seq > 0,
            "{status:?}"
        );
        WallNs::parse(volume.exact_since.as_deref().context("exact_since")?)?;
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("boot id")?;
        let same_boot = status.boot_id.replace('-', "") == boot_id.trim().replace('-', "");
        ensure!(same_boot && !status.agent.is_empty(), "{status:?}");
        let text = cmd(cdp_tests::agent::binary("cdp-agent")?)
            .arg("status")
            .arg("--store")
            .arg(plan.store());
        let json: serde_json::Value =
            serde_json::from_str(&text.arg("--json").output()?).context("status --json")?;
        ensure!(
            json["targets"].as_array().is_some_and(Vec::is_empty),
            "no server, no targets: {json}"
        );
        agent.stop()
    });
}

/// Goal: volumes come and go while the agent runs. Method: add a second device to the configuration file,
/// SIGHUP, and both are exact; take the first away, and the second stays exact.
#[test]
fn a_volume_is_added_and_removed_without_a_restart() {
    system_test("live: volumes come and go", &["fio"], |scene| {
        let (first, second) = (
            device(scene, "first", 16 * MIB)?,
            device(scene, "second", 16 * MIB)?,
        );
        let config = scene.path("agent.toml");
        let configure = |volumes: &[(&str, &LoopDevice)]| {
            let named = volumes
                .iter()
                .map(|(name, device)| format!("\"{name}={}\"", device.path().display()));
            let text = format!("volume = [{}]\n", named.collect::<Vec<_>>().join(", "));
            std::fs::write(&config, text).context("write the configuration")
        };
        configure(&[("first", &first)])?;
        let plan =
            AgentPlan::new(scene, &scene.path("store"))?.flag("--config", &config.display().to_string());
        let mut agent = plan.protect()?;
        let restore = Restore::from(plan.store())?;
        configure(&[("first", &first), ("second", &second)])?;
        agent.reload()?;
        wait_for_state(&agent, "second", "protected")?;
        let mut moments = Vec::new();
        for device in [&first, &second] {
            write(scene, device.path(), "load", 2 * MIB)?;
        }
        moments.push(QuietMoment::of_raw("first", first.path())?);
        moments.push(QuietMoment::of_raw("second", second.path())?);
        agent.wait_synced()?;
        configure(&[("second", &second)])?;
        agent.reload()?;
        poll_until("the first volume to be let go", Duration::from_secs(30), || {
            let status = agent.status()?;
            Ok(status
                .volume("first")
                .map_or(true, |volume| volume.state == "stopped")
                .then_some(()))
        })?;
        write(scene, first.path(), "unseen", 2 * MIB)?;
        write(scene, second.path(), "seen", 2 * MIB)?;
        moments.push(QuietMoment::of_raw("second", second.path())?);
        agent.wait_synced()?;
        for moment in &moments {
            moment.check(&restore, &mut scene.rng(), &scene.path("image"))?;
        }
        let gone = restore.image("first", &WallNs::now().to_string(), &scene.path("image"))?;
        ensure!(
            gone.code != DONE,
            "an unprotected stretch was restored\n{}",
            gone.transcript()
        );
        agent.stop()
    });
}

/// Goal: an image onto a device is the volume, byte for byte, and the rest of a larger device is left
/// alone. Method: restore onto a loop device that is 4 MiB larger and full of noise.
#[test]
fn an_image_onto_a_larger_device_leaves_the_rest_of_it() {
    system_test("live: image onto a device", &["fio"], |scene| {
        let device = device(scene, "disk", 16 * MIB)?;
        let target = device_full_of_noise(scene, "target", 20 * MIB)?;
        let noise = read(target.path())?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        cdp_tests::device::discard(device.path(), MIB, 3 * MIB)?;
        let content = read(device.path())?;
        agent.wait_and_check()?;
        Restore::from(plan.store())?
            .image_over("v", "latest", target.path())?
            .success()?;
        cdp_tests::device::flush_cache(target.path())?;
        let written = read(target.path())?;
        let (image, rest) = written.split_at(16 << 20);
        ensure!(image == content, "the device does not hold the volume");
        ensure!(
            rest == &noise[16 << 20..],
            "what lies beyond the volume was changed"
        );
        agent.stop()
    });
}

/// Goal: an image is sparse where the volume is zero. Method: a blank device with a little data in it; the
/// image has its size and takes hardly any place.
#[test]
fn an_image_takes_no_place_for_zeroes() {
    system_test("live: sparse images", &["fio"], |scene| {
        use std::os::unix::fs::MetadataExt;
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(512 * MIB))?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        Fio::new("some", device.path(), "write")
            .option("bs", "64k")
            .option("size", "2m")
            .direct(1)
            .run(scene.dir())?;
        agent.wait_and_check()?;
        let image = scene.path("image");
        Restore::from(plan.store())?
            .image("v", "latest", &image)?
            .success()?;
        let held = std::fs::metadata(&image)?;
        ensure!(
            held.len() == 512 * MIB && held.blocks() * 512 < 4 * MIB,
            "{held:?}"
        );
        let expected = Fingerprint::of_device(device.path())?;
        expected.expect_same(&Fingerprint::of_file(&image)?, "a sparse image")?;
        let store_bytes: u64 = cmd("du")
            .arg("-sk")
            .arg(plan.store())
            .output()?
            .split_whitespace()
            .next()
            .unwrap_or("")
            .parse()?;
        ensure!(
            store_bytes < 32 << 10,
            "the first copy of a blank device took {store_bytes} KiB"
        );
        agent.stop()
    });
}

fn device(scene: &Scene, name: &str, bytes: u64) -> Result<LoopDevice> {
    let device = LoopDevice::create(&scene.path(name), LoopOptions::of_bytes(bytes))?;
    write(scene, device.path(), "old", bytes / 2)?;
    Ok(device)
}

fn device_full_of_noise(scene: &Scene, name: &str, bytes: u64) -> Result<LoopDevice> {
    let mut noise = vec![0; bytes as usize];
    scene.rng().fill_noise(&mut noise);
    let device = LoopDevice::create(&scene.path(name), LoopOptions::of_bytes(bytes))?;
    std::fs::write(device.path(), noise).context("fill a device")?;
    cdp_tests::device::flush_cache(device.path())?;
    Ok(device)
}

fn read(device: &Path) -> Result<Vec<u8>> {
    std::fs::read(device).with_context(|| format!("read {}", device.display()))
}

fn write(scene: &Scene, device: &Path, name: &str, bytes: u64) -> Result<()> {
    write_randomly(device, name, bytes, scene.seed(), scene.dir())
}

fn wait_for_state(agent: &cdp_tests::agent::Agent, volume: &str, state: &str) -> Result<()> {
    poll_until(
        &format!("{volume} to be {state}"),
        Duration::from_secs(60),
        || {
            let status = agent.status()?;
            Ok(status
                .volume(volume)
                .is_ok_and(|volume| volume.state == state)
                .then_some(()))
        },
    )
}

/// Every file of a folder with its size, times and sum.
fn listing(folder: &Path) -> Result<String> {
    let listing = "find . -type f -printf '%p %s %T@ ' -exec sha256sum {} ';' | sort";
    cmd("sh").args(["-c", listing]).current_dir(folder).output()
}
