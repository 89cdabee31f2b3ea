//! What confines the VMM: a numbered list, executed from top to bottom by the process itself, which fails closed.
//!
//! libkrun's virtiofs hands the guest's file names to the kernel unchecked, and its devices are a large surface. So the
//! VMM and the guest count as one principal, and what counts is what this process can reach:
//!
//! ```text
//!  process 0 (root)                          process 1 (PID 1 of its namespace) = the VMM
//!   1 limits                                  9 /proc, pivot_root, nothing of the host is mounted any more
//!   2 descriptors 0 to 6, nothing else       10 into the user namespace, ids 0, capabilities dropped
//!   3 cgroups: a twin is born there          11 no new privileges, no dumps, own session, clean environment
//!   4 user namespace of the sandbox          12 Landlock
//!   5 network namespace                      13 seccomp
//!   6 mount, IPC, UTS, cgroup namespaces     14 lifeline: dies with the shim
//!   7 the new root: a read-only tmpfs with exactly the plan's entries
//!   8 PID namespace, fork ───────────────────►
//!     report process 1, exit                 the network devices are read between 11 and 12
//! ```
//!
//! The namespaces belong to the host's user namespace, so the capabilities that step 10 may leave, all of them about
//! files, act on nothing but files whose ids are mapped into the sandbox's range.
//!
//! Invariant: there is one thread until step 14. [`enter`] checks it, and [`lock`] starts none before, so that every
//! thread has what the first one has.
#![expect(unsafe_code, reason = "fork, descriptors by number, mount_setattr and the environment have no safe form")]

use std::fs::{self, File};
use std::io::{self, Read};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nacelle_protocol::vm::{CONFIG_FD, CONSOLE_FD, Jail, LIFELINE_FD, Network, REPORT_FD, Report};
use rustix::fs::FileType;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{DumpableBehavior, Pid, Resource, Rlimit, WaitOptions, chdir, pivot_root, waitpid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, LinkNameSpaceType, Uid, UnshareFlags, move_into_link_name_space,
};
use thiserror::Error;

use crate::plan::{Ids, Plan, WORKING_DIRECTORY};
use crate::report;

mod cgroup;
mod graft;
mod landlock;
mod mountinfo;
mod root;
mod seccomp;
mod step;

use graft::{Graft, Source};
pub use step::Step;
#[cfg(debug_assertions)]
pub use step::leave_out;

/// Threads and processes of a sandbox's VMM, by far more than libkrun starts for 255 CPUs.
const MAX_THREADS: u64 = 1024;

/// What root of the guest needs to be root over the files of a share. The host's files are out of their reach.
const FILE_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID);

/// A step of the jail that failed. The process must exit: it is half in.
#[derive(Debug, Error)]
#[error("{action}")]
pub struct JailError {
    /// The step, as it is named in [`Report::Failed`].
    pub stage: &'static str,
    action: String,
    #[source]
    source: io::Error,
}

fn at<E: Into<io::Error>>(stage: &'static str, action: impl Into<String>) -> impl FnOnce(E) -> JailError {
    move |error| JailError { stage, action: action.into(), source: error.into() }
}

/// The descriptors that the shim gave, see [`nacelle_protocol::vm`].
#[derive(Debug)]
pub struct Descriptors {
    /// The configuration.
    pub config: File,
    /// The report pipe.
    pub report: File,
    /// The lifeline.
    pub lifeline: File,
    /// The guest's console. It has to stay open: libkrun opens it by number.
    pub console: File,
}

impl Descriptors {
    /// Takes the inherited descriptors. To be called once, first of all.
    ///
    /// # Errors
    /// The number of the first one that is not open.
    pub fn inherited() -> Result<Self, i32> {
        Ok(Self {
            config: inherited(CONFIG_FD)?,
            report: inherited(REPORT_FD)?,
            lifeline: inherited(LIFELINE_FD)?,
            console: inherited(CONSOLE_FD)?,
        })
    }
}

fn inherited(number: i32) -> Result<File, i32> {
    // SAFETY: F_GETFD takes no argument and changes nothing, whatever the number is.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(number);
    }
    // SAFETY: the descriptor is open, and it is nobody else's: `main` calls this before it opens anything.
    Ok(unsafe { File::from_raw_fd(number) })
}

