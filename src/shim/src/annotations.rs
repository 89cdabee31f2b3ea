//! The annotations that nacelle reads: a closed list, each value checked, and each only where the node's owner allows it.
//!
//! | annotation                 | value               | what it changes                    | at most                          |
//! |----------------------------|---------------------|------------------------------------|----------------------------------|
//! | `io.nacelle.vcpus`         | 1 to 255            | virtual CPUs                       | the host's CPUs                  |
//! | `io.nacelle.memory_mib`    | MiB, 128 and more   | the VM's RAM                       | what the pod's limit allows      |
//! | `io.nacelle.upper_mib`     | MiB, 64 and more    | size of the writable disk          | `rootfs.upper_mib`               |
//! | `io.nacelle.container_mib` | MiB, 1 and more     | most that one container may write  | `rootfs.container_mib`           |
//! | `io.nacelle.patches`       | JSON list           | files of the container's root      | copies: `annotations.host_paths` |
//! | `io.nacelle.kernel`        | path of an ELF file | the guest kernel                   | below `annotations.host_paths`   |
//! | `io.nacelle.rootfs`        | path                | a directory or disk as the root    | below `annotations.host_paths`   |
//! | `io.nacelle.rootfs.format` | raw, qcow2, vmdk    | what that disk is                  |                                  |
//! | `io.nacelle.rootfs.fstype` | file system type    | what is on that disk               | `volumes.filesystems`            |
//! | `io.nacelle.rootfs.upper-size` | MiB, or with Mi, Gi | the same as `upper_mib`        | `rootfs.upper_mib`               |
//! | `io.nacelle.volumes`       | JSON list           | volumes of the container           | below `annotations.host_paths`   |
//!
//! Whoever writes them may create pods and is trusted with nothing else. An annotation that is not in the list, or not
//! in `annotations.allow`, refuses the pod: a misspelt one must not silently be none. None of them reaches the jail:
//! [`Wishes`] has no field that says anything about it. Names are flat, as containerd matches them with `path.Match`.
//!
//! This module is pure but for [`Policy::host_path`], which has to follow links to judge a path.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use nacelle_rootfs::source::parse_mib;
use thiserror::Error;

/// What all of nacelle's annotations begin with.
pub const PREFIX: &str = "io.nacelle.";
/// Virtual CPUs.
pub const VCPUS: &str = "io.nacelle.vcpus";
/// The VM's RAM, MiB.
pub const MEMORY_MIB: &str = "io.nacelle.memory_mib";
/// Size of the writable disk, MiB.
pub const UPPER_MIB: &str = "io.nacelle.upper_mib";
/// Most that the container may write on the writable disk, MiB.
pub const CONTAINER_MIB: &str = "io.nacelle.container_mib";
/// Changes to the container's root, see [`crate::patches`].
pub const PATCHES: &str = "io.nacelle.patches";
/// The guest kernel, a path on the host.
pub const KERNEL: &str = "io.nacelle.kernel";
/// A root of another kind than the image's, see [`crate::sources`].
pub const ROOTFS: &str = "io.nacelle.rootfs";
/// Format of the disk that is the root.
pub const ROOTFS_FORMAT: &str = "io.nacelle.rootfs.format";
/// Type of the file system on the disk that is the root.
pub const ROOTFS_FSTYPE: &str = "io.nacelle.rootfs.fstype";
/// Size of the writable disk, with a unit.
pub const ROOTFS_UPPER_SIZE: &str = "io.nacelle.rootfs.upper-size";
/// Volumes of the container, see [`crate::sources`].
pub const VOLUMES: &str = "io.nacelle.volumes";

