//! The command line: every flag's name, help and check. `cli.md` is the contract, this is its code.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use cdp_journal::trust::Token;
use cdp_journal::units::{parse_bytes, parse_duration};
use cdp_journal::when::When;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::nbd::Listen;
use crate::source::{Opened, Source};

/// More would only queue on the disk, and each holds a buffer.
const THREADS_MAX: usize = 64;
/// Small reads in flight that a disk of its own makes faster.
const SCATTERED_READS_MIN: usize = 16;

/// Longest pattern to look for.
const PATTERN_BYTES_MAX: usize = 4096;

const EXAMPLES: &str = "\
Examples:
  cdp-restore ls     --from /var/lib/cdp
  cdp-restore points --from /var/lib/cdp pg
  cdp-restore image  --from /var/lib/cdp pg --at -5m --to pg.img
  cdp-restore image  --from /var/lib/cdp pg --at 2026-11-21T10:15:03.123+08:00 --to /dev/vdc
  cdp-restore rewind --from /var/lib/cdp pg --at -5m --to /dev/vdb
  cdp-restore mount  --from /var/lib/cdp pg --at -5m /mnt/then
  cdp-restore umount /mnt/then
  cdp-restore nbd    --from /var/lib/cdp pg --at -5m --listen unix:/run/pg.sock
  cdp-restore files  --from /var/lib/cdp pg --at -5m data/pg_hba.conf --to /tmp/then
  cdp-restore diff   --from /var/lib/cdp pg --since bookmark:before-upgrade --until latest
  cdp-restore find   --from /var/lib/cdp pg --bytes 'DROP TABLE orders' --since -1h
  cdp-restore verify --from /var/lib/cdp

Exit codes:
  0  done
  1  failed; the message says what, why, and what to do
  2  wrong usage
  3  that moment cannot be restored exactly; the message names the gap and the nearest exact moments
  4  the data read does not match its checksum";

/// The help of a command that takes a WHEN: its examples, after what a WHEN may be.
macro_rules! help_with_when {
    ($examples:literal) => {
        concat!(
            "\
WHEN is one of:
  latest                               the newest moment in the store
  2026-11-21T10:15:03.123456789+08:00  RFC 3339; without the offset, local time
  -90s, -5m, -2h                       before now
  seq:123456                           right after the write with that sequence number
  bookmark:LABEL                       a moment named with `cdp-agent bookmark`
A time means: every write whose timestamp is at or before it, and none after.

Examples:
",
            $examples
        )
    };
}

/// Reads the history of protected volumes: lists it, proves it, and brings a volume back as it was at
/// any moment.
///
/// Results go to stdout, everything else to stderr. A store is opened in place and never changed, also
/// while an agent is writing to it.
#[derive(Debug, Parser)]
#[command(name = "cdp-restore", version, after_help = EXAMPLES, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Common {
    /// Say more on stderr; twice for details, three times for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Say nothing on stderr but errors: no notes, no warnings, no progress
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// How messages on stderr are written
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,
}

/// How messages on stderr are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people
    Text,
    /// One JSON object per line
    Json,
}

/// What to do; each command's help is that of its arguments.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Ls(Ls),
    Points(Points),
    Image(Image),
    Rewind(Rewind),
    Mount(Mount),
    Umount(Umount),
    Nbd(Nbd),
    Files(Files),
    Diff(Diff),
    Find(Find),
    Bisect(Bisect),
    Verify(Verify),
    Enroll(Enroll),
    Completions(Completions),
}

/// Where history is read from.
#[derive(Clone, Debug, Args)]
pub(crate) struct From {
    /// The store to read: an agent's folder, such as /var/lib/cdp, or a journal server's; or a server, as HOST:PORT
    #[arg(long, value_name = "SRC")]
    pub(crate) from: Source,
    /// The folder with the certificate for the server, which `enroll` put there
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: Option<PathBuf>,
    /// How long a server that does not answer any more is asked again, before it is an error
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub(crate) patience: Duration,
}

impl From {
    /// Opens every store of the source.
    pub(crate) fn open(&self) -> anyhow::Result<Vec<Opened>> {
        self.from.open(self.identity.as_deref(), self.patience)
    }
}

/// List the volumes of a store, with how far their history reaches.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cdp-restore ls --from /var/lib/cdp
  cdp-restore ls --from /var/lib/cdp --json")]
