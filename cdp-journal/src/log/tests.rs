use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use uuid::Uuid;

use super::fault::{Fault, FaultDisk, Random};
use super::*;
use crate::error::OpenError;
use crate::format::{
    Body, ENVELOPE_BYTES, FORMAT, FrameBuilder, Origin, RecordFlags, SEGMENT_HEADER_BYTES, SealedFrame,
    SegmentHeader,
};
use crate::types::{BootNs, VolumeId};
use crate::verify::{Damage, verify_log};

const STORE: Uuid = Uuid::from_bytes([5; 16]);
/// Small, so that a short workload rolls several times.
const SEGMENT_BYTES_MAX: u64 = 40_000;

fn limits() -> LogLimits {
    LogLimits {
        segment_bytes_max: SEGMENT_BYTES_MAX,
        store_bytes_max: None,
        free_bytes_min: 0,
        index_bytes: Arc::new(AtomicU64::new(0)),
    }
}

fn open(disk: &FaultDisk, indexed: Option<Seq>) -> Result<LogWriter, OpenError> {
    let state = recover(disk, STORE, indexed)?;
    Ok(LogWriter::new(Arc::new(disk.clone()), STORE, limits(), state, None).unwrap())
}

/// A frame of a few records; its bytes follow from its first Seq.
fn frame(first_seq: Seq) -> SealedFrame {
    let mut random = Random(first_seq.get());
    let mut frame = FrameBuilder::new(first_seq);
    for _ in 0..=random.below(3) {
        let data: Vec<u8> = (0..512 * (1 + random.below(8)))
            .map(|_| random.next() as u8)
            .collect();
        let body = Body::Write {
            offset: 512 * random.below(100),
            len: data.len() as u64,
        };
        let volume = VolumeId::new(1);
        frame
            .push(
                BootNs(7),
                volume,
                Origin::default(),
                RecordFlags::default(),
                body,
                &[&data],
            )
            .unwrap();
    }
    frame.seal(Uuid::nil(), 0).unwrap()
}

/// Checks that the log holds exactly the frames that the workload appends, up to some point; returns it.
fn read_all(disk: &FaultDisk) -> Option<Seq> {
    let mut last = None;
    let mut tail = Tail::from_start(STORE);
    let visited = tail.follow(disk, |found| -> Result<(), crate::ReadError> {
        let expected = frame(found.frame.header.first_seq);
        assert_eq!(
            found.frame.header.first_seq,
            Seq::after(last),
            "frames follow each other"
        );
        let mut bytes = vec![0; expected.bytes().len()];
        let file = disk.open(&found.location.segment.file_name()).unwrap();
        file.read_at(found.location.offset, &mut bytes).unwrap();
        assert!(
            bytes == expected.bytes(),
            "the frame of seq {} as it was written",
            expected.first_seq()
        );
        last = Some(expected.last_seq());
        Ok(())
    });
    visited.unwrap();
    last
}

fn damages(disk: &FaultDisk, indexed: Option<Seq>) -> Vec<Damage> {
    verify_log(disk, STORE, indexed, &|_| None, &mut |_| ())
        .unwrap()
        .damages
}

/// Appends frames and syncs now and then, at once or while more is appended, until the disk stops; returns the last
/// record reported durable.
fn run(disk: &FaultDisk, frames: usize, random: &mut Random) -> Option<Seq> {
    let Ok(mut log) = open(disk, None) else {
        return None;
    };
    let mut job: Option<SyncJob> = None;
    let mut told = log.durable();
    for _ in 0..frames {
        let next = frame(log.next_seq());
        disk.set_busy(random.below(2) == 0);
        // A segment that ends waits for its sync.
        let rolls = !log.fits((ENVELOPE_BYTES + next.bytes().len()) as u64);
        if let Some(job) = job.take_if(|_| rolls || random.below(3) == 0) {
            match job.run() {
                Ok(durable) => told = durable,
                Err(_) => break,
            }
        }
        if log.append(&next).is_err() {
            break;
        }
        told = told.max(log.durable());
        if job.is_some() || random.below(3) > 0 {
            continue;
        }
        if random.below(2) == 0 {
            job = log.begin_sync().unwrap();
            continue;
        }
        match log.sync() {
            Ok(durable) => told = durable,
            Err(_) => break,
        }
    }
    told
}

