//! What each command does, and prints.

use std::io::Write as _;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use cdp_journal::WallNs;
use cdp_journal::net::{TargetState, is_host_and_port};
use cdp_journal::server::{
    AgentStatus, Offers, ServeOptions, Server, ServerStatus, UpstreamOptions, ask_status, status_of_folder,
};
use cdp_journal::ship::{Limits, Rate, Schedule};
use cdp_journal::site::Site;
use cdp_journal::store::WriterOptions;
use cdp_journal::trust::{Authority, Grants, TokenGrant};
use cdp_journal::units::parse_bytes;
use cdp_journal::wire::Right;
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::args::{EnrollArgs, RevokeArgs, ServeArgs, StatusArgs, TokenArgs};

/// The file of `--config`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    store: Option<std::path::PathBuf>,
    listen: Option<String>,
    upstream: Option<String>,
    identity: Option<std::path::PathBuf>,
    store_bytes_max: Option<Size>,
    offers: Option<Offers>,
    rate: Option<Limits>,
}

/// A number of bytes, or text with a unit.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Size {
    Bytes(u64),
    Text(String),
}

impl Size {
    fn bytes(self) -> anyhow::Result<u64> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::Text(text) => parse_bytes(&text).map_err(anyhow::Error::msg),
        }
    }
}

/// Serves until SIGTERM or SIGINT.
pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    let file = match &args.config {
        Some(path) => read_config(path)?,
        None => File::default(),
    };
    let listen = listen(args, &file).map_err(Usage)?;
    let listen = address(&listen)?;
    let options = options(args, file, listen).map_err(Usage)?;
    run(&options)
}

/// Settings that make no sense, or are missing: wrong usage, exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub(crate) struct Usage(anyhow::Error);

/// Where to listen: a name that is not looked up yet.
fn listen(args: &ServeArgs, file: &File) -> anyhow::Result<String> {
    let listen = args.listen.clone().or_else(|| file.listen.clone());
    let listen =
        listen.context("nowhere to listen: give --listen HOST:PORT, or `listen` in the file of --config")?;
    ensure!(
        is_host_and_port(&listen),
        "listen on {listen:?}: give HOST:PORT, such as 0.0.0.0:7443"
    );
    Ok(listen)
}

/// What the flags and the file say together.
fn options(args: &ServeArgs, file: File, listen: SocketAddr) -> anyhow::Result<ServeOptions> {
    let store = args.store.clone().or(file.store);
    let store = store.context("no store: give --store DIR, or `store = \"DIR\"` in the file of --config")?;
    let upstream = args.upstream.clone().or(file.upstream);
    if let Some(upstream) = &upstream {
        ensure!(
            is_host_and_port(upstream),
            "follow {upstream:?}: give HOST:PORT, such as dr1.example.org:7443"
        );
    }
    let limits = match (&args.rate[..], file.rate) {
        ([], Some(limits)) => limits.into(),
        (limits, _) => limits.to_vec(),
    };
    let rate = Schedule::parse(&limits).context("rate")?;
    if upstream.is_none() && !rate.is_empty() {
        bail!(
            "a rate, and no server to take from at that rate: give --upstream HOST:PORT, or leave --rate out"
        );
    }
    let upstream = upstream.map(|server| {
        let identity = args.identity.clone().or(file.identity).with_context(|| {
            format!("no certificate to follow {server} with: give --identity DIR, the folder of `cdp-journal enroll`")
        })?;
        anyhow::Ok(UpstreamOptions {
            server,
            identity,
            rate,
        })
    });
    let in_file = file.store_bytes_max.map(Size::bytes).transpose();
    let store_bytes_max = args.store_bytes_max.or(in_file.context("store_bytes_max")?);
    Ok(ServeOptions {
        store,
        listen,
        writer: WriterOptions {
            store_bytes_max,
            ..WriterOptions::default()
        },
        upstream: upstream.transpose()?,
        offers: args.offers.or(file.offers).unwrap_or_default(),
    })
}

fn run(options: &ServeOptions) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        // A terminal that closes ends nobody's history.
        let mut hangup = signal(SignalKind::hangup())?;
        let (stop, stopped) = watch::channel(false);
        let server = Server::start(options)?;
        tracing::info!(listen = %server.address()?, store = %options.store.display(), "serving");
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        let stopper = tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => break,
                    _ = interrupt.recv() => break,
                    _ = hangup.recv() => tracing::info!("SIGHUP: settings are read at the start only"),
                }
            }
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
            let _ = stop.send(true);
        });
        server.run(stopped).await;
        stopper.abort();
        anyhow::Ok(())
    })
}

fn read_config(path: &Path) -> anyhow::Result<File> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let parsed = toml::from_str(&text).with_context(|| format!("{}", path.display()));
    parsed.map_err(|error| Usage(error).into())
}

fn address(listen: &str) -> anyhow::Result<SocketAddr> {
    let mut found = listen
        .to_socket_addrs()
        .with_context(|| format!("listen on {listen:?}: give HOST:PORT, such as 0.0.0.0:7443"))?;
    found
        .next()
        .with_context(|| format!("listen on {listen:?}: the name has no address"))
}

/// The server's folder, which `serve` has made.
fn open_site(dir: &Path) -> anyhow::Result<Site> {
    Site::open(dir)?.with_context(|| {
        format!(
            "{} is not a journal server's folder; `cdp-journal serve` makes one on its first start",
            dir.display()
        )
    })
}

