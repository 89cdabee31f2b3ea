//! One microVM: its description, the process that runs it, and that process's end.
//!
//! ```text
//!  Bundle, Config ──plan──► VmConfig ──spawn──► nacelle-vmm ── Started{pid} ──► Vm
//!                                                  │ exits       │ reparented to the shim, held by a pidfd
//!                                                  └─ or Failed ─┴─► VmError: stage, message, last words
//! ```
//!
//! The exit code of a VMM says nothing; that it is gone says everything. Log and console are always read.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nacelle_protocol::GENERATION;
use nacelle_protocol::agent::{LAYERS_TAG, UPPER_SERIAL, VOLUMES_TAG};
use nacelle_protocol::ids::SandboxId;
use nacelle_protocol::stream::{RPC_PORT, STREAM_PORT};
use nacelle_protocol::vm::{
    CONFIG_FD, CONSOLE_FD, Disk, Jail, LIFELINE_FD, LOG_FD, MAX_JSON, Network, Nics, REPORT_FD, Report, Share, Socket,
    VmConfig,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use thiserror::Error;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::unix::pipe;
use tokio::time::timeout;

use crate::annotations::{AnnotationError, MEMORY_MIB, UPPER_MIB, VCPUS, Wishes, refuse};
use crate::bundle::Bundle;
use crate::conduct::Conduct;
use crate::config::{Config, Idmap, Programs, UIDS_PER_POD};
use crate::state::Dirs;
use crate::tail::Tail;

/// How long the VMM may take to build its jail and report.
const START_DEADLINE: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;
/// Reports that a VMM may send once it has started: it can have been taken over by then.
const MAX_REPORTS: usize = 64;
/// Longest stage or message of a report that is passed on, in characters.
const MAX_WORDS: usize = 1024;

/// Why there is no VM.
#[derive(Debug, Error)]
pub enum VmError {
    /// The process cannot be started.
    #[error("start VMM {path}")]
    Spawn {
        /// The program.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A system call on the process or its pipes failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The VMM says why it gave up.
    #[error("start VM: {stage}: {message}")]
    Failed {
        /// Its stage.
        stage: String,
        /// Its message.
        message: String,
    },
    /// The VMM is gone and did not say why.
    #[error("start VM: the VMM is gone; its last words: {0}")]
    Gone(String),
    /// The VMM says something that is no report.
    #[error("start VM: read report")]
    Report(#[source] serde_json::Error),
    /// What the VMM is to be told cannot be written down.
    #[error("describe VM")]
    Encode(#[source] serde_json::Error),
    /// The VMM takes too long.
    #[error("start VM: no report after {} s", START_DEADLINE.as_secs())]
    Timeout,
}

/// How large a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM, MiB.
    pub memory_mib: u32,
    /// Limit of the pod's cgroup on the host, bytes: the RAM, and the VMM's own needs.
    pub cgroup_bytes: u64,
    /// The writable disk, MiB.
    pub upper_mib: u64,
}

/// Sizes the VM for its first container, or for its pod where the limits of that are known; then by annotation, which may
/// choose within the limits and never beyond them.
///
/// # Errors
/// [`AnnotationError::Value`] for a wish that goes beyond them.
pub fn size(bundle: &Bundle, config: &Config, host_cpus: usize, wishes: &Wishes) -> Result<Size, AnnotationError> {
    let resources = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let memory = resources.and_then(|r| r.memory().as_ref()).and_then(|m| m.limit());
    let memory = bundle.pod.memory.or(memory.and_then(|bytes| u64::try_from(bytes).ok()));
    let needed = memory.filter(|bytes| *bytes > 0).map(|bytes| bytes.div_ceil(MIB) + u64::from(config.overhead_mib));
    let default_mib = needed.unwrap_or(0).clamp(config.memory_mib.into(), u64::from(u32::MAX) / 2) as u32;
    let memory_mib = match wishes.memory_mib {
        // The host's cgroup holds the VM to this anyway; a guest that is told of more would only be killed for using it.
        Some(wish) if needed.is_some() && wish > default_mib => {
            let reason = format!("the pod's memory limit makes a VM of {default_mib} MiB");
            return Err(refuse(MEMORY_MIB, &wish.to_string(), reason));
        }
        Some(wish) => wish,
        None => default_mib,
    };

    let cpu = resources.and_then(|r| r.cpu().as_ref());
    let quota = bundle.pod.cpu_quota.or(cpu.and_then(|c| c.quota())).and_then(|q| u64::try_from(q).ok());
    let period = bundle.pod.cpu_period.or(cpu.and_then(|c| c.period())).filter(|p| *p > 0).unwrap_or(100_000);
    let most = host_cpus.clamp(1, 255) as u64;
    let vcpus = match wishes.vcpus {
        Some(wish) if u64::from(wish) > most => {
            return Err(refuse(VCPUS, &wish.to_string(), format!("the host has {most} CPUs")));
        }
        Some(wish) => wish,
        // What the operator has written down is taken as it is; what a pod may use is bounded by what there is.
        None => quota.filter(|q| *q > 0).map_or(config.vcpus, |quota| quota.div_ceil(period).clamp(1, most) as u8),
    };

    let upper_mib = wishes.upper_mib.unwrap_or(config.upper_mib);
    if upper_mib > config.upper_mib {
        let reason = format!("rootfs.upper_mib in nacelle's configuration is {}", config.upper_mib);
        return Err(refuse(UPPER_MIB, &upper_mib.to_string(), reason));
    }
    let cgroup_bytes = (u64::from(memory_mib) + u64::from(config.overhead_mib)) * MIB;
    Ok(Size { vcpus, memory_mib, cgroup_bytes, upper_mib })
}

/// What of the host belongs to the VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// First id of its range.
    pub uid_base: u32,
    /// The guest's id for root of the pod's user namespace, if it has one.
    pub pod_root: Option<u32>,
    /// The image of its guest's root.
    pub agent: PathBuf,
    /// Cgroups that it joins.
    pub cgroups: Vec<PathBuf>,
    /// Where its network is.
    pub network: Network,
    /// Whether there may be interfaces in it, see [`Vm::connect`].
    pub wired: bool,
    /// Whether it has volumes, or may get some later. Without, the VMM holds no capability at all.
    pub volumes: bool,
    /// Disks that it brings with it.
    pub disks: Vec<Disk>,
}

/// Describes the VM. The devices are all there will ever be: what comes later goes through the shares.
pub fn plan(
    sandbox: &SandboxId,
    size: Size,
    config: &Config,
    programs: &Programs,
    dirs: &Dirs,
    place: Place,
) -> VmConfig {
    let share = |tag: &str, source, read_only| Share { tag: tag.to_owned(), source, read_only, idmap: !read_only };
    let volumes = place.volumes.then(|| share(VOLUMES_TAG, dirs.volumes(), false));
    VmConfig {
        generation: GENERATION,
        sandbox: sandbox.clone(),
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        kernel: programs.kernel.clone(),
        agent: place.agent,
        kernel_args: config.kernel_args.clone(),
        shares: std::iter::once(share(LAYERS_TAG, dirs.layers(), true)).chain(volumes).collect(),
        disks: std::iter::once(Disk::raw(UPPER_SERIAL, dirs.upper(), false)).chain(place.disks).collect(),
        sockets: vec![
            Socket { port: RPC_PORT, source: dirs.rpc_socket() },
            Socket { port: STREAM_PORT, source: dirs.stream_socket() },
        ],
        awaits_nics: place.wired,
        jail: Jail {
            root: dirs.jail_root(),
            uid_base: place.uid_base,
            uid_count: UIDS_PER_POD,
            pod_root: place.pod_root,
            network: place.network,
            cgroups: place.cgroups,
            max_files: config.max_files,
            landlock: config.landlock,
            seccomp: config.seccomp,
        },
    }
}

/// A VMM that runs. Dropping it closes the lifeline, which ends it.
#[derive(Debug)]
pub struct Vm {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    _lifeline: OwnedFd,
    /// Where the VMM awaits its network devices.
    wires: Mutex<Option<pipe::Sender>>,
    log: Tail,
    console: Tail,
    failure: Arc<Mutex<Option<(String, String)>>>,
    degraded: Arc<Mutex<Vec<String>>>,
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Io { what, source }
}

impl Vm {
    /// Starts the VMM and waits until it is in its jail. The guest boots meanwhile, or once [`Vm::connect`] is called. What
    /// the VMM says from then on is a claim, and too much of it is held against it.
    ///
    /// # Errors
    /// [`VmError`]; no process is left.
    pub async fn spawn(
        program: &Path,
        config: &VmConfig,
        idmap: Idmap,
        conduct: Arc<Conduct>,
    ) -> Result<Self, VmError> {
        let failed = |source| VmError::Spawn { path: program.to_owned(), source };
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()));
        let (log, log_write) = pipe()?;
        let (config_read, config_write) = pipe()?;
        let (report, report_write) = pipe()?;
        let (lifeline_read, lifeline) = pipe()?;
        let (console, console_write) = pipe()?;
        let mapping = |parent_fd, child_fd| FdMapping { parent_fd, child_fd };
        let mut command = std::process::Command::new(program);
        command
            .env_clear()
            .current_dir("/")
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .fd_mappings(vec![
                mapping(log_write, LOG_FD),
                mapping(config_read, CONFIG_FD),
                mapping(report_write, REPORT_FD),
                mapping(lifeline_read, LIFELINE_FD),
                mapping(console_write, CONSOLE_FD),
            ])
            .map_err(|e| failed(io::Error::other(e)))?;
        let mut command = tokio::process::Command::from(command);
        command.kill_on_drop(true);
        let mut first = command.spawn().map_err(failed)?;
        // Closes the shim's copies of the child's ends.
        drop(command);

        let receiver = |fd, what| pipe::Receiver::from_owned_fd(fd).map_err(io_error(what));
        let log = Tail::of(receiver(log, "read VMM's log")?, "vmm");
        let console = Tail::of(receiver(console, "read guest's console")?, "console");
        let mut reports = BufReader::new(receiver(report, "read VMM's reports")?);
        let json = line(config)?;
        let mut sender = pipe::Sender::from_owned_fd(config_write).map_err(io_error("write VMM's configuration"))?;
        let start = async {
            // A VMM that dies at once leaves its reason in the report.
            let _ = sender.write_all(&json).await;
            let wires = config.awaits_nics.then_some(sender);
            let mut degraded = Vec::new();
            let pid = loop {
                match next_report(&mut reports).await? {
                    Some(Report::Started { pid }) => break pid,
                    Some(Report::Degraded { stage, message }) if idmap.refuses(&stage) => {
                        return Err(VmError::Failed { stage, message });
                    }
                    Some(Report::Degraded { stage, message }) => note(&mut degraded, &stage, &message),
                    Some(Report::Failed { stage, message, .. }) => return Err(VmError::Failed { stage, message }),
                    None => return Err(VmError::Gone(log.last(512))),
                }
            };
            // The VMM proper becomes the shim's child when its parent, this one, has exited.
            first.wait().await.map_err(io_error("wait for VMM's first process"))?;
            Ok((pid, wires, degraded))
        };
        let (pid, wires, degraded) = timeout(START_DEADLINE, start).await.map_err(|_| VmError::Timeout)??;
        let raw = Pid::from_raw(pid.cast_signed()).ok_or_else(|| VmError::Gone("pid 0".into()))?;
        // Nobody but this process reaps it, so the number is still its own.
        let pidfd = pidfd_open(raw, PidfdFlags::NONBLOCK).map_err(|e| io_error("open VMM's pidfd")(e.into()))?;
        #[expect(
            deprecated,
            reason = "the replacement is unsafe for types that may lend a wrong descriptor; OwnedFd cannot"
        )]
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE).map_err(io_error("watch VMM"))?;
        let failure = Arc::new(Mutex::new(None));
        let degraded = Arc::new(Mutex::new(degraded));
        tokio::spawn(listen(reports, failure.clone(), degraded.clone(), conduct));
        let wires = Mutex::new(wires);
        Ok(Self { pid, pidfd, _lifeline: lifeline, wires, log, console, failure, degraded })
    }

    /// Gives the VMM the network devices that it awaits, and with that lets the guest boot.
    ///
    /// # Errors
    /// [`VmError`]. A VMM that is gone is none: its end is told otherwise.
    pub async fn connect(&self, nics: &Nics) -> Result<(), VmError> {
        let wires = self.wires.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut wires) = wires {
            let _ = wires.write_all(&line(nics)?).await;
        }
        Ok(())
    }

    /// Process id of the VMM in the shim's namespace; it lives in the sandbox's network namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What of its jail is weaker than it could be, as far as it has said so. The jail's last steps may follow its start by
    /// some milliseconds.
    pub fn degraded(&self) -> Vec<String> {
        self.degraded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Kills it. Gone already is fine.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }

    /// Waits until it is gone.
    pub async fn gone(&self) {
        if let Err(e) = self.pidfd.readable().await {
            tracing::error!("wait for VMM: {e}");
            return std::future::pending().await;
        }
        // Reaps it; a second caller finds nothing to reap.
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }

    /// Why it is gone, as far as anybody said.
    pub async fn why(&self) -> VmError {
        // What was said last may still be in the pipes.
        tokio::time::sleep(Duration::from_millis(20)).await;
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some((stage, message)) => VmError::Failed { stage, message },
            None => VmError::Gone(self.last_words()),
        }
    }

    /// The end of the VMM's log and of the guest's console.
    pub fn last_words(&self) -> String {
        format!("log: {}; console: {}", self.log.last(512), self.console.last(1024))
    }
}

