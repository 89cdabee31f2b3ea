//! Disks of the machine's that hold a file system of somebody's: volumes, and roots of containers.
//!
//! ```text
//!  /dev/vd? ── found by its serial number ── first type that fits ──► /run/nacelle/disks/<serial>    a volume, once for all containers
//!                                                               └───► …/containers/<id>/rootfs       the root of one
//! ```
//!
//! Only the guest's kernel ever reads what is on them. What a disk holds is tried type by type, as the shim lists them, and of
//! those only what this kernel has a driver for: nothing is guessed from the content.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use nacelle_protocol::agent::{DISKS_DIR, Disk};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

use crate::mount::{MountError, find_disk, io_error};
use crate::users;

/// What no volume has, whatever its container asks for: programs that change their user, and devices.
const VOLUME: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV);

/// The disks that are mounted as volumes, and how many containers use each.
#[derive(Default)]
pub struct Disks {
    table: Mutex<HashMap<String, usize>>,
}

impl Disks {
    /// Mounts a volume unless it is there. `users` is the user namespace whose ids its files have.
    ///
    /// # Errors
    /// [`MountError`]; nothing stays mounted.
    pub fn acquire(&self, disk: &Disk, users: Option<&File>) -> Result<(), MountError> {
        let mut table = self.lock();
        if let Some(uses) = table.get_mut(&disk.serial) {
            *uses += 1;
            return Ok(());
        }
        let target = directory(&disk.serial)?;
        fs::create_dir_all(&target).map_err(io_error("create", &target))?;
        if let Err(error) = mount_at(disk, users, VOLUME, &target) {
            // Nothing is in it, and nobody has heard of it.
            let _ = fs::remove_dir(&target);
            return Err(error);
        }
        table.insert(disk.serial.clone(), 1);
        Ok(())
    }

    /// A container needs the volume no more. When it was the last, everything is on the disk once this returns; what
    /// cannot be undone is said on the console.
    pub fn release(&self, serial: &str) {
        let mut table = self.lock();
        let Some(uses) = table.get_mut(serial) else { return };
        *uses -= 1;
        if *uses == 0 {
            table.remove(serial);
            directory(serial).iter().for_each(|target| leave(target));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.table.lock().expect("nothing panics while it holds the table of disks")
    }
}

/// Where a volume is mounted.
fn directory(serial: &str) -> Result<PathBuf, MountError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if serial.is_empty() || !serial.bytes().all(plain) {
        return Err(MountError::NoDisk(serial.chars().take(80).collect()));
    }
    Ok(Path::new(DISKS_DIR).join(serial))
}

/// Mounts a disk on `target`.
///
/// # Errors
/// [`MountError`]; nothing is mounted then.
pub fn mount_at(
    disk: &Disk,
    users: Option<&File>,
    attributes: MountAttrFlags,
    target: &Path,
) -> Result<(), MountError> {
    let device = find_disk(Path::new("/sys/block"), &disk.serial)?;
    let failed = |source| MountError::Mount { what: device.display().to_string(), target: target.to_owned(), source };
    let mounted = first_that_fits(disk, &device, attributes)?;
    if let Some(users) = users {
        users::map(mounted.as_fd(), users).map_err(failed)?;
    }
    move_mount(&mounted, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(|e| failed(e.into()))
}

fn first_that_fits(disk: &Disk, device: &Path, attributes: MountAttrFlags) -> Result<OwnedFd, MountError> {
    let list = Path::new("/proc/filesystems");
    let known = fs::read_to_string(list).map_err(io_error("read", list))?;
    let types: Vec<_> = disk.types.iter().filter(|kind| on_disks(&known).any(|known| known == *kind)).collect();
    let none = |reason: String| MountError::NoFileSystem { serial: disk.serial.clone(), reason };
    if types.is_empty() {
        return Err(none(format!("the guest's kernel knows none of {}", disk.types.join(", "))));
    }
    let mut reasons = Vec::new();
    for kind in types {
        match mounted(kind, device, disk.read_only, attributes) {
            Ok(mounted) => return Ok(mounted),
            Err(errno) => reasons.push(format!("{kind}: {}", io::Error::from(errno))),
        }
    }
    Err(none(reasons.join("; ")))
}

/// The types of file systems on disks that a kernel has, from its /proc/filesystems.
fn on_disks(list: &str) -> impl Iterator<Item = &str> {
    list.lines().filter_map(|line| line.strip_prefix('\t'))
}

fn mounted(kind: &str, device: &Path, read_only: bool, attributes: MountAttrFlags) -> Result<OwnedFd, Errno> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", device)?;
    let mut attributes = attributes | MountAttrFlags::MOUNT_ATTR_RELATIME;
    if read_only {
        fsconfig_set_flag(&context, "ro")?;
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Brings a file system's data to its disk and takes it away, lazily where somebody still holds a file.
pub fn leave(target: &Path) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let synced = rustix::fs::open(target, flags, Mode::empty()).and_then(rustix::fs::syncfs);
    if let Err(errno) = synced {
        crate::say!("sync {}: {errno}", target.display());
    }
    let gone = unmount(target, UnmountFlags::empty()).or_else(|_| unmount(target, UnmountFlags::DETACH));
    if let Err(errno) = gone {
        crate::say!("unmount {}: {errno}", target.display());
    }
    if let Err(error) = fs::remove_dir(target) {
        crate::say!("remove {}: {error}", target.display());
    }
}

/// Takes all volumes away: the machine is about to reset. Best effort.
pub fn leave_all() {
    for volume in fs::read_dir(DISKS_DIR).into_iter().flatten().flatten() {
        leave(&volume.path());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_are_no_paths() {
        for bad in ["", ".", "..", "a/b", "A", "a\0"] {
            assert!(matches!(directory(bad), Err(MountError::NoDisk(_))), "{bad:?}");
        }
        assert_eq!(directory("disk-0").expect("name"), Path::new("/run/nacelle/disks/disk-0"));
    }

    #[test]
    fn only_types_that_live_on_disks_are_tried() {
        let list = "nodev\tsysfs\nnodev\ttmpfs\n\text4\n\terofs\nnodev\tvirtiofs\n";
        assert_eq!(on_disks(list).collect::<Vec<_>>(), ["ext4", "erofs"]);
    }
}
