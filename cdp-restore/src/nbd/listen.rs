//! Where clients come in.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;

use super::handshake::{Security, Shaken, agree, greet};
use super::tls::{Credentials, Secured};
use super::transmit::Connection;
use super::{CONNECTIONS_MAX, Export};

/// A client that has not shaken hands by then makes room for others.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(30);
/// For so long nobody is accepted, when there was no descriptor for a client.
const ACCEPT_PAUSE: rustix::time::Timespec = rustix::time::Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// What `--listen` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Listen {
    Unix(PathBuf),
    /// HOST:PORT.
    Tcp(String),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err("give the socket's path after unix:".to_owned());
            }
            return Ok(Listen::Unix(PathBuf::from(path)));
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Listen::Tcp(text.to_owned()))
            }
            _ => Err("give unix:PATH or HOST:PORT".to_owned()),
        }
    }
}

/// A listening socket.
#[derive(Debug)]
pub(crate) struct Server {
    listener: Listener,
    /// With them, clients are served under TLS alone.
    credentials: Option<Credentials>,
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener, SocketFile),
    Tcp(TcpListener, SocketAddr),
}

/// Removes the socket's name when it goes.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A connection, of either kind.
#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Server {
    /// Listens; nobody is served yet.
    pub(crate) fn bind(listen: &Listen, credentials: Option<Credentials>) -> anyhow::Result<Self> {
        let listener = match listen {
            Listen::Unix(path) => bind_unix(path)?,
            Listen::Tcp(address) => bind_tcp(address, credentials.is_some())?,
        };
        let server = Server {
            listener,
            credentials,
        };
        match &server.listener {
            Listener::Unix(listener, _) => listener.set_nonblocking(true)?,
            Listener::Tcp(listener, _) => listener.set_nonblocking(true)?,
        }
        Ok(server)
    }

    /// The address as NBD clients take it.
    pub(crate) fn uri(&self, export: &str) -> String {
        let nbd = if self.credentials.is_some() { "nbds" } else { "nbd" };
        match &self.listener {
            Listener::Unix(_, file) => format!("{nbd}+unix:///{export}?socket={}", Escaped(&file.0)),
            Listener::Tcp(_, address) => format!("{nbd}://{address}/{export}"),
        }
    }

    /// Serves until something comes in on `stop`; then every connection is closed, and all is quiet on return.
    pub(crate) fn serve(self, export: &Export<'_>, stop: BorrowedFd<'_>) -> anyhow::Result<()> {
        let connected = AtomicUsize::new(0);
        thread::scope(|scope| {
            // Kept to close the connection from here; gone with the client.
            let mut streams: Vec<(thread::ScopedJoinHandle<'_, ()>, Stream)> = Vec::new();
            let ended = loop {
                match self.wait(stop) {
                    Ok(true) => break Ok(()),
                    Ok(false) => {}
                    Err(error) => break Err(error).context("wait for clients"),
                }
                streams.retain(|(thread, _)| !thread.is_finished());
                let stream = match self.accept() {
                    Ok(stream) => stream,
                    Err(error) => {
                        // It may have gone already; a want of descriptors passes as others leave.
                        tracing::info!("a client could not be accepted: {error}");
                        if error.kind() != io::ErrorKind::WouldBlock {
                            // It is still waiting, and would be tried without end.
                            let _ = poll(&mut [PollFd::new(&stop, PollFlags::IN)], Some(&ACCEPT_PAUSE));
                        }
                        continue;
                    }
                };
                if connected.load(Ordering::SeqCst) >= CONNECTIONS_MAX {
                    tracing::info!("a client was turned away: {CONNECTIONS_MAX} are connected");
                    continue;
                }
                let Ok(ours) = stream.try_clone() else { continue };
                connected.fetch_add(1, Ordering::SeqCst);
                let (connected, credentials) = (&connected, self.credentials.as_ref());
                let serve = move || {
                    if let Err(error) = converse(&stream, export, credentials) {
                        tracing::info!("a client was left: {error}");
                    }
                    connected.fetch_sub(1, Ordering::SeqCst);
                };
                match thread::Builder::new()
                    .name("nbd".to_owned())
                    .spawn_scoped(scope, serve)
                {
                    Ok(thread) => streams.push((thread, ours)),
                    Err(error) => {
                        connected.fetch_sub(1, Ordering::SeqCst);
                        tracing::info!("no thread for a client: {error}");
                    }
                }
            };
            for (_, stream) in &streams {
                stream.shutdown();
            }
            ended
        })
    }

    /// Waits for a client, or (`true`) for the end.
    fn wait(&self, stop: BorrowedFd<'_>) -> io::Result<bool> {
        let listener = match &self.listener {
            Listener::Unix(listener, _) => listener.as_fd(),
            Listener::Tcp(listener, _) => listener.as_fd(),
        };
        let mut fds = [
            PollFd::new(&stop, PollFlags::IN),
            PollFd::new(&listener, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => Ok(!fds[0].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        let stream = match &self.listener {
            Listener::Unix(listener, _) => Stream::Unix(listener.accept()?.0),
            Listener::Tcp(listener, _) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
        };
        Ok(stream)
    }
}

/// Shakes hands and serves one client.
fn converse(stream: &Stream, export: &Export<'_>, credentials: Option<&Credentials>) -> io::Result<()> {
    let until = Instant::now() + HANDSHAKE_TIME_MAX;
    let mut hurried = Hurried {
        stream,
        until: Some(until),
    };
    let zeroes = greet(&mut &hurried)?;
    let security = match credentials {
        Some(_) => Security::Required,
        None => Security::Plain,
    };
    match (agree(&mut &hurried, export, zeroes, security)?, credentials) {
        (Shaken::Agreed(agreed), _) => {
            hurried.set_unhurried()?;
            Connection::new(export, agreed, stream, stream).serve();
        }
        (Shaken::StartTls, Some(credentials)) => {
            let mut secured = Secured::accept(credentials, hurried)?;
            let shaken = agree(&mut &secured, export, zeroes, Security::Established)?;
            if let Shaken::Agreed(agreed) = shaken {
                secured.set_unhurried()?;
                let secured = &secured;
                Connection::new(export, agreed, secured, secured).serve();
            }
        }
        (Shaken::StartTls, None) | (Shaken::Left, _) => {}
    }
    // The other handle of it, which is kept to end it from outside, must not keep the client waiting.
    stream.shutdown();
    Ok(())
}

fn bind_unix(path: &Path) -> anyhow::Result<Listener> {
    if let Ok(metadata) = fs::symlink_metadata(path) {
        // Left behind by a server that was killed: nobody answers.
        let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        let is_stale = metadata.file_type().is_socket() && UnixStream::connect(path).is_err_and(refused);
        if !is_stale {
            bail!("{} is there already; give another path", path.display());
        }
        fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
    }
    // Before any thread is started; the socket is ours alone from its first moment.
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = bound.with_context(|| format!("listen at {}", path.display()))?;
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    Ok(Listener::Unix(listener, SocketFile(path)))
}

fn bind_tcp(address: &str, is_secured: bool) -> anyhow::Result<Listener> {
    let addresses: Vec<SocketAddr> = address
        .to_socket_addrs()
        .with_context(|| format!("look up {address}"))?
        .collect();
    let open = addresses.iter().find(|address| !address.ip().is_loopback());
    if let Some(open) = open.filter(|_| !is_secured) {
        bail!(
            "{address} is {open}, which others can reach; give --tls-certificates DIR, or listen on unix:PATH or on \
             127.0.0.1"
        );
    }
    let listener = TcpListener::bind(&addresses[..]).with_context(|| format!("listen at {address}"))?;
    let address = listener.local_addr()?;
    Ok(Listener::Tcp(listener, address))
}

impl Stream {
    fn try_clone(&self) -> io::Result<Stream> {
        match self {
            Stream::Unix(stream) => stream.try_clone().map(Stream::Unix),
            Stream::Tcp(stream) => stream.try_clone().map(Stream::Tcp),
        }
    }

    /// Ends both directions; fails only if they have ended.
    fn shutdown(&self) {
        let _ = match self {
            Stream::Unix(stream) => stream.shutdown(Shutdown::Both),
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    fn set_timeouts(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => {
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
            Stream::Tcp(stream) => {
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&mut &*stream).read(buf),
            Stream::Tcp(stream) => (&mut &*stream).read(buf),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&mut &*stream).write(bytes),
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection that ends at a time, also if something comes every now and then.
pub(super) struct Hurried<'a> {
    stream: &'a Stream,
    until: Option<Instant>,
}

impl<'a> Hurried<'a> {
    /// From now on it may take its time.
    pub(super) fn set_unhurried(&mut self) -> io::Result<()> {
        self.until = None;
        self.stream.set_timeouts(None)
    }

    fn in_time(&self) -> io::Result<&'a Stream> {
        let Some(until) = self.until else {
            return Ok(self.stream);
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_timeouts(Some(left))?;
        Ok(self.stream)
    }
}

impl Read for &Hurried<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Read::read(&mut self.in_time()?, buf)
    }
}

impl Write for &Hurried<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Write::write(&mut self.in_time()?, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A path in a URI.
struct Escaped<'a>(&'a Path);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.as_os_str().as_encoded_bytes() {
            if byte.is_ascii_alphanumeric() || b"/._-~".contains(byte) {
                write!(f, "{}", char::from(*byte))?;
            } else {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_is_a_socket_file_or_a_host_with_a_port() {
        assert_eq!("unix:/run/x.sock".parse(), Ok(Listen::Unix("/run/x.sock".into())));
        assert_eq!(
            "127.0.0.1:10809".parse(),
            Ok(Listen::Tcp("127.0.0.1:10809".to_owned()))
        );
        for wrong in ["unix:", "/run/x.sock", "10809", ":10809", "host:port"] {
            assert!(wrong.parse::<Listen>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_handshake_has_an_end_however_slowly_it_goes_on() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"ab").unwrap();
        let stream = Stream::Unix(ours);
        let mut hurried = Hurried {
            stream: &stream,
            until: Some(Instant::now() + HANDSHAKE_TIME_MAX),
        };
        let mut byte = [0];
        (&hurried).read_exact(&mut byte).unwrap();
        hurried.until = Some(Instant::now());
        let error = (&hurried).read_exact(&mut byte).unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::TimedOut,
            "though there is something to read"
        );
    }

    #[test]
    fn a_path_in_a_uri_is_escaped() {
        assert_eq!(
            Escaped(Path::new("/a b/c&d.sock")).to_string(),
            "/a%20b/c%26d.sock"
        );
    }
}
