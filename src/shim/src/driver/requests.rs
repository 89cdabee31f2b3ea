//! What requests make the driver do: a task for each, and what happens when it ends.

use std::sync::Arc;

use nacelle_protocol::ids::ContainerId;

use super::{Completion, Driver, OBEDIENCE, Output, SIGKILL, Streams};
use crate::export::PATIENCE;
use crate::perform::{self, Created, Local};
use crate::pod::{Env, Pod};
use crate::publisher::now_ns;
use crate::sandbox::{Event, Exit, KILLED, Phase, ProcessKey, Refusal, Token};
use crate::stdio::Wanted;
use crate::task::{Call, Create, Reply, TaskError};

impl Driver {
    /// Does what an open request asks for, in a task of its own.
    pub(super) fn perform(&mut self, token: Token) {
        let Some(job) = self.open.get(&token) else { return };
        let (key, call, env) = (job.key.clone(), job.call.clone(), self.env.clone());
        let id = key.container.clone();
        let local = self.containers.get(&id).cloned();
        let sandbox = local.as_ref().is_some_and(|local| local.guest_pid.is_none());
        let Some(pod) = self.pod.clone() else {
            // Without a VM there is only the beginning and the end.
            match call {
                Call::Create(request) if self.sandbox.cold() => self.spawn(token, create_first(env, id, request)),
                Call::Delete => self.delete(token, key, None, local),
                _ => {
                    let refused = self.refused(Refusal::VmGone, key);
                    self.spawn(token, async { Err(refused) });
                }
            }
            return;
        };
        match call {
            Call::Create(request) => {
                let create = perform::create_next(env, pod, id, request);
                self.spawn(token, async { Ok(Output::Created(create.await?)) });
            }
            Call::Exec(_) if sandbox => self.spawn(token, async { Err(TaskError::NoProcess("exec", id)) }),
            Call::Kill { signal, .. } if sandbox => self.spawn(token, async move { Ok(Output::Signalled(signal)) }),
            Call::Pause | Call::Resume | Call::Update(_) if sandbox => {
                self.spawn(token, async { Ok(Output::Nothing) });
            }
            Call::Pids if sandbox => self.spawn(token, async move { Ok(Output::Pids(vec![pod.vm.pid()])) }),
            Call::Stats if sandbox => {
                self.spawn(token, async move { Ok(Output::Stats(pod.guest.stats(None).await?)) });
            }
            Call::Exec(request) => {
                self.spawn(token, async { Ok(Output::ExecAdded(perform::exec(env, pod, key, request).await?)) });
            }
            Call::Start => {
                let opened = match self.streams.get_mut(&key).and_then(|s| s.io.as_mut()) {
                    Some(io) => io.open_stdin(),
                    None => Ok(()),
                };
                self.spawn(token, async {
                    opened?;
                    Ok(Output::Pid(perform::start(pod, key, local).await?))
                });
            }
            Call::Delete => self.delete(token, key, Some(pod), local),
            Call::Kill { signal, all } => {
                if signal == SIGKILL && key.exec.is_none() {
                    self.expect_end(id, token);
                }
                self.spawn(token, async move {
                    pod.guest.kill(&key, signal, all).await?;
                    Ok(Output::Nothing)
                });
            }
            Call::Pause => self.spawn(token, async move {
                perform::pause(pod, id, local).await?;
                Ok(Output::Nothing)
            }),
            Call::Resume => self.spawn(token, async move {
                pod.guest.resume(&id).await?;
                if let Some(export) = local.and_then(|local| local.export) {
                    export.begin().await;
                }
                Ok(Output::Nothing)
            }),
            Call::Pids => {
                let known = local.and_then(|l| l.guest_pid).unwrap_or_default();
                self.spawn(token, async move {
                    let mut pids = pod.guest.pids(&id).await?;
                    // The main process is known by the VMM's id, and a live container has at least that one.
                    pids.retain(|pid| *pid != known);
                    pids.insert(0, pod.vm.pid());
                    Ok(Output::Pids(pids))
                });
            }
            Call::Stats => self.spawn(token, async move { Ok(Output::Stats(pod.guest.stats(Some(&id)).await?)) }),
            Call::Update(resources) => self.spawn(token, async move {
                perform::update(pod, id, resources).await?;
                Ok(Output::Nothing)
            }),
            Call::Resize { width, height } => self.spawn(token, async move {
                pod.guest.resize(&key, width, height).await?;
                Ok(Output::Nothing)
            }),
            Call::CloseIo => {
                if let Some(io) = self.streams.get(&key).and_then(|s| s.io.as_ref()) {
                    io.close_stdin();
                }
                self.spawn(token, async { Ok(Output::Nothing) });
            }
            Call::Wait | Call::State | Call::Shutdown | Call::End { .. } => {
                self.spawn(token, async { Ok(Output::Nothing) })
            }
        }
    }

