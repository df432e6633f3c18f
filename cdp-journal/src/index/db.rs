//! RocksDB, bounded and without a log of its own: the log of the store is the truth.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompactionStyle, DBCompressionType, Env, IngestExternalFileOptions,
    Options, ReadOptions, SstFileWriter,
};
use uuid::Uuid;

use super::key::{META_APPLIED, META_IDENTITY};
use super::{Applied, IndexError};

/// Changes when keys or values do. Another one is rebuilt from the log, so older ones need not be read.
const INDEX_FORMAT: u32 = 2;
/// Nothing but the identity goes through RocksDB's own memory.
const WRITE_BUFFER_BYTES: usize = 1 << 20;
/// Sorted runs that a read may meet before some are merged into one.
const RUNS_BEFORE_MERGE: i32 = 12;
/// Adding a run never waits for merging, which has the lowest priority: then reads meet more runs for a while.
const RUNS_NEVER_REACHED: i32 = 1 << 20;
/// A run on its way in. RocksDB does not take it for one of its own files.
const INCOMING_FILE: &str = "incoming";
const BLOCK_CACHE_BYTES: usize = 32 << 20;
const OPEN_FILES_MAX: i32 = 256;
/// One read of [`Db::read_ahead`].
const AHEAD_READ_BYTES: usize = 256 << 10;
/// A writer may remove files while a reader opens them.
const READER_OPEN_ATTEMPTS: u32 = 50;
const READER_OPEN_PAUSE: Duration = Duration::from_millis(10);

/// Takes a key and its value.
pub(crate) type PutPair<'a> = dyn FnMut(&[u8], &[u8]) -> Result<(), IndexError> + 'a;

/// An open database.
pub(crate) struct Db {
    pub(crate) db: DB,
    /// RocksDB wants to write a log of its doings; for a reader that must not be in the store.
    _log_dir: Option<tempfile::TempDir>,
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db").field("path", &self.db.path()).finish()
    }
}

fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
    table.set_cache_index_and_filter_blocks(true);
    table.set_block_size(16 << 10);
    table.set_format_version(5);
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    options.set_compression_type(DBCompressionType::Lz4);
    // Keys come in the order in which blocks were written, so runs overlap: merging them level by level would write
    // each key some ten times.
    options.set_compaction_style(DBCompactionStyle::Universal);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_stats_dump_period_sec(0);
    options
}

/// Opens the index in `dir` for writing. `Err` tells why it has to be made anew.
pub(crate) fn open_writer(dir: &Path, store: Uuid) -> Result<Db, String> {
    let mut options = options();
    options.create_if_missing(false);
    bound_writer(&mut options).map_err(|error| error.to_string())?;
    let db = DB::open(&options, dir).map_err(|error| error.to_string())?;
    check_identity(&db, store)?;
    Ok(Db { db, _log_dir: None })
}

fn bound_writer(options: &mut Options) -> Result<(), rocksdb::Error> {
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_background_jobs(2);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_level_zero_file_num_compaction_trigger(RUNS_BEFORE_MERGE);
    options.set_level_zero_slowdown_writes_trigger(RUNS_NEVER_REACHED);
    options.set_level_zero_stop_writes_trigger(RUNS_NEVER_REACHED);
    let mut env = Env::new()?;
    env.lower_thread_pool_cpu_priority();
    env.lower_thread_pool_io_priority();
    options.set_env(&env);
    Ok(())
}

/// Makes an empty index in `dir`, in place of whatever is there.
pub(crate) fn create(dir: &Path, store: Uuid) -> Result<Db, IndexError> {
    if dir.exists() {
        std::fs::remove_dir_all(dir).map_err(IndexError::Remove)?;
    }
    let mut options = options();
    options.create_if_missing(true);
    bound_writer(&mut options)?;
    let db = DB::open(&options, dir)?;
    let mut batch = rocksdb::WriteBatch::default();
    batch.put(META_IDENTITY, identity(store));
    db.write_without_wal(batch)?;
    db.flush()?;
    Ok(Db { db, _log_dir: None })
}

