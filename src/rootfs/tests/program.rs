//! The image of a machine's root: complete, made once, made anew for a program that was replaced.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::{run, workshop};
use nacelle_rootfs::erofs::reader::Image;
use nacelle_rootfs::program::{self, ProgramError};

const POINTS: &[&str] = &["dev", "proc", "run"];

#[test]
fn it_holds_the_program_and_mount_points() {
    let workshop = workshop();
    let (cache, agent) = (workshop.path().join("cache"), workshop.path().join("agent"));
    let bytes: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    fs::write(&agent, &bytes).unwrap();
    let path = program::image(&cache, &agent, "init", POINTS).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o444);
    run("erofs-utils", "fsck.erofs", &[&path]);

    let file = File::open(&path).unwrap();
    let image = Image::open(&file).unwrap();
    let root = image.root().unwrap();
    let names: Vec<_> = image.entries(&root).unwrap().into_iter().map(|e| e.name.to_vec()).collect();
    let names: Vec<_> = names.iter().filter(|n| !n.starts_with(b".")).map(|n| String::from_utf8_lossy(n)).collect();
    assert_eq!(names, ["dev", "init", "proc", "run"]);
    let init = image.lookup(b"init").unwrap();
    let mut content = vec![0; bytes.len()];
    assert_eq!(image.read(&init, 0, &mut content).unwrap(), bytes.len());
    assert_eq!(content, bytes);
}

#[test]
fn it_is_made_once_and_again_for_another_program() {
    let workshop = workshop();
    let (cache, agent) = (workshop.path().join("cache"), workshop.path().join("agent"));
    fs::write(&agent, "one").unwrap();
    let image = |points| program::image(&cache, &agent, "init", points).unwrap();
    let first = image(POINTS);
    let made = fs::metadata(&first).unwrap().modified().unwrap();
    assert_eq!(image(POINTS), first);
    assert_eq!(fs::metadata(&first).unwrap().modified().unwrap(), made);
    assert_ne!(image(&["dev"]), first);

    // As a package manager does it.
    fs::write(workshop.path().join("new"), "two").unwrap();
    fs::rename(workshop.path().join("new"), &agent).unwrap();
    let day = Duration::from_secs(25 * 60 * 60);
    File::open(&first).unwrap().set_modified(SystemTime::now() - day).unwrap();
    let second = image(POINTS);
    assert_ne!(second, first);
    assert!(second.exists() && !first.exists(), "an image of a program that is gone goes a day later");
}

#[test]
fn what_cannot_be_read_is_named() {
    let workshop = workshop();
    let missing = workshop.path().join("none");
    let error = program::image(workshop.path(), &missing, "init", POINTS).unwrap_err();
    assert!(matches!(&error, ProgramError::Io { what: "open", path, .. } if path == Path::new(&missing)), "{error}");
}
