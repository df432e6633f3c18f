//! The host: writers, a driver that takes bytes and ends writes in any order, and the probe with its ring.

use std::collections::VecDeque;
use std::ops::Range;

use cdp_ebpf::event::{CompleteEvent, EventKind, Op, WriteEvent};
use cdp_journal::SECTOR_BYTES;

use super::model::{Content, Ended, Model};
use super::{DISK, MS, PLUG_NS, Profile, REGION_SECTORS, Rng, SECTORS, START};

const DISK_SECTORS: u64 = START + SECTORS as u64 + 8;

#[derive(Clone, Debug)]
pub(super) enum RingEvent {
    /// With the content of every sector, and the number of the write.
    Write(WriteEvent, Content, usize),
    Complete(CompleteEvent),
    Changed(CompleteEvent),
}

#[derive(Clone, Debug)]
pub(super) struct InRing {
    pub(super) event: RingEvent,
    pub(super) at_ns: u64,
    /// The position behind it.
    end: u64,
}

/// A write on its way.
#[derive(Debug)]
struct Bio {
    number: usize,
    queued_ns: u64,
    address: u64,
    range: Range<u64>,
    op: Op,
    content: Content,
    is_stable: bool,
    /// Before, it waits in its task's plug, and the disk does not count it.
    counted_from_ns: u64,
    /// Not before, if it is one of the slow ones.
    ends_from_ns: u64,
    /// Sectors that the device has taken: a prefix is ended first, but bytes are taken in any order.
    taken: Vec<bool>,
    was_changed: bool,
    /// The kernel skipped the probe.
    is_missed: bool,
    /// Since when the agent knows of it as of a write that it did not see; `u64::MAX`: not yet.
    pub(super) unseen_since_ns: Option<u64>,
}

/// What the probe counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    pub(super) dropped: u64,
    pub(super) lost_completions: u64,
    pub(super) first_drop_ns: u64,
    pub(super) marks: Vec<u64>,
    pub(super) misses: u64,
}

/// For so long a write may be marked and not counted.
const LATE_NS_MAX: u64 = 5 * MS;

/// An end that nobody saw.
#[derive(Debug)]
struct Skipped {
    range: Range<u64>,
    /// Before it, the ring holds the write.
    position: u64,
    /// How often the agent had given up writes when it had seen it.
    drained_at: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) now_ns: u64,
    pub(super) device: Vec<Content>,
    issued: Vec<Content>,
    on_its_way: Vec<u32>,
    /// A write to the sector was lost since it was quiet last …
    is_lost: Vec<bool>,
    /// … or failed.
    has_failed: Vec<bool>,
    /// How the writes before ended.
    ended: Vec<Ended>,
    bios: Vec<Bio>,
    next_content: Content,
    pub(super) is_watched: bool,
    /// Sectors of the volume by now …
    pub(super) size: usize,
    /// … and of it that the probe captures writes to.
    pub(super) watched: usize,
    /// What an agent found it to be when it looked last, and the most that it has been since.
    looked_at: usize,
    largest: usize,
    /// When it grew, from how many sectors, and the record that the agent made when it noticed.
    grown: Vec<(u64, usize, Option<u64>)>,
    pub(super) ring: VecDeque<InRing>,
    /// What was read and not given back.
    kept: VecDeque<InRing>,
    pub(super) produced: u64,
    pub(super) consumed: u64,
    released: u64,
    pub(super) counters: Counters,
    /// Times of losses that the agent may not have read the counters for.
    pub(super) losses_ns: VecDeque<u64>,
    /// When a write was queued whose range is marked, and that is not counted as dropped yet.
    late_drop_ns: Option<u64>,
    pub(super) misses_ns: VecDeque<u64>,
    /// Writes that nobody saw: since when, where, and the record that the agent made when it knew.
    pub(super) missed: Vec<(u64, Range<u64>, Option<u64>)>,
    /// Of writes whose pages may have been changed.
    skipped: Vec<Skipped>,
}

