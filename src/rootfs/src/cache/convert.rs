//! Images that are not found but made, or were made by others.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::sidecar::key_of;
use super::{Cache, CacheError, Layer, Outcome, failed};
use crate::erofs::format::{SUPER_OFFSET, SUPER_SIZE, SuperBlock};
use crate::erofs::sink::can_share;
use crate::erofs::writer::{Plan, WriteError, Written};
use crate::layer;
use crate::tar::{self, DiffId, Hashing, TarError};
use crate::trace::Step;
use crate::tree::Tree;

impl Cache {
    /// The image that has been written for its one user since `start`.
    pub(super) fn ephemeral_layer(&self, image: &Path, opaque: bool, start: Instant) -> Result<Layer, CacheError> {
        let writable = |image| OpenOptions::new().read(true).write(true).open(image);
        let verity = match self.verity {
            true => writable(image).and_then(|file| self.seal(&file, 0)).map_err(failed("seal image", image))?.0,
            false => None,
        };
        let key = key_of(image).map_err(failed("read back image", image))?;
        let file = reopen(image)?;
        Ok(Layer {
            path: image.into(),
            key,
            size: file.metadata().map_err(failed("read back image", image))?.len(),
            outcome: Outcome::Ephemeral,
            took: start.elapsed(),
            devices: Vec::new(),
            data: Vec::new(),
            verity,
            parts: Vec::new(),
            file,
            opaque,
        })
    }

    /// Converts a directory that may change, for its one user.
    pub(super) fn ephemeral(&self, dir: &Path, image: &Path) -> Result<Layer, CacheError> {
        let start = Instant::now();
        let temporary = Temporary(Some(image));
        let (_, _, opaque) = self.convert(dir, image)?;
        let layer = self.ephemeral_layer(image, opaque, start)?;
        temporary.keep();
        Ok(layer)
    }

    /// Writes `dir`'s image to `to`, replacing what is there; says also whether its root is opaque.
    pub(super) fn convert(&self, dir: &Path, to: &Path) -> Result<(File, Written, bool), CacheError> {
        let step = Step::layer(dir.display());
        self.write(dir, &layer::scan(dir, &self.limits)?, to, &step)
    }

    /// The same, with what is in it.
    pub(super) fn convert_tree(&self, dir: &Path, tree: &Tree, to: &Path) -> Result<(File, Written, bool), CacheError> {
        self.write(dir, tree, to, &Step::layer(dir.display()))
    }

    fn write(&self, dir: &Path, tree: &Tree, to: &Path, step: &Step) -> Result<(File, Written, bool), CacheError> {
        let converting = |source| CacheError::Convert { layer: dir.into(), source };
        let plan = Plan::new(tree).map_err(converting)?;
        let file = create(to)?;
        // A full disk shows now and not after half the work; not every file system can tell. Blocks that will be shared take no room,
        // and btrfs would keep what was set aside for them.
        let shares = can_share(&file).unwrap_or(false);
        if !shares
            && let Err(e @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) =
                rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, plan.size())
        {
            return Err(converting(WriteError::Write(e.into())));
        }
        let written = plan.write_file(&file).map_err(converting)?;
        protect(&file, to)?;
        step.count(tree);
        Ok((file, written, tree.inodes[Tree::ROOT].is_opaque()))
    }

    /// The same for an archive, which must have this diffID.
    pub(super) fn convert_archive<R: Read + Send>(
        &self,
        diff_id: DiffId,
        open: impl FnOnce() -> io::Result<R>,
        to: &Path,
    ) -> Result<(File, Written, bool), CacheError> {
        let converting = |source| CacheError::Archive { diff_id, source: Box::new(source) };
        let archive = open().map_err(|e| converting(TarError::Read(e)))?;
        let file = create(to)?;
        let done = tar::convert(archive, &file, &self.limits, Hashing::Expect(diff_id)).map_err(converting)?;
        protect(&file, to)?;
        Ok((file, done.written, done.opaque))
    }
}