/// Closes the jail around the calling process, steps 1 to 11. It returns in another process, PID 1 of its namespace; the
/// one that called reports that process and exits with status 0. [`lock`] has to follow.
///
/// # Errors
/// [`JailError`] with the step that failed, from either process.
pub fn enter(plan: &Plan, console: &File) -> Result<(), JailError> {
    let jail = &plan.jail;
    one_thread()?;

    // 1. Limits: descriptors for virtiofs, no core dump with the guest's memory, no fork bomb.
    if Step::Limits.taken() {
        limit(Resource::Nofile, jail.max_files, "open files")?;
        limit(Resource::Core, 0, "core size")?;
        limit(Resource::Nproc, MAX_THREADS, "threads")?;
    }

    // 2. Descriptors: what the shim forgot to close is closed; the console becomes the sandbox's, because libkrun
    //    opens it anew through /proc.
    if Step::Descriptors.taken() {
        // SAFETY: the Rust objects that exist own descriptors up to CONSOLE_FD only (see `Descriptors::inherited`).
        check(unsafe { libc::syscall(libc::SYS_close_range, CONSOLE_FD + 1, u32::MAX, 0) })
            .map_err(at("descriptors", "close inherited descriptors"))?;
    }
    rustix::fs::fchown(console, Some(Uid::from_raw(jail.uid_base)), Some(Gid::from_raw(jail.uid_base)))
        .map_err(at("descriptors", "change owner of the console"))?;

    // 3. Cgroups, before the cgroup namespace: what is joined becomes its root.
    if Step::Cgroups.taken() {
        cgroup::join(&jail.cgroups)?;
    }

    // 4. The user namespace, held by a descriptor: entered last, but needed now to map the ids of mounts.
    let users = user_namespace(&extents(jail))?;
    let pods = jail.pod_root.map(|_| user_namespace(&[pod_extent(jail.uid_base, jail.uid_count)])).transpose()?;

    // 5. and 6. Namespaces. What the host mounts below a share later must still arrive, and nothing may leave: slave.
    let mut flags = UnshareFlags::NEWNS;
    if Step::Namespaces.taken() {
        flags |= UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
    }
    match &jail.network {
        _ if !Step::NetworkNamespace.taken() => {}
        Network::Join(path) => {
            let stage = at("network namespace", format!("join network namespace {}", path.display()));
            let netns = File::open(path).map_err(at("network namespace", format!("open {}", path.display())))?;
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).map_err(stage)?;
        }
        Network::New => flags |= UnshareFlags::NEWNET,
        Network::Host => {}
    }
    unshare(flags).map_err(at("namespaces", "unshare namespaces"))?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(at("namespaces", "make mounts slaves of the host's"))?;

    // 7. The root.
    root::assemble(plan, users.as_fd(), pods.as_ref().unwrap_or(&users).as_fd())?;
    drop(pods);

    // 8. The PID namespace holds for children only. The child waits until it has been reported, so that the shim reads
    //    its process id before anything that it says itself.
    if Step::PidNamespace.taken() {
        unshare(UnshareFlags::NEWPID).map_err(at("namespaces", "unshare PID namespace"))?;
    }
    let (reported, report) = rustix::pipe::pipe().map_err(at("fork", "make pipe"))?;
    if let Some(child) = fork().map_err(at("fork", "fork the VMM"))? {
        let pid = child.as_raw_nonzero().get().unsigned_abs();
        report::send(&Report::Started { pid });
        exit(0);
    }
    drop(report);
    // End of file is all that comes; if the parent died instead, the lifeline will tell.
    let _ = File::from(reported).read(&mut [0]);

    // 9. /proc of our own (libkrun works through /proc/self/fd), and the new root instead of the host's.
    close_root(&jail.root)?;

    // 10. The sandbox's ids, and no capability but those over files, which act in the user namespace alone.
    drop_privileges(users.as_fd(), plan.owns_files)?;
    drop(users);

    // 11. The process.
    confine_process(&plan.sandbox)
}

/// Steps 12 to 14: takes away what was still needed to get ready.
///
/// # Errors
/// [`JailError`] with the step that failed.
pub fn lock(plan: &Plan, lifeline: File) -> Result<(), JailError> {
    // 12. Landlock: what may be done to the files that are left.
    landlock::restrict(plan)?;

    // 13. seccomp, last of what confines: the steps above need calls that nothing below needs.
    report_refused_calls()?;
    seccomp::install(plan.jail.seccomp, &plan.machine)?;

    // 14. The lifeline. Its thread inherits all of the above.
    if Step::Lifeline.taken() {
        std::thread::Builder::new()
            .name("lifeline".into())
            .stack_size(64 << 10)
            .spawn(move || watch(lifeline))
            .map_err(at("lifeline", "start thread"))?;
    }
    Ok(())
}

