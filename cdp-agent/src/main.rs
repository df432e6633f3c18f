//! `cdp-agent`: captures every write to the protected volumes of a host and journals it.
//!
//! The way of a write: `capture` (the probe's ring) → `event` → `recorder` (order, gaps: decisions only) →
//! `pipeline` (encode, log, index) → the store. `readback` makes the first copy and every repair.

mod agent;
mod capture;
mod cli;
mod clock;
mod cmd;
mod config;
mod control;
mod device;
mod event;
mod inflight;
mod losses;
mod pace;
mod pipeline;
mod priority;
mod progress;
mod readback;
mod recorder;
mod regions;
mod ship;
mod status;
mod takeover;
mod watermark;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::cli::{Cli, Command, LogFormat, Output};

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(cli.output);
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            if cli.output.log_format == LogFormat::Json {
                tracing::error!("{error:#}");
            } else {
                eprintln!("error: {error:#}");
            }
            ExitCode::from(if error.is::<config::Usage>() { 2 } else { 1 })
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(args) => cmd::run::run(&args),
        Command::Status { store, json } => cmd::query::status(&store.dir, json),
        Command::Wait {
            store,
            volume,
            state,
            timeout,
        } => cmd::query::wait(&store.dir, volume.as_deref(), state, timeout),
        Command::Bookmark { store, label } => cmd::query::bookmark(&store.dir, &label),
        Command::Unload { store, all: _ } => cmd::unload::run(store.as_deref()),
        Command::Enroll {
            server,
            token,
            identity,
        } => cmd::enroll::run(&server, &token, &identity),
        Command::Doctor { json } => cmd::doctor::run(json),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "cdp-agent", &mut std::io::stdout());
            Ok(())
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn start_log(output: Output) {
    let level = match (output.quiet, output.verbose) {
        (true, _) => "error",
        (false, 0) => "info",
        (false, 1) => "debug",
        (false, _) => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::new(format!("warn,cdp_agent={level},cdp_journal={level}"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match output.log_format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text => builder
            .with_target(false)
            .with_ansi(std::io::stderr().is_terminal())
            .init(),
    }
}
