//! `completions`: the script that makes a shell complete this command line.

use clap::CommandFactory;

use crate::args::{Cli, Completions};
use crate::report::Report;

pub(crate) fn run(args: &Completions, report: &Report) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "cdp-restore", &mut script);
    report.out(String::from_utf8_lossy(&script))
}
