//! What stands in for libkrun inside the jail: it enters as the VMM does, dials the test through the one socket that it
//! was given, and then does what the test says, one line a command.
//!
//! ```text
//!  command   words, with tabs between
//!  answer    "ok" TAB text      or "error" TAB the system's error number
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::Command;

use nacelle_protocol::vm::{Nics, VmConfig};
use nacelle_vmm::jail::{self, Descriptors, Step};
use nacelle_vmm::plan::Plan;
use nacelle_vmm::{log, report};
use rustix::fs::{
    AtFlags, CWD, FileType, MemfdFlags, Mode, chmodat, chownat, linkat, makedev, memfd_create, mkdirat, mknodat,
    unlinkat,
};
use rustix::net::{AddressFamily, SocketType};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, set_capabilities, set_thread_res_gid, set_thread_res_uid,
};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// The port whose socket leads to the test.
pub const PORT: u32 = 1024;

/// Among the steps that are left out: the kernel itself has no Landlock.
pub const NO_LANDLOCK: &str = "no-landlock";

/// A filter answers for the kernel.
fn lose_landlock() {
    let rules = [(libc::SYS_landlock_create_ruleset, Vec::new())].into();
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let arch = std::env::consts::ARCH.try_into().expect("architecture");
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, unknown, arch).expect("filter");
    let program: BpfProgram = filter.try_into().expect("compile");
    seccompiler::apply_filter(&program).expect("install");
}

/// Enters the jail, without the steps named in `without`, and serves until the test hangs up.
pub fn run(without: &str) -> ! {
    let names = without.split(',').filter(|name| !name.is_empty());
    if names.clone().any(|name| name == NO_LANDLOCK) {
        lose_landlock();
    }
    let without: Vec<_> = names.filter(|name| *name != NO_LANDLOCK).map(step).collect();
    jail::leave_out(&without);
    let Descriptors { config, report, lifeline, console } = Descriptors::inherited().expect("descriptors");
    log::init();
    report::init(report, jail::exit);
    let mut lines = BufReader::new(config).lines().map(|line| line.expect("line"));
    let config: VmConfig = serde_json::from_str(&lines.next().expect("line")).expect("configuration");
    let mut plan = Plan::new(&config).expect("plan");
    let entered = jail::enter(&plan, &console).and_then(|()| {
        if plan.awaits_nics {
            let nics: Nics = serde_json::from_str(&lines.next().expect("line")).expect("network devices");
            plan.connect(nics).expect("plan");
        }
        // Its descriptor is closed before the jail is locked.
        drop(lines);
        jail::lock(&plan, lifeline)
    });
    if let Err(error) = entered {
        report::send(&report::failed(error.stage, &error));
        jail::exit(report::EXIT_FAILED);
    }
    let control = UnixStream::connect(format!("/socket/{PORT}")).expect("dial the test");
    let mut answers = control.try_clone().expect("duplicate");
    for line in BufReader::new(control).lines() {
        let line = line.expect("command");
        let words: Vec<_> = line.split('\t').collect();
        let answer = match act(&words) {
            Ok(text) => format!("ok\t{}", text.escape_default()),
            Err(error) => format!("error\t{}", error.raw_os_error().unwrap_or(-1)),
        };
        writeln!(answers, "{answer}").expect("answer");
    }
    jail::exit(0)
}

fn step(name: &str) -> Step {
    use Step::*;
    let all = [
        Limits,
        Descriptors,
        Cgroups,
        NetworkNamespace,
        Namespaces,
        Attributes,
        Seal,
        PidNamespace,
        Detach,
        UserNamespace,
        Capabilities,
        NoNewPrivileges,
        Session,
        Environment,
        Lifeline,
    ];
    all.into_iter().find(|step| format!("{step:?}") == name).unwrap_or_else(|| panic!("no step {name}"))
}

/// Calls are those that libkrun makes, where there is a choice: the older forms are not in the filter's table.
fn act(words: &[&str]) -> io::Result<String> {
    match *words {
        ["read" | "write" | "list" | "stat" | "make-directory" | "remove" | "link" | "chown" | "chmod", ..]
        | ["create-as" | "make-device" | "open-device" | "open", ..] => files(words),
        _ => others(words),
    }
}

fn number(text: &str) -> io::Result<u32> {
    text.parse().map_err(io::Error::other)
}

