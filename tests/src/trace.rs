//! Watching bios through tracefs: to prove that a workload really does what a test claims to cover.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::device::device_number;
use crate::mount::Mount;

const SECTOR_BYTES: u64 = 512;

/// A private trace instance that records the writes queued to one device.
#[derive(Debug)]
pub struct BioTrace {
    instance: PathBuf,
    // Dropped after `instance` is removed by our own Drop.
    _tracefs: Mount,
}

impl BioTrace {
    /// Records bios of at least `bytes_min` bytes queued to `device`; `None` where there is no tracefs.
    /// `dir` becomes a mount point.
    pub fn start(device: &Path, bytes_min: u64, dir: &Path) -> Result<Option<BioTrace>> {
        let Ok(tracefs) = Mount::with_options(Path::new("none"), "tracefs", dir, "defaults") else {
            return Ok(None);
        };
        let instance = dir
            .join("instances")
            .join(format!("cdp-tests-{}", std::process::id()));
        if std::fs::create_dir(&instance).is_err() {
            return Ok(None);
        }
        let trace = BioTrace {
            instance,
            _tracefs: tracefs,
        };
        let (major, minor) = device_number(device)?;
        let number = (u64::from(major) << 20) | u64::from(minor);
        let event = trace.instance.join("events/block/block_bio_queue");
        let filter = format!("dev == {number} && nr_sector >= {}", bytes_min / SECTOR_BYTES);
        std::fs::write(event.join("filter"), filter).context("filter the trace")?;
        std::fs::write(event.join("enable"), "1").context("start the trace")?;
        Ok(Some(trace))
    }

    /// How many bios of which size (bytes) were queued so far.
    pub fn sizes(&self) -> Result<BTreeMap<u64, u64>> {
        let text = std::fs::read_to_string(self.instance.join("trace")).context("read the trace")?;
        let mut sizes = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            // … block_bio_queue: 7,0 WS 2048 + 520520 [fio]
            let sectors = line
                .rsplit(" + ")
                .next()
                .and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
            *sizes.entry(sectors.unwrap_or(0) * SECTOR_BYTES).or_insert(0) += 1;
        }
        Ok(sizes)
    }
}

impl Drop for BioTrace {
    fn drop(&mut self) {
        let _ = std::fs::write(self.instance.join("events/block/block_bio_queue/enable"), "0");
        if let Err(error) = std::fs::remove_dir(&self.instance) {
            eprintln!("{} stays: {error}", self.instance.display());
        }
    }
}
