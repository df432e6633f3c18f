//! RocksDB's C++ library, compiled once and kept in the cache.
//!
//! It takes about 45 CPU minutes, more than all the rest together, and is the same for every clone.
//! `ROCKSDB_LIB_DIR` makes the crate link the kept one; `Workspace::cargo` sets it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::workspace::Workspace;
use crate::{sh, tools};

/// Where the library is, or would be, in the cache.
pub(crate) fn cached_library(workspace: &Workspace) -> Result<PathBuf> {
    let key = cache_key(&workspace.locked_version("rocksdb")?, &compiler_version()?);
    Ok(workspace.cache.join(key).join("librocksdb.a"))
}

/// All that decides what is in the library: the crate, its features, the optimisation, the compiler.
fn cache_key(crate_version: &str, compiler_version: &str) -> String {
    format!("rocksdb-{crate_version}-lz4-o2-c++{compiler_version}")
}

fn compiler_version() -> Result<String> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    // clang++ knows only the second.
    sh::capture(Command::new(&compiler).arg("-dumpfullversion"))
        .or_else(|_| sh::capture(Command::new(&compiler).arg("-dumpversion")))
        .context("ask the C++ compiler for its version")
}

/// Compiles the library and puts it in the cache, whole or not at all.
///
/// Cargo does it, as the dependency of an empty crate: so compiler flags and file lists are those of the
/// crate itself, and there is nothing to keep in step but the features and the optimisation.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    let place = cached_library(workspace)?;
    let folder = workspace.cache.join("rocksdb-build");
    tools::remove_folder(&folder)?;
    let source_folder = folder.join("src");
    fs::create_dir_all(&source_folder).with_context(|| format!("make {}", source_folder.display()))?;
    let manifest = manifest(&workspace.locked_version("rocksdb")?);
    for (name, text) in [("Cargo.toml", manifest.as_str()), ("src/lib.rs", "")] {
        let file = folder.join(name);
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    }
    // The versions of the workspace, of which cargo drops what is not needed.
    fs::copy(workspace.root.join("Cargo.lock"), folder.join("Cargo.lock")).context("copy Cargo.lock")?;
    let mut cargo = workspace.bare_cargo("build");
    cargo
        .arg("--release")
        .current_dir(&folder)
        .env("CARGO_TARGET_DIR", folder.join("target"))
        .env_remove("ROCKSDB_LIB_DIR")
        .env_remove("ROCKSDB_STATIC");
    sh::run(&mut cargo)?;
    let built = built_library(&folder.join("target/release/build"))?;
    let cached_folder = place.parent().context("the cached library has no folder")?;
    fs::create_dir_all(cached_folder).with_context(|| format!("make {}", cached_folder.display()))?;
    tools::put_in_place(&built, &place)?;
    tools::remove_folder(&folder)
}

fn manifest(crate_version: &str) -> String {
    format!(
        r#"[package]
name = "cdp-librocksdb"
version = "0.0.0"
edition = "2024"

[workspace]

[dependencies]
rocksdb = {{ version = "={crate_version}", default-features = false, features = ["bindgen-runtime", "lz4"] }}

[profile.release.package.librocksdb-sys]
opt-level = 2
debug = false
"#
    )
}

fn built_library(build_folder: &Path) -> Result<PathBuf> {
    fs::read_dir(build_folder)
        .with_context(|| format!("list {}", build_folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path().join("out/librocksdb.a")))
        .find(|library| library.is_file())
        .with_context(|| format!("cargo left no librocksdb.a under {}", build_folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_crate_or_compiler_version_is_another_library() {
        assert_eq!(cache_key("0.25.0", "12.2.0"), "rocksdb-0.25.0-lz4-o2-c++12.2.0");
        assert_ne!(cache_key("0.25.0", "12.2.0"), cache_key("0.25.0", "13.1.0"));
        assert_ne!(cache_key("0.25.0", "12.2.0"), cache_key("0.25.1", "12.2.0"));
    }
}
