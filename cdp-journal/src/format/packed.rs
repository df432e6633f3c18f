//! Packed units: data groups that are the same bytes wherever the same content was read back, so that they need not
//! travel to who has one like it.
//!
//! A *packed unit* is a group that holds one whole unit of one read-back record and nothing else. The encoder puts such a
//! unit into a group of its own, and what is read back is never a delta, so what is stored depends on the unit's content
//! alone; only the group's header tells of its place. Its [`UnitHash`] is the BLAKE3 hash of bytes 8..12, 14 and 15 of
//! the header (raw bytes, codec, form) and of the bytes as stored.
//!
//! A *thin frame* is a frame without the bytes as stored of some of its packed units: header, record table, the headers of
//! all groups, the other groups, padding. Golden bytes: `packed_units_1_are_exactly_these_bytes`.

use std::fmt;

use super::{FRAME_DATA_BYTES_MAX, Frame, FrameError, GROUP_HEADER_BYTES, GroupRef};
use crate::format::{Body, bytes_at};
use crate::types::UNIT_BYTES;

/// Packed units of one frame at most.
pub const FRAME_UNITS_MAX: usize = FRAME_DATA_BYTES_MAX / UNIT_BYTES as usize;
/// A group that takes less is not worth a reference.
const STORED_BYTES_MIN: usize = 4 << 10;

/// Names what a packed unit stores.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct UnitHash([u8; Self::BYTES]);

impl UnitHash {
    /// Its length.
    pub const BYTES: usize = 32;

    /// From its bytes.
    pub const fn new(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// Of the group with that header and those bytes as stored.
    pub(crate) fn of(header: &[u8; GROUP_HEADER_BYTES], stored: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&header[8..12]);
        hasher.update(&header[14..16]);
        hasher.update(stored);
        Self(*hasher.finalize().as_bytes())
    }
}

impl fmt::Debug for UnitHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            blake3::Hash::from_bytes(self.0)
                .to_hex()
                .get(..16)
                .unwrap_or_default(),
        )
    }
}

/// A packed unit of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedUnit {
    /// Which group of the frame it is.
    pub group: u16,
    /// What it stores.
    pub hash: UnitHash,
}

/// A thin frame was not made whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RefillError {
    /// It is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// What is left out is told wrongly.
    #[error("it leaves out group {0}, which is no packed unit or was told before")]
    NoUnit(u16),
    /// What was left out is not there.
    #[error("what group {0} stores is not here")]
    Missing(u16),
}

impl Frame {
    /// Numbers of the groups that are packed units worth a reference.
    pub(crate) fn packed_groups(&self) -> Vec<u16> {
        let mut found = Vec::new();
        for placed in &self.records {
            if !matches!(placed.record.body, Body::ReadBack { .. }) {
                continue;
            }
            for part in &self.parts[placed.parts.clone()] {
                let group = &self.groups[part.group];
                // No more data in it than this part.
                if part.len == UNIT_BYTES as usize
                    && group.content_bytes == part.len
                    && group.stored_bytes >= STORED_BYTES_MIN
                {
                    found.push(part.group as u16);
                }
            }
        }
        found
    }

    /// The packed units of the whole frame `bytes`; what `bytes` lacks is left out.
    pub(crate) fn packed_units(&self, bytes: &[u8]) -> Vec<PackedUnit> {
        let units = self.packed_groups().into_iter().filter_map(|group| {
            let GroupRef {
                offset_in_frame,
                stored_bytes,
                ..
            } = self.groups[usize::from(group)];
            let (header, rest) = bytes.get(offset_in_frame..)?.split_first_chunk()?;
            let hash = UnitHash::of(header, rest.get(..stored_bytes)?);
            Some(PackedUnit { group, hash })
        });
        units.collect()
    }

    /// The whole frame `bytes` without the bytes as stored of `units`, which are in the order of their groups.
    pub(crate) fn thin(&self, bytes: &[u8], units: &[PackedUnit]) -> Vec<u8> {
        let mut thin = Vec::with_capacity(bytes.len());
        let mut at = 0;
        for unit in units {
            let group = &self.groups[usize::from(unit.group)];
            let stored_at = group.offset_in_frame + GROUP_HEADER_BYTES;
            thin.extend_from_slice(&bytes[at..stored_at]);
            at = stored_at + group.stored_bytes;
        }
        thin.extend_from_slice(&bytes[at..]);
        thin
    }
}

