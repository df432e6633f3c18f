//! Every command that reads history, from a journal server over the network.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{Agent, AgentPlan};
use cdp_tests::device::{self, LoopDevice, LoopOptions, MIB};
use cdp_tests::fingerprint::Fingerprint;
use cdp_tests::fio::write_randomly;
use cdp_tests::moments::{QuietMoment, WallNs};
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::process::{Cmd, cmd};
use cdp_tests::restore::{FAILED, Restore};
use cdp_tests::server::Server;
use cdp_tests::view::{View, files_in};
use cdp_tests::workload::Mix;
use cdp_tests::{Scene, system_test};
use rustix::process::Signal;
use serde_json::Value;

const DEVICE_BYTES: u64 = 64 * MIB;
const WRITER_BYTES_PER_SECOND: u64 = 8 * MIB;
/// Less than a connection may be silent for whose user is patient.
const SILENCE_MAX: Duration = Duration::from_secs(18);

/// A device whose agent ships to a server.
struct Stage {
    device: LoopDevice,
    server: Server,
    agent: Agent,
    /// A certificate that reads.
    read: PathBuf,
}

impl Stage {
    fn new(scene: &Scene) -> Result<Stage> {
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(DEVICE_BYTES))?;
        let server = Server::start(scene, &scene.path("site"))?;
        let (ship, read) = server.enroll_both(scene, "web01")?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?
            .volume("v", device.path())
            .ships_to(server.address(), &ship);
        Ok(Stage {
            device,
            server,
            agent: plan.protect()?,
            read,
        })
    }

    fn restore(&self) -> Result<Restore> {
        Restore::from_server(self.server.address(), &self.read)
    }
}

