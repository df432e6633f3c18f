//! A disk for NBD clients: qemu, nbdcopy, the kernel's own, and other hosts' through a tunnel.
//!
//! Written to the protocol's own document (NetworkBlockDevice/nbd, doc/proto.md): fixed newstyle handshake,
//! structured replies, `base:allocation`, TLS. Extended headers are not offered.
//!
//! Always true:
//! - N1: memory is bounded whatever clients send: [`CONNECTIONS_MAX`] connections, [`WORKERS`] buffers of
//!   [`PIECE_BYTES`] for each of them.
//! - N2: a request that makes no sense is answered with an error; bytes that are not the protocol end the connection,
//!   and only it.
//! - N3: a byte that does not match its checksum is answered with `EIO` and named on stderr, never sent.
//! - N4: where there are certificates, a client is told nothing before it has shown one of its own under TLS.
//! - N5: a client that does not read its answers keeps nobody waiting but itself.

use crate::disk::{Complaints, Disk, DiskError};
use crate::report::Report;

mod handshake;
mod listen;
mod proto;
mod tls;
mod transmit;

pub(crate) use listen::{Listen, Server};
pub(crate) use tls::Credentials;

/// Clients at once. One more is turned away.
pub(crate) const CONNECTIONS_MAX: usize = 16;
/// Requests of one connection that are worked on at once.
const WORKERS: usize = 4;
/// What is read, written and sent in one go.
const PIECE_BYTES: usize = 1 << 20;
/// The largest read or write of one request.
const REQUEST_BYTES_MAX: u32 = 32 << 20;

const _: () = assert!(PIECE_BYTES < REQUEST_BYTES_MAX as usize);

/// What is served.
#[derive(Debug)]
pub(crate) struct Export<'a> {
    disk: Disk,
    /// Clients ask for it by this name, or by none.
    name: String,
    description: String,
    complaints: Complaints,
    report: &'a Report,
}

impl<'a> Export<'a> {
    pub(crate) fn new(disk: Disk, name: &str, description: String, report: &'a Report) -> Self {
        Export {
            disk,
            name: name.to_owned(),
            description,
            complaints: Complaints::default(),
            report,
        }
    }

    /// Does a client that asks for `name` mean this?
    fn is_called(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    /// Says once what went wrong on our side.
    fn complain(&self, error: &DiskError) {
        self.complaints.tell(self.report, error);
    }
}
