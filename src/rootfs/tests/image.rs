//! Real trees → images, which fsck.erofs accepts and in which the host's kernel shows exactly the tree (C6, C12).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{assert_faithful, convert, dir, run, tmpfs, workshop};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rustix::fs::XattrFlags;

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap_or_else(|e| panic!("set {name}: {e}"));
}

fn device(path: &Path, kind: SFlag, major: u64, minor: u64) {
    mknod(path, kind, Mode::from_bits_truncate(0o640), makedev(major, minor)).unwrap();
}

/// C6: files, directories, links, FIFOs and devices are carried; sockets are not.
#[test]
fn every_kind_of_inode() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    fs::write(tree.join("file"), "content").unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    dir(tree.join("a/b/c"));
    symlink("file", tree.join("link")).unwrap();
    symlink("nowhere/at/all", tree.join("dangling")).unwrap();
    device(&tree.join("fifo"), SFlag::S_IFIFO, 0, 0);
    device(&tree.join("null"), SFlag::S_IFCHR, 1, 3);
    device(&tree.join("whiteout"), SFlag::S_IFCHR, 0, 0);
    device(&tree.join("disk"), SFlag::S_IFBLK, 259, 1_000_000);
    let _socket = UnixListener::bind(tree.join("socket")).unwrap();
    for (name, mode) in [("suid", 0o4755), ("sgid", 0o2755), ("sticky", 0o1777), ("none", 0o000)] {
        fs::write(tree.join(name), name).unwrap();
        fs::set_permissions(tree.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::set_permissions(tree.join("a"), fs::Permissions::from_mode(0o7711)).unwrap();
    let image = assert_faithful(workshop.path(), &tree);
    let listing = run("erofs-utils", "dump.erofs", &[&"--ls", &"--path=/", &image]);
    assert!(!String::from_utf8_lossy(&listing.stdout).contains("socket"));
}

/// C12: links are data; whatever they point at, nothing is followed.
#[test]
fn symlinks_short_long_and_circular() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    for len in [1, 59, 60, 2047, 2048, 2049, 4000, 4095] {
        symlink("x".repeat(len), tree.join(format!("len{len}"))).unwrap();
    }
    symlink("self", tree.join("self")).unwrap();
    symlink("two", tree.join("one")).unwrap();
    symlink("one", tree.join("two")).unwrap();
    symlink("..", tree.join("up")).unwrap();
    symlink("/etc", tree.join("etc")).unwrap();
    symlink(OsStr::from_bytes(b"\xff\xfe"), tree.join("bytes")).unwrap();
    lchown(tree.join("self"), Some(70_000), Some(5)).unwrap();
    assert_faithful(workshop.path(), &tree);
}

#[test]
fn an_empty_tree() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    let image = assert_faithful(workshop.path(), &tree);
    assert_eq!(fs::metadata(image).unwrap().len(), 8192);
}

#[test]
fn files_of_every_size_around_a_block() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    for size in (0..=4097).chain([8191, 8192, 8193, 1 << 20, (1 << 20) + 1, 5_000_001]) {
        let bytes: Vec<u8> = (0..size).map(|i| (i * 7 + size) as u8).collect();
        fs::write(tree.join(size.to_string()), bytes).unwrap();
    }
    assert_faithful(workshop.path(), &tree);
}

#[test]
fn owners_of_all_sizes() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    for id in [0, 1, 65_534, 65_535, 65_536, 100_000, 4_000_000_000, u32::MAX - 1] {
        let file = tree.join(format!("user{id}"));
        fs::write(&file, "").unwrap();
        chown(&file, Some(id), Some(0)).unwrap();
        let file = dir(tree.join(format!("group{id}")));
        chown(&file, Some(0), Some(id)).unwrap();
    }
    assert_faithful(workshop.path(), &tree);
}

