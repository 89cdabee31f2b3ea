//! Archives → images: what GNU tar writes in all its formats comes back, OCI markers act as whiteouts, hostile entries are refused
//! (A13, C8-C12).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use common::{Dice, assert_same, assert_sound, dir, mount_erofs, mount_overlay, run, survey, workshop};
use nacelle_rootfs::Limits;
use nacelle_rootfs::erofs::reader::Image;
use nacelle_rootfs::tar::{self, Converted, DiffId, Hashing, TarError, convert};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rustix::fs::XattrFlags;
use sha2::{Digest, Sha256};

fn convert_file(archive: &Path, image: &Path) -> Result<Converted, TarError> {
    convert(File::open(archive).unwrap(), &File::create(image).unwrap(), &Limits::default(), Hashing::Skip)
}

/// Packs `tree` with GNU tar and these options, converts the archive, and compares what the kernel shows of it.
fn assert_round_trip(workshop: &Path, tree: &Path, options: &[&str]) {
    let name = options.join("").replace(['/', '='], "");
    let archive = workshop.join(format!("{name}.tar"));
    let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"--create", &"--directory", &tree, &"--file", &archive];
    args.extend(options.iter().map(|o| o as &dyn AsRef<std::ffi::OsStr>));
    args.push(&".");
    run("tar", "tar", &args);
    let image = workshop.join(format!("{name}.erofs"));
    let converted = convert_file(&archive, &image).unwrap_or_else(|e| panic!("{options:?}: {e:?}"));
    let bytes = fs::read(&image).unwrap();
    assert_eq!(converted.written.size, bytes.len() as u64);
    assert_eq!(converted.written.checksum, Some(crc32c::crc32c(&bytes)), "the checksum of parts written out of order");
    assert_sound(&image);
    convert_file(&archive, &workshop.join("again")).unwrap();
    assert!(bytes == fs::read(workshop.join("again")).unwrap(), "the same archive gives the same bytes");
    let again = File::create(workshop.join("again")).unwrap();
    tar::convert_file(&File::open(&archive).unwrap(), &again, &Limits::default(), Hashing::Skip).unwrap();
    assert!(bytes == fs::read(workshop.join("again")).unwrap(), "whoever copies");
    assert_same(&survey(tree), &survey(&mount_erofs(&image, &workshop.join(format!("{name}.d")))));
}

/// Times of whole seconds, for formats that know no others.
fn whole_seconds(tree: &Path) {
    run("findutils", "find", &[&tree, &"-exec", &"touch", &"-h", &"-d", &"2024-05-06 07:08:09 UTC", &"{}", &"+"]);
}

