//! Bad input: each has its message and its exit code, and nothing is lost or half-written.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{AgentPlan, binary};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fingerprint::Fingerprint;
use cdp_tests::fio::Fio;
use cdp_tests::moments::{QuietMoment, WallNs};
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::process::{User, cmd};
use cdp_tests::restore::{DAMAGED, DONE, FAILED, NOT_EXACT, Restore, USAGE};
use cdp_tests::rng::Rng;
use cdp_tests::{Scene, system_test};

/// Goal: without root the agent says so. Method: run it as nobody.
#[test]
fn without_root_the_agent_says_so() {
    system_test("refusals: no root", &["fio"], |scene| {
        let device = device(scene, 16 * MIB)?;
        let nobody = User::find("nobody")?.context("user nobody")?;
        // Where nobody can reach it.
        let program = scene.path("cdp-agent");
        std::fs::copy(binary("cdp-agent")?, &program).context("copy the agent")?;
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755))?;
        let store = scene.path("store");
        std::fs::create_dir(&store)?;
        std::os::unix::fs::chown(&store, Some(nobody.uid), Some(nobody.gid))?;
        let volume = format!("v={}", device.path().display());
        let run = cmd(&program)
            .args(["run", "--volume", &volume, "--store"])
            .arg(&store)
            .user(&nobody);
        run.run()?.expect_code(FAILED)?.expect_message(&["root"])?;
        ensure!(files_in(&store)?.is_empty(), "it left {:?}", files_in(&store)?);
        Ok(())
    });
}

/// Goal: without BTF the agent says so. Method: hide /sys/kernel/btf in a mount namespace of its own.
#[test]
fn without_btf_the_agent_says_so() {
    system_test("refusals: no BTF", &["fio", "unshare"], |scene| {
        let device = device(scene, 16 * MIB)?;
        let hide = "mount -t tmpfs none /sys/kernel/btf && exec \"$@\"";
        let volume = format!("v={}", device.path().display());
        let run = cmd("unshare")
            .args(["--mount", "sh", "-c", hide, "sh"])
            .arg(binary("cdp-agent")?);
        let run = run
            .args(["run", "--volume", &volume, "--store"])
            .arg(scene.path("store"));
        run.run()?
            .expect_code(FAILED)?
            .expect_message(&["btf", "vmlinux"])?;
        let doctor = cmd("unshare")
            .args(["--mount", "sh", "-c", hide, "sh"])
            .arg(binary("cdp-agent")?)
            .arg("doctor");
        let told = doctor.run()?;
        ensure!(
            told.stdout.contains("BTF") && told.stdout.contains("fail"),
            "{}",
            told.transcript()
        );
        Ok(())
    });
}

/// Goal: a host that can be protected is told so. Method: `doctor` on this one has no line `fail`.
#[test]
fn doctor_finds_this_host_fit() {
    system_test("refusals: doctor", &[], |_| {
        let told = cmd(binary("cdp-agent")?).arg("doctor").run()?.success()?;
        ensure!(
            told.stdout.contains("ok") && !told.stdout.contains("fail"),
            "{}",
            told.transcript()
        );
        let json = cmd(binary("cdp-agent")?).args(["doctor", "--json"]).output()?;
        serde_json::from_str::<serde_json::Value>(&json)
            .context("doctor --json")
            .map(drop)
    });
}

/// Goal: what cannot be protected is refused by name. Method: a device that is not there, a file, a
/// character device, a volume without a path.
#[test]
fn an_unknown_device_is_refused_by_name() {
    system_test("refusals: unknown device", &[], |scene| {
        let file = scene.path("file");
        std::fs::write(&file, "not a device")?;
        for path in [Path::new("/dev/no-such-device"), &file, Path::new("/dev/null")] {
            let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", path);
            plan.refuse()?
                .expect_code(FAILED)?
                .expect_message(&[&path.display().to_string()])?;
        }
        let plan = AgentPlan::new(scene, &scene.path("store"))?.flag("--volume", "v");
        let refused = plan.refuse()?;
        ensure!(
            [FAILED, USAGE].contains(&refused.code),
            "{}",
            refused.transcript()
        );
        refused.expect_message(&["NAME=PATH"]).map(drop)
    });
}

