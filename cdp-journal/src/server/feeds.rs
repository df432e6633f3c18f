//! Sending histories to servers that follow this one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use quinn::{Connection, RecvStream, SendStream};
use uuid::Uuid;

use super::reads::{decode_ask, encode};
use super::{Refusal, Shared, not_allowed};
use crate::net::feed::{Ahead, DurableLog, Feed, FeedError};
use crate::net::link::{self, LinkError};
use crate::net::thread::on_own_thread;
use crate::remote::{Ask, Behind, Fault, Listed};
use crate::ship::TailError;
use crate::site::{AgentName, Site};
use crate::trust::Holder;
use crate::types::Seq;
use crate::wire::{Close, Kind, Message};

/// Serves a connection that may follow, until it ends.
pub(super) async fn serve(
    shared: &Arc<Shared>,
    connection: &Connection,
    holder: &Holder,
) -> Result<(), Refusal> {
    let is_feeding = Arc::new(AtomicBool::new(false));
    loop {
        // As many at once as the connection may have streams.
        let (send, receive) = connection.accept_bi().await?;
        let (shared, connection) = (Arc::clone(shared), connection.clone());
        let (holder, is_feeding) = (holder.clone(), Arc::clone(&is_feeding));
        tokio::spawn(async move {
            let answered = answer(&shared, &connection, &holder, (send, receive), &is_feeding);
            if let Err(refusal) = answered.await {
                link::close(&connection, refusal.close, &refusal.why);
            }
        });
    }
}

async fn answer(
    shared: &Arc<Shared>,
    connection: &Connection,
    holder: &Holder,
    (mut send, mut receive): (SendStream, RecvStream),
    is_feeding: &AtomicBool,
) -> Result<(), Refusal> {
    let Some((kind, body)) = link::read_message(&mut receive).await? else {
        return Ok(());
    };
    match kind {
        Kind::Ask if decode_ask(&body)? == Ask::Histories => {
            let shared = Arc::clone(shared);
            let listed = on_own_thread("cdp-list", move || list(&shared));
            let listed = listed.await.map_err(|error| Refusal::failed(&error))?;
            link::write_body(&mut send, Kind::Answer, &encode(&listed)).await?;
            let _ = send.finish();
            Ok(())
        }
        Kind::Follow => match Message::decode(kind, &body).map_err(LinkError::from)? {
            Message::Follow { log, agent } if !is_feeding.swap(true, Ordering::Relaxed) => {
                feed(shared, connection, holder, (&agent, log), (send, receive)).await
            }
            _ => {
                let why = "one connection follows one history";
                Err(Refusal::new(Close::Protocol, why))
            }
        },
        found => Err(not_allowed(holder, found, &body)),
    }
}

/// Every history here, and what a follower needs to know to begin.
fn list(shared: &Shared) -> Result<Vec<Listed>, Fault> {
    let logs = &shared.logs;
    let found = logs.site.logs().map_err(|error| Fault::other(&error))?;
    let listed = found.into_iter().map(|log| {
        let history = logs.history(&log.agent, log.log)?;
        let upstream = Site::upstream_of(&log.dir)?;
        // Of a history that another one has followed, nothing more comes.
        let standing = (log.age == 0).then(|| shared.standing(&history, upstream.is_some()).0);
        let behind = standing.flatten().map(|standing| Behind {
            source_seq: Seq::number_of(standing.durable),
            lag_ns: standing.lag_ns,
            backlog_bytes: standing.backlog_bytes,
        });
        Ok(Listed {
            behind,
            agent: log.agent,
            log: log.log,
            created: log.created,
            durable: history.durable().map(Seq::number_of),
            live: history.intake().is_some(),
            via: upstream.map_or_else(Vec::new, |upstream| upstream.via),
        })
    });
    let listed: Result<_, crate::OpenError> = listed.collect();
    listed.map_err(|error| Fault::other(&error))
}

/// Sends one history for as long as the connection lasts.
async fn feed(
    shared: &Arc<Shared>,
    connection: &Connection,
    holder: &Holder,
    (agent, log): (&AgentName, Uuid),
    (send, receive): (SendStream, RecvStream),
) -> Result<(), Refusal> {
    let history = shared.logs.history(agent, log);
    let history = history.map_err(|error| Refusal::failed(&error))?;
    if !history.dir.join(crate::store::STORE_FILE).exists() {
        let why = format!("there is no history {log} of agent {agent} here");
        return Err(Refusal::new(Close::Failed, why));
    }
    history.make_known(&shared.logs.options).await?;
    let source = Arc::clone(&history) as Arc<dyn DurableLog>;
    let to = format!("{holder}, {agent}");
    let rest = Arc::clone(&history.offers_rest);
    let feed = Feed::new(to, &history.dir, source, Arc::default(), Ahead::Awaited, rest);
    tokio::select! {
        ended = feed.run(connection, send, receive) => ended.map_err(|error| refusal(&history.agent, error)),
        // While it waits for the rest of its own history it does not listen.
        closed = connection.closed() => {
            let closed = LinkError::from(closed);
            history.offers_rest.ended(&closed);
            Err(closed.into())
        }
    }
}

fn refusal(agent: &AgentName, error: FeedError) -> Refusal {
    match error {
        FeedError::Link(error) => error.into(),
        FeedError::Tail(TailError::Diverged { held, found }) => Refusal::new(
            Close::Diverged,
            format!(
                "two histories of agent {agent}: the follower holds seq {} to {}, and the server that it follows {found}; \
                 both are kept as they are; to follow this one, move the follower's copy away",
                held.first, held.last
            ),
        ),
        error => Refusal::failed(&error),
    }
}
