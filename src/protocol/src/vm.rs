//! shim ↔ vmm: the description of one microVM, and what the VMM reports back.
//!
//! Descriptors that the VMM process inherits:
//!
//! ```text
//!  0  /dev/null
//!  1  /dev/null
//!  2  log        write end of a pipe: text, one line a message
//!  3  config     read end: one VmConfig as a line of JSON; where it asks for them, its Nics as another; end of file
//!  4  report     write end of a pipe: one Report as JSON a line
//!  5  lifeline   read end of a pipe that the shim keeps open: end of file means the shim is gone, and the VMM exits
//!  6  console    write end of a pipe: what the guest's kernel prints on hvc0 (always drained by the shim)
//! ```
//!
//! libkrun takes files, shares and sockets by path, so every entry names its source on the host; the jail gives it its
//! place inside, and nothing else of the host is reachable there.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ids::SandboxId;

/// Descriptor of the log pipe.
pub const LOG_FD: i32 = 2;
/// Descriptor of the [`VmConfig`].
pub const CONFIG_FD: i32 = 3;
/// Descriptor of the [`Report`] pipe.
pub const REPORT_FD: i32 = 4;
/// Descriptor of the lifeline.
pub const LIFELINE_FD: i32 = 5;
/// Descriptor of the guest's console.
pub const CONSOLE_FD: i32 = 6;

/// Name of the agent in the root of the guest's image.
pub const AGENT_NAME: &str = "agent";
/// Empty directories in the root of the guest's image, for what the agent mounts.
pub const MOUNT_POINTS: &[&str] = &["dev", "proc", "run", "sys", "tmp"];

/// Longest [`VmConfig`], [`Nics`] or [`Report`] line that a reader accepts, in bytes.
pub const MAX_JSON: usize = 1 << 20;

/// virtio-mmio devices that libkrun can attach: on x86_64 one interrupt line each, 5 to 15 (`krun-arch`,
/// x86_64/layout.rs). Elsewhere there are more, but a configuration shall fit everywhere.
pub const MAX_DEVICES: usize = 11;

/// Devices that every machine has: balloon and rng (libkrun adds them always), console, the root's disk, vsock.
pub const FIXED_DEVICES: usize = 5;

/// One microVM, complete.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Must equal [`crate::GENERATION`].
    pub generation: u32,
    /// The sandbox, for log lines and the process title.
    pub sandbox: SandboxId,
    /// Virtual CPUs, 1 to 255; the kernel may know fewer.
    pub vcpus: u8,
    /// RAM of the guest in MiB.
    pub memory_mib: u32,
    /// Guest kernel: an uncompressed ELF `vmlinux`.
    pub kernel: PathBuf,
    /// EROFS image that becomes the root of the guest: the static agent as [`AGENT_NAME`], and [`MOUNT_POINTS`].
    pub agent: PathBuf,
    /// Words that are appended to the kernel's command line; printable ASCII without quotes.
    pub kernel_args: Vec<String>,
    /// virtiofs shares, in device order.
    pub shares: Vec<Share>,
    /// virtio-blk disks, in device order.
    pub disks: Vec<Disk>,
    /// vsock ports of the host that the guest may dial.
    pub sockets: Vec<Socket>,
    /// Whether [`Nics`] follow on the same descriptor. The VMM closes its jail meanwhile and waits for them before the
    /// machine starts: what is in a namespace may be known only when a process is in it that hooks can be told of.
    pub awaits_nics: bool,
    /// What confines the process.
    pub jail: Jail,
}

impl VmConfig {
    /// Network devices that the machine still has room for.
    pub fn room(&self) -> usize {
        MAX_DEVICES.saturating_sub(FIXED_DEVICES + self.shares.len() + self.disks.len())
    }
}

/// A directory of the host, served to the guest by virtiofs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// virtiofs tag, 1 to 36 bytes of `[a-z0-9-]`.
    pub tag: String,
    /// Directory on the host. Mounts that appear below it later appear in the guest.
    pub source: PathBuf,
    /// Refuse every change, in the VMM and by the mount.
    pub read_only: bool,
    /// Map the ids of the files with an idmapped mount, so that root in the jail's user namespace can own files there:
    /// id N on the disk is id N in the guest.
    pub idmap: bool,
}

/// A disk image of the host, served to the guest by virtio-blk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Serial number by which the guest finds it, 1 to 20 bytes of `[a-z0-9-]`.
    pub serial: String,
    /// Image on the host, or block device of it.
    pub source: PathBuf,
    /// Offer it read-only.
    pub read_only: bool,
    /// The source is a block device.
    #[serde(default)]
    pub device: bool,
    /// What the image is. Its content is never asked: a guest may have written it.
    #[serde(default)]
    pub format: DiskFormat,
    /// Further files of the host that the image is made of: they are all that it may refer to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<DiskPart>,
}

impl Disk {
    /// A raw image.
    pub fn raw(serial: impl Into<String>, source: impl Into<PathBuf>, read_only: bool) -> Self {
        let (serial, source) = (serial.into(), source.into());
        Self { serial, source, read_only, device: false, format: DiskFormat::Raw, parts: Vec::new() }
    }
}

