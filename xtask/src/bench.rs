//! `cargo xtask bench`: what protection costs, measured against the same machine without it.
//!
//! Machines are shared and figures move by a factor between runs; ratios within one run move less. So both
//! sides take turns, several times, and medians are compared. A consumer that polls keeps virtual CPUs from
//! sleeping and can make a database *faster*: the unprotected side therefore runs beside an agent of its
//! own, which protects another device where nothing happens.

mod bytes;
mod history;
mod latency;
mod measure;
mod recovery;
mod report;
mod restore;
mod ship;
mod views;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use cdp_tests::Scene;

use crate::workspace::Workspace;
use crate::{demo, sh};

use measure::{Bench, Side};
use recovery::RecoveryEffort;
use report::Report;
use restore::RestoreEffort;

/// How to measure.
#[derive(clap::Args, Default)]
pub(crate) struct BenchArgs {
    /// A short run, to see that everything works: prints its table and writes no file
    #[arg(long)]
    quick: bool,
    /// Where the table goes
    #[arg(long, value_name = "FILE", default_value = "docs/bench.md")]
    to: PathBuf,
    /// Only the times of single writes while the engine resyncs or its store is full; writes no file
    #[arg(long)]
    latency: bool,
    /// Only what is written at a held rate; writes no file
    #[arg(long, conflicts_with = "latency")]
    held: bool,
    /// Only the bytes of log that a database's writes become; writes no file
    #[arg(long, conflicts_with_all = ["latency", "held"])]
    bytes: bool,
    /// What `--rewind` and `--views` measure; writes no file
    #[arg(long, conflicts_with_all = ["latency", "held", "bytes"])]
    restore: bool,
    /// Only how long `rewind` takes; writes no file
    #[arg(long, conflicts_with_all = ["latency", "held", "bytes", "restore"])]
    rewind: bool,
    /// Only how long `mount`, `image` and single reads take with a long history; writes a file of its own, beside the table
    #[arg(long, conflicts_with_all = ["latency", "held", "bytes", "restore", "rewind"])]
    views: bool,
    /// Only how long it takes until PostgreSQL runs again, with a mount, restic, borg and WAL replay; writes a file of its
    /// own, beside the table
    #[arg(long, conflicts_with_all = ["latency", "held", "bytes", "restore", "rewind", "views"])]
    recovery: bool,
    /// Only a server's lag, what travels to it, and how fast it takes in; writes a file of its own, beside the table
    #[arg(long, conflicts_with_all = ["latency", "held", "bytes", "restore", "rewind", "views", "recovery"])]
    ship: bool,
    /// How often both sides take turns (5; with --quick 2)
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// The machine and the binaries are ready (said by the bench itself to its own second half)
    #[arg(long, hide = true)]
    prepared: bool,
}

/// How long and how often everything is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// How often both sides take turns.
    pub(crate) rounds: usize,
    /// One measurement with fio.
    pub(crate) fio: Duration,
    /// One measurement with pgbench.
    pub(crate) pgbench: Duration,
    /// One stretch of writing at a held rate.
    pub(crate) sustained: Duration,
    /// One measurement of single writes: short, so that a resync lasts longer.
    pub(crate) latency: Duration,
    /// How often an image and a copy take turns.
    pub(crate) copies: usize,
}

impl Effort {
    fn of(args: &BenchArgs) -> Effort {
        let secs = Duration::from_secs;
        let effort = if args.quick {
            Effort {
                rounds: 2,
                fio: secs(3),
                pgbench: secs(5),
                sustained: secs(10),
                latency: secs(2),
                copies: 1,
            }
        } else {
            Effort {
                rounds: 5,
                fio: secs(10),
                pgbench: secs(20),
                sustained: secs(60),
                latency: secs(4),
                copies: 3,
            }
        };
        Effort {
            rounds: args.rounds.unwrap_or(effort.rounds).max(1),
            ..effort
        }
    }
}

