//! Sudden deaths: of the VMM, the shim, containerd and the agent, each while work is running. Exits are reported,
//! nobody waits for long, and the harness finds nothing left.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use nacelle_tests::{
    command::{eventually, patience, seconds, within},
    events::Events,
    node::{BUSYBOX, Container, Node},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::Case;

const NO_VMM: &str = "it has no VMM and no agent";

pub const CASES: &[Case] = &[
    Case::only_nacelle("of_the_vmm", of_the_vmm, NO_VMM),
    Case::only_nacelle("of_the_agent", of_the_agent, NO_VMM),
    Case::only_nacelle("of_the_vmm_while_it_boots", of_the_vmm_while_it_boots, NO_VMM),
    Case::only_nacelle("of_the_shim", of_the_shim, "its shim leaves the socket"),
    Case::new("of_containerd", of_containerd),
    Case::new("of_containerd_before_the_task_exits", of_containerd_before_the_task_exits),
    Case::new("of_the_client", of_the_client),
];

/// How long anybody may wait for news of a death.
fn limit() -> Duration {
    seconds(5)
}

/// Computes and writes for ever.
const BUSY: &[&str] = &["sh", "-c", "while :; do dd if=/dev/urandom of=/tmp/noise bs=64k count=16 2>/dev/null; done"];

/// Processes whose command line or name contains `text`.
fn processes(text: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("list /proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let matches = |pid: &u32| {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let words = fs::read(dir.join("cmdline")).unwrap_or_default();
        let name = fs::read_to_string(dir.join("comm")).unwrap_or_default();
        String::from_utf8_lossy(&words).replace('\0', " ").contains(text) || name.contains(text)
    };
    pids.filter(matches).collect()
}

fn kill(pids: &[u32]) {
    assert!(!pids.is_empty(), "there is no process to kill");
    for pid in pids {
        let pid = Pid::from_raw(pid.cast_signed()).expect("process ids are positive");
        // One of them may end by the death of another.
        kill_process(pid, Signal::KILL).ok();
    }
}

/// The VMMs that run; a test tells its own by asking before and after.
fn vmms() -> Vec<u32> {
    processes("nacelle-vmm")
}

fn vmms_but(others: &[u32]) -> Vec<u32> {
    vmms().into_iter().filter(|pid| !others.contains(pid)).collect()
}

fn kill_shim(id: &str) {
    let shims = processes(&format!("-id {id} "));
    kill(&if shims.is_empty() { processes(&format!("-id {id}")) } else { shims });
}

/// The machine below a busy container and a busy exec dies by `death`: everybody is told in time.
fn machine_dies(node: &Node, container: &Container, death: impl FnOnce()) {
    let events = Events::subscribe(node);
    let exec = container.exec(&[], &["sh", "-c", "echo ready; while :; do echo tick; sleep 0.1; done"]).spawn();
    exec.sees("ready", patience());
    death();
    events.wait(container.id(), limit(), |e| e.topic == "/tasks/exit" && e.fields["id"] == container.id());
    let exec = exec.wait(patience() + limit());
    assert_ne!(exec.code, 0, "an exec in a machine that died: {exec}");
    let code = container.wait(limit()).expect("wait");
    assert_ne!(code, 0, "exit code of a task whose machine died");
    assert_eq!(container.state().as_deref(), Some("STOPPED"));
    let late = container.exec(&[], &["true"]).within(limit() + limit()).run();
    assert_ne!(late.code, 0, "an exec in a machine that is dead: {late}");
}

fn of_the_vmm(node: &Node) {
    let others = vmms();
    let c = node.detached(&[], BUSYBOX, BUSY);
    machine_dies(node, &c, || kill(&vmms_but(&others)));
    c.delete();
}

fn of_the_agent(node: &Node) {
    // A container in the guest's own PID namespace, with every right: PID 1 is the agent, and its code is overwritten.
    let c = node.created(&["--privileged"], BUSYBOX, BUSY);
    c.edit(|spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("a list");
        namespaces.retain(|namespace| namespace["type"] != "pid");
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
    });
    c.start(&["--detach"]).ok();
    let script = "set -e; range=$(awk '$2 ~ /x/ { print $1; exit }' /proc/1/maps); start=$((0x${range%-*} / 4096)); \
                  end=$((0x${range#*-} / 4096)); \
                  dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$start count=$((end - start)) conv=notrunc 2>&1";
    machine_dies(node, &c, || drop(c.exec(&[], &["sh", "-c", script]).spawn().wait(patience())));
    c.delete();
}

