//! Opening, history and moments.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use cdp_journal::format::{Body, FrameHeader, GapCause, VolumeKind};
use cdp_journal::store::{StoreReader, StoreWriter, WriterOptions};
use cdp_journal::when::{NotExact, NotExactCause, When, WhenError};
use cdp_journal::{OpenError, ReadError, Seq, VolumeId, WallNs};
use uuid::Uuid;

use crate::kit::{BOOT, Writer, bytes_of, listing, noise_of, volume};

fn not_exact(reader: &StoreReader, when: &When) -> NotExact {
    match reader.resolve(volume(), when) {
        Err(WhenError::NotExact(reason)) => *reason,
        other => panic!("{when}: {other:?}"),
    }
}

fn at(ns: u64) -> When {
    When::At(WallNs(ns as i64))
}

#[test]
fn a_second_writer_is_refused_and_told_who_has_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Writer::open(dir.path());
    let error = StoreWriter::open(dir.path(), &WriterOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::Locked { .. }));
    assert!(
        error
            .to_string()
            .contains(&format!("process {}", std::process::id())),
        "{error}"
    );
    let reader = StoreReader::open(dir.path()).unwrap();
    assert!(reader.writer_alive().unwrap());
    assert!(
        reader.writer_alive().unwrap(),
        "asking does not take the lock away"
    );
    let Writer { log, index, .. } = writer;
    drop(log);
    assert!(
        reader.writer_alive().unwrap(),
        "the lock is held until both halves are dropped"
    );
    drop(index);
    assert!(!reader.writer_alive().unwrap());
    Writer::open(dir.path());
}

#[test]
fn what_is_not_a_store_or_is_newer_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        StoreReader::open(dir.path()),
        Err(OpenError::NotAStore { .. })
    ));
    drop(Writer::open(dir.path()));
    let file = dir.path().join("store.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"format\": 1", "\"format\": 7")).unwrap();
    let before = listing(dir.path());
    for error in [
        StoreReader::open(dir.path()).unwrap_err(),
        StoreWriter::open(dir.path(), &WriterOptions::default()).unwrap_err(),
    ] {
        assert!(matches!(
            error,
            OpenError::TooNew {
                found: 7,
                newest: 1,
                ..
            }
        ));
        let message = error.to_string();
        assert!(
            message.contains("store.json: format 7, this build reads up to 1"),
            "{message}"
        );
    }
    assert_eq!(listing(dir.path()), before);
    std::fs::write(&file, "{").unwrap();
    assert!(matches!(
        StoreReader::open(dir.path()),
        Err(OpenError::BadStoreFile { .. })
    ));
}

#[test]
fn a_reader_sees_what_a_live_writer_appends_and_touches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    writer.declare(1 << 20);
    writer.sync();
    let reader = StoreReader::open(dir.path()).unwrap();
    for number in 0..60u64 {
        let data = bytes_of(number, 65536);
        let seq = writer.write(number % 16 * 65536, &data);
        match number % 3 {
            0 => writer.sync(),
            1 => writer.apply(),
            _ => writer.flush(),
        }
        let fresh = StoreReader::open(dir.path()).unwrap();
        reader.refresh().unwrap();
        for reader in [&reader, &fresh] {
            assert_eq!(reader.head().unwrap().seq, seq);
            let mut found = vec![0; data.len()];
            reader
                .view(volume(), seq)
                .unwrap()
                .read_at(number % 16 * 65536, &mut found)
                .unwrap();
            assert!(found == data);
        }
    }
    // Once nothing but readers is at work, nothing changes.
    writer.write(0, &bytes_of(99, 512));
    writer.sync();
    drop(writer);
    let before = listing(dir.path());
    for _ in 0..3 {
        reader.refresh().unwrap();
        let fresh = StoreReader::open(dir.path()).unwrap();
        fresh.resolve(volume(), &When::Latest).unwrap();
        fresh.verify_log(&mut |_| ()).unwrap();
    }
    assert_eq!(listing(dir.path()), before, "readers left something behind");
}

