//! The kernel side as the agent sees it: the probe loaded and proven, its ring, its maps.
//!
//! `btf` describes the running kernel, `calibrate` finds the direct map, `maps` is memory shared with the
//! probe; this module ties them to the one type that the pipeline uses, [`Probe`].

pub(crate) mod btf;
pub(crate) mod calibrate;
mod loopdev;
mod maps;
mod notes;
mod pins;
mod ring;

use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use aya::maps::{HashMap, Map, MapData};
use aya::programs::links::FdLink;
use aya::programs::tp_btf::BtfTracePointLinkId;
use aya::programs::{BtfTracePoint, ProgramFd, ProgramInfo};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use cdp_ebpf::map::{COUNTERS_PER_DISK, DIRTY_WORDS_PER_DISK, DISKS_MAX, NOTES_WORDS, RANGES_MAX};
use cdp_ebpf::{Cause, Counter, DiskFilter, Kernel};
use cdp_journal::Seq;
use uuid::Uuid;

use self::maps::SharedWords;
use self::notes::Owner;
pub(crate) use self::notes::{NextUnsettled, Notes, WatchedDisk};
use self::pins::Claim;
pub(crate) use self::pins::PinnedSet;
use self::ring::Ring;
pub(crate) use self::ring::{RingPosition, RingPositions};
use crate::losses::Losses;

/// The probe's object, built by `cargo xtask ebpf build`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../cdp-ebpf/cdp-probe.o");

const CAPTURE_PROGRAMS: [(&str, &str); 3] = [
    ("write_queued", "block_bio_queue"),
    ("request_completed", "block_rq_complete"),
    ("bio_completed", "block_bio_complete"),
];

/// A whole disk, as the kernel numbers it: major in the upper 12 bits, minor in the lower 20.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DiskNumber(pub(crate) u32);

impl DiskNumber {
    /// From user space's device number.
    pub(crate) fn from_dev(dev: u64) -> Self {
        Self((rustix::fs::major(dev) << 20) | rustix::fs::minor(dev))
    }

    /// The kernel's sequence number of the disk that has this number now: each disk has its own, as long as the
    /// host is up. None if there is no such disk, or the kernel does not number them (before 5.15).
    pub(crate) fn seq(self) -> Option<u64> {
        let path = format!("/sys/dev/block/{}:{}/diskseq", self.0 >> 20, self.0 & 0xf_ffff);
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }
}

/// Row of a disk in the shared maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(pub(crate) u32);

/// The probe, loaded, proven on a device of our own, and attached.
pub(crate) struct Probe {
    ring: Ring,
    disks: HashMap<MapData, u32, FilterPod>,
    counters: SharedWords,
    dirty: SharedWords,
    notes: Notes,
    programs: Vec<ProgramFd>,
    /// Holds the programs' links, unless they are pinned.
    unpinned: Option<Ebpf>,
    /// Of a pinned probe: nobody else unloads it.
    claim: Option<Claim>,
}

/// A [`Kernel`] that aya may copy as bytes.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct KernelPod(Kernel);

/// A [`DiskFilter`] that aya may copy as bytes.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct FilterPod(DiskFilter);

#[expect(unsafe_code, reason = "aya's marker for plain bytes")]
// SAFETY: repr(C), integers only, and without padding: two u32, then u64s.
unsafe impl aya::Pod for FilterPod {}
const _: () = assert!(size_of::<DiskFilter>() == 2 * 4 + 2 * RANGES_MAX * 8);

#[expect(unsafe_code, reason = "aya's marker for plain bytes")]
// SAFETY: repr(C), integers only, and without padding: 42 u32, then u64s at a multiple of 8.
unsafe impl aya::Pod for KernelPod {}
const _: () = assert!(size_of::<Kernel>() == 42 * 4 + 3 * 8);

