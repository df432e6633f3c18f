//! A second agent whose store lies on the protected disk; and the check that a power cut left all of it that had been
//! durable.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use cdp_journal::Seq;
use cdp_journal::store::StoreReader;
use cdp_tests::Scene;
use cdp_tests::agent::{Agent, AgentPlan};
use cdp_tests::device::{LoopDevice, LoopOptions};
use cdp_tests::rng::Rng;

use crate::examine::Found;
use crate::model::{Log, Replay, Report, Write};
use crate::store::{Store, expect_same};

/// The volume of the second agent.
const VOLUME: &str = "small";
/// Its size.
pub(crate) const VOLUME_BYTES: u64 = 1 << 20;
/// What is written to it at a time.
const BLOCK_BYTES: u64 = 4096;
/// Writes between the start of the agent and its end.
const WRITES_PER_LIFE: u64 = 24;
/// A write of so many blocks is passed to the log's disk past the page cache.
const BLOCKS_MAX: u64 = 48;

/// Protects a small device with a store in `dir` and writes to it; the agent is stopped, or killed, and started again
/// a few times meanwhile.
pub(crate) fn run(scene: &Scene, dir: &Path, rng: &mut Rng) -> Result<Log> {
    let device = LoopDevice::create(&scene.path("small"), LoopOptions::of_bytes(VOLUME_BYTES))?;
    let plan = AgentPlan::new(scene, dir)?
        .volume(VOLUME, device.path())
        .log(scene.log("second-agent"));
    let mut log = Log::default();
    for life in 0..3 {
        let mut agent = plan.protect()?;
        for _ in 0..WRITES_PER_LIFE {
            write(device.path(), &mut log, rng)?;
            if !rng.one_in(3) {
                report(&mut agent, &mut log)?;
            }
        }
        if life == 1 {
            agent.kill()?;
            // Nobody sees it now; the next start finds it.
            write(device.path(), &mut log, rng)?;
        } else {
            agent.stop()?;
        }
    }
    Ok(log)
}

fn write(device: &Path, log: &mut Log, rng: &mut Rng) -> Result<()> {
    let count = if rng.one_in(12) {
        BLOCKS_MAX
    } else {
        rng.between(1, 4)
    };
    let block = rng.below(VOLUME_BYTES / BLOCK_BYTES - count);
    let write = Write::random(rng, block * BLOCK_BYTES, count * BLOCK_BYTES);
    let file = File::options()
        .write(true)
        .custom_flags(rustix::fs::OFlags::DSYNC.bits().cast_signed())
        .open(device)
        .context("open the small device")?;
    file.write_all_at(&write.bytes, write.offset)
        .context("write to the small device")?;
    log.writes.push(write);
    Ok(())
}

/// Asks until when everything is durable.
fn report(agent: &mut Agent, log: &mut Log) -> Result<()> {
    agent.wait_synced()?;
    let seq = Seq::new(agent.status()?.durable_seq).context("nothing is durable")?;
    log.durable(seq, log.writes.len());
    Ok(())
}

/// Checks the store in `dir` after a power cut: it opens, also for who only reads; it holds all that was reported, and
/// the device as it was then, also when it has gone on.
pub(crate) fn check(
    dir: &Path,
    reported: Option<&Report>,
    replay: &mut Replay<'_>,
    _: &mut Rng,
) -> Result<Found> {
    if let Some(report) = reported {
        expect_report(&StoreReader::open(dir)?, report, replay).context("before recovery")?;
    }
    let (store, recovered) = Store::open(dir)?;
    let found = Found::by(&recovered, reported.map(|report| report.seq))?;
    let reader = store.go_on(dir)?;
    if let Some(report) = reported {
        expect_report(&reader, report, replay).context("after recovery")?;
    }
    Ok(found)
}

fn expect_report(reader: &StoreReader, report: &Report, replay: &mut Replay<'_>) -> Result<()> {
    let head = reader.head().map(|head| head.seq);
    ensure!(
        head >= Some(report.seq),
        "seen up to {head:?}, durable was {}",
        report.seq
    );
    let volume = reader
        .volume(VOLUME)?
        .with_context(|| format!("no volume {VOLUME}"))?;
    expect_same(&reader.view(volume.id, report.seq)?, replay.after(report.writes))
}
