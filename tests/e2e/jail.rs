//! The jail of a real VMM, as the host's kernel shows it, and what a guest can do with the volumes that it was given.
//! What each step of the jail is good for is tried in `src/vmm/tests/jail`.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use nacelle_tests::{
    command::Cmd,
    node::{BUSYBOX, Container, NAMESPACE, Node},
};
use serde_json::Value;

use crate::Case;

const NO_VMM: &str = "it has no VMM";

pub const CASES: &[Case] = &[
    Case::only_nacelle("what_the_vmm_is", what_the_vmm_is, NO_VMM),
    Case::only_nacelle("what_the_vmm_sees", what_the_vmm_sees, NO_VMM),
    Case::only_nacelle("limits_of_the_pod", limits_of_the_pod, "its limits are the container's"),
    Case::only_nacelle("volumes_have_the_hosts_ids", volumes_have_the_hosts_ids, NO_VMM),
    Case::only_nacelle("annotations", annotations, "it has others"),
    Case::only_nacelle("what_is_weaker_is_told", what_is_weaker_is_told, "its configuration is another"),
    Case::only_nacelle("the_node_is_in_order", the_node_is_in_order, "it has no doctor"),
];

/// First id of all pods', `jail.uid_base` of the configuration.
const UID_BASE: u32 = 1_879_048_192;

/// A line of `/proc/PID/status`.
fn status(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("read status");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in\n{text}")).trim().to_owned()
}

fn nacelle(args: &[&str]) -> Cmd {
    Cmd::new("nacelle").args(args)
}

/// What `nacelle jail print` says of a container's VMM.
fn printed(c: &Container<'_>) -> Value {
    let out = nacelle(&["jail", "print", "--json", c.id()]).ok();
    let all: Value = serde_json::from_slice(&out.out).expect("JSON");
    assert_eq!(all.as_array().map(Vec::len), Some(1), "{all}");
    all[0].clone()
}

fn what_the_vmm_is(node: &Node) {
    let c = node.detached(&[], BUSYBOX, &["sleep", "1000000"]);
    let pid = c.pid();
    assert_eq!(status(pid, "Seccomp"), "2");
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}, without volumes");
    }
    for name in ["Uid", "Gid"] {
        let ids: Vec<u32> = status(pid, name).split_whitespace().map(|id| id.parse().expect("an id")).collect();
        assert!(ids.iter().all(|id| *id == ids[0] && *id >= UID_BASE), "{name}: {ids:?}");
    }
    assert_eq!(status(pid, "Groups"), "");
    for namespace in ["mnt", "pid", "ipc", "uts", "cgroup", "user", "net"] {
        let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).expect("read namespace");
        assert_ne!(link(&pid.to_string()), link("self"), "{namespace}");
    }
    // PID 1 of a namespace of its own.
    assert!(status(pid, "NSpid").ends_with("\t1"), "{}", status(pid, "NSpid"));
    c.remove();

    // With a volume, root of its user namespace keeps what it takes to own files there, and nothing of the host's.
    let dir = node.path("volume");
    fs::create_dir_all(&dir).expect("make a directory");
    let mount = format!("type=bind,src={},dst=/volume,options=rbind:rw", dir.display());
    let c = node.detached(&["--mount", &mount], BUSYBOX, &["sleep", "1000000"]);
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID: capabilities(7).
    assert_eq!(status(c.pid(), "CapEff"), "00000000000000db");
    assert_eq!(status(c.pid(), "CapBnd"), "0000000000000000");
    let user = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).expect("read namespace");
    assert_ne!(user(&c.pid().to_string()), user("self"));
    c.remove();
}

