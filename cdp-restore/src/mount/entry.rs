//! What is kept about one mount while it lasts: a folder below `/run/cdp-restore`, named after the place mounted at.
//!
//! | name         | what                                                                  |
//! |--------------|-----------------------------------------------------------------------|
//! | `mount.json` | where it is mounted, and the image's name; JSON, gone with the mount   |
//! | `server`     | the serving process: its id and when it was started, as `PID START`    |
//! | `log`        | what that process had to say                                          |
//! | `raw/`       | where the image is mounted by FUSE, unless that is the place itself    |

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const ROOT_FOLDER: &str = "/run/cdp-restore";
const FACTS: &str = "mount.json";
const SERVER: &str = "server";
const LOG: &str = "log";
const RAW: &str = "raw";

/// Where mounts are kept track of: for root below `/run`, for others below their own runtime folder.
pub(super) fn runtime_folder() -> anyhow::Result<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from(ROOT_FOLDER));
    }
    let own = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty());
    let own = own.context("XDG_RUNTIME_DIR is not set, and only root may use /run")?;
    Ok(PathBuf::from(own).join("cdp-restore"))
}

/// `mount.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Facts {
    dir: PathBuf,
    image: String,
    /// The image itself is what is mounted.
    raw: bool,
}

/// One mount's folder.
#[derive(Debug)]
pub(crate) struct Entry {
    folder: PathBuf,
    facts: Facts,
}

impl Entry {
    /// Makes the folder for a mount at `dir`, which is an absolute path; there can be one only.
    pub(crate) fn create(dir: &Path, image: String, raw: bool) -> anyhow::Result<Self> {
        let folder = folder_of(dir)?;
        let private = |recursive| {
            let mut builder = DirBuilder::new();
            builder.mode(0o700).recursive(recursive);
            builder
        };
        let root = runtime_folder()?;
        private(true)
            .create(&root)
            .with_context(|| format!("make {}", root.display()))?;
        match private(false).create(&folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => bail!(
                "{} has a mount already, or what one left behind; `cdp-restore umount {}` first",
                dir.display(),
                dir.display()
            ),
            Err(error) => return Err(error).with_context(|| format!("make {}", folder.display())),
        }
        let entry = Entry {
            folder,
            facts: Facts {
                dir: dir.to_owned(),
                image,
                raw,
            },
        };
        let write = || {
            serde_json::to_writer(File::create(entry.folder.join(FACTS))?, &entry.facts)?;
            fs::create_dir(entry.folder.join(RAW))
        };
        write().with_context(|| format!("write to {}", entry.folder.display()))?;
        Ok(entry)
    }

    /// The mount at `dir`, if there is one.
    pub(crate) fn find(dir: &Path) -> anyhow::Result<Option<Self>> {
        let folder = folder_of(dir)?;
        if !folder.is_dir() {
            return Ok(None);
        }
        let path = folder.join(FACTS);
        let facts = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).ok(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        // Killed before it was written, or while it was: nothing was set up by then.
        let facts = facts.unwrap_or_else(|| Facts {
            dir: dir.to_owned(),
            image: String::new(),
            raw: false,
        });
        Ok(Some(Entry { folder, facts }))
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.facts.dir
    }

    /// Where the image's folder is mounted.
    pub(crate) fn image_folder(&self) -> PathBuf {
        if self.facts.raw {
            self.facts.dir.clone()
        } else {
            self.folder.join(RAW)
        }
    }

    /// The image.
    pub(crate) fn image(&self) -> PathBuf {
        self.image_folder().join(&self.facts.image)
    }

    /// The folder itself, for the serving process.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A file for what the serving process has to say.
    pub(crate) fn create_log(folder: &Path) -> io::Result<File> {
        File::options().create(true).append(true).open(folder.join(LOG))
    }

    /// What the serving process had to say.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.join(LOG)).unwrap_or_default()
    }

    /// Writes down which process serves: this one.
    pub(crate) fn write_server(folder: &Path) -> anyhow::Result<()> {
        let pid = rustix::process::getpid();
        let start = start_of(pid).context("find out when this process was started")?;
        let mut file = File::create(folder.join(SERVER)).context("write down the process")?;
        write!(file, "{} {start}", pid.as_raw_nonzero()).context("write down the process")
    }

    /// The serving process, if it is still there.
    pub(crate) fn server(&self) -> Option<Server> {
        let text = fs::read_to_string(self.folder.join(SERVER)).ok()?;
        let (pid, start) = text.split_once(' ')?;
        let pid = Pid::from_raw(pid.parse().ok()?)?;
        let fd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Its number may have been given to another since.
        (start_of(pid)? == start).then_some(Server { fd })
    }

    /// Removes the folder: nothing is left of the mount.
    pub(crate) fn remove(self) -> anyhow::Result<()> {
        // File by file: what is still mounted is never walked into. The facts go last, so that this can be run again.
        let gone = |removed: io::Result<()>| match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        let remove = || {
            gone(fs::remove_dir(self.folder.join(RAW)))?;
            for name in [SERVER, LOG, FACTS] {
                gone(fs::remove_file(self.folder.join(name)))?;
            }
            gone(fs::remove_dir(&self.folder))
        };
        remove().with_context(|| format!("remove {}", self.folder.display()))
    }
}

fn folder_of(dir: &Path) -> anyhow::Result<PathBuf> {
    let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
    let name: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    Ok(runtime_folder()?.join(name))
}

/// When a process was started, as the kernel counts it: with its id, that names it for ever.
fn start_of(pid: Pid) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name in brackets may hold anything.
    let fields = stat.rsplit_once(')')?.1;
    fields.split_whitespace().nth(19).map(str::to_owned)
}

/// A process that serves an image.
#[derive(Debug)]
pub(crate) struct Server {
    fd: rustix::fd::OwnedFd,
}

impl Server {
    /// Waits for its end; `false` if that takes longer than `milliseconds`.
    pub(crate) fn wait(&self, milliseconds: i64) -> bool {
        let mut fds = [rustix::event::PollFd::new(&self.fd, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec {
            tv_sec: milliseconds / 1000,
            tv_nsec: milliseconds % 1000 * 1_000_000,
        };
        matches!(rustix::event::poll(&mut fds, Some(&timeout)), Ok(1))
    }

    /// Ends it on the spot.
    pub(crate) fn kill(&self) {
        // It fails only if the process has ended.
        let _ = rustix::process::pidfd_send_signal(&self.fd, Signal::KILL);
    }
}
