//! An EROFS image of unknown origin: errors are fine, panics, endless loops and much memory are bugs. What checks out can be used.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacelle_rootfs::erofs::format::super_checksum;
use nacelle_rootfs::erofs::reader::Image;

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    // Past the checksum, which nobody guesses.
    if bytes.len() >= 4096 {
        bytes[1024..1028].copy_from_slice(&0xe0f5_e1e2u32.to_le_bytes());
        bytes[1028..1032].fill(0);
        let sum = super_checksum(&bytes[1024..4096]);
        bytes[1028..1032].copy_from_slice(&sum.to_le_bytes());
    }
    let Ok(image) = Image::open(bytes.as_slice()) else { return };
    let sound = image.check().is_ok();
    let mut pending: Vec<_> = image.root().into_iter().map(|root| (root, 0)).collect();
    let mut budget = 300;
    let mut buffer = [0; 5000];
    while let Some((inode, depth)) = pending.pop() {
        let results = [
            image.xattrs(&inode).is_ok(),
            inode.mode & 0o170_000 != 0o120_000 || image.link_target(&inode).is_ok(),
            image.read(&inode, 0, &mut buffer).is_ok(),
            image.read(&inode, inode.size / 2, &mut buffer).is_ok(),
        ];
        let _ = image.read(&inode, u64::MAX, &mut buffer);
        assert!(!sound || results == [true; 4], "an image that checks out cannot be read: {results:?}");
        for entry in image.entries(&inode).unwrap_or_default() {
            budget -= 1;
            if depth < 20 && budget > 0 {
                pending.extend(image.inode(entry.nid).into_iter().map(|child| (child, depth + 1)));
            }
        }
    }
    let _ = image.lookup(b"/a/b/c");
});
