//! TLS for NBD clients, which ask for it by `NBD_OPT_STARTTLS`.
//!
//! The certificates are those that other NBD servers take (nbdkit, qemu-nbd): a folder with `ca-cert.pem`,
//! `server-cert.pem` and `server-key.pem`. A client must show a certificate of that authority: whoever may look at a
//! moment reads all that was on the volume. TLS 1.3 alone is spoken.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use super::listen::Hurried;

const AUTHORITY: &str = "ca-cert.pem";
const CERTIFICATE: &str = "server-cert.pem";
const KEY: &str = "server-key.pem";
/// What is read of the socket in one go: a record with its head, and some of the next.
const READ_BYTES: usize = 32 << 10;

/// Who we are, and whom we let in.
#[derive(Clone, Debug)]
pub(crate) struct Credentials(Arc<ServerConfig>);

impl Credentials {
    /// Reads the certificates in a folder.
    pub(crate) fn read(folder: &Path) -> anyhow::Result<Self> {
        let authorities = certificates(&folder.join(AUTHORITY))?;
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots
                .add(authority)
                .with_context(|| format!("{}: not an authority", folder.join(AUTHORITY).display()))?;
        }
        let key = folder.join(KEY);
        let key = PrivateKeyDer::from_pem_file(&key).with_context(|| format!("read {}", key.display()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .context("take the authority for clients")?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("choose a version of TLS")?
            .with_client_cert_verifier(clients)
            .with_single_cert(certificates(&folder.join(CERTIFICATE))?, key)
            .with_context(|| format!("take {CERTIFICATE} and {KEY} of {}", folder.display()))?;
        Ok(Credentials(Arc::new(config)))
    }
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let read: Vec<_> = read.with_context(|| format!("read {}", path.display()))?;
    if read.is_empty() {
        bail!("{}: there is no certificate in it", path.display());
    }
    Ok(read)
}

/// A connection under TLS. One thread reads at a time, while one writes.
pub(super) struct Secured<'a> {
    stream: Hurried<'a>,
    connection: Mutex<ServerConnection>,
    /// What has come in and was not taken by the connection yet: it takes no more than it has room for.
    incoming: Mutex<Vec<u8>>,
    /// Held while something is on its way to the stream, so that records leave in their order.
    leaving: Mutex<()>,
}

impl<'a> Secured<'a> {
    /// Shakes hands; the client has proven who it is then.
    pub(super) fn accept(credentials: &Credentials, stream: Hurried<'a>) -> io::Result<Self> {
        let mut connection = ServerConnection::new(Arc::clone(&credentials.0)).map_err(io::Error::other)?;
        while connection.is_handshaking() {
            connection.complete_io(&mut &stream)?;
        }
        Ok(Secured {
            stream,
            connection: Mutex::new(connection),
            incoming: Mutex::default(),
            leaving: Mutex::new(()),
        })
    }

    /// From now on it may take its time.
    pub(super) fn set_unhurried(&mut self) -> io::Result<()> {
        self.stream.set_unhurried()
    }

    /// Sends what is ready to be sent.
    fn send(&self) -> io::Result<()> {
        let _leaving = self.leaving.lock();
        let mut records = Vec::new();
        {
            let mut connection = self.connection.lock();
            while connection.wants_write() {
                connection.write_tls(&mut records)?;
            }
        }
        (&self.stream).write_all(&records)
    }
}

impl Read for &Secured<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.lock().reader().read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            // Others may send while this waits.
            let mut incoming = self.incoming.lock();
            if incoming.is_empty() {
                incoming.resize(READ_BYTES, 0);
                let read = (&self.stream).read(&mut incoming);
                incoming.truncate(*read.as_ref().unwrap_or(&0));
                read?;
            }
            let mut connection = self.connection.lock();
            let taken = connection.read_tls(&mut &incoming[..])?;
            incoming.drain(..taken);
            connection
                .process_new_packets()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let answers = connection.wants_write();
            drop(connection);
            if answers {
                self.send()?;
            }
        }
    }
}

impl Write for &Secured<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.connection.lock().writer().write(bytes)?;
        self.send()?;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}
