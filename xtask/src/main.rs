//! `cargo xtask`: everything about this workspace that plain cargo does not do.

mod apt;
mod bench;
mod boot;
mod ci;
mod demo;
mod ebpf;
mod fuzz;
mod rocksdb;
mod setup;
mod sh;
mod test;
mod tools;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Build, test and show this workspace"
)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Get what this machine lacks to build and test: packages, eBPF tools, RocksDB
    Setup {
        /// Only say what is missing
        #[arg(long)]
        dry_run: bool,
    },
    /// See it work: a database loses a table and gets it back as it was a millisecond earlier
    Demo(demo::DemoArgs),
    /// A small machine boots under an emulator from a moment that `cdp-restore nbd` serves
    Boot(boot::BootArgs),
    /// Measure what protection costs, and write docs/bench.md
    Bench(bench::BenchArgs),
    /// Run every test; what needs root or BTF is skipped by name where they are missing
    Test(test::TestArgs),
    /// Look for bytes that harm the decoders, with libFuzzer
    Fuzz(fuzz::FuzzArgs),
    /// Format, clippy, documentation, the probe's object, every test, and a minute of fuzzing
    Ci,
    /// The probe's object
    #[command(subcommand)]
    Ebpf(EbpfTask),
}

#[derive(Subcommand)]
enum EbpfTask {
    /// Build the object that is committed and embedded in cdp-agent
    Build,
    /// Build it again and fail unless it is the committed one, byte for byte
    Verify,
    /// Check the probe's sources with clippy
    Lint,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    if std::env::var_os(ebpf::wrapper::ACTIVE).is_some() {
        return ebpf::wrapper::exec(std::env::args_os());
    }
    let args = Args::parse();
    let workspace = Workspace::open()?;
    match args.task {
        Task::Setup { dry_run } => setup::run(&workspace, dry_run),
        Task::Demo(args) => demo::run(&workspace, &args),
        Task::Boot(args) => boot::run(&workspace, &args),
        Task::Bench(args) => bench::run(&workspace, &args),
        Task::Test(args) => test::run(&workspace, &args),
        Task::Fuzz(args) => fuzz::run(&workspace, &args),
        Task::Ci => ci::run(&workspace),
        Task::Ebpf(EbpfTask::Build) => ebpf::build(&workspace),
        Task::Ebpf(EbpfTask::Verify) => ebpf::verify(&workspace),
        Task::Ebpf(EbpfTask::Lint) => ebpf::lint(&workspace),
    }
}
