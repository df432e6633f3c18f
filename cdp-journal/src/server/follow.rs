//! Following another server: what it takes in comes here as well.
//!
//! ```text
//! upstream ──list──▶ watch ──starts, stops──▶ session, one for each history ──▶ take_in (as from an agent)
//! ```
//!
//! The list is asked for again and again, so new agents appear by themselves. A history that nobody writes to at the upstream,
//! and that is here whole, has no session: sessions are those of living agents and of what is still to be copied.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::logs::History;
use super::{Refusal, Shared, UpstreamOptions, ingest};
use crate::net::link::{self, Link, LinkError};
use crate::net::tls::Terms;
use crate::net::{Backoff, Session, TargetState, Throttle, random};
use crate::remote::{Ask, AskError, Behind, Fault, Listed, ask_once};
use crate::ship::Rate;
use crate::site::{AgentName, Upstream};
use crate::trust::hex;
use crate::types::Seq;
use crate::wire::{Close, Kind, Message, Right, Standing};

/// Histories that are copied at once; more wait until one of them is whole.
const SESSIONS_MAX: usize = 512;
/// Servers that a history may have come through.
const VIA_MAX: usize = 16;
/// How often the upstream is asked what there is.
const LIST_INTERVAL: Duration = Duration::from_secs(1);
/// A session that has had nothing to do for so long ends.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// How long it may take to answer.
const LIST_TIMEOUT: Duration = Duration::from_secs(60);

/// The server that this one follows, for `status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UpstreamStatus {
    /// HOST:PORT.
    pub server: String,
    /// How the connection to it is doing.
    pub state: TargetState,
    /// Why it is not connected.
    pub why: Option<String>,
    /// How much is taken from it in a second at most, now; nothing where there is no limit.
    #[serde(default)]
    pub rate_bytes_per_s: Option<u64>,
}

type Key = (AgentName, Uuid);

/// One history that is being copied.
struct Copying {
    /// Since when there has been nothing to do.
    idle_since: Option<Instant>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    is_connected: bool,
    is_refused: bool,
    why: Option<String>,
    /// What the upstream listed last, and when.
    listed: BTreeMap<Key, Listed>,
    listed_at: Option<Instant>,
    copying: BTreeMap<Key, Copying>,
    /// The last record of what is here, where a session began with more than the upstream had.
    ahead: BTreeMap<Key, Seq>,
    /// Why a history does not come.
    problems: BTreeMap<Key, String>,
}

/// See the module's head.
pub(super) struct Follower {
    upstream: String,
    identity: PathBuf,
    /// What names this server's own authority.
    authority: String,
    /// How fast all histories together are taken.
    throttle: Throttle,
    state: Mutex<State>,
}

/// Why a history is not being copied.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("{0}")]
    Fault(String),
    #[error("agent {0} ships this history to this server itself; it is not followed while it does")]
    Shipped(AgentName),
    #[error("this history belongs to agent {0} here")]
    Other(AgentName),
}

impl From<quinn::ConnectionError> for FollowError {
    fn from(error: quinn::ConnectionError) -> Self {
        LinkError::from(error).into()
    }
}

impl From<AskError> for FollowError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Link(error) => error.into(),
            AskError::Fault(Fault::Other { why }) => Self::Fault(why),
            AskError::Fault(fault) => Self::Fault(format!("{fault:?}")),
        }
    }
}

/// Is there anything to do for a history of which this server holds what is `durable` here?
fn is_wanted(listed: &Listed, durable: Option<Option<Seq>>) -> bool {
    listed.live || listed.durable.is_none() || listed.durable != durable.map(Seq::number_of)
}

impl Follower {
    pub(super) fn new(options: UpstreamOptions, authority: &[u8]) -> Arc<Self> {
        let throttle = Throttle::default();
        throttle.set(options.rate);
        Arc::new(Self {
            upstream: options.server,
            identity: options.identity,
            authority: hex(authority),
            throttle,
            state: Mutex::default(),
        })
    }

