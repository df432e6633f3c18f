//! A journal server's folder: one ordinary store for each history that agents ship.
//!
//! | name                    | what                                                                      |
//! |-------------------------|---------------------------------------------------------------------------|
//! | `server.json`           | format number, when it was made; without it a folder is not a server's    |
//! | `lock`                  | locked by `cdp-journal serve`                                             |
//! | `trust/`                | the authority's key and certificate, tokens, revocations; see [`crate::trust`] |
//! | `units/`                | which content is here, as a hint; may be deleted while no server runs     |
//! | `journal.sock`          | answers `cdp-journal status`                                              |
//! | `agents/NAME/UUID/`     | a [`store`](mod@crate::store), the copy of the agent's store with that id  |
//! | `agents/NAME/UUID/upstream.json` | the history comes from another server: through which; see [`Upstream`] |
//!
//! An agent that begins a new store begins a new history: the old one stays beside it. The newest is called by the
//! agent's name alone, the ones before it `NAME~1`, `NAME~2`, ….
//!
//! | Server format | First in | Change | Read | Written |
//! |--------------:|----------|--------|------|---------|
//! |             1 | 0.1      | first  | yes  | yes     |

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::OpenError;
use crate::{files, store};

const SITE_FORMAT: u32 = 1;
const SITE_FILE: &str = "server.json";
const AGENTS_DIR: &str = "agents";
/// A name at most.
pub const NAME_BYTES_MAX: usize = 64;
const UPSTREAM_FILE: &str = "upstream.json";

/// What an agent is called on a server: a plain file name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AgentName(String);

/// A text is not an agent's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "agent name {0:?}: use letters, digits, `.`, `_` and `-`, at most {NAME_BYTES_MAX}, the first of them no `.`"
)]
pub struct BadAgentName(String);

impl AgentName {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for AgentName {
    type Err = BadAgentName;

    fn from_str(text: &str) -> Result<Self, BadAgentName> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let good = (1..=NAME_BYTES_MAX).contains(&text.len())
            && text.chars().all(plain)
            && !text.starts_with(['.', '-']);
        good.then(|| Self(text.to_owned()))
            .ok_or_else(|| BadAgentName(text.to_owned()))
    }
}

impl TryFrom<String> for AgentName {
    type Error = BadAgentName;

    fn try_from(text: String) -> Result<Self, BadAgentName> {
        text.parse()
    }
}

impl From<AgentName> for String {
    fn from(name: AgentName) -> Self {
        name.0
    }
}

impl fmt::Display for AgentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Serialize, Deserialize)]
struct SiteFile {
    format: u32,
    created: String,
}

/// Where a history comes from that no agent ships here. While a server follows another one, no agent may append to what
/// has this file; a server that follows nobody lets agents go on with it, and removes the file then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    /// The authorities of the servers that it came through, the agent's own server first: who finds itself among them
    /// would follow itself.
    pub via: Vec<String>,
}

/// One history of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteLog {
    /// Whose.
    pub agent: AgentName,
    /// When it was begun, at the server that the agent ships it to.
    pub created: jiff::Timestamp,
    /// How many newer ones there are.
    pub age: usize,
    /// Its id.
    pub log: Uuid,
    /// The store's folder.
    pub dir: PathBuf,
}

impl SiteLog {
    /// `NAME`, or `NAME~1` for the one before the newest.
    pub fn label(&self) -> String {
        match self.age {
            0 => self.agent.to_string(),
            age => format!("{}~{age}", self.agent),
        }
    }
}

/// A journal server's folder.
#[derive(Clone, Debug)]
pub struct Site {
    dir: PathBuf,
}

