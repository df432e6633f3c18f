//! Running the binary, and what a test may need root for.

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// `cdp-restore`, with nothing to read on stdin and its times in UTC.
pub(crate) fn command<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cdp-restore"));
    command.args(arguments).stdin(Stdio::null()).env("TZ", "UTC");
    command
}

/// What the program may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    /// What the test may.
    All,
    /// The same, but not mount.
    NoMounts,
    /// What any user may.
    User,
}

impl Rights {
    /// `cdp-restore` with these rights.
    pub(crate) fn command<S: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = S>) -> Command {
        let taken = match self {
            Rights::All => return command(arguments),
            Rights::NoMounts => "-sys_admin",
            Rights::User => "-all",
        };
        let mut command = Command::new("setpriv");
        let taken = [format!("--bounding-set={taken}"), format!("--inh-caps={taken}")];
        command.args(taken).arg(env!("CARGO_BIN_EXE_cdp-restore"));
        command.args(arguments).stdin(Stdio::null()).env("TZ", "UTC");
        command
    }
}

/// Runs it to its end.
pub(crate) fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ran {
    Ran::from(command(arguments).output().unwrap())
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    /// It must have ended with that code.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }

    /// It must say every one of these on stderr, in one message.
    #[track_caller]
    pub(crate) fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in {self:#?}");
        }
        assert!(self.stderr.starts_with("error: "), "{self:#?}");
        assert_eq!(self.stdout, "", "an error goes to stderr only: {self:#?}");
        self
    }

    /// Its stdout, read as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }
}

/// Names of everything in a folder.
pub(crate) fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Whether a test that needs root can run. Where it cannot it says so, and fails under CI.
pub(crate) fn root_for(test: &str) -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        skip(test, "not root");
    }
    is_root
}

/// Whether a test that needs these programs can run. Where it cannot it says so, and fails under CI.
pub(crate) fn programs_for(test: &str, programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_here = |name: &&&str| std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    let missing: Vec<_> = programs.iter().filter(|name| !is_here(name)).copied().collect();
    if !missing.is_empty() {
        let why = format!(
            "not installed: {} (cargo xtask setup gets them)",
            missing.join(", ")
        );
        skip(test, &why);
    }
    missing.is_empty()
}

pub(crate) fn skip(test: &str, why: &str) {
    assert!(
        std::env::var_os("CI").is_none_or(|ci| ci != "true"),
        "{test} cannot run here: {why}, and CI=true"
    );
    // Written past the test runner, which would keep it to itself.
    let _ = writeln!(std::io::stderr(), "\n    SKIPPED  {test}: {why}\n");
}

/// Runs a tool that must succeed and returns what it printed.
#[track_caller]
pub(crate) fn tool<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
