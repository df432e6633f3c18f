//! `ls`, `points` and `diff`: the JSON that scripts rely on, and text that tells the same.

use std::io::Read;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::program::{Ran, command};
use crate::store::{RESIZED_BYTES, Store, time};

#[test]
fn ls_lists_volumes_and_the_store() {
    let store = Store::known();
    let value = store.run("ls", &["--json"]).exits(0).json();
    let volume = &value["volumes"][0];
    assert_eq!(value["volumes"].as_array().unwrap().len(), 1);
    assert_eq!(
        (&volume["name"], &volume["kind"]),
        (&json!("pg"), &json!("block"))
    );
    assert_eq!(
        (&volume["bytes"], &volume["gaps"]),
        (&json!(RESIZED_BYTES), &json!(1))
    );
    assert_eq!(
        (&volume["exact_since"], &volume["exact_until"]),
        (&json!(time(10_000)), &json!(time(13_000)))
    );
    assert_eq!(
        (&value["store"]["records"], &value["store"]["live"]),
        (&json!(15), &json!(false))
    );
    let text = store.run("ls", &[]).exits(0).stdout;
    assert!(
        text.contains("pg") && text.contains("2 MiB") && text.contains("no agent"),
        "{text}"
    );
}

#[test]
fn points_tells_exact_stretches_gaps_and_bookmarks() {
    let store = Store::known();
    let value = store.run("points", &["pg", "--json"]).exits(0).json();
    assert_eq!(value["volume"], "pg");
    assert_eq!(value["kind"], "block");
    assert_eq!(value["bytes"], RESIZED_BYTES);
    let pick = |value: &Value, keys: &[&str]| keys.iter().map(|key| value[key].clone()).collect::<Vec<_>>();
    let stretch = ["from", "to", "from_seq", "to_seq"];
    assert_eq!(value["exact"].as_array().unwrap().len(), 2, "{value:#}");
    assert_eq!(
        pick(&value["exact"][0], &stretch),
        [json!(time(2000)), json!(time(7000)), json!(4), json!(9)]
    );
    assert_eq!(
        pick(&value["exact"][1], &stretch),
        [json!(time(10_000)), json!(time(13_000)), json!(12), json!(15)]
    );
    assert_eq!(value["gaps"].as_array().unwrap().len(), 1, "{value:#}");
    assert_eq!(
        pick(&value["gaps"][0], &["from", "to", "cause"]),
        [json!(time(7000)), json!(time(10_000)), json!("ring-overflow")]
    );
    assert_eq!(
        pick(&value["bookmarks"][0], &["label", "at", "seq"]),
        [json!("before-upgrade"), json!(time(5000)), json!(7)]
    );
}

