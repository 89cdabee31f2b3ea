//! The one task that owns the sandbox: it waits, then acts.
//!
//! ```text
//!  service ──Job──►┐                                        ┌─► tasks that perform requests ──┐
//!  guest ──Event──►├─ wait: picks one ─► Sandbox::apply ─► act                              ├─► back to wait
//!  VM ─────gone───►┘                                        └─► answers, events to containerd │
//!                  ▲──────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! `wait` is asynchronous and changes nothing; `act` changes everything and is not asynchronous. So nothing is ever half
//! changed, and no lock is needed. What takes time is a task of its own in one [`JoinSet`], and comes back as an event.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use nacelle_protocol::ids::ContainerId;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::events;
use crate::guest::GuestEvent;
use crate::perform::{self, Created, Local};
use crate::pod::{Env, Pod};
use crate::publisher::{Publisher, now_ns};
use crate::sandbox::{
    Action, Answer, Event, Exit, KILLED, Notice, Phase, ProcessKey, Refusal, Request, Sandbox, Token,
};
use crate::stdio::{Io, Wanted};
use crate::task::{Call, Create, Reply, State, TaskError};

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

/// Requests that may wait.
const QUEUE: usize = 256;
/// How long the exits of a container's execs may take after its own.
const HOLD: Duration = Duration::from_secs(5);
/// How long a container may take to end after SIGKILL. One that has not ended by then has a guest that lies, or a kernel
/// that cannot: its VM is ended instead, or the pod could never be deleted.
const OBEDIENCE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 30 });
/// Open requests above which those that nobody waits for are looked for.
const PRUNE: usize = 1024;
/// SIGKILL.
const SIGKILL: u32 = 9;

/// The way back to a caller.
type Answerer = oneshot::Sender<Result<Reply, TaskError>>;

/// What a driver leaves behind: the publisher, and who asked it to leave.
pub type Farewell = (Publisher, Option<Answerer>);

/// A request on its way in.
#[derive(Debug)]
struct Job {
    key: ProcessKey,
    call: Call,
    reply: Answerer,
}

/// The way in.
#[derive(Clone, Debug)]
pub struct Handle(mpsc::Sender<Job>);

impl Handle {
    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`TaskError`].
    pub async fn call(&self, key: ProcessKey, call: Call) -> Result<Reply, TaskError> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Job { key, call, reply }).await.map_err(|_| TaskError::Leaving)?;
        answer.await.map_err(|_| TaskError::Leaving)?
    }
}

/// A process, as far as the sandbox has no need to know.
#[derive(Debug, Default)]
struct Streams {
    wanted: Wanted,
    io: Option<Io>,
}

/// What a task brings back.
enum Output {
    Nothing,
    Booted(Arc<Pod>, mpsc::Receiver<GuestEvent>, Created),
    Created(Created),
    ExecAdded(Io),
    Pid(u32),
    Pids(Vec<u32>),
    /// A sandbox without a process of its own got this signal.
    Signalled(u32),
    Stats(Vec<u8>),
    Deleted,
}

/// What a task says when it ends.
enum Completion {
    Performed(Token, Box<Result<Output, TaskError>>),
    Unkillable(ContainerId),
    Overdue(ContainerId),
    Disobeyed(ContainerId, Token),
    Stopped,
}

/// What `wait` picks.
enum Next {
    Job(Job),
    Completion(Completion),
    Guest(GuestEvent),
    GuestSilent,
    Condemned(String),
    VmGone,
    Terminate,
}

/// Owns the sandbox.
pub struct Driver {
    env: Arc<Env>,
    publisher: Publisher,
    jobs: mpsc::Receiver<Job>,
    terminate: oneshot::Receiver<()>,
    tasks: JoinSet<Completion>,
    sandbox: Sandbox,
    open: HashMap<Token, Job>,
    outputs: HashMap<Token, Result<Reply, TaskError>>,
    containers: BTreeMap<ContainerId, Local>,
    streams: HashMap<ProcessKey, Streams>,
    stats: HashMap<ContainerId, Vec<u8>>,
    /// The first SIGKILL of each container that has got one.
    killed: HashMap<ContainerId, Token>,
    pod: Option<Arc<Pod>>,
    /// What the guest was condemned for.
    verdict: Option<String>,
    guest: Option<mpsc::Receiver<GuestEvent>>,
    stopping: bool,
    leaving: Option<Token>,
    /// A sandbox of the Sandbox API is no task, and containerd hears nothing of it by events.
    silent: Option<ContainerId>,
    /// Who waits for the end of the VM.
    enders: Vec<Answerer>,
    next_token: Token,
}

