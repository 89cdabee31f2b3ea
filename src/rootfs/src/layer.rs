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

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom, Statx, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use crate::Limits;
use crate::erofs::format::{NAME_MAX, split_xattr_name};
use crate::tree::{Data, Entry, Inode, InodeId, Location, Node, SourceDir, Time, Tree, Xattr, open_file};

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
    values: Vec<u8>,
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
            values: vec![0; 64 << 10], // the kernel's largest value and largest list
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
        let xattrs = self.xattrs(&dir, b"", &Xattrs::Open(&fd))?;
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
            match &marker[b".wh.".len()..] {
                b".wh..opq" => markers.opaque = true,
                name if name.starts_with(b".wh.") => {} // AUFS's own books
                b"" | b"." | b".." => return Err(LayerError::BadMarker(self.full(dir, &marker))),
                name => markers.names.push(name.into()),
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
            inode.xattrs = self.xattrs(dir, name, &Xattrs::Named(fd, name))?;
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

    /// Attributes of one inode, sorted, those of overlayfs translated. What EROFS has no place for (`btrfs.*`, `system.*` but the
    /// ACLs) belongs to the file system that the layer happens to lie on, and is left there.
    fn xattrs(&mut self, dir: &SourceDir, name: &[u8], from: &Xattrs) -> Result<Vec<Xattr>, LayerError> {
        let mut values = std::mem::take(&mut self.values);
        let result = self.read_xattrs(dir, name, from, &mut values);
        self.values = values;
        result
    }

    fn read_xattrs(
        &self,
        dir: &SourceDir,
        name: &[u8],
        from: &Xattrs,
        buffer: &mut [u8],
    ) -> Result<Vec<Xattr>, LayerError> {
        let failed = |e: Errno| match e {
            Errno::RANGE => LayerError::XattrsTooLarge(self.full(dir, name)),
            e => LayerError::Read { what: "read extended attributes of", path: self.full(dir, name), source: e.into() },
        };
        let len = match from.list(buffer) {
            Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
            Ok(len) => len,
            Err(e) => return Err(failed(e)),
        };
        let names = buffer[..len].to_vec();
        let mut total = 0;
        let mut xattrs = BTreeMap::new();
        for attr in names.split(|&b| b == 0).filter(|n| !n.is_empty()) {
            let Some(kept) = translate(attr) else { continue };
            let len = match from.get(attr, buffer) {
                Ok(len) => len,
                Err(Errno::NODATA) => continue, // removed meanwhile
                Err(e) => return Err(failed(e)),
            };
            total += attr.len() + len;
            if total > self.limits.xattrs || len > usize::from(u16::MAX) {
                return Err(failed(Errno::RANGE));
            }
            // "x" says that whiteouts are files with an attribute, not that the directory is opaque; they are translated too.
            if kept == crate::tree::OPAQUE && &buffer[..len] != b"y" {
                continue;
            }
            xattrs.insert(kept, Box::from(&buffer[..len]));
        }
        Ok(xattrs.into_iter().map(|(name, value)| Xattr { name: name.into(), value }).collect())
    }

    fn full(&self, dir: &SourceDir, name: &[u8]) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        let below = join(&dir.path, name);
        self.path.join(std::ffi::OsStr::from_bytes(&below))
    }
}

/// Where an inode's attributes are read: an open directory, or a name in one.
enum Xattrs<'a> {
    Open(&'a OwnedFd),
    Named(&'a OwnedFd, &'a [u8]),
}

impl Xattrs<'_> {
    fn list(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Xattrs::Open(fd) => rustix::fs::flistxattr(fd, buffer),
            Xattrs::Named(dir, name) => rustix::fs::llistxattr(proc_path(dir, name), buffer),
        }
    }

    fn get(&self, attr: &[u8], buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Xattrs::Open(fd) => rustix::fs::fgetxattr(fd, attr, buffer),
            Xattrs::Named(dir, name) => rustix::fs::lgetxattr(proc_path(dir, name), attr, buffer),
        }
    }
}

