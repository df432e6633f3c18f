//! Deltas that are not what they say, and what it takes to read those that are.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use uuid::Uuid;

use super::{Blocks, CopyOptions, GroupName, GroupPlace, Item, PlacedGroup, SegmentBytes, Sink, View};

use crate::error::ReadError;
use crate::format::{
    Body, DELTA_DEPTH_MAX, DeltaCache, FrameBuilder, Origin, RecordFlags, SealedFrame, VolumeKind,
    with_raw_group,
};
use crate::index::BlockVersion;
use crate::store::{StoreReader, StoreWriter, WriterOptions};
use crate::types::{BootNs, Seq, VolumeId};

const BLOCK: usize = 4096;

/// A frame of writes, each of a whole block of volume 1.
fn frame(first: Seq, cache: &mut DeltaCache, writes: &[(u64, &[u8])]) -> SealedFrame {
    let mut frame = FrameBuilder::new(first);
    let mut push = |body: Body, data: &[u8]| {
        let (origin, flags) = (Origin::default(), RecordFlags::default());
        frame
            .push(BootNs(1), VolumeId::new(1), origin, flags, body, &[data])
            .unwrap();
    };
    if first == Seq::FIRST {
        let (name, path) = ("pg".to_owned(), "/dev/vdb".to_owned());
        push(
            Body::Volume {
                kind: VolumeKind::Block,
                bytes: 1 << 20,
                name,
                path,
            },
            &[],
        );
    }
    for (block, data) in writes {
        let (offset, len) = (block * BLOCK as u64, data.len() as u64);
        push(Body::Write { offset, len }, data);
    }
    frame.seal_with(cache, Uuid::nil(), 0).unwrap()
}

/// Goal: a delta that names a wrong base, or none, is an error that says so, and never other bytes. Method: a store whose
/// last frame was changed by somebody who gets all checksums of frame and group right.
#[test]
fn a_delta_of_a_wrong_base_is_damage_and_never_bytes() {
    let content = |edit: u8| {
        let mut block: Vec<u8> = (0..BLOCK).map(|at| (at / 50) as u8).collect();
        block[7..60].fill(edit);
        // What no patch between the others changes.
        block[3000] = u8::from(edit == 2);
        block
    };
    // Where a field of the first entry of the last frame's directory lies.
    const DEPTH: usize = 5;
    const SECTOR: usize = 6;
    const FRAMES_BACK: usize = 8;
    const GROUP: usize = 12;
    const CRC: usize = 16;
    let hostile: [(&str, usize, u8, &str); 9] = [
        ("nothing is changed", 4, 2, ""),
        (
            "another block of the same frame",
            SECTOR,
            8,
            "does not fit its base",
        ),
        (
            "half of one block and half of another",
            SECTOR,
            4,
            "does not fit its base",
        ),
        ("beyond the group", SECTOR, 250, "is no block"),
        ("a frame that is none", FRAMES_BACK, 2, "base is missing"),
        ("before the first frame", FRAMES_BACK + 1, 9, "base is missing"),
        ("no group", GROUP, 8, "checksum"),
        ("a base as deep as the delta", DEPTH, 1, "does not end"),
        ("another content", CRC, 0x5a, "does not fit its base"),
    ];
    for (what, at, byte, expected) in hostile {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = StoreWriter::open(dir.path(), &WriterOptions::default()).unwrap();
        let (mut log, mut index) = store.split();
        let mut cache = DeltaCache::new(1 << 20);
        let first = frame(Seq::FIRST, &mut cache, &[(1, &content(1)), (2, &content(2))]);
        let second = frame(first.last_seq().next(), &mut cache, &[(1, &content(3))]);
        let mut last = frame(second.last_seq().next(), &mut cache, &[(1, &content(4))]);
        if what != "a base as deep as the delta" {
            // Of the first frame, not of a delta.
            let mut cache = DeltaCache::new(1 << 20);
            frame(Seq::FIRST, &mut cache, &[(1, &content(1)), (2, &content(2))]);
            last = frame(second.first_seq(), &mut cache, &[(1, &content(4))]);
        }
        let is_good = what == "nothing is changed";
        let bytes = with_raw_group(&last, |raw| {
            assert!(is_good || raw[at] != byte, "{what}");
            raw[at] = byte;
        });
        let last = SealedFrame::check(bytes).unwrap();
        let frames = if last.first_seq() == second.first_seq() {
            vec![first, last]
        } else {
            vec![first, second, last]
        };
        let mut seq = Seq::FIRST;
        for frame in &frames {
            let location = log.append(frame).unwrap();
            log.sync().unwrap();
            index.apply(frame.head(), &location).unwrap();
            seq = frame.last_seq();
        }
        let reader = StoreReader::open(dir.path()).unwrap();
        let mut found = vec![0; BLOCK];
        let read = reader
            .view(VolumeId::new(1).unwrap(), seq)
            .unwrap()
            .read_at(BLOCK as u64, &mut found);
        let report = reader.verify_log(&mut |_| {}).unwrap();
        if is_good {
            read.unwrap();
            assert_eq!(found, content(4));
            assert_eq!(report.damages, []);
            continue;
        }
        match read.unwrap_err() {
            ReadError::Damaged { what: told, .. } => assert!(told.contains(expected), "{what}: {told}"),
            error => panic!("{what}: {error}"),
        }
        let [damage] = &report.damages[..] else {
            panic!("{what}: {:?}", report.damages)
        };
        assert!(damage.what.contains(expected), "{what}: {damage:?}");
        // What does not need it is served.
        reader
            .view(VolumeId::new(1).unwrap(), seq)
            .unwrap()
            .read_at(2 * BLOCK as u64, &mut found)
            .unwrap();
        assert_eq!(found, content(2));
    }
}

