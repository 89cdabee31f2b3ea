//! The pod's cgroup on the host: where the VMM is accounted and limited.
//!
//! ```text
//!  /kubepods/pod1/c1            →  /sys/fs/cgroup/kubepods/pod1/c1
//!  a-b.slice:cri:c1             →  /sys/fs/cgroup/a.slice/a-b.slice/cri-c1.scope
//! ```
//!
//! Only the unified hierarchy is used. The limits of the container hold inside the guest; what is set here keeps the
//! VM as a whole within what was promised, and is never tighter than the VM's RAM and the VMM itself.

use std::fs;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

use thiserror::Error;

/// Where the unified hierarchy is, or is on a hybrid host.
const ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// What is handed down to the pod's cgroup, as far as the host has it.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// Why there is no cgroup.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// The host does not hand a controller down.
    #[error("write {path} {file}: the host's cgroups have no such controller; nacelle needs cgroup v2 with {controller}",
            path = .path.display())]
    Controller {
        /// The cgroup.
        path: PathBuf,
        /// The file that it lacks.
        file: &'static str,
        /// Whose it is.
        controller: &'static str,
    },
    /// There is no unified hierarchy.
    #[error("limit pod: this host has no writable cgroup v2 hierarchy at {} or {}", ROOTS[0], ROOTS[1])]
    NoHierarchy,
    /// The path would leave the hierarchy, or is no systemd path.
    #[error("use cgroup path {0:?}: malformed")]
    Path(PathBuf),
    /// A file or directory of the hierarchy cannot be used.
    #[error("{what} {path}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Limits of the VM as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// `memory.max`, bytes.
    pub memory: Option<u64>,
    /// `memory.high`, bytes: from here on the kernel takes back what it has cached for the pod.
    pub memory_high: Option<u64>,
    /// `pids.max`: processes and threads.
    pub tasks: Option<u64>,
    /// CPU shares as Docker counts them: 1024 is a CPU's worth.
    pub cpu_shares: Option<u64>,
}

/// The unified hierarchy, if this host has one that can be written to.
pub fn root() -> Option<PathBuf> {
    let writable = |root: &Path| rustix::fs::access(root, rustix::fs::Access::WRITE_OK).is_ok();
    ROOTS.iter().map(PathBuf::from).find(|root| root.join("cgroup.controllers").is_file() && writable(root))
}

/// The directory that `linux.cgroupsPath` stands for, relative to the hierarchy.
///
/// # Errors
/// [`CgroupError::Path`].
pub fn relative(path: &Path) -> Result<PathBuf, CgroupError> {
    let malformed = || CgroupError::Path(path.to_owned());
    let text = path.to_str().ok_or_else(malformed)?;
    let parts: Vec<_> = text.split(':').collect();
    let dir = match parts[..] {
        [slice, prefix, name] if !text.contains('/') => {
            let mut dir = expand_slice(slice).ok_or_else(malformed)?;
            dir.push(if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") });
            dir
        }
        _ => path.strip_prefix("/").unwrap_or(path).to_owned(),
    };
    let clean = dir.components().all(|part| matches!(part, Component::Normal(_)));
    if clean && dir.components().next().is_some() { Ok(dir) } else { Err(malformed()) }
}

/// `a-b.slice` lies in `a.slice`: systemd.slice(5).
fn expand_slice(slice: &str) -> Option<PathBuf> {
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice").filter(|stem| !stem.is_empty())?;
    let mut dir = PathBuf::new();
    if stem == "-" {
        return Some(dir);
    }
    let mut name = String::new();
    for part in stem.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        if !name.is_empty() {
            name.push('-');
        }
        name.push_str(part);
        dir.push(format!("{name}.slice"));
    }
    Some(dir)
}

