//! What the sandbox decides to do, done: each function is one request, from the checks on the host to the guest's word.
//!
//! They run as tasks of their own beside the [`crate::driver`], own what they need, and leave nothing behind when they
//! fail. None of them changes the sandbox's state.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nacelle_protocol::agent::{Container, Rootfs, Users};
use nacelle_protocol::ids::ContainerId;
use nacelle_protocol::processor;
use nacelle_rootfs::plan::{self, Mount};
use oci_spec::runtime::{Hooks, LinuxResources, Process};
use tokio::sync::mpsc;

use crate::annotations::{PATCHES, Wishes};
use crate::bundle::{Bundle, Role};
use crate::config::{Config, Node};
use crate::disks::Disks;
use crate::export::Export;
use crate::files;
use crate::guest::GuestEvent;
use crate::hooks;
use crate::mounted::Root;
use crate::network;
use crate::patches::{Patches, PatchesError};
use crate::pod::{Env, Host, Linked, Pod, PodError, Start, blocking, link_layers};
use crate::sandbox::{KILLED, ProcessKey, Refusal};
use crate::sources::Sources;
use crate::spec::{self, SpecError, Translation, Volume};
use crate::stdio::{Io, Owner, Wanted};
use crate::task::{Create, Exec, TaskError};
use crate::vm;
use crate::volumes;

/// How long output may take to be read before a process is forgotten.
const DRAIN: Duration = Duration::from_secs(10);

/// What the shim remembers of a container.
#[derive(Clone, Debug)]
pub struct Local {
    /// containerd's directory.
    pub bundle: PathBuf,
    /// The root file system's mounts, as they were asked for.
    pub rootfs: Vec<Mount>,
    /// Process id of the main process in the guest. A pod's sandbox has none: its namespaces are the guest's own, so there
    /// is nothing that a process would have to hold.
    pub guest_pid: Option<u32>,
    /// Where what it writes goes.
    pub export: Option<Arc<Export>>,
    /// It is no pod's: its files are those of the VMM's root.
    alone: bool,
    hooks: Option<Hooks>,
    version: String,
    annotations: HashMap<String, String>,
    volumes: Vec<String>,
    /// Names of layers' directories that the guest is shown.
    data: Vec<String>,
    /// Named volumes that it uses, as long as it is there.
    _holds: Vec<Arc<File>>,
}

impl Local {
    fn new(bundle: &Bundle, rootfs: &[Mount], volumes: &[Volume]) -> Self {
        Self {
            hooks: bundle.hooks().cloned(),
            version: bundle.spec.version().clone(),
            annotations: bundle.annotations().clone(),
            volumes: volumes.iter().map(|volume| volume.name.clone()).collect(),
            data: Vec::new(),
            _holds: Vec::new(),
            guest_pid: None,
            export: None,
            alone: bundle.role == Role::Single,
            bundle: bundle.dir.clone(),
            rootfs: rootfs.to_vec(),
        }
    }

    fn hook_state(&self, id: &ContainerId, status: &'static str, pid: u32) -> hooks::State {
        hooks::State {
            version: self.version.clone(),
            id: id.to_string(),
            status,
            pid,
            bundle: self.bundle.clone(),
            annotations: self.annotations.clone(),
        }
    }
}

/// A container that has been created.
#[derive(Debug)]
pub struct Created {
    /// What to remember.
    pub local: Local,
    /// Its streams.
    pub io: Io,
    /// As containerd knows it: the VMM's.
    pub pid: u32,
}

fn owner(env: &Env, container: &ContainerId) -> Owner {
    Owner { namespace: env.namespace.to_string(), container: container.to_string() }
}

fn log_dropped(id: &ContainerId, dropped: &[String]) {
    for what in dropped {
        tracing::info!("container {id}: not carried into the VM: {what}");
    }
}

/// The changes to a container's root that the node and the pod want. A pause container has no root that anybody would
/// change, and its image not the files that patches are for.
fn patches(config: &Config, bundle: &Bundle, wishes: &Wishes) -> Result<Patches, PatchesError> {
    if bundle.role == Role::Sandbox {
        return Ok(Patches::default());
    }
    let annotation = wishes.patches.as_deref().map(|json| (PATCHES, json));
    Patches::read(config.patches.as_deref(), annotation, &config.annotations.host_paths)
}

