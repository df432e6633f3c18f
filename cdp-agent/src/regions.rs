//! Which regions of a volume must be read back.

/// A set of equally large regions of a volume.
#[derive(Debug, Default)]
pub(crate) struct Regions {
    words: Vec<u64>,
    count: u64,
    regions: u64,
    /// Where the next search begins: read back in order, and come round.
    cursor: u64,
}

impl Regions {
    /// An empty set of `regions` regions.
    pub(crate) fn new(regions: u64) -> Self {
        Self {
            words: vec![0; regions.div_ceil(64) as usize],
            count: 0,
            regions,
            cursor: 0,
        }
    }

    /// Makes room for a volume that grew, or forgets what lies beyond one that shrank.
    pub(crate) fn resize(&mut self, regions: u64) {
        let kept: Vec<u64> = self.iter().filter(|&region| region < regions).collect();
        *self = Self {
            cursor: self.cursor.min(regions),
            ..Self::new(regions)
        };
        for region in kept {
            self.insert(region);
        }
    }

    /// Adds a region; one beyond the volume is none of its own.
    pub(crate) fn insert(&mut self, region: u64) {
        if region >= self.regions {
            return;
        }
        let bit = 1 << (region % 64);
        let word = &mut self.words[(region / 64) as usize];
        if *word & bit == 0 {
            *word |= bit;
            self.count += 1;
        }
    }

    /// Adds all.
    pub(crate) fn insert_all(&mut self) {
        for region in 0..self.regions {
            self.insert(region);
        }
    }

    /// Is this region in?
    pub(crate) fn contains(&self, region: u64) -> bool {
        self.words
            .get((region / 64) as usize)
            .is_some_and(|word| word & (1 << (region % 64)) != 0)
    }

    /// Takes one region out.
    pub(crate) fn remove(&mut self, region: u64) {
        if self.contains(region) {
            self.words[(region / 64) as usize] &= !(1 << (region % 64));
            self.count -= 1;
        }
    }

    /// How many are in.
    pub(crate) fn len(&self) -> u64 {
        self.count
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn iter(&self) -> impl Iterator<Item = u64> {
        (0..self.regions).filter(|&region| self.contains(region))
    }

    fn next_from(&self, from: u64) -> Option<u64> {
        let mut word = (from / 64) as usize;
        let mut bits = *self.words.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.words.get(word)?;
        }
        Some(word as u64 * 64 + u64::from(bits.trailing_zeros()))
    }

    /// Takes out the next run of at most `regions_max` neighbours, going round the volume.
    pub(crate) fn take_run(&mut self, regions_max: u64) -> Option<std::ops::Range<u64>> {
        let start = self.next_from(self.cursor).or_else(|| self.next_from(0))?;
        let mut end = start;
        while end < self.regions && end - start < regions_max && self.contains(end) {
            self.remove(end);
            end += 1;
        }
        self.cursor = end;
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        /// Goal: whatever is inserted is taken out exactly once. Method: a set as a model.
        #[test]
        fn runs_take_out_what_was_put_in(
            regions in 1u64..300, put in prop::collection::vec(0u64..400, 0..200), most in 1u64..20
        ) {
            let mut set = Regions::new(regions);
            let mut model = BTreeSet::new();
            for region in put {
                set.insert(region);
                if region < regions { model.insert(region); }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            while let Some(run) = set.take_run(most) {
                prop_assert!(run.start < run.end && run.end - run.start <= most);
                for region in run { prop_assert!(model.remove(&region)); }
            }
            prop_assert!(model.is_empty() && set.is_empty());
        }
    }

    #[test]
    fn a_smaller_volume_forgets_what_lies_beyond() {
        let mut set = Regions::new(100);
        set.insert_all();
        set.resize(10);
        assert_eq!(set.len(), 10);
        set.resize(200);
        assert_eq!(set.take_run(500), Some(0..10));
    }
}