/// Goal: a store never feeds on itself. Method: a store in a file system on the protected device; the same
/// one folder deeper; and on a partition of the protected disk.
#[test]
fn a_store_on_the_protected_device_is_refused() {
    system_test(
        "refusals: store on the device",
        &["mkfs.ext4", "sfdisk"],
        |scene| {
            let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(64 * MIB))?;
            FileSystem::Ext4.make(device.path())?;
            let mount = Mount::new(device.path(), FileSystem::Ext4, &scene.path("mnt"))?;
            for store in [mount.dir().join("store"), mount.dir().join("a/b/store")] {
                let plan = AgentPlan::new(scene, &store)?.volume("v", device.path());
                let refused = plan.refuse()?.expect_code(FAILED)?;
                refused.expect_message(&[&device.path().display().to_string(), "store"])?;
            }
            let disk = LoopDevice::create(
                &scene.path("disk-2"),
                LoopOptions::of_bytes(64 * MIB).partitioned(),
            )?;
            let parts = disk.partition(&[32])?;
            FileSystem::Ext4.make(&parts[0])?;
            let second = Mount::new(&parts[0], FileSystem::Ext4, &scene.path("mnt-2"))?;
            let plan = AgentPlan::new(scene, &second.dir().join("store"))?.volume("v", disk.path());
            plan.refuse()?.expect_code(FAILED)?.expect_message(&["store"])?;
            second.unmount()?;
            mount.unmount()
        },
    );
}

/// Goal: two agents never share a store. Method: start a second on the store of the first; the first goes
/// on as if nothing had been.
#[test]
fn a_second_agent_on_one_store_is_refused() {
    system_test("refusals: two agents", &["fio"], |scene| {
        let device = device(scene, 16 * MIB)?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        plan.refuse()?.expect_code(FAILED)?.expect_message(&["store"])?;
        write(scene, &device, 2 * MIB)?;
        let quiet = QuietMoment::of_raw("v", device.path())?;
        agent.wait_and_check()?;
        quiet.check(
            &Restore::from(plan.store())?,
            &mut scene.rng(),
            &scene.path("image"),
        )?;
        agent.stop()
    });
}

/// Goal: what `cdp-restore` is asked wrongly it refuses with the right code, and writes nothing. Method: a
/// store with a little history, and one wrong question after the other.
#[test]
fn wrong_questions_get_their_codes_and_leave_no_file() {
    system_test("refusals: wrong questions", &["fio"], |scene| {
        let history = History::make(scene)?;
        let image = scene.path("out").join("image");
        std::fs::create_dir(scene.path("out"))?;
        let ask = |volume: &str, when: &str| history.restore.image(volume, when, &image);
        // Before history: the message names where it begins, and that can be restored.
        let begins = history
            .restore
            .points("v")?
            .exact
            .first()
            .context("an exact stretch")?
            .from
            .clone();
        for when in ["2001-01-01T00:00:00Z", "-20000h"] {
            let refused = ask("v", when)?.expect_code(NOT_EXACT)?;
            let year = &begins[..4];
            refused.expect_message(&[year])?;
        }
        ask("v", &begins)?
            .success()
            .context("the moment at which history begins")?;
        std::fs::remove_file(&image)?;
        ask("v", "2101-01-01T00:00:00Z")?
            .expect_code(FAILED)?
            .expect_message(&["2101"])?;
        ask("w", "latest")?
            .expect_code(FAILED)?
            .expect_message(&["w", "v"])?;
        ask("v", "bookmark:nobody-set-it")?
            .expect_code(FAILED)?
            .expect_message(&["nobody-set-it"])?;
        for when in ["yesterday", "seq:", "seq:x", "2026-13-01T00:00:00Z", ""] {
            ask("v", when)?.expect_code(USAGE)?;
        }
        let beyond = ask("v", "seq:999999999")?;
        ensure!(
            [FAILED, NOT_EXACT].contains(&beyond.code),
            "{}",
            beyond.transcript()
        );
        let elsewhere = Restore::from(&scene.path("no-such-store"))?;
        elsewhere
            .image("v", "latest", &image)?
            .expect_code(FAILED)?
            .expect_message(&["no-such-store"])?;
        let empty = scene.path("empty");
        std::fs::create_dir(&empty)?;
        Restore::from(&empty)?
            .image("v", "latest", &image)?
            .expect_code(FAILED)?
            .expect_message(&["empty"])?;
        ensure!(
            files_in(&empty)?.is_empty(),
            "an empty folder was made a store by reading it"
        );
        ensure!(
            files_in(&scene.path("out"))?.is_empty(),
            "left: {:?}",
            files_in(&scene.path("out"))?
        );
        Ok(())
    });
}

