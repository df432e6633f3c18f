//! Files by reading the file system here: of an ext4, for who may not mount.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use cdp_journal::view::View;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;

use super::draft::Draft;
use super::{Copied, link_on_the_way};
use crate::args::Files;
use crate::cmd::open_moment;
use crate::ext4::{Ext4, Inode, Kind, ROOT};
use crate::interrupt::Interrupt;
use crate::mount::{Found, Part, Unmountable, probe};
use crate::units::Bytes;

/// What may be remembered of a file system while it is copied: some million folders, or links.
const MEMORY_BYTES_MAX: usize = 256 << 20;
/// What a folder, or a file with further names, costs beside its path: about.
const REMEMBERED_BYTES: usize = 96;

/// What is remembered of a file system, as far as it grows with that.
#[derive(Debug, Default)]
struct Memory {
    bytes: usize,
    folders: u64,
    links: u64,
}

impl Memory {
    /// A folder was found.
    fn folder(&mut self, path: &Path) -> anyhow::Result<()> {
        self.folders += 1;
        self.add(path)
    }

    /// A file has further names.
    fn link(&mut self, path: &Path) -> anyhow::Result<()> {
        self.links += 1;
        self.add(path)
    }

    fn add(&mut self, path: &Path) -> anyhow::Result<()> {
        self.bytes += REMEMBERED_BYTES + path.as_os_str().len();
        if self.bytes > MEMORY_BYTES_MAX {
            bail!(
                "to copy this, {} folders and {} files whose further names were not found yet would have to be remembered in \
                 more than {}; give a part of the paths at a time, or run this as root, and it is mounted",
                self.folders,
                self.links,
                Bytes(MEMORY_BYTES_MAX as u64)
            );
        }
        Ok(())
    }

    /// The path of a folder is not needed any more: only that it was there.
    fn folder_left(&mut self, path: &Path) {
        self.bytes -= path.as_os_str().len();
    }

    /// All names of a file were found.
    fn link_done(&mut self, path: &Path) {
        self.links -= 1;
        self.bytes -= REMEMBERED_BYTES + path.as_os_str().len();
    }
}

/// What is to be copied of a folder, or of a path.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    All,
    Some(BTreeMap<OsString, Wanted>),
}

/// What is still to be done.
enum Task<'w> {
    /// Make a folder, and copy what is wanted of it.
    Enter {
        /// Below the root of the file system.
        path: PathBuf,
        inode: u32,
        wanted: &'w Wanted,
    },
    /// Everything in a folder is there.
    Leave { path: PathBuf, inode: Box<Inode> },
}

/// One file system, being copied.
struct Copying<'c, 'w> {
    fs: &'c Ext4<'c>,
    to: &'c Path,
    interrupt: &'c Interrupt,
    copied: &'c mut Copied,
    tasks: Vec<Task<'w>>,
    /// Folders that were entered: a second time would be a circle.
    entered: HashSet<u32>,
    /// Files with more names than were found so far: the first of them, and how many are missing.
    linked: HashMap<u32, (PathBuf, u16)>,
    memory: Memory,
}

/// Opens the moment and copies what is wanted.
pub(super) fn copy(args: &Files, paths: &[PathBuf], to: &Draft<'_>) -> anyhow::Result<Copied> {
    let interrupt = Interrupt::catch().context("catch Ctrl-C")?;
    let moment = open_moment(&args.source, &args.volume, &args.at, "files")?;
    let (view, mut copied) = (moment.view, Copied::of(moment.instant));
    let wanted = Wanted::of(paths);
    let (parts, left_out) = parts(&view, &args.volume, &wanted)?;
    copied.left_out = left_out;
    for (part, wanted) in parts {
        let to = match part.number {
            Some(number) => to.path().join(format!("p{number}")),
            None => to.path().to_owned(),
        };
        if part.number.is_some() {
            make_folder(&to)?;
        }
        let fs = open(&view, &part, &args.volume)?;
        let mut copying = Copying {
            fs: &fs,
            to: &to,
            interrupt: &interrupt,
            copied: &mut copied,
            tasks: Vec::new(),
            entered: HashSet::new(),
            linked: HashMap::new(),
            memory: Memory::default(),
        };
        copying.run(wanted)?;
    }
    Ok(copied)
}

