//! Over the network: QUIC with TLS 1.3, certificates of both ends, nothing in the clear.
//!
//! - [`enroll`] turns a token into a certificate, [`Identities`] are those that a folder holds.
//! - [`Shipper`] keeps a server up with a log, no faster than a [`Throttle`] allows.
//! - [`RemoteSite`](crate::remote::RemoteSite) reads from a server.

mod backoff;
mod enroll;
pub(crate) mod feed;
mod identity;
pub(crate) mod link;
mod shipper;
pub(crate) mod socket;
pub(crate) mod thread;
mod throttle;
pub(crate) mod tls;
mod turns;

pub(crate) use backoff::{Backoff, Session, random};
pub use enroll::{EnrollError, enroll};
pub use feed::DurableLog;
pub use identity::{Identities, IdentityError};
pub use link::LinkError;
pub use shipper::{Shipper, TargetState, TargetStatus};
pub(crate) use throttle::PacedReader;
pub use throttle::Throttle;

/// Has this the form `HOST:PORT`? Whether there is such a host is another question.
pub fn is_host_and_port(text: &str) -> bool {
    let parts = text.rsplit_once(':');
    parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

/// The address of a server, as it is given on a command line.
///
/// # Errors
/// What its form is to be, where it has another.
pub fn host_and_port(text: &str) -> Result<String, &'static str> {
    match is_host_and_port(text) {
        true => Ok(text.to_owned()),
        false => Err("give it as HOST:PORT, such as dr1.example.org:7443"),
    }
}
