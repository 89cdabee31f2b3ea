//! Patches over stacks of images (A2, A5, A6, A9-A31): what a container would see, shown by the kernel's overlayfs, and each refusal.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use common::{Dice, NAMES, assert_same, assert_sound, convert, dir, mount_erofs, mount_overlay, survey, workshop};
use nacelle_rootfs::Limits;
use nacelle_rootfs::erofs::writer::Plan;
use nacelle_rootfs::patch::{Change, Given, LowerImage, Patch, PatchError, Preserve, Sources, build, decode};
use nacelle_rootfs::path::GuestPath;
use nacelle_rootfs::tree::Tree;
use nix::mount::{MsFlags, mount};
use rustix::fs::XattrFlags;

/// Layers as directories, made into images, and what patches make of them.
struct Bench {
    workshop: common::Workshop,
    mounted: Vec<PathBuf>,
    images: Vec<PathBuf>,
    sources: Sources,
    count: usize,
}

impl Bench {
    /// `layers` fill their directories, bottom first.
    fn new(layers: &[&dyn Fn(&Path)]) -> Bench {
        let workshop = workshop();
        let (mut mounted, mut images) = (Vec::new(), Vec::new());
        for (index, fill) in layers.iter().enumerate() {
            let tree = dir(workshop.path().join(format!("layer{index}")));
            fill(&tree);
            let image = workshop.path().join(format!("{index}.erofs"));
            convert(&tree, &image);
            mounted.insert(0, mount_erofs(&image, &workshop.path().join(format!("mounted{index}"))));
            images.push(image);
        }
        let sources = Sources::below([dir(workshop.path().join("host"))]);
        Bench { workshop, mounted, images, sources, count: 0 }
    }

    fn host(&self) -> PathBuf {
        self.workshop.path().join("host")
    }

    /// Decodes and builds; gives the image.
    fn build(&mut self, json: &str) -> Result<PathBuf, PatchError> {
        let json = json.replace("HOST", self.host().to_str().unwrap());
        let patches = decode(json.as_bytes(), &Limits::default())?;
        self.build_list(&patches)
    }

    fn build_list(&mut self, patches: &[Patch]) -> Result<PathBuf, PatchError> {
        self.count += 1;
        let image = self.workshop.path().join(format!("patches{}.erofs", self.count));
        let lowers: Vec<_> = self.images.iter().map(|path| LowerImage::open(path).unwrap()).collect();
        build(patches, &lowers, &self.sources, &Limits::default(), &image)?;
        Ok(image)
    }

    /// Builds, and shows what the container would see.
    fn merged(&mut self, json: &str) -> PathBuf {
        let image = self.build(json).unwrap_or_else(|e| panic!("{json}: {e}: {:?}", std::error::Error::source(&e)));
        self.show(&image)
    }

    fn show(&self, image: &Path) -> PathBuf {
        assert_sound(image);
        let patches = mount_erofs(image, &image.with_extension("mounted"));
        let lowers: Vec<&Path> = [&patches].into_iter().chain(&self.mounted).map(PathBuf::as_path).collect();
        mount_overlay(&lowers, &image.with_extension("merged"))
    }

    /// The error and its causes, of patches that must be refused.
    fn refused(&mut self, json: &str) -> String {
        let error = self.build(json).expect_err(json);
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        let leftovers = fs::read_dir(self.workshop.path()).unwrap().map(|e| e.unwrap().file_name());
        let own = format!("patches{}.", self.count);
        let left: Vec<_> = leftovers.filter(|n| n.to_str().unwrap().starts_with(&own)).collect();
        assert!(left.is_empty(), "A6: nothing is written, but there is {left:?}");
        text
    }
}

