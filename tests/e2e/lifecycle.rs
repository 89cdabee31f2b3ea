//! A task from its start to its deletion: every `ctr` command and the calls that have none.

use std::time::Duration;

use nacelle_tests::{
    command::{patience, within},
    node::{BUSYBOX, Node},
};
use serde_json::json;

use crate::Case;

pub const CASES: &[Case] = &[
    Case::new("run_prints_and_exits", run_prints_and_exits),
    Case::new("run_with_the_longest_name", run_with_the_longest_name),
    Case::new("run_passes_on_the_exit_code", run_passes_on_the_exit_code),
    Case::new("run_names_a_missing_binary", run_names_a_missing_binary),
    Case::new("exec_passes_on_exit_codes", exec_passes_on_exit_codes),
    Case::new("exec_names_a_missing_binary", exec_names_a_missing_binary),
    Case::new("kill_reaches_task_and_exec", kill_reaches_task_and_exec),
    Case::new("kill_all_reaches_every_process", kill_all_reaches_every_process),
    Case::new("pause_stops_the_clock_of_the_task", pause_stops_the_clock_of_the_task),
    Case::new("list_ps_metrics_and_update", list_ps_metrics_and_update),
    Case::new("wait_and_delete", wait_and_delete),
    Case::new("a_created_task_can_be_killed", a_created_task_can_be_killed),
    Case::new("wrong_states_are_refused", wrong_states_are_refused),
    Case::new("many_execs_at_once", many_execs_at_once),
];

/// Runs until it is told to end, and ends well then.
const UNTIL_TERM: &[&str] = &["sh", "-c", "trap 'exit 143' TERM; while :; do sleep 0.1; done"];

fn run_prints_and_exits(node: &Node) {
    let run = node.run(&["--rm"], BUSYBOX, &["sh", "-c", "echo out; echo err >&2"]).ok();
    assert_eq!(run.text(), "out");
    assert_eq!(run.err, "err\n");
}

/// 76 characters, which is what containerd allows.
fn run_with_the_longest_name(node: &Node) {
    let id = format!("{}-{}", "long".repeat(10), "name".repeat(8) + "end");
    assert_eq!(id.len(), 76);
    assert_eq!(node.run_as(&id, &["--rm"], BUSYBOX, &["echo", "ran"]).ok().text(), "ran");
}

fn run_passes_on_the_exit_code(node: &Node) {
    node.run(&["--rm"], BUSYBOX, &["sh", "-c", "exit 42"]).run().expect(42);
    node.run(&["--rm"], BUSYBOX, &["sh", "-c", "/no/such/file"]).run().expect(127);
}

fn run_names_a_missing_binary(node: &Node) {
    for (program, reason) in [("/no/such/binary", "no such file or directory"), ("/etc/passwd", "permission denied")] {
        let c = node.adopt(&node.fresh_id());
        node.run_as(c.id(), &["--rm"], BUSYBOX, &[program]).run().expect_failure(&[program, reason]);
        // It is found out at create, so nothing is left that its user would have to remove.
        assert_eq!(c.state(), None);
    }
}

fn exec_passes_on_exit_codes(node: &Node) {
    let c = node.resident();
    for (script, code) in [
        ("true", 0),
        ("false", 1),
        ("exit 42", 42),
        ("/no/such/file", 127),
        ("/etc/passwd", 126),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
    ] {
        c.exec(&[], &["sh", "-c", script]).run().expect(code);
    }
    let flags = ["--cwd", "/tmp", "--user", "1000:1000"];
    assert_eq!(c.exec(&flags, &["sh", "-c", "pwd; id -u"]).ok().text(), "/tmp\n1000");
}

fn exec_names_a_missing_binary(node: &Node) {
    let c = node.resident();
    c.exec(&[], &["/no/such/binary"]).run().expect_failure(&["/no/such/binary", "no such file or directory"]);
    c.exec(&[], &["true"]).ok();
}

fn kill_reaches_task_and_exec(node: &Node) {
    let c = node.detached(&[], BUSYBOX, UNTIL_TERM);
    for (signal, code) in [("TERM", 143), ("KILL", 137)] {
        let exec_id = format!("sleep-{signal}");
        let exec = c.exec_as(&exec_id, &[], &["sh", "-c", "echo ready; exec sleep 1000"]).spawn();
        exec.sees("ready", patience());
        node.ctr(["tasks", "kill", "-s", signal, "--exec-id", &exec_id, c.id()]).ok();
        exec.wait(patience()).expect(code);
    }
    c.kill("TERM");
    assert_eq!(c.wait(patience()).expect("wait"), 143);
    c.delete();

    let c = node.detached(&[], BUSYBOX, UNTIL_TERM);
    c.kill("KILL");
    assert_eq!(c.wait(patience()).expect("wait"), 137);
    c.delete();
}

