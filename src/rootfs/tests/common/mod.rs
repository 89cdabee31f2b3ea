//! What the tests of this crate share: mounts that end with their test, tools that must be there, and the comparison of two trees.
#![allow(dead_code, reason = "each test program uses its part")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{RwLock, RwLockWriteGuard};

use nacelle_rootfs::erofs::reader::Image;
use nacelle_rootfs::erofs::writer::{Plan, Written};
use nacelle_rootfs::tree::{Data, Entry, Inode, Node, Tree};
use nacelle_rootfs::{Cache, Limits, layer};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

/// A directory of its own, in a mount namespace of its own: whatever the test mounts is gone when its thread ends, however it ends.
pub struct Workshop(TempDir);

/// Opens a workshop.
pub fn workshop() -> Workshop {
    assert!(nix::unistd::geteuid().is_root(), "these tests mount file systems and create devices: run them as root");
    unshare(CloneFlags::CLONE_NEWNS).expect("unshare the mount namespace");
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .expect("make mounts private");
    Workshop(tempfile::Builder::new().prefix("nacelle-rootfs-").tempdir().expect("create a temporary directory"))
}

impl Workshop {
    /// The directory.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Workshop {
    /// Takes the mounts away, so that the directory below can be removed.
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap_or_default();
        let targets: Vec<_> = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new).collect();
        for target in targets.into_iter().rev().filter(|t| t.starts_with(self.path())) {
            let _ = nix::mount::umount2(target, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// A cache, a scratch directory and some snapshots in one temporary directory.
pub struct Shop {
    pub workshop: Workshop,
    pub cache: Cache,
}

impl Shop {
    pub fn new() -> Shop {
        let workshop = workshop();
        dir(workshop.path().join("scratch"));
        let cache = Cache::open(&workshop.path().join("root"), Limits::default()).unwrap();
        Shop { workshop, cache }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.workshop.path().join(name)
    }
}

/// Creates and returns a directory.
pub fn dir(path: impl AsRef<Path>) -> PathBuf {
    fs::create_dir_all(&path).unwrap();
    path.as_ref().to_owned()
}

/// Writes bytes at the offsets of `parts`, and nothing between them.
pub fn sparse(path: &Path, size: u64, parts: &[(u64, usize)]) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    parts.iter().for_each(|&(at, len)| file.write_all_at(&vec![0xa5; len], at).unwrap());
}

/// Held for reading while a program starts.
static STARTS: RwLock<()> = RwLock::new(());

/// No program is being started by another test as long as the value lives: between its fork and its exec a child holds
/// every lock on a file that its parent held.
pub fn between_starts() -> RwLockWriteGuard<'static, ()> {
    STARTS.write().unwrap()
}

