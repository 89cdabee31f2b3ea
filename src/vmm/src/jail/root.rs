//! Step 7 of the jail: the new root, a small tmpfs with exactly the plan's entries, read-only in the end.
//!
//! Every entry is a copy of its mount, detached while its attributes are set, so that it is never visible without them.
//! Of a directory the mounts below are copied one by one, because ids can only be mapped for a whole copy at once, and a
//! file system that refuses must not spoil its neighbours. The copies stay slaves of the host's mounts: what the host
//! mounts there later arrives, with the attributes and mapped ids that it has on the host.
//!
//! What lies below a share may belong to somebody hostile, so paths there are resolved beneath the share, without
//! symbolic links. The sources themselves are the shim's word.
#![deny(unsafe_code)]

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nacelle_protocol::vm::Report;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fstat, makedev, mknodat, openat2,
};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree};

use super::{JailError, at, mountinfo, set_attributes};
use crate::plan::{Entry, Ids, Kind, Plan};
use crate::report;

const STAGE: &str = "root";

/// Device nodes (Documentation/admin-guide/devices.txt): libkrun's way to KVM, and what its entropy device reads, because
/// a static program finds no getrandom in its C library (crate `getrandom` 0.3, linux_android_with_fallback.rs).
const DEVICES: [(&str, u32, u32, Mode); 3] =
    [("kvm", 10, 232, Mode::RUSR.union(Mode::WUSR)), ("random", 1, 8, Mode::RUSR), ("urandom", 1, 9, Mode::RUSR)];

/// How a place in the file system is held without opening what is there.
const PLACE: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

const QUIET: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// Puts the root together at `plan.jail.root`. `users` is the sandbox's user namespace.
pub fn assemble(plan: &Plan, users: BorrowedFd<'_>) -> Result<(), JailError> {
    let root = &plan.jail.root;
    // A mount point and a directory for each entry, and what stands below.
    let inodes = 2 * plan.entries.len() + 16;
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC;
    tmpfs(root, quiet | MountFlags::NODEV, inodes)?;

    let dev = root.join("dev");
    directory(&dev)?;
    tmpfs(&dev, quiet, 8)?;
    let owner = (Some(Uid::from_raw(plan.jail.uid_base)), Some(Gid::from_raw(plan.jail.uid_base)));
    for (name, major, minor, mode) in DEVICES {
        let node = dev.join(name);
        mknodat(CWD, &node, FileType::CharacterDevice, mode, makedev(major, minor))
            .map_err(at(STAGE, format!("make device node {}", node.display())))?;
        chownat(CWD, &node, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(at(STAGE, format!("change owner of {}", node.display())))?;
    }

    directory(&root.join("proc"))?;
    for entry in &plan.entries {
        bind(entry, plan, users)?;
    }

    for sealed in [&dev, root] {
        let seal = at(STAGE, format!("make {} read-only", sealed.display()));
        let handle = File::open(sealed).map_err(at(STAGE, format!("open {}", sealed.display())))?;
        set_attributes(handle.as_fd(), &attributes(libc::MOUNT_ATTR_RDONLY)).map_err(seal)?;
    }
    Ok(())
}

fn tmpfs(target: &Path, flags: MountFlags, inodes: usize) -> Result<(), JailError> {
    let options = std::ffi::CString::new(format!("mode=0755,size=4k,nr_inodes={inodes}"))
        .expect("a number contains no zero byte");
    mount("nacelle", target, "tmpfs", flags, Some(options.as_c_str()))
        .map_err(at(STAGE, format!("mount tmpfs on {}", target.display())))
}

fn directory(path: &Path) -> Result<(), JailError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(at(STAGE, format!("make directory {}", path.display())))
}

