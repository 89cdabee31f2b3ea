//! Files and trees of the host as sources of copies. Paths are resolved below the allowed directories only, whatever links say, and
//! what was opened is what is copied.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{ApplyError, Preserve};
use crate::Limits;
use crate::layer::xattrs::{Origin, Reader, Refusal};
use crate::layer::{inode, list, statx};
use crate::tree::{Data, Inode, Location, Node, SourceDir, Time};

/// How often a path is resolved anew when the kernel could not make sure that it stayed inside (openat2(2), `EAGAIN`).
const RESOLUTIONS: usize = 10_000;

/// Directories of the host from which patches may copy.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    allowed: Vec<PathBuf>,
}

impl Sources {
    /// Copies may come from these directories and what is below them. None: no copies.
    pub fn below(allowed: impl IntoIterator<Item = PathBuf>) -> Sources {
        Sources { allowed: allowed.into_iter().collect() }
    }

    /// Opens a path, with every link on the way resolved inside the allowed directory. FIFOs do not block.
    fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, ApplyError> {
        let failed = |source: Errno| ApplyError::Source { what: "open", path: path.into(), source: source.into() };
        let root = self.allowed.iter().find(|root| path.starts_with(root));
        let root = root.ok_or_else(|| refused(path, "it is in no directory that patches may copy from"))?;
        let below = path.strip_prefix(root).map_or(&b""[..], |below| below.as_os_str().as_bytes());
        if below.split(|&b| b == b'/').any(|name| name == b"..") {
            return Err(refused(path, "it has a \"..\""));
        }
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, directory, Mode::empty()).map_err(failed)?;
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let below = if below.is_empty() { b"." } else { below };
        let flags = flags | OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        // Each mount and each rename anywhere on the node makes the kernel give up on a ".." of a link's that it has walked meanwhile.
        for _ in 0..RESOLUTIONS {
            match rustix::fs::openat2(&root, below, flags, Mode::empty(), inside) {
                Err(Errno::AGAIN) => std::thread::yield_now(),
                opened => return opened.map_err(failed),
            }
        }
        Err(failed(Errno::AGAIN))
    }

    /// A regular file: its permissions and content.
    pub(super) fn file(&self, path: &Path, limits: &Limits) -> Result<(u16, Node), ApplyError> {
        let file = self.open(path, OFlags::empty())?;
        let stat = rustix::fs::fstat(&file).map_err(|source| ApplyError::Source {
            what: "stat",
            path: path.into(),
            source: source.into(),
        })?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refused(path, "it is no regular file"));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        if size > limits.bytes {
            return Err(ApplyError::Limit { what: "bytes in a copied file", limit: limits.bytes });
        }
        Ok(((stat.st_mode & 0o7777) as u16, Node::File { size, data: Data::Open(Arc::new(file)) }))
    }

    /// A directory, to be walked with [`Walk`].
    pub(super) fn walk<'a>(
        &self,
        path: &'a Path,
        preserve: Preserve,
        limits: &'a Limits,
    ) -> Result<Walk<'a>, ApplyError> {
        let root = Arc::new(self.open(path, OFlags::DIRECTORY)?);
        Ok(Walk { path, root, preserve, limits, entries: 0, bytes: 0, xattrs: Reader::new(limits.xattrs) })
    }
}

/// A walk over a tree of the host, one directory at a time. No link is followed and no mount crossed.
pub(super) struct Walk<'a> {
    path: &'a Path,
    root: Arc<OwnedFd>,
    preserve: Preserve,
    limits: &'a Limits,
    entries: usize,
    bytes: u64,
    xattrs: Reader,
}

/// A directory of the walk: itself and what is in it, whose directories come without theirs.
pub(super) struct Listed {
    pub directory: Inode,
    pub entries: Vec<(Box<[u8]>, Inode)>,
}

