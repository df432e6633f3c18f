//! What an agent notes for the agent after it, in a map that lives as long as the probe.
//!
//! Words of 64 bits, each written atomically; whoever reads them finds what a process left that may have been
//! killed between any two. So each word is written before what it speaks of can be relied on:
//!
//! | words        | hold                                                                              |
//! |--------------|-----------------------------------------------------------------------------------|
//! | 0            | magic, last of the words that `begin` writes                                      |
//! | 1            | layout of these words, and of the events in the ring                              |
//! | 2, 3         | the agent's uuid                                                                  |
//! | 4            | identity of the probe's object                                                    |
//! | 5            | size of the ring, bytes                                                           |
//! | 6            | no write before this Seq is in flight, or waits to be compared with its device    |
//! | 7            | skipped events (`recursion_misses`) that no longer matter                         |
//! | 8            | frames noted so far                                                               |
//! | 9            | the last record when skipped events were looked for and none was new              |
//! | 16 to 271    | 16 for each disk: its number + 1, the kernel's sequence number of it, log2 of its regions in sectors, whether marks of losses that matter were taken, lost completions and dropped writes by cause that no longer matter |
//! | 512 to 1023  | 2 for each of the last 256 frames: its last Seq, the position in the ring behind its last event |
//! | 1024 to 1536 | length of the store's path, and the path                                          |
//!
//! A frame is noted before it is appended: the log says which of the frames noted is the last that counts.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use cdp_ebpf::Cause;
use cdp_ebpf::map::{CAUSES, DISKS_MAX, NOTES_WORDS};
use cdp_journal::Seq;
use uuid::Uuid;

use super::maps::SharedWords;
use super::ring::RingPosition;
use super::{DiskNumber, Slot};
use crate::losses::Losses;

const MAGIC: u64 = u64::from_le_bytes(*b"CDPNOTES");
const LAYOUT: u64 = 2;

const AGENT: usize = 2;
const OBJECT: usize = 4;
const RING_BYTES: usize = 5;
const UNSETTLED: usize = 6;
const MISSES: usize = 7;
const FRAMES_NOTED: usize = 8;
const LOOKED: usize = 9;
const SLOTS: usize = 16;
const SLOT_WORDS: usize = 16;
const MARKS_TAKEN: usize = 3;
const LOST_COMPLETIONS: usize = 4;
const DROPPED: usize = 5;
const FRAMES: usize = 512;
const FRAMES_KEPT: usize = 256;
const PATH: usize = 1024;
const PATH_BYTES_MAX: usize = 4096;

const _: () = assert!(DROPPED + CAUSES <= SLOT_WORDS);
const _: () = assert!(SLOTS + SLOT_WORDS * DISKS_MAX as usize <= FRAMES);
const _: () = assert!(FRAMES + 2 * FRAMES_KEPT <= PATH);
const _: () = assert!(PATH + 1 + PATH_BYTES_MAX / 8 <= NOTES_WORDS as usize);

/// Memory that both agents see.
pub(crate) trait Words {
    fn load(&self, index: usize) -> u64;
    fn store(&self, index: usize, value: u64);
}

impl Words for SharedWords {
    fn load(&self, index: usize) -> u64 {
        self.load(index)
    }
    fn store(&self, index: usize, value: u64) {
        self.store(index, value);
    }
}

/// Whose probe it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) agent: Uuid,
    /// Identity of the probe's object.
    pub(crate) object: u64,
    pub(crate) ring_bytes: u32,
}

impl Owner {
    /// Of a probe of this build.
    pub(crate) fn new(agent: Uuid, ring_bytes: u32) -> Self {
        Self {
            agent,
            object: super::object_identity(),
            ring_bytes,
        }
    }
}

/// What is known of a disk that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WatchedDisk {
    pub(crate) disk: DiskNumber,
    pub(crate) slot: Slot,
    /// The kernel's number of this very disk: another one under the same device number has another.
    pub(crate) disk_seq: u64,
    /// log2 of a region of the dirty map, in sectors.
    pub(crate) region_shift: u32,
    /// Losses up to here are named in the log, and repaired.
    pub(crate) settled: Losses,
    /// Marks of later losses were taken out of the dirty map, and are gone.
    pub(crate) marks_taken: bool,
}

