//! Reading from a server is reading its folder.

use super::*;
use crate::format::PlacedRecord;
use crate::remote::RemoteSite;
use crate::store::{Archive, StoreReader};
use crate::view::{ExtentKind, View};

/// Compares two views of one moment.
pub(super) fn assert_same_view(here: &View, there: &View, older: Option<Seq>) {
    assert_eq!(here.bytes(), there.bytes());
    let whole = 0..here.bytes();
    let extents = here.extents(whole.clone()).unwrap();
    assert_eq!(extents, there.extents(whole.clone()).unwrap());
    for extent in extents.iter().filter(|extent| extent.kind == ExtentKind::Data) {
        let (mut one, mut other) = (vec![1; extent.len as usize], vec![2; extent.len as usize]);
        here.read_at(extent.offset, &mut one).unwrap();
        there.read_at(extent.offset, &mut other).unwrap();
        assert!(one == other, "other bytes at {}", extent.offset);
        let written_by = |view: &View| view.written_by(extent.offset).unwrap();
        assert_eq!(written_by(here), written_by(there));
    }
    let changed = |view: &View| view.changed_since(older, whole.clone()).unwrap();
    assert_eq!(changed(here), changed(there));
}

/// Goal: every answer over the network is that of the folder, also after the connection was cut. Method: ask both the
/// same, kill the server, ask again.
#[test]
fn a_store_at_a_server_reads_as_its_folder_does() {
    let mut kit = Kit::new();
    kit.source.write(300, 1);
    for edit in [0, 1, 40] {
        kit.source.write_edited(100, 1, edit);
    }
    let deltas = kit.source.cache.counts();
    assert!(deltas.patched > 100 && deltas.repeated > 100, "{deltas:?}");
    drop(kit.shipped());
    let read = kit.dir.path().join("read");
    kit.enroll("web01", Right::Read, &read);
    let site = RemoteSite::open(&kit.address.to_string(), &read, PATIENCE).unwrap();
    let (label, age, there) = site.stores().unwrap().remove(0);
    assert_eq!((label.as_str(), age), ("web01", 0));
    let dir = Site::open(&kit.site())
        .unwrap()
        .unwrap()
        .log_dir(&name("web01"), there.uuid());
    let volume = VolumeId::new(1).unwrap();
    for round in 0..2 {
        let here = StoreReader::open(&dir).unwrap();
        let last = here.head().unwrap().seq;
        assert_eq!(there.volumes().unwrap(), here.volumes().unwrap(), "round {round}");
        assert_eq!(there.history(volume).unwrap(), here.history(volume).unwrap());
        let records = |archive: &dyn Archive| {
            let frames = archive.records(Seq::FIRST.next()..=last);
            let records: Vec<_> = frames
                .flat_map(|frame| {
                    let frame = frame.unwrap();
                    let data = archive.frame_data(&frame).unwrap();
                    let with_data = |placed: &PlacedRecord| {
                        let bytes = frame.data_of(placed, &data).into_owned();
                        (placed.clone(), bytes)
                    };
                    frame.records.iter().map(with_data).collect::<Vec<_>>()
                })
                .collect();
            records
        };
        let found = records(&here);
        assert_eq!(found.len() as u64, last.get() - 1);
        assert_eq!(found, records(&there));
        let middle = Seq::new(last.get() / 2).unwrap();
        for seq in [middle, last] {
            let views = (here.view(volume, seq).unwrap(), there.view(volume, seq).unwrap());
            assert_same_view(&views.0, &views.1, Seq::new(middle.get() / 2));
        }
        let mut read_bytes = 0;
        let report = there.verify_log(&mut |bytes| read_bytes += bytes).unwrap();
        assert_eq!(report, here.verify_log(&mut |_| {}).unwrap());
        assert!(read_bytes > 0 && report.damages.is_empty());
        kit.server.take().unwrap().kill();
        kit.restart();
    }
}