/// Prepares the machine, builds, measures, and writes the table.
pub(crate) fn run(workspace: &Workspace, args: &BenchArgs) -> Result<()> {
    if !args.prepared {
        demo::prepare(workspace)?;
        sh::step(
            "build cdp-journal, and a stream that does nothing but QUIC",
            || {
                let mut build = workspace.cargo("build");
                sh::run(build.args(["--release", "--package", "cdp-journal", "--bins", "--examples"]))
            },
        )?;
        if args.recovery {
            recovery::get_rivals();
        }
    }
    if !sh::is_root() {
        return demo::again_as_root(workspace, &again(args));
    }
    let stream = workspace.target().join("release/examples/quic_stream");
    let began = CpuTime::now()?;
    let programs = ["fio", "mkfs.ext4", "losetup", "setpriv"];
    let text = demo::on_a_scene(workspace, &programs, |scene| match (args.bytes, args.restore) {
        (true, _) => measure_bytes(scene, Effort::of(args)),
        (_, true) => restore::measure(scene, restore_effort(args)),
        _ if args.rewind => restore::measure_rewinds(scene, restore_effort(args)),
        _ if args.ship => measure_ship(scene, Effort::of(args), &stream),
        _ if args.views => views::measure(scene, restore_effort(args)),
        _ if args.recovery => recovery::measure(scene.seed(), recovery_effort(args)),
        _ => measure(scene, args).and_then(|report| report.markdown()),
    })?;
    println!("{text}");
    let stolen = format!(
        "Of the machine's processor time {:.1} % went to others meanwhile (steal).",
        100.0 * CpuTime::now()?.stolen_since(&began)
    );
    sh::say(&stolen);
    if let Some((page, to)) = page(args, &text)?.filter(|_| !args.quick) {
        let text = format!("{}\n\n{stolen}\n", page.trim_end());
        let path = workspace.root.join(to);
        let folder = path.parent().context("a folder for the table")?;
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        sh::say(format!("written: {}", path.display()));
    }
    Ok(())
}

/// The page that a run writes, and where; none for what is only shown.
fn page(args: &BenchArgs, measured: &str) -> Result<Option<(String, PathBuf)>> {
    let of_part = |title: &str, flag: &str| {
        let head = report::head(title, &format!(" --{flag}"))?;
        let path = args.to.with_file_name(format!("bench-{flag}.md"));
        Ok(Some((format!("{head}\n{measured}"), path)))
    };
    match args {
        _ if args.ship => of_part("What a server costs", "ship"),
        _ if args.views => of_part("How soon a moment can be read", "views"),
        _ if args.recovery => of_part("How soon a database runs again", "recovery"),
        _ if parts(args).iter().any(|(is_asked, _)| *is_asked) => Ok(None),
        _ => Ok(Some((measured.to_owned(), args.to.clone()))),
    }
}

/// What the machine's processors did so far, in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CpuTime {
    all: u64,
    /// Of it what a hypervisor gave to others (proc_stat(5)).
    stolen: u64,
}

impl CpuTime {
    fn now() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        Self::parse(&text).context("/proc/stat tells no processor time")
    }

    fn parse(text: &str) -> Option<Self> {
        let fields = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
        let ticks: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
        // The time of guests, behind them, is part of the first two.
        let stolen = *ticks.get(7)?;
        Some(Self {
            all: ticks.iter().take(8).sum(),
            stolen,
        })
    }

    /// Which part of the time since then.
    fn stolen_since(&self, before: &Self) -> f64 {
        let stolen = self.stolen.saturating_sub(before.stolen);
        stolen as f64 / self.all.saturating_sub(before.all).max(1) as f64
    }
}

fn again(args: &BenchArgs) -> Vec<String> {
    let mut again = vec!["bench".to_owned(), "--prepared".to_owned(), "--to".to_owned()];
    again.push(args.to.display().to_string());
    for (is_given, flag) in [(args.quick, "--quick")].into_iter().chain(parts(args)) {
        if is_given {
            again.push(flag.to_owned());
        }
    }
    if let Some(rounds) = args.rounds {
        again.extend(["--rounds".to_owned(), rounds.to_string()]);
    }
    again
}

