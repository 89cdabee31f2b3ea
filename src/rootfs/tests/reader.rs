//! The checking reader: what the writer wrote comes back, and whatever else it is given it neither panics nor loops.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::collections::BTreeMap;

use common::Dice;
use nacelle_rootfs::erofs::reader::{Image, Inode as Read, ReadError};
use nacelle_rootfs::erofs::writer::Plan;
use nacelle_rootfs::tree::{Data, Entry, Inode, Node, Time, Tree, Xattr};

/// A random tree in memory with every kind of inode.
fn random_tree(dice: &mut Dice, inodes: usize) -> Tree {
    let mut tree = Tree { inodes: vec![random_inode(dice, Node::Directory(Vec::new()))] };
    let mut names: Vec<BTreeMap<Box<[u8]>, usize>> = vec![BTreeMap::new()];
    let mut directories = vec![0];
    for id in 1..inodes {
        let node = match dice.roll(10) {
            0..=2 => Node::Directory(Vec::new()),
            3..=6 => {
                let bytes: Box<[u8]> = (0..dice.roll(9000)).map(|i| (i * id) as u8).collect();
                Node::File { size: bytes.len() as u64, data: Data::Bytes(bytes) }
            }
            7 => Node::Symlink(vec![b'l'; 1 + dice.roll(4095)].into()),
            8 => Node::CharDevice { major: dice.roll(4096) as u32, minor: dice.roll(1 << 20) as u32 },
            _ => Node::Fifo,
        };
        let inode = random_inode(dice, node);
        names.push(BTreeMap::new());
        let links = if matches!(inode.node, Node::Directory(_)) { 1 } else { 1 + dice.roll(3) };
        for _ in 0..links {
            let parent = directories[dice.roll(directories.len())];
            let name: Box<[u8]> = (0..1 + dice.roll(80)).map(|_| b'a' + dice.roll(26) as u8).collect();
            names[parent].insert(name, id);
        }
        if matches!(inode.node, Node::Directory(_)) {
            directories.push(id);
        }
        tree.inodes.push(inode);
    }
    for (id, names) in names.into_iter().enumerate() {
        if let Node::Directory(entries) = &mut tree.inodes[id].node {
            *entries = names.into_iter().map(|(name, inode)| Entry { name, inode }).collect();
        }
    }
    tree
}

fn random_inode(dice: &mut Dice, node: Node) -> Inode {
    let time =
        |dice: &mut Dice| Time { sec: dice.roll(1 << 32) as i64 - (1 << 31), nsec: dice.roll(1_000_000_000) as u32 };
    let xattr = |dice: &mut Dice, i| Xattr {
        name: format!("{}.{i}", ["user", "trusted", "security"][i % 3]).into_bytes().into(),
        value: vec![7; dice.roll(300)].into(),
    };
    let mut xattrs: Vec<_> = (0..dice.roll(4)).map(|i| xattr(dice, i)).collect();
    xattrs.sort();
    Inode {
        permissions: dice.roll(0o10000) as u16,
        uid: dice.roll(1 << 17) as u32,
        gid: dice.roll(1 << 17) as u32,
        mtime: if dice.roll(2) == 0 { Time::default() } else { time(dice) },
        xattrs,
        node,
    }
}

/// A tree whose random names collided may have lost some inodes; only what can be reached counts.
fn compare(image: &Image<[u8]>, tree: &Tree) {
    let mut pending = vec![(image.root().unwrap(), 0)];
    while let Some((read, id)) = pending.pop() {
        let inode = &tree.inodes[id];
        assert_eq!((read.mode & 0o7777, read.uid, read.gid), (inode.permissions, inode.uid, inode.gid));
        assert_eq!(read.mtime, inode.mtime);
        assert_eq!(image.xattrs(&read).unwrap(), inode.xattrs);
        match &inode.node {
            Node::Directory(entries) => {
                let found: Vec<_> = image.entries(&read).unwrap();
                let found: Vec<_> = found.iter().filter(|e| e.name != b"." && e.name != b"..").collect();
                assert!(found.iter().map(|e| &e.name[..]).eq(entries.iter().map(|e| &*e.name)));
                let children = found.iter().zip(entries).map(|(f, e)| (image.inode(f.nid).unwrap(), e.inode));
                pending.extend(children);
            }
            Node::File { size, data: Data::Bytes(bytes) } => {
                assert_eq!(read.size, *size);
                let mut content = vec![0; bytes.len() + 1];
                assert_eq!(image.read(&read, 0, &mut content).unwrap(), bytes.len());
                assert!(content[..bytes.len()] == bytes[..]);
            }
            Node::Symlink(target) => assert_eq!(image.link_target(&read).unwrap(), &**target),
            &Node::CharDevice { major, minor } => assert_eq!(read.device, (major, minor)),
            _ => {}
        }
    }
}

