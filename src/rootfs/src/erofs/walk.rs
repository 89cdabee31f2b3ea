//! What only a walk over all names of a tree can tell.

use std::collections::HashMap;

use crate::tree::{InodeId, Node, Time, Tree};

/// The order of the metadata area and what only a walk over the names can tell.
pub struct Walk {
    /// Parents before children, siblings together.
    pub order: Vec<InodeId>,
    /// Directory above each directory.
    pub parents: Vec<InodeId>,
    /// Link count of each inode.
    pub links: Vec<u32>,
}

impl Walk {
    /// Walks `tree`.
    pub fn new(tree: &Tree) -> Walk {
        let count = tree.inodes.len();
        let mut walk = Walk { order: vec![Tree::ROOT], parents: vec![Tree::ROOT; count], links: vec![0; count] };
        walk.links[Tree::ROOT] = 2;
        let mut pending = vec![Tree::ROOT];
        while let Some(dir) = pending.pop() {
            let Node::Directory(entries) = &tree.inodes[dir].node else { continue };
            let first_child = pending.len();
            for entry in entries {
                if walk.links[entry.inode] == 0 {
                    walk.order.push(entry.inode);
                }
                walk.links[entry.inode] += 1;
                if let Node::Directory(_) = tree.inodes[entry.inode].node {
                    walk.links[entry.inode] += 1; // its own "."
                    walk.links[dir] += 1; // its ".."
                    walk.parents[entry.inode] = dir;
                    pending.push(entry.inode);
                }
            }
            pending[first_child..].reverse();
        }
        walk
    }
}

/// The modification time that most inodes have, the earliest of several.
pub fn common_time(tree: &Tree) -> Time {
    let mut counts = HashMap::new();
    tree.inodes.iter().for_each(|inode| *counts.entry(inode.mtime).or_insert(0u64) += 1);
    let best = counts.into_iter().max_by_key(|&(time, count)| (count, std::cmp::Reverse(time)));
    best.map_or_else(Time::default, |(time, _)| time)
}
