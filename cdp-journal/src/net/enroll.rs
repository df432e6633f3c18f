//! A token turns into a certificate. The key is made here and never leaves this host.

use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;

use super::identity::{self, IdentityError};
use super::link::{self, Link, LinkError};
use super::tls;
use crate::trust::{Holder, Token, fingerprint};
use crate::wire::{Kind, Message, Right};

/// How often a server is asked that gives no answer but a reset.
const ASKED_MAX: u32 = 3;

/// No certificate was had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnrollError {
    /// The server at that address is not the one that made the token.
    #[error("{server} is not the server that made this token; check the address and the token")]
    OtherServer {
        /// As it was given.
        server: String,
    },
    /// The server said no, or nothing.
    #[error("enroll with {server}")]
    Link {
        /// As it was given.
        server: String,
        /// Why.
        #[source]
        source: LinkError,
    },
    /// The folder cannot take the certificate.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A key could not be made, or the server's answer is not what was asked for.
    #[error("{0}")]
    Bad(String),
}

/// Enrols with `server` (HOST:PORT) and puts the certificate into the folder `dir`. Returns its file and whom it is
/// for. Blocks; makes a runtime of its own.
pub fn enroll(
    server: &str,
    token: &Token,
    right: Right,
    dir: &Path,
) -> Result<(PathBuf, Holder), EnrollError> {
    let was_there = dir.exists();
    let enrolled = enroll_into(server, token, right, dir);
    if enrolled.is_err() && !was_there {
        // Only if it is empty.
        let _ = std::fs::remove_dir(dir);
    }
    enrolled
}

fn enroll_into(
    server: &str,
    token: &Token,
    right: Right,
    dir: &Path,
) -> Result<(PathBuf, Holder), EnrollError> {
    let bad = |error: &dyn std::fmt::Display| EnrollError::Bad(error.to_string());
    identity::make_dir(dir)?;
    let key = KeyPair::generate().map_err(|error| bad(&error))?;
    let request = CertificateParams::default()
        .serialize_request(&key)
        .map_err(|error| bad(&error))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| bad(&error))?;
    let message = Message::Enroll {
        right,
        secret: token.secret,
        request: request.der().to_vec(),
    };
    let answer = runtime
        .block_on(ask(server, token, &message))
        .map_err(|source| match source {
            LinkError::OtherServer => EnrollError::OtherServer {
                server: server.to_owned(),
            },
            source => EnrollError::Link {
                server: server.to_owned(),
                source,
            },
        })?;
    let Message::Enrolled {
        certificate,
        authority,
    } = answer
    else {
        return Err(EnrollError::Bad("the server gave no certificate".to_owned()));
    };
    let (certificate, authority) = (CertificateDer::from(certificate), CertificateDer::from(authority));
    let holder = Holder::of(&certificate)
        .filter(|holder| holder.right == right && fingerprint(&authority) == token.authority)
        .ok_or_else(|| EnrollError::Bad("the server gave a certificate for something else".to_owned()))?;
    let path = identity::save(dir, &holder, &certificate, &authority, &key.serialize_pem())?;
    Ok((path, holder))
}

async fn ask(server: &str, token: &Token, message: &Message) -> Result<Message, LinkError> {
    insist(|| ask_once(server, token, message)).await
}

/// A server that only says that it does not know the connection any more, as it does when its refusal was lost on the
/// way, is asked again.
async fn insist<T, Answer>(mut ask: impl FnMut() -> Answer) -> Result<T, LinkError>
where
    Answer: Future<Output = Result<T, LinkError>>,
{
    for _ in 1..ASKED_MAX {
        match ask().await {
            Err(LinkError::Reset) => {}
            answer => return answer,
        }
    }
    ask().await
}

async fn ask_once(server: &str, token: &Token, message: &Message) -> Result<Message, LinkError> {
    let link = Link::connect(server, tls::enrolling_client(token.authority)?).await?;
    let (mut send, mut receive) = link.connection.open_bi().await?;
    send.write_all(&message.encode()).await?;
    let _ = send.finish();
    let answer = link::expect(&mut receive, Kind::Enrolled).await?;
    link.close().await;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a reset is no answer, anything else is, and nobody is asked for ever. Method: the answers that a server would
    /// give, in their order.
    #[tokio::test]
    async fn only_a_server_that_resets_is_asked_again() {
        let refused = || {
            Err(LinkError::Refused {
                why: "the token was used".to_owned(),
            })
        };
        let reset = || Err(LinkError::Reset);
        for (answers, asked, last) in [
            (vec![Ok(7)], 1, "Ok(7)"),
            (vec![reset(), Ok(7)], 2, "Ok(7)"),
            (vec![reset(), reset(), refused()], 3, "Err(Refused"),
            (vec![refused(), Ok(7)], 1, "Err(Refused"),
            (vec![reset(), reset(), reset(), Ok(7)], 3, "Err(Reset)"),
        ] {
            let mut answers = answers.into_iter();
            let mut times = 0;
            let answer = insist(|| {
                times += 1;
                std::future::ready(answers.next().unwrap())
            })
            .await;
            assert_eq!(times, asked);
            assert!(format!("{answer:?}").starts_with(last), "{answer:?}");
        }
    }
}
