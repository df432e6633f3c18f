//! The folder that holds a client's certificates: one file for each server and right.
//!
//! `AUTHORITY-append.pem`, `AUTHORITY-read.pem` or `AUTHORITY-follow.pem`, AUTHORITY being the first 16 digits of the
//! fingerprint: the client's certificate, the authority's certificate, the client's key. Mode 0600. A server is known by
//! its authority, so its address may change.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::files;
use crate::trust::{Holder, fingerprint, hex};
use crate::types::WallNs;
use crate::wire::Right;

/// Certificates in one folder at most.
const IDENTITIES_MAX: usize = 64;
/// One file at most.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// A folder has no certificate that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// There is none.
    #[error("{}: no certificate there; make a token on the server with `cdp-journal token`, then `{program} enroll`", dir.display())]
    None {
        /// The folder.
        dir: PathBuf,
        /// Who would use it.
        program: &'static str,
    },
    /// A file makes no sense.
    #[error("{}: {reason}; enroll again with a new token", path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Others can read the key.
    #[error("{}: others can read this key (mode {mode:04o}); chmod 600 it", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The certificate is too old.
    #[error("{}: the certificate of {holder} expired at {until}; enroll again with a new token", path.display())]
    Expired {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        holder: String,
        /// Since when.
        until: WallNs,
    },
    /// There is a certificate already, and not for the same.
    #[error("{}: holds the certificate of {found}, and the token is for {given}; give another --identity", path.display())]
    Taken {
        /// The file.
        path: PathBuf,
        /// Whose certificate it holds.
        found: String,
        /// Whose was to come in its place.
        given: String,
    },
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
}

impl IdentityError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// One certificate and its key.
#[derive(Debug)]
struct Identity {
    path: PathBuf,
    holder: Holder,
    authority: CertificateDer<'static>,
    /// DER of the authority's name, as a server asks for it.
    issuer: Vec<u8>,
    until: WallNs,
    key: Arc<CertifiedKey>,
}

/// The certificates of a folder.
#[derive(Debug)]
pub struct Identities {
    of_right: Vec<Arc<Identity>>,
}

impl Identities {
    /// Those of `dir` with that right; if there is none, those with the other: the server says what they are not good
    /// for.
    pub fn load(dir: &Path, right: Right) -> Result<Self, IdentityError> {
        let none = || IdentityError::None {
            dir: dir.to_owned(),
            program: match right {
                Right::Append => "cdp-agent",
                Right::Read => "cdp-restore",
                Right::Follow => "cdp-journal",
            },
        };
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(none()),
            Err(error) => return Err(IdentityError::io("list", dir)(error)),
        };
        let mut found = Vec::new();
        for entry in entries.take(IDENTITIES_MAX) {
            let path = entry.map_err(IdentityError::io("list", dir))?.path();
            if path.extension().is_some_and(|extension| extension == "pem") {
                found.push(Arc::new(Identity::read(&path)?));
            }
        }
        if found.iter().any(|identity| identity.holder.right == right) {
            found.retain(|identity| identity.holder.right == right);
        }
        if found.is_empty() {
            return Err(none());
        }
        found.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(Self { of_right: found })
    }

    /// Refuses certificates whose time is over, if all are.
    pub fn check(&self, now: WallNs) -> Result<(), IdentityError> {
        match self.of_right.first() {
            Some(first) if self.of_right.iter().all(|identity| identity.until < now) => {
                Err(IdentityError::Expired {
                    path: first.path.clone(),
                    holder: first.holder.to_string(),
                    until: first.until,
                })
            }
            _ => Ok(()),
        }
    }

    /// For a connection to any server that one of them is for.
    pub(crate) fn tls(&self) -> Result<rustls::ClientConfig, super::LinkError> {
        let mut roots = RootCertStore::empty();
        for identity in &self.of_right {
            roots.add(identity.authority.clone())?;
        }
        let chooser = Chooser(self.of_right.clone());
        super::tls::client(roots, Arc::new(chooser))
    }
}