impl Driver {
    /// A driver, the way to ask it, and the way to end it.
    pub fn new(env: Env, publisher: Publisher) -> (Self, Handle, oneshot::Sender<()>) {
        let (sender, jobs) = mpsc::channel(QUEUE);
        let (end, terminate) = oneshot::channel();
        let driver = Self {
            env: Arc::new(env),
            publisher,
            jobs,
            terminate,
            tasks: JoinSet::new(),
            sandbox: Sandbox::default(),
            open: HashMap::new(),
            outputs: HashMap::new(),
            containers: BTreeMap::new(),
            streams: HashMap::new(),
            stats: HashMap::new(),
            killed: HashMap::new(),
            pod: None,
            verdict: None,
            guest: None,
            stopping: false,
            leaving: None,
            silent: None,
            enders: Vec::new(),
            next_token: 0,
        };
        (driver, Handle(sender), end)
    }

    /// Runs until somebody asks to leave, or to be terminated. Then the VM is gone, and the publisher is given back;
    /// the answer to the one who asked goes out when the returned reply is dropped or sent.
    pub async fn run(mut self) -> Farewell {
        loop {
            let next = self.wait().await;
            if matches!(next, Next::Terminate) {
                break;
            }
            self.act(next);
            if let Some(token) = self.leaving.filter(|_| !self.stopping) {
                let reply = self.open.remove(&token).map(|job| job.reply);
                return (self.publisher, reply);
            }
        }
        if let Some(pod) = self.pod.take() {
            pod.stop().await;
        }
        while self.stopping {
            match self.tasks.join_next().await {
                Some(Ok(Completion::Stopped)) | None => break,
                Some(_) => {}
            }
        }
        (self.publisher, None)
    }

