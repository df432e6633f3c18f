//! `files`: paths of a moment, as they were, through a mount. What is the same without one is in `files_unmounted`.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::damage::damage;
use crate::ext4::{History, Image};
use crate::program::{Ran, Rights, names_in, programs_for, root_for};
use crate::store::{Store, noise};

/// What a path is: kind and mode, owner, time of change, content or target, names that it has.
pub(crate) type Facts = (u32, u32, i64, Vec<u8>, u64);

/// Everything below a folder, and the folder itself.
pub(crate) fn facts(tree: &Path) -> BTreeMap<PathBuf, Facts> {
    let mut found = BTreeMap::new();
    let mut rest = vec![tree.to_owned()];
    while let Some(path) = rest.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let content = match metadata.file_type() {
            kind if kind.is_dir() => {
                let names = names_in(&path).into_iter().filter(|name| name != "lost+found");
                rest.extend(names.map(|name| path.join(name)));
                Vec::new()
            }
            kind if kind.is_symlink() => fs::read_link(&path)
                .unwrap()
                .into_os_string()
                .into_encoded_bytes(),
            kind if kind.is_file() => fs::read(&path).unwrap(),
            _ => format!("device {:#x}", metadata.rdev()).into_bytes(),
        };
        let links = if metadata.is_dir() { 0 } else { metadata.nlink() };
        let below = path.strip_prefix(tree).unwrap().to_owned();
        found.insert(
            below,
            (metadata.mode(), metadata.uid(), metadata.mtime(), content, links),
        );
    }
    found
}

fn set_time(path: &Path, seconds: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let file = File::open(path).unwrap();
    file.set_times(FileTimes::new().set_modified(time).set_accessed(time))
        .unwrap();
}

/// A tree with something of everything that any file system has.
fn tree(folder: &Path) -> PathBuf {
    let tree = folder.join("tree");
    let home = tree.join("home/ann");
    fs::create_dir_all(&home).unwrap();
    fs::write(home.join("letter"), b"dear Bob").unwrap();
    fs::write(home.join("large"), (0..50).flat_map(noise).collect::<Vec<u8>>()).unwrap();
    fs::hard_link(home.join("letter"), home.join("same letter")).unwrap();
    symlink("letter", home.join("link")).unwrap();
    symlink("/etc", tree.join("out")).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(home.join("letter"), "user.colour", b"blue", flags).unwrap();
    fs::set_permissions(home.join("letter"), Permissions::from_mode(0o640)).unwrap();
    chown(home.join("letter"), Some(1234), Some(2345)).unwrap();
    chown(&home, Some(1234), Some(2345)).unwrap();
    fs::set_permissions(&home, Permissions::from_mode(0o710)).unwrap();
    for (index, name) in ["home/ann/letter", "home/ann/large", "home/ann", "home", ""]
        .iter()
        .enumerate()
    {
        set_time(&tree.join(name), 1_600_000_000 + index as u64);
    }
    tree
}

pub(crate) struct Scene {
    pub(crate) store: Store,
    /// As it was at first.
    pub(crate) tree: PathBuf,
    pub(crate) first: String,
}

impl Scene {
    /// `None` where it cannot be played.
    fn new(test: &str) -> Option<Self> {
        Scene::with(test, |_| {})
    }

    /// The same with more in the tree.
    pub(crate) fn with(test: &str, add: impl FnOnce(&Path)) -> Option<Self> {
        if !root_for(test) || !programs_for(test, &["mkfs.ext4", "debugfs", "cp", "setpriv"]) {
            return None;
        }
        let store = Store::empty();
        let tree = tree(&store.beside(""));
        add(&tree);
        let image = Image::of_folder(tempfile::tempdir().unwrap(), &tree);
        let mut history = History::begin(&store.path(), &image);
        let large = image.block_of("home/ann/large");
        let first = history.write_block(image.blocks() - 1, &noise(1));
        image.debugfs("rm home/ann/link");
        history.write(&image);
        history.write_block(large, &noise(1000));
        history.close();
        Some(Scene {
            store,
            tree,
            first: format!("seq:{first}"),
        })
    }

    fn files(&self, when: &str, to: &Path, more: &[&str]) -> Ran {
        self.files_with(Rights::All, when, to, more)
    }

