//! A machine of unknown origin, and in a second line its network devices: what is planned keeps to what libkrun can do.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacelle_protocol::vm::{MAX_DEVICES, Nics, Report, VmConfig};
use nacelle_vmm::plan::Plan;

fuzz_target!(|data: &[u8]| {
    let _ = serde_json::from_slice::<Report>(data);
    let (config, nics) = data.split_at(data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len()));
    let Ok(config) = serde_json::from_slice::<VmConfig>(config) else { return };
    let Ok(mut plan) = Plan::new(&config) else { return };
    assert!(config.vcpus > 0);
    assert!(config.shares.len() + config.disks.len() < MAX_DEVICES);
    if let Ok(nics) = serde_json::from_slice::<Nics>(nics) {
        let _ = plan.connect(nics);
    }
});
