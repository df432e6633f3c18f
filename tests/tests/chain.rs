//! Servers that follow servers: what the first took in is at the last, when everything before it is gone.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::AgentPlan;
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fio::write_randomly;
use cdp_tests::moments::QuietMoment;
use cdp_tests::process::poll_until;
use cdp_tests::restore::{FAILED, Restore};
use cdp_tests::server::Server;
use cdp_tests::{Scene, system_test};

const FOLLOW_TIMEOUT: Duration = Duration::from_secs(120);

/// Waits until `last` holds what `first` does, of an agent whose writes are all at `first`.
fn wait_for(last: &Server, first: &Server) -> Result<()> {
    let seq = first.durable_seq("web01")?;
    poll_until("the last server to have it all", FOLLOW_TIMEOUT, || {
        let here = last.durable_seq("web01").unwrap_or(0);
        Ok((here >= seq).then_some(()))
    })
}

fn write(scene: &Scene, device: &Path, number: u64) -> Result<()> {
    let seed = scene.seed().wrapping_add(number);
    write_randomly(device, "load", 4 * MIB, seed, scene.dir())
}

/// Goal: the last of three servers alone brings back every moment, exact. Method: quiet moments while an agent ships to the
/// first, and servers are killed at random; then the agent's store and the folders of the first two are deleted, and the
/// SHA-256 of each moment from the last one, in its folder and over the network, is that of the device then.
#[test]
fn the_last_of_three_servers_alone_brings_every_moment_back() {
    system_test("chain: three servers", &["fio"], |scene| {
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(32 * MIB))?;
        let mut a = Server::start(scene, &scene.path("site-a"))?;
        let mut b = Server::following(scene, &scene.path("site-b"), &a, "b")?;
        let mut c = Server::following(scene, &scene.path("site-c"), &b, "c")?;
        let (ship, _) = a.enroll_both(scene, "web01")?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?
            .volume("v", device.path())
            .ships_to(a.address(), &ship);
        let mut agent = plan.protect()?;
        let mut rng = scene.rng();
        let mut moments = Vec::new();
        for round in 0..4 {
            write(scene, device.path(), 2 * round)?;
            let servers = [&mut a, &mut b, &mut c];
            let killed = rng.below(servers.len() as u64);
            for (number, server) in (0..).zip(servers) {
                if number == killed {
                    server.kill()?;
                }
            }
            write(scene, device.path(), 2 * round + 1)?;
            for (number, server) in (0..).zip([&mut a, &mut b, &mut c]) {
                if number == killed {
                    server.run()?;
                }
            }
            let label = format!("round-{round}");
            moments.push((label.clone(), QuietMoment::of_raw("v", device.path())?));
            agent.bookmark(&label)?;
        }
        agent.wait_synced()?;
        wait_for(&c, &a)?;
        // How far it is, it is told once a second.
        let mut status = None;
        poll_until("the last server to be told how far it is", FOLLOW_TIMEOUT, || {
            let now = status.insert(c.status()?);
            let lag = now["agents"][0]["lag_seconds"].as_f64();
            let is_connected = now["upstream"]["state"] == "connected";
            Ok((is_connected && lag.is_some_and(|lag| lag < 60.0)).then_some(()))
        })
        .with_context(|| format!("{status:?}"))?;
        let status = status.context("no status")?;
        ensure!(status["upstream"]["server"] == b.address(), "{status}");

        agent.kill()?;
        a.kill()?;
        b.kill()?;
        for gone in [plan.store(), a.store(), b.store()] {
            std::fs::remove_dir_all(gone).context("delete what comes before the last server")?;
        }
        let read = scene.path("read");
        let token = c.token("web01", &["--restore"])?;
        c.enroll("cdp-restore", &token, &read)?.run()?.success()?;
        let over_network = Restore::from_server(c.address(), &read)?;
        for restore in [&over_network, &Restore::from(c.store())?] {
            for (label, moment) in &moments {
                moment.check_at(restore, &format!("bookmark:{label}"), &scene.path("image"))?;
            }
            restore.verify()?.success()?;
        }
        let refused = c.enroll("cdp-agent", &c.token("x", &["--follow"])?, &scene.path("x"))?;
        refused
            .run()?
            .expect_code(FAILED)?
            .expect_message(&["for a server that follows", "cdp-journal enroll"])?;
        c.stop()
    });
}
