//! Ranges of a volume that were written, merged where they touch, with what is known about each.

use std::collections::BTreeMap;

use crate::time::Time;

/// How a range was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Bytes or zeroes were written.
    Write,
    /// It was discarded.
    Discard,
    /// It was read back from the device: something that was not captured may have changed it.
    ReadBack,
}

/// A range from its offset, which is its key in [`Changes`], to `end`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// First byte after it.
    pub(crate) end: u64,
    /// Writes and discards.
    pub(crate) writes: u64,
    /// The discards among them.
    pub(crate) discards: u64,
    pub(crate) read_backs: u64,
    pub(crate) first_at: Time,
    pub(crate) last_at: Time,
    /// Writes of each process, by pid and command name.
    pub(crate) by: BTreeMap<(u32, String), u64>,
}

/// All ranges that were changed, by offset. No two of them touch.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    ranges: BTreeMap<u64, Range>,
}

impl Changes {
    /// Adds one change; ranges that it touches become one with it.
    pub(crate) fn add(&mut self, offset: u64, len: u64, kind: Kind, at: Time, pid: u32, comm: &str) {
        let end = offset + len;
        if let Some((_, range)) = self.ranges.range_mut(..=offset).next_back()
            && range.end >= end
        {
            // The usual case in a busy volume: nothing moves.
            range.count(kind, at, pid, comm);
            return;
        }
        let mut start = offset;
        let mut merged = Range::new(end, at);
        while let Some((&at_offset, touching)) = self.ranges.range(..=end).next_back() {
            if touching.end < offset {
                break;
            }
            start = start.min(at_offset);
            if let Some(other) = self.ranges.remove(&at_offset) {
                merged.take(other);
            }
        }
        merged.count(kind, at, pid, comm);
        self.ranges.insert(start, merged);
    }

    /// Bytes in all ranges.
    pub(crate) fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(offset, range)| range.end - offset).sum()
    }

    /// Writes in all ranges.
    pub(crate) fn writes(&self) -> u64 {
        self.ranges.values().map(|range| range.writes).sum()
    }

    /// The ranges by offset.
    pub(crate) fn into_ranges(self) -> impl Iterator<Item = (u64, Range)> {
        self.ranges.into_iter()
    }
}

impl Range {
    fn new(end: u64, at: Time) -> Self {
        Range {
            end,
            writes: 0,
            discards: 0,
            read_backs: 0,
            first_at: at,
            last_at: at,
            by: BTreeMap::new(),
        }
    }

    fn count(&mut self, kind: Kind, at: Time, pid: u32, comm: &str) {
        self.first_at = self.first_at.min(at);
        self.last_at = self.last_at.max(at);
        if kind == Kind::ReadBack {
            // The agent read it: who wrote it is not known.
            self.read_backs += 1;
            return;
        }
        self.writes += 1;
        self.discards += u64::from(kind == Kind::Discard);
        *self.by.entry((pid, comm.to_owned())).or_default() += 1;
    }

    fn take(&mut self, other: Range) {
        self.end = self.end.max(other.end);
        self.writes += other.writes;
        self.discards += other.discards;
        self.read_backs += other.read_backs;
        self.first_at = self.first_at.min(other.first_at);
        self.last_at = self.last_at.max(other.last_at);
        for (who, writes) in other.by {
            *self.by.entry(who).or_default() += writes;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use cdp_journal::WallNs;

    use super::*;
    use crate::random::random;

    fn at(ns: i64) -> Time {
        Time(WallNs(ns))
    }

    #[test]
    fn ranges_that_touch_become_one_and_others_stay_apart() {
        let mut changes = Changes::default();
        changes.add(0, 10, Kind::Write, at(5), 1, "a");
        changes.add(20, 10, Kind::Discard, at(3), 2, "b");
        changes.add(40, 10, Kind::ReadBack, at(9), 3, "agent");
        changes.add(10, 10, Kind::Write, at(7), 1, "a");
        let ranges: Vec<_> = changes.into_ranges().collect();
        assert_eq!(ranges.len(), 2);
        let (offset, first) = &ranges[0];
        assert_eq!((*offset, first.end, first.writes, first.discards), (0, 30, 3, 1));
        assert_eq!((first.first_at, first.last_at), (at(3), at(7)));
        assert_eq!(
            first.by,
            BTreeMap::from([((1, "a".to_owned()), 2), ((2, "b".to_owned()), 1)])
        );
        let (offset, second) = &ranges[1];
        assert_eq!(
            (*offset, second.end, second.writes, second.read_backs),
            (40, 50, 0, 1)
        );
        assert!(second.by.is_empty());
    }

    /// Goal: merging loses no byte and no write. Method: random ranges, compared with a set of all bytes.
    #[test]
    fn merged_ranges_cover_exactly_what_was_added() {
        for seed in 0..200u64 {
            let mut next = random(seed);
            let (mut changes, mut covered) = (Changes::default(), BTreeSet::new());
            for time in 0..40 {
                let (offset, len) = (next(300), 1 + next(20));
                covered.extend(offset..offset + len);
                changes.add(offset, len, Kind::Write, at(time), 1, "w");
            }
            assert_eq!(
                (changes.writes(), changes.bytes()),
                (40, covered.len() as u64),
                "seed {seed}"
            );
            let ranges: Vec<_> = changes
                .into_ranges()
                .map(|(offset, range)| (offset, range.end))
                .collect();
            assert!(
                ranges.windows(2).all(|pair| pair[0].1 < pair[1].0),
                "seed {seed}: {ranges:?}"
            );
            let told: BTreeSet<_> = ranges.iter().flat_map(|(offset, end)| *offset..*end).collect();
            assert_eq!(told, covered, "seed {seed}");
        }
    }
}
