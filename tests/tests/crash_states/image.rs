//! A disk in memory that is brought from power cut to power cut.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cdp_journal::BLOCK_BYTES;
use cdp_tests::device::{LoopDevice, flush_cache};
use cdp_tests::mount::{FileSystem, Mount};
use rustix::fs::SeekFrom;

/// Compared at a time.
const CHUNK_BYTES: usize = 256 << 10;
const BLOCK: usize = BLOCK_BYTES as usize;

/// The disk. What is done to the file system on it is undone by [`Image::restore`].
#[derive(Debug)]
pub(crate) struct Image {
    device: LoopDevice,
    file: File,
    /// What the disk holds while nobody uses it.
    master: Vec<u8>,
    /// Which blocks of it may be other than zero.
    used: Vec<bool>,
    mount_point: PathBuf,
    file_system: FileSystem,
}

impl Image {
    /// A disk in folder `dir` that holds `content`.
    pub(crate) fn create(dir: &Path, content: &[u8], file_system: FileSystem) -> Result<Image> {
        let path = dir.join("power-cut.img");
        let bytes = content.len();
        File::create_new(&path)
            .and_then(|file| file.set_len(bytes as u64))
            .context("make an image")?;
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .context("open an image")?;
        let mut image = Image {
            device: LoopDevice::attach(&path)?,
            file,
            master: vec![0; bytes],
            used: vec![false; bytes.div_ceil(BLOCK)],
            mount_point: dir.join("power-cut"),
            file_system,
        };
        for (number, block) in content.chunks(BLOCK).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                image.write((number * BLOCK) as u64, block)?;
            }
        }
        Ok(image)
    }

    /// What the disk holds while nobody uses it.
    pub(crate) fn content(&self) -> &[u8] {
        &self.master
    }

    /// Changes the disk for good.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let at = offset as usize;
        self.master[at..at + bytes.len()].copy_from_slice(bytes);
        self.used[at / BLOCK..(at + bytes.len()).div_ceil(BLOCK)].fill(true);
        self.alter(offset, bytes)
    }

    /// Changes the disk until it is restored.
    pub(crate) fn alter(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).context("write to an image")
    }

    /// Mounts the file system, as after a power cut, for as long as `visit` takes.
    pub(crate) fn mounted<T>(&self, visit: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        // The file was written to behind the device's back.
        flush_cache(self.device.path())?;
        let mount = Mount::new(self.device.path(), self.file_system, &self.mount_point)?;
        let visited = visit(mount.dir())?;
        mount.unmount()?;
        Ok(visited)
    }

    /// Undoes what was done to the disk since the last [`Image::write`].
    pub(crate) fn restore(&self) -> Result<()> {
        let mut buffer = vec![0; CHUNK_BYTES];
        let len = self.master.len() as u64;
        let mut at = 0;
        while at < len {
            // Holes need not be read, only filled where there should be none.
            let data = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(rustix::io::Errno::NXIO) => len,
                Err(error) => return Err(error).context("look for data in an image"),
            };
            self.restore_hole(at as usize, data as usize)?;
            if data == len {
                break;
            }
            let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(data)).context("look for a hole")?;
            for start in (data..hole).step_by(CHUNK_BYTES) {
                let bytes = CHUNK_BYTES.min((hole - start) as usize);
                let found = &mut buffer[..bytes];
                self.file.read_exact_at(found, start).context("read an image")?;
                let wanted = &self.master[start as usize..start as usize + bytes];
                if found == wanted {
                    continue;
                }
                let blocks = found.chunks(BLOCK).zip(wanted.chunks(BLOCK));
                for (number, (found, wanted)) in blocks.enumerate() {
                    if found != wanted {
                        self.alter(start + (number * BLOCK) as u64, wanted)?;
                    }
                }
            }
            at = hole;
        }
        Ok(())
    }

    fn restore_hole(&self, from: usize, to: usize) -> Result<()> {
        for block in from / BLOCK..to.div_ceil(BLOCK) {
            if self.used[block] {
                let at = block * BLOCK;
                let wanted = &self.master[at..(at + BLOCK).min(self.master.len())];
                if wanted.iter().any(|byte| *byte != 0) {
                    self.alter(at as u64, wanted)?;
                }
            }
        }
        Ok(())
    }
}
