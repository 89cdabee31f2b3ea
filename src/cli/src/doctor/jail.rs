//! What the jail needs of a node, and what could make it stronger.

use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::{fs, io};

use nacelle_protocol::install::LIBEXEC;
use nacelle_protocol::vm::Report;

use super::{Check, Verdict, find};

/// Ids of all pods, where the configuration does not say otherwise.
const IDS: Range<u64> = 1_879_048_192..4_294_901_760;
/// Controllers that the shim sets limits of.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Where volumes come from, and what pods are made of; those that exist are tried.
const PLACES: [&str; 5] = ["/var/lib", "/var/lib/nacelle", "/var/lib/kubelet", "/run", "/mnt"];

/// The hierarchy, and whether it has what limits a VMM. `controllers` is what its root lists.
pub fn cgroups(controllers: io::Result<String>) -> Check {
    const NAME: &str = "cgroups";
    let Ok(list) = controllers else {
        let found = "no cgroup version 2 at /sys/fs/cgroup";
        return Check::new(NAME, Verdict::Fail, found, "boot with systemd.unified_cgroup_hierarchy=1");
    };
    let missing: Vec<_> = CONTROLLERS.into_iter().filter(|name| !list.split_whitespace().any(|w| w == *name)).collect();
    if missing.is_empty() {
        return Check::ok(NAME, format!("version 2 at /sys/fs/cgroup, with {}", CONTROLLERS.join(", ")));
    }
    let found = format!("version 2 at /sys/fs/cgroup, without {}", missing.join(", "));
    Check::new(
        NAME,
        Verdict::Fail,
        found,
        "take cgroup_disable= and cgroup v1 mounts of these controllers off the host",
    )
}

/// `limit` is the kernel's largest number of user namespaces.
pub fn user_namespaces(limit: Option<&str>) -> Check {
    const NAME: &str = "user namespaces";
    match limit.and_then(|text| text.trim().parse::<u64>().ok()) {
        Some(0) => Check::new(
            NAME,
            Verdict::Fail,
            "the kernel allows none: user.max_user_namespaces = 0",
            "set it to as many pods as the node shall run, and some more: sysctl user.max_user_namespaces=10000",
        ),
        Some(limit) => Check::ok(NAME, format!("up to {limit}, one a sandbox")),
        None => Check::new(
            NAME,
            Verdict::Fail,
            "the kernel has none: no /proc/sys/user/max_user_namespaces",
            "use a kernel with CONFIG_USER_NS",
        ),
    }
}

/// `subuid` is what the host has given away of its ids: lines of `name:first:count`.
pub fn ids(subuid: &str) -> Check {
    const NAME: &str = "ids";
    let taken = |line: &&str| {
        let mut fields = line.split(':').skip(1).map(|field| field.trim().parse::<u64>().unwrap_or_default());
        let (first, count) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        first < IDS.end && first.saturating_add(count) > IDS.start
    };
    match subuid.lines().find(taken) {
        None => Check::ok(NAME, format!("from {} on nobody else has any in /etc/subuid", IDS.start)),
        Some(line) => Check::new(
            NAME,
            Verdict::Warn,
            format!("/etc/subuid gives ids of the pods to somebody else: {line}"),
            "set jail.uid_base in nacelle's configuration to a range of its own",
        ),
    }
}

/// `enabled` is the module's parameter, `profiles` what securityfs lists.
pub fn apparmor(enabled: Option<&str>, profiles: Option<&str>) -> Check {
    const NAME: &str = "apparmor";
    if enabled.map(str::trim) != Some("Y") {
        return Check::ok(NAME, "off on this host, so there is nothing to load");
    }
    match profiles {
        Some(list) if list.lines().any(|line| line.starts_with("nacelle-vmm ")) => {
            Check::ok(NAME, "profile nacelle-vmm is loaded")
        }
        _ => Check::new(
            NAME,
            Verdict::Warn,
            "on, and the profile nacelle-vmm is not loaded: the jail stands without it",
            "copy deploy/apparmor/nacelle-vmm to /etc/apparmor.d, and run apparmor_parser --replace on it",
        ),
    }
}

