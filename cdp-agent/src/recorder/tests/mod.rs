//! The recorder's decisions, driven event by event: no clock, no device.

use cdp_ebpf::event::EventKind;
use cdp_journal::BLOCK_BYTES;
use cdp_journal::format::{Frame, VolumeKind};
use proptest::prelude::*;

use super::*;
use crate::losses::Losses;

mod compare;
mod end;
mod size;

const DISK: DiskNumber = DiskNumber(7 << 20);
const SLOT: Slot = Slot(0);
const REGION: u64 = 64 << 10;
const BYTES: u64 = 16 * REGION;
const SECOND: u64 = 1_000_000_000;

fn volume_id() -> VolumeId {
    VolumeId::new(1).unwrap()
}

fn new_volume() -> NewVolume {
    NewVolume {
        id: volume_id(),
        name: "v".into(),
        path: "/dev/v".into(),
        disk: DISK,
        start_sector: 0,
        bytes: BYTES,
        region_bytes: REGION,
        blank: true,
        gaps: 0,
        last_exact: None,
        inexact_since: None,
        cause: None,
        exact: None,
    }
}

/// A recorder with one volume on one disk, watched since time 1.
fn recorder() -> Recorder {
    let mut recorder = Recorder::new(None, 0);
    recorder.add_disk(DISK, SLOT, false);
    recorder.add_volume(new_volume(), BootNs(1));
    recorder.attached(DISK, BootNs(1));
    recorder
}

/// The same after its first copy.
fn protected() -> Recorder {
    let mut recorder = recorder();
    read_everything(&mut recorder);
    assert!(recorder.try_close(volume_id(), None, BootNs(10 * SECOND)));
    recorder.seal();
    while recorder.take_sealed().is_some() {}
    recorder
}

fn read_everything(recorder: &mut Recorder) -> u64 {
    let mut bytes = 0;
    while let Some(run) = recorder.take_run(BYTES, |_| true) {
        bytes += run.bytes.end - run.bytes.start;
        recorder.run_done(&run, false);
    }
    bytes
}

fn write_event(sector: u64, bytes: u32, boot_ns: u64) -> WriteEvent {
    WriteEvent {
        kind: EventKind::Write as u8,
        op: Op::Write as u8,
        flags: 0,
        last: 1,
        disk: DISK.0,
        bio: 1,
        boot_ns,
        sector,
        bytes,
        pid: 42,
        comm: *b"writer\0\0\0\0\0\0\0\0\0\0",
    }
}

fn event(recorder: &mut Recorder, event: &Event<'_>) {
    recorder.event(event, RingPosition::default());
}

fn write(recorder: &mut Recorder, sector: u64, boot_ns: u64) {
    event(
        recorder,
        &Event::Write(write_event(sector, 4096, boot_ns), &[7; 4096]),
    );
}

fn completion(kind: EventKind, sector: u64, bytes: u32, failed: bool, boot_ns: u64) -> CompleteEvent {
    CompleteEvent {
        kind: kind as u8,
        op: Op::Write as u8,
        failed: u8::from(failed),
        whole_bio: 0,
        disk: DISK.0,
        bio: 0,
        boot_ns,
        sector,
        bytes,
        reserved: 0,
    }
}

fn complete(recorder: &mut Recorder, sector: u64, bytes: u32, failed: bool, boot_ns: u64) {
    let event = completion(EventKind::Complete, sector, bytes, failed, boot_ns);
    self::event(recorder, &Event::Complete(event));
}

fn changed(recorder: &mut Recorder, sector: u64, bytes: u32, boot_ns: u64) {
    let event = completion(EventKind::Changed, sector, bytes, false, boot_ns);
    self::event(recorder, &Event::Changed(event));
}

