//! The histories that are being written to: each by one connection at a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use quinn::Connection;
use tokio::sync::OwnedMutexGuard;
use uuid::Uuid;

use crate::net::link;
use crate::site::{AgentName, Site};
use crate::store::WriterOptions;
use crate::types::Seq;
use crate::wire::Close;

/// How an agent's newest connection is doing.
#[derive(Debug)]
pub(super) struct Intake {
    /// Which history.
    pub(super) log: Uuid,
    /// Last durable record.
    durable: AtomicU64,
    /// Bytes of frames taken in by this connection.
    pub(super) received_bytes: AtomicU64,
    pub(super) full: AtomicBool,
}

impl Intake {
    pub(super) fn new(log: Uuid) -> Self {
        Self {
            log,
            durable: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            full: AtomicBool::new(false),
        }
    }

    pub(super) fn set_durable(&self, durable: Option<Seq>) {
        self.durable.store(Seq::number_of(durable), Ordering::Relaxed);
    }

    pub(super) fn durable(&self) -> u64 {
        self.durable.load(Ordering::Relaxed)
    }
}

/// One agent's place.
#[derive(Debug, Default)]
struct Place {
    /// Held by who writes.
    writing: Arc<tokio::sync::Mutex<()>>,
    /// The connection that writes, or that waits to.
    connection: Option<Connection>,
    intake: Option<Arc<Intake>>,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Logs {
    pub(super) site: Site,
    pub(super) options: WriterOptions,
    places: Mutex<HashMap<AgentName, Place>>,
}

impl Logs {
    pub(super) fn new(site: Site, options: WriterOptions) -> Self {
        Self {
            site,
            options,
            places: Mutex::default(),
        }
    }

    /// Takes an agent's place. A connection that had it is closed: the agent has begun anew, and the old one is dead
    /// though nobody has noticed yet.
    pub(super) async fn take(&self, agent: &AgentName, connection: &Connection) -> OwnedMutexGuard<()> {
        let writing = {
            let mut places = self.places.lock();
            let place = places.entry(agent.clone()).or_default();
            if let Some(before) = place.connection.replace(connection.clone()) {
                link::close(
                    &before,
                    Close::Superseded,
                    "another connection of this agent took over",
                );
            }
            Arc::clone(&place.writing)
        };
        writing.lock_owned().await
    }

    /// Tells how the agent's connection is doing from now on.
    pub(super) fn set_intake(&self, agent: &AgentName, intake: Option<Arc<Intake>>) {
        if let Some(place) = self.places.lock().get_mut(agent) {
            place.intake = intake;
        }
    }

    pub(super) fn intake(&self, agent: &AgentName) -> Option<Arc<Intake>> {
        self.places.lock().get(agent)?.intake.clone()
    }

    /// Waits until nobody writes any more; false after `timeout`.
    pub(super) async fn wait_idle(&self, timeout: Duration) -> bool {
        let writing: Vec<_> = {
            let places = self.places.lock();
            places.values().map(|place| Arc::clone(&place.writing)).collect()
        };
        let all = async {
            for writing in writing {
                drop(writing.lock().await);
            }
        };
        tokio::time::timeout(timeout, all).await.is_ok()
    }
}