fn what_the_vmm_sees(node: &Node) {
    let c = node.detached(&[], BUSYBOX, &["sleep", "1000000"]);
    let jail = printed(&c);
    assert_eq!(jail["vmm_pid"], c.pid());
    let mounts = jail["mounts"].as_array().expect("mounts");
    // What the guest shows is above the root, and none of the jail's.
    let (shown, mounts): (Vec<_>, Vec<_>) = mounts.iter().partition(|mount| mount["kind"] == "fuse");
    let inside = |mount: &&serde_json::Value| mount["inside"].as_str().expect("text").to_owned();
    assert_eq!(shown.iter().map(inside).collect::<Vec<_>>(), ["/"], "{jail}");
    assert!(shown[0]["options"].as_str().expect("text").contains("nosuid,nodev,noexec"), "{jail}");
    let mut inside: Vec<_> = mounts.iter().map(|mount| mount["inside"].as_str().expect("text")).collect();
    inside.sort_unstable();
    assert_eq!(
        inside,
        [
            "/",
            "/dev",
            "/disk/upper",
            "/kernel",
            "/proc",
            "/proc",
            "/root",
            "/share/layers",
            "/socket/1024",
            "/socket/1025"
        ],
        "the plan's entries, /proc once more in the root that is shown, and nothing else: {jail}"
    );
    for mount in mounts {
        let (inside, options) = (mount["inside"].as_str().expect("text"), mount["options"].as_str().expect("text"));
        let has = |option| options.split(',').any(|word| word == option);
        assert!(has("nosuid") && has("noexec"), "{mount}");
        // Only where its own three devices are.
        assert!(has("nodev") || inside == "/dev", "{mount}");
        // Connecting to a socket is a write to it.
        let writable = inside == "/disk/upper" || inside.starts_with("/socket/");
        assert_eq!(has("rw"), writable, "{mount}");
    }
    assert!(jail["own_namespaces"].as_object().expect("an object").values().all(|own| own == true), "{jail}");
    assert_eq!(jail["degraded"].as_array().map(Vec::len), Some(0), "{jail}");
    nacelle(&["jail", "print", "no-such-sandbox"]).run().expect_failure(&["no-such-sandbox"]);
    c.remove();
}

fn limits_of_the_pod(node: &Node) {
    let c = node.detached(&["--memory-limit", "268435456"], BUSYBOX, &["sleep", "1000000"]);
    let dir = Path::new("/sys/fs/cgroup").join(NAMESPACE).join(c.id());
    let limit = |name: &str| -> u64 {
        let text = fs::read_to_string(dir.join(name)).unwrap_or_else(|e| panic!("read {name}: {e}"));
        text.trim().parse().unwrap_or_else(|_| panic!("{name}: {text}"))
    };
    assert_eq!(limit("pids.max"), 1024);
    let (high, max) = (limit("memory.high"), limit("memory.max"));
    assert!(high < max && high > 512 << 20, "memory.high {high}, memory.max {max}");
    assert!((1..64).contains(&limit("pids.current")), "{}", limit("pids.current"));
    c.remove();
}

/// A file of the host with these bytes, owner and mode.
fn file(path: &Path, text: &str, uid: u32, gid: u32, mode: u32) {
    fs::write(path, text).expect("write a file");
    chown(path, Some(uid), Some(gid)).expect("chown");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

/// Guest root owns what it was given, as on a host: on a disk, as with `hostPath`, and in memory, as with an `emptyDir`.
fn volumes_have_the_hosts_ids(node: &Node) {
    let disk = node.path("hostpath");
    let memory = tempfile::tempdir_in("/run").expect("make a directory");
    fs::create_dir_all(&disk).expect("make a directory");
    let secrets = node.path("secrets");
    fs::create_dir_all(&secrets).expect("make a directory");
    file(&secrets.join("token"), "for root alone", 0, 0, 0o400);
    file(&secrets.join("theirs"), "for 1234 alone", 1234, 1234, 0o400);
    let sibling = node.path("sibling");
    file(&sibling, "not in any mount", 0, 0, 0o400);
    for dir in [disk.as_path(), memory.path()] {
        file(&dir.join("given"), "of the host", 1234, 4321, 0o600);
    }
    let bind = |from: &Path, to: &str, access: &str| {
        format!("type=bind,src={},dst={to},options=rbind:{access}", from.display())
    };
    let mounts = [bind(&disk, "/disk", "rw"), bind(memory.path(), "/memory", "rw"), bind(&secrets, "/secrets", "ro")];
    let flags: Vec<&str> = mounts.iter().flat_map(|mount| ["--mount", mount]).collect();
    let c = node.detached(&flags, BUSYBOX, &["sleep", "1000000"]);

    for dir in ["/disk", "/memory"] {
        let script = format!(
            "set -e; cd {dir}; test \"$(cat given)\" = 'of the host'; test \"$(stat -c %u:%g:%a given)\" = 1234:4321:600; \
             echo text >made; chown 1000:2000 made; chmod 0640 made; mkdir sub; chown 65534:65534 sub; ln made sub/link; \
             ln -s made sym; mkfifo pipe; cat made; stat -c %u:%g:%a made; rm given"
        );
        assert_eq!(c.sh(&script), "text\n1000:2000:640");
    }
    for dir in [disk.as_path(), memory.path()] {
        let made = fs::metadata(dir.join("made")).expect("the guest made it");
        assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777, made.nlink()), (1000, 2000, 0o640, 2));
        let sub = fs::metadata(dir.join("sub")).expect("the guest made it");
        assert_eq!((sub.uid(), sub.gid()), (65534, 65534));
        let link = fs::symlink_metadata(dir.join("sym")).expect("the guest made it");
        assert_eq!((link.uid(), link.gid()), (0, 0));
        assert!(!dir.join("given").exists(), "the guest removed it");
    }
    assert_eq!(
        c.sh("cat /secrets/token /secrets/theirs; stat -c %u /secrets/theirs"),
        "for root alonefor 1234 alone1234"
    );
    c.exec(&[], &["sh", "-c", "echo x >/secrets/new"]).run().expect_failure(&["Read-only"]);

    // Outside its mounts there are neither names nor rights for the VMM.
    let pid = c.pid();
    let below_its_root = |path: &Path| PathBuf::from(format!("/proc/{pid}/cwd/..{}", path.display()));
    for path in [&sibling, &secrets.join("token")] {
        assert!(fs::metadata(below_its_root(path)).is_err(), "{} in the jail", path.display());
    }
    let id = status(pid, "Uid").split_whitespace().next().expect("an id").to_owned();
    for path in [&sibling, &secrets.join("token"), &secrets.join("theirs")] {
        let as_vmm = Cmd::new("setpriv").args(["--reuid", &id, "--regid", &id, "--clear-groups", "cat"]).args([path]);
        as_vmm.run().expect_failure(&["Permission denied"]);
    }
    c.remove();
}

