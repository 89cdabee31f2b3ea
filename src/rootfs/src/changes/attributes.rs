//! Which extended attributes pass from a container to its snapshot.

use std::os::fd::OwnedFd;

use rustix::fs::{fgetxattr, flistxattr};
use rustix::io::Errno;

use crate::Limits;
use crate::layer::xattrs::{Gathered, Refusal, translate};
use crate::tar::{Entry, TarError};
use crate::tree::{OPAQUE, Xattr};

/// Names of all attributes.
pub fn names(file: &OwnedFd) -> rustix::io::Result<Vec<Vec<u8>>> {
    let mut list = vec![0; 64 << 10];
    let len = match flistxattr(file, &mut list) {
        Err(Errno::NOTSUP) => 0,
        other => other?,
    };
    Ok(list[..len].split(|&b| b == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
}

/// Whether a directory hides what the layers below have.
pub fn is_opaque(dir: &OwnedFd) -> bool {
    let mut value = [0; 2];
    matches!(fgetxattr(dir, OPAQUE, &mut value), Ok(1)) && value[0] == b'y'
}

/// Whether an attribute is the container's, or says something that any overlay understands. Labels are the host's to give, by a
/// policy that the guest knows nothing of.
pub fn is_kept(name: &[u8]) -> bool {
    let label = name.starts_with(b"security.") && name != b"security.capability";
    !label && translate(name).ok().flatten().is_some_and(|kept| kept == name)
}

/// The attributes of an entry that are kept.
pub fn kept(entry: &Entry, limits: &Limits) -> Result<Vec<Xattr>, TarError> {
    let refused = |what| TarError::entry(&entry.path, what);
    let mut gathered = Gathered::new(limits.xattrs);
    for (name, value) in entry.xattrs.iter().filter(|(name, _)| is_kept(name)) {
        // Stand-ins for files of other layers, which the guest's overlay is told not to make.
        if matches!(name.as_slice(), b"trusted.overlay.redirect" | b"trusted.overlay.whiteout") {
            return Err(refused("has its name or its data in another layer"));
        }
        let added = gathered.add(name.clone(), value);
        added.map_err(|refusal| match refusal {
            Refusal::TooLarge => refused("has extended attributes that are too large"),
            Refusal::Metacopy => refused("has its data in another layer"),
            Refusal::Failed(_) => refused("has extended attributes that cannot be read"),
        })?;
    }
    if entry.xattrs.iter().any(|(name, _)| matches!(translate(name), Err(Refusal::Metacopy))) {
        return Err(refused("has its data in another layer"));
    }
    Ok(gathered.finish())
}
