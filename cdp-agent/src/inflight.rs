//! Which captured writes of a disk have been queued but have not ended.
//!
//! Pure: fed with events in ring order. A request that ends may cover parts of several writes, or a part of
//! one; so writes are kept by range, and what remains of each shrinks until nothing is left.
//!
//! Always true: a write is forgotten only when completions have covered all of it, or it was given up. Where two writes to one
//! range are in flight, a completion is taken for the younger: the older then counts as in flight for longer
//! than it is, which costs a wait and never a wrong byte.

use std::collections::{BTreeMap, HashMap, HashSet};

use cdp_journal::Seq;

/// Longest write that is kept by its start; the few longer ones (discards) are looked through one by one.
const SHORT_SECTORS_MAX: u64 = (cdp_ebpf::event::CHUNK_BYTES as u64) / 512;

/// A range of a disk, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sectors {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Sectors {
    pub(crate) fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// What a completion meant.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Writes of ours that it covered, at least in part.
    pub(crate) writes: Vec<Seq>,
    /// Parts of writes that had been given up: what was read there since may be too old.
    pub(crate) late: Vec<(Sectors, Seq)>,
    /// Where those of a whole bio lay. Its completion need not tell: a driver may move a bio's iterator to its end.
    pub(crate) ranges: Vec<Sectors>,
    /// Parts that no captured write explains: somebody wrote there, and we do not know what.
    pub(crate) strangers: Vec<Sectors>,
    /// A part of a bio of ours that is still in flight ended under an unknown address: a split of it by its
    /// driver, or a stranger.
    pub(crate) doubtful: Option<Sectors>,
}

/// More writes that were given up are not remembered: one that ends later is a stranger's.
const GIVEN_UP_MAX: usize = 1 << 16;

/// A write, or what is left of it.
///
/// Where several to one place are on their way, an end does not tell which of them it is: the youngest is taken out,
/// and what stays may be any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    range: Sectors,
    /// The oldest that it may be: who asks what is on its way goes by it.
    seq: Seq,
    /// The youngest that it may be: who knows that all up to a Seq have ended goes by it.
    youngest: Seq,
}

/// Writes, or what is left of them, by range.
#[derive(Debug, Default)]
struct Places {
    /// By (first sector, Seq): end, youngest.
    short: BTreeMap<(u64, Seq), (u64, Seq)>,
    long: Vec<Place>,
}

impl Places {
    fn len(&self) -> usize {
        self.short.len() + self.long.len()
    }

    fn insert(&mut self, place: Place) {
        let Place { range, seq, youngest } = place;
        if range.start >= range.end {
            return;
        }
        if range.end - range.start <= SHORT_SECTORS_MAX {
            self.short.insert((range.start, seq), (range.end, youngest));
        } else {
            self.long.push(place);
        }
    }

    fn remove(&mut self, range: Sectors, seq: Seq) {
        if self.short.remove(&(range.start, seq)).is_none()
            && let Some(i) = self
                .long
                .iter()
                .position(|long| (long.range, long.seq) == (range, seq))
        {
            self.long.swap_remove(i);
        }
    }

    fn all(&self) -> impl Iterator<Item = Place> {
        let short = self.short.iter().map(Self::short_place);
        short.chain(self.long.iter().copied())
    }

    fn short_place((&(start, seq), &(end, youngest)): (&(u64, Seq), &(u64, Seq))) -> Place {
        Place {
            range: Sectors { start, end },
            seq,
            youngest,
        }
    }

    /// Short writes that may touch a range, and all long ones.
    fn near(&self, range: Sectors) -> impl Iterator<Item = Place> {
        let from = (range.start.saturating_sub(SHORT_SECTORS_MAX), Seq::FIRST);
        self.short
            .range(from..(range.end, Seq::FIRST))
            .map(Self::short_place)
            .chain(self.long.iter().copied())
    }

    fn over(&self, range: Sectors) -> impl Iterator<Item = Place> {
        self.near(range).filter(move |place| place.range.overlaps(range))
    }

