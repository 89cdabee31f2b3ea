//! The mounts that containerd hands over → which directories and images make up the root file system. Pure: nothing is touched.
//!
//! ```text
//!  overlay  lowerdir=c:b:a, upperdir=u, workdir=w   →   snapshots a, b, c · upper u, when it holds anything
//!  overlay  lowerdir=b:a                            →   snapshots a, b, read-only           (a view)
//!  bind     ro  /snapshots/1/fs                     →   snapshot, read-only                 (a view of one layer)
//!  bind     rw  /snapshots/1/fs                     →   writable directory                  (no parent; native snapshotter)
//!  erofs    /snapshots/1/layer.erofs                →   image, used as it is
//!
//!  several, of which the last is the root; it names the others by their number (containerd's `core/mount/manager`):
//!
//!  0  mkfs/ext4            rwlayer.img                       the writable layer as a disk, made when it is not there yet
//!  1  erofs                /snapshots/2/layer.erofs          an image
//!  2  erofs                /snapshots/1/fsmeta.erofs         an image whose file data lies in others:
//!                          device=…/0/layer.erofs,device=…
//!  3  format/mkdir/overlay lowerdir={{ overlay 1 2 }}        the mount points of 1 to 2, topmost first
//!                          upperdir={{ mount 0 }}/upper  (or lowerdir={{ mount 1 }}:{{ mount 2 }})
//!     format/bind          {{ mount 1 }}                     the mount point of 1
//! ```
//!
//! One more is no plan of layers: a file system on a disk image, which [`disk`] reads.
//!
//! ```text
//!  ext4     loop, rw   /blockfile/snapshots/7                the root as it is      (blockfile snapshotter)
//! ```

use std::path::PathBuf;

mod disk;

pub use disk::{DiskRoot, disk};

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
    /// An EROFS image that is ready, and those that hold file data of it, in the order of its device table.
    Image(PathBuf, Vec<PathBuf>),
    /// A disk for the writable side that the snapshotter would make: left out when it is not there, or nothing is in it.
    UpperDisk(PathBuf),
}

impl Lower {
    /// The directory or image.
    pub fn source(&self) -> &PathBuf {
        match self {
            Lower::Snapshot(path) | Lower::Writable(path) | Lower::Upper(path) => path,
            Lower::Image(path, _) | Lower::UpperDisk(path) => path,
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

/// Where the snapshotter would have the ids of the layers' files: id 0 of a file is id `first`, and so on, for users and groups
/// alike. It asks for that where a container has a user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdMap {
    /// First id.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// Why mounts cannot be turned into a plan.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No mounts at all.
    #[error("plan rootfs: the task has no rootfs mounts")]
    NoMounts,
    /// Several mounts, and one that the root does not refer to: the root would hide it.
    #[error("plan rootfs: mount {0} is not part of the root, which is mount {1}")]
    Unused(usize, usize),
    /// A reference to a mount that is not there, or that cannot stand where it is used.
    #[error("plan rootfs: {option:?} refers to mount {index}, which cannot be used there")]
    Reference {
        /// Where it stands.
        option: String,
        /// The mount's number.
        index: usize,
    },
    /// Something in double braces that is no reference.
    #[error("plan rootfs: template {0:?} is not supported")]
    Template(String),
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
    /// Users and groups are to be mapped differently.
    #[error("plan rootfs: uidmap and gidmap are not the same")]
    Ids,
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
    let (root, others) = mounts.split_last().ok_or(PlanError::NoMounts)?;
    if let Some(elsewhere) = mounts.iter().find(|mount| !matches!(mount.target.as_str(), "" | "/")) {
        let Mount { source, target, .. } = elsewhere.clone();
        return Err(PlanError::Target { source_path: source, target });
    }
    let mut parts = Parts { mounts: others, used: vec![false; others.len()] };
    // Preparations of containerd's mount manager: what is in braces is looked at anyway, and directories need not be made.
    let kind = root.kind.strip_prefix("format/").unwrap_or(&root.kind);
    let plan = match kind.strip_prefix("mkdir/").unwrap_or(kind) {
        "overlay" => overlay(root, &mut parts),
        "bind" | "rbind" => bind(root, &mut parts),
        // Some callers leave the type of a bind mount empty and say it in the options.
        "" | "none" if root.options.iter().any(|o| o == "bind" || o == "rbind") => bind(root, &mut parts),
        "erofs" => Ok(RootfsPlan { lowers: vec![erofs(root)?], read_only: true }),
        _ => Err(PlanError::Kind { kind: root.kind.clone(), source_path: root.source.clone() }),
    }?;
    match parts.used.iter().position(|used| !used) {
        Some(unused) => Err(PlanError::Unused(unused, others.len())),
        None => Ok(plan),
    }
}

/// The mounts before the root, and which of them it refers to.
struct Parts<'a> {
    mounts: &'a [Mount],
    used: Vec<bool>,
}

/// What a piece of text in double braces refers to.
#[derive(Debug, PartialEq, Eq)]
enum Reference<'t> {
    /// The mount point of one mount, and the path below it.
    Mount(usize, &'t str),
    /// Those of several, the first the topmost.
    Overlay(usize, usize),
}

/// Reads `{{ mount N }}` with a path behind it, or `{{ overlay N M }}`; `None` for text without braces.
fn reference(text: &str) -> Result<Option<Reference<'_>>, PlanError> {
    let bad = || PlanError::Template(text.into());
    let Some(inner) = text.strip_prefix("{{") else {
        return if text.contains("{{") { Err(bad()) } else { Ok(None) };
    };
    let (inner, path) = inner.split_once("}}").ok_or_else(bad)?;
    let words: Vec<_> = inner.split_ascii_whitespace().collect();
    let number = |word: &str| word.parse::<usize>().map_err(|_| bad());
    match words.as_slice() {
        ["mount", index] if path.is_empty() || path.starts_with('/') => {
            Ok(Some(Reference::Mount(number(index)?, path)))
        }
        ["overlay", first, last] if path.is_empty() => Ok(Some(Reference::Overlay(number(first)?, number(last)?))),
        _ => Err(bad()),
    }
}

