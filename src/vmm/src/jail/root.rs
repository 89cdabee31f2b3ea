//! Step 7 of the jail: the new root, a small tmpfs with exactly the plan's entries, read-only in the end.
//!
//! Every entry is a copy of its mount, detached while its attributes are set, so that it is never visible without them.
//! A directory is copied with all mounts below it and stays a slave of the host's: what the host mounts there later
//! arrives, with the attributes and mapped ids that it has on the host.
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
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree};

use super::{JailError, at, mountinfo, set_attributes};
use crate::plan::{Entry, Ids, Kind, Plan};
use crate::report;

const STAGE: &str = "root";

/// Device nodes (Documentation/admin-guide/devices.txt): libkrun's way to KVM, and what its entropy device reads, because
/// a static program finds no getrandom in its C library (crate `getrandom` 0.3, linux_android_with_fallback.rs).
const DEVICES: [(&str, u32, u32, Mode); 3] =
    [("kvm", 10, 232, Mode::RUSR.union(Mode::WUSR)), ("random", 1, 8, Mode::RUSR), ("urandom", 1, 9, Mode::RUSR)];

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
        set_attributes(handle.as_fd(), &attributes(libc::MOUNT_ATTR_RDONLY), false).map_err(seal)?;
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
    let name = entry.source.display();
    let whole = entry.kind == Kind::Directory;
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, whole);
    let tree = open_tree(CWD, &entry.source, flags).map_err(at(STAGE, format!("copy mount of {name}")))?;

    let stat = fstat(&tree).map_err(at(STAGE, format!("look at {name}")))?;
    let (is, want) = (FileType::from_raw_mode(stat.st_mode), entry.kind.file_type());
    if is != want {
        let wrong = io::Error::from(io::ErrorKind::InvalidInput);
        return Err(at(STAGE, format!("put {name} into the jail: it is a {is:?}, not a {want:?}"))(wrong));
    }

    let read_only = if entry.read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    set_attributes(tree.as_fd(), &attributes(QUIET | read_only), whole)
        .map_err(at(STAGE, format!("set attributes of {name}")))?;
    let range = plan.jail.uid_base..plan.jail.uid_base + plan.jail.uid_count;
    match entry.ids {
        Ids::Host => {}
        // Mapped ids would take the file away from its owner.
        Ids::Owned if range.contains(&stat.st_uid) => {}
        Ids::Owned => map_ids(tree.as_fd(), &entry.source, users)?,
        Ids::Mapped => map_all(&tree, &entry.source, users)?,
    }

    let target = plan.jail.root.join(&entry.inside);
    if let Some(parent) = target.parent() {
        directory(parent)?;
    }
    if whole {
        directory(&target)?;
    } else {
        File::create_new(&target).map_err(at(STAGE, format!("make {}", target.display())))?;
    }
    move_mount(&tree, "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(at(STAGE, format!("mount {name} on {}", target.display())))
}

/// Maps the ids of a directory's mount and of every mount below it, one by one: a file system that cannot be mapped
/// (a network one, most often) must not spoil its neighbours.
fn map_all(tree: &OwnedFd, source: &Path, users: BorrowedFd<'_>) -> Result<(), JailError> {
    let mountinfo = fs::read("/proc/self/mountinfo").map_err(at(STAGE, "list mounts"))?;
    let source = fs::canonicalize(source).map_err(at(STAGE, format!("resolve {}", source.display())))?;
    for mount in mountinfo::below(&mountinfo, &source) {
        let name = source.join(&mount.below);
        if mount.mapped {
            continue;
        }
        if mount.below.as_os_str().is_empty() {
            map_ids(tree.as_fd(), &name, users)?;
            continue;
        }
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        match openat2(tree, &mount.below, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), how) {
            Ok(inner) => map_ids(inner.as_fd(), &name, users)?,
            // Hidden below another mount, or gone since: nothing that the guest could reach.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {}
            Err(error) => return Err(at(STAGE, format!("open {}", name.display()))(error)),
        }
    }
    Ok(())
}

fn map_ids(mount: BorrowedFd<'_>, name: &Path, users: BorrowedFd<'_>) -> Result<(), JailError> {
    let mapped = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        userns_fd: u64::from(users.as_raw_fd().unsigned_abs()),
        ..attributes(0)
    };
    match set_attributes(mount, &mapped, false) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => {
            report::send(&Report::Degraded {
                stage: "map ids".into(),
                message: format!("map ids of {}: its file system cannot: {error}", name.display()),
            });
            Ok(())
        }
        Err(error) => Err(at(STAGE, format!("map ids of {}", name.display()))(error)),
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
