//! The cache among processes: several start together, and one is killed in the middle (C4). A program of its own, without the
//! test harness, because it runs itself as the other processes.
//!
//! `processes acquire ROOT SNAPSHOT` prints the outcome, `processes hold ROOT SNAPSHOT` uses a layer as pods do, `processes gc ROOT` empties
//! the store; without arguments it runs the tests.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nacelle_rootfs::{Cache, Limits, Lower, Outcome, RootfsPlan};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["acquire", root, snapshot] => println!("{}", acquire(root.as_ref(), snapshot.as_ref())),
        ["hold", root, snapshot] => hold(root.as_ref(), snapshot.as_ref()),
        ["gc", root] => drop(Cache::open(root.as_ref(), Limits::default()).unwrap().gc(0).unwrap()),
        _ => {
            together_they_convert_once();
            a_reused_path_is_never_stale();
            a_flipped_byte_is_repaired();
            collection_takes_nothing_in_use();
            killed_builders_leave_nothing();
            killed_at_each_step();
        }
    }
}

/// What a shim does; says the outcome and the image's path.
fn acquire(root: &Path, snapshot: &Path) -> String {
    let cache = Cache::open(root, Limits::default()).unwrap();
    let plan = RootfsPlan { lowers: vec![Lower::Snapshot(snapshot.into())], read_only: false };
    let layer = cache.acquire_all(&plan, root, 1).unwrap().remove(0);
    format!("{:?} {}", layer.outcome, layer.path.display())
}

fn spawn(root: &Path, snapshot: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("acquire").args([root, snapshot]).stdout(Stdio::piped()).spawn().unwrap()
}

fn outcome(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    BufReader::new(&*output.stdout).lines().next().unwrap().unwrap()
}

fn snapshot(dir: &Path, megabytes: u64) {
    fs::create_dir_all(dir).unwrap();
    let file = File::create(dir.join("large")).unwrap();
    (0..megabytes).for_each(|i| file.write_all_at(&vec![i as u8; 1 << 20], i << 20).unwrap());
}

fn together_they_convert_once() {
    let temp = tempfile::tempdir().unwrap();
    let (root, layer) = (temp.path().join("root"), temp.path().join("snapshot"));
    snapshot(&layer, 8);
    let children: Vec<_> = (0..6).map(|_| spawn(&root, &layer)).collect();
    let outcomes: Vec<_> = children.into_iter().map(outcome).collect();
    let built = outcomes.iter().filter(|o| o.starts_with(&format!("{:?} ", Outcome::Built))).count();
    let hits = outcomes.iter().filter(|o| o.starts_with(&format!("{:?} ", Outcome::Hit))).count();
    assert_eq!((built, hits), (1, 5), "{outcomes:?}");
    println!("together_they_convert_once ... ok");
}

/// What the image that was acquired has in `/large`, and how it was come by.
fn content(said: &str) -> (String, Vec<u8>) {
    let (outcome, path) = said.split_once(' ').unwrap();
    let image = File::open(path).unwrap();
    let image = nacelle_rootfs::erofs::reader::Image::open(&image).unwrap();
    let root = image.root().unwrap();
    let entry = image.entries(&root).unwrap().into_iter().find(|entry| entry.name == b"large").unwrap();
    let file = image.inode(entry.nid).unwrap();
    let mut bytes = vec![0; file.size as usize];
    image.read(&file, 0, &mut bytes).unwrap();
    (outcome.to_owned(), bytes)
}

/// A snapshotter removes a directory and uses its path for another layer, often with the same inode numbers.
fn a_reused_path_is_never_stale() {
    let temp = tempfile::tempdir().unwrap();
    let (root, layer) = (temp.path().join("root"), temp.path().join("snapshot"));
    for round in 0..20u8 {
        fs::create_dir(&layer).unwrap();
        fs::write(layer.join("large"), [round; 5000]).unwrap();
        for expected in ["Built", "Hit"] {
            let (outcome, bytes) = content(&outcome(spawn(&root, &layer)));
            assert!(bytes == [round; 5000], "round {round}: another layer's file");
            assert_eq!(outcome, expected, "round {round}");
        }
        fs::remove_dir_all(&layer).unwrap();
    }
    println!("a_reused_path_is_never_stale ... ok");
}

