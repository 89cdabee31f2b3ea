//! Many containers, at once and one after the other.

use std::fs;

use nacelle_tests::{
    command::{patience, seconds},
    node::{BUSYBOX, Node},
};

use crate::Case;

pub const CASES: &[Case] =
    &[Case::new("eight_at_once", eight_at_once), Case::new("a_shim_does_not_grow", a_shim_does_not_grow)];

pub const LONG: &[Case] = &[Case::new("fifty_one_after_the_other", fifty_one_after_the_other)];

fn eight_at_once(node: &Node) {
    let runs: Vec<_> = (0..8)
        .map(|n| (n, node.run(&["--rm"], BUSYBOX, &["sh", "-c", &format!("echo {n}; sleep 1; exit {n}")]).spawn()))
        .collect();
    for (n, run) in runs {
        assert_eq!(run.wait(patience() * 3).expect(n).text(), n.to_string());
    }
}

/// `NACELLE_LOAD` makes it fewer, or more.
fn fifty_one_after_the_other(node: &Node) {
    let count = std::env::var("NACELLE_LOAD").map_or(50, |n| n.parse().expect("NACELLE_LOAD is a number"));
    for n in 0..count {
        assert_eq!(node.run(&["--rm"], BUSYBOX, &["echo", "hello"]).ok().text(), "hello", "container {n}");
    }
}

/// Resident memory of the shim of a container, in KiB.
fn shim_memory(id: &str) -> u64 {
    let processes = fs::read_dir("/proc").expect("list /proc").flatten();
    let shim = processes.map(|entry| entry.path()).find(|dir| {
        let command = fs::read(dir.join("cmdline")).unwrap_or_default();
        let mut words = command.split(|byte| *byte == 0);
        words.next().is_some_and(|program| program.windows(16).any(|w| w == b"containerd-shim-"))
            && words.any(|word| word == id.as_bytes())
    });
    let status = shim.and_then(|dir| fs::read_to_string(dir.join("status")).ok()).expect("the container has a shim");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("processes have a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn a_shim_does_not_grow(node: &Node) {
    const MEBIBYTE: u64 = 1024;
    let c = node.detached(&[], BUSYBOX, &["sleep", "1000"]);
    let some_execs = || {
        for _ in 0..25 {
            let exec = c.exec(&[], &["sh", "-c", "dd if=/dev/zero bs=64k count=16 2>/dev/null"]);
            assert_eq!(exec.within(seconds(30)).ok().out.len(), 1 << 20);
        }
        shim_memory(c.id())
    };
    let first = some_execs();
    let second = some_execs();
    assert!(second <= first + 2 * MEBIBYTE, "the shim grew from {first} KiB to {second} KiB in 25 execs");
    c.remove();
}
