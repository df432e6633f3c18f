//! One log on its way to one holder: of an agent to a server, or of a server to one that follows it.
//!
//! The log's writer never waits for it: what they share is the Seq that is durable, how long the log is, and now and then the
//! time of the oldest record that is not durable ([`DurableLog`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::{Notify, mpsc};

use super::link::{self, LinkError};
use super::thread::on_own_thread;
use super::throttle::{Charge, PIECE_BYTES, Throttle};
use super::turns::Turns;
use crate::error::{OpenError, ReadError};
use crate::ship::{Flight, LogTail, Offerable, Sent, TailError};
use crate::types::{Seq, WallNs};
use crate::wire::{ALPN, Kind, Message, Shipment, Standing, WireError};

/// Frames that are read ahead of the connection.
const FRAMES_AHEAD: usize = 4;
/// How often the reader of the log looks whether it is still wanted, and a holder that is ahead whether it still is.
const DURABLE_WAIT: Duration = Duration::from_millis(100);
/// For so long, a holder that was never reached counts as one that will be.
const FIRST_TRY_MAX: Duration = Duration::from_secs(2);
/// For how long nothing is offered to a holder that had lost what it had said it has.
const OFFERS_REST: Duration = Duration::from_secs(60);
/// How often the holder is told how far behind it is.
pub(crate) const STANDING_INTERVAL: Duration = Duration::from_secs(1);

/// Tells what of a log is durable.
pub trait DurableLog: Send + Sync + 'static {
    /// The last durable record, as soon as that is later than `beyond`, or after `timeout`.
    fn wait_durable_beyond(&self, beyond: Option<Seq>, timeout: Duration) -> Option<Seq>;

    /// Bytes of the log by now. Only how it grows matters.
    fn log_bytes(&self) -> u64;

    /// Time of the oldest record that is on its way to the log, or there and not durable. Of a log that takes in what is
    /// durable elsewhere: none.
    fn oldest_not_durable(&self) -> Option<WallNs> {
        None
    }
}

/// What a holder is that has more of a history than the log that feeds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// Proof that the log was set back: it is where the history begins.
    Diverged,
    /// Expected to be caught up with: the log is a copy itself, and gets the rest again.
    Awaited,
}

/// A rest from offers, after a holder had lost what it had said it has. Kept from one connection to the next.
#[derive(Debug, Default)]
pub(crate) struct OffersRest(Mutex<Option<Instant>>);

impl OffersRest {
    /// A connection ended with this error.
    pub(crate) fn ended(&self, error: &LinkError) {
        if let LinkError::Lacking { .. } = error {
            *self.0.lock() = Some(Instant::now() + OFFERS_REST);
        }
    }

    fn is_over(&self) -> bool {
        self.0.lock().is_none_or(|until| Instant::now() >= until)
    }
}

/// Why feeding ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FeedError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("{0}")]
    Tail(#[from] TailError),
    #[error("{0}")]
    Other(String),
}

impl FeedError {
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Self::Link(error) => error.is_refusal(),
            Self::Tail(TailError::Diverged { .. }) => true,
            _ => false,
        }
    }

    /// Does it say nothing of whether the holder will have us?
    fn is_mute(&self) -> bool {
        matches!(self, Self::Link(LinkError::Reset))
    }

    fn thread(error: std::io::Error) -> Self {
        Self::Other(format!("reading the log: {error}"))
    }
}

impl From<quinn::ConnectionError> for FeedError {
    fn from(error: quinn::ConnectionError) -> Self {
        LinkError::from(error).into()
    }
}

impl From<OpenError> for FeedError {
    fn from(error: OpenError) -> Self {
        TailError::from(error).into()
    }
}

impl From<ReadError> for FeedError {
    fn from(error: ReadError) -> Self {
        TailError::from(error).into()
    }
}

/// How far a holder is. Kept from one connection to the next.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) flight: Flight,
    /// A connection is up, and the place in the log is found.
    pub(crate) is_running: bool,
    /// The holder has no room.
    pub(crate) full: bool,
    /// Something new was acknowledged since the last connection began.
    pub(crate) is_useful: bool,
    /// Bytes of the log that the holder had when it connected, less those acknowledged before.
    held_bytes: i128,
    /// Why the last connection ended, or was not made.
    pub(crate) why: Option<String>,
    pub(crate) is_refused: bool,
}

