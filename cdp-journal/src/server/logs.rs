//! The histories here: each is written to by one connection at a time, of its agent or to the server that it comes from.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use quinn::Connection;
use tokio::sync::OwnedMutexGuard;
use uuid::Uuid;

use super::Refusal;
use crate::error::OpenError;
use crate::net::feed::{DurableLog, OffersRest, STANDING_INTERVAL};
use crate::net::link;
use crate::net::thread::on_own_thread;
use crate::site::{AgentName, Site, Upstream};
use crate::store::{StoreWriter, WriterOptions};
use crate::types::Seq;
use crate::wire::{Close, FrameId, Standing};

/// How often who waits for a store to be opened looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// How the connection that writes to a history is doing. It does not hold the connection: threads that outlive that hold this.
#[derive(Debug, Default)]
pub(super) struct Intake {
    /// Bytes of frames taken in by it.
    pub(super) received_bytes: AtomicU64,
    /// Bytes that were left out of them, as they were here.
    pub(super) saved_bytes: AtomicU64,
    pub(super) full: AtomicBool,
}

/// Who may write to a history.
#[derive(Debug)]
enum Owner {
    Nobody,
    /// The agent's newest connection; perhaps it has ended.
    Agent(Connection),
    /// The server that this one follows.
    Upstream,
}

/// What the other end said of how far behind this history is, and when.
#[derive(Clone, Copy, Debug)]
struct Told {
    standing: Standing,
    at: Instant,
}

/// One history.
#[derive(Debug)]
pub(super) struct History {
    pub(super) agent: AgentName,
    pub(super) log: Uuid,
    pub(super) dir: PathBuf,
    /// Held by who writes.
    writing: Arc<tokio::sync::Mutex<()>>,
    /// Last durable record; `None` while the store was not opened: what lies there may still be in the cache only.
    durable: Mutex<Option<Option<Seq>>>,
    /// Signalled at every change of `durable`.
    changed: Condvar,
    log_bytes: AtomicU64,
    intake: Mutex<Option<Arc<Intake>>>,
    told: Mutex<Option<Told>>,
    /// One for all followers: it costs them bytes, and no more.
    pub(super) offers_rest: Arc<OffersRest>,
}

impl DurableLog for History {
    fn wait_durable_beyond(&self, beyond: Option<Seq>, timeout: Duration) -> Option<Seq> {
        let mut durable = self.durable.lock();
        if durable.flatten() <= beyond && !timeout.is_zero() {
            self.changed.wait_for(&mut durable, timeout);
        }
        durable.flatten()
    }

    fn log_bytes(&self) -> u64 {
        self.log_bytes.load(Ordering::Relaxed)
    }
}

impl History {
    /// Last durable record; `None` while nobody has looked.
    pub(super) fn durable(&self) -> Option<Option<Seq>> {
        *self.durable.lock()
    }

    pub(super) fn set_durable(&self, durable: Option<Seq>, log_bytes: u64) {
        self.log_bytes.store(log_bytes, Ordering::Relaxed);
        *self.durable.lock() = Some(durable);
        self.changed.notify_all();
    }

    /// The connection that writes.
    pub(super) fn intake(&self) -> Option<Arc<Intake>> {
        self.intake.lock().clone()
    }

    pub(super) fn set_intake(&self, intake: Option<Arc<Intake>>) {
        *self.intake.lock() = intake;
    }

    /// The other end says how far behind this one is.
    pub(super) fn tell(&self, standing: Standing) {
        let at = Instant::now();
        *self.told.lock() = Some(Told { standing, at });
    }

    /// How far behind it is: what the other end said last, made older by the time for which it has said nothing.
    pub(super) fn standing(&self) -> Option<Standing> {
        let Told { mut standing, at } = (*self.told.lock())?;
        let silent = at.elapsed();
        if silent > 2 * STANDING_INTERVAL {
            let silent_ns = u64::try_from(silent.as_nanos()).unwrap_or(u64::MAX);
            standing.lag_ns = standing.lag_ns.saturating_add(silent_ns);
        }
        Some(standing)
    }

    /// The right to write, once nobody else does.
    pub(super) async fn lock(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.writing).lock_owned().await
    }

    /// Opens the store, made if it is not there; recovered, so that all of it is durable. For who holds the lock.
    pub(super) async fn open(
        self: &Arc<Self>,
        created: Option<jiff::Timestamp>,
        options: &WriterOptions,
    ) -> Result<(StoreWriter, Option<FrameId>), Refusal> {
        let (history, options) = (Arc::clone(self), options.clone());
        let opened = on_own_thread("cdp-open", move || {
            let (store, recovered) = StoreWriter::open_copy(&history.dir, history.log, created, &options)?;
            let held = store
                .last_frame()
                .map_err(|error| crate::log::open_error(error, recovered.last_seq))?;
            history.set_durable(held.map(|held| held.last), store.log_bytes());
            Ok::<_, OpenError>((store, held))
        });
        opened
            .await
            .map_err(|error| Refusal::failed(&error))?
            .map_err(|error| {
                tracing::error!(agent = %self.agent, log = %self.log, "open its store: {error}");
                Refusal::failed(&error)
            })
    }

    /// Makes sure that it is known what of it is durable.
    pub(super) async fn make_known(self: &Arc<Self>, options: &WriterOptions) -> Result<(), Refusal> {
        while self.durable().is_none() {
            // Who holds the lock and keeps it will know in a moment.
            match self.writing.try_lock() {
                Ok(_writing) if self.durable().is_none() => drop(self.open(None, options).await?),
                _ => tokio::time::sleep(LOOK_INTERVAL).await,
            }
        }
        Ok(())
    }
}