fn bind(entry: &Entry, plan: &Plan, users: BorrowedFd<'_>) -> Result<(), JailError> {
    let source = &entry.source;
    let from = openat2(CWD, source, PLACE, Mode::empty(), ResolveFlags::empty())
        .map_err(at(STAGE, format!("open {}", source.display())))?;
    let target = plan.jail.root.join(&entry.inside);
    if let Some(parent) = target.parent() {
        directory(parent)?;
    }
    if entry.kind != Kind::Directory {
        File::create_new(&target).map_err(at(STAGE, format!("make {}", target.display())))?;
        return copy(&from, source, entry, plan, users)?.put(&target);
    }

    directory(&target)?;
    let path = fs::canonicalize(source).map_err(at(STAGE, format!("resolve {}", source.display())))?;
    let mountinfo = fs::read("/proc/self/mountinfo").map_err(at(STAGE, "list mounts"))?;
    copy(&from, source, entry, plan, users)?.put(&target)?;
    let to = openat2(CWD, &target, PLACE, Mode::empty(), ResolveFlags::empty())
        .map_err(at(STAGE, format!("open {}", target.display())))?;
    for below in mountinfo::below(&mountinfo, &path) {
        let (Some(from), Some(to)) = (beneath(&from, &below)?, beneath(&to, &below)?) else { continue };
        copy(&from, &source.join(&below), entry, plan, users)?.put_at(&to)?;
    }
    Ok(())
}

/// Opens a directory below another; `None` where it is hidden by a mount, or gone since it was listed.
fn beneath(dir: &OwnedFd, path: &Path) -> Result<Option<OwnedFd>, JailError> {
    match openat2(dir, path, PLACE, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(error) => Err(at(STAGE, format!("open {} below a share", path.display()))(error)),
    }
}

/// A mount that is nowhere yet.
struct Detached {
    mount: OwnedFd,
    name: String,
}

/// Copies the mount at `from`, with the attributes and the ids that the entry wants.
fn copy(from: &OwnedFd, name: &Path, entry: &Entry, plan: &Plan, users: BorrowedFd<'_>) -> Result<Detached, JailError> {
    let shown = name.display();
    let stat = fstat(from).map_err(at(STAGE, format!("look at {shown}")))?;
    let (is, want) = (FileType::from_raw_mode(stat.st_mode), entry.kind.file_type());
    // What is mounted below a share may be anything: it is the pod's to ask for, and `nodev` keeps devices shut.
    if is != want && name == entry.source {
        let wrong = io::Error::from(io::ErrorKind::InvalidInput);
        return Err(at(STAGE, format!("put {shown} into the jail: it is a {is:?}, not a {want:?}"))(wrong));
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(from, "", flags).map_err(at(STAGE, format!("copy mount of {shown}")))?;
    let read_only = if entry.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    set_attributes(mount.as_fd(), &attributes(QUIET | read_only))
        .map_err(at(STAGE, format!("set attributes of {shown}")))?;
    let range = plan.jail.uid_base..plan.jail.uid_base + plan.jail.uid_count;
    match entry.ids {
        Ids::Host => {}
        // Mapped ids would take the file away from its owner.
        Ids::Owned if range.contains(&stat.st_uid) => {}
        Ids::Owned | Ids::Mapped => map_ids(mount.as_fd(), name, users)?,
    }
    Ok(Detached { mount, name: shown.to_string() })
}

impl Detached {
    fn put(self, target: &Path) -> Result<(), JailError> {
        move_mount(&self.mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(at(STAGE, format!("mount {} on {}", self.name, target.display())))
    }

    fn put_at(self, target: &OwnedFd) -> Result<(), JailError> {
        let here = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&self.mount, "", target, "", here).map_err(at(STAGE, format!("mount {}", self.name)))
    }
}

/// Maps the ids of a mount: id N on the disk becomes id N of the sandbox's user namespace.
fn map_ids(mount: BorrowedFd<'_>, name: &Path, users: BorrowedFd<'_>) -> Result<(), JailError> {
    let mapped = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        userns_fd: u64::from(users.as_raw_fd().unsigned_abs()),
        ..attributes(0)
    };
    match set_attributes(mount, &mapped) {
        // It is mapped already, so the shim has done this sandbox's mapping itself.
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

fn attributes(set: u64) -> libc::mount_attr {
    libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 }
}

impl Kind {
    fn file_type(self) -> FileType {
        match self {
            Kind::Directory => FileType::Directory,
            Kind::File => FileType::RegularFile,
            Kind::Socket => FileType::Socket,
        }
    }
}
