//! `image`: a block volume as it was at a moment, as a file or on a device.
//!
//! In this order: the target is checked, the user is asked, and only then is anything written. Before a device is written
//! over, all of the moment is read and checked: what cannot be restored leaves it as it is. A file needs no such proof: it
//! gets its name once it is whole.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant as Clock};

use anyhow::Context;
use cdp_journal::ReadError;
use cdp_journal::history::VolumeInfo;
use cdp_journal::view::{CopyError, CopyOptions, CopyReport, ExtentKind, Sink, View};
use serde::Serialize;

use super::overwrite::{confirm, protected_as, warn_if_protected};
use super::{Instant, open_volume, refuse_own_files, require_block, resolve};
use crate::args::Image;
use crate::interrupt::Interrupt;
use crate::memory;
use crate::report::Report;
use crate::target::{DeviceInProgress, DeviceTarget, FileInProgress, FileTarget, Target, TargetError};
use crate::time::Time;
use crate::units::{Bytes, Elapsed, Rate};

/// Extents are asked for in stretches of this size, so that their list stays short.
const EXTENTS_STEP_BYTES: u64 = 4 << 30;

/// What `image --json` prints.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    volume: &'a str,
    at: Time,
    seq: u64,
    bytes: u64,
    /// Bytes that came from the log; all others are zero.
    data_bytes: u64,
    to: &'a Path,
    target: &'static str,
    /// A file of that name was, or would be, replaced.
    replaces: bool,
    dry_run: bool,
    seconds: f64,
}

/// What is being restored, to where.
struct Job<'a> {
    args: &'a Image,
    report: &'a Report,
    volume: &'a VolumeInfo,
    instant: Instant,
    view: &'a View,
}

pub(crate) fn run(args: &Image, report: &Report) -> anyhow::Result<()> {
    let (store, volume) = open_volume(&args.source, &args.volume)?;
    require_block(&volume, "image")?;
    let instant = resolve(&*store, &volume, &args.at)?;
    let view = store.view(volume.id, instant.seq)?;
    refuse_own_files(&args.to, &args.source.from)?;
    let target = Target::inspect(&args.to, &volume.name, view.bytes())?;
    let job = Job {
        args,
        report,
        volume: &volume,
        instant,
        view: &view,
    };
    match target {
        Target::File(target) => job.to_file(target),
        Target::Device(target) => {
            let protected = protected_as(&args.source.from, &*store, &target)?;
            warn_if_protected(report, protected.as_ref(), &args.to);
            job.to_device(target)
        }
    }
}

