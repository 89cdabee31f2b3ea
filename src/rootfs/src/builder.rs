//! Trees that are not put together directory by directory but name by name, in any order.

use std::collections::BTreeMap;

use crate::tree::{Entry, Inode, InodeId, Node, Tree};

/// A tree under construction.
#[derive(Debug)]
pub struct Builder {
    inodes: Vec<Inode>,
    /// Entries of the directories; `None` for what is none.
    names: Vec<Option<BTreeMap<Box<[u8]>, InodeId>>>,
}

impl Builder {
    /// A tree that has a root directory only, with the metadata of `root`.
    pub fn new(root: Inode) -> Builder {
        let root = Inode { node: Node::Directory(Vec::new()), ..root };
        Builder { inodes: vec![root], names: vec![Some(BTreeMap::new())] }
    }

    /// An inode, whose directory entries are not in it yet.
    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id]
    }

    /// An inode to be changed; its kind must stay.
    pub fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.inodes[id]
    }

    /// True for a directory.
    pub fn is_directory(&self, id: InodeId) -> bool {
        self.names[id].is_some()
    }

    /// Finds a name in a directory; `None` also when `directory` is none.
    pub fn child(&self, directory: InodeId, name: &[u8]) -> Option<InodeId> {
        self.names[directory].as_ref()?.get(name).copied()
    }

    /// Finds a path of names below the root, without following links.
    pub fn find<N: AsRef<[u8]>>(&self, path: &[N]) -> Option<InodeId> {
        path.iter().try_fold(Tree::ROOT, |at, name| self.child(at, name.as_ref()))
    }

    /// Puts a new inode in a directory; what has the name there, with all that is below it, is gone. Directories come empty.
    pub fn insert(&mut self, directory: InodeId, name: &[u8], inode: Inode) -> InodeId {
        let id = self.inodes.len();
        self.names.push(matches!(inode.node, Node::Directory(_)).then(BTreeMap::new));
        self.inodes.push(inode);
        self.link(directory, name, id);
        id
    }

    /// Gives an inode that is no directory one more name.
    pub fn link(&mut self, directory: InodeId, name: &[u8], id: InodeId) {
        if let Some(names) = &mut self.names[directory] {
            names.insert(name.into(), id);
        }
    }

    /// Takes a name away, with all that is below it; false when there is none.
    pub fn remove(&mut self, directory: InodeId, name: &[u8]) -> bool {
        self.names[directory].as_mut().is_some_and(|names| names.remove(name).is_some())
    }

    /// The tree of what can be reached from the root.
    pub fn finish(mut self) -> Tree {
        let mut inodes = Vec::with_capacity(self.inodes.len());
        let mut moved = vec![None; self.inodes.len()];
        moved[Tree::ROOT] = Some(Tree::ROOT);
        let mut pending = vec![(Tree::ROOT, Tree::ROOT)];
        inodes.push(self.take(Tree::ROOT));
        while let Some((old, new)) = pending.pop() {
            let names = self.names[old].take().unwrap_or_default();
            let mut entries = Vec::with_capacity(names.len());
            for (name, child) in names {
                let inode = moved[child].unwrap_or(inodes.len());
                if moved[child].is_none() {
                    moved[child] = Some(inode);
                    inodes.push(self.take(child));
                    pending.push((child, inode));
                }
                entries.push(Entry { name, inode });
            }
            if let Node::Directory(place) = &mut inodes[new].node {
                *place = entries;
            }
        }
        Tree { inodes }
    }

    fn take(&mut self, id: InodeId) -> Inode {
        std::mem::replace(&mut self.inodes[id], Inode::whiteout())
    }
}