/// The closed list.
pub const KNOWN: [&str; 11] = [
    VCPUS,
    MEMORY_MIB,
    UPPER_MIB,
    CONTAINER_MIB,
    PATCHES,
    KERNEL,
    ROOTFS,
    ROOTFS_FORMAT,
    ROOTFS_FSTYPE,
    ROOTFS_UPPER_SIZE,
    VOLUMES,
];
/// What a pod may say where the configuration does not say otherwise: nothing that names the host's files.
pub const ALLOWED: [&str; 6] = [VCPUS, MEMORY_MIB, UPPER_MIB, CONTAINER_MIB, PATCHES, ROOTFS_UPPER_SIZE];

/// Most bytes of nacelle's annotations of one container, names and values together.
const MAX_TOTAL: usize = 256 << 10;

/// Why an annotation refuses its pod.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AnnotationError {
    /// It is none of nacelle's.
    #[error("read annotation {0:?}: nacelle knows no such annotation")]
    Unknown(String),
    /// The configuration does not allow it.
    #[error("read annotation {0}: annotations.allow in nacelle's configuration does not list it")]
    Forbidden(&'static str),
    /// Its value is malformed or out of range.
    #[error("read annotation {name} = {value:?}: {reason}")]
    Value {
        /// The annotation.
        name: &'static str,
        /// Its value, shortened.
        value: String,
        /// The rule.
        reason: String,
    },
    /// There is too much of them.
    #[error("read annotations: more than {} KiB of {PREFIX}*", MAX_TOTAL >> 10)]
    TooLong,
}

/// What the configuration allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Annotations that a pod may have.
    pub allow: Vec<String>,
    /// Directories of the host below which an annotation may name a path.
    pub host_paths: Vec<PathBuf>,
}

impl Default for Policy {
    fn default() -> Self {
        Self { allow: ALLOWED.map(str::to_owned).to_vec(), host_paths: Vec::new() }
    }
}

/// What a pod asks for by annotation, well formed and allowed; whether it fits is for who knows the limits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Virtual CPUs.
    pub vcpus: Option<u8>,
    /// The VM's RAM, MiB.
    pub memory_mib: Option<u32>,
    /// Size of the writable disk, MiB.
    pub upper_mib: Option<u64>,
    /// Most that the container may write, MiB.
    pub container_mib: Option<u64>,
    /// A list of patches, not decoded.
    pub patches: Option<String>,
    /// The guest kernel, with every link followed.
    pub kernel: Option<PathBuf>,
    /// Another root, as it was written.
    pub rootfs: Option<String>,
    /// Its format, as it was written.
    pub rootfs_format: Option<String>,
    /// Its file system, as it was written.
    pub rootfs_fstype: Option<String>,
    /// Size of the writable disk, as it was written; [`Wishes::upper_mib`] holds it, too.
    pub rootfs_upper_size: Option<String>,
    /// A list of volumes, not decoded.
    pub volumes: Option<String>,
}

/// The error for a value that is wrong; `value` is shortened, because a pod's author decides how long it is.
pub fn refuse(name: &'static str, value: &str, reason: impl Into<String>) -> AnnotationError {
    AnnotationError::Value { name, value: value.chars().take(80).collect(), reason: reason.into() }
}