impl Job<'_> {
    fn to_file(&self, target: FileTarget) -> anyhow::Result<()> {
        let replaces = target.replaces();
        if self.args.dry_run {
            self.prove(&Interrupt::catch().context("catch Ctrl-C")?)?;
            return self.tell_plan("file", replaces, target.free_bytes());
        }
        let started = Clock::now();
        let interrupt = Interrupt::catch().context("catch Ctrl-C")?;
        let free_bytes = target.free_bytes();
        let file = target
            .create(self.view.bytes())
            .map_err(|error| self.if_full(error, free_bytes))?;
        let sink = FileSink {
            file: &file,
            interrupt,
        };
        let copied = self.copy(&sink, "nothing was left behind", free_bytes)?;
        file.finish().map_err(|error| self.if_full(error, free_bytes))?;
        self.tell_done("file", replaces, copied, started.elapsed())
    }

    fn to_device(&self, target: DeviceTarget) -> anyhow::Result<()> {
        if self.args.dry_run {
            self.prove(&Interrupt::catch().context("catch Ctrl-C")?)?;
            return self.tell_plan("device", false, None);
        }
        self.confirm(&target)?;
        let beyond_bytes = target.bytes() - self.view.bytes();
        let started = Clock::now();
        let interrupt = Interrupt::catch().context("catch Ctrl-C")?;
        // Held from here on: what is written to is what was inspected.
        let device = target.open()?;
        self.prove(&interrupt)?;
        let sink = DeviceSink {
            device: &device,
            interrupt,
        };
        let left = format!(
            "{} holds a part of the image and cannot be used",
            self.args.to.display()
        );
        let copied = self.copy(&sink, &left, None)?;
        device.finish()?;
        if beyond_bytes > 0 {
            let to = self.args.to.display();
            self.report.note(format!(
                "{to} is larger: its last {} were left as they were",
                Bytes(beyond_bytes)
            ));
        }
        self.tell_done("device", false, copied, started.elapsed())
    }

    /// Asks before a device is written over.
    fn confirm(&self, target: &DeviceTarget) -> anyhow::Result<()> {
        let to = &self.args.to;
        let question = format!(
            "Write {} as it was at {} over {} ({})? All it holds now will be lost.",
            self.volume.name,
            self.instant,
            to.display(),
            Bytes(target.bytes())
        );
        confirm(self.report, self.args.yes, to, "all it holds", &question)
    }

    /// Reads and checks all of the moment.
    fn prove(&self, interrupt: &Interrupt) -> anyhow::Result<()> {
        let left = "nothing was written";
        let progress = self.report.progress("checking", self.view.bytes());
        let options = CopyOptions {
            gather_bytes_max: 0,
            ..self.options()
        };
        let checked = self
            .view
            .copy_to(&Proof(interrupt), &options, &|bytes| progress.advance(bytes));
        match checked {
            Ok(_) => Ok(()),
            Err(CopyError::Write { .. }) => Err(TargetError::Interrupted {
                left: left.to_owned(),
            }
            .into()),
            Err(error) => {
                let what = format!("restore {}; {left}", self.volume.name);
                Err(anyhow::Error::new(error).context(what))
            }
        }
    }

    fn options(&self) -> CopyOptions {
        CopyOptions {
            threads: self.args.threads.get(),
            gather_bytes_max: memory::to_gather_bytes(),
            ..CopyOptions::default()
        }
    }

    fn copy(&self, sink: &dyn Sink, left: &str, free_bytes: Option<u64>) -> anyhow::Result<CopyReport> {
        let progress = self.report.progress("restoring", self.view.bytes());
        let options = self.options();
        let copied = self
            .view
            .copy_to(sink, &options, &|bytes| progress.advance(bytes));
        progress.stage("flushing");
        copied.map_err(|error| match error {
            CopyError::Write { source, .. } if source.kind() == io::ErrorKind::Interrupted => {
                TargetError::Interrupted {
                    left: left.to_owned(),
                }
                .into()
            }
            CopyError::Write { source, .. } if free_bytes.is_some() => {
                let error = TargetError::Io {
                    action: "write",
                    path: self.args.to.clone(),
                    source,
                };
                self.if_full(error, free_bytes).into()
            }
            error @ CopyError::Write { .. } => {
                anyhow::Error::new(error).context(format!("write to {}; {left}", self.args.to.display()))
            }
            // A device may be half written by now.
            error => anyhow::Error::new(error).context(format!("restore {}; {left}", self.volume.name)),
        })
    }

    /// A full disk is told with what would have been needed.
    fn if_full(&self, error: TargetError, free_bytes: Option<u64>) -> TargetError {
        let full = matches!(&error, TargetError::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded));
        match (full, self.data_bytes()) {
            (true, Ok(needed_bytes)) => {
                let path = self.args.to.clone();
                TargetError::Full {
                    path,
                    needed_bytes,
                    free_bytes: free_bytes.unwrap_or(0),
                }
            }
            _ => error,
        }
    }

    /// Bytes of the view that are not known to be zero.
    fn data_bytes(&self) -> Result<u64, ReadError> {
        let (mut at, end, mut data_bytes) = (0, self.view.bytes(), 0);
        while at < end {
            let step_end = end.min(at + EXTENTS_STEP_BYTES);
            let extents = self.view.extents(at..step_end)?;
            let data = extents.iter().filter(|extent| extent.kind == ExtentKind::Data);
            data_bytes += data.map(|extent| extent.len).sum::<u64>();
            at = step_end;
        }
        Ok(data_bytes)
    }

    fn tell_plan(&self, target: &'static str, replaces: bool, free_bytes: Option<u64>) -> anyhow::Result<()> {
        let data_bytes = self.data_bytes()?;
        if free_bytes.is_some_and(|free| free < data_bytes) {
            let free = Bytes(free_bytes.unwrap_or(0));
            self.report.warn(format!(
                "{free} are free there, and up to {} are needed",
                Bytes(data_bytes)
            ));
        }
        if self.args.json {
            return self
                .report
                .json(&self.outcome(target, replaces, data_bytes, Duration::ZERO));
        }
        self.report.out(format!(
            "would write {} as it was at {} {} {}{}: {}, {} of it data\n",
            self.volume.name,
            self.instant,
            if target == "device" { "over" } else { "to" },
            self.args.to.display(),
            if replaces {
                " (replacing the file that is there)"
            } else {
                ""
            },
            Bytes(self.view.bytes()),
            Bytes(data_bytes),
        ))
    }

    fn tell_done(
        &self,
        target: &'static str,
        replaces: bool,
        copied: CopyReport,
        elapsed: Duration,
    ) -> anyhow::Result<()> {
        if self.args.json {
            return self
                .report
                .json(&self.outcome(target, replaces, copied.data_bytes, elapsed));
        }
        let bytes = self.view.bytes();
        self.report.out(format!(
            "{}: {} as it was at {}, {} ({} of it data) in {}, {}\n",
            self.args.to.display(),
            self.volume.name,
            self.instant,
            Bytes(bytes),
            Bytes(copied.data_bytes),
            Elapsed(elapsed),
            Rate { bytes, elapsed },
        ))
    }

    fn outcome(
        &self,
        target: &'static str,
        replaces: bool,
        data_bytes: u64,
        elapsed: Duration,
    ) -> Outcome<'_> {
        Outcome {
            volume: &self.volume.name,
            at: self.instant.at,
            seq: self.instant.seq.get(),
            bytes: self.view.bytes(),
            data_bytes,
            to: &self.args.to,
            target,
            replaces,
            dry_run: self.args.dry_run,
            seconds: elapsed.as_secs_f64(),
        }
    }
}

/// Takes what was read and checked as it comes, and leaves it; what fails is Ctrl-C.
struct Proof<'a>(&'a Interrupt);

impl Sink for Proof<'_> {
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        self.0.check()
    }

    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        self.0.check()
    }
}

/// A fresh file: zeroes are there already.
struct FileSink<'a> {
    file: &'a FileInProgress,
    interrupt: Interrupt,
}

impl Sink for FileSink<'_> {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.interrupt.check()?;
        self.file.write_at(offset, data)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.interrupt.check()?;
        self.file.leave_hole(offset, len)
    }

    fn go_on(&self) -> io::Result<()> {
        self.interrupt.check()
    }
}

/// A device: what lies there now is overwritten, zeroes included.
struct DeviceSink<'a> {
    device: &'a DeviceInProgress,
    interrupt: Interrupt,
}

impl Sink for DeviceSink<'_> {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.interrupt.check()?;
        self.device.write_at(offset, data)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.interrupt.check()?;
        self.device.zero(offset, len)
    }

    fn go_on(&self) -> io::Result<()> {
        self.interrupt.check()
    }
}
