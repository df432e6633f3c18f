//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use cdp_journal::trust::Token;
use cdp_journal::units::{parse_bytes, parse_duration};
use clap::{Args, Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "Examples:
  cdp-agent doctor
  cdp-agent run --store /var/lib/cdp --volume pg=/dev/vdb
  cdp-agent wait --store /var/lib/cdp --for protected
  cdp-agent bookmark --store /var/lib/cdp before-upgrade
  cdp-agent enroll --server dr1:7443 --token cdp1-… --identity /etc/cdp/identity
  cdp-agent run --store /var/lib/cdp --volume pg=/dev/vdb --server dr1:7443 --identity /etc/cdp/identity

Exit codes: 0 done; 1 failed, the message says what, why and what to do; 2 wrong usage.";

/// Journals every write to the protected volumes of this host, so that any moment can be restored.
#[derive(Debug, Parser)]
#[command(name = "cdp-agent", version, propagate_version = true, after_help = EXAMPLES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) output: Output,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How to talk.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Output {
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

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Protect volumes until SIGTERM or SIGINT
    Run(Box<RunArgs>),
    /// Tell how the volumes are
    Status {
        #[command(flatten)]
        store: StoreArg,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Wait until a state is reached
    Wait {
        #[command(flatten)]
        store: StoreArg,
        /// Only this volume (all by default)
        #[arg(long, value_name = "NAME")]
        volume: Option<String>,
        /// What to wait for
        #[arg(long = "for", value_enum)]
        state: WaitFor,
        /// How long to wait at most, such as 60s or 5m
        #[arg(long, default_value = "60s", value_parser = parse_duration)]
        timeout: Duration,
    },
    /// Name this moment
    Bookmark {
        #[command(flatten)]
        store: StoreArg,
        /// The name: restore with `--at bookmark:LABEL`
        label: String,
    },
    /// Remove the probe from the kernel, where it goes on without the agent
    ///
    /// A stopped agent leaves its probe loaded, so that the next one misses nothing. Unload it before the
    /// agent is removed for good. The next start compares the volumes with their devices.
    Unload {
        /// The store of the agent whose probe is removed
        #[arg(long, value_name = "DIR", required_unless_present = "all")]
        store: Option<PathBuf>,
        /// The probes of all agents of this host that do not run
        #[arg(long, conflicts_with = "store")]
        all: bool,
    },
    /// Turn a token of a journal server into a certificate
    Enroll {
        /// The server
        #[arg(long, value_name = "HOST:PORT", value_parser = cdp_journal::net::host_and_port)]
        server: String,
        /// What `cdp-journal token` printed there
        #[arg(long)]
        token: Token,
        /// The folder that the certificate and its key are put into
        #[arg(long, value_name = "DIR")]
        identity: PathBuf,
    },
    /// Tell whether this host can be protected, and what to mend
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Which store.
#[derive(Debug, Args)]
pub(crate) struct StoreArg {
    /// The agent's store folder
    #[arg(long = "store", value_name = "DIR")]
    pub(crate) dir: PathBuf,
}

/// What `wait` waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WaitFor {
    /// The first copy (or a resync) is done and history is exact from now on
    Protected,
    /// Everything written before this call is durable in the store, and on every server
    Synced,
}

/// Flags of `run`. Each has a key of the same name in the file that `--config` names; flags win.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct RunArgs {
    /// The store folder; must not lie on a protected volume
    #[arg(long, value_name = "DIR")]
    pub(crate) store: Option<PathBuf>,
    /// A volume to protect: a name of your choice and a block device. May be given several times
    #[arg(long, value_name = "NAME=PATH")]
    pub(crate) volume: Vec<String>,
    /// A journal server to ship to, enrolled with before. May be given several times
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) server: Vec<String>,
    /// The folder that `enroll` put the certificates into
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: Option<PathBuf>,
    /// A TOML file with these settings; read again on SIGHUP
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Bytes of the ring between kernel and agent; a power of two [default: 64 MiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) ring_bytes: Option<u64>,
    /// What is read back around a write that was lost; a power of two [default: 64 KiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) dirty_region_bytes: Option<u64>,
    /// Captured writes are durable at the latest after this long [default: 20]
    #[arg(long, value_name = "MS")]
    pub(crate) commit_interval_ms: Option<u64>,
    /// Bytes of captured writes that may wait for the encoder; the ring holds what comes then [default: 64 MiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) encode_queue_bytes: Option<u64>,
    /// Memory for the last content of written blocks, of which then only what differs is stored; 0 for none
    /// [default: 192 MiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) delta_cache_bytes: Option<u64>,
    /// Stop appending when the store holds this much [default: no bound but the file system]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) store_bytes_max: Option<u64>,
    /// How fast to ship, to all servers together, such as "20 Mbit/s" or "mon-fri 08:00-18:00 20 Mbit/s" in this host's
    /// time zone. May be given several times: the lowest that holds counts [default: no limit]
    #[arg(long, value_name = "LIMIT")]
    pub(crate) rate: Vec<String>,
    /// The same for what is read back from the devices: first copies and resyncs [default: no limit]
    #[arg(long, value_name = "LIMIT")]
    pub(crate) rate_readback: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