pub(crate) struct Ls {
    #[command(flatten)]
    pub(crate) source: From,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show a volume's history: exact stretches, gaps with their causes, bookmarks.
///
/// Every time is shown in a form that can be given back after `--at`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cdp-restore points --from /var/lib/cdp pg
  cdp-restore points --from /var/lib/cdp pg --json")]
pub(crate) struct Points {
    #[command(flatten)]
    pub(crate) source: From,
    /// The volume's name, as `ls` shows it
    pub(crate) volume: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Write a block volume, as it was at a moment, to a file or onto a device.
///
/// A file comes out sparse where the volume is zero, readable by its owner only, and appears under its
/// name only once it is complete and on disk; a file of that name is replaced, and keeps its old content
/// if anything fails. A device must not be in use and must have at least the volume's size; what lies
/// beyond that size is left as it is.
#[derive(Debug, Args)]
#[command(after_help = help_with_when!(
    "  cdp-restore image --from /var/lib/cdp pg --at -90s --to pg.img
  cdp-restore image --from /var/lib/cdp pg --at bookmark:before-upgrade --to /dev/vdc --yes"
))]
pub(crate) struct Image {
    #[command(flatten)]
    pub(crate) source: From,
    /// The volume's name, as `ls` shows it
    pub(crate) volume: String,
    /// The moment to bring back
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) at: When,
    /// The file to write, or the block device to write over
    #[arg(long, value_name = "FILE_OR_DEVICE")]
    pub(crate) to: PathBuf,
    /// Write over the device without asking; needed where stdin is not a terminal
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// Check everything and say what would be written, but write nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) threads: Threads,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Bring a device that holds a later moment of a block volume back, by writing only what differs.
///
/// The device must not be in use. Everything that is needed is read and checked before anything is written. Where the
/// device is the volume itself, its agent running and its history exact up to now, only what was written since is
/// compared, and the state before gets a bookmark, so that it can be brought back as well; else all of the device is
/// read and compared. Stopped or killed at any point, the same command goes on.
#[derive(Debug, Args)]
#[command(after_help = help_with_when!(
    "  cdp-restore rewind --from /var/lib/cdp pg --at -90s --to /dev/vdb
  cdp-restore rewind --from /var/lib/cdp pg --at bookmark:before-upgrade --to /dev/vdb --yes --json"
))]
pub(crate) struct Rewind {
    #[command(flatten)]
    pub(crate) source: From,
    /// The volume's name, as `ls` shows it
    pub(crate) volume: String,
    /// The moment to bring back
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) at: When,
    /// The block device to bring back
    #[arg(long, value_name = "DEVICE")]
    pub(crate) to: PathBuf,
    /// Write over the device without asking; needed where stdin is not a terminal
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// Check and compare, and say how much would be written, but write nothing
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Read and compare the whole device, whatever its history tells
    #[arg(long)]
    pub(crate) compare_all: bool,
    #[command(flatten)]
    pub(crate) threads: Threads,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Mount a block volume, as it was at a moment: the file system inside it at DIR, with partitions a folder for each.
///
/// Returns as soon as DIR can be used, whatever the size: nothing is copied first. What the kernel writes on mounting
/// (the journal is replayed) goes to a layer that is thrown away by `umount`, and so does with --rw what anybody
/// writes; the history never changes. A process in the background serves it until then.
#[derive(Debug, Args)]
#[command(after_help = help_with_when!(
    "  cdp-restore mount --from /var/lib/cdp pg --at -90s /mnt/then
  cdp-restore mount --from /var/lib/cdp pg --at bookmark:before-upgrade /mnt/then --rw
  cdp-restore mount --from /var/lib/cdp pg --at latest /mnt/then --raw    # /mnt/then/pg.img
  cdp-restore umount /mnt/then"
))]
pub(crate) struct Mount {
    #[command(flatten)]
    pub(crate) source: From,
    /// The volume's name, as `ls` shows it
    pub(crate) volume: String,
    /// The moment to mount
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) at: When,
    /// The folder to mount at
    pub(crate) dir: PathBuf,
    /// Let users write, to a layer that is thrown away at the end
    #[arg(long)]
    pub(crate) rw: bool,
    /// Mount the image itself, as DIR/VOLUME.img, and nothing inside it
    #[arg(long)]
    pub(crate) raw: bool,
    #[command(flatten)]
    pub(crate) layer: LayerBounds,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Be the serving process of the mount that is kept track of in this folder
    #[arg(long, hide = true)]
    pub(crate) serve_in: Option<PathBuf>,
}

/// Undo a mount: everything that `mount` set up, also after its process was killed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cdp-restore umount /mnt/then")]
pub(crate) struct Umount {
    /// The folder that was mounted at
    pub(crate) dir: PathBuf,
}