/// Goal: a reader that opens while the writer flushes and compacts finds a consistent index. Method: both at full
/// speed at the same time; every opening must succeed and show the newest durable write or a later one.
#[test]
fn opening_beside_a_writer_that_flushes_always_works() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    writer.declare(64 << 20);
    writer.sync();
    let durable = std::sync::atomic::AtomicU64::new(2);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..40u64 {
                for block in 0..512 {
                    writer.write((block * 37 + round) % 16384 * 4096, &bytes_of(round, 4096));
                }
                writer.flush();
                durable.store(
                    writer.log.durable().unwrap().get(),
                    std::sync::atomic::Ordering::SeqCst,
                );
            }
            done.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        let mut opened = 0;
        while !done.load(std::sync::atomic::Ordering::SeqCst) || opened < 3 {
            let at_least = durable.load(std::sync::atomic::Ordering::SeqCst);
            let reader = StoreReader::open(dir.path()).unwrap();
            let head = reader.head().unwrap().seq;
            assert!(head.get() >= at_least, "{head} of {at_least}");
            let view = reader.view(volume(), head).unwrap();
            view.read_at(0, &mut vec![0; 1 << 20]).unwrap();
            opened += 1;
        }
    });
}

/// Seqs: 1 volume, 2 close, 3 to 5 writes, 6 gap from 4 on, 7 write, 8 close, 9 and 10 writes.
/// A record's time is 1 000 ns after the one before it.
fn store_with_a_gap(writer: &mut Writer) -> u64 {
    let start_ns = writer.boot_ns;
    writer.declare(1 << 20);
    for _ in 0..3 {
        writer.write(0, &bytes_of(1, 4096));
    }
    let last_exact = Seq::new(4);
    writer.push(
        Body::GapOpen {
            cause: GapCause::RingOverflow,
            last_exact,
        },
        &[],
    );
    writer.write(0, &bytes_of(2, 4096));
    writer.append();
    writer.push(Body::GapClose, &[]);
    writer.write(0, &bytes_of(3, 4096));
    writer.push_to(None, Body::Bookmark { label: "here".into() }, &[]);
    writer.sync();
    start_ns
}

/// Stretches and gaps of the volume, as Seqs.
type Stretches = (Vec<(u64, u64)>, Vec<(Option<u64>, Option<u64>)>);

fn stretches(dir: &std::path::Path) -> Stretches {
    let history = StoreReader::open(dir)
        .unwrap()
        .history(volume())
        .unwrap()
        .unwrap();
    let exact = history.exact.iter().map(|e| (e.from_seq.get(), e.to_seq.get()));
    let seq = |seq: Option<Seq>| seq.map(Seq::get);
    let gaps = history
        .gaps
        .iter()
        .map(|gap| (seq(gap.from_seq), seq(gap.to_seq)));
    (exact.collect(), gaps.collect())
}

#[test]
fn a_gap_that_began_earlier_than_was_said_takes_moments_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    store_with_a_gap(&mut writer);
    assert_eq!(
        stretches(dir.path()),
        (vec![(2, 4), (8, 10)], vec![(Some(4), Some(8))])
    );
    let mut open = |last_exact: u64| {
        let last_exact = Seq::new(last_exact);
        let cause = GapCause::ChangedInFlight;
        writer.push(Body::GapOpen { cause, last_exact }, &[]);
        writer.sync();
    };
    open(9);
    let gaps = vec![(Some(4), Some(8)), (Some(9), None)];
    assert_eq!(stretches(dir.path()), (vec![(2, 4), (8, 9)], gaps));
    open(8);
    let gaps = vec![(Some(4), Some(8)), (Some(8), None)];
    assert_eq!(stretches(dir.path()), (vec![(2, 4), (8, 8)], gaps));
    // Into the stretch before.
    open(3);
    assert_eq!(stretches(dir.path()), (vec![(2, 3)], vec![(Some(3), None)]));
    open(1);
    assert_eq!(stretches(dir.path()), (vec![], vec![(Some(2), None)]));
}