/// Boots the pod with its first container in it.
///
/// # Errors
/// [`TaskError`]; everything is rolled back.
pub async fn create_first(
    env: Arc<Env>,
    id: ContainerId,
    request: Create,
) -> Result<(Arc<Pod>, mpsc::Receiver<GuestEvent>, Created), TaskError> {
    let begin = Instant::now();
    let mut config = request.origin.as_ref().unwrap_or(&env.origin).load()?;
    let bundle = match &request.sandbox {
        Some(sandbox) => Bundle::parse(&request.bundle, &sandbox.config)?,
        None => Bundle::load(&request.bundle)?,
    };
    if matches!(bundle.role, Role::Container(_)) {
        // It belongs into a pod whose first container, and whose VM with it, is not there.
        return Err(TaskError::Refused(Refusal::VmGone, ProcessKey { container: id, exec: None }));
    }
    let wishes = config.annotations.read(bundle.annotations())?;
    config.kernel = wishes.kernel.clone().or(config.kernel);
    let node = Node { exe: &env.exe, kvm: &env.kvm, faults: Path::new(processor::FAULTS) };
    let programs = config.programs(node, &bundle.network)?;
    let patches = patches(&config, &bundle, &wishes)?;
    let sources = Sources::read(&bundle, &wishes, &config)?;
    let (mut translation, root) = match bundle.role {
        Role::Sandbox => (None, None),
        _ => {
            let root = sources.root(&request.rootfs, &patches, &config, bundle.role == Role::Single)?;
            (Some(spec::translate(&bundle.spec, &id, None)?), Some(root))
        }
    };
    let (wanted, policy) = (sources.disks(root.as_ref()), config.annotations.clone());
    let disks = blocking("attach disks", move || Disks::attach(&wanted, |path| policy.allows(path))).await?;
    let root_disk = match &root {
        Some(Root::Disk(wanted)) => Some(disks.find(wanted).map_err(PodError::from)?),
        _ => None,
    };
    let holds = match &mut translation {
        Some(translation) => sources.place(&id, translation, &disks).map_err(PodError::from)?,
        None => Vec::new(),
    };
    translation.iter().for_each(|translation| log_dropped(&id, &translation.dropped));
    let volumes = translation.as_ref().map(|translation| translation.volumes.clone()).unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let size = vm::size(&bundle, &config, cpus, &wishes)?;
    let users = bundle.spec.linux().as_ref().map(spec::users).transpose()?.flatten();
    // Files whose ids are mapped would be mapped once more in the next task.
    let exports = config.export && plan::ids(&request.rootfs)?.is_none();

    let settings = config.clone();
    let (claim_env, found) = (env.clone(), programs.clone());
    let mut host = blocking("prepare pod", move || Host::claim(&claim_env, config, &found, disks, begin)).await?;
    // The lowers are converted while the VM boots: the guest finds them in its share when it needs them.
    let dirs = host.dirs.clone();
    let (name, record, alone) = (id.to_string(), host.record.clone(), exports.then(|| bundle.clone()));
    let convert = move || {
        let resolved = root.map(|root| root.resolve(&dirs.mounted(&name))).transpose()?.flatten();
        let Some((plan, _mounted)) = resolved else {
            return Ok((Linked { disk: root_disk, ..Linked::default() }, None));
        };
        let layers = link_layers(&settings, &dirs, &name, &plan, &patches, &record)?;
        let export = alone.map(|bundle| Export::of(&bundle, &plan, size.upper_mib << 20)).transpose()?;
        Ok::<_, PodError>((layers, export.flatten()))
    };
    let layers = tokio::spawn(blocking("convert layers", convert));
    let equip = {
        let (bundle, volumes) = (bundle.clone(), volumes.clone());
        let files = request.sandbox.as_ref().map(|sandbox| sandbox.files.clone()).unwrap_or_default();
        blocking("prepare pod", move || {
            let written = host.dirs.write_etc(&files).map_err(PodError::from);
            let listeners = written.and_then(|()| host.equip(&bundle, size, &volumes));
            host.record.phase("prepare", begin);
            Ok::<_, PodError>((host, listeners))
        })
    };
    let (host, listeners) = equip.await?;
    let host = Arc::new(host);
    // A container that is alone brings all of its volumes with it.
    let share = bundle.role == Role::Sandbox || !volumes.is_empty();
    let mut local = Local { _holds: holds, ..Local::new(&bundle, &request.rootfs, &volumes) };
    let hooks = local.hooks.as_ref().map(|hooks| (hooks, local.hook_state(&id, "creating", 0)));
    let booted = async {
        let start = Start { programs: &programs, bundle: &bundle, size, users, volumes: share, hooks };
        let boot = Pod::boot(&env, host.clone(), listeners?, start);
        let (pod, events) = boot.await?;
        Ok::<_, TaskError>((Arc::new(pod), events))
    };
    // The conversion cannot be interrupted, and must not write into a directory that is being removed.
    let (booted, layers) = tokio::join!(booted, layers);
    let layers = layers.unwrap_or(Err(PodError::Worker("convert layers"))).map(|(layers, export)| {
        local.export = export;
        layers
    });
    let (pod, events) = match booted {
        Ok(booted) => booted,
        Err(e) => {
            let remove = move || {
                host.remove();
                Ok::<_, PodError>(())
            };
            if let Err(e) = blocking("remove pod", remove).await {
                tracing::error!("{}", crate::chain(&e));
            }
            return Err(e);
        }
    };
    match finish(&env, &pod, id, local, translation, layers, request.io).await {
        Ok(created) => Ok((pod, events, created)),
        Err(e) => {
            pod.stop().await;
            Err(e)
        }
    }
}

