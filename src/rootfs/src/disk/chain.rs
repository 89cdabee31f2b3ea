//! All the files that a disk image comes to: itself, what it refers to, and so on.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use super::{DiskError, Format, Reference, open, references_of};

/// Images below each other, at most.
pub const DEPTH: usize = 16;
/// Files in a chain, at most.
const FILES: usize = 512;

/// One file of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The file itself, without links.
    pub path: PathBuf,
    /// What it is read as.
    pub format: Format,
    /// How it is referred to, and by which member; `None` for the image that was asked for.
    pub reference: Option<(usize, Reference)>,
}

/// Why an image cannot be used with what it refers to.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// One of the files cannot be read as what it should be.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A file that an image refers to cannot be found.
    #[error("find {role} {name:?} of disk image {image}")]
    Find {
        /// What it is to the image.
        role: &'static str,
        /// Its name there.
        name: String,
        /// The image.
        image: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A file that an image refers to must not be used.
    #[error("disk image {image} refers to {role} {path}, which is not allowed")]
    NotAllowed {
        /// The image.
        image: PathBuf,
        /// What the file is to the image.
        role: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The file has a place in the chain already. In two places it could be read as two formats, or never end.
    #[error("disk image {image} refers to {role} {path}, which is in use by the same disk already")]
    Again {
        /// The image.
        image: PathBuf,
        /// What the file is to the image.
        role: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// More than [`DEPTH`] images below each other.
    #[error("disk image {0} stands on more than {DEPTH} others")]
    Deep(PathBuf),
    /// Too many files in all.
    #[error("disk image {0} comes to more than {FILES} files")]
    Many(PathBuf),
}

/// The image `path` and all files that it leads to, each behind the one that refers to it; names are resolved as [`super::references`]
/// has it. Every file but the first must be `allowed`, which is asked with links resolved; the first is the caller's to judge. A file
/// (and not only its name) may have one place in the chain.
///
/// What was found can be changed by whoever may write there, so the VMM must be given these files, not the names to look up again.
///
/// # Errors
/// [`ChainError`], which names the file.
pub fn chain(path: &Path, format: Format, allowed: impl Fn(&Path) -> bool) -> Result<Vec<Member>, ChainError> {
    let mut members: Vec<Member> = Vec::new();
    let mut seen: HashSet<(u64, u64)> = HashSet::new();
    // Depth first, so that an image's references come in their order behind it.
    let mut pending = vec![(0, PathBuf::from(path), None::<(usize, Reference)>)];
    while let Some((depth, opened_as, reference)) = pending.pop() {
        let format = reference.as_ref().map_or(format, |(_, reference)| reference.format);
        let by = reference.as_ref().map(|(by, reference)| (&members[*by].path, reference));
        let real = std::fs::canonicalize(&opened_as).map_err(|source| match by {
            None => DiskError::Io { what: "find", path: opened_as.clone(), source }.into(),
            Some((image, Reference { role, name, .. })) => {
                ChainError::Find { role, name: name.clone(), image: image.clone(), source }
            }
        })?;
        if let Some((image, Reference { role, .. })) = by
            && !allowed(&real)
        {
            return Err(ChainError::NotAllowed { image: image.clone(), role, path: real });
        }
        if depth > DEPTH {
            return Err(ChainError::Deep(path.into()));
        }
        if members.len() == FILES {
            return Err(ChainError::Many(path.into()));
        }
        let file = open(&real)?;
        let stat = rustix::fs::fstat(&file);
        let stat = stat.map_err(|e| DiskError::Io { what: "look at", path: real.clone(), source: e.into() })?;
        // A device may have any number of nodes.
        let identity = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
            rustix::fs::FileType::BlockDevice => (stat.st_rdev, u64::MAX),
            _ => (stat.st_dev, stat.st_ino),
        };
        if !seen.insert(identity) {
            // The first file has nobody before it.
            let (image, role) = by.map_or((path.to_owned(), "image"), |(image, r)| (image.clone(), r.role));
            return Err(ChainError::Again { image, role, path: real });
        }
        // The VMM opens what it is given by the name that is written, so that is what further names are relative to.
        let further = references_of(&file, &opened_as, format)?;
        let index = members.len();
        members.push(Member { path: real, format, reference });
        pending.extend(further.into_iter().rev().map(|next| (depth + 1, next.path.clone(), Some((index, next)))));
    }
    Ok(members)
}
