//! The log thread, and the one that syncs for it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cdp_journal::format::SealedFrame;
use cdp_journal::log::{FrameLocation, LogError, LogWriter};
use crossbeam_channel::{Receiver, Sender, select};

use super::{Encoded, Group, INDEX_QUEUE_FRAMES, IndexRequest, Shared, StoreChange};
use crate::recorder::Epoch;

/// How often a full store is asked for room.
const ROOM_INTERVAL: Duration = Duration::from_secs(1);
/// How often one without any room at all is.
const NO_ROOM_INTERVAL: Duration = Duration::from_millis(100);
/// A disk that refuses so many writes in a row while its file system says that there is room fails.
const REFUSALS_MAX: u32 = 3;
/// Room that a full store must have before the log goes on: a resync that fills it at once helps nobody.
const ROOM_BYTES_MIN: u64 = 64 << 20;

/// Appends frames, and has them made durable in groups.
pub(super) struct LogStage<'a> {
    pub(super) shared: &'a Shared,
    pub(super) log: LogWriter,
    pub(super) to_sync: &'a Sender<Group>,
    /// Something comes when a sync has ended.
    pub(super) synced: &'a Receiver<()>,
    pub(super) unsynced: Vec<(Box<[u8]>, FrameLocation)>,
    /// When the last sync began.
    pub(super) begun: Option<Instant>,
    pub(super) epoch: Epoch,
    pub(super) full_since: Option<Instant>,
    /// It has appended something: what there is of a store was in order when this agent began.
    pub(super) has_appended: bool,
}