fn line(value: &impl serde::Serialize) -> Result<Vec<u8>, VmError> {
    let mut json = serde_json::to_vec(value).map_err(VmError::Encode)?;
    json.push(b'\n');
    Ok(json)
}

async fn next_report(reports: &mut BufReader<pipe::Receiver>) -> Result<Option<Report>, VmError> {
    let mut line = Vec::new();
    let mut limited = reports.take(MAX_JSON as u64);
    limited.read_until(b'\n', &mut line).await.map_err(io_error("read VMM's reports"))?;
    if line.is_empty() { Ok(None) } else { serde_json::from_slice(&line).map(Some).map_err(VmError::Report) }
}

/// Hears what the VMM says once it has started.
async fn listen(
    mut reports: BufReader<pipe::Receiver>,
    failure: Arc<Mutex<Option<(String, String)>>>,
    degraded: Arc<Mutex<Vec<String>>>,
    conduct: Arc<Conduct>,
) {
    for _ in 0..MAX_REPORTS {
        match next_report(&mut reports).await {
            Ok(Some(Report::Failed { stage, message, .. })) => {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some((short(&stage), short(&message)));
            }
            Ok(Some(Report::Degraded { stage, message })) => {
                note(&mut degraded.lock().unwrap_or_else(PoisonError::into_inner), &stage, &message);
            }
            Ok(Some(Report::Started { .. })) => {}
            Ok(None) => return,
            Err(e) => return conduct.breach(crate::chain(&e)),
        }
    }
    conduct.breach(format!("the VMM sends more than {MAX_REPORTS} reports"));
}