impl Policy {
    /// Reads nacelle's annotations among all of a container's.
    ///
    /// # Errors
    /// [`AnnotationError`] names the annotation and the rule.
    pub fn read(&self, annotations: &HashMap<String, String>) -> Result<Wishes, AnnotationError> {
        let ours = || annotations.iter().filter(|(name, _)| name.starts_with(PREFIX));
        if ours().map(|(name, value)| name.len() + value.len()).sum::<usize>() > MAX_TOTAL {
            return Err(AnnotationError::TooLong);
        }
        let mut wishes = Wishes::default();
        for (name, value) in ours() {
            let unknown = || AnnotationError::Unknown(name.chars().take(80).collect());
            let name = *KNOWN.iter().find(|known| *known == name).ok_or_else(unknown)?;
            if !self.allow.iter().any(|allowed| allowed == name) {
                return Err(AnnotationError::Forbidden(name));
            }
            match name {
                VCPUS => wishes.vcpus = Some(number(name, value, 1, u8::MAX, "a number from 1 to 255")?),
                MEMORY_MIB => {
                    wishes.memory_mib = Some(number(name, value, 128, 1 << 20, "a number from 128 to 1048576")?);
                }
                UPPER_MIB => {
                    wishes.upper_mib = Some(number(name, value, 64, 1 << 24, "a number from 64 to 16777216")?);
                }
                CONTAINER_MIB => {
                    wishes.container_mib = Some(number(name, value, 1, 1 << 24, "a number from 1 to 16777216")?);
                }
                PATCHES => wishes.patches = Some(value.clone()),
                ROOTFS => wishes.rootfs = Some(value.clone()),
                ROOTFS_FORMAT => wishes.rootfs_format = Some(value.clone()),
                ROOTFS_FSTYPE => wishes.rootfs_fstype = Some(value.clone()),
                ROOTFS_UPPER_SIZE => wishes.rootfs_upper_size = Some(value.clone()),
                VOLUMES => wishes.volumes = Some(value.clone()),
                _ => wishes.kernel = Some(self.host_path(name, value)?),
            }
        }
        if let Some(size) = &wishes.rootfs_upper_size {
            let mib = parse_mib(size).map_err(|e| refuse(ROOTFS_UPPER_SIZE, size, e.to_string()))?;
            if mib < 64 {
                return Err(refuse(ROOTFS_UPPER_SIZE, size, "64 MiB or more are needed"));
            }
            if wishes.upper_mib.is_some_and(|other| other != u64::from(mib)) {
                return Err(refuse(ROOTFS_UPPER_SIZE, size, format!("{UPPER_MIB} says something else")));
            }
            wishes.upper_mib = Some(u64::from(mib));
        }
        Ok(wishes)
    }

    /// A path of the host that an annotation names: it exists, and with every link followed it lies below one of
    /// `annotations.host_paths`.
    ///
    /// # Errors
    /// [`AnnotationError::Value`].
    pub fn host_path(&self, name: &'static str, value: &str) -> Result<PathBuf, AnnotationError> {
        let path = Path::new(value);
        let clean = |part: Component| matches!(part, Component::RootDir | Component::Normal(_));
        if !path.is_absolute() || value.contains('\0') || !path.components().all(clean) {
            return Err(refuse(name, value, "an absolute path without .. is needed"));
        }
        // The same words for every failure, so that nobody can ask the host which files it has.
        let outside = || refuse(name, value, "there is no such file below annotations.host_paths");
        let real = path.canonicalize().map_err(|_| outside())?;
        if self.allows(&real) { Ok(real) } else { Err(outside()) }
    }

    /// Whether a path of the host without links lies below one of `annotations.host_paths`.
    pub fn allows(&self, real: &Path) -> bool {
        self.host_paths.iter().any(|dir| dir.canonicalize().is_ok_and(|dir| real.starts_with(dir)))
    }
}