    /// The youngest write over the first sector of a range ends there. What of the range that was, and its Seq.
    fn end_youngest(&mut self, range: Sectors) -> Option<(Sectors, Seq)> {
        let first = Sectors {
            start: range.start,
            end: range.start + 1,
        };
        let ours = self.over(first).max_by_key(|place| place.seq)?;
        self.remove(ours.range, ours.seq);
        let ended = Sectors {
            start: range.start,
            end: ours.range.end.min(range.end),
        };
        let others: Vec<Place> = self.over(ended).collect();
        for other in others {
            self.remove(other.range, other.seq);
            self.insert(Place {
                youngest: other.youngest.max(ours.youngest),
                ..other
            });
        }
        for (start, end) in [(ours.range.start, ended.start), (ended.end, ours.range.end)] {
            let range = Sectors { start, end };
            self.insert(Place { range, ..ours });
        }
        Some((ended, ours.seq))
    }

    /// Where the next write begins behind a sector.
    fn next_start_after(&self, sector: u64) -> Option<u64> {
        let short = self
            .short
            .range((sector + 1, Seq::FIRST)..)
            .next()
            .map(|((start, _), _)| *start);
        let long = self.long.iter().map(|long| long.range.start);
        short
            .into_iter()
            .chain(long.filter(|&start| start > sector))
            .min()
    }

    fn take(&mut self, wanted: impl Fn(&Place) -> bool) -> Vec<Place> {
        let short = self
            .short
            .extract_if(.., |key, value| wanted(&Self::short_place((key, value))));
        let mut taken: Vec<Place> = short
            .map(|(key, value)| Self::short_place((&key, &value)))
            .collect();
        taken.extend(self.long.extract_if(.., |long| wanted(long)));
        taken
    }
}

/// Writes in flight on one disk.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    places: Places,
    /// Those that are taken to have ended, although nobody saw it; for a while.
    given_up: Places,
    /// Bio-based drivers complete whole bios: their chunks by the bio's address. They are also in `places`.
    bios: HashMap<u64, Vec<(Sectors, Seq)>>,
    /// Those of them whose last chunk has not come: it found no room.
    torn: HashSet<u64>,
    /// The oldest write of those that were given up and found no room in `given_up`.
    unknown_from: Option<Seq>,
}

/// A bio of a driver that completes whole bios.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WholeBio {
    /// Its address.
    pub(crate) address: u64,
    /// Is this its first chunk? Then whatever lived at the address before has ended.
    pub(crate) first: bool,
    /// Is it its last? Without it, what else the bio wrote is not known.
    pub(crate) last: bool,
}

impl InFlight {
    /// A captured write (or chunk) was queued; `bio` if its driver completes whole bios. True if another one to
    /// a part of this range is in flight: which of them the disk will hold is not known.
    pub(crate) fn queued(&mut self, range: Sectors, seq: Seq, bio: Option<WholeBio>) -> bool {
        if range.start >= range.end {
            return false;
        }
        if let Some(bio) = bio {
            self.add_chunk(bio, range, seq);
        }
        // One that was given up may have ended only after this one was queued, before we heard of it.
        let overlaps = self.any(range, seq.prev()) || self.given_up.over(range).next().is_some();
        self.places.insert(Place {
            range,
            seq,
            youngest: seq,
        });
        overlaps
    }

    fn add_chunk(&mut self, bio: WholeBio, range: Sectors, seq: Seq) {
        if bio.first {
            // Whatever lived at the address has ended, nobody saw how: its places wait to be given up.
            self.bios.remove(&bio.address);
        }
        if bio.last {
            self.torn.remove(&bio.address);
        } else {
            self.torn.insert(bio.address);
        }
        self.bios.entry(bio.address).or_default().push((range, seq));
    }

    fn forget_bio(&mut self, address: u64) -> Option<Vec<(Sectors, Seq)>> {
        let chunks = self.bios.remove(&address)?;
        for &(range, seq) in &chunks {
            self.places.remove(range, seq);
        }
        Some(chunks)
    }