/// Once so that the file's time tells, once as a disk does it, which only reading everything finds.
fn a_flipped_byte_is_repaired() {
    let temp = tempfile::tempdir().unwrap();
    let (root, layer) = (temp.path().join("root"), temp.path().join("snapshot"));
    snapshot(&layer, 1);
    let whole = content(&outcome(spawn(&root, &layer))).1;
    for silent in [false, true] {
        let said = outcome(spawn(&root, &layer));
        let image = File::options().read(true).write(true).open(said.split_once(' ').unwrap().1).unwrap();
        let time = image.metadata().unwrap().modified().unwrap();
        let (mut byte, at) = ([0], 500_000);
        image.read_exact_at(&mut byte, at).unwrap();
        image.write_all_at(&[byte[0] ^ 1], at).unwrap();
        if silent {
            image.set_modified(time).unwrap();
            let verdicts = Cache::open(&root, Limits::default()).unwrap().verify(true).unwrap();
            assert!(verdicts.iter().all(|verdict| verdict.removed), "{verdicts:?}");
        }
        let (outcome, bytes) = content(&outcome(spawn(&root, &layer)));
        assert_eq!(outcome, if silent { "Built" } else { "Rebuilt" });
        assert!(bytes == whole);
    }
    println!("a_flipped_byte_is_repaired ... ok");
}

/// Processes that start and hold layers while others collect: what one holds stays, with its content.
fn collection_takes_nothing_in_use() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path().join("root");
    let layers: Vec<_> = (0..3).map(|n| temp.path().join(format!("snapshot-{n}"))).collect();
    layers.iter().for_each(|layer| snapshot(layer, 1));
    let run = |args: [&OsStr; 3]| Command::new(std::env::current_exe().unwrap()).args(args).spawn().unwrap();
    let holders: Vec<_> = layers.iter().map(|layer| run(["hold".as_ref(), root.as_ref(), layer.as_ref()])).collect();
    let mut collections = 0;
    let mut running = holders;
    while !running.is_empty() {
        Cache::open(&root, Limits::default()).unwrap().gc(0).unwrap();
        collections += 1;
        running.retain_mut(|holder| match holder.try_wait().unwrap() {
            Some(status) => {
                assert!(status.success(), "what was held is gone");
                false
            }
            None => true,
        });
    }
    assert!(collections > 10, "{collections}");
    let left = Cache::open(&root, Limits::default()).unwrap().gc(0).unwrap();
    assert_eq!(left.kept, 0);
    println!("collection_takes_nothing_in_use ... ok ({collections} collections)");
}

/// What a pod does with a layer again and again: acquire, link, let go of the lock, and rely on the link.
fn hold(root: &Path, snapshot: &Path) {
    let pod = root.with_file_name(format!("pod-{}", std::process::id()));
    fs::create_dir(&pod).unwrap();
    for round in 0..30 {
        let cache = Cache::open(root, Limits::default()).unwrap();
        let plan = RootfsPlan { lowers: vec![Lower::Snapshot(snapshot.into())], read_only: false };
        let layer = cache.acquire_all(&plan, root, 1).unwrap().remove(0);
        let linked = cache.link_into(&layer, &pod, &format!("{round}.erofs")).unwrap();
        let key = layer.key.clone();
        drop(layer);
        std::thread::sleep(Duration::from_millis(5));
        let listed = cache.ls().unwrap();
        assert!(listed.iter().any(|image| image.key == key && image.in_use), "round {round}: collected while in use");
        nacelle_rootfs::erofs::reader::Image::open(&File::open(&linked).unwrap()).unwrap().check().unwrap();
        fs::remove_file(linked).unwrap();
    }
    fs::remove_dir(pod).unwrap();
}

