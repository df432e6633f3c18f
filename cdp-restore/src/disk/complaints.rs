//! What goes wrong on our side while others use a disk: told once each, for they will try again and again.

use std::collections::HashSet;

use parking_lot::Mutex;

use super::DiskError;
use crate::report::Report;

/// Different complaints that are told; more say nothing new.
const COMPLAINTS_MAX: usize = 64;

/// How each of them begins.
const COMPLAINT: &str = "a request failed";

/// The complaints among what a process has said.
pub(crate) fn complaints_in(said: &str) -> String {
    let lines: Vec<_> = said.lines().filter(|line| line.contains(COMPLAINT)).collect();
    lines.join("\n")
}

/// What has been told.
#[derive(Debug, Default)]
pub(crate) struct Complaints(Mutex<HashSet<String>>);

impl Complaints {
    /// Says what went wrong, unless it was said, or is the asker's own fault.
    pub(crate) fn tell(&self, report: &Report, error: &DiskError) {
        if !matches!(
            error,
            DiskError::Read(_) | DiskError::Layer(_) | DiskError::Full { .. }
        ) {
            return;
        }
        let mut text = error.to_string();
        if let Some(cause) = std::error::Error::source(error) {
            text = format!("{text}: {cause}");
        }
        let mut told = self.0.lock();
        if told.len() < COMPLAINTS_MAX && told.insert(text.clone()) {
            report.warn(format!("{COMPLAINT}: {text}"));
        }
    }
}
