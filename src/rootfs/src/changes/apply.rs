//! Entries of an archive → files below one directory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RawMode, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
    chmodat, chownat, fremovexattr, linkat, lsetxattr, makedev, mkdirat, mknodat, open, openat, openat2, symlinkat,
    unlinkat, utimensat,
};
use rustix::io::Errno;

use super::attributes::{is_kept, is_opaque, kept, names};
use super::{ChangesError, failed};
use crate::Limits;
use crate::erofs::stream::Source;
use crate::path::{PathError, components};
use crate::tar::{Archive, Entry, Kind, TarError};
use crate::tree::{OPAQUE, Time, Xattr};

/// A name of the archive never leads out of the directory, nor through a link or a mount.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);
/// How a directory is opened to be worked in.
pub const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A directory that gets an archive's entries.
pub struct Apply<'a> {
    pub(super) path: &'a Path,
    root: OwnedFd,
    below: Vec<OwnedFd>,
    images: bool,
    limits: &'a Limits,
    entries: usize,
    /// Bytes of file data that may still come.
    room: u64,
    /// Where the last entry was: archives go through directories one by one.
    last: Option<Parent>,
    /// Times of directories, which every name in them changes.
    pub(super) times: BTreeMap<Vec<u8>, Time>,
}

struct Parent {
    path: Vec<u8>,
    dir: OwnedFd,
    /// It hides what the layers below have; known once somebody has asked.
    opaque: Option<bool>,
}

impl<'a> Apply<'a> {
    /// Entries go into the directory `path`, over the layers `below` it, and over others that cannot be looked at if `images`.
    pub fn new(
        path: &'a Path,
        below: &'a [PathBuf],
        images: bool,
        limits: &'a Limits,
        room: u64,
    ) -> Result<Self, ChangesError> {
        let opened = |path: &Path| open(path, DIRECTORY, Mode::empty()).map_err(failed("open", path));
        let root = opened(path)?;
        let below = below.iter().map(|layer| opened(layer)).collect::<Result<_, _>>()?;
        let times = BTreeMap::new();
        Ok(Self { path, root, below, images, limits, entries: 0, room, last: None, times })
    }

