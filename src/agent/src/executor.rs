//! The last steps between libcontainer and a container's program, inside the container.
//!
//! ```text
//!  libcontainer: namespaces, mounts, cgroup, user ─► executor, still with all capabilities
//!    program there? ─► (a container: told to start) ─► terminal: owner and size ─► (an exec: the pod's user namespace)
//!      ─► working directory ─► seccomp filter and capabilities ─► execve
//! ```
//!
//! What goes wrong here is reported through the runner's pipe, which closes by itself when execve succeeds.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::Arc;

use libcontainer::capabilities::drop_privileges;
use libcontainer::syscall::Syscall;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_keepcaps;
use nix::unistd::{AccessFlags, Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{Spec, User};
use rustix::termios::{Winsize, tcsetwinsize};
use thiserror::Error;

use crate::console::chain;
use crate::runner::{Line, Reporter};
use crate::spec::Execute;

/// Exit code of a process whose program is not there, as shells have it.
const NOT_FOUND: i32 = 127;
/// Exit code of a process whose program cannot be executed.
const NOT_EXECUTABLE: i32 = 126;

/// Why a program could not be started. The words for a missing program are those that callers look for.
#[derive(Debug, Error)]
enum LaunchError {
    #[error("set up terminal")]
    Terminal(#[source] io::Error),
    #[error("join user namespace of the pod")]
    Users(#[source] io::Error),
    #[error("chdir to cwd ({cwd:?}): {}", words(*.errno))]
    Cwd { cwd: std::path::PathBuf, errno: Errno },
    #[error("install seccomp filter")]
    Seccomp(#[source] libcontainer::seccomp::SeccompError),
    #[error("drop capabilities")]
    Capabilities(#[source] libcontainer::syscall::SyscallError),
    #[error("exec {name:?}: {}", words(*.errno))]
    Exec { name: String, errno: Errno },
    #[error("exec {0:?}: executable file not found in $PATH: no such file or directory")]
    NotInPath(String),
}

impl LaunchError {
    fn code(&self) -> i32 {
        match self {
            Self::NotInPath(_) | Self::Exec { errno: Errno::ENOENT | Errno::ENOTDIR, .. } => NOT_FOUND,
            Self::Exec { .. } | Self::Cwd { .. } => NOT_EXECUTABLE,
            _ => 1,
        }
    }
}

fn words(errno: Errno) -> String {
    errno.desc().to_lowercase()
}

/// Performs [`Execute`].
#[derive(Clone)]
pub struct LastSteps {
    execute: Arc<Execute>,
    users: Option<Arc<File>>,
    reporter: Reporter,
}

impl LastSteps {
    /// Steps that report failure to `reporter`.
    ///
    /// # Errors
    /// What the system says of the user namespace that has to be joined.
    pub fn new(execute: Execute, reporter: Reporter) -> io::Result<Self> {
        let users = execute.users.as_ref().map(File::open).transpose()?.map(Arc::new);
        Ok(Self { execute: Arc::new(execute), users, reporter })
    }

    fn launch(&self, spec: &Spec) -> Result<std::convert::Infallible, LaunchError> {
        let syscall = create_syscall();
        self.terminal().map_err(LaunchError::Terminal)?;
        let user = spec.process().as_ref().map(|process| process.user());
        if let Some((users, user)) = self.users.as_deref().zip(user) {
            join(users, user, syscall.as_ref()).map_err(LaunchError::Users)?;
        }
        self.enter_cwd().map_err(|errno| LaunchError::Cwd { cwd: self.execute.cwd.clone(), errno })?;
        let drop_capabilities =
            || drop_privileges(&self.execute.capabilities, syscall.as_ref()).map_err(LaunchError::Capabilities);
        let filter = || match &self.execute.seccomp {
            Some(seccomp) => libcontainer::seccomp::initialize_seccomp(seccomp).map(drop).map_err(LaunchError::Seccomp),
            None => Ok(()),
        };
        let process = spec.process().as_ref();
        // A filter wants either a process that can gain no privileges, or a privileged one. As late as possible.
        if process.and_then(|process| process.no_new_privileges()) == Some(true) {
            drop_capabilities()?;
            filter()?;
        } else {
            filter()?;
            drop_capabilities()?;
        }
        let args = process.and_then(|process| process.args().clone()).unwrap_or_default();
        execve(&args)
    }

    fn terminal(&self) -> io::Result<()> {
        let Some(terminal) = self.execute.terminal else { return Ok(()) };
        let stdin = std::io::stdin();
        if let Some((rows, columns)) = terminal.size {
            tcsetwinsize(&stdin, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?;
        }
        std::os::unix::fs::fchown(&stdin, Some(terminal.uid), None)
    }

    fn enter_cwd(&self) -> Result<(), Errno> {
        let cwd = &self.execute.cwd;
        match nix::unistd::chdir(cwd.as_path()) {
            Err(Errno::ENOENT) if self.execute.make_cwd => {
                make_directories(cwd).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
                nix::unistd::chdir(cwd.as_path())?;
            }
            entered => entered?,
        }
        // A directory outside of the root shows itself by its name.
        let here = nix::unistd::getcwd()?;
        if here.is_absolute() { Ok(()) } else { Err(Errno::ENOENT) }
    }
}

/// Joins a user namespace, and becomes in it who the process is to be. Whoever joins one has all capabilities there.
fn join(users: &File, user: &User, syscall: &dyn Syscall) -> io::Result<()> {
    let groups: Vec<_> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setns(users, CloneFlags::CLONE_NEWUSER)?;
    // As libcontainer does it: what the program keeps of the capabilities is decided later.
    set_keepcaps(true)?;
    setgroups(&groups)?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    set_keepcaps(false)?;
    libcontainer::capabilities::reset_effective(syscall).map_err(io::Error::other)
}

/// Like `mkdir -p`, and what it makes is root's even though the process has another user by now.
fn make_directories(path: &Path) -> io::Result<()> {
    let missing: Vec<_> = path.ancestors().take_while(|ancestor| !ancestor.exists()).collect();
    for directory in missing.into_iter().rev() {
        std::fs::create_dir(directory)?;
        std::os::unix::fs::chown(directory, Some(0), Some(0))?;
    }
    Ok(())
}

fn execve(args: &[String]) -> Result<std::convert::Infallible, LaunchError> {
    let name = args.first().cloned().unwrap_or_default();
    let c_args = args.iter().map(|arg| CString::new(arg.as_str())).collect::<Result<Vec<_>, _>>();
    let c_env = std::env::vars_os()
        .map(|(key, value)| CString::new([key.into_vec(), value.into_vec()].join(&b'=')))
        .collect::<Result<Vec<_>, _>>();
    let (Ok(c_args), Ok(c_env)) = (c_args, c_env) else {
        return Err(LaunchError::Exec { name, errno: Errno::EINVAL });
    };
    search(&name, &std::env::var("PATH").unwrap_or_default(), |path| {
        let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
        nix::unistd::execve(&path, &c_args, &c_env)
    })
}

/// Tries a program's path or, for a plain name, one path after the other along `path`, as execvp(3) does.
fn search<T>(name: &str, path: &str, try_path: impl Fn(&str) -> Result<T, Errno>) -> Result<T, LaunchError> {
    let failed = |errno| LaunchError::Exec { name: name.to_owned(), errno };
    if name.contains('/') {
        return try_path(name).map_err(failed);
    }
    let mut denied = None;
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        match try_path(&format!("{directory}/{name}")) {
            Ok(found) => return Ok(found),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(errno @ Errno::EACCES) => denied = Some(errno),
            Err(errno) => return Err(failed(errno)),
        }
    }
    Err(denied.map_or_else(|| LaunchError::NotInPath(name.to_owned()), failed))
}

impl Executor for LastSteps {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let Err(error) = self.launch(spec);
        let code = error.code();
        self.reporter.send(&Line::NotExecuted { code, text: chain(&error) });
        std::process::exit(code)
    }

    /// A program that is not there is told when the container is created, as callers expect: `ctr run --rm` and the
    /// kubelet clean up after that, and not after a container that never started.
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec.process().as_ref();
        let args = process.and_then(|process| process.args().as_deref()).unwrap_or_default();
        let env = process.and_then(|process| process.env().as_deref()).unwrap_or_default();
        let path = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or_default();
        let name = args.first().map(String::as_str).unwrap_or_default();
        look_up(name, path, &self.execute.cwd).map_err(|error| {
            self.reporter.send(&Line::NotExecuted { code: error.code(), text: chain(&error) });
            ExecutorValidationError::ArgValidationError(error.to_string())
        })
    }
}

/// Whether [`execve`] will find something to execute. That it cannot be executed may still show only then.
fn look_up(name: &str, path: &str, cwd: &Path) -> Result<(), LaunchError> {
    search(name, path, |path| {
        let file = cwd.join(path);
        match std::fs::metadata(&file) {
            Ok(metadata) if !metadata.is_file() => Err(Errno::EACCES),
            Ok(_) => nix::unistd::access(&file, AccessFlags::X_OK),
            Err(error) => Err(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)),
        }
    })
}
