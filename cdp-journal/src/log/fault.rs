//! A disk in memory that loses what was not synced, for tests.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::disk::{Disk, DiskFile};

/// Random numbers that a printed seed replays (SplitMix64).
#[derive(Debug, Clone, Default)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

#[derive(Debug, Clone)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    SetLen(usize),
}

impl Change {
    fn apply(&self, data: &mut Vec<u8>) {
        match self {
            Self::Write { offset, bytes } => {
                if data.len() < offset + bytes.len() {
                    data.resize(offset + bytes.len(), 0);
                }
                data[*offset..offset + bytes.len()].copy_from_slice(bytes);
            }
            Self::SetLen(len) => data.resize(*len, 0),
        }
    }
}

/// What becomes of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It fails. Of a write, half is done. Of the data that a sync was to write, any part is written and the rest never
    /// will be, as kernels have it; names are kept.
    Fails(io::ErrorKind),
    /// It does not happen, nor does anything after it: who asked for it was killed.
    Killed,
}

/// Operations that do not go well.
#[derive(Debug, Clone, Copy)]
struct Plan {
    first: u64,
    count: u64,
    fault: Fault,
}

#[derive(Debug, Clone, Default)]
struct FileState {
    /// As who reads it sees it.
    now: Vec<u8>,
    /// As it is on the disk, if the rest is lost.
    synced: Vec<u8>,
    /// What a sync has still to write.
    unsynced: Vec<Change>,
}

/// A name that was made (`Some`) or removed.
type NameChange = (String, Option<u64>);

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<u64, FileState>,
    names: BTreeMap<String, u64>,
    synced_names: BTreeMap<String, u64>,
    unsynced_names: Vec<NameChange>,
    /// Making names durable has failed.
    names_failed: bool,
    next_file: u64,
    operations: u64,
    stop_after: Option<u64>,
    plan: Option<Plan>,
    random: Random,
    free_bytes: Option<u64>,
    /// What the disk says is free, whatever it takes.
    told_free_bytes: Option<u64>,
    is_busy: bool,
}

impl State {
    /// Counts a change; `Err` if it does not go well.
    fn operation(&mut self) -> Result<(), Fault> {
        if self.stop_after.is_some_and(|stop| self.operations >= stop) {
            return Err(Fault::Killed);
        }
        let number = self.operations;
        self.operations += 1;
        match self.plan {
            Some(plan) if number >= plan.first && number - plan.first < plan.count => Err(plan.fault),
            _ => Ok(()),
        }
    }

    fn change_name(&mut self, name: &str, file: Option<u64>) {
        apply_name(&mut self.names, (name, file));
        self.unsynced_names.push((name.to_owned(), file));
    }
}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Fails(kind) => kind.into(),
            Fault::Killed => io::Error::other("killed"),
        }
    }
}

fn apply_name(names: &mut BTreeMap<String, u64>, (name, file): (&str, Option<u64>)) {
    match file {
        Some(file) => names.insert(name.to_owned(), file),
        None => names.remove(name),
    };
}

/// A file as it is when any part of what was not synced has landed, torn anywhere.
fn land(synced: &mut Vec<u8>, changes: &[Change], random: &mut Random) {
    for change in changes {
        match (random.below(4), change) {
            (0, _) => {}
            (1, Change::Write { offset, bytes }) => {
                let from = random.below(bytes.len() as u64 + 1) as usize;
                let to = from + random.below((bytes.len() - from) as u64 + 1) as usize;
                Change::Write {
                    offset: offset + from,
                    bytes: bytes[from..to].to_vec(),
                }
                .apply(synced);
            }
            (_, change) => change.apply(synced),
        }
    }
}

/// The disk. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub(crate) struct FaultDisk(Arc<Mutex<State>>);

impl FaultDisk {
    /// A disk that refuses every change after the first `operations`.
    pub(crate) fn stopping_after(operations: u64) -> Self {
        let disk = Self::default();
        disk.0.lock().stop_after = Some(operations);
        disk
    }

    /// A disk on which `fault` befalls `count` operations after the first `operations`.
    pub(crate) fn failing_after(operations: u64, count: u64, fault: Fault) -> Self {
        let disk = Self::default();
        disk.0.lock().plan = Some(Plan {
            first: operations,
            count,
            fault,
        });
        disk
    }

    pub(crate) fn operations(&self) -> u64 {
        self.0.lock().operations
    }

    /// `fault` befalls the next operation.
    pub(crate) fn fail_next(&self, fault: Fault) {
        let mut state = self.0.lock();
        let first = state.operations;
        state.plan = Some(Plan {
            first,
            count: 1,
            fault,
        });
    }

    /// From now on, only so many bytes can be written.
    pub(crate) fn leave_free(&self, bytes: u64) {
        self.0.lock().free_bytes = Some(bytes);
    }

    /// What waits for it takes long, or no more.
    pub(crate) fn set_busy(&self, is_busy: bool) {
        self.0.lock().is_busy = is_busy;
    }

    /// From now on the disk says that this much is free.
    pub(crate) fn tell_free(&self, bytes: u64) {
        self.0.lock().told_free_bytes = Some(bytes);
    }

    /// What a new kernel finds: of what was not synced, any part may have landed, in any order, torn anywhere.
    pub(crate) fn after_power_loss(&self, random: &mut Random) -> Self {
        let state = self.0.lock();
        let mut names = state.synced_names.clone();
        for (name, file) in &state.unsynced_names {
            if random.below(2) == 0 {
                apply_name(&mut names, (name, *file));
            }
        }
        let survive = |file: &FileState, random: &mut Random| {
            let mut data = file.synced.clone();
            land(&mut data, &file.unsynced, random);
            FileState {
                now: data.clone(),
                synced: data,
                unsynced: Vec::new(),
            }
        };
        let files = state
            .files
            .iter()
            .map(|(id, file)| (*id, survive(file, random)))
            .collect();
        Self(Arc::new(Mutex::new(State {
            files,
            synced_names: names.clone(),
            names,
            next_file: state.next_file,
            ..State::default()
        })))
    }

