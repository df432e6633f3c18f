//! Keeps one server up with a log: connects, learns what it holds, sends the rest, and again after every cut.
//!
//! A thread of its own with a runtime of its own, which connects and connects again; what it sends is [`Feed`]'s.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::backoff::{Backoff, Session, random};
use super::feed::{Ahead, DurableLog, Feed, FeedError};
use super::link::{Link, LinkError};
use super::throttle::Throttle;
use crate::types::Seq;
use crate::wire::Right;

/// What a stop gives a connected server to acknowledge the rest.
const STOP_WAIT: Duration = Duration::from_secs(2);

/// How a target is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetState {
    /// Frames go there.
    Connected,
    /// Not there yet, or not any more; tried again and again.
    Connecting,
    /// It will not have us; tried again at longer intervals.
    Refused,
}

impl TargetState {
    pub(crate) fn of(is_running: bool, is_refused: bool) -> Self {
        match (is_running, is_refused) {
            (true, _) => Self::Connected,
            (false, true) => Self::Refused,
            (false, false) => Self::Connecting,
        }
    }
}

/// A target, for `status`.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct TargetStatus {
    /// HOST:PORT.
    pub server: String,
    /// How it is doing.
    pub state: TargetState,
    /// Last record known to be durable there; 0 if that is not known.
    pub acked_seq: u64,
    /// Age of the oldest record that is not known to be durable there.
    pub lag_seconds: f64,
    /// Bytes of frames sent since the start.
    pub sent_bytes: u64,
    /// Bytes of frames that were not sent, as the server had them.
    #[serde(default)]
    pub saved_bytes: u64,
    /// Bytes of the log that are not known to be durable there.
    pub backlog_bytes: u64,
    /// How long those will take, if what comes in and what goes out stay as they were in the last seconds; nothing while
    /// it is not connected, or falls behind.
    pub catch_up_seconds: Option<f64>,
    /// The server has no room.
    pub full: bool,
    /// Why it is not connected.
    pub why: Option<String>,
}

/// See the module's head.
#[derive(Debug)]
pub struct Shipper {
    feed: Arc<Feed>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Shipper {
    /// Starts to ship the log of the store in `store` to `server`, with the certificate in the folder `identity`, as fast
    /// as `throttle` allows.
    pub fn start(
        store: &Path,
        server: &str,
        identity: &Path,
        log: Arc<dyn DurableLog>,
        throttle: Arc<Throttle>,
    ) -> std::io::Result<Self> {
        let feed = Feed::new(
            server.to_owned(),
            store,
            log,
            throttle,
            Ahead::Diverged,
            Arc::default(),
        );
        let (stop, stopped) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let worker = Worker {
            feed: Arc::clone(&feed),
            identity: identity.to_owned(),
            stop: stopped,
        };
        let thread = std::thread::Builder::new()
            .name("cdp-ship".into())
            .spawn(move || {
                let feed = Arc::clone(&worker.feed);
                let run = std::panic::AssertUnwindSafe(|| runtime.block_on(worker.run()));
                if std::panic::catch_unwind(run).is_err() {
                    let why =
                        "shipping has panicked: a fault of this program, please report it, and reload it";
                    feed.note(&FeedError::Other(why.to_owned()));
                }
                // A name server may keep a helper for long: nobody who stops waits for that.
                runtime.shutdown_background();
            })?;
        Ok(Self {
            feed,
            stop,
            thread: Some(thread),
        })
    }

    /// Is it still at it? Only a fault of this program ends it.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// HOST:PORT.
    pub fn server(&self) -> &str {
        self.feed.to()
    }

    /// How it is doing now.
    pub fn status(&self) -> TargetStatus {
        let (mut status, gain) = {
            let progress = self.feed.progress();
            let flight = &progress.flight;
            let status = TargetStatus {
                server: self.server().to_owned(),
                state: TargetState::of(progress.is_running, progress.is_refused),
                acked_seq: Seq::number_of(flight.acked_seq()),
                lag_seconds: 0.0,
                sent_bytes: flight.sent_bytes(),
                saved_bytes: flight.saved_bytes(),
                backlog_bytes: 0,
                catch_up_seconds: Some(0.0),
                full: progress.full,
                why: progress.why.clone(),
            };
            (
                status,
                flight.gain_per_second(Instant::now(), self.feed.log_bytes()),
            )
        };
        // The rest is asked of the disk.
        let standing = self.feed.standing();
        status.lag_seconds = standing.lag_ns as f64 / 1e9;
        if Seq::number_of(standing.durable) <= status.acked_seq {
            return status;
        }
        status.backlog_bytes = standing.backlog_bytes;
        status.catch_up_seconds = gain
            .filter(|gain| status.state == TargetState::Connected && *gain > 0.0)
            .map(|gain| status.backlog_bytes as f64 / gain);
        status
    }

    /// About how many bytes of the log it has still to get, without a look at the disk; `None` if it takes nothing now.
    pub fn backlog(&self) -> Option<u64> {
        self.feed.backlog()
    }

    /// Waits until everything up to `seq` is durable there; false after `timeout`.
    pub fn wait_acked(&self, seq: Option<Seq>, timeout: Duration) -> bool {
        self.feed.wait_acked(seq, timeout)
    }

    /// Gives a server that is connected a moment to acknowledge what is durable by now.
    pub fn finish(&self) {
        let is_connected = self.feed.progress().is_running;
        if is_connected {
            self.wait_acked(self.feed.durable(), STOP_WAIT);
        }
    }
}

/// Ends shipping.
impl Drop for Shipper {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a shipping thread panicked");
        }
    }
}

