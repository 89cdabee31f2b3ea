//! What cannot work is refused with a message that says what and why, and leaves nothing: a node has to survive its
//! users' mistakes.

use std::{
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use nacelle_tests::{
    command::{Cmd, seconds},
    node::{BUSYBOX, Mount, Node},
};

use crate::Case;

const CONFIGURATION: &str = "its configuration is another";
const NO_CACHE: &str = "it does not convert layers";

pub const CASES: &[Case] = &[
    Case::only_nacelle("no_kernel", no_kernel, CONFIGURATION),
    Case::only_nacelle("a_kernel_that_is_none", a_kernel_that_is_none, CONFIGURATION),
    Case::only_nacelle("an_unknown_key", an_unknown_key, CONFIGURATION),
    Case::only_nacelle("no_kvm", no_kvm, "it needs no KVM"),
    Case::only_nacelle("a_guest_that_never_answers", a_guest_that_never_answers, "it has no guest"),
    Case::new("a_spec_that_is_none", a_spec_that_is_none),
    Case::only_nacelle("no_root_mounts", no_root_mounts, "it starts in the empty directory"),
    Case::new("an_unknown_mount_type_in_the_spec", an_unknown_mount_type_in_the_spec),
    Case::new("an_unknown_mount_type_of_the_root", an_unknown_mount_type_of_the_root),
    Case::new("a_bind_mount_of_nothing", a_bind_mount_of_nothing),
    Case::new("a_lower_that_vanished", a_lower_that_vanished),
    Case::only_nacelle("a_corrupt_cached_layer", a_corrupt_cached_layer, NO_CACHE),
    Case::only_nacelle("a_full_disk_while_converting", a_full_disk_while_converting, NO_CACHE),
];

/// The node still runs containers.
fn works(node: &Node) {
    assert_eq!(node.run(&["--rm"], BUSYBOX, &["echo", "hello"]).ok().text(), "hello");
}

/// A container cannot start; the message has `words`.
fn refused(node: &Node, words: &[&str]) {
    let c = node.created(&[], BUSYBOX, &["echo", "hello"]);
    c.start(&[]).run().expect_failure(words);
    c.delete();
}

fn no_kernel(node: &Node) {
    let _configured = node.configure("vm.kernel = \"/no/such/vmlinux\"");
    refused(node, &["kernel", "/no/such/vmlinux"]);
}

fn a_kernel_that_is_none(node: &Node) {
    let _configured = node.configure("vm.kernel = \"/etc/passwd\"");
    refused(node, &["kernel", "/etc/passwd", "ELF"]);
}

fn an_unknown_key(node: &Node) {
    let _configured = node.configure("vm.kernal = \"/etc/passwd\"");
    refused(node, &["kernal", "configuration"]);
}

/// Renames a file for as long as it lives.
struct Hidden(PathBuf);

impl Hidden {
    fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        fs::rename(&path, path.with_extension("hidden")).unwrap_or_else(|e| panic!("rename {}: {e}", path.display()));
        Self(path)
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        fs::rename(self.0.with_extension("hidden"), &self.0).expect("rename it back");
    }
}

fn no_kvm(node: &Node) {
    let hidden = Hidden::new("/dev/kvm");
    refused(node, &["/dev/kvm"]);
    drop(hidden);
    works(node);
}

/// An ELF kernel whose only instructions are to wait for ever.
fn mute_kernel() -> Vec<u8> {
    const LOAD_AT: u64 = 0x0100_0000;
    const CODE: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd]; // cli; hlt; jump back to hlt
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let words = |elf: &mut Vec<u8>, words: &[u64]| words.iter().for_each(|w| elf.extend(w.to_le_bytes()));
    elf.extend(2_u16.to_le_bytes()); // executable
    elf.extend(62_u16.to_le_bytes()); // x86-64
    elf.extend(1_u32.to_le_bytes());
    words(&mut elf, &[LOAD_AT, 64, 0]); // entry, program headers, section headers
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1_u32.to_le_bytes()); // PT_LOAD
    elf.extend(5_u32.to_le_bytes()); // readable and executable
    words(&mut elf, &[4096, LOAD_AT, LOAD_AT, CODE.len() as u64, 4096, 4096]);
    elf.resize(4096, 0);
    elf.extend_from_slice(CODE);
    elf
}

fn a_guest_that_never_answers(node: &Node) {
    let kernel = node.path("mute");
    fs::write(&kernel, mute_kernel()).expect("write a kernel");
    let configured = node.configure(&format!("vm.kernel = {kernel:?}\nvm.boot_timeout_seconds = 3"));
    let started = Instant::now();
    refused(node, &["3 s"]);
    assert!(started.elapsed() < seconds(20), "refused after {:?}", started.elapsed());
    drop(configured);
    works(node);
}

