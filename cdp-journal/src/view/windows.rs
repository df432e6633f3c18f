//! What a copy reads next: one window of the volume after the other, each planned while the one before is copied.
//!
//! A cold index answers with one short read of the disk after the other, so several threads ask it, each about a
//! part of the window.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crossbeam_channel::Sender;

use super::plan::{CHUNK_BYTES, plan_ranges};
use super::{Item, View};
use crate::error::ReadError;
use crate::types::BLOCK_BYTES;

/// Threads that plan at once.
const PLANNERS: u64 = 4;
/// So little is planned by one thread.
const SHARE_BYTES_MIN: u64 = 16 << 20;
/// A window ends after so many times the bytes that it may have of data, however little of it there is: what plans cannot
/// copy.
const SPARSE_WINDOWS_MAX: u64 = 16;
/// Holes that a window tells at most, or those of one step.
const ZEROES_MAX: usize = 1 << 19;
/// A window is planned in so many steps, or more of them where there are holes.
const STEPS: u64 = 8;

/// A part of the ranges that are copied, planned.
#[derive(Debug, Default)]
pub(super) struct Window {
    pub(super) zeroes: Vec<Range<u64>>,
    /// In the order of the volume.
    pub(super) data: Vec<Item>,
    data_bytes: u64,
}

impl Window {
    /// All that it tells of.
    pub(super) fn bytes(&self) -> u64 {
        self.data_bytes
            + self
                .zeroes
                .iter()
                .map(|range| range.end - range.start)
                .sum::<u64>()
    }

    fn extend(&mut self, more: Window) {
        self.zeroes.extend(more.zeroes);
        self.data.extend(more.data);
        self.data_bytes += more.data_bytes;
    }
}

/// Plans window after window, each with so many bytes of data at most, and sends them; `first` is told of the first few.
/// Ends with the ranges, with an error, or when nobody takes the windows any more.
pub(super) fn plan_windows(
    view: &View,
    ranges: impl Iterator<Item = Range<u64>>,
    window_bytes: u64,
    stop: &AtomicBool,
    first: impl FnOnce(&[Item]),
    windows: &Sender<Result<Window, ReadError>>,
) {
    let mut ranges = Cut::new(ranges);
    let step_bytes_min = window_bytes.div_ceil(STEPS).max(1);
    let (mut step_bytes, mut planned_bytes) = (step_bytes_min, 0);
    let mut window = Window::default();
    let mut first = Some(first);
    while !stop.load(Ordering::Relaxed) {
        let left_bytes = window_bytes.saturating_sub(window.data_bytes);
        let wanted_bytes = step_bytes.min(left_bytes).max(1).next_multiple_of(BLOCK_BYTES);
        let parts = ranges.take(wanted_bytes);
        let is_last = parts.is_none();
        let parts = parts.unwrap_or_default();
        let taken_bytes: u64 = parts.iter().map(|part| part.end - part.start).sum();
        planned_bytes += taken_bytes;
        match plan_step(view, parts) {
            Ok(step) => {
                if let Some(first) = first.take_if(|_| !step.data.is_empty()) {
                    first(&step.data);
                }
                // Where there is little, far away, each question takes as long as one about much.
                step_bytes = match step.data_bytes < taken_bytes / 2 {
                    true => (2 * step_bytes).min(window_bytes),
                    false => step_bytes_min,
                };
                window.extend(step);
            }
            Err(error) => {
                // Nobody takes it where something else failed before.
                let _ = windows.send(Err(error));
                return;
            }
        }
        // Holes take no room, but many of them do.
        let is_full = window.data_bytes + step_bytes_min / STEPS > window_bytes
            || window.zeroes.len() >= ZEROES_MAX
            || planned_bytes > SPARSE_WINDOWS_MAX.saturating_mul(window_bytes);
        if is_full || is_last {
            planned_bytes = 0;
            let taken = windows.send(Ok(std::mem::take(&mut window)));
            if taken.is_err() || is_last {
                return;
            }
        }
    }
}

fn plan_step(view: &View, parts: Vec<Range<u64>>) -> Result<Window, ReadError> {
    let bytes: u64 = parts.iter().map(|part| part.end - part.start).sum();
    if bytes <= SHARE_BYTES_MIN {
        return plan_share(view, &parts);
    }
    let share_bytes = bytes.div_ceil(PLANNERS).next_multiple_of(CHUNK_BYTES);
    let mut parts = Cut::new(parts.into_iter());
    thread::scope(|scope| {
        let shares = std::iter::from_fn(|| parts.take(share_bytes));
        let planners: Vec<_> = shares
            .map(|share| scope.spawn(move || plan_share(view, &share)))
            .collect();
        let mut step = Window::default();
        for planner in planners {
            let share = planner
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            step.extend(share);
        }
        Ok(step)
    })
}

fn plan_share(view: &View, parts: &[Range<u64>]) -> Result<Window, ReadError> {
    let mut window = Window::default();
    let View { volume, seq, .. } = *view;
    plan_ranges(
        parts,
        |range, visit| view.store.plan(volume, seq, range, visit),
        |item| match item.data {
            Some(_) => {
                window.data_bytes += item.len;
                window.data.push(item);
            }
            None => window.zeroes.push(item.offset..item.offset + item.len),
        },
    )?;
    Ok(window)
}

/// Ranges of which so many bytes at a time are taken.
pub(super) struct Cut<I> {
    ranges: I,
    rest: Option<Range<u64>>,
}

impl<I: Iterator<Item = Range<u64>>> Cut<I> {
    pub(super) fn new(mut ranges: I) -> Self {
        let rest = ranges.next();
        Self { ranges, rest }
    }

    /// The next so many bytes of the ranges; `None` once all were taken.
    pub(super) fn take(&mut self, bytes: u64) -> Option<Vec<Range<u64>>> {
        let (mut parts, mut taken_bytes) = (Vec::new(), 0);
        while taken_bytes < bytes
            && let Some(range) = self.rest.take()
        {
            let cut = range.start.saturating_add(bytes - taken_bytes);
            let part = range.start..range.end.min(cut);
            taken_bytes += part.end - part.start;
            self.rest = if part.end < range.end {
                Some(part.end..range.end)
            } else {
                self.ranges.next()
            };
            parts.push(part);
        }
        (!parts.is_empty()).then_some(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: every byte of the ranges comes once, in order, so many at a time. Method: ranges that end within, at and
    /// after a cut.
    #[test]
    fn ranges_are_cut_where_a_window_is_full() {
        let ranges = vec![0..10, 20..25, 30..31, 40..59, 70..71];
        let mut cut = Cut::new(ranges.into_iter());
        let windows: Vec<_> = std::iter::from_fn(|| cut.take(15)).collect();
        assert_eq!(
            windows,
            [vec![0..10, 20..25], vec![30..31, 40..54], vec![54..59, 70..71]]
        );
    }
}
