//! RocksDB's C++ library, compiled once and kept in the cache.
//!
//! It takes about 45 CPU minutes, more than all the rest together, and is the same for every clone.
//! `ROCKSDB_LIB_DIR` makes the crate link the kept one; `Workspace::cargo` sets it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::sh;
use crate::workspace::Workspace;

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
