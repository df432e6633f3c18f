//! What agents, servers and readers say to each other. Format 2, little-endian.
//!
//! Everything travels over QUIC with TLS 1.3, which keeps bytes as they were; frames and data groups carry checksums
//! of their own all the same and are checked with them at the other end. A connection names its purpose and the
//! format by ALPN ([`ALPNS`], [`ALPN_ENROLL`]): another format is another name, and both ends speak the newest that both
//! know. Each stream is a row of messages:
//!
//! | at | bytes | message         | note                                                            |
//! |---:|------:|-----------------|-----------------------------------------------------------------|
//! |  0 |     1 | kind            | see below                                                       |
//! |  1 |     3 | zero            |                                                                 |
//! |  4 |     4 | body bytes      | each kind has its bound ([`Kind::body_bytes_max`])              |
//!
//! | kind | from   | body                                                                             |
//! |-----:|--------|----------------------------------------------------------------------------------|
//! |    1 | client | `Enroll`: right wanted, 1 append, 2 read or 3 follow (1), secret (16), signing request, DER |
//! |    2 | server | `Enrolled`: bytes of the certificate (4), the certificate, the authority's, DER  |
//! |   16 | sender | `Hello`: id of the log (16), its last durable Seq or 0 (8)                       |
//! |   17 | holder | `Welcome`: first (8) and last (8) Seq of the last frame held, its id (16); or all zero |
//! |   18 | sender | `Frame`: the Seq before it in the sender's log or 0 (8), the frame as in the log |
//! |   19 | holder | `Ack`: last durable Seq or 0 (8), 1 if there is no room (1), zero (7)            |
//! |   20 | sender | `Standing`: its last durable Seq or 0 (8), age of the oldest record that is not acknowledged, ns (8), bytes of its log after what is (8) |
//! |   21 | holder | `Follow`: id of the log (16), the agent's name                                   |
//! |   22 | sender | `Offer`: hashes of packed units, 1 to 32, see [`UnitHash`] (32 each)              |
//! |   23 | holder | `Have`: of the oldest `Offer` without an answer, the bit of each that is there (4), zero (4) |
//! |   24 | sender | `Thin`: as `Frame`: Seq (8); packed units left out, 1 to 32 (4), zero (4); of each its group (2) and hash (32), by group; the thin frame |
//! |   32 | reader | `Ask`: JSON, see [`crate::remote`]                                               |
//! |   33 | server | `Answer`: JSON                                                                   |
//! |   34 | server | `Items`: stretches of a view, 40 bytes each, see [`crate::remote`]               |
//! |   35 | server | `Bytes`: of a segment as they lie in the log, or what [`crate::remote`] tells     |
//! |   36 | server | `Head`: segment (8) and offset in it (8) of a frame, its header and record table |
//! |   37 | server | `Progress`: bytes done since the last one (8)                                    |
//!
//! **Enrolling** ([`ALPN_ENROLL`], the only thing possible without a certificate): the client opens a stream and sends
//! `Enroll`; the answer is `Enrolled`.
//!
//! **Shipping**: the sender opens a stream, says `Hello`, and is told by `Welcome` what is durable at the other end.
//! If that is a frame of its own log, the sender opens a one-way stream and sends every frame after it, in order.
//! `Ack`s come back on the first stream; an `Ack` covers everything up to its Seq. Nothing else but offers is answered, and
//! what the holder does not like closes the connection with a [`Close`] and a sentence that says why. About once a second
//! the sender says by `Standing` how far behind the holder is.
//!
//! **Offers** (format 2): what was read back, and will be sent soon, the sender offers on its first stream, and the holder
//! answers each `Offer` by one `Have`, in their order. What the holder has is left out: a `Thin` stands in the place of its
//! `Frame`, and the holder makes the very frame of it. Where it cannot any more, it closes with [`Close::Lacking`]; the
//! sender begins anew, and offers nothing for a while.
//!
//! **Following**: the same with the ends turned round. The holder connects, opens the stream and says `Follow`; the sender
//! begins with `Hello`, and all goes on as above. A holder that has more than the sender waits for it. One connection for
//! each log, so that none holds another up; which there are is a question ([`crate::remote`]).
//!
//! **Reading**: one stream for each question: `Ask`, then what the question asks for, then `Answer`.
//!
//! The id of a frame is the first half of the BLAKE3 hash of its header and record table, which hold the checksums of
//! its data: two logs that agree on the id of their last frame agree on all of it.
//!
//! | Format | First in | Change | Spoken |
//! |-------:|----------|--------|--------|
//! |      1 | 0.1      | first  | yes    |
//! |      2 | 0.1      | offers; all else is as it was | yes |
//!
//! Golden bytes: `wire_2_is_exactly_these_bytes`.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::format::{
    FRAME_BYTES_MAX, FRAME_UNITS_MAX, PackedUnit, UnitHash, bytes_at, u16_at, u32_at, u64_at,
};
use crate::site::{AgentName, NAME_BYTES_MAX};
use crate::types::Seq;

