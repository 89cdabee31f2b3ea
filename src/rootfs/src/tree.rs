//! One layer in memory: names, metadata, and where each file's bytes can be read.
//!
//! Inodes live in one vector and are named by their index, so that hard links are just several names for one index. The root is
//! index 0. File contents stay where they are: a [`Location`] is opened when the bytes are wanted, by descriptor-relative
//! system calls that follow no link and cross no mount. Nothing here knows EROFS.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags};

/// Index of an inode in its [`Tree`].
pub type InodeId = usize;

/// A point in time: seconds since 1970, which may be negative, and nanoseconds after that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    /// Seconds since 1970.
    pub sec: i64,
    /// Nanoseconds, 0 to 999,999,999.
    pub nsec: u32,
}

/// An extended attribute with its full name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xattr {
    /// Name with its prefix, as in `user.comment`.
    pub name: Box<[u8]>,
    /// Value, often binary.
    pub value: Box<[u8]>,
}

/// A name in a directory.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Any bytes but `/` and NUL, at most 255.
    pub name: Box<[u8]>,
    /// What it leads to.
    pub inode: InodeId,
}

/// What an inode is.
#[derive(Clone, Debug)]
pub enum Node {
    /// A directory, its entries sorted by name, without `.` and `..`.
    Directory(Vec<Entry>),
    /// A regular file.
    File {
        /// Size in bytes.
        size: u64,
        /// Where the bytes are.
        data: Data,
    },
    /// A symbolic link and its target.
    Symlink(Box<[u8]>),
    /// A character device; 0:0 is an overlay whiteout.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// The bytes of a regular file.
#[derive(Clone, Debug)]
pub enum Data {
    /// In memory.
    Bytes(Box<[u8]>),
    /// In a source directory. `extents` are the parts that hold data, in order and not touching, when the file is sparse.
    At {
        /// Where to open it.
        location: Location,
        /// Byte ranges with data; `None` when everything is data.
        extents: Option<Vec<Range<u64>>>,
    },
    /// In a file that is held open.
    Open(Arc<OwnedFd>),
    /// In another image, which is a device of this one: block numbers of the common address space.
    Elsewhere {
        /// First block, unless there are chunks.
        block: u32,
        /// `log2` of the chunk size, and where each chunk starts (`None`: a hole).
        chunks: Option<(u8, Vec<Option<u32>>)>,
    },
    /// In the image already, put there by [`crate::erofs::stream::Stream::store`].
    Stored {
        /// Block where it starts.
        block: u32,
        /// As above.
        extents: Option<Vec<Range<u64>>>,
    },
}

impl Data {
    /// Byte ranges with data when the file is sparse.
    pub fn extents(&self) -> Option<&[Range<u64>]> {
        match self {
            Data::Bytes(_) | Data::Open(_) | Data::Elsewhere { .. } => None,
            Data::At { extents, .. } | Data::Stored { extents, .. } => extents.as_deref(),
        }
    }
}

/// One inode of the layer.
#[derive(Clone, Debug)]
pub struct Inode {
    /// Permission bits, set-id and sticky bits: `mode & 07777`.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<Xattr>,
    /// Kind and content.
    pub node: Node,
}

impl Inode {
    /// The mark by which overlayfs hides a name of the layers below: a character device 0:0.
    pub fn whiteout() -> Inode {
        let node = Node::CharDevice { major: 0, minor: 0 };
        Inode { permissions: 0, uid: 0, gid: 0, mtime: Time::default(), xattrs: Vec::new(), node }
    }

    /// What it is, in words.
    pub fn kind(&self) -> &'static str {
        match self.node {
            Node::Directory(_) => "directory",
            Node::File { .. } => "regular file",
            Node::Symlink(_) => "symlink",
            Node::CharDevice { .. } => "character device",
            Node::BlockDevice { .. } => "block device",
            Node::Fifo => "fifo",
        }
    }

