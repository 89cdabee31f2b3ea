//! A containerd of the tests' own: its sockets, directories and log, the images, and the containers on it.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    env, fs,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    command::{Cmd, Running, patience, tail},
    grpc::{self, CallError, Message},
};

/// The image that most tests run: busybox with every applet as a file.
pub const BUSYBOX: &str = "nacelle.test/busybox:latest";

/// What `NACELLE_RUNTIME` is when it is not set.
pub const NACELLE: &str = "io.containerd.nacelle.v2";

/// Where containerd is, by `NACELLE_CONTAINERD`; `NACELLE_CONTAINERD_BIN` overrides the directory.
const CONTAINERD: &[(&str, &str)] = &[("1.7", "/usr/bin"), ("2.1", "/opt/containerd-2.1/bin")];

/// containerd's namespace of the tests; its name shows in cgroups and bundle paths.
pub const NAMESPACE: &str = "nacelle-e2e";

/// Where `ctr` makes the FIFOs of a task.
pub const FIFOS: &str = "/run/containerd/fifo";

/// The id of the container that stays, see [`Node::resident`].
pub const RESIDENT: &str = "resident";

/// A running containerd. Dropped, it ends and its directories go.
pub struct Node {
    dir: TempDir,
    bin: PathBuf,
    runtime: String,
    containerd: RefCell<Option<Child>>,
    ids: Cell<u32>,
    imported: RefCell<BTreeSet<String>>,
}

/// The version of containerd that is tested: `NACELLE_CONTAINERD`.
pub fn containerd() -> String {
    env::var("NACELLE_CONTAINERD").unwrap_or_else(|_| "1.7".into())
}

impl Node {
    /// Starts a containerd and gives it [`BUSYBOX`].
    ///
    /// # Panics
    /// It does not start; its log says why.
    pub fn start() -> Self {
        let version = containerd();
        let bin = env::var_os("NACELLE_CONTAINERD_BIN").map(PathBuf::from).unwrap_or_else(|| {
            let known = CONTAINERD.iter().find(|(name, _)| *name == version);
            known.unwrap_or_else(|| panic!("NACELLE_CONTAINERD={version}: neither 1.7 nor 2.1")).1.into()
        });
        // Snapshots need a file system that overlayfs takes as upper, which the machine's /tmp may not be.
        let parent = env::var_os("NACELLE_E2E_DIR").unwrap_or_else(|| "/var/lib".into());
        let dir = tempfile::Builder::new().prefix("nacelle-e2e.").tempdir_in(parent).expect("make a directory");
        let runtime = env::var("NACELLE_RUNTIME").unwrap_or_else(|_| NACELLE.into());
        let node = Self {
            dir,
            bin,
            runtime,
            containerd: RefCell::default(),
            ids: Cell::default(),
            imported: RefCell::default(),
        };
        fs::write(node.path("containerd.toml"), node.configuration()).expect("write containerd's configuration");
        node.write_configuration(&node.path("nacelle"), "");
        node.start_containerd();
        node.ctr(["namespaces", "create", NAMESPACE]).ok();
        node.image("busybox");
        node
    }

    /// The reference of a test image, whose archive in `NACELLE_IMAGES` is imported when it is first asked for.
    pub fn image(&self, name: &str) -> String {
        if self.imported.borrow_mut().insert(name.to_owned()) {
            let images = env::var("NACELLE_IMAGES").unwrap_or_else(|_| "/opt/payload/images".into());
            let archive = format!("{images}/{name}.tar");
            self.ctr(["images", "import", &archive]).within(5 * patience()).ok();
        }
        format!("nacelle.test/{name}:latest")
    }

    /// containerd's version, such as `1.7.24`.
    pub fn version(&self) -> String {
        let line = Cmd::new(self.bin.join("containerd")).args(["--version"]).ok().text();
        line.split_whitespace().nth(2).unwrap_or_default().to_owned()
    }

    /// The runtime under test.
    pub fn runtime(&self) -> &str {
        &self.runtime
    }