/// An empty file for an image, in the place of what a builder left there that died.
pub fn create(path: &Path) -> Result<File, CacheError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", path)(e)),
        _ => {}
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    file.map_err(failed("create image", path))
}

/// Lets everybody read an image that is complete, and nobody write.
pub fn protect(image: &File, path: &Path) -> Result<(), CacheError> {
    image.set_permissions(fs::Permissions::from_mode(0o444)).map_err(failed("protect image", path))
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

impl Cache {
    /// An image that a snapshotter made, and those that hold file data of it. One on another file system, where no pod can have a
    /// link of it, is copied into the cache once.
    pub(super) fn ready(&self, path: &Path, devices: &[PathBuf]) -> Result<Layer, CacheError> {
        let (layer, needed) = opened(path, true)?;
        if needed != devices.len() {
            return Err(CacheError::Devices { path: path.into(), needed, given: devices.len() });
        }
        let mut layer = self.near(layer)?;
        let device = |device: &PathBuf| self.near(opened(device, false)?.0);
        layer.devices = devices.iter().map(device).collect::<Result<_, CacheError>>()?;
        Ok(layer)
    }

    fn near(&self, layer: Layer) -> Result<Layer, CacheError> {
        let own = fs::metadata(&self.dir).map_err(failed("look at", &self.dir))?;
        let its = layer.file.metadata().map_err(failed("look at", &layer.path))?;
        if own.dev() == its.dev() {
            return Ok(layer);
        }
        let (source, path) = (layer.file, layer.path);
        let copy = match self.hit(&layer.key, Instant::now(), false) {
            Some(copy) => copy,
            None => self.obtain(layer.key, path.to_string_lossy().into_owned(), true, |temp| {
                let mut to = create(temp)?;
                let size = io::copy(&mut &source, &mut to).map_err(failed("copy image", &path))?;
                // Of others, so nobody has counted what is in it.
                let written = Written { size, inodes: 0, checksum: None, shared: 0 };
                protect(&to, temp)?;
                Ok((to, written, false))
            })?,
        };
        // What it is to the guest has not changed: it is not merged with layers of our own making.
        Ok(Layer { outcome: Outcome::Ready, ..copy })
    }
}

/// A file of a snapshotter's, and how many more an image needs.
fn opened(path: &Path, image: bool) -> Result<(Layer, usize), CacheError> {
    let start = Instant::now();
    let missing = |source| CacheError::Lower { path: path.into(), source };
    let key = key_of(path).map_err(missing)?;
    let file = File::open(path).map_err(missing)?;
    let metadata = file.metadata().map_err(missing)?;
    let wrong = |what| CacheError::Image { path: path.into(), what };
    if !metadata.is_file() {
        return Err(wrong("not a regular file"));
    }
    // In the VM's jail nobody is its owner.
    if metadata.mode() & 0o004 == 0 {
        return Err(wrong("not readable for others, whom the VM is one of"));
    }
    let mut needed = 0;
    if image {
        let mut raw = [0; SUPER_SIZE];
        let super_block = file.read_exact_at(&mut raw, SUPER_OFFSET).ok().and_then(|()| SuperBlock::decode(&raw));
        needed = super_block.ok_or_else(|| wrong("not an erofs file system"))?.extra_devices.into();
    }
    let layer = Layer {
        path: path.into(),
        key,
        size: metadata.size(),
        outcome: Outcome::Ready,
        took: start.elapsed(),
        devices: Vec::new(),
        data: Vec::new(),
        verity: None,
        parts: Vec::new(),
        file,
        opaque: false,
    };
    Ok((layer, needed))
}

/// A read-only descriptor for a file that was just written.
pub fn reopen(path: &Path) -> Result<File, CacheError> {
    File::open(path).map_err(failed("open image", path))
}
