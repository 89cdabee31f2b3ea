//! Extended attributes of a snapshot's inodes, those of overlayfs translated.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;

use crate::erofs::format::split_xattr_name;
use crate::tree::{Inode, Node, OPAQUE, Xattr};

/// Where an inode's attributes are read: an open directory, or a name in one.
pub enum Origin<'a> {
    /// The directory itself.
    Directory(&'a OwnedFd),
    /// Something in it, whatever its kind; a symbolic link is not followed.
    Entry(&'a OwnedFd, &'a [u8]),
}

/// Why attributes cannot be carried over.
pub enum Refusal {
    /// Together larger than allowed, or one larger than an image can hold.
    TooLarge,
    /// The inode is a stand-in whose data lies in another layer.
    Metacopy,
    /// The kernel's word.
    Failed(Errno),
}

/// Reads attributes into a buffer that serves for all inodes.
pub struct Reader {
    limit: usize,
    buffer: Vec<u8>,
}

impl Reader {
    /// A reader that refuses more than `limit` bytes of names and values for one inode.
    pub fn new(limit: usize) -> Reader {
        // The kernel's largest value, and its largest list of names.
        Reader { limit, buffer: vec![0; 64 << 10] }
    }

    /// The attributes, sorted by name. What EROFS has no place for (`btrfs.*`, `system.*` but the ACLs) belongs to the file
    /// system that the layer happens to lie on, and is left there.
    pub fn read(&mut self, origin: &Origin) -> Result<Vec<Xattr>, Refusal> {
        let len = match origin.list(&mut self.buffer) {
            Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
            Ok(len) => len,
            Err(Errno::RANGE | Errno::TOOBIG) => return Err(Refusal::TooLarge),
            Err(e) => return Err(Refusal::Failed(e)),
        };
        let names = self.buffer[..len].to_vec();
        let mut gathered = Gathered::new(self.limit);
        for name in names.split(|&b| b == 0).filter(|n| !n.is_empty()) {
            let Some(kept) = translate(name)? else { continue };
            let value = match origin.get(name, &mut self.buffer) {
                Ok(len) => &self.buffer[..len],
                Err(Errno::NODATA) => continue, // removed meanwhile
                Err(Errno::RANGE) => return Err(Refusal::TooLarge),
                Err(e) => return Err(Refusal::Failed(e)),
            };
            gathered.add(kept, value)?;
        }
        Ok(gathered.finish())
    }
}

/// The attributes of one inode, as they are found.
pub struct Gathered {
    room: usize,
    xattrs: BTreeMap<Vec<u8>, Box<[u8]>>,
}

impl Gathered {
    /// At most `limit` bytes of names and values.
    pub fn new(limit: usize) -> Gathered {
        Gathered { room: limit, xattrs: BTreeMap::new() }
    }

    /// Takes an attribute by its name in the tree; see [`translate`].
    pub fn add(&mut self, name: Vec<u8>, value: &[u8]) -> Result<(), Refusal> {
        self.room = self.room.checked_sub(name.len() + value.len()).ok_or(Refusal::TooLarge)?;
        if value.len() > usize::from(u16::MAX) {
            return Err(Refusal::TooLarge);
        }
        // "x" says that whiteouts are files with an attribute, not that the directory is opaque; they are translated too.
        if name != OPAQUE || value == b"y" {
            self.xattrs.insert(name, value.into());
        }
        Ok(())
    }

    /// All, sorted by name.
    pub fn finish(self) -> Vec<Xattr> {
        self.xattrs.into_iter().map(|(name, value)| Xattr { name: name.into(), value }).collect()
    }
}

impl Origin<'_> {
    fn list(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Origin::Directory(fd) => rustix::fs::flistxattr(fd, buffer),
            Origin::Entry(dir, name) => rustix::fs::llistxattr(proc_path(dir, name), buffer),
        }
    }

    fn get(&self, attr: &[u8], buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Origin::Directory(fd) => rustix::fs::fgetxattr(fd, attr, buffer),
            Origin::Entry(dir, name) => rustix::fs::lgetxattr(proc_path(dir, name), attr, buffer),
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
pub fn translate(name: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
    let overlay = name.strip_prefix(b"trusted.overlay.").or_else(|| name.strip_prefix(b"user.overlay."));
    Ok(match overlay {
        // Books about the host's upper layer: file handles of host inodes, link counts, "somebody was copied up here".
        Some(b"origin" | b"impure" | b"nlink" | b"upper" | b"uuid" | b"protattr") => None,
        Some(own @ (b"opaque" | b"redirect" | b"whiteout")) => Some([b"trusted.overlay.", own].concat()),
        Some(b"metacopy") => return Err(Refusal::Metacopy),
        // Doubly prefixed names belong to an overlay inside the container and are data here.
        _ => split_xattr_name(name).map(|_| name.to_vec()),
    })
}

/// True for an empty file with the whiteout attribute, overlayfs's other form of a whiteout. Takes the attribute away.
pub fn take_whiteout_mark(inode: &mut Inode) -> bool {
    let before = inode.xattrs.len();
    inode.xattrs.retain(|x| &*x.name != b"trusted.overlay.whiteout");
    before != inode.xattrs.len() && matches!(inode.node, Node::File { size: 0, .. })
}