impl LogStage<'_> {
    pub(super) fn run(mut self, queue: &Receiver<Encoded>) -> anyhow::Result<()> {
        self.tell_room();
        loop {
            let is_synced = self.is_synced()?;
            let is_due = self.due_in().is_some_and(|wait| wait.is_zero());
            if is_synced && is_due || self.unsynced.len() >= INDEX_QUEUE_FRAMES / 2 {
                self.commit()?;
            }
            let wait = self.due_in().filter(|_| is_synced).unwrap_or(ROOM_INTERVAL);
            select! {
                recv(queue) -> encoded => match encoded {
                    Ok(encoded) if encoded.epoch >= self.epoch => self.append(encoded)?,
                    Ok(_) => {}
                    Err(_) => return self.commit(),
                },
                recv(self.synced) -> told => if told.is_err() {
                    // It ended with the error of its last sync, if that failed.
                    self.is_synced()?;
                    anyhow::bail!("the sync stage has ended");
                },
                default(wait) => {}
            }
            self.look_for_room();
        }
    }

    /// Has the sync before ended? If not, and it keeps another waiting, its end is told.
    fn is_synced(&mut self) -> anyhow::Result<bool> {
        let mut is_synced = self.log.is_synced();
        if matches!(is_synced, Ok(false)) && !self.unsynced.is_empty() {
            self.shared.awaits_sync.store(true, Ordering::SeqCst);
            is_synced = self.log.is_synced();
        }
        is_synced.context("make the log durable")
    }

    /// When the next sync is to begin, if one is to: at once, unless the one before has just begun.
    fn due_in(&self) -> Option<Duration> {
        let interval = self.shared.commit_interval() / 2;
        let left = |begun: Instant| interval.saturating_sub(begun.elapsed());
        (!self.unsynced.is_empty()).then(|| self.begun.map_or(Duration::ZERO, left))
    }

    fn append(&mut self, encoded: Encoded) -> anyhow::Result<()> {
        let frame = encoded.frame;
        let appended = match self.log.append(&frame) {
            Err(error) if error.is_full() && self.full_since.is_some() && !frame.has_data() => {
                self.append_when_there_is_room(&frame, error)
            }
            appended => appended,
        };
        match appended {
            Ok(location) => {
                self.has_appended = true;
                self.shared
                    .set_appended(self.log.next_seq().prev(), encoded.position);
                self.shared.pace.encoded(&frame);
                self.unsynced.push((frame.head().into(), location));
                Ok(())
            }
            Err(error)
                if error.is_full()
                    && (frame.has_data()
                        || self.has_appended
                            && self.full_since.is_none()
                            && !self.shared.stop.load(Ordering::SeqCst)) =>
            {
                tracing::error!("{error}");
                self.commit()?;
                self.epoch = Epoch(self.epoch.0 + 1);
                self.full_since = Some(Instant::now());
                *self.shared.store.lock() = Some(StoreChange::Full {
                    next: self.log.next_seq(),
                    epoch: self.epoch,
                });
                Ok(())
            }
            Err(error) => Err(error).context("append to the log"),
        }
    }

    /// Not even the record of the gap found room: it waits for some. Whatever comes meanwhile waits in the queues and the
    /// ring, or is counted as lost, in that gap. Whoever ends the agent leaves the gap to the next one.
    fn append_when_there_is_room(
        &mut self,
        frame: &SealedFrame,
        first_error: LogError,
    ) -> Result<FrameLocation, LogError> {
        let mut error = first_error;
        self.commit().map_err(|_| LogError::Poisoned {
            reason: "the sync stage has ended".to_owned(),
        })?;
        tracing::error!("{error}: not even that can be journaled; waiting for room");
        // What finds no room where the file system says that there is some has a disk that fails.
        let mut had_room = 0;
        while error.is_full() && had_room < REFUSALS_MAX && !self.shared.stop.load(Ordering::SeqCst) {
            had_room = match self.log.has_control_room(frame) {
                true => had_room + 1,
                false => 0,
            };
            std::thread::sleep(NO_ROOM_INTERVAL);
            match self.log.append(frame) {
                Ok(location) => return Ok(location),
                Err(again) => error = again,
            }
        }
        Err(error)
    }

    /// Has everything made durable that was appended so far. Waits for the sync before, if one is under way.
    fn commit(&mut self) -> anyhow::Result<()> {
        if self.unsynced.is_empty() {
            return Ok(());
        }
        self.tell_room();
        self.begun = Some(Instant::now());
        let Some(job) = self.log.begin_sync().context("make the log durable")? else {
            return Ok(());
        };
        let frames = std::mem::take(&mut self.unsynced);
        let group = Group { job, frames };
        self.to_sync.send(group).ok().context("the sync stage has ended")
    }

    /// What `status` and the warnings say of the store.
    fn tell_room(&self) {
        self.shared
            .log_bytes
            .store(self.log.log_bytes(), Ordering::Relaxed);
        match self.log.room() {
            Ok(room) => *self.shared.room.lock() = Some(room),
            Err(error) => tracing::debug!(%error, "how full the store is could not be asked"),
        }
    }

    fn look_for_room(&mut self) {
        if self
            .full_since
            .is_some_and(|since| since.elapsed() >= ROOM_INTERVAL)
        {
            self.full_since = Some(Instant::now());
            self.tell_room();
            let mut change = self.shared.store.lock();
            if change.is_none() && self.log.has_room(ROOM_BYTES_MIN) {
                *change = Some(StoreChange::Room);
                self.full_since = None;
            }
        }
    }
}

/// Makes groups of frames durable, and hands them to the index.
pub(super) fn sync_loop(
    shared: &Shared,
    queue: &Receiver<Group>,
    tell_synced: &Sender<()>,
    to_index: &Sender<IndexRequest>,
) -> anyhow::Result<()> {
    for Group { job, frames } in queue {
        let begun = Instant::now();
        let durable = job.run().context("make the log durable")?;
        shared.synced_in(begun.elapsed());
        shared.set_durable(durable);
        if shared.awaits_sync.swap(false, Ordering::SeqCst) {
            // One word that is not heard yet is enough.
            let _ = tell_synced.try_send(());
        }
        for (frame, location) in frames {
            to_index
                .send(IndexRequest::Frame(frame, location))
                .ok()
                .context("the index stage has ended")?;
        }
    }
    Ok(())
}
