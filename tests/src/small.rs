//! A small raw device, an agent that protects it, and writes to it: the stage of many tests.

use std::time::Duration;

use anyhow::Result;

use crate::agent::AgentPlan;
use crate::device::{LoopDevice, LoopOptions, MIB};
use crate::fio::Fio;
use crate::process::poll_until;
use crate::restore::Restore;
use crate::scene::Scene;

/// How long a fault may take to show in status and history.
pub const NOTICE_TIMEOUT: Duration = Duration::from_secs(60);

/// A device of 32 MiB that holds something already.
pub fn device(scene: &Scene) -> Result<LoopDevice> {
    let device = LoopDevice::create(&scene.path("disk"), LoopOptions::of_bytes(32 * MIB))?;
    write(scene, &device, "old", 8 * MIB)?;
    Ok(device)
}

/// An agent that protects it as volume `v`, its store in the scene.
pub fn plan(scene: &Scene, device: &LoopDevice) -> Result<AgentPlan> {
    Ok(AgentPlan::new(scene, &scene.path("store"))?.volume("v", device.path()))
}

/// Random writes to it, past the page cache.
pub fn job(device: &LoopDevice, name: &str, bytes: u64) -> Fio {
    let fio = Fio::new(name, device.path(), "randwrite")
        .option("bs", "16k")
        .option("io_size", bytes);
    fio.option("size", "100%")
        .direct(4)
        .seed(bytes + name.len() as u64)
}

/// The same, to their end.
pub fn write(scene: &Scene, device: &LoopDevice, name: &str, bytes: u64) -> Result<()> {
    job(device, name, bytes).run(scene.dir()).map(drop)
}

/// Waits until the history of volume `v` shows a gap of this cause.
pub fn wait_for_gap(restore: &Restore, cause: &str) -> Result<()> {
    poll_until(&format!("a gap {cause} in the history"), NOTICE_TIMEOUT, || {
        Ok(restore
            .points("v")?
            .gaps
            .iter()
            .any(|gap| gap.cause == cause)
            .then_some(()))
    })
}