impl Parts<'_> {
    /// The image that mount `index` is; `text` is where it stands.
    fn image(&mut self, index: usize, text: &str) -> Result<Lower, PlanError> {
        match self.mounts.get(index) {
            Some(mount) if mount.kind == "erofs" => {
                self.used[index] = true;
                erofs(mount)
            }
            _ => Err(PlanError::Reference { option: text.into(), index }),
        }
    }

    /// The images of mounts `first` to `last`, in either direction.
    fn images(&mut self, first: usize, last: usize, text: &str) -> Result<Vec<Lower>, PlanError> {
        let (low, high) = (first.min(last), first.max(last));
        if high >= self.mounts.len() {
            return Err(PlanError::Reference { option: text.into(), index: high });
        }
        let mut images = (low..=high).map(|index| self.image(index, text)).collect::<Result<Vec<_>, _>>()?;
        if first > last {
            images.reverse();
        }
        Ok(images)
    }

    /// The writable layer on a disk that mount `index` is.
    fn upper_disk(&mut self, index: usize, text: &str) -> Result<Lower, PlanError> {
        match self.mounts.get(index) {
            Some(mount) if matches!(mount.kind.as_str(), "mkfs/ext4" | "ext4") => {
                self.used[index] = true;
                Ok(Lower::UpperDisk(absolute("disk of the writable layer", &mount.source)?))
            }
            _ => Err(PlanError::Reference { option: text.into(), index }),
        }
    }
}

fn overlay(mount: &Mount, parts: &mut Parts) -> Result<RootfsPlan, PlanError> {
    let mut lowers = Vec::new(); // topmost first, as in the options
    let mut upper = None;
    let mut read_only = false;
    for option in &mount.options {
        match option.split_once('=') {
            Some(("lowerdir", value)) => {
                lowers = if value.contains("{{") {
                    // No path with a colon stands beside a reference, so every colon divides.
                    let each = value.split(':').map(|part| named(part, option, parts));
                    each.collect::<Result<Vec<_>, _>>()?.concat()
                } else {
                    split_lowers(mount, option, value)?.into_iter().map(Lower::Snapshot).collect()
                }
            }
            Some(("lowerdir+", value)) => lowers.push(Lower::Snapshot(absolute("lowerdir", value)?)),
            Some(("upperdir", value)) => {
                upper = Some(match reference(value)? {
                    Some(Reference::Mount(index, _)) => parts.upper_disk(index, option)?,
                    Some(Reference::Overlay(..)) => return Err(PlanError::Template(option.clone())),
                    None => Lower::Upper(absolute("upperdir", &unescape(value))?),
                })
            }
            // Files whose data lies in another layer.
            Some(("metacopy", "on") | ("datadir+", _)) => return Err(unsupported(mount, option)),
            _ => read_only |= option == "ro",
        }
    }
    if lowers.is_empty() {
        return Err(PlanError::NoLowers);
    }
    lowers.reverse();
    read_only |= upper.is_none();
    lowers.extend(upper);
    Ok(RootfsPlan { lowers, read_only })
}