/// Goal: a device that cannot take the image is refused before a byte of it changes. Method: one too
/// small, one that is mounted, one without `--yes`.
#[test]
fn a_device_that_cannot_take_the_image_is_left_as_it_was() {
    system_test("refusals: unfit targets", &["fio", "mkfs.ext4"], |scene| {
        let history = History::make(scene)?;
        let small = LoopDevice::create(&scene.path("small"), LoopOptions::of_bytes(8 * MIB))?;
        let before = Fingerprint::of_device(small.path())?;
        let refused = history
            .restore
            .image_over("v", "latest", small.path())?
            .expect_code(FAILED)?;
        refused.expect_message(&[&small.path().display().to_string(), "16 MiB"])?;
        before.expect_same(&Fingerprint::of_device(small.path())?, "a device too small")?;

        let busy = LoopDevice::create(&scene.path("busy"), LoopOptions::of_bytes(32 * MIB))?;
        FileSystem::Ext4.make(busy.path())?;
        let mount = Mount::new(busy.path(), FileSystem::Ext4, &scene.path("mnt"))?;
        let refused = history
            .restore
            .image_over("v", "latest", busy.path())?
            .expect_code(FAILED)?;
        refused.expect_message(&["mounted"])?;
        mount.unmount()?;

        // As partitions are mounted where the kernel was not asked for them.
        let on_top = LoopDevice::attach(busy.path())?;
        let mount = Mount::new(on_top.path(), FileSystem::Ext4, &scene.path("mnt"))?;
        let refused = history
            .restore
            .image_over("v", "latest", busy.path())?
            .expect_code(FAILED)?;
        refused.expect_message(&["mounted"])?;
        mount.unmount()?;
        drop(on_top);

        let before = Fingerprint::of_device(busy.path())?;
        let refused = history.restore.image("v", "latest", busy.path())?;
        ensure!(
            [FAILED, USAGE].contains(&refused.code),
            "{}",
            refused.transcript()
        );
        refused.expect_message(&["--yes"])?;
        before.expect_same(
            &Fingerprint::of_device(busy.path())?,
            "a device that was not to be written",
        )
    });
}

/// Goal: a disk too full for the image ends in a message and no half image. Method: the target lies on a
/// tmpfs smaller than the data; a file of that name that was there stays what it was.
#[test]
fn a_disk_too_full_for_the_image_keeps_no_half_of_it() {
    system_test("refusals: no space for the image", &["fio"], |scene| {
        let history = History::make(scene)?;
        let disk = Mount::with_options(Path::new("none"), "tmpfs", &scene.path("full"), "size=4m")?;
        let image = disk.dir().join("image");
        for old in [None, Some("what was there")] {
            if let Some(text) = old {
                std::fs::write(&image, text)?;
            }
            history
                .restore
                .image("v", "latest", &image)?
                .expect_code(FAILED)?
                .expect_message(&["full"])?;
            let left = files_in(disk.dir())?;
            let expected: Vec<PathBuf> = old.iter().map(|_| image.clone()).collect();
            ensure!(left == expected, "left: {left:?}");
            ensure!(
                old.is_none_or(|text| std::fs::read_to_string(&image).is_ok_and(|now| now == text)),
                "overwritten"
            );
        }
        disk.unmount()
    });
}

