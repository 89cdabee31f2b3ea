//! Disks that a pod brings with it: images of the host that its VM has as devices, for as long as it lives.
//!
//! ```text
//!  Wanted ──chain, lock──► Disk ──vm::plan──► a device of the VM ──► its root, or a volume of its containers
//! ```
//!
//! libkrun has no device that comes later, so what the first container or the pod's annotations do not name is refused to those
//! that follow. Two users of one image are kept apart by flock(2), as QEMU keeps them with its own locks: many may read, one may
//! write; and a block device that is written to is nobody else's, the kernel of the host included. Every further file that an image is made of is found here, judged, and handed to the jail by its name; the VMM finds no
//! other.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nacelle_protocol::agent;
use nacelle_protocol::vm::{self, DiskFormat, DiskPart};
use nacelle_rootfs::disk::{self, ChainError, Format};
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use thiserror::Error;

/// Why a disk cannot be used.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It, or what it is made of.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It is neither a file nor a block device, or a device that an image refers to.
    #[error("use disk {0}: only regular files, and block devices by themselves, can be disks of a VM")]
    Kind(PathBuf),
    /// It cannot be opened or locked.
    #[error("lock disk {path}")]
    Lock {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Somebody else writes to it, or reads what would be written to.
    #[error("use disk {path}: another sandbox or program {how}")]
    Busy {
        /// The file.
        path: PathBuf,
        /// What the other does with it.
        how: &'static str,
    },
    /// Writing to a format that is read only.
    #[error("use disk {0}: vmdk images can only be read; mount it with `ro`")]
    ReadOnlyFormat(PathBuf),
    /// A file that libkrun opens for writing whatever the disk is.
    #[error("use disk {path}: its data is in {data}, which cannot be opened read-only; mount it with `rw`")]
    DataFile {
        /// The image.
        path: PathBuf,
        /// The file.
        data: PathBuf,
    },
    /// The same image twice, and not in the same way.
    #[error("use disk {0}: it is asked for twice, as different formats or for two roots")]
    Twice(PathBuf),
    /// The VM is as it is.
    #[error(
        "use disk {0}: the sandbox's VM was started without it, or with it read-only; the pod's own annotations have to name it"
    )]
    Late(PathBuf),
}

/// A disk that a container asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The image, with every link followed.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
    /// Types of file systems that may be on it.
    pub types: Vec<String>,
    /// The container does not write.
    pub read_only: bool,
    /// It may refer to files in its own directory: who names it is the node's owner, not a pod's author.
    pub beside: bool,
}

/// A disk of a VM's. Dropping it gives the image free.
#[derive(Debug)]
pub struct Disk {
    serial: String,
    wanted: Wanted,
    device: bool,
    parts: Vec<DiskPart>,
    _locks: Vec<File>,
}

/// The disks of a VM.
#[derive(Debug, Default)]
pub struct Disks(Vec<Disk>);

impl Disks {
    /// Finds and locks them all. Files that their images refer to have to be `allowed`. Blocks.
    ///
    /// # Errors
    /// [`DiskError`]; nothing stays locked.
    pub fn attach(wanted: &[Wanted], allowed: impl Fn(&Path) -> bool) -> Result<Self, DiskError> {
        let mut merged: Vec<Wanted> = Vec::new();
        for want in wanted {
            match merged.iter_mut().find(|known| known.path == want.path) {
                Some(known) if known.format == want.format => known.read_only &= want.read_only,
                Some(_) => return Err(DiskError::Twice(want.path.clone())),
                None => merged.push(want.clone()),
            }
        }
        let disks = merged.into_iter().enumerate().map(|(number, want)| Disk::attach(number, want, &allowed));
        disks.collect::<Result<_, _>>().map(Self)
    }

    /// What the VM gets.
    pub fn devices(&self) -> impl Iterator<Item = vm::Disk> + '_ {
        self.0.iter().map(|disk| vm::Disk {
            serial: disk.serial.clone(),
            source: disk.wanted.path.clone(),
            read_only: disk.wanted.read_only,
            device: disk.device,
            format: match disk.wanted.format {
                Format::Raw => DiskFormat::Raw,
                Format::Qcow2 => DiskFormat::Qcow2,
                Format::Vmdk => DiskFormat::Vmdk,
            },
            parts: disk.parts.clone(),
        })
    }

    /// What the guest has to do to have `wanted` mounted.
    ///
    /// # Errors
    /// [`DiskError::Late`]
    pub fn find(&self, wanted: &Wanted) -> Result<agent::Disk, DiskError> {
        let fits = |disk: &&Disk| {
            let has = &disk.wanted;
            has.path == wanted.path && has.format == wanted.format && (wanted.read_only || !has.read_only)
        };
        let disk = self.0.iter().find(fits).ok_or_else(|| DiskError::Late(wanted.path.clone()))?;
        let (serial, read_only) = (disk.serial.clone(), disk.wanted.read_only);
        Ok(agent::Disk { serial, types: wanted.types.clone(), read_only })
    }
}