fn kill_all_reaches_every_process(node: &Node) {
    let c = node.detached(&[], BUSYBOX, &["sleep", "1000"]);
    let exec = c.exec(&[], &["sh", "-c", "echo ready; exec sleep 1000"]).spawn();
    exec.sees("ready", patience());
    node.ctr(["tasks", "kill", "--all", "-s", "KILL", c.id()]).ok();
    exec.wait(patience()).expect(137);
    assert_eq!(c.wait(patience()).expect("wait"), 137);
    c.delete();
}

fn pause_stops_the_clock_of_the_task(node: &Node) {
    const PAUSE: Duration = Duration::from_secs(2);
    let ticker = "while :; do cut -d' ' -f1 /proc/uptime; sleep 0.05; done >/tmp/ticks";
    let c = node.detached(&[], BUSYBOX, &["sh", "-c", ticker]);
    let ticks = || c.sh("cat /tmp/ticks").lines().filter_map(|line| line.parse::<f64>().ok()).collect::<Vec<_>>();
    within(patience(), "the task ticks", || (ticks().len() > 2).then_some(()));
    node.ctr(["tasks", "pause", c.id()]).ok();
    assert_eq!(c.state().as_deref(), Some("PAUSED"));
    std::thread::sleep(PAUSE);
    node.ctr(["tasks", "resume", c.id()]).ok();
    assert_eq!(c.state().as_deref(), Some("RUNNING"));
    let resumed = ticks().len();
    within(patience(), "the task ticks on", || (ticks().len() > resumed).then_some(()));
    let ticks = ticks();
    let gap = ticks.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
    assert!(gap >= PAUSE.as_secs_f64(), "the longest gap is {gap:.2} s");
    c.remove();
}

fn list_ps_metrics_and_update(node: &Node) {
    let c = node.detached(&["--memory-limit", "100000000"], BUSYBOX, &["sleep", "1000"]);
    assert_eq!(c.state().as_deref(), Some("RUNNING"));
    let pid = c.pid();
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "{pid} is no process of this machine");
    let ps = node.ctr(["tasks", "ps", c.id()]).ok().text();
    assert!(ps.lines().count() >= 2, "no process listed:\n{ps}");

    // The kernel rounds limits down to pages.
    let limited_to = |bytes: u64| {
        let metrics = node.ctr(["tasks", "metrics", "--format", "json", c.id()]).ok().text();
        assert!(metrics.contains(&format!("{}", bytes / 4096 * 4096)), "no limit of {bytes} bytes in\n{metrics}");
        assert!(metrics.contains("usage"), "no usage in\n{metrics}");
    };
    limited_to(100_000_000);
    c.update(&json!({"memory": {"limit": 200_000_000}})).expect("update");
    limited_to(200_000_000);
    c.remove();
}

fn wait_and_delete(node: &Node) {
    let c = node.detached(&[], BUSYBOX, &["sh", "-c", "exit 3"]);
    assert_eq!(c.wait(patience()).expect("wait"), 3);
    assert_eq!(c.wait(patience()).expect("wait again, after the exit"), 3);
    assert_eq!(c.state().as_deref(), Some("STOPPED"));
    node.ctr(["tasks", "delete", c.id()]).ok();
    c.delete();
}

fn a_created_task_can_be_killed(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    c.create_task(&c.mounts()).expect("create a task");
    assert_eq!(c.state().as_deref(), Some("CREATED"));
    c.kill("KILL");
    assert_eq!(c.wait(patience()).expect("wait"), 137);
    c.delete();
}

fn wrong_states_are_refused(node: &Node) {
    let c = node.detached(&[], BUSYBOX, &["sleep", "1000"]);
    node.ctr(["tasks", "delete", c.id()]).run().expect_failure(&[]);
    let exec = c.exec_as("twice", &[], &["sh", "-c", "echo ready; exec sleep 1000"]).spawn();
    exec.sees("ready", patience());
    c.exec_as("twice", &[], &["true"]).run().expect_failure(&["already exists"]);
    c.kill("KILL");
    exec.wait(patience()).expect(137);
    c.wait(patience()).expect("wait");
    let refusal = c.try_kill().expect_err("a task that has ended").to_string();
    assert!(refusal.contains("status 5"), "NotFound says that it has ended already: {refusal}");
    c.exec(&[], &["true"]).run().expect_failure(&[]);
    c.delete();
}

fn many_execs_at_once(node: &Node) {
    let c = node.resident();
    let script = |n: u32| format!("echo {n}; exit {n}");
    let execs: Vec<_> = (1..=8).map(|n| (n, c.exec(&[], &["sh", "-c", &script(n)]).spawn())).collect();
    for (n, exec) in execs {
        assert_eq!(exec.wait(patience()).expect(n.cast_signed()).text(), n.to_string());
    }
}
