//! `rewind` where no agent runs: all of the device is compared, only what differs is written, all of it is proven.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use sha2::Digest;

use crate::damage::damage;
use crate::device::Loop;
use crate::program::{Ran, root_for};
use crate::store::{BLOCK_BYTES, RESIZED_BYTES, Store, VOLUME_BYTES, known_image};

/// A device that holds `pg` as it was after record 15.
fn later_device(store: &Store) -> Loop {
    let device = Loop::new(store.beside("target"), RESIZED_BYTES);
    write(&device, 0, &known_image(15));
    device
}

fn write(device: &Loop, offset: u64, data: &[u8]) {
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    file.write_all_at(data, offset).unwrap();
    file.sync_all().unwrap();
}

fn rewind(store: &Store, device: &Loop, when: &str, more: &[&str]) -> Ran {
    let arguments = ["pg", "--at", when, "--to", device.text()];
    store.run("rewind", &[&arguments[..], more].concat())
}

fn differing_blocks(one: &[u8], other: &[u8]) -> usize {
    let blocks = one.chunks(BLOCK_BYTES).zip(other.chunks(BLOCK_BYTES));
    blocks.filter(|(one, other)| one != other).count()
}

#[test]
fn a_device_goes_back_by_writing_only_what_differs() {
    if !root_for("a_device_goes_back_by_writing_only_what_differs") {
        return;
    }
    let store = Store::known();
    let device = later_device(&store);
    let mut held = known_image(15);
    for seq in [6, 4, 9, 13, 15, 15, 5] {
        let moment = known_image(seq);
        let ran = rewind(&store, &device, &format!("seq:{seq}"), &["--yes", "--json"]).exits(0);
        let value = ran.json();
        let changed = differing_blocks(&held, &moment) * BLOCK_BYTES;
        assert_eq!(value["changed_bytes"], changed, "seq {seq}: {ran:?}");
        assert_eq!(value["compared_bytes"], moment.len(), "seq {seq}");
        let digest: String = sha2::Sha256::digest(&moment)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            value["proof"],
            serde_json::json!({"kind": "whole", "sha256": digest})
        );
        held[..moment.len()].copy_from_slice(&moment);
        assert!(
            fs::read(&device.path).unwrap() == held,
            "seq {seq}, what lies beyond included"
        );
        assert!(
            ran.stderr.contains("no agent protects") && ran.stderr.contains("seq:15"),
            "{ran:?}"
        );
        assert_eq!(value["undo"], serde_json::Value::Null);
    }
    let text = rewind(&store, &device, "seq:6", &["--yes"]).exits(0).stdout;
    assert!(
        text.contains("were written") && text.contains("proven: "),
        "{text}"
    );
}

/// Goal: single sectors and strangers' bytes anywhere are found. Method: one byte changed in the first, an inner and the
/// last sector, once where the moment is zero and once where it is not.
#[test]
fn one_byte_anywhere_is_found_and_put_right() {
    if !root_for("one_byte_anywhere_is_found_and_put_right") {
        return;
    }
    let store = Store::known();
    let device = later_device(&store);
    rewind(&store, &device, "seq:6", &["--yes"]).exits(0);
    for offset in [0, 4096 + 512, 9 * 4096 + 4095, 100 * 4096, VOLUME_BYTES - 1] {
        write(&device, offset, &[0x77]);
        let value = rewind(&store, &device, "seq:6", &["--yes", "--json"])
            .exits(0)
            .json();
        assert_eq!(value["changed_bytes"], BLOCK_BYTES, "offset {offset}");
        assert!(
            fs::read(&device.path).unwrap()[..VOLUME_BYTES as usize] == known_image(6),
            "offset {offset}"
        );
    }
}

#[test]
fn nothing_is_written_unasked_or_dry() {
    if !root_for("nothing_is_written_unasked_or_dry") {
        return;
    }
    let store = Store::known();
    let device = later_device(&store);
    rewind(&store, &device, "seq:6", &[]).exits(1).says(&["--yes"]);
    let ran = rewind(&store, &device, "seq:6", &["--dry-run", "--json"]).exits(0);
    let changed = differing_blocks(&known_image(15), &known_image(6)) * BLOCK_BYTES;
    assert_eq!(ran.json()["changed_bytes"], changed);
    rewind(&store, &device, "seq:10", &["--yes"]).exits(3);
    let file = store.beside("file.img");
    fs::write(&file, "mine").unwrap();
    let ran = store.run(
        "rewind",
        &["pg", "--at", "seq:6", "--to", file.to_str().unwrap(), "--yes"],
    );
    ran.exits(1).says(&["is not a device"]);
    assert!(fs::read(&device.path).unwrap() == known_image(15));
    let small = Loop::new(store.beside("small"), 512 << 10);
    rewind(&store, &small, "seq:6", &["--yes"])
        .exits(1)
        .says(&["512 KiB", "1 MiB"]);
    assert!(small.is_untouched());
}

#[test]
fn damage_is_found_before_anything_is_written() {
    if !root_for("damage_is_found_before_anything_is_written") {
        return;
    }
    let store = Store::known();
    let device = later_device(&store);
    damage(&store, 5);
    let ran = rewind(&store, &device, "seq:6", &["--yes"]).exits(4);
    assert!(
        ran.stderr.contains("damaged at byte") && ran.stderr.contains("nothing was written"),
        "{ran:?}"
    );
    assert!(fs::read(&device.path).unwrap() == known_image(15));
    rewind(&store, &device, "seq:8", &["--yes"]).exits(0);
    assert!(fs::read(&device.path).unwrap()[..VOLUME_BYTES as usize] == known_image(8));
}
