//! A folder with a log and an index.

mod reader;
mod writer;

pub use reader::StoreReader;
pub use writer::{Cut, Recovered, StoreWriter, VolumeState, WriterOptions};
