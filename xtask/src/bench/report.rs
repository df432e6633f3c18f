//! The table: medians, ratios, targets, and whether they were met.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use cdp_tests::device::MIB;

use super::Effort;
use super::latency::{Latency, Plight};
use super::measure::{AgentCost, Copies, Figures, HeldLoad, Load, Side};

const GIB: f64 = (1_u64 << 30) as f64;
const MEMORY_BYTES_MAX: u64 = 512 * MIB;
/// A held rate counts as held from this part of it on.
const HELD_PART_MIN: f64 = 0.98;
/// A write may take so much longer than unprotected.
const P99_RATIO_MAX: f64 = 1.3;
const IMAGE_RATIO_MIN: f64 = 0.7;

/// All figures of one run.
pub(super) struct Report {
    effort: Effort,
    figures: BTreeMap<(Load, Side), Vec<Figures>>,
    held: BTreeMap<HeldLoad, Figures>,
    copies: Vec<Copies>,
    latencies: BTreeMap<Plight, Vec<Latency>>,
    /// The table, as text.
    rewinds: Option<String>,
}

impl Report {
    pub(super) fn new(effort: Effort) -> Report {
        Report {
            effort,
            figures: BTreeMap::new(),
            held: BTreeMap::new(),
            copies: Vec::new(),
            latencies: BTreeMap::new(),
            rewinds: None,
        }
    }

    pub(super) fn add(&mut self, load: Load, side: Side, figures: Figures) {
        self.figures.entry((load, side)).or_default().push(figures);
    }

    pub(super) fn add_held(&mut self, load: HeldLoad, figures: Figures) {
        self.held.insert(load, figures);
    }

    pub(super) fn add_copies(&mut self, copies: Copies) {
        self.copies.push(copies);
    }

    pub(super) fn add_rewinds(&mut self, rewinds: String) {
        self.rewinds = Some(rewinds);
    }

    pub(super) fn add_latency(&mut self, plight: Plight, latency: Latency) {
        self.latencies.entry(plight).or_default().push(latency);
    }

    /// The page as it is written to `docs/bench.md`.
    pub(super) fn markdown(&self) -> Result<String> {
        let mut page = format!("{}\n{}\n", head("What protection costs", "")?, self.how()?);
        self.write_loads(&mut page)?;
        self.write_held(&mut page)?;
        self.write_latencies(&mut page)?;
        self.write_rest(&mut page)?;
        if let Some(rewinds) = &self.rewinds {
            write!(page, "\nBringing a device back by what differs: {rewinds}")?;
        }
        Ok(page)
    }

    fn how(&self) -> Result<String> {
        let Effort {
            rounds, fio, pgbench, ..
        } = self.effort;
        Ok(format!(
            "Both sides take turns, {rounds} times ({} s of fio, {} s of pgbench each); medians, and in brackets the \
             smallest and largest. The unprotected side runs beside an agent that protects another, idle device, \
             because a process that wakes often keeps virtual CPUs from sleeping and makes databases faster. The \
             devices are loop devices over the page cache, as fast as memory, so fio at depth measures CPU time; \
             pgbench (scale 20, 4 clients) measures what users feel. The agent has its default settings; its \
             store lies on the disk that also backs the devices.\n",
            fio.as_secs(),
            pgbench.as_secs(),
        ))
    }

    fn rates(&self, load: Load, side: Side) -> Vec<f64> {
        self.figures
            .get(&(load, side))
            .into_iter()
            .flatten()
            .map(|figures| figures.rate)
            .collect()
    }

    fn write_loads(&self, page: &mut String) -> Result<()> {
        if self.figures.is_empty() {
            return Ok(());
        }
        page.push_str(
            "\n| load | unprotected | protected | ratio | target | | agent CPU s per GiB | dropped writes |\n\
             |---|---:|---:|---:|---:|---|---:|---:|\n",
        );
        for load in Load::ALL {
            let (name, unit, target) = described(load);
            let (without, with) = (
                self.rates(load, Side::Unprotected),
                self.rates(load, Side::Protected),
            );
            if median(&without) == 0.0 {
                writeln!(page, "| {name} | not measured: not installed | | | | | | |")?;
                continue;
            }
            let ratio = median(&with) / median(&without);
            let cost = sum_of_costs(self.figures.get(&(load, Side::Protected)).into_iter().flatten());
            writeln!(
                page,
                "| {name}, {unit} | {} | {} | {ratio:.2} | {} | {} | {:.1} | {} |",
                spread(&without),
                spread(&with),
                target.map_or("none".to_owned(), |target| format!("{target:.2}")),
                target.map_or("", |target| verdict(ratio >= target)),
                cpu_per_gib(cost),
                cost.dropped_writes,
            )?;
        }
        Ok(())
    }

