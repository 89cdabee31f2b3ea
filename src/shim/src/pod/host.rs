//! What a pod has on the host: directories, ids, the upper disk, volumes, a cgroup, sockets. Everything here blocks.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use nacelle_protocol::vm::{AGENT_NAME, MOUNT_POINTS, Network};
use nacelle_rootfs::{program, upper};
use rustix::fs::{Mode, OFlags, open};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

use super::{Env, PodError, io_error};
use crate::annotations::{AnnotationError, CONTAINER_MIB, Policy, refuse};
use crate::bundle::Bundle;
use crate::cgroup::{self, CgroupError};
use crate::config::{Config, Idmap, Programs};
use crate::disks::Disks;
use crate::network::{self, Attached, Netns, NetworkError, Owner};
use crate::spec::Volume;
use crate::state::{Dirs, Process, State, StateError, UidSlot};
use crate::status::Record;
use crate::vm::Size;
use crate::volumes;

/// Connections that may wait: a full backlog looks like success to a guest.
const BACKLOG: i32 = 1024;
/// Threads of a VMM, and what the jail forks while it is made; its own limit of resources is the same.
const MAX_TASKS: u64 = 1024;

/// What a pod has on the host. All of its methods block.
#[derive(Debug)]
pub struct Host {
    /// Its directories.
    pub dirs: Dirs,
    slot: UidSlot,
    pub(super) cgroups: Vec<PathBuf>,
    /// The image of the guest's root.
    pub(super) agent: PathBuf,
    label: String,
    /// The namespace whose interfaces are redirected.
    pub(super) netns: OnceLock<Netns>,
    /// A path of it, where it has one that outlives the VMM.
    netns_path: Option<PathBuf>,
    /// The VMM's program.
    pub vmm: PathBuf,
    pub(super) config: Config,
    socket: PathBuf,
    /// How the start went, for people.
    pub record: Arc<Record>,
    /// The disks that it brings with it.
    pub disks: Disks,
}

/// The sockets that the guest dials.
#[derive(Debug)]
pub struct Listeners {
    pub(super) rpc: std::os::unix::net::UnixListener,
    pub(super) streams: std::os::unix::net::UnixListener,
}

impl Host {
    /// Makes the directories and claims a range of ids.
    ///
    /// # Errors
    /// [`PodError`]; nothing is left.
    pub fn claim(
        env: &Env,
        config: Config,
        programs: &Programs,
        disks: Disks,
        begin: Instant,
    ) -> Result<Self, PodError> {
        let agent = program::image(&config.data_dir, &programs.agent, AGENT_NAME, MOUNT_POINTS)?;
        let vmm = programs.vmm.clone();
        let dirs = Dirs::new(&env.run_root, &config.data_dir, &env.namespace, &env.sandbox);
        dirs.create()?;
        let claimed = UidSlot::claim(&env.run_root, &dirs, config.uid_base);
        match claimed {
            Ok(slot) => {
                let record = Arc::new(Record::new(&dirs, begin));
                record.set(|status| {
                    status.namespace = env.namespace.to_string();
                    status.sandbox = env.sandbox.to_string();
                    status.shim_pid = std::process::id();
                    status.uid_base = slot.first(config.uid_base);
                });
                let socket = env.socket.clone();
                let label = network::label(&env.namespace, &env.sandbox);
                let (netns, netns_path) = (OnceLock::new(), None);
                let cgroups = Vec::new();
                let host =
                    Self { dirs, slot, cgroups, agent, label, netns, netns_path, vmm, config, socket, record, disks };
                host.write_state(None).inspect_err(|_| host.remove())?;
                Ok(host)
            }
            Err(e) => {
                dirs.remove()?;
                Err(e.into())
            }
        }
    }

    /// The node's configuration, as it was when the pod started.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the annotations of the pod's containers may say.
    pub fn policy(&self) -> &Policy {
        &self.config.annotations
    }

    /// What to do about volumes whose ids cannot be mapped.
    pub fn idmap(&self) -> Idmap {
        self.config.idmap
    }

    /// Most bytes that a container may write: what the configuration says, or less where its annotation does.
    ///
    /// # Errors
    /// [`AnnotationError`] where the annotation says more.
    pub fn upper_limit(&self, wished_mib: Option<u64>) -> Result<Option<u64>, AnnotationError> {
        let most = Some(self.config.container_mib).filter(|mib| *mib > 0);
        match (wished_mib, most) {
            (Some(wish), Some(most)) if wish > most => {
                let reason = format!("rootfs.container_mib in nacelle's configuration is {most}");
                Err(refuse(CONTAINER_MIB, &wish.to_string(), reason))
            }
            (wish, most) => Ok(wish.or(most).map(|mib| mib << 20)),
        }
    }

