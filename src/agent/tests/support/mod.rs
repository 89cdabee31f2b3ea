//! The host's half of a guest that runs in this process: its own mount and PID namespaces, a cgroup, and lowers made of
//! busybox. Needs root, unshare(1), mkfs.erofs(1) and a static busybox.

#![allow(dead_code, reason = "every test binary uses another part of it")]

use std::collections::HashMap;
use std::future::Future;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, StartRequest, StateRequest,
    Status, WaitRequest,
};
use containerd_shim_protos::shim_async::TaskClient;
use nacelle_agent::dial::{Connection, Dial};
use nacelle_agent::guest::Guest;
use nacelle_agent::serve;
use nacelle_protocol::agent::{AgentClient, CONTAINER_TYPE, Event, EventsRequest, event::What};
use nacelle_protocol::stream::{
    ANSWER_LEN, Answer, FrameKind, HEADER_LEN, Header, Kind, MAX_DATA, PREAMBLE_LEN, Preamble, Status as Go,
    credit_frame, stream_uri,
};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use rustix::mount::{MountFlags, mount, mount_bind};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use ttrpc::r#async::{Client, transport::Socket};
use ttrpc::context::{Context, with_duration};

const INSIDE: &str = "NACELLE_TEST_INSIDE";
const LAYERS: &str = "NACELLE_TEST_LAYERS";
const RUN: Duration = Duration::from_secs(120);

/// Runs `body` as PID 1 of namespaces of its own. `name` is the test's own name.
pub fn guest<F: Future<Output = ()>>(name: &str, body: impl FnOnce(Host) -> F) {
    if std::env::var_os(INSIDE).is_none() {
        let cgroup = cgroup_mount();
        // EROFS reads a file by itself only where the file's own system has a page cache of the usual kind.
        let layers = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("directory");
        let status = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--"])
            .arg(std::env::current_exe().expect("own path"))
            .args(["--exact", name, "--nocapture"])
            .env(INSIDE, &cgroup)
            .env(LAYERS, layers.path())
            .status()
            .expect("unshare");
        remove_cgroup(&cgroup);
        assert!(status.success(), "{name} failed inside");
        return;
    }
    prepare(Path::new(&std::env::var_os(INSIDE).expect("set")));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async { tokio::time::timeout(RUN, body(Host::boot().await)).await.expect("in time") });
}

/// A directory in the unified hierarchy, wherever this machine has it.
fn cgroup_mount() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let unified = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("a cgroup2 mount");
    let root = PathBuf::from(unified.split(' ').nth(4).expect("mount point"));
    let cgroup = root.join(format!("nacelle-test-{}-{}", std::process::id(), rand()));
    std::fs::create_dir(&cgroup).expect("make cgroup");
    let controllers = std::fs::read_to_string(cgroup.join("cgroup.controllers")).expect("controllers");
    if !controllers.contains("memory") {
        // The real hierarchy of a machine with cgroup v1 has no controllers; on a real v2 machine they are there.
        let enable: String = ["cpu", "memory", "pids", "io", "cpuset"].map(|c| format!("+{c} ")).concat();
        let _ = std::fs::write(root.join("cgroup.subtree_control"), enable);
    }
    cgroup
}

fn rand() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos()
}

fn remove_cgroup(cgroup: &Path) {
    for child in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if child.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroup(&child.path());
        }
    }
    for _ in 0..50 {
        match std::fs::remove_dir(cgroup) {
            Err(error) if error.raw_os_error() == Some(16) => std::thread::sleep(Duration::from_millis(20)),
            _ => return,
        }
    }
}

fn prepare(cgroup: &Path) {
    let inert = MountFlags::NOSUID | MountFlags::NODEV;
    // Before /run is hidden: the cgroup's path may lie anywhere.
    mount_bind(cgroup, "/sys/fs/cgroup").expect("bind cgroup");
    nacelle_agent::cgroup::prepare().expect("make cgroups");
    mount("tmpfs", "/run", "tmpfs", inert, None).expect("tmpfs");
    let layers = Path::new("/run/nacelle/layers");
    std::fs::create_dir_all(layers).expect("layers");
    mount_bind(std::env::var_os(LAYERS).expect("set"), layers).expect("bind layers");
    let base = Path::new("/run/base");
    base_tree(base);
    image("base", base);
}

