//! What the cache knows of an image besides its bytes, and how a layer gets its key.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::UNIX_EPOCH;

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::erofs::format::{BLOCK, SUPER_OFFSET};
use crate::erofs::writer;
use crate::tar::DiffId;
use crate::verity::Verity;

/// Largest sidecar that is read: a path and a few numbers, and for a merged image a line for each layer.
const MAX: u64 = 256 << 10;

/// The JSON beside an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sidecar {
    /// Directory that it was made from, or diffID of an archive; for people.
    pub source: String,
    /// CRC-32C of the whole image, the tree behind it included. It tells damage from mere copying; against whoever can write here, no digest beside the image
    /// would help, and SHA-256 costs as much CPU as all the rest of a conversion.
    ///
    /// `None` until somebody has read all of an image that shares its blocks with the layer's files.
    #[serde(default)]
    pub checksum: Option<u32>,
    /// It is a copy of an image that others made, or of the data of one: what it holds is theirs to know.
    #[serde(default)]
    pub foreign: bool,
    /// Its digest by fs-verity, if the file system protects it so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs_verity: Option<String>,
    /// The tree of digests behind it, if it has one.
    #[serde(default)]
    pub verity: Option<Verity>,
    /// Inodes in the image.
    pub inodes: u64,
    /// The root directory is opaque: layers below do not count.
    pub opaque: bool,
    /// The layers that it is a merged image of, the lowest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Part>,
    /// What the image file looked like when it was published.
    pub stamp: Stamp,
}

/// A layer of a merged image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its key.
    pub key: String,
    /// Bytes of its own image.
    pub size: u64,
    /// Its image holds data of the merged one, and is a device of it.
    pub device: bool,
}

/// Cheap signs that a file is still the one that was published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Bytes.
    pub size: u64,
    /// Inode number.
    pub inode: u64,
    /// Modification time, seconds.
    pub mtime: i64,
    /// Modification time, nanoseconds.
    pub mtime_nsec: i64,
    /// CRC-32C over the superblock's block.
    pub super_block: u32,
}

impl Stamp {
    /// Takes the signs of an open image.
    pub fn of(image: &File) -> io::Result<Stamp> {
        let metadata = image.metadata()?;
        let mut block = [0; (BLOCK - SUPER_OFFSET) as usize];
        image.read_exact_at(&mut block, SUPER_OFFSET)?;
        Ok(Stamp {
            size: metadata.size(),
            inode: metadata.ino(),
            mtime: metadata.mtime(),
            mtime_nsec: metadata.mtime_nsec(),
            super_block: crc32c::crc32c(&block),
        })
    }
}

impl Sidecar {
    /// Reads one; returns also its file.
    pub fn read(path: &Path) -> io::Result<(Sidecar, File)> {
        let file = File::open(path)?;
        let mut text = Vec::new();
        Read::by_ref(&mut &file).take(MAX).read_to_end(&mut text)?;
        Ok((serde_json::from_slice(&text)?, file))
    }

    /// Puts one in place by rename.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let temp = path.with_extension("json.tmp");
        fs::write(&temp, serde_json::to_vec(self)?)?;
        fs::rename(&temp, path).inspect_err(|_| drop(fs::remove_file(&temp)))
    }
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|&b| [b >> 4, b & 15]).map(|digit| DIGITS[usize::from(digit)] as char).collect()
}

/// The key of an archive: as above, and never that of a directory.
pub fn key_of_archive(diff_id: DiffId) -> String {
    let mut hash = Sha256::new();
    hash.update(writer::VERSION.to_le_bytes());
    hash.update(diff_id.to_string());
    hex(&hash.finalize())
}

/// The key of the merged image of layers, by their keys from the bottom up.
pub fn key_of_merged<'k>(keys: impl Iterator<Item = &'k str>) -> String {
    let mut hash = Sha256::new();
    hash.update(writer::VERSION.to_le_bytes());
    // Which layers are devices: to be changed when `merge` decides otherwise.
    hash.update("2");
    for key in keys {
        hash.update("+");
        hash.update(key);
    }
    hex(&hash.finalize())
}

/// The key of what is at `path` now: 64 hexadecimal digits.
pub fn key_of(path: &Path) -> io::Result<String> {
    // The path is walked once and its real name asked of the kernel: a stack of layers has a hundred of them.
    let dir = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let file_system = rustix::fs::fstatvfs(&dir)?.f_fsid;
    let path = fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd()))?;
    let metadata = File::from(dir).metadata()?;
    // Not every file system keeps a time of birth; the change time alone tells a reused directory apart as well.
    let born = metadata.created().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
    let mut hash = Sha256::new();
    hash.update(writer::VERSION.to_le_bytes());
    hash.update(file_system.to_le_bytes());
    hash.update(metadata.ino().to_le_bytes());
    hash.update(born.to_le_bytes());
    hash.update(metadata.ctime().to_le_bytes());
    hash.update(metadata.ctime_nsec().to_le_bytes());
    hash.update(path.as_os_str().as_bytes());
    Ok(hex(&hash.finalize()))
}
