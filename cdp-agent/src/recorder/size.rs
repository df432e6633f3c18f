//! A volume grows or shrinks. Nobody tells: its size is looked at now and then.

use cdp_journal::format::{Body, GapCause};
use cdp_journal::{BootNs, SECTOR_BYTES, Seq, VolumeId};

use super::Recorder;
use crate::inflight::Sectors;

impl Recorder {
    /// The sizes of all volumes are looked at after this call, as they were after the call before.
    pub(crate) fn look_at_sizes(&mut self) {
        self.sizes_seen = std::mem::replace(&mut self.sizes_looked, self.last_seq);
    }

    /// Records from `next` on are lost.
    pub(super) fn forget_looks_from(&mut self, next: Seq) {
        self.sizes_seen = self.sizes_seen.min(next.prev());
        self.sizes_looked = self.sizes_looked.min(next.prev());
    }

    /// A volume was found to have another size than at the look before. What it gained has to be read, and no moment
    /// since that look is exact: it may have been written to beyond its old end.
    pub(crate) fn resized(&mut self, id: VolumeId, bytes: u64, now: BootNs) {
        let Some(i) = self.volumes.iter().position(|volume| volume.id == id) else {
            return;
        };
        let old = self.volumes[i].bytes;
        if bytes == old {
            return;
        }
        let is_in_doubt = match bytes < old {
            true => self.lose_end(i, bytes),
            false => {
                // A gap that is open may have begun after it grew.
                self.volumes[i].doubt_since(Some(Seq::after(self.sizes_seen)));
                true
            }
        };
        let volume = &mut self.volumes[i];
        volume.bytes = bytes;
        let regions = bytes.div_ceil(volume.region_bytes);
        volume.dirty.resize(regions);
        volume.blank.resize(regions);
        volume.unseen.resize(regions);
        if bytes > old {
            volume.mark(old..bytes);
            volume.attached = false;
        }
        self.note(now, Some(id), Body::Resize { bytes });
        if is_in_doubt {
            self.open_gap(i, GapCause::Resized, self.last_seq, now);
        }
    }

    /// What a volume loses at its end will not be compared with anything: how writes ended there that are suspect, or in
    /// flight, nobody will know. Is there any?
    fn lose_end(&mut self, i: usize, bytes: u64) -> bool {
        let volume = &mut self.volumes[i];
        let lost = Sectors {
            start: volume.start_sector + bytes / SECTOR_BYTES,
            end: volume.sectors().end,
        };
        let disk = self.disks.iter().find(|disk| disk.number == volume.disk);
        let in_flight = disk.and_then(|disk| disk.in_flight.oldest(lost));
        let suspect = volume.suspects.forget(&(bytes..volume.bytes));
        if suspect.is_some() {
            // What stays of a block that it loses a part of is read back.
            volume.mark(bytes..volume.bytes);
        }
        volume.doubt_since(suspect);
        volume.doubt_since(in_flight);
        suspect.is_some() || in_flight.is_some()
    }
}