/// The lowers that one part of `lowerdir` names, topmost first.
fn named(part: &str, option: &str, parts: &mut Parts) -> Result<Vec<Lower>, PlanError> {
    match reference(part)? {
        Some(Reference::Mount(index, "")) => Ok(vec![parts.image(index, option)?]),
        Some(Reference::Overlay(first, last)) => parts.images(first, last, option),
        Some(Reference::Mount(..)) => Err(PlanError::Template(option.into())),
        None => Ok(vec![Lower::Snapshot(absolute("lowerdir", part)?)]),
    }
}

/// How the ids of the layers' files are to be mapped, which [`plan`] does not say.
///
/// # Errors
/// [`PlanError::Option`] for a map that is not one range from 0 on, or not the same for users and groups.
pub fn ids(mounts: &[Mount]) -> Result<Option<IdMap>, PlanError> {
    let Some(root) = mounts.last() else { return Ok(None) };
    let mut found = [None; 2];
    for option in &root.options {
        let (map, place) = match option.split_once('=') {
            Some(("uidmap", map)) => (map, 0),
            Some(("gidmap", map)) => (map, 1),
            _ => continue,
        };
        let numbers: Vec<u32> = map.split(':').filter_map(|number| number.parse().ok()).collect();
        match (numbers.as_slice(), map.split(':').count()) {
            ([0, first, count], 3) => found[place] = Some(IdMap { first: *first, count: *count }),
            _ => return Err(unsupported(root, option)),
        }
    }
    match found {
        [users, groups] if users == groups => Ok(users),
        _ => Err(PlanError::Ids),
    }
}

fn bind(mount: &Mount, parts: &mut Parts) -> Result<RootfsPlan, PlanError> {
    if let Some(option) = mount.options.iter().find(|o| o.starts_with("uidmap=") || o.starts_with("gidmap=")) {
        return Err(unsupported(mount, option));
    }
    // Like mount(8), the later of "ro" and "rw" counts.
    let read_only = mount.options.iter().rfind(|o| *o == "ro" || *o == "rw").is_some_and(|o| o == "ro");
    let lower = match reference(&mount.source)? {
        Some(Reference::Mount(index, "")) => parts.image(index, &mount.source)?,
        Some(Reference::Mount(index, _)) => parts.upper_disk(index, &mount.source)?,
        Some(Reference::Overlay(..)) => return Err(PlanError::Template(mount.source.clone())),
        None => {
            let source = absolute("bind source", &mount.source)?;
            if read_only { Lower::Snapshot(source) } else { Lower::Writable(source) }
        }
    };
    let read_only = read_only || matches!(lower, Lower::Image(..));
    Ok(RootfsPlan { lowers: vec![lower], read_only })
}