/// Goal: P5, a damaged byte is named and never returned. Method: in copies of a store, flip one byte of
/// the largest segment at random places: `verify` ends with 4 and names the file; `image` either ends with
/// 4 or never needed that byte and is right. A device it was to be written to is left as it was, or right.
#[test]
fn a_flipped_byte_is_found_and_never_returned() {
    system_test("refusals: damaged segment", &["fio"], |scene| {
        let history = History::make(scene)?;
        let mut rng = scene.rng();
        let image = scene.path("image");
        let target = LoopDevice::create(&scene.path("target"), LoopOptions::of_bytes(16 * MIB))?;
        let held = Fingerprint::of_device(target.path())?;
        let mut refused = 0;
        for round in 0..6 {
            let copy = scene.path(&format!("copy-{round}"));
            cmd("cp")
                .arg("-r")
                .arg(&history.store)
                .arg(&copy)
                .run()?
                .success()?;
            let segment = largest_segment(&copy)?;
            let bytes = std::fs::metadata(&segment)?.len();
            // Not the very end: a frame with nothing good after it is a torn tail and rightly cut.
            flip(&segment, rng.between(bytes / 20, bytes / 2))?;
            let name = segment
                .file_name()
                .and_then(|name| name.to_str())
                .context("a segment's name")?;
            let restore = Restore::from(&copy)?;
            restore.verify()?.expect_code(DAMAGED)?.expect_message(&[name])?;
            let outcome = restore.image("v", &history.at.to_string(), &image)?;
            match outcome.code {
                DONE => history
                    .content
                    .expect_same(&Fingerprint::of_file(&image)?, "an image beside damage")?,
                DAMAGED => {
                    refused += 1;
                    ensure!(!image.exists(), "half an image\n{}", outcome.transcript());
                    outcome.expect_message(&[name])?;
                    for flags in [&["--yes", "--dry-run"][..], &["--yes"]] {
                        let over = restore
                            .command("image")
                            .args(["v", "--at", &history.at.to_string()]);
                        let over = over.args(flags).arg("--to").arg(target.path()).run()?;
                        over.expect_code(DAMAGED)?
                            .expect_message(&[name, "nothing was written"])?;
                        held.expect_same(&Fingerprint::of_device(target.path())?, "a device beside damage")?;
                    }
                }
                _ => return outcome.expect_code(DAMAGED).map(drop),
            }
            let _ = std::fs::remove_file(&image);
            std::fs::remove_dir_all(copy)?;
        }
        ensure!(refused > 0, "no flip was ever met: the test proves nothing");
        Ok(())
    });
}

/// Goal: P2, a store that has lost the end of its log is not taken for an older one. Method: cut the newest segment of a
/// copy in two; whoever reads it is told, by which record.
#[test]
fn a_log_that_has_lost_its_end_is_told() {
    system_test("refusals: lost end", &["fio"], |scene| {
        let history = History::make(scene)?;
        let whole = history.restore.command("ls").run()?.success()?;
        ensure!(!whole.stderr.contains("is gone"), "{}", whole.transcript());
        let copy = scene.path("copy");
        cmd("cp")
            .arg("-r")
            .arg(&history.store)
            .arg(&copy)
            .run()?
            .success()?;
        let segment = largest_segment(&copy)?;
        let file = std::fs::File::options().write(true).open(&segment)?;
        file.set_len(std::fs::metadata(&segment)?.len() / 2)?;
        for command in ["ls", "verify"] {
            let told = Restore::from(&copy)?.command(command).run()?;
            told.expect_message(&["its index knows of seq:", "is gone"])?;
        }
        Ok(())
    });
}

/// Goal: a lost index costs time, not history. Method: remove it from one copy and write noise over its
/// files in another; the image is right in both.
#[test]
fn a_lost_or_damaged_index_costs_no_history() {
    system_test("refusals: damaged index", &["fio"], |scene| {
        let history = History::make(scene)?;
        let image = scene.path("image");
        for damage in ["removed", "noise"] {
            let copy = scene.path(damage);
            cmd("cp")
                .arg("-r")
                .arg(&history.store)
                .arg(&copy)
                .run()?
                .success()?;
            if damage == "removed" {
                std::fs::remove_dir_all(copy.join("index"))?;
            } else {
                for file in files_in(&copy.join("index"))? {
                    let mut noise = vec![0; std::fs::metadata(&file)?.len() as usize];
                    scene.rng().fill_noise(&mut noise);
                    std::fs::write(&file, noise)?;
                }
            }
            let restore = Restore::from(&copy)?;
            restore
                .image("v", &history.at.to_string(), &image)?
                .success()
                .with_context(|| damage.to_owned())?;
            history
                .content
                .expect_same(&Fingerprint::of_file(&image)?, damage)?;
        }
        Ok(())
    });
}

