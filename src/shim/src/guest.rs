//! The client of the agent: handshake, deadlines, and checks on every reply.
//!
//! ```text
//!  rpc.sock ◄── the guest dials, Preamble(rpc) ── Answer ──► ttrpc, with the guest as the server
//! ```
//!
//! What the guest says is a claim until it has been checked here or in [`crate::sandbox`]: ids are parsed, numbers are
//! bounded, counts are limited, and its errors are passed on as short printable text. Every call has a deadline but the
//! one that waits for events, and of events there are only so many a second. How large an answer may be, and that there
//! is one answer to one request, is [`crate::wire`]'s to see to.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use nacelle_protocol::agent::{
    AgentClient, CONTAINER_TYPE, ConfigureRequest, Container, Event as WireEvent, EventsRequest, ExportRequest,
    FilesRequest, ForwardRequest, LAYERS_DIR, LAYERS_TAG, MAX_PIDS, Network, RefreshRequest, SetTimeRequest, Share,
    ShutdownRequest, UPPER_SERIAL, VOLUMES_DIR, VOLUMES_TAG, event::What,
};
use nacelle_protocol::ids::{ContainerId, ExecId};
use nacelle_protocol::stream::{Answer, Kind, PREAMBLE_LEN, Preamble, Status};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use ttrpc::Code;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

use crate::conduct::Conduct;
use crate::publisher::now_ns;
use crate::sandbox::ProcessKey;
use crate::stdio::Names;
use crate::stream::PREAMBLE_DEADLINE;
use crate::wire::Wire;

