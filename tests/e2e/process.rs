//! What a process finds when it starts: everything the OCI spec says about it.

use std::collections::BTreeMap;

use nacelle_tests::{
    command::patience,
    events::Events,
    node::{BUSYBOX, Node},
};
use serde_json::json;

use crate::Case;

pub const CASES: &[Case] = &[
    Case::new("environment_directory_user_and_hostname", environment_directory_user_and_hostname),
    Case::new("capabilities", capabilities),
    Case::new("rlimits_sysctls_and_paths", rlimits_sysctls_and_paths),
    Case::new("seccomp", seccomp),
    Case::new("devices_and_pseudo_file_systems", devices_and_pseudo_file_systems),
    Case::new("out_of_memory_is_reported", out_of_memory_is_reported),
    Case::new("out_of_memory_of_an_exec_spares_the_task", out_of_memory_of_an_exec_spares_the_task),
    Case::new("limits_of_processes", limits_of_processes),
    Case::new("orphans_are_reaped", orphans_are_reaped),
];

/// Runs a script whose lines are `name=value`.
fn facts(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once('=')).collect()
}

fn environment_directory_user_and_hostname(node: &Node) {
    let script = "echo word=$WORD; echo empty=[$EMPTY]; echo cwd=$(pwd); echo uid=$(id -u); echo gid=$(id -g); \
                  echo groups=$(id -G); echo host=$(hostname); echo umask=$(umask)";
    let c = node.created(
        &["--env", "WORD=two words", "--env", "EMPTY=", "--cwd", "/tmp", "--hostname", "somewhere"],
        BUSYBOX,
        &["sh", "-c", script],
    );
    c.edit(|spec| {
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [2000, 3000], "umask": 0o027});
    });
    let text = c.start(&[]).ok().text();
    let facts = facts(&text);
    let expected = [
        ("word", "two words"),
        ("empty", "[]"),
        ("cwd", "/tmp"),
        ("uid", "1000"),
        ("gid", "1001"),
        ("groups", "1001 2000 3000"),
        ("host", "somewhere"),
        ("umask", "0027"),
    ];
    for (name, value) in expected {
        assert_eq!(facts.get(name), Some(&value), "{name} in\n{text}");
    }
    c.delete();
}

fn capabilities(node: &Node) {
    let sets = |text: &str, name: &str| {
        let line =
            text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
        u64::from_str_radix(line.trim(), 16).expect("a number")
    };
    const CHOWN: u64 = 1 << 0;
    const NET_ADMIN: u64 = 1 << 12;
    let c = node.detached(&["--cap-drop", "CAP_CHOWN", "--cap-add", "CAP_NET_ADMIN"], BUSYBOX, &["sleep", "1000"]);
    let status = c.sh("cat /proc/1/status; touch /tmp/file; chown 1 /tmp/file 2>/dev/null || echo refused");
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        let caps = sets(&status, set);
        assert_eq!((caps & CHOWN, caps & NET_ADMIN), (0, NET_ADMIN), "{set} {caps:x}");
    }
    assert!(status.contains("refused"), "chown without CAP_CHOWN");
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    c.remove();

    let c = node.created(&[], BUSYBOX, &["cat", "/proc/self/status"]);
    c.edit(|spec| {
        spec["process"]["capabilities"] = json!({});
        spec["process"]["noNewPrivileges"] = json!(false);
    });
    let status = c.start(&[]).ok().text();
    for set in ["CapEff:", "CapPrm:", "CapBnd:", "CapInh:", "CapAmb:"] {
        assert_eq!(sets(&status, set), 0, "{set}");
    }
    assert!(status.contains("NoNewPrivs:\t0"), "{status}");
    c.delete();
}

