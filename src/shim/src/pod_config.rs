//! A pod's configuration, as the Sandbox API hands it over → what a bundle would say of its sandbox. All that it looks at
//! beside are the node's own resolv.conf and hosts.
//!
//! With that everything behind it is the same whichever way a pod comes.

use std::collections::HashMap;

use nacelle_protocol::cri::{DNSConfig, IDMapping, NamespaceMode, PodSandboxConfig};
use nacelle_protocol::ids::ContainerId;
use serde_json::{Value, json};

use crate::bundle::{CONTAINER_TYPE, SANDBOX_CPU_PERIOD, SANDBOX_CPU_QUOTA, SANDBOX_MEMORY};
use crate::task::SandboxConfig;

/// Makes the configuration of sandbox `id`. `netns` is the path of its network namespace; empty: it has none yet.
pub fn translate(
    id: &ContainerId,
    config: &PodSandboxConfig,
    netns: &str,
    annotations: HashMap<String, String>,
) -> SandboxConfig {
    let linux = config.linux.as_ref();
    let options = linux.and_then(|l| l.security_context.as_ref()).and_then(|s| s.namespace_options.as_ref());
    let is_hosts = |mode: Option<NamespaceMode>| mode == Some(NamespaceMode::NODE);
    let mut namespaces = vec![json!({ "type": "uts" }), json!({ "type": "mount" })];
    if !is_hosts(options.map(|o| o.network.enum_value_or_default())) {
        let path = (!netns.is_empty()).then_some(netns);
        namespaces.push(path.map_or(json!({ "type": "network" }), |path| json!({ "type": "network", "path": path })));
    }
    if !is_hosts(options.map(|o| o.ipc.enum_value_or_default())) {
        namespaces.push(json!({ "type": "ipc" }));
    }
    let users = options
        .and_then(|o| o.userns_options.as_ref())
        .filter(|users| !is_hosts(Some(users.mode.enum_value_or_default())));
    if users.is_some() {
        namespaces.push(json!({ "type": "user" }));
    }
    let mut annotations = annotations;
    annotations.extend(config.annotations.clone());
    // Last, so that nobody but containerd says it.
    annotations.insert(CONTAINER_TYPE.into(), "sandbox".into());
    let resources = linux.and_then(|linux| linux.resources.as_ref());
    let limits = resources.map(|r| {
        [
            (SANDBOX_MEMORY, r.memory_limit_in_bytes),
            (SANDBOX_CPU_QUOTA, r.cpu_quota),
            (SANDBOX_CPU_PERIOD, r.cpu_period),
        ]
    });
    for (key, value) in limits.into_iter().flatten() {
        match value {
            ..=0 => drop(annotations.remove(key)),
            _ => drop(annotations.insert(key.into(), value.to_string())),
        }
    }
    let mut spec = json!({
        "ociVersion": "1.1.0",
        // Nothing is ever executed: a sandbox has no process.
        "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": ["/pause"] },
        "root": { "path": "rootfs", "readonly": true },
        "linux": { "namespaces": namespaces, "sysctl": linux.map(|l| l.sysctls.clone()).unwrap_or_default() },
        "annotations": annotations,
    });
    if let Some(users) = users {
        spec["linux"]["uidMappings"] = id_maps(&users.uids);
        spec["linux"]["gidMappings"] = id_maps(&users.gids);
    }
    if !config.hostname.is_empty() {
        spec["hostname"] = config.hostname.clone().into();
    }
    if let Some(path) = linux.and_then(|linux| cgroup(&linux.cgroup_parent, id)) {
        spec["linux"]["cgroupsPath"] = path;
    }
    SandboxConfig { config: spec.to_string().into_bytes(), files: files(&config.hostname, config.dns_config.as_ref()) }
}

fn id_maps(maps: &[IDMapping]) -> Value {
    let map = |map: &IDMapping| json!({ "containerID": map.container_id, "hostID": map.host_id, "size": map.length });
    maps.iter().map(map).collect()
}

/// As containerd names the cgroup of a container below that of its pod: in systemd's way below a slice.
fn cgroup(parent: &str, id: &ContainerId) -> Option<Value> {
    match parent {
        "" => None,
        slice if slice.ends_with(".slice") => {
            let slice = slice.rsplit('/').next().unwrap_or(slice);
            Some(format!("{slice}:nacelle:{id}").into())
        }
        path => Some(format!("{}/{id}", path.trim_end_matches('/')).into()),
    }
}

/// Lines of resolv.conf(5) cannot be smuggled in by a name with a line end.
fn words(words: &[String]) -> String {
    words.iter().filter(|word| !word.contains(char::is_whitespace)).cloned().collect::<Vec<_>>().join(" ")
}

