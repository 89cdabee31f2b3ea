//! A disk image of unknown origin: what it is said to refer to are paths of files, and a disk of few.
#![no_main]

use std::fs;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use nacelle_rootfs::disk::{Format, references};

/// In memory, and of one process at a time.
const IMAGE: &str = "/dev/shm/nacelle-fuzz-disk/image";

fuzz_target!(|data: &[u8]| {
    let path = Path::new(IMAGE);
    fs::create_dir_all(path.parent().expect("parent")).expect("make a directory");
    fs::write(path, data).expect("write the image");
    for format in Format::ALL {
        let Ok(found) = references(path, format) else { continue };
        assert!(format != Format::Raw || found.is_empty(), "a raw image refers to {found:?}");
        for reference in found {
            assert!(reference.path.is_absolute() && !reference.name.is_empty(), "{reference:?}");
            assert!(!reference.name.contains('\0') && reference.format != Format::Vmdk, "{reference:?}");
            assert!(reference.is_absolute() == reference.name.starts_with('/'), "{reference:?}");
        }
    }
});
