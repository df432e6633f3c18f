//! Shipping a log: tail it from where the other end stands, frame by frame.
//!
//! Nothing here knows whether it ships an agent's log or a server's. [`LogTail`] reads what is durable, [`Flight`]
//! decides what may be sent and knows how far behind the other end is, [`Bucket`] how fast, [`Lookahead`] what need not be
//! sent.

mod flight;
mod offers;
mod rate;
mod tail;

pub use flight::{Flight, Sent};
pub use offers::{BadAnswer, Lookahead, Offerable, Outgoing, Turn};
pub use rate::{BadSchedule, BadWindow, Bucket, Limits, Rate, Schedule, WINDOWS_MAX, WeekMinute, Window};
pub use tail::{LogTail, TailError, TailFrame};