fn lose(recorder: &mut Recorder, dropped: u64, first_at: u64, now: u64, ring_position: u64, region: u64) {
    recorder.losses(
        SLOT,
        Losses {
            dropped: [dropped, 0, 0, 0],
            lost_completions: 0,
        },
        Some(BootNs(first_at)),
        BootNs(now),
        ring_position,
        std::slice::from_ref(&(region * REGION..(region + 1) * REGION)),
    );
}

/// All records so far, as (Seq, body).
fn records(recorder: &mut Recorder) -> Vec<(u64, Body)> {
    recorder.seal();
    let mut all = Vec::new();
    while let Some(sealed) = recorder.take_sealed() {
        let frame = sealed.builder.seal(uuid::Uuid::nil(), 0).unwrap();
        let frame = Frame::parse(frame.bytes()).unwrap();
        all.extend(
            frame
                .records
                .iter()
                .map(|placed| (placed.record.seq.get(), placed.record.body.clone())),
        );
    }
    all
}

fn state(recorder: &Recorder) -> State {
    recorder.volumes()[0].state
}

#[test]
fn the_oldest_record_is_known_until_its_frame_is_taken() {
    let mut recorder = protected();
    assert_eq!(recorder.oldest_here(), None);
    write(&mut recorder, 0, 11 * SECOND);
    write(&mut recorder, 8, 12 * SECOND);
    let oldest = Some(WallNs(11 * SECOND as i64));
    assert_eq!(recorder.oldest_here(), oldest);
    recorder.seal();
    write(&mut recorder, 16, 13 * SECOND);
    assert_eq!(recorder.oldest_here(), oldest);
    let taken = recorder.take_sealed().unwrap();
    assert_eq!(taken.begun, BootNs(11 * SECOND));
    assert_eq!(recorder.oldest_here(), Some(WallNs(13 * SECOND as i64)));
}

#[test]
fn a_volume_is_seeding_until_all_of_it_was_read() {
    let mut recorder = recorder();
    assert_eq!(state(&recorder), State::Seeding);
    assert!(
        !recorder.try_close(volume_id(), None, BootNs(10 * SECOND)),
        "nothing was read yet"
    );
    assert_eq!(read_everything(&mut recorder), BYTES);
    assert!(
        !recorder.try_close(volume_id(), None, BootNs(SECOND)),
        "a stranger may still be on its way"
    );
    let idle_too_early = Some(BootNs(2));
    assert!(!recorder.try_close(volume_id(), idle_too_early, BootNs(SECOND)));
    assert!(
        recorder.try_close(volume_id(), Some(BootNs(SECOND)), BootNs(SECOND)),
        "the disk was seen idle"
    );
    assert!(matches!(state(&recorder), State::Exact { .. }));
}

#[test]
fn nothing_is_read_before_the_probe_watches() {
    let mut recorder = recorder();
    recorder.volumes[0].attached = false;
    assert_eq!(recorder.take_run(BYTES, |_| true), None);
    recorder.attached(DISK, BootNs(2));
    assert!(recorder.take_run(BYTES, |_| true).is_some());
}

/// A drop's gap begins where the drop was, not where it was noticed: records that were in the ring before it
/// stay exact.
#[test]
fn a_gap_opens_right_before_the_first_record_that_is_not_older_than_the_loss() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    lose(&mut recorder, 1, 22 * SECOND, 23 * SECOND, 1000, 3);
    assert_eq!(
        recorder.take_run(BYTES, |_| true),
        None,
        "bytes read now would count as of an exact moment"
    );
    write(&mut recorder, 8, 21 * SECOND); // still in the ring when the drop was noticed
    write(&mut recorder, 16, 22 * SECOND);
    let records = records(&mut recorder);
    let bodies: Vec<&Body> = records.iter().map(|(_, body)| body).collect();
    let last_exact = Seq::new(records[1].0);
    assert!(
        matches!(
            bodies[..],
            [Body::Write { .. }, Body::Write { .. }, Body::GapOpen { cause: GapCause::RingOverflow, last_exact: found }, Body::Write { .. }]
                if *found == last_exact
        ),
        "{records:?}"
    );
    assert_eq!(state(&recorder), State::Resyncing(GapCause::RingOverflow));
    assert_eq!(recorder.volumes()[0].losses.ring_full, 1);
    let run = recorder.take_run(BYTES, |_| true).unwrap();
    assert_eq!(run.bytes, 3 * REGION..4 * REGION, "only what was lost is read");
}