    /// A directory of root's that nobody described: 0755, from the beginning of time.
    pub fn directory() -> Inode {
        Inode { permissions: 0o755, node: Node::Directory(Vec::new()), ..Inode::whiteout() }
    }

    /// True for [`Inode::whiteout`]'s kind.
    pub fn is_whiteout(&self) -> bool {
        matches!(self.node, Node::CharDevice { major: 0, minor: 0 })
    }

    /// True for a directory that hides the layers below it (`trusted.overlay.opaque` = `y`).
    pub fn is_opaque(&self) -> bool {
        self.xattrs.iter().any(|x| &*x.name == OPAQUE && &*x.value == b"y")
    }

    /// Makes a directory opaque.
    pub fn set_opaque(&mut self) {
        self.xattrs.retain(|x| &*x.name != OPAQUE);
        self.xattrs.push(Xattr { name: OPAQUE.into(), value: (*b"y").into() });
        self.xattrs.sort();
    }
}

/// The attribute that makes a directory opaque.
pub const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// A whole layer. `inodes[0]` is the root directory.
#[derive(Clone, Debug)]
pub struct Tree {
    /// All inodes, in no order but that the root is first.
    pub inodes: Vec<Inode>,
}

impl Tree {
    /// Index of the root directory.
    pub const ROOT: InodeId = 0;

    /// A path from the root to `wanted`, for messages; slow.
    pub fn path_of(&self, wanted: InodeId) -> String {
        let mut pending = vec![(Tree::ROOT, String::from("/"))];
        while let Some((id, path)) = pending.pop() {
            if id == wanted {
                return path;
            }
            if let Node::Directory(entries) = &self.inodes[id].node {
                let base = path.trim_end_matches('/');
                pending.extend(entries.iter().map(|e| {
                    let name = String::from_utf8_lossy(&e.name);
                    (e.inode, format!("{base}/{name}"))
                }));
            }
        }
        format!("inode {wanted}")
    }
}

/// A directory of a source tree, by its path below the source's root.
#[derive(Debug)]
pub struct SourceDir {
    /// The source's root directory.
    pub root: Arc<OwnedFd>,
    /// Path below it, empty for the root itself.
    pub path: Vec<u8>,
}

impl SourceDir {
    /// Opens the directory without following a link or crossing a mount on the way.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let path: &[u8] = if self.path.is_empty() { b"." } else { &self.path };
        let stay_below = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        without_atime(|flag| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | flag;
            rustix::fs::openat2(&*self.root, path, flags, Mode::empty(), stay_below)
        })
    }
}

/// A file in a source tree.
#[derive(Clone, Debug)]
pub struct Location {
    /// The directory that has it, shared by all files in it.
    pub dir: Arc<SourceDir>,
    /// Its name there.
    pub name: Box<[u8]>,
}

/// Opens [`Location`]s; remembers the directory of the last one, because files come directory by directory.
#[derive(Debug, Default)]
pub struct Opener {
    last: Option<(Arc<SourceDir>, OwnedFd)>,
}

impl Opener {
    /// Opens a file for reading. Never blocks on a FIFO and never follows a link that took the file's place.
    pub fn open(&mut self, location: &Location) -> io::Result<OwnedFd> {
        let dir = match &mut self.last {
            Some((dir, fd)) if Arc::ptr_eq(dir, &location.dir) => fd,
            last => &mut last.insert((Arc::clone(&location.dir), location.dir.open()?)).1,
        };
        open_file(dir, &location.name)
    }
}

/// Opens the regular file `name` in `dir`.
pub fn open_file(dir: &OwnedFd, name: &[u8]) -> io::Result<OwnedFd> {
    without_atime(|flag| {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | flag;
        rustix::fs::openat(dir, name, flags, Mode::empty())
    })
}

/// Reading must not dirty the source's inodes; but only an owner may ask for that.
fn without_atime(open: impl Fn(OFlags) -> rustix::io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    match open(OFlags::NOATIME) {
        Err(rustix::io::Errno::PERM) => Ok(open(OFlags::empty())?),
        other => Ok(other?),
    }
}
