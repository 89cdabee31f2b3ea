//! What a sandbox leaves on the host, where, and how it goes away again.
//!
//! ```text
//!  /run/nacelle/<namespace>/<sandbox>/        0700
//!    state.json         what `delete` needs after a crash; written by rename
//!    status.json        for people, see `status`
//!    sock/              rpc.sock, stream.sock: the guest dials them through the VMM
//!    volumes/           tmpfs in the shim's mount namespace, shared with the VMM's: one entry a volume
//!    root/              empty; the jail's root is assembled here, in the VMM's mount namespace
//!  /run/nacelle/uids/<slot>                   locked by the shim that owns the slot, names its sandbox
//!  <data>/layers/  <data>/upper/              caches of the node
//!  <data>/pods/<namespace>/<sandbox>/
//!    layers/            hard links of the lowers in use
//!    layers/data/       tmpfs in the shim's mount namespace, as volumes/: directories of layers that are not converted yet
//!    scratch/<id>/      layers of one container's own, while they are converted
//!    upper.ext4         the pod's writable disk
//! ```
//!
//! Invariants: nothing here is removed recursively through a directory that may hold a mount; every removal is
//! repeatable; a process is only killed when its start time is the recorded one.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nacelle_protocol::agent::DATA_DIR;
use nacelle_protocol::ids::SandboxId;
use nacelle_protocol::status::STATUS_FILE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::UIDS_PER_POD;
use crate::spec::ETC;

/// Where sandboxes live while they run.
pub const RUN_ROOT: &str = "/run/nacelle";
/// Longest `state.json` that is read, in bytes.
const MAX_STATE: u64 = 64 << 10;
/// Slots that are tried; far more than a node has pods.
const SLOTS: u32 = 16384;

/// What goes wrong with a sandbox's files.
#[derive(Debug, Error)]
pub enum StateError {
    /// An operation on a path failed.
    #[error("{what} {path}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// `state.json` is not what was written.
    #[error("read {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// Every slot is taken.
    #[error("claim user ids: all {SLOTS} slots in {0} are taken")]
    NoSlot(PathBuf),
    /// The VMM does not die.
    #[error("kill VMM {0}: it is still there")]
    Unkillable(u32),
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    move |source| StateError::Io { what, path: path.to_owned(), source }
}

/// `Ok` where `result` failed only because there is nothing.
fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The directories of one sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirs {
    run: PathBuf,
    pod: PathBuf,
}

impl Dirs {
    /// The directories of `sandbox` below the two roots.
    pub fn new(run_root: &Path, data_root: &Path, namespace: &SandboxId, sandbox: &SandboxId) -> Self {
        Self { run: run_root.join(namespace).join(sandbox), pod: data_root.join("pods").join(namespace).join(sandbox) }
    }

    /// The run directory itself, for files that are only looked at.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Socket of the RPC connection.
    pub fn rpc_socket(&self) -> PathBuf {
        self.run.join("sock/rpc.sock")
    }

    /// Socket of the stdio streams.
    pub fn stream_socket(&self) -> PathBuf {
        self.run.join("sock/stream.sock")
    }

    /// Where the root of a container is mounted that nacelle does not take apart.
    pub fn mounted(&self, container: &str) -> PathBuf {
        self.run.join("mounted").join(container)
    }

    /// Source of the share "volumes".
    pub fn volumes(&self) -> PathBuf {
        self.run.join("volumes")
    }

    /// Empty directory for the jail.
    pub fn jail_root(&self) -> PathBuf {
        self.run.join("root")
    }

    /// Source of the share "layers".
    pub fn layers(&self) -> PathBuf {
        self.pod.join("layers")
    }

    /// Where directories of layers appear in the share "layers".
    pub fn data(&self) -> PathBuf {
        self.layers().join(DATA_DIR)
    }

    /// For layers that one container alone uses, while they are converted.
    pub fn scratch(&self, container: &str) -> PathBuf {
        self.pod.join("scratch").join(container)
    }

    /// The pod's writable disk.
    pub fn upper(&self) -> PathBuf {
        self.pod.join("upper.ext4")
    }

