//! Attacks on the jail, each against one of its steps.
//!
//! A case is run three times. In the whole jail the attack must come to nothing, whichever step stops it. Without the
//! steps that would stop it, too, it must end as the step in question promises. And without that step as well it must end
//! otherwise, which proves that the test can fail and that the step is good for something.
//!
//! The ids in front of the names are those of `docs/spec/jail.md`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nacelle_vmm::jail::Step;
use rustix::process::{WaitOptions, waitpid};

use crate::sandbox::{BASE, Outcome, Sandbox, Setup, cgroup};
use Off::{Landlock, Seccomp, Without};
use Outcome::{Done, Error, Killed, Refused};
use Step::{
    Attributes, Capabilities, Cgroups, Descriptors, Detach, Environment, Lifeline, Limits, Namespaces,
    NetworkNamespace, NoNewPrivileges, PidNamespace, Seal, Session, UserNamespace,
};

/// What is left out of a jail.
#[derive(Clone, Copy, Debug)]
pub enum Off {
    Without(Step),
    Landlock,
    Seccomp,
}

enum Check {
    /// The probe tries this, and it ends so. `@victim`, `@port`, `@name` and `@dir` stand for things of the host's.
    Tries(&'static [&'static str], Outcome),
    /// Seen from outside.
    Holds(fn(&mut Sandbox) -> bool),
}

use Check::{Holds, Tries};

/// One attack: id and name, what would stop it first, the step, what it starts from, how it goes.
pub struct Case(pub &'static str, &'static [Off], Off, fn(&mut Setup), Check);

const USER: Off = Without(UserNamespace);
const CAPS: Off = Without(Capabilities);
const PIDS: Off = Without(PidNamespace);
const NET: Off = Without(NetworkNamespace);

fn plain(_: &mut Setup) {}

/// The share of the layers can be written to, as far as the files' owners let it.
fn writable(setup: &mut Setup) {
    setup.config.shares[1].read_only = false;
}

