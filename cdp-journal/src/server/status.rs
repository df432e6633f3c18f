//! How the server is doing: told over a socket in its folder while it runs, read from the folder else.

use std::collections::BTreeSet;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};

use super::follow::UpstreamStatus;
use super::logs::History;
use super::{ServeError, Shared};
use crate::error::OpenError;
use crate::site::{Site, SiteLog};
use crate::store::StoreReader;
use crate::trust::{Holder, hex};
use crate::types::Seq;
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
    /// The server that this one follows.
    #[serde(default)]
    pub upstream: Option<UpstreamStatus>,
    /// Every history, the newest of each agent first.
    pub agents: Vec<AgentStatus>,
    /// Connections of restores.
    pub readers: Vec<ReaderStatus>,
    /// Servers that follow this one.
    #[serde(default)]
    pub followers: Vec<FollowerStatus>,
}

/// One history.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The agent's name, with `~1` and so on for histories before its newest.
    pub agent: String,
    /// The id of the history.
    pub log: String,
    /// It comes from the server that this one follows.
    #[serde(default)]
    pub followed: bool,
    /// Is the agent, or the server that this one follows, connected?
    pub connected: bool,
    /// From where.
    pub from: Option<String>,
    /// Last durable record.
    pub durable_seq: u64,
    /// Last durable record of where it comes from, as that was told last; nothing if it was not.
    #[serde(default)]
    pub source_seq: Option<u64>,
    /// Age of the oldest record there that is not known to be durable here; more by how long nothing was told.
    #[serde(default)]
    pub lag_seconds: Option<f64>,
    /// Bytes of the log there that are not.
    #[serde(default)]
    pub backlog_bytes: Option<u64>,
    /// Bytes taken in by this connection.
    pub received_bytes: u64,
    /// Bytes that were left out of them, as they were here already.
    #[serde(default)]
    pub saved_bytes: u64,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// There is no room for more.
    pub full: bool,
    /// Why it is not followed.
    #[serde(default)]
    pub why: Option<String>,
}

/// One connection of a restore.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReaderStatus {
    /// Whose history it reads.
    pub agent: String,
    /// From where.
    pub from: String,
}

/// A server that follows this one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FollowerStatus {
    /// What it is called here.
    pub follower: String,
    /// From where.
    pub from: String,
}

pub(super) fn of_running(shared: &Shared, listen: Option<SocketAddr>) -> ServerStatus {
    let clients = shared.clients.list();
    let logs = shared.logs.site.logs().unwrap_or_else(|error| {
        tracing::error!("list the histories: {error}");
        Vec::new()
    });
    let mut agents: Vec<_> = logs.iter().map(|log| of_log(shared, &clients, log)).collect();
    let follower = shared.follower.as_ref();
    // Those of which nothing is here yet.
    for (agent, log) in follower.map_or_else(Vec::new, |follower| follower.listed()) {
        let is_there = logs.iter().any(|there| there.agent == agent && there.log == log);
        if let Ok(history) = shared.logs.history(&agent, log)
            && !is_there
        {
            let mut status = AgentStatus {
                agent: agent.to_string(),
                log: log.to_string(),
                ..AgentStatus::default()
            };
            add_standing(shared, &history, &mut status);
            agents.push(status);
        }
    }
    let of_right = |right| {
        let of_right = clients.iter().filter(move |(holder, _)| holder.right == right);
        of_right.map(|(holder, from)| (holder.agent.to_string(), from))
    };
    let readers = of_right(Right::Read).map(|(agent, from)| ReaderStatus {
        agent,
        from: from.to_string(),
    });
    // Each has a connection for each history.
    let followers: BTreeSet<_> = of_right(Right::Follow)
        .map(|(follower, from)| FollowerStatus {
            follower,
            from: from.ip().to_string(),
        })
        .collect();
    ServerStatus {
        running: true,
        listen: listen.map(|listen| listen.to_string()),
        authority: Some(hex(&shared.authority.fingerprint())),
        upstream: follower.map(|follower| follower.status()),
        agents,
        readers: readers.collect(),
        followers: followers.into_iter().collect(),
    }
}

fn of_log(shared: &Shared, clients: &[(Holder, SocketAddr)], log: &SiteLog) -> AgentStatus {
    let mut status = resting(log);
    let Ok(history) = shared.logs.history(&log.agent, log.log) else {
        return status;
    };
    if let Some(intake) = history.intake() {
        status.connected = true;
        status.received_bytes = intake.received_bytes.load(Ordering::Relaxed);
        status.saved_bytes = intake.saved_bytes.load(Ordering::Relaxed);
        status.full = intake.full.load(Ordering::Relaxed);
    }
    status.durable_seq = match history.durable() {
        Some(durable) => Seq::number_of(durable),
        None => last_seq(log),
    };
    add_standing(shared, &history, &mut status);
    if status.connected {
        let mut clients = clients.iter();
        let is_agent = |holder: &Holder| holder.agent == log.agent && holder.right == Right::Append;
        status.from = match shared.follower.as_ref().filter(|_| status.followed) {
            Some(follower) => Some(follower.status().server),
            None => clients
                .find(|(holder, _)| is_agent(holder))
                .map(|(_, from)| from.to_string()),
        };
    }
    status
}

/// How far behind it is, and why.
fn add_standing(shared: &Shared, history: &History, status: &mut AgentStatus) {
    status.followed |= shared
        .follower
        .as_ref()
        .is_some_and(|follower| follower.has(history));
    let (standing, why) = shared.standing(history, status.followed);
    status.why = why;
    if let Some(standing) = standing {
        let told = Seq::number_of(standing.durable);
        // Since it was told, more has come; unless there is less than here, which `why` says.
        status.source_seq = Some(match status.why {
            Some(_) => told,
            None => told.max(Seq::number_of(history.durable().flatten())),
        });
        status.lag_seconds = Some(standing.lag_ns as f64 / 1e9);
        status.backlog_bytes = Some(standing.backlog_bytes);
    }
}

/// A history that nobody is writing to, as far as its folder's names tell.
fn resting(log: &SiteLog) -> AgentStatus {
    AgentStatus {
        agent: log.label(),
        log: log.log.to_string(),
        followed: Site::upstream_of(&log.dir).is_ok_and(|upstream| upstream.is_some()),
        log_bytes: crate::ship::LogTail::bytes_after(&log.dir, None).unwrap_or(0),
        ..AgentStatus::default()
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
