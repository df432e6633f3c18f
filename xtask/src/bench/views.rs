//! What can be read without going back, and how soon: `mount` with a short and a long history and over a slow line, `image`
//! against `cp`, and single reads.

use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use cdp_tests::Scene;
use cdp_tests::device::MIB;
use cdp_tests::fio::{Fio, FioReport};
use cdp_tests::network::{self, Network};
use cdp_tests::restore::Restore;
use cdp_tests::scene::missing_here;
use cdp_tests::server::Server;
use cdp_tests::view::View;

use super::history::{BLOCK_BYTES, FILE, History, Moment, VOLUME_BYTES, time_mount};
use super::measure::{forget_caches, time_copy};
use super::report::{median, verdict};
use super::restore::{Cache, RestoreEffort, milliseconds, spread};
use crate::sh;

/// A mount may take that long until its first file is listed...
const MOUNT_SECONDS_MAX: f64 = 1.0;
/// ... a long history so much longer than a short one...
const MOUNT_GROWTH_MAX: f64 = 1.3;
/// ... and one from a server that long.
const FAR_MOUNT_SECONDS_MAX: f64 = 3.0;
const FAR_MEGABITS_PER_SECOND: u64 = 50;
const SHORT_WRITES: u64 = 100;
/// `image` reaches that much of the speed of `cp`.
const IMAGE_RATIO_MIN: f64 = 0.8;
/// 99 of 100 random reads of a view take at most that long.
const READ_P99_MS_MAX: f64 = 5.0;

/// Measures and gives the tables.
pub(super) fn measure(scene: &Scene, effort: RestoreEffort) -> Result<String> {
    let mut histories = [
        History::make(scene, "short", SHORT_WRITES, |plan| plan)?,
        History::make(scene, "long", effort.long_writes, |plan| plan)?,
    ];
    let mounts = mounts(scene, &mut histories, effort)?;
    let [short, long] = histories;
    short.remove()?;
    let images = images(scene, &long, effort.rounds)?;
    let reads = reads(scene, &long, effort)?;
    long.remove()?;
    let far = far_mounts(scene, effort)?;
    Ok(format!(
        "{} rounds; medians, and in brackets the smallest and largest. Cold: after the page cache was dropped. Each \
         history is of a volume of {} MiB with ext4; all writes are of 4 KiB of noise, the first half of them fill a file, \
         the other half write all of it once more.\n\n{mounts}\n{images}\n{reads}\n{far}",
        effort.rounds,
        VOLUME_BYTES / MIB,
    ))
}

fn mounts(scene: &Scene, histories: &mut [History; 2], effort: RestoreEffort) -> Result<String> {
    let views = [
        View::at(scene.path("then-short"), histories[0].restore.clone())?,
        View::at(scene.path("then-long"), histories[1].restore.clone())?,
    ];
    let mut rows = mount_rows("the agent runs", &views, effort.rounds)?;
    for history in histories {
        history.stop()?;
    }
    rows.extend(mount_rows("it has stopped", &views, effort.rounds)?);
    Ok(format!(
        "| mount until its first file is listed, ms | {SHORT_WRITES} writes | {} writes | growth | targets | |\n\
         |---|---:|---:|---:|---:|---|\n{}",
        effort.long_writes,
        rows.concat()
    ))
}

fn mount_rows(state: &str, views: &[View; 2], rounds: usize) -> Result<Vec<String>> {
    let mut rows = Vec::new();
    for cache in Cache::BOTH {
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (view, times) in views.iter().zip(&mut times) {
                cache.prepare()?;
                times.push(time_mount(view)?);
            }
        }
        rows.push(mount_row(&format!("{state}, {cache}"), &times));
        sh::say(rows[rows.len() - 1].trim_end());
    }
    Ok(rows)
}

/// Of a short and a long history.
fn mount_row(how: &str, times: &[Vec<Duration>; 2]) -> String {
    let [short_ms, long_ms] = times.each_ref().map(|times| median(&milliseconds(times)));
    let growth = long_ms / short_ms;
    let is_met = long_ms.max(short_ms) <= 1000.0 * MOUNT_SECONDS_MAX && growth <= MOUNT_GROWTH_MAX;
    let [short, long] = times.each_ref().map(|times| spread(times));
    format!(
        "| {how} | {short} | {long} | {growth:.2} | {MOUNT_SECONDS_MAX:.1} s, {MOUNT_GROWTH_MAX:.1} | {} |\n",
        verdict(is_met),
    )
}

/// How long the same bytes take: an image, which is on disk when it is done, `cp`, and `cp` with `sync`.
#[derive(Clone, Debug, Default)]
struct CopyTimes {
    image: Vec<Duration>,
    copy: Vec<Duration>,
    synced: Vec<Duration>,
}