    fn expect_end(&mut self, id: ContainerId, token: Token) {
        if self.killed.contains_key(&id) {
            return;
        }
        self.killed.insert(id.clone(), token);
        self.tasks.spawn(async move {
            tokio::time::sleep(OBEDIENCE).await;
            Completion::Disobeyed(id, token)
        });
    }

    /// Takes note of an exit that the guest tells of: of a container that has an export, when that is over or takes long.
    pub(super) fn exited(&mut self, key: ProcessKey, exit: Exit) {
        let export = self.containers.get(&key.container).and_then(|local| local.export.clone());
        let ran = self.sandbox.snapshot(&key).is_some_and(|s| matches!(s.phase, Phase::Starting | Phase::Running));
        let (Some(export), Some(pod), true, None) = (export, self.pod.clone(), ran, &key.exec) else {
            return self.apply(Event::Exited(key, exit));
        };
        if !self.exporting.insert(key.container.clone()) {
            return pod.conduct.strike(&format!("the guest claims what cannot be: second exit of {}", key.container));
        }
        let id = key.container.clone();
        let work = tokio::spawn(async move {
            if let Err(e) = export.run(&pod, &id).await {
                tracing::error!("container {id}: {}", crate::chain(&e));
            }
        });
        self.tasks.spawn(async move {
            // Nobody waits longer for an exit; the export goes on, and Delete waits for it.
            let _ = tokio::time::timeout(PATIENCE, work).await;
            Completion::Exported(key, exit)
        });
    }

    fn delete(&mut self, token: Token, key: ProcessKey, pod: Option<Arc<Pod>>, local: Option<Local>) {
        let io = self.streams.get_mut(&key).and_then(|s| s.io.take());
        let local = local.filter(|_| key.exec.is_none());
        self.spawn(token, async {
            perform::delete(pod, key, io, local).await?;
            Ok(Output::Deleted)
        });
    }

    /// What can be said of a process that has exited.
    pub(super) fn perform_stopped(&mut self, token: Token) {
        let Some(job) = self.open.remove(&token) else { return };
        let id = &job.key.container;
        let pid = self.sandbox.snapshot(&job.key).map_or(0, |s| s.pid);
        let finished = || TaskError::Refused(Refusal::Finished, job.key.clone());
        let reply = match (&job.call, &self.pod) {
            (Call::Stats, Some(pod)) => {
                // The guest keeps a container's cgroup until the container is deleted.
                let (pod, id, last) = (pod.clone(), id.clone(), self.stats.get(id).cloned());
                tokio::spawn(async move {
                    let stats = pod.guest.stats(Some(&id)).await.ok().or(last);
                    let _ =
                        job.reply.send(stats.map(Reply::Stats).ok_or(TaskError::Refused(Refusal::Finished, job.key)));
                });
                return;
            }
            (Call::Stats, None) => self.stats.get(id).cloned().map(Reply::Stats).ok_or_else(finished),
            // A task that exists has a process id, else a containerd that restarts takes it for a leftover.
            (Call::Pids, _) => Ok(Reply::Pids(vec![pid])),
            (Call::CloseIo | Call::Resize { .. }, _) => Ok(Reply::Done),
            _ => Err(finished()),
        };
        let _ = job.reply.send(reply);
    }

    fn spawn(&mut self, token: Token, work: impl Future<Output = Result<Output, TaskError>> + Send + 'static) {
        self.tasks.spawn(async move { Completion::Performed(token, Box::new(work.await)) });
    }

