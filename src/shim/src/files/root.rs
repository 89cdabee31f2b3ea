//! A FUSE file system becomes the root of a VMM that runs.
//!
//! ```text
//!  mounts of the jail             before                 after
//!  /          tmpfs               the VMM's root         on top of the new root, where no path leads
//!  /files     FUSE                -                      the VMM's root
//!  /socket    its directory       working directory      the same
//! ```
//!
//! What the VMM still opens by name it opens from its working directory, so it notices nothing; its Landlock rules hold for
//! nothing in the new root. Nothing here asks the file system anything: there is nobody yet who would answer.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen, move_mount,
};
use rustix::process::pivot_root;

use super::FilesError;

/// Where the jail has a place for it.
const PLACE: &str = "/files";

/// Makes the file system of `device` the root of process `vmm`. Blocks.
///
/// # Errors
/// [`FilesError::Root`] with what failed; the process keeps its root.
pub fn show(device: &OwnedFd, vmm: u32) -> Result<(), FilesError> {
    // A thread of its own: it leaves this process's mounts for good.
    std::thread::scope(|scope| {
        let work = std::thread::Builder::new().name("files".into()).spawn_scoped(scope, || enter(device.as_fd(), vmm));
        let work = work.map_err(failed("start thread"))?;
        work.join().unwrap_or_else(|_| Err(failed("end thread")(io::ErrorKind::Interrupted)))
    })
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> FilesError {
    move |error| FilesError::Root { what, source: error.into() }
}

fn enter(device: BorrowedFd<'_>, vmm: u32) -> Result<(), FilesError> {
    let mounts = File::open(format!("/proc/{vmm}/ns/mnt")).map_err(failed("open mount namespace of the VMM"))?;
    let files = mount(device)?;
    unshare(CloneFlags::CLONE_FS).map_err(failed("leave the shim's directories"))?;
    setns(mounts, CloneFlags::CLONE_NEWNS).map_err(failed("enter mount namespace of the VMM"))?;
    move_mount(files, "", CWD, PLACE, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed("mount files"))?;
    // The old root on top of the new one in the same place, and by its name: to go there would ask for leave.
    pivot_root(PLACE, PLACE).map_err(failed("pivot root"))
}

/// The host's own root asks, for files whose owners are the guest's: nobody else gets further than modes allow, and nothing
/// in there is a device or a program to the host.
fn mount(device: BorrowedFd<'_>) -> Result<OwnedFd, FilesError> {
    let set = failed("describe files");
    let described = || -> rustix::io::Result<OwnedFd> {
        let fs = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(fs.as_fd(), "source", "nacelle")?;
        let device = device.as_raw_fd().to_string();
        for (key, value) in [("fd", device.as_str()), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")] {
            fsconfig_set_string(fs.as_fd(), key, value)?;
        }
        fsconfig_set_flag(fs.as_fd(), "allow_other")?;
        fsconfig_set_flag(fs.as_fd(), "default_permissions")?;
        fsconfig_create(fs.as_fd())?;
        Ok(fs)
    };
    let fs = described().map_err(set)?;
    let quiet =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, quiet).map_err(failed("mount files"))
}
