//! A volume grows or shrinks. Nobody tells: its size is looked at now and then.

use cdp_journal::format::{Body, GapCause};
use cdp_journal::{BootNs, SECTOR_BYTES, Seq, VolumeId};

use super::{Epoch, Recorder};
use crate::inflight::Sectors;

/// A time before volumes are looked at: see [`Recorder::look`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    last: Option<Seq>,
    epoch: Epoch,
}

impl Recorder {
    /// Comes before sizes are looked at: what is found then holds for all later records, at least.
    pub(crate) fn look(&self) -> Look {
        Look {
            last: self.last_seq,
            epoch: self.epoch,
        }
    }

    /// Records from `next` on are lost.
    pub(super) fn forget_looks_from(&mut self, next: Seq) {
        for volume in &mut self.volumes {
            volume.size_seen = volume.size_seen.min(next.prev());
        }
    }

    /// A volume was found to have this size. If it had another at the look before that found one, no moment since then
    /// is exact, whatever happened between: it may have been larger than it was and than it is, and written to there.
    /// What it gained has to be read.
    pub(crate) fn size_found(&mut self, id: VolumeId, bytes: u64, look: Look, now: BootNs) {
        let Some(i) = self.volumes.iter().position(|volume| volume.id == id) else {
            return;
        };
        let old = self.volumes[i].bytes;
        if bytes != old {
            self.resize(i, bytes, now);
        }
        // Seqs of another epoch are given anew.
        if look.epoch == self.epoch {
            self.volumes[i].size_seen = look.last;
        }
    }

    fn resize(&mut self, i: usize, bytes: u64, now: BootNs) {
        let old = self.volumes[i].bytes;
        if bytes < old {
            self.lose_end(i, bytes);
        }
        let volume = &mut self.volumes[i];
        // Also where a gap is open: it may have begun later.
        volume.doubt_since(Some(Seq::after(volume.size_seen)));
        volume.bytes = bytes;
        let regions = bytes.div_ceil(volume.region_bytes);
        volume.dirty.resize(regions);
        volume.blank.resize(regions);
        volume.unseen.resize(regions);
        if bytes > old {
            volume.mark(old..bytes);
            volume.attached = false;
        }
        let id = volume.id;
        self.note(now, Some(id), Body::Resize { bytes });
        self.open_gap(i, GapCause::Resized, self.last_seq, now);
    }

    /// What a volume loses at its end will not be compared with anything: how writes ended there that are suspect, or in
    /// flight, nobody will know.
    fn lose_end(&mut self, i: usize, bytes: u64) {
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
    }
}