#[rustfmt::skip]
pub const CASES: &[Case] = &[
    // Files of the host, by every road that leads out of a directory.
    Case("D13 host_file_by_dots", &[Landlock, USER, CAPS], Without(Detach), plain,
        Tries(&["read", "/../etc/shadow"], Error(libc::ENOENT))),
    Case("D13 host_file_by_symlink", &[Landlock, USER, CAPS], Without(Detach), |setup| {
        symlink("/../etc/shadow", setup.path("layers/link")).expect("link");
    }, Tries(&["read", "/share/layers/link"], Error(libc::ENOENT))),
    Case("D13 host_file_by_proc", &[Landlock, USER, CAPS], Without(Detach), plain,
        Tries(&["read", "/proc/self/cwd/../etc/shadow"], Error(libc::ENOENT))),
    Case("D26 host_file_by_descriptor", &[Landlock], Without(Descriptors), plain,
        Tries(&["read", "/proc/self/fd/9"], Error(libc::ENOENT))),
    Case("D12 other_pods_file", &[], USER, |setup| {
        writable(setup);
        let other = setup.path("layers/other");
        fs::write(&other, "of another pod").expect("write");
        fs::set_permissions(&other, fs::Permissions::from_mode(0o600)).expect("mode");
        chown(&other, Some(BASE + 65_536), Some(BASE + 65_536)).expect("owner");
    }, Tries(&["read", "/share/layers/other"], Error(libc::EACCES))),
    Case("D6 hosts_proc", &[], PIDS, plain, Tries(&["stat", "/proc/@victim"], Error(libc::ENOENT))),
    Case("D16 read_only_grant", &[Landlock, USER], Without(Attributes), plain,
        Tries(&["write", "/share/layers/a.erofs", "x"], Error(libc::EROFS))),
    Case("D9 read_only_grant_by_landlock", &[Without(Attributes), USER], Landlock, plain,
        Tries(&["write", "/share/layers/a.erofs", "x"], Error(libc::EACCES))),
    // The program is not in the root, but the kernel knows it.
    Case("D24 own_program", &[], Landlock, plain, Tries(&["open", "/proc/self/exe", "1"], Error(libc::EACCES))),
    Case("D9 listing", &[], Landlock, plain, Tries(&["list", "/"], Error(libc::EACCES))),
    Case("D13 new_entry_in_the_root", &[Landlock, USER], Without(Seal), plain,
        Tries(&["make-directory", "/x"], Error(libc::EROFS))),

    // Devices.
    Case("D6 device_on_a_share", &[], Without(Attributes), |setup| {
        let node = setup.path("layers/null");
        assert!(Command::new("mknod").arg(&node).args(["c", "1", "3"]).status().expect("mknod").success());
        fs::set_permissions(&node, fs::Permissions::from_mode(0o666)).expect("mode");
    }, Tries(&["read", "/share/layers/null"], Error(libc::EACCES))),
    Case("D6 device_made", &[USER], CAPS, writable,
        Tries(&["make-device", "/share/layers/own"], Error(libc::EPERM))),
    Case("D6 device_made_in_dev", &[Landlock, USER, CAPS], Without(Seal), plain,
        Tries(&["make-device", "/dev/own"], Error(libc::EROFS))),

    // Mounts.
    Case("D10 mount", &[], Seccomp, plain, Tries(&["mount", "/share/volumes"], Refused(libc::SYS_mount))),
    Case("D12 mount_without_capabilities", &[Seccomp, Landlock, USER], CAPS, plain,
        Tries(&["mount", "/share/volumes"], Error(libc::EPERM))),
    Case("D12 mount_by_a_users_root", &[Seccomp, Landlock, CAPS], USER, plain,
        Tries(&["mount", "/share/volumes"], Error(libc::EPERM))),
    Case("D9 mount_in_landlock", &[Seccomp, USER, CAPS], Landlock, plain,
        Tries(&["mount", "/share/volumes"], Error(libc::EPERM))),

    // Processes.
    Case("D10 ptrace", &[], Seccomp, plain, Tries(&["trace", "@victim"], Refused(libc::SYS_ptrace))),
    Case("D6 ptrace_across_the_namespace", &[Seccomp, Landlock, USER, CAPS], PIDS, plain,
        Tries(&["trace", "@victim"], Error(libc::ESRCH))),
    Case("D9 ptrace_across_the_domain", &[Seccomp, PIDS, USER, CAPS], Landlock, plain,
        Tries(&["trace", "@victim"], Error(libc::EPERM))),
    Case("D10 signal", &[], Seccomp, plain, Tries(&["signal", "@victim"], Refused(libc::SYS_kill))),
    Case("D6 signal_across_the_namespace", &[Seccomp, Landlock, USER, CAPS], PIDS, plain,
        Tries(&["signal", "@victim"], Error(libc::ESRCH))),
    Case("D9 signal_across_the_domain", &[Seccomp, PIDS, USER, CAPS], Landlock, plain,
        Tries(&["signal", "@victim"], Error(libc::EPERM))),
    // The C library blocks all signals while it clones, so nobody reports this one.
    Case("D10 new_process", &[], Seccomp, plain, Tries(&["run", "/kernel"], Killed(libc::SIGSYS))),
    // The kernel lets a process with one thread do it, so not beside the lifeline's.
    Case("D10 new_user_namespace", &[Without(Lifeline)], Seccomp, plain, Tries(&["unshare"], Refused(libc::SYS_unshare))),

    // Network.
    Case("D10 raw_socket", &[], Seccomp, plain, Tries(&["raw-socket"], Refused(libc::SYS_socket))),
    Case("D12 raw_socket_without_capabilities", &[Seccomp, USER], CAPS, plain,
        Tries(&["raw-socket"], Error(libc::EPERM))),
    Case("D10 connect_out", &[], Seccomp, plain, Tries(&["tcp", "@port"], Refused(libc::SYS_socket))),
    Case("D6 connect_out_of_the_namespace", &[Seccomp, Landlock], NET, plain,
        Tries(&["tcp", "@port"], Error(libc::ENETUNREACH))),
    Case("D9 connect_out_of_the_domain", &[Seccomp, NET], Landlock, plain,
        Tries(&["tcp", "@port"], Error(libc::EACCES))),
    Case("D6 abstract_socket_of_the_host", &[Landlock], NET, plain,
        Tries(&["abstract", "@name"], Error(libc::ECONNREFUSED))),
    Case("D9 abstract_socket_out_of_the_domain", &[NET], Landlock, plain,
        Tries(&["abstract", "@name"], Error(libc::EPERM))),
    Case("D10 listen", &[], Seccomp, plain, Tries(&["listen", "/share/volumes/socket"], Refused(libc::SYS_bind))),

    // The kernel.
    Case("D10 module", &[], Seccomp, plain, Tries(&["module"], Refused(libc::SYS_init_module))),
    Case("D10 io_uring", &[], Seccomp, plain, Tries(&["io-uring"], Refused(libc::SYS_io_uring_setup))),
    Case("D10 memory_file", &[], Seccomp, plain, Tries(&["memory-file"], Refused(libc::SYS_memfd_create))),
    Case("D10 ioctl", &[], Seccomp, plain, Tries(&["ioctl"], Refused(libc::SYS_ioctl))),
    Case("D10 prctl", &[], Seccomp, plain, Tries(&["prctl"], Refused(libc::SYS_prctl))),
    Case("D12 capability_regained", &[], CAPS, plain, Tries(&["raise"], Error(libc::EPERM))),

    // Resources.
    Case("D11 threads", &[], Without(Limits), plain, Tries(&["threads", "1100"], Error(libc::EAGAIN))),
    Case("D11 descriptors", &[], Without(Limits), |setup| setup.config.jail.max_files = 64,
        Tries(&["open", "/kernel", "100"], Error(libc::EMFILE))),
    Case("D11 pids_of_the_pod", &[], Without(Cgroups), |setup| cgroup(setup, &["pids.max"], "20"),
        Tries(&["threads", "40"], Error(libc::EAGAIN))),
    Case("D11 memory_of_the_pod", &[], Without(Cgroups),
        |setup| cgroup(setup, &["memory.max", "memory.limit_in_bytes"], "50331648"),
        Tries(&["fill", "96"], Killed(libc::SIGKILL))),

    // What is seen from outside.
    Case("D6 namespaces", &[], Without(Namespaces), plain, Holds(|sandbox| {
        ["cgroup", "ipc", "uts"].iter().all(|name| {
            let of = |dir: &Path| fs::read_link(dir.join(name)).expect("namespace");
            of(&sandbox.proc("ns")) != of(Path::new("/proc/self/ns"))
        })
    })),
    Case("D12 ids", &[], USER, plain, Holds(|sandbox| sandbox.status("Uid").starts_with(&BASE.to_string()))),
    Case("D9 no_new_privileges", &[Landlock, Seccomp], Without(NoNewPrivileges), plain,
        Holds(|sandbox| sandbox.status("NoNewPrivs") == "1")),
    Case("D7 session", &[], Without(Session), plain, Holds(|sandbox| {
        let stat = fs::read_to_string(sandbox.proc("stat")).expect("stat");
        let session = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(3)).expect("session");
        session == sandbox.pid.as_raw_nonzero().to_string()
    })),
    Case("D12 environment", &[], Without(Environment), plain,
        Holds(|sandbox| sandbox.ask(&["environment"]) == "HOSTNAME=pod-1")),
    Case("D7 lifeline", &[], Without(Lifeline), plain, Holds(|sandbox| {
        drop(sandbox.started.lifeline.take());
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            if waitpid(Some(sandbox.pid), WaitOptions::NOHANG).expect("wait").is_some() {
                sandbox.ended = true;
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    })),
];

