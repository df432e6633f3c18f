//! Who is connected.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use quinn::Connection;

use super::{Refusal, revoked};
use crate::net::link;
use crate::trust::Holder;
use crate::wire::Close;

/// Connections with one agent's certificates of one right: one that is stolen, or a client that never closes any,
/// leaves room for the others.
pub(super) const CONNECTIONS_EACH_MAX: usize = 64;

/// The connections that showed a certificate.
#[derive(Debug, Default)]
pub(super) struct Clients {
    next: AtomicU64,
    connected: Arc<Mutex<HashMap<u64, Client>>>,
}

#[derive(Clone, Debug)]
struct Client {
    holder: Holder,
    connection: Connection,
}

/// Takes a connection off the list when it goes.
#[derive(Debug)]
pub(super) struct Registered {
    id: u64,
    connected: Arc<Mutex<HashMap<u64, Client>>>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.connected.lock().remove(&self.id);
    }
}

impl Clients {
    /// Puts a connection on the list, if its holder has not too many.
    pub(super) fn register(&self, holder: &Holder, connection: &Connection) -> Result<Registered, Refusal> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut connected = self.connected.lock();
        let is_same = |other: &Holder| (&other.agent, other.right) == (&holder.agent, holder.right);
        let others = connected.values().filter(|client| is_same(&client.holder));
        if others.count() >= CONNECTIONS_EACH_MAX {
            let why =
                format!("{CONNECTIONS_EACH_MAX} connections of {holder} are open: close one, or try later");
            return Err(Refusal::new(Close::Failed, why));
        }
        let client = Client {
            holder: holder.clone(),
            connection: connection.clone(),
        };
        connected.insert(id, client);
        Ok(Registered {
            id,
            connected: Arc::clone(&self.connected),
        })
    }

    /// Closes the connections whose certificates were revoked.
    pub(super) fn close_where(&self, is_revoked: impl Fn(&Holder) -> bool) {
        // Files are read outside of the lock.
        let clients: Vec<Client> = self.connected.lock().values().cloned().collect();
        for client in clients.into_iter().filter(|client| is_revoked(&client.holder)) {
            let refusal = revoked(&client.holder);
            tracing::info!(from = %client.connection.remote_address(), "closed: {}", refusal.why);
            link::close(&client.connection, refusal.close, &refusal.why);
        }
    }

    /// Who is connected, from where.
    pub(super) fn list(&self) -> Vec<(Holder, SocketAddr)> {
        let connected = self.connected.lock();
        connected
            .values()
            .map(|client| (client.holder.clone(), client.connection.remote_address()))
            .collect()
    }
}