    pub(super) fn uid(&self) -> u32 {
        self.slot.first(self.config.uid_base)
    }

    pub(super) fn write_state(&self, vmm: Option<Process>) -> Result<(), StateError> {
        let state = State {
            shim: Process::find(std::process::id()),
            vmm,
            cgroups: self.cgroups.clone(),
            netns: self.netns_path.clone(),
            data_dir: self.config.data_dir.clone(),
            socket: self.socket.clone(),
        };
        state.write(&self.dirs)
    }

    /// Makes the upper disk, the volumes of the first container, the cgroup and the sockets, and opens the network
    /// namespace.
    ///
    /// # Errors
    /// [`PodError`]; what was made is left to [`Host::remove`].
    pub fn equip(&mut self, bundle: &Bundle, size: Size, first: &[Volume]) -> Result<Listeners, PodError> {
        let uid = self.uid();
        let disk = self.dirs.upper();
        upper::create(&self.config.data_dir, &disk, size.upper_mib << 20)?;
        chown(&disk, Some(uid), Some(uid)).map_err(io_error("give away", &disk))?;
        let share = self.dirs.volumes();
        volumes::prepare(&share)?;
        if self.config.index_mib > 0 {
            volumes::prepare(&self.dirs.data())?;
        }
        for volume in first {
            volumes::bind(&share, volume)?;
        }
        let resources = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let cpu_shares = resources.and_then(|r| r.cpu().as_ref()).and_then(|cpu| cpu.shares());
        if let Some(path) = bundle.cgroups_path() {
            let root = cgroup::root().ok_or(CgroupError::NoHierarchy)?;
            self.cgroups = cgroup::create(&root, path, limits(size, cpu_shares))?;
        }
        if let Network::Join(path) = &bundle.network {
            let _ = self.netns.set(Netns::open(path)?);
            self.netns_path = Some(path.clone());
        }
        self.write_state(None)?;
        let listen = |path: PathBuf| listen_at(&path, uid).map_err(io_error("listen at", &path));
        Ok(Listeners { rpc: listen(self.dirs.rpc_socket())?, streams: listen(self.dirs.stream_socket())? })
    }

    /// Leads the interfaces of the pod's namespace into a VM with room for that many.
    pub(super) async fn attach(&self, room: usize) -> Result<Attached, NetworkError> {
        let Some(netns) = self.netns.get() else { return Ok(Attached::default()) };
        network::attach(netns, Owner { sandbox: self.label.clone(), uid: self.uid() }, room).await
    }

    /// Removes all of it. What cannot be removed is left to `delete`, and said.
    pub fn remove(&self) {
        if let Some(Err(e)) = self.netns.get().map(|netns| network::detach(netns, &self.label)) {
            tracing::error!("{}", crate::chain(&e));
        }
        for share in [self.dirs.volumes(), self.dirs.data()] {
            if let Err(e) = volumes::destroy(&share) {
                tracing::error!("{}", crate::chain(&e));
            }
        }
        cgroup::remove(&self.cgroups);
        if let Err(e) = self.dirs.remove() {
            tracing::error!("{}", crate::chain(&e));
        }
    }
}

/// Limits of the VMM on the host.
fn limits(size: Size, cpu_shares: Option<u64>) -> cgroup::Limits {
    // The RAM and what the VMM needs are below; what is above is the page cache of the pod's disk and layers, mostly.
    let cache = (size.cgroup_bytes - (u64::from(size.memory_mib) << 20)) / 4;
    cgroup::Limits {
        memory: Some(size.cgroup_bytes),
        memory_high: Some(size.cgroup_bytes - cache),
        tasks: Some(MAX_TASKS),
        cpu_shares,
    }
}

/// A UNIX listener for the VMM alone.
fn listen_at(path: &Path, uid: u32) -> io::Result<std::os::unix::net::UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // An address has 107 bytes, and names of containers and of containerd's namespaces are up to 76 long each.
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let dir = open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    bind(&socket, &SocketAddrUnix::new(&short)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    chown(path, Some(uid), Some(uid))?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}
