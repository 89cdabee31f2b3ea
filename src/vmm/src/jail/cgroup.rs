//! How the process comes into the sandbox's cgroups.
//!
//! A process that moves makes the kernel let every fork on the host end and an RCU grace period go by, which takes some
//! 10 ms (`cgroup_threadgroup_rwsem` in `kernel/cgroup/cgroup.c`). One that is born there takes nothing:
//!
//! ```text
//!  process 0 ─ clone3(CLONE_INTO_CGROUP) ─► its twin ─ steps 4 to 8 ─► process 1 = the VMM
//!      waits, and ends as the twin did
//! ```

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::fstatfs;
use rustix::process::{Signal, WaitOptions, getpid, getppid, set_parent_process_death_signal, waitpid};

use super::{JailError, at, exit, fork_into};

/// Brings the process, or a twin in which it returns, into these cgroups.
pub(super) fn join(dirs: &[PathBuf]) -> Result<(), JailError> {
    let failed = |dir: &Path| at("cgroups", format!("join cgroup {}", dir.display()));
    if let [dir] = dirs {
        match be_born_in(dir) {
            // Where a filter around the shim hides clone3 from old libraries.
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {}
            result => return result.map_err(failed(dir)),
        }
    }
    dirs.iter().try_for_each(|dir| fs::write(dir.join("cgroup.procs"), "0").map_err(failed(dir)))
}

/// Returns in the twin. A directory of another kind of hierarchy gives `ENOSYS`, too.
fn be_born_in(dir: &Path) -> io::Result<()> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let dir = File::options().read(true).custom_flags(flags).open(dir)?;
    if fstatfs(&dir)?.f_type != libc::CGROUP2_SUPER_MAGIC {
        return Err(io::Error::from_raw_os_error(libc::ENOSYS));
    }
    let parent = getpid();
    let Some(twin) = fork_into(dir.as_fd())? else {
        // The shim knows the parent only, and may end it at any time.
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if getppid() != Some(parent) {
            exit(1);
        }
        return Ok(());
    };
    let ended = waitpid(Some(twin), WaitOptions::empty());
    exit(ended.ok().flatten().and_then(|(_, status)| status.exit_status()).unwrap_or(1));
}