    /// Follows until `stop` is true. Then everything taken in is durable.
    pub(super) async fn run(self: Arc<Self>, shared: Arc<Shared>, mut stop: watch::Receiver<bool>) {
        let mut backoff = Backoff::default();
        loop {
            let ended = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                Err(ended) = self.watch(&shared) => ended,
            };
            backoff.ended(match std::mem::take(&mut self.state.lock().is_connected) {
                true => Session::Useful,
                false => Session::Useless,
            });
            self.note(&ended);
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                () = tokio::time::sleep(backoff.next(random())) => {}
            }
        }
        let copying = std::mem::take(&mut self.state.lock().copying);
        for copying in copying.values() {
            let _ = copying.stop.send(true);
        }
        for copying in copying.into_values() {
            let _ = copying.task.await;
        }
    }

    fn note(&self, error: &FollowError) {
        let why = error.to_string();
        let mut state = self.state.lock();
        state.is_refused = matches!(error, FollowError::Link(error) if error.is_refusal());
        if state.why.as_ref() != Some(&why) {
            tracing::warn!(upstream = %self.upstream, "not connected: {why}");
            state.why = Some(why);
        }
    }

    async fn connect(&self) -> Result<Link, LinkError> {
        let terms = Terms {
            window_bytes: self.throttle.window_bytes(),
            ..Terms::default()
        };
        Link::connect_on(&self.identity, Right::Follow, &self.upstream, terms).await
    }

    /// Asks what there is until that fails, and sees to it that it comes.
    async fn watch(self: &Arc<Self>, shared: &Arc<Shared>) -> Result<std::convert::Infallible, FollowError> {
        let link = self.connect().await?;
        let authority = link.authority().unwrap_or_default();
        let mut ignored = |_| {};
        loop {
            let listed = ask_once::<Vec<Listed>, _>(&link.connection, &Ask::Histories, &mut ignored);
            let (_, listed) = tokio::time::timeout(LIST_TIMEOUT, listed)
                .await
                .map_err(|_| LinkError::closed("no answer"))??;
            self.see(shared, &authority, listed);
            tokio::time::sleep(LIST_INTERVAL).await;
        }
    }

    /// Starts and ends sessions by what the upstream, whose authority that is, has listed.
    fn see(self: &Arc<Self>, shared: &Arc<Shared>, authority: &str, mut listed: Vec<Listed>) {
        // Living agents first.
        listed.sort_by_key(|listed| !listed.live);
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.is_connected, true) {
            tracing::info!(upstream = %self.upstream, histories = listed.len(), "connected");
        }
        state.is_refused = false;
        state.why = (*authority == self.authority).then(|| "that is this server itself".to_owned());
        state.listed.clear();
        state.listed_at = Some(Instant::now());
        for mut listed in listed {
            listed.via.push(authority.to_owned());
            // What came from here would follow itself.
            if listed.via.len() > VIA_MAX || listed.via.contains(&self.authority) {
                continue;
            }
            let key = (listed.agent.clone(), listed.log);
            let history = match shared.logs.history(&key.0, key.1) {
                Ok(history) => history,
                Err(error) => {
                    state.problems.insert(key, error.to_string());
                    continue;
                }
            };
            let is_wanted = is_wanted(&listed, history.durable());
            let is_running = state.copying.contains_key(&key);
            if !is_wanted {
                state.problems.remove(&key);
            } else if !is_running && state.copying.len() < SESSIONS_MAX {
                let copying = self.start(shared, listed.clone());
                state.copying.insert(key.clone(), copying);
            } else if !is_running {
                let why = format!("waits: {SESSIONS_MAX} histories are copied at once");
                state.problems.insert(key.clone(), why);
            }
            state.listed.insert(key, listed);
        }
        let State { listed, copying, .. } = &mut *state;
        copying.retain(|key, copying| {
            let history = shared.logs.history(&key.0, key.1).ok();
            let durable = history.and_then(|history| history.durable());
            if listed.get(key).is_some_and(|listed| is_wanted(listed, durable)) {
                copying.idle_since = None;
            } else if copying.idle_since.get_or_insert_with(Instant::now).elapsed() >= IDLE_MAX {
                let _ = copying.stop.send(true);
            }
            !copying.task.is_finished()
        });
    }

    fn start(self: &Arc<Self>, shared: &Arc<Shared>, listed: Listed) -> Copying {
        let (stop, stopped) = watch::channel(false);
        let (follower, shared) = (Arc::clone(self), Arc::clone(shared));
        let task = tokio::spawn(async move { follower.copy(&shared, &listed, stopped).await });
        Copying {
            idle_since: None,
            stop,
            task,
        }
    }

    /// Copies one history until told to stop.
    async fn copy(&self, shared: &Arc<Shared>, listed: &Listed, mut stop: watch::Receiver<bool>) {
        let key = (listed.agent.clone(), listed.log);
        let mut backoff = Backoff::default();
        while !*stop.borrow() {
            let durable = || {
                let history = shared.logs.history(&key.0, key.1).ok();
                history.and_then(|history| history.durable()).flatten()
            };
            let before = durable();
            let Err(error) = self.session(shared, listed, &stop).await else {
                return;
            };
            if *stop.borrow() {
                return;
            }
            let why = error.to_string();
            let known = self.state.lock().problems.insert(key.clone(), why.clone());
            if known.as_ref() != Some(&why) {
                tracing::warn!(agent = %key.0, log = %key.1, "not followed: {why}");
            }
            backoff.ended(match durable() > before {
                true => Session::Useful,
                false => Session::Useless,
            });
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                () = tokio::time::sleep(backoff.next(random())) => {}
            }
        }
    }

    /// One connection, until it is cut (an error) or the copy is told to stop.
    async fn session(
        &self,
        shared: &Arc<Shared>,
        listed: &Listed,
        stop: &watch::Receiver<bool>,
    ) -> Result<(), FollowError> {
        let mut stop = stop.clone();
        let link = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
            link = self.connect() => link?,
        };
        let connection = &link.connection;
        // What is on its way is taken in to the end, however it ends.
        let stopping = async {
            let _ = stop.wait_for(|stop| *stop).await;
            link::close(connection, Close::Done, "enough");
            std::future::pending().await
        };
        let taken = tokio::select! {
            taken = self.take(shared, listed, &link) => taken,
            never = stopping => never,
        };
        // Who closed it knows best why.
        let closed = match &taken {
            Err(Ended::Refused(refusal)) if refusal.close == Close::Done => {
                Some(link::why_ended(connection, LinkError::closed(refusal.why.clone())).await)
            }
            _ => connection.close_reason().map(LinkError::from),
        };
        match taken {
            Err(Ended::Here(error)) => Err(error),
            Err(Ended::Refused(refusal)) if closed.is_none() => {
                link::close(connection, refusal.close, &refusal.why);
                Err(FollowError::Fault(refusal.why))
            }
            Err(Ended::Refused(refusal)) => {
                let other = || LinkError::closed(refusal.why.clone());
                Err(closed.unwrap_or_else(other).into())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Asks for the history, and takes in what comes.
    async fn take(&self, shared: &Arc<Shared>, listed: &Listed, link: &Link) -> Result<(), Ended> {
        let (agent, log) = (&listed.agent, listed.log);
        let (mut send, mut receive) = link.connection.open_bi().await.map_err(Refusal::from)?;
        let follow = Message::Follow {
            log,
            agent: agent.clone(),
        };
        send.write_all(&follow.encode())
            .await
            .map_err(|error| Refusal::from(LinkError::from(error)))?;
        let hello = link::expect(&mut receive, Kind::Hello).await;
        let there = match hello.map_err(Refusal::from)? {
            Message::Hello { log: found, durable } if found == log => durable,
            _ => return Err(Refusal::new(Close::Protocol, "the hello of another history").into()),
        };
        if let Some(owner) = ingest::owner_of_log(shared, agent, log)? {
            return Err(Ended::Here(FollowError::Other(owner)));
        }
        let upstream = Upstream {
            via: listed.via.clone(),
        };
        let claimed = shared.logs.claim(agent, log, &upstream);
        let Some(history) = claimed.map_err(|error| Refusal::failed(&error))? else {
            return Err(Ended::Here(FollowError::Shipped(agent.clone())));
        };
        let writing = history.lock().await;
        let (store, held) = history.open(Some(listed.created), &shared.logs.options).await?;
        self.began(&history, there, held.map(|held| held.last));
        let held_seq = Seq::number_of(held.map(|held| held.last));
        tracing::info!(%agent, held = held_seq, upstream = %self.upstream, "follows");
        let (connection, throttle) = (&link.connection, Some(&self.throttle));
        let taken = ingest::take_in(
            shared,
            connection,
            (send, receive),
            store,
            held,
            &history,
            throttle,
        )
        .await;
        drop(writing);
        Ok(taken?)
    }

    /// A session begins; the upstream has what is up to `there`, and this server what is up to `held`.
    fn began(&self, history: &History, there: Option<Seq>, held: Option<Seq>) {
        let key = (history.agent.clone(), history.log);
        let mut state = self.state.lock();
        state.problems.remove(&key);
        state.ahead.remove(&key);
        if let Some(held) = held.filter(|held| Some(*held) > there) {
            state.ahead.insert(key, held);
            history.tell(Standing {
                durable: there,
                ..Standing::default()
            });
        }
    }

    /// How the upstream is doing.
    pub(super) fn status(&self) -> UpstreamStatus {
        let state = self.state.lock();
        UpstreamStatus {
            server: self.upstream.clone(),
            state: TargetState::of(state.is_connected, state.is_refused),
            why: state.why.clone(),
            rate_bytes_per_s: self.throttle.limit().map(Rate::bytes_per_second),
        }
    }

    /// Does the upstream have it?
    pub(super) fn has(&self, history: &History) -> bool {
        let key = (history.agent.clone(), history.log);
        self.state.lock().listed.contains_key(&key)
    }

    /// The histories that the upstream has.
    pub(super) fn listed(&self) -> Vec<(AgentName, Uuid)> {
        self.state.lock().listed.keys().cloned().collect()
    }

    /// How far behind a history is, if that is known, and why it does not come.
    pub(super) fn standing(&self, history: &History) -> (Option<Standing>, Option<String>) {
        let key = (history.agent.clone(), history.log);
        let state = self.state.lock();
        let durable = history.durable();
        let listed = state.listed.get(&key).zip(state.listed_at);
        let standing = match listed.filter(|(listed, _)| !is_wanted(listed, durable)) {
            // Nobody writes to it there, as far as is known.
            Some((listed, at)) => Some(Standing {
                durable: listed.durable.and_then(Seq::new),
                lag_ns: silent_ns(at),
                backlog_bytes: 0,
            }),
            None => history.standing(),
        };
        let there = standing.and_then(|standing| standing.durable);
        let ahead = state.ahead.get(&key).filter(|held| there < Some(**held));
        let ahead = ahead.map(|held| {
            format!(
                "{} has this history up to seq {} only, and this server up to {held}; it goes on when the rest is there again",
                self.upstream,
                Seq::number_of(there),
            )
        });
        let why = state.problems.get(&key).cloned().or(ahead);
        let behind = listed.and_then(|(listed, at)| Some((listed.behind?, at)));
        let standing = match behind {
            Some((behind, at)) => standing.map(|standing| through(standing, behind, at)),
            None => standing,
        };
        (standing, why)
    }
}

/// How far behind its source a history is that comes through an upstream which was that far behind `at` some time.
fn through(standing: Standing, behind: Behind, at: Instant) -> Standing {
    Standing {
        durable: standing.durable.max(Seq::new(behind.source_seq)),
        lag_ns: standing.lag_ns.max(behind.lag_ns.saturating_add(silent_ns(at))),
        backlog_bytes: standing.backlog_bytes.saturating_add(behind.backlog_bytes),
    }
}

/// For how long, beyond what is usual, the upstream has not said what there is.
fn silent_ns(listed_at: Instant) -> u64 {
    let silent = listed_at.elapsed();
    if silent <= LIST_INTERVAL * 3 {
        return 0;
    }
    u64::try_from(silent.as_nanos()).unwrap_or(u64::MAX)
}

/// Why a session ended: by something here, or as both ends are told.
enum Ended {
    Here(FollowError),
    Refused(Refusal),
}

impl From<Refusal> for Ended {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}
