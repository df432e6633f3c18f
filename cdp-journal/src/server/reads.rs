//! Answering who may read.

use std::collections::HashMap;
use std::fs::File;
use std::ops::RangeInclusive;
use std::sync::Arc;

use parking_lot::Mutex;
use quinn::{Connection, RecvStream, SendStream};
use serde::Serialize;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{Refusal, Shared, not_allowed};
use crate::format::stored_group_bytes;
use crate::index::CHUNK_BLOCKS;
use crate::net::link;
use crate::remote::{
    About, Ask, Fault, GROUPS_MAX, GroupAt, HEADS_MAX, Told, encode_item, encode_placed, encode_version,
};
use crate::store::{Archive, LOG_DIR, StoreReader};
use crate::trust::Holder;
use crate::types::{SegmentId, Seq};
use crate::view::{GROUP_STORED_BYTES_MAX, read_full};
use crate::wire::{ANSWER_BYTES_MAX, Close, ITEM_BYTES, ITEMS_MAX, Kind, READ_BYTES_MAX};

/// Messages of one answer that wait for the connection.
const QUEUE_MESSAGES: usize = 4;

type Message = (Kind, Vec<u8>);

/// What a connection has open.
struct Reader {
    shared: Arc<Shared>,
    holder: Holder,
    stores: Mutex<HashMap<Uuid, Arc<StoreReader>>>,
}

/// Serves a connection that may read, until it ends.
pub(super) async fn serve(
    shared: &Arc<Shared>,
    connection: &Connection,
    holder: &Holder,
) -> Result<(), Refusal> {
    let reader = Arc::new(Reader {
        shared: Arc::clone(shared),
        holder: holder.clone(),
        stores: Mutex::default(),
    });
    loop {
        // As many at once as the connection may have streams.
        let (send, receive) = connection.accept_bi().await?;
        let (reader, connection) = (Arc::clone(&reader), connection.clone());
        tokio::spawn(async move {
            if let Err(refusal) = answer(&reader, send, receive).await {
                link::close(&connection, refusal.close, &refusal.why);
            }
        });
    }
}

async fn answer(reader: &Arc<Reader>, mut send: SendStream, mut receive: RecvStream) -> Result<(), Refusal> {
    let ask = match link::read_message(&mut receive).await? {
        Some((kind, body)) => match kind {
            Kind::Ask => decode_ask(&body)?,
            found => return Err(not_allowed(&reader.holder, found, &body)),
        },
        None => return Ok(()),
    };
    if ask == Ask::Histories {
        return Err(not_allowed(&reader.holder, Kind::Follow, &[]));
    }
    let (messages, mut queue) = mpsc::channel::<Message>(QUEUE_MESSAGES);
    let reader = Arc::clone(reader);
    let work = tokio::task::spawn_blocking(move || {
        let answered = reader.answer(&ask, &Out(messages.clone()));
        let body = answered.unwrap_or_else(|fault| encode::<()>(&Err(fault)));
        let _ = messages.blocking_send((Kind::Answer, body));
    });
    while let Some((kind, body)) = queue.recv().await {
        link::write_body(&mut send, kind, &body).await?;
    }
    let _ = send.finish();
    work.await.map_err(|error| Refusal::failed(&error))
}

pub(super) fn decode_ask(body: &[u8]) -> Result<Ask, Refusal> {
    serde_json::from_slice(body).map_err(|error| {
        let why = format!("a question that makes no sense: {error}");
        Refusal::new(Close::Protocol, why)
    })
}

pub(super) fn encode<T: Serialize>(answer: &Result<T, Fault>) -> Vec<u8> {
    let body = serde_json::to_vec(answer).unwrap_or_default();
    if body.is_empty() || body.len() > ANSWER_BYTES_MAX {
        let why = format!("the answer has {} bytes, too many for one", body.len());
        return serde_json::to_vec(&Err::<(), _>(Fault::Other { why })).unwrap_or_default();
    }
    body
}

fn ok<T: Serialize>(answer: T) -> Result<Vec<u8>, Fault> {
    Ok(encode(&Ok(answer)))
}

/// What comes before an answer.
struct Out(mpsc::Sender<Message>);

impl Out {
    fn put(&self, kind: Kind, body: Vec<u8>) -> Result<(), Fault> {
        let gone = |_| Fault::Other {
            why: "nobody listens any more".to_owned(),
        };
        self.0.blocking_send((kind, body)).map_err(gone)
    }
}

impl Reader {
    /// A store of this agent, as far as it reaches now.
    fn store(&self, log: Uuid) -> Result<Arc<StoreReader>, Fault> {
        if let Some(store) = self.stores.lock().get(&log) {
            return Ok(Arc::clone(store));
        }
        // The agent's name comes from the certificate: no question reaches what belongs to another.
        let dir = self.shared.logs.site.log_dir(&self.holder.agent, log);
        let store = Arc::new(StoreReader::open(&dir).map_err(|error| Fault::other(&error))?);
        self.stores.lock().insert(log, Arc::clone(&store));
        Ok(store)
    }

