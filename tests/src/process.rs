//! Child processes: each has a time limit, and none outlives its guard.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// How long a command may take unless it is given another limit.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);
/// How often a wait looks whether it was interrupted.
const INTERRUPT_LOOK: Duration = Duration::from_millis(200);
/// How long a child may take to follow SIGTERM before it is killed.
const TERM_GRACE: Duration = Duration::from_secs(20);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Turns SIGINT and SIGTERM into an error of the next wait, so that guards run and leave nothing behind.
/// A second signal ends the process at once.
pub fn catch_interrupts() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let listen = || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .build()?;
            runtime.block_on(async {
                use tokio::signal::unix::{SignalKind, signal};
                let mut interrupt = signal(SignalKind::interrupt())?;
                let mut terminate = signal(SignalKind::terminate())?;
                loop {
                    tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
                    if INTERRUPTED.swap(true, Ordering::SeqCst) {
                        std::process::exit(130);
                    }
                    let _ = writeln!(
                        std::io::stderr(),
                        "interrupted: clearing up (once more to leave at once)"
                    );
                }
            })
        };
        thread::spawn(move || {
            if let Err(error) = listen() {
                let _ = writeln!(std::io::stderr(), "signals are not caught: {error:#}");
            }
        });
    });
}

/// An error if SIGINT or SIGTERM has come since [`catch_interrupts`].
pub fn check_interrupted() -> Result<()> {
    ensure!(!INTERRUPTED.load(Ordering::SeqCst), "interrupted");
    Ok(())
}

/// Asks `condition` again and again until it gives something, at most for `timeout`.
pub fn poll_until<T>(
    what: &str,
    timeout: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        check_interrupted()?;
        if let Some(found) = condition().with_context(|| format!("waiting for {what}"))? {
            return Ok(found);
        }
        ensure!(started.elapsed() < timeout, "waited {timeout:?} for {what}");
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// What a finished command left.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The command as typed, for messages.
    pub command: String,
    /// Its exit code; 128 + N if signal N ended it.
    pub code: i32,
    /// What it wrote on stdout.
    pub stdout: String,
    /// What it wrote on stderr.
    pub stderr: String,
    /// How long it ran.
    pub elapsed: Duration,
}

impl Outcome {
    /// The outcome, if the exit code was 0; else an error with everything that was said.
    pub fn success(self) -> Result<Outcome> {
        self.expect_code(0)
    }

    /// The outcome, if the exit code was `code`; else an error with everything that was said.
    pub fn expect_code(self, code: i32) -> Result<Outcome> {
        ensure!(
            self.code == code,
            "exit code {}, not {code}\n{}",
            self.code,
            self.transcript()
        );
        Ok(self)
    }

    /// An error if the message on stderr lacks one of `parts` (letter case aside).
    pub fn expect_message(self, parts: &[&str]) -> Result<Outcome> {
        let said = self.stderr.to_lowercase();
        for part in parts {
            ensure!(
                said.contains(&part.to_lowercase()),
                "the message lacks {part:?}\n{}",
                self.transcript()
            );
        }
        Ok(self)
    }

    /// The command, its code and both its outputs.
    pub fn transcript(&self) -> String {
        format!(
            "$ {}\n(code {})\n{}\n{}",
            self.command,
            self.code,
            self.stdout.trim_end(),
            self.stderr.trim_end()
        )
    }
}

/// A command with a time limit.
#[derive(Debug)]
pub struct Cmd {
    command: Command,
    user: Option<User>,
    timeout: Duration,
    stdin: Option<Vec<u8>>,
}

/// `program`, to be run with a time limit. Give it arguments with [`Cmd::args`].
pub fn cmd(program: impl AsRef<Path>) -> Cmd {
    let mut command = Command::new(program.as_ref());
    command.stdin(Stdio::null()).env("LC_ALL", "C").env("TZ", "UTC");
    Cmd {
        command,
        user: None,
        timeout: TIMEOUT_DEFAULT,
        stdin: None,
    }
}

