//! Entries of an archive → the tree of a layer. Names are judged here; nothing on any disk is looked at.

use super::TarError;
use super::archive::{Archive, Entry, Kind};
use crate::Limits;
use crate::builder::Builder;
use crate::erofs::stream::{CopyError, Stream};
use crate::erofs::writer::{INLINE_MAX, WriteError};
use crate::layer::markers::{Marker, marker};
use crate::layer::xattrs::{Gathered, Refusal, take_whiteout_mark, translate};
use crate::path::{PathError, components};
use crate::tree::{Data, Inode, InodeId, Node, Tree, Xattr};

/// A layer of which some entries are known.
pub struct Layer<'l> {
    limits: &'l Limits,
    tree: Builder,
    /// Names that markers remove, by directory. They act on the layers below, wherever in the archive they stand.
    removed: Vec<(InodeId, Box<[u8]>)>,
    opaque: Vec<InodeId>,
    entries: usize,
    small_files: usize,
}

impl<'l> Layer<'l> {
    /// An empty layer.
    pub fn new(limits: &'l Limits) -> Layer<'l> {
        let tree = Builder::new(Inode::directory());
        Layer { limits, tree, removed: Vec::new(), opaque: Vec::new(), entries: 0, small_files: 0 }
    }

    /// Takes one entry; the data of a file goes from the archive into the image.
    pub fn add(&mut self, entry: Entry, archive: &mut Archive, image: &mut Stream) -> Result<(), TarError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(TarError::Limit { what: "entries", limit: self.limits.entries as u64 });
        }
        let path = entry.path.clone();
        let names = self.names(&path)?;
        let Some((last, parents)) = names.split_last() else { return self.root(entry) };
        // A directory with a marker's name is a marker, and what lies in it is nothing.
        if let Some((depth, marker)) = names.iter().enumerate().find_map(|(i, name)| Some((i, marker(name)?))) {
            return self.marker(&names[..depth], marker, &path);
        }
        let parent = self.directory(parents, &path)?;
        if let Kind::HardLink(target) = &entry.kind {
            let id = self.link_target(target, &entry.path)?;
            self.tree.link(parent, last, id);
            return Ok(());
        }
        let inode = self.inode(entry, archive, image)?;
        match self.tree.child(parent, last) {
            Some(old) if self.tree.is_directory(old) && matches!(inode.node, Node::Directory(_)) => {
                *self.tree.inode_mut(old) = inode;
            }
            _ => drop(self.tree.insert(parent, last, inode)),
        }
        Ok(())
    }

    /// The whole tree.
    pub fn finish(mut self) -> Tree {
        for id in std::mem::take(&mut self.opaque) {
            self.tree.inode_mut(id).set_opaque();
        }
        for (directory, name) in std::mem::take(&mut self.removed) {
            match self.tree.child(directory, &name) {
                // A layer never removes what it adds itself, but what it puts in a removed directory's place starts empty.
                Some(own) if self.tree.is_directory(own) => self.tree.inode_mut(own).set_opaque(),
                Some(_) => {}
                None => drop(self.tree.insert(directory, &name, Inode::whiteout())),
            }
        }
        self.tree.finish()
    }

    fn names<'p>(&self, path: &'p [u8]) -> Result<Vec<&'p [u8]>, TarError> {
        let bad = |source| TarError::Path { path: String::from_utf8_lossy(path).into_owned(), source };
        if path.starts_with(b"/") {
            return Err(bad(PathError::Absolute));
        }
        if path.len() > self.limits.path {
            return Err(bad(PathError::Long));
        }
        let names = components(path).map_err(bad)?;
        if names.len() > self.limits.depth {
            return Err(TarError::Limit { what: "directories below each other", limit: self.limits.depth as u64 });
        }
        Ok(names)
    }

    fn root(&mut self, entry: Entry) -> Result<(), TarError> {
        if entry.kind != Kind::Directory {
            return Err(TarError::entry(&entry.path, "is the root and no directory"));
        }
        *self.tree.inode_mut(Tree::ROOT) = self.described(entry, Node::Directory(Vec::new()))?;
        Ok(())
    }

    fn marker(&mut self, parents: &[&[u8]], marker: Marker, path: &[u8]) -> Result<(), TarError> {
        match marker {
            Marker::Bookkeeping => {}
            Marker::Bad => return Err(TarError::entry(path, "is a whiteout marker that names no file")),
            Marker::Opaque => {
                let directory = self.directory(parents, path)?;
                self.opaque.push(directory);
            }
            Marker::Whiteout(name) => {
                let directory = self.directory(parents, path)?;
                self.removed.push((directory, name.into()));
            }
        }
        Ok(())
    }

    /// The directory of these names; those that the archive has not mentioned are made. No link is followed.
    fn directory(&mut self, names: &[&[u8]], path: &[u8]) -> Result<InodeId, TarError> {
        names.iter().try_fold(Tree::ROOT, |at, name| match self.tree.child(at, name) {
            Some(id) if self.tree.is_directory(id) => Ok(id),
            Some(_) => Err(TarError::entry(path, "lies below something that is no directory")),
            None => Ok(self.tree.insert(at, name, Inode::directory())),
        })
    }

    fn link_target(&self, target: &[u8], path: &[u8]) -> Result<InodeId, TarError> {
        let names = self.names(target)?;
        match self.tree.find(&names) {
            Some(id) if !self.tree.is_directory(id) => Ok(id),
            Some(_) => Err(TarError::entry(path, "is a hard link to a directory")),
            None => Err(TarError::entry(path, "is a hard link to something that is not in the layer")),
        }
    }

    fn inode(&mut self, mut entry: Entry, archive: &mut Archive, image: &mut Stream) -> Result<Inode, TarError> {
        let node = match &mut entry.kind {
            Kind::File => {
                let (size, extents) = (entry.size, entry.extents.take());
                let data = if size <= INLINE_MAX && self.small_files + size as usize <= self.limits.small_files {
                    self.small_files += size as usize;
                    let mut bytes = vec![0; size as usize];
                    for extent in extents.unwrap_or_else(|| std::iter::once(0..size).collect()) {
                        let part = &mut bytes[extent.start as usize..extent.end as usize];
                        archive.read_exact(part)?;
                    }
                    Data::Bytes(bytes.into())
                } else {
                    let stored = match extents.is_none().then(|| archive.skip_to_copy()).flatten() {
                        Some((file, at)) => image.store_from(size, file, at),
                        None => image.store(size, extents, archive),
                    };
                    stored.map_err(|e| match e {
                        CopyError::TooShort => archive.failed(std::io::ErrorKind::UnexpectedEof.into()),
                        CopyError::Read(source) => archive.failed(source),
                        CopyError::Write(source) => TarError::Write(WriteError::Write(source)),
                    })?
                };
                if image.position() > self.limits.bytes {
                    return Err(TarError::Limit { what: "bytes of file data", limit: self.limits.bytes });
                }
                Node::File { size, data }
            }
            Kind::Symlink(target) if target.is_empty() || target.contains(&0) || target.len() > 4095 => {
                return Err(TarError::entry(&entry.path, "is a symbolic link of impossible length"));
            }
            Kind::Symlink(target) => Node::Symlink(std::mem::take(target).into()),
            &mut (Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor))
                if major >= 1 << 12 || minor >= 1 << 20 =>
            {
                return Err(TarError::entry(&entry.path, "is a device with an impossible number"));
            }
            &mut Kind::CharDevice(major, minor) => Node::CharDevice { major: major as u32, minor: minor as u32 },
            &mut Kind::BlockDevice(major, minor) => Node::BlockDevice { major: major as u32, minor: minor as u32 },
            Kind::Fifo => Node::Fifo,
            Kind::Directory | Kind::HardLink(_) => Node::Directory(Vec::new()),
        };
        let mut inode = self.described(entry, node)?;
        Ok(if take_whiteout_mark(&mut inode) { Inode::whiteout() } else { inode })
    }

    fn described(&self, entry: Entry, node: Node) -> Result<Inode, TarError> {
        let Entry { permissions, uid, gid, mtime, .. } = entry;
        let xattrs = self.xattrs(&entry).map_err(|refusal| {
            let what = match refusal {
                Refusal::TooLarge => "has extended attributes that are too large",
                Refusal::Metacopy => "has its data in another layer",
                Refusal::Failed(_) => "has extended attributes that cannot be read",
            };
            TarError::entry(&entry.path, what)
        })?;
        Ok(Inode { permissions, uid, gid, mtime, xattrs, node })
    }

    fn xattrs(&self, entry: &Entry) -> Result<Vec<Xattr>, Refusal> {
        let mut gathered = Gathered::new(self.limits.xattrs);
        for (name, value) in &entry.xattrs {
            if let Some(kept) = translate(name)? {
                gathered.add(kept, value)?;
            }
        }
        Ok(gathered.finish())
    }
}
