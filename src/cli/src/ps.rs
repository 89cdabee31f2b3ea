//! `nacelle ps`: the sandboxes of this node, from the status files of their shims.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context;
use nacelle_protocol::{
    features::{self, Feature},
    status::{STATUS_FILE, Status},
};

use crate::units;

/// Prints every sandbox below `run_dir`; always `true`, since none is not an error.
pub fn run(run_dir: &Path, long: bool, json: bool, out: &mut impl io::Write) -> anyhow::Result<bool> {
    let sandboxes = read_all(run_dir)?;
    if json {
        serde_json::to_writer_pretty(&mut *out, &sandboxes)?;
        writeln!(out)?;
        return Ok(true);
    }
    writeln!(
        out,
        "{:<12} {:<24} {:>8} {:>5} {:>10} {:>7} {:<20} START",
        "NAMESPACE", "SANDBOX", "VMM", "VCPUS", "MEMORY", "LAYERS", "GUEST KERNEL"
    )?;
    for s in &sandboxes {
        let start = s.phases.iter().map(|p| p.at_us + p.took_us).max().unwrap_or_default();
        writeln!(
            out,
            "{:<12} {:<24} {:>8} {:>5} {:>10} {:>7} {:<20} {}",
            s.namespace,
            s.sandbox,
            s.vmm_pid,
            s.vcpus,
            units::bytes(u64::from(s.memory_mib) << 20),
            s.layers.len(),
            s.guest_kernel,
            units::millis(start),
        )?;
        if long {
            details(s, out)?;
        }
    }
    Ok(true)
}

fn details(s: &Status, out: &mut impl io::Write) -> io::Result<()> {
    for phase in &s.phases {
        writeln!(
            out,
            "  phase {:<20} at {:>12}  took {:>12}",
            phase.name,
            units::millis(phase.at_us),
            units::millis(phase.took_us)
        )?;
    }
    for layer in &s.layers {
        let key: String = layer.key.chars().take(16).collect();
        writeln!(out, "  layer {:<20} {:>12}  {}", key, units::bytes(layer.size), layer.outcome)?;
    }
    // A sandbox of an older shim says nothing.
    if !s.kernel_features.is_empty() {
        let has = |feature: &&Feature| s.kernel_features.iter().any(|name| name == feature.name);
        let (has, lacks): (Vec<&Feature>, Vec<&Feature>) = features::ALL.iter().partition(has);
        let names = |list: &[&Feature]| list.iter().map(|feature| feature.name).collect::<Vec<_>>().join(", ");
        writeln!(out, "  kernel has {}", names(&has))?;
        for feature in lacks {
            writeln!(out, "  kernel lacks {}: {}", feature.name, feature.gives)?;
        }
    }
    for reason in &s.degraded {
        writeln!(out, "  degraded: {reason}")?;
    }
    for what in &s.damage {
        writeln!(out, "  damaged: {what}")?;
    }
    Ok(())
}

/// Every readable status file. A sandbox that ends while we look is not an error.
pub fn read_all(run_dir: &Path) -> anyhow::Result<Vec<Status>> {
    let mut found = Vec::new();
    for namespace in directories(run_dir)? {
        for sandbox in directories(&namespace)? {
            let path = sandbox.join(STATUS_FILE);
            match fs::read(&path) {
                Ok(bytes) => found
                    .push(serde_json::from_slice(&bytes).with_context(|| format!("read status {}", path.display()))?),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).with_context(|| format!("read status {}", path.display())),
            }
        }
    }
    Ok(found)
}

fn directories(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("list {}", dir.display())),
    };
    let mut found: Vec<PathBuf> = entries.filter_map(Result::ok).map(|e| e.path()).filter(|p| p.is_dir()).collect();
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nacelle_protocol::status::{LayerUse, Phase};

    #[test]
    fn lists_what_the_shims_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let status = Status {
            namespace: "default".into(),
            sandbox: "c1".into(),
            memory_mib: 512,
            guest_kernel: "6.12.91".into(),
            kernel_features: vec!["swap".into()],
            damage: vec!["layer image ab.erofs".into()],
            phases: vec![Phase { name: "boot".into(), at_us: 1000, took_us: 2000 }],
            layers: vec![LayerUse {
                container: "c1".into(),
                key: "ab".repeat(32),
                size: 4096,
                outcome: "reused".into(),
            }],
            ..Status::default()
        };
        let sandbox = dir.path().join("default/c1");
        fs::create_dir_all(&sandbox).unwrap();
        fs::create_dir_all(dir.path().join("default/ending")).unwrap();
        fs::write(sandbox.join(STATUS_FILE), serde_json::to_vec(&status).unwrap()).unwrap();
        let mut out = Vec::new();
        run(dir.path(), true, false, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("c1") && text.contains("512.0 MiB") && text.contains("3.0 ms"), "{text}");
        assert!(text.contains("reused") && text.contains("boot"), "{text}");
        assert!(text.contains("damaged: layer image ab.erofs\n"), "{text}");
        assert!(text.contains("kernel has swap\n") && text.contains("kernel lacks quota: "), "{text}");
    }

    #[test]
    fn no_run_directory_is_no_sandbox() {
        let mut out = Vec::new();
        run(Path::new("/nonexistent"), false, true, &mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap().trim(), "[]");
    }
}
