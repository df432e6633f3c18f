//! A server that was started, and an NBD client of our own that says whatever a test wants.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use crate::program::command;
use crate::store::Store;

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const FLUSH: u16 = 3;
pub(super) const TRIM: u16 = 4;
pub(super) const WRITE_ZEROES: u16 = 6;
pub(super) const BLOCK_STATUS: u16 = 7;

/// How long an answer may take on a loaded machine.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);

/// `cdp-restore nbd`, ready; killed if the test has not ended it.
pub(super) struct Server {
    child: Child,
    temporary: tempfile::TempDir,
    pub(super) socket: PathBuf,
    /// The line that it printed.
    pub(super) uri: String,
}

impl Server {
    /// Serves `pg` at a moment over a socket beside the store.
    pub(super) fn start(store: &Store, when: &str, more: &[&str]) -> Self {
        let socket = store.beside("nbd.sock");
        let listen = format!("unix:{}", socket.display());
        let arguments = ["pg", "--at", when, "--listen", &listen];
        Server::started(store, &[&arguments[..], more].concat(), socket)
    }

    pub(super) fn started(store: &Store, arguments: &[&str], socket: PathBuf) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let mut child = command(store.arguments("nbd", arguments))
            .env("TMPDIR", temporary.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut uri = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut uri).unwrap();
        Server {
            child,
            temporary,
            socket,
            uri: uri.trim().to_owned(),
        }
    }

    pub(super) fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    /// Tells it to stop; how it ended, and all that it said on stderr. Leaves nothing behind in the temporary folder.
    pub(super) fn stop(mut self) -> (ExitStatus, String) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let mut stderr = String::new();
        self.child
            .stderr
            .as_mut()
            .unwrap()
            .read_to_string(&mut stderr)
            .unwrap();
        let ended = self.child.wait().unwrap();
        let left = std::fs::read_dir(self.temporary.path()).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}");
        (ended, stderr)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection after its handshake.
pub(super) struct Client {
    stream: UnixStream,
    structured: bool,
    cookie: u64,
    pub(super) bytes: u64,
    pub(super) flags: u16,
}

/// What a reply held: the error's number (0: none), and the data of a read or the entries of a block status.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) errno: u32,
    pub(super) data: Vec<u8>,
    pub(super) extents: Vec<(u32, u32)>,
    pub(super) chunks: u32,
}

/// An option as a client sends it.
pub(super) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

pub(super) fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

pub(super) fn take<const N: usize>(stream: &mut impl Read) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn u32_of(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

/// The answer to an option: its kind and its data.
pub(super) fn option_answer(stream: &mut impl Read) -> (u32, Vec<u8>) {
    let head: [u8; 20] = take(stream);
    assert_eq!(head[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
    let mut data = vec![0; u32_of(&head[16..]) as usize];
    stream.read_exact(&mut data).unwrap();
    (u32_of(&head[12..]), data)
}

impl Client {
    /// Shakes hands; with `structured`, block status is agreed on as well.
    pub(super) fn new(socket: &Path, structured: bool) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        // A server that hangs fails the test.
        stream.set_read_timeout(Some(ANSWER_TIME_MAX)).unwrap();
        let hello: [u8; 18] = take(&mut stream);
        assert_eq!(hello, *b"NBDMAGICIHAVEOPT\x00\x03");
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        if structured {
            stream.write_all(&option(8, &[])).unwrap();
            assert_eq!(option_answer(&mut stream), (1, vec![]));
            let mut data = b"\0\0\0\0\0\0\0\x01".to_vec();
            data.extend_from_slice(b"\0\0\0\x0fbase:allocation");
            stream.write_all(&option(10, &data)).unwrap();
            assert_eq!(
                option_answer(&mut stream),
                (4, b"\0\0\0\x01base:allocation".to_vec())
            );
            assert_eq!(option_answer(&mut stream).0, 1);
        }
        stream.write_all(&option(7, b"\0\0\0\x02pg\0\0")).unwrap();
        let (kind, info) = option_answer(&mut stream);
        assert_eq!((kind, &info[..2]), (3, &[0, 0][..]));
        assert_eq!(option_answer(&mut stream).0, 1);
        Client {
            stream,
            structured,
            cookie: 0,
            bytes: u64::from_be_bytes(info[2..10].try_into().unwrap()),
            flags: u16::from_be_bytes(info[10..12].try_into().unwrap()),
        }
    }

    /// Sends bytes, and waits for nothing.
    pub(super) fn begin(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next bytes that came.
    pub(super) fn take<const N: usize>(&mut self) -> [u8; N] {
        take(&mut self.stream)
    }

    /// The same, as many as there is room for.
    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        self.stream.read_exact(bytes).unwrap();
    }

    /// Sends a request and waits for its reply.
    pub(super) fn ask(&mut self, flags: u16, command: u16, offset: u64, len: u32, data: &[u8]) -> Reply {
        self.cookie += 1;
        let mut bytes = request(flags, command, self.cookie, offset, len);
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes).unwrap();
        let in_chunks = self.structured && (command == READ || command == BLOCK_STATUS);
        if in_chunks {
            return self.chunks(offset, len);
        }
        let head: [u8; 16] = take(&mut self.stream);
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        assert_eq!(head[8..], self.cookie.to_be_bytes());
        let errno = u32_of(&head[4..]);
        let mut data = Vec::new();
        if command == READ && errno == 0 {
            data = vec![0; len as usize];
            self.stream.read_exact(&mut data).unwrap();
        }
        Reply {
            errno,
            data,
            extents: Vec::new(),
            chunks: 1,
        }
    }

    fn chunks(&mut self, offset: u64, len: u32) -> Reply {
        let mut reply = Reply {
            errno: 0,
            data: vec![0xaa; len as usize],
            extents: Vec::new(),
            chunks: 0,
        };
        loop {
            let head: [u8; 20] = take(&mut self.stream);
            assert_eq!(head[..4], 0x668e_33ef_u32.to_be_bytes());
            assert_eq!(head[8..16], self.cookie.to_be_bytes());
            let mut body = vec![0; u32_of(&head[16..]) as usize];
            self.stream.read_exact(&mut body).unwrap();
            reply.chunks += 1;
            let at = || (u64::from_be_bytes(body[..8].try_into().unwrap()) - offset) as usize;
            match u16::from_be_bytes(head[6..8].try_into().unwrap()) {
                1 => reply.data[at()..][..body.len() - 8].copy_from_slice(&body[8..]),
                2 => reply.data[at()..][..u32_of(&body[8..]) as usize].fill(0),
                5 => {
                    assert_eq!(u32_of(&body), 1, "the number of base:allocation");
                    let entries = body[4..].chunks(8);
                    reply.extents = entries
                        .map(|entry| (u32_of(entry), u32_of(&entry[4..])))
                        .collect();
                }
                kind => {
                    assert_eq!(kind, 0x8001);
                    reply.errno = u32_of(&body);
                }
            }
            if head[5] & 1 == 1 {
                return reply;
            }
        }
    }

    pub(super) fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        let reply = self.ask(0, READ, offset, len, &[]);
        assert_eq!(reply.errno, 0, "read {len} at {offset}");
        reply.data
    }
}
