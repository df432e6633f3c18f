//! `cdp-restore`: everything that reads history.
//!
//! The command line is read in [`args`], a command of [`cmd`] does the work on a store opened for reading
//! only, [`report`] prints, [`exit`] turns an error into a message and an exit code.

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::cmd::mount::ServerFailed;
use crate::exit::{Chain, Exit};
use crate::report::{Report, StdoutClosed};

mod agent;
mod args;
mod bytes;
mod changed_files;
mod changes;
mod cmd;
mod differences;
mod digest;
mod disk;
mod exit;
mod ext4;
mod interrupt;
mod memory;
mod mount;
mod nbd;
mod owners;
mod placement;
#[cfg(test)]
mod random;
mod report;
mod search;
mod source;
mod target;
mod time;
mod units;
mod walk;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let report = Report::start(&cli.common);
    let done = match cli.command {
        Command::Ls(args) => cmd::ls::run(&args, &report),
        Command::Points(args) => cmd::points::run(&args, &report),
        Command::Image(args) => cmd::image::run(&args, &report),
        Command::Rewind(args) => cmd::rewind::run(&args, &report),
        Command::Mount(args) => cmd::mount::run(&args, &report),
        Command::Umount(args) => cmd::mount::unmount_all(&args, &report),
        Command::Nbd(args) => cmd::nbd::run(&args, &report),
        Command::Files(args) => cmd::files::run(&args, &report),
        Command::Diff(args) => cmd::diff::run(&args, &report),
        Command::Find(args) => cmd::find::run(&args, &report),
        Command::Bisect(args) => cmd::bisect::run(&args, &report),
        Command::Verify(args) => cmd::verify::run(&args, &report),
        Command::Enroll(args) => cmd::enroll::run(&args, &report),
        Command::Completions(args) => cmd::completions::run(&args, &report),
    };
    let exit = match done {
        Ok(()) => Exit::Done,
        // Whoever read our output has seen enough.
        Err(error) if error.is::<StdoutClosed>() => Exit::Done,
        Err(error) => {
            // Its own message has been told.
            if let Some(failed) = error.downcast_ref::<ServerFailed>() {
                return ExitCode::from(failed.code);
            }
            let exit = Exit::of(&error);
            report.error(Chain(&error), exit);
            exit
        }
    };
    exit.into()
}
