//! nacelle as its users meet it: a real containerd, driven by `ctr` and containerd's API, with real virtual machines.
//! Needs root and a usable `/dev/kvm`, so it is not part of a plain `cargo test`; `hack/test` runs it in the testbed.
//!
//! Environment: `NACELLE_CONTAINERD` (`1.7` or `2.1`), `NACELLE_CONTAINERD_BIN` (directory of the binaries instead),
//! `NACELLE_RUNTIME` (the runtime under test), `NACELLE_IMAGES` (directory of the image archives), `NACELLE_E2E_DIR`,
//! `NACELLE_KERNEL` (`own` or `libkrunfw`), `NACELLE_VCPUS` (of every machine), `NACELLE_SLOWNESS` (how much slower than an
//! idle machine this one is), `NACELLE_HOSTILE` (the program of hostile guests), `NACELLE_BEHAVIOURS` (which of theirs to
//! play, with commas between; all without it).
//!
//! The harness is libtest-mimic, as two things are beyond the standard one: containerd must end with the tests, and
//! what is ignored depends on the runtime. Every test must leave the node as it found it; the harness looks.

mod bad_input;
mod contract;
mod crash;
mod disks;
mod events;
mod files;
mod hooks;
mod hostile;
mod jail;
mod kernel;
mod layers;
mod lifecycle;
mod load;
mod network;
mod pod_network;
mod process;
mod rootfs;
mod stdio;

use std::{
    panic::{self, AssertUnwindSafe},
    process::ExitCode,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Failed, Trial};
use nacelle_tests::{
    command::seconds,
    leftovers::Leftovers,
    node::{FIFOS, Node, RESIDENT, containerd},
};

/// One test.
pub struct Case {
    name: &'static str,
    run: fn(&Node),
    only_nacelle: Option<&'static str>,
}

impl Case {
    /// A test that any runtime of containerd must pass.
    const fn new(name: &'static str, run: fn(&Node)) -> Self {
        Self { name, run, only_nacelle: None }
    }

    /// A test that makes sense with nacelle only, and why. Another runtime serves to try the tests themselves.
    const fn only_nacelle(name: &'static str, run: fn(&Node), why: &'static str) -> Self {
        Self { name, run, only_nacelle: Some(why) }
    }
}

/// What a theme has to do with containerd.
#[derive(Clone, Copy)]
enum Beside {
    /// It runs with every version.
    Each,
    /// containerd has no part in it, so one version is enough: this one.
    Only(&'static str),
}

/// The tests by theme. The themes that need one version are shared out between both, so that they end at about the same time.
const THEMES: &[(&str, Beside, &[Case])] = &[
    ("lifecycle", Beside::Each, lifecycle::CASES),
    ("stdio", Beside::Each, stdio::CASES),
    ("process", Beside::Each, process::CASES),
    ("rootfs", Beside::Each, rootfs::CASES),
    ("files", Beside::Each, files::CASES),
    ("rootfs", Beside::Only("1.7"), rootfs::PACKAGES),
    ("layers", Beside::Only("2.1"), layers::CASES),
    ("disks", Beside::Only("2.1"), disks::CASES),
    ("events", Beside::Each, events::CASES),
    ("hooks", Beside::Each, hooks::CASES),
    ("contract", Beside::Each, contract::CASES),
    ("bad_input", Beside::Each, bad_input::CASES),
    ("crash", Beside::Each, crash::CASES),
    ("hostile", Beside::Only("2.1"), hostile::UNBORN),
    ("hostile", Beside::Only("1.7"), hostile::CASES),
    ("jail", Beside::Only("1.7"), jail::CASES),
    ("network", Beside::Each, network::CASES),
    ("kernel", Beside::Each, kernel::CASES),
    ("pod_network", Beside::Only("1.7"), pod_network::CASES),
    ("load", Beside::Each, load::CASES),
    ("load", Beside::Only("2.1"), load::LONG),
];

/// How long after a test the last of it may still be there.
fn grace() -> Duration {
    seconds(5)
}

/// The node, started by the first test that runs; the lock lets one test run at a time.
static NODE: Mutex<Option<Node>> = Mutex::new(None);

/// What the last panic said, and where it was.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

static TIMES: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// Tests that passed at the second try only.
static UNSTEADY: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let clean = Leftovers::scan(&[]);
    // A test that fails panics; the harness tells of it, with the rest of what it knows.
    panic::set_hook(Box::new(|panic| *LAST_PANIC.lock().expect("nothing panics here") = panic.to_string()));
    // Who names tests wants them, whichever version is there.
    let conclusion = libtest_mimic::run(&arguments, trials(arguments.filter.is_some()));
    if let Some(node) = NODE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        node.delete_everything();
    }

    let mut times = TIMES.lock().expect("nothing panics here").split_off(0);
    times.sort();
    for (time, name) in times.iter().rev().take(10) {
        println!("{:7.1} s  {name}", time.as_secs_f64());
    }
    for name in UNSTEADY.lock().expect("nothing panics here").iter() {
        println!("passed at the second try only: {name}");
    }
    let left = Leftovers::since(&clean, &[], grace());
    if left.is_empty() {
        conclusion.exit_code()
    } else {
        println!("left on this machine after all tests:\n{}", left.join("\n"));
        ExitCode::FAILURE
    }
}