impl Kernel {
    pub(super) fn new(rng: &mut Rng) -> Self {
        let device: Vec<Content> = (0..DISK_SECTORS)
            .map(|at| if rng.one_in(3) { 0 } else { 1 + at })
            .collect();
        Self {
            now_ns: 1,
            issued: device.clone(),
            on_its_way: vec![0; device.len()],
            is_lost: vec![false; device.len()],
            has_failed: vec![false; device.len()],
            ended: vec![Ended::Well; device.len()],
            device,
            bios: Vec::new(),
            next_content: 10_000,
            is_watched: false,
            size: SECTORS,
            watched: SECTORS,
            looked_at: SECTORS,
            largest: SECTORS,
            grown: Vec::new(),
            ring: VecDeque::new(),
            kept: VecDeque::new(),
            produced: 0,
            consumed: 0,
            released: 0,
            counters: Counters::default(),
            losses_ns: VecDeque::new(),
            late_drop_ns: None,
            misses_ns: VecDeque::new(),
            missed: Vec::new(),
            skipped: Vec::new(),
        }
    }

    /// Every instant is another.
    pub(super) fn instant(&mut self) -> u64 {
        self.now_ns += 1;
        self.now_ns
    }

    pub(super) fn volume(&self) -> &[Content] {
        &self.device[START as usize..START as usize + self.size]
    }

    /// A sector of the disk, counted from the volume's start, if the volume has it by now.
    fn of_volume(&self, sector: u64) -> Option<usize> {
        of_volume(sector).filter(|&own| own < self.size)
    }

    /// The volume gets another size. What it loses may be anything when it is back, if `may_change`.
    pub(super) fn resize(&mut self, rng: &mut Rng, model: &mut Model, may_change: bool) {
        let at_ns = self.instant();
        let size = 8 * (1 + rng.below(SECTORS as u64 / 8) as usize);
        // Whose size is as before when it is looked at next has not changed, as far as anybody knows: what it had beyond
        // that in between is a limit of ARCHITECTURE.md.
        if size == self.looked_at && self.largest > size {
            return;
        }
        self.largest = self.largest.max(size);
        if size > self.size {
            self.grown.push((at_ns, self.size, None));
        }
        for sector in size.min(self.size)..size.max(self.size) {
            let at = START as usize + sector;
            if size < self.size {
                model.busy(sector, at_ns);
            } else if self.on_its_way[at] == 0 {
                if may_change && rng.one_in(2) {
                    self.next_content += 1;
                    self.device[at] = if rng.one_in(2) { 0 } else { self.next_content };
                    self.issued[at] = self.device[at];
                    self.ended[at] = Ended::Well;
                }
                model.quiet(sector, at_ns, self.device[at], self.ended[at]);
            }
        }
        self.size = size;
    }

    /// An agent looks at the volume's size.
    pub(super) fn size_looked_at(&mut self) -> usize {
        (self.looked_at, self.largest) = (self.size, self.size);
        self.size
    }

    fn oldest_growth(&self) -> Option<u64> {
        let unknown = self.grown.iter().find(|(.., known)| known.is_none());
        unknown.map(|&(grown_ns, ..)| grown_ns)
    }

    /// The agent has seen its size then, and has made a record of it.
    pub(super) fn size_known(&mut self, at_ns: u64, seq: u64) {
        for (.., known) in self.grown.iter_mut().filter(|(grown_ns, ..)| *grown_ns <= at_ns) {
            known.get_or_insert(seq);
        }
    }

    pub(super) fn writes_in_flight(&self) -> usize {
        let counted = |bio: &&Bio| bio.counted_from_ns <= self.now_ns;
        self.bios.iter().filter(counted).count()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.bios.is_empty()
    }

