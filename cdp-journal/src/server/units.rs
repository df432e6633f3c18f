//! Which packed units are here, and where they lie: for all histories, by hash.
//!
//! RocksDB in the folder `units/`, one entry for each unit and agent:
//!
//! | at | bytes | key                                          | at | bytes | value                               |
//! |---:|------:|----------------------------------------------|---:|------:|-------------------------------------|
//! |  0 |    16 | first half of the [`UnitHash`]               |  0 |    16 | id of the history                   |
//! | 16 |     8 | first bytes of the BLAKE3 hash of the name   | 16 |     8 | segment                             |
//! |    |       |                                              | 24 |     8 | where in it the group begins        |
//! |    |       |                                              | 32 |       | the agent's name                    |
//!
//! Always true: an entry is a hint. What it leads to is read from the log and hashed before it counts for anything, so a
//! log that is gone, damaged or set back costs bytes on the line and nothing else; so does the folder when it is deleted
//! while no server runs. It takes some 100 bytes for each 64 KiB that was read back.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use rocksdb::{BlockBasedOptions, Cache, DB, DBCompressionType, Direction, ErrorKind, IteratorMode, Options};
use serde::Deserialize;
use uuid::Uuid;

use super::logs::History;
use crate::format::{PackedUnit, UnitHash, bytes_at, stored_group_bytes, u64_at};
use crate::log::FrameLocation;
use crate::site::{AgentName, Site};
use crate::store::LOG_DIR;
use crate::types::{SegmentId, Seq};
use crate::view::{GROUP_STORED_BYTES_MAX, read_full};

const UNITS_DIR: &str = "units";
/// Changes when keys or values do. Another one is made anew, empty.
const FORMAT: u32 = 1;
/// No key of a unit is as short.
const FORMAT_KEY: &[u8] = b"format";
const HASH_BYTES: usize = 16;
const TAG_BYTES: usize = 8;
/// Agents that are asked for a unit that the agent itself does not have.
const OTHERS_MAX: usize = 4;
const WRITE_BUFFER_BYTES: usize = 2 << 20;
const BLOCK_CACHE_BYTES: usize = 8 << 20;
const OPEN_FILES_MAX: i32 = 64;

/// Among whose content a server looks for what an agent offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Offers {
    /// The agent's own: all histories of its name.
    #[default]
    Own,
    /// That of all agents: whoever may append learns whether somebody has a content that it knows.
    All,
    /// Nobody's: everything is sent.
    Off,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Units {
    /// `None`: nothing is looked for, and nothing noted.
    db: Option<DB>,
    site: Site,
    offers: Offers,
    /// It was told that nothing can be noted.
    is_told: AtomicBool,
}

impl Units {
    /// Those of the server in `site`. Where they cannot be used, there are none.
    pub(super) fn open(site: &Site, offers: Offers) -> Arc<Self> {
        let dir = site.dir().join(UNITS_DIR);
        let db = (offers != Offers::Off).then(|| open_db(&dir));
        let db = db.and_then(|opened| {
            let note = |error| tracing::error!(dir = %dir.display(), "nothing can be offered: {error}");
            opened.map_err(note).ok()
        });
        Arc::new(Self {
            db,
            site: site.clone(),
            offers,
            is_told: AtomicBool::new(false),
        })
    }

    /// As one history sees them.
    pub(super) fn of(self: &Arc<Self>, history: &History) -> Known {
        Known {
            units: Arc::downgrade(self),
            agent: history.agent.clone(),
            log: history.log,
        }
    }

    /// What the unit stores, if it is where the entry says.
    fn read(&self, value: &[u8], hash: &UnitHash) -> Option<Vec<u8>> {
        let (place, agent) = value.split_at_checked(32)?;
        let agent: AgentName = std::str::from_utf8(agent).ok()?.parse().ok()?;
        let log = Uuid::from_bytes(bytes_at(place, 0));
        let segment = SegmentId(Seq::new(u64_at(place, 16))?).file_name();
        let path = self.site.log_dir(&agent, log).join(LOG_DIR).join(segment);
        let mut group = vec![0; GROUP_STORED_BYTES_MAX];
        let filled = read_full(&File::open(path).ok()?, u64_at(place, 24), &mut group).ok()?;
        group.truncate(filled);
        group.truncate(stored_group_bytes(&group));
        let (header, stored) = group.split_first_chunk()?;
        (UnitHash::of(header, stored) == *hash).then(|| stored.to_vec())
    }
}

/// What one history may be said to have, and where it tells what it has.
#[derive(Clone, Debug)]
pub(super) struct Known {
    /// Threads that outlive the server must not keep its folder.
    units: Weak<Units>,
    agent: AgentName,
    log: Uuid,
}

