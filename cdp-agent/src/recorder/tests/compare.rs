//! What is compared with the device, and what comes of it.

use super::*;

fn block_run(suspicion: &Suspicion, block: u64) -> Run {
    Run {
        volume: suspicion.volume,
        bytes: block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES,
        blank: false,
        epoch: suspicion.epoch,
    }
}

#[test]
fn what_changed_in_flight_corrects_the_record_that_wrote_it() {
    let mut recorder = protected();
    write(&mut recorder, 8, 20 * SECOND);
    let written_by = recorder.last_seq();
    changed(&mut recorder, 8, 4096, 21 * SECOND);
    complete(&mut recorder, 8, 4096, false, 21 * SECOND);
    let mark = recorder.suspicions();
    let suspicion = recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true).unwrap();
    assert_eq!(suspicion.ranges, vec![BLOCK_BYTES..2 * BLOCK_BYTES]);
    records(&mut recorder);
    let run = block_run(&suspicion, 1);
    assert!(recorder.correct(&run, written_by, Some(&[9; 4096]), BootNs(22 * SECOND)));
    assert!(!recorder.is_clear(&mark));
    recorder.suspects_done(suspicion.volume, true);
    assert!(recorder.is_clear(&mark));
    let (_, body) = records(&mut recorder).pop().unwrap();
    assert!(
        matches!(body, Body::ReadBack { offset, as_of, .. } if offset == BLOCK_BYTES && as_of == written_by),
        "{body:?}"
    );
    assert!(matches!(state(&recorder), State::Exact { .. }));
}

#[test]
fn a_block_that_is_written_or_lost_while_it_is_compared_is_not_corrected() {
    for lost in [false, true] {
        let mut recorder = protected();
        write(&mut recorder, 8, 20 * SECOND);
        changed(&mut recorder, 8, 4096, 21 * SECOND);
        complete(&mut recorder, 8, 4096, false, 21 * SECOND);
        let suspicion = recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true).unwrap();
        if lost {
            lose(&mut recorder, 1, 21 * SECOND, 22 * SECOND, 1, 0);
        } else {
            write(&mut recorder, 8, 22 * SECOND);
        }
        records(&mut recorder);
        let run = block_run(&suspicion, 1);
        assert!(recorder.correct(&run, None, Some(&[9; 4096]), BootNs(23 * SECOND)));
        assert!(records(&mut recorder).is_empty(), "lost: {lost}");
        recorder.suspects_done(suspicion.volume, true);
        assert_eq!(recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true), None);
        recorder.drained_to(1, BootNs(23 * SECOND));
        assert_eq!(
            recorder.take_run(BYTES, |_| true).is_some(),
            lost,
            "what was lost is read back"
        );
    }
}

/// A dropped write of zeroes over a captured one leaves zeroes that the log does not know.
#[test]
fn what_was_lost_during_the_first_copy_is_compared() {
    let mut recorder = recorder();
    write(&mut recorder, 0, 2);
    lose(&mut recorder, 1, 3, 4, 1, 0);
    recorder.drained_to(1, BootNs(4));
    let run = recorder.take_run(BYTES, |_| true).unwrap();
    assert!(!run.blank && run.bytes == (0..REGION), "{run:?}");
    recorder.run_done(&run, false);
    assert!(recorder.take_run(BYTES, |_| true).unwrap().blank, "the rest is");
}

/// What the device holds after a write that nobody captured must not correct a record of before: its moments are
/// exact.
#[test]
fn a_suspect_in_a_region_that_became_dirty_is_read_back_and_not_compared() {
    for stranger in [false, true] {
        let mut recorder = protected();
        write(&mut recorder, 8, 20 * SECOND);
        complete(&mut recorder, 8, 4096, false, 20 * SECOND);
        if stranger {
            changed(&mut recorder, 8, 4096, 21 * SECOND);
            complete(&mut recorder, 8, 4096, false, 21 * SECOND);
        } else {
            lose(&mut recorder, 1, 21 * SECOND, 22 * SECOND, 1, 0);
            changed(&mut recorder, 8, 4096, 22 * SECOND);
        }
        recorder.drained_to(1, BootNs(22 * SECOND));
        assert_eq!(
            recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true),
            None,
            "stranger: {stranger}"
        );
        assert_eq!(recorder.take_run(BYTES, |_| true).unwrap().bytes, 0..REGION);
    }
}