    /// Up to when the agent has been told everything.
    pub(super) fn known_ns(&self) -> u64 {
        let oldest = self.ring.front().map(|event| event.at_ns);
        // They are not counted in the order in which they were queued.
        let losses = self.losses_ns.iter().min().copied();
        let misses = self.misses_ns.front().copied();
        [oldest, losses, misses, self.late_drop_ns, self.oldest_growth()]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.now_ns + 1)
    }

    /// The agent died and nobody can take the probe over: the log ends before `next`.
    pub(super) fn goes_down(&mut self, model: &mut Model, next: u64) {
        let at_ns = self.instant();
        model.crashed(at_ns, next);
        for (since_ns, range, known) in self.missed.drain(..) {
            if known.is_none_or(|seq| seq >= next) {
                model.crashed_after_a_miss(since_ns, range, at_ns);
            }
        }
        self.forget_growth(model, next, at_ns);
        self.unwatch();
    }

    /// The agent died, and with it its knowledge that the volume had grown, unless the log, which ends before `next`, has
    /// it: the one limit. It may have shrunk to its old size since, so that nobody will ever know.
    pub(super) fn forget_growth(&mut self, model: &mut Model, next: u64, at_ns: u64) {
        for (since_ns, from, known) in self.grown.drain(..) {
            if known.is_none_or(|seq| seq >= next) {
                model.crashed_after_a_miss(since_ns, START + from as u64..START + SECTORS as u64, at_ns);
            }
        }
    }

    /// The probe is gone, and what it had with it.
    pub(super) fn unwatch(&mut self) {
        self.is_watched = false;
        self.ring.clear();
        self.kept.clear();
        self.consumed = self.produced;
        self.released = self.produced;
        self.counters = Counters::default();
        self.losses_ns.clear();
        self.late_drop_ns = None;
        self.misses_ns.clear();
        self.missed.clear();
        self.skipped.clear();
        for bio in &mut self.bios {
            bio.unseen_since_ns = Some(u64::MAX);
        }
    }

    fn known(&mut self, now_ns: u64, which: impl Fn(&Bio) -> bool) {
        for bio in self.bios.iter_mut().filter(|bio| which(bio)) {
            if bio.unseen_since_ns == Some(u64::MAX) {
                bio.unseen_since_ns = Some(now_ns);
            }
        }
    }

    /// The agent knows that it does not know what is on its way.
    pub(super) fn all_unseen_known(&mut self, now_ns: u64) {
        self.known(now_ns, |_| true);
    }

    /// It was told of drops up to then.
    pub(super) fn dropped_known(&mut self, last_ns: Option<u64>, now_ns: u64) {
        self.known(now_ns, |bio| !bio.is_missed && Some(bio.queued_ns) <= last_ns);
    }

    /// It was told of skipped events.
    pub(super) fn missed_known(&mut self, now_ns: u64) {
        self.known(now_ns, |bio| bio.is_missed);
    }

    /// What was captured of these writes is lost.
    pub(super) fn forget_captured(&mut self, is_lost: impl Fn(usize) -> bool) {
        for bio in &mut self.bios {
            if is_lost(bio.number) {
                bio.unseen_since_ns = Some(u64::MAX);
            }
        }
    }

    pub(super) fn never_captured(&mut self, number: usize) {
        self.forget_captured(|other| other == number);
    }

    /// The agent has given up writes so often: those that it knew the time before.
    pub(super) fn given_up(&mut self, times: u64) {
        for skipped in &mut self.skipped {
            if self.consumed >= skipped.position {
                skipped.drained_at.get_or_insert(times);
            }
        }
        self.skipped
            .retain(|skipped| skipped.drained_at.is_none_or(|then| times < then + 2));
    }

    /// Where the agent cannot know yet that an end was skipped.
    pub(super) fn skipped(&self) -> impl Iterator<Item = &Range<u64>> {
        self.skipped.iter().map(|skipped| &skipped.range)
    }

    /// A write to the volume, as large as the agent knows it to be, that the agent knows it did not see, and since when.
    pub(super) fn unseen(&self, sectors: usize) -> impl Iterator<Item = u64> {
        let end = START + sectors as u64;
        let touches = move |bio: &&Bio| bio.range.start < end && bio.range.end > START;
        self.bios
            .iter()
            .filter(touches)
            .filter_map(|bio| bio.unseen_since_ns)
    }

    fn put(&mut self, profile: &Profile, event: RingEvent, at_ns: u64, cost: u64) -> bool {
        if self.produced - self.released + cost > profile.ring_units {
            return false;
        }
        self.produced += cost;
        self.ring.push_back(InRing {
            event,
            at_ns,
            end: self.produced,
        });
        true
    }

    /// The oldest event that was not read.
    pub(super) fn read(&mut self) -> Option<InRing> {
        let next = self.ring.pop_front()?;
        self.consumed = next.end;
        self.kept.push_back(next.clone());
        Some(next)
    }

    /// As `Ring::release`.
    pub(super) fn release(&mut self, kept: u64, ring_units: u64) {
        let until = kept
            .min(self.consumed)
            .max(self.consumed.saturating_sub(ring_units / 2));
        while let Some(first) = self.kept.pop_front_if(|first| first.end <= until) {
            self.released = first.end;
        }
    }

    /// As `Ring::skip_to`: false where it holds no such place any more.
    pub(super) fn skip_to(&mut self, position: u64) -> bool {
        if position < self.released {
            return false;
        }
        while let Some(last) = self.kept.pop_back_if(|last| last.end > position) {
            self.ring.push_front(last);
        }
        self.consumed = position;
        for skipped in &mut self.skipped {
            skipped.drained_at = None;
        }
        true
    }

    /// The log ends before `next` for the agent that takes over: what the one before it knew beyond that, it has to find
    /// out again.
    pub(super) fn misses_forgotten(&mut self, next: u64) {
        self.misses_ns.clear();
        for (at_ns, _, known) in &mut self.missed {
            if known.is_none_or(|seq| seq >= next) {
                *known = None;
                self.misses_ns.push_back(*at_ns);
            }
        }
    }

    fn mark(&mut self, range: &Range<u64>) {
        let regions = range.start / REGION_SECTORS..range.end.div_ceil(REGION_SECTORS);
        for region in regions {
            if !self.counters.marks.contains(&region) {
                self.counters.marks.push(region);
            }
        }
    }

    fn count_drop(&mut self, at_ns: u64) {
        let first = &mut self.counters.first_drop_ns;
        *first = match *first {
            0 => at_ns,
            known => known.min(at_ns),
        };
        self.counters.dropped += 1;
        self.losses_ns.push_back(at_ns);
    }

    /// What marked the write's range goes on, and counts it: before the write gets to the device.
    fn count_late_drop(&mut self) {
        if let Some(at_ns) = self.late_drop_ns.take() {
            self.count_drop(at_ns);
        }
    }

    fn may_count_late_drop(&mut self, rng: &mut Rng) {
        if self.late_drop_ns.is_some() && rng.one_in(4) {
            self.count_late_drop();
        }
    }

    /// A write does not stay with the probe for long.
    pub(super) fn passes(&mut self, ns: u64) {
        self.now_ns += ns;
        if self
            .late_drop_ns
            .is_some_and(|late_ns| self.now_ns > late_ns + LATE_NS_MAX)
        {
            self.count_late_drop();
        }
    }

    /// The agent took marks and counts, of losses up to this time among others.
    pub(super) fn losses_taken(&mut self, counted: usize) -> Option<u64> {
        self.losses_ns.drain(..counted).chain(self.late_drop_ns).max()
    }

    /// Somebody writes.
    pub(super) fn queue(&mut self, rng: &mut Rng, profile: &Profile, model: &mut Model) {
        let at_ns = self.instant();
        let hot = rng.one_in(2);
        let length = match rng.below(8) {
            0 => 1 + rng.below(7),
            1 => 8 * (1 + rng.below(6)),
            2 => 1 + rng.below(40),
            _ => 8,
        };
        let place = if hot {
            rng.below(48)
        } else {
            rng.below(DISK_SECTORS)
        };
        let start = if length.is_multiple_of(8) {
            place / 8 * 8
        } else {
            place
        };
        let range = start..(start + length).min(DISK_SECTORS);
        let op = match rng.below(16) {
            0 => Op::Zero,
            1 => Op::Discard,
            _ => Op::Write,
        };
        self.next_content += 1;
        let is_blank = op != Op::Write || rng.one_in(16);
        let content = if is_blank { 0 } else { self.next_content };
        let number = model.queued(at_ns, range.clone());
        let address = (1..).find(|&free| self.bios.iter().all(|bio| bio.address != free));
        let slow = profile.slow && rng.one_in(40);
        let mut bio = Bio {
            number,
            queued_ns: at_ns,
            address: address.unwrap_or(0),
            range: range.clone(),
            op,
            content,
            is_stable: op != Op::Write || !rng.one_in(4),
            counted_from_ns: at_ns + if rng.one_in(4) { rng.below(PLUG_NS) } else { 0 },
            ends_from_ns: at_ns + if slow { rng.below(13_000_000_000) } else { 0 },
            taken: vec![false; (range.end - range.start) as usize],
            was_changed: false,
            is_missed: false,
            unseen_since_ns: None,
        };
        for sector in range.clone() {
            let own = self.of_volume(sector);
            if self.on_its_way[sector as usize] == 0
                && let Some(sector) = own
            {
                model.busy(sector, at_ns);
            }
            self.on_its_way[sector as usize] += 1;
            self.issued[sector as usize] = content;
            // If the device holds something else in the end, it took this one otherwise.
            self.has_failed[sector as usize] = false;
        }
        if !self.is_watched {
            bio.unseen_since_ns = Some(u64::MAX);
        } else if profile.misses && rng.one_in(200) {
            self.counters.misses += 1;
            self.misses_ns.push_back(at_ns);
            self.missed.push((at_ns, range.clone(), None));
            bio.is_missed = true;
            bio.unseen_since_ns = Some(u64::MAX);
        } else if range.end <= START || range.start >= START + self.watched as u64 {
            // Nobody looks there; where the volume has grown nobody knows of it yet.
            bio.unseen_since_ns = (range.start >= START).then_some(u64::MAX);
        } else if !self.capture(rng, profile, &bio, at_ns) {
            self.mark(&range);
            // Other processors may be faster.
            match self.late_drop_ns.is_none() && rng.one_in(3) {
                true => self.late_drop_ns = Some(at_ns),
                false => self.count_drop(at_ns),
            }
            model.tear(number);
            bio.unseen_since_ns = Some(u64::MAX);
        }
        if self.late_drop_ns != Some(at_ns) {
            self.may_count_late_drop(rng);
        }
        if bio.unseen_since_ns.is_some() {
            self.is_lost[range.start as usize..range.end as usize].fill(true);
        }
        self.bios.push(bio);
    }

    fn capture(&mut self, rng: &mut Rng, profile: &Profile, bio: &Bio, at_ns: u64) -> bool {
        let chunk = if bio.op == Op::Write && rng.one_in(2) {
            8
        } else {
            u64::MAX
        };
        let mut at = bio.range.start;
        while at < bio.range.end {
            let end = bio.range.end.min((at / 8 * 8).saturating_add(chunk));
            let event = WriteEvent {
                kind: EventKind::Write as u8,
                op: bio.op as u8,
                flags: 0,
                last: u8::from(end == bio.range.end),
                disk: DISK.0,
                bio: bio.address,
                boot_ns: at_ns,
                sector: at,
                bytes: ((end - at) * SECTOR_BYTES) as u32,
                pid: 1,
                comm: [0; 16],
            };
            let cost = if bio.op == Op::Write { 1 + end - at } else { 1 };
            if !self.put(
                profile,
                RingEvent::Write(event, bio.content, bio.number),
                at_ns,
                cost,
            ) {
                return false;
            }
            at = end;
        }
        true
    }

    fn pick(&self, rng: &mut Rng, may: impl Fn(&Bio) -> bool) -> Option<usize> {
        let is_able = |bio: &Bio| self.late_drop_ns != Some(bio.queued_ns) && may(bio);
        let able: Vec<usize> = (0..self.bios.len()).filter(|&i| is_able(&self.bios[i])).collect();
        (!able.is_empty()).then(|| able[rng.below(able.len() as u64) as usize])
    }

    /// The device takes some bytes of some write.
    pub(super) fn take(&mut self, rng: &mut Rng) {
        self.may_count_late_drop(rng);
        let now_ns = self.instant();
        let Some(i) = self.pick(rng, |bio| {
            bio.counted_from_ns <= now_ns && bio.taken.contains(&false)
        }) else {
            return;
        };
        let bio = &mut self.bios[i];
        // The page was changed since the bio was queued; or is changed only after it was taken.
        let changed = !bio.is_stable && rng.one_in(2);
        bio.was_changed |= changed || !bio.is_stable && rng.one_in(4);
        if changed {
            self.next_content += 1;
        }
        let content = if changed { self.next_content } else { bio.content };
        let from = if rng.one_in(4) {
            rng.below(bio.taken.len() as u64) as usize
        } else {
            0
        };
        for at in from..bio.taken.len() {
            if !std::mem::replace(&mut bio.taken[at], true) {
                self.device[bio.range.start as usize + at] = content;
            }
        }
    }

    /// Some write ends, in part or with its neighbour.
    pub(super) fn complete(&mut self, rng: &mut Rng, profile: &Profile, model: &mut Model) {
        self.may_count_late_drop(rng);
        let at_ns = self.instant();
        let may = |bio: &Bio| bio.counted_from_ns.max(bio.ends_from_ns) <= at_ns;
        let Some(i) = self.pick(rng, may) else { return };
        let failed = profile.failures && rng.one_in(30);
        let whole = self.bios[i].range.clone();
        let mut piece = whole.clone();
        if !profile.bio_based && rng.one_in(6) {
            piece.end = whole.start + 1 + rng.below(whole.end - whole.start);
        }
        let length = (piece.end - piece.start) as usize;
        if !failed && self.bios[i].taken[..length].contains(&false) {
            return;
        }
        let mut ended = vec![(i, length)];
        if !profile.bio_based && piece.end == whole.end && !failed {
            let op = self.bios[i].op;
            let neighbour = self.bios.iter().position(|bio| {
                bio.range.start == whole.end
                    && bio.op as u8 == op as u8
                    && may(bio)
                    && !bio.taken.contains(&false)
            });
            if let Some(neighbour) = neighbour
                && rng.one_in(2)
            {
                piece.end = self.bios[neighbour].range.end;
                ended.push((neighbour, (piece.end - whole.end) as usize));
            }
        }
        if failed {
            for at in 0..length {
                let fill = std::mem::replace(&mut self.bios[i].taken[at], true);
                if !fill && rng.one_in(2) {
                    self.device[(whole.start + at as u64) as usize] = self.bios[i].content;
                }
            }
        }
        for sector in piece.clone() {
            let at = sector as usize;
            self.on_its_way[at] -= 1;
            self.has_failed[at] |= failed;
            if self.on_its_way[at] > 0 {
                continue;
            }
            self.ended[at] = match (self.is_lost[at], self.has_failed[at]) {
                (false, true) => Ended::Failed,
                (false, false) if self.device[at] != self.issued[at] => Ended::Changed,
                _ => Ended::Well,
            };
            if let Some(sector) = self.of_volume(sector) {
                model.quiet(sector, at_ns, self.device[at], self.ended[at]);
            }
            self.is_lost[at] = false;
            self.has_failed[at] = false;
        }
        let was_changed = !failed && ended.iter().any(|&(i, _)| self.bios[i].was_changed);
        let event = CompleteEvent {
            kind: EventKind::Complete as u8,
            op: self.bios[i].op as u8,
            failed: u8::from(failed),
            whole_bio: u8::from(profile.bio_based),
            disk: DISK.0,
            bio: if profile.bio_based {
                self.bios[i].address
            } else {
                0
            },
            boot_ns: at_ns,
            sector: piece.start,
            bytes: ((piece.end - piece.start) * SECTOR_BYTES) as u32,
            reserved: 0,
        };
        // Only of writes that were seen, and only of drivers that tell where a request was: see the head of
        // `sim`.
        let is_skipped = profile.skips
            && !profile.bio_based
            && !failed
            && ended.iter().all(|&(i, _)| self.bios[i].unseen_since_ns.is_none())
            && rng.one_in(40);
        ended.sort_unstable();
        for (i, length) in ended.into_iter().rev() {
            let bio = &mut self.bios[i];
            bio.range.start += length as u64;
            bio.taken.drain(..length);
            if bio.range.is_empty() {
                self.bios.swap_remove(i);
            }
        }
        if is_skipped {
            self.skipped.push(Skipped {
                range: piece.clone(),
                position: self.produced,
                drained_at: None,
            });
        }
        if !self.is_watched || is_skipped {
            return;
        }
        if was_changed {
            let changed = CompleteEvent {
                kind: EventKind::Changed as u8,
                ..event
            };
            if !self.put(profile, RingEvent::Changed(changed), at_ns, 1) {
                // Its end must not be seen without it.
                self.counters.lost_completions += 1;
                self.losses_ns.push_back(at_ns);
                self.mark(&piece);
                self.count_drop(at_ns);
                model.lost(at_ns);
                return;
            }
        }
        if !self.put(profile, RingEvent::Complete(event), at_ns, 1) {
            self.mark(&piece);
            self.counters.lost_completions += 1;
            self.losses_ns.push_back(at_ns);
            model.lost(at_ns);
        }
    }
}

/// A sector of the disk, counted from the volume's start.
pub(super) fn of_volume(sector: u64) -> Option<usize> {
    let own = sector.checked_sub(START)? as usize;
    (own < SECTORS).then_some(own)
}
