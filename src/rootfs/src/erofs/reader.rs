//! A reader that believes nothing: for tests, verification and the command line.
//!
//! Invariants: whatever the image says, reading ends with a value or a [`ReadError`], never a panic; no allocation is larger than
//! the image itself or a fixed bound; directory loops end. It reads what [`super::writer`] writes and refuses every other feature.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub use super::check::{Totals, checksum};
use super::format::{self, BLOCK, Dirent, InodeCore, Layout, SLOT, SUPER_OFFSET, SUPER_SIZE, SuperBlock};
use crate::merge::Device;
use crate::tree::{OPAQUE, Time, Xattr};

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The bytes cannot be read.
    #[error("read image")]
    Io(#[from] io::Error),
    /// No EROFS superblock.
    #[error("read image: not an erofs file system")]
    NotErofs,
    /// The superblock's checksum is wrong.
    #[error("read image: superblock checksum mismatch")]
    Checksum,
    /// A feature that nacelle does not write.
    #[error("read image: unsupported {0}")]
    Unsupported(&'static str),
    /// Something contradicts itself or points outside.
    #[error("read image: inode {nid}: {what}")]
    Corrupt {
        /// The inode.
        nid: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A path does not exist.
    #[error("find {0} in image")]
    NotFound(String),
}

pub(super) type Result<T> = std::result::Result<T, ReadError>;

/// Bytes at offsets.
pub trait ReadAt {
    /// Fills `buffer` from `offset`; an error when there are not enough bytes.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Number of bytes.
    fn size(&self) -> io::Result<u64>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).ok();
        let bytes = start.and_then(|s| self.get(s..s.checked_add(buffer.len())?));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// An opened image.
pub struct Image<'a, S: ?Sized> {
    source: &'a S,
    pub(super) size: u64,
    super_block: SuperBlock,
    devices: Vec<Device>,
}

/// How a regular file's content is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Behind its inode.
    Inline,
    /// In consecutive blocks from this one on.
    Blocks(u32),
    /// In chunks.
    Chunks {
        /// `log2` of their size.
        bits: u8,
        /// First block of each; `None` is a hole.
        blocks: Vec<Option<u32>>,
    },
}

/// An inode as the image has it.
#[derive(Clone, Debug)]
pub struct Inode {
    /// Its number.
    pub nid: u64,
    /// Type and permissions.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Hard links.
    pub nlink: u32,
    /// Bytes of content.
    pub size: u64,
    /// Modification time.
    pub mtime: Time,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    core: InodeCore,
}

impl Inode {
    /// True for a directory.
    pub fn is_directory(&self) -> bool {
        self.mode & format::S_IFMT == format::S_IFDIR
    }

    /// True for overlayfs's mark that a name is removed: a character device 0:0.
    pub fn is_whiteout(&self) -> bool {
        self.mode & format::S_IFMT == format::S_IFCHR && self.device == (0, 0)
    }

    /// What it is, in words.
    pub fn kind(&self) -> &'static str {
        match self.mode & format::S_IFMT {
            format::S_IFREG => "regular file",
            format::S_IFDIR => "directory",
            format::S_IFLNK => "symlink",
            format::S_IFCHR => "character device",
            format::S_IFBLK => "block device",
            format::S_IFIFO => "fifo",
            _ => "socket",
        }
    }

    /// Where its xattrs start.
    fn xattrs_at(&self, image_start: u64) -> u64 {
        image_start + self.nid * SLOT + self.core.core_size() as u64
    }

    fn xattrs_len(&self) -> usize {
        match self.core.xattr_count {
            0 => 0,
            n => format::XATTR_HEADER_SIZE + 4 * (usize::from(n) - 1),
        }
    }
}

/// A name in a directory of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Any bytes but `/` and NUL.
    pub name: Vec<u8>,
    /// Inode it leads to.
    pub nid: u64,
    /// `EROFS_FT_*`.
    pub file_type: u8,
}

/// Longest symbolic link.
const LINK_MAX: u64 = 4095;

