//! `points`: a volume's history, to choose a moment from.

use anyhow::Context as _;
use cdp_journal::history::{Bookmark, ExactInterval, History, Note, Resize};
use cdp_journal::{Seq, WallNs};
use serde::Serialize;

use super::gap::JsonGap;
use super::{explain, open_volume, table};
use crate::args::Points as Args;
use crate::report::Report;
use crate::time::Time;
use crate::units::{Bytes, Elapsed, count};

/// What `points --json` prints.
#[derive(Debug, Serialize)]
struct Points<'a> {
    volume: &'a str,
    kind: String,
    bytes: u64,
    path: &'a str,
    exact: Vec<JsonExact>,
    gaps: Vec<JsonGap>,
    bookmarks: Vec<JsonBookmark<'a>>,
    sizes: Vec<JsonSize>,
    notes: Vec<JsonNote<'a>>,
    covered_until: Option<Time>,
    /// Somebody is writing to it now.
    live: bool,
}

#[derive(Debug, Serialize)]
struct JsonExact {
    from: Time,
    to: Time,
    from_seq: u64,
    to_seq: u64,
    /// It reaches the newest record and goes on.
    open: bool,
}

#[derive(Debug, Serialize)]
struct JsonBookmark<'a> {
    label: &'a str,
    at: Time,
    seq: u64,
}

#[derive(Debug, Serialize)]
struct JsonSize {
    at: Time,
    seq: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct JsonNote<'a> {
    at: Time,
    seq: u64,
    text: &'a str,
}

pub(crate) fn run(args: &Args, report: &Report) -> anyhow::Result<()> {
    let (store, volume) = open_volume(&args.source, &args.volume)?;
    let Some(history) = store.history(volume.id)? else {
        anyhow::bail!("{} has no history in {}", volume.name, args.source.from);
    };
    let covered_until = store.covered_until().map(Time);
    let live = store.writer_alive().context("ask whether an agent is running")?;
    if args.json {
        report.json(&Points::new(&history, covered_until, live))
    } else {
        report.out(text(&history, live))
    }
}

impl<'a> Points<'a> {
    fn new(history: &'a History, covered_until: Option<Time>, live: bool) -> Self {
        let History {
            volume,
            exact,
            gaps,
            bookmarks,
            resizes,
            notes,
        } = history;
        Points {
            volume: &volume.name,
            kind: volume.kind.to_string(),
            bytes: volume.bytes,
            path: &volume.path,
            exact: exact.iter().map(JsonExact::from).collect(),
            gaps: gaps.iter().map(JsonGap::from).collect(),
            bookmarks: bookmarks.iter().map(JsonBookmark::from).collect(),
            sizes: resizes.iter().map(JsonSize::from).collect(),
            notes: notes.iter().map(JsonNote::from).collect(),
            covered_until,
            live,
        }
    }
}

impl From<&ExactInterval> for JsonExact {
    fn from(stretch: &ExactInterval) -> Self {
        let ExactInterval {
            from,
            to,
            from_seq,
            to_seq,
            open,
        } = *stretch;
        JsonExact {
            from: Time(from),
            to: Time(to),
            from_seq: from_seq.get(),
            to_seq: to_seq.get(),
            open,
        }
    }
}

impl<'a> From<&'a Bookmark> for JsonBookmark<'a> {
    fn from(bookmark: &'a Bookmark) -> Self {
        JsonBookmark {
            label: &bookmark.label,
            at: Time(bookmark.at),
            seq: bookmark.seq.get(),
        }
    }
}

impl From<&Resize> for JsonSize {
    fn from(resize: &Resize) -> Self {
        JsonSize {
            at: Time(resize.at),
            seq: resize.seq.get(),
            bytes: resize.bytes,
        }
    }
}

impl<'a> From<&'a Note> for JsonNote<'a> {
    fn from(note: &'a Note) -> Self {
        JsonNote {
            at: Time(note.at),
            seq: note.seq.get(),
            text: &note.text,
        }
    }
}

