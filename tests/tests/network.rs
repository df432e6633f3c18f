//! Agent and server on two hosts, and what can happen to the line between them.

use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{Agent, AgentPlan, PROTECT_TIMEOUT, TargetStatus};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fio::write_randomly;
use cdp_tests::moments::QuietMoment;
use cdp_tests::network::{self, Network};
use cdp_tests::process::poll_until;
use cdp_tests::restore::Restore;
use cdp_tests::rng::Rng;
use cdp_tests::server::Server;
use cdp_tests::{Scene, system_test};

/// How long a server may take to get everything once nothing is in the way.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(120);

/// Two hosts, a device, and an agent that ships it.
struct Far<'a> {
    scene: &'a Scene,
    network: Rc<Network>,
    server: Server,
    plan: AgentPlan,
    restore: Restore,
    device: LoopDevice,
    writes: u64,
}

impl<'a> Far<'a> {
    fn new(scene: &'a Scene, device_bytes: u64) -> Result<Far<'a>> {
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(device_bytes))?;
        let network = Rc::new(Network::new(scene)?);
        let server = Server::start_in(scene, &scene.path("site"), &network)?;
        let (ship, read) = server.enroll_both(scene, "web01")?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?
            .volume("v", device.path())
            .on(network.agent)
            .ships_to(server.address(), &ship);
        let restore = Restore::from_server(server.address(), &read)?.on(network.agent);
        Ok(Far {
            scene,
            network,
            server,
            plan,
            restore,
            device,
            writes: 0,
        })
    }

    /// Writes that no other had.
    fn write(&mut self, bytes: u64) -> Result<()> {
        self.writes += 1;
        let seed = self.scene.seed().wrapping_mul(1000) + self.writes;
        write_randomly(self.device.path(), "load", bytes, seed, self.scene.dir())
    }

    /// Waits until the server has everything, and compares its newest moment with the device.
    fn check_latest(&self, agent: &mut Agent, restore: &Restore) -> Result<()> {
        agent.wait_synced()?;
        let quiet = QuietMoment::of_raw("v", self.device.path())?;
        agent.wait_synced()?;
        quiet.check_at(restore, "latest", &self.scene.path("image"))
    }
}

fn target(agent: &Agent) -> Result<TargetStatus> {
    let targets = agent.status()?.targets;
    targets.first().cloned().context("a target in status")
}

/// Waits until the server is so far behind.
fn wait_for_lag(agent: &Agent, seconds: f64) -> Result<()> {
    poll_until("the server to be behind", CATCH_UP_TIMEOUT, || {
        Ok((target(agent)?.lag_seconds >= seconds).then_some(()))
    })
}

/// What happens in a round.
#[derive(Clone, Copy, Debug)]
enum Fault {
    KillAgent,
    KillServer,
    /// Everything is lost, and nobody is told.
    Cut,
    /// The interface goes down.
    Unplug,
    ChangeAddress,
    /// Nothing but the losses of the line.
    None,
}

const FAULTS: [Fault; 6] = [
    Fault::KillAgent,
    Fault::KillServer,
    Fault::Cut,
    Fault::Unplug,
    Fault::ChangeAddress,
    Fault::None,
];

/// Goal: nothing that was acknowledged is ever missing, and everything arrives in the end, whatever happens to the line or
/// to either end. Method: rounds of writes with a fault, over a line that loses up to 5 % of all datagrams; after each, the
/// server holds what it had acknowledged before, and its newest moment is the device. `CDP_ROUNDS` says how many.
#[test]
fn whatever_happens_to_the_line_or_its_ends_nothing_acknowledged_is_lost() {
    system_test(
        "network: chaos",
        &[&["fio"], &network::PROGRAMS[..]].concat(),
        |scene| {
            let mut far = Far::new(scene, 16 * MIB)?;
            let mut rng = scene.rng();
            let mut agent = far.plan.protect()?;
            let rounds = scene.rounds();
            let lag_ms_max = if rounds > 20 { 20_000 } else { 3_000 };
            for round in 0..rounds {
                // Each fault once, then at random.
                let fault = FAULTS.get(round).copied().unwrap_or_else(|| *rng.pick(&FAULTS));
                let per_mille = *rng.pick(&[0, 10, 50]);
                let lag = rng.below(lag_ms_max) as f64 / 1e3;
                let what = format!("round {round}: {fault:?}, {per_mille} of 1000 lost, {lag} s");
                eprintln!("{what}");
                agent = play_round(&mut far, agent, &mut rng, fault, per_mille, lag).context(what)?;
            }
            far.network.lose(0)?;
            far.check_latest(&mut agent, &far.restore)?;
            agent.stop()?;
            far.server.stop()?;
            Restore::from(far.server.store())?.verify()?.success().map(drop)
        },
    );
}

