//! `mount` and `umount`: a moment of a volume as a folder.
//!
//! `mount` starts itself once more, in the background: that process opens the store, serves the image by FUSE and says
//! in one line on its stdout what lies on it. This one sets up loop devices and mounts, and returns.

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use cdp_journal::{Seq, WallNs};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::peek::PeekPart;
use super::{IndexAhead, Instant, open_moment, refuse_own_files};
use crate::args::{Mount, Umount};
use crate::disk::{Disk, complaints_in};
use crate::mount::{
    Entry, Found, LoopDevice, Mounted, Part, Served, Unmountable, mount_file_system, mount_folders, mounts,
    probe, unmount,
};
use crate::report::Report;
use crate::time::Time;

/// How long a serving process is given to end once its image is unmounted.
const SERVER_END_MS_MAX: i64 = 10_000;

/// What the serving process says once its image can be read.
#[derive(Debug, Serialize, Deserialize)]
struct Ready {
    moment: String,
    at: WallNs,
    seq: u64,
    parts: Vec<ReadyPart>,
    /// What was found and is not mounted.
    left_out: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ReadyPart {
    number: Option<u32>,
    offset: u64,
    len: u64,
    file_system: String,
}

/// What `mount --json` prints.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    volume: &'a str,
    at: Time,
    seq: u64,
    dir: &'a Path,
    /// Where a file system, or with `--raw` the image, can be found.
    mounted: Vec<PathBuf>,
    /// What was found and is not mounted.
    left_out: &'a [String],
    read_only: bool,
}

/// The serving process has failed, and has said why.
#[derive(Debug, thiserror::Error)]
#[error("the serving process has ended")]
pub(crate) struct ServerFailed {
    /// Its exit code.
    pub(crate) code: u8,
}

pub(crate) fn run(args: &Mount, report: &Report) -> anyhow::Result<()> {
    if let Some(folder) = &args.serve_in {
        return serve(args, folder, report);
    }
    let arguments = std::env::args_os().skip(1).collect();
    let Mounting {
        entry,
        ready,
        mounted,
    } = Mounting::set_up(args, arguments, report)?;
    let dir = entry.dir();
    for left_out in &ready.left_out {
        report.note(format!("not mounted: {left_out}"));
    }
    if args.json {
        return report.json(&Outcome {
            volume: &args.volume,
            at: Time(ready.at),
            seq: ready.seq,
            dir,
            mounted,
            left_out: &ready.left_out,
            read_only: !args.rw,
        });
    }
    let mode = if args.rw {
        "writable, and what is written is thrown away at the end"
    } else {
        "read-only"
    };
    let mut text = String::new();
    for place in mounted {
        text.push_str(&format!("{}: {}, {mode}\n", place.display(), ready.moment));
    }
    report.out(text)
}

/// A moment that is mounted.
pub(super) struct Mounting {
    entry: Entry,
    ready: Ready,
    /// Where a file system, or the image, can be found.
    mounted: Vec<PathBuf>,
}

impl Mounting {
    /// Mounts what `args` ask for; nothing is left of it if that fails. `arguments` are those of the command line that
    /// say the same, for the serving process.
    pub(super) fn set_up(args: &Mount, arguments: Vec<OsString>, report: &Report) -> anyhow::Result<Self> {
        let dir = canonical(&args.dir)?;
        refuse_own_files(&dir, &args.source.from)?;
        if !args.raw && !rustix::process::geteuid().is_root() {
            bail!("only root may mount what lies inside a volume; --raw mounts the image itself");
        }
        let entry = Entry::create(&dir, image_name(&args.volume), args.raw)?;
        match set_up(args, arguments, &entry) {
            Ok((ready, mounted)) => Ok(Mounting {
                entry,
                ready,
                mounted,
            }),
            Err(error) => Err(match take_down(entry).map(|log| complaints_in(&log)) {
                Ok(trouble) if trouble.is_empty() => error,
                // Of no use to who asks whether there is anything to mount: not all of it could be read.
                Ok(trouble) => anyhow::anyhow!("{:#}: {trouble}", error),
                // Told first; what cannot be undone now can be later.
                Err(undo) => {
                    report.warn(format!(
                        "{undo:#}; `cdp-restore umount {}` undoes the rest",
                        dir.display()
                    ));
                    error
                }
            }),
        }
    }

    /// The file systems that are mounted.
    pub(super) fn parts(&self) -> Vec<PeekPart> {
        let parts = self.ready.parts.iter().zip(&self.mounted);
        let parts = parts.map(|(part, dir)| PeekPart {
            number: part.number,
            dir: dir.clone(),
            kind: part.file_system.clone(),
            offset: part.offset,
        });
        parts.collect()
    }