/// See the module's head.
pub(crate) struct Notes<W = SharedWords>(pub(super) W);

impl<W: Words> Notes<W> {
    /// Of a probe that was just loaded.
    pub(crate) fn begin(&self, owner: &Owner, store: &Path) {
        let (high, low) = owner.agent.as_u64_pair();
        let words = [LAYOUT, high, low, owner.object, u64::from(owner.ring_bytes)];
        for (i, word) in words.into_iter().enumerate() {
            self.0.store(1 + i, word);
        }
        let path = store.as_os_str().as_bytes();
        let path = &path[..path.len().min(PATH_BYTES_MAX)];
        for (i, bytes) in path.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            self.0.store(PATH + 1 + i, u64::from_le_bytes(word));
        }
        self.0.store(PATH, path.len() as u64);
        self.0.store(0, MAGIC);
    }

    /// Whose it is; None if it is not of this layout.
    pub(crate) fn owner(&self) -> Option<Owner> {
        if self.0.load(0) != MAGIC || self.0.load(1) != LAYOUT {
            return None;
        }
        Some(Owner {
            agent: Uuid::from_u64_pair(self.0.load(AGENT), self.0.load(AGENT + 1)),
            object: self.0.load(OBJECT),
            ring_bytes: u32::try_from(self.0.load(RING_BYTES)).ok()?,
        })
    }

    /// The store that it captures for.
    pub(crate) fn store(&self) -> Option<PathBuf> {
        self.owner()?;
        let bytes = usize::try_from(self.0.load(PATH)).ok()?;
        if bytes > PATH_BYTES_MAX {
            return None;
        }
        let words = (0..bytes.div_ceil(8)).map(|i| self.0.load(PATH + 1 + i).to_le_bytes());
        let mut path: Vec<u8> = words.flatten().collect();
        path.truncate(bytes);
        Some(PathBuf::from(OsString::from_vec(path)))
    }

    fn slot_word(slot: Slot) -> usize {
        SLOTS + SLOT_WORDS * slot.0 as usize
    }

    /// The disk in a slot.
    pub(crate) fn disk(&self, slot: Slot) -> Option<WatchedDisk> {
        let at = Self::slot_word(slot);
        let number = self.0.load(at).checked_sub(1)?;
        Some(WatchedDisk {
            disk: DiskNumber(u32::try_from(number).ok()?),
            slot,
            disk_seq: self.0.load(at + 1),
            region_shift: u32::try_from(self.0.load(at + 2)).ok()?,
            settled: Losses {
                dropped: Cause::ALL.map(|cause| self.0.load(at + DROPPED + cause as usize)),
                lost_completions: self.0.load(at + LOST_COMPLETIONS),
            },
            marks_taken: self.0.load(at + MARKS_TAKEN) != 0,
        })
    }

    /// All disks that are watched.
    pub(crate) fn disks(&self) -> impl Iterator<Item = WatchedDisk> {
        (0..DISKS_MAX).filter_map(|slot| self.disk(Slot(slot)))
    }

    /// A disk is watched from now on.
    pub(crate) fn set_disk(&self, watched: &WatchedDisk) {
        let at = Self::slot_word(watched.slot);
        self.0.store(at, 0);
        self.0.store(at + 1, watched.disk_seq);
        self.0.store(at + 2, u64::from(watched.region_shift));
        self.store_losses(at, watched.settled);
        self.0.store(at + MARKS_TAKEN, u64::from(watched.marks_taken));
        self.0.store(at, u64::from(watched.disk.0) + 1);
    }

    /// A disk is not watched any more.
    pub(crate) fn clear_disk(&self, slot: Slot) {
        self.0.store(Self::slot_word(slot), 0);
    }

    /// Marks are about to be taken.
    pub(crate) fn take_marks(&self, slot: Slot) {
        self.0.store(Self::slot_word(slot) + MARKS_TAKEN, 1);
    }

    /// Losses up to these are named in the log, and repaired. A kill in between leaves marks that count as taken.
    pub(crate) fn settle(&self, slot: Slot, losses: Losses) {
        let at = Self::slot_word(slot);
        self.store_losses(at, losses);
        self.0.store(at + MARKS_TAKEN, 0);
    }

    fn store_losses(&self, at: usize, losses: Losses) {
        self.0.store(at + LOST_COMPLETIONS, losses.lost_completions);
        for (i, dropped) in losses.dropped.into_iter().enumerate() {
            self.0.store(at + DROPPED + i, dropped);
        }
    }

    /// A frame is about to be appended: its last record, and the position behind the last event in it.
    pub(crate) fn frame(&self, last: Seq, position: RingPosition) {
        let noted = self.0.load(FRAMES_NOTED);
        let at = FRAMES + 2 * (noted as usize % FRAMES_KEPT);
        self.0.store(at, 0);
        self.0.store(at + 1, position.0);
        self.0.store(at, last.get());
        self.0.store(FRAMES_NOTED, noted + 1);
    }

    /// Seqs after this record are given anew: what was noted with them says nothing.
    pub(crate) fn forget_after(&self, last: Option<Seq>) {
        if self.looked() > last {
            self.set_looked(last);
        }
        for at in (0..FRAMES_KEPT).map(|i| FRAMES + 2 * i) {
            if Seq::new(self.0.load(at)) > last {
                self.0.store(at, 0);
            }
        }
    }

    /// The position behind the frame that ends with this record.
    pub(crate) fn position_of(&self, last: Seq) -> Option<RingPosition> {
        let at = (0..FRAMES_KEPT).map(|i| FRAMES + 2 * i);
        let mut found = at.filter(|&at| self.0.load(at) == last.get());
        found.next().map(|at| RingPosition(self.0.load(at + 1)))
    }

    /// No write before it is in flight, or waits to be compared with its device.
    pub(crate) fn unsettled(&self) -> Option<Seq> {
        Seq::new(self.0.load(UNSETTLED))
    }

    pub(crate) fn set_unsettled(&self, first: Seq) {
        self.0.store(UNSETTLED, first.get());
    }

    /// Skipped events that are named in the log, and repaired.
    pub(crate) fn misses(&self) -> u64 {
        self.0.load(MISSES)
    }

    /// No event had been skipped, but for those of [`Notes::misses`], when this was the last record.
    pub(crate) fn looked(&self) -> Option<Seq> {
        Seq::new(self.0.load(LOOKED))
    }

    pub(crate) fn set_looked(&self, last: Option<Seq>) {
        self.0.store(LOOKED, last.map_or(0, Seq::get));
    }

    pub(crate) fn set_misses(&self, misses: u64) {
        self.0.store(MISSES, misses);
    }
}