fn images(scene: &Scene, history: &History, rounds: usize) -> Result<String> {
    let (image, copy) = (scene.path("image"), scene.path("copy"));
    let mut of_moment = [CopyTimes::default(), CopyTimes::default()];
    for round in 0..rounds {
        for (moment, times) in Moment::ALL.into_iter().zip(&mut of_moment) {
            forget_caches()?;
            let started = Instant::now();
            history.restore.image("v", moment.when(), &image)?.success()?;
            times.image.push(started.elapsed());
            // Both leave out the same holes.
            let (copied, synced) = time_copy(&image, &copy, "--sparse=auto")?;
            times.copy.push(copied);
            times.synced.push(synced);
            if round == 0 {
                history.expect_same(moment, &image)?;
            }
            for path in [&image, &copy] {
                std::fs::remove_file(path).context("remove a copy")?;
            }
        }
    }
    let rows: Vec<String> = Moment::ALL
        .into_iter()
        .zip(&of_moment)
        .flat_map(|(moment, times)| image_rows(moment.when(), times))
        .collect();
    rows.iter().for_each(|row| sh::say(row.trim_end()));
    Ok(format!(
        "| image of {} MiB of noise and holes in {} writes, cold, ms | image (on disk) | the other | speed of it | target | |\n\
         |---|---:|---:|---:|---:|---|\n{}",
        History::file_bytes(history.writes) / MIB,
        history.writes,
        rows.concat()
    ))
}

fn image_rows(when: &str, times: &CopyTimes) -> [String; 2] {
    let others = [
        ("`cp`, which is not on disk", &times.copy),
        ("`cp` and `sync`", &times.synced),
    ];
    others.map(|(other, other_times)| {
        let ratio = median(&milliseconds(other_times)) / median(&milliseconds(&times.image));
        format!(
            "| `{when}` against {other} | {} | {} | {ratio:.2} | {IMAGE_RATIO_MIN:.2} | {} |\n",
            spread(&times.image),
            spread(other_times),
            verdict(ratio >= IMAGE_RATIO_MIN),
        )
    })
}

/// What is read at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReadOf {
    /// The image, by FUSE alone.
    Image,
    /// The file that was written, through ext4 and a loop device on the image.
    File,
}

impl ReadOf {
    const ALL: [ReadOf; 2] = [ReadOf::Image, ReadOf::File];

    fn flags(self) -> &'static [&'static str] {
        match self {
            ReadOf::Image => &["--raw"],
            ReadOf::File => &[],
        }
    }

    fn path(self, dir: &Path) -> std::path::PathBuf {
        dir.join(match self {
            ReadOf::Image => "v.img",
            ReadOf::File => FILE,
        })
    }

    fn in_words(self, writes: u64) -> String {
        let percent = 100 * History::file_bytes(writes) / VOLUME_BYTES;
        match self {
            ReadOf::Image => format!("the image (`mount --raw`), {percent} % of it written"),
            ReadOf::File => "the file in it (`mount`), all of it written".to_owned(),
        }
    }
}

fn reads(scene: &Scene, history: &History, effort: RestoreEffort) -> Result<String> {
    let view = View::at(scene.path("then-read"), history.restore.clone())?;
    let mut rows = Vec::new();
    for read_of in ReadOf::ALL {
        let mut reports = Vec::new();
        for round in 0..effort.rounds {
            forget_caches()?;
            view.mount("latest", read_of.flags())?.success()?;
            let job = Fio::new("reads", &read_of.path(view.dir()), "randread")
                .option("bs", BLOCK_BYTES)
                .option("io_size", effort.reads * BLOCK_BYTES)
                .option("allow_file_create", 0);
            reports.push(job.direct(1).seed(round as u64).run(scene.dir())?);
            view.try_unmount()?.success()?;
        }
        rows.push(read_row(&read_of.in_words(history.writes), &reports));
        sh::say(rows[rows.len() - 1].trim_end());
    }
    Ok(format!(
        "| {} random reads of 4 KiB, one at a time, no block twice, cold; {} writes; µs | half of them | 99 of 100 | target | |\n\
         |---|---:|---:|---:|---|\n{}",
        effort.reads,
        history.writes,
        rows.concat()
    ))
}

fn read_row(what: &str, reports: &[FioReport]) -> String {
    let of = |value: fn(&FioReport) -> f64| reports.iter().map(value).collect::<Vec<f64>>();
    let (p50, p99) = (
        of(|report| report.latency_p50_us),
        of(|report| report.latency_p99_us),
    );
    format!(
        "| {what} | {} | {} | {READ_P99_MS_MAX} ms | {} |\n",
        super::report::spread(&p50),
        super::report::spread(&p99),
        verdict(median(&p99) <= 1000.0 * READ_P99_MS_MAX),
    )
}

