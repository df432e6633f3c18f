//! Taking in what an agent ships, or the server that this one follows.
//!
//! ```text
//! connection ──▶ log thread: check, append, sync in groups ──▶ index thread
//!      ▲                              │
//!      └── acks, cumulative ◀─────────┘ durable
//! ```
//!
//! What a frame leaves out, because it is here already, is put in before it is checked. Offers are answered beside all that.
//!
//! Each arrow is a queue with a bound; when the log thread is busy or has no room, the connection is not read, and QUIC
//! holds the sender back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use super::logs::{History, Intake};
use super::units::Known;
use super::{HELLO_TIMEOUT, Refusal, Shared, not_allowed};
use crate::format::{FrameHeader, PackedUnit, RefillError, SealedFrame, UnitHash, refill};
use crate::index::IndexWriter;
use crate::log::{FrameLocation, LogError, LogWriter};
use crate::net::link::{self, LinkError};
use crate::net::thread::on_own_thread;
use crate::net::{PacedReader, Throttle};
use crate::site::AgentName;
use crate::store::StoreWriter;
use crate::trust::Holder;
use crate::types::Seq;
use crate::wire::{Close, FrameId, Kind, Message, WireError};

/// Frames between the connection and the log.
const QUEUE_FRAMES: usize = 4;
/// Frames, heads only, that the index may be behind.
const INDEX_QUEUE_FRAMES: usize = 1024;
/// Frames that are not synced yet, at most.
const UNSYNCED_FRAMES_MAX: usize = INDEX_QUEUE_FRAMES / 2;
/// While frames keep coming, they are made durable this often.
const SYNC_INTERVAL: Duration = Duration::from_millis(10);
/// How often a full store is asked for room.
const ROOM_INTERVAL: Duration = Duration::from_millis(500);

/// What is told to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Acked {
    durable: Option<Seq>,
    full: bool,
}

/// A frame as it came.
struct Shipped {
    /// The Seq before it in the sender's log.
    previous: Option<Seq>,
    /// What is left out of it.
    units: Vec<PackedUnit>,
    bytes: Vec<u8>,
}

/// A frame that was appended, for the index.
struct Appended {
    head: Box<[u8]>,
    location: FrameLocation,
    /// Packed units, and where in the frame they begin.
    units: Vec<(PackedUnit, usize)>,
}

/// Serves an agent's connection until it ends.
pub(super) async fn serve(
    shared: &Arc<Shared>,
    connection: &Connection,
    holder: &Holder,
) -> Result<(), Refusal> {
    let agent = &holder.agent;
    let late = |_| Refusal::new(Close::Protocol, "nothing was said in time");
    let (send, mut receive) = tokio::time::timeout(HELLO_TIMEOUT, connection.accept_bi())
        .await
        .map_err(late)??;
    let hello = tokio::time::timeout(HELLO_TIMEOUT, read_hello(&mut receive, holder));
    let log = hello.await.map_err(late)??;
    if let Some(owner) = owner_of_log(shared, agent, log)? {
        let why = format!(
            "this store's history belongs to agent {owner} here, and the certificate is for agent {agent}; \
             enroll with a token for {owner}"
        );
        return Err(Refusal::new(Close::NotAllowed, why));
    }
    let history = shared.logs.take(agent, log, connection)?;
    let writing = history.lock().await;
    if connection.close_reason().is_some() {
        return Ok(());
    }
    let (store, held) = history.open(None, &shared.logs.options).await?;
    let from = connection.remote_address();
    tracing::info!(%agent, %from, held = held.map_or(0, |held| held.last.get()), "ships");
    let ended = take_in(shared, connection, (send, receive), store, held, &history, None).await;
    drop(writing);
    tracing::info!(%agent, durable = Seq::number_of(history.durable().flatten()), "ships no more");
    ended
}

async fn read_hello(stream: &mut RecvStream, holder: &Holder) -> Result<Uuid, Refusal> {
    let found = link::read_message(stream).await?;
    let (kind, body) = found.ok_or_else(|| Refusal::new(Close::Protocol, "nothing was said"))?;
    match kind {
        Kind::Hello => match Message::decode(kind, &body).map_err(LinkError::from)? {
            Message::Hello { log, .. } => Ok(log),
            _ => Err(Refusal::new(Close::Protocol, "no greeting")),
        },
        found => Err(not_allowed(holder, found, &body)),
    }
}

