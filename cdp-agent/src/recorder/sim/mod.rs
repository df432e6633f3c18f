//! A seeded simulator around the recorder: writers, driver, ring, disk, store and crashes in every order, and after
//! each step the log is compared with what the device really held (`model`).
//!
//! `kernel` is the host with the probe, `agent` the threads of `pipeline` and `readback` in small steps, `notes` what a
//! killed agent leaves and how the next one takes the probe over. What is not
//! simulated: several volumes, sizes that end within a block or that are as before when they are looked at again, a write
//! whose end is skipped by the kernel although it was dropped as
//! well, and drivers of whole bios that do not tell where a bio was, or whose ends are skipped.
//!
//! `CDP_SIM_SEED` replays one run, `CDP_SIM_SEEDS` and `CDP_SIM_STEPS` set how many runs there are and how long they
//! are, `CDP_SIM_SECONDS` goes on with further seeds for that long, `CDP_SIM_FIRST` is the seed of the first run.

mod agent;
mod job;
mod kernel;
mod model;
mod notes;

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use agent::Agent;
use kernel::Kernel;
use model::Model;

const DISK: DiskNumber = DiskNumber(7 << 20);
const SLOT: Slot = Slot(0);
/// Of the volume; 64 blocks, one bit each in a word.
const SECTORS: usize = 512;
/// Where it begins on its disk: inside of a region of the dirty map.
const START: u64 = 8;
const REGION_SECTORS: u64 = 16;
const PLUG_NS: u64 = PLUG_TIME.as_nanos() as u64 * 9 / 10;
const MS: u64 = 1_000_000;

const SEEDS: u64 = 2000;
const STEPS: u64 = 600;
/// After so many steps of everybody, without new writes, all is well again.
const SETTLE_STEPS_MAX: u64 = 20_000;
/// In which a fault that was made on purpose is found.
const PLANTED_TIME_MAX: Duration = Duration::from_secs(60);
/// Everything is compared after so many steps, and what changed after each.
const FULL_CHECK_STEPS: u64 = 64;

fn volume_id() -> VolumeId {
    VolumeId::new(1).unwrap()
}

/// SplitMix64.
#[derive(Debug)]
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A fault of the agent, made on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Planted {
    /// A run is read although writes to it are in flight.
    SkipInFlight,
    /// A gap is closed although the disk has writes on their way.
    CloseEarly,
    /// One of the marks that were taken is not told.
    ForgetMark,
}

/// What may happen in a run.
#[derive(Debug)]
struct Profile {
    bio_based: bool,
    ring_units: u64,
    failures: bool,
    /// Ends of writes that nobody sees.
    skips: bool,
    /// Writes that nobody sees, counted by the kernel.
    misses: bool,
    /// Writes that take up to 13 s.
    slow: bool,
    read_errors: bool,
    full_store: bool,
    crashes: bool,
    /// Of the agent alone: the probe goes on, and the next agent takes it up.
    kills: bool,
    /// The volume grows and shrinks.
    resizes: bool,
    planted: Option<Planted>,
}

impl Profile {
    fn of(rng: &mut Rng) -> Self {
        Self {
            bio_based: rng.one_in(4),
            ring_units: [40, 120, 1 << 30][rng.below(3) as usize],
            failures: rng.one_in(3),
            skips: rng.one_in(3),
            misses: rng.one_in(6),
            slow: rng.one_in(3),
            read_errors: rng.one_in(4),
            full_store: rng.one_in(4),
            crashes: rng.one_in(3),
            kills: rng.one_in(3),
            resizes: rng.one_in(3),
            planted: None,
        }
    }
}

#[derive(Debug)]
struct Sim {
    rng: Rng,
    profile: Profile,
    kernel: Kernel,
    model: Model,
    agent: Option<Agent>,
    has_room: bool,
    takeovers: u64,
}

