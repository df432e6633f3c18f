//! The commands, and what they share: opening a store, finding a volume, naming a moment.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, bail};
use cdp_journal::Seq;
use cdp_journal::format::{GapCause, VolumeKind};
use cdp_journal::history::VolumeInfo;
use cdp_journal::store::Archive;
use cdp_journal::view::View;
use cdp_journal::when::{NotExact, NotExactCause, Point, When, WhenError};

use crate::args::{From, LayerBounds};
use crate::disk::Layer;
use crate::source::{Opened, Source};
use crate::time::Time;

pub(crate) mod bisect;
pub(crate) mod completions;
pub(crate) mod diff;
pub(crate) mod enroll;
pub(crate) mod files;
pub(crate) mod find;
mod find_files;
mod gap;
pub(crate) mod image;
pub(crate) mod ls;
pub(crate) mod mount;
pub(crate) mod nbd;
mod overwrite;
mod peek;
pub(crate) mod points;
pub(crate) mod rewind;
pub(crate) mod verify;

/// Of the index of a store that is read at random: a history of some ten million writes.
const INDEX_AHEAD_BYTES_MAX: u64 = 256 << 20;
/// It begins when the file system is mounted, most likely: the few blocks that takes are had sooner without it.
const INDEX_AHEAD_AFTER: Duration = Duration::from_millis(200);

/// Something that was read does not match its checksum; where it lies has been printed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Damaged(String);

/// A moment of a volume that can be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instant {
    /// Last record that belongs to it.
    pub(crate) seq: Seq,
    /// The time asked for, or the time of that record.
    pub(crate) at: Time,
}

impl fmt::Display for Instant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (seq:{})", self.at, self.seq)
    }
}

/// Opens the store that holds the volume of that name: `VOLUME`, or `AGENT/VOLUME` where a server has several of them.
fn open_volume(source: &From, name: &str) -> anyhow::Result<(Box<dyn Archive>, VolumeInfo)> {
    find_volume(source, name).map(|(opened, volume)| (opened.archive, volume))
}

/// The same of a block volume.
fn open_block_volume(
    source: &From,
    name: &str,
    command: &str,
) -> anyhow::Result<(Box<dyn Archive>, VolumeInfo)> {
    let (store, volume) = open_volume(source, name)?;
    require_block(&volume, command)?;
    Ok((store, volume))
}

fn find_volume(source: &From, name: &str) -> anyhow::Result<(Opened, VolumeInfo)> {
    let from = &source.from;
    let (agent, volume) = match name.split_once('/') {
        Some((agent, volume)) => (Some(agent), volume),
        None => (None, name),
    };
    let (mut found, mut names) = (Vec::new(), Vec::new());
    for opened in source.open()? {
        let volumes = opened.archive.volumes()?;
        names.extend(volumes.iter().map(|volume| opened.qualified(&volume.name)));
        let is_meant = match agent {
            Some(_) => opened.agent.as_deref() == agent,
            None => opened.is_newest,
        };
        let of_name = volumes.into_iter().rfind(|found| found.name == volume);
        if let Some(info) = of_name.filter(|_| is_meant) {
            found.push((opened, info));
        }
    }
    let several: Vec<_> = found
        .iter()
        .map(|(opened, info)| opened.qualified(&info.name))
        .collect();
    match (found.pop(), several.as_slice()) {
        (Some(found), [_]) => Ok(found),
        (Some(_), several) => bail!(
            "{from} has the volume {name:?} of several agents; give one of {}",
            several.join(", ")
        ),
        (None, _) if names.is_empty() => {
            bail!("no volume {name:?} in {from}: nothing was captured there yet")
        }
        (None, _) => bail!("no volume {name:?} in {from}; there is {}", names.join(", ")),
    }
}

/// Refuses volumes that are not block devices.
fn require_block(volume: &VolumeInfo, command: &str) -> anyhow::Result<()> {
    if volume.kind != VolumeKind::Block {
        bail!(
            "{} is a {} volume, and `{command}` is for block volumes",
            volume.name,
            volume.kind
        );
    }
    Ok(())
}

/// Finds the moment that `when` names, if it can be restored exactly.
fn resolve(store: &dyn Archive, volume: &VolumeInfo, when: &When) -> anyhow::Result<Instant> {
    let moment = match store.resolve(volume.id, when) {
        Ok(moment) => moment,
        Err(WhenError::NotExact(inner)) => {
            let (volume, when) = (volume.name.clone(), when.clone());
            return Err(NotExactHere {
                volume,
                when,
                inner: *inner,
            }
            .into());
        }
        Err(error) => return Err(error.into()),
    };
    let seq = moment
        .seq
        .with_context(|| format!("{when} lies before the first record"))?;
    Ok(Instant {
        seq,
        at: Time(moment.wall),
    })
}

/// A block volume at a moment that can be restored.
struct OpenMoment {
    store: Box<dyn Archive>,
    volume: VolumeInfo,
    instant: Instant,
    view: View,
}

/// Opens what a command was asked for.
fn open_moment(source: &From, volume: &str, when: &When, command: &str) -> anyhow::Result<OpenMoment> {
    let (store, volume) = open_block_volume(source, volume, command)?;
    let instant = resolve(&*store, &volume, when)?;
    let view = store.view(volume.id, instant.seq)?;
    Ok(OpenMoment {
        store,
        volume,
        instant,
        view,
    })
}