/// How long an ordinary call may take. The guest may be slow, but it is not on a network.
const DEADLINE: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 60 });
/// What the guest's end of a call, and ttrpc's, get on top: the shim's own deadline comes first and knows what it is.
const GRACE: Duration = Duration::from_secs(1);
/// How long the guest may take to end in good order.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(1);
/// How often the clock of a guest that cannot follow the host's is set.
const CLOCK_PERIOD: Duration = Duration::from_secs(30);
/// Most of a guest's error message that is passed on, in characters.
const MAX_MESSAGE: usize = 2048;
/// Largest process id: PID_MAX_LIMIT of `include/linux/threads.h`.
const PID_MAX: u32 = 4 << 20;
/// Largest metrics that are passed on, in bytes; real ones have one or two thousand.
const MAX_STATS: usize = 64 << 10;
/// Most events in one answer; the agent sends 512.
const MAX_EVENTS: usize = 4096;
/// Events that may come at once, and how many a second from then on. A guest cannot start processes that fast.
const EVENT_BURST: u32 = 8192;
const EVENT_RATE: u32 = 1024;
/// Longest name of an image, in bytes: a key and its extension.
const MAX_IMAGE: usize = 80;
/// Most features of a guest's kernel that are listened to.
const MAX_FEATURES: usize = 64;
/// Type of the metrics that are passed on: the guest has cgroup v2, whatever the host has.
pub const STATS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// Why a call to the guest failed.
#[derive(Debug, Error)]
pub enum GuestError {
    /// The guest refuses.
    #[error("{what}: {message}")]
    Refused {
        /// What it was asked for.
        what: &'static str,
        /// Its code.
        code: Code,
        /// Its reason, shortened and made printable.
        message: String,
    },
    /// The guest takes too long.
    #[error("{0}: the guest does not answer")]
    Timeout(&'static str),
    /// The connection to the guest broke.
    #[error("{what}: the guest is gone")]
    Gone {
        /// What it was asked for.
        what: &'static str,
        /// The cause.
        #[source]
        source: ttrpc::Error,
    },
    /// The answer cannot be.
    #[error("{what}: the guest's answer makes no sense: {why}")]
    Nonsense {
        /// What it was asked for.
        what: &'static str,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// Nobody can dial in.
    #[error("accept the guest's connection")]
    Accept(#[source] std::io::Error),
    /// The description of the container cannot be encoded.
    #[error("describe container")]
    Encode(#[source] serde_json::Error),
}

/// What the guest reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// A process ended with this status.
    Exit(ProcessKey, u32),
    /// A container ran out of memory.
    Oom(ContainerId),
    /// An image of the layers share differs from what was converted, in this block.
    Damage(String, u64),
}

/// What the guest says of its kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its release, as `uname -r` has it.
    pub release: String,
    /// What it has, by the names of [`nacelle_protocol::features`].
    pub features: Vec<String>,
}

impl Kernel {
    /// Whether it has the feature of that name.
    pub fn has(&self, name: &str) -> bool {
        self.features.iter().any(|feature| feature == name)
    }
}

/// The guest's services.
#[derive(Clone)]
pub struct Guest {
    task: TaskClient,
    agent: AgentClient,
    conduct: Arc<Conduct>,
}

/// Makes an ordinary call.
async fn ask<T>(what: &'static str, call: impl Future<Output = ttrpc::Result<T>>) -> Result<T, GuestError> {
    check(what, timeout(DEADLINE, call).await.map_err(|_| GuestError::Timeout(what))?)
}

/// The same for [`check_known`].
async fn ask_known<T>(what: &'static str, call: impl Future<Output = ttrpc::Result<T>>) -> Result<T, GuestError> {
    check_known(what, timeout(DEADLINE, call).await.map_err(|_| GuestError::Timeout(what))?)
}

fn check<T>(what: &'static str, result: ttrpc::Result<T>) -> Result<T, GuestError> {
    result.map_err(|error| match error {
        ttrpc::Error::RpcStatus(status) if status.code() == Code::DEADLINE_EXCEEDED => GuestError::Timeout(what),
        ttrpc::Error::RpcStatus(status) => {
            let text = status.message().chars().take(MAX_MESSAGE);
            let message = text.map(|c| if c.is_control() { ' ' } else { c }).collect();
            GuestError::Refused { what, code: status.code(), message }
        }
        source => GuestError::Gone { what, source },
    })
}

/// For what the shim knows to exist: not found is then something else, such as the program, and no news about the task.
fn check_known<T>(what: &'static str, result: ttrpc::Result<T>) -> Result<T, GuestError> {
    check(what, result).map_err(|error| match error {
        GuestError::Refused { code: Code::NOT_FOUND, what, message } => {
            GuestError::Refused { code: Code::UNKNOWN, what, message }
        }
        other => other,
    })
}

fn soon() -> Context {
    with_duration(DEADLINE + GRACE)
}

/// The `exec_id` of a request.
fn exec_id(key: &ProcessKey) -> String {
    key.exec.as_ref().map(ToString::to_string).unwrap_or_default()
}

impl Guest {
    /// Accepts the agent's connection: the first one with the right preamble. There is no second.
    ///
    /// # Errors
    /// [`GuestError::Accept`]. The caller sets the deadline, and listens for the verdict of `conduct`.
    pub async fn accept(listener: UnixListener, conduct: Arc<Conduct>) -> Result<Self, GuestError> {
        loop {
            let (socket, _) = listener.accept().await.map_err(GuestError::Accept)?;
            match timeout(PREAMBLE_DEADLINE, admit(socket)).await {
                Ok(Some(socket)) => {
                    let client = Client::new(Socket::new(Wire::new(socket, conduct.clone())));
                    return Ok(Self {
                        task: TaskClient::new(client.clone()),
                        agent: AgentClient::new(client),
                        conduct,
                    });
                }
                _ => conduct.strike("a connection that the guest dialled was refused"),
            }
        }
    }

    /// Tells the guest where its shares and its disk are, its name and kernel parameters, what its network is, and what time it
    /// is; returns what it says of its kernel.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn configure(
        &self,
        hostname: &str,
        sysctls: HashMap<String, String>,
        volumes: bool,
        network: Network,
    ) -> Result<Kernel, GuestError> {
        let share = |tag: &str, target: &str, read_only| Share {
            tag: tag.to_owned(),
            target: target.to_owned(),
            read_only,
            ..Share::default()
        };
        let mut shares = vec![share(LAYERS_TAG, LAYERS_DIR, true)];
        if volumes {
            shares.push(share(VOLUMES_TAG, VOLUMES_DIR, false));
        }
        let request = ConfigureRequest {
            shares,
            upper_serial: UPPER_SERIAL.to_owned(),
            hostname: hostname.to_owned(),
            sysctls,
            realtime_ns: now_ns(),
            network: MessageField::some(network),
            ..ConfigureRequest::default()
        };
        let response = ask("configure guest", self.agent.configure(soon(), &request)).await?;
        let short = |text: &str, most| text.chars().filter(char::is_ascii_graphic).take(most).collect::<String>();
        let version = short(&response.version, 32);
        let features = response.features.iter().take(MAX_FEATURES).map(|name| short(name, 32)).collect();
        let kernel = Kernel { release: short(&response.kernel, 64), features };
        tracing::info!("guest is up: agent {version}, kernel {} with {}", kernel.release, kernel.features.join(", "));
        if !response.follows_host_clock {
            tokio::spawn(keep_time(self.agent.clone()));
        }
        Ok(kernel)
    }

    /// Has the guest connect to an address of its own, and carry what comes and goes by two streams: one from here to
    /// there, one back.
    ///
    /// # Errors
    /// [`GuestError`], such as where nobody listens.
    pub async fn forward(&self, to: SocketAddr, input: u64, output: u64) -> Result<(), GuestError> {
        let address = match to.ip() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let request = ForwardRequest { address, port: to.port().into(), input, output, ..ForwardRequest::default() };
        ask("forward connection", self.agent.forward(soon(), &request)).await.map(drop)
    }

    /// Creates a container; returns the guest's process id.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn create(
        &self,
        id: &ContainerId,
        container: &Container,
        terminal: bool,
        io: &Names,
    ) -> Result<u32, GuestError> {
        let what = "create container";
        let value = serde_json::to_vec(container).map_err(GuestError::Encode)?;
        let options = Any { type_url: CONTAINER_TYPE.to_owned(), value, ..Any::default() };
        let request = api::CreateTaskRequest {
            id: id.to_string(),
            terminal,
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            options: MessageField::some(options),
            ..Default::default()
        };
        some_pid(what, ask_known(what, self.task.create(soon(), &request)).await?.pid)
    }

