//! try
mod capture;
mod event;
fn main() -> anyhow::Result<()> {
    let p = capture::Probe::load(1<<20)?;
    println!("{p:?} {}", p.recursion_misses()?);
    Ok(())
}
