//! What must be true: the log replayed naively, beside what the device really held.
//!
//! The log's side of a sector is a list of (place, value): a write at its own Seq, what was read back at the Seq
//! that it is valid after. The device's side is a list of times at which nothing was on its way to the sector, with
//! what it held. Both meet in a *class*: the moments between two captured writes, and the times between the same
//! two. Of a class that the log calls exact, every quiet time must show what the log says.

use cdp_journal::SECTOR_BYTES;
use cdp_journal::format::Body;

use super::SECTORS;
use super::kernel::of_volume;

/// The first 8 bytes of a sector tell its content; 0 is a sector of zeroes.
pub(super) type Content = u64;

#[derive(Clone, Debug)]
struct Record {
    at_ns: u64,
    body: Body,
    contents: Vec<Content>,
    /// Of a gap's close: since when the ring has been emptied.
    drained_ns: u64,
}

/// A stretch of time in which nothing was on its way to a sector.
#[derive(Clone, Copy, Debug)]
struct Quiet {
    from_ns: u64,
    to_ns: u64,
    content: Content,
    ended: Ended,
    /// Up to then it need not show: see [`Model::exempt`].
    exempt_until_ns: u64,
    /// It was compared, and the log has been right since this record: nothing exempts it any more.
    settled_seq: Option<u64>,
}

/// How the writes before a quiet time ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The device holds what was issued last; or it does not, and something was lost.
    Well,
    /// The device took something else, of writes that were all captured and succeeded.
    Changed,
    /// The device failed one that was captured.
    Failed,
}

/// Something was queued that may change the volume.
#[derive(Clone, Copy, Debug)]
struct Queued {
    at_ns: u64,
    first_seq: Option<u64>,
    last_seq: u64,
    /// Where its last chunk ends in the volume.
    end_sector: usize,
    is_torn: bool,
}

/// A stretch of the log that is called exact.
#[derive(Clone, Copy, Debug)]
struct Exact {
    from_seq: u64,
    to_seq: Option<u64>,
    drained_ns: u64,
}

/// See the module's head.
#[derive(Clone, Copy, Debug)]
struct Class {
    stretch: usize,
    from_ns: u64,
    to_ns: u64,
    from_seq: u64,
    to_seq: u64,
}

#[derive(Debug)]
pub(super) struct Model {
    log: Vec<Record>,
    /// By sector: (place, Seq of the record), content; sorted.
    views: Vec<Vec<((u64, u64), Content)>>,
    quiet: Vec<Vec<Quiet>>,
    queued: Vec<Queued>,
    exact: Vec<Exact>,
    /// By the record that told it: the volume's size in sectors.
    sizes: Vec<(u64, usize)>,
    to_check: Vec<bool>,
    check_all: bool,
    pub(super) checked_sectors: u64,
    pub(super) gaps: u64,
}

fn sectors_of(body: &Body) -> Option<(std::ops::Range<usize>, Option<u64>)> {
    let (offset, len, as_of) = match *body {
        Body::Write { offset, len } | Body::Zero { offset, len } | Body::Discard { offset, len } => {
            (offset, len, None)
        }
        Body::ReadBack { offset, len, as_of } | Body::ReadBackZero { offset, len, as_of } => {
            (offset, len, Some(as_of.map_or(0, cdp_journal::Seq::get)))
        }
        _ => return None,
    };
    let sectors = (offset / SECTOR_BYTES) as usize..((offset + len) / SECTOR_BYTES) as usize;
    Some((sectors, as_of))
}

impl Model {
    pub(super) fn new(contents: &[Content]) -> Self {
        let quiet = contents.iter().map(|&content| {
            vec![Quiet {
                from_ns: 0,
                to_ns: u64::MAX,
                content,
                ended: Ended::Well,
                exempt_until_ns: 0,
                settled_seq: None,
            }]
        });
        Self {
            log: Vec::new(),
            views: vec![vec![((0, 0), 0)]; SECTORS],
            quiet: quiet.collect(),
            queued: Vec::new(),
            exact: Vec::new(),
            sizes: Vec::new(),
            to_check: vec![false; SECTORS],
            check_all: false,
            checked_sectors: 0,
            gaps: 0,
        }
    }

