//! Layers that are used before they are converted: what the kernel's overlayfs makes of their indexes is what is in their directories.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::{Shop, assert_same, dir, mount_erofs, mount_overlay, sparse, survey, tmpfs};
use nacelle_rootfs::cache::Missing;
use nacelle_rootfs::layer::refer::REFERRED;
use nacelle_rootfs::{Layer, Lower, Outcome, RootfsPlan};
use nix::mount::{MsFlags, mount};
use rustix::fs::XattrFlags;

const LARGE: usize = REFERRED as usize;

impl Shop {
    fn acquire(&self, lowers: &[Lower], how: Missing) -> Vec<Layer> {
        let plan = RootfsPlan { lowers: lowers.to_vec(), read_only: false };
        let layers = self.cache.acquire(&plan, &self.path("scratch"), 2, how).unwrap();
        self.cache.merge(layers, &self.path("scratch")).unwrap()
    }

    /// The layer's files as the guest has them.
    fn mount(&self, layer: &Layer, at: &str) -> PathBuf {
        let image = dir(self.path(&format!("{at}.image")));
        let devices: Vec<_> = layer.devices.iter().map(|device| format!("device={}", device.path.display())).collect();
        mount(Some(&layer.path), &image, Some("erofs"), MsFlags::MS_RDONLY, Some(devices.join(",").as_str())).unwrap();
        if layer.data.is_empty() {
            return image;
        }
        let target = dir(self.path(at));
        let data: String = layer.data.iter().map(|dir| format!("::{}", dir.display())).collect();
        let options = format!("metacopy=on,lowerdir={}{data}", image.display());
        mount(Some("overlay"), &target, Some("overlay"), MsFlags::MS_RDONLY, Some(options.as_str())).unwrap();
        target
    }
}

fn write(path: &Path, byte: u8, len: usize) {
    fs::write(path, vec![byte; len]).unwrap();
}

/// Only what is large, readable for everybody and of one name is left where it is.
#[test]
fn large_files_are_read_where_they_are() {
    let shop = Shop::new();
    let layer = dir(shop.path("layer"));
    write(&layer.join("small"), 1, 5000);
    write(&layer.join("large"), 2, LARGE + 1);
    write(&layer.join("below the limit"), 3, LARGE - 1);
    rustix::fs::lsetxattr(layer.join("large"), "user.kept", b"value", XattrFlags::empty()).unwrap();
    sparse(&layer.join("sparse"), 4 * REFERRED, &[(5000, 100), (3 * REFERRED, LARGE)]);
    write(&layer.join("private"), 4, LARGE);
    fs::set_permissions(layer.join("private"), Permissions::from_mode(0o600)).unwrap();
    let hidden = dir(layer.join("hidden"));
    write(&hidden.join("large"), 5, LARGE);
    fs::set_permissions(&hidden, Permissions::from_mode(0o700)).unwrap();
    write(&layer.join("one name"), 6, LARGE);
    fs::hard_link(layer.join("one name"), dir(layer.join("deep/er")).join("another")).unwrap();
    write(&layer.join("deep/er/large"), 7, 2 * LARGE);
    let lowers = [Lower::Snapshot(layer.clone())];

    let index = shop.acquire(&lowers, Missing::Index(1 << 20));
    assert_eq!((index.len(), index[0].outcome, &index[0].data), (1, Outcome::Indexed, &vec![layer.clone()]));
    let copied = 4 * REFERRED; // below the limit, private, hidden, two names
    assert!((copied - 1..copied + (64 << 10)).contains(&index[0].size), "{}", index[0].size);
    assert_same(&survey(&layer), &survey(&shop.mount(&index[0], "guest")));
    assert!(shop.cache.ls().unwrap().is_empty(), "an index is for one container");
    // Where there is little to gain, or nobody asks for it, the layer is converted, and then it is there.
    assert_eq!(shop.acquire(&lowers, Missing::Index(1 << 40))[0].outcome, Outcome::Built);
    assert_eq!(shop.acquire(&lowers, Missing::Index(0))[0].outcome, Outcome::Hit);
}