/// From which write on nothing is settled, as it was when some record was the last one: noted once that is appended, for the
/// next agent reads on from there.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct NextUnsettled(Option<(Seq, Option<Seq>)>);

impl NextUnsettled {
    /// What can be noted now, with the last record when it was found. If none waits to be noted, it is looked for.
    pub(crate) fn take(
        &mut self,
        appended: Option<Seq>,
        look: impl FnOnce() -> (Seq, Option<Seq>),
    ) -> Option<(Seq, Option<Seq>)> {
        match self.0 {
            Some((_, last)) if appended < last => None,
            Some(found) => {
                self.0 = None;
                Some(found)
            }
            None => {
                self.0 = Some(look());
                None
            }
        }
    }

    /// This write is in doubt again.
    pub(crate) fn reopen(&mut self, write: Seq) {
        if let Some((first, _)) = &mut self.0 {
            *first = write.min(*first);
        }
    }

    /// The records that it is of are no more, and others will have their numbers.
    pub(crate) fn forget(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    struct Memory(RefCell<Vec<u64>>);

    impl Words for Memory {
        fn load(&self, index: usize) -> u64 {
            self.0.borrow()[index]
        }
        fn store(&self, index: usize, value: u64) {
            self.0.borrow_mut()[index] = value;
        }
    }

    fn notes() -> Notes<Memory> {
        Notes(Memory(RefCell::new(vec![0; NOTES_WORDS as usize])))
    }

    fn seq(n: u64) -> Seq {
        Seq::new(n).unwrap()
    }

    #[test]
    fn what_is_noted_is_found() {
        let notes = notes();
        assert_eq!((notes.owner(), notes.store()), (None, None));
        let owner = Owner {
            agent: Uuid::from_u128(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
            object: u64::MAX,
            ring_bytes: 1 << 20,
        };
        notes.begin(&owner, Path::new("/var/lib/cdp"));
        assert_eq!(notes.owner(), Some(owner));
        assert_eq!(notes.store(), Some(PathBuf::from("/var/lib/cdp")));
        let losses = |dropped, lost_completions| Losses {
            dropped: [dropped, 0, 7, 8],
            lost_completions,
        };
        let watched = WatchedDisk {
            disk: DiskNumber(0),
            slot: Slot(DISKS_MAX - 1),
            disk_seq: 9,
            region_shift: 7,
            settled: losses(1, 2),
            marks_taken: false,
        };
        notes.set_disk(&watched);
        notes.take_marks(watched.slot);
        assert!(notes.disk(watched.slot).unwrap().marks_taken);
        notes.settle(watched.slot, losses(3, 4));
        let settled = WatchedDisk {
            settled: losses(3, 4),
            ..watched
        };
        assert_eq!(notes.disks().collect::<Vec<_>>(), [settled]);
        notes.clear_disk(watched.slot);
        assert_eq!(notes.disks().count(), 0);
        assert_eq!(notes.unsettled(), None);
        notes.set_unsettled(seq(7));
        assert_eq!(notes.unsettled(), Some(seq(7)));
    }

    /// Goal: nothing is noted before the log holds what it is of, nothing that came to be in doubt meanwhile, and nothing
    /// of records that a full store lost: it would be noted when others have their numbers, and only then.
    #[test]
    fn what_is_unsettled_is_noted_when_its_record_is_appended() {
        let mut next = NextUnsettled::default();
        let look = |first, last| move || (seq(first), Seq::new(last));
        assert_eq!(next.take(Seq::new(5), look(8, 9)), None);
        assert_eq!(next.take(Seq::new(8), look(20, 20)), None);
        next.reopen(seq(3));
        assert_eq!(next.take(Seq::new(9), look(20, 20)), Some((seq(3), Seq::new(9))));
        assert_eq!(next.take(Seq::new(9), look(30, 40)), None);
        next.forget();
        assert_eq!(next.take(Seq::new(10), look(11, 10)), None);
        assert_eq!(
            next.take(Seq::new(10), look(12, 11)),
            Some((seq(11), Seq::new(10)))
        );
    }

    #[test]
    fn the_last_frames_are_known_by_their_last_record() {
        let notes = notes();
        for n in 1..=1000 {
            notes.frame(seq(n * 10), RingPosition(n * 4096));
        }
        assert_eq!(notes.position_of(seq(10_000)), Some(RingPosition(1000 * 4096)));
        let oldest = 1001 - FRAMES_KEPT as u64;
        assert_eq!(
            notes.position_of(seq(oldest * 10)),
            Some(RingPosition(oldest * 4096))
        );
        assert_eq!(notes.position_of(seq(oldest * 10 - 10)), None);
        assert_eq!(notes.position_of(seq(9_999)), None);
        // An agent was killed before it appended its last frame; the next one gives the same Seqs.
        notes.set_looked(Some(seq(9_991)));
        notes.forget_after(Some(seq(9_990)));
        assert_eq!(notes.looked(), Some(seq(9_990)));
        assert_eq!(notes.position_of(seq(10_000)), None);
        notes.frame(seq(10_000), RingPosition(77));
        assert_eq!(notes.position_of(seq(10_000)), Some(RingPosition(77)));
        assert_eq!(notes.position_of(seq(9_990)), Some(RingPosition(999 * 4096)));
    }
}