#[test]
fn points_reads_well() {
    let store = Store::known();
    let text = store.run("points", &["pg"]).exits(0).stdout;
    for part in [
        "pg: block volume, 2 MiB",
        "seq:4 to seq:9",
        "ring-overflow",
        "bookmark:before-upgrade",
        "resized from 1 MiB to 2 MiB",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[test]
fn diff_tells_what_was_written_when_and_by_whom() {
    let store = Store::known();
    let value = store
        .run("diff", &["pg", "--since", "seq:4", "--until", "seq:9", "--json"])
        .exits(0)
        .json();
    assert_eq!(
        (&value["changed_bytes"], &value["writes"]),
        (&json!(8192), &json!(3))
    );
    assert_eq!(value["gaps"], json!([]));
    let range = &value["ranges"][0];
    assert_eq!(
        value["ranges"].as_array().unwrap().len(),
        1,
        "blocks 0 and 1 touch"
    );
    assert_eq!((&range["offset"], &range["bytes"]), (&json!(0), &json!(8192)));
    assert_eq!((&range["writes"], &range["discards"]), (&json!(3), &json!(1)));
    assert_eq!(
        (&range["first_at"], &range["last_at"]),
        (&json!(time(3000)), &json!(time(6000)))
    );
    assert_eq!(
        range["by"],
        json!([{"pid": 4321, "comm": "postgres", "writes": 3}])
    );
    let text = store
        .run("diff", &["pg", "--since", "seq:4", "--until", "seq:9"])
        .exits(0)
        .stdout;
    assert!(
        text.contains("8 KiB by 3 writes in 1 range") && text.contains("postgres[4321]"),
        "{text}"
    );
}

#[test]
fn diff_says_why_no_files_are_told_and_tells_the_rest() {
    let store = Store::known();
    let diff = |more: &[&str]| {
        let arguments = [&["pg", "--since", "seq:4", "--until", "seq:9", "--json"], more].concat();
        store.run("diff", &arguments).exits(0)
    };
    let ran = diff(&[]);
    let value = ran.json();
    assert_eq!(
        (&value["files"], &value["changed_bytes"]),
        (&Value::Null, &json!(8192))
    );
    let why = value["files_unknown"].as_str().unwrap();
    assert!(
        why.contains("no file system to mount") || why.contains("only root"),
        "{why}"
    );
    assert!(ran.stderr.contains(why), "{ran:?}");
    let ran = diff(&["--no-files"]);
    assert_eq!(ran.stderr, "");
    assert_eq!(ran.json()["files"], Value::Null);
    // Nothing changed, so no file did, whatever lies there.
    let value = store
        .run("diff", &["pg", "--since", "seq:9", "--until", "seq:9", "--json"])
        .exits(0)
        .json();
    assert_eq!(value["files"], json!([]));
}

#[test]
fn diff_leaves_out_the_earlier_moment_and_takes_in_the_later() {
    let store = Store::known();
    let writes = |since: &str, until: &str| {
        let value = store
            .run("diff", &["pg", "--since", since, "--until", until, "--json"])
            .exits(0)
            .json();
        value["writes"].as_u64().unwrap()
    };
    assert_eq!(writes("seq:5", "seq:6"), 1);
    assert_eq!(writes("seq:6", "seq:6"), 0);
    assert_eq!(writes(&time(2500), &time(4000)), 2);
}

#[test]
fn diff_over_a_gap_says_so_and_lists_what_was_read_back() {
    let store = Store::known();
    let ran = store
        .run("diff", &["pg", "--since", "seq:9", "--until", "latest", "--json"])
        .exits(0);
    assert!(ran.stderr.starts_with("warning: gap ring-overflow"), "{ran:?}");
    let value = ran.json();
    assert_eq!(value["gaps"][0]["cause"], "ring-overflow");
    let ranges = value["ranges"].as_array().unwrap();
    let of = |offset: u64| ranges.iter().find(|range| range["offset"] == offset).unwrap();
    assert_eq!(
        (&of(4096)["writes"], &of(12_288)["writes"]),
        (&json!(1), &json!(0))
    );
    assert_eq!(of(12_288)["read_backs"], 1);
    assert_eq!(
        (&value["since"]["bytes"], &value["until"]["bytes"]),
        (&json!(1 << 20), &json!(RESIZED_BYTES))
    );
}

#[test]
fn diff_refuses_moments_that_are_not_exact_or_swapped() {
    let store = Store::known();
    store
        .run("diff", &["pg", "--since", "seq:10", "--until", "latest"])
        .exits(3)
        .says(&["ring-overflow"]);
    store
        .run("diff", &["pg", "--since", "latest", "--until", "seq:5"])
        .exits(2)
        .says(&["swap them"]);
}

#[test]
fn a_reader_that_goes_away_is_not_an_error() {
    let store = Store::noisy(64, "/dev/no-such-device");
    for arguments in [
        store.arguments(
            "diff",
            &[
                "pg",
                "--since",
                "seq:3",
                "--until",
                "latest",
                "--no-files",
                "--json",
            ],
        ),
        store.arguments("points", &["pg"]),
        vec!["completions".to_owned(), "bash".to_owned()],
    ] {
        let mut child = command(&arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Closed before the program can have written anything it would wait for.
        drop(child.stdout.take());
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let code = child.wait().unwrap().code();
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
}

#[test]
fn a_volume_that_is_not_there_is_told_with_those_that_are() {
    let store = Store::known();
    for arguments in [&["points", "web01"][..], &["verify", "web01"]] {
        let ran: Ran = store.run(arguments[0], &arguments[1..]);
        ran.exits(1).says(&["no volume \"web01\"", "there is pg"]);
    }
}
