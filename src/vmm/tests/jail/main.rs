//! The jail as it is: the real steps, natively and as root, with a probe in libkrun's place. A test of this file looks at
//! what a step makes; what a step forbids is in [`attacks`]. Where Landlock or seccomp would answer first, they are off.
//!
//! The tests run in a mount namespace of their own (`unshare`), so nothing is left behind whatever happens, and one after
//! another, because each forks.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nacelle_protocol::vm::{Landlock, Network, Nic, Nics, Report, Seccomp};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Signal, getpid, kill_process, set_child_subreaper};

#[cfg(not(debug_assertions))]
compile_error!("these tests leave steps out of the jail, which no build without debug assertions can");

mod attacks;
mod probe;
mod sandbox;

use sandbox::{BASE, Setup, tmpfs};

const EROFS: i32 = 30;
const EACCES: i32 = 13;
const EPERM: i32 = 1;
const ENOENT: i32 = 2;

macro_rules! tests {
    ($($name:ident),* $(,)?) => { [$((stringify!($name), $name as fn())),*] };
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("probe") => probe::run(arguments.get(1).map_or("", String::as_str)),
        Some("inside") => {}
        _ => {
            assert!(rustix::process::getuid().is_root(), "the jail is entered by root: run these tests as root");
            let own = std::env::current_exe().expect("own path");
            let mut unshare = Command::new("unshare");
            unshare.args(["--mount", "--propagation", "private", "--"]).arg(own).arg("inside").args(arguments);
            panic!("run unshare: {}", unshare.exec());
        }
    }
    set_child_subreaper(Some(getpid())).expect("subreaper");
    let filter = arguments.get(1).filter(|word| !word.starts_with('-'));
    let tests = tests![
        ids_and_privileges,
        no_capability_without_volumes,
        namespaces_are_its_own,
        network_namespace_is_joined,
        own_taps_are_attached,
        no_tap_without_nics,
        cgroup_is_joined,
        limits_hold,
        root_holds_the_plan_and_nothing_else,
        root_cannot_be_changed,
        siblings_of_files_stay_outside,
        read_only_share_refuses_changes,
        mapped_share_belongs_to_the_guest,
        mapped_share_makes_no_devices,
        later_mounts_arrive,
        later_volumes_are_mapped,
        a_pods_user_namespace,
        mounts_that_cannot_be_mapped_are_reported,
        files_of_the_host_stay_the_hosts,
        descriptors_are_closed,
        environment_is_empty,
        console_is_writable,
        lifeline_ends_it,
        panic_is_reported,
        failures_are_closed_and_named,
        nothing_stays_mounted,
        weaker_is_said,
        a_kernel_without_landlock,
        hard_links_stay_in_their_mount,
        a_lent_network_is_lent,
    ];
    let mut ran = 0;
    for (name, test) in tests {
        if filter.is_none_or(|filter| name.contains(filter.as_str())) {
            test();
            println!("test {name} ... ok");
            ran += 1;
        }
    }
    for case in attacks::CASES {
        if filter.is_none_or(|filter| case.0.contains(filter.as_str())) {
            let end = case.run();
            println!("test {} ... ok (without its step: {end})", case.0);
            ran += 1;
        }
    }
    println!("test result: ok. {ran} passed");
}

/// Steps 10 and 11.
fn ids_and_privileges() {
    let mut sandbox = Setup::inner().start();
    assert_eq!(sandbox.status("Uid"), format!("{BASE}\t{BASE}\t{BASE}\t{BASE}"));
    assert_eq!(sandbox.status("Gid"), format!("{BASE}\t{BASE}\t{BASE}\t{BASE}"));
    assert_eq!(sandbox.status("Groups"), "");
    assert_eq!(sandbox.status("NoNewPrivs"), "1");
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID; over the user namespace only, see below.
    assert_eq!(sandbox.status("CapEff"), "00000000000000db");
    assert_eq!(sandbox.status("CapPrm"), "00000000000000db");
    for none in ["CapBnd", "CapInh", "CapAmb"] {
        assert_eq!(sandbox.status(none), "0000000000000000", "{none}");
    }
    assert_eq!(sandbox.ask(&["pid"]), "1");
    assert_eq!(sandbox.tell(&["mount", "/share/volumes"]), Err(EPERM));
    // Not dumpable: what /proc shows of it belongs to root.
    assert_eq!(fs::metadata(sandbox.proc("environ")).expect("stat").uid(), 0);
    // A second session leader could be reached by nobody's terminal.
    let stat = fs::read_to_string(sandbox.proc("stat")).expect("stat");
    let session = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(3)).expect("session");
    assert_eq!(session, sandbox.pid.as_raw_nonzero().to_string());
}

