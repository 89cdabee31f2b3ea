//! Patches: small changes to an image's root that an operator or a pod asks for, built into one more lower on top of its layers.
//!
//! ```text
//!  JSON ──decode──► [Patch] ──build──► EROFS image        lowers: [layer, layer, .., patches]
//!                              │ reads: the layers' images, the sources of copies
//! ```
//!
//! Every kind of root is patched in the same way, because every root is a stack of EROFS images; nothing that exists is written.
//! A list is applied in order, each patch seeing what those before it did, and wholly or not at all.
//!
//! | kind        | does                                                                                                    |
//! |-------------|---------------------------------------------------------------------------------------------------------|
//! | `text`      | a regular file with this text                                                                           |
//! | `file`      | a regular file with these bytes (base64, or an array of numbers)                                        |
//! | `copy-file` | a regular file like one of the host                                                                     |
//! | `copy-dir`  | a tree of the host: directories, regular files, symbolic links; merged into a directory that is there   |
//! | `symlink`   | a symbolic link; its target is stored, never followed                                                   |
//! | `mkdir`     | a directory, unless there is one                                                                        |
//! | `remove`    | whatever is there is gone, a tree as a whole                                                            |
//! | `append`    | text at the end of a regular file that is there                                                         |
//!
//! The first five fail when their path exists and `replace` is not set. With `follow_symlinks` links on the way to a path are followed
//! as in the container, so that `/bin/x` is `/usr/bin/x` where `/bin` leads there; without it a link is no directory. New nodes belong to root and are from the beginning of time,
//! so that the same patches give the same image.

mod apply;
mod copy;
mod decode;
mod follow;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

pub use copy::Sources;

use crate::Limits;
use crate::erofs::reader::{Image, ReadError};
use crate::erofs::writer::{Plan, WriteError, Written};
use crate::path::GuestPath;
use crate::stack::Stack;
use crate::trace::Step;
use apply::Upper;

/// Metadata of a new node, as far as it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Permission bits, at most 07777.
    pub mode: Option<u16>,
    /// Owner, else root.
    pub uid: Option<u32>,
    /// Group, else root.
    pub gid: Option<u32>,
}

/// What a copied tree keeps of its source besides names, modes and contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Preserve {
    /// Owner and group.
    pub owner: bool,
    /// Modification times.
    pub mtime: bool,
    /// Extended attributes.
    pub xattrs: bool,
}

/// One change, and how its path is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// What is done.
    pub change: Change,
    /// Links of the image on the way to its path are followed; for [`Change::Append`] the last name as well.
    pub follow_symlinks: bool,
}

impl From<Change> for Patch {
    /// A patch that follows no link.
    fn from(change: Change) -> Patch {
        Patch { change, follow_symlinks: false }
    }
}

/// What a patch does. `text` and `file` are both [`Change::Write`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the module's table says what they are")]
pub enum Change {
    Write { path: GuestPath, content: Vec<u8>, given: Given, replace: bool },
    CopyFile { source: PathBuf, path: GuestPath, given: Given, replace: bool },
    CopyDir { source: PathBuf, path: GuestPath, preserve: Preserve, replace: bool },
    Symlink { target: Vec<u8>, path: GuestPath, replace: bool },
    Mkdir { path: GuestPath, given: Given },
    Remove { path: GuestPath },
    Append { path: GuestPath, content: Vec<u8> },
}

impl Patch {
    /// The path in the image that it changes, as it is written.
    pub fn path(&self) -> &GuestPath {
        self.change.path()
    }

