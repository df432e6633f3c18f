//! Connections and messages, and what it means when they end.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use quinn::crypto::rustls::HandshakeData;
use quinn::{
    Connection, ConnectionError, Endpoint, EndpointConfig, ReadExactError, RecvStream, SendStream, VarInt,
};
use rustls::pki_types::CertificateDer;

use super::tls::Terms;
use super::{Identities, socket, tls};
use crate::trust::{SERVER_NAME, fingerprint, hex};
use crate::types::WallNs;
use crate::wire::{Close, HEADER_BYTES, Header, Kind, Message, Right, WireError};

/// How long one address of a server is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long after the end of its streams a connection may take to end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Of who could not be reached at all.
const NO_ANSWER: &str = "no answer (does `cdp-journal serve` run there, and is UDP let through to it?)";
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;

/// TLS alerts (RFC 8446) that the other end closes a handshake with.
const ALERT_CERTIFICATE_EXPIRED: u64 = 45;
const ALERT_UNKNOWN_CA: u64 = 48;
const ALERT_NO_PROTOCOL: u64 = 120;
/// QUIC's error code of TLS alert 0 (RFC 9001).
const CRYPTO_ERROR: u64 = 0x100;

/// A connection was not made, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The other end will not have us, and says why.
    #[error("{why}")]
    Refused {
        /// Why.
        why: String,
    },
    /// The server's certificate is of another authority than the one we know.
    #[error(
        "the server is of another authority than our certificate: it is not the one we enrolled with; check the \
         address, or enroll with it"
    )]
    OtherServer,
    /// The other end closed the connection; another attempt may succeed.
    #[error("{why}")]
    Closed {
        /// Why.
        why: String,
    },
    /// The other end knows nothing of the connection: it was started anew, or had closed it and a word of ours came late.
    #[error("the server was started anew")]
    Reset,
    /// Another connection with the same certificate took over.
    #[error("{why}; if this goes on, two agents use one certificate: enroll each of them by itself")]
    Superseded {
        /// As the server says it.
        why: String,
    },
    /// What was offered, and left out as the other end had it, is not there any more.
    #[error("{why}")]
    Lacking {
        /// As the other end says it.
        why: String,
    },
    /// The server's name or address cannot be used.
    #[error("{server}: {why}")]
    Address {
        /// As it was given.
        server: String,
        /// What is wrong with it.
        why: String,
    },
    /// The other end says what makes no sense.
    #[error("the other end broke the protocol: {0}")]
    Wire(#[from] WireError),
    /// No certificates, or unusable ones.
    #[error(transparent)]
    Identity(#[from] super::IdentityError),
    /// TLS could not be set up.
    #[error("set up TLS: {0}")]
    Tls(String),
}

impl LinkError {
    /// Will every further attempt end like this until somebody does something?
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::OtherServer | Self::Identity(_))
    }

    pub(crate) fn closed(why: impl Into<String>) -> Self {
        Self::Closed { why: why.into() }
    }
}

impl From<rustls::Error> for LinkError {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error.to_string())
    }
}

impl From<ConnectionError> for LinkError {
    fn from(error: ConnectionError) -> Self {
        let refused = |why: &str| Self::Refused { why: why.to_owned() };
        match &error {
            ConnectionError::ApplicationClosed(close) => {
                let why = String::from_utf8_lossy(&close.reason).into_owned();
                match close.error_code.into_inner() {
                    code if Close::is_refusal(code) => Self::Refused { why },
                    code if code == u64::from(Close::Superseded.code()) => Self::Superseded { why },
                    code if code == u64::from(Close::Lacking.code()) => Self::Lacking { why },
                    _ => Self::Closed { why },
                }
            }
            ConnectionError::ConnectionClosed(close) => {
                match u64::from(close.error_code).wrapping_sub(CRYPTO_ERROR) {
                    ALERT_UNKNOWN_CA => refused(
                        "our certificate was made by another authority than this server's; enroll with it",
                    ),
                    ALERT_CERTIFICATE_EXPIRED => {
                        refused("our certificate has expired; enroll again with a new token")
                    }
                    ALERT_NO_PROTOCOL => {
                        refused("the other end speaks another version; upgrade the older one")
                    }
                    _ => Self::closed(error.to_string()),
                }
            }
            ConnectionError::TransportError(inner) => {
                let is_certificate = inner.reason.contains("certificate");
                match u64::from(inner.code).wrapping_sub(CRYPTO_ERROR) {
                    0..=255 if is_certificate => Self::OtherServer,
                    _ => Self::closed(error.to_string()),
                }
            }
            ConnectionError::TimedOut => Self::closed("no answer"),
            ConnectionError::Reset => Self::Reset,
            _ => Self::closed(error.to_string()),
        }
    }
}

impl From<quinn::WriteError> for LinkError {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::ConnectionLost(error) => error.into(),
            other => Self::closed(other.to_string()),
        }
    }
}

impl From<ReadExactError> for LinkError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => error.into(),
            other => Self::closed(other.to_string()),
        }
    }
}

