//! The PID namespace that containers of a pod share when they are asked to (`shareProcessNamespace`).
//!
//! All other namespaces that a pod shares are the guest's own, which the agent lives in: a machine is one pod. Process ids
//! are not, because PID 1 of those is the agent. So the first container that wants to share them has a namespace made, and
//! in it a first process that does nothing but wait for orphans, as Kubernetes' pause does.
//!
//! ```text
//!  agent ── "nacelle-pod-pids": unshare, start, say its pid, exit ── "pause": PID 1 of the namespace, in an empty root
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Gid, Uid, setresgid, setresuid};

/// `argv[0]` of the agent that makes the namespace.
pub const MAKER: &str = "nacelle-pod-pids";
/// `argv[0]` of the agent that is the namespace's first process; containers of the pod see it.
pub const PAUSE: &str = "pause";

/// The root of the namespace's first process: who shares its process ids may look into its root.
const EMPTY: &str = "/run/nacelle/empty";
/// Neither root nor anybody else's: what Kubernetes' own pause runs as.
const NOBODY: u32 = 65535;

/// Makes a PID namespace with a first process in it; returns that one's pid in the guest. `program` is the agent, `users` the
/// path of the user namespace that it shall belong to, if that is not the guest's. Blocks.
///
/// # Errors
/// What the system says.
pub fn make_pid_namespace(program: &Path, users: Option<&Path>) -> io::Result<u32> {
    fs::create_dir_all(EMPTY)?;
    let mut maker = Command::new(program);
    maker.arg0(MAKER).args(users).env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped());
    // The reaper waits for it.
    let child = maker.spawn()?;
    let mut said = String::new();
    if let Some(mut stdout) = child.stdout {
        stdout.read_to_string(&mut said)?;
    }
    said.trim().parse().map_err(|_| io::Error::other("the process that makes it said no process id"))
}

/// The maker's whole life. `users` is the path of a user namespace.
pub fn maker(users: Option<&Path>) -> ExitCode {
    let made = || -> io::Result<u32> {
        if let Some(users) = users {
            setns(File::open(users)?, CloneFlags::CLONE_NEWUSER)?;
            // Root of that namespace, so that what follows is its own.
            setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0))?;
            setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))?;
        }
        unshare(CloneFlags::CLONE_NEWPID)?;
        let mut pause = Command::new("/proc/self/exe");
        pause.arg0(PAUSE).env_clear().stdin(Stdio::null()).stdout(Stdio::null());
        // Never waited for here: it becomes the agent's child.
        Ok(pause.spawn()?.id())
    };
    match made().and_then(|pid| writeln!(io::stdout(), "{pid}")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::say!("make PID namespace of the pod: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The first process's whole life, which ends with the guest's.
pub fn pause() -> ExitCode {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    let confined = || -> io::Result<()> {
        children.thread_block()?;
        rustix::process::chroot(EMPTY)?;
        rustix::process::chdir("/")?;
        let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        setresgid(gid, gid, gid)?;
        Ok(setresuid(uid, uid, uid)?)
    };
    if let Err(error) = confined() {
        crate::say!("confine the pod's first process: {error}");
        return ExitCode::FAILURE;
    }
    loop {
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
        // It fails for sets that make no sense only.
        if children.wait().is_err() {
            return ExitCode::FAILURE;
        }
    }
}
