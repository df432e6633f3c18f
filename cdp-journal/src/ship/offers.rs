//! What of the next frames is offered, and how long a frame waits for the answer. Decisions only: no clock, no socket.
//!
//! Frames are sent in their order, so what is offered is offered ahead: while a frame waits for its turn, the answer comes.
//! One whose turn has come and whose answer has not is held. If nothing but what was read back waits behind it, that
//! costs nobody anything and may take up to [`HOLD_MAX`]. Else it is held no longer than sending what it offers would
//! take: so a live write comes at worst twice as late as without offers, and far sooner if the content is there.

use std::collections::VecDeque;
use std::time::Duration;

use super::TailFrame;
use crate::format::{Body, Frame, PackedUnit, UnitHash};
use crate::types::{Seq, UNIT_BYTES};

/// Frames that wait for their turn...
const FRAMES_MAX: usize = 64;
/// ... and bytes of them.
const BYTES_MAX: usize = 8 << 20;
/// Offers without an answer, of frames that were sent included.
const UNANSWERED_MAX: usize = 64;
/// A frame waits no longer for its answer, and then none does until all answers have come.
pub(crate) const HOLD_MAX: Duration = Duration::from_secs(2);
/// After so many units in a row that were not there, frames wait no more, until one is.
const MISSES_MAX: usize = (32 << 20) / UNIT_BYTES as usize;
/// On a line that takes more bytes in a second, sending waits for the processor, not for the line: to hash what is not
/// there costs more than it saves...
const FAST_LINE_BYTES_PER_SECOND: f64 = 50e6;
/// ... so of as many frames one is offered then, until something is there again.
const FRAMES_OF_SAMPLE: u32 = 8;

/// An answer to no offer, or of more than it had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the other end answers what it was not offered")]
pub struct BadAnswer;

/// A frame of the log, looked through.
#[derive(Debug)]
pub struct Offerable {
    frame: TailFrame,
    /// Its head, if anything of it may be offered.
    parsed: Option<Frame>,
    units: Vec<PackedUnit>,
    /// Somebody may be waiting for it: it tells of more than what was read back.
    is_urgent: bool,
}

impl Offerable {
    /// Looks through a frame. One that makes no sense is sent as it is: it is the other end that checks.
    pub fn new(frame: TailFrame) -> Self {
        let Ok(parsed) = Frame::parse(&frame.bytes) else {
            return Self::plain(frame);
        };
        let is_quiet = |body: &Body| {
            matches!(
                body,
                Body::ReadBack { .. } | Body::ReadBackZero { .. } | Body::Tick
            )
        };
        let units = parsed.packed_units(&frame.bytes);
        Self {
            frame,
            is_urgent: !parsed.records.iter().all(|placed| is_quiet(&placed.record.body)),
            parsed: (!units.is_empty()).then_some(parsed),
            units,
        }
    }

    /// A frame of which nothing is offered.
    pub fn plain(frame: TailFrame) -> Self {
        Self {
            frame,
            parsed: None,
            units: Vec::new(),
            is_urgent: true,
        }
    }

    /// Bytes of what it offers, as stored.
    fn offered_bytes(&self) -> usize {
        let groups = self.parsed.as_ref().map_or(&[][..], |parsed| &parsed.groups);
        let stored = self.units.iter().map(|unit| groups.get(usize::from(unit.group)));
        stored.flatten().map(|group| group.stored_bytes).sum()
    }
}

/// What is known of what a frame offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// Nothing is offered.
    None,
    /// It has not come.
    Awaited,
    /// A bit for each unit that is there.
    Have(u32),
}

/// What to do with the next frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is none.
    Nobody,
    /// Wait for its answer, for so long at most.
    Hold(Duration),
    /// Send it.
    Send,
}

/// A frame to send.
#[derive(Debug)]
pub struct Outgoing {
    /// The frame as it lies in the log.
    pub frame: TailFrame,
    /// What of it the other end has.
    pub known: Vec<PackedUnit>,
    parsed: Option<Frame>,
}

impl Outgoing {
    /// The frame without what the other end has; `None` if it has nothing of it.
    pub fn thin(&self) -> Option<Vec<u8>> {
        let parsed = self.parsed.as_ref().filter(|_| !self.known.is_empty())?;
        Some(parsed.thin(&self.frame.bytes, &self.known))
    }
}

/// Frames that wait for their turn.
#[derive(Debug, Default)]
pub struct Lookahead {
    frames: VecDeque<(Offerable, Answer)>,
    bytes: usize,
    /// Urgent ones among them.
    urgent: usize,
    /// Of each offer without an answer the frame's last record, and how many units.
    unanswered: VecDeque<(Seq, usize)>,
    /// Units in a row that were not there.
    misses: usize,
    /// An answer took too long.
    is_late: bool,
    /// More than [`FAST_LINE_BYTES_PER_SECOND`] when it was asked last.
    is_line_fast: bool,
    /// Frames since one was offered as a sample.
    unsampled: u32,
}

