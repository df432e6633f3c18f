//! Asking the agent that writes to a store: one JSON request and one JSON answer a line, over the socket in the store's
//! folder. The requests are described where they are answered, in `cdp-agent/src/control.rs`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use cdp_journal::Seq;
use serde::{Deserialize, Serialize};

const SOCKET: &str = "agent.sock";
/// An answer at most.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// How long the agent is given until all that was written is durable.
const SYNC_TIME_MAX: Duration = Duration::from_secs(60);
/// What an answer may take beyond what was asked for.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Serialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
enum Request<'a> {
    Sync { timeout_ms: u64 },
    Bookmark { label: &'a str },
}

#[derive(Debug, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
enum Answer {
    Synced {},
    Bookmarked { seq: u64 },
    Failed { why: String },
}

/// Why the agent did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("no agent answers there")]
    NotThere(#[source] io::Error),
    #[error("the agent says: {0}")]
    Failed(String),
    #[error("talk to the agent")]
    Io(#[from] io::Error),
    #[error("the agent's answer makes no sense")]
    Answer(#[from] serde_json::Error),
}

/// The agent of one store.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Agent<'a> {
    store: &'a Path,
}

impl<'a> Agent<'a> {
    /// Of the store in this folder; whether it runs is found out by asking.
    pub(crate) fn of(store: &'a Path) -> Self {
        Agent { store }
    }

    /// Waits until everything that was written so far is durable, and exact where it can be.
    pub(crate) fn sync(self) -> Result<(), AgentError> {
        let request = Request::Sync {
            timeout_ms: SYNC_TIME_MAX.as_millis() as u64,
        };
        match self.ask(&request, SYNC_TIME_MAX + ANSWER_TIME_MAX)? {
            Answer::Failed { why } => Err(AgentError::Failed(why)),
            Answer::Synced {} | Answer::Bookmarked { .. } => Ok(()),
        }
    }

    /// Names this moment; the name's record.
    pub(crate) fn bookmark(self, label: &str) -> Result<Seq, AgentError> {
        match self.ask(&Request::Bookmark { label }, 4 * ANSWER_TIME_MAX)? {
            Answer::Bookmarked { seq } => {
                Seq::new(seq).ok_or_else(|| AgentError::Failed("record 0, which there is none of".to_owned()))
            }
            Answer::Failed { why } => Err(AgentError::Failed(why)),
            Answer::Synced {} => Err(AgentError::Failed("something else".to_owned())),
        }
    }

    fn ask(self, request: &Request<'_>, timeout: Duration) -> Result<Answer, AgentError> {
        let stream = UnixStream::connect(self.store.join(SOCKET)).map_err(AgentError::NotThere)?;
        stream.set_read_timeout(Some(timeout))?;
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        (&stream).write_all(line.as_bytes())?;
        let mut answer = String::new();
        BufReader::new(Read::take(&stream, LINE_BYTES_MAX)).read_line(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    }
}
