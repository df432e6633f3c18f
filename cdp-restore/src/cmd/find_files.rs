//! Which files the hits of `find` were in.
//!
//! A moment at which the bytes of a hit were there tells it, once the file system had noted on the disk whose they are.
//! So the last such moment is asked first, and then, for what had been deleted by then, one soon after they were
//! written: after the first barrier that followed, with which a file system makes durable what it has noted, or one of the
//! next two, for the first may have been on its way. One moment serves all hits whose bytes were there at it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Context;
use cdp_journal::history::VolumeInfo;
use cdp_journal::store::Archive;
use cdp_journal::when::When;
use cdp_journal::{ReadError, Seq, WallNs};

use super::bisect::is_barrier;
use super::peek::{Peek, Peeking};
use crate::interrupt::Interrupt;
use crate::owners;
use crate::placement::Placement;

/// Moments that are mounted at most.
const MOMENTS_MAX: usize = 16;
/// By then a file system has noted whose its blocks are, also without a barrier (ext4 after 5 s at most, xfs and btrfs
/// after 30 s).
const NOTED_AFTER: Duration = Duration::from_secs(31);

/// Where bytes were found, and as of which records they were there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sighting {
    pub(super) offset: u64,
    pub(super) first: Seq,
    /// When that was written.
    pub(super) wall: WallNs,
    pub(super) last: Seq,
}

/// Looks for the files of hits.
pub(super) struct FileSearch<'a> {
    pub(super) store: &'a dyn Archive,
    pub(super) volume: &'a VolumeInfo,
    pub(super) peeking: Peeking<'a>,
}

/// What was found out.
#[derive(Debug, Default)]
pub(super) struct Owners {
    /// Of each sighting, in their order: its file, if one is known.
    pub(super) files: Vec<Option<String>>,
    /// Why others are not.
    pub(super) unknown: Option<String>,
}

impl FileSearch<'_> {
    pub(super) fn find(&self, sightings: &[Sighting]) -> anyhow::Result<Owners> {
        let mut owners = Owners {
            files: vec![None; sightings.len()],
            unknown: None,
        };
        if sightings.is_empty() {
            return Ok(owners);
        }
        let interrupt = Interrupt::catch().context("catch Ctrl-C")?;
        let mut asked = BTreeSet::new();
        for soonest in [
            Soonest::Written,
            Soonest::Noted(1),
            Soonest::Noted(2),
            Soonest::Noted(3),
        ] {
            let mut missing: Vec<(Seq, Seq, usize)> = Vec::new();
            for (index, sighting) in sightings.iter().enumerate() {
                if owners.files[index].is_none() {
                    missing.push((self.soonest(soonest, sighting)?, sighting.last, index));
                }
            }
            while let Some(seq) = soonest.pick(&missing) {
                let here: Vec<usize> = missing
                    .extract_if(.., |(first, last, _)| *first <= seq && seq <= *last)
                    .map(|(_, _, index)| index)
                    .collect();
                if asked.contains(&seq) {
                    continue;
                }
                if asked.len() >= MOMENTS_MAX {
                    let why = format!("more than {MOMENTS_MAX} moments would have to be mounted");
                    owners.unknown.get_or_insert(why);
                    return Ok(owners);
                }
                asked.insert(seq);
                if let Err(why) = self.look(seq, sightings, &here, &interrupt, &mut owners.files)? {
                    owners.unknown.get_or_insert(why);
                }
            }
        }
        if owners.files.iter().all(Option::is_some) {
            owners.unknown = None;
        }
        Ok(owners)
    }

    /// The first record as of which a sighting may be asked about.
    fn soonest(&self, soonest: Soonest, sighting: &Sighting) -> Result<Seq, ReadError> {
        let Soonest::Noted(barriers_wanted) = soonest else {
            return Ok(sighting.first);
        };
        let noted = sighting.wall.saturating_add(NOTED_AFTER);
        let mut barriers = 0;
        for frame in self.store.records(sighting.first..=sighting.last) {
            for placed in &frame?.records {
                let is_of_volume = placed.record.volume == Some(self.volume.id);
                barriers += usize::from(is_of_volume && is_barrier(&placed.record));
                if barriers >= barriers_wanted || placed.wall > noted {
                    return Ok(placed.record.seq);
                }
            }
        }
        Ok(sighting.last)
    }

    /// Asks one moment about those sightings whose numbers are in `here`; or says why it cannot be asked.
    fn look(
        &self,
        seq: Seq,
        sightings: &[Sighting],
        here: &[usize],
        interrupt: &Interrupt,
        files: &mut [Option<String>],
    ) -> anyhow::Result<Result<(), String>> {
        interrupt.check().context("nothing is left mounted")?;
        if self.store.resolve(self.volume.id, &When::Seq(seq)).is_err() {
            return Ok(Err(format!("seq:{seq} cannot be restored exactly")));
        }
        let peek = match self.peeking.try_at(When::Seq(seq))? {
            Ok(peek) => peek,
            Err(why) => return Ok(Err(why)),
        };
        let mut wanted: BTreeMap<u64, Option<String>> = here
            .iter()
            .map(|index| (sightings[*index].offset, None))
            .collect();
        let told = owners_in(&peek, &mut wanted, interrupt);
        let told = peek.settle(told)?;
        for index in here {
            files[*index] = wanted.remove(&sightings[*index].offset).flatten();
        }
        Ok(told)
    }
}

fn owners_in(
    peek: &Peek,
    wanted: &mut BTreeMap<u64, Option<String>>,
    interrupt: &Interrupt,
) -> anyhow::Result<Result<(), String>> {
    let mut told = Ok(());
    for part in peek.parts() {
        let placement = Placement::of(&part.dir, &part.kind, part.offset)
            .with_context(|| format!("find out where the files of the {} lie", part.kind))?;
        let is_told = owners::find(&part.dir, &placement, &part.prefix(), wanted, interrupt)
            .context("look for the files that bytes belong to")?;
        if !is_told {
            told = Err(format!("{} does not tell where its files lie", part.kind));
        }
    }
    match peek.left_out() {
        Some(left_out) if wanted.values().any(Option::is_none) => {
            Ok(Err(format!("no file can be read from {left_out}")))
        }
        _ => Ok(told),
    }
}

/// From when on a moment may be asked about a sighting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Soonest {
    /// As soon as the bytes were there; the later the better.
    Written,
    /// Once the file system has noted whose they are, after so many barriers; the sooner the better.
    Noted(usize),
}

impl Soonest {
    /// The next moment to ask, so that as few as can be serve all.
    fn pick(self, missing: &[(Seq, Seq, usize)]) -> Option<Seq> {
        match self {
            Soonest::Written => missing.iter().map(|(_, last, _)| *last).min(),
            Soonest::Noted(_) => missing.iter().map(|(first, _, _)| *first).max(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: every stretch is asked about, with as few moments as can be. Method: stretches of which two moments serve
    /// all.
    #[test]
    fn few_moments_serve_all() {
        let seq = |number| Seq::new(number).unwrap();
        let all = [(1, 10), (5, 7), (6, 20), (12, 30), (15, 16)];
        for (soonest, expected) in [(Soonest::Written, [7, 16]), (Soonest::Noted(1), [15, 5])] {
            let mut missing: Vec<_> = (0..)
                .zip(all)
                .map(|(index, (first, last))| (seq(first), seq(last), index))
                .collect();
            let mut picked = Vec::new();
            while let Some(at) = soonest.pick(&missing) {
                missing.retain(|(first, last, _)| !(*first <= at && at <= *last));
                picked.push(at.get());
            }
            assert_eq!(picked, expected);
        }
    }
}