/// See the module's head.
pub(crate) struct Feed {
    /// Who holds the copy.
    to: String,
    store: PathBuf,
    log: Arc<dyn DurableLog>,
    throttle: Arc<Throttle>,
    ahead: Ahead,
    rest: Arc<OffersRest>,
    /// When feeding began, and how much of the log there was.
    began: (Instant, u64),
    progress: Mutex<Progress>,
    /// Signalled at every change of `progress`.
    changed: Condvar,
    /// There is room for one more frame.
    room: Notify,
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Feed")
            .field("to", &self.to)
            .field("store", &self.store)
            .field("progress", &self.progress)
            .finish_non_exhaustive()
    }
}

impl Feed {
    /// Of the log of the store in `store` to `to`, as fast as `throttle` allows, with a rest from offers as there is one.
    pub(crate) fn new(
        to: String,
        store: &Path,
        log: Arc<dyn DurableLog>,
        throttle: Arc<Throttle>,
        ahead: Ahead,
        rest: Arc<OffersRest>,
    ) -> Arc<Self> {
        Arc::new(Self {
            to,
            store: store.to_owned(),
            began: (Instant::now(), log.log_bytes()),
            log,
            throttle,
            ahead,
            rest,
            progress: Mutex::default(),
            changed: Condvar::new(),
            room: Notify::new(),
        })
    }

    /// Who holds the copy.
    pub(crate) fn to(&self) -> &str {
        &self.to
    }

