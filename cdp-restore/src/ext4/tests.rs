//! Against e2fsprogs: file systems that `mke2fs` makes of folders, changed by `debugfs`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::checksum::Seed;
use super::*;
use crate::bytes::be32;
use crate::random::random;

/// What a path is: inode mode, owner, time of change, content or target, names that it has, attributes.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    mode: u32,
    owner: (u32, u32),
    modified: i64,
    content: Vec<u8>,
    links: u64,
    attributes: BTreeMap<Vec<u8>, Vec<u8>>,
}

type Listing = BTreeMap<PathBuf, Facts>;

#[track_caller]
fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A file system in a file, whose free blocks are full of what belongs to nobody.
struct Image {
    folder: TempDir,
}

impl Image {
    fn of(tree: &Path, bytes: u64, options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = Image { folder };
        let path = image.path();
        fs::write(&path, vec![0xa5; bytes as usize]).unwrap();
        let (path, tree) = (path.to_str().unwrap(), tree.to_str().unwrap());
        let always = ["-q", "-F", "-t", "ext4", "-d", tree];
        tool("mke2fs", &[&always[..], options, &[path]].concat());
        image
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn copy(&self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(self.path(), folder.path().join("image")).unwrap();
        Image { folder }
    }

    /// Changes it by commands of debugfs.
    #[track_caller]
    fn debugfs(&self, commands: &[String]) -> String {
        let script = self.folder.path().join("script");
        fs::write(&script, commands.join("\n")).unwrap();
        let (script, path) = (script.to_str().unwrap().to_owned(), self.path());
        tool("debugfs", &["-w", "-f", &script, path.to_str().unwrap()])
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.path()).unwrap()
    }

    fn open(&self) -> Result<Ext4<'static>, Ext4Error> {
        let file = File::open(self.path()).unwrap();
        let bytes = file.metadata().unwrap().len();
        let read_at = move |offset, buf: &mut [u8]| {
            // Nothing of a file system lies beyond its end.
            file.read_exact_at(buf, offset).unwrap();
            Ok(())
        };
        Ext4::open(Box::new(read_at), bytes)
    }

    #[track_caller]
    fn listing(&self) -> Listing {
        listing(&self.open().unwrap()).unwrap()
    }
}

fn open_bytes(bytes: &[u8]) -> Result<Ext4<'_>, Ext4Error> {
    let read_at = |offset, buf: &mut [u8]| {
        let start = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&bytes[start..start + buf.len()]);
        Ok(())
    };
    Ext4::open(Box::new(read_at), bytes.len() as u64)
}

/// Everything in a file system, but what mke2fs puts there.
fn listing(fs: &Ext4<'_>) -> Result<Listing, Ext4Error> {
    let mut found = Listing::new();
    let mut rest = vec![(PathBuf::new(), ROOT)];
    while let Some((path, number)) = rest.pop() {
        let inode = fs.inode(number)?;
        let mut content = Vec::new();
        match inode.kind() {
            Kind::Directory => {
                // A circle would have no end.
                if path.components().count() > 40 {
                    return Err(corrupt("too deep"));
                }
                fs.entries(&inode, &mut |name, number| {
                    let name = path.join(std::ffi::OsStr::from_bytes(name));
                    if name != Path::new("lost+found") {
                        rest.push((name, number));
                    }
                    Ok::<_, Ext4Error>(())
                })?;
            }
            Kind::Regular => content = fs.small_content(&inode, 64 << 20)?,
            Kind::Symlink => content = fs.link_target(&inode)?,
            _ => content = format!("{:?}", inode.device()).into_bytes(),
        }
        let is_folder = inode.kind() == Kind::Directory;
        let attributes = fs.attributes(&inode)?;
        let facts = Facts {
            mode: u32::from(le16(&inode.raw_for_tests()[..2], 0)),
            owner: (inode.uid(), inode.gid()),
            // mke2fs gives the root one of its own.
            modified: if number == ROOT {
                0
            } else {
                inode.modified().seconds
            },
            content,
            links: if is_folder { 0 } else { inode.links().into() },
            attributes: attributes
                .into_iter()
                .map(|attribute| (attribute.name, attribute.value))
                .collect(),
        };
        found.insert(path, facts);
    }
    Ok(found)
}

