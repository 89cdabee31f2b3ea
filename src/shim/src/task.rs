//! What callers ask of a sandbox, what they get, and why not: the words between [`crate::service`], which knows ttrpc,
//! and [`crate::driver`], which does not.

use std::path::PathBuf;

use nacelle_protocol::ids::ContainerId;
use nacelle_rootfs::plan::{Mount, PlanError};
use thiserror::Error;

use crate::annotations::AnnotationError;
use crate::bundle::BundleError;
use crate::config::{ConfigError, Origin};
use crate::export::ExportError;
use crate::guest::GuestError;
use crate::hooks::HookError;
use crate::patches::PatchesError;
use crate::pod::PodError;
use crate::sandbox::{Exit, Phase, ProcessKey, Refusal};
use crate::sources::SourcesError;
use crate::spec::SpecError;
use crate::stdio::{StdioError, Wanted};
use crate::volumes::VolumeError;

/// A container that shall be.
#[derive(Clone, Debug)]
pub struct Create {
    /// containerd's directory.
    pub bundle: PathBuf,
    /// The root file system.
    pub rootfs: Vec<Mount>,
    /// Standard streams.
    pub io: Wanted,
    /// Configuration that the request names; it counts for the container that boots the VM.
    pub origin: Option<Origin>,
    /// It is a sandbox of the Sandbox API, which has no bundle of its own.
    pub sandbox: Option<Box<SandboxConfig>>,
}

/// What takes the place of a bundle for a sandbox of the Sandbox API.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// As a `config.json`.
    pub config: Vec<u8>,
    /// Files that containers of the pod get where containerd has made none: name below /etc, and content.
    pub files: Vec<(&'static str, String)>,
}

/// An exec that shall be.
#[derive(Clone, Debug)]
pub struct Exec {
    /// OCI process as JSON.
    pub process: Vec<u8>,
    /// Standard streams.
    pub io: Wanted,
}

/// A request about one process.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the names are those of containerd's Task service")]
pub enum Call {
    Create(Create),
    Exec(Exec),
    Start,
    Delete,
    Kill {
        signal: u32,
        all: bool,
    },
    Wait,
    State,
    Pids,
    Pause,
    Resume,
    Stats,
    /// OCI resources as JSON.
    Update(Vec<u8>),
    Resize {
        width: u32,
        height: u32,
    },
    CloseIo,
    Shutdown,
    /// End the VM with all that is in it, and with `leave` the shim. Done already is fine.
    End {
        leave: bool,
    },
}

/// What can be said of a process.
#[derive(Clone, Debug)]
pub struct State {
    /// containerd's directory.
    pub bundle: PathBuf,
    /// Process id.
    pub pid: u32,
    /// Where it is in its life.
    pub phase: Phase,
    /// Its container is paused.
    pub paused: bool,
    /// Standard streams, as they were asked for.
    pub io: Wanted,
    /// How it ended.
    pub exit: Option<Exit>,
}

/// The answer to a [`Call`].
#[derive(Clone, Debug)]
pub enum Reply {
    /// It is done.
    Done,
    /// A process id.
    Pid(u32),
    /// Process ids.
    Pids(Vec<u32>),
    /// A process and how it ended, if it ever ran.
    Exit(u32, Option<Exit>),
    /// What can be said of a process.
    State(State),
    /// Encoded metrics.
    Stats(Vec<u8>),
}

/// Why a call failed.
#[derive(Debug, Error)]
pub enum TaskError {
    /// The sandbox is not in the state for it.
    #[error("{}", refusal_text(.0, .1))]
    Refused(Refusal, ProcessKey),
    /// containerd's directory is not in order.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// An annotation asks for something that is not allowed.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// The container wants something that cannot be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The root file system is of an unknown kind.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A list of patches is not in order.
    #[error(transparent)]
    Patches(#[from] PatchesError),
    /// A root or volume of nacelle's own words is not in order.
    #[error(transparent)]
    Sources(#[from] SourcesError),
    /// The configuration is not in order.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The pod cannot be set up.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The guest says no.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// What the container has written does not reach its snapshot.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The streams cannot be opened.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// A volume cannot be bound.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// A hook says no.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A part of the request cannot be read.
    #[error("read {what}")]
    Decode {
        /// The part.
        what: &'static str,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The VM was ended because of what its guest did.
    #[error("container {0}: the sandbox's VM was ended: {1}")]
    Ended(ContainerId, String),
    /// A pod's sandbox was asked for something that needs a process.
    #[error("{0} in sandbox {1}: a pod's sandbox has no process of its own")]
    NoProcess(&'static str, ContainerId),
    /// The shim is on its way out.
    #[error("the shim is shutting down")]
    Leaving,
}

fn refusal_text(refusal: &Refusal, key: &ProcessKey) -> String {
    let name = match &key.exec {
        Some(exec) => format!("exec {exec} of container {}", key.container),
        None => format!("container {}", key.container),
    };
    match refusal {
        Refusal::NotFound => format!("{name}: not found"),
        Refusal::Finished => format!("{name}: process already finished"),
        Refusal::Exists => format!("{name}: already exists"),
        Refusal::WrongPhase(why) => format!("{name}: {why}"),
        Refusal::Booting => format!("{name}: the sandbox is still booting"),
        Refusal::VmGone => format!("{name}: the sandbox's VM is gone"),
    }
}