impl Cmd {
    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<std::ffi::OsStr>) -> Cmd {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Cmd {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: &str, value: impl AsRef<std::ffi::OsStr>) -> Cmd {
        self.command.env(key, value);
        self
    }

    /// Runs in folder `dir`.
    pub fn current_dir(mut self, dir: &Path) -> Cmd {
        self.command.current_dir(dir);
        self
    }

    /// Runs as another user.
    pub fn user(mut self, user: &User) -> Cmd {
        self.command.uid(user.uid).gid(user.gid);
        self.user = Some(user.clone());
        self
    }

    /// Gives it `input` on stdin.
    pub fn stdin(mut self, input: impl Into<Vec<u8>>) -> Cmd {
        self.command.stdin(Stdio::piped());
        self.stdin = Some(input.into());
        self
    }

    /// Allows it another time.
    pub fn timeout(mut self, timeout: Duration) -> Cmd {
        self.timeout = timeout;
        self
    }

    /// The same command, as the last arguments of another program that runs it in its own place.
    pub fn prefixed(self, program: &str, args: impl IntoIterator<Item = String>) -> Cmd {
        let Cmd {
            command,
            user,
            timeout,
            stdin,
        } = self;
        let mut outer = Command::new(program);
        outer.stdin(Stdio::null()).args(args);
        outer.arg(command.get_program()).args(command.get_args());
        copy_surroundings(&command, &mut outer);
        if let Some(user) = &user {
            outer.uid(user.uid).gid(user.gid);
        }
        let outer = Cmd {
            command: outer,
            user,
            timeout,
            stdin: None,
        };
        match stdin {
            Some(input) => outer.stdin(input),
            None => outer,
        }
    }

    /// The same command, without some of what root may: `-sys_admin` to mount, `-all` everything.
    pub fn without(self, capabilities: &str) -> Cmd {
        let sets = ["bounding-set", "inh-caps"];
        self.prefixed("setpriv", sets.map(|set| format!("--{set}={capabilities}")))
    }

    fn text(&self) -> String {
        let args = self.command.get_args().map(|arg| arg.to_string_lossy());
        std::iter::once(self.command.get_program().to_string_lossy())
            .chain(args)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Runs it to its end, whatever its exit code. Past the time limit it is killed, and that is an error.
    pub fn run(mut self) -> Result<Outcome> {
        check_interrupted()?;
        let text = self.text();
        let started = Instant::now();
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self
            .command
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {text}"))?;
        let mut child = Guarded { child, ended: None };
        let input = self.stdin.take().zip(child.child.stdin.take());
        let feeder = input.map(|(bytes, mut pipe)| thread::spawn(move || drop(pipe.write_all(&bytes))));
        let stdout = child.child.stdout.take().map(collect);
        let stderr = child.child.stderr.take().map(collect);
        let status = child.wait(self.timeout).with_context(|| format!("run {text}"))?;
        if let Some(feeder) = feeder {
            let _ = feeder.join();
        }
        let join = |reader: Option<thread::JoinHandle<String>>| {
            reader.and_then(|handle| handle.join().ok()).unwrap_or_default()
        };
        let (stdout, stderr) = (join(stdout), join(stderr));
        Ok(Outcome {
            command: text,
            code: code_of(status),
            stdout,
            stderr,
            elapsed: started.elapsed(),
        })
    }

    /// Runs it; an exit code other than 0 is an error. Gives stdout without the last line's end.
    pub fn output(self) -> Result<String> {
        Ok(self.run()?.success()?.stdout.trim_end().to_owned())
    }

    /// Starts it and leaves it running behind a guard; both its outputs go to the file `log`.
    pub fn spawn(self, log: &Path) -> Result<Background> {
        check_interrupted()?;
        let text = self.text();
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .context("open a log file")?;
        let mut command = self.into_mortal();
        command.stdout(file.try_clone()?).stderr(file);
        let child = command
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {text}"))?;
        Ok(Background {
            guarded: Guarded { child, ended: None },
            text,
            log: log.to_owned(),
        })
    }

    /// Starts it with its stdin and stdout as pipes for a conversation; stderr goes to the file `log`.
    pub fn converse(self, log: &Path) -> Result<Conversation> {
        check_interrupted()?;
        let text = self.text();
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .context("open a log file")?;
        let mut command = self.into_mortal();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        let mut child = command
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {text}"))?;
        let stdin = child.stdin.take().context("a pipe to stdin")?;
        let stdout = child.stdout.take().context("a pipe from stdout")?;
        let guarded = Guarded { child, ended: None };
        Ok(Conversation {
            guarded,
            text,
            stdin,
            stdout: std::io::BufReader::new(stdout),
        })
    }
}

impl Cmd {
    /// The same command, to be sent SIGTERM by the kernel if the thread that starts it dies: even a
    /// test run that is killed leaves no process behind.
    fn into_mortal(self) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "TERM", "--"])
            .arg(self.command.get_program())
            .args(self.command.get_args());
        copy_surroundings(&self.command, &mut command);
        if let Some(user) = &self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command.stdin(Stdio::null());
        command
    }
}