/// Reads the index from its disk while who serves a moment gets ready: what is asked for at random then costs one read of
/// the disk each. Ends when it is dropped.
struct IndexAhead {
    goes_on: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl IndexAhead {
    fn start(view: &View) -> Self {
        let view = view.clone();
        let (goes_on, dropped) = mpsc::channel();
        let read = move || {
            if dropped.recv_timeout(INDEX_AHEAD_AFTER) == Err(RecvTimeoutError::Timeout) {
                let goes_on = || dropped.try_recv() == Err(TryRecvError::Empty);
                view.read_index_ahead(INDEX_AHEAD_BYTES_MAX, goes_on);
            }
        };
        // It only saves time: without it all is served as well.
        let thread = thread::Builder::new().name("index-ahead".into()).spawn(read);
        Self {
            goes_on: Some(goes_on),
            thread: thread.ok(),
        }
    }
}

impl Drop for IndexAhead {
    fn drop(&mut self) {
        self.goes_on = None;
        // It holds the index open, which leaves files behind where a process ends without closing it.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Refuses to write where the store's own files lie.
fn refuse_own_files(to: &Path, source: &Source) -> anyhow::Result<()> {
    let Some(store) = source.folder() else {
        return Ok(());
    };
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let real = to.canonicalize().or_else(|_| parent.canonicalize());
    let inside = |path: PathBuf| store.canonicalize().is_ok_and(|store| path.starts_with(store));
    if real.is_ok_and(inside) {
        bail!(
            "{} lies inside the store {}; give a place outside of it",
            to.display(),
            store.display()
        );
    }
    Ok(())
}

impl LayerBounds {
    /// A layer within these bounds for a disk of `disk_bytes`.
    fn make(&self, source: &Source, disk_bytes: u64) -> anyhow::Result<Layer> {
        let folder = &self.layer_dir;
        refuse_own_files(folder, source)?;
        Layer::new(folder, disk_bytes, self.layer_bytes_max).with_context(|| {
            format!(
                "make a throw-away layer in {}; --layer-dir names another folder",
                folder.display()
            )
        })
    }
}

/// A moment of a volume cannot be restored exactly: why, and what can be instead.
#[derive(Debug)]
pub(crate) struct NotExactHere {
    volume: String,
    when: When,
    inner: NotExact,
}

impl std::error::Error for NotExactHere {}

impl fmt::Display for NotExactHere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NotExact {
            moment,
            cause,
            gap,
            before,
            after,
        } = &self.inner;
        let found = match moment.seq {
            Some(seq) if !moment.by_time => format!("seq:{seq}"),
            _ => Time(moment.wall).to_string(),
        };
        write!(f, "{} cannot be restored exactly at {found}", self.volume)?;
        // A relative time or a label says more to who typed it than what it was found to be.
        if matches!(self.when, When::Latest | When::Ago(_) | When::Bookmark(_)) {
            write!(f, " ({})", self.when)?;
        }
        match cause {
            NotExactCause::Gap(GapCause::Seeding) => write!(f, ": {}", explain(GapCause::Seeding))?,
            NotExactCause::Gap(cause) => {
                write!(f, ": gap {cause} ({})", explain(*cause))?;
                if let Some(from) = gap.0 {
                    write!(f, " from {}", Time(from))?;
                }
                match gap.1 {
                    Some(to) => write!(f, " to {}", Time(to))?,
                    None => write!(f, ", still open")?,
                }
            }
            NotExactCause::BeforeHistory => write!(f, ": history begins later")?,
            NotExactCause::AfterHistory {
                covered_until: Some(until),
            } => {
                write!(
                    f,
                    ": what is here ends at {}, and no agent adds to it now",
                    Time(*until)
                )?;
            }
            NotExactCause::AfterHistory { covered_until: None } => write!(f, ": nothing was captured yet")?,
        }
        let paste = |point: &Option<Point>| match point {
            Some(point) => format!("--at {} or --at seq:{}", Time(point.wall), point.seq),
            None => "none".to_owned(),
        };
        write!(
            f,
            "\n  nearest exact moment before: {}\n  nearest exact moment after:  {}",
            paste(before),
            paste(after)
        )
    }
}

/// A gap's cause in plain words.
fn explain(cause: GapCause) -> &'static str {
    match cause {
        GapCause::Seeding => "its first copy was not complete",
        GapCause::RingOverflow => "writes came faster than they could be taken",
        GapCause::AgentDown => "no agent watched the volume",
        GapCause::Detached => "its device had gone away, or was another one",
        GapCause::Reboot => "the host was restarted",
        GapCause::IoError => "the device failed a write",
        GapCause::SpoolFull => "the store was full",
        GapCause::LogHole => "records are missing from the log",
        GapCause::Resized => {
            "the volume was found to have another size, and may have been written to beyond its end"
        }
        GapCause::ChangedInFlight => {
            "more was changed while it was written than could be compared with the device"
        }
    }
}

/// A file's name may hold what moves a terminal's cursor, or breaks a line.
fn shown(text: &str) -> String {
    let escaped = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(escaped).collect()
}

/// Rows as columns of equal width, two blanks between them; the last column is not padded. Control characters are escaped.
fn table(rows: &[Vec<String>]) -> String {
    let escaped = |row: &Vec<String>| row.iter().map(|cell| shown(cell)).collect::<Vec<_>>();
    let rows: Vec<_> = rows.iter().map(escaped).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
