//! Bytes into and out of a container: none lost, none early, none late.

use std::{
    fs,
    hash::{DefaultHasher, Hasher},
    os::unix::fs::PermissionsExt,
    time::Duration,
};

use nacelle_tests::{
    command::{Running, eventually, patience, seconds, within},
    events::Events,
    node::{BUSYBOX, NAMESPACE, Node},
};
use rustix::process::Signal;

use crate::Case;

pub const CASES: &[Case] = &[
    Case::new("twenty_mebibytes_through_stdin", twenty_mebibytes_through_stdin),
    Case::new("a_burst_before_exit_is_not_lost", a_burst_before_exit_is_not_lost),
    Case::new("stdin_closes_while_stdout_stays", stdin_closes_while_stdout_stays),
    Case::new("exec_reads_and_writes", exec_reads_and_writes),
    Case::new("a_reader_that_stops_holds_up_nobody_else", a_reader_that_stops_holds_up_nobody_else),
    Case::new("terminal_of_a_task", terminal_of_a_task),
    Case::new("terminal_of_an_exec", terminal_of_an_exec),
    Case::new("attach_to_a_task", attach_to_a_task),
    Case::new("log_to_a_file", log_to_a_file),
    Case::new("log_to_a_program", log_to_a_program),
];

const MIB: usize = 1 << 20;

/// Bytes without a pattern that a lost or doubled block could hide in.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

fn twenty_mebibytes_through_stdin(node: &Node) {
    let sent = noise(20 * MIB);
    let run = node.run(&["--rm"], BUSYBOX, &["cat"]).stdin(sent.clone()).within(3 * patience()).ok();
    assert_eq!((run.out.len(), digest(&run.out)), (sent.len(), digest(&sent)), "length and digest of what came back");
}

fn a_burst_before_exit_is_not_lost(node: &Node) {
    let complete = |out: &[u8]| {
        assert_eq!(out.len(), 8 * MIB, "bytes that arrived");
        let wrong = out.iter().enumerate().find(|(at, byte)| at % 251 != usize::from(**byte));
        assert!(wrong.is_none(), "the first wrong byte is {wrong:?}");
    };
    let bytes = (8 * MIB).to_string();
    complete(&node.run(&["--rm"], BUSYBOX, &["probe", "write", &bytes]).ok().out);
    let c = node.resident();
    complete(&c.exec(&[], &["probe", "write", &bytes]).ok().out);
}

fn stdin_closes_while_stdout_stays(node: &Node) {
    let mut run = node.run(&["--rm"], BUSYBOX, &["sh", "-c", "cat; echo closed; sleep 1; echo late"]).spawn();
    run.write(b"first\n");
    run.sees("first\n", patience());
    assert!(!run.printed().contains("closed"), "stdin was closed before its writer closed it");
    run.close_stdin();
    let run = run.wait(patience()).expect(0);
    assert_eq!(run.text(), "first\nclosed\nlate");
}

fn exec_reads_and_writes(node: &Node) {
    let c = node.resident();
    let sent = noise(MIB);
    let exec = c.exec(&[], &["sh", "-c", "cat; echo err >&2"]).stdin(sent.clone()).ok();
    assert_eq!((exec.out.len(), digest(&exec.out)), (sent.len(), digest(&sent)), "length and digest of what came back");
    assert_eq!(exec.err, "err\n");
}

fn a_reader_that_stops_holds_up_nobody_else(node: &Node) {
    let c = node.resident();
    let events = Events::subscribe(node);
    // Nobody reads this one's FIFO: ctr is stopped, as soon as it is not in the middle of a call.
    let stuck = c.exec_as("stuck", &[], &["sh", "-c", "echo ready; exec cat /dev/zero"]).spawn();
    stuck.sees("ready", patience());
    events.wait(c.id(), patience(), |e| e.topic == "/tasks/exec-started");
    stuck.signal(Signal::STOP);
    assert_eq!(c.exec(&[], &["echo", "still here"]).within(seconds(30)).ok().text(), "still here");
    node.ctr(["tasks", "kill", "-s", "KILL", "--exec-id", "stuck", c.id()]).ok();
    stuck.signal(Signal::CONT);
    stuck.wait(patience()).expect(137);
}

