//! The first steps of PID 1, before there is a runtime, and the last ones. Plain code, top to bottom.
//!
//! ```text
//!  kernel ─► /agent ── boot ──► serve … ─► reset
//! ```
//!
//! The kernel starts the agent out of a read-only image on a disk, which holds it and mount points. It is executed again for
//! every container and every exec, and the guest has only those of its pages in memory that were ever needed, and once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nacelle_protocol::agent::CONTAINERS_DIR;
use rustix::mount::{MountFlags, mount, mount_remount};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::system::{RebootCommand, reboot, sethostname};
use thiserror::Error;

use crate::cgroup::{self, CgroupError};

/// The agent in the guest's root: [`nacelle_protocol::vm::AGENT_NAME`].
pub const PROGRAM: &str = "/agent";

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const INERT: MountFlags = SAFE.union(MountFlags::NOEXEC);

/// Descriptors a process may have, where its container does not say.
const MAX_FILES: u64 = 1 << 20;

/// Kernel settings of a node that runs containers. Those that a kernel does not have are left out.
const SYSCTLS: &[(&str, &str)] = &[
    // An oops ends the guest, and with that the pod, rather than leaving half a kernel.
    ("kernel/panic_on_oops", "1"),
    ("kernel/pid_max", "4194304"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_user_watches", "524288"),
    ("vm/max_map_count", "262144"),
    ("vm/overcommit_memory", "1"),
];

/// A step that failed.
#[derive(Debug, Error)]
pub enum InitError {
    /// A file system.
    #[error("mount {0} on {1}")]
    Mount(&'static str, PathBuf, #[source] io::Error),
    /// A file or directory.
    #[error("create {0}")]
    Create(PathBuf, #[source] io::Error),
    /// Options of a mount.
    #[error("read options of {0}")]
    Options(&'static str, #[source] std::ffi::NulError),
    /// The cgroups.
    #[error("delegate cgroup controllers")]
    Cgroup(#[source] CgroupError),
    /// The loopback interface.
    #[error("set loopback up")]
    Loopback(#[source] io::Error),
    /// Limits and names.
    #[error("set {0}")]
    Set(&'static str, #[source] io::Error),
}

/// Makes the guest a place for containers.
///
/// # Errors
/// [`InitError`]: the machine is of no use then.
pub fn boot() -> Result<(), InitError> {
    attach("proc", Path::new("/proc"), INERT, "")?;
    attach("tmpfs", Path::new("/run"), SAFE, "mode=0755,nr_inodes=0")?;
    attach("sysfs", Path::new("/sys"), INERT, "")?;
    attach("cgroup2", Path::new(cgroup::ROOT), INERT, "nsdelegate,memory_recursiveprot")?;
    attach_devices()?;
    attach_in_dev("devpts", "pts", MountFlags::NOSUID | MountFlags::NOEXEC, "gid=5,mode=0620,ptmxmode=0666")?;
    // The pod's shared memory, as large as the one that containerd makes for pods.
    attach_in_dev("tmpfs", "shm", INERT, "mode=1777,size=65536k")?;
    attach_in_dev("mqueue", "mqueue", INERT, "")?;
    attach("tmpfs", Path::new("/tmp"), SAFE, "mode=1777")?;
    fs::create_dir_all(CONTAINERS_DIR).map_err(|error| InitError::Create(CONTAINERS_DIR.into(), error))?;

    cgroup::prepare().map_err(InitError::Cgroup)?;
    loopback_up().map_err(InitError::Loopback)?;
    for (name, value) in SYSCTLS {
        // A kernel that has no such setting needs none.
        let _ = fs::write(Path::new("/proc/sys").join(name), value);
    }
    let files = Rlimit { current: Some(MAX_FILES), maximum: Some(MAX_FILES) };
    setrlimit(Resource::Nofile, files).map_err(|error| InitError::Set("limit of open files", error.into()))?;
    sethostname(b"nacelle").map_err(|error| InitError::Set("host name", error.into()))
}

fn attach(fstype: &'static str, target: &Path, flags: MountFlags, options: &str) -> Result<(), InitError> {
    let options = std::ffi::CString::new(options).map_err(|error| InitError::Options(fstype, error))?;
    mount(fstype, target, fstype, flags, options.as_c_str())
        .map_err(|error| InitError::Mount(fstype, target.to_owned(), error.into()))
}

/// A kernel with CONFIG_DEVTMPFS_MOUNT has done it by itself, with no flags, as soon as it had a root.
fn attach_devices() -> Result<(), InitError> {
    let target = Path::new("/dev");
    match attach("devtmpfs", target, MountFlags::NOSUID, "mode=0755") {
        Err(InitError::Mount(_, _, error)) if error.kind() == io::ErrorKind::ResourceBusy => {
            mount_remount(target, MountFlags::NOSUID, c"")
                .map_err(|error| InitError::Mount("devtmpfs", target.to_owned(), error.into()))
        }
        attached => attached,
    }
}

fn attach_in_dev(fstype: &'static str, name: &'static str, flags: MountFlags, options: &str) -> Result<(), InitError> {
    let target = Path::new("/dev").join(name);
    // devtmpfs may have it already.
    let _ = fs::create_dir(&target);
    attach(fstype, &target, flags, options)
}

/// Sets interface 1, which is `lo` in every network namespace, up: RTM_NEWLINK with IFF_UP (rtnetlink(7)).
fn loopback_up() -> io::Result<()> {
    const LENGTH: u32 = 32;
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST_ACK: u16 = 0x1 | 0x4;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(LENGTH as usize);
    // struct nlmsghdr: length, type, flags, sequence, port
    message.extend(LENGTH.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    message.extend(1u32.to_ne_bytes());
    message.extend(0u32.to_ne_bytes());
    // struct ifinfomsg: family, pad, type, index, flags, mask of the flags to change
    message.extend([0; 4]);
    message.extend(1i32.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());

    // No protocol is NETLINK_ROUTE.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    rustix::net::sendto(&socket, &message, SendFlags::empty(), &netlink::SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; 256];
    let (received, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
    // struct nlmsghdr, then struct nlmsgerr, whose first member is minus the error number, or zero.
    let error = answer.get(16..20).filter(|_| received >= 20).and_then(|bytes| bytes.try_into().ok());
    match error.map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.wrapping_neg())),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Ends the guest: kills what is left, makes the disk whole, resets. A guest of libkrun ends by a reset; power-off hangs.
pub fn reset() -> ! {
    // All processes but this one.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(-1), nix::sys::signal::Signal::SIGKILL);
    while matches!(nix::sys::wait::wait(), Ok(_) | Err(nix::errno::Errno::EINTR)) {}
    crate::mount::unmount_all();
    let _ = reboot(RebootCommand::Restart);
    // PID 1 that exits makes the kernel panic, which resets too.
    std::process::exit(1)
}