/// A volume that comes when the sandbox runs already.
#[derive(Debug)]
pub struct Volume<'a> {
    /// File or directory of the host.
    pub source: &'a Path,
    /// Its place below a share: a file or a directory, as the source is.
    pub target: &'a Path,
    /// With the mounts below.
    pub recursive: bool,
    /// Refuse every change.
    pub read_only: bool,
    /// Its files' ids are those of the pod's user namespace, if there is one.
    pub mapped: bool,
}

/// Mounts volumes for the sandbox whose VMM is process `vmm`, in the mount namespace of the caller, with the ids of their
/// files mapped as those of a share are. From there they propagate into the jail, which cannot map ids any more. In order; the
/// first that fails ends it.
///
/// # Errors
/// [`JailError`] with the step that failed. A file system that cannot map ids is reported as [`Report::Degraded`].
pub fn bind(vmm: u32, volumes: &[Volume<'_>]) -> Result<(), JailError> {
    if volumes.is_empty() {
        return Ok(());
    }
    let path = format!("/proc/{vmm}/ns/user");
    let users = OwnedFd::from(File::open(&path).map_err(at("user namespace", format!("open {path}")))?);
    let pods = if volumes.iter().any(|volume| volume.mapped) { pod_users(vmm)? } else { None };
    for volume in volumes {
        let users = pods.as_ref().filter(|_| volume.mapped).unwrap_or(&users);
        let source = Source::open(volume.source)?;
        let graft = Graft { users: users.as_fd(), range: 0..0, ids: Ids::Mapped, read_only: volume.read_only };
        if volume.recursive && source.file_type == FileType::Directory {
            graft.all(&source, volume.target)?;
        } else {
            graft.one(&source, volume.target)?;
        }
    }
    Ok(())
}

/// Tries to map ids on the mount of a directory, and leaves nothing behind.
///
/// # Errors
/// [`JailError`] with the step that failed. A file system that cannot map ids is reported as [`Report::Degraded`].
pub fn try_map(directory: &Path) -> Result<(), JailError> {
    // Any range but the host's own will do.
    const IDS: u32 = 65_536;
    let users = user_namespace(&[[0, IDS, IDS]])?;
    let source = Source::open(directory)?;
    Graft { users: users.as_fd(), range: 0..0, ids: Ids::Mapped, read_only: true }.try_one(&source)
}

/// Leaves the process at once: no destructors, no handlers, whatever other threads hold.
pub fn exit(status: i32) -> ! {
    // SAFETY: _exit ends the process; there is nothing that it could leave undone that the kernel does not do.
    unsafe { libc::_exit(status) }
}

fn one_thread() -> Result<(), JailError> {
    let stage = "threads";
    let threads = fs::read_dir("/proc/self/task").map_err(at(stage, "count threads"))?.count();
    if threads == 1 {
        return Ok(());
    }
    Err(at(stage, format!("enter the jail with {threads} threads"))(io::Error::from(io::ErrorKind::Unsupported)))
}

fn limit(resource: Resource, value: u64, name: &str) -> Result<(), JailError> {
    rustix::process::setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })
        .map_err(at("limits", format!("limit {name} to {value}")))
}

/// As in user_namespaces(7): first id inside, first id outside, how many.
type Extent = [u32; 3];

/// The sandbox's ids.
///
/// ```text
///  inside    0 ──────────────────── count      where the pod has a user namespace:   0   pod_root ──────────────
///  outside   base ───────── base + count                                          base   base + 1 ─ base + count
/// ```
fn extents(jail: &Jail) -> Vec<Extent> {
    let (base, count) = (jail.uid_base, jail.uid_count);
    match jail.pod_root {
        None => vec![[0, base, count]],
        Some(root) => vec![[0, base, 1], [root, base + 1, count - 1]],
    }
}

/// Ids of a pod with a user namespace, as its volumes' files have them.
fn pod_extent(base: u32, count: u32) -> Extent {
    [0, base + 1, count - 1]
}

