//! The servers that this agent's log is shipped to: each with a thread and a position of its own.
//!
//! Shipping itself is `cdp_journal::net`, which does not know that it ships an agent's log. The way of a write ends at
//! the local log; nothing there waits for a server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cdp_journal::Seq;
use cdp_journal::net::{DurableLog, Shipper, TargetStatus};
use parking_lot::Mutex;

use crate::config::Config;
use crate::pipeline::Shared;

/// See the module's head.
pub(crate) struct Ships {
    shared: Arc<Shared>,
    ships: Mutex<Vec<Arc<Shipper>>>,
}

impl DurableLog for Shared {
    fn wait_durable_beyond(&self, beyond: Option<Seq>, timeout: Duration) -> Option<Seq> {
        if !timeout.is_zero() {
            self.wait_durable(Some(Seq::after(beyond)), timeout);
        }
        self.durable()
    }

    fn log_bytes(&self) -> u64 {
        self.log_bytes.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl Ships {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Self {
            shared: Arc::clone(shared),
            ships: Mutex::default(),
        }
    }

    /// Ships to the servers of `config` from now on, and to no others.
    pub(crate) fn set(&self, config: &Config) -> anyhow::Result<()> {
        let mut ships = self.ships.lock();
        ships.retain(|ship| config.servers.iter().any(|server| server == ship.server()));
        for server in &config.servers {
            if ships.iter().any(|ship| ship.server() == server) {
                continue;
            }
            let identity = config.identity.as_deref().context("no identity")?;
            let log: Arc<dyn DurableLog> = Arc::clone(&self.shared) as _;
            let ship = Shipper::start(&config.store, server, identity, log)
                .with_context(|| format!("start to ship to {server}"))?;
            ships.push(Arc::new(ship));
        }
        Ok(())
    }

    /// How each of them is doing.
    pub(crate) fn status(&self) -> Vec<TargetStatus> {
        let ships: Vec<_> = self.ships.lock().clone();
        ships.iter().map(|ship| ship.status()).collect()
    }

    /// Waits until everything up to `seq` is durable on every server; else says on which it is not, and why.
    pub(crate) fn wait_acked(&self, seq: Option<Seq>, deadline: Instant) -> Result<(), String> {
        let ships: Vec<_> = self.ships.lock().clone();
        for ship in ships {
            let left = deadline.saturating_duration_since(Instant::now());
            if !ship.wait_acked(seq, left) {
                let TargetStatus {
                    server,
                    acked_seq,
                    backlog_bytes,
                    why,
                    full,
                    ..
                } = ship.status();
                let why = match (why, full) {
                    (Some(why), _) => format!(" ({why})"),
                    (None, true) => " (it has no room)".to_owned(),
                    (None, false) => String::new(),
                };
                return Err(format!(
                    "{server} holds what was captured up to seq {acked_seq}, {backlog_bytes} bytes are left{why}"
                ));
            }
        }
        Ok(())
    }

    /// Ends shipping, after a moment for what is on its way.
    pub(crate) fn stop(&self) {
        for ship in self.ships.lock().drain(..) {
            ship.finish();
        }
    }
}
