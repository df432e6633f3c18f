//! `files`: paths out of a moment of a block volume, into a new folder.
//!
//! Through a mount of the moment, which takes root: the kernel reads whatever it can mount, and `cp` keeps owner, mode,
//! times, links and extended attributes, or fails.
//!
//! Always true:
//! - C1: the folder appears under its name whole, or not at all.
//! - C2: no path leads out of the moment: symbolic links on the way to it are refused, and those found are copied as such.
//! - C3: what cannot be read, or kept, is an error.

use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde::Serialize;

use super::peek::Peeking;
use super::refuse_own_files;
use crate::args::Files;
use crate::interrupt::Interrupt;
use crate::report::Report;
use crate::units::{Bytes, count};

/// What `files --json` prints.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    volume: &'a str,
    /// Moment, as it was asked for.
    at: String,
    to: &'a Path,
    /// Regular files, and the bytes in them.
    files: u64,
    bytes: u64,
}

/// A folder beside the one that is asked for; gone unless it becomes that one.
struct Draft<'a> {
    folder: tempfile::TempDir,
    to: &'a Path,
}

pub(crate) fn run(args: &Files, report: &Report) -> anyhow::Result<()> {
    let paths = args
        .paths
        .iter()
        .map(|path| inside(path))
        .collect::<Result<Vec<_>, _>>()?;
    refuse_own_files(&args.to, &args.source.from)?;
    let draft = Draft::new(&args.to)?;
    by_mount(args, &paths, draft.path(), report)?;
    let (files, bytes) = draft.count()?;
    draft.finish()?;
    if args.json {
        return report.json(&Outcome {
            volume: &args.volume,
            at: args.at.to_string(),
            to: &args.to,
            files,
            bytes,
        });
    }
    report.out(format!(
        "{}: {}, {}\n",
        args.to.display(),
        count(files, "file"),
        Bytes(bytes)
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

/// Mounts the moment, copies, unmounts.
fn by_mount(args: &Files, paths: &[PathBuf], to: &Path, report: &Report) -> anyhow::Result<()> {
    let interrupt = Interrupt::catch().context("catch Ctrl-C")?;
    let peeking = Peeking::new(&args.source, &args.volume, &args.layer, report);
    let peek = peeking.at(args.at.clone())?;
    let copied = interrupt
        .check()
        .map_err(anyhow::Error::from)
        .and_then(|()| copy(peek.dir(), paths, to));
    peek.settle(copied)
}

/// Copies with everything that belongs to a file.
fn copy(from: &Path, paths: &[PathBuf], to: &Path) -> anyhow::Result<()> {
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

/// A link could lead out of the moment, to what this host has now.
fn refuse_links_on_the_way(from: &Path, path: &Path) -> anyhow::Result<()> {
    let mut at = from.to_owned();
    for (index, part) in path.components().enumerate() {
        at.push(part);
        let metadata = fs::symlink_metadata(&at);
        let metadata = metadata.with_context(|| format!("{} in the moment", path.display()))?;
        if metadata.is_symlink() && index + 1 < path.components().count() {
            let link = at.strip_prefix(from).unwrap_or(&at).display();
            let target = fs::read_link(&at).unwrap_or_default();
            bail!(
                "{}: {link} is a symbolic link to {}; give the path that it stands for",
                path.display(),
                target.display()
            );
        }
    }
    Ok(())
}

impl<'a> Draft<'a> {
    fn new(to: &'a Path) -> anyhow::Result<Self> {
        match fs::read_dir(to) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    bail!(
                        "{} is not empty; give a folder that is, or one to be made",
                        to.display()
                    );
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("look into {}", to.display())),
        }
        let absolute = std::path::absolute(to).with_context(|| format!("find {}", to.display()))?;
        let parent = absolute.parent().context("give a folder below /")?;
        let folder = tempfile::Builder::new()
            .prefix(".cdp-files-")
            .tempdir_in(parent)
            .with_context(|| format!("make a folder in {}", parent.display()))?;
        Ok(Draft { folder, to })
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Regular files below it, and their bytes.
    fn count(&self) -> anyhow::Result<(u64, u64)> {
        let (mut files, mut bytes) = (0, 0);
        let mut folders = vec![self.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
                let entry = entry?;
                let metadata = entry.metadata()?;
                if metadata.is_dir() {
                    folders.push(entry.path());
                } else if metadata.is_file() {
                    (files, bytes) = (files + 1, bytes + metadata.len());
                }
            }
        }
        Ok((files, bytes))
    }

    /// Gives it its name.
    fn finish(self) -> anyhow::Result<()> {
        let folder = self.folder.keep();
        let renamed = fs::rename(&folder, self.to);
        if renamed.is_err() {
            let _ = fs::remove_dir_all(&folder);
        }
        renamed.with_context(|| format!("make {}", self.to.display()))
    }
}
