//! A root that is no stack of layers: a file system on a disk image or a device, as containerd's blockfile and devmapper snapshotters
//! hand it over.

use std::path::PathBuf;

use super::{Mount, absolute};

/// A root file system on a disk of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRoot {
    /// The image, raw and without partitions, or the device.
    pub path: PathBuf,
    /// Type of the file system.
    pub kind: String,
    /// The mounts allow no writing.
    pub read_only: bool,
}

/// The disk that the mounts are, if they are no more than that: one ext4 file system, which every guest's kernel knows, on an image
/// that is mounted through a loop device, or on a device. Whether there is one is for the caller to see.
pub fn disk(mounts: &[Mount]) -> Option<DiskRoot> {
    let [mount] = mounts else { return None };
    let words = ["loop", "rw", "ro", "discard", "noatime", "relatime"];
    let simple = mount.options.iter().all(|option| words.contains(&option.as_str()));
    let named = mount.options.iter().any(|option| option == "loop") || mount.source.starts_with("/dev/");
    if mount.kind != "ext4" || !simple || !named || !matches!(mount.target.as_str(), "" | "/") {
        return None;
    }
    let path = absolute("disk image", &mount.source).ok()?;
    let read_only = mount.options.iter().rfind(|o| *o == "ro" || *o == "rw").is_some_and(|o| o == "ro");
    Some(DiskRoot { path, kind: mount.kind.clone(), read_only })
}

#[cfg(test)]
mod tests {
    use super::super::tests::mount;
    use super::*;

    #[test]
    fn disks_of_the_snapshotters() {
        let root = |read_only| DiskRoot { path: "/s/7".into(), kind: "ext4".into(), read_only };
        assert_eq!(disk(&[mount("ext4", "/s/7", &["loop", "rw"])]), Some(root(false)));
        assert_eq!(disk(&[mount("ext4", "/s/7", &["rw", "ro", "loop"])]), Some(root(true)));
        let device = DiskRoot { path: "/dev/mapper/snap-7".into(), ..root(false) };
        assert_eq!(disk(&[mount("ext4", "/dev/mapper/snap-7", &["rw", "discard"])]), Some(device));
    }

    #[test]
    fn what_is_more_than_that_is_none() {
        for other in [
            mount("ext4", "/s/7", &["rw"]),
            mount("ext4", "/dev/mapper/snap-7", &["errors=remount-ro"]),
            mount("xfs", "/dev/mapper/snap-7", &["nouuid"]),
            mount("ext4", "s/7", &["loop"]),
            mount("xfs", "/s/7", &["loop", "nouuid"]),
            mount("format/ext4", "/s/7", &["loop"]),
            mount("erofs", "/s/7", &["loop", "ro"]),
            mount("", "/s/7", &["loop"]),
            Mount { target: "/etc".into(), ..mount("ext4", "/s/7", &["loop"]) },
        ] {
            assert_eq!(disk(std::slice::from_ref(&other)), None, "{other:?}");
        }
        let plain = mount("ext4", "/s/7", &["loop"]);
        assert_eq!(disk(&[plain.clone(), plain]), None);
    }
}