/// kill -9 at many moments: the next process gets a sound image, and no temporary file outlives it.
fn killed_builders_leave_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let (root, layer) = (temp.path().join("root"), temp.path().join("snapshot"));
    snapshot(&layer, 24);
    let mut interrupted = 0;
    for round in 0..20u64 {
        let _ = fs::remove_dir_all(&root);
        let mut child = spawn(&root, &layer);
        let start = Instant::now();
        // The later rounds wait for the image to appear, so that they strike while it is written.
        while round >= 8 && !has_temporary(&root) && start.elapsed() < Duration::from_secs(20) {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(round));
        child.kill().unwrap();
        child.wait().unwrap();
        interrupted += u32::from(has_temporary(&root));
        let said = acquire(&root, &layer);
        let path = said.split_once(' ').unwrap().1;
        let image = File::open(path).unwrap();
        nacelle_rootfs::erofs::reader::Image::open(&image).unwrap().check().unwrap();
        assert!(!has_temporary(&root), "{said}");
        let cache = Cache::open(&root, Limits::default()).unwrap();
        assert!(cache.verify(false).unwrap().iter().all(|v| v.problem.is_none()));
    }
    assert!(interrupted > 0, "no builder was struck while it wrote");
    println!("killed_builders_leave_nothing ... ok ({interrupted} of 20 were writing)");
}

/// System calls by which something in the store changes, and some that do not.
const CALLS: [&str; 14] = [
    "openat",
    "mkdir",
    "mkdirat",
    "flock",
    "unlink",
    "unlinkat",
    "fallocate",
    "write",
    "fchmod",
    "fsync",
    "rename",
    "renameat",
    "utimensat",
    "close",
];

/// Runs this program with these arguments, and kills it before it makes a system call for the `time`th time; false when it does
/// not make it so often.
fn killed_at(call: &str, time: usize, args: &[&dyn AsRef<OsStr>]) -> bool {
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e"]).arg(format!("trace=?{call}"));
    command.arg("-e").arg(format!("inject=?{call}:signal=KILL:when={time}"));
    command.arg(std::env::current_exe().unwrap()).args(args.iter().map(AsRef::as_ref));
    let status = command.stdout(Stdio::null()).status().expect("run strace (package strace)");
    match status.code() {
        Some(0) => false,
        None | Some(137) => true,
        Some(code) => panic!("{call}, time {time}: exit code {code}"),
    }
}

/// kill -9 before each system call of a conversion and of a collection: whatever was done by then, the next process finds a
/// sound image or makes one, and nothing else stays.
fn killed_at_each_step() {
    let temp = tempfile::tempdir().unwrap();
    let (root, layer) = (temp.path().join("root"), temp.path().join("snapshot"));
    snapshot(&layer, 1);
    let whole_again = |step: &str| {
        let said = acquire(&root, &layer);
        let path = said.split_once(' ').unwrap().1;
        nacelle_rootfs::erofs::reader::Image::open(&File::open(path).unwrap()).unwrap().check().unwrap();
        let cache = Cache::open(&root, Limits::default()).unwrap();
        assert!(cache.verify(false).unwrap().iter().all(|v| v.problem.is_none()), "{step}");
        let entries = fs::read_dir(root.join("layers/erofs-v1")).unwrap();
        let mut kinds: Vec<_> = entries.map(|e| e.unwrap().path().extension().unwrap().to_owned()).collect();
        kinds.sort();
        assert_eq!(kinds, ["erofs", "json", "lock"], "{step}");
    };
    let (mut built, mut collected) = (0, 0);
    for call in CALLS {
        let acquire: [&dyn AsRef<OsStr>; 3] = [&"acquire", &root, &layer];
        let _ = fs::remove_dir_all(&root);
        for time in 1.. {
            if !killed_at(call, time, &acquire) {
                break;
            }
            built += 1;
            whole_again(&format!("conversion: {call}, time {time}"));
            fs::remove_dir_all(&root).unwrap();
        }
        let gc: [&dyn AsRef<OsStr>; 2] = [&"gc", &root];
        for time in 1.. {
            if !killed_at(call, time, &gc) {
                break;
            }
            collected += 1;
            whole_again(&format!("collection: {call}, time {time}"));
        }
    }
    assert!(built > 30 && collected > 15, "{built} steps of a conversion, {collected} of a collection");
    println!("killed_at_each_step ... ok ({built} of a conversion, {collected} of a collection)");
}

fn has_temporary(root: &Path) -> bool {
    let entries = fs::read_dir(root.join("layers/erofs-v1")).into_iter().flatten().flatten();
    entries.map(|e| e.file_name()).any(|name| name.to_string_lossy().ends_with("tmp"))
}
