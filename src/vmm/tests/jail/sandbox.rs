//! A directory with what a shim would prepare, and the jailed probe that was started on it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nacelle_protocol::GENERATION;
use nacelle_protocol::ids::SandboxId;
use nacelle_protocol::vm::{Disk, Jail, Landlock, Network, Nics, Report, Seccomp, Share, Socket, VmConfig};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, waitpid};
use tempfile::TempDir;

use crate::attacks::Off;
use crate::probe::{NO_LANDLOCK, PORT};

pub const BASE: u32 = 700_000;

/// What a test starts from, and may change.
pub struct Setup {
    pub dir: TempDir,
    pub config: VmConfig,
    pub nics: Nics,
    listener: UnixListener,
    without: Vec<String>,
    victim: Option<Child>,
    hosts: Vec<OwnedFd>,
}

impl Setup {
    /// A kernel file with a sibling, a disk, an empty mapped share "volumes" that is a mount of its own and shared, and
    /// a read-only share "layers".
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("nacelle-jail-").tempdir().expect("directory");
        let path = |name: &str| dir.path().join(name);
        for name in ["jail", "volumes", "layers"] {
            fs::create_dir(path(name)).expect("directory");
        }
        fs::write(path("vmlinux"), "kernel").expect("write");
        fs::write(path("secret"), "of the host").expect("write");
        fs::write(path("disk"), "disk").expect("write");
        fs::write(path("layers/a.erofs"), "layer").expect("write");
        tmpfs(&path("volumes"));
        mount_change(path("volumes"), MountPropagationFlags::SHARED).expect("share");
        let listener = UnixListener::bind(path("control")).expect("listen");
        let share = |tag: &str, read_only, idmap| Share { tag: tag.into(), source: path(tag), read_only, idmap };
        let config = VmConfig {
            generation: GENERATION,
            sandbox: SandboxId::new("pod-1").expect("id"),
            vcpus: 1,
            memory_mib: 128,
            kernel: path("vmlinux"),
            agent: path("vmlinux"),
            kernel_args: Vec::new(),
            shares: vec![share("volumes", false, true), share("layers", true, false)],
            disks: vec![Disk::raw("upper", path("disk"), false)],
            sockets: vec![Socket { port: PORT, source: path("control") }],
            awaits_nics: false,
            jail: Jail {
                root: path("jail"),
                uid_base: BASE,
                uid_count: 65_536,
                pod_root: None,
                network: Network::New,
                cgroups: Vec::new(),
                max_files: 4096,
                landlock: Landlock::default(),
                seccomp: Seccomp::default(),
            },
        };
        Self { dir, config, nics: Nics::default(), listener, without: Vec::new(), victim: None, hosts: Vec::new() }
    }

    /// The jail without its two outermost steps, for tests of what lies below.
    pub fn inner() -> Self {
        let mut setup = Self::new();
        setup.leave_out(&[Off::Landlock, Off::Seccomp]);
        setup
    }

    /// Leaves these out of the jail.
    pub fn leave_out(&mut self, off: &[Off]) {
        for off in off {
            match off {
                Off::Without(step) => self.without.push(format!("{step:?}")),
                Off::Landlock => self.config.jail.landlock = Landlock::Off,
                Off::Seccomp => self.config.jail.seccomp = Seccomp::Off,
            }
        }
    }

    /// Puts something of the host's, made for the purpose, in place of a word's placeholder.
    pub fn fill(&mut self, word: &str) -> String {
        let Some((before, name)) = word.split_once('@') else { return word.to_owned() };
        let value = match name {
            "victim" => {
                let victim = Command::new("sleep").arg("1000").spawn().expect("spawn");
                self.victim.insert(victim).id().to_string()
            }
            "port" => {
                let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
                let port = listener.local_addr().expect("address").port();
                self.hosts.push(listener.into());
                port.to_string()
            }
            "name" => {
                let name = self.path("abstract").display().to_string();
                let address = SocketAddr::from_abstract_name(&name).expect("address");
                self.hosts.push(UnixListener::bind_addr(&address).expect("listen").into());
                name
            }
            _ => panic!("no such thing: {name}"),
        };
        format!("{before}{value}")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts the probe and waits for it to dial.
    pub fn start(self) -> Sandbox {
        let mut started = self.launch();
        let mut degraded = Vec::new();
        let pid = loop {
            match started.report() {
                Some(Report::Started { pid }) => break pid,
                Some(Report::Degraded { message, .. }) => degraded.push(message),
                other => panic!("no start: {other:?}"),
            }
        };
        assert!(started.child.wait().expect("wait").success(), "the first process succeeds");
        let (control, _) = started.setup.listener.accept().expect("accept");
        control.set_read_timeout(Some(Duration::from_secs(20))).expect("deadline");
        let pid = Pid::from_raw(i32::try_from(pid).expect("process id")).expect("not zero");
        Sandbox { control: BufReader::new(control), pid, degraded, ended: false, started }
    }

    /// Has the kernel say that it has no Landlock.
    pub fn lose_landlock(&mut self) {
        self.without.push(NO_LANDLOCK.into());
    }

    /// Starts the probe, and returns the one failure that it reports, and the exit status of its first process.
    pub fn fail(self) -> (String, String, Option<i32>) {
        let mut started = self.launch();
        let (stage, message) = loop {
            match started.report() {
                Some(Report::Failed { stage, message, .. }) => break (stage, message),
                Some(Report::Started { .. }) => {}
                other => panic!("no failure: {other:?}"),
            }
        };
        assert_eq!(started.report(), None, "one report");
        (stage, message, started.child.wait().expect("wait").code())
    }

    fn launch(self) -> Started {
        let (config, mut config_in) = io::pipe().expect("pipe");
        let (reports, report) = io::pipe().expect("pipe");
        let (lifeline, hold) = io::pipe().expect("pipe");
        let (console_out, console) = io::pipe().expect("pipe");
        let leak = File::open(self.path("secret")).expect("open");
        let given = [(OwnedFd::from(config), 3), (report.into(), 4), (lifeline.into(), 5), (console.into(), 6)];
        let mut mappings: Vec<_> = given.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).into();
        mappings.push(FdMapping { parent_fd: leak.into(), child_fd: 9 });
        let mut command = Command::new(std::env::current_exe().expect("own path"));
        command
            .arg("probe")
            .arg(self.without.join(","))
            .env("SECRET", "of the shim")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command.fd_mappings(mappings).expect("mappings");
        let child = command.spawn().expect("spawn");
        // The parent's copies of the child's ends are in the command.
        drop(command);
        let mut json = serde_json::to_string(&self.config).expect("serialize");
        if self.config.awaits_nics {
            json += &format!("\n{}", serde_json::to_string(&self.nics).expect("serialize"));
        }
        // It fits into the pipe.
        config_in.write_all(json.as_bytes()).expect("write");
        Started { setup: self, child, reports: BufReader::new(reports), lifeline: Some(hold), console: console_out }
    }
}

