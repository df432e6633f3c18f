//! Stores made record by record, at times that the test chooses.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cdp_journal::format::{Body, FrameBuilder, GapCause, Origin, RecordFlags, VolumeKind};
use cdp_journal::index::IndexWriter;
use cdp_journal::log::LogWriter;
use cdp_journal::store::{StoreWriter, WriterOptions};
use cdp_journal::{BootNs, OpenError, Seq, VolumeId, WallNs};
use tempfile::TempDir;
use uuid::Uuid;

use crate::program::{Ran, run};

/// The volume's first size.
pub(crate) const VOLUME_BYTES: u64 = 1 << 20;
/// Its size after the resize.
pub(crate) const RESIZED_BYTES: u64 = 2 << 20;
/// What one write writes.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// How long a store may stay locked by who has let go of it.
const LOCK_TIME_MAX: Duration = Duration::from_secs(30);

/// Second 0 of every store: 2026-01-02T03:04:05Z, long past.
const BASE_NS: i64 = 1_767_323_045_000_000_000;

/// A moment, so many milliseconds after second 0, as `--at` takes it.
pub(crate) fn time(milliseconds: i64) -> String {
    wall(milliseconds).to_string()
}

fn wall(milliseconds: i64) -> WallNs {
    WallNs(BASE_NS + milliseconds * 1_000_000)
}

/// A volume's number.
pub(crate) fn volume(number: u16) -> VolumeId {
    VolumeId::new(number).unwrap()
}

/// 4 KiB that no compression makes smaller, different for each seed.
pub(crate) fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..BLOCK_BYTES / 8).flat_map(|_| next()).collect()
}

/// A store that is being written to.
pub(crate) struct Writing {
    log: LogWriter,
    index: IndexWriter,
}

impl Writing {
    /// Opens the store in `folder`, or makes it.
    pub(crate) fn open(folder: &Path) -> Self {
        let started = Instant::now();
        let writer = loop {
            match StoreWriter::open(folder, &WriterOptions::default()) {
                // A child that another test is starting holds every descriptor of ours until its program begins.
                Err(OpenError::Locked { .. }) if started.elapsed() < LOCK_TIME_MAX => {
                    std::thread::yield_now()
                }
                opened => break opened.unwrap().0,
            }
        };
        let (log, index) = writer.split();
        Writing { log, index }
    }

    /// Appends one durable record, so many milliseconds after second 0.
    pub(crate) fn add(&mut self, milliseconds: i64, on: Option<VolumeId>, body: Body, data: &[u8]) -> Seq {
        self.add_at(wall(milliseconds), on, body, data)
    }

    /// The same at any time.
    pub(crate) fn add_at(&mut self, at: WallNs, on: Option<VolumeId>, body: Body, data: &[u8]) -> Seq {
        let boot_ns = BootNs(u64::try_from(at.0).unwrap());
        let origin = Origin {
            pid: 4321,
            comm: *b"postgres\0\0\0\0\0\0\0\0",
        };
        let mut frame = FrameBuilder::new(self.log.next_seq());
        let seq = frame
            .push(boot_ns, on, origin, RecordFlags::default(), body, &[data])
            .unwrap();
        let frame = frame.seal(Uuid::from_u128(7), 0).unwrap();
        let location = self.log.append(&frame).unwrap();
        self.log.sync().unwrap();
        self.index.apply(frame.bytes(), &location).unwrap();
        seq
    }

    /// Writes `data` at `offset` of volume 1.
    pub(crate) fn write(&mut self, milliseconds: i64, offset: u64, data: &[u8]) -> Seq {
        let body = Body::Write {
            offset,
            len: data.len() as u64,
        };
        self.add(milliseconds, Some(volume(1)), body, data)
    }

    /// Starts a store with volume 1, `pg`, declared as lying at `path`: records 1 and 2.
    pub(crate) fn begin(&mut self, bytes: u64, path: &str) {
        self.add(
            0,
            None,
            Body::Start {
                agent: Uuid::from_u128(1),
                boot_id: Uuid::from_u128(7),
            },
            &[],
        );
        let declared = Body::Volume {
            kind: VolumeKind::Block,
            bytes,
            name: "pg".to_owned(),
            path: path.to_owned(),
        };
        self.add(0, Some(volume(1)), declared, &[]);
    }

    /// Ends it so that readers have nothing to replay.
    pub(crate) fn close(mut self) {
        self.index.flush().unwrap();
    }
}