    /// What was found and is not mounted.
    pub(super) fn left_out(&self) -> &[String] {
        &self.ready.left_out
    }

    /// Which moment it is.
    pub(super) fn instant(&self) -> Option<Instant> {
        let at = Time(self.ready.at);
        Seq::new(self.ready.seq).map(|seq| Instant { seq, at })
    }

    /// Undoes it; which requests failed meanwhile: nothing, if all that was asked for could be read.
    pub(super) fn take_down(self) -> anyhow::Result<String> {
        take_down(self.entry).map(|log| complaints_in(&log))
    }
}

impl Mount {
    /// The command line that says this.
    pub(super) fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["mount".into(), "--from".into()];
        arguments.push(self.source.from.to_string().into());
        if let Some(identity) = &self.source.identity {
            arguments.extend(["--identity".into(), identity.into()]);
        }
        let patience = format!("{}ms", self.source.patience.as_millis());
        arguments.extend(["--patience".into(), patience.into()]);
        arguments.extend(["--at".into(), self.at.to_string().into()]);
        for (flag, is_set) in [("--rw", self.rw), ("--raw", self.raw)] {
            arguments.extend(is_set.then(|| flag.into()));
        }
        let bytes_max = self.layer.layer_bytes_max.to_string();
        arguments.extend(["--layer-bytes-max".into(), bytes_max.into()]);
        arguments.extend(["--layer-dir".into(), self.layer.layer_dir.clone().into()]);
        arguments.extend(["--".into(), self.volume.clone().into(), self.dir.clone().into()]);
        arguments
    }
}

/// `DIR`, which must be a folder, as an absolute path.
fn canonical(dir: &Path) -> anyhow::Result<PathBuf> {
    match fs::metadata(dir) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => bail!("{} is not a folder", dir.display()),
        // A mount whose server has gone, or is just going: nobody can look into it any more.
        Err(error)
            if matches!(
                Errno::from_io_error(&error),
                Some(Errno::NOTCONN | Errno::CONNABORTED)
            ) => {}
        Err(error) => return Err(error).with_context(|| format!("find {}", dir.display())),
    }
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let by_parent = || Ok(parent.canonicalize()?.join(dir.file_name().unwrap_or_default()));
    let path: io::Result<_> = dir.canonicalize().or_else(|_| by_parent());
    path.with_context(|| format!("find {}", dir.display()))
}

/// Of `VOLUME` or `AGENT/VOLUME`.
fn image_name(volume: &str) -> String {
    let name = volume.rsplit_once('/').map_or(volume, |(_, name)| name);
    format!("{name}.img")
}

/// Starts the serving process, and puts on top of its image what lies in it.
fn set_up(args: &Mount, arguments: Vec<OsString>, entry: &Entry) -> anyhow::Result<(Ready, Vec<PathBuf>)> {
    let ready = start_server(arguments, entry)?;
    if args.raw {
        return Ok((ready, vec![entry.image()]));
    }
    let whole = ready.parts.iter().all(|part| part.number.is_none());
    let folder_of = |part: &ReadyPart| match part.number {
        Some(number) => format!("p{number}"),
        None => String::new(),
    };
    if ready.parts.is_empty() {
        return Err(Unmountable::NoFileSystem {
            volume: args.volume.clone(),
            found: ready.left_out.join(", "),
        }
        .into());
    }
    if !whole {
        let names: Vec<_> = ready.parts.iter().map(folder_of).collect();
        mount_folders(entry.dir(), &names)?;
    }
    let mut mounted = Vec::new();
    for part in &ready.parts {
        let place = match part.number {
            Some(_) => entry.dir().join(folder_of(part)),
            None => entry.dir().to_owned(),
        };
        let stretch = Part {
            number: part.number,
            offset: part.offset,
            len: part.len,
            found: Found::Unknown,
        };
        let device = LoopDevice::attach(&entry.image(), &stretch)?;
        mount_file_system(&device.path(), &part.file_system, &place, args.rw)?;
        mounted.push(place);
    }
    Ok((ready, mounted))
}

/// Starts this program once more, to serve.
fn start_server(arguments: Vec<OsString>, entry: &Entry) -> anyhow::Result<Ready> {
    let program = std::env::current_exe().context("find this program")?;
    let mut arguments = arguments;
    // Not at the end, which may lie behind a `--`.
    let at = arguments.iter().position(|argument| argument == "mount");
    let at = at.context("this is not the command line of a mount")? + 1;
    let serve_in: [OsString; 2] = ["--serve-in".into(), entry.folder().into()];
    arguments.splice(at..at, serve_in);
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the serving process")?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout)
            .read_line(&mut line)
            .context("hear from the serving process")?;
    }
    if let Ok(ready) = serde_json::from_str(&line) {
        return Ok(ready);
    }
    let status = child.wait().context("wait for the serving process")?;
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(code) if code != 0 => Err(ServerFailed { code }.into()),
        _ => bail!(
            "the serving process ended early (signal {})",
            status
                .signal()
                .map_or_else(|| "none".to_owned(), |signal| signal.to_string())
        ),
    }
}

