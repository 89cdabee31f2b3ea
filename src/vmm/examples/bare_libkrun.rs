//! libkrun without nacelle around it: no shim, no jail, no shares, no disks. `hack/bench boot` measures against it.
//!
//! `bare_libkrun KERNEL IMAGE VCPUS MIB [WORD…]` boots IMAGE as PID 1 the way `nacelle-vmm` boots its agent (same calls,
//! same command line, with the words behind it), waits for the first byte on the guest's console, and prints four
//! durations in nanoseconds, and on standard error what the guest said:
//!
//! ```text
//!  spawn ─► main ─► krun_start_enter ─► first byte of the guest ─► end of the process
//!         1       2                   3                         4
//! ```
//!
//! It starts itself again for the machine, because libkrun ends the process that calls it.

use std::env;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use command_fds::{CommandFdExt, FdMapping};
use nacelle_protocol::GENERATION;
use nacelle_protocol::ids::SandboxId;
use nacelle_protocol::vm::{CONSOLE_FD, Jail, Landlock, Network, Seccomp, VmConfig};
use nacelle_vmm::krun::Vm;
use nacelle_vmm::plan::Plan;

type Failure = Box<dyn std::error::Error>;

/// Tells the second process from the first.
const MACHINE: &str = "BARE_LIBKRUN_MACHINE";

fn main() -> Result<(), Failure> {
    let start = now();
    let words: Vec<String> = env::args().skip(1).collect();
    let [kernel, image, vcpus, mib, kernel_args @ ..] = words.as_slice() else {
        return Err("usage: bare_libkrun KERNEL IMAGE VCPUS MIB [WORD…]".into());
    };
    if env::var_os(MACHINE).is_some() {
        return machine(start, config(kernel, image, vcpus.parse()?, mib.parse()?, kernel_args)?);
    }
    watch(&words)
}

/// The one clock of both processes that std offers; nobody sets it meanwhile.
fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos())
}

fn watch(words: &[String]) -> Result<(), Failure> {
    let (mut console, guest) = std::io::pipe()?;
    let mut command = Command::new(env::current_exe()?);
    command.args(words).env(MACHINE, "").stdin(Stdio::null()).stdout(Stdio::piped());
    command.fd_mappings(vec![FdMapping { parent_fd: OwnedFd::from(guest), child_fd: CONSOLE_FD }])?;
    let spawn = now();
    let mut child = command.spawn()?;
    // The write end, or the console would never end.
    drop(command);
    let mut words = vec![0];
    let read = console.read(&mut words)?;
    let first = now();
    // A guest that says more than a pipe holds would wait for ever.
    console.read_to_end(&mut words)?;
    let status = child.wait()?;
    let end = now();
    let mut said = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_string(&mut said)?;
    }
    let times: Vec<u128> = said.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let &[main, enter] = times.as_slice() else { return Err("the machine did not start".into()) };
    if read != 1 || !status.success() {
        return Err(format!("the guest wrote {read} bytes and the machine ended with {status}").into());
    }
    std::io::stderr().write_all(&words)?;
    println!("{} {} {} {}", main - spawn, enter - main, first - enter, end - first);
    Ok(())
}

fn machine(start: u128, config: VmConfig) -> Result<(), Failure> {
    let mut machine = Plan::new(&config)?.machine;
    // Without a jail files keep their names.
    machine.kernel = config.kernel.display().to_string();
    machine.root.path = config.agent.display().to_string();
    println!("{start} {}", now());
    match Vm::new(machine).start()? {}
}

fn config(kernel: &str, image: &str, vcpus: u8, memory_mib: u32, args: &[String]) -> Result<VmConfig, Failure> {
    Ok(VmConfig {
        generation: GENERATION,
        sandbox: SandboxId::new("bare")?,
        vcpus,
        memory_mib,
        kernel: kernel.into(),
        agent: image.into(),
        kernel_args: args.to_vec(),
        shares: Vec::new(),
        disks: Vec::new(),
        sockets: Vec::new(),
        awaits_nics: false,
        // Never entered.
        jail: Jail {
            root: "/".into(),
            uid_base: 1,
            uid_count: 1,
            pod_root: None,
            network: Network::New,
            cgroups: Vec::new(),
            max_files: 0,
            landlock: Landlock::Off,
            seccomp: Seccomp::Off,
        },
    })
}
