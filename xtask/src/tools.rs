//! What the probe's build needs besides the pinned compiler: the sources of `core`, and the linker.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::workspace::Workspace;
use crate::{apt, sh};

const BPF_LINKER_VERSION: &str = "0.13.0";
const DEBIAN_SUITE: &str = "trixie-backports";

/// Debian's revision of its `rust-src` package for a compiler version. No other version compiles.
fn debian_rust_src(release: &str) -> String {
    format!("{release}+dfsg1-2~bpo13+1")
}

/// The sources of the standard library, if they are on this machine already.
pub(crate) fn present_rust_src(workspace: &Workspace) -> Option<PathBuf> {
    [
        workspace.rustc.sysroot.join("lib/rustlib/src/rust/library"),
        cached_rust_src(workspace),
    ]
    .into_iter()
    .find(|library| library.join("core/src/lib.rs").is_file())
}

fn rust_src_folder(workspace: &Workspace) -> PathBuf {
    workspace
        .cache
        .join(format!("rust-src-{}", workspace.rustc.release))
}

fn cached_rust_src(workspace: &Workspace) -> PathBuf {
    let release = &workspace.rustc.release;
    rust_src_folder(workspace).join(format!("usr/src/rustc-{release}/library"))
}

/// The sources of the standard library of exactly the active compiler: from rustup, or else from
/// Debian. Both have the same `core`, so it does not matter to the object which it was.
pub(crate) fn rust_src(workspace: &Workspace) -> Result<PathBuf> {
    if let Some(library) = present_rust_src(workspace) {
        return Ok(library);
    }
    let from_rustup = rustup_component(workspace, "rust-src");
    if let Some(library) = present_rust_src(workspace) {
        return Ok(library);
    }
    if !apt::is_here() {
        return Err(from_rustup
            .err()
            .unwrap_or_else(|| anyhow::anyhow!("rustup put nothing in the sysroot")))
        .context("get rust-src: rustup cannot, and there is no apt to get Debian's package with");
    }
    if let Err(error) = from_rustup {
        sh::say(format!(
            "rustup cannot give rust-src ({error:#}); taking Debian's package"
        ));
    }
    let folder = rust_src_folder(workspace);
    let part = workspace.cache.join("rust-src.part");
    let scratch = workspace.cache.join("apt.part");
    for leftover in [&part, &scratch, &folder] {
        remove_folder(leftover)?;
    }
    let version = debian_rust_src(&workspace.rustc.release);
    apt::unpack_from_suite("rust-src", &version, DEBIAN_SUITE, &scratch, &part)?;
    remove_folder(&scratch)?;
    put_in_place(&part, &folder)?;
    present_rust_src(workspace).with_context(|| {
        format!(
            "Debian's rust-src {version} has no library/core: {}",
            folder.display()
        )
    })
}

/// Adds a component to the active toolchain.
pub(crate) fn rustup_component(workspace: &Workspace, component: &str) -> Result<()> {
    sh::run(
        Command::new("rustup")
            .args(["component", "add", component])
            .current_dir(&workspace.root),
    )
}

fn linker_folder(workspace: &Workspace) -> PathBuf {
    workspace.cache.join(format!(
        "bpf-linker-{BPF_LINKER_VERSION}-rust-{}",
        workspace.rustc.release
    ))
}

/// The linker, if it is in the cache and runs: it does not once the toolchain it was built with, whose
/// LLVM it uses, has gone.
pub(crate) fn present_bpf_linker(workspace: &Workspace) -> Option<PathBuf> {
    let linker = linker_folder(workspace).join("bin/bpf-linker");
    (linker.is_file() && sh::succeeds(Command::new(&linker).arg("--version"))).then_some(linker)
}

/// The linker, built with the LLVM of the active compiler: it links bitcode, which no other reads.
pub(crate) fn bpf_linker(workspace: &Workspace) -> Result<PathBuf> {
    if let Some(linker) = present_bpf_linker(workspace) {
        return Ok(linker);
    }
    let folder = linker_folder(workspace);
    let library_folder = folder.join("lib");
    remove_folder(&folder)?;
    fs::create_dir_all(&library_folder).with_context(|| format!("make {}", library_folder.display()))?;
    let llvm = llvm_library(workspace)?;
    let name = llvm.file_name().context("the LLVM library has no name")?;
    for link in [library_folder.join("libLLVM.so"), library_folder.join(name)] {
        symlink(&llvm, &link).with_context(|| format!("link {}", link.display()))?;
    }
    let build = folder.join("build");
    let llvm_feature = format!("llvm-{}", workspace.rustc.llvm_major);
    let mut install = workspace.bare_cargo("install");
    install
        .args(["bpf-linker", "--version", BPF_LINKER_VERSION, "--locked"])
        .args(["--no-default-features", "--features", &llvm_feature, "--root"])
        .arg(&folder)
        .current_dir(&folder)
        .env("LLVM_PREFIX", &folder)
        .env("CARGO_TARGET_DIR", &build)
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    sh::run(&mut install)?;
    remove_folder(&build)?;
    present_bpf_linker(workspace).with_context(|| {
        format!(
            "bpf-linker was installed in {} but does not run",
            folder.display()
        )
    })
}

/// The toolchain's own LLVM, like `lib/libLLVM.so.22.1-rust-1.95.0-stable`.
fn llvm_library(workspace: &Workspace) -> Result<PathBuf> {
    let folder = workspace.rustc.sysroot.join("lib");
    let prefix = format!("libLLVM.so.{}.", workspace.rustc.llvm_major);
    fs::read_dir(&folder)
        .with_context(|| format!("list {}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
        })
        .with_context(|| {
            format!(
                "{} has no {prefix}*: the toolchain must be rustup's, which carries LLVM",
                folder.display()
            )
        })
}

/// `rust-objcopy` of the toolchain, ready to run.
pub(crate) fn objcopy(workspace: &Workspace) -> Result<Command> {
    let rustc = &workspace.rustc;
    let program = rustc
        .sysroot
        .join("lib/rustlib")
        .join(&rustc.host)
        .join("bin/rust-objcopy");
    if !program.is_file() {
        bail!(
            "{} is missing: the toolchain must be rustup's, which carries it",
            program.display()
        );
    }
    let mut objcopy = Command::new(program);
    objcopy.env("LD_LIBRARY_PATH", rustc.sysroot.join("lib"));
    Ok(objcopy)
}

/// Removes a folder if it is there.
pub(crate) fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Renames what was made beside its place into it, so that it is there whole or not at all.
pub(crate) fn put_in_place(part: &Path, place: &Path) -> Result<()> {
    fs::rename(part, place).with_context(|| format!("rename {} to {}", part.display(), place.display()))
}
