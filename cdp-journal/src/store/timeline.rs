//! From the index's events and frames to moments and stretches of history.

use super::records::read_frame;
use crate::error::ReadError;
use crate::format::{Frame, GapCause};
use crate::history::{Bookmark, ExactInterval, Gap, History, Note, Resize, VolumeInfo};
use crate::index::{Event, EventBody, FrameEntry};
use crate::log::Disk;
use crate::types::{BootNs, Seq, VolumeId, WallNs};
use crate::view::ViewStore;
use crate::when::{Moment, NotExact, NotExactCause, Point};

/// Answers questions about time.
pub(super) struct Timeline<'a> {
    pub(super) store: &'a ViewStore,
    pub(super) disk: &'a dyn Disk,
    pub(super) head: Option<Point>,
}

impl Timeline<'_> {
    fn frame(&self, entry: &FrameEntry) -> Result<Frame, ReadError> {
        read_frame(self.disk, entry).map(|(_, found)| found.frame)
    }

    fn before(&self, entry: &FrameEntry) -> Result<Option<FrameEntry>, ReadError> {
        match entry.first_seq.checked_sub(1) {
            Some(seq) if seq > 0 => Ok(self.store.ask(|lookup| lookup.frame_at_or_before(seq))?),
            _ => Ok(None),
        }
    }

    /// The latest time of any record up to `seq`.
    pub(super) fn wall_until(&self, seq: Seq) -> Result<Option<WallNs>, ReadError> {
        let Some(entry) = self.store.ask(|lookup| lookup.frame_at_or_before(seq.get()))? else {
            return Ok(None);
        };
        if seq.get() >= entry.last_seq {
            return Ok(Some(WallNs(entry.wall_max)));
        }
        let before = self.before(&entry)?.map(|before| WallNs(before.wall_max));
        let frame = self.frame(&entry)?;
        let within = frame
            .records
            .iter()
            .take_while(|placed| placed.record.seq <= seq)
            .map(|placed| placed.wall);
        Ok(within.chain(before).max())
    }

    /// The time of one record; `None` if the log has none there that is good.
    fn wall_of(&self, seq: Seq) -> Result<Option<WallNs>, ReadError> {
        let Some(entry) = self.store.ask(|lookup| lookup.frame_at_or_before(seq.get()))? else {
            return Ok(None);
        };
        if seq.get() > entry.last_seq {
            return Ok(None);
        }
        let frame = match self.frame(&entry) {
            Err(ReadError::Damaged { .. }) => return Ok(None),
            frame => frame?,
        };
        let found = frame.records.iter().find(|placed| placed.record.seq == seq);
        Ok(found.map(|placed| placed.wall))
    }

    /// The end of a stretch whose last record is `last`: a time at which none that comes after it counts. Records may be of
    /// one time, and after a step of the clock of an earlier one.
    fn end_point(&self, last: Seq, since: Point) -> Result<Point, ReadError> {
        let mut end = self.point(last)?;
        if let Some(next) = self.wall_of(Seq::after(Some(last)))? {
            let before = WallNs(next.0.saturating_sub(1));
            end.wall = end.wall.min(before).max(since.wall);
        }
        Ok(end)
    }

    /// The latest time in the last frame.
    pub(super) fn last_boot_ns(&self) -> Result<Option<BootNs>, ReadError> {
        let Some(head) = self.head else { return Ok(None) };
        let entry = self
            .store
            .ask(|lookup| lookup.frame_at_or_before(head.seq.get()))?;
        entry
            .map(|entry| self.frame(&entry).map(|frame| frame.header.boot_ns_max))
            .transpose()
    }

    /// The last record of the longest run in which none is later than `wall`.
    pub(super) fn seq_at(&self, wall: WallNs) -> Result<Option<Seq>, ReadError> {
        let Some(entry) = self.store.ask(|lookup| lookup.first_frame_later_than(wall))? else {
            return Ok(self.head.map(|head| head.seq));
        };
        let frame = self.frame(&entry)?;
        let within = frame
            .records
            .iter()
            .take_while(|placed| placed.wall <= wall)
            .last();
        match within {
            Some(placed) => Ok(Some(placed.record.seq)),
            None => Ok(self.before(&entry)?.and_then(|before| Seq::new(before.last_seq))),
        }
    }

    fn point(&self, seq: Seq) -> Result<Point, ReadError> {
        Ok(Point {
            seq,
            wall: self.wall_until(seq)?.unwrap_or(WallNs::MIN),
        })
    }

    /// The newest record that carries a label.
    pub(super) fn bookmark(&self, label: &str) -> Result<Option<(Seq, WallNs)>, ReadError> {
        let events = self.store.ask(|lookup| lookup.all_events())?;
        let labelled = events
            .iter()
            .filter(|event| matches!(&event.body, EventBody::Bookmark { label: found } if found == label));
        Ok(labelled
            .max_by_key(|event| event.seq)
            .map(|event| (event.seq, event.wall)))
    }

    /// The volumes as last declared.
    pub(super) fn volumes(&self) -> Result<Vec<VolumeInfo>, ReadError> {
        let events = self.store.ask(|lookup| lookup.all_events())?;
        let mut volumes: Vec<VolumeInfo> = Vec::new();
        for event in events {
            let Some(id) = VolumeId::new(event.volume) else {
                continue;
            };
            match event.body {
                EventBody::Volume {
                    kind,
                    bytes,
                    name,
                    path,
                } => {
                    volumes.retain(|volume| volume.id != id);
                    volumes.push(VolumeInfo {
                        id,
                        name,
                        kind,
                        path,
                        bytes,
                    });
                }
                EventBody::Resize { bytes } => {
                    if let Some(volume) = volumes.iter_mut().find(|volume| volume.id == id) {
                        volume.bytes = bytes;
                    }
                }
                _ => {}
            }
        }
        Ok(volumes)
    }

    /// The volume's events and those of all volumes, in order.
    pub(super) fn events(&self, volume: VolumeId) -> Result<Vec<Event>, ReadError> {
        let mut events = self.store.ask(|lookup| lookup.events(volume.get()))?;
        events.extend(self.store.ask(|lookup| lookup.events(0))?);
        events.sort_by_key(|event| (event.seq, event.body.code()));
        Ok(events)
    }

    /// A volume over time.
    pub(super) fn history(&self, volume: VolumeId) -> Result<Option<History>, ReadError> {
        let Some(info) = self.volumes()?.into_iter().find(|info| info.id == volume) else {
            return Ok(None);
        };
        let mut scribe = Scribe::new(self, info);
        for event in self.events(volume)? {
            scribe.take(event)?;
        }
        scribe.finish(self.head).map(Some)
    }

    /// Why `moment` is not exact for the volume; `None` if it is.
    pub(super) fn inexactness(&self, history: &History, moment: Moment) -> Option<NotExact> {
        let Some(seq) = moment.seq else {
            let after = history.exact.first().map(from_point);
            let cause = NotExactCause::BeforeHistory;
            return Some(NotExact {
                moment,
                cause,
                gap: (None, after.map(|p| p.wall)),
                before: None,
                after,
            });
        };
        let covering = history
            .exact
            .iter()
            .find(|exact| (exact.from_seq..=exact.to_seq).contains(&seq));
        // At its end an interval covers the time of its last record, not the time until the next: what was
        // lost was lost in between.
        let is_past_end = |exact: &ExactInterval| {
            moment.by_time && !exact.open && seq == exact.to_seq && moment.wall > exact.to
        };
        if covering.is_some_and(|exact| !is_past_end(exact)) {
            return None;
        }
        let before = history
            .exact
            .iter()
            .rfind(|exact| exact.to_seq <= seq)
            .map(to_point);
        let after = history
            .exact
            .iter()
            .find(|exact| exact.from_seq > seq)
            .map(from_point);
        let gap = history
            .gaps
            .iter()
            .rfind(|gap| gap.from_seq.is_none_or(|from| from <= seq) && gap.to_seq.is_none_or(|to| to > seq));
        let (cause, gap) = match gap {
            Some(gap) => (gap.cause, (Some(gap.from), gap.to)),
            None => (GapCause::Seeding, (None, after.map(|point| point.wall))),
        };
        Some(NotExact {
            moment,
            cause: NotExactCause::Gap(cause),
            gap,
            before,
            after,
        })
    }
}

