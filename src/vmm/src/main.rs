//! `nacelle-vmm`: started by the shim with the descriptors of [`nacelle_protocol::vm`], it becomes one microVM.
//!
//! ```text
//!  nacelle-vmm                                      the machine; descriptors 2 to 6 are given
//!  nacelle-vmm bind PID [SOURCE TARGET OPTIONS]...  mounts volumes for a machine that runs, ids mapped
//!  nacelle-vmm idmap [DIRECTORY]...                 tries to map ids there, and reports where that is not possible
//!  nacelle-vmm --version
//! ```
//!
//! PID is the VMM's; OPTIONS is `rw` or `ro`, with `,recursive` for the mounts below, and with `,mapped` where the files' ids
//! are those of the pod's user namespace. What cannot be mapped, or went wrong, is told as [`Report`] lines on standard
//! output.
//!
//! Exit status: 2 used wrongly, 1 failed (a [`Report::Failed`] says why), else 0 or what libkrun makes of the guest's
//! end.

use std::convert::Infallible;
use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use nacelle_protocol::GENERATION;
#[cfg(doc)]
use nacelle_protocol::vm::Report;
use nacelle_protocol::vm::{MAX_JSON, Nics, VmConfig};
use nacelle_vmm::jail::{self, Descriptors, JailError, Volume};
use nacelle_vmm::krun::Vm;
use nacelle_vmm::plan::{Plan, PlanError};
use nacelle_vmm::{kernel, log, report};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

const EXIT_USAGE: u8 = 2;

/// How many descriptors there is room for from the start. A machine has more than 64, where a process begins.
const DESCRIPTORS: i32 = 1024;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [] => {}
        [flag] if flag == "--version" => {
            println!("nacelle-vmm {} (generation {GENERATION})", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        [command, pid, volumes @ ..] if command == "bind" => return bind(pid, volumes),
        [command, places @ ..] if command == "idmap" => return idmap(places),
        _ => return usage("it takes no such arguments"),
    }
    let Descriptors { config, report, lifeline, console } = match Descriptors::inherited() {
        Ok(descriptors) => descriptors,
        Err(number) => return usage(&format!("descriptor {number} is not open")),
    };
    log::init();
    report::init(report, jail::exit);
    let Err(failure) = run(config, lifeline, &console);
    let Failure { stage, error } = failure;
    report::send(&report::failed(stage, error.as_ref()));
    ExitCode::FAILURE
}

/// Grows the table of descriptors while this process has one thread: where others look into it, the kernel lets all of them
/// go by first (synchronize_rcu), which takes some 10 ms, and holds up who opened one more. A fork begins with a small one again.
fn make_room(any: &File) {
    // A table that stays small is only slower.
    drop(rustix::io::fcntl_dupfd_cloexec(any, DESCRIPTORS - 1));
}

fn usage(why: &str) -> ExitCode {
    eprintln!("nacelle-vmm: {why}: it is started by containerd-shim-nacelle-v2, once for each sandbox");
    ExitCode::from(EXIT_USAGE)
}

/// Mounts volumes from the command line, in order; the first that fails ends it.
fn bind(pid: &OsStr, volumes: &[OsString]) -> ExitCode {
    let Some(pid) = pid.to_str().and_then(|text| text.parse().ok()) else { return usage("bind takes a process id") };
    let (volumes, []) = volumes.as_chunks::<3>() else { return usage("bind takes three words a volume") };
    let mut parsed = Vec::with_capacity(volumes.len());
    for [source, target, options] in volumes {
        let (source, target) = (Path::new(source), Path::new(target));
        let mut volume = Volume { source, target, recursive: false, read_only: false, mapped: false };
        let mut words = options.to_str().unwrap_or_default().split(',');
        match words.next() {
            Some("rw") => {}
            Some("ro") => volume.read_only = true,
            _ => return usage("bind takes options that begin with `rw` or `ro`"),
        }
        for word in words {
            match word {
                "recursive" => volume.recursive = true,
                "mapped" => volume.mapped = true,
                _ => return usage("bind takes the options `recursive` and `mapped` beside `rw` or `ro`"),
            }
        }
        parsed.push(volume);
    }
    told(|| jail::bind(pid, &parsed))
}

/// Tries to map ids on the mounts of these directories.
fn idmap(places: &[OsString]) -> ExitCode {
    told(|| places.iter().try_for_each(|place| jail::try_map(Path::new(place))))
}

/// Does something and reports on standard output.
fn told(work: impl FnOnce() -> Result<(), JailError>) -> ExitCode {
    let Ok(pipe) = std::io::stdout().as_fd().try_clone_to_owned() else { return usage("standard output is closed") };
    report::init(pipe.into(), jail::exit);
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report::send(&report::failed(error.stage, &error));
            ExitCode::FAILURE
        }
    }
}

struct Failure {
    stage: &'static str,
    error: Box<dyn Error>,
}

fn stage<E: Error + 'static>(stage: &'static str) -> impl FnOnce(E) -> Failure {
    move |error| Failure { stage, error: Box::new(error) }
}

fn run(config: File, lifeline: File, console: &File) -> Result<Infallible, Failure> {
    let mut lines = BufReader::new(config);
    let config = read(&mut lines).map_err(stage("configuration"))?;
    let mut plan = Plan::new(&config).map_err(stage("plan"))?;
    // All that is asked of the host's files, as long as they have names.
    kernel::check(&config.kernel, config.memory_mib).map_err(stage("kernel"))?;
    OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(NoKvm).map_err(stage("kvm"))?;

    jail::enter(&plan, console).map_err(|error| stage(error.stage)(error))?;
    make_room(console);
    if plan.awaits_nics {
        // The shim works on it, or it is gone, and this ends.
        let nics: Nics = line(&mut lines).and_then(|text| parse(&text)).map_err(stage("network"))?;
        plan.connect(nics).map_err(stage("network"))?;
    }
    drop(lines);
    jail::lock(&plan, lifeline).map_err(|error| stage(error.stage)(error))?;
    Vm::new(plan.machine).start().map_err(stage("libkrun"))
}

#[derive(Debug, Error)]
#[error("open /dev/kvm: this machine has no usable KVM")]
struct NoKvm(#[source] io::Error);

#[derive(Debug, Error)]
enum ConfigError {
    #[error("read configuration")]
    Read(#[source] io::Error),
    #[error("read configuration: longer than {MAX_JSON} bytes")]
    TooLong,
    #[error("read configuration")]
    Json(#[source] serde_json::Error),
    #[error(transparent)]
    Generation(PlanError),
}

/// The one field that every generation has.
#[derive(Deserialize)]
struct Head {
    generation: u32,
}

fn read(lines: &mut BufReader<File>) -> Result<VmConfig, ConfigError> {
    let text = line(lines)?;
    // Another generation has other fields: say that, and not which field is missing.
    let Head { generation } = parse(&text)?;
    if generation != GENERATION {
        return Err(ConfigError::Generation(PlanError::Generation(generation)));
    }
    parse(&text)
}

/// Reads one line, or what there is before the end.
fn line(lines: &mut BufReader<File>) -> Result<Vec<u8>, ConfigError> {
    let mut text = Vec::new();
    lines.by_ref().take(MAX_JSON as u64 + 1).read_until(b'\n', &mut text).map_err(ConfigError::Read)?;
    if text.len() > MAX_JSON { Err(ConfigError::TooLong) } else { Ok(text) }
}

fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, ConfigError> {
    serde_json::from_slice(text).map_err(ConfigError::Json)
}
