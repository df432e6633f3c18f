//! One running agent: the store, the probe, the threads, and the volumes that come and go.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use cdp_ebpf::DiskFilter;
use cdp_ebpf::map::{DIRTY_WORDS_PER_DISK, DISKS_MAX, RANGES_MAX, SectorRange};
use cdp_journal::format::{Body, GapCause, VOLUME_BYTES_MAX, VolumeKind};
use cdp_journal::history::VolumeInfo;
use cdp_journal::ship::Rate;
use cdp_journal::store::{StoreReader, StoreWriter, VolumeState, WriterOptions};
use cdp_journal::{BootNs, SECTOR_BYTES, Seq, VolumeId};
use parking_lot::Mutex;
use rustix::fs::Mode;
use uuid::Uuid;

use crate::capture::{DiskNumber, RingPosition, Slot, WatchedDisk};
use crate::clock;
use crate::config::{Config, VolumeConfig};
use crate::control::{Status, VolumeStatus};
use crate::device::{self, BlockDevice};
use crate::pipeline::{Capture, Encoding, Pipeline, Request, Shared};
use crate::priority;
use crate::readback::{Devices, ReadBack};
use crate::recorder::{End, NewVolume, Recorder};
use crate::ship::Ships;
use crate::status::Watch;
use crate::takeover::{self, TakenOver};

/// How long the agent waits for the capture thread to take a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a stop waits for the last blocks to be compared with their device.
const LAST_CHECK_TIMEOUT: Duration = Duration::from_secs(5);

/// How long who answers questions waits for a log that stalls.
const LOSSES_TIMEOUT: Duration = Duration::from_secs(1);

/// A thread did not answer in time. It will have done by then what it was asked for, or can be asked again.
#[derive(Debug, thiserror::Error)]
#[error("the capture thread does not answer")]
struct NoAnswer;

/// A volume and its device.
type Found = (VolumeConfig, BlockDevice);

/// A volume that the store knows, while its device is not there.
struct Absent {
    volume: VolumeConfig,
    why: String,
}