fn play_round(
    far: &mut Far<'_>,
    mut agent: Agent,
    rng: &mut Rng,
    fault: Fault,
    per_mille: u32,
    lag: f64,
) -> Result<Agent> {
    far.network.lose(per_mille)?;
    far.write(MIB)?;
    let acked = target(&agent)?.acked_seq;
    match fault {
        Fault::KillAgent => {
            agent.kill()?;
            far.write(MIB)?;
            agent = far.plan.protect()?;
        }
        Fault::KillServer => {
            far.server.kill()?;
            far.write(MIB)?;
            far.server.run()?;
        }
        Fault::Cut => {
            far.network.cut()?;
            far.write(MIB)?;
            wait_for_lag(&agent, lag)?;
            far.network.lose(per_mille)?;
        }
        Fault::Unplug => {
            far.network.plug(false)?;
            far.write(MIB)?;
            wait_for_lag(&agent, lag)?;
            far.network.plug(true)?;
        }
        Fault::ChangeAddress => {
            far.network.change_address(rng.between(3, 250) as u8)?;
            far.write(MIB)?;
        }
        Fault::None => far.write(MIB)?,
    }
    let durable = far.server.durable_seq("web01")?;
    ensure!(
        durable >= acked,
        "seq {acked} had been acknowledged, and the server has {durable}"
    );
    far.write(MIB)?;
    far.check_latest(&mut agent, &Restore::from(far.server.store())?)?;
    Ok(agent)
}

/// Goal: an address that changes costs no connection: QUIC migrates. Method: the agent's host gets another address while
/// the agent ships; what is written then arrives although no connection was ever made anew.
#[test]
fn a_connection_outlives_a_change_of_address() {
    system_test(
        "network: address",
        &[&["fio"], &network::PROGRAMS[..]].concat(),
        |scene| {
            let mut far = Far::new(scene, 8 * MIB)?;
            let mut agent = far.plan.protect()?;
            agent.wait_synced()?;
            for address in [33, 44] {
                far.network.change_address(address)?;
                far.write(MIB)?;
                far.check_latest(&mut agent, &far.restore)?;
                let from = far.server.status()?["agents"][0]["from"].to_string();
                ensure!(
                    from.contains(&format!("10.77.0.{address}:")),
                    "connected from {from}"
                );
            }
            let log = std::fs::read_to_string(far.plan.log_file()).context("the agent's log")?;
            ensure!(
                !log.contains("not connected"),
                "the connection was made anew:\n{log}"
            );
            agent.stop()
        },
    );
}

/// Goal: `status` tells how it is while the line is cut. Method: noise of a known size is written then; lag, backlog, what
/// was captured, and that nobody knows when the server will have it are compared with that, and again once it is mended.
#[test]
fn status_tells_how_far_behind_a_server_is_that_is_cut_off() {
    system_test(
        "network: lag",
        &[&["fio"], &network::PROGRAMS[..]].concat(),
        |scene| {
            const BYTES: u64 = 4 * MIB;
            let mut far = Far::new(scene, 8 * MIB)?;
            let mut agent = far.plan.protect()?;
            agent.wait_synced()?;
            let (before, captured) = (target(&agent)?, agent.volume("v")?.captured_bytes);
            ensure!(
                before.backlog_bytes < 64 << 10 && before.lag_seconds < 5.0,
                "{before:?}"
            );
            far.network.cut()?;
            let began = Instant::now();
            far.write(BYTES)?;
            let cut = poll_until("nobody to know how long it takes", CATCH_UP_TIMEOUT, || {
                let target = target(&agent)?;
                let knows_nothing = target.catch_up_seconds.is_none() && target.lag_seconds >= 3.0;
                Ok(knows_nothing.then_some(target))
            })?;
            let age = began.elapsed().as_secs_f64();
            // The tick before the cut may be the oldest.
            ensure!(cut.lag_seconds <= age + 2.0, "{cut:?}, the cut was {age} s ago");
            ensure!((BYTES..2 * BYTES).contains(&cut.backlog_bytes), "{cut:?}");
            let written = agent.volume("v")?.captured_bytes - captured;
            ensure!((BYTES..2 * BYTES).contains(&written), "captured {written}");
            far.network.lose(0)?;
            agent.wait_synced()?;
            let mended = target(&agent)?;
            ensure!(
                mended.acked_seq > cut.acked_seq && mended.backlog_bytes < 64 << 10,
                "{mended:?}"
            );
            ensure!(mended.sent_bytes >= before.sent_bytes + BYTES, "{mended:?}");
            agent.stop()
        },
    );
}

