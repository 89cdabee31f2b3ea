//! The pod and its processes: a pure state machine, `(state, event) -> (state, actions)`.
//!
//! ```text
//!  VM         Cold ──first Create──► Booting ──ok──► Up ──gone──► Gone
//!              ▲                        │             │             ▲
//!              └────────failed──────────┘             └─last Delete─┘
//!
//!  process    Creating ──ok──► Created ──Start──► Starting ──ok──► Running ──exit──► Stopped ──Delete──► Deleting ──ok──► –
//!                 │               │  ▲                │                                 ▲
//!                 └─failed─► –    │  └────failed──────┘                                 │
//!                                 └──────────────────exit─────────────────────────────┘
//! ```
//!
//! Invariants, which the tests try to break with random sequences:
//! - Notices of a container come in the order create, start, exit, delete, and an OOM comes before the exit.
//! - Every process that was created (a container) or started (an exec) exits exactly once, whatever the guest says.
//! - A container's exit comes after those of its execs.
//! - Every request is answered at most once, and at the latest when its process is gone.
//!
//! An exit that comes too early waits in `exit` and the process keeps its phase: to the outside it has not exited yet.
//! This module does no I/O and knows neither ttrpc nor the guest's protocol; [`crate::driver`] performs its actions.

use std::collections::{BTreeMap, HashMap};

use nacelle_protocol::ids::{ContainerId, ExecId};

pub use vocabulary::{
    Action, Answer, Event, Exit, KILLED, Notice, Phase, ProcessKey, Refusal, Request, Snapshot, Token,
};

#[cfg(test)]
mod tests;
mod vocabulary;

#[derive(Debug)]
struct Process {
    phase: Phase,
    pid: u32,
    exit: Option<Exit>,
    waiters: Vec<Token>,
    /// A Delete that waits for the exit of a container that never started.
    delete: Option<Token>,
    /// Deletes behind the one that is under way.
    deletes: Vec<Token>,
}

#[derive(Debug)]
struct Container {
    init: Process,
    execs: BTreeMap<ExecId, Process>,
    paused: bool,
    oom: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vm {
    Cold,
    Booting,
    Up,
    Gone,
}

/// The pod.
#[derive(Debug)]
pub struct Sandbox {
    vm: Vm,
    containers: BTreeMap<ContainerId, Container>,
    in_flight: HashMap<Token, Request>,
    /// How the VM took with it what ran in it.
    lost: Option<Exit>,
}

impl Process {
    fn new() -> Self {
        Self { phase: Phase::Creating, pid: 0, exit: None, waiters: Vec::new(), delete: None, deletes: Vec::new() }
    }

    /// It runs, or may: an exit is still to come.
    fn unsettled(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Running)
    }
}

impl Default for Sandbox {
    /// A sandbox without a VM.
    fn default() -> Self {
        Self { vm: Vm::Cold, containers: BTreeMap::new(), in_flight: HashMap::new(), lost: None }
    }
}

impl Sandbox {
    /// What can be seen of a process; `None` where there is none, or not yet.
    pub fn snapshot(&self, key: &ProcessKey) -> Option<Snapshot> {
        let container = self.containers.get(&key.container)?;
        let process = self.process(key)?;
        let exit = process.exit.filter(|_| matches!(process.phase, Phase::Stopped | Phase::Deleting));
        Some(Snapshot { phase: process.phase, pid: process.pid, exit, paused: container.paused })
    }

    /// True when the next container has to boot the VM.
    pub fn cold(&self) -> bool {
        matches!(self.vm, Vm::Cold | Vm::Booting)
    }

    /// True while the first container's VM is on its way.
    pub fn booting(&self) -> bool {
        self.vm == Vm::Booting
    }

