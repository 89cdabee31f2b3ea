//! A container's changes → its snapshot: what the snapshot shows over its layers is what the container saw, run after run and export
//! after export, against the kernel's overlay; and hostile archives change nothing.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use common::{Dice, NAMES, assert_same, dir, mount_overlay, run, survey, tmpfs, workshop};
use nacelle_rootfs::changes::{Applied, ChangesError, Snapshot};
use nacelle_rootfs::{Lower, RootfsPlan};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rustix::fs::XattrFlags;
use tar::{Builder, EntryType, Header};

const ROOM: u64 = 64 << 20;

fn snapshot(base: &Path) -> Snapshot {
    let lowers = vec![Lower::Snapshot(dir(base.join("image"))), Lower::Upper(dir(base.join("1/fs")))];
    Snapshot::of(&RootfsPlan { lowers, read_only: false }).unwrap().unwrap()
}

fn export(snapshot: &mut Snapshot, upper: &Path, archive: &Path) {
    let words: [&dyn AsRef<std::ffi::OsStr>; 10] = [
        &"--create",
        &"--format=posix",
        &"--sparse",
        &"--xattrs",
        &"--xattrs-include=*",
        &"--directory",
        &upper,
        &"--file",
        &archive,
        &".",
    ];
    run("tar", "tar", &words);
    let applied = snapshot.apply(File::open(archive).unwrap(), ROOM).unwrap();
    snapshot.publish(applied).unwrap();
}

/// What a container does to its files. What is not possible is not done.
fn act(root: &Path, dice: &mut Dice) -> io::Result<()> {
    let mut pick = |most: usize| {
        let names = (0..=dice.roll(most)).map(|_| std::str::from_utf8(NAMES[dice.roll(NAMES.len())]).unwrap());
        (root.join(names.collect::<PathBuf>()), dice.roll(1 << 20))
    };
    let ((path, number), (other, kind)) = (pick(3), pick(3));
    match kind % 16 {
        0..=2 => fs::write(&path, format!("{number}").repeat(number % 3000)),
        3 => fs::OpenOptions::new().append(true).open(&path)?.write_all_at(b"more", 0),
        4 => fs::remove_file(&path),
        5 | 6 => fs::remove_dir_all(&path),
        7 | 8 => fs::create_dir(&path),
        9 => fs::rename(&path, &other),
        10 => symlink("/etc/passwd", &path),
        11 => fs::hard_link(&path, &other),
        12 => Ok(mknod(&path, SFlag::S_IFCHR, Mode::S_IRUSR, makedev(1, 3))?),
        13 => chown(&path, Some(number as u32), Some(7)),
        14 => Ok(rustix::fs::setxattr(&path, "user.number", &number.to_le_bytes(), XattrFlags::empty())?),
        _ => {
            let file = File::create(&path)?;
            file.write_all_at(b"behind a hole", number as u64)?;
            file.set_permissions(fs::Permissions::from_mode(0o4755))
        }
    }
}

#[test]
fn a_snapshot_shows_what_its_container_saw() {
    let workshop = workshop();
    for seed in 1..=24u64 {
        let mut dice = Dice(seed * 7_654_321);
        // Hard links, trusted attributes and overlays all work on a tmpfs, and nothing is written to a disk.
        let base = tmpfs(&workshop.path().join(seed.to_string()), "mode=755");
        let image = dir(base.join("image"));
        (0..60).for_each(|_| drop(act(&image, &mut dice)));
        for task in 0..3 {
            let mut snapshot = snapshot(&base);
            let at = |what: &str| dir(base.join(format!("{task}-{what}")));
            let (start, upper, root) = (at("start"), at("upper"), at("root"));
            let copy: [&dyn AsRef<std::ffi::OsStr>; 4] = [&"-a", &"-T", &base.join("1/fs"), &start];
            run("coreutils", "cp", &copy);
            let options = format!(
                "lowerdir={}:{},upperdir={},workdir={},redirect_dir=off,metacopy=off",
                start.display(),
                image.display(),
                upper.display(),
                at("work").display()
            );
            mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
            let like = fs::metadata(&start).unwrap().modified().unwrap();
            File::open(&root).unwrap().set_modified(like).unwrap();
            for part in 0..3 {
                (0..20).for_each(|_| drop(act(&root, &mut dice)));
                export(&mut snapshot, &upper, &base.join("archive"));
                let shown = mount_overlay(&[&base.join("1/fs"), &image], &at(&format!("shown-{part}")));
                let (mut inside, mut outside) = (survey(&root), survey(&shown));
                // The start's files have a name more for as long as the container lives.
                [&mut inside, &mut outside].into_iter().for_each(common::forget_link_counts);
                assert_same(&inside, &outside);
                assert_no_whiteout_shows(&shown);
            }
            snapshot.close().unwrap();
            let left: Vec<_> = fs::read_dir(base.join("1")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(left, ["fs"]);
        }
    }
}

/// A whiteout in a directory that the overlay need not merge is listed, and then not found.
fn assert_no_whiteout_shows(root: &Path) {
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        if metadata.is_dir() {
            assert_no_whiteout_shows(&path);
        }
    }
}

