//! Many layers as one image, against the kernel's overlay of the layers themselves (C7).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use common::{Dice, assert_same, convert, dir, grow_layer, mount_erofs, mount_overlay, survey, workshop};
use nacelle_rootfs::erofs::reader::Image;
use nacelle_rootfs::erofs::writer::Plan;
use nacelle_rootfs::merge::merge;
use nacelle_rootfs::tree::Tree;
use nix::mount::{MsFlags, mount};
use rustix::fs::XattrFlags;

/// Merges images, bottom first, into `image`; returns the merged image's size and those of the images that are its devices.
fn write_merged(images: &[PathBuf], image: &Path) -> (u64, Vec<PathBuf>) {
    let files: Vec<_> = images.iter().map(|path| File::open(path).unwrap()).collect();
    let opened: Vec<_> = files.iter().map(|file| Image::open(file).unwrap()).collect();
    let merged = merge(&opened).unwrap();
    let plan = Plan::merged(&merged).unwrap();
    let mut once = Vec::new();
    plan.write(&mut once).unwrap();
    let mut again = Vec::new();
    Plan::merged(&merge(&opened).unwrap()).unwrap().write(&mut again).unwrap();
    assert!(once == again, "the same layers give the same bytes");
    Image::open(once.as_slice()).unwrap().check().unwrap();
    fs::write(image, &once).unwrap();
    (once.len() as u64, merged.layers.iter().map(|&layer| images[layer].clone()).collect())
}

fn mount_merged(image: &Path, devices: &[PathBuf], at: &Path) -> PathBuf {
    let at = dir(at);
    let devices: Vec<_> = devices.iter().map(|device| format!("device={}", device.display())).collect();
    let options = devices.join(",");
    mount(Some(image), &at, Some("erofs"), MsFlags::MS_RDONLY, Some(options.as_str())).expect("mount merged image");
    at
}

#[test]
fn random_stacks_look_like_overlayfs() {
    let workshop = workshop();
    for seed in 1..=40u64 {
        let mut dice = Dice(seed * 1_234_567);
        let base = dir(workshop.path().join(seed.to_string()));
        let (mut mounts, mut images) = (Vec::new(), Vec::new());
        for layer in 0..2 + dice.roll(5) as u16 {
            let mut tree = Tree { inodes: Vec::new() };
            grow_layer(&mut tree, &mut dice, layer, 0);
            let path = base.join(format!("{layer}.erofs"));
            Plan::new(&tree).unwrap().write(File::create(&path).unwrap()).unwrap();
            mounts.insert(0, mount_erofs(&path, &base.join(layer.to_string())));
            images.push(path);
        }
        let overlay = mount_overlay(&mounts.iter().map(|m| m.as_path()).collect::<Vec<_>>(), &base.join("overlay"));
        let (_, devices) = write_merged(&images, &base.join("merged.erofs"));
        let merged = mount_merged(&base.join("merged.erofs"), &devices, &base.join("merged"));
        assert_same(&survey(&overlay), &survey(&merged));
    }
}