/// The history for people: what can be restored in order of time, then what happened at single moments.
fn text(history: &History, live: bool) -> String {
    let volume = &history.volume;
    let mut text = format!(
        "{}: {} volume, {}, {}\n",
        volume.name,
        volume.kind,
        Bytes(volume.bytes),
        volume.path
    );
    text.push_str(&summary(history, live));
    let stretches = stretches(history);
    if !stretches.is_empty() {
        text.push('\n');
        text.push_str(&table(&stretches));
    }
    let marks = marks(history);
    if !marks.is_empty() {
        text.push('\n');
        text.push_str(&table(&marks));
    }
    text
}

fn summary(history: &History, live: bool) -> String {
    let gaps = history.gaps.len() as u64;
    match (history.exact.first(), history.exact.last()) {
        (Some(first), Some(last)) => {
            let now = match (last.open, live) {
                (true, true) => " and goes on",
                (true, false) => ", where it ends: no agent adds to it now",
                (false, _) => "",
            };
            let gaps = if gaps == 0 {
                "no gap".to_owned()
            } else {
                count(gaps, "gap")
            };
            format!(
                "exact from {} to {}{now}, {gaps}\n",
                Time(first.from),
                Time(last.to)
            )
        }
        _ => format!(
            "nothing can be restored yet: {}\n",
            explain(cdp_journal::format::GapCause::Seeding)
        ),
    }
}

/// Exact stretches and gaps in order, one row each.
fn stretches(history: &History) -> Vec<Vec<String>> {
    let length = |from: WallNs, to: WallNs| Elapsed(Time(from).until(Time(to))).to_string();
    let exact = history.exact.iter().map(|stretch| {
        let ExactInterval {
            from,
            to,
            from_seq,
            to_seq,
            open,
        } = *stretch;
        let goes_on = if open { " and on" } else { "" };
        let row = [
            Time(from).to_string(),
            Time(to).to_string(),
            length(from, to),
            format!("exact  seq:{from_seq} to seq:{to_seq}{goes_on}"),
        ];
        (from_seq, 0, row)
    });
    let gaps = history.gaps.iter().map(|gap| {
        let row = [
            Time(gap.from).to_string(),
            gap.to
                .map_or_else(|| "still open".to_owned(), |to| Time(to).to_string()),
            gap.to.map_or_else(String::new, |to| length(gap.from, to)),
            format!("gap    {} ({})", gap.cause, explain(gap.cause)),
        ];
        (gap.from_seq.unwrap_or(Seq::FIRST), 1, row)
    });
    let mut rows: Vec<_> = exact.chain(gaps).collect();
    rows.sort_by_key(|(seq, is_gap, _)| (*seq, *is_gap));
    let title = (!rows.is_empty()).then(|| ["FROM", "TO", "LENGTH", ""].map(str::to_owned).to_vec());
    title
        .into_iter()
        .chain(rows.into_iter().map(|(_, _, row)| row.to_vec()))
        .collect()
}