#[test]
fn times_before_1970_and_after_2106() {
    let workshop = workshop();
    // ext4 ends in 2446 and 1901; tmpfs keeps 64 bits.
    let tree = tmpfs(&workshop.path().join("tree"), "size=16m");
    let second = Duration::from_secs;
    let times = [
        UNIX_EPOCH,
        UNIX_EPOCH + Duration::from_nanos(1),
        UNIX_EPOCH - Duration::from_nanos(1),
        UNIX_EPOCH - second(3_000_000_000),
        UNIX_EPOCH + second(1 << 31) + Duration::from_nanos(999_999_999),
        UNIX_EPOCH + second(1 << 32),
        UNIX_EPOCH + second(5_000_000_000),
        UNIX_EPOCH + second(20_000_000_000),
        SystemTime::now(),
    ];
    for (index, time) in times.into_iter().enumerate() {
        File::create(tree.join(index.to_string())).unwrap().set_modified(time).unwrap();
        File::open(dir(tree.join(format!("d{index}")))).unwrap().set_modified(time).unwrap();
    }
    assert_faithful(workshop.path(), &tree);
}

#[test]
fn extended_attributes() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    let file = tree.join("file");
    fs::write(&file, "x").unwrap();
    set_xattr(&file, "user.empty", b"");
    set_xattr(&file, "user.binary", b"\0\xff\n\0");
    set_xattr(&file, &format!("user.{}", "n".repeat(250)), b"long name");
    set_xattr(&file, "trusted.secret", b"for root");
    set_xattr(&file, "trusted.overlay.overlay.opaque", b"an overlay inside");
    set_xattr(&file, "security.test", b"label");
    // struct vfs_ns_cap_data, version 3: cap_net_raw permitted and effective, root id 1000
    let mut capability = vec![1, 0, 0, 3];
    capability.extend([0x0000_2000u32, 0, 0, 0, 1000].iter().flat_map(|w| w.to_le_bytes()));
    set_xattr(&file, "security.capability", &capability);
    let folder = dir(tree.join("folder"));
    set_xattr(&folder, "user.on", b"a directory");
    run("acl", "setfacl", &[&"-m", &"u:1234:rwx,g:99:r-x", &file]);
    run("acl", "setfacl", &[&"-d", &"-m", &"u:4000000000:rwx", &folder]);
    symlink("file", tree.join("link")).unwrap();
    set_xattr(&tree.join("link"), "trusted.of.link", b"itself");
    device(&tree.join("fifo"), SFlag::S_IFIFO, 0, 0);
    set_xattr(&tree.join("fifo"), "trusted.of.fifo", b"itself");
    for len in 0..40 {
        let file = tree.join(format!("aligned{len}"));
        fs::write(&file, "y".repeat(len * 100)).unwrap();
        set_xattr(&file, "user.a", &vec![b'v'; len]);
    }
    assert_faithful(workshop.path(), &tree);
}

#[test]
fn attributes_up_to_the_largest() {
    let workshop = workshop();
    let tree = tmpfs(&workshop.path().join("tree"), "size=64m");
    for len in [4000, 4096, 60_000, 65_535] {
        let file = tree.join(len.to_string());
        fs::write(&file, "content").unwrap();
        set_xattr(&file, "trusted.large", &vec![b'v'; len]);
    }
    let file = tree.join("many");
    fs::write(&file, "content").unwrap();
    (0..200).for_each(|i| set_xattr(&file, &format!("trusted.number{i}"), &[i; 100]));
    assert_faithful(workshop.path(), &tree);
}

