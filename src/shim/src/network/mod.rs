//! The pod's network namespace → the VM's network devices.
//!
//! ```text
//!  the pod's network namespace                                          guest
//!  ┌──────────────────────────────────────────────────────────┐
//!  │ eth0 ── ingress ─ redirect ──► nacelle2 ── VMM reads ────┼──► virtio-net, named eth0
//!  │ eth0 ◄─ redirect ─ ingress ─── nacelle2 ◄─ VMM writes ───┼─── with eth0's MAC, MTU, addresses, routes, neighbours
//!  └──────────────────────────────────────────────────────────┘
//! ```
//!
//! Whatever made the interface sees the traffic that it would see of a container's processes, and the namespace stays as
//! it was made: nothing is taken off the interface, so that its maker can check and remove it. What the namespace holds is
//! read once, before the VM starts, because libkrun has no hotplug.
//!
//! A tap is persistent, because libkrun opens it by name when the guest's driver comes up; it belongs to the VMM's own user
//! id; and it is up before the VM starts and until the VM is gone, because one failed write would silence libkrun's device
//! for good. It carries the sandbox's name as its alias: that is how [`detach`] finds it, also after a crash.

use std::io;
use std::path::PathBuf;

use nacelle_protocol::agent;
use nacelle_protocol::ids::SandboxId;
use nacelle_protocol::vm::Nic;
use thiserror::Error;

pub mod forward;
mod link;
mod netns;
mod nft;
mod snapshot;
mod tap;
#[cfg(test)]
mod tests;

pub use netns::Netns;

/// Why a namespace cannot be carried into a VM.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// It cannot be opened or entered.
    #[error("{what} network namespace {path}")]
    Namespace {
        /// What was being done.
        what: &'static str,
        /// The namespace.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It is the host's own, whose interfaces are not the pod's to take.
    #[error("join network namespace {0}: it is the host's own")]
    Host(PathBuf),
    /// The kernel refuses a request of rtnetlink(7).
    #[error("{what}")]
    Request {
        /// What was asked for.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// An interface whose frames are not Ethernet.
    #[error("carry interface {name} into the VM: it is no Ethernet interface ({kind})")]
    Kind {
        /// Its name.
        name: String,
        /// What it is.
        kind: String,
    },
    /// Something redirects the interface's frames already, such as another VM in the same namespace.
    #[error("carry interface {0} into the VM: it has an ingress queueing discipline already, as of another VM's")]
    Taken(String),
    /// Interfaces that nobody can carry any more.
    #[error("carry interfaces {} into the VM: they came when it had started, and it gets no new devices; \
            let a namespace be joined that has them (ctr run --with-ns network:PATH)", .0.join(", "))]
    Late(Vec<String>),
    /// More interfaces than the VM has room for.
    #[error("carry interfaces {} into the VM: there is room for {room} network devices", names.join(", "))]
    TooMany {
        /// Their names.
        names: Vec<String>,
        /// How many devices are left.
        room: usize,
    },
}

/// The name of a sandbox in the aliases of its taps.
pub fn label(namespace: &SandboxId, sandbox: &SandboxId) -> String {
    format!("{namespace}/{sandbox}")
}

/// What the taps of a sandbox are told by.
#[derive(Clone, Debug)]
pub struct Owner {
    /// Its [`label`].
    pub sandbox: String,
    /// The VMM's user id.
    pub uid: u32,
}

/// A namespace whose interfaces lead into the VM.
#[derive(Clone, Debug, Default)]
pub struct Attached {
    /// For the VMM.
    pub nics: Vec<Nic>,
    /// For the agent.
    pub guest: agent::Network,
}

/// Carries every interface of the namespace that is up, the loopback aside, to a tap of its own.
///
/// # Errors
/// [`NetworkError`]; what was made is left to [`detach`].
pub async fn attach(netns: &Netns, owner: Owner, room: usize) -> Result<Attached, NetworkError> {
    let work = async move |handle| {
        let snapshot = snapshot::read(&handle).await?;
        if snapshot.links.len() > room {
            let names = snapshot.links.into_iter().map(|link| link.name).collect();
            return Err(NetworkError::TooMany { names, room });
        }
        let mut nics = Vec::with_capacity(snapshot.links.len());
        for link in &snapshot.links {
            nics.push(Nic { tap: tap::attach(&handle, link, &owner).await?, mac: link.mac });
        }
        Ok(Attached { nics, guest: snapshot.guest })
    };
    netns.run(work).await
}

/// Fails where interfaces have come into the namespace of a VM that has started without any. `vmm` is its process id.
///
/// # Errors
/// [`NetworkError::Late`] names them.
pub async fn expect_none(vmm: u32) -> Result<(), NetworkError> {
    let netns = Netns::open(&PathBuf::from(format!("/proc/{vmm}/ns/net")))?;
    let found = netns.run(async |handle| snapshot::interfaces(&handle).await).await?;
    if found.is_empty() { Ok(()) } else { Err(NetworkError::Late(found.into_iter().map(|link| link.name).collect())) }
}

/// Undoes [`attach`], as far as it came: interfaces that have been removed meanwhile are no error. The VMM must be gone.
/// Blocks.
///
/// # Errors
/// [`NetworkError`].
pub fn detach(netns: &Netns, sandbox: &str) -> Result<(), NetworkError> {
    let sandbox = sandbox.to_owned();
    netns.run_blocking(async move |handle| tap::detach(&handle, &sandbox).await)
}
