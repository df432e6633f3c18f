//! The journal server: what it acknowledged is there, for who may read it, when the production host is gone.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{AgentPlan, binary};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fio::write_randomly;
use cdp_tests::moments::QuietMoment;
use cdp_tests::process::{cmd, poll_until};
use cdp_tests::restore::{FAILED, Restore, USAGE};
use cdp_tests::server::Server;
use cdp_tests::{Scene, system_test};

fn device(scene: &Scene, bytes: u64) -> Result<LoopDevice> {
    LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(bytes))
}

/// Writes that no other `number` has.
fn write(scene: &Scene, device: &Path, bytes: u64, number: u64) -> Result<()> {
    write_randomly(
        device,
        "load",
        bytes,
        scene.seed().wrapping_add(number),
        scene.dir(),
    )
}

/// Goal: the server alone brings back every moment. Method: quiet moments while an agent ships; then the agent is killed
/// and its store deleted, and each moment is restored from the server's folder and over the network.
#[test]
fn the_server_alone_brings_every_moment_back() {
    system_test("server: the production host is gone", &["fio"], |scene| {
        let device = device(scene, 32 * MIB)?;
        let mut server = Server::start(scene, &scene.path("site"))?;
        let (ship, read) = server.enroll_both(scene, "web01")?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?
            .volume("v", device.path())
            .ships_to(server.address(), &ship);
        let mut agent = plan.protect()?;
        let mut moments = Vec::new();
        for (number, label) in (0..).zip(["one", "two", "three"]) {
            write(scene, device.path(), 6 * MIB, number)?;
            moments.push((label, QuietMoment::of_raw("v", device.path())?));
            agent.bookmark(label)?;
        }
        agent.wait_and_check()?;
        let status = agent.status()?;
        let target = status.targets.first().context("a target in status")?;
        ensure!(
            target.state == "connected" && target.acked_seq > 0 && target.sent_bytes > 0,
            "{target:?}"
        );
        agent.kill()?;
        std::fs::remove_dir_all(plan.store()).context("delete the agent's store")?;

        let over_network = Restore::from_server(server.address(), &read)?;
        for restore in [&over_network, &Restore::from(server.store())?] {
            for (label, moment) in &moments {
                moment.check_at(restore, &format!("bookmark:{label}"), &scene.path("image"))?;
            }
            restore.verify()?.success()?;
            let marks = restore.points("web01/v")?.bookmarks;
            ensure!(marks.len() == moments.len(), "{marks:?}");
            let listed = restore.command("ls").output()?;
            ensure!(listed.contains("web01/v"), "{listed}");
            let diff = restore.command("diff").args(["v", "--since", "bookmark:one"]);
            let diff = diff.args(["--until", "bookmark:two", "--json"]).output()?;
            let diff: serde_json::Value = serde_json::from_str(&diff).context("diff --json")?;
            ensure!(diff["writes"].as_u64() > Some(0), "{diff}");
        }
        server.stop()?;
        let restore = Restore::from(server.store())?;
        moments[2]
            .1
            .check_at(&restore, "bookmark:three", &scene.path("image"))
    });
}

/// Goal: kills of either end cost nothing. Method: rounds of writes in which the server or the agent is killed; after
/// each, `latest` at the server is the device.
#[test]
fn kills_of_either_end_lose_nothing() {
    system_test("server: kills of either end", &["fio"], |scene| {
        let device = device(scene, 16 * MIB)?;
        let mut server = Server::start(scene, &scene.path("site"))?;
        let (ship, _) = server.enroll_both(scene, "web01")?;
        let plan = AgentPlan::new(scene, &scene.path("store"))?
            .volume("v", device.path())
            .ships_to(server.address(), &ship);
        let mut agent = plan.protect()?;
        for round in 0..4 {
            write(scene, device.path(), 4 * MIB, 3 * round)?;
            if round % 2 == 0 {
                server.kill()?;
                write(scene, device.path(), 2 * MIB, 3 * round + 1)?;
                server.run()?;
            } else {
                agent.kill()?;
                agent = plan.protect()?;
            }
            write(scene, device.path(), 2 * MIB, 3 * round + 2)?;
            agent.wait_synced()?;
            let quiet = QuietMoment::of_raw("v", device.path())?;
            agent.wait_synced()?;
            quiet.check_at(&Restore::from(server.store())?, "latest", &scene.path("image"))?;
        }
        agent.stop()?;
        Restore::from(server.store())?.verify()?.success().map(drop)
    });
}

