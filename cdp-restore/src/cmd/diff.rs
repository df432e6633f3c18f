//! `diff`: what was written between two moments, where, how often, when and by whom.
//!
//! The records between the two moments tell all of it. Where a gap lies between them, what was lost is told
//! by the read-back that ended the gap: such ranges are listed with fewer writes than there were, or none.
//!
//! Which files were changed is asked of both moments, mounted, where they can be.

use anyhow::Context;
use cdp_journal::Seq;
use cdp_journal::format::{Body, PlacedRecord};
use cdp_journal::view::View;
use cdp_journal::when::When;
use serde::Serialize;

use super::gap::JsonGap;
use super::peek::{Peek, Peeking};
use super::{Instant, open_volume, require_block, resolve, table};
use crate::args::Diff;
use crate::changed_files::{ChangedFile, ChangedFiles, Comparison, FILES_MAX, Side};
use crate::changes::{Changes, Kind, Range};
use crate::exit::UsageError;
use crate::interrupt::Interrupt;
use crate::placement::Placement;
use crate::report::Report;
use crate::time::Time;
use crate::units::{Bytes, Elapsed, count};

/// What `diff --json` prints.
#[derive(Debug, Serialize)]
struct Outcome {
    volume: String,
    since: Moment,
    until: Moment,
    /// Bytes that lie in a range: each counts once, however often it was written.
    changed_bytes: u64,
    writes: u64,
    ranges: Vec<JsonRange>,
    /// Gaps between the two moments: what was written in them is known only by its result.
    gaps: Vec<JsonGap>,
    /// What differs in the file systems on it, by path; nothing where that cannot be told.
    files: Option<Vec<ChangedFile>>,
    /// Why it cannot.
    files_unknown: Option<String>,
    /// There are more than were told.
    files_truncated: bool,
}

