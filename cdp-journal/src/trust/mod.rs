//! Who may do what with a journal server.
//!
//! A server has a certificate authority of its own, made on its first start. A one-time token turns into a
//! certificate that allows one thing: to append to the history of one agent, to read it, or, for another server, to
//! follow the histories of all agents. Whoever has a server's key can make certificates for it and no other.
//!
//! | below `trust/`         | what                                                                          |
//! |------------------------|-------------------------------------------------------------------------------|
//! | `authority.key`        | the authority's key, PEM; mode 0600                                           |
//! | `authority.pem`        | its certificate                                                               |
//! | `tokens/HASH.json`     | a token that was not used: whom it is for, until when; named by its secret's hash |
//! | `tokens/HASH.used`     | the same once it was used, so that a second use is told from an unknown token |
//! | `names/NAME.json`      | how often NAME's certificates were revoked                                    |
//!
//! A certificate says whom it is for in a URI: `urn:cdp:RIGHT:NAME:GENERATION`, RIGHT being `append`, `read` or `follow`.
//! Revoking a NAME raises its generation; certificates of an earlier one are refused, and a new token makes one of
//! the new. Files are replaced whole, so `token` and `revoke` work beside a server.

mod authority;
mod grants;
mod token;

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use authority::Authority;
pub use grants::{Grants, RedeemError, TokenGrant};
pub(crate) use token::hex;
pub use token::{BadToken, Token};

use crate::site::AgentName;
use crate::wire::Right;

/// The name that every server's own certificate carries: a server is known by its authority, not by its address.
pub const SERVER_NAME: &str = "cdp-journal";

/// Whom a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The agent whose history it is, or what the following server is called.
    pub agent: AgentName,
    /// What may be done with it.
    pub right: Right,
    /// How often the agent's certificates had been revoked when it was made.
    pub generation: u64,
}

impl Holder {
    /// As a certificate says it.
    pub fn to_uri(&self) -> String {
        format!("urn:cdp:{}:{}:{}", self.right, self.agent, self.generation)
    }

    /// The reverse of [`Holder::to_uri`].
    pub fn from_uri(uri: &str) -> Option<Self> {
        let mut parts = uri.strip_prefix("urn:cdp:")?.split(':');
        let right = match parts.next()? {
            "append" => Right::Append,
            "read" => Right::Read,
            "follow" => Right::Follow,
            _ => return None,
        };
        let agent = parts.next()?.parse().ok()?;
        let generation = parts.next()?.parse().ok()?;
        parts.next().is_none().then_some(Self {
            agent,
            right,
            generation,
        })
    }

    /// Of a certificate, DER.
    pub fn of(certificate: &[u8]) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let names = certificate.subject_alternative_name().ok()??;
        names.value.general_names.iter().find_map(|name| match name {
            x509_parser::extensions::GeneralName::URI(uri) => Self::from_uri(uri),
            _ => None,
        })
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.right {
            Right::Append => write!(f, "agent {}", self.agent),
            Right::Read => write!(f, "restores of {}", self.agent),
            Right::Follow => write!(f, "follower {}", self.agent),
        }
    }
}

/// Trust could not be read, made or given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// The operating system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A file makes no sense.
    #[error("{}: {reason}", path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate or key could not be made.
    #[error("make a certificate: {0}")]
    Make(String),
    /// The certificate request of a client makes no sense.
    #[error("a certificate request that makes no sense: {0}")]
    Request(String),
}

impl TrustError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

impl From<rcgen::Error> for TrustError {
    fn from(error: rcgen::Error) -> Self {
        Self::Make(error.to_string())
    }
}

/// BLAKE3 of a certificate, DER: what names an authority.
pub fn fingerprint(certificate: &[u8]) -> [u8; 32] {
    *blake3::hash(certificate).as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_read_as_it_was_written() {
        for right in [Right::Append, Right::Read, Right::Follow] {
            let holder = Holder {
                agent: "web-01.example".parse().unwrap(),
                right,
                generation: 3,
            };
            assert_eq!(Holder::from_uri(&holder.to_uri()), Some(holder));
        }
        for bad in [
            "urn:cdp:append:web01",
            "urn:cdp:own:web01:0",
            "urn:cdp:append:../x:0",
            "urn:cdp:append:web01:0:1",
            "https://example.org",
        ] {
            assert_eq!(Holder::from_uri(bad), None, "{bad}");
        }
    }
}
