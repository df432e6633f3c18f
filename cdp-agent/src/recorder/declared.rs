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

    /// A volume is not protected any more.
    pub(super) fn remove(&mut self, volume: VolumeId) {
        self.0.retain(|(_, of, _)| *of != Some(volume));
    }

    /// Takes out what had a Seq from `next` on, in order.
    pub(super) fn take_from(&mut self, next: Seq) -> Vec<(Option<VolumeId>, Body)> {
        let lost = self.0.extract_if(.., |(seq, ..)| *seq >= next);
        lost.map(|(_, volume, body)| (volume, body)).collect()
    }
}
