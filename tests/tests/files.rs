//! Files by name: which were changed between two moments (`diff`), and in which one bytes were (`find`).

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::AgentPlan;
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::moments::WallNs;
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::process::cmd;
use cdp_tests::restore::Restore;
use cdp_tests::rng::Rng;
use cdp_tests::view::View;
use cdp_tests::{Scene, system_test};
use serde_json::{Value, json};

const KEPT_MARK: &str = "DROP TABLE orders; -- kept";
const GONE_MARK: &str = "DROP TABLE orders; -- gone";

/// Goal: the files that differ between two moments of an ext4 are told, each with what differs, and no other; and the
/// file that bytes are in, also if it was deleted. Method: known changes, among them bytes that are other while size and
/// times are not, and bytes that were written again as they were; debugfs has its say on the file.
#[test]
fn ext4_files_are_told_by_name() {
    files_are_told("files: ext4", FileSystem::Ext4);
}

/// Goal: the same on xfs. Method: the same.
#[test]
fn xfs_files_are_told_by_name() {
    files_are_told("files: xfs", FileSystem::Xfs);
}

/// Goal: the same on btrfs, whose addresses are not those of the device and whose small files lie among its own
/// structures. Method: the same.
#[test]
fn btrfs_files_are_told_by_name() {
    files_are_told("files: btrfs", FileSystem::Btrfs);
}

fn files_are_told(name: &str, file_system: FileSystem) {
    let programs = [file_system.programs(), &["debugfs"]].concat();
    system_test(name, &programs, |scene| {
        let mut rng = scene.rng();
        let bytes = file_system.bytes_min();
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(bytes))?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let mut agent = plan.protect()?;
        file_system.make(device.path())?;
        let mount = Mount::new(device.path(), file_system, &scene.path("mnt"))?;
        let root = mount.dir().to_owned();
        make_tree(&root, &mut rng)?;
        fs::create_dir(root.join("still"))?;
        let read_last = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_420_070_400);
        let times = FileTimes::new().set_accessed(read_last).set_modified(read_last);
        File::open(root.join("still"))?.set_times(times)?;
        let since = quiet(&mount)?;
        let expected = change_tree(&root, &mut rng)?;
        let until = quiet(&mount)?;
        // Bytes in a file that is there, and in one that is not any more.
        for (name, mark) in [("dir/kept", KEPT_MARK), ("dir/gone-soon", GONE_MARK)] {
            write(&root.join(name), &marked(&mut rng, mark))?;
        }
        fs::remove_file(root.join("dir/gone-soon"))?;
        mount.sync()?;
        mount.unmount()?;
        agent.wait_and_check()?;
        let restore = Restore::from(plan.store())?;
        check_diff(&restore, (since, until), &expected)?;
        // Of folders too all times are kept.
        let copy = scene.path("copy");
        let files = restore
            .command("files")
            .args(["v", "still", "--at", &until.to_string()]);
        files.arg("--to").arg(&copy).run()?.success()?;
        let kept = fs::metadata(copy.join("still"))?;
        ensure!(
            kept.accessed()? == read_last && kept.modified()? == read_last,
            "{kept:?}"
        );
        for (mark, file) in [(KEPT_MARK, "dir/kept"), (GONE_MARK, "dir/gone-soon")] {
            let told = json_of(restore.command("find").args(["v", "--bytes", mark, "--json"]))?;
            let hits = told["hits"].as_array().context("no hits")?;
            let names: Vec<_> = hits.iter().filter_map(|hit| hit["file"].as_str()).collect();
            ensure!(names == [file], "{mark} is in {file}: {told:#}");
            if file_system == FileSystem::Ext4 && file == "dir/kept" {
                let offset = hits[0]["offset"].as_u64().context("no offset")?;
                ensure!(owner_by_debugfs(scene, &restore, offset)? == format!("/{file}"));
            }
        }
        View::new(scene, restore)?.expect_nothing_left()?;
        agent.stop()
    });
}

/// Everything is on the device, and nobody writes to it.
fn quiet(mount: &Mount) -> Result<WallNs> {
    let _frozen = mount.freeze()?;
    Ok(WallNs::now())
}

fn noise(rng: &mut Rng, bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    rng.fill_noise(&mut noise);
    noise
}

fn marked(rng: &mut Rng, mark: &str) -> Vec<u8> {
    let mut bytes = noise(rng, 100_000);
    bytes[50_000..][..mark.len()].copy_from_slice(mark.as_bytes());
    bytes
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes)?;
    Ok(File::open(path)?.sync_all()?)
}

fn make_tree(root: &Path, rng: &mut Rng) -> Result<()> {
    for folder in ["dir", "dir/deep", "old-folder"] {
        fs::create_dir(root.join(folder))?;
    }
    for name in [
        "dir/untouched",
        "dir/edited",
        "dir/again",
        "dir/deep/grown",
        "dir/mode",
    ] {
        write(&root.join(name), &noise(rng, 1 << 20))?;
    }
    for name in ["dir/small", "old-folder/removed", "dir/replaced", "dir/xattr"] {
        write(&root.join(name), &noise(rng, 100))?;
    }
    symlink("one", root.join("link"))?;
    // Holes stay holes, and one is filled.
    for name in ["dir/sparse", "dir/filled"] {
        File::create(root.join(name))?.set_len(1 << 20)?;
    }
    Ok(())
}