/// Whose the history `log` is, if it is not the agent's: it belongs to who shipped it first.
pub(super) fn owner_of_log(
    shared: &Shared,
    agent: &AgentName,
    log: Uuid,
) -> Result<Option<AgentName>, Refusal> {
    let site = &shared.logs.site;
    let agents = site.agents().map_err(|error| Refusal::failed(&error))?;
    let mut others = agents.into_iter().filter(|other| other != agent);
    Ok(others.find(|other| site.log_dir(other, log).exists()))
}

/// Takes in what comes over `connection`, whichever end made it, until it ends: runs the two threads of a store, and feeds
/// them. As fast as `throttle` allows. For who holds the history's lock.
pub(super) async fn take_in(
    shared: &Shared,
    connection: &Connection,
    (send, mut receive): (SendStream, RecvStream),
    store: StoreWriter,
    held: Option<FrameId>,
    history: &Arc<History>,
    throttle: Option<&Throttle>,
) -> Result<(), Refusal> {
    let start = Acked {
        durable: held.map(|held| held.last),
        full: false,
    };
    let (acked, mut acks) = watch::channel(start);
    let (frames, to_log) = mpsc::channel::<Shipped>(QUEUE_FRAMES);
    let (failed, mut failure) = oneshot::channel();
    let intake = Arc::new(Intake::default());
    let known = shared.units.of(history);
    let stage = (Arc::clone(history), Arc::clone(&intake), known.clone());
    let threads =
        Threads::start(store, to_log, acked, stage, failed).map_err(|error| Refusal::failed(&error))?;
    history.set_intake(Some(Arc::clone(&intake)));
    let welcome = Message::Welcome { held };
    // Dropped with this function: a stream that ends before its connection says nothing of why.
    let send = tokio::sync::Mutex::new(send);
    let ended = async {
        let welcome = welcome.encode();
        send.lock()
            .await
            .write_all(&welcome)
            .await
            .map_err(LinkError::from)?;
        let frames = async {
            // It begins with the first frame: who has nothing to say may be silent.
            let mut stream = connection.accept_uni().await?;
            let mut paced = throttle.map(|throttle| PacedReader::new(throttle, connection));
            read_frames(&mut stream, paced.as_mut(), frames, &intake).await
        };
        tokio::select! {
            ended = frames => ended,
            ended = write_acks(&send, &mut acks) => ended,
            ended = listen(&mut receive, &send, history, &known) => ended,
            // None of them notices while the log has no room.
            closed = connection.closed() => Err(closed.into()),
            refusal = &mut failure => Err(refusal.unwrap_or_else(|_| Refusal::failed(&"a thread ended"))),
        }
    }
    .await;
    history.set_intake(None);
    // The queue to the log is closed by now: the threads finish what is in it, unless there is no room for it.
    drop(acks);
    on_own_thread("cdp-join", move || threads.join())
        .await
        .map_err(|error| Refusal::failed(&error))?;
    // What the threads found says more than that the stream has ended.
    failure.try_recv().map_or(ended, Err)
}

async fn read_frames(
    stream: &mut RecvStream,
    mut paced: Option<&mut PacedReader<'_>>,
    frames: mpsc::Sender<Shipped>,
    intake: &Intake,
) -> Result<(), Refusal> {
    loop {
        let message = match &mut paced {
            Some(paced) => paced.read_message(stream).await?,
            None => link::read_message(stream).await?,
        };
        let Some((kind, body)) = message else { break };
        let shipped = match Message::decode(kind, &body).map_err(LinkError::from)? {
            Message::Frame { previous, frame } => Shipped {
                previous,
                units: Vec::new(),
                bytes: frame,
            },
            Message::Thin {
                previous,
                units,
                thin,
            } => Shipped {
                previous,
                units,
                bytes: thin,
            },
            other => return Err(unexpected(&other, Kind::Frame)),
        };
        intake
            .received_bytes
            .fetch_add(shipped.bytes.len() as u64, Ordering::Relaxed);
        if frames.send(shipped).await.is_err() {
            // The log thread has ended, and says why.
            return std::future::pending().await;
        }
    }
    Err(LinkError::closed("the stream ended early").into())
}

