//! A server and its clients over loopback, each with folders of its own.

mod follow;
mod hostile;
mod offers;
mod remote;
mod ship;
mod trust;

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;
use uuid::Uuid;

use super::{Offers, ServeOptions, Server};
use crate::format::{Body, DeltaCache, FrameBuilder, Origin, RecordFlags, VolumeKind};
use crate::index::IndexWriter;
use crate::log::LogWriter;
use crate::net::{DurableLog, Shipper, Throttle};
use crate::ship::LogTail;
use crate::site::{AgentName, Site};
use crate::store::{StoreWriter, WriterOptions};
use crate::trust::{Authority, Grants, Token, TokenGrant};
use crate::types::{BootNs, Seq, UNIT_BYTES, VolumeId, WallNs};
use crate::wire::Right;

/// How long anything here may take on a loaded machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `done`; panics with `what` if that does not come.
pub(super) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !done() {
        assert!(
            std::time::Instant::now() < deadline,
            "not within {PATIENCE:?}: {what}"
        );
        std::thread::yield_now();
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// A server in threads of this process.
pub(super) struct Running {
    pub(super) address: SocketAddr,
    site: PathBuf,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    kill: Arc<Mutex<Option<tokio::sync::oneshot::Sender<()>>>>,
}

impl Running {
    pub(super) fn start(dir: &Path, listen: Option<SocketAddr>) -> Self {
        Self::start_with(dir, listen, WriterOptions::default())
    }

    pub(super) fn start_with(dir: &Path, listen: Option<SocketAddr>, writer: WriterOptions) -> Self {
        Self::start_on(Self::runtime(), dir, listen, writer)
    }

    pub(super) fn start_offered(dir: &Path, listen: Option<SocketAddr>, offers: Offers) -> Self {
        let options = ServeOptions {
            offers,
            ..Self::options(dir, listen)
        };
        Self::serve(Self::runtime(), options)
    }

    fn options(dir: &Path, listen: Option<SocketAddr>) -> ServeOptions {
        ServeOptions {
            store: dir.to_owned(),
            listen: listen.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap()),
            writer: WriterOptions::default(),
            upstream: None,
            offers: Offers::Own,
        }
    }

    pub(super) fn runtime() -> tokio::runtime::Runtime {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(2).enable_all().build().unwrap()
    }

    pub(super) fn start_on(
        runtime: tokio::runtime::Runtime,
        dir: &Path,
        listen: Option<SocketAddr>,
        writer: WriterOptions,
    ) -> Self {
        let options = ServeOptions {
            writer,
            ..Self::options(dir, listen)
        };
        Self::serve(runtime, options)
    }

    pub(super) fn serve(runtime: tokio::runtime::Runtime, options: ServeOptions) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (kill, killed) = tokio::sync::oneshot::channel();
        let (started, address) = std::sync::mpsc::channel();
        let site = options.store.clone();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let server = Server::start(&options).unwrap();
                started.send(server.address().unwrap()).unwrap();
                tokio::select! {
                    () = server.run(stopped) => {}
                    _ = killed => {}
                }
            });
        });
        Self {
            address: address.recv_timeout(PATIENCE).unwrap(),
            site,
            stop,
            thread: Some(thread),
            kill: Arc::new(Mutex::new(Some(kill))),
        }
    }

    /// Ends as asked.
    pub(super) fn stop(mut self) {
        self.stop.send(true).unwrap();
        self.thread.take().unwrap().join().unwrap();
        self.wait_gone();
    }

    /// Ends without a word to anybody.
    pub(super) fn kill(mut self) {
        let _ = self.kill.lock().take().unwrap().send(());
        self.thread.take().unwrap().join().unwrap();
        self.wait_gone();
    }

    /// Threads of a server that ends with its process may hold its socket, and its folder, for a moment longer than its
    /// runtime.
    fn wait_gone(&self) {
        wait_until("the address to be free", || UdpSocket::bind(self.address).is_ok());
        wait_until("the folder to be free", || super::units::are_free(&self.site));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
            if !std::thread::panicking() {
                self.wait_gone();
            }
        }
    }
}

/// What is durable of a log.
#[derive(Default)]
pub(super) struct Durable {
    seq: Mutex<Option<Seq>>,
    bytes: AtomicU64,
    changed: Condvar,
}

impl DurableLog for Durable {
    fn wait_durable_beyond(&self, beyond: Option<Seq>, timeout: Duration) -> Option<Seq> {
        let mut seq = self.seq.lock();
        if *seq <= beyond && !timeout.is_zero() {
            self.changed.wait_for(&mut seq, timeout);
        }
        *seq
    }

