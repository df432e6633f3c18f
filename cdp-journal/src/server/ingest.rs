//! Taking in what an agent ships, or the server that this one follows.
//!
//! Frames go to the [`stages`](super::stages) of a store, acks come back from them. Offers are answered beside all that.
//!
//! When a stage is busy or has no room, the connection is not read, and QUIC holds the sender back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::logs::{History, Intake};
use super::stages::{Acked, Ends, Stages};
use super::units::Known;
use super::{HELLO_TIMEOUT, Refusal, Shared, not_allowed};
use crate::format::UnitHash;
use crate::net::link::{self, LinkError};
use crate::net::thread::on_own_thread;
use crate::net::{PacedReader, Throttle};
use crate::site::AgentName;
use crate::store::StoreWriter;
use crate::trust::Holder;
use crate::types::Seq;
use crate::wire::{Close, FrameId, Kind, Message, Shipment, WireError};

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

/// Takes in what comes over `connection`, whichever end made it, until it ends: runs the stages of a store, and feeds
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
    let intake = Arc::new(Intake::default());
    let known = shared.units.of(history);
    let stages = Stages::start(store, history, &intake, &known).map_err(|error| Refusal::failed(&error))?;
    let (stages, ends) = stages;
    let Ends {
        frames,
        mut acks,
        mut failure,
    } = ends;
    history.set_intake(Some(Arc::clone(&intake)));
    let welcome = Message::Welcome { held };
    // Dropped with this function: a stream that ends before its connection says nothing of why.
    let send = tokio::sync::Mutex::new(send);
    let mut is_told = false;
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
            refusal = failure.recv() => {
                is_told = true;
                Err(refusal.unwrap_or_else(|| Refusal::failed(&"a thread ended")))
            }
        }
    }
    .await;
    history.set_intake(None);
    // The queue of frames is closed by now.
    drop(acks);
    on_own_thread("cdp-join", move || stages.join())
        .await
        .map_err(|error| Refusal::failed(&error))?;
    if is_told {
        return ended;
    }
    // What the stages found says more than that the stream has ended.
    failure.try_recv().map_or(ended, Err)
}

async fn read_frames(
    stream: &mut RecvStream,
    mut paced: Option<&mut PacedReader<'_>>,
    frames: mpsc::Sender<Shipment>,
    intake: &Intake,
) -> Result<(), Refusal> {
    loop {
        let message = match &mut paced {
            Some(paced) => paced.read_message(stream).await?,
            None => link::read_message(stream).await?,
        };
        let Some((kind, body)) = message else { break };
        let shipped = Shipment::decode(kind, body).map_err(LinkError::from)?;
        intake
            .received_bytes
            .fetch_add(shipped.frame().len() as u64, Ordering::Relaxed);
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
    let mut answerer = Answerer::new(known);
    while let Some((kind, body)) = link::read_message(receive).await? {
        match Message::decode(kind, &body).map_err(LinkError::from)? {
            Message::Standing(standing) => history.tell(standing),
            Message::Offer { hashes } => {
                let bits = answerer.have(hashes).await?;
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

/// Looks up what is offered on a thread of its own, which begins with the first offer.
struct Answerer<'k> {
    known: &'k Known,
    thread: Option<(mpsc::Sender<Vec<UnitHash>>, mpsc::Receiver<u32>)>,
}

impl<'k> Answerer<'k> {
    fn new(known: &'k Known) -> Self {
        Self { known, thread: None }
    }

    /// A bit for each of the hashes: is it here?
    async fn have(&mut self, hashes: Vec<UnitHash>) -> Result<u32, Refusal> {
        let (ask, answers) = match &mut self.thread {
            Some(thread) => thread,
            None => self
                .thread
                .insert(self.start().map_err(|error| Refusal::failed(&error))?),
        };
        let asked = ask.send(hashes).await.is_ok();
        let answer = if asked { answers.recv().await } else { None };
        answer.ok_or_else(|| Refusal::failed(&"the thread that looks up offers ended"))
    }

    fn start(&self) -> std::io::Result<(mpsc::Sender<Vec<UnitHash>>, mpsc::Receiver<u32>)> {
        let (ask, mut asked) = mpsc::channel::<Vec<UnitHash>>(1);
        let (answer, answers) = mpsc::channel(1);
        let known = self.known.clone();
        std::thread::Builder::new()
            .name("cdp-have".into())
            .spawn(move || {
                while let Some(hashes) = asked.blocking_recv() {
                    if answer.blocking_send(known.have(&hashes)).is_err() {
                        return;
                    }
                }
            })?;
        Ok((ask, answers))
    }
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
