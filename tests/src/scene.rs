//! One test's stage: its folder, its seed, its logs, and whether this machine can hold it at all.

use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::FlockOperation;

use crate::process::{self, has_program};
use crate::rng::Rng;

/// How many repetitions make the long run, which also checks more moments.
const REPS_LONG: u64 = 20;
/// Lines of each log that are shown when a test fails.
const LOG_LINES_SHOWN: usize = 60;

/// The stage of one repetition of a test.
#[derive(Debug)]
pub struct Scene {
    dir: tempfile::TempDir,
    seed: u64,
    long_run: bool,
}

impl Scene {
    /// A stage with folder and seed of its own, outside the test runner (for the demo and the bench).
    pub fn new(seed: u64) -> Result<Scene> {
        let root = std::env::var_os("CDP_TMP").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let dir = tempfile::Builder::new()
            .prefix("cdp-scene-")
            .tempdir_in(&root)
            .with_context(|| format!("make a folder in {}", root.display()))?;
        // Other users (postgres, nobody) must reach what lies inside.
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(Scene {
            dir,
            seed,
            long_run: knob("CDP_REPS").is_some_and(|reps| reps >= REPS_LONG),
        })
    }

    /// The folder, gone when the scene goes.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path for a log file: files named so are shown when the test fails.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }

    /// The seed, by which this repetition can be replayed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// A generator started from the seed.
    pub fn rng(&self) -> Rng {
        Rng::new(self.seed)
    }

    /// Is this the long run, not the short one of every change?
    pub fn is_long_run(&self) -> bool {
        self.long_run
    }

    /// How many random moments to check: `CDP_MOMENTS`, else 50 in the long run and 8 otherwise.
    pub fn moments(&self) -> usize {
        let default = if self.long_run { 50 } else { 8 };
        knob("CDP_MOMENTS").unwrap_or(default) as usize
    }

    /// How many rounds of faults to play: `CDP_ROUNDS`, else 100 in the long run and 6 otherwise.
    pub fn rounds(&self) -> usize {
        let default = if self.long_run { 100 } else { 6 };
        knob("CDP_ROUNDS").unwrap_or(default) as usize
    }

    /// Shows the end of each log.
    pub fn show_logs(&self) {
        let Ok(entries) = std::fs::read_dir(self.dir()) else {
            return;
        };
        let mut logs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        logs.retain(|path| path.extension().is_some_and(|ext| ext == "log"));
        logs.sort();
        for log in logs {
            eprintln!("{}", process::tail(&log, LOG_LINES_SHOWN));
        }
    }

    /// Removes the folder; an error if a mount, a loop device or a file of the scene is still there.
    pub fn clear(self) -> Result<()> {
        let dir = self.dir.path().to_owned();
        self.dir
            .close()
            .with_context(|| format!("remove {}", dir.display()))?;
        let text = dir.display().to_string();
        let mounts = std::fs::read_to_string("/proc/self/mounts").context("list the mounts")?;
        let loops = std::fs::read_dir("/sys/block").context("list the devices")?;
        let mut backing = loops
            .flatten()
            .map(|entry| entry.path().join("loop/backing_file"));
        let attached =
            backing.any(|path| std::fs::read_to_string(path).is_ok_and(|file| file.contains(&text)));
        anyhow::ensure!(
            !mounts.contains(&text) && !attached,
            "something of {text} is still mounted or attached"
        );
        Ok(())
    }

    fn keep_if_asked(self) {
        if knob("CDP_KEEP").is_some() {
            eprintln!("kept: {}", self.dir.keep().display());
        }
    }
}

fn knob(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// What a test needs of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Root, the kernel's BTF and loop devices.
    RootAndBtf,
    /// Only what every machine has.
    Nothing,
}

/// Why this machine cannot run whole-system tests; `None` where it can.
pub fn missing_here(programs: &[&str]) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".to_owned());
    }
    for path in ["/sys/kernel/btf/vmlinux", "/dev/loop-control"] {
        if !Path::new(path).exists() {
            return Some(format!("no {path}"));
        }
    }
    let lacking: Vec<&str> = programs
        .iter()
        .copied()
        .filter(|program| !has_program(program))
        .collect();
    (!lacking.is_empty()).then(|| {
        format!(
            "not installed: {} (cargo xtask setup gets them)",
            lacking.join(", ")
        )
    })
}

/// Says on the terminal that `name` was not run, even where the test runner captures output.
/// With `CI=true`, a test that cannot run is a failure.
///
/// # Panics
/// With `CI=true`.
pub fn skip(name: &str, why: &str) {
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{name} cannot run here: {why}"
    );
    let _ = writeln!(std::io::stderr(), "\n    SKIPPED  {name}: {why}\n");
}

/// Says on the terminal that a part of a test was left out because the machine has not got it; unlike
/// [`skip`], never a failure: only for what not every CI machine can have (a zram device, say).
pub fn skip_part(name: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "\n    SKIPPED (part)  {name}: {why}\n");
}

/// Runs `play` on a stage of its own, `CDP_REPS` times with different seeds, alone on the machine.
///
/// Skips loudly where root, BTF or one of `programs` is missing (with `CI=true`: fails). On failure the
/// seed that replays it and the end of every log are shown.
///
/// # Panics
/// If `play` fails or panics.
pub fn system_test(name: &str, programs: &[&str], play: impl Fn(&Scene) -> Result<()>) {
    let always = ["losetup", "fsfreeze", "blockdev", "setpriv", "mount", "umount"];
    let programs: Vec<&str> = always.iter().chain(programs).copied().collect();
    if let Some(why) = missing_here(&programs) {
        skip(name, &why);
        return;
    }
    process::catch_interrupts();
    let _alone = alone_on_the_machine().expect("the lock that keeps whole-system tests apart");
    let seed = knob("CDP_SEED").unwrap_or_else(fresh_seed);
    for repetition in 0..knob("CDP_REPS").unwrap_or(1).max(1) {
        play_once(name, seed.wrapping_add(repetition), &play);
    }
}

fn play_once(name: &str, seed: u64, play: &impl Fn(&Scene) -> Result<()>) {
    eprintln!("{name}: seed {seed}");
    let scene = Scene::new(seed).expect("a folder for the scene");
    let outcome = catch_unwind(AssertUnwindSafe(|| play(&scene)));
    if matches!(outcome, Ok(Ok(()))) {
        return;
    }
    scene.show_logs();
    let replay = format!("{name} failed: replay with CDP_SEED={seed} CDP_REPS=1");
    scene.keep_if_asked();
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => panic!("{replay}\n{error:#}"),
        Err(panic) => {
            eprintln!("{replay}");
            resume_unwind(panic);
        }
    }
}

fn fresh_seed() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    (now.as_nanos() as u64) % 1_000_000_000
}

/// Whole-system tests measure time and fill the machine: one at a time, over threads and processes.
fn alone_on_the_machine() -> Result<impl Drop> {
    struct Alone(#[expect(dead_code, reason = "held for its lock")] File);
    impl Drop for Alone {
        fn drop(&mut self) {}
    }
    let path = std::env::temp_dir().join("cdp-tests.lock");
    let file = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .context("open the lock file")?;
    loop {
        match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(Alone(file)),
            Err(rustix::io::Errno::INTR) => process::check_interrupted()?,
            Err(error) => return Err(error).context("lock"),
        }
    }
}