#[test]
fn a_loss_behind_all_records_opens_its_gap_when_the_ring_is_empty() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    complete(&mut recorder, 0, 4096, false, 20 * SECOND);
    lose(&mut recorder, 1, 21 * SECOND, 22 * SECOND, 1000, 0);
    recorder.drained_to(999, BootNs(22 * SECOND));
    assert!(matches!(state(&recorder), State::Exact { .. }));
    recorder.drained_to(1000, BootNs(22 * SECOND));
    assert_eq!(state(&recorder), State::Resyncing(GapCause::RingOverflow));
    let records = records(&mut recorder);
    let expected = Body::GapOpen {
        cause: GapCause::RingOverflow,
        last_exact: Seq::new(records[0].0),
    };
    assert_eq!(records[1].1, expected);
}

/// Too long ago to tell where: none of the stretch counts, but what was exact before it still does.
#[test]
fn a_loss_without_a_place_takes_back_no_more_than_the_stretch_it_is_in() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    complete(&mut recorder, 0, 4096, true, 20 * SECOND);
    read_everything(&mut recorder);
    assert!(recorder.try_close(volume_id(), None, BootNs(40 * SECOND)));
    let State::Exact { seq: from, .. } = state(&recorder) else {
        panic!("not exact")
    };
    records(&mut recorder);
    lose(&mut recorder, 1, 0, 42 * SECOND, 1000, 0);
    recorder.drained_to(1000, BootNs(42 * SECOND));
    assert!(from.prev().is_some());
    assert_eq!(gaps_from(&mut recorder), [from.prev()]);
}

/// A bio is one unit: when a later chunk was dropped, its first chunks are not exact either.
#[test]
fn the_chunks_of_a_torn_bio_never_count_as_exact() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    complete(&mut recorder, 0, 4096, false, 20 * SECOND);
    let before = recorder.last_seq();
    let torn = WriteEvent {
        last: 0,
        ..write_event(8, 4096, 21 * SECOND)
    };
    event(&mut recorder, &Event::Write(torn, &[1; 4096]));
    recorder.no_loss();
    lose(&mut recorder, 1, 21 * SECOND, 21 * SECOND + 5, 1, 0);
    recorder.drained_to(1, BootNs(21 * SECOND + 6));
    let opened = records(&mut recorder).pop().unwrap().1;
    assert_eq!(
        opened,
        Body::GapOpen {
            cause: GapCause::RingOverflow,
            last_exact: before
        }
    );
}

#[test]
fn a_failed_write_opens_a_gap_before_it_and_its_region_is_read_again() {
    let mut recorder = protected();
    let exact = recorder.last_seq();
    write(&mut recorder, 0, 20 * SECOND);
    complete(&mut recorder, 0, 4096, true, 20 * SECOND + 1);
    assert_eq!(state(&recorder), State::Resyncing(GapCause::IoError));
    let opened = records(&mut recorder).pop().unwrap().1;
    assert_eq!(
        opened,
        Body::GapOpen {
            cause: GapCause::IoError,
            last_exact: exact
        }
    );
    assert_eq!(recorder.take_run(BYTES, |_| true).unwrap().bytes, 0..REGION);
}

/// A driver of whole bios may move a bio's iterator to its end before it ends it, failed or not.
#[test]
fn a_failed_bio_that_does_not_tell_where_it_was_is_a_gap_all_the_same() {
    let mut recorder = protected();
    recorder.disks[0].bio_based = true;
    let event = write_event(8, 4096, 20 * SECOND);
    self::event(&mut recorder, &Event::Write(event, &[1; 4096]));
    let failed = CompleteEvent {
        whole_bio: 1,
        bio: event.bio,
        ..completion(EventKind::Complete, 16, 0, true, 21 * SECOND)
    };
    self::event(&mut recorder, &Event::Complete(failed));
    assert_eq!(state(&recorder), State::Resyncing(GapCause::IoError));
    assert_eq!(recorder.take_run(BYTES, |_| true).unwrap().bytes, 0..REGION);
}