/// Hears what the sender says beside its frames, and answers its offers one after the other.
async fn listen(
    receive: &mut RecvStream,
    send: &tokio::sync::Mutex<SendStream>,
    history: &History,
    known: &Known,
) -> Result<(), Refusal> {
    while let Some((kind, body)) = link::read_message(receive).await? {
        match Message::decode(kind, &body).map_err(LinkError::from)? {
            Message::Standing(standing) => history.tell(standing),
            Message::Offer { hashes } => {
                let known = known.clone();
                let bits = on_own_thread("cdp-have", move || known.have(&hashes));
                let bits = bits.await.map_err(|error| Refusal::failed(&error))?;
                let have = Message::Have { bits }.encode();
                send.lock()
                    .await
                    .write_all(&have)
                    .await
                    .map_err(LinkError::from)?;
            }
            other => return Err(unexpected(&other, Kind::Standing)),
        }
    }
    // The sender need not say it.
    std::future::pending().await
}

fn unexpected(found: &Message, expected: Kind) -> Refusal {
    let found = found.kind();
    LinkError::from(WireError::Unexpected { found, expected }).into()
}

async fn write_acks(
    send: &tokio::sync::Mutex<SendStream>,
    acks: &mut watch::Receiver<Acked>,
) -> Result<(), Refusal> {
    while acks.changed().await.is_ok() {
        let Acked { durable, full } = *acks.borrow_and_update();
        let ack = Message::Ack { durable, full }.encode();
        send.lock().await.write_all(&ack).await.map_err(LinkError::from)?;
    }
    std::future::pending().await
}

struct Threads {
    log: JoinHandle<()>,
    index: JoinHandle<()>,
}

impl Threads {
    fn start(
        store: StoreWriter,
        frames: mpsc::Receiver<Shipped>,
        acked: watch::Sender<Acked>,
        (history, intake, known): (Arc<History>, Arc<Intake>, Known),
        failed: oneshot::Sender<Refusal>,
    ) -> std::io::Result<Self> {
        let (log, index) = store.split();
        let (to_index, indexed) = bounded(INDEX_QUEUE_FRAMES);
        let noted = known.clone();
        let index = std::thread::Builder::new()
            .name("cdp-index".into())
            .spawn(move || index_frames(index, &noted, &indexed))?;
        // The log thread blocks where a runtime would not: it has a queue of its own kind.
        let (sender, queue) = bounded(0);
        std::thread::Builder::new()
            .name("cdp-frames".into())
            .spawn(move || forward(frames, &sender))?;
        let stage = LogStage {
            log,
            to_index,
            acked,
            history,
            intake,
            are_noted: known.are_noted(),
            known,
            unsynced: Vec::new(),
            oldest: None,
        };
        let log = std::thread::Builder::new()
            .name("cdp-log".into())
            .spawn(move || {
                if let Err(refusal) = stage.run(&queue) {
                    let _ = failed.send(refusal);
                }
            })?;
        Ok(Self { log, index })
    }

    fn join(self) {
        for thread in [self.log, self.index] {
            if thread.join().is_err() {
                tracing::error!("a thread of an agent's store panicked");
            }
        }
    }
}

fn forward(mut frames: mpsc::Receiver<Shipped>, queue: &Sender<Shipped>) {
    while let Some(frame) = frames.blocking_recv() {
        if queue.send(frame).is_err() {
            return;
        }
    }
}

fn index_frames(mut index: IndexWriter, known: &Known, frames: &Receiver<Appended>) {
    for frame in frames {
        if let Err(error) = index.apply(&frame.head, &frame.location) {
            // The log goes on without it: it is caught up when the store is opened next.
            tracing::error!("index a frame: {error}");
            return;
        }
        known.add(&frame.location, &frame.units);
    }
    if let Err(error) = index.flush() {
        tracing::error!("flush the index: {error}");
    }
}

/// Checks frames, appends them and makes them durable in groups.
struct LogStage {
    log: LogWriter,
    to_index: Sender<Appended>,
    acked: watch::Sender<Acked>,
    history: Arc<History>,
    intake: Arc<Intake>,
    known: Known,
    /// Packed units are for `known`.
    are_noted: bool,
    unsynced: Vec<Appended>,
    oldest: Option<Instant>,
}

