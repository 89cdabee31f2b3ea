//! What holds for volumes wherever they come from.

use std::path::Path;

use super::{Fault, Kind, Place, VOLUMES, Volume, VolumeError};
use crate::disk::check_fstype;
use crate::path;
use crate::source::SizeError;

/// How volumes are written down where they come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surface {
    /// As text, where a separator in a path would begin another option: annotations, files, command lines.
    Text,
    /// In fields of their own: the mounts of a bundle, whose paths are often not chosen by people.
    Mounts,
}

/// Longest name of a volume.
const NAME_MAX: usize = 128;

/// Directories that the container's own mounts are in.
const SYSTEM: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Why a text is no name of a volume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("volume name {name:?} {why}")]
pub struct NameError {
    /// The text.
    pub name: String,
    /// Why not.
    pub why: &'static str,
}

/// A name begins with a letter or digit and goes on with those, dots, hyphens and underscores. So none is a path.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let rest = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    let why = if name.is_empty() {
        "is empty"
    } else if name.len() > NAME_MAX {
        "is longer than 128 bytes"
    } else if !name.as_bytes()[0].is_ascii_alphanumeric() {
        "does not begin with a letter or digit"
    } else if !name.bytes().all(rest) {
        "has something else than letters, digits, \".\", \"-\" and \"_\""
    } else {
        return Ok(());
    };
    Err(NameError { name: name.chars().take(200).collect(), why })
}

/// Looks at a list of volumes, whatever made them.
///
/// # Errors
/// Everything that is wrong with them, in their order.
pub fn validate(volumes: &[Volume], surface: Surface) -> Result<(), Vec<VolumeError>> {
    let placed: Vec<_> = volumes.iter().enumerate().map(|(number, volume)| (Place::Number(number), volume)).collect();
    let errors = faults(&placed, surface);
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// The same for volumes whose places are known.
pub(super) fn faults(volumes: &[(Place, &Volume)], surface: Surface) -> Vec<VolumeError> {
    let mut errors = Vec::new();
    if volumes.len() > VOLUMES {
        errors.push(VolumeError { at: Place::List, why: Fault::TooMany });
        return errors;
    }
    for (index, (at, volume)) in volumes.iter().enumerate() {
        let mut found = one(volume, surface);
        if let Some((other, _)) = volumes[..index].iter().find(|(_, other)| other.guest == volume.guest) {
            found.push(Fault::SamePath { path: volume.guest.to_string(), other: other.clone() });
        }
        errors.extend(found.into_iter().map(|why| VolumeError { at: at.clone(), why }));
    }
    errors
}

fn one(volume: &Volume, surface: Surface) -> Vec<Fault> {
    let mut found = Vec::new();
    let guest = volume.guest.to_string();
    if surface == Surface::Text && guest.contains([':', ';', ',']) {
        found.push(Fault::GuestSeparator(guest.clone()));
    }
    if let Some(system) = SYSTEM.into_iter().find(|system| Path::new(&guest).starts_with(system)) {
        found.push(Fault::System { path: guest, system });
    }
    match &volume.kind {
        Kind::Bind { host, policies } => {
            found.extend(host_fault("bind", host, surface));
            found.extend(policies.faults());
        }
        Kind::Named { name, policies } => {
            found.extend(check_name(name).err().map(Fault::Name));
            found.extend(policies.faults());
        }
        Kind::Tmpfs { size_mib: Some(0) } => found.push(Fault::Size(SizeError::Zero("0".into()))),
        Kind::Tmpfs { .. } => {}
        Kind::Disk { host, format: _, fstype } => {
            found.extend(host_fault("disk image", host, surface));
            found.extend(fstype.as_deref().and_then(|text| check_fstype(text).err()).map(Fault::Fstype));
        }
    }
    found
}

fn host_fault(label: &'static str, host: &Path, surface: Surface) -> Option<Fault> {
    let why = match host.to_str() {
        None => "is not UTF-8",
        Some(text) if !text.starts_with('/') => "is not absolute",
        Some(text) if surface == Surface::Text && text.contains([',', ':', ';']) => "has one of \", : ;\"",
        Some(text) => match path::components(text.as_bytes()) {
            Ok(_) => return None,
            Err(path::PathError::Escape) => "has a \"..\"",
            Err(path::PathError::Nul) => "has a NUL byte",
            Err(_) => "is too long",
        },
    };
    Some(Fault::Host { label, path: host.to_string_lossy().chars().take(200).collect(), why })
}