fn trials(named: bool) -> Vec<Trial> {
    let other_runtime = std::env::var("NACELLE_RUNTIME").is_ok_and(|runtime| runtime != nacelle_tests::node::NACELLE);
    let version = containerd();
    let mut trials = Vec::new();
    for (theme, beside, cases) in THEMES {
        let elsewhere = match beside {
            Beside::Only(only) if !named && *only != version => Some(*only),
            Beside::Each | Beside::Only(_) => None,
        };
        for case in *cases {
            let name = format!("{theme}::{}", case.name);
            if let Some(only) = elsewhere {
                eprintln!("left to containerd {only}, as containerd has no part in it: {name}");
            }
            let title = name.clone();
            let excluded = case.only_nacelle.filter(|_| other_runtime);
            if let Some(why) = excluded {
                eprintln!("ignored with this runtime: {name}: {why}");
            }
            let ignored = excluded.is_some() || elsewhere.is_some();
            trials.push(Trial::test(name, || run(case, title)).with_ignored_flag(ignored));
        }
    }
    trials
}

/// Runs a test, and once more if it fails: an emulated processor with emulated virtualization now and then stops or
/// breaks a guest that boots well on the next try. What failed is told either way, and how many there were at the end.
fn run(case: &'static Case, name: String) -> Result<(), Failed> {
    // A panic outside of a test, with the lock held, is one of `Node::start`: the next test tries again.
    let mut node = NODE.lock().unwrap_or_else(PoisonError::into_inner);
    let node = node.get_or_insert_with(Node::start);
    let Err(failure) = attempt(case, &name, node) else { return Ok(()) };
    // Told at once, as the list of failures comes only with the last test.
    eprintln!("{failure}\n=== {name} failed; second try");
    let Err(failure) = attempt(case, &name, node) else {
        UNSTEADY.lock().expect("nothing panics here").push(name);
        return Ok(());
    };
    eprintln!("{failure}");
    Err("failed twice, see above".into())
}

fn attempt(case: &'static Case, name: &str, node: &mut Node) -> Result<(), String> {
    let log = node.log_length();
    // There before the test, so that it is not taken for something that the test left.
    if panic::catch_unwind(AssertUnwindSafe(|| node.resident())).is_err() {
        node.delete_everything();
        return Err(format!("resident: {}", LAST_PANIC.lock().expect("nothing panics here")));
    }
    let before = Leftovers::scan(&node.watched());
    let started = Instant::now();
    let result = panic::catch_unwind(AssertUnwindSafe(|| (case.run)(node)));
    TIMES.lock().expect("nothing panics here").push((started.elapsed(), name.to_owned()));

    let left = Leftovers::since(&before, &node.watched(), grace());
    let containers = node.containers();
    let mut failure = String::new();
    if result.is_err() {
        failure.clone_from(&LAST_PANIC.lock().expect("nothing panics here"));
    }
    if !left.is_empty() {
        failure += &format!("\nleft behind:\n{}", left.join("\n"));
    }
    match containers {
        Ok(mut ids) => {
            ids.retain(|id| id != RESIDENT);
            if !ids.is_empty() {
                failure += &format!("\ncontainers left behind:\n{}", ids.join("\n"));
            }
        }
        Err(e) => failure += &format!("\nlist containers: {e}"),
    }
    if failure.is_empty() {
        return Ok(());
    }
    failure += &format!("\n--- containerd's log\n{}", node.log_since(log));
    node.delete_everything();
    // A client that the failed test has killed could not remove its FIFOs, and nobody else will.
    for dir in left.iter().filter_map(|line| line.strip_prefix("entry ")).filter(|dir| dir.starts_with(FIFOS)) {
        std::fs::remove_dir_all(dir).ok();
    }
    Err(failure)
}
