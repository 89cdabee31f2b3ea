//! The store of converted layers: hits, damage, full disks, collection (C1, C3, C4, C5, C9).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use common::{Shop, assert_same, assert_sound, between_starts, dir, mount_erofs, run, survey, tmpfs, workshop};
use nacelle_rootfs::cache::Missing;
use nacelle_rootfs::patch::{Sources, decode};
use nacelle_rootfs::plan::plan;
use nacelle_rootfs::tar::DiffId;
use nacelle_rootfs::{Cache, CacheError, Layer, Limits, Lower, Mount, Outcome, RootfsPlan};
use sha2::{Digest, Sha256};

impl Shop {
    fn snapshot(&self, name: &str) -> PathBuf {
        let snapshot = dir(self.path(name));
        fs::write(snapshot.join("file"), format!("{name}\n").repeat(2000)).unwrap();
        fs::write(snapshot.join(name), name).unwrap();
        snapshot
    }

    fn acquire(&self, lowers: &[Lower]) -> Result<Vec<Layer>, CacheError> {
        let plan = RootfsPlan { lowers: lowers.to_vec(), read_only: false };
        self.cache.acquire_all(&plan, &self.path("scratch"), 2)
    }

    fn acquire_one(&self, snapshot: &Path) -> Layer {
        let mut layers = self.acquire(&[Lower::Snapshot(snapshot.into())]).unwrap();
        assert_eq!(layers.len(), 1);
        layers.remove(0)
    }

    fn files(&self, dir: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(dir)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

const STORE: &str = "root/layers/erofs-v1";

fn outcomes(layers: &[Layer]) -> Vec<Outcome> {
    layers.iter().map(|l| l.outcome).collect()
}

/// C4: converted once, found afterwards, also by the next process; complete, read-only and private.
#[test]
fn layers_are_converted_once() {
    let shop = Shop::new();
    let snapshots = ["a", "b", "c"].map(|name| Lower::Snapshot(shop.snapshot(name)));
    let layers = shop.acquire(&snapshots).unwrap();
    assert_eq!(outcomes(&layers), [Outcome::Built; 3]);
    for (layer, snapshot) in layers.iter().zip(&snapshots) {
        assert_sound(&layer.path);
        let mounted = mount_erofs(&layer.path, &shop.path(&layer.key));
        assert_same(&survey(snapshot.source()), &survey(&mounted));
        let metadata = fs::metadata(&layer.path).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.len()), (0o444, layer.size));
    }
    assert_eq!(fs::metadata(shop.path(STORE)).unwrap().mode() & 0o7777, 0o700);
    let again = Cache::open(&shop.path("root"), Limits::default()).unwrap();
    let plan = RootfsPlan { lowers: snapshots.to_vec(), read_only: false };
    let found = again.acquire_all(&plan, &shop.path("scratch"), 1).unwrap();
    assert_eq!(outcomes(&found), [Outcome::Hit; 3]);
    assert!(found.iter().zip(&layers).all(|(a, b)| (&a.path, &a.key, a.size) == (&b.path, &b.key, b.size)));
    assert_eq!(shop.files(STORE).len(), 9, "image, sidecar and lock of each");
    assert!(shop.files("scratch").is_empty());
}

/// A hundred layers, some of them several times, on as many threads as anybody may ask for.
#[test]
fn a_hundred_layers() {
    let shop = Shop::new();
    let mut lowers: Vec<_> = (0..100).map(|i| Lower::Snapshot(shop.snapshot(&format!("layer{i}")))).collect();
    lowers.extend_from_within(..10);
    let plan = RootfsPlan { lowers, read_only: false };
    for threads in [1000, 0, 1] {
        let layers = shop.cache.acquire_all(&plan, &shop.path("scratch"), threads).unwrap();
        assert_eq!(layers.len(), 110);
        assert!(layers[..10].iter().zip(&layers[100..]).all(|(a, b)| a.key == b.key));
    }
    assert_eq!(shop.cache.ls().unwrap().len(), 100);
}

