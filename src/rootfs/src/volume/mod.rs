//! Volumes: what a container gets at a path beside its root, as lists in JSON and mounts of a bundle say it.
//!
//! | kind     | is                                                    | JSON `type` | mount's type    |
//! |----------|-------------------------------------------------------|-------------|-----------------|
//! | bind     | a file or directory of the host                       | `Bind`      | (plain `bind`)  |
//! | named    | a directory that nacelle keeps ([`store`])            | `Named`     | `nacelle.named` |
//! | tmpfs    | memory of the guest                                   | `Tmpfs`     | (plain `tmpfs`) |
//! | disk     | a file system on a disk image ([`crate::disk`])       | `DiskImage` | `nacelle.disk`  |
//!
//! ```text
//!  JSON  ──decode──┐
//!                  ├──► [Volume] ──validate──► errors, all of them
//!  mount ──of_mount┘
//! ```
//!
//! Nothing is looked up. That a path of the host may be used at all is for the caller to say.

mod decode;
mod mount;
mod policy;
pub mod store;
mod validate;

use std::path::PathBuf;

use serde::ser::{Serialize, Serializer};

pub use decode::{Decoded, decode};
pub use mount::{DISK, NAMED, is_ours, of_mount};
pub use policy::{HostPerms, Policies, StatVirt, UnknownPolicy};
pub use validate::{NameError, Surface, check_name, validate};

use crate::disk::{Format, FstypeError, UnknownFormat};
use crate::path::{GuestPath, PathError};
use crate::source::SizeError;

/// Volumes in one list, at most.
pub const VOLUMES: usize = 256;

/// Something that a container gets at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The path in the container.
    pub guest: GuestPath,
    /// What it is.
    pub kind: Kind,
    /// It cannot be written to.
    pub readonly: bool,
    /// Programs on it cannot be executed; interpreters can still read them.
    pub noexec: bool,
}

/// What a volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file or directory of the host.
    Bind {
        /// Its path.
        host: PathBuf,
        /// What is asked about its metadata.
        policies: Policies,
    },
    /// A directory that nacelle keeps.
    Named {
        /// Its name.
        name: String,
        /// What is asked about its metadata.
        policies: Policies,
    },
    /// Memory of the guest.
    Tmpfs {
        /// How much, unless the guest's kernel decides.
        size_mib: Option<u32>,
    },
    /// A file system on a disk image.
    Disk {
        /// The image.
        host: PathBuf,
        /// How it is laid out: decided here, once, and never by its content.
        format: Format,
        /// The file system; the guest finds out what is not said.
        fstype: Option<String>,
    },
}

impl Kind {
    /// Its name, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Bind { .. } => "bind",
            Kind::Named { .. } => "named",
            Kind::Tmpfs { .. } => "tmpfs",
            Kind::Disk { .. } => "disk",
        }
    }
}

impl Volume {
    /// The path in the container.
    pub fn guest(&self) -> &GuestPath {
        &self.guest
    }
}

#[derive(serde::Serialize)]
struct Options {
    readonly: bool,
    noexec: bool,
}

/// A volume as JSON has it.
#[derive(serde::Serialize)]
#[serde(tag = "type")]
enum Written<'a> {
    Bind {
        host: &'a PathBuf,
        guest: String,
        options: Options,
        #[serde(flatten)]
        policies: &'a Policies,
    },
    Named {
        name: &'a str,
        guest: String,
        options: Options,
        #[serde(flatten)]
        policies: &'a Policies,
    },
    Tmpfs {
        guest: String,
        size_mib: Option<u32>,
        options: Options,
    },
    DiskImage {
        host: &'a PathBuf,
        guest: String,
        format: Format,
        fstype: &'a Option<String>,
        options: Options,
    },
}

impl Serialize for Volume {
    /// As [`decode()`] reads it.
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let Volume { guest, kind, readonly, noexec } = self;
        let (guest, options) = (guest.to_string(), Options { readonly: *readonly, noexec: *noexec });
        match kind {
            Kind::Bind { host, policies } => Written::Bind { host, guest, options, policies },
            Kind::Named { name, policies } => Written::Named { name, guest, options, policies },
            Kind::Tmpfs { size_mib } => Written::Tmpfs { guest, size_mib: *size_mib, options },
            Kind::Disk { host, format, fstype } => Written::DiskImage { host, guest, format: *format, fstype, options },
        }
        .serialize(to)
    }
}

/// Where something is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the list as a whole.
    List,
    /// In the volume with this number, counted from 0.
    Number(usize),
    /// In the mount with this destination.
    Mount(String),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Place::List => f.write_str("list of volumes"),
            Place::Number(number) => write!(f, "volume {number}"),
            Place::Mount(destination) => write!(f, "mount at {destination:?}"),
        }
    }
}

/// One thing that is wrong with one volume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {why}")]
pub struct VolumeError {
    /// Where.
    pub at: Place,
    /// What.
    pub why: Fault,
}

/// What can be wrong with a volume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what they are")]
pub enum Fault {
    /// Not what JSON should have there.
    #[error("{0}")]
    Json(String),
    #[error("more than {VOLUMES} volumes")]
    TooMany,
    #[error("{what} {value:?} is unknown: {there_are}")]
    UnknownKind { what: &'static str, value: String, there_are: &'static str },
    #[error("{key} is missing, which a {kind} volume needs")]
    Missing { key: &'static str, kind: &'static str },
    #[error("{key} goes with {wanted} volumes alone, and this is a {kind} volume")]
    Misplaced { key: String, wanted: &'static str, kind: &'static str },
    #[error("option {0:?} is unknown")]
    UnknownOption(String),
    #[error("{0} is given twice")]
    Twice(String),
    #[error("guest path {path:?}: {why}")]
    Guest { path: String, why: PathError },
    #[error("guest path {0:?} has one of \": ; ,\"")]
    GuestSeparator(String),
    #[error("guest path {path:?} is at or below {system}, which belongs to the container's system")]
    System { path: String, system: &'static str },
    #[error("guest path {path:?} is that of {other} already")]
    SamePath { path: String, other: Place },
    #[error("{label} host path {path:?} {why}")]
    Host { label: &'static str, path: String, why: &'static str },
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Format(#[from] UnknownFormat),
    #[error(transparent)]
    Fstype(#[from] FstypeError),
    #[error(transparent)]
    Size(#[from] SizeError),
    #[error(transparent)]
    UnknownPolicy(#[from] UnknownPolicy),
    #[error(
        "stat-virt \"off\" and host-perms \"mirror\" contradict each other: without an overlay a guest's chmod reaches the host's \
         file anyway, so there is nothing to mirror; drop one of them"
    )]
    PolicyPair,
    #[error(
        "stat-virt {0:?} is not supported: the guest sees the files' real owners and modes, through a mount that maps ids, and \
         nothing is kept beside them; leave it out or say \"off\""
    )]
    StatVirt(&'static str),
    #[error(
        "host-perms {0:?} is not supported: what the guest changes of owners and modes is changed on the host's files, within the \
         ids that are mapped; leave it out"
    )]
    HostPerms(&'static str),
}
