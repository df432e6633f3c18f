//! cdp-restore
fn main() {}
