//! A list of patches of unknown origin: errors are fine; what is decoded keeps the rules for paths, and can be applied or is refused.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use nacelle_rootfs::Limits;
use nacelle_rootfs::patch::{Sources, build, decode};

fuzz_target!(|data: &[u8]| {
    let limits = Limits { patches: 100, ..Limits::default() };
    let Ok(list) = decode(data, &limits) else { return };
    assert!(list.len() <= limits.patches);
    for patch in &list {
        let path = patch.path().to_string();
        assert!(path.starts_with('/') && path.len() > 1, "{path:?}");
        assert!(!path.split('/').any(|name| name == ".."), "{path:?}");
    }
    let output = Path::new("/dev/shm/nacelle-fuzz-patch");
    // Nothing of the host may be copied, and there is no layer below.
    let built = build(&list, &[], &Sources::below([]), &limits, output);
    assert!(!list.is_empty() || matches!(built, Ok(None)));
});
