//! `enroll`: a token of a journal server turns into a certificate.

use std::io::Write as _;
use std::path::Path;

use cdp_journal::trust::Token;
use cdp_journal::wire::Right;

/// Gets the certificate and says where it lies.
pub(crate) fn run(server: &str, token: &Token, identity: &Path) -> anyhow::Result<()> {
    let (path, holder) = cdp_journal::net::enroll(server, token, Right::Append, identity)?;
    writeln!(
        std::io::stdout(),
        "enrolled with {server} as {holder}: {}",
        path.display()
    )?;
    Ok(())
}
