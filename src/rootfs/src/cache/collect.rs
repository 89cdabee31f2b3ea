//! Looking through the store: list, verify, collect.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use super::sidecar::Sidecar;
use super::{Cache, CacheError, failed};
use crate::erofs::reader::{Image, checksum};
use crate::lock::{self, Lock};

/// One image in the store.
#[derive(Clone, Debug)]
pub struct Cached {
    /// Its key.
    pub key: String,
    /// Directory or archive that it was made from; `None` when the sidecar cannot be read.
    pub source: Option<String>,
    /// Bytes.
    pub size: u64,
    /// When it was last handed out.
    pub last_used: SystemTime,
    /// A pod has a link to it, or somebody holds it right now.
    pub in_use: bool,
}

/// What [`Cache::verify`] found out about one image.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Its key.
    pub key: String,
    /// What is wrong, if anything.
    pub problem: Option<String>,
    /// The cache has it no more: the next start converts the layer anew.
    pub removed: bool,
}

/// What [`Cache::gc`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Keys of the removed images, least recently used first.
    pub removed: Vec<String>,
    /// Bytes that they had.
    pub freed: u64,
    /// Bytes that remain, whether in use or within the limit.
    pub kept: u64,
}

impl Cache {
    /// All images, least recently used first.
    pub fn ls(&self) -> Result<Vec<Cached>, CacheError> {
        let mut images: Vec<Cached> = self.keys("erofs")?.into_iter().filter_map(|key| self.describe(key)).collect();
        images.sort_by(|a, b| (a.last_used, &a.key).cmp(&(b.last_used, &b.key)));
        Ok(images)
    }

    /// Reads every image in full: checksum, structure, link counts. With `repair` a broken one is removed, so that its layer is
    /// converted anew when it is next needed; pods that use it keep it.
    pub fn verify(&self, repair: bool) -> Result<Vec<Verdict>, CacheError> {
        let check = |key: String| {
            let problem = self.problem(&key).err();
            let removed = problem.is_some() && repair && self.discard(&key)?;
            Ok(Verdict { key, problem, removed })
        };
        self.keys("erofs")?.into_iter().map(check).collect()
    }

    /// Removes a broken image, unless somebody has replaced it meanwhile.
    fn discard(&self, key: &str) -> Result<bool, CacheError> {
        let lock_path = self.file(key, "lock");
        let _lock = Lock::wait(&lock_path).map_err(failed("lock", &lock_path))?;
        if self.problem(key).is_ok() {
            return Ok(false);
        }
        let path = self.file(key, "erofs");
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove image", &path)(e)),
            _ => {}
        }
        let _ = fs::remove_file(self.file(key, "json")); // worthless without the image
        Ok(true)
    }

    /// Removes the least recently used images until at most `max_bytes` remain. Images in use stay, whatever the limit.
    pub fn gc(&self, max_bytes: u64) -> Result<Collected, CacheError> {
        let images = self.ls()?;
        let mut done = Collected { kept: images.iter().map(|i| i.size).sum(), ..Collected::default() };
        for image in images {
            if done.kept > max_bytes && !image.in_use && self.remove(&image.key)? {
                done.kept -= image.size;
                done.freed += image.size;
                done.removed.push(image.key);
            }
        }
        Ok(done)
    }

    /// Removes temporary files whose builder is gone.
    pub(super) fn remove_leftovers(&self) -> Result<(), CacheError> {
        for key in self.keys("tmp")?.into_iter().chain(self.keys("json.tmp")?) {
            let path = self.file(&key, "lock");
            if let Some(_lock) = Lock::try_now(&path).map_err(failed("lock", &path))? {
                for extension in ["tmp", "json.tmp"] {
                    let _ = fs::remove_file(self.file(&key, extension)); // its builder may have finished just now
                }
            }
        }
        Ok(())
    }

    /// Removes an image unless it is being built or used. The image's lock keeps new users away, its link count tells the old.
    fn remove(&self, key: &str) -> Result<bool, CacheError> {
        let lock_path = self.file(key, "lock");
        let Some(_lock) = Lock::try_now(&lock_path).map_err(failed("lock", &lock_path))? else { return Ok(false) };
        let path = self.file(key, "erofs");
        let image = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other.map_err(failed("open image", &path))?,
        };
        let free = lock::claim(&image).map_err(failed("lock image", &path))?;
        if !free || image.metadata().map_err(failed("stat image", &path))?.nlink() > 1 {
            return Ok(false);
        }
        fs::remove_file(&path).map_err(failed("remove image", &path))?;
        for extension in ["json", "lock"] {
            let _ = fs::remove_file(self.file(key, extension)); // worthless without the image
        }
        Ok(true)
    }

    fn describe(&self, key: String) -> Option<Cached> {
        let image = File::open(self.file(&key, "erofs")).ok()?;
        let metadata = image.metadata().ok()?;
        let sidecar = Sidecar::read(&self.file(&key, "json")).ok();
        let used = sidecar.as_ref().and_then(|(_, file)| file.metadata().ok()?.modified().ok());
        let source = sidecar.map(|(s, _)| s.source);
        Some(Cached {
            source,
            size: metadata.size(),
            last_used: used.unwrap_or(SystemTime::UNIX_EPOCH),
            in_use: metadata.nlink() > 1 || !lock::claim(&image).unwrap_or(false),
            key,
        })
    }

    fn problem(&self, key: &str) -> Result<(), String> {
        let image = File::open(self.file(key, "erofs")).map_err(|e| format!("open image: {e}"))?;
        let (sidecar, _) = Sidecar::read(&self.file(key, "json")).map_err(|e| format!("read sidecar: {e}"))?;
        let checksum = checksum(&image).map_err(|e| format!("read image: {e}"))?;
        if sidecar.checksum.is_some_and(|known| checksum != known) {
            return Err("checksum mismatch".into());
        }
        if sidecar.foreign {
            return Ok(());
        }
        let totals = Image::open(&image).and_then(|image| image.check()).map_err(|e| e.to_string())?;
        match totals.inodes == sidecar.inodes {
            true => Ok(()),
            false => Err("number of inodes differs from the sidecar's".into()),
        }
    }

    /// Keys that have a file with this extension, sorted.
    fn keys(&self, extension: &str) -> Result<BTreeSet<String>, CacheError> {
        let mut keys = BTreeSet::new();
        for entry in fs::read_dir(&self.dir).map_err(failed("list", &self.dir))? {
            let name = entry.map_err(failed("list", &self.dir))?.file_name();
            if let Some((key, found)) = name.to_str().and_then(|n| n.split_once('.'))
                && found == extension
            {
                keys.insert(key.to_owned());
            }
        }
        Ok(keys)
    }
}
