//! `containerd-shim-nacelle-v2`: containerd's side of a pod in a microVM.
//!
//! ```text
//!  start, delete, -info, -v ── one shot, no threads
//!  serve ── service ── driver ─┬─ sandbox          what is allowed, and in which order
//!                              ├─ perform          what it takes
//!                              │    ├─ bundle, spec, config        read and checked
//!                              │    ├─ sources, disks, mounted     roots and volumes that OCI has no words for
//!                              │    ├─ pod: state, cgroup, volumes  on the host
//!                              │    ├─ mirror                      volumes that change while somebody watches
//!                              │    ├─ network                     the pod's interfaces
//!                              │    ├─ vm, guest, tail             the VMM and the agent
//!                              │    ├─ export, files               what a container has written; what it sees
//!                              │    └─ stdio, stream, hooks
//!                              └─ events, publisher                what containerd hears
//! ```
//!
//! It is a library so that the fuzz targets can reach what reads foreign bytes.
//!
//! The shim knows nothing of how EROFS is laid out, of libkrun, of seccomp, and of how the guest mounts.

pub mod annotations;
pub mod args;
pub mod arrivals;
pub mod bootstrap;
pub mod bundle;
pub mod cgroup;
pub mod conduct;
pub mod config;
pub mod delete;
pub mod disks;
pub mod driver;
pub mod events;
pub mod export;
pub mod files;
pub mod guest;
pub mod hooks;
pub mod info;
pub mod mirror;
pub mod mounted;
pub mod network;
pub mod patches;
pub mod perform;
pub mod pod;
pub mod pod_config;
pub mod publisher;
pub mod sandbox;
pub mod sandbox_api;
pub mod server;
pub mod service;
pub mod sources;
pub mod spec;
pub mod start;
pub mod state;
pub mod status;
pub mod stdio;
pub mod stream;
pub mod tail;
pub mod task;
pub mod vm;
pub mod volumes;
pub mod wire;

use std::error::Error;

/// An error and its causes, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