pub(crate) fn loader<'a>(kernel: &'a KernelGlobal, cpus: u32) -> EbpfLoader<'a> {
    let mut loader = EbpfLoader::new();
    loader
        .verifier_log_level(VerifierLogLevel::STATS)
        .override_global("KERNEL", &kernel.0, true)
        .map_max_entries("SCRATCH", cpus)
        .map_max_entries("WALK", cpus)
        .map_max_entries("PAGES_OF_REQUEST", cpus)
        .map_max_entries("PAGES_OF_BIO", cpus);
    loader
}

/// The probe's one global.
pub(crate) struct KernelGlobal(KernelPod);

impl KernelGlobal {
    pub(crate) fn new(kernel: Kernel) -> Self {
        Self(KernelPod(kernel))
    }
}

/// CPUs that the machine can ever have.
pub(crate) fn possible_cpus() -> anyhow::Result<u32> {
    aya::util::nr_cpus()
        .map(|n| n as u32)
        .map_err(|(path, source)| anyhow::anyhow!("read {path}: {source}"))
}

/// Tells this build's probe from another's.
fn object_identity() -> u64 {
    (OBJECT.len() as u64) << 32 | u64::from(crc32c::crc32c(OBJECT))
}

impl Probe {
    /// Calibrates, loads, proves and attaches the probe; it ends with this process. `ring_bytes` is a power of
    /// two.
    pub(crate) fn load(ring_bytes: u32) -> anyhow::Result<Self> {
        Self::load_into(ring_bytes, None)
    }

    /// As [`Probe::load`], pinned: it goes on without this process, until [`unload`] or the end of the host.
    pub(crate) fn load_pinned(ring_bytes: u32, agent: Uuid, store: &Path) -> anyhow::Result<Self> {
        PinnedSet::create(agent, |folder| {
            let claim = Claim::of(folder)?;
            let mut probe = Self::load_into(ring_bytes, Some(folder))?;
            probe.claim = Some(claim);
            probe.notes.begin(&Owner::new(agent, ring_bytes), store);
            Ok(probe)
        })
    }

    fn load_into(ring_bytes: u32, folder: Option<&Path>) -> anyhow::Result<Self> {
        let mut kernel = btf::Btf::of_running_kernel()?.kernel()?;
        let aya_btf = aya::Btf::from_sys_fs().context("read the kernel's BTF")?;
        calibrate::learn(&mut kernel, &aya_btf)?;
        kernel.ring_bytes = u64::from(ring_bytes);
        let global = KernelGlobal::new(kernel);
        let mut ebpf = loader(&global, possible_cpus()?)
            .map_max_entries("EVENTS", ring_bytes)
            .load(OBJECT)
            .context("load the probe")?;
        let mut programs = Vec::new();
        for (name, tracepoint) in CAPTURE_PROGRAMS {
            let link = load_program(&mut ebpf, name, tracepoint, &aya_btf)?;
            let program: &mut BtfTracePoint =
                ebpf.program_mut(name).context("a program is gone")?.try_into()?;
            programs.push(program.fd()?.try_clone()?);
            if let Some(folder) = folder {
                program.pin(folder.join(name))?;
                FdLink::from(program.take_link(link)?).pin(pins::link_path(folder, name))?;
            }
        }
        let maps = pins::MAPS.map(|name| {
            let map = ebpf.take_map(name).and_then(map_data);
            let map = map.with_context(|| format!("the probe's object has no map {name}"))?;
            if let Some(folder) = folder {
                map.pin(folder.join(name))?;
            }
            Ok(map)
        });
        let mut probe = Self::of_maps(maps, programs, ring_bytes)?;
        probe.unpinned = folder.is_none().then_some(ebpf);
        calibrate::prove(&mut probe)?;
        Ok(probe)
    }

    fn of_maps(
        maps: [anyhow::Result<MapData>; pins::MAPS.len()],
        programs: Vec<ProgramFd>,
        ring_bytes: u32,
    ) -> anyhow::Result<Self> {
        let [events, disks, counters, dirty, notes] = maps;
        Ok(Self {
            ring: Ring::new(events?, ring_bytes)?,
            disks: HashMap::try_from(Map::HashMap(disks?))?,
            counters: SharedWords::of_map(&counters?, (DISKS_MAX * COUNTERS_PER_DISK) as usize)?,
            dirty: SharedWords::of_map(&dirty?, (DISKS_MAX * DIRTY_WORDS_PER_DISK) as usize)?,
            notes: Notes(SharedWords::of_map(&notes?, NOTES_WORDS as usize)?),
            programs,
            unpinned: None,
            claim: None,
        })
    }

