//! What a crash can leave of an index. Every state of a real disk is tried by `tests/tests/crash_states`; these need
//! neither root nor luck.

use std::path::{Path, PathBuf};

use cdp_journal::Seq;
use cdp_journal::store::StoreReader;

use crate::kit::{Writer, bytes_of, volume};

/// The newest file of sorted keys in the index of the store in `dir`.
fn newest_run(dir: &Path) -> PathBuf {
    let entries = std::fs::read_dir(dir.join("index")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let runs = paths.filter(|path| path.extension().is_some_and(|ext| ext == "sst"));
    runs.max().unwrap()
}

fn expect_blocks(dir: &Path, seq: Seq, blocks: std::ops::Range<u64>) {
    let reader = StoreReader::open(dir).unwrap();
    let view = reader.view(volume(), seq).unwrap();
    for block in blocks {
        let mut found = vec![0; 4096];
        view.read_at(block * 4096, &mut found).unwrap();
        assert!(found == bytes_of(block, 4096), "block {block} at seq {seq}");
    }
}

/// Goal: a run that was added to the index is never written over. Method: RocksDB takes a run in by a second name for
/// its file and removes the first one after; a crash in between leaves both. Make that, and go on.
#[test]
fn a_run_whose_first_name_a_crash_left_is_not_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path());
    writer.declare(1 << 20);
    for block in 0..100 {
        writer.write(block * 4096, &bytes_of(block, 4096));
    }
    writer.flush();
    drop(writer);
    std::fs::hard_link(newest_run(dir.path()), dir.path().join("index/incoming")).unwrap();

    let mut writer = Writer::open(dir.path());
    assert_eq!(writer.recovered.index_rebuilt, None);
    let seq = writer.write(100 * 4096, &bytes_of(100, 4096));
    writer.flush();
    drop(writer);
    let reopened = Writer::open(dir.path());
    assert_eq!(reopened.recovered.index_rebuilt, None);
    expect_blocks(dir.path(), seq, 0..101);
}
