//! A folder with a log and an index.
//!
//! | name         | what                                                                          |
//! |--------------|-------------------------------------------------------------------------------|
//! | `store.json` | format number, id, when it was made; without it a folder is not a store       |
//! | `lock`       | locked by the writer, and its process id                                      |
//! | `log/`       | segments, see [`crate::format`]                                               |
//! | `index/`     | RocksDB, see [`crate::index`]; may be deleted while no writer runs            |
//!
//! The id names the history rather than the folder: a server's copy of an agent's store has the agent's id.
//!
//! | Store format | First in | Change | Read | Written |
//! |-------------:|----------|--------|------|---------|
//! |            1 | 0.1      | first  | yes  | yes     |

mod archive;
mod lock;
mod reader;
mod records;
mod timeline;
mod writer;

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::OpenError;

pub use archive::{Archive, RecordsOf};
pub(crate) use lock::StoreLock;
pub use reader::StoreReader;
pub use records::{FrameData, FrameRecords, Records};
pub use writer::{Cut, Recovered, StoreWriter, VolumeState, WriterOptions};

/// Does anybody write to the store in this folder? Asks without taking its lock.
pub fn is_locked(dir: &Path) -> std::io::Result<bool> {
    StoreLock::is_held(&dir.join(LOCK_FILE))
}

/// The id of the store in this folder; `None` if the folder is not a store.
pub fn id_of(dir: &Path) -> Result<Option<Uuid>, OpenError> {
    Ok(identity(dir)?.map(|store| store.uuid))
}

/// The format of the folder as a whole.
const STORE_FORMAT: u32 = 1;
pub(crate) const STORE_FILE: &str = "store.json";
pub(crate) const LOCK_FILE: &str = "lock";
pub(crate) const LOG_DIR: &str = "log";
pub(crate) const INDEX_DIR: &str = "index";

/// What a store's own file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoreIdentity {
    pub(crate) uuid: Uuid,
    /// When this folder was made, or the one that it is a copy of.
    pub(crate) created: jiff::Timestamp,
}

/// Reads it; `None` if the folder is not a store.
pub(crate) fn identity(dir: &Path) -> Result<Option<StoreIdentity>, OpenError> {
    let Some(store) = StoreFile::read(dir)? else {
        return Ok(None);
    };
    let created = store
        .created
        .parse()
        .map_err(|error: jiff::Error| OpenError::BadStoreFile {
            path: dir.join(STORE_FILE),
            reason: error.to_string(),
        })?;
    Ok(Some(StoreIdentity {
        uuid: store.uuid,
        created,
    }))
}

/// `store.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct StoreFile {
    format: u32,
    uuid: Uuid,
    created: String,
}

/// The format alone, which every version of the file has.
#[derive(Deserialize)]
struct StoreFormat {
    format: u32,
}

impl StoreFile {
    /// `None` if the folder has none.
    fn read(dir: &Path) -> Result<Option<Self>, OpenError> {
        let path = dir.join(STORE_FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(OpenError::io("read", path)(error)),
        };
        let bad = |error: serde_json::Error| OpenError::BadStoreFile {
            path: path.clone(),
            reason: error.to_string(),
        };
        let StoreFormat { format } = serde_json::from_slice(&text).map_err(bad)?;
        if format > STORE_FORMAT {
            return Err(OpenError::TooNew {
                path,
                found: format,
                newest: STORE_FORMAT,
            });
        }
        serde_json::from_slice(&text).map(Some).map_err(bad)
    }

    /// Makes the file of a new store, durable before anything else is in the folder.
    fn create(dir: &Path, uuid: Uuid, created: jiff::Timestamp) -> Result<Self, OpenError> {
        let store = Self {
            format: STORE_FORMAT,
            uuid,
            created: created.to_string(),
        };
        let path = dir.join(STORE_FILE);
        let text = serde_json::to_vec_pretty(&store).map_err(|error| OpenError::BadStoreFile {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        crate::files::replace(&path, &text, 0o666).map_err(OpenError::io("make", &path))?;
        Ok(store)
    }
}
