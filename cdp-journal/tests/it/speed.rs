//! Floors under the speed of the write path and of a full copy, far enough below what is measured that a busy
//! machine does not fail them. `cargo xtask bench` measures.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use cdp_journal::format::{Body, DeltaCache, FrameBuilder, Origin, RecordFlags};
use cdp_journal::store::{StoreReader, StoreWriter, WriterOptions};
use cdp_journal::view::{CopyOptions, Sink};
use cdp_journal::{BootNs, Seq};

use crate::kit::{BOOT, Writer, volume};

struct FileSink(File);

impl Sink for FileSink {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn zero(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Half of it compresses to nothing, half not at all.
fn page(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut page = vec![0; 4096];
    for word in page[..2048].chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    page
}

#[test]
fn the_write_path_and_a_full_copy_are_fast_enough() {
    const BLOCKS: u64 = 65_536;
    const WRITES: u64 = 150_000;
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open_with(dir.path(), &WriterOptions::default());
    writer.declare(BLOCKS * 4096);
    writer.apply();
    let pages: Vec<_> = (0..256).map(page).collect();

    let (mut pushing, mut sealing, mut appending, mut applying) = (0.0, 0.0, 0.0, 0.0);
    let mut number = 0;
    while number < WRITES {
        let started = Instant::now();
        let mut frame = FrameBuilder::new(writer.log.next_seq());
        while frame.fits(4096) && number < WRITES {
            let offset = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % BLOCKS * 4096;
            let body = Body::Write { offset, len: 4096 };
            let data = &pages[(number % 256) as usize];
            let time = BootNs(number + 10_000);
            frame
                .push(
                    time,
                    Some(volume()),
                    Origin::default(),
                    RecordFlags::default(),
                    body,
                    &[data],
                )
                .unwrap();
            number += 1;
        }
        pushing += started.elapsed().as_secs_f64();
        let started = Instant::now();
        let sealed = frame.seal(BOOT, 0).unwrap();
        sealing += started.elapsed().as_secs_f64();
        let started = Instant::now();
        let location = writer.log.append(&sealed).unwrap();
        appending += started.elapsed().as_secs_f64();
        let started = Instant::now();
        writer.index.apply(sealed.bytes(), &location).unwrap();
        applying += started.elapsed().as_secs_f64();
    }
    writer.log.sync().unwrap();
    writer.index.flush().unwrap();
    let mib = WRITES as f64 * 4096.0 / f64::from(1 << 20);
    println!(
        "push {:.0} MiB/s, seal {:.0} MiB/s, append {:.0} MiB/s",
        mib / pushing,
        mib / sealing,
        mib / appending
    );
    let keys_per_s = WRITES as f64 / applying;
    println!("apply {keys_per_s:.0} keys/s");

    let seq = writer.index.applied().unwrap();
    copy(dir.path(), seq, "written at random");
    assert!(keys_per_s > 50_000.0, "{keys_per_s}");

    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open_with(dir.path(), &WriterOptions::default());
    writer.declare(BLOCKS * 4096);
    let unit: Vec<u8> = pages.iter().cycle().take(16).flatten().copied().collect();
    let mut seq = Seq::FIRST;
    for at in 0..BLOCKS / 16 {
        seq = writer.push(
            Body::ReadBack {
                offset: at * 65536,
                len: 65536,
                as_of: None,
            },
            &unit,
        );
    }
    writer.flush();
    copy(dir.path(), seq, "written in order");
    // Opening does not read what was flushed.
    drop(writer);
    let started = Instant::now();
    StoreWriter::open(dir.path(), &WriterOptions::default()).unwrap();
    println!("reopened in {:.3} s", started.elapsed().as_secs_f64());
}

/// Goal: looking for deltas costs little where there are none, and saves where there are. Method: the same blocks three
/// times over: new, with a few bytes changed, with everything changed; without a cache and with one.
#[test]
fn deltas_are_made_fast_enough() {
    const BLOCKS: u64 = 32_768;
    let page_of = |block: u64, round: u64| {
        let mut page = page(block + 1);
        match round {
            0 => {}
            1 => page[2100..2140].fill(7),
            _ => page[..2048].iter_mut().for_each(|byte| *byte = !*byte),
        }
        page
    };
    for cache_bytes in [0, 256 << 20] {
        let mut cache = DeltaCache::new(cache_bytes);
        let mut next = Seq::FIRST;
        for round in 0..3 {
            let (mut seconds, mut stored_bytes) = (0.0, 0);
            for blocks in (0..BLOCKS).collect::<Vec<_>>().chunks(256) {
                let mut frame = FrameBuilder::new(next);
                for block in blocks {
                    let offset = block.wrapping_mul(0x9E37_79B9_7F4A_7C15) % BLOCKS * 4096;
                    let body = Body::Write { offset, len: 4096 };
                    let (origin, flags) = (Origin::default(), RecordFlags::default());
                    let data = page_of(offset / 4096, round);
                    frame
                        .push(BootNs(1), Some(volume()), origin, flags, body, &[&data])
                        .unwrap();
                }
                next = frame.next_seq();
                let started = Instant::now();
                let sealed = frame.seal_with(&mut cache, BOOT, 0).unwrap();
                seconds += started.elapsed().as_secs_f64();
                stored_bytes += sealed.bytes().len() as u64;
            }
            let (mib, share) = (
                BLOCKS as f64 / 256.0,
                stored_bytes as f64 / (BLOCKS * 4096) as f64,
            );
            println!(
                "cache of {} MiB, round {round}: {:.0} MiB/s, {share:.3} of the bytes",
                cache_bytes >> 20,
                mib / seconds
            );
            assert!(mib / seconds > 40.0);
            assert!(cache_bytes == 0 || round != 1 || share < 0.03, "{share}");
        }
    }
}

fn copy(dir: &std::path::Path, seq: Seq, told: &str) {
    let reader = StoreReader::open(dir).unwrap();
    let view = reader.view(volume(), seq).unwrap();
    let target = dir.join("target.img");
    for round in 0..3 {
        let file = File::create(&target).unwrap();
        file.set_len(view.bytes()).unwrap();
        let started = Instant::now();
        let sink = FileSink(file);
        let report = view.copy_to(&sink, &CopyOptions::default(), &|_| ()).unwrap();
        let copied = started.elapsed().as_secs_f64();
        let plain = dir.join("plain.img");
        let _ = std::fs::remove_file(&plain);
        let started = Instant::now();
        assert!(
            std::process::Command::new("cp")
                .arg(&target)
                .arg(&plain)
                .status()
                .unwrap()
                .success()
        );
        let cp = started.elapsed().as_secs_f64();
        println!(
            "{told}, round {round}: {copied:.3} s, cp {cp:.3} s, ratio {:.2}",
            cp / copied
        );
        assert!(report.data_bytes > 0);
        assert!(copied < 60.0);
        std::fs::remove_file(&plain).unwrap();
    }
    std::fs::remove_file(&target).unwrap();
}
