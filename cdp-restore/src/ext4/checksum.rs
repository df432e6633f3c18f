//! CRC-32C as ext4 and its journal use it: begun with a seed, and not inverted at the end.

/// What checksums of a kind go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seed(u32);

impl Seed {
    pub(super) const ONES: Seed = Seed(u32::MAX);

    pub(super) fn of(value: u32) -> Self {
        Seed(value)
    }

    /// The seed after so many more bytes.
    pub(super) fn add(self, bytes: &[u8]) -> Self {
        Seed(!crc32c::crc32c_append(!self.0, bytes))
    }

    /// The checksum of what was added.
    pub(super) fn value(self) -> u32 {
        self.0
    }
}
