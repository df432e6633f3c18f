//! A volume grows and shrinks.

use super::*;

fn resize(recorder: &mut Recorder, bytes: u64, boot_ns: u64) {
    let look = recorder.look();
    recorder.size_found(volume_id(), bytes, look, BootNs(boot_ns));
}

fn look(recorder: &mut Recorder, boot_ns: u64) {
    let bytes = recorder.volumes[0].bytes;
    resize(recorder, bytes, boot_ns);
}

/// Between two looks at its size a device may grow and be written to beyond its old end. The look may have been longer
/// ago than the times of records are kept.
#[test]
fn a_volume_that_grew_is_not_exact_since_it_was_last_seen_smaller() {
    let mut recorder = protected();
    write(&mut recorder, 0, 20 * SECOND);
    let seen_smaller = recorder.last_seq();
    look(&mut recorder, 20 * SECOND);
    for seconds in 21..30 {
        write(&mut recorder, 8, seconds * SECOND);
        recorder.no_loss();
    }
    resize(&mut recorder, 2 * BYTES, 30 * SECOND);
    assert_eq!(state(&recorder), State::Resyncing(GapCause::Resized));
    assert_eq!(gaps_from(&mut recorder), [seen_smaller]);
}

/// One of several volumes may not be there for a while, or not tell its size.
#[test]
fn a_look_that_did_not_find_a_size_says_nothing() {
    let mut recorder = protected();
    look(&mut recorder, 20 * SECOND);
    let seen_smaller = recorder.last_seq();
    write(&mut recorder, 8, 21 * SECOND);
    let _ = recorder.look();
    write(&mut recorder, 8, 22 * SECOND);
    let _ = recorder.look();
    resize(&mut recorder, 2 * BYTES, 23 * SECOND);
    assert_eq!(gaps_from(&mut recorder), [seen_smaller]);
}

/// A gap that is open for another reason may have begun after the volume grew.
#[test]
fn a_gap_that_is_open_begins_before_the_volume_grew() {
    let mut recorder = protected();
    look(&mut recorder, 20 * SECOND);
    let seen_smaller = recorder.last_seq();
    write(&mut recorder, 800, 21 * SECOND);
    write(&mut recorder, 8, 22 * SECOND);
    let before_failed = recorder.last_seq().and_then(Seq::prev);
    complete(&mut recorder, 8, 4096, true, 23 * SECOND);
    assert_eq!(gaps_from(&mut recorder), [before_failed]);
    resize(&mut recorder, 2 * BYTES, 24 * SECOND);
    assert_eq!(gaps_from(&mut recorder), [seen_smaller]);
}

/// What Seqs are given anew says nothing of when the volume was seen smaller.
#[test]
fn a_look_that_the_store_lost_is_none() {
    let mut recorder = protected();
    let next = Seq::after(recorder.last_seq());
    write(&mut recorder, 8, 20 * SECOND);
    write(&mut recorder, 8, 21 * SECOND);
    look(&mut recorder, 21 * SECOND);
    let before = recorder.look();
    recorder.store_full(next, Epoch(1), BootNs(22 * SECOND));
    recorder.size_found(volume_id(), BYTES, before, BootNs(22 * SECOND));
    recorder.room_again(BootNs(23 * SECOND));
    read_everything(&mut recorder);
    assert!(recorder.try_close(volume_id(), None, BootNs(30 * SECOND)));
    records(&mut recorder);
    resize(&mut recorder, 2 * BYTES, 31 * SECOND);
    assert_eq!(gaps_from(&mut recorder), [next.prev()]);
}

/// Between the looks it may have been larger than at either, and have been written to there.
#[test]
fn a_volume_that_shrank_is_not_exact_since_it_was_last_seen_larger() {
    let mut recorder = protected();
    look(&mut recorder, 20 * SECOND);
    let seen_larger = recorder.last_seq();
    write(&mut recorder, 8, 21 * SECOND);
    complete(&mut recorder, 8, 4096, false, 21 * SECOND);
    resize(&mut recorder, BYTES / 2, 22 * SECOND);
    assert_eq!(gaps_from(&mut recorder), [seen_larger]);
    assert!(recorder.try_close(volume_id(), None, BootNs(30 * SECOND)));
}

/// A write to what is cut off that is in flight, or waits to be compared, may have ended otherwise than the log says.
#[test]
fn a_volume_that_shrank_is_not_exact_since_a_write_to_what_it_lost_that_is_in_doubt() {
    for (has_ended, was_changed) in [(true, false), (false, false), (true, true)] {
        let mut recorder = protected();
        let before = recorder.last_seq();
        let sector = BYTES / SECTOR_BYTES - 8;
        write(&mut recorder, sector, 20 * SECOND);
        if was_changed {
            changed(&mut recorder, sector, 4096, 21 * SECOND);
        }
        if has_ended {
            complete(&mut recorder, sector, 4096, false, 21 * SECOND);
        }
        records(&mut recorder);
        let seen_larger = recorder.last_seq();
        look(&mut recorder, 21 * SECOND);
        write(&mut recorder, 8, 21 * SECOND);
        // The first half of the block stays.
        resize(&mut recorder, BYTES - 2048, 22 * SECOND);
        let is_in_doubt = !has_ended || was_changed;
        let last_exact = if is_in_doubt { before } else { seen_larger };
        assert_eq!(
            gaps_from(&mut recorder),
            [last_exact],
            "{has_ended} {was_changed}"
        );
        assert_eq!(recorder.take_suspects(SUSPECT_BLOCKS_MAX, |_| true), None);
        let read_again = recorder.take_run(BYTES, |_| true).map(|run| run.bytes);
        assert_eq!(
            read_again,
            was_changed.then_some(BYTES - REGION..BYTES - 2048),
            "what stays of a block that differs"
        );
    }
}