/// Serve a block volume, as it was at a moment, to NBD clients: qemu, nbdcopy, nbd-client.
///
/// Prints the address that clients take on stdout once it is ready, and serves until SIGTERM or Ctrl-C. A socket file
/// is for its owner only. Without --tls-certificates HOST must be this one (127.0.0.1): every user of it can read the
/// volume there then, and nothing is encrypted. With it, only clients that show a certificate are served, and all is
/// encrypted (TLS 1.3).
#[derive(Debug, Args)]
#[command(after_help = help_with_when!(
    "  cdp-restore nbd --from /var/lib/cdp pg --at -90s --listen unix:/run/pg.sock
  nbdcopy 'nbd+unix:///pg?socket=/run/pg.sock' pg.img
  cdp-restore nbd --from /var/lib/cdp pg --at -90s --listen 127.0.0.1:10809 --rw
  cdp-restore nbd --from /var/lib/cdp pg --at -90s --listen 0.0.0.0:10809 --tls-certificates /etc/pki/nbd
  nbdcopy 'nbds://dr1:10809/pg?tls-certificates=/home/ann/.pki/nbd' pg.img"
))]
pub(crate) struct Nbd {
    #[command(flatten)]
    pub(crate) source: From,
    /// The volume's name, as `ls` shows it; clients may ask for it by this name or by none
    pub(crate) volume: String,
    /// The moment to serve
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) at: When,
    /// Where clients come in
    #[arg(long, value_name = "unix:PATH|HOST:PORT")]
    pub(crate) listen: Listen,
    /// Serve under TLS alone, and only clients with a certificate: a folder with ca-cert.pem, whose certificates clients
    /// must show, server-cert.pem and server-key.pem, as nbdkit and qemu-nbd take it
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_certificates: Option<PathBuf>,
    /// Let clients write, to a layer that is thrown away at the end; the history never changes
    #[arg(long)]
    pub(crate) rw: bool,
    #[command(flatten)]
    pub(crate) layer: LayerBounds,
    /// Print the address as JSON, with what is served there
    #[arg(long)]
    pub(crate) json: bool,
}

/// Copy paths out of a block volume as it was at a moment, into a new folder.
///
/// With owner, mode, times, links, holes and extended attributes. Root gets them from any file system that the kernel
/// mounts. Without root, or where nothing can be mounted, an ext4 (or ext2, ext3) is read by this program, its journal
/// included; what only root may do is left out then and counted: giving files to other owners, whose set-user-ID bits
/// go with them, and attributes that are not for users. Devices, which only root may make, are an error. Paths are those
/// that `mount` would show below its folder; symbolic links are copied as such. The folder appears only once it is
/// complete.
#[derive(Debug, Args)]
#[command(after_help = help_with_when!(
    "  cdp-restore files --from /var/lib/cdp pg --at -90s --to /tmp/everything
  cdp-restore files --from /var/lib/cdp pg --at bookmark:before-upgrade etc/passwd home/ann --to /tmp/then"
))]
pub(crate) struct Files {
    #[command(flatten)]
    pub(crate) source: From,
    /// The volume's name, as `ls` shows it
    pub(crate) volume: String,
    /// The moment to copy from
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) at: When,
    /// What to copy; everything if left out
    #[arg(value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    /// The folder to put it into, which must be empty or not be there
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    #[command(flatten)]
    pub(crate) layer: LayerBounds,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where a throw-away layer lies, and how large it may get.
#[derive(Clone, Debug, Args)]
pub(crate) struct LayerBounds {
    /// How much the throw-away layer may hold; a write beyond fails as on a full disk
    #[arg(long, value_name = "SIZE", default_value = "10GiB", value_parser = parse_bytes)]
    pub(crate) layer_bytes_max: u64,
    /// The folder whose disk holds the throw-away layer, in a file without a name
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub(crate) layer_dir: PathBuf,
}

/// List what was written between two moments: where, how often, when and by whom.
///
/// Writes after `--since` up to and including `--until` count. Ranges that touch are told as one. Who
/// wrote is the process that handed the write to the device: for data that the kernel wrote back from its
/// page cache, that is a kernel thread.
///
/// Then which files were changed, where the volume holds file systems that the kernel mounts at both moments: both are
/// mounted for that, read-only under a layer that is thrown away, which takes root. Files are compared by what is in
/// them; only what can differ is read.
#[derive(Debug, Args)]
#[command(after_help = help_with_when!(
    "  cdp-restore diff --from /var/lib/cdp pg --since -10m --until -5m
  cdp-restore diff --from /var/lib/cdp pg --since bookmark:before-upgrade --until latest --json"
))]
pub(crate) struct Diff {
    #[command(flatten)]
    pub(crate) source: From,
    /// The volume's name, as `ls` shows it
    pub(crate) volume: String,
    /// The earlier moment
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) since: When,
    /// The later moment
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) until: When,
    /// Leave out which files were changed: mount nothing
    #[arg(long)]
    pub(crate) no_files: bool,
    #[command(flatten)]
    pub(crate) layer: LayerBounds,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Find when bytes were written to a block volume, where, and by whom.
