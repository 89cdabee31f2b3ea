//! What libcontainer gets to see of an OCI configuration, and what the agent does itself. Pure.
//!
//! libcontainer 0.7 gives an exec no seccomp filter, cannot install one after it has dropped privileges, has no BPF for
//! devices, and looks for a program before the container is started. So the last steps towards the program are the
//! agent's ([`Execute`], performed by [`crate::executor`]): libcontainer drops no capabilities and installs no filter, and
//! limits are set by [`crate::cgroup`] before it runs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Capabilities, LinuxCapabilities, LinuxNamespace, LinuxNamespaceType, LinuxResources, LinuxSeccomp, Mount, Process,
    Spec,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::cgroup;
use crate::mount::rootfs_path;

/// Where a program is looked for when its environment has no PATH.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A configuration that the agent does not take.
#[derive(Debug, Error)]
pub enum SpecError {
    /// It is not what the OCI runtime specification describes.
    #[error("read OCI configuration")]
    Json(#[source] serde_json::Error),
    /// A part that must be there is not.
    #[error("read OCI configuration: no {0}")]
    Missing(&'static str),
    /// A zero byte where none can be.
    #[error("read OCI configuration: a zero byte in {0}")]
    Zero(&'static str),
    /// Something that cannot be done in the guest.
    #[error("read OCI configuration: {0}")]
    Unsupported(&'static str),
}

/// The last steps between libcontainer and the program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Execute {
    /// What the process keeps.
    pub capabilities: LinuxCapabilities,
    /// Its filter.
    pub seccomp: Option<LinuxSeccomp>,
    /// Working directory.
    pub cwd: PathBuf,
    /// The working directory is made where it is missing: only a container's main process may ask for that.
    pub make_cwd: bool,
    /// Path of a user namespace that has still to be joined: libcontainer 0.7 leaves it out for execs (its tenant builder,
    /// `NAMESPACE_TYPES`).
    pub users: Option<PathBuf>,
    /// Descriptors 0 to 2 are a terminal, which gets this size (rows, columns) and this owner.
    pub terminal: Option<Terminal>,
}

/// A process's terminal.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Terminal {
    /// Rows and columns, where they are known.
    pub size: Option<(u16, u16)>,
    /// The user it belongs to.
    pub uid: u32,
}

/// What an exec takes from its container where its own process says nothing, and the filter, which is the container's.
#[derive(Clone, Debug)]
pub struct Defaults {
    capabilities: LinuxCapabilities,
    seccomp: Option<LinuxSeccomp>,
    users: Option<PathBuf>,
    oom_score_adj: Option<i32>,
    rlimits: Option<Vec<oci_spec::runtime::PosixRlimit>>,
}

/// A container's configuration, taken apart.
#[derive(Debug)]
pub struct Plan {
    /// For libcontainer.
    pub spec: Spec,
    /// For the executor.
    pub execute: Execute,
    /// For the cgroup.
    pub resources: Option<LinuxResources>,
    /// For the guest as a whole, because the container does not have the namespace to itself.
    pub sysctls: Vec<(String, String)>,
    /// Path of the cgroup.
    pub cgroup: PathBuf,
    /// User and group of the main process.
    pub owner: (u32, u32),
    /// For execs.
    pub defaults: Defaults,
}

/// An exec's process, taken apart.
#[derive(Debug)]
pub struct ExecPlan {
    /// For libcontainer.
    pub process: Process,
    /// For the executor.
    pub execute: Execute,
    /// User and group.
    pub owner: (u32, u32),
}

/// Namespaces of the pod that a container joins, and what it takes from the pod otherwise.
#[derive(Debug, Default)]
pub struct Joined {
    /// Host name of a container that has a UTS namespace of its own and no name for it.
    pub hostname: String,
    /// A process whose PID namespace it joins, instead of one of its own.
    pub pids: Option<u32>,
    /// Path of its user namespace.
    pub users: Option<PathBuf>,
}

/// Takes the configuration of container `id` apart.
///
/// # Errors
/// [`SpecError`]
pub fn plan(spec: serde_json::Value, id: &str, terminal: bool, joined: &Joined) -> Result<Plan, SpecError> {
    let mut spec: Spec = serde_json::from_value(spec).map_err(SpecError::Json)?;
    let mut process = spec.process().clone().ok_or(SpecError::Missing("process"))?;
    let mut linux = spec.linux().clone().ok_or(SpecError::Missing("linux"))?;
    let mut root = spec.root().clone().ok_or(SpecError::Missing("root"))?;

    let defaults = Defaults {
        capabilities: whole(process.capabilities().as_ref()),
        seccomp: linux.seccomp().clone(),
        users: joined.users.clone(),
        oom_score_adj: process.oom_score_adj(),
        rlimits: process.rlimits().clone(),
    };
    if defaults.seccomp.as_ref().is_some_and(|seccomp| seccomp.listener_path().is_some()) {
        return Err(SpecError::Unsupported("a seccomp listener lives on the host"));
    }
    let (execute, owner) = take_apart(&mut process, &defaults, terminal, true)?;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    if let Some(pid) = joined.pids {
        let own = namespaces.iter_mut().find(|namespace| namespace.typ() == LinuxNamespaceType::Pid);
        own.ok_or(SpecError::Missing("pid namespace"))?.set_path(Some(format!("/proc/{pid}/ns/pid").into()));
    }
    if let Some(path) = &joined.users {
        let mut users = LinuxNamespace::default();
        users.set_typ(LinuxNamespaceType::User).set_path(Some(path.clone()));
        namespaces.push(users);
    }
    linux.set_namespaces(Some(namespaces.clone()));
    // A namespace that is joined is somebody else's, or the guest's own.
    let has = |typ| namespaces.iter().any(|namespace| namespace.typ() == typ && namespace.path().is_none());
    if !has(LinuxNamespaceType::Mount) {
        return Err(SpecError::Missing("mount namespace"));
    }

    if joined.users.is_some() {
        let mounts = spec.mounts().iter().flatten().cloned();
        spec.set_mounts(Some(mounts.map(|mount| for_users(mount, has(LinuxNamespaceType::Ipc))).collect()));
    }

    let resources = linux.resources().clone();
    let asked = linux.cgroups_path().clone().unwrap_or_else(|| Path::new("/").join(id));
    // Below that of all containers; libcontainer is told the same.
    let cgroup = Path::new("/").join(cgroup::POD_NAME).join(asked.strip_prefix("/").unwrap_or(&asked));
    let (own, sysctls) = share_out(linux.sysctl().clone().unwrap_or_default(), has);
    linux.set_seccomp(None);
    linux.set_resources(None);
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    linux.set_cgroups_path(Some(cgroup.clone()));
    linux.set_sysctl(Some(own));
    if !has(LinuxNamespaceType::Uts) {
        // The name is the guest's.
        spec.set_hostname(None);
        spec.set_domainname(None);
    } else if spec.hostname().is_none() && !joined.hostname.is_empty() {
        // And not what another container may have made of the guest's name meanwhile.
        spec.set_hostname(Some(joined.hostname.clone()));
    }
    root.set_path(rootfs_path(id));
    spec.set_root(Some(root));
    // Hooks are programs of the host's.
    spec.set_hooks(None);
    spec.set_process(Some(process));
    spec.set_linux(Some(linux));
    Ok(Plan { spec, execute, resources, sysctls, cgroup, owner, defaults })
}

/// What a process in a user namespace mounts instead. A sysfs shows network namespaces and an mqueue shows IPC objects, of
/// those who own them; the guest's own are bound. What a mount of the guest's forbids, its copies there cannot allow.
fn for_users(mut mount: Mount, own_ipc: bool) -> Mount {
    let kind = mount.typ().clone().unwrap_or_default();
    let mut options = mount.options().clone().unwrap_or_default();
    let source = match kind.as_str() {
        "sysfs" => "/sys",
        "mqueue" if !own_ipc => "/dev/mqueue",
        "bind" => {
            options.extend(["nosuid".to_owned(), "nodev".to_owned()]);
            mount.set_options(Some(options));
            return mount;
        }
        _ => return mount,
    };
    // With what is mounted below: parts of a locked tree cannot be had.
    options.push("rbind".to_owned());
    if let Some(read_only) = options.iter_mut().find(|option| *option == "ro") {
        *read_only = "rro".to_owned();
    }
    mount.set_typ(Some("bind".to_owned())).set_source(Some(source.into())).set_options(Some(options));
    mount
}

/// Takes an exec's process apart.
///
/// # Errors
/// [`SpecError`]
pub fn plan_exec(json: &[u8], defaults: &Defaults, terminal: bool) -> Result<ExecPlan, SpecError> {
    let mut process: Process = serde_json::from_slice(json).map_err(SpecError::Json)?;
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(defaults.oom_score_adj);
    }
    if process.rlimits().as_ref().is_none_or(Vec::is_empty) {
        process.set_rlimits(defaults.rlimits.clone());
    }
    let (mut execute, owner) = take_apart(&mut process, defaults, terminal, false)?;
    execute.users.clone_from(&defaults.users);
    Ok(ExecPlan { process, execute, owner })
}

fn take_apart(
    process: &mut Process,
    defaults: &Defaults,
    terminal: bool,
    make_cwd: bool,
) -> Result<(Execute, (u32, u32)), SpecError> {
    let args = process.args().as_ref().filter(|args| args.first().is_some_and(|name| !name.is_empty()));
    let args = args.ok_or(SpecError::Missing("process.args"))?;
    if args.iter().any(|arg| arg.contains('\0')) {
        return Err(SpecError::Zero("process.args"));
    }
    let mut env = process.env().clone().unwrap_or_default();
    if env.iter().any(|variable| variable.contains('\0')) {
        return Err(SpecError::Zero("process.env"));
    }
    if !env.iter().any(|variable| variable.starts_with("PATH=")) {
        env.push(DEFAULT_PATH.to_owned());
    }
    let owner = (process.user().uid(), process.user().gid());
    let size = process.console_size().as_ref().map(|size| {
        let cells = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
        (cells(size.height()), cells(size.width()))
    });
    let execute = Execute {
        capabilities: process.capabilities().as_ref().map_or_else(|| defaults.capabilities.clone(), |c| whole(Some(c))),
        seccomp: defaults.seccomp.clone(),
        cwd: if process.cwd().as_os_str().is_empty() { "/".into() } else { process.cwd().clone() },
        make_cwd,
        users: None,
        terminal: terminal.then_some(Terminal { size, uid: owner.0 }),
    };
    process.set_env(Some(env));
    process.set_cwd("/".into());
    process.set_terminal(Some(terminal));
    // None said is none dropped.
    process.set_capabilities(None);
    // The guest kernel has no such module; a label of the host's means nothing in it.
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    Ok((execute, owner))
}

/// All five sets said: where one is missing it is empty, as the OCI specification has it.
fn whole(capabilities: Option<&LinuxCapabilities>) -> LinuxCapabilities {
    let mut sets = capabilities.cloned().unwrap_or_else(none);
    let none = none();
    sets.set_bounding(sets.bounding().clone().or(none.bounding().clone()));
    sets.set_effective(sets.effective().clone().or(none.effective().clone()));
    sets.set_permitted(sets.permitted().clone().or(none.permitted().clone()));
    sets.set_inheritable(sets.inheritable().clone().or(none.inheritable().clone()));
    sets.set_ambient(sets.ambient().clone().or(none.ambient().clone()));
    sets
}

/// The default of the type is not empty.
fn none() -> LinuxCapabilities {
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(Capabilities::new()));
    sets.set_effective(Some(Capabilities::new()));
    sets.set_permitted(Some(Capabilities::new()));
    sets.set_inheritable(Some(Capabilities::new()));
    sets.set_ambient(Some(Capabilities::new()));
    sets
}