/// Goal: a limit holds on the wire, headers and all, and `status` tells it. Method: what leaves the host's interface while
/// writes are shipped that take some seconds at the limit.
#[test]
fn a_rate_limit_holds_on_the_wire() {
    system_test(
        "network: rate",
        &[&["fio"], &network::PROGRAMS[..]].concat(),
        |scene| {
            const LIMIT: f64 = 1e6;
            let mut far = Far::new(scene, 16 * MIB)?;
            far.plan = far.plan.clone().flag("--rate", "8 Mbit/s");
            let mut agent = far.plan.protect()?;
            agent.wait_synced()?;
            ensure!(
                agent.status()?.rate_bytes_per_s == Some(LIMIT as u64),
                "{:?}",
                agent.status()?
            );
            let (began, before) = (Instant::now(), far.network.sent_bytes()?);
            far.write(4 * MIB)?;
            agent.wait_synced()?;
            let (seconds, sent) = (began.elapsed().as_secs_f64(), far.network.sent_bytes()? - before);
            ensure!(sent > 4 * MIB, "random bytes do not get fewer: {sent}");
            // Beside the bucket: Ethernet's own headers, and what acknowledgements and handshakes need.
            let most = LIMIT * 1.1 * (seconds + 0.25) + 64e3;
            ensure!(sent as f64 <= most, "{sent} bytes in {seconds} s");
            agent.stop()
        },
    );
}

/// Goal: live writes do not wait behind a first copy. Method: a device full of noise, over a line that needs much longer
/// for it than for what may be before a live write; one is there while the copy still goes on.
#[test]
fn a_live_write_arrives_while_the_first_copy_goes_on() {
    system_test(
        "network: live first",
        &[&["fio"], &network::PROGRAMS[..]].concat(),
        |scene| {
            let mut far = Far::new(scene, 128 * MIB)?;
            far.write(128 * MIB)?;
            far.network.shape(10)?;
            let mut agent = far.plan.start()?;
            poll_until("reading back to wait for the server", PROTECT_TIMEOUT, || {
                agent.check_alive()?;
                // Just started, it may not listen yet.
                let status = agent.status().ok();
                Ok(status.and_then(|status| status.readback_waits_for).map(drop))
            })?;
            far.write(4096)?;
            poll_until("the write to be captured", PROTECT_TIMEOUT, || {
                Ok((agent.volume("v")?.captured_writes > 0).then_some(()))
            })?;
            let written = agent.status()?.seq;
            poll_until("the write to arrive", PROTECT_TIMEOUT, || {
                agent.check_alive()?;
                Ok((target(&agent)?.acked_seq >= written).then_some(()))
            })?;
            let volume = agent.volume("v")?;
            ensure!(
                volume.state == "seeding",
                "the copy was done before the write arrived: {volume:?}"
            );
            // As fast as it goes for the rest.
            far.network.unshape()?;
            agent.wait_protected(PROTECT_TIMEOUT)?;
            far.check_latest(&mut agent, &far.restore)?;
            agent.stop()
        },
    );
}

/// Goal: a first copy keeps to its own limit, and live writes do not. Method: noise that takes some seconds at the limit.
#[test]
fn a_first_copy_keeps_to_its_own_limit() {
    system_test("network: rate of a first copy", &["fio"], |scene| {
        const BYTES: u64 = 16 * MIB;
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(BYTES))?;
        write_randomly(device.path(), "noise", BYTES, scene.seed(), scene.dir())?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?
            .volume("v", device.path())
            .flag("--rate-readback", "2 MiB/s");
        let mut agent = plan.start()?;
        let began = Instant::now();
        agent.wait_protected(PROTECT_TIMEOUT)?;
        let (seconds, status) = (began.elapsed().as_secs_f64(), agent.status()?);
        ensure!(status.rate_readback_bytes_per_s == Some(2 * MIB), "{status:?}");
        let read = status.volume("v")?.readback_bytes;
        ensure!(read > 0, "{status:?}");
        // Two seconds' worth may be ahead of the limit: the step that overdraws it.
        let most = 2.0 * MIB as f64 * (seconds + 0.25) + 2.0 * MIB as f64;
        let noise = status.store_bytes as f64;
        ensure!(noise <= most, "{noise} bytes in {seconds} s");
        agent.stop()
    });
}
