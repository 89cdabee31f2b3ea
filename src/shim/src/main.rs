//! `containerd-shim-nacelle-v2`: containerd's side of a pod in a microVM.
//!
//! ```text
//!  start, delete, -info, -v ── one shot, no threads
//!  serve ── service ── driver ─┬─ sandbox          what is allowed, and in which order
//!                              ├─ perform          what it takes
//!                              │    ├─ bundle, spec, config        read and checked
//!                              │    ├─ pod: state, cgroup, volumes  on the host
//!                              │    ├─ mirror                      volumes that change while somebody watches
//!                              │    ├─ network                     the pod's interfaces
//!                              │    ├─ vm, guest, tail             the VMM and the agent
//!                              │    └─ stdio, stream, hooks
//!                              └─ events, publisher                what containerd hears
//! ```
//!
//! The shim knows nothing of how EROFS is laid out, of libkrun, of seccomp, and of how the guest mounts.

mod annotations;
mod args;
mod bootstrap;
mod bundle;
mod cgroup;
mod conduct;
mod config;
mod delete;
mod driver;
mod events;
mod guest;
mod hooks;
mod info;
mod mirror;
mod network;
mod patches;
mod perform;
mod pod;
mod pod_config;
mod publisher;
mod sandbox;
mod sandbox_api;
mod server;
mod service;
mod spec;
mod start;
mod state;
mod status;
mod stdio;
mod stream;
mod tail;
mod task;
mod vm;
mod volumes;
mod wire;

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use anyhow::bail;

use crate::args::Args;

/// An error and its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("containerd-shim-nacelle-v2: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse(std::env::args().skip(1))?;
    if args.version {
        println!(
            "containerd-shim-nacelle-v2 {} (containerd runtime io.containerd.nacelle.v2)",
            env!("CARGO_PKG_VERSION")
        );
        return Ok(());
    }
    let reply = match args.action.as_str() {
        _ if args.info => info::runtime_info(&start::read_stdin()?)?,
        "start" => start::run(&args)?,
        "delete" => delete::run(&args)?,
        "serve" => return server::run(&args),
        other => bail!("run action {other:?}: containerd calls start and delete; people may want -v or -info"),
    };
    std::io::stdout().write_all(&reply)?;
    Ok(())
}