/// Step 10.
fn no_capability_without_volumes() {
    let mut setup = Setup::new();
    setup.config.shares.remove(0);
    let sandbox = setup.start();
    assert_eq!(sandbox.status("CapEff"), "0000000000000000");
    assert_eq!(sandbox.status("CapPrm"), "0000000000000000");
}

/// Steps 4 to 8.
fn namespaces_are_its_own() {
    let sandbox = Setup::new().start();
    for name in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        let of = |dir: &Path| fs::read_link(dir.join(name)).expect("namespace");
        assert_ne!(of(&sandbox.proc("ns")), of(Path::new("/proc/self/ns")), "{name}");
    }
}

/// Step 5.
fn network_namespace_is_joined() {
    let mut setup = Setup::new();
    let holder = Holder::new(&[]);
    setup.config.jail.network = Network::Join((&holder.netns).into());
    let sandbox = setup.start();
    assert_eq!(fs::read_link(sandbox.proc("ns/net")).expect("link"), fs::read_link(&holder.netns).expect("link"));
}

/// Steps 5, 7, 10, 12 and 13 for a machine with network devices: it finds its taps, and those of nobody else.
fn own_taps_are_attached() {
    let holder = Holder::new(&[("own0", BASE), ("other0", BASE + 65_536)]);
    let mut sandbox = holder.wired(Setup::new()).start();
    assert_eq!(sandbox.ask(&["tap", "own0"]), "own0");
    assert_eq!(sandbox.tell(&["tap", "other0"]), Err(EPERM));
    assert_eq!(sandbox.tell(&["tap", "new0"]), Err(EPERM), "none is made");
    assert_eq!(sandbox.attempt(&["ioctl"]), sandbox::Outcome::Refused(libc::SYS_ioctl));

    let mut sandbox = holder.wired(Setup::inner()).start();
    assert_eq!(sandbox.ask(&["list", "/dev"]), "kvm net random urandom");
    assert_eq!(sandbox.ask(&["stat", "/dev/net/tun"]), "0 0 600");
}

/// Steps 12 and 13: what was got ready for devices that did not come is of no use.
fn no_tap_without_nics() {
    let holder = Holder::new(&[("own0", BASE)]);
    let unwired = |mut setup: Setup| {
        setup = holder.wired(setup);
        setup.nics = Nics::default();
        setup
    };
    assert_eq!(unwired(Setup::new()).start().tell(&["tap", "own0"]), Err(EACCES));
    let mut setup = unwired(Setup::new());
    setup.leave_out(&[attacks::Off::Landlock]);
    assert_eq!(setup.start().attempt(&["tap", "own0"]), sandbox::Outcome::Refused(libc::SYS_ioctl));
    assert_eq!(unwired(Setup::inner()).start().ask(&["tap", "own0"]), "own0");
}

/// A network namespace with taps in it, each with its owner.
struct Holder {
    process: std::process::Child,
    netns: String,
}

impl Holder {
    fn new(taps: &[(&str, u32)]) -> Self {
        use std::io::{Read, Write};
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = unshare.spawn().expect("spawn");
        // It echoes a byte once it is in its namespace.
        process.stdin.as_mut().expect("pipe").write_all(b"x").expect("write");
        process.stdout.as_mut().expect("pipe").read_exact(&mut [0]).expect("read");
        let netns = format!("/proc/{}/ns/net", process.id());
        let inside = fs::File::open(&netns).expect("open");
        let taps: Vec<_> = taps.iter().map(|(name, owner)| ((*name).to_owned(), *owner)).collect();
        // A thread of its own, which ends in the other namespace; the tests themselves fork without any.
        let made = std::thread::spawn(move || {
            nix::sched::setns(inside, nix::sched::CloneFlags::CLONE_NEWNET).expect("enter");
            for (name, owner) in taps {
                let name = tappers::Interface::new(name).expect("name");
                let tap = tappers::linux::Tap::create_named(name).expect("make tap");
                tap.set_owner(owner).expect("owner");
                tap.set_persistent(true).expect("persist");
            }
        });
        made.join().expect("taps");
        Self { process, netns }
    }

