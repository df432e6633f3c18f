//! A disk in memory that loses what was not synced, for tests.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use super::disk::{Disk, DiskFile};

/// Random numbers that a printed seed replays (SplitMix64).
#[derive(Debug, Clone)]
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

#[derive(Debug, Clone, Default)]
struct FileState {
    now: Vec<u8>,
    synced: Vec<u8>,
    unsynced: Vec<Change>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<u64, FileState>,
    names: BTreeMap<String, u64>,
    synced_names: BTreeMap<String, u64>,
    next_file: u64,
    operations: u64,
    stop_after: Option<u64>,
    fail_next_sync: bool,
    free_bytes: Option<u64>,
}

impl State {
    /// Counts a change; `Err` once the disk has stopped.
    fn operation(&mut self) -> io::Result<()> {
        if self.stop_after.is_some_and(|stop| self.operations >= stop) {
            return Err(io::Error::other("the disk has stopped"));
        }
        self.operations += 1;
        Ok(())
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

    pub(crate) fn operations(&self) -> u64 {
        self.0.lock().operations
    }

    pub(crate) fn fail_next_sync(&self) {
        self.0.lock().fail_next_sync = true;
    }

    /// From now on, only so many bytes can be written.
    pub(crate) fn leave_free(&self, bytes: u64) {
        self.0.lock().free_bytes = Some(bytes);
    }

    /// What a new kernel finds: of what was not synced, any part may have landed, in any order, torn anywhere.
    pub(crate) fn after_power_loss(&self, random: &mut Random) -> Self {
        let state = self.0.lock();
        let mut names = state.synced_names.clone();
        for (name, file) in &state.names {
            if random.below(2) == 0 {
                names.insert(name.clone(), *file);
            }
        }
        for name in state
            .synced_names
            .keys()
            .filter(|name| !state.names.contains_key(*name))
        {
            if random.below(2) == 0 {
                names.remove(name);
            }
        }
        let survive = |file: &FileState, random: &mut Random| {
            let mut data = file.synced.clone();
            for change in &file.unsynced {
                match (random.below(4), change) {
                    (0, _) => {}
                    (1, Change::Write { offset, bytes }) => {
                        let from = random.below(bytes.len() as u64 + 1) as usize;
                        let to = from + random.below((bytes.len() - from) as u64 + 1) as usize;
                        Change::Write {
                            offset: offset + from,
                            bytes: bytes[from..to].to_vec(),
                        }
                        .apply(&mut data);
                    }
                    (_, change) => change.apply(&mut data),
                }
            }
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
        Ok(self.0.lock().names.keys().cloned().collect())
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
        state.names.insert(name.to_owned(), id);
        Ok(Box::new(FaultFile {
            disk: self.clone(),
            id,
        }))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let id = self
            .0
            .lock()
            .names
            .get(name)
            .copied()
            .ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(FaultFile {
            disk: self.clone(),
            id,
        }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.operation()?;
        state
            .names
            .remove(name)
            .map(|_| ())
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        state.operation()?;
        state.synced_names = state.names.clone();
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

#[derive(Debug)]
struct FaultFile {
    disk: FaultDisk,
    id: u64,
}

impl FaultFile {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let stopped = state.operation();
        let file = state.files.get_mut(&self.id).unwrap();
        // What the disk was told last before it stopped may still land.
        file.unsynced.push(change.clone());
        stopped?;
        change.apply(&mut file.now);
        Ok(())
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
        let mut state = self.disk.0.lock();
        state.operation()?;
        if std::mem::take(&mut state.fail_next_sync) {
            return Err(io::Error::other("injected failure of a sync"));
        }
        let file = state.files.get_mut(&self.id).unwrap();
        file.synced = file.now.clone();
        file.unsynced.clear();
        Ok(())
    }
}