    /// `files` run with some rights only.
    pub(crate) fn files_with(&self, rights: Rights, when: &str, to: &Path, more: &[&str]) -> Ran {
        let arguments = ["pg", "--at", when, "--to", to.to_str().unwrap()];
        let arguments = [&arguments[..], more].concat();
        Ran::from(
            rights
                .command(self.store.arguments("files", &arguments))
                .output()
                .unwrap(),
        )
    }
}

/// Goal: what is copied is what was there, with all that belongs to it. Method: a tree with something of everything,
/// copied whole, in part, and as it was later.
#[test]
fn paths_come_back_as_they_were() {
    let Some(scene) = Scene::new("paths_come_back_as_they_were") else {
        return;
    };
    let to = scene.store.beside("to");
    let whole = to.join("whole");
    scene
        .files(&scene.first, &whole, &[])
        .exits(1)
        .says(&["make a folder in"]);
    fs::create_dir(&to).unwrap();
    let told = scene.files(&scene.first, &whole, &["--json"]).exits(0).json();
    assert_eq!(told["files"], 3, "{told:#}");
    let (mut found, mut expected) = (facts(&whole), facts(&scene.tree));
    // mkfs has put lost+found there.
    for facts in [&mut found, &mut expected] {
        facts.remove(Path::new(""));
    }
    for (path, facts) in &expected {
        assert!(found.get(path) == Some(facts), "{} is another", path.display());
    }
    assert_eq!(found.len(), expected.len());
    let mut colour = [0; 16];
    let bytes = rustix::fs::getxattr(whole.join("home/ann/letter"), "user.colour", &mut colour).unwrap();
    assert_eq!(&colour[..bytes], b"blue");

    let part = to.join("part");
    fs::create_dir(&part).unwrap();
    let paths = ["home/ann/letter", "/home/ann/link", "out"];
    scene.files(&scene.first, &part, &paths).exits(0);
    let mut names: Vec<_> = facts(&part).into_keys().collect();
    names.retain(|name| part.join(name).is_symlink() || !part.join(name).is_dir());
    assert_eq!(
        names,
        ["home/ann/letter", "home/ann/link", "out"].map(PathBuf::from)
    );
    // Another moment has other files.
    let later = to.join("later");
    scene.files("latest", &later, &["home"]).exits(0);
    assert!(!later.join("home/ann/link").is_symlink() && later.join("home/ann/letter").is_file());
    let large = |folder: &Path| fs::read(folder.join("home/ann/large")).unwrap();
    assert!(large(&later) != large(&whole));
}

#[test]
fn what_cannot_be_copied_leaves_nothing() {
    if let Some(scene) = Scene::new("what_cannot_be_copied_leaves_nothing") {
        expect_nothing_left(&scene, Rights::All);
    }
}

/// Paths that are not there, or lead out of the moment; a folder that is in use; damage.
pub(crate) fn expect_nothing_left(scene: &Scene, rights: Rights) {
    let files = |when: &str, to: &Path, more: &[&str]| scene.files_with(rights, when, to, more);
    let to = scene.store.beside("to");
    fs::create_dir(&to).unwrap();
    let then = to.join("then");
    let nothing: [&str; 0] = [];
    for (path, says) in [
        ("home/bob", "home/bob in the moment: No such file"),
        (
            "home/ann/letter/x",
            "home/ann/letter/x in the moment: Not a directory",
        ),
        ("../etc/passwd", "without `..`"),
        ("out/passwd", "symbolic link to /etc"),
    ] {
        files(&scene.first, &then, &[path]).exits(1).says(&[says]);
        assert_eq!(names_in(&to), nothing, "{path}");
    }
    fs::create_dir(&then).unwrap();
    fs::write(then.join("mine"), "mine").unwrap();
    files(&scene.first, &then, &[]).exits(1).says(&["is not empty"]);
    assert_eq!(fs::read(then.join("mine")).unwrap(), b"mine");
    fs::remove_dir_all(&then).unwrap();
    damage(&scene.store, 1000);
    files("latest", &then, &[]).exits(4).says(&["damaged at byte"]);
    assert_eq!(names_in(&to), nothing);
    files("latest", &then, &["home/ann/letter"]).exits(0);
}
