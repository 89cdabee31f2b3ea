//! The words of the state machine: what can be asked of a sandbox, what can happen to it, what has to be done then, and what
//! is told.

use nacelle_protocol::ids::{ContainerId, ExecId};

/// Names a request until it is answered.
pub type Token = u64;

/// Exit status of a process that went with its VM: 128 + SIGKILL.
pub const KILLED: u32 = 137;

/// Names a process: a container's main process, or an exec.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessKey {
    /// The container.
    pub container: ContainerId,
    /// The exec; `None` is the main process.
    pub exec: Option<ExecId>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// As a shell says it.
    pub status: u32,
    /// Nanoseconds since 1970.
    pub at_ns: i64,
}

/// What a caller asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Create a container; the first one boots the VM.
    Create(ContainerId),
    /// Register an exec.
    Exec(ContainerId, ExecId),
    /// Start a process.
    Start(ProcessKey),
    /// Forget a process.
    Delete(ProcessKey),
    /// Send a signal.
    Kill(ProcessKey),
    /// Answer when the process has exited.
    Wait(ProcessKey),
    /// Stop the container's processes.
    Pause(ContainerId),
    /// Let them go on.
    Resume(ContainerId),
    /// Anything else that concerns a process and does not change its phase.
    Query(ProcessKey),
    /// Leave, if there is no container.
    Shutdown,
}

/// What happens to a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request came in.
    Request(Token, Request),
    /// What [`Action::Perform`] started has ended; `Ok` holds the process id of a create or a start.
    Done(Token, Result<u32, ()>),
    /// The guest claims that a process ended.
    Exited(ProcessKey, Exit),
    /// The guest claims that a container ran out of memory.
    Oom(ContainerId),
    /// The VM is gone, at this time.
    VmGone(i64),
    /// The time that [`Action::Hold`] asked for is over.
    Overdue(ContainerId),
    /// The caller has gone away.
    Forget(Token),
}

/// What has to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Do what the request asks, then report [`Event::Done`].
    Perform(Token),
    /// Do what the request asks as far as it goes without the process, and answer it.
    PerformStopped(Token),
    /// Answer the request.
    Answer(Token, Answer),
    /// Tell containerd.
    Publish(Notice),
    /// Kill a container that was never started, so that it exits.
    KillCreated(ContainerId),
    /// Report [`Event::Overdue`] after a while.
    Hold(ContainerId),
    /// There is no container left: end the VM.
    StopVm,
    /// Answer this request once everything is cleaned up, and leave.
    Leave(Token),
    /// The guest claimed something that cannot be.
    Suspect(&'static str, ProcessKey),
}

/// How a request ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// With what performing it gave.
    Performed,
    /// With nothing to say.
    Ok,
    /// With an exit.
    Exit(Exit),
    /// With what the Delete before it gave.
    Deleted(u32, Option<Exit>),
    /// Not at all.
    Refused(Refusal),
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such process.
    NotFound,
    /// The process has finished.
    Finished,
    /// The id is taken.
    Exists,
    /// The process is not in the phase for it.
    WrongPhase(&'static str),
    /// The VM is not there yet.
    Booting,
    /// The VM is gone.
    VmGone,
}

/// What containerd is told.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of containerd's events")]
pub enum Notice {
    Create { container: ContainerId, pid: u32 },
    Start { process: ProcessKey, pid: u32 },
    ExecAdded { container: ContainerId, exec: ExecId },
    Exit { process: ProcessKey, pid: u32, exit: Exit },
    Oom { container: ContainerId },
    Delete { container: ContainerId, pid: u32, exit: Exit },
    Paused { container: ContainerId },
    Resumed { container: ContainerId },
}

impl Notice {
    /// The container that it is about.
    pub fn container(&self) -> &ContainerId {
        match self {
            Self::Start { process, .. } | Self::Exit { process, .. } => &process.container,
            Self::Create { container, .. }
            | Self::ExecAdded { container, .. }
            | Self::Oom { container }
            | Self::Delete { container, .. }
            | Self::Paused { container }
            | Self::Resumed { container } => container,
        }
    }
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "drawn at the head of the parent module")]
pub enum Phase {
    Creating,
    Created,
    Starting,
    Running,
    Stopped,
    Deleting,
}

/// What can be seen of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its phase.
    pub phase: Phase,
    /// Its process id as containerd knows it; 0 until it has one.
    pub pid: u32,
    /// How it ended, once it is stopped.
    pub exit: Option<Exit>,
    /// Its container is paused.
    pub paused: bool,
}