/// Creates one more container in a pod that runs.
///
/// # Errors
/// [`TaskError`]; everything is rolled back.
pub async fn create_next(env: Arc<Env>, pod: Arc<Pod>, id: ContainerId, request: Create) -> Result<Created, TaskError> {
    let exists = || TaskError::Refused(Refusal::Exists, ProcessKey { container: id.clone(), exec: None });
    if request.sandbox.is_some() {
        return Err(exists());
    }
    let bundle = Bundle::load(&request.bundle)?;
    if bundle.role == Role::Sandbox {
        return Err(exists());
    }
    // The VM is as it is: they must be in order, and change no more than this container's root.
    let wishes = pod.host.policy().read(bundle.annotations())?;
    let mut translation = spec::translate(&bundle.spec, &id, Some(&env.sandbox))?;
    if translation.users != pod.users {
        return Err(SpecError::PodUsers("container").into());
    }
    translation.add_pods_files(&id, &pod.host.dirs.etc());
    log_dropped(&id, &translation.dropped);
    let patches = patches(pod.host.config(), &bundle, &wishes)?;
    let sources = Sources::read(&bundle, &wishes, pod.host.config())?;
    let root = sources.root(&request.rootfs, &patches, pod.host.config(), false)?;
    let root_disk = match &root {
        Root::Disk(wanted) => Some(pod.host.disks.find(wanted).map_err(PodError::from)?),
        _ => None,
    };
    let holds = sources.place(&id, &mut translation, &pod.host.disks).map_err(PodError::from)?;
    let (host, mut volumes) = (pod.host.clone(), translation.volumes.clone());
    let name = id.to_string();
    let pid = pod.vm.pid();
    let layers = blocking("prepare container", move || {
        volumes.iter_mut().for_each(|volume| volume.or_pods_own(&host.dirs.etc()));
        let degraded = volumes::bind_later(&host.vmm, pid, &host.dirs.volumes(), &volumes, host.idmap())?;
        host.record.set(|status| status.degraded.extend(degraded));
        match root.resolve(&host.dirs.mounted(&name))? {
            Some((plan, _mounted)) => link_layers(host.config(), &host.dirs, &name, &plan, &patches, &host.record),
            None => Ok(Linked { disk: root_disk, ..Linked::default() }),
        }
    });
    let layers = layers.await;
    let local = Local { _holds: holds, ..Local::new(&bundle, &request.rootfs, &translation.volumes) };
    let names = local.volumes.clone();
    let created = async {
        if let Some(hooks) = &local.hooks {
            hooks::created(hooks, &local.hook_state(&id, "creating", pid)).await?;
        }
        finish(&env, &pod, id, local, Some(translation), layers, request.io).await
    };
    let created = created.await;
    if created.is_err() {
        unbind_all(&pod, names).await;
    }
    created
}