impl Case {
    /// Runs it, three times. Returns how it ends without its step.
    pub fn run(&self) -> String {
        let Self(name, outer, step, prepare, check) = self;
        let start = |off: &[Off]| {
            let mut setup = Setup::new();
            prepare(&mut setup);
            setup.leave_out(off);
            setup
        };
        let also: Vec<_> = outer.iter().copied().chain([*step]).collect();
        match check {
            Holds(holds) => {
                assert!(holds(&mut start(&[]).start()), "{name}: in the whole jail");
                assert!(holds(&mut start(outer).start()), "{name}: by its step alone");
                assert!(!holds(&mut start(&also).start()), "{name}: it holds without {step:?}, so it proves nothing");
                "not so".into()
            }
            Tries(words, promise) => {
                let attack = |off: &[Off]| {
                    let mut setup = start(off);
                    let words: Vec<_> = words.iter().map(|word| setup.fill(word)).collect();
                    let words: Vec<_> = words.iter().map(String::as_str).collect();
                    setup.start().attempt(&words)
                };
                let whole = attack(&[]);
                assert!(!matches!(whole, Done(_)), "{name}: it succeeds");
                assert_eq!(attack(outer), *promise, "{name}: by its step alone");
                let end = attack(&also);
                assert_ne!(end, *promise, "{name}: without {step:?} it ends the same, so it proves nothing");
                format!("{end:?}").chars().take(40).collect()
            }
        }
    }
}