    /// Takes up the pinned probe of this agent, from behind the last record of its log. None if there is none.
    pub(crate) fn resume(agent: Uuid, ring_bytes: u32, last: Option<Seq>) -> anyhow::Result<Option<Self>> {
        let Some(set) = PinnedSet::of(agent) else {
            return Ok(None);
        };
        let owner = Owner::new(agent, ring_bytes);
        let found = set.notes()?.owner().context("it is of another version")?;
        ensure!(found.agent == owner.agent, "it is another agent's");
        ensure!(found.object == owner.object, "it is of another version");
        ensure!(
            found.ring_bytes == owner.ring_bytes,
            "its ring has {} bytes, not {ring_bytes}",
            found.ring_bytes
        );
        let claim = Claim::of(set.folder())?;
        let mut programs = Vec::new();
        for (name, _) in CAPTURE_PROGRAMS {
            programs.push(ProgramInfo::from_pin(set.folder().join(name))?.fd()?);
            let link = pins::link_path(set.folder(), name);
            ensure!(link.exists(), "{} is missing", link.display());
        }
        let mut probe = Self::of_maps(pins::MAPS.map(|name| set.map(name)), programs, ring_bytes)?;
        let position = last.and_then(|last| probe.notes.position_of(last));
        let position = position.context("its notes do not know the end of the log")?;
        probe.ring.skip_to(position)?;
        probe.claim = Some(claim);
        probe.notes.forget_after(last);
        Ok(Some(probe))
    }

    /// Watches a disk from now on, or changes what is watched of it.
    pub(crate) fn watch(&mut self, disk: DiskNumber, filter: DiskFilter) -> anyhow::Result<()> {
        self.disks
            .insert(disk.0, FilterPod(filter), 0)
            .context("tell the probe which disk to watch")
    }

    /// What is watched of a disk.
    pub(crate) fn filter(&self, disk: DiskNumber) -> Option<DiskFilter> {
        self.disks.get(&disk.0, 0).ok().map(|pod| pod.0)
    }

    /// Stops watching a disk.
    pub(crate) fn unwatch(&mut self, disk: DiskNumber) -> anyhow::Result<()> {
        self.disks
            .remove(&disk.0)
            .context("tell the probe to leave a disk")
    }

    /// Hands the oldest event that was not read, and the position behind it, to `handle`; false if there is none.
    pub(crate) fn next_event(&mut self, handle: impl FnOnce(&[u8], RingPosition)) -> bool {
        match self.ring.next() {
            Some((event, behind)) => {
                handle(event, behind);
                true
            }
            None => false,
        }
    }

    /// Events before this position are kept elsewhere.
    pub(crate) fn release(&mut self, kept: RingPosition) {
        self.ring.release(kept);
    }

    /// The ring's size.
    pub(crate) fn ring_bytes(&self) -> u64 {
        self.ring.bytes()
    }

    /// What the agent after this one will find.
    pub(crate) fn notes(&self) -> &Notes {
        &self.notes
    }

    /// What was lost of a disk's writes since the probe was loaded.
    pub(crate) fn losses(&self, slot: Slot) -> Losses {
        Losses {
            dropped: Cause::ALL.map(|cause| self.counter(slot, Counter::Dropped, cause as u32)),
            lost_completions: self.counter(slot, Counter::LostCompletions, 0),
        }
    }

    /// A counter of a disk.
    pub(crate) fn counter(&self, slot: Slot, counter: Counter, plus: u32) -> u64 {
        self.counters
            .load((slot.0 * COUNTERS_PER_DISK + counter as u32 + plus) as usize)
    }

