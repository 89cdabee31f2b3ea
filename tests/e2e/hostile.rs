//! Guests that lie, flood and stall, and containers that take all they can get, beside a container that goes on as if
//! nothing were: its execs are answered, the shim of the hostile guest stays small, the hostile pod ends with a reason, and
//! the harness finds nothing left.

use std::{fs, path::PathBuf, time::Duration};

use hostile_guest::{BEHAVIOURS, Behaviour, Fate};
use nacelle_tests::{
    command::{patience, within},
    node::{BUSYBOX, Container, Node},
};

use crate::Case;

const NO_GUEST: &str = "it has no guest";

/// Guests that are found out before their first container is there.
pub const UNBORN: &[Case] = &[Case::only_nacelle("unborn_guests", unborn_guests, NO_GUEST)];

pub const CASES: &[Case] = &[
    Case::only_nacelle("guests", born_guests, NO_GUEST),
    Case::new("a_fork_bomb", a_fork_bomb),
    Case::new("a_hog", a_hog),
];

/// Most that a shim may ever have held of the host's memory: one that is let alone has a tenth of it.
const SHIM_MEMORY: u64 = 64 << 20;

/// Played in the tests of the shim only, with its short deadlines.
const TOO_SLOW: &[&str] = &["answers-too-late", "export-without-an-end"];

/// How long the pod of a guest that does not end its container may take, by the shim's word.
const OBEDIENCE: Duration = Duration::from_secs(30);

/// The program that is PID 1 of a hostile guest.
fn program() -> PathBuf {
    std::env::var_os("NACELLE_HOSTILE").map_or_else(|| "/opt/payload/hostile-guest".into(), PathBuf::from)
}

/// The container beside it still answers.
fn neighbour_works(resident: &Container<'_>) {
    assert_eq!(resident.sh("echo alive"), "alive");
}

/// Peak of the resident memory of the shim of container `id`, bytes: VmHWM of proc_pid_status(5).
fn shim_peak(id: &str) -> u64 {
    for entry in fs::read_dir("/proc").expect("list /proc").flatten() {
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> = words.split(|byte| *byte == 0).collect();
        if !words.contains(&id.as_bytes()) || !words[0].ends_with(b"containerd-shim-nacelle-v2") {
            continue;
        }
        let status = fs::read_to_string(entry.path().join("status")).expect("read status");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
        return peak.trim_end_matches("kB").trim().parse::<u64>().expect("a number") << 10;
    }
    panic!("there is no shim for {id}");
}

fn unborn_guests(node: &Node) {
    guests(node, |fate| matches!(fate, Fate::Unborn(_)));
}

fn born_guests(node: &Node) {
    guests(node, |fate| !matches!(fate, Fate::Unborn(_)));
}

fn guests(node: &Node, which: impl Fn(Fate) -> bool) {
    let resident = node.resident();
    let wanted = std::env::var("NACELLE_BEHAVIOURS").unwrap_or_default();
    let named = |name: &str| wanted.is_empty() || wanted.split(',').any(|one| one == name);
    let chosen = |b: &&Behaviour| which(b.fate) && named(b.name) && !TOO_SLOW.contains(&b.name);
    for behaviour in BEHAVIOURS.iter().filter(chosen) {
        let Behaviour { name, fate } = *behaviour;
        eprintln!("    {name}");
        let log = node.log_length();
        let mut lines = format!("vm.agent = {:?}\nvm.kernel_args = [\"hostile={name}\"]", program());
        if fate == Fate::Unborn("nothing heard from the guest") {
            // Whether it has booted by then or not.
            lines += "\nvm.boot_timeout_seconds = 10";
        }
        let configured = node.configure(&lines);
        let c = node.created(&[], BUSYBOX, &["sleep", "1000000"]);
        match fate {
            Fate::Unborn(words) => {
                let started = c.start(&["--detach"]).run();
                // ctr leaves control characters and line ends as they are.
                started.expect_failure(&[words.split(':').next_back().unwrap_or_default().trim()]);
                drop(configured);
                neighbour_works(&resident);
            }
            _ => {
                let started = c.start(&["--detach"]).run();
                drop(configured);
                if matches!(fate, Fate::Ended(_) | Fate::EndedWhenAsked(_)) && started.code != 0 {
                    // Found out before its container was there.
                    neighbour_works(&resident);
                } else {
                    hostile(node, &resident, &c, behaviour);
                }
                // Clients are told the half of it: `ctr tasks metrics` that there are none.
                if let Fate::Ended(words) | Fate::EndedWhenAsked(words) | Fate::Fails(words) = fate {
                    // Of files that do not come the exit does not wait for the word.
                    let said = || node.logged_since(log, words).then_some(());
                    within(patience(), &format!("{name}: somebody says {words:?}"), said);
                }
            }
        }
        c.delete();
    }
}

/// What follows once the container of a hostile guest has been created.
fn hostile(node: &Node, resident: &Container<'_>, c: &Container<'_>, behaviour: &Behaviour) {
    let Behaviour { name, fate } = *behaviour;
    neighbour_works(resident);
    for what in ["ps", "metrics"] {
        // It may fail, or be answered with nonsense; it must be answered.
        node.ctr(["tasks", what, c.id()]).run();
    }
    neighbour_works(resident);
    let peak = shim_peak(c.id());
    assert!(peak < SHIM_MEMORY, "{name}: its shim has held {} MiB", peak >> 20);
    if !matches!(fate, Fate::Ended(_)) {
        // It may have ended already.
        c.try_kill().ok();
    }
    let code = c.wait(OBEDIENCE + patience()).unwrap_or_else(|e| panic!("{name}: wait: {e}"));
    let early = name == "exits-before-the-start-and-again";
    assert!(code == 137 || early, "{name}: exit code {code}");
    neighbour_works(resident);
}

/// A container that takes what it can: its neighbour does not notice, and it ends when it is told to.
fn greedy(node: &Node, script: &str) {
    let resident = node.resident();
    let c = node.detached(&[], BUSYBOX, &["sh", "-c", script]);
    for _ in 0..5 {
        neighbour_works(&resident);
        std::thread::sleep(Duration::from_millis(500));
    }
    // Its machine may have given up before.
    c.try_kill().ok();
    let code = c.wait(OBEDIENCE + patience()).expect("wait");
    assert_ne!(code, 0);
    neighbour_works(&resident);
    c.delete();
}

fn a_fork_bomb(node: &Node) {
    greedy(node, "bomb() { bomb | bomb & }; bomb; sleep 1000000");
}

fn a_hog(node: &Node) {
    greedy(node, "dd if=/dev/zero of=/dev/shm/x bs=1M & tail /dev/zero");
}