    /// Lets the machine have `own0` in this namespace.
    fn wired(&self, mut setup: Setup) -> Setup {
        setup.config.jail.network = Network::Join((&self.netns).into());
        setup.config.awaits_nics = true;
        setup.nics.nics = vec![Nic { tap: "own0".into(), mac: [2, 0, 0, 0, 0, 1] }];
        setup
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Step 3.
fn cgroup_is_joined() {
    // One hierarchy is enough, v2 first; its mount point is where the machine has it.
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let of_type = |wanted: &str| {
        mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|f| f[2] == wanted).map(|f| f[1].to_owned())
    };
    let mount = of_type("cgroup2").or_else(|| of_type("cgroup")).expect("a cgroup hierarchy");
    let dir = Path::new(&mount).join(format!("nacelle-jail-test-{}", std::process::id()));
    fs::create_dir(&dir).expect("make cgroup");
    let mut setup = Setup::new();
    setup.config.jail.cgroups = vec![dir.clone()];
    let mut sandbox = setup.start();
    let members = fs::read_to_string(dir.join("cgroup.procs")).expect("members");
    assert_eq!(members.trim(), sandbox.pid.as_raw_nonzero().to_string());
    kill_process(sandbox.pid, Signal::KILL).expect("kill");
    sandbox.end();
    fs::remove_dir(&dir).expect("remove cgroup");
}

/// Step 1.
fn limits_hold() {
    let sandbox = Setup::new().start();
    let limits = fs::read_to_string(sandbox.proc("limits")).expect("limits");
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).expect("limit");
        line[name.len()..].split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(limit("Max open files"), ["4096", "4096"]);
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    assert_eq!(limit("Max processes"), ["1024", "1024"]);
}

/// Steps 7 and 9.
fn root_holds_the_plan_and_nothing_else() {
    let mut sandbox = Setup::inner().start();
    assert_eq!(sandbox.ask(&["list", "/"]), "dev disk files kernel proc root share socket");
    assert_eq!(sandbox.ask(&["list", "/dev"]), "kvm random urandom");
    assert_eq!(sandbox.ask(&["stat", "/dev/kvm"]), "0 0 600");
    assert_eq!(sandbox.ask(&["stat", "/dev/urandom"]), "0 0 400");
    assert_eq!(sandbox.ask(&["list", "/share"]), "layers volumes");
    assert_eq!(sandbox.ask(&["list", "/files"]), "");
    let cwd = fs::read_link(sandbox.proc("cwd")).expect("working directory");
    assert!(cwd.ends_with("socket"), "{}", cwd.display());
    assert_eq!(sandbox.ask(&["list", "/disk"]), "upper");
    assert_eq!(sandbox.ask(&["read", "/kernel"]), "kernel");
    assert_eq!(sandbox.ask(&["read", "/root"]), "kernel", "the image of these tests is the kernel");
    assert_eq!(sandbox.ask(&["read", "/share/layers/a.erofs"]), "layer");
    // The guest's file names are not checked by libkrun: dots lead no further than the jail.
    for path in ["/etc/passwd", "/share/volumes/../../../../etc/passwd", "/proc/1/root/etc/passwd", "/proc/sys/kernel"]
    {
        assert_eq!(sandbox.tell(&["stat", path]), Err(ENOENT), "{path}");
    }
    let mounts = fs::read_to_string(sandbox.proc("mountinfo")).expect("mounts");
    assert_eq!(mounts.lines().count(), 9, "{mounts}");
}

/// Step 7.
fn root_cannot_be_changed() {
    let mut sandbox = Setup::inner().start();
    for path in ["/x", "/dev/x", "/share/x"] {
        assert_eq!(sandbox.tell(&["write", path, "x"]), Err(EROFS), "{path}");
        assert_eq!(sandbox.tell(&["make-device", path]), Err(EROFS), "{path}");
    }
    assert_eq!(sandbox.tell(&["write", "/kernel", "x"]), Err(EROFS));
    assert_eq!(sandbox.tell(&["remove", "/kernel"]), Err(EROFS));
    assert!(sandbox.tell(&["write", "/proc/self/oom_score_adj", "-1000"]).is_err());
}

/// Step 7: a file is bound alone, even where its neighbour's name is known.
fn siblings_of_files_stay_outside() {
    let mut sandbox = Setup::inner().start();
    for path in ["/secret", "/disk/secret", "/disk/../secret", "/disk/upper/../secret"] {
        assert!(sandbox.tell(&["read", path]).is_err(), "{path}");
    }
}

