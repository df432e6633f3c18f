//! How the server is doing: told over a socket in its folder while it runs, read from the folder else.

use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};

use super::{ServeError, Shared};
use crate::error::OpenError;
use crate::site::{Site, SiteLog};
use crate::store::StoreReader;
use crate::trust::hex;
use crate::wire::Right;

const SOCKET: &str = "journal.sock";
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// An answer at most.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// `cdp-journal status --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Is `serve` running?
    pub running: bool,
    /// Where it listens.
    pub listen: Option<String>,
    /// Fingerprint of the authority.
    pub authority: Option<String>,
    /// Every history, the newest of each agent first.
    pub agents: Vec<AgentStatus>,
    /// Connections of restores.
    pub readers: Vec<ReaderStatus>,
}

/// One history.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The agent's name, with `~1` and so on for histories before its newest.
    pub agent: String,
    /// The id of the history.
    pub log: String,
    /// Is the agent connected?
    pub connected: bool,
    /// From where.
    pub from: Option<String>,
    /// Last durable record.
    pub durable_seq: u64,
    /// Bytes taken in by this connection.
    pub received_bytes: u64,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// There is no room for more.
    pub full: bool,
}

/// One connection of a restore.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReaderStatus {
    /// Whose history it reads.
    pub agent: String,
    /// From where.
    pub from: String,
}

pub(super) fn of_running(shared: &Shared, listen: Option<SocketAddr>) -> ServerStatus {
    let clients = shared.clients.list();
    let logs = shared.logs.site.logs().unwrap_or_else(|error| {
        tracing::error!("list the histories: {error}");
        Vec::new()
    });
    let mut agents = Vec::new();
    for log in logs {
        let mut status = resting(&log);
        let intake = shared
            .logs
            .intake(&log.agent)
            .filter(|intake| intake.log == log.log);
        if let Some(intake) = intake {
            let of_agent = clients
                .iter()
                .find(|(holder, _)| holder.agent == log.agent && holder.right == Right::Append);
            status.connected = true;
            status.from = of_agent.map(|(_, from)| from.to_string());
            status.durable_seq = intake.durable();
            status.received_bytes = intake.received_bytes.load(Ordering::Relaxed);
            status.full = intake.full.load(Ordering::Relaxed);
        } else {
            status.durable_seq = last_seq(&log);
        }
        agents.push(status);
    }
    let readers = clients
        .iter()
        .filter(|(holder, _)| holder.right == Right::Read)
        .map(|(holder, from)| ReaderStatus {
            agent: holder.agent.to_string(),
            from: from.to_string(),
        });
    ServerStatus {
        running: true,
        listen: listen.map(|listen| listen.to_string()),
        authority: Some(hex(&shared.authority.fingerprint())),
        agents,
        readers: readers.collect(),
    }
}

/// A history that nobody is writing to, as far as its folder's names tell.
fn resting(log: &SiteLog) -> AgentStatus {
    AgentStatus {
        agent: log.label(),
        log: log.log.to_string(),
        connected: false,
        from: None,
        durable_seq: 0,
        received_bytes: 0,
        log_bytes: crate::ship::LogTail::bytes_after(&log.dir, None).unwrap_or(0),
        full: false,
    }
}

fn last_seq(log: &SiteLog) -> u64 {
    let head = StoreReader::open(&log.dir).ok().and_then(|reader| reader.head());
    head.map_or(0, |head| head.seq.get())
}

/// Of a folder whose server does not run.
pub fn status_of_folder(site: &Site) -> Result<ServerStatus, OpenError> {
    let agents = site.logs()?.into_iter().map(|log| AgentStatus {
        durable_seq: last_seq(&log),
        ..resting(&log)
    });
    Ok(ServerStatus {
        agents: agents.collect(),
        ..ServerStatus::default()
    })
}

/// Asks the running server; `None` if none runs.
pub fn ask_status(site: &Path) -> io::Result<Option<ServerStatus>> {
    let stream = match std::os::unix::net::UnixStream::connect(site.join(SOCKET)) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    let mut text = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut text)?;
    Ok(Some(serde_json::from_slice(&text)?))
}

/// The socket that answers; gone when the server ends.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    pub(super) fn bind(site: &Path) -> Result<Self, ServeError> {
        let path = site.join(SOCKET);
        // The folder's lock is ours: whatever lies here is left over from a server that was killed.
        let _ = std::fs::remove_file(&path);
        let bind = || {
            let listener = UnixListener::bind(&path)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        let listener = bind().map_err(OpenError::io("listen on", &path))?;
        Ok(Self { listener, path })
    }

    /// Waits for one who asks.
    pub(super) async fn accept(&self) -> Option<UnixStream> {
        self.listener.accept().await.ok().map(|(stream, _)| stream)
    }
}

/// Answers one who asks.
pub(super) async fn answer(mut asker: UnixStream, status: &ServerStatus) {
    if let Ok(text) = serde_json::to_vec(status) {
        // Who does not wait for the answer gets none.
        let _ = tokio::time::timeout(ANSWER_TIMEOUT, asker.write_all(&text)).await;
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