/// A root file system with busybox and nothing else.
pub fn base_tree(base: &Path) {
    for directory in ["bin", "dev", "proc", "sys", "tmp", "etc", "root", "var"] {
        std::fs::create_dir_all(base.join(directory)).expect("directory");
    }
    std::fs::copy(busybox(), base.join("bin/busybox")).expect("busybox");
    for applet in [
        "sh", "echo", "cat", "sleep", "true", "false", "id", "pwd", "head", "dd", "stty", "ls", "kill", "env", "seq",
        "touch", "mount", "grep", "wc", "cut", "tr", "stat", "ps", "sed", "md5sum", "tail", "chmod", "mkdir",
        "hostname",
    ] {
        symlink("busybox", base.join("bin").join(applet)).expect("applet");
    }
    std::fs::write(base.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n").expect("f");
    std::fs::write(base.join("bin/plain"), "no program").expect("file");
}

fn busybox() -> PathBuf {
    ["/usr/bin/busybox", "/bin/busybox"].iter().map(PathBuf::from).find(|p| p.exists()).expect("busybox-static")
}

/// Makes lower `name` out of a directory.
pub fn image(name: &str, directory: &Path) {
    image_at(&Path::new("/run/nacelle/layers").join(name), directory);
}

/// Makes an EROFS image out of a directory.
pub fn image_at(image: &Path, directory: &Path) {
    let made = Command::new("mkfs.erofs").arg(image).arg(directory).output().expect("mkfs.erofs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// The host of one guest.
pub struct Host {
    pub task: TaskClient,
    pub agent: AgentClient,
    streams: Arc<Mutex<Streams>>,
}

#[derive(Default)]
struct Streams {
    next: u64,
    expected: HashMap<u64, oneshot::Sender<UnixStream>>,
}

/// A stream that the guest will dial.
pub struct Stream {
    pub name: String,
    dialled: oneshot::Receiver<UnixStream>,
}

/// The host's end of a stdin stream.
pub struct Stdin(pub UnixStream);

impl Host {
    async fn boot() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel::<UnixStream>();
        let dial: Dial = Arc::new(move |_port| {
            let sender = sender.clone();
            Box::pin(async move {
                let (ours, theirs) = UnixStream::pair()?;
                sender.send(theirs).expect("host lives");
                Ok(Box::new(ours) as Box<dyn Connection>)
            })
        });
        let guest = Guest::new(dial, env!("CARGO_BIN_EXE_nacelle-agent").into());
        tokio::spawn(serve::run(guest));
        Self::answer(receiver).await
    }

    /// Answers what a guest dials, and is its client.
    pub async fn answer(mut dialled: mpsc::UnboundedReceiver<UnixStream>) -> Self {
        let streams = Arc::new(Mutex::new(Streams::default()));
        let (rpc_sender, rpc) = oneshot::channel();
        tokio::spawn({
            let streams = streams.clone();
            async move {
                let mut rpc_sender = Some(rpc_sender);
                while let Some(mut connection) = dialled.recv().await {
                    let mut bytes = [0; PREAMBLE_LEN];
                    connection.read_exact(&mut bytes).await.expect("preamble");
                    let preamble = Preamble::decode(&bytes).expect("preamble");
                    let known = match preamble.kind {
                        Kind::Rpc => None,
                        Kind::Stream => streams.lock().expect("lock").expected.remove(&preamble.stream),
                    };
                    let go = preamble.kind == Kind::Rpc || known.is_some();
                    let answer = Answer::new(if go { Go::Accepted } else { Go::UnknownStream });
                    let answer: [u8; ANSWER_LEN] = answer.encode();
                    connection.write_all(&answer).await.expect("answer");
                    match (preamble.kind, known) {
                        (Kind::Rpc, _) => drop(rpc_sender.take().expect("one RPC connection").send(connection)),
                        (Kind::Stream, Some(waiter)) => drop(waiter.send(connection)),
                        (Kind::Stream, None) => {}
                    }
                }
            }
        });
        let client = Client::new(Socket::new(rpc.await.expect("the guest dials")));
        Self { task: TaskClient::new(client.clone()), agent: AgentClient::new(client), streams }
    }

    pub fn stream(&self) -> Stream {
        let (sender, dialled) = oneshot::channel();
        let mut streams = self.streams.lock().expect("lock");
        streams.next += 1;
        let id = streams.next;
        streams.expected.insert(id, sender);
        Stream { name: stream_uri(id), dialled }
    }

    /// Creates a container of the base lower. The streams' names come from `streams`: stdin, stdout, stderr.
    pub async fn create(&self, id: &str, spec: Value, lowers: &[&str], io: Names) -> ttrpc::Result<u32> {
        let lowers: Vec<_> = lowers.iter().map(|name| json!({"name": name})).collect();
        let container = json!({"spec": spec, "rootfs": {"lowers": lowers}, "pod_pids": false, "mirrors": []});
        let options = Any {
            type_url: CONTAINER_TYPE.into(),
            value: serde_json::to_vec(&container).expect("json"),
            ..Default::default()
        };
        let request = CreateTaskRequest {
            id: id.into(),
            terminal: io.terminal,
            stdin: io.stdin,
            stdout: io.stdout,
            stderr: io.stderr,
            options: MessageField::some(options),
            ..Default::default()
        };
        Ok(self.task.create(long(), &request).await?.pid)
    }

    pub async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.task.start(long(), &request).await?.pid)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> u32 {
        let request = WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.task.wait(long(), &request).await.expect("wait").exit_status
    }

    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let request = KillRequest { id: id.into(), exec_id: exec_id.into(), signal, all, ..Default::default() };
        self.task.kill(long(), &request).await.map(drop)
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.task.delete(long(), &request).await
    }

    pub async fn status(&self, id: &str, exec_id: &str) -> Status {
        let request = StateRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.task.state(long(), &request).await.expect("state").status.enum_value().expect("known")
    }

    pub async fn exec(&self, id: &str, exec_id: &str, process: Value, io: Names) -> ttrpc::Result<()> {
        let spec = Any { value: serde_json::to_vec(&process).expect("json"), ..Default::default() };
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            terminal: io.terminal,
            stdin: io.stdin,
            stdout: io.stdout,
            stderr: io.stderr,
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.task.exec(long(), &request).await.map(drop)
    }

    /// Runs an exec to its end: status and output.
    pub async fn run(&self, id: &str, exec_id: &str, process: Value) -> (u32, String) {
        let out = self.stream();
        let io = Names { stdout: out.name.clone(), stderr: String::new(), ..Names::default() };
        self.exec(id, exec_id, process, io).await.expect("exec");
        self.start(id, exec_id).await.expect("start");
        let text = out.text().await;
        let status = self.wait(id, exec_id).await;
        self.delete(id, exec_id).await.expect("delete");
        (status, text)
    }

    /// Every event so far, as one word each.
    pub async fn events(&self) -> Vec<String> {
        let request = EventsRequest::default();
        let wait = with_duration(Duration::from_millis(300));
        let events = self.agent.events(wait, &request).await.map(|r| r.events).unwrap_or_default();
        events.iter().map(word).collect()
    }
}