    /// Takes one entry.
    pub fn add(&mut self, entry: Entry, archive: &mut Archive) -> Result<(), ChangesError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(TarError::Limit { what: "entries", limit: self.limits.entries as u64 }.into());
        }
        let path = entry.path.clone();
        let names = self.names(&path)?;
        let Some((name, parents)) = names.split_last() else { return self.root(&entry) };
        let mut parent = self.parent(&parents.join(&b'/'), &path)?;
        match &entry.kind {
            Kind::Directory => {
                let opaque = entry.xattrs.iter().any(|(name, value)| name == OPAQUE && value == b"y");
                let mut hides = false;
                if opaque || self.directory(&parent, name)?.is_none() {
                    // A whiteout or a file of the start hid what is below, and that is not said once more.
                    hides = self.clear(&parent, name)?;
                    let made = mkdirat(&parent.dir, *name, Mode::RWXU);
                    made.map_err(failed("create", &self.shown(&path)))?;
                }
                let dir = self.directory(&parent, name)?;
                let dir = dir.ok_or_else(|| failed("open", &self.shown(&path))(Errno::NOTDIR))?;
                if hides && !self.alone() {
                    rustix::fs::fsetxattr(&dir, OPAQUE, b"y", XattrFlags::empty())
                        .map_err(failed("set attribute of", &self.shown(&path)))?;
                }
                self.describe_directory(&dir, &entry, &names.join(&b'/'))?;
            }
            Kind::CharDevice(0, 0) => {
                self.clear(&parent, name)?;
                self.whiteout(&mut parent, name, &path)?;
            }
            Kind::HardLink(target) => {
                let target_names = self.names(target)?;
                let Some((target_name, target_parents)) = target_names.split_last() else {
                    return Err(TarError::entry(&path, "is a hard link to the root").into());
                };
                let from = self.open_parent(&target_parents.join(&b'/'), &path)?;
                self.clear(&parent, name)?;
                linkat(&from, *target_name, &parent.dir, *name, AtFlags::empty())
                    .map_err(failed("link to", &self.shown(&path)))?;
            }
            _ => {
                self.clear(&parent, name)?;
                self.create(&parent, name, &entry, archive)?;
            }
        }
        self.last = Some(parent);
        Ok(())
    }

    /// Sets what every entry changed.
    pub fn finish(self) -> Result<(), ChangesError> {
        for (path, time) in &self.times {
            let dir = match openat2(&self.root, here(path), DIRECTORY, Mode::empty(), BENEATH) {
                Ok(dir) => dir,
                // Something else took its name since.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(e) => return Err(failed("open", &self.shown(path))(e)),
            };
            rustix::fs::futimens(&dir, &stamps(*time)).map_err(failed("set time of", &self.shown(path)))?;
        }
        Ok(())
    }

    fn shown(&self, path: &[u8]) -> PathBuf {
        self.path.join(&*String::from_utf8_lossy(path))
    }

    fn names<'p>(&self, path: &'p [u8]) -> Result<Vec<&'p [u8]>, TarError> {
        let bad = |source| TarError::Path { path: String::from_utf8_lossy(path).into_owned(), source };
        if path.starts_with(b"/") {
            return Err(bad(PathError::Absolute));
        }
        let names = components(path).map_err(bad)?;
        if names.len() > self.limits.depth || path.len() > self.limits.path {
            return Err(TarError::Limit { what: "bytes of a path", limit: self.limits.path as u64 });
        }
        Ok(names)
    }

    fn open_parent(&self, path: &[u8], entry: &[u8]) -> Result<OwnedFd, ChangesError> {
        match openat2(&self.root, here(path), DIRECTORY, Mode::empty(), BENEATH) {
            Ok(dir) => Ok(dir),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                Err(TarError::entry(entry, "lies below something that is no directory").into())
            }
            Err(e) => Err(failed("open", &self.shown(path))(e)),
        }
    }

    /// The directory of an entry; to be given back as `last`.
    fn parent(&mut self, path: &[u8], entry: &[u8]) -> Result<Parent, ChangesError> {
        match self.last.take() {
            Some(last) if last.path == path => Ok(last),
            _ => Ok(Parent { path: path.to_vec(), dir: self.open_parent(path, entry)?, opaque: None }),
        }
    }

    /// What has this name, if that is a directory.
    fn directory(&self, parent: &Parent, name: &[u8]) -> Result<Option<OwnedFd>, ChangesError> {
        match openat(&parent.dir, name, DIRECTORY, Mode::empty()) {
            Ok(dir) => Ok(Some(dir)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(e) => Err(failed("open", &self.shown(&join(&parent.path, name)))(e)),
        }
    }

    /// Removes what has this name; whether there was something.
    fn clear(&self, parent: &Parent, name: &[u8]) -> Result<bool, ChangesError> {
        let removed = match unlinkat(&parent.dir, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => fs::remove_dir_all(entry_path(&parent.dir, name)),
            Err(Errno::NOENT) => return Ok(false),
            other => other.map_err(Into::into),
        };
        removed.map(|()| true).map_err(failed("remove", &self.shown(&join(&parent.path, name))))
    }

    /// There are no layers below.
    fn alone(&self) -> bool {
        self.below.is_empty() && !self.images
    }

    /// Hides a name of the layers below. Where they have none that an overlay would show, the whiteout would be no more than a
    /// name that is listed and not found.
    fn whiteout(&self, parent: &mut Parent, name: &[u8], path: &[u8]) -> Result<(), ChangesError> {
        let opaque = match parent.opaque {
            Some(opaque) => opaque,
            None => *parent.opaque.insert(self.hides_all(&parent.path)?),
        };
        let own = join(&parent.path, name);
        let has = |layer| openat2(layer, &own, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty(), BENEATH).is_ok();
        if !opaque && (self.images || self.below.iter().any(has)) {
            mknodat(&parent.dir, name, FileType::CharacterDevice, Mode::empty(), 0)
                .map_err(failed("create whiteout", &self.shown(path)))?;
        }
        Ok(())
    }

    /// Whether an overlay shows nothing of the layers below in this directory.
    fn hides_all(&self, path: &[u8]) -> Result<bool, ChangesError> {
        let ends = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(at, _)| at);
        for end in ends.chain((!path.is_empty()).then_some(path.len())) {
            if is_opaque(&self.open_parent(&path[..end], path)?) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn root(&mut self, entry: &Entry) -> Result<(), ChangesError> {
        if entry.kind != Kind::Directory {
            return Err(TarError::entry(&entry.path, "is the root and no directory").into());
        }
        let root = self.root.try_clone().map_err(failed("open", self.path))?;
        self.describe_directory(&root, entry, b"")
    }

    fn describe_directory(&mut self, dir: &OwnedFd, entry: &Entry, path: &[u8]) -> Result<(), ChangesError> {
        let shown = self.shown(path);
        rustix::fs::fchown(dir, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
            .map_err(failed("own", &shown))?;
        rustix::fs::fchmod(dir, mode(entry)).map_err(failed("set mode of", &shown))?;
        // One that was opaque at the start still hides what is below.
        for name in names(dir).map_err(failed("list attributes of", &shown))? {
            if name != OPAQUE && is_kept(&name) {
                fremovexattr(dir, name.as_slice()).map_err(failed("remove attribute of", &shown))?;
            }
        }
        for Xattr { name, value } in kept(entry, self.limits)?.iter().filter(|x| !self.alone() || &*x.name != OPAQUE) {
            rustix::fs::fsetxattr(dir, &**name, value, XattrFlags::empty())
                .map_err(failed("set attribute of", &shown))?;
        }
        self.times.insert(path.to_vec(), entry.mtime);
        Ok(())
    }

    /// Makes anything that is no directory. There is nothing of this name.
    fn create(
        &mut self,
        parent: &Parent,
        name: &[u8],
        entry: &Entry,
        archive: &mut Archive,
    ) -> Result<(), ChangesError> {
        let shown = self.shown(&entry.path);
        let dir = &parent.dir;
        let node = |kind, device| mknodat(dir, name, kind, Mode::empty(), device).map_err(failed("create", &shown));
        match &entry.kind {
            Kind::File => self.file(parent, name, entry, archive)?,
            Kind::Symlink(target) => symlinkat(target.as_slice(), dir, name).map_err(failed("create", &shown))?,
            Kind::Fifo => node(FileType::Fifo, 0)?,
            // Whoever could make one in a container could do so with any runtime; a snapshot is root's alone.
            &Kind::CharDevice(major, minor) => node(FileType::CharacterDevice, device(entry, major, minor)?)?,
            &Kind::BlockDevice(major, minor) => node(FileType::BlockDevice, device(entry, major, minor)?)?,
            Kind::Directory | Kind::HardLink(_) => return Ok(()),
        }
        let owner = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
        chownat(dir, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("own", &shown))?;
        if !matches!(entry.kind, Kind::Symlink(_)) {
            chmodat(dir, name, mode(entry), AtFlags::empty()).map_err(failed("set mode of", &shown))?;
        }
        let path = entry_path(dir, name);
        for Xattr { name, value } in kept(entry, self.limits)? {
            lsetxattr(&path, &*name, &value, XattrFlags::empty()).map_err(failed("set attribute of", &shown))?;
        }
        utimensat(dir, name, &stamps(entry.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(failed("set time of", &shown))
    }

    fn file(&mut self, parent: &Parent, name: &[u8], entry: &Entry, archive: &mut Archive) -> Result<(), ChangesError> {
        let shown = self.shown(&entry.path);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&parent.dir, name, flags, Mode::RUSR | Mode::WUSR).map_err(failed("create", &shown))?;
        let file = File::from(file);
        let whole = 0..entry.size;
        for extent in entry.extents.as_deref().unwrap_or(std::slice::from_ref(&whole)) {
            let len = extent.end - extent.start;
            self.room =
                self.room.checked_sub(len).ok_or(TarError::Limit { what: "bytes of file data", limit: self.room })?;
            let mut at = extent.start;
            while at < extent.end {
                let bytes = archive.take(extent.end - at).map_err(|source| archive.failed(source))?;
                if bytes.is_empty() {
                    return Err(archive.failed(std::io::ErrorKind::UnexpectedEof.into()).into());
                }
                file.write_all_at(&bytes, at).map_err(failed("write", &shown))?;
                at += bytes.len() as u64;
            }
        }
        // The last hole, and a whole file of them.
        if entry.extents.is_some() {
            file.set_len(entry.size).map_err(failed("write", &shown))?;
        }
        Ok(())
    }
}

/// A path relative to a directory's descriptor.
fn here(path: &[u8]) -> &[u8] {
    if path.is_empty() { b"." } else { path }
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

/// A name in a directory, for calls that take no descriptor.
fn entry_path(dir: &OwnedFd, name: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(std::ffi::OsStr::from_bytes(name))
}

fn mode(entry: &Entry) -> Mode {
    Mode::from_raw_mode(RawMode::from(entry.permissions))
}

fn stamps(mtime: Time) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.sec, tv_nsec: mtime.nsec.into() },
    }
}

fn device(entry: &Entry, major: u64, minor: u64) -> Result<u64, TarError> {
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) if major < 1 << 12 && minor < 1 << 20 => Ok(makedev(major, minor)),
        _ => Err(TarError::entry(&entry.path, "is a device with an impossible number")),
    }
}
