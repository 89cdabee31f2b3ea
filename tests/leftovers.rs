//! What a container can leave on a node: processes, mounts, sockets, cgroups, network interfaces and files. Compared
//! before and after a test, so a node that was not clean to begin with does not hide what the test added.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::node::NAMESPACE;

/// Directories whose entries belong to running sandboxes or containers, and at which depth they do.
const TRACES: &[(&str, usize)] = &[
    // <namespace>/<sandbox>
    ("/run/nacelle", 2),
    ("/var/lib/nacelle/pods", 2),
    ("/run/containerd/s", 1),
    ("/run/containerd/fifo", 1),
    ("/run/netns", 1),
    ("/sys/class/net", 1),
];

/// A file for each range of user ids; not empty while a sandbox has it.
const UIDS: &str = "/run/nacelle/uids";

/// A line for each trace, such as `process 17 nacelle-vmm …` or `mount /run/…`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// Looks at the node. `dirs` are directories of the containerd under test and of nacelle: mounts below them count,
    /// bundles and pods.
    pub fn scan(dirs: &[PathBuf]) -> Self {
        let mut found = BTreeSet::new();
        processes(&mut found);
        mounts(dirs, &mut found);
        cgroups(Path::new("/sys/fs/cgroup"), &mut found);
        for (dir, depth) in TRACES {
            entries(Path::new(dir), *depth, &mut found);
        }
        for dir in dirs {
            // <namespace>/<id> and <namespace>/<sandbox>
            entries(&dir.join("io.containerd.runtime.v2.task"), 2, &mut found);
            entries(&dir.join("pods"), 2, &mut found);
        }
        found.retain(|line| !line.contains(UIDS));
        for entry in fs::read_dir(UIDS).into_iter().flatten().flatten() {
            if entry.metadata().is_ok_and(|file| file.len() > 0) {
                found.insert(format!("ids {}", entry.path().display()));
            }
        }
        Self(found)
    }

    /// Waits until nothing is there that was not in `before`; what is left after the time, or empty.
    pub fn since(before: &Self, dirs: &[PathBuf], within: Duration) -> Vec<String> {
        let end = Instant::now() + within;
        loop {
            let left: Vec<String> = Self::scan(dirs).0.difference(&before.0).cloned().collect();
            if left.is_empty() || Instant::now() >= end {
                return left;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Processes of the runtimes, wherever they are, and zombies of theirs: a shim that does not wait for its children.
fn processes(found: &mut BTreeSet<String>) {
    for pid in numbers("/proc") {
        let dir = Path::new("/proc").join(pid.to_string());
        let Ok(command) = fs::read(dir.join("cmdline")) else { continue };
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let Ok(name) = fs::read_to_string(dir.join("comm")) else { continue };
        let ours = |text: &str| {
            text.contains("nacelle-vmm") || text.contains("containerd-shim") || text.contains("nacelle-agent")
        };
        if ours(&command) || ours(&name) {
            found.insert(format!("process {pid} {} {command}", name.trim_end()));
        }
    }
}

fn numbers(dir: &str) -> Vec<u32> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

fn mounts(dirs: &[PathBuf], found: &mut BTreeSet<String>) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in table.lines() {
        let Some(point) = line.split(' ').nth(4) else { continue };
        if point.contains("nacelle") || dirs.iter().any(|dir| Path::new(point).starts_with(dir)) {
            found.insert(format!("mount {point}"));
        }
    }
}

/// Every cgroup that is not of the machine's own: those of containers are named by namespace and id.
fn cgroups(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            let text = path.to_string_lossy();
            // The parent of the namespace's cgroups stays, as it does with runc.
            if text.contains(NAMESPACE) && !text.ends_with(NAMESPACE) {
                found.insert(format!("cgroup {text}"));
            }
            cgroups(&path, found);
        }
    }
}

fn entries(dir: &Path, depth: usize, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if depth > 1 {
            entries(&entry.path(), depth - 1, found);
        } else {
            found.insert(format!("entry {}", entry.path().display()));
        }
    }
}
