//! `nbd`: a moment of a volume for NBD clients, until it is told to stop.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use anyhow::Context;
use serde::Serialize;
use signal_hook::consts::TERM_SIGNALS;
use signal_hook::low_level::pipe;

use super::{IndexAhead, open_moment};
use crate::args::Nbd;
use crate::disk::Disk;
use crate::nbd::{Credentials, Export, Server};
use crate::report::Report;
use crate::time::Time;
use crate::units::Bytes;

/// What `nbd --json` prints once it is ready.
#[derive(Debug, Serialize)]
struct Ready<'a> {
    uri: &'a str,
    volume: &'a str,
    at: Time,
    seq: u64,
    bytes: u64,
    read_only: bool,
}

pub(crate) fn run(args: &Nbd, report: &Report) -> anyhow::Result<()> {
    let credentials = args.tls_certificates.as_deref().map(Credentials::read);
    let credentials = credentials.transpose()?;
    let moment = open_moment(&args.source, &args.volume, &args.at, "nbd")?;
    let _ahead = IndexAhead::start(&moment.view);
    let layer = match args.rw {
        true => Some(args.layer.make(&args.source.from, moment.view.bytes())?),
        false => None,
    };
    let (volume, instant) = (&moment.volume, moment.instant);
    let description = format!("{} as it was at {instant}", volume.name);
    let disk = Disk::new(moment.view.clone(), layer);
    let (bytes, read_only) = (disk.bytes(), !disk.is_writable());
    let export = Export::new(disk, &volume.name, description.clone(), report);
    // Caught before anybody can know that it is ready.
    let (stop, raise) = UnixStream::pair().context("make a pair of sockets")?;
    for signal in TERM_SIGNALS {
        let raise = raise.try_clone().context("double a socket")?;
        pipe::register(*signal, raise).context("catch SIGTERM")?;
    }
    let server = Server::bind(&args.listen, credentials)?;
    let uri = server.uri(&volume.name);
    if args.json {
        report.json(&Ready {
            uri: &uri,
            volume: &volume.name,
            at: instant.at,
            seq: instant.seq.get(),
            bytes,
            read_only,
        })?;
    } else {
        report.out(format!("{uri}\n"))?;
    }
    let mode = if read_only {
        "read-only"
    } else {
        "writable, and what is written is thrown away at the end"
    };
    report.note(format!(
        "serving {description}, {}, {mode}, until SIGTERM or Ctrl-C",
        Bytes(bytes)
    ));
    server.serve(&export, stop.as_fd())
}