#[derive(Debug, Serialize)]
struct Moment {
    at: Time,
    seq: u64,
    /// The volume's size then.
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct JsonRange {
    offset: u64,
    bytes: u64,
    /// Writes, zeroes and discards that touched it.
    writes: u64,
    discards: u64,
    read_backs: u64,
    first_at: Time,
    last_at: Time,
    by: Vec<Writer>,
}

#[derive(Debug, Serialize)]
struct Writer {
    pid: u32,
    comm: String,
    writes: u64,
}

pub(crate) fn run(args: &Diff, report: &Report) -> anyhow::Result<()> {
    let (store, volume) = open_volume(&args.source, &args.volume)?;
    require_block(&volume, "diff")?;
    // The later one first: it may have to wait until it is covered, and the earlier one never does then.
    let until = resolve(&*store, &volume, &args.until)?;
    let since = resolve(&*store, &volume, &args.since)?;
    if since.seq > until.seq {
        let message = format!("--since {since} is later than --until {until}; swap them");
        return Err(UsageError(message).into());
    }
    let mut changes = Changes::default();
    for frame in store.records(since.seq.next()..=until.seq) {
        let of_volume = |placed: &&PlacedRecord| placed.record.volume == Some(volume.id);
        for placed in frame?.records.iter().filter(of_volume) {
            note(&mut changes, placed);
        }
    }
    let (before, after) = (
        store.view(volume.id, since.seq)?,
        store.view(volume.id, until.seq)?,
    );
    let files = match args.no_files {
        true => Err("--no-files was given".to_owned()),
        false => changed_files(args, report, &before, &after)?,
    };
    let (files, files_truncated, files_unknown) = match files {
        Ok((found, left_out)) => (Some(found.files), found.truncated, left_out),
        Err(why) => (None, false, Some(why)),
    };
    let gaps = JsonGap::within(store.history(volume.id)?.as_ref(), Some(since.seq), until.seq);
    let outcome = Outcome {
        volume: volume.name,
        since: Moment {
            at: since.at,
            seq: since.seq.get(),
            bytes: before.bytes(),
        },
        until: Moment {
            at: until.at,
            seq: until.seq.get(),
            bytes: after.bytes(),
        },
        changed_bytes: changes.bytes(),
        writes: changes.writes(),
        ranges: changes
            .into_ranges()
            .map(|(offset, range)| JsonRange::new(offset, range))
            .collect(),
        gaps,
        files,
        files_unknown,
        files_truncated,
    };
    for gap in &outcome.gaps {
        report.warn(format!(
            "gap {} from {} lies between the two moments: writes in it are known only by their result",
            gap.cause, gap.from
        ));
    }
    if let Some(why) = outcome.files_unknown.as_ref().filter(|_| !args.no_files) {
        let all = if outcome.files.is_some() { "all " } else { "" };
        report.note(format!("which files were changed is not {all}told: {why}"));
    }
    if files_truncated {
        report.warn(format!(
            "only the first {FILES_MAX} of the changed files are told"
        ));
    }
    if args.json {
        report.json(&outcome)
    } else {
        report.out(text(&outcome, since, until))
    }
}

/// Which files differ, and why others are not told.
type Found = (ChangedFiles, Option<String>);

/// Which files differ; or why that cannot be told.
fn changed_files(
    args: &Diff,
    report: &Report,
    before: &View,
    after: &View,
) -> anyhow::Result<Result<Found, String>> {
    let changed = changed_ranges(before, after)?;
    if changed.is_empty() {
        return Ok(Ok(Found::default()));
    }
    let interrupt = Interrupt::catch().context("catch Ctrl-C")?;
    let peeking = Peeking::new(&args.source, &args.volume, &args.layer, report);
    let mount = |seq: Seq| -> anyhow::Result<Result<Peek, String>> {
        interrupt.check().context("nothing is left mounted")?;
        peeking.try_at(When::Seq(seq))
    };
    let before = match mount(before.seq())? {
        Ok(before) => before,
        Err(why) => return Ok(Err(why)),
    };
    let after = match mount(after.seq())? {
        Ok(after) => after,
        Err(why) => return Ok(Err(why)),
    };
    let left_out = after.left_out().or_else(|| before.left_out());
    let left_out = left_out.map(|what| format!("no file can be read from {what}"));
    let found = compare([&before, &after], &changed, &interrupt);
    let found = after.settle(before.settle(found))?;
    Ok(Ok((found, left_out)))
}

/// Where two views may differ: by what the index says, for the records of a stretch of time do not tell what was
/// corrected later. Bytes that only one of them has count.
fn changed_ranges(before: &View, after: &View) -> anyhow::Result<Vec<std::ops::Range<u64>>> {
    let common = before.bytes().min(after.bytes());
    let mut changed = after.changed_since(Some(before.seq()), 0..common)?;
    let longest = before.bytes().max(after.bytes());
    changed.extend((common < longest).then_some(common..longest));
    Ok(changed)
}

/// Compares what is mounted, file system by file system.
fn compare(
    peeks: [&Peek; 2],
    changed: &[std::ops::Range<u64>],
    interrupt: &Interrupt,
) -> anyhow::Result<ChangedFiles> {
    let parts = peeks.map(Peek::parts);
    let mut numbers: Vec<_> = parts.iter().flatten().map(|part| part.number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut found = ChangedFiles::default();
    for number in numbers {
        // Of a partition that is there on one side only, all is added or removed.
        let side = |side: usize| -> anyhow::Result<_> {
            let Some(part) = parts[side].iter().find(|part| part.number == number) else {
                return Ok(None);
            };
            let placement = Placement::of(&part.dir, &part.kind, part.offset)
                .with_context(|| format!("find out where the files of the {} lie", part.kind))?;
            let root = &part.dir;
            Ok(Some(Side { root, placement }))
        };
        let comparison = Comparison {
            sides: [side(0)?, side(1)?],
            changed,
            interrupt,
        };
        let prefix = parts.iter().flatten().find(|part| part.number == number);
        let prefix = prefix.map_or_else(String::new, |part| part.prefix());
        comparison.find(&prefix, &mut found).context("compare files")?;
    }
    Ok(found)
}

/// Adds what a record changed.
fn note(changes: &mut Changes, placed: &PlacedRecord) {
    let record = &placed.record;
    let (offset, len, kind) = match record.body {
        Body::Write { offset, len } | Body::Zero { offset, len } => (offset, len, Kind::Write),
        Body::Discard { offset, len } => (offset, len, Kind::Discard),
        Body::ReadBack { offset, len, .. } | Body::ReadBackZero { offset, len, .. } => {
            (offset, len, Kind::ReadBack)
        }
        _ => return,
    };
    changes.add(
        offset,
        len,
        kind,
        Time(placed.wall),
        record.origin.pid,
        &record.origin.command(),
    );
}

impl JsonRange {
    fn new(offset: u64, range: Range) -> Self {
        let mut by: Vec<_> = range
            .by
            .into_iter()
            .map(|((pid, comm), writes)| Writer { pid, comm, writes })
            .collect();
        by.sort_by(|a, b| b.writes.cmp(&a.writes).then(a.pid.cmp(&b.pid)));
        JsonRange {
            offset,
            bytes: range.end - offset,
            writes: range.writes,
            discards: range.discards,
            read_backs: range.read_backs,
            first_at: range.first_at,
            last_at: range.last_at,
            by,
        }
    }

    fn who(&self) -> String {
        let names = self
            .by
            .iter()
            .map(|writer| format!("{}[{}]", writer.comm, writer.pid));
        let mut shown: Vec<_> = names.take(3).collect();
        if self.by.len() > shown.len() {
            shown.push(format!("{} more", self.by.len() - shown.len()));
        }
        shown.join(", ")
    }

    fn row(&self) -> Vec<String> {
        let writes = if self.read_backs > 0 {
            format!("{} + {}", self.writes, count(self.read_backs, "read-back"))
        } else {
            self.writes.to_string()
        };
        vec![
            self.offset.to_string(),
            self.bytes.to_string(),
            writes,
            self.first_at.to_string(),
            self.last_at.to_string(),
            self.who(),
        ]
    }
}

fn text(outcome: &Outcome, since: Instant, until: Instant) -> String {
    let mut text = format!(
        "{} from {since} to {until} ({}): {} by {} in {}\n",
        outcome.volume,
        Elapsed(since.at.until(until.at)),
        Bytes(outcome.changed_bytes),
        count(outcome.writes, "write"),
        count(outcome.ranges.len() as u64, "range"),
    );
    if outcome.since.bytes != outcome.until.bytes {
        text.push_str(&format!(
            "resized from {} to {}\n",
            Bytes(outcome.since.bytes),
            Bytes(outcome.until.bytes)
        ));
    }
    if outcome.ranges.is_empty() {
        return text;
    }
    let title = ["OFFSET", "BYTES", "WRITES", "FIRST", "LAST", "BY"]
        .map(str::to_owned)
        .to_vec();
    let rows = outcome.ranges.iter().map(JsonRange::row);
    text.push('\n');
    text.push_str(&table(&std::iter::once(title).chain(rows).collect::<Vec<_>>()));
    if let Some(files) = &outcome.files {
        text.push_str(&format!("\n{} changed\n", count(files.len() as u64, "file")));
        text.push_str(&table(&files.iter().map(row_of).collect::<Vec<_>>()));
    }
    text
}

/// A file that is not as it was.
fn row_of(file: &ChangedFile) -> Vec<String> {
    let bytes = match (file.bytes_before, file.bytes_after) {
        (Some(before), Some(after)) if before != after => format!("{} to {}", Bytes(before), Bytes(after)),
        (before, after) => after
            .or(before)
            .map_or_else(String::new, |bytes| Bytes(bytes).to_string()),
    };
    let what: Vec<_> = file.what.iter().map(|aspect| aspect.as_str()).collect();
    vec![
        file.change.as_str().to_owned(),
        what.join("+"),
        bytes,
        file.path.clone(),
    ]
}
