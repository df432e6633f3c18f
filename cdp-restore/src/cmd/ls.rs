//! `ls`: the volumes of a store, and how far their history reaches.

use anyhow::Context;
use cdp_journal::history::History;
use cdp_journal::store::StoreReader;
use serde::Serialize;

use super::{open_store, table};
use crate::args::Ls;
use crate::report::Report;
use crate::time::Time;
use crate::units::{Bytes, count};

/// What `ls --json` prints.
#[derive(Debug, Serialize)]
struct Listing {
    store: Store,
    volumes: Vec<Volume>,
}

#[derive(Debug, Serialize)]
struct Store {
    path: String,
    uuid: String,
    /// Somebody is writing to it now.
    live: bool,
    log_bytes: u64,
    records: u64,
    covered_until: Option<Time>,
}

#[derive(Debug, Serialize)]
struct Volume {
    name: String,
    kind: String,
    bytes: u64,
    path: String,
    /// The newest stretch in which every moment can be restored.
    exact_since: Option<Time>,
    exact_until: Option<Time>,
    /// That stretch reaches the newest record.
    exact_now: bool,
    exact_stretches: usize,
    gaps: usize,
    bookmarks: usize,
}

pub(crate) fn run(args: &Ls, report: &Report) -> anyhow::Result<()> {
    let store = open_store(&args.source.from)?;
    let listing = Listing {
        store: Store {
            path: args.source.from.to_string(),
            uuid: store.uuid().to_string(),
            live: store.writer_alive().context("ask whether an agent is running")?,
            log_bytes: store.log_bytes()?,
            records: store.head().map_or(0, |head| head.seq.get()),
            covered_until: store.covered_until().map(Time),
        },
        volumes: volumes(&store)?,
    };
    if args.json {
        report.json(&listing)
    } else {
        report.out(text(&listing))
    }
}

fn volumes(store: &StoreReader) -> anyhow::Result<Vec<Volume>> {
    let mut volumes = Vec::new();
    for info in store.volumes()? {
        volumes.extend(store.history(info.id)?.map(Volume::from));
    }
    Ok(volumes)
}

impl From<History> for Volume {
    fn from(history: History) -> Self {
        let newest = history.exact.last();
        Volume {
            kind: history.volume.kind.to_string(),
            bytes: history.volume.bytes,
            exact_since: newest.map(|stretch| Time(stretch.from)),
            exact_until: newest.map(|stretch| Time(stretch.to)),
            exact_now: newest.is_some_and(|stretch| stretch.open),
            exact_stretches: history.exact.len(),
            gaps: history.gaps.len(),
            bookmarks: history.bookmarks.len(),
            name: history.volume.name,
            path: history.volume.path,
        }
    }
}

fn text(listing: &Listing) -> String {
    let Store {
        path,
        live,
        log_bytes,
        records,
        covered_until,
        ..
    } = &listing.store;
    let mut text = format!(
        "{path}: {} in {} of log",
        count(*records, "record"),
        Bytes(*log_bytes)
    );
    if let Some(until) = covered_until {
        text.push_str(&format!(", until {until}"));
    }
    text.push_str(if *live {
        ", an agent is writing to it\n"
    } else {
        ", no agent is writing to it\n"
    });
    if listing.volumes.is_empty() {
        return text + "no volumes yet\n";
    }
    let title = [
        "VOLUME",
        "KIND",
        "SIZE",
        "EXACT SINCE",
        "EXACT UNTIL",
        "GAPS",
        "PATH",
    ];
    let mut rows = vec![title.map(str::to_owned).to_vec()];
    rows.extend(listing.volumes.iter().map(|volume| {
        let time = |time: Option<Time>| time.map_or_else(|| "-".to_owned(), |time| time.to_string());
        vec![
            volume.name.clone(),
            volume.kind.clone(),
            Bytes(volume.bytes).to_string(),
            time(volume.exact_since),
            time(volume.exact_until),
            volume.gaps.to_string(),
            volume.path.clone(),
        ]
    }));
    text + "\n" + &table(&rows)
}

#[cfg(test)]
mod tests {
    use cdp_journal::WallNs;

    use super::*;

    fn listing(volumes: Vec<Volume>) -> Listing {
        let store = Store {
            path: "/var/lib/cdp".to_owned(),
            uuid: "u".to_owned(),
            live: true,
            log_bytes: 3 << 20,
            records: 7,
            covered_until: Some(Time(WallNs(0))),
        };
        Listing { store, volumes }
    }

    #[test]
    fn an_empty_store_says_so() {
        assert!(text(&listing(Vec::new())).ends_with("an agent is writing to it\nno volumes yet\n"));
    }

    #[test]
    fn a_volume_is_one_row_under_its_title() {
        let volume = Volume {
            name: "pg".to_owned(),
            kind: "block".to_owned(),
            bytes: 1 << 30,
            path: "/dev/vdb".to_owned(),
            exact_since: None,
            exact_until: None,
            exact_now: false,
            exact_stretches: 0,
            gaps: 2,
            bookmarks: 0,
        };
        let text = text(&listing(vec![volume]));
        let rows: Vec<_> = text
            .lines()
            .skip(2)
            .map(|row| row.split_whitespace().collect::<Vec<_>>())
            .collect();
        assert_eq!(
            rows[0].len() - 2,
            rows[1].len() - 1,
            "the times' titles and the size have two words"
        );
        assert_eq!(rows[1], ["pg", "block", "1", "GiB", "-", "-", "2", "/dev/vdb"]);
    }
}
