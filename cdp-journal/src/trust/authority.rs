//! A server's own certificate authority.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Holder, SERVER_NAME, TrustError, fingerprint};
use crate::files;

const KEY_FILE: &str = "authority.key";
const CERTIFICATE_FILE: &str = "authority.pem";
/// How long the authority and a server's own certificate are good for. Both are checked against the clients' clocks.
const AUTHORITY_DAYS: i64 = 20 * 365;
/// Certificates are good from this long ago: clocks differ.
const BACKDATED: Duration = Duration::from_secs(24 * 3600);

/// See the module's head.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    /// The authority in `dir`; `None` if there is none yet.
    pub fn open(dir: &Path) -> Result<Option<Self>, TrustError> {
        let (key_path, path) = (dir.join(KEY_FILE), dir.join(CERTIFICATE_FILE));
        // The certificate is written last: with it there is a key.
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(TrustError::io("read", path)(error)),
        };
        let bad = |path: &PathBuf| {
            let path = path.clone();
            move |reason: String| TrustError::Bad { path, reason }
        };
        let certificate =
            CertificateDer::from_pem_slice(&text).map_err(|error| bad(&path)(error.to_string()))?;
        let key = std::fs::read_to_string(&key_path).map_err(TrustError::io("read", &key_path))?;
        let key = KeyPair::from_pem(&key).map_err(|error| bad(&key_path)(error.to_string()))?;
        let issuer =
            Issuer::from_ca_cert_der(&certificate, key).map_err(|error| bad(&path)(error.to_string()))?;
        Ok(Some(Self { issuer, certificate }))
    }

    /// The authority in `dir`, made if there is none.
    pub fn open_or_make(dir: &Path) -> Result<Self, TrustError> {
        if let Some(authority) = Self::open(dir)? {
            return Ok(authority);
        }
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named(&format!("cdp-journal authority {}", Uuid::new_v4()));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = validity(AUTHORITY_DAYS * 24 * 3600);
        let certificate = params.self_signed(&key)?;
        let (key_path, path) = (dir.join(KEY_FILE), dir.join(CERTIFICATE_FILE));
        files::replace(&key_path, key.serialize_pem().as_bytes(), 0o600)
            .map_err(TrustError::io("make", &key_path))?;
        files::replace(&path, certificate.pem().as_bytes(), 0o644).map_err(TrustError::io("make", &path))?;
        Ok(Self {
            certificate: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        })
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What names it.
    pub fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.certificate)
    }

    /// A key for another purpose, the same as long as the authority is.
    pub(crate) fn derive_key(&self, purpose: &str) -> [u8; 32] {
        blake3::derive_key(purpose, self.issuer.key().serialized_der())
    }

    /// A certificate and key for the server itself. They live in memory only.
    pub fn make_server(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TrustError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
        params.distinguished_name = named(SERVER_NAME);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.serial_number = Some(serial_number());
        (params.not_before, params.not_after) = validity(AUTHORITY_DAYS * 24 * 3600);
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        Ok((
            vec![certificate.der().clone(), self.certificate.clone()],
            key.into(),
        ))
    }

    /// Checks a client's request, which proves that it has the key, before its token is spent.
    pub fn check_request(request: &[u8]) -> Result<CertificateSigningRequestParams, TrustError> {
        let request = CertificateSigningRequestDer::from(request);
        CertificateSigningRequestParams::from_der(&request)
            .map_err(|error| TrustError::Request(error.to_string()))
    }

    /// A certificate for the key of `request`. Nothing else is taken from the request.
    pub fn sign(
        &self,
        request: &CertificateSigningRequestParams,
        holder: &Holder,
        valid: Duration,
    ) -> Result<CertificateDer<'static>, TrustError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = named(&holder.to_string());
        params.subject_alt_names = vec![SanType::URI(holder.to_uri().try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.serial_number = Some(serial_number());
        let seconds = i64::try_from(valid.as_secs()).unwrap_or(i64::MAX);
        (params.not_before, params.not_after) = validity(seconds);
        Ok(params.signed_by(&request.public_key, &self.issuer)?.der().clone())
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn serial_number() -> SerialNumber {
    let mut bytes = Uuid::new_v4().into_bytes();
    // A serial number is positive, and its first byte not zero.
    bytes[0] = bytes[0] & 0x3f | 0x40;
    SerialNumber::from_slice(&bytes)
}

/// From a while ago to `seconds` from now, within what a certificate can say.
fn validity(seconds: i64) -> (OffsetDateTime, OffsetDateTime) {
    let now = jiff::Timestamp::now().as_second();
    let at = |second: i64| OffsetDateTime::from_unix_timestamp(second);
    let max = AUTHORITY_DAYS * 24 * 3600;
    let until = at(now.saturating_add(seconds.min(max)));
    (
        at(now - BACKDATED.as_secs() as i64).unwrap_or(OffsetDateTime::UNIX_EPOCH),
        until.unwrap_or(OffsetDateTime::UNIX_EPOCH),
    )
}
