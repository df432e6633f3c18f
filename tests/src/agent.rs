//! `cdp-agent`, as a user runs it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde::Deserialize;

use crate::network::Host;
use crate::process::{Background, Cmd, Outcome, cmd, poll_until, tail};
use crate::scene::Scene;

/// How long the first copy of a test's volumes may take.
pub const PROTECT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long an agent may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

static BINARIES: OnceLock<PathBuf> = OnceLock::new();

/// Takes the product's programs from `folder` from now on, unless the environment names others. The first
/// call counts.
pub fn use_binaries_in(folder: &Path) {
    BINARIES.get_or_init(|| folder.to_owned());
}

/// A program of the product: what `CDP_AGENT`, `CDP_JOURNAL` or `CDP_RESTORE` names, else from the folder of
/// [`use_binaries_in`], else beside the test's own build, else the release build.
pub fn binary(name: &str) -> Result<PathBuf> {
    let variable = name.to_uppercase().replace('-', "_");
    if let Some(path) = std::env::var_os(&variable) {
        return Ok(path.into());
    }
    let mut tried: Vec<PathBuf> = BINARIES
        .get()
        .map(|folder| folder.join(name))
        .into_iter()
        .collect();
    // A test runs from target/PROFILE/deps.
    let own = std::env::current_exe().context("where this program lies")?;
    tried.extend(own.ancestors().nth(2).map(|folder| folder.join(name)));
    // At run time, not `env!`: clones that share a target folder share this code.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.or_else(|| Some(manifest?.join("../target")));
    tried.extend(target.map(|folder| folder.join("release").join(name)));
    let found = tried.iter().find(|path| path.is_file()).cloned();
    found.with_context(|| {
        format!("{name} is not built (cargo build --release -p {name}); looked for {tried:?}")
    })
}

/// What `cdp-agent status --json` tells.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// The agent's identity.
    pub agent: String,
    /// The boot of the host.
    pub boot_id: String,
    /// The newest record's place.
    pub seq: u64,
    /// The newest durable record's place.
    pub durable_seq: u64,
    /// Bytes of the log.
    pub store_bytes: u64,
    /// How full the store is; nothing where no agent runs.
    pub store: Option<StoreStatus>,
    /// Every volume.
    pub volumes: Vec<VolumeStatus>,
    /// Every server that the agent ships to.
    pub targets: Vec<TargetStatus>,
    /// The limit on what is sent.
    pub rate_bytes_per_s: Option<u64>,
    /// The limit on what is read back.
    pub rate_readback_bytes_per_s: Option<u64>,
    /// The server that reading back waits for.
    pub readback_waits_for: Option<String>,
}

/// One server in [`Status`].
#[derive(Clone, Debug, Deserialize)]
pub struct TargetStatus {
    /// Its address.
    pub server: String,
    /// `connected`, `connecting` or `refused`.
    pub state: String,
    /// The last record known to be durable there.
    pub acked_seq: u64,
    /// Age of the oldest record that is not.
    pub lag_seconds: f64,
    /// Bytes sent to it.
    pub sent_bytes: u64,
    /// Bytes that are still to be sent or acknowledged.
    pub backlog_bytes: u64,
    /// How long those will take, where that is known.
    pub catch_up_seconds: Option<f64>,
    /// Why it is not connected.
    pub why: Option<String>,
}

impl Status {
    /// The volume `name`.
    pub fn volume(&self, name: &str) -> Result<&VolumeStatus> {
        let found = self.volumes.iter().find(|volume| volume.name == name);
        found.with_context(|| format!("no volume {name} in {self:?}"))
    }
}

/// The store in [`Status`].
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct StoreStatus {
    /// Bytes of log and index.
    pub used_bytes: u64,
    /// It is full when it has this many.
    pub limit_bytes: u64,
    /// A warning was given.
    pub is_nearly_full: bool,
}

/// Writes that could not be captured, by why.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Losses {
    /// The ring had no room.
    pub ring_full: u64,
    /// The device failed them.
    pub failed: u64,
    /// They came while the store was full.
    pub store_full: u64,
}

/// One volume in [`Status`].
#[derive(Clone, Debug, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// `block` or `tree`.
    pub kind: String,
    /// The device.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// `seeding`, `protected`, `resyncing` or `stopped`.
    pub state: String,
    /// How much of the first copy is done, 0 to 1.
    pub progress: f64,
    /// Bytes captured since the agent started.
    pub captured_bytes: u64,
    /// Writes captured since the agent started.
    pub captured_writes: u64,
    /// Writes that could not be captured.
    pub dropped_writes: u64,
    /// The same by why.
    pub losses: Losses,
    /// Since when history is exact; nothing while it is not.
    pub exact_since: Option<String>,
    /// Gaps so far.
    pub gaps: u64,
    /// Why the present gap is open.
    pub gap_cause: Option<String>,
    /// The last exact time before it.
    pub gap_since: Option<String>,
    /// Bytes still to be read back.
    pub dirty_bytes: u64,
    /// Bytes read back since the agent started.
    pub readback_bytes: u64,
    /// Blocks that were compared with the device.
    pub compared_blocks: u64,
    /// Blocks that the device took otherwise than they were seen, and that were corrected.
    pub corrected_blocks: u64,
}

