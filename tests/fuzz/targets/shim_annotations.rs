//! Annotations of unknown origin, one a line as name, tab and value: what is wished for is in bounds and was allowed.
#![no_main]

use std::collections::HashMap;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use nacelle_rootfs::Limits;
use nacelle_rootfs::patch::decode;
use nacelle_shim::annotations::{KNOWN, Policy};

fuzz_target!(|data: &str| {
    let annotations: HashMap<String, String> = data
        .lines()
        .map(|line| line.split_once('\t').unwrap_or((line, "")))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let all = Policy { allow: KNOWN.map(str::to_owned).to_vec(), host_paths: vec![PathBuf::from("/usr/lib")] };
    let none = Policy { allow: Vec::new(), host_paths: Vec::new() };
    let ours = annotations.keys().any(|name| name.starts_with("io.nacelle."));
    assert_eq!(none.read(&annotations).is_err(), ours);
    let wishes = match all.read(&annotations) {
        Ok(wishes) => wishes,
        Err(e) => return assert!(e.to_string().len() < 4096),
    };
    assert!(wishes.vcpus != Some(0));
    assert!(wishes.memory_mib.is_none_or(|mib| (128..=1 << 20).contains(&mib)));
    assert!(wishes.upper_mib.is_none_or(|mib| (64..=1 << 24).contains(&mib)));
    assert!(wishes.kernel.is_none_or(|path| path.starts_with(std::fs::canonicalize("/usr/lib").expect("it is there"))));
    if let Some(patches) = wishes.patches {
        let _ = decode(patches.as_bytes(), &Limits::default());
    }
});