fn of_the_vmm_while_it_boots(node: &Node) {
    let id = node.fresh_id();
    let c = node.adopt(&id);
    let run = node.run_as(&id, &[], BUSYBOX, &["sleep", "1000"]).spawn();
    // By the name that it gives itself: the process that forks it has the same command line, and is gone soon.
    let name = format!("VM:{id}");
    kill(&within(patience(), "a VMM runs", || Some(processes(&name)).filter(|found| !found.is_empty())));
    run.wait(patience()).expect_failure(&["VMM"]);
    c.delete();
}

fn of_the_shim(node: &Node) {
    let events = Events::subscribe(node);
    // containerd deletes the task itself, so no client would remove FIFOs.
    let c = node.detached(&["--null-io"], BUSYBOX, BUSY);
    kill_shim(c.id());
    assert_eq!(events.exit_of(c.id(), limit()), 137);
    events.wait(c.id(), limit(), |e| e.topic == "/tasks/delete");
    let gone = eventually(limit(), || c.state().is_none().then_some(()));
    assert!(gone.is_some(), "containerd still lists the task");
    c.delete();
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

fn grows(path: &Path) {
    let before = lines(path);
    within(patience(), "the log grows", || (lines(path) > before + 2).then_some(()));
}

fn of_containerd(node: &Node) {
    let log = node.path("ticks.log");
    let uri = format!("file://{}", log.display());
    let logged = node.detached(&["--log-uri", &uri], BUSYBOX, &["sh", "-c", "while :; do echo tick; sleep 0.1; done"]);
    let echo = node.detached(&[], BUSYBOX, &["sh", "-c", "while read -r line; do echo got-$line; done"]);
    grows(&log);
    node.kill_containerd();
    grows(&log);
    node.start_containerd();

    for c in [&logged, &echo] {
        assert_eq!(c.state().as_deref(), Some("RUNNING"), "{}", c.id());
        assert_eq!(c.sh("echo alive"), "alive");
    }
    grows(&log);
    let mut attached = echo.attach();
    attached.write(b"word\n");
    attached.sees("got-word", patience());
    drop(attached);
    let events = Events::subscribe(node);
    let id = logged.id().to_owned();
    logged.remove();
    assert_eq!(events.exit_of(&id, limit()), 137);
    echo.remove();
}

fn of_containerd_before_the_task_exits(node: &Node) {
    let marker = node.path("marker");
    fs::create_dir_all(&marker).expect("make a directory");
    let mount = format!("type=bind,src={},dst=/marker,options=rbind:rw", marker.display());
    let script = "until test -e /marker/go; do sleep 0.1; done; touch /marker/gone; exit 6";
    let c = node.detached(&["--null-io", "--mount", &mount], BUSYBOX, &["sh", "-c", script]);
    node.kill_containerd();
    fs::write(marker.join("go"), "").expect("write a file");
    within(patience(), "the task ends", || marker.join("gone").exists().then_some(()));
    node.start_containerd();
    // A task without processes may be gone after a restart; it must not be there with another status.
    match c.wait(limit()) {
        Ok(code) => assert_eq!(code, 6),
        Err(error) => assert!(error.to_string().contains("not found"), "{error}"),
    }
    c.delete();
}

fn of_the_client(node: &Node) {
    let id = node.fresh_id();
    let c = node.adopt(&id);
    let mut run = node.run_as(&id, &[], BUSYBOX, &["sh", "-c", "while :; do echo tick; sleep 0.1; done"]).spawn();
    run.sees("tick", patience());
    run.write(b"never read\n");
    run.signal(Signal::KILL);
    run.wait(patience()).expect(137);
    assert_eq!(c.state().as_deref(), Some("RUNNING"));
    assert_eq!(c.sh("echo alive"), "alive");
    c.attach().sees("tick", patience());
    c.remove();
}