struct Worker {
    feed: Arc<Feed>,
    identity: PathBuf,
    stop: watch::Receiver<bool>,
}

impl Worker {
    async fn run(self) {
        let mut backoff = Backoff::default();
        let mut stop = self.stop.clone();
        loop {
            let Err(error) = self.session(stop.clone()).await else {
                return;
            };
            self.feed.note(&error);
            backoff.ended(match error {
                FeedError::Link(LinkError::Superseded { .. }) => Session::Useless,
                _ if std::mem::take(&mut self.feed.progress().is_useful) => Session::Useful,
                _ => Session::Useless,
            });
            let wait = backoff.next(random());
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// One connection, until it is cut (an error) or the shipper is told to stop.
    async fn session(&self, mut stop: watch::Receiver<bool>) -> Result<(), FeedError> {
        let link = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
            link = Link::connect_as(&self.identity, Right::Append, self.feed.to()) => link?,
        };
        let fed = async {
            let (send, receive) = link.connection.open_bi().await?;
            self.feed.run(&link.connection, send, receive).await
        };
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => {}
            ended = fed => return ended,
        }
        link.close().await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::WallNs;

    /// A log whose disk has not taken a write for five milliseconds.
    struct Stalled;

    impl DurableLog for Stalled {
        fn wait_durable_beyond(&self, _: Option<Seq>, _: Duration) -> Option<Seq> {
            None
        }

        fn log_bytes(&self) -> u64 {
            0
        }

        fn oldest_not_durable(&self) -> Option<WallNs> {
            Some(WallNs(WallNs::now().0 - 5_000_000))
        }
    }

    /// Goal: `status` does not say "no lag" because the server has all that is durable, of a log that makes nothing durable.
    #[test]
    fn what_is_not_durable_here_counts_as_lag_of_the_server() {
        let (feed, stop) = (
            Feed::new(
                "dr1:7443".to_owned(),
                Path::new("store"),
                Arc::new(Stalled),
                Arc::default(),
                Ahead::Diverged,
                Arc::default(),
            ),
            watch::channel(false).0,
        );
        let shipper = Shipper {
            feed,
            stop,
            thread: None,
        };
        let status = shipper.status();
        assert!(status.lag_seconds >= 0.005, "{status:?}");
        assert_eq!(status.backlog_bytes, 0);
    }
}