fn from_point(exact: &ExactInterval) -> Point {
    Point {
        seq: exact.from_seq,
        wall: exact.from,
    }
}

fn to_point(exact: &ExactInterval) -> Point {
    Point {
        seq: exact.to_seq,
        wall: exact.to,
    }
}

/// Writes a volume's history from its events.
struct Scribe<'a, 'b> {
    timeline: &'a Timeline<'b>,
    history: History,
    /// Where the exact stretch began that goes on.
    exact_since: Option<Point>,
}

impl<'a, 'b> Scribe<'a, 'b> {
    fn new(timeline: &'a Timeline<'b>, volume: VolumeInfo) -> Self {
        let history = History {
            volume,
            exact: Vec::new(),
            gaps: Vec::new(),
            bookmarks: Vec::new(),
            resizes: Vec::new(),
            notes: Vec::new(),
        };
        Self {
            timeline,
            history,
            exact_since: None,
        }
    }

    fn take(&mut self, event: Event) -> Result<(), ReadError> {
        let (seq, at) = (event.seq, event.wall);
        match event.body {
            EventBody::Volume { bytes, .. } | EventBody::Resize { bytes } => {
                if self
                    .history
                    .resizes
                    .last()
                    .is_none_or(|resize| resize.bytes != bytes)
                {
                    self.history.resizes.push(Resize { at, seq, bytes });
                }
            }
            EventBody::GapOpen { cause, last_exact } => self.open_gap(cause, Seq::new(last_exact))?,
            EventBody::Hole { last } => self.open_gap(GapCause::LogHole, Seq::new(last))?,
            EventBody::GapClose => self.close_gap(seq)?,
            EventBody::Bookmark { label } => self.history.bookmarks.push(Bookmark { label, at, seq }),
            EventBody::Start { .. } => self.note(seq, at, "the agent started".to_owned()),
            EventBody::Stop => self.note(seq, at, "the agent stopped".to_owned()),
            EventBody::ClockStep { by_ns } => {
                let text = format!("the clock was set {:+.3} s", by_ns as f64 / 1e9);
                self.note(seq, at, text);
            }
        }
        Ok(())
    }