fn rlimits_sysctls_and_paths(node: &Node) {
    let script = "echo soft=$(ulimit -S -n); echo hard=$(ulimit -H -n); echo core=$(ulimit -H -c); \
                  echo shmmax=$(cat /proc/sys/kernel/shmmax); echo forward=$(cat /proc/sys/net/ipv4/ip_forward); \
                  echo masked=$(cat /proc/kcore | wc -c); echo maskeddir=$(ls /sys/kernel | wc -l); \
                  echo readonly=$(echo 1 2>/dev/null >/proc/sys/kernel/shmmax && echo written || echo refused)";
    let c = node.created(&[], BUSYBOX, &["sh", "-c", script]);
    c.edit(|spec| {
        spec["process"]["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        ]);
        spec["linux"]["sysctl"] = json!({"kernel.shmmax": "12345678", "net.ipv4.ip_forward": "1"});
        spec["linux"]["maskedPaths"] = json!(["/proc/kcore", "/sys/kernel", "/no/such/path"]);
        spec["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
    });
    let text = c.start(&[]).ok().text();
    let facts = facts(&text);
    let expected = [
        ("soft", "123"),
        ("hard", "456"),
        ("core", "0"),
        ("shmmax", "12345678"),
        ("forward", "1"),
        ("masked", "0"),
        ("maskeddir", "0"),
        ("readonly", "refused"),
    ];
    for (name, value) in expected {
        assert_eq!(facts.get(name), Some(&value), "{name} in\n{text}");
    }
    c.delete();
}

fn seccomp(node: &Node) {
    let script = "mkdir /tmp/x 2>&1 || echo refused; touch /tmp/y && echo touched; grep Seccomp: /proc/self/status";
    let c = node.created(&[], BUSYBOX, &["sh", "-c", script]);
    c.edit(|spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99}],
        });
    });
    let text = c.start(&[]).ok().text();
    // 99 is EADDRNOTAVAIL: nothing else could have said this.
    assert!(text.contains("not available") || text.contains("Cannot assign requested address"), "{text}");
    assert!(text.contains("refused") && text.contains("touched"), "{text}");
    assert!(text.contains("Seccomp:\t2"), "{text}");
    c.delete();

    // The profile that docker and containerd use by default must load and let ordinary programs run.
    let run =
        node.run(&["--rm", "--seccomp"], BUSYBOX, &["sh", "-c", "ls / >/dev/null; grep Seccomp: /proc/self/status"]);
    assert_eq!(run.ok().text(), "Seccomp:\t2");
}

fn devices_and_pseudo_file_systems(node: &Node) {
    let script = "for d in null zero full random urandom tty; do test -c /dev/$d || echo missing $d; done; \
                  echo x >/dev/null; test $(head -c 5 /dev/zero | wc -c) = 5 || echo zero is broken; \
                  test -L /dev/fd || echo missing fd; test -d /dev/pts || echo missing pts; \
                  echo x >/dev/shm/x || echo no shm; \
                  for m in /proc /sys /dev /dev/pts /dev/shm /dev/mqueue /run; do \
                      grep -q \" $m \" /proc/mounts || echo $m is not mounted; done; \
                  test $(ps | grep -c '[s]h -c') -ge 1 || echo sees no process; test $$ = 1 || echo is not PID 1";
    let run = node.run(&["--rm"], BUSYBOX, &["sh", "-c", script]).ok();
    assert_eq!(run.text(), "");
}

fn out_of_memory_is_reported(node: &Node) {
    let events = Events::subscribe(node);
    let c = node.detached(&["--memory-limit", "33554432"], BUSYBOX, &["probe", "alloc", "200"]);
    assert_eq!(c.wait(patience()).expect("wait"), 137);
    assert_eq!(events.exit_of(c.id(), patience()), 137);
    let topics: Vec<_> = events.of(c.id()).into_iter().map(|e| e.topic).collect();
    let place = |topic| topics.iter().position(|t| t == topic);
    assert!(place("/tasks/oom").is_some() && place("/tasks/oom") < place("/tasks/exit"), "{topics:?}");
    c.delete();
}

fn out_of_memory_of_an_exec_spares_the_task(node: &Node) {
    let events = Events::subscribe(node);
    let c = node.detached(&["--memory-limit", "67108864"], BUSYBOX, &["sleep", "1000"]);
    c.exec(&[], &["probe", "alloc", "200"]).run().expect(137);
    events.wait(c.id(), patience(), |e| e.topic == "/tasks/oom");
    assert_eq!(c.sh("echo alive"), "alive");
    c.remove();
}

fn limits_of_processes(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["sh", "-c", "for i in $(seq 40); do sleep 3 & done; wait"]);
    c.edit(|spec| spec["linux"]["resources"]["pids"] = json!({"limit": 20}));
    let run = c.start(&[]).run();
    assert!(run.err.contains("fork"), "more than 20 processes: {run}");
    c.delete();
}

fn orphans_are_reaped(node: &Node) {
    let events = Events::subscribe(node);
    // The grandchild outlives its parent, and the container's first process outlives both.
    let c = node.detached(&[], BUSYBOX, &["sh", "-c", "(sleep 0.2 & true); sleep 1; exit 9"]);
    assert_eq!(c.wait(patience()).expect("wait"), 9);
    events.wait(c.id(), patience(), |e| e.topic == "/tasks/exit");
    let exits = events.of(c.id()).iter().filter(|e| e.topic == "/tasks/exit").count();
    assert_eq!(exits, 1, "orphans have no exit events");
    c.delete();
}
