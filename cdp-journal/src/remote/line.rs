//! A line to a server: asks, and asks again on a new connection where one was cut.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quinn::Connection;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;

use super::{Ask, Fault};
use crate::net::link::{self, Link, LinkError};
use crate::net::tls::Terms;
use crate::net::{Backoff, random};
use crate::wire::{Kind, Right};

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) server: String,
    identity: PathBuf,
    /// How long a server that does not answer is asked again.
    patience: Duration,
    runtime: Runtime,
    link: Mutex<Option<Link>>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("{0:?}")]
    Fault(Fault),
}

/// What comes before an answer.
pub(crate) type Message = (Kind, Vec<u8>);

impl Line {
    /// Connects.
    pub(crate) fn open(server: &str, identity: &Path, patience: Duration) -> Result<Self, LinkError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|error| LinkError::closed(format!("start the runtime: {error}")))?;
        let line = Self {
            server: server.to_owned(),
            identity: identity.to_owned(),
            patience,
            runtime,
            link: Mutex::new(None),
        };
        line.connection()?;
        Ok(line)
    }

    /// The connection there is, or a new one.
    fn connection(&self) -> Result<Connection, LinkError> {
        let mut link = self.link.lock();
        match &*link {
            Some(link) if link.connection.close_reason().is_none() => Ok(link.connection.clone()),
            _ => {
                let terms = Terms::of_patience(self.patience);
                let connecting = Link::connect_on(&self.identity, Right::Read, &self.server, terms);
                let made = self.runtime.block_on(connecting)?;
                let connection = made.connection.clone();
                *link = Some(made);
                Ok(connection)
            }
        }
    }

    /// Asks; gives what came before the answer, and the answer. `progress` is told of `Progress` at once.
    pub(crate) fn ask<T: DeserializeOwned>(
        &self,
        ask: &Ask,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(Vec<Message>, T), AskError> {
        let (started, mut backoff) = (Instant::now(), Backoff::default());
        loop {
            let asked = self
                .connection()
                .map_err(AskError::from)
                .and_then(|connection| self.runtime.block_on(ask_once(&connection, ask, progress)));
            match asked {
                Err(AskError::Link(error)) if !error.is_refusal() && started.elapsed() < self.patience => {
                    tracing::debug!(server = %self.server, "asking again: {error}");
                    std::thread::sleep(backoff.next(random()));
                }
                asked => return asked,
            }
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(link) = self.link.lock().take() {
            self.runtime.block_on(link.close());
        }
    }
}

/// Asks over `connection`.
pub(crate) async fn ask_once<T: DeserializeOwned, P: FnMut(u64) + ?Sized>(
    connection: &Connection,
    ask: &Ask,
    progress: &mut P,
) -> Result<(Vec<Message>, T), AskError> {
    let nonsense = |error: &dyn std::fmt::Display| {
        AskError::Fault(Fault::Other {
            why: format!("an answer that makes no sense: {error}"),
        })
    };
    let (mut send, mut receive) = connection.open_bi().await.map_err(LinkError::from)?;
    let question = serde_json::to_vec(ask).map_err(|error| nonsense(&error))?;
    link::write_body(&mut send, Kind::Ask, &question).await?;
    let _ = send.finish();
    let mut messages = Vec::new();
    loop {
        match link::read_message(&mut receive).await? {
            Some((Kind::Answer, body)) => {
                let answer: Result<T, Fault> =
                    serde_json::from_slice(&body).map_err(|error| nonsense(&error))?;
                return answer.map(|answer| (messages, answer)).map_err(AskError::Fault);
            }
            Some((Kind::Progress, body)) => {
                let bytes = body.try_into().map(u64::from_le_bytes);
                progress(bytes.map_err(|_| nonsense(&"a progress of another length"))?);
            }
            Some(message) => messages.push(message),
            None => {
                let error = LinkError::closed("the answer ended early");
                return Err(link::why_ended(connection, error).await.into());
            }
        }
    }
}
