//! `cargo xtask test`: every test of the workspace, and a summary that hides nothing.
//!
//! The crates' own tests run in parallel. Those of the whole system (`cdp-tests`) share one kernel, its
//! loop devices and its probe, so they run one after the other, against the release binaries.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::sh;
use crate::workspace::Workspace;

/// The package of the tests of the whole system.
const SYSTEM_TESTS: &str = "cdp-tests";

/// What to run.
#[derive(clap::Args, Default)]
pub(crate) struct TestArgs {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Only the crates' own tests: no root, no devices
    #[arg(long, conflicts_with = "root")]
    unit: bool,
    /// Only the tests of the whole system: real devices, file systems and databases
    #[arg(long)]
    root: bool,
}

/// Builds the binaries and runs the tests; fails if one fails, or if none has the wanted name.
pub(crate) fn run(workspace: &Workspace, args: &TestArgs) -> Result<()> {
    let start = Instant::now();
    sh::step("build the binaries", || {
        let mut build = workspace.cargo("build");
        build.arg("--release");
        if args.root {
            for package in ["cdp-agent", "cdp-journal", "cdp-restore"] {
                build.args(["--package", package]);
            }
        } else {
            // Together with the tests: built apart, they differ in the features of what they depend on,
            // and much would be compiled twice.
            build.args(["--workspace", "--exclude", SYSTEM_TESTS, "--all-targets"]);
        }
        sh::run(&mut build)
    })?;
    let mut parts = Vec::new();
    if !args.root {
        let mut cargo = cargo_test(workspace);
        cargo.args(["--workspace", "--exclude", SYSTEM_TESTS]);
        parts.push(Part::run("crates", cargo, args.filter.as_deref(), &[])?);
    }
    if !args.unit {
        let mut cargo = cargo_test(workspace);
        cargo.args(["--package", SYSTEM_TESTS]);
        parts.push(Part::run(
            "whole system",
            cargo,
            args.filter.as_deref(),
            &["--test-threads=1"],
        )?);
    }
    for line in summary(&parts, start.elapsed()) {
        println!("{line}");
    }
    verdict(&parts, args.filter.as_deref())
}

/// For how long a CI machine runs the simulator (`cdp-agent/src/recorder/sim/`), unless it is told otherwise.
const CI_SIM_SECONDS: &str = "120";

/// `cargo test` that goes on after a failure, so that one run shows all of them.
fn cargo_test(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo("test");
    cargo.args(["--release", "--no-fail-fast"]);
    cargo
        .env("PATH", sh::search_path())
        .env("CDP_AGENT", workspace.release_binary("cdp-agent"))
        .env("CDP_JOURNAL", workspace.release_binary("cdp-journal"))
        .env("CDP_RESTORE", workspace.release_binary("cdp-restore"));
    let is_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    if is_ci && std::env::var_os("CDP_SIM_SECONDS").is_none() {
        cargo.env("CDP_SIM_SECONDS", CI_SIM_SECONDS);
    }
    cargo
}

/// One run of `cargo test` and what came of it.
struct Part {
    name: &'static str,
    tally: Tally,
    succeeded: bool,
}

impl Part {
    fn run(name: &'static str, mut cargo: Command, filter: Option<&str>, harness: &[&str]) -> Result<Self> {
        cargo.arg("--").args(harness).args(filter);
        let what = format!("tests: {name}");
        sh::step(&what, || {
            let (succeeded, output) = run_and_listen(&mut cargo)?;
            Ok(Self {
                name,
                tally: Tally::of(&output),
                succeeded,
            })
        })
    }
}

/// Runs the command, passes on all it says at once, and gives it back as well.
fn run_and_listen(command: &mut Command) -> Result<(bool, String)> {
    sh::show(command);
    // One pipe for both, so that the lines keep their order.
    let (mut reader, writer) = std::io::pipe().context("make a pipe")?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("double a pipe")?)
        .stderr(writer);
    let mut child = command.spawn().context("start cargo")?;
    command.stdout(Stdio::null()).stderr(Stdio::null()); // drops our ends, so that the pipe can end
    let mut output = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let bytes = reader.read(&mut chunk).context("read what cargo says")?;
        if bytes == 0 {
            break;
        }
        let mut stdout = std::io::stdout().lock();
        stdout
            .write_all(&chunk[..bytes])
            .and_then(|()| stdout.flush())
            .context("pass on what cargo says")?;
        output.extend_from_slice(&chunk[..bytes]);
    }
    let status = child.wait().context("wait for cargo")?;
    Ok((status.success(), String::from_utf8_lossy(&output).into_owned()))
}

/// Counts and names, read from what the tests said.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u32,
    failed: u32,
    ignored: u32,
    /// Names of failed tests.
    failures: Vec<String>,
    /// `name: why`, for tests that passed by doing nothing.
    skipped: Vec<String>,
    /// The same for parts of tests.
    skipped_parts: Vec<String>,
}

