use proptest::prelude::*;

use super::*;

fn seq(number: u64) -> Seq {
    Seq::new(number).unwrap()
}

fn header_and_body(bytes: &[u8]) -> (Header, &[u8]) {
    let header = Header::decode(&bytes_at(bytes, 0)).unwrap();
    assert_eq!(header.body_bytes, bytes.len() - HEADER_BYTES);
    (header, &bytes[HEADER_BYTES..])
}

/// Goal: nobody changes the format without noticing.
#[test]
fn wire_2_is_exactly_these_bytes() {
    let messages = [
        (
            Message::Enroll {
                right: Right::Read,
                secret: [7; 16],
                request: vec![1, 2],
            },
            "010000001300000002070707070707070707070707070707070102",
        ),
        (
            Message::Enrolled {
                certificate: vec![3],
                authority: vec![4, 5],
            },
            "020000000700000001000000030405",
        ),
        (
            Message::Hello {
                log: Uuid::from_bytes([9; 16]),
                durable: Some(seq(258)),
            },
            "1000000018000000090909090909090909090909090909090201000000000000",
        ),
        (
            Message::Welcome {
                held: Some(FrameId {
                    first: seq(1),
                    last: seq(2),
                    hash: [6; 16],
                }),
            },
            "11000000200000000100000000000000020000000000000006060606060606060606060606060606",
        ),
        (
            Message::Frame {
                previous: None,
                frame: vec![8],
            },
            "1200000009000000000000000000000008",
        ),
        (
            Message::Ack {
                durable: Some(seq(3)),
                full: true,
            },
            "130000001000000003000000000000000100000000000000",
        ),
        (
            Message::Standing(Standing {
                durable: Some(seq(4)),
                lag_ns: 5,
                backlog_bytes: 6,
            }),
            "1400000018000000040000000000000005000000000000000600000000000000",
        ),
        (
            Message::Follow {
                log: Uuid::from_bytes([9; 16]),
                agent: "web01".parse().unwrap(),
            },
            "1500000015000000090909090909090909090909090909097765623031",
        ),
        (
            Message::Offer {
                hashes: vec![UnitHash::new([1; 32]), UnitHash::new([2; 32])],
            },
            "1600000040000000\
             0101010101010101010101010101010101010101010101010101010101010101\
             0202020202020202020202020202020202020202020202020202020202020202",
        ),
        (
            Message::Have { bits: 0x8000_0001 },
            "17000000080000000100008000000000",
        ),
        (
            Message::Thin {
                previous: Some(seq(5)),
                units: vec![PackedUnit {
                    group: 258,
                    hash: UnitHash::new([3; 32]),
                }],
                thin: vec![8, 9],
            },
            "180000003400000005000000000000000100000000000000\
             02010303030303030303030303030303030303030303030303030303030303030303\
             0809",
        ),
    ];
    for (message, golden) in messages {
        let bytes = message.encode();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, golden, "{message:?}");
        let (header, body) = header_and_body(&bytes);
        assert_eq!(Message::decode(header.kind, body), Ok(message));
    }
    assert_eq!(
        FrameId::of(seq(1), seq(2), b"head").hash[..4],
        [53, 241, 234, 0],
        "the first bytes of the BLAKE3 hash"
    );
}

#[test]
fn lengths_beyond_their_bound_are_refused_before_anything_is_read() {
    for kind in KINDS {
        let max = kind.body_bytes_max();
        let header = Header::encode(kind, max);
        assert_eq!(
            Header::decode(&header),
            Ok(Header {
                kind,
                body_bytes: max
            })
        );
        let mut header = header;
        header[4..].copy_from_slice(&(max as u32 + 1).to_le_bytes());
        assert!(
            matches!(Header::decode(&header), Err(WireError::TooLong { .. })),
            "{kind:?}"
        );
    }
    assert_eq!(Header::decode(&[0; 8]), Err(WireError::Kind(0)));
    assert_eq!(
        Header::decode(&[16, 1, 0, 0, 0, 0, 0, 0]),
        Err(WireError::Kind(16))
    );
}

fn any_seq() -> impl Strategy<Value = Option<Seq>> {
    any::<u64>().prop_map(Seq::new)
}

fn any_bytes(range: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), range)
}

