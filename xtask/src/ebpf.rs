//! The probe's object: built, and proved to be the one that is committed.
//!
//! The object is committed and embedded in `cdp-agent`, so that an ordinary build needs no eBPF tools.
//! It then has to be shown that it comes from the sources beside it: `verify` builds it again and
//! compares. So the build gives the same bytes wherever the clone, the target folder, the registry and
//! the sources of `core` lie: see [`wrapper`] for how.

pub(crate) mod wrapper;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::workspace::Workspace;
use crate::{sh, tools};

const TARGET: &str = "bpfel-unknown-none";
const BINARY: &str = "cdp-probe";
/// Part of the target folder's name: to be raised when the flags here or in `wrapper` change, since
/// cargo does not know that it must build again then.
const FLAVOUR: u32 = 1;

/// The build profile, all of it, so that no setting of the user's own changes the object.
const PROFILE: [&str; 9] = [
    "opt-level=3",
    "debug=2", // BTF is made from it; the DWARF itself is stripped afterwards
    "strip=\"none\"",
    "split-debuginfo=\"off\"",
    "codegen-units=1",
    "lto=false",
    "panic=\"abort\"",
    "overflow-checks=false", // a panic cannot be caught, or even said, in the kernel
    "debug-assertions=false",
];

/// Instruction set 3 (Linux 5.1) has 32-bit arithmetic, which keeps the verifier's bounds tight.
const RUSTC_FLAGS: [&str; 2] = ["-Ctarget-cpu=v3", "-Clink-arg=--btf"];

/// The committed object.
pub(crate) fn committed_object(workspace: &Workspace) -> PathBuf {
    workspace.root.join("cdp-ebpf").join("cdp-probe.o")
}

/// Builds the object and puts it where it is committed.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    let place = committed_object(workspace);
    let before = if place.is_file() {
        Some(sh::sha256(&place)?)
    } else {
        None
    };
    let _lock = workspace.lock("ebpf")?;
    let built = build_object(workspace)?;
    let after = sh::sha256(&built)?;
    let part = place.with_extension("o.part");
    fs::copy(&built, &part).with_context(|| format!("copy {} to {}", built.display(), part.display()))?;
    tools::put_in_place(&part, &place)?;
    println!("{after}  {}", place.display());
    if before.as_ref() != Some(&after) {
        sh::say("the object changed: commit it together with the sources it comes from");
    }
    Ok(())
}

/// Builds the object again and fails unless it is the committed one.
pub(crate) fn verify(workspace: &Workspace) -> Result<()> {
    let committed = committed_object(workspace);
    if !committed.is_file() {
        bail!(
            "{} is missing: run `cargo xtask ebpf build` and commit it",
            committed.display()
        );
    }
    let _lock = workspace.lock("ebpf")?;
    let built = build_object(workspace)?;
    let (committed_sum, built_sum) = (sh::sha256(&committed)?, sh::sha256(&built)?);
    println!("{committed_sum}  {} (committed)", committed.display());
    println!("{built_sum}  {} (built from the sources)", built.display());
    if committed_sum != built_sum {
        bail!(
            "the committed object is not the one these sources give: run `cargo xtask ebpf build` and \
             commit {}",
            committed.display(),
        );
    }
    sh::say("the committed object is exactly what the sources give");
    Ok(())
}

/// Checks the probe's sources with clippy, warnings denied: the ordinary run leaves them out.
pub(crate) fn lint(workspace: &Workspace) -> Result<()> {
    let _lock = workspace.lock("ebpf")?;
    let target_folder = target_folder(workspace)?;
    let mut clippy = cargo(workspace, "clippy", &target_folder)?;
    sh::run(clippy.args(["--", "--deny", "warnings"]))
}

fn build_object(workspace: &Workspace) -> Result<PathBuf> {
    let target_folder = target_folder(workspace)?;
    let linked = target_folder.join(TARGET).join("release").join(BINARY);
    sh::run(&mut cargo(workspace, "build", &target_folder)?)?;
    let stripped = target_folder.join("cdp-probe.o");
    let mut objcopy = tools::objcopy(workspace)?;
    sh::run(objcopy.arg("--strip-debug").arg(&linked).arg(&stripped))?;
    Ok(stripped)
}

fn target_folder(workspace: &Workspace) -> Result<PathBuf> {
    let name = format!("ebpf-target-{}-{FLAVOUR}", workspace.rustc.release);
    let folder = workspace.cache.join(name);
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

fn cargo(workspace: &Workspace, subcommand: &str, target_folder: &Path) -> Result<std::process::Command> {
    let library = tools::rust_src(workspace)?;
    let library = library
        .canonicalize()
        .with_context(|| format!("resolve {}", library.display()))?;
    let linker = tools::bpf_linker(workspace)?;
    let mut cargo = workspace.bare_cargo(subcommand);
    cargo
        .args([
            "--locked",
            "--release",
            "--target",
            TARGET,
            "-Z",
            "build-std=core",
        ])
        .args(["--package", "cdp-ebpf", "--bin", BINARY, "--features", "probe"]);
    for setting in PROFILE {
        cargo.args(["--config", &format!("profile.release.{setting}")]);
    }
    let this_program = std::env::current_exe().context("find this program's own path")?;
    cargo
        .env("CARGO_TARGET_DIR", target_folder)
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTC_FLAGS.join("\u{1f}"))
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        .env("CARGO_INCREMENTAL", "0")
        // `-Z build-std` on a stable compiler.
        .env("RUSTC_BOOTSTRAP", "1")
        // Where cargo takes the sources of `core` from; an internal variable of cargo, and the only way
        // to give it sources outside the sysroot.
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", &library)
        .env("RUSTC_WRAPPER", this_program)
        .env(wrapper::ACTIVE, "1")
        .env(wrapper::WORKSPACE, &workspace.root)
        .env(wrapper::TARGET_FOLDER, target_folder)
        .env(wrapper::LIBRARY, &library);
    Ok(cargo)
}