/// Who writes to what.
#[derive(Debug, Default)]
struct Places {
    histories: HashMap<(AgentName, Uuid), (Arc<History>, Owner)>,
    /// Each agent's newest connection.
    connections: HashMap<AgentName, Connection>,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Logs {
    pub(super) site: Site,
    pub(super) options: WriterOptions,
    /// The server that this one follows.
    upstream: Option<String>,
    places: Mutex<Places>,
}

impl Logs {
    pub(super) fn new(site: Site, options: WriterOptions, upstream: Option<String>) -> Self {
        Self {
            site,
            options,
            upstream,
            places: Mutex::default(),
        }
    }

    /// Runs `act` with the history `log` of `agent`, whether its folder is there or not, and who owns it.
    fn with<T>(
        &self,
        places: &mut Places,
        agent: &AgentName,
        log: Uuid,
        act: impl FnOnce(&Arc<History>, &mut Owner) -> T,
    ) -> Result<T, OpenError> {
        let key = (agent.clone(), log);
        let (history, owner) = match places.histories.entry(key) {
            std::collections::hash_map::Entry::Occupied(found) => found.into_mut(),
            std::collections::hash_map::Entry::Vacant(vacant) => {
                let dir = self.site.log_dir(agent, log);
                let owner = match (&self.upstream, Site::upstream_of(&dir)?) {
                    (Some(_), Some(_)) => Owner::Upstream,
                    _ => Owner::Nobody,
                };
                let history = History {
                    agent: agent.clone(),
                    log,
                    dir,
                    writing: Arc::default(),
                    durable: Mutex::default(),
                    changed: Condvar::new(),
                    log_bytes: AtomicU64::new(0),
                    intake: Mutex::default(),
                    told: Mutex::default(),
                    offers_rest: Arc::default(),
                };
                vacant.insert((Arc::new(history), owner))
            }
        };
        Ok(act(history, owner))
    }

    /// The history `log` of `agent`, whether it is there or not.
    pub(super) fn history(&self, agent: &AgentName, log: Uuid) -> Result<Arc<History>, OpenError> {
        self.with(&mut self.places.lock(), agent, log, |history, _| {
            Arc::clone(history)
        })
    }

    /// Takes a history for a connection of its agent. A connection that the agent had is closed: the agent has begun anew,
    /// and the old one is dead though nobody has noticed yet.
    pub(super) fn take(
        &self,
        agent: &AgentName,
        log: Uuid,
        connection: &Connection,
    ) -> Result<Arc<History>, Refusal> {
        let mut places = self.places.lock();
        let taken = self.with(&mut places, agent, log, |history, owner| {
            match (owner, &self.upstream) {
                (Owner::Upstream, Some(upstream)) => Err(followed(upstream)),
                (owner, _) => {
                    *owner = Owner::Agent(connection.clone());
                    Ok(Arc::clone(history))
                }
            }
        });
        let history = taken.map_err(|error| Refusal::failed(&error))??;
        if let Some(before) = places.connections.insert(agent.clone(), connection.clone()) {
            link::close(
                &before,
                Close::Superseded,
                "another connection of this agent took over",
            );
        }
        drop(places);
        // From here on it is the agent's, also for a server that follows again later.
        Site::set_upstream(&history.dir, None).map_err(|error| Refusal::failed(&error))?;
        Ok(history)
    }

    /// Takes a history for the server that this one follows, from now on and after every start; `None` while its agent ships
    /// it here.
    pub(super) fn claim(
        &self,
        agent: &AgentName,
        log: Uuid,
        upstream: &Upstream,
    ) -> Result<Option<Arc<History>>, OpenError> {
        let claimed = self.with(
            &mut self.places.lock(),
            agent,
            log,
            |history, owner| match owner {
                Owner::Agent(connection) if connection.close_reason().is_none() => None,
                _ => {
                    *owner = Owner::Upstream;
                    Some(Arc::clone(history))
                }
            },
        )?;
        if let Some(history) = &claimed
            && Site::upstream_of(&history.dir)?.as_ref() != Some(upstream)
        {
            Site::set_upstream(&history.dir, Some(upstream))?;
        }
        Ok(claimed)
    }

    /// Waits until nobody writes any more; false after `timeout`.
    pub(super) async fn wait_idle(&self, timeout: Duration) -> bool {
        let histories: Vec<_> = {
            let places = self.places.lock();
            places
                .histories
                .values()
                .map(|(history, _)| Arc::clone(history))
                .collect()
        };
        let all = async {
            for history in histories {
                drop(history.lock().await);
            }
        };
        tokio::time::timeout(timeout, all).await.is_ok()
    }
}

fn followed(upstream: &str) -> Refusal {
    let why = format!(
        "this server follows {upstream} for this history, and no agent can append to it here; ship to {upstream}, or \
         start this server without --upstream"
    );
    Refusal::new(Close::NotAllowed, why)
}
