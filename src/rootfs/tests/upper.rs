//! The ext4 disk: sound, sparse, made once, quickly copied.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use common::{dir, run, workshop};
use nacelle_rootfs::upper::{self, UpperError};

const GIB: u64 = 1 << 30;

fn cpu_of_thread() -> std::time::Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    time.into()
}

#[test]
fn disks_are_sound_and_sparse() {
    let workshop = workshop();
    let root = dir(workshop.path().join("cache"));
    for size in [upper::MIN_SIZE, 100 << 20, GIB, 10 * GIB, 64 * GIB] {
        let disk = workshop.path().join(format!("{size}.img"));
        upper::create(&root, &disk, size).unwrap();
        run("e2fsprogs", "e2fsck", &[&"-fn", &disk]);
        let metadata = fs::metadata(&disk).unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o7777), (size, 0o600));
        assert!(metadata.blocks() * 512 <= 1 << 20, "{size}: {} bytes on disk", metadata.blocks() * 512);
    }
    for template in fs::read_dir(root.join("upper")).unwrap() {
        let metadata = template.unwrap().metadata().unwrap();
        assert!(metadata.blocks() * 512 <= 1 << 20, "template takes {} bytes", metadata.blocks() * 512);
    }
    // No group waits for the guest to zero its inode table.
    let groups = run("e2fsprogs", "dumpe2fs", &[&workshop.path().join(format!("{GIB}.img"))]);
    let groups = String::from_utf8_lossy(&groups.stdout).into_owned();
    assert_eq!(groups.matches(": (Blocks ").count(), 8);
    assert_eq!(groups.matches("ITABLE_ZEROED").count(), 8);
    let features = run("e2fsprogs", "dumpe2fs", &[&"-h", &workshop.path().join(format!("{}.img", 10 * GIB))]);
    let features = String::from_utf8_lossy(&features.stdout).into_owned();
    assert!(!features.contains("has_journal"), "{features}");
    assert!(features.contains("Reserved block count:     0"), "{features}");
}

/// A copy is a file system that can be used, and copies do not share what is written later.
#[test]
fn copies_are_independent() {
    let workshop = workshop();
    let root = dir(workshop.path().join("cache"));
    let disks = ["one", "two"].map(|name| workshop.path().join(name));
    for disk in &disks {
        upper::create(&root, disk, GIB).unwrap();
    }
    run("e2fsprogs", "debugfs", &[&"-w", &"-R", &"mkdir upper", &disks[0]]);
    let listing = |disk: &Path| run("e2fsprogs", "debugfs", &[&"-R", &"ls /", &disk]).stdout;
    assert!(String::from_utf8_lossy(&listing(&disks[0])).contains("upper"));
    assert!(!String::from_utf8_lossy(&listing(&disks[1])).contains("upper"));
    let exists = upper::create(&root, &disks[0], GIB).unwrap_err();
    assert!(exists.to_string().contains("create upper disk"), "{exists}");
}

/// B11: with the template in place, a disk costs next to nothing, whatever its size.
#[test]
fn a_copy_costs_little() {
    let workshop = workshop();
    let root = dir(workshop.path().join("cache"));
    upper::create(&root, &workshop.path().join("first"), 10 * GIB).unwrap();
    let (wall, cpu) = (Instant::now(), cpu_of_thread());
    for i in 0..100 {
        upper::create(&root, &workshop.path().join(i.to_string()), 10 * GIB).unwrap();
    }
    let cpu = (cpu_of_thread() - cpu) / 100;
    println!("one disk: {cpu:?} of CPU, {:?} of time", wall.elapsed() / 100);
    assert!(cpu.as_micros() < 2000, "{cpu:?} (the aim is well under 1 ms on a quiet machine)");
}

/// Many at once make one template, and all get a whole one.
#[test]
fn first_use_by_many_at_once() {
    let workshop = workshop();
    let root = workshop.path().join("cache");
    std::thread::scope(|scope| {
        for i in 0..8 {
            let (root, disk) = (&root, workshop.path().join(i.to_string()));
            scope.spawn(move || upper::create(root, &disk, 16 << 20).unwrap());
        }
    });
    let disks: Vec<_> = (0..8).map(|i| fs::read(workshop.path().join(i.to_string())).unwrap()).collect();
    assert!(disks.iter().all(|disk| disk == &disks[0]));
    assert_eq!(fs::read_dir(root.join("upper")).unwrap().count(), 2, "template and lock");
}

#[test]
fn impossible_sizes_are_refused() {
    let workshop = workshop();
    for size in [0, 4096, upper::MIN_SIZE - 4096, upper::MIN_SIZE + 1, upper::MAX_SIZE, u64::MAX] {
        let error = upper::create(workshop.path(), &workshop.path().join("disk"), size).unwrap_err();
        assert!(matches!(error, UpperError::Size(s) if s == size), "{error}");
    }
    assert_eq!(fs::read_dir(workshop.path()).unwrap().count(), 0);
}

/// A builder that died left half a template under its temporary name; a full disk leaves nothing.
#[test]
fn leftovers_and_full_disks() {
    let workshop = workshop();
    let root = dir(workshop.path().join("cache/upper"));
    fs::write(root.join(format!("ext4-v2-{GIB}.tmp")), "half").unwrap();
    upper::create(&workshop.path().join("cache"), &workshop.path().join("disk"), GIB).unwrap();
    run("e2fsprogs", "e2fsck", &[&"-fn", &workshop.path().join("disk")]);

    let small = common::tmpfs(&workshop.path().join("small"), "size=16k");
    let error = upper::create(&workshop.path().join("cache"), &small.join("disk"), GIB).unwrap_err();
    assert!(error.to_string().contains("small/disk"), "{error}");
    assert!(!small.join("disk").exists());
    File::create(small.join("there is room again")).unwrap();
}
