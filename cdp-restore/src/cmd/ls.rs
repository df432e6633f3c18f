//! `ls`: the volumes of a store, and how far their history reaches.

use anyhow::Context;
use cdp_journal::history::History;
use cdp_journal::store::Archive;
use serde::Serialize;

use super::table;
use crate::args::Ls;
use crate::report::Report;
use crate::source::Opened;
use crate::time::Time;
use crate::units::{Bytes, count};

/// What `ls --json` prints.
#[derive(Debug, Serialize)]
struct Listing {
    /// The store, where the source is one agent's folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    store: Option<Store>,
    /// Every history, where the source is a server's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stores: Vec<Store>,
    volumes: Vec<Volume>,
}

#[derive(Debug, Serialize)]
struct Store {
    /// Whose history it is, where the source holds those of several agents.
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<String>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<String>,
    name: String,
    kind: String,
    bytes: u64,
    path: String,
    /// The newest stretch in which every moment can be restored.
    exact_since: Option<Time>,
    exact_until: Option<Time>,
    /// That stretch reaches the newest record, and somebody adds to it.
    exact_now: bool,
    exact_stretches: usize,
    gaps: usize,
    bookmarks: usize,
}

pub(crate) fn run(args: &Ls, report: &Report) -> anyhow::Result<()> {
    let mut listing = Listing {
        store: None,
        stores: Vec::new(),
        volumes: Vec::new(),
    };
    for Opened { agent, archive, .. } in args.source.open()? {
        let store = Store {
            agent: agent.clone(),
            path: args.source.from.to_string(),
            uuid: archive.uuid().to_string(),
            live: archive
                .writer_alive()
                .context("ask whether an agent is running")?,
            log_bytes: archive.log_bytes()?,
            records: archive.head().map_or(0, |head| head.seq.get()),
            covered_until: archive.covered_until().map(Time),
        };
        listing.volumes.extend(volumes(&*archive, &agent, store.live)?);
        match agent {
            None => listing.store = Some(store),
            Some(_) => listing.stores.push(store),
        }
    }
    if args.json {
        report.json(&listing)
    } else {
        report.out(text(&listing))
    }
}

fn volumes(store: &dyn Archive, agent: &Option<String>, live: bool) -> anyhow::Result<Vec<Volume>> {
    let mut volumes = Vec::new();
    for info in store.volumes()? {
        let history = store.history(info.id)?;
        volumes.extend(history.map(|history| Volume::new(agent.clone(), history, live)));
    }
    Ok(volumes)
}

impl Volume {
    fn new(agent: Option<String>, history: History, live: bool) -> Self {
        let newest = history.exact.last();
        Volume {
            agent,
            kind: history.volume.kind.to_string(),
            bytes: history.volume.bytes,
            exact_since: newest.map(|stretch| Time(stretch.from)),
            exact_until: newest.map(|stretch| Time(stretch.to)),
            exact_now: live && newest.is_some_and(|stretch| stretch.open),
            exact_stretches: history.exact.len(),
            gaps: history.gaps.len(),
            bookmarks: history.bookmarks.len(),
            name: history.volume.name,
            path: history.volume.path,
        }
    }

    /// As it is named on the command line.
    fn qualified(&self) -> String {
        match &self.agent {
            Some(agent) => format!("{agent}/{}", self.name),
            None => self.name.clone(),
        }
    }
}

impl Store {
    fn line(&self) -> String {
        let name = self.agent.as_ref().unwrap_or(&self.path);
        let mut line = format!(
            "{name}: {} in {} of log",
            count(self.records, "record"),
            Bytes(self.log_bytes)
        );
        if let Some(until) = self.covered_until {
            line.push_str(&format!(", until {until}"));
        }
        line.push_str(if self.live {
            ", an agent is writing to it\n"
        } else {
            ", no agent is writing to it\n"
        });
        line
    }
}

fn text(listing: &Listing) -> String {
    let mut text: String = listing
        .store
        .iter()
        .chain(&listing.stores)
        .map(Store::line)
        .collect();
    if listing.volumes.is_empty() {
        return text + "no volumes yet\n";
    }
    text.push('\n');
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
            volume.qualified(),
            volume.kind.clone(),
            Bytes(volume.bytes).to_string(),
            time(volume.exact_since),
            time(volume.exact_until),
            volume.gaps.to_string(),
            volume.path.clone(),
        ]
    }));
    text + &table(&rows)
}

#[cfg(test)]
mod tests {
    use cdp_journal::WallNs;

    use super::*;

    fn listing(volumes: Vec<Volume>) -> Listing {
        let store = Store {
            agent: None,
            path: "/var/lib/cdp".to_owned(),
            uuid: "u".to_owned(),
            live: true,
            log_bytes: 3 << 20,
            records: 7,
            covered_until: Some(Time(WallNs(0))),
        };
        Listing {
            store: Some(store),
            stores: Vec::new(),
            volumes,
        }
    }

    #[test]
    fn an_empty_store_says_so() {
        assert!(text(&listing(Vec::new())).ends_with("an agent is writing to it\nno volumes yet\n"));
    }

    #[test]
    fn a_volume_is_one_row_under_its_title() {
        let volume = Volume {
            agent: None,
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
