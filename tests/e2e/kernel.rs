//! What the guest's kernel makes possible, in running containers. With a kernel that lacks a feature, nacelle must say so:
//! `NACELLE_KERNEL` (`own` or `libkrunfw`) is the one under test.

use std::{fs, os::unix::fs::FileExt, path::Path};

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use nacelle_tests::{
    command::patience,
    grpc::{self, Message},
    node::{BUSYBOX, Configured, Container, NAMESPACE, Node},
};
use protobuf::Message as _;
use serde_json::Value;

use crate::Case;

/// Bytes of a block of an image.
const BLOCK: usize = 4096;
const NOT_OTHERS: &str = "it is about nacelle's guest kernel";

pub const CASES: &[Case] = &[
    Case::only_nacelle("is_told", is_told, NOT_OTHERS),
    Case::only_nacelle("fits_the_processor", fits_the_processor, NOT_OTHERS),
    Case::only_nacelle("quota_limits_one_container", quota_limits_one_container, NOT_OTHERS),
    Case::only_nacelle("quota_spares_the_neighbour", quota_spares_the_neighbour, NOT_OTHERS),
    Case::only_nacelle("quota_by_annotation", quota_by_annotation, NOT_OTHERS),
    Case::only_nacelle("pressure", pressure, NOT_OTHERS),
    Case::only_nacelle("iptables_legacy", iptables_legacy, NOT_OTHERS),
    Case::only_nacelle("iptables_nft", iptables_nft, NOT_OTHERS),
    Case::only_nacelle("nft", nft, NOT_OTHERS),
    Case::only_nacelle("acl_of_an_image", acl_of_an_image, NOT_OTHERS),
    Case::only_nacelle("verified_layers", verified_layers, NOT_OTHERS),
    Case::only_nacelle("damage_of_a_verified_layer", damage_of_a_verified_layer, NOT_OTHERS),
    Case::only_nacelle("landlock", landlock, NOT_OTHERS),
    Case::only_nacelle("seccomp", seccomp, NOT_OTHERS),
    Case::only_nacelle("swap_is_off_and_possible", swap_is_off_and_possible, NOT_OTHERS),
];

/// As Kubernetes gives it to every container; `ctr` does not.
const CGROUP: [&str; 2] = ["--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev"];

/// A process's own cgroup, with and without a cgroup namespace.
const OWN_CGROUP: &str = "/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)";

fn own() -> bool {
    std::env::var("NACELLE_KERNEL").map_or(true, |kernel| kernel != "libkrunfw")
}

/// What the guest says its kernel has.
fn features(node: &Node) -> Vec<String> {
    let status = status(node, node.resident().id());
    status["kernel_features"].as_array().into_iter().flatten().flat_map(Value::as_str).map(str::to_owned).collect()
}

/// Whether the kernel under test has a feature, as it says itself. Our own has all of them.
fn has(node: &Node, feature: &str) -> bool {
    let has = features(node).iter().any(|name| name == feature);
    assert!(has || !own(), "our own kernel lacks {feature}");
    if !has {
        eprintln!("not tried: this kernel lacks {feature}");
    }
    has
}

/// What `nacelle ps` knows of a sandbox.
fn status(node: &Node, sandbox: &str) -> Value {
    let list = nacelle_tests::command::Cmd::new("nacelle").args(["ps", "--json"]).ok();
    let list: Vec<Value> = serde_json::from_slice(&list.out).expect("nacelle ps prints JSON");
    let found = list.into_iter().find(|status| status["sandbox"] == sandbox);
    found.unwrap_or_else(|| panic!("no sandbox {sandbox} on {}", node.version()))
}

fn is_told(node: &Node) {
    let c = node.resident();
    let status = status(node, c.id());
    assert_eq!(status["guest_kernel"], c.sh("uname -r"));
    let features = features(node);
    if own() {
        let all = ["pressure", "quota", "acl", "nftables", "iptables-legacy", "landlock", "verity", "swap", "clock"];
        assert_eq!(features, all);
    } else {
        assert!(!features.iter().any(|name| name == "pressure" || name == "quota"), "{features:?}");
    }
    // The host's network is not lent to who has not asked.
    assert!(!features.iter().any(|name| name == "host-network"), "{features:?}");
}