/// What is to be read, and what cannot be.
type Parts<'w> = (Vec<(Part, &'w Wanted)>, Option<String>);

/// The file systems that something is wanted of: what `mount` would show, in the folders that it would have.
/// Beside them what else was found.
fn parts<'w>(view: &View, volume: &str, wanted: &'w Wanted) -> anyhow::Result<Parts<'w>> {
    let read_at = |offset, buf: &mut [u8]| view.read_at(offset, buf);
    let (parts, others): (Vec<_>, Vec<_>) = probe(&read_at, view.bytes())?
        .into_iter()
        .partition(|part| matches!(part.found, Found::FileSystem(_)));
    let others = others.iter().map(|part| match part.number {
        Some(number) => format!("{} in partition {number}", part.found),
        None => part.found.to_string(),
    });
    let found: Vec<_> = others.collect();
    if parts.is_empty() {
        return Err(Unmountable::NoFileSystem {
            volume: volume.to_owned(),
            found: found.join(", "),
        }
        .into());
    }
    let folder = |part: &Part| part.number.map(|number| OsString::from(format!("p{number}")));
    if let Wanted::Some(paths) = wanted
        && parts.iter().all(|part| part.number.is_some())
    {
        let names: Vec<_> = parts.iter().filter_map(folder).collect();
        if let Some(missing) = paths.keys().find(|path| !names.contains(path)) {
            bail!(
                "{}: {volume} has partitions, and paths begin with one of {}",
                missing.display(),
                names.join(OsStr::new(", ")).display()
            );
        }
    }
    let of_part = |part: Part| match (folder(&part), wanted) {
        (Some(name), Wanted::Some(paths)) => paths.get(&name).map(|wanted| (part, wanted)),
        _ => Some((part, wanted)),
    };
    let left_out = (!found.is_empty()).then(|| found.join(", "));
    Ok((parts.into_iter().filter_map(of_part).collect(), left_out))
}

fn open<'v>(view: &'v View, part: &Part, volume: &str) -> anyhow::Result<Ext4<'v>> {
    let place = part
        .number
        .map_or_else(String::new, |number| format!(" in partition {number}"));
    if part.found != Found::FileSystem("ext4") {
        bail!(
            "{volume} holds {}{place}, and without mounting only ext4 can be read; run this as root, and it is mounted",
            part.found
        );
    }
    let (start, len) = (part.offset, part.len);
    let read_at = move |offset: u64, buf: &mut [u8]| view.read_at(start + offset, buf);
    Ext4::open(Box::new(read_at), len).with_context(|| format!("read the file system of {volume}{place}"))
}

impl Wanted {
    /// What some paths ask for; everything, if there is none.
    fn of(paths: &[PathBuf]) -> Self {
        let mut root = match paths {
            [] => Wanted::All,
            _ => Wanted::Some(BTreeMap::new()),
        };
        for path in paths {
            root.add(path.components().map(|part| part.as_os_str()));
        }
        root
    }

    fn add<'p>(&mut self, mut parts: impl Iterator<Item = &'p OsStr>) {
        match (parts.next(), &mut *self) {
            (None, _) => *self = Wanted::All,
            (Some(_), Wanted::All) => {}
            (Some(name), Wanted::Some(below)) => below
                .entry(name.to_owned())
                .or_insert_with(|| Wanted::Some(BTreeMap::new()))
                .add(parts),
        }
    }

    /// One of the paths that it came from, below `path`.
    fn example(&self, path: &Path) -> PathBuf {
        let mut path = path.to_owned();
        let mut at = self;
        while let Wanted::Some(below) = at
            && let Some((name, next)) = below.first_key_value()
        {
            path.push(name);
            at = next;
        }
        path
    }
}