/// Gives `to` the environment and the folder of `from`.
fn copy_surroundings(from: &Command, to: &mut Command) {
    for (key, value) in from.get_envs() {
        match value {
            Some(value) => to.env(key, value),
            None => to.env_remove(key),
        };
    }
    if let Some(dir) = from.get_current_dir() {
        to.current_dir(dir);
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn code_of(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// A child that is killed and reaped with its guard.
#[derive(Debug)]
struct Guarded {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Guarded {
    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        // Not reaped yet, so the id still names our child.
        ensure!(self.ended.is_none(), "it has ended");
        kill_process(self.pid(), signal).with_context(|| format!("signal {signal:?}"))
    }

    fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().context("wait for a child")?;
        }
        Ok(self.ended)
    }

    fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let started = Instant::now();
        loop {
            check_interrupted()?;
            let left = timeout.saturating_sub(started.elapsed());
            if let Some(status) = self.wait_quietly(left.min(INTERRUPT_LOOK))? {
                return Ok(status);
            }
            if started.elapsed() >= timeout {
                bail!("still running after {timeout:?}");
            }
        }
    }

    /// Waits without looking for an interrupt: for clearing up after one.
    fn wait_quietly(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        if let Some(status) = self.try_wait()? {
            return Ok(Some(status));
        }
        let handle = pidfd_open(self.pid(), PidfdFlags::empty()).context("open a pidfd")?;
        let limit = Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: timeout.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => self.try_wait(),
            Err(error) => Err(error).context("poll a pidfd"),
        }
    }

    fn end(&mut self, first: Signal, grace: Duration) {
        if self.ended.is_some() {
            return;
        }
        let _ = self.signal(Signal::CONT);
        let _ = self.signal(first);
        if let Ok(Some(_)) = self.wait_quietly(grace) {
            return;
        }
        let _ = self.signal(Signal::KILL);
        self.ended = self.child.wait().ok();
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.end(Signal::KILL, Duration::ZERO);
    }
}

/// A process in the background. When the guard goes, the process is asked to end, then killed.
#[derive(Debug)]
pub struct Background {
    guarded: Guarded,
    text: String,
    log: PathBuf,
}

impl Background {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.guarded.child.id()
    }

    /// The file that takes its outputs.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.guarded
            .signal(signal)
            .with_context(|| format!("signal {}", self.text))
    }

    /// Its exit code, if it has ended.
    pub fn try_code(&mut self) -> Result<Option<i32>> {
        Ok(self.guarded.try_wait()?.map(code_of))
    }

    /// Waits for its end and gives its exit code.
    pub fn wait(&mut self, timeout: Duration) -> Result<i32> {
        let status = self
            .guarded
            .wait(timeout)
            .with_context(|| format!("wait for {}", self.text))?;
        Ok(code_of(status))
    }

    /// Waits for its end; an exit code other than 0 is an error that shows its log's end.
    pub fn wait_success(&mut self, timeout: Duration) -> Result<()> {
        let code = self.wait(timeout)?;
        ensure!(
            code == 0,
            "{}: exit code {code}\n{}",
            self.text,
            tail(&self.log, 40)
        );
        Ok(())
    }

    /// Sends `signal` and waits for the end; gives the exit code.
    pub fn stop(&mut self, signal: Signal, timeout: Duration) -> Result<i32> {
        self.signal(signal)?;
        self.wait(timeout)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.guarded.end(Signal::TERM, TERM_GRACE);
    }
}

/// A process that is asked line by line and answers line by line (psql, sqlite3).
#[derive(Debug)]
pub struct Conversation {
    guarded: Guarded,
    text: String,
    stdin: std::process::ChildStdin,
    stdout: std::io::BufReader<std::process::ChildStdout>,
}