/// Names a connection that ships or reads, in the newest format.
pub const ALPN: &[u8] = b"cdp/2";
/// All formats spoken, the newest first.
pub const ALPNS: [&[u8]; 2] = [ALPN, b"cdp/1"];
/// Names a connection that enrols.
pub const ALPN_ENROLL: &[u8] = b"cdp-enroll/1";

/// Bytes before each body.
pub const HEADER_BYTES: usize = 8;
/// Bytes of a token's secret.
pub const SECRET_BYTES: usize = 16;
/// A certificate, or the request for one, at most.
pub const CERTIFICATE_BYTES_MAX: usize = 8 << 10;
/// A question at most.
pub const ASK_BYTES_MAX: usize = 64 << 10;
/// An answer at most: the history of a volume with some ten thousand gaps.
pub const ANSWER_BYTES_MAX: usize = 16 << 20;
/// One stretch of a view.
pub const ITEM_BYTES: usize = 40;
/// Stretches in one message at most.
pub const ITEMS_MAX: usize = 2048;
/// Bytes of a segment in one message at most.
pub const READ_BYTES_MAX: usize = 1 << 20;

/// Where a frame or group lies, before its bytes.
pub const PLACE_BYTES: usize = 16;

const SHORT_BYTES_MAX: usize = 64;
/// Before what a thin frame leaves out, and each of it.
const THIN_HEAD_BYTES: usize = 16;
const THIN_UNIT_BYTES: usize = 2 + UnitHash::BYTES;

const _: () = assert!(FRAME_UNITS_MAX <= u32::BITS as usize); // a bit each

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "told by the table of the module")]
pub enum Kind {
    Enroll = 1,
    Enrolled = 2,
    Hello = 16,
    Welcome = 17,
    Frame = 18,
    Ack = 19,
    Standing = 20,
    Follow = 21,
    Offer = 22,
    Have = 23,
    Thin = 24,
    Ask = 32,
    Answer = 33,
    Items = 34,
    Bytes = 35,
    Head = 36,
    Progress = 37,
}

const KINDS: [Kind; 17] = [
    Kind::Enroll,
    Kind::Enrolled,
    Kind::Hello,
    Kind::Welcome,
    Kind::Frame,
    Kind::Ack,
    Kind::Standing,
    Kind::Follow,
    Kind::Offer,
    Kind::Have,
    Kind::Thin,
    Kind::Ask,
    Kind::Answer,
    Kind::Items,
    Kind::Bytes,
    Kind::Head,
    Kind::Progress,
];