impl<'a, S: ReadAt + ?Sized> Image<'a, S> {
    /// Reads and checks the superblock.
    pub fn open(source: &'a S) -> Result<Image<'a, S>> {
        let size = source.size()?;
        if size < BLOCK {
            return Err(ReadError::NotErofs);
        }
        let mut block = vec![0; (BLOCK - SUPER_OFFSET) as usize];
        source.read_at(&mut block, SUPER_OFFSET)?;
        let mut raw = [0; SUPER_SIZE];
        raw.copy_from_slice(&block[..SUPER_SIZE]);
        let super_block = SuperBlock::decode(&raw).ok_or(ReadError::NotErofs)?;
        if super_block.block_bits != format::BLOCK_BITS || super_block.dir_block_bits != 0 {
            return Err(ReadError::Unsupported("block size"));
        }
        let known = format::INCOMPAT_CHUNKED_FILE | format::INCOMPAT_DEVICE_TABLE;
        if super_block.incompat & !known != 0 || super_block.xattr_prefixes != 0 {
            return Err(ReadError::Unsupported("feature"));
        }
        if super_block.compat & format::COMPAT_SB_CHKSUM != 0 {
            block[4..8].fill(0);
            if format::super_checksum(&block) != super_block.checksum {
                return Err(ReadError::Checksum);
            }
        }
        if u64::from(super_block.blocks) * BLOCK > size {
            return Err(ReadError::Corrupt { nid: 0, what: "image is shorter than its superblock says" });
        }
        let size = u64::from(super_block.blocks) * BLOCK;
        let mut image = Image { source, size, super_block, devices: Vec::new() };
        image.read_devices()?;
        Ok(image)
    }

    fn read_devices(&mut self) -> Result<()> {
        let mut at = u64::from(self.super_block.device_slot) * format::DEVICE_SIZE as u64;
        for _ in 0..self.super_block.extra_devices {
            let mut slot = [0; format::DEVICE_SIZE];
            self.read_inside(&mut slot, at, 0)?;
            self.devices.push(Device { blocks: format::le32(&slot, 64), first_block: format::le32(&slot, 68) });
            at += format::DEVICE_SIZE as u64;
        }
        Ok(())
    }

    /// True when these bytes lie in one of the devices.
    pub(super) fn is_elsewhere(&self, at: u64, len: u64) -> bool {
        self.devices.iter().any(|device| {
            let start = u64::from(device.first_block) * BLOCK;
            let end = start + u64::from(device.blocks) * BLOCK;
            device.first_block > 0 && at >= start && at.checked_add(len).is_some_and(|to| to <= end)
        })
    }

    /// How a regular file's content is stored, without the content.
    pub fn place(&self, inode: &Inode) -> Result<Place> {
        match inode.core.layout {
            Layout::FlatPlain => Ok(Place::Blocks(inode.core.u)),
            Layout::FlatInline if inode.size <= BLOCK => Ok(Place::Inline),
            Layout::FlatInline => Err(ReadError::Unsupported("inline data behind whole blocks")),
            Layout::Chunked => {
                let bits = format::BLOCK_BITS + (inode.core.u as u16 & format::CHUNK_BITS_MASK) as u8;
                let count = inode.size.div_ceil(1 << bits);
                // What has no room in the image cannot be a map.
                let corrupt = || ReadError::Corrupt { nid: inode.nid, what: "chunk map is too long" };
                let mut blocks = Vec::with_capacity(usize::try_from(count.min(self.size / 4)).map_err(|_| corrupt())?);
                for index in 0..count {
                    let (at, _) = self.locate(inode, index << bits)?;
                    let block = at.map(|at| u32::try_from(at / BLOCK)).transpose().map_err(|_| corrupt())?;
                    blocks.push(block);
                }
                Ok(Place::Chunks { bits, blocks })
            }
        }
    }

    /// The superblock.
    pub fn super_block(&self) -> &SuperBlock {
        &self.super_block
    }

    /// The root directory.
    pub fn root(&self) -> Result<Inode> {
        let root = self.inode(self.super_block.root_nid.into())?;
        if !root.is_directory() {
            return Err(ReadError::Corrupt { nid: root.nid, what: "root is not a directory" });
        }
        Ok(root)
    }

    /// Reads an inode.
    pub fn inode(&self, nid: u64) -> Result<Inode> {
        let corrupt = |what| ReadError::Corrupt { nid, what };
        let outside = || corrupt("lies outside the image");
        let at = nid.checked_mul(SLOT).and_then(|n| n.checked_add(self.meta_start())).ok_or_else(outside)?;
        let room = self.size.checked_sub(at).ok_or_else(outside)?;
        let mut raw = [0; format::EXTENDED_SIZE as usize];
        let len = raw.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        self.source.read_at(&mut raw[..len], at)?;
        let core = InodeCore::decode(&raw[..len]).ok_or_else(|| corrupt("unknown inode format"))?;
        if format::file_type(core.mode) == 0 {
            return Err(corrupt("unknown file type"));
        }
        let mtime = match core.extended {
            true => Time { sec: core.mtime, nsec: core.mtime_nsec },
            false => Time { sec: self.super_block.time, nsec: self.super_block.time_nsec },
        };
        Ok(Inode {
            nid,
            mode: core.mode,
            uid: core.uid,
            gid: core.gid,
            nlink: core.nlink,
            size: core.size,
            mtime,
            device: format::decode_dev(core.u),
            core,
        })
    }

    /// Attributes of an inode, in the image's order.
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>> {
        let corrupt = |what| ReadError::Corrupt { nid: inode.nid, what };
        let mut area = vec![0; inode.xattrs_len()];
        self.read_inside(&mut area, inode.xattrs_at(self.meta_start()), inode.nid)?;
        if area.get(4).is_some_and(|&shared| shared != 0) {
            return Err(ReadError::Unsupported("shared extended attributes"));
        }
        let mut rest = area.get(format::XATTR_HEADER_SIZE..).unwrap_or_default();
        let mut xattrs = Vec::new();
        while !rest.is_empty() {
            let head = rest.get(..format::XATTR_ENTRY_SIZE).ok_or_else(|| corrupt("attribute is cut off"))?;
            let (name_len, value_len) = (usize::from(head[0]), usize::from(format::le16(head, 2)));
            let prefix = format::XATTR_PREFIXES.iter().find(|(index, _)| *index == head[1]);
            let (_, prefix) = prefix.ok_or_else(|| corrupt("unknown attribute prefix"))?;
            let body = &rest[format::XATTR_ENTRY_SIZE..];
            let (name, value) = body
                .split_at_checked(name_len)
                .and_then(|(name, after)| Some((name, after.get(..value_len)?)))
                .ok_or_else(|| corrupt("attribute is cut off"))?;
            xattrs.push(Xattr { name: [prefix, name].concat().into(), value: value.into() });
            let used = (format::XATTR_ENTRY_SIZE + name_len + value_len).next_multiple_of(4);
            rest = rest.get(used..).ok_or_else(|| corrupt("attribute is cut off"))?;
        }
        Ok(xattrs)
    }

    /// Reads content from `offset`; returns how many bytes there were, fewer than asked for only at the end.
    pub fn read(&self, inode: &Inode, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let left = inode.size.saturating_sub(offset);
        let len = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut done = 0;
        while done < len {
            let (at, run) = self.locate(inode, offset + done as u64)?;
            let now = (len - done).min(usize::try_from(run).unwrap_or(usize::MAX));
            let part = &mut buffer[done..done + now];
            match at {
                Some(at) => self.read_inside(part, at, inode.nid)?,
                None => part.fill(0),
            }
            done += now;
        }
        Ok(len)
    }

    /// Where the byte at `offset` of the content lies (`None` in a hole), and how many bytes follow there, at least one.
    pub(super) fn locate(&self, inode: &Inode, offset: u64) -> Result<(Option<u64>, u64)> {
        let corrupt = |what| ReadError::Corrupt { nid: inode.nid, what };
        let behind = inode.xattrs_at(self.meta_start()) + inode.xattrs_len() as u64;
        let flat = || {
            let first = u64::from(inode.core.u) * BLOCK;
            first.checked_add(offset).map(Some).ok_or_else(|| corrupt("lies outside the image"))
        };
        match inode.core.layout {
            Layout::FlatPlain => Ok((flat()?, inode.size - offset)),
            Layout::FlatInline => {
                let tail = inode.size / BLOCK * BLOCK;
                if offset < tail {
                    return Ok((flat()?, tail - offset));
                }
                if behind % BLOCK + (inode.size - tail) > BLOCK {
                    return Err(corrupt("inline data crosses a block's end"));
                }
                Ok((Some(behind + offset - tail), inode.size - offset))
            }
            Layout::Chunked => {
                let word = inode.core.u as u16;
                if word & !format::CHUNK_BITS_MASK != 0 {
                    return Err(ReadError::Unsupported("chunk format"));
                }
                let bits = format::BLOCK_BITS + (word & format::CHUNK_BITS_MASK) as u8;
                let inside = offset & ((1 << bits) - 1);
                let mut entry = [0; 4];
                let entry_at =
                    behind.checked_add((offset >> bits) * 4).ok_or_else(|| corrupt("chunk map is too long"))?;
                self.read_inside(&mut entry, entry_at, inode.nid)?;
                let run = ((1 << bits) - inside).min(inode.size - offset);
                match u32::from_le_bytes(entry) {
                    format::NULL_ADDR => Ok((None, run)),
                    block => Ok((Some(u64::from(block) * BLOCK + inside), run)),
                }
            }
        }
    }

    /// True for a directory that hides what the layers below have in its place.
    pub fn is_opaque(&self, inode: &Inode) -> Result<bool> {
        Ok(inode.is_directory() && self.xattrs(inode)?.iter().any(|x| &*x.name == OPAQUE && &*x.value == b"y"))
    }

    /// Target of a symbolic link.
    pub fn link_target(&self, inode: &Inode) -> Result<Vec<u8>> {
        if inode.mode & format::S_IFMT != format::S_IFLNK || !(1..=LINK_MAX).contains(&inode.size) {
            return Err(ReadError::Corrupt { nid: inode.nid, what: "not a symbolic link of possible length" });
        }
        let mut target = vec![0; inode.size as usize];
        self.read(inode, 0, &mut target)?;
        Ok(target)
    }

    /// Entries of a directory in order, `.` and `..` included.
    pub fn entries(&self, inode: &Inode) -> Result<Vec<Entry>> {
        let corrupt = |what| ReadError::Corrupt { nid: inode.nid, what };
        if !inode.is_directory() {
            return Err(corrupt("not a directory"));
        }
        if inode.core.layout == Layout::Chunked || inode.size > self.size {
            return Err(corrupt("directory is larger than the image"));
        }
        let mut entries: Vec<Entry> = Vec::new();
        let mut block = [0; BLOCK as usize];
        let mut offset = 0;
        while offset < inode.size {
            let len = self.read(inode, offset, &mut block)?;
            parse_block(&block[..len], &mut entries).map_err(corrupt)?;
            offset += len as u64;
        }
        Ok(entries)
    }

    /// Finds one name in a directory.
    pub fn find(&self, directory: &Inode, name: &[u8]) -> Result<Option<Inode>> {
        let entries = self.entries(directory)?;
        let found = entries.binary_search_by(|e| e.name.as_slice().cmp(name)).ok();
        found.map(|index| self.inode(entries[index].nid)).transpose()
    }

    /// Follows a path from the root, without following symbolic links.
    pub fn lookup(&self, path: &[u8]) -> Result<Inode> {
        let mut inode = self.root()?;
        for name in path.split(|&b| b == b'/').filter(|n| !n.is_empty()) {
            let missing = || ReadError::NotFound(String::from_utf8_lossy(path).into_owned());
            inode = self.find(&inode, name)?.ok_or_else(missing)?;
        }
        Ok(inode)
    }

    fn meta_start(&self) -> u64 {
        u64::from(self.super_block.meta_block) * BLOCK
    }

    fn read_inside(&self, buffer: &mut [u8], at: u64, nid: u64) -> Result<()> {
        if at.checked_add(buffer.len() as u64).is_none_or(|end| end > self.size) {
            return Err(ReadError::Corrupt { nid, what: "lies outside the image" });
        }
        Ok(self.source.read_at(buffer, at)?)
    }
}

/// Takes a directory block apart and appends its entries, which must continue the order of those before.
fn parse_block(block: &[u8], entries: &mut Vec<Entry>) -> std::result::Result<(), &'static str> {
    let first = Dirent::decode(block).ok_or("directory block is cut off")?;
    let names_start = usize::from(first.name_offset);
    if names_start == 0 || !names_start.is_multiple_of(format::DIRENT_SIZE) || names_start > block.len() {
        return Err("directory block has a bad first name");
    }
    let heads = block[..names_start].chunks_exact(format::DIRENT_SIZE);
    let offset = |raw: &[u8]| Dirent::decode(raw).map_or(0, |d| usize::from(d.name_offset));
    for (raw, next) in heads.clone().zip(heads.skip(1).map(offset).chain([block.len()])) {
        let dirent = Dirent::decode(raw).ok_or("directory block is cut off")?;
        let name = block.get(usize::from(dirent.name_offset)..next).ok_or("names overlap")?;
        let name = name.split(|&b| b == 0).next().unwrap_or_default(); // the last one may be padded
        if name.is_empty() || name.len() > format::NAME_MAX || name.contains(&b'/') {
            return Err("impossible name");
        }
        if entries.last().is_some_and(|last| last.name.as_slice() >= name) {
            return Err("names are not sorted");
        }
        entries.push(Entry { name: name.to_vec(), nid: dirent.nid, file_type: dirent.file_type });
    }
    Ok(())
}
