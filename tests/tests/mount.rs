//! `mount` and `umount`: a moment as a folder, beside the running agent and the mounted original.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{Agent, AgentPlan};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fingerprint::Fingerprint;
use cdp_tests::moments::{QuietMoment, WallNs};
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::process::cmd;
use cdp_tests::restore::Restore;
use cdp_tests::rng::Rng;
use cdp_tests::view::{View, files_in};
use cdp_tests::workload::Mix;
use cdp_tests::{Scene, system_test};

const WRITER_BYTES_PER_SECOND: u64 = 8 * MIB;

/// Goal: ext4 of a moment, mounted while the original goes on, has the files of that moment. Method: hash the files at
/// quiet moments, write on, mount each moment and compare; crash-consistent moments in between mount as well.
#[test]
fn ext4_mounts_with_the_files_of_its_moment() {
    files_are_those_of_the_moment("mount: ext4", FileSystem::Ext4);
}

/// Goal: the same on xfs, whose UUID is mounted already. Method: the same.
#[test]
fn xfs_mounts_with_the_files_of_its_moment() {
    files_are_those_of_the_moment("mount: xfs", FileSystem::Xfs);
}

/// Goal: the same on btrfs, whose id is mounted already. Method: the same.
#[test]
fn btrfs_mounts_with_the_files_of_its_moment() {
    files_are_those_of_the_moment("mount: btrfs", FileSystem::Btrfs);
}

fn files_are_those_of_the_moment(name: &str, file_system: FileSystem) {
    system_test(name, file_system.programs(), |scene| {
        let mut rng = scene.rng();
        let (device, plan, mut agent) = stage(scene, file_system.bytes_min())?;
        file_system.make(device.path())?;
        let original = Mount::new(device.path(), file_system, &scene.path("mnt"))?;
        let mut quiet = Vec::new();
        let mut crashed = Vec::new();
        for _ in 0..3 {
            let writers = Mix::on_files(original.dir(), &mut rng, 2, WRITER_BYTES_PER_SECOND)?;
            writers.wait_for_bytes(rng.between(MIB, 4 * MIB))?;
            crashed.push(WallNs::now());
            writers.stop()?;
            let frozen = original.freeze()?;
            quiet.push((WallNs::now(), files_in(original.dir())?));
            drop(frozen);
        }
        agent.wait_and_check()?;
        let view = View::new(scene, Restore::from(plan.store())?)?;
        for (at, files) in &quiet {
            view.mount(&at.to_string(), &[])?.success()?;
            ensure!(&files_in(view.dir())? == files, "the files at {at} are others");
            let refused = fs::write(view.dir().join("new"), "x").expect_err("it is read-only");
            ensure!(refused.raw_os_error() == Some(30), "{refused}");
            view.unmount()?;
        }
        for at in &crashed {
            // The journal is replayed, with users kept out and let in.
            view.mount(&at.to_string(), &[])?.success()?;
            let files = files_in(view.dir())?;
            view.unmount()?;
            view.mount(&at.to_string(), &["--rw"])?.success()?;
            ensure!(
                files_in(view.dir())? == files,
                "the files at {at} are others with --rw"
            );
            fs::write(view.dir().join("new"), vec![1; 1 << 20])?;
            cmd("sync")
                .arg("--file-system")
                .arg(view.dir())
                .run()?
                .success()?;
            view.unmount()?;
            view.mount(&at.to_string(), &[])?.success()?;
            ensure!(files_in(view.dir())? == files, "the history has changed at {at}");
            view.unmount()?;
        }
        original.unmount()?;
        QuietMoment::of_raw("v", device.path())?.check(view.restore(), &mut rng, &scene.path("image"))?;
        agent.stop()
    });
}

/// Goal: `--raw` shows the very bytes, and with `--rw` keeps what is written to it until the end. Method: SHA-256 of the
/// file against that of the device at the moment.
#[test]
fn the_raw_image_is_the_moment() {
    system_test("mount: raw", &["mkfs.ext4"], |scene| {
        let (device, plan, mut agent) = stage(scene, 48 * MIB)?;
        FileSystem::Ext4.make(device.path())?;
        let moment = QuietMoment::of_raw("v", device.path())?;
        noise(device.path(), &mut scene.rng(), 0, 8 * MIB)?;
        agent.wait_and_check()?;
        let view = View::new(scene, Restore::from(plan.store())?)?;
        let image = view.dir().join("v.img");
        let at = moment.to.to_string();
        for round in 0..2 {
            view.mount(&at, &["--raw"])?.success()?;
            moment
                .content
                .expect_same(&Fingerprint::of_file(&image)?, &format!("round {round}"))?;
            ensure!(
                fs::File::options().write(true).open(&image).is_err(),
                "it can be written"
            );
            view.unmount()?;
            view.mount(&at, &["--raw", "--rw"])?.success()?;
            noise(&image, &mut scene.rng(), 12345, MIB)?;
            let written = Fingerprint::of_file(&image)?;
            ensure!(
                moment.content.expect_same(&written, "").is_err(),
                "nothing was written"
            );
            view.unmount()?;
        }
        agent.stop()
    });
}

