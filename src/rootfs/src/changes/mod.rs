//! What a container has written, as a tar archive of its upper → the directory that its snapshotter has for that.
//!
//! ```text
//!  <dir>            the snapshot's upper directory, or the whole root where the snapshot has no parent
//!  .nacelle-<name>-next    beside it: what it had at the start, by hard links, with the archive's entries over it
//!  .nacelle-<name>-begin   beside it: what it had at the start, while the container may write more
//!
//!  apply:    begin (or dir) ──hard links──► next ◄── archive
//!  publish:  next ◄──exchanged──► dir; what was there at the start is kept as `begin`, anything else removed
//!  close:    `begin` is removed
//! ```
//!
//! The archive is that of an overlay's upper as it lies on its disk: a whiteout is a character device 0:0, an opaque directory has
//! the attribute `trusted.overlay.opaque`, and names have no meaning (see [`crate::tar`] for the form that images have).
//!
//! Invariants:
//! - `dir` is always a whole state: it is exchanged for another in one step, and an archive that breaks off changes nothing. Like
//!   a container's own writes it is not synced.
//! - Every archive is applied to what was there at the start, so that what the container has made and removed in between is gone.
//! - The archive's names meet directories of its own making only. They are resolved beneath `next`, without following any link
//!   or crossing a mount, and an existing file is never written to: its name gets a new one.

mod apply;
mod attributes;
mod start;

use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::Limits;
use crate::plan::{Lower, RootfsPlan};
use crate::tar::TarError;
use apply::Apply;

/// Why changes are not applied. The snapshot is what it was before.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// The archive is not one, exceeds a limit, or says something that no container can have written.
    #[error("apply changes")]
    Archive(#[from] TarError),
    /// A file cannot be read or written.
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

/// Bytes behind the end mark that are read: GNU tar's blocks.
const FILLER: u64 = 10 << 10;

fn failed<'a, E: Into<io::Error>>(what: &'static str, path: &'a Path) -> impl FnOnce(E) -> ChangesError + use<'a, E> {
    move |source| ChangesError::Io { what, path: path.into(), source: source.into() }
}

/// What an archive of changes may hold: as much as fits on the disk that it comes from, of `bytes` bytes.
pub fn limits(bytes: u64) -> Limits {
    /// What a name takes of a disk at least, inodes included; small disks are not counted so closely.
    const NAME: u64 = 4096;
    /// What a name may take of an archive, beside the file's data: its header and its attributes.
    const HEADERS: u64 = 8192;
    let defaults = Limits::default();
    let entries = (bytes / NAME).clamp(65536, defaults.entries as u64);
    Limits {
        entries: entries as usize,
        // Of the archive; `Apply` counts the data by itself.
        bytes: bytes + entries * HEADERS,
        // A file may have more holes than the disk has room.
        file: 16 << 40,
        depth: 1024,
        // With the names of the directories above, the kernel still takes it.
        path: 3584,
        ..defaults
    }
}

/// The directory of a container's own, which nobody else changes while its task lives.
#[derive(Debug)]
pub struct Snapshot {
    dir: PathBuf,
    /// Layers below, as far as they are directories.
    below: Vec<PathBuf>,
    /// There are layers below that are images.
    images: bool,
    next: PathBuf,
    begin: PathBuf,
    /// What was there at the start lies in `begin`.
    kept: bool,
}

/// Changes that were applied, and are not to be seen yet. Dropped, they are gone.
#[derive(Debug)]
pub struct Applied(PathBuf);

impl Drop for Applied {
    fn drop(&mut self) {
        // After `publish` there is nothing; what else cannot be removed goes with the snapshot.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Snapshot {
    /// The directory that takes the changes of a container with this root; `None` where there is none: a root that cannot be
    /// written to, or whose writable side is a disk.
    ///
    /// # Errors
    /// [`ChangesError::Io`] where a predecessor that broke off has left something that cannot be removed.
    pub fn of(plan: &RootfsPlan) -> Result<Option<Self>, ChangesError> {
        let (Some((Lower::Upper(dir) | Lower::Writable(dir), below)), false) =
            (plan.lowers.split_last(), plan.read_only)
        else {
            return Ok(None);
        };
        let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else { return Ok(None) };
        let beside = |what| parent.join(format!(".nacelle-{}-{what}", name.to_string_lossy()));
        let snapshot = Self {
            dir: dir.clone(),
            images: below.iter().any(|lower| !matches!(lower, Lower::Snapshot(_))),
            below: below
                .iter()
                .filter(|lower| matches!(lower, Lower::Snapshot(_)))
                .map(Lower::source)
                .cloned()
                .collect(),
            next: beside("next"),
            begin: beside("begin"),
            kept: false,
        };
        remove(&snapshot.next)?;
        remove(&snapshot.begin)?;
        Ok(Some(snapshot))
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Applies an archive with all of what the container has written since its start, at most `bytes` bytes of file data.
    ///
    /// # Errors
    /// [`ChangesError`]; nothing has changed, and nothing is left.
    pub fn apply(&self, mut archive: impl Read + Send, bytes: u64) -> Result<Applied, ChangesError> {
        remove(&self.next)?;
        DirBuilder::new().mode(0o700).create(&self.next).map_err(failed("create", &self.next))?;
        let applied = Applied(self.next.clone());
        let limits = limits(bytes);
        let mut apply = Apply::new(&self.next, &self.below, self.images, &limits, bytes)?;
        apply.begin_with(if self.kept { &self.begin } else { &self.dir })?;
        crate::tar::each_entry(&mut archive, &limits, |entry, archive| apply.add(entry, archive))?;
        // Writers fill their last block; whoever writes for ever gets no reader.
        io::copy(&mut archive.take(FILLER), &mut io::sink()).map_err(TarError::Read)?;
        apply.finish()?;
        Ok(applied)
    }

    /// Makes applied changes the snapshot's.
    ///
    /// # Errors
    /// [`ChangesError::Io`]; the snapshot is one of both states, as a whole.
    pub fn publish(&mut self, changes: Applied) -> Result<(), ChangesError> {
        renameat_with(CWD, &changes.0, CWD, &self.dir, RenameFlags::EXCHANGE)
            .map_err(failed("put changes in the place of", &self.dir))?;
        if !self.kept {
            fs::rename(&changes.0, &self.begin).map_err(failed("keep the start of", &self.dir))?;
            self.kept = true;
        }
        Ok(())
    }

    /// No more changes will come.
    ///
    /// # Errors
    /// [`ChangesError::Io`].
    pub fn close(&mut self) -> Result<(), ChangesError> {
        self.kept = false;
        remove(&self.begin)
    }
}

/// Removes a directory with all that is in it, if it is there.
fn remove(dir: &Path) -> Result<(), ChangesError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", dir)(e)),
        _ => Ok(()),
    }
}
