//! What the tests share.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use cdp_journal::format::{
    Body, DeltaCache, FrameBuilder, Origin, Packing, PushError, RecordFlags, SealedFrame, VolumeKind,
};
use cdp_journal::index::IndexWriter;
use cdp_journal::log::LogWriter;
use cdp_journal::store::{Recovered, StoreWriter, WriterOptions};
use cdp_journal::view::Sink;
use cdp_journal::{BootNs, Seq, VolumeId};
use parking_lot::Mutex;
use uuid::Uuid;

/// The volume that most tests write to.
pub(crate) fn volume() -> VolumeId {
    VolumeId::new(1).unwrap()
}

/// Boot id of all frames.
pub(crate) const BOOT: Uuid = Uuid::from_bytes([8; 16]);

/// A store with a frame being filled.
pub(crate) struct Writer {
    pub(crate) log: LogWriter,
    pub(crate) index: IndexWriter,
    pub(crate) recovered: Recovered,
    frame: Option<FrameBuilder>,
    pub(crate) boot_ns: u64,
    pub(crate) wall_offset_ns: i64,
    /// What deltas are made against; a test may give it another.
    pub(crate) cache: DeltaCache,
    /// Appended and not yet applied.
    unapplied: Vec<(SealedFrame, cdp_journal::log::FrameLocation)>,
}

impl Writer {
    pub(crate) fn open(dir: &Path) -> Self {
        Self::open_with(
            dir,
            &WriterOptions {
                segment_bytes_max: 1 << 20,
                ..WriterOptions::default()
            },
        )
    }

    pub(crate) fn open_with(dir: &Path, options: &WriterOptions) -> Self {
        let (store, recovered) = StoreWriter::open(dir, options).unwrap();
        let (log, index) = store.split();
        Self {
            log,
            index,
            recovered,
            frame: None,
            boot_ns: 1_000,
            wall_offset_ns: 0,
            cache: DeltaCache::new(1 << 20),
            unapplied: Vec::new(),
        }
    }

    /// Adds a record; a full frame is appended first. Every record is a microsecond later than the last.
    pub(crate) fn push(&mut self, body: Body, data: &[u8]) -> Seq {
        self.push_to(Some(volume()), body, data)
    }

    pub(crate) fn push_to(&mut self, volume: Option<VolumeId>, body: Body, data: &[u8]) -> Seq {
        self.boot_ns += 1_000;
        loop {
            let next = self.log.next_seq();
            let frame = self.frame.get_or_insert_with(|| FrameBuilder::new(next));
            let (origin, flags) = (Origin::default(), RecordFlags::default());
            match frame.push(BootNs(self.boot_ns), volume, origin, flags, body.clone(), &[data]) {
                Ok(seq) => return seq,
                Err(PushError::Full) => self.append(),
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Declares the volume of most tests and ends its seeding.
    pub(crate) fn declare(&mut self, bytes: u64) -> Seq {
        let (name, path) = ("pg".to_owned(), "/dev/vdb".to_owned());
        self.push(
            Body::Volume {
                kind: VolumeKind::Block,
                bytes,
                name,
                path,
            },
            &[],
        );
        self.push(Body::GapClose, &[])
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Seq {
        self.push(
            Body::Write {
                offset,
                len: data.len() as u64,
            },
            data,
        )
    }

    /// A frame that is encoded and never appended.
    pub(crate) fn void(&mut self, offset: u64, data: &[u8]) {
        self.append();
        let mut frame = FrameBuilder::new(self.log.next_seq());
        let len = data.len() as u64;
        let (origin, flags) = (Origin::default(), RecordFlags::default());
        let body = Body::Write { offset, len };
        frame
            .push(BootNs(self.boot_ns), Some(volume()), origin, flags, body, &[data])
            .unwrap();
        frame.seal_with(&mut self.cache, BOOT, self.wall_offset_ns);
    }

    /// Ends the frame and appends it.
    pub(crate) fn append(&mut self) {
        let Some(frame) = self.frame.take() else { return };
        let packings = [Packing::Plain, Packing::Quick, Packing::Dense];
        self.cache.pack(packings[self.unapplied.len() % packings.len()]);
        let Some(sealed) = frame.seal_with(&mut self.cache, BOOT, self.wall_offset_ns) else {
            return;
        };
        let location = self.log.append(&sealed).unwrap();
        self.unapplied.push((sealed, location));
    }

    pub(crate) fn sync(&mut self) {
        self.append();
        self.log.sync().unwrap();
    }

    pub(crate) fn apply(&mut self) {
        self.sync();
        for (frame, location) in self.unapplied.drain(..) {
            self.index.apply(frame.bytes(), &location).unwrap();
        }
    }

    pub(crate) fn flush(&mut self) {
        self.apply();
        self.index.flush().unwrap();
    }
}

/// Bytes that are never equal to those of another number.
pub(crate) fn bytes_of(number: u64, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (number.wrapping_mul(31) + (at as u64 / 512) * 7 + at as u64) as u8 | 1)
        .collect()
}

/// The same, of which nothing can be left out.
pub(crate) fn noise_of(number: u64, len: usize) -> Vec<u8> {
    let mut state = number + 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A target in memory.
#[derive(Default)]
pub(crate) struct MemorySink(pub(crate) Mutex<Vec<u8>>);

impl Sink for MemorySink {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut bytes = self.0.lock();
        let end = offset as usize + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0xee);
        }
        bytes[offset as usize..end].copy_from_slice(data);
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(offset, &vec![0; len as usize])
    }
}

/// Every file below a folder with its length and times: what a reader must not change.
pub(crate) fn listing(dir: &Path) -> BTreeMap<std::path::PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = path.symlink_metadata().unwrap();
        let written = meta.modified().unwrap();
        found.insert(path.clone(), format!("{} {written:?}", meta.len()));
        if meta.is_dir() {
            found.extend(listing(&path));
        }
    }
    found
}
