//! The harness of the whole-system tests: real devices, file systems and databases around the real binaries.
//!
//! A test is a claim about the product, so what lies here only sets the stage: everything that it
//! creates (loop devices, mounts, processes, folders) is a guard that takes itself down again, also
//! when a test fails, panics or is interrupted.
//!
//! Always true:
//! - Nothing here looks inside the product: it is driven by its command line alone.
//! - Only processes that were started here are signalled, by their id.
//! - Every wait has a bound and ends as soon as its condition holds.
//! - Every random choice comes from one seed, which is printed and can be given back as `CDP_SEED`.
//!
//! Knobs, all environment variables: `CDP_SEED` (replay a run), `CDP_REPS` (repetitions of each test,
//! default 1; 20 or more is the long run), `CDP_MOMENTS` (moments checked under load, default 8, in
//! the long run 50), `CDP_ROUNDS` (rounds of faults in `network`, default 6), `CDP_STATES` (crash states opened, see `tests/crash_states`), `CDP_TMP` (where
//! scenes are built, default `/var/tmp`), `CDP_KEEP=1` (leave the folder of a failed test),
//! `CDP_AGENT`, `CDP_JOURNAL` and `CDP_RESTORE` (the binaries), `CI=true` (a test that
//! cannot run here fails instead of being skipped).

pub mod agent;
pub mod commits;
pub mod device;
pub mod fingerprint;
pub mod fio;
pub mod moments;
pub mod mount;
pub mod network;
pub mod postgres;
pub mod process;
pub mod refused;
pub mod restore;
pub mod rng;
pub mod scene;
pub mod server;
pub mod small;
pub mod sqlite;
pub mod trace;
pub mod view;
pub mod workload;

pub use scene::{Scene, system_test};
