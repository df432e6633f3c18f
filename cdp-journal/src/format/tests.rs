use uuid::Uuid;

use super::*;
use crate::types::{BootNs, Seq, VolumeId};

/// One record of every kind.
fn every_body() -> Vec<Body> {
    let as_of = Seq::new(3);
    vec![
        Body::Volume {
            kind: VolumeKind::Block,
            bytes: 1 << 30,
            name: "pg".into(),
            path: "/dev/vdb".into(),
        },
        Body::Write {
            offset: 512,
            len: 1024,
        },
        Body::Zero {
            offset: 0,
            len: 1 << 40,
        },
        Body::Discard {
            offset: 4096,
            len: 4096,
        },
        Body::Resize { bytes: 2 << 30 },
        Body::ReadBack {
            offset: 65536,
            len: 65536,
            as_of,
        },
        Body::ReadBackZero {
            offset: 0,
            len: 512,
            as_of: None,
        },
        Body::GapOpen {
            cause: GapCause::RingOverflow,
            last_exact: as_of,
        },
        Body::GapClose,
        Body::Bookmark {
            label: "before-upgrade".into(),
        },
        Body::Start {
            agent: Uuid::from_bytes([1; 16]),
            boot_id: Uuid::from_bytes([2; 16]),
        },
        Body::Stop,
        Body::Tick,
        Body::Barrier,
    ]
}

fn data_of(body: &Body, seed: u8) -> Vec<u8> {
    (0..body.data_bytes())
        .map(|at| (at as u8).wrapping_mul(at as u8 >> 3) ^ seed)
        .collect()
}

fn push(frame: &mut FrameBuilder, body: Body, data: &[u8]) -> Result<Seq, PushError> {
    let origin = Origin {
        pid: 77,
        comm: *b"postgres\0\0\0\0\0\0\0\0",
    };
    frame.push(
        BootNs(1_000),
        VolumeId::new(1),
        origin,
        RecordFlags::FUA.with(RecordFlags::SYNC),
        body,
        &[data],
    )
}

fn frame_of_every_body() -> SealedFrame {
    let mut frame = FrameBuilder::new(Seq::new(10).unwrap());
    for body in every_body() {
        let data = data_of(&body, 0);
        push(&mut frame, body, &data).unwrap();
    }
    frame.seal(Uuid::from_bytes([9; 16]), -5).unwrap()
}

/// Goal: nobody changes the format without noticing. Method: the bytes of a small frame, in full.
#[test]
fn frame_1_is_exactly_these_bytes() {
    let mut frame = FrameBuilder::new(Seq::new(258).unwrap());
    let body = Body::Write {
        offset: 0x1200,
        len: 512,
    };
    let data: Vec<u8> = (0..512).map(|at| (at / 2) as u8).collect();
    push(&mut frame, body, &data).unwrap();
    let bytes = frame
        .seal(Uuid::from_bytes([9; 16]), -2)
        .unwrap()
        .bytes()
        .to_vec();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, include_str!("golden/frame_1.hex").trim_end());
}

#[test]
fn a_frame_reads_back_as_it_was_pushed() {
    let sealed = frame_of_every_body();
    let frame = Frame::parse(sealed.bytes()).unwrap();
    frame.check_groups(sealed.bytes()).unwrap();
    assert_eq!(frame.header.last_seq(), sealed.last_seq());
    assert_eq!(
        (frame.header.boot_id, frame.header.wall_offset_ns),
        (Uuid::from_bytes([9; 16]), -5)
    );
    assert_eq!(frame.records.len(), every_body().len());
    for (placed, body) in frame.records.iter().zip(every_body()) {
        assert_eq!(stored_data(&sealed, &frame, placed), data_of(&body, 0));
        assert_eq!(placed.record.body, body);
        assert_eq!(placed.record.origin.command(), "postgres");
        assert_eq!(placed.wall.0, 995);
        assert!(
            placed.record.flags.contains(RecordFlags::FUA)
                && !placed.record.flags.contains(RecordFlags::PREFLUSH)
        );
    }
}

fn stored_data(sealed: &SealedFrame, frame: &Frame, placed: &PlacedRecord) -> Vec<u8> {
    let mut data = Vec::new();
    for part in &frame.parts[placed.parts.clone()] {
        let group = &frame.groups[part.group];
        let mut raw = vec![0; GROUP_BYTES_MAX];
        decode_group(&sealed.bytes()[group.offset_in_frame..], group.crc, &mut raw).unwrap();
        data.extend_from_slice(&raw[part.in_group..part.in_group + part.len]);
    }
    data
}

