//! [`Tree`] → EROFS image, in two passes: lay everything out, then stream the image from its first byte to its last.
//!
//! Invariants: the same tree gives the same bytes; metadata is in memory, file data passes through one bounded buffer; every file
//! is opened once. Every offset is decided in [`Plan::new`] and only followed in [`Plan::write`], which fails rather than write
//! something at another place than planned.
//!
//! Choices, with their reasons:
//! - A file of up to [`INLINE_MAX`] bytes lies behind its inode: a block of its own would cost 4,096 bytes and a second read.
//!   Tails of larger files are not packed: that would read each file twice to save half a block.
//! - The most common modification time is the superblock's, so that inodes which share it can be compact (32 bytes).
//! - Children of a directory lie together, after it: `ls -l` and a path walk touch few blocks.
//! - Sparse files are chunk-based, with the chunk size that makes map and data smallest together.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;

use sha2::{Digest, Sha256};

use super::chunks::{self, blocks};
use super::directory::Directory;
use super::format::{self, BLOCK, InodeCore, Layout, SLOT, SuperBlock};
use super::sink::{CopyError, Sink};
use super::walk::{Walk, common_time};
use super::xattrs;
use crate::merge::{Device, Merged};
use crate::tree::{Data, InodeId, Node, Opener, Time, Tree};

/// Changes whenever the same tree would give other bytes, so that no cache hands out an image of an older kind.
pub const VERSION: u32 = 1;

/// Largest content that is stored behind its inode. Half a block: what does not fit into the rest of a block moves to the next one,
/// and the gap must stay smaller than what is saved.
pub const INLINE_MAX: u64 = 2048;

/// What follows the superblock's block, so that the superblock's checksum covers nothing else.
pub(super) const FIRST_BLOCK: u32 = 1;
/// nid 0 is left out: a directory entry with inode number 0 means "deleted" to `readdir`.
const FIRST_NID: u64 = 1;

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A file of the layer cannot be opened or read.
    #[error("read {path} of the layer")]
    Read {
        /// Path inside the layer.
        path: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A file became shorter after it was looked at.
    #[error("read {0} of the layer: it changed meanwhile")]
    Changed(String),
    /// The image cannot be written.
    #[error("write image")]
    Write(#[source] io::Error),
    /// The image needs more than 2^32 blocks.
    #[error("lay out image: too large for 32-bit block numbers")]
    TooLarge,
    /// Attributes of one inode exceed what its 16-bit count can say.
    #[error("lay out image: extended attributes of {0} are too large")]
    XattrsTooLarge(String),
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes in the image.
    pub size: u64,
    /// Inodes in the image.
    pub inodes: u64,
    /// CRC-32C of the whole image; `None` where nobody has seen all of it (see [`crate::tar::convert_file`] and [`Plan::write_file`]).
    pub checksum: Option<u32>,
    /// Bytes of it that are blocks of the sources.
    pub shared: u64,
}

/// An image laid out: where each inode, directory and file goes.
pub struct Plan<'a> {
    tree: &'a Tree,
    /// Inodes in the order of the metadata area: parents first, siblings together.
    order: Vec<InodeId>,
    placed: Vec<Placed>,
    parents: Vec<InodeId>,
    time: Time,
    meta_block: u32,
    blocks: u32,
    devices: &'a [Device],
}

/// Where one inode goes.
struct Placed {
    nid: u64,
    core: InodeCore,
    /// Bytes behind the inode that belong to its content.
    inline: u64,
    /// `log2` of the chunk size of a chunk-based file.
    chunk_bits: u8,
    /// Block where the rest of its content starts.
    first_block: u32,
}