impl Sim {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let profile = Profile::of(&mut rng);
        let kernel = Kernel::new(&mut rng);
        let model = Model::new(kernel.volume());
        Self {
            rng,
            profile,
            kernel,
            model,
            agent: None,
            has_room: true,
            takeovers: 0,
        }
    }

    fn advance(&mut self) {
        let most = match self.rng.below(400) {
            0 => 5000 * MS,
            1..8 => 600 * MS,
            8..40 => 60 * MS,
            40..160 => 5 * MS,
            _ => MS / 5,
        };
        self.kernel.passes(self.rng.below(most));
    }

    fn step(&mut self) {
        self.advance();
        let Self {
            rng,
            profile,
            kernel,
            model,
            agent,
            has_room,
            takeovers,
        } = self;
        if profile.full_store && rng.one_in(150) {
            *has_room = !*has_room;
        }
        if profile.resizes && rng.one_in(100) {
            // What it holds when it has grown is another matter only where the log knows that it was smaller.
            let known = agent.as_ref().map(|agent| model.size_at(agent.appended()));
            kernel.resize(rng, model, known.is_none_or(|size| size == Some(kernel.size)));
        }
        let Some(running) = agent.as_mut() else {
            match rng.below(4) {
                0 => *agent = Some(Agent::start(kernel, model, profile)),
                1 => kernel.queue(rng, profile, model),
                2 => kernel.take(rng),
                _ => kernel.complete(rng, profile, model),
            }
            return;
        };
        if profile.crashes && rng.one_in(400) {
            let next = running.survives(rng) + 1;
            kernel.goes_down(model, next);
            *agent = None;
            return;
        }
        if profile.kills && rng.one_in(300) {
            *agent = running.killed(kernel, model);
            *takeovers += u64::from(agent.is_some());
            return;
        }
        if !running.is_attached(kernel) && rng.one_in(8) {
            running.attach(kernel);
        }
        let actor = rng.below(25);
        for _ in 0..1 + rng.below(8) {
            match actor {
                0..2 => {
                    kernel.queue(rng, profile, model);
                    break;
                }
                2..4 => kernel.take(rng),
                4..8 => kernel.complete(rng, profile, model),
                8..15 => running.capture_step(rng, kernel, model),
                15..21 => running.readback_step(rng, kernel, model, profile.read_errors),
                21 => running.sizing_step(rng, kernel, model),
                _ => running.store_step(rng, *has_room),
            }
        }
    }

    fn check(&mut self, everything: bool) -> Result<(), String> {
        let suspects = self
            .agent
            .as_ref()
            .map_or(0, |agent| agent.unsettled(&self.kernel));
        self.model.check(everything, self.kernel.known_ns(), suspects)
    }

    /// Without new writes and faults, the volume is exact again after a bounded time.
    fn settle(&mut self) -> Result<(), String> {
        self.profile.failures = false;
        self.profile.skips = false;
        self.profile.read_errors = false;
        for _ in 0..SETTLE_STEPS_MAX {
            self.kernel.passes(self.rng.below(4 * MS));
            if self.kernel.is_idle()
                && self
                    .agent
                    .as_ref()
                    .is_some_and(|agent| agent.is_settled(&self.kernel))
            {
                self.check(true)?;
                let size = self.model.size_at(u64::MAX);
                if size != Some(self.kernel.size) {
                    return Err(format!(
                        "settled, and the volume has {size:?} sectors: the device has {}",
                        self.kernel.size
                    ));
                }
                let wrong = (0..self.kernel.size)
                    .find(|&sector| self.model.latest(sector) != self.kernel.volume()[sector]);
                return match wrong {
                    None if self.model.is_exact() => Ok(()),
                    None => Err("the recorder calls exact what the log does not".into()),
                    Some(sector) => Err(format!(
                        "settled, and sector {sector} (block {}) shows {}: the device holds {}",
                        sector / 8,
                        self.model.latest(sector),
                        self.kernel.volume()[sector]
                    )),
                };
            }
            let agent = self
                .agent
                .get_or_insert_with(|| Agent::start(&mut self.kernel, &mut self.model, &self.profile));
            agent.sizing_step(&mut self.rng, &mut self.kernel, &mut self.model);
            if !agent.is_attached(&self.kernel) {
                agent.attach(&mut self.kernel);
            }
            self.kernel.take(&mut self.rng);
            self.kernel
                .complete(&mut self.rng, &self.profile, &mut self.model);
            agent.capture_step(&mut self.rng, &mut self.kernel, &mut self.model);
            agent.readback_step(&mut self.rng, &mut self.kernel, &mut self.model, false);
            agent.store_step(&mut self.rng, true);
            self.check(false)?;
        }
        Err(format!("not settled after {SETTLE_STEPS_MAX} steps"))
    }

    fn run(&mut self, steps: u64) -> Result<(), String> {
        if self.rng.one_in(2) {
            self.settle_first()?;
        }
        for step in 1..=steps {
            self.step();
            self.check(step % FULL_CHECK_STEPS == 0)
                .map_err(|what| format!("step {step}: {what}"))?;
        }
        self.settle()
    }

    /// Half of the runs begin with a volume that is protected.
    fn settle_first(&mut self) -> Result<(), String> {
        let (failures, skips, read_errors) = (
            self.profile.failures,
            self.profile.skips,
            self.profile.read_errors,
        );
        self.settle()?;
        (
            self.profile.failures,
            self.profile.skips,
            self.profile.read_errors,
        ) = (failures, skips, read_errors);
        Ok(())
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
    )
}