/// How an agent is to be started.
#[derive(Clone, Debug)]
pub struct AgentPlan {
    program: PathBuf,
    store: PathBuf,
    args: Vec<String>,
    log: PathBuf,
    probe: Arc<PinnedProbe>,
    /// What is done first in a mount namespace of its own, and to which path.
    namespace: Option<(&'static str, PathBuf)>,
    host: Option<Host>,
}

/// Where the probes of agents are pinned.
pub const PINS: &str = "/sys/fs/bpf/cdp-agent";

/// The probe that an agent with this store leaves in the kernel; unloaded when the last plan of it goes.
#[derive(Debug)]
struct PinnedProbe {
    program: PathBuf,
    store: PathBuf,
}

impl Drop for PinnedProbe {
    fn drop(&mut self) {
        if Path::new(PINS).exists() {
            let unload = cmd(&self.program).arg("unload").arg("--store").arg(&self.store);
            let _ = unload.run();
        }
    }
}

impl AgentPlan {
    /// An agent with its store in folder `store`, its log in the scene.
    pub fn new(scene: &Scene, store: &Path) -> Result<AgentPlan> {
        let log = scene.log("agent");
        let program = binary("cdp-agent")?;
        let probe = Arc::new(PinnedProbe {
            program: program.clone(),
            store: store.to_owned(),
        });
        Ok(AgentPlan {
            program,
            store: store.to_owned(),
            args: Vec::new(),
            log,
            probe,
            namespace: None,
            host: None,
        })
    }

    /// Unloads the probe that a stopped agent left.
    pub fn unload(&self) -> Result<()> {
        let probe = &self.probe;
        cmd(&probe.program)
            .arg("unload")
            .arg("--store")
            .arg(&probe.store)
            .run()?
            .success()
            .map(drop)
    }

    /// The same, protecting `device` as volume `name`.
    pub fn volume(self, name: &str, device: &Path) -> AgentPlan {
        self.flag("--volume", &format!("{name}={}", device.display()))
    }

    /// The same with one more flag of `run`.
    pub fn flag(mut self, flag: &str, value: &str) -> AgentPlan {
        self.args.extend([flag.to_owned(), value.to_owned()]);
        self
    }

    /// The same, shipping to `server` with the certificate in folder `identity`.
    pub fn ships_to(self, server: &str, identity: &Path) -> AgentPlan {
        self.flag("--server", server)
            .flag("--identity", &identity.display().to_string())
    }

    /// The same with its log in another file.
    pub fn log(self, log: PathBuf) -> AgentPlan {
        AgentPlan { log, ..self }
    }

    /// The same, in a mount name space of its own in which the kernel's boot id is what the file holds: what the
    /// agent sees after a reboot.
    pub fn boot_id(self, file: &Path) -> AgentPlan {
        AgentPlan {
            namespace: Some((
                "mount --bind \"$0\" /proc/sys/kernel/random/boot_id",
                file.to_owned(),
            )),
            ..self
        }
    }

    /// The same, in a mount name space of its own in which the folder is empty.
    pub fn blind_to(self, folder: &Path) -> AgentPlan {
        AgentPlan {
            namespace: Some(("mount -t tmpfs none \"$0\"", folder.to_owned())),
            ..self
        }
    }

    /// The same, on a host with a network of its own.
    pub fn on(self, host: Host) -> AgentPlan {
        AgentPlan {
            host: Some(host),
            ..self
        }
    }

    /// The file of its log.
    pub fn log_file(&self) -> &Path {
        &self.log
    }

    /// The folder of its store.
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// `cdp-agent run …`, not started.
    pub fn command(&self) -> Cmd {
        let program = match &self.namespace {
            None => cmd(&self.program),
            Some((first, path)) => cmd("unshare")
                .args(["--mount", "--", "sh", "-c"])
                .arg(format!("{first} && exec \"$@\""))
                .arg(path)
                .arg(&self.program),
        };
        let command = program
            .arg("run")
            .arg("--store")
            .arg(&self.store)
            .args(&self.args);
        match self.host {
            Some(host) => host.enter(command),
            None => command,
        }
    }

    /// Starts it.
    pub fn start(&self) -> Result<Agent> {
        let process = self.command().spawn(&self.log)?;
        Ok(Agent {
            plan: self.clone(),
            process,
            paused: false,
        })
    }

    /// Starts it and waits until everything is protected.
    pub fn protect(&self) -> Result<Agent> {
        let mut agent = self.start()?;
        agent.wait_protected(PROTECT_TIMEOUT)?;
        Ok(agent)
    }

    /// Runs it where it is expected to refuse: gives its code and message. Running on is an error.
    pub fn refuse(&self) -> Result<Outcome> {
        self.command().timeout(Duration::from_secs(20)).run()
    }
}

/// A running agent; stopped when the guard goes.
#[derive(Debug)]
pub struct Agent {
    /// Ended before the plan, which may unload its probe.
    process: Background,
    plan: AgentPlan,
    paused: bool,
}

impl Agent {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn ask(&self, command: &str) -> Cmd {
        cmd(&self.plan.program)
            .arg(command)
            .arg("--store")
            .arg(&self.plan.store)
    }

