//! How long to wait before the next attempt.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(10);

/// What a session was good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Session {
    /// Something new was acknowledged in it.
    Useful,
    /// Nothing, or another connection with the same certificate took its place.
    Useless,
}

/// Waits twice as long after each failure, and never as long as others do.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The next wait; `random` spreads it over the second half of its length.
    pub(crate) fn next(&mut self, random: u32) -> Duration {
        let whole = FIRST.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        let part = f64::from(random) / f64::from(u32::MAX);
        whole.mul_f64(0.5 + part / 2.0)
    }

    /// A session has ended: only one that was good for something lets the next attempt follow soon. Else a server that
    /// fails at each first frame, or two agents with one certificate, would meet ten times a second for ever.
    pub(crate) fn ended(&mut self, session: Session) {
        if session == Session::Useful {
            self.failures = 0;
        }
    }
}

/// A number that differs between hosts and attempts.
pub(crate) fn random() -> u32 {
    uuid::Uuid::new_v4().as_fields().0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_bound_and_begin_anew_after_a_session_that_was_useful() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..20).map(|_| backoff.next(u32::MAX)).collect();
        assert_eq!(waits[0], FIRST);
        assert_eq!(waits[1], 2 * FIRST);
        assert_eq!(waits[19], LONGEST);
        backoff.ended(Session::Useless);
        assert_eq!(backoff.next(u32::MAX), LONGEST);
        backoff.ended(Session::Useful);
        assert_eq!(backoff.next(0), FIRST / 2);
    }
}