/// Who asks for trees of digests gets them, whoever has made the image before; who does not is served by the same image.
#[test]
fn images_have_trees_for_those_who_ask() {
    let shop = Shop::new();
    let snapshot = shop.snapshot("s");
    assert_eq!(shop.acquire_one(&snapshot).verity, None);
    let verifying = Cache::open(&shop.path("root"), Limits::default()).unwrap().with_verity(true);
    let acquire = |lower| {
        let plan = RootfsPlan { lowers: vec![lower], read_only: false };
        verifying.acquire_all(&plan, &shop.path("scratch"), 1).unwrap().remove(0)
    };
    for outcome in [Outcome::Rebuilt, Outcome::Hit] {
        let layer = acquire(Lower::Snapshot(snapshot.clone()));
        assert_eq!(layer.outcome, outcome);
        let blocks = layer.verity.clone().unwrap().blocks;
        assert_eq!(layer.size, (blocks + 1) * 4096, "one block is enough for the digests of 128");
        assert_sound(&layer.path);
    }
    let layer = shop.acquire_one(&snapshot);
    assert_eq!(layer.outcome, Outcome::Hit);
    assert_same(&survey(&snapshot), &survey(&mount_erofs(&layer.path, &shop.path("mounted"))));
    assert!(shop.cache.verify(false).unwrap().iter().all(|verdict| verdict.problem.is_none()));
    let ephemeral = acquire(Lower::Writable(snapshot));
    assert_eq!((ephemeral.outcome, ephemeral.verity.is_some()), (Outcome::Ephemeral, true));
}

/// A snapshotter removes a directory and uses its path again: another key, another image.
#[test]
fn a_reused_snapshot_directory_is_another_layer() {
    let shop = Shop::new();
    let first = shop.acquire_one(&shop.snapshot("s"));
    fs::remove_dir_all(shop.path("s")).unwrap();
    let second = shop.acquire_one(&shop.snapshot("s"));
    assert_ne!(first.key, second.key);
    assert_eq!(second.outcome, Outcome::Built);
    // The name of the directory that leads to it does not matter.
    std::os::unix::fs::symlink(shop.path("s"), shop.path("link")).unwrap();
    assert_eq!(shop.acquire_one(&shop.path("link")).outcome, Outcome::Hit);
}

/// C3: whatever happens to image or sidecar, the next user gets a sound image.
#[test]
fn damage_is_noticed_and_repaired() {
    let shop = Shop::new();
    let snapshot = shop.snapshot("s");
    let good = shop.acquire_one(&snapshot);
    let bytes = fs::read(&good.path).unwrap();
    let json = good.path.with_extension("json");
    let open = || File::options().write(true).open(&good.path).unwrap();
    let damages: [(&str, &dyn Fn()); 8] = [
        ("a byte of data", &|| open().write_all_at(b"!", 9000).unwrap()),
        ("the superblock, times restored", &|| {
            let file = open();
            let time = file.metadata().unwrap().modified().unwrap();
            file.write_all_at(b"!", 1100).unwrap();
            file.set_modified(time).unwrap();
        }),
        ("cut off", &|| open().set_len(5000).unwrap()),
        ("emptied", &|| open().set_len(0).unwrap()),
        ("grown", &|| open().write_all_at(b"!", 1 << 20).unwrap()),
        ("sidecar emptied", &|| fs::write(&json, "").unwrap()),
        ("sidecar of nonsense", &|| fs::write(&json, vec![b'['; 200_000]).unwrap()),
        ("sidecar gone", &|| fs::remove_file(&json).unwrap()),
    ];
    for (name, damage) in damages {
        damage();
        let layer = shop.acquire_one(&snapshot);
        assert_eq!(layer.outcome, Outcome::Rebuilt, "{name}");
        assert!(fs::read(&layer.path).unwrap() == bytes, "{name}");
        assert_eq!(shop.acquire_one(&snapshot).outcome, Outcome::Hit, "{name}");
    }
    fs::remove_file(&good.path).unwrap();
    assert_eq!(shop.acquire_one(&snapshot).outcome, Outcome::Built);
}