impl<'w> Copying<'_, 'w> {
    fn run(&mut self, wanted: &'w Wanted) -> anyhow::Result<()> {
        self.memory.folder(Path::new(""))?;
        self.tasks.push(Task::Enter {
            path: PathBuf::new(),
            inode: ROOT,
            wanted,
        });
        while let Some(task) = self.tasks.pop() {
            match task {
                Task::Enter { path, inode, wanted } => {
                    self.enter(&path, inode, wanted).with_context(|| told(&path))?;
                    self.memory.folder_left(&path);
                }
                Task::Leave { path, inode } => self
                    .keep(&self.to.join(&path), &inode)
                    .with_context(|| told(&path))?,
            }
        }
        Ok(())
    }

    fn enter(&mut self, path: &Path, number: u32, wanted: &'w Wanted) -> anyhow::Result<()> {
        if !self.entered.insert(number) {
            bail!("the file system is damaged: this folder lies inside itself, or in two places");
        }
        let inode = self.fs.inode(number)?;
        let is_root = path.as_os_str().is_empty();
        if !is_root {
            make_folder(&self.to.join(path))?;
        }
        // Of the root, what was there belongs to it only if it is wanted itself.
        if !is_root || *wanted == Wanted::All {
            self.tasks.push(Task::Leave {
                path: path.to_owned(),
                inode: Box::new(inode.clone()),
            });
        }
        let fs = self.fs;
        match wanted {
            Wanted::All => fs.entries(&inode, &mut |name, number| {
                self.entry(&path.join(OsStr::from_bytes(name)), number, wanted)
            }),
            Wanted::Some(names) => names.iter().try_for_each(|(name, wanted)| {
                let path = path.join(name);
                let number = fs.find(&inode, name.as_bytes())?;
                let number = number.ok_or_else(|| not_there(Errno::NOENT, wanted, &path))?;
                self.entry(&path, number, wanted)
            }),
        }
    }

    fn entry(&mut self, path: &Path, number: u32, wanted: &'w Wanted) -> anyhow::Result<()> {
        self.interrupt.check()?;
        let fs = self.fs;
        let inode = fs.inode(number).with_context(|| told(path))?;
        if inode.kind() == Kind::Directory {
            self.memory.folder(path).with_context(|| told(path))?;
            self.tasks.push(Task::Enter {
                path: path.to_owned(),
                inode: number,
                wanted,
            });
            return Ok(());
        }
        if *wanted != Wanted::All {
            if inode.kind() != Kind::Symlink {
                return Err(not_there(Errno::NOTDIR, wanted, path));
            }
            let target = fs.link_target(&inode)?;
            let target = Path::new(OsStr::from_bytes(&target));
            return Err(link_on_the_way(&wanted.example(path), path, target));
        }
        if inode.kind() == Kind::Regular {
            self.copied.files += 1;
            self.copied.bytes += inode.size();
        }
        self.file(&self.to.join(path), &inode).with_context(|| told(path))
    }

    /// Anything but a folder.
    fn file(&mut self, to: &Path, inode: &Inode) -> anyhow::Result<()> {
        if let Some((first, missing)) = self.linked.get_mut(&inode.number()) {
            fs::hard_link(&*first, to).context("link it")?;
            *missing -= 1;
            if *missing == 0
                && let Some((first, _)) = self.linked.remove(&inode.number())
            {
                self.memory.link_done(&first);
            }
            return Ok(());
        }
        match inode.kind() {
            Kind::Regular => self.regular(to, inode)?,
            Kind::Symlink => {
                let target = self.fs.link_target(inode)?;
                symlink(OsStr::from_bytes(&target), to).context("make the link")?;
            }
            _ => special(to, inode)?,
        }
        self.keep(to, inode)?;
        if inode.links() > 1 {
            let missing = inode.links() - 1;
            self.memory.link(to)?;
            self.linked.insert(inode.number(), (to.to_owned(), missing));
        }
        Ok(())
    }

    /// Holes stay holes.
    fn regular(&self, to: &Path, inode: &Inode) -> anyhow::Result<()> {
        let mut options = File::options();
        let file = options.write(true).create_new(true).mode(0o600).open(to);
        let file = file.context("make it")?;
        self.fs.content(inode, &mut |offset, bytes| {
            self.interrupt.check()?;
            file.write_all_at(bytes, offset).context("write it")
        })?;
        file.set_len(inode.size()).context("write it")
    }

    fn keep(&mut self, to: &Path, inode: &Inode) -> anyhow::Result<()> {
        let attributes = self.fs.attributes(inode)?;
        self.copied.lost.keep(to, inode, &attributes)
    }
}

