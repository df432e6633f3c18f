//! `cdp-agent run`: starts the agent and serves its control socket until it is told to stop.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cdp_journal::format::Body;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::agent::Agent;
use crate::cli::RunArgs;
use crate::clock;
use crate::config::Config;
use crate::control::{Answer, LINE_BYTES_MAX, Request, socket_path};
use crate::pipeline::Shared;
use crate::ship::Ships;

/// Requests under way at once.
const REQUESTS_MAX: usize = 64;
/// How often devices and threads are looked at.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
const BOOKMARK_TIMEOUT: Duration = Duration::from_secs(30);
const LABEL_BYTES_MAX: usize = 256;

type StatusRequest = oneshot::Sender<Answer>;

/// Removes the socket when the agent ends.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Runs until SIGTERM or SIGINT.
pub(crate) fn run(args: &RunArgs) -> anyhow::Result<()> {
    let config = Config::load(args)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    // A stop that is asked for during the start is as clean as any other: it comes right after it.
    let signals = {
        let _entered = runtime.enter();
        Signals::new().context("wait for signals")?
    };
    let agent = Agent::start(config)?;
    let ended = runtime.block_on(serve(agent, signals, args));
    // Whoever still waits for an answer gets none.
    runtime.shutdown_background();
    ended
}

/// What the agent is told from outside.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

async fn serve(mut agent: Agent, signals: Signals, args: &RunArgs) -> anyhow::Result<()> {
    let result = serve_until_stopped(&mut agent, signals, args).await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let failure = agent.finish();
    result?;
    match failure {
        Some(failure) => anyhow::bail!(failure),
        None => Ok(()),
    }
}

async fn serve_until_stopped(agent: &mut Agent, mut signals: Signals, args: &RunArgs) -> anyhow::Result<()> {
    let path = socket_path(agent.store());
    // The store's lock is ours: whatever lies here is left over from an agent that was killed.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
    let _socket = SocketFile(path.clone());
    rustix::fs::chmod(&path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)
        .with_context(|| format!("protect {}", path.display()))?;
    let (ask, mut asked) = mpsc::channel::<StatusRequest>(REQUESTS_MAX);
    let permits = Arc::new(tokio::sync::Semaphore::new(REQUESTS_MAX));
    let mut check = tokio::time::interval(CHECK_INTERVAL);
    // A look that took long is not made up for.
    check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => return Ok(()),
            _ = signals.interrupt.recv() => return Ok(()),
            _ = signals.hangup.recv() => reload(agent, args),
            _ = check.tick() => {
                if agent.shared.failure().is_some() {
                    return Ok(());
                }
                agent.check_devices();
                agent.watch_progress();
            }
            Some(reply) = asked.recv() => {
                // What it tells of devices is as new as the question.
                agent.check_devices();
                let _ = reply.send(Answer::Status(agent.status()));
            }
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else { continue };
                let (shared, ships) = (Arc::clone(&agent.shared), Arc::clone(&agent.ships));
                let ask = ask.clone();
                tokio::spawn(async move {
                    if let Err(error) = answer_one(stream, shared, ships, ask).await {
                        tracing::debug!("control socket: {error:#}");
                    }
                    drop(permit);
                });
            }
        }
    }
}

fn reload(agent: &mut Agent, args: &RunArgs) {
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Reloading]);
    match Config::load(args).and_then(|config| agent.reload(config)) {
        Ok(()) => tracing::info!("configuration reloaded"),
        Err(error) => tracing::error!("configuration not reloaded, or not all of it: {error:#}"),
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
}

async fn answer_one(
    stream: UnixStream,
    shared: Arc<Shared>,
    ships: Arc<Ships>,
    ask: mpsc::Sender<StatusRequest>,
) -> anyhow::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    BufReader::new(read.take(LINE_BYTES_MAX))
        .read_line(&mut line)
        .await?;
    let answer = match serde_json::from_str(&line) {
        Ok(Request::Status) => {
            let (reply, answer) = oneshot::channel();
            ask.send(reply).await.ok().context("the agent is stopping")?;
            answer.await.context("the agent is stopping")?
        }
        Ok(Request::Sync {
            timeout_ms,
            whole,
            volume,
        }) => {
            let timeout = Duration::from_millis(timeout_ms);
            blocking(move || {
                let behind = whole.then(|| behind(&shared, volume.as_deref())).flatten();
                behind.unwrap_or_else(|| sync(&shared, &ships, timeout))
            })
            .await?
        }
        Ok(Request::Durable { timeout_ms }) => {
            let timeout = Duration::from_millis(timeout_ms);
            blocking(move || recorded(&shared, timeout)).await?
        }
        Ok(Request::Bookmark { label }) => blocking(move || bookmark(&shared, label)).await?,
        Err(error) => Answer::Failed {
            why: format!("not understood: {error}"),
        },
    };
    let mut text = serde_json::to_string(&answer)?;
    text.push('\n');
    write.write_all(text.as_bytes()).await?;
    Ok(())
}

