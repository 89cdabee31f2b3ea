//! The guest's mounts: shares, the upper disk, and each container's root file system.
//!
//! ```text
//!  /run/nacelle/layers/<name>  ──erofs, straight on the file──► /run/nacelle/lowers/<n>    once, however many use it
//!                          └── dm-verity ──erofs──►
//!                                                                     │ lowerdir+ (topmost first)
//!  /run/nacelle/upper/<id>/{upper,work} ──────────────────────────────┤
//!                                                                     ▼
//!                                          overlay on /run/nacelle/containers/<id>/rootfs
//! ```
//!
//! A lower whose image refers to files elsewhere is an overlay of its own, read-only: the image, and below it as data-only layers the
//! directories that have them. So whatever the containers' overlays put into their uppers never refers to anything.
//!
//! The root may be a disk instead, see [`crate::disk`].
//!
//! The overlay is made with fsopen(2) and its successors: each lower is an option of its own, so their number is not
//! bound by the page that mount(2) has for options. It is `volatile`: an upper lives no longer than its container, so
//! nobody is served by syncing it. It is private: a mount that a container makes never appears in the agent's namespace,
//! where removing a container's files could reach into it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use nacelle_protocol::agent::{CONTAINERS_DIR, DATA_DIR, LAYERS_DIR, Lower, Rootfs, UPPER_DIR, Verity};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, mount_change, move_mount, unmount,
};
use thiserror::Error;

use crate::disk;
use crate::quota::{self, Limit};
use crate::users;
use crate::verity;

/// Mount points of the lowers.
const LOWERS_DIR: &str = "/run/nacelle/lowers";

/// Most lowers of one overlay (the kernel's OVL_MAX_STACK).
const MAX_LOWERS: usize = 500;

