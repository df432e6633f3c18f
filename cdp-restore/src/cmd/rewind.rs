//! `rewind`: a device that holds a later moment goes back, by writing only what differs.
//!
//! In this order: the target is checked, the user is asked, the state before is named where an agent can be asked, the
//! moment is compared with the device (so that all of it that is needed has been read and checked), and only then is
//! anything written. Then the result is proven. Killed at any point, the same command goes on: it compares afresh.
//!
//! There are two ways to find what differs:
//! - All of it is read and compared, and in the end the SHA-256 of device and moment.
//! - Where the device is the volume itself, its agent alive and its history exact up to now, the history tells what
//!   was written since, and only that is compared. In the end what was written is read back and compared. That the
//!   rest is as the history says is tried on a sample; if one block of it is not, everything is compared.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::thread;
use std::time::Instant as Clock;

use anyhow::{Context, bail};
use cdp_journal::Seq;
use cdp_journal::history::VolumeInfo;
use cdp_journal::view::{CopyError, View};
use cdp_journal::when::{When, WhenError};
use serde::Serialize;

use super::overwrite::{confirm, protected_as, warn_if_protected};
use super::{OpenMoment, open_moment, refuse_own_files};
use crate::agent::Agent;
use crate::args::Rewind;
use crate::differences::{Both, Differences};
use crate::digest;
use crate::disk::BLOCK_BYTES;
use crate::interrupt::Interrupt;
use crate::report::Report;
use crate::target::{DeviceInPlace, Target, TargetError};
use crate::time::Time;
use crate::units::{Bytes, Elapsed};

/// Blocks that were not written since, compared all the same.
const SAMPLES: u64 = 256;
/// Bookmarks of states before a rewind begin so.
const BOOKMARK: &str = "before-rewind";

/// What `rewind --json` prints.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    volume: &'a str,
    at: Time,
    seq: u64,
    bytes: u64,
    to: &'a Path,
    /// Bytes read and compared to find what differs.
    compared_bytes: u64,
    /// Bytes that differed and were, or would be, written.
    changed_bytes: u64,
    proof: Proof,
    /// Names the state before, for `--at`; nothing where no agent could be asked, or its history is not exact.
    undo: Option<String>,
    /// The volume that it is a moment of: what the device is protected as.
    undo_volume: Option<&'a str>,
    dry_run: bool,
    seconds: f64,
}

/// What was done to know that the device is as it must be.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Proof {
    /// Nothing yet: a dry run.
    None,
    /// Device and moment have this SHA-256.
    Whole { sha256: String },
    /// What was written was read back and compared. For the rest the history vouches, and a sample of it was compared.
    Written { sampled_blocks: u64 },
}

/// What is compared to find what differs.
struct Plan {
    ranges: Vec<Range<u64>>,
    /// Blocks of the rest, compared along with them, where the history vouches for it; `None`: there is no rest.
    samples: Option<Vec<Range<u64>>>,
}

/// What is brought back, and what it is done to.
struct Job<'a> {
    args: &'a Rewind,
    report: &'a Report,
    moment: &'a OpenMoment,
    device: &'a DeviceInPlace,
    interrupt: Interrupt,
}

