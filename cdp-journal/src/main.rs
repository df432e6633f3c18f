//! `cdp-journal`: the journal server, and what its owner does with it.

mod args;
mod cmd;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Cli, Command, Common, LogFormat};

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(&cli.common);
    // The folder holds what the protected devices hold, and the keys.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let done = match &cli.command {
        Command::Serve(args) => cmd::serve(args),
        Command::Token(args) => cmd::token(args),
        Command::Revoke(args) => cmd::revoke(args),
        Command::Enroll(args) => cmd::enroll(args),
        Command::Status(args) => cmd::status(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if cli.common.log_format == LogFormat::Json {
                tracing::error!("{error:#}");
            } else {
                eprintln!("error: {error:#}");
            }
            ExitCode::from(if error.is::<cmd::Usage>() { 2 } else { 1 })
        }
    }
}

fn start_log(common: &Common) {
    let level = match (common.quiet, common.verbose) {
        (true, _) => "error",
        (false, 0) => "info",
        (false, 1) => "debug",
        (false, _) => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::new(format!("warn,cdp_journal={level}"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match common.log_format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text => builder
            .with_target(false)
            .with_ansi(std::io::stderr().is_terminal())
            .init(),
    }
}