/// Sysctls of namespaces that the container has to itself, and those of namespaces that it shares with the guest.
fn share_out(
    sysctls: HashMap<String, String>,
    has: impl Fn(LinuxNamespaceType) -> bool,
) -> (HashMap<String, String>, Vec<(String, String)>) {
    let own = |name: &str| {
        let name = name.replace('/', ".");
        let ipc = ["kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue."].iter().any(|p| name.starts_with(p));
        if ipc {
            has(LinuxNamespaceType::Ipc)
        } else {
            // Everything that no namespace holds is left to libcontainer, which refuses it.
            !name.starts_with("net.") || has(LinuxNamespaceType::Network)
        }
    };
    let (own, mut shared): (HashMap<_, _>, Vec<_>) = {
        let (own, shared): (Vec<_>, Vec<_>) = sysctls.into_iter().partition(|(name, _)| own(name));
        (own.into_iter().collect(), shared)
    };
    shared.sort();
    (own, shared)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec() -> serde_json::Value {
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs", "readonly": true},
            "hostname": "pod",
            "hooks": {"prestart": [{"path": "/host/hook"}]},
            "process": {
                "user": {"uid": 7, "gid": 8},
                "args": ["sh"], "cwd": "/work", "noNewPrivileges": false,
                "apparmorProfile": "cri", "oomScoreAdj": 5,
                "consoleSize": {"height": 24, "width": 80},
                "capabilities": {"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"]}
            },
            "linux": {
                "cgroupsPath": "/c1",
                "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}],
                "sysctl": {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"},
                "resources": {"pids": {"limit": 3}},
                "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}
            }
        })
    }

    #[test]
    fn the_last_steps_are_the_executors() {
        let plan = plan(spec(), "c1", true, &Joined::default()).expect("plan");
        let process = plan.spec.process().as_ref().expect("process");
        let linux = plan.spec.linux().as_ref().expect("linux");
        assert!(linux.seccomp().is_none() && linux.resources().is_none() && plan.spec.hooks().is_none());
        assert!(plan.spec.hostname().is_none(), "no UTS namespace of its own");
        let mut named = self::spec();
        named["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}]);
        let joined = Joined { hostname: "guest".into(), ..Joined::default() };
        let hostname = |spec| self::plan(spec, "c1", true, &joined).expect("plan").spec.hostname().clone();
        assert_eq!(hostname(named.clone()).as_deref(), Some("pod"));
        named["hostname"] = serde_json::Value::Null;
        assert_eq!(hostname(named).as_deref(), Some("guest"));
        assert_eq!(process.cwd(), Path::new("/"));
        assert_eq!(process.no_new_privileges(), None);
        assert!(process.apparmor_profile().is_none());
        assert_eq!(
            plan.spec.root().as_ref().map(|r| (r.path().clone(), r.readonly())),
            Some((rootfs_path("c1"), Some(true)))
        );
        assert_eq!(plan.execute.cwd, Path::new("/work"));
        assert!(plan.execute.seccomp.is_some() && plan.execute.make_cwd);
        assert_eq!(plan.execute.terminal.and_then(|t| t.size), Some((24, 80)));
        assert_eq!(plan.execute.capabilities.ambient(), &Some(Capabilities::new()));
        assert_eq!(plan.execute.capabilities.bounding().as_ref().map(|set| set.len()), Some(1));
        assert_eq!(plan.owner, (7, 8));
        assert_eq!(
            (plan.cgroup.as_path(), linux.cgroups_path().as_deref()),
            (Path::new("/pod/c1"), Some(Path::new("/pod/c1")))
        );
        assert!(process.env().as_ref().is_some_and(|env| env.iter().any(|v| v.starts_with("PATH="))));
    }

    #[test]
    fn sysctls_go_where_their_namespace_is() {
        let plan = plan(spec(), "c1", false, &Joined::default()).expect("plan");
        assert_eq!(plan.sysctls, [("net.ipv4.ip_forward".to_owned(), "1".to_owned())]);
        let own = plan.spec.linux().as_ref().and_then(|l| l.sysctl().clone()).expect("sysctls");
        assert_eq!(own.len(), 1);
    }

    #[test]
    fn a_user_namespace_is_joined() {
        let mut spec = spec();
        spec["mounts"] = json!([
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue" },
            { "destination": "/data", "type": "bind", "source": "/v", "options": ["rbind", "rw"] },
            { "destination": "/proc", "type": "proc", "source": "proc" },
        ]);
        let joined = Joined { users: Some("/proc/1/fd/9".into()), ..Joined::default() };
        let plan = plan(spec, "c1", false, &joined).expect("plan");
        let namespaces = plan.spec.linux().as_ref().and_then(|l| l.namespaces().clone()).expect("namespaces");
        let users = namespaces.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::User).expect("user");
        assert_eq!(users.path().as_deref(), Some(Path::new("/proc/1/fd/9")));
        let mounts = plan.spec.mounts().clone().expect("mounts");
        let of = |number: usize| {
            let mount: &Mount = &mounts[number];
            (mount.typ().clone().unwrap_or_default(), mount.options().clone().unwrap_or_default().join(","))
        };
        assert_eq!(of(0), ("bind".into(), "nosuid,rro,rbind".into()));
        assert_eq!(of(1), ("mqueue".into(), String::new()), "it has IPC of its own");
        assert_eq!(of(2), ("bind".into(), "rbind,rw,nosuid,nodev".into()));
        assert_eq!(of(3), ("proc".into(), String::new()));
        assert_eq!(plan.execute.users, None, "libcontainer joins it");
        let exec = plan_exec(br#"{"args":["id"],"cwd":"/","user":{"uid":0,"gid":0}}"#, &plan.defaults, false);
        assert_eq!(exec.expect("exec").execute.users, joined.users);
    }

    #[test]
    fn an_exec_inherits_what_it_does_not_say() {
        let defaults = plan(spec(), "c1", false, &Joined::default()).expect("plan").defaults;
        let exec = plan_exec(br#"{"args":["id"],"cwd":"/","user":{"uid":0,"gid":0}}"#, &defaults, false).expect("exec");
        assert_eq!(exec.process.oom_score_adj(), Some(5));
        assert_eq!(exec.execute.capabilities.bounding().as_ref().map(|set| set.len()), Some(1));
        assert!(exec.execute.seccomp.is_some(), "the filter is the container's");
        assert!(!exec.execute.make_cwd);
        assert_eq!(exec.owner, (0, 0));
    }

    #[test]
    fn refuses_what_cannot_run() {
        let without = |pointer: &str| {
            let mut spec = spec();
            *spec.pointer_mut(pointer).expect("part") = serde_json::Value::Null;
            plan(spec, "c1", false, &Joined::default())
        };
        assert!(matches!(without("/process"), Err(SpecError::Missing("process"))));
        assert!(matches!(without("/process/args"), Err(SpecError::Missing("process.args"))));
        assert!(without("/linux").is_err());
        assert!(plan(json!({"ociVersion": 3}), "c1", false, &Joined::default()).is_err());
        let mut zero = spec();
        zero["process"]["args"] = json!(["a\0b"]);
        assert!(matches!(plan(zero, "c1", false, &Joined::default()), Err(SpecError::Zero(_))));
    }
}