/// What went wrong with a mount.
#[derive(Debug, Error)]
pub enum MountError {
    /// A lower's name is not a file name.
    #[error("read name of lower {0:?}: expected a file name")]
    Name(String),
    /// Too few or too many lowers.
    #[error("mount {0} lowers: expected 1 to {MAX_LOWERS}")]
    Count(usize),
    /// A mount point that is not below /run/nacelle.
    #[error("mount on {0:?}: expected a path below /run/nacelle")]
    Target(String),
    /// A directory.
    #[error("{verb} {path}")]
    Io {
        /// What was being done.
        verb: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A mount.
    #[error("mount {what} on {target}")]
    Mount {
        /// File, tag, device or file system.
        what: String,
        /// Mount point.
        target: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A block of a verified image that mounting it reads is not what it was.
    #[error("verify {0}: it differs from what was converted")]
    Damaged(String, #[source] io::Error),
    /// No disk of that serial number.
    #[error("find disk {0:?}: no block device has this serial number")]
    NoDisk(String),
    /// No file system on a disk that may be there and that the kernel knows.
    #[error("mount disk {serial}: {reason}")]
    NoFileSystem {
        /// Its serial number.
        serial: String,
        /// What each type that was tried says.
        reason: String,
    },
}

/// The error of doing something to a file.
pub fn io_error<'a>(verb: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> MountError + 'a {
    move |source| MountError::Io { verb, path: path.to_owned(), source }
}

/// The lowers that are mounted, and how many containers use each.
#[derive(Default)]
pub struct Lowers {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    next: u64,
    /// By name, and by whether their ids are mapped.
    mounted: HashMap<(String, bool), (PathBuf, usize)>,
}

impl Lowers {
    fn acquire(&self, lower: &Lower, users: Option<&File>) -> Result<PathBuf, MountError> {
        let file = share_file(&lower.name)?;
        let devices = lower.devices.iter().map(|name| share_file(name)).collect::<Result<Vec<_>, _>>()?;
        let directory = |name: &String| Ok(Path::new(LAYERS_DIR).join(DATA_DIR).join(file_name(name)?));
        let data = lower.data.iter().map(directory).collect::<Result<Vec<_>, MountError>>()?;
        let files: Vec<PathBuf> = std::iter::once(file).chain(devices).collect();
        let mut table = self.lock();
        let key = (lower.name.clone(), users.is_some());
        if let Some((target, uses)) = table.mounted.get_mut(&key) {
            *uses += 1;
            return Ok(target.clone());
        }
        let target = Path::new(LOWERS_DIR).join(table.next.to_string());
        table.next += 1;
        fs::create_dir_all(&target).map_err(io_error("create", &target))?;
        let mounted = mount_image(&files, &lower.verity, &target, users);
        if let Err(source) = mounted.and_then(|()| if data.is_empty() { Ok(()) } else { add_data(&target, &data) }) {
            // Nothing is in it, and nobody has heard of it.
            let _ = fs::remove_dir(&target);
            let damaged = !lower.verity.is_empty() && source.raw_os_error() == Some(libc::EIO);
            return Err(match damaged {
                true => MountError::Damaged(lower.name.clone(), source),
                false => MountError::Mount { what: lower.name.clone(), target, source },
            });
        }
        table.mounted.insert(key, (target.clone(), 1));
        Ok(target)
    }

    fn release(&self, lower: &Lower, mapped: bool) {
        let mut table = self.lock();
        let key = (lower.name.clone(), mapped);
        let Some((target, uses)) = table.mounted.get_mut(&key) else { return };
        *uses -= 1;
        if *uses == 0 {
            let target = target.clone();
            table.mounted.remove(&key);
            detach(&target);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().expect("nothing panics while it holds the table of lowers")
    }
}

/// The file of the layers share that has this name.
fn share_file(name: &str) -> Result<PathBuf, MountError> {
    Ok(Path::new(LAYERS_DIR).join(file_name(name)?))
}

fn file_name(name: &str) -> Result<&str, MountError> {
    if name.is_empty() || name.contains(['/', '\0']) || matches!(name, "." | "..") {
        return Err(MountError::Name(name.chars().take(80).collect()));
    }
    Ok(name)
}

/// Puts an overlay in the place of the image that is mounted on `target`: its files that have no data of their own have that
/// of the files in `data`. After an error nothing is mounted there.
fn add_data(target: &Path, data: &[PathBuf]) -> io::Result<()> {
    let overlay = || -> io::Result<_> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", "index")?;
        fsconfig_set_string(&context, "lowerdir+", target)?;
        for directory in data {
            // Opened, it is the mount that the host has put there, and not the place for it.
            fs::File::open(directory)?;
            fsconfig_set_string(&context, "datadir+", directory)?;
        }
        fsconfig_set_string(&context, "metacopy", "on")?;
        fsconfig_set_flag(&context, "ro")?;
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOATIME;
        Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
    };
    let overlay = overlay();
    // The overlay has a mount of the image of its own.
    unmount(target, UnmountFlags::DETACH)?;
    Ok(move_mount(&overlay?, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Mounts an image, the first of `files`, its ids those of the user namespace `users`; the others hold file data of it. With `trees`, one for each file, what is read is
/// checked; without, there is no loop device: EROFS reads the files itself (Linux 6.12).
fn mount_image(files: &[PathBuf], trees: &[Verity], target: &Path, users: Option<&File>) -> io::Result<()> {
    if !trees.is_empty() {
        if trees.len() != files.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "some of its files have no tree of digests"));
        }
        let verified = files.iter().zip(trees).map(|(file, tree)| verity::open(file, tree));
        let verified = verified.collect::<io::Result<Vec<_>>>()?;
        let paths: Vec<PathBuf> = verified.iter().map(verity::Device::path).collect();
        // They stay for as long as the mount.
        return mount_image(&paths, &[], target, users);
    }
    let (file, devices) = files.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    if devices.is_empty() && users.is_none() {
        return Ok(mount(file, target, "erofs", MountFlags::RDONLY | MountFlags::NOATIME, None)?);
    }
    // Their names may fill more than the page that mount(2) has for options.
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", file)?;
    fsconfig_set_flag(&context, "ro")?;
    for device in devices {
        fsconfig_set_string(&context, "device", device)?;
    }
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOATIME;
    let mounted = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    if let Some(users) = users {
        users::map(mounted.as_fd(), users)?;
    }
    Ok(move_mount(&mounted, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Where the root file system of container `id` is mounted.
pub fn rootfs_path(id: &str) -> PathBuf {
    Path::new(CONTAINERS_DIR).join(id).join("rootfs")
}

/// Where what container `id` has written lies.
pub fn upper_path(id: &str) -> PathBuf {
    Path::new(UPPER_DIR).join(id).join("upper")
}

/// Mounts the root file system of container `id`; `users` is the user namespace whose ids it has, `limit` that of the upper.
///
/// # Errors
/// [`MountError`]; nothing stays mounted.
pub fn mount_rootfs(
    lowers: &Lowers,
    id: &str,
    rootfs: &Rootfs,
    users: Option<&File>,
    limit: Option<&Limit>,
) -> Result<(), MountError> {
    if let Some(disk) = &rootfs.disk {
        let target = rootfs_path(id);
        fs::create_dir_all(&target).map_err(io_error("create", &target))?;
        return disk::mount_at(disk, users, MountAttrFlags::empty(), &target).inspect_err(|_| {
            // Nothing is in it.
            let _ = fs::remove_dir(&target);
        });
    }
    let images = rootfs.lowers.as_slice();
    if images.is_empty() || images.len() > MAX_LOWERS {
        return Err(MountError::Count(images.len()));
    }
    let mut targets = Vec::with_capacity(images.len());
    let mounted = images.iter().try_for_each(|image| lowers.acquire(image, users).map(|target| targets.push(target)));
    let limited = || limit.map_or(Ok(()), |limit| limit_upper(id, limit));
    let mounted = mounted.and_then(|()| limited()).and_then(|()| overlay(id, &targets));
    if mounted.is_err() {
        images.iter().take(targets.len()).for_each(|image| lowers.release(image, users.is_some()));
        // It may not exist yet.
        let _ = fs::remove_dir(rootfs_path(id));
        remove_upper(id);
    }
    mounted
}

fn limit_upper(id: &str, limit: &Limit) -> Result<(), MountError> {
    let directory = Path::new(UPPER_DIR).join(id);
    fs::create_dir_all(&directory).map_err(io_error("create", &directory))?;
    limit.set(&directory).map_err(io_error("limit", &directory))
}

/// Undoes [`mount_rootfs`]; the upper is gone with it. What cannot be undone is said on the console.
pub fn unmount_rootfs(lowers: &Lowers, id: &str, rootfs: &Rootfs) {
    if rootfs.disk.is_some() {
        return disk::leave(&rootfs_path(id));
    }
    detach(&rootfs_path(id));
    rootfs.lowers.iter().for_each(|image| lowers.release(image, rootfs.mapped));
    remove_upper(id);
}

fn remove_upper(id: &str) {
    let path = Path::new(UPPER_DIR).join(id);
    match fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => crate::say!("remove {}: {error}", path.display()),
        _ => {}
    }
}

/// Unmounts and removes a mount point. Lazily, because the mount namespace of a container whose last process has just
/// ended may live on for a moment.
fn detach(target: &Path) {
    if let Err(error) = unmount(target, UnmountFlags::DETACH) {
        crate::say!("unmount {}: {error}", target.display());
    }
    if let Err(error) = fs::remove_dir(target) {
        crate::say!("remove {}: {error}", target.display());
    }
}

/// `lowers`: mounted, bottom first.
fn overlay(id: &str, lowers: &[PathBuf]) -> Result<(), MountError> {
    let target = rootfs_path(id);
    let upper = upper_path(id);
    let work = Path::new(UPPER_DIR).join(id).join("work");
    for directory in [&target, &upper, &work] {
        fs::create_dir_all(directory).map_err(io_error("create", directory))?;
    }
    // The root of the overlay is that of the upper, so it has to look like that of the image.
    if let Some(top) = lowers.last() {
        let like = fs::metadata(top).map_err(io_error("look at", top))?;
        let mode = fs::Permissions::from_mode(like.mode() & 0o7777);
        std::os::unix::fs::chown(&upper, Some(like.uid()), Some(like.gid())).map_err(io_error("own", &upper))?;
        fs::set_permissions(&upper, mode).map_err(io_error("set mode of", &upper))?;
    }
    let mounted = || -> io::Result<()> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", "overlay")?;
        // The first one is the topmost.
        for lower in lowers.iter().rev() {
            fsconfig_set_string(&context, "lowerdir+", lower)?;
        }
        fsconfig_set_string(&context, "upperdir", &upper)?;
        fsconfig_set_string(&context, "workdir", &work)?;
        // The upper has to mean something over other copies of its lowers: it may be exported.
        fsconfig_set_string(&context, "redirect_dir", "off")?;
        fsconfig_set_string(&context, "metacopy", "off")?;
        fsconfig_set_flag(&context, "volatile")?;
        fsconfig_create(&context)?;
        let overlay = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        Ok(move_mount(&overlay, "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
    };
    mounted().map_err(|source| MountError::Mount {
        what: format!("overlay of {} lowers", lowers.len()),
        target,
        source,
    })
}

/// Mounts the virtiofs share `tag` on `target`.
///
/// # Errors
/// [`MountError`]
pub fn mount_share(tag: &str, target: &str, read_only: bool) -> Result<(), MountError> {
    let path = Path::new(target);
    let below = path.starts_with("/run/nacelle") && !path.components().any(|c| c.as_os_str() == "..");
    if !below || target.contains('\0') {
        return Err(MountError::Target(target.chars().take(80).collect()));
    }
    fs::create_dir_all(path).map_err(io_error("create", path))?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    if read_only {
        flags |= MountFlags::RDONLY;
    }
    // What the host mounts below the share later reaches the containers that have it as a slave.
    mount(tag, path, "virtiofs", flags, None).and_then(|()| mount_change(path, MountPropagationFlags::SHARED)).map_err(
        |error| MountError::Mount { what: format!("share {tag}"), target: path.to_owned(), source: error.into() },
    )
}

/// Enters volumes of the volumes share, so that each is mounted in the agent's own namespace before a container has it.
///
/// A volume is a file system of its own within the share (FUSE_ATTR_SUBMOUNT), which the kernel mounts for whoever walks into it
/// first. Were that a container alone, the last reference would go with its mount namespace, while files that its processes had
/// open are still being given back: the kernel then finds inodes in use after an unmount, and may give up.
pub fn enter_volumes(volumes: &[PathBuf]) {
    for volume in volumes {
        // A single file is none of that, and what is not there is told by who mounts it.
        let _ = rustix::fs::open(volume, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    }
}

/// Undoes [`enter_volumes`], when nobody has the volumes any more.
pub fn leave_volumes(volumes: &[PathBuf]) {
    for volume in volumes {
        match unmount(volume, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // A file, one that the host has taken away, or one that nobody has entered.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => {}
            Err(errno) => crate::say!("unmount {}: {errno}", volume.display()),
        }
    }
}

/// Mounts the ext4 disk with serial number `serial` where the uppers live; returns the device, if it can limit containers.
///
/// # Errors
/// [`MountError`]
pub fn mount_upper(serial: &str) -> Result<Option<PathBuf>, MountError> {
    let device = find_disk(Path::new("/sys/block"), serial)?;
    let target = Path::new(UPPER_DIR);
    fs::create_dir_all(target).map_err(io_error("create", target))?;
    let quota = quota::supported();
    if !quota {
        quota::take_out(&device).map_err(io_error("take quotas out of", &device))?;
    }
    let options = quota.then_some(c"prjquota");
    mount(&device, target, "ext4", MountFlags::NOATIME, options).map_err(|error| MountError::Mount {
        what: device.display().to_string(),
        target: target.to_owned(),
        source: error.into(),
    })?;
    Ok(quota.then_some(device))
}

/// The device of the disk with serial number `serial`, among those in `sys_block`.
///
/// # Errors
/// [`MountError`]
pub fn find_disk(sys_block: &Path, serial: &str) -> Result<PathBuf, MountError> {
    let disks = fs::read_dir(sys_block).map_err(io_error("list", sys_block))?;
    for disk in disks.flatten() {
        // Devices other than virtio-blk have no serial number there.
        let Ok(found) = fs::read_to_string(disk.path().join("serial")) else { continue };
        if found.trim_end() == serial {
            return Ok(Path::new("/dev").join(disk.file_name()));
        }
    }
    Err(MountError::NoDisk(serial.chars().take(80).collect()))
}

/// Takes the file systems with the uppers away, so that what is on the disk is whole. Best effort: the machine is about
/// to reset.
pub fn unmount_all() {
    for container in fs::read_dir(CONTAINERS_DIR).into_iter().flatten().flatten() {
        let _ = unmount(container.path().join("rootfs"), UnmountFlags::empty());
    }
    disk::leave_all();
    rustix::fs::sync();
    let _ = unmount(UPPER_DIR, UnmountFlags::empty());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowers_are_file_names() {
        let lowers = Lowers::default();
        let lower =
            |name: &str| Lower { name: name.to_owned(), devices: Vec::new(), data: Vec::new(), verity: Vec::new() };
        for bad in ["", ".", "..", "../x", "a/b", "a\0"] {
            assert!(matches!(lowers.acquire(&lower(bad), None), Err(MountError::Name(_))), "{bad:?}");
            let device = Lower { devices: vec!["good".to_owned(), bad.to_owned()], ..lower("good") };
            assert!(matches!(lowers.acquire(&device, None), Err(MountError::Name(_))), "{bad:?}");
            let data = Lower { data: vec![bad.to_owned()], ..lower("good") };
            assert!(matches!(lowers.acquire(&data, None), Err(MountError::Name(_))), "{bad:?}");
        }
        let root = |lowers| Rootfs { lowers, disk: None, upper_bytes: None, mapped: false };
        let mount = |images| mount_rootfs(&lowers, "x", &root(images), None, None);
        assert!(matches!(mount(Vec::new()), Err(MountError::Count(0))));
        assert!(matches!(mount(vec![lower(""); 501]), Err(MountError::Count(501))));
    }

    #[test]
    fn shares_stay_below_run() {
        for bad in ["/", "/etc", "run/nacelle/x", "/run/nacelle/../etc", "/run/nacelles"] {
            assert!(matches!(mount_share("t", bad, true), Err(MountError::Target(_))), "{bad}");
        }
    }

    #[test]
    fn disks_are_found_by_serial() {
        let sys = tempfile::tempdir().expect("directory");
        for (name, serial) in [("vda", Some("other")), ("vdb", Some("upper\n")), ("loop0", None)] {
            fs::create_dir(sys.path().join(name)).expect("disk");
            if let Some(serial) = serial {
                fs::write(sys.path().join(name).join("serial"), serial).expect("serial");
            }
        }
        assert_eq!(find_disk(sys.path(), "upper").expect("found"), Path::new("/dev/vdb"));
        assert!(matches!(find_disk(sys.path(), "none"), Err(MountError::NoDisk(_))));
    }
}