impl Kind {
    /// What a receiver reads at most before it knows more than the header.
    pub const fn body_bytes_max(self) -> usize {
        match self {
            Self::Enroll => 1 + SECRET_BYTES + CERTIFICATE_BYTES_MAX,
            Self::Enrolled => 4 + 2 * CERTIFICATE_BYTES_MAX,
            Self::Hello | Self::Welcome | Self::Ack | Self::Standing | Self::Have | Self::Progress => {
                SHORT_BYTES_MAX
            }
            Self::Offer => FRAME_UNITS_MAX * UnitHash::BYTES,
            Self::Thin => THIN_HEAD_BYTES + FRAME_UNITS_MAX * THIN_UNIT_BYTES + FRAME_BYTES_MAX,
            Self::Follow => 16 + NAME_BYTES_MAX,
            Self::Frame => 8 + FRAME_BYTES_MAX,
            Self::Ask => ASK_BYTES_MAX,
            Self::Answer => ANSWER_BYTES_MAX,
            Self::Items => ITEMS_MAX * ITEM_BYTES,
            Self::Bytes => READ_BYTES_MAX,
            Self::Head => PLACE_BYTES + FRAME_BYTES_MAX,
        }
    }
}

/// Bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// A kind that this format does not have.
    #[error("a message of unknown kind {0}")]
    Kind(u8),
    /// Longer than its kind may be.
    #[error("a message {kind:?} of {bytes} bytes; it may have {max}")]
    TooLong {
        /// Of which kind.
        kind: Kind,
        /// Its body, as the header says.
        bytes: u32,
        /// The bound.
        max: usize,
    },
    /// The body is not what its kind should have.
    #[error("a message {0:?} that makes no sense")]
    Body(Kind),
    /// Another message was expected.
    #[error("a message {found:?} in place of {expected:?}")]
    Unexpected {
        /// What came.
        found: Kind,
        /// What should have.
        expected: Kind,
    },
}

/// First bytes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// How much of it.
    pub body_bytes: usize,
}

impl Header {
    /// Reads a header; its length is within the bound of its kind.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let known = KINDS.into_iter().find(|kind| *kind as u8 == bytes[0]);
        let kind = known.filter(|_| bytes[1..4] == [0; 3]);
        let kind = kind.ok_or(WireError::Kind(bytes[0]))?;
        let body_bytes = u32_at(bytes, 4);
        let max = kind.body_bytes_max();
        if body_bytes as usize > max {
            return Err(WireError::TooLong {
                kind,
                bytes: body_bytes,
                max,
            });
        }
        Ok(Self {
            kind,
            body_bytes: body_bytes as usize,
        })
    }

    /// The header of a body of that length, which must be within the kind's bound.
    pub fn encode(kind: Kind, body_bytes: usize) -> [u8; HEADER_BYTES] {
        debug_assert!(body_bytes <= kind.body_bytes_max());
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = kind as u8;
        bytes[4..].copy_from_slice(&(body_bytes as u32).to_le_bytes());
        bytes
    }
}

/// What a certificate allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Right {
    /// To append to an agent's history, and to learn where it ends.
    Append = 1,
    /// To read it.
    Read = 2,
    /// To get the histories of all agents, frame by frame: for another server.
    Follow = 3,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Append => "append",
            Self::Read => "read",
            Self::Follow => "follow",
        })
    }
}

/// Names a frame, so that two logs can tell whether they hold the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameId {
    /// Its first record.
    pub first: Seq,
    /// Its last record.
    pub last: Seq,
    /// See the module.
    pub hash: [u8; 16],
}

impl FrameId {
    /// Of the frame whose header and record table are `head`.
    pub fn of(first: Seq, last: Seq, head: &[u8]) -> Self {
        Self {
            first,
            last,
            hash: bytes_at(blake3::hash(head).as_bytes(), 0),
        }
    }
}

/// How far behind a holder is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// The last record that is durable at the sender.
    pub durable: Option<Seq>,
    /// Age of the oldest record that is not known to be durable at the holder, in nanoseconds.
    pub lag_ns: u64,
    /// Bytes of the sender's log that are not.
    pub backlog_bytes: u64,
}