/// Attributes have no descriptor-relative system calls before Linux 6.13; the descriptor's link in procfs comes to the same.
fn proc_path(dir: &OwnedFd, name: &[u8]) -> Vec<u8> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend(name);
    path
}

/// The name under which an attribute goes into the tree; `None` when it stays out.
fn translate(attr: &[u8]) -> Option<Vec<u8>> {
    let overlay = attr.strip_prefix(b"trusted.overlay.").or_else(|| attr.strip_prefix(b"user.overlay."));
    match overlay {
        // Books about the host's upper layer: file handles of host inodes, link counts, "somebody was copied up here".
        Some(b"origin" | b"impure" | b"nlink" | b"upper" | b"uuid" | b"protattr") => None,
        Some(b"opaque" | b"redirect" | b"metacopy" | b"whiteout") => Some([b"trusted.overlay.", overlay?].concat()),
        // Doubly prefixed names belong to an overlay inside the container and are data here.
        _ => split_xattr_name(attr).map(|_| attr.to_vec()),
    }
}

/// True for an empty file with the whiteout attribute, overlayfs's other form of a whiteout.
fn take_whiteout_mark(inode: &mut Inode) -> bool {
    let before = inode.xattrs.len();
    inode.xattrs.retain(|x| &*x.name != b"trusted.overlay.whiteout");
    before != inode.xattrs.len() && matches!(inode.node, Node::File { size: 0, .. })
}

fn inode(stat: &Statx, node: Node) -> Inode {
    Inode {
        permissions: stat.stx_mode & 0o7777,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mtime: Time { sec: stat.stx_mtime.tv_sec, nsec: stat.stx_mtime.tv_nsec },
        xattrs: Vec::new(),
        node,
    }
}

fn statx(dir: &OwnedFd, name: &[u8], flags: AtFlags) -> rustix::io::Result<Statx> {
    let flags = flags | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS)
}

fn list(dir: &OwnedFd) -> rustix::io::Result<Vec<Box<[u8]>>> {
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

/// The parts of a file that hold data; `None` when it looks dense. More than `max` parts are merged into fewer, larger ones.
fn extents(dir: &OwnedFd, name: &[u8], stat: &Statx, max: usize) -> rustix::io::Result<Option<Vec<Range<u64>>>> {
    const COARSEST: u64 = 1 << 40;
    if stat.stx_blocks * 512 >= stat.stx_size {
        return Ok(None);
    }
    let file = open_file(dir, name).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    let mut extents: Vec<Range<u64>> = Vec::new();
    let mut granule = 4096;
    let mut at = 0;
    while at < stat.stx_size {
        let start = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => return Ok(None), // no notion of holes here
            Err(e) => return Err(e),
        };
        at = rustix::fs::seek(&file, SeekFrom::Hole(start))?;
        push_extent(&mut extents, start, at, granule);
        while extents.len() > max {
            if granule == COARSEST {
                return Ok(None);
            }
            granule *= 16;
            for extent in std::mem::take(&mut extents) {
                push_extent(&mut extents, extent.start, extent.end, granule);
            }
        }
    }
    if let Some(last) = extents.last_mut() {
        last.end = last.end.min(stat.stx_size);
    }
    let dense = extents.len() == 1 && extents[0] == (0..stat.stx_size);
    Ok((!dense).then_some(extents))
}

fn push_extent(extents: &mut Vec<Range<u64>>, start: u64, end: u64, granule: u64) {
    let (start, end) = (start / granule * granule, end.next_multiple_of(granule));
    match extents.last_mut() {
        Some(last) if last.end >= start => last.end = last.end.max(end),
        _ => extents.push(start..end),
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    match (dir, name) {
        (b"", _) => name.to_vec(),
        (_, b"") => dir.to_vec(),
        _ => [dir, b"/", name].concat(),
    }
}
