//! `cargo xtask setup`: gets what a fresh machine lacks, and says what, why and how long.
//!
//! Always true: what is there already is left alone, so a second run only looks; without missing
//! packages apt is not called, and root is not needed.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::workspace::Workspace;
use crate::{apt, rocksdb, sh, tools};

/// A Debian package, a program that shows it is there on other systems, and what it is for.
struct Package {
    name: &'static str,
    program: Option<&'static str>,
    why: &'static str,
}

const fn package(name: &'static str, program: Option<&'static str>, why: &'static str) -> Package {
    Package { name, program, why }
}

const PACKAGES: [Package; 17] = [
    package("clang", Some("clang"), "headers for RocksDB's bindings"),
    package("libclang-dev", None, "RocksDB's bindings are made by libclang"),
    package("g++", Some("c++"), "compiles RocksDB and libFuzzer"),
    package("pkg-config", Some("pkg-config"), "finds C libraries"),
    package("e2fsprogs", Some("mkfs.ext4"), "ext4 in tests and the demo"),
    package("xfsprogs", Some("mkfs.xfs"), "xfs in tests"),
    package("btrfs-progs", Some("mkfs.btrfs"), "btrfs in tests"),
    package("fdisk", Some("sfdisk"), "partitions in tests"),
    package("util-linux", Some("losetup"), "loop devices and fsfreeze"),
    package("fio", Some("fio"), "load in tests and the bench"),
    package(
        "postgresql",
        Some("pg_ctl"),
        "database of the demo, tests and the bench",
    ),
    package(
        "sqlite3",
        Some("sqlite3"),
        "database of the tests, and of the demo without PostgreSQL",
    ),
    package("qemu-utils", Some("qemu-img"), "a second opinion on images"),
    package(
        "libnbd-bin",
        Some("nbdcopy"),
        "NBD clients that `cdp-restore nbd` is tested with",
    ),
    package("fuse3", Some("fusermount3"), "mounts images"),
    package(
        "iproute2",
        Some("tc"),
        "network name spaces and a slow line in tests",
    ),
    package("nftables", Some("nft"), "lost datagrams in tests"),
];

/// Components that rustup installs with the pinned toolchain, unless it was told not to.
const COMPONENTS: [(&str, &str); 2] = [("rustfmt", "cargo-fmt"), ("clippy", "cargo-clippy")];

const CLUSTER_SETTINGS: &str = "/etc/postgresql-common/createcluster.conf";

/// One thing to get.
struct Step {
    name: &'static str,
    why: &'static str,
    how_long: &'static str,
    /// What is missing, in words; `None` if nothing is.
    missing: fn(&Workspace) -> Result<Option<String>>,
    get: fn(&Workspace) -> Result<()>,
}

const STEPS: [Step; 5] = [
    Step {
        name: "packages",
        why: "compilers, file systems, databases and load for build, tests and demo",
        how_long: "1 to 3 min",
        missing: missing_packages,
        get: install_packages,
    },
    Step {
        name: "rustfmt and clippy",
        why: "the checks of `cargo xtask ci`",
        how_long: "10 s",
        missing: missing_components,
        get: install_components,
    },
    Step {
        name: "rust-src",
        why: "the probe's build compiles `core` for BPF",
        how_long: "10 s",
        missing: |workspace| {
            Ok(missing_unless(
                tools::present_rust_src(workspace).is_some(),
                "rust-src",
            ))
        },
        get: |workspace| tools::rust_src(workspace).map(drop),
    },
    Step {
        name: "bpf-linker",
        why: "links the probe with the LLVM of the Rust compiler",
        how_long: "2 CPU min",
        missing: |workspace| {
            Ok(missing_unless(
                tools::present_bpf_linker(workspace).is_some(),
                "bpf-linker",
            ))
        },
        get: |workspace| tools::bpf_linker(workspace).map(drop),
    },
    Step {
        name: "librocksdb.a",
        why: "RocksDB's C++, compiled once for all builds of this user",
        how_long: "45 CPU min: about 22 min on two cores",
        missing: missing_rocksdb,
        get: rocksdb::build,
    },
];

/// Gets everything that is missing; with `dry_run` only says what that would be.
pub(crate) fn run(workspace: &Workspace, dry_run: bool) -> Result<()> {
    sh::say(format!("the cache is {}", workspace.cache.display()));
    let _lock = if dry_run {
        None
    } else {
        Some(workspace.lock("setup")?)
    };
    for step in &STEPS {
        let Some(missing) = (step.missing)(workspace)? else {
            sh::say(format!("{}: there", step.name));
            continue;
        };
        sh::say(format!(
            "{}: missing: {missing}\n       ({}; takes {})",
            step.name, step.why, step.how_long
        ));
        if !dry_run {
            sh::step(step.name, || (step.get)(workspace))?;
        }
    }
    say_what_the_kernel_lacks();
    sh::say(if dry_run {
        "dry run: nothing was changed"
    } else {
        "everything is there"
    });
    Ok(())
}

