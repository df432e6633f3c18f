//! A folder that gets its name once it is whole.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, bail};
use tempfile::TempDir;

/// A folder beside the one that is asked for; gone unless it becomes that one.
pub(super) struct Draft<'a> {
    folder: Option<TempDir>,
    to: &'a Path,
}

impl<'a> Draft<'a> {
    pub(super) fn new(to: &'a Path) -> anyhow::Result<Self> {
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
        for list in ["system.posix_acl_access", "system.posix_acl_default"] {
            // What it has from its parent must not be handed on; most have none, or cannot have any.
            let _ = rustix::fs::removexattr(folder.path(), list);
        }
        Ok(Draft {
            folder: Some(folder),
            to,
        })
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.as_ref().map_or(self.to, TempDir::path)
    }

    /// Gives it its name.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        let renamed = fs::rename(self.path(), self.to);
        renamed.with_context(|| format!("make {}", self.to.display()))?;
        // It has gone from the place that would be removed.
        let _ = self.folder.take().map(TempDir::keep);
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if let Some(folder) = &self.folder {
            open_up(folder.path());
        }
    }
}

/// Lets their owner remove what lies in folders that nobody may write to.
fn open_up(folder: &Path) {
    let mut rest = vec![folder.to_owned()];
    while let Some(folder) = rest.pop() {
        let _ = fs::set_permissions(&folder, fs::Permissions::from_mode(0o700));
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        let is_folder = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        let folders = entries.filter_map(Result::ok).filter(is_folder);
        rest.extend(folders.map(|entry| entry.path()));
    }
}
