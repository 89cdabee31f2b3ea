//! A FUSE file system becomes the root of a VMM that runs.
//!
//! ```text
//!  mounts of the jail             before                 after
//!  /          tmpfs               the VMM's root         on top of the new root, where no path leads
//!  /files     FUSE                -                      the VMM's root
//!  /files/proc                    -                      /proc of the jail, once more
//!  /socket    its directory       working directory      the same
//! ```
//!
//! What the VMM still opens by name it opens from its working directory, or it is in `/proc/self/fd` (libkrun's file server, for
//! attributes of links), so it notices nothing; its Landlock rules hold for nothing else in the new root. The guest is asked
//! nothing here and by nothing that the VMM does: the shim answers for `proc` itself, for ever. It has to serve meanwhile.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use rustix::process::pivot_root;

use super::FilesError;
use super::message::PROC;

/// Where the jail has a place for it.
const PLACE: &str = "/files";

/// Makes the file system that [`mount`] has made the root of process `vmm`. Blocks.
///
/// # Errors
/// [`FilesError::Root`] with what failed; the process keeps its root.
pub fn show(files: OwnedFd, vmm: u32) -> Result<(), FilesError> {
    // A thread of its own: it leaves this process's mounts for good.
    let work = std::thread::Builder::new().name("files".into()).spawn(move || enter(files, vmm));
    let work = work.map_err(failed("start thread"))?;
    work.join().unwrap_or_else(|_| Err(failed("end thread")(io::ErrorKind::Interrupted)))
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> FilesError {
    move |error| FilesError::Root { what, source: error.into() }
}

fn enter(files: OwnedFd, vmm: u32) -> Result<(), FilesError> {
    let mounts = File::open(format!("/proc/{vmm}/ns/mnt")).map_err(failed("open mount namespace of the VMM"))?;
    unshare(CloneFlags::CLONE_FS).map_err(failed("leave the shim's directories"))?;
    setns(mounts, CloneFlags::CLONE_NEWNS).map_err(failed("enter mount namespace of the VMM"))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let proc = open_tree(CWD, "/proc", flags).map_err(failed("copy mount of proc"))?;
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(files, "", CWD, PLACE, empty).map_err(failed("mount files"))?;
    move_mount(proc, "", CWD, format!("{PLACE}/{PROC}"), empty).map_err(failed("mount proc"))?;
    // The old root on top of the new one in the same place, and by its name: to go there would ask for leave.
    pivot_root(PLACE, PLACE).map_err(failed("pivot root"))
}

/// Makes the file system of a FUSE device, mounted nowhere yet. Nothing in it is a device or a program to the host. Who gets as
/// far as here is root of the host or the VMM itself (proc_pid_root(5)), so that modes need not be looked at, which the guest
/// would have to be asked for.
///
/// # Errors
/// [`FilesError::Root`].
pub fn mount(device: &OwnedFd) -> Result<OwnedFd, FilesError> {
    let set = failed("describe files");
    let described = || -> rustix::io::Result<OwnedFd> {
        let fs = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(fs.as_fd(), "source", "nacelle")?;
        let device = device.as_raw_fd().to_string();
        for (key, value) in [("fd", device.as_str()), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")] {
            fsconfig_set_string(fs.as_fd(), key, value)?;
        }
        fsconfig_set_flag(fs.as_fd(), "allow_other")?;
        fsconfig_create(fs.as_fd())?;
        Ok(fs)
    };
    let fs = described().map_err(set)?;
    let quiet =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, quiet).map_err(failed("mount files"))
}
