//! cdp-agent
fn main() {}