    /// Its exit code, once it has ended.
    pub fn try_code(&mut self) -> Result<Option<i32>> {
        self.process.try_code()
    }

    /// An error with its log if it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(code) = self.process.try_code()? {
            anyhow::bail!("the agent ended with code {code}\n{}", tail(&self.plan.log, 40));
        }
        Ok(())
    }

    /// Waits until the first copy is done and history is exact.
    pub fn wait_protected(&mut self, timeout: Duration) -> Result<()> {
        self.wait_for("protected", timeout)
    }

    /// Waits until all that was written before is durable.
    pub fn wait_synced(&mut self) -> Result<()> {
        self.wait_synced_within(Duration::from_secs(60))
    }

    /// The same, where much may still be on its way.
    pub fn wait_synced_within(&mut self, timeout: Duration) -> Result<()> {
        self.wait_for("synced", timeout)
    }

    fn wait_for(&mut self, what: &str, timeout: Duration) -> Result<()> {
        // Just started, it may not listen yet: ask again while it lives.
        let seconds = format!("{}s", timeout.as_secs().max(1));
        poll_until(&format!("the agent to be {what}"), timeout, || {
            let ask = self.ask("wait").args(["--for", what, "--timeout", &seconds]);
            let asked = ask.timeout(timeout + Duration::from_secs(10)).run()?;
            if asked.code != 0 {
                self.check_alive().with_context(|| asked.transcript())?;
            }
            Ok((asked.code == 0).then_some(()))
        })
        .with_context(|| tail(&self.plan.log, 20))
    }

    /// `cdp-agent status --json`.
    pub fn status(&self) -> Result<Status> {
        let text = self.ask("status").arg("--json").output()?;
        serde_json::from_str(&text).with_context(|| format!("status --json: {text}"))
    }

    /// Volume `name` of its status.
    pub fn volume(&self, name: &str) -> Result<VolumeStatus> {
        self.status()?.volume(name).cloned()
    }

    /// An error if a write was dropped or a gap opened: what a test of exactness must first be sure of.
    pub fn expect_nothing_dropped(&self) -> Result<()> {
        for volume in self.status()?.volumes {
            let clean = volume.dropped_writes == 0 && volume.state == "protected";
            ensure!(clean, "the workload outran the agent: {volume:?}");
        }
        Ok(())
    }

    /// Waits until everything written before is durable, and makes sure that nothing was dropped.
    pub fn wait_and_check(&mut self) -> Result<()> {
        self.wait_synced()?;
        self.expect_nothing_dropped()
    }

    /// `cdp-agent bookmark`.
    pub fn bookmark(&self, label: &str) -> Result<()> {
        self.ask("bookmark").arg(label).run()?.success().map(drop)
    }

    /// Stops it from running without ending it.
    pub fn pause(&mut self) -> Result<()> {
        self.process.signal(Signal::STOP)?;
        self.paused = true;
        Ok(())
    }

    /// Lets it run again.
    pub fn resume(&mut self) -> Result<()> {
        self.paused = false;
        self.process.signal(Signal::CONT)
    }

    /// Makes it read its configuration again.
    pub fn reload(&self) -> Result<()> {
        self.process.signal(Signal::HUP)
    }

    /// Asks it to stop, and insists on a clean end.
    pub fn stop(mut self) -> Result<()> {
        let code = self.process.stop(Signal::TERM, STOP_TIMEOUT)?;
        ensure!(
            code == 0,
            "the agent's exit code on SIGTERM was {code}\n{}",
            tail(&self.plan.log, 40)
        );
        let log = std::fs::read(&self.plan.log).context("read the agent's log")?;
        ensure!(!log.contains(&0x1b), "the log in a file has colours");
        Ok(())
    }

    /// Kills it, as a crash would.
    pub fn kill(mut self) -> Result<()> {
        self.process.stop(Signal::KILL, STOP_TIMEOUT).map(drop)
    }

    /// CPU time used so far, user and system.
    pub fn cpu_time(&self) -> Result<Duration> {
        let text =
            std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).context("the agent's CPU time")?;
        let fields: Vec<&str> = text.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let ticks: u64 = [11, 12]
            .iter()
            .filter_map(|&at| fields.get(at)?.parse::<u64>().ok())
            .sum();
        let ticks_per_second = rustix::param::clock_ticks_per_second();
        Ok(Duration::from_millis(ticks * 1000 / ticks_per_second))
    }

    /// The most memory it has held so far, in bytes (resident, `VmHWM`).
    pub fn peak_memory_bytes(&self) -> Result<u64> {
        let text =
            std::fs::read_to_string(format!("/proc/{}/status", self.pid())).context("the agent's memory")?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .context("a line VmHWM")?;
        let kib: u64 = line
            .trim()
            .trim_end_matches("kB")
            .trim()
            .parse()
            .context("a number of kB")?;
        Ok(kib * 1024)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.paused {
            let _ = self.process.signal(Signal::CONT);
        }
    }
}
