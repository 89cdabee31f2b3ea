//! Many layers as one: the merged view of a stack of images, as an image that holds names, metadata and small files only. The data of
//! all other files stays where it is; the layers are the merged image's devices.
//!
//! ```text
//!  merged image                      devices, one after the other behind block BASE
//!  | superblock | table | inodes |   | layer 1 ........ | layer 2 ... | layer 3 ...... |
//!        a file's first block ───────────────────────────► here, counted from block 0 of the merged image
//! ```
//!
//! The guest mounts one file system instead of a hundred, overlayfs has one lower to look into instead of a hundred, and hardly a byte
//! of file data is copied. The kernel finds the device of a block by the table (`erofs_map_dev` in `fs/erofs/data.c`). A device has its
//! price, too, on the host and in the guest: the files of small layers are copied into the merged image, so that a layer none of whose
//! blocks is referred to is no device. Most layers of an image that has a hundred are small.
//!
//! Merging follows overlayfs's rules (see [`crate::stack`]); whiteouts and what they hide are not in the result.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::builder::Builder;
use crate::erofs::format::{BLOCK, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG};
use crate::erofs::reader::{Image, Inode as Read, Place, ReadAt, ReadError};
use crate::tree::{Data, Inode, InodeId, Node, OPAQUE, Tree};

/// Block number of the first device's first block: room for 64 GiB of metadata before it.
const BASE: u32 = 1 << 24;

/// A layer of at most so many blocks is small.
const SMALL: u32 = (1 << 20) / BLOCK as u32;
/// Bytes of files that are copied, in all: they are held in memory.
const COPIED: u64 = 32 << 20;

/// A tree whose file data lies in other images.
#[derive(Debug)]
pub struct Merged {
    /// The merged view.
    pub tree: Tree,
    /// The layers that hold data of it, by number, 0 at the bottom.
    pub layers: Vec<usize>,
    /// Where the blocks of each of these begin, and how many there are.
    pub devices: Vec<Device>,
}

/// One image as a device of another (`struct erofs_deviceslot`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Number of its first block in the other image's address space.
    pub first_block: u32,
    /// Its blocks.
    pub blocks: u32,
}

/// Why images cannot be merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// A layer's image cannot be read, or stores data in a form that cannot be referred to.
    #[error("read layer {layer}")]
    Read {
        /// Its number, 0 at the bottom.
        layer: usize,
        /// Cause.
        #[source]
        source: ReadError,
    },
    /// Together they have more than 2^32 blocks.
    #[error("merge layers: too large for 32-bit block numbers")]
    TooLarge,
}

/// A directory's part in one layer.
type Part = (usize, Read);

/// Merges images, bottom first.
pub fn merge<S: ReadAt + ?Sized>(images: &[Image<S>]) -> Result<Merged, MergeError> {
    let mut devices = Vec::with_capacity(images.len());
    let mut first_block = BASE;
    for image in images {
        let blocks = image.super_block().blocks;
        devices.push(Device { first_block, blocks });
        first_block = first_block.checked_add(blocks).filter(|&end| end < u32::MAX).ok_or(MergeError::TooLarge)?;
    }
    let mut roots = Vec::new();
    for (layer, image) in images.iter().enumerate().rev() {
        let failed = |source| MergeError::Read { layer, source };
        let root = image.root().map_err(failed)?;
        let opaque = image.is_opaque(&root).map_err(failed)?;
        roots.push((layer, root));
        if opaque {
            break;
        }
    }
    let used = vec![false; images.len()];
    let mut merger = Merger { images, devices, used, copied: 0, links: HashMap::new() };
    let top = roots.first().map(|(layer, root)| merger.inode(*layer, root)).transpose()?;
    let mut builder = Builder::new(top.unwrap_or_else(Inode::directory));
    let mut pending = VecDeque::from([(Tree::ROOT, roots)]);
    while let Some((id, parts)) = pending.pop_front() {
        for (name, found) in merger.children(&parts)? {
            let (layer, inode) = &found[0];
            if inode.is_directory() {
                let child = builder.insert(id, &name, merger.inode(*layer, inode)?);
                pending.push_back((child, found));
            } else if let Some(&same) = merger.links.get(&(*layer, inode.nid)) {
                builder.link(id, &name, same);
            } else {
                let (key, several) = ((*layer, inode.nid), inode.nlink > 1);
                let child = builder.insert(id, &name, merger.inode(*layer, inode)?);
                if several {
                    merger.links.insert(key, child);
                }
            }
        }
    }
    let layers: Vec<usize> = (0..images.len()).filter(|&layer| merger.used[layer]).collect();
    let devices = layers.iter().map(|&layer| merger.devices[layer]).collect();
    Ok(Merged { tree: builder.finish(), layers, devices })
}