fn write(path: PathBuf, content: &str) -> PathBuf {
    dir(path.parent().unwrap());
    fs::write(&path, content).unwrap();
    path
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Two layers with something of everything.
fn two_layers() -> Bench {
    let bottom = |root: &Path| {
        write(root.join("etc/hosts"), "bottom\n");
        write(root.join("etc/only-bottom"), "old");
        write(root.join("opt/tool/bin"), "tool");
        write(root.join("swept/old"), "old");
        write(root.join("gone"), "gone");
        symlink("etc", root.join("link")).unwrap();
        let shadow = write(root.join("etc/shadow"), "root:*\n");
        fs::set_permissions(&shadow, fs::Permissions::from_mode(0o640)).unwrap();
        chown(&shadow, Some(0), Some(42)).unwrap();
        let mut capability = vec![1, 0, 0, 2];
        capability.extend([0x0000_2000u32, 0, 0, 0].iter().flat_map(|w| w.to_le_bytes()));
        set_xattr(&shadow, "security.capability", &capability);
        File::open(&shadow).unwrap().set_modified(UNIX_EPOCH + std::time::Duration::from_secs(1_000_000)).unwrap();
        for (name, mode) in [("tmp", 0o1777), ("root", 0o700), ("home/user", 0o750)] {
            let home = dir(root.join(name));
            fs::set_permissions(&home, fs::Permissions::from_mode(mode)).unwrap();
            set_xattr(&home, "user.of", name.as_bytes());
            chown(&home, Some(1000), Some(1000)).unwrap();
        }
    };
    let top = |root: &Path| {
        write(root.join("etc/hosts"), "top\n");
        write(root.join(".wh.gone"), "");
        write(root.join("swept/.wh..wh..opq"), "");
        write(root.join("swept/new"), "new");
    };
    Bench::new(&[&bottom, &top])
}

/// A1: nothing to do is nothing done.
#[test]
fn an_empty_list_makes_no_image() {
    let mut bench = two_layers();
    let image = bench.build("[]").unwrap();
    assert!(!exists(&image));
}

/// A24, A27, A28, A20: new nodes and the directories above them.
#[test]
fn new_nodes_and_their_parents() {
    let mut bench = two_layers();
    let merged = bench.merged(
        r#"[{"kind":"text","path":"/srv/www/index","content":"hello"},
            {"kind":"file","path":"/srv/run","bytes":"AAH/","mode":"4755","uid":7,"gid":8},
            {"kind":"symlink","target":"../../nowhere","link":"/srv/www/link"},
            {"kind":"mkdir","path":"/srv/data/deep","mode":"0700"},
            {"kind":"mkdir","path":"/srv/none","mode":0}]"#,
    );
    assert_eq!(fs::read(merged.join("srv/www/index")).unwrap(), b"hello", "no newline is added");
    assert_eq!(fs::read(merged.join("srv/run")).unwrap(), [0, 1, 255]);
    assert_eq!(fs::read_link(merged.join("srv/www/link")).unwrap(), Path::new("../../nowhere"));
    let table =
        [("srv", 0o755), ("srv/www", 0o755), ("srv/www/index", 0o644), ("srv/run", 0o4755), ("srv/data", 0o755)];
    for (path, wanted) in table.into_iter().chain([("srv/data/deep", 0o700), ("srv/none", 0)]) {
        assert_eq!(mode(&merged.join(path)), wanted, "{path}");
    }
    let run = fs::metadata(merged.join("srv/run")).unwrap();
    assert_eq!((run.uid(), run.gid(), run.mtime()), (7, 8, 0));
    assert!(exists(&merged.join("etc/only-bottom")) && !exists(&merged.join("gone")));
}

/// A22: directories of the layers keep what they are when something is put in them.
#[test]
fn parents_keep_their_metadata() {
    let mut bench = two_layers();
    let before = mount_overlay(
        &bench.mounted.iter().map(PathBuf::as_path).collect::<Vec<_>>(),
        &bench.workshop.path().join("before"),
    );
    let merged = bench.merged(
        r#"[{"Text":{"path":"/tmp/a","content":"","mode":null,"replace":false}},
            {"Text":{"path":"/root/a","content":"","mode":null,"replace":false}},
            {"Text":{"path":"/home/user/a/b","content":"","mode":null,"replace":false}}]"#,
    );
    let (before, mut after) = (survey(&before), survey(&merged));
    for added in ["tmp/a", "root/a", "home/user/a", "home/user/a/b"] {
        assert!(after.remove(Path::new(added)).is_some(), "{added}");
    }
    assert_same(&before, &after);
}