/// Goal: the time at which a stretch is said to end can be asked for. Method: a gap that opens at the very time of the last
/// exact record, and one that opens after the clock was set back.
#[test]
fn the_end_of_a_stretch_is_a_time_before_the_gap() {
    for back_ns in [1_000, 1_500] {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path());
        writer.declare(1 << 20);
        for _ in 0..3 {
            writer.write(0, &bytes_of(1, 4096));
        }
        writer.boot_ns -= back_ns;
        let (cause, last_exact) = (GapCause::AgentDown, Seq::new(5));
        writer.push(Body::GapOpen { cause, last_exact }, &[]);
        writer.sync();
        let reader = StoreReader::open(dir.path()).unwrap();
        let exact = reader.history(volume()).unwrap().unwrap().exact[0];
        assert_eq!(exact.to_seq.get(), 5);
        let end = reader.resolve(volume(), &When::At(exact.to)).unwrap();
        assert_eq!(
            end.seq.unwrap().get(),
            4,
            "record 5 has the time of what is not exact"
        );
        if back_ns == 1_000 {
            let later = When::At(WallNs(exact.to.0 + 1));
            let before = not_exact(&reader, &later).before.unwrap();
            assert_eq!(before.wall, exact.to);
        }
    }
}

/// Nobody knows since when: no moment is called exact any more, also when a gap was open already.
#[test]
fn a_gap_that_began_before_everything_takes_all_moments_back() {
    for is_open in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path());
        store_with_a_gap(&mut writer);
        let cause = GapCause::RingOverflow;
        if is_open {
            let last_exact = Seq::new(9);
            writer.push(Body::GapOpen { cause, last_exact }, &[]);
        }
        let last_exact = None;
        writer.push(Body::GapOpen { cause, last_exact }, &[]);
        writer.sync();
        assert_eq!(stretches(dir.path()), (vec![], vec![(Some(2), None)]));
    }
}

#[test]
fn history_tells_where_it_is_exact_and_why_not_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    let start_ns = store_with_a_gap(&mut writer);
    let wall = |seq: u64| WallNs((start_ns + seq * 1_000) as i64);
    for apply in [false, true] {
        if apply {
            writer.flush();
        }
        let reader = StoreReader::open(dir.path()).unwrap();
        let history = reader.history(volume()).unwrap().unwrap();
        assert_eq!(
            (history.volume.name.as_str(), history.volume.kind),
            ("pg", VolumeKind::Block)
        );
        let exact: Vec<_> = history
            .exact
            .iter()
            .map(|e| (e.from_seq.get(), e.to_seq.get(), e.from, e.to, e.open))
            .collect();
        assert_eq!(
            exact,
            [(2, 4, wall(2), wall(4), false), (8, 10, wall(8), wall(10), true)]
        );
        let gaps: Vec<_> = history
            .gaps
            .iter()
            .map(|gap| (gap.from, gap.to, gap.cause))
            .collect();
        assert_eq!(gaps, [(wall(4), Some(wall(8)), GapCause::RingOverflow)]);
        assert_eq!(
            (history.bookmarks[0].label.as_str(), history.bookmarks[0].at),
            ("here", wall(10))
        );
        assert!(reader.history(VolumeId::new(9).unwrap()).unwrap().is_none());
    }
}