///
/// Looks through everything that was written in the stretch of time, whether it can still be seen in any moment or not,
/// in the order in which it was written. Bytes that one write wrote are found wherever they lie in it; bytes that came
/// in two writes, or that the file system stores in two places, are not. Who wrote is the process that handed the write
/// to the device: for data that the kernel wrote back from its page cache, that is a kernel thread. Bytes are gone with
/// the first record after which they are not at that place any more.
///
/// Which file they were in is told where the volume holds a file system that the kernel mounts: some moments at which
/// the bytes were there are mounted for that, read-only under a layer that is thrown away, which takes root. It is the
/// file's name at that moment, and none where the bytes were part of no file (of the file system's journal, say).
#[derive(Debug, Args)]
#[command(after_help = help_with_when!(
    "  cdp-restore find --from /var/lib/cdp pg --bytes 'DROP TABLE orders'
  cdp-restore find --from /var/lib/cdp pg --bytes 0xdeadbeef --since -1h --until -5m --json"
))]
pub(crate) struct Find {
    #[command(flatten)]
    pub(crate) source: From,
    /// The volume's name, as `ls` shows it
    pub(crate) volume: String,
    /// What to look for: text as it is, or after 0x bytes in hexadecimal digits
    #[arg(long, value_name = "TEXT|0xHEX", value_parser = parse_pattern, allow_hyphen_values = true)]
    pub(crate) bytes: Pattern,
    /// Only what was written after this moment; from the beginning if left out
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) since: Option<When>,
    /// Only what was written up to this moment; up to the latest if left out
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) until: Option<When>,
    /// Stop after so many hits
    #[arg(long, value_name = "N", default_value = "10000")]
    pub(crate) hits_max: usize,
    /// Leave out which files the bytes were in: mount nothing
    #[arg(long)]
    pub(crate) no_files: bool,
    #[command(flatten)]
    pub(crate) layer: LayerBounds,
    #[command(flatten)]
    pub(crate) threads: Threads,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Find the write after which a block volume went bad, by a check of your own.
///
/// Mounts moments between a good and a bad one, each read-write under a layer that is thrown away, and runs CMD on each:
/// exit code 0 says good, 1 to 124 bad, anything else stops the search. CMD finds the mount in CDP_MOUNT and the moment
/// in CDP_AT. First between flushes, then between single writes; a moment that cannot be mounted counts as bad. Needs
/// root, as mount does.
#[derive(Debug, Args)]
#[command(after_help = help_with_when!(
    r#"  cdp-restore bisect --from /var/lib/cdp pg --good -1h --bad latest -- sh -c 'test -e "$CDP_MOUNT/precious"'"#
))]
pub(crate) struct Bisect {
    #[command(flatten)]
    pub(crate) source: From,
    /// The volume's name, as `ls` shows it
    pub(crate) volume: String,
    /// A moment that is good
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) good: When,
    /// A later moment that is bad
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
    pub(crate) bad: When,
    #[command(flatten)]
    pub(crate) layer: LayerBounds,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The check and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<PathBuf>,
}

/// Bytes to look for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pattern(pub(crate) Vec<u8>);

fn parse_pattern(text: &str) -> Result<Pattern, String> {
    let bytes = match text.strip_prefix("0x") {
        None => text.as_bytes().to_vec(),
        Some(hex) => {
            let digits: Option<Vec<u8>> = hex.chars().map(|digit| Some(digit.to_digit(16)? as u8)).collect();
            let digits = digits.filter(|digits| digits.len().is_multiple_of(2));
            let digits = digits.ok_or("after 0x, give two hexadecimal digits for each byte")?;
            digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
        }
    };
    if (1..=PATTERN_BYTES_MAX).contains(&bytes.len()) {
        Ok(Pattern(bytes))
    } else {
        Err(format!("give 1 to {PATTERN_BYTES_MAX} bytes"))
    }
}