#[test]
fn a_write_that_was_under_way_before_the_probe_is_read_again() {
    let mut recorder = recorder();
    read_everything(&mut recorder);
    complete(&mut recorder, 5 * 128, 4096, false, 2);
    assert!(!recorder.try_close(volume_id(), None, BootNs(10 * SECOND)));
    assert_eq!(
        recorder.take_run(BYTES, |_| true).unwrap().bytes,
        5 * REGION..6 * REGION
    );
}

#[test]
fn a_late_stranger_takes_back_what_was_called_exact() {
    let mut recorder = protected();
    let State::Exact { seq, .. } = state(&recorder) else {
        panic!("not exact")
    };
    write(&mut recorder, 8, 20 * SECOND);
    complete(&mut recorder, 0, 4096, false, 20 * SECOND);
    let opened = records(&mut recorder).pop().unwrap().1;
    assert!(
        matches!(opened, Body::GapOpen { last_exact, .. } if last_exact == seq.prev()),
        "{opened:?}"
    );
}

#[test]
fn reading_back_waits_for_writes_that_are_older_than_the_note() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    let noted = recorder.last_seq();
    recorder.everything_unknown(noted, BootNs(21 * SECOND));
    let run = recorder.take_run(BYTES, |_| true).unwrap();
    assert!(recorder.in_flight(&run, noted).is_some());
    write(&mut recorder, 0, 22 * SECOND);
    complete(&mut recorder, 0, 4096, false, 23 * SECOND);
    assert!(
        recorder.in_flight(&run, noted).is_some(),
        "the completion may be the younger one's"
    );
    complete(&mut recorder, 0, 4096, false, 24 * SECOND);
    assert!(recorder.in_flight(&run, noted).is_none());
}

/// Where the gaps begin that were opened since the last look at the records.
fn gaps_from(recorder: &mut Recorder) -> Vec<Option<Seq>> {
    let gaps = records(recorder).into_iter().filter_map(|(_, body)| match body {
        Body::GapOpen { last_exact, .. } => Some(last_exact),
        _ => None,
    });
    gaps.collect()
}

/// A suspect whose region becomes dirty is not compared any more: no moment since its write is exact. Nor where the
/// news that it is one may be what was lost: the write was in flight then.
#[test]
fn a_gap_begins_before_what_was_in_doubt() {
    for (has_ended, was_changed) in [(false, false), (true, false), (true, true)] {
        let mut recorder = protected();
        write(&mut recorder, 8, 20 * SECOND);
        let in_doubt = recorder.last_seq().unwrap();
        write(&mut recorder, 800, 21 * SECOND);
        let last_exact = recorder.last_seq();
        records(&mut recorder);
        if was_changed {
            changed(&mut recorder, 8, 4096, 22 * SECOND);
        }
        if has_ended {
            complete(&mut recorder, 8, 4096, false, 22 * SECOND);
        }
        lose(&mut recorder, 1, 23 * SECOND, 24 * SECOND, 1, 0);
        recorder.drained_to(1, BootNs(24 * SECOND));
        let expected = if has_ended && !was_changed {
            last_exact
        } else {
            in_doubt.prev()
        };
        assert_eq!(gaps_from(&mut recorder), [expected], "{has_ended} {was_changed}");
        assert_eq!(recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true), None);
    }
}

