//! Named volumes: directories that nacelle keeps, for containers to come.
//!
//! ```text
//!  <data_dir>/volumes/                 mode 0700: what a guest leaves in a volume, set-uid programs too, is nobody else's
//!     .lock                            held while a volume is made or removed
//!     .new  .gone                      one that is being made or removed; what is left of it is removed by who comes next
//!     <name>/data/                     what containers see
//!     <name>/lock                      locked by whoever uses the volume; made once, so its time is the volume's
//! ```
//!
//! A volume appears and goes by rename, so it is there whole or not at all. Many may use it at once; it is not removed under them.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom};
use rustix::io::Errno;

use super::{NameError, check_name};
use crate::layer::{list, statx};
use crate::lock::{self, Lock};
use crate::tree::SourceDir;

/// Why something cannot be done with a volume.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It has no name that a volume can have.
    #[error(transparent)]
    Name(#[from] NameError),
    /// There is none with this name.
    #[error("volume {0:?} does not exist; make it with `nacelle volume create`")]
    NotFound(String),
    /// There is one with this name.
    #[error("create volume {0:?}: it exists already")]
    Exists(String),
    /// A container uses it.
    #[error("remove volume {0:?}: it is in use")]
    InUse(String),
    /// A file or directory cannot be read or made.
    #[error("{what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + use<'a> {
    move |source| StoreError::Io { what, path: path.into(), source }
}

/// A volume that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// What containers see.
    pub path: PathBuf,
    /// When it was made.
    pub created: SystemTime,
    /// Somebody uses it.
    pub in_use: bool,
}

/// The named volumes of a node.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The volumes below a data directory. Nothing is made before the first volume is.
    pub fn new(data_dir: &Path) -> Store {
        Store { root: data_dir.join("volumes") }
    }

    /// Makes a volume and returns the directory that containers see: empty, root's, mode 0755.
    ///
    /// # Errors
    /// [`StoreError::Exists`], among others; nothing is left behind.
    pub fn create(&self, name: &str) -> Result<PathBuf, StoreError> {
        check_name(name)?;
        let _lock = self.lock()?;
        let (new, volume) = (self.root.join(".new"), self.root.join(name));
        if volume.symlink_metadata().is_ok() {
            return Err(StoreError::Exists(name.into()));
        }
        make(&new).inspect_err(|_| drop(remove_tree(&new)))?; // the first error is the one to tell
        fs::rename(&new, &volume).map_err(failed("publish volume", &volume))?;
        sync(&self.root)?;
        Ok(volume.join("data"))
    }

    /// All volumes, by name.
    pub fn list(&self) -> Result<Vec<Info>, StoreError> {
        let entries = match fs::read_dir(&self.root) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed("list volumes in", &self.root))?,
        };
        let mut volumes = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed("list volumes in", &self.root))?.file_name();
            let Some(name) = name.to_str().filter(|name| check_name(name).is_ok()) else { continue };
            match self.inspect(name) {
                Err(StoreError::NotFound(_)) => {} // removed meanwhile
                other => volumes.push(other?),
            }
        }
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }

    /// One volume.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], among others.
    pub fn inspect(&self, name: &str) -> Result<Info, StoreError> {
        let (path, lock) = self.open(name)?;
        let created = lock.metadata().and_then(|m| m.modified()).map_err(failed("look at volume", &path))?;
        let in_use = !lock::claim(&lock).map_err(failed("lock volume", &path))?;
        Ok(Info { name: name.into(), path, created, in_use })
    }

    /// Bytes that a volume takes on the disk. Links in it are not followed, and no other file system is entered.
    pub fn bytes(&self, name: &str) -> Result<u64, StoreError> {
        let (path, _) = self.open(name)?;
        bytes(&path).map_err(failed("count the bytes of", &path))
    }

    /// Removes a volume with all that is in it.
    ///
    /// # Errors
    /// [`StoreError::InUse`] and [`StoreError::NotFound`], among others.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        check_name(name)?;
        let _lock = self.lock()?;
        let (path, lock) = self.open(name)?;
        let mut patience = 5;
        while !lock::claim(&lock).map_err(failed("lock volume", &path))? {
            // Somebody may just be looking.
            patience -= 1;
            if patience == 0 {
                return Err(StoreError::InUse(name.into()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let (volume, gone) = (self.root.join(name), self.root.join(".gone"));
        fs::rename(&volume, &gone).map_err(failed("remove volume", &volume))?;
        // Whoever waits for it may go on, and finds that it has no name any more.
        drop(lock);
        remove_tree(&gone).map_err(failed("remove volume", &gone))?;
        sync(&self.root)
    }

    /// The directory of a volume for a container to see; the volume is not removed as long as the file is open.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], among others.
    pub fn hold(&self, name: &str) -> Result<(PathBuf, File), StoreError> {
        let (path, lock) = self.open(name)?;
        let file = self.root.join(name).join("lock");
        // Only who removes it, or looks at it for a moment, is waited for.
        lock::share(&lock, true).map_err(failed("lock volume", &path))?;
        let is = |m: fs::Metadata| (m.dev(), m.ino());
        let held = lock.metadata().map(is).map_err(failed("look at volume", &path))?;
        match fs::symlink_metadata(&file).map(is) {
            Ok(there) if there == held => Ok((path, lock)),
            // Removed, and perhaps made anew, while we waited.
            _ => Err(StoreError::NotFound(name.into())),
        }
    }

    /// A volume's directory for containers, and its lock file.
    fn open(&self, name: &str) -> Result<(PathBuf, File), StoreError> {
        check_name(name)?;
        let volume = self.root.join(name);
        let (path, file) = (volume.join("data"), volume.join("lock"));
        let flags = (OFlags::NOFOLLOW | OFlags::CLOEXEC).bits();
        match OpenOptions::new().read(true).custom_flags(flags.cast_signed()).open(&file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(StoreError::NotFound(name.into())),
            other => Ok((path, other.map_err(failed("open volume", &file))?)),
        }
    }

    /// The lock of all changes; what who died over it has left is gone.
    fn lock(&self) -> Result<Lock, StoreError> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.root).map_err(failed("create", &self.root))?;
        let path = self.root.join(".lock");
        let lock = Lock::wait(&path).map_err(failed("lock", &path))?;
        for left in [".new", ".gone"].map(|name| self.root.join(name)) {
            remove_tree(&left).map_err(failed("remove", &left))?;
        }
        Ok(lock)
    }
}

