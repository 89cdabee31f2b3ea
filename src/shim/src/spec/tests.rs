//! The translation of OCI configurations, by table.

use super::*;

fn host() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": true, "consoleSize": { "height": 24, "width": 80 },
            "user": { "uid": 1000, "gid": 1000, "additionalGids": [4], "umask": 18 },
            "args": ["sh", "-c", "true"], "env": ["PATH=/bin"], "cwd": "/home",
            "capabilities": { "bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"] },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true, "apparmorProfile": "docker-default", "selinuxLabel": "x", "oomScoreAdj": -5
        },
        "root": { "path": "/host/path/rootfs", "readonly": true },
        "hostname": "h", "domainname": "d",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup2", "source": "cgroup", "options": ["ro"] },
            { "destination": "/data", "type": "bind", "source": "/host/data", "options": ["rbind", "rw", "suid", "dev"] },
            { "destination": "/etc/hosts", "type": "none", "source": "/host/hosts", "options": ["bind", "ro"] }
        ],
        "hooks": { "prestart": [{ "path": "/host/hook" }] },
        "annotations": { "secret": "of the host" },
        "linux": {
            "namespaces": [{ "type": "pid" }, { "type": "network", "path": "/run/netns/x" }, { "type": "mount" }],
            "cgroupsPath": "/kubepods/pod1/c1", "sysctl": { "net.ipv4.ip_forward": "1" },
            "resources": {
                "memory": { "limit": 1048576 }, "cpu": { "quota": 50000, "period": 100000 }, "pids": { "limit": 10 },
                "devices": [{ "allow": false, "access": "rwm" }], "blockIO": { "weight": 10 }
            },
            "devices": [
                { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 0, "gid": 0 },
                { "path": "/dev/vda", "type": "b", "major": 254, "minor": 0 }
            ],
            "seccomp": { "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ALLOW" }] },
            "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"], "mountLabel": "x",
            "intelRdt": { "closID": "x" }
        }
    })
}

fn id() -> ContainerId {
    ContainerId::new("c1").expect("id")
}

fn run(json: Value, pod: Option<&SandboxId>) -> Result<Translation, SpecError> {
    translate(&serde_json::from_value(json).expect("spec"), &id(), pod)
}

#[test]
fn golden() {
    let translation = run(host(), None).expect("translate");
    let expected = json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": true, "consoleSize": { "height": 24, "width": 80 },
            "user": { "uid": 1000, "gid": 1000, "additionalGids": [4], "umask": 18 },
            "args": ["sh", "-c", "true"], "env": ["PATH=/bin"], "cwd": "/home",
            "capabilities": { "bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"] },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true, "oomScoreAdj": -5
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "h", "domainname": "d",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] },
            { "destination": "/data", "type": "bind", "source": "/run/nacelle/volumes/c1-0", "options": ["rbind", "rw"] },
            { "destination": "/etc/hosts", "type": "bind", "source": "/run/nacelle/volumes/c1-1", "options": ["bind", "ro"] }
        ],
        "linux": {
            "namespaces": [{ "type": "pid" }, { "type": "mount" }],
            "cgroupsPath": "/c1", "sysctl": { "net.ipv4.ip_forward": "1" },
            "resources": {
                "memory": { "limit": 1048576 }, "cpu": { "quota": 50000, "period": 100000 }, "pids": { "limit": 10 },
                "devices": [{ "allow": false, "access": "rwm" }]
            },
            "devices": [
                { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 0, "gid": 0 }
            ],
            "seccomp": { "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ALLOW" }] },
            "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"]
        }
    });
    assert_eq!(translation.spec, expected);
    let volume = |n: usize, source: &str, destination: &str, recursive, read_only| Volume {
        name: format!("c1-{n}"),
        source: source.into(),
        destination: destination.into(),
        recursive,
        read_only,
        follows: false,
    };
    let volumes = [volume(0, "/host/data", "/data", true, false), volume(1, "/host/hosts", "/etc/hosts", false, true)];
    assert_eq!(translation.volumes, volumes);
    assert_eq!(translation.dropped.len(), 8, "{:?}", translation.dropped);
    assert!(!translation.spec.to_string().contains("/host/"), "no path of the host's");
}