/// The first process, and our ends of the pipes.
pub struct Started {
    pub setup: Setup,
    pub child: Child,
    reports: BufReader<io::PipeReader>,
    pub lifeline: Option<io::PipeWriter>,
    console: io::PipeReader,
}

impl Started {
    pub fn report(&mut self) -> Option<Report> {
        let mut line = String::new();
        (self.reports.read_line(&mut line).expect("read") > 0).then(|| serde_json::from_str(&line).expect("report"))
    }
}

/// A probe that runs in its jail.
pub struct Sandbox {
    pub started: Started,
    pub pid: Pid,
    pub degraded: Vec<String>,
    control: BufReader<UnixStream>,
    pub ended: bool,
}

/// How an attempt of the probe's ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded, with this answer.
    Done(String),
    /// It failed with this error number.
    Error(i32),
    /// The filter refused this system call, and the process reported it and ended.
    Refused(i64),
    /// A signal ended the process.
    Killed(i32),
}

impl Sandbox {
    /// Has the probe do something; the error is the system's number.
    pub fn tell(&mut self, words: &[&str]) -> Result<String, i32> {
        self.send(words);
        let mut answer = String::new();
        self.control.read_line(&mut answer).expect("answer");
        match answer.trim_end_matches('\n').split_once('\t').expect("answer") {
            ("ok", text) => Ok(text.replace("\\n", "\n").replace("\\t", "\t")),
            (_, number) => Err(number.parse().expect("number")),
        }
    }

