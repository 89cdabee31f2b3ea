//! fs-verity: where the cache's file system has it, the node's kernel checks every block of an image as it is read (a flipped
//! bit is an I/O error then, for the VMM and so for its guest), and nobody can write to it any more.
//!
//! ext4 has it as a feature of the file system (`tune2fs -O verity`), btrfs and f2fs always. The digests are SHA-256 over blocks
//! of 4 KiB, kept by the file system; an image is read in full for them, so that happens beside the pod that runs.
//! Source: the kernel's `Documentation/filesystems/fsverity.rst`.

use std::fs::File;
use std::io;

use composefs_ioctls::fsverity::{EnableVerityError, MeasureVerityError, fs_ioc_enable_verity, fs_ioc_measure_verity};
use rustix::io::Errno;

use super::sidecar::hex;

/// `FS_VERITY_HASH_ALG_SHA256`.
const SHA_256: u8 = 1;
const BLOCK: u32 = 4096;

/// Protects an image that nobody has open for writing; gives its digest, 64 hexadecimal digits. `None`: the file system cannot.
pub fn protect(image: &File) -> io::Result<Option<String>> {
    match fs_ioc_enable_verity(image, SHA_256, BLOCK) {
        Ok(()) | Err(EnableVerityError::AlreadyEnabled) => digest(image),
        Err(EnableVerityError::FilesystemNotSupported) => Ok(None),
        Err(EnableVerityError::FileOpenedForWrite) => Err(Errno::TXTBSY.into()),
        Err(EnableVerityError::SignatureVerificationFailed) => Err(Errno::KEYREJECTED.into()),
        Err(EnableVerityError::Io(e)) => Err(e),
    }
}

/// The digest of an image that is protected; the kernel keeps it, nothing is read.
pub fn digest(image: &File) -> io::Result<Option<String>> {
    match fs_ioc_measure_verity::<32>(image, SHA_256) {
        Ok(digest) => Ok(Some(hex(&digest))),
        Err(MeasureVerityError::VerityMissing | MeasureVerityError::FilesystemNotSupported) => Ok(None),
        Err(MeasureVerityError::Io(e)) => Err(e),
        Err(other) => Err(io::Error::other(other)),
    }
}