/// The same of a folder, as the kernel tells it.
fn listing_of(tree: &Path) -> Listing {
    let mut found = Listing::new();
    let mut rest = vec![tree.to_owned()];
    while let Some(path) = rest.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        let content = if kind.is_dir() {
            rest.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else if kind.is_file() {
            fs::read(&path).unwrap()
        } else if kind.is_symlink() {
            fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()
        } else {
            let device = metadata.rdev();
            format!("{:?}", (rustix::fs::major(device), rustix::fs::minor(device))).into_bytes()
        };
        let facts = Facts {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            modified: if path == tree { 0 } else { metadata.mtime() },
            content,
            links: if kind.is_dir() { 0 } else { metadata.nlink() },
            attributes: attributes_of(&path),
        };
        found.insert(path.strip_prefix(tree).unwrap().to_owned(), facts);
    }
    found
}

fn attributes_of(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let bytes = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..bytes].split(|byte| *byte == 0);
    let value = |name: &[u8]| {
        let mut value = vec![0; 1 << 16];
        let bytes = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        (name.to_vec(), value[..bytes].to_vec())
    };
    names.filter(|name| !name.is_empty()).map(value).collect()
}

#[track_caller]
fn assert_same(found: &Listing, expected: &Listing, what: &str) {
    let names = |listing: &Listing| listing.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{what}");
    for (path, expected) in expected {
        let found = &found[path];
        let at =
            (found.content.iter().zip(&expected.content)).position(|(found, expected)| found != expected);
        let lens = (found.content.len(), expected.content.len());
        assert_eq!(
            (at, lens.0),
            (None, lens.1),
            "{what}: content of {}",
            path.display()
        );
        assert!(
            found == expected,
            "{what}: {}: {found:?} for {expected:?}",
            path.display()
        );
    }
}

fn set_attribute(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

/// Lets user 1234 read, where the folder's file system has lists of access rights.
fn set_access_list(path: &Path) {
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in [
        (1_u16, 6_u16, u32::MAX),
        (2, 4, 1234),
        (4, 4, u32::MAX),
        (8, 2, 70_000),
        (0x10, 6, u32::MAX),
        (0x20, 0, u32::MAX),
    ] {
        list.extend([tag.to_le_bytes(), rights.to_le_bytes()].concat());
        list.extend(id.to_le_bytes());
    }
    let name = "system.posix_acl_access";
    match rustix::fs::lsetxattr(path, name, &list, rustix::fs::XattrFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
        Err(errno) => panic!("{errno}"),
    }
}

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut next = random(seed);
    (0..bytes).map(|_| next(256) as u8).collect()
}