#[test]
fn hard_links_are_one_inode() {
    let workshop = workshop();
    let tree = tmpfs(&workshop.path().join("tree"), "size=256m,nr_inodes=0");
    fs::write(tree.join("file"), vec![7; 10_000]).unwrap();
    for i in 0..10 {
        dir(tree.join(format!("d{i}")));
        fs::hard_link(tree.join("file"), tree.join(format!("d{i}/again"))).unwrap();
    }
    symlink("file", tree.join("link")).unwrap();
    rustix::fs::link(tree.join("link"), tree.join("link2")).unwrap();
    // overlayfs makes its whiteouts like this
    device(&tree.join("gone"), SFlag::S_IFCHR, 0, 0);
    fs::hard_link(tree.join("gone"), tree.join("gone too")).unwrap();
    let farm = dir(tree.join("farm"));
    fs::write(farm.join("0"), "popular").unwrap();
    (1..66_000).for_each(|i| fs::hard_link(farm.join("0"), farm.join(i.to_string())).unwrap());
    let image = assert_faithful(workshop.path(), &tree);
    assert!(fs::metadata(image).unwrap().len() < 4 << 20);
}

#[test]
fn names_of_any_bytes() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    for byte in (1..=255u8).filter(|&b| b != b'/' && b != b'.') {
        fs::write(tree.join(OsStr::from_bytes(&[byte])), [byte]).unwrap();
        fs::write(tree.join(OsStr::from_bytes(&[b'.', byte])), [byte]).unwrap();
    }
    fs::write(tree.join("..."), "three dots").unwrap();
    fs::write(tree.join("n".repeat(255)), "long").unwrap();
    fs::write(tree.join(OsStr::from_bytes(&[0xff; 255])), "long").unwrap();
    assert_faithful(workshop.path(), &tree);
}

#[test]
fn a_directory_of_50_000_names() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    let big = dir(tree.join("big"));
    for i in 0..50_000 {
        File::create(big.join(format!("{:x}-{}", i * 7919, "p".repeat(i % 60)))).unwrap();
    }
    // Directories whose last block is nearly empty, half full and nearly full.
    for count in [10, 170, 255, 256, 257, 341, 342, 400] {
        let some = dir(tree.join(format!("dir{count}")));
        (0..count).for_each(|i| drop(File::create(some.join(format!("{i:04}"))).unwrap()));
    }
    assert_faithful(workshop.path(), &tree);
}

#[test]
fn a_hundred_thousand_small_files() {
    let workshop = workshop();
    let tree = tmpfs(&workshop.path().join("tree"), "size=1g,nr_inodes=0");
    let mut dice = common::Dice(5);
    for folder in 0..400 {
        let folder = dir(tree.join(format!("{}/{folder}", folder % 20)));
        (0..250).for_each(|i| fs::write(folder.join(format!("{i}.txt")), vec![i as u8; dice.roll(4000)]).unwrap());
    }
    assert_faithful(workshop.path(), &tree);
}

#[test]
fn deep_paths() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    let room = 4000 - tree.as_os_str().len();
    let mut path = tree.clone();
    (0..room / 2 - 40).for_each(|_| path.push("d"));
    dir(&path);
    fs::write(path.join("file at the end"), "found").unwrap();
    let mut path = tree.clone();
    (0..10).for_each(|_| path.push("w".repeat(255)));
    dir(&path);
    let image = workshop.path().join("image.erofs");
    convert(&tree, &image);
    // fsck.erofs recurses and has its own limit; the kernel has none.
    let file = File::open(&image).unwrap();
    nacelle_rootfs::erofs::reader::Image::open(&file).unwrap().check().unwrap();
    // A mount point with a short name, so that the longest path fits here as well.
    let mounted = common::mount_erofs(&image, &workshop.path().join("m"));
    common::assert_same(&common::survey(&tree), &common::survey(&mounted));
}

#[test]
fn sparse_files_stay_sparse() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    let sparse = |name: &str, size, parts: &[_]| common::sparse(&tree.join(name), size, parts);
    let gib = 1 << 30;
    sparse("8g", 8 * gib, &[(0, 5000), (4 * gib + 123, 70_000), (8 * gib - 1, 1)]);
    sparse("hole", 3 * gib + 17, &[]);
    sparse("small hole", 20_000, &[(19_999, 1)]);
    sparse("tiny hole", 1500, &[]);
    sparse("odd end", 1_000_003, &[(500_000, 4096)]);
    sparse("dense", 300_000, &[(0, 300_000)]);
    let comb: Vec<_> = (0..6000).map(|i| (i * 65_536, 10)).collect();
    sparse("comb", 6000 * 65_536, &comb);
    fs::write(tree.join("neighbour"), vec![1; 9000]).unwrap();
    let image = assert_faithful(workshop.path(), &tree);
    assert!(fs::metadata(image).unwrap().len() < 110 << 20, "6000 pieces of one block, and little else");
}

