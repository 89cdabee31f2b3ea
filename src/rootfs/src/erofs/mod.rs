//! The EROFS file system: what its bytes mean, how an image is written, how one is read with suspicion.
//!
//! The writer and the reader share [`format`](mod@format) and nothing else, so that a mistake in one is seen by the other.

mod check;
mod chunks;
mod directory;
pub mod format;
pub mod reader;
pub(crate) mod sink;
pub mod stream;
mod walk;
pub mod writer;
mod xattrs;
