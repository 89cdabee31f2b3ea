//! The volumes share: bind mounts of the host's directories and files, one entry each, in the shim's mount namespace.
//!
//! ```text
//!  <run>/volumes          tmpfs, shared: what is mounted below it appears in the VMM's mount namespace too
//!    c1-0/                a directory, bound with or without the mounts below it
//!    c1-1                 a single file, bound alone: its siblings are never exposed
//! ```
//!
//! Ids are mapped by the VMM's own program: by its jail for what is there when it starts, and by a short-lived process of
//! it for what comes later, since a mount that propagates into the jail keeps the ids that it has.
//!
//! The shim's mount namespace is a slave of the host's, so what the host mounts later below a volume arrives, nothing of
//! this reaches the host, and everything is gone when the shim and the VMM are.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nacelle_protocol::vm::Report;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, StatVfsMountFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};
use thiserror::Error;

use crate::config::Idmap;
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
    /// The VMM's program cannot mount them.
    #[error("bind volumes: {0}")]
    Refused(String),
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

/// Makes the place of a volume in the share: a directory or a file, as its source is.
fn place(share: &Path, volume: &Volume) -> Result<PathBuf, VolumeError> {
    let kind = fs::metadata(&volume.source).map_err(source_error(volume))?.file_type();
    if kind.is_socket() || kind.is_block_device() || kind.is_char_device() {
        tracing::warn!("{}: a socket or device of the host does not work in a VM", volume.source.display());
    }
    let entry = share.join(&volume.name);
    let made = if kind.is_dir() { fs::create_dir(&entry) } else { File::create_new(&entry).map(drop) };
    made.map_err(|source| VolumeError::Mount { what: "create", path: entry.clone(), source })?;
    Ok(entry)
}

fn source_error(volume: &Volume) -> impl FnOnce(io::Error) -> VolumeError {
    let (volume, destination) = (volume.source.clone(), volume.destination.clone());
    move |source| VolumeError::Source { volume, destination, source }
}

/// Puts a volume into the share before the VMM starts, whose jail maps its ids.
///
/// # Errors
/// [`VolumeError::Source`] names a source that is not there; nothing is left behind.
pub fn bind(share: &Path, volume: &Volume) -> Result<(), VolumeError> {
    let entry = place(share, volume)?;
    let bound = match volume.recursive {
        true => mount_bind_recursive(&volume.source, &entry),
        false => mount_bind(&volume.source, &entry),
    };
    let result = bound.map_err(|errno| source_error(volume)(errno.into())).and_then(|()| {
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

/// Puts volumes into the share of a VMM that runs. `program` is the VMM's, which can map their ids; `vmm` its process.
/// Blocks. Returns what is weaker than it could be, one sentence each.
///
/// # Errors
/// [`VolumeError`]; nothing is left behind.
pub fn bind_later(
    program: &Path,
    vmm: u32,
    share: &Path,
    volumes: &[Volume],
    idmap: Idmap,
) -> Result<Vec<String>, VolumeError> {
    let result = volumes.iter().try_fold(Vec::new(), |mut args: Vec<OsString>, volume| {
        let entry = place(share, volume)?;
        let options = options(volume.read_only, volume.recursive, Volume::is_mapped(&volume.name));
        args.extend([volume.source.clone().into(), entry.into(), options.into()]);
        Ok(args)
    });
    let result =
        result.and_then(|args| if args.is_empty() { Ok(Vec::new()) } else { run_bind(program, vmm, args, idmap) });
    if result.is_err() {
        volumes.iter().for_each(|volume| unbind(share, &volume.name));
    }
    result
}

/// Covers a mount that has arrived below a volume with a copy whose ids are mapped. `point` is relative to the share; `program`
/// and `vmm` as for [`bind_later`]. Blocks.
///
/// # Errors
/// [`VolumeError`]; the mount is as it was.
pub fn cover(program: &Path, vmm: u32, share: &Path, point: &Path, idmap: Idmap) -> Result<(), VolumeError> {
    let held = hold(share, point)?;
    let name = point.components().next().map(|name| name.as_os_str()).unwrap_or_default();
    let stat = rustix::fs::statvfs(share.join(name));
    let read_only = stat.is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY));
    let place = format!("/proc/{}/fd/{}", std::process::id(), held.as_raw_fd());
    let options = options(read_only, true, Volume::is_mapped(&name.to_string_lossy()));
    run_bind(program, vmm, vec![place.clone().into(), place.into(), options.into()], idmap).map(drop)
}

/// Takes away what covers `point`, relative to the share.
///
/// # Errors
/// [`VolumeError`].
pub fn uncover(share: &Path, point: &Path) -> Result<(), VolumeError> {
    let held = hold(share, point)?;
    unmount(format!("/proc/self/fd/{}", held.as_raw_fd()), UnmountFlags::DETACH)
        .map_err(failed("unmount", &share.join(point)))
}

/// Holds a place below the share. The guest may write in a volume, so no link on the way is followed.
fn hold(share: &Path, point: &Path) -> Result<OwnedFd, VolumeError> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let open = || {
        let share = openat2(CWD, share, flags, Mode::empty(), ResolveFlags::empty())?;
        openat2(share, point, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
    };
    open().map_err(failed("open", &share.join(point)))
}

/// As the VMM's program takes them.
fn options(read_only: bool, recursive: bool, mapped: bool) -> String {
    let words = [(true, if read_only { "ro" } else { "rw" }), (recursive, "recursive"), (mapped, "mapped")];
    words.into_iter().filter_map(|(said, word)| said.then_some(word)).collect::<Vec<_>>().join(",")
}

fn run_bind(program: &Path, vmm: u32, args: Vec<OsString>, idmap: Idmap) -> Result<Vec<String>, VolumeError> {
    let failed = |source| VolumeError::Mount { what: "run", path: program.to_owned(), source };
    let mut command = Command::new(program);
    command.arg("bind").arg(vmm.to_string()).args(args).env_clear().current_dir("/").stdin(Stdio::null());
    let output = command.output().map_err(failed)?;
    let mut failure = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let mut degraded = Vec::new();
    for line in output.stdout.split(|byte| *byte == b'\n') {
        match serde_json::from_slice(line) {
            Ok(Report::Failed { message, .. }) => failure = message,
            Ok(Report::Degraded { stage, message }) if idmap.refuses(&stage) => {
                return Err(VolumeError::Refused(message));
            }
            Ok(Report::Degraded { stage, message }) => {
                tracing::warn!("volumes: {stage}: {message}");
                degraded.push(format!("{stage}: {message}"));
            }
            Ok(Report::Started { .. }) | Err(_) => {}
        }
    }
    if output.status.success() { Ok(degraded) } else { Err(VolumeError::Refused(failure)) }
}

/// Flags of a mount that a remount would otherwise take away.
fn kept_flags(path: &Path) -> MountFlags {
    use StatVfsMountFlags as Has;
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