fn files(hostname: &str, dns: Option<&DNSConfig>) -> Vec<(&'static str, String)> {
    let mut resolv = String::new();
    if let Some(dns) = dns {
        let search = words(&dns.searches);
        if !search.is_empty() {
            resolv += &format!("search {search}\n");
        }
        for server in dns.servers.iter().filter(|server| !server.contains(char::is_whitespace)) {
            resolv += &format!("nameserver {server}\n");
        }
        let options = words(&dns.options);
        if !options.is_empty() {
            resolv += &format!("options {options}\n");
        }
    } else {
        // As for a pod that says nothing: the node's.
        resolv = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    }
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_else(|_| "127.0.0.1 localhost\n".into());
    vec![("hostname", format!("{hostname}\n")), ("hosts", hosts), ("resolv.conf", resolv)]
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use nacelle_protocol::agent::Users;
    use nacelle_protocol::cri::{LinuxContainerResources, LinuxPodSandboxConfig, NamespaceOption};
    use nacelle_protocol::cri::{LinuxSandboxSecurityContext, UserNamespace};
    use nacelle_protocol::vm::Network;
    use protobuf::MessageField;

    use super::*;
    use crate::bundle::{Bundle, BundleError, Role};

    fn bundle(config: &PodSandboxConfig, netns: &str) -> Result<Bundle, BundleError> {
        let id = ContainerId::new("pod1").expect("id");
        let sandbox = translate(&id, config, netns, HashMap::new());
        Bundle::parse(Path::new("/b"), &sandbox.config)
    }

    fn config() -> PodSandboxConfig {
        let resources = LinuxContainerResources { memory_limit_in_bytes: 1 << 30, cpu_quota: -1, ..Default::default() };
        let linux = LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/pod1".into(),
            sysctls: HashMap::from([("kernel.shm_rmid_forced".to_owned(), "1".to_owned())]),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        PodSandboxConfig { hostname: "web-0".into(), linux: MessageField::some(linux), ..Default::default() }
    }

    #[test]
    fn a_pod_is_what_a_bundle_would_say() {
        let bundle = bundle(&config(), "/run/netns/x").expect("bundle");
        assert_eq!(bundle.role, Role::Sandbox);
        assert_eq!(bundle.network, Network::Join("/run/netns/x".into()));
        assert_eq!((bundle.pod.memory, bundle.pod.cpu_quota), (Some(1 << 30), None));
        assert_eq!(bundle.cgroups_path(), Some(Path::new("/kubepods/pod1/pod1")));
        assert_eq!(bundle.spec.hostname().as_deref(), Some("web-0"));
        assert_eq!(bundle.sysctls().len(), 1);
    }

    #[test]
    fn a_pod_with_a_user_namespace() {
        let map = IDMapping { host_id: 131_072, container_id: 0, length: 65_536, ..Default::default() };
        let users = UserNamespace { uids: vec![map.clone()], gids: vec![map], ..Default::default() };
        let options = NamespaceOption { userns_options: MessageField::some(users), ..Default::default() };
        let context =
            LinuxSandboxSecurityContext { namespace_options: MessageField::some(options), ..Default::default() };
        let linux = LinuxPodSandboxConfig { security_context: MessageField::some(context), ..Default::default() };
        let config = PodSandboxConfig { linux: MessageField::some(linux), ..Default::default() };
        let bundle = bundle(&config, "").expect("bundle");
        let users = crate::spec::users(bundle.spec.linux().as_ref().expect("linux")).expect("users");
        assert_eq!(users, Some(Users { first: 131_072, count: 65_536 }));
    }

    #[test]
    fn a_pod_without_a_word() {
        let bundle = bundle(&PodSandboxConfig::default(), "").expect("bundle");
        assert_eq!((bundle.network, bundle.role), (Network::New, Role::Sandbox));
    }

    #[test]
    fn the_hosts_namespaces_are_refused() {
        let with = |network: NamespaceMode, ipc: NamespaceMode| {
            let options = NamespaceOption { network: network.into(), ipc: ipc.into(), ..Default::default() };
            let context =
                LinuxSandboxSecurityContext { namespace_options: MessageField::some(options), ..Default::default() };
            let mut config = config();
            config.linux.as_mut().expect("linux").security_context = MessageField::some(context);
            bundle(&config, "")
        };
        assert!(matches!(with(NamespaceMode::NODE, NamespaceMode::POD), Err(BundleError::HostNetwork)));
        assert!(matches!(with(NamespaceMode::POD, NamespaceMode::NODE), Err(BundleError::HostIpc)));
    }

    #[test]
    fn names_of_servers() {
        let dns = DNSConfig {
            servers: vec!["10.0.0.10".into(), "x\nnameserver 6.6.6.6".into()],
            searches: vec!["a.b".into(), "c".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        };
        let files = files("h", Some(&dns));
        assert_eq!(files[2], ("resolv.conf", "search a.b c\nnameserver 10.0.0.10\noptions ndots:5\n".into()));
    }

    #[test]
    fn cgroups_in_both_styles() {
        let id = ContainerId::new("c1").expect("id");
        assert_eq!(cgroup("", &id), None);
        let slice = "/kubepods.slice/kubepods-pod1.slice";
        assert_eq!(cgroup(slice, &id), Some("kubepods-pod1.slice:nacelle:c1".into()));
        assert_eq!(cgroup("/kubepods/pod1/", &id), Some("/kubepods/pod1/c1".into()));
    }
}
