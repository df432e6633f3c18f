//! Where things are: the clone, the cache outside it, and the pinned compiler.
//!
//! Everything that is slow to make is kept in the cache, so that a fresh clone builds quickly:
//! ```text
//! ${CDP_CACHE:-${XDG_CACHE_HOME:-~/.cache}/cdp}/
//!   target/                     cargo's build output, unless CARGO_TARGET_DIR says otherwise
//!   ebpf-target-*/              the same for the probe
//!   rocksdb-*/librocksdb.a      RocksDB's C++, compiled once
//!   bpf-linker-*/               the probe's linker
//!   rust-src-*/                 the sources of `core`, where rustup cannot give them
//! ```

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::sh;

/// The clone, the cache and the compiler.
pub(crate) struct Workspace {
    /// The folder of the root `Cargo.toml`.
    pub(crate) root: PathBuf,
    /// The cache folder; exists.
    pub(crate) cache: PathBuf,
    /// The compiler that is active in the clone.
    pub(crate) rustc: Rustc,
}

/// What the active compiler says of itself.
pub(crate) struct Rustc {
    /// Its version, the one that `rust-toolchain.toml` pins.
    pub(crate) release: String,
    /// Major version of the LLVM inside it.
    pub(crate) llvm_major: u32,
    /// The machine it runs on, like `x86_64-unknown-linux-gnu`.
    pub(crate) host: String,
    /// The folder it is installed in.
    pub(crate) sysroot: PathBuf,
}

impl Workspace {
    /// Finds the clone that we were started in, makes the cache folder, and refuses a compiler other
    /// than the pinned one.
    pub(crate) fn open() -> Result<Self> {
        let root = find_root()?;
        let cache = cache_folder(|name| std::env::var_os(name))?;
        fs::create_dir_all(&cache).with_context(|| format!("make the cache folder {}", cache.display()))?;
        // Canonical, since paths are compared with those that cargo and rustc report.
        let cache = cache
            .canonicalize()
            .with_context(|| format!("resolve {}", cache.display()))?;
        let rustc = Rustc::active(&root)?;
        Ok(Self { root, cache, rustc })
    }

    /// Cargo's build output.
    pub(crate) fn target(&self) -> PathBuf {
        match std::env::var_os("CARGO_TARGET_DIR") {
            Some(folder) if !folder.is_empty() => self.root.join(folder),
            _ => self.cache.join("target"),
        }
    }

    /// A release binary of this workspace.
    pub(crate) fn release_binary(&self, name: &str) -> PathBuf {
        self.target().join("release").join(name)
    }

    /// Cargo for this workspace: output in the cache, and RocksDB taken from there if it is there.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut cargo = self.bare_cargo(subcommand);
        cargo.env("CARGO_TARGET_DIR", self.target());
        if std::env::var_os("ROCKSDB_LIB_DIR").is_none()
            && let Ok(library) = crate::rocksdb::cached_library(self)
            && let Some(folder) = library.parent()
            && library.is_file()
        {
            cargo.env("ROCKSDB_LIB_DIR", folder).env("ROCKSDB_STATIC", "1");
        }
        cargo
    }

    /// Cargo without any of our settings, in the clone.
    pub(crate) fn bare_cargo(&self, subcommand: &str) -> Command {
        let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        let mut cargo = Command::new(program);
        cargo.arg(subcommand).current_dir(&self.root);
        cargo
    }

    /// Holds a lock in the cache for as long as the answer lives, so that two clones do not build the
    /// same thing at once.
    pub(crate) fn lock(&self, name: &str) -> Result<File> {
        let path = self.cache.join(format!("{name}.lock"));
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        if file.try_lock().is_err() {
            sh::say(format!("waiting for another xtask that holds {}", path.display()));
            file.lock().with_context(|| format!("lock {}", path.display()))?;
        }
        Ok(file)
    }

    /// The version of a crate that `Cargo.lock` names.
    pub(crate) fn locked_version(&self, crate_name: &str) -> Result<String> {
        let path = self.root.join("Cargo.lock");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        locked_version(&text, crate_name)
            .with_context(|| format!("{} names no crate `{crate_name}`", path.display()))
    }
}