    fn answer(&self, ask: &Ask, out: &Out) -> Result<Vec<u8>, Fault> {
        match ask {
            Ask::Stores => {
                let logs = self.shared.logs.site.logs_of(&self.holder.agent);
                let logs = logs.map_err(|error| Fault::other(&error))?;
                let told = logs.iter().map(|log| Told {
                    label: log.label(),
                    age: log.age,
                    log: log.log,
                });
                ok(told.collect::<Vec<_>>())
            }
            Ask::Histories => Err(Fault::Other {
                why: "that is for servers that follow".to_owned(),
            }),
            Ask::About { log } => {
                let store = self.store(*log)?;
                store.refresh()?;
                ok(About {
                    live: store.writer_alive().map_err(|error| Fault::other(&error))?,
                    log_bytes: store.log_bytes()?,
                    head: store.head(),
                })
            }
            Ask::Volumes { log } => ok(self.store(*log)?.volumes()?),
            Ask::History { log, volume } => ok(self.store(*log)?.history(*volume)?),
            Ask::Resolve { log, volume, when } => {
                let when = when.parse().map_err(|error| Fault::other(&error))?;
                ok(self.store(*log)?.resolve(*volume, &when)?)
            }
            Ask::Locate { log, when } => {
                let when = when.parse().map_err(|error| Fault::other(&error))?;
                ok(self.store(*log)?.locate(&when)?)
            }
            Ask::View { log, volume, seq } => ok(self.store(*log)?.view(*volume, *seq)?.bytes()),
            Ask::Plan {
                log,
                volume,
                seq,
                from,
                to,
            } => {
                let view = self.store(*log)?.view(*volume, *seq)?;
                let (mut body, mut gone) = (Vec::new(), None);
                view.items(*from..*to, &mut |item| {
                    if gone.is_some() {
                        return;
                    }
                    encode_item(&item, &mut body);
                    if body.len() >= ITEMS_MAX * ITEM_BYTES {
                        gone = out.put(Kind::Items, std::mem::take(&mut body)).err();
                    }
                })?;
                match gone {
                    Some(fault) => return Err(fault),
                    None => out.put(Kind::Items, body)?,
                }
                ok(())
            }
            Ask::Versions {
                log,
                volume,
                seq,
                from,
                to,
            } => {
                if from >= to || from / CHUNK_BLOCKS != (to - 1) / CHUNK_BLOCKS {
                    let why = format!("blocks {from} to {to} do not lie in one run");
                    return Err(Fault::Other { why });
                }
                let mut body = Vec::new();
                for version in self.store(*log)?.versions(*volume, *seq, *from..*to)? {
                    encode_version(&version, &mut body);
                }
                for piece in body.chunks(READ_BYTES_MAX) {
                    out.put(Kind::Bytes, piece.to_vec())?;
                }
                ok(())
            }
            Ask::Read {
                log,
                segment,
                offset,
                bytes,
            } => {
                out.put(Kind::Bytes, self.read(*log, *segment, *offset, *bytes)?)?;
                ok(())
            }
            Ask::Groups { log, groups } => self.groups(*log, groups, out),
            Ask::Heads { log, seqs } => self.heads(*log, seqs, out),
            Ask::Verify { log } => {
                let store = self.store(*log)?;
                let report = store.verify_log(&mut |bytes| {
                    // Who does not listen any more does not get the report either.
                    let _ = out.put(Kind::Progress, bytes.to_le_bytes().to_vec());
                })?;
                ok(report)
            }
        }
    }

    fn read(&self, log: Uuid, segment: u64, offset: u64, bytes: u64) -> Result<Vec<u8>, Fault> {
        let bad = |why: String| Fault::Other { why };
        let len = usize::try_from(bytes).ok().filter(|len| *len <= READ_BYTES_MAX);
        let len = len.ok_or_else(|| bad(format!("{bytes} bytes at once are too many")))?;
        let segment = Seq::new(segment).ok_or_else(|| bad("segment 0".to_owned()))?;
        let dir = self
            .shared
            .logs
            .site
            .log_dir(&self.holder.agent, log)
            .join(LOG_DIR);
        let path = dir.join(SegmentId(segment).file_name());
        let read = || {
            let mut bytes = vec![0; len];
            let filled = read_full(&File::open(&path)?, offset, &mut bytes)?;
            bytes.truncate(filled);
            std::io::Result::Ok(bytes)
        };
        read().map_err(|error| bad(format!("read {}: {error}", path.display())))
    }

    /// Groups as they lie in the log, each without what lies behind it: which is for the reader to check.
    fn groups(&self, log: Uuid, groups: &[GroupAt], out: &Out) -> Result<Vec<u8>, Fault> {
        if groups.len() > GROUPS_MAX {
            let why = format!("{} groups at once are too many", groups.len());
            return Err(Fault::Other { why });
        }
        for group in groups {
            let place = match *group {
                GroupAt::Place { segment, offset } => Some((segment, offset)),
                GroupAt::Frame { first, offset } => {
                    let place = self.store(log)?.place_in_frame(first, offset)?;
                    place.map(|place| (place.segment, place.offset))
                }
            };
            let body = match place {
                None => Vec::new(),
                Some((segment, offset)) => {
                    let mut stored = self.read(log, segment, offset, GROUP_STORED_BYTES_MAX as u64)?;
                    stored.truncate(stored_group_bytes(&stored));
                    encode_placed(segment, offset, &stored)
                }
            };
            out.put(Kind::Bytes, body)?;
        }
        ok(())
    }

    fn heads(&self, log: Uuid, seqs: &RangeInclusive<Seq>, out: &Out) -> Result<Vec<u8>, Fault> {
        let store = self.store(log)?;
        let mut next = None;
        for (index, frame) in Archive::records(&*store, seqs.clone()).enumerate() {
            let header = frame?.header;
            if index == HEADS_MAX {
                next = Some(header.first_seq);
                break;
            }
            let (entry, head) = store.frame_head(header.first_seq)?;
            out.put(Kind::Head, encode_placed(entry.segment, entry.offset, &head))?;
        }
        ok(next)
    }
}
