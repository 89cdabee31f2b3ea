//! The mounts that containerd hands over → which directories and images make up the root file system. Pure: nothing is touched.
//!
//! ```text
//!  overlay  lowerdir=c:b:a, upperdir=u, workdir=w   →   snapshots a, b, c · upper u, when it holds anything
//!  overlay  lowerdir=b:a                            →   snapshots a, b, read-only           (a view)
//!  bind     ro  /snapshots/1/fs                     →   snapshot, read-only                 (a view of one layer)
//!  bind     rw  /snapshots/1/fs                     →   writable directory                  (no parent; native snapshotter)
//!  erofs    /snapshots/1/layer.erofs                →   image, used as it is
//! ```

use std::path::PathBuf;

/// A mount of the root file system, as in containerd's `CreateTaskRequest.rootfs` (`types/mount.proto`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// File system type, or `bind`.
    pub kind: String,
    /// Device, directory or image; a mere word for overlay.
    pub source: String,
    /// Path below the root; empty for the root itself.
    pub target: String,
    /// Options in fstab's style.
    pub options: Vec<String>,
}

/// One layer below the container's writable disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lower {
    /// A directory that never changes: its image is cached.
    Snapshot(PathBuf),
    /// A directory that somebody may change: converted for one container.
    Writable(PathBuf),
    /// The upper directory of an overlay: converted for one container when it holds anything, else left out.
    Upper(PathBuf),
    /// An EROFS image that is ready.
    Image(PathBuf),
}

impl Lower {
    /// The directory or image.
    pub fn source(&self) -> &PathBuf {
        match self {
            Lower::Snapshot(path) | Lower::Writable(path) | Lower::Upper(path) | Lower::Image(path) => path,
        }
    }
}

/// What makes up a root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootfsPlan {
    /// Layers, bottom first.
    pub lowers: Vec<Lower>,
    /// The mounts allow no writing: the container gets no upper.
    pub read_only: bool,
}

/// Why mounts cannot be turned into a plan.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No mounts at all.
    #[error("plan rootfs: the task has no rootfs mounts")]
    NoMounts,
    /// More than one mount: the last would hide the others.
    #[error("plan rootfs: {0} mounts, but only one can be the root")]
    SeveralMounts(usize),
    /// A mount for a path below the root.
    #[error("plan rootfs: mount of {source_path} goes to {target}, not to the root")]
    Target {
        /// Its source.
        source_path: String,
        /// Its target.
        target: String,
    },
    /// A snapshotter that nacelle does not know.
    #[error("plan rootfs: mount type {kind:?} of {source_path:?} is not supported")]
    Kind {
        /// The type.
        kind: String,
        /// Its source.
        source_path: String,
    },
    /// An option that changes what the files are.
    #[error("plan rootfs: option {option:?} of {kind} mount is not supported")]
    Option {
        /// The mount's type.
        kind: String,
        /// The option.
        option: String,
    },
    /// An overlay without lower directories.
    #[error("plan rootfs: overlay mount has no lowerdir")]
    NoLowers,
    /// A path that is empty, relative or holds a NUL byte.
    #[error("plan rootfs: {what} {path:?} is not an absolute path")]
    Path {
        /// Whose path.
        what: &'static str,
        /// The path.
        path: String,
    },
}

/// Makes the plan.
pub fn plan(mounts: &[Mount]) -> Result<RootfsPlan, PlanError> {
    let mount = match mounts {
        [] => return Err(PlanError::NoMounts),
        [mount] => mount,
        several => return Err(PlanError::SeveralMounts(several.len())),
    };
    if !matches!(mount.target.as_str(), "" | "/") {
        return Err(PlanError::Target { source_path: mount.source.clone(), target: mount.target.clone() });
    }
    match mount.kind.as_str() {
        "overlay" => overlay(mount),
        "bind" | "rbind" => bind(mount),
        // Some callers leave the type of a bind mount empty and say it in the options.
        "" | "none" if mount.options.iter().any(|o| o == "bind" || o == "rbind") => bind(mount),
        "erofs" => erofs(mount),
        _ => Err(PlanError::Kind { kind: mount.kind.clone(), source_path: mount.source.clone() }),
    }
}

fn overlay(mount: &Mount) -> Result<RootfsPlan, PlanError> {
    let mut lowers = Vec::new(); // topmost first, as in the options
    let mut upper = None;
    let mut read_only = false;
    for option in &mount.options {
        match option.split_once('=') {
            Some(("lowerdir", value)) => lowers = split_lowers(mount, option, value)?,
            Some(("lowerdir+", value)) => lowers.push(absolute("lowerdir", value)?),
            Some(("upperdir", value)) => upper = Some(absolute("upperdir", &unescape(value))?),
            // Files whose data lies in another layer, or whose owners are not what the disk says.
            Some(("metacopy", "on") | ("datadir+" | "uidmap" | "gidmap", _)) => return Err(unsupported(mount, option)),
            _ => read_only |= option == "ro",
        }
    }
    if lowers.is_empty() {
        return Err(PlanError::NoLowers);
    }
    let mut lowers: Vec<Lower> = lowers.into_iter().rev().map(Lower::Snapshot).collect();
    read_only |= upper.is_none();
    lowers.extend(upper.map(Lower::Upper));
    Ok(RootfsPlan { lowers, read_only })
}

fn bind(mount: &Mount) -> Result<RootfsPlan, PlanError> {
    if let Some(option) = mount.options.iter().find(|o| o.starts_with("uidmap=") || o.starts_with("gidmap=")) {
        return Err(unsupported(mount, option));
    }
    let source = absolute("bind source", &mount.source)?;
    // Like mount(8), the later of "ro" and "rw" counts.
    let read_only = mount.options.iter().rfind(|o| *o == "ro" || *o == "rw").is_some_and(|o| o == "ro");
    let lower = if read_only { Lower::Snapshot(source) } else { Lower::Writable(source) };
    Ok(RootfsPlan { lowers: vec![lower], read_only })
}