/// Data in blocks, in chunks and behind inodes; hard links; attributes; replaced and removed files.
#[test]
fn file_data_stays_in_its_layer() {
    let workshop = workshop();
    let path = |name: &str| workshop.path().join(name);
    let write = |path: PathBuf, byte: u8, len: usize| fs::write(path, vec![byte; len]).unwrap();
    let lower = dir(path("lower"));
    write(lower.join("large"), 1, 3_000_001);
    write(lower.join("replaced"), 1, 100_000);
    write(lower.join("small"), 1, 100);
    write(lower.join("block"), 1, 4096);
    fs::write(lower.join("empty"), "").unwrap();
    fs::hard_link(lower.join("large"), dir(lower.join("dir")).join("large too")).unwrap();
    common::sparse(&lower.join("sparse"), 50 << 20, &[(0, 5000), (20 << 20, 100_000), ((50 << 20) - 1, 1)]);
    symlink("large", lower.join("link")).unwrap();
    rustix::fs::lsetxattr(lower.join("small"), "user.kept", b"value", XattrFlags::empty()).unwrap();
    rustix::fs::lsetxattr(lower.join("dir"), "trusted.kept", b"value", XattrFlags::empty()).unwrap();
    let upper = dir(path("upper"));
    write(upper.join("replaced"), 2, 2_000_000);
    write(dir(upper.join("dir")).join("new"), 2, 5000);
    let (mut images, mut mounts) = (Vec::new(), Vec::new());
    for name in ["lower", "upper"] {
        let image = path(&format!("{name}.erofs"));
        convert(&path(name), &image);
        mounts.insert(0, mount_erofs(&image, &path(&format!("{name}.d"))));
        images.push(image);
    }
    let (size, devices) = write_merged(&images, &path("merged.erofs"));
    assert!(size < 64 << 10, "{size}");
    assert_eq!(devices, images);
    let merged = mount_merged(&path("merged.erofs"), &devices, &path("merged"));
    let overlay = mount_overlay(&[&mounts[0], &mounts[1]], &path("overlay"));
    assert_same(&survey(&overlay), &survey(&merged));
    assert_eq!(fs::metadata(merged.join("sparse")).unwrap().size(), 50 << 20);
}

/// A layer is a device for large files only: what small layers hold is in the merged image, but for files with holes.
#[test]
fn small_layers_are_no_devices() {
    let workshop = workshop();
    let path = |name: &str| workshop.path().join(name);
    let (mut images, mut mounts) = (Vec::new(), Vec::new());
    for name in ["0-large", "1-small", "2-hidden", "3-sparse", "4-top"] {
        let layer = dir(path(name));
        match name {
            "0-large" => fs::write(layer.join("large"), vec![1; 2 << 20]).unwrap(),
            "1-small" => fs::write(layer.join("small"), vec![2; 300_000]).unwrap(),
            // All of its blocks are another's in the end.
            "2-hidden" => fs::write(layer.join("same"), vec![3; 2 << 20]).unwrap(),
            "3-sparse" => common::sparse(&layer.join("sparse"), 9 << 20, &[(1 << 20, 8192)]),
            _ => fs::write(layer.join("same"), vec![4; 5000]).unwrap(),
        }
        let image = path(&format!("{name}.erofs"));
        convert(&layer, &image);
        mounts.insert(0, mount_erofs(&image, &path(&format!("{name}.d"))));
        images.push(image);
    }
    let (size, devices) = write_merged(&images, &path("merged.erofs"));
    assert!((300_000..400_000).contains(&size), "{size}");
    assert_eq!(devices, [images[0].clone(), images[3].clone()]);
    let merged = mount_merged(&path("merged.erofs"), &devices, &path("merged"));
    let overlay = mount_overlay(&mounts.iter().map(|m| m.as_path()).collect::<Vec<_>>(), &path("overlay"));
    assert_same(&survey(&overlay), &survey(&merged));
}

/// What an image says of a file's size is not believed.
#[test]
fn damaged_images_never_panic() {
    let workshop = workshop();
    let layer = dir(workshop.path().join("layer"));
    fs::write(layer.join("first"), vec![1; 8192]).unwrap();
    fs::write(layer.join("second"), vec![2; 8192]).unwrap();
    // An inode with a size of 64 bits.
    std::os::unix::fs::chown(layer.join("second"), Some(100_000), None).unwrap();
    let image = workshop.path().join("image.erofs");
    convert(&layer, &image);
    let sound = fs::read(&image).unwrap();
    // Everything between the superblock's block and the data.
    for at in 4096..8192 - 8 {
        let mut bytes = sound.clone();
        bytes[at..at + 8].fill(0xff);
        let Ok(damaged) = Image::open(bytes.as_slice()) else { continue };
        let good = Image::open(sound.as_slice()).unwrap();
        let _ = merge(&[good, damaged]);
    }
}