#[test]
fn refusals() {
    let refused = |pointer: &str, value: Value| {
        let mut json = host();
        *json.pointer_mut(pointer).expect("pointer") = value;
        run(json, None).expect_err("refused").to_string()
    };
    let mount = |kind: &str| json!({ "destination": "/x", "type": kind, "source": "s" });
    assert_eq!(refused("/mounts/0", mount("nfs")), "mount /x: type \"nfs\" is not supported");
    assert_eq!(refused("/mounts/0", json!({ "destination": "/x", "type": "bind" })), "mount /x: it has no source");
    let idmapped = json!({ "destination": "/x", "type": "bind", "source": "/y", "options": ["idmap"] });
    assert!(refused("/mounts/0", idmapped).contains("ids are mapped"));
    assert!(refused("/linux/namespaces/0", json!({ "type": "time" })).contains("time namespace"));
}

#[test]
fn less_confinement_is_refused() {
    let mut json = host();
    json["linux"]["uidMappings"] = json!([{ "containerID": 0, "hostID": 100000, "size": 65536 }]);
    assert_eq!(run(json, None).expect_err("refused"), SpecError::Users, "groups are missing");
    let mut json = host();
    json["linux"]["seccomp"]["listenerPath"] = json!("/run/listener");
    assert_eq!(run(json, None).expect_err("refused"), SpecError::Unsupported("a seccomp listener"));
}

#[test]
fn a_pod_shares_the_guests_namespaces() {
    let pod = SandboxId::new("pod1").expect("id");
    let mut json = host();
    json["linux"]["namespaces"] = json!([
        { "type": "ipc", "path": "/proc/4321/ns/ipc" }, { "type": "uts", "path": "/proc/4321/ns/uts" },
        { "type": "pid" }, { "type": "mount" },
    ]);
    let translation = run(json.clone(), Some(&pod)).expect("translate");
    assert_eq!(translation.spec["linux"]["namespaces"], json!([{ "type": "pid" }, { "type": "mount" }]));
    assert!(!translation.pod_pids);
    assert!(matches!(run(json.clone(), None), Err(SpecError::Namespace(_))), "a container that is alone");
    json["linux"]["namespaces"][2] = json!({ "type": "pid", "path": "/proc/4321/ns/pid" });
    let translation = run(json.clone(), Some(&pod)).expect("translate");
    assert!(translation.pod_pids && translation.spec["linux"]["namespaces"][0] == json!({ "type": "pid" }));
    let mut nameless = json.clone();
    nameless["linux"]["namespaces"] = json!([{ "type": "mount" }]);
    let translation = run(nameless.clone(), Some(&pod)).expect("translate");
    assert_eq!(translation.spec["linux"]["namespaces"], json!([{ "type": "mount" }, { "type": "uts" }]));
    let alone = run(nameless, None).expect("translate");
    assert_eq!(alone.spec["linux"]["namespaces"], json!([{ "type": "mount" }]), "the guest is its own");
    json["linux"]["namespaces"][3] = json!({ "type": "mount", "path": "/proc/1/ns/mnt" });
    assert!(matches!(run(json, Some(&pod)), Err(SpecError::Namespace(_))), "nobody shares mounts");
}