impl Known {
    /// What the unit of that hash stores, read and hashed just now.
    pub(super) fn find(&self, hash: &UnitHash) -> Option<Vec<u8>> {
        let units = self.units.upgrade()?;
        let db = units.db.as_ref()?;
        let own = key(hash, &self.agent);
        let look = |key: &[u8], value: &[u8]| {
            let found = units.read(value, hash);
            if found.is_none() {
                // Another that has come meanwhile may go with it: it is sent once more, then.
                let _ = db.delete(key);
            }
            found
        };
        let is_own = |value: &Vec<u8>| value.get(32..) == Some(self.agent.as_str().as_bytes());
        let found = db.get(own).ok()?.filter(is_own);
        let found = found.and_then(|value| look(&own, &value));
        if found.is_some() || units.offers != Offers::All {
            return found;
        }
        let from = IteratorMode::From(&own[..HASH_BYTES], Direction::Forward);
        let others = db.iterator(from).map_while(Result::ok);
        let others = others.take_while(|(key, _)| key.starts_with(&own[..HASH_BYTES]));
        let mut others = others.filter(|(key, _)| **key != own).take(OTHERS_MAX);
        others.find_map(|(key, value)| look(&key, &value))
    }

    /// A bit for each of the hashes: is it here?
    pub(super) fn have(&self, hashes: &[UnitHash]) -> u32 {
        let bits = hashes.iter().enumerate();
        bits.fold(0, |bits, (index, hash)| {
            bits | u32::from(self.find(hash).is_some()) << index
        })
    }

    /// Is it worth while to hash what comes in?
    pub(super) fn are_noted(&self) -> bool {
        self.units.upgrade().is_some_and(|units| units.db.is_some())
    }

    /// Notes the units of a frame of this history, whose groups begin so far behind the frame.
    pub(super) fn add(&self, frame: &FrameLocation, units: &[(PackedUnit, usize)]) {
        let Some(known) = self.units.upgrade().filter(|_| !units.is_empty()) else {
            return;
        };
        let Some(db) = &known.db else { return };
        let mut batch = rocksdb::WriteBatch::default();
        for (unit, offset) in units {
            let value = [
                &self.log.as_bytes()[..],
                &frame.segment.0.get().to_le_bytes(),
                &(frame.offset + *offset as u64).to_le_bytes(),
                self.agent.as_str().as_bytes(),
            ];
            batch.put(key(&unit.hash, &self.agent), value.concat());
        }
        if let Err(error) = db.write(batch)
            && !known.is_told.swap(true, Ordering::Relaxed)
        {
            tracing::warn!("what comes in is not known when it is offered again: {error}");
        }
    }
}

fn key(hash: &UnitHash, agent: &AgentName) -> [u8; HASH_BYTES + TAG_BYTES] {
    let mut key = [0; HASH_BYTES + TAG_BYTES];
    key[..HASH_BYTES].copy_from_slice(&hash.as_bytes()[..HASH_BYTES]);
    let tag = blake3::hash(agent.as_str().as_bytes());
    key[HASH_BYTES..].copy_from_slice(&tag.as_bytes()[..TAG_BYTES]);
    key
}

fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
    table.set_cache_index_and_filter_blocks(true);
    // Most of what a new host offers is not here.
    table.set_bloom_filter(10.0, false);
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    options.set_compression_type(DBCompressionType::Lz4);
    options.create_if_missing(true);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_stats_dump_period_sec(0);
    options
}

fn open_db(dir: &Path) -> Result<DB, rocksdb::Error> {
    let format = FORMAT.to_le_bytes();
    let why = match DB::open(&options(), dir) {
        Ok(db) => match db.get(FORMAT_KEY)? {
            Some(found) if found == format => return Ok(db),
            // Made just now.
            None if db.iterator(IteratorMode::Start).next().is_none() => {
                db.put(FORMAT_KEY, format)?;
                return Ok(db);
            }
            _ => "of another format".to_owned(),
        },
        Err(error) if error.kind() == ErrorKind::IOError => return Err(error),
        Err(error) => error.to_string(),
    };
    tracing::warn!(dir = %dir.display(), why, "what can be offered is forgotten");
    DB::destroy(&options(), dir)?;
    let db = DB::open(&options(), dir)?;
    db.put(FORMAT_KEY, format)?;
    Ok(db)
}

/// Threads of a server that ended with its runtime, not with its process, may hold its folder for a moment longer.
#[cfg(test)]
pub(super) fn are_free(site: &Path) -> bool {
    let dir = site.join(UNITS_DIR);
    !dir.exists() || DB::open(&options(), dir).is_ok()
}