/// Step 7, and not by libkrun's word alone.
fn read_only_share_refuses_changes() {
    let mut setup = Setup::inner();
    setup.config.shares[0].read_only = true;
    setup.config.disks[0].read_only = true;
    fs::create_dir(setup.path("volumes/sub")).expect("directory");
    tmpfs(&setup.path("volumes/sub"));
    let mut sandbox = setup.start();
    assert_eq!(sandbox.tell(&["write", "/share/layers/a.erofs", "x"]), Err(EROFS));
    assert_eq!(sandbox.tell(&["write", "/share/volumes/x", "x"]), Err(EROFS));
    assert_eq!(sandbox.tell(&["write", "/share/volumes/sub/x", "x"]), Err(EROFS), "mounts below, too");
    assert_eq!(sandbox.tell(&["open-device", "/disk/upper"]), Err(EROFS));
}

/// Steps 4, 7 and 10 together.
fn mapped_share_belongs_to_the_guest() {
    let setup = Setup::new();
    let volumes = setup.path("volumes");
    fs::write(volumes.join("secret"), "token").expect("write");
    fs::set_permissions(volumes.join("secret"), fs::Permissions::from_mode(0o400)).expect("mode");
    fs::write(volumes.join("of-999"), "x").expect("write");
    chown(volumes.join("of-999"), Some(999), Some(999)).expect("owner");
    let mut sandbox = setup.start();
    assert_eq!(sandbox.degraded, Vec::<String>::new());
    let owner = |name: &str| {
        let meta = fs::metadata(volumes.join(name)).expect("stat");
        (meta.uid(), meta.gid())
    };
    assert_eq!(sandbox.ask(&["read", "/share/volumes/secret"]), "token");
    assert_eq!(sandbox.ask(&["stat", "/share/volumes/of-999"]), "999 999 644");
    sandbox.ask(&["write", "/share/volumes/of-999", "root may"]);
    sandbox.ask(&["make-directory", "/share/volumes/dir"]);
    assert_eq!(owner("dir"), (0, 0));
    sandbox.ask(&["chown", "/share/volumes/dir", "1000", "1001"]);
    assert_eq!(owner("dir"), (1000, 1001));
    sandbox.ask(&["create-as", "1000", "1001", "/share/volumes/dir/file"]);
    assert_eq!(owner("dir/file"), (1000, 1001));
    sandbox.ask(&["chmod", "/share/volumes/dir/file", "400"]);
    sandbox.ask(&["read", "/share/volumes/dir/file"]);
    sandbox.ask(&["chown", "/share/volumes/dir/file", "65535", "65535"]);
    assert!(sandbox.tell(&["chown", "/share/volumes/dir/file", "65536", "0"]).is_err(), "beyond the range");
}

/// Step 10, and `nodev`.
fn mapped_share_makes_no_devices() {
    let setup = Setup::inner();
    let node = setup.path("volumes/null");
    let made = Command::new("mknod").arg(&node).args(["c", "1", "3"]).status().expect("mknod");
    assert!(made.success());
    let mut sandbox = setup.start();
    assert_eq!(sandbox.tell(&["make-device", "/share/volumes/own"]), Err(EPERM));
    assert_eq!(sandbox.tell(&["open-device", "/share/volumes/null"]), Err(EACCES));
}

/// Step 6: the shim mounts volumes for containers that come later, and takes them away.
fn later_mounts_arrive() {
    let setup = Setup::new();
    let later = setup.path("volumes/later");
    fs::create_dir(&later).expect("directory");
    let mut sandbox = setup.start();
    assert_eq!(sandbox.ask(&["list", "/share/volumes/later"]), "");
    tmpfs(&later);
    fs::write(later.join("file"), "late").expect("write");
    assert_eq!(sandbox.ask(&["read", "/share/volumes/later/file"]), "late");
    let before = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    unmount(&later, UnmountFlags::empty()).expect("unmount");
    assert_eq!(sandbox.ask(&["list", "/share/volumes/later"]), "");
    assert!(before.contains("volumes/later"));
}

