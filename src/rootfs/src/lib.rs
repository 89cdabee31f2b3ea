//! Layers to EROFS images, and where those live.
//!
//! ```text
//!  mounts ──plan──► RootfsPlan ──Cache::acquire_all──► images, bottom first ──link_into──► a pod's directory
//!                                   │ miss: layer::scan ─► Tree ─► erofs::writer
//!                                   └ hit: a few system calls
//! ```
//!
//! This crate knows nothing of virtual machines, guests, pods, RPC or async code, and it never mounts anything. What it reads was
//! made by others: layers and images are checked, bounded by [`Limits`] and never followed out of their directory.

pub mod cache;
pub mod erofs;
pub mod layer;
mod lock;
pub mod plan;
pub mod stack;
pub mod tree;
pub mod upper;

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
}

impl Default for Limits {
    /// Far above any image in use, far below what would hurt a node.
    fn default() -> Limits {
        Limits { entries: 4_000_000, bytes: 1 << 40, depth: 2048, path: 4095, xattrs: 128 << 10 }
    }
}
