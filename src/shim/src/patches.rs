//! Changes to containers' roots: the node's own list (`rootfs.patches` in the configuration), and a pod's (`io.nacelle.patches`).
//!
//! ```text
//!  lowers:   layer, layer, ..  │  the node's patches  │  the pod's patches  │  snapshot's upper        (the last is topmost)
//! ```
//!
//! Each list becomes one EROFS lower of its own, so a pod's patches see what the node's did. They are built before the VM
//! is asked for anything, and nothing of what is below them is changed. Disks as roots cannot be patched: there are none.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use nacelle_rootfs::cache::{Cache, CacheError};
use nacelle_rootfs::patch::{self, Patch, PatchError, Sources};
use nacelle_rootfs::{Layer, Limits};
use thiserror::Error;

/// Longest list in a file, in bytes.
const MAX_LEN: u64 = 16 << 20;

/// Why a list cannot be used.
#[derive(Debug, Error)]
pub enum PatchesError {
    /// The file cannot be read.
    #[error("read patches {path} (rootfs.patches)")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It is no list of patches.
    #[error("use {origin}")]
    Decode {
        /// Where it is from.
        origin: String,
        /// The cause.
        #[source]
        source: Box<PatchError>,
    },
}

/// Lists in the order in which they are applied, each with where on the host it may copy from.
#[derive(Clone, Debug, Default)]
pub struct Patches(Vec<(Vec<Patch>, Sources)>);

impl Patches {
    /// Reads the node's list from `file`, which may copy from anywhere, and a pod's from the value of its annotation, which
    /// may copy from below `host_paths` only.
    ///
    /// # Errors
    /// [`PatchesError`] names the list, the patch's number and the rule.
    pub fn read(
        file: Option<&Path>,
        annotation: Option<(&'static str, &str)>,
        host_paths: &[PathBuf],
    ) -> Result<Self, PatchesError> {
        let mut lists = Vec::new();
        let mut add = |origin: &dyn ToString, json: &[u8], sources| -> Result<(), PatchesError> {
            let failed = |source| PatchesError::Decode { origin: origin.to_string(), source: Box::new(source) };
            lists.push((patch::decode(json, &Limits::default()).map_err(failed)?, sources));
            Ok(())
        };
        if let Some(path) = file {
            let failed = |source| PatchesError::Read { path: path.to_owned(), source };
            let mut json = Vec::new();
            File::open(path).and_then(|f| f.take(MAX_LEN + 1).read_to_end(&mut json)).map_err(failed)?;
            if json.len() as u64 > MAX_LEN {
                return Err(failed(io::ErrorKind::FileTooLarge.into()));
            }
            add(&format!("patches {} (rootfs.patches)", path.display()), &json, Sources::below(["/".into()]))?;
        }
        if let Some((name, json)) = annotation {
            add(&format!("annotation {name}"), json.as_bytes(), Sources::below(host_paths.iter().cloned()))?;
        }
        Ok(Self(lists))
    }

    /// True where nobody wants any.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|(list, _)| list.is_empty())
    }

    /// Builds them over `layers` (bottom first) and puts them on top. Their images lie in `scratch`. Blocks.
    ///
    /// # Errors
    /// [`CacheError`] names the patch.
    pub fn build(&self, cache: &Cache, layers: &mut Vec<Layer>, scratch: &Path) -> Result<(), CacheError> {
        for (number, (list, sources)) in self.0.iter().enumerate() {
            let image = scratch.join(format!("patches-{number}.erofs"));
            layers.extend(cache.patch(layers, list, sources, &image)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_name_where_they_are_from() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("patches.json");
        let read = |annotation| Patches::read(Some(&file), annotation, &[]).map_err(|e| crate::chain(&e));
        let missing = read(None).expect_err("no such file");
        assert!(missing.starts_with(&format!("read patches {} (rootfs.patches): ", file.display())), "{missing}");
        std::fs::write(&file, r#"[{"kind":"remove","path":"/a"}]"#).expect("write");
        assert_eq!(read(Some(("io.nacelle.patches", "[]"))).expect("lists").0.len(), 2);
        let bad = read(Some(("io.nacelle.patches", r#"[{"kind":"remove","path":"a"}]"#))).expect_err("relative");
        assert!(bad.starts_with("use annotation io.nacelle.patches: decode patch 0: path \"a\""), "{bad}");
        std::fs::write(&file, "{}").expect("write");
        let bad = read(None).expect_err("no list");
        assert!(bad.contains("patches.json (rootfs.patches): decode patches"), "{bad}");
    }

    #[test]
    fn the_pods_patches_see_the_nodes_and_copy_from_where_they_may() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join(name);
        for name in ["layer", "scratch", "allowed"] {
            std::fs::create_dir(at(name)).expect("mkdir");
        }
        std::fs::write(at("layer/file"), "layer").expect("write");
        std::fs::write(at("allowed/source"), "copied").expect("write");
        std::fs::write(at("secret"), "secret").expect("write");
        std::fs::write(at("node.json"), r#"[{"kind":"append","path":"/file","content":" node"}]"#).expect("write");
        let cache = Cache::open(&at("root"), Limits::default()).expect("cache");
        let plan =
            nacelle_rootfs::RootfsPlan { lowers: vec![nacelle_rootfs::Lower::Snapshot(at("layer"))], read_only: false };
        let build = |annotation: &str| {
            let mut layers = cache.acquire_all(&plan, &at("scratch"), 1).expect("layers");
            let annotation = Some(("io.nacelle.patches", annotation));
            let patches = Patches::read(Some(&at("node.json")), annotation, &[at("allowed")]).expect("patches");
            patches.build(&cache, &mut layers, &at("scratch")).map(|()| layers)
        };
        let source = at("allowed/source").display().to_string();
        let good = serde_json::json!([
            { "kind": "append", "path": "/file", "content": " pod" },
            { "kind": "copy-file", "src": source, "dst": "/copy" },
        ]);
        let layers = build(&good.to_string()).expect("build");
        assert_eq!(layers.len(), 3);
        let file = File::open(&layers[2].path).expect("image");
        let image = nacelle_rootfs::erofs::reader::Image::open(&file).expect("open");
        let inode = image.lookup(b"/file").expect("file");
        assert_eq!(inode.size, "layer node pod".len() as u64);
        assert_eq!(image.lookup(b"/copy").expect("copy").size, 6);
        let secret = at("secret").display().to_string();
        let bad = serde_json::json!([{ "kind": "copy-file", "src": secret, "dst": "/copy" }]);
        let error = crate::chain(&build(&bad.to_string()).expect_err("outside"));
        assert!(error.contains("apply patch 0 to /copy") && error.contains("secret"), "{error}");
        assert!(build("[]").expect("nothing").len() == 2);
    }
}