/// Also if the gap is open already, for another reason.
#[test]
fn an_open_gap_begins_before_a_write_of_which_news_was_lost() {
    let mut recorder = protected();
    write(&mut recorder, 8, 20 * SECOND);
    let in_doubt = recorder.last_seq().unwrap();
    write(&mut recorder, 800, 21 * SECOND);
    complete(&mut recorder, 800, 4096, true, 22 * SECOND);
    assert_eq!(gaps_from(&mut recorder), [Some(in_doubt)]);
    lose(&mut recorder, 1, 23 * SECOND, 24 * SECOND, 1, 0);
    assert_eq!(gaps_from(&mut recorder), [in_doubt.prev()]);
}

/// A write may be dropped after the counters were read and before the marks are taken: it is counted at the next look, and
/// its mark is not there any more.
#[test]
fn a_gap_does_not_close_while_a_write_may_be_on_its_way_whose_mark_was_taken_before_it_was_counted() {
    let mut recorder = protected();
    lose(&mut recorder, 1, 20 * SECOND, 21 * SECOND, 1, 0);
    recorder.drained_to(1, BootNs(21 * SECOND));
    let counted_late = Losses {
        dropped: [1, 0, 0, 0],
        lost_completions: 0,
    };
    recorder.losses(SLOT, counted_late, None, BootNs(22 * SECOND), 1, &[]);
    read_everything(&mut recorder);
    // It was queued before the marks were taken.
    assert!(!recorder.try_close(volume_id(), None, BootNs(23 * SECOND)));
    assert!(recorder.try_close(volume_id(), None, BootNs(25 * SECOND)));
}

/// A long write is copied before it finds no room: it is counted after one that was queued later, and its mark may have been
/// found with that one's. Captured in between: a write that the moments before the gap must not show without it.
#[test]
fn a_gap_begins_before_a_write_that_was_queued_earlier_and_counted_later() {
    for (has_mark, is_placed) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut recorder = protected();
        write(&mut recorder, 0, 20 * SECOND);
        let before = recorder.last_seq();
        write(&mut recorder, 8, 21 * SECOND + 2);
        complete(&mut recorder, 0, 2 * 4096, false, 21 * SECOND + 3);
        lose(&mut recorder, 1, 21 * SECOND + 4, 22 * SECOND, 1, 4);
        if is_placed {
            recorder.drained_to(1, BootNs(22 * SECOND));
            assert_eq!(gaps_from(&mut recorder), [Seq::new(before.unwrap().get() + 1)]);
        }
        let counted_late = Losses {
            dropped: [1, 0, 0, 0],
            lost_completions: 0,
        };
        let first_at = Some(BootNs(21 * SECOND + 1));
        let mark = 4 * REGION..5 * REGION;
        let marks = &std::slice::from_ref(&mark)[..usize::from(has_mark)];
        recorder.losses(SLOT, counted_late, first_at, BootNs(23 * SECOND), 2, marks);
        recorder.drained_to(2, BootNs(23 * SECOND));
        assert_eq!(gaps_from(&mut recorder), [before], "{has_mark} {is_placed}");
    }
}

/// A loss waits for its place among the records; another gap must not open behind it meanwhile.
#[test]
fn a_gap_that_opens_while_a_loss_waits_for_its_place_begins_before_the_loss() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    let before = recorder.last_seq();
    lose(&mut recorder, 1, 21 * SECOND, 22 * SECOND, 1000, 4);
    recorder.note(BootNs(22 * SECOND), None, Body::Tick);
    let look = recorder.look();
    recorder.size_found(volume_id(), BYTES, look, BootNs(22 * SECOND));
    recorder.size_found(volume_id(), 2 * BYTES, look, BootNs(23 * SECOND));
    let opened = records(&mut recorder);
    assert!(
        opened
            .iter()
            .any(|(_, body)| matches!(body, Body::GapOpen { last_exact, .. } if *last_exact == before)),
        "{opened:?}"
    );
}

