//! What the user sees: the only code that prints.
//!
//! Results go to stdout; notes, warnings, errors, questions and progress go to stderr. A reader of stdout
//! that has gone away (`| head`) is not an error: [`StdoutClosed`] ends the command quietly.

use std::fmt::Display;
use std::io::{self, BufRead, IsTerminal, Write};
use std::sync::LazyLock;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::args::{Common, LogFormat};
use crate::exit::Exit;

/// Every bar is drawn through this, so that a log line can step aside for it.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// How often a bar is redrawn when nothing moves, so that its rate stays true.
const REDRAW: Duration = Duration::from_millis(250);

/// Whoever read stdout has stopped reading.
#[derive(Debug, thiserror::Error)]
#[error("stdout was closed")]
pub(crate) struct StdoutClosed;

/// Where results, messages and progress go.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    quiet: bool,
    format: LogFormat,
    shows_progress: bool,
}

impl Report {
    /// Starts logging as the flags ask and returns the printer.
    pub(crate) fn start(common: &Common) -> Self {
        let level = match (common.quiet, common.verbose) {
            (true, _) => "error",
            (false, 0) => "warn",
            (false, 1) => "info",
            (false, 2) => "debug",
            (false, _) => "trace",
        };
        // It says of every question of the kernel that is not answered that it was not, and of every answer that the
        // kernel does not want any more. What ends it is our error.
        let filter = EnvFilter::new(format!("{level},fuser=off"));
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(Stderr);
        match common.log_format {
            LogFormat::Text => builder
                .with_target(false)
                .with_ansi(io::stderr().is_terminal())
                .init(),
            LogFormat::Json => builder.json().init(),
        }
        let shows_progress =
            !common.quiet && common.log_format == LogFormat::Text && io::stderr().is_terminal();
        Report {
            quiet: common.quiet,
            format: common.log_format,
            shows_progress,
        }
    }

    /// Prints a result as it is.
    pub(crate) fn out(&self, text: impl Display) -> anyhow::Result<()> {
        write_stdout(|stdout| write!(stdout, "{text}"))
    }

    /// Prints a result as JSON.
    pub(crate) fn json(&self, value: &impl Serialize) -> anyhow::Result<()> {
        write_stdout(|stdout| {
            serde_json::to_writer_pretty(&mut *stdout, value)?;
            stdout.write_all(b"\n")
        })
    }

    /// Says what is good to know.
    pub(crate) fn note(&self, text: impl Display) {
        match self.format {
            LogFormat::Json => tracing::info!("{text}"),
            LogFormat::Text if self.quiet => {}
            LogFormat::Text => line("note", text),
        }
    }

    /// Says what may not be as the user thinks.
    pub(crate) fn warn(&self, text: impl Display) {
        match self.format {
            LogFormat::Json => tracing::warn!("{text}"),
            LogFormat::Text if self.quiet => {}
            LogFormat::Text => line("warning", text),
        }
    }

    /// Says why the command failed.
    pub(crate) fn error(&self, text: impl Display, exit: Exit) {
        match self.format {
            LogFormat::Json => tracing::error!(exit_code = exit.code(), "{text}"),
            LogFormat::Text => line("error", text),
        }
    }

    /// Asks a question with the answer "no" unless the user types yes.
    pub(crate) fn confirm(&self, question: impl Display) -> io::Result<bool> {
        let mut stderr = io::stderr().lock();
        write!(stderr, "{question} [y/N] ")?;
        stderr.flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        Ok(is_yes(&answer))
    }

    /// A bar over `total_bytes`; hidden where stderr is not a terminal.
    pub(crate) fn progress(&self, what: &'static str, total_bytes: u64) -> Progress {
        if !self.shows_progress {
            return Progress(ProgressBar::hidden());
        }
        let bar = BARS.add(ProgressBar::new(total_bytes));
        let template =
            "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what);
        bar.enable_steady_tick(REDRAW);
        Progress(bar)
    }
}

/// A progress bar; gone from the screen when dropped.
#[derive(Debug)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// Moves on by so many bytes.
    pub(crate) fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    /// Sets how far it is.
    pub(crate) fn set(&self, bytes: u64) {
        self.0.set_position(bytes);
    }

    /// Says that something else is being done.
    pub(crate) fn stage(&self, what: &'static str) {
        self.0.set_message(what);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Messages go out even if stderr is gone: there is nobody left to tell.
fn line(kind: &str, text: impl Display) {
    BARS.suspend(|| {
        let _ = writeln!(io::stderr().lock(), "{kind}: {text}");
    });
}

fn write_stdout(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> anyhow::Result<()> {
    let mut stdout = io::BufWriter::new(io::stdout().lock());
    match write(&mut stdout).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(StdoutClosed.into()),
        Err(error) => Err(anyhow::Error::new(error).context("write to stdout")),
    }
}

fn is_yes(answer: &str) -> bool {
    matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

/// Stderr for log lines: bars step aside while one is written.
struct Stderr;

struct StderrLine(Vec<u8>);

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = StderrLine;

    fn make_writer(&'a self) -> StderrLine {
        StderrLine(Vec::new())
    }
}

impl Write for StderrLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for StderrLine {
    fn drop(&mut self) {
        BARS.suspend(|| {
            let _ = io::stderr().lock().write_all(&self.0);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_yes_is_yes() {
        for (answer, yes) in [
            ("y\n", true),
            ("YES\n", true),
            (" yes ", true),
            ("", false),
            ("n\n", false),
            ("yep\n", false),
        ] {
            assert_eq!(is_yes(answer), yes, "{answer:?}");
        }
    }
}