fn erofs(mount: &Mount) -> Result<RootfsPlan, PlanError> {
    if let Some(option) = mount.options.iter().find(|o| o.starts_with("device=") || o.starts_with("fsoffset=")) {
        return Err(unsupported(mount, option));
    }
    let image = absolute("erofs image", &mount.source)?;
    Ok(RootfsPlan { lowers: vec![Lower::Image(image)], read_only: true })
}

fn unsupported(mount: &Mount, option: &str) -> PlanError {
    PlanError::Option { kind: mount.kind.clone(), option: option.into() }
}

/// Cuts `lowerdir` at its colons, but not at `\:`. Two colons announce a data-only layer, which is no layer by itself.
fn split_lowers(mount: &Mount, option: &str, value: &str) -> Result<Vec<PathBuf>, PlanError> {
    let mut lowers = Vec::new();
    let mut start = 0;
    let mut escaped = false;
    for (at, c) in value.char_indices().chain([(value.len(), ':')]) {
        let end = at == value.len();
        if c == ':' && (!escaped || end) {
            match &value[start..at] {
                "" if !lowers.is_empty() => return Err(unsupported(mount, option)),
                part => lowers.push(absolute("lowerdir", &unescape(part))?),
            }
            start = at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    Ok(lowers)
}

/// Takes away overlayfs's backslashes: `\:` and `\,` and `\\`.
fn unescape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
    }
    out
}

fn absolute(what: &'static str, path: &str) -> Result<PathBuf, PlanError> {
    if path.starts_with('/') && !path.contains('\0') {
        Ok(path.into())
    } else {
        // The kernel would take it from whatever directory the mounting process is in.
        Err(PlanError::Path { what, path: path.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            kind: kind.into(),
            source: source.into(),
            target: String::new(),
            options: options.iter().map(|&o| o.into()).collect(),
        }
    }

    fn snapshots(paths: &[&str]) -> Vec<Lower> {
        paths.iter().map(|p| Lower::Snapshot(p.into())).collect()
    }

    #[test]
    fn mounts_of_the_known_snapshotters() {
        let with_upper = |lowers: &[&str], upper: &str| [snapshots(lowers), vec![Lower::Upper(upper.into())]].concat();
        let table = [
            (
                mount(
                    "overlay",
                    "overlay",
                    &["index=off", "userxattr", "volatile", "workdir=/w", "upperdir=/u", "lowerdir=/c:/b:/a"],
                ),
                with_upper(&["/a", "/b", "/c"], "/u"),
                false,
            ),
            (mount("overlay", "overlay", &["lowerdir=/b:/a"]), snapshots(&["/a", "/b"]), true),
            (mount("overlay", "overlay", &["ro", "upperdir=/u", "lowerdir=/a"]), with_upper(&["/a"], "/u"), true),
            (mount("overlay", "none", &["lowerdir+=/b", "lowerdir+=/a:x"]), snapshots(&["/a:x", "/b"]), true),
            (
                mount("overlay", "overlay", &[r"lowerdir=/x\:y:/tmp/a\\b:/c\,d"]),
                snapshots(&["/c,d", r"/tmp/a\b", "/x:y"]),
                true,
            ),
            (mount("bind", "/s/1/fs", &["rw", "rbind"]), vec![Lower::Writable("/s/1/fs".into())], false),
            (mount("bind", "/s/1/fs", &["ro", "rbind"]), snapshots(&["/s/1/fs"]), true),
            (mount("", "/s/1/fs", &["rbind", "ro"]), snapshots(&["/s/1/fs"]), true),
            (mount("erofs", "/s/1/layer.erofs", &["ro", "loop"]), vec![Lower::Image("/s/1/layer.erofs".into())], true),
        ];
        for (mount, lowers, read_only) in table {
            let made = plan(std::slice::from_ref(&mount));
            assert_eq!(made, Ok(RootfsPlan { lowers, read_only }), "{mount:?}");
        }
    }

    #[test]
    fn refusals_name_their_reason() {
        let many = vec![mount("bind", "/a", &[]), mount("bind", "/b", &[])];
        let elsewhere = Mount { target: "/data".into(), ..mount("bind", "/a", &[]) };
        let table: [(&[Mount], &str); 10] = [
            (&[], "the task has no rootfs mounts"),
            (&many, "2 mounts"),
            (&[elsewhere], "mount of /a goes to /data"),
            (&[mount("fuse.nydus", "/n", &[])], r#"mount type "fuse.nydus" of "/n""#),
            (&[mount("overlay", "overlay", &["upperdir=/u"])], "no lowerdir"),
            (&[mount("overlay", "overlay", &["lowerdir=a:/b"])], r#"lowerdir "a" is not an absolute path"#),
            (&[mount("overlay", "overlay", &["lowerdir=/a::/data"])], r#"option "lowerdir=/a::/data""#),
            (&[mount("overlay", "overlay", &["lowerdir=/a", "metacopy=on"])], r#"option "metacopy=on""#),
            (&[mount("bind", "/a", &["ro", "uidmap=0:1000:1"])], r#"option "uidmap=0:1000:1" of bind"#),
            (&[mount("erofs", "/a", &["device=/b"])], r#"option "device=/b" of erofs"#),
        ];
        for (mounts, part) in table {
            let message = plan(mounts).expect_err("must be refused").to_string();
            assert!(message.contains(part), "{message} lacks {part}");
        }
    }
}
