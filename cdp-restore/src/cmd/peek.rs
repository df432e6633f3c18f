//! A moment that a command mounts for itself, to look into.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use cdp_journal::when::When;
use tempfile::TempDir;

use super::mount::{Mounting, ServerFailed};
use super::{Damaged, Instant};
use crate::args::{From, LayerBounds, Mount};
use crate::exit::Exit;
use crate::report::Report;

/// A moment, mounted at a folder of its own; unmounted when it goes.
pub(super) struct Peek {
    mounting: Option<Mounting>,
    folder: TempDir,
}

/// A file system in it.
pub(super) struct PeekPart {
    /// Of a partition.
    pub(super) number: Option<u32>,
    pub(super) dir: PathBuf,
    /// The kernel's name of it.
    pub(super) kind: String,
    /// Where it begins on the volume.
    pub(super) offset: u64,
}

impl PeekPart {
    /// What is put before the paths in it.
    pub(super) fn prefix(&self) -> String {
        self.number
            .map_or_else(String::new, |number| format!("p{number}/"))
    }
}

/// Which moment is to be looked into, and how.
#[derive(Clone, Copy)]
pub(super) struct Peeking<'a> {
    source: &'a From,
    volume: &'a str,
    layer: &'a LayerBounds,
    is_writable: bool,
    report: &'a Report,
}

impl<'a> Peeking<'a> {
    /// At moments of a volume, read-only.
    pub(super) fn new(source: &'a From, volume: &'a str, layer: &'a LayerBounds, report: &'a Report) -> Self {
        Peeking {
            source,
            volume,
            layer,
            is_writable: false,
            report,
        }
    }

    /// The same; what is written goes to the layer.
    pub(super) fn writable(self) -> Self {
        Peeking {
            is_writable: true,
            ..self
        }
    }

    /// Mounts a moment.
    pub(super) fn at(&self, at: When) -> anyhow::Result<Peek> {
        let folder = tempfile::Builder::new().prefix("cdp-restore-").tempdir();
        let folder = folder.context("make a folder to mount at")?;
        let args = Mount {
            source: self.source.clone(),
            volume: self.volume.to_owned(),
            at,
            dir: folder.path().to_owned(),
            rw: self.is_writable,
            raw: false,
            layer: self.layer.clone(),
            json: false,
            serve_in: None,
        };
        let mounting = Mounting::set_up(&args, args.arguments(), self.report)?;
        Ok(Peek {
            mounting: Some(mounting),
            folder,
        })
    }

    /// Mounts a moment for what is of use and not needed; why not, if that cannot be.
    pub(super) fn try_at(&self, at: When) -> anyhow::Result<Result<Peek, String>> {
        let failed = match self.at(at) {
            Ok(peek) => return Ok(Ok(peek)),
            Err(error) => error,
        };
        // Damage is never left out.
        let code = failed.downcast_ref::<ServerFailed>().map(|failed| failed.code);
        match code == Some(Exit::Damaged.code()) || Exit::of(&failed) == Exit::Damaged {
            true => Err(failed),
            false => Ok(Err(format!("{failed:#}"))),
        }
    }
}

impl Peek {
    /// Where it is mounted.
    pub(super) fn dir(&self) -> &Path {
        self.folder.path()
    }

    /// The file systems in it.
    pub(super) fn parts(&self) -> Vec<PeekPart> {
        self.mounting.as_ref().map_or_else(Vec::new, Mounting::parts)
    }

    /// What was found in it and is not mounted; nothing if that is nothing.
    pub(super) fn left_out(&self) -> Option<String> {
        let left_out = self.mounting.as_ref().map(Mounting::left_out).unwrap_or_default();
        (!left_out.is_empty()).then(|| left_out.join(", "))
    }

    /// Which moment it is.
    pub(super) fn instant(&self) -> Option<Instant> {
        self.mounting.as_ref().and_then(Mounting::instant)
    }

    /// Unmounts it; which requests failed meanwhile.
    pub(super) fn close(mut self) -> anyhow::Result<String> {
        self.mounting
            .take()
            .map_or(Ok(String::new()), Mounting::take_down)
    }

    /// Unmounts it; `outcome` is what was done with it, and fails for the reason that the history gives, if it does.
    pub(super) fn settle<T>(self, outcome: anyhow::Result<T>) -> anyhow::Result<T> {
        let trouble = self.close()?;
        // What failed and was not missed, the kernel has read ahead.
        if trouble.is_empty() || outcome.is_ok() {
            return outcome;
        }
        let why = format!("not all of it could be read: {trouble}");
        match trouble.contains("damaged at byte") {
            true => Err(Damaged(why).into()),
            false => bail!(why),
        }
    }
}

impl Drop for Peek {
    fn drop(&mut self) {
        if let Some(mounting) = self.mounting.take() {
            // There is another error to tell.
            let _ = mounting.take_down();
        }
    }
}
