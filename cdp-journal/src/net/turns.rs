//! Frames between the log and a connection: they wait for their turn, and what they offer is offered meanwhile.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quinn::SendStream;
use tokio::sync::{Notify, mpsc};

use super::link::LinkError;
use crate::ship::{BadAnswer, Lookahead, Offerable, Outgoing, Turn};
use crate::wire::Message;

/// See the module's head.
#[derive(Debug, Default)]
pub(super) struct Turns {
    ahead: Mutex<Lookahead>,
    /// One more frame waits, or an answer has come.
    changed: Notify,
    /// One fewer waits.
    taken: Notify,
}

impl Turns {
    /// Takes in frames, and offers over `stream` what they offer.
    pub(super) async fn fill(
        &self,
        mut frames: mpsc::Receiver<Offerable>,
        stream: &tokio::sync::Mutex<SendStream>,
    ) -> Result<Infallible, LinkError> {
        while let Some(frame) = frames.recv().await {
            while !self.ahead.lock().has_room() {
                self.taken.notified().await;
            }
            let offer = self.ahead.lock().push(frame);
            self.changed.notify_one();
            if let Some(hashes) = offer {
                let offer = Message::Offer { hashes }.encode();
                stream.lock().await.write_all(&offer).await?;
            }
        }
        // The reader has ended, and says why.
        std::future::pending().await
    }

    /// Is it worth while to look through the next frame for what may be offered?
    pub(super) fn wants_offer(&self) -> bool {
        self.ahead.lock().wants_offer()
    }

    /// The answer to the oldest offer that has none.
    pub(super) fn answered(&self, have: u32) -> Result<(), BadAnswer> {
        self.ahead.lock().answered(have)?;
        self.changed.notify_one();
        Ok(())
    }

    /// The next frame, once its turn has come; on a line that takes so many bytes in a second.
    pub(super) async fn next(&self, bytes_per_second: impl Fn() -> f64) -> Outgoing {
        let mut since = None;
        loop {
            let left = {
                let mut ahead = self.ahead.lock();
                let held = since.map_or(Duration::ZERO, |since: Instant| since.elapsed());
                match ahead.turn(held, bytes_per_second()) {
                    Turn::Nobody => None,
                    Turn::Hold(left) => Some(left),
                    Turn::Send => {
                        if let Some(outgoing) = ahead.take() {
                            self.taken.notify_one();
                            return outgoing;
                        }
                        None
                    }
                }
            };
            match left {
                None => self.changed.notified().await,
                Some(left) => {
                    since.get_or_insert_with(Instant::now);
                    let _ = tokio::time::timeout(left, self.changed.notified()).await;
                }
            }
        }
    }
}