/// How a disk image holds its blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// Block by block.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3 (QEMU, `docs/interop/qcow2.rst`).
    Qcow2,
    /// A text that names extents (VMware, "Virtual Disk Format 1.1"); libkrun reads flat ones.
    Vmdk,
}

/// A file that a disk image refers to, such as what a qcow2 image is based on. It is only ever read, unless the image is a
/// writable one whose own blocks it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskPart {
    /// The file on the host.
    pub source: PathBuf,
    /// Where the image says that it is: an absolute path, found from the image's own path where that is a relative one.
    pub named: PathBuf,
    /// The image, or what leads to it, has an absolute name for it.
    pub absolute: bool,
    /// Offer it read-only.
    pub read_only: bool,
}

/// A vsock port: a dial by the guest becomes a connection to a UNIX socket of the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Socket {
    /// vsock port, see [`crate::stream`].
    pub port: u32,
    /// Path of a listening UNIX socket on the host.
    pub source: PathBuf,
}

/// The network devices of the machine, in device order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nics {
    /// All of them; none is fine.
    pub nics: Vec<Nic>,
}

/// A tap in the VMM's network namespace, served to the guest by virtio-net.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Name of the tap, 1 to 15 bytes of `[a-z0-9]`. It is there, up, and belongs to the jail's first id.
    pub tap: String,
    /// Hardware address that the guest sees.
    pub mac: [u8; 6],
}

/// What confines the VMM process. The jail fails closed; only its last two layers can be asked to be less, by the node's
/// operator and for the reasons that they name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jail {
    /// An empty directory of the host on which the jail's root is assembled, in the VMM's own mount namespace.
    pub root: PathBuf,
    /// First id of the host's that belongs to this sandbox: root in the jail's user namespace.
    pub uid_base: u32,
    /// How many ids belong to it, from `uid_base` on.
    pub uid_count: u32,
    /// Where the pod has a user namespace: the guest's id for root of it. The guest's ids from there on are the sandbox's
    /// from its second on, and of those below only root is one; id 0 of a volume's files is root of the pod.
    #[serde(default)]
    pub pod_root: Option<u32>,
    /// Where the VMM's network is.
    pub network: Network,
    /// Directory of a cgroup (v2, or one per hierarchy of v1) to join first.
    pub cgroups: Vec<PathBuf>,
    /// RLIMIT_NOFILE. virtiofs keeps a descriptor for every inode the guest knows.
    pub max_files: u64,
    /// Landlock's rules for files, TCP and signals.
    #[serde(default)]
    pub landlock: Landlock,
    /// The filter of system calls.
    #[serde(default)]
    pub seccomp: Seccomp,
}

/// What to do about Landlock, which a kernel may not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Landlock {
    /// No VM without it. Everything that this kernel's Landlock knows is in force.
    #[default]
    Require,
    /// Go on where the kernel has none, and say so.
    BestEffort,
    /// Do without, and say so.
    Off,
}

/// What to do about a system call that the VMM has no reason for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    /// End the VMM, which reports the call.
    #[default]
    Enforce,
    /// Let the kernel log it, and go on: to find out what the filter lacks on a new system.
    Log,
    /// Nothing.
    Off,
}

/// The network of a sandbox. Only the VMM is in the namespace; what of it reaches the guest, and how, is the device's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// A namespace of its own, with nothing in it.
    New,
    /// A namespace that somebody made.
    Join(PathBuf),
    /// The host's own. The guest has no interface in it: its sockets are made by the VMM (libkrun's TSI).
    Host,
}

/// What the VMM says, one JSON object a line on [`REPORT_FD`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Report {
    /// The VMM proper runs, with this process id in the shim's PID namespace. The process that was spawned first exits.
    Started {
        /// Process id.
        pid: u32,
    },
    /// The VMM cannot go on, and exits. There is no guest.
    Failed {
        /// The step that failed, such as `pivot root` or `enter libkrun`.
        stage: String,
        /// The system's error number, where there is one.
        errno: Option<i32>,
        /// What was being done to what, and why it failed.
        message: String,
    },
    /// Something is weaker than asked for, but the configuration allows it (a share that cannot be idmapped).
    Degraded {
        /// The step.
        stage: String,
        /// What is missing and why.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_lines_are_stable() {
        let line = serde_json::to_string(&Report::Started { pid: 7 }).expect("serialize");
        assert_eq!(line, r#"{"report":"started","pid":7}"#);
        let back: Report =
            serde_json::from_str(r#"{"report":"failed","stage":"jail","errno":1,"message":"m"}"#).expect("parse");
        assert_eq!(back, Report::Failed { stage: "jail".into(), errno: Some(1), message: "m".into() });
    }

    #[test]
    fn unknown_fields_are_refused() {
        assert!(serde_json::from_str::<Report>(r#"{"report":"started","pid":7,"x":1}"#).is_err());
    }
}
