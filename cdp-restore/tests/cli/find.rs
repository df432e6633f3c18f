//! `find`: every write of the bytes, wherever in it they lie, and no other.

use cdp_journal::format::Body;

use crate::damage::damage;
use crate::store::{Store, Writing, noise, time, volume};

const PATTERN: &str = "DROP TABLE orders";

/// Noise of so many blocks with the pattern at some places.
fn planted(seed: u64, blocks: u64, places: &[usize]) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..blocks).flat_map(|block| noise(seed + block)).collect();
    for place in places {
        bytes[*place..*place + PATTERN.len()].copy_from_slice(PATTERN.as_bytes());
    }
    bytes
}

/// What `find` tells, as (seq, offset).
fn found(store: &Store, more: &[&str]) -> Vec<(u64, u64)> {
    let ran = store.run("find", &[&["pg", "--json"], more].concat()).exits(0);
    let value = ran.json();
    let hits = value["hits"].as_array().unwrap().iter();
    hits.map(|hit| (hit["seq"].as_u64().unwrap(), hit["offset"].as_u64().unwrap()))
        .collect()
}

/// A store of 4 MiB with the pattern in it: what must be found.
fn store() -> (Store, Vec<(u64, u64)>) {
    let store = Store::empty();
    let mut writing = Writing::open(&store.path());
    writing.begin(4 << 20, "/dev/no-such-device");
    let mut expected = Vec::new();
    let read_back = Body::ReadBack {
        offset: 8192,
        len: 4096,
        as_of: None,
    };
    let seq = writing.add(1000, Some(volume(1)), read_back, &planted(1, 1, &[77]));
    expected.push((seq.get(), 8192 + 77));
    writing.add(2000, Some(volume(1)), Body::GapClose, &[]);
    // In the middle, at both ends, over the borders of blocks and of groups.
    let places = [
        0,
        4090,
        65536 - 3,
        100_001,
        131_072 - 1,
        (64 << 12) - PATTERN.len(),
    ];
    let seq = writing.write(3000, 1 << 20, &planted(100, 64, &places));
    expected.extend(places.map(|place| (seq.get(), (1 << 20) + place as u64)));
    // Of another volume, and none at all.
    let other = Body::Write { offset: 0, len: 4096 };
    writing.add(4000, Some(volume(2)), other, &planted(200, 1, &[9]));
    writing.write(5000, 0, &planted(300, 1, &[]));
    // One write in records that follow each other, others in between: cut within the pattern, twice.
    let bytes = planted(400, 3, &[4096 - 5, 8192 - 9]);
    writing.write(6000, 2 << 20, &bytes[..4096]);
    writing.write(6000, 3 << 20, &noise(7));
    let second = writing.write(6000, (2 << 20) + 4096, &bytes[4096..8192]);
    let third = writing.write(6000, (2 << 20) + 8192, &bytes[8192..]);
    expected.push((second.get(), (2 << 20) + 4096 - 5));
    expected.push((third.get(), (2 << 20) + 8192 - 9));
    writing.close();
    (store, expected)
}

#[test]
fn every_place_is_found_and_no_other() {
    let (store, expected) = store();
    let hex: String = PATTERN.bytes().map(|byte| format!("{byte:02x}")).collect();
    for threads in ["1", "2", "7"] {
        assert_eq!(
            found(&store, &["--bytes", PATTERN, "--threads", threads]),
            expected
        );
        let hex = format!("0x{hex}");
        assert_eq!(found(&store, &["--bytes", &hex, "--threads", threads]), expected);
    }
    assert_eq!(found(&store, &["--bytes", "DROP TABLE customers"]), []);
}

#[test]
fn time_process_and_origin_are_told() {
    let (store, expected) = store();
    let value = store
        .run("find", &["pg", "--bytes", PATTERN, "--json"])
        .exits(0)
        .json();
    let hit = &value["hits"][1];
    assert_eq!((&hit["pid"], &hit["comm"]), (&4321.into(), &"postgres".into()));
    assert_eq!(hit["at"], "2026-01-02T03:04:08.000000000Z");
    assert_eq!(
        (&value["hits"][0]["read_back"], &hit["read_back"]),
        (&true.into(), &false.into())
    );
    let text = store.run("find", &["pg", "--bytes", PATTERN]).exits(0).stdout;
    assert!(
        text.starts_with(&format!("pg: {} hits in ", expected.len())),
        "{text}"
    );
    assert!(
        text.contains("postgres[4321]") && text.contains("read back"),
        "{text}"
    );
}