impl Tally {
    fn of(output: &str) -> Self {
        let mut tally = Self::default();
        // A harness lists failures twice: first with what they printed, then only their names.
        let mut last_list: Option<Vec<String>> = None;
        for line in output.lines() {
            if let Some(counts) = line.strip_prefix("test result: ") {
                tally.add(counts);
                tally.failures.extend(last_list.take().into_iter().flatten());
            } else if line == "failures:" {
                last_list = Some(Vec::new());
            } else if let (Some(list), Some(name)) = (&mut last_list, line.strip_prefix("    ")) {
                list.push(name.trim_end().to_owned());
            } else if let Some(skipped) = line.trim_start().strip_prefix("SKIPPED (part)") {
                tally.skipped_parts.push(skipped.trim().to_owned());
            } else if let Some(skipped) = line.trim_start().strip_prefix("SKIPPED ") {
                tally.skipped.push(skipped.trim().to_owned());
            }
        }
        tally
    }

    /// Adds `ok. 12 passed; 0 failed; 1 ignored; …`.
    fn add(&mut self, counts: &str) {
        for field in counts.split([';', '.']) {
            let Some((count, what)) = field.trim().split_once(' ') else {
                continue;
            };
            let Ok(count) = count.parse::<u32>() else { continue };
            match what {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.ignored += count,
                _ => {}
            }
        }
    }

    /// A skipped test is one that the harness takes for passed.
    fn really_passed(&self) -> u32 {
        self.passed
            .saturating_sub(u32::try_from(self.skipped.len()).unwrap_or(u32::MAX))
    }
}

fn summary(parts: &[Part], time: Duration) -> Vec<String> {
    let mut lines = vec![String::new(), format!("==== tests, {} ====", sh::seconds(time))];
    for Part {
        name,
        tally,
        succeeded,
    } in parts
    {
        let broken = if *succeeded || tally.failed > 0 {
            ""
        } else {
            " (cargo failed, see above)"
        };
        lines.push(format!(
            "{name:<13} {} passed, {} FAILED, {} SKIPPED{broken}",
            tally.really_passed(),
            tally.failed,
            tally.skipped.len() + tally.ignored as usize,
        ));
        lines.extend(tally.failures.iter().map(|test| format!("    FAILED   {test}")));
        lines.extend(tally.skipped.iter().map(|test| format!("    SKIPPED  {test}")));
        lines.extend(
            tally
                .skipped_parts
                .iter()
                .map(|test| format!("    SKIPPED (part)  {test}")),
        );
    }
    lines
}

fn verdict(parts: &[Part], filter: Option<&str>) -> Result<()> {
    let failed: u32 = parts.iter().map(|part| part.tally.failed).sum();
    if failed > 0 {
        bail!("{failed} tests failed");
    }
    if let Some(part) = parts.iter().find(|part| !part.succeeded) {
        bail!("`cargo test` of part \"{}\" failed", part.name);
    }
    let ran: u32 = parts.iter().map(|part| part.tally.passed).sum();
    if ran == 0 {
        bail!(
            "no test ran: none has `{}` in its name",
            filter.unwrap_or_default()
        );
    }
    println!("all that ran passed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
running 3 tests
test a ... ok
test b ...
    SKIPPED  b: not root

ok
test c ... FAILED

failures:

---- c stdout ----
    indented words of a message
test c said this

failures:
    c

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

    SKIPPED (part)  d: no zram
test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.25s
";

    fn part(output: &str, succeeded: bool) -> Part {
        Part {
            name: "crates",
            tally: Tally::of(output),
            succeeded,
        }
    }

    #[test]
    fn counts_of_all_binaries_add_up_and_names_are_kept() {
        let expected = Tally {
            passed: 7,
            failed: 1,
            ignored: 1,
            failures: vec!["c".into()],
            skipped: vec!["b: not root".into()],
            skipped_parts: vec!["d: no zram".into()],
        };
        assert_eq!(Tally::of(OUTPUT), expected);
    }

    #[test]
    fn a_skipped_test_is_not_counted_as_passed() {
        let lines = summary(&[part(OUTPUT, false)], Duration::from_secs(3));
        assert!(
            lines
                .iter()
                .any(|line| line.ends_with("6 passed, 1 FAILED, 2 SKIPPED")),
            "{lines:#?}"
        );
        assert!(
            lines.iter().any(|line| line == "    SKIPPED  b: not root"),
            "{lines:#?}"
        );
        assert!(lines.iter().any(|line| line == "    FAILED   c"), "{lines:#?}");
    }

    #[test]
    fn a_run_fails_on_a_failed_test_a_broken_build_and_an_unknown_name() {
        let passed = "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured";
        assert!(verdict(&[part(OUTPUT, false)], None).is_err());
        assert!(verdict(&[part("error: could not compile", false)], None).is_err());
        assert!(verdict(&[part("test result: ok. 0 passed; 0 failed", true)], Some("typo")).is_err());
        assert!(verdict(&[part(passed, true)], None).is_ok());
    }
}
