//! Walking what is mounted, one or two file systems at a time.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// Something went wrong at a path.
#[derive(Debug, thiserror::Error)]
#[error("{path}")]
pub(crate) struct WalkError {
    path: String,
    #[source]
    source: io::Error,
}

impl WalkError {
    /// For `map_err`.
    pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> WalkError {
        let path = path.display().to_string();
        move |source| WalkError { path, source }
    }
}

/// One name in two trees; in one of them there may be nothing of that name.
#[derive(Debug)]
pub(crate) struct Pair {
    /// Below the roots.
    pub(crate) path: PathBuf,
    pub(crate) sides: [Option<Metadata>; 2],
}

/// Gives `visit` everything that lies below either of two roots (`None`: an empty tree), a folder before what is in
/// it, sorted by name. Memory goes with the size of a folder and those around it, not with that of the tree.
pub(crate) fn walk<E: From<WalkError>>(
    roots: [Option<&Path>; 2],
    mut visit: impl FnMut(&Pair) -> Result<(), E>,
) -> Result<(), E> {
    let mut folders = vec![(PathBuf::new(), [true; 2])];
    // Names of the folders that the walk is in, each with those that are still to come.
    let mut open = Vec::new();
    while let Some((folder, is_there)) = folders.pop() {
        let mut names: BTreeMap<OsString, [Option<Metadata>; 2]> = BTreeMap::new();
        for (side, root) in roots.iter().enumerate() {
            let Some(root) = root.filter(|_| is_there[side]) else {
                continue;
            };
            let path = root.join(&folder);
            let entries = fs::read_dir(&path).map_err(WalkError::at(&path))?;
            for entry in entries {
                let entry = entry.map_err(WalkError::at(&path))?;
                let metadata = entry.metadata().map_err(WalkError::at(&entry.path()))?;
                names.entry(entry.file_name()).or_default()[side] = Some(metadata);
            }
        }
        open.push((folder, names.into_iter()));
        // On with the innermost folder, until another one is met.
        while let Some((folder, names)) = open.last_mut() {
            let Some((name, sides)) = names.next() else {
                open.pop();
                continue;
            };
            let pair = Pair {
                path: folder.join(name),
                sides,
            };
            visit(&pair)?;
            let is_folder = [0, 1].map(|side| pair.sides[side].as_ref().is_some_and(Metadata::is_dir));
            if is_folder != [false; 2] {
                folders.push((pair.path, is_folder));
                break;
            }
        }
    }
    Ok(())
}

/// Opens a file or folder to look into; nothing else, and no link.
pub(crate) fn open(path: &Path) -> Result<File, WalkError> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOATIME;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path);
    opened.map_err(WalkError::at(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_trees_are_walked_as_one_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| folder.path().join(name));
        for path in [
            "one/a/x",
            "one/a/deep/er/f",
            "one/b",
            "other/a/x",
            "other/b/now-a-folder",
            "other/c",
        ] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let mut seen = Vec::new();
        walk([Some(&one), Some(&other)], |pair| {
            let sides = [0, 1].map(|side| pair.sides[side].is_some());
            seen.push((pair.path.to_str().unwrap().to_owned(), sides));
            Ok::<_, WalkError>(())
        })
        .unwrap();
        let expected = [
            ("a", [true, true]),
            ("a/deep", [true, false]),
            ("a/deep/er", [true, false]),
            ("a/deep/er/f", [true, false]),
            ("a/x", [true, true]),
            ("b", [true, true]),
            ("b/now-a-folder", [false, true]),
            ("c", [false, true]),
        ];
        assert_eq!(seen, expected.map(|(path, sides)| (path.to_owned(), sides)));
    }
}