    pub(crate) fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock()
    }

    /// The last record that is durable here.
    pub(crate) fn durable(&self) -> Option<Seq> {
        self.log.wait_durable_beyond(None, Duration::ZERO)
    }

    /// Bytes of the log by now.
    pub(crate) fn log_bytes(&self) -> u64 {
        self.log.log_bytes()
    }

    /// How far behind the holder is. Reads the log where memory does not tell.
    pub(crate) fn standing(&self) -> Standing {
        // Asked for first: what is durable then is no older.
        let not_durable = self.log.oldest_not_durable();
        let durable = self.durable();
        let mut standing = Standing {
            durable,
            lag_ns: age_ns(not_durable),
            ..Standing::default()
        };
        let (acked, end, oldest) = {
            let flight = &self.progress.lock().flight;
            (flight.acked_seq(), flight.acked_end(), flight.oldest_on_its_way())
        };
        if acked >= durable {
            return standing;
        }
        let oldest = match oldest {
            Some(oldest) => Some(oldest),
            None => LogTail::wall_after(&self.store, end, durable).ok().flatten(),
        };
        standing.lag_ns = age_ns(oldest).max(standing.lag_ns);
        standing.backlog_bytes = LogTail::bytes_after(&self.store, end).unwrap_or(0);
        standing
    }

    /// About how many bytes of the log the holder has still to get, without a look at the disk; `None` if it takes
    /// nothing now. One that is being reached for the first time lacks what there is more since then, at least.
    pub(crate) fn backlog(&self) -> Option<u64> {
        self.backlog_after(self.began.0.elapsed())
    }

    /// So long after feeding began.
    fn backlog_after(&self, since: Duration) -> Option<u64> {
        let log_bytes = self.log.log_bytes();
        let progress = self.progress.lock();
        if progress.is_running {
            let held = progress.held_bytes + i128::from(progress.flight.acked_bytes());
            let backlog = u64::try_from(i128::from(log_bytes) - held).unwrap_or(0);
            return (!progress.full).then_some(backlog);
        }
        let is_first_try = progress.why.is_none() && since < FIRST_TRY_MAX;
        is_first_try.then(|| log_bytes.saturating_sub(self.began.1))
    }

    /// Waits until everything up to `seq` is durable there; false after `timeout`.
    pub(crate) fn wait_acked(&self, seq: Option<Seq>, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut progress = self.progress.lock();
        while progress.flight.acked_seq() < seq {
            if self.changed.wait_until(&mut progress, deadline).timed_out() {
                return progress.flight.acked_seq() >= seq;
            }
        }
        true
    }

    /// Takes note of why a connection ended, or was not made.
    pub(crate) fn note(&self, error: &FeedError) {
        let why = error.to_string();
        let mut progress = self.progress.lock();
        (progress.is_running, progress.full) = (false, false);
        if progress.is_refused && error.is_mute() {
            // Who is refused hears that instead of why if it was slow to listen. The next attempt tells.
            return;
        }
        progress.is_refused = error.is_refusal();
        if progress.why.as_ref() != Some(&why) {
            tracing::warn!(to = %self.to, "not connected: {why}");
            progress.why = Some(why);
        }
        self.changed.notify_all();
    }

    /// Sends over `connection` what the holder lacks, until it is cut. The holder speaks on `receive`, and is spoken to on
    /// `send`.
    pub(crate) async fn run(
        self: &Arc<Self>,
        connection: &Connection,
        mut send: SendStream,
        mut receive: RecvStream,
    ) -> Result<(), FeedError> {
        // Offers and standings are short, and overtake frames.
        let _ = send.set_priority(1);
        let ended = match self.begin(&mut send, &mut receive).await {
            Ok(tail) => self.send_all(connection, tail, send, &mut receive).await,
            Err(error) => Err(error),
        };
        let Err(FeedError::Link(error)) = ended else {
            return ended;
        };
        let error = link::why_ended(connection, error).await;
        self.rest.ended(&error);
        Err(error.into())
    }

    async fn send_all(
        self: &Arc<Self>,
        connection: &Connection,
        tail: LogTail,
        send: SendStream,
        receive: &mut RecvStream,
    ) -> Result<(), FeedError> {
        let frames = connection.open_uni().await?;
        let (sender, receiver) = mpsc::channel(FRAMES_AHEAD);
        let feed = Arc::clone(self);
        // Who speaks the first format knows nothing of offers.
        let may_offer = link::protocol(connection).as_deref() == Some(ALPN);
        let turns = Arc::new(Turns::default());
        let asked = Arc::clone(&turns);
        let reader = on_own_thread("cdp-tail", move || {
            let may_offer = |feed: &Self| may_offer && feed.rest.is_over() && asked.wants_offer();
            feed.read_ahead(tail, &sender, may_offer)
        });
        let send = tokio::sync::Mutex::new(send);
        tokio::select! {
            ended = self.take_answers(receive, &turns) => ended,
            ended = turns.fill(receiver, &send) => match ended? {},
            ended = self.send_frames(&turns, frames, connection) => ended,
            ended = self.tell_standing(&send) => ended,
            ended = reader => ended.map_err(FeedError::thread)?,
        }
    }

    /// Finds the place in the log that the holder has reached.
    async fn begin(
        self: &Arc<Self>,
        send: &mut SendStream,
        receive: &mut RecvStream,
    ) -> Result<LogTail, FeedError> {
        let mut tail = LogTail::open(&self.store)?;
        let mut durable = self.durable();
        let hello = Message::Hello {
            log: tail.store(),
            durable,
        };
        send.write_all(&hello.encode()).await.map_err(LinkError::from)?;
        let Message::Welcome { held } = link::expect(receive, Kind::Welcome).await? else {
            return Err(LinkError::closed("no welcome").into());
        };
        let held_last = held.map(|held| held.last);
        let mut told = Instant::now();
        while self.ahead == Ahead::Awaited && durable < held_last {
            tokio::time::sleep(DURABLE_WAIT).await;
            durable = self.durable();
            if told.elapsed() >= STANDING_INTERVAL {
                told = Instant::now();
                let standing = Standing {
                    durable,
                    ..Standing::default()
                };
                send_standing(send, standing).await?;
            }
        }
        let skip = move || tail.skip_to(held.as_ref(), durable).map(|()| tail);
        let tail = on_own_thread("cdp-tail", skip)
            .await
            .map_err(FeedError::thread)??;
        let end = held.and_then(|_| tail.position());
        let missing = LogTail::bytes_after(&self.store, end)?;
        let log_bytes = self.log.log_bytes();
        let mut progress = self.progress.lock();
        progress.held_bytes =
            i128::from(log_bytes) - i128::from(missing) - i128::from(progress.flight.acked_bytes());
        progress.flight.restart(held_last, end);
        (progress.is_running, progress.is_useful) = (true, false);
        (progress.is_refused, progress.why) = (false, None);
        self.changed.notify_all();
        drop(progress);
        tracing::info!(to = %self.to, held = Seq::number_of(held_last), "connected");
        Ok(tail)
    }

    async fn send_frames(
        &self,
        turns: &Turns,
        mut stream: SendStream,
        connection: &Connection,
    ) -> Result<(), FeedError> {
        let mut charge = Charge::default();
        let line = || {
            let path = connection.stats().path;
            let line = path.cwnd as f64 / path.rtt.as_secs_f64();
            let limit = self.throttle.limit();
            limit.map_or(line, |limit| line.min(limit.bytes_per_second() as f64))
        };
        loop {
            while !self.progress.lock().flight.has_room() {
                self.room.notified().await;
            }
            let outgoing = turns.next(line).await;
            let thin = outgoing.thin();
            let frame = outgoing.frame;
            let (whole_bytes, end) = (frame.bytes.len() as u64, frame.end());
            let sent_bytes = thin.as_ref().map_or(whole_bytes, |thin| thin.len() as u64);
            let sent = Sent {
                last: frame.last,
                wall: frame.wall,
                bytes: sent_bytes,
                saved_bytes: whole_bytes - sent_bytes,
                end,
            };
            self.progress.lock().flight.sent(sent);
            let previous = frame.previous;
            let (units, bytes) = match thin {
                None => (Vec::new(), frame.bytes),
                Some(thin) => (outgoing.known, thin),
            };
            let head = Shipment::head(previous, &units, bytes.len());
            // Bytes of datagrams that have left for the other end.
            let left_bytes = || connection.stats().udp_tx.bytes;
            if self.throttle.limit().is_none() {
                let written = (head.len() + bytes.len()) as u64;
                self.throttle.turn().await;
                stream.write_all(&head).await.map_err(LinkError::from)?;
                // Not copied: QUIC keeps it until it has arrived.
                stream.write_chunk(bytes.into()).await.map_err(LinkError::from)?;
                self.throttle.charge(charge.due(written, left_bytes()));
                continue;
            }
            for piece in head.chunks(PIECE_BYTES).chain(bytes.chunks(PIECE_BYTES)) {
                self.throttle.turn().await;
                stream.write_all(piece).await.map_err(LinkError::from)?;
                self.throttle.charge(charge.due(piece.len() as u64, left_bytes()));
            }
        }
    }

    async fn take_answers(&self, stream: &mut RecvStream, turns: &Turns) -> Result<(), FeedError> {
        loop {
            let Some((kind, body)) = link::read_message(stream).await? else {
                return Err(LinkError::closed("the stream ended early").into());
            };
            match Message::decode(kind, &body).map_err(LinkError::from)? {
                Message::Ack { durable, full } => self.take_ack(durable, full)?,
                Message::Have { bits } => turns
                    .answered(bits)
                    .map_err(|error| FeedError::Other(error.to_string()))?,
                other => {
                    let (found, expected) = (other.kind(), Kind::Ack);
                    return Err(LinkError::from(WireError::Unexpected { found, expected }).into());
                }
            }
        }
    }

    fn take_ack(&self, durable: Option<Seq>, full: bool) -> Result<(), FeedError> {
        let mut progress = self.progress.lock();
        let before = progress.flight.acked_seq();
        progress
            .flight
            .acked(durable, Instant::now(), self.log.log_bytes())
            .map_err(|error| FeedError::Other(error.to_string()))?;
        progress.is_useful |= progress.flight.acked_seq() > before;
        if full && !progress.full {
            tracing::warn!(to = %self.to, "the server is full: it takes nothing more for now");
        }
        progress.full = full;
        self.changed.notify_all();
        drop(progress);
        self.room.notify_one();
        Ok(())
    }

    async fn tell_standing(
        self: &Arc<Self>,
        stream: &tokio::sync::Mutex<SendStream>,
    ) -> Result<(), FeedError> {
        let mut due = tokio::time::interval(STANDING_INTERVAL);
        due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            due.tick().await;
            let feed = Arc::clone(self);
            let standing = on_own_thread("cdp-standing", move || feed.standing());
            let standing = standing.await.map_err(FeedError::thread)?;
            send_standing(&mut *stream.lock().await, standing).await?;
        }
    }

    /// Reads what becomes durable, until nobody takes it any more.
    fn read_ahead(
        &self,
        mut tail: LogTail,
        frames: &mpsc::Sender<Offerable>,
        may_offer: impl Fn(&Self) -> bool,
    ) -> Result<(), FeedError> {
        let mut durable = None;
        loop {
            while let Some(frame) = tail.next(durable)? {
                let frame = match may_offer(self) {
                    true => Offerable::new(frame),
                    false => Offerable::plain(frame),
                };
                if frames.blocking_send(frame).is_err() {
                    return Ok(());
                }
            }
            if frames.is_closed() {
                return Ok(());
            }
            durable = self.log.wait_durable_beyond(durable, DURABLE_WAIT);
        }
    }
}

