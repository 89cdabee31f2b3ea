//! A container's main process: create, start, delete.
//!
//! ```text
//!  create   plan ─► streams ─► rootfs ─► cgroup and limits ─► runner ─► Created      each step undone when a later one fails
//!  start    notify socket ─► executor ─► execve, or the reason why not
//!  delete   kill what is left ─► cgroup ─► rootfs, upper, files
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nacelle_protocol::agent::{
    CONTAINERS_DIR, Container as Config, Damage, Disk, Mirror, Rootfs, VOLUMES_DIR, event::What,
};
use nacelle_protocol::features;
use nacelle_protocol::ids::ContainerId;
use oci_spec::runtime::Spec;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, spawn_blocking};

use crate::cgroup::Cgroup;
use crate::guest::{Guest, GuestError, MAX_ENTRIES, label};
use crate::mirror;
use crate::mount;
use crate::quota::Limit;
use crate::reap::Ended;
use crate::runner::{Job, Operation};
use crate::spawn::{self, SpawnError};
use crate::spec::{self, Joined, Plan};
use crate::stdio::{self, Names};
use crate::task::{Container, Phase, Process};
use crate::users::PodUsers;
use crate::verity;

/// A container's own directory: config.json, libcontainer's state, the mount point of the root.
pub fn directory(id: &str) -> PathBuf {
    Path::new(CONTAINERS_DIR).join(id)
}

/// Something done that has to be undone if a later step fails.
enum Undo {
    Rootfs(Rootfs),
    Disk(String),
    Volumes(Vec<PathBuf>),
    Mirrors(Vec<String>),
    Cgroup(Cgroup),
}

impl Guest {
    /// Creates a container; its program is not executed before [`Guest::start_init`]. Returns the pid of its process.
    ///
    /// # Errors
    /// [`GuestError`]; nothing of it is left.
    pub async fn create(self: &Arc<Self>, id: &str, config: &[u8], names: Names) -> Result<u32, GuestError> {
        let id = ContainerId::new(id).map_err(|error| GuestError::Request(error.to_string()))?;
        let id = id.as_str();
        stdio::check(&names).map_err(|error| GuestError::Stdio(label(id, ""), error))?;
        let config: Config =
            serde_json::from_slice(config).map_err(|error| GuestError::Request(format!("container {id}: {error}")))?;
        let users = match config.users {
            Some(users) => Some(self.pod_users(users).await?),
            None => None,
        };
        let joined = Joined {
            hostname: self.hostname.get().cloned().unwrap_or_default(),
            pids: if config.pod_pids { Some(self.pod_pids(users.map(PodUsers::path)).await?) } else { None },
            users: users.map(PodUsers::path),
        };
        let mut plan = spec::plan(config.spec, id, names.terminal, &joined)
            .map_err(|error| GuestError::Spec(label(id, ""), error))?;
        plan.owner = self.outside(plan.owner);
        self.reserve(id)?;

        let mut undo = Vec::new();
        let created =
            self.create_reserved(id, plan, (config.rootfs, config.disks), config.mirrors, names, &mut undo).await;
        match created {
            Ok((container, ended)) => {
                let pid = container.init.pid;
                self.table().insert(id.to_owned(), Some(container));
                let (guest, id) = (self.clone(), id.to_owned());
                tokio::spawn(async move {
                    if let Ok(ended) = ended.await {
                        guest.init_ended(&id, ended);
                    }
                });
                Ok(pid)
            }
            Err(error) => {
                self.undo(id, undo).await;
                self.table().remove(id);
                Err(error)
            }
        }
    }

    fn upper_limit(&self, id: &str, bytes: u64) -> Result<Limit, GuestError> {
        let device = self.limited_disk.get().cloned();
        let device = device
            .ok_or_else(|| GuestError::Lacking(format!("limit the upper of {}", label(id, "")), features::QUOTA))?;
        // 0 is the project of what belongs to none, and a number is never used twice.
        let project = u32::try_from(self.serial() + 1).unwrap_or(u32::MAX);
        Ok(Limit { device, project, bytes })
    }