    /// Where the chunks of a bio lie, of a driver that completes whole bios.
    pub(crate) fn ranges_of_bio(&self, address: u64) -> Vec<Sectors> {
        let chunks = self.bios.get(&address).map(Vec::as_slice).unwrap_or_default();
        chunks.iter().map(|&(range, _)| range).collect()
    }

    /// A bio-based driver ended a bio.
    pub(crate) fn bio_ended(&mut self, bio: u64, range: Sectors) -> Ended {
        let is_torn = self.torn.remove(&bio);
        let is_elsewhere =
            |chunks: &Vec<(Sectors, Seq)>| !chunks.iter().any(|&(ours, _)| ours.overlaps(range));
        if !is_torn && range.start < range.end && self.bios.get(&bio).is_some_and(is_elsewhere) {
            // One that was not captured lives at the address of one whose end was not seen.
            self.bios.remove(&bio);
        }
        if let Some(chunks) = self.forget_bio(bio) {
            let (ranges, writes) = chunks.into_iter().unzip();
            // It wrote more than is known here, and may have landed after that was read back.
            let everywhere = Sectors {
                start: 0,
                end: u64::MAX,
            };
            return Ended {
                writes,
                ranges,
                strangers: Vec::from_iter(is_torn.then_some(everywhere)),
                ..Ended::default()
            };
        }
        // A bio whose iterator the driver has moved to its end does not tell where it was.
        if range.start >= range.end {
            return Ended::default();
        }
        // Also of one whose address is not known any more.
        let is_part = |place: &Place| place.range.start <= range.start && range.end <= place.range.end;
        if self.places.near(range).any(|place| is_part(&place)) {
            return Ended {
                doubtful: Some(range),
                ..Ended::default()
            };
        }
        if self.given_up.near(range).any(|place| is_part(&place)) {
            let (late, seq) = self.given_up.end_youngest(range).unwrap_or((range, Seq::FIRST));
            return Ended {
                writes: vec![seq],
                late: vec![(late, seq)],
                ..Ended::default()
            };
        }
        Ended {
            strangers: vec![range],
            ..Ended::default()
        }
    }

    /// A request-based driver ended a range.
    pub(crate) fn range_ended(&mut self, range: Sectors) -> Ended {
        let mut ended = Ended::default();
        let mut rest = range;
        while rest.start < rest.end {
            let (end, seq) = if let Some((part, seq)) = self.places.end_youngest(rest) {
                (part.end, Some(seq))
            } else if let Some((part, seq)) = self.given_up.end_youngest(self.up_to_next(rest)) {
                ended.late.push((part, seq));
                (part.end, Some(seq))
            } else {
                let part = self.up_to_next(rest);
                ended.strangers.push(part);
                (part.end, None)
            };
            if seq.is_some() && ended.writes.last().copied() != seq {
                ended.writes.extend(seq);
            }
            rest.start = end;
        }
        ended
    }

    /// The range up to where the next known write begins.
    fn up_to_next(&self, range: Sectors) -> Sectors {
        let next = self.places.next_start_after(range.start);
        let next = next
            .into_iter()
            .chain(self.given_up.next_start_after(range.start));
        Sectors {
            end: next.fold(range.end, u64::min),
            ..range
        }
    }

    /// A write up to `last` to this range that is still in flight, or what is left of it.
    pub(crate) fn find(&self, range: Sectors, last: Option<Seq>) -> Option<(Sectors, Seq)> {
        let last = last?;
        let found = self.places.over(range).find(|place| place.seq <= last)?;
        Some((found.range, found.seq))
    }

    /// The oldest write to this range that may be in flight.
    pub(crate) fn oldest(&self, range: Sectors) -> Option<Seq> {
        self.oldest_where(range, |_| true)
    }

    /// As [`InFlight::oldest`], also of those that were given up.
    pub(crate) fn oldest_ever(&self, range: Sectors) -> Option<Seq> {
        let given_up = self.given_up.over(range).map(|place| place.seq);
        given_up.chain(self.oldest(range)).min()
    }

