//! Execs: register, start, delete.
//!
//! libcontainer leaves a notify socket, and with a terminal a link, in the directory of the container that it joins. So
//! each start gets a directory of its own with a copy of the container's state, and it is gone when the start is over.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nacelle_protocol::ids::ExecId;

use crate::create::{directory, write_json};
use crate::guest::{Guest, GuestError, MAX_ENTRIES, label};
use crate::reap::Ended;
use crate::runner::{Job, Operation};
use crate::spawn::{self, SpawnError};
use crate::spec::{self, ExecPlan};
use crate::stdio::{self, Io, Names};
use crate::task::{Exec, Phase, Process};

/// Exit status of an exec that could not be started, and nobody knows better.
const NOT_STARTED: u32 = 255;

/// The directory of one start.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            crate::say!("remove {}: {error}", self.0.display());
        }
    }
}

impl Guest {
    /// Registers an exec; nothing runs before [`Guest::start_exec`].
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn exec(&self, id: &str, exec_id: &str, spec: Vec<u8>, names: Names) -> Result<(), GuestError> {
        ExecId::new(exec_id).map_err(|error| GuestError::Request(error.to_string()))?;
        let name = label(id, exec_id);
        stdio::check(&names).map_err(|error| GuestError::Stdio(name.clone(), error))?;
        self.with(id, |container| {
            if container.execs.contains_key(exec_id) {
                return Err(GuestError::Exists(name));
            }
            if container.execs.len() >= MAX_ENTRIES {
                return Err(GuestError::Full(name, "the container has too many execs"));
            }
            if container.init_ended.is_some() {
                return Err(GuestError::State(format!("add {name}"), "the container has ended"));
            }
            // Refused now rather than at its start.
            spec::plan_exec(&spec, &container.defaults, names.terminal)
                .map_err(|error| GuestError::Spec(name, error))?;
            container.execs.insert(exec_id.to_owned(), Exec { process: Process::new(names), spec });
            Ok(())
        })
    }

    /// Starts an exec. Returns its pid once its program is executed.
    ///
    /// # Errors
    /// [`GuestError`]. The exec has ended then, unless it was refused for the state it or its container is in.
    pub async fn start_exec(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, GuestError> {
        let verb = || format!("start {}", label(id, exec_id));
        if self.events.is_full() {
            return Err(GuestError::Full(verb(), "the host does not take note of events"));
        }
        let (plan, names, state) = self.with(id, |container| {
            let state = container.state.join(id).join("state.json");
            let refused = match (container.is_running(), container.paused) {
                (false, _) => Some("the container does not run"),
                (true, true) => Some("the container is paused"),
                (true, false) => None,
            };
            let exec = container.execs.get_mut(exec_id).ok_or_else(|| GuestError::NotFound(label(id, exec_id)))?;
            if exec.process.phase != Phase::Created {
                return Err(GuestError::State(verb(), "it was started already"));
            }
            if let Some(refused) = refused {
                return Err(GuestError::State(verb(), refused));
            }
            let plan = spec::plan_exec(&exec.spec, &container.defaults, exec.process.names.terminal)
                .map_err(|error| GuestError::Spec(label(id, exec_id), error))?;
            exec.process.phase = Phase::Starting;
            Ok((plan, exec.process.names.clone(), state))
        })?;

        // From here on the container cannot go away: it does not end while an exec starts.
        let start = self.reaper.start();
        let started = self.launch(id, exec_id, plan, &names, &state, &start).await;
        let started = self.with(id, |container| {
            let Some(exec) = container.execs.get_mut(exec_id) else {
                return Err(GuestError::NotFound(label(id, exec_id)));
            };
            match started {
                Ok((pid, io)) => {
                    exec.process.pid = pid;
                    exec.process.io = io;
                    exec.process.phase = Phase::Running;
                    if container.init_ended.is_some() {
                        // It came after everything else was killed.
                        self.kill_rest(id, &container.cgroup);
                    }
                    Ok(pid)
                }
                Err(error) => {
                    exec.process.stop(Ended::now(status(&error)));
                    self.tell_last_end(id, container);
                    Err(error)
                }
            }
        });
        if let Ok(pid) = started {
            let ended = start.watch(pid);
            let (guest, id, exec_id) = (self.clone(), id.to_owned(), exec_id.to_owned());
            tokio::spawn(async move {
                if let Ok(ended) = ended.await {
                    guest.exec_ended(&id, &exec_id, ended);
                }
            });
        }
        started
    }

    async fn launch(
        &self,
        id: &str,
        exec_id: &str,
        mut plan: ExecPlan,
        names: &Names,
        state: &Path,
        start: &crate::reap::Start,
    ) -> Result<(u32, Io), GuestError> {
        let (streams, stdio) = self.streams(id, exec_id, names, self.outside(plan.owner)).await?;
        if let Some(terminal) = plan.execute.terminal.as_mut().filter(|_| plan.execute.users.is_some()) {
            // Set before the namespace is joined.
            terminal.uid = self.outside((terminal.uid, 0)).0;
        }
        let scratch = Scratch(directory(id).join(format!("exec-{}", self.serial())));
        let own = scratch.0.join(id);
        fs::create_dir_all(&own)
            .and_then(|()| fs::copy(state, own.join("state.json")))
            .map_err(|error| GuestError::System(format!("prepare {}", label(id, exec_id)), error))?;
        let process = scratch.0.join("process.json");
        write_json(&process, &plan.process)?;
        let job = Job {
            id: id.to_owned(),
            state: scratch.0.clone(),
            console: streams.console(),
            operation: Operation::Exec { process },
            execute: plan.execute,
        };
        let job_file = scratch.0.join("job.json");
        write_json(&job_file, &job)?;
        let (pid, _report) = spawn::run(&self.program, &job_file, stdio, start)
            .await
            .map_err(|error| GuestError::Spawn(label(id, exec_id), error))?;
        Ok((pid, streams.finish(id, exec_id)?))
    }

    /// Removes an exec that has ended, or that was never started. Returns its pid and how it ended.
    ///
    /// # Errors
    /// [`GuestError`]
    pub fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(u32, Ended), GuestError> {
        self.with(id, |container| {
            let name = label(id, exec_id);
            let exec = container.execs.get(exec_id).ok_or_else(|| GuestError::NotFound(name.clone()))?;
            let ended = match exec.process.phase {
                Phase::Stopped(ended) => ended,
                Phase::Created => Ended::now(0),
                Phase::Starting | Phase::Running => {
                    return Err(GuestError::State(format!("delete {name}"), "it has not ended"));
                }
            };
            let pid = exec.process.pid;
            container.execs.remove(exec_id);
            Ok((pid, ended))
        })
    }
}

fn status(error: &GuestError) -> u32 {
    match error {
        GuestError::Spawn(_, SpawnError::NotExecuted { code, .. }) => u32::try_from(*code).unwrap_or(NOT_STARTED),
        _ => NOT_STARTED,
    }
}
