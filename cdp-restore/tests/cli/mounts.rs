//! `mount` and `bisect` of file systems written record by record, among several agents' and with damage.

use std::fs;

use cdp_journal::Seq;

use crate::damage::damage;
use crate::ext4::{History, Image};
use crate::program::{Ran, programs_for, root_for, run};
use crate::store::{Store, noise};

/// A volume whose file `precious` is removed in the middle of its history, and when that was.
fn with_a_loss(store: &Store, folder: &str) -> (Seq, Seq) {
    let image = Image::new(&[("precious", b"mine")]);
    let mut history = History::begin(&store.beside(folder), &image);
    let mut write = |command: &str| {
        image.debugfs(command);
        history.write(&image)
    };
    let mut good = write("mkdir a");
    for name in ["b", "c", "d"] {
        good = write(&format!("mkdir {name}"));
    }
    let bad = write("rm precious");
    write("mkdir e");
    history.close();
    (good, bad)
}

/// Goal: `AGENT/VOLUME` is mounted and searched where two agents have a volume of that name. Method: a server's folder
/// with two; the loss lies in one of them.
#[test]
fn a_volume_of_one_of_several_agents_is_mounted_and_bisected() {
    let name = "a_volume_of_one_of_several_agents_is_mounted_and_bisected";
    if !root_for(name) || !programs_for(name, &["mkfs.ext4", "debugfs"]) {
        return;
    }
    let store = Store::empty();
    let site = store.path();
    fs::create_dir_all(&site).unwrap();
    fs::write(
        site.join("server.json"),
        r#"{"format":1,"created":"2026-01-01T00:00:00Z"}"#,
    )
    .unwrap();
    let mut expected = Vec::new();
    for agent in ["web01", "web02"] {
        let uuid = uuid::Uuid::new_v4();
        expected.push(with_a_loss(&store, &format!("store/agents/{agent}/{uuid}")));
    }
    let dir = store.beside("then");
    fs::create_dir(&dir).unwrap();
    let dir = dir.to_str().unwrap();
    for more in [&[][..], &["--raw"]] {
        let arguments = [&["--at", "latest"][..], more, &["--", "web02/pg", dir]].concat();
        store.run("mount", &arguments).exits(0);
        let shown = if more.is_empty() { "e" } else { "pg.img" };
        assert!(fs::exists(format!("{dir}/{shown}")).unwrap());
        run(["umount", dir]).exits(0);
    }
    store
        .run("mount", &["pg", "--at", "latest", dir])
        .exits(1)
        .says(&["several agents", "web02/pg"]);
    let (good, bad) = expected[1];
    let told = bisect(&store, "web02/pg", good).exits(0).json();
    // Several blocks are written for one change: the very write lies between.
    let first_bad = told["bad"]["seq"].as_u64().unwrap();
    assert!((good.get() + 1..=bad.get()).contains(&first_bad), "{told:#}");
}

fn bisect(store: &Store, volume: &str, good: Seq) -> Ran {
    let good = format!("seq:{good}");
    let check = r#"test -e "$CDP_MOUNT/precious""#;
    let arguments = [
        volume, "--good", &good, "--bad", "latest", "--json", "--", "sh", "-c", check,
    ];
    store.run("bisect", &arguments)
}

/// Goal: a check that was not shown all that it asked for says nothing. Method: damage in what a check reads; with it
/// the file cannot be read, which is not the same as that it is not there.
#[test]
fn a_check_that_met_damage_does_not_count() {
    let name = "a_check_that_met_damage_does_not_count";
    if !root_for(name) || !programs_for(name, &["mkfs.ext4", "debugfs"]) {
        return;
    }
    let store = Store::empty();
    let image = Image::new(&[("precious", &b"mine".repeat(100_000))]);
    let mut history = History::begin(&store.path(), &image);
    let content = image.block_of("precious");
    let good = history.write_block(content, &[b'a'; 4096]);
    history.write_block(content, &noise(77));
    history.write_block(image.blocks() - 1, &[b'd'; 4096]);
    history.close();
    damage(&store, 77);
    let good = format!("seq:{good}");
    let check = r#"cat "$CDP_MOUNT/precious" > /dev/null"#;
    let arguments = ["pg", "--good", &good, "--bad", "latest", "--", "sh", "-c", check];
    let ran = store.run("bisect", &arguments).exits(1);
    assert!(
        ran.stderr.contains("does not count") && ran.stderr.contains("damaged at byte"),
        "{ran:?}"
    );
    // Nor does a mount that fails for a reason of this host's.
    let full = [
        "pg",
        "--good",
        &good,
        "--bad",
        "latest",
        "--layer-dir",
        "/nowhere",
        "--",
        "true",
    ];
    let ran = store.run("bisect", &full).exits(1);
    assert!(
        ran.stderr.contains("/nowhere") && !ran.stderr.contains("counts as bad"),
        "{ran:?}"
    );
}

#[test]
fn a_mount_that_meets_damage_exits_4() {
    if !root_for("a_mount_that_meets_damage_exits_4") {
        return;
    }
    let store = Store::known();
    damage(&store, 5);
    let dir = store.beside("then");
    fs::create_dir(&dir).unwrap();
    let ran = store.run("mount", &["pg", "--at", "seq:6", dir.to_str().unwrap()]);
    ran.exits(4).says(&["damaged at byte"]);
}
