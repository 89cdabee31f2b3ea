//! What is done to containers and processes that exist: look, wait, signal, freeze, limit, measure.

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use oci_spec::runtime::LinuxResources;
use rustix::process::Signal;
use rustix::termios::{Winsize, tcsetwinsize};
use rustix_libc_wrappers::process::SignalExt as _;

use crate::cgroup::Cgroup;
use crate::guest::{Guest, GuestError, label};
use crate::reap::Ended;
use crate::stats::{hugepage_sizes, metrics};
use crate::stdio::Names;
use crate::task::Phase;

/// What the host may know of a process.
pub struct Look {
    /// Process id in the guest; 0 for an exec that has not been started.
    pub pid: u32,
    /// Where it is in its life.
    pub phase: Phase,
    /// Its container is frozen.
    pub paused: bool,
    /// Its streams.
    pub names: Names,
}

impl Guest {
    /// Looks at a process.
    ///
    /// # Errors
    /// [`GuestError::NotFound`]
    pub fn look(&self, id: &str, exec_id: &str) -> Result<Look, GuestError> {
        let paused = self.with(id, |container| Ok(container.paused))?;
        self.with_process(id, exec_id, |process| {
            Ok(Look { pid: process.pid, phase: process.phase, paused, names: process.names.clone() })
        })
    }

    /// Waits for the end of a process, also one that has not been started.
    ///
    /// # Errors
    /// [`GuestError::NotFound`], also when it is deleted without ever having run.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Ended, GuestError> {
        let mut exit = self.with_process(id, exec_id, |process| Ok(process.exit()))?;
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|ended| *ended);
        ended.ok_or_else(|| GuestError::NotFound(label(id, exec_id)))
    }

    /// Sends a signal to a process, or with `all` to every process of the container.
    ///
    /// # Errors
    /// [`GuestError::NotFound`] when it has ended, which is what callers look for.
    pub fn kill(&self, id: &str, exec_id: &str, number: u32, all: bool) -> Result<(), GuestError> {
        let name = label(id, exec_id);
        let signal = i32::try_from(number).ok().and_then(Signal::from_raw);
        let signal = signal.ok_or_else(|| GuestError::Request(format!("no signal has the number {number}")))?;
        let finished = || GuestError::NotFound(format!("{name}, process already finished"));
        let system = |error: rustix::io::Errno| GuestError::System(format!("signal {name}"), error.into());
        self.with(id, |container| {
            if all && exec_id.is_empty() {
                if container.init_ended.is_some() {
                    return Err(finished());
                }
                let cgroup_error = |error| GuestError::Cgroup(name.clone(), error);
                if signal == Signal::KILL {
                    return container.cgroup.kill().map_err(cgroup_error);
                }
                for pid in container.cgroup.pids().map_err(cgroup_error)? {
                    signal_any(pid, signal).map_err(system)?;
                }
                return Ok(());
            }
            let process = match exec_id {
                "" => Some(&container.init),
                _ => container.execs.get(exec_id).map(|exec| &exec.process),
            };
            let process = process.ok_or_else(|| GuestError::NotFound(name.clone()))?;
            if process.pid == 0 && process.ended().is_none() {
                return Err(GuestError::State(format!("signal {name}"), "it has not been started"));
            }
            match self.reaper.signal(process.pid, signal) {
                Ok(true) => Ok(()),
                Ok(false) => Err(finished()),
                Err(error) => Err(system(error)),
            }
        })
    }

    /// Every process of a container.
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn pids(&self, id: &str) -> Result<Vec<u32>, GuestError> {
        self.with(id, |container| {
            if container.last_stats.is_some() {
                return Ok(Vec::new());
            }
            container.cgroup.pids().map_err(|error| GuestError::Cgroup(label(id, ""), error))
        })
    }

    /// Freezes a container's processes, or lets them run again, and returns when it is so.
    ///
    /// # Errors
    /// [`GuestError`]
    pub async fn freeze(&self, id: &str, frozen: bool) -> Result<(), GuestError> {
        let cgroup = self.with(id, |container| {
            if !container.is_running() {
                let verb = if frozen { "pause" } else { "resume" };
                return Err(GuestError::State(format!("{verb} {}", label(id, "")), "it does not run"));
            }
            Ok(container.cgroup.clone())
        })?;
        cgroup.freeze(frozen).await.map_err(|error| GuestError::Cgroup(label(id, ""), error))?;
        self.with(id, |container| {
            container.paused = frozen;
            Ok(())
        })
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn update(&self, id: &str, resources: &[u8]) -> Result<(), GuestError> {
        let resources: LinuxResources =
            serde_json::from_slice(resources).map_err(|error| GuestError::Request(format!("resources: {error}")))?;
        self.with(id, |container| {
            container.cgroup.apply(&resources).map_err(|error| GuestError::Cgroup(label(id, ""), error))
        })
    }

    /// A container's numbers; after its end the last ones. Without an id those of all containers together.
    ///
    /// # Errors
    /// [`GuestError::NotFound`]
    pub fn stats(&self, id: &str) -> Result<Metrics, GuestError> {
        if id.is_empty() {
            let pod = Cgroup::pod();
            return Ok(metrics(|file| pod.read(file), &hugepage_sizes()));
        }
        self.with(id, |container| {
            let now = || metrics(|file| container.cgroup.read(file), &hugepage_sizes());
            Ok(container.last_stats.clone().unwrap_or_else(now))
        })
    }

    /// Sets the size of a process's terminal, if it has one.
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn resize(&self, id: &str, exec_id: &str, columns: u32, rows: u32) -> Result<(), GuestError> {
        let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let size = Winsize { ws_row: cells(rows), ws_col: cells(columns), ws_xpixel: 0, ws_ypixel: 0 };
        self.with_process(id, exec_id, |process| match process.io.terminal() {
            Some(terminal) => tcsetwinsize(terminal, size).map_err(|error| {
                GuestError::System(format!("resize terminal of {}", label(id, exec_id)), error.into())
            }),
            None => Ok(()),
        })
    }

    /// Closes a process's stdin.
    ///
    /// # Errors
    /// [`GuestError::NotFound`]
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), GuestError> {
        self.with_process(id, exec_id, |process| {
            process.io.close_stdin();
            Ok(())
        })
    }

    /// Kills every process of every container.
    pub fn kill_all(&self) {
        for (id, container) in self.table().iter() {
            if let Some(container) = container {
                self.kill_rest(id, &container.cgroup);
            }
        }
    }
}

/// Signals a process that is not ours to wait for; it may be gone.
fn signal_any(pid: u32, signal: Signal) -> Result<(), rustix::io::Errno> {
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return Ok(()) };
    match rustix::process::kill_process(pid, signal) {
        Err(rustix::io::Errno::SRCH) => Ok(()),
        sent => sent,
    }
}
