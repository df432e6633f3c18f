//! `cdp-journal`, as a user runs it.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::agent::binary;
use crate::process::{Background, Cmd, cmd, poll_until, tail};
use crate::scene::Scene;

const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// A journal server on loopback; stopped when the guard goes.
#[derive(Debug)]
pub struct Server {
    program: PathBuf,
    store: PathBuf,
    address: String,
    log: PathBuf,
    process: Option<Background>,
}

impl Server {
    /// Starts one whose folder is `store`, on a port that nobody uses.
    pub fn start(scene: &Scene, store: &Path) -> Result<Server> {
        let free = UdpSocket::bind("127.0.0.1:0").context("find a free port")?;
        let mut server = Server {
            program: binary("cdp-journal")?,
            store: store.to_owned(),
            address: free.local_addr()?.to_string(),
            log: scene.log("server"),
            process: None,
        };
        drop(free);
        server.run()?;
        Ok(server)
    }

    /// Starts it where it was.
    pub fn run(&mut self) -> Result<()> {
        let command = self.command("serve").args(["--listen", &self.address]);
        let mut process = command.spawn(&self.log)?;
        poll_until("the server to answer", START_TIMEOUT, || {
            if let Some(code) = process.try_code()? {
                anyhow::bail!("the server ended with code {code}\n{}", tail(&self.log, 20));
            }
            let asked = self.command("status").arg("--json").run()?;
            Ok((asked.code == 0 && asked.stdout.contains("\"running\": true")).then_some(()))
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// `cdp-journal COMMAND --store DIR`, to be given the rest.
    pub fn command(&self, command: &str) -> Cmd {
        cmd(&self.program).arg(command).arg("--store").arg(&self.store)
    }

    /// HOST:PORT.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its folder.
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// A token for `agent`; `more` may be `--restore`.
    pub fn token(&self, agent: &str, more: &[&str]) -> Result<String> {
        self.command("token").args(["--agent", agent]).args(more).output()
    }

    /// `PROGRAM enroll` with a token, into `identity`.
    pub fn enroll(&self, program: &str, token: &str, identity: &Path) -> Result<Cmd> {
        Ok(cmd(binary(program)?)
            .args([
                "enroll",
                "--server",
                &self.address,
                "--token",
                token,
                "--identity",
            ])
            .arg(identity))
    }

    /// Enrols agent `agent` and its restores; gives back the two folders of certificates.
    pub fn enroll_both(&self, scene: &Scene, agent: &str) -> Result<(PathBuf, PathBuf)> {
        let (ship, read) = (
            scene.path(&format!("{agent}-ship")),
            scene.path(&format!("{agent}-read")),
        );
        let token = self.token(agent, &[])?;
        self.enroll("cdp-agent", &token, &ship)?.run()?.success()?;
        let token = self.token(agent, &["--restore"])?;
        self.enroll("cdp-restore", &token, &read)?.run()?.success()?;
        Ok((ship, read))
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("a running server")?;
        process.stop(Signal::KILL, STOP_TIMEOUT).map(drop)
    }

    /// Asks it to stop, and insists on a clean end.
    pub fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("a running server")?;
        let code = process.stop(Signal::TERM, STOP_TIMEOUT)?;
        ensure!(
            code == 0,
            "the server's exit code on SIGTERM was {code}\n{}",
            tail(&self.log, 40)
        );
        Ok(())
    }
}