/// How the root of a file system, or what lies below it, is named in messages.
fn told(path: &Path) -> String {
    match path.as_os_str().is_empty() {
        true => "/".to_owned(),
        false => path.display().to_string(),
    }
}

fn not_there(why: Errno, wanted: &Wanted, path: &Path) -> anyhow::Error {
    let path = wanted.example(path);
    anyhow::Error::new(io::Error::from(why)).context(format!("{} in the moment", path.display()))
}

fn make_folder(path: &Path) -> anyhow::Result<()> {
    let made = DirBuilder::new().mode(0o700).create(path);
    made.context("make the folder")
}

/// Pipes and sockets are for everybody to make, devices for root.
fn special(to: &Path, inode: &Inode) -> anyhow::Result<()> {
    let kind = match inode.kind() {
        Kind::Fifo => FileType::Fifo,
        Kind::Socket => FileType::Socket,
        Kind::BlockDevice => FileType::BlockDevice,
        _ => FileType::CharacterDevice,
    };
    let (major, minor) = inode.device();
    let device = match kind {
        FileType::BlockDevice | FileType::CharacterDevice => makedev(major, minor),
        _ => 0,
    };
    match mknodat(CWD, to, kind, Mode::RUSR | Mode::WUSR, device) {
        Err(Errno::PERM) => bail!(
            "a {}, which only root may make; give the paths that are wanted beside it, or run this as root",
            inode.kind()
        ),
        made => made.with_context(|| format!("make the {}", inode.kind())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what is remembered has a bound, and what is forgotten counts no more. Method: more than fits, the same again
    /// and again, and both told.
    #[test]
    fn what_is_remembered_has_a_bound() {
        let path = PathBuf::from("x".repeat(1000));
        let fit = (MEMORY_BYTES_MAX / (REMEMBERED_BYTES + 1000)) as u64;
        let mut memory = Memory::default();
        for _ in 0..2 * fit {
            memory.link(&path).unwrap();
            memory.link_done(&path);
        }
        assert_eq!((memory.bytes, memory.links), (0, 0));
        for _ in 0..fit {
            memory.folder(&path).unwrap();
            memory.folder_left(&path);
            memory.folder(Path::new("")).unwrap();
            memory.folder_left(Path::new(""));
        }
        let bytes = memory.bytes;
        assert_eq!(bytes, 2 * fit as usize * REMEMBERED_BYTES);
        let error = loop {
            if let Err(error) = memory.link(&path) {
                break error.to_string();
            }
        };
        let expected = format!("{} folders and {} files", 2 * fit, memory.links);
        assert!(
            error.contains(&expected) && error.contains("256 MiB") && error.contains("part of the paths"),
            "{error}"
        );
    }

    #[test]
    fn paths_become_what_is_wanted_of_each_folder() {
        let wanted = |paths: &[&str]| Wanted::of(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        let some = |below: Vec<(&str, Wanted)>| {
            Wanted::Some(
                below
                    .into_iter()
                    .map(|(name, wanted)| (name.into(), wanted))
                    .collect(),
            )
        };
        assert_eq!(wanted(&[]), Wanted::All);
        assert_eq!(wanted(&["a", ""]), Wanted::All);
        let expected = some(vec![
            ("a", some(vec![("b", Wanted::All), ("c", Wanted::All)])),
            ("d", Wanted::All),
        ]);
        // Whichever comes first, of a folder and what lies in it, the folder it is.
        assert_eq!(wanted(&["a/b", "d/e", "a/c", "a/b/x", "d"]), expected);
        assert_eq!(expected.example(Path::new("")), PathBuf::from("a/b"));
    }
}
