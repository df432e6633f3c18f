//! A store that the test writes to itself, by the code that the agent uses, so that segments can be small and the index
//! is flushed often; and the check that a power cut left all of it that had been durable.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cdp_journal::format::{Body, FrameBuilder, Origin, RecordFlags, SealedFrame, VolumeKind};
use cdp_journal::index::IndexWriter;
use cdp_journal::log::{FrameLocation, LogWriter};
use cdp_journal::store::{Recovered, StoreReader, StoreWriter, WriterOptions};
use cdp_journal::view::View;
use cdp_journal::{SECTOR_BYTES, Seq, VolumeId};
use cdp_tests::process::poll_until;
use cdp_tests::rng::Rng;
use uuid::Uuid;

use crate::examine::Found;
use crate::model::{Log, Replay, Report, Write, boot_now};

/// The volume in the store.
pub(crate) const VOLUME: VolumeId = VolumeId::new(1).expect("not 0");
/// Its size.
pub(crate) const VOLUME_BYTES: u64 = 1 << 20;
/// The volume's declaration and the end of its gap come before the first write.
const FIRST_WRITE: u64 = 3;
/// Appends, syncs and so on of [`run`].
const ROUNDS: u64 = 256;
/// How seldom a store is written to after it was checked, and checked again.
const GOES_ON_ONE_IN: u64 = 4;
const BOOT: Uuid = Uuid::from_bytes([8; 16]);

fn options() -> WriterOptions {
    WriterOptions {
        segment_bytes_max: 192 << 10,
        store_bytes_max: None,
        free_bytes_min: 1 << 20,
    }
}

/// Where the index lies in a store.
pub(crate) fn index_dir(store: &Path) -> PathBuf {
    store.join("index")
}

/// How many files of `dir` end with `suffix`.
pub(crate) fn count(dir: &Path, suffix: &str) -> Result<usize> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    let names = entries.flatten().map(|entry| entry.file_name());
    Ok(names
        .filter(|name| name.to_string_lossy().ends_with(suffix))
        .count())
}

/// How many writes the records up to `seq` tell of.
fn writes_by(seq: Seq) -> usize {
    (seq.next().get().saturating_sub(FIRST_WRITE)) as usize
}

/// The store, open.
pub(crate) struct Store {
    log: LogWriter,
    index: IndexWriter,
    unapplied: Vec<(SealedFrame, FrameLocation)>,
    flushes: usize,
}

impl Store {
    /// Opens it, or makes one.
    pub(crate) fn open(dir: &Path) -> Result<(Store, Recovered)> {
        let (store, recovered) = StoreWriter::open(dir, &options()).context("open the second store")?;
        let (log, index) = store.split();
        let store = Store {
            log,
            index,
            unapplied: Vec::new(),
            flushes: 0,
        };
        Ok((store, recovered))
    }

    fn push(frame: &mut FrameBuilder, body: Body, data: &[u8]) -> Result<()> {
        let (origin, flags) = (Origin::default(), RecordFlags::default());
        frame.push(boot_now(), Some(VOLUME), origin, flags, body, &[data])?;
        Ok(())
    }

    fn append(&mut self, frame: FrameBuilder) -> Result<()> {
        let sealed = frame.seal(BOOT, 0).context("a frame with records")?;
        let location = self.log.append(&sealed)?;
        self.unapplied.push((sealed, location));
        Ok(())
    }

    fn append_writes(&mut self, writes: &[Write]) -> Result<()> {
        let mut frame = FrameBuilder::new(self.log.next_seq());
        for write in writes {
            let (offset, len) = (write.offset, write.bytes.len() as u64);
            Store::push(&mut frame, Body::Write { offset, len }, &write.bytes)?;
        }
        self.append(frame)
    }

    /// Gives the index what is durable, as the agent does.
    fn apply(&mut self) -> Result<()> {
        let durable = self.log.durable();
        let count = self
            .unapplied
            .iter()
            .take_while(|(frame, _)| Some(frame.last_seq()) <= durable)
            .count();
        for (frame, location) in self.unapplied.drain(..count) {
            self.index.apply(frame.bytes(), &location)?;
        }
        Ok(())
    }

    /// Opens it once more, for writing and then for reading.
    fn reopened(self, dir: &Path) -> Result<StoreReader> {
        drop(self);
        let (store, recovered) = Store::open(dir).context("when it had gone on")?;
        let rebuilt = recovered.index_rebuilt;
        ensure!(
            rebuilt.is_none(),
            "the index was lost when it had gone on: {rebuilt:?}"
        );
        drop(store);
        StoreReader::open(dir).context("open the second store for reading when it had gone on")
    }

    /// Appends a record that changes nothing, and brings it into the index. Then opens the store for reading.
    pub(crate) fn go_on(mut self, dir: &Path) -> Result<StoreReader> {
        let mut frame = FrameBuilder::new(self.log.next_seq());
        let (origin, flags) = (Origin::default(), RecordFlags::default());
        frame.push(boot_now(), None, origin, flags, Body::Tick, &[])?;
        self.append(frame)?;
        self.log.sync()?;
        self.flush_index()?;
        self.reopened(dir)
    }