    /// Changes bytes behind everybody's back.
    pub(crate) fn edit(&self, name: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.0.lock();
        let id = state.names[name];
        let file = state.files.get_mut(&id).unwrap();
        edit(&mut file.now);
        file.synced = file.now.clone();
        file.unsynced.clear();
    }

    pub(crate) fn forget(&self, name: &str) {
        let mut state = self.0.lock();
        state.names.remove(name);
        state.synced_names.remove(name);
    }

    pub(crate) fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut state = self.0.lock();
        let id = state.next_file;
        state.next_file += 1;
        state.files.insert(
            id,
            FileState {
                now: bytes.clone(),
                synced: bytes,
                unsynced: Vec::new(),
            },
        );
        state.names.insert(name.to_owned(), id);
        state.synced_names.insert(name.to_owned(), id);
    }
}

impl Disk for FaultDisk {
    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("fault-disk").join(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut state = self.0.lock();
        // Recovery begins so: nothing is taken for granted any more.
        state.names_failed = false;
        Ok(state.names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.0.lock();
        state.operation()?;
        if state.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let id = state.next_file;
        state.next_file += 1;
        state.files.insert(id, FileState::default());
        state.change_name(name, Some(id));
        Ok(Box::new(FaultFile {
            disk: self.clone(),
            id,
            failed: AtomicBool::new(false),
        }))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.0.lock();
        let id = state.names.get(name).copied().ok_or(io::ErrorKind::NotFound)?;
        // The cache may show what a failed sync has lost. It is dropped for who opens the file.
        let file = state.files.get_mut(&id).unwrap();
        let len = file.now.len();
        file.now = file.synced.clone();
        file.unsynced
            .iter()
            .for_each(|change| change.apply(&mut file.now));
        file.now.resize(len, 0);
        Ok(Box::new(FaultFile {
            disk: self.clone(),
            id,
            failed: AtomicBool::new(false),
        }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.operation()?;
        if !state.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.change_name(name, None);
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut guard = self.0.lock();
        let state = &mut *guard;
        assert!(!state.names_failed, "a failed sync was tried again");
        let done = state.operation();
        match done {
            Ok(()) => {
                let changes = std::mem::take(&mut state.unsynced_names);
                changes
                    .iter()
                    .for_each(|(name, file)| apply_name(&mut state.synced_names, (name, *file)));
            }
            Err(fault) => state.names_failed = fault != Fault::Killed,
        }
        Ok(done?)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(self.0.lock().told_free_bytes.unwrap_or(u64::MAX))
    }

    fn is_busy(&self) -> bool {
        self.0.lock().is_busy
    }
}

#[derive(Debug)]
struct FaultFile {
    disk: FaultDisk,
    id: u64,
    /// A sync has failed.
    failed: AtomicBool,
}

impl FaultFile {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let stops = state.stop_after.is_some();
        let done = state.operation();
        let file = state.files.get_mut(&self.id).unwrap();
        let change = match (done, change) {
            (Err(Fault::Fails(_)), Change::Write { offset, mut bytes }) => {
                bytes.truncate(bytes.len() / 2);
                Change::Write { offset, bytes }
            }
            // What the disk was told last before it stopped may still land.
            (Err(Fault::Killed), change) if stops => {
                file.unsynced.push(change);
                return Ok(done?);
            }
            (Err(_), _) => return Ok(done?),
            (Ok(()), change) => change,
        };
        change.apply(&mut file.now);
        file.unsynced.push(change);
        Ok(done?)
    }
}

impl DiskFile for FaultFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let state = self.disk.0.lock();
        let data = &state.files[&self.id].now;
        let start = data.len().min(offset as usize);
        let bytes = buf.len().min(data.len() - start);
        buf[..bytes].copy_from_slice(&data[start..start + bytes]);
        Ok(bytes)
    }

    fn write_at(&self, offset: u64, first: &[u8], second: &[u8]) -> io::Result<()> {
        let mut bytes = [first, second].concat();
        let free_bytes = self.disk.0.lock().free_bytes;
        let is_short = free_bytes.is_some_and(|free| free < bytes.len() as u64);
        if let Some(free) = free_bytes {
            bytes.truncate(free as usize);
        }
        self.change(Change::Write {
            offset: offset as usize,
            bytes,
        })?;
        if is_short {
            Err(io::ErrorKind::StorageFull.into())
        } else {
            Ok(())
        }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().files[&self.id].now.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::SetLen(len as usize))
    }

    fn sync(&self) -> io::Result<()> {
        let mut guard = self.disk.0.lock();
        let state = &mut *guard;
        assert!(
            !self.failed.load(Ordering::SeqCst),
            "a failed sync was tried again"
        );
        let done = state.operation();
        let file = state.files.get_mut(&self.id).unwrap();
        match done {
            Ok(()) => {
                let changes = std::mem::take(&mut file.unsynced);
                changes.iter().for_each(|change| change.apply(&mut file.synced));
            }
            Err(Fault::Fails(_)) => {
                self.failed.store(true, Ordering::SeqCst);
                let changes = std::mem::take(&mut file.unsynced);
                land(&mut file.synced, &changes, &mut state.random);
            }
            Err(Fault::Killed) => {}
        }
        Ok(done?)
    }
}
