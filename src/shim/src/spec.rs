//! The OCI configuration for the guest: constructed field by field, never filtered. Pure.
//!
//! What is not named here does not reach the guest, so a field that a later version of the specification adds cannot
//! slip through. Three things can happen to a part of the host's configuration:
//!
//! | part                                                              | what becomes of it                                    |
//! |-------------------------------------------------------------------|-------------------------------------------------------|
//! | process, root, host name, sysctls, limits, seccomp, masked paths  | copied                                                  |
//! | bind mounts                                                       | become volumes: see [`Volume`]                          |
//! | mounts of nacelle's own types                                     | see [`crate::sources`]                                  |
//! | namespaces                                                        | pid, ipc, uts, mount and cgroup; the pod's are the guest's |
//! | AppArmor, SELinux, block I/O, RDT, devices of the host            | dropped, and said so: they mean something of the host's |
//! | a user namespace                                                  | one of the guest's with the same ids: see [`users`]     |
//! | idmapped mounts with other ids, seccomp listeners                 | refused: without them the container would be less confined |

use std::path::{Path, PathBuf};

use nacelle_protocol::agent::{Disk, MIRRORS_DIR, Mirror, Users, VOLUMES_DIR};
use nacelle_protocol::ids::{ContainerId, SandboxId};
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceType, LinuxIdMapping, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount,
    Process, Spec,
};
use serde::Serialize;
use serde_json::{Map, Value, json};
use thiserror::Error;

#[cfg(test)]
mod tests;

/// Shared memory of a container.
const SHM: &str = "/dev/shm";
/// Files below /etc that a pod's containers share.
pub const ETC: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Why a configuration cannot be carried over.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SpecError {
    /// A file system that the guest cannot mount for the container.
    #[error("mount {destination}: type {kind:?} is not supported")]
    MountType {
        /// Where it should go.
        destination: PathBuf,
        /// Its type.
        kind: String,
    },
    /// A bind mount of nothing.
    #[error("mount {0}: it has no source")]
    NoSource(PathBuf),
    /// Something that has no counterpart in the guest, and without which the container would be less confined.
    #[error("use {0}: not supported in a VM")]
    Unsupported(&'static str),
    /// A user namespace whose ids are not one range that leaves out root of the guest.
    #[error(
        "make a user namespace: its ids have to be one range from 0 on, the same for users and groups, and not root of the host"
    )]
    Users,
    /// A container of a pod in another user namespace than the pod, or with a root file system for another.
    #[error("join the pod's user namespace: the ids of the {0} are not those of the pod's")]
    PodUsers(&'static str),
    /// A mount whose ids are mapped, but not as the container's are.
    #[error("mount {0}: its ids are mapped, but not as those of the container's user namespace")]
    MountIds(PathBuf),
    /// A namespace of a process that nacelle does not know.
    #[error("join namespace {0}: only a container of a pod can join one, and only PID, IPC and UTS namespaces")]
    Namespace(PathBuf),
    /// A part is missing.
    #[error("read configuration: no {0}")]
    Missing(&'static str),
}

/// A directory or a single file of the host that the container gets to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Name below the volumes share.
    pub name: String,
    /// On the host.
    pub source: PathBuf,
    /// Where the container wants it, for messages.
    pub destination: PathBuf,
    /// With the mounts below it.
    pub recursive: bool,
    /// The container may not write.
    pub read_only: bool,
    /// What the host mounts below it later is meant for the container, too.
    pub follows: bool,
}

/// What the types of mounts begin with that are nacelle's own, see [`crate::sources`].
pub const OWN_TYPES: &str = "nacelle.";

/// How the name of a volume ends whose files' ids are those of the pod's user namespace.
const MAPPED: &str = "-mapped";

impl Volume {
    /// Whether the ids of the files of the volume with this name are those of the pod's user namespace: id 0 is its root.
    pub fn is_mapped(name: &str) -> bool {
        name.ends_with(MAPPED)
    }

    /// Takes the pod's own file for one of those that containerd mounts into every container, but makes only where the
    /// sandbox is a container of its own.
    pub fn or_pods_own(&mut self, etc: &Path) {
        let name = self.destination.strip_prefix("/etc").ok().filter(|name| ETC.iter().any(|known| name == known));
        if let Some(own) = name.map(|name| etc.join(name)).filter(|own| !self.source.exists() && own.exists()) {
            self.source = own;
        }
    }
}