impl<'a> Plan<'a> {
    /// Lays the tree out.
    pub fn new(tree: &'a Tree) -> Result<Plan<'a>, WriteError> {
        Plan::after(tree, FIRST_BLOCK, &[])
    }

    /// Lays out a tree whose file data lies in other images.
    pub fn merged(merged: &'a Merged) -> Result<Plan<'a>, WriteError> {
        let table = (merged.devices.len() * format::DEVICE_SIZE).div_ceil(BLOCK as usize);
        if merged.devices.len() > usize::from(u16::MAX) {
            return Err(WriteError::TooLarge);
        }
        let plan = Plan::after(&merged.tree, FIRST_BLOCK + table as u32, &merged.devices)?;
        // The devices' blocks have numbers behind those of the image.
        match merged.devices.iter().any(|device| device.first_block < plan.blocks) {
            true => Err(WriteError::TooLarge),
            false => Ok(plan),
        }
    }

    /// Lays the tree out behind file data that ends before block `meta_block`.
    pub(super) fn after(tree: &'a Tree, meta_block: u32, devices: &'a [Device]) -> Result<Plan<'a>, WriteError> {
        let walk = Walk::new(tree);
        let time = common_time(tree);
        let (order, parents) = (walk.order, walk.parents);
        let mut plan = Plan { tree, order, parents, placed: Vec::new(), time, meta_block, blocks: 0, devices };
        plan.placed = (0..tree.inodes.len()).map(|id| plan.shape(id, walk.links[id])).collect::<Result<_, _>>()?;
        plan.place_inodes()?;
        Ok(plan)
    }

    /// Bytes that the image will have.
    pub fn size(&self) -> u64 {
        u64::from(self.blocks) * BLOCK
    }

    /// Decides everything about an inode but its place.
    fn shape(&self, id: InodeId, nlink: u32) -> Result<Placed, WriteError> {
        let inode = &self.tree.inodes[id];
        let mut chunk_bits = 0;
        let (kind, size) = match &inode.node {
            Node::Directory(_) => (format::S_IFDIR, self.directory(id).size()),
            Node::File { size, data } => {
                chunk_bits = match data {
                    Data::Elsewhere { chunks, .. } => chunks.as_ref().map_or(0, |(bits, _)| *bits),
                    _ => chunks::bits_for(data.extents(), *size),
                };
                (format::S_IFREG, *size)
            }
            Node::Symlink(target) => (format::S_IFLNK, target.len() as u64),
            Node::CharDevice { .. } => (format::S_IFCHR, 0),
            Node::BlockDevice { .. } => (format::S_IFBLK, 0),
            Node::Fifo => (format::S_IFIFO, 0),
        };
        let tail = if kind == format::S_IFDIR { size % BLOCK } else { size };
        let inline = if tail <= INLINE_MAX && self.stored_at(id).is_none() { tail } else { 0 };
        let layout = match (inline, chunk_bits) {
            (0, 0) => Layout::FlatPlain,
            (0, _) => Layout::Chunked,
            _ => Layout::FlatInline,
        };
        let wide = inode.uid.max(inode.gid).max(nlink) > u32::from(u16::MAX) || size > u64::from(u32::MAX);
        let core = InodeCore {
            extended: wide || inode.mtime != self.time,
            layout,
            xattr_count: xattrs::count(inode).ok_or_else(|| WriteError::XattrsTooLarge(self.tree.path_of(id)))?,
            mode: kind | inode.permissions,
            nlink,
            size,
            u: match inode.node {
                Node::CharDevice { major, minor } | Node::BlockDevice { major, minor } => {
                    format::encode_dev(major, minor)
                }
                _ => u32::from(chunk_bits.saturating_sub(format::BLOCK_BITS)),
            },
            ino: 0,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime.sec,
            mtime_nsec: inode.mtime.nsec,
        };
        Ok(Placed { nid: 0, core, inline, chunk_bits, first_block: 0 })
    }

    /// Gives every inode its nid, and every content that is not inline its first block.
    fn place_inodes(&mut self) -> Result<(), WriteError> {
        let mut at = FIRST_NID * SLOT;
        for (serial, &id) in (1..).zip(&self.order) {
            let placed = &mut self.placed[id];
            let head = (placed.core.core_size() + xattrs::area(placed.core.xattr_count)) as u64;
            at = at.next_multiple_of(SLOT);
            let room = BLOCK - (at + head) % BLOCK;
            if placed.inline > room {
                at += room.next_multiple_of(SLOT); // inline content must not cross a block's end
            }
            placed.nid = at / SLOT;
            placed.core.ino = serial;
            at += head + placed.inline;
            if placed.core.layout == Layout::Chunked {
                at += placed.core.size.div_ceil(1 << placed.chunk_bits) * 4;
            }
        }
        let mut block = u64::from(self.meta_block) + at.div_ceil(BLOCK);
        for id in self.data_order() {
            let stored_at = self.stored_at(id);
            let blocks = self.stored(id).map(|range| blocks(&range)).sum::<u64>();
            let placed = &mut self.placed[id];
            placed.first_block =
                stored_at.map_or_else(|| u32::try_from(block), Ok).map_err(|_| WriteError::TooLarge)?;
            if placed.core.layout != Layout::Chunked && blocks > 0 {
                placed.core.u = placed.first_block;
            }
            block += if stored_at.is_none() { blocks } else { 0 };
        }
        // The last number means "no block".
        self.blocks = u32::try_from(block).ok().filter(|&b| b < format::NULL_ADDR).ok_or(WriteError::TooLarge)?;
        Ok(())
    }

    /// Inodes with content in the data area, in its order: directories first.
    fn data_order(&self) -> Vec<InodeId> {
        let is_directory = |id: &InodeId| matches!(self.tree.inodes[*id].node, Node::Directory(_));
        let (mut first, rest): (Vec<_>, Vec<_>) = self.order.iter().partition(|id| is_directory(id));
        let has_content = |id: &InodeId| matches!(self.tree.inodes[*id].node, Node::File { .. } | Node::Symlink(_));
        first.extend(rest.into_iter().filter(has_content));
        first
    }

    /// Where an inode's content begins that is in the image before its metadata.
    fn stored_at(&self, id: InodeId) -> Option<u32> {
        match self.tree.inodes[id].node {
            Node::File { data: Data::Stored { block, .. } | Data::Elsewhere { block, .. }, .. } => Some(block),
            _ => None,
        }
    }

    /// The parts of an inode's content that lie in the data area, each from a block's start.
    fn stored(&self, id: InodeId) -> impl Iterator<Item = Range<u64>> {
        let placed = &self.placed[id];
        let end = placed.core.size - placed.inline;
        let flat = (placed.core.layout != Layout::Chunked && end > 0).then_some(0..end);
        flat.into_iter().chain(self.chunks(id).flatten())
    }

    /// The chunks of a chunk-based file; none for any other inode.
    fn chunks(&self, id: InodeId) -> impl Iterator<Item = Option<Range<u64>>> {
        let placed = &self.placed[id];
        let extents: &[Range<u64>] = match &self.tree.inodes[id].node {
            Node::File { data, .. } => data.extents().unwrap_or_default(),
            _ => &[],
        };
        let elsewhere = matches!(&self.tree.inodes[id].node, Node::File { data: Data::Elsewhere { .. }, .. });
        let size = if placed.core.layout == Layout::Chunked && !elsewhere { placed.core.size } else { 0 };
        chunks::map(extents, size, placed.chunk_bits)
    }

    fn directory(&self, id: InodeId) -> Directory<'a> {
        let entries = match &self.tree.inodes[id].node {
            Node::Directory(entries) => entries.as_slice(),
            _ => &[],
        };
        Directory::new(entries, id, self.parents[id])
    }

