//! Goal: the view at every Seq equals a naive replay. Method: random operations go through a store in a temporary
//! folder, some applied to RocksDB and flushed, some only in the log, with reopenings in between; then every
//! moment is read in several ways and compared. proptest prints the failing case and keeps its seed.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use cdp_journal::Seq;
use cdp_journal::format::{Body, EncodedBlocks};
use cdp_journal::store::StoreReader;
use cdp_journal::view::{CopyOptions, ExtentKind, Sink, View};
use parking_lot::Mutex;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::kit::{MemorySink, Writer, bytes_of, noise_of, volume};

const SECTOR: u64 = 512;
/// 20 units and a few sectors: the last block is not a whole one.
const VOLUME_SECTORS: u64 = 20 * 128 + 3;
const VOLUME_SECTORS_MAX: u64 = 24 * 128;

#[derive(Clone, Debug)]
enum Op {
    Write {
        at: u64,
        sectors: u64,
        blank: bool,
    },
    Zero {
        at: u64,
        sectors: u64,
        discard: bool,
    },
    ReadBack {
        at: u64,
        sectors: u64,
        zero: bool,
        age: u64,
    },
    Resize {
        sectors: u64,
    },
    /// Writes what is there with a few bytes changed, or none, some times over.
    Rewrite {
        at: u64,
        sectors: u64,
        times: u64,
        same: bool,
    },
    /// A frame that is encoded and does not come into the log, because that is full.
    Void {
        at: u64,
        sectors: u64,
    },
    EndFrame,
    Apply,
    Flush,
    Reopen,
    Refresh,
}

/// Small ranges often meet; long ones span several units.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let aligned = |step: u64, most: u64| {
        (0..VOLUME_SECTORS_MAX / step, 1..=most).prop_map(move |(at, count)| (at * step, count * step))
    };
    prop_oneof![
        4 => (0..64u64, 1..12u64),
        2 => (0..VOLUME_SECTORS_MAX, 1..300u64),
        2 => aligned(8, 40),
        2 => aligned(128, 6),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (range(), 0..8u8).prop_map(|((at, sectors), n)| Op::Write { at, sectors, blank: n == 0 }),
        2 => (range(), any::<bool>()).prop_map(|((at, sectors), discard)| Op::Zero { at, sectors, discard }),
        4 => (range(), any::<bool>(), 0..8u64)
            .prop_map(|((at, sectors), zero, age)| Op::ReadBack { at, sectors, zero, age }),
        6 => (range(), prop_oneof![4 => 1..3u64, 1 => 10..12u64], any::<bool>())
            .prop_map(|((at, sectors), times, same)| Op::Rewrite { at, sectors, times, same }),
        1 => range().prop_map(|(at, sectors)| Op::Void { at, sectors }),
        1 => (1..VOLUME_SECTORS_MAX).prop_map(|sectors| Op::Resize { sectors }),
        3 => Just(Op::EndFrame),
        2 => Just(Op::Apply),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        1 => Just(Op::Refresh),
    ]
}

/// What was done, in the order in which it counts.
#[derive(Clone)]
struct Change {
    /// A record counts at its Seq, a read-back just after the one it is valid as of.
    effective: (u64, u64),
    at: usize,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Naive {
    changes: Vec<Change>,
    /// Seq and size from there on.
    sizes: Vec<(u64, u64)>,
}

impl Naive {
    fn size_at(&self, seq: u64) -> u64 {
        self.sizes.iter().rfind(|(from, _)| *from <= seq).unwrap().1
    }