/// The same for a VMM that runs, if its pod has a user namespace. The map is the kernel's word.
fn pod_users(vmm: u32) -> Result<Option<OwnedFd>, JailError> {
    let path = format!("/proc/{vmm}/uid_map");
    let map = fs::read_to_string(&path).map_err(at("user namespace", format!("read {path}")))?;
    let extents: Vec<Vec<u32>> =
        map.lines().map(|line| line.split_whitespace().filter_map(|word| word.parse().ok()).collect()).collect();
    match extents.as_slice() {
        [_, second] if second.len() == 3 => user_namespace(&[[0, second[1], second[2]]]).map(Some),
        _ => Ok(None),
    }
}

/// Makes a user namespace with these ids, without entering it.
fn user_namespace(extents: &[Extent]) -> Result<OwnedFd, JailError> {
    let stage = "user namespace";
    let (hold, release) = rustix::pipe::pipe().map_err(at(stage, "make pipe"))?;
    let (ready, made) = rustix::pipe::pipe().map_err(at(stage, "make pipe"))?;
    // A namespace lives while a process or a descriptor is in it: a child holds it until there is a descriptor.
    let Some(child) = fork().map_err(at(stage, "fork its first process"))? else {
        drop((release, ready));
        if unshare(UnshareFlags::NEWUSER).is_ok() && rustix::io::write(&made, b"1").is_ok() {
            let _ = rustix::io::read(&hold, &mut [0]);
        }
        exit(0)
    };
    drop((hold, made));
    let result = (|| {
        if rustix::io::read(&ready, &mut [0; 1]).map_err(at(stage, "wait for its first process"))? != 1 {
            // The limit of namespaces, or a policy of the host's, is what may refuse root.
            return Err(at(stage, "unshare user namespace")(io::Error::from_raw_os_error(libc::EPERM)));
        }
        let proc = format!("/proc/{}", child.as_raw_nonzero());
        for map in ["uid_map", "gid_map"] {
            let lines: Vec<_> =
                extents.iter().map(|[inside, outside, count]| format!("{inside} {outside} {count}")).collect();
            // In one call, as it is possible once only.
            fs::write(format!("{proc}/{map}"), lines.join("\n"))
                .map_err(at(stage, format!("map ids {}", lines.join(", "))))?;
        }
        File::open(format!("{proc}/ns/user")).map_err(at(stage, "open user namespace"))
    })();
    drop(release);
    waitpid(Some(child), WaitOptions::empty()).map_err(at(stage, "wait for its first process to end"))?;
    result.map(OwnedFd::from)
}

fn close_root(new: &Path) -> Result<(), JailError> {
    let proc = new.join("proc");
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    mount("proc", &proc, "proc", quiet, Some(c"subset=pid")).map_err(at("proc", "mount proc"))?;
    let pivot = |action| at("pivot root", action);
    chdir(new).map_err(pivot("change into the new root"))?;
    // The new root on top of the old one in the same place: nobody needs a directory for the old one.
    pivot_root(".", ".").map_err(pivot("pivot root"))?;
    if Step::Detach.taken() {
        unmount(".", UnmountFlags::DETACH).map_err(pivot("detach the host's root"))?;
    }
    chdir(WORKING_DIRECTORY).map_err(pivot("change into the working directory"))
}

fn drop_privileges(users: BorrowedFd<'_>, owns_files: bool) -> Result<(), JailError> {
    let ids = |action| at("credentials", action);
    if Step::UserNamespace.taken() {
        move_into_link_name_space(users, Some(LinkNameSpaceType::User)).map_err(ids("join user namespace"))?;
    }
    rustix::thread::set_thread_groups(&[]).map_err(ids("drop supplementary groups"))?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).map_err(ids("set group id"))?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).map_err(ids("set user id"))?;

    if !Step::Capabilities.taken() {
        return Ok(());
    }
    let caps = |action| at("capabilities", action);
    for bit in 0..u64::BITS {
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // Behind the last capability that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(caps("drop bounding set")(error)),
        }
    }
    rustix::thread::clear_ambient_capability_set().map_err(caps("drop ambient capabilities"))?;
    let kept = if owns_files { FILE_CAPABILITIES } else { CapabilitySet::empty() };
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(caps("drop capabilities"))
}