/// Read and check what is stored: every frame of the store, or every block of one moment.
///
/// Without a volume, every byte of the store's log is read and checked against its checksums. With one,
/// every block of that volume is read as it was at the moment, through the same path as a restore.
#[derive(Debug, Args)]
#[command(after_help = help_with_when!(
    "  cdp-restore verify --from /var/lib/cdp
  cdp-restore verify --from /var/lib/cdp pg --at -1h --sha256"
))]
pub(crate) struct Verify {
    #[command(flatten)]
    pub(crate) source: From,
    /// The volume's name, as `ls` shows it; without it the whole store is checked
    pub(crate) volume: Option<String>,
    /// The moment to check; the latest if left out
    #[arg(long, value_name = "WHEN", allow_hyphen_values = true, requires = "volume")]
    pub(crate) at: Option<When>,
    /// Also print the SHA-256 of the whole volume at that moment, as `sha256sum` would of its image
    #[arg(long, requires = "volume")]
    pub(crate) sha256: bool,
    #[command(flatten)]
    pub(crate) threads: Threads,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Turn a token of a journal server into a certificate that reads an agent's history.
#[derive(Debug, Args)]
pub(crate) struct Enroll {
    /// The server
    #[arg(long, value_name = "HOST:PORT", value_parser = cdp_journal::net::host_and_port)]
    pub(crate) server: String,
    /// What `cdp-journal token --restore` printed there
    #[arg(long)]
    pub(crate) token: Token,
    /// The folder that the certificate and its key are put into
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: PathBuf,
}

/// Print the completion script for a shell.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cdp-restore completions bash > /usr/share/bash-completion/completions/cdp-restore
  cdp-restore completions zsh > /usr/local/share/zsh/site-functions/_cdp-restore")]
pub(crate) struct Completions {
    /// The shell
    pub(crate) shell: Shell,
}

/// How much is done at once.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Threads {
    /// Reads in flight; one for each processor if left out
    #[arg(long = "threads", value_name = "N", value_parser = parse_threads)]
    count: Option<NonZeroUsize>,
}

impl Threads {
    /// The number asked for, else so many that a disk is kept busy by small reads all over it.
    pub(crate) fn for_scattered_reads(self) -> usize {
        match self.count {
            Some(count) => count.get(),
            None => self.get().max(SCATTERED_READS_MIN),
        }
    }

    /// The number asked for, else one for each processor, within bounds.
    pub(crate) fn get(self) -> usize {
        self.count
            .or_else(|| std::thread::available_parallelism().ok())
            .map_or(1, NonZeroUsize::get)
            .min(THREADS_MAX)
    }
}

fn parse_threads(text: &str) -> Result<NonZeroUsize, String> {
    text.parse::<usize>()
        .ok()
        .and_then(NonZeroUsize::new)
        .filter(|threads| threads.get() <= THREADS_MAX)
        .ok_or_else(|| format!("give a number from 1 to {THREADS_MAX}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_relative_moment_is_a_value_and_not_a_flag() {
        let cli = Cli::try_parse_from([
            "cdp-restore",
            "image",
            "--from",
            "/store",
            "pg",
            "--at",
            "-90s",
            "--to",
            "pg.img",
        ])
        .unwrap();
        assert!(matches!(cli.command, Command::Image(image) if image.at.to_string() == "-90s"));
    }

    #[test]
    fn wrong_usage_is_refused() {
        for arguments in [
            &["image", "--from", "/store", "pg", "--to", "pg.img"][..],
            &[
                "image",
                "--from",
                "/store",
                "pg",
                "--at",
                "yesterday",
                "--to",
                "pg.img",
            ],
            &["verify", "--from", "/store", "--at", "latest"],
            &["points", "--from", "/store"],
            &["ls", "--from", "/store", "-v", "-q"],
            &["verify", "--from", "/store", "--threads", "0"],
            &["mount", "--from", "/store", "pg", "--at", "latest"],
            &["files", "--from", "/store", "pg", "--at", "latest"],
        ] {
            let parsed = Cli::try_parse_from([&["cdp-restore"], arguments].concat());
            let error = parsed.expect_err(&format!("{arguments:?} was accepted"));
            assert_eq!(error.exit_code(), 2, "{arguments:?}");
        }
    }

    #[test]
    fn global_flags_may_stand_before_and_after_the_command() {
        for arguments in [["-v", "ls", "--from", "/s"], ["ls", "--from", "/s", "-v"]] {
            let cli = Cli::try_parse_from([&["cdp-restore"], &arguments[..]].concat()).unwrap();
            assert_eq!(cli.common.verbose, 1);
        }
    }
}