fn far_mounts(scene: &Scene, effort: RestoreEffort) -> Result<String> {
    let title = format!(
        "| mount from a server over {FAR_MEGABITS_PER_SECOND} Mbit/s until its first file is listed, ms | {} writes | target | |\n\
         |---|---:|---:|---|\n",
        effort.long_writes
    );
    if let Some(why) = missing_here(&network::PROGRAMS) {
        return Ok(format!("{title}| not measured: {why} | | | |\n"));
    }
    let network = Rc::new(Network::new(scene)?);
    let mut server = Server::start_in(scene, &scene.path("site"), &network)?;
    let (ship, read) = server.enroll_both(scene, "bench")?;
    let history = History::make(scene, "far", effort.long_writes, |plan| {
        plan.on(network.agent).ships_to(server.address(), &ship)
    })?;
    network.shape(FAR_MEGABITS_PER_SECOND)?;
    let restore = Restore::from_server(server.address(), &read)?.on(network.agent);
    let view = View::at(scene.path("then-far"), restore)?;
    let mut rows = Vec::new();
    for cache in Cache::BOTH {
        let mut times = Vec::new();
        for _ in 0..effort.rounds {
            cache.prepare()?;
            times.push(time_mount(&view)?);
        }
        rows.push(far_row(cache, &times));
        sh::say(rows[rows.len() - 1].trim_end());
    }
    network.unshape()?;
    history.remove()?;
    server.stop()?;
    Ok(format!("{title}{}", rows.concat()))
}

fn far_row(cache: Cache, times: &[Duration]) -> String {
    format!(
        "| {cache} | {} | {FAR_MOUNT_SECONDS_MAX:.1} s | {} |\n",
        spread(times),
        verdict(median(&milliseconds(times)) <= 1000.0 * FAR_MOUNT_SECONDS_MAX),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(times: &[u64]) -> Vec<Duration> {
        times.iter().copied().map(Duration::from_millis).collect()
    }

    /// Goal: a mount that is slow, or that grows, is told as missed, and one over a slow line has a target of its own.
    /// Method: medians on both sides of each target.
    #[test]
    fn a_slow_mount_is_told_as_missed() {
        let row = |short, long| mount_row("cold", &[ms(short), ms(long)]);
        assert_eq!(
            row(&[100, 900, 90], &[130, 120, 140]),
            "| cold | 100 (90 to 900) | 130 (120 to 140) | 1.30 | 1.0 s, 1.3 | met |\n"
        );
        assert!(row(&[100], &[131]).ends_with("| 1.31 | 1.0 s, 1.3 | **missed** |\n"));
        assert!(row(&[900], &[1001]).ends_with("| 1.11 | 1.0 s, 1.3 | **missed** |\n"));
        assert_eq!(
            far_row(Cache::Warm, &ms(&[3000, 2999, 9000])),
            "| warm | 3000 (2999 to 9000) | 3.0 s | met |\n"
        );
        assert_eq!(
            far_row(Cache::Cold, &ms(&[3001])),
            "| cold | 3001 (3001 to 3001) | 3.0 s | **missed** |\n"
        );
    }

    /// Goal: an image's speed is told against both copies. Method: times that miss the one and meet the other.
    #[test]
    fn an_image_is_held_against_both_copies() {
        let times = CopyTimes {
            image: ms(&[1000, 1100, 900]),
            copy: ms(&[790]),
            synced: ms(&[800]),
        };
        let [copy, synced] = image_rows("latest", &times);
        assert_eq!(
            copy,
            "| `latest` against `cp`, which is not on disk | 1000 (900 to 1100) | 790 (790 to 790) | 0.79 | 0.80 | \
             **missed** |\n"
        );
        assert!(synced.ends_with("| 0.80 | 0.80 | met |\n"), "{synced}");
    }

    /// Goal: reads that are too slow are told as missed. Method: the median of what 99 of 100 stayed under, on both sides
    /// of the target.
    #[test]
    fn slow_reads_are_told_as_missed() {
        let report = |latency_p99_us| FioReport {
            bytes: 0,
            bytes_per_second: 0.0,
            iops: 0.0,
            latency_p50_us: 200.0,
            latency_p99_us,
        };
        assert_eq!(
            read_row("it", &[report(5000.0), report(9000.0), report(10.0)]),
            "| it | 200 (200 to 200) | 5000 (10 to 9000) | 5 ms | met |\n"
        );
        assert!(read_row("it", &[report(5001.0)]).ends_with("| 5 ms | **missed** |\n"));
    }
}
