//! The threads between a connection that brings frames and the store they go to.
//!
//! ```text
//! connection ──▶ check: make whole, check every byte ──▶ log: append ──▶ sync: in groups ──▶ index
//!      ▲                                                                     │
//!      └── acks, cumulative ◀────────────────────────────────────────────────┘ durable
//! ```
//!
//! Each arrow is a queue with a bound. While a group is made durable, what comes is appended for the next.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select};
use tokio::sync::{mpsc, watch};

use super::Refusal;
use super::logs::{History, Intake};
use super::units::Known;
use crate::format::{ENVELOPE_BYTES, FrameHeader, PackedUnit, RefillError, SealedFrame, UnitHash, refill};
use crate::index::IndexWriter;
use crate::log::{FrameLocation, LogError, LogWriter, SyncJob};
use crate::store::StoreWriter;
use crate::types::Seq;
use crate::wire::{Close, Shipment};

/// Frames between the connection and their check.
const QUEUE_FRAMES: usize = 4;
/// Frames that are checked and not appended.
const CHECKED_FRAMES: usize = 2;
/// Frames, heads only, that the index may be behind.
const INDEX_QUEUE_FRAMES: usize = 1024;
/// Frames that are appended and in no group yet, at most.
const UNSYNCED_FRAMES_MAX: usize = INDEX_QUEUE_FRAMES / 2;
/// While frames keep coming, a group gathers for so long.
const SYNC_INTERVAL: Duration = Duration::from_millis(10);
/// A frame that is on its way through the queues comes within this time.
const QUIET_INTERVAL: Duration = Duration::from_micros(200);
/// How often a full store is asked for room.
const ROOM_INTERVAL: Duration = Duration::from_millis(500);

/// What is told to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Acked {
    pub(super) durable: Option<Seq>,
    pub(super) full: bool,
}

/// A frame of which every byte was checked.
struct Checked {
    previous: Option<Seq>,
    frame: SealedFrame,
    /// Packed units, and where in the frame they begin.
    units: Vec<(PackedUnit, usize)>,
}

/// A frame that was appended, for the index.
struct Appended {
    head: Box<[u8]>,
    location: FrameLocation,
    units: Vec<(PackedUnit, usize)>,
}

/// Frames that become durable at once.
struct Group {
    job: SyncJob,
    frames: Vec<Appended>,
    /// Of the log, with them.
    log_bytes: u64,
}

/// The four threads of a store that is written to.
pub(super) struct Stages {
    threads: Vec<JoinHandle<()>>,
    /// Takes the reason of the one that ends first.
    tell_failed: mpsc::Sender<Refusal>,
}

/// What all stages know.
#[derive(Clone)]
struct Desk {
    history: Arc<History>,
    intake: Arc<Intake>,
    known: Known,
    acked: Arc<watch::Sender<Acked>>,
}

/// What the connection has of its stages: where frames go in, what is to be told, and why a stage has ended.
pub(super) struct Ends {
    pub(super) frames: mpsc::Sender<Shipment>,
    pub(super) acks: watch::Receiver<Acked>,
    pub(super) failure: mpsc::Receiver<Refusal>,
}

impl Stages {
    /// Of `store`, which holds what is durable in `history`.
    pub(super) fn start(
        store: StoreWriter,
        history: &Arc<History>,
        intake: &Arc<Intake>,
        known: &Known,
    ) -> std::io::Result<(Self, Ends)> {
        let (log, index) = store.split();
        let durable = log.durable();
        let (acked, acks) = watch::channel(Acked { durable, full: false });
        let desk = Desk {
            history: Arc::clone(history),
            intake: Arc::clone(intake),
            known: known.clone(),
            acked: Arc::new(acked),
        };
        let (frames, to_check) = mpsc::channel(QUEUE_FRAMES);
        let (to_log, checked) = bounded(CHECKED_FRAMES);
        let (to_sync, groups) = bounded(1);
        let (tell_synced, synced) = bounded(1);
        let (to_index, indexed) = bounded(INDEX_QUEUE_FRAMES);
        let (tell_failed, failure) = mpsc::channel(1);
        let mut stages = Self {
            threads: Vec::new(),
            tell_failed,
        };
        let noted = known.clone();
        stages.spawn("cdp-index", move || {
            index_frames(index, &noted, &indexed);
            Ok(())
        })?;
        let its = desk.clone();
        stages.spawn("cdp-sync", move || {
            sync_groups(&its, &groups, &tell_synced, &to_index)
        })?;
        let stage = LogStage {
            desk: desk.clone(),
            log,
            to_sync,
            synced,
            unsynced: Vec::new(),
            oldest: None,
        };
        stages.spawn("cdp-log", move || stage.run(&checked))?;
        stages.spawn("cdp-check", move || {
            check_frames(&desk, durable, to_check, &to_log)
        })?;
        let ends = Ends {
            frames,
            acks,
            failure,
        };
        Ok((stages, ends))
    }