/// The whole frame of which `thin` leaves out `units`; `find` gives what a unit stores. Nothing else of it is checked:
/// [`SealedFrame::check`](super::SealedFrame::check) does that.
pub(crate) fn refill(
    thin: &[u8],
    units: &[PackedUnit],
    mut find: impl FnMut(&UnitHash) -> Option<Vec<u8>>,
) -> Result<Vec<u8>, RefillError> {
    let frame = Frame::parse(thin)?;
    let packed = frame.packed_groups();
    let mut before = None;
    for unit in units {
        if packed.binary_search(&unit.group).is_err() || before.replace(unit.group) >= Some(unit.group) {
            return Err(RefillError::NoUnit(unit.group));
        }
    }
    let mut whole = Vec::with_capacity(frame.header.frame_bytes);
    let mut at = 0;
    for unit in units {
        let group = &frame.groups[usize::from(unit.group)];
        let stored_at = group.offset_in_frame + GROUP_HEADER_BYTES;
        // What was left out so far is in `whole` only.
        let end = at + (stored_at - whole.len());
        whole.extend_from_slice(thin.get(at..end).ok_or(FrameError::Short)?);
        at = end;
        let header = bytes_at(&whole, group.offset_in_frame);
        let stored = find(&unit.hash).filter(|stored| {
            stored.len() == group.stored_bytes && UnitHash::of(&header, stored) == unit.hash
        });
        whole.extend_from_slice(&stored.ok_or(RefillError::Missing(unit.group))?);
    }
    whole.extend_from_slice(&thin[at..]);
    if whole.len() != frame.header.frame_bytes {
        return Err(FrameError::Short.into());
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::format::{DeltaCache, FrameBuilder, Origin, RecordFlags, SealedFrame};
    use crate::types::{BLOCK_BYTES, BootNs, Seq, VolumeId};

    const UNIT: usize = UNIT_BYTES as usize;

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..len).map(|_| next()).collect()
    }

    /// A unit of which some blocks are zeroes.
    fn sparse(seed: u64) -> Vec<u8> {
        let mut unit = noise(seed, UNIT);
        unit[UNIT / 4..UNIT / 2].fill(0);
        unit
    }

    fn sealed(first: u64, cache: &mut DeltaCache, records: &[(Body, Vec<u8>)]) -> SealedFrame {
        let mut frame = FrameBuilder::new(Seq::new(first).unwrap());
        for (body, data) in records {
            let (origin, flags) = (Origin::default(), RecordFlags::default());
            frame
                .push(
                    BootNs(first),
                    VolumeId::new(1),
                    origin,
                    flags,
                    body.clone(),
                    &[data],
                )
                .unwrap();
        }
        frame.seal_with(cache, Uuid::from_bytes([9; 16]), 0).unwrap()
    }

    fn read_back(offset: u64, data: Vec<u8>) -> (Body, Vec<u8>) {
        let len = data.len() as u64;
        let as_of = None;
        (Body::ReadBack { offset, len, as_of }, data)
    }

    fn units_of(sealed: &SealedFrame) -> Vec<PackedUnit> {
        let frame = Frame::parse(sealed.bytes()).unwrap();
        frame.check_groups(sealed.bytes()).unwrap();
        frame.packed_units(sealed.bytes())
    }

    /// Goal: nobody changes what names a unit without noticing: servers would know nothing of what they have.
    #[test]
    fn packed_units_1_are_exactly_these_bytes() {
        let frame = sealed(
            7,
            &mut DeltaCache::new(0),
            &[read_back(UNIT_BYTES, [noise(1, UNIT), sparse(2)].concat())],
        );
        let units: Vec<_> = units_of(&frame)
            .iter()
            .map(|unit| {
                (
                    unit.group,
                    blake3::Hash::from_bytes(*unit.hash.as_bytes()).to_string(),
                )
            })
            .collect();
        let golden = [
            (
                0,
                "daeef2983d048e79a42d90effa080ddb1e31eb48996b1e248a4ffd32898d149c".to_owned(),
            ),
            (
                1,
                "5033b3d189c8f9193fffeab30a4f310eff85ce7266417186f15aff3f50d0fa13".to_owned(),
            ),
        ];
        assert_eq!(units, golden);
        let parsed = Frame::parse(frame.bytes()).unwrap();
        let thin = parsed.thin(frame.bytes(), &units_of(&frame));
        let end = parsed.groups[1].offset_in_frame + GROUP_HEADER_BYTES + parsed.groups[1].stored_bytes;
        let header = |group: &GroupRef| &frame.bytes()[group.offset_in_frame..][..GROUP_HEADER_BYTES];
        let expected = [
            &frame.bytes()[..parsed.header.prefix_bytes()],
            header(&parsed.groups[0]),
            header(&parsed.groups[1]),
            &frame.bytes()[end..],
        ];
        assert_eq!(thin, expected.concat());
    }

    #[test]
    fn what_was_captured_is_small_or_is_only_part_of_a_unit_is_none() {
        let write = Body::Write {
            offset: 0,
            len: UNIT_BYTES,
        };
        let mut nearly_zero = vec![0; UNIT];
        nearly_zero[..2 * BLOCK_BYTES as usize].fill(7);
        let records = [
            (write, noise(1, UNIT)),
            read_back(512, noise(2, UNIT)),
            read_back(0, nearly_zero),
            read_back(0, vec![5; UNIT]),
            read_back(0, noise(3, UNIT - 512)),
        ];
        assert_eq!(units_of(&sealed(1, &mut DeltaCache::new(0), &records)), []);
    }

    #[test]
    fn what_is_not_what_was_left_out_is_refused() {
        let frame = sealed(
            1,
            &mut DeltaCache::new(0),
            &[read_back(0, [noise(1, UNIT), noise(2, UNIT)].concat())],
        );
        let units = units_of(&frame);
        let parsed = Frame::parse(frame.bytes()).unwrap();
        let thin = parsed.thin(frame.bytes(), &units);
        let missing = Err(RefillError::Missing(0));
        assert_eq!(refill(&thin, &units, |_| None), missing);
        assert_eq!(refill(&thin, &units, |_| Some(noise(3, UNIT))), missing);
        assert_eq!(refill(&thin, &units, |_| Some(noise(1, UNIT - 1))), missing);
        let short = Err(FrameError::Short.into());
        assert_eq!(refill(&thin, &units[..1], |_| Some(noise(1, UNIT))), short);
        let twice = [units[0], units[0]];
        assert_eq!(
            refill(&thin, &twice, |_| Some(noise(1, UNIT))),
            Err(RefillError::NoUnit(0))
        );
    }

    fn any_record() -> impl Strategy<Value = (Body, Vec<u8>)> {
        let blocks = (0..64u64, 1..40u64, any::<u64>(), 0..3u8);
        blocks.prop_map(|(block, count, seed, kind)| {
            let (offset, len) = (block * BLOCK_BYTES, count * BLOCK_BYTES);
            let data = noise(seed, len as usize);
            match kind {
                0 => read_back(offset, data),
                1 => read_back(offset, vec![0; len as usize]),
                _ => (Body::Write { offset, len }, data),
            }
        })
    }

    proptest! {
        /// Goal: the same content has the same name wherever it lies, and a thin frame comes back as it was.
        #[test]
        fn a_unit_is_the_same_wherever_it_lies(
            before in proptest::collection::vec(any_record(), 0..6),
            after in proptest::collection::vec(any_record(), 0..3),
            first in 1..1000u64,
            unit in 0..9u64,
            is_sparse in any::<bool>(),
            leave in any::<u32>(),
        ) {
            let content = match is_sparse {
                true => sparse(42),
                false => noise(42, UNIT),
            };
            let alone = sealed(1, &mut DeltaCache::new(0), &[read_back(0, content.clone())]);
            let hash = units_of(&alone)[0].hash;
            let mut cache = DeltaCache::new(1 << 20);
            let mine = read_back(unit * UNIT_BYTES, content);
            let records: Vec<_> = before.into_iter().chain([mine]).chain(after).collect();
            let frame = sealed(first, &mut cache, &records);
            let units = units_of(&frame);
            prop_assert!(units.iter().any(|unit| unit.hash == hash));
            let parsed = Frame::parse(frame.bytes()).unwrap();
            let left_out: Vec<_> = units
                .into_iter()
                .enumerate()
                .filter(|(index, _)| leave & (1 << index) != 0)
                .map(|(_, unit)| unit)
                .collect();
            let thin = parsed.thin(frame.bytes(), &left_out);
            let whole = refill(&thin, &left_out, |hash| {
                let unit = left_out.iter().find(|unit| unit.hash == *hash)?;
                let group = &parsed.groups[usize::from(unit.group)];
                let at = group.offset_in_frame + GROUP_HEADER_BYTES;
                Some(frame.bytes()[at..at + group.stored_bytes].to_vec())
            });
            prop_assert_eq!(whole.as_deref(), Ok(frame.bytes()));
        }

        /// Goal: groups that units have for themselves leave room for all that a frame may hold.
        #[test]
        fn a_frame_full_of_units_and_bits_has_few_enough_groups(
            bits in proptest::collection::vec((1..9u64, any::<bool>()), 40),
        ) {
            let mut frame = FrameBuilder::new(Seq::FIRST);
            for (number, (blocks, is_sparse)) in bits.into_iter().enumerate() {
                let number = number as u64;
                let unit = match is_sparse {
                    true => sparse(number),
                    false => noise(number, UNIT),
                };
                let bit = noise(number + 100, (blocks * 512) as usize);
                for (body, data) in [read_back(number * UNIT_BYTES, unit), read_back(512, bit)] {
                    if frame.fits(data.len()) {
                        let (origin, flags) = (Origin::default(), RecordFlags::default());
                        frame.push(BootNs(1), VolumeId::new(1), origin, flags, body, &[&data]).unwrap();
                    }
                }
            }
            let sealed = frame.seal(Uuid::nil(), 0).unwrap();
            SealedFrame::check(sealed.bytes().to_vec()).unwrap();
        }
    }
}