/// See the module's head.
pub(crate) struct Agent {
    pub(crate) shared: Arc<Shared>,
    config: Config,
    agent_id: Uuid,
    boot_id: Uuid,
    pipeline: Pipeline,
    readback: JoinHandle<()>,
    devices: Devices,
    pub(crate) ships: Arc<Ships>,
    /// Volumes that the store knows of, protected just now or not.
    known: Vec<VolumeState>,
    /// Volumes whose device is not there.
    absent: Vec<Absent>,
    /// Volumes whose device was found to be gone, and why; they are absent once their losses are known.
    gone: BTreeMap<VolumeId, (DiskNumber, &'static str)>,
    /// Disks of which the probe is to be told what is protected now.
    to_watch: BTreeSet<DiskNumber>,
    interrupted: GapCause,
    slots: HashMap<DiskNumber, Slot>,
    next_volume: u16,
    watch: Watch,
}

impl Agent {
    /// Opens the store, loads the probe and protects the configured volumes.
    pub(crate) fn start(config: Config) -> anyhow::Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "cdp-agent run needs root (CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN): run it with sudo or as a service"
        );
        // The store holds what the devices hold: nobody else's business.
        rustix::process::umask(Mode::RWXG | Mode::RWXO);
        // All that can be refused is refused before anything is made.
        let (devices, absent) = find_devices(&config.store, &config.volumes)?;
        crate::capture::btf::Btf::of_running_kernel()?;
        let options = WriterOptions {
            store_bytes_max: config.store_bytes_max,
            ..WriterOptions::default()
        };
        let (store, recovered) = StoreWriter::open(&config.store, &options)?;
        if let Some(cut) = &recovered.cut {
            tracing::warn!(segment = %cut.path.display(), offset = cut.offset, bytes = cut.bytes,
                "cut an interrupted append off the end of the log");
        }
        for damage in &recovered.damages {
            tracing::error!("the log is damaged: {damage:?}");
        }
        if let Some(why) = &recovered.index_rebuilt {
            tracing::info!("index rebuilt from the log: {why}");
        }
        let boot_id = clock::boot_id()?;
        let agent_id = recovered.agent.unwrap_or(store.uuid());
        let rebooted = recovered.boot_id.is_some_and(|then| then != boot_id);
        let (mut probe, is_resumed) = takeover::open_probe(&config, agent_id, &recovered, !rebooted)?;
        let mut recorder = Recorder::new(recovered.last_seq, clock::wall_offset_ns());
        let position = RingPosition(probe.positions().consumed());
        recorder.read_from(position);
        let taken = if is_resumed {
            let taken = takeover::choose(&mut probe, &config, &devices, &recovered.volumes)?;
            let unsettled = probe.notes().unsettled();
            takeover::hand_to(&mut recorder, &taken, &recovered, unsettled, &config.store)?;
            taken
        } else {
            Vec::new()
        };
        let interrupted = if rebooted {
            GapCause::Reboot
        } else {
            GapCause::AgentDown
        };
        // Before anything that waits in the ring: what is recorded of one volume is no history of another that was not
        // watched then. Its time is not later than what waits, and not that of the last record, which is exact.
        let mut known = recovered.volumes;
        let after = |latest: BootNs| BootNs(latest.0.saturating_add(1));
        let ended_at = recovered.latest.filter(|_| is_resumed).map(after);
        let ended_at = ended_at.unwrap_or_else(clock::boot_ns);
        end_unwatched(&mut recorder, &mut known, &absent, interrupted, ended_at);
        let shared = Arc::new(Shared::new(recorder, probe.positions(), config.commit_interval));
        shared.set_appended(recovered.last_seq, position);
        // What was found is durable: recovery has synced it.
        shared.set_durable(recovered.last_seq);
        let (log, index) = store.split();
        let watched: Vec<WatchedDisk> = taken.iter().map(|volume| volume.disk).collect();
        let capture = Capture::new(probe, &watched, recovered.last_seq)?;
        let encoding = Encoding {
            boot_id,
            queue_bytes: config.encode_queue_bytes,
            delta_cache_bytes: config.delta_cache_bytes,
        };
        let pipeline = Pipeline::start(&shared, capture, encoding, log, index)?;
        // This thread, and those that it starts from here on: the ring waits for them no longer than they hold the recorder.
        priority::give_way();
        let found = taken.iter().map(|volume| (volume.id, volume.device.clone()));
        let devices_shared: Devices = Arc::new(Mutex::new(found.collect()));
        // Before the first run: what is read without a limit, or before a server is known, cannot be taken back.
        let ships = Ships::new(&shared);
        let is_shipping = ships.set(&config);
        let readback = ReadBack {
            shared: Arc::clone(&shared),
            index: pipeline.index.clone(),
            devices: Arc::clone(&devices_shared),
        };
        let readback_shared = Arc::clone(&shared);
        let readback = std::thread::Builder::new()
            .name("cdp-readback".into())
            .spawn(move || readback_shared.run("readback", || readback.run()))
            .context("start the read-back thread")?;
        let ids = known.iter().map(|volume| volume.info.id.get());
        let next_volume = ids.max().unwrap_or(0) + 1;
        let mut agent = Self {
            ships,
            shared,
            agent_id,
            boot_id,
            pipeline,
            readback,
            devices: devices_shared,
            known,
            absent,
            gone: BTreeMap::new(),
            to_watch: BTreeSet::new(),
            interrupted,
            slots: watched
                .iter()
                .map(|watched| (watched.disk, watched.slot))
                .collect(),
            next_volume,
            watch: Watch::default(),
            config: config.clone(),
        };
        if let Err(error) = is_shipping.and_then(|()| agent.begin(devices, &taken)) {
            agent.finish();
            return Err(error);
        }
        Ok(agent)
    }

    /// The first records of this agent: behind all that was waiting in the ring, so that they hide nothing.
    fn begin(&mut self, devices: Vec<Found>, taken: &[TakenOver]) -> anyhow::Result<()> {
        ensure!(self.shared.drained().is_some(), "the pipeline has ended");
        {
            let mut recorder = self.shared.recorder.lock();
            let start = Body::Start {
                agent: self.agent_id,
                boot_id: self.boot_id,
            };
            recorder.note(clock::boot_ns(), None, start);
        }
        for (volume, device) in devices {
            if taken.iter().any(|taken| taken.device.path == device.path) {
                tracing::info!(volume = %volume.name, path = %device.path.display(), "watched all the time");
            } else {
                self.protect(&volume, device)?;
            }
        }
        self.tell_absent();
        Ok(())
    }

    /// Tells the other threads which volumes are without a device.
    fn tell_absent(&self) {
        let names = self.absent.iter().map(|absent| absent.volume.name.clone());
        *self.shared.absent.lock() = names.collect();
    }

    /// Protects a volume from now on.
    fn protect(&mut self, volume: &VolumeConfig, device: BlockDevice) -> anyhow::Result<()> {
        ensure!(
            device.bytes <= VOLUME_BYTES_MAX,
            "{} has {} bytes: a volume has {VOLUME_BYTES_MAX} (1 PiB) at most",
            device.path.display(),
            device.bytes
        );
        let slot = match self.slots.get(&device.disk) {
            Some(&slot) => slot,
            None => {
                // The last slot is the self-test's.
                let free = (0..DISKS_MAX - 1)
                    .map(Slot)
                    .find(|slot| !self.slots.values().any(|used| used == slot));
                free.with_context(|| format!("{} disks at most can be protected at once", DISKS_MAX - 1))?
            }
        };
        let known = self.known.iter().position(|known| known.info.name == volume.name);
        let id = match known {
            Some(i) => self.known[i].info.id,
            None => VolumeId::new(self.next_volume).context("a store holds 65 535 volumes at most")?,
        };
        let region_bytes = self.config.dirty_region_bytes;
        {
            let mut recorder = self.shared.recorder.lock();
            let now = clock::boot_ns();
            let declared = Body::Volume {
                kind: VolumeKind::Block,
                bytes: device.bytes,
                name: volume.name.clone(),
                path: device.path.display().to_string(),
            };
            let mut cause = None;
            if let Some(i) = known {
                let state = &self.known[i];
                let detached = state.inexact.filter(|&cause| cause == GapCause::Detached);
                cause = Some(detached.unwrap_or(self.interrupted));
                if state.info.bytes != device.bytes {
                    recorder.note(now, Some(id), Body::Resize { bytes: device.bytes });
                }
            } else {
                self.next_volume += 1;
            }
            recorder.note(now, Some(id), declared);
            recorder.add_disk(device.disk, slot, device.bio_based);
            let new = NewVolume::of_device(id, volume, &device, region_bytes);
            let new = match known {
                Some(i) => new.known(&self.known[i], cause),
                None => new,
            };
            recorder.add_volume(new, now);
        }
        self.devices.lock().insert(id, device.clone());
        self.slots.insert(device.disk, slot);
        self.watch(device.disk)?;
        tracing::info!(volume = %volume.name, path = %device.path.display(), bytes = device.bytes, "watching");
        Ok(())
    }

    /// Tells the probe what is protected of a disk.
    fn watch(&mut self, disk: DiskNumber) -> anyhow::Result<()> {
        let Some(&slot) = self.slots.get(&disk) else {
            return Ok(());
        };
        let mut filter = DiskFilter {
            slot: slot.0,
            ..DiskFilter::default()
        };
        let mut count = 0;
        let disk_bytes = {
            let devices = self.devices.lock();
            let found = devices.values().find(|device| device.disk == disk);
            match found.map_or(Ok(0), BlockDevice::disk_bytes) {
                Ok(bytes) => bytes,
                // It has just gone away: the next look will find that, and ends what lies on it.
                Err(_) => return Ok(()),
            }
        };
        {
            let recorder = self.shared.recorder.lock();
            for volume in recorder.volumes().iter().filter(|volume| volume.disk == disk) {
                ensure!(
                    count < RANGES_MAX,
                    "{RANGES_MAX} volumes at most can be protected on one disk"
                );
                let end = volume.start_sector + volume.bytes / SECTOR_BYTES;
                filter.ranges[count] = SectorRange {
                    start: volume.start_sector,
                    end,
                };
                count += 1;
            }
        }
        filter.region_shift = region_shift(self.config.dirty_region_bytes, disk_bytes);
        let filter = (count > 0).then_some(filter);
        if let Some(filter) = filter {
            self.send(Request::Slot(slot, disk, filter.region_shift))?;
        } else {
            self.slots.remove(&disk);
        }
        let (reply, answer) = crossbeam_channel::bounded(1);
        self.send(Request::Watch(disk, filter, reply))?;
        answer.recv_timeout(REQUEST_TIMEOUT).context(NoAnswer)??;
        let mut recorder = self.shared.recorder.lock();
        recorder.attached(disk, clock::boot_ns());
        for &id in self.gone.keys() {
            recorder.device_gone(id, clock::boot_ns());
        }
        Ok(())
    }

    fn send(&self, request: Request) -> anyhow::Result<()> {
        self.pipeline
            .requests
            .send_timeout(request, REQUEST_TIMEOUT)
            .ok()
            .context(NoAnswer)
    }

    /// Takes over what a changed configuration says: volumes come and go, the commit interval changes.
    pub(crate) fn reload(&mut self, config: Config) -> anyhow::Result<()> {
        ensure!(
            config.store == self.config.store,
            "the store cannot change while the agent runs"
        );
        ensure!(
            config.ring_bytes == self.config.ring_bytes,
            "ring_bytes cannot change while the agent runs"
        );
        ensure!(
            config.encode_queue_bytes == self.config.encode_queue_bytes,
            "encode_queue_bytes cannot change while the agent runs"
        );
        ensure!(
            config.delta_cache_bytes == self.config.delta_cache_bytes,
            "delta_cache_bytes cannot change while the agent runs"
        );
        let new = config
            .volumes
            .iter()
            .filter(|volume| !self.config.volumes.contains(volume));
        let gone = self.config.volumes.iter();
        let gone = gone.filter(|volume| !config.volumes.contains(volume));
        let gone: Vec<String> = gone.map(|volume| volume.name.clone()).collect();
        let (found, absent) = find_devices(&config.store, new)?;
        if !gone.is_empty() {
            self.unprotect(&gone)?;
        }
        // Should the rest fail, what was done so far is what the next reload finds.
        for (volume, device) in found {
            self.may_protect(&volume, &device)?;
            self.config.volumes.push(volume.clone());
            self.try_protect(volume, device)?;
        }
        self.config
            .volumes
            .extend(absent.iter().map(|absent| absent.volume.clone()));
        self.absent.extend(absent);
        self.tell_absent();
        self.shared.commit_interval_ms.store(
            config.commit_interval.as_millis() as u64,
            std::sync::atomic::Ordering::Relaxed,
        );
        self.ships.set(&config)?;
        self.config = config;
        Ok(())
    }

    /// Ends volumes that nobody wants any more: all of them or none.
    fn unprotect(&mut self, names: &[String]) -> anyhow::Result<()> {
        self.shared.wait_clear(LAST_CHECK_TIMEOUT);
        let now = clock::boot_ns();
        // All that was written or lost up to then is recorded afterwards.
        let known = self.shared.losses_known_within(LOSSES_TIMEOUT);
        known.with_context(|| {
            let names = names.join(", ");
            format!(
                "the log does not keep up: nothing changes yet, {names} stays protected; reload again later"
            )
        })?;
        for name in names {
            self.absent.retain(|absent| absent.volume.name != *name);
            self.config.volumes.retain(|volume| volume.name != *name);
            let Some((id, disk)) = self.volume_called(name) else {
                continue;
            };
            self.end_volume(id, name, End::NotWanted, now);
            self.to_watch.insert(disk);
            tracing::info!(volume = %name, "no longer watching");
        }
        self.tell_absent();
        self.watch_changed()
    }

    /// Tells the probe what has changed; once more at the next look, where the log stalls.
    fn watch_changed(&mut self) -> anyhow::Result<()> {
        while let Some(&disk) = self.to_watch.first() {
            match self.watch(disk) {
                Err(error) if error.is::<NoAnswer>() => {
                    tracing::warn!("tell the probe what is protected: {error:#}; trying again");
                    return Ok(());
                }
                told => told?,
            }
            self.to_watch.remove(&disk);
        }
        Ok(())
    }

    /// As [`Agent::protect`]; where the log stalls, the volume is stopped until that is over.
    fn try_protect(&mut self, volume: VolumeConfig, device: BlockDevice) -> anyhow::Result<()> {
        match self.protect(&volume, device) {
            Err(error) if error.is::<NoAnswer>() => {
                if let Some((id, disk)) = self.volume_called(&volume.name) {
                    self.end_volume(id, &volume.name, End::NotWanted, clock::boot_ns());
                    self.to_watch.insert(disk);
                }
                let why = format!("{error:#}");
                tracing::error!(volume = %volume.name, "stopped until the log keeps up: {why}");
                self.absent.push(Absent { volume, why });
                Ok(())
            }
            protected => protected,
        }
    }

    fn volume_called(&self, name: &str) -> Option<(VolumeId, DiskNumber)> {
        let recorder = self.shared.recorder.lock();
        let volume = recorder.volumes().iter().find(|volume| volume.name == name);
        volume.map(|volume| (volume.id, volume.disk))
    }

    /// Forgets a volume that is watched. The probe is not told yet.
    fn end_volume(&mut self, id: VolumeId, name: &str, end: End, now: BootNs) {
        self.devices.lock().remove(&id);
        self.gone.remove(&id);
        let ended = self.shared.recorder.lock().end_volume(id, end, now);
        let Some(ended) = ended else { return };
        self.known.retain(|known| known.info.id != id);
        self.known.push(VolumeState {
            info: VolumeInfo {
                id,
                name: name.to_owned(),
                kind: VolumeKind::Block,
                path: ended.path.display().to_string(),
                bytes: ended.bytes,
            },
            inexact: Some(ended.cause),
            last_exact: ended.last_exact,
            last_exact_at: ended.last_exact_at,
            exact_since: None,
            gaps: ended.gaps,
        });
    }

    /// Looks whether volumes have changed their size, gone away or come back.
    pub(crate) fn check_devices(&mut self) {
        if let Err(error) = self.try_check_devices() {
            self.shared.fail("watch the devices", &error);
        }
    }

    fn try_check_devices(&mut self) -> anyhow::Result<()> {
        let look = self.shared.recorder.lock().look();
        let devices: Vec<(VolumeId, BlockDevice)> = self
            .devices
            .lock()
            .iter()
            .map(|(&id, device)| (id, device.clone()))
            .collect();
        for (id, mut device) in devices {
            if let Some(why) = device.why_gone() {
                self.gone.insert(id, (device.disk, why));
            }
            // One that has come back meanwhile is compared with what the log has of it, too.
            if self.gone.contains_key(&id) {
                // Whatever is recorded of it from here on: no moment since the last look is exact.
                self.shared.recorder.lock().device_gone(id, clock::boot_ns());
                continue;
            }
            // One that is not there just now has no size that counts.
            let Some(bytes) = device.size().ok().filter(|&bytes| bytes > 0) else {
                continue;
            };
            let found = clock::boot_ns();
            self.shared.recorder.lock().size_found(id, bytes, look, found);
            if bytes != device.bytes {
                tracing::info!(path = %device.path.display(), from = device.bytes, to = bytes, "resized");
                device.bytes = bytes;
                self.to_watch.insert(device.disk);
                self.devices.lock().insert(id, device);
            }
        }
        // Events that were skipped before are looked for while they still count as watched. Where the log stalls, the next
        // look tries again.
        if !self.gone.is_empty() && self.shared.losses_known_within(LOSSES_TIMEOUT).is_some() {
            for (id, (disk, why)) in std::mem::take(&mut self.gone) {
                self.detach(id, why);
                self.to_watch.insert(disk);
            }
        }
        self.watch_changed()?;
        if !self.absent.is_empty() {
            self.look_for_absent()?;
            self.tell_absent();
        }
        Ok(())
    }

    /// The device of a volume is gone: the volume is stopped until it is back.
    fn detach(&mut self, id: VolumeId, why: &str) {
        let volume = self.shared.recorder.lock().volumes().iter().find_map(|volume| {
            (volume.id == id).then(|| VolumeConfig {
                name: volume.name.clone(),
                path: volume.path.clone(),
            })
        });
        let Some(volume) = volume else { return };
        self.end_volume(id, &volume.name, End::Detached, clock::boot_ns());
        let why = format!("{}: {why}", volume.path.display());
        tracing::error!(volume = %volume.name, "stopped until it is back: {why}");
        self.absent.push(Absent { volume, why });
    }

    /// Devices that are back are compared with what the log has of them.
    fn look_for_absent(&mut self) -> anyhow::Result<()> {
        for absent in std::mem::take(&mut self.absent) {
            let Absent { volume, why } = absent;
            let found = BlockDevice::find(&volume.path)
                .and_then(|device| self.may_protect(&volume, &device).map(|()| device));
            match found {
                Ok(device) => self.try_protect(volume, device)?,
                Err(error) => {
                    let now_why = format!("{error:#}");
                    if now_why != why {
                        tracing::warn!(volume = %volume.name, "stopped still: {now_why}");
                    }
                    self.absent.push(Absent { volume, why: now_why });
                }
            }
        }
        Ok(())
    }

    fn may_protect(&self, volume: &VolumeConfig, device: &BlockDevice) -> anyhow::Result<()> {
        refuse_store_on(&self.config.store, volume, device)?;
        ensure!(
            device.bytes <= VOLUME_BYTES_MAX,
            "{} has {} bytes: a volume has {VOLUME_BYTES_MAX} (1 PiB) at most",
            device.path.display(),
            device.bytes
        );
        let recorder = self.shared.recorder.lock();
        let on_disk = recorder
            .volumes()
            .iter()
            .filter(|volume| volume.disk == device.disk);
        ensure!(
            on_disk.count() < RANGES_MAX,
            "{RANGES_MAX} volumes at most can be protected on one disk"
        );
        ensure!(
            self.slots.contains_key(&device.disk) || self.slots.len() < DISKS_MAX as usize - 1,
            "{} disks at most can be protected at once",
            DISKS_MAX - 1
        );
        Ok(())
    }

    /// Says in the log how the volumes get on and how full the store is, where that is due.
    pub(crate) fn watch_progress(&mut self) {
        let room = *self.shared.room.lock();
        self.watch
            .look(&self.shared.recorder.lock(), room, clock::boot_ns());
    }

    /// How the volumes are.
    pub(crate) fn status(&self) -> Status {
        let targets = self.ships.status();
        let recorder = self.shared.recorder.lock();
        Status {
            agent: self.agent_id.to_string(),
            boot_id: self.boot_id.to_string(),
            seq: recorder.last_seq().map_or(0, Seq::get),
            durable_seq: self.shared.durable().map_or(0, Seq::get),
            store_bytes: self.shared.log_bytes.load(std::sync::atomic::Ordering::Relaxed),
            store: self.watch.store_status(*self.shared.room.lock()),
            volumes: recorder
                .volumes()
                .iter()
                .map(|volume| self.watch.volume_status(volume))
                .chain(self.absent.iter().map(|absent| self.absent_status(absent)))
                .collect(),
            targets,
            rate_bytes_per_s: self.ships.limit().map(Rate::bytes_per_second),
            rate_readback_bytes_per_s: self.shared.pace.limit().map(Rate::bytes_per_second),
            readback_waits_for: self.shared.pace.waits_for(),
        }
    }

    fn absent_status(&self, absent: &Absent) -> VolumeStatus {
        let known = self
            .known
            .iter()
            .find(|known| known.info.name == absent.volume.name);
        VolumeStatus {
            path: absent.volume.path.display().to_string(),
            bytes: known.map_or(0, |known| known.info.bytes),
            gaps: known.map_or(0, |known| known.gaps),
            gap_cause: known
                .and_then(|known| known.inexact)
                .map(|cause| cause.to_string()),
            gap_since: known
                .and_then(|known| known.last_exact_at)
                .map(|at| at.to_string()),
            why: Some(absent.why.clone()),
            ..VolumeStatus::stopped(&absent.volume.name)
        }
    }

    /// Stops cleanly: everything captured so far is durable afterwards.
    pub(crate) fn finish(mut self) -> Option<String> {
        let shared = Arc::clone(&self.shared);
        if !shared.wait_clear(LAST_CHECK_TIMEOUT) {
            tracing::warn!("blocks that changed while they were written were not compared with the device");
        }
        // What is recorded up to now is of the device only if it is still there.
        self.check_devices();
        shared.stop.store(true, std::sync::atomic::Ordering::SeqCst);
        if self.readback.join().is_err() {
            tracing::error!("the read-back thread panicked");
        }
        self.pipeline.finish();
        self.ships.stop();
        shared.failure()
    }

    pub(crate) fn store(&self) -> &Path {
        &self.config.store
    }
}

