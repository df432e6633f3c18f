//! A one-time token, as text.
//!
//! `cdp1-SECRET-AUTHORITY`: the secret (32 hexadecimal digits) and the fingerprint of the server's authority (64), so
//! that the client knows the server before it trusts it with the secret.

use std::fmt;
use std::str::FromStr;

use crate::wire::SECRET_BYTES;

/// Turns into a certificate, once.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Known to who was given the token, and hashed to the server.
    pub secret: [u8; SECRET_BYTES],
    /// Of the server that gave it.
    pub authority: [u8; 32],
}

/// A text is not a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("that is not a token: it is one line cdp1-…-… that `cdp-journal token` printed; copy all of it")]
pub struct BadToken;

impl Token {
    /// A new one.
    pub fn generate(authority: [u8; 32]) -> std::io::Result<Self> {
        let mut secret = [0; SECRET_BYTES];
        let filled = rustix::rand::getrandom(&mut secret, rustix::rand::GetRandomFlags::empty())?;
        if filled < SECRET_BYTES {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self { secret, authority })
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cdp1-{}-{}", hex(&self.secret), hex(&self.authority))
    }
}

/// Without the secret: it must not come into a log.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").finish_non_exhaustive()
    }
}

impl FromStr for Token {
    type Err = BadToken;

    fn from_str(text: &str) -> Result<Self, BadToken> {
        let parts = text
            .trim()
            .strip_prefix("cdp1-")
            .and_then(|rest| rest.split_once('-'));
        let (secret, authority) = parts.ok_or(BadToken)?;
        Ok(Self {
            secret: unhex(secret).ok_or(BadToken)?,
            authority: unhex(authority).ok_or(BadToken)?,
        })
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_printed_and_nothing_else_is_one() {
        let token = Token::generate([5; 32]).unwrap();
        let text = token.to_string();
        assert_eq!(text.parse(), Ok(token.clone()));
        assert_eq!(format!(" {text}\n").parse(), Ok(token));
        for bad in [
            "",
            "cdp1-",
            &text[..100],
            &text.replace("cdp1", "cdp2"),
            "cdp1-é-é",
        ] {
            assert_eq!(bad.parse::<Token>(), Err(BadToken), "{bad}");
        }
    }
}
