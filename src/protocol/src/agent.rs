//! shim → agent: what a container is, in the guest's words.
//!
//! A container is created with containerd's own `CreateTaskRequest`: `id`, `terminal`, and `stdin`, `stdout`, `stderr`
//! as stream names ([`crate::stream::stream_uri`]); `options` is an `Any` with the type [`CONTAINER_TYPE`] whose value
//! is a [`Container`] as JSON. An exec is containerd's `ExecProcessRequest` with the same stream names and the OCI
//! process as containerd sends it. `bundle`, `rootfs` and `checkpoint` stay empty: the guest knows no paths of the
//! host's.
//!
//! Paths in the guest:
//!
//! ```text
//!  /run/nacelle/layers/       share "layers", read-only: <name>.erofs, one file a lower
//!  /run/nacelle/layers/data/  directories of layers that are not images yet
//!  /run/nacelle/volumes/      share "volumes": one entry a volume, a directory or a single file
//!  /run/nacelle/mirrors/      a tmpfs for each volume that is a copy
//!  /run/nacelle/disks/<serial>/  file system of a disk that is a volume
//!  /run/nacelle/upper/<id>/   upper and work directories of a container
//!  /run/nacelle/containers/<id>/  config.json, rootfs
//! ```

use serde::{Deserialize, Serialize};

#[allow(warnings, clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks, rustdoc::all)]
pub(crate) mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::agent::*;
pub use generated::agent_ttrpc::{Agent, AgentClient, create_agent};

/// `type_url` of the options of a `CreateTaskRequest` to the agent.
pub const CONTAINER_TYPE: &str = "nacelle.agent.v1.Container";

/// Most processes of a container that the agent lists, and that the shim takes.
pub const MAX_PIDS: usize = 32768;

/// Length of a FUSE message's header (`struct fuse_in_header`, `linux/fuse.h`).
pub const FILES_HEADER: usize = 40;
/// Most bytes of file data in a message or an answer of [`FilesRequest`].
pub const FILES_DATA: usize = 128 << 10;
/// Longest message or answer: the data, and a page for what stands before it.
pub const FILES_MESSAGE: usize = FILES_DATA + 4096;

/// virtiofs tag of the share that holds the lowers.
pub const LAYERS_TAG: &str = "layers";
/// virtiofs tag of the share that holds the volumes.
pub const VOLUMES_TAG: &str = "volumes";
/// Serial number of the disk that holds the uppers.
pub const UPPER_SERIAL: &str = "upper";

/// Where the layers share is mounted in the guest.
pub const LAYERS_DIR: &str = "/run/nacelle/layers";
/// Directory in the layers share that has a directory for each layer whose files are read there.
pub const DATA_DIR: &str = "data";
/// Where the volumes share is mounted in the guest.
pub const VOLUMES_DIR: &str = "/run/nacelle/volumes";
/// Where the disk with the uppers is mounted in the guest.
pub const UPPER_DIR: &str = "/run/nacelle/upper";
/// Where the agent keeps copies of volumes, see [`Mirror`].
pub const MIRRORS_DIR: &str = "/run/nacelle/mirrors";
/// Link of a volume to the directory with its current content (Kubernetes, `pkg/volume/util/atomic_writer.go`).
pub const DATA_LINK: &str = "..data";
/// Where the agent mounts disks that are volumes.
pub const DISKS_DIR: &str = "/run/nacelle/disks";
/// Where the agent keeps a directory for each container.
pub const CONTAINERS_DIR: &str = "/run/nacelle/containers";

/// One container, as the guest has to make it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// OCI runtime configuration, made for the guest by the shim: sources of bind mounts lie in [`VOLUMES_DIR`],
    /// `linux.cgroupsPath` is a guest path, and the network namespace is the guest's own.
    pub spec: serde_json::Value,
    /// The root file system.
    pub rootfs: Rootfs,
    /// Its processes join the PID namespace that containers of the pod share, instead of the new one that the
    /// configuration asks for.
    pub pod_pids: bool,
    /// The ids of the pod's user namespace, which its processes join; `None`: they are in the guest's own.
    #[serde(default)]
    pub users: Option<Users>,
    /// Volumes that it sees in copies: its bind mounts of them name [`MIRRORS_DIR`] instead of [`VOLUMES_DIR`].
    pub mirrors: Vec<Mirror>,
    /// Disks that it has as volumes: its bind mounts of them name [`DISKS_DIR`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
}

/// A file system on a disk of the machine's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Serial number of the disk.
    pub serial: String,
    /// Types of file systems that it may have; the first that fits is mounted. The guest has to know one of them.
    pub types: Vec<String>,
    /// Mount it read-only.
    pub read_only: bool,
}

/// A user namespace: id 0 in it is id `first` of the guest, and so on for `count` ids, of users and of groups alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Users {
    /// At least 1: root of the guest is the agent's.
    pub first: u32,
    /// At least 1.
    pub count: u32,
}

/// A volume that the guest has in a copy, which `Refresh` brings up to date.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// Name of the volume, a directory below [`VOLUMES_DIR`].
    pub volume: String,
    /// Where its [`DATA_LINK`] leads: a directory in it.
    pub data: String,
}

/// The root file system of a container: lowers and an upper over them, or a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rootfs {
    /// The lowers, bottom first; at least one, unless there is a disk.
    pub lowers: Vec<Lower>,
    /// The disk that is the root, which what the container writes goes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// Most bytes that the upper may take on the pod's disk; `None`: as many as there are.
    #[serde(default)]
    pub upper_bytes: Option<u64>,
    /// The lowers hold the ids of the container's user namespace, not those of the guest.
    #[serde(default)]
    pub mapped: bool,
}

/// An EROFS image in [`LAYERS_DIR`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lower {
    /// Its file name.
    pub name: String,
    /// File names of the images that hold file data of it, in the order of its device table.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    /// Names in [`DATA_DIR`] of the directories that hold file data of it, found there by path; what is in the first counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<String>,
    /// What these files are checked against as they are read: the image, then its devices. Empty: nothing is checked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub verity: Vec<Verity>,
}

/// The tree of digests behind an image (dm-verity, version 1, SHA-256, blocks of 4096 bytes, no salt).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verity {
    /// Blocks of the image, behind which the tree lies.
    pub blocks: u64,
    /// Digest of the tree's top block, 64 hexadecimal digits.
    pub root: String,
}