    /// From now on what is damaged in verified layers is told.
    fn watch_layers(self: &Arc<Self>, id: &str) -> Result<(), GuestError> {
        if !verity::supported() {
            return Err(GuestError::Lacking(format!("verify the layers of {}", label(id, "")), features::VERITY));
        }
        if self.layers_watched.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let damage =
            verity::Watch::new().map_err(|error| GuestError::System("listen for damage of layers".into(), error))?;
        let guest = self.clone();
        let tell = move |image, block| guest.events.push(What::Damage(Damage { image, block, ..Default::default() }));
        drop(tokio::spawn(damage.run(tell)));
        Ok(())
    }

    fn reserve(&self, id: &str) -> Result<(), GuestError> {
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(GuestError::Exists(label(id, "")));
        }
        if table.len() >= MAX_ENTRIES {
            return Err(GuestError::Full(label(id, ""), "there are too many containers"));
        }
        table.insert(id.to_owned(), None);
        Ok(())
    }

    async fn create_reserved(
        self: &Arc<Self>,
        id: &str,
        plan: Plan,
        (rootfs, disks): (Rootfs, Vec<Disk>),
        mirrors: Vec<Mirror>,
        names: Names,
        undo: &mut Vec<Undo>,
    ) -> Result<(Container, oneshot::Receiver<Ended>), GuestError> {
        let state = directory(id).join("state");
        fs::create_dir_all(&state).map_err(|error| GuestError::System(format!("create {}", state.display()), error))?;

        let users = match self.pod_users_file() {
            Some(users) if rootfs.mapped => Some(users?),
            None if rootfs.mapped => {
                return Err(GuestError::Request(format!("container {id}: mapped layers, but no users")));
            }
            _ => None,
        };
        let limit = rootfs.upper_bytes.map(|bytes| self.upper_limit(id, bytes)).transpose()?;
        if rootfs.lowers.iter().any(|lower| !lower.verity.is_empty()) {
            self.watch_layers(id)?;
        }
        // The host is dialled while the file systems are mounted.
        let mounting = {
            let (table, id, rootfs) = (self.lowers.clone(), id.to_owned(), rootfs.clone());
            blocking(move || mount::mount_rootfs(&table, &id, &rootfs, users.as_ref(), limit.as_ref()))
        };
        let connecting = self.streams(id, "", &names, plan.owner);
        let (mounted, connected) = tokio::join!(mounting, connecting);
        mounted.map_err(|error| GuestError::Mount(label(id, ""), error))?;
        undo.push(Undo::Rootfs(rootfs.clone()));
        let (streams, stdio) = connected?;
        let mut serials = Vec::new();
        for disk in disks {
            let users = self.pod_users_file().transpose()?;
            let (table, serial) = (self.disks.clone(), disk.serial.clone());
            let mounted = blocking(move || table.acquire(&disk, users.as_ref())).await;
            mounted.map_err(|error| GuestError::Mount(label(id, ""), error))?;
            undo.push(Undo::Disk(serial.clone()));
            serials.push(serial);
        }
        let entered = volumes_of(&plan.spec);
        undo.push(Undo::Volumes(entered.clone()));
        let entering = entered.clone();
        blocking(move || mount::enter_volumes(&entering)).await;
        let mut volumes = Vec::new();
        for mirror in mirrors {
            let made = blocking(move || mirror::create(&mirror.volume, &mirror.data).map(|()| mirror.volume)).await;
            let made =
                made.map_err(|error| GuestError::System(format!("copy a volume of {}", label(id, "")), error))?;
            undo.push(Undo::Mirrors(vec![made.clone()]));
            volumes.push(made);
        }

        let cgroup_error = |error| GuestError::Cgroup(label(id, ""), error);
        let cgroup = Cgroup::create(&plan.cgroup).map_err(cgroup_error)?;
        undo.push(Undo::Cgroup(cgroup.clone()));
        if let Some(resources) = &plan.resources {
            cgroup.apply(resources).map_err(cgroup_error)?;
        }
        set_sysctls(plan.sysctls.iter().map(|(name, value)| (name, value)))?;

        let job = Job {
            id: id.to_owned(),
            state: state.clone(),
            console: streams.console(),
            operation: Operation::Create { bundle: directory(id) },
            execute: plan.execute,
        };
        write_json(&directory(id).join("config.json"), &plan.spec)?;
        let job_file = directory(id).join("job.json");
        write_json(&job_file, &job)?;

        let start = self.reaper.start();
        let spawn_error = |error| GuestError::Spawn(label(id, ""), error);
        let (pid, report) = spawn::run(&self.program, &job_file, stdio, &start).await.map_err(spawn_error)?;
        let io = streams.finish(id, "")?;

        let ended = start.watch(pid);
        let mut init = Process::new(names);
        init.pid = pid;
        init.io = io;
        let container = Container {
            init,
            execs: Default::default(),
            files: None,
            memory_watch: self.watch_memory(id, &cgroup),
            cgroup,
            rootfs,
            disks: serials,
            volumes: entered,
            mirrors: volumes,
            defaults: plan.defaults,
            report: Some(report),
            paused: false,
            oom_kills: 0,
            last_stats: None,
            init_ended: None,
            init_code: None,
            state,
        };
        Ok((container, ended))
    }

    fn watch_memory(self: &Arc<Self>, id: &str, cgroup: &Cgroup) -> AbortHandle {
        let (guest, id, cgroup) = (self.clone(), id.to_owned(), cgroup.clone());
        let watch = async move {
            cgroup.watch_memory(|| guest.memory_changed(&id)).await;
        };
        tokio::spawn(watch).abort_handle()
    }

    /// Lets the main process execute its program. Returns its pid.
    ///
    /// # Errors
    /// [`GuestError`]. When there is no such program the container has ended, with status 127 or 126.
    pub async fn start_init(&self, id: &str) -> Result<u32, GuestError> {
        if self.events.is_full() {
            return Err(GuestError::Full(label(id, ""), "the host does not take note of events"));
        }
        self.cpus.up().await;
        let (pid, state, report) = self.with(id, |container| {
            let report = match (container.init.phase, container.init_ended) {
                (Phase::Created, None) => container.report.take(),
                (Phase::Created | Phase::Stopped(_), _) => {
                    return Err(GuestError::State(format!("start {}", label(id, "")), "its process has ended"));
                }
                _ => None,
            };
            let already = || GuestError::State(format!("start {}", label(id, "")), "it is running already");
            let report = report.ok_or_else(already)?;
            container.init.phase = Phase::Running;
            Ok((container.init.pid, container.state.join(id), report))
        })?;
        let started = match notify(state) {
            Ok(()) => report.executed().await,
            Err(error) => Err(error),
        };
        if let Err(error) = &started {
            let code = if let SpawnError::NotExecuted { code, .. } = error { u32::try_from(*code).ok() } else { None };
            // The process exits by itself, or it is killed here; either way its end is told.
            let _ = self.with(id, |container| {
                container.init_code = code;
                self.kill_rest(id, &container.cgroup);
                Ok(())
            });
        }
        started.map(|()| pid).map_err(|error| GuestError::Spawn(label(id, ""), error))
    }

    /// Removes a container that has ended, or that was never started. Returns its pid and how it ended.
    ///
    /// # Errors
    /// [`GuestError`]
    pub async fn delete(&self, id: &str) -> Result<(u32, Ended), GuestError> {
        let busy = || GuestError::State(format!("delete {}", label(id, "")), "it has not ended");
        let mut exit = self.with(id, |container| match container.init.phase {
            Phase::Stopped(_) => Ok(container.init.exit()),
            Phase::Created => {
                self.kill_rest(id, &container.cgroup);
                Ok(container.init.exit())
            }
            _ => Err(busy()),
        })?;
        // At once, unless the process had still to be killed. The container keeps the sender.
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|ended| *ended).ok_or_else(busy)?;
        let container = match self.table().get_mut(id) {
            Some(place) => place.take(),
            None => None,
        };
        let container = container.ok_or_else(|| GuestError::NotFound(label(id, "")))?;
        let pid = container.init.pid;
        let mut undo = vec![Undo::Rootfs(container.rootfs.clone())];
        undo.extend(container.disks.iter().cloned().map(Undo::Disk));
        undo.push(Undo::Volumes(container.volumes.clone()));
        undo.push(Undo::Mirrors(container.mirrors.clone()));
        undo.push(Undo::Cgroup(container.cgroup.clone()));
        drop(container);
        self.undo(id, undo).await;
        self.table().remove(id);
        Ok((pid, ended))
    }

    /// Backwards, and as far as it goes: what fails is said on the console.
    async fn undo(&self, id: &str, mut undo: Vec<Undo>) {
        while let Some(step) = undo.pop() {
            match step {
                Undo::Cgroup(cgroup) => {
                    if let Err(error) = cgroup.remove().await {
                        crate::say!("remove cgroup of container {id}: {}", crate::console::chain(&error));
                    }
                }
                Undo::Mirrors(volumes) => {
                    blocking(move || volumes.iter().for_each(|volume| mirror::remove(volume))).await
                }
                Undo::Volumes(volumes) => blocking(move || mount::leave_volumes(&volumes)).await,
                Undo::Disk(serial) => {
                    let table = self.disks.clone();
                    blocking(move || table.release(&serial)).await;
                }
                Undo::Rootfs(rootfs) => {
                    let (table, id) = (self.lowers.clone(), id.to_owned());
                    blocking(move || mount::unmount_rootfs(&table, &id, &rootfs)).await;
                }
            }
        }
        if let Err(error) = forget(&directory(id)) {
            crate::say!("remove files of container {id}: {error}");
        }
    }
}

