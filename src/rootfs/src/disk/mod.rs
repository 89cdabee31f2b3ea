//! Disk images of the host: which format they have, and which other files they lead to.
//!
//! ```text
//!  disk.qcow2 ──backing file──► base.qcow2 ──backing file──► base.raw
//!       └──────external data file──► disk.data
//!
//!  disk.vmdk  ──extents──► disk-f001.vmdk, disk-f002.vmdk       (raw pieces, whatever they are called)
//! ```
//!
//! Whoever makes an image can write any name of the host into it, and the VMM opens what it finds there. So nacelle reads the names
//! first ([`references`], [`chain`]), and the VMM's jail gets those files that are allowed, and no others. A format is always given:
//! by whoever asks, or by the image that refers to the file. It is never found out from the content, because a guest writes that.

mod chain;
mod format;
mod qcow2;
mod vmdk;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, SeekFrom};

pub use chain::{ChainError, DEPTH, Member, chain};
pub(crate) use format::FORMATS;
pub use format::{Format, FstypeError, UnknownFormat, check_fstype};

/// Another file of the host that an image refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// What it is to the image, for messages: `backing file`, `data file` or `extent`.
    pub role: &'static str,
    /// The name as it is written in the image.
    pub name: String,
    /// Where that leads; links are not resolved yet.
    pub path: PathBuf,
    /// What it is read as.
    pub format: Format,
    /// The VMM opens it for writing. It does so with data files, even with those of an image that is only read; backing files and
    /// extents are only read.
    pub writable: bool,
}

impl Reference {
    /// The name is an absolute path.
    pub fn is_absolute(&self) -> bool {
        self.name.starts_with('/')
    }
}

/// Why an image cannot be read for its references.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened or read.
    #[error("{what} disk image {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// It is a directory, a socket or the like.
    #[error("open disk image {0}: it is neither a regular file nor a block device")]
    Kind(PathBuf),
    /// What is in it is not what it should be, or what nacelle does not take.
    #[error("read disk image {path} as {format}")]
    Header {
        /// The file.
        path: PathBuf,
        /// What it was read as.
        format: Format,
        /// Cause.
        #[source]
        source: HeaderError,
    },
}

/// What is wrong with the start of an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It is of another format.
    #[error("it does not begin as such an image does")]
    Magic,
    /// A field is missing, or points out of where it may point.
    #[error("{0} is cut off or out of bounds")]
    Bounds(&'static str),
    /// A field has a value that no sound image has.
    #[error("{0} makes no sense")]
    Value(&'static str),
    /// Something that is fine in itself, but which nacelle does not take.
    #[error("{what} {value:?} is not supported")]
    Unsupported {
        /// Of which kind.
        what: &'static str,
        /// What is written there.
        value: String,
    },
    /// The image names a backing file and does not say how it is laid out.
    #[error("backing file {0:?} is named without its format, which is never guessed")]
    NoFormat(String),
    /// A name that is not the path of a file.
    #[error("{role} {name:?} is not the path of a file: {why}")]
    Name {
        /// What it is the name of.
        role: &'static str,
        /// The name.
        name: String,
        /// Why not.
        why: &'static str,
    },
}

/// A reference as it is written, before it is resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Written {
    role: &'static str,
    name: String,
    format: Format,
    writable: bool,
}

/// The other files of the host that the image `path` refers to itself, in the order in which it names them. Raw images have none.
///
/// Names are resolved as the VMM resolves them (crate `imago`): absolute ones as they are, others against the directory of the path
/// by which the image was opened, not of where that path's links lead. Nothing in a name is special there, so what QEMU would take
/// for a protocol (`nbd:`, `json:`) would be a file's name; no honest image has one, so it is refused. So is what the VMM could not
/// open in the end: features of qcow2 that it lacks, sparse VMDKs. It reads VMDKs only, never writes them.
///
/// # Errors
/// [`DiskError`]; hostile images give one and nothing worse.
pub fn references(path: &Path, format: Format) -> Result<Vec<Reference>, DiskError> {
    let file = open(path)?;
    references_of(&file, path, format)
}

fn references_of(file: &OwnedFd, path: &Path, format: Format) -> Result<Vec<Reference>, DiskError> {
    let failed =
        |what| move |source: rustix::io::Errno| DiskError::Io { what, path: path.into(), source: source.into() };
    let length = rustix::fs::seek(file, SeekFrom::End(0)).map_err(failed("look at"))?;
    let read = |most: u64| -> Result<Vec<u8>, DiskError> {
        let mut bytes = vec![0; usize::try_from(length.min(most)).unwrap_or(0)];
        let mut filled = 0;
        while filled < bytes.len() {
            match rustix::io::pread(file, &mut bytes[filled..], filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(failed("read")(e)),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    };
    let written = match format {
        Format::Raw => Ok(Vec::new()),
        Format::Qcow2 => qcow2::parse(&read(qcow2::MOST)?),
        Format::Vmdk if length > vmdk::MOST => Err(HeaderError::Bounds("descriptor of more than 2 MiB")),
        Format::Vmdk => vmdk::parse(&read(vmdk::MOST)?),
    };
    let written = written.and_then(|written| written.iter().try_for_each(check_name).map(|()| written));
    let written = written.map_err(|source| DiskError::Header { path: path.into(), format, source })?;
    let directory = path.parent().unwrap_or(Path::new(""));
    let resolve = |Written { role, name, format, writable }| Reference {
        role,
        path: directory.join(&name),
        name,
        format,
        writable,
    };
    Ok(written.into_iter().map(resolve).collect())
}

/// A name must be the path of a file, and for QEMU as well: what comes before a colon would be a protocol there.
fn check_name(written: &Written) -> Result<(), HeaderError> {
    let Written { role, name, .. } = written;
    let why = if name.is_empty() {
        "it is empty"
    } else if name.contains('\0') {
        "it has a NUL byte"
    } else if name.len() > 4095 {
        "it is longer than 4095 bytes"
    } else if name.split('/').next().is_some_and(|first| first.contains(':')) {
        "it names a protocol"
    } else {
        return Ok(());
    };
    let name = name.chars().take(200).collect();
    Err(HeaderError::Name { role, name, why })
}

/// Opens what may be a disk image. FIFOs do not block, terminals do not become ours.
fn open(path: &Path) -> Result<OwnedFd, DiskError> {
    let failed =
        |what| move |source: rustix::io::Errno| DiskError::Io { what, path: path.into(), source: source.into() };
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    // Opening some devices does something: look first. What takes the file's place meanwhile is found out below.
    let kind = |mode| matches!(FileType::from_raw_mode(mode), FileType::RegularFile | FileType::BlockDevice);
    let stat = rustix::fs::stat(path).map_err(failed("open"))?;
    if !kind(stat.st_mode) {
        return Err(DiskError::Kind(path.into()));
    }
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open"))?;
    let stat = rustix::fs::fstat(&file).map_err(failed("look at"))?;
    if kind(stat.st_mode) { Ok(file) } else { Err(DiskError::Kind(path.into())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_paths_are_refused() {
        let written = |name: &str| Written { role: "extent", name: name.into(), format: Format::Raw, writable: true };
        for name in ["a", "/a:b", "./a:b", "../x", "/dev/sda"] {
            assert_eq!(check_name(&written(name)), Ok(()), "{name:?}");
        }
        for name in ["", "nbd:unix:/x", "http://host/x", "json:{}", "file:x", "a\0b", &"a/".repeat(3000)] {
            assert!(matches!(check_name(&written(name)), Err(HeaderError::Name { .. })), "{name:?}");
        }
    }
}
