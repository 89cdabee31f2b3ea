//! Mounts of a bundle that are nacelle's own kinds of volume.
//!
//! ```text
//!  type=nacelle.disk    source=/srv/data.qcow2   destination=/data    options=ro,fstype=ext4
//!  type=nacelle.named   source=cache_1           destination=/cache   options=rbind,noexec
//! ```
//!
//! A disk without `format=` has the format of its extension, and is raw with any other: a file's content never decides.

use super::validate::faults;
use super::{Fault, Kind, Place, Policies, Surface, Volume, VolumeError};
use crate::disk::Format;
use crate::path::GuestPath;

/// The type of a mount that is a disk image.
pub const DISK: &str = "nacelle.disk";
/// The type of a mount that is a named volume.
pub const NAMED: &str = "nacelle.named";

/// Options that callers add to every mount, and that change nothing here: they hold anyway, or mean nothing for a volume.
const HARMLESS: [&str; 18] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "diratime",
    "noatime",
    "nodev",
    "nodiratime",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "rbind",
    "relatime",
    "rprivate",
    "rslave",
    "slave",
    "strictatime",
];

/// True for a type that nobody but nacelle has: such a mount must be a volume, or is an error.
pub fn is_ours(kind: &str) -> bool {
    kind.starts_with("nacelle.")
}

/// The volume that a mount with one of nacelle's types is, and what of it was left out.
///
/// # Errors
/// Everything that is wrong, at once.
pub fn of_mount(
    kind: &str,
    source: &str,
    destination: &str,
    options: &[String],
) -> Result<(Volume, Vec<String>), Vec<VolumeError>> {
    let at = Place::Mount(destination.chars().take(200).collect());
    let mut read = Read::new(kind);
    options.iter().for_each(|option| read.option(option));
    let guest = GuestPath::parse(destination.as_bytes());
    let guest = guest.map_err(|why| read.faults.push(Fault::Guest { path: destination.into(), why })).ok();
    let kind = match kind {
        DISK => {
            let format = read.format.or_else(|| Format::of_extension(source.as_ref())).unwrap_or(Format::Raw);
            Some(Kind::Disk { host: source.into(), format, fstype: read.fstype.take() })
        }
        NAMED => Some(Kind::Named { name: source.into(), policies: read.policies }),
        other => {
            let there_are = "there are nacelle.disk and nacelle.named";
            read.faults.push(Fault::UnknownKind { what: "mount type", value: other.into(), there_are });
            None
        }
    };
    let (readonly, noexec) = (read.readonly, read.noexec);
    let volume = guest.zip(kind).map(|(guest, kind)| Volume { guest, kind, readonly, noexec });
    let mut errors: Vec<_> = read.faults.into_iter().map(|why| VolumeError { at: at.clone(), why }).collect();
    errors.extend(volume.iter().flat_map(|volume| faults(&[(at.clone(), volume)], Surface::Mounts)));
    match volume {
        Some(volume) if errors.is_empty() => {
            Ok((volume, read.warnings.into_iter().map(|warning| format!("{at}: {warning}")).collect()))
        }
        _ => Err(errors),
    }
}

/// Options while they are read; of two that contradict each other the later counts, as for mount(8).
#[derive(Default)]
struct Read {
    kind: &'static str,
    readonly: bool,
    noexec: bool,
    format: Option<Format>,
    fstype: Option<String>,
    policies: Policies,
    seen: Vec<String>,
    faults: Vec<Fault>,
    warnings: Vec<String>,
}

impl Read {
    fn new(kind: &str) -> Read {
        Read { kind: if kind == DISK { "disk" } else { "named" }, ..Read::default() }
    }

    fn option(&mut self, option: &str) {
        match option {
            "ro" => self.readonly = true,
            "rw" => self.readonly = false,
            "noexec" => self.noexec = true,
            "exec" => self.noexec = false,
            "suid" | "dev" => {
                self.warnings.push(format!("option {option} is left out: a volume is always nosuid and nodev"));
            }
            harmless if HARMLESS.contains(&harmless) => {}
            _ => match option.split_once('=') {
                Some((key, value)) => self.value(key, value),
                None => self.faults.push(Fault::UnknownOption(option.chars().take(200).collect())),
            },
        }
    }

    fn value(&mut self, key: &str, value: &str) {
        let wanted = match key {
            "format" | "fstype" => "disk",
            "stat-virt" | "host-perms" => "bind and named",
            "size" | "size_mib" | "size-mib" => "tmpfs",
            _ => return self.faults.push(Fault::UnknownOption(key.chars().take(200).collect())),
        };
        if !wanted.split(" and ").any(|kind| kind == self.kind) {
            return self.faults.push(Fault::Misplaced { key: key.into(), wanted, kind: self.kind });
        }
        if self.seen.iter().any(|seen| seen == key) {
            return self.faults.push(Fault::Twice(key.into()));
        }
        self.seen.push(key.into());
        match key {
            "format" => self.format = value.parse().map_err(|e| self.faults.push(Fault::Format(e))).ok(),
            "fstype" => self.fstype = Some(value.into()),
            "stat-virt" => {
                self.policies.stat_virt = value.parse().map_err(|e| self.faults.push(Fault::UnknownPolicy(e))).ok();
            }
            _ => self.policies.host_perms = value.parse().map_err(|e| self.faults.push(Fault::UnknownPolicy(e))).ok(),
        }
    }
}