#[test]
fn a_moment_is_resolved_or_refused_with_its_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    let start_ns = store_with_a_gap(&mut writer);
    let ns = |seq: u64| start_ns + seq * 1_000;
    let reader = StoreReader::open(dir.path()).unwrap();
    let resolve = |when: &When| reader.resolve(volume(), when).unwrap().seq.unwrap().get();

    assert_eq!(resolve(&at(ns(2))), 2);
    assert_eq!(resolve(&at(ns(3) + 999)), 3, "up to the next record");
    assert_eq!(resolve(&at(ns(4))), 4);
    assert_eq!(resolve(&at(ns(8) - 1 + 1)), 8);
    assert_eq!(resolve(&When::Latest), 10);
    assert_eq!(resolve(&When::Bookmark("here".into())), 10);
    assert_eq!(resolve(&When::Seq(Seq::new(4).unwrap())), 4);

    // What was lost was lost after record 4, and nobody knows when.
    let reason = not_exact(&reader, &at(ns(4) + 1));
    assert_eq!(reason.cause, NotExactCause::Gap(GapCause::RingOverflow));
    assert_eq!(
        (reason.before.unwrap().seq.get(), reason.after.unwrap().seq.get()),
        (4, 8)
    );
    let message = reason.to_string();
    assert!(
        message.contains("ring-overflow") && message.contains("(seq:4)"),
        "{message}"
    );
    for seq in [5, 6, 7] {
        let reason = not_exact(&reader, &When::Seq(Seq::new(seq).unwrap()));
        assert_eq!(reason.after.unwrap().seq.get(), 8, "seq {seq}");
    }
    assert_eq!(
        not_exact(&reader, &When::Seq(Seq::FIRST)).cause,
        NotExactCause::Gap(GapCause::Seeding)
    );
    assert_eq!(
        not_exact(&reader, &at(start_ns)).cause,
        NotExactCause::BeforeHistory
    );

    assert!(matches!(
        reader.resolve(volume(), &When::Bookmark("nowhere".into())),
        Err(WhenError::NoBookmark { .. })
    ));
    assert!(matches!(
        reader.resolve(volume(), &When::Seq(Seq::new(11).unwrap())),
        Err(WhenError::BeyondHead { .. })
    ));
    let future = WallNs::now().saturating_add(Duration::from_secs(3600));
    assert!(matches!(
        reader.resolve(volume(), &When::At(future)),
        Err(WhenError::Future { .. })
    ));
    drop(writer);
    let reason = not_exact(&reader, &at(ns(10) + 1));
    assert_eq!(
        reason.cause,
        NotExactCause::AfterHistory {
            covered_until: Some(WallNs(ns(10) as i64))
        }
    );
    assert!(
        reason.to_string().contains("nothing was captured after"),
        "{reason}"
    );
    assert!(matches!(
        reader.view(VolumeId::new(9).unwrap(), Seq::FIRST),
        Err(ReadError::NoVolume { .. })
    ));
}

/// Records of one frame need not be in the order of their times: a moment is the longest run before a later one.
#[test]
fn a_time_means_the_longest_run_without_a_later_record() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    writer.declare(1 << 20);
    let walls = [5_000u64, 9_000, 6_000, 7_000, 20_000, 8_000];
    for (number, wall) in walls.iter().enumerate() {
        writer.boot_ns = wall - 1_000;
        writer.write(0, &bytes_of(number as u64, 512));
        if number % 2 == 1 {
            writer.append();
        }
    }
    writer.sync();
    let reader = StoreReader::open(dir.path()).unwrap();
    let resolve = |ns: u64| reader.resolve(volume(), &at(ns)).unwrap().seq.unwrap().get();
    // Seqs of the writes are 3 to 8.
    for (ns, seq) in [(5_000, 3), (8_999, 3), (9_000, 6), (19_999, 6), (20_000, 8)] {
        assert_eq!(resolve(ns), seq, "at {ns}");
    }
    assert_eq!(reader.covered_until(), Some(WallNs(20_000)));
}

#[test]
fn a_moment_that_has_just_passed_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    let now = WallNs::now();
    writer.wall_offset_ns = now.0;
    writer.declare(1 << 20);
    writer.sync();
    let reader = StoreReader::open(dir.path()).unwrap();
    let wanted = WallNs(now.0 + 1_000_000_000);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| reader.resolve(volume(), &When::At(wanted)));
        writer.boot_ns = 2_000_000_000;
        writer.push_to(None, Body::Tick, &[]);
        writer.sync();
        assert_eq!(waiting.join().unwrap().unwrap().seq, Seq::new(2));
    });
}