/// Says and remembers that something is weaker than it could be.
fn note(degraded: &mut Vec<String>, stage: &str, message: &str) {
    let words = format!("{}: {}", short(stage), short(message));
    tracing::warn!("VMM: {words}");
    degraded.push(words);
}

/// Fit for one line of a log.
fn short(words: &str) -> String {
    words.chars().take(MAX_WORDS).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Origin;

    fn bundle(linux: serde_json::Value, annotations: serde_json::Value) -> Bundle {
        let json = serde_json::json!({
            "ociVersion": "1.1.0", "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/" },
            "linux": linux, "annotations": annotations,
        });
        Bundle::parse(Path::new("/b"), json.to_string().as_bytes()).expect("bundle")
    }

    fn wished(
        resources: serde_json::Value,
        annotations: serde_json::Value,
        wishes: &Wishes,
    ) -> Result<Size, AnnotationError> {
        let config = Origin { body: Some(String::new()), path: None }.load().expect("defaults");
        let linux = serde_json::json!({ "namespaces": [{ "type": "network" }], "resources": resources });
        size(&bundle(linux, annotations), &config, 4, wishes)
    }

    fn sized(resources: serde_json::Value, annotations: serde_json::Value) -> Size {
        wished(resources, annotations, &Wishes::default()).expect("no wishes")
    }

    #[test]
    fn sizes() {
        let none = serde_json::json!({});
        let default = sized(none.clone(), none.clone());
        assert_eq!(default, Size { vcpus: 1, memory_mib: 512, cgroup_bytes: 640 << 20, upper_mib: 10240 });
        let small = sized(serde_json::json!({ "memory": { "limit": 64 << 20 } }), none.clone());
        assert_eq!(small.memory_mib, 512, "never less than the minimum");
        let large = sized(serde_json::json!({ "memory": { "limit": (1u64 << 30) + 1 } }), none.clone());
        assert_eq!(large.memory_mib, 1024 + 1 + 128);
        let unlimited = sized(serde_json::json!({ "memory": { "limit": -1 }, "cpu": { "quota": -1 } }), none.clone());
        assert_eq!(unlimited, default);
        let cpus = |quota: i64| {
            let resources = serde_json::json!({ "cpu": { "quota": quota, "period": 100_000 } });
            sized(resources, serde_json::json!({})).vcpus
        };
        assert_eq!([cpus(50_000), cpus(100_000), cpus(150_000), cpus(9_000_000)], [1, 1, 2, 4]);
        let pod = serde_json::json!({
            "io.kubernetes.cri.sandbox-memory": "2147483648", "io.kubernetes.cri.sandbox-cpu-quota": "300000",
            "io.kubernetes.cri.sandbox-cpu-period": "100000",
        });
        let pod = sized(none, pod);
        assert_eq!((pod.vcpus, pod.memory_mib), (3, 2048 + 128), "the pod's limits win");
    }

    #[test]
    fn wishes_choose_within_the_limits() {
        let none = || serde_json::json!({});
        let limited = || serde_json::json!({ "memory": { "limit": 1u64 << 30 } });
        let wish = |resources, wishes| wished(resources, none(), &wishes);
        let memory = |mib| Wishes { memory_mib: Some(mib), ..Wishes::default() };
        let free = wish(none(), memory(4096)).expect("no limit");
        assert_eq!((free.memory_mib, free.cgroup_bytes), (4096, (4096 + 128) << 20));
        assert_eq!(wish(limited(), memory(256)).expect("less").memory_mib, 256);
        let text = wish(limited(), memory(2048)).expect_err("beyond the limit").to_string();
        assert!(text.contains("io.nacelle.memory_mib = \"2048\"") && text.contains("1152 MiB"), "{text}");
        let cpus = |vcpus| Wishes { vcpus: Some(vcpus), ..Wishes::default() };
        assert_eq!(wish(none(), cpus(4)).expect("as many as the host has").vcpus, 4);
        assert!(wish(none(), cpus(5)).is_err());
        let disk = |mib| Wishes { upper_mib: Some(mib), ..Wishes::default() };
        assert_eq!(wish(none(), disk(64)).expect("smaller").upper_mib, 64);
        assert!(wish(none(), disk(10241)).is_err(), "a pod cannot take more of the host's disk than it is given");
    }

    /// A VMM made of a shell script, with the descriptors of the real one.
    async fn spawn_script(script: &str) -> Result<Vm, VmError> {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("vmm");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
        let config = Origin { body: Some(String::new()), path: None }.load().expect("defaults");
        let programs = Programs { vmm: path.clone(), agent: "/a".into(), kernel: "/k".into() };
        let sandbox = SandboxId::new("s1").expect("id");
        let dirs = Dirs::new(dir.path(), dir.path(), &sandbox, &sandbox);
        let size = Size { vcpus: 1, memory_mib: 128, cgroup_bytes: 0, upper_mib: 64 };
        let config = plan(&sandbox, size, &config, &programs, &dirs, nowhere());
        Vm::spawn(&path, &config, Idmap::Require, Arc::default()).await
    }

    #[tokio::test]
    async fn a_vmm_that_starts_is_held_and_killed() {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("subreaper");
        let script =
            "cat <&3 >/dev/null; echo booting >&6; (exec sleep 60) & echo '{\"report\":\"started\",\"pid\":'$!'}' >&4";
        let vm = spawn_script(script).await.expect("spawn");
        assert!(timeout(Duration::from_millis(50), vm.gone()).await.is_err(), "it runs");
        vm.kill();
        timeout(Duration::from_secs(5), vm.gone()).await.expect("gone");
        vm.gone().await;
        assert!(!Path::new(&format!("/proc/{}", vm.pid())).exists(), "reaped");
        let why = vm.why().await.to_string();
        assert!(why.contains("console: booting"), "{why}");
    }

    #[tokio::test]
    async fn a_vmm_that_fails_says_why() {
        let failed = r#"echo '{"report":"failed","stage":"jail","errno":1,"message":"pivot root: no"}' >&4; exit 1"#;
        let error = spawn_script(failed).await.expect_err("fails");
        assert_eq!(error.to_string(), "start VM: jail: pivot root: no");
        let unmapped = r#"echo '{"report":"degraded","stage":"map ids","message":"/nfs: no"}' >&4; sleep 1; exit 1"#;
        let error = spawn_script(unmapped).await.expect_err("mapped ids are required here");
        assert_eq!(error.to_string(), "start VM: map ids: /nfs: no");
        let error = spawn_script("echo oops >&2; exec 4>&-; sleep 0.1; exit 3").await.expect_err("fails").to_string();
        assert!(error.contains("last words"), "{error}");
        let error = spawn_script("echo nonsense >&4").await.expect_err("fails");
        assert!(matches!(error, VmError::Report(_)));
        let config = dummy();
        let missing = Vm::spawn(Path::new("/nonexistent"), &config, Idmap::BestEffort, Arc::default());
        assert!(matches!(missing.await, Err(VmError::Spawn { .. })));
    }

    fn nowhere() -> Place {
        let (cgroups, network) = (Vec::new(), Network::New);
        let (agent, disks) = ("/a".into(), Vec::new());
        Place { uid_base: 65536, pod_root: None, agent, cgroups, network, wired: false, volumes: true, disks }
    }

    fn dummy() -> VmConfig {
        let sandbox = SandboxId::new("s1").expect("id");
        let config = Origin { body: Some(String::new()), path: None }.load().expect("defaults");
        let programs = Programs { vmm: "/v".into(), agent: "/a".into(), kernel: "/k".into() };
        let dirs = Dirs::new(Path::new("/r"), Path::new("/d"), &sandbox, &sandbox);
        let size = Size { vcpus: 1, memory_mib: 128, cgroup_bytes: 0, upper_mib: 64 };
        plan(&sandbox, size, &config, &programs, &dirs, nowhere())
    }
}
