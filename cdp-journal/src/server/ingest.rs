//! Taking in what an agent ships, or the server that this one follows.
//!
//! ```text
//! connection ──▶ log thread: check, append, sync in groups ──▶ index thread
//!      ▲                              │
//!      └── acks, cumulative ◀─────────┘ durable
//! ```
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
use super::{HELLO_TIMEOUT, Refusal, Shared, not_allowed};
use crate::format::{FrameHeader, SealedFrame};
use crate::index::IndexWriter;
use crate::log::{FrameLocation, LogError, LogWriter};
use crate::net::link::{self, LinkError};
use crate::net::thread::on_own_thread;
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

/// A frame and the Seq before it in the agent's log.
type Shipped = (Option<Seq>, Vec<u8>);

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
    let ended = take_in(connection, (send, receive), store, held, &history).await;
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
/// them. For who holds the history's lock.
pub(super) async fn take_in(
    connection: &Connection,
    (mut send, mut receive): (SendStream, RecvStream),
    store: StoreWriter,
    held: Option<FrameId>,
    history: &Arc<History>,
) -> Result<(), Refusal> {
    let start = Acked {
        durable: held.map(|held| held.last),
        full: false,
    };
    let (acked, mut acks) = watch::channel(start);
    let (frames, to_log) = mpsc::channel::<Shipped>(QUEUE_FRAMES);
    let (failed, mut failure) = oneshot::channel();
    let intake = Arc::new(Intake::default());
    let stage = (Arc::clone(history), Arc::clone(&intake));
    let threads =
        Threads::start(store, to_log, acked, stage, failed).map_err(|error| Refusal::failed(&error))?;
    history.set_intake(Some(Arc::clone(&intake)));
    let welcome = Message::Welcome { held };
    let ended = async {
        send.write_all(&welcome.encode()).await.map_err(LinkError::from)?;
        let frames = async {
            // It begins with the first frame: who has nothing to say may be silent.
            let mut stream = connection.accept_uni().await?;
            read_frames(&mut stream, frames, &intake).await
        };
        tokio::select! {
            ended = frames => ended,
            ended = write_acks(&mut send, &mut acks) => ended,
            ended = read_standing(&mut receive, history) => ended,
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
    frames: mpsc::Sender<Shipped>,
    intake: &Intake,
) -> Result<(), Refusal> {
    loop {
        let Message::Frame { previous, frame } = link::expect(stream, Kind::Frame).await? else {
            return Err(Refusal::new(Close::Protocol, "no frame"));
        };
        intake
            .received_bytes
            .fetch_add(frame.len() as u64, Ordering::Relaxed);
        if frames.send((previous, frame)).await.is_err() {
            // The log thread has ended, and says why.
            return std::future::pending().await;
        }
    }
}

async fn read_standing(stream: &mut RecvStream, history: &History) -> Result<(), Refusal> {
    while let Some((kind, body)) = link::read_message(stream).await? {
        match Message::decode(kind, &body).map_err(LinkError::from)? {
            Message::Standing(standing) => history.tell(standing),
            other => {
                let (found, expected) = (other.kind(), Kind::Standing);
                return Err(LinkError::from(WireError::Unexpected { found, expected }).into());
            }
        }
    }
    // The sender need not say it.
    std::future::pending().await
}

async fn write_acks(send: &mut SendStream, acks: &mut watch::Receiver<Acked>) -> Result<(), Refusal> {
    while acks.changed().await.is_ok() {
        let Acked { durable, full } = *acks.borrow_and_update();
        let ack = Message::Ack { durable, full };
        send.write_all(&ack.encode()).await.map_err(LinkError::from)?;
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
        (history, intake): (Arc<History>, Arc<Intake>),
        failed: oneshot::Sender<Refusal>,
    ) -> std::io::Result<Self> {
        let (log, index) = store.split();
        let (to_index, indexed) = bounded(INDEX_QUEUE_FRAMES);
        let index = std::thread::Builder::new()
            .name("cdp-index".into())
            .spawn(move || index_frames(index, &indexed))?;
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

fn index_frames(mut index: IndexWriter, frames: &Receiver<(Box<[u8]>, FrameLocation)>) {
    for (head, location) in frames {
        if let Err(error) = index.apply(&head, &location) {
            // The log goes on without it: it is caught up when the store is opened next.
            tracing::error!("index a frame: {error}");
            return;
        }
    }
    if let Err(error) = index.flush() {
        tracing::error!("flush the index: {error}");
    }
}

/// Checks frames, appends them and makes them durable in groups.
struct LogStage {
    log: LogWriter,
    to_index: Sender<(Box<[u8]>, FrameLocation)>,
    acked: watch::Sender<Acked>,
    history: Arc<History>,
    intake: Arc<Intake>,
    unsynced: Vec<(Box<[u8]>, FrameLocation)>,
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
                Ok((previous, bytes)) => {
                    self.take(previous, bytes)?;
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

    fn take(&mut self, previous: Option<Seq>, bytes: Vec<u8>) -> Result<(), Refusal> {
        let protocol = |error: &dyn std::fmt::Display| Refusal::new(Close::Protocol, error.to_string());
        let header = FrameHeader::decode(&bytes).map_err(|error| protocol(&error))?;
        if Some(header.last_seq()) <= self.log.appended() {
            return Ok(());
        }
        let frame = SealedFrame::check(bytes).map_err(|error| {
            let (first, last) = (header.first_seq, header.last_seq());
            protocol(&format!("the frame of seq {first} to {last}: {error}"))
        })?;
        loop {
            match self.log.append_after(previous, &frame) {
                Ok(location) => {
                    self.unsynced.push((frame.head().into(), location));
                    self.oldest.get_or_insert_with(Instant::now);
                    return Ok(());
                }
                Err(error) if error.is_full() => self.wait_for_room(&frame, &error)?,
                Err(error @ LogError::OutOfOrder { .. }) => return Err(protocol(&error)),
                Err(error) => return Err(failed(&error)),
            }
        }
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
        for (head, location) in self.unsynced.drain(..) {
            // Gone only after a failure, which it has told.
            let _ = self.to_index.send((head, location));
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
