//! The agent's control socket, `agent.sock` in the store folder: one JSON request and one JSON answer a line.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cdp_journal::net::TargetStatus;
use serde::{Deserialize, Serialize};

use crate::losses::LossCounts;

/// A line of either side at most.
pub(crate) const LINE_BYTES_MAX: u64 = 1 << 20;

/// What the other commands ask of the running agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// How are the volumes?
    Status,
    /// Tell when everything written so far is durable.
    Sync {
        /// Give up after this long.
        timeout_ms: u64,
        /// Also when all volumes, or the one that is named, are read whole: what was written before is captured.
        #[serde(default)]
        whole: bool,
        #[serde(default)]
        volume: Option<String>,
    },
    /// Tell when it is durable in the store since when the volumes are exact.
    Durable {
        /// Give up after this long.
        timeout_ms: u64,
    },
    /// Name this moment.
    Bookmark {
        /// The name.
        label: String,
    },
}

/// What the agent says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// See [`Status`].
    Status(Status),
    /// Everything up to here is durable.
    Synced {
        /// Last record; 0 if there is none.
        seq: u64,
    },
    /// The bookmark is durable.
    Bookmarked {
        /// Its record.
        seq: u64,
        /// Its time, RFC 3339.
        at: String,
        /// Volumes whose history is not exact at that moment.
        #[serde(default)]
        inexact: Vec<String>,
    },
    /// It did not work.
    Failed {
        /// Why.
        why: String,
    },
}

/// `cdp-agent status --json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) agent: String,
    pub(crate) boot_id: String,
    pub(crate) seq: u64,
    pub(crate) durable_seq: u64,
    /// Bytes of the log.
    pub(crate) store_bytes: u64,
    /// How full the store is; nothing where no agent runs.
    pub(crate) store: Option<StoreStatus>,
    pub(crate) volumes: Vec<VolumeStatus>,
    pub(crate) targets: Vec<TargetStatus>,
    /// The limit in force on what is sent to all servers together; nothing where there is none.
    pub(crate) rate_bytes_per_s: Option<u64>,
    /// The same for first copies and resyncs.
    pub(crate) rate_readback_bytes_per_s: Option<u64>,
    /// The server that is so far behind that nothing more is read back for now.
    pub(crate) readback_waits_for: Option<String>,
}

/// The store in it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct StoreStatus {
    /// Bytes of log and index.
    pub(crate) used_bytes: u64,
    /// It is full when it has this many.
    pub(crate) limit_bytes: u64,
    /// A warning was given.
    pub(crate) is_nearly_full: bool,
}

/// One volume in it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VolumeStatus {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) path: String,
    pub(crate) bytes: u64,
    /// seeding, protected, resyncing or stopped
    pub(crate) state: String,
    pub(crate) progress: f64,
    pub(crate) captured_bytes: u64,
    pub(crate) captured_writes: u64,
    /// All writes that were not captured …
    pub(crate) dropped_writes: u64,
    /// … by why.
    pub(crate) losses: LossCounts,
    pub(crate) exact_since: Option<String>,
    pub(crate) gaps: u64,
    /// Why the present gap is open.
    pub(crate) gap_cause: Option<String>,
    /// The last exact time before it.
    pub(crate) gap_since: Option<String>,
    /// Bytes still to be read back.
    pub(crate) dirty_bytes: u64,
    /// Bytes read back since the agent started, and how fast that goes.
    pub(crate) readback_bytes: u64,
    pub(crate) readback_bytes_per_s: Option<f64>,
    /// When the first copy or the resync will be done; nothing where that cannot be told.
    pub(crate) resync_left_s: Option<f64>,
    /// Blocks that were compared with the device, because they may have changed while they were written.
    pub(crate) compared_blocks: u64,
    /// Blocks that changed while they were written, and were corrected by what the device holds.
    pub(crate) corrected_blocks: u64,
    /// Why it is stopped, where an agent runs.
    pub(crate) why: Option<String>,
}

impl VolumeStatus {
    /// One that nobody watches.
    pub(crate) fn stopped(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            kind: "block".into(),
            path: String::new(),
            bytes: 0,
            state: "stopped".into(),
            progress: 0.0,
            captured_bytes: 0,
            captured_writes: 0,
            dropped_writes: 0,
            losses: LossCounts::default(),
            exact_since: None,
            gaps: 0,
            gap_cause: None,
            gap_since: None,
            dirty_bytes: 0,
            readback_bytes: 0,
            readback_bytes_per_s: None,
            resync_left_s: None,
            compared_blocks: 0,
            corrected_blocks: 0,
            why: None,
        }
    }
}

/// Where the socket of a store is.
pub(crate) fn socket_path(store: &Path) -> PathBuf {
    store.join("agent.sock")
}

/// Asks the running agent. `None` if none is running.
pub(crate) fn ask(store: &Path, request: &Request, timeout: Duration) -> anyhow::Result<Option<Answer>> {
    let stream = match UnixStream::connect(socket_path(store)) {
        Ok(stream) => stream,
        Err(error) => {
            return match error.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => Ok(None),
                _ => {
                    Err(anyhow::Error::new(error).context(format!("reach the agent of {}", store.display())))
                }
            };
        }
    };
    stream.set_read_timeout(Some(timeout))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    (&stream).write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(std::io::Read::take(&stream, LINE_BYTES_MAX)).read_line(&mut answer)?;
    if answer.is_empty() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&answer)?))
}
