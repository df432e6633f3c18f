//! `cargo xtask fuzz`: bytes that were made to do harm, led by what the decoders do with them.
//!
//! The targets are those of `fuzz/`, laid out as cargo-fuzz has it. They are built here, with the counters that libFuzzer
//! wants and the compiler that everything else takes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::sh;
use crate::workspace::Workspace;

/// Every target, and what it begins with: golden files, in hexadecimal, from `cdp-journal/src/format/golden`.
const TARGETS: [(&str, &[&str]); 2] = [("frame", &["frame_1.hex", "frame_2.hex"]), ("message", &[])];

/// Counts edges and shows comparisons to libFuzzer. The passes are LLVM's own.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                        -Cllvm-args=-sanitizer-coverage-pc-table \
                        -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";

/// What one input may take: what a server allocates for a frame, many times.
const MEMORY_MIB_MAX: u32 = 512;
const INPUT_SECONDS_MAX: u32 = 10;
const INPUT_BYTES_MAX: u32 = 64 << 10;

/// How long, and what.
#[derive(clap::Args)]
pub(crate) struct FuzzArgs {
    /// Only this target
    #[arg(value_parser = TARGETS.map(|(name, _)| name))]
    target: Option<String>,
    /// How long each is tried
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
}

impl FuzzArgs {
    /// For so long, everything.
    pub(crate) fn all(seconds: u32) -> Self {
        Self {
            target: None,
            seconds,
        }
    }
}

/// Builds the targets and runs them one after the other; fails at the first input that does harm.
pub(crate) fn run(workspace: &Workspace, args: &FuzzArgs) -> Result<()> {
    let triple = sh::capture(&mut workspace.bare_cargo("-vV"))
        .ok()
        .and_then(|about| {
            about
                .lines()
                .find_map(|line| line.strip_prefix("host: ").map(str::to_owned))
        })
        .context("ask cargo for the host's triple")?;
    let output = workspace.target().join("fuzz");
    let mut build = workspace.cargo("build");
    build
        .args([
            "--locked",
            "--release",
            "--manifest-path",
            "fuzz/Cargo.toml",
            "--target",
            &triple,
        ])
        .env("CARGO_TARGET_DIR", &output)
        .env("RUSTFLAGS", COVERAGE);
    sh::run(&mut build)?;
    let wanted = |name: &str| args.target.as_deref().is_none_or(|only| only == name);
    for (name, golden) in TARGETS.into_iter().filter(|(name, _)| wanted(name)) {
        let corpus = output.join("corpus").join(name);
        fs::create_dir_all(&corpus).with_context(|| format!("make {}", corpus.display()))?;
        for golden in golden {
            seed(
                &workspace.root.join("cdp-journal/src/format/golden").join(golden),
                &corpus,
            )?;
        }
        let program = output.join(&triple).join("release").join(name);
        let found = output.join(format!("{name}-"));
        let mut fuzz = std::process::Command::new(&program);
        fuzz.arg(format!("-max_total_time={}", args.seconds))
            .arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
            .arg(format!("-malloc_limit_mb={MEMORY_MIB_MAX}"))
            .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
            .arg(format!("-max_len={INPUT_BYTES_MAX}"))
            .arg(format!("-artifact_prefix={}", found.display()))
            .args(["-print_final_stats=1", "-verbosity=0"])
            .arg(&corpus);
        sh::run(&mut fuzz).with_context(|| {
            format!(
                "{name} was harmed; replay it with {} and the file that was written to {}*",
                program.display(),
                found.display()
            )
        })?;
    }
    Ok(())
}

/// Puts a golden file into the corpus.
fn seed(golden: &Path, corpus: &Path) -> Result<()> {
    let text = fs::read_to_string(golden).with_context(|| format!("read {}", golden.display()))?;
    let bytes = bytes_of(&text).with_context(|| format!("{} is not hexadecimal", golden.display()))?;
    let name: PathBuf = golden.file_stem().context("a name")?.into();
    fs::write(corpus.join(name), bytes).context("write a seed")
}

fn bytes_of(hex: &str) -> Result<Vec<u8>> {
    let digits: Vec<u8> = hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    ensure!(digits.len().is_multiple_of(2), "an odd number of digits");
    digits
        .chunks(2)
        .map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::bytes_of;

    /// Goal: seeds are the golden bytes. Method: some digits, and some that are none.
    #[test]
    fn hexadecimal_is_read() {
        assert_eq!(bytes_of("00ff 1a\n").ok(), Some(vec![0, 255, 26]));
        assert!(bytes_of("0").is_err() && bytes_of("zz").is_err());
    }
}