/// A volume that nobody sees yet.
fn make(new: &Path) -> Result<(), StoreError> {
    let (data, lock) = (new.join("data"), new.join("lock"));
    for directory in [new, &data] {
        fs::create_dir(directory).map_err(failed("create", directory))?;
        // Whatever the umask is.
        fs::set_permissions(directory, Permissions::from_mode(0o755)).map_err(failed("create", directory))?;
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&lock);
    file.map_err(failed("create", &lock))?;
    sync(new)
}

fn sync(directory: &Path) -> Result<(), StoreError> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(failed("sync", directory))
}

/// A walk by descriptors: a guest may rename and replace what is walked over.
fn bytes(root: &Path) -> io::Result<u64> {
    let root = Arc::new(open_directory(rustix::fs::CWD, root)?);
    let mut total = 0;
    let mut linked = HashSet::new();
    let mut pending = vec![Vec::new()];
    while let Some(path) = pending.pop() {
        let directory = SourceDir { root: Arc::clone(&root), path };
        let opened = match directory.open() {
            // Replaced or removed meanwhile, or the root of another file system.
            Err(e)
                if matches!(
                    Errno::from_io_error(&e),
                    Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV)
                ) =>
            {
                continue;
            }
            other => other?,
        };
        total += statx(&opened, b"", AtFlags::EMPTY_PATH)?.stx_blocks * 512;
        for name in list(&opened)? {
            let stat = match statx(&opened, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                other => other?,
            };
            if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory {
                let separator: &[u8] = if directory.path.is_empty() { b"" } else { b"/" };
                pending.push([&directory.path, separator, &*name].concat());
            } else if stat.stx_nlink == 1 || linked.insert(stat.stx_ino) {
                total += stat.stx_blocks * 512;
            }
        }
    }
    Ok(total)
}

/// Removes a tree, however deep a guest has made it: each directory in it is moved to the top before it is looked into.
fn remove_tree(root: &Path) -> io::Result<()> {
    let top = match open_directory(rustix::fs::CWD, root) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    let mut number = 0u64;
    loop {
        rustix::fs::seek(&top, SeekFrom::Start(0))?;
        let names = list(&top)?;
        if names.is_empty() {
            return Ok(rustix::fs::rmdir(root)?);
        }
        for name in names {
            if unlink(&top, &name)? {
                continue;
            }
            let directory = open_directory(&top, &*name)?;
            for name in list(&directory)? {
                while !unlink(&directory, &name)? {
                    number += 1;
                    let new = number.to_string();
                    match rustix::fs::renameat_with(&directory, &*name, &top, &*new, RenameFlags::NOREPLACE) {
                        Err(Errno::EXIST) => {} // left by who died over this tree
                        other => {
                            other?;
                            break;
                        }
                    }
                }
            }
            rustix::fs::unlinkat(&top, &*name, AtFlags::REMOVEDIR)?;
        }
    }
}

/// Removes what is no directory, else returns false.
fn unlink(directory: &OwnedFd, name: &[u8]) -> rustix::io::Result<bool> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => Ok(false),
        other => other.map(|()| true),
    }
}

fn open_directory(at: impl AsFd, path: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty())
}
