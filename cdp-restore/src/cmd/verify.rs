//! `verify`: is what is stored what was captured?
//!
//! Without a volume, the whole log is read: every frame, every group, against its checksum. With one, the
//! volume is read as it was at a moment, through the same view as a restore.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant as Clock};

use cdp_journal::store::Archive;
use cdp_journal::verify::Damage;
use cdp_journal::view::{CopyError, CopyOptions, ExtentKind, Sink, View};
use cdp_journal::when::When;
use cdp_journal::{ReadError, Seq};
use serde::Serialize;

use super::{Damaged, open_volume, require_block, resolve};
use crate::args::{From, Verify};
use crate::digest;
use crate::report::{Progress, Report};
use crate::source::Opened;
use crate::time::Time;
use crate::units::{Bytes, Elapsed, Rate, count};

/// How much is read at once when damage is looked for.
const STEP_BYTES: u64 = 64 << 10;

/// More are not listed: they would not help anybody.
const DAMAGES_MAX: usize = 1000;

/// What `verify --json` prints.
#[derive(Debug, Serialize)]
struct Outcome {
    ok: bool,
    /// What was checked: `log`, or the volume's name.
    checked: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    log: Option<Log>,
    #[serde(skip_serializing_if = "Option::is_none")]
    moment: Option<Moment>,
    bytes: u64,
    seconds: f64,
    damages: Vec<JsonDamage>,
}

#[derive(Debug, Default, Serialize)]
struct Log {
    segments: u64,
    frames: u64,
    records: u64,
}

#[derive(Debug, Serialize)]
struct Moment {
    at: Time,
    seq: u64,
    /// The volume's size then.
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

/// Bytes of a segment that do not match their checksum, and the moments that they were captured in.
#[derive(Debug, Serialize)]
struct JsonDamage {
    segment: PathBuf,
    offset: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    what: String,
    from_seq: Option<u64>,
    to_seq: Option<u64>,
    from: Option<Time>,
    to: Option<Time>,
    /// The first byte of the volume that could not be read for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    volume_offset: Option<u64>,
}

pub(crate) fn run(args: &Verify, report: &Report) -> anyhow::Result<()> {
    let started = Clock::now();
    let mut outcome = match &args.volume {
        None => verify_logs(&args.source, report)?,
        Some(name) => verify_volume(name, args, report)?,
    };
    let elapsed = started.elapsed();
    outcome.seconds = elapsed.as_secs_f64();
    if args.json {
        report.json(&outcome)?
    } else {
        report.out(text(&outcome, elapsed))?
    }
    let Some(first) = outcome.damages.first() else {
        return Ok(());
    };
    let place = format!("{} at byte {}", first.segment.display(), first.offset);
    match outcome.damages.len() {
        1 => Err(damaged(&format!("{place} does not match its checksum"))),
        more => Err(damaged(&format!(
            "{place} and {} more stretches of the log do not match their checksums",
            more - 1
        ))),
    }
}

fn damaged(what: &str) -> anyhow::Error {
    Damaged(format!(
        "{what}; moments that need it are refused, all others can be restored"
    ))
    .into()
}

/// Every log of the source.
fn verify_logs(source: &From, report: &Report) -> anyhow::Result<Outcome> {
    let stores = source.open()?;
    let log_bytes = stores.iter().map(|opened| opened.archive.log_bytes());
    let progress = report.progress("verifying", log_bytes.sum::<Result<u64, _>>()?);
    let mut log = Log::default();
    let (mut bytes, mut damages) = (0, Vec::new());
    for Opened { archive, .. } in &stores {
        let found = archive.verify_log(&mut |bytes| progress.advance(bytes))?;
        log.segments += found.segments;
        log.frames += found.frames;
        log.records += found.records;
        bytes += found.bytes;
        let found = found.damages.into_iter();
        damages.extend(found.map(|damage| JsonDamage::of_log(&**archive, damage)));
    }
    drop(progress);
    Ok(Outcome {
        ok: damages.is_empty(),
        checked: "log".to_owned(),
        log: Some(log),
        moment: None,
        bytes,
        seconds: 0.0,
        damages,
    })
}

fn verify_volume(name: &str, args: &Verify, report: &Report) -> anyhow::Result<Outcome> {
    let (store, volume) = open_volume(&args.source, name)?;
    let store = &*store;
    require_block(&volume, "verify VOLUME")?;
    let instant = resolve(store, &volume, args.at.as_ref().unwrap_or(&When::Latest))?;
    let view = store.view(volume.id, instant.seq)?;
    let progress = report.progress("verifying", view.bytes());
    let read = if args.sha256 {
        let read_at = |offset, buf: &mut [u8]| view.read_at(offset, buf);
        digest::sha256(view.bytes(), &read_at, args.threads.get(), &progress)
            .map(|digest| (view.bytes(), Some(digest)))
            .map_err(CopyError::Read)
    } else {
        read_all(&view, args.threads.get(), &progress).map(|data_bytes| (data_bytes, None))
    };
    let (bytes, sha256, damages) = match read {
        Ok((bytes, sha256)) => (bytes, sha256, Vec::new()),
        Err(CopyError::Read(error)) if error.is_damage() => {
            progress.set(0);
            progress.stage("damaged, looking for more");
            (view.bytes(), None, damages_of(store, &view, &progress)?)
        }
        Err(error) => return Err(error.into()),
    };
    drop(progress);
    Ok(Outcome {
        ok: damages.is_empty(),
        checked: volume.name,
        log: None,
        moment: Some(Moment {
            at: instant.at,
            seq: instant.seq.get(),
            bytes: view.bytes(),
            sha256,
        }),
        bytes,
        seconds: 0.0,
        damages,
    })
}

/// Reads and checks every block that is not zero; returns how many bytes those are.
fn read_all(view: &View, threads: usize, progress: &Progress) -> Result<u64, CopyError> {
    let options = CopyOptions {
        threads,
        gather_bytes_max: 0,
        ..CopyOptions::default()
    };
    match view.copy_to(&Discard, &options, &|bytes| progress.advance(bytes)) {
        Ok(copied) => Ok(copied.data_bytes),
        // `Discard` refuses nothing.
        Err(CopyError::Write { .. }) => Ok(0),
        Err(error) => Err(error),
    }
}

/// Takes what was read and checked, and does nothing with it.
struct Discard;

impl Sink for Discard {
    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a damaged view piece by piece and lists every place that cannot be read.
fn damages_of(store: &dyn Archive, view: &View, progress: &Progress) -> anyhow::Result<Vec<JsonDamage>> {
    let mut damages = BTreeMap::new();
    let mut buffer = vec![0; STEP_BYTES as usize];
    let mut at = 0;
    while at < view.bytes() && damages.len() < DAMAGES_MAX {
        let end = view.bytes().min(at + (1 << 30));
        for extent in view.extents(at..end)? {
            if extent.kind == ExtentKind::Data {
                let mut piece = extent.offset;
                while piece < extent.offset + extent.len {
                    let len = STEP_BYTES.min(extent.offset + extent.len - piece);
                    match view.read_at(piece, &mut buffer[..len as usize]) {
                        Err(ReadError::Damaged {
                            path,
                            offset,
                            what,
                            seqs,
                        }) => {
                            damages.entry((path, offset)).or_insert((what, seqs, piece));
                        }
                        other => other?,
                    }
                    piece += len;
                }
            }
            progress.advance(extent.len);
        }
        at = end;
    }
    let damages = damages
        .into_iter()
        .map(|((segment, offset), (what, seqs, volume_offset))| JsonDamage {
            volume_offset: Some(volume_offset),
            ..JsonDamage::new(store, segment, offset, what, seqs)
        });
    Ok(damages.collect())
}

impl JsonDamage {
    fn new(
        store: &dyn Archive,
        segment: PathBuf,
        offset: u64,
        what: String,
        seqs: Option<(Seq, Seq)>,
    ) -> Self {
        // The times are a help, not the finding: they may lie in the very bytes that are damaged.
        let time = |seq: Seq| Some(Time(store.locate(&When::Seq(seq)).ok()?.wall));
        JsonDamage {
            segment,
            offset,
            bytes: None,
            what,
            from_seq: seqs.map(|(first, _)| first.get()),
            to_seq: seqs.map(|(_, last)| last.get()),
            from: seqs.and_then(|(first, _)| time(first)),
            to: seqs.and_then(|(_, last)| time(last)),
            volume_offset: None,
        }
    }

