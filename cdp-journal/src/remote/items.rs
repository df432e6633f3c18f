//! Stretches of a view and versions of blocks, as bytes.

use crate::format::{u16_at, u32_at, u64_at};
use crate::index::{BlockVersion, Place, Version};
use crate::view::{GroupRange, Item};
use crate::wire::{ITEM_BYTES, PLACE_BYTES};

pub(crate) fn encode_item(item: &Item, out: &mut Vec<u8>) {
    let numbers = |out: &mut Vec<u8>, segment: u64, rest: [u32; 3]| {
        out.extend_from_slice(&segment.to_le_bytes());
        for number in rest {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&[0; 4]);
    };
    out.extend_from_slice(&item.offset.to_le_bytes());
    out.extend_from_slice(&item.len.to_le_bytes());
    match &item.data {
        None => numbers(out, 0, [0; 3]),
        Some(data) => {
            let Place {
                segment,
                group_offset,
                group_crc,
                ..
            } = data.place;
            numbers(out, segment, [group_offset, group_crc, data.in_group]);
        }
    }
}

/// `None` if the bytes are no row of stretches.
pub(crate) fn decode_items(bytes: &[u8]) -> Option<Vec<Item>> {
    let chunks = bytes.chunks_exact(ITEM_BYTES);
    if !chunks.remainder().is_empty() {
        return None;
    }
    let items = chunks.map(|bytes| {
        let segment = u64_at(bytes, 16);
        let data = (segment != 0).then(|| GroupRange {
            place: Place {
                segment,
                group_offset: u32_at(bytes, 24),
                group_crc: u32_at(bytes, 28),
                first_sector: 0,
            },
            in_group: u32_at(bytes, 32),
        });
        Item {
            offset: u64_at(bytes, 0),
            len: u64_at(bytes, 8),
            data,
        }
    });
    Some(items.collect())
}

/// What lies at an offset of a segment.
pub(crate) fn encode_placed(segment: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&segment.to_le_bytes()[..], &offset.to_le_bytes(), bytes].concat()
}

/// A segment, an offset in it, and what lies there. `None` if the bytes are too few.
pub(crate) fn decode_placed(bytes: &[u8]) -> Option<(u64, u64, &[u8])> {
    let (place, bytes) = bytes.split_at_checked(PLACE_BYTES)?;
    Some((u64_at(place, 0), u64_at(place, 8), bytes))
}

pub(crate) fn encode_version(version: &BlockVersion, out: &mut Vec<u8>) {
    out.extend_from_slice(&version.seq.to_le_bytes());
    let mut value = Vec::new();
    version.version.encode(&mut value);
    out.extend_from_slice(&(value.len() as u16).to_le_bytes());
    out.extend_from_slice(&value);
}

/// `None` if the bytes are no row of versions.
pub(crate) fn decode_versions(bytes: &[u8]) -> Option<Vec<BlockVersion>> {
    let mut versions = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (head, tail) = rest.split_at_checked(10)?;
        let (value, tail) = tail.split_at_checked(usize::from(u16_at(head, 8)))?;
        versions.push(BlockVersion {
            seq: u64_at(head, 0),
            version: Version::decode(value)?,
        });
        rest = tail;
    }
    Some(versions)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_item() -> impl Strategy<Value = Item> {
        let data = (1..u64::MAX, any::<u32>(), any::<u32>(), any::<u32>()).prop_map(
            |(segment, group_offset, group_crc, in_group)| GroupRange {
                place: Place {
                    segment,
                    group_offset,
                    group_crc,
                    first_sector: 0,
                },
                in_group,
            },
        );
        (any::<u64>(), any::<u64>(), proptest::option::of(data)).prop_map(|(offset, len, data)| Item {
            offset,
            len,
            data,
        })
    }

    proptest! {
        #[test]
        fn items_are_decoded_as_they_were(items in proptest::collection::vec(any_item(), 0..20)) {
            let mut bytes = Vec::new();
            items.iter().for_each(|item| encode_item(item, &mut bytes));
            prop_assert_eq!(bytes.len(), items.len() * ITEM_BYTES);
            prop_assert_eq!(decode_items(&bytes), Some(items));
        }

        #[test]
        fn any_bytes_are_items_and_versions_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let items = decode_items(&bytes);
            prop_assert_eq!(items.is_some(), bytes.len() % ITEM_BYTES == 0);
            decode_versions(&bytes);
        }
    }

    /// Goal: nobody changes the format without noticing.
    #[test]
    fn an_item_is_exactly_these_bytes() {
        let mut bytes = Vec::new();
        let place = Place {
            segment: 3,
            group_offset: 4,
            group_crc: 5,
            first_sector: 0,
        };
        let data = Some(GroupRange { place, in_group: 6 });
        let (offset, len) = (1, 2);
        encode_item(&Item { offset, len, data }, &mut bytes);
        let numbers = [1, 0, 2, 0, 3, 0, 4, 5, 6, 0];
        let golden: Vec<u8> = numbers
            .iter()
            .flat_map(|number: &u32| number.to_le_bytes())
            .collect();
        assert_eq!(bytes, golden);
    }
}