fn write(tree: &Tree) -> Vec<u8> {
    let mut bytes = Vec::new();
    let plan = Plan::new(tree).unwrap();
    let written = plan.write(&mut bytes).unwrap();
    assert_eq!((plan.size(), written.size), (bytes.len() as u64, bytes.len() as u64));
    bytes
}

#[test]
fn random_trees_come_back() {
    for seed in 1..60 {
        let mut dice = Dice(seed * 0x9E37_79B9);
        let inodes = 1 + dice.roll(200);
        let tree = random_tree(&mut dice, inodes);
        let bytes = write(&tree);
        let image = Image::open(bytes.as_slice()).unwrap();
        let totals = image.check().unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert_eq!(totals.inodes, image.super_block().inodes);
        compare(&image, &tree);
        assert_eq!(bytes, write(&tree));
    }
}

/// Uses everything that an image offers and ignores the errors.
fn use_all(image: &Image<[u8]>) {
    let _ = image.check();
    let mut pending: Vec<(Read, u32)> = image.root().into_iter().map(|root| (root, 0)).collect();
    let mut budget = 3000;
    let mut buffer = [0; 5000];
    while let Some((inode, depth)) = pending.pop() {
        let _ = image.xattrs(&inode);
        let _ = image.link_target(&inode);
        for offset in [0, 4095, inode.size / 2, inode.size.saturating_sub(1), u64::MAX] {
            let _ = image.read(&inode, offset, &mut buffer);
        }
        for entry in image.entries(&inode).unwrap_or_default() {
            budget -= 1;
            if depth < 20 && budget > 0 {
                pending.extend(image.inode(entry.nid).into_iter().map(|child| (child, depth + 1)));
            }
        }
    }
    let _ = image.lookup(b"/a/b/c");
}

/// Flipped bytes anywhere: errors are fine, panics and endless loops are bugs.
#[test]
fn damaged_images_never_panic() {
    let mut dice = Dice(4711);
    let tree = random_tree(&mut dice, 60);
    let good = write(&tree);
    for round in 0..1500 {
        let mut bytes = good.clone();
        for _ in 0..1 + dice.roll(8) {
            // Mostly in the metadata, where it hurts.
            let limit = if dice.roll(4) == 0 { bytes.len() } else { 24_000.min(bytes.len()) };
            let at = dice.roll(limit);
            bytes[at] = match dice.roll(3) {
                0 => 0xff,
                1 => bytes[at] ^ (1 << dice.roll(8)),
                _ => dice.roll(256) as u8,
            };
        }
        if round % 5 == 0 {
            bytes.truncate(dice.roll(bytes.len()));
        }
        repair_checksum(&mut bytes);
        if let Ok(image) = Image::open(bytes.as_slice()) {
            use_all(&image);
        }
    }
}

fn repair_checksum(bytes: &mut [u8]) {
    if bytes.len() >= 4096 {
        bytes[1028..1032].fill(0);
        let sum = nacelle_rootfs::erofs::format::super_checksum(&bytes[1024..4096]);
        bytes[1028..1032].copy_from_slice(&sum.to_le_bytes());
    }
}

#[test]
fn what_is_no_image_is_refused() {
    let open = |bytes: &[u8]| Image::open(bytes).map(drop);
    assert!(matches!(open(b""), Err(ReadError::NotErofs)));
    assert!(matches!(open(&[0; 8192]), Err(ReadError::NotErofs)));
    let good = write(&random_tree(&mut Dice(1), 20));
    let mut bad = good.clone();
    bad[1100] ^= 1;
    assert!(matches!(open(&bad), Err(ReadError::Checksum)));
    assert!(matches!(open(&good[..good.len() - 1]), Err(ReadError::Corrupt { .. })));
    let mut compressed = good.clone();
    compressed[1024 + 80] |= 1;
    repair_checksum(&mut compressed);
    assert!(matches!(open(&compressed), Err(ReadError::Unsupported(_))));
}

#[test]
fn paths_are_looked_up_without_following_links() {
    let leaf = |node| Inode { node, ..Inode::whiteout() };
    let entry = |name: &[u8], inode| Entry { name: name.into(), inode };
    let tree = Tree {
        inodes: vec![
            leaf(Node::Directory(vec![entry(b"dir", 1), entry(b"link", 3)])),
            leaf(Node::Directory(vec![entry(b"file", 2)])),
            leaf(Node::File { size: 2, data: Data::Bytes((*b"hi").into()) }),
            leaf(Node::Symlink((*b"dir").into())),
        ],
    };
    let bytes = write(&tree);
    let image = Image::open(bytes.as_slice()).unwrap();
    assert_eq!(image.lookup(b"/dir//file").unwrap().size, 2);
    assert!(image.lookup(b"/").unwrap().is_directory());
    assert!(matches!(image.lookup(b"/dir/none"), Err(ReadError::NotFound(_))));
    assert!(image.lookup(b"/link/file").is_err());
}
