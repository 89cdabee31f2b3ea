//! Mounts of unknown origin: errors are fine; what is planned consists of absolute paths that the mounts named.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacelle_rootfs::plan::{Lower, Mount, plan};

fuzz_target!(|data: &str| {
    // A mount a line: type, source, target and options, apart by tabs.
    let mounts: Vec<Mount> = data
        .lines()
        .map(|line| {
            let mut fields = line.split('\t').map(str::to_owned);
            let mut next = || fields.next().unwrap_or_default();
            Mount { kind: next(), source: next(), target: next(), options: fields.collect() }
        })
        .collect();
    let Ok(planned) = plan(&mounts) else { return };
    assert!(!planned.lowers.is_empty());
    for lower in &planned.lowers {
        assert!(lower.source().is_absolute(), "{lower:?}");
        if let Lower::Image(_, devices) = lower {
            assert!(devices.iter().all(|device| device.is_absolute()), "{lower:?}");
        }
    }
});
