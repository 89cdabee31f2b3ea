//! Step 13 of the jail: the system calls that the VMM may make, and why. There are no others.
//!
//! One table for the whole process. libkrun starts its threads itself, most of them when the guest's drivers come up, and
//! has no hook where a filter for one role could be put on; so the filter goes on before libkrun is entered, and every
//! thread inherits it.
//!
//! A call that is not in the table traps: the kernel does not execute it, a handler reports its number and its first
//! arguments to the shim, and the process ends (see [`crate::jail`]). To be killed by the kernel would be one step less,
//! but a parent cannot learn which call it was. The handler is no way around the filter: the table has no call that could
//! replace it, and a SIGSYS that is blocked kills.
//!
//! The table was built from what the end-to-end tests make (strace), and from libkrun's sources for what they do not
//! reach: `krun-devices` 1.19.7 src/virtio/{fs,vsock,console}, `imago` 0.2.6 src/file.rs. aarch64 has only been read.
#![deny(unsafe_code)]

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use nacelle_protocol::vm::Seccomp;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{JailError, at};
use crate::plan::Machine;
use crate::report;

mod ioctl;

const STAGE: &str = "seccomp";

/// When a call is allowed. Arguments are counted from 0; but for [`When::Zero`] the kernel looks at 32 bits of them, too.
enum When {
    Always,
    /// The argument is one of these. The order is that of the comparisons.
    Among(u8, &'static [u64]),
    /// The argument is another.
    Not(u8, u64),
    /// The argument has none of these bits.
    Without(u8, u64),
    /// The argument, with all its 64 bits, is zero.
    Zero(u8),
    /// The argument is this process.
    Own(u8),
    /// Never.
    Never,
    /// The first; the second where the VMM makes the sockets that its guest asks for, in the host's network.
    Lent(&'static When, &'static When),
    /// The first; the second where the machine has network devices.
    Wired(&'static When, &'static When),
    /// Never, but the answer is ENOSYS, as from a kernel that does not know the call, and no trap.
    Unknown,
}

#[cfg_attr(not(test), expect(dead_code, reason = "name and reason are for the reader, and checked by the tests"))]
struct Call {
    name: &'static str,
    number: c_long,
    when: When,
    why: &'static str,
}

macro_rules! calls {
    ($($(#[$gate:meta])? $name:ident $symbol:ident: $when:expr, $why:literal;)*) => {
        &[$($(#[$gate])? Call { name: stringify!($name), number: libc::$symbol, when: $when, why: $why }),*]
    };
}

use When::{Always, Among, Lent, Never, Not, Own, Unknown, Wired, Without, Zero};

/// What pthread_create(3) asks of clone(2): a thread, in the namespaces of its process.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

const LENT: When = Lent(&Never, &Always);

const UNIX: u64 = libc::AF_UNIX as u64;

const EXEC: u64 = libc::PROT_EXEC as u64;

/// Sorted by name.
#[rustfmt::skip]
const CALLS: &[Call] = calls![
    accept SYS_accept: LENT, "a server of the guest's in the host's network";
    bind SYS_bind: LENT, "a server of the guest's in the host's network";
    brk SYS_brk: Always, "heap";
    capget SYS_capget: Always, "virtiofs: look before a write that clears set-id bits";
    capset SYS_capset: Always, "virtiofs: put CAP_FSETID aside meanwhile; it can only drop, and take back what is permitted";
    clock_getres SYS_clock_getres: Always, "time, where the vDSO cannot tell";
    clock_gettime SYS_clock_gettime: Always, "time, where the vDSO cannot tell";
    clock_nanosleep SYS_clock_nanosleep: Always, "vsock: the thread that closes connections late";
    clone SYS_clone: Among(0, &[THREAD]), "threads, and neither processes nor namespaces";
    clone3 SYS_clone3: Unknown, "its flags are in memory, where no filter sees them; the C library falls back to clone";
    close SYS_close: Always, "descriptors";
    connect SYS_connect: Always, "vsock: a dial of the guest's, with a socket of the few kinds below";
    copy_file_range SYS_copy_file_range: Always, "virtiofs: FUSE_COPY_FILE_RANGE";
    dup SYS_dup: Always, "descriptors of the console and of events";
    epoll_create1 SYS_epoll_create1: Always, "event loops";
    epoll_ctl SYS_epoll_ctl: Always, "event loops";
    epoll_pwait SYS_epoll_pwait: Always, "event loops";
    #[cfg(target_arch = "x86_64")] epoll_wait SYS_epoll_wait: Always, "event loops";
    eventfd2 SYS_eventfd2: Always, "interrupts and queue notifications";
    exit SYS_exit: Always, "end of a thread";
    exit_group SYS_exit_group: Always, "end of the guest";
    faccessat SYS_faccessat: Always, "what the machine needs is asked for by name before it starts; virtiofs: FUSE_ACCESS";
    fallocate SYS_fallocate: Always, "disks: discard and write zeroes; virtiofs: FUSE_FALLOCATE";
    fchmod SYS_fchmod: Always, "virtiofs: FUSE_SETATTR on an open file";
    fchmodat SYS_fchmodat: Always, "virtiofs: FUSE_SETATTR";
    fchownat SYS_fchownat: Always, "virtiofs: FUSE_SETATTR";
    fcntl SYS_fcntl: Among(1, FCNTL), "flags of descriptors";
    fdatasync SYS_fdatasync: Always, "virtiofs: FUSE_FSYNC of data";
    fgetxattr SYS_fgetxattr: Always, "virtiofs: FUSE_GETXATTR";
    flistxattr SYS_flistxattr: Always, "virtiofs: FUSE_LISTXATTR";
    fremovexattr SYS_fremovexattr: Always, "virtiofs: FUSE_REMOVEXATTR";
    fsetxattr SYS_fsetxattr: Always, "virtiofs: FUSE_SETXATTR";
    fstat SYS_fstat: Always, "sizes of files";
    fstatfs SYS_fstatfs: Always, "virtiofs: FUSE_STATFS; disks: what the file system can do";
    fsync SYS_fsync: Always, "disks: flush; virtiofs: FUSE_FSYNC";
    ftruncate SYS_ftruncate: Always, "virtiofs: FUSE_SETATTR of a size";
    futex SYS_futex: Always, "locks";
    getdents64 SYS_getdents64: Always, "virtiofs: FUSE_READDIR";
    getegid SYS_getegid: Always, "virtiofs: who is to own a new file";
    geteuid SYS_geteuid: Always, "virtiofs: who is to own a new file";
    getgid SYS_getgid: Always, "virtiofs: who is to own a new file";
    getpeername SYS_getpeername: LENT, "who calls a server of the guest's in the host's network";
    getpid SYS_getpid: Always, "the kick of a virtual CPU";
    getrandom SYS_getrandom: Always, "the guest's entropy device, hash maps";
    getsockname SYS_getsockname: LENT, "the port of a server of the guest's in the host's network";
    gettid SYS_gettid: Always, "threads";
    getuid SYS_getuid: Always, "virtiofs: who is to own a new file";
    ioctl SYS_ioctl: Wired(&Among(1, ioctl::REQUESTS), &Among(1, ioctl::WIRED)), "KVM, whether the console is a terminal; attaching to the taps";
    lgetxattr SYS_lgetxattr: Always, "virtiofs: FUSE_GETXATTR of what cannot be opened";
    linkat SYS_linkat: Always, "virtiofs: FUSE_LINK";
    listen SYS_listen: LENT, "a server of the guest's in the host's network";
    llistxattr SYS_llistxattr: Always, "virtiofs: FUSE_LISTXATTR of what cannot be opened";
    lremovexattr SYS_lremovexattr: Always, "virtiofs: FUSE_REMOVEXATTR of what cannot be opened";
    lseek SYS_lseek: Always, "kernel, disks; virtiofs: FUSE_LSEEK";
    lsetxattr SYS_lsetxattr: Always, "virtiofs: FUSE_SETXATTR of what cannot be opened";
    madvise SYS_madvise: Always, "balloon: pages that the guest has freed; stacks of threads";
    mkdirat SYS_mkdirat: Always, "virtiofs: FUSE_MKDIR";
    mknodat SYS_mknodat: Always, "virtiofs: FUSE_MKNOD of pipes, sockets, whiteouts";
    mmap SYS_mmap: Without(2, EXEC), "guest memory, KVM's run page, stacks, heap; no code";
    mprotect SYS_mprotect: Without(2, EXEC), "stacks and heap; no code";
    mremap SYS_mremap: Always, "heap";
    munmap SYS_munmap: Always, "heap and stacks";
    nanosleep SYS_nanosleep: Always, "the console's thread";
    newfstatat SYS_newfstatat: Always, "sizes of files; virtiofs: FUSE_LOOKUP";
    openat SYS_openat: Always, "disks, devices; virtiofs: FUSE_OPEN";
    #[cfg(target_arch = "x86_64")] poll SYS_poll: Always, "descriptors of the console";
    ppoll SYS_ppoll: Always, "descriptors of the console";
    prctl SYS_prctl: Among(0, &[libc::PR_SET_NAME as u64]), "names of threads";
    pread64 SYS_pread64: Always, "disks, virtiofs";
    preadv SYS_preadv: Always, "disks, virtiofs";
    prlimit64 SYS_prlimit64: Zero(2), "the stack's size; limits are read, not set";
    pwrite64 SYS_pwrite64: Always, "disks, virtiofs";
    pwritev SYS_pwritev: Always, "disks, virtiofs";
    read SYS_read: Always, "events, lifeline, entropy";
    readlinkat SYS_readlinkat: Always, "virtiofs: FUSE_READLINK";
    readv SYS_readv: Always, "console, virtiofs";
    recvfrom SYS_recvfrom: Always, "vsock: bytes of the shim's";
    renameat2 SYS_renameat2: Always, "virtiofs: FUSE_RENAME2";
    restart_syscall SYS_restart_syscall: Always, "a sleep that a freeze of the cgroup has interrupted";
    rseq SYS_rseq: Always, "start of a thread";
    rt_sigaction SYS_rt_sigaction: Not(0, libc::SIGSYS as u64), "the kick of a virtual CPU, the terminal's size; not the handler of this filter";
    rt_sigprocmask SYS_rt_sigprocmask: Always, "start of a thread";
    rt_sigreturn SYS_rt_sigreturn: Always, "return from a kick";
    sched_getaffinity SYS_sched_getaffinity: Always, "start of a thread";
    sched_yield SYS_sched_yield: Always, "queues between threads";
    sendto SYS_sendto: Lent(&Zero(4), &Always), "vsock: bytes of the guest's, to the peer of the connection only";
    set_robust_list SYS_set_robust_list: Always, "start of a thread";
    setresgid SYS_setresgid: Always, "virtiofs: a new file belongs to a group of the guest's; ids of the user namespace only";
    setresuid SYS_setresuid: Always, "virtiofs: a new file belongs to a user of the guest's; ids of the user namespace only";
    setsockopt SYS_setsockopt: LENT, "reuse of an address by a server of the guest's in the host's network";
    shutdown SYS_shutdown: Always, "vsock: end of a connection";
    sigaltstack SYS_sigaltstack: Always, "start of a thread";
    socket SYS_socket: Lent(&Among(0, &[UNIX]), &Among(0, &[UNIX, libc::AF_INET as u64, libc::AF_INET6 as u64])), "vsock: a dial of the guest's";
    statx SYS_statx: Always, "virtiofs: FUSE_LOOKUP and FUSE_GETATTR";
    symlinkat SYS_symlinkat: Always, "virtiofs: FUSE_SYMLINK";
    tgkill SYS_tgkill: Own(0), "the kick of a virtual CPU, abort";
    umask SYS_umask: Always, "virtiofs: FUSE_INIT";
    unlinkat SYS_unlinkat: Always, "virtiofs: FUSE_UNLINK and FUSE_RMDIR";
    utimensat SYS_utimensat: Always, "virtiofs: FUSE_SETATTR of times";
    write SYS_write: Always, "events, log, reports, console";
    writev SYS_writev: Always, "console, log";
];

const FCNTL: &[u64] = &[
    libc::F_GETFL as u64,
    libc::F_SETFL as u64,
    libc::F_GETFD as u64,
    libc::F_SETFD as u64,
    libc::F_DUPFD_CLOEXEC as u64,
];

/// Puts the filter on the calling thread and on those that it will start.
pub fn install(mode: Seccomp, machine: &Machine) -> Result<(), JailError> {
    let otherwise = match mode {
        Seccomp::Enforce => SeccompAction::Trap,
        Seccomp::Log => {
            report::degraded(STAGE, "log what the filter would refuse: the configuration says so");
            SeccompAction::Log
        }
        Seccomp::Off => {
            report::degraded(STAGE, "go on without the filter of system calls: the configuration turns it off");
            return Ok(());
        }
    };
    for program in programs(otherwise, machine.host_network, !machine.nics.is_empty())
        .map_err(|e| at(STAGE, "compile the filter")(io::Error::other(e)))?
    {
        seccompiler::apply_filter(&program).map_err(|e| at(STAGE, "install the filter")(io::Error::other(e)))?;
    }
    Ok(())
}

/// Two programs, because one knows only two answers; the kernel runs both and takes the sterner. The first refuses politely
/// and lets the rest pass, the second is the list.
fn programs(otherwise: SeccompAction, lent: bool, wired: bool) -> Result<[BpfProgram; 2], BackendError> {
    let errno = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let polite = CALLS.iter().filter(|call| matches!(call.when, Unknown)).map(|call| (call.number, Vec::new()));
    let mut list = BTreeMap::new();
    for call in CALLS {
        let when = match call.when {
            Lent(_, when) if lent => when,
            Wired(_, when) if wired => when,
            Lent(when, _) | Wired(when, _) => when,
            ref when => when,
        };
        if !matches!(when, Never) {
            list.insert(call.number, rules(when)?);
        }
    }
    let program = |rules, otherwise, then| SeccompFilter::new(rules, otherwise, then, ARCH)?.try_into();
    Ok([program(polite.collect(), SeccompAction::Allow, errno)?, program(list, otherwise, SeccompAction::Allow)?])
}

#[cfg(target_arch = "x86_64")]
const ARCH: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const ARCH: TargetArch = TargetArch::aarch64;

/// Any of the rules is enough; no rule means always.
fn rules(when: &When) -> Result<Vec<SeccompRule>, BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    let rule = |argument, length, compare, value| {
        SeccompRule::new(vec![SeccompCondition::new(argument, length, compare, value)?])
    };
    Ok(match *when {
        // Those after the first are never asked for.
        Always | Unknown | Never | Lent(..) | Wired(..) => Vec::new(),
        Among(argument, values) => {
            values.iter().map(|&value| rule(argument, Dword, SeccompCmpOp::Eq, value)).collect::<Result<_, _>>()?
        }
        Not(argument, value) => vec![rule(argument, Dword, SeccompCmpOp::Ne, value)?],
        Without(argument, bits) => vec![rule(argument, Dword, SeccompCmpOp::MaskedEq(bits), 0)?],
        Zero(argument) => vec![rule(argument, Qword, SeccompCmpOp::Eq, 0)?],
        Own(argument) => vec![rule(argument, Dword, SeccompCmpOp::Eq, std::process::id().into())?],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_reasoned() {
        assert!(CALLS.is_sorted_by(|a, b| a.name < b.name), "by name, each once");
        for call in CALLS {
            assert!(!call.why.is_empty(), "{}", call.name);
        }
    }

    #[test]
    fn what_breaks_out_is_not_in_it() {
        let never = "accept4 bpf chroot execve execveat finit_module fork fsmount init_module \
            io_uring_setup keyctl kill memfd_create mount mount_setattr move_mount \
            name_to_handle_at open_by_handle_at open_tree perf_event_open pidfd_getfd pidfd_open \
            pivot_root process_vm_writev ptrace seccomp setns umount2 unshare userfaultfd vfork";
        for name in never.split_whitespace() {
            assert!(CALLS.iter().all(|call| call.name != name), "{name}");
        }
    }

    #[test]
    fn it_compiles_and_is_short() {
        let [polite, list] = programs(SeccompAction::Trap, true, true).expect("compile");
        assert!(polite.len() < 16, "{}", polite.len());
        assert!(list.len() < 1024, "{}", list.len());
    }
}
