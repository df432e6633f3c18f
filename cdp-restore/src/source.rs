//! SRC: where history is read from.

use std::convert::Infallible;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use cdp_journal::net::is_host_and_port;
use cdp_journal::remote::RemoteSite;
use cdp_journal::site::Site;
use cdp_journal::store::{Archive, StoreReader};

use crate::exit::UsageError;

/// What `--from` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A store's folder on this host.
    Folder(PathBuf),
    /// A journal server, as HOST:PORT.
    Server(String),
}

/// A store among those of a source.
#[derive(Debug)]
pub(crate) struct Opened {
    /// The agent whose history it is, where the source holds those of several.
    pub(crate) agent: Option<String>,
    /// Has the agent begun another history since?
    pub(crate) is_newest: bool,
    pub(crate) archive: Box<dyn Archive>,
}

impl Opened {
    /// How `volume` of this store is named on the command line.
    pub(crate) fn qualified(&self, volume: &str) -> String {
        match &self.agent {
            Some(agent) => format!("{agent}/{volume}"),
            None => volume.to_owned(),
        }
    }
}

impl Source {
    /// The folder, if it is one of this host.
    pub(crate) fn folder(&self) -> Option<&Path> {
        match self {
            Source::Folder(path) => Some(path),
            Source::Server(_) => None,
        }
    }

    /// Opens every store of the source: one of an agent's folder, one for each history of a server's. A server is
    /// shown the certificate in the folder `identity`.
    pub(crate) fn open(&self, identity: Option<&Path>, patience: Duration) -> anyhow::Result<Vec<Opened>> {
        match (self, identity) {
            (Source::Folder(folder), _) => open_folder(folder),
            (Source::Server(server), Some(identity)) => open_server(server, identity, patience),
            (Source::Server(server), None) => Err(UsageError(format!(
                "{server} names a journal server: give --identity DIR, the folder that `cdp-restore enroll` put the \
                 certificate into (a folder of that name is written ./{server})"
            ))
            .into()),
        }
    }
}

fn open_server(server: &str, identity: &Path, patience: Duration) -> anyhow::Result<Vec<Opened>> {
    // Absolute, for it is read again for each new connection, and who serves a mount leaves the working folder.
    let identity = std::path::absolute(identity).with_context(|| format!("find {}", identity.display()))?;
    let site =
        RemoteSite::open(server, &identity, patience).with_context(|| format!("read from {server}"))?;
    let opened = site.stores()?.into_iter().map(|(label, age, archive)| Opened {
        agent: Some(label),
        is_newest: age == 0,
        archive: Box::new(archive) as _,
    });
    Ok(opened.collect())
}

fn open_folder(folder: &Path) -> anyhow::Result<Vec<Opened>> {
    let exists = folder.try_exists();
    if !exists.with_context(|| format!("look at {}", folder.display()))? {
        bail!(
            "{}: no such folder; give the store that `cdp-agent run` or `cdp-journal serve` writes to",
            folder.display()
        );
    }
    // Absolute, for who serves it leaves the working folder.
    let folder = std::path::absolute(folder).with_context(|| format!("find {}", folder.display()))?;
    let Some(site) = Site::open(&folder)? else {
        return Ok(vec![Opened {
            agent: None,
            is_newest: true,
            archive: Box::new(StoreReader::open(&folder)?),
        }]);
    };
    let mut opened = Vec::new();
    for log in site.logs()? {
        opened.push(Opened {
            agent: Some(log.label()),
            is_newest: log.age == 0,
            archive: Box::new(StoreReader::open(&log.dir)?),
        });
    }
    Ok(opened)
}

impl FromStr for Source {
    type Err = Infallible;

    /// `HOST:PORT` has no slash and ends in a port; an existing folder of that form wins.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        let names_a_server = !text.contains('/') && is_host_and_port(text);
        if names_a_server && !Path::new(text).is_dir() {
            return Ok(Source::Server(text.to_owned()));
        }
        Ok(Source::Folder(PathBuf::from(text)))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Folder(path) => path.display().fmt(f),
            Source::Server(server) => server.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_and_a_port_name_a_server_and_the_rest_a_folder() {
        for (text, is_server) in [
            ("dr1:7443", true),
            ("[2001:db8::1]:7443", true),
            ("/var/lib/cdp", false),
            ("./dr1:7443", false),
            ("store", false),
            ("store:old", false),
            (":7443", false),
            ("dr1:74430", false),
        ] {
            let source: Source = text.parse().unwrap();
            assert_eq!(matches!(source, Source::Server(_)), is_server, "{text}");
            assert_eq!(source.to_string(), text);
        }
    }
}