impl Conversation {
    /// Sends `lines` and reads answers until one equals `until`; gives the answers before it.
    /// A process that ends before that is an error, so the wait is bounded by its life.
    pub fn ask(&mut self, lines: &str, until: &str) -> Result<Vec<String>> {
        use std::io::BufRead;
        self.stdin
            .write_all(lines.as_bytes())
            .with_context(|| format!("write to {}", self.text))?;
        self.stdin.flush().context("flush")?;
        let mut answers = Vec::new();
        loop {
            let mut line = String::new();
            let bytes = self
                .stdout
                .read_line(&mut line)
                .with_context(|| format!("read from {}", self.text))?;
            ensure!(
                bytes > 0,
                "{} ended before it answered {until:?} (so far {answers:?})",
                self.text
            );
            let line = line.trim_end();
            if line == until {
                return Ok(answers);
            }
            answers.push(line.to_owned());
        }
    }

    /// Closes its stdin and waits for a clean end.
    pub fn finish(self, timeout: Duration) -> Result<()> {
        let Conversation {
            mut guarded,
            text,
            stdin,
            stdout,
        } = self;
        drop(stdin);
        let status = guarded
            .wait(timeout)
            .with_context(|| format!("wait for {text}"))?;
        drop(stdout);
        ensure!(status.success(), "{text}: {status}");
        Ok(())
    }
}

/// A user to run a command as.
#[derive(Clone, Debug)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Main group id.
    pub gid: u32,
}

impl User {
    /// Looks `name` up; `None` where there is no such user.
    pub fn find(name: &str) -> Result<Option<User>> {
        let table = std::fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
        let Some(line) = table.lines().find(|line| line.split(':').next() == Some(name)) else {
            return Ok(None);
        };
        let id = |at: usize| -> Result<u32> {
            line.split(':')
                .nth(at)
                .context("a field of /etc/passwd")?
                .parse()
                .context("an id in /etc/passwd")
        };
        Ok(Some(User {
            uid: id(2)?,
            gid: id(3)?,
        }))
    }
}

/// Is `program` in the search path (or there, if it is a path)?
pub fn has_program(program: &str) -> bool {
    if program.contains('/') {
        return Path::new(program).exists();
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let also = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&folders)
        .chain(also)
        .any(|folder| folder.join(program).is_file())
}

/// The last `lines` lines of a file, for a message.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    format!(
        "--- {} (last {} of {} lines)\n{}",
        path.display(),
        all.len() - from,
        all.len(),
        all[from..].join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::{User, cmd, has_program, poll_until};
    use std::time::{Duration, Instant};

    /// Goal: codes and outputs arrive. Method: a shell that says something on both and exits 3.
    #[test]
    fn a_command_tells_its_code_and_both_outputs() {
        let outcome = cmd("sh")
            .args(["-c", "echo out; echo err >&2; exit 3"])
            .run()
            .expect("sh runs");
        assert_eq!(
            (outcome.code, outcome.stdout.as_str(), outcome.stderr.as_str()),
            (3, "out\n", "err\n")
        );
        assert!(outcome.clone().success().is_err());
        assert!(outcome.expect_message(&["ERR"]).is_ok());
    }

    /// Goal: nothing hangs the suite. Method: a command that would run for a minute gets 50 ms.
    #[test]
    fn a_command_past_its_time_is_ended() {
        let started = Instant::now();
        let error = cmd("sleep")
            .arg("60")
            .timeout(Duration::from_millis(50))
            .run()
            .expect_err("too long");
        assert!(format!("{error:#}").contains("still running"), "{error:#}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    /// Goal: a wait has a bound. Method: a condition that never holds.
    #[test]
    fn polling_ends_at_its_bound() {
        let error =
            poll_until("nothing", Duration::from_millis(20), || Ok(None::<()>)).expect_err("never holds");
        assert!(error.to_string().contains("nothing"));
    }

    /// Goal: users and programs are found. Method: root and sh are everywhere.
    #[test]
    fn users_and_programs_are_looked_up() {
        assert_eq!(
            User::find("root").expect("readable").map(|user| user.uid),
            Some(0)
        );
        assert!(User::find("no such user").expect("readable").is_none());
        assert!(has_program("sh") && !has_program("no-such-program"));
    }
}