/// Reads what stands before a message; `None` where the stream ends between two.
pub(crate) async fn read_header(stream: &mut RecvStream) -> Result<Option<Header>, LinkError> {
    let mut header = [0; HEADER_BYTES];
    match stream.read_exact(&mut header).await {
        Ok(()) => Ok(Some(Header::decode(&header)?)),
        Err(ReadExactError::FinishedEarly(0)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Reads one message; `None` where the stream ends between two.
pub(crate) async fn read_message(stream: &mut RecvStream) -> Result<Option<(Kind, Vec<u8>)>, LinkError> {
    let Some(header) = read_header(stream).await? else {
        return Ok(None);
    };
    let mut body = vec![0; header.body_bytes];
    stream.read_exact(&mut body).await?;
    Ok(Some((header.kind, body)))
}

/// Reads a message that must be of that kind.
pub(crate) async fn expect(stream: &mut RecvStream, expected: Kind) -> Result<Message, LinkError> {
    match read_message(stream).await? {
        Some((kind, body)) if kind == expected => Ok(Message::decode(kind, &body)?),
        Some((found, _)) => Err(WireError::Unexpected { found, expected }.into()),
        None => Err(LinkError::closed("the stream ended early")),
    }
}

/// Writes a message whose body is already bytes.
pub(crate) async fn write_body(stream: &mut SendStream, kind: Kind, body: &[u8]) -> Result<(), LinkError> {
    stream.write_all(&Header::encode(kind, body.len())).await?;
    Ok(stream.write_all(body).await?)
}

/// Why a connection ended of which `error` was noticed first: who closes it ends its streams, and says why a moment later.
pub(crate) async fn why_ended(connection: &Connection, error: LinkError) -> LinkError {
    if !matches!(error, LinkError::Closed { .. }) {
        return error;
    }
    match tokio::time::timeout(CLOSE_TIMEOUT, connection.closed()).await {
        Ok(closed) => closed.into(),
        Err(_) => error,
    }
}

/// What the two ends agreed to speak.
pub(crate) fn protocol(connection: &Connection) -> Option<Vec<u8>> {
    let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
    data.protocol
}

/// Closes with a reason that the other end can show. Of a connection that has ended it stays known why: to close it once
/// more would hide that from whoever has not asked yet.
pub(crate) fn close(connection: &Connection, close: Close, why: &str) {
    if connection.close_reason().is_none() {
        connection.close(VarInt::from_u32(close.code()), why.as_bytes());
    }
}

/// A connection of a client, and the socket it runs on.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) connection: Connection,
    endpoint: Endpoint,
}

impl Link {
    /// Connects to `server` (HOST:PORT) with a certificate for `right` in the folder `identity`.
    pub(crate) async fn connect_as(identity: &Path, right: Right, server: &str) -> Result<Self, LinkError> {
        Self::connect_on(identity, right, server, Terms::default()).await
    }

    /// As [`Link::connect_as`], on these terms.
    pub(crate) async fn connect_on(
        identity: &Path,
        right: Right,
        server: &str,
        terms: Terms,
    ) -> Result<Self, LinkError> {
        let identities = Identities::load(identity, right)?;
        identities.check(WallNs::now())?;
        Self::connect_with(server, identities.tls()?, terms).await
    }

    /// Connects to `server` (HOST:PORT), trying each of its addresses.
    pub(crate) async fn connect(server: &str, tls: rustls::ClientConfig) -> Result<Self, LinkError> {
        Self::connect_with(server, tls, Terms::default()).await
    }

    async fn connect_with(server: &str, tls: rustls::ClientConfig, terms: Terms) -> Result<Self, LinkError> {
        let config = tls::client_transport(tls, terms)?;
        let timeout = CONNECT_TIMEOUT.min(terms.silence);
        let bad = |why: String| LinkError::Address {
            server: server.to_owned(),
            why,
        };
        let addresses: Vec<SocketAddr> = tokio::net::lookup_host(server)
            .await
            .map_err(|error| bad(error.to_string()))?
            .take(ADDRESSES_MAX)
            .collect();
        let mut last = bad("the name has no address".to_owned());
        for address in addresses {
            match Self::connect_to(address, config.clone(), timeout).await {
                Ok(link) => return Ok(link),
                Err(error) if error.is_refusal() => return Err(error),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect_to(
        address: SocketAddr,
        config: quinn::ClientConfig,
        timeout: Duration,
    ) -> Result<Self, LinkError> {
        let any = match address {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let io = |error: std::io::Error| LinkError::closed(format!("open a socket: {error}"));
        let here = SocketAddr::new(any, 0);
        let endpoint = socket::endpoint(here, EndpointConfig::default(), None).map_err(io)?;
        let connecting = endpoint
            .connect_with(config, address, SERVER_NAME)
            .map_err(|error| LinkError::closed(error.to_string()))?;
        let connection = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| LinkError::closed(NO_ANSWER))?
            .map_err(|error| match error {
                ConnectionError::TimedOut => LinkError::closed(NO_ANSWER),
                error => error.into(),
            })?;
        Ok(Self { connection, endpoint })
    }

    /// What names the authority of the server at the other end.
    pub(crate) fn authority(&self) -> Option<String> {
        let chain = self.connection.peer_identity()?;
        let chain = chain.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        Some(hex(&fingerprint(chain.last()?)))
    }

    /// Says good-bye and waits until that has left.
    pub(crate) async fn close(self) {
        close(&self.connection, Close::Done, "done");
        let _ = tokio::time::timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }
}