    /// Has the probe try something that may end it.
    pub fn attempt(&mut self, words: &[&str]) -> Outcome {
        self.send(words);
        let mut answer = String::new();
        // A process that is killed may reset the connection.
        if self.control.read_line(&mut answer).is_ok_and(|len| len > 0) {
            return match answer.trim_end_matches('\n').split_once('\t').expect("answer") {
                ("ok", text) => Outcome::Done(text.to_owned()),
                (_, number) => Outcome::Error(number.parse().expect("number")),
            };
        }
        let status = self.end();
        if let Some(signal) = status.terminating_signal() {
            return Outcome::Killed(signal);
        }
        let call = loop {
            let Some(report) = self.started.report() else { panic!("it ended without a word: {status:?}") };
            if let Report::Failed { stage, message, .. } = report {
                assert_eq!(stage, "seccomp", "{message}");
                let number = message.strip_prefix("make system call ").and_then(|rest| rest.split(' ').next());
                break number.expect("number").parse().expect("number");
            }
        };
        assert_eq!(status.exit_status(), Some(1));
        Outcome::Refused(call)
    }

    /// Has the probe do something that leaves no answer.
    pub fn send(&mut self, words: &[&str]) {
        writeln!(self.control.get_mut(), "{}", words.join("\t")).expect("tell");
    }

    /// Like [`Self::tell`], and it has to succeed.
    pub fn ask(&mut self, words: &[&str]) -> String {
        self.tell(words).unwrap_or_else(|error| panic!("{words:?}: error {error}"))
    }

    /// A file of /proc about the jailed process.
    pub fn proc(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.pid.as_raw_nonzero()).into()
    }

    /// A field of /proc/PID/status.
    pub fn status(&self, field: &str) -> String {
        let text = fs::read_to_string(self.proc("status")).expect("status");
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect("field");
        line.trim().to_owned()
    }

    /// What arrived on the console, up to `len` bytes.
    pub fn console(&mut self, len: usize) -> String {
        let mut bytes = vec![0; len];
        self.started.console.read_exact(&mut bytes).expect("console");
        String::from_utf8(bytes).expect("text")
    }

    /// Waits for the end of the jailed process, which is our child because we are a subreaper.
    pub fn end(&mut self) -> WaitStatus {
        self.ended = true;
        waitpid(Some(self.pid), WaitOptions::empty()).expect("wait").expect("ended").1
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if !self.ended {
            let _ = kill_process(self.pid, Signal::KILL);
            let _ = waitpid(Some(self.pid), WaitOptions::empty());
        }
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        if let Some(victim) = &mut self.victim {
            let _ = victim.kill();
            let _ = victim.wait();
        }
        for dir in &self.config.jail.cgroups {
            let _ = fs::remove_dir(dir);
        }
        let _ = unmount(self.path("volumes"), UnmountFlags::DETACH);
    }
}

/// Gives the sandbox a cgroup of its own with a limit, in whichever hierarchy has one of these files.
pub fn cgroup(setup: &mut Setup, files: &[&str], limit: &str) {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let mut hierarchies = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next().zip(fields.next()).filter(|(_, kind)| kind.starts_with("cgroup")).map(|(mount, _)| mount)
    });
    let name = setup.dir.path().file_name().expect("name").to_owned();
    let found = hierarchies.find_map(|mount| {
        let dir = Path::new(mount).join(&name);
        fs::create_dir(&dir).ok()?;
        match files.iter().map(|file| dir.join(file)).find(|file| file.exists()) {
            Some(file) => Some((dir, file)),
            None => fs::remove_dir(&dir).map(|()| None).expect("remove cgroup"),
        }
    });
    let (dir, file) = found.unwrap_or_else(|| panic!("no cgroup hierarchy has any of {files:?}"));
    fs::write(file, limit).expect("limit");
    setup.config.jail.cgroups.push(dir);
}

/// Mounts a tmpfs, as a shim would mount a volume.
pub fn tmpfs(path: &Path) {
    mount("test", path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"size=1m,mode=0755")).expect("mount");
}
