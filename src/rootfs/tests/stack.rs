//! Lookup through a stack of images against the kernel's overlayfs (A12-A16): random layers, every path.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use common::{Dice, NAMES, grow_layer, mount_erofs, mount_overlay, workshop};
use nacelle_rootfs::erofs::reader::Image;
use nacelle_rootfs::erofs::writer::Plan;
use nacelle_rootfs::stack::Stack;
use nacelle_rootfs::tree::Tree;

const LAYERS: u16 = 5;

/// The mode of what the kernel finds, whose last bits tell the layer.
fn in_kernel(path: &Path) -> Option<u32> {
    Some(fs::symlink_metadata(path).ok()?.mode())
}

#[test]
fn lookup_agrees_with_overlayfs() {
    let workshop = workshop();
    for seed in 1..=25u64 {
        let mut dice = Dice(seed * 7_777_777);
        let base = common::dir(workshop.path().join(seed.to_string()));
        let (mut mounts, mut files) = (Vec::new(), Vec::new());
        for layer in 0..LAYERS {
            let mut tree = Tree { inodes: Vec::new() };
            grow_layer(&mut tree, &mut dice, layer, 0);
            let path = base.join(format!("{layer}.erofs"));
            Plan::new(&tree).unwrap().write(File::create(&path).unwrap()).unwrap();
            files.push(File::open(&path).unwrap());
            mounts.insert(0, mount_erofs(&path, &base.join(layer.to_string())));
        }
        let merged = mount_overlay(&mounts.iter().map(|m| m.as_path()).collect::<Vec<_>>(), &base.join("merged"));
        let stack = Stack::new(files.iter().map(|file| Image::open(file).unwrap()).collect());
        let mut present = 0;
        for number in 0..(5 * 5 * 5 * 5) {
            let digits = [number / 125, number / 25 % 5, number / 5 % 5, number % 5];
            let path: Vec<&[u8]> = digits.iter().map_while(|&d: &usize| NAMES.get(d).copied()).collect();
            if path.is_empty() {
                continue;
            }
            let text = String::from_utf8(path.join(&b'/')).unwrap();
            // The kernel follows links that are parents; a component named through one is absent for us (A15).
            let through_link = (1..path.len()).any(|n| {
                let parent = String::from_utf8(path[..n].join(&b'/')).unwrap();
                fs::symlink_metadata(merged.join(parent)).is_ok_and(|m| m.is_symlink())
            });
            let expected = if through_link { None } else { in_kernel(&merged.join(&text)) };
            let found = stack.lookup(path.iter().copied()).unwrap();
            assert_eq!(found.as_ref().map(|f| u32::from(f.inode.mode)), expected, "seed {seed}: {text}");
            if let Some(found) = &found {
                present += 1;
                assert_eq!(u32::from(found.inode.mode & 0o77), found.layer as u32, "seed {seed}: {text}");
            }
        }
        assert!(present > 3, "seed {seed} tests something");
        assert!(stack.lookup([]).unwrap().is_none(), "A12: the empty path is absent");
    }
}