    pub(super) fn complete(&mut self, completion: Completion) {
        match completion {
            Completion::Performed(token, result) => self.performed(token, *result),
            Completion::Unkillable(id) => {
                let key = ProcessKey { container: id, exec: None };
                if self.sandbox.snapshot(&key).is_some_and(|s| s.exit.is_none()) {
                    self.apply(Event::Exited(key, Exit { status: KILLED, at_ns: now_ns() }));
                }
            }
            Completion::Exported(key, exit) => {
                self.exporting.remove(&key.container);
                // It may have been told meanwhile, as the VM is gone.
                if self.sandbox.snapshot(&key).is_some_and(|s| s.exit.is_none()) {
                    self.apply(Event::Exited(key, exit));
                }
            }
            Completion::Overdue(id) => self.apply(Event::Overdue(id)),
            Completion::Disobeyed(id, token) => {
                let key = ProcessKey { container: id, exec: None };
                let lives = self.sandbox.snapshot(&key).is_some_and(|s| s.exit.is_none());
                // Another container may have the name by now.
                let same = self.killed.get(&key.container) == Some(&token);
                if let Some(pod) = self.pod.as_ref().filter(|_| lives && same) {
                    let seconds = OBEDIENCE.as_secs();
                    pod.conduct.breach(format!("container {} has not ended {seconds} s after SIGKILL", key.container));
                }
            }
            Completion::Stopped => {
                self.stopping = false;
                for ender in self.enders.drain(..) {
                    let _ = ender.send(Ok(Reply::Done));
                }
            }
        }
    }

    fn performed(&mut self, token: Token, result: Result<Output, TaskError>) {
        let Some(job) = self.open.get(&token) else { return };
        let key = job.key.clone();
        let wanted = match &job.call {
            Call::Create(Create { io, .. }) => io.clone(),
            Call::Exec(exec) => exec.io.clone(),
            _ => Wanted::default(),
        };
        let snapshot = self.sandbox.snapshot(&key);
        let (mut done, mut exit) = (Ok(0), None);
        let reply = match result {
            Err(e) => {
                tracing::warn!("{}: {}", name_of(&job.call), crate::chain(&e));
                done = Err(());
                Err(e)
            }
            Ok(Output::Nothing) => Ok(Reply::Done),
            Ok(Output::Signalled(signal)) => {
                exit = perform::sandbox_status(signal).map(|status| (key, Exit { status, at_ns: now_ns() }));
                Ok(Reply::Done)
            }
            Ok(Output::Booted(pod, events, created)) => {
                self.pod = Some(pod);
                self.guest = Some(events);
                done = Ok(created.pid);
                self.remember(key, wanted, created)
            }
            Ok(Output::Created(created)) => {
                done = Ok(created.pid);
                self.remember(key, wanted, created)
            }
            Ok(Output::ExecAdded(io)) => {
                self.streams.insert(key, Streams { wanted, io: Some(io) });
                Ok(Reply::Done)
            }
            Ok(Output::Pid(pid)) => {
                done = Ok(pid);
                Ok(Reply::Pid(pid))
            }
            Ok(Output::Pids(pids)) => Ok(Reply::Pids(pids)),
            Ok(Output::Stats(stats)) => {
                self.stats.insert(key.container, stats.clone());
                Ok(Reply::Stats(stats))
            }
            Ok(Output::Deleted) => {
                self.forget(&key);
                Ok(Reply::Exit(snapshot.map_or(0, |s| s.pid), snapshot.and_then(|s| s.exit)))
            }
        };
        self.outputs.insert(token, reply);
        self.apply(Event::Done(token, done));
        self.outputs.remove(&token);
        if let Some((key, exit)) = exit {
            self.apply(Event::Exited(key, exit));
        }
    }

    fn remember(&mut self, key: ProcessKey, wanted: Wanted, created: Created) -> Result<Reply, TaskError> {
        self.containers.insert(key.container.clone(), created.local);
        self.streams.insert(key, Streams { wanted, io: Some(created.io) });
        Ok(Reply::Pid(created.pid))
    }

    fn forget(&mut self, key: &ProcessKey) {
        self.streams.remove(key);
        if key.exec.is_none() {
            self.streams.retain(|other, _| other.container != key.container);
            self.containers.remove(&key.container);
            self.stats.remove(&key.container);
            self.killed.remove(&key.container);
        }
    }
}

async fn create_first(env: Arc<Env>, id: ContainerId, request: Create) -> Result<Output, TaskError> {
    let (pod, events, created) = perform::create_first(env, id, request).await?;
    Ok(Output::Booted(pod, events, created))
}

fn name_of(call: &Call) -> &'static str {
    match call {
        Call::Create(_) => "create",
        Call::Exec(_) => "exec",
        Call::Start => "start",
        Call::Delete => "delete",
        Call::Kill { .. } => "kill",
        Call::Wait => "wait",
        Call::State => "state",
        Call::Pids => "pids",
        Call::Pause => "pause",
        Call::Resume => "resume",
        Call::Stats => "stats",
        Call::Update(_) => "update",
        Call::Resize { .. } => "resize",
        Call::CloseIo => "close stdin",
        Call::Shutdown => "shutdown",
        Call::End { .. } => "end",
    }
}