/// Runs a program that must succeed. `package` is where Debian has it.
pub fn run(package: &str, program: &str, args: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let mut command = Command::new(program);
    command.args(args.iter().map(|a| a.as_ref())).env("PATH", path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let starting = STARTS.read().unwrap();
    let started = command.stdin(Stdio::null()).spawn();
    drop(starting);
    let output = started.and_then(Child::wait_with_output);
    let output = output.unwrap_or_else(|e| panic!("run {program} (package {package}): {e}"));
    assert!(output.status.success(), "{program}: {output:?}");
    output
}

fn path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// Mounts a tmpfs of the given size on `at`.
pub fn tmpfs(at: &Path, options: &str) -> PathBuf {
    let at = dir(at);
    mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("mount tmpfs");
    at
}

/// Mounts an image by the host's kernel, straight on the file, as the guest does.
pub fn mount_erofs(image: &Path, at: &Path) -> PathBuf {
    let at = dir(at);
    let flags = MsFlags::MS_RDONLY;
    mount(Some(image), &at, Some("erofs"), flags, None::<&str>).expect("mount erofs on a file (Linux 6.12 or later)");
    at
}

/// Mounts an overlay without an upper; `lowers` are topmost first.
pub fn mount_overlay(lowers: &[&Path], at: &Path) -> PathBuf {
    let at = dir(at);
    let lowers: Vec<_> = lowers.iter().map(|l| l.to_str().unwrap()).collect();
    let options = format!("lowerdir={}", lowers.join(":"));
    mount(Some("overlay"), &at, Some("overlay"), MsFlags::MS_RDONLY, Some(options.as_str())).expect("mount overlay");
    at
}

/// Scans `source` and writes its image.
pub fn convert(source: &Path, image: &Path) -> (Tree, Written) {
    let tree = layer::scan(source, &Limits::default()).unwrap();
    let written = Plan::new(&tree).unwrap().write(File::create(image).unwrap()).unwrap();
    (tree, written)
}

/// Converts `source`; the image must please fsck.erofs and our reader, the kernel must show in it exactly what `source` has, and
/// a second conversion must give the same bytes.
pub fn assert_faithful(workshop: &Path, source: &Path) -> PathBuf {
    let image = workshop.join("image.erofs");
    let (_, written) = convert(source, &image);
    assert_eq!(fs::metadata(&image).unwrap().len(), written.size);
    let again = layer::scan(source, &Limits::default()).unwrap();
    let again = Plan::new(&again).unwrap().write(std::io::sink()).unwrap();
    assert_eq!(written, again, "the same tree gives the same bytes: size, inodes and checksum of the whole");
    assert_sound(&image);
    let mounted = mount_erofs(&image, &workshop.join("mounted"));
    assert_same(&survey(source), &survey(&mounted));
    image
}

/// fsck.erofs and our own reader have nothing to say against the image.
pub fn assert_sound(image: &Path) {
    let output = run("erofs-utils", "fsck.erofs", &[&image]);
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(!said.contains("<E>"), "{said}");
    let file = File::open(image).unwrap();
    Image::open(&file).unwrap().check().unwrap();
}

/// All that can be seen of one name.
#[derive(Debug, PartialEq, Eq, Clone)]
pub struct Seen {
    mode: u32,
    owner: (u32, u32),
    nlink: u64,
    size: u64,
    mtime: (i64, i64),
    device: u64,
    /// The first name of the same inode.
    first_name: PathBuf,
    link: Option<PathBuf>,
    xattrs: BTreeMap<OsString, Vec<u8>>,
    content: Option<u32>,
}

/// Everything below `root`, the root itself included. Sockets are left out, as they are from images.
pub fn survey(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut inodes = HashMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(name) = pending.pop() {
        let path = if name.as_os_str().is_empty() { root.to_owned() } else { root.join(&name) };
        let metadata = match fs::symlink_metadata(&path) {
            // overlayfs lists whiteouts of directories that it need not merge, and then does not find them.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            other => other.unwrap_or_else(|e| panic!("stat {path:?}: {e}")),
        };
        let kind = metadata.mode() & 0o170_000;
        if kind == 0o140_000 {
            continue;
        }
        let directory = metadata.is_dir();
        if directory {
            pending.extend(fs::read_dir(&path).unwrap().map(|e| name.join(e.unwrap().file_name())));
        }
        let first_name = inodes.entry((metadata.dev(), metadata.ino())).or_insert_with(|| name.clone()).clone();
        let what = Seen {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            nlink: if directory { 0 } else { metadata.nlink() },
            size: if directory { 0 } else { metadata.size() },
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            device: metadata.rdev(),
            first_name,
            link: metadata.is_symlink().then(|| fs::read_link(&path).unwrap()),
            xattrs: xattrs(&path),
            content: metadata.is_file().then(|| checksum(&path, metadata.size())),
        };
        seen.insert(name, what);
    }
    // The walk's order differs between file systems; the first name must not.
    let mut least: HashMap<PathBuf, PathBuf> = HashMap::new();
    for (name, what) in &seen {
        least.entry(what.first_name.clone()).or_insert_with(|| name.clone());
    }
    seen.values_mut().for_each(|what| what.first_name = least[&what.first_name].clone());
    seen
}

/// Compares two surveys name by name, so that a difference can be read.
pub fn assert_same(expected: &BTreeMap<PathBuf, Seen>, found: &BTreeMap<PathBuf, Seen>) {
    let names: Vec<_> = expected.keys().filter(|n| !found.contains_key(*n)).take(5).collect();
    assert!(names.is_empty(), "missing names, among them {names:?}");
    let names: Vec<_> = found.keys().filter(|n| !expected.contains_key(*n)).take(5).collect();
    assert!(names.is_empty(), "unexpected names, among them {names:?}");
    for (name, what) in expected {
        assert_eq!(what, &found[name], "{name:?} differs");
    }
}

/// Forgets when directories were changed: working in them by hand does that.
pub fn forget_directory_times(seen: &mut BTreeMap<PathBuf, Seen>) {
    seen.values_mut().filter(|what| what.mode & 0o170_000 == 0o040_000).for_each(|what| what.mtime = (0, 0));
}

/// Forgets how many names files have, where some are out of sight.
pub fn forget_link_counts(seen: &mut BTreeMap<PathBuf, Seen>) {
    seen.values_mut().for_each(|what| what.nlink = 0);
}

fn xattrs(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let mut buffer = vec![0; 1 << 16];
    let len = match rustix::fs::llistxattr(path, &mut buffer) {
        Err(rustix::io::Errno::NOTSUP) => 0,
        other => other.unwrap_or_else(|e| panic!("list attributes of {path:?}: {e}")),
    };
    let names = buffer[..len].to_vec();
    let names = names.split(|&b| b == 0).filter(|n| !n.is_empty());
    names
        .map(|name| {
            let len = rustix::fs::lgetxattr(path, name, &mut buffer).unwrap();
            (std::ffi::OsStr::from_bytes(name).to_owned(), buffer[..len].to_vec())
        })
        .collect()
}

/// A checksum of the content; of a huge file only its start, its end and some places between.
fn checksum(path: &Path, size: u64) -> u32 {
    const WINDOW: u64 = 1 << 20;
    let file = File::open(path).unwrap_or_else(|e| panic!("open {path:?}: {e}"));
    let step = if size > 1 << 28 { (size / 64) & !0xfff } else { WINDOW };
    let mut buffer = vec![0; WINDOW as usize];
    let mut sum = 0;
    for at in (0..size).step_by(step as usize).chain([size.saturating_sub(WINDOW)]) {
        let wanted = (size - at).min(WINDOW) as usize;
        file.read_exact_at(&mut buffer[..wanted], at).unwrap_or_else(|e| panic!("read {path:?} at {at}: {e}"));
        sum = crc32c::crc32c_append(sum, &buffer[..wanted]);
    }
    sum
}

/// Numbers that are the same on each run.
pub struct Dice(pub u64);

impl Dice {
    /// A number below `limit`.
    pub fn roll(&mut self, limit: usize) -> usize {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % limit
    }
}

/// Names in random layers.
pub const NAMES: [&[u8]; 4] = [b"a", b"b", b"c", b"d"];

/// Adds a directory with random children, three levels deep, and gives its id. The permissions tell the layer.
pub fn grow_layer(tree: &mut Tree, dice: &mut Dice, layer: u16, depth: usize) -> usize {
    let id = tree.inodes.len();
    let inode = |node| Inode { permissions: 0o700 + layer, node, ..Inode::whiteout() };
    tree.inodes.push(inode(Node::Directory(Vec::new())));
    if depth > 0 && dice.roll(5) == 0 {
        tree.inodes[id].set_opaque();
    }
    let mut entries = Vec::new();
    for name in NAMES {
        let node = match dice.roll(10) {
            0..=3 => continue,
            4..=6 if depth < 3 => {
                entries.push(Entry { name: name.into(), inode: grow_layer(tree, dice, layer, depth + 1) });
                continue;
            }
            7 => Node::Symlink((*b"a").into()),
            8 => Node::CharDevice { major: 0, minor: 0 },
            _ => Node::File { size: 1, data: Data::Bytes([layer as u8].into()) },
        };
        tree.inodes.push(inode(node));
        entries.push(Entry { name: name.into(), inode: tree.inodes.len() - 1 });
    }
    tree.inodes[id].node = Node::Directory(entries);
    id
}