    /// Streams the image.
    pub fn write(&self, out: impl Write) -> Result<Written, WriteError> {
        self.write_to(Sink::new(out, 0))
    }

    /// Writes the image into an empty file. Blocks of large files are shared with their sources where the file system can do that.
    pub fn write_file(&self, file: &File) -> Result<Written, WriteError> {
        self.write_to(Sink::new(file, 0).share_with(file))
    }

    fn write_to<W: Write>(&self, mut sink: Sink<W>) -> Result<Written, WriteError> {
        sink.put(&self.super_block()).map_err(WriteError::Write)?;
        for device in self.devices {
            let mut slot = [0; format::DEVICE_SIZE];
            slot[64..68].copy_from_slice(&device.blocks.to_le_bytes());
            slot[68..72].copy_from_slice(&device.first_block.to_le_bytes());
            sink.put(&slot).map_err(WriteError::Write)?;
        }
        self.write_from_metadata(&mut sink)?;
        let shared = sink.shared();
        let checksum = sink.finish().map_err(WriteError::Write)?;
        Ok(Written { size: self.size(), inodes: self.inodes(), checksum, shared })
    }

    /// Inodes in the image.
    pub(super) fn inodes(&self) -> u64 {
        self.order.len() as u64
    }

    /// Streams the image from its metadata to its end.
    pub(super) fn write_from_metadata<W: Write>(&self, sink: &mut Sink<W>) -> Result<(), WriteError> {
        let mut opener = Opener::default();
        for &id in &self.order {
            self.write_inode(id, sink, &mut opener)?;
        }
        for id in self.data_order().into_iter().filter(|&id| self.stored_at(id).is_none()) {
            for range in self.stored(id) {
                sink.pad_to_block().map_err(WriteError::Write)?;
                self.write_content(id, range, sink, &mut opener)?;
            }
        }
        sink.pad_to(self.size()).map_err(WriteError::Write)
    }

