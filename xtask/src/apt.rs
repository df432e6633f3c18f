//! Debian's packages: what is installed, what is missing, and one package fetched without installing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::sh;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";

/// Whether this machine has apt and dpkg at all.
pub(crate) fn is_here() -> bool {
    sh::find_program("apt-get").is_some() && sh::find_program("dpkg-query").is_some()
}

/// Those of the packages that are not installed.
pub(crate) fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    // dpkg-query fails when it has never heard of one of them: its answer is right all the same.
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\n"])
        .args(packages)
        .output()
        .context("start dpkg-query")?;
    let listing = String::from_utf8_lossy(&output.stdout);
    Ok(packages
        .iter()
        .copied()
        .filter(|package| !is_installed(&listing, package))
        .collect())
}

fn is_installed(listing: &str, package: &str) -> bool {
    listing
        .lines()
        .any(|line| line.split_once(' ') == Some((package, "installed")))
}

/// Installs packages; nothing is asked, and settings that exist are kept.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    sh::run(sh::as_root("apt-get")?.args(["update", "--quiet"]))?;
    let mut install = sh::as_root("env")?;
    install
        .args([
            "DEBIAN_FRONTEND=noninteractive",
            "UCF_FORCE_CONFFOLD=1",
            "apt-get",
            "install",
        ])
        .args(["--yes", "--quiet", "--no-install-recommends"])
        .args(["-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"])
        .args([
            "-o",
            "Dpkg::Options::=--force-confdef",
            "-o",
            "Dpkg::Options::=--force-confold",
        ])
        .args(packages);
    sh::run(&mut install)
}

/// What a package depends on directly, alternatives left out.
pub(crate) fn depends(package: &str) -> Result<Vec<String>> {
    let text = sh::capture(Command::new("apt-cache").args(["depends", package]))?;
    Ok(depends_in(&text))
}

fn depends_in(listing: &str) -> Vec<String> {
    let names = listing
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "));
    let real = names.filter(|name| !name.starts_with('<'));
    real.map(str::to_owned).collect()
}

/// Fetches packages, of the versions that apt would install, and unpacks them into `into` without installing them.
pub(crate) fn unpack(packages: &[String], into: &Path) -> Result<()> {
    let deb = into.join("deb");
    fs::create_dir_all(&deb).with_context(|| format!("make {}", deb.display()))?;
    let mut download = Command::new("apt-get");
    // As root, apt would fetch as a user who cannot write here, and warn.
    download.args(["--quiet", "-o", "APT::Sandbox::User=root", "download"]);
    sh::run(download.args(packages).current_dir(&deb))?;
    for entry in fs::read_dir(&deb).with_context(|| format!("list {}", deb.display()))? {
        let file = entry.with_context(|| format!("list {}", deb.display()))?.path();
        sh::run(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(into))?;
    }
    fs::remove_dir_all(&deb).with_context(|| format!("remove {}", deb.display()))
}