impl Walk<'_> {
    /// Lists the directory `below` the source, whose names are separated by `/`.
    pub(super) fn list(&mut self, below: &[u8]) -> Result<Listed, ApplyError> {
        let dir = Arc::new(SourceDir { root: Arc::clone(&self.root), path: below.into() });
        let fd = dir.open().map_err(|e| self.failed("open directory", below, b"", e))?;
        let failed = |walk: &Walk, e: Errno| walk.failed("list directory", below, b"", e.into());
        let stat = statx(&fd, b"", AtFlags::EMPTY_PATH).map_err(|e| failed(self, e))?;
        let mut directory = inode(&stat, Node::Directory(Vec::new()));
        self.settle(&mut directory, &Origin::Directory(&fd), below, b"")?;
        let mut names = list(&fd).map_err(|e| failed(self, e))?;
        names.sort_unstable();
        self.entries += names.len();
        if self.entries > self.limits.entries {
            return Err(ApplyError::Limit { what: "entries in a copied tree", limit: self.limits.entries as u64 });
        }
        let mut entries = Vec::with_capacity(names.len());
        for name in names {
            let stat = statx(&fd, &name, AtFlags::SYMLINK_NOFOLLOW);
            let stat = stat.map_err(|e| self.failed("stat", below, &name, e.into()))?;
            let node = match FileType::from_raw_mode(stat.stx_mode.into()) {
                FileType::Directory => Node::Directory(Vec::new()),
                FileType::RegularFile => {
                    self.bytes = self.bytes.saturating_add(stat.stx_size);
                    if self.bytes > self.limits.bytes {
                        return Err(ApplyError::Limit { what: "bytes in a copied tree", limit: self.limits.bytes });
                    }
                    let location = Location { dir: Arc::clone(&dir), name: name.clone() };
                    Node::File { size: stat.stx_size, data: Data::At { location, extents: None } }
                }
                FileType::Symlink => {
                    let target = rustix::fs::readlinkat(&fd, &*name, Vec::new());
                    let target = target.map_err(|e| self.failed("read link", below, &name, e.into()))?;
                    Node::Symlink(target.into_bytes().into())
                }
                _ => return Err(refused(&self.full(below, &name), "devices, sockets and FIFOs are not copied")),
            };
            let mut inode = inode(&stat, node);
            if !matches!(inode.node, Node::Directory(_)) {
                self.settle(&mut inode, &Origin::Entry(&fd, &name), below, &name)?; // directories when they are listed
            }
            entries.push((name, inode));
        }
        Ok(Listed { directory, entries })
    }

    /// Takes away what is not to be kept.
    fn settle(&mut self, inode: &mut Inode, origin: &Origin, below: &[u8], name: &[u8]) -> Result<(), ApplyError> {
        inode.permissions = match &inode.node {
            Node::Symlink(_) => 0o777,
            node => permissions(inode.permissions, matches!(node, Node::Directory(_))),
        };
        if !self.preserve.owner {
            (inode.uid, inode.gid) = (0, 0);
        }
        if !self.preserve.mtime {
            inode.mtime = Time::default();
        }
        if self.preserve.xattrs {
            inode.xattrs = self.xattrs.read(origin).map_err(|refusal| match refusal {
                Refusal::TooLarge => refused(&self.full(below, name), "its extended attributes are too large"),
                Refusal::Metacopy => refused(&self.full(below, name), "its data is in another layer"),
                Refusal::Failed(e) => self.failed("read extended attributes of", below, name, e.into()),
            })?;
            // Marks of the overlay that it lies on are not its own.
            inode.xattrs.retain(|x| !super::apply::is_overlay_mark(&x.name));
        }
        Ok(())
    }

    fn failed(&self, what: &'static str, below: &[u8], name: &[u8], source: io::Error) -> ApplyError {
        ApplyError::Source { what, path: self.full(below, name), source }
    }

    fn full(&self, below: &[u8], name: &[u8]) -> PathBuf {
        let os = std::ffi::OsStr::from_bytes;
        self.path
            .components()
            .chain(Path::new(os(below)).components())
            .chain(Path::new(os(name)).components())
            .collect()
    }
}

/// Permissions of a copy: those of its source, unless that has none at all.
pub(super) fn permissions(source: u16, directory: bool) -> u16 {
    match (source, directory) {
        (0, true) => 0o755,
        (0, false) => 0o644,
        _ => source,
    }
}

fn refused(path: &Path, what: &'static str) -> ApplyError {
    ApplyError::Refused { path: path.into(), what }
}