    fn spawn(
        &mut self,
        name: &str,
        run: impl FnOnce() -> Result<(), Refusal> + Send + 'static,
    ) -> std::io::Result<()> {
        let tell_failed = self.tell_failed.clone();
        let contained = move || {
            // Nobody goes on with what a panic leaves behind: all of them end.
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
            let ended = ended.unwrap_or_else(|_| Err(failed(&"a thread of the store panicked")));
            if let Err(refusal) = ended {
                // The first one tells why; the others end because of it.
                let _ = tell_failed.try_send(refusal);
            }
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(contained)?;
        self.threads.push(thread);
        Ok(())
    }

    /// Waits until all have ended: once no frames come any more they finish what is in the queues, unless there is no room
    /// for it and nobody is told of acks any more.
    pub(super) fn join(self) {
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of an agent's store panicked");
            }
        }
    }
}

/// Makes thin frames whole, and checks all of each frame.
fn check_frames(
    desk: &Desk,
    mut last: Option<Seq>,
    mut frames: mpsc::Receiver<Shipment>,
    to_log: &Sender<Checked>,
) -> Result<(), Refusal> {
    let are_noted = desk.known.are_noted();
    while let Some(shipped) = frames.blocking_recv() {
        let header = FrameHeader::decode(shipped.frame()).map_err(|error| protocol(&error))?;
        // It is here already.
        if Some(header.last_seq()) <= last {
            continue;
        }
        let bad = |error: &dyn std::fmt::Display| {
            let (first, last) = (header.first_seq, header.last_seq());
            format!("the frame of seq {first} to {last}: {error}")
        };
        let refilled = match shipped.units.is_empty() {
            true => None,
            false => Some(desk.refill(&shipped).map_err(|error| {
                let close = match error {
                    RefillError::Missing(_) => Close::Lacking,
                    _ => Close::Protocol,
                };
                Refusal::new(close, bad(&error))
            })?),
        };
        let previous = shipped.previous;
        let checked = match refilled {
            None => SealedFrame::check_units(shipped.body, shipped.at, are_noted),
            Some(whole) => SealedFrame::check_units(whole, 0, are_noted),
        };
        let (frame, units) = checked.map_err(|error| protocol(&bad(&error)))?;
        last = Some(frame.last_seq());
        let checked = Checked {
            previous,
            frame,
            units,
        };
        if to_log.send(checked).is_err() {
            // The log has ended, and says why.
            break;
        }
    }
    Ok(())
}

impl Desk {
    /// A frame with what was left out of it.
    fn refill(&self, shipped: &Shipment) -> Result<Vec<u8>, RefillError> {
        let thin = shipped.frame();
        let whole = refill(thin, &shipped.units, |hash: &UnitHash| self.known.find(hash))?;
        let saved_bytes = (whole.len() - thin.len()) as u64;
        self.intake.saved_bytes.fetch_add(saved_bytes, Ordering::Relaxed);
        Ok(whole)
    }

    fn tell_full(&self, full: bool) {
        self.intake.full.store(full, Ordering::Relaxed);
        self.acked.send_if_modified(|acked| {
            let is_new = acked.full != full;
            acked.full = full;
            is_new
        });
    }

    fn tell_durable(&self, durable: Option<Seq>, log_bytes: u64) {
        self.history.set_durable(durable, log_bytes);
        self.acked.send_modify(|acked| acked.durable = durable);
    }
}

/// Appends frames, and has them made durable in groups.
struct LogStage {
    desk: Desk,
    log: LogWriter,
    to_sync: Sender<Group>,
    /// Something comes when a group is durable.
    synced: Receiver<()>,
    unsynced: Vec<Appended>,
    oldest: Option<Instant>,
}