#[test]
fn of_writes_in_flight_to_one_place_the_overlap_is_compared() {
    let mut recorder = protected();
    write(&mut recorder, 8, 20 * SECOND);
    assert_eq!(recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true), None);
    write(&mut recorder, 12, 20 * SECOND);
    let suspicion = recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true).unwrap();
    assert_eq!(suspicion.ranges, vec![BLOCK_BYTES..3 * BLOCK_BYTES]);
}

#[test]
fn more_changes_in_flight_than_can_be_compared_are_a_gap() {
    let mut recorder = recorder();
    let bytes = (suspects::SUSPECT_BLOCKS_MAX as u64 + 1) * BLOCK_BYTES;
    let look = recorder.look();
    recorder.size_found(volume_id(), bytes, look, BootNs(1));
    recorder.attached(DISK, BootNs(1));
    read_everything(&mut recorder);
    assert!(recorder.try_close(volume_id(), None, BootNs(10 * SECOND)));
    let last_exact = recorder.last_seq();
    let discard = WriteEvent {
        op: Op::Discard as u8,
        ..write_event(0, bytes as u32, 20 * SECOND)
    };
    event(&mut recorder, &Event::Write(discard, &[]));
    records(&mut recorder);
    changed(&mut recorder, 0, bytes as u32, 20 * SECOND);
    assert_eq!(state(&recorder), State::Resyncing(GapCause::ChangedInFlight));
    assert_eq!(gaps_from(&mut recorder), [last_exact]);
    assert_eq!(recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true), None);
    assert!(recorder.take_run(REGION, |_| true).is_some());
}

/// An end that nobody saw may have been that of changed pages: the block is compared. One that comes late after all
/// is no stranger's: what it wrote is known.
#[test]
fn a_write_whose_end_was_not_seen_is_compared_and_may_end_late() {
    let mut recorder = protected();
    recorder.drained_to(0, BootNs(20 * SECOND));
    write(&mut recorder, 8, 20 * SECOND);
    for seconds in [30, 40] {
        assert_eq!(recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true), None);
        recorder.drained_to(0, BootNs(seconds * SECOND));
    }
    for at in [41, 42] {
        let suspicion = recorder
            .take_suspects(SUSPECT_BLOCKS_MAX, |_| true)
            .expect("it is compared");
        assert_eq!(suspicion.ranges, vec![BLOCK_BYTES..2 * BLOCK_BYTES]);
        recorder.suspects_done(volume_id(), true);
        assert_eq!(recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true), None);
        complete(&mut recorder, 8, 4096, false, at * SECOND);
    }
    assert!(
        matches!(state(&recorder), State::Resyncing(_)),
        "only one write was given up: the second end is a stranger's"
    );
}

/// What ended while others might have been on their way is read once more, when they cannot be any more.
#[test]
fn an_end_that_may_have_been_another_writes_is_read_once_more() {
    let mut recorder = recorder();
    write(&mut recorder, 8, SECOND);
    complete(&mut recorder, 8, 4096, false, 2 * SECOND);
    assert_eq!(read_everything(&mut recorder), BYTES);
    let quiet = |since: u64| Some(BootNs(since + PLUG_TIME.as_nanos() as u64 + 1));
    assert!(!recorder.try_close(volume_id(), quiet(1), BootNs(2 * SECOND)));
    let idle_at = quiet(2 * SECOND);
    assert!(!recorder.try_close(volume_id(), idle_at, BootNs(3 * SECOND)));
    assert_eq!(read_everything(&mut recorder), REGION);
    complete(&mut recorder, 8, 4096, false, 2 * SECOND);
    assert!(!recorder.try_close(volume_id(), idle_at, BootNs(3 * SECOND)));
    assert_eq!(read_everything(&mut recorder), REGION, "a stranger's");
    assert!(recorder.try_close(volume_id(), idle_at, BootNs(6 * SECOND)));
}