impl Site {
    /// The server's folder `dir`; `None` if it is not one.
    pub fn open(dir: &Path) -> Result<Option<Self>, OpenError> {
        let path = dir.join(SITE_FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(OpenError::io("read", path)(error)),
        };
        let file: SiteFile = serde_json::from_slice(&text).map_err(|error| OpenError::BadStoreFile {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        if file.format > SITE_FORMAT {
            return Err(OpenError::TooNew {
                path,
                found: file.format,
                newest: SITE_FORMAT,
            });
        }
        Ok(Some(Self { dir: dir.to_owned() }))
    }

    /// The server's folder `dir`, made if it is not there. A folder with other things in it is refused.
    pub fn open_or_make(dir: &Path) -> Result<Self, OpenError> {
        if let Some(site) = Self::open(dir)? {
            return Ok(site);
        }
        std::fs::create_dir_all(dir).map_err(OpenError::io("make", dir))?;
        let is_empty = std::fs::read_dir(dir)
            .map_err(OpenError::io("list", dir))?
            .next()
            .is_none();
        if !is_empty {
            return Err(OpenError::BadStoreFile {
                path: dir.to_owned(),
                reason: "neither empty nor a journal server's folder; give another --store".to_owned(),
            });
        }
        let path = dir.join(SITE_FILE);
        let file = SiteFile {
            format: SITE_FORMAT,
            created: jiff::Timestamp::now().to_string(),
        };
        let text = serde_json::to_vec_pretty(&file).map_err(|error| OpenError::BadStoreFile {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        files::replace(&path, &text, 0o666).map_err(OpenError::io("make", &path))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the history `log` of an agent lies, or would.
    pub fn log_dir(&self, agent: &AgentName, log: Uuid) -> PathBuf {
        self.dir
            .join(AGENTS_DIR)
            .join(agent.as_str())
            .join(log.to_string())
    }

    /// Where the history in the folder `dir` comes from; `None` if agents ship it.
    pub fn upstream_of(dir: &Path) -> Result<Option<Upstream>, OpenError> {
        let path = dir.join(UPSTREAM_FILE);
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|error| OpenError::BadStoreFile {
                    path,
                    reason: error.to_string(),
                }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(OpenError::io("read", path)(error)),
        }
    }

    /// Sets that down, durable, before anything of the history is there; `None`: from now on agents ship it.
    pub fn set_upstream(dir: &Path, upstream: Option<&Upstream>) -> Result<(), OpenError> {
        let path = dir.join(UPSTREAM_FILE);
        let done = match upstream {
            Some(upstream) => std::fs::create_dir_all(dir)
                .and_then(|()| serde_json::to_vec_pretty(upstream).map_err(io::Error::from))
                .and_then(|text| files::replace(&path, &text, 0o666)),
            None => match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        };
        done.map_err(OpenError::io("write", path))
    }

    /// The agents that have shipped anything, by name.
    pub fn agents(&self) -> Result<Vec<AgentName>, OpenError> {
        let mut agents: Vec<AgentName> = names(&self.dir.join(AGENTS_DIR))?
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect();
        agents.sort();
        Ok(agents)
    }

    /// The histories of an agent, the newest first.
    pub fn logs_of(&self, agent: &AgentName) -> Result<Vec<SiteLog>, OpenError> {
        let folder = self.dir.join(AGENTS_DIR).join(agent.as_str());
        let mut found = Vec::new();
        for name in names(&folder)? {
            let dir = folder.join(name);
            // Without its own file it is one that is being made.
            if let Some(identity) = store::identity(&dir)? {
                found.push((identity.created, identity.uuid, dir));
            }
        }
        found.sort_by_key(|(created, log, _)| (std::cmp::Reverse(*created), *log));
        let logs = found
            .into_iter()
            .enumerate()
            .map(|(age, (created, log, dir))| SiteLog {
                agent: agent.clone(),
                created,
                age,
                log,
                dir,
            });
        Ok(logs.collect())
    }

    /// All histories, agent by agent, the newest of each first.
    pub fn logs(&self) -> Result<Vec<SiteLog>, OpenError> {
        let mut logs = Vec::new();
        for agent in self.agents()? {
            logs.extend(self.logs_of(&agent)?);
        }
        Ok(logs)
    }
}

/// The names in a folder; none if it is not there.
fn names(dir: &Path) -> Result<Vec<String>, OpenError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(OpenError::io("list", dir)(error)),
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()
        .map_err(OpenError::io("list", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_plain_file_name() {
        for good in ["web01", "db-1.example_2", "a"] {
            assert_eq!(good.parse::<AgentName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "-x", "a~1", "a b", &"x".repeat(65)] {
            let error = bad.parse::<AgentName>().unwrap_err().to_string();
            assert!(error.contains("letters"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_folder_with_other_things_in_it_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("precious"), "").unwrap();
        let error = Site::open_or_make(dir.path()).unwrap_err().to_string();
        assert!(error.contains("neither empty"), "{error}");
        assert_eq!(Site::open(dir.path()).unwrap().map(|_| ()), None);
    }

    #[test]
    fn the_newest_history_of_an_agent_has_its_name_alone() {
        let dir = tempfile::tempdir().unwrap();
        let site = Site::open_or_make(&dir.path().join("new")).unwrap();
        let agent: AgentName = "web01".parse().unwrap();
        let (old, new) = (Uuid::from_u128(9), Uuid::from_u128(1));
        for log in [old, new] {
            let options = store::WriterOptions::default();
            store::StoreWriter::open_copy(&site.log_dir(&agent, log), log, None, &options).unwrap();
        }
        let logs = Site::open(site.dir()).unwrap().unwrap().logs().unwrap();
        let found: Vec<_> = logs.iter().map(|log| (log.label(), log.log)).collect();
        assert_eq!(found, [("web01".to_owned(), new), ("web01~1".to_owned(), old)]);
    }
}