/// The same tree gives the same bytes, wherever it lies and however often it is read.
#[test]
fn images_are_reproducible() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    let mut dice = common::Dice(42);
    for i in 0..500 {
        let folder = dir(tree.join(format!("d{}", dice.roll(20))));
        fs::write(folder.join(format!("f{i}")), vec![i as u8; dice.roll(9000)]).unwrap();
    }
    let copy = workshop.path().join("copy");
    run("coreutils", "cp", &[&"-a", &tree, &copy]);
    let images = ["one", "two", "three"].map(|name| workshop.path().join(name));
    convert(&tree, &images[0]);
    convert(&tree, &images[1]);
    convert(&copy, &images[2]);
    let bytes = images.map(|image| fs::read(image).unwrap());
    assert!(bytes[0] == bytes[1] && bytes[1] == bytes[2]);
}

/// Copies the files of installed packages, whose names `pick` (a sed script) takes out of lines `Essential Package`.
fn packages(workshop: &Path, pick: &str) -> PathBuf {
    let tree = dir(workshop.join("tree"));
    // Some packages still name their files by the links that /bin and /lib are today.
    let copy = r#"dpkg-query -Wf '${Essential} ${binary:Package}\n' | sed -nE "$3" | xargs dpkg -L |
            sed -nE 's,^/(bin|sbin|lib[0-9x]*)/,/usr/\1/,; \,^/(etc|usr|var|bin|sbin|lib[0-9x]*)(/|$),p' | sort -u >"$1"
        tar --create --no-recursion --xattrs --xattrs-include='*' --files-from="$1" --ignore-failed-read |
            tar --extract --xattrs --xattrs-include='*' --same-owner --directory="$2""#;
    run("dpkg and tar", "sh", &[&"-ec", &copy, &"sh", &workshop.join("list"), &tree, &pick]);
    tree
}

/// The essential packages of Debian, as they are installed here: what the lowest layer of most images is.
#[test]
fn a_debian_base() {
    let workshop = workshop();
    let tree = packages(workshop.path(), "s/^yes //p");
    assert!(tree.join("bin").is_symlink() && tree.join("usr/bin/dpkg").is_file(), "a Debian machine has these");
    assert_faithful(workshop.path(), &tree);
}

/// Python with everything of it that is installed: thousands of small files, and their compiled siblings.
#[test]
fn a_python_tree() {
    let workshop = workshop();
    let tree = packages(workshop.path(), "s/^no ((lib)?python3.*)/\\1/p");
    assert!(tree.join("usr/bin/python3").is_symlink(), "package python3");
    assert_faithful(workshop.path(), &tree);
}

/// Node.js with what its packages bring: deep directories, a program of a hundred megabytes.
#[test]
fn a_node_tree() {
    let workshop = workshop();
    let tree = packages(workshop.path(), "s/^no ((lib)?node.*)/\\1/p");
    assert!(fs::metadata(tree.join("usr/bin/node")).is_ok_and(|node| node.is_file()), "package nodejs");
    assert_faithful(workshop.path(), &tree);
}

/// A tree of this machine's own programs, as a check on everything at once.
#[test]
fn a_real_tree() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    for source in ["/usr/share/doc", "/usr/share/zoneinfo", "/etc"].iter().filter(|s| Path::new(s).is_dir()) {
        run("coreutils", "cp", &[&"-a", &source, &tree]);
    }
    assert_faithful(workshop.path(), &tree);
}
