//! Files through a mount of the moment: the kernel reads whatever it can mount, and `cp` keeps owner, mode, times, links
//! and extended attributes, or fails.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use rustix::fs::{Dir, Mode, OFlags};

use super::draft::Draft;
use super::{Copied, link_on_the_way};
use crate::args::Files;
use crate::cmd::peek::Peeking;
use crate::interrupt::Interrupt;
use crate::report::Report;

/// Complaints of `cp` that are shown.
const LINES_MAX: usize = 5;

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
    let mut copied = Copied::of(peek.instant().context("which moment is mounted is not known")?);
    copied.left_out = peek.left_out();
    let copy = || {
        interrupt.check()?;
        copy_tree(peek.dir(), paths, to.path()).map_err(|error| match &copied.left_out {
            Some(left_out) => error.context(format!("not all of the volume can be mounted ({left_out})")),
            None => error,
        })
    };
    let ended = copy();
    peek.settle(ended)?;
    count(to.path(), &mut copied)?;
    Ok(copied)
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
        bail!("copy: {}", first_lines(&String::from_utf8_lossy(&output.stderr)));
    }
    Ok(())
}

/// What `cp` says, once for each file; the first few are enough.
fn first_lines(said: &str) -> String {
    let lines: Vec<_> = said.trim().lines().collect();
    let told = lines[..lines.len().min(LINES_MAX)].join("\n");
    match lines.len().checked_sub(LINES_MAX) {
        None | Some(0) => told,
        Some(more) => format!("{told}\nand {more} more like these; nothing was left behind"),
    }
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

/// What lies in a folder of ours; its time of access stays as it was copied.
fn names_in(folder: &Path) -> io::Result<Vec<OsString>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = |flags| rustix::fs::open(folder, flags, Mode::empty());
    // Whose the folder is not may have to leave its trace.
    let folder = open(flags | OFlags::NOATIME).or_else(|_| open(flags))?;
    let mut names = Vec::new();
    for entry in Dir::new(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}

/// Regular files below a folder, and their bytes.
fn count(folder: &Path, copied: &mut Copied) -> anyhow::Result<()> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for name in names_in(&folder).with_context(|| format!("list {}", folder.display()))? {
            let path = folder.join(name);
            let metadata = fs::symlink_metadata(&path)?;
            if metadata.is_dir() {
                folders.push(path);
            } else if metadata.is_file() {
                copied.files += 1;
                copied.bytes += metadata.len();
            }
        }
    }
    Ok(())
}
