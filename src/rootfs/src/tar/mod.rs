//! A tar archive, as OCI images have for a layer → EROFS image, in one pass.
//!
//! ```text
//!  plain, gzip, zstd ──Input──► Archive ──entries──► Layer ──► Tree
//!                        │                  └──file data──► Stream ──► image
//!                        └──► SHA-256 of the plain archive: the layer's diffID
//! ```
//!
//! Invariants: file data passes through bounded buffers, metadata is in memory; what an archive may hold at most is in [`Limits`].
//! Everything happens in the [`Tree`]: no name of the archive ever meets a file system, no link is followed, so hostile names can
//! do no more than be refused. The same archive gives the same image.
//!
//! Refused: absolute names, `..`, names below something that is no directory, hard links to what the layer does not have. Markers
//! (`.wh.NAME`, `.wh..wh..opq`) become overlayfs's, as in [`crate::layer`].

mod archive;
mod build;
mod header;
mod input;
mod pax;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

use crate::Limits;
use crate::erofs::stream::Stream;
use crate::erofs::writer::{WriteError, Written};
use crate::path::PathError;
use crate::trace::Step;
use crate::tree::Tree;
pub(crate) use archive::{Archive, Entry, Kind};
use build::Layer;
use input::Input;

/// Why an archive was refused or could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The archive cannot be read or decompressed.
    #[error("read archive")]
    Read(#[source] io::Error),
    /// It is no archive, or damaged.
    #[error("read archive: {what}, at byte {at}")]
    Malformed {
        /// Position in the plain archive.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The name of an entry, or of a hard link's target, that no layer may have.
    #[error("read archive: name {path:?}")]
    Path {
        /// The name.
        path: String,
        /// What is wrong with it.
        #[source]
        source: PathError,
    },
    /// An entry that no layer may have.
    #[error("read archive: {path:?} {what}")]
    Entry {
        /// Its name.
        path: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// One of [`Limits`] is exceeded.
    #[error("read archive: more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The archive is not the one that was wanted.
    #[error("verify archive: diffID is {found}, not {expected}")]
    DiffId {
        /// The wanted digest.
        expected: DiffId,
        /// The archive's digest.
        found: DiffId,
    },
    /// The image cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl TarError {
    pub(crate) fn entry(path: &[u8], what: &'static str) -> TarError {
        TarError::Entry { path: String::from_utf8_lossy(path).into_owned(), what }
    }
}

/// SHA-256 of a plain archive, written `sha256:` and 64 hexadecimal digits: what an OCI image configuration calls a layer's diffID.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DiffId(pub [u8; 32]);

impl fmt::Display for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DiffId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<DiffId, &'static str> {
        const BAD: &str = "a diffID is sha256: and 64 hexadecimal digits";
        let digits = text.strip_prefix("sha256:").filter(|d| d.len() == 64 && d.is_ascii()).ok_or(BAD)?;
        let mut id = [0; 32];
        for (byte, at) in id.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| BAD)?;
        }
        Ok(DiffId(id))
    }
}

/// Whether an archive is hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hashing {
    /// Its digest is not wanted: hashing costs more than all the rest of a conversion.
    Skip,
    /// Its digest is wanted.
    Compute,
    /// Its digest must be this one.
    Expect(DiffId),
}

/// What came of an archive.
#[derive(Debug)]
pub struct Converted {
    /// The image.
    pub written: Written,
    /// Digest of the plain archive, unless [`Hashing::Skip`].
    pub diff_id: Option<DiffId>,
    /// The root hides all layers below.
    pub opaque: bool,
}

/// Converts an archive into `image`, an empty file opened for writing, on up to three threads. After an error the file holds no
/// image, and is the caller's to remove.
pub fn convert(
    archive: impl Read + Send,
    image: &File,
    limits: &Limits,
    hashing: Hashing,
) -> Result<Converted, TarError> {
    std::thread::scope(|scope| {
        let input = Input::start(scope, archive, hashing != Hashing::Skip).map_err(TarError::Read)?;
        convert_input(input, image, limits, hashing)
    })
}

/// The same for an archive in a file. From a plain one that is not hashed large files are copied by the kernel alone, and there is
/// no checksum of the image.
pub fn convert_file(archive: &File, image: &File, limits: &Limits, hashing: Hashing) -> Result<Converted, TarError> {
    std::thread::scope(|scope| {
        let input = Input::of_file(scope, archive, hashing != Hashing::Skip).map_err(TarError::Read)?;
        convert_input(input, image, limits, hashing)
    })
}

/// Hands over the entries of an archive one by one, each with the archive behind its header.
pub(crate) fn each_entry<E: From<TarError>>(
    archive: impl Read + Send,
    limits: &Limits,
    mut take: impl FnMut(Entry, &mut Archive) -> Result<(), E>,
) -> Result<(), E> {
    std::thread::scope(|scope| {
        let input = Input::start(scope, archive, false).map_err(TarError::Read)?;
        let mut archive = Archive::new(input, limits);
        while let Some(entry) = archive.next()? {
            take(entry, &mut archive)?;
        }
        archive.finish()?;
        Ok(())
    })
}

fn convert_input(input: Input, image: &File, limits: &Limits, hashing: Hashing) -> Result<Converted, TarError> {
    let step = Step::layer("an archive");
    let mut layer = Layer::new(limits);
    let mut stream = Stream::new(image, !input.is_copied()).map_err(WriteError::Write)?;
    let mut archive = Archive::new(input, limits);
    while let Some(entry) = archive.next()? {
        layer.add(entry, &mut archive, &mut stream)?;
    }
    let diff_id = archive.finish()?.map(DiffId);
    if let (Hashing::Expect(expected), Some(found)) = (hashing, diff_id)
        && expected != found
    {
        return Err(TarError::DiffId { expected, found });
    }
    let tree = layer.finish();
    let written = stream.finish(&tree)?;
    step.count(&tree);
    Ok(Converted { written, diff_id, opaque: tree.inodes[Tree::ROOT].is_opaque() })
}

impl Archive<'_, '_> {
    /// Reads what follows the end mark; returns the digest of everything where it was wanted.
    fn finish(self) -> Result<Option<[u8; 32]>, TarError> {
        let limit = self.limits().bytes;
        self.into_inner().finish(limit).map_err(|source| match source.kind() {
            io::ErrorKind::FileTooLarge => TarError::Limit { what: "bytes", limit },
            _ => TarError::Read(source),
        })
    }
}
