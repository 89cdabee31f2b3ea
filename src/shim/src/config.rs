//! The configuration: file → [`Config`], with defaults and refusals.
//!
//! ```text
//!  runtime options (ConfigPath, else ConfigBody) ─┐
//!  $NACELLE_CONFIG ───────────────────────────────┼─ first found ─► parse ─► defaults ─► validate ─► Config
//!  /etc/nacelle/nacelle.toml ─────────────────────┘
//! ```
//!
//! A key that is not known is an error with its line: a misspelt limit must not silently become the default. The TOML
//! structs stop here; the rest of the shim sees checked values only. No annotation of a pod ever reaches this module: what
//! they may change is decided in [`crate::annotations`].

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nacelle_protocol::vm::{Landlock, Seccomp};
use serde::Deserialize;
use thiserror::Error;

use crate::annotations::{KNOWN, Policy};

pub use self::programs::{Node, Programs};

mod programs;

/// Environment variable that names the configuration file.
pub const PATH_ENV: &str = "NACELLE_CONFIG";
/// Environment variable that carries a whole configuration from the `start` action to the server.
pub const BODY_ENV: &str = "NACELLE_CONFIG_BODY";
const DEFAULT_PATH: &str = "/etc/nacelle/nacelle.toml";
/// Longest configuration that is read, in bytes.
const MAX_LEN: u64 = 64 << 10;

/// The host's virtual machines.
pub const KVM: &str = "/dev/kvm";

/// Ids that belong to one pod.
pub const UIDS_PER_POD: u32 = 65536;