    /// Files that containers of a pod get below /etc, see [`Dirs::write_etc`].
    pub fn etc(&self) -> PathBuf {
        self.run.join("etc")
    }

    /// Writes files that containers of the pod get below /etc: names of [`ETC`], and what is in them.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn write_etc(&self, files: &[(&'static str, String)]) -> Result<(), StateError> {
        if files.is_empty() {
            return Ok(());
        }
        let etc = self.etc();
        fs::create_dir(&etc).map_err(io_error("create", &etc))?;
        for (name, text) in files {
            let path = etc.join(name);
            fs::write(&path, text).map_err(io_error("write", &path))?;
        }
        Ok(())
    }

    fn state_file(&self) -> PathBuf {
        self.run.join("state.json")
    }

    /// Makes the directories. What a crash left of the same sandbox is removed first.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn create(&self) -> Result<(), StateError> {
        self.remove()?;
        let mut private = fs::DirBuilder::new();
        private.mode(0o700).recursive(true);
        for dir in [&self.run, &self.run.join("sock"), &self.pod] {
            private.create(dir).map_err(io_error("create", dir))?;
        }
        // The jail hands these to a process that is not root.
        let mut open = fs::DirBuilder::new();
        open.mode(0o755);
        for dir in [self.volumes(), self.jail_root(), self.layers(), self.data()] {
            open.create(&dir).map_err(io_error("create", &dir))?;
        }
        Ok(())
    }

    /// Removes the directories and everything that this module says is in them. Nothing there is success.
    ///
    /// # Errors
    /// [`StateError::Io`], such as for a volume that is still mounted.
    pub fn remove(&self) -> Result<(), StateError> {
        let rm = |path: PathBuf| gone_is_fine(fs::remove_file(&path)).map_err(io_error("remove", &path));
        let rmdir = |path: PathBuf| gone_is_fine(fs::remove_dir(&path)).map_err(io_error("remove", &path));
        rm(self.upper())?;
        rmdir(self.data())?;
        let layers = self.layers();
        match fs::read_dir(&layers) {
            Ok(entries) => {
                for entry in entries {
                    rm(entry.map_err(io_error("list", &layers))?.path())?;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io_error("list", &layers)(e)),
        }
        rmdir(layers)?;
        // Nothing is ever mounted in there.
        let scratch = self.pod.join("scratch");
        gone_is_fine(fs::remove_dir_all(&scratch)).map_err(io_error("remove", &scratch))?;
        rmdir(self.pod.clone())?;
        rm(self.rpc_socket())?;
        rm(self.stream_socket())?;
        rmdir(self.run.join("sock"))?;
        ETC.into_iter().try_for_each(|name| rm(self.etc().join(name)))?;
        rmdir(self.etc())?;
        rmdir(self.volumes())?;
        rmdir(self.jail_root())?;
        // Empty, but for a shim that died while it converted one; what it had mounted went with it.
        let mounted = self.run.join("mounted");
        for point in fs::read_dir(&mounted).into_iter().flatten().flatten() {
            rmdir(point.path())?;
        }
        rmdir(mounted)?;
        rm(self.run.join("state.json.new"))?;
        rm(self.run.join(STATUS_FILE))?;
        rm(self.run.join(STATUS_FILE).with_extension("tmp"))?;
        rm(self.state_file())?;
        rmdir(self.run.clone())
    }
}

/// What `delete` needs to clean up after a shim that died.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The shim.
    pub shim: Option<Process>,
    /// The VMM, once it runs.
    pub vmm: Option<Process>,
    /// Cgroups that the shim made, innermost first.
    pub cgroups: Vec<PathBuf>,
    /// The network namespace that was joined, whose interfaces may be redirected.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// The root of the data that was configured when the sandbox started.
    pub data_dir: PathBuf,
    /// The shim's socket.
    pub socket: PathBuf,
}

/// A process, told from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id in the shim's namespace.
    pub pid: u32,
    /// Start time in clock ticks since boot: field 22 of /proc/pid/stat, proc(5).
    pub start_time: u64,
}