    /// Takes the time of the first drop, so that a later one is noted again.
    pub(crate) fn take_first_drop_ns(&self, slot: Slot) -> u64 {
        self.counters
            .take((slot.0 * COUNTERS_PER_DISK + Counter::FirstDropNs as u32) as usize)
    }

    /// Takes all marks of a disk: calls `each` with the number of every marked region.
    pub(crate) fn take_marks(&self, slot: Slot, mut each: impl FnMut(u64)) {
        let base = (slot.0 * DIRTY_WORDS_PER_DISK) as usize;
        for word in 0..DIRTY_WORDS_PER_DISK as usize {
            if self.dirty.load(base + word) == 0 {
                continue;
            }
            let mut bits = self.dirty.take(base + word);
            while bits != 0 {
                each(word as u64 * 64 + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
    }

    /// Where the ring's two ends are; shared with whoever must wait for a drain.
    pub(crate) fn positions(&self) -> RingPositions {
        self.ring.positions()
    }

    /// The ring's descriptor, readable when a quarter of it waits.
    pub(crate) fn ring_fd(&self) -> BorrowedFd<'_> {
        self.ring.fd()
    }

    /// Events that the kernel skipped because a program would have interrupted itself.
    pub(crate) fn recursion_misses(&self) -> anyhow::Result<u64> {
        let mut misses = 0;
        for program in &self.programs {
            misses += maps::recursion_misses(program.as_fd())?;
        }
        Ok(misses)
    }
}

/// A map by its descriptor, whatever its kind.
fn map_data(map: Map) -> Option<MapData> {
    match map {
        Map::Array(data) | Map::HashMap(data) | Map::RingBuf(data) => Some(data),
        _ => None,
    }
}

pub(crate) fn load_program(
    ebpf: &mut Ebpf,
    program: &str,
    tracepoint: &str,
    btf: &aya::Btf,
) -> anyhow::Result<BtfTracePointLinkId> {
    let program: &mut BtfTracePoint = ebpf
        .program_mut(program)
        .with_context(|| format!("the probe's object has no program {program}"))?
        .try_into()?;
    program
        .load(tracepoint, btf)
        .with_context(|| format!("load the program for {tracepoint}; run `cdp-agent doctor`"))?;
    program
        .attach()
        .with_context(|| format!("attach to {tracepoint}"))
}

/// Path of a loop device.
pub(crate) fn loop_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probe")
            .field("is_pinned", &self.unpinned.is_none())
            .finish_non_exhaustive()
    }
}

/// Why a pinned probe is of no use to anybody any more, if so.
fn why_useless(set: &PinnedSet) -> Option<&'static str> {
    let Ok(notes) = set.notes() else {
        // Another version's, or of an agent that is just starting.
        return None;
    };
    let store = notes.store()?;
    if !store.exists() {
        return Some("its store is gone");
    }
    if cdp_journal::store::is_locked(&store).unwrap_or(true) {
        return None;
    }
    if set.is_unfinished() {
        return Some("its making was interrupted");
    }
    let is_there = |watched: WatchedDisk| watched.disk.seq() == Some(watched.disk_seq);
    (!notes.disks().any(is_there)).then_some("its disks are gone")
}

/// Unloads the pinned probes of this host that nobody can take up any more, but for this agent's.
pub(crate) fn sweep(own: Uuid) {
    let own = PinnedSet::of(own);
    for set in PinnedSet::all() {
        if Some(&set) == own.as_ref() {
            continue;
        }
        let Some(_seized) = set.seize() else { continue };
        let Some(why) = why_useless(&set) else { continue };
        match set.remove() {
            Ok(()) => tracing::info!(probe = %set.folder().display(), "unloaded a pinned probe: {why}"),
            Err(error) => tracing::warn!("unload a pinned probe: {error:#}"),
        }
    }
}

/// Unloads the pinned probe of an agent, if there is one.
pub(crate) fn unload(agent: Uuid) -> anyhow::Result<()> {
    PinnedSet::of(agent).map_or(Ok(()), |set| set.remove())
}

/// The pinned probes of this host.
pub(crate) fn pinned() -> Vec<PinnedSet> {
    PinnedSet::all()
}
