//! The `start` action: find or make the sandbox's server, say where it is, and leave.
//!
//! ```text
//!  stdin ─► Start ─► role of the container ─┬─ of a sandbox whose shim is up: its address, and no new process
//!                                           └─ else: bind ─► this program again, `serve`, the socket as its stdin
//! ```
//!
//! The socket listens before the server runs, so nobody has to wait for it, and containerd's first request finds it.
//! containerd takes stdout and stderr together for the reply: nothing else may be written to either.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nacelle_protocol::processor;
use nacelle_protocol::vm::Network;
use rustix::fs::Mode;
use thiserror::Error;

use crate::args::{Args, ArgsError};
use crate::bootstrap::{self, BootstrapError, MAX_INPUT, Start, TTRPC_ENV};
use crate::bundle::{self, BundleError, Role};
use crate::config::{BODY_ENV, ConfigError, KVM, Node, PATH_ENV};

/// File in every bundle that tells a containerd that restarts where the shim is.
const ADDRESS: &str = "address";

/// Why there is no shim.
#[derive(Debug, Error)]
pub enum StartError {
    /// The command line is not in order.
    #[error(transparent)]
    Args(#[from] ArgsError),
    /// What came on stdin is not in order.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// The bundle is not in order.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The configuration is not in order, or something that it names is missing.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The sandbox that the container belongs to is not there.
    #[error("join sandbox {sandbox}: its shim is gone")]
    NoSandbox {
        /// The sandbox.
        sandbox: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file, a socket or a process.
    #[error("{what} {path}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Io { what, path: path.to_owned(), source }
}

/// Reads what containerd has piped in.
///
/// # Errors
/// [`StartError::Io`].
pub fn read_stdin() -> Result<Vec<u8>, StartError> {
    let mut input = Vec::new();
    io::stdin().take(MAX_INPUT).read_to_end(&mut input).map_err(io_error("read", Path::new("stdin")))?;
    Ok(input)
}

/// Runs the action in the bundle, the current directory; returns the reply.
///
/// # Errors
/// [`StartError`].
pub fn run(args: &Args) -> Result<Vec<u8>, StartError> {
    let (_, id) = args.ids()?;
    let start = bootstrap::parse(&read_stdin()?, args, |name| std::env::var(name).ok())?;
    let role = bundle::role(Path::new("."))?;
    let group = match &role {
        Role::Container(sandbox) => sandbox.as_str(),
        Role::Single | Role::Sandbox => id.as_str(),
    };
    let path = bootstrap::socket_path(&start, &args.namespace, group)?;
    let address = format!("unix://{}", path.display());
    if let Role::Container(sandbox) = &role {
        UnixStream::connect(&path).map_err(|source| StartError::NoSandbox { sandbox: sandbox.to_string(), source })?;
    } else {
        let exe = std::env::current_exe().map_err(io_error("find", Path::new("/proc/self/exe")))?;
        // Found out here, what is missing is told to the one who asked; the server has nobody to tell.
        let node = Node { exe: &exe, kvm: Path::new(KVM), faults: Path::new(processor::FAULTS) };
        start.origin.load()?.programs(node, &Network::New)?;
        if let Some(listener) = listen(&path)? {
            spawn_server(&exe, args, &start, listener).inspect_err(|_| drop(fs::remove_file(&path)))?;
        }
    }
    write_address(&address)?;
    Ok(bootstrap::encode(start.reply, &address)?)
}

/// Listens at `path`; `None` where a shim does already.
fn listen(path: &Path) -> Result<Option<UnixListener>, StartError> {
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error("create", dir))?;
    }
    // The socket is root's alone from its first moment on.
    rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            fs::remove_file(path).map_err(io_error("remove", path))?;
            UnixListener::bind(path)
        }
        other => other,
    };
    rustix::process::umask(Mode::from_raw_mode(0o022));
    listener.map(Some).map_err(io_error("listen at", path))
}

fn spawn_server(exe: &Path, args: &Args, start: &Start, listener: UnixListener) -> Result<(), StartError> {
    let mut command = Command::new(exe);
    command.args(["-namespace", &args.namespace, "-id", &args.id, "-address", &start.grpc_address]);
    if start.debug {
        command.arg("-debug");
    }
    command.arg("serve").env(TTRPC_ENV, &start.ttrpc_address);
    if let Some(path) = &start.origin.path {
        command.env(PATH_ENV, path);
    } else if let Some(body) = &start.origin.body {
        command.env_remove(PATH_ENV).env(BODY_ENV, body);
    }
    command.stdin(Stdio::from(OwnedFd::from(listener))).stdout(Stdio::null()).stderr(Stdio::null());
    // Not waited for: it outlives this process.
    command.spawn().map(drop).map_err(io_error("start", exe))
}

fn write_address(address: &str) -> Result<(), StartError> {
    let new = Path::new(".address");
    fs::write(new, address).map_err(io_error("write", new))?;
    fs::rename(new, ADDRESS).map_err(io_error("rename to", Path::new(ADDRESS)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_reused_or_replaced() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("s/socket");
        let first = listen(&path).expect("listen").expect("new");
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).expect("stat").permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().expect("parent"))), (0o600, 0o700));
        assert!(listen(&path).expect("listen").is_none(), "somebody is there");
        drop(first);
        assert!(listen(&path).expect("listen").is_some(), "nobody is there any more");
    }
}