impl Process {
    /// The process with this id, if it is there.
    pub fn find(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the name in parentheses, which may hold anything.
        let start_time = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid, start_time })
    }

    /// Asks it to end, and kills it when it has not done so in time. See [`Process::kill`].
    ///
    /// # Errors
    /// [`StateError::Unkillable`] after twice `patience`.
    pub fn end(self, patience: Duration) -> Result<(), StateError> {
        self.signal(Signal::TERM, patience).or_else(|_| self.kill(patience))
    }

    /// Kills it and waits until it is gone. Not there, or another one by now, is success.
    ///
    /// # Errors
    /// [`StateError::Unkillable`] after `patience`.
    pub fn kill(self, patience: Duration) -> Result<(), StateError> {
        self.signal(Signal::KILL, patience)
    }

    fn signal(self, signal: Signal, patience: Duration) -> Result<(), StateError> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
        // Compared after the descriptor pins the process, so that it cannot change in between.
        if Self::find(self.pid) != Some(self) {
            return Ok(());
        }
        // Fails only where it is gone already, which the wait finds out.
        let _ = pidfd_send_signal(&pidfd, signal);
        let timeout = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(n) if n > 0 => Ok(()),
            _ => Err(StateError::Unkillable(self.pid)),
        }
    }
}

impl State {
    /// Writes the state, so that a reader sees the old one or this one.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn write(&self, dirs: &Dirs) -> Result<(), StateError> {
        let (new, path) = (dirs.run.join("state.json.new"), dirs.state_file());
        let json = serde_json::to_vec(self).map_err(|source| StateError::Parse { path: path.clone(), source })?;
        fs::write(&new, json).map_err(io_error("write", &new))?;
        fs::rename(&new, &path).map_err(io_error("rename to", &path))
    }

    /// Reads the state; `None` where the sandbox is gone.
    ///
    /// # Errors
    /// [`StateError::Io`] and [`StateError::Parse`].
    pub fn read(dirs: &Dirs) -> Result<Option<Self>, StateError> {
        let path = dirs.state_file();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_error("open", &path)(e)),
        };
        let state = serde_json::from_reader(io::Read::take(file, MAX_STATE));
        state.map(Some).map_err(|source| StateError::Parse { path, source })
    }
}

/// A range of ids that no other pod on this host has, for as long as this value lives.
#[derive(Debug)]
pub struct UidSlot {
    file: File,
    number: u32,
}

impl UidSlot {
    /// Claims the first free slot for the sandbox whose run directory is `owner`.
    ///
    /// A slot whose shim died is free again once the sandbox's directory is gone: until then its VMM may live.
    ///
    /// # Errors
    /// [`StateError::NoSlot`] and [`StateError::Io`].
    pub fn claim(run_root: &Path, owner: &Dirs, uid_base: u32) -> Result<Self, StateError> {
        let dir = run_root.join("uids");
        fs::DirBuilder::new().mode(0o700).recursive(true).create(&dir).map_err(io_error("create", &dir))?;
        let slots = SLOTS.min((u32::MAX - uid_base) / UIDS_PER_POD);
        for number in 0..slots {
            let path = dir.join(number.to_string());
            let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
            let file = file.map_err(io_error("open", &path))?;
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            let previous = fs::read_to_string(&path).map_err(io_error("read", &path))?;
            let abandoned = !previous.is_empty() && Path::new(&previous) != owner.run && Path::new(&previous).exists();
            if abandoned {
                continue;
            }
            let name = owner.run.as_os_str().as_encoded_bytes();
            file.set_len(0).and_then(|()| file.write_all_at(name, 0)).map_err(io_error("write", &path))?;
            return Ok(Self { file, number });
        }
        Err(StateError::NoSlot(dir))
    }

    /// Takes a dead shim's name off its slot. One whose shim lives is locked and stays.
    pub fn forget(run_root: &Path, owner: &Dirs) {
        for entry in fs::read_dir(run_root.join("uids")).into_iter().flatten().flatten() {
            let Ok(file) = File::options().read(true).write(true).open(entry.path()) else { continue };
            let name = fs::read(entry.path()).unwrap_or_default();
            let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
            if locked && name == owner.run.as_os_str().as_encoded_bytes() {
                // Best effort, like the end of a claim.
                let _ = file.set_len(0);
            }
        }
    }