/// The volumes that a container has of the share itself, and not of a copy.
fn volumes_of(spec: &Spec) -> Vec<PathBuf> {
    let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_ref());
    sources.filter(|source| source.starts_with(VOLUMES_DIR)).cloned().collect()
}

/// Removes a container's directory. A root that is still mounted there is not descended into.
fn forget(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name() == "rootfs" {
            continue;
        }
        if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path())? } else { fs::remove_file(entry.path())? }
    }
    fs::remove_dir(directory)
}

/// Tells the main process to go on. libcontainer changes the working directory for a moment, which nothing here uses.
fn notify(state: PathBuf) -> Result<(), SpawnError> {
    let start = || libcontainer::container::Container::load(state)?.start();
    start().map_err(|error| SpawnError::Failed(crate::console::chain(&error), String::new()))
}

/// Sets kernel parameters of the guest as a whole.
///
/// # Errors
/// [`GuestError::System`] names the first that cannot be set.
pub fn set_sysctls<'a>(sysctls: impl IntoIterator<Item = (&'a String, &'a String)>) -> Result<(), GuestError> {
    for (name, value) in sysctls {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        let plain = !name.contains("..") && !name.starts_with('/');
        let written = if plain { fs::write(&path, value) } else { Err(io::ErrorKind::InvalidInput.into()) };
        written.map_err(|error| GuestError::System(format!("set sysctl {name}"), error))?;
    }
    Ok(())
}

/// Writes a file of the agent's own.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), GuestError> {
    let bytes = serde_json::to_vec(value).map_err(io::Error::from);
    bytes
        .and_then(|bytes| fs::write(path, bytes))
        .map_err(|error| GuestError::System(format!("write {}", path.display()), error))
}

/// Runs something that blocks on a thread of its own.
async fn blocking<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    spawn_blocking(act).await.expect("the closure does not panic, and nobody cancels it")
}
