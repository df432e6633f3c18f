//! Small ext4 file systems, made by e2fsprogs, and histories of them.

use std::fs;
use std::path::Path;

use cdp_journal::Seq;
use cdp_journal::format::Body;
use tempfile::TempDir;

use crate::program::tool;
use crate::store::{BLOCK_BYTES, Writing, volume};

/// Its size.
pub(crate) const IMAGE_BYTES: u64 = 4 << 20;

/// A file with an ext4 in it.
pub(crate) struct Image {
    folder: TempDir,
}

impl Image {
    /// One that holds these files.
    pub(crate) fn new(files: &[(&str, &[u8])]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        fs::create_dir(&tree).unwrap();
        for (name, content) in files {
            let path = tree.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        Image::of_folder(folder, &tree)
    }

    /// One that holds what lies in `tree`.
    pub(crate) fn of_folder(folder: TempDir, tree: &Path) -> Self {
        let image = Image { folder };
        let path = image.path();
        fs::File::create(&path).unwrap().set_len(IMAGE_BYTES).unwrap();
        let (path, tree) = (path.to_str().unwrap(), tree.to_str().unwrap());
        let options = [
            "-q",
            "-F",
            "-b",
            "4096",
            "-O",
            "^has_journal",
            "-N",
            "256",
            "-d",
            tree,
            path,
        ];
        tool("mkfs.ext4", options);
        image
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("image")
    }

    /// Changes it by one command of debugfs.
    pub(crate) fn debugfs(&self, command: &str) -> String {
        let path = self.path();
        tool("debugfs", ["-w", "-R", command, path.to_str().unwrap()])
    }

    /// The last block of a file's content.
    pub(crate) fn block_of(&self, file: &str) -> u64 {
        let told = self.debugfs(&format!("blocks {file}"));
        told.split_whitespace().last().unwrap().parse().unwrap()
    }

    pub(crate) fn blocks(&self) -> u64 {
        IMAGE_BYTES / BLOCK_BYTES as u64
    }

    /// Its bytes.
    pub(crate) fn read(&self) -> Vec<u8> {
        fs::read(self.path()).unwrap()
    }
}

/// A store whose volume `pg` holds one image after the other.
pub(crate) struct History {
    writing: Writing,
    held: Vec<u8>,
    milliseconds: i64,
}

impl History {
    /// Begins with an image, all of it exact.
    pub(crate) fn begin(folder: &Path, image: &Image) -> Self {
        let mut writing = Writing::open(folder);
        writing.begin(IMAGE_BYTES, "/dev/no-such-device");
        let mut history = History {
            writing,
            held: vec![0; IMAGE_BYTES as usize],
            milliseconds: 1000,
        };
        history.write(image);
        history.writing.add(2000, Some(volume(1)), Body::GapClose, &[]);
        history.milliseconds = 3000;
        history
    }

    /// Writes what differs, block by block; the last record.
    pub(crate) fn write(&mut self, image: &Image) -> Seq {
        let wanted = image.read();
        let mut last = Seq::FIRST;
        for (number, block) in (0..).zip(wanted.chunks(BLOCK_BYTES)) {
            let start = number as usize * BLOCK_BYTES;
            if self.held[start..start + BLOCK_BYTES] != *block {
                last = self.write_block(number, block);
            }
        }
        last
    }

    /// Writes one block.
    pub(crate) fn write_block(&mut self, number: u64, block: &[u8]) -> Seq {
        let start = number as usize * BLOCK_BYTES;
        self.held[start..start + BLOCK_BYTES].copy_from_slice(block);
        self.milliseconds += 1;
        self.writing.write(self.milliseconds, start as u64, block)
    }

    /// Ends it.
    pub(crate) fn close(self) {
        self.writing.close();
    }
}