/// Tries to map ids on the file systems in use, with the VMM's program, which can do that.
pub fn idmapped_mounts() -> Check {
    const NAME: &str = "idmapped mounts";
    let Ok(program) = find(&format!("{LIBEXEC}/nacelle-vmm"), Path::exists) else {
        return Check::new(NAME, Verdict::Warn, "not tried: there is no nacelle-vmm", "install it");
    };
    let places: Vec<_> = PLACES.into_iter().filter(|place| Path::new(place).is_dir()).collect();
    let output = Command::new(&program).arg("idmap").args(&places).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => judge(&places, &output.stdout),
        Ok(output) => {
            let reason = format!("{} idmap: {}", program.display(), String::from_utf8_lossy(&output.stdout).trim());
            Check::new(NAME, Verdict::Warn, reason, "run it as root")
        }
        Err(e) => Check::new(NAME, Verdict::Warn, format!("run {}: {e}", program.display()), "install it again"),
    }
}

/// `reports` is what the program has said, one line for each place that cannot.
fn judge(places: &[&str], reports: &[u8]) -> Check {
    const NAME: &str = "idmapped mounts";
    let said = reports.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
    let cannot: Vec<String> = said
        .filter_map(|report| match report {
            Report::Degraded { message, .. } | Report::Failed { message, .. } => Some(message),
            Report::Started { .. } => None,
        })
        .collect();
    if cannot.is_empty() {
        return Check::ok(NAME, format!("work on {}", places.join(", ")));
    }
    Check::new(
        NAME,
        Verdict::Warn,
        cannot.join("; "),
        "volumes there have odd owners in the guest (jail.idmap = \"best-effort\") or are refused (\"require\"); use another file system for them",
    )
}

/// What the host has given away of its ids; nothing where it has no such file.
pub fn subuid() -> String {
    fs::read_to_string("/etc/subuid").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_need_their_controllers() {
        assert_eq!(cgroups(Ok("cpuset cpu io memory pids\n".into())).verdict, Verdict::Ok);
        let check = cgroups(Ok("cpu io\n".into()));
        assert!(check.verdict == Verdict::Fail && check.found.ends_with("without memory, pids"), "{check:?}");
        assert_eq!(cgroups(Err(io::ErrorKind::NotFound.into())).verdict, Verdict::Fail);
    }

    #[test]
    fn user_namespaces_have_a_limit() {
        assert_eq!(user_namespaces(Some("63432\n")).verdict, Verdict::Ok);
        assert_eq!(user_namespaces(Some("0\n")).verdict, Verdict::Fail);
        assert_eq!(user_namespaces(None).verdict, Verdict::Fail);
    }

    #[test]
    fn ids_are_nobody_elses() {
        assert_eq!(ids("user:100000:65536\nkubelet:65536:7208960\n").verdict, Verdict::Ok);
        assert_eq!(ids("").verdict, Verdict::Ok);
        let check = ids("user:100000:65536\ncontainers:1879000000:65536000\n");
        assert!(check.verdict == Verdict::Warn && check.found.contains("containers"), "{check:?}");
        assert_eq!(ids("nonsense\na:b:c\n").verdict, Verdict::Ok);
    }

    #[test]
    fn the_profile_is_looked_for_where_it_matters() {
        assert_eq!(apparmor(None, None).verdict, Verdict::Ok);
        assert_eq!(apparmor(Some("N\n"), None).verdict, Verdict::Ok);
        assert_eq!(apparmor(Some("Y\n"), Some("nacelle-vmm (enforce)\nother (complain)\n")).verdict, Verdict::Ok);
        let check = apparmor(Some("Y\n"), Some("other (complain)\n"));
        assert!(check.verdict == Verdict::Warn && check.remedy.contains("apparmor_parser"));
    }

    #[test]
    fn file_systems_that_cannot_map_are_named() {
        assert_eq!(judge(&["/a"], b"").verdict, Verdict::Ok);
        let line = br#"{"report":"degraded","stage":"map ids","message":"map ids of /mnt: its file system cannot"}"#;
        let check = judge(&["/a", "/mnt"], line);
        assert!(check.verdict == Verdict::Warn && check.found.contains("/mnt"), "{check:?}");
    }
}