/// Prints a token.
pub(crate) fn token(args: &TokenArgs) -> anyhow::Result<()> {
    let site = open_site(&args.store.dir)?;
    let grants = Grants::open(site.dir())?;
    let Some(authority) = Authority::open(grants.dir())? else {
        bail!(
            "{} has no certificate authority yet; `cdp-journal serve` makes it on its first start",
            site.dir().display()
        );
    };
    let grant = TokenGrant {
        agent: args.agent.clone(),
        right: match (args.restore, args.follow) {
            (true, _) => Right::Read,
            (_, true) => Right::Follow,
            _ => Right::Append,
        },
        valid_seconds: args.valid.as_secs(),
        expires_ns: WallNs::now().saturating_add(args.ttl).0,
    };
    let token = grants.issue(&authority, &grant)?;
    writeln!(std::io::stdout(), "{token}")?;
    Ok(())
}

/// Gets the certificate to follow another server with, and says where it lies.
pub(crate) fn enroll(args: &EnrollArgs) -> anyhow::Result<()> {
    let (path, holder) = cdp_journal::net::enroll(&args.server, &args.token, Right::Follow, &args.identity)?;
    writeln!(
        std::io::stdout(),
        "enrolled with {} as {holder}: {}",
        args.server,
        path.display()
    )?;
    Ok(())
}

/// Revokes an agent's certificates.
pub(crate) fn revoke(args: &RevokeArgs) -> anyhow::Result<()> {
    let site = open_site(&args.store.dir)?;
    let grants = Grants::open(site.dir())?;
    // Whatever else is wrong here: a revoked certificate must not wait for it.
    let known = grants.names();
    grants.revoke(&args.name)?;
    writeln!(
        std::io::stdout(),
        "the certificates of {} are refused from now on; its history stays",
        args.name
    )?;
    let mut known = known?;
    known.extend(site.agents()?);
    if !known.contains(&args.name) {
        let known: Vec<String> = known.iter().map(ToString::to_string).collect();
        tracing::warn!(
            "nothing here is of {}, neither a history nor a token that is remembered (for 30 days after it expires): if \
             no certificate was made for that name, it is spelled otherwise. Known are: {}",
            args.name,
            known.join(", ")
        );
    }
    Ok(())
}

/// Prints how the server is doing.
pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<()> {
    let site = open_site(&args.store.dir)?;
    let status = match ask_status(site.dir()).context("ask the running server")? {
        Some(status) => status,
        None => status_of_folder(&site)?,
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&status)?)?;
    } else {
        print_status(&mut out, &status)?;
    }
    Ok(())
}

fn print_status(out: &mut impl std::io::Write, status: &ServerStatus) -> std::io::Result<()> {
    match &status.listen {
        Some(listen) => writeln!(out, "serving on {listen}")?,
        None => writeln!(out, "not running")?,
    }
    if let Some(upstream) = &status.upstream {
        let state = match (&upstream.state, &upstream.why) {
            (TargetState::Connected, None) => "connected".to_owned(),
            (TargetState::Connected, Some(why)) => why.clone(),
            (TargetState::Connecting, why) => {
                format!("not connected: {}", why.as_deref().unwrap_or("not yet"))
            }
            (TargetState::Refused, why) => format!("refused: {}", why.as_deref().unwrap_or("by it")),
        };
        write!(out, "follows {}, {state}", upstream.server)?;
        match upstream.rate_bytes_per_s {
            Some(limit) => writeln!(out, ", at {} at most now", Rate::new(limit))?,
            None => writeln!(out)?,
        }
    }
    for agent in &status.agents {
        print_agent(out, agent)?;
    }
    for reader in &status.readers {
        writeln!(out, "{:<24} read from {}", reader.agent, reader.from)?;
    }
    for follower in &status.followers {
        writeln!(out, "{:<24} follows from {}", follower.follower, follower.from)?;
    }
    Ok(())
}

fn print_agent(out: &mut impl std::io::Write, agent: &AgentStatus) -> std::io::Result<()> {
    const MIB: f64 = (1 << 20) as f64;
    let state = match (&agent.from, agent.followed) {
        (Some(from), false) => format!("connected from {from}"),
        (Some(from), true) => format!("followed from {from}"),
        (None, false) => "not connected".to_owned(),
        (None, true) => "of the upstream".to_owned(),
    };
    let full = if agent.full { ", NO ROOM" } else { "" };
    write!(
        out,
        "{:<24} {state}{full}  seq {}, {:.1} MiB of log",
        agent.agent,
        agent.durable_seq,
        agent.log_bytes as f64 / MIB
    )?;
    if agent.saved_bytes > 0 {
        write!(out, ", {:.1} MiB of it were here", agent.saved_bytes as f64 / MIB)?;
    }
    // Of an agent that is away nobody knows more than how long it has been.
    let (lag, backlog) = (agent.lag_seconds, agent.backlog_bytes);
    if let (Some(lag), Some(backlog)) = (lag, backlog)
        && (agent.connected || agent.followed)
    {
        write!(out, ", behind by {lag:.3} s and {:.1} MiB", backlog as f64 / MIB)?;
    }
    match &agent.why {
        Some(why) => writeln!(out, "; {why}"),
        None => writeln!(out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_in_the_file_may_have_a_unit() {
        let size = |line: &str| -> anyhow::Result<Option<u64>> {
            let file: File = toml::from_str(line)?;
            file.store_bytes_max.map(Size::bytes).transpose()
        };
        for line in ["store_bytes_max = 2147483648", "store_bytes_max = \"2GiB\""] {
            assert_eq!(size(line).unwrap(), Some(2 << 30), "{line}");
        }
        assert_eq!(size("").unwrap(), None);
        assert!(size("store_bytes_max = \"much\"").is_err());
        assert!(size("store_bytes_max = -1").is_err());
    }
}
