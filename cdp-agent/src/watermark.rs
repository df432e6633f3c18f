//! When to warn that the store fills up: once on the way up, and again only after it has clearly gone down.

use cdp_journal::log::Room;

/// Warn from here on.
const HIGH_PERCENT: u64 = 80;
/// Another warning only after less than this.
const LOW_PERCENT: u64 = 75;

const _: () = assert!(LOW_PERCENT < HIGH_PERCENT && HIGH_PERCENT < 100);

/// See the module's head.
#[derive(Debug, Default)]
pub(crate) struct Watermark {
    is_high: bool,
}

impl Watermark {
    /// Takes in how full the store is. True if that is to be warned of now.
    pub(crate) fn crossed(&mut self, room: &Room) -> bool {
        let percent = percent_used(room);
        let was_high = self.is_high;
        self.is_high = percent >= if was_high { LOW_PERCENT } else { HIGH_PERCENT };
        self.is_high && !was_high
    }

    /// Is the store nearly full?
    pub(crate) fn is_high(&self) -> bool {
        self.is_high
    }
}

/// How much of what the store may use is used, 0 to 100.
pub(crate) fn percent_used(room: &Room) -> u64 {
    let percent = u128::from(room.used_bytes) * 100 / u128::from(room.limit_bytes.max(1));
    percent.min(100) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_warns_once_at_80_percent_and_again_only_after_less_than_75() {
        let mut watermark = Watermark::default();
        let steps = [0, 79, 80, 85, 79, 81, 75, 80, 74, 79, 80, 100];
        let warned: Vec<u64> = steps
            .into_iter()
            .filter(|&used_bytes| {
                watermark.crossed(&Room {
                    used_bytes,
                    limit_bytes: 100,
                })
            })
            .collect();
        assert_eq!(warned, [80, 80], "the first time, and after 74");
    }

    #[test]
    fn a_store_without_any_room_is_full() {
        let full = |used_bytes, limit_bytes| {
            percent_used(&Room {
                used_bytes,
                limit_bytes,
            })
        };
        assert_eq!(full(0, 0), 0);
        assert_eq!(full(5, 0), 100);
        assert_eq!(full(u64::MAX, u64::MAX), 100);
    }
}
