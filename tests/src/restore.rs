//! `cdp-restore`, as a user runs it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde::Deserialize;

use crate::agent::binary;
use crate::network::Host;
use crate::process::{Cmd, Outcome, cmd, poll_until};
use crate::scene::Scene;

const NBD_TIMEOUT: Duration = Duration::from_secs(60);

/// Exit code: done.
pub const DONE: i32 = 0;
/// Exit code: failed, and the message says why.
pub const FAILED: i32 = 1;
/// Exit code: the command line was wrong.
pub const USAGE: i32 = 2;
/// Exit code: that moment cannot be restored exactly.
pub const NOT_EXACT: i32 = 3;
/// Exit code: what was read does not match its checksum.
pub const DAMAGED: i32 = 4;

/// What `cdp-restore points --json` tells.
#[derive(Clone, Debug, Deserialize)]
pub struct Points {
    /// The volume.
    pub volume: String,
    /// `block` or `tree`.
    pub kind: String,
    /// Its size.
    pub bytes: u64,
    /// The stretches in which every moment can be restored.
    pub exact: Vec<Exact>,
    /// The stretches between them.
    pub gaps: Vec<Gap>,
    /// Named moments.
    pub bookmarks: Vec<Bookmark>,
}

/// A stretch of history in which every moment can be restored.
#[derive(Clone, Debug, Deserialize)]
pub struct Exact {
    /// Its first moment.
    pub from: String,
    /// Its last moment.
    pub to: String,
    /// Its first record.
    pub from_seq: u64,
    /// Its last record.
    pub to_seq: u64,
}

/// A stretch of history that is not exact.
#[derive(Clone, Debug, Deserialize)]
pub struct Gap {
    /// The last exact moment before it.
    pub from: Option<String>,
    /// The first exact moment after it; nothing while it is open.
    pub to: Option<String>,
    /// Why.
    pub cause: String,
}

/// A named moment.
#[derive(Clone, Debug, Deserialize)]
pub struct Bookmark {
    /// Its name.
    pub label: String,
    /// When it was.
    pub at: String,
    /// Which record it is.
    pub seq: u64,
}

/// Reads the history in one store.
#[derive(Clone, Debug)]
pub struct Restore {
    program: PathBuf,
    source: Vec<OsString>,
    host: Option<Host>,
}

impl Restore {
    /// From the store in folder `store`.
    pub fn from(store: &Path) -> Result<Restore> {
        Ok(Restore {
            program: binary("cdp-restore")?,
            source: vec![store.into()],
            host: None,
        })
    }

    /// From the journal server at `address`, with the certificate in folder `identity`.
    pub fn from_server(address: &str, identity: &Path) -> Result<Restore> {
        Ok(Restore {
            program: binary("cdp-restore")?,
            source: vec![address.into(), "--identity".into(), identity.into()],
            host: None,
        })
    }

    /// The same, on a host with a network of its own.
    pub fn on(self, host: Host) -> Restore {
        Restore {
            host: Some(host),
            ..self
        }
    }

    /// `cdp-restore COMMAND --from STORE`, to be given the rest.
    pub fn command(&self, command: &str) -> Cmd {
        let command = cmd(&self.program)
            .arg(command)
            .arg("--from")
            .args(&self.source)
            .timeout(Duration::from_secs(300));
        match self.host {
            Some(host) => host.enter(command),
            None => command,
        }
    }

    /// `image VOLUME --at WHEN --to TARGET`.
    pub fn image(&self, volume: &str, when: &str, target: &Path) -> Result<Outcome> {
        self.command("image")
            .args([volume, "--at", when, "--to"])
            .arg(target)
            .run()
    }

    /// `image … --yes`, as a device needs it.
    pub fn image_over(&self, volume: &str, when: &str, target: &Path) -> Result<Outcome> {
        self.command("image")
            .args([volume, "--at", when, "--yes", "--to"])
            .arg(target)
            .run()
    }

    /// `points VOLUME --json`.
    pub fn points(&self, volume: &str) -> Result<Points> {
        let text = self.command("points").args([volume, "--json"]).output()?;
        serde_json::from_str(&text).with_context(|| format!("points --json: {text}"))
    }

    /// Serves `VOLUME` by `nbd` at a socket of the scene, with more arguments, while `use_it` is given the URI.
    pub fn serve_nbd(
        &self,
        scene: &Scene,
        volume: &str,
        more: &[&str],
        use_it: impl FnOnce(&str) -> Result<()>,
    ) -> Result<()> {
        let socket = scene.path("nbd.sock");
        let listen = format!("unix:{}", socket.display());
        let command = self.command("nbd").args([volume, "--listen", &listen]).args(more);
        let mut server = command.spawn(&scene.log("nbd"))?;
        poll_until("the NBD server to listen", NBD_TIMEOUT, || {
            let code = server.try_code()?;
            ensure!(code.is_none(), "it ended with code {code:?}");
            Ok(socket.exists().then_some(()))
        })?;
        use_it(&format!("nbd+unix:///{volume}?socket={}", socket.display())).context("over NBD")?;
        let code = server.stop(Signal::TERM, NBD_TIMEOUT)?;
        ensure!(code == 0, "the NBD server's exit code on SIGTERM was {code}");
        Ok(())
    }

    /// `verify`, of everything.
    pub fn verify(&self) -> Result<Outcome> {
        self.command("verify").run()
    }
}
