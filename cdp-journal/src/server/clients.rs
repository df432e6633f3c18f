//! Who is connected.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use quinn::Connection;

use super::revoked;
use crate::net::link;
use crate::trust::Holder;

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
    pub(super) fn register(&self, holder: &Holder, connection: &Connection) -> Registered {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let client = Client {
            holder: holder.clone(),
            connection: connection.clone(),
        };
        self.connected.lock().insert(id, client);
        Registered {
            id,
            connected: Arc::clone(&self.connected),
        }
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