/// Goal: of each hit it is told with which record its bytes were gone. Method: bytes written over by others, by
/// themselves, by a part of themselves, discarded, and cut off by a smaller size.
#[test]
fn the_record_with_which_bytes_were_gone_is_told() {
    let store = Store::empty();
    let mut writing = Writing::open(&store.path());
    writing.begin(4 << 20, "/dev/no-such-device");
    writing.add(1000, Some(volume(1)), Body::GapClose, &[]);
    let bytes = planted(1, 2, &[100, 4096 + 7]);
    let first = writing.write(2000, 0, &bytes);
    let same = writing.write(3000, 4096, &bytes[4096..]);
    let last = writing.write(4000, 3 << 20, &bytes[..4096]);
    // Beside it, over it in part with the same bytes, and over the other one.
    writing.write(5000, 8192, &noise(50));
    writing.write(6000, 4096, &bytes[4096..4096 + 512]);
    let over = writing.write(7000, 0, &noise(60));
    let discarded = writing.add(
        8000,
        Some(volume(1)),
        Body::Discard {
            offset: 4096,
            len: 4096,
        },
        &[],
    );
    let cut = writing.add(9000, Some(volume(1)), Body::Resize { bytes: 1 << 20 }, &[]);
    writing.close();
    let told = |more: &[&str]| {
        let arguments = [&["pg", "--bytes", PATTERN, "--json"], more].concat();
        let value = store.run("find", &arguments).exits(0).json();
        let hits = value["hits"].as_array().unwrap().iter();
        let told = hits.map(|hit| {
            assert_eq!(hit["gone_at"].is_null(), hit["gone_seq"].is_null());
            let still_there = hit["still_there"].as_bool().unwrap();
            (
                hit["seq"].as_u64().unwrap(),
                hit["gone_seq"].as_u64(),
                still_there,
            )
        });
        told.collect::<Vec<_>>()
    };
    let again = over.get() - 1;
    let gone = |hit: u64, by: u64| (hit, Some(by), false);
    assert_eq!(
        told(&[]),
        [
            gone(first.get(), over.get()),
            gone(first.get(), discarded.get()),
            gone(same.get(), discarded.get()),
            gone(last.get(), cut.get()),
            gone(again, discarded.get()),
        ]
    );
    let there = |hit: u64| (hit, None, true);
    let until = told(&["--until", &time(7000)]);
    assert_eq!(until[0], gone(first.get(), over.get()));
    assert_eq!(
        until[1..],
        [first, same, last]
            .map(|hit| there(hit.get()))
            .into_iter()
            .chain([there(again)])
            .collect::<Vec<_>>()
    );
    // Where not every hit is told, not every change is looked at.
    let few = told(&["--hits-max", "2"]);
    assert_eq!(few, [(first.get(), None, false), (first.get(), None, false)]);
    let text = store
        .run("find", &["pg", "--bytes", PATTERN, "--until", &time(7000)])
        .exits(0)
        .stdout;
    assert!(text.contains("GONE") && text.contains("still there"), "{text}");
}

#[test]
fn a_stretch_of_time_and_a_number_of_hits_bound_it() {
    let (store, expected) = store();
    let between =
        |since: &str, until: &str| found(&store, &["--bytes", PATTERN, "--since", since, "--until", until]);
    assert_eq!(between(&time(2000), &time(3000)), expected[1..7]);
    assert_eq!(between(&time(3000), "latest"), expected[7..]);
    assert_eq!(between("seq:1", &time(2000)), expected[..1]);
    let ran = store
        .run("find", &["pg", "--bytes", PATTERN, "--hits-max", "3", "--json"])
        .exits(0);
    assert_eq!(ran.json()["hits"].as_array().unwrap().len(), 3);
    assert_eq!(ran.json()["truncated"], true);
    assert!(ran.stderr.contains("more than 3 hits"), "{ran:?}");
    store
        .run(
            "find",
            &["pg", "--bytes", PATTERN, "--since", "latest", "--until", "seq:2"],
        )
        .exits(2);
    for wrong in ["", "0x", "0x1", "0xzz"] {
        store.run("find", &["pg", "--bytes", wrong]).exits(2);
    }
}

#[test]
fn damage_ends_the_search_and_is_named() {
    let store = Store::known();
    damage(&store, 5);
    store
        .run("find", &["pg", "--bytes", PATTERN])
        .exits(4)
        .says(&["damaged"]);
    store
        .run("find", &["pg", "--bytes", PATTERN, "--since", "seq:5"])
        .exits(0);
}