/// Bookmarks, sizes and notes in order, one row each.
fn marks(history: &History) -> Vec<Vec<String>> {
    let bookmarks = history
        .bookmarks
        .iter()
        .map(|mark| (mark.seq, mark.at, format!("bookmark:{}", mark.label)));
    let sizes = history.resizes.windows(2).filter_map(|pair| match pair {
        [old, new] if old.bytes != new.bytes => Some((
            new.seq,
            new.at,
            format!("resized from {} to {}", Bytes(old.bytes), Bytes(new.bytes)),
        )),
        _ => None,
    });
    let notes = history
        .notes
        .iter()
        .map(|note| (note.seq, note.at, note.text.clone()));
    let mut marks: Vec<_> = bookmarks.chain(sizes).chain(notes).collect();
    marks.sort_by_key(|(seq, ..)| *seq);
    let row = |(seq, at, what): (Seq, WallNs, String)| vec![Time(at).to_string(), format!("seq:{seq}"), what];
    marks.into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use cdp_journal::VolumeId;
    use cdp_journal::format::{GapCause, VolumeKind};
    use cdp_journal::history::{Gap, VolumeInfo};

    use super::*;

    fn seq(number: u64) -> Seq {
        Seq::new(number).unwrap()
    }

    fn second(number: i64) -> WallNs {
        WallNs(1_795_227_300_000_000_000 + number * 1_000_000_000)
    }

    fn history() -> History {
        let stretch = |from, to, from_seq, to_seq, open| ExactInterval {
            from: second(from),
            to: second(to),
            from_seq: seq(from_seq),
            to_seq: seq(to_seq),
            open,
        };
        History {
            volume: VolumeInfo {
                id: VolumeId::new(1).unwrap(),
                name: "pg".to_owned(),
                kind: VolumeKind::Block,
                path: "/dev/vdb".to_owned(),
                bytes: 2 << 30,
            },
            exact: vec![stretch(0, 60, 10, 999, false), stretch(90, 100, 1200, 1300, true)],
            gaps: vec![Gap {
                from: second(60),
                to: Some(second(90)),
                from_seq: Some(seq(999)),
                to_seq: Some(seq(1200)),
                cause: GapCause::RingOverflow,
            }],
            bookmarks: vec![Bookmark {
                label: "before-upgrade".to_owned(),
                at: second(50),
                seq: seq(500),
            }],
            resizes: vec![
                Resize {
                    at: second(0),
                    seq: seq(1),
                    bytes: 1 << 30,
                },
                Resize {
                    at: second(95),
                    seq: seq(1250),
                    bytes: 2 << 30,
                },
            ],
            notes: vec![Note {
                at: second(0),
                seq: seq(1),
                text: "agent started".to_owned(),
            }],
        }
    }

    #[test]
    fn the_json_has_the_keys_of_the_contract() {
        let history = history();
        let value = serde_json::to_value(Points::new(&history, None, true)).unwrap();
        assert_eq!(value["volume"], "pg");
        assert_eq!(value["kind"], "block");
        assert_eq!(value["bytes"], 2u64 << 30);
        let exact = &value["exact"][0];
        assert_eq!(exact["from"], "2026-11-21T02:15:00.000000000Z");
        assert_eq!(exact["to"], "2026-11-21T02:16:00.000000000Z");
        assert_eq!((&exact["from_seq"], &exact["to_seq"]), (&10.into(), &999.into()));
        let gap = &value["gaps"][0];
        assert_eq!(gap["cause"], "ring-overflow");
        assert_eq!(gap["to"], "2026-11-21T02:16:30.000000000Z");
        let bookmark = &value["bookmarks"][0];
        assert_eq!(bookmark["label"], "before-upgrade");
        assert_eq!(bookmark["at"], "2026-11-21T02:15:50.000000000Z");
        assert_eq!(bookmark["seq"], 500);
    }

    #[test]
    fn an_open_gap_ends_in_null() {
        let mut history = history();
        history.gaps[0].to = None;
        let value = serde_json::to_value(Points::new(&history, None, true)).unwrap();
        assert!(value["gaps"][0]["to"].is_null());
        assert!(text(&history, true).contains("still open"));
    }

    #[test]
    fn the_text_tells_stretches_then_marks_in_order() {
        let ended = text(&history(), false);
        assert!(ended.contains("no agent adds to it now, 1 gap"), "{ended}");
        let text = text(&history(), true);
        let at = |what: &str| {
            text.find(what)
                .unwrap_or_else(|| panic!("no {what:?} in\n{text}"))
        };
        let order = [
            "pg: block volume, 2 GiB, /dev/vdb",
            "and goes on, 1 gap",
            "exact  seq:10 to seq:999",
            "gap    ring-overflow (writes came faster",
            "exact  seq:1200 to seq:1300 and on",
            "agent started",
            "bookmark:before-upgrade",
            "resized from 1 GiB to 2 GiB",
        ];
        assert!(order.windows(2).all(|pair| at(pair[0]) < at(pair[1])), "{text}");
        assert!(text.contains("30.0 s"), "{text}");
    }

    #[test]
    fn a_volume_that_is_still_copied_says_so() {
        let mut history = history();
        (history.exact, history.gaps, history.bookmarks) = (Vec::new(), Vec::new(), Vec::new());
        assert!(text(&history, true).contains("nothing can be restored yet"));
    }
}
