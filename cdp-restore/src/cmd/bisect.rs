//! `bisect`: between which two writes did a volume go bad? A check of the user's tells, on moments in between.
//!
//! First between barriers (what a flush made durable is what a file system means to be whole), then between the writes
//! of the two that remain. Each moment is mounted as by `mount --rw`, and unmounted again. What a check says counts only
//! if all that it asked for could be read.

use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use cdp_journal::Seq;
use cdp_journal::format::{Body, PlacedRecord, Record, RecordFlags};
use cdp_journal::history::{History, VolumeInfo};
use cdp_journal::store::Archive;
use cdp_journal::when::When;
use serde::Serialize;

use super::gap::JsonGap;
use super::peek::{Peek, Peeking};
use super::{open_block_volume, resolve};
use crate::args::Bisect;
use crate::exit::UsageError;
use crate::interrupt::Interrupt;
use crate::mount::Unmountable;
use crate::report::Report;
use crate::time::Time;
use crate::units::count;

/// Where the check finds the moment.
const MOUNT_VARIABLE: &str = "CDP_MOUNT";
/// Which moment it is, as `--at` takes it.
const AT_VARIABLE: &str = "CDP_AT";
/// A check that ends with this or more has not said what it was asked; below, 0 is good and all else bad.
const CHECK_FAILED_MIN: i32 = 125;

/// What `bisect --json` prints.
#[derive(Debug, Serialize)]
struct Outcome {
    volume: String,
    /// The last moment that is good.
    good: Moment,
    /// The next one, which is bad.
    bad: Moment,
    /// Who wrote what made the difference, and where; nothing where that may have been in a gap.
    write: Option<Written>,
    /// Gaps between the two: what was written in them nobody saw.
    gaps: Vec<JsonGap>,
    /// How often the check was run.
    runs: u32,
}

#[derive(Debug, Serialize)]
struct Moment {
    at: Time,
    seq: u64,
}

#[derive(Debug, Serialize)]
struct Written {
    offset: u64,
    bytes: u64,
    pid: u32,
    comm: String,
}

/// A moment of which the check has said, or may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Candidate {
    seq: Seq,
    is_barrier: bool,
}

struct Search<'a> {
    args: &'a Bisect,
    report: &'a Report,
    store: &'a dyn Archive,
    volume: &'a VolumeInfo,
    interrupt: Interrupt,
    runs: u32,
}

pub(crate) fn run(args: &Bisect, report: &Report) -> anyhow::Result<()> {
    let (store, volume) = open_block_volume(&args.source, &args.volume, "bisect")?;
    let bad = resolve(&*store, &volume, &args.bad)?.seq;
    let good = resolve(&*store, &volume, &args.good)?.seq;
    if good >= bad {
        let message = format!("--good (seq:{good}) is not earlier than --bad (seq:{bad})");
        return Err(UsageError(message).into());
    }
    let mut search = Search {
        args,
        report,
        store: &*store,
        volume: &volume,
        interrupt: Interrupt::catch().context("catch Ctrl-C")?,
        runs: 0,
    };
    for (seq, is_good, flag) in [(good, true, "--good"), (bad, false, "--bad")] {
        if search.is_good(seq)? != is_good {
            let found = if is_good { "bad" } else { "good" };
            bail!(
                "the check finds the moment of {flag} (seq:{seq}) {found}; nothing can be narrowed down from there"
            );
        }
    }
    let barriers = search.candidates(good, bad, true)?;
    let (good, bad) = search.narrow(good, bad, &barriers)?;
    let writes = search.candidates(good, bad, false)?;
    let (good, bad) = search.narrow(good, bad, &writes)?;
    let outcome = search.outcome(good, bad)?;
    if args.json {
        return report.json(&outcome);
    }
    report.out(outcome.text())
}