/// A folder with many kinds of entries.
fn tree(folder: &Path) -> PathBuf {
    let tree = folder.join("tree");
    let deep = (0..30).fold(tree.clone(), |path, level| path.join(format!("level {level}")));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), "deep down").unwrap();
    fs::create_dir(tree.join("nothing in it")).unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    fs::write(tree.join("large"), noise(1, 2_345_678)).unwrap();
    for bytes in [1, 59, 60, 61, 100, 150, 160, 200, 1023, 1024, 4095, 4096, 4097] {
        fs::write(tree.join(format!("{bytes} bytes")), noise(bytes, bytes as usize)).unwrap();
    }
    // A hole after each block makes many extents, and a tree of them.
    let holes = File::create(tree.join("holes")).unwrap();
    for block in 0..1200_u64 {
        holes.write_all_at(&noise(block, 4096), block * 8192).unwrap();
    }
    File::create(tree.join("one hole"))
        .unwrap()
        .set_len(3 << 20)
        .unwrap();
    for name in [
        "two words",
        "new\nline",
        "\u{fc}ml\u{e4}ut \u{1f600}",
        "-rf",
        "'\"\\",
        &"n".repeat(255),
    ] {
        fs::write(tree.join(name), name).unwrap();
    }
    let not_utf8 = std::ffi::OsStr::from_bytes(b"\xff\xfe\x01");
    fs::write(tree.join(not_utf8), "bytes").unwrap();
    symlink("large", tree.join("short link")).unwrap();
    for bytes in [59, 60, 61, 159, 160, 1000] {
        symlink("l".repeat(bytes), tree.join(format!("link of {bytes}"))).unwrap();
    }
    symlink(not_utf8, tree.join("odd link")).unwrap();
    fs::hard_link(tree.join("large"), tree.join("level 0/same")).unwrap();
    fs::hard_link(tree.join("large"), tree.join("nothing in it too")).unwrap();
    let many = tree.join("many");
    fs::create_dir(&many).unwrap();
    for index in 0..300 {
        fs::write(
            many.join(format!("a file with a name of some length {index}")),
            format!("{index}"),
        )
        .unwrap();
    }
    let small = tree.join("few");
    fs::create_dir(&small).unwrap();
    for index in 0..4 {
        fs::write(small.join(format!("{index}")), "x").unwrap();
    }
    set_attribute(&tree.join("empty"), "user.colour", b"blue");
    set_attribute(&tree.join("empty"), "user.nothing", b"");
    set_attribute(&tree.join("large"), "user.long", &noise(2, 300));
    set_attribute(&tree.join("1 bytes"), "user.some", &noise(3, 40));
    set_access_list(&tree.join("4096 bytes"));
    set_attribute(&many, "user.of a folder", &noise(4, 200));
    rustix::fs::mknodat(
        rustix::fs::CWD,
        tree.join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let mode = |name: &str, mode| {
        fs::set_permissions(
            tree.join(name),
            std::os::unix::fs::PermissionsExt::from_mode(mode),
        )
        .unwrap();
    };
    mode("empty", 0o4751);
    mode("few", 0o1775);
    // mke2fs keeps 32 bits of them.
    for (name, seconds) in [("empty", -1), ("1 bytes", 2_000_000_000), ("few", 86_400)] {
        let times = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec {
                tv_sec: seconds,
                tv_nsec: 0,
            },
            last_modification: rustix::fs::Timespec {
                tv_sec: seconds,
                tv_nsec: 0,
            },
        };
        rustix::fs::utimensat(
            rustix::fs::CWD,
            tree.join(name),
            &times,
            rustix::fs::AtFlags::empty(),
        )
        .unwrap();
    }
    tree
}

/// Goal: whatever mke2fs can make of a folder is read as that folder. Method: a folder with many kinds of entries, and
/// every form in which blocks, inodes and directories come.
#[test]
fn what_mke2fs_makes_of_a_folder_is_read_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let tree = tree(folder.path());
    let expected = listing_of(&tree);
    for options in [
        "-b 4096",
        "-b 1024",
        "-b 2048 -I 128",
        "-b 4096 -I 512 -O inline_data",
        "-b 1024 -O inline_data",
        "-b 4096 -O ^64bit,^metadata_csum",
        "-b 4096 -O metadata_csum_seed,large_dir,quota,project -I 256",
        "-b 1024 -O meta_bg,^resize_inode",
        "-b 1024 -O meta_bg,^resize_inode,^64bit,^sparse_super",
        "-b 1024 -O bigalloc",
        "-b 1024 -O ^extent,^64bit",
        "-b 4096 -O ^extent,^64bit,^has_journal,^metadata_csum",
        "-b 65536",
        "-b 4096 -O sparse_super2,^flex_bg,uninit_bg,^metadata_csum",
    ] {
        let options: Vec<_> = options.split(' ').collect();
        let image = Image::of(&tree, 48 << 20, &options);
        assert_same(&image.listing(), &expected, &format!("{options:?}"));
        // With an index in its directories.
        let index = Command::new("e2fsck").args(["-fyD"]).arg(image.path()).output();
        assert!(index.unwrap().status.code().is_some_and(|code| code <= 1));
        assert_same(&image.listing(), &expected, &format!("{options:?}, indexed"));
    }
}

