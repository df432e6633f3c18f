//! PostgreSQL on a folder: private socket, no network, as its own user.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::process::{Background, Cmd, Conversation, User, cmd, poll_until, tail};

/// Where Debian keeps the server's programs, one folder for each major version.
const DEBIAN_FOLDER: &str = "/usr/lib/postgresql";
/// How long crash recovery may take.
const START_TIMEOUT: Duration = Duration::from_secs(180);

/// The programs of an installed PostgreSQL and the user to run them as.
#[derive(Clone, Debug)]
pub struct Installation {
    folder: PathBuf,
    user: User,
}

impl Installation {
    /// The newest version installed; `None` if there is none.
    pub fn find() -> Result<Option<Installation>> {
        let Some(user) = User::find("postgres")? else {
            return Ok(None);
        };
        let number = |path: &PathBuf| path.file_name()?.to_str()?.parse::<u32>().ok();
        let versions = std::fs::read_dir(DEBIAN_FOLDER).into_iter().flatten().flatten();
        let mut versions: Vec<PathBuf> = versions.map(|entry| entry.path()).collect();
        versions.retain(|path| number(path).is_some());
        versions.sort_by_key(number);
        // Other systems have the programs in the search path.
        let search = std::env::var_os("PATH").unwrap_or_default();
        let folders = versions
            .iter()
            .rev()
            .map(|path| path.join("bin"))
            .chain(std::env::split_paths(&search));
        let mut fit = folders.filter(|folder| {
            ["postgres", "initdb"]
                .iter()
                .all(|name| folder.join(name).exists())
        });
        Ok(fit.next().map(|folder| Installation { folder, user }))
    }

    /// What the server says of itself, such as `PostgreSQL 15.8`.
    pub fn version(&self) -> Result<String> {
        let text = self.program("postgres").arg("--version").output()?;
        let number = text.split_whitespace().nth(2).context("a version of postgres")?;
        Ok(format!("PostgreSQL {number}"))
    }

    fn program(&self, name: &str) -> Cmd {
        cmd(self.folder.join(name))
            .user(&self.user)
            .current_dir(Path::new("/"))
    }

    /// Makes a cluster in the new folder `data`, with small log segments so that small volumes do.
    pub fn create_cluster(&self, data: &Path) -> Result<()> {
        self.create_cluster_with(data, 1)
    }

    /// The same with log segments of so many MiB; PostgreSQL's own choice is 16.
    pub fn create_cluster_with(&self, data: &Path, wal_segment_mib: u32) -> Result<()> {
        std::fs::create_dir_all(data).with_context(|| format!("make {}", data.display()))?;
        std::os::unix::fs::chown(data, Some(self.user.uid), Some(self.user.gid))
            .context("give it to postgres")?;
        let flags = [
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
            "--username=postgres",
        ];
        self.program("initdb")
            .args(flags)
            .arg(format!("--wal-segsize={wal_segment_mib}"))
            .arg("--pgdata")
            .arg(data)
            .run()?
            .success()
            .map(drop)
    }

    /// Starts a server on `data` and waits until it answers, crash recovery included. `sockets` becomes
    /// the folder of its socket; `settings` are `name=value`.
    pub fn start(&self, data: &Path, sockets: &Path, settings: &[&str], log: &Path) -> Result<Server> {
        std::fs::create_dir_all(sockets).with_context(|| format!("make {}", sockets.display()))?;
        std::os::unix::fs::chown(sockets, Some(self.user.uid), Some(self.user.gid))
            .context("give it to postgres")?;
        // A restored cluster names the server that wrote it, which may live on this very host.
        let _ = std::fs::remove_file(data.join("postmaster.pid"));
        let always = [
            "listen_addresses=".to_owned(),
            format!("unix_socket_directories={}", sockets.display()),
            "shared_buffers=64MB".to_owned(),
            "autovacuum_naptime=5s".to_owned(),
            "dynamic_shared_memory_type=mmap".to_owned(),
        ];
        let settings = always.iter().map(String::as_str).chain(settings.iter().copied());
        let command = settings.fold(
            self.program("postgres").arg("-D").arg(data),
            |command, setting| command.args(["-c", setting]),
        );
        let process = command.spawn(log)?;
        let mut server = Server {
            installation: self.clone(),
            sockets: sockets.to_owned(),
            process,
            log: log.to_owned(),
        };
        server.wait_ready()?;
        Ok(server)
    }
}

/// A running server; shut down when the guard goes.
#[derive(Debug)]
pub struct Server {
    installation: Installation,
    sockets: PathBuf,
    process: Background,
    log: PathBuf,
}

impl Server {
    fn wait_ready(&mut self) -> Result<()> {
        let log = self.log.clone();
        poll_until("PostgreSQL to answer", START_TIMEOUT, || {
            if let Some(code) = self.process.try_code()? {
                anyhow::bail!("postgres ended with code {code}");
            }
            Ok((self.client("psql").args(["-c", "select 1"]).run()?.code == 0).then_some(()))
        })
        .with_context(|| tail(&log, 30))
    }

    /// A client program (`psql`, `pgbench`) told where this server is.
    pub fn client(&self, name: &str) -> Cmd {
        let connection = [
            "-h".as_ref(),
            self.sockets.as_os_str(),
            "-U".as_ref(),
            "postgres".as_ref(),
        ];
        let client = self
            .installation
            .program(name)
            .args(connection)
            .env("PGDATABASE", "postgres");
        if name == "psql" {
            client.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"])
        } else {
            client
        }
    }

    /// Runs SQL; gives its rows, fields separated by `|`.
    pub fn sql(&self, sql: &str) -> Result<Vec<String>> {
        let rows = self.client("psql").args(["-c", sql]).output()?;
        Ok(rows.lines().map(str::to_owned).collect())
    }

    /// A session that is asked and answers.
    pub fn session(&self, log: &Path) -> Result<Conversation> {
        self.client("psql").converse(log)
    }

    /// The file that takes its messages.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Shuts it down: sessions are ended, everything is written.
    pub fn stop(mut self) -> Result<()> {
        let code = self.process.stop(Signal::INT, START_TIMEOUT)?;
        ensure!(
            code == 0,
            "postgres ended with code {code}\n{}",
            tail(&self.log, 30)
        );
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fast, or at once: SIGTERM alone would wait for its clients.
        let _ = self.process.signal(Signal::QUIT);
    }
}