/// A message of enrolling or shipping. (Those of reading are JSON or plain bytes.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Asks for a certificate.
    Enroll {
        /// What the certificate is wanted for.
        right: Right,
        /// Of the token.
        secret: [u8; SECRET_BYTES],
        /// The signing request.
        request: Vec<u8>,
    },
    /// Gives one.
    Enrolled {
        /// The client's.
        certificate: Vec<u8>,
        /// Who signed it.
        authority: Vec<u8>,
    },
    /// Begins to ship a log.
    Hello {
        /// Which log.
        log: Uuid,
        /// The last record that is durable at the sender.
        durable: Option<Seq>,
    },
    /// What of it is durable at the other end.
    Welcome {
        /// The last frame.
        held: Option<FrameId>,
    },
    /// The next frame.
    Frame {
        /// The record before it in the sender's log.
        previous: Option<Seq>,
        /// The frame.
        frame: Vec<u8>,
    },
    /// How far behind the holder is, as the sender sees it.
    Standing(Standing),
    /// Asks to be sent a log.
    Follow {
        /// Which.
        log: Uuid,
        /// Whose.
        agent: AgentName,
    },
    /// What will be sent soon.
    Offer {
        /// Packed units, 1 to [`FRAME_UNITS_MAX`].
        hashes: Vec<UnitHash>,
    },
    /// Which of the oldest offer without an answer are there.
    Have {
        /// A bit each, the first the lowest.
        bits: u32,
    },
    /// The next frame, without what the holder has.
    Thin {
        /// The record before it in the sender's log.
        previous: Option<Seq>,
        /// What is left out, by group: 1 to [`FRAME_UNITS_MAX`].
        units: Vec<PackedUnit>,
        /// The rest.
        thin: Vec<u8>,
    },
    /// What is durable now.
    Ack {
        /// Everything up to here.
        durable: Option<Seq>,
        /// What comes next finds no room.
        full: bool,
    },
}

