//! What the jail adds to the start of a VMM, without a machine: `hack/bench jail` runs it, as root.
//!
//! `jail_cost ROUNDS` starts itself again and again, with the descriptors, the configuration and the checks of
//! `nacelle-vmm`, until the process dials the one socket that it is given. Once it does so without a jail, and then from
//! inside of it, whole and without some of its parts:
//!
//! ```text
//!  spawn ─► read configuration, plan ─► [ jail ] ─► connect ─► accept
//!  └──────────────────────────── measured ──────────────────────────┘
//! ```
//!
//! One line a shape: its name, then the median and the least in microseconds of CLOCK_REALTIME, which the testbed counts
//! in instructions.

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::chown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use command_fds::{CommandFdExt, FdMapping};
use nacelle_protocol::GENERATION;
use nacelle_protocol::ids::SandboxId;
use nacelle_protocol::vm::{
    CONFIG_FD, CONSOLE_FD, Disk, Jail, LIFELINE_FD, Landlock, Network, REPORT_FD, Seccomp, Share, Socket, VmConfig,
};
use nacelle_vmm::jail::{self, Descriptors};
use nacelle_vmm::plan::Plan;
use nacelle_vmm::{log, report};
use rustix::event::{PollFd, PollFlags, poll};

const BASE: u32 = 700_000;
const PORT: u32 = 1024;

/// Tells the second process from the first, and says whether it shall enter the jail.
const VMM: &str = "JAIL_COST_VMM";

/// Name, whether the process enters the jail, and what is changed of it.
type Shape = (&'static str, bool, fn(&mut Jail));

fn main() -> Result<(), Box<dyn Error>> {
    if let Ok(how) = env::var(VMM) {
        return vmm(how == "jailed");
    }
    let rounds = env::args().nth(1).map_or(Ok(11), |word| word.parse())?;
    let dir = tempfile::Builder::new().prefix("nacelle-jail-cost-").tempdir()?;
    let bench = Bench::new(dir.path())?;
    let shapes: [Shape; 6] = [
        ("no jail", false, |_| {}),
        ("the jail, a network namespace that is there", true, |_| {}),
        ("the jail, a network namespace of its own", true, |jail| jail.network = Network::New),
        ("without Landlock", true, |jail| jail.landlock = Landlock::Off),
        ("without seccomp", true, |jail| jail.seccomp = Seccomp::Off),
        ("without either", true, |jail| (jail.landlock, jail.seccomp) = (Landlock::Off, Seccomp::Off)),
    ];
    let mut times = vec![Vec::new(); shapes.len()];
    for round in 0..=rounds {
        for ((_, jailed, change), times) in shapes.iter().zip(&mut times) {
            let took = bench.start(*jailed, *change)?;
            // The first round warms up.
            if round > 0 {
                times.push(took);
            }
        }
    }
    for ((name, ..), mut times) in shapes.into_iter().zip(times) {
        times.sort_by(f64::total_cmp);
        println!("{name}\t{:.1}\t{:.1}", times[times.len() / 2], times[0]);
    }
    Ok(())
}

/// What a shim would prepare.
struct Bench {
    config: VmConfig,
    listener: UnixListener,
}

impl Bench {
    fn new(dir: &Path) -> Result<Self, Box<dyn Error>> {
        let path = |name: &str| dir.join(name);
        for name in ["jail", "volumes", "layers"] {
            fs::create_dir(path(name))?;
        }
        for name in ["vmlinux", "upper"] {
            fs::write(path(name), name)?;
        }
        let listener = UnixListener::bind(path("socket"))?;
        for name in ["upper", "socket"] {
            chown(path(name), Some(BASE), Some(BASE))?;
        }
        let share = |tag: &str, read_only, idmap| Share { tag: tag.into(), source: path(tag), read_only, idmap };
        let config = VmConfig {
            generation: GENERATION,
            sandbox: SandboxId::new("bench")?,
            vcpus: 1,
            memory_mib: 128,
            kernel: path("vmlinux"),
            agent: path("vmlinux"),
            kernel_args: Vec::new(),
            shares: vec![share("layers", true, false), share("volumes", false, true)],
            disks: vec![Disk::raw("upper", path("upper"), false)],
            sockets: vec![Socket { port: PORT, source: path("socket") }],
            awaits_nics: false,
            jail: Jail {
                root: path("jail"),
                uid_base: BASE,
                uid_count: 65_536,
                pod_root: None,
                network: Network::Join(PathBuf::from(format!("/proc/{}/ns/net", std::process::id()))),
                cgroups: Vec::new(),
                max_files: 4096,
                landlock: Landlock::Require,
                seccomp: Seccomp::Enforce,
            },
        };
        Ok(Self { config, listener })
    }

    /// Microseconds from the spawn until the process calls from where it is.
    fn start(&self, jailed: bool, change: fn(&mut Jail)) -> Result<f64, Box<dyn Error>> {
        let mut config = self.config.clone();
        change(&mut config.jail);
        let (config_out, mut config_in) = std::io::pipe()?;
        let (mut reports, report) = std::io::pipe()?;
        let (lifeline, hold) = std::io::pipe()?;
        let (_console, console) = std::io::pipe()?;
        let given: [(OwnedFd, i32); 4] = [
            (config_out.into(), CONFIG_FD),
            (report.into(), REPORT_FD),
            (lifeline.into(), LIFELINE_FD),
            (console.into(), CONSOLE_FD),
        ];
        let mut command = Command::new(env::current_exe()?);
        command
            .env_clear()
            .env(VMM, if jailed { "jailed" } else { "plain" })
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // What matters comes through the report's pipe.
            .stderr(Stdio::null());
        command.fd_mappings(given.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).into())?;
        config_in.write_all(&serde_json::to_vec(&config)?)?;
        drop(config_in);
        let begin = Instant::now();
        let mut child = command.spawn()?;
        drop(command);
        // Whoever fails before it calls closes the report's pipe.
        let mut wait = [PollFd::new(&self.listener, PollFlags::IN), PollFd::new(&reports, PollFlags::empty())];
        poll(&mut wait, None)?;
        if wait[0].revents().is_empty() {
            child.wait()?;
            let mut said = String::new();
            reports.read_to_string(&mut said)?;
            return Err(format!("the process ended before it called: {said}").into());
        }
        let (mut caller, _) = self.listener.accept()?;
        let took = begin.elapsed();
        child.wait()?;
        drop(hold);
        // Until it is gone, so that its end is not part of the next start.
        caller.read_to_end(&mut Vec::new())?;
        let mut said = String::new();
        reports.read_to_string(&mut said)?;
        if said.contains("failed") { Err(said.into()) } else { Ok(took.as_secs_f64() * 1e6) }
    }
}

fn vmm(jailed: bool) -> Result<(), Box<dyn Error>> {
    let Descriptors { config, report, lifeline, console } =
        Descriptors::inherited().map_err(|number| format!("descriptor {number} is not open"))?;
    log::init();
    report::init(report, jail::exit);
    let config: VmConfig = serde_json::from_reader(config)?;
    let plan = Plan::new(&config)?;
    let lifeline: File = lifeline;
    let socket = if jailed {
        if let Err(error) = jail::enter(&plan, &console).and_then(|()| jail::lock(&plan, lifeline)) {
            report::send(&report::failed(error.stage, &error));
            jail::exit(report::EXIT_FAILED);
        }
        plan.machine.sockets[0].1.clone()
    } else {
        config.sockets[0].source.display().to_string()
    };
    drop(UnixStream::connect(socket)?);
    jail::exit(0)
}
