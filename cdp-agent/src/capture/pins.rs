//! The probe in the kernel's own file system (bpffs): what is pinned there stays loaded and goes on while no agent
//! runs.
//!
//! `ROOT/AGENT/` holds the maps, and the programs with their links; it appears as a whole, under its final name,
//! or not at all. It is gone after a reboot. (A name in bpffs must not hold a dot.)

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use aya::maps::MapData;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::mount::MountFlags;
use uuid::Uuid;

use super::CAPTURE_PROGRAMS;
use super::maps::SharedWords;
use super::notes::Notes;

const BPFFS: &str = "/sys/fs/bpf";
/// Where the sets of all agents of this host lie.
const ROOT: &str = "/sys/fs/bpf/cdp-agent";
/// `BPF_FS_MAGIC`.
const BPFFS_MAGIC: u64 = 0xcafe_4a11;
/// Ending of a set that is not complete.
const UNFINISHED: &str = "-new";

/// Maps that are pinned; programs hold the others.
pub(super) const MAPS: [&str; 5] = ["EVENTS", "DISKS", "COUNTERS", "DIRTY", "NOTES"];

/// One agent's pinned probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PinnedSet {
    folder: PathBuf,
}

/// That an agent runs on a set: a lock on its folder, for a store may be seen in some mount namespaces only.
#[derive(Debug)]
pub(super) struct Claim(#[expect(dead_code, reason = "held for its lock")] OwnedFd);

/// Nobody takes up a set that is to be unloaded.
#[derive(Debug)]
pub(crate) struct Seized(#[expect(dead_code, reason = "held for its lock")] OwnedFd);

/// Where a program's link lies in a set's folder; all else lies there under its own name.
pub(super) fn link_path(folder: &Path, program: &str) -> PathBuf {
    folder.join(format!("{program}-link"))
}

impl PinnedSet {
    /// The set of this agent, if there is one.
    pub(super) fn of(agent: Uuid) -> Option<Self> {
        let folder = Path::new(ROOT).join(agent.to_string());
        folder.exists().then_some(Self { folder })
    }

    /// All sets of this host, also those that are not complete.
    pub(super) fn all() -> Vec<Self> {
        let Ok(entries) = std::fs::read_dir(ROOT) else {
            return Vec::new();
        };
        let folders = entries.flatten().map(|entry| entry.path());
        folders.map(|folder| Self { folder }).collect()
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its making was interrupted, or is under way.
    pub(super) fn is_unfinished(&self) -> bool {
        self.folder
            .as_os_str()
            .as_encoded_bytes()
            .ends_with(UNFINISHED.as_bytes())
    }

    /// Pins what `pin` pins into the folder that it is given, as the set of this agent.
    pub(super) fn create<T>(agent: Uuid, pin: impl FnOnce(&Path) -> anyhow::Result<T>) -> anyhow::Result<T> {
        ensure_bpffs()?;
        make_folder(Path::new(ROOT))?;
        let folder = Path::new(ROOT).join(agent.to_string());
        let unfinished = Self {
            folder: Path::new(ROOT).join(format!("{agent}{UNFINISHED}")),
        };
        unfinished.remove()?;
        make_folder(&unfinished.folder)?;
        let pinned = pin(&unfinished.folder).and_then(|pinned| {
            std::fs::rename(&unfinished.folder, &folder)
                .with_context(|| format!("rename {} to {}", unfinished.folder.display(), folder.display()))?;
            Ok(pinned)
        });
        if pinned.is_err() {
            let _ = unfinished.remove();
        }
        pinned
    }

    pub(super) fn map(&self, name: &str) -> anyhow::Result<MapData> {
        let path = self.folder.join(name);
        MapData::from_pin(&path).with_context(|| format!("open the pinned map {}", path.display()))
    }

    pub(super) fn notes(&self) -> anyhow::Result<Notes> {
        let map = self.map("NOTES")?;
        let words = SharedWords::of_map(&map, cdp_ebpf::map::NOTES_WORDS as usize)?;
        Ok(Notes(words))
    }

    /// Whose it is, or was to be.
    pub(crate) fn agent(&self) -> Option<Uuid> {
        let name = self.folder.file_name()?.to_str()?;
        name.strip_suffix(UNFINISHED).unwrap_or(name).parse().ok()
    }

    /// The store that it captures for; None if it is of another version.
    pub(crate) fn store(&self) -> Option<PathBuf> {
        self.notes().ok()?.store()
    }

    /// Takes it from whoever may start on it meanwhile, to unload it; `None` if an agent runs on it, in this mount namespace
    /// or another, or if that cannot be told.
    pub(crate) fn seize(&self) -> Option<Seized> {
        let folder = open(&self.folder).ok()?;
        rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).ok()?;
        Some(Seized(folder))
    }

    /// Unloads it, unless an agent has it open: then it goes with that agent.
    pub(crate) fn remove(&self) -> anyhow::Result<()> {
        if !self.folder.exists() {
            return Ok(());
        }
        // The links first: without them nothing runs any more.
        let links = CAPTURE_PROGRAMS.map(|(program, _)| link_path(&self.folder, program));
        let entries = std::fs::read_dir(&self.folder)
            .with_context(|| format!("list {}", self.folder.display()))?
            .flatten()
            .map(|entry| entry.path());
        let rest: Vec<PathBuf> = entries.filter(|path| !links.contains(path)).collect();
        for path in links.iter().filter(|path| path.exists()).chain(&rest) {
            std::fs::remove_file(path).with_context(|| format!("unpin {}", path.display()))?;
        }
        std::fs::remove_dir(&self.folder).with_context(|| format!("remove {}", self.folder.display()))?;
        // With the last set goes their folder; it fails while there are others.
        let _ = std::fs::remove_dir(ROOT);
        Ok(())
    }
}

impl Claim {
    /// Of the agent that calls, on the set in that folder, also while it gets its name.
    pub(super) fn of(folder: &Path) -> anyhow::Result<Self> {
        let claim = open(folder)?;
        // Who looks whether it can be unloaded holds it for a moment; who does unload it, until its links are gone.
        rustix::fs::flock(&claim, FlockOperation::LockShared)
            .with_context(|| format!("claim {}", folder.display()))?;
        Ok(Self(claim))
    }
}

fn open(folder: &Path) -> anyhow::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::empty()).with_context(|| format!("open {}", folder.display()))
}

fn make_folder(path: &Path) -> anyhow::Result<()> {
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("make {}", path.display())),
    }
}

fn ensure_bpffs() -> anyhow::Result<()> {
    let is_bpffs = || -> anyhow::Result<bool> {
        let found = rustix::fs::statfs(BPFFS).with_context(|| format!("look at {BPFFS}"))?;
        Ok(found.f_type as u64 & 0xffff_ffff == BPFFS_MAGIC)
    };
    ensure!(
        Path::new(BPFFS).is_dir(),
        "{BPFFS} does not exist: is sysfs mounted?"
    );
    if is_bpffs()? {
        return Ok(());
    }
    rustix::mount::mount("bpf", BPFFS, "bpf", MountFlags::empty(), None)
        .with_context(|| format!("mount the BPF file system at {BPFFS}"))?;
    if !is_bpffs()? {
        bail!("{BPFFS} is no BPF file system although it was mounted");
    }
    Ok(())
}