/// A store that was copied elsewhere and back is checked in full, once, and then trusted again.
#[test]
fn a_restored_store_is_kept() {
    let shop = Shop::new();
    let snapshot = shop.snapshot("s");
    let layer = shop.acquire_one(&snapshot);
    let bytes = fs::read(&layer.path).unwrap();
    fs::remove_file(&layer.path).unwrap();
    fs::write(&layer.path, &bytes).unwrap();
    let inode = fs::metadata(&layer.path).unwrap().ino();
    assert_eq!(shop.acquire_one(&snapshot).outcome, Outcome::Hit);
    assert_eq!(fs::metadata(&layer.path).unwrap().ino(), inode, "not built again");
}

/// Who uses an image keeps it while the cache replaces it.
#[test]
fn a_damaged_image_in_use_stays_with_its_user() {
    let shop = Shop::new();
    let snapshot = shop.snapshot("s");
    let layer = shop.acquire_one(&snapshot);
    let linked = shop.cache.link_into(&layer, &shop.path("scratch"), "pod.erofs").unwrap();
    File::options().write(true).open(&layer.path).unwrap().write_all_at(b"!", 9000).unwrap();
    let again = shop.acquire_one(&snapshot);
    assert_eq!(again.outcome, Outcome::Rebuilt);
    assert_ne!(fs::metadata(linked).unwrap().ino(), fs::metadata(&again.path).unwrap().ino());
}

#[test]
fn links_are_the_image_itself() {
    let shop = Shop::new();
    let layer = shop.acquire_one(&shop.snapshot("s"));
    let linked = shop.cache.link_into(&layer, &shop.path("scratch"), "0.erofs").unwrap();
    assert_eq!(linked, shop.path("scratch/0.erofs"));
    assert_eq!(fs::metadata(&linked).unwrap().ino(), fs::metadata(&layer.path).unwrap().ino());
    let twice = shop.cache.link_into(&layer, &shop.path("scratch"), "0.erofs").unwrap_err();
    assert!(twice.to_string().contains("0.erofs"), "{twice}");
    let elsewhere = tmpfs(&shop.path("elsewhere"), "size=1m");
    let error = shop.cache.link_into(&layer, &elsewhere, "0.erofs").unwrap_err();
    assert!(matches!(&error, CacheError::OtherFileSystem { .. }), "{error}");
    // Even when the image lost its name in the cache meanwhile, as after a rebuild.
    let other = shop.acquire_one(&shop.snapshot("t"));
    shop.cache.link_into(&other, &shop.path("scratch"), "1.erofs").unwrap();
    fs::remove_file(&other.path).unwrap();
    shop.cache.link_into(&other, &shop.path("scratch"), "2.erofs").unwrap();
}

/// Upper directories and writable binds are converted each time and never published.
#[test]
fn what_can_change_is_not_cached() {
    let shop = Shop::new();
    let (a, b) = (shop.snapshot("a"), shop.snapshot("b"));
    let lowers = [Lower::Writable(a.clone()), Lower::Upper(b.clone())];
    let layers = shop.acquire(&lowers).unwrap();
    assert_eq!(outcomes(&layers), [Outcome::Ephemeral; 2]);
    assert_ne!(layers[0].key, layers[1].key);
    fs::write(b.join("later"), "later").unwrap();
    let later = shop.acquire(&lowers).unwrap();
    assert_ne!(later[1].key, layers[1].key);
    assert_sound(&later[1].path);
    let mounted = mount_erofs(&later[1].path, &shop.path("mounted"));
    assert_same(&survey(&b), &survey(&mounted));
    assert!(shop.cache.ls().unwrap().is_empty());
    assert_eq!(shop.files("scratch").len(), 2);
    shop.cache.link_into(&later[0], workshop_path(&shop), "linked").unwrap();
}

