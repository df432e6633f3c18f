//! `image` to a file: the right bytes at every kind of WHEN, and nothing half-written.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::program::{command, names_in, root_for, tool};
use crate::store::{BLOCK_BYTES, Store, VOLUME_BYTES, known_image, time};

#[test]
fn every_form_of_when_brings_back_its_moment() {
    let store = Store::known();
    for (when, seq) in [
        (time(3000), 5),
        (time(3999), 5),
        (time(4000), 6),
        ("2026-01-02T11:04:08.5+08:00".to_owned(), 5),
        ("seq:4".to_owned(), 4),
        ("seq:5".to_owned(), 5),
        ("seq:9".to_owned(), 9),
        ("bookmark:before-upgrade".to_owned(), 7),
        (time(7000), 9),
        (time(10_000), 12),
        ("seq:13".to_owned(), 13),
        ("latest".to_owned(), 15),
    ] {
        let image = store
            .image(&when)
            .unwrap_or_else(|ran| panic!("{when}: {ran:#?}"));
        assert!(
            image == known_image(seq),
            "the image at {when} differs from the volume after seq {seq}"
        );
    }
}

#[test]
fn a_time_without_an_offset_is_local() {
    let store = Store::known();
    let target = store.beside("disk.img");
    let arguments = store.arguments(
        "image",
        &[
            "pg",
            "--at",
            "2026-01-02T11:04:08",
            "--to",
            target.to_str().unwrap(),
        ],
    );
    let output = command(arguments).env("TZ", "Asia/Shanghai").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(fs::read(&target).unwrap() == known_image(5));
}

#[test]
fn the_result_is_told_as_text_and_as_json() {
    let store = Store::known();
    let target = store.beside("disk.img");
    let to = target.to_str().unwrap();
    let text = store.run("image", &["pg", "--at", "seq:6", "--to", to]).exits(0);
    assert!(
        text.stdout
            .contains("pg as it was at 2026-01-02T03:04:09.000000000+00:00 (seq:6), 1 MiB"),
        "{text:?}"
    );
    assert_eq!(text.stderr, "", "there is no terminal to show progress on");
    let json = store
        .run("image", &["pg", "--at", "seq:6", "--to", to, "--json"])
        .exits(0)
        .json();
    assert_eq!((&json["seq"], &json["bytes"]), (&6.into(), &VOLUME_BYTES.into()));
    assert_eq!(
        (&json["target"], &json["replaces"], &json["dry_run"]),
        (&"file".into(), &true.into(), &false.into())
    );
}

#[test]
fn an_image_is_sparse_where_the_volume_is_zero_and_private() {
    let store = Store::known();
    store.image("seq:6").unwrap();
    let metadata = fs::metadata(store.beside("disk.img")).unwrap();
    assert_eq!(metadata.len(), VOLUME_BYTES);
    let allocated_bytes = metadata.blocks() * 512;
    assert!(
        allocated_bytes <= 16 * BLOCK_BYTES as u64,
        "{allocated_bytes} bytes for 3 blocks of data"
    );
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
}

#[test]
fn an_existing_file_is_replaced_whole() {
    let store = Store::known();
    let target = store.beside("disk.img");
    fs::write(&target, vec![0xee; 3 * VOLUME_BYTES as usize]).unwrap();
    let old = File::open(&target).unwrap();
    assert!(store.image("seq:8").unwrap() == known_image(8));
    assert_eq!(
        old.metadata().unwrap().len(),
        3 * VOLUME_BYTES,
        "who has the old file open keeps it"
    );
    assert_eq!(names_in(store.beside("").as_path()), ["disk.img", "store"]);
}

#[test]
fn a_dry_run_says_what_it_would_do_and_does_nothing() {
    let store = Store::known();
    let target = store.beside("disk.img");
    let ran = store
        .run(
            "image",
            &[
                "pg",
                "--at",
                "latest",
                "--to",
                target.to_str().unwrap(),
                "--dry-run",
            ],
        )
        .exits(0);
    assert!(ran.stdout.starts_with("would write pg as it was at"), "{ran:?}");
    assert!(!target.exists());
}