/// A full store: Seqs are given anew, the gap is recorded, reads of before are void, and when there is room
/// everything is read.
#[test]
fn a_full_store_is_a_gap_until_there_is_room() {
    let mut recorder = protected();
    let next = Seq::after(recorder.last_seq());
    recorder.everything_unknown(recorder.last_seq(), BootNs(19 * SECOND));
    let run = recorder.take_run(REGION, |_| true).unwrap();
    write(&mut recorder, 0, 20 * SECOND);
    recorder.store_full(next, Epoch(1), BootNs(21 * SECOND));
    assert_eq!(
        records(&mut recorder),
        vec![(
            next.get(),
            Body::GapOpen {
                cause: GapCause::SpoolFull,
                last_exact: next.prev()
            }
        )]
    );
    write(&mut recorder, 0, 22 * SECOND);
    assert!(recorder.read_back(&run, 0..4096, next.prev(), Some(&[1; 4096]), BootNs(23 * SECOND)));
    recorder.run_done(&run, false);
    recorder.tick(BootNs(30 * SECOND));
    assert!(
        records(&mut recorder).is_empty(),
        "nothing is journaled while the store is full"
    );
    assert_eq!(recorder.take_run(BYTES, |_| true), None);
    recorder.room_again(BootNs(31 * SECOND));
    assert_eq!(read_everything(&mut recorder), BYTES);
}

/// A store that fills up before it took the volume's declaration gets it again: what is recorded later must not be of
/// a volume that nobody declared.
#[test]
fn what_a_full_store_lost_of_the_declarations_is_recorded_again() {
    let mut recorder = protected();
    let id = recorder.volumes[0].id;
    let volume = |bytes| Body::Volume {
        kind: VolumeKind::Block,
        bytes,
        name: "v".into(),
        path: "/dev/v".into(),
    };
    let next = Seq::after(recorder.last_seq());
    for bytes in [BYTES / 2, BYTES] {
        recorder.note(BootNs(19 * SECOND), Some(id), volume(bytes));
    }
    write(&mut recorder, 0, 20 * SECOND);
    recorder.store_full(next, Epoch(1), BootNs(21 * SECOND));
    assert_eq!(records(&mut recorder)[0], (next.get(), volume(BYTES)));
    recorder.room_again(BootNs(22 * SECOND));
    let next = Seq::after(recorder.last_seq());
    recorder.store_full(next, Epoch(2), BootNs(23 * SECOND));
    let records = records(&mut recorder);
    assert!(matches!(records[..], [(_, Body::GapOpen { .. })]), "{records:?}");
}

/// A gap that is open may have begun after the first event that was skipped.
#[test]
fn skipped_events_reach_back_before_an_open_gap() {
    let mut recorder = protected();
    let looked = recorder.last_seq();
    write(&mut recorder, 0, 20 * SECOND);
    complete(&mut recorder, 0, 4096, false, 20 * SECOND);
    lose(&mut recorder, 1, 21 * SECOND, 21 * SECOND, 1, 1);
    recorder.drained_to(1, BootNs(21 * SECOND));
    recorder.everything_unknown(looked, BootNs(22 * SECOND));
    let gaps: Vec<Body> = records(&mut recorder)
        .into_iter()
        .skip(1)
        .map(|(_, body)| body)
        .collect();
    let gap = |last_exact| Body::GapOpen {
        cause: GapCause::RingOverflow,
        last_exact,
    };
    assert_eq!(gaps, [gap(looked.map(Seq::next)), gap(looked)]);
}

/// What was lost may be what ended later; what had ended before it is a stranger's.
#[test]
fn a_stranger_that_ended_before_a_loss_is_not_what_was_lost() {
    for (ended_at, is_strangers) in [(20 * SECOND, true), (22 * SECOND, false)] {
        let mut recorder = protected();
        let State::Exact { seq: exact_from, .. } = state(&recorder) else {
            panic!("it is not exact");
        };
        lose(&mut recorder, 1, 21 * SECOND, 23 * SECOND, 1, 1);
        complete(&mut recorder, 64, 4096, false, ended_at);
        recorder.drained_to(1, BootNs(23 * SECOND));
        let Some((_, Body::GapOpen { last_exact, .. })) = records(&mut recorder).pop() else {
            panic!("no gap");
        };
        assert_eq!(last_exact < Some(exact_from), is_strangers, "ended at {ended_at}");
    }
}

