//! Tokens that were given and certificates that were taken back: small files, each replaced whole.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::token::hex;
use super::{Authority, Holder, Token, TrustError};
use crate::files;
use crate::site::AgentName;
use crate::types::WallNs;
use crate::wire::{Right, SECRET_BYTES};

const TRUST_DIR: &str = "trust";
const TOKENS_DIR: &str = "tokens";
const NAMES_DIR: &str = "names";
/// How long a spent token is remembered after its time, to tell it from one that never was.
const SPENT_KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a token gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenGrant {
    /// A certificate for this agent...
    pub agent: AgentName,
    /// ... to do this...
    pub right: Right,
    /// ... for so long.
    pub valid_seconds: u64,
    /// Until when the token can be used, in nanoseconds since 1970.
    pub expires_ns: i64,
}

/// A token's file.
#[derive(Serialize, Deserialize)]
struct TokenFile {
    #[serde(flatten)]
    grant: TokenGrant,
    /// How often the agent's certificates had been revoked when the token was made: what it turns into is no newer.
    #[serde(default)]
    generation: u64,
}

#[derive(Default, Serialize, Deserialize)]
struct NameFile {
    generation: u64,
}

/// A token was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RedeemError {
    /// Nobody gave it.
    #[error("this server knows no such token; make one with `cdp-journal token`")]
    Unknown,
    /// It was taken already.
    #[error("this token was used before, and a token works once; make another with `cdp-journal token`")]
    Used,
    /// It is for something else.
    #[error(
        "this token is for {} and not for {}: use it with `{} enroll`",
        purpose(*.given), purpose(*.wanted), program(*.given)
    )]
    OtherRight {
        /// What the token gives.
        given: Right,
        /// What was asked for.
        wanted: Right,
    },
    /// Its time is over.
    #[error("this token expired at {0}; make another with `cdp-journal token`")]
    Expired(WallNs),
    /// Its file could not be read.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

/// The folder `trust/` of a server.
#[derive(Clone, Debug)]
pub struct Grants {
    dir: PathBuf,
}

