//! `cdp-journal`, as a user runs it.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::agent::binary;
use crate::network::Network;
use crate::process::{Background, Cmd, cmd, poll_until, tail};
use crate::scene::Scene;

const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// A port that nobody uses.
fn free_address() -> Result<String> {
    let free = UdpSocket::bind("127.0.0.1:0").context("find a free port")?;
    Ok(free.local_addr()?.to_string())
}

/// A journal server, on loopback or on a host of its own; stopped when the guard goes.
#[derive(Debug)]
pub struct Server {
    program: PathBuf,
    store: PathBuf,
    address: String,
    log: PathBuf,
    process: Option<Background>,
    network: Option<Rc<Network>>,
    upstream: Option<Upstream>,
}

/// What a server follows.
#[derive(Clone, Debug)]
struct Upstream {
    address: String,
    identity: PathBuf,
}

impl Server {
    /// Starts one whose folder is `store`, on a port that nobody uses.
    pub fn start(scene: &Scene, store: &Path) -> Result<Server> {
        Server::listening(scene, store, free_address()?, None, None)
    }

    /// Starts one that follows `upstream`, enrolled there as `name`.
    pub fn following(scene: &Scene, store: &Path, upstream: &Server, name: &str) -> Result<Server> {
        let identity = scene.path(&format!("{name}-identity"));
        let token = upstream.token(name, &["--follow"])?;
        upstream
            .enroll("cdp-journal", &token, &identity)?
            .run()?
            .success()?;
        let upstream = Upstream {
            address: upstream.address.clone(),
            identity,
        };
        Server::listening(scene, store, free_address()?, None, Some(upstream))
    }

    /// Starts one on the server's host of `network`.
    pub fn start_in(scene: &Scene, store: &Path, network: &Rc<Network>) -> Result<Server> {
        Server::listening(
            scene,
            store,
            network.server_address(),
            Some(Rc::clone(network)),
            None,
        )
    }

    fn listening(
        scene: &Scene,
        store: &Path,
        address: String,
        network: Option<Rc<Network>>,
        upstream: Option<Upstream>,
    ) -> Result<Server> {
        let mut server = Server {
            program: binary("cdp-journal")?,
            store: store.to_owned(),
            address,
            log: scene.log("server"),
            process: None,
            network,
            upstream,
        };
        server.run()?;
        Ok(server)
    }

    /// Starts it where it was.
    pub fn run(&mut self) -> Result<()> {
        let mut command = self.command("serve").args(["--listen", &self.address]);
        if let Some(upstream) = &self.upstream {
            command = command.args(["--upstream", &upstream.address]);
            command = command.arg("--identity").arg(&upstream.identity);
        }
        if let Some(network) = &self.network {
            command = network.server.enter(command);
        }
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

    /// What `status --json` tells.
    pub fn status(&self) -> Result<serde_json::Value> {
        let text = self.command("status").arg("--json").output()?;
        serde_json::from_str(&text).with_context(|| format!("status --json: {text}"))
    }

    /// The last record of `agent` that is durable here.
    pub fn durable_seq(&self, agent: &str) -> Result<u64> {
        let status = self.status()?;
        let mut agents = status["agents"].as_array().into_iter().flatten();
        let found = agents.find(|found| found["agent"] == agent);
        found
            .and_then(|found| found["durable_seq"].as_u64())
            .with_context(|| format!("no durable_seq of {agent} in {status}"))
    }

    /// A token for `agent`; `more` may be `--restore` or `--follow`.
    pub fn token(&self, agent: &str, more: &[&str]) -> Result<String> {
        self.command("token").args(["--agent", agent]).args(more).output()
    }

    /// `PROGRAM enroll` with a token, into `identity`.
    pub fn enroll(&self, program: &str, token: &str, identity: &Path) -> Result<Cmd> {
        let command = cmd(binary(program)?)
            .args([
                "enroll",
                "--server",
                &self.address,
                "--token",
                token,
                "--identity",
            ])
            .arg(identity);
        Ok(match &self.network {
            Some(network) => network.agent.enter(command),
            None => command,
        })
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

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().context("a running server")?.signal(signal)
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
