//! Copies of the host's mounts, put elsewhere with attributes and ids of their own.
//!
//! A copy is detached while its attributes are set, so that it is never visible without them. Of a directory the mounts
//! below are copied one by one, because ids can only be mapped for a whole copy at once, and a file system that refuses
//! must not spoil its neighbours.
//!
//! What lies below a directory may belong to somebody hostile, so paths there are resolved beneath it, without symbolic
//! links. The directory itself is the caller's word.
#![deny(unsafe_code)]

use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nacelle_protocol::vm::Report;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::{JailError, Step, at, attributes, mountinfo, set_attributes};
use crate::plan::Ids;
use crate::report;

const STAGE: &str = "graft";

/// How a place in the file system is held without opening what is there.
const PLACE: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// What every copy is: the VMM runs nothing, and no device of a volume's is the host's to open.
const QUIET: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// Something of the host's, held.
#[derive(Debug)]
pub struct Source<'a> {
    name: &'a Path,
    place: OwnedFd,
    /// What it is.
    pub file_type: FileType,
    /// Which device, if it is one.
    pub device: u64,
    owner: u32,
}

/// What the copies have in common.
#[derive(Debug)]
pub struct Graft<'a> {
    /// The sandbox's user namespace.
    pub users: BorrowedFd<'a>,
    /// Ids of the host's that belong to the sandbox.
    pub range: Range<u32>,
    /// Whose the files are.
    pub ids: Ids,
    /// Refuse every change.
    pub read_only: bool,
}

impl<'a> Source<'a> {
    /// Holds what is at `path`.
    pub fn open(path: &'a Path) -> Result<Self, JailError> {
        let open = at(STAGE, format!("open {}", path.display()));
        let place = openat2(CWD, path, PLACE, Mode::empty(), ResolveFlags::empty()).map_err(open)?;
        let stat = fstat(&place).map_err(at(STAGE, format!("look at {}", path.display())))?;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        Ok(Self { name: path, place, file_type, device: stat.st_rdev, owner: stat.st_uid })
    }
}

impl Graft<'_> {
    /// Puts a copy of `source` on `target`, without the mounts below. The copy's directory or file, held.
    pub fn one(&self, source: &Source<'_>, target: &Path) -> Result<OwnedFd, JailError> {
        let mapped = match self.ids {
            Ids::Host => false,
            // Mapped ids would take the file away from its owner.
            Ids::Owned => !self.range.contains(&source.owner),
            Ids::Mapped => true,
        };
        let copy = self.copy(&source.place, source.name, mapped)?;
        put(&copy, &Source::open(target)?.place, source.name)?;
        Ok(copy)
    }

    /// Makes a copy of `source` and lets it go again.
    pub fn try_one(&self, source: &Source<'_>) -> Result<(), JailError> {
        self.copy(&source.place, source.name, self.ids == Ids::Mapped).map(drop)
    }

    /// Puts a copy of the directory `source` on `target`, and one of every mount below in its place.
    pub fn all(&self, source: &Source<'_>, target: &Path) -> Result<(), JailError> {
        let path = fs::canonicalize(source.name).map_err(at(STAGE, format!("resolve {}", source.name.display())))?;
        let mountinfo = fs::read("/proc/self/mountinfo").map_err(at(STAGE, "list mounts"))?;
        let top = self.one(source, target)?;
        for below in mountinfo::below(&mountinfo, &path) {
            let found = beneath(&source.place, &below)?.zip(beneath(&top, &below)?);
            let Some((from, to)) = found else { continue };
            let name = source.name.join(&below);
            let copy = self.copy(&from, &name, self.ids == Ids::Mapped)?;
            put(&copy, &to, &name)?;
        }
        Ok(())
    }

    fn copy(&self, from: &OwnedFd, name: &Path, mapped: bool) -> Result<OwnedFd, JailError> {
        let shown = name.display();
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let copy = open_tree(from, "", flags).map_err(at(STAGE, format!("copy mount of {shown}")))?;
        let read_only = if self.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
        if Step::Attributes.taken() {
            set_attributes(copy.as_fd(), &attributes(QUIET | read_only))
                .map_err(at(STAGE, format!("set attributes of {shown}")))?;
        }
        if mapped {
            self.map(copy.as_fd(), name)?;
        }
        Ok(copy)
    }

    /// Maps the ids of a copy: id N on the disk becomes id N of the sandbox's user namespace.
    fn map(&self, copy: BorrowedFd<'_>, name: &Path) -> Result<(), JailError> {
        let mapped = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            userns_fd: u64::from(self.users.as_raw_fd().unsigned_abs()),
            ..attributes(0)
        };
        match set_attributes(copy, &mapped) {
            // It is mapped already, so the shim has done this sandbox's mapping before.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                report::send(&Report::Degraded {
                    stage: "map ids".into(),
                    message: format!("map ids of {}: its file system cannot", name.display()),
                });
                Ok(())
            }
            result => result.map_err(at(STAGE, format!("map ids of {}", name.display()))),
        }
    }
}

/// Mounts a copy, made of what is called `name`, where `place` is held.
fn put(copy: &OwnedFd, place: &OwnedFd, name: &Path) -> Result<(), JailError> {
    let held = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(copy, "", place, "", held).map_err(at(STAGE, format!("mount {}", name.display())))
}

/// Opens a directory below another; `None` where it is hidden by a mount, or gone since it was listed.
fn beneath(dir: &OwnedFd, path: &Path) -> Result<Option<OwnedFd>, JailError> {
    match openat2(dir, path, PLACE, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(error) => Err(at(STAGE, format!("open {} below a share", path.display()))(error)),
    }
}