    /// The runtime under test is nacelle, not the one that the tests themselves are tried with.
    pub fn is_nacelle(&self) -> bool {
        self.runtime == NACELLE
    }

    /// A path below the node's own directory.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The directories whose contents [`crate::leftovers`] watches.
    pub fn watched(&self) -> Vec<PathBuf> {
        vec![self.path("state"), self.path("root"), self.path("nacelle")]
    }

    /// A directory below containerd's state directory: the bundle of a container.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.path("state/io.containerd.runtime.v2.task").join(NAMESPACE).join(id)
    }

    /// `ctr` with this containerd's address and the tests' namespace.
    pub fn ctr<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Cmd {
        Cmd::new(self.bin.join("ctr")).args(["-a"]).args([self.socket()]).args(["-n", NAMESPACE]).args(args)
    }

    /// `ctr run FLAGS IMAGE ID COMMAND` with the runtime under test and a fresh id.
    pub fn run(&self, flags: &[&str], image: &str, command: &[&str]) -> Cmd {
        self.run_as(&self.fresh_id(), flags, image, command)
    }

    /// The same with a chosen id.
    pub fn run_as(&self, id: &str, flags: &[&str], image: &str, command: &[&str]) -> Cmd {
        self.ctr(["run", "--runtime", &self.runtime]).args(flags).args([image, id]).args(command)
    }

    /// A container that does nothing and stays, for tests that only run commands in one: machines take their time.
    pub fn resident(&self) -> Container<'_> {
        let c = self.adopt(RESIDENT);
        let state = c.state();
        if state.as_deref() != Some("RUNNING") {
            if state.is_some() {
                self.adopt(RESIDENT).delete();
            }
            self.run_as(&c.id, &["--detach"], BUSYBOX, &["sleep", "1000000"]).ok();
        }
        c
    }

    /// A container whose task was started by `ctr run --detach`.
    pub fn detached(&self, flags: &[&str], image: &str, command: &[&str]) -> Container<'_> {
        let id = self.fresh_id();
        let container = Container { node: self, id };
        self.run_as(&container.id, &[&["--detach"], flags].concat(), image, command).ok();
        container
    }

    /// A pod: its sandbox, and a container that waits of each image, as CRI would make them.
    pub fn pod(&self, images: &[&str]) -> Vec<Container<'_>> {
        self.annotated_pod(images, &[])
    }

    /// The same with annotations (`name=value`) of the pod, which its sandbox and its containers have.
    pub fn annotated_pod(&self, images: &[&str], annotations: &[&str]) -> Vec<Container<'_>> {
        let more: Vec<&str> = annotations.iter().flat_map(|pair| ["--annotation", pair]).collect();
        let sandbox = self.fresh_id();
        let containers = images.iter().map(|image| ("container", *image));
        let made = std::iter::once(("sandbox", BUSYBOX)).chain(containers).map(|(kind, image)| {
            let annotations = [("container-type", kind), ("sandbox-id", &sandbox)];
            let annotations = annotations.map(|(name, value)| format!("io.kubernetes.cri.{name}={value}"));
            let flags: Vec<&str> = annotations.iter().flat_map(|pair| ["--annotation", pair]).collect();
            let id = if kind == "sandbox" { sandbox.clone() } else { self.fresh_id() };
            let container = Container { node: self, id };
            let flags = [&["--detach"], &flags[..], &more[..]].concat();
            self.run_as(&container.id, &flags, image, &["sleep", "1000000"]).within(patience() * 2).ok();
            container
        });
        made.collect()
    }

    /// A container without a task, made by `ctr containers create`.
    pub fn created(&self, flags: &[&str], image: &str, command: &[&str]) -> Container<'_> {
        let id = self.fresh_id();
        let create = self.ctr(["containers", "create", "--runtime", &self.runtime]).args(flags);
        create.args([image, &id]).args(command).ok();
        Container { node: self, id }
    }

    /// Takes charge of a container that a command of the test makes.
    pub fn adopt(&self, id: &str) -> Container<'_> {
        Container { node: self, id: id.to_owned() }
    }

    /// An id that no container of this node had.
    pub fn fresh_id(&self) -> String {
        self.ids.set(self.ids.get() + 1);
        format!("c{}", self.ids.get())
    }

    /// Calls containerd's API.
    ///
    /// # Errors
    /// What containerd answers, see [`grpc::call`].
    pub fn call(&self, method: &str, message: Message, within: Duration) -> Result<Vec<u8>, CallError> {
        grpc::call(&self.socket(), NAMESPACE, method, message, within)
    }

    /// The shim of the runtime under test, found as containerd finds it.
    pub fn shim_program(&self) -> PathBuf {
        let name = self.runtime.trim_start_matches("io.containerd.").replace('.', "-");
        let file = format!("containerd-shim-{name}");
        let path = env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(self.bin.clone()).chain(env::split_paths(&path));
        dirs.map(|dir| dir.join(&file)).find(|program| program.exists()).unwrap_or_else(|| panic!("no {file} in PATH"))
    }

    /// containerd's socket.
    pub fn socket(&self) -> PathBuf {
        self.path("containerd.sock")
    }

    /// Kills containerd with SIGKILL.
    pub fn kill_containerd(&self) {
        let mut containerd = self.containerd.borrow_mut().take().expect("containerd runs");
        containerd.kill().and_then(|()| containerd.wait()).expect("kill containerd");
    }

    /// Starts containerd and returns when it says that it is ready.
    pub fn start_containerd(&self) {
        let notify = self.path("notify.sock");
        fs::remove_file(&notify).ok();
        let ready = UnixDatagram::bind(&notify).expect("make a socket");
        ready.set_read_timeout(Some(patience())).expect("set a deadline");
        let log = fs::File::options().create(true).append(true).open(self.log()).expect("open containerd's log");
        let path = env::join_paths(
            std::iter::once(self.bin.clone()).chain(env::split_paths(&env::var_os("PATH").unwrap_or_default())),
        );
        let child = Command::new(self.bin.join("containerd"))
            .args(["--config".as_ref(), self.path("containerd.toml").as_os_str()])
            .env("PATH", path.expect("directories without colons"))
            .env("NOTIFY_SOCKET", &notify)
            .env("NACELLE_CONFIG", self.path("nacelle.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("copy a descriptor"))
            .stderr(log)
            .spawn()
            .expect("start containerd");
        *self.containerd.borrow_mut() = Some(child);
        let mut message = [0; 512];
        loop {
            let n = ready.recv(&mut message).unwrap_or_else(|e| panic!("containerd: {e}\n{}", self.log_since(0)));
            if message[..n].starts_with(b"READY=1") {
                return;
            }
        }
    }

    /// containerd's log, which has the shims' lines too.
    pub fn log(&self) -> PathBuf {
        self.path("containerd.log")
    }

    /// How long the log is now, for [`Node::log_since`].
    pub fn log_length(&self) -> usize {
        fs::metadata(self.log()).map_or(0, |m| usize::try_from(m.len()).unwrap_or_default())
    }

    /// The end of what was logged since then.
    pub fn log_since(&self, length: usize) -> String {
        let log = fs::read(self.log()).unwrap_or_default();
        tail(&String::from_utf8_lossy(log.get(length..).unwrap_or_default()), 60)
    }

    /// Whether `text` was logged since then, by containerd or by a shim.
    pub fn logged_since(&self, length: usize, text: &str) -> bool {
        let log = fs::read(self.log()).unwrap_or_default();
        String::from_utf8_lossy(log.get(length..).unwrap_or_default()).contains(text)
    }

    /// Adds lines such as `vm.vcpus = 2` to nacelle's configuration, for as long as the value lives.
    pub fn configure(&self, lines: &str) -> Configured<'_> {
        self.write_configuration(&self.path("nacelle"), lines);
        Configured(self)
    }

    /// Gives nacelle another directory for layers and writable disks, and adds lines, for as long as the value lives.
    pub fn configure_data_dir(&self, dir: &Path, lines: &str) -> Configured<'_> {
        self.write_configuration(dir, lines);
        Configured(self)
    }

    /// Every shim reads it anew when it starts. Machines may be emulated and slow, so the time to boot is long.
    fn write_configuration(&self, data: &Path, lines: &str) {
        let boot = if lines.contains("boot_timeout") { "" } else { "vm.boot_timeout_seconds = 120\n" };
        let vcpus = env::var("NACELLE_VCPUS").ok().filter(|n| !n.is_empty() && !lines.contains("vm.vcpus"));
        let vcpus = vcpus.map(|n| format!("vm.vcpus = {n}\n")).unwrap_or_default();
        let text = format!("rootfs.dir = {data:?}\nlog.level = \"debug\"\n{boot}{vcpus}{lines}\n");
        fs::write(self.path("nacelle.toml"), text).expect("write nacelle's configuration");
    }

    /// Deletes all containers and their tasks, whatever their state: after a test that failed.
    pub fn delete_everything(&self) {
        for task in self.ctr(["tasks", "list", "-q"]).run().text().lines() {
            self.ctr(["tasks", "delete", "--force", task]).run();
        }
        for container in self.containers().unwrap_or_default() {
            self.ctr(["containers", "delete", &container]).run();
        }
    }

    /// The containers in the tests' namespace. Asked for over the API, like all that is asked after every test: `ctr` takes an
    /// emulated processor most of a second to start.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn containers(&self) -> Result<Vec<String>, CallError> {
        let answer = self.call("/containerd.services.containers.v1.Containers/List", Message::default(), patience())?;
        grpc::all(&answer, 1)?.iter().map(|container| Ok(String::from_utf8(grpc::bytes(container, 1)?)?)).collect()
    }

    fn configuration(&self) -> String {
        let path = |name| self.path(name).display().to_string();
        // Version 2 is read by 1.7 and 2.x alike. CRI has suites of its own.
        format!(
            r#"version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{socket}"
[ttrpc]
address = "{socket}.ttrpc"
[debug]
level = "debug"
[plugins."io.containerd.internal.v1.opt"]
path = "{opt}"
"#,
            root = path("root"),
            state = path("state"),
            socket = path("containerd.sock"),
            opt = path("opt"),
        )
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut containerd) = self.containerd.borrow_mut().take() {
            containerd.kill().and_then(|()| containerd.wait()).ok();
        }
    }
}

