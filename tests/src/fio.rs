//! fio, the load generator.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::process::{Background, Cmd, cmd};

/// Writes `bytes` to random places of a device, past the page cache, four requests at a time.
pub fn write_randomly(device: &Path, name: &str, bytes: u64, seed: u64, dir: &Path) -> Result<()> {
    let fio = Fio::new(name, device, "randwrite")
        .option("bs", "16k")
        .option("io_size", bytes);
    fio.option("size", "100%").direct(4).seed(seed).run(dir).map(drop)
}

/// A job of fio.
#[derive(Clone, Debug)]
pub struct Fio {
    name: String,
    args: Vec<String>,
    side: Side,
}

/// What of a job is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Reads,
    Writes,
}

impl Side {
    /// What a job of pattern `rw` is about.
    fn of(rw: &str) -> Side {
        if rw.ends_with("read") {
            Side::Reads
        } else {
            Side::Writes
        }
    }

    /// As fio's report names it.
    fn key(self) -> &'static str {
        match self {
            Side::Reads => "read",
            Side::Writes => "write",
        }
    }
}

impl Fio {
    /// A job that writes to `target`, a file or a device, in the pattern `rw` (`write`, `randwrite`, …), or with `read`
    /// and `randread` only reads it; what is reported is of that.
    pub fn new(name: &str, target: &Path, rw: &str) -> Fio {
        let fio = Fio {
            name: name.to_owned(),
            args: Vec::new(),
            side: Side::of(rw),
        };
        fio.option("filename", target.display()).option("rw", rw)
    }

    /// Sets an option, as in a job file.
    pub fn option(mut self, key: &str, value: impl std::fmt::Display) -> Fio {
        self.args.push(format!("--{key}={value}"));
        self
    }

    /// Direct I/O with `depth` requests in flight that never overlap: the order in which a device carries
    /// out overlapping ones is nobody's to know.
    pub fn direct(self, depth: u32) -> Fio {
        let engine = if depth > 1 { "libaio" } else { "psync" };
        let fio = self
            .option("direct", 1)
            .option("ioengine", engine)
            .option("iodepth", depth);
        if depth > 1 {
            fio.option("serialize_overlap", 1)
        } else {
            fio
        }
    }

    /// Seeds its random choices; its data cannot be compressed, as disks of encrypted or packed data.
    pub fn seed(self, seed: u64) -> Fio {
        self.option("randseed", seed % (1 << 31))
            .option("refill_buffers", 1)
    }

    fn command(&self, report: &Path) -> Cmd {
        cmd("fio")
            .arg(format!("--name={}", self.name))
            .args(&self.args)
            .args(["--output-format=json", "--group_reporting"])
            .arg(format!("--output={}", report.display()))
            .timeout(Duration::from_secs(600))
    }

    /// Runs it to its end; its report is kept in folder `dir` meanwhile.
    pub fn run(&self, dir: &Path) -> Result<FioReport> {
        let report = dir.join(format!("fio-{}.json", self.name));
        self.command(&report).run()?.success()?;
        FioReport::read(&report, self.side)
    }

    /// Starts it.
    pub fn start(&self, dir: &Path) -> Result<FioRun> {
        let report = dir.join(format!("fio-{}.json", self.name));
        let process = self
            .command(&report)
            .spawn(&dir.join(format!("fio-{}.log", self.name)))?;
        Ok(FioRun {
            process,
            report,
            side: self.side,
        })
    }
}

/// A running fio; ended when the guard goes.
#[derive(Debug)]
pub struct FioRun {
    process: Background,
    report: PathBuf,
    side: Side,
}

impl FioRun {
    /// Is it still at work?
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.process.try_code()?.is_none())
    }

    /// Waits for its end.
    pub fn finish(mut self, timeout: Duration) -> Result<FioReport> {
        self.process.wait_success(timeout)?;
        FioReport::read(&self.report, self.side)
    }

    /// Ends it now, its work half done.
    pub fn stop(mut self) -> Result<()> {
        if self.is_running()? {
            self.process
                .stop(rustix::process::Signal::TERM, Duration::from_secs(30))?;
        }
        Ok(())
    }
}

/// What fio measured of writing, or of reading where that is the job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FioReport {
    /// Bytes written (read).
    pub bytes: u64,
    /// Bytes written (read) each second.
    pub bytes_per_second: f64,
    /// Requests each second.
    pub iops: f64,
    /// Median time of a request, in microseconds.
    pub latency_p50_us: f64,
    /// Time that 99 of 100 requests stayed under, in microseconds.
    pub latency_p99_us: f64,
}

impl FioReport {
    fn read(path: &Path, side: Side) -> Result<FioReport> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let _ = std::fs::remove_file(path);
        // A note of fio's may stand before the JSON.
        let json = text.find('{').map_or("", |at| &text[at..]);
        let report: Value = serde_json::from_str(json).with_context(|| format!("fio's report: {text}"))?;
        let job = &report["jobs"][0];
        ensure!(job["error"] == 0, "fio's error {}", job["error"]);
        let of = &job[side.key()];
        let number = |key: &str| of[key].as_f64().with_context(|| format!("{key} in fio's report"));
        let percentile = |key: &str| of["clat_ns"]["percentile"][key].as_f64().unwrap_or(0.0) / 1000.0;
        Ok(FioReport {
            bytes: number("io_bytes")? as u64,
            bytes_per_second: number("bw_bytes")?,
            iops: number("iops")?,
            latency_p50_us: percentile("50.000000"),
            latency_p99_us: percentile("99.000000"),
        })
    }
}
