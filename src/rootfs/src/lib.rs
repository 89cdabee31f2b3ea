//! Layers to EROFS images, and where those live.
//!
//! ```text
//!  mounts ──plan──► RootfsPlan ──Cache::acquire_all──► images, bottom first ──link_into──► a pod's directory
//!                                   │ miss: layer::scan ─► Tree ─► erofs::writer
//!                                   └ hit: a few system calls
//!
//!  images, bottom first ──merge::merge──► Tree of names ──► erofs::writer ──► one image, with the others as its devices
//!
//!  tar archive ──tar::convert──► Tree, and the file data straight into the image ──► erofs::stream
//!
//!  patches ──patch::build──► Tree over a stack of images ──► erofs::writer ──► one more lower, on top
//!
//!  tar archive of an upper ──changes::Snapshot──► the directory that a container's snapshot has for what it writes
//!
//!  image ──verity::append──► the same, and behind it the tree of its digests
//!
//!  a static program ──program::image──► the root of the machine that runs it
//!
//!  disk image ──disk::chain──► the files of the host that it comes to
//! ```
//!
//! This crate knows nothing of virtual machines, guests, pods, RPC or async code, and it never mounts anything. What it reads was
//! made by others: layers and images are checked, bounded by [`Limits`] and never followed out of their directory.

pub mod builder;
pub mod cache;
pub mod changes;
pub mod disk;
pub mod erofs;
pub mod layer;
mod lock;
pub mod merge;
pub mod patch;
pub mod path;
pub mod plan;
pub mod program;
pub mod source;
pub mod stack;
pub mod tar;
mod trace;
pub mod tree;
pub mod upper;
pub mod verity;
pub mod volume;

pub use cache::{Cache, CacheError, Layer, Outcome};
pub use plan::{Lower, Mount, PlanError, RootfsPlan};

/// What one layer may hold at most. Each limit has an error of its own.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Names in the layer.
    pub entries: usize,
    /// Bytes of file data, holes not counted.
    pub bytes: u64,
    /// Directories below each other.
    pub depth: usize,
    /// Bytes of a path below the layer's root. The kernel takes no path longer than 4,095 bytes.
    pub path: usize,
    /// Bytes of all extended attributes of one inode.
    pub xattrs: usize,
    /// Bytes of one file in a tar archive, holes included.
    pub file: u64,
    /// Bytes of one extension header of a tar archive: long names and extended attributes.
    pub header: usize,
    /// Pieces of data in one sparse file of a tar archive.
    pub pieces: usize,
    /// Bytes of small files of a tar archive that are kept in memory, to lie behind their inodes; later ones get blocks of their own.
    pub small_files: usize,
    /// Patches in one list.
    pub patches: usize,
    /// Bytes of a file that a patch appends to, the addition included.
    pub append: u64,
}

impl Default for Limits {
    /// Far above any image in use, far below what would hurt a node.
    fn default() -> Limits {
        Limits {
            entries: 4_000_000,
            bytes: 1 << 40,
            depth: 2048,
            path: 4095,
            xattrs: 128 << 10,
            file: 1 << 40,
            header: 1 << 20,
            pieces: 16 << 10,
            small_files: 20 << 20,
            patches: 1024,
            append: 64 << 20,
        }
    }
}