/// Fetches one package of exactly one version from a Debian suite that the machine itself need not
/// follow, and unpacks it into `into` without installing it. Needs no root: apt keeps its state in a
/// folder of its own, `scratch`.
pub(crate) fn unpack_from_suite(
    package: &str,
    version: &str,
    suite: &str,
    scratch: &Path,
    into: &Path,
) -> Result<()> {
    for folder in ["state/lists/partial", "cache/archives/partial", "deb"] {
        let folder = scratch.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let signed_by = if Path::new(KEYRING).is_file() {
        format!(" [signed-by={KEYRING}]")
    } else {
        String::new()
    };
    let list = scratch.join("sources.list");
    fs::write(&list, format!("deb{signed_by} {} {suite} main\n", mirror()))
        .with_context(|| format!("write {}", list.display()))?;
    let deb = scratch.join("deb");
    let apt_get = || {
        let option = |name: &str, value: &Path| format!("{name}={}", value.display());
        let mut apt_get = Command::new("apt-get");
        apt_get.current_dir(&deb).arg("--quiet");
        for (name, value) in [
            ("Dir::Etc::SourceList", list.as_path()),
            ("Dir::Etc::SourceParts", Path::new("/dev/null")),
            ("Dir::State", &scratch.join("state")),
            ("Dir::State::Status", Path::new("/dev/null")),
            ("Dir::Cache", &scratch.join("cache")),
        ] {
            apt_get.args(["-o", &option(name, value)]);
        }
        // As root, apt would fetch as a user who cannot write here, and warn.
        apt_get.args(["-o", "APT::Sandbox::User=root"]);
        apt_get
    };
    sh::run(apt_get().arg("update"))?;
    sh::run(apt_get().args(["download", &format!("{package}={version}")]))?;
    let file = fs::read_dir(&deb)
        .with_context(|| format!("list {}", deb.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let Some(file) = file else {
        bail!("apt-get left no package in {}", deb.display())
    };
    sh::run(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(into))
}

/// The Debian mirror that this machine uses, so that we ask no other.
fn mirror() -> String {
    source_lists()
        .iter()
        .find_map(|path| {
            let text = fs::read_to_string(path).ok()?;
            let is_deb822 = path.extension().is_some_and(|extension| extension == "sources");
            if is_deb822 {
                deb822_mirror(&text)
            } else {
                one_line_mirror(&text)
            }
        })
        .unwrap_or_else(|| DEFAULT_MIRROR.to_owned())
}

fn source_lists() -> Vec<PathBuf> {
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten();
    let mut parts: Vec<_> = parts.filter_map(|entry| Some(entry.ok()?.path())).collect();
    parts.sort();
    std::iter::once(PathBuf::from("/etc/apt/sources.list"))
        .chain(parts)
        .collect()
}

/// `deb [options] URI suite component…`
fn one_line_mirror(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let line = line.trim().strip_prefix("deb ")?.trim_start();
        let line = match line.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => line,
        };
        line.split_whitespace().next().and_then(debian_archive)
    })
}

/// Stanzas of `Field: value`.
fn deb822_mirror(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        line.strip_prefix("URIs:")?
            .split_whitespace()
            .find_map(debian_archive)
    })
}

/// The URI if it is a main Debian archive: not the security one, not somebody else's.
fn debian_archive(uri: &str) -> Option<String> {
    let uri = uri.trim_end_matches('/');
    uri.ends_with("/debian").then(|| uri.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_that_was_removed_is_not_installed() {
        let listing = "fio installed\nxfsprogs config-files\nlibfuse3-3 installed\n";
        assert!(is_installed(listing, "fio"));
        assert!(!is_installed(listing, "xfsprogs"));
        assert!(!is_installed(listing, "fuse3"));
    }

    #[test]
    fn what_a_package_depends_on_is_told_without_virtual_packages() {
        let listing = "qemu\n  Depends: libfdt1\n |Depends: a\n  Depends: <b>\n    c\n  Breaks: d\n  Depends: seabios\n";
        assert_eq!(depends_in(listing), ["libfdt1", "seabios"]);
    }

    #[test]
    fn the_mirror_is_found_in_both_forms_of_source_lists() {
        let one_line = "# deb http://old/debian x main\n\
                        deb http://security.debian.org/debian-security bookworm-security main\n\
                        deb [arch=amd64 signed-by=/k] https://mirror.example/debian/ bookworm main\n";
        assert_eq!(
            one_line_mirror(one_line).as_deref(),
            Some("https://mirror.example/debian")
        );
        let deb822 = "Types: deb\nURIs: http://security.debian.org/debian-security\n\n\
                      Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm\n";
        assert_eq!(
            deb822_mirror(deb822).as_deref(),
            Some("http://deb.debian.org/debian")
        );
        assert_eq!(
            one_line_mirror("deb https://packages.example/apt all main\n"),
            None
        );
    }
}
