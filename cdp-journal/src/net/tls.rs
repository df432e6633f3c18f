//! TLS 1.3 for both ends.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};

use super::LinkError;
use super::socket::DATAGRAM_BYTES_MAX;
use crate::trust::{Authority, TrustError, fingerprint};
use crate::wire::{ALPN_ENROLL, ALPNS};

/// An end that says nothing for so long is gone...
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// ... or after less, where nobody waits for it; but not less than this.
const IDLE_TIMEOUT_MIN: Duration = Duration::from_secs(2);
/// So each says something so often within that time.
const SILENCE_PER_KEEP_ALIVE: u32 = 5;
/// Bytes that one end holds for the other.
pub(crate) const WINDOW_BYTES: u32 = 16 << 20;
/// Questions at once.
pub(crate) const STREAMS_MAX: u32 = 64;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// How a connection is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    /// What may be on its way here.
    pub(crate) window_bytes: u32,
    /// After so long without a word from the other end it is cut.
    pub(crate) silence: Duration,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            window_bytes: WINDOW_BYTES,
            silence: IDLE_TIMEOUT,
        }
    }
}

impl Terms {
    /// Of somebody who waits no longer than `patience` for an answer.
    pub(crate) fn of_patience(patience: Duration) -> Self {
        Self {
            silence: patience.clamp(IDLE_TIMEOUT_MIN, IDLE_TIMEOUT),
            ..Self::default()
        }
    }
}

fn transport(terms: Terms) -> Arc<TransportConfig> {
    let keep_alive = terms.silence / SILENCE_PER_KEEP_ALIVE;
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(DATAGRAM_BYTES_MAX);
    let mut transport = TransportConfig::default();
    transport
        .mtu_discovery_config(Some(discovery))
        .max_idle_timeout(IdleTimeout::try_from(terms.silence).ok())
        .keep_alive_interval(Some(keep_alive))
        .stream_receive_window(VarInt::from_u32(WINDOW_BYTES))
        .receive_window(VarInt::from_u32(terms.window_bytes))
        .send_window(u64::from(WINDOW_BYTES))
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(1))
        .datagram_receive_buffer_size(None);
    Arc::new(transport)
}

/// What a server shows and asks for. Clients without a certificate get as far as enrolling: the rest is decided once
/// the connection is there, so that they are told why.
pub(crate) fn server(authority: &Authority) -> Result<quinn::ServerConfig, TrustError> {
    let make = |error: &dyn std::fmt::Display| TrustError::Make(error.to_string());
    let mut roots = RootCertStore::empty();
    roots
        .add(authority.certificate().clone())
        .map_err(|error| make(&error))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| make(&error))?;
    let (chain, key) = authority.make_server()?;
    let mut tls = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| make(&error))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| make(&error))?;
    // It takes the first of these that the client knows too.
    tls.alpn_protocols = ALPNS
        .iter()
        .chain([&ALPN_ENROLL])
        .map(|name| name.to_vec())
        .collect();
    let crypto = QuicServerConfig::try_from(tls).map_err(|error| make(&error))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport(Terms::default()));
    Ok(config)
}

/// A client with a certificate that `resolver` chooses, of a server of one of the authorities.
pub(crate) fn client(
    roots: RootCertStore,
    resolver: Arc<dyn ResolvesClientCert>,
) -> Result<ClientConfig, LinkError> {
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| LinkError::Tls(error.to_string()))?;
    let mut tls = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(resolver);
    tls.alpn_protocols = ALPNS.map(<[u8]>::to_vec).to_vec();
    Ok(tls)
}

/// A client without a certificate, of the server whose authority has that fingerprint.
pub(crate) fn enrolling_client(authority: [u8; 32]) -> Result<ClientConfig, LinkError> {
    let verifier = PinnedAuthority {
        fingerprint: authority,
        provider: provider(),
    };
    let mut tls = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN_ENROLL.to_vec()];
    Ok(tls)
}

/// A client that holds its connection like that.
pub(crate) fn client_transport(tls: ClientConfig, terms: Terms) -> Result<quinn::ClientConfig, LinkError> {
    let crypto = QuicClientConfig::try_from(tls).map_err(|error| LinkError::Tls(error.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport(terms));
    Ok(config)
}

/// Trusts the one authority that a token names, whose certificate the server shows along with its own.
#[derive(Debug)]
struct PinnedAuthority {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| fingerprint(certificate) == self.fingerprint)
            .ok_or(rustls::CertificateError::UnknownIssuer)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