/// Every kind of inode, names beyond every field of a header, owners and attributes.
fn rich_tree(tree: &Path) {
    let node =
        |name: &str, kind, device| mknod(&tree.join(name), kind, Mode::from_bits_truncate(0o640), device).unwrap();
    fs::write(tree.join("file"), "content").unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    fs::write(tree.join("large"), vec![0x5a; 3_000_001]).unwrap();
    fs::hard_link(tree.join("large"), tree.join("large too")).unwrap();
    symlink("file", tree.join("link")).unwrap();
    symlink("link", dir(tree.join("dir")).join("self")).unwrap();
    node("fifo", SFlag::S_IFIFO, 0);
    node("null", SFlag::S_IFCHR, makedev(1, 3));
    node("disk", SFlag::S_IFBLK, makedev(8, 17));
    chown(tree.join("file"), Some(1000), Some(1_000_000)).unwrap();
    fs::set_permissions(tree.join("file"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::set_permissions(tree.join("dir"), fs::Permissions::from_mode(0o1777)).unwrap();
    for len in [1, 99, 100, 101, 155, 255] {
        fs::write(tree.join("n".repeat(len)), len.to_string()).unwrap();
    }
    let deep = dir(tree.join("d".repeat(90)).join("e".repeat(90)).join("f".repeat(90)));
    fs::write(deep.join("g"), "deep").unwrap();
    for size in [511, 512, 513, 2047, 2048, 2049, 4095, 4096, 4097] {
        fs::write(deep.join(size.to_string()), vec![7; size]).unwrap();
    }
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap_or_else(|e| panic!("set {name}: {e}"));
}

#[test]
fn every_format_of_gnu_tar() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    rich_tree(&tree);
    symlink("t".repeat(300), tree.join("long link")).unwrap();
    fs::hard_link(tree.join("n".repeat(255)), tree.join(format!("z{}", "n".repeat(250)))).unwrap();
    whole_seconds(&tree);
    assert_round_trip(workshop.path(), &tree, &["--format=gnu", "--sort=name"]);
    assert_round_trip(workshop.path(), &tree, &["--format=posix"]);
    // Formats with short fields.
    let tree = dir(workshop.path().join("small tree"));
    fs::write(dir(tree.join("d".repeat(80))).join("n".repeat(90)), "name and prefix").unwrap();
    symlink("elsewhere", tree.join("link")).unwrap();
    whole_seconds(&tree);
    assert_round_trip(workshop.path(), &tree, &["--format=ustar"]);
    let tree = dir(workshop.path().join("smaller tree"));
    fs::write(dir(tree.join("dir")).join("file"), "before ustar").unwrap();
    dir(tree.join("empty"));
    whole_seconds(&tree);
    assert_round_trip(workshop.path(), &tree, &["--format=v7"]);
}

#[test]
fn attributes_and_exact_times() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    rich_tree(&tree);
    set_xattr(&tree.join("file"), "user.binary", b"\0\n=\xff");
    set_xattr(&tree.join("dir"), "trusted.empty", b"");
    let mut capability = vec![1, 0, 0, 2];
    capability.extend([0x0000_2000u32, 0, 0, 0].iter().flat_map(|w| w.to_le_bytes()));
    set_xattr(&tree.join("large"), "security.capability", &capability);
    let before_1970 = std::time::UNIX_EPOCH - std::time::Duration::from_nanos(1_500_000_000);
    File::open(tree.join("empty")).unwrap().set_modified(before_1970).unwrap();
    assert_round_trip(workshop.path(), &tree, &["--format=posix", "--xattrs", "--xattrs-include=*"]);
}

#[test]
fn sparse_files_in_every_version() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    let sparse = |name: &str, size, parts: &[_]| common::sparse(&tree.join(name), size, parts);
    sparse("8g", 8 << 30, &[(0, 5000), ((4 << 30) + 123, 70_000), ((8 << 30) - 1, 1)]);
    sparse("hole", (1 << 30) + 17, &[]);
    sparse("small", 20_000, &[(19_999, 1)]);
    sparse("half", 1 << 20, &[(0, 4096), (500_000, 300_000)]);
    let comb: Vec<_> = (0..300).map(|i| (i * 65_536, 10)).collect();
    sparse("comb", 300 * 65_536, &comb);
    fs::write(tree.join("neighbour"), vec![1; 9000]).unwrap();
    whole_seconds(&tree);
    for options in [
        ["--format=gnu", "--sparse"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ] {
        assert_round_trip(workshop.path(), &tree, &[options[0], options[1], "--sparse"]);
    }
    assert!(fs::metadata(workshop.path().join("again")).unwrap().len() < 16 << 20);
}

#[test]
fn a_layer_of_very_many_files() {
    let workshop = workshop();
    let tree = common::tmpfs(&workshop.path().join("tree"), "size=1g,nr_inodes=0");
    let mut dice = Dice(11);
    for folder in 0..100 {
        let folder = dir(tree.join(format!("{}/{folder}", folder % 7)));
        (0..200).for_each(|i| fs::write(folder.join(format!("{i}")), vec![i as u8; dice.roll(5000)]).unwrap());
    }
    assert_round_trip(workshop.path(), &tree, &["--format=posix"]);
}

