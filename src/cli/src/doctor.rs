//! `nacelle doctor`: can this node run nacelle? Each check says what it found and, if it failed, what to do.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

mod jail;

use nacelle_protocol::{
    install::{self, HOST_NETWORK_KERNEL, KERNEL, LIBEXEC},
    processor,
};
use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use crate::kernel::Kernel;

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Works, but something is weaker than it could be.
    Warn,
    /// nacelle cannot start a VM here.
    Fail,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do; empty where nothing is to be done.
    remedy: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), remedy: String::new() }
    }

    fn new(name: &'static str, verdict: Verdict, found: impl Into<String>, remedy: &str) -> Self {
        Self { name, verdict, found: found.into(), remedy: remedy.to_owned() }
    }
}

/// The first of the places that is there, or all that were tried, for people.
fn find(below: &str, there: impl Fn(&Path) -> bool) -> Result<PathBuf, String> {
    // It lies beside the shim.
    let places = install::places(&std::env::current_exe().unwrap_or_default(), below);
    let tried = places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ");
    places.into_iter().find(|place| there(place)).ok_or(tried)
}

/// Runs every check and prints the result; `false` when a check failed.
pub fn run(json: bool, out: &mut impl io::Write) -> anyhow::Result<bool> {
    let checks = [
        kvm(),
        cpu(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        kernel(&rustix::system::uname().release().to_string_lossy()),
        landlock(fs::read_to_string("/sys/kernel/security/lsm").ok().as_deref()),
        jail::cgroups(fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")),
        jail::user_namespaces(fs::read_to_string("/proc/sys/user/max_user_namespaces").ok().as_deref()),
        jail::ids(&jail::subuid()),
        jail::idmapped_mounts(),
        jail::apparmor(
            fs::read_to_string("/sys/module/apparmor/parameters/enabled").ok().as_deref(),
            fs::read_to_string("/sys/kernel/security/apparmor/profiles").ok().as_deref(),
        ),
        guest_kernel(),
        host_network_kernel(),
        helpers(),
        containerd(),
        fuse(),
    ];
    if json {
        serde_json::to_writer_pretty(&mut *out, &checks)?;
        writeln!(out)?;
    } else {
        for c in &checks {
            let mark = match c.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            writeln!(out, "{mark}  {:<16} {}", c.name, c.found)?;
            if !c.remedy.is_empty() {
                writeln!(out, "      {:<16} → {}", "", c.remedy)?;
            }
        }
    }
    Ok(!checks.iter().any(|c| c.verdict == Verdict::Fail))
}

/// A device of the host's that the shim or the VMM opens. `without` is how bad it is without it, and `then` what does not work.
fn device(name: &'static str, path: &str, without: Verdict, then: &str, remedy: &str) -> Check {
    match rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => Check::ok(name, format!("{path} opens for reading and writing")),
        Err(e) => Check::new(name, without, format!("open {path}: {e}{then}"), remedy),
    }
}

fn kvm() -> Check {
    let remedy = "load the module kvm_amd or kvm_intel, and switch virtualization on in the firmware or, in a VM, nested virtualization";
    device("kvm", "/dev/kvm", Verdict::Fail, "", remedy)
}

fn cpu(cpuinfo: &str) -> Check {
    const NAME: &str = "cpu";
    let flag = cpuinfo
        .lines()
        .find(|l| l.starts_with("flags"))
        .and_then(|l| l.split_whitespace().find(|w| matches!(*w, "svm" | "vmx")));
    match flag {
        Some(flag) => Check::ok(NAME, format!("flag {flag}")),
        None => Check::new(
            NAME,
            Verdict::Fail,
            "no flag svm or vmx: a device /dev/kvm without it cannot run a guest",
            "use a host with hardware virtualization, or a VM with nested virtualization",
        ),
    }
}

fn kernel(release: &str) -> Check {
    const NAME: &str = "kernel";
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).filter_map(|p| p.parse::<u32>().ok());
    let version = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    if version >= (5, 12) {
        Check::ok(NAME, release)
    } else {
        Check::new(NAME, Verdict::Fail, release, "idmapped mounts need Linux 5.12 or later")
    }
}

/// `modules` is what securityfs lists, with commas between.
fn landlock(modules: Option<&str>) -> Check {
    const NAME: &str = "landlock";
    match modules {
        Some(list) if list.trim().split(',').any(|module| module == "landlock") => Check::ok(NAME, "on"),
        Some(list) => Check::new(
            NAME,
            Verdict::Fail,
            format!("not among this kernel's security modules: {}", list.trim()),
            "add landlock to lsm= of the kernel's command line (Linux 5.13 or later), or set jail.landlock to \"best-effort\"",
        ),
        None => Check::new(
            NAME,
            Verdict::Warn,
            "no list of security modules at /sys/kernel/security/lsm",
            "mount securityfs on /sys/kernel/security to find out",
        ),
    }
}

fn guest_kernel() -> Check {
    const NAME: &str = "guest kernel";
    let path = match find(KERNEL, Path::exists) {
        Ok(path) => fitting(path, Path::new(processor::FAULTS)),
        Err(tried) => {
            let remedy = "install one, or name one in /etc/nacelle/nacelle.toml";
            return Check::new(NAME, Verdict::Fail, format!("none of {tried}"), remedy);
        }
    };
    match Kernel::read(&path) {
        Ok(kernel) => described(NAME, &path, &kernel),
        Err(e) => Check::new(NAME, Verdict::Fail, format!("read {}: {e}", path.display()), "install it again"),
    }
}

/// Which of the kernels beside each other the shim takes.
fn fitting(path: PathBuf, faults: &Path) -> PathBuf {
    processor::fitting(path, Path::is_file, |fault| fs::read_to_string(faults.join(fault)).ok())
}