    pub(super) fn last_seq(&self) -> u64 {
        self.log.len() as u64
    }

    pub(super) fn is_exact(&self) -> bool {
        self.exact.last().is_some_and(|exact| exact.to_seq.is_none())
    }

    /// The last exact record up to `durable`.
    pub(super) fn last_exact(&self, durable: u64) -> Option<cdp_journal::Seq> {
        let last = self.exact.last()?;
        cdp_journal::Seq::new(last.to_seq.unwrap_or(durable))
    }

    /// Does the log know the volume?
    pub(super) fn is_declared(&self) -> bool {
        self.log
            .iter()
            .any(|record| matches!(record.body, Body::Volume { .. }))
    }

    /// A record was made.
    pub(super) fn record(&mut self, seq: u64, at_ns: u64, body: Body, data: &[u8], drained_ns: u64) {
        assert_eq!(seq, self.last_seq() + 1, "Seqs are dense");
        let contents = data
            .chunks(SECTOR_BYTES as usize)
            .map(|sector| sector.first_chunk().map_or(0, |&bytes| u64::from_le_bytes(bytes)))
            .collect();
        self.log.push(Record {
            at_ns,
            body,
            contents,
            drained_ns,
        });
        self.apply(seq);
    }

    fn apply(&mut self, seq: u64) {
        let record = &self.log[seq as usize - 1];
        match record.body {
            Body::GapClose => {
                assert!(
                    self.exact.last().is_none_or(|exact| exact.to_seq.is_some()),
                    "closed twice at {seq}"
                );
                self.exact.push(Exact {
                    from_seq: seq,
                    to_seq: None,
                    drained_ns: record.drained_ns,
                });
                self.check_all = true;
            }
            Body::GapOpen { last_exact, .. } => {
                if let Some(exact) = self.exact.pop_if(|exact| exact.to_seq.is_none()) {
                    self.gaps += 1;
                    let to_seq = last_exact.map_or(0, cdp_journal::Seq::get);
                    assert!(to_seq < seq, "{seq} opens a gap behind itself");
                    if to_seq >= exact.from_seq {
                        self.exact.push(Exact {
                            to_seq: Some(to_seq),
                            ..exact
                        });
                    }
                }
                // It may reach back into stretches that were closed before.
                while let Some(exact) = self
                    .exact
                    .pop_if(|exact| exact.to_seq > Some(last_exact.map_or(0, cdp_journal::Seq::get)))
                {
                    let to_seq = last_exact.map(cdp_journal::Seq::get);
                    if to_seq >= Some(exact.from_seq) {
                        self.exact.push(Exact { to_seq, ..exact });
                    }
                }
                self.check_all = true;
            }
            Body::Volume { bytes, .. } | Body::Resize { bytes } => {
                let sectors = (bytes / SECTOR_BYTES) as usize;
                let before = self.size_at(u64::MAX).unwrap_or(SECTORS);
                self.sizes.push((seq, sectors));
                // What lies beyond a smaller size is gone.
                for sector in sectors..before {
                    self.insert(sector, (seq, 0), 0);
                }
            }
            _ => {}
        }
        let record = &self.log[seq as usize - 1];
        let Some((sectors, as_of)) = sectors_of(&record.body) else {
            return;
        };
        let place = as_of.map_or((seq, 0), |as_of| (as_of, seq));
        let contents = record.contents.clone();
        for (i, sector) in sectors.enumerate() {
            self.insert(sector, place, contents.get(i).copied().unwrap_or(0));
        }
    }

    fn insert(&mut self, sector: usize, place: (u64, u64), content: Content) {
        let view = &mut self.views[sector];
        let at = view.partition_point(|(other, _)| *other < place);
        view.insert(at, (place, content));
        self.to_check[sector] = true;
    }

    /// The volume's size at a Seq, in sectors.
    pub(super) fn size_at(&self, seq: u64) -> Option<usize> {
        let told = self.sizes.partition_point(|&(told, _)| told <= seq);
        told.checked_sub(1).map(|told| self.sizes[told].1)
    }

    /// If the volume is too small at a Seq to have the sector: when that was recorded.
    fn is_missing(&self, sector: usize, seq: u64) -> Option<u64> {
        let told = self.sizes.partition_point(|&(told, _)| told <= seq);
        let (told, size) = self.sizes[told.checked_sub(1)?];
        (size <= sector).then(|| self.log[told as usize - 1].at_ns)
    }