#[test]
fn a_root_without_layers_keeps_no_whiteouts() {
    let workshop = workshop();
    let base = tmpfs(&workshop.path().join("t"), "mode=755");
    let own = dir(base.join("1/fs"));
    fs::write(dir(own.join("dir")).join("gone"), "").unwrap();
    fs::write(own.join("stays"), "").unwrap();
    let plan = RootfsPlan { lowers: vec![Lower::Writable(own.clone())], read_only: false };
    let mut snapshot = Snapshot::of(&plan).unwrap().unwrap();
    let archive = archive(|add| {
        add(EntryType::Directory, b".", "", b"");
        add(EntryType::Directory, b"dir", "", b"");
        add(EntryType::Char, b"dir/gone", "", b"");
        add(EntryType::Regular, b"new", "", b"text");
    });
    let applied = snapshot.apply(archive.as_slice(), ROOM).unwrap();
    assert!(own.join("dir/gone").exists(), "not yet");
    snapshot.publish(applied).unwrap();
    assert_eq!(fs::read_dir(own.join("dir")).unwrap().count(), 0);
    assert!(own.join("stays").exists() && fs::read_to_string(own.join("new")).unwrap() == "text");
    assert_eq!(Snapshot::of(&RootfsPlan { read_only: true, ..plan }).unwrap().map(drop), None);
    let disk = vec![Lower::UpperDisk(base.join("disk"))];
    assert_eq!(Snapshot::of(&RootfsPlan { lowers: disk, read_only: false }).unwrap().map(drop), None);
}

type Add<'a> = &'a mut dyn FnMut(EntryType, &[u8], &str, &[u8]);

/// An archive of entries (kind, name, link, content), with names that no honest writer puts there.
fn archive(fill: impl FnOnce(Add)) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    fill(&mut |kind, name, link, content| {
        let mut header = Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name);
        header.set_entry_type(kind);
        header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        header.set_device_major(0).and_then(|()| header.set_device_minor(0)).unwrap();
        header.set_cksum();
        builder.append(&header, content).unwrap();
    });
    builder.into_inner().unwrap()
}

#[test]
fn hostile_archives_change_nothing() {
    let workshop = workshop();
    let base = tmpfs(&workshop.path().join("t"), "mode=755,size=64m");
    let own = dir(base.join("1/fs"));
    let outside = dir(base.join("outside"));
    fs::write(outside.join("file"), "precious").unwrap();
    fs::write(own.join("file"), "own").unwrap();
    symlink(&outside, own.join("out")).unwrap();
    dir(base.join("image"));
    let survey = || {
        let mut seen = survey(&base);
        common::forget_directory_times(&mut seen);
        seen
    };
    let before = survey();
    let refuse = |what: &str, archive: &[u8], room| {
        let snapshot = snapshot(&base);
        let error = snapshot.apply(archive, room).map(|_: Applied| ()).expect_err(what);
        assert!(matches!(error, ChangesError::Archive(_) | ChangesError::Io { .. }), "{what}: {error}");
        assert_same(&before, &survey());
    };
    let (file, link) = (EntryType::Regular, EntryType::Symlink);
    let one = |kind, name: &[u8], target: &str| archive(|add| add(kind, name, target, b""));
    refuse("absolute", &one(file, b"/outside/file", ""), ROOM);
    refuse("out of the root", &one(file, b"../../outside/new", ""), ROOM);
    refuse("out and in again", &one(file, b"a/../../fs/new", ""), ROOM);
    refuse("below a link of the start", &one(file, b"out/new", ""), ROOM);
    refuse("below a file", &one(file, b"file/new", ""), ROOM);
    refuse("below nothing", &one(file, b"nothing/new", ""), ROOM);
    refuse("a hard link out", &one(EntryType::Link, b"new", "../../outside/file"), ROOM);
    refuse("a hard link by a link", &one(EntryType::Link, b"new", "out/file"), ROOM);
    refuse("a hard link to the root", &one(EntryType::Link, b"new", "."), ROOM);
    refuse("a hard link to nothing", &one(EntryType::Link, b"new", "nothing"), ROOM);
    refuse("a root that is a file", &one(file, b".", ""), ROOM);
    let through = archive(|add| {
        add(link, b"dir", outside.to_str().unwrap(), b"");
        add(file, b"dir/new", "", b"");
    });
    refuse("below a link of its own", &through, ROOM);
    let proc = archive(|add| {
        add(link, b"dir", "/proc/self/root", b"");
        add(EntryType::Directory, b"dir/etc", "", b"");
    });
    refuse("below a magic link", &proc, ROOM);
    let many = archive(|add| (0..70_000).for_each(|_| add(file, b"again", "", b"")));
    refuse("too many entries", &many, 1 << 20);
    let large = archive(|add| add(file, b"large", "", &[1; 100_000]));
    refuse("more than the disk holds", &large, 99_999);
    refuse("cut off", &large[..50_000], ROOM);
    refuse("without an end mark", &large[..100_864], ROOM);
    refuse("nothing", b"", ROOM);
    refuse("garbage", &[0x55; 4096], ROOM);
    refuse("of another kind", &one(EntryType::new(b'Z'), b"new", ""), ROOM);
    // The file system of the snapshot is full.
    let full = archive(|add| add(file, b"large", "", &vec![1; 80 << 20]));
    refuse("a full disk", &full, 1 << 30);
}