/// Goal: what the log calls exact is what the device held, after every step; gaps close in bounded time, and never
/// while a write that was not seen may be on its way. Method: see the module's head.
#[test]
fn every_exact_moment_is_what_the_device_held() {
    let steps = number("CDP_SIM_STEPS").unwrap_or(STEPS);
    let first = number("CDP_SIM_SEED").or(number("CDP_SIM_FIRST")).unwrap_or(0);
    let runs_min = match number("CDP_SIM_SEED") {
        Some(_) => 1,
        None => number("CDP_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let seconds = number("CDP_SIM_SECONDS").filter(|_| number("CDP_SIM_SEED").is_none());
    let time_min = Duration::from_secs(seconds.unwrap_or(0));
    let (began, mut runs) = (std::time::Instant::now(), 0);
    let (mut checked, mut gaps, mut corrected, mut takeovers) = (0, 0, 0, 0);
    println!("seeds from {first} on, {steps} steps each");
    while runs < runs_min || began.elapsed() < time_min {
        let seed = first + runs;
        runs += 1;
        let mut sim = Sim::new(seed);
        let result = catch_unwind(AssertUnwindSafe(|| sim.run(steps)));
        let what = match result {
            Ok(Ok(())) => {
                checked += sim.model.checked_sectors;
                gaps += sim.model.gaps;
                takeovers += sim.takeovers;
                corrected += sim
                    .agent
                    .map_or(0, |agent| agent.recorder.volumes[0].corrected_blocks);
                continue;
            }
            Ok(Err(what)) => what,
            Err(_) => "a panic, see above".to_owned(),
        };
        let log = sim.model.tail(40).join("\n");
        panic!(
            "CDP_SIM_SEED={seed} CDP_SIM_STEPS={steps}: {what}\n{:?}\n{log}\nfound after {} runs, {:.1} s",
            Sim::new(seed).profile,
            runs,
            began.elapsed().as_secs_f64()
        );
    }
    println!(
        "seeds {first} to {}, {} steps: {checked} sectors compared, {gaps} gaps, {corrected} corrected blocks, \
         {takeovers} takeovers",
        first + runs - 1,
        runs * steps
    );
}

/// Goal: the simulator finds what it is for. Method: faults made on purpose, each of which one of its runs must show.
#[test]
fn a_planted_fault_is_found_within_a_minute() {
    for planted in [Planted::SkipInFlight, Planted::CloseEarly, Planted::ForgetMark] {
        let began = std::time::Instant::now();
        let found = (0..).find(|&seed| {
            let elapsed = began.elapsed();
            assert!(
                elapsed < PLANTED_TIME_MAX,
                "{planted:?} is not found by seeds below {seed}"
            );
            let mut sim = Sim::new(seed);
            sim.profile.planted = Some(planted);
            let result = catch_unwind(AssertUnwindSafe(|| sim.run(STEPS)));
            !matches!(result, Ok(Ok(())))
        });
        println!(
            "{planted:?}: seed {found:?}, {:.1} s",
            began.elapsed().as_secs_f64()
        );
    }
}
