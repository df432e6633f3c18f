//! The commands: the only code of this binary that prints results.

pub(crate) mod doctor;
pub(crate) mod enroll;
pub(crate) mod query;
pub(crate) mod run;
pub(crate) mod unload;