/// The other half of step 6: what arrives later has the ids that it was mounted with, so the shim has it mapped.
fn later_volumes_are_mapped() {
    let setup = Setup::new();
    let [volumes, host] = ["volumes", "host"].map(|name| setup.path(name));
    for dir in [volumes.join("raw"), volumes.join("dir"), host.clone(), host.join("below")] {
        fs::create_dir(dir).expect("directory");
    }
    fs::write(volumes.join("file"), "").expect("write");
    fs::write(host.join("secret"), "token").expect("write");
    fs::set_permissions(host.join("secret"), fs::Permissions::from_mode(0o400)).expect("mode");
    tmpfs(&host.join("below"));
    let mut sandbox = setup.start();

    rustix::mount::mount_bind(&host, volumes.join("raw")).expect("bind");
    assert_eq!(sandbox.ask(&["stat", "/share/volumes/raw/secret"]), "65534 65534 400");

    let bind = |source: &Path, target: &str, options: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nacelle-vmm"));
        command.args(["bind", &sandbox.pid.as_raw_nonzero().to_string()]);
        command.args([source, &volumes.join(target), Path::new(options)]).output().expect("run")
    };
    let output = bind(&host, "dir", "rw,recursive");
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    let output = bind(&host.join("secret"), "file", "ro");
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    let output = bind(Path::new("/nonexistent"), "dir", "rw");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.starts_with(r#"{"report":"failed","stage":"graft","errno":2,"message":"open /nonexistent"#), "{text}");

    assert_eq!(sandbox.ask(&["read", "/share/volumes/dir/secret"]), "token");
    sandbox.ask(&["write", "/share/volumes/dir/below/made", "by the guest"]);
    assert_eq!(fs::metadata(host.join("below/made")).expect("stat").uid(), 0);
    assert_eq!(sandbox.ask(&["read", "/share/volumes/file"]), "token");
    assert_eq!(sandbox.tell(&["write", "/share/volumes/file", "x"]), Err(EROFS));
    unmount(volumes.join("dir"), UnmountFlags::DETACH).expect("unmount");
    assert_eq!(sandbox.ask(&["list", "/share/volumes/dir"]), "");
    // The directory cannot be removed with a mount in it.
    unmount(host.join("below"), UnmountFlags::DETACH).expect("unmount");
}

/// Step 4: where the pod has a user namespace, its ids are the guest's from there on, and id 0 of a mapped volume is its root.
/// A volume that is not mapped has the ids of the host, where they are the pod's.
fn a_pods_user_namespace() {
    const ROOT: u32 = 131_072;
    let mut setup = Setup::inner();
    setup.config.jail.pod_root = Some(ROOT);
    let [volumes, host] = ["volumes", "host"].map(|name| setup.path(name));
    for dir in [volumes.join("mapped"), volumes.join("plain"), host.clone()] {
        fs::create_dir(dir).expect("directory");
    }
    fs::write(volumes.join("of-0"), "").expect("write");
    for (name, owner) in [("of-0", 0), ("of-1000", 1000), ("of-pod", ROOT + 7)] {
        fs::write(host.join(name), name).expect("write");
        chown(host.join(name), Some(owner), Some(owner)).expect("owner");
    }
    let mut sandbox = setup.start();
    for (target, options) in [("mapped", "rw,mapped"), ("plain", "rw")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nacelle-vmm"));
        command.args(["bind", &sandbox.pid.as_raw_nonzero().to_string()]);
        let output = command.args([&host, &volumes.join(target), Path::new(options)]).output().expect("run");
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    }
    let mut owner = |path: &str| {
        let said = sandbox.ask(&["stat", &format!("/share/volumes/{path}")]);
        said.split(' ').next().and_then(|uid| uid.parse::<u32>().ok()).expect("an owner")
    };
    assert_eq!(owner("of-0"), ROOT, "the share that is there from the start");
    assert_eq!([owner("mapped/of-0"), owner("mapped/of-1000")], [ROOT, ROOT + 1000]);
    assert_eq!(owner("mapped/of-pod"), 65_534, "beyond the range");
    assert_eq!([owner("plain/of-0"), owner("plain/of-1000"), owner("plain/of-pod")], [0, 65_534, ROOT + 7]);

    let [pod, thousand] = [ROOT, ROOT + 1000].map(|id| id.to_string());
    sandbox.ask(&["create-as", &pod, &pod, "/share/volumes/mapped/new"]);
    assert_eq!(fs::metadata(host.join("new")).expect("stat").uid(), 0);
    sandbox.ask(&["chown", "/share/volumes/mapped/new", &thousand, &thousand]);
    assert_eq!(fs::metadata(host.join("new")).expect("stat").uid(), 1000);
    assert!(sandbox.tell(&["create-as", "1000", "1000", "/share/volumes/mapped/other"]).is_err(), "not the pod's");
}