fn workshop_path(shop: &Shop) -> &Path {
    shop.workshop.path()
}

#[test]
fn an_empty_upper_is_no_layer() {
    let shop = Shop::new();
    let upper = dir(shop.path("upper"));
    let lowers = [Lower::Snapshot(shop.snapshot("a")), Lower::Upper(upper.clone())];
    assert_eq!(outcomes(&shop.acquire(&lowers).unwrap()), [Outcome::Built]);
    // But an empty writable directory is all that a container from scratch has.
    assert_eq!(outcomes(&shop.acquire(&[Lower::Writable(upper)]).unwrap()), [Outcome::Ephemeral]);
}

/// C9: nothing below a layer whose root is opaque can be seen.
#[test]
fn an_opaque_root_ends_the_stack() {
    let shop = Shop::new();
    let [a, b, c] = ["a", "b", "c"].map(|name| shop.snapshot(name));
    fs::write(b.join(".wh..wh..opq"), "").unwrap();
    let lowers = [a, b, c].map(Lower::Snapshot);
    for outcome in [Outcome::Built, Outcome::Hit] {
        let layers = shop.acquire(&lowers).unwrap();
        assert_eq!(outcomes(&layers), [outcome; 2]);
    }
}

/// Images of containerd's erofs snapshotter are used as they are.
#[test]
fn ready_images() {
    let shop = Shop::new();
    let snapshot = shop.snapshot("s");
    let image = shop.path("layer.erofs");
    run("erofs-utils", "mkfs.erofs", &[&image, &snapshot]);
    let mount = Mount { kind: "erofs".into(), source: image.to_str().unwrap().into(), ..Mount::default() };
    let plan = plan(&[mount]).unwrap();
    let layers = shop.cache.acquire_all(&plan, &shop.path("scratch"), 1).unwrap();
    assert_eq!((outcomes(&layers), &layers[0].path), (vec![Outcome::Ready], &image));
    shop.cache.link_into(&layers[0], &shop.path("scratch"), "ready").unwrap();
    fs::write(&image, "no image").unwrap();
    for (path, message) in [("layer.erofs", "not an erofs"), ("s", "not a regular file"), ("missing", "find lower")] {
        let error = shop.acquire(&[Lower::Image(shop.path(path), Vec::new())]).unwrap_err().to_string();
        assert!(error.contains(message) && error.contains(path), "{error}");
    }
    fs::set_permissions(&image, fs::Permissions::from_mode(0o640)).unwrap();
    let error = shop.acquire(&[Lower::Image(image, Vec::new())]).unwrap_err().to_string();
    assert!(error.contains("not readable for others"), "{error}");
}

/// Where no pod could have a link of it, an image is copied into the cache: once, until it is another.
#[test]
fn ready_images_of_another_file_system() {
    let shop = Shop::new();
    let elsewhere = tmpfs(&shop.path("elsewhere"), "size=32m,mode=755");
    let image = elsewhere.join("layer.erofs");
    run("erofs-utils", "mkfs.erofs", &[&image, &shop.snapshot("s")]);
    let get = || shop.acquire(&[Lower::Image(image.clone(), Vec::new())]).unwrap().remove(0);
    let copy = get();
    assert!(copy.outcome == Outcome::Ready && copy.path.starts_with(shop.path("root")), "{copy:?}");
    assert_eq!(fs::read(&copy.path).unwrap(), fs::read(&image).unwrap());
    shop.cache.link_into(&copy, &shop.path("scratch"), "linked").unwrap();
    assert_eq!(fs::metadata(get().path).unwrap().ino(), fs::metadata(&copy.path).unwrap().ino());
    assert!(shop.cache.verify(false).unwrap().iter().all(|verdict| verdict.problem.is_none()));
    fs::remove_file(&image).unwrap();
    run("erofs-utils", "mkfs.erofs", &[&image, &shop.snapshot("t")]);
    assert_ne!(get().key, copy.key);
}

