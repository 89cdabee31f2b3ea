//! Snapshot directories → trees: whiteouts of every kind (A13, A14, C8-C11), limits, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use common::{Seen, convert, dir, mount_erofs, mount_overlay, survey, tmpfs, workshop};
use nacelle_rootfs::Limits;
use nacelle_rootfs::layer::{LayerError, scan};
use nacelle_rootfs::tree::{Node, Tree};
use nix::sys::stat::{Mode, SFlag, mknod};
use rustix::fs::XattrFlags;

fn whiteout(path: &Path) {
    mknod(path, SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

/// The lower of most tests: `kept`, `gone`, `folder/{old,sub/file}`, `swept/{old,sub/file}`.
fn lower(at: &Path) -> PathBuf {
    let lower = dir(at);
    for name in ["kept", "gone", "folder/old", "folder/sub/file", "swept/old", "swept/sub/file"] {
        dir(lower.join(name).parent().unwrap());
        fs::write(lower.join(name), format!("lower {name}")).unwrap();
    }
    lower
}

/// Converts the layers (topmost first) and shows what overlayfs makes of the images.
fn overlay_of_images(workshop: &Path, layers: &[&Path]) -> PathBuf {
    let mounted: Vec<PathBuf> = layers
        .iter()
        .enumerate()
        .map(|(index, layer)| {
            let image = workshop.join(format!("{index}.erofs"));
            convert(layer, &image);
            mount_erofs(&image, &workshop.join(format!("image{index}")))
        })
        .collect();
    mount_overlay(&mounted.iter().map(PathBuf::as_path).collect::<Vec<_>>(), &workshop.join("merged-images"))
}

fn names(root: &Path) -> Vec<String> {
    let shown: std::collections::BTreeMap<PathBuf, Seen> = survey(root);
    shown.keys().map(|p| p.to_str().unwrap().to_owned()).filter(|n| !n.is_empty()).collect()
}

/// A13, A14: an overlay of images shows what an overlay of the directories shows.
#[test]
fn overlay_of_images_equals_overlay_of_directories() {
    let workshop = workshop();
    let bottom = lower(&workshop.path().join("bottom"));
    let top = dir(workshop.path().join("top"));
    whiteout(&top.join("gone"));
    dir(top.join("folder"));
    whiteout(&top.join("folder/old"));
    fs::write(top.join("folder/new"), "new").unwrap();
    dir(top.join("swept"));
    set_xattr(&top.join("swept"), "trusted.overlay.opaque", b"y");
    fs::write(top.join("swept/new"), "new").unwrap();
    whiteout(&top.join("never was"));
    let merged = mount_overlay(&[&top, &bottom], &workshop.path().join("merged"));
    let images = overlay_of_images(workshop.path(), &[&top, &bottom]);
    common::assert_same(&survey(&merged), &survey(&images));
    assert_eq!(names(&images), ["folder", "folder/new", "folder/sub", "folder/sub/file", "kept", "swept", "swept/new"]);
}

/// A14: `x` is not opaque; it announces whiteouts that are files, which become devices.
#[test]
fn whiteouts_that_are_files() {
    let workshop = workshop();
    let bottom = lower(&workshop.path().join("bottom"));
    let top = dir(workshop.path().join("top"));
    for folder in ["", "folder"] {
        set_xattr(&dir(top.join(folder)), "trusted.overlay.opaque", b"x");
    }
    for name in ["gone", "folder/old"] {
        File::create(top.join(name)).unwrap();
        set_xattr(&top.join(name), "trusted.overlay.whiteout", b"");
    }
    fs::write(top.join("folder/new"), "new").unwrap();
    let merged = mount_overlay(&[&top, &bottom], &workshop.path().join("merged"));
    let images = overlay_of_images(workshop.path(), &[&top, &bottom]);
    common::assert_same(&survey(&merged), &survey(&images));
    assert!(!names(&images).contains(&"folder/old".into()));
    assert!(names(&images).contains(&"swept/old".into()));
    let tree = scan(&top, &Limits::default()).unwrap();
    assert!(!tree.inodes[Tree::ROOT].is_opaque());
    assert!(tree.inodes.iter().all(|i| i.xattrs.is_empty()));
}

/// A14: what a snapshotter wrote without privileges counts in the guest, which has them.
#[test]
fn user_attributes_of_overlay_become_trusted() {
    let workshop = workshop();
    let bottom = lower(&workshop.path().join("bottom"));
    let top = dir(workshop.path().join("top"));
    set_xattr(&dir(top.join("swept")), "user.overlay.opaque", b"y");
    set_xattr(&dir(top.join("folder")), "user.overlay.opaque", b"x");
    File::create(top.join("folder/old")).unwrap();
    set_xattr(&top.join("folder/old"), "user.overlay.whiteout", b"y");
    set_xattr(&top.join("folder"), "user.overlay.impure", b"y");
    set_xattr(&top.join("folder"), "user.overlay.origin", b"a handle");
    let images = overlay_of_images(workshop.path(), &[&top, &bottom]);
    assert_eq!(names(&images), ["folder", "folder/sub", "folder/sub/file", "gone", "kept", "swept"]);
}

/// C8-C10: markers of OCI layers act on the layers below and are never seen.
#[test]
fn markers_become_whiteouts() {
    let workshop = workshop();
    let bottom = lower(&workshop.path().join("bottom"));
    let top = dir(workshop.path().join("top"));
    for name in [".wh.gone", ".wh..wh.aufs", "folder/.wh.old", "folder/new", "swept/.wh..wh..opq", "swept/new"] {
        dir(top.join(name).parent().unwrap());
        fs::write(top.join(name), "").unwrap();
    }
    dir(top.join(".wh..wh.plnk/inside"));
    let images = overlay_of_images(workshop.path(), &[&top, &bottom]);
    assert_eq!(names(&images), ["folder", "folder/new", "folder/sub", "folder/sub/file", "kept", "swept", "swept/new"]);
}

/// C8: a layer does not remove what it adds; a directory that it puts in a removed one's place starts empty.
#[test]
fn a_marker_beside_its_name() {
    let workshop = workshop();
    let bottom = lower(&workshop.path().join("bottom"));
    let top = dir(workshop.path().join("top"));
    for name in [".wh.kept", "kept", ".wh.swept", "swept/new"] {
        dir(top.join(name).parent().unwrap());
        fs::write(top.join(name), "top").unwrap();
    }
    set_xattr(&top.join("swept"), "user.comment", b"stays");
    let images = overlay_of_images(workshop.path(), &[&top, &bottom]);
    assert_eq!(fs::read(images.join("kept")).unwrap(), b"top");
    assert_eq!(fs::read_dir(images.join("swept")).unwrap().count(), 1);
    let mut value = [0; 8];
    assert_eq!(rustix::fs::getxattr(images.join("swept"), "user.comment", &mut value), Ok(5));
}

/// C11: markers for "", "." and ".." would delete the directory itself or its parent.
#[test]
fn markers_without_a_name_are_refused() {
    let workshop = workshop();
    for name in [".wh.", ".wh..", ".wh..."] {
        let top = dir(workshop.path().join(format!("layer{name}")));
        fs::write(top.join(name), "").unwrap();
        let error = scan(&top, &Limits::default()).unwrap_err();
        assert!(matches!(&error, LayerError::BadMarker(path) if path.ends_with(name)), "{error}");
    }
}

/// C12: a loop of links and a link out of the layer are plain data; the directory behind them is not entered.
#[test]
fn links_are_never_followed() {
    let workshop = workshop();
    let outside = dir(workshop.path().join("outside"));
    fs::write(outside.join("secret"), "secret").unwrap();
    let layer = dir(workshop.path().join("layer"));
    symlink(&outside, layer.join("out")).unwrap();
    symlink("loop", layer.join("loop")).unwrap();
    let tree = scan(&layer, &Limits::default()).unwrap();
    assert_eq!(tree.inodes.len(), 3);
    // The layer's own path may be a link: snapshotters do that.
    symlink(&layer, workshop.path().join("link to layer")).unwrap();
    assert_eq!(scan(&workshop.path().join("link to layer"), &Limits::default()).unwrap().inodes.len(), 3);
}

/// A file whose bytes are in another layer would come out as zeros.
#[test]
fn metacopy_files_are_refused() {
    let workshop = workshop();
    let layer = dir(workshop.path().join("layer"));
    File::create(layer.join("file")).unwrap().set_len(1000).unwrap();
    set_xattr(&layer.join("file"), "trusted.overlay.metacopy", b"");
    let error = scan(&layer, &Limits::default()).unwrap_err();
    assert!(matches!(&error, LayerError::Metacopy(path) if path.ends_with("file")), "{error}");
}

#[test]
fn mounts_inside_are_refused() {
    let workshop = workshop();
    let layer = dir(workshop.path().join("layer"));
    tmpfs(&layer.join("mounted"), "size=1m");
    let error = scan(&layer, &Limits::default()).unwrap_err();
    assert!(matches!(&error, LayerError::Mount(path) if path.ends_with("mounted")), "{error}");
    // But the layer itself may be one.
    assert_eq!(scan(&layer.join("mounted"), &Limits::default()).unwrap().inodes.len(), 1);
}

#[test]
fn each_limit_has_its_error() {
    let workshop = workshop();
    let layer = dir(workshop.path().join("layer"));
    fs::write(layer.join("file"), vec![0; 10_000]).unwrap();
    File::create(layer.join("sparse")).unwrap().set_len(1 << 40).unwrap();
    dir(layer.join("a/b/c"));
    set_xattr(&layer.join("file"), "user.a", &[0; 500]);
    let try_with = |change: fn(&mut Limits)| {
        let mut limits = Limits { entries: 5, bytes: 10_000, depth: 3, path: 5, xattrs: 506, ..Limits::default() };
        change(&mut limits);
        scan(&layer, &limits)
    };
    assert_eq!(try_with(|_| {}).unwrap().inodes.len(), 6);
    assert!(matches!(try_with(|l| l.entries = 4), Err(LayerError::TooManyEntries { limit: 4, .. })));
    assert!(matches!(try_with(|l| l.bytes = 9999), Err(LayerError::TooManyBytes { limit: 9999, .. })));
    assert!(matches!(try_with(|l| l.depth = 2), Err(LayerError::TooDeep(path)) if path.ends_with("a/b/c")));
    assert!(matches!(try_with(|l| l.path = 4), Err(LayerError::TooDeep(path)) if path.ends_with("a/b/c")));
    assert!(matches!(try_with(|l| l.xattrs = 505), Err(LayerError::XattrsTooLarge(path)) if path.ends_with("file")));
    let missing = scan(&layer.join("nowhere"), &Limits::default()).unwrap_err();
    assert!(missing.to_string().contains("nowhere"), "{missing}");
    assert!(scan(&layer.join("file"), &Limits::default()).unwrap_err().to_string().contains("file"));
}

/// Reading a layer leaves no trace on it.
#[test]
fn access_times_stay() {
    let workshop = workshop();
    let layer = dir(workshop.path().join("layer"));
    fs::write(layer.join("file"), "content").unwrap();
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(1_000_000);
    let times = fs::FileTimes::new().set_accessed(old);
    for path in [layer.clone(), layer.join("file")] {
        File::open(path).unwrap().set_times(times).unwrap();
    }
    let before = [&layer, &layer.join("file")].map(|p| fs::metadata(p).unwrap().atime());
    convert(&layer, &workshop.path().join("image"));
    assert_eq!(before, [&layer, &layer.join("file")].map(|p| fs::metadata(p).unwrap().atime()));
}

/// A writable directory may change while it is read: that is an error with a name, or an image of some state, never a wrong one.
#[test]
fn a_file_that_shrinks_meanwhile() {
    let workshop = workshop();
    let layer = dir(workshop.path().join("layer"));
    fs::write(layer.join("file"), vec![1; 100_000]).unwrap();
    let tree = scan(&layer, &Limits::default()).unwrap();
    assert!(matches!(tree.inodes[1].node, Node::File { size: 100_000, .. }));
    fs::write(layer.join("file"), "short").unwrap();
    let plan = nacelle_rootfs::erofs::writer::Plan::new(&tree).unwrap();
    let error = plan.write(std::io::sink()).unwrap_err();
    assert_eq!(error.to_string(), "read /file of the layer: it changed meanwhile");
    fs::remove_file(layer.join("file")).unwrap();
    assert!(plan.write(std::io::sink()).unwrap_err().to_string().contains("/file"));
    // A device or FIFO in its place must not hang the reader.
    nix::unistd::mkfifo(&layer.join("file"), Mode::S_IRUSR).unwrap();
    assert!(plan.write(std::io::sink()).is_err());
}

/// Thousands of pieces in one file are told apart up to a bound, and then merged.
#[test]
fn a_file_in_very_many_pieces() {
    let workshop = workshop();
    let layer = tmpfs(&workshop.path().join("layer"), "size=200m");
    let file = File::create(layer.join("comb")).unwrap();
    (0..20_000u64).for_each(|i| file.write_all_at(&[1], i * 8192).unwrap());
    let (_, written) = convert(&layer, &workshop.path().join("image"));
    assert!(written.size <= (20_000 * 8192) + (1 << 20));
    common::assert_faithful(workshop.path(), &layer);
}