    fn image(&self, seq: u64) -> Vec<u8> {
        let mut changes: Vec<_> = self
            .changes
            .iter()
            .filter(|change| change.effective.0 <= seq)
            .collect();
        changes.sort_by_key(|change| change.effective);
        let mut image = vec![0; (VOLUME_SECTORS_MAX * SECTOR) as usize];
        for change in changes {
            image[change.at..change.at + change.bytes.len()].copy_from_slice(&change.bytes);
        }
        image.truncate(self.size_at(seq) as usize);
        image
    }
}

fn clip(at: u64, sectors: u64, size: u64) -> Option<(u64, u64)> {
    let end = (at + sectors).min(size / SECTOR);
    (at < end).then(|| (at * SECTOR, (end - at) * SECTOR))
}

/// Few bytes of each block are others.
fn changed(bytes: &[u8], number: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for block in bytes.chunks_mut(4096) {
        let at = (number * 37) as usize % block.len();
        let end = block.len().min(at + 1 + (number % 50) as usize);
        block[at..end]
            .iter_mut()
            .for_each(|byte| *byte = byte.wrapping_add(number as u8 | 1));
    }
    bytes
}

/// Replays `ops` and checks; what was encoded how is added to `counts`.
fn run(ops: &[Op], counts: &mut EncodedBlocks) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    let first = writer.declare(VOLUME_SECTORS * SECTOR).get();
    writer.sync();
    let early_reader = StoreReader::open(dir.path()).unwrap();
    let mut naive = Naive::default();
    let mut size = VOLUME_SECTORS * SECTOR;
    naive.sizes.push((0, size));
    let mut last = first;
    for (number, op) in ops.iter().enumerate() {
        let number = number as u64 + 1;
        match *op {
            Op::Write { at, sectors, blank } => {
                let Some((at, len)) = clip(at, sectors, size) else {
                    continue;
                };
                let bytes = if blank {
                    vec![0; len as usize]
                } else {
                    bytes_of(number, len as usize)
                };
                last = writer.write(at, &bytes).get();
                naive.changes.push(Change {
                    effective: (last, 0),
                    at: at as usize,
                    bytes,
                });
            }
            Op::Zero { at, sectors, discard } => {
                let Some((offset, len)) = clip(at, sectors, size) else {
                    continue;
                };
                let body = if discard {
                    Body::Discard { offset, len }
                } else {
                    Body::Zero { offset, len }
                };
                last = writer.push(body, &[]).get();
                let bytes = vec![0; len as usize];
                naive.changes.push(Change {
                    effective: (last, 0),
                    at: offset as usize,
                    bytes,
                });
            }
            Op::ReadBack {
                at,
                sectors,
                zero,
                age,
            } => {
                // Only what was inside the volume all the while can be read back.
                let as_of = last.saturating_sub(age);
                let as_of = if age == 7 { 0 } else { as_of };
                let smallest = naive
                    .sizes
                    .iter()
                    .filter(|(from, _)| *from >= as_of)
                    .map(|(_, size)| *size);
                let smallest = smallest.chain([naive.size_at(as_of), size]).min().unwrap();
                let Some((offset, len)) = clip(at, sectors, smallest) else {
                    continue;
                };
                let bytes = if zero {
                    vec![0; len as usize]
                } else {
                    bytes_of(number, len as usize)
                };
                let seq = Seq::new(as_of);
                last = if zero {
                    writer
                        .push(
                            Body::ReadBackZero {
                                offset,
                                len,
                                as_of: seq,
                            },
                            &[],
                        )
                        .get()
                } else {
                    writer
                        .push(
                            Body::ReadBack {
                                offset,
                                len,
                                as_of: seq,
                            },
                            &bytes,
                        )
                        .get()
                };
                naive.changes.push(Change {
                    effective: (as_of, last),
                    at: offset as usize,
                    bytes,
                });
            }
            Op::Resize { sectors } => {
                let bytes = sectors * SECTOR;
                last = writer.push(Body::Resize { bytes }, &[]).get();
                if bytes < size {
                    let gone = vec![0; (size - bytes) as usize];
                    naive.changes.push(Change {
                        effective: (last, 0),
                        at: bytes as usize,
                        bytes: gone,
                    });
                }
                size = bytes;
                naive.sizes.push((last, size));
            }
            Op::Rewrite {
                at,
                sectors,
                times,
                same,
            } => {
                let Some((offset, len)) = clip(at, sectors, size) else {
                    continue;
                };
                let mut bytes = naive.image(last)[offset as usize..(offset + len) as usize].to_vec();
                for time in 0..times {
                    if !same {
                        bytes = changed(&bytes, number + time);
                    }
                    last = writer.write(offset, &bytes).get();
                    naive.changes.push(Change {
                        effective: (last, 0),
                        at: offset as usize,
                        bytes: bytes.clone(),
                    });
                }
            }
            Op::Void { at, sectors } => {
                if let Some((offset, len)) = clip(at, sectors, size) {
                    let bytes = naive.image(last)[offset as usize..(offset + len) as usize].to_vec();
                    writer.void(offset, &changed(&bytes, number));
                }
            }
            Op::EndFrame => writer.append(),
            Op::Apply => writer.apply(),
            Op::Flush => writer.flush(),
            Op::Refresh => early_reader.refresh().unwrap(),
            Op::Reopen => {
                writer.sync();
                add(counts, &writer);
                let boot_ns = writer.boot_ns;
                drop(writer);
                writer = Writer::open(dir.path());
                writer.boot_ns = boot_ns;
                prop_assert!(writer.recovered.cut.is_none() && writer.recovered.index_rebuilt.is_none());
            }
        }
    }
    writer.sync();
    add(counts, &writer);
    early_reader.refresh().unwrap();
    let fresh_reader = StoreReader::open(dir.path()).unwrap();
    for reader in [&early_reader, &fresh_reader] {
        check(reader, &naive, first, last)?;
    }
    writer.apply();
    let head = writer.index.head_view(volume()).unwrap();
    let mut bytes = vec![0; head.bytes() as usize];
    head.read_at(0, &mut bytes).unwrap();
    prop_assert!(bytes == naive.image(last), "the writer's own view");
    Ok(())
}