#[test]
fn a_reopened_store_tells_what_it_knew() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    assert!(writer.recovered.created && writer.recovered.last_seq.is_none());
    let (agent, boot_id) = (Uuid::from_bytes([3; 16]), crate::kit::BOOT);
    writer.push_to(None, Body::Start { agent, boot_id }, &[]);
    writer.declare(1 << 20);
    writer.push(Body::Resize { bytes: 2 << 20 }, &[]);
    writer.push_to(None, Body::Stop, &[]);
    writer.sync();
    drop(writer);
    let mut writer = Writer::open(dir.path());
    let recovered = &writer.recovered;
    assert_eq!(
        (recovered.agent, recovered.boot_id, recovered.stopped),
        (Some(agent), Some(boot_id), true)
    );
    let state = &recovered.volumes[0];
    assert_eq!(
        (state.info.bytes, state.inexact, state.last_exact),
        (2 << 20, None, Seq::new(5))
    );
    let last_exact = recovered.last_seq;
    writer.push(
        Body::GapOpen {
            cause: GapCause::AgentDown,
            last_exact,
        },
        &[],
    );
    writer.sync();
    drop(writer);
    let recovered = Writer::open(dir.path()).recovered;
    assert!(!recovered.stopped);
    let state = &recovered.volumes[0];
    assert_eq!(
        (state.inexact, state.last_exact, state.gaps),
        (Some(GapCause::AgentDown), Seq::new(5), 1)
    );
}

#[test]
fn a_step_of_the_clock_is_noted_and_order_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    writer.declare(1 << 20);
    writer.append();
    writer.wall_offset_ns = -3_000_000_000;
    writer.write(0, &bytes_of(1, 512));
    writer.sync();
    let reader = StoreReader::open(dir.path()).unwrap();
    let notes = reader.history(volume()).unwrap().unwrap().notes;
    assert_eq!(notes[0].text, "the clock was set -3.000 s");
    assert_eq!(reader.resolve(volume(), &When::Latest).unwrap().seq, Seq::new(3));
}

#[test]
fn an_index_that_is_gone_stale_or_ahead_is_mended_from_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let index = dir.path().join("index");
    let saved = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    writer.declare(1 << 20);
    writer.write(4096, &bytes_of(1, 4096));
    writer.flush();
    drop(writer);
    copy_dir(&index, &saved.path().join("stale"));
    let mut writer = Writer::open(dir.path());
    let seq = writer.write(4608, &bytes_of(2, 512));
    writer.flush();
    drop(writer);
    copy_dir(&index, &saved.path().join("ahead"));

    let check = |told: &str| {
        let reader = StoreReader::open(dir.path()).unwrap();
        let mut found = vec![0; 4096];
        reader
            .view(volume(), seq)
            .unwrap()
            .read_at(4096, &mut found)
            .unwrap();
        let mut expected = bytes_of(1, 4096);
        expected[512..1024].copy_from_slice(&bytes_of(2, 512));
        assert!(found == expected, "{told}");
    };
    std::fs::remove_dir_all(&index).unwrap();
    check("gone, read only");
    assert!(Writer::open(dir.path()).recovered.index_rebuilt.is_some());
    check("gone, rebuilt");

    std::fs::remove_dir_all(&index).unwrap();
    copy_dir(&saved.path().join("stale"), &index);
    check("stale, read only");
    assert!(
        Writer::open(dir.path()).recovered.index_rebuilt.is_none(),
        "the rest is replayed"
    );
    check("stale, caught up");

    std::fs::write(index.join("CURRENT"), "nonsense").unwrap();
    check("damaged, read only");
    assert!(Writer::open(dir.path()).recovered.index_rebuilt.is_some());
    check("damaged, rebuilt");

    // The log loses its last frame: the index is ahead of it.
    let segment = dir.path().join("log/00000000000000000001.seg");
    std::fs::remove_dir_all(&index).unwrap();
    copy_dir(&saved.path().join("ahead"), &index);
    let len = std::fs::metadata(&segment).unwrap().len();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&segment)
        .unwrap()
        .set_len(len - 8)
        .unwrap();
    let reader = StoreReader::open(dir.path()).unwrap();
    assert_eq!(
        reader.head().unwrap().seq,
        Seq::new(3).unwrap(),
        "ahead, read only"
    );
}

