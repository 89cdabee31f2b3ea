//! The pod on the host and in its VM: set up step by step, taken down in the reverse order.
//!
//! ```text
//!  Host::claim   directories, range of ids                                   ─┐ undone by
//!  Host::equip   upper disk, volumes, cgroup, sockets, network namespace       │ Host::remove
//!  Pod::boot     VMM ─► jail ─► kernel ─► agent dials ─► Configure            ─┘ Pod::stop
//!                interfaces are redirected meanwhile; the kernel waits for it
//! ```
//!
//! A namespace that somebody has made is looked at while the VMM builds its jail. One of the VMM's own has interfaces only
//! where a hook puts some there; hooks are told of a process in it, so they run when the VMM is there, and the kernel waits
//! for them.
//!
//! Each step consumes the one before, so a wrong order does not compile. `state.json` is written before there is
//! anything that a crash could leave behind, and again when the VMM runs.

use std::collections::HashMap;
use std::io::{self, PipeWriter};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nacelle_protocol::agent::{Disk, Lower, Users, Verity};
use nacelle_protocol::features;
use nacelle_protocol::ids::SandboxId;
use nacelle_protocol::vm::{Network, Nics};
use nacelle_rootfs::cache::{Cache, CacheError, Missing};
use nacelle_rootfs::changes::ChangesError;
use nacelle_rootfs::plan::RootfsPlan;
use nacelle_rootfs::{Layer, Limits, Lower as Source, Outcome, program, upper};
use oci_spec::runtime::Hooks;
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::arrivals;
use crate::bundle::{Bundle, Role};
use crate::cgroup::CgroupError;
use crate::conduct::Conduct;
use crate::config::{self, Config, Idmap, Origin, Programs};
use crate::disks::DiskError;
use crate::files::FilesError;
use crate::guest::{Guest, GuestError, GuestEvent};
use crate::hooks::{self, HookError};
use crate::mirror::Mirrors;
use crate::mounted::MountedError;
use crate::network::forward::{self, Doors};
use crate::network::{Netns, NetworkError};
use crate::patches::Patches;
use crate::spec::Volume;
use crate::state::{Dirs, Process, StateError};
use crate::status::Record;
use crate::stream::Hub;
use crate::vm::{self, Place, Size, Vm, VmError};
use crate::volumes::{self, VolumeError};

mod afterwards;
mod host;

pub use host::{Host, Listeners};

/// Events of the guest that may wait.
const EVENTS: usize = 256;
/// How long a killed VMM may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(2);

