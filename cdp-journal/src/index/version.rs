//! Where the bytes of one version lie.
//!
//! Most versions are whole: one source for all sectors, written by the record that the key names. A block of
//! which only some sectors were written is merged with the version before it when it is indexed, so that reading
//! never walks a chain: its value is a list of pieces, at most one per sector.
//!
//! | bytes | value                                                                                    |
//! |------:|------------------------------------------------------------------------------------------|
//! |     1 | 0 whole, zero; 1 whole, data; 2 pieces                                                    |
//! |    18 | of data: segment(8) group offset(4) group CRC(4) first sector in the group(2, signed)     |
//! |     … | of pieces, each: sector mask(1) origin Seq(8) kind(1: 0 zero, 1 data) and 18 if data      |
//!
//! Little-endian. The group's CRC is kept so that a good group in a wrong place is found out. "First sector" is
//! where sector 0 of the block would lie, which may be before the group for a piece that begins later.

use crate::format::{bytes_at, u32_at, u64_at};

/// Where sector 0 of a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// First Seq of the segment.
    pub(crate) segment: u64,
    /// Of the group's header, in the segment.
    pub(crate) group_offset: u32,
    pub(crate) group_crc: u32,
    pub(crate) first_sector: i16,
}

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Zero,
    Data(Place),
}

impl Source {
    /// The source of the block that lies `blocks` further.
    pub(crate) fn block_further(self, blocks: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Data(place) => Self::Data(Place {
                first_sector: place.first_sector + 8 * blocks as i16,
                ..place
            }),
        }
    }
}

/// Some sectors of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) mask: u8,
    /// The record they come from; of a read-back, the one it is valid after.
    pub(crate) origin: u64,
    pub(crate) source: Source,
}

/// The value of a version key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    /// All of it, from the record in the key.
    Whole(Source),
    /// A block, in pieces that together cover it.
    Pieces(Box<[Piece]>),
}

impl Version {
    /// As pieces. `seq` is the one in the key.
    pub(crate) fn pieces(&self, seq: u64) -> Vec<Piece> {
        match self {
            Self::Whole(source) => vec![Piece {
                mask: 0xff,
                origin: seq,
                source: *source,
            }],
            Self::Pieces(pieces) => pieces.to_vec(),
        }
    }

    /// From pieces that cover the block, for the key with `seq`.
    fn of_pieces(pieces: Vec<Piece>, seq: u64) -> Self {
        match pieces[..] {
            [piece] if piece.origin == seq => Self::Whole(piece.source),
            _ => Self::Pieces(pieces.into_boxed_slice()),
        }
    }

    /// This version (of `base_seq`) with the sectors in `mask` overwritten by record `seq`.
    pub(crate) fn overwritten(base: Option<(u64, &Self)>, mask: u8, seq: u64, source: Source) -> Self {
        let mut pieces = match base {
            Some((base_seq, version)) => version.pieces(base_seq),
            None => vec![Piece {
                mask: 0xff,
                origin: 0,
                source: Source::Zero,
            }],
        };
        for piece in &mut pieces {
            piece.mask &= !mask;
        }
        pieces.retain(|piece| piece.mask != 0);
        pieces.push(Piece {
            mask,
            origin: seq,
            source,
        });
        Self::of_pieces(pieces, seq)
    }

    /// The version `seq` after bytes valid as of `as_of` were read back; `None` if that changes nothing.
    pub(crate) fn read_back_under(&self, seq: u64, mask: u8, as_of: u64, source: Source) -> Option<Self> {
        let mut pieces = self.pieces(seq);
        let mut replaced = 0;
        for piece in pieces.iter_mut().filter(|piece| piece.origin <= as_of) {
            replaced |= piece.mask & mask;
            piece.mask &= !mask;
        }
        if replaced == 0 {
            return None;
        }
        pieces.retain(|piece| piece.mask != 0);
        pieces.push(Piece {
            mask: replaced,
            origin: as_of,
            source,
        });
        Some(Self::of_pieces(pieces, seq))
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Whole(source) => encode_source(source, out),
            Self::Pieces(pieces) => {
                out.push(2);
                for piece in pieces {
                    out.push(piece.mask);
                    out.extend_from_slice(&piece.origin.to_le_bytes());
                    encode_source(&piece.source, out);
                }
            }
        }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if *bytes.first()? != 2 {
            let (source, rest) = decode_source(bytes)?;
            return rest.is_empty().then_some(Self::Whole(source));
        }
        let mut rest = &bytes[1..];
        let mut pieces = Vec::with_capacity(4);
        let mut covered = 0;
        while !rest.is_empty() {
            if rest.len() < 10 || rest[0] & covered != 0 {
                return None;
            }
            let (mask, origin) = (rest[0], u64_at(rest, 1));
            covered |= mask;
            let (source, after) = decode_source(&rest[9..])?;
            pieces.push(Piece { mask, origin, source });
            rest = after;
        }
        (covered == 0xff).then(|| Self::Pieces(pieces.into_boxed_slice()))
    }
}

fn encode_source(source: &Source, out: &mut Vec<u8>) {
    match source {
        Source::Zero => out.push(0),
        Source::Data(place) => {
            let mut bytes = [1; 19];
            bytes[1..9].copy_from_slice(&place.segment.to_le_bytes());
            bytes[9..13].copy_from_slice(&place.group_offset.to_le_bytes());
            bytes[13..17].copy_from_slice(&place.group_crc.to_le_bytes());
            bytes[17..19].copy_from_slice(&place.first_sector.to_le_bytes());
            out.extend_from_slice(&bytes);
        }
    }
}

fn decode_source(bytes: &[u8]) -> Option<(Source, &[u8])> {
    match *bytes.first()? {
        0 => Some((Source::Zero, &bytes[1..])),
        1 if bytes.len() >= 19 => {
            let place = Place {
                segment: u64_at(bytes, 1),
                group_offset: u32_at(bytes, 9),
                group_crc: u32_at(bytes, 13),
                first_sector: i16::from_le_bytes(bytes_at(bytes, 17)),
            };
            Some((Source::Data(place), &bytes[19..]))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(group_offset: u32) -> Source {
        Source::Data(Place {
            segment: 1,
            group_offset,
            group_crc: 9,
            first_sector: -3,
        })
    }

    #[test]
    fn versions_read_back() {
        let pieces = Version::overwritten(Some((4, &Version::Whole(data(64)))), 0b0110, 9, data(128));
        for version in [Version::Whole(Source::Zero), Version::Whole(data(7)), pieces] {
            let mut bytes = Vec::new();
            version.encode(&mut bytes);
            assert_eq!(Version::decode(&bytes), Some(version));
            assert_eq!(Version::decode(&bytes[..bytes.len() - 1]), None);
        }
    }

    #[test]
    fn a_read_back_goes_under_what_is_newer() {
        let version = Version::overwritten(None, 0b1111_0000, 9, data(1));
        let under = version.read_back_under(9, 0xff, 5, data(2)).unwrap();
        let expected = [
            Piece {
                mask: 0b1111_0000,
                origin: 9,
                source: data(1),
            },
            Piece {
                mask: 0b0000_1111,
                origin: 5,
                source: data(2),
            },
        ];
        assert_eq!(under, Version::Pieces(Box::new(expected)));
        assert_eq!(
            under.read_back_under(9, 0xff, 4, data(3)),
            None,
            "an older read-back changes nothing"
        );
        assert!(
            under.read_back_under(9, 0xff, 5, data(3)).is_some(),
            "a later one of the same moment wins"
        );
    }
}