/// Goal: a store of a newer format is refused by both programs, file and formats named, and not touched.
/// Method: raise the format number of a copy's `store.json`; sums of all files before and after.
#[test]
fn a_store_of_a_newer_format_is_refused_and_not_touched() {
    system_test("refusals: newer format", &["fio"], |scene| {
        let history = History::make(scene)?;
        let file = history.store.join("store.json");
        let text = std::fs::read_to_string(&file)?;
        let mut json: serde_json::Value = serde_json::from_str(&text).context("store.json")?;
        let fields = json.as_object_mut().context("store.json is an object")?;
        let key = fields
            .keys()
            .find(|key| key.contains("format"))
            .context("a format in store.json")?
            .clone();
        fields.insert(key, 99.into());
        std::fs::write(&file, json.to_string())?;
        let before = sums(&history.store)?;
        let parts = ["store.json", "99"];
        history
            .restore
            .image("v", "latest", &scene.path("image"))?
            .expect_code(FAILED)?
            .expect_message(&parts)?;
        let plan = AgentPlan::new(scene, &history.store)?.volume("v", history.device.path());
        plan.refuse()?.expect_code(FAILED)?.expect_message(&parts)?;
        ensure!(sums(&history.store)? == before, "the store was touched");
        Ok(())
    });
}

/// A store with a little history, its agent gone, and what the device held at one moment of it.
struct History {
    device: LoopDevice,
    store: PathBuf,
    restore: Restore,
    at: WallNs,
    content: Fingerprint,
}

impl History {
    fn make(scene: &Scene) -> Result<History> {
        let device = device(scene, 16 * MIB)?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        // Noise over the whole device: nearly every byte of the log is live data.
        let all = Fio::new("all", device.path(), "write")
            .option("bs", "256k")
            .option("size", "100%");
        all.direct(1).seed(scene.seed()).run(scene.dir())?;
        let quiet = QuietMoment::of_raw("v", device.path())?;
        let at = WallNs::random_between(&mut scene.rng(), quiet.from, quiet.to);
        write(scene, &device, 2 * MIB)?;
        agent.wait_and_check()?;
        agent.stop()?;
        let store = plan.store().to_owned();
        Ok(History {
            device,
            restore: Restore::from(&store)?,
            store,
            at,
            content: quiet.content,
        })
    }
}

fn device(scene: &Scene, bytes: u64) -> Result<LoopDevice> {
    let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(bytes))?;
    let mut old = vec![0; 4 << 20];
    Rng::new(scene.seed()).fill_noise(&mut old);
    std::fs::write(device.path(), old).context("fill a device")?;
    cdp_tests::device::flush_cache(device.path())?;
    Ok(device)
}

fn write(scene: &Scene, device: &LoopDevice, bytes: u64) -> Result<()> {
    let fio = Fio::new("load", device.path(), "randwrite")
        .option("bs", "4k")
        .option("io_size", bytes);
    fio.option("size", "100%")
        .direct(4)
        .seed(scene.seed())
        .run(scene.dir())
        .map(drop)
}

fn flip(path: &Path, offset: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .context("open a segment")?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    byte[0] ^= 0x10;
    file.write_all_at(&byte, offset)
        .with_context(|| format!("flip byte {offset}"))
}

fn largest_segment(store: &Path) -> Result<PathBuf> {
    let segments = files_in(&store.join("log"))?;
    let largest = segments
        .into_iter()
        .max_by_key(|path| std::fs::metadata(path).map_or(0, |data| data.len()));
    largest.context("a segment")
}

/// The files right in a folder, in order.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    Ok(files)
}

fn sums(folder: &Path) -> Result<String> {
    cmd("sh")
        .args(["-c", "find . -type f -exec sha256sum {} + | sort"])
        .current_dir(folder)
        .output()
}