/// Goal: nothing that was reported durable is lost, and the log always opens. Method: stop the disk after each
/// operation in turn, let it lose, tear and reorder what was not synced, recover, read everything back, go on
/// writing, and lose power once more.
#[test]
fn a_crash_at_any_disk_operation_keeps_what_was_durable() {
    const FRAMES: usize = 24;
    for seed in 0..12 {
        let whole = FaultDisk::default();
        run(&whole, FRAMES, &mut Random(seed));
        for stop_after in 0..=whole.operations() {
            let told = format!("seed {seed}, stopped after operation {stop_after}");
            let disk = FaultDisk::stopping_after(stop_after);
            let durable = run(&disk, FRAMES, &mut Random(seed));
            let mut random = Random(seed ^ (stop_after << 32));
            let disk = disk.after_power_loss(&mut random);
            // Before anybody recovers it, a reader sees nothing but what was written, and all that was durable.
            assert!(read_all(&disk) >= durable, "{told}");
            assert_eq!(damages(&disk, durable), [], "{told}");
            let log = open(&disk, durable).unwrap_or_else(|error| panic!("{told}: {error}"));
            assert!(
                log.durable() >= durable,
                "{told}: {:?} of {durable:?} left",
                log.durable()
            );
            assert_eq!(read_all(&disk), log.durable(), "{told}");
            drop(log);

            let durable = run(&disk, FRAMES / 2, &mut random);
            let disk = disk.after_power_loss(&mut random);
            let log = open(&disk, durable).unwrap_or_else(|error| panic!("{told}, second time: {error}"));
            assert!(log.durable() >= durable, "{told}, second time");
            assert_eq!(read_all(&disk), log.durable(), "{told}, second time");
        }
    }
}

/// What an agent does whatever happens: tries a frame again when there was no room, opens the log again when something
/// else failed. Returns the last record reported durable once `frames` were appended, and how often it opened the log.
fn persist(disk: &FaultDisk, frames: usize, random: &mut Random, told: &str) -> (Option<Seq>, usize) {
    let (mut durable, mut appended, mut opened) = (None, 0, 0);
    let mut open_log: Option<LogWriter> = None;
    let mut job: Option<SyncJob> = None;
    for _ in 0..frames + 20 {
        let Some(log) = &mut open_log else {
            job = None;
            // The index may know what was durable, or be behind.
            let indexed = durable.filter(|_| random.below(2) == 0);
            match open(disk, indexed) {
                Ok(log) => open_log = Some(log),
                Err(OpenError::Io { .. }) => {}
                Err(error) => panic!("{told}: {error}"),
            }
            opened += 1;
            let found = open_log.as_ref().map(LogWriter::durable);
            assert!(
                found.is_none_or(|found| found >= durable),
                "{told}: {found:?} of {durable:?}"
            );
            continue;
        };
        let next = frame(log.next_seq());
        // Who runs a sync elsewhere tells nobody else how it ended: the log must notice. A segment that ends waits for it.
        if random.below(3) == 0 || !log.fits((ENVELOPE_BYTES + next.bytes().len()) as u64) {
            let _ = job.take().map(SyncJob::run);
        }
        let was_synced = match log.append(&next) {
            Ok(_) => {
                appended += 1;
                match random.below(4) {
                    0 => {
                        let _ = job.take().map(SyncJob::run);
                        log.sync().is_ok()
                    }
                    1 if job.is_none() => log.begin_sync().map(|begun| job = begun).is_ok(),
                    2 => log.is_synced().is_ok(),
                    _ => true,
                }
            }
            Err(error) => error.is_full(),
        };
        durable = durable.max(log.durable());
        if !was_synced {
            open_log = None;
        } else if appended >= frames {
            break;
        }
    }
    (durable, opened)
}