#[test]
fn what_replaces_what() {
    let workshop = workshop();
    let base = tmpfs(&workshop.path().join("t"), "mode=755");
    fs::write(dir(base.join("image/etc")).join("passwd"), "image").unwrap();
    let own = dir(base.join("1/fs"));
    fs::write(dir(own.join("etc")).join("kept"), "start").unwrap();
    fs::write(dir(own.join("full")).join("file"), "start").unwrap();
    let kept = fs::metadata(own.join("etc/kept")).unwrap().ino();
    let mut snapshot = snapshot(&base);
    let apply = |snapshot: &mut Snapshot, fill: &dyn Fn(Add)| {
        let applied = snapshot.apply(archive(fill).as_slice(), ROOM).unwrap();
        snapshot.publish(applied).unwrap();
    };
    let whiteout = |path: &str| fs::symlink_metadata(own.join(path)).is_ok_and(|m| m.mode() & 0o170_000 == 0o020_000);
    apply(&mut snapshot, &|add| {
        add(EntryType::Directory, b"etc", "", b"");
        add(EntryType::Char, b"etc/passwd", "", b"");
        add(EntryType::Char, b"full", "", b"");
    });
    assert!(whiteout("etc/passwd"), "the image has it");
    assert!(!own.join("full").exists(), "a directory of the start alone is gone with all that it had");
    assert_eq!(fs::metadata(own.join("etc/kept")).unwrap().ino(), kept, "what did not change is the same file");
    // The second export of the same task knows nothing of the first.
    apply(&mut snapshot, &|add| add(EntryType::Regular, b"full", "", b"a file now"));
    assert!(!own.join("etc/passwd").exists(), "the container has made it again, or never removed it");
    assert_eq!(fs::read_to_string(own.join("full")).unwrap(), "a file now");
    apply(&mut snapshot, &|_| {});
    assert_eq!(fs::read_to_string(own.join("full/file")).unwrap(), "start");
    // What is dropped is gone.
    let archive = archive(|add| add(EntryType::Regular, b"new", "", b""));
    drop(snapshot.apply(archive.as_slice(), ROOM).unwrap());
    assert!(!own.join("new").exists() && !base.join("1/.nacelle-fs-next").exists());
    snapshot.close().unwrap();
    // What a shim that died has left goes when the next one comes.
    dir(base.join("1/.nacelle-fs-next/x"));
    dir(base.join("1/.nacelle-fs-begin/x"));
    drop(self::snapshot(&base));
    assert_eq!(fs::read_dir(base.join("1")).unwrap().count(), 1);
    let mut text = String::new();
    File::open(own.join("etc/kept")).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "start");
}

#[test]
fn damaged_archives_change_nothing_else() {
    let workshop = workshop();
    let base = tmpfs(&workshop.path().join("t"), "mode=755");
    let upper = dir(base.join("upper"));
    let mut dice = Dice(99);
    (0..80).for_each(|_| drop(act(&upper, &mut dice)));
    let packed = base.join("archive");
    let words: [&dyn AsRef<std::ffi::OsStr>; 7] =
        [&"--create", &"--format=posix", &"--directory", &upper, &"--file", &packed, &"."];
    run("tar", "tar", &words);
    let sound = fs::read(&packed).unwrap();
    let snapshot = snapshot(&base);
    let before = survey(&base);
    let mut refused = 0;
    for _ in 0..400 {
        let mut bytes = sound.clone();
        let block = dice.roll(bytes.len() / 512) * 512;
        for _ in 0..=dice.roll(4) {
            bytes[block + dice.roll(512)] = dice.roll(256) as u8;
        }
        // A header that was hit still looks like one.
        let sum: u32 =
            (0..512).map(|at| if (148..156).contains(&at) { 32 } else { u32::from(bytes[block + at]) }).sum();
        bytes[block + 148..block + 155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        refused += usize::from(snapshot.apply(bytes.as_slice(), ROOM).is_err());
        let mut after = survey(&base);
        // Names came and went there.
        after.insert("1".into(), before[Path::new("1")].clone());
        assert_same(&before, &after);
    }
    assert!((20..400).contains(&refused), "{refused} of 400 refused");
}