/// A processor without faults of returns has a kernel of its own, which finds them as absent as the host did.
fn fits_the_processor(node: &Node) {
    const FAULTS: [&str; 3] = ["retbleed", "spec_rstack_overflow", "indirect_target_selection"];
    const FOLDER: &str = "/sys/devices/system/cpu/vulnerabilities";
    let c = node.resident();
    let vmm = status(node, c.id())["vmm_pid"].clone();
    let table = fs::read_to_string(format!("/proc/{vmm}/mountinfo")).expect("the VMM's mounts");
    // Fields 4 and 5: what of the file system is mounted, and where.
    let mut mounts = table.lines().map(|line| line.split(' ').skip(3));
    let file = mounts.find_map(|mut fields| fields.next().filter(|_| fields.next() == Some("/kernel")));
    let file = Path::new(file.expect("a kernel")).file_name().and_then(|name| name.to_str());
    let healthy = FAULTS
        .iter()
        .all(|fault| fs::read_to_string(format!("{FOLDER}/{fault}")).is_ok_and(|said| said == "Not affected\n"));
    let plain = own() && healthy;
    assert_eq!(file, Some(if plain { "vmlinux-plain-returns" } else { "vmlinux" }));
    if plain {
        for fault in FAULTS {
            assert_eq!(c.sh(&format!("cat {FOLDER}/{fault}")), "Not affected", "{fault}");
        }
    }
}

/// Fills a container up to its limit of `mib`, makes room and writes again.
fn fill(node: &Node, flags: &[&str], mib: u32) {
    if !has(node, "quota") {
        let refused = node.run(&[&["--rm"], flags].concat(), BUSYBOX, &["true"]).run();
        assert_ne!(refused.code, 0, "{refused}");
        refused.expect_failure(&["the guest's kernel lacks quota"]);
        return;
    }
    let c = node.detached(flags, BUSYBOX, &["sleep", "1000"]);
    let write = |name: &str, mib: u32| {
        c.exec(&[], &["dd", "if=/dev/zero", &format!("of=/{name}"), "bs=1M", &format!("count={mib}")]).run()
    };
    let over = write("over", mib + 8);
    assert_ne!(over.code, 0, "{over}");
    over.expect_failure(&["quota exceeded"]);
    // What was written up to the limit is there; it goes, and its room comes back.
    assert!(c.sh("stat -c %s /over").parse::<u64>().is_ok_and(|size| size > u64::from(mib / 2) << 20));
    c.sh("rm /over");
    let under = write("under", mib * 3 / 4);
    assert_eq!(under.code, 0, "{under}");
    c.remove();
}

fn quota_limits_one_container(node: &Node) {
    let _limited = node.configure("rootfs.container_mib = 32");
    fill(node, &[], 32);
}

fn quota_spares_the_neighbour(node: &Node) {
    if !has(node, "quota") {
        return;
    }
    let configured = node.configure("rootfs.container_mib = 32\nrootfs.upper_mib = 128\n");
    let pod = node.pod(&[BUSYBOX, BUSYBOX]);
    let [_, full, neighbour] = &pod[..] else { panic!("a sandbox and two containers") };
    let filled = full.exec(&[], &["dd", "if=/dev/zero", "of=/filler", "bs=1M", "count=100"]).run();
    filled.expect_failure(&["quota exceeded"]);
    // What the one may not have, the other still can.
    assert_eq!(neighbour.sh("dd if=/dev/zero of=/file bs=1M count=24 2>/dev/null; stat -c %s /file"), "25165824");
    pod.into_iter().rev().for_each(Container::remove);
    drop(configured);
}

fn quota_by_annotation(node: &Node) {
    fill(node, &["--annotation", "io.nacelle.container_mib=16"], 16);
    let run = node.run(&["--rm", "--annotation", "io.nacelle.container_mib=much"], BUSYBOX, &["true"]).run();
    run.expect_failure(&["io.nacelle.container_mib", "much"]);
}

fn metrics(node: &Node, c: &Container) -> Metrics {
    let request = Message::default().bytes(1, format!("id=={}", c.id()));
    let answer = node.call("/containerd.services.tasks.v1.Tasks/Metrics", request, patience()).expect("metrics");
    // MetricsResponse.metrics, Metric.data, Any.value
    let metric = grpc::bytes(&answer, 1).expect("a metric");
    let any = grpc::bytes(&metric, 3).expect("data");
    Metrics::parse_from_bytes(&grpc::bytes(&any, 2).expect("a value")).expect("metrics of a cgroup")
}

fn pressure(node: &Node) {
    let c = node.detached(&CGROUP, BUSYBOX, &["sh", "-c", "while :; do :; done & while :; do :; done"]);
    let stats = metrics(node, &c);
    if has(node, "pressure") {
        let text = c.sh(&format!("cat /proc/pressure/memory {OWN_CGROUP}/memory.pressure"));
        assert_eq!(text.lines().filter(|line| line.starts_with("some avg10=")).count(), 2, "{text}");
        assert!(stats.memory.psi.is_some() && stats.io.psi.is_some(), "{stats}");
        // Two that want the processor at once wait for it, or there are two processors.
        let waits = || metrics(node, &c).cpu.psi.some.total > 0 || c.sh("nproc") != "1";
        nacelle_tests::command::within(patience(), "pressure on the processor", || waits().then_some(()));
    } else {
        assert!(stats.memory.psi.is_none() && stats.cpu.psi.is_none(), "{stats}");
    }
    c.remove();
}

