//! One container's cgroup (v2): the processes in it, their limits, and what happens to them.
//!
//! The agent makes the cgroup and sets its limits before the first process enters it; libcontainer only puts processes
//! in. Changes are pushed by the kernel (poll on `*.events`), nothing is polled on a timer.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use rustix::io::Errno;
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::fd;
use crate::limits::{self, LimitError};

/// Where the unified hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// The cgroup of all containers together; the root has no numbers.
pub const POD: &str = "/sys/fs/cgroup/pod";
/// Its name below [`ROOT`].
pub const POD_NAME: &str = "pod";

/// How long processes may take to freeze, to thaw or to die.
const DEADLINE: Duration = Duration::from_secs(10);

/// What went wrong with a cgroup.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// The path is not absolute, is the root, or leaves it.
    #[error("read cgroup path {0:?}: expected an absolute path without `..`")]
    Path(PathBuf),
    /// A cgroup of that path is there already.
    #[error("create cgroup {0}: it exists already")]
    Exists(PathBuf),
    /// A directory or a control file.
    #[error("{verb} {path}")]
    Io {
        /// What was being done.
        verb: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The limits make no sense.
    #[error("read limits")]
    Limits(#[source] LimitError),
    /// A limit that the kernel does not take.
    #[error("set {file} of cgroup {cgroup} to {value:?}")]
    Limit {
        /// Control file.
        file: String,
        /// The cgroup.
        cgroup: PathBuf,
        /// What was to be written.
        value: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The processes did not get there in time.
    #[error("wait for cgroup {cgroup} to be {state}: it takes too long")]
    Slow {
        /// The cgroup.
        cgroup: PathBuf,
        /// The state.
        state: &'static str,
    },
}

fn io_error<'a>(verb: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CgroupError + 'a {
    move |source| CgroupError::Io { verb, path: path.to_owned(), source }
}

/// A container's cgroup.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup `cgroups_path`, and its ancestors where they are missing, with every controller there is.
    ///
    /// # Errors
    /// [`CgroupError`]; nothing is left behind but ancestors.
    pub fn create(cgroups_path: &Path) -> Result<Self, CgroupError> {
        let mut names = Vec::new();
        for component in cgroups_path.components() {
            match component {
                Component::RootDir => {}
                Component::Normal(name) => names.push(name),
                _ => return Err(CgroupError::Path(cgroups_path.to_owned())),
            }
        }
        let Some((leaf, ancestors)) = names.split_last().filter(|_| cgroups_path.is_absolute()) else {
            return Err(CgroupError::Path(cgroups_path.to_owned()));
        };
        let mut path = PathBuf::from(ROOT);
        for name in ancestors {
            path.push(name);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(io_error("create cgroup", &path)(error));
                }
                _ => delegate(&path)?,
            }
        }
        path.push(leaf);
        match fs::create_dir(&path) {
            Ok(()) => Ok(Self { path }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(CgroupError::Exists(path)),
            Err(error) => Err(io_error("create cgroup", &path)(error)),
        }
    }

    /// The cgroup of all containers, which is always there.
    pub fn pod() -> Self {
        Self { path: POD.into() }
    }

    /// Sets limits.
    ///
    /// # Errors
    /// [`CgroupError::Limits`] and [`CgroupError::Limit`]; limits set before the one that failed stay.
    pub fn apply(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        for write in limits::writes(resources).map_err(CgroupError::Limits)? {
            let path = self.path.join(&write.file);
            match write_control(&path, &write.value) {
                Err(error) if write.optional && error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    let (file, value) = (write.file, write.value);
                    return Err(CgroupError::Limit { file, cgroup: self.path.clone(), value, source });
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// The content of a control file; `None` where the kernel does not offer it.
    pub fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path.join(file)).ok()
    }

    /// How many processes of this cgroup the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        self.read("memory.events").and_then(|text| field(&text, "oom_kill")).unwrap_or(0)
    }

    /// Every process in the cgroup and below it.
    ///
    /// # Errors
    /// [`CgroupError::Io`]
    pub fn pids(&self) -> Result<Vec<u32>, CgroupError> {
        let mut pids = Vec::new();
        for directory in self.tree() {
            let path = directory.join("cgroup.procs");
            match fs::read_to_string(&path) {
                Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
                // A threaded child has no list of its own, and a container may remove its own cgroups at any time.
                Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound && directory != self.path => {}
                Err(error) => return Err(io_error("read", &path)(error)),
            }
        }
        Ok(pids)
    }

    /// Kills every process in the cgroup and below it, frozen or not.
    ///
    /// # Errors
    /// [`CgroupError::Io`]
    pub fn kill(&self) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.kill");
        write_control(&path, "1").map_err(io_error("write", &path))
    }

    /// Freezes the processes, or lets them run again, and waits until it is so.
    ///
    /// # Errors
    /// [`CgroupError`]; a cgroup that does not freeze in time runs on.
    pub async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.freeze");
        let write =
            |frozen: bool| write_control(&path, if frozen { "1" } else { "0" }).map_err(io_error("write", &path));
        write(frozen)?;
        let state = if frozen { "frozen" } else { "running" };
        let done = self.wait_for("frozen", u64::from(frozen), state).await;
        if done.is_err() && frozen {
            write(false)?;
        }
        done
    }

    /// Kills what is left in the cgroup and removes it.
    ///
    /// # Errors
    /// [`CgroupError`]
    pub async fn remove(&self) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        self.wait_for("populated", 0, "empty").await?;
        for directory in self.tree().iter().rev() {
            fs::remove_dir(directory).map_err(io_error("remove cgroup", directory))?;
        }
        // Ancestors that were made for this one only; the others refuse.
        let mut ancestor = self.path.as_path();
        while let Some(parent) = ancestor.parent().filter(|parent| parent.as_os_str() != POD) {
            if fs::remove_dir(parent).is_err() {
                break;
            }
            ancestor = parent;
        }
        Ok(())
    }

    /// Calls back whenever memory.events changes, for ever. Returns where there is no memory controller.
    pub async fn watch_memory(&self, mut changed: impl FnMut()) {
        let Ok(watch) = Watch::open(&self.path.join("memory.events")) else { return };
        while let Ok(_text) = watch.read() {
            changed();
            if watch.changed().await.is_err() {
                return;
            }
        }
    }

    async fn wait_for(&self, key: &str, value: u64, state: &'static str) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        let watch = Watch::open(&path).map_err(io_error("watch", &path))?;
        let reached = async {
            loop {
                let text = watch.read().map_err(io_error("read", &path))?;
                if field(&text, key) == Some(value) {
                    return Ok(());
                }
                watch.changed().await.map_err(io_error("watch", &path))?;
            }
        };
        let slow = CgroupError::Slow { cgroup: self.path.clone(), state };
        tokio::time::timeout(DEADLINE, reached).await.unwrap_or(Err(slow))
    }

    /// The cgroup and all below it, parents first.
    fn tree(&self) -> Vec<PathBuf> {
        let mut tree = vec![self.path.clone()];
        let mut at = 0;
        while let Some(directory) = tree.get(at) {
            let children = fs::read_dir(directory).into_iter().flatten().flatten();
            let children: Vec<_> =
                children.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect();
            tree.extend(children);
            at += 1;
        }
        tree
    }
}