impl Message {
    /// Which kind it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Enroll { .. } => Kind::Enroll,
            Self::Enrolled { .. } => Kind::Enrolled,
            Self::Hello { .. } => Kind::Hello,
            Self::Welcome { .. } => Kind::Welcome,
            Self::Frame { .. } => Kind::Frame,
            Self::Ack { .. } => Kind::Ack,
            Self::Standing(_) => Kind::Standing,
            Self::Follow { .. } => Kind::Follow,
            Self::Offer { .. } => Kind::Offer,
            Self::Have { .. } => Kind::Have,
            Self::Thin { .. } => Kind::Thin,
        }
    }

    /// Header and body.
    pub fn encode(&self) -> Vec<u8> {
        let body = match self {
            Self::Enroll {
                right,
                secret,
                request,
            } => [&[*right as u8][..], secret, request].concat(),
            Self::Enrolled {
                certificate,
                authority,
            } => [
                &(certificate.len() as u32).to_le_bytes()[..],
                certificate,
                authority,
            ]
            .concat(),
            Self::Hello { log, durable } => [&log.as_bytes()[..], &seq_bytes(*durable)].concat(),
            Self::Welcome { held: None } => vec![0; 32],
            Self::Welcome { held: Some(id) } => [
                &seq_bytes(Some(id.first))[..],
                &seq_bytes(Some(id.last)),
                &id.hash,
            ]
            .concat(),
            Self::Frame { previous, frame } => {
                return [Shipment::head(*previous, &[], frame.len()), frame.clone()].concat();
            }
            Self::Ack { durable, full } => {
                [&seq_bytes(*durable)[..], &[u8::from(*full), 0, 0, 0, 0, 0, 0, 0]].concat()
            }
            Self::Standing(standing) => [
                seq_bytes(standing.durable),
                standing.lag_ns.to_le_bytes(),
                standing.backlog_bytes.to_le_bytes(),
            ]
            .concat(),
            Self::Follow { log, agent } => [&log.as_bytes()[..], agent.as_str().as_bytes()].concat(),
            Self::Offer { hashes } => hashes.iter().flat_map(UnitHash::as_bytes).copied().collect(),
            Self::Have { bits } => [bits.to_le_bytes(), [0; 4]].concat(),
            Self::Thin {
                previous,
                units,
                thin,
            } => return [Shipment::head(*previous, units, thin.len()), thin.clone()].concat(),
        };
        [&Header::encode(self.kind(), body.len())[..], &body].concat()
    }

    /// The message of that kind with that body.
    pub fn decode(kind: Kind, body: &[u8]) -> Result<Self, WireError> {
        let message = match kind {
            Kind::Enroll => Self::decode_enroll(body),
            Kind::Enrolled => Self::decode_enrolled(body),
            Kind::Hello if body.len() == 24 => Some(Self::Hello {
                log: Uuid::from_bytes(bytes_at(body, 0)),
                durable: Seq::new(u64_at(body, 16)),
            }),
            Kind::Welcome if body.len() == 32 => Self::decode_welcome(body),
            Kind::Frame => Shipment::parse(kind, body).map(|(previous, _, at)| Self::Frame {
                previous,
                frame: body[at..].to_vec(),
            }),
            Kind::Ack if body.len() == 16 && body[8] <= 1 && body[9..] == [0; 7] => Some(Self::Ack {
                durable: Seq::new(u64_at(body, 0)),
                full: body[8] == 1,
            }),
            Kind::Standing if body.len() == 24 => Some(Self::Standing(Standing {
                durable: Seq::new(u64_at(body, 0)),
                lag_ns: u64_at(body, 8),
                backlog_bytes: u64_at(body, 16),
            })),
            Kind::Follow => Self::decode_follow(body),
            Kind::Offer => Self::decode_offer(body),
            Kind::Have if body.len() == 8 && body[4..] == [0; 4] => Some(Self::Have {
                bits: u32_at(body, 0),
            }),
            Kind::Thin => Shipment::parse(kind, body).map(|(previous, units, at)| Self::Thin {
                previous,
                units,
                thin: body[at..].to_vec(),
            }),
            _ => None,
        };
        message.ok_or(WireError::Body(kind))
    }

    fn decode_enroll(body: &[u8]) -> Option<Self> {
        let (right, rest) = body.split_at_checked(1)?;
        let (secret, request) = rest.split_at_checked(SECRET_BYTES)?;
        Some(Self::Enroll {
            right: [Right::Append, Right::Read, Right::Follow]
                .into_iter()
                .find(|known| *known as u8 == right[0])?,
            secret: bytes_at(secret, 0),
            request: request.to_vec(),
        })
    }

    fn decode_follow(body: &[u8]) -> Option<Self> {
        let (log, agent) = body.split_at_checked(16)?;
        Some(Self::Follow {
            log: Uuid::from_bytes(bytes_at(log, 0)),
            agent: std::str::from_utf8(agent).ok()?.parse().ok()?,
        })
    }

    fn decode_offer(body: &[u8]) -> Option<Self> {
        let (hashes, rest) = body.as_chunks();
        let is_good = (1..=FRAME_UNITS_MAX).contains(&hashes.len()) && rest.is_empty();
        is_good.then(|| Self::Offer {
            hashes: hashes.iter().copied().map(UnitHash::new).collect(),
        })
    }

    fn decode_enrolled(body: &[u8]) -> Option<Self> {
        let (len, rest) = body.split_at_checked(4)?;
        let (certificate, authority) = rest.split_at_checked(u32_at(len, 0) as usize)?;
        Some(Self::Enrolled {
            certificate: certificate.to_vec(),
            authority: authority.to_vec(),
        })
    }

    fn decode_welcome(body: &[u8]) -> Option<Self> {
        if *body == [0; 32] {
            return Some(Self::Welcome { held: None });
        }
        let (first, last) = (Seq::new(u64_at(body, 0))?, Seq::new(u64_at(body, 8))?);
        let held = FrameId {
            first,
            last,
            hash: bytes_at(body, 16),
        };
        (first <= last).then_some(Self::Welcome { held: Some(held) })
    }
}

/// A `Frame` or a `Thin` as it came: the frame stays where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shipment {
    /// The Seq before it in the sender's log.
    pub(crate) previous: Option<Seq>,
    /// What is left out of it.
    pub(crate) units: Vec<PackedUnit>,
    /// The message's body, of which the frame is all from `at` on.
    pub(crate) body: Vec<u8>,
    pub(crate) at: usize,
}

