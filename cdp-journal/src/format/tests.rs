use uuid::Uuid;

use super::frame::decompress_dense_into;
use super::*;
use crate::types::{BootNs, Seq, UNIT_BYTES, VolumeId};

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

/// Two frames of one cache: whole blocks, zeroes, a repeat, patches in the same group, of the frame before, and of a
/// delta.
fn frames_with_deltas() -> [SealedFrame; 2] {
    let mut cache = DeltaCache::new(1 << 20);
    let block = |edit: u8| {
        let mut block: Vec<u8> = (0..4096).map(|at| (at / 64) as u8).collect();
        block[100..100 + usize::from(edit)].fill(0xd0 + edit);
        block
    };
    let write = |frame: &mut FrameBuilder, block: u64, data: &[u8]| {
        let (offset, len) = (block * 4096, data.len() as u64);
        push(frame, Body::Write { offset, len }, data).unwrap();
    };
    let mut first = FrameBuilder::new(Seq::new(20).unwrap());
    write(&mut first, 1, &block(0));
    write(&mut first, 2, &[0; 4096]);
    write(&mut first, 1, &block(1));
    let mut second = FrameBuilder::new(Seq::new(23).unwrap());
    write(&mut second, 1, &block(2));
    write(&mut second, 1, &block(2));
    // Of another volume's block, or in part, there is no base.
    write(&mut second, 3, &block(3)[..512]);
    [first, second].map(|frame| {
        frame
            .seal_with(&mut cache, Uuid::from_bytes([9; 16]), -2)
            .unwrap()
    })
}

/// The frame again, with other raw bytes of its only group, and all checksums right: what nobody but an enemy writes.
pub(crate) fn with_raw_group(sealed: &SealedFrame, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let frame = Frame::parse(sealed.bytes()).unwrap();
    let [group] = &frame.groups[..] else {
        panic!("{} groups", frame.groups.len())
    };
    let mut raw = group_of(sealed, group).raw().to_vec();
    change(&mut raw);
    let mut header = sealed.bytes()[group.offset_in_frame..][..GROUP_HEADER_BYTES].to_vec();
    header[4..8].copy_from_slice(&(raw.len() as u32).to_le_bytes());
    header[8..12].copy_from_slice(&(raw.len() as u32).to_le_bytes());
    header[14] = CODEC_PLAIN;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&header[4..]), &raw);
    header[..4].copy_from_slice(&crc.to_le_bytes());

    let mut table: Vec<u8> = Vec::new();
    for placed in &frame.records {
        table.extend_from_slice(&placed.record.encode_entry(placed.record.body.tail().len()));
    }
    for number in [
        raw.len() as u32,
        crc,
        group.content_bytes as u32,
        u32::from(header[15]),
    ] {
        table.extend_from_slice(&number.to_le_bytes());
    }
    frame
        .records
        .iter()
        .for_each(|placed| table.extend(placed.record.body.tail()));

    let mut bytes = sealed.bytes()[..FRAME_HEADER_BYTES].to_vec();
    let frame_bytes =
        (FRAME_HEADER_BYTES + table.len() + header.len() + raw.len()).next_multiple_of(FRAME_ALIGN_BYTES);
    bytes[16..20].copy_from_slice(&(frame_bytes as u32).to_le_bytes());
    bytes[28..32].copy_from_slice(&(table.len() as u32).to_le_bytes());
    bytes[32..36].copy_from_slice(&(table.len() as u32).to_le_bytes());
    bytes[36..40].copy_from_slice(&crc32c::crc32c(&table).to_le_bytes());
    bytes[40] = CODEC_PLAIN;
    let crc = crc32c::crc32c(&bytes[..92]);
    bytes[92..96].copy_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(&table);
    bytes.extend_from_slice(&header);
    bytes.extend_from_slice(&raw);
    bytes.resize(frame_bytes, 0);
    bytes
}