/// A17, A18: what exists stays unless it is to be replaced; what is hidden does not exist.
#[test]
fn replacing() {
    let mut bench = two_layers();
    let text = |path: &str, more: &str| format!(r#"{{"kind":"text","path":"{path}","content":"new"{more}}}"#);
    let message = bench.refused(&format!("[{}]", text("/etc/hosts", "")));
    assert!(
        message.contains("apply patch 0 to /etc/hosts: layer ")
            && message.contains("1.erofs has a regular file there; set \"replace\""),
        "{message}"
    );
    let message = bench.refused(&format!("[{},{}]", text("/a", ""), text("/a", "")));
    assert!(
        message.contains("apply patch 1 to /a: an earlier patch has put a regular file there already"),
        "{message}"
    );
    let message = bench.refused(&format!("[{}]", text("/link", "")));
    assert!(message.contains("has a symlink there"), "{message}");

    // Whiteouted and opaque-hidden paths are absent.
    let merged = bench.merged(&format!("[{},{}]", text("/gone", ""), text("/swept/old", "")));
    assert_eq!(fs::read(merged.join("gone")).unwrap(), b"new");
    assert_eq!(fs::read_dir(merged.join("swept")).unwrap().count(), 2);

    let replace = r#","replace":true"#;
    let list = ["/etc/hosts", "/opt/tool", "/link"].map(|path| text(path, replace)).join(",");
    let merged = bench.merged(&format!("[{},{list}]", text("/x/y/z", "").replace("new", "old")));
    assert!(fs::symlink_metadata(merged.join("opt/tool")).unwrap().is_file(), "a file hides a directory");
    assert!(fs::symlink_metadata(merged.join("link")).unwrap().is_file());
    let merged = bench.merged(&format!("[{},{}]", text("/x/y/z", ""), text("/x", replace)));
    assert!(fs::symlink_metadata(merged.join("x")).unwrap().is_file(), "a file drops a tree of earlier patches");
}

/// A20, A15: a parent that is no directory is named with its kind; links are not followed.
#[test]
fn parents_that_are_no_directories() {
    let mut bench = two_layers();
    let table = [
        (r#"[{"kind":"text","path":"/etc/hosts/a/b","content":""}]"#, "/etc/hosts is no directory (regular file)"),
        (r#"[{"kind":"text","path":"/link/hosts","content":""}]"#, "/link is no directory (symlink)"),
        (r#"[{"kind":"mkdir","path":"/etc/hosts"}]"#, "it is a regular file"),
        (
            r#"[{"kind":"text","path":"/f","content":""},{"kind":"mkdir","path":"/f/d"}]"#,
            "apply patch 1 to /f/d: /f is no directory (regular file)",
        ),
        (r#"[{"kind":"append","path":"/link","content":""}]"#, "it is a symlink"),
        (r#"[{"kind":"append","path":"/etc","content":""}]"#, "it is a directory"),
        (r#"[{"kind":"append","path":"/gone","content":""}]"#, "it does not exist"),
        (
            r#"[{"kind":"remove","path":"/etc"},{"kind":"append","path":"/etc/hosts","content":""}]"#,
            "it does not exist",
        ),
    ];
    for (json, part) in table {
        let message = bench.refused(json);
        assert!(message.contains(part), "{message} lacks {part}");
    }
}

/// A19, A21, A28, A29: what is removed stays removed, also when a directory takes its place.
#[test]
fn removing() {
    let mut bench = two_layers();
    let merged = bench.merged(
        r#"[{"Remove":{"path":"/opt"}}, {"Remove":{"path":"/nothing/at/all"}}, {"Remove":{"path":"/gone"}},
            {"Text":{"path":"/new/a","content":"","replace":false}}, {"Remove":{"path":"/new"}},
            {"Remove":{"path":"/etc"}}, {"Mkdir":{"path":"/etc"}}, {"Text":{"path":"/etc/fresh","content":"","replace":false}},
            {"Remove":{"path":"/home"}}, {"Text":{"path":"/home/user/x","content":"","replace":false}},
            {"Remove":{"path":"/swept"}}, {"Mkdir":{"path":"/swept"}},
            {"Remove":{"path":"/link"}}, {"Mkdir":{"path":"/link","mode":"0711"}}]"#,
    );
    let names: Vec<_> = survey(&merged).into_keys().map(|n| n.display().to_string()).collect();
    let wanted = ["", "etc", "etc/fresh", "home", "home/user", "home/user/x", "link", "root", "swept", "tmp"];
    assert_eq!(names, wanted);
    assert_eq!((mode(&merged.join("home/user")), mode(&merged.join("link"))), (0o755, 0o711));

    // Only what a layer has needs a whiteout, and its parent.
    let image = bench.build(r#"[{"Remove":{"path":"/etc/hosts"}},{"Remove":{"path":"/etc/none"}}]"#).unwrap();
    let alone = mount_erofs(&image, &bench.workshop.path().join("alone"));
    let names: Vec<_> = survey(&alone).into_keys().map(|n| n.display().to_string()).collect();
    assert_eq!(names, ["", "etc", "etc/hosts"]);
    let whiteout = fs::symlink_metadata(alone.join("etc/hosts")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
}

/// A30, A31: the topmost visible file grows and keeps its metadata.
#[test]
fn appending() {
    let mut bench = two_layers();
    let merged = bench.merged(
        r#"[{"Append":{"path":"/etc/hosts","content":"one\n"}}, {"Append":{"path":"/etc/hosts","content":"two"}},
            {"Append":{"path":"/etc/shadow","content":"me:*\n"}},
            {"Text":{"path":"/own","content":"a","mode":"0600"}}, {"Append":{"path":"/own","content":"b"}}]"#,
    );
    assert_eq!(fs::read(merged.join("etc/hosts")).unwrap(), b"top\none\ntwo");
    assert_eq!((fs::read(merged.join("own")).unwrap(), mode(&merged.join("own"))), (b"ab".to_vec(), 0o600));
    let shadow = fs::metadata(merged.join("etc/shadow")).unwrap();
    assert_eq!(fs::read(merged.join("etc/shadow")).unwrap(), b"root:*\nme:*\n");
    assert_eq!((shadow.mode() & 0o7777, shadow.uid(), shadow.gid(), shadow.mtime()), (0o640, 0, 42, 1_000_000));
    let mut value = [0; 64];
    assert_eq!(rustix::fs::getxattr(merged.join("etc/shadow"), "security.capability", &mut value), Ok(20));
}

/// A28: a directory of the layers is left alone, or gets the mode that is given.
#[test]
fn directories_that_are_there() {
    let mut bench = two_layers();
    let image = bench.build(r#"[{"kind":"mkdir","path":"/tmp"}]"#).unwrap();
    assert_eq!(survey(&mount_erofs(&image, &bench.workshop.path().join("alone"))).len(), 1, "nothing but the root");
    let merged = bench.merged(r#"[{"kind":"mkdir","path":"/home/user","mode":"0700"}]"#);
    let home = fs::metadata(merged.join("home/user")).unwrap();
    assert_eq!((home.mode() & 0o7777, home.uid()), (0o700, 1000));
}

/// A25, A26: copies of the host's files and trees.
#[test]
fn copies() {
    let mut bench = two_layers();
    let host = bench.host();
    let file = write(host.join("file"), "content");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o4711)).unwrap();
    symlink("file", host.join("link")).unwrap();
    let tree = dir(host.join("tree"));
    fs::set_permissions(&tree, fs::Permissions::from_mode(0o2750)).unwrap();
    write(tree.join("hosts"), "copied");
    write(tree.join("sub/.wh.name"), "an ordinary name here");
    symlink("/etc/passwd", tree.join("sub/link")).unwrap();
    fs::write(tree.join("sub").join(std::ffi::OsStr::from_bytes(b"\xff")), "bytes").unwrap();
    fs::set_permissions(write(tree.join("none"), ""), fs::Permissions::from_mode(0o000)).unwrap();
    set_xattr(&tree.join("hosts"), "user.a", b"b");
    chown(tree.join("hosts"), Some(5), Some(6)).unwrap();
    let merged = bench.merged(
        r#"[{"kind":"copy-file","src":"HOST/link","dst":"/by-link"}, {"kind":"copy-file","src":"HOST/file","dst":"/f","mode":"0600"},
            {"kind":"append","path":"/f","content":"!"},
            {"kind":"copy-dir","src":"HOST/tree","dst":"/etc","replace":true},
            {"kind":"copy-dir","src":"HOST/tree","dst":"/kept","preserve":["owner","mtime","xattrs"]}]"#,
    );
    assert_eq!(
        (fs::read(merged.join("by-link")).unwrap(), mode(&merged.join("by-link"))),
        (b"content".to_vec(), 0o4711)
    );
    assert_eq!((fs::read(merged.join("f")).unwrap(), mode(&merged.join("f"))), (b"content!".to_vec(), 0o600));
    assert_eq!(fs::read(merged.join("etc/hosts")).unwrap(), b"copied");
    assert!(exists(&merged.join("etc/only-bottom")), "a tree is merged into what is there");
    assert_eq!((mode(&merged.join("etc")), mode(&merged.join("etc/none"))), (0o2750, 0o644));
    assert_eq!(fs::read_dir(merged.join("etc/sub")).unwrap().count(), 3);
    assert_eq!(fs::read_link(merged.join("etc/sub/link")).unwrap(), Path::new("/etc/passwd"));
    let plain = fs::metadata(merged.join("etc/hosts")).unwrap();
    assert_eq!((plain.uid(), plain.gid(), plain.mtime()), (0, 0, 0));
    let kept = fs::metadata(merged.join("kept/hosts")).unwrap();
    assert_eq!((kept.uid(), kept.gid(), kept.mtime()), (5, 6, fs::metadata(tree.join("hosts")).unwrap().mtime()));
    let mut value = [0; 8];
    assert_eq!(rustix::fs::getxattr(merged.join("kept/hosts"), "user.a", &mut value), Ok(1));
    assert!(rustix::fs::getxattr(merged.join("etc/hosts"), "user.a", &mut value).is_err());
}

/// A25, A26, A33: what is not copied, and how a source cannot lead out of the directories that are allowed.
#[test]
fn sources_that_are_refused() {
    let mut bench = two_layers();
    let host = bench.host();
    let secret = write(bench.workshop.path().join("secret"), "secret");
    symlink(&secret, host.join("out")).unwrap();
    symlink("../secret", host.join("up")).unwrap();
    nix::unistd::mkfifo(&dir(host.join("tree")).join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let _socket = UnixListener::bind(dir(host.join("other")).join("socket")).unwrap();
    let copy = |kind: &str, src: &str| format!(r#"[{{"kind":"copy-{kind}","src":"{src}","dst":"/copy"}}]"#);
    let table = [
        (copy("file", "/etc/passwd"), "copy /etc/passwd: it is in no directory that patches may copy from"),
        (copy("file", "HOST/../secret"), "it has a \"..\""),
        (copy("file", "HOST/out"), "/host/out: No such file"),
        (copy("file", "HOST/up"), "/host/up: No such file"),
        (copy("file", "HOST/none"), "/host/none: No such file"),
        (copy("file", "HOST/tree"), "it is no regular file"),
        (copy("file", "HOST/tree/fifo"), "it is no regular file"),
        (copy("dir", "HOST/tree"), "/host/tree/fifo: devices, sockets and FIFOs are not copied"),
        (copy("dir", "HOST/other"), "/host/other/socket: devices"),
        (copy("dir", "HOST/out"), "open "),
    ];
    for (json, part) in table {
        let message = bench.refused(&json);
        assert!(message.contains(part), "{message} lacks {part}");
    }
    bench.sources = Sources::default();
    assert!(bench.refused(&copy("file", "HOST/out")).contains("in no directory"), "nothing is allowed by default");
}

/// A11: a node on which files are renamed and mounts come and go all the time, each of which makes the kernel doubt a ".." in a link.
#[test]
fn sources_are_found_on_a_busy_node() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut bench = two_layers();
    let host = bench.host();
    write(host.join("a/b/file"), "found");
    symlink(format!("{}b/file", "../a/b/../../a/".repeat(50)), host.join("a/link")).unwrap();
    let noise = dir(bench.workshop.path().join("noise"));
    let (one, other) = (dir(noise.join("one")), noise.join("other"));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                fs::rename(&one, &other).unwrap();
                fs::rename(&other, &one).unwrap();
            }
        });
        let copies: Vec<_> = (0..500)
            .map(|n| format!(r#"{{"kind":"copy-file","src":"HOST/a/link","dst":"/copy{n}","replace":true}}"#))
            .collect();
        let built = bench.build(&format!("[{}]", copies.join(",")));
        done.store(true, Ordering::Relaxed);
        let image = built.unwrap_or_else(|e| panic!("{e}: {:?}", std::error::Error::source(&e)));
        assert_eq!(fs::read(bench.show(&image).join("copy499")).unwrap(), b"found");
    });
}

/// A5: a layer that cannot be opened, is no image, or cannot be searched, each by its name.
#[test]
fn damaged_layers_are_named() {
    let mut bench = two_layers();
    let patches = decode(br#"[{"Remove":{"path":"/etc/hosts"}}]"#, &Limits::default()).unwrap();
    let missing = LowerImage::open(Path::new("/nonexistent/layer")).unwrap_err();
    assert_eq!(missing.to_string(), "open layer /nonexistent/layer");
    let garbage = write(bench.workshop.path().join("garbage"), &"x".repeat(9000));
    let lower = [LowerImage::open(&garbage).unwrap()];
    let error =
        build(&patches, &lower, &bench.sources, &Limits::default(), &garbage.with_extension("out")).unwrap_err();
    assert!(matches!(error, PatchError::Parse { layer, .. } if layer.ends_with("garbage")));
    let mut bytes = fs::read(&bench.images[0]).unwrap();
    bytes[4096 + 64..].fill(0xee);
    bench.images[0] = bench.workshop.path().join("damaged");
    fs::write(&bench.images[0], bytes).unwrap();
    assert!(
        bench
            .refused(r#"[{"Remove":{"path":"/opt/x"}}]"#)
            .contains("apply patch 0 to /opt/x: look it up in the layers")
    );
}

#[test]
fn the_same_patches_give_the_same_image() {
    let mut bench = two_layers();
    let json =
        r#"[{"Append":{"path":"/etc/hosts","content":"x"}},{"Remove":{"path":"/opt"}},{"Mkdir":{"path":"/a/b"}}]"#;
    let images = [bench.build(json).unwrap(), bench.build(json).unwrap()].map(|image| fs::read(image).unwrap());
    assert!(images[0] == images[1]);
}

/// Does a patch by hand in a writable overlay; an error where the patch must be refused.
fn by_hand(root: &Path, patch: &Patch) -> Result<(), ()> {
    let names: Vec<&std::ffi::OsStr> = patch.path().names().iter().map(|n| std::ffi::OsStr::from_bytes(n)).collect();
    let path = root.join(names.iter().collect::<PathBuf>());
    let parent = path.parent().unwrap();
    let way_is_free = (1..names.len()).all(|n| {
        let prefix = root.join(names[..n].iter().collect::<PathBuf>());
        fs::symlink_metadata(prefix).map_or(true, |m| m.is_dir())
    });
    let there = fs::symlink_metadata(&path).ok().filter(|_| way_is_free);
    let prepare = |replace: bool| {
        if !way_is_free || (there.is_some() && !replace) {
            return Err(());
        }
        fs::create_dir_all(parent).unwrap();
        Ok(())
    };
    match &patch.change {
        Change::Write { content, given, replace, .. } => {
            prepare(*replace)?;
            put_file(&path, content, u32::from(given.mode.unwrap_or(0o644)));
        }
        Change::CopyFile { source, replace, .. } => {
            prepare(*replace)?;
            put_file(&path, &fs::read(source).unwrap(), mode(source));
        }
        Change::CopyDir { source, replace, .. } => {
            prepare(*replace)?;
            put_tree(&path, source);
        }
        Change::Symlink { target, replace, .. } => {
            prepare(*replace)?;
            put_link(&path, Path::new(std::ffi::OsStr::from_bytes(target)));
        }
        Change::Mkdir { given, .. } => {
            if !way_is_free || there.as_ref().is_some_and(|m| !m.is_dir()) {
                return Err(());
            }
            fs::create_dir_all(&path).unwrap();
            if let Some(mode) = given.mode {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode.into())).unwrap();
            }
        }
        Change::Remove { .. } => {
            if way_is_free {
                clear(&path);
            }
        }
        Change::Append { content, .. } => {
            let there = there.filter(|m| m.is_file()).ok_or(())?;
            let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
            file.write_all(content).unwrap();
            file.set_modified(there.modified().unwrap()).unwrap();
        }
    }
    Ok(())
}

fn clear(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(m) if m.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

fn put_file(path: &Path, content: &[u8], mode: u32) {
    clear(path);
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    File::open(path).unwrap().set_modified(UNIX_EPOCH).unwrap();
}

fn put_link(path: &Path, target: &Path) {
    clear(path);
    symlink(target, path).unwrap();
    let epoch = nix::sys::time::TimeSpec::new(0, 0);
    let flag = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
    nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, path, &epoch, &epoch, flag).unwrap();
}

fn put_tree(path: &Path, source: &Path) {
    if !fs::symlink_metadata(path).is_ok_and(|m| m.is_dir()) {
        clear(path);
        fs::create_dir(path).unwrap();
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode(source))).unwrap();
    for entry in fs::read_dir(source).unwrap().map(|e| e.unwrap()) {
        let (from, to) = (entry.path(), path.join(entry.file_name()));
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => put_tree(&to, &from),
            kind if kind.is_symlink() => put_link(&to, &fs::read_link(&from).unwrap()),
            _ => put_file(&to, &fs::read(&from).unwrap(), mode(&from)),
        }
    }
}

fn random_patch(dice: &mut Dice, host: &Path) -> Patch {
    let depth = 1 + dice.roll(3);
    let text: Vec<u8> = (0..depth).flat_map(|_| [b"/", NAMES[dice.roll(NAMES.len())]].concat()).collect();
    let path = GuestPath::parse(&text).unwrap();
    let replace = dice.roll(3) > 0;
    let given = Given { mode: [None, Some(0o600), Some(0o711)][dice.roll(3)], ..Given::default() };
    let content = vec![b'p'; dice.roll(4000)];
    let change = match dice.roll(10) {
        0 | 1 => Change::Write { path, content, given, replace },
        2 => Change::CopyFile { source: host.join("file"), path, given: Given::default(), replace },
        3 | 4 => Change::CopyDir { source: host.join("tree"), path, preserve: Preserve::default(), replace },
        5 => Change::Symlink { path, target: b"b".into(), replace },
        6 | 7 => Change::Mkdir { path, given },
        8 => Change::Remove { path },
        _ => Change::Append { path, content },
    };
    change.into()
}

/// Random patches over random layers: the new lower shows what the kernel shows of a writable overlay in which the same was done
/// by hand, and what cannot be done by hand is refused.
#[test]
fn patches_equal_work_by_hand() {
    let mut bench = Bench::new(&[]);
    let host = bench.host();
    write(host.join("file"), "host file");
    write(host.join("tree/a/b"), "host a/b");
    write(host.join("tree/c"), "host c");
    symlink("a", host.join("tree/d")).unwrap();
    let base = common::tmpfs(&bench.workshop.path().join("uppers"), "size=256m");
    let (mut applied, mut refused) = (0, 0);
    let started = SystemTime::now();
    for seed in 1..=40u64 {
        let mut dice = Dice(seed * 1_234_577);
        (bench.images, bench.mounted) = (Vec::new(), Vec::new());
        for layer in 0..3 {
            let mut tree = Tree { inodes: Vec::new() };
            common::grow_layer(&mut tree, &mut dice, layer, 0);
            let image = bench.workshop.path().join(format!("{seed}-{layer}.erofs"));
            Plan::new(&tree).unwrap().write(File::create(&image).unwrap()).unwrap();
            bench.mounted.insert(0, mount_erofs(&image, &image.with_extension("mounted")));
            bench.images.push(image);
        }
        let (upper, work) = (dir(base.join(format!("{seed}/upper"))), dir(base.join(format!("{seed}/work"))));
        // The root of a writable overlay is its upper directory's.
        fs::set_permissions(&upper, fs::Permissions::from_mode(mode(&bench.mounted[0]))).unwrap();
        let root = dir(bench.workshop.path().join(format!("{seed}")));
        let lowers: Vec<_> = bench.mounted.iter().map(|path| path.to_str().unwrap()).collect();
        let options = format!("lowerdir={},upperdir={},workdir={}", lowers.join(":"), upper.display(), work.display());
        mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
        let mut list = Vec::new();
        for _ in 0..15 {
            let patch = random_patch(&mut dice, &host);
            let done = by_hand(&root, &patch);
            list.push(patch);
            if done.is_err() {
                match bench.build_list(&list) {
                    Err(PatchError::Apply { index, .. }) if index + 1 == list.len() => refused += 1,
                    other => panic!("seed {seed}: the last of {list:#?} must be refused, not {other:?}"),
                }
                list.pop();
            }
        }
        applied += list.len();
        let image = bench.build_list(&list).unwrap_or_else(|e| panic!("seed {seed}: {list:#?}: {e:?}"));
        let (mut expected, mut found) = (survey(&root), survey(&bench.show(&image)));
        common::forget_directory_times(&mut expected);
        common::forget_directory_times(&mut found);
        assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "seed {seed}: {list:#?}");
        assert_same(&expected, &found);
    }
    assert!(applied > 200 && refused > 50, "{applied} applied, {refused} refused, {:?}", started.elapsed());
}

/// Text at a path through links, and what the container then finds there.
fn through_links(bench: &mut Bench, path: &str, json: &str) -> Result<PathBuf, String> {
    let image = bench.build(json).map_err(|e| std::error::Error::source(&e).unwrap().to_string())?;
    let merged = bench.show(&image);
    let found = in_root(&merged, path).unwrap_or_else(|e| panic!("{json}: {path} is not found: {e}"));
    assert!(found.metadata().unwrap().is_file());
    Ok(merged)
}

/// Opens a path as who has `root` as its root does.
fn in_root(root: &Path, path: &str) -> std::io::Result<File> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
    let root = rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    loop {
        match rustix::fs::openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
            // Another test has mounted something meanwhile.
            Err(rustix::io::Errno::AGAIN) => {}
            found => return Ok(found?.into()),
        }
    }
}