/// Has a configuration for the guest name the copies of volumes.
pub fn use_mirrors(spec: &mut Value, mirrors: &[Mirror]) {
    let mounts = spec.get_mut("mounts").and_then(Value::as_array_mut).into_iter().flatten();
    for source in mounts.filter_map(|mount| mount.get_mut("source")) {
        let name = source.as_str().and_then(|path| Path::new(path).strip_prefix(VOLUMES_DIR).ok());
        if let Some(mirror) = mirrors.iter().find(|mirror| name == Some(Path::new(&mirror.volume))) {
            *source = json!(Path::new(MIRRORS_DIR).join(&mirror.volume));
        }
    }
}

/// A configuration for the guest, and what it needs on the host.
#[derive(Clone, Debug)]
pub struct Translation {
    /// The OCI configuration.
    pub spec: Value,
    /// The volumes that its bind mounts stand for.
    pub volumes: Vec<Volume>,
    /// Disks of the VM's that it has as volumes.
    pub disks: Vec<Disk>,
    /// What was left out, for the log.
    pub dropped: Vec<String>,
    /// It shares process ids with other containers of the pod.
    pub pod_pids: bool,
    /// The user namespace that it is in.
    pub users: Option<Users>,
}

impl Translation {
    /// What the names of its volumes end with.
    pub fn suffix(&self) -> &'static str {
        if self.users.is_some() { MAPPED } else { "" }
    }

    /// Puts mounts into the configuration: those that stand for one of nacelle's own types in its place, in their order, and the
    /// others behind all.
    pub fn put(&mut self, places: Vec<(Value, bool)>) {
        let Some(mounts) = self.spec.get_mut("mounts").and_then(Value::as_array_mut) else { return };
        let own = |mount: &Value| mount["type"].as_str().is_some_and(|kind| kind.starts_with(OWN_TYPES));
        for (mount, stands_for_one) in places {
            match mounts.iter_mut().find(|place| stands_for_one && own(place)) {
                Some(place) => *place = mount,
                None => mounts.push(mount),
            }
        }
    }

    /// Adds the pod's own files below /etc, which are in directory `etc` where the shim has made them, unless the
    /// configuration says what shall be there.
    pub fn add_pods_files(&mut self, id: &ContainerId, etc: &Path) {
        let read_only = self.spec.pointer("/root/readonly") == Some(&Value::Bool(true));
        let suffix = self.suffix();
        let Some(mounts) = self.spec.get_mut("mounts").and_then(Value::as_array_mut) else { return };
        for (name, source) in ETC.map(|name| (name, etc.join(name))).into_iter().filter(|(_, source)| source.exists()) {
            let destination = Path::new("/etc").join(name);
            if mounts.iter().any(|mount| mount["destination"] == json!(destination)) {
                continue;
            }
            let name = format!("{id}-{}{suffix}", self.volumes.len());
            let options = ["bind", "rprivate", if read_only { "ro" } else { "rw" }];
            let place = Path::new(VOLUMES_DIR).join(&name);
            mounts.push(json!({ "destination": destination, "type": "bind", "source": place, "options": options }));
            self.volumes.push(Volume { name, source, destination, recursive: false, read_only, follows: false });
        }
    }
}

fn put(map: &mut Map<String, Value>, key: &str, value: &Option<impl Serialize>) {
    if let Some(value) = value {
        // These types come from JSON and go back the same way.
        map.insert(key.to_owned(), json!(value));
    }
}