/// What is measured alone: whether it is asked for, and its flag.
fn parts(args: &BenchArgs) -> [(bool, &'static str); 8] {
    [
        (args.latency, "--latency"),
        (args.held, "--held"),
        (args.bytes, "--bytes"),
        (args.restore, "--restore"),
        (args.rewind, "--rewind"),
        (args.views, "--views"),
        (args.recovery, "--recovery"),
        (args.ship, "--ship"),
    ]
}

fn restore_effort(args: &BenchArgs) -> RestoreEffort {
    let mib: u64 = if args.quick { 512 } else { 4096 };
    RestoreEffort {
        rounds: Effort::of(args).rounds,
        volume_bytes: mib << 20,
        long_writes: if args.quick { 100_000 } else { 1_000_000 },
        reads: if args.quick { 2_000 } else { 10_000 },
    }
}

fn recovery_effort(args: &BenchArgs) -> RecoveryEffort {
    RecoveryEffort {
        rounds: Effort::of(args).rounds,
        scales: if args.quick { &[20] } else { &[100, 300] },
        transactions: if args.quick { 20_000 } else { 200_000 },
    }
}

fn measure(scene: &Scene, args: &BenchArgs) -> Result<Report> {
    let effort = Effort::of(args);
    let mut bench = Bench::set_up(scene, effort)?;
    let mut report = Report::new(effort);
    let is_all = !args.latency && !args.held;
    if is_all {
        measure_loads(&mut bench, effort, &mut report)?;
    }
    if is_all || args.held {
        measure_held(&mut bench, &mut report)?;
    }
    if is_all {
        for _ in 0..effort.copies {
            let copies = bench.image_and_copy()?;
            sh::say(copies.to_string());
            report.add_copies(copies);
        }
    }
    if is_all || args.latency {
        measure_latencies(&bench, effort, &mut report)?;
    }
    drop(bench);
    if is_all {
        report.add_rewinds(restore::measure_rewinds(scene, restore_effort(args))?);
    }
    Ok(report)
}

fn measure_bytes(scene: &Scene, effort: Effort) -> Result<String> {
    let bench = Bench::set_up(scene, effort)?;
    let mut runs = Vec::new();
    for transactions in bytes::Transactions::ALL {
        if let Some(figures) = bench.bytes(transactions, effort.sustained)? {
            sh::say(figures.to_string());
            runs.push(figures);
        }
    }
    if runs.is_empty() {
        bail!("the bytes of a database cannot be measured: PostgreSQL is missing");
    }
    Ok(bytes::table(&runs, effort.sustained))
}

fn measure_ship(scene: &Scene, effort: Effort, stream: &Path) -> Result<String> {
    let bench = Bench::set_up(scene, effort)?;
    let shipped = bench.ship(effort.sustained)?;
    let mut ingests = Vec::new();
    for _ in 0..effort.copies {
        ingests.push(bench.ingest(stream)?);
    }
    Ok(ship::table(shipped.as_ref(), &ingests, effort.sustained))
}

fn measure_loads(bench: &mut Bench<'_>, effort: Effort, report: &mut Report) -> Result<()> {
    for round in 0..effort.rounds {
        // Whoever comes first in one round comes second in the next.
        let sides = if round % 2 == 0 {
            Side::BOTH
        } else {
            [Side::BOTH[1], Side::BOTH[0]]
        };
        for side in sides {
            for load in measure::Load::ALL {
                let figures = bench
                    .measure(load, side)
                    .with_context(|| format!("{load:?}, {side:?}"))?;
                sh::say(format!(
                    "round {} of {}: {load:?}, {side:?}: {figures}",
                    round + 1,
                    effort.rounds
                ));
                report.add(load, side, figures);
            }
        }
    }
    Ok(())
}

fn measure_held(bench: &mut Bench<'_>, report: &mut Report) -> Result<()> {
    for load in measure::HeldLoad::ALL {
        let figures = bench.hold(load).with_context(|| format!("{load:?}"))?;
        sh::say(format!("{load:?}: {figures}"));
        report.add_held(load, figures);
    }
    Ok(())
}

fn measure_latencies(bench: &Bench<'_>, effort: Effort, report: &mut Report) -> Result<()> {
    for round in 0..effort.rounds {
        for (plight, latency) in bench.latencies(round % 2 == 0)? {
            sh::say(format!(
                "round {} of {}: {}: {latency}",
                round + 1,
                effort.rounds,
                plight.name()
            ));
            report.add_latency(plight, latency);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_went_to_others_is_told() {
        let before = CpuTime::parse("cpu  10 0 10 70 0 0 0 10 5 5\ncpu0 1").unwrap();
        let after = CpuTime::parse("cpu  20 0 20 130 0 0 0 30 9 9\n").unwrap();
        assert_eq!((before.all, before.stolen), (100, 10));
        assert_eq!(after.stolen_since(&before), 0.2);
        assert_eq!(before.stolen_since(&before), 0.0);
        assert_eq!(CpuTime::parse("intr 5"), None);
    }
}