#[test]
fn what_the_log_lost_becomes_a_gap() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    writer.declare(1 << 20);
    writer.write(4096, &bytes_of(1, 4096));
    writer.flush();
    let kept = writer.log.log_bytes();
    writer.write(4096, &bytes_of(2, 4096));
    writer.flush();
    drop(writer);
    let segment = dir.path().join("log/00000000000000000001.seg");
    std::fs::OpenOptions::new()
        .write(true)
        .open(&segment)
        .unwrap()
        .set_len(kept)
        .unwrap();
    let mut writer = Writer::open(dir.path());
    assert!(
        writer
            .recovered
            .index_rebuilt
            .as_ref()
            .unwrap()
            .contains("before the index")
    );
    assert_eq!(
        writer.log.next_seq(),
        Seq::new(5).unwrap(),
        "numbers are not used twice"
    );
    writer.write(8192, &bytes_of(3, 4096));
    writer.sync();
    let reader = StoreReader::open(dir.path()).unwrap();
    let reason = not_exact(&reader, &When::Latest);
    assert_eq!(reason.cause, NotExactCause::Gap(GapCause::LogHole));
    assert_eq!(reason.before.unwrap().seq, Seq::new(3).unwrap());
    let frames = reader.records(Seq::FIRST..=Seq::new(9).unwrap());
    let seqs: Vec<_> = frames
        .flat_map(|frame| frame.unwrap().records)
        .map(|placed| placed.record.seq.get())
        .collect();
    assert_eq!(seqs, [1, 2, 3, 5], "4 is lost");
}

