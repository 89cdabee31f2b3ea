//! Files that a layer's image need not hold: whoever mounts the image reads them in the layer's directory.
//!
//! ```text
//!  directory   /usr/lib/model.bin   4 GiB
//!  image       /usr/lib/model.bin   size 4 GiB, no block, trusted.overlay.metacopy, trusted.overlay.redirect=/usr/lib/model.bin
//! ```
//!
//! overlayfs takes the data from a data-only lower, under the redirect's path (`Documentation/filesystems/overlayfs.rst`). What
//! reads there for the guest is nobody on the host, so only what everybody may read is referred to. A file with several names
//! has its data in the image: another layer could hide the one that it is referred to by.

use crate::tree::{Data, InodeId, Node, Tree, Xattr};

/// Smallest file that is referred to, in bytes. A smaller one costs less to copy than to be opened on the host whenever the guest
/// opens it, whose pages are then read anew.
pub const REFERRED: u64 = 4 << 20;

/// Longest path of a redirect that overlayfs reads (`PATH_MAX`).
const PATH_MAX: usize = 4095;

/// Has the files of `tree` that can be elsewhere referred to, if they have at least `least` bytes together; says whether they
/// have. The tree was made from a directory, and its image is of use only beside that.
pub fn refer(tree: &mut Tree, least: u64) -> bool {
    let mut names = vec![0u32; tree.inodes.len()];
    for inode in &tree.inodes {
        if let Node::Directory(entries) = &inode.node {
            entries.iter().for_each(|entry| names[entry.inode] += 1);
        }
    }
    let mut found: Vec<(InodeId, Vec<u8>)> = Vec::new();
    let mut bytes = 0;
    let mut pending = vec![(Tree::ROOT, Vec::new())];
    while let Some((id, path)) = pending.pop() {
        let inode = &tree.inodes[id];
        let Node::Directory(entries) = &inode.node else { continue };
        if inode.permissions & 0o001 == 0 {
            continue; // others do not get in
        }
        for entry in entries {
            let child = &tree.inodes[entry.inode];
            let path = || [&path, b"/".as_slice(), &entry.name].concat();
            match &child.node {
                Node::Directory(_) => pending.push((entry.inode, path())),
                Node::File { size, data: Data::At { extents, .. } }
                    if *size >= REFERRED && names[entry.inode] == 1 && child.permissions & 0o004 != 0 =>
                {
                    bytes += extents.as_ref().map_or(*size, |extents| extents.iter().map(|e| e.end - e.start).sum());
                    found.push((entry.inode, path()));
                }
                _ => {}
            }
        }
    }
    if bytes < least {
        return false;
    }
    for (id, path) in found.into_iter().filter(|(_, path)| path.len() <= PATH_MAX) {
        let inode = &mut tree.inodes[id];
        let Node::File { data: Data::At { extents, .. }, .. } = &mut inode.node else { continue };
        *extents = Some(Vec::new());
        for (name, value) in [(METACOPY, &[][..]), (REDIRECT, &path)] {
            inode.xattrs.retain(|xattr| &*xattr.name != name);
            inode.xattrs.push(Xattr { name: name.into(), value: value.into() });
        }
        inode.xattrs.sort();
    }
    true
}

/// The attribute of a file whose data lies elsewhere.
const METACOPY: &[u8] = b"trusted.overlay.metacopy";
/// The attribute that says where.
const REDIRECT: &[u8] = b"trusted.overlay.redirect";