/// The common end of both ways. Without a translation there is nothing to be made in the guest.
async fn finish(
    env: &Env,
    pod: &Arc<Pod>,
    id: ContainerId,
    mut local: Local,
    translation: Option<Translation>,
    layers: Result<Linked, PodError>,
    wanted: Wanted,
) -> Result<Created, TaskError> {
    let pid = pod.vm.pid();
    let limit = pod.host.upper_limit(pod.host.policy().read(&local.annotations)?.container_mib)?;
    let io = Io::open(&pod.hub, &owner(env, &id), &wanted).await?;
    let Linked { lowers, data, disk } = layers?;
    let Some(Translation { mut spec, pod_pids, users, volumes, disks, .. }) = translation else {
        pod.host.record.write();
        return Ok(Created { local, io, pid });
    };
    let ids = plan::ids(&local.rootfs)?.map(|ids| Users { first: ids.first, count: ids.count });
    if ids.is_some() && ids != users {
        return Err(SpecError::PodUsers("root file system").into());
    }
    if !data.is_empty() {
        local.data = data.iter().map(|(name, _)| name.clone()).collect();
        let lender = pod.clone();
        blocking("show layers", move || lender.lend(&data)).await?;
    }
    pod.follow(&volumes)?;
    let watching = pod.clone();
    let mirrors = move || Ok::<_, PodError>(watching.mirrors.add(&watching.guest, &volumes));
    let mirrors = blocking("watch volumes", mirrors).await?;
    spec::use_mirrors(&mut spec, &mirrors);
    // What a container writes to a disk is bounded by the disk.
    let limit = limit.filter(|_| disk.is_none());
    let rootfs = Rootfs { lowers, disk, upper_bytes: limit, mapped: ids.is_some() };
    let container = Container { spec, rootfs, pod_pids, users, mirrors, disks };
    let create = async { Ok::<_, TaskError>(pod.guest.create(&id, &container, wanted.terminal, io.names()).await?) };
    let asked = Instant::now();
    let (created, ()) = tokio::join!(pod.while_alive(create), show_files(pod, &id, local.alone));
    if created.is_err() {
        pod.mirrors.remove(&local.volumes);
        take_back(pod, local.data.clone()).await;
    }
    local.guest_pid = Some(created?);
    pod.mirrors.settle(&pod.guest, &container.mirrors).await;
    pod.host.record.phase(&format!("create {id}"), asked);
    pod.host.record.write();
    Ok(Created { local, io, pid })
}

/// Nobody is refused a container because its files cannot be seen from the host.
async fn show_files(pod: &Arc<Pod>, id: &ContainerId, alone: bool) {
    if !alone || !pod.host.config().proc_root {
        return;
    }
    if let Err(e) = files::show(pod, id).await {
        let why = crate::chain(&e);
        tracing::warn!("container {id}: /proc/{}/root does not show its files: {why}", pod.vm.pid());
        pod.host.record.set(|status| status.degraded.push(why));
    }
}

/// Registers an exec.
///
/// # Errors
/// [`TaskError`].
pub async fn exec(env: Arc<Env>, pod: Arc<Pod>, key: ProcessKey, request: Exec) -> Result<Io, TaskError> {
    let decode = |source| TaskError::Decode { what: "process of the exec", source };
    let process: Process = serde_json::from_slice(&request.process).map_err(decode)?;
    let mut dropped = Vec::new();
    let process = spec::process(&process, &mut dropped);
    log_dropped(&key.container, &dropped);
    let io = Io::open(&pod.hub, &owner(&env, &key.container), &request.io).await?;
    pod.guest.exec(&key, process.to_string().into_bytes(), request.io.terminal, io.names()).await?;
    Ok(io)
}

/// Starts a process. Returns its process id as containerd shall know it.
///
/// # Errors
/// [`TaskError`].
pub async fn start(pod: Arc<Pod>, key: ProcessKey, local: Option<Local>) -> Result<u32, TaskError> {
    if pod.unwired && key.exec.is_none() {
        // `ctr run --cni` adds one between Create and Start. Without it the container would be silently alone.
        network::expect_none(pod.vm.pid()).await.map_err(PodError::from)?;
    }
    let pid = pod.vm.pid();
    if let Some(export) = local.as_ref().and_then(|local| local.export.as_ref()).filter(|_| key.exec.is_none()) {
        export.begin().await;
    }
    if key.exec.is_some() || local.as_ref().is_none_or(|local| local.guest_pid.is_some()) {
        let start = async { Ok::<_, TaskError>(pod.guest.start(&key).await?) };
        let guest_pid = pod.while_alive(start).await?;
        if key.exec.is_some() {
            return Ok(guest_pid);
        }
    }
    if let Some((hooks, local)) = local.as_ref().and_then(|l| l.hooks.as_ref().map(|h| (h, l))) {
        // The process runs; a hook that fails now changes nothing any more.
        let state = local.hook_state(&key.container, "running", pid);
        if let Err(e) = hooks::run("poststart", hooks.poststart().as_ref(), &state).await {
            tracing::warn!("{}", crate::chain(&e));
        }
    }
    Ok(pid)
}

