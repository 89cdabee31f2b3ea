//! Step 7 of the jail: the new root, a small tmpfs with exactly the plan's entries, read-only in the end.
//!
//! The entries stay slaves of the host's mounts: what the host mounts below a share later arrives, with the attributes
//! and the mapped ids that it has on the host.
#![deny(unsafe_code)]

use std::ffi::CString;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid, chownat, makedev, mknodat};
use rustix::mount::{MountFlags, mount};

use super::graft::{Graft, Source};
use super::{JailError, Step, at, attributes, set_attributes};
use crate::plan::{Entry, FILES, Ids, Kind, Plan, WORKING_DIRECTORY};

const STAGE: &str = "root";

/// Device nodes (Documentation/admin-guide/devices.txt): libkrun's way to KVM, and what its entropy device reads, because
/// a static program finds no getrandom in its C library (crate `getrandom` 0.3, linux_android_with_fallback.rs).
const DEVICES: [(&str, u32, u32, Mode); 3] =
    [("kvm", 10, 232, Mode::RUSR.union(Mode::WUSR)), ("random", 1, 8, Mode::RUSR), ("urandom", 1, 9, Mode::RUSR)];

/// The way to the taps, where there may be some. Without capabilities it leads to those of the sandbox's own id only.
const TUN: (&str, u32, u32, Mode) = ("net/tun", 10, 200, Mode::RUSR.union(Mode::WUSR));

/// Puts the root together at `plan.jail.root`. `users` is the sandbox's user namespace, `pods` has the ids of volumes' files.
pub fn assemble(plan: &Plan, users: BorrowedFd<'_>, pods: BorrowedFd<'_>) -> Result<(), JailError> {
    let root = &plan.jail.root;
    // A mount point and the directories on the way to each entry, and what stands below.
    let inodes: usize = plan.entries.iter().map(|entry| entry.inside.components().count() + 1).sum::<usize>() + 16;
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC;
    tmpfs(root, quiet | MountFlags::NODEV, inodes)?;

    let dev = root.join("dev");
    directory(&dev)?;
    tmpfs(&dev, quiet, 8 + plan.entries.len())?;
    if plan.awaits_nics {
        directory(&dev.join("net"))?;
    }
    for (name, major, minor, mode) in DEVICES.into_iter().chain(plan.awaits_nics.then_some(TUN)) {
        node(&dev.join(name), FileType::CharacterDevice, mode, makedev(major, minor), plan)?;
    }

    for made in ["proc", FILES, WORKING_DIRECTORY] {
        directory(&root.join(made))?;
    }
    for entry in &plan.entries {
        put(entry, plan, if entry.ids == Ids::Mapped { pods } else { users })?;
    }

    for sealed in [&dev, root].into_iter().filter(|_| Step::Seal.taken()) {
        let handle = File::open(sealed).map_err(at(STAGE, format!("open {}", sealed.display())))?;
        set_attributes(handle.as_fd(), &attributes(libc::MOUNT_ATTR_RDONLY))
            .map_err(at(STAGE, format!("make {} read-only", sealed.display())))?;
    }
    Ok(())
}

fn tmpfs(target: &Path, flags: MountFlags, inodes: usize) -> Result<(), JailError> {
    let options =
        CString::new(format!("mode=0755,size=4k,nr_inodes={inodes}")).expect("a number contains no zero byte");
    mount("nacelle", target, "tmpfs", flags, Some(options.as_c_str()))
        .map_err(at(STAGE, format!("mount tmpfs on {}", target.display())))
}

/// Makes a device node that belongs to the sandbox's first id.
fn node(path: &Path, kind: FileType, mode: Mode, device: u64, plan: &Plan) -> Result<(), JailError> {
    let (user, group) = (Uid::from_raw(plan.jail.uid_base), Gid::from_raw(plan.jail.uid_base));
    mknodat(CWD, path, kind, mode, device).map_err(at(STAGE, format!("make device node {}", path.display())))?;
    chownat(CWD, path, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(at(STAGE, format!("change owner of {}", path.display())))
}

fn directory(path: &Path) -> Result<(), JailError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(at(STAGE, format!("make directory {}", path.display())))
}

fn put(entry: &Entry, plan: &Plan, users: BorrowedFd<'_>) -> Result<(), JailError> {
    let source = Source::open(&entry.source)?;
    let (is, want) = (source.file_type, entry.kind.file_type());
    if is != want {
        let action = format!("put {} into the jail: it is a {is:?}, not a {want:?}", entry.source.display());
        return Err(at(STAGE, action)(io::Error::from(io::ErrorKind::InvalidInput)));
    }
    let range = plan.jail.uid_base..plan.jail.uid_base + plan.jail.uid_count;
    let graft = Graft { users, range, ids: entry.ids, read_only: entry.read_only };
    let target = plan.jail.root.join(&entry.inside);
    if let Some(parent) = target.parent() {
        directory(parent)?;
    }
    if entry.kind == Kind::Directory {
        directory(&target)?;
        return graft.all(&source, &target);
    }
    if entry.kind == Kind::Device {
        // The host's own node belongs to others, and no file system could map that; its directory has more of them.
        let mode = if entry.read_only { Mode::RUSR } else { Mode::RUSR | Mode::WUSR };
        return node(&target, FileType::BlockDevice, mode, source.device, plan);
    }
    File::create_new(&target).map_err(at(STAGE, format!("make {}", target.display())))?;
    graft.one(&source, &target).map(drop)
}

impl Kind {
    fn file_type(self) -> FileType {
        match self {
            Kind::Directory => FileType::Directory,
            Kind::File => FileType::RegularFile,
            Kind::Socket => FileType::Socket,
            Kind::Device => FileType::BlockDevice,
        }
    }
}