async fn blocking(work: impl FnOnce() -> Answer + Send + 'static) -> anyhow::Result<Answer> {
    tokio::task::spawn_blocking(work)
        .await
        .context("a request panicked")
}

/// What was written before the call and is not captured is on its way to nobody: says so of the first volume that is not
/// read whole.
fn behind(shared: &Shared, volume: Option<&str>) -> Option<Answer> {
    let failed = |why| Some(Answer::Failed { why });
    if shared.losses_known().is_none() {
        return failed("the agent is stopping".to_owned());
    }
    let is_wanted = |name: &str| volume.is_none_or(|wanted| wanted == name);
    if let Some(name) = shared.absent.lock().iter().find(|name| is_wanted(name)) {
        return failed(format!("{name} is stopped: its device is not there"));
    }
    let recorder = shared.recorder.lock();
    let mut wanted = recorder.volumes().iter().filter(|known| is_wanted(&known.name));
    let behind = wanted.find(|volume| !volume.is_exact())?;
    failed(format!("{} is not read whole yet", behind.name))
}

/// Waits until it is durable here since when the volumes are exact.
fn recorded(shared: &Shared, timeout: Duration) -> Answer {
    let last = {
        let recorder = shared.recorder.lock();
        recorder
            .volumes()
            .iter()
            .filter_map(|volume| volume.exact_from())
            .max()
    };
    shared.hurry();
    match shared.wait_durable(last, timeout) {
        true => Answer::Synced {
            seq: last.map_or(0, cdp_journal::Seq::get),
        },
        false => Answer::Failed {
            why: format!("not durable after {} ms", timeout.as_millis()),
        },
    }
}

fn sync(shared: &Shared, ships: &Ships, timeout: Duration) -> Answer {
    let deadline = Instant::now() + timeout;
    let left = || deadline.saturating_duration_since(Instant::now());
    let now = clock::boot_ns();
    let Some(last) = shared.drained() else {
        return Answer::Failed {
            why: "the agent is stopping".into(),
        };
    };
    if !shared.wait_ended(last, left()) {
        return Answer::Failed {
            why: format!(
                "writes of before the call are still on their way to the disk after {} ms",
                timeout.as_millis()
            ),
        };
    }
    if !shared.wait_clear(left()) {
        return Answer::Failed {
            why: format!(
                "blocks that changed while they were written are not compared with the device after {} ms",
                timeout.as_millis()
            ),
        };
    }
    let seq = {
        let mut recorder = shared.recorder.lock();
        if recorder.is_full() {
            return Answer::Failed {
                why: "the store is full".into(),
            };
        }
        // So that the time of the call is known to be covered, too.
        Some(recorder.note(now, None, Body::Tick))
    };
    shared.hurry();
    // Events that the kernel skips from now on do not put in doubt what came before.
    if shared.losses_known_within(left()).is_none() {
        return Answer::Failed {
            why: format!(
                "whether writes were lost is not known after {} ms",
                timeout.as_millis()
            ),
        };
    }
    if !shared.wait_durable(seq, left()) {
        return Answer::Failed {
            why: format!("not durable after {} ms", timeout.as_millis()),
        };
    }
    if !shared.wait_noted(seq, left()) {
        return Answer::Failed {
            why: format!(
                "durable, but not noted for the next agent after {} ms",
                timeout.as_millis()
            ),
        };
    }
    match ships.wait_acked(seq, deadline) {
        Ok(()) => Answer::Synced {
            seq: seq.map_or(0, cdp_journal::Seq::get),
        },
        Err(why) => Answer::Failed { why },
    }
}

fn bookmark(shared: &Shared, label: String) -> Answer {
    if label.is_empty() || label.len() > LABEL_BYTES_MAX || label.chars().any(char::is_control) {
        return Answer::Failed {
            why: format!("a label has 1 to {LABEL_BYTES_MAX} bytes and no control characters"),
        };
    }
    if shared.drained().is_none() {
        return Answer::Failed {
            why: "the agent is stopping".into(),
        };
    }
    let (seq, at, inexact) = {
        let mut recorder = shared.recorder.lock();
        let (seq, at) = recorder.note_at_once(clock::boot_ns(), None, Body::Bookmark { label });
        let behind = recorder.volumes().iter().filter(|volume| !volume.is_exact());
        let behind = behind.map(|volume| volume.name.clone());
        let inexact: Vec<String> = behind.chain(shared.absent.lock().iter().cloned()).collect();
        (seq, at, inexact)
    };
    shared.hurry();
    if shared.wait_durable(Some(seq), BOOKMARK_TIMEOUT) {
        Answer::Bookmarked {
            seq: seq.get(),
            at: at.to_string(),
            inexact,
        }
    } else {
        Answer::Failed {
            why: "the bookmark is not durable yet: the log's disk does not keep up".into(),
        }
    }
}
