//! The command line of `cdp-journal`.

use std::path::PathBuf;
use std::time::Duration;

use cdp_journal::server::Offers;
use cdp_journal::site::AgentName;
use cdp_journal::trust::Token;
use clap::{Args, Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  cdp-journal serve  --store /srv/cdp --listen [::]:7443
  cdp-journal token  --store /srv/cdp --agent web01
  cdp-journal token  --store /srv/cdp --agent web01 --restore --ttl 15m
  cdp-journal revoke --store /srv/cdp web01
  cdp-journal status --store /srv/cdp
A second server that follows it:
  cdp-journal token  --store /srv/cdp --agent dr2 --follow
  cdp-journal enroll --server dr1:7443 --token cdp1-… --identity /etc/cdp/identity
  cdp-journal serve  --store /srv/cdp --listen [::]:7443 --upstream dr1:7443 --identity /etc/cdp/identity

Exit codes: 0 done; 1 failed, the message says what, why and what to do; 2 wrong usage.";

/// The journal server: keeps what agents elsewhere capture, so that any moment can be restored from here.
#[derive(Debug, Parser)]
#[command(name = "cdp-journal", version, propagate_version = true, after_help = EXAMPLES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How to talk.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Common {
    /// Say more on stderr; twice for everything
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub(crate) verbose: u8,
    /// Say only what went wrong
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Form of the messages on stderr
    #[arg(long, value_enum, default_value = "text", global = true)]
    pub(crate) log_format: LogFormat,
}

/// Form of the messages on stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Take in what agents ship, and serve restores, until SIGTERM or SIGINT
    Serve(ServeArgs),
    /// Print a token that turns into a certificate, once
    Token(TokenArgs),
    /// Refuse the certificates of an agent from now on, those of its restores included; or of a follower
    Revoke(RevokeArgs),
    /// Turn a token of another server into the certificate to follow it with
    Enroll(EnrollArgs),
    /// Tell who ships, and how much is there
    Status(StatusArgs),
}

/// Which server.
#[derive(Debug, Args)]
pub(crate) struct StoreArg {
    /// The server's folder
    #[arg(long = "store", value_name = "DIR")]
    pub(crate) dir: PathBuf,
}

/// Flags of `serve`. Each has a key of the same name in the file that `--config` names; flags win.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ServeArgs {
    /// The server's folder; made on the first start, with a certificate authority of its own
    #[arg(long, value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,
    /// Where to listen (UDP)
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: Option<String>,
    /// Another server to follow: what agents ship to it comes here as well
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) upstream: Option<String>,
    /// The folder that `enroll` put the certificate for the upstream into
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: Option<PathBuf>,
    /// A limit on what is taken from the upstream, such as "20 Mbit/s" or "mon-fri 08:00-18:00 5 MiB/s", in local time; the
    /// lowest that holds counts; may be given several times [default: none]
    #[arg(long, value_name = "LIMIT")]
    pub(crate) rate: Vec<String>,
    /// A TOML file with these settings
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Content that an agent reads back and this server has is not sent again; among whose it is looked for [default: own]
    #[arg(long, value_enum)]
    pub(crate) offers: Option<Offers>,
    /// Each agent's store is full when it holds this much [default: no bound but the file system]
    #[arg(long, value_name = "BYTES", value_parser = cdp_journal::units::parse_bytes)]
    pub(crate) store_bytes_max: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    #[command(flatten)]
    pub(crate) store: StoreArg,
    /// What the agent, or with --follow the other server, is called here
    #[arg(long, value_name = "NAME")]
    pub(crate) agent: AgentName,
    /// For a certificate that reads the agent's history, rather than appends to it
    #[arg(long)]
    pub(crate) restore: bool,
    /// For a certificate of another server, that follows the histories of all agents (`cdp-journal enroll`)
    #[arg(long, conflicts_with = "restore")]
    pub(crate) follow: bool,
    /// How long the token can be used, such as 15m or 24h
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_lifetime)]
    pub(crate) ttl: Duration,
    /// How long the certificate will be good, such as 365d
    #[arg(long, value_name = "TIME", default_value = "1825d", value_parser = parse_lifetime)]
    pub(crate) valid: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct EnrollArgs {
    /// The server to follow
    #[arg(long, value_name = "HOST:PORT", value_parser = cdp_journal::net::host_and_port)]
    pub(crate) server: String,
    /// What `cdp-journal token --follow` printed there
    #[arg(long)]
    pub(crate) token: Token,
    /// The folder that the certificate and its key are put into
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct RevokeArgs {
    #[command(flatten)]
    pub(crate) store: StoreArg,
    /// The agent, or follower
    pub(crate) name: AgentName,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) store: StoreArg,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// A length of time that is none at all makes no sense here.
fn parse_lifetime(text: &str) -> Result<Duration, String> {
    let time = cdp_journal::units::parse_duration(text)?;
    if time.is_zero() {
        return Err("give more than no time at all".to_owned());
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn nothing_is_good_for_no_time() {
        assert_eq!(parse_lifetime("15m"), Ok(Duration::from_secs(900)));
        assert!(parse_lifetime("0s").is_err());
    }
}
