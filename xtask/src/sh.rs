//! Running other programs: every command is shown before it runs, and a failure names it.

use std::ffi::{OsStr, OsString};
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// Says one line about what is going on. Messages go to stderr; stdout is kept for results.
pub(crate) fn say(message: impl AsRef<str>) {
    eprintln!("xtask: {}", message.as_ref());
}

/// Shows the command, runs it with the caller's stdout and stderr, and fails if it does.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = show(command);
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("start `{}`", program(command)))?;
    if !status.success() {
        bail!("`{line}`: {status}");
    }
    Ok(())
}

/// Shows the command that is about to run, and gives what was shown.
pub(crate) fn show(command: &Command) -> String {
    let line = command_line(command);
    eprintln!("  $ {line}");
    line
}

/// Runs the command silently and gives what it wrote to stdout, without the last newline.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start `{}`", program(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}`: {}: {}", command_line(command), output.status, said.trim());
    }
    let text = String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` wrote something that is not UTF-8", program(command)))?;
    Ok(text.trim_end().to_owned())
}

/// Whether the command can be started and succeeds; what it says is dropped.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// The full path of a program, looked for in [`search_path`].
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&search_path())
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// `PATH`, and after it the folders of system programs, which Debian leaves out of a user's `PATH`.
pub(crate) fn search_path() -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let folders: Vec<_> = std::env::split_paths(&path).collect();
    let lacking: Vec<_> = system
        .into_iter()
        .filter(|folder| !folders.contains(folder))
        .collect();
    // Joining fails only on a folder with a colon in its name, and these came from splitting at colons.
    std::env::join_paths(folders.into_iter().chain(lacking)).unwrap_or(path)
}

/// A command that runs as root: itself if we are root, else through `sudo`.
///
/// Without a terminal `sudo` must not ask for a password: nobody would answer.
pub(crate) fn as_root(program: impl AsRef<OsStr>) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    if find_program("sudo").is_none() {
        bail!(
            "`{}` needs root, and there is no sudo: run this as root",
            program.as_ref().display()
        );
    }
    let mut command = Command::new("sudo");
    if !std::io::stdin().is_terminal() {
        command.arg("--non-interactive");
    }
    command.arg(program);
    Ok(command)
}

/// Whether we run as root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Does one named step, and says how long it took.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    say(format!("== {what}"));
    let start = Instant::now();
    let done = work().with_context(|| what.to_owned())?;
    say(format!("== {what}: done in {}", seconds(start.elapsed())));
    Ok(done)
}

/// A time for people: `0.4 s`, `75 s`, `22 min 5 s`.
pub(crate) fn seconds(time: Duration) -> String {
    let whole_secs = time.as_secs();
    match whole_secs {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        10..120 => format!("{whole_secs} s"),
        _ => format!("{} min {} s", whole_secs / 60, whole_secs % 60),
    }
}

/// SHA-256 of a file in hexadecimal, by coreutils.
pub(crate) fn sha256(file: &Path) -> Result<String> {
    let line = capture(Command::new("sha256sum").arg("--binary").arg(file))?;
    // A name with a backslash or newline makes coreutils put a backslash before the sum.
    let sum = line
        .trim_start_matches('\\')
        .split_whitespace()
        .next()
        .unwrap_or_default();
    if sum.len() != 64 {
        bail!("sha256sum {}: unexpected answer `{line}`", file.display());
    }
    Ok(sum.to_owned())
}

fn program(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// The command as one could type it, without the environment.
fn command_line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(quoted)
        .collect::<Vec<_>>()
        .join(" ")
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./:,@~".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_command_can_be_pasted_into_a_shell() {
        let mut command = Command::new("echo");
        command.args(["plain-word", "two words", "it's", ""]);
        assert_eq!(
            command_line(&command),
            r"echo plain-word 'two words' 'it'\''s' ''"
        );
    }

    #[test]
    fn a_failing_command_is_named_in_the_error() {
        let error = capture(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).expect_err("exit 3");
        let text = format!("{error:#}");
        assert!(text.contains("sh -c") && text.contains("why"), "{text}");
    }

    #[test]
    fn times_read_well_at_every_size() {
        let shown: Vec<_> = [400, 9_940, 75_000, 1_325_000]
            .map(|millis| seconds(Duration::from_millis(millis)))
            .into_iter()
            .collect();
        assert_eq!(shown, ["0.4 s", "9.9 s", "75 s", "22 min 5 s"]);
    }

    #[test]
    fn sha256_is_that_of_the_bytes() {
        let sum = sha256(Path::new("/dev/null")).expect("/dev/null is readable");
        assert_eq!(
            sum,
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}
