//! Reading beside a writer: everything durable is seen, and the store is not touched.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use cdp_journal::WallNs;
use cdp_journal::format::Body;

use crate::program::command;
use crate::store::{BLOCK_BYTES, Store, Writing, noise};

/// Every file below a folder with its length and time of change.
pub(crate) fn files_below(folder: &Path) -> BTreeMap<PathBuf, (u64, std::time::SystemTime)> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let (path, metadata) = entry
            .map(|entry| (entry.path(), entry.metadata().unwrap()))
            .unwrap();
        if metadata.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.insert(path, (metadata.len(), metadata.modified().unwrap()));
        }
    }
    files
}

#[test]
fn what_is_durable_is_seen_beside_a_live_writer() {
    let store = Store::known();
    let mut writing = Writing::open(&store.path());
    assert_eq!(
        store.run("ls", &["--json"]).exits(0).json()["store"]["live"],
        true
    );
    for number in 20..24 {
        let seq = writing.write(20_000, 5 * BLOCK_BYTES as u64, &noise(number));
        let image = store.image("latest").unwrap();
        assert!(
            image[5 * BLOCK_BYTES..6 * BLOCK_BYTES] == noise(number),
            "seq {seq} is not in latest"
        );
    }
}

#[test]
fn reading_leaves_the_store_as_it_is() {
    let store = Store::known();
    let before = files_below(&store.path());
    store.image("latest").unwrap();
    for arguments in [&["ls"][..], &["points", "pg"], &["verify"], &["verify", "pg"]] {
        store.run(arguments[0], &arguments[1..]).exits(0);
    }
    assert_eq!(files_below(&store.path()), before);
}

/// Goal: a moment that has just come is waited for. Method: ask for one that the log does not cover yet while
/// a writer goes on adding ticks of the present, until the program ends.
#[test]
fn a_moment_that_is_about_to_be_covered_is_waited_for() {
    let store = Store::known();
    let mut writing = Writing::open(&store.path());
    writing.add_at(WallNs::now(), None, Body::Tick, &[]);
    let when = WallNs::now()
        .saturating_add(Duration::from_millis(300))
        .to_string();
    let target = store.beside("disk.img");
    let arguments = store.arguments("image", &["pg", "--at", &when, "--to", target.to_str().unwrap()]);
    let mut child = command(arguments).stdout(Stdio::null()).spawn().unwrap();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        writing.add_at(WallNs::now(), None, Body::Tick, &[]);
    };
    assert!(status.success());
    assert!(target.exists());
}