/// The serving process: from its start until the image is unmounted.
fn serve(args: &Mount, folder: &Path, report: &Report) -> anyhow::Result<()> {
    // Ctrl-C at the terminal is not for it.
    rustix::process::setsid().context("leave the terminal")?;
    Entry::write_server(folder)?;
    let entry_folder = folder.to_owned();
    let dir = canonical(&args.dir)?;
    let entry = Entry::find(&dir)?.filter(|entry| entry.folder() == entry_folder);
    let entry = entry.context("--serve-in is for this program's own use")?;
    let moment = open_moment(&args.source, &args.volume, &args.at, "mount")?;
    // Journal replay needs a layer, even if nobody else may write.
    let layer = match args.raw && !args.rw {
        true => None,
        false => Some(args.layer.make(&args.source.from, moment.view.bytes())?),
    };
    let mut ready = Ready {
        moment: format!("{} as it was at {}", moment.volume.name, moment.instant),
        at: moment.instant.at.0,
        seq: moment.instant.seq.get(),
        parts: Vec::new(),
        left_out: Vec::new(),
    };
    let disk = Disk::new(moment.view.clone(), layer);
    if !args.raw {
        let read_at = |offset, buf: &mut [u8]| disk.read_at(offset, buf);
        for part in probe(&read_at, disk.bytes())? {
            let place = part
                .number
                .map_or_else(String::new, |number| format!(" in partition {number}"));
            match part.found {
                Found::FileSystem(kind) => ready.parts.push(ReadyPart {
                    number: part.number,
                    offset: part.offset,
                    len: part.len,
                    file_system: kind.to_owned(),
                }),
                found => ready.left_out.push(format!("{found}{place}")),
            }
        }
    }
    let unix_time = Duration::from_nanos(u64::try_from(moment.instant.at.0.0).unwrap_or(0));
    let name = image_name(&moment.volume.name);
    let served = Served::mount(disk, name, unix_time, &entry.image_folder(), report.clone())?;
    // From here on nobody waits for what it says; whoever started it must not be kept waiting for its end.
    let log = Entry::create_log(folder).context("make a log")?;
    rustix::stdio::dup2_stderr(&log).context("write to the log")?;
    std::env::set_current_dir("/").context("leave the working folder")?;
    report.out(format!("{}\n", serde_json::to_string(&ready)?))?;
    rustix::stdio::dup2_stdout(&log).context("write to the log")?;
    let _ahead = IndexAhead::start(&moment.view);
    served.serve()
}

/// `umount`.
pub(crate) fn unmount_all(args: &Umount, report: &Report) -> anyhow::Result<()> {
    let dir = canonical(&args.dir)?;
    let entry = Entry::find(&dir)?;
    let entry = entry.with_context(|| format!("nothing of `cdp-restore mount` is at {}", dir.display()))?;
    let trouble = take_down(entry)?;
    if !trouble.is_empty() {
        report.warn(format!("while {} was mounted: {trouble}", dir.display()));
    }
    Ok(())
}

/// Undoes whatever of a mount there is; what its serving process had to say. Stopped at any point, it can be run again.
fn take_down(entry: Entry) -> anyhow::Result<String> {
    let devices = LoopDevice::over(&entry.image())?;
    let is_on = |mounted: &Mounted| {
        devices
            .iter()
            .any(|device| device.path() == Path::new(&mounted.source))
    };
    let image_folder = entry.image_folder();
    let is_ours = |mounted: &Mounted| is_on(mounted) || (mounted.is_folders() && mounted.at == entry.dir());
    // The last one mounted is the first to go.
    for mounted in mounts()?.iter().rev().filter(|mounted| is_ours(mounted)) {
        unmount(&mounted.at)?;
    }
    for device in devices {
        device.detach()?;
    }
    let server = entry.server();
    if mounts()?
        .iter()
        .any(|mounted| mounted.is_image() && mounted.at == image_folder)
    {
        unmount(&image_folder)?;
    }
    if let Some(server) = server
        && !server.wait(SERVER_END_MS_MAX)
    {
        // Before it could mount anything, or hung: there is nothing that it could lose.
        server.kill();
        server.wait(SERVER_END_MS_MAX);
    }
    let trouble = entry.log().trim().to_owned();
    entry.remove().map(|()| trouble)
}
