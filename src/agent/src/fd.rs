//! A descriptor that never blocks the one thread: pipes and pseudo terminals.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A pipe's end or the master of a pseudo terminal.
pub struct Fd(AsyncFd<OwnedFd>);

impl Fd {
    /// Makes `fd` non-blocking and registers it with the runtime.
    ///
    /// # Errors
    /// What fcntl(2) and epoll_ctl(2) say.
    pub fn new(fd: OwnedFd, interest: Interest) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        register(fd, interest).map(Self)
    }

    /// Waits until a read would not block.
    ///
    /// # Errors
    /// When the runtime shuts down.
    pub async fn readable(&self) -> io::Result<()> {
        // Dropping the guard keeps the readiness, so the read that follows finds it.
        self.0.readable().await.map(drop)
    }

    /// Reads what is there, at least one byte; 0 at end of file.
    ///
    /// # Errors
    /// What read(2) says. A terminal whose last user is gone says EIO: that is an end of file.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.0.readable().await?;
            match guard.try_io(|fd| Ok(rustix::io::read(fd, &mut *buffer)?)) {
                Ok(Err(error)) if Errno::from_io_error(&error) == Some(Errno::IO) => return Ok(0),
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Reads what is there without waiting, whether or not the runtime has heard of it; `None` when nothing is.
    pub fn read_now(&self, buffer: &mut [u8]) -> Option<usize> {
        rustix::io::read(&self.0, buffer).ok()
    }

    /// Writes everything.
    ///
    /// # Errors
    /// What write(2) says.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.0.writable().await?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd, bytes)?)) {
                Ok(written) => bytes = &bytes[written?..],
                Err(_would_block) => {}
            }
        }
        Ok(())
    }
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Lets the runtime watch a descriptor.
///
/// # Errors
/// What epoll_ctl(2) says.
#[expect(deprecated, reason = "its replacement is unsafe for the sake of types that do not own their descriptor")]
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}

/// A pipe, its reading end first; both ends close on exec.
///
/// # Errors
/// What pipe2(2) says.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}
