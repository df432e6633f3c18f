//! Versions in memory over versions in RocksDB, seen as one sorted run of keys.

use std::collections::BTreeMap;
use std::collections::btree_map;
use std::ops::Range;

use super::IndexError;
use super::db::{Db, PutPair};
use super::key::{Level, VersionKey};
use super::version::Version;

/// Steps to the next key before a seek is thought cheaper.
const STEPS_BEFORE_SEEK: usize = 8;

/// What was applied and is not in RocksDB: yet, or, in a reader, ever.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    pub(crate) versions: BTreeMap<VersionKey, Version>,
    pub(crate) others: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Overlay {
    pub(crate) fn put(&mut self, key: VersionKey, version: Version) {
        self.versions.insert(key, version);
    }

    pub(crate) fn put_other(&mut self, key: &[u8], value: Vec<u8>) {
        self.others.insert(key.to_vec(), value);
    }

    pub(crate) fn len(&self) -> usize {
        self.versions.len() + self.others.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn clear(&mut self) {
        self.versions.clear();
        self.others.clear();
    }

    /// Every pair as RocksDB holds it, sorted by key.
    pub(crate) fn for_each_encoded(&self, visit: &mut PutPair<'_>) -> Result<(), IndexError> {
        let is_version = |key: &Vec<u8>| key.first() == Some(&VersionKey::PREFIX);
        debug_assert!(!self.others.keys().any(is_version));
        let middle = vec![VersionKey::PREFIX];
        for (key, value) in self.others.range(..middle.clone()) {
            visit(key, value)?;
        }
        let mut value = Vec::with_capacity(64);
        for (key, version) in &self.versions {
            value.clear();
            version.encode(&mut value);
            visit(&key.encode(), &value)?;
        }
        for (key, value) in self.others.range(middle..) {
            visit(key, value)?;
        }
        Ok(())
    }
}

/// An iterator over RocksDB, made when it is first needed.
pub(crate) struct DbCursor<'d> {
    db: Option<&'d Db>,
    iterator: Option<rocksdb::DBRawIterator<'d>>,
}

impl<'d> DbCursor<'d> {
    pub(crate) fn new(db: Option<&'d Db>) -> Self {
        Self { db, iterator: None }
    }

    fn seek(&mut self, key: &VersionKey) -> Result<Option<VersionKey>, IndexError> {
        let Some(db) = self.db else { return Ok(None) };
        let iterator = self.iterator.get_or_insert_with(|| db.versions());
        iterator.seek(key.encode());
        self.key()
    }

    fn step(&mut self) -> Result<Option<VersionKey>, IndexError> {
        if let Some(iterator) = &mut self.iterator
            && iterator.valid()
        {
            iterator.next();
        }
        self.key()
    }

    fn key(&self) -> Result<Option<VersionKey>, IndexError> {
        let Some(iterator) = &self.iterator else {
            return Ok(None);
        };
        match iterator.key() {
            Some(bytes) => match VersionKey::decode(bytes) {
                Some(key) => Ok(Some(key)),
                None if bytes.first() == Some(&VersionKey::PREFIX) => {
                    Err(IndexError::Corrupt("a version key that makes no sense"))
                }
                None => Ok(None),
            },
            None => {
                iterator.status()?;
                Ok(None)
            }
        }
    }

    fn version(&self) -> Result<Version, IndexError> {
        let value = self.iterator.as_ref().and_then(|iterator| iterator.value());
        value
            .and_then(Version::decode)
            .ok_or(IndexError::Corrupt("a version that makes no sense"))
    }
}

/// Both layers, sorted; where both have a key, the overlay's value counts.
pub(crate) struct Cursor<'o, 'c, 'd> {
    overlay: &'o BTreeMap<VersionKey, Version>,
    range: btree_map::Range<'o, VersionKey, Version>,
    over: Option<(VersionKey, &'o Version)>,
    db: &'c mut DbCursor<'d>,
    under: Option<VersionKey>,
}

impl<'o, 'c, 'd> Cursor<'o, 'c, 'd> {
    pub(crate) fn at(
        overlay: &'o Overlay,
        db: &'c mut DbCursor<'d>,
        key: &VersionKey,
    ) -> Result<Self, IndexError> {
        let mut range = overlay.versions.range(key..);
        let over = range.next().map(|(key, version)| (*key, version));
        let under = db.seek(key)?;
        Ok(Self {
            overlay: &overlay.versions,
            range,
            over,
            db,
            under,
        })
    }

    fn seek(&mut self, key: &VersionKey) -> Result<(), IndexError> {
        self.range = self.overlay.range(key..);
        self.over = self.range.next().map(|(key, version)| (*key, version));
        self.under = self.db.seek(key)?;
        Ok(())
    }