/// Exit status of a sandbox that gets a signal, if it ends: that of Kubernetes' pause, which takes SIGINT and SIGTERM for the
/// end and, as the first process of its namespace, hears of no other signal but SIGKILL.
pub fn sandbox_status(signal: u32) -> Option<u32> {
    match signal {
        2 | 15 => Some(0),
        9 => Some(KILLED),
        _ => None,
    }
}

/// Stops a container's processes, and brings its snapshot up to date.
///
/// # Errors
/// [`TaskError`]; the container goes on.
pub async fn pause(pod: Arc<Pod>, id: ContainerId, local: Option<Local>) -> Result<(), TaskError> {
    pod.guest.pause(&id).await?;
    let Some(export) = local.and_then(|local| local.export) else { return Ok(()) };
    let exported = pod.while_alive(async { Ok::<_, TaskError>(export.run(&pod, &id).await?) }).await;
    if exported.is_err()
        && let Err(e) = pod.guest.resume(&id).await
    {
        tracing::error!("container {id} stays paused: {}", crate::chain(&e));
    }
    exported
}

/// Changes a container's limits.
///
/// # Errors
/// [`TaskError`].
pub async fn update(pod: Arc<Pod>, id: ContainerId, resources: Vec<u8>) -> Result<(), TaskError> {
    let decode = |source| TaskError::Decode { what: "resources", source };
    let resources: LinuxResources = serde_json::from_slice(&resources).map_err(decode)?;
    let mut dropped = Vec::new();
    let resources = spec::resources(&resources, &mut dropped);
    log_dropped(&id, &dropped);
    pod.guest.update(&id, resources.to_string().into_bytes()).await?;
    Ok(())
}

/// Forgets a process; without a pod, only on the host.
///
/// # Errors
/// [`TaskError`].
pub async fn delete(
    pod: Option<Arc<Pod>>,
    key: ProcessKey,
    io: Option<Io>,
    local: Option<Local>,
) -> Result<(), TaskError> {
    if let Some(io) = io {
        io.drain(DRAIN).await;
    }
    if let Some(export) = local.as_ref().and_then(|local| local.export.as_ref()) {
        export.close(pod.as_deref(), &key.container).await;
    }
    if let Some(pod) = &pod {
        let delete = async { Ok::<_, TaskError>(pod.guest.delete(&key).await?) };
        tokio::select! {
            result = delete => result?,
            // Gone with its VM.
            () = pod.vm.gone() => {}
        }
    }
    let Some(local) = local else { return Ok(()) };
    if let Some(pod) = pod {
        unbind_all(&pod, local.volumes.clone()).await;
        take_back(&pod, local.data.clone()).await;
        pod.host.record.forget(key.container.as_str());
        pod.host.record.write();
    }
    if let Some(hooks) = &local.hooks {
        let state = local.hook_state(&key.container, "stopped", 0);
        if let Err(e) = hooks::run("poststop", hooks.poststop().as_ref(), &state).await {
            tracing::warn!("{}", crate::chain(&e));
        }
    }
    Ok(())
}

/// The guest needs these directories of layers no more.
async fn take_back(pod: &Arc<Pod>, names: Vec<String>) {
    unbind(pod.host.dirs.data(), names).await;
}

async fn unbind_all(pod: &Arc<Pod>, names: Vec<String>) {
    pod.mirrors.remove(&names);
    unbind(pod.host.dirs.volumes(), names).await;
}

async fn unbind(share: PathBuf, names: Vec<String>) {
    if names.is_empty() {
        return;
    }
    let work = move || {
        names.iter().for_each(|name| volumes::unbind(&share, name));
        Ok::<_, PodError>(())
    };
    if let Err(e) = blocking("unbind volumes", work).await {
        tracing::error!("{}", crate::chain(&e));
    }
}