impl LogStage {
    fn run(mut self, queue: &Receiver<Shipped>) -> Result<(), Refusal> {
        loop {
            let next = if self.unsynced.is_empty() {
                queue.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.next_in_time(queue)
            };
            match next {
                Ok(shipped) => {
                    self.take(shipped)?;
                    let due = self
                        .oldest
                        .is_some_and(|oldest| oldest.elapsed() >= SYNC_INTERVAL);
                    if due || self.unsynced.len() >= UNSYNCED_FRAMES_MAX {
                        self.sync()?;
                    }
                }
                Err(TryRecvError::Empty) => self.sync()?,
                Err(TryRecvError::Disconnected) => return self.sync(),
            }
        }
    }

    /// The next frame if it comes at once: a moment is enough for one that is on its way through the queues.
    fn next_in_time(&self, queue: &Receiver<Shipped>) -> Result<Shipped, TryRecvError> {
        queue
            .recv_timeout(Duration::from_micros(200))
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => TryRecvError::Empty,
                RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
            })
    }

    fn take(&mut self, shipped: Shipped) -> Result<(), Refusal> {
        let protocol = |error: &dyn std::fmt::Display| Refusal::new(Close::Protocol, error.to_string());
        let Shipped {
            previous,
            units,
            bytes,
        } = shipped;
        let header = FrameHeader::decode(&bytes).map_err(|error| protocol(&error))?;
        if Some(header.last_seq()) <= self.log.appended() {
            return Ok(());
        }
        let bad = |error: &dyn std::fmt::Display| {
            let (first, last) = (header.first_seq, header.last_seq());
            format!("the frame of seq {first} to {last}: {error}")
        };
        let bytes = match units.is_empty() {
            true => bytes,
            false => self.refill(&bytes, &units).map_err(|error| {
                let close = match error {
                    RefillError::Missing(_) => Close::Lacking,
                    _ => Close::Protocol,
                };
                Refusal::new(close, bad(&error))
            })?,
        };
        let (frame, units) =
            SealedFrame::check_units(bytes, self.are_noted).map_err(|error| protocol(&bad(&error)))?;
        loop {
            match self.log.append_after(previous, &frame) {
                Ok(location) => {
                    self.unsynced.push(Appended {
                        head: frame.head().into(),
                        location,
                        units,
                    });
                    self.oldest.get_or_insert_with(Instant::now);
                    return Ok(());
                }
                Err(error) if error.is_full() => self.wait_for_room(&frame, &error)?,
                Err(error @ LogError::OutOfOrder { .. }) => return Err(protocol(&error)),
                Err(error) => return Err(failed(&error)),
            }
        }
    }

    /// A frame with what was left out of it.
    fn refill(&self, thin: &[u8], units: &[PackedUnit]) -> Result<Vec<u8>, RefillError> {
        let whole = refill(thin, units, |hash: &UnitHash| self.known.find(hash))?;
        let saved_bytes = (whole.len() - thin.len()) as u64;
        self.intake.saved_bytes.fetch_add(saved_bytes, Ordering::Relaxed);
        Ok(whole)
    }

    /// Waits until there is room, or nobody listens any more.
    fn wait_for_room(&mut self, frame: &SealedFrame, full: &LogError) -> Result<(), Refusal> {
        self.sync()?;
        tracing::error!("{full}");
        self.tell(true);
        while !self.log.has_room(frame.bytes().len() as u64) {
            if self.acked.is_closed() {
                return Err(Refusal::new(Close::Done, "gone"));
            }
            std::thread::sleep(ROOM_INTERVAL);
        }
        tracing::info!("there is room again");
        self.tell(false);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Refusal> {
        self.oldest = None;
        if self.unsynced.is_empty() {
            return Ok(());
        }
        self.log.sync().map_err(|error| failed(&error))?;
        self.tell(false);
        for frame in self.unsynced.drain(..) {
            // Gone only after a failure, which it has told.
            let _ = self.to_index.send(frame);
        }
        Ok(())
    }

    fn tell(&self, full: bool) {
        let durable = self.log.durable();
        self.history.set_durable(durable, self.log.log_bytes());
        self.intake.full.store(full, Ordering::Relaxed);
        self.acked.send_replace(Acked { durable, full });
    }
}

fn failed(error: &dyn std::fmt::Display) -> Refusal {
    tracing::error!("{error}");
    Refusal::failed(error)
}