    /// The agent died. A gap that it had not made durable is lost, and with it that a write had failed just before:
    /// the limit of ARCHITECTURE.md, "Completions".
    pub(super) fn crashed(&mut self, at_ns: u64, next: u64) {
        self.interrupted(at_ns, next);
        self.exempt(0..SECTORS, at_ns, Ended::Failed);
    }

    /// A write to this range of the disk had been skipped before, or the volume had grown, and it had not made durable
    /// that it knew: the limits of ARCHITECTURE.md, "A gap opens".
    pub(super) fn crashed_after_a_miss(&mut self, since_ns: u64, range: std::ops::Range<u64>, at_ns: u64) {
        for sector in range.filter_map(of_volume) {
            for quiet in self.quiet[sector]
                .iter_mut()
                .filter(|quiet| quiet.from_ns >= since_ns)
            {
                quiet.exempt_until_ns = quiet.exempt_until_ns.max(at_ns);
            }
        }
    }

    /// Its store filled up, or it died, and the log ends before `next`. What changed in flight is not corrected any
    /// more.
    pub(super) fn interrupted(&mut self, at_ns: u64, next: u64) {
        self.lost(at_ns);
        self.cut(next);
        self.exempt(0..SECTORS, at_ns, Ended::Changed);
    }

    /// The agent died, and what it had not appended to its log will be recorded again.
    pub(super) fn killed(&mut self, next: u64) {
        self.cut_back(next);
    }

    /// Captured writes of the log, from one record on: Seq, time, bytes.
    pub(super) fn writes_from(&self, first: u64) -> impl Iterator<Item = (u64, u64, std::ops::Range<u64>)> {
        let from = (first as usize).saturating_sub(1).min(self.log.len());
        self.log[from..]
            .iter()
            .zip(from as u64 + 1..)
            .filter_map(|(record, seq)| match record.body {
                Body::Write { offset, len } | Body::Zero { offset, len } | Body::Discard { offset, len } => {
                    Some((seq, record.at_ns, offset..offset + len))
                }
                _ => None,
            })
    }

    /// The time of the latest record.
    pub(super) fn latest_ns(&self) -> u64 {
        self.log.iter().map(|record| record.at_ns).max().unwrap_or(0)
    }

    /// Since which record the log has been exact, up to its end.
    pub(super) fn exact_since(&self) -> Option<u64> {
        self.exact
            .last()
            .filter(|exact| exact.to_seq.is_none())
            .map(|exact| exact.from_seq)
    }

    /// What was recorded from `next` on is lost.
    fn cut(&mut self, next: u64) {
        self.cut_back(next);
        for queued in &mut self.queued {
            // What came of it is in the log; its later chunks had not come yet, and will not.
            let recorded = (queued.last_seq as usize)
                .checked_sub(1)
                .and_then(|i| sectors_of(&self.log.get(i)?.body));
            let is_begun = queued.first_seq.is_some();
            queued.is_torn |= is_begun && recorded.is_none_or(|(sectors, _)| sectors.end < queued.end_sector);
        }
    }

    fn cut_back(&mut self, next: u64) {
        if next > self.last_seq() {
            return;
        }
        self.log.truncate(next as usize - 1);
        self.views = vec![vec![((0, 0), 0)]; SECTORS];
        self.exact.clear();
        self.sizes.clear();
        for seq in 1..next {
            self.apply(seq);
        }
        for quiet in self.quiet.iter_mut().flatten() {
            quiet.settled_seq = quiet.settled_seq.filter(|&seq| seq < next);
        }
        for queued in &mut self.queued {
            queued.first_seq = queued.first_seq.filter(|&first| first < next);
        }
        self.check_all = true;
    }

    /// Something was lost: it may change the volume.
    pub(super) fn lost(&mut self, at_ns: u64) {
        self.queued(at_ns, 0..0);
    }

    /// A write to this range of the disk was queued. Returns its number.
    pub(super) fn queued(&mut self, at_ns: u64, range: std::ops::Range<u64>) -> usize {
        self.queued.push(Queued {
            at_ns,
            first_seq: None,
            last_seq: 0,
            end_sector: range.rev().find_map(of_volume).map_or(0, |last| last + 1),
            is_torn: false,
        });
        self.queued.len() - 1
    }

