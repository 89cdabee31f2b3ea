//! The volumes share: bind mounts of the host's directories and files, one entry each, in the shim's mount namespace.
//!
//! ```text
//!  <run>/volumes          tmpfs, shared: what is mounted below it appears in the VMM's mount namespace too
//!    c1-0/                a directory, bound with or without the mounts below it
//!    c1-1                 a single file, bound alone: its siblings are never exposed
//! ```
//!
//! The shim's mount namespace is a slave of the host's, so what the host mounts later below a volume arrives, nothing of
//! this reaches the host, and everything is gone when the shim and the VMM are.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};
use thiserror::Error;

use crate::spec::Volume;

/// Why a volume is not there.
#[derive(Debug, Error)]
pub enum VolumeError {
    /// The source does not exist or cannot be looked at.
    #[error("bind {volume} to {destination}")]
    Source {
        /// The source.
        volume: PathBuf,
        /// Where the container wants it.
        destination: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A mount failed.
    #[error("{what} {path}")]
    Mount {
        /// What was being done.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(Errno) -> VolumeError {
    move |errno| VolumeError::Mount { what, path: path.to_owned(), source: errno.into() }
}

/// Makes the share, with nothing in it.
///
/// # Errors
/// [`VolumeError::Mount`].
pub fn prepare(share: &Path) -> Result<(), VolumeError> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("nacelle-volumes", share, "tmpfs", flags, Some(c"mode=0755,size=1m"))
        .map_err(failed("mount tmpfs on", share))?;
    mount_change(share, MountPropagationFlags::SHARED).map_err(failed("share mounts below", share))
}

/// Puts one volume into the share.
///
/// # Errors
/// [`VolumeError::Source`] names a source that is not there; nothing is left behind.
pub fn bind(share: &Path, volume: &Volume) -> Result<(), VolumeError> {
    let source_error =
        |source| VolumeError::Source { volume: volume.source.clone(), destination: volume.destination.clone(), source };
    let kind = fs::metadata(&volume.source).map_err(source_error)?.file_type();
    let entry = share.join(&volume.name);
    let made = if kind.is_dir() { fs::create_dir(&entry) } else { File::create_new(&entry).map(drop) };
    made.map_err(|source| VolumeError::Mount { what: "create", path: entry.clone(), source })?;
    if kind.is_socket() || kind.is_block_device() || kind.is_char_device() {
        tracing::warn!("{}: a socket or device of the host does not work in a VM", volume.source.display());
    }
    let bound = match volume.recursive {
        true => mount_bind_recursive(&volume.source, &entry),
        false => mount_bind(&volume.source, &entry),
    };
    let result = bound.map_err(|errno| source_error(errno.into())).and_then(|()| {
        if volume.read_only {
            let flags = MountFlags::BIND | MountFlags::RDONLY | kept_flags(&entry);
            mount_remount(&entry, flags, c"").map_err(failed("remount read-only", &entry))?;
        }
        Ok(())
    });
    if result.is_err() {
        unbind(share, &volume.name);
    }
    result
}

/// Flags of a mount that a remount would otherwise take away.
fn kept_flags(path: &Path) -> MountFlags {
    use rustix::fs::StatVfsMountFlags as Has;
    let Ok(stat) = rustix::fs::statvfs(path) else { return MountFlags::empty() };
    let pairs = [(Has::NOSUID, MountFlags::NOSUID), (Has::NODEV, MountFlags::NODEV), (Has::NOEXEC, MountFlags::NOEXEC)];
    pairs.into_iter().filter(|(has, _)| stat.f_flag.contains(*has)).map(|(_, flag)| flag).collect()
}

/// Takes one volume out of the share. Not there is success; the volume's files are never touched.
pub fn unbind(share: &Path, name: &str) {
    let entry = share.join(name);
    match unmount(&entry, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(e) => return tracing::warn!("unmount {}: {e}", entry.display()),
    }
    // An entry that is a mount still is busy, so these reach nothing but the empty mount point.
    let removed = fs::remove_dir(&entry).or_else(|_| fs::remove_file(&entry));
    if let Err(e) = removed.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) }) {
        tracing::warn!("remove {}: {e}", entry.display());
    }
}

/// Takes the share away, with everything in it.
///
/// # Errors
/// [`VolumeError::Mount`].
pub fn destroy(share: &Path) -> Result<(), VolumeError> {
    match unmount(share, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(e) => Err(failed("unmount", share)(e)),
    }
}