#[test]
fn quiet_time_is_covered_ever_more_seldom() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    let mut ticks = Vec::new();
    for ms in (0..20_000).step_by(10) {
        let now = BootNs(20 * SECOND + ms * 1_000_000);
        let before = recorder.last_seq();
        recorder.tick(now);
        if recorder.last_seq() != before {
            ticks.push(ms);
        }
    }
    assert!(ticks[0] <= 60 && ticks.len() < 60, "{ticks:?}");
    assert!(
        ticks.windows(2).all(|pair| pair[1] - pair[0] <= 1000),
        "{ticks:?}"
    );
}

#[test]
fn a_bio_is_cut_to_the_volumes_it_touches() {
    let mut recorder = Recorder::new(None, 0);
    recorder.add_disk(DISK, SLOT, false);
    for (id, start_sector) in [(1, 8), (2, 16)] {
        recorder.add_volume(
            NewVolume {
                id: VolumeId::new(id).unwrap(),
                name: format!("v{id}"),
                path: "/dev/v".into(),
                disk: DISK,
                start_sector,
                bytes: 4096,
                region_bytes: REGION,
                blank: true,
                gaps: 0,
                last_exact: None,
                inexact_since: None,
                cause: None,
                exact: None,
            },
            BootNs(1),
        );
    }
    let data: Vec<u8> = (0..4 * 4096u32).map(|i| (i / 512) as u8).collect();
    event(&mut recorder, &Event::Write(write_event(4, 4 * 4096, 5), &data));
    let written: Vec<Body> = records(&mut recorder).into_iter().map(|(_, body)| body).collect();
    assert_eq!(written, vec![Body::Write { offset: 0, len: 4096 }; 2]);
}

proptest! {
    /// Goal: Seqs are dense and gaps alternate whatever happens. Method: random events; the volume's records
    /// must never close a gap that is not open, nor call a place exact that lies behind its own record.
    #[test]
    fn gaps_open_and_close_in_turn(steps in prop::collection::vec((0u8..7, 0u64..128), 1..300)) {
        let mut recorder = recorder();
        let mut now = 2;
        let mut dropped = 0;
        for (kind, place) in steps {
            now += SECOND / 3;
            match kind {
                0 | 1 => write(&mut recorder, place * 8, now),
                2 => complete(&mut recorder, place * 8, 4096, place % 16 == 0, now),
                3 => {
                    dropped += 1;
                    lose(&mut recorder, dropped, now - SECOND / 6, now, now, place / 8);
                }
                4 => recorder.drained_to(now, BootNs(now)),
                5 => { read_everything(&mut recorder); }
                _ => { recorder.try_close(volume_id(), Some(BootNs(now)), BootNs(now)); }
            }
            recorder.no_loss();
            while recorder.sealed.len() > 2 { recorder.take_sealed(); }
        }
        let mut expected = None;
        let mut is_exact = None;
        let mut began = None;
        for (seq, body) in records(&mut recorder) {
            prop_assert!(expected.is_none_or(|expected| seq == expected), "seq {} after {:?}", seq, expected);
            expected = Some(seq + 1);
            match body {
                Body::GapClose => {
                    prop_assert_ne!(is_exact, Some(true), "closed twice at {}", seq);
                    is_exact = Some(true);
                }
                Body::GapOpen { last_exact, .. } => {
                    if is_exact == Some(false) {
                        prop_assert!(last_exact < began, "opened twice at {}, and no earlier", seq);
                    }
                    prop_assert!(last_exact.is_none_or(|last| last.get() < seq));
                    (is_exact, began) = (Some(false), last_exact);
                }
                _ => {}
            }
        }
    }
}