    /// Registers an exec.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn exec(&self, key: &ProcessKey, process: Vec<u8>, terminal: bool, io: &Names) -> Result<(), GuestError> {
        let type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned();
        let request = api::ExecProcessRequest {
            id: key.container.to_string(),
            exec_id: exec_id(key),
            terminal,
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            spec: MessageField::some(Any { type_url, value: process, ..Any::default() }),
            ..Default::default()
        };
        ask_known("add exec", self.task.exec(soon(), &request)).await.map(drop)
    }

    /// Starts a process; returns the guest's process id.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn start(&self, key: &ProcessKey) -> Result<u32, GuestError> {
        let what = "start process";
        let request = api::StartRequest { id: key.container.to_string(), exec_id: exec_id(key), ..Default::default() };
        some_pid(what, ask_known(what, self.task.start(soon(), &request)).await?.pid)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn kill(&self, key: &ProcessKey, signal: u32, all: bool) -> Result<(), GuestError> {
        let request = api::KillRequest {
            id: key.container.to_string(),
            exec_id: exec_id(key),
            signal,
            all,
            ..Default::default()
        };
        ask("signal process", self.task.kill(soon(), &request)).await.map(drop)
    }

    /// Forgets a process that has exited. One that the guest does not know is forgotten already.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn delete(&self, key: &ProcessKey) -> Result<(), GuestError> {
        let request = api::DeleteRequest { id: key.container.to_string(), exec_id: exec_id(key), ..Default::default() };
        match ask("delete process", self.task.delete(soon(), &request)).await {
            Err(GuestError::Refused { code: Code::NOT_FOUND, .. }) | Ok(_) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Process ids of a container, as the guest counts them.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn pids(&self, id: &ContainerId) -> Result<Vec<u32>, GuestError> {
        let request = api::PidsRequest { id: id.to_string(), ..Default::default() };
        let response = ask("list processes", self.task.pids(soon(), &request)).await?;
        Ok(response.processes.iter().map(|p| p.pid).filter(|pid| (1..PID_MAX).contains(pid)).take(MAX_PIDS).collect())
    }

    /// Stops a container's processes.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn pause(&self, id: &ContainerId) -> Result<(), GuestError> {
        let request = api::PauseRequest { id: id.to_string(), ..Default::default() };
        ask("pause container", self.task.pause(soon(), &request)).await.map(drop)
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn resume(&self, id: &ContainerId) -> Result<(), GuestError> {
        let request = api::ResumeRequest { id: id.to_string(), ..Default::default() };
        ask("resume container", self.task.resume(soon(), &request)).await.map(drop)
    }

    /// Changes a container's limits; `resources` is JSON.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn update(&self, id: &ContainerId, resources: Vec<u8>) -> Result<(), GuestError> {
        let type_url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned();
        let resources = MessageField::some(Any { type_url, value: resources, ..Any::default() });
        let request = api::UpdateTaskRequest { id: id.to_string(), resources, ..Default::default() };
        ask("update container", self.task.update(soon(), &request)).await.map(drop)
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn resize(&self, key: &ProcessKey, width: u32, height: u32) -> Result<(), GuestError> {
        let request = api::ResizePtyRequest {
            id: key.container.to_string(),
            exec_id: exec_id(key),
            width,
            height,
            ..Default::default()
        };
        ask("resize terminal", self.task.resize_pty(soon(), &request)).await.map(drop)
    }

    /// A container's metrics, or without a container those of all together: an encoded message of the type [`STATS_TYPE`].
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn stats(&self, id: Option<&ContainerId>) -> Result<Vec<u8>, GuestError> {
        let id = id.map(ToString::to_string).unwrap_or_default();
        let request = api::StatsRequest { id, ..Default::default() };
        let mut response = ask("read metrics", self.task.stats(soon(), &request)).await?;
        let stats = response.stats.take().unwrap_or_default();
        clean_metrics(stats)
    }

    /// Has the guest's copy of a volume follow its link, which leads to `data` now.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn refresh(&self, volume: &str, data: &str) -> Result<(), GuestError> {
        let request = RefreshRequest { volume: volume.to_owned(), data: data.to_owned(), ..Default::default() };
        ask("refresh volume", self.agent.refresh(soon(), &request)).await.map(drop)
    }

    /// Has the guest send what a container has written, on a stream.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn export(&self, id: &ContainerId, stream: u64) -> Result<(), GuestError> {
        let request = ExportRequest { container_id: id.to_string(), stream, ..Default::default() };
        ask("export files", self.agent.export(soon(), &request)).await.map(drop)
    }

    /// Has the guest serve a container's files: messages on one stream, answers on the other.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn files(&self, id: &ContainerId, input: u64, output: u64) -> Result<(), GuestError> {
        let request = FilesRequest { container_id: id.to_string(), input, output, ..Default::default() };
        ask("serve files", self.agent.files(soon(), &request)).await.map(drop)
    }

    /// Asks the guest to end. It may be gone before it answers.
    pub async fn shutdown(&self) {
        let _ = self.agent.shutdown(with_duration(SHUTDOWN_DEADLINE), &ShutdownRequest::default()).await;
    }

    /// Passes on the guest's events until it is gone, or nobody takes them any more.
    pub async fn events(self, sink: mpsc::Sender<GuestEvent>) {
        let mut after = 0u64;
        let mut quota = Quota { left: EVENT_BURST, since: Instant::now() };
        loop {
            let request = EventsRequest { after, ..EventsRequest::default() };
            let response = match check("wait for events", self.agent.events(Context::default(), &request).await) {
                Ok(response) => response,
                Err(e) => return tracing::debug!("{}", crate::chain(&e)),
            };
            if !(1..=MAX_EVENTS).contains(&response.events.len()) {
                return self.conduct.breach(format!("answer with {} events", response.events.len()));
            }
            for event in response.events {
                if Some(event.number) != after.checked_add(1) {
                    return self.conduct.breach(format!("send event {} after event {after}", event.number));
                }
                after = event.number;
                let Some(event) = read_event(event) else {
                    return self.conduct.breach(format!("send event {after}, which makes no sense"));
                };
                quota.take().await;
                if sink.send(event).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// How many events may come.
struct Quota {
    left: u32,
    since: Instant,
}

impl Quota {
    /// Takes one, and waits if there is none left. Whoever waits is a guest that floods.
    async fn take(&mut self) {
        while self.left == 0 {
            let second = Duration::from_secs(1);
            tokio::time::sleep_until(self.since + second).await;
            self.refill(Instant::now());
        }
        self.left -= 1;
        self.refill(Instant::now());
    }

    fn refill(&mut self, now: Instant) {
        let seconds = u32::try_from(now.duration_since(self.since).as_secs()).unwrap_or(u32::MAX);
        if seconds > 0 {
            self.left = self.left.saturating_add(seconds.saturating_mul(EVENT_RATE)).min(EVENT_BURST);
            self.since = now;
        }
    }
}

fn some_pid(what: &'static str, pid: u32) -> Result<u32, GuestError> {
    let why = "a process id that no kernel gives";
    if (1..PID_MAX).contains(&pid) { Ok(pid) } else { Err(GuestError::Nonsense { what, why }) }
}

/// Metrics, read and written anew, so that containerd gets metrics and nothing else.
///
/// # Errors
/// [`GuestError::Nonsense`].
pub fn clean_metrics(stats: Any) -> Result<Vec<u8>, GuestError> {
    let nonsense = |why| GuestError::Nonsense { what: "read metrics", why };
    if stats.type_url.rsplit('/').next() != Some(STATS_TYPE) {
        return Err(nonsense("metrics of another type"));
    }
    if stats.value.len() > MAX_STATS {
        return Err(nonsense("metrics of more than 64 KiB"));
    }
    let metrics = Metrics::parse_from_bytes(&stats.value).ok().map(|mut metrics| {
        metrics.special_fields = Default::default();
        metrics
    });
    metrics.and_then(|metrics| metrics.write_to_bytes().ok()).ok_or(nonsense("metrics that are none"))
}

/// What the guest says has happened; `None` where that makes no sense.
pub fn read_event(event: WireEvent) -> Option<GuestEvent> {
    match event.what? {
        What::Exit(exit) => {
            let container = ContainerId::new(exit.container_id).ok()?;
            let exec = (!exit.exec_id.is_empty()).then(|| ExecId::new(exit.exec_id)).transpose().ok()?;
            Some(GuestEvent::Exit(ProcessKey { container, exec }, exit.status.min(255)))
        }
        What::Oom(oom) => Some(GuestEvent::Oom(ContainerId::new(oom.container_id).ok()?)),
        What::Damage(damage) => {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'.';
            let name = damage.image.len() <= MAX_IMAGE && damage.image.bytes().all(plain);
            name.then_some(GuestEvent::Damage(damage.image, damage.block))
        }
        _ => None,
    }
}

async fn admit(mut socket: UnixStream) -> Option<UnixStream> {
    let mut bytes = [0; PREAMBLE_LEN];
    socket.read_exact(&mut bytes).await.ok()?;
    let preamble = Preamble::decode(&bytes).ok()?;
    let mut status = preamble.status();
    if preamble.kind != Kind::Rpc {
        status = Status::UnknownStream;
    }
    socket.write_all(&Answer::new(status).encode()).await.ok()?;
    (status == Status::Accepted).then_some(socket)
}

/// Ends with the guest.
async fn keep_time(agent: AgentClient) {
    loop {
        tokio::time::sleep(CLOCK_PERIOD).await;
        let request = SetTimeRequest { realtime_ns: now_ns(), ..SetTimeRequest::default() };
        if agent.set_time(soon(), &request).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use nacelle_protocol::agent::{Damage, Exit, Oom};

    use super::*;

    fn exit(container: &str, exec: &str, status: u32) -> WireEvent {
        let exit = Exit { container_id: container.into(), exec_id: exec.into(), status, pid: 7, ..Exit::default() };
        WireEvent { number: 1, what: Some(What::Exit(exit)), ..WireEvent::default() }
    }

    #[test]
    fn events_are_checked() {
        let id = |text: &str| ContainerId::new(text).expect("id");
        let key = ProcessKey { container: id("c1"), exec: None };
        assert_eq!(read_event(exit("c1", "", 3)), Some(GuestEvent::Exit(key.clone(), 3)));
        assert_eq!(read_event(exit("c1", "", 70_000)), Some(GuestEvent::Exit(key, 255)));
        assert_eq!(read_event(exit("../c1", "", 3)), None);
        assert_eq!(read_event(exit("c1", "a/b", 3)), None);
        assert_eq!(read_event(WireEvent::default()), None);
        let oom = Oom { container_id: "c1".into(), ..Oom::default() };
        let oom = WireEvent { what: Some(What::Oom(oom)), ..WireEvent::default() };
        assert_eq!(read_event(oom), Some(GuestEvent::Oom(id("c1"))));
        let damage = |image: &str| {
            let damage = Damage { image: image.into(), block: 7, ..Damage::default() };
            read_event(WireEvent { what: Some(What::Damage(damage)), ..WireEvent::default() })
        };
        let image = format!("{}.erofs", "0a".repeat(32));
        assert_eq!(damage(&image), Some(GuestEvent::Damage(image.clone(), 7)));
        assert_eq!(damage("../passwd"), None);
        assert_eq!(damage(&image.repeat(2)), None);
    }

    #[test]
    fn errors_are_short_and_printable() {
        let status = ttrpc::get_status(Code::NOT_FOUND, format!("no\n\x1b[1m{}", "x".repeat(10_000)));
        let error = check::<()>("do it", Err(ttrpc::Error::RpcStatus(status))).expect_err("error");
        let text = error.to_string();
        assert!(text.starts_with("do it: no  [1mxxx") && text.len() < MAX_MESSAGE + 20);
    }

    #[tokio::test]
    async fn the_first_right_preamble_wins() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("rpc.sock");
        let listener = UnixListener::bind(&path).expect("bind");
        let accept = tokio::spawn(Guest::accept(listener, Arc::default()));
        for bad in [Preamble::new(Kind::Stream, 0), Preamble { generation: 99, ..Preamble::new(Kind::Rpc, 0) }] {
            let mut socket = UnixStream::connect(&path).await.expect("connect");
            socket.write_all(&bad.encode()).await.expect("write");
            let mut answer = [0; 8];
            socket.read_exact(&mut answer).await.expect("read");
            assert!(Answer::check(&answer).is_err());
        }
        let mut garbage = UnixStream::connect(&path).await.expect("connect");
        garbage.write_all(&[0; PREAMBLE_LEN]).await.expect("write");
        let mut good = UnixStream::connect(&path).await.expect("connect");
        good.write_all(&Preamble::new(Kind::Rpc, 0).encode()).await.expect("write");
        let mut answer = [0; 8];
        good.read_exact(&mut answer).await.expect("read");
        Answer::check(&answer).expect("accepted");
        assert!(accept.await.expect("join").is_ok());
    }
}
