//! The binary as a script sees it: exit codes, JSON, messages, and what is left on disk.
//!
//! Every test makes its own store with the journal's writer; nothing here needs an agent or a probe.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]

mod damage;
mod device;
mod ext4;
mod files;
mod files_unmounted;
mod find;
mod history;
mod image;
mod live;
mod mounts;
mod nbd;
mod program;
mod rewind;
mod store;
mod usage;