    async fn wait(&mut self) -> Next {
        let guest = async {
            match &mut self.guest {
                Some(guest) => guest.recv().await.map_or(Next::GuestSilent, Next::Guest),
                None => std::future::pending().await,
            }
        };
        let condemned = async {
            match &self.pod {
                Some(pod) if self.verdict.is_none() => Next::Condemned(pod.conduct.condemned().await),
                _ => std::future::pending().await,
            }
        };
        let gone = async {
            match &self.pod {
                Some(pod) => pod.vm.gone().await,
                None => std::future::pending().await,
            }
        };
        let done = async {
            match self.tasks.join_next().await {
                Some(Ok(completion)) => completion,
                // A task that panicked has said so; its request stays unanswered, and its caller gives up.
                Some(Err(_)) | None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            // Known before what the guest's silence, or its VM's end, would be taken for.
            next = condemned => next,
            // What the guest says counts before the news that it is gone. It cannot keep others waiting with it for
            // long: see `Guest::events`.
            next = guest => next,
            completion = done => Next::Completion(completion),
            () = gone => Next::VmGone,
            Some(job) = self.jobs.recv() => Next::Job(job),
            // The server that holds the other end never drops it without a word.
            _ = &mut self.terminate => Next::Terminate,
        }
    }

    fn act(&mut self, next: Next) {
        match next {
            Next::Job(job) => self.take(job),
            Next::Completion(completion) => self.complete(completion),
            Next::Guest(GuestEvent::Exit(key, status)) => {
                // The host's clock: the guest's may be anything.
                self.apply(Event::Exited(key, Exit { status, at_ns: now_ns() }));
            }
            Next::Guest(GuestEvent::Oom(id)) => self.apply(Event::Oom(id)),
            Next::GuestSilent => {
                self.guest = None;
                if let Some(pod) = &self.pod {
                    // A VM whose agent does not answer is of no use to anybody; its end follows as an event.
                    if pod.conduct.verdict().is_none() {
                        tracing::error!("the agent is gone: ending VMM {}", pod.vm.pid());
                    }
                    pod.vm.kill();
                }
            }
            Next::Condemned(why) => {
                if let Some(pod) = &self.pod {
                    tracing::error!("ending VMM {}: {why}", pod.vm.pid());
                    pod.vm.kill();
                }
                self.verdict = Some(why);
            }
            Next::VmGone => {
                if let Some(pod) = self.pod.take() {
                    tracing::error!("VMM {} is gone; {}", pod.vm.pid(), pod.vm.last_words());
                    self.guest = None;
                    self.stop(pod);
                    self.apply(Event::VmGone(now_ns()));
                }
            }
            Next::Terminate => {}
        }
    }

    fn take(&mut self, job: Job) {
        self.next_token += 1;
        let token = self.next_token;
        let key = job.key.clone();
        let container = key.container.clone();
        let request = match &job.call {
            Call::State => {
                let answer = self.state(&key);
                // A caller that has gone away wants no answer; the same below.
                let _ = job.reply.send(answer);
                return;
            }
            Call::End { leave } => {
                let leave = *leave;
                return self.end(token, job, leave);
            }
            Call::Create(create) => {
                if create.sandbox.is_some() && self.silent.is_none() {
                    self.silent = Some(container.clone());
                }
                Request::Create(container)
            }
            Call::Exec(_) => match key.exec.clone() {
                Some(exec) => Request::Exec(container, exec),
                None => Request::Query(key),
            },
            Call::Start => Request::Start(key),
            Call::Delete => Request::Delete(key),
            Call::Kill { .. } => Request::Kill(key),
            Call::Wait => Request::Wait(key),
            Call::Pause => Request::Pause(container),
            Call::Resume => Request::Resume(container),
            Call::Shutdown => Request::Shutdown,
            Call::Pids | Call::Stats | Call::Update(_) | Call::Resize { .. } | Call::CloseIo => Request::Query(key),
        };
        self.prune();
        self.open.insert(token, job);
        self.apply(Event::Request(token, request));
    }

    /// Forgets the waiters that have gone away.
    fn prune(&mut self) {
        if self.open.len() < PRUNE {
            return;
        }
        let waiting = |job: &Job| matches!(job.call, Call::Wait) && job.reply.is_closed();
        let gone: Vec<_> = self.open.iter().filter(|(_, job)| waiting(job)).map(|(token, _)| *token).collect();
        for token in gone {
            self.open.remove(&token);
            self.apply(Event::Forget(token));
        }
    }

    fn state(&self, key: &ProcessKey) -> Result<Reply, TaskError> {
        let not_found = || TaskError::Refused(Refusal::NotFound, key.clone());
        let snapshot = self.sandbox.snapshot(key).filter(|s| s.phase != Phase::Creating).ok_or_else(not_found)?;
        let local = self.containers.get(&key.container).ok_or_else(not_found)?;
        Ok(Reply::State(State {
            bundle: local.bundle.clone(),
            pid: snapshot.pid,
            phase: snapshot.phase,
            paused: snapshot.paused,
            io: self.streams.get(key).map(|s| s.wanted.clone()).unwrap_or_default(),
            exit: snapshot.exit,
        }))
    }

    fn apply(&mut self, event: Event) {
        for action in self.sandbox.apply(event) {
            match action {
                Action::Perform(token) => self.perform(token),
                Action::PerformStopped(token) => self.perform_stopped(token),
                Action::Answer(token, answer) => self.answer(token, answer),
                Action::Publish(notice) => self.publish(notice),
                Action::KillCreated(id) => self.kill_created(id),
                Action::Hold(id) => {
                    self.tasks.spawn(async move {
                        tokio::time::sleep(HOLD).await;
                        Completion::Overdue(id)
                    });
                }
                Action::StopVm => {
                    if let Some(pod) = self.pod.take() {
                        self.guest = None;
                        self.stop(pod);
                    }
                }
                Action::Leave(token) => self.leaving = Some(token),
                Action::Suspect(what, key) => {
                    if let Some(pod) = &self.pod {
                        pod.conduct.strike(&format!("the guest claims what cannot be: {what}: {key:?}"));
                    }
                }
            }
        }
    }

    fn publish(&self, notice: Notice) {
        if self.silent.as_ref() == Some(notice.container()) {
            return;
        }
        let create = match &notice {
            Notice::Create { container, .. } => {
                let key = ProcessKey { container: container.clone(), exec: None };
                self.containers.get(container).zip(self.streams.get(&key))
            }
            _ => None,
        };
        let details = create.map(|(local, streams)| (local, &streams.wanted));
        self.publisher.publish(events::event(notice, details));
    }

    fn end(&mut self, token: Token, job: Job, leave: bool) {
        if self.sandbox.booting() {
            let _ = job.reply.send(Err(TaskError::Refused(Refusal::Booting, job.key)));
            return;
        }
        if let Some(pod) = self.pod.take() {
            self.guest = None;
            self.stop(pod);
            self.apply(Event::VmGone(now_ns()));
        }
        if leave {
            self.open.insert(token, job);
            self.leaving = Some(token);
        } else if self.stopping {
            self.enders.push(job.reply);
        } else {
            let _ = job.reply.send(Ok(Reply::Done));
        }
    }

    fn stop(&mut self, pod: Arc<Pod>) {
        self.stopping = true;
        self.tasks.spawn(async move {
            pod.stop().await;
            Completion::Stopped
        });
    }

    fn kill_created(&mut self, id: ContainerId) {
        let pod = self.pod.clone();
        self.tasks.spawn(async move {
            let key = ProcessKey { container: id.clone(), exec: None };
            match pod {
                // Its exit follows as an event, or never.
                Some(pod) if pod.guest.kill(&key, SIGKILL, true).await.is_ok() => tokio::time::sleep(HOLD).await,
                _ => {}
            }
            Completion::Unkillable(id)
        });
    }

    fn answer(&mut self, token: Token, answer: Answer) {
        let output = self.outputs.remove(&token);
        let Some(job) = self.open.remove(&token) else { return };
        let pid = self.sandbox.snapshot(&job.key).map_or(0, |s| s.pid);
        let reply = match answer {
            Answer::Performed => output.unwrap_or(Ok(Reply::Done)),
            Answer::Ok => Ok(Reply::Done),
            Answer::Exit(exit) => Ok(Reply::Exit(pid, Some(exit))),
            Answer::Refused(refusal) => Err(self.refused(refusal, job.key)),
        };
        let _ = job.reply.send(reply);
    }

    /// A refusal, with the reason where there is one.
    fn refused(&self, refusal: Refusal, key: ProcessKey) -> TaskError {
        match (&self.verdict, refusal) {
            (Some(why), Refusal::VmGone) => TaskError::Ended(key.container, why.clone()),
            _ => TaskError::Refused(refusal, key),
        }
    }

    /// Does what an open request asks for, in a task of its own.
    fn perform(&mut self, token: Token) {
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
                pod.guest.pause(&id).await?;
                Ok(Output::Nothing)
            }),
            Call::Resume => self.spawn(token, async move {
                pod.guest.resume(&id).await?;
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

    fn delete(&mut self, token: Token, key: ProcessKey, pod: Option<Arc<Pod>>, local: Option<Local>) {
        let io = self.streams.get_mut(&key).and_then(|s| s.io.take());
        let local = local.filter(|_| key.exec.is_none());
        self.spawn(token, async {
            perform::delete(pod, key, io, local).await?;
            Ok(Output::Deleted)
        });
    }

    /// What can be said of a process that has exited.
    fn perform_stopped(&mut self, token: Token) {
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

    fn complete(&mut self, completion: Completion) {
        match completion {
            Completion::Performed(token, result) => self.performed(token, *result),
            Completion::Unkillable(id) => {
                let key = ProcessKey { container: id, exec: None };
                if self.sandbox.snapshot(&key).is_some_and(|s| s.exit.is_none()) {
                    self.apply(Event::Exited(key, Exit { status: KILLED, at_ns: now_ns() }));
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