/// Goal: groups are encoded where their data was put, and end up right whatever lies before them. Method: records of
/// many sizes, noise and not, in slices cut anywhere; so many that the table needs more than the room kept for it.
#[test]
fn groups_that_shrink_and_groups_that_do_not_lie_one_behind_the_other() {
    let mut random = 7u64;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % below
    };
    let mut frame = FrameBuilder::new(Seq::FIRST);
    let mut pushed = Vec::new();
    let longest = |at: usize| if at.is_multiple_of(50) { 200 } else { 3 };
    for at in 0..1500 {
        let len = 512 * (1 + next(longest(at)));
        let body = Body::Write {
            offset: 512 * next(1 << 20),
            len,
        };
        // Some 20 records in a row are alike, so that whole groups are.
        let data: Vec<u8> = match at / 20 % 2 {
            0 => (0..len).map(|_| next(256) as u8).collect(),
            _ => (0..len).map(|byte| (byte / 100 + at as u64) as u8).collect(),
        };
        let (one, two) = data.split_at(next(len + 1) as usize);
        let origin = Origin {
            pid: next(1 << 31) as u32,
            comm: std::array::from_fn(|_| next(256) as u8),
        };
        let flags = RecordFlags::default();
        match frame.push(BootNs(next(1 << 40)), None, origin, flags, body, &[one, &[], two]) {
            Err(PushError::Full) => break,
            result => result.unwrap(),
        };
        pushed.push(data);
    }
    assert_eq!(
        frame.raw_bytes(),
        pushed.iter().map(|data| data.len()).sum::<usize>()
    );
    let sealed = frame.seal(Uuid::nil(), 0).unwrap();
    let frame = Frame::parse(sealed.bytes()).unwrap();
    frame.check_groups(sealed.bytes()).unwrap();
    assert!(
        sealed.head().len() > 32 << 10,
        "{} bytes of head",
        sealed.head().len()
    );
    let is_plain = |group: &&GroupRef| group.stored_bytes == group.raw_bytes;
    let plain = frame.groups.iter().filter(is_plain).count();
    let shorter = frame.groups.len() - plain;
    assert!(plain > 2 && shorter > 2, "{plain} plain, {shorter} shorter");
    assert_eq!(frame.records.len(), pushed.len());
    for (placed, data) in frame.records.iter().zip(pushed) {
        assert_eq!(stored_data(&sealed, &frame, placed), data);
    }
}

#[test]
fn a_changed_byte_anywhere_is_noticed() {
    let sealed = frame_of_every_body();
    for at in 0..sealed.bytes().len() {
        let mut bytes = sealed.bytes().to_vec();
        bytes[at] ^= 0x20;
        let checked = Frame::parse(&bytes).and_then(|frame| frame.check_groups(&bytes));
        assert!(checked.is_err(), "byte {at} of {}", bytes.len());
    }
    for len in 0..sealed.bytes().len() {
        let bytes = &sealed.bytes()[..len];
        assert!(
            Frame::parse(bytes)
                .and_then(|frame| frame.check_groups(bytes))
                .is_err(),
            "cut to {len}"
        );
    }
}

#[test]
fn a_newer_format_is_told_from_damage() {
    let mut bytes = frame_of_every_body().bytes().to_vec();
    bytes[4] = 2;
    let crc = crc32c::crc32c(&bytes[..92]);
    bytes[92..96].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(Frame::parse(&bytes).unwrap_err(), FrameError::TooNew(2));
}

#[test]
fn a_full_frame_says_so_and_stays_within_its_bounds() {
    let mut frame = FrameBuilder::new(Seq::FIRST);
    let data = vec![7; RECORD_DATA_BYTES_MAX];
    // Off by a sector, so that every unit is cut into blocks.
    let body = |at: u64| Body::Write {
        offset: 512 + at,
        len: RECORD_DATA_BYTES_MAX as u64,
    };
    push(&mut frame, body(0), &data).unwrap();
    push(&mut frame, body(1 << 20), &data).unwrap();
    assert_eq!(push(&mut frame, body(0), &data), Err(PushError::Full));
    assert!(!frame.fits(512) && frame.fits(0));
    let mut tiny = FrameBuilder::new(Seq::FIRST);
    while push(&mut tiny, Body::Tick, &[]).is_ok() {}
    assert_eq!(tiny.record_count(), FRAME_RECORDS_MAX);
    for sealed in [
        frame.seal(Uuid::nil(), 0).unwrap(),
        tiny.seal(Uuid::nil(), 0).unwrap(),
    ] {
        assert!(sealed.bytes().len() <= FRAME_BYTES_MAX);
        Frame::parse(sealed.bytes())
            .unwrap()
            .check_groups(sealed.bytes())
            .unwrap();
    }
    assert!(FrameBuilder::new(Seq::FIRST).seal(Uuid::nil(), 0).is_none());
}

#[test]
fn what_is_not_a_record_is_refused() {
    let mut frame = FrameBuilder::new(Seq::FIRST);
    for (body, data) in [
        (Body::Write { offset: 0, len: 100 }, 100),
        (Body::Write { offset: 1, len: 512 }, 512),
        (Body::Write { offset: 0, len: 0 }, 0),
        (
            Body::Write {
                offset: 0,
                len: 2 << 20,
            },
            2 << 20,
        ),
        (Body::Write { offset: 0, len: 512 }, 511),
        (
            Body::Zero {
                offset: u64::MAX - 511,
                len: 512,
            },
            0,
        ),
        (
            Body::Bookmark {
                label: "x".repeat(TAIL_BYTES_MAX + 1),
            },
            0,
        ),
        (
            Body::GapOpen {
                cause: GapCause::Seeding,
                last_exact: None,
            },
            0,
        ),
    ] {
        let data = vec![0; data];
        assert!(push(&mut frame, body.clone(), &data).is_err(), "{body:?}");
    }
    assert!(frame.is_empty());
}
