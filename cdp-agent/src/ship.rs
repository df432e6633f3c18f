//! The servers that this agent's log is shipped to: each with a thread and a position of its own.
//!
//! Shipping itself is `cdp_journal::net`, which does not know that it ships an agent's log. The way of a write ends at
//! the local log; nothing there waits for a server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cdp_journal::net::{DurableLog, Shipper, TargetStatus, Throttle};
use cdp_journal::ship::Rate;
use cdp_journal::{Seq, WallNs};
use parking_lot::Mutex;

use crate::config::Config;
use crate::pipeline::Shared;

/// See the module's head.
pub(crate) struct Ships {
    shared: Arc<Shared>,
    ships: Mutex<Vec<Arc<Shipper>>>,
    /// Of all servers together.
    throttle: Arc<Throttle>,
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

    fn oldest_not_durable(&self) -> Option<WallNs> {
        Shared::oldest_not_durable(self)
    }
}

impl Ships {
    pub(crate) fn new(shared: &Arc<Shared>) -> Arc<Self> {
        let ships = Arc::new(Self {
            shared: Arc::clone(shared),
            ships: Mutex::default(),
            throttle: Arc::default(),
        });
        shared.pace.look_at(&ships);
        ships
    }

    /// Ships to the servers of `config` from now on, and to no others.
    pub(crate) fn set(&self, config: &Config) -> anyhow::Result<()> {
        self.throttle.set(config.rate.clone());
        self.shared.pace.set(config.rate_readback.clone());
        let mut ships = self.ships.lock();
        let is_wanted = |ship: &Shipper| config.servers.iter().any(|server| server == ship.server());
        ships.retain(|ship| is_wanted(ship) && ship.is_running());
        for server in &config.servers {
            if ships.iter().any(|ship| ship.server() == server) {
                continue;
            }
            let identity = config.identity.as_deref().context("no identity")?;
            let log: Arc<dyn DurableLog> = Arc::clone(&self.shared) as _;
            let ship = Shipper::start(&config.store, server, identity, log, Arc::clone(&self.throttle))
                .with_context(|| format!("start to ship to {server}"))?;
            ships.push(Arc::new(ship));
        }
        Ok(())
    }

    /// The limit in force on what is sent to all of them together.
    pub(crate) fn limit(&self) -> Option<Rate> {
        self.throttle.limit()
    }

    /// The most that a server that is connected has still to get, and which that is.
    pub(crate) fn largest_backlog(&self) -> Option<(u64, String)> {
        let ships = self.ships.lock();
        let behind = ships
            .iter()
            .filter_map(|ship| Some((ship.backlog()?, ship.server())));
        behind.max().map(|(backlog, server)| (backlog, server.to_owned()))
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