/// Goal: each partition has a folder, and what cannot be mounted is said. Method: a GPT with ext4, nothing, and an LVM
/// label.
#[test]
fn partitions_have_a_folder_each() {
    system_test(
        "mount: partitions",
        &["mkfs.ext4", "mkfs.xfs", "sfdisk"],
        |scene| {
            let options = LoopOptions::of_bytes(96 * MIB).partitioned();
            let device = LoopDevice::create(&scene.path("disk"), options)?;
            let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
            let mut agent = plan.protect()?;
            let parts = device.partition(&[32, 16, 0])?;
            let mut expected = BTreeMap::new();
            for (number, part) in [(1, &parts[0]), (3, &parts[2])] {
                FileSystem::Ext4.make(part)?;
                let mount = Mount::new(part, FileSystem::Ext4, &scene.path("mnt"))?;
                fs::write(mount.dir().join("file"), format!("of partition {number}"))?;
                mount.unmount()?;
                expected.insert(number, format!("of partition {number}"));
            }
            let label = [&b"LABELONE"[..], &[0; 16], b"LVM2 001"].concat();
            let file = fs::File::options().write(true).open(&parts[1])?;
            std::os::unix::fs::FileExt::write_all_at(&file, &label, 512)?;
            file.sync_all()?;
            drop(file);
            cdp_tests::device::flush_cache(device.path())?;
            agent.wait_and_check()?;
            let view = View::new(scene, Restore::from(plan.store())?)?;
            let ran = view.mount("latest", &[])?.success()?;
            ensure!(
                ran.stderr.contains("an LVM physical volume in partition 2"),
                "{}",
                ran.transcript()
            );
            for (number, text) in &expected {
                ensure!(&fs::read_to_string(view.dir().join(format!("p{number}/file")))? == text);
            }
            ensure!(fs::read_dir(view.dir())?.count() == 2);
            view.unmount()?;
            agent.stop()
        },
    );
}

/// Goal: after a crash of the serving process `umount` leaves nothing. Method: SIGKILL it under a mount that is being
/// written to, then `umount`; and again with a mount that is in use, which is refused until it is not.
#[test]
fn umount_cleans_up_after_a_killed_server_and_waits_for_users() {
    system_test("mount: killed", &["mkfs.ext4"], |scene| {
        let (device, plan, mut agent) = stage(scene, 48 * MIB)?;
        FileSystem::Ext4.make(device.path())?;
        cdp_tests::device::flush_cache(device.path())?;
        agent.wait_and_check()?;
        let view = View::new(scene, Restore::from(plan.store())?)?;
        for more in [&["--rw"][..], &["--raw", "--rw"], &[]] {
            view.mount("latest", more)?.success()?;
            if more.contains(&"--rw") {
                let name = if more.contains(&"--raw") { "v.img" } else { "file" };
                let file = fs::File::options()
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(view.dir().join(name))?;
                std::os::unix::fs::FileExt::write_all_at(&file, &[7; 65536], 4096)?;
            }
            let server = view.server()?;
            let server = rustix::process::Pid::from_raw(server).context("a process id")?;
            rustix::process::kill_process(server, rustix::process::Signal::KILL)?;
            view.unmount()?;
        }
        view.mount("latest", &["--rw"])?.success()?;
        let user = fs::File::create(view.dir().join("open"))?;
        let ran = view.try_unmount()?.expect_code(1)?;
        ensure!(ran.stderr.contains("is in use"), "{}", ran.transcript());
        drop(user);
        view.unmount()?;
        agent.stop()
    });
}

/// Goal: what cannot be mounted is refused, and nothing is left of the attempt. Method: no file system, a moment in no
/// exact stretch, a place that is taken, a place in the store.
#[test]
fn what_cannot_be_mounted_is_refused_and_leaves_nothing() {
    system_test("mount: refusals", &["mkfs.ext4"], |scene| {
        let (device, plan, mut agent) = stage(scene, 16 * MIB)?;
        agent.wait_and_check()?;
        let view = View::new(scene, Restore::from(plan.store())?)?;
        let ran = view.mount("latest", &[])?.expect_code(1)?;
        ensure!(
            ran.stderr.contains("no file system to mount"),
            "{}",
            ran.transcript()
        );
        view.expect_nothing_left()?;
        view.mount("seq:1", &[])?.expect_code(3)?;
        view.expect_nothing_left()?;
        FileSystem::Ext4.make(device.path())?;
        cdp_tests::device::flush_cache(device.path())?;
        agent.wait_and_check()?;
        view.mount("latest", &[])?.success()?;
        let ran = view.mount("latest", &[])?.expect_code(1)?;
        ensure!(ran.stderr.contains("has a mount already"), "{}", ran.transcript());
        ensure!(view.dir().join("lost+found").is_dir(), "the first mount is gone");
        view.unmount()?;
        view.try_unmount()?.expect_code(1)?;
        let inside = plan.store().join("log");
        let ran = view
            .restore()
            .command("mount")
            .args(["v", "--at", "latest"])
            .arg(&inside)
            .run()?;
        ensure!(ran.expect_code(1)?.stderr.contains("inside the store"));
        agent.stop()
    });
}

fn stage(scene: &Scene, bytes: u64) -> Result<(LoopDevice, AgentPlan, Agent)> {
    let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(bytes))?;
    let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
    let agent = plan.protect()?;
    Ok((device, plan, agent))
}

fn noise(path: &Path, rng: &mut Rng, start: u64, bytes: u64) -> Result<()> {
    let mut noise = vec![0; bytes as usize];
    rng.fill_noise(&mut noise);
    let file = fs::File::options().write(true).open(path)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &noise, start)?;
    Ok(file.sync_all()?)
}
