//! The kernel side as the agent sees it: the probe loaded and proven, its ring, its maps.
//!
//! `btf` describes the running kernel, `calibrate` finds the direct map, `maps` is memory shared with the
//! probe; this module ties them to the one type that the pipeline uses, [`Probe`].

pub(crate) mod btf;
pub(crate) mod calibrate;
mod loopdev;
mod maps;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;

use anyhow::Context as _;
use aya::maps::{HashMap, MapData, RingBuf};
use aya::programs::BtfTracePoint;
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use cdp_ebpf::map::{COUNTERS_PER_DISK, DIRTY_WORDS_PER_DISK, DISKS_MAX, RANGES_MAX};
use cdp_ebpf::{Counter, DiskFilter, Kernel};

pub(crate) use self::maps::RingPositions;
use self::maps::SharedWords;

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
}

/// Row of a disk in the shared maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot(pub(crate) u32);

/// The probe, loaded, proven on a device of our own, and attached.
pub(crate) struct Probe {
    ring: RingBuf<MapData>,
    positions: RingPositions,
    disks: HashMap<MapData, u32, FilterPod>,
    counters: SharedWords,
    dirty: SharedWords,
    ebpf: Ebpf,
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

impl Probe {
    /// Calibrates, loads, proves and attaches the probe. `ring_bytes` is a power of two.
    pub(crate) fn load(ring_bytes: u32) -> anyhow::Result<Self> {
        let mut kernel = btf::Btf::of_running_kernel()?.kernel()?;
        let aya_btf = aya::Btf::from_sys_fs().context("read the kernel's BTF")?;
        calibrate::learn(&mut kernel, &aya_btf)?;
        kernel.ring_bytes = u64::from(ring_bytes);
        let global = KernelGlobal::new(kernel);
        let mut ebpf = loader(&global, possible_cpus()?)
            .map_max_entries("EVENTS", ring_bytes)
            .load(OBJECT)
            .context("load the probe")?;
        for (program, tracepoint) in CAPTURE_PROGRAMS {
            load_program(&mut ebpf, program, tracepoint, &aya_btf)?;
        }
        let ring = RingBuf::try_from(take_map(&mut ebpf, "EVENTS")?)?;
        let positions = RingPositions::new(ring.as_fd())?;
        let counters = SharedWords::new(
            map_fd(&ebpf, "COUNTERS")?,
            (DISKS_MAX * COUNTERS_PER_DISK) as usize,
        )?;
        let dirty = SharedWords::new(
            map_fd(&ebpf, "DIRTY")?,
            (DISKS_MAX * DIRTY_WORDS_PER_DISK) as usize,
        )?;
        let disks = HashMap::try_from(take_map(&mut ebpf, "DISKS")?)?;
        let mut probe = Self {
            ring,
            positions,
            disks,
            counters,
            dirty,
            ebpf,
        };
        calibrate::prove(&mut probe)?;
        Ok(probe)
    }

    /// Watches a disk from now on, or changes what is watched of it.
    pub(crate) fn watch(&mut self, disk: DiskNumber, filter: DiskFilter) -> anyhow::Result<()> {
        self.disks
            .insert(disk.0, FilterPod(filter), 0)
            .context("tell the probe which disk to watch")
    }

    /// Stops watching a disk.
    pub(crate) fn unwatch(&mut self, disk: DiskNumber) -> anyhow::Result<()> {
        self.disks
            .remove(&disk.0)
            .context("tell the probe to leave a disk")
    }

    /// Hands the oldest event to `handle`; false if there is none.
    pub(crate) fn next_event(&mut self, handle: impl FnOnce(&[u8])) -> bool {
        match self.ring.next() {
            Some(item) => {
                handle(&item);
                true
            }
            None => false,
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
        self.positions.clone()
    }

    /// The ring's descriptor, readable when a quarter of it waits.
    pub(crate) fn ring_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    /// Events that the kernel skipped because a program would have interrupted itself.
    pub(crate) fn recursion_misses(&self) -> anyhow::Result<u64> {
        let mut misses = 0;
        for (name, _) in CAPTURE_PROGRAMS {
            let program = self.ebpf.program(name).context("a program is gone")?;
            misses += maps::recursion_misses(program.fd()?.as_fd())?;
        }
        Ok(misses)
    }
}

fn take_map(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<aya::maps::Map> {
    ebpf.take_map(name)
        .with_context(|| format!("the probe's object has no map {name}"))
}

fn map_fd<'a>(ebpf: &'a Ebpf, name: &str) -> anyhow::Result<BorrowedFd<'a>> {
    match ebpf.map(name) {
        Some(aya::maps::Map::Array(data)) => Ok(data.fd().as_fd()),
        _ => anyhow::bail!("the probe's object has no array {name}"),
    }
}

pub(crate) fn load_program(
    ebpf: &mut Ebpf,
    program: &str,
    tracepoint: &str,
    btf: &aya::Btf,
) -> anyhow::Result<()> {
    let program: &mut BtfTracePoint = ebpf
        .program_mut(program)
        .with_context(|| format!("the probe's object has no program {program}"))?
        .try_into()?;
    program
        .load(tracepoint, btf)
        .with_context(|| format!("load the program for {tracepoint}; run `cdp-agent doctor`"))?;
    program
        .attach()
        .with_context(|| format!("attach to {tracepoint}"))?;
    Ok(())
}

/// Path of a loop device.
pub(crate) fn loop_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probe")
            .field("ring", &self.ring.as_raw_fd())
            .finish_non_exhaustive()
    }
}