/// Goal: what was reserved and not written reads as zero, whoever had those blocks before. Method: blocks that debugfs
/// reserves, before, between and after written ones, where free blocks are not zero.
#[test]
fn what_was_reserved_and_not_written_is_a_hole() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let file = File::create(tree.join("file")).unwrap();
    for block in [3_u64, 4, 10, 40] {
        file.write_all_at(&noise(block, 4096), block * 4096).unwrap();
    }
    file.set_len(100 * 4096 + 7).unwrap();
    let image = Image::of(&tree, 8 << 20, &["-b", "4096"]);
    image.debugfs(&["fallocate /file 0 90".to_owned()]);
    assert!(image.debugfs(&["ex /file".to_owned()]).contains("Uninit"));
    let fs = image.open().unwrap();
    let inode = fs
        .inode(fs.find(&fs.inode(ROOT).unwrap(), b"file").unwrap().unwrap())
        .unwrap();
    let mut written = Vec::new();
    fs.content(&inode, &mut |offset, bytes| {
        written.extend(
            (offset..offset + bytes.len() as u64)
                .step_by(4096)
                .map(|at| at / 4096),
        );
        Ok::<_, Ext4Error>(())
    })
    .unwrap();
    assert_eq!(written, [3, 4, 10, 40]);
    assert_same(&image.listing(), &listing_of(&tree), "reserved");
}

/// Goal: times are told to the nanosecond, also after 2038 and before 1970; devices by both of their numbers. Method: fields that debugfs
/// sets.
#[test]
fn times_and_devices_are_told_whole() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "x").unwrap();
    let image = Image::of(folder.path(), 8 << 20, &["-b", "4096"]);
    let commands = [
        "sif /file mtime @0x80000000",
        "sif /file mtime_extra 0x1d6f3456",
        "sif /file atime @0x7fffffff",
        "sif /file atime_extra 0xee6b27fd",
        "mknod block b 259 60000",
        "mknod character c 5 1",
    ];
    image.debugfs(&commands.map(str::to_owned));
    let fs = image.open().unwrap();
    let root = fs.inode(ROOT).unwrap();
    let inode = |name: &str| {
        fs.inode(fs.find(&root, name.as_bytes()).unwrap().unwrap())
            .unwrap()
    };
    let (modified, accessed) = (inode("file").modified(), inode("file").accessed());
    // The high bits are added to a low half that has a sign.
    assert_eq!(modified.seconds, -0x8000_0000 + (2 << 32));
    assert_eq!(modified.nanoseconds, 0x1d6f_3456 >> 2);
    assert_eq!(accessed.seconds, 0x7fff_ffff + (1 << 32));
    assert_eq!(accessed.nanoseconds, 999_999_999);
    assert_eq!(
        (inode("block").kind(), inode("block").device()),
        (Kind::BlockDevice, (259, 60_000))
    );
    assert_eq!(
        (inode("character").kind(), inode("character").device()),
        (Kind::CharacterDevice, (5, 1))
    );
}

/// Goal: large attributes come from where they lie. Method: one that takes an inode of its own, set by debugfs.
#[test]
fn a_large_attribute_is_told_whole() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "x").unwrap();
    let value = folder.path().join("value");
    fs::write(&value, noise(7, 4096)).unwrap();
    let image = Image::of(folder.path(), 8 << 20, &["-b", "4096", "-O", "ea_inode"]);
    image.debugfs(&[format!("ea_set -f {} /file user.large", value.display())]);
    let listing = image.listing();
    let attributes = &listing[Path::new("file")].attributes;
    assert!(attributes[&b"user.large"[..]] == noise(7, 4096));
}

/// Goal: a file system that was cut off is refused, as by the kernel. Method: the last block of one missing.
#[test]
fn what_is_larger_than_its_place_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = Image::of(folder.path(), 8 << 20, &["-b", "4096"]).bytes();
    for len in [0, 1500, 4096, bytes.len() - 4096] {
        assert!(
            matches!(open_bytes(&bytes[..len]), Err(Ext4Error::Corrupt(_))),
            "{len}"
        );
    }
    assert!(open_bytes(&bytes).is_ok());
}

/// Blocks of 4 KiB in which two images differ, but the superblock.
fn differences(before: &[u8], after: &[u8]) -> Vec<usize> {
    let pairs = before.chunks(4096).zip(after.chunks(4096)).enumerate().skip(1);
    pairs
        .filter(|(_, (a, b))| a != b)
        .map(|(number, _)| number)
        .collect()
}

/// A file system whose journal holds what a change has written.
struct Journaled {
    image: Image,
    before: Listing,
    after: Listing,
}

