//! Gaps, as `--json` tells them.

use cdp_journal::Seq;
use cdp_journal::history::{Gap, History};
use serde::Serialize;

use crate::time::Time;

/// A stretch in which not every write was seen.
#[derive(Debug, Serialize)]
pub(super) struct JsonGap {
    pub(super) from: Time,
    /// Nothing while it is open.
    to: Option<Time>,
    pub(super) cause: &'static str,
    /// The last exact record before it, and the first after it.
    from_seq: Option<u64>,
    to_seq: Option<u64>,
}

impl JsonGap {
    /// Gaps of which a part lies after `since` (`None`: whenever) and before `until`.
    pub(super) fn within(history: Option<&History>, since: Option<Seq>, until: Seq) -> Vec<Self> {
        let is_within = |gap: &&Gap| {
            gap.from_seq.is_none_or(|from| from < until) && gap.to_seq.is_none_or(|to| Some(to) > since)
        };
        let gaps = history.map_or(&[][..], |history| &history.gaps).iter();
        gaps.filter(is_within).map(Self::from).collect()
    }
}

impl From<&Gap> for JsonGap {
    fn from(gap: &Gap) -> Self {
        JsonGap {
            from: Time(gap.from),
            to: gap.to.map(Time),
            cause: gap.cause.as_str(),
            from_seq: gap.from_seq.map(Seq::get),
            to_seq: gap.to_seq.map(Seq::get),
        }
    }
}

#[cfg(test)]
mod tests {
    use cdp_journal::format::{GapCause, VolumeKind};
    use cdp_journal::history::VolumeInfo;
    use cdp_journal::{VolumeId, WallNs};

    use super::*;

    #[test]
    fn a_gap_counts_where_a_part_of_it_lies_between() {
        let seq = |number| Seq::new(number).unwrap();
        let history = History {
            volume: VolumeInfo {
                id: VolumeId::new(1).unwrap(),
                name: "v".to_owned(),
                kind: VolumeKind::Block,
                path: String::new(),
                bytes: 0,
            },
            exact: Vec::new(),
            gaps: vec![Gap {
                from: WallNs(0),
                to: Some(WallNs(1)),
                from_seq: Some(seq(10)),
                to_seq: Some(seq(20)),
                cause: GapCause::AgentDown,
            }],
            bookmarks: Vec::new(),
            resizes: Vec::new(),
            notes: Vec::new(),
        };
        let within = |since, until| JsonGap::within(Some(&history), since, seq(until)).len();
        assert_eq!(within(None, 10), 0, "all of it comes later");
        assert_eq!(within(None, 11), 1);
        assert_eq!(within(Some(seq(10)), 20), 1);
        assert_eq!(within(Some(seq(19)), 30), 1);
        assert_eq!(within(Some(seq(20)), 30), 0, "all of it was before");
    }
}
