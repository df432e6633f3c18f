//! `files`: paths out of a moment of a block volume, into a new folder.
//!
//! Who may mount gets them through a mount of the moment ([`mounted`]): whatever the kernel can mount. Everybody else
//! gets them by reading the file system here ([`reading`]), which must be an ext4 then.
//!
//! Always true, either way:
//! - C1: the folder appears under its name whole, or not at all.
//! - C2: no path leads out of the moment: symbolic links on the way to it are refused, and those found are copied as such.
//! - C3: what cannot be read, or kept, is an error. Who may not give files away keeps them, as with `cp --preserve`; it
//!   is said of how many, and of which attributes that takes the right to administer the system.

mod draft;
mod keep;
mod mounted;
mod reading;

use std::fs::File;
use std::path::{Component, Path, PathBuf};

use anyhow::bail;
use rustix::thread::CapabilitySet;
use serde::Serialize;

use self::draft::Draft;
use self::keep::Lost;
use super::{Instant, refuse_own_files};
use crate::args::Files;
use crate::report::Report;
use crate::time::Time;
use crate::units::{Bytes, count};

/// What `files --json` prints.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    volume: &'a str,
    at: Time,
    seq: u64,
    to: &'a Path,
    /// Regular files, and the bytes in them.
    files: u64,
    bytes: u64,
    /// Files and folders that belong to another than they did.
    owners_not_kept: u64,
    attributes_not_kept: u64,
    /// What lies on the volume beside that, and no file can be read from.
    left_out: Option<String>,
}

/// What was copied.
#[derive(Debug)]
struct Copied {
    instant: Instant,
    /// Regular files, and the bytes in them.
    files: u64,
    bytes: u64,
    lost: Lost,
    /// What lies on the volume and no file can be read from.
    left_out: Option<String>,
}

impl Copied {
    /// Nothing yet.
    fn of(instant: Instant) -> Self {
        Self {
            instant,
            files: 0,
            bytes: 0,
            lost: Lost::default(),
            left_out: None,
        }
    }
}

pub(crate) fn run(args: &Files, report: &Report) -> anyhow::Result<()> {
    let paths = args
        .paths
        .iter()
        .map(|path| inside(path))
        .collect::<Result<Vec<_>, _>>()?;
    refuse_own_files(&args.to, &args.source.from)?;
    let draft = Draft::new(&args.to)?;
    let copied = match may_mount() {
        true => mounted::copy(args, &paths, &draft, report)?,
        false => reading::copy(args, &paths, &draft)?,
    };
    draft.finish()?;
    copied.lost.tell(report);
    // Who named paths has got them.
    if let Some(left_out) = copied.left_out.as_ref().filter(|_| paths.is_empty()) {
        report.warn(format!("not copied, for no file can be read from it: {left_out}"));
    }
    if args.json {
        return report.json(&Outcome {
            volume: &args.volume,
            at: copied.instant.at,
            seq: copied.instant.seq.get(),
            to: &args.to,
            files: copied.files,
            bytes: copied.bytes,
            owners_not_kept: copied.lost.owners(),
            attributes_not_kept: copied.lost.attributes(),
            left_out: copied.left_out,
        });
    }
    report.out(format!(
        "{}: {}, {}\n",
        args.to.display(),
        count(copied.files, "file"),
        Bytes(copied.bytes)
    ))
}

/// A path as one below the root of the volume.
fn inside(path: &Path) -> anyhow::Result<PathBuf> {
    let mut below = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => below.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                bail!(
                    "{}: give a path without `..`, as it is on the volume",
                    path.display()
                )
            }
        }
    }
    Ok(below)
}

/// Does this host let us mount? Root of a container may not.
fn may_mount() -> bool {
    let capabilities = rustix::thread::capabilities(None);
    let may_administer = capabilities.is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    let has_fuse = || File::options().read(true).write(true).open("/dev/fuse").is_ok();
    rustix::process::geteuid().is_root() && may_administer && has_fuse()
}

/// A link could lead out of the moment, to what this host has now.
fn link_on_the_way(path: &Path, link: &Path, target: &Path) -> anyhow::Error {
    anyhow::anyhow!(
        "{}: {} is a symbolic link to {}; give the path that it stands for",
        path.display(),
        link.display(),
        target.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_inside() {
        let path = |text: &str| inside(Path::new(text)).ok();
        assert_eq!(path("/etc/./passwd"), Some(PathBuf::from("etc/passwd")));
        assert_eq!(path("/"), Some(PathBuf::new()));
        assert_eq!(path("etc/../../passwd"), None);
    }
}
