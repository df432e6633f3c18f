//! What an agent takes over from the one before it: the pinned probe, and the volumes that it went on watching.
//!
//! A volume is taken over, without a gap, when every write since its last record is in the ring or can still be
//! found in the dirty map. Else it is compared whole with its device, as after any other interruption.

use std::path::Path;
use std::time::Duration;

use cdp_ebpf::map::SectorRange;
use cdp_journal::format::Body;
use cdp_journal::store::{Recovered, StoreReader, VolumeState};
use cdp_journal::{SECTOR_BYTES, Seq, VolumeId, WallNs};
use uuid::Uuid;

use crate::agent::region_shift;
use crate::capture::{self, Probe, WatchedDisk};
use crate::clock;
use crate::config::{Config, VolumeConfig};
use crate::device::BlockDevice;
use crate::recorder::{NewVolume, Recorder};

/// The probe of this agent: taken up where it is still loaded, and loaded otherwise. True if it was taken up.
pub(crate) fn open_probe(
    config: &Config,
    agent: Uuid,
    recovered: &Recovered,
    is_same_boot: bool,
) -> anyhow::Result<(Probe, bool)> {
    capture::sweep(agent);
    if is_same_boot {
        match Probe::resume(agent, config.ring_bytes, recovered.last_seq) {
            Ok(Some(probe)) => return Ok((probe, true)),
            Ok(None) => {}
            Err(error) => tracing::warn!("the pinned probe cannot be taken over: {error:#}; loading it anew"),
        }
    }
    capture::unload(agent)?;
    let store = std::path::absolute(&config.store).unwrap_or_else(|_| config.store.clone());
    match Probe::load_pinned(config.ring_bytes, agent, &store) {
        Ok(probe) => Ok((probe, false)),
        Err(error) => {
            tracing::warn!("the probe cannot be pinned, so it ends with this agent: {error:#}");
            Ok((Probe::load(config.ring_bytes)?, false))
        }
    }
}

/// A volume that was watched all the time.
#[derive(Debug)]
pub(crate) struct TakenOver {
    pub(crate) id: VolumeId,
    pub(crate) device: BlockDevice,
    pub(crate) disk: WatchedDisk,
    new: NewVolume,
}

/// Which of the volumes can be taken over. Disks of which none can are not watched any more.
pub(crate) fn choose(
    probe: &mut Probe,
    config: &Config,
    found: &[(VolumeConfig, BlockDevice)],
    known: &[VolumeState],
) -> anyhow::Result<Vec<TakenOver>> {
    let watched: Vec<WatchedDisk> = probe.notes().disks().collect();
    let mut taken = Vec::new();
    for (volume, device) in found {
        let Some(state) = known.iter().find(|known| known.info.name == volume.name) else {
            continue;
        };
        let found = watched.iter().find(|watched| watched.disk == device.disk);
        let why_not = match found {
            None => Err("its disk was not watched"),
            Some(disk) => may_be_taken_over(probe, config, device, state, disk)?,
        };
        match (why_not, found) {
            (Ok(exact), Some(&disk)) => taken.push(TakenOver {
                id: state.info.id,
                device: device.clone(),
                disk,
                new: NewVolume {
                    exact: Some(exact),
                    ..NewVolume::of_device(state.info.id, volume, device, config.dirty_region_bytes)
                }
                .known(state, None),
            }),
            (Err(why), _) => {
                tracing::info!(volume = %volume.name, "cannot go on where the last agent ended: {why}");
            }
            (Ok(_), None) => {}
        }
    }
    for gone in watched {
        if !taken.iter().any(|volume| volume.disk.slot == gone.slot) {
            probe.notes().clear_disk(gone.slot);
            // It may be gone from the filter already.
            let _ = probe.unwatch(gone.disk);
        }
    }
    Ok(taken)
}

/// When the exact stretch began that goes on; or why none does.
type Verdict = Result<(WallNs, Seq), &'static str>;

fn may_be_taken_over(
    probe: &Probe,
    config: &Config,
    device: &BlockDevice,
    state: &VolumeState,
    watched: &WatchedDisk,
) -> anyhow::Result<Verdict> {
    let Some(since) = state.exact_since.filter(|_| state.inexact.is_none()) else {
        return Ok(Err("its history was not exact"));
    };
    if device.disk.seq() != Some(watched.disk_seq) {
        return Ok(Err("its disk is another one"));
    }
    if watched.marks_taken {
        return Ok(Err("what was lost before is not repaired"));
    }
    if state.info.bytes != device.bytes {
        return Ok(Err("its size has changed"));
    }
    if region_shift(config.dirty_region_bytes, device.disk_bytes()?) != watched.region_shift {
        return Ok(Err("dirty_region_bytes has changed"));
    }
    let range = SectorRange {
        start: device.start_sector,
        end: device.start_sector + device.bytes / SECTOR_BYTES,
    };
    if !probe
        .filter(device.disk)
        .is_some_and(|filter| filter.ranges.contains(&range))
    {
        return Ok(Err("it was not watched"));
    }
    Ok(Ok((since.wall, since.seq)))
}

/// Gives the recorder what was taken over, and the writes that the agent before may not have seen the end of.
pub(crate) fn hand_to(
    recorder: &mut Recorder,
    taken: &[TakenOver],
    recovered: &Recovered,
    unsettled: Option<Seq>,
    store: &Path,
) -> anyhow::Result<()> {
    let now = clock::boot_ns();
    recorder.resume_after(recovered.latest.unwrap_or(now));
    for volume in taken {
        let (disk, device) = (&volume.disk, &volume.device);
        recorder.add_disk(disk.disk, disk.slot, device.bio_based);
        recorder.add_volume(volume.new.clone(), now);
    }
    let (Some(first), Some(last)) = (unsettled, recovered.last_seq) else {
        return Ok(());
    };
    let reader = StoreReader::open(store)?;
    for frame in reader.records(first..=last) {
        for placed in frame?.records {
            let record = placed.record;
            let (Body::Write { offset, len } | Body::Zero { offset, len } | Body::Discard { offset, len }) =
                record.body
            else {
                continue;
            };
            if let Some(id) = record.volume {
                let age = Duration::from_nanos(now.0.saturating_sub(record.boot_ns.0));
                recorder.recorded_before(id, &(offset..offset + len), record.seq, age);
            }
        }
    }
    Ok(())
}