fn check(reader: &StoreReader, naive: &Naive, first: u64, last: u64) -> Result<(), TestCaseError> {
    prop_assert_eq!(reader.head().unwrap().seq.get(), last);
    let mut before: Option<Vec<u8>> = None;
    for seq in first..=last {
        let expected = naive.image(seq);
        let view = reader.view(volume(), Seq::new(seq).unwrap()).unwrap();
        prop_assert_eq!(view.bytes(), expected.len() as u64);
        let mut found = vec![0xee; expected.len()];
        view.read_at(0, &mut found).unwrap();
        if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
            return Err(TestCaseError::fail(format!(
                "seq {seq} differs at byte {at} (sector {})",
                at / 512
            )));
        }
        // An odd range, by itself.
        let (start, end) = (expected.len() / 3, expected.len() - expected.len() / 5);
        let mut part = vec![0xee; end - start];
        view.read_at(start as u64, &mut part).unwrap();
        prop_assert!(
            part == expected[start..end],
            "seq {}, bytes {}..{}",
            seq,
            start,
            end
        );
        for extent in view.extents(0..view.bytes()).unwrap() {
            let range = extent.offset as usize..(extent.offset + extent.len) as usize;
            prop_assert!(extent.kind == ExtentKind::Data || expected[range].iter().all(|byte| *byte == 0));
        }
        check_changes(&view)?;
        if let Some(before) = before.filter(|before| before.len() == expected.len()) {
            let changed = view.changed_since(Seq::new(seq - 1), 0..view.bytes()).unwrap();
            for at in (0..expected.len()).filter(|at| before[*at] != expected[*at]) {
                prop_assert!(
                    changed.iter().any(|range| range.contains(&(at as u64))),
                    "seq {}, byte {}",
                    seq,
                    at
                );
            }
            // Copied over the moment before, they make this one.
            let sink = MemorySink(Mutex::new(before));
            let options = CopyOptions {
                threads: 2,
                window_bytes: 12 << 10,
                one_writer: false,
                ..CopyOptions::default()
            };
            let report = view.copy_ranges_to(&changed, &sink, &options, &|_| ()).unwrap();
            let changed_bytes: u64 = changed.iter().map(|range| range.end - range.start).sum();
            prop_assert_eq!(report.data_bytes + report.zero_bytes, changed_bytes);
            prop_assert!(sink.0.into_inner() == expected, "seq {} from what changed", seq);
        }
        before = Some(expected);
    }
    let view = reader.view(volume(), Seq::new(last).unwrap()).unwrap();
    for window_bytes in [1 << 16, 1 << 30] {
        let sink = MemorySink::default();
        let report = view
            .copy_to(
                &sink,
                &CopyOptions {
                    threads: 2,
                    window_bytes,
                    one_writer: window_bytes > 1 << 16,
                    ..CopyOptions::default()
                },
                &|_| (),
            )
            .unwrap();
        prop_assert_eq!(report.data_bytes + report.zero_bytes, view.bytes());
        prop_assert!(
            sink.0.into_inner() == naive.image(last),
            "a copy with windows of {} bytes",
            window_bytes
        );
    }
    Ok(())
}

