//! Named volumes: they are there whole or not at all, and nobody's volume is removed (B11, B22).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use nacelle_rootfs::volume::store::{Store, StoreError};

fn names(store: &Store) -> Vec<(String, bool)> {
    store.list().unwrap().into_iter().map(|info| (info.name, info.in_use)).collect()
}

fn left(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir.join("volumes")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name != ".lock").collect();
    names.sort();
    names
}

// B11
#[test]
fn volumes_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path());
    assert_eq!(names(&store), []);
    assert!(!dir.path().join("volumes").exists(), "looking makes nothing");
    let before = SystemTime::now();
    let path = store.create("cache_1").unwrap();
    assert_eq!(path, dir.path().join("volumes/cache_1/data"));
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(fs::metadata(dir.path().join("volumes")).unwrap().mode() & 0o7777, 0o700);
    store.create("b").unwrap();
    assert_eq!(names(&store), [("b".to_owned(), false), ("cache_1".to_owned(), false)]);
    let error = store.create("b").unwrap_err();
    assert!(matches!(&error, StoreError::Exists(name) if name == "b"), "{error}");
    let info = store.inspect("cache_1").unwrap();
    assert_eq!(info.path, path);
    let age = info.created.duration_since(before).unwrap_or_else(|e| e.duration());
    assert!(age.as_secs() < 60, "{age:?}");
    fs::write(path.join("file"), [1; 10_000]).unwrap();
    fs::hard_link(path.join("file"), path.join("again")).unwrap();
    symlink("/usr", path.join("usr")).unwrap();
    let bytes = store.bytes("cache_1").unwrap();
    assert!((10_000..40_000).contains(&bytes), "one file, no links: {bytes}");
    assert_eq!(store.inspect("cache_1").unwrap().created, info.created, "writing does not change it");
    store.remove("cache_1").unwrap();
    assert_eq!(left(dir.path()), ["b"]);
    for result in [store.remove("cache_1"), store.hold("cache_1").map(drop), store.inspect("cache_1").map(drop)] {
        assert!(matches!(result, Err(StoreError::NotFound(name)) if name == "cache_1"));
    }
}

// B11
#[test]
fn a_volume_in_use_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path());
    store.create("a").unwrap();
    let (path, first) = store.hold("a").unwrap();
    let (_, second) = store.hold("a").unwrap();
    assert_eq!(names(&store), [("a".to_owned(), true)]);
    drop(first);
    let error = store.remove("a").unwrap_err();
    assert_eq!(error.to_string(), "remove volume \"a\": it is in use");
    assert!(path.is_dir());
    drop(second);
    store.remove("a").unwrap();
    assert_eq!(left(dir.path()), [""; 0]);
}

// B22
#[test]
fn names_lead_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path());
    for name in ["", ".", "..", ".lock", "../x", "a/b", "/a"] {
        for result in [store.create(name).map(drop), store.remove(name), store.hold(name).map(drop)] {
            let error = result.unwrap_err().to_string();
            assert!(error.starts_with(&format!("volume name {name:?} ")), "{error}");
        }
    }
    store.create("real").unwrap();
    symlink("real", dir.path().join("volumes/link")).unwrap();
    fs::remove_file(dir.path().join("volumes/real/lock")).unwrap();
    symlink("/etc/passwd", dir.path().join("volumes/real/lock")).unwrap();
    assert!(matches!(store.hold("real"), Err(StoreError::Io { .. })));
}

#[test]
fn what_the_dead_left_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path());
    store.create("a").unwrap();
    for left in ["volumes/.new/data", "volumes/.gone/data/1/2", "volumes/.gone/1"] {
        fs::create_dir_all(dir.path().join(left)).unwrap();
    }
    assert_eq!(names(&store), [("a".to_owned(), false)]);
    store.create("b").unwrap();
    assert_eq!(left(dir.path()), ["a", "b"]);
}

/// A guest can make directories deeper than a path is long, or than files may be open.
#[test]
fn deep_trees_are_removed() {
    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path());
    let path = store.create("a").unwrap();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at = openat(CWD, &path, flags, Mode::empty()).unwrap();
    for _ in 0..5_000 {
        mkdirat(&at, "1", Mode::RWXU).unwrap();
        at = openat(&at, "1", flags, Mode::empty()).unwrap();
    }
    fs::create_dir(path.join("2")).unwrap();
    fs::write(path.join("2/file"), "").unwrap();
    assert!(store.bytes("a").is_err(), "it cannot be walked by paths");
    store.remove("a").unwrap();
    assert_eq!(left(dir.path()), [""; 0]);
}

/// Of many who make, hold and remove one volume at once, nobody sees half of one, and who holds it has it.
#[test]
fn everybody_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path());
    let done = AtomicBool::new(false);
    let held = std::thread::scope(|scope| {
        let holders: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut held = 0;
                    while !done.load(Ordering::Relaxed) {
                        match store.hold("a") {
                            Ok((path, _lock)) => {
                                held += 1;
                                File::create(path.join("file")).expect("a volume that is held is there");
                            }
                            Err(StoreError::NotFound(_)) => {}
                            Err(error) => panic!("{error:?}"),
                        }
                    }
                    held
                })
            })
            .collect();
        for _ in 0..50 {
            let _ = store.create("a").inspect_err(|e| assert!(matches!(e, StoreError::Exists(_)), "{e:?}"));
            let _ = store.remove("a").inspect_err(|e| assert!(matches!(e, StoreError::InUse(_)), "{e:?}"));
        }
        done.store(true, Ordering::Relaxed);
        holders.into_iter().map(|holder| holder.join().unwrap()).sum::<u32>()
    });
    assert!(held > 0, "the test tests something");
}
