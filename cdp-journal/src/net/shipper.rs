//! Keeps one server up with a log: connects, learns what it holds, sends the rest, and again after every cut.
//!
//! A thread of its own with a runtime of its own. The log's writer never waits for it: all it shares with the writer is
//! the Seq that is durable.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use quinn::{RecvStream, SendStream};
use tokio::sync::{Notify, mpsc, watch};

use super::backoff::{Backoff, Session, random};
use super::identity::Identities;
use super::link::{self, Link, LinkError};
use super::throttle::Throttle;
use crate::error::{OpenError, ReadError};
use crate::ship::{Flight, LogTail, Sent, TailError, TailFrame};
use crate::types::{Seq, WallNs};
use crate::wire::{Kind, Message, Right};

/// Frames that are read ahead of the connection.
const FRAMES_AHEAD: usize = 4;
/// How often the reader of the log looks whether it is still wanted.
const DURABLE_WAIT: Duration = Duration::from_millis(100);
/// Written at once where there is a limit.
const PIECE_BYTES: usize = 16 << 10;
/// What a stop gives a connected server to acknowledge the rest.
const STOP_WAIT: Duration = Duration::from_secs(2);

/// Tells what of a log is durable.
pub trait DurableLog: Send + Sync + 'static {
    /// The last durable record, as soon as that is later than `beyond`, or after `timeout`.
    fn wait_durable_beyond(&self, beyond: Option<Seq>, timeout: Duration) -> Option<Seq>;

    /// Bytes of the log by now. Only how it grows matters.
    fn log_bytes(&self) -> u64;
}

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

#[derive(Debug)]
struct Target {
    server: String,
    store: PathBuf,
    identity: PathBuf,
    progress: Mutex<Progress>,
    /// Signalled at every change of `progress`.
    changed: Condvar,
    /// There is room for one more frame.
    room: Notify,
}

#[derive(Debug)]
struct Progress {
    state: TargetState,
    flight: Flight,
    full: bool,
    why: Option<String>,
    /// Something new was acknowledged since it is connected.
    is_useful: bool,
    /// Bytes of the log that the server had when it connected, less those acknowledged before.
    held_bytes: i128,
}

