//! The containers of the guest, and what every operation on them needs.
//!
//! One lock guards the table; nobody holds it across an await. An operation that takes long reserves its place first,
//! so that a second one on the same id is refused at once.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use nacelle_protocol::agent::{Exit, Oom, Users, event::What};
use thiserror::Error;
use tokio::sync::Notify;

use crate::cgroup::{Cgroup, CgroupError};
use crate::cpus::Cpus;
use crate::dial::Dial;
use crate::disk::Disks;
use crate::events::EventLog;
use crate::mount::{Lowers, MountError};
use crate::pod;
use crate::reap::{Ended, Reaper};
use crate::spawn::SpawnError;
use crate::spec::SpecError;
use crate::stats::{hugepage_sizes, metrics};
use crate::stdio::StdioError;
use crate::task::{Container, Process};
use crate::users::PodUsers;

/// Most containers, and most execs of one container, at any time.
pub const MAX_ENTRIES: usize = 4096;

/// Why an operation on a container was not done.
#[derive(Debug, Error)]
pub enum GuestError {
    /// There is no such container or exec.
    #[error("find {0}: there is none")]
    NotFound(String),
    /// There is one already.
    #[error("create {0}: it exists already")]
    Exists(String),
    /// It is in a state that does not allow it.
    #[error("{0}: {1}")]
    State(String, &'static str),
    /// The request makes no sense.
    #[error("read request: {0}")]
    Request(String),
    /// The configuration makes no sense.
    #[error("plan {0}")]
    Spec(String, #[source] SpecError),
    /// This guest's kernel cannot do it.
    #[error("{0}: the guest's kernel lacks {1}")]
    Lacking(String, &'static str),
    /// There are too many of them.
    #[error("{0}: {1}")]
    Full(String, &'static str),
    /// File systems.
    #[error("prepare {0}")]
    Mount(String, #[source] MountError),
    /// The cgroup.
    #[error("control {0}")]
    Cgroup(String, #[source] CgroupError),
    /// Standard streams.
    #[error("connect {0}")]
    Stdio(String, #[source] StdioError),
    /// libcontainer, or the program itself.
    #[error("run {0}")]
    Spawn(String, #[source] SpawnError),
    /// Files of the agent's own, signals, terminals.
    #[error("{0}")]
    System(String, #[source] std::io::Error),
}

/// What names a process in messages.
pub fn label(id: &str, exec_id: &str) -> String {
    if exec_id.is_empty() { format!("container {id}") } else { format!("exec {exec_id} of container {id}") }
}

/// All containers. A container that is being created or deleted is `None`.
pub type Table = HashMap<String, Option<Container>>;

/// The guest.
pub struct Guest {
    /// Reaches the host.
    pub dial: Dial,
    /// This program, to be executed as a runner.
    pub program: PathBuf,
    /// Waits for processes.
    pub reaper: Arc<Reaper>,
    /// What the host has to be told.
    pub events: EventLog,
    /// Lowers in use.
    pub lowers: Arc<Lowers>,
    /// Disks that are volumes.
    pub disks: Arc<Disks>,
    /// The disk with the uppers, if containers can be limited on it.
    pub limited_disk: OnceLock<PathBuf>,
    /// The guest's name, as it was at first.
    pub hostname: OnceLock<String>,
    /// Damage of layers is told.
    pub layers_watched: AtomicBool,
    /// The CPUs beside the first.
    pub cpus: Arc<Cpus>,
    /// The guest is to end.
    pub shutdown: Notify,
    /// First process of the PID namespace that containers share, once one has asked for it.
    pod_pids: tokio::sync::OnceCell<u32>,
    /// The user namespace that containers share, once one has asked for it.
    pod_users: tokio::sync::OnceCell<PodUsers>,
    table: Mutex<Table>,
    serial: std::sync::atomic::AtomicU64,
}

impl Guest {
    /// A guest without containers. `program` is the agent's own executable.
    pub fn new(dial: Dial, program: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            dial,
            program,
            reaper: Arc::default(),
            events: EventLog::default(),
            lowers: Arc::default(),
            disks: Arc::default(),
            limited_disk: OnceLock::new(),
            hostname: OnceLock::new(),
            layers_watched: AtomicBool::new(false),
            cpus: Arc::default(),
            shutdown: Notify::new(),
            pod_pids: tokio::sync::OnceCell::new(),
            pod_users: tokio::sync::OnceCell::new(),
            table: Mutex::default(),
            serial: std::sync::atomic::AtomicU64::new(0),
        })
    }

    /// The table. Never hold it across an await.
    pub fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("nothing panics while it holds the table of containers")
    }

    /// The user namespace with these ids, which containers share.
    ///
    /// # Errors
    /// [`GuestError::System`], and [`GuestError::Request`] when the pod has one with other ids.
    pub async fn pod_users(&self, users: Users) -> Result<&PodUsers, GuestError> {
        let make = || async {
            let program = self.program.clone();
            let made = tokio::task::spawn_blocking(move || PodUsers::make(&program, users)).await;
            made.unwrap_or_else(|error| Err(std::io::Error::other(error)))
                .map_err(|error| GuestError::System("make user namespace of the pod".into(), error))
        };
        let pods = self.pod_users.get_or_try_init(make).await?;
        match pods.users == users {
            true => Ok(pods),
            false => Err(GuestError::Request("use a user namespace: the pod has one with other ids".into())),
        }
    }

    /// The user namespace that containers share, held once more.
    pub fn pod_users_file(&self) -> Option<Result<File, GuestError>> {
        let held = |users: &PodUsers| users.file().try_clone();
        self.pod_users.get().map(held).map(|file| file.map_err(|e| GuestError::System("hold user namespace".into(), e)))
    }

    /// User and group of a process, as the guest's kernel has them.
    pub fn outside(&self, (uid, gid): (u32, u32)) -> (u32, u32) {
        self.pod_users.get().map_or((uid, gid), |users| (users.outside(uid), users.outside(gid)))
    }

    /// The first process of the PID namespace that containers share, which belongs to the user namespace at `users`.
    ///
    /// # Errors
    /// [`GuestError::System`]
    pub async fn pod_pids(&self, users: Option<PathBuf>) -> Result<u32, GuestError> {
        let make = || async {
            let program = self.program.clone();
            let make = move || pod::make_pid_namespace(&program, users.as_deref());
            let made = tokio::task::spawn_blocking(make).await;
            made.unwrap_or_else(|error| Err(std::io::Error::other(error)))
                .map_err(|error| GuestError::System("make PID namespace of the pod".into(), error))
        };
        self.pod_pids.get_or_try_init(make).await.copied()
    }

    /// A number that no one else has.
    pub fn serial(&self) -> u64 {
        self.serial.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    }

    /// Does something with a container.
    ///
    /// # Errors
    /// [`GuestError::NotFound`], and what `act` says.
    pub fn with<T>(
        &self,
        id: &str,
        act: impl FnOnce(&mut Container) -> Result<T, GuestError>,
    ) -> Result<T, GuestError> {
        match self.table().get_mut(id) {
            Some(Some(container)) => act(container),
            _ => Err(GuestError::NotFound(label(id, ""))),
        }
    }

    /// Does something with a process: a container's main process when `exec_id` is empty.
    ///
    /// # Errors
    /// [`GuestError::NotFound`], and what `act` says.
    pub fn with_process<T>(
        &self,
        id: &str,
        exec_id: &str,
        act: impl FnOnce(&mut Process) -> Result<T, GuestError>,
    ) -> Result<T, GuestError> {
        self.with(id, |container| {
            if exec_id.is_empty() {
                return act(&mut container.init);
            }
            match container.execs.get_mut(exec_id) {
                Some(exec) => act(&mut exec.process),
                None => Err(GuestError::NotFound(label(id, exec_id))),
            }
        })
    }

    /// Takes note of the end of a container's main process.
    pub fn init_ended(&self, id: &str, ended: Ended) {
        // An error means that the container is gone already, and with it everybody who could ask.
        let _ = self.with(id, |container| {
            container.init_ended = Some(ended);
            container.files = None;
            // What shares a PID namespace with others does not die with it.
            self.kill_rest(id, &container.cgroup);
            self.tell_last_end(id, container);
            Ok(())
        });
    }

    /// Takes note of the end of an exec.
    pub fn exec_ended(&self, id: &str, exec_id: &str, ended: Ended) {
        let _ = self.with(id, |container| {
            self.tell_oom(id, container);
            if let Some(exec) = container.execs.get_mut(exec_id) {
                let pid = exec.process.pid;
                exec.process.stop(ended);
                self.tell_exit(id, exec_id, pid, ended);
            }
            self.tell_last_end(id, container);
            Ok(())
        });
    }

    /// Takes note of a memory event of a container.
    pub fn memory_changed(&self, id: &str) {
        let _ = self.with(id, |container| {
            self.tell_oom(id, container);
            Ok(())
        });
    }

    /// Tells the end of the main process if everything else has ended. To be called whenever that may have changed.
    pub fn tell_last_end(&self, id: &str, container: &mut Container) {
        let Some(ended) = container.last_end() else { return };
        self.tell_oom(id, container);
        container.memory_watch.abort();
        container.last_stats = Some(metrics(|file| container.cgroup.read(file), &hugepage_sizes()));
        container.init.stop(ended);
        self.tell_exit(id, "", container.init.pid, ended);
    }

    /// Tells that the kernel has killed for want of memory, unless that has been told.
    pub fn tell_oom(&self, id: &str, container: &mut Container) {
        let kills = container.cgroup.oom_kills();
        if kills > container.oom_kills {
            container.oom_kills = kills;
            self.events.push(What::Oom(Oom { container_id: id.to_owned(), ..Default::default() }));
        }
    }

    fn tell_exit(&self, id: &str, exec_id: &str, pid: u32, ended: Ended) {
        self.events.push(What::Exit(Exit {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            pid,
            status: ended.status,
            exited_at_ns: ended.at_ns,
            ..Default::default()
        }));
    }

    /// Kills whatever is left in a container whose main process has ended.
    pub fn kill_rest(&self, id: &str, cgroup: &Cgroup) {
        if let Err(error) = cgroup.kill() {
            crate::say!("kill what is left of container {id}: {}", crate::console::chain(&error));
        }
    }
}