struct Merger<'i, 's, S: ?Sized> {
    images: &'i [Image<'s, S>],
    devices: Vec<Device>,
    /// Whether something refers to a layer's blocks.
    used: Vec<bool>,
    /// Bytes that were copied.
    copied: u64,
    /// Inodes with several names, by layer and number there.
    links: HashMap<(usize, u64), InodeId>,
}

impl<S: ReadAt + ?Sized> Merger<'_, '_, S> {
    /// The visible names of a directory, each with its parts: one, or those of the directories that are merged, the topmost first.
    fn children(&self, parts: &[Part]) -> Result<BTreeMap<Vec<u8>, Vec<Part>>, MergeError> {
        // What is complete takes no further part.
        let mut names: BTreeMap<Vec<u8>, (Vec<Part>, bool)> = BTreeMap::new();
        for (layer, directory) in parts {
            let (layer, image) = (*layer, &self.images[*layer]);
            let failed = |source| MergeError::Read { layer, source };
            for entry in image.entries(directory).map_err(failed)? {
                if entry.name == b"." || entry.name == b".." {
                    continue;
                }
                let (found, complete) = names.entry(entry.name).or_default();
                if *complete {
                    continue;
                }
                let inode = image.inode(entry.nid).map_err(failed)?;
                if !inode.is_directory() {
                    *complete = true;
                    if !inode.is_whiteout() && found.is_empty() {
                        found.push((layer, inode));
                    }
                } else {
                    *complete = image.is_opaque(&inode).map_err(failed)?;
                    found.push((layer, inode));
                }
            }
        }
        Ok(names.into_iter().filter_map(|(name, (found, _))| (!found.is_empty()).then_some((name, found))).collect())
    }

    /// An inode of a layer as one of the merged tree.
    fn inode(&mut self, layer: usize, inode: &Read) -> Result<Inode, MergeError> {
        let image = &self.images[layer];
        let failed = |source| MergeError::Read { layer, source };
        let corrupt = |what| failed(ReadError::Corrupt { nid: inode.nid, what });
        let (major, minor) = inode.device;
        let node = match inode.mode & S_IFMT {
            S_IFDIR => Node::Directory(Vec::new()),
            S_IFREG => Node::File { size: inode.size, data: self.data(layer, inode)? },
            S_IFLNK => Node::Symlink(image.link_target(inode).map_err(failed)?.into()),
            S_IFCHR => Node::CharDevice { major, minor },
            S_IFBLK => Node::BlockDevice { major, minor },
            S_IFIFO => Node::Fifo,
            _ => return Err(corrupt("unknown file type")),
        };
        let mut xattrs = image.xattrs(inode).map_err(failed)?;
        xattrs.retain(|xattr| &*xattr.name != OPAQUE);
        xattrs.sort();
        let Read { mode, uid, gid, mtime, .. } = *inode;
        Ok(Inode { permissions: mode & 0o7777, uid, gid, mtime, xattrs, node })
    }

    /// Where a file's data is, or the data itself where it has no block of its own, or is in a small layer.
    fn data(&mut self, layer: usize, inode: &Read) -> Result<Data, MergeError> {
        let image = &self.images[layer];
        let failed = |source| MergeError::Read { layer, source };
        let place = image.place(inode).map_err(failed)?;
        let inside = |block: u32, blocks: u64| {
            let fits = u64::from(block) + blocks <= u64::from(self.devices[layer].blocks);
            let what = "data lies outside the image";
            // No sum of block numbers within the image is too large: the last device's end is not.
            fits.then(|| self.devices[layer].first_block + block)
                .ok_or_else(|| failed(ReadError::Corrupt { nid: inode.nid, what }))
        };
        let data = match place {
            Place::Inline => {
                let mut bytes = vec![0; inode.size.min(BLOCK) as usize];
                image.read(inode, 0, &mut bytes).map_err(failed)?;
                Data::Bytes(bytes.into())
            }
            Place::Blocks(block) if self.devices[layer].blocks <= SMALL && inode.size <= COPIED - self.copied => {
                // What it says of its size is held to what the image has.
                inside(block, inode.size.div_ceil(BLOCK))?;
                let mut bytes = vec![0; inode.size as usize];
                image.read(inode, 0, &mut bytes).map_err(failed)?;
                self.copied += inode.size;
                Data::Bytes(bytes.into())
            }
            Place::Blocks(block) => Data::Elsewhere { block: inside(block, inode.size.div_ceil(BLOCK))?, chunks: None },
            Place::Chunks { bits, blocks } => {
                let mut map = Vec::with_capacity(blocks.len());
                for (index, block) in (0u64..).zip(blocks) {
                    let bytes = (inode.size - (index << bits)).min(1 << bits);
                    map.push(block.map(|block| inside(block, bytes.div_ceil(BLOCK))).transpose()?);
                }
                Data::Elsewhere { block: 0, chunks: Some((bits, map)) }
            }
        };
        self.used[layer] |= matches!(data, Data::Elsewhere { .. });
        Ok(data)
    }
}
