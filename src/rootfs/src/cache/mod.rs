//! The store of converted layers.
//!
//! ```text
//!  <root>/layers/erofs-v1/          mode 0700: images hold files that users of the node must not read
//!      <key>.erofs                  the image, mode 0444, immutable; linked into each pod that uses it; with a tree of
//!                                   digests behind it where that is asked for ([`crate::verity`])
//!      <key>.json                   sidecar: source, checksum, stamp; its modification time is the last use
//!      <key>.lock                   held while the image is built, checked in full or collected
//!      <key>.tmp                    an image being built; whoever gets the lock may remove it
//!
//!  hit:   sidecar → open image → shared lock on the image → stamp agrees
//!  miss:  build lock → look again → <key>.tmp → fsync → sidecar → rename
//! ```
//!
//! Invariants:
//! - A key names one state of one directory (path, file system, inode, birth and change time) and one writer version, so a
//!   reused snapshot directory never finds its predecessor's image; or an archive by its diffID, which its bytes were found to have.
//! - An image appears under its name complete and synced, or not at all. The sidecar is not synced: without a good one the image
//!   counts as suspicious and is built again.
//! - Who holds a [`Layer`] holds a shared lock on its image, and each pod's hard link counts: neither is ever collected.
//! - Nobody waits for a lock while holding another builder's, so builders cannot block each other for ever.

mod collect;
mod convert;
mod index;
mod merged;
mod mounted;
mod patched;
mod protected;
mod sidecar;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD};
use rustix::io::Errno;

pub use collect::{Cached, Collected, Verdict};
pub use index::Missing;

use crate::Limits;
use crate::erofs::reader::checksum;
use crate::erofs::writer::{WriteError, Written};
use crate::layer::LayerError;
use crate::lock::{self, Lock};
use crate::merge::MergeError;
use crate::patch::PatchError;
use crate::plan::{Lower, RootfsPlan};
use crate::tar::{DiffId, TarError};
use crate::tree::Tree;
use crate::upper;
use crate::verity::{self, Verity};
use convert::Temporary;
pub use sidecar::Part;
use sidecar::{Sidecar, Stamp, key_of, key_of_archive};

/// Why the cache cannot give a layer.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A lower of the plan does not exist or is of the wrong kind.
    #[error("find lower {path}")]
    Lower {
        /// The directory or image.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A snapshot cannot be read.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A snapshot cannot be made into an image.
    #[error("convert layer {layer}")]
    Convert {
        /// The snapshot.
        layer: PathBuf,
        /// Cause.
        #[source]
        source: WriteError,
    },
    /// An archive cannot be made into an image.
    #[error("convert archive {diff_id}")]
    Archive {
        /// Its digest.
        diff_id: DiffId,
        /// Cause.
        #[source]
        source: Box<TarError>,
    },
    /// Patches cannot be built.
    #[error(transparent)]
    Patch(#[from] PatchError),
    /// Layers cannot be merged into one image.
    #[error("merge layers into {image}")]
    Merge {
        /// The merged image.
        image: PathBuf,
        /// Cause.
        #[source]
        source: MergeError,
    },
    /// A ready image is none that the guest could mount.
    #[error("use image {path}: {what}")]
    Image {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// An image whose file data lies in others came with too few or too many of them.
    #[error("use image {path}: it needs {needed} further devices, not {given}")]
    Devices {
        /// The image.
        path: PathBuf,
        /// What its superblock says.
        needed: usize,
        /// What came with it.
        given: usize,
    },
    /// An image and a pod's directory are on different file systems.
    #[error("link image {image} to {to}: they must be on one file system")]
    OtherFileSystem {
        /// The image.
        image: PathBuf,
        /// The wanted name.
        to: PathBuf,
    },
    /// A file of the cache or the scratch directory.
    #[error("{what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CacheError + use<'a> {
    move |source| CacheError::Io { what, path: path.into(), source }
}

/// How a layer was come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was in the cache.
    Hit,
    /// It was converted and published.
    Built,
    /// The cached image was damaged; it was converted again.
    Rebuilt,
    /// It was converted for this container only.
    Ephemeral,
    /// Its names and small files are in an image for this container only; the rest is where the layer is.
    Indexed,
    /// It was an image already.
    Ready,
}

/// An image that can be used as a lower. While the value lives, the image is not collected.
#[derive(Debug)]
pub struct Layer {
    /// The image.
    pub path: PathBuf,
    /// What it is called in the cache; unique for images outside it too.
    pub key: String,
    /// Bytes.
    pub size: u64,
    /// How it was come by.
    pub outcome: Outcome,
    /// Time it took, waiting for another builder included.
    pub took: Duration,
    /// Images that hold file data of this one, in the order of its device table.
    pub devices: Vec<Layer>,
    /// Directories that hold file data of it, found there by path; what is in the first counts.
    pub data: Vec<PathBuf>,
    /// What it can be checked against as it is read; images of others cannot.
    pub verity: Option<Verity>,
    /// The layers that it is a merged image of, the lowest first.
    pub parts: Vec<Part>,
    file: File,
    opaque: bool,
}

/// An image that was made.
struct Made {
    file: File,
    written: Written,
    opaque: bool,
    parts: Vec<Part>,
}

impl From<(File, Written, bool)> for Made {
    fn from((file, written, opaque): (File, Written, bool)) -> Made {
        Made { file, written, opaque, parts: Vec::new() }
    }
}

/// Why a writable layer on a disk is refused once it exists.
const WRITTEN: &str = "this disk of the snapshotter's has been written to, and its files cannot be taken over";

/// The store; opening it is cheap.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    limits: Limits,
    verity: bool,
}