fn word(event: &Event) -> String {
    match event.what.as_ref().expect("an event says what") {
        What::Exit(exit) => format!("exit {} {} {}", exit.container_id, exit.exec_id, exit.status),
        What::Oom(oom) => format!("oom {}", oom.container_id),
        _ => "other".into(),
    }
}

pub fn long() -> Context {
    with_duration(Duration::from_secs(60))
}

/// Names of streams for a request.
#[derive(Clone, Default)]
pub struct Names {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

impl Stream {
    pub async fn connection(self) -> UnixStream {
        self.dialled.await.expect("dialled")
    }

    /// Everything up to the EOF frame.
    pub async fn bytes(self) -> Vec<u8> {
        let mut connection = self.connection().await;
        let mut all = Vec::new();
        while let Some(bytes) = next(&mut connection).await {
            let _ = connection.write_all(&credit_frame(bytes.len() as u32)).await;
            all.extend(bytes);
        }
        all
    }

    pub async fn text(self) -> String {
        String::from_utf8(self.bytes().await).expect("text")
    }
}

/// The next piece of output; `None` at its end.
pub async fn next(connection: &mut UnixStream) -> Option<Vec<u8>> {
    let mut head = [0; HEADER_LEN];
    connection.read_exact(&mut head).await.expect("frame");
    let header = Header::decode(&head).expect("frame");
    match header.kind {
        FrameKind::Data => {
            let mut body = vec![0; header.len as usize];
            connection.read_exact(&mut body).await.expect("data");
            Some(body)
        }
        FrameKind::Eof => None,
        FrameKind::Credit => panic!("output gives no credit"),
    }
}

impl Stdin {
    /// Sends bytes, waiting for credit as a host has to.
    pub async fn send_all(&mut self, bytes: &[u8], eof: bool) {
        let mut credit = u64::from(nacelle_protocol::stream::WINDOW);
        for chunk in bytes.chunks(MAX_DATA) {
            while credit < chunk.len() as u64 {
                let mut frame = [0; HEADER_LEN + 4];
                self.0.read_exact(&mut frame).await.expect("credit");
                credit += u64::from(u32::from_le_bytes(frame[HEADER_LEN..].try_into().expect("4 bytes")));
            }
            self.0.write_all(&Header::data(chunk.len() as u32).encode()).await.expect("header");
            self.0.write_all(chunk).await.expect("data");
            credit -= chunk.len() as u64;
        }
        if eof {
            self.0.write_all(&Header::EOF.encode()).await.expect("end");
        }
    }
}

/// A process as containerd describes it.
pub fn process(args: &[&str]) -> Value {
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin", "HOME=/root"],
        "user": {"uid": 0, "gid": 0},
        "capabilities": capabilities(),
        "noNewPrivileges": true,
    })
}