impl Shipment {
    /// Of the body of a message that must be one.
    pub(crate) fn decode(kind: Kind, body: Vec<u8>) -> Result<Self, WireError> {
        if !matches!(kind, Kind::Frame | Kind::Thin) {
            let (found, expected) = (kind, Kind::Frame);
            return Err(WireError::Unexpected { found, expected });
        }
        let (previous, units, at) = Self::parse(kind, &body).ok_or(WireError::Body(kind))?;
        Ok(Self {
            previous,
            units,
            body,
            at,
        })
    }

    /// The frame, or what is left of it.
    pub(crate) fn frame(&self) -> &[u8] {
        self.body.get(self.at..).unwrap_or_default()
    }

    /// What comes before the frame: the message's header, and what its body begins with.
    pub(crate) fn head(previous: Option<Seq>, units: &[PackedUnit], frame_bytes: usize) -> Vec<u8> {
        let mut head = seq_bytes(previous).to_vec();
        if !units.is_empty() {
            head.extend_from_slice(&(units.len() as u64).to_le_bytes());
        }
        for unit in units {
            head.extend_from_slice(&unit.group.to_le_bytes());
            head.extend_from_slice(unit.hash.as_bytes());
        }
        let kind = match units.is_empty() {
            true => Kind::Frame,
            false => Kind::Thin,
        };
        [&Header::encode(kind, head.len() + frame_bytes)[..], &head].concat()
    }

    /// The Seq before, what is left out, and where the frame begins.
    fn parse(kind: Kind, body: &[u8]) -> Option<(Option<Seq>, Vec<PackedUnit>, usize)> {
        if kind == Kind::Frame {
            return (body.len() > 8).then(|| (Seq::new(u64_at(body, 0)), Vec::new(), 8));
        }
        let (head, rest) = body.split_at_checked(THIN_HEAD_BYTES)?;
        let count = u64_at(head, 8);
        if !(1..=FRAME_UNITS_MAX as u64).contains(&count) {
            return None;
        }
        let units_bytes = count as usize * THIN_UNIT_BYTES;
        let units = rest.get(..units_bytes)?;
        let units = units.chunks_exact(THIN_UNIT_BYTES).map(|unit| PackedUnit {
            group: u16_at(unit, 0),
            hash: UnitHash::new(bytes_at(unit, 2)),
        });
        Some((
            Seq::new(u64_at(head, 0)),
            units.collect(),
            THIN_HEAD_BYTES + units_bytes,
        ))
    }
}

fn seq_bytes(seq: Option<Seq>) -> [u8; 8] {
    Seq::number_of(seq).to_le_bytes()
}

/// Why an end closed a connection, as QUIC's application error code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum Close {
    /// All is said.
    Done = 0,
    /// The other end broke the rules of this format.
    Protocol = 1,
    /// The client showed no certificate.
    NoCertificate = 2,
    /// Its certificate was revoked.
    Revoked = 3,
    /// Its certificate does not allow what it asked for.
    NotAllowed = 4,
    /// A token is unknown, used or too old.
    Token = 5,
    /// What the two ends hold is not the same history.
    Diverged = 6,
    /// Another connection of the same agent took over.
    Superseded = 7,
    /// The server ends.
    Stopping = 8,
    /// The server failed; later it may not.
    Failed = 9,
    /// What a thin frame leaves out is not there any more.
    Lacking = 10,
}

impl Close {
    /// The number on the wire.
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// Would the same be said to the next attempt, until somebody does something?
    pub fn is_refusal(code: u64) -> bool {
        let refusals = [
            Self::NoCertificate,
            Self::Revoked,
            Self::NotAllowed,
            Self::Token,
            Self::Diverged,
        ];
        refusals.iter().any(|close| u64::from(close.code()) == code)
    }
}

#[cfg(test)]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