impl Cache {
    /// Opens the store below `root` (as in `/var/lib/nacelle`), creating it when needed and removing what builders left that died.
    pub fn open(root: &Path, limits: Limits) -> Result<Cache, CacheError> {
        let layers = root.join("layers");
        let dir = layers.join("erofs-v1");
        fs::create_dir_all(root).map_err(failed("create directory", root))?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed("create directory", &dir))?;
        let cache = Cache { dir, limits, verity: false };
        cache.remove_leftovers()?;
        Ok(cache)
    }

    /// From now on every image that it makes or finds has a tree of digests; one that has none is made again.
    pub fn with_verity(self, verity: bool) -> Cache {
        Cache { verity, ..self }
    }

    /// Gives the plan's layers, bottom first, converting what is missing on up to `threads` threads. Writable lowers are
    /// converted into `scratch`, which must exist and belongs to the caller. An empty upper is left out, and so is everything
    /// below a layer whose root is opaque.
    pub fn acquire_all(&self, plan: &RootfsPlan, scratch: &Path, threads: usize) -> Result<Vec<Layer>, CacheError> {
        self.acquire(plan, scratch, threads, Missing::Convert)
    }

    /// The same, with a choice of what happens to snapshots that are missing. Indexes lie in `scratch`, like what is converted from
    /// writable lowers.
    pub fn acquire(
        &self,
        plan: &RootfsPlan,
        scratch: &Path,
        threads: usize,
        how: Missing,
    ) -> Result<Vec<Layer>, CacheError> {
        let mut layers: Vec<Option<Layer>> = Vec::with_capacity(plan.lowers.len());
        let mut missing = Vec::new();
        for (index, lower) in plan.lowers.iter().enumerate() {
            let layer = match lower {
                Lower::Snapshot(dir) => match mounted::image(dir).map(|image| self.ready(&image, &[])) {
                    Some(Ok(layer)) => Some(layer),
                    // Not mounted from an image, or from one that the guest could not mount.
                    None | Some(Err(_)) => self.cached(dir)?,
                },
                Lower::Image(image, devices) => Some(self.ready(image, devices)?),
                Lower::Writable(_) | Lower::Upper(_) | Lower::UpperDisk(_) => None,
            };
            let left_out = match lower {
                Lower::Upper(dir) => is_empty(dir)?,
                Lower::UpperDisk(disk) => !written(disk)?,
                _ => false,
            };
            if layer.is_none() && !left_out {
                missing.push(index);
            }
            layers.push(layer);
        }
        let how = how.possible(plan, &layers, &missing);
        for (index, layer) in self.convert_missing(plan, &missing, scratch, threads, how)? {
            layers[index] = Some(layer);
        }
        let mut layers: Vec<Layer> = layers.into_iter().flatten().collect();
        let bottom = layers.iter().rposition(|layer| layer.opaque).unwrap_or(0);
        layers.drain(..bottom);
        Ok(layers)
    }

    /// Converts the lowers in `missing` (indexes into the plan); the first error stops the others from starting.
    fn convert_missing(
        &self,
        plan: &RootfsPlan,
        missing: &[usize],
        scratch: &Path,
        threads: usize,
        how: Missing,
    ) -> Result<Vec<(usize, Layer)>, CacheError> {
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let results = Mutex::new(Vec::with_capacity(missing.len()));
        let work = || {
            while !stop.load(Ordering::Relaxed)
                && let Some(&index) = missing.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let layer = match &plan.lowers[index] {
                    Lower::Snapshot(dir) => match how {
                        Missing::Convert => self.build_snapshot(dir, None),
                        Missing::Index(worth) => {
                            self.index_or_build(dir, &scratch.join(format!("index-{index}.erofs")), worth)
                        }
                    },
                    Lower::Image(image, devices) => self.ready(image, devices),
                    Lower::UpperDisk(disk) => Err(CacheError::Image { path: disk.into(), what: WRITTEN }),
                    Lower::Writable(dir) | Lower::Upper(dir) => {
                        self.ephemeral(dir, &scratch.join(format!("lower-{index}.erofs")))
                    }
                };
                stop.fetch_or(layer.is_err(), Ordering::Relaxed);
                let mut results = results.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                results.push(layer.map(|layer| (index, layer)));
            }
        };
        std::thread::scope(|scope| {
            (1..threads.min(missing.len())).for_each(|_| drop(scope.spawn(work)));
            work(); // this thread is one of them
        });
        results.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).into_iter().collect()
    }

    /// Gives `layer`'s image a second name, `dir/name`, by a hard link. The link keeps the image from being collected.
    pub fn link_into(&self, layer: &Layer, dir: &Path, name: &str) -> Result<PathBuf, CacheError> {
        use std::os::fd::AsRawFd;
        let to = dir.join(name);
        // The descriptor and not the path: exactly the image that was checked.
        let from = format!("/proc/self/fd/{}", layer.file.as_raw_fd());
        match rustix::fs::linkat(CWD, from, CWD, &to, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => Ok(to),
            Err(Errno::XDEV) => Err(CacheError::OtherFileSystem { image: layer.path.clone(), to }),
            Err(e) => Err(failed("link image to", &to)(e.into())),
        }
    }

    /// A published image whose stamp agrees; `None` for anything else. Takes no lock that others wait for.
    fn cached(&self, dir: &Path) -> Result<Option<Layer>, CacheError> {
        let start = Instant::now();
        let key = key_of(dir).map_err(|source| CacheError::Lower { path: dir.into(), source })?;
        Ok(self.hit(&key, start, false))
    }

    /// `wait` for who looks at the image right now: only with the key's lock, so that it is not being collected.
    fn hit(&self, key: &str, start: Instant, wait: bool) -> Option<Layer> {
        let (sidecar, touch) = Sidecar::read(&self.file(key, "json")).ok()?;
        let path = self.file(key, "erofs");
        let file = File::open(&path).ok()?;
        let lacking = self.verity && sidecar.verity.is_none();
        if lacking || !lock::share(&file, wait).ok()? || Stamp::of(&file).ok()? != sidecar.stamp {
            return None;
        }
        if sidecar.fs_verity.is_some() && protected::digest(&file).ok()? != sidecar.fs_verity {
            return None;
        }
        // Only the order of collection depends on it.
        let _ = touch.set_modified(std::time::SystemTime::now());
        Some(Layer {
            path,
            key: key.into(),
            size: sidecar.stamp.size,
            outcome: Outcome::Hit,
            took: start.elapsed(),
            devices: Vec::new(),
            data: Vec::new(),
            verity: sidecar.verity,
            parts: sidecar.parts,
            file,
            opaque: sidecar.opaque,
        })
    }

    /// `tree`: what is in it, if somebody knows already.
    fn build_snapshot(&self, dir: &Path, tree: Option<&Tree>) -> Result<Layer, CacheError> {
        let key = key_of(dir).map_err(|source| CacheError::Lower { path: dir.into(), source })?;
        self.build_or_wait(key, dir.to_string_lossy().into_owned(), |temp| match tree {
            Some(tree) => self.convert_tree(dir, tree, temp),
            None => self.convert(dir, temp),
        })
    }

    /// Gives the image of the archive with this diffID. `open` is asked for the archive's bytes when they are needed; they are
    /// verified while they are converted, so that an image never holds anything else.
    pub fn acquire_archive<R: Read + Send>(
        &self,
        diff_id: DiffId,
        open: impl FnOnce() -> io::Result<R>,
    ) -> Result<Layer, CacheError> {
        let key = key_of_archive(diff_id);
        match self.hit(&key, Instant::now(), false) {
            Some(layer) => Ok(layer),
            None => self.build_or_wait(key, diff_id.to_string(), |temp| self.convert_archive(diff_id, open, temp)),
        }
    }

    /// The slow path: alone with this key, look again, check a suspicious image in full, or `make` it.
    fn build_or_wait<M: Into<Made>>(
        &self,
        key: String,
        source: String,
        make: impl FnOnce(&Path) -> Result<M, CacheError>,
    ) -> Result<Layer, CacheError> {
        self.obtain(key, source, false, make)
    }

    /// The same, also for copies of what others made.
    fn obtain<M: Into<Made>>(
        &self,
        key: String,
        source: String,
        foreign: bool,
        make: impl FnOnce(&Path) -> Result<M, CacheError>,
    ) -> Result<Layer, CacheError> {
        let start = Instant::now();
        let lock_path = self.file(&key, "lock");
        let _lock = Lock::wait(&lock_path).map_err(failed("lock", &lock_path))?;
        if let Some(layer) = self.hit(&key, start, true) {
            return Ok(layer);
        }
        let suspicious = self.file(&key, "erofs").exists();
        if suspicious && self.restamp(&key).is_some() {
            // Sound, only moved: a restored backup, say.
            if let Some(layer) = self.hit(&key, start, true) {
                return Ok(layer);
            }
        }
        let outcome = if suspicious { Outcome::Rebuilt } else { Outcome::Built };
        self.publish(source, &key, foreign, make)?;
        let layer = self.hit(&key, start, true).map(|layer| Layer { outcome, ..layer });
        layer.ok_or_else(|| {
            failed("read back image", &self.file(&key, "erofs"))(io::Error::other("it changed meanwhile"))
        })
    }

    /// Gives a suspicious image its stamp back when its checksum is right.
    fn restamp(&self, key: &str) -> Option<()> {
        let path = self.file(key, "json");
        let (mut sidecar, _) = Sidecar::read(&path).ok()?;
        let image = File::open(self.file(key, "erofs")).ok()?;
        (Some(checksum(&image).ok()?) == sidecar.checksum).then_some(())?;
        sidecar.stamp = Stamp::of(&image).ok()?;
        sidecar.fs_verity = protected::digest(&image).ok()?;
        sidecar.write(&path).ok()
    }

    /// Makes an image, and puts it and its sidecar in place. The key's lock is held.
    fn publish<M: Into<Made>>(
        &self,
        source: String,
        key: &str,
        foreign: bool,
        make: impl FnOnce(&Path) -> Result<M, CacheError>,
    ) -> Result<(), CacheError> {
        let temp = self.file(key, "tmp");
        let temporary = Temporary(Some(&temp));
        let Made { file: image, written, opaque, parts } = make(&temp)?.into();
        // Blocks that are shared shall not be read now, when somebody waits for the image: see `settle`.
        let later = written.checksum.is_none() && written.shared > 0 && !self.verity;
        let (verity, checksum) = if later {
            (None, None)
        } else {
            let whole = written.checksum.map_or_else(|| checksum(&image), Ok);
            let whole = whole.map_err(failed("read back image", &temp))?;
            let (verity, checksum) = self.seal(&image, whole).map_err(failed("seal image", &temp))?;
            (verity, Some(checksum))
        };
        image.sync_all().map_err(failed("sync image", &temp))?;
        let sidecar = Sidecar {
            source,
            checksum,
            foreign,
            fs_verity: None,
            verity,
            inodes: written.inodes,
            opaque,
            parts,
            stamp: Stamp::of(&image).map_err(failed("read back image", &temp))?,
        };
        let path = self.file(key, "json");
        sidecar.write(&path).map_err(failed("write sidecar", &path))?;
        let path = self.file(key, "erofs");
        fs::rename(&temp, &path).map_err(failed("publish image", &path))?;
        temporary.keep();
        Ok(())
    }

    /// What can wait until the pod runs that new images were made for: those that nobody has read in full are read, so that later
    /// damage shows, and the file system protects them, if it can (fs-verity).
    ///
    /// # Errors
    /// [`CacheError::Io`]
    pub fn settle<'k>(&self, keys: impl IntoIterator<Item = &'k str>) -> Result<(), CacheError> {
        for key in keys {
            let lock_path = self.file(key, "lock");
            let _lock = Lock::wait(&lock_path).map_err(failed("lock", &lock_path))?;
            // It may be gone, and somebody else's may be in its place.
            let Ok((sidecar, _)) = Sidecar::read(&self.file(key, "json")) else { continue };
            let path = self.file(key, "erofs");
            let Ok(image) = File::open(&path) else { continue };
            if !Stamp::of(&image).is_ok_and(|stamp| stamp == sidecar.stamp) {
                continue;
            }
            let checksum = match sidecar.checksum {
                None => Some(checksum(&image).map_err(failed("read back image", &path))?),
                known => known,
            };
            let fs_verity = protected::protect(&image).map_err(failed("protect image", &path))?;
            if (checksum, &fs_verity) != (sidecar.checksum, &sidecar.fs_verity) {
                let path = self.file(key, "json");
                let settled = Sidecar { checksum, fs_verity, ..sidecar };
                settled.write(&path).map_err(failed("write sidecar", &path))?;
            }
        }
        Ok(())
    }

    /// Puts a tree of digests behind an image, if there is to be one; returns also the checksum of what the file is then.
    fn seal(&self, image: &File, checksum: u32) -> io::Result<(Option<Verity>, u32)> {
        if !self.verity {
            return Ok((None, checksum));
        }
        verity::append(image, checksum).map(|(verity, checksum)| (Some(verity), checksum))
    }

    fn file(&self, key: &str, extension: &str) -> PathBuf {
        self.dir.join(format!("{key}.{extension}"))
    }
}

/// Whether something is on a disk that a snapshotter names: it may not have been made yet, or nobody has used it.
fn written(disk: &Path) -> Result<bool, CacheError> {
    let some = fs::metadata(disk).and_then(|metadata| Ok(metadata.len() > 0 && !upper::is_blank(disk)?));
    match some {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        other => other.map_err(|source| CacheError::Lower { path: disk.into(), source }),
    }
}

fn is_empty(dir: &Path) -> Result<bool, CacheError> {
    let missing = |source| CacheError::Lower { path: dir.into(), source };
    Ok(fs::read_dir(dir).map_err(missing)?.next().is_none())
}