fn any_hash() -> impl Strategy<Value = UnitHash> {
    any::<[u8; 32]>().prop_map(UnitHash::new)
}

fn any_message() -> impl Strategy<Value = Message> {
    let held = (1..u64::MAX, any::<u16>(), any::<[u8; 16]>()).prop_map(|(first, more, hash)| {
        Some(FrameId {
            first: seq(first),
            last: seq(first.saturating_add(u64::from(more))),
            hash,
        })
    });
    prop_oneof![
        (any::<[u8; SECRET_BYTES]>(), any_bytes(0..100)).prop_map(|(secret, request)| Message::Enroll {
            right: Right::Append,
            secret,
            request
        }),
        (any_bytes(0..100), any_bytes(0..100)).prop_map(|(certificate, authority)| Message::Enrolled {
            certificate,
            authority
        }),
        (any::<[u8; 16]>(), any_seq()).prop_map(|(log, durable)| Message::Hello {
            log: Uuid::from_bytes(log),
            durable
        }),
        prop_oneof![Just(None), held].prop_map(|held| Message::Welcome { held }),
        (any_seq(), any_bytes(1..300)).prop_map(|(previous, frame)| Message::Frame { previous, frame }),
        (any_seq(), any::<bool>()).prop_map(|(durable, full)| Message::Ack { durable, full }),
        (any_seq(), any::<u64>(), any::<u64>()).prop_map(|(durable, lag_ns, backlog_bytes)| {
            Message::Standing(Standing {
                durable,
                lag_ns,
                backlog_bytes,
            })
        }),
        (any::<[u8; 16]>(), "[a-z0-9][a-z0-9._-]{0,63}").prop_map(|(log, agent)| Message::Follow {
            log: Uuid::from_bytes(log),
            agent: agent.parse().unwrap(),
        }),
        proptest::collection::vec(any_hash(), 1..=FRAME_UNITS_MAX)
            .prop_map(|hashes| Message::Offer { hashes }),
        any::<u32>().prop_map(|bits| Message::Have { bits }),
        (
            any_seq(),
            proptest::collection::vec((any::<u16>(), any_hash()), 1..=FRAME_UNITS_MAX),
            any_bytes(0..300)
        )
            .prop_map(|(previous, units, thin)| Message::Thin {
                previous,
                units: units
                    .into_iter()
                    .map(|(group, hash)| PackedUnit { group, hash })
                    .collect(),
                thin,
            }),
    ]
}

proptest! {
    /// Goal: a frame that is not copied is taken for what the message says.
    #[test]
    fn a_shipment_is_the_message_that_it_came_in(message in any_message()) {
        let bytes = message.encode();
        let (header, body) = header_and_body(&bytes);
        let shipment = Shipment::decode(header.kind, body.to_vec());
        match message {
            Message::Frame { previous, frame } => {
                let shipment = shipment.unwrap();
                prop_assert_eq!(shipment.frame(), &frame[..]);
                prop_assert_eq!((shipment.previous, shipment.units), (previous, vec![]));
            }
            Message::Thin { previous, units, thin } => {
                let shipment = shipment.unwrap();
                prop_assert_eq!(shipment.frame(), &thin[..]);
                prop_assert_eq!((shipment.previous, shipment.units), (previous, units));
            }
            _ => prop_assert!(shipment.is_err()),
        }
    }

    #[test]
    fn what_was_encoded_is_what_is_decoded(message in any_message()) {
        let bytes = message.encode();
        let (header, body) = header_and_body(&bytes);
        prop_assert_eq!(header.kind, message.kind());
        prop_assert_eq!(Message::decode(header.kind, body), Ok(message));
    }

    /// Goal: no bytes of a stranger panic, or are taken for more than they are.
    #[test]
    fn any_bytes_are_a_message_or_an_error(header in any::<[u8; 8]>(), body in any_bytes(0..200)) {
        if let Ok(header) = Header::decode(&header) {
            prop_assert!(header.body_bytes <= header.kind.body_bytes_max());
        }
        for kind in KINDS {
            if let Ok(message) = Message::decode(kind, &body) {
                let encoded = message.encode();
                prop_assert_eq!(&encoded[HEADER_BYTES..], &body[..]);
            }
        }
    }
}