/// What has changed since other moments is what was written after them: nothing less, and nothing more.
fn check_changes(view: &View) -> Result<(), TestCaseError> {
    let blocks: Vec<_> = (0..view.bytes())
        .step_by(4096)
        .map(|at| (at..view.bytes().min(at + 4096), view.written_by(at).unwrap()))
        .collect();
    let seq = view.seq().get();
    for older in [0, seq / 2, seq.saturating_sub(3), seq - 1] {
        let older = Seq::new(older);
        let mut expected: Vec<Range<u64>> = Vec::new();
        for (block, _) in blocks.iter().filter(|(_, written)| *written > older) {
            match expected.last_mut() {
                Some(last) if last.end == block.start => last.end = block.end,
                _ => expected.push(block.clone()),
            }
        }
        let found = view.changed_since(older, 0..view.bytes()).unwrap();
        prop_assert_eq!(found, expected, "seq {} since {:?}", seq, older);
    }
    Ok(())
}

fn add(counts: &mut EncodedBlocks, writer: &Writer) {
    let more = writer.cache.counts();
    counts.whole += more.whole;
    counts.zero += more.zero;
    counts.patched += more.patched;
    counts.repeated += more.repeated;
    counts.at_depth_max += more.at_depth_max;
}

#[test]
fn the_view_at_every_seq_equals_a_naive_replay() {
    let config = ProptestConfig {
        cases: 96,
        ..ProptestConfig::with_source_file(file!())
    };
    let counts = Mutex::new(EncodedBlocks::default());
    let replayed = TestRunner::new(config).run(&prop::collection::vec(op(), 1..40), |ops| {
        run(&ops, &mut counts.lock())
    });
    replayed.unwrap_or_else(|error| panic!("{error}"));
    let counts = counts.into_inner();
    println!("{counts:?}");
    let EncodedBlocks {
        whole,
        zero,
        patched,
        repeated,
        at_depth_max,
    } = counts;
    assert!(
        [whole, zero, patched, repeated, at_depth_max]
            .iter()
            .all(|blocks| *blocks > 100),
        "not every way to encode a block was tried: {counts:?}"
    );
}

