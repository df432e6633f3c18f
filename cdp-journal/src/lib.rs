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
//! # As a library
//!
//! Any moment of a volume is a [`view::View`], read from a folder beside whoever writes to it, without a lock and
//! without touching anything:
//!
//! ```
//! use cdp_journal::format::{Body, FrameBuilder, Origin, RecordFlags, VolumeKind};
//! use cdp_journal::store::{StoreReader, StoreWriter, WriterOptions};
//! use cdp_journal::when::When;
//! use cdp_journal::{BootNs, VolumeId};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! // A store as an agent writes it: a volume of 1 MiB whose first block is written twice.
//! let (mut log, _index) = StoreWriter::open(folder, &WriterOptions::default())?.0.split();
//! let mut frame = FrameBuilder::new(log.next_seq());
//! let write = Body::Write { offset: 0, len: 4096 };
//! for (at, body, data) in [
//!     (1, Body::Volume { kind: VolumeKind::Block, bytes: 1 << 20, name: "pg".into(), path: "/dev/vdb".into() }, vec![]),
//!     (2, Body::GapClose, vec![]), // history is exact from here on
//!     (3, write.clone(), vec![b'a'; 4096]),
//!     (4, write, vec![b'b'; 4096]),
//! ] {
//!     frame.push(BootNs(at), VolumeId::new(1), Origin::default(), RecordFlags::default(), body, &[&data])?;
//! }
//! log.append(&frame.seal(uuid::Uuid::new_v4(), 0).ok_or("no records")?)?;
//! log.sync()?;
//!
//! // Any moment of it: named as on the command line, refused if it is not exact, then read at any offset.
//! let store = StoreReader::open(folder)?;
//! let volume = store.volume("pg")?.ok_or("no such volume")?;
//! let mut block = [0; 4096];
//! for (when, expected) in [("seq:3", b'a'), ("latest", b'b'), ("seq:2", 0)] {
//!     let moment = store.resolve(volume.id, &when.parse::<When>()?)?;
//!     let view = store.view(volume.id, moment.seq.ok_or("before the first record")?)?;
//!     assert_eq!(view.bytes(), 1 << 20);
//!     view.read_at(0, &mut block)?; // every byte checked against its checksum
//!     assert_eq!(block, [expected; 4096]);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A journal server is read in the same way: `remote::RemoteSite` gives stores that are read through the same trait,
//! [`store::Archive`].
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
pub mod units;
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