/// The history ends of volumes that the store knows and nobody watched: their device is not there, the configuration does
/// not name them, or the probe was not told of them.
fn end_unwatched(
    recorder: &mut Recorder,
    known: &mut [VolumeState],
    absent: &[Absent],
    interrupted: GapCause,
    at: BootNs,
) {
    for state in known {
        let is_watched = recorder.volumes().iter().any(|volume| volume.id == state.info.id);
        if is_watched || state.inexact.is_some() {
            continue;
        }
        let is_absent = absent.iter().any(|absent| absent.volume.name == state.info.name);
        let cause = match is_absent {
            true => GapCause::Detached,
            false => interrupted,
        };
        recorder.unwatched(state.info.id, cause, state.last_exact, at);
        (state.inexact, state.gaps) = (Some(cause), state.gaps + 1);
        tracing::warn!(volume = %state.info.name, %cause, "not watched since its last record: a gap begins there");
    }
}

/// log2 of a region of the dirty map in sectors: large enough that the disk fits in its stretch of the map.
pub(crate) fn region_shift(region_bytes: u64, disk_bytes: u64) -> u32 {
    let regions_max = u64::from(DIRTY_WORDS_PER_DISK) * 64;
    let least = disk_bytes.div_ceil(regions_max).next_power_of_two();
    (region_bytes.max(least) / SECTOR_BYTES).trailing_zeros()
}

