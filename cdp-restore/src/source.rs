//! SRC: where history is read from.

use std::convert::Infallible;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What `--from` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A store's folder on this host.
    Folder(PathBuf),
    /// A journal server, as HOST:PORT.
    Server(String),
}

/// The source is a kind that this build does not read.
#[derive(Debug, thiserror::Error)]
#[error(
    "{server} names a journal server, and this build reads folders; run it on the host that has the store, \
     with --from FOLDER (a folder of that name is written ./{server})"
)]
pub(crate) struct ServerNotRead {
    server: String,
}

impl Source {
    /// The store's folder, if the source is one.
    pub(crate) fn folder(&self) -> Result<&Path, ServerNotRead> {
        match self {
            Source::Folder(path) => Ok(path),
            Source::Server(server) => Err(ServerNotRead {
                server: server.clone(),
            }),
        }
    }
}

impl FromStr for Source {
    type Err = Infallible;

    /// `HOST:PORT` has no slash and ends in a port; an existing folder of that form wins.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        let port = text
            .rsplit_once(':')
            .filter(|(host, _)| !host.is_empty())
            .map(|(_, port)| port);
        let names_a_server = !text.contains('/') && port.is_some_and(|port| port.parse::<u16>().is_ok());
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
