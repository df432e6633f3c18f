//! `find`: when were these bytes written, where, and by whom, and when were they gone again.
//!
//! Bytes are gone with the first record after which a view does not show them any more: asked of the view itself, for
//! each record that touches them.

use std::collections::BTreeMap;

use cdp_journal::format::{Body, PlacedRecord};
use cdp_journal::history::VolumeInfo;
use cdp_journal::store::Archive;
use cdp_journal::view::View;
use cdp_journal::when::When;
use cdp_journal::{ReadError, Seq, VolumeId};
use serde::Serialize;

use super::find_files::{FileSearch, Sighting};
use super::gap::JsonGap;
use super::peek::Peeking;
use super::{open_block_volume, table};
use crate::args::Find;
use crate::exit::UsageError;
use crate::report::Report;
use crate::search::{Event, Hit, search};
use crate::time::Time;
use crate::units::{Bytes, count};

/// What `find --json` prints.
#[derive(Debug, Serialize)]
struct Outcome {
    volume: String,
    pattern_bytes: usize,
    searched_records: u64,
    searched_bytes: u64,
    hits: Vec<JsonHit>,
    /// There are more than were asked for.
    truncated: bool,
    /// Gaps in what was searched: what was written in them nobody saw.
    gaps: Vec<JsonGap>,
    /// Why the files of some hits are not known, beside that their bytes may be part of none.
    files_unknown: Option<String>,
}

#[derive(Debug, Serialize)]
struct JsonHit {
    at: Time,
    seq: u64,
    /// First byte on the volume.
    offset: u64,
    pid: u32,
    comm: String,
    /// It was read from the device, and written by whoever at some time before.
    read_back: bool,
    /// With which record the bytes were gone again, if that was seen.
    gone_at: Option<Time>,
    gone_seq: Option<u64>,
    /// Are they there at the end of what was searched?
    still_there: bool,
    /// Which file they were in, if that is known.
    file: Option<String>,
}

pub(crate) fn run(args: &Find, report: &Report) -> anyhow::Result<()> {
    let (store, volume) = open_block_volume(&args.source, &args.volume, "find")?;
    let until = locate(&*store, args.until.as_ref().unwrap_or(&When::Latest))?;
    let since = args
        .since
        .as_ref()
        .map(|since| locate(&*store, since))
        .transpose()?
        .flatten();
    let first = since.map_or(Seq::FIRST, Seq::next);
    if since > until {
        return Err(UsageError("--since is later than --until; swap them".to_owned()).into());
    }
    let progress = report.progress("searching", store.log_bytes()?);
    let mut truncated = false;
    let mut found = Found::new(&*store, volume.id, &args.bytes.0);
    // Nothing at all if `until` lies before the first record.
    let seqs = until.map_or(Seq::FIRST.next()..=Seq::FIRST, |until| first..=until);
    let records = store.records(seqs);
    let advance = |bytes| progress.advance(bytes);
    let searched = search(
        &*store,
        volume.id,
        records,
        &args.bytes.0,
        args.threads.get(),
        &advance,
        |event| match event {
            Event::Changed { record, offset, len } => found.changed(&record, offset, len).map(|()| true),
            Event::Hit(hit) => {
                truncated = found.hits.len() >= args.hits_max;
                if !truncated {
                    found.add(&hit);
                }
                Ok(!truncated)
            }
        },
    )?;
    let mut hits = found.finish(until)?;
    drop(progress);
    let files_unknown = match args.no_files {
        true => None,
        false => name_files(args, report, &*store, &volume, until, &mut hits)?,
    };
    if let Some(why) = &files_unknown {
        report.note(format!("which files hits were in is not all told: {why}"));
    }
    let gaps = match until {
        Some(until) => JsonGap::within(store.history(volume.id)?.as_ref(), since, until),
        None => Vec::new(),
    };
    for gap in &gaps {
        report.warn(format!(
            "gap {} from {} lies in what was searched: of what was written in it only what was there at its end was seen",
            gap.cause, gap.from
        ));
    }
    let outcome = Outcome {
        volume: volume.name,
        pattern_bytes: args.bytes.0.len(),
        searched_records: searched.records,
        searched_bytes: searched.bytes,
        hits,
        truncated,
        gaps,
        files_unknown,
    };
    if truncated {
        report.warn(format!(
            "there are more than {}; --hits-max shows more, --since and --until narrow it down",
            count(args.hits_max as u64, "hit")
        ));
    }
    if args.json {
        return report.json(&outcome);
    }
    report.out(text(&outcome))
}

/// Finds the files of the hits; why they are not all known, if so.
fn name_files(
    args: &Find,
    report: &Report,
    store: &dyn Archive,
    volume: &VolumeInfo,
    until: Option<Seq>,
    hits: &mut [JsonHit],
) -> anyhow::Result<Option<String>> {
    let peeking = Peeking::new(&args.source, &args.volume, &args.layer, report);
    let sighting = |hit: &JsonHit| {
        let first = Seq::new(hit.seq)?;
        let before_gone = hit.gone_seq.and_then(|gone| Seq::new(gone.saturating_sub(1)));
        let last = before_gone.or(until.filter(|_| hit.still_there)).unwrap_or(first);
        let (offset, wall) = (hit.offset, hit.at.0);
        Some(Sighting {
            offset,
            first,
            wall,
            last: last.max(first),
        })
    };
    let search = FileSearch {
        store,
        volume,
        peeking,
    };
    let owners = search.find(&hits.iter().filter_map(sighting).collect::<Vec<_>>())?;
    for (hit, file) in hits.iter_mut().zip(owners.files) {
        hit.file = file;
    }
    Ok(owners.unknown)
}