/// A merged image comes with exactly the images that hold its data.
#[test]
fn ready_images_of_several_devices() {
    let shop = Shop::new();
    let [one, two] = ["one", "two"].map(|name| {
        let image = shop.path(&format!("{name}.erofs"));
        run("erofs-utils", "mkfs.erofs", &[&image, &shop.snapshot(name)]);
        image
    });
    let merged = shop.path("merged.erofs");
    let mut bytes = fs::read(&one).unwrap();
    bytes[1024 + 86..1024 + 88].copy_from_slice(&2u16.to_le_bytes()); // extra_devices
    fs::write(&merged, bytes).unwrap();
    let layers = shop.acquire(&[Lower::Image(merged.clone(), vec![one.clone(), two.clone()])]).unwrap();
    let devices: Vec<_> = layers[0].devices.iter().map(|device| device.path.clone()).collect();
    assert_eq!(devices, [one.clone(), two]);
    for devices in [vec![], vec![one]] {
        let error = shop.acquire(&[Lower::Image(merged.clone(), devices.clone())]).unwrap_err().to_string();
        assert!(error.contains(&format!("needs 2 further devices, not {}", devices.len())), "{error}");
    }
}

/// Layers that a snapshotter has mounted from images (containerd 2.1) are those images.
#[test]
fn mounted_images() {
    let shop = Shop::new();
    let image = shop.path("layer.erofs");
    run("erofs-utils", "mkfs.erofs", &[&image, &shop.snapshot("s")]);
    let fs = mount_erofs(&image, &shop.path("fs"));
    let layers = shop.acquire(&[Lower::Snapshot(fs.clone())]).unwrap();
    assert_eq!((outcomes(&layers), &layers[0].path), (vec![Outcome::Ready], &image));
    // Only the whole of it.
    let plain = shop.acquire(&[Lower::Snapshot(shop.path("s"))]).unwrap();
    assert_eq!(outcomes(&plain), [Outcome::Built]);
}

/// A disk for the writable layer is left out until something may be in it.
#[test]
fn an_upper_disk_that_is_not_made() {
    let shop = Shop::new();
    let lowers = [Lower::Snapshot(shop.snapshot("a")), Lower::UpperDisk(shop.path("rwlayer.img"))];
    assert_eq!(shop.acquire(&lowers).unwrap().len(), 1);
    fs::write(shop.path("rwlayer.img"), "").unwrap();
    assert_eq!(shop.acquire(&lowers).unwrap().len(), 1);
    // It was made, and nobody has written to it.
    let disk = shop.path("rwlayer.img");
    File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    run("e2fsprogs", "mkfs.ext4", &[&"-q", &disk]);
    assert_eq!(shop.acquire(&lowers).unwrap().len(), 1);
    fs::write(shop.path("file"), "text").unwrap();
    let request = format!("write {} file", shop.path("file").display());
    run("e2fsprogs", "debugfs", &[&"-w", &"-R", &request, &disk]);
    let error = shop.acquire(&lowers).unwrap_err().to_string();
    assert!(error.contains("rwlayer.img") && error.contains("cannot be taken over"), "{error}");
    for other in ["ext4", &"x".repeat(4096)] {
        fs::write(&disk, other).unwrap();
        assert!(shop.acquire(&lowers).is_err(), "no file system");
    }
}