fn capabilities() -> Value {
    let set = json!(["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE"]);
    json!({"bounding": set, "effective": set, "permitted": set})
}

/// A container as the shim describes it.
pub fn spec(id: &str, args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "hostname": "box",
        "process": process(args),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]}
        ],
        "linux": {
            "cgroupsPath": format!("/{id}"),
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}
            ],
            "maskedPaths": ["/proc/kcore", "/proc/scsi"],
            "readonlyPaths": ["/proc/sys"]
        }
    })
}

/// Everything a guest may leave behind: mounts, cgroups, files, descriptors, children.
pub fn traces() -> Vec<String> {
    let mut traces: Vec<String> = std::fs::read_to_string("/proc/self/mountinfo")
        .expect("mountinfo")
        .lines()
        .filter(|line| line.contains("/run/nacelle") && !line.contains("/run/nacelle/layers "))
        .map(str::to_owned)
        .collect();
    for directory in ["containers", "upper", "lowers", "consoles"] {
        let entries = std::fs::read_dir(Path::new("/run/nacelle").join(directory));
        traces.extend(entries.into_iter().flatten().flatten().map(|e| e.path().display().to_string()));
    }
    // The pod's own stays for the next container.
    for directory in ["/sys/fs/cgroup", nacelle_agent::cgroup::POD] {
        let cgroups = std::fs::read_dir(directory).into_iter().flatten().flatten();
        let cgroups = cgroups.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path());
        traces.extend(cgroups.map(|p| p.display().to_string()).filter(|p| p != nacelle_agent::cgroup::POD));
    }
    traces
}

pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("fds").count()
}

/// Processes of this PID namespace, without the first.
pub fn processes() -> Vec<String> {
    let numbers = std::fs::read_dir("/proc").expect("proc").flatten();
    numbers
        .filter(|e| e.file_name().to_str().is_some_and(|n| n.parse::<u32>().is_ok_and(|pid| pid != 1)))
        .map(|e| std::fs::read_to_string(e.path().join("stat")).unwrap_or_default())
        .filter(|stat| !stat.is_empty())
        .collect()
}