impl Search<'_> {
    /// Moments after `good` and before `bad` at which the volume had changed, or with `barriers` only those after which
    /// something was made durable, as far as they are exact.
    fn candidates(&self, good: Seq, bad: Seq, barriers: bool) -> anyhow::Result<Vec<Seq>> {
        let history = self.store.history(self.volume.id)?;
        let is_exact = |seq: Seq| history.as_ref().is_some_and(|history| is_exact(history, seq));
        let mut seqs = Vec::new();
        for frame in self.store.records(good.next()..=bad) {
            let frame = frame?;
            let of_volume = frame
                .records
                .iter()
                .filter_map(|placed| candidate(placed, self.volume));
            let wanted = of_volume.filter(|found| found.is_barrier || !barriers);
            seqs.extend(
                wanted
                    .map(|found| found.seq)
                    .filter(|seq| *seq < bad && is_exact(*seq)),
            );
        }
        Ok(seqs)
    }

    /// Halves the moments between a good and a bad one until none is left between the two.
    fn narrow(&mut self, mut good: Seq, mut bad: Seq, between: &[Seq]) -> anyhow::Result<(Seq, Seq)> {
        let mut rest = between;
        while let Some(middle) = rest.get(rest.len() / 2).copied() {
            let (before, after) = rest.split_at(rest.len() / 2);
            if self.is_good(middle)? {
                good = middle;
                rest = &after[1..];
            } else {
                bad = middle;
                rest = before;
            }
            self.report.note(format!(
                "good until seq:{good}, bad at seq:{bad}, {} in between",
                count(rest.len() as u64, "moment")
            ));
        }
        Ok((good, bad))
    }

    /// Mounts a moment and runs the check on it.
    fn is_good(&mut self, seq: Seq) -> anyhow::Result<bool> {
        self.interrupt.check().context("nothing is left mounted")?;
        let Some(mounted) = self.mount(seq)? else {
            self.report
                .note(format!("seq:{seq} cannot be mounted, which counts as bad"));
            return Ok(false);
        };
        let (program, arguments) = self.args.command.split_first().context("no check was given")?;
        let status = Command::new(program)
            .args(arguments)
            .env(MOUNT_VARIABLE, mounted.dir())
            .env(AT_VARIABLE, format!("seq:{seq}"))
            .stdin(Stdio::null())
            // What it prints is not our result.
            .stdout(std::io::stderr())
            .status();
        self.runs += 1;
        let trouble = mounted.close()?;
        if !trouble.is_empty() {
            bail!(
                "seq:{seq}: {trouble}; so the check was not shown all of it, and what it says does not count"
            );
        }
        let status = status.with_context(|| format!("run {}", program.display()))?;
        match status.code() {
            Some(0) => Ok(true),
            Some(code) if code < CHECK_FAILED_MIN => Ok(false),
            _ => bail!("the check ended with {status} at seq:{seq}, which says neither good nor bad"),
        }
    }

    /// Mounts a moment; `None` if there is nothing in it that can be mounted. Everything else that goes wrong says
    /// nothing of the moment, and is an error.
    fn mount(&self, seq: Seq) -> anyhow::Result<Option<Peek>> {
        let args = self.args;
        let peeking = Peeking::new(&args.source, &args.volume, &args.layer, self.report).writable();
        match peeking.at(When::Seq(seq)) {
            Ok(peek) => Ok(Some(peek)),
            Err(error) if error.is::<Unmountable>() => {
                tracing::info!("seq:{seq} cannot be mounted: {error:#}");
                Ok(None)
            }
            Err(error) => Err(error.context(format!("mount seq:{seq}"))),
        }
    }

    fn outcome(&self, good: Seq, bad: Seq) -> anyhow::Result<Outcome> {
        let moment = |seq: Seq| -> anyhow::Result<Moment> {
            let at = self.store.locate(&When::Seq(seq))?.wall;
            Ok(Moment {
                at: Time(at),
                seq: seq.get(),
            })
        };
        let gaps = JsonGap::within(self.store.history(self.volume.id)?.as_ref(), Some(good), bad);
        let mut write = None;
        let seen = gaps.is_empty().then_some(bad..=bad);
        for frame in seen.into_iter().flat_map(|seqs| self.store.records(seqs)) {
            let of_volume = |placed: &&PlacedRecord| placed.record.volume == Some(self.volume.id);
            write = frame?.records.iter().find(of_volume).and_then(written);
        }
        Ok(Outcome {
            volume: self.volume.name.clone(),
            good: moment(good)?,
            bad: moment(bad)?,
            write,
            gaps,
            runs: self.runs,
        })
    }
}

fn is_exact(history: &History, seq: Seq) -> bool {
    history
        .exact
        .iter()
        .any(|exact| exact.from_seq <= seq && (seq <= exact.to_seq || exact.open))
}

/// What the record changed of the volume, if it did.
fn candidate(placed: &PlacedRecord, volume: &VolumeInfo) -> Option<Candidate> {
    let record = &placed.record;
    let is_change = matches!(
        record.body,
        Body::Write { .. } | Body::Zero { .. } | Body::Discard { .. } | Body::Barrier
    );
    (record.volume == Some(volume.id) && is_change).then_some(Candidate {
        seq: record.seq,
        is_barrier: is_barrier(record),
    })
}

/// Did somebody wait until everything up to this record was durable?
pub(super) fn is_barrier(record: &Record) -> bool {
    let durable = [RecordFlags::PREFLUSH, RecordFlags::FUA];
    record.body == Body::Barrier || durable.iter().any(|flag| record.flags.contains(*flag))
}

fn written(placed: &PlacedRecord) -> Option<Written> {
    let record = &placed.record;
    let (Body::Write { offset, len } | Body::Zero { offset, len } | Body::Discard { offset, len }) =
        record.body
    else {
        return None;
    };
    Some(Written {
        offset,
        bytes: len,
        pid: record.origin.pid,
        comm: record.origin.command(),
    })
}

impl Outcome {
    fn text(&self) -> String {
        let Moment { at, seq } = &self.good;
        let mut text = format!("last good: {at} (seq:{seq})\n");
        let Moment { at, seq } = &self.bad;
        text.push_str(&format!("first bad: {at} (seq:{seq})"));
        if let Some(write) = &self.write {
            text.push_str(&format!(
                ", {} bytes at {} by {}[{}]",
                write.bytes, write.offset, write.comm, write.pid
            ));
        }
        for gap in &self.gaps {
            text.push_str(&format!(
                "\nbetween the two lies gap {} from {}: what made the difference may have been written in it, unseen",
                gap.cause, gap.from
            ));
        }
        text.push_str(&format!("\n{} of the check\n", count(self.runs.into(), "run")));
        text
    }
}