    /// Takes an event, changes the state, and says what has to be done.
    pub fn apply(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Request(token, request) => {
                if let Err(refusal) = self.request(token, request, &mut out) {
                    out.push(Action::Answer(token, Answer::Refused(refusal)));
                }
            }
            Event::Done(token, result) => self.done(token, result, &mut out),
            Event::Exited(key, exit) => {
                // A main process may be faster than the answer to its creation; an exec runs once it is started.
                let possible = self.process(&key).is_some_and(|p| key.exec.is_none() || p.unsettled());
                if possible {
                    self.exited(&key, exit, &mut out);
                } else {
                    out.push(Action::Suspect("exit of a process that does not run", key));
                }
            }
            Event::Oom(id) => match self.containers.get_mut(&id) {
                Some(c) if c.init.exit.is_none() && c.init.phase != Phase::Creating => {
                    if !std::mem::replace(&mut c.oom, true) {
                        out.push(Action::Publish(Notice::Oom { container: id }));
                    }
                }
                _ => out.push(Action::Suspect(
                    "out of memory in a container that does not run",
                    ProcessKey { container: id, exec: None },
                )),
            },
            Event::VmGone(at_ns) => {
                self.vm = Vm::Gone;
                let exit = *self.lost.get_or_insert(Exit { status: KILLED, at_ns });
                let ids: Vec<_> = self.containers.keys().cloned().collect();
                for id in ids {
                    self.lose(&id, exit, true, &mut out);
                }
            }
            Event::Overdue(id) => {
                if let Some(exit) = self.containers.get(&id).and_then(|c| c.init.exit) {
                    self.lose(&id, Exit { status: KILLED, ..exit }, false, &mut out);
                }
            }
            Event::Forget(token) => {
                for container in self.containers.values_mut() {
                    container.init.waiters.retain(|t| *t != token);
                    container.execs.values_mut().for_each(|p| p.waiters.retain(|t| *t != token));
                }
            }
        }
        out
    }

    fn request(&mut self, token: Token, request: Request, out: &mut Vec<Action>) -> Result<(), Refusal> {
        match &request {
            Request::Create(id) => {
                if self.containers.contains_key(id) {
                    return Err(Refusal::Exists);
                }
                match self.vm {
                    Vm::Cold => self.vm = Vm::Booting,
                    Vm::Booting => return Err(Refusal::Booting),
                    Vm::Up => {}
                    Vm::Gone => return Err(Refusal::VmGone),
                }
                let container = Container { init: Process::new(), execs: BTreeMap::new(), paused: false, oom: false };
                self.containers.insert(id.clone(), container);
            }
            Request::Exec(id, exec) => {
                let container = self.running(id)?;
                if container.execs.contains_key(exec) {
                    return Err(Refusal::Exists);
                }
                if container.paused {
                    return Err(Refusal::WrongPhase("the container is paused"));
                }
                container.execs.insert(exec.clone(), Process::new());
            }
            Request::Start(key) => {
                if key.exec.is_some() {
                    self.running(&key.container)?;
                }
                let up = self.vm == Vm::Up;
                let process = self.visible(key)?;
                match process.phase {
                    Phase::Created if !up => return Err(Refusal::VmGone),
                    Phase::Created if process.exit.is_none() && process.delete.is_none() => {
                        process.phase = Phase::Starting;
                    }
                    Phase::Stopped | Phase::Deleting => return Err(Refusal::WrongPhase("the process has finished")),
                    _ => return Err(Refusal::WrongPhase("the process was started before")),
                }
            }
            Request::Delete(key) => {
                let process = self.visible(key)?;
                match process.phase {
                    Phase::Stopped => process.phase = Phase::Deleting,
                    Phase::Created if key.exec.is_some() => process.phase = Phase::Deleting,
                    Phase::Created if process.delete.is_none() => {
                        process.delete = Some(token);
                        out.push(Action::KillCreated(key.container.clone()));
                        self.in_flight.insert(token, request);
                        return Ok(());
                    }
                    // A client that went away may have begun it: who comes next must not be told that it failed.
                    Phase::Created | Phase::Deleting => {
                        process.deletes.push(token);
                        self.in_flight.insert(token, request);
                        return Ok(());
                    }
                    _ => return Err(Refusal::WrongPhase("the process is still running")),
                }
            }
            Request::Kill(key) => {
                let gone = self.vm != Vm::Up;
                let process = self.visible(key)?;
                if gone || process.exit.is_some() {
                    return Err(Refusal::Finished);
                }
                if key.exec.is_some() && process.phase == Phase::Created {
                    return Err(Refusal::WrongPhase("the process was not started"));
                }
            }
            Request::Wait(key) => {
                let process = self.visible(key)?;
                match (process.phase, process.exit) {
                    (Phase::Stopped | Phase::Deleting, Some(exit)) => {
                        out.push(Action::Answer(token, Answer::Exit(exit)))
                    }
                    _ => process.waiters.push(token),
                }
                return Ok(());
            }
            Request::Pause(id) => {
                if self.running(id)?.paused {
                    return Err(Refusal::WrongPhase("the container is paused"));
                }
            }
            Request::Resume(id) => {
                if !self.running(id)?.paused {
                    return Err(Refusal::WrongPhase("the container is not paused"));
                }
            }
            Request::Query(key) => {
                let gone = self.vm != Vm::Up;
                let process = self.visible(key)?;
                if gone || process.exit.is_some() {
                    out.push(Action::PerformStopped(token));
                    return Ok(());
                }
            }
            Request::Shutdown => {
                if self.containers.is_empty() {
                    self.vm = Vm::Gone;
                    out.push(Action::Leave(token));
                } else {
                    out.push(Action::Answer(token, Answer::Ok));
                }
                return Ok(());
            }
        }
        self.in_flight.insert(token, request);
        out.push(Action::Perform(token));
        Ok(())
    }

    fn done(&mut self, token: Token, result: Result<u32, ()>, out: &mut Vec<Action>) {
        let Some(request) = self.in_flight.remove(&token) else { return };
        match request {
            Request::Create(container) => self.created(&container, result, out),
            Request::Exec(container, exec) => {
                let Some(parent) = self.containers.get_mut(&container) else {
                    out.push(Action::Answer(token, Answer::Refused(Refusal::NotFound)));
                    return;
                };
                match result {
                    Ok(_) => {
                        if let Some(process) = parent.execs.get_mut(&exec) {
                            process.phase = Phase::Created;
                        }
                        out.push(Action::Publish(Notice::ExecAdded { container, exec }));
                    }
                    Err(()) => drop(parent.execs.remove(&exec)),
                }
            }
            Request::Start(process) => self.started(process, result, out),
            Request::Delete(key) => self.deleted(token, &key, result, out),
            Request::Pause(container) | Request::Resume(container) if result.is_err() => drop(container),
            Request::Pause(container) => {
                if let Some(c) = self.containers.get_mut(&container) {
                    c.paused = true;
                    out.push(Action::Publish(Notice::Paused { container }));
                }
            }
            Request::Resume(container) => {
                if let Some(c) = self.containers.get_mut(&container) {
                    c.paused = false;
                    out.push(Action::Publish(Notice::Resumed { container }));
                }
            }
            Request::Kill(_) | Request::Query(_) | Request::Wait(_) | Request::Shutdown => {}
        }
        // What is held back by this request follows what it says itself; the answer comes before both, so that nobody
        // hears of an exit of a process that he does not know yet.
        out.insert(0, Action::Answer(token, Answer::Performed));
    }

    fn created(&mut self, id: &ContainerId, result: Result<u32, ()>, out: &mut Vec<Action>) {
        match result {
            Ok(pid) => {
                if self.vm == Vm::Booting {
                    self.vm = Vm::Up;
                }
                if let Some(container) = self.containers.get_mut(id) {
                    container.init.phase = Phase::Created;
                    container.init.pid = pid;
                    // The VM may have gone since it said that it was done.
                    container.init.exit = container.init.exit.or(self.lost);
                }
                out.push(Action::Publish(Notice::Create { container: id.clone(), pid }));
                self.settle(id, out);
            }
            Err(()) => {
                self.containers.remove(id);
                if self.vm == Vm::Booting {
                    self.vm = Vm::Cold;
                }
            }
        }
    }

    fn started(&mut self, key: ProcessKey, result: Result<u32, ()>, out: &mut Vec<Action>) {
        let Some(process) = self.process_mut(&key) else { return };
        match result {
            Ok(pid) => {
                process.phase = Phase::Running;
                process.pid = pid;
                out.push(Action::Publish(Notice::Start { process: key.clone(), pid }));
            }
            Err(()) => {
                process.phase = Phase::Created;
                // An exec that never ran has nothing to exit from.
                if key.exec.is_some() {
                    process.exit = None;
                }
            }
        }
        self.settle(&key.container, out);
    }

    fn deleted(&mut self, token: Token, key: &ProcessKey, result: Result<u32, ()>, out: &mut Vec<Action>) {
        let Some(process) = self.process_mut(key) else { return };
        if result.is_err() {
            process.phase = if process.exit.is_some() { Phase::Stopped } else { Phase::Created };
            if !process.deletes.is_empty() {
                process.phase = Phase::Deleting;
                out.push(Action::Perform(process.deletes.remove(0)));
            }
            return;
        }
        let removed: Vec<Process> = match &key.exec {
            Some(exec) => {
                self.containers.get_mut(&key.container).and_then(|c| c.execs.remove(exec)).into_iter().collect()
            }
            None => {
                let Some(container) = self.containers.remove(&key.container) else { return };
                let (pid, exit) = (container.init.pid, container.init.exit);
                if let Some(exit) = exit {
                    out.push(Action::Publish(Notice::Delete { container: key.container.clone(), pid, exit }));
                }
                let mut all: Vec<_> = container.execs.into_values().collect();
                all.push(container.init);
                all
            }
        };
        for process in removed {
            for waiter in process.waiters.into_iter().filter(|t| *t != token) {
                out.push(Action::Answer(waiter, Answer::Refused(Refusal::NotFound)));
            }
            for late in process.deletes {
                self.in_flight.remove(&late);
                out.push(Action::Answer(late, Answer::Deleted(process.pid, process.exit)));
            }
        }
        if self.containers.is_empty() && self.vm == Vm::Up {
            self.vm = Vm::Gone;
            out.push(Action::StopVm);
        }
    }

    /// Takes note of an exit, and says so when its turn has come.
    fn exited(&mut self, key: &ProcessKey, exit: Exit, out: &mut Vec<Action>) {
        let Some(process) = self.process_mut(key) else { return };
        if process.exit.is_some() {
            out.push(Action::Suspect("second exit of a process", key.clone()));
            return;
        }
        process.exit = Some(exit);
        self.settle(&key.container, out);
        let held = key.exec.is_none()
            && self.containers.get(&key.container).is_some_and(|c| c.execs.values().any(Process::unsettled));
        if held {
            out.push(Action::Hold(key.container.clone()));
        }
    }

    /// Ends what still runs in a container: its execs, and its main process if `init` says so.
    fn lose(&mut self, id: &ContainerId, exit: Exit, init: bool, out: &mut Vec<Action>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        for process in container.execs.values_mut().filter(|p| p.unsettled()) {
            process.exit.get_or_insert(exit);
        }
        if init && container.init.phase != Phase::Creating {
            container.init.exit.get_or_insert(exit);
        }
        self.settle(id, out);
    }

    /// Says the exits whose turn has come: execs first, then the main process.
    fn settle(&mut self, id: &ContainerId, out: &mut Vec<Action>) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let key = |exec: Option<&ExecId>| ProcessKey { container: id.clone(), exec: exec.cloned() };
        for (exec, process) in &mut container.execs {
            if process.phase == Phase::Running {
                say_exit(key(Some(exec)), process, out);
            }
        }
        let waiting = container.execs.values().any(Process::unsettled);
        if !waiting && matches!(container.init.phase, Phase::Created | Phase::Running) {
            say_exit(key(None), &mut container.init, out);
        }
    }

    fn process(&self, key: &ProcessKey) -> Option<&Process> {
        let container = self.containers.get(&key.container)?;
        let process = key.exec.as_ref().map_or(Some(&container.init), |exec| container.execs.get(exec))?;
        Some(process)
    }

    fn process_mut(&mut self, key: &ProcessKey) -> Option<&mut Process> {
        let container = self.containers.get_mut(&key.container)?;
        match &key.exec {
            Some(exec) => container.execs.get_mut(exec),
            None => Some(&mut container.init),
        }
    }

    /// The process as callers know it: one that is still being created does not exist.
    fn visible(&mut self, key: &ProcessKey) -> Result<&mut Process, Refusal> {
        self.process_mut(key).filter(|p| p.phase != Phase::Creating).ok_or(Refusal::NotFound)
    }

    /// The container, if its main process runs.
    fn running(&mut self, id: &ContainerId) -> Result<&mut Container, Refusal> {
        let up = self.vm == Vm::Up;
        let container = self.containers.get_mut(id).filter(|c| c.init.phase != Phase::Creating);
        let container = container.ok_or(Refusal::NotFound)?;
        if up && container.init.phase == Phase::Running && container.init.exit.is_none() {
            Ok(container)
        } else {
            Err(Refusal::WrongPhase("the container is not running"))
        }
    }
}

/// Says the exit of a process that has one, answers those who wait for it, and goes on with a Delete that does.
fn say_exit(key: ProcessKey, process: &mut Process, out: &mut Vec<Action>) {
    let Some(exit) = process.exit else { return };
    process.phase = Phase::Stopped;
    out.push(Action::Publish(Notice::Exit { process: key, pid: process.pid, exit }));
    out.extend(process.waiters.drain(..).map(|token| Action::Answer(token, Answer::Exit(exit))));
    if let Some(token) = process.delete.take() {
        process.phase = Phase::Deleting;
        out.push(Action::Perform(token));
    }
}