    fn key(&self) -> Option<VersionKey> {
        match (&self.over, self.under) {
            (Some((over, _)), Some(under)) => Some(under.min(*over)),
            (Some((over, _)), None) => Some(*over),
            (None, under) => under,
        }
    }

    fn version(&self) -> Result<Version, IndexError> {
        match &self.over {
            Some((over, version)) if self.under.is_none_or(|under| *over <= under) => Ok((*version).clone()),
            _ => self.db.version(),
        }
    }

    fn step(&mut self) -> Result<(), IndexError> {
        let Some(key) = self.key() else { return Ok(()) };
        if self.over.as_ref().is_some_and(|(over, _)| *over == key) {
            self.over = self.range.next().map(|(key, version)| (*key, version));
        }
        if self.under == Some(key) {
            self.under = self.db.step()?;
        }
        Ok(())
    }

    /// Goes to `target` or the first key after it: by steps while it seems near, then by a seek.
    fn skip_to(&mut self, target: &VersionKey) -> Result<(), IndexError> {
        for _ in 0..STEPS_BEFORE_SEEK {
            match self.key() {
                Some(key) if key < *target => self.step()?,
                _ => return Ok(()),
            }
        }
        match self.key() {
            Some(key) if key < *target => self.seek(target),
            _ => Ok(()),
        }
    }
}

/// The newest version of a unit at or before `seq`.
pub(crate) fn newest(
    overlay: &Overlay,
    db: &mut DbCursor<'_>,
    volume: u16,
    level: Level,
    unit: u64,
    seq: u64,
) -> Result<Option<(u64, Version)>, IndexError> {
    let wanted = VersionKey::new(volume, level, unit, seq);
    let cursor = Cursor::at(overlay, db, &wanted)?;
    match cursor.key() {
        Some(key) if key.same_unit(&wanted) => Ok(Some((key.seq(), cursor.version()?))),
        _ => Ok(None),
    }
}

/// The newest version at or before `seq` of every unit in a range that has one.
pub(crate) fn for_each_newest(
    overlay: &Overlay,
    db: &mut DbCursor<'_>,
    (volume, level): (u16, Level),
    units: Range<u64>,
    seq: u64,
    mut visit: impl FnMut(u64, u64, Version),
) -> Result<(), IndexError> {
    let start = VersionKey::newest_of(volume, level, units.start);
    let end = VersionKey::newest_of(volume, level, units.end);
    let mut cursor = Cursor::at(overlay, db, &start)?;
    while let Some(key) = cursor.key().filter(|key| *key < end) {
        if key.seq() > seq {
            cursor.skip_to(&VersionKey::new(volume, level, key.unit, seq))?;
        } else {
            visit(key.unit, key.seq(), cursor.version()?);
            cursor.skip_to(&VersionKey::newest_of(volume, level, key.unit + 1))?;
        }
    }
    Ok(())
}

/// Every version of `seq` or later of every unit in a range.
pub(crate) fn since(
    overlay: &Overlay,
    db: &mut DbCursor<'_>,
    (volume, level): (u16, Level),
    units: Range<u64>,
    seq: u64,
) -> Result<Vec<(VersionKey, Version)>, IndexError> {
    let start = VersionKey::newest_of(volume, level, units.start);
    let end = VersionKey::newest_of(volume, level, units.end);
    let mut cursor = Cursor::at(overlay, db, &start)?;
    let mut found = Vec::new();
    while let Some(key) = cursor.key().filter(|key| *key < end) {
        if key.seq() >= seq {
            found.push((key, cursor.version()?));
            cursor.step()?;
        } else {
            cursor.skip_to(&VersionKey::newest_of(volume, level, key.unit + 1))?;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::key::{META_APPLIED, event_key, frame_key, wall_key};
    use super::super::version::Source;
    use super::*;

    /// RocksDB takes a file only if its keys are sorted.
    #[test]
    fn pairs_of_every_kind_come_sorted_by_key() {
        let mut overlay = Overlay::default();
        overlay.put_other(&wall_key(5, 1), Vec::new());
        overlay.put_other(META_APPLIED, vec![1]);
        overlay.put_other(&event_key(1, 1, 1), vec![2]);
        overlay.put_other(&frame_key(1), vec![3]);
        for (unit, seq) in [(9, 4), (1, 7), (1, 300), (256, 5)] {
            for level in [Level::Unit, Level::Block] {
                overlay.put(VersionKey::new(1, level, unit, seq), Version::Whole(Source::Zero));
            }
        }
        let mut keys = Vec::new();
        overlay
            .for_each_encoded(&mut |key, _| {
                keys.push(key.to_vec());
                Ok(())
            })
            .unwrap();
        assert_eq!(keys.len(), overlay.len());
        assert!(keys.is_sorted_by(|a, b| a < b), "{keys:?}");
    }
}