/// Goal: a mount over the network shows the files of its moment, goes on when the server is back, and gives an error
/// that says why when it is not. Method: files at a quiet moment, mounted from the server while the agent goes on;
/// the server killed and started again under a mount whose files were not read yet; then killed for good.
#[test]
fn a_mount_outlives_the_server_it_reads_from() {
    system_test("remote: mount", &["mkfs.ext4"], |scene| {
        let mut rng = scene.rng();
        let mut stage = Stage::new(scene)?;
        FileSystem::Ext4.make(stage.device.path())?;
        let original = Mount::new(stage.device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
        let writers = Mix::on_files(original.dir(), &mut rng, 2, WRITER_BYTES_PER_SECOND)?;
        writers.wait_for_bytes(4 * MIB)?;
        writers.stop()?;
        let frozen = original.freeze()?;
        let (at, files) = (WallNs::now().to_string(), files_in(original.dir())?);
        drop(frozen);
        let writers = Mix::on_files(original.dir(), &mut rng, 2, WRITER_BYTES_PER_SECOND)?;
        writers.wait_for_bytes(2 * MIB)?;
        stage.agent.wait_synced()?;
        let view = View::new(scene, stage.restore()?)?;
        for more in [&[][..], &["--rw"]] {
            view.mount(&at, more)?.success()?;
            stage.server.kill()?;
            stage.server.run()?;
            ensure!(files_in(view.dir())? == files, "the files at {at} are others");
            view.unmount()?;
        }
        writers.stop()?;
        view.mount(&at, &["--patience", "1s"])?.success()?;
        // Silent, as a host is that hangs: nobody says that the connection has ended.
        stage.server.signal(Signal::STOP)?;
        let began = Instant::now();
        ensure!(files_in(view.dir()).is_err(), "it reads from nowhere");
        ensure!(
            began.elapsed() < SILENCE_MAX,
            "it waited for {:?}",
            began.elapsed()
        );
        stage.server.kill()?;
        let ran = view.try_unmount()?.success()?;
        ensure!(
            ran.stderr.contains("a request failed") && ran.stderr.contains(stage.server.address()),
            "{}",
            ran.transcript()
        );
        view.expect_nothing_left()?;
        original.unmount()?;
        stage.server.run()?;
        stage.agent.stop()
    });
}

/// Goal: what `rewind`, `nbd` and `find` do from a server is what they do from its folder. Method: a quiet moment, a
/// marker, damage; all three from the server while the agent goes on.
#[test]
fn rewind_nbd_and_find_read_from_a_server() {
    system_test("remote: rewind, nbd, find", &["fio", "nbdcopy"], |scene| {
        let mut stage = Stage::new(scene)?;
        let path = stage.device.path().to_owned();
        write_randomly(&path, "load", 8 * MIB, scene.seed(), scene.dir())?;
        let moment = QuietMoment::of_raw("v", &path)?;
        let at = moment.to.to_string();
        let marker = format!("marker-{:016x}", scene.rng().next_u64());
        let file = fs::File::options().write(true).open(&path)?;
        std::os::unix::fs::FileExt::write_all_at(&file, marker.as_bytes(), 12_345)?;
        file.sync_all()?;
        drop(file);
        write_randomly(&path, "load", 8 * MIB, scene.seed().wrapping_add(1), scene.dir())?;
        stage.agent.wait_and_check()?;
        let (restore, folder) = (stage.restore()?, Restore::from(stage.server.store())?);

        let find = |restore: &Restore| -> Result<Value> {
            let found = restore.command("find").args(["v", "--bytes", &marker, "--json"]);
            Ok(serde_json::from_str(&found.output()?)?)
        };
        let found = find(&restore)?;
        ensure!(found == find(&folder)?, "{found:#}");
        ensure!(found["hits"][0]["offset"] == 12_345, "{found:#}");

        let copy = scene.path("copy");
        restore.serve_nbd(scene, "v", &["--at", &at], |uri| {
            let nbdcopy = cmd("nbdcopy").args(["--connections=4", "--requests=16", uri]);
            nbdcopy.arg(&copy).run()?.success()?;
            moment
                .content
                .expect_same(&Fingerprint::of_file(&copy)?, "nbdcopy")
        })?;

        let rewind = |more: &[&str]| -> Cmd {
            let rewind = restore
                .command("rewind")
                .args(["v", "--at", &at, "--json", "--to"]);
            rewind.arg(&path).args(more)
        };
        let refused = rewind(&[]).run()?.expect_code(FAILED)?;
        refused.expect_message(&["--yes"])?;
        let ran = rewind(&["--yes"]).run()?.success()?;
        ensure!(!ran.stderr.contains("is protected as"), "{}", ran.transcript());
        let told: Value = serde_json::from_str(&ran.stdout)?;
        ensure!(told["proof"]["kind"] == "whole", "{told:#}");
        device::flush_cache(&path)?;
        let held = Fingerprint::of_device(&path)?;
        moment.content.expect_same(&held, "after the rewind")?;
        stage.agent.wait_synced()?;
        moment.check_at(&restore, "latest", &scene.path("image"))?;
        stage.agent.stop()
    });
}

/// Goal: `bisect` from a server finds what it finds in the folder. Method: a file that is removed among others.
#[test]
fn bisect_reads_from_a_server() {
    system_test("remote: bisect", &["mkfs.ext4"], |scene| {
        let mut stage = Stage::new(scene)?;
        FileSystem::Ext4.make(stage.device.path())?;
        let mount = Mount::new(stage.device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
        fs::write(mount.dir().join("precious"), "mine")?;
        mount.sync()?;
        stage.agent.bookmark("good")?;
        let lost = scene.rng().below(12);
        for number in 0..12 {
            fs::write(mount.dir().join(format!("file-{number}")), "theirs")?;
            if number == lost {
                fs::remove_file(mount.dir().join("precious"))?;
            }
            mount.sync()?;
        }
        stage.agent.wait_synced()?;
        let bisect = |restore: &Restore| -> Result<Value> {
            let arguments = ["v", "--good", "bookmark:good", "--bad", "latest", "--json", "--"];
            let check = ["sh", "-c", r#"test -e "$CDP_MOUNT/precious""#];
            let told = restore.command("bisect").args(arguments).args(check).output()?;
            Ok(serde_json::from_str(&told)?)
        };
        let told = bisect(&stage.restore()?)?;
        let here = bisect(&Restore::from(stage.server.store())?)?;
        ensure!(
            told["good"] == here["good"] && told["bad"] == here["bad"],
            "{told:#}\n{here:#}"
        );
        mount.unmount()?;
        stage.agent.stop()
    });
}

/// Goal: `diff` and `find` name files from a server as from its folder, and `files` copies them, with a mount or without.
/// Method: an ext4 on which one file is changed and one made between two quiet moments.
#[test]
fn diff_find_and_files_name_files_from_a_server() {
    let programs = ["mkfs.ext4", "setpriv"];
    system_test("remote: diff, find, files", &programs, |scene| {
        let mut stage = Stage::new(scene)?;
        FileSystem::Ext4.make(stage.device.path())?;
        let mount = Mount::new(stage.device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
        let marker = format!("marker-{:016x}", scene.rng().next_u64());
        fs::create_dir(mount.dir().join("folder"))?;
        for (name, content) in [("kept", "as it was"), ("changed", "before")] {
            fs::write(mount.dir().join(name), content)?;
        }
        let quiet = || -> Result<String> {
            let _frozen = mount.freeze()?;
            Ok(WallNs::now().to_string())
        };
        let since = quiet()?;
        fs::write(mount.dir().join("changed"), format!("{marker} after"))?;
        fs::write(mount.dir().join("folder/added"), "new")?;
        let (until, expected) = (quiet()?, files_in(mount.dir())?);
        mount.unmount()?;
        stage.agent.wait_synced()?;
        let (far, here) = (stage.restore()?, Restore::from(stage.server.store())?);

        let told = |restore: &Restore, command: &str, arguments: &[&str]| -> Result<Value> {
            let told = restore.command(command).args(["v", "--json"]).args(arguments);
            Ok(serde_json::from_str(&told.output()?)?)
        };
        for (command, arguments, key, expected) in [
            (
                "diff",
                ["--since", &since, "--until", &until],
                ("files", "path"),
                &["changed", "folder/added"][..],
            ),
            (
                "find",
                ["--bytes", &marker, "--since", &since],
                ("hits", "file"),
                &["changed"],
            ),
        ] {
            let (from_far, from_here) = (
                told(&far, command, &arguments)?,
                told(&here, command, &arguments)?,
            );
            ensure!(from_far == from_here, "{from_far:#}\n{from_here:#}");
            let found = from_far[key.0].as_array().context("nothing told")?;
            let mut names: Vec<_> = found.iter().filter_map(|found| found[key.1].as_str()).collect();
            // A folder changes with what is put into it.
            names.retain(|name| !name.ends_with('/'));
            ensure!(names == expected, "{from_far:#}");
        }
        for (name, taken) in [("mounted", None), ("read", Some("-all"))] {
            let to = scene.path(name);
            let files = far.command("files").args(["v", "--at", &until, "--to"]).arg(&to);
            let files = match taken {
                None => files,
                Some(taken) => files.without(taken),
            };
            files.run()?.success()?;
            ensure!(
                files_in(&to)? == expected,
                "{name}: the files at {until} are others"
            );
        }
        stage.agent.stop()
    });
}