/// Shows each server the certificate that its own authority made.
#[derive(Debug)]
struct Chooser(Vec<Arc<Identity>>);

impl ResolvesClientCert for Chooser {
    fn resolve(
        &self,
        root_hint_subjects: &[&[u8]],
        _sigschemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        let wanted = |identity: &&Arc<Identity>| root_hint_subjects.contains(&&identity.issuer[..]);
        let chosen = self.0.iter().find(wanted).or_else(|| self.0.first());
        chosen.map(|identity| Arc::clone(&identity.key))
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

impl Identity {
    fn read(path: &Path) -> Result<Self, IdentityError> {
        let bad = |reason: &dyn fmt::Display| IdentityError::Bad {
            path: path.to_owned(),
            reason: reason.to_string(),
        };
        let metadata = std::fs::metadata(path).map_err(IdentityError::io("read", path))?;
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Open {
                path: path.to_owned(),
                mode,
            });
        }
        if metadata.len() > FILE_BYTES_MAX {
            return Err(bad(&"too long for a certificate"));
        }
        let text = std::fs::read(path).map_err(IdentityError::io("read", path))?;
        let certificates = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| bad(&error))?;
        let [own, authority] = <[CertificateDer<'static>; 2]>::try_from(certificates)
            .map_err(|found| bad(&format!("it has {} certificates, not two", found.len())))?;
        let key = PrivateKeyDer::from_pem_slice(&text).map_err(|error| bad(&error))?;
        let holder = Holder::of(&own).ok_or_else(|| bad(&"a certificate for something else"))?;
        let (issuer, until) = {
            let parsed = x509_parser::parse_x509_certificate(&own).map_err(|error| bad(&error))?;
            let until = parsed.1.validity().not_after.timestamp();
            // It is good to the end of that second.
            let until = WallNs(until.saturating_add(1).saturating_mul(1_000_000_000));
            (parsed.1.issuer().as_raw().to_vec(), until)
        };
        let provider = rustls::crypto::ring::default_provider();
        let key = CertifiedKey::from_der(vec![own], key, &provider).map_err(|error| bad(&error))?;
        Ok(Self {
            path: path.to_owned(),
            holder,
            authority,
            issuer,
            until,
            key: Arc::new(key),
        })
    }
}

/// Puts a certificate into the folder, in place of an older one for the same.
pub(super) fn save(
    dir: &Path,
    holder: &Holder,
    certificate: &CertificateDer<'_>,
    authority: &CertificateDer<'_>,
    key_pem: &str,
) -> Result<PathBuf, IdentityError> {
    let path = path_of(dir, authority, holder.right);
    refuse_other(&path, holder)?;
    make_dir(dir)?;
    let text = format!("{}{}{key_pem}", pem(certificate), pem(authority));
    files::replace(&path, text.as_bytes(), 0o600).map_err(IdentityError::io("write", &path))?;
    Ok(path)
}

/// Makes the folder, so that a token is not spent on one that cannot be written to.
pub(super) fn make_dir(dir: &Path) -> Result<(), IdentityError> {
    std::fs::create_dir_all(dir).map_err(IdentityError::io("make", dir))?;
    let probe = tempfile::NamedTempFile::new_in(dir).map_err(IdentityError::io("write to", dir))?;
    drop(probe);
    Ok(())
}

fn path_of(dir: &Path, authority: &[u8], right: Right) -> PathBuf {
    let authority = hex(&fingerprint(authority)[..8]);
    dir.join(format!("{authority}-{right}.pem"))
}

fn refuse_other(path: &Path, holder: &Holder) -> Result<(), IdentityError> {
    if !path.exists() {
        return Ok(());
    }
    let found = Identity::read(path)?.holder;
    if found.agent == holder.agent {
        return Ok(());
    }
    Err(IdentityError::Taken {
        path: path.to_owned(),
        found: found.to_string(),
        given: holder.to_string(),
    })
}

fn pem(certificate: &[u8]) -> String {
    let block = pem::Pem::new("CERTIFICATE", certificate);
    pem::encode_config(
        &block,
        pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF),
    )
}