impl Lookahead {
    /// May one more frame wait here?
    pub fn has_room(&self) -> bool {
        self.frames.len() < FRAMES_MAX && self.bytes < BYTES_MAX
    }

    /// Is it worth while to look through the next frame for what may be offered?
    pub fn wants_offer(&mut self) -> bool {
        if self.misses < MISSES_MAX || !self.is_line_fast {
            return true;
        }
        self.unsampled = (self.unsampled + 1) % FRAMES_OF_SAMPLE;
        self.unsampled == 0
    }

    /// Puts a frame behind the others. Gives what to offer.
    pub fn push(&mut self, frame: Offerable) -> Option<Vec<UnitHash>> {
        self.bytes += frame.frame.bytes.len();
        self.urgent += usize::from(frame.is_urgent);
        let may_offer = !frame.units.is_empty() && self.unanswered.len() < UNANSWERED_MAX;
        let offer = may_offer.then(|| {
            self.unanswered.push_back((frame.frame.last, frame.units.len()));
            frame.units.iter().map(|unit| unit.hash).collect()
        });
        let answer = match may_offer {
            true => Answer::Awaited,
            false => Answer::None,
        };
        self.frames.push_back((frame, answer));
        offer
    }

    /// The answer to the oldest offer without one came: a bit for each unit that is there.
    pub fn answered(&mut self, have: u32) -> Result<(), BadAnswer> {
        let (last, count) = self.unanswered.pop_front().ok_or(BadAnswer)?;
        if u64::from(have) >> count != 0 {
            return Err(BadAnswer);
        }
        self.misses = match have {
            0 => self.misses.saturating_add(count),
            _ => 0,
        };
        self.is_late &= !self.unanswered.is_empty();
        let waiting = self.frames.iter_mut().find(|(frame, _)| frame.frame.last == last);
        if let Some((_, answer)) = waiting {
            *answer = Answer::Have(have);
        }
        Ok(())
    }

    /// What to do with the next frame, whose turn came `held` ago, on a line that takes so many bytes in a second.
    pub fn turn(&mut self, held: Duration, bytes_per_second: f64) -> Turn {
        self.is_line_fast = bytes_per_second > FAST_LINE_BYTES_PER_SECOND;
        let Some((front, answer)) = self.frames.front() else {
            return Turn::Nobody;
        };
        if *answer != Answer::Awaited || self.is_late || self.misses >= MISSES_MAX {
            return Turn::Send;
        }
        let may_be_held = match self.urgent {
            0 => HOLD_MAX,
            _ => {
                let seconds = front.offered_bytes() as f64 / bytes_per_second.max(1.0);
                Duration::try_from_secs_f64(seconds).map_or(HOLD_MAX, |time| time.min(HOLD_MAX))
            }
        };
        match may_be_held.checked_sub(held).filter(|left| !left.is_zero()) {
            Some(left) => Turn::Hold(left),
            None => {
                self.is_late |= held >= HOLD_MAX;
                Turn::Send
            }
        }
    }

