//! Going through a history from power cut to power cut.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use cdp_journal::Seq;
use cdp_journal::store::Recovered;
use cdp_tests::Scene;
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::process::check_interrupted;
use cdp_tests::restore::Restore;
use cdp_tests::rng::Rng;

use crate::STORE;
use crate::history::{Blocks, Captured};
use crate::image::Image;
use crate::model::{Log, Replay, Report};

/// Seqs taken unless `CDP_STATES` says otherwise.
const SEQS_DEFAULT: usize = 120;
/// How many Seqs there are to one that has a reordered state too.
const REORDER_EVERY: usize = 2;
/// Times that the disk of a state is compared with a view of all of it.
const PROOFS: usize = 8;
/// States of which one is read by `cdp-restore verify` as well.
const VERIFY_EVERY: usize = 40;

/// Looks at the store in a folder, as it is after a power cut: the last thing that was told to be durable, what was
/// written to its volume, random choices.
pub(crate) type Check = dyn Fn(&Path, Option<&Report>, &mut Replay<'_>, &mut Rng) -> Result<Found>;

/// What opening a store after a power cut found.
#[derive(Debug)]
pub(crate) struct Found {
    /// The index was not what it should be and was made anew, and why.
    pub(crate) rebuilt: Option<String>,
    /// The log had a torn end.
    pub(crate) torn: bool,
}

impl Found {
    /// An error if records up to `durable` are not whole.
    pub(crate) fn by(recovered: &Recovered, durable: Option<Seq>) -> Result<Found> {
        ensure!(
            recovered.last_seq >= durable && recovered.damages.is_empty(),
            "{durable:?} is not left: {recovered:?}"
        );
        Ok(Found {
            rebuilt: recovered.index_rebuilt.clone(),
            torn: recovered.cut.is_some(),
        })
    }
}

/// What was done to a disk, and what is known of it.
#[derive(Debug)]
pub(crate) struct Run {
    /// What is on it.
    pub(crate) file_system: FileSystem,
    /// Its history.
    pub(crate) captured: Captured,
    /// What was done to the store on it.
    pub(crate) log: Log,
    /// All of it in the end.
    pub(crate) last: Vec<u8>,
}

impl Run {
    /// Opens states, evenly over the history, and lets `check` look at the store in each.
    pub(crate) fn examine(&self, scene: &Scene, volume_bytes: u64, check: &Check) -> Result<()> {
        let captured = &self.captured;
        let whole = 0..captured.bytes;
        let memory = Mount::with_options(Path::new("none"), "tmpfs", &scene.path("memory"), "size=1g")?;
        let first = captured.read(captured.first, &whole)?;
        let mut examiner = Examiner {
            scene,
            check,
            image: Image::create(memory.dir(), &first, self.file_system)?,
            rng: scene.rng(),
            tally: Tally::default(),
        };
        // One goes on from where it was; the other may have to go back.
        let [mut in_order, mut reordered] = [(); 2].map(|()| Replay::new(&self.log.writes, volume_bytes));
        let reports = self.log.reports.iter();
        let reports: Vec<_> = reports
            .map(|report| (captured.asked_by(report.at), report))
            .collect();
        let total = captured.states.len();
        let wanted = seqs_wanted(total)?;
        let started = Instant::now();
        for (index, state) in captured.states.iter().enumerate() {
            check_interrupted()?;
            for range in &state.changed {
                let bytes = captured.read(state.seq, range)?;
                examiner.image.write(range.start, &bytes)?;
            }
            if is_picked(index, PROOFS, total) {
                let is_view = examiner.image.content() == captured.read(state.seq, &whole)?;
                ensure!(is_view, "the image of seq {} is not its view", state.seq);
            }
            if !is_picked(index, wanted, total) {
                continue;
            }
            let reported = reports.iter().rfind(|(needed, _)| *needed <= state.until);
            let reported = reported.map(|(_, report)| *report);
            let told = || format!("power cut after seq {}, durable: {reported:?}", state.seq);
            examiner
                .open(&Blocks::new(), reported, &mut in_order)
                .with_context(told)?;
            examiner.tally.seqs += 1;
            if examiner.tally.seqs.is_multiple_of(REORDER_EVERY) {
                let blocks = captured.reordered(index, &mut examiner.rng)?;
                if !blocks.is_empty() {
                    examiner
                        .open(&blocks, reported, &mut reordered)
                        .with_context(told)?;
                }
            }
        }
        let Examiner { image, tally, .. } = examiner;
        ensure!(image.content() == self.last, "the last state is not the disk");
        ensure!(tally.seqs == wanted, "{} of {wanted} seqs were taken", tally.seqs);
        let seconds = started.elapsed().as_secs_f64();
        eprintln!(
            "{} of {total} seqs, {} states opened in {seconds:.0} s ({:.1} a second), none lost; {} reports, {tally:?}",
            tally.seqs,
            tally.states,
            tally.states as f64 / seconds,
            reports.len(),
        );
        Ok(())
    }
}

/// What came of it.
#[derive(Debug, Default)]
struct Tally {
    seqs: usize,
    states: usize,
    torn_ends: usize,
    indexes_made_anew: usize,
    verified: usize,
}

struct Examiner<'a> {
    scene: &'a Scene,
    check: &'a Check,
    image: Image,
    rng: Rng,
    tally: Tally,
}

