//! The root file system of a machine that runs one static program: an image with the program, and mount points.
//!
//! ```text
//!  <root>/program-v1/<key>.erofs     /<name>, mode 0555, and empty directories; published by rename
//!  <root>/program-v1/lock            held while an image is made
//! ```
//!
//! The key is made of the program file's identity (device, inode, size, times), so a program that was replaced gets an image of
//! its own, and nobody reads the program to find the image. Images of programs that are gone are removed when a new one is made,
//! once they are a day old: a start that has chosen one takes seconds, and a machine that runs holds its image open.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::builder::Builder;
use crate::erofs::writer::{Plan, WriteError};
use crate::lock::Lock;
use crate::tree::{Data, Inode, Node, Tree};

/// Version of the layout: another one finds none of the old images.
const DIRECTORY: &str = "program-v1";

/// How long an image stays after its program has been replaced.
const OLD: Duration = Duration::from_secs(24 * 60 * 60);

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// A file cannot be read or made.
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
    /// The image cannot be written.
    #[error("make an image of program {path}")]
    Write {
        /// The program.
        path: PathBuf,
        /// Cause.
        #[source]
        source: WriteError,
    },
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ProgramError + use<'a> {
    move |source| ProgramError::Io { what, path: path.into(), source }
}

/// The image of a machine's root below `cache_root` that has `program` as `/<name>` and the empty directories `mount_points`, all
/// root's. It is made when it is not there.
///
/// # Errors
/// [`ProgramError`]; nothing is left behind.
pub fn image(cache_root: &Path, program: &Path, name: &str, mount_points: &[&str]) -> Result<PathBuf, ProgramError> {
    let file = File::open(program).map_err(failed("open", program))?;
    let size = file.metadata().map_err(failed("look at", program))?.size();
    let directory = cache_root.join(DIRECTORY);
    let path = directory.join(key(&file, name, mount_points).map_err(failed("look at", program))?);
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(&directory).map_err(failed("create directory", &directory))?;
    let lock = directory.join("lock");
    let _lock = Lock::wait(&lock).map_err(failed("lock", &lock))?;
    if path.exists() {
        return Ok(path);
    }
    // Whoever died over this file left it; the lock is ours now.
    let temporary = directory.join("new");
    let made = make(tree(file, size, name, mount_points), program, &temporary);
    made.inspect_err(|_| drop(fs::remove_file(&temporary)))?;
    fs::rename(&temporary, &path).map_err(failed("publish image", &path))?;
    remove_old(&directory, &path);
    Ok(path)
}

/// File name of the image.
fn key(program: &File, name: &str, mount_points: &[&str]) -> io::Result<String> {
    let m = program.metadata()?;
    let times = [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()];
    let identity = format!("{} {} {} {times:?} {name:?} {mount_points:?}", m.dev(), m.ino(), m.size());
    let digest = Sha256::digest(identity);
    Ok(digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect::<String>() + ".erofs")
}

fn tree(program: File, size: u64, name: &str, mount_points: &[&str]) -> Tree {
    let mut builder = Builder::new(Inode::directory());
    for directory in mount_points {
        builder.insert(Tree::ROOT, directory.as_bytes(), Inode::directory());
    }
    let node = Node::File { size, data: Data::Open(Arc::new(program.into())) };
    builder.insert(Tree::ROOT, name.as_bytes(), Inode { permissions: 0o555, node, ..Inode::directory() });
    builder.finish()
}

fn make(tree: Tree, program: &Path, to: &Path) -> Result<(), ProgramError> {
    let writing = |source| ProgramError::Write { path: program.into(), source };
    let _ = fs::remove_file(to);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to);
    let file = file.map_err(failed("create image", to))?;
    Plan::new(&tree).and_then(|plan| plan.write(&file)).map_err(writing)?;
    // Others read it: a machine has no id that means anything on this host.
    file.set_permissions(fs::Permissions::from_mode(0o444)).map_err(failed("protect image", to))?;
    file.sync_all().map_err(failed("sync image", to))
}

/// Best effort: what stays costs a few MiB.
fn remove_old(directory: &Path, keep: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|time| time.elapsed().ok());
        if path != keep && path.extension() == Some(OsStr::new("erofs")) && age.is_some_and(|age| age > OLD) {
            let _ = fs::remove_file(&path);
        }
    }
}