fn files(words: &[&str]) -> io::Result<String> {
    let ok = |()| String::new();
    Ok(match *words {
        ["read", path] => fs::read_to_string(path)?,
        ["write", path, text] => fs::write(path, text).map(ok)?,
        ["make-directory", path] => mkdirat(CWD, path, Mode::RWXU).map(ok)?,
        ["remove", path] => unlinkat(CWD, path, AtFlags::empty()).map(ok)?,
        ["link", from, to] => linkat(CWD, from, CWD, to, AtFlags::empty()).map(ok)?,
        ["list", path] => {
            let names = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
            let mut names = names.collect::<io::Result<Vec<_>>>()?;
            names.sort();
            names.join(" ")
        }
        ["stat", path] => {
            let meta = fs::symlink_metadata(path)?;
            format!("{} {} {:o}", meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777)
        }
        ["chown", path, uid, gid] => {
            let owner = (Some(Uid::from_raw(number(uid)?)), Some(Gid::from_raw(number(gid)?)));
            chownat(CWD, path, owner.0, owner.1, AtFlags::empty()).map(ok)?
        }
        ["chmod", path, mode] => {
            let mode = u32::from_str_radix(mode, 8).map_err(io::Error::other)?;
            chmodat(CWD, path, Mode::from_raw_mode(mode), AtFlags::empty()).map(ok)?
        }
        // As libkrun creates a file for a user of the guest's: effective ids of one thread, and back.
        ["create-as", uid, gid, path] => {
            set_thread_res_gid(None, Some(Gid::from_raw(number(gid)?)), None)?;
            let made = set_thread_res_uid(None, Some(Uid::from_raw(number(uid)?)), None)
                .map_err(io::Error::from)
                .and_then(|()| File::create_new(path));
            set_thread_res_uid(None, Some(Uid::ROOT), None)?;
            set_thread_res_gid(None, Some(Gid::ROOT), None)?;
            made.map(|_| String::new())?
        }
        ["make-device", path] => mknodat(CWD, path, FileType::CharacterDevice, Mode::RUSR, makedev(1, 3)).map(ok)?,
        ["open-device", path] => OpenOptions::new().read(true).write(true).open(path).map(|_| String::new())?,
        ["open", path, count] => {
            let files = (0..number(count)?).map(|_| File::open(path)).collect::<io::Result<Vec<_>>>()?;
            files.len().to_string()
        }
        _ => return Err(io::Error::other("unknown command")),
    })
}

fn others(words: &[&str]) -> io::Result<String> {
    let process = |id: &str| number(id).map(|id| nix::unistd::Pid::from_raw(id.cast_signed()));
    let ok = |()| String::new();
    Ok(match *words {
        ["mount", path] => {
            rustix::mount::mount("x", path, "tmpfs", rustix::mount::MountFlags::empty(), None).map(ok)?
        }
        ["connect", path] => UnixStream::connect(path).map(|_| String::new())?,
        ["listen", path] => UnixListener::bind(path).map(|_| String::new())?,
        ["abstract", name] => {
            UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?).map(|_| String::new())?
        }
        ["tcp", port] => TcpStream::connect(("127.0.0.1", u16::try_from(number(port)?).map_err(io::Error::other)?))
            .map(|_| String::new())?,
        ["tap", name] => {
            tun_tap::Iface::without_packet_info(name, tun_tap::Mode::Tap).map(|tap| tap.name().to_owned())?
        }
        ["raw-socket"] => {
            let icmp = Some(rustix::net::ipproto::ICMP);
            rustix::net::socket(AddressFamily::INET, SocketType::RAW, icmp).map(|_| String::new())?
        }
        ["trace", id] => nix::sys::ptrace::attach(process(id)?).map(ok)?,
        ["signal", id] => nix::sys::signal::kill(process(id)?, nix::sys::signal::Signal::SIGCONT).map(ok)?,
        ["run", path] => Command::new(path).status().map(|_| String::new())?,
        ["unshare"] => nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER).map(ok)?,
        ["module"] => nix::kmod::init_module(b"no module", c"").map(ok)?,
        ["io-uring"] => io_uring::IoUring::new(8).map(|_| String::new())?,
        ["memory-file"] => memfd_create("x", MemfdFlags::CLOEXEC).map(|_| String::new())?,
        ["ioctl"] => rustix::io::ioctl_fionread(io::stdin()).map(|len| len.to_string())?,
        ["prctl"] => rustix::process::dumpable_behavior().map(|found| format!("{found:?}"))?,
        ["raise"] => {
            let all = CapabilitySet::CHOWN | CapabilitySet::SYS_ADMIN;
            set_capabilities(
                None,
                CapabilitySets { effective: all, permitted: all, inheritable: CapabilitySet::empty() },
            )
            .map(ok)?
        }
        ["threads", count] => {
            for _ in 0..number(count)? {
                std::thread::Builder::new().stack_size(16 << 10).spawn(|| {
                    loop {
                        std::thread::park()
                    }
                })?;
            }
            String::new()
        }
        // Written to, because memory that is only promised costs nothing.
        ["fill", mib] => {
            vec![1_u8; number(mib)? as usize * (1 << 20)].iter().map(|&b| usize::from(b)).sum::<usize>().to_string()
        }
        ["console", text] => {
            // As libkrun opens it.
            let mut console = File::create("/proc/self/fd/6")?;
            console.write_all(text.as_bytes()).map(ok)?
        }
        ["environment"] => {
            std::env::vars().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        }
        ["pid"] => std::process::id().to_string(),
        ["panic"] => panic!("as told"),
        _ => return Err(io::Error::other("unknown command")),
    })
}
