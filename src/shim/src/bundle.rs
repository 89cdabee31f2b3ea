//! containerd's directory for one container: `config.json` → [`Bundle`], checked; sandbox or container?
//!
//! What stands in a bundle was written by whoever may create pods, so it is read with a limit and nothing of it is
//! trusted to be a file name before it has been parsed as one.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use nacelle_protocol::ids::{IdError, SandboxId};
use nacelle_protocol::vm::Network;
use oci_spec::runtime::{Hooks, LinuxNamespaceType, Spec};
use serde::Deserialize;
use thiserror::Error;

/// Longest `config.json` that is read, in bytes. containerd's own messages end at 16 MiB.
const MAX_CONFIG: u64 = 16 << 20;

/// Annotation: what a container is to its pod.
pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// Annotation: memory of a pod, in bytes.
pub const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// Annotation: CPU time of a pod, in microseconds per period.
pub const SANDBOX_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// Annotation: the period, in microseconds.
pub const SANDBOX_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// Why a bundle is refused.
#[derive(Debug, Error)]
pub enum BundleError {
    /// `config.json` cannot be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// `config.json` is not what the OCI runtime specification describes.
    #[error("parse {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// An annotation is malformed.
    #[error("read annotation {SANDBOX_ID}")]
    SandboxId(#[source] IdError),
    /// The container type is neither sandbox nor container.
    #[error("read annotation {CONTAINER_TYPE}: unknown type {0:?}")]
    ContainerType(String),
    /// A part that every Linux container has is not there.
    #[error("read {path}: it has no {part}")]
    Missing {
        /// The file.
        path: PathBuf,
        /// The part.
        part: &'static str,
    },
    /// A pod wants the host's network.
    #[error("use the host's network for a pod: a VM has interfaces of its own; set hostNetwork to false")]
    HostNetwork,
    /// A pod wants the host's IPC objects.
    #[error("use the host's IPC for a pod: it does not exist in a VM; set hostIPC to false")]
    HostIpc,
}

/// What a container is to its sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It is alone, and its sandbox has its name.
    Single,
    /// It is the pod's first container.
    Sandbox,
    /// It belongs into this pod.
    Container(SandboxId),
}

/// Limits that Kubernetes knows for the pod as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodLimits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Microseconds per period.
    pub cpu_quota: Option<i64>,
    /// Microseconds.
    pub cpu_period: Option<u64>,
}

/// One container, as its bundle describes it.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// The directory.
    pub dir: PathBuf,
    /// The OCI configuration, unchanged.
    pub spec: Spec,
    /// What it is to its sandbox.
    pub role: Role,
    /// The sandbox's network.
    pub network: Network,
    /// Limits of the pod.
    pub pod: PodLimits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Annotated {
    annotations: HashMap<String, String>,
}

/// Finds out what a container is to its sandbox, from its bundle alone. A bundle without `config.json` is a sandbox's.
///
/// # Errors
/// [`BundleError`].
pub fn role(dir: &Path) -> Result<Role, BundleError> {
    let path = dir.join("config.json");
    let text = match read(&path) {
        Err(BundleError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Role::Single),
        other => other?,
    };
    let spec: Annotated = serde_json::from_slice(&text).map_err(|source| BundleError::Parse { path, source })?;
    role_of(&spec.annotations)
}

fn role_of(annotations: &HashMap<String, String>) -> Result<Role, BundleError> {
    match annotations.get(CONTAINER_TYPE).map(String::as_str) {
        None => Ok(Role::Single),
        Some("sandbox") => Ok(Role::Sandbox),
        Some("container") => {
            let id = annotations.get(SANDBOX_ID).map(String::as_str).unwrap_or_default();
            SandboxId::new(id).map(Role::Container).map_err(BundleError::SandboxId)
        }
        Some(other) => Err(BundleError::ContainerType(other.chars().take(80).collect())),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, BundleError> {
    let failed = |source| BundleError::Read { path: path.to_owned(), source };
    let mut text = Vec::new();
    File::open(path).and_then(|f| f.take(MAX_CONFIG + 1).read_to_end(&mut text)).map_err(failed)?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, "longer than 16 MiB")));
    }
    Ok(text)
}

impl Bundle {
    /// Reads and checks a bundle.
    ///
    /// # Errors
    /// [`BundleError`].
    pub fn load(dir: &Path) -> Result<Self, BundleError> {
        let path = dir.join("config.json");
        Self::parse(dir, &read(&path)?)
    }

