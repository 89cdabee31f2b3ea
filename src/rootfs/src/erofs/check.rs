//! A check of a whole image, as far as it can be checked without its source.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::format;
use super::reader::{Image, Inode, ReadAt, ReadError, Result};

/// CRC-32C of a whole image, as [`super::writer::Written`] has it.
pub fn checksum(file: &File) -> io::Result<u32> {
    let mut checksum = 0;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        match FileExt::read_at(file, &mut buffer, at) {
            Ok(0) => return Ok(checksum),
            Ok(n) => {
                checksum = crc32c::crc32c_append(checksum, &buffer[..n]);
                at += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// What [`Image::check`] counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Inodes reached from the root.
    pub inodes: u64,
    /// Names, `.` and `..` not counted.
    pub names: u64,
    /// Bytes of all regular files.
    pub bytes: u64,
}

impl<S: ReadAt + ?Sized> Image<'_, S> {
    /// Walks everything that the root leads to: structure, names, attributes, link counts, and that all data lies inside the image.
    /// The file data itself has no checksum.
    pub fn check(&self) -> Result<Totals> {
        let mut totals = Totals::default();
        let mut links: HashMap<u64, (u32, u32)> = HashMap::new(); // nid -> (promised, found)
        let root = self.root()?;
        let mut pending = vec![(root.nid, root.nid)];
        links.insert(root.nid, (root.nlink, 0));
        while let Some((nid, parent)) = pending.pop() {
            let directory = self.inode(nid)?;
            self.check_inode(&directory)?;
            let entries = self.entries(&directory)?;
            for (own, target) in [(b".".as_slice(), nid), (b"..", parent)] {
                if !entries.iter().any(|e| e.name == own && e.nid == target) {
                    return Err(ReadError::Corrupt { nid, what: "directory lacks . or .." });
                }
            }
            for entry in entries {
                let inode = self.inode(entry.nid)?;
                let known =
                    links.insert(entry.nid, (inode.nlink, links.get(&entry.nid).map_or(0, |l| l.1) + 1)).is_some();
                if entry.name == b"." || entry.name == b".." {
                    continue;
                }
                totals.names += 1;
                if entry.file_type != format::file_type(inode.mode) {
                    return Err(ReadError::Corrupt { nid: entry.nid, what: "name and inode differ in type" });
                }
                if known && inode.is_directory() {
                    return Err(ReadError::Corrupt { nid: entry.nid, what: "directory has several names" });
                }
                if inode.is_directory() {
                    pending.push((entry.nid, nid));
                } else if !known {
                    self.check_inode(&inode)?;
                    if inode.mode & format::S_IFMT == format::S_IFREG {
                        totals.bytes = totals.bytes.saturating_add(inode.size);
                    }
                }
            }
        }
        totals.inodes = links.len() as u64;
        match links.iter().find(|(_, (promised, found))| promised != found) {
            Some((&nid, _)) => Err(ReadError::Corrupt { nid, what: "wrong link count" }),
            None => Ok(totals),
        }
    }

    fn check_inode(&self, inode: &Inode) -> Result<()> {
        self.xattrs(inode)?;
        match inode.mode & format::S_IFMT {
            format::S_IFLNK => self.link_target(inode).map(drop),
            format::S_IFREG => {
                let mut offset = 0;
                while offset < inode.size {
                    let (at, run) = self.locate(inode, offset)?;
                    let inside = |at: u64| at.checked_add(run).is_some_and(|end| end <= self.size);
                    if at.is_some_and(|at| !inside(at) && !self.is_elsewhere(at, run)) {
                        return Err(ReadError::Corrupt { nid: inode.nid, what: "data lies outside the image" });
                    }
                    offset += run;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
