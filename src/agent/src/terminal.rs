//! A new process's standard streams: pipes at once, or a terminal whose master libcontainer hands over.
//!
//! libcontainer makes the pseudo terminal inside the container and sends its master to a UNIX socket before the program
//! is executed, so the message is there when the runner has reported.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::guest::{Guest, GuestError, label};
use crate::stdio::{self, Io, Names, Unplugged};

/// Sockets for masters of terminals. Short, because the path of a UNIX socket is.
const CONSOLES_DIR: &str = "/run/nacelle/consoles";

/// The streams of a process that is being made.
pub enum Streams {
    /// They carry bytes already.
    Pipes(Io),
    /// They wait for the terminal.
    Terminal(Console, Unplugged),
}

/// A socket that takes the master of one terminal.
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for Console {
    fn drop(&mut self) {
        // It is in the guest's memory; if it stays, it is a name.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Console {
    fn bind(number: u64) -> io::Result<Self> {
        std::fs::create_dir_all(CONSOLES_DIR)?;
        let path = PathBuf::from(CONSOLES_DIR).join(number.to_string());
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    fn receive(&self) -> io::Result<OwnedFd> {
        let (connection, _) = self.listener.accept()?;
        connection.set_nonblocking(true)?;
        let mut bytes = [0; 64];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        recvmsg(&connection, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let fds = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        fds.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl Guest {
    /// Connects a process's streams to the host. Returns its descriptors 0, 1 and 2 as well.
    ///
    /// # Errors
    /// [`GuestError`]
    pub async fn streams(
        &self,
        id: &str,
        exec_id: &str,
        names: &Names,
        owner: (u32, u32),
    ) -> Result<(Streams, [OwnedFd; 3]), GuestError> {
        let stdio_error = |error| GuestError::Stdio(label(id, exec_id), error);
        if !names.terminal {
            let (io, stdio) = stdio::open(&self.dial, names, owner).await.map_err(stdio_error)?;
            return Ok((Streams::Pipes(io), stdio));
        }
        let unplugged = stdio::open_terminal(&self.dial, names).await.map_err(stdio_error)?;
        let console = Console::bind(self.serial())
            .map_err(|error| GuestError::System(format!("make terminal of {}", label(id, exec_id)), error))?;
        Ok((Streams::Terminal(console, unplugged), stdio::nulls().map_err(stdio_error)?))
    }
}

impl Streams {
    /// The socket that libcontainer has to send a terminal to.
    pub fn console(&self) -> Option<PathBuf> {
        match self {
            Self::Pipes(_) => None,
            Self::Terminal(console, _) => Some(console.path.clone()),
        }
    }

    /// Completes the streams, once the process is there.
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn finish(self, id: &str, exec_id: &str) -> Result<Io, GuestError> {
        match self {
            Self::Pipes(io) => Ok(io),
            Self::Terminal(console, unplugged) => {
                let master = console.receive();
                let master = master
                    .map_err(|error| GuestError::System(format!("take terminal of {}", label(id, exec_id)), error))?;
                stdio::plug(unplugged, master).map_err(|error| GuestError::Stdio(label(id, exec_id), error))
            }
        }
    }
}