#[test]
fn a_pods_shared_memory_is_the_guests() {
    let pod = SandboxId::new("pod1").expect("id");
    let shm = |source: &str| {
        let mut json = host();
        json["mounts"] = json!([{ "destination": "/dev/shm", "type": "bind", "source": source, "options": ["rbind"] }]);
        json["linux"]["namespaces"] = json!([{ "type": "ipc", "path": "/proc/4321/ns/ipc" }, { "type": "mount" }]);
        run(json, Some(&pod)).expect("translate")
    };
    let shared = shm("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/pod1/shm");
    assert_eq!(shared.spec["mounts"][0]["source"], "/dev/shm");
    assert!(shared.volumes.is_empty());
    let volume = shm("/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/shm");
    assert_eq!(volume.volumes.len(), 1, "a volume that has the name");
}

#[test]
fn the_pods_files_fill_gaps() {
    let etc = tempfile::tempdir().expect("directory");
    for name in ["hosts", "resolv.conf"] {
        std::fs::write(etc.path().join(name), "text").expect("write");
    }
    let mut json = host();
    json["mounts"] = json!([{ "destination": "/etc/hosts", "type": "bind", "source": "/mine", "options": ["rbind"] }]);
    let mut translation = run(json, None).expect("translation");
    translation.add_pods_files(&ContainerId::new("c1").expect("id"), etc.path());
    let [mine, added] = translation.volumes.as_slice() else { panic!("{:?}", translation.volumes) };
    assert_eq!(mine.source, Path::new("/mine"));
    assert_eq!(
        (&added.source, added.destination.as_path()),
        (&etc.path().join("resolv.conf"), Path::new("/etc/resolv.conf"))
    );
    assert_eq!(translation.spec["mounts"][1]["source"], format!("{VOLUMES_DIR}/{}", added.name));
}

#[test]
fn user_namespaces_are_one_range() {
    let map =
        |container: u32, host: u32, size: u32| json!([{ "containerID": container, "hostID": host, "size": size }]);
    let spec = |maps: Value, groups: Value| {
        let mut json = host();
        json["linux"]["namespaces"] = json!([{ "type": "user", "path": "/proc/7/ns/user" }, { "type": "mount" }]);
        json["linux"]["uidMappings"] = maps.clone();
        json["linux"]["gidMappings"] = groups;
        json["mounts"] = json!([
            { "destination": "/a", "type": "bind", "source": "/a", "options": ["rbind", "idmap"], "uidMappings": maps,
              "gidMappings": maps },
            { "destination": "/b", "type": "bind", "source": "/b", "options": ["rbind"] },
        ]);
        json
    };
    let pod = SandboxId::new("pod").expect("id");
    let good = spec(map(0, 65_536, 65_536), map(0, 65_536, 65_536));
    let translation = run(good.clone(), Some(&pod)).expect("translate");
    assert_eq!(translation.users, Some(Users { first: 65_536, count: 65_536 }));
    let namespaces = &translation.spec["linux"]["namespaces"];
    assert_eq!(*namespaces, json!([{ "type": "mount" }, { "type": "uts" }]), "the agent joins it");
    assert_eq!(translation.spec["mounts"][0]["options"], json!(["rbind"]));
    let mapped: Vec<_> = translation.volumes.iter().map(|volume| Volume::is_mapped(&volume.name)).collect();
    assert_eq!(mapped, [true, false]);
    assert!(matches!(run(good, None), Err(SpecError::Unsupported(_))), "a container that is alone");

    for bad in [map(1, 65_536, 65_536), map(0, 0, 65_536), map(0, 65_536, 0), map(0, u32::MAX, 2)] {
        assert_eq!(run(spec(bad.clone(), bad.clone()), Some(&pod)).expect_err("refused"), SpecError::Users, "{bad}");
    }
    let unlike = spec(map(0, 65_536, 65_536), map(0, 65_537, 65_536));
    assert_eq!(run(unlike, Some(&pod)).expect_err("refused"), SpecError::Users);
    let mut other = spec(map(0, 65_536, 65_536), map(0, 65_536, 65_536));
    other["mounts"][0]["uidMappings"] = map(0, 1000, 65_536);
    assert_eq!(run(other, Some(&pod)).expect_err("refused"), SpecError::MountIds("/a".into()));
}