/// Small files get blocks of their own when there is no memory to keep them: another image, the same content.
#[test]
fn memory_for_small_files_is_bounded() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    (0..100).for_each(|i| fs::write(tree.join(i.to_string()), vec![i as u8; 1000]).unwrap());
    whole_seconds(&tree);
    let (archive, image) = (workshop.path().join("archive"), workshop.path().join("image"));
    run("tar", "tar", &[&"--create", &"--directory", &tree, &"--file", &archive, &"."]);
    let limits = Limits { small_files: 10_500, ..Limits::default() };
    let converted =
        convert(File::open(&archive).unwrap(), &File::create(&image).unwrap(), &limits, Hashing::Skip).unwrap();
    assert!(converted.written.size > 90 * 4096);
    assert_sound(&image);
    assert_same(&survey(&tree), &survey(&mount_erofs(&image, &workshop.path().join("mounted"))));
}

#[test]
fn compressed_archives_and_their_digest() {
    let workshop = workshop();
    let tree = dir(workshop.path().join("tree"));
    rich_tree(&tree);
    let path = |name: &str| workshop.path().join(name);
    run("tar", "tar", &[&"--create", &"--directory", &tree, &"--file", &path("plain.tar"), &"."]);
    let plain = fs::read(path("plain.tar")).unwrap();
    let diff_id = DiffId(Sha256::digest(&plain).into());
    let half = plain.len() / 2;
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let several = [gzip(&plain[..half]), gzip(&plain[half..])].concat();
    let frames = [zstd::encode_all(&plain[..half], 3).unwrap(), zstd::encode_all(&plain[half..], 3).unwrap()].concat();
    let mut images = Vec::new();
    for (index, bytes) in [plain.clone(), gzip(&plain), several, frames].iter().enumerate() {
        let image = path(&format!("{index}.erofs"));
        for (hashing, found) in
            [(Hashing::Skip, None), (Hashing::Compute, Some(diff_id)), (Hashing::Expect(diff_id), Some(diff_id))]
        {
            let file = File::create(&image).unwrap();
            assert_eq!(convert(bytes.as_slice(), &file, &Limits::default(), hashing).unwrap().diff_id, found);
        }
        images.push(fs::read(&image).unwrap());
    }
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]), "how an archive is packed does not matter");
    assert_eq!(diff_id.to_string().parse(), Ok(diff_id));
    let (archive, file) = (File::open(path("plain.tar")).unwrap(), File::create(path("copied")).unwrap());
    let copied = tar::convert_file(&archive, &file, &Limits::default(), Hashing::Skip).unwrap();
    assert!(copied.written.checksum.is_none(), "the kernel copied the large file");
    assert!(images[0] == fs::read(path("copied")).unwrap(), "and it does not matter who does");
    let hashed = tar::convert_file(&archive, &file, &Limits::default(), Hashing::Expect(diff_id)).unwrap();
    assert!(hashed.written.checksum.is_some(), "what is hashed passes through here");

    let refused = |bytes: &[u8], hashing| {
        let file = tempfile::tempfile().unwrap();
        convert(bytes, &file, &Limits::default(), hashing).unwrap_err()
    };
    let other = DiffId([7; 32]);
    assert!(
        matches!(refused(&plain, Hashing::Expect(other)), TarError::DiffId { expected, found } if expected == other && found == diff_id)
    );
    // What follows the end mark counts as well.
    let longer = [plain.clone(), vec![0; 512]].concat();
    assert!(matches!(refused(&longer, Hashing::Expect(diff_id)), TarError::DiffId { .. }));
    let packed = gzip(&plain);
    assert!(matches!(
        refused(&packed[..packed.len() - 9], Hashing::Skip),
        TarError::Malformed { .. } | TarError::Read(_)
    ));
    let damaged = |at: usize| {
        let mut bytes = packed.clone();
        bytes[at] ^= 0x55;
        convert(bytes.as_slice(), &tempfile::tempfile().unwrap(), &Limits::default(), Hashing::Expect(diff_id))
    };
    // Some bits of a deflate stream mean nothing; where one means something, it is noticed.
    let middle = packed.len() / 2;
    let noticed = |at| matches!(damaged(at), Err(TarError::Malformed { .. } | TarError::Read(_)));
    assert!((middle..middle + 16).any(noticed));
    let mut bad_sum = packed;
    let at = bad_sum.len() - 6;
    bad_sum[at] ^= 1;
    assert!(
        matches!(refused(&bad_sum, Hashing::Skip), TarError::Malformed { .. } | TarError::Read(_)),
        "gzip's own checksum"
    );
}

