//! `find`: when were these bytes written, where, and by whom.

use cdp_journal::Seq;
use cdp_journal::format::Body;
use cdp_journal::store::Archive;
use cdp_journal::when::When;
use serde::Serialize;

use super::{open_block_volume, table};
use crate::args::Find;
use crate::exit::UsageError;
use crate::report::Report;
use crate::search::{Hit, search};
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
    let (mut hits, mut truncated) = (Vec::new(), false);
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
        |hit| {
            truncated = hits.len() >= args.hits_max;
            if !truncated {
                hits.push(JsonHit::new(&hit));
            }
            !truncated
        },
    )?;
    drop(progress);
    let outcome = Outcome {
        volume: volume.name,
        pattern_bytes: args.bytes.0.len(),
        searched_records: searched.records,
        searched_bytes: searched.bytes,
        hits,
        truncated,
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

/// The last record that belongs to a moment, exact or not.
fn locate(store: &dyn Archive, when: &When) -> anyhow::Result<Option<Seq>> {
    Ok(store.locate(when)?.seq)
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
        }
    }

    fn row(&self) -> Vec<String> {
        let by = if self.read_back {
            "read back".to_owned()
        } else {
            format!("{}[{}]", self.comm, self.pid)
        };
        let seq = format!("seq:{}", self.seq);
        vec![self.at.to_string(), seq, self.offset.to_string(), by]
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
    let title = ["TIME", "SEQ", "OFFSET", "BY"].map(str::to_owned).to_vec();
    let rows = outcome.hits.iter().map(JsonHit::row);
    text.push('\n');
    text.push_str(&table(&std::iter::once(title).chain(rows).collect::<Vec<_>>()));
    text
}