impl Disk {
    fn attach(number: usize, wanted: Wanted, allowed: impl Fn(&Path) -> bool) -> Result<Self, DiskError> {
        if wanted.format == Format::Vmdk && !wanted.read_only {
            return Err(DiskError::ReadOnlyFormat(wanted.path));
        }
        let own = wanted.path.parent().filter(|_| wanted.beside);
        let chain =
            disk::chain(&wanted.path, wanted.format, |path| allowed(path) || (own.is_some() && path.parent() == own))?;
        let mut device = false;
        let mut locks = Vec::with_capacity(chain.len());
        let mut parts = Vec::with_capacity(chain.len());
        // Whether a member is found by an absolute name, its own or that of one before it.
        let mut absolute = Vec::with_capacity(chain.len());
        for member in &chain {
            let (by, writable) = match &member.reference {
                None => (false, true),
                Some((by, reference)) => {
                    (reference.is_absolute() || absolute.get(*by).copied().unwrap_or(false), reference.writable)
                }
            };
            absolute.push(by);
            if writable && wanted.read_only && member.reference.is_some() {
                return Err(DiskError::DataFile { path: wanted.path, data: member.path.clone() });
            }
            let read_only = wanted.read_only || !writable;
            let (file, is_device) = lock(&member.path, read_only)?;
            device |= is_device;
            if is_device && (chain.len() > 1 || wanted.format != Format::Raw) {
                return Err(DiskError::Kind(member.path.clone()));
            }
            locks.push(file);
            if let Some((_, reference)) = &member.reference {
                let (source, named) = (member.path.clone(), reference.path.clone());
                parts.push(DiskPart { source, named, absolute: by, read_only });
            }
        }
        Ok(Self { serial: format!("disk-{number}"), wanted, device, parts, _locks: locks })
    }
}

/// Locks a disk; says also whether it is a block device.
fn lock(path: &Path, read_only: bool) -> Result<(File, bool), DiskError> {
    let failed = |source| DiskError::Lock { path: path.to_owned(), source };
    let busy = |how| DiskError::Busy { path: path.to_owned(), how };
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    let device = kind.is_block_device();
    if !kind.is_file() && !device {
        return Err(DiskError::Kind(path.to_owned()));
    }
    // Of a device, the kernel itself sees to it that nobody mounts it meanwhile, or has (open(2), O_EXCL).
    let flags = if device && !read_only { OFlags::EXCL } else { OFlags::empty() };
    let opened = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    let file = opened.map_err(|e| match Errno::from_io_error(&e) {
        Some(Errno::BUSY) => busy("has mounted it"),
        _ => failed(e),
    })?;
    let (operation, how) = match read_only {
        true => (FlockOperation::NonBlockingLockShared, "may write to it"),
        false => (FlockOperation::NonBlockingLockExclusive, "uses it"),
    };
    match flock(&file, operation) {
        Ok(()) => Ok((file, device)),
        Err(Errno::WOULDBLOCK) => Err(busy(how)),
        Err(errno) => Err(failed(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(path: &Path, read_only: bool) -> Wanted {
        Wanted { path: path.to_owned(), format: Format::Raw, types: vec!["ext4".into()], read_only, beside: false }
    }

    fn attach(wanted: &[Wanted]) -> Result<Disks, DiskError> {
        Disks::attach(wanted, |_| true)
    }

    #[test]
    fn one_writes_or_many_read() {
        let dir = tempfile::tempdir().expect("tempdir");
        let image = dir.path().join("image");
        std::fs::write(&image, [0; 4096]).expect("write");
        let (read, write) = (wanted(&image, true), wanted(&image, false));
        let first = attach(std::slice::from_ref(&read)).expect("first reader");
        let second = attach(std::slice::from_ref(&read)).expect("second reader");
        let text = attach(std::slice::from_ref(&write)).expect_err("two readers").to_string();
        assert!(text.ends_with("image: another sandbox or program uses it"), "{text}");
        drop((first, second));
        let writer = attach(std::slice::from_ref(&write)).expect("writer");
        assert!(matches!(attach(std::slice::from_ref(&read)), Err(DiskError::Busy { .. })));
        drop(writer);
        attach(&[read]).expect("free again");
        assert!(matches!(attach(&[wanted(dir.path(), true)]), Err(DiskError::Chain(_) | DiskError::Kind(_))));
    }

    #[test]
    fn later_containers_find_what_is_there() {
        let dir = tempfile::tempdir().expect("tempdir");
        let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
        std::fs::write(&a, [0; 512]).expect("write");
        std::fs::write(&b, [0; 512]).expect("write");
        // One container writes what the other reads: one device.
        let disks = attach(&[wanted(&a, true), wanted(&b, true), wanted(&a, false)]).expect("attach");
        let devices: Vec<_> = disks.devices().map(|disk| (disk.serial, disk.read_only)).collect();
        assert_eq!(devices, [("disk-0".to_owned(), false), ("disk-1".to_owned(), true)]);
        let found = disks.find(&wanted(&a, true)).expect("there");
        assert_eq!((found.serial.as_str(), found.read_only), ("disk-0", false));
        assert!(matches!(disks.find(&wanted(&b, false)), Err(DiskError::Late(_))));
        assert!(matches!(disks.find(&wanted(dir.path(), true)), Err(DiskError::Late(_))));
        let other = Wanted { format: Format::Qcow2, ..wanted(&a, true) };
        assert!(matches!(attach(&[wanted(&a, true), other]), Err(DiskError::Twice(_))));
        let vmdk = Wanted { format: Format::Vmdk, ..wanted(&a, false) };
        assert!(matches!(attach(&[vmdk]), Err(DiskError::ReadOnlyFormat(_))));
    }
}
