//! A directory with what a shim would prepare, and the jailed probe that was started on it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nacelle_protocol::GENERATION;
use nacelle_protocol::ids::SandboxId;
use nacelle_protocol::vm::{Disk, Jail, Network, Report, Share, Socket, VmConfig};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, waitpid};
use tempfile::TempDir;

use crate::probe::PORT;

pub const BASE: u32 = 700_000;

/// What a test starts from, and may change.
pub struct Setup {
    pub dir: TempDir,
    pub config: VmConfig,
    listener: UnixListener,
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
            disks: vec![Disk { serial: "upper".into(), source: path("disk"), read_only: false }],
            sockets: vec![Socket { port: PORT, source: path("control") }],
            jail: Jail {
                root: path("jail"),
                uid_base: BASE,
                uid_count: 65_536,
                network: Network::New,
                cgroups: Vec::new(),
                max_files: 4096,
            },
        };
        Self { dir, config, listener }
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

    /// Starts the probe, and returns the one report and the exit status with which it fails.
    pub fn fail(self) -> (String, String, Option<i32>) {
        let mut started = self.launch();
        let Some(Report::Failed { stage, message, .. }) = started.report() else { panic!("no failure") };
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
        command.arg("probe").env("SECRET", "of the shim").stdin(Stdio::null()).stdout(Stdio::null());
        command.fd_mappings(mappings).expect("mappings");
        let child = command.spawn().expect("spawn");
        // The parent's copies of the child's ends are in the command.
        drop(command);
        let json = serde_json::to_vec(&self.config).expect("serialize");
        // It fits into the pipe.
        config_in.write_all(&json).expect("write");
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
    ended: bool,
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
        let _ = unmount(self.path("volumes"), UnmountFlags::DETACH);
    }
}

/// Mounts a tmpfs, as a shim would mount a volume.
pub fn tmpfs(path: &Path) {
    mount("test", path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"size=1m,mode=0755")).expect("mount");
}