impl Journaled {
    /// Of a change in one or several transactions, the newest copy of each block last.
    fn new(options: &[&str], checksums: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        fs::create_dir_all(tree.join("home")).unwrap();
        fs::write(tree.join("home/old"), noise(1, 20_000)).unwrap();
        fs::write(tree.join("home/changed"), noise(2, 50_000)).unwrap();
        let image = Image::of(&tree, 32 << 20, &[&["-b", "4096"], options].concat());
        let new = folder.path().join("new");
        // Begins as blocks of a journal do.
        let mut bytes = noise(3, 30_000);
        bytes[4096..4100].copy_from_slice(&[0xc0, 0x3b, 0x39, 0x98]);
        fs::write(&new, &bytes).unwrap();
        let changed = image.copy();
        let new = new.to_str().unwrap();
        changed.debugfs(&[
            "rm /home/old".to_owned(),
            "mkdir /more".to_owned(),
            format!("write {new} more/new"),
        ]);
        let (before, after) = (image.listing(), changed.listing());
        assert!(before != after && after[Path::new("more/new")].content == bytes);

        let (old, wanted) = (image.bytes(), changed.bytes());
        let blocks = differences(&old, &wanted);
        let revoked = image.debugfs(&["blocks /home/changed".to_owned()]);
        let revoked: Vec<_> = revoked
            .lines()
            .last()
            .unwrap()
            .split_whitespace()
            .take(5)
            .collect();
        let revoked = revoked.join(",");
        let list = |blocks: &[usize]| {
            let names: Vec<_> = blocks.iter().map(usize::to_string).collect();
            names.join(",")
        };
        let content = |name: &str, parts: &mut dyn Iterator<Item = Vec<u8>>| {
            let path = folder.path().join(name);
            fs::write(&path, parts.flatten().collect::<Vec<u8>>()).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let block = |number: &usize| wanted[number * 4096..(number + 1) * 4096].to_vec();
        let (early, late) = blocks.split_at(blocks.len() / 2);
        let bad = content("bad", &mut (0..5).map(|seed| noise(100 + seed, 4096)));
        let stale = content(
            "stale",
            &mut early.iter().map(|number| noise(*number as u64, 4096)),
        );
        let (early_bytes, late_bytes) = (
            content("early", &mut early.iter().map(block)),
            content("late", &mut late.iter().map(block)),
        );
        image.debugfs(&[
            format!("jo {checksums}"),
            // Copies of blocks that were metadata once, and became a file's: taken back by the next.
            format!("jw -b {revoked} {bad}"),
            format!("jw -b {} {stale}", list(early)),
            format!("jw -r {revoked}"),
            format!("jw -b {} {early_bytes}", list(early)),
            format!("jw -b {} {late_bytes}", list(late)),
            "jc".to_owned(),
        ]);
        Journaled { image, before, after }
    }

    /// Turns the journal by so many blocks.
    fn turned(&self, by: u32) -> Vec<u8> {
        let mut bytes = self.image.bytes();
        // Without its journal being replayed, to find where it lies.
        let mut plain = bytes.clone();
        let features = le32(&plain, 1024 + 0x60) & !0x4;
        plain[1024 + 0x60..][..4].copy_from_slice(&features.to_le_bytes());
        let has_sum = le32(&plain, 1024 + 0x64) & 0x400 != 0;
        let sum = Seed::ONES.add(&plain[1024..1024 + 0x3fc]).value();
        if has_sum {
            plain[1024 + 0x3fc..][..4].copy_from_slice(&sum.to_le_bytes());
        }
        let fs = open_bytes(&plain).unwrap();
        let mut places = Vec::new();
        fs.runs(&fs.inode(8).unwrap(), &mut |run| {
            assert_eq!(run.logical, places.len() as u64);
            places.extend((0..run.blocks).map(|block| (run.physical + block) as usize * 4096));
            Ok::<_, Ext4Error>(())
        })
        .unwrap();
        let head = places[0];
        let (end, first) = (be32(&bytes, head + 0x10), be32(&bytes, head + 0x14));
        let turn = |number: u32| first + (number - first + by) % (end - first);
        for number in first..end {
            let (from, to) = (places[number as usize], places[turn(number) as usize]);
            bytes[to..to + 4096].copy_from_slice(&plain[from..from + 4096]);
        }
        let start = turn(be32(&bytes, head + 0x1c));
        bytes[head + 0x1c..head + 0x20].copy_from_slice(&start.to_be_bytes());
        if be32(&bytes, head + 0x28) & 0x18 != 0 {
            bytes[head + 0xfc..head + 0x100].fill(0);
            let sum = Seed::ONES.add(&bytes[head..head + 1024]).value();
            bytes[head + 0xfc..head + 0x100].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }
}

/// Goal: what had been committed is there, though it lies in the journal alone; what a later transaction took back is
/// not. Method: a change of a file system, put into the journal by debugfs, after other copies of some of its blocks and
/// of blocks that are revoked, in all forms of journals; then the same journal, turned so that it goes around its end.
#[test]
fn what_lies_in_the_journal_counts() {
    for (options, checksums) in [
        (&["-O", "64bit,metadata_csum"][..], "-c -v 3"),
        (&["-O", "64bit,metadata_csum"][..], "-c -v 2"),
        (&["-O", "^64bit,metadata_csum"][..], "-c -v 3"),
        (&["-O", "^64bit,metadata_csum"][..], "-c -v 2"),
        (&["-O", "64bit,^metadata_csum"][..], ""),
        (&["-O", "^64bit,^metadata_csum"][..], ""),
    ] {
        let what = format!("{options:?} {checksums:?}");
        let journaled = Journaled::new(options, checksums);
        assert_same(&journaled.image.listing(), &journaled.after, &what);
        for back in 1..30 {
            let bytes = journaled.turned(1023 - back);
            let found = listing(&open_bytes(&bytes).unwrap()).unwrap();
            assert_same(
                &found,
                &journaled.after,
                &format!("{what}, turned back by {back}"),
            );
        }
        // The one that replays it for good agrees.
        let replayed = journaled.image.copy();
        replayed.debugfs(&["jr".to_owned()]);
        assert_same(&replayed.listing(), &journaled.after, &what);
        assert!(journaled.before != journaled.after);
    }
}

/// Goal: bad bytes are an error, or do no harm; never a panic, an endless loop, or more memory than there is. Method:
/// one to eight bytes of metadata changed at random, with and without checksums that would tell.
#[test]
fn bad_bytes_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    for index in 0..40 {
        fs::write(
            tree.join(format!("a/file {index}")),
            noise(index, 100 * index as usize),
        )
        .unwrap();
    }
    symlink("l".repeat(100), tree.join("a/link")).unwrap();
    set_attribute(&tree.join("a"), "user.colour", &noise(1, 300));
    let holes = File::create(tree.join("a/b/holes")).unwrap();
    for block in 0..100_u64 {
        holes.write_all_at(&noise(block, 1024), block * 2048).unwrap();
    }
    let journaled = Journaled::new(&["-O", "64bit,^metadata_csum"], "");
    let plain = ["-b", "1024", "-I", "256", "-O"];
    let images = [
        journaled.image.bytes(),
        Image::of(
            &tree,
            2 << 20,
            &[&plain[..], &["^metadata_csum,inline_data,^has_journal"]].concat(),
        )
        .bytes(),
        Image::of(
            &tree,
            2 << 20,
            &[&plain[..], &["^metadata_csum,^extent,^64bit,^has_journal"]].concat(),
        )
        .bytes(),
        Image::of(
            &tree,
            2 << 20,
            &[&plain[..], &["metadata_csum,^has_journal"]].concat(),
        )
        .bytes(),
    ];
    let (mut refused, mut read) = (0, 0);
    for (number, image) in images.iter().enumerate() {
        let interesting: Vec<_> = (0..image.len())
            .filter(|at| image[*at] != 0 && image[*at] != 0xa5)
            .collect();
        for seed in 0..250 {
            let mut next = random(seed + 1);
            let mut bytes = image.clone();
            for _ in 0..=next(8) {
                // In what is used, and most of all in the head of it.
                let among = match next(2) {
                    0 => interesting.len(),
                    _ => interesting.len().min(3000),
                };
                let at = interesting[next(among as u64) as usize];
                bytes[at] = next(256) as u8;
            }
            match open_bytes(&bytes).and_then(|fs| listing(&fs)) {
                Ok(_) => read += 1,
                Err(Ext4Error::Read(error)) => panic!("image {number}, seed {seed}: {error}"),
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 100 && read > 100, "{refused} refused, {read} read");
}