/// Goal: a walk hands out exactly the records asked for, from their tables alone. Method: frames of one to three
/// records over several segments, a part of them not in the index; every range is compared with what was written.
#[test]
fn records_are_handed_out_in_order_without_their_data() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open_with(
        dir.path(),
        &WriterOptions {
            segment_bytes_max: 1 << 20,
            ..WriterOptions::default()
        },
    );
    let mut written = vec![
        Body::Volume {
            kind: VolumeKind::Block,
            bytes: 64 << 20,
            name: "pg".to_owned(),
            path: "/dev/vdb".to_owned(),
        },
        Body::GapClose,
    ];
    writer.declare(64 << 20);
    for number in 0..28u64 {
        let body = Body::Write {
            offset: number << 20,
            len: 200 << 10,
        };
        writer.push(body.clone(), &noise_of(number, 200 << 10));
        written.push(body);
        match number {
            13 => writer.flush(),
            _ if number % 3 == 0 => writer.apply(),
            _ if number % 3 == 1 => writer.append(),
            _ => {}
        }
    }
    writer.sync();
    let mut segments: Vec<_> = std::fs::read_dir(dir.path().join("log"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(segments.len() > 2);
    segments.sort();
    let seq = |number: u64| Seq::new(number).unwrap();
    let last = written.len() as u64;
    let reader = StoreReader::open(dir.path()).unwrap();
    let check = |reader: &StoreReader| {
        for first in 1..=last + 1 {
            for until in [first, first + 1, first + 7, last, last + 9] {
                let mut next = first;
                for frame in reader.records(seq(first)..=seq(until)) {
                    let frame = frame.unwrap();
                    assert!(!frame.records.is_empty());
                    for placed in &frame.records {
                        let record = &placed.record;
                        assert_eq!(
                            (record.seq, &record.body),
                            (seq(next), &written[next as usize - 1])
                        );
                        assert!(
                            frame.header.first_seq <= record.seq && record.seq <= frame.header.last_seq()
                        );
                        assert_eq!(
                            (frame.header.boot_id, placed.wall.0),
                            (BOOT, record.boot_ns.0 as i64)
                        );
                        next += 1;
                    }
                }
                let end = until.min(last).max(first - 1);
                assert_eq!(next, end + 1, "seq {first} to {until}");
            }
        }
    };
    check(&reader);
    assert_eq!(reader.records(seq(5)..=seq(4)).count(), 0);

    // Bad data is none of its business, a bad table is: what lies before it is handed out, then the walk ends.
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&segments[0])
        .unwrap();
    let flip = |at: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    let middle = file.metadata().unwrap().len() / 2;
    flip(middle);
    check(&reader);
    flip(middle);
    let frames: Vec<_> = reader.records(seq(1)..=seq(last)).map(Result::unwrap).collect();
    let second = &frames[1].header;
    // Header of the segment, the first frame in its envelope, the second one's envelope and header.
    flip((64 + 32 + frames[0].header.frame_bytes + 32 + FrameHeader::BYTES) as u64);
    let mut walk = reader.records(seq(1)..=seq(last));
    assert_eq!(walk.next().unwrap().unwrap().header, frames[0].header);
    match walk.next().unwrap() {
        Err(ReadError::Damaged { path, seqs, .. }) => {
            assert_eq!(
                (&path, seqs),
                (&segments[0], Some((second.first_seq, second.last_seq())))
            );
        }
        other => panic!("{other:?}"),
    }
    assert!(walk.next().is_none());
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// The parts of a file that can be read without its disk, from its start on.
fn cached_bytes(file: &std::fs::File) -> u64 {
    let mut buf = vec![0; 64 << 10];
    let mut at = 0;
    loop {
        let bufs = &mut [std::io::IoSliceMut::new(&mut buf)];
        match rustix::io::preadv2(file, bufs, at, rustix::io::ReadWriteFlags::NOWAIT) {
            Ok(bytes) if bytes > 0 => at += bytes as u64,
            _ => return at,
        }
    }
}

/// Goal: whoever reads at random what was never read before need not wait for the disk of the index. Method: the kernel
/// forgets the index of forty thousand blocks; then it is read ahead, with no room and with enough of it.
#[test]
fn the_index_is_read_ahead_as_far_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    writer.declare(1 << 30);
    let mut seq = Seq::FIRST;
    for number in 0..40_000u64 {
        seq = writer.write(number * 7919 % (1 << 18) * 4096, &bytes_of(number, 512));
    }
    writer.flush();
    drop(writer);
    let reader = StoreReader::open(dir.path()).unwrap();
    let view = reader.view(volume(), seq).unwrap();
    let runs: Vec<_> = std::fs::read_dir(dir.path().join("index"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sst"))
        .map(|path| std::fs::File::open(path).unwrap())
        .collect();
    let in_all: u64 = runs.iter().map(|run| run.metadata().unwrap().len()).sum();
    let cached = || runs.iter().map(cached_bytes).sum::<u64>();
    assert!(in_all > 512 << 10, "an index of {in_all} bytes shows nothing");
    for run in &runs {
        run.sync_all().unwrap();
        rustix::fs::fadvise(run, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
    view.read_index_ahead(0, || unreachable!("there is no room"));
    view.read_index_ahead(u64::MAX, || false);
    let before = cached();
    assert!(
        before < in_all / 2,
        "{before} of {in_all} bytes are in memory: does the temporary folder lie on a disk?"
    );
    // Who does not go on is asked before each read, and no more is read.
    let mut reads = 0;
    view.read_index_ahead(u64::MAX, || {
        reads += 1;
        reads <= 1
    });
    assert_eq!(reads, 2);
    reads = 0;
    view.read_index_ahead(u64::MAX, || {
        reads += 1;
        true
    });
    assert_eq!(cached(), in_all);
    assert!(reads > runs.len(), "asked {reads} times for {} files", runs.len());
}