/// Which kernel it is, and what pods do without.
fn described(name: &'static str, path: &Path, kernel: &Kernel) -> Check {
    let release = kernel.release.as_deref().unwrap_or("of unknown release");
    let found = format!("{}, {release}", path.display());
    match &kernel.lacks {
        Some(lacks) if lacks.is_empty() => Check::ok(name, format!("{found}, with every feature")),
        Some(lacks) => {
            let lacks: Vec<_> = lacks.iter().map(|feature| format!("{} ({})", feature.name, feature.gives)).collect();
            let remedy = "docs/kernel.md says which kernel gives what";
            Check::new(name, Verdict::Warn, format!("{found}, lacks {}", lacks.join(", ")), remedy)
        }
        None => Check::ok(
            name,
            format!(
                "{found}; it does not carry its configuration: `nacelle ps --long` says what it lacks when a pod runs"
            ),
        ),
    }
}

fn host_network_kernel() -> Check {
    const NAME: &str = "host network";
    let path = match find(HOST_NETWORK_KERNEL, Path::exists) {
        Ok(path) => path,
        Err(tried) => {
            let found = format!("none of {tried}: `ctr run --net-host` is refused");
            let remedy = "install libkrunfw's kernel there, or name it as vm.host_network_kernel";
            return Check::new(NAME, Verdict::Warn, found, remedy);
        }
    };
    match Kernel::read(&path) {
        Ok(kernel) => Check::ok(
            NAME,
            format!("{}, {}", path.display(), kernel.release.as_deref().unwrap_or("of unknown release")),
        ),
        Err(e) => Check::new(NAME, Verdict::Warn, format!("read {}: {e}", path.display()), "install it again"),
    }
}

fn helpers() -> Check {
    const NAME: &str = "helpers";
    match find(LIBEXEC, |dir| ["nacelle-vmm", "nacelle-agent"].iter().all(|name| dir.join(name).exists())) {
        Ok(dir) => Check::ok(NAME, format!("nacelle-vmm and nacelle-agent in {}", dir.display())),
        Err(tried) => Check::new(
            NAME,
            Verdict::Fail,
            format!("nacelle-vmm and nacelle-agent are not together in any of {tried}"),
            "install both there, or name them in /etc/nacelle/nacelle.toml",
        ),
    }
}

fn fuse() -> Check {
    let then = ": `nerdctl cp` does not find the files of a running container";
    device("fuse", "/dev/fuse", Verdict::Warn, then, "load the module fuse")
}

fn containerd() -> Check {
    const NAME: &str = "shim";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|d| d.join("containerd-shim-nacelle-v2")).find(|p| p.exists());
    match found {
        Some(path) => Check::ok(NAME, path.display().to_string()),
        None => Check::new(
            NAME,
            Verdict::Warn,
            "containerd-shim-nacelle-v2 is not in PATH",
            "containerd looks for it in its own PATH, or beside its own binary",
        ),
    }
}

#[cfg(test)]
mod tests {
    use nacelle_protocol::features;

    use super::*;

    #[test]
    fn reads_cpu_flags() {
        assert_eq!(cpu("flags\t\t: fpu svm sse").verdict, Verdict::Ok);
        assert_eq!(cpu("flags\t\t: fpu sse").verdict, Verdict::Fail);
        assert_eq!(cpu("").verdict, Verdict::Fail);
    }

    #[test]
    fn finds_landlock_among_the_modules() {
        assert_eq!(landlock(Some("lockdown,capability,landlock,yama\n")).verdict, Verdict::Ok);
        assert_eq!(landlock(Some("capability,landlocked\n")).verdict, Verdict::Fail);
        assert_eq!(landlock(None).verdict, Verdict::Warn);
    }

    #[test]
    fn compares_kernel_releases() {
        assert_eq!(kernel("6.12.91+deb13-cloud").verdict, Verdict::Ok);
        assert_eq!(kernel("5.10.0").verdict, Verdict::Fail);
        assert_eq!(kernel("nonsense").verdict, Verdict::Fail);
    }

    #[test]
    fn tells_what_a_kernel_lacks() {
        let path = Path::new("/k/vmlinux");
        let release = Some("6.12.1".to_owned());
        let check = |lacks| described("guest kernel", path, &Kernel { release: release.clone(), lacks });
        assert_eq!(check(Some(Vec::new())).found, "/k/vmlinux, 6.12.1, with every feature");
        let lacking = check(Some(features::ALL.iter().take(1).collect()));
        assert_eq!(lacking.verdict, Verdict::Warn);
        assert!(lacking.found.contains("lacks pressure (cpu.pressure"), "{}", lacking.found);
        assert!(check(None).found.contains("nacelle ps --long"));
    }

    #[test]
    fn names_the_kernel_that_the_shim_takes() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        let plain = dir.path().join(processor::PLAIN_RETURNS);
        assert_eq!(fitting(kernel.clone(), dir.path()), kernel);
        fs::write(&plain, "").unwrap();
        assert_eq!(fitting(kernel.clone(), dir.path()), kernel, "nothing is known of the processor");
        for fault in ["retbleed", "spec_rstack_overflow", "indirect_target_selection"] {
            fs::write(dir.path().join(fault), "Not affected\n").unwrap();
        }
        assert_eq!(fitting(kernel.clone(), dir.path()), plain);
    }

    #[test]
    fn prints_a_line_for_each_check() {
        let mut out = Vec::new();
        run(false, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        for name in [
            "kvm",
            "cpu",
            "kernel",
            "cgroups",
            "user namespaces",
            "idmapped mounts",
            "apparmor",
            "guest kernel",
            "helpers",
            "shim",
        ] {
            assert!(text.contains(name), "{text}");
        }
    }
}
