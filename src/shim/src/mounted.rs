//! Roots of snapshotters whose mounts nacelle does not take apart: mounted as containerd says, and converted as a whole.
//!
//! ```text
//!  btrfs, zfs, fuse-overlayfs, stargz, nydus, overlay with metacopy; blockfile and devmapper in a pod …
//!       │ mount(8), in the shim's own mount namespace
//!       ▼
//!  <run>/mounted/<container>, read-only   ── one image for this container ──►  the guest's lower
//! ```
//!
//! It works with everything that the host can mount, and costs a conversion for each container, as nobody knows what of it
//! stays the same. What the container writes does not get there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nacelle_rootfs::plan::{self, Mount, PlanError};
use nacelle_rootfs::{Lower, RootfsPlan};
use rustix::mount::{UnmountFlags, unmount};
use thiserror::Error;

use crate::disks::Wanted;

/// Why such a root is not there.
#[derive(Debug, Error)]
pub enum MountedError {
    /// Its mount point.
    #[error("{what} {path}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The mount point.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// mount(8) says no.
    #[error("mount {kind} file system {device}: {words}")]
    Refused {
        /// Its type.
        kind: String,
        /// Its source.
        device: String,
        /// What mount(8) says.
        words: String,
    },
}

/// A root file system, as its mounts describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// Layers.
    Layers(RootfsPlan),
    /// Something else, to be mounted.
    Whole(Vec<Mount>),
    /// A disk of the VM's.
    Disk(Wanted),
}

impl Root {
    /// Reads the mounts. With `fallback`, those that nacelle does not know are for mount(8).
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn of(mounts: &[Mount], fallback: bool) -> Result<Self, PlanError> {
        match plan::plan(mounts) {
            Ok(plan) => Ok(Self::Layers(plan)),
            Err(PlanError::Kind { .. } | PlanError::Option { .. }) if fallback && mountable(mounts) => {
                Ok(Self::Whole(mounts.to_vec()))
            }
            Err(e) => Err(e),
        }
    }

    /// What it is made of, unless it is a disk; what has to be mounted for that is mounted on `target`, and taken away with the
    /// value. Blocks.
    ///
    /// # Errors
    /// [`MountedError`]; nothing is left.
    pub fn resolve(self, target: &Path) -> Result<Option<(RootfsPlan, Option<Mounted>)>, MountedError> {
        match self {
            Self::Layers(plan) => Ok(Some((plan, None))),
            Self::Whole(mounts) => {
                let mounted = Mounted::new(&mounts, target)?;
                Ok(Some((of_directory(target.to_owned()), Some(mounted))))
            }
            Self::Disk(_) => Ok(None),
        }
    }
}

/// The plan of a root that a directory is, which nothing that a container writes goes to.
pub fn of_directory(dir: PathBuf) -> RootfsPlan {
    RootfsPlan { lowers: vec![Lower::Writable(dir)], read_only: true }
}

/// Whether mount(8) knows what to do: templates and preparations are containerd's own, and ids are mapped by nobody here.
fn mountable(mounts: &[Mount]) -> bool {
    let plain = |mount: &Mount| {
        let prepared = ["format/", "mkdir/", "mkfs/"].iter().any(|prefix| mount.kind.starts_with(prefix));
        let texts = mount.options.iter().chain([&mount.source]);
        let template = texts.clone().any(|text| text.contains("{{"));
        let mapped = mount.options.iter().any(|o| o.starts_with("uidmap=") || o.starts_with("gidmap="));
        // Paths for a program's command line.
        let named =
            !mount.kind.is_empty() && !mount.source.starts_with('-') && !texts.clone().any(|t| t.contains('\0'));
        named && !prepared && !template && !mapped
    };
    !mounts.is_empty() && mounts.iter().all(plain)
}

/// Mounts that are taken away when the value is dropped.
#[derive(Debug)]
pub struct Mounted {
    target: PathBuf,
    count: usize,
}

impl Mounted {
    fn new(mounts: &[Mount], target: &Path) -> Result<Self, MountedError> {
        let io_error = |what| move |source| MountedError::Io { what, path: target.to_owned(), source };
        fs::create_dir_all(target).map_err(io_error("create"))?;
        let mut mounted = Self { target: target.to_owned(), count: 0 };
        for mount in mounts {
            // Somebody's device nodes and programs are not for the host. The last word counts.
            let own = ["nosuid", "nodev", "noexec", "ro"].map(str::to_owned);
            let options: Vec<String> = mount.options.iter().cloned().chain(own).collect();
            let mut command = Command::new("mount");
            command.args(["-n", "-t", &mount.kind, "-o", &options.join(","), "--", &mount.source]).arg(target);
            command.env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
            let output = command.output().map_err(io_error("run mount(8) for"))?;
            if !output.status.success() {
                let words = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
                let (kind, device) = (mount.kind.clone(), mount.source.clone());
                return Err(MountedError::Refused { kind, device, words });
            }
            mounted.count += 1;
        }
        Ok(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for _ in 0..self.count {
            // Lazily as a last resort: the snapshotter wants its device back.
            let gone =
                unmount(&self.target, UnmountFlags::empty()).or_else(|_| unmount(&self.target, UnmountFlags::DETACH));
            if let Err(errno) = gone {
                return tracing::warn!("unmount {}: {errno}", self.target.display());
            }
        }
        if let Err(e) = fs::remove_dir(&self.target) {
            tracing::warn!("remove {}: {e}", self.target.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        let options = options.iter().map(|o| (*o).to_owned()).collect();
        Mount { kind: kind.into(), source: source.into(), target: String::new(), options }
    }

    #[test]
    fn what_is_not_known_is_mounted_as_a_whole() {
        let root = |mounts: &[Mount]| Root::of(mounts, true);
        let btrfs = [mount("btrfs", "/dev/sdb", &["subvol=snapshots/1"])];
        assert_eq!(root(&btrfs), Ok(Root::Whole(btrfs.to_vec())));
        assert!(matches!(Root::of(&btrfs, false), Err(PlanError::Kind { .. })));
        let metacopy = mount("overlay", "overlay", &["lowerdir=/a:/b", "metacopy=on"]);
        assert!(matches!(root(&[metacopy]), Ok(Root::Whole(_))));
        assert!(matches!(root(&[mount("bind", "/a", &["ro"])]), Ok(Root::Layers(_))));
        for bad in [
            mount("format/ext4", "/a", &[]),
            mount("ext4", "{{ mount 0 }}", &[]),
            mount("ext4", "-x", &[]),
            mount("ext4", "/a", &["uidmap=0:1:2"]),
        ] {
            assert!(root(&[bad]).is_err());
        }
    }

    #[test]
    fn a_root_is_there_for_as_long_as_its_value() {
        let dir = tempfile::tempdir().expect("tempdir");
        let target = dir.path().join("root");
        let root = Root::of(&[mount("tmpfs", "tmpfs", &["size=1m"])], true).expect("mountable");
        let (plan, mounted) = root.resolve(&target).expect("mounted").expect("no disk");
        assert_eq!(plan.lowers, [Lower::Writable(target.clone())]);
        assert!(fs::write(target.join("file"), b"x").is_err(), "read-only");
        drop(mounted);
        assert!(!target.exists());
        let root = Root::of(&[mount("ext4", "/nonexistent", &[])], true).expect("mountable");
        let text = root.resolve(&target).expect_err("no such device").to_string();
        assert!(text.starts_with("mount ext4 file system /nonexistent: "), "{text}");
    }
}