#[test]
fn a_moment_in_a_gap_is_refused_and_its_neighbours_can_be_pasted() {
    let store = Store::known();
    for when in [time(8500), time(9000), "seq:10".to_owned(), "seq:11".to_owned()] {
        let ran = store.image(&when).unwrap_err().exits(3);
        let ran = ran.says(&[
            "pg cannot be restored exactly at",
            "ring-overflow",
            "before:",
            "after:",
        ]);
        assert!(!store.beside("disk.img").exists());
        let words: Vec<_> = ran.stderr.split_whitespace().collect();
        let pasted: Vec<_> = words
            .windows(2)
            .filter(|pair| pair[0] == "--at")
            .map(|pair| pair[1])
            .collect();
        assert_eq!(pasted.len(), 4, "two forms of two moments: {}", ran.stderr);
        for (when, seq) in pasted.into_iter().zip([9, 9, 12, 12]) {
            let image = store.image(when).unwrap_or_else(|ran| panic!("{when}: {ran:#?}"));
            assert!(image == known_image(seq), "{when} is not seq {seq}");
            fs::remove_file(store.beside("disk.img")).unwrap();
        }
    }
}

#[test]
fn moments_that_history_does_not_hold_are_refused() {
    let store = Store::known();
    for (when, code, says) in [
        (time(-1000), 3, "history begins later"),
        (time(1500), 3, "its first copy was not complete"),
        ("seq:3".to_owned(), 3, "its first copy was not complete"),
        (
            time(3_600_000),
            3,
            "what is here ends at 2026-01-02T03:04:18.000000000+00:00",
        ),
        ("2999-01-01T00:00:00Z".to_owned(), 1, "future"),
        ("seq:16".to_owned(), 1, "seq:16"),
        ("bookmark:after-upgrade".to_owned(), 1, "after-upgrade"),
    ] {
        store.image(&when).unwrap_err().exits(code).says(&[says]);
    }
    assert_eq!(names_in(store.beside("").as_path()), ["store"]);
}

#[test]
fn targets_that_make_no_sense_are_refused() {
    let store = Store::known();
    let inside = store.path().join("log").join("disk.img");
    let segment = store.segment();
    let before = fs::read(&segment).unwrap();
    for (target, says) in [
        (store.beside("").as_path(), "a folder"),
        (Path::new("/dev/null"), "a character device"),
        (store.beside("no/disk.img").as_path(), "no such folder"),
        (inside.as_path(), "inside the store"),
        (segment.as_path(), "inside the store"),
    ] {
        store
            .run(
                "image",
                &["pg", "--at", "latest", "--to", target.to_str().unwrap()],
            )
            .exits(1)
            .says(&[says]);
    }
    assert!(fs::read(&segment).unwrap() == before);
    assert!(!inside.exists());
}

/// Goal: a full disk is told as such, and leaves nothing. Method: an image of 4 MiB of noise to a file system
/// of 1 MiB, once to a new name and once over a file that must stay.
#[test]
fn a_full_disk_leaves_what_was_there_and_nothing_else() {
    if !root_for("a_full_disk_leaves_what_was_there_and_nothing_else") {
        return;
    }
    let store = Store::noisy(1024, "/dev/no-such-device");
    let small = store.beside("small");
    fs::create_dir(&small).unwrap();
    tool(
        "mount",
        [
            "-t",
            "tmpfs",
            "-o",
            "size=1m",
            "cdp-test",
            small.to_str().unwrap(),
        ],
    );
    let unmount = Unmount(&small);
    fs::write(small.join("old.img"), "before").unwrap();
    for name in ["new.img", "old.img"] {
        let target = small.join(name);
        let ran = store.run(
            "image",
            &["pg", "--at", "latest", "--to", target.to_str().unwrap()],
        );
        ran.exits(1)
            .says(&["the disk is full", "up to 4 MiB", "nothing was left behind"]);
    }
    assert_eq!(names_in(&small), ["old.img"]);
    assert_eq!(fs::read(small.join("old.img")).unwrap(), b"before");
    drop(unmount);
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}
