//! A journal server: takes in what agents ship, serves it to restores, and lets nobody do anything else.
//!
//! ```text
//! connection ─┬─ no certificate ──▶ enroll: a token for a certificate
//!             ├─ may append ──────▶ ingest: verify, append, sync, acknowledge; index behind
//!             ├─ may read ────────▶ reads: history, places of blocks, bytes of the log
//!             └─ may follow ──────▶ feeds: every history, frame by frame
//!
//! upstream ◀───── follow ─────────▶ ingest
//! ```
//!
//! Always true:
//! - V1: who a client is comes from its certificate alone, never from what it says.
//! - V2: an acknowledged record is durable here.
//! - V3: what one client does wrong closes its connection and nothing else.
//! - V4: memory has a bound for each connection, and connections have one.

mod clients;
mod endpoint;
mod feeds;
mod follow;
mod ingest;
mod logs;
mod reads;
mod stages;
mod status;
mod units;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, Incoming};
use rustls::pki_types::CertificateDer;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::error::OpenError;
use crate::net::link::{self, LinkError};
use crate::net::tls;
use crate::remote::Ask;
use crate::ship::Schedule;
use crate::site::Site;
use crate::store::{StoreLock, WriterOptions};
use crate::trust::{Authority, Grants, Holder, TrustError};
use crate::types::WallNs;
use crate::wire::{ALPN_ENROLL, Close, Kind, Message, Right, Standing};

pub use follow::UpstreamStatus;
pub use status::{AgentStatus, ServerStatus, ask_status, status_of_folder};
pub use units::Offers;

use clients::Clients;
use follow::Follower;
use logs::{History, Logs};
use units::Units;

/// Connections at once; more are turned away.
const CONNECTIONS_MAX: usize = 1024;
/// How long a new connection may take to say what it wants.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How often revocations are looked for.
const REVOKED_INTERVAL: Duration = Duration::from_millis(500);
/// What a stop gives connections to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// What to serve.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// The server's folder.
    pub store: PathBuf,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Bounds of each agent's store.
    pub writer: WriterOptions,
    /// The server to follow.
    pub upstream: Option<UpstreamOptions>,
    /// Among whose content to look for what is offered.
    pub offers: Offers,
}

/// A server to follow.
#[derive(Clone, Debug)]
pub struct UpstreamOptions {
    /// HOST:PORT.
    pub server: String,
    /// The folder that `enroll` put the certificate into.
    pub identity: PathBuf,
    /// How fast all that it has is taken.
    pub rate: Schedule,
}

/// A server could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The folder cannot be used.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// Keys or tokens cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The address cannot be used.
    #[error("listen on {listen}")]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// What all connections share.
struct Shared {
    authority: Authority,
    grants: Grants,
    logs: Logs,
    clients: Clients,
    follower: Option<Arc<Follower>>,
    units: Arc<Units>,
}

impl Shared {
    /// How far behind where it comes from a history is, if that is known, and why it does not come. Followed: not shipped
    /// here by its agent.
    fn standing(&self, history: &History, is_followed: bool) -> (Option<Standing>, Option<String>) {
        match self.follower.as_ref().filter(|_| is_followed) {
            Some(follower) => follower.standing(history),
            None => (history.standing(), None),
        }
    }
}

/// A server that listens.
pub struct Server {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    status: status::Socket,
    _lock: StoreLock,
}

