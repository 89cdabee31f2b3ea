//! A `config.json` of unknown origin, all the way to what the guest is told: errors are fine.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use nacelle_protocol::ids::{ContainerId, SandboxId};
use nacelle_shim::annotations::Policy;
use nacelle_shim::bundle::Bundle;
use nacelle_shim::spec::{resources, translate};

fuzz_target!(|data: &[u8]| {
    let Ok(bundle) = Bundle::parse(Path::new("/bundle"), data) else { return };
    let _ = (bundle.hooks(), bundle.sysctls(), bundle.cgroups_path());
    let _ = Policy::default().read(bundle.annotations());
    let id = ContainerId::new("container").expect("a good name");
    let pod = SandboxId::new("pod").expect("a good name");
    for pod in [None, Some(&pod)] {
        let _ = translate(&bundle.spec, &id, pod);
    }
    if let Some(limits) = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) {
        let _ = resources(limits, &mut Vec::new());
    }
});