/// Goal: a directory that makes no sense is refused before anything is stored. Method: each field of a good one in turn
/// says what it must not.
#[test]
fn a_hostile_directory_is_refused() {
    let [first, _] = frames_with_deltas();
    let entry = |number: usize, at: usize| 4 + number * DIRECTORY_ENTRY_BYTES + at;
    assert!(SealedFrame::check(with_raw_group(&first, |_| {})).is_ok());
    let last = 2;
    let hostile: [(&str, usize, u8); 12] = [
        ("more entries than there are", 0, 200),
        ("fewer entries", 0, 2),
        ("a kind that is none", entry(0, 0), 3),
        ("a run of no sectors", entry(0, 2), 0),
        ("a longer run", entry(0, 2), 9),
        ("a run with a depth", entry(1, 1), 1),
        ("a run with a base", entry(1, 9), 1),
        ("a delta of no depth", entry(last, 1), 0),
        ("a delta that is too deep", entry(last, 1), DELTA_DEPTH_MAX + 1),
        ("a base that is the delta itself", entry(last, 2), 16),
        ("a base behind the delta", entry(last, 3), 1),
        ("a patch of more ranges than there are", entry(3, 4096), 9),
    ];
    for (what, at, byte) in hostile {
        let bytes = with_raw_group(&first, |raw| {
            assert_ne!(raw[at], byte, "{what}");
            raw[at] = byte;
        });
        assert_eq!(
            SealedFrame::check(bytes).unwrap_err(),
            FrameError::Directory(0),
            "{what}"
        );
    }
    let longer = with_raw_group(&first, |raw| raw.push(0));
    assert_eq!(SealedFrame::check(longer).unwrap_err(), FrameError::Directory(0));
}

