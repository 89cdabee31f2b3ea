//! Hash trees behind images, by which a guest's kernel checks what it reads (dm-verity).
//!
//! ```text
//!  byte 0                          blocks * 4096                                              end
//!  | image                         | top: 1 block | …  | bottom: one digest for each block    |
//!
//!  digest of the top block = root
//! ```
//!
//! The format is that of the kernel's `Documentation/admin-guide/device-mapper/verity.rst`: version 1, SHA-256, blocks of 4096 bytes,
//! no salt and no superblock, levels from the top down. Digests fill a block without gaps; the rest of the last one is zero. An
//! image of one block has no tree: its digest is the root.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::erofs::format::BLOCK;

const BLOCK_LEN: usize = BLOCK as usize;
/// Bytes of a digest.
const DIGEST: usize = 32;
/// Bytes that are read at a time; whole blocks.
const PIECE: usize = 256 << 10;

/// What a guest has to know to check an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verity {
    /// Blocks of the image, behind which the tree lies.
    pub blocks: u64,
    /// SHA-256 of the tree's top block, 64 hexadecimal digits.
    pub root: String,
}

/// Appends the tree of what is in `image`; returns also the CRC-32C of the whole file, where `checksum` is what it was without.
///
/// # Errors
/// What reading or writing gives; [`io::ErrorKind::InvalidData`] for an image that is empty or ends within a block.
pub fn append(image: &File, checksum: u32) -> io::Result<(Verity, u32)> {
    let size = image.metadata()?.len();
    if size == 0 || !size.is_multiple_of(BLOCK) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an image is one or more whole blocks"));
    }
    let mut levels = vec![bottom(image, size)?];
    while let Some(below) = levels.last().filter(|level| level.len() > DIGEST) {
        levels.push(below.chunks(BLOCK_LEN).flat_map(digest).collect());
    }
    let root = levels.pop().unwrap_or_default();
    let tree: Vec<u8> = levels.into_iter().rev().flat_map(padded).collect();
    image.write_all_at(&tree, size)?;
    let root = root.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((Verity { blocks: size / BLOCK, root }, crc32c::crc32c_append(checksum, &tree)))
}

/// The digests of an image's blocks.
fn bottom(image: &File, size: u64) -> io::Result<Vec<u8>> {
    let mut digests = Vec::with_capacity(usize::try_from(size / BLOCK).unwrap_or(0) * DIGEST);
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < size {
        let piece = &mut buffer[..usize::try_from(size - at).map_or(PIECE, |left| left.min(PIECE))];
        image.read_exact_at(piece, at)?;
        digests.extend(piece.chunks(BLOCK_LEN).flat_map(digest));
        at += piece.len() as u64;
    }
    Ok(digests)
}

/// The digest of a block, of which all that is missing is zero.
fn digest(block: &[u8]) -> [u8; DIGEST] {
    const ZEROS: [u8; BLOCK_LEN] = [0; BLOCK_LEN];
    let hash = Sha256::new().chain_update(block).chain_update(&ZEROS[block.len().min(BLOCK_LEN)..]);
    hash.finalize().into()
}

fn padded(mut level: Vec<u8>) -> Vec<u8> {
    level.resize(level.len().next_multiple_of(BLOCK_LEN), 0);
    level
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image of blocks that all differ.
    fn image(blocks: u64) -> File {
        let image = tempfile::tempfile().expect("file");
        for n in 0..blocks {
            image.write_all_at(&vec![(n % 251) as u8; BLOCK_LEN], n * BLOCK).expect("write");
        }
        image
    }

    /// Blocks, blocks of the tree, root: as `veritysetup format --no-superblock --salt=- --hash-offset=SIZE FILE FILE` of cryptsetup 2.6 prints it.
    const VERITYSETUP: [(u64, u64, &str); 4] = [
        (2, 1, "dd9c4d99ab2332f88ff3bd4cb99e3db16fea710ecbc8cef4b7e237fc5765401b"),
        (128, 1, "eade1212c3a6dd9dd817bf456bf067c41cdb483af154c5d0890d32744b7e4f6b"),
        (129, 3, "f0dbc433d6188c4e8e30ee2de31ee90ab1edf2fd7438d97feab12f75375886ad"),
        (16385, 132, "782e251d56bb96c667a59e2bcd44726d659bd335a49621cbfc23c1f2715e725d"),
    ];

    #[test]
    fn roots_are_those_of_veritysetup() {
        for (blocks, levels, root) in VERITYSETUP {
            let image = image(blocks);
            let (verity, checksum) =
                append(&image, crate::erofs::reader::checksum(&image).expect("sum")).expect("tree");
            assert_eq!((verity.blocks, verity.root.as_str()), (blocks, root));
            assert_eq!(image.metadata().expect("metadata").len(), (blocks + levels) * BLOCK);
            assert_eq!(crate::erofs::reader::checksum(&image).expect("sum"), checksum);
        }
    }

    #[test]
    fn whole_blocks_only() {
        let image = tempfile::tempfile().expect("file");
        assert_eq!(append(&image, 0).expect_err("empty").kind(), io::ErrorKind::InvalidData);
        image.set_len(BLOCK + 1).expect("grow");
        assert_eq!(append(&image, 0).expect_err("odd").kind(), io::ErrorKind::InvalidData);
    }
}
