//! The programs, in the order in which a write meets them.

mod calibrate;
mod capture;
mod complete;
mod kernel;
mod loss;
mod maps;
mod pages;

/// Steps that a walk along a bio may take: one for each of its parts and each chunk. 4 GiB in 4 KiB parts.
const STEPS_MAX: u32 = 1 << 20;