    fn of_log(store: &dyn Archive, damage: Damage) -> Self {
        let Damage {
            path,
            offset,
            bytes,
            seqs,
            what,
        } = damage;
        JsonDamage {
            bytes: Some(bytes),
            ..JsonDamage::new(store, path, offset, what, seqs)
        }
    }

    fn line(&self) -> String {
        let mut line = format!("damaged: {} at byte {}", self.segment.display(), self.offset);
        if let Some(bytes) = self.bytes {
            line.push_str(&format!(", up to {}", count(bytes, "byte")));
        }
        line.push_str(&format!(" ({})", self.what));
        if let Some(offset) = self.volume_offset {
            line.push_str(&format!("; needed from byte {offset} of the volume"));
        }
        if let (Some(first), Some(last)) = (self.from_seq, self.to_seq) {
            line.push_str(&format!("; captured as seq:{first} to seq:{last}"));
        }
        if let (Some(from), Some(to)) = (self.from, self.to) {
            line.push_str(&format!(", {from} to {to}"));
        }
        line + "\n"
    }
}

fn text(outcome: &Outcome, elapsed: Duration) -> String {
    let mut text: String = outcome.damages.iter().map(JsonDamage::line).collect();
    if let Some(Log {
        segments,
        frames,
        records,
    }) = &outcome.log
    {
        let (segments, frames) = (count(*segments, "segment"), count(*frames, "frame"));
        text.push_str(&format!(
            "log: {segments}, {frames}, {}",
            count(*records, "record")
        ));
    }
    if let Some(Moment { at, seq, bytes, .. }) = &outcome.moment {
        text.push_str(&format!(
            "{} at {at} (seq:{seq}): {}",
            outcome.checked,
            Bytes(*bytes)
        ));
    }
    let (bytes, rate) = (
        Bytes(outcome.bytes),
        Rate {
            bytes: outcome.bytes,
            elapsed,
        },
    );
    let good = if outcome.ok { "all good" } else { "DAMAGED" };
    text.push_str(&format!(
        "; {bytes} read in {}, {rate}: {good}\n",
        Elapsed(elapsed)
    ));
    if let Some(sha256) = outcome
        .moment
        .as_ref()
        .and_then(|moment| moment.sha256.as_deref())
    {
        text.push_str(&format!("sha256 {sha256}\n"));
    }
    text
}
