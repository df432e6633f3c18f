//! Ctrl-C and SIGTERM while something is being written: stop, tidy up, say what is left. The second one
//! ends the program on the spot.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::TERM_SIGNALS;
use signal_hook::flag;

/// Exit code of a program that was stopped by a second signal, as shells count it (128 + SIGINT).
const STOPPED: i32 = 130;

/// Whether the user asked to stop.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on, the first signal to stop is noted instead of ending the program.
    pub(crate) fn catch() -> io::Result<Self> {
        let interrupt = Interrupt::default();
        for signal in TERM_SIGNALS {
            // In this order: the first signal finds the flag down, raises it, and the second finds it up.
            flag::register_conditional_shutdown(*signal, STOPPED, Arc::clone(&interrupt.0))?;
            flag::register(*signal, Arc::clone(&interrupt.0))?;
        }
        Ok(interrupt)
    }

    /// Fails with [`io::ErrorKind::Interrupted`] once the user asked to stop.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.0.load(Ordering::SeqCst) {
            Err(io::ErrorKind::Interrupted.into())
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_signal_is_noted() {
        let interrupt = Interrupt::catch().unwrap();
        assert!(interrupt.check().is_ok());
        signal_hook::low_level::raise(signal_hook::consts::SIGTERM).unwrap();
        assert_eq!(interrupt.check().unwrap_err().kind(), io::ErrorKind::Interrupted);
    }
}
