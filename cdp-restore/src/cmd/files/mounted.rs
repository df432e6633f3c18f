//! Files through a mount of the moment: the kernel reads whatever it can mount, and `cp` keeps owner, mode, times, links
//! and extended attributes, or fails.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::draft::Draft;
use super::{Copied, link_on_the_way};
use crate::args::Files;
use crate::cmd::peek::Peeking;
use crate::interrupt::Interrupt;
use crate::report::Report;

/// Mounts the moment, copies, unmounts.
pub(super) fn copy(
    args: &Files,
    paths: &[PathBuf],
    to: &Draft<'_>,
    report: &Report,
) -> anyhow::Result<Copied> {
    let interrupt = Interrupt::catch().context("catch Ctrl-C")?;
    let peeking = Peeking::new(&args.source, &args.volume, &args.layer, report);
    let peek = peeking.at(args.at.clone())?;
    let copied = interrupt
        .check()
        .map_err(anyhow::Error::from)
        .and_then(|()| copy_tree(peek.dir(), paths, to.path()));
    peek.settle(copied)?;
    count(to.path())
}

/// Copies with everything that belongs to a file.
fn copy_tree(from: &Path, paths: &[PathBuf], to: &Path) -> anyhow::Result<()> {
    for path in paths {
        refuse_links_on_the_way(from, path)?;
    }
    let mut what: Vec<OsString> = paths.iter().map(|path| path.clone().into()).collect();
    what.retain(|path| !path.is_empty());
    if what.len() < paths.len() || paths.is_empty() {
        what = vec![".".into()];
    }
    let output = Command::new("cp")
        .args(["--no-dereference", "--recursive", "--parents"])
        .arg("--preserve=mode,ownership,timestamps,links,xattr")
        .arg("--")
        .args(what)
        .arg(to)
        .current_dir(from)
        .stdin(Stdio::null())
        .output()
        .context("run cp")?;
    if !output.status.success() {
        bail!("copy: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn refuse_links_on_the_way(from: &Path, path: &Path) -> anyhow::Result<()> {
    let mut at = from.to_owned();
    for (index, part) in path.components().enumerate() {
        at.push(part);
        let metadata = fs::symlink_metadata(&at);
        let metadata = metadata.with_context(|| format!("{} in the moment", path.display()))?;
        if metadata.is_symlink() && index + 1 < path.components().count() {
            let link = at.strip_prefix(from).unwrap_or(&at);
            let target = fs::read_link(&at).unwrap_or_default();
            return Err(link_on_the_way(path, link, &target));
        }
    }
    Ok(())
}

/// Regular files below a folder, and their bytes.
fn count(folder: &Path) -> anyhow::Result<Copied> {
    let mut copied = Copied::default();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                folders.push(entry.path());
            } else if metadata.is_file() {
                copied.files += 1;
                copied.bytes += metadata.len();
            }
        }
    }
    Ok(copied)
}