fn a_spec_that_is_none(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["true"]);
    let mounts = c.mounts();
    // What is not JSON at all, containerd refuses itself.
    for spec in [
        "{}",
        r#"{"ociVersion": "1.0.2"}"#,
        r#"{"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": {"cwd": "/"}}"#,
    ] {
        c.set_spec(spec.as_bytes());
        let error = c.create_task(&mounts).expect_err("a task of a spec that is none").to_string();
        assert!(error.contains("create"), "for {spec}: {error}");
    }
    c.delete();
}

fn no_root_mounts(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["true"]);
    let error = c.create_task(&[]).expect_err("a task without a root file system").to_string();
    assert!(error.contains("root"), "{error}");
    c.delete();
}

fn an_unknown_mount_type_in_the_spec(node: &Node) {
    let flags = ["--mount", "type=bogusfs,src=nothing,dst=/mnt,options=ro"];
    let c = node.created(&flags, BUSYBOX, &["true"]);
    let word = if node.is_nacelle() { "bogusfs" } else { "no such device" };
    c.start(&[]).run().expect_failure(&[word]);
    c.delete();
}

fn an_unknown_mount_type_of_the_root(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["true"]);
    let mount = Mount { kind: "bogusfs".into(), source: "/nowhere".into(), options: vec!["ro".into()] };
    let error = c.create_task(&[mount]).expect_err("a task on an unknown file system").to_string();
    assert!(error.contains("bogusfs") || error.contains("no such device"), "{error}");
    c.delete();
}

fn a_bind_mount_of_nothing(node: &Node) {
    let flags = ["--mount", "type=bind,src=/no/such/source,dst=/mnt,options=rbind:ro"];
    let c = node.created(&flags, BUSYBOX, &["true"]);
    c.start(&[]).run().expect_failure(&["/no/such/source"]);
    c.delete();
}

fn a_lower_that_vanished(node: &Node) {
    let image = node.image("layers-30");
    let c = node.created(&[], &image, &["true"]);
    let mounts = c.mounts();
    let lowers = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir=")).expect("an overlay");
    let lower = lowers.split(':').next().expect("a first one");
    let hidden = Hidden::new(lower);
    // Go and Rust begin the words differently.
    c.start(&[]).run().expect_failure(&["o such file or directory"]);
    drop(hidden);
    c.start(&[]).ok();
    c.delete();
}

/// The images cached below a data directory, with a digest of their contents.
fn cached(data: &Path) -> Vec<(PathBuf, String)> {
    let dir = data.join("layers/erofs-v1");
    let entries = fs::read_dir(&dir).unwrap_or_else(|e| panic!("list {}: {e}", dir.display())).flatten();
    let mut images: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "erofs"))
        .map(|path| {
            let digest = Cmd::new("sha256sum").args([&path]).ok().text();
            (path, digest)
        })
        .collect();
    images.sort();
    images
}

fn a_corrupt_cached_layer(node: &Node) {
    // A cache of its own: the others' machines have their layers open.
    let dir = node.path("own");
    let configured = node.configure_data_dir(&dir, "");
    works(node);
    let before = cached(&dir);
    assert!(!before.is_empty(), "the cache is empty");
    for damage in [overwrite, truncate] {
        before.iter().for_each(|(path, _)| damage(path));
        assert_ne!(cached(&dir), before);
        works(node);
        assert_eq!(cached(&dir), before, "the images as they were before they were damaged");
    }
    drop(configured);
    fs::remove_dir_all(dir).expect("remove the cache");
}

fn overwrite(path: &Path) {
    let mut file = File::options().write(true).open(path).expect("open a cached image");
    let middle = file.metadata().expect("stat a cached image").len() / 2;
    file.seek(SeekFrom::Start(middle)).and_then(|_| file.write_all(&[0xa5; 4096])).expect("write a cached image");
}

fn truncate(path: &Path) {
    File::options().write(true).open(path).and_then(|file| file.set_len(100)).expect("truncate a cached image");
}

fn a_full_disk_while_converting(node: &Node) {
    let dir = node.path("small");
    fs::create_dir_all(&dir).expect("make a directory");
    let options = |size: &str| format!("size={size}");
    Cmd::new("mount").args(["-t", "tmpfs", "-o", &options("512k"), "tmpfs"]).args([&dir]).ok();
    let unmount = Unmount(dir.clone());
    let configured = node.configure_data_dir(&dir, "");
    refused(node, &["No space left on device"]);
    let layers = fs::read_dir(dir.join("layers/erofs-v1")).into_iter().flatten().flatten();
    let left: Vec<_> = layers.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e != "lock")).collect();
    assert!(left.is_empty(), "left of the conversion: {left:?}");
    // With room, the next attempt succeeds.
    Cmd::new("mount").args(["-o", &format!("remount,{}", options("200m"))]).args([&dir]).ok();
    works(node);
    drop(configured);
    drop(unmount);
    works(node);
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        Cmd::new("umount").args([&self.0]).ok();
    }
}
