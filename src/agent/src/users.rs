//! The user namespace that containers of a pod share when the pod has one (`hostUsers: false`).
//!
//! Its ids are those that the container runtime of a host would give it: root of the pod is nobody to the guest's own kernel,
//! and to the agent. Layers hold ids from 0 on, so they are mounted with the namespace's (mount_setattr(2),
//! MOUNT_ATTR_IDMAP); volumes come with them already.
//!
//! ```text
//!  agent ── "nacelle-pod-users": unshare, a byte, wait for the end of its input, exit
//!    └── uid_map, gid_map, holds /proc/<pid>/ns/user
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use libcontainer::syscall::linux::MountAttr;
use libcontainer::syscall::syscall::create_syscall;
use nacelle_protocol::agent::Users;
use nix::sched::{CloneFlags, unshare};

/// `argv[0]` of the agent that makes the namespace.
pub const MAKER: &str = "nacelle-pod-users";

/// The namespace, held.
#[derive(Debug)]
pub struct PodUsers {
    /// Its ids.
    pub users: Users,
    namespace: File,
}

impl PodUsers {
    /// Makes it. `program` is the agent. Blocks.
    ///
    /// # Errors
    /// What the system says.
    pub fn make(program: &Path, users: Users) -> io::Result<Self> {
        let mut maker = Command::new(program);
        maker.arg0(MAKER).env_clear().current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped());
        // The reaper waits for it.
        let mut child = maker.spawn()?;
        let (Some(stdin), Some(mut stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("the process that makes it has no pipes"));
        };
        stdout.read_exact(&mut [0])?;
        let proc = PathBuf::from(format!("/proc/{}", child.id()));
        for map in ["uid_map", "gid_map"] {
            fs::write(proc.join(map), format!("0 {} {}", users.first, users.count))?;
        }
        let namespace = File::open(proc.join("ns/user"))?;
        drop(stdin);
        Ok(Self { users, namespace })
    }

    /// Where other processes of the guest find it, while this value lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd()).into()
    }

    /// The namespace.
    pub fn file(&self) -> &File {
        &self.namespace
    }

    /// An id of the namespace, as the guest has it.
    pub fn outside(&self, id: u32) -> u32 {
        // Whoever has no id here is nobody.
        if id < self.users.count { self.users.first + id } else { 65_534 }
    }
}

/// The maker's whole life.
pub fn maker() -> ExitCode {
    let made = || -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWUSER)?;
        io::stdout().write_all(b"1")?;
        io::stdout().flush()?;
        io::stdin().read_to_end(&mut Vec::new()).map(drop)
    };
    match made() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::say!("make user namespace of the pod: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Has the ids of a mount that nobody sees yet be those of user namespace `users`.
///
/// # Errors
/// What the system says.
pub fn map(mount: BorrowedFd<'_>, users: &File) -> io::Result<()> {
    let attributes = MountAttr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::from(users.as_raw_fd().unsigned_abs()),
    };
    let empty_path = rustix::fs::AtFlags::EMPTY_PATH.bits();
    let set = create_syscall().mount_setattr(mount, Path::new(""), empty_path, &attributes, size_of::<MountAttr>());
    set.map_err(io::Error::other)
}