/// What is visible comes from the right layer, whatever has the same path in others.
#[test]
fn stacks_look_like_overlayfs() {
    let shop = Shop::new();
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| dir(shop.path(name)));
    let whiteout = |path: &Path| {
        let mode = rustix::fs::Mode::from_raw_mode(0);
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::CharacterDevice, mode, 0).unwrap();
    };
    for name in ["replaced", "removed", "kept", "shrunk", "removed and back"] {
        write(&a.join(name), 1, LARGE + 1);
    }
    for name in ["opaque", "gone", "merged"] {
        write(&dir(a.join(name)).join("large"), 2, LARGE);
    }
    write(&b.join("replaced"), 3, LARGE + 2);
    write(&b.join("shrunk"), 4, 10);
    whiteout(&b.join("removed"));
    whiteout(&b.join("removed and back"));
    whiteout(&b.join("gone"));
    write(&dir(b.join("opaque")).join("other"), 5, LARGE);
    rustix::fs::lsetxattr(b.join("opaque"), "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
    write(&dir(b.join("merged")).join("other"), 6, LARGE);
    // A layer that is in the cache already, between and above those that are not.
    write(&c.join("replaced"), 7, LARGE + 3);
    write(&dir(c.join("merged")).join("third"), 8, LARGE);
    write(&d.join("removed and back"), 9, LARGE);
    let lowers = [&a, &b, &c, &d].map(|dir| Lower::Snapshot(dir.clone()));
    drop(shop.acquire(&lowers[2..3], Missing::Convert));

    let layers = shop.acquire(&lowers, Missing::Index(1 << 20));
    assert_eq!(layers.len(), 1, "one merged image: nothing below it that a path could lead to");
    assert_eq!(layers[0].data, [d.clone(), b.clone(), a.clone()]);
    assert!(layers[0].devices.iter().all(|device| device.size < (2 << 20) || device.outcome == Outcome::Hit));
    let overlay = mount_overlay(&[&d, &c, &b, &a], &shop.path("overlay"));
    assert_same(&survey(&overlay), &survey(&shop.mount(&layers[0], "guest")));
    // Completed, they are images like all others.
    drop(layers);
    drop(shop.cache.complete(&[a, b, d]).unwrap());
    let whole = shop.acquire(&lowers, Missing::Index(1 << 20));
    assert!(whole[0].data.is_empty() && whole[0].outcome == Outcome::Built);
    assert_same(&survey(&overlay), &survey(&shop.mount(&whole[0], "whole")));
}

/// Where something else is in the stack, everything is converted.
#[test]
fn other_lowers_are_not_mixed_with_indexes() {
    let shop = Shop::new();
    let [layer, upper] = ["layer", "upper"].map(|name| dir(shop.path(name)));
    write(&layer.join("large"), 1, LARGE);
    let lowers = [Lower::Snapshot(layer.clone()), Lower::Upper(upper.clone())];
    assert_eq!(shop.acquire(&lowers, Missing::Index(1))[0].outcome, Outcome::Indexed, "an empty upper is none");
    write(&upper.join("file"), 1, 1);
    let layers = shop.acquire(&lowers, Missing::Index(1));
    let outcomes: Vec<_> = layers.iter().map(|layer| layer.outcome).collect();
    assert_eq!(outcomes, [Outcome::Built, Outcome::Ephemeral]);
    assert_same(&survey(&layer), &survey(&mount_erofs(&layers[0].path, &shop.path("mounted"))));
}

/// Below the container's own overlay, as the agent has it, the guest's files are plain files: what is copied up is whole.
#[test]
fn copies_are_whole() {
    let shop = Shop::new();
    let layer = dir(shop.path("layer"));
    write(&layer.join("large"), 1, LARGE);
    let index = shop.acquire(&[Lower::Snapshot(layer.clone())], Missing::Index(1));
    let lower = shop.mount(&index[0], "lower");
    let upper = tmpfs(&shop.path("upper"), "size=64m");
    let (top, work, root) = (dir(upper.join("upper")), dir(upper.join("work")), dir(shop.path("rootfs")));
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), top.display(), work.display());
    mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
    fs::set_permissions(root.join("large"), Permissions::from_mode(0o640)).unwrap();
    assert!(fs::read(top.join("large")).unwrap() == vec![1; LARGE]);
    let mut names = vec![0; 4096];
    let len = rustix::fs::llistxattr(top.join("large"), &mut names).unwrap();
    let names = String::from_utf8_lossy(&names[..len]).into_owned();
    assert!(!names.contains("metacopy") && !names.contains("redirect"), "{names}");
}