pub(crate) fn run(args: &Rewind, report: &Report) -> anyhow::Result<()> {
    let moment = open_moment(&args.source, &args.volume, &args.at, "rewind")?;
    let (volume, view, to) = (&moment.volume, &moment.view, args.to.as_path());
    refuse_own_files(to, &args.source.from)?;
    let Target::Device(target) = Target::inspect(to, &volume.name, view.bytes())? else {
        bail!(
            "{} is not a device; `cdp-restore image` writes files",
            to.display()
        );
    };
    let protected = protected_as(&args.source.from, &*moment.store, &target)?;
    warn_if_protected(report, protected.as_ref(), to);
    if !args.dry_run {
        let question = format!(
            "Bring {} ({}) back to {} as it was at {}? What was written to it since will be gone.",
            to.display(),
            Bytes(target.bytes()),
            volume.name,
            moment.instant,
        );
        confirm(report, args.yes, to, "what was written to it since", &question)?;
    }
    let started = Clock::now();
    let interrupt = Interrupt::catch().context("catch Ctrl-C")?;
    let beyond_bytes = target.bytes() - view.bytes();
    let device = target.open_in_place()?;
    let job = Job {
        args,
        report,
        moment: &moment,
        device: &device,
        interrupt,
    };
    let before = job.name_state_before(protected.as_ref())?;
    tracing::info!("the state before is named after {}", Elapsed(started.elapsed()));
    let head = match (&before, &protected) {
        (Some(before), Some(protected)) if protected.id == volume.id => Some(before.seq),
        _ => None,
    };
    let plan = job.plan(head)?;
    tracing::info!("what to compare is known after {}", Elapsed(started.elapsed()));
    let (plan, differences) = job.find(plan)?;
    tracing::info!("what differs is known after {}", Elapsed(started.elapsed()));
    let proof = if args.dry_run {
        Proof::None
    } else {
        job.write_and_prove(&plan, &differences)?
    };
    if beyond_bytes > 0 && !args.dry_run {
        let beyond = Bytes(beyond_bytes);
        report.note(format!(
            "{} is larger: its last {beyond} were left as they were",
            to.display()
        ));
    }
    let outcome = Outcome {
        volume: &volume.name,
        at: moment.instant.at,
        seq: moment.instant.seq.get(),
        bytes: view.bytes(),
        to,
        compared_bytes: plan.bytes(),
        changed_bytes: differences.bytes(),
        proof,
        undo_volume: before
            .as_ref()
            .and_then(|before| before.undo.as_ref())
            .and(protected.as_ref())
            .map(|protected| protected.name.as_str()),
        undo: before.and_then(|before| before.undo),
        dry_run: args.dry_run,
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json {
        return report.json(&outcome);
    }
    report.out(outcome.text(&job, Elapsed(started.elapsed())))
}

/// The state before, as the history knows it.
struct Before {
    /// Everything that was written before belongs to it.
    seq: Seq,
    /// Its name, for `--at`.
    undo: Option<String>,
}

impl Plan {
    /// All of a view.
    fn everything(view: &View) -> Self {
        Plan {
            ranges: std::iter::once(0..view.bytes()).collect(),
            samples: None,
        }
    }

    fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// All that is to be read, in order.
    fn all(&self) -> Vec<Range<u64>> {
        let samples = self.samples.iter().flatten();
        let mut all: Vec<_> = self.ranges.iter().chain(samples).cloned().collect();
        all.sort_unstable_by_key(|range| range.start);
        all
    }
}

impl Job<'_> {
    fn view(&self) -> &View {
        &self.moment.view
    }

    /// Has the agent make the state before durable, and (but for a dry run) name it. `None`: it is not known.
    fn name_state_before(&self, protected: Option<&VolumeInfo>) -> anyhow::Result<Option<Before>> {
        let to = self.args.to.display();
        let head = self.moment.store.head();
        let head = head.map_or_else(String::new, |head| {
            format!("; the newest moment in the store is seq:{}", head.seq)
        });
        let (Some(protected), Some(folder)) = (protected, self.args.source.from.folder()) else {
            let why = match self.args.source.from.folder() {
                Some(_) => format!("no agent protects {to} into this store"),
                None => format!("no agent can be asked through {}", self.args.source.from),
            };
            self.report.note(format!(
                "{why}, so what {to} holds now cannot be named and brought back{head}"
            ));
            return Ok(None);
        };
        let agent = Agent::of(folder);
        if self.args.dry_run {
            if let Err(error) = agent.sync() {
                let error = anyhow::Error::new(error);
                self.report
                    .warn(format!("what {to} holds now is not known{head}: {error:#}"));
                return Ok(None);
            }
            self.moment.store.refresh()?;
            let seq = self.moment.store.head().map(|head| head.seq);
            return Ok(seq.map(|seq| Before { seq, undo: None }));
        }
        let label = format!(
            "{BOOKMARK}-{}",
            jiff::Timestamp::now().strftime("%Y%m%dT%H%M%S%.3fZ")
        );
        // At once, for each waits until the log's disk has what was written so far.
        let (synced, named) = thread::scope(|scope| {
            let synced = scope.spawn(|| agent.sync());
            let named = agent.bookmark(&label);
            let synced = synced.join();
            (
                synced.unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                named,
            )
        });
        if let Err(error) = synced {
            let error = anyhow::Error::new(error);
            self.report.warn(format!(
                "what {to} holds now cannot be brought back exactly{head}: {error:#}"
            ));
            return Ok(None);
        }
        match named {
            Ok(seq) => {
                self.moment.store.refresh()?;
                let undo = match self.moment.store.resolve(protected.id, &When::Seq(seq)) {
                    Ok(_) => Some(format!("bookmark:{label}")),
                    Err(WhenError::NotExact(why)) => {
                        self.report.warn(format!(
                            "what {to} holds now cannot be brought back exactly, and this cannot be undone: {why}; once \
                             `cdp-agent wait --for protected` returns, it could be"
                        ));
                        None
                    }
                    Err(error) => return Err(anyhow::Error::new(error).context("nothing was written")),
                };
                Ok(Some(Before { seq, undo }))
            }
            Err(error) => {
                let error = anyhow::Error::new(error).context(format!("name the state of {to} before"));
                Err(error.context("nothing was written"))
            }
        }
    }

    /// What must be compared. `head` is where the history of this very device has got to, if it has.
    fn plan(&self, head: Option<Seq>) -> anyhow::Result<Plan> {
        let Some(head) = head.filter(|_| !self.args.compare_all) else {
            return Ok(Plan::everything(self.view()));
        };
        let (store, volume) = (&self.moment.store, &self.moment.volume);
        let is_exact = match store.resolve(volume.id, &When::Seq(head)) {
            Ok(_) => true,
            Err(WhenError::NotExact(_)) => false,
            Err(error) => return Err(error.into()),
        };
        let now = store.view(volume.id, head)?;
        if !is_exact || now.bytes() != self.view().bytes() || self.was_resized(head)? {
            self.report.note(format!(
                "the history of {} is not exact up to now, or its size has changed: all of it is compared",
                volume.name
            ));
            return Ok(Plan::everything(self.view()));
        }
        let ranges = now.changed_since(Some(self.moment.instant.seq), 0..now.bytes())?;
        let samples = Some(self.samples(&ranges));
        Ok(Plan { ranges, samples })
    }

    fn was_resized(&self, head: Seq) -> anyhow::Result<bool> {
        let history = self.moment.store.history(self.moment.volume.id)?;
        let since = |seq: Seq| seq > self.moment.instant.seq && seq <= head;
        Ok(history.is_none_or(|history| history.resizes.iter().any(|resize| since(resize.seq))))
    }

    /// Blocks here and there outside of `changed`.
    fn samples(&self, changed: &[Range<u64>]) -> Vec<Range<u64>> {
        let blocks = self.view().bytes() / BLOCK_BYTES;
        // Other blocks each time: which ones must not be known to whoever wrote past the agent.
        let phase = u64::from(jiff::Timestamp::now().subsec_nanosecond().unsigned_abs());
        let step = (blocks / SAMPLES).max(1);
        let is_unchanged = |range: &Range<u64>| {
            let after = changed.partition_point(|changed| changed.end <= range.start);
            changed
                .get(after)
                .is_none_or(|changed| changed.start >= range.end)
        };
        (0..SAMPLES.min(blocks))
            .map(|index| (index * step + phase % step) * BLOCK_BYTES)
            .map(|offset| offset..offset + BLOCK_BYTES)
            .filter(is_unchanged)
            .collect()
    }

    fn both<'a>(&'a self, progress: &'a (dyn Fn(u64) + Sync)) -> Both<'a> {
        Both {
            device: self.device,
            view: self.view(),
            threads: self.args.threads.for_scattered_reads(),
            interrupt: &self.interrupt,
            progress,
        }
    }

    /// Finds what differs; with the plan that it took.
    fn find(&self, plan: Plan) -> anyhow::Result<(Plan, Differences)> {
        let all = plan.all();
        let bytes = all.iter().map(|range| range.end - range.start).sum();
        let progress = self.report.progress("comparing", bytes);
        let advance = |bytes| progress.advance(bytes);
        let found = Differences::find(&self.both(&advance), &all, &plan.ranges)
            .map_err(|error| self.failed(error, "nothing was written"))?;
        drop(progress);
        let Some(offset) = found.stranger() else {
            return Ok((plan, found));
        };
        self.report.warn(format!(
            "{} holds at byte {offset} what its history does not know: all of it is compared",
            self.args.to.display()
        ));
        self.find(Plan::everything(self.view()))
    }

    fn write_and_prove(&self, plan: &Plan, differences: &Differences) -> anyhow::Result<Proof> {
        let to = self.args.to.display();
        let left = format!("{to} lies between two moments now; the same command goes on from there");
        let progress = self.report.progress("writing", differences.bytes());
        let advance = |bytes| progress.advance(bytes);
        let both = self.both(&advance);
        differences
            .write(&both)
            .map_err(|error| self.failed(error, &left))?;
        progress.stage("flushing");
        let written = Clock::now();
        self.device.flush()?;
        tracing::info!("flushed in {}", Elapsed(written.elapsed()));
        progress.stage("proving");
        if let Some(samples) = &plan.samples {
            let sampled_blocks = samples.len() as u64;
            progress.set(0);
            let left = "it is written, and not proven";
            let unproven = differences
                .unproven(&both)
                .map_err(|error| self.failed(error, left))?;
            return match unproven {
                None => Ok(Proof::Written { sampled_blocks }),
                Some(offset) => bail!("{to} does not hold what was written to it, first at byte {offset}"),
            };
        }
        drop(progress);
        self.prove_whole().map(|sha256| Proof::Whole { sha256 })
    }

    fn prove_whole(&self) -> anyhow::Result<String> {
        let (to, bytes, threads) = (
            self.args.to.display(),
            self.view().bytes(),
            self.args.threads.get(),
        );
        let progress = self.report.progress("proving", 2 * bytes);
        let read_device = |offset, buf: &mut [u8]| {
            self.interrupt.check()?;
            let len = buf.len() as u64;
            self.device.each_piece(offset, len, |at, held| {
                buf[(at - offset) as usize..][..held.len()].copy_from_slice(held);
                Ok(())
            })
        };
        let held: io::Result<_> = digest::sha256(bytes, &read_device, threads, &progress);
        let held = held.with_context(|| format!("it is written, and not proven: read {to}"))?;
        let read_view = |offset, buf: &mut [u8]| self.view().read_at(offset, buf);
        let wanted = digest::sha256(bytes, &read_view, threads, &progress)?;
        if held != wanted {
            bail!(
                "{to} has the SHA-256 {held} and must have {wanted}: it does not hold what was written to it"
            );
        }
        Ok(held)
    }

    fn failed(&self, error: CopyError, left: &str) -> anyhow::Error {
        match error {
            CopyError::Write { source, .. } if source.kind() == io::ErrorKind::Interrupted => {
                TargetError::Interrupted {
                    left: left.to_owned(),
                }
                .into()
            }
            error @ CopyError::Write { .. } => {
                anyhow::Error::new(error).context(format!("rewind {}; {left}", self.args.to.display()))
            }
            error => anyhow::Error::new(error).context(format!("read {}; {left}", self.moment.volume.name)),
        }
    }
}