/// A15: a distribution with merged directories.
#[test]
fn links_are_followed_inside_the_image() {
    let bottom = |root: &Path| {
        write(root.join("usr/bin/sh"), "sh\n");
        fs::set_permissions(root.join("usr/bin"), fs::Permissions::from_mode(0o711)).unwrap();
        symlink("usr/bin", root.join("bin")).unwrap();
        symlink("/run", root.join("run-link")).unwrap();
        write(root.join("run/lock"), "");
        symlink("../../../../run", dir(root.join("var")).join("run")).unwrap();
    };
    let top = |root: &Path| {
        write(root.join("usr/share/zone"), "UTC\n");
        symlink("../usr/share/zone", dir(root.join("etc")).join("localtime")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        symlink("gone/../x", root.join("past-nothing")).unwrap();
        symlink("usr/share/zone/", root.join("slash")).unwrap();
        symlink("/", root.join("self")).unwrap();
        symlink("new/place", root.join("dangling")).unwrap();
        symlink("/etc", root.join("host-etc")).unwrap();
    };
    let mut bench = Bench::new(&[&bottom, &top]);
    let text = |path: &str| format!(r#"{{"kind":"text","path":"{path}","content":"new","follow_symlinks":true}}"#);
    let merged = bench.merged(&format!(
        r#"[{}, {}, {}, {}, {}, {}, {},
            {{"kind":"append","path":"/bin/sh","content":"more\n","follow_symlinks":true}},
            {{"kind":"append","path":"/etc/localtime","content":"CET\n","follow_symlinks":true}},
            {{"kind":"mkdir","path":"/bin/deep/er","follow_symlinks":true}},
            {{"kind":"symlink","target":"/usr","link":"/late","replace":true}},
            {{"kind":"text","path":"/late/lib/x","content":"late","follow_symlinks":true}},
            {{"kind":"remove","path":"/run-link/lock","follow_symlinks":true}}]"#,
        text("/bin/new"),
        text("/run-link/a"),
        text("/var/run/b"),
        text("/self/self/c"),
        text("/dangling/d"),
        text("/host-etc/passwd"),
        text("/bin/etc/deeper"),
    ));
    for path in ["usr/bin/new", "run/a", "run/b", "c", "new/place/d", "etc/passwd", "usr/bin/etc/deeper"] {
        assert_eq!(fs::read(merged.join(path)).unwrap(), b"new", "{path}");
    }
    assert_eq!(fs::read(merged.join("usr/bin/sh")).unwrap(), b"sh\nmore\n");
    assert_eq!(fs::read(merged.join("usr/share/zone")).unwrap(), b"UTC\nCET\n");
    assert_eq!(fs::read(merged.join("usr/lib/x")).unwrap(), b"late", "links of earlier patches count");
    assert_eq!(mode(&merged.join("usr/bin")), 0o711);
    assert!(!exists(&merged.join("run/lock")) && merged.join("usr/bin/deep/er").is_dir());
    for link in ["bin", "var/run", "etc/localtime", "dangling"] {
        assert!(merged.join(link).is_symlink(), "{link} stays a link");
    }
    let table = [
        (text("/loop/x"), "more than 40 symbolic links on the way"),
        (text("/past-nothing/x"), "/gone is no directory (it does not exist)"),
        (text("/etc/localtime/x"), "/usr/share/zone is no directory (regular file)"),
        (text("/bin/sh"), "has a regular file there; set \"replace\""),
        (
            r#"{"kind":"append","path":"/slash","content":"","follow_symlinks":true}"#.into(),
            "/usr/share/zone is no directory",
        ),
        (r#"{"kind":"append","path":"/self","content":"","follow_symlinks":true}"#.into(), "it is a directory"),
        (r#"{"kind":"append","path":"/dangling","content":"","follow_symlinks":true}"#.into(), "it does not exist"),
        // Without the option nothing has changed.
        (r#"{"kind":"text","path":"/bin/x","content":""}"#.into(), "/bin is no directory (symlink)"),
        (r#"{"kind":"append","path":"/etc/localtime","content":""}"#.into(), "it is a symlink"),
        (r#"{"kind":"mkdir","path":"/etc/localtime","follow_symlinks":true}"#.into(), "it is a symlink"),
    ];
    for (json, part) in table {
        let message = bench.refused(&format!("[{json}]"));
        assert!(message.contains(part), "{message} lacks {part}");
    }
}

/// A15: random layers with links everywhere. What was put somewhere is found there by who lives in the root, and what was appended to
/// is what was found there before; where the patch is refused, nothing could have been found.
#[test]
fn followed_links_lead_where_the_kernel_finds_them() {
    const TARGETS: [&str; 14] =
        ["a", "b", "../b", "/a/b", "/c", "../../d", "b/../c", "/", ".", "c/", "a/.", "/a/../b", "..", "d//a"];
    let mut bench = Bench::new(&[]);
    let (mut done, mut refused) = (0, 0);
    for seed in 1..=12u64 {
        let mut dice = Dice(seed * 7_654_321);
        (bench.images, bench.mounted) = (Vec::new(), Vec::new());
        for layer in 0..3 {
            let mut tree = Tree { inodes: Vec::new() };
            common::grow_layer(&mut tree, &mut dice, layer, 0);
            for inode in &mut tree.inodes {
                use nacelle_rootfs::tree::Node;
                if matches!(inode.node, Node::Symlink(_)) || (inode.is_whiteout() && dice.roll(2) == 0) {
                    inode.node = Node::Symlink(TARGETS[dice.roll(TARGETS.len())].as_bytes().into());
                }
            }
            let image = bench.workshop.path().join(format!("{seed}-{layer}.erofs"));
            Plan::new(&tree).unwrap().write(File::create(&image).unwrap()).unwrap();
            bench.mounted.insert(0, mount_erofs(&image, &image.with_extension("mounted")));
            bench.images.push(image);
        }
        let lowers: Vec<&Path> = bench.mounted.iter().map(PathBuf::as_path).collect();
        let before = mount_overlay(&lowers, &bench.workshop.path().join(format!("{seed}")));
        for _ in 0..25 {
            let depth = 1 + dice.roll(3);
            let path: String = (0..depth).map(|_| format!("/{}", ["a", "b", "c", "d"][dice.roll(4)])).collect();
            let new = format!("{path}/new");
            let json = format!(r#"[{{"kind":"text","path":"{new}","content":"x","follow_symlinks":true}}]"#);
            let parent = in_root(&before, &path).and_then(|file| file.metadata());
            match through_links(&mut bench, &new, &json) {
                Ok(merged) => {
                    let mut content = String::new();
                    std::io::Read::read_to_string(&mut in_root(&merged, &new).unwrap(), &mut content).unwrap();
                    assert_eq!(content, "x", "seed {seed}: {new}");
                    // What was found as something else than a directory cannot have a name in it.
                    assert!(parent.as_ref().map_or(true, |m| m.is_dir()), "seed {seed}: {new}");
                    done += 1;
                }
                Err(error) => {
                    assert!(!parent.is_ok_and(|m| m.is_dir()), "seed {seed}: {new} must be possible: {error}");
                    refused += 1;
                }
            }
            let json = format!(r#"[{{"kind":"append","path":"{path}","content":"+","follow_symlinks":true}}]"#);
            let there = in_root(&before, &path).ok().filter(|file| file.metadata().unwrap().is_file());
            match (through_links(&mut bench, &path, &json), there) {
                (Ok(merged), Some(there)) => {
                    let read = |mut file: File| {
                        let mut content = Vec::new();
                        std::io::Read::read_to_end(&mut file, &mut content).unwrap();
                        content
                    };
                    let expected = [read(there), b"+".to_vec()].concat();
                    assert_eq!(read(in_root(&merged, &path).unwrap()), expected, "seed {seed}: {path}");
                    done += 1;
                }
                (Err(_), None) => refused += 1,
                (built, there) => panic!("seed {seed}: append to {path}: {built:?}, and there was {there:?}"),
            }
        }
    }
    assert!(done > 100 && refused > 50, "{done} done, {refused} refused");
}
