//! A moment of a volume as a folder.
//!
//! A process of its own serves the raw image by FUSE; a loop device over the image carries the file system inside,
//! which the kernel mounts. What the kernel writes to it (journal replay among it) goes to a throw-away layer.
//!
//! | step of `mount`                          | undone by `umount`, also after a crash of anything        |
//! |------------------------------------------|-----------------------------------------------------------|
//! | a folder below [`entry::runtime_folder`]        | removed last                                              |
//! | the serving process, the image by FUSE   | unmounted; the process ends with it                       |
//! | a loop device for each file system       | found by the image that they lie on, detached             |
//! | the file system, or with partitions a    | found by the loop devices, unmounted                      |
//! | small tmpfs with a folder for each       |                                                           |
//!
//! Always true:
//! - M1: what was set up is found again by asking the kernel, not by what a file says was done. So a `mount` that was
//!   killed between any two steps is undone like a whole one.
//! - M2: nothing of it is written outside of the runtime folder, the layer, and memory.
//! - M3: the history is never written, with or without `--rw`.

mod entry;
mod fuse;
mod probe;
mod system;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use fuser::{Config, MountOption, Session};

pub(crate) use entry::Entry;
pub(crate) use probe::{Found, Part, probe};
pub(crate) use system::{LoopDevice, Mounted, mount_file_system, mount_folders, mounts, unmount};

use crate::disk::{Complaints, Disk};
use crate::report::Report;

/// Threads that answer the kernel.
const FUSE_THREADS: usize = 4;

/// What lies in a moment cannot be mounted; which says something of the moment, and nothing of this host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unmountable {
    /// Nothing that the kernel could mount was found.
    #[error("no file system to mount in {volume}: {found}; --raw mounts the image itself")]
    NoFileSystem {
        /// The volume.
        volume: String,
        /// What was found.
        found: String,
    },
    /// The kernel will not have it.
    #[error("mount the {kind} at {}: the kernel's log says more (dmesg)", at.display())]
    Refused {
        /// The kernel's name of the file system.
        kind: String,
        /// Where it should have been mounted.
        at: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// A disk that the kernel sees as a file, until it is unmounted.
pub(crate) struct Served(Session<fuse::ImageFs>);

impl Served {
    /// Mounts a folder with the disk as a file `name` in it at `at`.
    pub(crate) fn mount(
        disk: Disk,
        name: String,
        unix_time: Duration,
        at: &Path,
        report: Report,
    ) -> anyhow::Result<Self> {
        let is_writable = disk.is_writable();
        let file_system = fuse::ImageFs {
            disk,
            name,
            time: SystemTime::UNIX_EPOCH + unix_time,
            complaints: Complaints::default(),
            report,
        };
        let mut config = Config::default();
        config.n_threads = Some(FUSE_THREADS);
        config.mount_options = vec![
            MountOption::FSName(system::SOURCE.to_owned()),
            MountOption::NoDev,
            MountOption::NoSuid,
            MountOption::NoExec,
            MountOption::DefaultPermissions,
            if is_writable {
                MountOption::RW
            } else {
                MountOption::RO
            },
        ];
        let session = Session::new(file_system, at, &config).with_context(|| {
            format!(
                "mount the image at {} by FUSE (is /dev/fuse there?)",
                at.display()
            )
        })?;
        Ok(Served(session))
    }

    /// Answers the kernel until it is unmounted.
    pub(crate) fn serve(self) -> anyhow::Result<()> {
        self.0.run().context("serve the image")
    }
}