/// What a container with the rights over its own network prints; each ends in whether a rule acts.
fn filtering(node: &Node, script: &str) -> String {
    let image = node.image("debian-tools");
    let flags = ["--rm", "--cap-add", "CAP_NET_ADMIN", "--cap-add", "CAP_NET_RAW"];
    // A listener on port 8080, and who can be reached where.
    let common = "busybox nc -ll -p 8080 -e echo hello & \
                  reach() { busybox nc -w 2 127.0.0.1 $1 </dev/null 2>/dev/null || echo no; }; \
                  until ss -ltn | grep -q :8080; do kill -0 $! || exit 1; done;";
    let script = format!("{common} {script}");
    node.run(&flags, &image, &["bash", "-c", &script]).within(patience() * 3).ok().text()
}

fn tables(node: &Node, iptables: &str) {
    // As the init container of a service mesh does it: what goes to one port ends at another; and a port that is shut.
    let script = format!(
        "{iptables} -t nat -N MESH; {iptables} -t nat -A MESH -p tcp --dport 80 -m comment --comment mesh -j REDIRECT --to-ports 8080; \
         reach 80; {iptables} -t nat -A OUTPUT -p tcp -m owner ! --uid-owner 1337 -j MESH; reach 80; \
         {iptables} -A OUTPUT -p tcp --dport 8080 -m conntrack --ctstate NEW -m multiport --dports 8080,8081 -j REJECT; reach 8080; \
         {iptables} -t nat -S MESH | grep -c REDIRECT"
    );
    assert_eq!(filtering(node, &script), "no\nhello\nno\n1");
}

fn iptables_legacy(node: &Node) {
    if has(node, "iptables-legacy") {
        tables(node, "iptables-legacy");
    }
}

fn iptables_nft(node: &Node) {
    // nft alone does not make it: its compatibility layer is what counts, and no probe of ours tells that.
    if own() {
        tables(node, "iptables-nft");
    }
}

fn nft(node: &Node) {
    let script = "nft add table inet t; nft add chain inet t out '{ type filter hook output priority 0; }'; reach 8080; \
                  nft add rule inet t out tcp dport 8080 counter reject; reach 8080; nft list ruleset | grep -c 'counter packets [1-9]'";
    if has(node, "nftables") {
        assert_eq!(filtering(node, script), "hello\nno\n1");
    }
}

fn acl_of_an_image(node: &Node) {
    if !has(node, "acl") {
        return;
    }
    let image = node.image("debian-tools");
    let script = "getfacl -cn /acl/file; getfacl -cn /acl | grep default:user:1000; \
                  setpriv --reuid 1000 --regid 1000 --clear-groups cat /acl/file; \
                  setpriv --reuid 1001 --regid 1001 --clear-groups cat /acl/file 2>&1; \
                  touch /acl/new; getfacl -cn /acl/new | grep user:1000";
    let text = node.run(&["--rm"], &image, &["bash", "-c", script]).within(patience() * 3).ok().text();
    let lines: Vec<&str> = text.lines().map(|line| line.split('\t').next().unwrap_or_default().trim()).collect();
    assert_eq!(lines[..5], ["user::rw-", "user:1000:r--", "group::---", "mask::r--", "other::---"], "{text}");
    assert!(text.contains("default:user:1000:rwx") && text.contains("for user 1000\n"), "{text}");
    assert!(text.contains("/acl/file: Permission denied"), "{text}");
    // What is made in the upper inherits from what came with the image.
    assert!(lines.last().is_some_and(|line| line.starts_with("user:1000:rw")), "{text}");
}

/// Layers of pods, from here on; `None` where the kernel cannot check them, which must be said.
fn verified(node: &Node) -> Option<Configured<'_>> {
    let able = has(node, "verity");
    let verified = node.configure("rootfs.verity = \"on\"");
    if able {
        return Some(verified);
    }
    let refused = node.run(&["--rm"], BUSYBOX, &["true"]).run();
    assert_ne!(refused.code, 0, "{refused}");
    refused.expect_failure(&["the guest's kernel lacks verity"]);
    None
}

