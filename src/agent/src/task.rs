//! One container and its processes: what state they are in, and in which order their ends are told. No I/O.
//!
//! ```text
//!  process   Created ──start──► Starting ──► Running ──exits──► Stopped       (an exec that cannot start: ► Stopped)
//!
//!  the main process has ended ─► every other process is killed
//!        its end is told only when no exec runs or starts any more, so it is the last of the container
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use nacelle_protocol::agent::Rootfs;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::cgroup::Cgroup;
use crate::reap::Ended;
use crate::spawn::Report;
use crate::spec::Defaults;
use crate::stdio::{Io, Names};

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Known, and not started.
    Created,
    /// Being started.
    Starting,
    /// Executes its program.
    Running,
    /// Has ended, and its end has been told.
    Stopped(Ended),
}

/// A container's main process or an exec.
pub struct Process {
    /// Process id in the guest; 0 for an exec that has not been started.
    pub pid: u32,
    /// Where it is in its life.
    pub phase: Phase,
    /// Its streams.
    pub names: Names,
    /// What carries them.
    pub io: Io,
    exit: watch::Sender<Option<Ended>>,
}

impl Process {
    /// A process that has not been started.
    pub fn new(names: Names) -> Self {
        Self { pid: 0, phase: Phase::Created, names, io: Io::default(), exit: watch::Sender::new(None) }
    }

    /// Takes note of its end, and wakes whoever waits for it.
    pub fn stop(&mut self, ended: Ended) {
        self.phase = Phase::Stopped(ended);
        self.exit.send_replace(Some(ended));
    }

    /// Yields the process's end, once.
    pub fn exit(&self) -> watch::Receiver<Option<Ended>> {
        self.exit.subscribe()
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<Ended> {
        match self.phase {
            Phase::Stopped(ended) => Some(ended),
            _ => None,
        }
    }
}

/// An exec: a process that is described before it is started.
pub struct Exec {
    /// The process.
    pub process: Process,
    /// The OCI process, as JSON.
    pub spec: Vec<u8>,
}

/// A container.
pub struct Container {
    /// The main process.
    pub init: Process,
    /// The others, by exec id.
    pub execs: BTreeMap<String, Exec>,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its root file system.
    pub rootfs: Rootfs,
    /// Its volumes that are disks, by serial number.
    pub disks: Vec<String>,
    /// Where its volumes are in the share.
    pub volumes: Vec<PathBuf>,
    /// Its volumes that are copies.
    pub mirrors: Vec<String>,
    /// What execs take from it.
    pub defaults: Defaults,
    /// What the main process says when it is started.
    pub report: Option<Report>,
    /// Its processes are frozen.
    pub paused: bool,
    /// How often the kernel has killed for want of memory, as far as it has been told.
    pub oom_kills: u64,
    /// The last numbers, once no process is left.
    pub last_stats: Option<Metrics>,
    /// Carries messages to the process that serves its files, which ends with it.
    pub files: Option<Io>,
    /// Tells of memory events.
    pub memory_watch: AbortHandle,
    /// The main process has ended, but that has not been told.
    pub init_ended: Option<Ended>,
    /// The exit code is this one, because the program was never executed.
    pub init_code: Option<u32>,
    /// libcontainer's directory of containers, for this one alone.
    pub state: PathBuf,
}

impl Drop for Container {
    fn drop(&mut self) {
        self.memory_watch.abort();
    }
}

impl Container {
    /// Whether the main process executes its program.
    pub fn is_running(&self) -> bool {
        self.init.phase == Phase::Running && self.init_ended.is_none()
    }

    /// The end of the main process, if now is the time to tell it.
    pub fn last_end(&self) -> Option<Ended> {
        let busy = |exec: &Exec| matches!(exec.process.phase, Phase::Starting | Phase::Running);
        if self.init.ended().is_some() || self.execs.values().any(busy) {
            return None;
        }
        let ended = self.init_ended?;
        Some(Ended { status: self.init_code.unwrap_or(ended.status), ..ended })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_waits_hears_of_the_end_also_afterwards() {
        let mut process = Process::new(Names::default());
        let mut before = process.exit();
        process.stop(Ended { status: 3, at_ns: 1 });
        for exit in [&mut before, &mut process.exit()] {
            let ended = exit.wait_for(Option::is_some).await.expect("sender lives").expect("ended");
            assert_eq!(ended.status, 3);
        }
    }
}
