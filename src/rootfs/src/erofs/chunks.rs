//! Sparse files: which chunks of a file are stored.
//!
//! ```text
//!  file    |--data--|........hole........|-data-|..........|
//!  chunks  |   0    |   1    |   2    |   3    |   4    |
//!  map     |   b    |  none  |  none  |  b + 2 |  none  |      stored: chunk 0, chunk 3
//! ```

use std::ops::Range;

use super::format::{BLOCK, BLOCK_BITS, CHUNK_BITS_MASK};
use super::writer::INLINE_MAX;

/// Blocks that `range` fills, its start being at a block's start.
pub fn blocks(range: &Range<u64>) -> u64 {
    (range.end - range.start).div_ceil(BLOCK)
}

/// The chunks of a file of `size` bytes in order: `Some(bytes of the file)` where any of `extents` (sorted) touches the chunk.
pub fn map(extents: &[Range<u64>], size: u64, bits: u8) -> impl Iterator<Item = Option<Range<u64>>> {
    let mut rest = extents;
    (0..size.div_ceil(1 << bits)).map(move |index| {
        let start = index << bits;
        let end = size.min(start + (1 << bits));
        while let [first, others @ ..] = rest
            && first.end <= start
        {
            rest = others;
        }
        rest.first().filter(|extent| extent.start < end).map(|_| start..end)
    })
}

/// How a file is stored: `log2` of its chunk size, or 0 for in one piece.
pub fn bits_for(extents: Option<&[Range<u64>]>, size: u64) -> u8 {
    extents.filter(|_| size > INLINE_MAX).map_or(0, |extents| best_bits(extents, size))
}

/// `log2` of the chunk size that makes map and stored chunks smallest together; 0 when storing the file whole is no larger.
fn best_bits(extents: &[Range<u64>], size: u64) -> u8 {
    let whole = size.next_multiple_of(BLOCK);
    (BLOCK_BITS..=BLOCK_BITS + CHUNK_BITS_MASK as u8)
        .map(|bits| (cost(extents, size, bits), bits))
        .min()
        .filter(|&(cost, _)| cost < whole)
        .map_or(0, |(_, bits)| bits)
}

/// Bytes of map and chunks.
fn cost(extents: &[Range<u64>], size: u64, bits: u8) -> u64 {
    let mut stored = 0;
    let mut covered = 0; // chunks below this one are counted
    for extent in extents {
        let first = covered.max(extent.start >> bits);
        let end = extent.end.min(size).div_ceil(1 << bits);
        if end > first {
            stored += size.min(end << bits) - (first << bits);
            covered = end;
        }
    }
    stored + size.div_ceil(1 << bits) * 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_names_the_touched_chunks() {
        let extents = [0..4096, 20_480..24_576];
        let map: Vec<_> = map(&extents, 30_000, 13).collect();
        assert_eq!(map, [Some(0..8192), None, Some(16_384..24_576), None]);
        assert!(super::map(&[], 0, 12).next().is_none());
    }

    #[test]
    fn chunk_size_suits_the_file() {
        assert_eq!(best_bits(&[], 1 << 33), 33, "all hole: one chunk");
        assert_eq!(best_bits(&[0..4096, 4096..8192], 8192), 0, "no hole");
        let bits = best_bits(&[0..4096, (1 << 33) - 4096..1 << 33], 1 << 33);
        assert!((16..=24).contains(&bits), "{bits}");
        assert_eq!(best_bits(&[4096..8192, 8192..8193], 1 << 14), 12);
    }

    #[test]
    fn cost_agrees_with_the_map() {
        let extents = [5000..6000, 9000..9001, 100_000..140_000, 150_000..150_001];
        for bits in 12..20 {
            let size = 160_123;
            let stored: u64 = map(&extents, size, bits).flatten().map(|r| r.end - r.start).sum();
            assert_eq!(cost(&extents, size, bits), stored + 4 * map(&extents, size, bits).count() as u64);
        }
    }
}
