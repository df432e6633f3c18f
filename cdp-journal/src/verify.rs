//! Reading everything to see whether it is good.

use std::path::PathBuf;

use crate::types::Seq;

/// A stretch of the log that does not match its checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The segment.
    pub path: PathBuf,
    /// Where in it the damage begins.
    pub offset: u64,
    /// How far the damage reaches at most.
    pub bytes: u64,
    /// Records affected, where known.
    pub seqs: Option<(Seq, Seq)>,
    /// What failed.
    pub what: String,
}

/// What reading the whole log found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Files of the log.
    pub segments: u64,
    /// Frames that were good.
    pub frames: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What was not good.
    pub damages: Vec<Damage>,
}