/// Goal: an operation that fails, or a kill, costs nothing that was durable, also when there is a power loss much
/// later; what a failed sync was to write is never taken for durable because a later one succeeds. Method: each
/// operation in turn, and up to two after it, fails for good, for want of room, or with the process; go on as the agent
/// does, and lose power in the end.
#[test]
fn a_failure_of_any_disk_operation_costs_nothing_that_was_durable() {
    const FRAMES: usize = 24;
    let faults = [
        Fault::Fails(io::ErrorKind::Other),
        Fault::Fails(io::ErrorKind::StorageFull),
        Fault::Killed,
    ];
    for seed in 0..6 {
        let whole = FaultDisk::default();
        persist(&whole, FRAMES, &mut Random(seed), "no fault");
        let (mut reopened, mut stayed) = (0, 0);
        for after in 0..=whole.operations() {
            for (fault, count) in faults
                .iter()
                .flat_map(|fault| [(*fault, 1), (*fault, 2), (*fault, 3)])
            {
                let told = format!("seed {seed}, {fault:?} {count} times after operation {after}");
                let disk = FaultDisk::failing_after(after, count, fault);
                let (durable, opened) = persist(&disk, FRAMES, &mut Random(seed), &told);
                *if opened > 1 { &mut reopened } else { &mut stayed } += 1;
                let disk = disk.after_power_loss(&mut Random(seed ^ (after << 32) ^ (count << 24)));
                assert!(read_all(&disk) >= durable, "{told}");
                assert_eq!(damages(&disk, durable), [], "{told}");
                let log = open(&disk, durable).unwrap_or_else(|error| panic!("{told}: {error}"));
                assert!(
                    log.durable() >= durable,
                    "{told}: {:?} of {durable:?} left",
                    log.durable()
                );
                assert_eq!(read_all(&disk), log.durable(), "{told}");
            }
        }
        assert!(reopened > 0 && stayed > 0, "seed {seed}: {reopened} {stayed}");
    }
}

/// A disk with `frames` frames, synced after each, and where each begins: segment and offset of its envelope.
fn written(frames: usize) -> (FaultDisk, Vec<(SegmentId, u64)>) {
    let disk = FaultDisk::default();
    let mut log = open(&disk, None).unwrap();
    let mut starts = Vec::new();
    for _ in 0..frames {
        let at = log.append(&frame(log.next_seq())).unwrap();
        starts.push((at.segment, at.offset - ENVELOPE_BYTES as u64));
        log.sync().unwrap();
    }
    (disk, starts)
}

/// As many frames as fit the first segment.
fn one_segment() -> (FaultDisk, Vec<u64>, String) {
    let (disk, starts) = written(3);
    assert!(starts.iter().all(|(segment, _)| segment.0 == Seq::FIRST));
    (
        disk,
        starts.into_iter().map(|(_, at)| at).collect(),
        SegmentId(Seq::FIRST).file_name(),
    )
}

#[test]
fn recovery_1_an_empty_log_starts_at_the_first_seq() {
    let log = open(&FaultDisk::default(), None).unwrap();
    assert_eq!((log.next_seq(), log.durable()), (Seq::FIRST, None));
}

#[test]
fn recovery_2_a_segment_whose_making_was_interrupted_is_removed() {
    let (disk, _, _) = one_segment();
    let last = read_all(&disk);
    let name = SegmentId(Seq::after(last)).file_name();
    for bytes in [Vec::new(), vec![0; 10], vec![0; SEGMENT_HEADER_BYTES]] {
        disk.put(&name, bytes);
        let state = recover(&disk, STORE, None).unwrap();
        assert_eq!(state.last, last);
        assert!(state.cut.is_some());
        assert!(!disk.list().unwrap().contains(&name));
    }
}

#[test]
fn recovery_3_a_torn_tail_is_cut_to_the_last_good_frame() {
    let (disk, starts, name) = one_segment();
    let before_last = frame(Seq::FIRST).last_seq();
    let before_last = frame(before_last.next()).last_seq();
    for tear in [1, 10, 40, 200, 600] {
        let disk = disk.after_power_loss(&mut Random(1));
        disk.edit(&name, |bytes| bytes.truncate(starts[2] as usize + tear));
        let state = recover(&disk, STORE, None).unwrap();
        assert_eq!(state.last, Some(before_last));
        assert_eq!(state.cut.unwrap().offset, starts[2]);
        assert_eq!(disk.open(&name).unwrap().len().unwrap(), starts[2]);
    }
    // Data that never was durable is a torn tail too.
    disk.edit(&name, |bytes| *bytes.last_mut().unwrap() ^= 1);
    disk.edit(&name, |bytes| {
        let at = bytes.len() - 100;
        bytes[at] ^= 1;
    });
    assert_eq!(recover(&disk, STORE, None).unwrap().last, Some(before_last));
}

