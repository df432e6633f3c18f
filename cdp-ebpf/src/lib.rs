//! What the probe and the agent share: the layouts of events and maps, compiled by both sides.
//!
//! Nothing here knows a kernel's layout: field offsets and operation codes come from the running
//! kernel's BTF and are set as globals before the probe is loaded (see [`Kernel`]).
#![no_std]

pub mod event;
pub mod kernel;
pub mod map;

pub use event::{CompleteEvent, EventKind, Op, WriteEvent};
pub use kernel::Kernel;
pub use map::{Cause, Counter, DiskFilter, SectorRange};