fn confine_process(sandbox: &str) -> Result<(), JailError> {
    let process = |action| at("process", action);
    if Step::NoNewPrivileges.taken() {
        rustix::thread::set_no_new_privs(true).map_err(process("set no_new_privs"))?;
    }
    // So it is already where the host's fs.suid_dumpable is 0, because the ids have changed. It can be set otherwise.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(process("forbid dumps"))?;
    if Step::Session.taken() {
        rustix::process::setsid().map_err(process("start session"))?;
    }
    if Step::Environment.taken() {
        scrub(sandbox);
    }
    Ok(())
}

/// Empties the environment, and settles what libkrun and the C library would read from it.
fn scrub(sandbox: &str) {
    for (name, _) in std::env::vars_os() {
        // SAFETY: there is one thread, so nobody reads the environment meanwhile (`enter` keeps that invariant).
        unsafe { std::env::remove_var(name) };
    }
    // SAFETY: as above. libkrun names the process after this variable.
    unsafe { std::env::set_var("HOSTNAME", sandbox) };
    // SAFETY: mallopt sets a number inside the allocator. An arena per thread would cost 64 MiB of address space and
    // some memory for each of libkrun's threads, few of which allocate.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Has SIGSYS, which a refused system call raises in the thread that made it, reported and end the process.
fn report_refused_calls() -> Result<(), JailError> {
    // SAFETY: a sigaction is plain data; all zeroes are an empty mask and no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = refused as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and does only what a handler may do.
    check(unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) }.into())
        .map_err(at("seccomp", "handle SIGSYS"))
}

/// The handler: it neither allocates nor locks, and does not return.
extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    /// `siginfo_t` as the kernel fills it for SIGSYS (asm-generic/siginfo.h, `_sigsys`).
    #[repr(C)]
    struct Info {
        number_errno_code: [libc::c_int; 3],
        instruction: *const libc::c_void,
        call: libc::c_int,
        arch: libc::c_uint,
    }
    // SAFETY: the kernel gives a siginfo of 128 bytes, aligned for pointers, of which this is the head.
    let call = unsafe { (*info.cast::<Info>()).call };
    // SAFETY: with SA_SIGINFO the third argument is the interrupted thread's context.
    let context = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext };
    #[cfg(target_arch = "x86_64")]
    let arguments =
        [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(|register| context.gregs[register as usize] as u64);
    #[cfg(target_arch = "aarch64")]
    let arguments = [context.regs[0], context.regs[1], context.regs[2]];
    report::refused(call, arguments);
    exit(report::EXIT_FAILED)
}

fn watch(mut lifeline: File) -> ! {
    loop {
        match lifeline.read(&mut [0; 16]) {
            Ok(0) => {
                log::error!("the shim is gone");
                exit(0)
            }
            Err(error) if error.kind() != io::ErrorKind::Interrupted => exit(report::EXIT_FAILED),
            Ok(_) | Err(_) => {}
        }
    }
}

fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: the flags of this file never hold FILES, the one that could take descriptors from another thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Forks; `None` in the child.
fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: there is one thread (`enter` checks), so the child's copy of every lock and of the heap is in order.
    let pid = unsafe { libc::fork() };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(Pid::from_raw(pid)) }
}

/// A fork whose child is in that cgroup; `None` in the child.
///
/// The C library knows nothing of the child: it has one thread, whose id the library has wrong. Nothing but a signal to itself
/// needs that id, and the next fork, of the VMM, puts it right.
fn fork_into(cgroup: BorrowedFd<'_>) -> io::Result<Option<Pid>> {
    // From `linux/sched.h`; the constant of the libc crate is too narrow.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    // SAFETY: all zeroes are what stands for "not asked for" in each field.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = CLONE_INTO_CGROUP;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = cgroup.as_raw_fd().unsigned_abs().into();
    // SAFETY: without CLONE_VM the child goes on with a copy of this stack and of the heap, whose locks are in order, as
    // there is one thread (`enter` checks); the kernel reads the arguments, of the size that is told, during the call.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, std::ptr::from_ref(&arguments), size_of::<libc::clone_args>()) };
    match pid {
        ..0 => Err(io::Error::last_os_error()),
        pid => Ok(i32::try_from(pid).ok().and_then(Pid::from_raw)),
    }
}

fn attributes(set: u64) -> libc::mount_attr {
    libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 }
}

/// mount_setattr(2) on the mount whose root is `mount`.
fn set_attributes(mount: BorrowedFd<'_>, attributes: &libc::mount_attr) -> io::Result<()> {
    // SAFETY: the path is a terminated string and the attributes are a struct of the size that is told; the kernel reads
    // both during the call only.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
