//! `cargo xtask ci`: what has to hold before a change is taken; the same at home as on the CI machine.

use anyhow::Result;

use crate::fuzz::FuzzArgs;
use crate::test::TestArgs;
use crate::workspace::Workspace;
use crate::{ebpf, fuzz, sh, test};

/// Each target.
const FUZZ_SECONDS: u32 = 30;

/// All checks, the quick ones first; stops at the first that fails.
///
/// Clippy and rustdoc take the release profile, so that build scripts and macros are built once.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    sh::step("format", || {
        sh::run(workspace.cargo("fmt").args(["--all", "--check"]))
    })?;
    sh::step("clippy", || clippy(workspace, &["--workspace", "--all-targets"]))?;
    // A workspace of its own with a lock of its own, whose build is the last step: told here, and not an hour later.
    sh::step("clippy of the fuzz targets", || {
        clippy(workspace, &["--manifest-path", "fuzz/Cargo.toml"])
    })?;
    sh::step("clippy of the probe", || ebpf::lint(workspace))?;
    sh::step("documentation", || {
        let mut doc = workspace.cargo("doc");
        doc.args(["--locked", "--release", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "--deny warnings");
        sh::run(&mut doc)
    })?;
    sh::step("the committed probe", || ebpf::verify(workspace))?;
    test::run(workspace, &TestArgs::default())?;
    sh::step("fuzzing", || fuzz::run(workspace, &FuzzArgs::all(FUZZ_SECONDS)))
}

fn clippy(workspace: &Workspace, of: &[&str]) -> Result<()> {
    let mut clippy = workspace.cargo("clippy");
    clippy.args(["--locked", "--release"]).args(of);
    sh::run(clippy.args(["--", "--deny", "warnings"]))
}
