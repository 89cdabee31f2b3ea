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

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use nacelle_protocol::ids::ContainerId;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::events;
use crate::guest::GuestEvent;
use crate::perform::{Created, Local};
use crate::pod::{Env, Pod};
use crate::publisher::{Publisher, now_ns};
use crate::sandbox::{Action, Answer, Event, Exit, Notice, Phase, ProcessKey, Refusal, Request, Sandbox, Token};
use crate::stdio::{Io, Wanted};
use crate::task::{Call, Reply, State, TaskError};

#[cfg(test)]
mod hostile;
mod requests;
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
    /// The export after an exit is over, or takes long.
    Exported(ProcessKey, Exit),
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
    /// Containers whose exit is held back by their export.
    exporting: HashSet<ContainerId>,
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
            exporting: HashSet::new(),
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
                self.exited(key, Exit { status, at_ns: now_ns() });
            }
            Next::Guest(GuestEvent::Oom(id)) => self.apply(Event::Oom(id)),
            Next::Guest(GuestEvent::Damage(image, block)) => {
                if let Some(pod) = &self.pod {
                    pod.host.record.damage(&image, block);
                }
            }
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
            Answer::Deleted(pid, exit) => Ok(Reply::Exit(pid, exit)),
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
}