/// Opens the index in `dir` beside a writer. `Err` tells why it cannot be used.
pub(crate) fn open_reader(dir: &Path, store: Uuid) -> Result<Db, String> {
    if !dir.join("CURRENT").exists() {
        return Err("there is none".to_owned());
    }
    let log_dir = tempfile::tempdir().map_err(|error| format!("make a folder for its messages: {error}"))?;
    let mut options = options();
    options.set_db_log_dir(log_dir.path());
    // All files are opened now and stay readable after the writer has removed them.
    options.set_max_open_files(-1);
    let mut last_error = String::new();
    for _ in 0..READER_OPEN_ATTEMPTS {
        match DB::open_for_read_only(&options, dir, false) {
            Ok(db) => {
                check_identity(&db, store)?;
                return Ok(Db {
                    db,
                    _log_dir: Some(log_dir),
                });
            }
            Err(error) => last_error = error.to_string(),
        }
        std::thread::sleep(READER_OPEN_PAUSE);
    }
    Err(last_error)
}

fn identity(store: Uuid) -> Vec<u8> {
    [&INDEX_FORMAT.to_le_bytes()[..], store.as_bytes()].concat()
}

fn check_identity(db: &DB, store: Uuid) -> Result<(), String> {
    match db.get(META_IDENTITY) {
        Ok(Some(found)) if found == identity(store) => Ok(()),
        Ok(Some(_)) => Err("it is of another store or another format".to_owned()),
        Ok(None) => Err("it was never finished".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

impl Db {
    /// What has been applied.
    pub(crate) fn applied(&self) -> Result<Applied, IndexError> {
        match self.db.get(META_APPLIED)? {
            Some(bytes) => Applied::decode(&bytes).ok_or(IndexError::Corrupt("its state makes no sense")),
            None => Ok(Applied::default()),
        }
    }

    /// Adds pairs, sorted by key, whole or not at all. They are durable afterwards.
    ///
    /// They come as a file of their own: sorted once, they cost a third of what they would by way of a batch, which
    /// sorts them into memory one by one.
    pub(crate) fn add_run(
        &self,
        fill: impl FnOnce(&mut PutPair<'_>) -> Result<(), IndexError>,
    ) -> Result<(), IndexError> {
        let path = self.db.path().join(INCOMING_FILE);
        // After a crash it may be the second name of a run that was added: writing to it would destroy that one.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(IndexError::Remove(error));
            }
            _ => {}
        }
        let options = options();
        let mut file = SstFileWriter::create(&options);
        file.open(&path)?;
        fill(&mut |key, value| Ok(file.put(key, value)?))?;
        file.finish()?;
        let mut ingest = IngestExternalFileOptions::default();
        ingest.set_move_files(true);
        Ok(self.db.ingest_external_file_opts(&ingest, vec![path])?)
    }

    /// An iterator over version keys.
    pub(crate) fn versions(&self) -> rocksdb::DBRawIterator<'_> {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(vec![b'v' + 1]);
        self.db.raw_iterator_opt(options)
    }

    /// Reads its files, the smallest first, as far as `bytes_max` goes. One read at a time, so that others who need the
    /// disk are not kept waiting; and as long as `goes_on`.
    pub(crate) fn read_ahead(&self, bytes_max: u64, goes_on: &mut dyn FnMut() -> bool) {
        let Ok(mut files) = self.db.live_files() else {
            return;
        };
        files.sort_unstable_by_key(|file| file.size);
        let mut buf = vec![0; AHEAD_READ_BYTES];
        let mut left = bytes_max;
        for file in files {
            // Each of them is open already; what is wrong with one is told when it is needed.
            let path = self.db.path().join(file.name.trim_start_matches('/'));
            let Ok(mut file) = File::open(path) else { continue };
            loop {
                if left == 0 || !goes_on() {
                    return;
                }
                let most = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                match file.read(&mut buf[..most]) {
                    Ok(bytes) if bytes > 0 => left -= bytes as u64,
                    _ => break,
                }
            }
        }
    }

    /// Bytes of its files.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.db
            .property_int_value("rocksdb.total-sst-files-size")
            .ok()
            .flatten()
            .unwrap_or(0)
    }
}