/// A suspect that is read once more, or again after a failure, is settled: nobody waits for it for ever.
#[test]
fn a_suspect_that_is_read_back_instead_is_not_waited_for() {
    let mut recorder = recorder();
    write(&mut recorder, 8, SECOND);
    assert_eq!(read_everything(&mut recorder), BYTES);
    changed(&mut recorder, 8, 4096, 2 * SECOND);
    complete(&mut recorder, 8, 4096, false, 2 * SECOND);
    let mark = recorder.suspicions();
    assert!(!recorder.is_clear(&mark));
    assert!(!recorder.try_close(volume_id(), None, BootNs(9 * SECOND)));
    let run = recorder
        .take_run(BYTES, |_| true)
        .expect("its place is read once more");
    changed(&mut recorder, 8, 4096, 10 * SECOND);
    recorder.run_done(&run, true);
    assert_eq!(read_everything(&mut recorder), REGION);
    assert!(recorder.is_clear(&mark));
    assert!(recorder.try_close(volume_id(), None, BootNs(19 * SECOND)));
}

#[test]
fn a_write_whose_end_was_not_seen_can_be_given_up() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    let noted = recorder.last_seq();
    recorder.everything_unknown(noted, BootNs(21 * SECOND));
    let run = recorder.take_run(BYTES, |_| true).unwrap();
    write(&mut recorder, 0, 22 * SECOND);
    recorder.ended(&run, noted);
    assert!(recorder.in_flight(&run, noted).is_none());
    assert!(recorder.in_flight(&run, recorder.last_seq()).is_some());
}

/// Whoever waits for what was written waits for a write whose end the kernel skipped: until it is given up, and then
/// until it is compared.
#[test]
fn a_write_whose_end_was_not_seen_is_waited_for_until_it_was_compared() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    let last = recorder.last_seq();
    assert!(!recorder.have_ended(last));
    assert!(
        recorder.have_ended(last.and_then(Seq::prev)),
        "what came before has"
    );
    assert_eq!(recorder.oldest_in_flight(DISK), last);
    recorder.give_up(DISK, last);
    assert!(recorder.have_ended(last));
    let mark = recorder.suspicions();
    assert!(!recorder.is_clear(&mark));
    let suspicion = recorder
        .take_suspects(SUSPECT_BLOCKS_MAX, |_| true)
        .expect("its block is compared");
    recorder.suspects_done(suspicion.volume, true);
    assert!(recorder.is_clear(&mark));
}

/// What is compared before a write has landed is compared in vain: a lost completion ends none of those in flight.
#[test]
fn a_lost_completion_ends_no_write() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    let lost = Losses {
        dropped: [0; 4],
        lost_completions: 1,
    };
    let at = BootNs(21 * SECOND);
    recorder.losses(
        SLOT,
        lost,
        Some(at),
        at,
        1,
        std::slice::from_ref(&(REGION..2 * REGION)),
    );
    recorder.drained_to(1, at);
    assert!(!recorder.have_ended(recorder.last_seq()));
    assert!(recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true).is_none());
}

/// The end of a write that had been given up: the notes for the next agent may call it settled by then.
#[test]
fn a_write_that_comes_into_doubt_late_is_told() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    let last = recorder.last_seq();
    recorder.give_up(DISK, last);
    assert_eq!(recorder.take_reopened(), last);
    write(&mut recorder, 64, 21 * SECOND);
    assert_eq!(recorder.take_reopened(), None);
    complete(&mut recorder, 0, 4096, false, 22 * SECOND);
    assert_eq!(recorder.take_reopened(), last);
}

