//! The tree of a patch list, grown patch by patch over a stack of lowers.
//!
//! ```text
//!  a path is looked up     in the tree      then, unless a whiteout, an opaque directory or
//!                                           a non-directory of the tree is in the way        in the lowers
//! ```
//!
//! Invariants: a directory of the tree that a lower has as well carries the lower's metadata, so that only what a patch says changes;
//! a directory that takes the place of something removed or replaced is opaque, so that nothing below comes back.

use std::fs::File;

use super::copy::{Sources, permissions};
use super::follow::follow;
use super::{ApplyError, Change, Given, Patch, Preserve};
use crate::Limits;
use crate::builder::Builder;
use crate::erofs::reader;
use crate::path::{GuestPath, show};
use crate::stack::{Found, Stack};
use crate::tree::{Data, Inode, InodeId, Node, Opener, Tree};

type Names = [Box<[u8]>];

/// What the patches so far come to.
pub struct Upper<'a> {
    pub(super) stack: &'a Stack<'a, File>,
    layers: &'a [&'a str],
    sources: &'a Sources,
    limits: &'a Limits,
    pub(super) tree: Builder,
}

/// What is at a path.
pub(super) enum Seen {
    Nothing,
    Patched(InodeId),
    Lower(Found),
}

impl<'a> Upper<'a> {
    /// No patches yet. `layers` are the names of the stack's images.
    pub fn new(
        stack: &'a Stack<'a, File>,
        layers: &'a [&'a str],
        sources: &'a Sources,
        limits: &'a Limits,
    ) -> Result<Upper<'a>, ApplyError> {
        let mut upper = Upper { stack, layers, sources, limits, tree: Builder::new(Inode::directory()) };
        if let Some(root) = stack.root().map_err(ApplyError::Lookup)? {
            *upper.tree.inode_mut(Tree::ROOT) = upper.copied_up(&root, Node::Directory(Vec::new()))?;
        }
        Ok(upper)
    }

    /// The tree of the new lower.
    pub fn finish(self) -> Tree {
        self.tree.finish()
    }

    /// Applies one patch.
    pub fn apply(&mut self, patch: &Patch) -> Result<(), ApplyError> {
        if patch.follow_symlinks {
            let last_too = matches!(patch.change, Change::Append { .. });
            let path = follow(self, patch.path(), last_too)?;
            self.apply_at(&path, &patch.change)
        } else {
            self.apply_at(patch.path(), &patch.change)
        }
    }

    /// Does a change at a path that links have no part in.
    fn apply_at(&mut self, path: &GuestPath, change: &Change) -> Result<(), ApplyError> {
        match change {
            Change::Write { content, given, replace, .. } => {
                let data = Data::Bytes(content.as_slice().into());
                let node = Node::File { size: content.len() as u64, data };
                self.put(path, *replace, new_node(node, given, 0o644))
            }
            Change::CopyFile { source, given, replace, .. } => {
                self.check_free(path, *replace)?;
                let (mode, node) = self.sources.file(source, self.limits)?;
                self.put(path, *replace, new_node(node, given, permissions(mode, false)))
            }
            Change::CopyDir { source, preserve, replace, .. } => {
                self.check_free(path, *replace)?;
                let parent = self.parents(path)?;
                self.copy_dir(parent, path.split().1, source, *preserve)
            }
            Change::Symlink { target, replace, .. } => {
                let node = Node::Symlink(target.as_slice().into());
                self.put(path, *replace, new_node(node, &Given::default(), 0o777))
            }
            Change::Mkdir { given, .. } => self.mkdir(path, given),
            Change::Remove { .. } => self.remove(path),
            Change::Append { content, .. } => self.append(path, content),
        }
    }

    fn put(&mut self, path: &GuestPath, replace: bool, inode: Inode) -> Result<(), ApplyError> {
        self.check_free(path, replace)?;
        let parent = self.parents(path)?;
        self.tree.insert(parent, path.split().1, inode);
        Ok(())
    }

    /// Without `replace` the path must lead to nothing.
    fn check_free(&self, path: &GuestPath, replace: bool) -> Result<(), ApplyError> {
        if replace {
            return Ok(());
        }
        match self.see(path.names())? {
            Seen::Nothing => Ok(()),
            Seen::Patched(id) => Err(ApplyError::AlreadyPatched { kind: self.tree.inode(id).kind() }),
            Seen::Lower(found) => {
                Err(ApplyError::InLayer { kind: found.inode.kind(), layer: self.layers[found.layer].into() })
            }
        }
    }

    fn mkdir(&mut self, path: &GuestPath, given: &Given) -> Result<(), ApplyError> {
        let seen = self.see(path.names())?;
        let id = match seen {
            Seen::Patched(id) if self.tree.is_directory(id) => id,
            Seen::Patched(id) => return Err(ApplyError::Kind { kind: self.tree.inode(id).kind() }),
            Seen::Lower(found) if !found.inode.is_directory() => {
                return Err(ApplyError::Kind { kind: found.inode.kind() });
            }
            Seen::Lower(_) if *given == Given::default() => return Ok(()),
            Seen::Lower(found) => {
                let parent = self.parents(path)?;
                let copy = self.copied_up(&found, Node::Directory(Vec::new()))?;
                self.tree.insert(parent, path.split().1, copy)
            }
            Seen::Nothing => {
                let parent = self.parents(path)?;
                self.make_directory(parent, path.split().1, Inode::directory())
            }
        };
        let inode = self.tree.inode_mut(id);
        inode.permissions = given.mode.unwrap_or(inode.permissions);
        inode.uid = given.uid.unwrap_or(inode.uid);
        inode.gid = given.gid.unwrap_or(inode.gid);
        Ok(())
    }

    fn remove(&mut self, path: &GuestPath) -> Result<(), ApplyError> {
        let (_, last) = path.split();
        if self.below(path.names())?.is_some() {
            let parent = self.parents(path)?;
            self.tree.insert(parent, last, Inode::whiteout());
        } else if let Some(parent) = self.tree.find(path.split().0) {
            self.tree.remove(parent, last);
        }
        Ok(())
    }

    fn append(&mut self, path: &GuestPath, more: &[u8]) -> Result<(), ApplyError> {
        let (id, mut content) = match self.see(path.names())? {
            Seen::Nothing => return Err(ApplyError::NotFound),
            Seen::Patched(id) => (id, self.content(id, path)?),
            Seen::Lower(found) => {
                let content = self.lower_content(&found)?;
                let empty = Node::File { size: 0, data: Data::Bytes(Box::default()) };
                let copy = self.copied_up(&found, empty)?;
                let parent = self.parents(path)?;
                (self.tree.insert(parent, path.split().1, copy), content)
            }
        };
        content.extend(more);
        if content.len() as u64 > self.limits.append {
            return Err(ApplyError::Limit { what: "bytes in a file to append to", limit: self.limits.append });
        }
        let size = content.len() as u64;
        self.tree.inode_mut(id).node = Node::File { size, data: Data::Bytes(content.into()) };
        Ok(())
    }

    /// Puts a tree of the host at a name; directories that are there stay and are added to.
    fn copy_dir(
        &mut self,
        parent: InodeId,
        name: &[u8],
        source: &std::path::Path,
        preserve: Preserve,
    ) -> Result<(), ApplyError> {
        let mut walk = self.sources.walk(source, preserve, self.limits)?;
        let mut pending = vec![(parent, Box::<[u8]>::from(name), Vec::new(), 0)];
        while let Some((parent, name, below, depth)) = pending.pop() {
            if depth > self.limits.depth || below.len() > self.limits.path {
                return Err(ApplyError::Limit {
                    what: "directories below each other",
                    limit: self.limits.depth as u64,
                });
            }
            let listed = walk.list(&below)?;
            let here = self.make_directory(parent, &name, listed.directory);
            for (name, inode) in listed.entries {
                if let Node::Directory(_) = inode.node {
                    let separator: &[u8] = if below.is_empty() { b"" } else { b"/" };
                    pending.push((here, name.clone(), [&below, separator, &*name].concat(), depth + 1));
                } else {
                    self.tree.insert(here, &name, inode);
                }
            }
        }
        Ok(())
    }

    /// A directory at this name with this metadata; what is in one that is there already stays.
    fn make_directory(&mut self, parent: InodeId, name: &[u8], mut inode: Inode) -> InodeId {
        match self.tree.child(parent, name) {
            Some(id) if self.tree.is_directory(id) => {
                if self.tree.inode(id).is_opaque() {
                    inode.set_opaque();
                }
                *self.tree.inode_mut(id) = inode;
                id
            }
            Some(_) => {
                inode.set_opaque();
                self.tree.insert(parent, name, inode)
            }
            None => self.tree.insert(parent, name, inode),
        }
    }

    /// The directory above a path, in the tree. Those of the lowers are copied, others are made.
    fn parents(&mut self, path: &GuestPath) -> Result<InodeId, ApplyError> {
        let (parents, _) = path.split();
        let mut at = Tree::ROOT;
        for (depth, name) in parents.iter().enumerate() {
            let prefix = &parents[..=depth];
            let not_one = |kind| ApplyError::Parent { prefix: show(prefix), kind };
            at = match self.tree.child(at, name) {
                Some(id) if self.tree.is_directory(id) => id,
                Some(id) if !self.tree.inode(id).is_whiteout() => return Err(not_one(self.tree.inode(id).kind())),
                Some(_) => self.make_directory(at, name, Inode::directory()),
                None => match self.below(prefix)? {
                    Some(found) if !found.inode.is_directory() => return Err(not_one(found.inode.kind())),
                    Some(found) => {
                        let copy = self.copied_up(&found, Node::Directory(Vec::new()))?;
                        self.tree.insert(at, name, copy)
                    }
                    None => self.tree.insert(at, name, Inode::directory()),
                },
            };
        }
        Ok(at)
    }

    pub(super) fn see(&self, names: &Names) -> Result<Seen, ApplyError> {
        match self.tree.find(names) {
            Some(id) if self.tree.inode(id).is_whiteout() => Ok(Seen::Nothing),
            Some(id) => Ok(Seen::Patched(id)),
            None => Ok(self.below(names)?.map_or(Seen::Nothing, Seen::Lower)),
        }
    }

    /// What the lowers show at a path, were nothing of that name in the tree; the directories above it count.
    fn below(&self, names: &Names) -> Result<Option<Found>, ApplyError> {
        let mut at = Tree::ROOT;
        for name in names.split_last().map_or(&[][..], |(_, parents)| parents) {
            match self.tree.child(at, name) {
                Some(id) if self.tree.is_directory(id) && !self.tree.inode(id).is_opaque() => at = id,
                Some(_) => return Ok(None),
                None => break,
            }
        }
        self.stack.lookup(names.iter().map(|name| &**name)).map_err(ApplyError::Lookup)
    }

    /// An inode of a lower, with other content.
    fn copied_up(&self, found: &Found, node: Node) -> Result<Inode, ApplyError> {
        let reader::Inode { mode, uid, gid, mtime, .. } = found.inode;
        let mut xattrs = match self.stack.image(found.layer) {
            Some(image) => image.xattrs(&found.inode).map_err(|source| self.read_failed(found, source))?,
            None => Vec::new(),
        };
        xattrs.retain(|x| !is_overlay_mark(&x.name));
        xattrs.sort();
        Ok(Inode { permissions: mode & 0o7777, uid, gid, mtime, xattrs, node })
    }

    fn lower_content(&self, found: &Found) -> Result<Vec<u8>, ApplyError> {
        if found.inode.kind() != "regular file" {
            return Err(ApplyError::Kind { kind: found.inode.kind() });
        }
        let mut content = self.room(found.inode.size)?;
        if let Some(image) = self.stack.image(found.layer) {
            image.read(&found.inode, 0, &mut content).map_err(|source| self.read_failed(found, source))?;
        }
        Ok(content)
    }

    fn content(&self, id: InodeId, path: &GuestPath) -> Result<Vec<u8>, ApplyError> {
        let inode = self.tree.inode(id);
        let Node::File { size, data } = &inode.node else { return Err(ApplyError::Kind { kind: inode.kind() }) };
        let mut content = self.room(*size)?;
        let failed = |source| ApplyError::Source { what: "read the copy at", path: path.to_string().into(), source };
        let mut read = |file: &std::os::fd::OwnedFd| -> std::io::Result<()> {
            use std::os::unix::fs::FileExt;
            File::from(file.try_clone()?).read_exact_at(&mut content, 0)
        };
        match data {
            Data::Bytes(bytes) => content.copy_from_slice(bytes),
            Data::Open(file) => read(file).map_err(failed)?,
            Data::At { location, .. } => {
                Opener::default().open(location).and_then(|file| read(&file)).map_err(failed)?
            }
            Data::Stored { .. } | Data::Elsewhere { .. } => {} // only archives are stored, and only layers merged
        }
        Ok(content)
    }

    fn room(&self, size: u64) -> Result<Vec<u8>, ApplyError> {
        let fits = usize::try_from(size).ok().filter(|_| size <= self.limits.append);
        let limit = self.limits.append;
        fits.map(|size| vec![0; size]).ok_or(ApplyError::Limit { what: "bytes in a file to append to", limit })
    }

    pub(super) fn read_failed(&self, found: &Found, source: reader::ReadError) -> ApplyError {
        ApplyError::Read { layer: self.layers[found.layer].into(), source }
    }
}

/// True for overlayfs's marks on a layer's inodes, which must not be copied to another layer. Doubly prefixed names are data.
pub fn is_overlay_mark(name: &[u8]) -> bool {
    name.strip_prefix(b"trusted.overlay.").is_some_and(|own| !own.starts_with(b"overlay."))
}

fn new_node(node: Node, given: &Given, mode: u16) -> Inode {
    let permissions = given.mode.unwrap_or(mode);
    let (uid, gid) = (given.uid.unwrap_or(0), given.gid.unwrap_or(0));
    Inode { permissions, uid, gid, node, ..Inode::directory() }
}