    /// A part of it got this Seq.
    pub(super) fn captured(&mut self, number: usize, seq: u64) {
        let queued = &mut self.queued[number];
        queued.first_seq.get_or_insert(seq);
        queued.last_seq = seq;
    }

    /// Only a part of it is in the ring.
    pub(super) fn tear(&mut self, number: usize) {
        self.queued[number].is_torn = true;
    }

    /// Something is on its way to the sector.
    pub(super) fn busy(&mut self, sector: usize, at_ns: u64) {
        if let Some(last) = self.quiet[sector].last_mut() {
            last.to_ns = last.to_ns.min(at_ns);
        }
    }

    /// Nothing is any more.
    pub(super) fn quiet(&mut self, sector: usize, at_ns: u64, content: Content, ended: Ended) {
        self.quiet[sector].push(Quiet {
            from_ns: at_ns,
            to_ns: u64::MAX,
            content,
            ended,
            exempt_until_ns: 0,
            settled_seq: None,
        });
        self.to_check[sector] = true;
    }

    /// What ended so in these sectors and was not compared yet will not be corrected for times before `before_ns`:
    /// the limits of ARCHITECTURE.md, "Changed in flight". It hides no other fault, because
    /// - only a write that was captured and succeeded, and whose bytes the device took otherwise, is exempt (what
    ///   failed is at a crash only); what was lost never is;
    /// - what was compared once stays compared: a later loss must not spoil what the log had right;
    /// - from `before_ns` on the same sectors must show what the device holds, whether they are written again or not.
    pub(super) fn exempt(&mut self, sectors: std::ops::Range<usize>, before_ns: u64, ended: Ended) {
        for quiet in self.quiet[sectors].iter_mut().flatten() {
            if quiet.ended == ended && quiet.settled_seq.is_none() && quiet.from_ns < before_ns {
                quiet.exempt_until_ns = quiet.exempt_until_ns.max(before_ns);
            }
        }
    }

    /// The sectors of a block were read at `read_ns` and compared.
    pub(super) fn settled(&mut self, sectors: std::ops::Range<usize>, read_ns: u64) {
        let last_seq = self.last_seq();
        for quiet in self.quiet[sectors.clone()].iter_mut().flatten() {
            if quiet.from_ns < read_ns {
                quiet.settled_seq.get_or_insert(last_seq);
            }
        }
        self.to_check[sectors].fill(true);
    }

    fn content_at(&self, sector: usize, seq: u64) -> Content {
        let view = &self.views[sector];
        view[view.partition_point(|((place, _), _)| *place <= seq) - 1].1
    }

    /// As the index shows it when records up to `applied` are in it: content, and the record that wrote it.
    pub(super) fn head(&self, sector: usize, applied: u64) -> (Content, u64) {
        let known = |&&((place, record), _): &&((u64, u64), Content)| place <= applied && record <= applied;
        let found = self.views[sector].iter().rev().find(known);
        found.map_or((0, 0), |&((place, _), content)| (content, place))
    }

    pub(super) fn latest(&self, sector: usize) -> Content {
        self.content_at(sector, u64::MAX)
    }