/// Makes the guest's cgroups ready for containers.
///
/// # Errors
/// [`CgroupError::Io`]
pub fn prepare() -> Result<(), CgroupError> {
    delegate(Path::new(ROOT))?;
    let pod = Path::new(POD);
    match fs::create_dir(pod) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(io_error("create cgroup", pod)(error)),
        _ => delegate(pod),
    }
}

/// Lets the children of a cgroup have every controller that it has itself.
///
/// # Errors
/// [`CgroupError::Io`]
pub fn delegate(cgroup: &Path) -> Result<(), CgroupError> {
    let controllers = cgroup.join("cgroup.controllers");
    let names = fs::read_to_string(&controllers).map_err(io_error("read", &controllers))?;
    let enable: String = names.split_whitespace().map(|name| format!("+{name} ")).collect();
    let control = cgroup.join("cgroup.subtree_control");
    if enable.is_empty() { Ok(()) } else { write_control(&control, &enable).map_err(io_error("write", &control)) }
}

/// Writes a control file. Never tries to create one, so that a missing one is told from one that refuses.
fn write_control(path: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// The value of `key` in a file of `key value` lines.
pub fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// A control file whose changes the kernel announces.
struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    fn open(path: &Path) -> io::Result<Self> {
        fd::register(fs::File::open(path)?.into(), Interest::PRIORITY).map(Self)
    }

    /// Reads the file from its start, and with that acknowledges every change so far.
    fn read(&self) -> io::Result<String> {
        let mut buffer = [0; 4096];
        let read = rustix::io::pread(self.0.get_ref(), &mut buffer, 0)?;
        Ok(String::from_utf8_lossy(&buffer[..read]).into_owned())
    }

    async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_root() {
        for bad in ["", "/", "a", "/../a", "/a/../b", "./a"] {
            assert!(matches!(Cgroup::create(Path::new(bad)), Err(CgroupError::Path(_))), "{bad}");
        }
    }

    #[test]
    fn fields_are_whole_words() {
        let text = "oom 1\noom_kill 2\noom_group_kill 3\n";
        assert_eq!(field(text, "oom"), Some(1));
        assert_eq!(field(text, "oom_kill"), Some(2));
        assert_eq!(field(text, "none"), None);
    }
}
