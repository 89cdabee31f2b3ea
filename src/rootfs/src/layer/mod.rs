//! A snapshot directory → [`Tree`].
//!
//! Invariants: every system call is relative to a directory's descriptor; no link is followed and no mount crossed; one directory
//! is open at a time, whatever the depth; names come out sorted, so that the same directory gives the same tree.
//!
//! Layers mark removed names in three ways, which all become the one that overlayfs knows everywhere, a character device 0:0 and
//! `trusted.overlay.opaque=y`:
//!
//! | in the snapshot                                               | in the tree                                  |
//! |---------------------------------------------------------------|----------------------------------------------|
//! | character device 0:0; `{trusted,user}.overlay.opaque=y`       | the same, as `trusted.`                      |
//! | `overlay.opaque=x` and empty files with `overlay.whiteout`    | a plain directory with devices 0:0           |
//! | `.wh.NAME`, `.wh..wh..opq` (AUFS, and OCI layers)             | device 0:0 `NAME`; opaque directory          |
//!
//! Sockets are skipped: without the process behind them they are nothing.

mod extents;
pub(crate) mod markers;
pub mod refer;
pub(crate) mod xattrs;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Statx, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use crate::Limits;
use crate::erofs::format::NAME_MAX;
use crate::tree::{Data, Entry, Inode, InodeId, Location, Node, SourceDir, Time, Tree, Xattr};
use extents::extents;
use markers::Marker;
use xattrs::{Origin, Refusal, take_whiteout_mark};

/// Why a snapshot directory was refused or could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The snapshot directory itself cannot be opened.
    #[error("open layer {path}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Something in it cannot be read.
    #[error("{what} {path}")]
    Read {
        /// What was tried, as in "list directory".
        what: &'static str,
        /// The entry.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Something is mounted inside the layer, so what is there is not the layer's.
    #[error("read layer: {0} is a mount point")]
    Mount(PathBuf),
    /// [`Limits::entries`] is exceeded.
    #[error("read layer {path}: more than {limit} names")]
    TooManyEntries {
        /// The layer.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// [`Limits::bytes`] is exceeded.
    #[error("read layer {path}: more than {limit} bytes of file data")]
    TooManyBytes {
        /// The layer.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
    /// [`Limits::depth`] or [`Limits::path`] is exceeded.
    #[error("read layer: {0} is nested too deeply")]
    TooDeep(PathBuf),
    /// [`Limits::xattrs`] is exceeded, or one value is larger than an EROFS image can hold (65,535 bytes).
    #[error("read layer: extended attributes of {0} are too large")]
    XattrsTooLarge(PathBuf),
    /// A file's data lies in another layer (overlayfs's metacopy), so this layer alone cannot be converted.
    #[error("read layer: {0} has its data in another layer")]
    Metacopy(PathBuf),
    /// A whiteout marker names nothing, the directory itself or its parent.
    #[error("read layer: whiteout marker {0} names no file")]
    BadMarker(PathBuf),
}

/// Most parts of one sparse file that are told apart.
const MAX_EXTENTS: usize = 16 << 10;
/// Most parts of all sparse files together: 16 MiB of memory.
const ALL_EXTENTS: usize = 1 << 20;

/// Reads the layer in `path`. The tree's locations keep the directory open.
pub fn scan(path: &Path, limits: &Limits) -> Result<Tree, LayerError> {
    let open =
        |flag| rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | flag, Mode::empty());
    let root = match open(OFlags::NOATIME) {
        Err(Errno::PERM) => open(OFlags::empty()),
        other => other,
    };
    let root = root.map_err(|e| LayerError::Open { path: path.into(), source: e.into() })?;
    Scan::new(path, Arc::new(root), limits).run()
}

/// One run over a directory tree. Directories wait in `pending`, deepest first, so that at most one level of names is held twice.
struct Scan<'a> {
    path: &'a Path,
    limits: &'a Limits,
    root: Arc<OwnedFd>,
    tree: Tree,
    pending: Vec<Pending>,
    hard_links: HashMap<(u32, u32, u64), InodeId>,
    entries: usize,
    bytes: u64,
    extents_left: usize,
    xattrs: xattrs::Reader,
}

struct Pending {
    inode: InodeId,
    path: Vec<u8>,
    depth: usize,
}

/// The whiteout markers found while one directory is listed.
#[derive(Default)]
struct Markers {
    opaque: bool,
    names: Vec<Box<[u8]>>,
}

