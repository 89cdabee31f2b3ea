//! Lock files: `flock` across processes, freed by the kernel when the holder dies.
//!
//! A lock file may be deleted by its holder. Who waited for it then holds a lock on a file that nobody else can find, so a lock
//! counts only while its file still has a name.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags};

/// Held until dropped.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "the descriptor is the lock")] File);

impl Lock {
    /// Waits for the lock `path`, which is created when it does not exist.
    pub(crate) fn wait(path: &Path) -> io::Result<Lock> {
        loop {
            let file = open(path)?;
            flock(&file, FlockOperation::LockExclusive)?;
            if has_name(&file)? {
                return Ok(Lock(file.into()));
            }
        }
    }

    /// The lock, or `None` when somebody else holds it.
    pub(crate) fn try_now(path: &Path) -> io::Result<Option<Lock>> {
        let file = open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
            Ok(()) => Ok(has_name(&file)?.then(|| Lock(file.into()))),
        }
    }
}

/// Marks an opened file as in use, beside any number of others. False when the file has lost its name or, without `wait`, when
/// somebody has claimed it.
pub(crate) fn share(file: &File, wait: bool) -> io::Result<bool> {
    let operation = if wait { FlockOperation::LockShared } else { FlockOperation::NonBlockingLockShared };
    match flock(file, operation) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        other => other.and_then(|()| has_name(file)),
    }
}

/// True when nobody uses the file; it stays locked against users until it is closed.
pub(crate) fn claim(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        other => other.map(|()| true),
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?)
}

fn flock(file: impl std::os::fd::AsFd, operation: FlockOperation) -> io::Result<()> {
    loop {
        match rustix::fs::flock(&file, operation) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

fn has_name(file: impl std::os::fd::AsFd) -> io::Result<bool> {
    Ok(rustix::fs::fstat(file)?.st_nlink > 0)
}
