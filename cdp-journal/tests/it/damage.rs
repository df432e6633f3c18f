//! Goal: a damaged byte is detected and named, never returned. Method: change bytes all over a segment, one at a
//! time, and read every moment.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use cdp_journal::format::FORMAT;
use cdp_journal::store::{StoreReader, StoreWriter, WriterOptions};
use cdp_journal::view::{CopyError, CopyOptions};
use cdp_journal::{OpenError, ReadError, Seq};

use crate::kit::{MemorySink, Writer, bytes_of, volume};

const VOLUME_BYTES: usize = 1 << 20;

/// A store with an index or without one, the images it must show, and its only segment.
fn store(dir: &std::path::Path, indexed: bool) -> (Vec<(Seq, Vec<u8>)>, PathBuf) {
    let mut writer = Writer::open(dir);
    writer.declare(VOLUME_BYTES as u64);
    let mut image = vec![0; VOLUME_BYTES];
    let mut images = Vec::new();
    for number in 1..=6u64 {
        for part in 0..3u64 {
            let (offset, len) = (
                ((number * 7 + part * 31) % 200) as usize * 4096,
                512 * (1 + 30 * part) as usize,
            );
            let bytes = bytes_of(number * 10 + part, len);
            image[offset..offset + len].copy_from_slice(&bytes);
            let seq = writer.write(offset as u64, &bytes);
            images.push((seq, image.clone()));
        }
        writer.apply();
    }
    writer.flush();
    drop(writer);
    if !indexed {
        std::fs::remove_dir_all(dir.join("index")).unwrap();
    }
    (images, dir.join("log/00000000000000000001.seg"))
}

/// Goal: a log that lost its end is told where the index knows better. Method: cut it at every frame, and remove it.
#[test]
fn a_lost_end_that_the_index_knows_of_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    let (_, segment) = store(dir.path(), true);
    let whole = std::fs::read(&segment).unwrap();
    for len in (64..whole.len()).step_by(997).chain([0]) {
        std::fs::write(&segment, &whole[..len]).unwrap();
        let reader = StoreReader::open(dir.path()).unwrap();
        let report = reader.verify_log(&mut |_| {}).unwrap();
        assert!(!report.damages.is_empty(), "cut at {len}");
    }
    std::fs::remove_file(&segment).unwrap();
    let reader = StoreReader::open(dir.path()).unwrap();
    assert_eq!(reader.verify_log(&mut |_| {}).unwrap().damages.len(), 1);
    std::fs::write(&segment, &whole).unwrap();
    let reader = StoreReader::open(dir.path()).unwrap();
    assert_eq!(reader.verify_log(&mut |_| {}).unwrap().damages, []);
}

#[test]
fn a_damaged_byte_anywhere_is_named_and_never_returned() {
    for indexed in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (images, segment) = store(dir.path(), indexed);
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&segment)
            .unwrap();
        let len = file.metadata().unwrap().len();
        let (mut seen, mut refused) = (0, 0);
        for at in (0..len).step_by(97) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x41], at).unwrap();
            match StoreReader::open(dir.path()) {
                Err(error) => {
                    assert!(error.is_damage(), "byte {at}: {error}");
                    refused += 1;
                }
                Ok(reader) => seen += read_everything(&reader, &images, at, &segment),
            }
            file.write_all_at(&byte, at).unwrap();
        }
        assert!(seen > 0, "indexed {indexed}: no damage was seen");
        assert_eq!(indexed, refused == 0, "an index spares the reader the log");
        let reader = StoreReader::open(dir.path()).unwrap();
        assert_eq!(
            read_everything(&reader, &images, 0, &segment),
            0,
            "all is well again"
        );
    }
}