/// A store of a known history in a folder of its own.
///
/// | seq | second | what                                                     |
/// |----:|-------:|----------------------------------------------------------|
/// |   1 |      0 | start                                                    |
/// |   2 |      0 | volume `pg`, 1 MiB                                       |
/// |   3 |      1 | read-back: block 9 holds noise(9) before everything      |
/// |   4 |      2 | gap closed: exact from here                              |
/// |   5 |      3 | write noise(5) to block 0                                |
/// |   6 |      4 | write noise(6) to block 1                                |
/// |   7 |      5 | bookmark `before-upgrade`                                |
/// |   8 |      6 | discard block 0                                          |
/// |   9 |      7 | tick                                                     |
/// |  10 |      8 | gap `ring-overflow`, exact up to 9                       |
/// |  11 |      9 | read-back: block 3 holds noise(11) as of 10              |
/// |  12 |     10 | gap closed                                               |
/// |  13 |     11 | write noise(13) to block 1                               |
/// |  14 |     12 | resized to 2 MiB                                         |
/// |  15 |     13 | stop                                                     |
pub(crate) struct Store {
    folder: TempDir,
}

impl Store {
    /// The store of the table above.
    pub(crate) fn known() -> Self {
        let store = Store::empty();
        let mut writing = Writing::open(&store.path());
        writing.begin(VOLUME_BYTES, "/dev/no-such-device");
        let pg = Some(volume(1));
        let block = BLOCK_BYTES as u64;
        let read_back = |number: u64, as_of| Body::ReadBack {
            offset: number * block,
            len: block,
            as_of,
        };
        writing.add(1000, pg, read_back(9, None), &noise(9));
        writing.add(2000, pg, Body::GapClose, &[]);
        writing.write(3000, 0, &noise(5));
        writing.write(4000, block, &noise(6));
        writing.add(
            5000,
            None,
            Body::Bookmark {
                label: "before-upgrade".to_owned(),
            },
            &[],
        );
        writing.add(
            6000,
            pg,
            Body::Discard {
                offset: 0,
                len: block,
            },
            &[],
        );
        writing.add(7000, None, Body::Tick, &[]);
        let open = Body::GapOpen {
            cause: GapCause::RingOverflow,
            last_exact: Seq::new(9),
        };
        writing.add(8000, pg, open, &[]);
        writing.add(9000, pg, read_back(3, Seq::new(10)), &noise(11));
        writing.add(10_000, pg, Body::GapClose, &[]);
        writing.write(11_000, block, &noise(13));
        writing.add(12_000, pg, Body::Resize { bytes: RESIZED_BYTES }, &[]);
        let last = writing.add(13_000, None, Body::Stop, &[]);
        assert_eq!(last.get(), 15, "the table above is what was written");
        writing.close();
        store
    }

    /// A folder with no store in it yet.
    pub(crate) fn empty() -> Self {
        Store {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// A store of `blocks` blocks of noise, written at once after an empty beginning.
    pub(crate) fn noisy(blocks: u64, path: &str) -> Self {
        let store = Store::empty();
        let mut writing = Writing::open(&store.path());
        writing.begin(blocks * BLOCK_BYTES as u64, path);
        writing.add(1000, Some(volume(1)), Body::GapClose, &[]);
        for number in 0..blocks {
            writing.write(2000, number * BLOCK_BYTES as u64, &noise(number + 100));
        }
        writing.close();
        store
    }

    /// The store's folder.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// A place beside the store for what a test writes.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `cdp-restore COMMAND --from STORE ARGUMENTS…`.
    pub(crate) fn run(&self, command: &str, arguments: &[&str]) -> Ran {
        run(self.arguments(command, arguments))
    }

    /// The arguments of that.
    pub(crate) fn arguments(&self, command: &str, arguments: &[&str]) -> Vec<String> {
        let path = self.path();
        let words = [command, "--from", path.to_str().unwrap()];
        words
            .iter()
            .chain(arguments)
            .map(|word| (*word).to_owned())
            .collect()
    }

    /// Runs `image` of `pg` at a moment to a file beside the store; what it holds, if the run succeeds.
    pub(crate) fn image(&self, when: &str) -> Result<Vec<u8>, Ran> {
        let target = self.beside("disk.img");
        let ran = self.run("image", &["pg", "--at", when, "--to", target.to_str().unwrap()]);
        if ran.code == 0 {
            Ok(std::fs::read(&target).unwrap())
        } else {
            Err(ran)
        }
    }

    /// The store's only segment.
    pub(crate) fn segment(&self) -> PathBuf {
        let mut entries = std::fs::read_dir(self.path().join("log")).unwrap();
        let path = entries.next().unwrap().unwrap().path();
        assert!(entries.next().is_none(), "more than one segment");
        path
    }
}

/// What `pg` of [`Store::known`] held after record `seq`.
pub(crate) fn known_image(seq: u64) -> Vec<u8> {
    let mut image = vec![0; if seq >= 14 { RESIZED_BYTES } else { VOLUME_BYTES } as usize];
    let mut put = |number: usize, data: &[u8]| {
        image[number * BLOCK_BYTES..(number + 1) * BLOCK_BYTES].copy_from_slice(data);
    };
    put(9, &noise(9));
    if (5..8).contains(&seq) {
        put(0, &noise(5));
    }
    match seq {
        6..13 => put(1, &noise(6)),
        13.. => put(1, &noise(13)),
        _ => {}
    }
    if seq > 9 {
        put(3, &noise(11));
    }
    image
}