    fn note(&mut self, seq: Seq, at: WallNs, text: String) {
        self.history.notes.push(Note { at, seq, text });
    }

    fn open_gap(&mut self, cause: GapCause, last_exact: Option<Seq>) -> Result<(), ReadError> {
        let Some(since) = self.exact_since.take() else {
            return self.reach_back(last_exact);
        };
        let end = match last_exact.filter(|last| *last >= since.seq) {
            Some(last) => self.timeline.end_point(last, since)?,
            None => {
                self.take_back(since, cause);
                return self.reach_back(last_exact);
            }
        };
        self.history.exact.push(ExactInterval {
            from: since.wall,
            to: end.wall,
            from_seq: since.seq,
            to_seq: end.seq,
            open: false,
        });
        self.history.gaps.push(Gap {
            from: end.wall,
            to: None,
            from_seq: Some(end.seq),
            to_seq: None,
            cause,
        });
        Ok(())
    }

    /// The gap that is open turns out to have begun earlier: right after `last_exact`; `None`: before everything.
    fn reach_back(&mut self, last_exact: Option<Seq>) -> Result<(), ReadError> {
        while let Some(exact) = self.history.exact.pop_if(|exact| Some(exact.to_seq) > last_exact) {
            let Some(last_exact) = last_exact.filter(|last| *last >= exact.from_seq) else {
                // Nothing is left of the stretch: the gaps on both sides of it are one.
                let cause = self.history.gaps.pop().map_or(GapCause::Seeding, |gap| gap.cause);
                self.take_back(from_point(&exact), cause);
                continue;
            };
            let end = self.timeline.end_point(last_exact, from_point(&exact))?;
            self.history.exact.push(ExactInterval {
                to: end.wall,
                to_seq: end.seq,
                ..exact
            });
            if let Some(gap) = self.history.gaps.last_mut() {
                (gap.from, gap.from_seq) = (end.wall, Some(end.seq));
            }
        }
        Ok(())
    }

    /// The stretch that began at `since` turns out never to have been exact.
    fn take_back(&mut self, since: Point, cause: GapCause) {
        match self.history.gaps.last_mut() {
            Some(gap) if gap.to_seq == Some(since.seq) => (gap.to, gap.to_seq) = (None, None),
            _ => self.history.gaps.push(Gap {
                from: since.wall,
                to: None,
                from_seq: Some(since.seq),
                to_seq: None,
                cause,
            }),
        }
    }

    fn close_gap(&mut self, seq: Seq) -> Result<(), ReadError> {
        if self.exact_since.is_some() {
            return Ok(());
        }
        let since = self.timeline.point(seq)?;
        self.exact_since = Some(since);
        if let Some(gap) = self.history.gaps.last_mut().filter(|gap| gap.to_seq.is_none()) {
            (gap.to, gap.to_seq) = (Some(since.wall), Some(since.seq));
        }
        Ok(())
    }

    fn finish(mut self, head: Option<Point>) -> Result<History, ReadError> {
        if let (Some(since), Some(head)) = (self.exact_since, head) {
            self.history.exact.push(ExactInterval {
                from: since.wall,
                to: head.wall,
                from_seq: since.seq,
                to_seq: head.seq,
                open: true,
            });
        }
        Ok(self.history)
    }
}
