//! `files` where nobody may mount: an ext4 is read by the program itself.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use cdp_journal::format::Body;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat};

use crate::ext4::Image;
use crate::files::{Scene, expect_nothing_left, facts};
use crate::program::{Ran, Rights, names_in, programs_for, root_for, tool};
use crate::store::{BLOCK_BYTES, Store, Writing, volume};

const HOLES_BYTES: u64 = 1_000_000;

/// What only some file systems have, and only some users may make.
fn add_more(tree: &Path) {
    let holes = File::create(tree.join("holes")).unwrap();
    for block in [2, 7, 100] {
        holes.write_all_at(&[7; 4096], block * 8192).unwrap();
    }
    holes.set_len(HOLES_BYTES).unwrap();
    fs::create_dir(tree.join("shut")).unwrap();
    fs::write(tree.join("shut/in"), "in").unwrap();
    fs::write(tree.join("as another"), "program").unwrap();
    chown(tree.join("as another"), Some(1234), Some(2345)).unwrap();
    for (name, mode) in [("shut", 0o555), ("as another", 0o4755)] {
        fs::set_permissions(tree.join(name), Permissions::from_mode(mode)).unwrap();
    }
    let special = |name: &str, kind, device| {
        mknodat(CWD, tree.join(name), kind, Mode::RUSR | Mode::WGRP, device).unwrap();
    };
    special("pipe", FileType::Fifo, 0);
    special("socket", FileType::Socket, 0);
    fs::create_dir(tree.join("dev")).unwrap();
    special("dev/terminal", FileType::CharacterDevice, makedev(5, 1));
    special("dev/disk", FileType::BlockDevice, makedev(259, 70_000));
}

/// Goal: who may do all but mount gets what a mount would have given. Method: a tree with something of everything,
/// copied whole, in part, and as it was later.
#[test]
fn without_a_mount_paths_come_back_as_they_were() {
    let Some(scene) = Scene::with("without_a_mount_paths_come_back_as_they_were", add_more) else {
        return;
    };
    let to = scene.store.beside("to");
    fs::create_dir(&to).unwrap();
    let whole = to.join("whole");
    let files = |when: &str, to: &Path, more: &[&str]| {
        let ran = scene.files_with(Rights::NoMounts, when, to, more).exits(0);
        assert_eq!(ran.stderr, "", "{ran:?}");
        ran
    };
    let told = files(&scene.first, &whole, &["--json"]).json();
    // Two names of one file are two.
    let (expected, found) = (facts(&scene.tree), facts(&whole));
    for (path, facts) in expected.iter().filter(|(path, _)| path.as_os_str() != "") {
        let found = &found[path];
        assert!(found == facts, "{}: {found:?} for {facts:?}", path.display());
    }
    assert_eq!(found.len(), expected.len());
    assert_eq!(
        (
            &told["files"],
            &told["owners_not_kept"],
            &told["attributes_not_kept"]
        ),
        (&6.into(), &0.into(), &0.into()),
        "{told:#}"
    );
    let holes = fs::metadata(whole.join("holes")).unwrap();
    assert!(
        holes.len() == HOLES_BYTES && holes.blocks() * 512 <= 3 * 4096,
        "{} bytes of it are on the disk",
        holes.blocks() * 512
    );
    let mut colour = [0; 16];
    let bytes = rustix::fs::getxattr(whole.join("home/ann/letter"), "user.colour", &mut colour).unwrap();
    assert_eq!(&colour[..bytes], b"blue");

    let part = to.join("part");
    files(&scene.first, &part, &["home/ann/letter", "/out", "home/ann/link"]);
    let names: Vec<_> = facts(&part).into_keys().collect();
    let expected = ["", "home", "home/ann", "home/ann/letter", "home/ann/link", "out"];
    assert_eq!(names, expected.map(PathBuf::from));
    let mode = |folder: &Path| fs::metadata(folder.join("home/ann")).unwrap().mode();
    assert_eq!(mode(&part), mode(&scene.tree));
    let later = to.join("later");
    files("latest", &later, &["home"]);
    assert!(!later.join("home/ann/link").is_symlink() && later.join("home/ann/letter").is_file());
    let large = |folder: &Path| fs::read(folder.join("home/ann/large")).unwrap();
    assert!(large(&later) != large(&whole));
}

