//! Where history ends when a volume is not watched any more.

use super::*;

const NOW: BootNs = BootNs(20 * SECOND);

/// What the log is told last of the volume: cause and last exact record of its gap.
fn last_gap(records: &[(u64, Body)]) -> (GapCause, Option<Seq>) {
    let gap = records.iter().rev().find_map(|(_, body)| match body {
        Body::GapOpen { cause, last_exact } => Some((*cause, *last_exact)),
        _ => None,
    });
    gap.unwrap()
}

fn look(recorder: &mut Recorder, at: u64) {
    let look = recorder.look();
    recorder.size_found(volume_id(), BYTES, look, BootNs(at));
}

#[test]
fn a_volume_whose_device_is_gone_is_exact_up_to_the_last_look() {
    let mut recorder = protected();
    write(&mut recorder, 0, 11 * SECOND);
    complete(&mut recorder, 0, 4096, false, 12 * SECOND);
    let seen = recorder.last_seq();
    look(&mut recorder, 13 * SECOND);
    write(&mut recorder, 8, 14 * SECOND);
    complete(&mut recorder, 8, 4096, false, 15 * SECOND);
    let ended = recorder.end_volume(volume_id(), End::Detached, NOW).unwrap();
    assert_eq!((ended.cause, ended.last_exact), (GapCause::Detached, seen));
    assert_eq!(last_gap(&records(&mut recorder)), (GapCause::Detached, seen));
    assert!(recorder.volumes().is_empty());
}

/// Goal: while the log stalls, a volume may have to wait until it is forgotten, and what is recorded meanwhile is of nobody
/// knows which disk. Method: writes, read-backs and the end of the gap after the device was found to be gone.
#[test]
fn nothing_that_is_recorded_of_a_device_that_is_gone_is_exact() {
    let mut recorder = protected();
    write(&mut recorder, 0, 11 * SECOND);
    complete(&mut recorder, 0, 4096, false, 12 * SECOND);
    let seen = recorder.last_seq();
    look(&mut recorder, 13 * SECOND);
    let mut told = Vec::new();
    for again in 0..2 {
        recorder.device_gone(volume_id(), BootNs(14 * SECOND + again));
        told.extend(records(&mut recorder));
        assert_eq!(last_gap(&told), (GapCause::Detached, seen));
        write(&mut recorder, 8, (15 + again) * SECOND);
        complete(&mut recorder, 8, 4096, false, (15 + again) * SECOND);
        assert!(recorder.take_run(u64::MAX, |_| true).is_none());
        assert!(!recorder.try_close(volume_id(), Some(NOW), NOW));
    }
    let ended = recorder.end_volume(volume_id(), End::Detached, NOW).unwrap();
    assert_eq!((ended.cause, ended.last_exact), (GapCause::Detached, seen));
}

#[test]
fn a_write_that_was_in_flight_when_the_device_went_is_no_part_of_what_is_exact() {
    for (end, is_told) in [
        (End::Detached, false),
        (End::Detached, true),
        (End::NotWanted, false),
    ] {
        let mut recorder = protected();
        let before = recorder.last_seq();
        write(&mut recorder, 0, 11 * SECOND);
        write(&mut recorder, 8, 12 * SECOND);
        complete(&mut recorder, 8, 4096, false, 13 * SECOND);
        look(&mut recorder, 14 * SECOND);
        if is_told {
            recorder.device_gone(volume_id(), BootNs(15 * SECOND));
            // Too late to count.
            complete(&mut recorder, 0, 4096, false, 16 * SECOND);
            assert_eq!(last_gap(&records(&mut recorder)), (GapCause::Detached, before));
        }
        let ended = recorder.end_volume(volume_id(), end, NOW).unwrap();
        assert_eq!(ended.last_exact, before, "{end:?}");
    }
}

#[test]
fn what_is_not_wanted_any_more_is_exact_up_to_now() {
    let mut recorder = protected();
    write(&mut recorder, 0, 11 * SECOND);
    complete(&mut recorder, 0, 4096, false, 12 * SECOND);
    let ended = recorder.end_volume(volume_id(), End::NotWanted, NOW).unwrap();
    let records = records(&mut recorder);
    let [.., (tick, Body::Tick), (_, Body::GapOpen { last_exact, .. })] = &records[..] else {
        panic!("{records:?}");
    };
    assert_eq!(
        (*last_exact, ended.last_exact),
        (Seq::new(*tick), Seq::new(*tick))
    );
}

/// Goal: a gap that nobody would open again is not lost with the records that a full store does not take.
#[test]
fn the_gap_of_a_volume_that_is_gone_outlives_a_full_store() {
    let mut recorder = protected();
    write(&mut recorder, 0, 11 * SECOND);
    let next = recorder.last_seq().unwrap();
    complete(&mut recorder, 0, 4096, false, 12 * SECOND);
    recorder.end_volume(volume_id(), End::NotWanted, NOW).unwrap();
    for epoch in 1..3 {
        recorder.store_full(next, Epoch(epoch), BootNs(NOW.0 + epoch));
        let gap = last_gap(&records(&mut recorder));
        assert_eq!(gap, (GapCause::AgentDown, next.prev()));
        recorder.room_again(BootNs(NOW.0 + epoch));
    }
}