/// Step 7: what cannot be mapped is served as it is, and said.
fn mounts_that_cannot_be_mapped_are_reported() {
    let setup = Setup::new();
    for name in ["good", "bad"] {
        fs::create_dir(setup.path("volumes").join(name)).expect("directory");
    }
    tmpfs(&setup.path("volumes/good"));
    let bad = setup.path("volumes/bad");
    mount("proc", &bad, "proc", MountFlags::empty(), None).expect("mount proc");
    let mut sandbox = setup.start();
    assert_eq!(sandbox.degraded.len(), 1, "{:?}", sandbox.degraded);
    assert!(sandbox.degraded[0].contains(bad.to_str().expect("text")), "{:?}", sandbox.degraded);
    sandbox.ask(&["write", "/share/volumes/good/x", "mine"]);
    assert_eq!(fs::metadata(sandbox.started.setup.path("volumes/good/x")).expect("stat").uid(), 0);
    assert_eq!(sandbox.ask(&["stat", "/share/volumes/bad/version"]), "65534 65534 444");
}

/// Step 10: the capabilities end where ids are not mapped.
fn files_of_the_host_stay_the_hosts() {
    let mut setup = Setup::inner();
    setup.config.shares[1].read_only = false;
    let layers = setup.path("layers");
    fs::write(layers.join("private"), "x").expect("write");
    fs::set_permissions(layers.join("private"), fs::Permissions::from_mode(0o600)).expect("mode");
    symlink("/etc/shadow", layers.join("link")).expect("link");
    // A disk that the shim has given away stays with the sandbox, too.
    let disk = setup.path("disk");
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o600)).expect("mode");
    chown(&disk, Some(BASE), Some(BASE)).expect("owner");
    let mut sandbox = setup.start();
    assert_eq!(sandbox.tell(&["read", "/share/layers/private"]), Err(EACCES));
    assert_eq!(sandbox.tell(&["write", "/share/layers/a.erofs", "x"]), Err(EACCES));
    assert_eq!(sandbox.tell(&["chown", "/share/layers/a.erofs", "0", "0"]), Err(EPERM));
    assert_eq!(sandbox.tell(&["read", "/share/layers/link"]), Err(ENOENT));
    sandbox.ask(&["write", "/disk/upper", "mine"]);
}

/// Step 2.
fn descriptors_are_closed() {
    let mut sandbox = Setup::inner().start();
    // 7 and 8 are the two ends of the probe's own connection; the directory that lists takes one more.
    let own = sandbox.ask(&["list", "/proc/self/fd"]);
    assert!(own.split(' ').all(|number| number.parse::<u32>().expect("number") <= 9), "{own}");
    for entry in fs::read_dir(sandbox.proc("fd")).expect("descriptors") {
        let target = fs::read_link(entry.expect("entry").path()).expect("link");
        let target = target.to_str().expect("text");
        let fine =
            ["pipe:", "socket:", "/dev/null", "/dev/pts", "/dev/tty"].iter().any(|kind| target.starts_with(kind));
        assert!(fine || !target.contains("secret"), "{target}");
        assert!(!target.contains("ns/") && !target.contains("user:"), "{target}");
    }
}

/// Step 11.
fn environment_is_empty() {
    let mut sandbox = Setup::new().start();
    assert_eq!(sandbox.ask(&["environment"]), "HOSTNAME=pod-1");
}

/// Step 2.
fn console_is_writable() {
    let mut sandbox = Setup::new().start();
    sandbox.ask(&["console", "Linux"]);
    assert_eq!(sandbox.console(5), "Linux");
}

/// Step 12.
fn lifeline_ends_it() {
    let mut sandbox = Setup::new().start();
    drop(sandbox.started.lifeline.take());
    assert!(sandbox.end().exited());
}

/// A panic of any of libkrun's threads.
fn panic_is_reported() {
    let mut sandbox = Setup::new().start();
    sandbox.send(&["panic"]);
    let Some(Report::Failed { stage, message, .. }) = sandbox.started.report() else { panic!("no report") };
    assert_eq!(stage, "panic");
    assert!(message.starts_with("as told (at "), "{message}");
    assert_eq!(sandbox.end().exit_status(), Some(1));
}