impl<'a> Scan<'a> {
    fn new(path: &'a Path, root: Arc<OwnedFd>, limits: &'a Limits) -> Scan<'a> {
        Scan {
            path,
            limits,
            root,
            tree: Tree { inodes: Vec::new() },
            pending: Vec::new(),
            hard_links: HashMap::new(),
            entries: 0,
            bytes: 0,
            extents_left: ALL_EXTENTS,
            xattrs: xattrs::Reader::new(limits.xattrs),
        }
    }

    fn run(mut self) -> Result<Tree, LayerError> {
        let stat = statx(&self.root, b"", AtFlags::EMPTY_PATH)
            .map_err(|e| LayerError::Open { path: self.path.into(), source: e.into() })?;
        self.tree.inodes.push(inode(&stat, Node::Directory(Vec::new())));
        self.pending.push(Pending { inode: Tree::ROOT, path: Vec::new(), depth: 0 });
        while let Some(next) = self.pending.pop() {
            self.directory(next)?;
        }
        Ok(self.tree)
    }

    fn directory(&mut self, at: Pending) -> Result<(), LayerError> {
        let dir = Arc::new(SourceDir { root: Arc::clone(&self.root), path: at.path });
        let failed = |what, source: io::Error| match source.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::XDEV) => LayerError::Mount(self.full(&dir, b"")),
            _ => LayerError::Read { what, path: self.full(&dir, b""), source },
        };
        let fd = dir.open().map_err(|e| failed("open directory", e))?;
        let mut names = list(&fd).map_err(|e| failed("list directory", e.into()))?;
        names.sort_unstable();
        self.entries += names.len();
        if self.entries > self.limits.entries {
            return Err(LayerError::TooManyEntries { path: self.path.into(), limit: self.limits.entries });
        }
        let xattrs = self.xattrs(&dir, b"", &Origin::Directory(&fd))?;
        let mut markers = self.take_markers(&dir, &mut names)?;
        let this = &mut self.tree.inodes[at.inode];
        markers.opaque |= this.is_opaque(); // a marker beside it said so
        this.xattrs = xattrs;
        let first_child = self.pending.len();
        let mut entries = Vec::with_capacity(names.len() + markers.names.len());
        for name in names {
            if let Some(inode) = self.entry(&dir, &fd, &name, at.depth)? {
                entries.push(Entry { name, inode });
            }
        }
        self.pending[first_child..].reverse();
        if markers.opaque {
            self.tree.inodes[at.inode].set_opaque();
        }
        self.apply_whiteouts(markers.names, &mut entries);
        self.tree.inodes[at.inode].node = Node::Directory(entries);
        Ok(())
    }

    /// Removes `.wh.*` from `names`, which are sorted, and says what they mean.
    fn take_markers(&self, dir: &SourceDir, names: &mut Vec<Box<[u8]>>) -> Result<Markers, LayerError> {
        let mut markers = Markers::default();
        let start = names.partition_point(|n| &**n < b".wh.".as_slice());
        let end = start + names[start..].partition_point(|n| n.starts_with(b".wh."));
        for marker in names.drain(start..end) {
            match markers::marker(&marker) {
                Some(Marker::Opaque) => markers.opaque = true,
                Some(Marker::Whiteout(name)) => markers.names.push(name.into()),
                Some(Marker::Bad) => return Err(LayerError::BadMarker(self.full(dir, &marker))),
                Some(Marker::Bookkeeping) | None => {}
            }
        }
        Ok(markers)
    }

    /// A layer never removes what it adds itself, but a directory that it adds over a removed one starts empty.
    fn apply_whiteouts(&mut self, names: Vec<Box<[u8]>>, entries: &mut Vec<Entry>) {
        for name in names {
            match entries.binary_search_by(|e| e.name.cmp(&name)) {
                Ok(found) => {
                    let inode = &mut self.tree.inodes[entries[found].inode];
                    if matches!(inode.node, Node::Directory(_)) {
                        inode.set_opaque();
                    }
                }
                Err(place) => {
                    self.tree.inodes.push(Inode::whiteout());
                    entries.insert(place, Entry { name, inode: self.tree.inodes.len() - 1 });
                }
            }
        }
    }

    /// Adds one name's inode to the tree; `None` for what is not carried over.
    fn entry(
        &mut self,
        dir: &Arc<SourceDir>,
        fd: &OwnedFd,
        name: &[u8],
        depth: usize,
    ) -> Result<Option<InodeId>, LayerError> {
        let failed = |what, source: Errno| LayerError::Read { what, path: self.full(dir, name), source: source.into() };
        let stat = statx(fd, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| failed("stat", e))?;
        if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Err(LayerError::Mount(self.full(dir, name)));
        }
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let identity = (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
        let linked = kind != FileType::Directory && stat.stx_nlink > 1;
        if linked && let Some(&known) = self.hard_links.get(&identity) {
            return Ok(Some(known));
        }
        let node = match kind {
            FileType::Directory => Node::Directory(Vec::new()),
            FileType::RegularFile => {
                let max = MAX_EXTENTS.min(self.extents_left);
                let extents = extents(fd, name, &stat, max).map_err(|e| failed("find the holes of", e))?;
                self.extents_left -= extents.as_ref().map_or(0, Vec::len);
                self.bytes += match &extents {
                    Some(extents) => extents.iter().map(|e| e.end - e.start).sum(),
                    None => stat.stx_size,
                };
                if self.bytes > self.limits.bytes {
                    return Err(LayerError::TooManyBytes { path: self.path.into(), limit: self.limits.bytes });
                }
                let location = Location { dir: Arc::clone(dir), name: name.into() };
                Node::File { size: stat.stx_size, data: Data::At { location, extents } }
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(fd, name, Vec::new()).map_err(|e| failed("read link", e))?;
                Node::Symlink(target.into_bytes().into())
            }
            FileType::CharacterDevice => Node::CharDevice { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor },
            FileType::BlockDevice => Node::BlockDevice { major: stat.stx_rdev_major, minor: stat.stx_rdev_minor },
            FileType::Fifo => Node::Fifo,
            FileType::Socket | FileType::Unknown => return Ok(None),
        };
        let mut inode = inode(&stat, node);
        let id = self.tree.inodes.len();
        if kind == FileType::Directory {
            let path = join(&dir.path, name);
            if depth + 1 > self.limits.depth || path.len() > self.limits.path {
                return Err(LayerError::TooDeep(self.full(dir, name)));
            }
            self.pending.push(Pending { inode: id, path, depth: depth + 1 });
        } else {
            inode.xattrs = self.xattrs(dir, name, &Origin::Entry(fd, name))?;
            if take_whiteout_mark(&mut inode) {
                inode = Inode::whiteout();
            }
        }
        if linked {
            self.hard_links.insert(identity, id);
        }
        self.tree.inodes.push(inode);
        Ok(Some(id))
    }

    fn xattrs(&mut self, dir: &SourceDir, name: &[u8], origin: &Origin) -> Result<Vec<Xattr>, LayerError> {
        self.xattrs.read(origin).map_err(|refusal| {
            let path = self.full(dir, name);
            match refusal {
                Refusal::TooLarge => LayerError::XattrsTooLarge(path),
                Refusal::Metacopy => LayerError::Metacopy(path),
                Refusal::Failed(e) => LayerError::Read { what: "read extended attributes of", path, source: e.into() },
            }
        })
    }

    fn full(&self, dir: &SourceDir, name: &[u8]) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        let below = join(&dir.path, name);
        self.path.join(std::ffi::OsStr::from_bytes(&below))
    }
}

pub(crate) fn inode(stat: &Statx, node: Node) -> Inode {
    Inode {
        permissions: stat.stx_mode & 0o7777,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mtime: Time { sec: stat.stx_mtime.tv_sec, nsec: stat.stx_mtime.tv_nsec },
        xattrs: Vec::new(),
        node,
    }
}

pub(crate) fn statx(dir: &OwnedFd, name: &[u8], flags: AtFlags) -> rustix::io::Result<Statx> {
    let flags = flags | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS)
}

pub(crate) fn list(dir: &OwnedFd) -> rustix::io::Result<Vec<Box<[u8]>>> {
    let mut names = Vec::new();
    let mut buffer = Vec::with_capacity(32 << 10);
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        match entry.file_name().to_bytes() {
            b"." | b".." => {}
            name if name.len() > NAME_MAX => return Err(Errno::NAMETOOLONG),
            name => names.push(name.into()),
        }
    }
    Ok(names)
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    match (dir, name) {
        (b"", _) => name.to_vec(),
        (_, b"") => dir.to_vec(),
        _ => [dir, b"/", name].concat(),
    }
}
