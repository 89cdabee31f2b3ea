//! Images that are not found but made, or were made by others.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Instant;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::sidecar::key_of;
use super::{Cache, CacheError, Layer, Outcome, failed};
use crate::erofs::format::{SUPER_OFFSET, SUPER_SIZE, SuperBlock};
use crate::erofs::writer::{Plan, WriteError, Written};
use crate::layer;
use crate::tree::Tree;

impl Cache {
    /// Converts a directory that may change, for its one user.
    pub(super) fn ephemeral(&self, dir: &Path, image: &Path) -> Result<Layer, CacheError> {
        let start = Instant::now();
        let temporary = Temporary(Some(image));
        let (file, written, opaque) = self.convert(dir, image)?;
        let key = key_of(image).map_err(failed("read back image", image))?;
        let file = reopen(file, image)?;
        temporary.keep();
        Ok(Layer {
            path: image.into(),
            key,
            size: written.size,
            outcome: Outcome::Ephemeral,
            took: start.elapsed(),
            file,
            opaque,
        })
    }

    /// Writes `dir`'s image to `to`, replacing what is there; says also whether its root is opaque.
    pub(super) fn convert(&self, dir: &Path, to: &Path) -> Result<(File, Written, bool), CacheError> {
        let converting = |source| CacheError::Convert { layer: dir.into(), source };
        let tree = layer::scan(dir, &self.limits)?;
        let plan = Plan::new(&tree).map_err(converting)?;
        match fs::remove_file(to) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", to)(e)),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(to);
        let file = file.map_err(failed("create image", to))?;
        // A full disk shows now and not after half the work; not every file system can tell.
        if let Err(e @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) =
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, plan.size())
        {
            return Err(converting(WriteError::Write(e.into())));
        }
        let written = plan.write(&file).map_err(converting)?;
        file.set_permissions(fs::Permissions::from_mode(0o444)).map_err(failed("protect image", to))?;
        Ok((file, written, tree.inodes[Tree::ROOT].is_opaque()))
    }
}

/// Removes its file unless that is to be kept.
pub struct Temporary<'a>(pub Option<&'a Path>);

impl Temporary<'_> {
    /// Leaves the file where it is.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        let _ = self.0.map(fs::remove_file); // perhaps it was never created
    }
}

/// An image that a snapshotter made.
pub fn ready(path: &Path) -> Result<Layer, CacheError> {
    let start = Instant::now();
    let missing = |source| CacheError::Lower { path: path.into(), source };
    let key = key_of(path).map_err(missing)?;
    let file = File::open(path).map_err(missing)?;
    let metadata = file.metadata().map_err(missing)?;
    let wrong = |what| CacheError::Image { path: path.into(), what };
    if !metadata.is_file() {
        return Err(wrong("not a regular file"));
    }
    let mut raw = [0; SUPER_SIZE];
    let super_block = file.read_exact_at(&mut raw, SUPER_OFFSET).ok().and_then(|()| SuperBlock::decode(&raw));
    match super_block {
        None => Err(wrong("not an erofs file system")),
        Some(super_block) if super_block.extra_devices > 0 => Err(wrong("it needs further devices")),
        Some(_) => Ok(Layer {
            path: path.into(),
            key,
            size: metadata.size(),
            outcome: Outcome::Ready,
            took: start.elapsed(),
            file,
            opaque: false,
        }),
    }
}

/// A read-only descriptor for a file that was just written.
fn reopen(written: File, path: &Path) -> Result<File, CacheError> {
    drop(written);
    File::open(path).map_err(failed("open image", path))
}