    /// Boot area, superblock and its checksum: the first block.
    pub(super) fn super_block(&self) -> Vec<u8> {
        let chunked = self.placed.iter().any(|p| p.core.layout == Layout::Chunked);
        let mut super_block = SuperBlock {
            checksum: 0,
            compat: format::COMPAT_SB_CHKSUM | format::COMPAT_MTIME,
            block_bits: format::BLOCK_BITS,
            extra_slots: 0,
            root_nid: self.placed[Tree::ROOT].nid as u16, // the first of all
            inodes: self.order.len() as u64,
            time: self.time.sec,
            time_nsec: self.time.nsec,
            blocks: self.blocks,
            meta_block: self.meta_block,
            uuid: self.uuid(),
            incompat: (if chunked { format::INCOMPAT_CHUNKED_FILE } else { 0 })
                | (if self.devices.is_empty() { 0 } else { format::INCOMPAT_DEVICE_TABLE }),
            extra_devices: self.devices.len() as u16, // checked in `merged`
            device_slot: if self.devices.is_empty() { 0 } else { (BLOCK as usize / format::DEVICE_SIZE) as u16 },
            dir_block_bits: 0,
            xattr_prefixes: 0,
        };
        let start = format::SUPER_OFFSET as usize;
        let mut block = vec![0; BLOCK as usize];
        block[start..start + format::SUPER_SIZE].copy_from_slice(&super_block.encode());
        super_block.checksum = format::super_checksum(&block[start..]);
        block[start..start + format::SUPER_SIZE].copy_from_slice(&super_block.encode());
        block
    }

    /// An identity that differs between layers: overlayfs distrusts lowers that share one. It is a version 8 (own scheme) UUID
    /// made of the names and metadata.
    fn uuid(&self) -> [u8; 16] {
        let mut hash = Sha256::new();
        let mut head = Vec::new();
        for &id in &self.order {
            head.clear();
            let inode = &self.tree.inodes[id];
            self.placed[id].core.encode(&mut head);
            xattrs::encode(inode, &mut head);
            match &inode.node {
                Node::Directory(entries) => entries.iter().for_each(|e| head.extend(&e.name)),
                Node::Symlink(target) => head.extend(target),
                _ => {}
            }
            hash.update(&head);
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&hash.finalize()[..16]);
        uuid[6] = 0x80 | uuid[6] & 0x0f;
        uuid[8] = 0x80 | uuid[8] & 0x3f;
        uuid
    }

    fn write_inode<W: Write>(&self, id: InodeId, sink: &mut Sink<W>, opener: &mut Opener) -> Result<(), WriteError> {
        let placed = &self.placed[id];
        let mut head = Vec::new();
        placed.core.encode(&mut head);
        xattrs::encode(&self.tree.inodes[id], &mut head);
        let mut block = placed.first_block;
        if let Node::File { data: Data::Elsewhere { chunks: Some((_, map)), .. }, .. } = &self.tree.inodes[id].node {
            map.iter().for_each(|chunk| head.extend(chunk.unwrap_or(format::NULL_ADDR).to_le_bytes()));
        }
        for chunk in self.chunks(id) {
            head.extend(chunk.as_ref().map_or(format::NULL_ADDR, |_| block).to_le_bytes());
            block += chunk.map_or(0, |range| blocks(&range)) as u32;
        }
        sink.pad_to(u64::from(self.meta_block) * BLOCK + placed.nid * SLOT).map_err(WriteError::Write)?;
        sink.put(&head).map_err(WriteError::Write)?;
        self.write_content(id, placed.core.size - placed.inline..placed.core.size, sink, opener)
    }

    /// Writes a part of an inode's content: that behind the inode, or one that starts with a block of the data area.
    fn write_content<W: Write>(
        &self,
        id: InodeId,
        range: Range<u64>,
        sink: &mut Sink<W>,
        opener: &mut Opener,
    ) -> Result<(), WriteError> {
        if range.is_empty() {
            return Ok(());
        }
        let path = || self.tree.path_of(id);
        let failed = |e| match e {
            CopyError::TooShort => WriteError::Changed(path()),
            CopyError::Read(source) => WriteError::Read { path: path(), source },
            CopyError::Write(source) => WriteError::Write(source),
        };
        match &self.tree.inodes[id].node {
            Node::Directory(_) => {
                let kind = |id: InodeId| (self.placed[id].nid, format::file_type(self.placed[id].core.mode));
                let skip = (range.start / BLOCK) as usize;
                let take = blocks(&range) as usize;
                for (index, block) in self.directory(id).encode(kind).skip(skip).take(take).enumerate() {
                    if index > 0 {
                        sink.pad_to_block().map_err(WriteError::Write)?;
                    }
                    sink.put(&block).map_err(WriteError::Write)?;
                }
                Ok(())
            }
            Node::Symlink(target) => sink.put(target).map_err(WriteError::Write),
            Node::File { data: Data::Bytes(bytes), .. } => sink.put(bytes).map_err(WriteError::Write),
            Node::File { data: Data::At { location, .. }, .. } => {
                let file = opener.open(location).map_err(|source| WriteError::Read { path: path(), source })?;
                sink.copy(&file, range).map_err(failed)
            }
            Node::File { data: Data::Open(file), .. } => sink.copy(file, range).map_err(failed),
            _ => Ok(()),
        }
    }
}