/// A region of it that is dirty already is read back, which hides how the write ended there.
#[test]
fn a_suspect_that_reaches_into_a_dirty_region_is_in_doubt() {
    for lost_region in [1, 2] {
        let mut recorder = protected();
        let before = recorder.last_seq();
        let bytes = 2 * REGION as u32;
        let bio = write_event(0, bytes, 20 * SECOND);
        event(&mut recorder, &Event::Write(bio, &vec![7; bytes as usize]));
        let written = recorder.last_seq();
        lose(&mut recorder, 1, 22 * SECOND, 23 * SECOND, 1, lost_region);
        changed(&mut recorder, 0, bytes, 21 * SECOND);
        complete(&mut recorder, 0, bytes, false, 21 * SECOND);
        recorder.drained_to(1, BootNs(23 * SECOND));
        let is_hit = lost_region == 1;
        assert_eq!(gaps_from(&mut recorder), [if is_hit { before } else { written }]);
        let to_compare = 0..if is_hit { REGION } else { 2 * REGION };
        assert_eq!(
            recorder
                .take_suspects(SUSPECT_BLOCKS_MAX, |_| true)
                .unwrap()
                .ranges,
            [to_compare]
        );
    }
}

/// Agents that are killed every few seconds hand on no more than the last of them recorded.
#[test]
fn what_an_agent_recorded_long_ago_is_not_waited_for_again() {
    let mut recorder = protected();
    let [old, young] = [100, 101].map(|seq| Seq::new(seq).unwrap());
    for (place, seq, age) in [
        (0, old, FLIGHT_TIME_MAX + PLUG_TIME),
        (8192, young, FLIGHT_TIME_MAX),
    ] {
        recorder.recorded_before(volume_id(), &(place..place + 4096), seq, age);
    }
    assert_eq!(recorder.unsettled(), old);
    recorder.drained_to(1, BootNs(20 * SECOND));
    assert_eq!(recorder.oldest_in_flight(DISK), Some(young));
    let suspicion = recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true).unwrap();
    assert_eq!(suspicion.ranges, [0..4096, 8192..12288]);
    assert_eq!(recorder.unsettled(), old, "it is not compared yet");
    recorder.suspects_done(volume_id(), true);
    assert_eq!(recorder.unsettled(), young);
}

/// Nor are those for ever in doubt again when their place is written anew.
#[test]
fn what_an_agent_recorded_before_memory_is_compared_once() {
    let mut recorder = protected();
    let old = recorder.last_seq().unwrap();
    recorder.recorded_before(volume_id(), &(0..4096), old, MEMORY_TIME + PLUG_TIME);
    assert_eq!(recorder.oldest_in_flight(DISK), None);
    assert_eq!(recorder.unsettled(), old, "it is not compared yet");
    assert_eq!(
        recorder
            .take_suspects(SUSPECT_BLOCKS_MAX, |_| true)
            .unwrap()
            .ranges
            .first(),
        Some(&(0..4096))
    );
    recorder.suspects_done(volume_id(), true);
    write(&mut recorder, 0, 20 * SECOND);
    assert_eq!(recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true), None);
    assert_eq!(Some(recorder.unsettled()), recorder.last_seq());
}

/// Goal: no volume keeps another from being compared, not with ever new suspects, and not with a device that cannot be read.
/// Method: two volumes, one block at a time; then one of them may not be read.
#[test]
fn volumes_take_turns_to_be_compared() {
    let mut recorder = recorder();
    let (first, second) = (volume_id(), VolumeId::new(volume_id().get() + 1).unwrap());
    let volume = NewVolume {
        id: second,
        name: "w".into(),
        start_sector: BYTES / SECTOR_BYTES,
        ..new_volume()
    };
    recorder.add_volume(volume, BootNs(1));
    for volume in &mut recorder.volumes {
        assert!(volume.suspects.raise(&(0..3 * BLOCK_BYTES), Seq::FIRST));
    }
    let mut turns = Vec::new();
    for _ in 0..4 {
        let suspicion = recorder.take_suspects(1, |_| true).unwrap();
        turns.push(suspicion.volume);
        recorder.suspects_done(suspicion.volume, true);
    }
    assert_eq!(turns, [first, second, first, second]);
    let suspicion = recorder.take_suspects(1, |volume| volume != first);
    assert_eq!(suspicion.unwrap().volume, second);
    recorder.suspects_done(second, true);
    assert_eq!(recorder.take_suspects(1, |volume| volume != first), None);
    assert_eq!(
        (recorder.suspect_blocks(first), recorder.suspect_blocks(second)),
        (1, 0)
    );
}