impl Examiner<'_> {
    /// Opens the store in a state: the image, but for `blocks`.
    fn open(&mut self, blocks: &Blocks, reported: Option<&Report>, replay: &mut Replay<'_>) -> Result<()> {
        for (offset, bytes) in blocks {
            self.image.alter(*offset, bytes)?;
        }
        let is_verified = reported.is_some() && self.tally.states.is_multiple_of(VERIFY_EVERY);
        let checked = self.image.mounted(|dir| {
            let store = dir.join(STORE);
            if is_verified {
                Restore::from(&store)?.verify()?.success()?;
            }
            (self.check)(&store, reported, replay, &mut self.rng)
        });
        self.image.restore()?;
        let checked = checked.and_then(|found| match &found.rebuilt {
            // Only what was still being made may have to be made anew.
            Some(why) if reported.is_some() => Err(anyhow!("the index was lost: {why}")),
            _ => Ok(found),
        });
        let found = checked.with_context(|| {
            let kept = keep(&self.image, blocks, &self.scene.path("lost.img"));
            format!("{} blocks are not what was written last; {kept}", blocks.len())
        })?;
        self.tally.states += 1;
        self.tally.verified += usize::from(is_verified);
        self.tally.torn_ends += usize::from(found.torn);
        self.tally.indexes_made_anew += usize::from(found.rebuilt.is_some());
        Ok(())
    }
}

/// Is `index` of `total` among `wanted` that lie evenly, the last one included?
fn is_picked(index: usize, wanted: usize, total: usize) -> bool {
    (index + 1) * wanted / total > index * wanted / total
}

fn seqs_wanted(total: usize) -> Result<usize> {
    match std::env::var("CDP_STATES").ok().as_deref() {
        None => Ok(SEQS_DEFAULT.min(total)),
        Some("all") => Ok(total),
        Some(text) => {
            let number: usize = text
                .parse()
                .with_context(|| format!("CDP_STATES is a number or \"all\", not {text:?}"))?;
            Ok(number.min(total))
        }
    }
}

/// Keeps the disk of a state for a closer look (`CDP_KEEP=1` keeps the folder).
fn keep(image: &Image, blocks: &Blocks, path: &Path) -> String {
    let mut content = image.content().to_vec();
    for (offset, bytes) in blocks {
        let at = *offset as usize;
        content[at..at + bytes.len()].copy_from_slice(bytes);
    }
    match std::fs::write(path, content) {
        Ok(()) => format!("the disk then: {}", path.display()),
        Err(error) => format!("the disk then could not be kept: {error}"),
    }
}