fn terminal_of_a_task(node: &Node) {
    // A signal ends `read` without a line.
    let script = "test -t 0 && test -t 1 && echo is-a-terminal; trap 'stty size' WINCH; echo ready; \
                  while :; do read -r line; echo got-$line; [ \"$line\" = end ] && exit 7; done";
    let mut run = node.run(&["--rm", "-t"], BUSYBOX, &["sh", "-c", script]).spawn_on_terminal(91, 37);
    run.sees("is-a-terminal", patience());
    run.sees("ready", patience());
    run.write(b"first\n");
    run.sees("got-first", patience());
    resize(&run, "41 101");
    run.write(b"end\n");
    run.wait(patience()).expect(7);
}

fn terminal_of_an_exec(node: &Node) {
    let c = node.resident();
    let mut exec = c.exec(&["-t"], &["sh"]).spawn_on_terminal(91, 37);
    exec.write(b"test -t 1 && echo is-a-$((1))-terminal\n");
    exec.sees("is-a-1-terminal", patience());
    // The terminal echoes the command, but not its output.
    exec.write(b"until [ \"$(stty size)\" = '41 101' ]; do sleep 0.1; done; echo size-$((2))\n");
    resize(&exec, "size-2");
    // The interrupt character reaches the foreground process of the terminal, not the shell.
    exec.write(b"sh -c 'echo sleeping-$((1)); sleep 1000'\n");
    exec.sees("sleeping-1", patience());
    exec.write(b"\x03");
    exec.write(b"echo interrupted-$((3)); exit 5\n");
    exec.sees("interrupted-3", patience());
    exec.wait(patience()).expect(5);
}

/// Changes the size to 101 × 41 until `text` is printed: ctr listens for changes only some time after the start.
fn resize(running: &Running, text: &str) {
    within(patience(), text, || {
        running.resize(101, 41);
        eventually(Duration::from_millis(500), || running.printed().contains(text).then_some(()))
    });
}

fn attach_to_a_task(node: &Node) {
    let c = node.detached(&[], BUSYBOX, &["sh", "-c", "while read -r line; do echo got-$line; done"]);
    let mut attached = c.attach();
    attached.write(b"one\n");
    attached.sees("got-one", patience());
    drop(attached);
    // A client that goes away is not an end of file, and the next one takes over.
    let mut attached = c.attach();
    attached.write(b"two\n");
    attached.sees("got-two", patience());
    drop(attached);
    c.remove();
}

fn log_to_a_file(node: &Node) {
    let log = node.path("task.log");
    let uri = format!("file://{}", log.display());
    let c = node.detached(&["--log-uri", &uri], BUSYBOX, &["sh", "-c", "echo out; echo err >&2"]);
    c.wait(patience()).expect("wait");
    c.delete();
    let mut lines: Vec<_> = fs::read_to_string(&log).expect("read the log").lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["err", "out"]);
}

fn log_to_a_program(node: &Node) {
    let (program, log) = (node.path("logger"), node.path("logger.log"));
    // A logger gets stdout and stderr as descriptors 3 and 4, and says by closing 5 that it is ready. It is told to end
    // by SIGTERM, but has to read to the end first.
    let script = "#!/bin/sh\ntrap '' TERM\nexec >\"$2\" 2>&1\necho \"$1 $CONTAINER_NAMESPACE $CONTAINER_ID\"\nexec 5>&-\n\
                  sed s/^/out:/ <&3 &\nsed s/^/err:/ <&4 &\nwait\necho complete\n";
    fs::write(&program, script).expect("write the logger");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("make the logger executable");
    let uri = format!("binary://{}?to={}", program.display(), log.display());
    let c = node.detached(&["--log-uri", &uri], BUSYBOX, &["sh", "-c", "echo a; echo b >&2; seq 10000"]);
    c.wait(patience()).expect("wait");
    let id = c.id().to_owned();
    c.delete();
    let log = within(patience(), "the logger ends", || {
        fs::read_to_string(&log).ok().filter(|text| text.contains("complete"))
    });
    assert_eq!(log.lines().next(), Some(format!("to {} {id}", NAMESPACE).as_str()), "arguments and environment");
    assert!(log.contains("out:a\n") && log.contains("err:b\n"), "{log}");
    assert_eq!(log.lines().filter(|line| line.starts_with("out:")).count(), 10_001, "lines of stdout");
}
