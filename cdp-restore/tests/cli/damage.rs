//! Damage and other people's stores: named, never returned.

use std::fs;

use serde_json::Value;

use crate::program::names_in;
use crate::store::{Store, known_image, noise, time};

/// Flips a bit in the middle of what noise(`seed`) became in the log; returns where.
pub(crate) fn damage(store: &Store, seed: u64) -> u64 {
    let path = store.segment();
    let mut bytes = fs::read(&path).unwrap();
    let pattern = &noise(seed)[1000..1064];
    let at = bytes
        .windows(pattern.len())
        .position(|window| window == pattern)
        .expect("noise is stored plain");
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    at as u64
}

#[test]
fn a_sound_store_verifies() {
    let store = Store::known();
    let value = store.run("verify", &["--json"]).exits(0).json();
    assert_eq!(
        (&value["ok"], &value["log"]["records"]),
        (&true.into(), &15.into())
    );
    let text = store.run("verify", &[]).exits(0).stdout;
    assert!(text.contains("15 records") && text.contains("all good"), "{text}");
    let text = store.run("verify", &["pg"]).exits(0).stdout;
    assert!(text.contains("pg at") && text.contains("all good"), "{text}");
}

#[test]
fn the_digest_of_a_moment_is_that_of_its_image() {
    use sha2::Digest;
    let store = Store::known();
    for seq in [5, 8, 15] {
        let expected: String = sha2::Sha256::digest(known_image(seq))
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let when = format!("seq:{seq}");
        let text = store
            .run("verify", &["pg", "--at", &when, "--sha256"])
            .exits(0)
            .stdout;
        assert!(text.ends_with(&format!("sha256 {expected}\n")), "{text}");
        for threads in ["1", "7"] {
            let arguments = ["pg", "--at", &when, "--sha256", "--json", "--threads", threads];
            let value = store.run("verify", &arguments).exits(0).json();
            assert_eq!(value["moment"]["sha256"], expected.as_str(), "{threads} threads");
        }
    }
}

#[test]
fn damage_is_named_and_never_returned() {
    let store = Store::known();
    let at = damage(&store, 5);
    let segment = store.segment();
    let name = segment.file_name().unwrap().to_str().unwrap();
    fs::write(store.beside("disk.img"), "before").unwrap();
    let ran = store.image("seq:5").unwrap_err().exits(4);
    ran.says(&[name, "damaged"]);
    assert_eq!(fs::read(store.beside("disk.img")).unwrap(), b"before");
    assert_eq!(names_in(&store.beside("")), ["disk.img", "store"]);

    let names = |value: &Value| {
        let damage = &value["damages"][0];
        assert_eq!(value["ok"], false);
        assert_eq!(value["damages"].as_array().unwrap().len(), 1, "{value:#}");
        assert!(damage["segment"].as_str().unwrap().ends_with(name), "{value:#}");
        let offset = damage["offset"].as_u64().unwrap();
        assert!(
            offset <= at && at - offset < 8192,
            "the damage is at byte {at}: {value:#}"
        );
        assert_eq!(
            (&damage["from_seq"], &damage["from"]),
            (&5.into(), &time(3000).into()),
            "{value:#}"
        );
    };
    let log = store.run("verify", &["--json"]).exits(4);
    assert!(log.stderr.starts_with("error: "), "{log:?}");
    names(&log.json());
    for more in [&["--json"][..], &["--json", "--sha256"]] {
        let volume = store
            .run("verify", &[&["pg", "--at", "seq:5"], more].concat())
            .exits(4);
        names(&volume.json());
        assert_eq!(volume.json()["damages"][0]["volume_offset"], 0);
    }
    let text = store.run("verify", &[]).exits(4).stdout;
    assert!(text.starts_with("damaged: ") && text.contains("seq:5"), "{text}");
}

#[test]
fn moments_that_do_not_need_the_damaged_bytes_can_be_restored() {
    let store = Store::known();
    damage(&store, 5);
    for seq in [4, 8, 15] {
        let image = store
            .image(&format!("seq:{seq}"))
            .unwrap_or_else(|ran| panic!("seq {seq}: {ran:#?}"));
        assert!(image == known_image(seq), "seq {seq}");
    }
    store.run("verify", &["pg"]).exits(0);
}

#[test]
fn a_store_of_a_newer_format_is_left_alone() {
    let store = Store::known();
    let path = store.path().join("store.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    value["format"] = 99.into();
    fs::write(&path, value.to_string()).unwrap();
    for arguments in [&["ls"][..], &["points", "pg"], &["verify"], &["verify", "pg"]] {
        let ran = store.run(arguments[0], &arguments[1..]).exits(1);
        ran.says(&["store.json", "format 99", "up to 1"]);
    }
    store.image("latest").unwrap_err().exits(1).says(&["format 99"]);
    assert_eq!(names_in(&store.beside("")), ["store"]);
}

#[test]
fn a_segment_of_a_newer_format_asks_for_an_upgrade() {
    let store = Store::known();
    let mut bytes = fs::read(store.segment()).unwrap();
    bytes[4] = 99;
    fs::write(store.segment(), bytes).unwrap();
    let told = [".seg", "format 99", "up to 2", "upgrade"];
    store.run("verify", &[]).exits(1).says(&told);
    // Without an index, every command has to read the log.
    fs::remove_dir_all(store.path().join("index")).unwrap();
    for arguments in [&["ls"][..], &["points", "pg"], &["verify"], &["verify", "pg"]] {
        store.run(arguments[0], &arguments[1..]).exits(1).says(&told);
    }
    store.image("latest").unwrap_err().exits(1).says(&told);
}
