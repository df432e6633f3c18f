//! `image` onto a device: the right size, not in use, asked for, and then exactly the volume.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::program::{Ran, root_for, tool};
use crate::store::{Store, VOLUME_BYTES, known_image};

const EXCLUSIVE: i32 = 0o200; // O_EXCL

/// A loop device over a file of `bytes` that are not zero.
pub(crate) struct Loop {
    pub(crate) path: PathBuf,
    file: PathBuf,
}

impl Loop {
    pub(crate) fn new(file: PathBuf, bytes: u64) -> Self {
        Loop::with(file, bytes, &[])
    }

    fn with(file: PathBuf, bytes: u64, flags: &[&str]) -> Self {
        fs::write(&file, vec![0xee; bytes as usize]).unwrap();
        let path = tool(
            "losetup",
            [flags, &["--find", "--show", file.to_str().unwrap()]].concat(),
        )
        .into();
        Loop { path, file }
    }

    pub(crate) fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// What a device of nothing but this test's filling holds.
    pub(crate) fn is_untouched(&self) -> bool {
        fs::read(&self.path).unwrap().iter().all(|byte| *byte == 0xee)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
        let _ = fs::remove_file(&self.file);
    }
}

fn image_to(store: &Store, target: &Path, more: &[&str]) -> Ran {
    let arguments = ["pg", "--at", "seq:6", "--to", target.to_str().unwrap()];
    store.run("image", &[&arguments[..], more].concat())
}

#[test]
fn a_device_becomes_exactly_the_volume_and_keeps_what_lies_beyond() {
    if !root_for("a_device_becomes_exactly_the_volume_and_keeps_what_lies_beyond") {
        return;
    }
    let store = Store::known();
    for beyond_bytes in [0, 1 << 20] {
        let device = Loop::new(store.beside("target"), VOLUME_BYTES + beyond_bytes);
        let ran = image_to(&store, &device.path, &["--yes"]).exits(0);
        let content = fs::read(&device.path).unwrap();
        let (volume, beyond) = content.split_at(VOLUME_BYTES as usize);
        assert!(volume == known_image(6), "the device is not the volume");
        assert!(beyond.iter().all(|byte| *byte == 0xee));
        assert_eq!(
            ran.stderr.contains("its last 1 MiB were left"),
            beyond_bytes > 0,
            "{ran:?}"
        );
    }
}

#[test]
fn a_device_that_is_too_small_is_refused_with_both_sizes() {
    if !root_for("a_device_that_is_too_small_is_refused_with_both_sizes") {
        return;
    }
    let store = Store::known();
    let device = Loop::new(store.beside("target"), 512 << 10);
    let says = format!(
        "{} is 512 KiB, pg was 1 MiB at that instant; give a target of at least 1 MiB",
        device.text()
    );
    image_to(&store, &device.path, &["--yes"]).exits(1).says(&[&says]);
    assert!(device.is_untouched());
}

#[test]
fn a_device_is_not_written_over_unasked() {
    if !root_for("a_device_is_not_written_over_unasked") {
        return;
    }
    let store = Store::known();
    let device = Loop::new(store.beside("target"), VOLUME_BYTES);
    image_to(&store, &device.path, &[]).exits(1).says(&["--yes"]);
    image_to(&store, &device.path, &["--dry-run"]).exits(0);
    assert!(device.is_untouched());
}

#[test]
fn a_device_that_is_in_use_is_refused_with_the_user_named() {
    if !root_for("a_device_that_is_in_use_is_refused_with_the_user_named") {
        return;
    }
    let store = Store::known();
    let device = Loop::new(store.beside("target"), 4 << 20);
    let held = OpenOptions::new()
        .read(true)
        .custom_flags(EXCLUSIVE)
        .open(&device.path)
        .unwrap();
    image_to(&store, &device.path, &["--yes"])
        .exits(1)
        .says(&["is in use", "the kernel holds it"]);
    assert!(device.is_untouched());
    drop(held);
    tool("mkfs.ext4", ["-q", "-F", device.text()]);
    let point = store.beside("my mount");
    fs::create_dir(&point).unwrap();
    tool("mount", [device.text(), point.to_str().unwrap()]);
    let ran = image_to(&store, &device.path, &["--yes"]);
    tool("umount", [point.to_str().unwrap()]);
    ran.exits(1).says(&["is in use: mounted at", "my mount"]);
}

#[test]
fn a_device_that_is_read_only_is_refused() {
    if !root_for("a_device_that_is_read_only_is_refused") {
        return;
    }
    let store = Store::known();
    let device = Loop::with(store.beside("target"), VOLUME_BYTES, &["--read-only"]);
    image_to(&store, &device.path, &["--yes"])
        .exits(1)
        .says(&["is read-only"]);
    assert!(device.is_untouched());
}

/// Goal: at a terminal the user is asked, and only a yes goes on. Method: `script` gives the program a
/// terminal, and types the answer.
#[test]
fn at_a_terminal_the_user_is_asked() {
    if !root_for("at_a_terminal_the_user_is_asked") {
        return;
    }
    let store = Store::known();
    let device = Loop::new(store.beside("target"), VOLUME_BYTES);
    let arguments = store.arguments("image", &["pg", "--at", "seq:6", "--to", device.text()]);
    let command = format!("{} {}", env!("CARGO_BIN_EXE_cdp-restore"), arguments.join(" "));
    for (answer, code) in [("n\n", 1), ("\n", 1), ("yes\n", 0)] {
        let mut script = Command::new("script")
            .args(["--quiet", "--return", "--command", &command, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = script.stdin.take().unwrap();
        stdin.write_all(answer.as_bytes()).unwrap();
        let output = script.wait_with_output().unwrap();
        drop(stdin);
        let shown = String::from_utf8_lossy(&output.stdout);
        assert!(shown.contains("All it holds now will be lost. [y/N]"), "{shown}");
        assert_eq!(output.status.code(), Some(code), "{answer:?}: {shown}");
        assert_eq!(device.is_untouched(), code == 1, "{answer:?}: {shown}");
    }
    assert!(fs::read(&device.path).unwrap() == known_image(6));
}

/// Goal: whoever restores over the device that is being protected is told. Method: a store whose volume lies
/// on the target, and a writer that has the store open.
#[test]
fn restoring_over_a_protected_device_is_told() {
    if !root_for("restoring_over_a_protected_device_is_told") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let device = Loop::new(folder.path().join("target"), 4 * 4096);
    let store = Store::noisy(4, device.text());
    let target = ["pg", "--at", "latest", "--to", device.text(), "--yes"];
    let ran = store.run("image", &target).exits(0);
    assert_eq!(ran.stderr, "", "no agent is running");
    let _writing = crate::store::Writing::open(&store.path());
    let ran = store.run("image", &target).exits(0);
    assert!(
        ran.stderr.contains("warning: ") && ran.stderr.contains("is protected as pg"),
        "{ran:?}"
    );
}