    /// Takes the next frame.
    pub fn take(&mut self) -> Option<Outgoing> {
        let (frame, answer) = self.frames.pop_front()?;
        self.bytes -= frame.frame.bytes.len();
        self.urgent -= usize::from(frame.is_urgent);
        let have = match answer {
            Answer::Have(have) => have,
            Answer::None | Answer::Awaited => 0,
        };
        let known = frame.units.iter().enumerate();
        let known = known.filter(|(index, _)| have & (1 << index) != 0);
        Some(Outgoing {
            known: known.map(|(_, unit)| *unit).collect(),
            frame: frame.frame,
            parsed: frame.parsed,
        })
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::format::{FrameBuilder, Origin, RecordFlags};
    use crate::log::FrameLocation;
    use crate::types::{BootNs, SegmentId, VolumeId, WallNs};

    const UNIT: usize = UNIT_BYTES as usize;
    /// One in which sending a unit takes some 66 ms.
    const SLOW: f64 = 1e6;

    /// A frame of one unit of noise that was read back or, urgent, written.
    fn frame(seq: u64, is_urgent: bool) -> Offerable {
        let mut state = seq | 1 << 32;
        let data: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .take(UNIT)
        .collect();
        let (offset, len) = (0, UNIT_BYTES);
        let body = match is_urgent {
            true => Body::Write { offset, len },
            false => Body::ReadBack {
                offset,
                len,
                as_of: None,
            },
        };
        let first = Seq::new(seq).unwrap();
        let mut builder = FrameBuilder::new(first);
        let (origin, flags) = (Origin::default(), RecordFlags::default());
        builder
            .push(BootNs(1), VolumeId::new(1), origin, flags, body, &[&data])
            .unwrap();
        let sealed = builder.seal(Uuid::nil(), 0).unwrap();
        Offerable::new(TailFrame {
            previous: first.prev(),
            last: first,
            wall: WallNs(0),
            bytes: sealed.bytes().to_vec(),
            location: FrameLocation {
                segment: SegmentId(Seq::FIRST),
                offset: 0,
            },
        })
    }

    #[test]
    fn what_is_there_is_left_out_and_the_rest_goes_as_it_is() {
        let mut ahead = Lookahead::default();
        assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Nobody);
        for seq in 1..=3 {
            assert_eq!(ahead.push(frame(seq, false)).unwrap().len(), 1);
        }
        assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Hold(HOLD_MAX));
        ahead.answered(1).unwrap();
        ahead.answered(0).unwrap();
        let sent: Vec<_> = (0..2)
            .map(|_| {
                assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Send);
                let outgoing = ahead.take().unwrap();
                (outgoing.thin().map(|thin| thin.len()), outgoing.frame.bytes.len())
            })
            .collect();
        assert_eq!(sent[0].0, Some(sent[0].1 - UNIT));
        assert_eq!(sent[1].0, None);
        assert_eq!(
            ahead.turn(Duration::ZERO, SLOW),
            Turn::Hold(HOLD_MAX),
            "the third"
        );
    }

    /// Goal: a live write behind what is held waits at most as long as if that were sent.
    #[test]
    fn nothing_live_waits_longer_than_sending_would_take() {
        let mut ahead = Lookahead::default();
        ahead.push(frame(1, false));
        assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Hold(HOLD_MAX));
        assert_eq!(
            ahead.push(frame(2, true)),
            None,
            "what was captured is not offered"
        );
        let sending = Duration::from_secs_f64(UNIT as f64 / SLOW);
        assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Hold(sending));
        assert_eq!(ahead.turn(sending, SLOW), Turn::Send);
        assert_eq!(
            ahead.turn(Duration::from_millis(1), 1e9),
            Turn::Send,
            "a fast line"
        );
        assert!(ahead.take().unwrap().thin().is_none());
        assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Send, "the live one");
    }

    #[test]
    fn a_holder_that_does_not_answer_is_waited_for_once() {
        let mut ahead = Lookahead::default();
        for seq in 1..=3 {
            ahead.push(frame(seq, false));
        }
        assert_eq!(ahead.turn(HOLD_MAX, SLOW), Turn::Send);
        ahead.take().unwrap();
        assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Send);
        ahead.take().unwrap();
        for _ in 0..3 {
            ahead.answered(1).unwrap();
        }
        let outgoing = ahead.take().unwrap();
        assert_eq!(outgoing.known.len(), 1, "an answer that came in time is used");
        ahead.push(frame(4, false));
        assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Hold(HOLD_MAX));
    }

    #[test]
    fn where_nothing_is_there_nothing_is_waited_for() {
        let mut ahead = Lookahead::default();
        for seq in 0..MISSES_MAX as u64 {
            ahead.push(frame(seq + 1, false));
            assert_ne!(ahead.turn(Duration::ZERO, SLOW), Turn::Send);
            ahead.answered(0).unwrap();
            ahead.take().unwrap();
        }
        ahead.push(frame(1000, false));
        assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Send);
        ahead.answered(1).unwrap();
        ahead.push(frame(1001, false));
        ahead.take().unwrap();
        assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Hold(HOLD_MAX));
    }

    /// Goal: a first copy over a fast line does not pay for hashes that find nothing, and finds out when they would.
    #[test]
    fn where_nothing_is_there_a_fast_line_is_offered_samples() {
        let mut ahead = Lookahead::default();
        for seq in 0..MISSES_MAX as u64 {
            assert!(ahead.wants_offer());
            ahead.push(frame(seq + 1, false));
            ahead.answered(0).unwrap();
            ahead.take().unwrap();
        }
        assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Nobody);
        assert!((0..100).all(|_| ahead.wants_offer()), "a slow line");
        assert_eq!(ahead.turn(Duration::ZERO, 1e9), Turn::Nobody);
        let wanted = (0..80).filter(|_| ahead.wants_offer()).count();
        assert_eq!(wanted, 80 / FRAMES_OF_SAMPLE as usize);
        ahead.push(frame(1000, false));
        ahead.answered(1).unwrap();
        assert!((0..100).all(|_| ahead.wants_offer()), "something is there");
    }

    #[test]
    fn memory_and_open_offers_have_a_bound_and_answers_to_nothing_are_refused() {
        let mut ahead = Lookahead::default();
        let mut offers = 0;
        let mut seq = 0;
        while ahead.has_room() {
            seq += 1;
            offers += usize::from(ahead.push(frame(seq, false)).is_some());
        }
        assert_eq!((ahead.frames.len(), offers), (FRAMES_MAX, UNANSWERED_MAX));
        while ahead.take().is_some() {}
        assert_eq!((ahead.bytes, ahead.urgent), (0, 0));
        assert_eq!(ahead.push(frame(seq + 1, false)), None, "nothing was answered");
        assert_eq!(ahead.turn(Duration::ZERO, SLOW), Turn::Send);
        assert_eq!(ahead.answered(2), Err(BadAnswer), "a unit that was not offered");
        for _ in 1..UNANSWERED_MAX {
            ahead.answered(0).unwrap();
        }
        assert_eq!(ahead.answered(0), Err(BadAnswer));
    }
}
