//! `nacelle-vmm`: started by the shim with the descriptors of [`nacelle_protocol::vm`], it becomes one microVM.
//!
//! Exit status: 2 used wrongly, 1 failed (a [`Report::Failed`](nacelle_protocol::vm::Report) says why), else what
//! libkrun makes of the guest's end.

use std::convert::Infallible;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::process::ExitCode;

use nacelle_protocol::GENERATION;
use nacelle_protocol::vm::{MAX_JSON, VmConfig};
use nacelle_vmm::jail::{self, Descriptors};
use nacelle_vmm::krun::{Agent, Vm};
use nacelle_vmm::plan::{Plan, PlanError};
use nacelle_vmm::{kernel, log, report};
use serde::Deserialize;
use thiserror::Error;

const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [] => {}
        [flag] if flag == "--version" => {
            println!("nacelle-vmm {} (generation {GENERATION})", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => return usage("it takes no arguments but --version"),
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

fn usage(why: &str) -> ExitCode {
    eprintln!("nacelle-vmm: {why}: it is started by containerd-shim-nacelle-v2, once for each sandbox");
    ExitCode::from(EXIT_USAGE)
}

struct Failure {
    stage: &'static str,
    error: Box<dyn Error>,
}

fn stage<E: Error + 'static>(stage: &'static str) -> impl FnOnce(E) -> Failure {
    move |error| Failure { stage, error: Box::new(error) }
}

fn run(config: File, lifeline: File, console: &File) -> Result<Infallible, Failure> {
    let config = read(config).map_err(stage("configuration"))?;
    let plan = Plan::new(&config).map_err(stage("plan"))?;
    // All that is asked of the host's files, as long as they have names.
    kernel::check(&config.kernel, config.memory_mib).map_err(stage("kernel"))?;
    let agent = Agent::map(&config.agent).map_err(stage("agent"))?;
    OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(NoKvm).map_err(stage("kvm"))?;

    jail::enter(&plan, lifeline, console).map_err(|error| stage(error.stage)(error))?;
    Vm::new(plan.machine, agent).start().map_err(stage("libkrun"))
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

fn read(config: File) -> Result<VmConfig, ConfigError> {
    let mut bytes = Vec::new();
    config.take(MAX_JSON as u64 + 1).read_to_end(&mut bytes).map_err(ConfigError::Read)?;
    if bytes.len() > MAX_JSON {
        return Err(ConfigError::TooLong);
    }
    // Another generation has other fields: say that, and not which field is missing.
    let Head { generation } = serde_json::from_slice(&bytes).map_err(ConfigError::Json)?;
    if generation != GENERATION {
        return Err(ConfigError::Generation(PlanError::Generation(generation)));
    }
    serde_json::from_slice(&bytes).map_err(ConfigError::Json)
}
