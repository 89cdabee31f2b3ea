//! What crosses a process boundary in nacelle: types and bytes, no sockets, no files.
//!
//! ```text
//!  shim ── VmConfig (JSON, fd 3) ──────────────► vmm          vm.rs
//!  shim ◄─ Report (JSON lines, fd 4) ─────────── vmm          vm.rs
//!  shim ── Status (JSON, a file) ──────────────► people       status.rs
//!
//!  shim ◄─ Preamble, then ttrpc ──────────────── agent        stream.rs (vsock port 1024)
//!             containerd.task.v3.Task            served by the agent, from containerd-shim-protos
//!             nacelle.agent.v1.Agent             served by the agent, from agent.proto
//!  shim ◄─ Preamble, then frames ─────────────── agent        stream.rs (vsock port 1025, one connection per stream)
//! ```
//!
//! The guest always dials: readiness is pushed to the shim and nothing polls. Host and guest ship together, so there is
//! one [`GENERATION`] and a mismatch is refused at the handshake.
//!
//! Beside that, what two programs of nacelle's have to agree on: `features.rs`, `install.rs`, `processor.rs`.
//!
//! This crate knows nothing of sockets, files, tokio, containerd's daemon or libkrun.

pub mod agent;
pub mod cri {
    //! containerd → shim: the part of a pod's configuration that the shim reads, see `cri.proto`.

    pub use crate::agent::generated::cri::*;
}
pub mod features;
pub mod ids;
pub mod install;
pub mod processor;
pub mod status;
pub mod stream;
pub mod vm;

/// Number of the protocol between the processes. It changes with every incompatible change of this crate.
pub const GENERATION: u32 = 3;
