//! The shim from its calls down to the sockets: a VMM made of a shell script, and an agent that the test plays itself.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use containerd_shim_protos::api;
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Events, Task, create_events, create_task};
use containerd_shim_protos::types::empty::Empty;
use nacelle_protocol::agent as wire;
use nacelle_protocol::ids::{ExecId, SandboxId};
use nacelle_protocol::stream::{Answer, Header, Kind, Preamble, parse_stream_uri};
use nacelle_rootfs::plan::Mount;
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, TtrpcContext};

use super::*;
use crate::config::Origin;
use crate::sandbox::KILLED;
use crate::service::code_of;
use crate::task::{Create, Exec};

const PATIENCE: Duration = Duration::from_secs(20);

/// What the agent of the test knows.
#[derive(Default)]
struct Agent {
    run: PathBuf,
    outputs: Mutex<BTreeMap<String, String>>,
    events: Mutex<Vec<wire::Event>>,
    news: Notify,
}

impl Agent {
    fn exit(&self, id: &str, exec: &str, status: u32) {
        let exit = wire::Exit { container_id: id.into(), exec_id: exec.into(), status, pid: 5, ..Default::default() };
        let mut events = self.events.lock().expect("lock");
        let number = events.len() as u64 + 1;
        events.push(wire::Event { number, what: Some(wire::event::What::Exit(exit)), ..Default::default() });
        drop(events);
        self.news.notify_one();
    }

    async fn dial(&self, socket: &str, preamble: Preamble) -> UnixStream {
        let mut stream = UnixStream::connect(self.run.join("sock").join(socket)).await.expect("dial");
        stream.write_all(&preamble.encode()).await.expect("preamble");
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).await.expect("answer");
        Answer::check(&answer).expect("accepted");
        stream
    }

    /// Writes `text` to the stream that the host has named, and ends it.
    async fn say(&self, uri: &str, text: &str) {
        let Some(id) = parse_stream_uri(uri).expect("uri") else { return };
        let mut stream = self.dial("stream.sock", Preamble::new(Kind::Stream, id)).await;
        stream.write_all(&Header::data(text.len() as u32).encode()).await.expect("header");
        stream.write_all(text.as_bytes()).await.expect("data");
        stream.write_all(&Header::EOF.encode()).await.expect("eof");
    }
}

fn refuse<T>(code: ttrpc::Code, text: &str) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, text)))
}

struct Fake(Arc<Agent>);

#[async_trait::async_trait]
impl wire::Agent for Fake {
    async fn configure(&self, _: &TtrpcContext, r: wire::ConfigureRequest) -> ttrpc::Result<wire::ConfigureResponse> {
        assert_eq!(r.shares[0].tag, "layers");
        Ok(wire::ConfigureResponse { follows_host_clock: true, ..Default::default() })
    }

    async fn events(&self, _: &TtrpcContext, r: wire::EventsRequest) -> ttrpc::Result<wire::EventsResponse> {
        loop {
            let events: Vec<_> = {
                let all = self.0.events.lock().expect("lock");
                all.iter().filter(|event| event.number > r.after).cloned().collect()
            };
            if !events.is_empty() {
                return Ok(wire::EventsResponse { events, ..Default::default() });
            }
            self.0.news.notified().await;
        }
    }
}

