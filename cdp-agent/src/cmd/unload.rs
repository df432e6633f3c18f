//! `cdp-agent unload`: removes the probe that goes on without an agent.

use std::io::Write as _;
use std::path::Path;

use anyhow::{bail, ensure};

use crate::capture;

/// Unloads the pinned probe of the agent with this store; of every agent that does not run, without one.
pub(crate) fn run(store: Option<&Path>) -> anyhow::Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "cdp-agent unload needs root: run it with sudo"
    );
    let mut out = std::io::stdout().lock();
    let wanted = store.map(std::path::absolute).transpose()?;
    // What was never finished, or is of another version, is known by its agent only.
    let wanted_agent = match &wanted {
        Some(store) => cdp_journal::store::id_of(store)?,
        None => None,
    };
    let mut unloaded = 0;
    for pinned in capture::pinned() {
        let is_of_wanted_agent = wanted_agent.is_some() && pinned.agent() == wanted_agent;
        let of_store = pinned
            .store()
            .or_else(|| wanted.clone().filter(|_| is_of_wanted_agent));
        if wanted.is_some() && of_store != wanted {
            continue;
        }
        let name = of_store.as_ref().map_or_else(
            || "another version".to_owned(),
            |store| store.display().to_string(),
        );
        // Its store may be seen in its own mount namespace only.
        let seized = pinned.seize();
        let is_running = seized.is_none()
            || of_store.is_some_and(|store| cdp_journal::store::is_locked(&store).unwrap_or(false));
        if is_running {
            if wanted.is_some() {
                bail!("an agent runs on {name}: stop it first");
            }
            writeln!(out, "left the probe of {name}: its agent runs")?;
            continue;
        }
        pinned.remove()?;
        unloaded += 1;
        writeln!(
            out,
            "unloaded the probe of {name}: writes from now on are not captured"
        )?;
    }
    if unloaded == 0 {
        writeln!(out, "no probe to unload")?;
    }
    Ok(())
}
