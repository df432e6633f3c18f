//! Any bytes are a frame or an error. The checksums are made right first, so that what lies behind them is reached.

#![no_main]

use cdp_journal::format::{Frame, FrameHeader, SealedFrame};
use libfuzzer_sys::fuzz_target;

/// Of a record and of a group in the table, and before each group: see the tables in `cdp-journal/src/format/mod.rs`.
const RECORD_ENTRY_BYTES: usize = 64;
const GROUP_ENTRY_BYTES: usize = 16;
const GROUP_HEADER_BYTES: usize = 24;
const CODEC_PLAIN: u8 = 0;

fn number(bytes: &[u8], at: usize) -> usize {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.map_or(0, |found| u32::from_le_bytes(*found) as usize)
}

fn put(bytes: &mut [u8], at: usize, number: u32) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *place = number.to_le_bytes();
    }
}

/// Makes the checksums of groups, table and header right, as far as they can be found.
fn mend(bytes: &mut [u8]) {
    let (records, groups) = (number(bytes, 20), number(bytes, 24));
    let table_bytes = number(bytes, 32);
    let table = FrameHeader::BYTES..FrameHeader::BYTES.saturating_add(table_bytes);
    if bytes[40] == CODEC_PLAIN {
        let mut entry = FrameHeader::BYTES.saturating_add(records.saturating_mul(RECORD_ENTRY_BYTES));
        let mut group = table.end;
        for _ in 0..groups.min(100) {
            let end = group
                .saturating_add(GROUP_HEADER_BYTES)
                .saturating_add(number(bytes, entry));
            let Some(covered) = bytes.get(group.saturating_add(4)..end) else {
                break;
            };
            let crc = crc32c::crc32c(covered);
            put(bytes, group, crc);
            put(bytes, entry.saturating_add(4), crc);
            (entry, group) = (entry.saturating_add(GROUP_ENTRY_BYTES), end);
        }
    }
    if let Some(table) = bytes.get(table) {
        let crc = crc32c::crc32c(table);
        put(bytes, 36, crc);
    }
    let crc = crc32c::crc32c(&bytes[..92]);
    put(bytes, 92, crc);
}

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    if bytes.len() >= FrameHeader::BYTES {
        mend(&mut bytes);
    }
    if let Ok(frame) = Frame::parse(&bytes) {
        for placed in &frame.records {
            assert!(placed.parts.end <= frame.parts.len());
        }
    }
    if let Ok(sealed) = SealedFrame::check(bytes) {
        assert!(sealed.first_seq() <= sealed.last_seq());
    }
});