fn annotations(node: &Node) {
    let refused = |annotation: &str, words: &[&str]| {
        let c = node.created(&["--annotation", annotation], BUSYBOX, &["true"]);
        c.start(&[]).run().expect_failure(words);
        c.delete();
    };
    for attempt in ["io.nacelle.jail.seccomp=off", "io.nacelle.landlock=off", "io.nacelle.uid_base=0"] {
        refused(attempt, &["knows no such annotation"]);
    }
    refused("io.nacelle.vcpus=0", &["io.nacelle.vcpus", "1 to 255"]);
    refused("io.nacelle.upper_mib=16777216", &["io.nacelle.upper_mib", "rootfs.upper_mib"]);
    refused("io.nacelle.kernel=/etc/shadow", &["io.nacelle.kernel", "annotations.allow"]);
    {
        let allow =
            "annotations.allow = [\"io.nacelle.kernel\"]\nannotations.host_paths = [\"/usr/local/share/nacelle\"]";
        let _configured = node.configure(allow);
        refused("io.nacelle.kernel=/etc/shadow", &["io.nacelle.kernel", "host_paths"]);
        refused("io.nacelle.vcpus=1", &["io.nacelle.vcpus", "annotations.allow"]);
        let kernel = "io.nacelle.kernel=/usr/local/share/nacelle/vmlinux";
        let run = node.run(&["--rm", "--annotation", kernel], BUSYBOX, &["echo", "booted"]);
        assert_eq!(run.ok().text(), "booted");
    }
    let sizes = ["--annotation", "io.nacelle.memory_mib=256", "--annotation", "io.nacelle.upper_mib=128"];
    let script = "awk '/MemTotal/ { print ($2 < 262144) }' /proc/meminfo; df -m / | awk 'END { print ($2 < 130) }'";
    assert_eq!(node.run(&[&["--rm"], &sizes[..]].concat(), BUSYBOX, &["sh", "-c", script]).ok().text(), "1\n1");
}

fn what_is_weaker_is_told(node: &Node) {
    let configured = node.configure("jail.landlock = \"off\"\njail.seccomp = \"log\"");
    let log = node.log_length();
    let c = node.detached(&[], BUSYBOX, &["sleep", "1000000"]);
    drop(configured);
    let told = printed(&c)["degraded"].to_string();
    assert!(told.contains("without Landlock") && told.contains("log what the filter would refuse"), "{told}");
    let listed = nacelle(&["ps", "--long"]).ok().text();
    assert!(listed.contains("degraded: landlock: go on without Landlock"), "{listed}");
    assert!(node.logged_since(log, "go on without Landlock"), "the log does not say it");
    c.remove();
}

fn the_node_is_in_order(_: &Node) {
    let text = nacelle(&["doctor"]).ok().text();
    for words in ["user namespaces", "one a sandbox", "idmapped mounts", "work on /var/lib", "apparmor", "memory, pids"]
    {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
}