/// The devices of these volumes. A volume that the store knows may be without: it is stopped until its device is back.
fn find_devices<'a>(
    store: &Path,
    volumes: impl IntoIterator<Item = &'a VolumeConfig>,
) -> anyhow::Result<(Vec<Found>, Vec<Absent>)> {
    let (mut found, mut absent) = (Vec::new(), Vec::new());
    for volume in volumes {
        match BlockDevice::find(&volume.path) {
            Ok(device) => {
                refuse_store_on(store, volume, &device)?;
                found.push((volume.clone(), device));
            }
            Err(error) if device::may_come_back(&volume.path) && is_known(store, &volume.name)? => {
                tracing::warn!(volume = %volume.name, "stopped until it is back: {error:#}");
                absent.push(Absent {
                    volume: volume.clone(),
                    why: format!("{error:#}"),
                });
            }
            Err(error) => return Err(error).with_context(|| format!("volume {}", volume.name)),
        }
    }
    Ok((found, absent))
}

/// Does the store, if there is one, know a volume of this name?
fn is_known(store: &Path, name: &str) -> anyhow::Result<bool> {
    if cdp_journal::store::id_of(store)?.is_none() {
        return Ok(false);
    }
    let volumes = StoreReader::open(store)?.volumes()?;
    Ok(volumes.iter().any(|volume| volume.name == name))
}

fn refuse_store_on(store: &Path, volume: &VolumeConfig, device: &BlockDevice) -> anyhow::Result<()> {
    let existing: PathBuf = store
        .ancestors()
        .find(|folder| folder.exists())
        .map_or_else(|| PathBuf::from("."), Path::to_path_buf);
    let existing = if existing.as_os_str().is_empty() {
        PathBuf::from(".")
    } else {
        existing
    };
    if device::lies_on(&existing, device)? {
        bail!(
            "the store {} lies on volume {} ({}): journaling a write would cause the next one; put the store on \
             another disk",
            store.display(),
            volume.name,
            volume.path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_grow_with_the_disk_so_that_it_fits_the_dirty_map() {
        assert_eq!(region_shift(64 << 10, 1 << 30), 7);
        assert_eq!(region_shift(64 << 10, 512 << 30), 7);
        assert_eq!(region_shift(64 << 10, 513 << 30), 8);
        let regions_max = u64::from(DIRTY_WORDS_PER_DISK) * 64;
        for tib in 1..64u64 {
            let shift = region_shift(64 << 10, tib << 40);
            assert!((tib << 40) >> (shift + 9) <= regions_max, "{tib} TiB");
        }
    }
}