    fn flush_index(&mut self) -> Result<()> {
        self.apply()?;
        self.flushes += 1;
        Ok(self.index.flush()?)
    }
}

/// Writes to a new store in `dir` until segments were finished, the index was flushed and its files were merged, many
/// times over.
pub(crate) fn run(dir: &Path, rng: &mut Rng) -> Result<Log> {
    let mut log = Log::default();
    let (mut store, _) = Store::open(dir)?;
    let mut frame = FrameBuilder::new(store.log.next_seq());
    let (kind, bytes) = (VolumeKind::Block, VOLUME_BYTES);
    let (name, path) = ("second".to_owned(), "/dev/second".to_owned());
    Store::push(
        &mut frame,
        Body::Volume {
            kind,
            bytes,
            name,
            path,
        },
        &[],
    )?;
    Store::push(&mut frame, Body::GapClose, &[])?;
    store.append(frame)?;
    let mut flushes = 0;
    for round in 0..ROUNDS {
        let writes = random_writes(rng);
        log.writes.extend_from_slice(&writes);
        store.append_writes(&writes)?;
        // A finished segment is durable without being asked for.
        let mut durable = store.log.durable();
        if !rng.one_in(3) {
            durable = store.log.sync()?;
        }
        if let Some(seq) = durable
            && log.reports.last().is_none_or(|report| report.seq < seq)
        {
            log.durable(seq, writes_by(seq));
        }
        store.apply()?;
        if rng.one_in(4) {
            store.flush_index()?;
        }
        if round % 64 == 63 {
            flushes += store.flushes;
            drop(store);
            store = Store::open(dir)?.0;
        }
    }
    store.log.sync()?;
    store.flush_index()?;
    flushes += store.flushes;
    poll_until("files of the index to be merged", Duration::from_secs(60), || {
        Ok((count(&index_dir(dir), ".sst")? < flushes.min(14)).then_some(()))
    })?;
    let segments = count(&dir.join("log"), "")?;
    ensure!(
        segments >= 10 && flushes >= 30,
        "only {segments} segments and {flushes} flushes"
    );
    Ok(log)
}

/// Mostly a few small ones; sometimes so many bytes that they go to the disk past the page cache.
fn random_writes(rng: &mut Rng) -> Vec<Write> {
    let (count, sectors_max) = if rng.one_in(24) {
        (3, 128)
    } else {
        (rng.between(1, 4), 16)
    };
    let random = |_| {
        let len = rng.between(1, sectors_max) * SECTOR_BYTES;
        let offset = rng.below((VOLUME_BYTES - len) / SECTOR_BYTES) * SECTOR_BYTES;
        Write::random(rng, offset, len)
    };
    (0..count).map(random).collect()
}

/// Checks the store in `dir` after a power cut: it opens, also for who only reads; it holds all that was reported; and
/// what it holds is what was written, at its end and at a random moment before. Now and then writes to it as well.
pub(crate) fn check(
    dir: &Path,
    reported: Option<&Report>,
    replay: &mut Replay<'_>,
    rng: &mut Rng,
) -> Result<Found> {
    let durable = reported.map(|report| report.seq);
    if let Some(durable) = durable {
        let reader = StoreReader::open(dir).context("open the second store for reading")?;
        let head = reader.head().map(|head| head.seq);
        ensure!(
            head >= Some(durable),
            "who reads sees {head:?}, durable was {durable}"
        );
        let seq = Seq::new(rng.between(1, durable.get())).context("not 0")?;
        expect_same(&reader.view(VOLUME, seq)?, replay.after(writes_by(seq)))?;
    }
    let (mut store, recovered) = Store::open(dir)?;
    let found = Found::by(&recovered, durable)?;
    let Some(last) = recovered.last_seq else {
        return Ok(found);
    };
    let exact = recovered
        .volumes
        .iter()
        .all(|volume| volume.inexact.is_none() && volume.gaps == 0);
    ensure!(
        exact && recovered.volumes.len() == 1,
        "history has another form: {recovered:?}"
    );
    let mut expected = replay.after(writes_by(last)).to_vec();
    expect_same(&store.index.head_view(VOLUME)?, &expected)?;
    if rng.one_in(GOES_ON_ONE_IN) {
        let write = Write::random(rng, 0, SECTOR_BYTES);
        store.append_writes(std::slice::from_ref(&write))?;
        store.log.sync()?;
        store.flush_index()?;
        let reader = store.reopened(dir)?;
        expect_same(&reader.view(VOLUME, last)?, &expected)?;
        expected[..write.bytes.len()].copy_from_slice(&write.bytes);
        expect_same(&reader.view(VOLUME, last.next())?, &expected)?;
    }
    Ok(found)
}

/// An error if `view` holds anything else than `expected`.
pub(crate) fn expect_same(view: &View, expected: &[u8]) -> Result<()> {
    let mut found = vec![0; view.bytes() as usize];
    view.read_at(0, &mut found)?;
    let differs = found
        .iter()
        .zip(expected)
        .position(|(found, wanted)| found != wanted);
    ensure!(
        found.len() == expected.len() && differs.is_none(),
        "at seq {} the volume is not what was written ({} of {} bytes), from byte {differs:?} on",
        view.seq(),
        found.len(),
        expected.len()
    );
    Ok(())
}