fn number<T: FromStr + PartialOrd>(
    name: &'static str,
    value: &str,
    least: T,
    most: T,
    rule: &str,
) -> Result<T, AnnotationError> {
    // Digits alone: what a number's parser takes beside them is no part of the format.
    let digits = !value.is_empty() && value.len() <= 20 && value.bytes().all(|byte| byte.is_ascii_digit());
    let parsed = value.parse().ok().filter(|number| digits && (&least..=&most).contains(&number));
    parsed.ok_or_else(|| refuse(name, value, rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn read(pairs: &[(&str, &str)]) -> Result<Wishes, AnnotationError> {
        Policy::default().read(&map(pairs))
    }

    #[test]
    fn known_ones_are_read_and_others_refuse_the_pod() {
        let foreign = [("io.kubernetes.cri.sandbox-id", "x"), ("io.nacellex", "y")];
        assert_eq!(read(&foreign), Ok(Wishes::default()));
        let sizes = [(VCPUS, "4"), (MEMORY_MIB, "1024"), (UPPER_MIB, "64"), (CONTAINER_MIB, "1")];
        let wishes = Wishes {
            vcpus: Some(4),
            memory_mib: Some(1024),
            upper_mib: Some(64),
            container_mib: Some(1),
            ..Wishes::default()
        };
        assert_eq!(read(&sizes), Ok(wishes));
        let text = read(&[("io.nacelle.vcpu", "4")]).expect_err("misspelt").to_string();
        assert_eq!(text, "read annotation \"io.nacelle.vcpu\": nacelle knows no such annotation");
        assert_eq!(read(&[(KERNEL, "/boot/vmlinux")]), Err(AnnotationError::Forbidden(KERNEL)));
        assert_eq!(Policy { allow: Vec::new(), ..Policy::default() }.read(&map(&sizes[..1])).ok(), None);
    }

    #[test]
    fn values_are_checked() {
        for bad in ["", "0", "256", "-1", "+1", " 1", "1 ", "1e1", "0x1", "٣", "99999999999999999999999"] {
            assert!(matches!(read(&[(VCPUS, bad)]), Err(AnnotationError::Value { name: VCPUS, .. })), "{bad:?}");
        }
        for bad in ["127", "1048577", "4294967424"] {
            assert!(read(&[(MEMORY_MIB, bad)]).is_err(), "{bad:?}");
        }
        assert!(read(&[(UPPER_MIB, "16777217")]).is_err() && read(&[(UPPER_MIB, "63")]).is_err());
        let long = "9".repeat(MAX_TOTAL);
        assert_eq!(read(&[(VCPUS, &long)]), Err(AnnotationError::TooLong));
        let text = read(&[(VCPUS, &long[..1000])]).expect_err("too large").to_string();
        assert!(text.len() < 200, "{text}");
    }

    #[test]
    fn paths_stay_below_what_is_allowed() {
        let root = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| root.path().join(name);
        std::fs::create_dir_all(at("kernels/more")).expect("mkdir");
        std::fs::write(at("kernels/more/vmlinux"), b"x").expect("write");
        std::fs::write(at("secret"), b"x").expect("write");
        std::os::unix::fs::symlink(at("secret"), at("kernels/link")).expect("symlink");
        std::os::unix::fs::symlink(at("kernels"), at("alias")).expect("symlink");
        let policy = Policy { allow: vec![KERNEL.into()], host_paths: vec![at("alias")] };
        let ask = |path: PathBuf| policy.read(&map(&[(KERNEL, path.to_str().expect("text"))]));
        let real = at("kernels/more/vmlinux").canonicalize().expect("canonical");
        assert_eq!(ask(at("alias/more/vmlinux")).expect("allowed").kernel, Some(real));
        for bad in ["secret", "kernels/link", "kernels/../secret", "kernels/missing"] {
            assert!(matches!(ask(at(bad)), Err(AnnotationError::Value { name: KERNEL, .. })), "{bad}");
        }
        assert!(ask("kernels/more/vmlinux".into()).is_err(), "relative");
        assert!(ask("/proc/self/root/etc/passwd".into()).is_err());
        let none = Policy { host_paths: Vec::new(), ..policy.clone() };
        assert!(none.read(&map(&[(KERNEL, at("kernels/more/vmlinux").to_str().expect("text"))])).is_err());
    }

    #[test]
    fn none_of_them_is_about_the_jail() {
        for name in KNOWN {
            assert!(!name.contains("jail") && !name.contains("seccomp") && !name.contains("landlock"), "{name}");
        }
        for attempt in ["jail", "jail.seccomp", "jail.landlock", "seccomp", "landlock", "uid_base", "max_files", "vmm"]
        {
            let name = format!("{PREFIX}{attempt}");
            let everything = Policy { allow: vec![name.clone()], host_paths: vec!["/".into()] };
            assert_eq!(everything.read(&map(&[(&name, "off")])), Err(AnnotationError::Unknown(name)));
        }
    }
}