/// An archive written by hand, entry by entry.
#[derive(Default, Clone)]
struct Archive(Vec<u8>);

impl Archive {
    fn entry(mut self, kind: u8, name: &str, link: &str, data: &[u8]) -> Archive {
        let mut header = [0u8; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(100, b"0000644\0");
        put(124, format!("{:011o}\0", data.len()).as_bytes());
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        put(329, b"0000001\x000000003\0");
        put(148, b"        ");
        let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(header);
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str) -> Archive {
        self.entry(b'0', name, "", name.as_bytes())
    }

    fn pax(self, key: &str, value: &str) -> Archive {
        self.records(&[(key, value)])
    }

    fn records(self, records: &[(&str, &str)]) -> Archive {
        let record = |&(key, value): &(&str, &str)| {
            let body = key.len() + value.len() + 3;
            let len = (1..10).map(|digits| body + digits).find(|len| len.to_string().len() + body == *len).unwrap();
            format!("{len} {key}={value}\n")
        };
        self.entry(b'x', "pax", "", records.iter().map(record).collect::<String>().as_bytes())
    }

    fn convert_with(mut self, limits: &Limits, image: &Path) -> Result<Converted, TarError> {
        self.0.extend([0; 1024]);
        convert(self.0.as_slice(), &File::create(image).unwrap(), limits, Hashing::Skip)
    }

    fn refused(self) -> String {
        let workshop = tempfile::tempdir().unwrap();
        let error = self.convert_with(&Limits::default(), &workshop.path().join("image")).unwrap_err();
        let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
        format!("{error}{}", source.unwrap_or_default())
    }
}

fn names(root: &Path) -> Vec<String> {
    survey(root).keys().map(|p| p.to_str().unwrap().to_owned()).filter(|n| !n.is_empty()).collect()
}

/// C8-C10: the markers of OCI layers, wherever in the archive they stand, act on the layers below and are never seen.
#[test]
fn markers_become_whiteouts() {
    let workshop = workshop();
    let bottom = dir(workshop.path().join("bottom"));
    for name in ["kept", "gone", "folder/old", "folder/sub/file", "swept/old", "swept/sub/file", "replaced/old"] {
        dir(bottom.join(name).parent().unwrap());
        fs::write(bottom.join(name), "lower").unwrap();
    }
    let image = workshop.path().join("image");
    let archive = Archive::default()
        .file("swept/new")
        .file("./swept/.wh..wh..opq")
        .file(".wh.gone")
        .file("folder/.wh.old")
        .file("folder/.wh.sub/ignored")
        .file("folder/new")
        .file(".wh..wh.plnk/1.2")
        .file(".wh..wh.aufs")
        .file("replaced/new")
        .file(".wh.replaced")
        .file(".wh.kept")
        .file("kept");
    archive.convert_with(&Limits::default(), &image).unwrap();
    assert_sound(&image);
    let top = mount_erofs(&image, &workshop.path().join("top"));
    let merged = mount_overlay(&[&top, &bottom], &workshop.path().join("merged"));
    let expected = ["folder", "folder/new", "kept", "replaced", "replaced/new", "swept", "swept/new"];
    assert_eq!(names(&merged), expected);
    assert_eq!(fs::read(merged.join("kept")).unwrap(), b"kept");

    let opaque = Archive::default().file(".wh..wh..opq").file("only");
    assert!(opaque.convert_with(&Limits::default(), &image).unwrap().opaque);
}

/// C14: a later entry replaces an earlier one of its name, whatever they are; directories keep what is in them.
#[test]
fn later_entries_win() {
    let workshop = workshop();
    let image = workshop.path().join("image");
    Archive::default()
        .file("dir/child")
        .entry(b'5', "dir/", "", b"")
        .file("tree/a/b")
        .file("tree")
        .entry(b'2', "x", "tree", b"")
        .file("x")
        .file("old")
        .entry(b'1', "linked", "old", b"")
        .entry(b'0', "old", "", b"second")
        .convert_with(&Limits::default(), &image)
        .unwrap();
    assert_sound(&image);
    let root = mount_erofs(&image, &workshop.path().join("root"));
    assert_eq!(names(&root), ["dir", "dir/child", "linked", "old", "tree", "x"]);
    assert_eq!(fs::metadata(root.join("dir")).unwrap().mode() & 0o7777, 0o644, "as the entry says");
    assert_eq!(fs::read(root.join("linked")).unwrap(), b"old");
    assert_eq!(fs::read(root.join("old")).unwrap(), b"second");
    assert!(fs::symlink_metadata(root.join("x")).unwrap().is_file());
}

/// C11, C12: names can only be refused, they lead nowhere.
#[test]
fn hostile_names_are_refused() {
    let new = Archive::default;
    let table: [(Archive, &str); 18] = [
        (new().file("../escape"), "\"../escape\": it has a \"..\""),
        (new().file("a/../../b"), "it has a \"..\""),
        (new().file("/etc/passwd"), "it must not be absolute"),
        (new().pax("path", "a\0b").file("x"), "it has a NUL byte"),
        (new().pax("path", &"n".repeat(256)).file("x"), "longer than 255 bytes"),
        (new().pax("path", &"n/".repeat(3000)).file("x"), "longer than 4095 bytes"),
        (
            new().entry(b'2', "link", "/etc", b"").file("link/passwd"),
            "\"link/passwd\" lies below something that is no directory",
        ),
        (new().file("file").file("file/below"), "no directory"),
        (new().file("."), "is the root and no directory"),
        (new().entry(b'1', "link", "../../etc/shadow", b""), "it has a \"..\""),
        (new().entry(b'1', "link", "/etc/shadow", b""), "it must not be absolute"),
        (new().entry(b'1', "link", "missing", b""), "hard link to something that is not in the layer"),
        (new().entry(b'5', "dir", "", b"").entry(b'1', "link", "dir", b""), "hard link to a directory"),
        (new().file("dir/.wh."), "whiteout marker that names no file"),
        (new().file(".wh..."), "whiteout marker that names no file"),
        (new().entry(b'2', "link", "", b""), "symbolic link of impossible length"),
        (new().entry(b'M', "more", "", b""), "of a kind that a layer cannot hold"),
        (new().pax("SCHILY.xattr.trusted.overlay.metacopy", "").file("x"), "has its data in another layer"),
    ];
    for (archive, part) in table {
        let message = archive.refused();
        assert!(message.contains(part), "{message} lacks {part}");
    }
}

/// C12: links are data; an absolute or circular one is stored as it is.
#[test]
fn links_are_never_followed() {
    let workshop = workshop();
    let image = workshop.path().join("image");
    Archive::default()
        .entry(b'2', "self", "self", b"")
        .entry(b'2', "one", "two", b"")
        .entry(b'2', "two", "one", b"")
        .entry(b'2', "out", "/etc/passwd", b"")
        .entry(b'1', "again", "out", b"")
        .convert_with(&Limits::default(), &image)
        .unwrap();
    let file = File::open(&image).unwrap();
    let image = Image::open(&file).unwrap();
    let target = |name: &[u8]| image.link_target(&image.lookup(name).unwrap()).unwrap();
    assert_eq!(target(b"/self"), b"self");
    assert_eq!(target(b"/again"), b"/etc/passwd");
    assert_eq!(image.lookup(b"/again").unwrap().nid, image.lookup(b"/out").unwrap().nid);
}

#[test]
fn each_limit_has_its_error() {
    let workshop = tempfile::tempdir().unwrap();
    let image: PathBuf = workshop.path().join("image");
    let small = |change: fn(&mut Limits)| {
        let mut limits = Limits::default();
        change(&mut limits);
        limits
    };
    let archive = Archive::default().pax("path", "a/b/c").entry(b'0', "x", "", &[1; 5000]).file("second");
    let table = [
        (small(|l| l.entries = 1), "more than 1 entries"),
        (small(|l| l.bytes = 5000), "more than 5000 bytes"),
        (small(|l| l.depth = 2), "more than 2 directories"),
        (small(|l| l.path = 4), "\"a/b/c\""),
        (small(|l| l.file = 4999), "more than 4999 bytes in one file"),
        (small(|l| l.header = 10), "more than 10 bytes in one extension header"),
    ];
    for (limits, part) in table {
        let message = archive.clone().convert_with(&limits, &image).unwrap_err().to_string();
        assert!(message.contains(part), "{message} lacks {part}");
    }
    let sparse = Archive::default().pax("GNU.sparse.map", "1,1,3,1,5,1").file("x");
    assert!(sparse.convert_with(&small(|l| l.pieces = 2), &image).unwrap_err().to_string().contains("pieces"));
    let xattr = Archive::default().pax("SCHILY.xattr.user.large", &"v".repeat(2000)).file("x");
    let limits = small(|l| l.xattrs = 100);
    assert!(xattr.convert_with(&limits, &image).unwrap_err().to_string().contains("extended attributes"));
}

/// Damage anywhere: an error or some image that our reader accepts, never a panic or a hang.
#[test]
fn damaged_archives_never_panic() {
    let workshop = tempfile::tempdir().unwrap();
    let image = workshop.path().join("image");
    let good = Archive::default()
        .pax("SCHILY.xattr.user.a", "value")
        .file("a/b")
        .entry(b'L', "././@LongLink", "", &[b'n'; 200])
        .file("n")
        .records(&[("GNU.sparse.map", "0,3,4096,2"), ("GNU.sparse.size", "5000")])
        .entry(b'0', "s", "", b"12345")
        .entry(b'2', "l", "a", b"")
        .entry(b'1', "h", "a/b", b"")
        .entry(b'3', "dev", "", b"")
        .file(".wh.gone");
    let mut good = good.0;
    good.extend([0; 1024]);
    let limits = Limits { bytes: 1 << 20, file: 1 << 20, ..Limits::default() };
    let mut dice = Dice(99);
    let mut accepted = 0;
    for round in 0..3000 {
        let mut bytes = good.clone();
        for _ in 0..1 + dice.roll(4) {
            let at = dice.roll(bytes.len());
            bytes[at] = [b'0', b'7', 0xff, 0x80, 0, b'9', b'\n', b' '][dice.roll(8)];
        }
        if round % 7 == 0 {
            bytes.truncate(dice.roll(bytes.len()));
        }
        repair_checksums(&mut bytes);
        if convert(bytes.as_slice(), &File::create(&image).unwrap(), &limits, Hashing::Compute).is_ok() {
            accepted += 1;
            let file = File::open(&image).unwrap();
            Image::open(&file).unwrap().check().unwrap();
        }
    }
    assert!(accepted > 100, "some damage is in the data only: {accepted}");
}

/// Makes every block that looks like a header one again.
fn repair_checksums(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}
