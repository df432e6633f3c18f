//! The journal: what the agent captured, on disk, and any moment of it back.
//!
//! A write that the agent saw becomes a [`format::Record`]. Records travel in frames
//! ([`format::FrameBuilder`], [`format::SealedFrame`]), which are encoded, compressed and checksummed
//! once and are the same bytes in the log, on the wire and in a server's log. The log
//! ([`log::LogWriter`]) is the only truth. The index ([`index::IndexWriter`]) says where the newest
//! version of every block lies and can be rebuilt from the log at any time. [`store::StoreReader`]
//! reads both beside a live writer and never touches the folder; [`view::View`] is a volume at a
//! [`Seq`], readable at any offset.
//!
//! What agents, servers and readers say to each other is [`wire`]; a server's folder is a [`site`]. With the feature
//! `net` (on by default) there are also the [`server`] itself, who may do what with it ([`trust`]), and its clients
//! ([`net`]). Everything else needs no runtime.
//!
//! Always true:
//! - J1: `applied <= durable <= appended`: only what survived an fsync is ever indexed.
//! - J2: every byte that leaves a [`view::View`] was checked against its checksum.
//! - J3: a reader opens files for reading only.
//! - J4: a failed fsync poisons the writer for good.

#![cfg_attr(
    not(feature = "net"),
    allow(
        dead_code,
        unused_imports,
        reason = "the server reads views and stores by ways of its own"
    )
)]

pub mod format;
pub mod history;
pub mod index;
pub mod log;
#[cfg(feature = "net")]
pub mod net;
#[cfg(feature = "net")]
pub mod remote;
#[cfg(feature = "net")]
pub mod server;
pub mod ship;
pub mod site;
pub mod store;
#[cfg(feature = "net")]
pub mod trust;
pub mod verify;
pub mod view;
pub mod when;
pub mod wire;

mod error;
mod files;
mod types;

pub use error::{OpenError, ReadError};
pub use types::{
    BLOCK_BYTES, BLOCKS_PER_UNIT, BootNs, SECTOR_BYTES, SECTORS_PER_BLOCK, SegmentId, Seq, UNIT_BYTES,
    VolumeId, WallNs,
};