    /// The host's path that it copies from.
    pub fn source(&self) -> Option<&Path> {
        match &self.change {
            Change::CopyFile { source, .. } | Change::CopyDir { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl Change {
    /// The path in the image, as it is written.
    pub fn path(&self) -> &GuestPath {
        match self {
            Change::Write { path, .. }
            | Change::CopyFile { path, .. }
            | Change::CopyDir { path, .. }
            | Change::Symlink { path, .. }
            | Change::Mkdir { path, .. }
            | Change::Remove { path }
            | Change::Append { path, .. } => path,
        }
    }
}

/// Why patches cannot be built. Patches are counted from 0.
#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    /// The text is no JSON list.
    #[error("decode patches")]
    Decode(#[source] serde_json::Error),
    /// One entry of the list is no patch.
    #[error("decode patch {index}")]
    Entry {
        /// Which.
        index: usize,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// [`Limits::patches`] is exceeded.
    #[error("decode patches: more than {0} in the list")]
    TooMany(usize),
    /// A layer's image cannot be opened.
    #[error("open layer {layer}")]
    Open {
        /// Its name.
        layer: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A layer's image is none, or damaged at its start.
    #[error("parse layer {layer}")]
    Parse {
        /// Its name.
        layer: String,
        /// Cause.
        #[source]
        source: ReadError,
    },
    /// A patch cannot be applied.
    #[error("apply patch {index} to {path}")]
    Apply {
        /// Which.
        index: usize,
        /// Its path.
        path: GuestPath,
        /// Cause.
        #[source]
        source: ApplyError,
    },
    /// The image cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The image's file cannot be made.
    #[error("{what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// Why one patch cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// An earlier patch put something there.
    #[error("an earlier patch has put a {kind} there already; set \"replace\" to replace it")]
    AlreadyPatched {
        /// What.
        kind: &'static str,
    },
    /// A layer has something there.
    #[error("layer {layer} has a {kind} there; set \"replace\" to replace it")]
    InLayer {
        /// What.
        kind: &'static str,
        /// The layer's name.
        layer: String,
    },
    /// Something on the way is no directory.
    #[error("{prefix} is no directory ({kind})")]
    Parent {
        /// Path to it.
        prefix: String,
        /// What it is.
        kind: &'static str,
    },
    /// What is there is not what the patch is about.
    #[error("it is a {kind}")]
    Kind {
        /// What it is.
        kind: &'static str,
    },
    /// Nothing is there to append to.
    #[error("it does not exist")]
    NotFound,
    /// A layer cannot be searched.
    #[error("look it up in the layers")]
    Lookup(#[source] ReadError),
    /// A file or directory of a layer cannot be read.
    #[error("read it from layer {layer}")]
    Read {
        /// The layer's name.
        layer: String,
        /// Cause.
        #[source]
        source: ReadError,
    },
    /// A source on the host cannot be read.
    #[error("{what} {path}")]
    Source {
        /// What was tried.
        what: &'static str,
        /// The host's path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A source on the host that is not copied.
    #[error("copy {path}: {what}")]
    Refused {
        /// The host's path.
        path: PathBuf,
        /// Why not.
        what: &'static str,
    },
    /// One of [`Limits`] is exceeded.
    #[error("more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
}

/// The image of a layer, with the name that errors call it.
#[derive(Debug)]
pub struct LowerImage {
    /// Name, such as a key of the cache or a path.
    pub name: String,
    /// The image.
    pub file: File,
}

impl LowerImage {
    /// Opens an image by its path.
    pub fn open(path: &Path) -> Result<LowerImage, PatchError> {
        let name = path.display().to_string();
        match File::open(path) {
            Ok(file) => Ok(LowerImage { name, file }),
            Err(source) => Err(PatchError::Open { layer: name, source }),
        }
    }
}

/// Reads and checks a JSON list of patches.
pub fn decode(json: &[u8], limits: &Limits) -> Result<Vec<Patch>, PatchError> {
    decode::decode(json, limits)
}

/// Builds the image of a list of patches at `dest`, over `lowers` (bottom first). The image appears when it is complete; `None`, and
/// no image, for an empty list. Copies are made from `sources` only.
pub fn build(
    patches: &[Patch],
    lowers: &[LowerImage],
    sources: &Sources,
    limits: &Limits,
    dest: &Path,
) -> Result<Option<Written>, PatchError> {
    if patches.is_empty() {
        return Ok(None);
    }
    let step = Step::patches(patches.len());
    let mut images = Vec::with_capacity(lowers.len());
    for lower in lowers {
        let parse = |source| PatchError::Parse { layer: lower.name.clone(), source };
        images.push(Image::open(&lower.file).map_err(parse)?);
    }
    let stack = Stack::new(images);
    let names: Vec<&str> = lowers.iter().map(|lower| lower.name.as_str()).collect();
    let failed = |index: usize| {
        let path = patches[index].path().clone();
        move |source| PatchError::Apply { index, path, source }
    };
    let mut upper = Upper::new(&stack, &names, sources, limits).map_err(failed(0))?;
    for (index, patch) in patches.iter().enumerate() {
        upper.apply(patch).map_err(failed(index))?;
    }
    let tree = upper.finish();
    let plan = Plan::new(&tree)?;
    let temp = dest.with_extension("tmp");
    let written = publish(&plan, &temp, dest);
    match written {
        Ok(_) => step.count(&tree),
        Err(_) => drop(fs::remove_file(&temp)), // the first error is the one to tell
    }
    written.map(Some)
}

fn publish(plan: &Plan, temp: &Path, dest: &Path) -> Result<Written, PatchError> {
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| PatchError::Io { what, path, source }
    };
    let file = File::create(temp).map_err(failed("create image", temp))?;
    let written = plan.write_file(&file)?;
    file.sync_all().map_err(failed("sync image", temp))?;
    fs::rename(temp, dest).map_err(failed("publish image", dest))?;
    Ok(written)
}
