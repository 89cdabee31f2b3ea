//! Directory blocks: sorted names cut into blocks, so that the kernel can search blocks and names by bisection.

use super::format::{BLOCK, DIRENT_SIZE, Dirent};
use crate::tree::{Entry, InodeId};

/// The entries of one directory as they go to disk, `.` and `..` in their sorted places.
pub struct Directory<'a> {
    names: Vec<(&'a [u8], InodeId)>,
}

impl<'a> Directory<'a> {
    /// `entries` are sorted by name.
    pub fn new(entries: &'a [Entry], this: InodeId, parent: InodeId) -> Directory<'a> {
        let mut names: Vec<(&[u8], InodeId)> = Vec::with_capacity(entries.len() + 2);
        names.extend(entries.iter().map(|e| (&*e.name, e.inode)));
        for own in [(b".".as_slice(), this), (b"..".as_slice(), parent)] {
            let place = names.partition_point(|(name, _)| *name < own.0);
            names.insert(place, own);
        }
        Directory { names }
    }

    /// Bytes of the directory: whole blocks, and the used part of the last.
    pub fn size(&self) -> u64 {
        self.blocks().map(used).fold(0, |size: u64, used| size.next_multiple_of(BLOCK) + used)
    }

    /// The blocks' used bytes, one after the other. `describe` gives an inode's nid and file type.
    pub fn encode(&self, describe: impl Fn(InodeId) -> (u64, u8)) -> impl Iterator<Item = Vec<u8>> {
        self.blocks().map(move |block| {
            let mut out = Vec::with_capacity(BLOCK as usize);
            let mut name_offset = block.len() * DIRENT_SIZE;
            for &(name, inode) in block {
                let (nid, file_type) = describe(inode);
                out.extend(Dirent { nid, name_offset: name_offset as u16, file_type }.encode());
                name_offset += name.len();
            }
            block.iter().for_each(|(name, _)| out.extend(*name));
            out
        })
    }

    /// Names cut so that each piece fits a block.
    fn blocks(&self) -> impl Iterator<Item = &[(&'a [u8], InodeId)]> {
        let mut rest = &*self.names;
        std::iter::from_fn(move || {
            let mut free = BLOCK;
            let fits = |(name, _): &&(&[u8], InodeId)| {
                let cost = (DIRENT_SIZE + name.len()) as u64;
                free.checked_sub(cost).map(|left| free = left).is_some()
            };
            let (block, later) = rest.split_at(rest.iter().take_while(fits).count());
            rest = later;
            (!block.is_empty()).then_some(block)
        })
    }
}

fn used(block: &[(&[u8], InodeId)]) -> u64 {
    block.iter().map(|(name, _)| (DIRENT_SIZE + name.len()) as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(names: &[&str]) -> Vec<Entry> {
        names.iter().enumerate().map(|(i, n)| Entry { name: n.as_bytes().into(), inode: i + 10 }).collect()
    }

    #[test]
    fn dots_are_sorted_among_the_names() {
        let entries = entries(&["+a", ".b", "z"]);
        let names: Vec<_> = Directory::new(&entries, 1, 0).names.iter().map(|n| n.0.to_vec()).collect();
        assert_eq!(names, [b"+a".to_vec(), b".".to_vec(), b"..".to_vec(), b".b".to_vec(), b"z".to_vec()]);
    }

    #[test]
    fn size_and_encoding_agree() {
        let names: Vec<String> = (0..1000).map(|i| format!("{i:0200}")).collect();
        let entries = entries(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let directory = Directory::new(&entries, 1, 0);
        let blocks: Vec<_> = directory.encode(|id| (id as u64, 1)).collect();
        assert!(blocks.iter().all(|b| b.len() <= BLOCK as usize));
        let last = blocks.last().map_or(0, |b| b.len() as u64);
        assert_eq!(directory.size(), (blocks.len() as u64 - 1) * BLOCK + last);
    }
}