/// Changes bytes of a file, which keeps its size and times.
fn edit_in_secret(path: &Path, bytes: &[u8], offset: u64) -> Result<()> {
    let modified = fs::metadata(path)?.modified()?;
    let file = File::options().write(true).open(path)?;
    file.write_all_at(bytes, offset)?;
    file.set_times(FileTimes::new().set_modified(modified))?;
    Ok(file.sync_all()?)
}

/// Changes the tree; what must be told, by path.
fn change_tree(root: &Path, rng: &mut Rng) -> Result<BTreeMap<String, Value>> {
    edit_in_secret(&root.join("dir/edited"), b"another", 600_000)?;
    edit_in_secret(&root.join("dir/small"), b"another", 3)?;
    edit_in_secret(&root.join("dir/filled"), b"another", 500_000)?;
    // The same bytes once more.
    let again = fs::read(root.join("dir/again"))?;
    edit_in_secret(&root.join("dir/again"), &again, 0)?;
    let grown = File::options().append(true).open(root.join("dir/deep/grown"))?;
    std::io::Write::write_all(&mut &grown, b"more")?;
    grown.sync_all()?;
    fs::set_permissions(root.join("dir/mode"), Permissions::from_mode(0o600))?;
    rustix::fs::setxattr(
        root.join("dir/xattr"),
        "user.note",
        b"x",
        rustix::fs::XattrFlags::empty(),
    )?;
    fs::remove_file(root.join("link"))?;
    symlink("two", root.join("link"))?;
    fs::remove_dir_all(root.join("old-folder"))?;
    fs::remove_file(root.join("dir/replaced"))?;
    fs::create_dir(root.join("dir/replaced"))?;
    write(&root.join("dir/replaced/added"), &noise(rng, 5000))?;
    let expected = [
        (
            "dir/deep/grown",
            json!(["changed", ["content", "time"], 1 << 20, (1 << 20) + 4]),
        ),
        ("dir/edited", json!(["changed", ["content"], 1 << 20, 1 << 20])),
        ("dir/filled", json!(["changed", ["content"], 1 << 20, 1 << 20])),
        ("dir/mode", json!(["changed", ["mode"], 1 << 20, 1 << 20])),
        ("dir/small", json!(["changed", ["content"], 100, 100])),
        ("dir/replaced/", json!(["changed", ["kind"], 100, null])),
        ("dir/replaced/added", json!(["added", [], null, 5000])),
        ("dir/xattr", json!(["changed", ["xattr"], 100, 100])),
        ("link", json!(["changed", ["content", "time"], 3, 3])),
        ("old-folder/", json!(["removed", [], null, null])),
        ("old-folder/removed", json!(["removed", [], 100, null])),
    ];
    Ok(expected.map(|(path, facts)| (path.to_owned(), facts)).into())
}

fn json_of(command: cdp_tests::process::Cmd) -> Result<Value> {
    let ran = command.run()?.success()?;
    serde_json::from_str(&ran.stdout).with_context(|| ran.transcript())
}

fn check_diff(
    restore: &Restore,
    (since, until): (WallNs, WallNs),
    expected: &BTreeMap<String, Value>,
) -> Result<()> {
    let (since, until) = (since.to_string(), until.to_string());
    let diff = || {
        restore
            .command("diff")
            .args(["v", "--since", &since, "--until", &until])
    };
    let told = json_of(diff().arg("--json"))?;
    let files = told["files"].as_array().context("no files")?;
    let facts = |file: &Value| {
        let path = file["path"].as_str().unwrap_or_default().to_owned();
        // How large a folder is differs from file system to file system.
        let bytes = |key: &str| match path.ends_with('/') && file[key] != 100 {
            true => Value::Null,
            false => file[key].clone(),
        };
        let facts = json!([
            file["change"],
            file["what"],
            bytes("bytes_before"),
            bytes("bytes_after")
        ]);
        (path, facts)
    };
    let found: BTreeMap<_, _> = files.iter().map(facts).collect();
    ensure!(&found == expected, "told {found:#?}\nexpected {expected:#?}");
    let text = diff().run()?.success()?.stdout;
    let title = format!("{} files changed", expected.len());
    ensure!(text.contains(&title) && text.contains("dir/deep/grown"), "{text}");
    let without = json_of(diff().args(["--json", "--no-files"]))?;
    ensure!(
        without["files"].is_null() && without["ranges"] == told["ranges"],
        "{without:#}"
    );
    let same = restore
        .command("diff")
        .args(["v", "--since", &until, "--until", &until, "--json"]);
    ensure!(json_of(same)?["files"] == json!([]));
    Ok(())
}

/// Which file a byte of the newest moment belongs to, as debugfs finds it in an image.
fn owner_by_debugfs(scene: &Scene, restore: &Restore, offset: u64) -> Result<String> {
    let image = scene.path("image");
    restore.image("v", "latest", &image)?.success()?;
    let ask = |question: String| -> Result<String> {
        let told = cmd("debugfs").args(["-R", &question]).arg(&image).output()?;
        let answer = told.lines().nth(1).and_then(|line| line.split('\t').nth(1));
        Ok(answer.with_context(|| format!("{question}: {told}"))?.to_owned())
    };
    let inode = ask(format!("icheck {}", offset / block_bytes(&image)?))?;
    ask(format!("ncheck {inode}"))
}

/// Of an ext4: the superblock tells it as a power of two of KiB.
fn block_bytes(image: &Path) -> Result<u64> {
    let mut shift = [0; 4];
    File::open(image)?.read_exact_at(&mut shift, 1024 + 24)?;
    let bytes = 1024 << u32::from_le_bytes(shift);
    ensure!((1024..=MIB).contains(&bytes), "blocks of {bytes} bytes");
    Ok(bytes)
}