    fn write_held(&self, page: &mut String) -> Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        let seconds = self.effort.sustained.as_secs();
        writeln!(
            page,
            "\nHeld for {seconds} s, protected; the target is to hold the rate without a dropped write.\n"
        )?;
        page.push_str("| load | asked | written | dropped writes | | agent CPU s per GiB |\n|---|---:|---:|---:|---|---:|\n");
        for (load, figures) in &self.held {
            let asked = load.bytes_per_second() as f64;
            let name = match load {
                HeldLoad::Random => "4 KiB random",
                HeldLoad::Sequential => "1 MiB sequential",
            };
            let held = figures.bytes_per_second >= asked * HELD_PART_MIN && figures.agent.dropped_writes == 0;
            writeln!(
                page,
                "| {name} | {:.0} MB/s | {:.0} MB/s | {} | {} | {:.1} |",
                asked / 1e6,
                figures.bytes_per_second / 1e6,
                figures.agent.dropped_writes,
                verdict(held),
                cpu_per_gib(figures.agent),
            )?;
        }
        Ok(())
    }

    fn write_latencies(&self, page: &mut String) -> Result<()> {
        if self.latencies.is_empty() {
            return Ok(());
        }
        writeln!(
            page,
            "\nWhat one write takes while the engine is in trouble: 4 KiB random writes, direct, depth 1, 2000 each \
             second; microseconds that 99 of 100 stayed under.\n"
        )?;
        page.push_str(
            "| | p99 | against unprotected | target | | lasted to the end |\n|---|---:|---:|---:|---|---:|\n",
        );
        let p99 = |plight: Plight| -> Vec<f64> {
            let of = self.latencies.get(&plight).into_iter().flatten();
            of.map(|latency| latency.p99_us).collect()
        };
        let unprotected = median(&p99(Plight::Unprotected));
        for plight in Plight::ALL {
            let Some(latencies) = self.latencies.get(&plight) else {
                continue;
            };
            let lasted = latencies.iter().filter(|latency| latency.lasted).count();
            let ratio = median(&p99(plight)) / unprotected;
            let (target, met) = match plight {
                Plight::Unprotected => (String::new(), ""),
                _ => (format!("{P99_RATIO_MAX:.2}"), verdict(ratio <= P99_RATIO_MAX)),
            };
            writeln!(
                page,
                "| {} | {} | {ratio:.2} | {target} | {met} | {lasted} of {} |",
                plight.name(),
                spread(&p99(plight)),
                latencies.len(),
            )?;
        }
        Ok(())
    }

    fn write_rest(&self, page: &mut String) -> Result<()> {
        let speeds = |of: fn(&Copies) -> f64| {
            self.copies
                .iter()
                .map(|copies| of(copies) / 1e6)
                .collect::<Vec<_>>()
        };
        let images = speeds(|copies| copies.image);
        let protected = self
            .figures
            .iter()
            .filter(|((_, side), _)| *side == Side::Protected);
        let all = protected
            .flat_map(|(_, figures)| figures)
            .chain(self.held.values());
        let peak = all.map(|figures| figures.agent.peak_memory_bytes).max();
        if images.is_empty() && peak.is_none() {
            return Ok(());
        }
        writeln!(page, "\n| what | figure | target | |\n|---|---:|---:|---|")?;
        let others = [
            (
                "`cp` and `sync`: both are on disk",
                speeds(|copies| copies.synced),
            ),
            ("`cp`, which is not on disk", speeds(|copies| copies.copy)),
        ];
        for (other, copies) in others {
            if images.is_empty() {
                break;
            }
            let ratio = median(&images) / median(&copies);
            writeln!(
                page,
                "| full image (on disk) of a device full of noise against {other}; same bytes, cold cache | {} MB/s against {} MB/s: {ratio:.2} | {IMAGE_RATIO_MIN:.2} | {} |",
                spread(&images),
                spread(&copies),
                verdict(ratio >= IMAGE_RATIO_MIN),
            )?;
        }
        let Some(peak) = peak else { return Ok(()) };
        writeln!(
            page,
            "| the agent's largest memory (resident, any of the runs above) | {} MiB | below {} MiB | {} |",
            peak / MIB,
            MEMORY_BYTES_MAX / MIB,
            verdict(peak < MEMORY_BYTES_MAX),
        )?;
        Ok(())
    }
}

/// Name, unit and target of a load.
fn described(load: Load) -> (&'static str, &'static str, Option<f64>) {
    match load {
        Load::Random1 => ("4 KiB random writes, direct, depth 1", "writes/s", Some(0.85)),
        Load::Random32 => ("4 KiB random writes, direct, depth 32", "writes/s", Some(0.55)),
        Load::Sequential => ("1 MiB sequential writes, direct, depth 4", "writes/s", None),
        Load::Pgbench => ("pgbench", "transactions/s", Some(0.90)),
    }
}

pub(super) fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "**missed**" }
}

pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

pub(super) fn spread(values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(0.0, f64::max);
    format!("{:.0} ({least:.0} to {most:.0})", median(values))
}

