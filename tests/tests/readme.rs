//! The README's commands, as somebody who is new types them: one after the other, as they are written, with the names of
//! this scene in place of theirs.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cdp_tests::agent::{AgentPlan, binary};
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fio::write_randomly;
use cdp_tests::network::{self, Host, Network};
use cdp_tests::process::{Background, cmd, poll_until};
use cdp_tests::{Scene, system_test};

const README: &str = include_str!("../../README.md");
/// How long somebody tries a command again that came too early.
const PATIENCE: Duration = Duration::from_secs(60);

/// The commands in the `nth` block of shell under a heading, without comments.
fn commands(heading: &str, nth: usize) -> Result<Vec<&'static str>> {
    let (_, section) = README
        .split_once(&format!("\n## {heading}\n"))
        .with_context(|| format!("no heading {heading}"))?;
    let section = section
        .split_once("\n## ")
        .map_or(section, |(section, _)| section);
    let block = section
        .split("```sh\n")
        .nth(nth + 1)
        .context("a block of shell")?;
    let block = block.split_once("```").map_or(block, |(block, _)| block);
    let lines = block
        .lines()
        .map(|line| line.split_once(" #").map_or(line, |(command, _)| command).trim());
    Ok(lines.filter(|line| !line.is_empty()).collect())
}

/// Who types.
struct Novice<'a> {
    scene: &'a Scene,
    path: String,
    /// What the README says, and what it is here.
    names: Vec<(&'static str, String)>,
    running: Vec<Background>,
}

impl<'a> Novice<'a> {
    fn new(scene: &'a Scene, names: Vec<(&'static str, String)>) -> Result<Novice<'a>> {
        let program = binary("cdp-agent")?;
        let folder = program.parent().context("the folder of the binaries")?;
        let rest = std::env::var("PATH").unwrap_or_default();
        Ok(Novice {
            scene,
            path: format!("{}:{rest}", folder.display()),
            names,
            running: Vec::new(),
        })
    }

    /// Types a command on a host; gives back what it printed.
    fn type_in(&mut self, host: Host, line: &str) -> Result<String> {
        let mut line = line.trim_start_matches("sudo ").to_owned();
        for (name, here) in &self.names {
            line = line.replace(name, here);
        }
        let (line, is_left_running) = match line.strip_suffix('&') {
            Some(line) => (line.trim(), true),
            None => (line.as_str(), false),
        };
        let shell = || {
            let shell = cmd("sh").arg("-c").arg(format!("exec {line}"));
            host.enter(shell.env("PATH", &self.path))
        };
        if is_left_running {
            let started = shell().spawn(&self.scene.log("typed"))?;
            self.running.push(started);
            return Ok(String::new());
        }
        let mut last = None;
        let done = poll_until(line, PATIENCE, || {
            let outcome = shell().run()?;
            let is_good = outcome.code == 0;
            let printed = is_good.then(|| outcome.stdout.trim_end().to_owned());
            last = Some(outcome);
            Ok(printed)
        });
        done.with_context(|| last.map(|outcome| outcome.transcript()).unwrap_or_default())
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Goal: a second host takes five commands, and a moment comes back from it by three more. Method: the commands of the
/// README's chapter, typed on two hosts.
#[test]
fn a_second_host_takes_the_five_commands_of_the_readme() {
    let needs: Vec<&str> = network::PROGRAMS.into_iter().chain(["fio", "sh"]).collect();
    system_test("readme: a second host", &needs, |scene| {
        let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(32 * MIB))?;
        let network = Network::new(scene)?;
        let (server, agent) = (network.server, network.agent);
        let plan = AgentPlan::new(scene, &scene.path("store"))?;
        let image = scene.path("then.img");
        let names = vec![
            ("/srv/cdp", text(&scene.path("site"))),
            ("/var/lib/cdp", text(plan.store())),
            ("/etc/cdp/identity", text(&scene.path("ship"))),
            ("~/.cdp", text(&scene.path("read"))),
            ("/dev/vdb", text(device.path())),
            ("dr1:7443", network.server_address()),
            ("then.img", text(&image)),
            // Nothing here is five minutes old.
            ("--at -5m", "--at latest".to_owned()),
        ];
        let mut novice = Novice::new(scene, names)?;
        write_randomly(device.path(), "before", 8 * MIB, scene.seed(), scene.dir())?;
        let five = commands("A second host", 0)?;
        ensure!(five.len() == 5, "not five: {five:?}");
        let token = |novice: &mut Novice<'_>, line: &str| -> Result<()> {
            let token = novice.type_in(server, line)?;
            novice.names.retain(|(name, _)| *name != "cdp1-…");
            novice.names.push(("cdp1-…", token));
            Ok(())
        };
        novice.type_in(server, five[0])?;
        token(&mut novice, five[1])?;
        for line in &five[2..] {
            novice.type_in(agent, line)?;
        }
        write_randomly(device.path(), "after", 8 * MIB, scene.seed() + 1, scene.dir())?;
        // The README's last command again: what was written since is there as well.
        novice.type_in(agent, five[4])?;
        let restores = commands("A second host", 2)?;
        token(&mut novice, restores[0])?;
        novice.type_in(agent, restores[1])?;
        novice.type_in(agent, restores[2])?;
        cmd("cmp").arg(&image).arg(device.path()).run()?.success()?;
        drop(novice);
        plan.unload()
    });
}