/// Makes the guest's configuration of container `id`, which is one of `pod` or alone.
///
/// A namespace that a container of a pod joins by its path is the pod's, whatever the path: every process of the pod that
/// containerd knows has the same process id, the VMM's.
///
/// # Errors
/// [`SpecError`].
pub fn translate(host: &Spec, id: &ContainerId, pod: Option<&SandboxId>) -> Result<Translation, SpecError> {
    let (mut dropped, mut pod_pids) = (Vec::new(), false);
    let linux = host.linux().as_ref().ok_or(SpecError::Missing("linux section"))?;
    let users = users(linux)?;
    if users.is_some() && pod.is_none() {
        return Err(SpecError::Unsupported("a user namespace for a container that is no pod's"));
    }
    let host_process = host.process().as_ref().ok_or(SpecError::Missing("process"))?;
    let (mut volumes, mut mounts) = (Vec::new(), Vec::new());
    let mut namespaces = linux.namespaces().iter().flatten();
    let joins_ipc =
        namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::Ipc && namespace.path().is_some());
    for host_mount in host.mounts().iter().flatten() {
        mounts.push(match pod.is_some_and(|pod| joins_ipc && is_pod_shm(host_mount, pod)) {
            true => json!({ "destination": SHM, "type": "bind", "source": SHM, "options": ["rbind", "rw"] }),
            false => mount(host_mount, id, users, &mut volumes, &mut dropped)?,
        });
    }
    let read_only = host.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    let mut spec = Map::new();
    spec.insert("ociVersion".into(), json!(host.version()));
    spec.insert("process".into(), process(host_process, &mut dropped));
    spec.insert("root".into(), json!({ "path": "rootfs", "readonly": read_only }));
    put(&mut spec, "hostname", host.hostname());
    put(&mut spec, "domainname", host.domainname());
    spec.insert("mounts".into(), Value::Array(mounts));
    spec.insert("linux".into(), linux_section(linux, id, pod.is_some(), &mut pod_pids, &mut dropped)?);
    Ok(Translation { spec: Value::Object(spec), volumes, disks: Vec::new(), dropped, pod_pids, users })
}

/// The user namespace that a configuration asks for, whether new or somebody's: in the guest all containers of a pod that
/// ask for one are in the same, with the same ids as on the host.
///
/// # Errors
/// [`SpecError::Users`].
pub fn users(linux: &Linux) -> Result<Option<Users>, SpecError> {
    let has = linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    let users = one_range(linux.uid_mappings())?;
    match (has, users == one_range(linux.gid_mappings())?) {
        // Without mappings there is nothing that it would change.
        (true, true) => Ok(users),
        (false, true) if users.is_none() => Ok(None),
        _ => Err(SpecError::Users),
    }
}

fn one_range(mappings: &Option<Vec<LinuxIdMapping>>) -> Result<Option<Users>, SpecError> {
    match mappings.as_deref() {
        None | Some([]) => Ok(None),
        Some([map]) => {
            let (first, count) = (map.host_id(), map.size());
            let fits = count > 0 && first.checked_add(count).is_some();
            let good = map.container_id() == 0 && first > 0 && fits;
            if good { Ok(Some(Users { first, count })) } else { Err(SpecError::Users) }
        }
        Some(_) => Err(SpecError::Users),
    }
}

/// Makes the guest's configuration of a process: a container's, or an exec's.
pub fn process(host: &Process, dropped: &mut Vec<String>) -> Value {
    let mut out = Map::new();
    put(&mut out, "terminal", &host.terminal());
    put(&mut out, "consoleSize", &host.console_size());
    out.insert("user".into(), json!(host.user()));
    put(&mut out, "args", host.args());
    put(&mut out, "env", host.env());
    out.insert("cwd".into(), json!(host.cwd()));
    put(&mut out, "capabilities", host.capabilities());
    put(&mut out, "rlimits", host.rlimits());
    put(&mut out, "noNewPrivileges", &host.no_new_privileges());
    put(&mut out, "oomScoreAdj", &host.oom_score_adj());
    put(&mut out, "ioPriority", host.io_priority());
    put(&mut out, "scheduler", host.scheduler());
    let labels = [("AppArmor profile", host.apparmor_profile()), ("SELinux label", host.selinux_label())];
    for (what, label) in labels {
        if let Some(label) = label.as_ref().filter(|label| !label.is_empty()) {
            dropped.push(format!("{what} {label:?}"));
        }
    }
    Value::Object(out)
}

/// Containers that share IPC share their memory files, too. What containerd keeps for that is a file system of the host's,
/// or just a tmpfs for each container where the shim is the sandbox; that of a VM is the guest's own, of the same size.
fn is_pod_shm(mount: &Mount, pod: &SandboxId) -> bool {
    let parent = mount.source().as_deref().filter(|source| source.ends_with("shm")).and_then(Path::parent);
    let containerds =
        mount.typ().as_deref() == Some("tmpfs") || parent.is_some_and(|parent| parent.ends_with(pod.as_str()));
    mount.destination() == Path::new(SHM) && containerds
}