    fn log_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// Bytes that compress to nothing, the same for each seed.
fn noise(seed: u64) -> impl FnMut() -> u8 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    }
}

/// In a frame that [`Source::read_back`] makes.
pub(super) const UNITS_PER_FRAME: u64 = 8;

/// An agent's log, without an agent.
pub(super) struct Source {
    pub(super) dir: PathBuf,
    log: LogWriter,
    _index: IndexWriter,
    pub(super) durable: Arc<Durable>,
    boot_ns: u64,
    /// What to add to its times for those of the wall.
    wall_offset_ns: i64,
    cache: DeltaCache,
}

impl Source {
    pub(super) fn open(dir: &Path) -> Self {
        let options = WriterOptions {
            segment_bytes_max: 256 << 10,
            ..WriterOptions::default()
        };
        let (store, recovered) = StoreWriter::open(dir, &options).unwrap();
        let (log, index) = store.split();
        let durable = Arc::new(Durable::default());
        *durable.seq.lock() = recovered.last_seq;
        let mut source = Self {
            dir: dir.to_owned(),
            log,
            _index: index,
            durable,
            boot_ns: 0,
            wall_offset_ns: 0,
            cache: DeltaCache::new(8 << 20),
        };
        if recovered.created {
            source.frame(&[(
                Body::Volume {
                    kind: VolumeKind::Block,
                    bytes: 64 << 20,
                    name: "pg".to_owned(),
                    path: "/dev/vdb".to_owned(),
                },
                &[],
            )]);
        }
        source
    }

    /// Appends one frame and makes it durable.
    fn frame(&mut self, records: &[(Body, &[u8])]) {
        let mut frame = FrameBuilder::new(self.log.next_seq());
        for (body, data) in records {
            self.boot_ns += 1000;
            let (at, volume) = (BootNs(self.boot_ns), VolumeId::new(1));
            let (origin, flags) = (Origin::default(), RecordFlags::default());
            frame
                .push(at, volume, origin, flags, body.clone(), &[data])
                .unwrap();
        }
        let frame = frame
            .seal_with(&mut self.cache, Uuid::from_u128(8), self.wall_offset_ns)
            .unwrap();
        self.log.append(&frame).unwrap();
        self.durable.bytes.store(self.log.log_bytes(), Ordering::Relaxed);
        *self.durable.seq.lock() = self.log.sync().unwrap();
        self.durable.changed.notify_all();
    }

    /// Writes `count` frames that no other `salt` has.
    pub(super) fn write(&mut self, count: u64, salt: u64) {
        self.write_edited(count, salt, 0);
    }

    /// Writes what [`Source::write`] did, in the same places, with `edit` bytes of each block changed: as deltas.
    pub(super) fn write_edited(&mut self, count: u64, salt: u64, edit: u8) {
        for number in 0..count {
            let mut next = noise(salt << 32 | number);
            let mut data: Vec<u8> = (0..16384).map(|_| next()).collect();
            for block in data.chunks_mut(4096) {
                block[1000..1000 + usize::from(edit)].fill(edit);
            }
            let offset = (salt * 31 + number * 4) % 4000 * 4096;
            let len = data.len() as u64;
            self.frame(&[(Body::Write { offset, len }, &data), (Body::Tick, &[])]);
        }
    }

    /// Reads back `frames` frames of whole units, whose content no other `salt` has.
    pub(super) fn read_back(&mut self, frames: u64, salt: u64) {
        for number in 0..frames {
            let units = number * UNITS_PER_FRAME..(number + 1) * UNITS_PER_FRAME;
            let units: Vec<_> = units
                .map(|unit| {
                    let mut noise = noise(salt << 32 | unit);
                    let data: Vec<u8> = (0..UNIT_BYTES).map(|_| noise()).collect();
                    let body = Body::ReadBack {
                        offset: unit * UNIT_BYTES,
                        len: UNIT_BYTES,
                        as_of: None,
                    };
                    (body, data)
                })
                .collect();
            let records: Vec<_> = units
                .iter()
                .map(|(body, data)| (body.clone(), &data[..]))
                .collect();
            self.frame(&records);
        }
    }

    /// The same, written at this time.
    pub(super) fn write_now(&mut self, count: u64, salt: u64) {
        self.wall_offset_ns = WallNs::now().0 - self.boot_ns as i64;
        self.write(count, salt);
    }

    /// Asserts that the server whose folder is `site` holds the very frames of this log.
    pub(super) fn assert_copied(&self, site: &Path) {
        let site = Site::open(site).unwrap().unwrap();
        let copies = site.logs_of(&name("web01")).unwrap();
        assert_eq!(copies.len(), 1, "{copies:?}");
        self.assert_same_as(&copies[0].dir);
    }