/// A changed configuration; dropped, it is the usual one again.
pub struct Configured<'n>(&'n Node);

impl Drop for Configured<'_> {
    fn drop(&mut self) {
        self.0.write_configuration(&self.0.path("nacelle"), "");
    }
}

/// One mount of a root file system, as snapshotters describe them.
#[derive(Clone, Debug)]
pub struct Mount {
    /// File system type, such as `overlay`.
    pub kind: String,
    /// Device, directory or whatever the type takes.
    pub source: String,
    /// Options, one each.
    pub options: Vec<String>,
}

/// A container, and perhaps its task. A test ends with [`Container::remove`] or [`Container::delete`]; when it panics
/// before, both are deleted by force.
pub struct Container<'n> {
    node: &'n Node,
    id: String,
}

impl Container<'_> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What containerd keeps of it, a `containerd.services.containers.v1.Container`.
    fn record(&self) -> Vec<u8> {
        let message = Message::default().bytes(1, &self.id);
        let answer = self.node.call("/containerd.services.containers.v1.Containers/Get", message, patience());
        answer.and_then(|answer| grpc::bytes(&answer, 1)).unwrap_or_else(|e| panic!("get container {}: {e}", self.id))
    }

    /// Its spec, as containerd keeps it.
    pub fn spec(&self) -> Value {
        let spec = grpc::bytes(&self.record(), 5).and_then(|any| grpc::bytes(&any, 2));
        serde_json::from_slice(&spec.expect("a spec")).expect("a spec in JSON")
    }

    /// The snapshot of its root file system, as the fields of a call to the snapshotters.
    fn snapshot(&self) -> Message {
        let record = self.record();
        let field = |number| grpc::bytes(&record, number).expect("a container with a snapshot");
        Message::default().bytes(1, field(6)).bytes(2, field(7))
    }

    /// Changes its spec, before it has a task.
    pub fn edit(&self, change: impl FnOnce(&mut Value)) {
        let mut spec = self.spec();
        change(&mut spec);
        self.set_spec(&serde_json::to_vec(&spec).expect("JSON of JSON"));
    }

    /// Gives it these bytes as its spec.
    pub fn set_spec(&self, bytes: &[u8]) {
        let container = Message::default()
            .bytes(1, &self.id)
            .message(5, Message::any("types.containerd.io/opencontainers/runtime-spec/1/Spec", bytes));
        let mask = Message::default().bytes(1, "spec");
        let update = Message::default().message(1, container).message(2, mask);
        let method = "/containerd.services.containers.v1.Containers/Update";
        self.node.call(method, update, patience()).unwrap_or_else(|e| panic!("update {}: {e}", self.id));
    }

    /// The mounts that make its root file system.
    pub fn mounts(&self) -> Vec<Mount> {
        let text = |mount: &[u8], field| -> Result<Vec<String>, CallError> {
            grpc::all(mount, field)?.into_iter().map(|bytes| Ok(String::from_utf8(bytes)?)).collect()
        };
        let one = |mount: Vec<u8>| {
            Ok(Mount { kind: text(&mount, 1)?.concat(), source: text(&mount, 2)?.concat(), options: text(&mount, 4)? })
        };
        let answer = self.node.call("/containerd.services.snapshots.v1.Snapshots/Mounts", self.snapshot(), patience());
        let mounts = answer.and_then(|answer| grpc::all(&answer, 1)?.into_iter().map(one).collect());
        mounts.unwrap_or_else(|e: CallError| panic!("mounts of {}: {e}", self.id))
    }

    /// Creates its task through the Create call, without starting it and without streams.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn create_task(&self, mounts: &[Mount]) -> Result<(), CallError> {
        let mut message = Message::default().bytes(1, &self.id);
        for mount in mounts {
            let fields = Message::default().bytes(1, &mount.kind).bytes(2, &mount.source);
            message = message.message(3, mount.options.iter().fold(fields, |fields, option| fields.bytes(4, option)));
        }
        self.node.call("/containerd.services.tasks.v1.Tasks/Create", message, patience()).map(drop)
    }

    /// `ctr tasks start FLAGS`: with `--detach`, or to the end of the task.
    pub fn start(&self, flags: &[&str]) -> Cmd {
        self.node.ctr(["tasks", "start"]).args(flags).args([&self.id])
    }

    /// `ctr tasks exec FLAGS ID COMMAND` with a fresh exec id.
    pub fn exec(&self, flags: &[&str], command: &[&str]) -> Cmd {
        let id = format!("e{}", self.node.fresh_id());
        self.exec_as(&id, flags, command)
    }

    /// The same with a chosen exec id.
    pub fn exec_as(&self, exec_id: &str, flags: &[&str], command: &[&str]) -> Cmd {
        self.node.ctr(["tasks", "exec", "--exec-id", exec_id]).args(flags).args([&self.id]).args(command)
    }

    /// What `sh -c SCRIPT` in it prints.
    pub fn sh(&self, script: &str) -> String {
        self.exec(&[], &["sh", "-c", script]).ok().text()
    }

    /// `ctr tasks kill -s SIGNAL`.
    pub fn kill(&self, signal: &str) {
        self.node.ctr(["tasks", "kill", "-s", signal, &self.id]).ok();
    }

    /// Sends its task SIGKILL through the Kill call; `ctr` would word a refusal in its own way.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn try_kill(&self) -> Result<(), CallError> {
        let message = Message::default().bytes(1, &self.id).number(3, 9);
        self.node.call("/containerd.services.tasks.v1.Tasks/Kill", message, patience()).map(drop)
    }

    /// Its task, a `containerd.v1.types.Process`; none without one.
    fn task(&self) -> Option<Vec<u8>> {
        let message = Message::default().bytes(1, &self.id);
        match self.node.call("/containerd.services.tasks.v1.Tasks/Get", message, patience()) {
            Err(e) if e.to_string().contains("not found") => None,
            answer => Some(answer.and_then(|answer| grpc::bytes(&answer, 1)).expect("get task")),
        }
    }

    /// Its task's state as `ctr tasks list` shows it, such as `RUNNING`; none without a task.
    ///
    /// # Panics
    /// containerd does not answer.
    pub fn state(&self) -> Option<String> {
        // containerd.v1.types.Status
        let names = ["UNKNOWN", "CREATED", "RUNNING", "STOPPED", "PAUSED", "PAUSING"];
        let status = grpc::number(&self.task()?, 4).expect("a status");
        Some(names[usize::try_from(status).expect("small")].to_owned())
    }

    /// The process id of its task.
    ///
    /// # Panics
    /// There is no task.
    pub fn pid(&self) -> u32 {
        let task = self.task().unwrap_or_else(|| panic!("no task {}", self.id));
        grpc::number(&task, 3).ok().and_then(|pid| pid.try_into().ok()).expect("a process id")
    }

    /// Waits for the end of its task through the Wait call, and returns the status.
    ///
    /// # Errors
    /// What containerd answers, or no answer within the time.
    pub fn wait(&self, within: Duration) -> Result<u64, CallError> {
        let message = Message::default().bytes(1, &self.id);
        let answer = self.node.call("/containerd.services.tasks.v1.Tasks/Wait", message, within)?;
        grpc::number(&answer, 1)
    }

    /// Updates the limits of its task, given as the spec's `linux.resources`.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn update(&self, resources: &Value) -> Result<(), CallError> {
        let bytes = serde_json::to_vec(resources)?;
        let any = Message::any("types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", &bytes);
        let message = Message::default().bytes(1, &self.id).message(2, any);
        self.node.call("/containerd.services.tasks.v1.Tasks/Update", message, patience()).map(drop)
    }

    /// `ctr tasks attach` in the background.
    pub fn attach(&self) -> Running {
        self.node.ctr(["tasks", "attach", &self.id]).spawn()
    }

    /// Deletes the task, which must have ended, the container and its snapshot, over the API: every test does.
    ///
    /// # Panics
    /// containerd refuses.
    pub fn delete(self) {
        let call = |method: &str, message| {
            let answer = self.node.call(&format!("/containerd.services.{method}"), message, patience());
            answer.unwrap_or_else(|e| panic!("{method} {}: {e}", self.id));
        };
        let this = || Message::default().bytes(1, &self.id);
        if let Some(task) = self.task() {
            call("tasks.v1.Tasks/Delete", this());
            // The FIFOs are for the client to remove.
            for stream in (5..=7).filter_map(|field| grpc::bytes(&task, field).ok()) {
                let path = PathBuf::from(String::from_utf8_lossy(&stream).into_owned());
                if let Some(dir) = path.parent().filter(|dir| dir.starts_with(FIFOS)) {
                    fs::remove_dir_all(dir).ok();
                }
            }
        }
        // The snapshot first: nobody refers to that of a deleted container, and containerd may remove it meanwhile.
        call("snapshots.v1.Snapshots/Remove", self.snapshot());
        call("containers.v1.Containers/Delete", this());
    }

    /// Kills the task with SIGKILL, waits for its end, and deletes task and container.
    pub fn remove(self) {
        self.try_kill().unwrap_or_else(|e| panic!("kill {}: {e}", self.id));
        let code = self.wait(patience()).unwrap_or_else(|e| panic!("wait for {}: {e}", self.id));
        assert_eq!(code, 137, "exit code of {} after SIGKILL", self.id);
        self.delete();
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.node.ctr(["tasks", "delete", "--force", &self.id]).run();
            self.node.ctr(["containers", "delete", &self.id]).run();
        }
    }
}