/// See the module's head.
pub struct Shipper {
    target: Arc<Target>,
    log: Arc<dyn DurableLog>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Shipper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shipper")
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
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
        let target = Arc::new(Target {
            server: server.to_owned(),
            store: store.to_owned(),
            identity: identity.to_owned(),
            progress: Mutex::new(Progress {
                state: TargetState::Connecting,
                flight: Flight::default(),
                full: false,
                why: None,
                is_useful: false,
                held_bytes: 0,
            }),
            changed: Condvar::new(),
            room: Notify::new(),
        });
        let (stop, stopped) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let worker = Worker {
            target: Arc::clone(&target),
            log: Arc::clone(&log),
            throttle,
            stop: stopped,
        };
        let thread = std::thread::Builder::new()
            .name("cdp-ship".into())
            .spawn(move || {
                runtime.block_on(worker.run());
                // A name server, or the log's disk, may keep a helper for long: nobody who stops waits for that.
                runtime.shutdown_background();
            })?;
        Ok(Self {
            target,
            log,
            stop,
            thread: Some(thread),
        })
    }

    /// HOST:PORT.
    pub fn server(&self) -> &str {
        &self.target.server
    }

    /// How it is doing now.
    pub fn status(&self) -> TargetStatus {
        let durable = self.log.wait_durable_beyond(None, Duration::ZERO);
        let Target {
            server,
            store,
            progress,
            ..
        } = &*self.target;
        let progress = progress.lock();
        let flight = &progress.flight;
        let (acked, end, oldest) = (flight.acked_seq(), flight.acked_end(), flight.oldest_on_its_way());
        let is_connected = progress.state == TargetState::Connected;
        let gain = flight.gain_per_second(Instant::now(), self.log.log_bytes());
        let mut status = TargetStatus {
            server: server.clone(),
            state: progress.state,
            acked_seq: Seq::number_of(acked),
            lag_seconds: 0.0,
            sent_bytes: flight.sent_bytes(),
            backlog_bytes: 0,
            catch_up_seconds: Some(0.0),
            full: progress.full,
            why: progress.why.clone(),
        };
        // The rest is asked of the disk.
        drop(progress);
        if acked >= durable {
            return status;
        }
        let oldest = match oldest {
            Some(oldest) => Some(oldest),
            None => LogTail::wall_after(store, end, durable).ok().flatten(),
        };
        let lag_ns = oldest.map_or(0, |oldest| WallNs::now().0.saturating_sub(oldest.0).max(0));
        status.lag_seconds = lag_ns as f64 / 1e9;
        status.backlog_bytes = LogTail::bytes_after(store, end).unwrap_or(0);
        status.catch_up_seconds = gain
            .filter(|gain| is_connected && *gain > 0.0)
            .map(|gain| status.backlog_bytes as f64 / gain);
        status
    }

    /// About how many bytes of the log it has still to get, without a look at the disk; `None` if it takes nothing now.
    pub fn backlog(&self) -> Option<u64> {
        let progress = self.target.progress.lock();
        let takes = progress.state == TargetState::Connected && !progress.full;
        let held = progress.held_bytes + i128::from(progress.flight.acked_bytes());
        let backlog = i128::from(self.log.log_bytes()) - held;
        takes.then(|| u64::try_from(backlog).unwrap_or(0))
    }

    /// Waits until everything up to `seq` is durable there; false after `timeout`.
    pub fn wait_acked(&self, seq: Option<Seq>, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut progress = self.target.progress.lock();
        while progress.flight.acked_seq() < seq {
            if self
                .target
                .changed
                .wait_until(&mut progress, deadline)
                .timed_out()
            {
                return progress.flight.acked_seq() >= seq;
            }
        }
        true
    }

    /// Gives a server that is connected a moment to acknowledge what is durable by now.
    pub fn finish(&self) {
        let is_connected = self.target.progress.lock().state == TargetState::Connected;
        if is_connected {
            let durable = self.log.wait_durable_beyond(None, Duration::ZERO);
            self.wait_acked(durable, STOP_WAIT);
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

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum ShipError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("{0}")]
    Tail(#[from] TailError),
    #[error("{0}")]
    Other(String),
}

impl ShipError {
    fn is_refusal(&self) -> bool {
        match self {
            Self::Link(error) => error.is_refusal(),
            Self::Tail(TailError::Diverged { .. }) => true,
            _ => false,
        }
    }
}

impl From<quinn::ConnectionError> for ShipError {
    fn from(error: quinn::ConnectionError) -> Self {
        LinkError::from(error).into()
    }
}

impl From<OpenError> for ShipError {
    fn from(error: OpenError) -> Self {
        TailError::from(error).into()
    }
}

impl From<ReadError> for ShipError {
    fn from(error: ReadError) -> Self {
        TailError::from(error).into()
    }
}

/// A connection, and what is to be sent over it.
struct Established {
    link: Link,
    acks: RecvStream,
    tail: LogTail,
}

struct Worker {
    target: Arc<Target>,
    log: Arc<dyn DurableLog>,
    throttle: Arc<Throttle>,
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
            backoff.ended(self.note(&error));
            let wait = backoff.next(random());
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Takes note of a session's end; returns what it was good for.
    fn note(&self, error: &ShipError) -> Session {
        let why = error.to_string();
        let state = if error.is_refusal() {
            TargetState::Refused
        } else {
            TargetState::Connecting
        };
        let mut progress = self.target.progress.lock();
        progress.state = state;
        progress.full = false;
        let is_useful = std::mem::take(&mut progress.is_useful);
        if progress.why.as_ref() != Some(&why) {
            tracing::warn!(server = %self.target.server, "not connected: {why}");
            progress.why = Some(why);
        }
        self.target.changed.notify_all();
        match error {
            ShipError::Link(LinkError::Superseded { .. }) => Session::Useless,
            _ if is_useful => Session::Useful,
            _ => Session::Useless,
        }
    }

    /// One connection, until it is cut (an error) or the shipper is told to stop.
    async fn session(&self, mut stop: watch::Receiver<bool>) -> Result<(), ShipError> {
        let established = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
            established = self.establish() => established?,
        };
        let Established { link, acks, tail } = established;
        let frames = link.connection.open_uni().await?;
        let (sender, receiver) = mpsc::channel(FRAMES_AHEAD);
        let log = Arc::clone(&self.log);
        let reader = blocking(move || read_ahead(tail, &*log, &sender));
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => {}
            ended = self.take_acks(acks) => return ended,
            ended = self.send_frames(receiver, frames, &link) => return ended,
            ended = reader => return ended?,
        }
        link.close().await;
        Ok(())
    }

    /// Connects, and finds the place in the log that the server has reached.
    async fn establish(&self) -> Result<Established, ShipError> {
        let identities = Identities::load(&self.target.identity, Right::Append)
            .and_then(|identities| identities.check(WallNs::now()).map(|()| identities))
            .map_err(LinkError::from)?;
        let link = Link::connect(&self.target.server, identities.tls()?).await?;
        let (mut send, mut acks) = link.connection.open_bi().await?;
        let mut tail = LogTail::open(&self.target.store)?;
        let durable = self.log.wait_durable_beyond(None, Duration::ZERO);
        let hello = Message::Hello {
            log: tail.store(),
            durable,
        };
        send.write_all(&hello.encode()).await.map_err(LinkError::from)?;
        let Message::Welcome { held } = link::expect(&mut acks, Kind::Welcome).await? else {
            return Err(LinkError::closed("no welcome").into());
        };
        let tail = blocking(move || tail.skip_to(held.as_ref(), durable).map(|()| tail)).await??;
        {
            let end = held.and_then(|_| tail.position());
            let missing = LogTail::bytes_after(&self.target.store, end)?;
            let log_bytes = self.log.log_bytes();
            let mut progress = self.target.progress.lock();
            progress.held_bytes =
                i128::from(log_bytes) - i128::from(missing) - i128::from(progress.flight.acked_bytes());
            progress.flight.restart(held.map(|held| held.last), end);
            (progress.state, progress.why) = (TargetState::Connected, None);
            self.target.changed.notify_all();
        }
        tracing::info!(server = %self.target.server, held = held.map_or(0, |held| held.last.get()), "connected");
        Ok(Established { link, acks, tail })
    }

    async fn send_frames(
        &self,
        mut frames: mpsc::Receiver<TailFrame>,
        mut stream: SendStream,
        link: &Link,
    ) -> Result<(), ShipError> {
        let mut charge = Charge::default();
        while let Some(frame) = frames.recv().await {
            while !self.target.progress.lock().flight.has_room() {
                self.target.room.notified().await;
            }
            let sent = Sent {
                last: frame.last,
                wall: frame.wall,
                bytes: frame.bytes.len() as u64,
                end: frame.end(),
            };
            self.target.progress.lock().flight.sent(sent);
            let message = Message::Frame {
                previous: frame.previous,
                frame: frame.bytes,
            };
            let message = message.encode();
            let piece_bytes = match self.throttle.limit() {
                Some(_) => PIECE_BYTES,
                None => message.len(),
            };
            for piece in message.chunks(piece_bytes) {
                self.wait_for_turn().await;
                stream.write_all(piece).await.map_err(LinkError::from)?;
                self.throttle
                    .charge(charge.due(piece.len() as u64, link.sent_bytes()));
            }
        }
        // The reader has ended, and says why.
        std::future::pending().await
    }

    async fn wait_for_turn(&self) {
        loop {
            let wait = self.throttle.wait();
            if wait.is_zero() {
                return;
            }
            tokio::time::sleep(wait).await;
        }
    }

    async fn take_acks(&self, mut stream: RecvStream) -> Result<(), ShipError> {
        loop {
            let Message::Ack { durable, full } = link::expect(&mut stream, Kind::Ack).await? else {
                return Err(LinkError::closed("no acknowledgement").into());
            };
            let mut progress = self.target.progress.lock();
            let before = progress.flight.acked_seq();
            progress
                .flight
                .acked(durable, Instant::now(), self.log.log_bytes())
                .map_err(|error| ShipError::Other(error.to_string()))?;
            progress.is_useful |= progress.flight.acked_seq() > before;
            if full && !progress.full {
                tracing::warn!(server = %self.target.server, "the server is full: it takes nothing more for now");
            }
            progress.full = full;
            self.target.changed.notify_all();
            drop(progress);
            self.target.room.notify_one();
        }
    }
}