fn verified_layers(node: &Node) {
    let Some(verified) = verified(node) else { return };
    let c = node.detached(&[], BUSYBOX, &["sleep", "1000"]);
    assert_eq!(c.sh("echo whole > /new; cat /new; ls -d /sys/block/dm-*/dm | wc -l"), "whole\n1");
    assert_eq!(status(node, c.id())["damage"], serde_json::json!([]));
    c.remove();
    // One image over another, each of which is checked; what the small layer holds is in the first.
    let tools = node.image("debian-tools");
    let c = node.detached(&[], &tools, &["sleep", "1000"]);
    let first = c.sh(&format!("cat /acl/file; ls -d /sys/block/dm-*/dm | wc -l; sha256sum < {TEXT}"));
    assert!(first.starts_with("for user 1000\n2\n"), "{first}");
    c.remove();
    drop(verified);
    let script = format!("cat /acl/file; ls -d /sys/block/dm-*/dm 2>/dev/null | wc -l; sha256sum < {TEXT}");
    let second = node.run(&["--rm"], &tools, &["sh", "-c", &script]).within(patience() * 3).ok().text();
    assert_eq!(second, first.replace("\n2\n", "\n0\n"));
}

/// A file of debian-tools that no program reads by itself, and how it alone begins.
const TEXT: &str = "/usr/share/common-licenses/GPL-3";
const BEGINNING: &[u8] =
    b"                    GNU GENERAL PUBLIC LICENSE\n                       Version 3, 29 June 2007";

/// A byte changes on the host's disk while a pod runs.
fn damage_of_a_verified_layer(node: &Node) {
    let Some(verified) = verified(node) else { return };
    let image = node.image("debian-tools");
    let c = node.detached(&[], &image, &["sleep", "1000"]);
    flip(&node.path("nacelle/pods").join(NAMESPACE).join(c.id()).join("layers"), BEGINNING);
    let read = c.exec(&[], &["cat", TEXT]).run();
    assert_ne!(read.code, 0, "{read}");
    let read = read.expect_failure(&["Input/output error"]);
    assert!(!read.text().contains("GENERAL PUBLIC"), "{read}");
    assert_eq!(c.sh("cat /acl/file"), "for user 1000", "all the rest can be read");
    let told = nacelle_tests::command::within(patience(), "the damage in the status", || {
        status(node, c.id())["damage"].as_array().filter(|damage| !damage.is_empty()).cloned()
    });
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].as_str().is_some_and(|words| words.contains("differs from what was converted")), "{told:?}");
    c.remove();
    drop(verified);
    // The cache has seen it, too: the image is made again.
    let read = node.run(&["--rm"], &image, &["grep", "-c", "GNU GENERAL PUBLIC LICENSE$", TEXT]);
    assert_eq!(read.within(patience() * 3).ok().text(), "1");
}

/// Changes the first byte of a file that begins so, in the one image that has it.
fn flip(layers: &Path, beginning: &[u8]) {
    let mut flipped = 0;
    let images = fs::read_dir(layers).expect("the pod's layers").map(|entry| entry.expect("an entry").path());
    for path in images.filter(|path| path.extension().is_some_and(|kind| kind == "erofs")) {
        let bytes = fs::read(&path).expect("an image");
        // Files of more than a block begin at one.
        if let Some(block) = bytes.chunks(BLOCK).position(|block| block.starts_with(beginning)) {
            let file = fs::OpenOptions::new().write(true).open(&path).expect("an image");
            file.write_all_at(&[beginning[0] ^ 1], (block * BLOCK) as u64).expect("a changed byte");
            flipped += 1;
        }
    }
    assert_eq!(flipped, 1, "images with the file");
}

fn landlock(node: &Node) {
    if !has(node, "landlock") {
        return;
    }
    let image = node.image("debian-tools");
    let script = "touch /before && echo before; \
                  setpriv --landlock-access fs:make-reg touch /after 2>&1; test -e /after || echo refused";
    let text = node.run(&["--rm"], &image, &["bash", "-c", script]).within(patience() * 3).ok().text();
    assert!(text.starts_with("before\n") && text.contains("Permission denied") && text.ends_with("refused"), "{text}");
}

fn seccomp(node: &Node) {
    let run = node
        .run(&["--rm", "--seccomp"], BUSYBOX, &["sh", "-c", "grep Seccomp: /proc/self/status; dmesg 2>&1; true"])
        .ok();
    assert!(run.text().starts_with("Seccomp:\t2"), "{run}");
    assert!(run.text().contains("Operation not permitted"), "{run}");
}

fn swap_is_off_and_possible(node: &Node) {
    let script = format!("sed 1d /proc/swaps | wc -l; cat {OWN_CGROUP}/memory.swap.current 2>/dev/null || echo none");
    let run = node.run(&[&["--rm"], &CGROUP[..]].concat(), BUSYBOX, &["sh", "-c", &script]).ok();
    assert_eq!(run.text(), if has(node, "swap") { "0\n0" } else { "0\nnone" });
}