/// Goal: what lies scattered in the log reaches a sink in long stretches, and is right, whatever memory there is for
/// it. Method: 5 MiB of pieces in no order, among them zeroes and pieces that lie over the borders of stretches, and
/// 1 MiB in a row further on; windows that end within a stretch.
#[test]
fn scattered_pieces_come_as_long_stretches() {
    const PIECE: usize = 6 << 10;
    const PIECES: usize = (5 << 20) / PIECE;
    const MIB: u64 = 1 << 20;
    #[derive(Default)]
    struct Told(MemorySink, Mutex<Vec<(u64, u64)>>);
    impl Sink for Told {
        fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.1.lock().push((offset, data.len() as u64));
            self.0.write_at(offset, data)
        }
        fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
            self.0.zero(offset, len)
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    writer.declare(8 * MIB);
    let mut expected = vec![0; 8 << 20];
    let mut write = |offset: usize, bytes: &[u8]| {
        expected[offset..offset + bytes.len()].copy_from_slice(bytes);
        writer.write(offset as u64, bytes)
    };
    for piece in (0..PIECES).map(|step| step * 389 % PIECES) {
        // A stretch of zeroes among them, of whole blocks.
        let bytes = match piece {
            300..330 => vec![0; PIECE],
            _ => bytes_of(piece as u64, PIECE),
        };
        write(piece * PIECE, &bytes);
    }
    let last = write(6 << 20, &bytes_of(7, 1 << 20));
    writer.apply();
    let reader = StoreReader::open(dir.path()).unwrap();
    let view = reader.view(volume(), last).unwrap();
    for (gather_bytes_max, window_bytes) in [
        (0, 2 << 30),
        (2 * MIB, 2 << 30),
        (3 * MIB, 2 << 30),
        (64 * MIB, 2 << 30),
        (2 * MIB, 5 * MIB / 2 + 4096),
        (64 * MIB, 5 * MIB / 2 + 4096),
    ] {
        let options = CopyOptions {
            threads: 3,
            gather_bytes_max,
            window_bytes,
            ..CopyOptions::default()
        };
        let (sink, progress_bytes) = (Told::default(), AtomicU64::new(0));
        let report = view
            .copy_to(&sink, &options, &|bytes| {
                progress_bytes.fetch_add(bytes, Ordering::Relaxed);
            })
            .unwrap();
        let what = format!("{gather_bytes_max} bytes of memory, windows of {window_bytes}");
        assert_eq!(report.data_bytes + report.zero_bytes, view.bytes(), "{what}");
        assert_eq!(progress_bytes.into_inner(), view.bytes(), "{what}");
        assert!(sink.0.0.into_inner() == expected, "{what}");
        let told = sink.1.into_inner();
        let scattered = told.iter().filter(|(offset, _)| *offset < 5 * MIB).count();
        match gather_bytes_max {
            0 => assert!(scattered > PIECES / 2, "{what}: {scattered} writes"),
            // Three stretches, a hole in one of them, and what a window cuts.
            _ => assert!(scattered <= 10, "{what}: {told:?}"),
        }
    }
}

/// Goal: a sink that panics ends the copy with its panic, and nobody waits for what it will not take. Method: scattered
/// pieces of three stretches, and memory for one; before them comes what is written as it is, on which all workers panic
/// while the pieces of the first stretch are still waiting for one.
#[test]
fn a_sink_that_panics_ends_the_copy() {
    struct Panics;
    impl Sink for Panics {
        fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
            panic!("a sink that panics, as a test wants it to");
        }
        fn zero(&self, _offset: u64, _len: u64) -> io::Result<()> {
            Ok(())
        }
    }
    const BLOCKS: u64 = 3 * 512;
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    writer.declare(16 << 20);
    for block in (0..BLOCKS).map(|step| step * 389 % BLOCKS) {
        writer.write((4 << 20) + block * 4096, &bytes_of(block, 4096));
    }
    // The newest of the log is read first.
    let whole = |half: u64| noise_of(half, 1 << 20);
    writer.write(0, &whole(0));
    let last = writer.write(1 << 20, &whole(1));
    writer.apply();
    let reader = StoreReader::open(dir.path()).unwrap();
    let view = reader.view(volume(), last).unwrap();
    let options = CopyOptions {
        threads: 2,
        gather_bytes_max: 2 << 20,
        ..CopyOptions::default()
    };
    let copy = || view.copy_to(&Panics, &options, &|_| ());
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(copy)).is_err());
}
