//! Any bytes are a message or an error, and a message says the same again.

#![no_main]

use cdp_journal::wire::{HEADER_BYTES, Header, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let Ok(header) = Header::decode(header) else {
        return;
    };
    assert!(header.body_bytes <= header.kind.body_bytes_max());
    if let Ok(message) = Message::decode(header.kind, body) {
        assert_eq!(&message.encode()[HEADER_BYTES..], body);
    }
});