fn is_bind(mount: &Mount) -> bool {
    let options = mount.options().iter().flatten();
    mount.typ().as_deref() == Some("bind") || options.into_iter().any(|o| o == "bind" || o == "rbind")
}

fn mount(
    host: &Mount,
    id: &ContainerId,
    users: Option<Users>,
    volumes: &mut Vec<Volume>,
    dropped: &mut Vec<String>,
) -> Result<Value, SpecError> {
    let destination = host.destination();
    let none = Vec::new();
    let options = host.options().as_ref().unwrap_or(&none);
    let maps = one_range(host.uid_mappings()).and_then(|uids| Ok([uids, one_range(host.gid_mappings())?]));
    let mapped = match maps {
        Ok([None, None]) if options.iter().all(|o| o != "idmap" && o != "ridmap") => false,
        // Without ids of its own it has those of the container.
        Ok([None, None]) if users.is_some() => true,
        Ok([uids, gids]) if users.is_some() && uids == users && gids == users => true,
        _ => return Err(SpecError::MountIds(destination.clone())),
    };
    if options.iter().any(|o| o == "shared" || o == "rshared") {
        return Err(SpecError::Unsupported("mount propagation back to the host"));
    }
    if is_bind(host) {
        let source = host.source().as_ref().filter(|source| !source.as_os_str().is_empty());
        let volume = Volume {
            name: format!("{id}-{}{}", volumes.len(), if mapped { MAPPED } else { "" }),
            source: source.ok_or_else(|| SpecError::NoSource(destination.clone()))?.clone(),
            destination: destination.clone(),
            recursive: options.iter().any(|o| o == "rbind"),
            // As in mount(8), the last word counts.
            read_only: options.iter().rfind(|o| matches!(o.as_str(), "ro" | "rro" | "rw")).is_some_and(|o| o != "rw"),
            follows: options.iter().any(|o| o == "slave" || o == "rslave"),
        };
        let source = Path::new(VOLUMES_DIR).join(&volume.name);
        volumes.push(volume);
        // Read-only is recursive in the guest: what is mounted below a share has its flags.
        let options = options.iter().filter(|o| !matches!(o.as_str(), "idmap" | "ridmap"));
        // On a volume nobody gets more rights by a program's owner, and no device works.
        let (rights, options): (Vec<_>, Vec<_>) = options.partition(|o| matches!(o.as_str(), "suid" | "dev"));
        dropped
            .extend(rights.iter().map(|option| format!("option {option} of the mount at {}", destination.display())));
        let options: Vec<_> = options.into_iter().map(|o| if o == "rro" { "ro" } else { o }).collect();
        return Ok(json!({ "destination": destination, "type": "bind", "source": source, "options": options }));
    }
    let kind = host.typ().as_deref().unwrap_or_default();
    match kind {
        "proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue" | "cgroup" => {
            Ok(json!({ "destination": destination, "type": kind, "source": kind, "options": options }))
        }
        // The guest has no other.
        "cgroup2" => {
            Ok(json!({ "destination": destination, "type": "cgroup", "source": "cgroup", "options": options }))
        }
        // A place for what becomes of it.
        _ if kind.starts_with(OWN_TYPES) => Ok(json!({ "destination": destination, "type": kind })),
        _ => Err(SpecError::MountType { destination: destination.clone(), kind: kind.chars().take(80).collect() }),
    }
}

