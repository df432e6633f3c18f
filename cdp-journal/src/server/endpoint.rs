//! The socket. A server that was killed and started anew tells clients of its former life at once that it knows nothing
//! of them, rather than letting them wait for a timeout.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig};
use ring::hmac;
use uuid::Uuid;

use crate::net::socket;
use crate::trust::Authority;

const CONNECTION_ID_BYTES: usize = 8;

/// Listens. The key of stateless resets is the same after every start.
pub(super) fn listen(
    authority: &Authority,
    config: quinn::ServerConfig,
    listen: SocketAddr,
) -> std::io::Result<Endpoint> {
    let key = authority.derive_key("cdp-journal stateless reset 1");
    let mut endpoint = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &key)));
    endpoint.cid_generator(|| Box::new(RandomIds));
    socket::endpoint(listen, endpoint, Some(config))
}

/// Random ids of connections. Those of quinn carry a hash by which a server that was started anew takes them for noise
/// and is silent.
struct RandomIds;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&Uuid::new_v4().as_bytes()[..CONNECTION_ID_BYTES])
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}