#[test]
fn recovery_4_damage_to_a_durable_frame_stops_and_cuts_nothing() {
    let (disk, starts, name) = one_segment();
    let len = disk.open(&name).unwrap().len().unwrap();
    // The third frame's envelope vouches for the first two.
    for at in [
        starts[0],
        starts[1] + ENVELOPE_BYTES as u64 + 20,
        starts[1] + ENVELOPE_BYTES as u64 + 100,
    ] {
        let disk = disk.after_power_loss(&mut Random(1));
        disk.edit(&name, |bytes| bytes[at as usize] ^= 0x10);
        match recover(&disk, STORE, None) {
            Err(OpenError::Corrupt { offset, .. }) => {
                assert!(offset <= at && at < offset + 600, "{offset} {at}")
            }
            other => panic!("damage at {at}: {other:?}"),
        }
        assert_eq!(disk.open(&name).unwrap().len().unwrap(), len);
    }
    // Nobody in the log vouches for the last frame; the index does.
    disk.edit(&name, |bytes| bytes[starts[2] as usize] ^= 0x10);
    let last = frame(frame(frame(Seq::FIRST).last_seq().next()).last_seq().next()).last_seq();
    assert!(matches!(
        recover(&disk, STORE, Some(last)),
        Err(OpenError::Corrupt { .. })
    ));
    assert!(recover(&disk, STORE, None).is_ok());
    // A header is durable before there is a frame, even a single one that nobody vouches for.
    disk.edit(&name, |bytes| {
        bytes.truncate(starts[1] as usize);
        bytes[40] ^= 1;
    });
    match recover(&disk, STORE, None) {
        Err(OpenError::Corrupt { offset: 0, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(disk.open(&name).unwrap().len().unwrap(), starts[1]);
    let mut tail = Tail::from_start(STORE);
    let followed = tail.follow(&disk, |_| -> Result<(), crate::ReadError> { Ok(()) });
    assert!(followed.unwrap_err().is_damage());
    assert_eq!(damages(&disk, None).len(), 1);
}

#[test]
fn recovery_5_damaged_data_of_a_durable_frame_is_kept_and_named() {
    let (disk, starts, name) = one_segment();
    let last = read_all(&disk);
    disk.edit(&name, |bytes| bytes[starts[2] as usize - 100] ^= 1);
    let state = recover(&disk, STORE, None).unwrap();
    assert_eq!((state.last, state.cut), (last, None));
    let first = frame(Seq::FIRST).last_seq().next();
    assert_eq!(state.damages.len(), 1);
    assert_eq!(state.damages[0].seqs, Some((first, frame(first).last_seq())));
    // The frame that vouches for it may itself be torn.
    disk.edit(&name, |bytes| {
        bytes.truncate(starts[2] as usize + ENVELOPE_BYTES + 40)
    });
    assert_eq!(visited(&mut Tail::from_start(STORE), &disk), [Seq::FIRST, first]);
    assert_eq!(damages(&disk, None), state.damages);
    let torn = recover(&disk, STORE, None).unwrap();
    assert_eq!(
        (torn.last, torn.damages),
        (Some(frame(first).last_seq()), state.damages)
    );
    assert_eq!(torn.cut.unwrap().offset, starts[2]);
}

/// Appends the frame of `first_seq` with an envelope that says that everything up to `durable` was.
fn append_raw(disk: &FaultDisk, name: &str, first_seq: Seq, durable: Option<Seq>) -> Seq {
    let frame = frame(first_seq);
    let envelope = crate::format::Envelope {
        frame_bytes: frame.bytes().len() as u64,
        first_seq,
        durable,
    };
    disk.edit(name, |bytes| {
        bytes.extend_from_slice(&envelope.encode());
        bytes.extend_from_slice(frame.bytes());
    });
    frame.last_seq()
}

/// The first record of each frame that `tail` has not visited before.
fn visited(tail: &mut Tail, disk: &FaultDisk) -> Vec<Seq> {
    let mut seqs = Vec::new();
    let followed = tail.follow(disk, |found| -> Result<(), crate::ReadError> {
        seqs.push(found.frame.header.first_seq);
        Ok(())
    });
    followed.unwrap();
    seqs
}

/// Goal: records of a frame that is torn are never shown, nor lost once it is whole. Method: spoil the data of a
/// frame that nobody vouches for, then make it good again, then spoil it when it is vouched for.
#[test]
fn a_frame_with_bad_data_is_not_there_until_somebody_vouches_for_it() {
    let (disk, _, name) = one_segment();
    let seqs: Vec<Seq> = std::iter::successors(Some(Seq::FIRST), |seq| Some(frame(*seq).last_seq().next()))
        .take(5)
        .collect();
    let spoil = |at: u64| disk.edit(&name, |bytes| bytes[at as usize - 100] ^= 1);
    let end = disk.open(&name).unwrap().len().unwrap();
    spoil(end);
    let mut tail = Tail::from_start(STORE);
    assert_eq!(visited(&mut tail, &disk), seqs[..2]);
    // What follows it is not there either, though it is good.
    append_raw(&disk, &name, seqs[3], seqs[2].prev());
    assert_eq!(visited(&mut tail, &disk), []);
    assert_eq!(damages(&disk, None), []);
    spoil(end);
    assert_eq!(visited(&mut tail, &disk), seqs[2..4]);

    // Damaged, for it was durable: its records are shown, and reading their data fails.
    spoil(end);
    append_raw(&disk, &name, seqs[4], seqs[3].prev());
    assert_eq!(visited(&mut Tail::from_start(STORE), &disk), seqs);
    let found = damages(&disk, None);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].seqs, Some((seqs[2], seqs[3].prev().unwrap())));
    // The same of the newest frame, where the index alone knows that it was durable.
    disk.edit(&name, |bytes| bytes.truncate(end as usize));
    assert_eq!(damages(&disk, None), []);
    assert_eq!(damages(&disk, seqs[3].prev()).len(), 1);
    let mut tail = Tail::from_start(STORE).vouched_until(seqs[3].prev());
    assert_eq!(visited(&mut tail, &disk), seqs[..3]);
    // And where the next segment is there: it was made after this one was durable.
    let header = SegmentHeader {
        store: STORE,
        first_seq: seqs[3],
    };
    disk.put(&SegmentId(seqs[3]).file_name(), header.encode().to_vec());
    assert_eq!(damages(&disk, None).len(), 1);
    assert_eq!(visited(&mut Tail::from_start(STORE), &disk), seqs[..3]);
}

/// Goal: a kill in the midst of an append harms nobody who reads. Method: cut the last frame short everywhere.
#[test]
fn an_append_that_was_cut_short_is_not_damage() {
    let (disk, starts, name) = one_segment();
    let first_two = frame(frame(Seq::FIRST).last_seq().next()).last_seq();
    let len = disk.open(&name).unwrap().len().unwrap();
    for cut in (starts[2] + 1..len).rev().step_by(50) {
        disk.edit(&name, |bytes| bytes.truncate(cut as usize));
        assert_eq!(damages(&disk, None), [], "cut at {cut}");
        assert_eq!(read_all(&disk), Some(first_two), "cut at {cut}");
    }
}

#[test]
fn recovery_6_and_7_a_hole_is_kept_and_a_step_back_is_not() {
    let (disk, _, name) = one_segment();
    let last = read_all(&disk).unwrap();
    let back = disk.after_power_loss(&mut Random(1));
    let after = append_raw(&disk, &name, last.plus(10), None);
    assert_eq!(recover(&disk, STORE, None).unwrap().last, Some(after));
    append_raw(&back, &name, last, None);
    assert!(matches!(
        recover(&back, STORE, None),
        Err(OpenError::Corrupt { .. })
    ));
}

#[test]
fn recovery_8_a_stranger_or_a_newer_format_stops() {
    let (disk, _, name) = one_segment();
    assert!(matches!(
        recover(&disk, Uuid::nil(), None),
        Err(OpenError::Corrupt { .. })
    ));
    let header = SegmentHeader {
        store: STORE,
        first_seq: Seq::new(2).unwrap(),
    }
    .encode();
    disk.edit(&name, |bytes| bytes[..header.len()].copy_from_slice(&header));
    assert!(matches!(
        recover(&disk, STORE, None),
        Err(OpenError::Corrupt { .. })
    ));
    disk.edit(&name, |bytes| bytes[4] = 9);
    assert!(matches!(
        recover(&disk, STORE, None),
        Err(OpenError::TooNew {
            found: 9,
            newest: FORMAT,
            ..
        })
    ));
}

/// Goal: a frame that this build cannot read is not taken for a torn one, and cut.
#[test]
fn recovery_8_a_frame_of_a_newer_format_stops() {
    let (disk, starts, name) = one_segment();
    disk.edit(&name, |bytes| {
        let header = &mut bytes[starts[2] as usize + ENVELOPE_BYTES..];
        header[4] = FORMAT as u8 + 1;
        let crc = crc32c::crc32c(&header[..92]);
        header[92..96].copy_from_slice(&crc.to_le_bytes());
    });
    let before = disk.open(&name).unwrap().len().unwrap();
    let why = |error: &dyn std::error::Error| error.source().unwrap().to_string();
    let refused = why(&recover(&disk, STORE, None).unwrap_err());
    assert!(refused.ends_with("use a newer one"), "{refused}");
    assert_eq!(disk.open(&name).unwrap().len().unwrap(), before);
    let read = Tail::from_start(STORE).follow::<crate::ReadError>(&disk, |_| Ok(()));
    assert_eq!(why(&read.unwrap_err()), refused);
    let verified = verify_log(&disk, STORE, None, &|_| None, &mut |_| {});
    assert_eq!(why(&verified.unwrap_err()), refused);
}

/// Goal: an older build refuses what it cannot read, by the header of its segment.
#[test]
fn nothing_is_appended_to_a_segment_of_an_older_format() {
    for is_empty in [false, true] {
        let (disk, _, name) = one_segment();
        disk.edit(&name, |bytes| {
            bytes[4] = 1;
            let crc = crc32c::crc32c(&bytes[..60]);
            bytes[60..64].copy_from_slice(&crc.to_le_bytes());
            if is_empty {
                bytes.truncate(SEGMENT_HEADER_BYTES);
            }
        });
        let mut log = open(&disk, None).unwrap();
        let begun = log.next_seq();
        for _ in 0..2 {
            let appended = log.append(&frame(log.next_seq())).unwrap();
            assert_eq!(appended.segment, SegmentId(begun));
        }
        log.sync().unwrap();
        assert_eq!(read_all(&disk), log.durable());
        disk.edit(&SegmentId(begun).file_name(), |bytes| {
            assert_eq!(SegmentHeader::format(bytes), Some(FORMAT));
        });
    }
}

#[test]
fn recovery_9_what_the_index_knew_is_not_numbered_again() {
    let (disk, starts, name) = one_segment();
    let last = read_all(&disk);
    disk.edit(&name, |bytes| bytes.truncate(starts[2] as usize));
    let state = recover(&disk, STORE, last).unwrap();
    assert_eq!(state.last, last);
    assert!(state.lost_after.unwrap() < last);
    disk.forget(&name);
    assert_eq!(recover(&disk, STORE, last).unwrap().lost_after, Some(None));
}

#[test]
fn a_failed_sync_is_final() {
    let (disk, _, _) = one_segment();
    let mut log = open(&disk, None).unwrap();
    let durable = log.durable();
    log.append(&frame(log.next_seq())).unwrap();
    disk.fail_next(Fault::Fails(io::ErrorKind::Other));
    assert!(matches!(log.sync(), Err(LogError::Io { action: "sync", .. })));
    assert!(
        matches!(log.sync(), Err(LogError::Poisoned { .. })),
        "a retry could lie"
    );
    assert!(matches!(
        log.append(&frame(log.next_seq())),
        Err(LogError::Poisoned { .. })
    ));
    assert_eq!(log.durable(), durable);
}

#[test]
fn a_sync_that_fails_on_another_thread_is_final_too() {
    for fails in [true, false] {
        let (disk, _, _) = one_segment();
        let mut log = open(&disk, None).unwrap();
        let durable = log.durable();
        log.append(&frame(log.next_seq())).unwrap();
        let job = log.begin_sync().unwrap().unwrap();
        log.append(&frame(log.next_seq())).unwrap();
        assert!(!log.is_synced().unwrap());
        assert_eq!(log.durable(), durable, "it is not done yet");
        if fails {
            disk.fail_next(Fault::Fails(io::ErrorKind::Other));
            assert!(matches!(job.run(), Err(LogError::Io { action: "sync", .. })));
        } else {
            drop(job);
        }
        assert!(matches!(log.is_synced(), Err(LogError::Poisoned { .. })));
        assert!(matches!(log.sync(), Err(LogError::Poisoned { .. })));
        let next = frame(log.next_seq());
        assert!(matches!(log.append(&next), Err(LogError::Poisoned { .. })));
        assert_eq!(log.durable(), durable);
    }
}

#[test]
fn a_sync_covers_what_was_appended_before_it_began() {
    let (disk, _, _) = one_segment();
    let mut log = open(&disk, None).unwrap();
    log.append(&frame(log.next_seq())).unwrap();
    let before = log.appended();
    let job = log.begin_sync().unwrap().unwrap();
    log.append(&frame(log.next_seq())).unwrap();
    assert_eq!(job.run().unwrap(), before);
    assert!(log.is_synced().unwrap());
    assert_eq!(log.durable(), before);
    assert_eq!(log.sync().unwrap(), log.appended());
}

#[test]
fn a_segment_is_not_followed_by_another_when_its_sync_has_failed() {
    let (disk, _, _) = one_segment();
    let mut log = open(&disk, None).unwrap();
    let segments_before = segments(&disk).unwrap();
    let durable = log.durable();
    log.append(&frame(log.next_seq())).unwrap();
    let job = log.begin_sync().unwrap().unwrap();
    let next = loop {
        let next = frame(log.next_seq());
        if !log.fits((ENVELOPE_BYTES + next.bytes().len()) as u64) {
            break next;
        }
        log.append(&next).unwrap();
    };
    disk.fail_next(Fault::Fails(io::ErrorKind::Other));
    job.run().unwrap_err();
    // The kernel tells of a failure once: a second sync would succeed.
    assert!(matches!(log.append(&next), Err(LogError::Poisoned { .. })));
    assert_eq!(segments(&disk).unwrap(), segments_before);
    assert_eq!(log.durable(), durable);
}

#[test]
fn a_segment_ends_late_while_the_disk_is_busy_but_it_ends() {
    let disk = FaultDisk::default();
    let mut log = open(&disk, None).unwrap();
    log.append(&frame(log.next_seq())).unwrap();
    let mut fill = |is_busy: bool| {
        disk.set_busy(is_busy);
        let begun = segments(&disk).unwrap().len();
        while segments(&disk).unwrap().len() == begun {
            log.append(&frame(log.next_seq())).unwrap();
        }
        let ended = segments(&disk).unwrap()[begun - 1].file_name();
        disk.open(&ended).unwrap().len().unwrap()
    };
    assert!(fill(false) <= SEGMENT_BYTES_MAX);
    let late = SEGMENT_BYTES_MAX + SEGMENT_BYTES_MAX / SEGMENT_LATE_PART;
    assert!((SEGMENT_BYTES_MAX + 1..=late).contains(&fill(true)));
    assert!(fill(false) <= SEGMENT_BYTES_MAX);
}

#[test]
fn a_disk_without_room_undoes_the_append_and_goes_on_later() {
    let (disk, _, name) = one_segment();
    let mut log = open(&disk, None).unwrap();
    let len = disk.open(&name).unwrap().len().unwrap();
    disk.leave_free(100);
    assert!(log.append(&frame(log.next_seq())).unwrap_err().is_full());
    assert_eq!(disk.open(&name).unwrap().len().unwrap(), len);
    disk.leave_free(u64::MAX);
    log.append(&frame(log.next_seq())).unwrap();
    log.sync().unwrap();
    assert_eq!(read_all(&disk), log.durable());
}

#[test]
fn a_full_store_refuses_before_its_bound_and_has_room_to_say_so() {
    let disk = FaultDisk::default();
    let state = recover(&disk, STORE, None).unwrap();
    let limits = LogLimits {
        store_bytes_max: Some(200_000),
        ..limits()
    };
    let mut log = LogWriter::new(Arc::new(disk.clone()), STORE, limits, state, None).unwrap();
    let error = loop {
        if let Err(error) = log.append(&frame(log.next_seq())) {
            break error;
        }
    };
    assert!(error.is_full());
    assert!(error.to_string().contains("store_bytes_max is 200000"), "{error}");
    assert!(log.log_bytes() < 150_000);
    let room = log.room().unwrap();
    assert_eq!((room.used_bytes, room.limit_bytes), (log.log_bytes(), 150_000));
    disk.tell_free(10);
    let room = log.room().unwrap();
    assert_eq!(room.limit_bytes, log.log_bytes() + 10);
    disk.tell_free(u64::MAX);
    let mut note = FrameBuilder::new(log.next_seq());
    note.push(
        BootNs(1),
        None,
        Origin::default(),
        RecordFlags::default(),
        Body::Stop,
        &[],
    )
    .unwrap();
    log.append(&note.seal(Uuid::nil(), 0).unwrap()).unwrap();
    assert!(matches!(
        log.append(&frame(Seq::FIRST)),
        Err(LogError::OutOfOrder { .. })
    ));
}
