//! P4, durable, of our own store: the product protects the disk that a second store lies on, and every moment of its
//! history is a power cut that the second store must survive.
//!
//! A state is the disk right after one write of its history, as if the power had failed then: all that was written
//! before is on the disk and nothing later. Every other one is taken further, to a second state: of what was written
//! since the disk's cache was flushed, each block has any of its contents since, old ones too. The state's file system
//! is mounted (which replays its journal), the store in it is opened as an agent opens it after a power cut, and what
//! the store had told to be durable before that moment must be there, byte for byte.
//!
//! `CDP_STATES` says how many Seqs of the history are taken, evenly: a number, or `all`. The seed replays what is
//! written, not how the kernel lays it out on the disk.

mod agent;
mod examine;
mod history;
mod image;
mod model;
mod store;

use std::path::Path;

use anyhow::{Context, Result};
use cdp_tests::agent::AgentPlan;
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::mount::{FileSystem, Mount};
use cdp_tests::process::cmd;
use cdp_tests::{Scene, system_test};

use examine::Run;
use history::Captured;
use model::Log;

/// The second store, on its disk.
const STORE: &str = "store";

/// Goal: whatever a power cut leaves of a store, all that had been durable is in it. Method: a store with small
/// segments on a protected ext4, through hundreds of appends, syncs, new segments, flushes and merges of its index;
/// then each state of the disk is opened.
#[test]
fn every_crash_state_of_a_store_holds_what_was_durable() {
    crash_states_of_a_store("ext4", FileSystem::Ext4, 64 * MIB);
}

/// Goal and method: the same on xfs.
#[test]
fn every_crash_state_of_a_store_on_xfs_holds_what_was_durable() {
    crash_states_of_a_store("xfs", FileSystem::Xfs, FileSystem::Xfs.bytes_min());
}

fn crash_states_of_a_store(name: &str, file_system: FileSystem, bytes: u64) {
    let name = format!("crash states: a store on {name}");
    system_test(&name, file_system.programs(), |scene| {
        let work = |dir: &Path| store::run(dir, &mut scene.rng());
        let run = protect_during(scene, file_system, bytes, work)?;
        run.examine(scene, store::VOLUME_BYTES, &store::check)
    });
}

/// Goal: the same of an agent's own store, by the agent's own word. Method: a second agent, whose store is on the
/// protected disk, tells by `wait --for synced` and `status` what is durable.
#[test]
fn every_crash_state_of_an_agents_store_holds_what_was_synced() {
    let file_system = FileSystem::Ext4;
    system_test("crash states: an agent", file_system.programs(), |scene| {
        let work = |dir: &Path| agent::run(scene, dir, &mut scene.rng());
        // An agent leaves 32 MiB free.
        let run = protect_during(scene, file_system, 96 * MIB, work)?;
        run.examine(scene, agent::VOLUME_BYTES, &agent::check)
    });
}

/// Makes a disk, protects it, and lets `work` use a folder on it that does not exist yet.
fn protect_during(
    scene: &Scene,
    file_system: FileSystem,
    bytes: u64,
    work: impl FnOnce(&Path) -> Result<Log>,
) -> Result<Run> {
    let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(bytes))?;
    make(file_system, device.path())?;
    let plan = AgentPlan::new(scene, &scene.path("first-store"))?.volume("disk", device.path());
    let mut agent = plan.protect()?;
    let mount = Mount::new(device.path(), file_system, &scene.path("mounted"))?;
    let log = work(&mount.dir().join(STORE))?;
    mount.unmount()?;
    agent.wait_and_check()?;
    let last = std::fs::read(device.path()).context("read the disk")?;
    agent.stop()?;
    Ok(Run {
        file_system,
        captured: Captured::open(plan.store(), "disk")?,
        log,
        last,
    })
}

/// Makes a file system, an ext4 small and whole at once: what the kernel would finish later is nobody's history.
fn make(file_system: FileSystem, device: &Path) -> Result<()> {
    if file_system != FileSystem::Ext4 {
        return file_system.make(device);
    }
    cmd("mkfs.ext4")
        .args(["-q", "-F", "-J", "size=4"])
        .args(["-E", "lazy_itable_init=0,lazy_journal_init=0"])
        .arg(device)
        .run()?
        .success()
        .map(drop)
}