fn sum_of_costs<'a>(figures: impl Iterator<Item = &'a Figures>) -> AgentCost {
    figures.fold(AgentCost::default(), |sum, figures| AgentCost {
        cpu: sum.cpu + figures.agent.cpu,
        captured_bytes: sum.captured_bytes + figures.agent.captured_bytes,
        dropped_writes: sum.dropped_writes + figures.agent.dropped_writes,
        peak_memory_bytes: sum.peak_memory_bytes.max(figures.agent.peak_memory_bytes),
    })
}

fn cpu_per_gib(cost: AgentCost) -> f64 {
    if cost.captured_bytes == 0 {
        0.0
    } else {
        cost.cpu.as_secs_f64() / (cost.captured_bytes as f64 / GIB)
    }
}

/// What a page begins with: by which run it was written, when and where.
pub(super) fn head(title: &str, flags: &str) -> Result<String> {
    let date = jiff::Timestamp::now().strftime("%Y-%m-%d");
    let machine = machine()?;
    Ok(format!(
        "# {title}\n\nWritten by `cargo xtask bench{flags}` on {date}. Machine: {machine}.\n"
    ))
}

/// Processor, cores, memory and kernel.
fn machine() -> Result<String> {
    let read = |path: &str| std::fs::read_to_string(path).with_context(|| format!("read {path}"));
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split(':').nth(1))
            .map(|value| value.trim().to_owned())
            .unwrap_or_default()
    };
    let (cpu, memory) = (read("/proc/cpuinfo")?, read("/proc/meminfo")?);
    let cores = cpu.lines().filter(|line| line.starts_with("processor")).count();
    let memory_kib: u64 = field(&memory, "MemTotal")
        .trim_end_matches(" kB")
        .parse()
        .unwrap_or(0);
    let release = read("/proc/sys/kernel/osrelease")?;
    let kernel = release.split('-').next().unwrap_or_default().trim().to_owned();
    let model = field(&cpu, "model name");
    Ok(format!(
        "{cores} cores of {model}, {} GiB of memory, Linux {kernel}",
        memory_kib / (1 << 20)
    ))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn figures(rate: f64) -> Figures {
        let agent = AgentCost {
            cpu: Duration::from_secs(2),
            captured_bytes: 1 << 30,
            ..AgentCost::default()
        };
        Figures {
            rate,
            bytes_per_second: 1e8,
            agent,
        }
    }

    fn report() -> Report {
        let secs = Duration::from_secs;
        Report::new(Effort {
            rounds: 3,
            fio: secs(1),
            pgbench: secs(1),
            sustained: secs(1),
            latency: secs(1),
            copies: 1,
        })
    }

    /// Goal: what was not measured is not in the page. Method: a run of latencies alone.
    #[test]
    fn what_was_not_measured_is_left_out() {
        let mut report = report();
        let latency = Latency {
            p50_us: 50.0,
            p99_us: 100.0,
            lasted: true,
        };
        report.add_latency(Plight::Unprotected, latency);
        let page = report.markdown().expect("a page");
        assert!(
            !page.contains("NaN") && !page.contains("Held for") && !page.contains("memory (resident"),
            "{page}"
        );
        assert_eq!(
            page.matches("|---").count(),
            page.matches("| lasted to the end").count() * 6,
            "{page}"
        );
    }

    /// Goal: the table tells medians, the ratio and a miss. Method: figures with a known outcome.
    #[test]
    fn a_ratio_below_its_target_is_told_as_missed() {
        let mut report = report();
        for (without, with) in [(100.0, 80.0), (900.0, 85.0), (90.0, 10.0)] {
            report.add(Load::Random1, Side::Unprotected, figures(without));
            report.add(Load::Random1, Side::Protected, figures(with));
        }
        report.add_held(HeldLoad::Random, figures(1.0));
        report.add_copies(Copies {
            image: 5e8,
            copy: 1e9,
            synced: 6e8,
        });
        for (plight, p99_us) in [(Plight::Unprotected, 100.0), (Plight::Resync, 131.0)] {
            report.add_latency(
                plight,
                Latency {
                    p50_us: 50.0,
                    p99_us,
                    lasted: true,
                },
            );
        }
        let page = report.markdown().expect("a page");
        assert!(
            page.contains("| 100 (90 to 900) | 80 (10 to 85) | 0.80 | 0.85 | **missed** | 2.0 | 0 |"),
            "{page}"
        );
        assert!(
            page.contains("| 4 KiB random | 100 MB/s | 100 MB/s | 0 | met | 2.0 |"),
            "{page}"
        );
        assert!(
            page.contains("| while a resync runs | 131 (131 to 131) | 1.31 | 1.30 | **missed** | 1 of 1 |"),
            "{page}"
        );
        assert!(
            page.contains("500 (500 to 500) MB/s against 600 (600 to 600) MB/s: 0.83 | 0.70 | met |"),
            "{page}"
        );
        assert!(
            page.contains(
                "500 (500 to 500) MB/s against 1000 (1000 to 1000) MB/s: 0.50 | 0.70 | **missed** |"
            ),
            "{page}"
        );
    }

    /// Goal: the middle is the middle. Method: odd, even and none.
    #[test]
    fn the_median_is_the_middle_value() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}