    /// First id of the range.
    pub fn first(&self, uid_base: u32) -> u32 {
        // Bounded by `claim`.
        uid_base + self.number * UIDS_PER_POD
    }
}

impl Drop for UidSlot {
    fn drop(&mut self) {
        // Best effort: the lock goes with the descriptor, and a stale name only matters while its directory exists.
        let _ = self.file.set_len(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs(root: &Path, sandbox: &str) -> Dirs {
        let id = |text| SandboxId::new(text).expect("id");
        Dirs::new(&root.join("run"), &root.join("data"), &id("default"), &id(sandbox))
    }

    #[test]
    fn remove_is_repeatable_and_complete() {
        let root = tempfile::tempdir().expect("tempdir");
        let dirs = dirs(root.path(), "s1");
        dirs.remove().expect("nothing there is fine");
        dirs.create().expect("create");
        fs::write(dirs.layers().join("a.erofs"), b"x").expect("write");
        fs::write(dirs.upper(), b"x").expect("write");
        State::default().write(&dirs).expect("write state");
        dirs.create().expect("create again, over the rest of a crash");
        assert_eq!(State::read(&dirs).expect("read"), None);
        dirs.remove().expect("remove");
        dirs.remove().expect("remove again");
        assert!(!root.path().join("run/default/s1").exists() && !root.path().join("data/pods/default/s1").exists());
    }

    #[test]
    fn volumes_that_hold_something_are_not_removed() {
        let root = tempfile::tempdir().expect("tempdir");
        let dirs = dirs(root.path(), "s1");
        dirs.create().expect("create");
        let precious = dirs.volumes().join("0");
        fs::create_dir(&precious).expect("mkdir");
        fs::write(precious.join("data"), b"precious").expect("write");
        assert!(matches!(dirs.remove(), Err(StateError::Io { what: "remove", .. })));
        assert!(precious.join("data").exists());
    }

    #[test]
    fn state_round_trip_and_damage() {
        let root = tempfile::tempdir().expect("tempdir");
        let dirs = dirs(root.path(), "s1");
        dirs.create().expect("create");
        let state = State { vmm: Process::find(std::process::id()), ..State::default() };
        state.write(&dirs).expect("write");
        assert_eq!(State::read(&dirs).expect("read"), Some(state));
        fs::write(dirs.state_file(), b"{").expect("write");
        assert!(matches!(State::read(&dirs), Err(StateError::Parse { .. })));
    }

    #[test]
    fn slots_are_exclusive_and_reclaimed() {
        let root = tempfile::tempdir().expect("tempdir");
        let run = root.path().join("run");
        let (a, b) = (dirs(root.path(), "a"), dirs(root.path(), "b"));
        let first = UidSlot::claim(&run, &a, 65536).expect("claim");
        let second = UidSlot::claim(&run, &b, 65536).expect("claim");
        assert_eq!((first.first(65536), second.first(65536)), (65536, 131_072));
        drop(first);
        // A process that another test starts has a copy of the lock until it executes its program.
        let free = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            UidSlot::claim(&run, &b, 65536).expect("claim").number == 0
        });
        assert!(free, "slot 0 can be claimed again");
        // Slot 0 is free again, but say its shim crashed and the directory is still there.
        a.create().expect("create");
        fs::write(run.join("uids/0"), a.run.as_os_str().as_encoded_bytes()).expect("write");
        let third = UidSlot::claim(&run, &dirs(root.path(), "c"), 65536).expect("claim");
        assert_eq!(third.number, 2);
        a.remove().expect("remove");
        let free = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            UidSlot::claim(&run, &b, 65536).expect("claim").number == 0
        });
        assert!(free, "slot 0 belongs to nobody any more");
    }

    #[test]
    fn only_the_recorded_process_is_killed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("spawn");
        let process = Process::find(child.id()).expect("alive");
        let impostor = Process { start_time: process.start_time + 1, ..process };
        impostor.kill(Duration::from_secs(1)).expect("nothing to kill");
        assert!(child.try_wait().expect("wait").is_none());
        process.kill(Duration::from_secs(5)).expect("kill");
        child.wait().expect("wait");
        process.kill(Duration::from_secs(1)).expect("gone is fine");
    }
}
