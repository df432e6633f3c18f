//! Moments mounted by `cdp-restore mount`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::process::{Outcome, cmd};
use crate::restore::Restore;
use crate::scene::Scene;

/// A place where `cdp-restore mount` mounts; let go of when the guard goes.
#[derive(Debug)]
pub struct View {
    restore: Restore,
    dir: PathBuf,
}

/// Where each mount has a folder of its own.
const MOUNTS: &str = "/run/cdp-restore";

impl View {
    /// The folder `then` of the scene.
    pub fn new(scene: &Scene, restore: Restore) -> Result<View> {
        View::at(scene.path("then"), restore)
    }

    /// The new folder `dir`.
    pub fn at(dir: PathBuf, restore: Restore) -> Result<View> {
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(View { restore, dir })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is mounted from.
    pub fn restore(&self) -> &Restore {
        &self.restore
    }

    /// `mount v --at WHEN DIR`.
    pub fn mount(&self, when: &str, more: &[&str]) -> Result<Outcome> {
        let command = self.restore.command("mount").args(["v", "--at", when]).args(more);
        command.arg(&self.dir).run()
    }

    /// `umount DIR`.
    pub fn try_unmount(&self) -> Result<Outcome> {
        cmd(crate::agent::binary("cdp-restore")?)
            .arg("umount")
            .arg(&self.dir)
            .run()
    }

    /// The same, which must leave nothing.
    pub fn unmount(&self) -> Result<()> {
        self.try_unmount()?.success()?;
        self.expect_nothing_left()
    }

    /// No mount, loop device, process or file of ours.
    pub fn expect_nothing_left(&self) -> Result<()> {
        let dir = self.dir.display().to_string();
        let folders = self.mount_folders();
        let is_ours = |text: &str| {
            let mut others = folders.iter().filter(|(_, is_ours)| !is_ours);
            !others.any(|(other, _)| text.contains(other.as_str()))
        };
        for mount in fs::read_to_string("/proc/self/mounts")?.lines() {
            let is_left = mount.contains(&dir) || mount.contains(MOUNTS) && is_ours(mount);
            ensure!(!is_left, "mounted still: {mount}");
        }
        for entry in fs::read_dir("/sys/block")? {
            let backing = fs::read_to_string(entry?.path().join("loop/backing_file")).unwrap_or_default();
            ensure!(
                !backing.contains("cdp-restore") || !is_ours(&backing),
                "a loop device lies over {backing}"
            );
        }
        ensure!(self.server().is_err(), "a process serves still");
        let left: Vec<_> = folders.iter().filter(|(_, is_ours)| *is_ours).collect();
        ensure!(left.is_empty(), "left in {MOUNTS}: {left:?}");
        ensure!(fs::read_dir(&self.dir)?.count() == 0, "{dir} is not empty");
        Ok(())
    }

    /// The folders of all mounts by name, and whether they may be ours: all but those that say they are of another place,
    /// of whoever else mounts here.
    fn mount_folders(&self) -> Vec<(String, bool)> {
        let Ok(entries) = fs::read_dir(MOUNTS) else {
            return Vec::new();
        };
        let named = entries.flatten().map(|entry| {
            let facts = fs::read(entry.path().join("mount.json")).unwrap_or_default();
            let facts: serde_json::Value = serde_json::from_slice(&facts).unwrap_or_default();
            let is_ours = facts["dir"].as_str().is_none_or(|dir| Path::new(dir) == self.dir);
            (entry.file_name().to_string_lossy().into_owned(), is_ours)
        });
        named.collect()
    }

    /// The process that serves this place.
    pub fn server(&self) -> Result<i32> {
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let line = fs::read(path.join("cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).collect();
            let is_ours = words.contains(&&b"--serve-in"[..])
                && words.contains(&self.dir.as_os_str().as_encoded_bytes());
            if is_ours {
                let name = path.file_name().context("a process id")?;
                return Ok(name.to_string_lossy().parse()?);
            }
        }
        anyhow::bail!("no process serves {}", self.dir.display())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // Of a test that has failed.
        let _ = self.try_unmount();
    }
}

/// Every path below a folder, with the SHA-256 of its content.
pub fn files_in(dir: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            let below = path.strip_prefix(dir)?.to_owned();
            let content = if kind.is_dir() {
                folders.push(path);
                String::from("a folder")
            } else if kind.is_file() {
                let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
                format!("{:x}", Sha256::digest(bytes))
            } else {
                String::from("something else")
            };
            files.insert(below, content);
        }
    }
    Ok(files)
}