/// Why there is no usable configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The text is not what it should be.
    #[error("parse configuration {origin}, line {line}: {message}")]
    Parse {
        /// Where the text came from.
        origin: String,
        /// Line, counted from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A value is out of range.
    #[error("check configuration: {key} = {value} is not possible: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// The rule.
        reason: &'static str,
    },
    /// A program or the kernel is nowhere to be found.
    #[error("find the {what}: not at {tried}; install it there or set vm.{key} in the configuration")]
    Missing {
        /// What is missing.
        what: &'static str,
        /// Its key.
        key: &'static str,
        /// Where it was looked for.
        tried: String,
    },
    /// A file is not of the right kind.
    #[error("check the {what} {path}: it is not an ELF file{hint}")]
    NotElf {
        /// What the file should be.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
    },
    /// The host cannot run virtual machines.
    #[error("open /dev/kvm: load the kvm-intel or kvm-amd module, and turn on virtualization in the firmware")]
    Kvm(#[source] io::Error),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Document {
    vm: VmTable,
    rootfs: RootfsTable,
    volumes: VolumesTable,
    jail: JailTable,
    annotations: AnnotationsTable,
    log: LogTable,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct VmTable {
    kernel: Option<PathBuf>,
    host_network_kernel: Option<PathBuf>,
    vmm: Option<PathBuf>,
    agent: Option<PathBuf>,
    vcpus: u8,
    memory_mib: u32,
    overhead_mib: u32,
    boot_timeout_seconds: u64,
    kernel_args: Vec<String>,
}

impl Default for VmTable {
    fn default() -> Self {
        Self {
            kernel: None,
            host_network_kernel: None,
            vmm: None,
            agent: None,
            vcpus: 1,
            memory_mib: 512,
            overhead_mib: 128,
            boot_timeout_seconds: 60,
            kernel_args: Vec::new(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RootfsTable {
    dir: PathBuf,
    upper_mib: u64,
    container_mib: u64,
    cache_mib: u64,
    index_mib: u64,
    verity: Verity,
    patches: Option<PathBuf>,
    export: bool,
    proc_root: bool,
    fallback: Fallback,
}

impl Default for RootfsTable {
    fn default() -> Self {
        Self {
            dir: "/var/lib/nacelle".into(),
            upper_mib: 10 * 1024,
            container_mib: 0,
            cache_mib: 20 * 1024,
            index_mib: 0,
            verity: Verity::Off,
            patches: None,
            export: true,
            proc_root: true,
            fallback: Fallback::Flatten,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct VolumesTable {
    filesystems: Vec<String>,
}

impl Default for VolumesTable {
    fn default() -> Self {
        Self { filesystems: ["ext4", "xfs", "btrfs", "erofs", "squashfs", "vfat"].map(str::to_owned).to_vec() }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct JailTable {
    uid_base: u32,
    max_files: u64,
    idmap: Idmap,
    landlock: Landlock,
    seccomp: Seccomp,
}

impl Default for JailTable {
    fn default() -> Self {
        Self {
            uid_base: 1_879_048_192,
            max_files: 65536,
            idmap: Idmap::BestEffort,
            landlock: Landlock::Require,
            seccomp: Seccomp::Enforce,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct AnnotationsTable {
    allow: Vec<String>,
    host_paths: Vec<PathBuf>,
}

impl Default for AnnotationsTable {
    fn default() -> Self {
        let Policy { allow, host_paths } = Policy::default();
        Self { allow, host_paths }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LogTable {
    level: String,
}

impl Default for LogTable {
    fn default() -> Self {
        Self { level: "info".into() }
    }
}

/// Whether a guest checks its layers as it reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verity {
    /// It trusts the host's disk.
    Off,
    /// What differs from what was converted cannot be read, and is told.
    On,
}

/// What to do about a root file system that nacelle does not take apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fallback {
    /// Have the host mount it, and make one image of all of it, for the one container.
    Flatten,
    /// Refuse the container.
    None,
}

/// What to do about a volume whose file system cannot map ids: its files keep the host's ids, among which the VMM is
/// nobody, so the guest can do with them what others may, and no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Idmap {
    /// Go on so, and say it in the log and in the sandbox's status.
    BestEffort,
    /// Refuse the container.
    Require,
}

impl Idmap {
    /// Name of the step in the VMM's report.
    const STAGE: &str = "map ids";

    /// Whether something that is weaker than asked for must end the start.
    pub fn refuses(self, stage: &str) -> bool {
        self == Self::Require && stage == Self::STAGE
    }
}

/// The checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Configured guest kernel.
    pub kernel: Option<PathBuf>,
    /// Configured guest kernel of containers that use the host's network.
    pub host_network_kernel: Option<PathBuf>,
    /// Configured VMM.
    pub vmm: Option<PathBuf>,
    /// Configured agent.
    pub agent: Option<PathBuf>,
    /// Virtual CPUs without a limit.
    pub vcpus: u8,
    /// RAM without a limit, and the least; MiB.
    pub memory_mib: u32,
    /// RAM beside the containers; MiB.
    pub overhead_mib: u32,
    /// From the VMM's start to the agent's first word.
    pub boot_timeout: Duration,
    /// Appended to the guest kernel's command line.
    pub kernel_args: Vec<String>,
    /// Layers and uppers.
    pub data_dir: PathBuf,
    /// Size of a pod's upper; MiB.
    pub upper_mib: u64,
    /// Most that one container may write of it; MiB, 0 for all.
    pub container_mib: u64,
    /// Most that converted layers may take together, unless pods use them; MiB, 0 for any number.
    pub cache_mib: u64,
    /// A layer with so much in large files is used before it is converted; MiB, 0 for none.
    pub index_mib: u64,
    /// Whether layers are checked as they are read.
    pub verity: Verity,
    /// A list of patches for the root of every container.
    pub patches: Option<PathBuf>,
    /// What a container that is no pod's has written goes to its snapshot.
    pub export: bool,
    /// The files of a container that is no pod's are the root of its VMM.
    pub proc_root: bool,
    /// What to do about roots that are neither layers nor images.
    pub fallback: Fallback,
    /// Types of file systems that a guest may mount from a disk of the host's.
    pub filesystems: Vec<String>,
    /// First id of the first pod.
    pub uid_base: u32,
    /// RLIMIT_NOFILE of a VMM.
    pub max_files: u64,
    /// What to do about volumes whose file system cannot map ids.
    pub idmap: Idmap,
    /// Landlock of a VMM.
    pub landlock: Landlock,
    /// System call filter of a VMM.
    pub seccomp: Seccomp,
    /// What a pod's annotations may change.
    pub annotations: Policy,
    /// Level of the shim's log.
    pub log_level: String,
}

/// Where the configuration of this sandbox comes from, as containerd's runtime options say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// A file; wins over `body`.
    pub path: Option<PathBuf>,
    /// The text itself.
    pub body: Option<String>,
}

impl Origin {
    /// What the `start` action left in the environment.
    pub fn from_env() -> Self {
        Self {
            path: std::env::var_os(PATH_ENV).filter(|p| !p.is_empty()).map(PathBuf::from),
            body: std::env::var(BODY_ENV).ok().filter(|b| !b.is_empty()),
        }
    }

    /// Reads the configuration from here, or from the default place.
    ///
    /// # Errors
    /// [`ConfigError`] names the file, the line and the rule.
    pub fn load(&self) -> Result<Config, ConfigError> {
        if let Some(path) = &self.path {
            return parse(&read(path)?, &path.display().to_string());
        }
        if let Some(body) = &self.body {
            return parse(body, "in the runtime options");
        }
        match read(Path::new(DEFAULT_PATH)) {
            Ok(text) => parse(&text, DEFAULT_PATH),
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                parse("", DEFAULT_PATH)
            }
            Err(e) => Err(e),
        }
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    File::open(path).and_then(|f| f.take(MAX_LEN + 1).read_to_string(&mut text)).map_err(failed)?;
    if text.len() as u64 > MAX_LEN {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, "longer than 64 KiB")));
    }
    Ok(text)
}

fn parse(text: &str, origin: &str) -> Result<Config, ConfigError> {
    let document: Document = toml::from_str(text).map_err(|e| ConfigError::Parse {
        origin: origin.to_owned(),
        line: e.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1),
        message: e.message().replace('\n', " "),
    })?;
    let Document { vm, rootfs, volumes, jail, annotations, log } = document;
    let config = Config {
        kernel: vm.kernel,
        host_network_kernel: vm.host_network_kernel,
        vmm: vm.vmm,
        agent: vm.agent,
        vcpus: vm.vcpus,
        memory_mib: vm.memory_mib,
        overhead_mib: vm.overhead_mib,
        boot_timeout: Duration::from_secs(vm.boot_timeout_seconds),
        kernel_args: vm.kernel_args,
        data_dir: rootfs.dir,
        upper_mib: rootfs.upper_mib,
        container_mib: rootfs.container_mib,
        cache_mib: rootfs.cache_mib,
        index_mib: rootfs.index_mib,
        verity: rootfs.verity,
        patches: rootfs.patches,
        export: rootfs.export,
        proc_root: rootfs.proc_root,
        fallback: rootfs.fallback,
        filesystems: volumes.filesystems,
        uid_base: jail.uid_base,
        max_files: jail.max_files,
        idmap: jail.idmap,
        landlock: jail.landlock,
        seccomp: jail.seccomp,
        annotations: Policy { allow: annotations.allow, host_paths: annotations.host_paths },
        log_level: log.level,
    };
    config.validate()?;
    Ok(config)
}

impl Config {
    fn validate(&self) -> Result<(), ConfigError> {
        let check = |ok: bool, key, value: &dyn ToString, reason| {
            if ok { Ok(()) } else { Err(ConfigError::Value { key, value: value.to_string(), reason }) }
        };
        check(self.vcpus >= 1, "vm.vcpus", &self.vcpus, "a VM needs a CPU")?;
        check((128..=1 << 20).contains(&self.memory_mib), "vm.memory_mib", &self.memory_mib, "128 to 1048576")?;
        check((32..=1 << 16).contains(&self.overhead_mib), "vm.overhead_mib", &self.overhead_mib, "32 to 65536")?;
        let seconds = self.boot_timeout.as_secs();
        check((1..=600).contains(&seconds), "vm.boot_timeout_seconds", &seconds, "1 to 600")?;
        for word in &self.kernel_args {
            let clean = !word.is_empty() && word.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
            check(clean, "vm.kernel_args", word, "one printable word each, without quotes")?;
        }
        check(self.data_dir.is_absolute(), "rootfs.dir", &self.data_dir.display(), "an absolute path")?;
        if let Some(file) = &self.patches {
            check(file.is_absolute(), "rootfs.patches", &file.display(), "an absolute path")?;
        }
        check((64..=1 << 24).contains(&self.upper_mib), "rootfs.upper_mib", &self.upper_mib, "64 to 16777216")?;
        let fits = self.container_mib <= self.upper_mib;
        check(fits, "rootfs.container_mib", &self.container_mib, "at most rootfs.upper_mib")?;
        check(self.cache_mib <= 1 << 34, "rootfs.cache_mib", &self.cache_mib, "0 to 17179869184")?;
        check(self.index_mib <= 1 << 34, "rootfs.index_mib", &self.index_mib, "0 to 17179869184")?;
        for kind in &self.filesystems {
            let word = !kind.is_empty() && kind.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
            check(word, "volumes.filesystems", kind, "names of file systems, as in /proc/filesystems")?;
        }
        let uid_ok = self.uid_base >= UIDS_PER_POD && self.uid_base.is_multiple_of(UIDS_PER_POD);
        check(uid_ok, "jail.uid_base", &self.uid_base, "a multiple of 65536, not zero")?;
        check((1024..=1 << 20).contains(&self.max_files), "jail.max_files", &self.max_files, "1024 to 1048576")?;
        for name in &self.annotations.allow {
            check(KNOWN.contains(&name.as_str()), "annotations.allow", name, "nacelle knows no such annotation")?;
        }
        for path in &self.annotations.host_paths {
            check(path.is_absolute(), "annotations.host_paths", &path.display(), "absolute paths")?;
        }
        let levels = ["error", "warn", "info", "debug", "trace"];
        check(
            levels.contains(&self.log_level.as_str()),
            "log.level",
            &self.log_level,
            "error, warn, info, debug, trace",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_file_holds_exactly_the_defaults() {
        let shipped = include_str!("../../../config/nacelle.toml");
        let defaults = parse("", "nothing").expect("defaults are valid");
        assert_eq!(parse(shipped, "shipped").expect("parse"), defaults);
        // With every key uncommented it still parses, and differs only where a path is spelled out.
        let spelled: String = shipped
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if !rest.starts_with(' ') => format!("{rest}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        let config = parse(&spelled, "spelled out").expect("parse");
        let config = Config { kernel: None, host_network_kernel: None, vmm: None, agent: None, ..config };
        assert_eq!(Config { patches: None, ..config }, defaults);
    }

    #[test]
    fn refusals_name_line_and_key() {
        let err = |text| parse(text, "f").expect_err("refused").to_string();
        assert!(
            err("[vm]\nvcpus = 1\nmemory = 5\n").starts_with("parse configuration f, line 3: unknown field `memory`")
        );
        assert!(err("[vm]\nvcpus = \"two\"\n").contains("line 2"));
        assert!(err("[vm]\nvcpus = 0\n").contains("vm.vcpus = 0 is not possible"));
        assert!(err("[vm]\nkernel_args = [\"a b\"]\n").contains("vm.kernel_args"));
        assert!(err("[jail]\nuid_base = 1000\n").contains("jail.uid_base"));
        assert!(err("[rootfs]\ndir = \"x\"\n").contains("absolute"));
        assert!(err("[annotations]\nallow = [\"io.nacelle.jail\"]\n").contains("no such annotation"));
        assert!(err("[annotations]\nhost_paths = [\"kernels\"]\n").contains("absolute"));
        assert!(err("[rootfs]\npatches = \"x\"\n").contains("absolute"));
        assert!(!err("[vm]\nmemory = 5\n").contains('\n'), "one line for containerd's log");
    }

    #[test]
    fn a_path_wins_over_a_body() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "[vm]\nvcpus = 3\n").expect("write");
        let mut origin = Origin { path: Some(path), body: Some("[vm]\nvcpus = 4\n".into()) };
        assert_eq!(origin.load().expect("load").vcpus, 3);
        origin.path = None;
        assert_eq!(origin.load().expect("load").vcpus, 4);
        origin.path = Some("/nonexistent.toml".into());
        assert!(matches!(origin.load(), Err(ConfigError::Read { .. })), "a named file must exist");
    }
}