impl Rustc {
    fn active(root: &Path) -> Result<Self> {
        let about = sh::capture(Command::new("rustc").arg("-vV").current_dir(root))
            .context("ask rustc for its version")?;
        let sysroot = sh::capture(
            Command::new("rustc")
                .args(["--print", "sysroot"])
                .current_dir(root),
        )?;
        let sysroot = PathBuf::from(sysroot);
        let sysroot = sysroot
            .canonicalize()
            .with_context(|| format!("resolve {}", sysroot.display()))?;
        let field = |name| about_field(&about, name).with_context(|| format!("`rustc -vV` says no {name}"));
        let llvm = field("LLVM version")?;
        let rustc = Self {
            release: field("release")?.to_owned(),
            llvm_major: llvm
                .split('.')
                .next()
                .and_then(|major| major.parse().ok())
                .with_context(|| format!("LLVM version `{llvm}` is not a number"))?,
            host: field("host")?.to_owned(),
            sysroot,
        };
        let path = root.join("rust-toolchain.toml");
        let pin = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let pinned =
            toml_string(&pin, "channel").with_context(|| format!("{} names no channel", path.display()))?;
        if rustc.release != pinned {
            bail!(
                "rustc {} is active, {} pins {pinned}: run `rustup toolchain install {pinned}`, \
                 or unset what overrides it (RUSTUP_TOOLCHAIN, `cargo +…`)",
                rustc.release,
                path.display(),
            );
        }
        Ok(rustc)
    }
}

fn find_root() -> Result<PathBuf> {
    // `cargo xtask` sets it at run time. Not `env!`: clones that share the cache share this binary.
    let start = match std::env::var_os("CARGO_MANIFEST_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => std::env::current_dir().context("find the current folder")?,
    };
    start
        .ancestors()
        .find(|folder| folder.join("rust-toolchain.toml").is_file() && folder.join("xtask").is_dir())
        .with_context(|| format!("{} is not in a clone of this project", start.display()))?
        .canonicalize()
        .context("resolve the project folder")
}

fn cache_folder(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    let set = |name| {
        variable(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(folder) = set("CDP_CACHE") {
        return Ok(folder);
    }
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .map(|folder| folder.join("cdp"))
        .context("none of CDP_CACHE, XDG_CACHE_HOME and HOME is set: no place for the cache")
}

/// The value of `name: value` in the answer of `rustc -vV`.
fn about_field<'a>(about: &'a str, name: &str) -> Option<&'a str> {
    about
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// The value of the first line `key = "value"`. Enough for the two files we read, which we also write.
fn toml_string<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let value = line.strip_prefix(key)?.trim_start().strip_prefix('=')?.trim();
        value.strip_prefix('"')?.split('"').next()
    })
}

fn locked_version(lock: &str, crate_name: &str) -> Option<String> {
    lock.split("[[package]]")
        .find(|package| toml_string(package, "name") == Some(crate_name))
        .and_then(|package| toml_string(package, "version"))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache_with(variables: &[(&str, &str)]) -> Option<PathBuf> {
        let find = |name: &str| {
            variables
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| OsString::from(v))
        };
        cache_folder(find).ok()
    }

    #[test]
    fn the_cache_follows_the_most_specific_variable_that_is_set() {
        let all = [("CDP_CACHE", "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")];
        assert_eq!(cache_with(&all), Some(PathBuf::from("/a")));
        assert_eq!(cache_with(&all[1..]), Some(PathBuf::from("/b/cdp")));
        assert_eq!(cache_with(&all[2..]), Some(PathBuf::from("/c/.cache/cdp")));
        assert_eq!(
            cache_with(&[("CDP_CACHE", ""), ("HOME", "/c")]),
            Some(PathBuf::from("/c/.cache/cdp"))
        );
        assert_eq!(cache_with(&[]), None);
    }

    #[test]
    fn rustc_fields_are_read_by_their_whole_name() {
        let about = "rustc 1.95.0 (59807616e 2026-04-14)\nrelease: 1.95.0\nLLVM version: 22.1.2";
        assert_eq!(about_field(about, "release"), Some("1.95.0"));
        assert_eq!(about_field(about, "LLVM version"), Some("22.1.2"));
        assert_eq!(about_field(about, "host"), None);
    }

    #[test]
    fn the_locked_version_is_that_of_the_crate_of_exactly_this_name() {
        let lock = "version = 4\n\n[[package]]\nname = \"librocksdb-sys\"\nversion = \"0.19.0+11.8.1\"\n\n\
                    [[package]]\nname = \"rocksdb\"\nversion = \"0.25.0\"\n";
        assert_eq!(locked_version(lock, "rocksdb").as_deref(), Some("0.25.0"));
        assert_eq!(locked_version(lock, "rocks"), None);
    }
}
