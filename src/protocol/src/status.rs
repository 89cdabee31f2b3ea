//! shim → people: what a sandbox is and how its start went, in `/run/nacelle/<namespace>/<sandbox>/status.json`.
//!
//! The shim writes the file by rename when the sandbox's state changes and never reads it; it is not what `delete` works
//! from. The CLI shows it.

use serde::{Deserialize, Serialize};

/// Name of the file in the sandbox's run directory.
pub const STATUS_FILE: &str = "status.json";

/// One sandbox, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox.
    pub sandbox: String,
    /// Process id of the VMM on the host.
    pub vmm_pid: u32,
    /// Process id of the shim on the host.
    pub shim_pid: u32,
    /// First host id of the sandbox's range.
    pub uid_base: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM of the guest in MiB.
    pub memory_mib: u32,
    /// Kernel release of the guest, as the guest says it.
    pub guest_kernel: String,
    /// What that kernel has, by the names of [`crate::features`], as the guest says it.
    #[serde(default)]
    pub kernel_features: Vec<String>,
    /// What the configuration allowed to be weaker than asked for, one sentence each.
    pub degraded: Vec<String>,
    /// Images of layers that the guest has found to be damaged, one sentence each.
    #[serde(default)]
    pub damage: Vec<String>,
    /// How long each phase of the start took, in the order they began.
    pub phases: Vec<Phase>,
    /// The lowers of all containers, bottom first.
    pub layers: Vec<LayerUse>,
}

/// A phase of the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// Its name, such as `boot`.
    pub name: String,
    /// When it began, in microseconds after the create request arrived.
    pub at_us: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
}

/// A lower that a container uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerUse {
    /// The container.
    pub container: String,
    /// Key in the layer cache; empty for a lower that is not cached.
    pub key: String,
    /// Size of the image in bytes.
    pub size: u64,
    /// `reused`, `built`, `rebuilt`, `ephemeral`, `indexed` or `ready`.
    pub outcome: String,
}
