//! How long it takes to be back: `rewind` against a full `image`. What is read without going back is in [`super::views`].

use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use cdp_tests::Scene;
use cdp_tests::agent::AgentPlan;
use cdp_tests::device::{LoopDevice, LoopOptions, MIB};
use cdp_tests::fio::Fio;
use cdp_tests::process::cmd;
use cdp_tests::restore::Restore;

use super::measure::forget_caches;
use super::report::{median, verdict};
use super::views;
use crate::sh;

/// `rewind` of 1 % may take that much of what `image` takes.
const REWIND_RATIO_MAX: f64 = 0.05;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct RestoreEffort {
    pub(super) rounds: usize,
    /// The volume that is taken back.
    pub(super) volume_bytes: u64,
    /// Writes of the long history.
    pub(super) long_writes: u64,
    /// Random reads in each round.
    pub(super) reads: u64,
}

/// What the page cache knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cache {
    Warm,
    Cold,
}

impl Cache {
    pub(super) const BOTH: [Cache; 2] = [Cache::Warm, Cache::Cold];

    pub(super) fn prepare(self) -> Result<()> {
        match self {
            Cache::Warm => Ok(()),
            Cache::Cold => forget_caches(),
        }
    }
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cache::Warm => "warm",
            Cache::Cold => "cold",
        })
    }
}

/// Where 1 % of a volume lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pattern {
    /// Single blocks anywhere.
    Scattered,
    /// Stretches of 1 MiB.
    Clustered,
}

/// Measures and gives the tables.
pub(super) fn measure(scene: &Scene, effort: RestoreEffort) -> Result<String> {
    let rewinds = measure_rewinds(scene, effort)?;
    Ok(format!("{rewinds}\n{}", views::measure(scene, effort)?))
}

/// Measures `rewind` alone and gives its table.
pub(super) fn measure_rewinds(scene: &Scene, effort: RestoreEffort) -> Result<String> {
    Ok(format!(
        "{} rounds in which all take turns; medians, and in brackets the smallest and largest, in milliseconds. Cold: \
         after the page cache was dropped. A rewind goes to the moment before 1 % of the volume was written over; the \
         image is of that moment too, and equal to the device afterwards.\n\n{}",
        effort.rounds,
        rewinds(scene, effort)?
    ))
}

fn rewinds(scene: &Scene, effort: RestoreEffort) -> Result<String> {
    let device = LoopDevice::create(&scene.path("rewound"), LoopOptions::of_bytes(effort.volume_bytes))?;
    let fill = Fio::new("fill", device.path(), "write").option("bs", "1m");
    fill.direct(1).seed(1).run(scene.dir())?;
    let store = scene.path("store-rewound");
    let mut agent = AgentPlan::new(scene, &store)?
        .volume("v", device.path())
        .protect()?;
    let (restore, image) = (Restore::from(&store)?, scene.path("image-rewound"));
    let mut rows = Vec::new();
    for cache in Cache::BOTH {
        let mut images = Vec::new();
        let mut of_pattern = [
            (Pattern::Scattered, Vec::new(), Vec::new()),
            (Pattern::Clustered, Vec::new(), Vec::new()),
        ];
        for round in 0..effort.rounds {
            let mut before = String::new();
            for (pattern, times, floors) in &mut of_pattern {
                before = format!("{cache}-{round}-{pattern:?}");
                agent.bookmark(&before)?;
                let started = Instant::now();
                damage(scene, &device, *pattern, effort.volume_bytes, round as u64)?;
                floors.push(started.elapsed());
                agent.wait_synced()?;
                cache.prepare()?;
                let command = restore
                    .command("rewind")
                    .args([
                        "v",
                        "--at",
                        &format!("bookmark:{before}"),
                        "--yes",
                        "--json",
                        "--to",
                    ])
                    .arg(device.path());
                let started = Instant::now();
                let ran = command.run()?.success()?;
                times.push(started.elapsed());
                let told: serde_json::Value = serde_json::from_str(&ran.stdout)?;
                ensure!(
                    told["proof"]["kind"] == "written",
                    "all of it was compared: {}",
                    ran.transcript()
                );
                agent.wait_synced()?;
            }
            cache.prepare()?;
            let started = Instant::now();
            restore
                .image("v", &format!("bookmark:{before}"), &image)?
                .success()?;
            images.push(started.elapsed());
            let same = cmd("cmp").arg(&image).arg(device.path());
            same.timeout(Duration::from_secs(300))
                .run()?
                .success()
                .context("the device was not brought back")?;
            fs::remove_file(&image)?;
        }
        for (pattern, times, floors) in of_pattern {
            let ratio = median(&milliseconds(&times)) / median(&milliseconds(&images));
            rows.push(format!(
                "| 1 % {}, {cache} | {} | {} | {} | {ratio:.3} | {REWIND_RATIO_MAX:.2} | {} |\n",
                match pattern {
                    Pattern::Scattered => "in blocks of 4 KiB anywhere",
                    Pattern::Clustered => "in stretches of 1 MiB",
                },
                spread(&floors),
                spread(&times),
                spread(&images),
                verdict(ratio <= REWIND_RATIO_MAX),
            ));
            sh::say(rows[rows.len() - 1].trim_end());
        }
    }
    agent.stop()?;
    fs::remove_dir_all(&store).context("remove the store")?;
    Ok(format!(
        "| rewind of {} MiB of noise | fio writes and syncs as much there | rewind | image | ratio | target | |\n\
         |---|---:|---:|---:|---:|---:|---|\n{}",
        effort.volume_bytes / MIB,
        rows.concat()
    ))
}

/// Writes 1 % of the volume.
fn damage(scene: &Scene, device: &LoopDevice, pattern: Pattern, bytes: u64, seed: u64) -> Result<()> {
    let size = match pattern {
        Pattern::Scattered => "4k",
        Pattern::Clustered => "1m",
    };
    let job = Fio::new("damage", device.path(), "randwrite")
        .option("bs", size)
        .option("size", "100%")
        .option("io_size", bytes / 100)
        .option("end_fsync", 1);
    job.direct(4).seed(100 + seed).run(scene.dir()).map(drop)
}

pub(super) fn milliseconds(times: &[Duration]) -> Vec<f64> {
    times.iter().map(|time| time.as_secs_f64() * 1000.0).collect()
}

pub(super) fn spread(times: &[Duration]) -> String {
    super::report::spread(&milliseconds(times))
}
