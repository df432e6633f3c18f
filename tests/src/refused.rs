//! Moments that cannot be restored, and what the refusal says.

use anyhow::{Context, Result, ensure};

use crate::moments::{QuietMoment, WallNs};
use crate::process::Outcome;
use crate::restore::{NOT_EXACT, Restore};
use crate::scene::Scene;

/// A moment inside a gap: exit code 3, nothing written, the cause named, and exact moments named that can
/// indeed be restored; the nearest one before is not older than `before`.
pub fn expect_refused(
    scene: &Scene,
    restore: &Restore,
    at: WallNs,
    cause: &str,
    before: &QuietMoment,
) -> Result<()> {
    let image = scene.path("refused");
    let refused = restore
        .image("v", &at.to_string(), &image)?
        .expect_code(NOT_EXACT)?
        .expect_message(&[cause])?;
    ensure!(
        !image.exists(),
        "a refused image was written\n{}",
        refused.transcript()
    );
    let named = times_named(&refused);
    let earlier = named.iter().filter(|time| time.0 < at).max();
    let (nearest, text) =
        earlier.with_context(|| format!("no exact moment before is named\n{}", refused.transcript()))?;
    ensure!(
        *nearest >= before.from,
        "{text} is older than an exact moment at {}",
        before.from
    );
    restore
        .image("v", text, &image)?
        .success()
        .context("the moment that the message recommends")?;
    std::fs::remove_file(&image).context("remove the image")
}

/// Every RFC 3339 time in a message.
fn times_named(outcome: &Outcome) -> Vec<(WallNs, String)> {
    let words = outcome
        .stderr
        .split(|c: char| c.is_whitespace() || "(),;\"'`".contains(c));
    let words = words.map(|word| word.trim_end_matches(['.', ':']));
    words
        .filter_map(|word| Some((WallNs::parse(word).ok()?, word.to_owned())))
        .collect()
}