fn missing_unless(present: bool, name: &str) -> Option<String> {
    (!present).then(|| name.to_owned())
}

fn missing_packages(_: &Workspace) -> Result<Option<String>> {
    let missing = lacking_packages()?;
    let in_words = |package: &&Package| format!("{} ({})", package.name, package.why);
    Ok((!missing.is_empty()).then(|| missing.iter().map(in_words).collect::<Vec<_>>().join(", ")))
}

fn lacking_packages() -> Result<Vec<&'static Package>> {
    if !apt::is_here() {
        let lacks = |package: &&Package| {
            package
                .program
                .is_some_and(|name| sh::find_program(name).is_none())
        };
        return Ok(PACKAGES.iter().filter(lacks).collect());
    }
    let missing = apt::missing(&PACKAGES.each_ref().map(|package| package.name))?;
    Ok(PACKAGES
        .iter()
        .filter(|package| missing.contains(&package.name))
        .collect())
}

fn install_packages(_: &Workspace) -> Result<()> {
    let names: Vec<_> = lacking_packages()?.iter().map(|package| package.name).collect();
    if !apt::is_here() {
        bail!(
            "no apt here: install what other systems call {} by their own means, and run this again",
            names.join(", "),
        );
    }
    if names.contains(&"postgresql") && !Path::new(CLUSTER_SETTINGS).exists() {
        sh::say("PostgreSQL is wanted for its programs only: Debian is told to create no database cluster");
        let script = format!(
            "mkdir -p {folder} && echo 'create_main_cluster = false' > {CLUSTER_SETTINGS}",
            folder = "/etc/postgresql-common",
        );
        sh::run(sh::as_root("sh")?.args(["-c", &script]))?;
    }
    apt::install(&names)
}

fn missing_components(workspace: &Workspace) -> Result<Option<String>> {
    let missing = lacking_components(workspace);
    Ok((!missing.is_empty()).then(|| missing.join(", ")))
}

fn lacking_components(workspace: &Workspace) -> Vec<&'static str> {
    let bin = workspace.rustc.sysroot.join("bin");
    COMPONENTS
        .iter()
        .filter(|(_, program)| !bin.join(program).is_file() && sh::find_program(program).is_none())
        .map(|(component, _)| *component)
        .collect()
}

fn install_components(workspace: &Workspace) -> Result<()> {
    lacking_components(workspace)
        .into_iter()
        .try_for_each(|component| tools::rustup_component(workspace, component))
}

fn missing_rocksdb(workspace: &Workspace) -> Result<Option<String>> {
    if std::env::var_os("ROCKSDB_LIB_DIR").is_some() {
        return Ok(None); // the user has a library of their own
    }
    // Before the packages are installed there may be no compiler to ask.
    let present = rocksdb::cached_library(workspace).is_ok_and(|library| library.is_file());
    Ok(missing_unless(present, "librocksdb.a"))
}

/// What no package can give: without it the tests of the whole system cannot run.
fn say_what_the_kernel_lacks() {
    if !Path::new("/sys/kernel/btf/vmlinux").is_file() {
        sh::say("note: this kernel has no BTF (/sys/kernel/btf/vmlinux): no probe can run here");
    }
    if !sh::is_root() {
        sh::say("note: you are not root: `cargo xtask test` skips, by name, what needs root");
    }
    let losetup = sh::find_program("losetup").unwrap_or_else(|| "losetup".into());
    if sh::is_root() && !sh::succeeds(Command::new(losetup).arg("--find")) {
        sh::say("note: no loop device can be had here: tests of the whole system cannot run");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_package_is_asked_for_that_would_replace_an_emulator() {
        // Debian 12's qemu-system-x86 removes a newer qemu-utils.
        assert!(
            PACKAGES
                .iter()
                .all(|package| !package.name.starts_with("qemu-system"))
        );
    }

    #[test]
    fn every_package_says_what_it_is_for_and_is_named_once() {
        for (index, package) in PACKAGES.iter().enumerate() {
            assert!(!package.why.is_empty(), "{}", package.name);
            assert!(
                PACKAGES[index + 1..]
                    .iter()
                    .all(|other| other.name != package.name),
                "{}",
                package.name
            );
        }
    }
}
