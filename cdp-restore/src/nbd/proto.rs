//! The protocol's numbers and the layout of its messages; no I/O. Everything is big-endian.
//!
//! Golden bytes: `messages_are_exactly_these_bytes`.

pub(super) const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(super) const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Of the handshake, either side: fixed newstyle, and no 124 zeroes after `EXPORT_NAME`.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

/// The only name for context there is here, and the number that it gets.
pub(super) const BASE_ALLOCATION: &str = "base:allocation";
pub(super) const BASE_ALLOCATION_ID: u32 = 1;
/// In `base:allocation`: nothing is stored there, and it reads as zero.
pub(super) const STATE_HOLE_ZERO: u32 = 3;

/// What a client may ask for before it reads.
pub(super) mod option {
    pub(in crate::nbd) const EXPORT_NAME: u32 = 1;
    pub(in crate::nbd) const ABORT: u32 = 2;
    pub(in crate::nbd) const LIST: u32 = 3;
    pub(in crate::nbd) const STARTTLS: u32 = 5;
    pub(in crate::nbd) const INFO: u32 = 6;
    pub(in crate::nbd) const GO: u32 = 7;
    pub(in crate::nbd) const STRUCTURED_REPLY: u32 = 8;
    pub(in crate::nbd) const LIST_META_CONTEXT: u32 = 9;
    pub(in crate::nbd) const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of answers to options.
pub(super) mod answer {
    pub(in crate::nbd) const ACK: u32 = 1;
    pub(in crate::nbd) const SERVER: u32 = 2;
    pub(in crate::nbd) const INFO: u32 = 3;
    pub(in crate::nbd) const META_CONTEXT: u32 = 4;
    pub(in crate::nbd) const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub(in crate::nbd) const ERR_INVALID: u32 = (1 << 31) + 3;
    pub(in crate::nbd) const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    pub(in crate::nbd) const ERR_UNKNOWN: u32 = (1 << 31) + 6;
}

/// Kinds of information about an export.
pub(super) mod info {
    pub(in crate::nbd) const EXPORT: u16 = 0;
    pub(in crate::nbd) const NAME: u16 = 1;
    pub(in crate::nbd) const DESCRIPTION: u16 = 2;
    pub(in crate::nbd) const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub(super) mod export_flag {
    pub(in crate::nbd) const HAS_FLAGS: u16 = 1;
    pub(in crate::nbd) const READ_ONLY: u16 = 1 << 1;
    pub(in crate::nbd) const SEND_FLUSH: u16 = 1 << 2;
    pub(in crate::nbd) const SEND_FUA: u16 = 1 << 3;
    pub(in crate::nbd) const SEND_TRIM: u16 = 1 << 5;
    pub(in crate::nbd) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(in crate::nbd) const SEND_DF: u16 = 1 << 7;
    pub(in crate::nbd) const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Commands of the transmission phase.
pub(super) mod command {
    pub(in crate::nbd) const READ: u16 = 0;
    pub(in crate::nbd) const WRITE: u16 = 1;
    pub(in crate::nbd) const DISCONNECT: u16 = 2;
    pub(in crate::nbd) const FLUSH: u16 = 3;
    pub(in crate::nbd) const TRIM: u16 = 4;
    pub(in crate::nbd) const WRITE_ZEROES: u16 = 6;
    pub(in crate::nbd) const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub(super) mod command_flag {
    pub(in crate::nbd) const FUA: u16 = 1;
    pub(in crate::nbd) const NO_HOLE: u16 = 1 << 1;
    pub(in crate::nbd) const DF: u16 = 1 << 2;
    pub(in crate::nbd) const REQ_ONE: u16 = 1 << 3;
}

/// Kinds of chunks of a structured reply.
pub(super) mod chunk {
    pub(in crate::nbd) const OFFSET_DATA: u16 = 1;
    pub(in crate::nbd) const OFFSET_HOLE: u16 = 2;
    pub(in crate::nbd) const BLOCK_STATUS: u16 = 5;
    pub(in crate::nbd) const ERROR: u16 = (1 << 15) + 1;
    /// The last chunk of its reply.
    pub(in crate::nbd) const DONE: u16 = 1;
}

/// A request's head; its data follows where it is a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) command: u16,
    /// Chosen by the client, given back with the reply.
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl Request {
    pub(super) const BYTES: usize = 28;

    /// `None` if these bytes are not a request.
    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Request {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: fields.u32()?,
        })
    }

    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// An option's head: its number and how many bytes follow. `None` if these bytes are not one.
pub(super) fn decode_option(bytes: &[u8; 16]) -> Option<(u32, u32)> {
    let mut fields = Fields(bytes);
    (fields.u64()? == OPTION_MAGIC)
        .then(|| Some((fields.u32()?, fields.u32()?)))
        .flatten()
}

/// An answer to an option.
pub(super) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + data.len());
    bytes.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// The head of a simple reply; the data of a read follows.
pub(super) fn simple_reply(cookie: u64, error: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Bytes of a chunk's head.
pub(super) const CHUNK_HEAD_BYTES: usize = 20;

/// The head of a chunk with `len` bytes to follow.
pub(super) fn chunk_head(cookie: u64, flags: u16, kind: u16, len: u32) -> [u8; CHUNK_HEAD_BYTES] {
    let mut bytes = [0; CHUNK_HEAD_BYTES];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// Takes numbers and texts off the front of a message, as long as there are any.
#[derive(Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.bytes(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.bytes(4)?.try_into().ok().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.bytes(8)?.try_into().ok().map(u64::from_be_bytes)
    }

    /// A text after its length.
    pub(super) fn text(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.bytes(len as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_exactly_these_bytes() {
        assert_eq!(MAGIC.to_be_bytes(), *b"NBDMAGIC");
        assert_eq!(
            option_reply(7, answer::ERR_UNKNOWN, b"no"),
            b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x07\x80\x00\x00\x06\x00\x00\x00\x02no"
        );
        assert_eq!(
            simple_reply(0x0102, 22),
            *b"\x67\x44\x66\x98\x00\x00\x00\x16\x00\x00\x00\x00\x00\x00\x01\x02"
        );
        assert_eq!(
            chunk_head(0x0102, chunk::DONE, chunk::OFFSET_HOLE, 12),
            *b"\x66\x8e\x33\xef\x00\x01\x00\x02\x00\x00\x00\x00\x00\x00\x01\x02\x00\x00\x00\x0c"
        );
        let request = b"\x25\x60\x95\x13\x00\x08\x00\x07\x00\x00\x00\x00\x00\x00\x00\x09\
                        \x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x02\x00";
        let expected = Request {
            flags: command_flag::REQ_ONE,
            command: command::BLOCK_STATUS,
            cookie: 9,
            offset: 4096,
            len: 512,
        };
        assert_eq!(Request::decode(request), Some(expected));
        assert_eq!(Request::decode(&[0; 28]), None);
        assert_eq!(
            decode_option(b"IHAVEOPT\x00\x00\x00\x07\x00\x00\x00\x08"),
            Some((7, 8))
        );
        assert_eq!(decode_option(b"IHAVEOPS\x00\x00\x00\x07\x00\x00\x00\x08"), None);
    }

    #[test]
    fn a_length_that_lies_is_not_believed() {
        assert_eq!(Fields(b"\xff\xff\xff\xffabc").text(), None);
        assert_eq!(Fields(b"\x00\x00\x00\x03abc").text(), Some(&b"abc"[..]));
    }
}