fn linux_section(
    host: &Linux,
    id: &ContainerId,
    in_pod: bool,
    pod_pids: &mut bool,
    dropped: &mut Vec<String>,
) -> Result<Value, SpecError> {
    if host.seccomp().as_ref().is_some_and(|seccomp| seccomp.listener_path().is_some()) {
        return Err(SpecError::Unsupported("a seccomp listener"));
    }
    let mut namespaces = Vec::new();
    for host_namespace in host.namespaces().iter().flatten() {
        namespaces.extend(namespace(host_namespace, in_pod, pod_pids)?);
    }
    let names_itself = host.namespaces().iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::Uts);
    if in_pod && !names_itself {
        // It would have the host's name. There is no host in a guest, and the pod's name it has not asked for.
        namespaces.push(json!({ "type": "uts" }));
    }
    let mut out = Map::new();
    out.insert("namespaces".into(), Value::Array(namespaces));
    out.insert("cgroupsPath".into(), json!(format!("/{id}")));
    put(&mut out, "sysctl", host.sysctl());
    if let Some(host_resources) = host.resources() {
        out.insert("resources".into(), resources(host_resources, dropped));
    }
    let (kept, gone): (Vec<_>, Vec<_>) = host.devices().iter().flatten().partition(|device| is_pseudo(device));
    out.insert("devices".into(), json!(kept));
    if !gone.is_empty() {
        let names: Vec<_> = gone.iter().take(8).map(|device| device.path().display().to_string()).collect();
        dropped.push(format!("{} devices of the host: {}", gone.len(), names.join(" ")));
    }
    put(&mut out, "seccomp", host.seccomp());
    put(&mut out, "maskedPaths", host.masked_paths());
    put(&mut out, "readonlyPaths", host.readonly_paths());
    if let Some(propagation) = host.rootfs_propagation() {
        out.insert("rootfsPropagation".into(), json!(root_propagation(propagation)?));
    }
    put(&mut out, "personality", host.personality());
    if host.mount_label().as_ref().is_some_and(|label| !label.is_empty()) {
        dropped.push("SELinux mount label".into());
    }
    if host.intel_rdt().is_some() {
        dropped.push("Intel RDT".into());
    }
    Ok(Value::Object(out))
}

/// containerd says it in mount(8)'s words for a whole tree, the specification in those for one mount, and means the tree.
fn root_propagation(word: &str) -> Result<&str, SpecError> {
    match word.strip_prefix('r').unwrap_or(word) {
        "shared" => Err(SpecError::Unsupported("mount propagation back to the host")),
        plain => Ok(plain),
    }
}

fn namespace(host: &LinuxNamespace, in_pod: bool, pod_pids: &mut bool) -> Result<Option<Value>, SpecError> {
    use LinuxNamespaceType as Type;
    let own = Ok(Some(json!({ "type": host.typ() })));
    match (host.typ(), host.path()) {
        // The guest's own; the VMM is in the one on the host.
        (Type::Network, _) => Ok(None),
        // The agent's affair.
        (Type::User, _) => Ok(None),
        (Type::Time, _) => Err(SpecError::Unsupported("a time namespace")),
        (Type::Pid | Type::Ipc | Type::Uts | Type::Mount | Type::Cgroup, None) => own,
        // The guest's own, as the guest is the pod.
        (Type::Ipc | Type::Uts, Some(_)) if in_pod => Ok(None),
        (Type::Pid, Some(_)) if in_pod => {
            *pod_pids = true;
            own
        }
        (_, Some(path)) => Err(SpecError::Namespace(path.clone())),
    }
}

/// What the guest's cgroups can do. Used for updates too.
pub fn resources(host: &LinuxResources, dropped: &mut Vec<String>) -> Value {
    let mut out = Map::new();
    put(&mut out, "devices", host.devices());
    put(&mut out, "memory", host.memory());
    put(&mut out, "cpu", host.cpu());
    put(&mut out, "pids", host.pids());
    put(&mut out, "hugepageLimits", host.hugepage_limits());
    put(&mut out, "unified", host.unified());
    // Their devices are numbers of the host's.
    let block = host.block_io().as_ref().is_some_and(|io| {
        let throttles = [
            io.throttle_read_bps_device(),
            io.throttle_write_bps_device(),
            io.throttle_read_iops_device(),
            io.throttle_write_iops_device(),
        ];
        io.weight().is_some() || throttles.iter().any(|t| t.as_ref().is_some_and(|t| !t.is_empty()))
    });
    if block {
        dropped.push("block I/O limits".into());
    }
    Value::Object(out)
}

/// A device that is the same in every kernel (Linux `Documentation/admin-guide/devices.txt`). Any other number means
/// another device in the guest, such as the pod's own disk.
fn is_pseudo(device: &LinuxDevice) -> bool {
    let character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
    character && matches!((device.major(), device.minor()), (1, 3 | 5 | 7 | 8 | 9 | 11) | (5, 0..=2) | (10, 200 | 229))
}
