//! The header of a segment, and the envelope around each frame in it.

use uuid::Uuid;

use super::{
    ENVELOPE_BYTES, FORMAT, FRAME_BYTES_MAX, FRAME_HEADER_BYTES, SEGMENT_HEADER_BYTES, bytes_at, u32_at,
    u64_at,
};
use crate::types::Seq;

const SEGMENT_MAGIC: [u8; 4] = *b"CDPS";
/// No format of ours will be larger: what says so without a checksum is damaged.
const FORMAT_MAX: u32 = 255;
const ENVELOPE_MAGIC: [u8; 4] = *b"CDPE";

/// First bytes of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) store: Uuid,
    pub(crate) first_seq: Seq,
}

/// Why a segment's header is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentHeaderError {
    /// Short, or the checksum fails.
    Bad,
    /// A format this build does not know.
    TooNew(u32),
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        bytes[0..4].copy_from_slice(&SEGMENT_MAGIC);
        bytes[4..8].copy_from_slice(&FORMAT.to_le_bytes());
        bytes[8..24].copy_from_slice(self.store.as_bytes());
        bytes[24..32].copy_from_slice(&self.first_seq.get().to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The format of a header that is good.
    pub(crate) fn format(bytes: &[u8]) -> Option<u32> {
        Self::decode(bytes).ok().map(|_| u32_at(bytes, 4))
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, SegmentHeaderError> {
        if bytes.len() < SEGMENT_HEADER_BYTES || bytes[..4] != SEGMENT_MAGIC {
            return Err(SegmentHeaderError::Bad);
        }
        let format = u32_at(bytes, 4);
        let is_whole = crc32c::crc32c(&bytes[..60]) == u32_at(bytes, 60);
        // A newer header may have its checksum elsewhere, but formats are counted one by one.
        if format > FORMAT && (is_whole || format <= FORMAT_MAX) {
            return Err(SegmentHeaderError::TooNew(format));
        }
        if !is_whole || format == 0 {
            return Err(SegmentHeaderError::Bad);
        }
        Ok(Self {
            store: Uuid::from_bytes(bytes_at(bytes, 8)),
            first_seq: Seq::new(u64_at(bytes, 24)).ok_or(SegmentHeaderError::Bad)?,
        })
    }
}

/// What this log knows about the frame that follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Envelope {
    pub(crate) frame_bytes: u64,
    pub(crate) first_seq: Seq,
    /// Last record known to be durable when this was written.
    pub(crate) durable: Option<Seq>,
}

impl Envelope {
    pub(crate) fn encode(&self) -> [u8; ENVELOPE_BYTES] {
        let mut bytes = [0; ENVELOPE_BYTES];
        bytes[0..4].copy_from_slice(&ENVELOPE_MAGIC);
        bytes[8..16].copy_from_slice(&self.frame_bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.first_seq.get().to_le_bytes());
        bytes[24..32].copy_from_slice(&Seq::number_of(self.durable).to_le_bytes());
        let crc = crc32c::crc32c(&bytes[8..]);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `None` if these bytes are not an envelope, or a torn one.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < ENVELOPE_BYTES || bytes[..4] != ENVELOPE_MAGIC {
            return None;
        }
        if crc32c::crc32c(&bytes[8..ENVELOPE_BYTES]) != u32_at(bytes, 4) {
            return None;
        }
        let frame_bytes = u64_at(bytes, 8);
        if !(FRAME_HEADER_BYTES as u64..=FRAME_BYTES_MAX as u64).contains(&frame_bytes) {
            return None;
        }
        Some(Self {
            frame_bytes,
            first_seq: Seq::new(u64_at(bytes, 16))?,
            durable: Seq::new(u64_at(bytes, 24)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: nobody changes the format without noticing.
    #[test]
    fn segment_2_is_exactly_these_bytes() {
        let header = SegmentHeader {
            store: Uuid::from_bytes([7; 16]),
            first_seq: Seq::new(258).unwrap(),
        };
        let bytes = header.encode();
        assert_eq!(bytes[..8], *b"CDPS\x02\0\0\0");
        assert_eq!(bytes[8..24], [7; 16]);
        assert_eq!(bytes[24..32], [2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[32..60], [0; 28]);
        assert_eq!(u32_at(&bytes, 60), crc32c::crc32c(&bytes[..60]));
        assert_eq!(
            crc32c::crc32c(&bytes),
            0x48674bc7,
            "a CRC over data and its own CRC is a constant"
        );
        assert_eq!(SegmentHeader::decode(&bytes), Ok(header));
        let mut first = bytes;
        first[4] = 1;
        let crc = crc32c::crc32c(&first[..60]);
        first[60..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(SegmentHeader::decode(&first), Ok(header), "of format 1");
        assert_eq!(SegmentHeader::format(&first), Some(1));

        let envelope = Envelope {
            frame_bytes: 4096,
            first_seq: Seq::new(9).unwrap(),
            durable: Seq::new(8),
        };
        let bytes = envelope.encode();
        assert_eq!(bytes[..4], *b"CDPE");
        assert_eq!(
            bytes[8..],
            [
                0, 16, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0
            ]
        );
        assert_eq!(Envelope::decode(&bytes), Some(envelope));
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let bytes = SegmentHeader {
            store: Uuid::nil(),
            first_seq: Seq::FIRST,
        }
        .encode();
        for at in 0..bytes.len() {
            let mut bytes = bytes;
            bytes[at] ^= 0x40;
            assert!(SegmentHeader::decode(&bytes).is_err(), "byte {at}");
        }
        let bytes = Envelope {
            frame_bytes: 4096,
            first_seq: Seq::FIRST,
            durable: None,
        }
        .encode();
        for at in 0..bytes.len() {
            let mut bytes = bytes;
            bytes[at] ^= 0x40;
            assert_eq!(Envelope::decode(&bytes), None, "byte {at}");
        }
    }
}