    /// Checks the bytes of a `config.json`.
    ///
    /// # Errors
    /// [`BundleError`].
    pub fn parse(dir: &Path, text: &[u8]) -> Result<Self, BundleError> {
        let path = dir.join("config.json");
        let failed = |source| BundleError::Parse { path: path.clone(), source };
        let spec: Spec = serde_json::from_slice(text).map_err(failed)?;
        let missing = |part| BundleError::Missing { path: path.clone(), part };
        if spec.process().is_none() {
            return Err(missing("process"));
        }
        let linux = spec.linux().as_ref().ok_or_else(|| missing("linux section"))?;
        let namespaces = linux.namespaces().iter().flatten();
        let network = namespaces.into_iter().find(|ns| ns.typ() == LinuxNamespaceType::Network);
        let network = match network.map(|namespace| namespace.path()) {
            Some(Some(path)) => Network::Join(path.clone()),
            Some(None) => Network::New,
            None => Network::Host,
        };
        let none = HashMap::new();
        let annotations = spec.annotations().as_ref().unwrap_or(&none);
        fn number<T: std::str::FromStr>(annotations: &HashMap<String, String>, key: &str) -> Option<T> {
            annotations.get(key).and_then(|text| text.parse().ok())
        }
        let pod = PodLimits {
            memory: number(annotations, SANDBOX_MEMORY),
            cpu_quota: number(annotations, SANDBOX_CPU_QUOTA),
            cpu_period: number(annotations, SANDBOX_CPU_PERIOD),
        };
        let role = role_of(annotations)?;
        // What a pod shares with the host are interfaces and ports that the kubelet knows of; sockets alone are not that.
        if network == Network::Host && role != Role::Single {
            return Err(BundleError::HostNetwork);
        }
        let has_ipc = linux.namespaces().iter().flatten().any(|ns| ns.typ() == LinuxNamespaceType::Ipc);
        if role == Role::Sandbox && !has_ipc {
            return Err(BundleError::HostIpc);
        }
        Ok(Self { dir: dir.to_owned(), role, network, pod, spec })
    }

    /// All annotations.
    pub fn annotations(&self) -> &HashMap<String, String> {
        static NONE: LazyLock<HashMap<String, String>> = LazyLock::new(HashMap::new);
        self.spec.annotations().as_ref().unwrap_or(&NONE)
    }

    /// Hooks, which run on the host.
    pub fn hooks(&self) -> Option<&Hooks> {
        self.spec.hooks().as_ref()
    }

    /// Kernel parameters.
    pub fn sysctls(&self) -> HashMap<String, String> {
        self.spec.linux().as_ref().and_then(|linux| linux.sysctl().clone()).unwrap_or_default()
    }

    /// Path of the container's cgroup, in whichever style.
    pub fn cgroups_path(&self) -> Option<&Path> {
        self.spec.linux().as_ref()?.cgroups_path().as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &serde_json::Value) -> Result<Bundle, BundleError> {
        Bundle::parse(Path::new("/b"), json.to_string().as_bytes())
    }

    fn config(annotations: serde_json::Value) -> serde_json::Value {
        serde_json::json!({
            "ociVersion": "1.1.0",
            "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": ["sh"] },
            "root": { "path": "rootfs" },
            "linux": { "namespaces": [{ "type": "network", "path": "/run/netns/x" }, { "type": "ipc" }] },
            "annotations": annotations,
        })
    }

    #[test]
    fn roles() {
        let role = |annotations| parse(&config(annotations)).map(|b| b.role);
        assert_eq!(role(serde_json::json!({})).expect("parse"), Role::Single);
        assert_eq!(role(serde_json::json!({ CONTAINER_TYPE: "sandbox" })).expect("parse"), Role::Sandbox);
        let app = serde_json::json!({ CONTAINER_TYPE: "container", SANDBOX_ID: "pod1" });
        assert_eq!(role(app).expect("parse"), Role::Container(SandboxId::new("pod1").expect("id")));
        let evil = serde_json::json!({ CONTAINER_TYPE: "container", SANDBOX_ID: "../pod1" });
        assert!(matches!(role(evil), Err(BundleError::SandboxId(_))));
        assert!(matches!(role(serde_json::json!({ CONTAINER_TYPE: "x" })), Err(BundleError::ContainerType(_))));
    }

    #[test]
    fn networks() {
        let mut json = config(serde_json::json!({}));
        assert_eq!(parse(&json).expect("parse").network, Network::Join("/run/netns/x".into()));
        json["linux"]["namespaces"] = serde_json::json!([{ "type": "network" }]);
        assert_eq!(parse(&json).expect("parse").network, Network::New);
        json["linux"]["namespaces"] = serde_json::json!([{ "type": "mount" }]);
        assert_eq!(parse(&json).expect("parse").network, Network::Host);
        json["annotations"] = serde_json::json!({ CONTAINER_TYPE: "sandbox" });
        assert!(matches!(parse(&json), Err(BundleError::HostNetwork)));
        json["linux"]["namespaces"] = serde_json::json!([{ "type": "network", "path": "/run/netns/x" }]);
        assert!(matches!(parse(&json), Err(BundleError::HostIpc)));
    }

    #[test]
    fn pod_limits_and_damage() {
        let json = config(serde_json::json!({ SANDBOX_MEMORY: "1048576", SANDBOX_CPU_QUOTA: "x" }));
        let pod = parse(&json).expect("parse").pod;
        assert_eq!(pod, PodLimits { memory: Some(1_048_576), ..PodLimits::default() });
        assert!(matches!(Bundle::parse(Path::new("/b"), b"{"), Err(BundleError::Parse { .. })));
        let mut json = config(serde_json::json!({}));
        json.as_object_mut().expect("object").remove("process");
        assert!(matches!(parse(&json), Err(BundleError::Missing { part: "process", .. })));
    }

    #[test]
    fn a_bundle_without_configuration_is_a_sandbox_of_its_own() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert_eq!(role(dir.path()).expect("role"), Role::Single);
        let json = config(serde_json::json!({ CONTAINER_TYPE: "sandbox" }));
        std::fs::write(dir.path().join("config.json"), json.to_string()).expect("write");
        assert_eq!(role(dir.path()).expect("role"), Role::Sandbox);
    }
}