fn age_ns(at: Option<WallNs>) -> u64 {
    let age = at.map_or(0, |at| WallNs::now().0.saturating_sub(at.0));
    u64::try_from(age).unwrap_or(0)
}

async fn send_standing(stream: &mut SendStream, standing: Standing) -> Result<(), FeedError> {
    let message = Message::Standing(standing).encode();
    Ok(stream.write_all(&message).await.map_err(LinkError::from)?)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[derive(Default)]
    struct Log(AtomicU64, Mutex<Option<WallNs>>);

    impl DurableLog for Arc<Log> {
        fn wait_durable_beyond(&self, _: Option<Seq>, _: Duration) -> Option<Seq> {
            None
        }

        fn log_bytes(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }

        fn oldest_not_durable(&self) -> Option<WallNs> {
            *self.1.lock()
        }
    }

    fn feed_of(log: &Arc<Log>) -> Arc<Feed> {
        Feed::new(
            "dr1:7443".to_owned(),
            Path::new("store"),
            Arc::new(Arc::clone(log)),
            Arc::default(),
            Ahead::Diverged,
            Arc::default(),
        )
    }

    /// Goal: a write that nobody could bring back counts, wherever it is on its way.
    #[test]
    fn what_is_not_durable_here_is_behind_there() {
        let log = Arc::new(Log::default());
        let feed = feed_of(&log);
        assert_eq!(feed.standing().lag_ns, 0);
        *log.1.lock() = Some(WallNs(WallNs::now().0 - 5_000_000));
        let standing = feed.standing();
        assert!(
            (5_000_000..5_000_000_000).contains(&standing.lag_ns),
            "{standing:?}"
        );
        assert_eq!(standing.backlog_bytes, 0);
    }

    /// Goal: `status` goes on telling why a server refuses, also where its word comes so late that all that is left of the
    /// connection is a reset. One that was connected is told to have been started anew.
    #[test]
    fn a_reset_does_not_hide_a_refusal() {
        let feed = feed_of(&Arc::default());
        let refused = LinkError::Refused {
            why: "revoked".to_owned(),
        };
        feed.note(&refused.into());
        feed.note(&LinkError::Reset.into());
        let told = |feed: &Feed| {
            let progress = feed.progress();
            (progress.is_refused, progress.why.clone())
        };
        assert_eq!(told(&feed), (true, Some("revoked".to_owned())));
        let running = feed_of(&Arc::default());
        running.progress.lock().is_running = true;
        running.note(&LinkError::Reset.into());
        let anew = "the server was started anew".to_owned();
        assert_eq!(told(&running), (false, Some(anew)));
    }

    /// Goal: what is read back right after a start does not run ahead of a server that is about to be reached, nor wait for
    /// one that is not there.
    #[test]
    fn a_server_that_was_never_reached_lacks_what_came_since_for_a_while() {
        let log = Arc::new(Log::default());
        log.0.store(1 << 30, Ordering::Relaxed);
        let new = || feed_of(&log);
        let (away, slow) = (new(), new());
        log.0.fetch_add(9 << 20, Ordering::Relaxed);
        assert_eq!(slow.backlog_after(Duration::from_secs(1)), Some(9 << 20));
        assert_eq!(slow.backlog_after(FIRST_TRY_MAX), None);
        away.note(&FeedError::Other("nobody listens".into()));
        assert_eq!(away.backlog_after(Duration::ZERO), None);
    }
}