/// Goal: a stolen production host reads nothing, a stolen restore host writes nothing, and a token works once. Method:
/// each tries what it may not.
#[test]
fn each_certificate_is_good_for_one_thing() {
    system_test("server: rights", &["fio"], |scene| {
        let device = device(scene, 8 * MIB)?;
        let server = Server::start(scene, &scene.path("site"))?;
        let (ship, read) = server.enroll_both(scene, "web01")?;
        let (_, read_other) = server.enroll_both(scene, "web02")?;

        let with_agents = Restore::from_server(server.address(), &ship)?;
        let refused = with_agents.command("ls").run()?.expect_code(FAILED)?;
        refused.expect_message(&["agent web01 may append and not read", "--restore"])?;
        let nobody = Restore::from_server(server.address(), &scene.path("nobody"))?;
        let refused = nobody.command("ls").run()?.expect_code(FAILED)?;
        refused.expect_message(&["no certificate there", "cdp-restore enroll"])?;
        let refused = Restore::from(Path::new(server.address()))?.command("ls").run()?;
        refused.expect_code(USAGE)?.expect_message(&["--identity"])?;

        let token = server.token("web03", &[])?;
        let identity = scene.path("web03");
        for program in ["cdp-agent", "cdp-restore", "cdp-journal"] {
            let enroll = cmd(binary(program)?.display().to_string());
            let enroll = enroll.args(["enroll", "--server", "nonsense", "--token", &token, "--identity"]);
            let refused = enroll.arg(&identity).run()?.expect_code(USAGE)?;
            refused.expect_message(&["nonsense", "give it as HOST:PORT"])?;
        }
        let refused = server.enroll("cdp-restore", &token, &identity)?.run()?;
        refused
            .expect_code(FAILED)?
            .expect_message(&["for an agent and not for restores"])?;
        server.enroll("cdp-agent", &token, &identity)?.run()?.success()?;
        let refused = server.enroll("cdp-agent", &token, &identity)?.run()?;
        refused.expect_code(FAILED)?.expect_message(&["used before"])?;

        let plan = AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path());
        let agent = plan.clone().ships_to(server.address(), &read).protect()?;
        poll_until(
            "the agent to be refused",
            cdp_tests::agent::PROTECT_TIMEOUT,
            || {
                let targets = agent.status()?.targets;
                let why = targets.iter().find_map(|target| target.why.clone());
                Ok(why.filter(|why| why.contains("may read and not append")))
            },
        )?;
        agent.stop()?;

        let mut agent = plan.ships_to(server.address(), &ship).protect()?;
        agent.wait_synced()?;
        let other = Restore::from_server(server.address(), &read_other)?;
        let refused = other
            .command("points")
            .arg("web01/v")
            .run()?
            .expect_code(FAILED)?;
        refused.expect_message(&["no volume"])?;
        Restore::from_server(server.address(), &read)?.points("web01/v")?;
        let unknown = server.command("revoke").arg("wbe01").run()?.success()?;
        unknown.expect_message(&["nothing here is of wbe01", "web01"])?;
        let revoked = server.command("revoke").arg("web01").run()?.success()?;
        ensure!(!revoked.stderr.contains("nothing here"), "{}", revoked.stderr);
        poll_until(
            "the agent to be cut off",
            cdp_tests::agent::PROTECT_TIMEOUT,
            || {
                let targets = agent.status()?.targets;
                Ok(targets
                    .iter()
                    .any(|target| target.state == "refused")
                    .then_some(()))
            },
        )?;
        let refused = Restore::from_server(server.address(), &read)?;
        let refused = refused.command("ls").run()?.expect_code(FAILED)?;
        refused.expect_message(&["was revoked"])?;
        agent.stop()
    });
}
