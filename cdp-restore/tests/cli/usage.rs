//! The command line itself: usage errors, help, completions, sources that are not stores.

use crate::program::run;
use crate::store::Store;

#[test]
fn wrong_usage_exits_2() {
    for arguments in [
        &[][..],
        &["frobnicate"],
        &["ls"],
        &["image", "--from", "/tmp", "pg", "--to", "x.img"],
        &[
            "image",
            "--from",
            "/tmp",
            "pg",
            "--at",
            "yesterday",
            "--to",
            "x.img",
        ],
        &["image", "--from", "/tmp", "pg", "--at", "seq:0", "--to", "x.img"],
        &["diff", "--from", "/tmp", "pg", "--since", "latest"],
        &["verify", "--from", "/tmp", "--at", "latest"],
        &["completions", "tcl"],
    ] {
        let ran = run(arguments).exits(2);
        assert_eq!(ran.stdout, "", "{arguments:?}");
        assert!(!ran.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn help_shows_examples_and_every_form_of_when() {
    let help = run(["--help"]).exits(0).stdout;
    assert!(
        help.contains("Examples:") && help.contains("Exit codes:"),
        "{help}"
    );
    for command in ["image", "diff", "verify"] {
        let help = run([command, "--help"]).exits(0).stdout;
        for part in [
            "Examples:",
            "latest",
            "RFC 3339",
            "-90s",
            "seq:123456",
            "bookmark:LABEL",
        ] {
            assert!(help.contains(part), "no {part:?} in the help of {command}");
        }
    }
    let version = run(["--version"]).exits(0).stdout;
    assert_eq!(version, format!("cdp-restore {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn every_shell_has_its_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(["completions", shell]).exits(0).stdout;
        assert!(
            script.contains("cdp-restore") && script.contains("points"),
            "{shell}"
        );
    }
}

#[test]
fn a_source_that_is_not_a_store_is_told_apart() {
    let store = Store::known();
    let log = store.path().join("log");
    let missing = store.beside("missing");
    for (from, code, says) in [
        ("dr1:7443", 2, "--identity"),
        (missing.to_str().unwrap(), 1, "no such folder"),
        (log.to_str().unwrap(), 1, "store.json"),
    ] {
        run(["ls", "--from", from]).exits(code).says(&[says]);
    }
    assert_eq!(crate::program::names_in(&log).len(), 1, "nothing was made there");
}

#[test]
fn messages_are_json_lines_where_asked_for() {
    let store = Store::known();
    let path = store.path();
    let ran = run([
        "--log-format",
        "json",
        "points",
        "--from",
        path.to_str().unwrap(),
        "web01",
    ])
    .exits(1);
    let line: serde_json::Value = serde_json::from_str(ran.stderr.trim()).unwrap();
    assert_eq!(
        (&line["level"], &line["fields"]["exit_code"]),
        (&"ERROR".into(), &1.into())
    );
    assert!(
        line["fields"]["message"].as_str().unwrap().contains("web01"),
        "{line}"
    );
}

#[test]
fn quiet_keeps_errors_and_drops_the_rest() {
    let store = Store::known();
    let arguments = ["pg", "--since", "seq:9", "--until", "latest", "-q"];
    assert_eq!(store.run("diff", &arguments).exits(0).stderr, "");
    store
        .run("points", &["web01", "-q"])
        .exits(1)
        .says(&["no volume"]);
}