/// Returns how many moments could not be read for damage; the rest must be right.
fn read_everything(
    reader: &StoreReader,
    images: &[(Seq, Vec<u8>)],
    at: u64,
    segment: &std::path::Path,
) -> usize {
    let mut damaged = 0;
    let head = reader.head().map(|head| head.seq);
    for (seq, image) in images.iter().filter(|(seq, _)| Some(*seq) <= head) {
        let view = match reader.view(volume(), *seq) {
            Ok(view) => view,
            Err(error) => panic!("byte {at}: {error}"),
        };
        let mut found = vec![0; image.len()];
        match view.read_at(0, &mut found) {
            Ok(()) => assert!(
                found == *image,
                "byte {at} is damaged and seq {seq} is read wrong"
            ),
            Err(ReadError::Damaged {
                path, offset, seqs, ..
            }) => {
                damaged += 1;
                assert_eq!(path, segment);
                assert!(
                    offset <= at && at < offset + 70_000,
                    "byte {at} is damaged, {offset} is named"
                );
                let (first, last) = seqs.expect("the frame is known");
                assert!(
                    first <= last && first <= *seq,
                    "byte {at}: seqs {first} to {last}, read at {seq}"
                );
                let sink = MemorySink::default();
                let copied = view.copy_to(&sink, &CopyOptions::default(), &|_| ());
                assert!(
                    matches!(copied, Err(CopyError::Read(ReadError::Damaged { .. }))),
                    "{copied:?}"
                );
            }
            Err(error) => panic!("byte {at}: {error}"),
        }
    }
    damaged
}

#[test]
fn verify_names_every_damage() {
    let dir = tempfile::tempdir().unwrap();
    let (_, segment) = store(dir.path(), true);
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&segment)
        .unwrap();
    let len = file.metadata().unwrap().len();
    let reader = StoreReader::open(dir.path()).unwrap();
    let mut read = 0;
    let report = reader.verify_log(&mut |bytes| read += bytes).unwrap();
    assert_eq!(
        (
            report.damages.len(),
            report.segments,
            report.frames,
            report.records
        ),
        (0, 1, 6, 20)
    );
    assert_eq!((report.bytes, read), (len, len - 64));
    for at in (0..len).step_by(89) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x41], at).unwrap();
        let report = reader.verify_log(&mut |_| ()).unwrap();
        assert_eq!(report.damages.len(), 1, "byte {at}");
        let damage = &report.damages[0];
        assert!(
            damage.offset <= at && at < damage.offset + damage.bytes,
            "byte {at}: {damage:?}"
        );
        file.write_all_at(&byte, at).unwrap();
    }
}

#[test]
fn a_segment_of_a_newer_format_is_refused_and_is_not_damage() {
    for indexed in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (_, segment) = store(dir.path(), indexed);
        let reader = StoreReader::open(dir.path()).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&segment).unwrap();
        file.write_all_at(&[9], 4).unwrap();
        let error = reader.verify_log(&mut |_| ()).unwrap_err();
        assert!(
            matches!(
                error,
                ReadError::TooNew {
                    found: 9,
                    newest: FORMAT,
                    ..
                }
            ),
            "{error}"
        );
        assert!(!error.is_damage());
        // With an index, a reader has no need of the segment's header.
        let mut errors: Vec<_> = StoreReader::open(dir.path()).err().into_iter().collect();
        assert_eq!(errors.is_empty(), indexed);
        errors.push(StoreWriter::open(dir.path(), &WriterOptions::default()).unwrap_err());
        for error in errors {
            assert!(
                matches!(
                    error,
                    OpenError::TooNew {
                        found: 9,
                        newest: FORMAT,
                        ..
                    }
                ),
                "{error}"
            );
            assert!(error.to_string().contains("upgrade"), "{error}");
        }
    }
}

#[test]
fn a_missing_segment_is_damage_where_it_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let (images, segment) = store(dir.path(), true);
    let moved = dir.path().join("elsewhere");
    let reader = StoreReader::open(dir.path()).unwrap();
    std::fs::rename(&segment, &moved).unwrap();
    let view = reader.view(volume(), images[0].0).unwrap();
    let error = view.read_at(0, &mut vec![0; VOLUME_BYTES]).unwrap_err();
    assert!(
        error.is_damage() && error.to_string().contains("missing"),
        "{error}"
    );
}
