//! A tar archive of unknown origin: what is accepted gives a sound image, the same one each time.
#![no_main]

use std::fs::File;
use std::io::Read;

use libfuzzer_sys::fuzz_target;
use nacelle_rootfs::Limits;
use nacelle_rootfs::erofs::reader::Image;
use nacelle_rootfs::tar::{Hashing, convert};

fn image() -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open("/dev/shm/nacelle-fuzz-tar")
        .expect("open image")
}

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    // Past the checksums of headers, which nobody guesses.
    for block in bytes.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    let limits = Limits { bytes: 1 << 20, file: 1 << 20, entries: 1000, ..Limits::default() };
    let mut once = image();
    let Ok(converted) = convert(bytes.as_slice(), &once, &limits, Hashing::Skip) else { return };
    let totals = Image::open(&once).expect("open what was written").check().expect("check what was written");
    assert_eq!(totals.inodes, converted.written.inodes);
    let read = |file: &mut File| {
        let mut bytes = Vec::new();
        std::io::Seek::rewind(file).and_then(|()| file.read_to_end(&mut bytes)).expect("read what was written");
        bytes
    };
    let first = read(&mut once);
    let mut again = image();
    let second = convert(bytes.as_slice(), &again, &limits, Hashing::Compute).expect("convert again");
    assert_eq!(converted.written, second.written);
    assert!(first == read(&mut again), "the same archive gives another image");
});