#[async_trait::async_trait]
impl Task for Fake {
    async fn create(&self, _: &TtrpcContext, r: api::CreateTaskRequest) -> ttrpc::Result<api::CreateTaskResponse> {
        let container: wire::Container = serde_json::from_slice(&r.options.value).expect("container");
        let lower = &container.rootfs.lowers[0];
        assert!(lower.name.ends_with(".erofs"), "{lower:?}");
        if container.spec["process"]["args"][0] == "fail" {
            return refuse(ttrpc::Code::NOT_FOUND, "exec \"fail\": no such file or directory");
        }
        self.0.say(&r.stdout, "hello\n").await;
        Ok(api::CreateTaskResponse { pid: 5, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, r: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        let output = self.0.outputs.lock().expect("lock").remove(&r.exec_id);
        if let Some(uri) = output {
            self.0.say(&uri, "from the exec\n").await;
            // Before the answer to the start: it has to wait.
            self.0.exit(&r.id, &r.exec_id, 3);
        }
        Ok(api::StartResponse { pid: 6, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, r: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.0.outputs.lock().expect("lock").insert(r.exec_id, r.stdout);
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, r: api::KillRequest) -> ttrpc::Result<Empty> {
        self.0.exit(&r.id, &r.exec_id, 128 + r.signal);
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, _: api::DeleteRequest) -> ttrpc::Result<api::DeleteResponse> {
        Ok(api::DeleteResponse::new())
    }

    async fn pids(&self, _: &TtrpcContext, _: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        let process = |pid| containerd_shim_protos::types::task::ProcessInfo { pid, ..Default::default() };
        Ok(api::PidsResponse { processes: vec![process(5), process(6)], ..Default::default() })
    }
}

/// Takes containerd's events.
#[derive(Clone, Default)]
struct Inbox(Arc<Mutex<Vec<String>>>);

#[async_trait::async_trait]
impl Events for Inbox {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let mut line = request.envelope.topic.clone();
        if line == "/tasks/exit" {
            let exit = TaskExit::parse_from_bytes(&request.envelope.event.value).expect("decode");
            line = format!("{line} {} {}", exit.id, exit.exit_status);
        }
        self.0.lock().expect("lock").push(line);
        Ok(Empty::new())
    }
}

/// A shim without containerd, and everything that it needs of the host.
pub(super) struct World {
    root: tempfile::TempDir,
    agent: Arc<Agent>,
    inbox: Inbox,
    handle: Handle,
    driver: tokio::task::JoinHandle<Farewell>,
    _terminate: oneshot::Sender<()>,
    _events: Server,
}

impl World {
    async fn new() -> Self {
        let agent = Arc::new(Mutex::new(None));
        let slot = agent.clone();
        let mut world = Self::with("", move |run| {
            let agent = Arc::new(Agent { run, ..Agent::default() });
            tokio::spawn(play(agent.clone()));
            *slot.lock().expect("lock") = Some(agent);
        })
        .await;
        world.agent = agent.lock().expect("lock").take().expect("an agent");
        world
    }

    /// A shim with these lines in the table `vm` of its configuration. `guest` is given the sandbox's directory, and plays
    /// the guest from then on; its sockets appear when a container is created.
    pub(super) async fn with(vm: &str, guest: impl FnOnce(PathBuf)) -> Self {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("subreaper");
        let root = tempfile::tempdir().expect("tempdir");
        let path = |name: &str| root.path().join(name);
        // As the real one, in a network namespace of its own.
        let vmm = "#!/bin/sh\n[ \"$1\" = in ] || exec unshare --net \"$0\" in\n\
                   cat <&3 >/dev/null\n(exec sleep 600) &\necho '{\"report\":\"started\",\"pid\":'$!'}' >&4\n";
        std::fs::write(path("vmm"), vmm).expect("write");
        std::fs::set_permissions(path("vmm"), std::fs::Permissions::from_mode(0o755)).expect("chmod");
        let config = format!(
            "[vm]\n{vm}kernel = \"/proc/self/exe\"\nvmm = {vmm:?}\nagent = \"/proc/self/exe\"\n\
             [rootfs]\ndir = {data:?}\nupper_mib = 64\n",
            vmm = path("vmm"),
            data = path("data"),
        );
        std::fs::write(path("kvm"), b"").expect("write");
        std::fs::create_dir_all(path("layer/bin")).expect("mkdir");
        std::fs::create_dir_all(path("bundle")).expect("mkdir");
        let inbox = Inbox::default();
        let address = path("events.sock").display().to_string();
        let mut events = Server::new()
            .bind(&format!("unix://{address}"))
            .expect("bind")
            .register_service(create_events(Arc::new(inbox.clone())));
        events.start().await.expect("start");
        let id = |text| SandboxId::new(text).expect("id");
        let env = Env {
            namespace: id("ns"),
            sandbox: id("c1"),
            exe: "/nonexistent/bin/shim".into(),
            kvm: path("kvm"),
            run_root: path("run"),
            socket: path("socket"),
            origin: Origin { path: None, body: Some(config) },
        };
        guest(path("run/ns/c1"));
        let (driver, handle, terminate) = Driver::new(env, Publisher::new("ns", &address));
        let driver = tokio::spawn(driver.run());
        let agent = Arc::default();
        Self { agent, inbox, handle, driver, _terminate: terminate, _events: events, root }
    }

    pub(super) async fn call(&self, id: &str, exec: Option<&str>, call: Call) -> Result<Reply, TaskError> {
        let exec = exec.map(|e| ExecId::new(e).expect("id"));
        let key = ProcessKey { container: ContainerId::new(id).expect("id"), exec };
        timeout(PATIENCE, self.handle.call(key, call)).await.expect("an answer")
    }

    pub(super) fn create(&self, args: &str, stdout: &Path) -> Call {
        let config = serde_json::json!({
            "ociVersion": "1.1.0",
            "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": [args] },
            "root": { "path": "rootfs" },
            "linux": { "namespaces": [{ "type": "network" }, { "type": "mount" }] },
        });
        let bundle = self.root.path().join("bundle");
        std::fs::write(bundle.join("config.json"), config.to_string()).expect("write");
        let rootfs = Mount {
            kind: "bind".into(),
            source: self.root.path().join("layer").display().to_string(),
            options: vec!["rbind".into(), "ro".into()],
            ..Mount::default()
        };
        let io = Wanted { stdout: format!("file://{}", stdout.display()), ..Wanted::default() };
        Call::Create(Create { bundle, rootfs: vec![rootfs], io, origin: None, sandbox: None })
    }

    pub(super) fn log(&self) -> PathBuf {
        self.root.path().join("out.log")
    }

    async fn running(&self) -> u32 {
        let created = self.call("c1", None, self.create("sh", &self.log())).await.expect("create");
        let Reply::Pid(pid) = created else { panic!("{created:?}") };
        assert!(Path::new(&format!("/proc/{pid}")).exists(), "a process of the host's");
        self.call("c1", None, Call::Start).await.expect("start");
        pid
    }

    pub(super) fn wait(&self, id: &str, exec: Option<&str>) -> impl Future<Output = Result<Reply, TaskError>> + use<> {
        let exec = exec.map(|e| ExecId::new(e).expect("id"));
        let key = ProcessKey { container: ContainerId::new(id).expect("id"), exec };
        let handle = self.handle.clone();
        async move { timeout(PATIENCE, handle.call(key, Call::Wait)).await.expect("an exit") }
    }

    pub(super) async fn gone(&self) {
        let left = || ["run/ns/c1", "data/pods/ns/c1"].iter().any(|dir| self.root.path().join(dir).exists());
        timeout(PATIENCE, async {
            while left() {
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .expect("nothing is left");
    }

    /// Leaves in good order, and says what containerd has heard.
    pub(super) async fn leave(self) -> Vec<String> {
        let key = ProcessKey { container: ContainerId::new("c1").expect("id"), exec: None };
        let answer = tokio::spawn(async move { self.handle.call(key, Call::Shutdown).await });
        let (publisher, reply) = timeout(PATIENCE, self.driver).await.expect("ends").expect("join");
        publisher.close(PATIENCE).await;
        reply.expect("somebody asked").send(Ok(Reply::Done)).expect("waits");
        answer.await.expect("join").expect("an answer");
        self.inbox.0.lock().expect("lock").clone()
    }
}

/// Why the VM of a world was ended, as the next caller is told.
pub(super) async fn dead_end(world: &World) -> String {
    let error = world.call("c2", None, world.create("sh", &world.log())).await.expect_err("there is no VM");
    assert_eq!(code_of(&error), ttrpc::Code::UNAVAILABLE);
    crate::chain(&error)
}

/// The agent: dials as soon as there is somebody to dial, and serves.
async fn play(agent: Arc<Agent>) {
    while !agent.run.join("sock/stream.sock").exists() {
        sleep(Duration::from_millis(5)).await;
    }
    let socket = agent.dial("rpc.sock", Preamble::new(Kind::Rpc, 0)).await;
    let once = futures::stream::iter([Ok(socket)]);
    let listener = Listener::new(futures::StreamExt::chain(once, futures::stream::pending()));
    let fake = Arc::new(Fake(agent));
    let mut server = Server::new().add_listener(listener).register_service(create_task(fake.clone()));
    server = server.register_service(wire::create_agent(fake));
    server.start().await.expect("start");
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_life() {
    let world = World::new().await;
    let pid = world.running().await;
    let exit = tokio::spawn(world.wait("c1", None));
    let exec = Exec {
        process: br#"{"user":{"uid":0,"gid":0},"cwd":"/","args":["x"]}"#.to_vec(),
        io: Wanted { stdout: format!("file://{}", world.log().display()), ..Wanted::default() },
    };
    world.call("c1", Some("e1"), Call::Exec(exec.clone())).await.expect("exec");
    let again = world.call("c1", Some("e1"), Call::Exec(exec)).await.expect_err("twice");
    assert_eq!(code_of(&again), ttrpc::Code::ALREADY_EXISTS);
    world.call("c1", Some("e1"), Call::Start).await.expect("start");
    let Ok(Reply::Exit(6, Some(Exit { status: 3, .. }))) = world.wait("c1", Some("e1")).await else { panic!() };
    world.call("c1", Some("e1"), Call::Delete).await.expect("delete");
    let Ok(Reply::Pids(pids)) = world.call("c1", None, Call::Pids).await else { panic!() };
    assert_eq!(pids, [pid, 6]);
    let early = world.call("c1", None, Call::Delete).await.expect_err("it runs");
    assert_eq!(code_of(&early), ttrpc::Code::FAILED_PRECONDITION);
    world.call("c1", None, Call::Kill { signal: 15, all: false }).await.expect("kill");
    let Ok(Reply::Exit(_, Some(Exit { status: 143, .. }))) = exit.await.expect("join") else { panic!() };
    let late = world.call("c1", None, Call::Kill { signal: 9, all: true }).await.expect_err("finished");
    assert_eq!(code_of(&late), ttrpc::Code::NOT_FOUND);
    let Ok(Reply::Exit(deleted, Some(_))) = world.call("c1", None, Call::Delete).await else { panic!() };
    assert_eq!(deleted, pid);
    assert_eq!(std::fs::read_to_string(world.log()).expect("read"), "hello\nfrom the exec\n");
    world.gone().await;
    let heard = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit e1 3",
        "/tasks/exit c1 143",
        "/tasks/delete",
    ];
    assert_eq!(world.leave().await, heard);
}

#[tokio::test]
async fn a_vmm_that_dies_ends_everything_once() {
    let world = World::new().await;
    let pid = world.running().await;
    let exit = tokio::spawn(world.wait("c1", None));
    tokio::task::yield_now().await;
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
    let Ok(Reply::Exit(_, Some(Exit { status: KILLED, .. }))) = exit.await.expect("join") else { panic!() };
    // What comes after is not said again.
    world.agent.exit("c1", "", 0);
    let Ok(Reply::Pids(pids)) = world.call("c1", None, Call::Pids).await else { panic!() };
    assert_eq!(pids.len(), 1, "a task that exists has a process id");
    let stats = world.call("c1", None, Call::Stats).await.expect_err("never asked before");
    assert_eq!(code_of(&stats), ttrpc::Code::NOT_FOUND);
    world.call("c1", None, Call::Delete).await.expect("delete");
    world.gone().await;
    assert_eq!(world.leave().await, ["/tasks/create", "/tasks/start", "/tasks/exit c1 137", "/tasks/delete"]);
}

#[tokio::test]
async fn a_container_that_cannot_be_created_leaves_nothing() {
    let world = World::new().await;
    let error = world.call("c1", None, world.create("fail", &world.log())).await.expect_err("refused");
    let text = crate::chain(&error);
    assert!(text.contains("\"fail\"") && text.contains("no such file or directory"), "{text}");
    assert_eq!(code_of(&error), ttrpc::Code::UNKNOWN, "not found is no news about the task");
    world.gone().await;
    let missing = world.call("c1", None, Call::State).await.expect_err("gone");
    assert_eq!(code_of(&missing), ttrpc::Code::NOT_FOUND);
    assert!(world.leave().await.is_empty());
}
