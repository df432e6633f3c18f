//! Two hosts that share this kernel: a network name space for each, and a link between them that can be shaped, lose
//! datagrams, be cut, and change an address.
//!
//! Each name space is held by a process, and the kernel removes it, its end of the link, filters and all, when that
//! process ends: nothing stays behind, not even when the test is killed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::process::{Background, Cmd, cmd, poll_until};
use crate::scene::Scene;

/// Programs that a network needs.
pub const PROGRAMS: [&str; 5] = ["ip", "nft", "nsenter", "tc", "unshare"];

/// The interface, in both name spaces.
const INTERFACE: &str = "cdp0";
const AGENT_ADDRESS: &str = "10.77.0.2";
const SERVER_ADDRESS: &str = "10.77.0.1";
/// The port that servers in a name space listen on: nobody else is there.
const PORT: u16 = 7443;
/// How long a name space may take to be there.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A network name space, as long as its [`Network`] lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    holder: u32,
}

impl Host {
    /// `command`, to be run there.
    pub fn enter(self, command: Cmd) -> Cmd {
        command.prefixed(
            "nsenter",
            [format!("--net=/proc/{}/ns/net", self.holder), "--".into()],
        )
    }

    fn run(self, program: &str, args: &str) -> Result<()> {
        let command = self.enter(cmd(program).args(args.split(' ')));
        command.run()?.success().map(drop)
    }
}

/// Two hosts and the link between them.
#[derive(Debug)]
pub struct Network {
    /// Where the agent runs.
    pub agent: Host,
    /// Where the server runs.
    pub server: Host,
    agent_address: std::cell::RefCell<String>,
    _holders: [Background; 2],
}

impl Network {
    /// Makes both hosts and an unlimited link.
    pub fn new(scene: &Scene) -> Result<Network> {
        let hold = || -> Result<Background> {
            let holder = cmd("unshare").args(["--net", "--", "sleep", "infinity"]);
            let holder = holder.spawn(&scene.log("network"))?;
            let name_space = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/net"));
            let own = name_space(std::process::id()).context("our own name space")?;
            poll_until("a network name space", START_TIMEOUT, || {
                Ok(name_space(holder.pid())
                    .is_ok_and(|found| found != own)
                    .then_some(()))
            })?;
            Ok(holder)
        };
        let holders = [hold()?, hold()?];
        let [agent, server] = [&holders[0], &holders[1]].map(|holder| Host { holder: holder.pid() });
        let network = Network {
            agent,
            server,
            agent_address: AGENT_ADDRESS.to_owned().into(),
            _holders: holders,
        };
        let (near, far) = (agent.holder, server.holder);
        let link = format!("link add {INTERFACE} netns {near} type veth peer name {INTERFACE} netns {far}");
        cmd("ip").args(link.split(' ')).run()?.success()?;
        for (host, address) in [(agent, AGENT_ADDRESS), (server, SERVER_ADDRESS)] {
            host.run("ip", &format!("address add {address}/24 dev {INTERFACE}"))?;
            host.run("ip", &format!("link set {INTERFACE} up"))?;
            host.run("nft", "add table inet cdp")?;
            let hook = "add chain inet cdp out { type filter hook output priority 0 ; }";
            host.run("nft", hook)?;
        }
        Ok(network)
    }

    /// Where the server listens.
    pub fn server_address(&self) -> String {
        format!("{SERVER_ADDRESS}:{PORT}")
    }

    /// Lets no more than so many megabits a second through, either way.
    pub fn shape(&self, megabits: u64) -> Result<()> {
        let tbf =
            format!("qdisc replace dev {INTERFACE} root tbf rate {megabits}mbit burst 64kb latency 100ms");
        self.both(|host| host.run("tc", &tbf))
    }

    /// Lets everything through again as fast as it goes.
    pub fn unshape(&self) -> Result<()> {
        self.both(|host| host.run("tc", &format!("qdisc delete dev {INTERFACE} root")))
    }

    /// Loses that many of a thousand datagrams, either way, and lets the others through again.
    pub fn lose(&self, per_mille: u32) -> Result<()> {
        let rule = format!("add rule inet cdp out numgen random mod 1000 < {per_mille} drop");
        self.both(|host| {
            host.run("nft", "flush chain inet cdp out")?;
            if per_mille > 0 {
                host.run("nft", &rule)?;
            }
            Ok(())
        })
    }

    /// Loses everything without telling anybody, until [`Network::lose`] says otherwise.
    pub fn cut(&self) -> Result<()> {
        self.both(|host| host.run("nft", "add rule inet cdp out drop"))
    }

    /// Pulls the cable or plugs it in again: programs are told that there is no way.
    pub fn plug(&self, is_in: bool) -> Result<()> {
        let state = if is_in { "up" } else { "down" };
        self.agent.run("ip", &format!("link set {INTERFACE} {state}"))
    }

    /// Gives the agent's host another address in place of the one it has.
    pub fn change_address(&self, last: u8) -> Result<()> {
        ensure!(last > 2, "{last} is taken");
        let next = format!("10.77.0.{last}");
        let mut address = self.agent_address.borrow_mut();
        if *address != next {
            self.agent
                .run("ip", &format!("address del {address}/24 dev {INTERFACE}"))?;
            self.agent
                .run("ip", &format!("address add {next}/24 dev {INTERFACE}"))?;
            *address = next;
        }
        Ok(())
    }

    /// Bytes that have left the agent's host so far.
    pub fn sent_bytes(&self) -> Result<u64> {
        let path = format!("/sys/class/net/{INTERFACE}/statistics/tx_bytes");
        let mounted = cmd("sh").args(["-c", &format!("mount -t sysfs none /sys && cat {path}")]);
        let mounted = mounted.prefixed("unshare", ["--mount".into(), "--".into()]);
        let text = self.agent.enter(mounted).output()?;
        text.parse()
            .with_context(|| format!("a number of bytes: {text:?}"))
    }

    fn both(&self, change: impl Fn(Host) -> Result<()>) -> Result<()> {
        change(self.agent)?;
        change(self.server)
    }
}
