//! What commands that write over a device have in common: who protects it, and is it meant.

use std::io::{self, IsTerminal};
use std::path::Path;

use anyhow::{Context, bail};
use cdp_journal::history::VolumeInfo;
use cdp_journal::store::Archive;

use crate::report::Report;
use crate::source::Source;
use crate::target::{DeviceNumber, DeviceTarget};

/// The volume that a running agent protects the device as, into this very store. Of a journal server nothing can be
/// said: its volumes have the paths of other hosts.
pub(super) fn protected_as(
    source: &Source,
    store: &dyn Archive,
    target: &DeviceTarget,
) -> anyhow::Result<Option<VolumeInfo>> {
    if source.folder().is_none() || !store.writer_alive().context("ask whether an agent is running")? {
        return Ok(None);
    }
    let same = |volume: &VolumeInfo| DeviceNumber::of(Path::new(&volume.path)) == Some(target.number());
    Ok(store.volumes()?.into_iter().find(same))
}

/// Says so if the device is protected.
pub(super) fn warn_if_protected(report: &Report, volume: Option<&VolumeInfo>, to: &Path) {
    if let Some(volume) = volume {
        let (to, name) = (to.display(), &volume.name);
        report.warn(format!(
            "{to} is protected as {name}: this restore becomes a part of its history"
        ));
    }
}

/// Asks `question` before a device is written over, unless that was said with `--yes`. `loss` says what would be lost.
pub(super) fn confirm(
    report: &Report,
    yes: bool,
    to: &Path,
    loss: &str,
    question: &str,
) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    let to = to.display();
    if !io::stdin().is_terminal() {
        bail!("{to} is a device, and {loss} would be lost; say --yes if that is meant");
    }
    if !report.confirm(question).context("ask whether to go on")? {
        bail!("not confirmed; nothing was written to {to}");
    }
    Ok(())
}