/// Counts what is asked for groups.
#[derive(Debug)]
struct Counting {
    store: Arc<dyn Blocks>,
    questions: AtomicUsize,
}

impl Blocks for Counting {
    fn plan(
        &self,
        volume: VolumeId,
        seq: Seq,
        range: Range<u64>,
        visit: &mut dyn FnMut(Item),
    ) -> Result<(), ReadError> {
        self.store.plan(volume, seq, range, visit)
    }

    fn versions(
        &self,
        volume: VolumeId,
        seq: Option<Seq>,
        blocks: Range<u64>,
        out: &mut Vec<BlockVersion>,
    ) -> Result<(), ReadError> {
        self.store.versions(volume, seq, blocks, out)
    }

    fn groups(&self, names: &[GroupName]) -> Result<Vec<Option<PlacedGroup>>, ReadError> {
        self.questions.fetch_add(1, Ordering::Relaxed);
        self.store.groups(names)
    }

    fn segment_bytes(&self, segment: u64) -> Result<Arc<dyn SegmentBytes>, ReadError> {
        self.store.segment_bytes(segment)
    }

    fn damage(&self, place: &GroupPlace, what: &str) -> ReadError {
        self.store.damage(place, what)
    }
}

struct Memory(Mutex<Vec<u8>>);

impl Sink for Memory {
    fn write_at(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.0.lock()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
        Ok(())
    }
}

/// Goal: over a network, a read waits once for each step of its deltas, not for each of them. Method: many blocks with
/// chains as long as they get; count the questions.
#[test]
fn deltas_are_walked_together() {
    const BLOCKS: usize = 50;
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = StoreWriter::open(dir.path(), &WriterOptions::default()).unwrap();
    let (mut log, mut index) = store.split();
    let mut cache = DeltaCache::new(1 << 20);
    let mut contents: Vec<Vec<u8>> = (0..BLOCKS)
        .map(|block| (0..BLOCK).map(|at| (at / 9 * block) as u8).collect())
        .collect();
    let mut seq = None;
    for step in 0..=DELTA_DEPTH_MAX {
        for content in &mut contents {
            content[usize::from(step) * 100] ^= 0x55;
        }
        let writes: Vec<_> = (0..).zip(contents.iter().map(Vec::as_slice)).collect();
        let frame = frame(seq.map_or(Seq::FIRST, Seq::next), &mut cache, &writes);
        let location = log.append(&frame).unwrap();
        log.sync().unwrap();
        index.apply(frame.head(), &location).unwrap();
        seq = Some(frame.last_seq());
    }
    assert_eq!(cache.counts().patched, u64::from(DELTA_DEPTH_MAX) * BLOCKS as u64);
    let reader = StoreReader::open(dir.path()).unwrap();
    let view = reader.view(VolumeId::new(1).unwrap(), seq.unwrap()).unwrap();
    let counting = Arc::new(Counting {
        store: view.store,
        questions: AtomicUsize::new(0),
    });
    let view = View::new(Arc::clone(&counting) as _, view.volume, view.seq, view.bytes);
    let mut found = vec![0; BLOCKS * BLOCK];
    view.read_at(0, &mut found).unwrap();
    assert!(found == contents.concat());
    let questions = counting.questions.swap(0, Ordering::Relaxed);
    assert_eq!(questions, 1 + usize::from(DELTA_DEPTH_MAX));
    let copied = Memory(Mutex::new(vec![0; 1 << 20]));
    view.copy_to(&copied, &CopyOptions::default(), &|_| {}).unwrap();
    assert!(copied.0.lock()[..found.len()] == found);
    // A copy reads the groups of its plan by itself.
    let questions = counting.questions.swap(0, Ordering::Relaxed);
    assert_eq!(questions, usize::from(DELTA_DEPTH_MAX));
}