    fn classes(&self) -> Vec<Class> {
        let mut classes: Vec<Class> = Vec::new();
        let next_after = |at_ns: u64| {
            let next = self.queued.partition_point(|queued| queued.at_ns <= at_ns);
            self.queued.get(next).map_or(u64::MAX, |queued| queued.at_ns)
        };
        let mut captured = self
            .queued
            .iter()
            .filter_map(|queued| queued.first_seq.map(|first| (first, queued)))
            .peekable();
        let (mut base_ns, mut base_seq) = (0, 0);
        for (stretch, exact) in self.exact.iter().enumerate() {
            let to_seq = exact.to_seq.unwrap_or(self.last_seq());
            while let Some((_, queued)) = captured.next_if(|(first, _)| *first <= exact.from_seq) {
                (base_ns, base_seq) = (queued.at_ns, queued.last_seq);
            }
            let from_ns = exact.drained_ns.max(base_ns);
            classes.push(Class {
                stretch,
                from_ns,
                to_ns: next_after(from_ns),
                // The gap may close between two chunks of a bio.
                from_seq: exact.from_seq.max(base_seq),
                to_seq,
            });
            while let Some((first, queued)) = captured.next_if(|(first, _)| *first <= to_seq) {
                if let Some(last) = classes.last_mut() {
                    last.to_seq = first - 1;
                }
                (base_ns, base_seq) = (queued.at_ns, queued.last_seq);
                classes.push(Class {
                    stretch,
                    from_ns: queued.at_ns,
                    to_ns: if queued.is_torn {
                        queued.at_ns
                    } else {
                        next_after(queued.at_ns)
                    },
                    // Between its chunks a bio is one unit.
                    from_seq: queued.last_seq,
                    to_seq,
                });
            }
            // At its end a stretch covers the time of its last record, not the time until the next.
            if let Some(last) = classes.last_mut() {
                let times = self.log[..to_seq as usize].iter().map(|record| record.at_ns);
                let covered_ns = times.max().map_or(0, |at_ns| at_ns + 1);
                last.to_ns = last.to_ns.min(covered_ns).max(last.from_ns);
            }
        }
        classes
    }

    /// Compares what changed since the last call, or everything. `known_ns`: what happened up to here has come to
    /// the agent. `suspects`: blocks that wait to be compared.
    pub(super) fn check(&mut self, everything: bool, known_ns: u64, suspects: u64) -> Result<(), String> {
        let everything = std::mem::take(&mut self.check_all) || everything;
        if !everything && !self.to_check.contains(&true) {
            return Ok(());
        }
        let classes = self.classes();
        for sector in 0..SECTORS {
            if std::mem::take(&mut self.to_check[sector]) || everything {
                self.checked_sectors += 1;
                self.check_sector(sector, &classes, known_ns, suspects >> (sector / 8) & 1 == 1)?;
            }
        }
        Ok(())
    }

    fn check_sector(
        &self,
        sector: usize,
        classes: &[Class],
        known_ns: u64,
        is_suspect: bool,
    ) -> Result<(), String> {
        for quiet in &self.quiet[sector] {
            let end_ns = quiet.to_ns.min(known_ns);
            let from_ns = quiet.from_ns.max(quiet.exempt_until_ns);
            // What waits to be compared is not claimed yet; a write that failed never waits.
            let waits = quiet.ended != Ended::Failed && is_suspect && quiet.settled_seq.is_none();
            if waits || from_ns >= end_ns {
                continue;
            }
            let first = classes.partition_point(|class| class.to_ns <= from_ns);
            let past = classes.partition_point(|class| class.from_ns < end_ns);
            for group in classes[first.min(past)..past].chunk_by(|a, b| a.stretch == b.stretch) {
                let (from, to) = (group[0].from_seq, group[group.len() - 1].to_seq);
                let between = self.views[sector]
                    .iter()
                    .map(|((place, _), _)| *place)
                    .filter(|place| (from..=to).contains(place));
                // A stretch that ends between two chunks of a bio has no moment of it.
                for seq in between.chain([from]).filter(|&seq| seq <= to) {
                    if let Some(told_ns) = self.is_missing(sector, seq) {
                        if quiet.from_ns < told_ns && quiet.to_ns <= told_ns {
                            continue;
                        }
                        return Err(format!(
                            "moment {seq} is called exact (of {from}..={to}), and the volume has no sector {sector} then: \
                             the device held {quiet:?}"
                        ));
                    }
                    let found = self.content_at(sector, seq);
                    if found != quiet.content {
                        return Err(format!(
                            "moment {seq} is called exact (of {from}..={to}), and shows {found} in sector {sector} \
                             (block {}): the device held {quiet:?}; view {:?}",
                            sector / 8,
                            self.views[sector]
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// The records from `seq` on, for a failure's report.
    pub(super) fn tail(&self, records: usize) -> Vec<String> {
        let from = self.log.len().saturating_sub(records);
        let log = self.log[from..].iter().enumerate();
        log.map(|(i, record)| {
            format!(
                "seq {} {:?} {:?}",
                from + i + 1,
                record.body,
                record.contents.first()
            )
        })
        .collect()
    }
}