/// A2: patches are one more lower, for this container alone.
#[test]
fn patches_are_a_lower_on_top() {
    let shop = Shop::new();
    let layers = shop.acquire(&[Lower::Snapshot(shop.snapshot("a"))]).unwrap();
    let patch = |json: &str| {
        let list = decode(json.as_bytes(), &Limits::default()).unwrap();
        shop.cache.patch(&layers, &list, &Sources::default(), &shop.path("scratch/patches"))
    };
    assert!(patch("[]").unwrap().is_none());
    let error = patch(r#"[{"kind":"append","path":"/missing","content":"x"}]"#).unwrap_err();
    assert!(matches!(error, CacheError::Patch(_)), "{error}");
    assert!(shop.files("scratch").is_empty());
    let patched = patch(r#"[{"kind":"append","path":"/a","content":" and more"}]"#).unwrap().unwrap();
    assert_eq!(fs::metadata(&patched.path).unwrap().mode() & 0o7777, 0o444);
    let mounted = mount_erofs(&patched.path, &shop.path("mounted"));
    assert_eq!(fs::read_to_string(mounted.join("a")).unwrap(), "a and more");
    shop.cache.link_into(&patched, &shop.path("scratch"), "linked").unwrap();
}

/// C4: many layers become one image, which is found again, and is collected and repaired like any other. Large ones are its devices.
#[test]
fn layers_are_merged_once() {
    let shop = Shop::new();
    let snapshots = ["a", "b", "c"].map(|name| Lower::Snapshot(shop.snapshot(name)));
    for lower in &snapshots[..2] {
        fs::write(
            lower.source().join(format!("large-{}", lower.source().display()).replace('/', "-")),
            vec![7; 2 << 20],
        )
        .unwrap();
    }
    let upper = Lower::Upper(shop.snapshot("upper"));
    let lowers = [&snapshots[..], &[upper]].concat();
    let merged = |outcome| {
        let layers = shop.cache.merge(shop.acquire(&lowers).unwrap(), &shop.path("scratch")).unwrap();
        assert_eq!(outcomes(&layers), [outcome, Outcome::Ephemeral]);
        assert_eq!(layers[0].devices.len(), 2);
        assert_eq!(layers[0].parts.iter().map(|part| part.device).collect::<Vec<_>>(), [true, true, false]);
        layers.into_iter().next().unwrap()
    };
    let first = merged(Outcome::Built);
    assert_eq!(merged(Outcome::Hit).key, first.key);
    // Then nobody asks for layers that are no devices: they may be gone.
    let at_once = || {
        let plan = RootfsPlan { lowers: lowers.clone(), read_only: false };
        let layers = shop.cache.acquire_merged(&plan, &shop.path("scratch"), 1, Missing::Convert).unwrap();
        shop.cache.merge(layers, &shop.path("scratch")).unwrap()
    };
    let small = &first.parts[2].key;
    let small = shop.cache.ls().unwrap().into_iter().find(|image| image.key == *small).unwrap();
    fs::rename(shop.path(&format!("root/layers/erofs-v1/{}.erofs", small.key)), shop.path("kept")).unwrap();
    let found = at_once();
    assert_eq!((outcomes(&found), found[0].devices.len()), (vec![Outcome::Hit, Outcome::Ephemeral], 2));
    assert_eq!(found[0].key, first.key);
    drop(found);
    fs::rename(shop.path("kept"), shop.path(&format!("root/layers/erofs-v1/{}.erofs", small.key))).unwrap();
    // Without a device it is not there.
    let device = shop.path(&format!("root/layers/erofs-v1/{}.erofs", first.parts[0].key));
    fs::rename(&device, shop.path("kept")).unwrap();
    assert_eq!(at_once()[0].devices.len(), 2, "made again");
    assert!(shop.cache.verify(false).unwrap().iter().all(|verdict| verdict.problem.is_none()));
    let image = first.path.clone();
    drop(first);
    // A damaged one is made again, and never handed out.
    let mut bytes = fs::read(&image).unwrap();
    bytes[1024 + 40] ^= 1;
    fs::remove_file(&image).unwrap();
    fs::write(&image, bytes).unwrap();
    drop(merged(Outcome::Rebuilt));
    let quiet = between_starts();
    assert_eq!(shop.cache.gc(0).unwrap().removed.len(), 4);
    drop(quiet);
    // Alone it stays as it is.
    let one = shop.cache.merge(shop.acquire(&lowers[..1]).unwrap(), &shop.path("scratch")).unwrap();
    assert_eq!((one.len(), one[0].devices.len()), (1, 0));
}

/// C4: an archive is converted once, and only when it is the one that was named.
#[test]
fn archives() {
    let shop = Shop::new();
    let archive = shop.path("layer.tar");
    run(
        "tar",
        "tar",
        &[&"--create", &"--format=posix", &"--directory", &shop.snapshot("a"), &"--file", &archive, &"."],
    );
    let bytes = fs::read(&archive).unwrap();
    let diff_id = DiffId(Sha256::digest(&bytes).into());
    let error = shop.cache.acquire_archive(DiffId([7; 32]), || Ok(bytes.as_slice())).unwrap_err();
    assert!(matches!(error, CacheError::Archive { .. }), "{error}");
    assert!(shop.files(STORE).iter().all(|name| name.ends_with(".lock")), "{:?}", shop.files(STORE));
    let layer = shop.cache.acquire_archive(diff_id, || Ok(bytes.as_slice())).unwrap();
    assert_eq!(layer.outcome, Outcome::Built);
    assert_same(&survey(&shop.path("a")), &survey(&mount_erofs(&layer.path, &shop.path("mounted"))));
    let again = shop.cache.acquire_archive(diff_id, || -> std::io::Result<&[u8]> { panic!("not needed") }).unwrap();
    assert_eq!((again.outcome, again.key), (Outcome::Hit, layer.key.clone()));
}

#[test]
fn a_lower_that_does_not_exist() {
    let shop = Shop::new();
    let missing = shop.path("nowhere");
    for lower in [Lower::Snapshot(missing.clone()), Lower::Writable(missing.clone()), Lower::Upper(missing.clone())] {
        let error = shop.acquire(&[Lower::Snapshot(shop.snapshot("a")), lower]).unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
    }
    assert!(shop.files("scratch").is_empty());
}

/// A full disk: an error that names the layer, nothing left, and a good end once there is room.
#[test]
fn a_full_disk() {
    let workshop = workshop();
    let small = tmpfs(&workshop.path().join("small"), "size=600k");
    let cache = Cache::open(&small.join("root"), Limits::default()).unwrap();
    let scratch = dir(small.join("scratch"));
    let snapshot = dir(workshop.path().join("snapshot"));
    fs::write(snapshot.join("large"), vec![1; 1 << 20]).unwrap();
    for lower in [Lower::Snapshot(snapshot.clone()), Lower::Writable(snapshot.clone())] {
        let plan = RootfsPlan { lowers: vec![lower], read_only: false };
        let error = cache.acquire_all(&plan, &scratch, 2).unwrap_err();
        assert!(error.to_string().contains(snapshot.to_str().unwrap()), "{error}");
        let cause = std::error::Error::source(&error).and_then(std::error::Error::source).unwrap();
        let errno = cause.downcast_ref::<std::io::Error>().unwrap().kind();
        assert_eq!(errno, std::io::ErrorKind::StorageFull);
    }
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
    let left: Vec<_> = fs::read_dir(small.join(STORE)).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.iter().all(|p| p.extension().is_some_and(|e| e == "lock")), "{left:?}");
    fs::write(snapshot.join("large"), "small").unwrap();
    let plan = RootfsPlan { lowers: vec![Lower::Snapshot(snapshot)], read_only: false };
    assert_eq!(outcomes(&cache.acquire_all(&plan, &scratch, 2).unwrap()), [Outcome::Built]);
}

/// C4: collection takes the least recently used images, and never one that a pod or a running start uses.
#[test]
fn collection() {
    let shop = Shop::new();
    let snapshots = ["a", "b", "c", "d"].map(|name| shop.snapshot(name));
    let mut layers: Vec<_> = snapshots.iter().map(|s| shop.acquire_one(s)).collect();
    let keys: Vec<_> = layers.iter().map(|l| l.key.clone()).collect();
    for (age, layer) in layers.iter().enumerate() {
        let used = SystemTime::now() - Duration::from_secs(1000 - age as u64);
        File::open(layer.path.with_extension("json")).unwrap().set_modified(used).unwrap();
    }
    shop.cache.link_into(&layers[1], &shop.path("scratch"), "b").unwrap();
    let size = layers[0].size;
    let quiet = between_starts();
    drop(layers.drain(..3)); // "d" is still held
    let listed = shop.cache.ls().unwrap();
    assert_eq!(listed.iter().map(|i| &i.key).collect::<Vec<_>>(), keys.iter().collect::<Vec<_>>());
    assert_eq!(listed.iter().map(|i| i.in_use).collect::<Vec<_>>(), [false, true, false, true]);
    assert_eq!(listed[0].source.as_deref(), snapshots[0].to_str());

    assert!(shop.cache.gc(4 * size).unwrap().removed.is_empty());
    assert_eq!(shop.cache.gc(3 * size).unwrap().removed, keys[..1]);
    let all = shop.cache.gc(0).unwrap();
    assert_eq!((all.removed, all.freed, all.kept), (vec![keys[2].clone()], size, 2 * size));
    assert_eq!(shop.acquire_one(&snapshots[3]).outcome, Outcome::Hit);
    assert_eq!(shop.acquire_one(&snapshots[0]).outcome, Outcome::Built);
    fs::remove_file(shop.path("scratch/b")).unwrap();
    drop(layers);
    assert_eq!(shop.cache.gc(0).unwrap().kept, 0);
    drop(quiet);
    assert!(shop.files(STORE).is_empty(), "{:?}", shop.files(STORE));
}

/// Starts and collection at once: every layer that is handed out exists, and is the right one.
#[test]
fn collection_beside_starts() {
    let shop = Shop::new();
    let snapshots: Vec<_> = (0..4).map(|i| Lower::Snapshot(shop.snapshot(&format!("s{i}")))).collect();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let starts: Vec<_> = (0..3)
            .map(|thread| {
                let (shop, snapshots) = (&shop, &snapshots);
                scope.spawn(move || {
                    for round in 0..20 {
                        for (index, layer) in shop.acquire(snapshots).unwrap().iter().enumerate() {
                            let name = format!("{thread}-{round}-{index}");
                            let linked = shop.cache.link_into(layer, &shop.path("scratch"), &name).unwrap();
                            assert_eq!(fs::metadata(&linked).unwrap().len(), layer.size);
                            fs::remove_file(linked).unwrap();
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                shop.cache.gc(0).unwrap();
            }
        });
        starts.into_iter().for_each(|s| s.join().unwrap());
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn verification_reads_everything() {
    let shop = Shop::new();
    let [a, b] = ["a", "b"].map(|name| shop.acquire_one(&shop.snapshot(name)));
    assert!(shop.cache.verify(false).unwrap().iter().all(|v| v.problem.is_none()));
    let file = File::options().write(true).open(&a.path).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"!", a.size - 5000).unwrap();
    file.set_modified(time).unwrap();
    for repair in [false, true] {
        for verdict in shop.cache.verify(repair).unwrap() {
            assert_eq!(verdict.problem.is_some(), verdict.key == a.key, "{verdict:?}");
            assert_eq!(verdict.problem.is_none(), verdict.key == b.key, "{verdict:?}");
            assert_eq!(verdict.removed, repair && verdict.key == a.key, "{verdict:?}");
        }
    }
    // Nothing at the file tells of the damage, but the one with it is gone.
    assert_eq!(shop.acquire_one(&shop.path("a")).outcome, Outcome::Built);
    assert!(shop.cache.verify(false).unwrap().iter().all(|v| v.problem.is_none()));
}