/// The last record that belongs to a moment, exact or not.
fn locate(store: &dyn Archive, when: &When) -> anyhow::Result<Option<Seq>> {
    Ok(store.locate(when)?.seq)
}

/// Hits, and which of them are there still.
struct Found<'a> {
    store: &'a dyn Archive,
    volume: VolumeId,
    pattern: &'a [u8],
    hits: Vec<JsonHit>,
    /// Those that are there, by offset: which of `hits`, for the bytes may be written over themselves.
    there: BTreeMap<u64, Vec<usize>>,
}

impl<'a> Found<'a> {
    fn new(store: &'a dyn Archive, volume: VolumeId, pattern: &'a [u8]) -> Self {
        Found {
            store,
            volume,
            pattern,
            hits: Vec::new(),
            there: BTreeMap::new(),
        }
    }

    fn add(&mut self, hit: &Hit) {
        self.there.entry(hit.offset).or_default().push(self.hits.len());
        self.hits.push(JsonHit::new(hit));
    }

    /// Looks whether those that a record touches are there after it.
    fn changed(&mut self, record: &PlacedRecord, offset: u64, len: u64) -> Result<(), ReadError> {
        let first = offset.saturating_sub(self.pattern.len() as u64 - 1);
        let end = offset.saturating_add(len);
        let touched: Vec<u64> = self.there.range(first..end).map(|(at, _)| *at).collect();
        if touched.is_empty() {
            return Ok(());
        }
        let view = self.store.view(self.volume, record.record.seq)?;
        for at in touched {
            if self.shows(&view, at)? {
                continue;
            }
            for index in self.there.remove(&at).unwrap_or_default() {
                let hit = &mut self.hits[index];
                (hit.gone_at, hit.gone_seq) = (Some(Time(record.wall)), Some(record.record.seq.get()));
            }
        }
        Ok(())
    }

    fn shows(&self, view: &View, at: u64) -> Result<bool, ReadError> {
        if at.saturating_add(self.pattern.len() as u64) > view.bytes() {
            return Ok(false);
        }
        let mut bytes = vec![0; self.pattern.len()];
        view.read_at(at, &mut bytes)?;
        Ok(bytes == self.pattern)
    }

    /// The hits, with whether they are there in the end.
    fn finish(mut self, until: Option<Seq>) -> Result<Vec<JsonHit>, ReadError> {
        let Some(until) = until.filter(|_| !self.hits.is_empty()) else {
            return Ok(self.hits);
        };
        let view = self.store.view(self.volume, until)?;
        // Where the search ended early not every change was seen.
        for (at, hits) in std::mem::take(&mut self.there) {
            let is_there = self.shows(&view, at)?;
            for index in hits {
                self.hits[index].still_there = is_there;
            }
        }
        Ok(self.hits)
    }
}

impl JsonHit {
    fn new(hit: &Hit) -> Self {
        let record = &hit.record.record;
        JsonHit {
            at: Time(hit.record.wall),
            seq: record.seq.get(),
            offset: hit.offset,
            pid: record.origin.pid,
            comm: record.origin.command(),
            read_back: matches!(record.body, Body::ReadBack { .. }),
            gone_at: None,
            gone_seq: None,
            still_there: false,
            file: None,
        }
    }

    fn row(&self) -> Vec<String> {
        let by = if self.read_back {
            "read back".to_owned()
        } else {
            format!("{}[{}]", self.comm, self.pid)
        };
        let seq = format!("seq:{}", self.seq);
        let gone = match (self.gone_at, self.gone_seq) {
            (Some(at), Some(seq)) => format!("{at} (seq:{seq})"),
            _ if self.still_there => "still there".to_owned(),
            _ => "not known when".to_owned(),
        };
        let file = self.file.clone().unwrap_or_default();
        vec![self.at.to_string(), seq, self.offset.to_string(), by, gone, file]
    }
}

fn text(outcome: &Outcome) -> String {
    let mut text = format!(
        "{}: {} in {} ({})\n",
        outcome.volume,
        count(outcome.hits.len() as u64, "hit"),
        count(outcome.searched_records, "record"),
        Bytes(outcome.searched_bytes),
    );
    if outcome.hits.is_empty() {
        return text;
    }
    let title = ["TIME", "SEQ", "OFFSET", "BY", "GONE", "FILE"]
        .map(str::to_owned)
        .to_vec();
    let rows = outcome.hits.iter().map(JsonHit::row);
    text.push('\n');
    text.push_str(&table(&std::iter::once(title).chain(rows).collect::<Vec<_>>()));
    text
}
