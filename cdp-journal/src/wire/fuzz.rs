//! Bytes as a client with a certificate could send them to do harm: good frames and messages, changed in places that
//! matter, with checksums that are right again, so that what lies behind the checksums is reached too.
//!
//! `CDP_SEED` replays a run; `CDP_FUZZ_SECONDS` says how long it is (2, with `CI=true` 60).

use std::time::{Duration, Instant};

use super::*;
use crate::format::{
    Body, Frame, FrameBuilder, FrameHeader, GROUP_HEADER_BYTES, Origin, RECORD_ENTRY_BYTES, RecordFlags,
    SealedFrame, VolumeKind, refill,
};
use crate::types::{BootNs, UNIT_BYTES, VolumeId};

/// Of xorshift; never zero.
pub(crate) struct Noise(u64);

impl Noise {
    /// From `CDP_SEED`, or a new one; told, for a failure shows it.
    pub(crate) fn new() -> Self {
        let given = std::env::var("CDP_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0 >> 32);
        eprintln!("replay with CDP_SEED={seed}");
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Until when to go on.
pub(crate) fn deadline() -> Instant {
    let given = std::env::var("CDP_FUZZ_SECONDS")
        .ok()
        .and_then(|seconds| seconds.parse().ok());
    let usual = if std::env::var("CI").is_ok_and(|ci| ci == "true") {
        60
    } else {
        2
    };
    Instant::now() + Duration::from_secs(given.unwrap_or(usual))
}

/// Changes some places.
fn mutate(noise: &mut Noise, bytes: &mut Vec<u8>) {
    for _ in 0..=noise.below(4) {
        let at = noise.below(bytes.len());
        match noise.below(8) {
            0 | 1 if !bytes.is_empty() => bytes[at] ^= 1 << noise.below(8),
            2 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][noise.below(5)],
            3 => {
                let number = [
                    0,
                    1,
                    511,
                    4096,
                    1 << 20,
                    u64::from(u32::MAX),
                    i64::MAX as u64,
                    u64::MAX,
                ][noise.below(8)];
                let at = at & !3;
                for (place, byte) in bytes.iter_mut().skip(at).zip(number.to_le_bytes()) {
                    *place = byte;
                }
            }
            4 => {
                let (from, len) = (noise.below(bytes.len()), noise.below(64));
                let piece: Vec<u8> = bytes.iter().skip(from).take(len).copied().collect();
                for (place, byte) in bytes.iter_mut().skip(at).zip(piece) {
                    *place = byte;
                }
            }
            5 => bytes.truncate(at),
            6 => bytes.extend(std::iter::repeat_n(noise.next() as u8, noise.below(64))),
            _ => {
                for (place, byte) in bytes.iter_mut().skip(at & !7).zip(noise.next().to_le_bytes()) {
                    *place = byte;
                }
            }
        }
    }
}

fn put_u32(bytes: &mut [u8], at: usize, number: usize) {
    if let Some(place) = bytes.get_mut(at..at + 4) {
        place.copy_from_slice(&(number as u32).to_le_bytes());
    }
}

/// Makes the checksums of header and table right, as far as there are a header and a table.
fn mend(bytes: &mut [u8]) {
    if bytes.len() < FrameHeader::BYTES {
        return;
    }
    let table_bytes = u32_at(bytes, 32) as usize;
    if let Some(table) = bytes.get(FrameHeader::BYTES..FrameHeader::BYTES.saturating_add(table_bytes)) {
        let crc = crc32c::crc32c(table);
        put_u32(bytes, 36, crc as usize);
    }
    let crc = crc32c::crc32c(&bytes[..92]);
    put_u32(bytes, 92, crc as usize);
}

/// A bad frame made of a good one.
pub(crate) fn bad_frame(noise: &mut Noise, good: &[u8]) -> Vec<u8> {
    let mut frame = good.to_vec();
    let table_bytes = u32_at(good, 32) as usize;
    match noise.below(3) {
        // Anywhere.
        0 => mutate(noise, &mut frame),
        // In the header.
        1 => {
            let mut header = frame[..92].to_vec();
            mutate(noise, &mut header);
            header.resize(92, 0);
            // Who it says it is must stay, or nothing further is looked at.
            header[..8].copy_from_slice(&good[..8]);
            frame[..92].copy_from_slice(&header);
        }
        // In the table of records.
        _ => {
            let table = FrameHeader::BYTES..FrameHeader::BYTES + table_bytes;
            let mut changed = frame[table.clone()].to_vec();
            let at = noise.below(changed.len() / RECORD_ENTRY_BYTES + 1) * RECORD_ENTRY_BYTES;
            let mut entry: Vec<u8> = changed
                .iter()
                .skip(at)
                .take(RECORD_ENTRY_BYTES)
                .copied()
                .collect();
            mutate(noise, &mut entry);
            for (place, byte) in changed.iter_mut().skip(at).zip(entry) {
                *place = byte;
            }
            frame[table].copy_from_slice(&changed);
        }
    }
    if noise.below(8) > 0 {
        mend(&mut frame);
    }
    frame
}

/// Frames of every kind of record, with tables that are stored as they are and compressed ones.
pub(crate) fn good_frames(first: Seq) -> Vec<Vec<u8>> {
    let noise: Vec<u8> = (0..8192u32)
        .map(|number| (number.wrapping_mul(0x9e37_79b9) >> 13) as u8)
        .collect();
    [1usize, 3, 200]
        .into_iter()
        .map(|count| {
            let mut frame = FrameBuilder::new(first);
            for number in 0..count as u64 {
                let offset = number % 500 * 8192;
                let len = noise.len() as u64;
                let (body, data): (Body, &[u8]) = match number % 6 {
                    0 => (
                        Body::Volume {
                            kind: VolumeKind::Block,
                            bytes: 64 << 20,
                            name: "pg".to_owned(),
                            path: "/dev/vdb".to_owned(),
                        },
                        &[],
                    ),
                    1 => (Body::Write { offset, len }, &noise),
                    2 => (
                        Body::ReadBack {
                            offset,
                            len,
                            as_of: Some(first),
                        },
                        &noise,
                    ),
                    3 => (Body::Zero { offset, len }, &[]),
                    4 => (Body::Resize { bytes: 32 << 20 }, &[]),
                    _ => (Body::Tick, &[]),
                };
                let volume = match body {
                    Body::Tick => None,
                    _ => VolumeId::new(1),
                };
                let (origin, flags) = (Origin::default(), RecordFlags::default());
                frame
                    .push(BootNs(1000 + number), volume, origin, flags, body, &[data])
                    .unwrap();
            }
            frame.seal(Uuid::from_u128(8), 0).unwrap().bytes().to_vec()
        })
        .collect()
}

/// A frame of two units that were read back, thin, and all of it.
fn thin_frame() -> (Vec<u8>, Vec<PackedUnit>, Vec<u8>) {
    let mut noise = Noise(1);
    let mut frame = FrameBuilder::new(Seq::FIRST);
    let data: Vec<u8> = (0..2 * UNIT_BYTES).map(|_| noise.next() as u8).collect();
    let body = Body::ReadBack {
        offset: 0,
        len: data.len() as u64,
        as_of: None,
    };
    let (origin, flags) = (Origin::default(), RecordFlags::default());
    frame
        .push(BootNs(1), VolumeId::new(1), origin, flags, body, &[&data])
        .unwrap();
    let sealed = frame.seal(Uuid::from_u128(8), 0).unwrap();
    let frame = Frame::parse(sealed.bytes()).unwrap();
    let units = frame.packed_units(sealed.bytes());
    assert_eq!(units.len(), 2);
    (frame.thin(sealed.bytes(), &units), units, sealed.bytes().to_vec())
}

/// Goal: no thin frame makes a server panic, or is taken for another frame than it is. Method: thin frames changed behind right
/// checksums; what is looked for is what was left out, or anything.
#[test]
fn thin_frames_meant_to_do_harm_are_a_frame_or_an_error() {
    let mut noise = Noise::new();
    let (thin, units, whole) = thin_frame();
    let frame = Frame::parse(&whole).unwrap();
    let stored: Vec<_> = units
        .iter()
        .map(|unit| {
            let group = &frame.groups[usize::from(unit.group)];
            let at = group.offset_in_frame + GROUP_HEADER_BYTES;
            (unit.hash, whole[at..at + group.stored_bytes].to_vec())
        })
        .collect();
    let (until, mut taken) = (deadline(), 0);
    while Instant::now() < until {
        let bad = match noise.below(4) {
            0 => thin.clone(),
            _ => bad_frame(&mut noise, &thin),
        };
        let mut told = units.clone();
        match noise.below(4) {
            0 => told.swap(0, 1),
            1 => told[1].group = noise.below(4) as u16,
            _ => {}
        }
        let lie = noise.below(4) == 0;
        let refilled = refill(&bad, &told, |hash| match lie {
            true => Some(vec![0; noise.below(1 << 17)]),
            false => stored
                .iter()
                .find(|stored| stored.0 == *hash)
                .map(|stored| stored.1.clone()),
        });
        if let Ok(refilled) = refilled {
            assert!(refilled.len() <= FRAME_BYTES_MAX);
            if let Ok(sealed) = SealedFrame::check(refilled) {
                taken += 1;
                assert_eq!(sealed.bytes().len(), whole.len());
            }
        }
    }
    assert!(taken > 0, "nothing was made whole");
}

/// Goal: no bytes make the decoders panic, loop, or take something for what it is not.
#[test]
fn bytes_meant_to_do_harm_are_a_message_or_an_error() {
    let mut noise = Noise::new();
    let frames = good_frames(Seq::FIRST);
    for frame in &frames {
        SealedFrame::check(frame.clone()).unwrap();
    }
    let until = deadline();
    let (mut tried, mut taken) = (0u64, 0u64);
    while Instant::now() < until {
        let good = &frames[noise.below(frames.len())];
        let frame = bad_frame(&mut noise, good);
        let mut message = Message::Frame {
            previous: None,
            frame: frame.clone(),
        }
        .encode();
        if let Ok(sealed) = SealedFrame::check(frame) {
            taken += 1;
            assert!(sealed.first_seq() <= sealed.last_seq());
            assert!(sealed.bytes().len() <= FRAME_BYTES_MAX);
        }
        message.truncate(noise.below(4096));
        mutate(&mut noise, &mut message);
        if let Some((header, body)) = message.split_first_chunk::<HEADER_BYTES>()
            && let Ok(header) = Header::decode(header)
        {
            assert!(header.body_bytes <= header.kind.body_bytes_max());
            for kind in KINDS {
                if let Ok(message) = Message::decode(kind, body) {
                    assert_eq!(&message.encode()[HEADER_BYTES..], body);
                }
            }
        }
        tried += 1;
    }
    eprintln!("{tried} tried, {taken} taken for frames");
    assert!(taken > 0, "nothing reached what lies behind the checksums");
}