    /// Asserts that the store in `copy` holds the very frames of this log.
    pub(super) fn assert_same_as(&self, copy: &Path) {
        let (here, there) = (self.frames_in(&self.dir), self.frames_in(copy));
        let lasts = |frames: &[(Option<Seq>, Seq, Vec<u8>)]| frames.last().map(|frame| frame.1);
        assert_eq!(lasts(&there), lasts(&here));
        assert!(here == there, "the copy has other frames");
    }

    /// Each frame of the store in `dir`, with the record before it and its last one.
    fn frames_in(&self, dir: &Path) -> Vec<(Option<Seq>, Seq, Vec<u8>)> {
        let mut tail = LogTail::open(dir).unwrap();
        let mut frames = Vec::new();
        while let Some(frame) = tail.next(self.last()).unwrap() {
            frames.push((frame.previous, frame.last, frame.bytes));
        }
        frames
    }

    /// Bytes of all frames.
    pub(super) fn frame_bytes(&self) -> u64 {
        let frames = self.frames_in(&self.dir);
        frames.iter().map(|frame| frame.2.len() as u64).sum()
    }

    pub(super) fn last(&self) -> Option<Seq> {
        *self.durable.seq.lock()
    }

    pub(super) fn ship(&self, server: &str, identity: &Path) -> Shipper {
        self.ship_at(server, identity, &Arc::default())
    }

    /// As fast as `throttle` allows.
    pub(super) fn ship_at(&self, server: &str, identity: &Path, throttle: &Arc<Throttle>) -> Shipper {
        let log: Arc<dyn DurableLog> = Arc::clone(&self.durable) as _;
        Shipper::start(&self.dir, server, identity, log, Arc::clone(throttle)).unwrap()
    }
}

/// A server with an enrolled agent, and the agent's log.
pub(super) struct Kit {
    pub(super) dir: tempfile::TempDir,
    pub(super) server: Option<Running>,
    pub(super) address: SocketAddr,
    pub(super) source: Source,
}

pub(super) fn name(name: &str) -> AgentName {
    name.parse().unwrap()
}

/// A token of the server whose folder is `site`.
pub(super) fn token_of(site: &Path, agent: &str, right: Right, valid: Duration) -> Token {
    let grants = Grants::open(site).unwrap();
    let authority = Authority::open(grants.dir()).unwrap().unwrap();
    let grant = TokenGrant {
        agent: name(agent),
        right,
        valid_seconds: valid.as_secs(),
        expires_ns: WallNs::now().saturating_add(PATIENCE).0,
    };
    grants.issue(&authority, &grant).unwrap()
}

impl Kit {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = Running::start(&dir.path().join("site"), None);
        let kit = Self {
            address: server.address,
            server: Some(server),
            source: Source::open(&dir.path().join("agent")),
            dir,
        };
        kit.enroll("web01", Right::Append, &kit.identity());
        kit
    }

    pub(super) fn site(&self) -> PathBuf {
        self.dir.path().join("site")
    }

    pub(super) fn identity(&self) -> PathBuf {
        self.dir.path().join("identity")
    }

    pub(super) fn token(&self, agent: &str, right: Right, valid: Duration) -> Token {
        token_of(&self.site(), agent, right, valid)
    }

    pub(super) fn enroll(&self, agent: &str, right: Right, identity: &Path) {
        let token = self.token(agent, right, Duration::from_secs(3600));
        crate::net::enroll(&self.address.to_string(), &token, right, identity).unwrap();
    }

    pub(super) fn ship(&self) -> Shipper {
        self.source.ship(&self.address.to_string(), &self.identity())
    }

    /// Ships, and waits until all is there.
    pub(super) fn shipped(&self) -> Shipper {
        let shipper = self.ship();
        let is_there = shipper.wait_acked(self.source.last(), PATIENCE);
        assert!(is_there, "{:?}", shipper.status());
        shipper
    }

    /// Stops the server if it runs, and starts it where it was.
    pub(super) fn restart(&mut self) {
        drop(self.server.take());
        self.server = Some(Running::start(&self.site(), Some(self.address)));
    }

    /// Stops the server, and starts it where it was with these offers; all that it took in is noted then.
    pub(super) fn restart_offered(&mut self, offers: Offers) {
        drop(self.server.take());
        self.server = Some(Running::start_offered(&self.site(), Some(self.address), offers));
    }

    /// Asserts that the server holds the very frames of the agent's log.
    pub(super) fn assert_same(&self) {
        self.source.assert_copied(&self.site());
    }
}