    /// The oldest write to this range that may be in flight, of those whose place (or what is left of it) is `wanted`.
    pub(crate) fn oldest_where(&self, range: Sectors, wanted: impl Fn(Sectors) -> bool) -> Option<Seq> {
        let known = self.places.over(range).filter(|place| wanted(place.range));
        known.map(|place| place.seq).chain(self.unknown_from).min()
    }

    /// The oldest write that may be in flight.
    pub(crate) fn oldest_of_all(&self) -> Option<Seq> {
        self.oldest(Sectors {
            start: 0,
            end: u64::MAX,
        })
    }

    /// The oldest write that has not ended and was not given up.
    pub(crate) fn oldest_on_its_way(&self) -> Option<Seq> {
        self.places.all().map(|place| place.seq).min()
    }

    /// Is a write up to `last` to this range still in flight?
    pub(crate) fn any(&self, range: Sectors, last: Option<Seq>) -> bool {
        self.find(range, last).is_some()
    }

    /// Takes writes up to `last` to have ended, although nobody saw it, and returns them: whether the disk took them
    /// as they were seen is not known. If one ends later after all, it is late. `as_youngest`: where an end may have been
    /// another write's, what stays counts as the youngest that it may be; else as the oldest.
    pub(crate) fn give_up(&mut self, last: Option<Seq>, as_youngest: bool) -> Vec<(Sectors, Seq)> {
        let Some(last) = last else { return Vec::new() };
        self.bios.retain(|_, chunks| {
            chunks.retain(|&(_, seq)| seq > last);
            !chunks.is_empty()
        });
        let has_ended = |place: &Place| match as_youngest {
            true => place.youngest <= last,
            false => place.seq <= last,
        };
        let taken = self.places.take(has_ended);
        for &place in &taken {
            if self.given_up.len() < GIVEN_UP_MAX {
                self.given_up.insert(place);
            } else {
                self.unknown_from = self.unknown_from.into_iter().chain([place.seq]).min();
            }
        }
        taken.into_iter().map(|place| (place.range, place.seq)).collect()
    }

    /// Forgets writes up to `last` that were given up: one that ends later is a stranger's.
    pub(crate) fn forget(&mut self, last: Option<Seq>) {
        if let Some(last) = last {
            self.given_up.take(|place| place.seq <= last);
            self.unknown_from = self.unknown_from.filter(|&from| from > last);
        }
    }

