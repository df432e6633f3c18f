//! What the log must know before anything else of an agent and its volumes means something. When the store fills up,
//! records are lost from some Seq on: of these, what was lost is recorded once more.

use std::mem::discriminant;

use cdp_journal::format::Body;
use cdp_journal::{Seq, VolumeId};

/// The last declarations, one of a kind for each volume.
#[derive(Debug, Default)]
pub(super) struct Declared(Vec<(Seq, Option<VolumeId>, Body)>);

impl Declared {
    /// A record was made.
    pub(super) fn note(&mut self, seq: Seq, volume: Option<VolumeId>, body: &Body) {
        match body {
            Body::Start { .. } | Body::Resize { .. } => {
                let kind = discriminant(body);
                self.0
                    .retain(|(_, of, other)| *of != volume || discriminant(other) != kind);
            }
            // It tells the size as well.
            Body::Volume { .. } => self.0.retain(|(_, of, _)| *of != volume),
            _ => return,
        }
        self.0.push((seq, volume, body.clone()));
    }

    /// Nobody watches a volume any more; the record that says so has a Seq up to `last`.
    pub(super) fn ended(&mut self, last: Option<Seq>, volume: VolumeId, gap: Body) {
        self.0.retain(|(_, of, _)| *of != Some(volume));
        self.0.push((last.unwrap_or(Seq::FIRST), Some(volume), gap));
    }

    /// Takes out what had a Seq from `next` on, in order. What was exact up to a record that is lost is exact up to `next`.
    /// A gap that nobody closes stays: it may be lost again.
    pub(super) fn take_from(&mut self, next: Seq) -> Vec<(Option<VolumeId>, Body)> {
        let lost = self.0.extract_if(.., |(seq, ..)| *seq >= next);
        let known = |body| match body {
            Body::GapOpen { cause, last_exact } => Body::GapOpen {
                cause,
                last_exact: last_exact.min(next.prev()),
            },
            body => body,
        };
        lost.map(|(_, volume, body)| (volume, known(body))).collect()
    }
}