/// Goal: nobody changes the format of deltas without noticing. Method: the raw bytes of the groups of two small frames:
/// directories and patches in full, whole blocks by their checksum.
#[test]
fn directories_1_are_exactly_these_bytes() {
    let described = frames_with_deltas().map(|sealed| {
        let frame = Frame::parse(sealed.bytes()).unwrap();
        frame.check_groups(sealed.bytes()).unwrap();
        assert_eq!(frame.groups.len(), 1);
        let group = group_of(&sealed, &frame.groups[0]);
        let raw = group.raw();
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let count = u32_at(raw, 0) as usize;
        let (directory, behind) = raw[4..].split_at(count * DIRECTORY_ENTRY_BYTES);
        let mut lines: Vec<String> = directory.chunks(DIRECTORY_ENTRY_BYTES).map(hex).collect();
        lines.push(match behind.len() {
            0..100 => hex(behind),
            bytes => format!(
                "{bytes} bytes, CRC {:08x}, the last {}",
                crc32c::crc32c(behind),
                hex(&behind[bytes - 16..])
            ),
        });
        lines.join("\n")
    });
    assert_eq!(
        described.join("\n\n"),
        include_str!("golden/directories_1.txt").trim_end()
    );
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

/// Goal: what was written in this format stays readable. Method: a frame with a group of zstd, in full; a later zstd may
/// write other bytes for the same.
#[test]
fn frame_2_is_read() {
    let data: Vec<u8> = (0..512).map(|at| (at % 100 / 2) as u8).collect();
    let mut cache = DeltaCache::new(0);
    cache.pack(Packing::Dense);
    let mut frame = FrameBuilder::new(Seq::new(258).unwrap());
    push(
        &mut frame,
        Body::Write {
            offset: 0x1200,
            len: 512,
        },
        &data,
    )
    .unwrap();
    let now = frame
        .seal_with(&mut cache, Uuid::from_bytes([9; 16]), -2)
        .unwrap();
    let hex = include_str!("golden/frame_2.hex").trim_end();
    let then: Vec<u8> = (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect();
    for bytes in [&then[..], now.bytes()] {
        let frame = Frame::parse(bytes).unwrap();
        frame.check_groups(bytes).unwrap();
        assert_eq!(u32_at(bytes, 4), FORMAT_ZSTD);
        let mut raw = vec![0; GROUP_BYTES_MAX];
        let group = &frame.groups[0];
        let header = decode_group(&bytes[group.offset_in_frame..], Some(group.crc), &mut raw).unwrap();
        assert_eq!((header.codec, &raw[..header.raw_bytes]), (CODEC_ZSTD, &data[..]));
    }
    // The first format has no such groups.
    let mut lies = then.clone();
    lies[4] = FORMAT_FIRST as u8;
    let crc = crc32c::crc32c(&lies[..92]);
    lies[92..96].copy_from_slice(&crc.to_le_bytes());
    let frame = Frame::parse(&lies).unwrap();
    assert_eq!(frame.check_groups(&lies), Err(FrameError::Group(0)));
}

/// What lies behind the frame of a group would be bytes that nobody reads.
#[test]
fn a_group_of_zstd_is_one_frame_and_nothing_else() {
    let data = [7; 4096];
    let one = zstd::bulk::compress(&data, 1).unwrap();
    let mut raw = [0; 4096];
    assert!(decompress_dense_into(&one, &mut raw).is_some());
    assert_eq!(raw, data);
    let nothing = zstd::bulk::compress(&[], 1).unwrap();
    for behind in [&nothing[..], &[0][..]] {
        assert_eq!(
            decompress_dense_into(&[&one[..], behind].concat(), &mut raw),
            None
        );
    }
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

fn group_of(sealed: &SealedFrame, group: &GroupRef) -> Group {
    let mut raw = vec![0; GROUP_BYTES_MAX];
    let stored = &sealed.bytes()[group.offset_in_frame..];
    let header = decode_group(stored, Some(group.crc), &mut raw).unwrap();
    raw.truncate(header.raw_bytes);
    Group::new(header, raw).unwrap()
}

fn stored_data(sealed: &SealedFrame, frame: &Frame, placed: &PlacedRecord) -> Vec<u8> {
    let (mut data, mut before) = (Vec::new(), 0);
    for part in &frame.parts[placed.parts.clone()] {
        let group = group_of(sealed, &frame.groups[part.group]);
        let mut at = part.in_group;
        while at < part.in_group + part.len {
            match group.piece(at, part.in_group + part.len - at).unwrap() {
                Piece::Bytes(bytes) => data.extend_from_slice(bytes),
                Piece::Zero(bytes) => data.resize(data.len() + bytes, 0),
                Piece::Delta { .. } => panic!("a delta where there is no cache"),
            }
            at = part.in_group + (data.len() - before);
        }
        before = data.len();
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
    let is_plain = |group: &&GroupRef| group.stored_bytes == group.content_bytes;
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
    let newer = FORMAT + 1;
    bytes[4..8].copy_from_slice(&newer.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..92]);
    bytes[92..96].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(Frame::parse(&bytes).unwrap_err(), FrameError::TooNew(newer));
}

/// Goal: a frame that is packed densely reads as the same, is shorter, and says that it takes the newer format; but not a
/// unit that was read back, whose bytes must not depend on when that was. Method: both ways, of patches and of text.
#[test]
fn a_densely_packed_frame_reads_as_the_same() {
    let lines = (0..).map(|id: u32| {
        format!(
            "insert into orders values ({id}, {});\n",
            id.wrapping_mul(0x9e37_79b1)
        )
    });
    let text = lines
        .flat_map(String::into_bytes)
        .take(UNIT_BYTES as usize)
        .collect::<Vec<u8>>();
    let sealed = |packing: Packing, is_read_back: bool| {
        let mut cache = DeltaCache::new(1 << 20);
        cache.pack(packing);
        let mut frame = FrameBuilder::new(Seq::FIRST);
        let (offset, len) = (0, UNIT_BYTES);
        let body = match is_read_back {
            true => Body::ReadBack {
                offset,
                len,
                as_of: None,
            },
            false => Body::Write { offset, len },
        };
        push(&mut frame, body, &text).unwrap();
        if !is_read_back {
            let mut block = text[..4096].to_vec();
            block[7] ^= 1;
            push(&mut frame, Body::Write { offset, len: 4096 }, &block).unwrap();
        }
        frame.seal_with(&mut cache, Uuid::nil(), 0).unwrap()
    };
    // The second group holds the patch, and where the first is stored.
    let raw = |sealed: &SealedFrame| -> Vec<u8> {
        let frame = Frame::parse(sealed.bytes()).unwrap();
        frame.check_groups(sealed.bytes()).unwrap();
        assert_eq!(frame.groups.len(), 2);
        group_of(sealed, &frame.groups[0]).raw().to_vec()
    };
    let format = |sealed: &SealedFrame| u32_at(sealed.bytes(), 4);
    let all = [Packing::Plain, Packing::Quick, Packing::Dense];
    let captured = all.map(|packing| sealed(packing, false));
    assert!(captured.iter().all(|sealed| raw(sealed) == text));
    assert!(captured.is_sorted_by_key(|sealed| std::cmp::Reverse(sealed.bytes().len())));
    assert_eq!(
        captured.each_ref().map(format),
        [FORMAT_FIRST, FORMAT_FIRST, FORMAT_ZSTD]
    );
    let read_back = all.map(|packing| sealed(packing, true));
    assert!(
        read_back
            .iter()
            .all(|sealed| sealed.bytes() == read_back[0].bytes())
    );
    assert!(read_back[0].bytes().len() < captured[0].bytes().len());
}

/// Goal: the host's time is not spent on what gets hardly shorter, and is on what does. Method: noise, noise with some bytes
/// of each sector alike, and digits of noise, of which only zstd makes anything.
#[test]
fn little_gain_is_not_worth_the_time() {
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 56) as u8
    };
    let noise: Vec<u8> = (0..UNIT_BYTES).map(|_| random()).collect();
    let mut alike = noise.clone();
    for sector in alike.chunks_mut(512) {
        sector[..40].fill(7);
    }
    let digits: Vec<u8> = noise
        .iter()
        .map(|byte| b"0123456789abcdef"[usize::from(byte % 16)])
        .collect();
    let is_shorter = |packing: Packing, data: &[u8]| {
        let mut cache = DeltaCache::new(0);
        cache.pack(packing);
        let mut frame = FrameBuilder::new(Seq::FIRST);
        let body = Body::Write {
            offset: 0,
            len: UNIT_BYTES,
        };
        push(&mut frame, body, data).unwrap();
        let sealed = frame.seal_with(&mut cache, Uuid::nil(), 0).unwrap();
        sealed.bytes().len() < data.len()
    };
    let all = [Packing::Plain, Packing::Quick, Packing::Dense];
    let which = |data: &[u8]| all.map(|packing| is_shorter(packing, data));
    assert_eq!(which(&noise), [false; 3]);
    assert_eq!(which(&alike), [false; 3]);
    assert_eq!(which(&digits), [false, false, true]);
    assert_eq!(which(&[7; UNIT_BYTES as usize]), [false, true, true]);
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

/// A record of a huge range would cost the index as much memory: one beyond the largest volume is no record. Found by
/// frames meant to do harm.
#[test]
fn a_range_beyond_the_largest_volume_is_refused() {
    use super::{Body, VOLUME_BYTES_MAX};
    let most = VOLUME_BYTES_MAX;
    for (bytes, is_good) in [(most, true), (most + 512, false), (1 << 62, false)] {
        let bodies = [
            Body::Zero {
                offset: 0,
                len: bytes,
            },
            Body::Discard {
                offset: bytes - 512,
                len: 512,
            },
            Body::ReadBackZero {
                offset: 0,
                len: bytes,
                as_of: None,
            },
            Body::Resize { bytes },
        ];
        for body in bodies {
            assert_eq!(body.fault().is_none(), is_good, "{body:?}");
        }
    }
}