    /// How many writes (or rests of writes) are in flight.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.places.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seq(n: u64) -> Seq {
        Seq::new(n).unwrap()
    }

    fn range(start: u64, end: u64) -> Sectors {
        Sectors { start, end }
    }

    /// A bio of one chunk.
    fn whole(address: u64) -> WholeBio {
        WholeBio {
            address,
            first: true,
            last: true,
        }
    }

    #[test]
    fn a_merged_request_ends_all_its_writes() {
        let mut flight = InFlight::default();
        flight.queued(range(0, 8), seq(1), None);
        flight.queued(range(8, 16), seq(2), None);
        let ended = flight.range_ended(range(0, 16));
        assert_eq!(
            ended,
            Ended {
                writes: vec![seq(1), seq(2)],
                ..Ended::default()
            }
        );
        assert_eq!(flight.len(), 0);
    }

    #[test]
    fn a_split_write_is_in_flight_until_its_last_part_ends() {
        let mut flight = InFlight::default();
        flight.queued(range(0, 512), seq(1), None);
        flight.range_ended(range(128, 512));
        assert!(flight.any(range(0, 8), Some(seq(1))));
        assert!(!flight.any(range(128, 512), Some(seq(1))));
        assert!(flight.range_ended(range(0, 128)).strangers.is_empty());
        assert_eq!(flight.len(), 0);
    }

    #[test]
    fn what_nobody_queued_is_a_stranger() {
        let mut flight = InFlight::default();
        flight.queued(range(8, 16), seq(1), None);
        let ended = flight.range_ended(range(0, 24));
        assert_eq!(ended.writes, vec![seq(1)]);
        assert_eq!(ended.strangers, vec![range(0, 8), range(16, 24)]);
    }

    #[test]
    fn of_two_writes_to_one_place_the_older_counts_as_in_flight() {
        let mut flight = InFlight::default();
        flight.queued(range(0, 8), seq(1), None);
        flight.queued(range(0, 8), seq(2), None);
        flight.range_ended(range(0, 8));
        assert!(flight.any(range(0, 8), Some(seq(1))));
        flight.range_ended(range(0, 8));
        assert!(!flight.any(range(0, 8), Some(seq(2))));
    }

    /// Which of two writes to one place an end belongs to is not told: what stays may be the younger one.
    #[test]
    fn what_is_left_of_two_writes_may_be_either() {
        let mut flight = InFlight::default();
        flight.queued(range(0, 512), seq(1), None);
        flight.queued(range(8, 16), seq(2), None);
        flight.range_ended(range(8, 16));
        assert!(flight.any(range(8, 16), Some(seq(1))));
        assert_eq!(flight.give_up(Some(seq(1)), true), vec![]);
        assert_eq!(flight.give_up(Some(seq(2)), true), vec![(range(0, 512), seq(1))]);
        flight.queued(range(0, 8), seq(3), None);
        flight.queued(range(0, 8), seq(4), None);
        flight.range_ended(range(0, 8));
        assert_eq!(flight.give_up(Some(seq(3)), false), vec![(range(0, 8), seq(3))]);
    }

    #[test]
    fn a_write_over_one_in_flight_is_told() {
        for bio in [false, true] {
            let whole = |address| {
                bio.then_some(WholeBio {
                    address,
                    first: true,
                    last: true,
                })
            };
            let mut flight = InFlight::default();
            assert!(!flight.queued(range(0, 8), seq(1), whole(1)));
            assert!(!flight.queued(range(8, 16), seq(2), whole(2)));
            assert!(flight.queued(range(15, 20), seq(3), whole(3)));
            if bio {
                assert_eq!(flight.ranges_of_bio(2), vec![range(8, 16)]);
                flight.bio_ended(2, range(8, 16));
            } else {
                flight.range_ended(range(8, 15));
                assert!(flight.queued(range(15, 16), seq(4), None));
                flight.range_ended(range(15, 20));
                flight.range_ended(range(15, 16));
                flight.range_ended(range(15, 16));
            }
            assert!(!flight.queued(range(8, 15), seq(5), whole(4)));
        }
    }

    #[test]
    fn the_oldest_write_is_told_also_where_it_was_lost_sight_of() {
        let mut flight = InFlight::default();
        flight.queued(range(0, 8), seq(3), None);
        flight.queued(range(4, 4 + 2 * SHORT_SECTORS_MAX), seq(4), None);
        assert_eq!(flight.oldest(range(7, 9)), Some(seq(3)));
        assert_eq!(flight.oldest(range(8, 9)), Some(seq(4)));
        assert_eq!(flight.oldest(range(4 * SHORT_SECTORS_MAX, u64::MAX)), None);
        assert_eq!(flight.give_up(Some(seq(4)), false).len(), 2);
        flight.queued(range(8, 9), seq(5), None);
        assert_eq!(flight.oldest(range(8, 9)), Some(seq(5)));
        assert_eq!(flight.oldest_ever(range(8, 9)), Some(seq(4)));
        flight.forget(Some(seq(4)));
        assert_eq!(flight.oldest_ever(range(8, 9)), Some(seq(5)));
    }

    #[test]
    fn what_was_given_up_is_late_and_no_stranger_until_it_is_forgotten() {
        let mut flight = InFlight::default();
        for n in 1..=3 {
            flight.queued(range(0, 8), seq(n), None);
        }
        assert_eq!(flight.give_up(Some(seq(2)), false).len(), 2);
        assert!(flight.queued(range(7, 8), seq(4), None));
        assert_eq!(flight.range_ended(range(7, 8)).writes, vec![seq(4)]);
        assert_eq!(flight.range_ended(range(0, 8)).late, vec![]);
        let ended = flight.range_ended(range(4, 12));
        assert_eq!(ended.late, vec![(range(4, 8), seq(2))]);
        assert_eq!(
            (ended.writes, ended.strangers),
            (vec![seq(2)], vec![range(8, 12)])
        );
        let ended = flight.range_ended(range(0, 8));
        assert_eq!(ended.late, vec![(range(0, 4), seq(2)), (range(4, 8), seq(1))]);
        flight.forget(Some(seq(2)));
        assert_eq!(flight.range_ended(range(0, 8)).strangers, vec![range(0, 8)]);
    }

    #[test]
    fn a_bio_whose_last_chunk_did_not_come_wrote_nobody_knows_where() {
        let mut flight = InFlight::default();
        let torn = WholeBio {
            address: 7,
            first: true,
            last: false,
        };
        flight.queued(range(0, 512), seq(1), Some(torn));
        assert_eq!(
            flight.bio_ended(7, range(600, 600)).strangers,
            vec![range(0, u64::MAX)]
        );
        let whole = WholeBio { last: true, ..torn };
        flight.queued(range(0, 512), seq(2), Some(whole));
        assert_eq!(flight.bio_ended(7, range(512, 512)).strangers, vec![]);
    }

    #[test]
    fn the_address_of_a_bio_whose_end_was_not_seen_may_be_another_ones() {
        let mut flight = InFlight::default();
        flight.queued(range(0, 8), seq(1), Some(whole(7)));
        assert_eq!(flight.bio_ended(7, range(64, 72)).strangers, vec![range(64, 72)]);
        assert!(flight.any(range(0, 8), Some(seq(1))), "nobody saw it end");
        flight.queued(range(16, 24), seq(2), Some(whole(7)));
        flight.queued(range(32, 40), seq(3), Some(whole(7)));
        assert_eq!(flight.bio_ended(7, range(32, 40)).writes, vec![seq(3)]);
        let overdue = flight.give_up(Some(seq(3)), false);
        assert_eq!(overdue, vec![(range(0, 8), seq(1)), (range(16, 24), seq(2))]);
    }

    #[test]
    fn a_bio_ends_as_a_whole_and_its_splits_are_doubtful() {
        let mut flight = InFlight::default();
        flight.queued(
            range(0, 512),
            seq(1),
            Some(WholeBio {
                address: 7,
                first: true,
                last: false,
            }),
        );
        flight.queued(
            range(512, 600),
            seq(2),
            Some(WholeBio {
                address: 7,
                first: false,
                last: true,
            }),
        );
        let split = flight.bio_ended(8, range(0, 128));
        assert_eq!((split.doubtful, split.strangers), (Some(range(0, 128)), vec![]));
        assert_eq!(flight.bio_ended(7, range(600, 600)).writes, vec![seq(1), seq(2)]);
        assert_eq!(flight.bio_ended(9, range(0, 8)).strangers, vec![range(0, 8)]);
    }

    proptest! {
        /// Goal: nothing is forgotten early or kept for ever. Method: a count of pending writes for each
        /// sector, as a model; complete random parts of what is pending.
        #[test]
        fn pending_sectors_agree_with_a_model(
            steps in prop::collection::vec((0u64..2000, 1u64..700, any::<bool>()), 1..200)
        ) {
            let mut flight = InFlight::default();
            let mut pending = vec![0u32; 3000];
            let mut next = Seq::FIRST;
            for (start, length, is_write) in steps {
                let asked = range(start, start + length);
                if is_write {
                    flight.queued(asked, next, None);
                    next = next.next();
                    for n in &mut pending[start as usize..(start + length) as usize] { *n += 1; }
                } else {
                    let ended = flight.range_ended(asked);
                    for sector in asked.start..asked.end {
                        let strange = ended.strangers.iter().any(|s| s.start <= sector && sector < s.end);
                        let n = &mut pending[sector as usize];
                        prop_assert_eq!(strange, *n == 0, "sector {}", sector);
                        *n = n.saturating_sub(1);
                    }
                }
            }
            for sector in 0..3000u64 {
                prop_assert_eq!(
                    flight.any(range(sector, sector + 1), Some(next)),
                    pending[sector as usize] > 0,
                    "sector {}", sector
                );
            }
        }
    }
}
