//! `enroll`: a token of a journal server turns into a certificate.

use cdp_journal::wire::Right;

use crate::args::Enroll;
use crate::report::Report;

pub(crate) fn run(args: &Enroll, report: &Report) -> anyhow::Result<()> {
    let Enroll {
        server,
        token,
        identity,
    } = args;
    let (path, holder) = cdp_journal::net::enroll(server, token, Right::Read, identity)?;
    report.out(format!(
        "enrolled with {server} for {holder}: {}\n",
        path.display()
    ))
}