/// Why there is no pod.
#[derive(Debug, Error)]
pub enum PodError {
    /// Directories or ids.
    #[error(transparent)]
    State(#[from] StateError),
    /// The writable disk.
    #[error(transparent)]
    Upper(#[from] upper::UpperError),
    /// The guest's root.
    #[error(transparent)]
    Program(#[from] program::ProgramError),
    /// The lowers.
    #[error(transparent)]
    Layers(#[from] CacheError),
    /// A container's own directory.
    #[error(transparent)]
    Changes(#[from] ChangesError),
    /// Its container's files.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The volumes.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Disks of the host's.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A root that the host mounts.
    #[error(transparent)]
    Mounted(#[from] MountedError),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A hook says no.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The VMM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The agent.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// A file of the pod.
    #[error("{what} {path}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The guest broke the rules; see [`Conduct`].
    #[error("end pod: the guest breaks the rules: {0}")]
    Condemned(String),
    /// The guest does not come up.
    #[error("boot VM: nothing heard from the guest after {seconds} s (vm.boot_timeout_seconds); {words}")]
    Timeout {
        /// The deadline.
        seconds: u64,
        /// What log and console say.
        words: String,
    },
    /// A kernel that cannot do what libkrunfw's can.
    #[error(
        "lend the host's network: guest kernel {kernel} ({release}) has no TSI; libkrunfw's has, and \
         vm.host_network_kernel names it"
    )]
    NoHostNetwork {
        /// The kernel's file.
        kernel: PathBuf,
        /// What the guest says it is.
        release: String,
    },
    /// A thread for blocking work is gone.
    #[error("{0}: worker thread failed")]
    Worker(&'static str),
}

/// What a shim knows from its start.
#[derive(Debug)]
pub struct Env {
    /// containerd's namespace.
    pub namespace: SandboxId,
    /// The sandbox.
    pub sandbox: SandboxId,
    /// The shim's own program.
    pub exe: PathBuf,
    /// The host's virtual machines.
    pub kvm: PathBuf,
    /// Where sandboxes live.
    pub run_root: PathBuf,
    /// The shim's socket.
    pub socket: PathBuf,
    /// Configuration named at the start.
    pub origin: Origin,
}

/// Runs blocking work on a thread for it.
///
/// # Errors
/// [`PodError`] of the work.
pub async fn blocking<T, E>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, PodError>
where
    T: Send + 'static,
    E: Send + 'static,
    PodError: From<E>,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(PodError::Worker(what)),
    }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PodError {
    move |source| PodError::Io { what, path: path.to_owned(), source }
}

/// A root file system's layers, as the guest finds them.
#[derive(Debug, Default)]
pub struct Linked {
    /// The lowers, bottom first.
    pub lowers: Vec<Lower>,
    /// Directories that [`Pod::lend`] has to show the guest, and their names there.
    pub data: Vec<(String, PathBuf)>,
    /// The disk that is the root, instead of lowers.
    pub disk: Option<Disk>,
}

/// Brings a root file system's lowers into the pod's share.
///
/// # Errors
/// [`PodError`].
pub fn link_layers(
    config: &Config,
    dirs: &Dirs,
    container: &str,
    plan: &RootfsPlan,
    patches: &Patches,
    record: &Record,
) -> Result<Linked, PodError> {
    let begin = Instant::now();
    let verified = config.verity == config::Verity::On;
    let cache = Cache::open(&config.data_dir, Limits::default())?.with_verity(verified);
    let scratch = dirs.scratch(container);
    std::fs::create_dir_all(&scratch).map_err(io_error("create", &scratch))?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // Patches read the layers that they change; what is read in a snapshot cannot be verified.
    let index = config.index_mib > 0 && patches.is_empty() && !verified;
    let missing = if index { Missing::Index(config.index_mib << 20) } else { Missing::Convert };
    let mut layers = match patches.is_empty() {
        true => cache.acquire_merged(plan, &scratch, threads, missing)?,
        false => cache.acquire(plan, &scratch, threads, missing)?,
    };
    // What the container has written before, it has written over the patches.
    let own = match (plan.lowers.last(), layers.last()) {
        (Some(Source::Upper(_)), Some(Layer { outcome: Outcome::Ephemeral, .. })) if layers.len() > 1 => layers.pop(),
        _ => None,
    };
    patches.build(&cache, &mut layers, &scratch)?;
    layers.extend(own);
    record.layers(container, &layers);
    let layers = cache.merge(layers, &scratch)?;
    let share = dirs.layers();
    let link = |layer: &Layer| {
        let name = format!("{}.erofs", layer.key);
        if !share.join(&name).exists() {
            cache.link_into(layer, &share, &name)?;
        }
        Ok::<_, CacheError>(name)
    };
    let tree = |layer: &Layer| {
        let verity = layer.verity.clone()?;
        Some(Verity { blocks: verity.blocks, root: verity.root })
    };
    let mut data = Vec::new();
    let lower = |layer: &Layer| {
        let devices = layer.devices.iter().map(link).collect::<Result<_, _>>()?;
        // The guest mounts files or block devices, and not one with the other.
        let trees: Option<_> = std::iter::once(layer).chain(&layer.devices).map(tree).collect();
        let verity = trees.filter(|_| verified).unwrap_or_default();
        let first = data.len();
        data.extend(layer.data.iter().zip(first..).map(|(dir, n)| (format!("{container}-{n}"), dir.clone())));
        let data = data[first..].iter().map(|(name, _)| name.clone()).collect();
        Ok::<_, CacheError>(Lower { name: link(layer)?, devices, data, verity })
    };
    let lowers = layers.iter().map(lower).collect::<Result<_, _>>()?;
    record.phase("layers", begin);
    afterwards::start(cache, &layers, config.cache_mib);
    // Their images are linked; only containers' own conversions were in there.
    std::fs::remove_dir_all(&scratch).map_err(io_error("remove", &scratch))?;
    Ok(Linked { lowers, data, disk: None })
}

/// A pod whose guest is up.
pub struct Pod {
    /// Its VM.
    pub vm: Vm,
    /// Its agent.
    pub guest: Guest,
    /// What it has on the host.
    pub host: Arc<Host>,
    /// Streams that the guest may dial.
    pub hub: Arc<Hub>,
    /// What is held against its guest.
    pub conduct: Arc<Conduct>,
    /// Volumes that the guest has in copies.
    pub mirrors: Mirrors,
    /// It has a network namespace of its own, and nothing in it.
    pub unwired: bool,
    /// The user namespace of its containers.
    pub users: Option<Users>,
    streams: tokio::task::AbortHandle,
    forwarding: Option<tokio::task::AbortHandle>,
    /// Covers what the host mounts below volumes; since a container has asked for it.
    following: Mutex<Option<PipeWriter>>,
}

/// What a pod's start is made of.
pub struct Start<'a> {
    /// The VMM, the agent and the kernel.
    pub programs: &'a Programs,
    /// Of its first container.
    pub bundle: &'a Bundle,
    /// Of the VM.
    pub size: Size,
    /// The user namespace of its containers.
    pub users: Option<Users>,
    /// The guest gets a share for volumes.
    pub volumes: bool,
    /// Those of the first container, with its state.
    pub hooks: Option<(&'a Hooks, hooks::State)>,
}

impl Pod {
    /// Starts the VMM, and returns with the guest configured, its events coming in at the receiver.
    ///
    /// # Errors
    /// [`PodError`]; there is no VM then. The host's side is left to the caller.
    pub async fn boot(
        env: &Env,
        host: Arc<Host>,
        listeners: Listeners,
        start: Start<'_>,
    ) -> Result<(Self, mpsc::Receiver<GuestEvent>), PodError> {
        let Start { programs, bundle, size, users, volumes, hooks } = start;
        let begin = Instant::now();
        let config = &host.config;
        let record = &host.record;
        let place = Place {
            uid_base: host.uid(),
            pod_root: users.map(|users| users.first),
            agent: host.agent.clone(),
            cgroups: host.cgroups.first().cloned().into_iter().collect(),
            network: bundle.network.clone(),
            wired: match bundle.network {
                Network::Join(_) => true,
                Network::New => hooks.is_some(),
                Network::Host => false,
            },
            volumes,
            disks: host.disks.devices().collect(),
        };
        let vm_config = vm::plan(&env.sandbox, size, config, programs, &host.dirs, place);
        let listener = |l: std::os::unix::net::UnixListener, path: PathBuf| {
            UnixListener::from_std(l).map_err(io_error("listen at", &path))
        };
        let rpc = listener(listeners.rpc, host.dirs.rpc_socket())?;
        let streams = listener(listeners.streams, host.dirs.stream_socket())?;
        let conduct = Arc::new(Conduct::default());
        let spawned = Vm::spawn(&programs.vmm, &vm_config, config.idmap, conduct.clone());
        let (vm, attached) = tokio::join!(spawned, host.attach(vm_config.room()));
        let vm = vm?;
        record.phase("jail", begin);
        let jailed = Instant::now();
        host.write_state(Process::find(vm.pid()))?;
        adjust_oom_score(vm.pid(), bundle);
        let hub = Arc::new(Hub::new(conduct.clone()));
        let streams = tokio::spawn(hub.clone().serve(streams)).abort_handle();
        // Somebody who has made the namespace may look for the pod's ports in it. Nothing of the start waits for it.
        let doors = match &bundle.network {
            Network::Join(_) => {
                host.netns.get().cloned().map(|netns| tokio::spawn(async move { forward::open(&netns).await }))
            }
            Network::New | Network::Host => None,
        };
        let wired = async {
            let mut attached = attached?;
            if let Some((hooks, state)) = hooks {
                hooks::created(hooks, &hooks::State { pid: vm.pid(), ..state }).await?;
                if host.netns.get().is_none() && vm_config.awaits_nics {
                    let own = PathBuf::from(format!("/proc/{}/ns/net", vm.pid()));
                    let _ = host.netns.set(Netns::open(&own)?);
                    attached = host.attach(vm_config.room()).await?;
                }
            }
            vm.connect(&Nics { nics: attached.nics }).await?;
            Ok::<_, PodError>(attached.guest)
        };
        let up = async |network| {
            let guest = Guest::accept(rpc, conduct.clone()).await?;
            record.phase("boot", jailed);
            let dialled = Instant::now();
            let hostname = bundle.spec.hostname().as_deref().unwrap_or_default();
            // Those of a container that is alone are its own affair.
            let sysctls = if bundle.role == Role::Sandbox { bundle.sysctls() } else { HashMap::new() };
            let kernel = guest.configure(hostname, sysctls, volumes, network).await?;
            record.phase("configure", dialled);
            if bundle.network == Network::Host && !kernel.has(features::HOST_NETWORK) {
                return Err(PodError::NoHostNetwork { kernel: programs.kernel.clone(), release: kernel.release });
            }
            record.set(|status| {
                status.vmm_pid = vm.pid();
                status.vcpus = size.vcpus;
                status.memory_mib = size.memory_mib;
                status.guest_kernel = kernel.release;
                status.kernel_features = kernel.features;
                status.degraded = vm.degraded();
            });
            Ok::<_, PodError>(guest)
        };
        let booted = async {
            // A hook has a time limit of its own.
            let network = wired.await?;
            timeout(config.boot_timeout, up(network)).await.unwrap_or_else(|_| {
                Err(PodError::Timeout { seconds: config.boot_timeout.as_secs(), words: vm.last_words() })
            })
        };
        let booted = tokio::select! {
            biased;
            // What the guest is condemned for also breaks the connection, and says more.
            why = conduct.condemned() => Err(PodError::Condemned(why)),
            booted = booted => booted,
            () = vm.gone() => Err(vm.why().await.into()),
        };
        match booted {
            Ok(guest) => {
                tracing::info!("VMM {} of sandbox {}: guest up after {:?}", vm.pid(), env.sandbox, begin.elapsed());
                let (sink, events) = mpsc::channel(EVENTS);
                tokio::spawn(guest.clone().events(sink));
                let forwarding = doors.map(|doors| {
                    let (guest, hub) = (guest.clone(), hub.clone());
                    tokio::spawn(forward_ports(doors, guest, hub)).abort_handle()
                });
                let unwired = bundle.network == Network::New && !vm_config.awaits_nics;
                let mirrors = Mirrors::default();
                let following = Mutex::default();
                let pod =
                    Self { vm, guest, host, hub, conduct, mirrors, unwired, users, streams, forwarding, following };
                Ok((pod, events))
            }
            Err(e) => {
                streams.abort();
                vm.kill();
                // Gone before the caller takes away what it stands on.
                let _ = timeout(KILL_DEADLINE, vm.gone()).await;
                Err(e)
            }
        }
    }

    /// Shows directories of layers to the guest, and to it alone: read-only, in the layers share. Blocks.
    ///
    /// # Errors
    /// [`PodError::Volume`]; nothing is left then.
    pub fn lend(&self, data: &[(String, PathBuf)]) -> Result<(), PodError> {
        let volume = |(name, source): &(String, PathBuf)| Volume {
            name: name.clone(),
            source: source.clone(),
            destination: "/".into(),
            recursive: false,
            read_only: true,
            follows: false,
        };
        let data: Vec<_> = data.iter().map(volume).collect();
        // A container of that name may have failed after this.
        data.iter().for_each(|volume| volumes::unbind(&self.host.dirs.data(), &volume.name));
        // Only what everybody may read is read there, so it does not matter whether ids can be mapped.
        volumes::bind_later(&self.host.vmm, self.vm.pid(), &self.host.dirs.data(), &data, Idmap::BestEffort)?;
        Ok(())
    }

    /// From now on what the host mounts below these volumes reaches the guest, if one of them is for it.
    ///
    /// # Errors
    /// [`PodError::Io`].
    pub fn follow(&self, volumes: &[Volume]) -> Result<(), PodError> {
        let mut following = self.following();
        if following.is_some() || !volumes.iter().any(|volume| volume.follows) {
            return Ok(());
        }
        let (share, host) = (self.host.dirs.volumes(), &self.host);
        let (life, end) = io::pipe().map_err(io_error("follow", &share))?;
        arrivals::follow(life, host.vmm.clone(), self.vm.pid(), share.clone(), host.idmap())
            .map_err(io_error("follow", &share))?;
        *following = Some(end);
        Ok(())
    }

    fn following(&self) -> MutexGuard<'_, Option<PipeWriter>> {
        self.following.lock().expect("nothing panics while it holds this")
    }

    /// Waits for the guest, but not longer than the VM lives, or has a right to.
    ///
    /// # Errors
    /// Those of `work`, or why the VM is gone.
    pub async fn while_alive<T, E: From<PodError>>(&self, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        tokio::select! {
            biased;
            // What the guest is condemned for also ends the work, and says more.
            why = self.conduct.condemned() => Err(PodError::Condemned(why).into()),
            result = work => result,
            () = self.vm.gone() => Err(PodError::from(self.vm.why().await).into()),
        }
    }

    /// Ends the VM and removes what the pod has on the host. May be called again.
    pub async fn stop(&self) {
        tokio::select! {
            () = self.guest.shutdown() => {}
            () = self.vm.gone() => {}
        }
        self.vm.kill();
        if timeout(KILL_DEADLINE, self.vm.gone()).await.is_err() {
            tracing::error!("VMM {} does not die", self.vm.pid());
        }
        self.hub.close();
        self.streams.abort();
        self.forwarding.iter().for_each(tokio::task::AbortHandle::abort);
        self.following().take();
        let host = self.host.clone();
        let removed = tokio::task::spawn_blocking(move || host.remove()).await;
        if removed.is_err() {
            tracing::error!("remove pod: worker thread failed");
        }
    }
}

/// A pod whose ports cannot be forwarded works all the same.
async fn forward_ports(doors: JoinHandle<Result<Doors, NetworkError>>, guest: Guest, hub: Arc<Hub>) {
    match doors.await {
        Ok(Ok(doors)) => {
            if let Err(e) = forward::serve(doors, guest, hub).await {
                tracing::warn!("forward ports: {e}");
            }
        }
        Ok(Err(e)) => tracing::warn!("no port of this pod can be forwarded: {}", crate::chain(&e)),
        // A thread that panics has said so.
        Err(_) => {}
    }
}

/// What the kernel kills first when the host runs out of memory is what the container said.
fn adjust_oom_score(pid: u32, bundle: &Bundle) {
    let Some(score) = bundle.spec.process().as_ref().and_then(|process| process.oom_score_adj()) else { return };
    if let Err(e) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
        // Not every host lets root lower it.
        tracing::debug!("adjust VMM's OOM score to {score}: {e}");
    }
}