impl Server {
    /// Opens the folder, makes the authority if there is none, and listens. Needs a tokio runtime.
    pub fn start(options: &ServeOptions) -> Result<Self, ServeError> {
        let site = Site::open_or_make(&options.store)?;
        let lock = StoreLock::take(&site.dir().join(crate::store::LOCK_FILE))?;
        let grants = Grants::open(site.dir())?;
        let authority = Authority::open_or_make(grants.dir())?;
        let config = tls::server(&authority)?;
        let endpoint =
            endpoint::listen(&authority, config, options.listen).map_err(|source| ServeError::Listen {
                listen: options.listen,
                source,
            })?;
        let upstream = options.upstream.clone();
        let units = Units::open(&site, options.offers);
        let logs = Logs::new(
            site,
            options.writer.clone(),
            upstream.as_ref().map(|upstream| upstream.server.clone()),
        );
        let follower = upstream.map(|upstream| Follower::new(upstream, &authority.fingerprint()));
        let shared = Arc::new(Shared {
            authority,
            grants,
            logs,
            clients: Clients::default(),
            follower,
            units,
        });
        let status = status::Socket::bind(&options.store)?;
        Ok(Self {
            shared,
            endpoint,
            status,
            _lock: lock,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Serves until `stop` is true. Then everything taken in is durable.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut revoked = tokio::time::interval(REVOKED_INTERVAL);
        let following = self.shared.follower.clone().map(|follower| {
            let following = follower.run(Arc::clone(&self.shared), stop.clone());
            tokio::spawn(following)
        });
        loop {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                incoming = self.endpoint.accept() => match incoming {
                    Some(incoming) => self.welcome(incoming),
                    None => break,
                },
                _ = revoked.tick() => self.close_revoked(),
                asker = self.status.accept() => self.tell_status(asker),
            }
        }
        let stopping = quinn::VarInt::from_u32(Close::Stopping.code());
        self.endpoint.close(stopping, b"the server is stopping");
        if let Some(following) = following {
            let _ = tokio::time::timeout(STOP_TIMEOUT, following).await;
        }
        if !self.shared.logs.wait_idle(STOP_TIMEOUT).await {
            tracing::warn!("an agent's store was still busy at the end");
        }
        let _ = tokio::time::timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }

    fn welcome(&self, incoming: Incoming) {
        if self.endpoint.open_connections() > CONNECTIONS_MAX {
            incoming.refuse();
            return;
        }
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let from = incoming.remote_address();
            let connection = match incoming.await {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::info!(%from, "a connection was not made: {error}");
                    return;
                }
            };
            if let Err(refusal) = serve(&shared, &connection).await {
                tracing::info!(%from, "closed: {}", refusal.why);
                link::close(&connection, refusal.close, &refusal.why);
            }
        });
    }

    fn tell_status(&self, asker: Option<UnixStream>) {
        let (shared, listen) = (Arc::clone(&self.shared), self.endpoint.local_addr().ok());
        let Some(asker) = asker else { return };
        tokio::spawn(async move {
            // Reads files.
            let asked = tokio::task::spawn_blocking(move || status::of_running(&shared, listen));
            if let Ok(status) = asked.await {
                status::answer(asker, &status).await;
            }
        });
    }

    fn close_revoked(&self) {
        self.shared
            .clients
            .close_where(|holder| match self.shared.grants.is_revoked(holder) {
                Ok(is_revoked) => is_revoked,
                Err(error) => {
                    tracing::error!("look for revocations: {error}");
                    false
                }
            });
    }
}

/// A connection that is closed, and why.
#[derive(Debug)]
struct Refusal {
    close: Close,
    why: String,
}

impl Refusal {
    fn new(close: Close, why: impl Into<String>) -> Self {
        Self {
            close,
            why: why.into(),
        }
    }

    fn failed(error: &dyn std::fmt::Display) -> Self {
        Self::new(Close::Failed, format!("the server failed: {error}"))
    }
}

impl From<LinkError> for Refusal {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Wire(error) => Self::new(Close::Protocol, error.to_string()),
            other => Self::new(Close::Done, other.to_string()),
        }
    }
}

impl From<quinn::ConnectionError> for Refusal {
    fn from(error: quinn::ConnectionError) -> Self {
        LinkError::from(error).into()
    }
}

