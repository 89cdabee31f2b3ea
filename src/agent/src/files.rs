//! The files of a container that runs, for the host: a FUSE server without a kernel at its end.
//!
//! ```text
//!  host ── messages ──► stream ──► stdin ┐
//!                                        ├ agent as "nacelle-files", in the container's root
//!  host ◄── answers ─── stream ◄─ stdout ┘
//! ```
//!
//! A message is what the host's kernel wrote to its FUSE device (fuse(4), `linux/fuse.h`), so it begins with its length. The
//! process stands in the root of the container's main process and sees its mounts; it acts with the ids of whoever asks. It
//! belongs to no container's cgroup, so nobody's limits and lists have it. It ends with its input, which the container holds.

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader};
use nacelle_protocol::agent::{FILES_HEADER, FILES_MESSAGE};
use nacelle_protocol::stream::stream_uri;

use crate::guest::{Guest, GuestError, label};
use crate::stdio::{self, Names};

/// `argv[0]` of the agent that serves files.
pub const NAME: &str = "nacelle-files";

impl Guest {
    /// Begins to serve a container's files; returns when both streams are dialled.
    ///
    /// # Errors
    /// [`GuestError::State`] for a container that does not run.
    pub async fn files(&self, id: &str, input: u64, output: u64) -> Result<(), GuestError> {
        let names = Names { stdin: stream_uri(input), stdout: stream_uri(output), ..Names::default() };
        let opened = stdio::open(&self.dial, &names, (0, 0)).await;
        let (io, [stdin, stdout, stderr]) = opened.map_err(|source| GuestError::Stdio(label(id, ""), source))?;
        self.with(id, |container| {
            if !container.is_running() {
                return Err(GuestError::State(format!("serve files of {}", label(id, "")), "it does not run"));
            }
            let mut server = Command::new(&self.program);
            server.arg0(NAME).env_clear().stdin(stdin).stdout(stdout).stderr(Stdio::from(stderr));
            // Nobody has waited for the container's process yet, so the id is still its own.
            server.current_dir(format!("/proc/{}/root", container.init.pid));
            // The reaper waits for it.
            let started = server.spawn();
            started.map_err(|error| GuestError::System(format!("serve files of {}", label(id, "")), error))?;
            container.files = Some(io);
            Ok(())
        })
    }
}

/// The server's whole life.
pub fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever asks gets no answer, and the host says so.
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve() -> io::Result<()> {
    // The container's processes and whoever asks change the same files: nothing may be remembered, on either side.
    let config = Config {
        root_dir: ".".into(),
        attr_timeout: Duration::ZERO,
        entry_timeout: Duration::ZERO,
        cache_policy: CachePolicy::Never,
        xattr: true,
        ..Config::default()
    };
    let server = Server::new(PassthroughFs::<()>::new(config)?);
    let (mut input, output) = (io::stdin().lock(), io::stdout());
    let (mut message, mut answer) = (vec![0; FILES_MESSAGE], vec![0; FILES_MESSAGE]);
    loop {
        let Some(length) = next(&mut input, &mut message)? else { return Ok(()) };
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, format!("{error}"));
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(&mut message[..length])).map_err(invalid)?;
        let writer = FuseDevWriter::new(output.as_raw_fd(), &mut answer).map_err(invalid)?;
        // A message that is refused has its answer. Another may lack one: the host knows how to go on without.
        let _ = server.handle_message(reader, writer.into(), None, None);
    }
}

/// Reads a message and returns its length; `None` at the end.
fn next(input: &mut impl Read, message: &mut [u8]) -> io::Result<Option<usize>> {
    let (head, _) = message.split_at_mut(4);
    match input.read_exact(head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let length = u32::from_ne_bytes([message[0], message[1], message[2], message[3]]) as usize;
    if !(FILES_HEADER..=message.len()).contains(&length) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    input.read_exact(&mut message[4..length])?;
    Ok(Some(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_at_their_length() {
        let mut first = 44u32.to_ne_bytes().to_vec();
        first.resize(44, 7);
        let mut bytes = first.repeat(2);
        let mut message = vec![0; FILES_MESSAGE];
        let mut input = bytes.as_slice();
        for _ in 0..2 {
            assert_eq!(next(&mut input, &mut message).expect("message"), Some(44));
            assert_eq!(message[..44], first);
        }
        assert_eq!(next(&mut input, &mut message).expect("end"), None);
        for wrong in [0, 39, FILES_MESSAGE as u32 + 1, u32::MAX] {
            bytes[..4].copy_from_slice(&wrong.to_ne_bytes());
            assert!(next(&mut bytes.as_slice(), &mut message).is_err(), "{wrong}");
        }
        bytes[..4].copy_from_slice(&44u32.to_ne_bytes());
        assert!(next(&mut &bytes[..43], &mut message).is_err(), "cut short");
    }
}