impl LogStage {
    fn run(mut self, queue: &Receiver<Checked>) -> Result<(), Refusal> {
        loop {
            let is_synced = self.log.is_synced().map_err(|error| failed(&error))?;
            let waits = !self.unsynced.is_empty();
            if waits && (is_synced && self.is_due() || self.unsynced.len() >= UNSYNCED_FRAMES_MAX) {
                self.commit()?;
                continue;
            }
            let quiet = match waits && is_synced {
                true => QUIET_INTERVAL,
                false => ROOM_INTERVAL,
            };
            select! {
                recv(queue) -> checked => match checked {
                    Ok(checked) => if !self.append(checked)? {
                        break;
                    },
                    Err(_) => break,
                },
                recv(self.synced) -> told => if told.is_err() {
                    return Err(self.sync_ended());
                },
                default(quiet) => if is_synced {
                    self.commit()?;
                },
            }
        }
        self.commit()
    }

    /// Has the group gathered for long enough?
    fn is_due(&self) -> bool {
        self.oldest
            .is_some_and(|oldest| oldest.elapsed() >= SYNC_INTERVAL)
    }

    /// False if there is no room for it, and nobody listens any more.
    fn append(&mut self, checked: Checked) -> Result<bool, Refusal> {
        let Checked {
            previous,
            frame,
            units,
        } = checked;
        let mut is_full = false;
        let location = loop {
            match self.log.append_after(previous, &frame) {
                Ok(location) => break location,
                Err(error) if error.is_full() => {
                    if !is_full {
                        self.commit()?;
                        tracing::error!("{error}");
                        self.desk.tell_full(true);
                        is_full = true;
                    }
                    if !self.wait_for_room(&frame)? {
                        return Ok(false);
                    }
                }
                Err(error @ LogError::OutOfOrder { .. }) => return Err(protocol(&error)),
                Err(error) => return Err(failed(&error)),
            }
        };
        if is_full {
            tracing::info!("there is room again");
            self.desk.tell_full(false);
        }
        self.unsynced.push(Appended {
            head: frame.head().into(),
            location,
            units,
        });
        self.oldest.get_or_insert_with(Instant::now);
        Ok(true)
    }

    /// Waits until there seems to be room: some file systems say so and have none. False if nobody listens any more.
    fn wait_for_room(&mut self, frame: &SealedFrame) -> Result<bool, Refusal> {
        loop {
            // Nobody tells of room; what fails meanwhile is heard of at once.
            if self.synced.recv_timeout(ROOM_INTERVAL) == Err(RecvTimeoutError::Disconnected) {
                return Err(self.sync_ended());
            }
            if self.desk.acked.is_closed() {
                return Ok(false);
            }
            // What failed meanwhile is no lack of room.
            self.log.is_synced().map_err(|error| failed(&error))?;
            if self.log.has_room((ENVELOPE_BYTES + frame.bytes().len()) as u64) {
                return Ok(true);
            }
        }
    }

    /// The sync stage has ended: with the error of its last sync, unless it panicked.
    fn sync_ended(&mut self) -> Refusal {
        match self.log.is_synced() {
            Err(error) => failed(&error),
            Ok(_) => Refusal::failed(&"making the log durable has ended"),
        }
    }

    /// Has everything made durable that was appended so far. Waits for the group before, if it is not yet.
    fn commit(&mut self) -> Result<(), Refusal> {
        self.oldest = None;
        if self.unsynced.is_empty() {
            return Ok(());
        }
        let Some(job) = self.log.begin_sync().map_err(|error| failed(&error))? else {
            return Ok(());
        };
        let group = Group {
            job,
            frames: std::mem::take(&mut self.unsynced),
            log_bytes: self.log.log_bytes(),
        };
        let sent = self.to_sync.send(group);
        sent.map_err(|_| self.sync_ended())
    }
}

/// Makes groups of frames durable, tells that they are, and hands them to the index.
fn sync_groups(
    desk: &Desk,
    groups: &Receiver<Group>,
    tell_synced: &Sender<()>,
    to_index: &Sender<Appended>,
) -> Result<(), Refusal> {
    for Group {
        job,
        frames,
        log_bytes,
    } in groups
    {
        let durable = job.run().map_err(|error| failed(&error))?;
        desk.tell_durable(durable, log_bytes);
        // One word that is not heard yet is enough.
        let _ = tell_synced.try_send(());
        for frame in frames {
            // Gone only after a failure, which it has told.
            let _ = to_index.send(frame);
        }
    }
    Ok(())
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

fn protocol(error: &dyn std::fmt::Display) -> Refusal {
    Refusal::new(Close::Protocol, error.to_string())
}

fn failed(error: &dyn std::fmt::Display) -> Refusal {
    tracing::error!("{error}");
    Refusal::failed(error)
}