impl Grants {
    /// Of the server whose folder is `site`, made if it is not there.
    pub fn open(site: &Path) -> Result<Self, TrustError> {
        let dir = site.join(TRUST_DIR);
        for dir in [&dir, &dir.join(TOKENS_DIR), &dir.join(NAMES_DIR)] {
            std::fs::create_dir_all(dir).map_err(TrustError::io("make", dir))?;
        }
        Ok(Self { dir })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn token_path(&self, secret: &[u8; SECRET_BYTES], state: &str) -> PathBuf {
        let name = format!("{}.{state}", hex(blake3::hash(secret).as_bytes()));
        self.dir.join(TOKENS_DIR).join(name)
    }

    /// Makes a token. It is known here by a hash alone.
    pub fn issue(&self, authority: &Authority, grant: &TokenGrant) -> Result<Token, TrustError> {
        self.forget_spent(WallNs::now())?;
        let token =
            Token::generate(authority.fingerprint()).map_err(TrustError::io("make a token in", &self.dir))?;
        let file = TokenFile {
            grant: grant.clone(),
            generation: self.generation(&grant.agent)?,
        };
        write(&self.token_path(&token.secret, "json"), &file)?;
        Ok(token)
    }

    /// What the token with that secret gives, without taking it.
    fn look_up(&self, secret: &[u8; SECRET_BYTES], now: WallNs) -> Result<TokenFile, RedeemError> {
        let Some(file) = read::<TokenFile>(&self.token_path(secret, "json"))? else {
            let used = read::<TokenFile>(&self.token_path(secret, "used"))?;
            return Err(match used {
                Some(_) => RedeemError::Used,
                None => RedeemError::Unknown,
            });
        };
        if WallNs(file.grant.expires_ns) < now {
            return Err(RedeemError::Expired(WallNs(file.grant.expires_ns)));
        }
        Ok(file)
    }

    /// Takes it, and tells whom a certificate is to be made for and what the token gives. Of several who try at a
    /// time, one succeeds.
    pub fn redeem(
        &self,
        secret: &[u8; SECRET_BYTES],
        wanted: Right,
        now: WallNs,
    ) -> Result<(Holder, TokenGrant), RedeemError> {
        let TokenFile { grant, generation } = self.look_up(secret, now)?;
        if grant.right != wanted {
            let given = grant.right;
            return Err(RedeemError::OtherRight { given, wanted });
        }
        let (from, to) = (self.token_path(secret, "json"), self.token_path(secret, "used"));
        let taken = std::fs::rename(&from, &to).and_then(|()| files::sync_names(&self.dir.join(TOKENS_DIR)));
        match taken {
            Ok(()) => {
                let holder = Holder {
                    agent: grant.agent.clone(),
                    right: grant.right,
                    generation,
                };
                Ok((holder, grant))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(RedeemError::Used),
            Err(error) => Err(TrustError::io("take", from)(error).into()),
        }
    }

    /// Files of tokens, used or not. Others there are being written, or were when something was killed.
    fn tokens(&self) -> Result<Vec<PathBuf>, TrustError> {
        let mut paths = paths_in(&self.dir.join(TOKENS_DIR))?;
        paths.retain(|path| path.extension().is_some_and(|end| end == "json" || end == "used"));
        Ok(paths)
    }

    /// Removes tokens whose time was over long ago.
    fn forget_spent(&self, now: WallNs) -> Result<(), TrustError> {
        for path in self.tokens()? {
            let old = |grant: TokenGrant| WallNs(grant.expires_ns).saturating_add(SPENT_KEPT) < now;
            if read::<TokenGrant>(&path)?.is_some_and(old) {
                std::fs::remove_file(&path).map_err(TrustError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    fn name_path(&self, agent: &AgentName) -> PathBuf {
        self.dir.join(NAMES_DIR).join(format!("{agent}.json"))
    }

    /// Whom tokens were made for, as long as those are remembered, or certificates taken back from.
    pub fn names(&self) -> Result<BTreeSet<AgentName>, TrustError> {
        let mut names = BTreeSet::new();
        for path in self.tokens()? {
            names.extend(read::<TokenGrant>(&path)?.map(|grant| grant.agent));
        }
        for path in paths_in(&self.dir.join(NAMES_DIR))? {
            let name = path.file_stem().and_then(|name| name.to_str());
            names.extend(name.and_then(|name| name.parse().ok()));
        }
        Ok(names)
    }

    /// How often the agent's certificates were revoked.
    pub fn generation(&self, agent: &AgentName) -> Result<u64, TrustError> {
        let file = read::<NameFile>(&self.name_path(agent))?;
        Ok(file.unwrap_or_default().generation)
    }

    /// Revokes every certificate that was made for the agent so far, and its tokens that were not used.
    pub fn revoke(&self, agent: &AgentName) -> Result<u64, TrustError> {
        let generation = self.generation(agent)? + 1;
        write(&self.name_path(agent), &NameFile { generation })?;
        for path in self.tokens()? {
            let unused = path.extension().is_some_and(|extension| extension == "json");
            // One that cannot be read is good for nothing as it is.
            let grant = read::<TokenGrant>(&path).ok().flatten();
            if unused && grant.is_some_and(|grant| grant.agent == *agent) {
                std::fs::remove_file(&path).map_err(TrustError::io("remove", &path))?;
            }
        }
        Ok(generation)
    }

    /// Was the certificate of `holder` revoked?
    pub fn is_revoked(&self, holder: &Holder) -> Result<bool, TrustError> {
        Ok(holder.generation < self.generation(&holder.agent)?)
    }
}

fn purpose(right: Right) -> &'static str {
    match right {
        Right::Append => "an agent",
        Right::Read => "restores",
        Right::Follow => "a server that follows",
    }
}

fn program(right: Right) -> &'static str {
    match right {
        Right::Append => "cdp-agent",
        Right::Read => "cdp-restore",
        Right::Follow => "cdp-journal",
    }
}

/// `None` if there is no such file.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, TrustError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(TrustError::io("read", path)(error)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| TrustError::Bad {
            path: path.to_owned(),
            reason: error.to_string(),
        })
}

fn write(path: &Path, value: &impl Serialize) -> Result<(), TrustError> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| TrustError::Bad {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    files::replace(path, &text, 0o600).map_err(TrustError::io("write", path))
}

fn paths_in(dir: &Path) -> Result<Vec<PathBuf>, TrustError> {
    let entries = std::fs::read_dir(dir).map_err(TrustError::io("list", dir))?;
    entries
        .map(|entry| {
            entry
                .map(|entry| entry.path())
                .map_err(TrustError::io("list", dir))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn grant(expires_ns: i64) -> TokenGrant {
        TokenGrant {
            agent: "web01".parse().unwrap(),
            right: Right::Append,
            valid_seconds: 60,
            expires_ns,
        }
    }

    struct Kit {
        _dir: tempfile::TempDir,
        grants: Grants,
        authority: Authority,
    }

    fn kit() -> Kit {
        let dir = tempfile::tempdir().unwrap();
        let grants = Grants::open(dir.path()).unwrap();
        let authority = Authority::open_or_make(grants.dir()).unwrap();
        Kit {
            _dir: dir,
            grants,
            authority,
        }
    }

    #[test]
    fn a_token_works_once_in_its_time_and_is_kept_as_a_hash() {
        let Kit {
            grants, authority, ..
        } = &kit();
        let token = grants.issue(authority, &grant(100)).unwrap();
        let stored: Vec<_> = std::fs::read_dir(grants.dir().join(TOKENS_DIR))
            .unwrap()
            .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap())
            .collect();
        assert!(!stored.concat().contains(&hex(&token.secret)));
        assert!(matches!(
            grants.redeem(&token.secret, Right::Append, WallNs(101)),
            Err(RedeemError::Expired(WallNs(100)))
        ));
        assert!(matches!(
            grants.redeem(&token.secret, Right::Read, WallNs(100)),
            Err(RedeemError::OtherRight { .. })
        ));
        let given = grants.redeem(&token.secret, Right::Append, WallNs(100));
        assert_eq!(given.unwrap().1, grant(100));
        assert!(matches!(
            grants.redeem(&token.secret, Right::Append, WallNs(100)),
            Err(RedeemError::Used)
        ));
        assert!(matches!(
            grants.redeem(&[0; 16], Right::Append, WallNs(100)),
            Err(RedeemError::Unknown)
        ));
    }

    /// Goal: a token never makes two certificates. Method: threads that redeem it at one moment.
    #[test]
    fn of_several_who_redeem_a_token_one_gets_it() {
        let Kit {
            grants, authority, ..
        } = &kit();
        for _ in 0..20 {
            let token = grants.issue(authority, &grant(i64::MAX)).unwrap();
            let barrier = Barrier::new(4);
            let got = std::thread::scope(|scope| {
                let tries: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            grants.redeem(&token.secret, Right::Append, WallNs(0)).is_ok()
                        })
                    })
                    .collect();
                tries
                    .into_iter()
                    .filter_map(|attempt| attempt.join().ok())
                    .filter(|ok| *ok)
                    .count()
            });
            assert_eq!(got, 1);
        }
    }

    #[test]
    fn revoking_covers_what_was_made_before_and_nothing_made_after() {
        let Kit {
            grants, authority, ..
        } = &kit();
        let agent: AgentName = "web01".parse().unwrap();
        let holder = |generation| Holder {
            agent: agent.clone(),
            right: Right::Append,
            generation,
        };
        assert!(!grants.is_revoked(&holder(0)).unwrap());
        let token = grants.issue(authority, &grant(i64::MAX)).unwrap();
        assert_eq!(grants.revoke(&agent).unwrap(), 1);
        assert!(grants.is_revoked(&holder(0)).unwrap());
        assert!(!grants.is_revoked(&holder(1)).unwrap());
        assert!(matches!(
            grants.redeem(&token.secret, Right::Append, WallNs(0)),
            Err(RedeemError::Unknown)
        ));
    }

    /// Goal: a token that is redeemed while its agent is revoked gives nothing. Method: the token is put back as it was
    /// before the revocation, which is what one sees who reads it in between.
    #[test]
    fn a_token_redeemed_during_a_revocation_gives_a_revoked_certificate() {
        let Kit {
            grants, authority, ..
        } = &kit();
        let agent: AgentName = "web01".parse().unwrap();
        let token = grants.issue(authority, &grant(i64::MAX)).unwrap();
        let path = grants.token_path(&token.secret, "json");
        let before = std::fs::read(&path).unwrap();
        grants.revoke(&agent).unwrap();
        std::fs::write(&path, before).unwrap();
        let (holder, _) = grants.redeem(&token.secret, Right::Append, WallNs(0)).unwrap();
        assert!(grants.is_revoked(&holder).unwrap(), "{holder:?}");
        let token = grants.issue(authority, &grant(i64::MAX)).unwrap();
        let (holder, _) = grants.redeem(&token.secret, Right::Append, WallNs(0)).unwrap();
        assert!(!grants.is_revoked(&holder).unwrap(), "{holder:?}");
    }

    #[test]
    fn the_authority_is_made_once_and_its_key_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let Kit {
            grants, authority, ..
        } = &kit();
        let again = Authority::open_or_make(grants.dir()).unwrap();
        assert_eq!(again.fingerprint(), authority.fingerprint());
        let key = std::fs::metadata(grants.dir().join("authority.key")).unwrap();
        assert_eq!(key.permissions().mode() & 0o777, 0o600);
    }
}