fn erofs(mount: &Mount) -> Result<Lower, PlanError> {
    if let Some(option) = mount.options.iter().find(|o| o.starts_with("fsoffset=")) {
        return Err(unsupported(mount, option));
    }
    let devices = mount.options.iter().filter_map(|option| option.strip_prefix("device="));
    let devices = devices.map(|device| absolute("device of an erofs image", device)).collect::<Result<_, _>>()?;
    Ok(Lower::Image(absolute("erofs image", &mount.source)?, devices))
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

    pub(super) fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
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

    fn image(path: &str, devices: &[&str]) -> Lower {
        Lower::Image(path.into(), devices.iter().map(|&d| d.into()).collect())
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
            (mount("erofs", "/s/1/layer.erofs", &["ro", "loop"]), vec![image("/s/1/layer.erofs", &[])], true),
        ];
        for (mount, lowers, read_only) in table {
            let made = plan(std::slice::from_ref(&mount));
            assert_eq!(made, Ok(RootfsPlan { lowers, read_only }), "{mount:?}");
        }
    }

    /// What the erofs snapshotter of containerd 2.2 and later gives (`plugins/snapshots/erofs/erofs.go`, `mounts`).
    #[test]
    fn mounts_of_images() {
        let layer = |n: u32| mount("erofs", &format!("/s/{n}/layer.erofs"), &["ro", "loop"]);
        let verity = mount("erofs", "/s/1/layer.erofs", &["ro", "loop", "X-containerd.dmverity=/s/1/.dmverity"]);
        let merged =
            mount("erofs", "/s/2/fsmeta.erofs", &["ro", "loop", "device=/s/1/layer.erofs", "device=/s/2/layer.erofs"]);
        let options = ["X-containerd.mkfs.fs=ext4", "X-containerd.mkfs.size=67108864", "rw", "loop"];
        let disk = mount("mkfs/ext4", "/s/4/rwlayer.img", &options);
        let made = mount("ext4", "/s/4/rwlayer.img", &options);
        let root = |options: &[&str]| mount("format/mkdir/overlay", "overlay", options);
        let on_disk = |lowers| {
            root(&[
                "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
                "workdir={{ mount 0 }}/work",
                "upperdir={{ mount 0 }}/upper",
                lowers,
            ])
        };
        let upper = || Lower::Upper("/s/4/fs".into());
        let upper_disk = || Lower::UpperDisk("/s/4/rwlayer.img".into());
        let (one, two) = (image("/s/1/layer.erofs", &[]), image("/s/2/layer.erofs", &[]));
        let both = image("/s/2/fsmeta.erofs", &["/s/1/layer.erofs", "/s/2/layer.erofs"]);
        let both = move || both.clone();
        let table = [
            // Two layers and a directory to write in; a view of two; of one.
            (
                vec![layer(2), verity, root(&["workdir=/s/4/work", "upperdir=/s/4/fs", "lowerdir={{ overlay 0 1 }}"])],
                vec![one.clone(), two.clone(), upper()],
                false,
            ),
            (vec![layer(2), layer(1), root(&["lowerdir={{ overlay 0 1 }}"])], vec![one.clone(), two.clone()], true),
            (vec![layer(1)], vec![one.clone()], true),
            // Upwards, as only other callers write it.
            (vec![layer(1), layer(2), root(&["lowerdir={{ overlay 1 0 }}"])], vec![one.clone(), two.clone()], true),
            // A disk to write in, which the mount manager has made or not.
            (
                vec![disk.clone(), layer(2), layer(1), on_disk("lowerdir={{ overlay 1 2 }}")],
                vec![one.clone(), two.clone(), upper_disk()],
                false,
            ),
            (vec![made.clone(), layer(1), on_disk("lowerdir={{ mount 1 }}")], vec![one.clone(), upper_disk()], false),
            // One by one, and beside a directory.
            (
                vec![made, layer(2), layer(1), on_disk("lowerdir={{ mount 1 }}:{{ mount 2 }}:/s/0/fs")],
                vec![Lower::Snapshot("/s/0/fs".into()), one, two, upper_disk()],
                false,
            ),
            // No parent.
            (
                vec![disk, mount("format/mkdir/bind", "{{ mount 0 }}/upper", &["rw", "rbind"])],
                vec![upper_disk()],
                false,
            ),
            // Layers behind one merged image, alone and below another.
            (
                vec![merged.clone(), root(&["workdir=/s/4/work", "upperdir=/s/4/fs", "lowerdir={{ mount 0 }}"])],
                vec![both(), upper()],
                false,
            ),
            (vec![merged.clone(), mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"])], vec![both()], true),
            (
                vec![layer(3), merged, root(&["lowerdir={{ overlay 0 1 }}"])],
                vec![both(), image("/s/3/layer.erofs", &[])],
                true,
            ),
        ];
        for (mounts, lowers, read_only) in table {
            assert_eq!(plan(&mounts), Ok(RootfsPlan { lowers, read_only }), "{mounts:?}");
        }
    }

    #[test]
    fn bad_references_are_refused() {
        let layer = || mount("erofs", "/s/1/layer.erofs", &["ro"]);
        let root = |option: &str| mount("format/overlay", "overlay", &[option]);
        let table = [
            (vec![layer(), root("lowerdir={{ mount 1 }}")], "refers to mount 1"),
            (vec![layer(), root("lowerdir={{ overlay 0 99999999999 }}")], "refers to mount 99999999999"),
            (vec![layer(), root("lowerdir={{ mount 0 }}/below")], "template"),
            (vec![layer(), root("lowerdir={{ source 0 }}")], "template"),
            (vec![layer(), root("lowerdir={{ mount -1 }}")], "template"),
            (vec![layer(), root("lowerdir=a:{{ mount 0 }}")], "not an absolute path"),
            (vec![layer(), root("lowerdir={{ mount 0 }}:")], "not an absolute path"),
            (vec![layer(), root("lowerdir={{ mount 0 }}{{ mount 0 }}")], "template"),
            (vec![layer(), root("lowerdir={{ mount 0")], "template"),
            (vec![layer(), root("lowerdir=/a")], "mount 0 is not part of the root, which is mount 1"),
            (vec![layer(), layer(), root("lowerdir={{ mount 1 }}")], "mount 0 is not part"),
            (vec![mount("ext4", "/d", &[]), root("lowerdir={{ mount 0 }}")], "refers to mount 0"),
            (vec![layer(), mount("format/bind", "{{ mount 0 }}/upper", &["rw"])], "refers to mount 0"),
            (vec![mount("erofs", "layer", &[]), root("lowerdir={{ mount 0 }}")], "not an absolute path"),
        ];
        for (mounts, part) in table {
            let message = plan(&mounts).expect_err("must be refused").to_string();
            assert!(message.contains(part), "{message} lacks {part}");
        }
    }

    #[test]
    fn ids_are_one_range() {
        let of = |options: &[&str]| ids(&[mount("overlay", "overlay", options)]);
        assert_eq!(of(&["lowerdir=/a"]), Ok(None));
        let map = Some(IdMap { first: 65_536, count: 1000 });
        assert_eq!(of(&["uidmap=0:65536:1000", "gidmap=0:65536:1000"]), Ok(map));
        assert_eq!(of(&["uidmap=0:65536:1000"]), Err(PlanError::Ids));
        for bad in ["1:65536:1000", "0:65536", "0:65536:1000,1000:1:1", "0:-1:1", "0:1:4294967296"] {
            let option = format!("uidmap={bad}");
            assert!(matches!(of(&[&option]), Err(PlanError::Option { .. })), "{bad}");
        }
    }

    #[test]
    fn refusals_name_their_reason() {
        let many = vec![mount("bind", "/a", &[]), mount("bind", "/b", &[])];
        let elsewhere = Mount { target: "/data".into(), ..mount("bind", "/a", &[]) };
        let table: [(&[Mount], &str); 10] = [
            (&[], "the task has no rootfs mounts"),
            (&many, "mount 0 is not part of the root, which is mount 1"),
            (&[elsewhere], "mount of /a goes to /data"),
            (&[mount("fuse.nydus", "/n", &[])], r#"mount type "fuse.nydus" of "/n""#),
            (&[mount("overlay", "overlay", &["upperdir=/u"])], "no lowerdir"),
            (&[mount("overlay", "overlay", &["lowerdir=a:/b"])], r#"lowerdir "a" is not an absolute path"#),
            (&[mount("overlay", "overlay", &["lowerdir=/a::/data"])], r#"option "lowerdir=/a::/data""#),
            (&[mount("overlay", "overlay", &["lowerdir=/a", "metacopy=on"])], r#"option "metacopy=on""#),
            (&[mount("bind", "/a", &["ro", "uidmap=0:1000:1"])], r#"option "uidmap=0:1000:1" of bind"#),
            (&[mount("erofs", "/a", &["fsoffset=8"])], r#"option "fsoffset=8" of erofs"#),
        ];
        for (mounts, part) in table {
            let message = plan(mounts).expect_err("must be refused").to_string();
            assert!(message.contains(part), "{message} lacks {part}");
        }
    }
}