/// Nothing starts half-jailed.
fn failures_are_closed_and_named() {
    type Change = fn(&mut Setup);
    let cases: [(&str, &str, Change); 6] = [
        ("graft", "open /nonexistent: No such file", |s| s.config.shares[0].source = "/nonexistent".into()),
        ("root", "it is a Directory, not a RegularFile", |s| s.config.disks[0].source = "/proc".into()),
        ("root", "it is a RegularFile, not a Socket", |s| s.config.sockets[0].source = s.path("disk")),
        ("cgroups", "join cgroup /nonexistent", |s| s.config.jail.cgroups = vec!["/nonexistent".into()]),
        ("network namespace", "open /nonexistent", |s| s.config.jail.network = Network::Join("/nonexistent".into())),
        ("limits", "limit open files", |s| s.config.jail.max_files = u64::MAX - 1),
    ];
    for (stage, message, change) in cases {
        let mut setup = Setup::new();
        change(&mut setup);
        let (found, text, code) = setup.fail();
        assert_eq!((found.as_str(), code), (stage, Some(1)), "{text}");
        assert!(text.contains(message), "{text}");
    }
}

/// Step 6: what the jail mounts, it mounts for itself.
fn nothing_stays_mounted() {
    let sandbox = Setup::new().start();
    let jail = sandbox.started.setup.path("jail");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.contains(jail.to_str().expect("text")), "{mounts}");
    assert_eq!(fs::read_dir(&jail).expect("list").count(), 0);
}

/// Step 12: no VM where the kernel cannot, unless the configuration says so.
fn a_kernel_without_landlock() {
    let mut setup = Setup::new();
    setup.lose_landlock();
    let (stage, message, _) = setup.fail();
    assert_eq!(stage, "landlock");
    assert!(message.contains("jail.landlock") && message.ends_with("Linux 5.13 or newer can have it"), "{message}");

    let mut setup = Setup::new();
    setup.lose_landlock();
    setup.config.jail.landlock = Landlock::BestEffort;
    let mut sandbox = setup.start();
    sandbox.ask(&["list", "/"]);
    let Some(Report::Degraded { stage, message }) = sandbox.started.report() else { panic!("no report") };
    assert_eq!(stage, "landlock");
    assert!(message.starts_with("go on without Landlock: this kernel has none"), "{message}");
}

/// Steps 12 and 13: what the configuration leaves out is told to the shim, each time.
fn weaker_is_said() {
    let said = |setup: Setup, count| {
        let mut sandbox = setup.start();
        (0..count)
            .map(|_| match sandbox.started.report() {
                Some(Report::Degraded { stage, message }) => format!("{stage}: {message}"),
                other => panic!("{other:?}"),
            })
            .collect::<Vec<_>>()
    };
    let off = said(Setup::inner(), 2);
    assert!(off[0].starts_with("landlock: go on without"), "{off:?}");
    assert!(off[1].starts_with("seccomp: go on without"), "{off:?}");

    let mut setup = Setup::new();
    setup.config.jail.seccomp = Seccomp::Log;
    assert!(said(setup, 1)[0].starts_with("seccomp: log what the filter would refuse"));
    let mut setup = Setup::new();
    setup.config.jail.seccomp = Seccomp::Log;
    setup.start().ask(&["memory-file"]);
}

/// Step 7: every entry is a mount of its own, and no link leads from one to another.
fn hard_links_stay_in_their_mount() {
    const EXDEV: i32 = 18;
    let mut sandbox = Setup::inner().start();
    assert_eq!(sandbox.tell(&["link", "/kernel", "/share/volumes/kernel"]), Err(EXDEV));
    assert_eq!(sandbox.tell(&["link", "/disk/upper", "/share/volumes/disk"]), Err(EXDEV));
}

/// Steps 5, 12 and 13 for a machine that lends its guest the host's network: connections go out, nothing else changes.
fn a_lent_network_is_lent() {
    let mut setup = Setup::new();
    setup.config.jail.network = Network::Host;
    let port = setup.fill("@port");
    let mut sandbox = setup.start();
    sandbox.ask(&["tcp", &port]);
    assert_eq!(sandbox.tell(&["list", "/"]), Err(EACCES));
    assert_eq!(sandbox.attempt(&["unshare"]), sandbox::Outcome::Refused(libc::SYS_unshare));
}