/// Goal: any user gets everything that users may make, hears what they may not, and is not given what a file could do as
/// its owner. Method: the same tree; then with what only root may make.
#[test]
fn any_user_gets_what_users_may_have() {
    let name = "any_user_gets_what_users_may_have";
    let Some(scene) = Scene::with(name, |tree| {
        add_more(tree);
        let trusted = rustix::fs::setxattr(tree.join("holes"), "trusted.mark", b"x", XattrFlags::empty());
        trusted.unwrap();
    }) else {
        return;
    };
    let to = scene.store.beside("to");
    fs::create_dir(&to).unwrap();
    let then = to.join("then");
    let files = |more: &[&str]| scene.files_with(Rights::User, &scene.first, &then, more);
    // What was there is closed to its new owner, and gone all the same.
    files(&[])
        .exits(1)
        .says(&["dev/", "device, which only root may make", "run this as root"]);
    assert_eq!(names_in(&to), [""; 0]);
    let all = ["home", "holes", "shut", "as another", "pipe", "socket", "out"];
    let ran = files(&[&all[..], &["--json"]].concat()).exits(0);
    let warnings: Vec<_> = ran.stderr.lines().collect();
    // The folder, the letter and the program; both names of the letter are one file.
    assert_eq!(ran.json()["owners_not_kept"], 3, "{ran:?}");
    assert_eq!(ran.json()["attributes_not_kept"], 1, "{ran:?}");
    assert!(
        warnings.len() == 2
            && warnings[0].starts_with("warning: 3 paths")
            && warnings[1].contains("trusted.mark of holes"),
        "{ran:?}"
    );
    let found = facts(&then);
    for (path, (mode, uid, time, content, links)) in facts(&scene.tree) {
        if path.starts_with("dev") || path.as_os_str() == "" {
            continue;
        }
        let (mode, time) = if uid == 0 {
            (mode, time)
        } else {
            (mode & !0o7000, time)
        };
        assert!(
            found[&path] == (mode, 0, time, content, links),
            "{}: {:?}",
            path.display(),
            found[&path]
        );
    }
}

#[test]
fn without_a_mount_what_cannot_be_copied_leaves_nothing() {
    if let Some(scene) = Scene::with("without_a_mount_what_cannot_be_copied_leaves_nothing", |_| {}) {
        expect_nothing_left(&scene, Rights::User);
    }
}

/// Goal: partitions are told apart as by a mount, and what is no ext4 is named. Method: a disk with an ext4 and what
/// begins like an xfs.
#[test]
fn partitions_are_folders_and_other_file_systems_are_named() {
    let name = "partitions_are_folders_and_other_file_systems_are_named";
    if !root_for(name) || !programs_for(name, &["mkfs.ext4", "debugfs", "sfdisk", "setpriv"]) {
        return;
    }
    let store = Store::empty();
    let disk = store.beside("disk");
    let bytes = 8 << 20;
    File::create(&disk).unwrap().set_len(bytes).unwrap();
    let script = store.beside("script");
    fs::write(&script, "label: gpt\nstart=2048,size=4MiB\nsize=1MiB\n").unwrap();
    let (disk_name, script_name) = (disk.to_str().unwrap(), script.to_str().unwrap());
    tool("sh", ["-c", "sfdisk -q \"$0\" < \"$1\"", disk_name, script_name]);
    let image = Image::new(&[("a/letter", b"dear Bob")]);
    let file = File::options().read(true).write(true).open(&disk).unwrap();
    file.write_all_at(&image.read(), 1 << 20).unwrap();
    file.write_all_at(b"XFSB", 5 << 20).unwrap();
    let mut writing = Writing::open(&store.path());
    writing.begin(bytes, "/dev/no-such-device");
    for (number, block) in (0..).zip(fs::read(&disk).unwrap().chunks(BLOCK_BYTES)) {
        if block.iter().any(|byte| *byte != 0) {
            writing.write(1000, number * BLOCK_BYTES as u64, block);
        }
    }
    writing.add(2000, Some(volume(1)), Body::GapClose, &[]);
    writing.close();
    let to = store.beside("to");
    fs::create_dir(&to).unwrap();
    let then = to.join("then");
    let files = |paths: &[&str]| {
        let arguments = ["pg", "--at", "latest", "--to", then.to_str().unwrap()];
        let arguments = store.arguments("files", &[&arguments[..], paths].concat());
        Ran::from(Rights::User.command(arguments).output().unwrap())
    };
    files(&["p1", "p2"])
        .exits(1)
        .says(&["xfs in partition 2", "run this as root"]);
    files(&["a"]).exits(1).says(&["paths begin with one of p1, p2"]);
    assert_eq!(names_in(&to), [""; 0]);
    files(&["p1/a/letter"]).exits(0);
    assert_eq!(fs::read(then.join("p1/a/letter")).unwrap(), b"dear Bob");
}
