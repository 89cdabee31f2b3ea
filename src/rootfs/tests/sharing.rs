//! Images whose blocks are those of the layer's files, on file systems that can have a block in two files.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{assert_same, dir, mount_erofs, run, survey, workshop};
use nacelle_rootfs::{Cache, Limits, Lower, Outcome, RootfsPlan};

/// Mounts a new file system, made by `mkfs`, at `at`.
fn file_system(package: &str, mkfs: &str, kind: &str, at: &Path) -> PathBuf {
    let image = at.with_extension("img");
    fs::File::create(&image).unwrap().set_len(400 << 20).unwrap();
    run(package, mkfs, &[&image]);
    run("mount", "mount", &[&"-o", &"loop", &image, &dir(at)]);
    assert!(fs::read_to_string("/proc/thread-self/mounts").unwrap().contains(&format!("{} {kind} ", at.display())));
    at.to_owned()
}

fn used(at: &Path) -> u64 {
    run("coreutils", "sync", &[&"-f", &at]);
    let stat = rustix::fs::statvfs(at).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}

fn images_share_blocks(package: &str, mkfs: &str, kind: &str) {
    let workshop = workshop();
    let disk = file_system(package, mkfs, kind, &workshop.path().join("disk"));
    let layer = dir(disk.join("layer"));
    let noise: Vec<u8> = (0..40_000_123u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(layer.join("large"), &noise).unwrap();
    fs::write(layer.join("small"), &noise[..70_000]).unwrap();
    fs::write(layer.join("block"), &noise[..1 << 20]).unwrap();
    common::sparse(&layer.join("sparse"), 64 << 20, &[(0, 5000), (8 << 20, 4 << 20)]);
    let scratch = dir(disk.join("scratch"));
    let cache = Cache::open(&disk.join("root"), Limits::default()).unwrap();
    let plan = RootfsPlan { lowers: vec![Lower::Snapshot(layer.clone())], read_only: true };
    let before = used(&disk);
    let made = cache.acquire_all(&plan, &scratch, 1).unwrap().remove(0);
    assert_eq!(made.outcome, Outcome::Built);
    let (more, size) = (used(&disk) - before, fs::metadata(&made.path).unwrap().len());
    assert!(size > 45_000_000 && more < 6 << 20, "an image of {size} bytes takes {more}");
    let mounted = mount_erofs(&made.path, &workshop.path().join("mounted"));
    assert_same(&survey(&layer), &survey(&mounted));
    // What happens to the layer's file does not happen to the image.
    fs::write(layer.join("large"), "changed").unwrap();
    assert!(fs::read(mounted.join("large")).unwrap() == noise);
    nix::mount::umount(&mounted).unwrap();

    // Nobody has read it, so nobody can tell damage; then somebody has.
    let problems = || cache.verify(false).unwrap().into_iter().filter_map(|verdict| verdict.problem).count();
    assert_eq!(problems(), 0);
    cache.settle([made.key.as_str()]).unwrap();
    assert_eq!(problems(), 0);
    let mut bytes = fs::read(&made.path).unwrap();
    let last = bytes.len() - 100_000;
    bytes[last] ^= 1;
    fs::remove_file(&made.path).unwrap();
    fs::write(&made.path, bytes).unwrap();
    assert_eq!(problems(), 1);
}

#[test]
fn on_xfs() {
    images_share_blocks("xfsprogs", "mkfs.xfs", "xfs");
}

#[test]
fn on_btrfs() {
    images_share_blocks("btrfs-progs", "mkfs.btrfs", "btrfs");
}