/// Makes the cgroup below `root` and sets its limits. Returns the directories that were made, innermost first.
///
/// # Errors
/// [`CgroupError`]; what was made before is left to [`remove`].
pub fn create(root: &Path, path: &Path, limits: Limits) -> Result<Vec<PathBuf>, CgroupError> {
    let mut dir = root.to_owned();
    let mut made = Vec::new();
    for part in relative(path)?.components() {
        enable_controllers(&dir);
        dir.push(part);
        match fs::create_dir(&dir) {
            Ok(()) => made.insert(0, dir.clone()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(CgroupError::Io { what: "create cgroup", path: dir, source }),
        }
    }
    // The innermost one is this container's alone, whoever made it.
    if made.first() != Some(&dir) {
        made.insert(0, dir.clone());
    }
    let files = [
        ("memory", "memory.high", limits.memory_high),
        ("memory", "memory.max", limits.memory),
        ("pids", "pids.max", limits.tasks),
        ("cpu", "cpu.weight", limits.cpu_shares.map(weight_of)),
    ];
    for (controller, file, value) in files {
        let Some(value) = value else { continue };
        match write(&dir.join(file), &value.to_string()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                remove(&made);
                return Err(CgroupError::Controller { path: dir, file, controller });
            }
            Err(source) => return Err(CgroupError::Io { what: "write", path: dir.join(file), source }),
            Ok(()) => {}
        }
    }
    Ok(made)
}

/// Writes to a file that is there. A file that is not would be "created" with a permission error, which tells less.
fn write(file: &Path, value: &str) -> io::Result<()> {
    fs::File::options().write(true).open(file)?.write_all(value.as_bytes())
}

/// Best effort: a cgroup with processes in it cannot hand controllers down, and then the host has arranged it otherwise.
fn enable_controllers(dir: &Path) {
    let available = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    let enabled = fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap_or_default();
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    for name in CONTROLLERS.into_iter().filter(|name| has(&available, name) && !has(&enabled, name)) {
        if let Err(e) = write(&dir.join("cgroup.subtree_control"), &format!("+{name}")) {
            tracing::debug!("enable {name} below {}: {e}", dir.display());
        }
    }
}

/// The kernel's own weight (1 to 10000, 100 is a CPU's worth) for Docker's shares (2 to 262144), as all runtimes do it:
/// linear from end to end.
fn weight_of(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// Kills what is left in the cgroups and removes them, innermost first. Not there is success, and so is one that others
/// use too.
pub fn remove(dirs: &[PathBuf]) {
    for (index, dir) in dirs.iter().enumerate() {
        if index == 0 {
            // Nothing of ours should be there any more; this catches a VMM that joined and then failed.
            let _ = write(&dir.join("cgroup.kill"), "1");
        }
        match fs::remove_dir(dir) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return tracing::debug!("remove cgroup {}: {e}", dir.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let ok = |text: &str| relative(Path::new(text)).expect("valid").display().to_string();
        assert_eq!(ok("/kubepods/pod1/c1"), "kubepods/pod1/c1");
        assert_eq!(ok("default/c1"), "default/c1");
        assert_eq!(ok("system.slice:cri-containerd:c1"), "system.slice/cri-containerd-c1.scope");
        assert_eq!(ok(":nerdctl:c1"), "system.slice/nerdctl-c1.scope");
        let pod = "kubepods-besteffort-pod1.slice:cri:c1";
        assert_eq!(ok(pod), "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-c1.scope");
        assert_eq!(ok("-.slice:x:c1"), "x-c1.scope");
        for bad in ["", "/", "/a/../b", "a--b.slice:x:c1", "noslice:x:c1", ".slice:x:c1"] {
            assert!(relative(Path::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn weights() {
        assert_eq!((weight_of(0), weight_of(1024), weight_of(u64::MAX)), (1, 39, 10000));
    }

    #[test]
    fn creates_and_removes() {
        // A plain directory behaves enough like the hierarchy for the bookkeeping.
        let root = tempfile::tempdir().expect("tempdir");
        fs::create_dir(root.path().join("a")).expect("mkdir");
        let made = create(root.path(), Path::new("/a/b/c"), Limits::default()).expect("create");
        assert_eq!(made, [root.path().join("a/b/c"), root.path().join("a/b")]);
        remove(&made);
        remove(&made);
        assert!(root.path().join("a").is_dir() && !root.path().join("a/b").exists());
        let limits = Limits { tasks: Some(7), ..Limits::default() };
        let error = create(root.path(), Path::new("/a/b/c"), limits).expect_err("there are no controllers");
        assert!(
            error.to_string().contains("pids.max") && error.to_string().ends_with("cgroup v2 with pids"),
            "{error}"
        );
        assert!(!root.path().join("a/b").exists(), "nothing is left");
    }
}