/// What a connection counts against a limit: what was written to it or, where that is more, what has left the host for it,
/// headers and all that was sent again included.
#[derive(Debug, Default)]
struct Charge {
    written: u64,
    charged: u64,
}

impl Charge {
    /// What is due after a piece was written, of a connection that has sent `sent` bytes so far.
    fn due(&mut self, piece: u64, sent: u64) -> u64 {
        self.written += piece;
        let due = self.written.max(sent).saturating_sub(self.charged);
        self.charged += due;
        due
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ShipError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| ShipError::Other(format!("reading the log: {error}")))
}

/// Reads what becomes durable, until nobody takes it any more.
fn read_ahead(
    mut tail: LogTail,
    log: &dyn DurableLog,
    frames: &mpsc::Sender<TailFrame>,
) -> Result<(), ShipError> {
    let mut durable = None;
    loop {
        while let Some(frame) = tail.next(durable)? {
            if frames.blocking_send(frame).is_err() {
                return Ok(());
            }
        }
        if frames.is_closed() {
            return Ok(());
        }
        durable = log.wait_durable_beyond(durable, DURABLE_WAIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_left_the_host_is_charged_once() {
        let mut charge = Charge::default();
        assert_eq!(charge.due(1000, 0), 1000, "still in a buffer");
        assert_eq!(charge.due(1000, 1500), 1000);
        assert_eq!(
            charge.due(1000, 3300),
            1300,
            "headers, and what was lost on the way"
        );
        assert_eq!(charge.due(1000, 3300), 700);
    }
}