impl Outcome<'_> {
    fn text(&self, job: &Job<'_>, elapsed: Elapsed) -> String {
        let (to, volume, instant) = (self.to.display(), self.volume, job.moment.instant);
        let (changed, compared) = (Bytes(self.changed_bytes), Bytes(self.compared_bytes));
        let mut text = match self.dry_run {
            true => format!(
                "would bring {to} back to {volume} as it was at {instant}: {changed} of {compared} compared differ\n"
            ),
            false => format!(
                "{to}: back to {volume} as it was at {instant}: {changed} of {compared} compared differed and were \
                 written, in {elapsed}\n"
            ),
        };
        match &self.proof {
            Proof::None => {}
            Proof::Whole { sha256 } => text.push_str(&format!("proven: device and moment have the sha256 {sha256}\n")),
            Proof::Written { sampled_blocks } => text.push_str(&format!(
                "proven: what was written was read back from the device and is right; for the rest its history \
                 vouches, {sampled_blocks} blocks of it were compared (--compare-all reads everything)\n"
            )),
        }
        if let Some(undo) = &self.undo {
            let of = match self.undo_volume {
                Some(other) if other != volume => format!("of {other}, what {to} is protected as: "),
                _ => String::new(),
            };
            text.push_str(&format!("to undo it: {of}--at {undo}\n"));
        }
        text
    }
}