async fn serve(shared: &Arc<Shared>, connection: &Connection) -> Result<(), Refusal> {
    if link::protocol(connection).as_deref() == Some(ALPN_ENROLL) {
        return enroll(shared, connection).await;
    }
    let holder = holder_of(connection)?;
    if shared
        .grants
        .is_revoked(&holder)
        .map_err(|error| Refusal::failed(&error))?
    {
        return Err(revoked(&holder));
    }
    let _client = shared.clients.register(&holder, connection)?;
    match holder.right {
        Right::Append => ingest::serve(shared, connection, &holder).await,
        Right::Read => reads::serve(shared, connection, &holder).await,
        Right::Follow => feeds::serve(shared, connection, &holder).await,
    }
}

/// What a connection begins with is not for who has the certificate.
fn not_allowed(holder: &Holder, found: Kind, body: &[u8]) -> Refusal {
    let asks_for_all = || reads::decode_ask(body).is_ok_and(|ask| ask == Ask::Histories);
    let (wanted, to_do, more) = match found {
        Kind::Ask if asks_for_all() => (Right::Follow, "follow", " --follow"),
        Kind::Hello => (Right::Append, "ship", ""),
        Kind::Ask => (Right::Read, "restore", " --restore"),
        Kind::Follow => (Right::Follow, "follow", " --follow"),
        _ => return Refusal::new(Close::Protocol, format!("{found:?} is no way to begin")),
    };
    let allowed = holder.right;
    let why = format!(
        "the certificate of {holder} may {allowed} and not {wanted}; to {to_do}, enroll with a token of \
         `cdp-journal token --agent NAME{more}`"
    );
    Refusal::new(Close::NotAllowed, why)
}

fn revoked(holder: &Holder) -> Refusal {
    let why = format!("the certificate of {holder} was revoked; enroll again with a new token");
    Refusal::new(Close::Revoked, why)
}

/// Whom the client's certificate is for. That it was made by our authority and is not too old was checked by TLS.
fn holder_of(connection: &Connection) -> Result<Holder, Refusal> {
    let chain = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
    let Some(own) = chain.as_ref().and_then(|chain| chain.first()) else {
        let why =
            "no certificate was shown; make a token on the server with `cdp-journal token`, then enroll";
        return Err(Refusal::new(Close::NoCertificate, why));
    };
    let not_ours = || Refusal::new(Close::NotAllowed, "the certificate shown allows nothing here");
    Holder::of(own).ok_or_else(not_ours)
}

/// All that is possible without a certificate: to get one for a token.
async fn enroll(shared: &Shared, connection: &Connection) -> Result<(), Refusal> {
    let late = |_| Refusal::new(Close::Protocol, "no request in time");
    let (mut send, mut receive) = tokio::time::timeout(HELLO_TIMEOUT, connection.accept_bi())
        .await
        .map_err(late)??;
    let request = link::expect(&mut receive, Kind::Enroll);
    let message = tokio::time::timeout(HELLO_TIMEOUT, request)
        .await
        .map_err(late)??;
    let Message::Enroll {
        right,
        secret,
        request,
    } = message
    else {
        return Err(Refusal::new(Close::Protocol, "no request"));
    };
    let refused = |error: &dyn std::fmt::Display| Refusal::new(Close::Token, error.to_string());
    let request = Authority::check_request(&request).map_err(|error| refused(&error))?;
    let (holder, grant) = shared
        .grants
        .redeem(&secret, right, WallNs::now())
        .map_err(|error| refused(&error))?;
    let failed = |error: TrustError| Refusal::failed(&error);
    let valid = Duration::from_secs(grant.valid_seconds);
    let certificate = shared.authority.sign(&request, &holder, valid).map_err(failed)?;
    tracing::info!(from = %connection.remote_address(), "enrolled {holder}");
    let answer = Message::Enrolled {
        certificate: certificate.to_vec(),
        authority: shared.authority.certificate().to_vec(),
    };
    send.write_all(&answer.encode()).await.map_err(LinkError::from)?;
    let _ = send.finish();
    // The client closes when it has it.
    let _ = tokio::time::timeout(HELLO_TIMEOUT, connection.closed()).await;
    Ok(())
}

#[cfg(test)]
mod tests;
