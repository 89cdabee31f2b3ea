//! ConfigMaps, Secrets and projected volumes: a container that watches them hears of changes.
//!
//! ```text
//!  kubelet swaps <volume>/..data ── inotify ─► shim ── Refresh ─► agent swaps it in the guest's copy ── inotify ─► container
//! ```
//!
//! Such a volume is known by its link, which nothing but the kubelet's way of writing has. What has no such link is shared as
//! it is, and so is what is too large to be copied: there a change is seen, but nobody is told.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nacelle_protocol::agent::{DATA_LINK, Mirror};
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use crate::guest::Guest;
use crate::spec::Volume;

/// Most bytes of a volume that is copied; Kubernetes' own limit for one object is 1 MiB.
const MAX_BYTES: u64 = 8 << 20;
/// Most files of it, and deepest directory.
const MAX_FILES: usize = 10_000;
const MAX_DEPTH: usize = 8;

#[derive(Clone, Debug)]
struct Watched {
    volume: String,
    source: PathBuf,
}

#[derive(Debug)]
struct Watch {
    inotify: Arc<AsyncFd<OwnedFd>>,
    task: AbortHandle,
}

/// The volumes of one pod that are copied into its guest.
#[derive(Debug, Default)]
pub struct Mirrors {
    watch: OnceLock<Watch>,
    /// By inotify's number; several containers may have the same directory.
    table: Arc<Mutex<HashMap<i32, Vec<Watched>>>>,
}

impl Drop for Mirrors {
    fn drop(&mut self) {
        if let Some(watch) = self.watch.get() {
            watch.task.abort();
        }
    }
}

/// Where the link of such a volume leads; `None` for any other volume, or one that is too large.
fn data_of(source: &Path) -> Option<String> {
    let data = std::fs::read_link(source.join(DATA_LINK)).ok()?;
    let name = data.to_str().filter(|name| name.starts_with("..") && !name.contains('/') && *name != "..")?;
    let mut room = (MAX_BYTES, MAX_FILES);
    fits(&source.join(name), &mut room, 0).then(|| name.to_owned())
}

fn fits(dir: &Path, room: &mut (u64, usize), depth: usize) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    entries.flatten().all(|entry| {
        let Ok(metadata) = entry.metadata() else { return false };
        let Some(files) = room.1.checked_sub(1) else { return false };
        room.1 = files;
        if metadata.is_dir() {
            return depth < MAX_DEPTH && fits(&entry.path(), room, depth + 1);
        }
        let Some(bytes) = room.0.checked_sub(metadata.len()) else { return false };
        room.0 = bytes;
        true
    })
}

impl Mirrors {
    /// Finds the volumes that are to be copied, and watches them from now on. Blocks; call it within the runtime.
    pub fn add(&self, guest: &Guest, volumes: &[Volume]) -> Vec<Mirror> {
        let mirror = |volume: &Volume| {
            // Somebody who writes wants what he writes to arrive.
            data_of(&volume.source).filter(|_| volume.read_only)?;
            match self.watch(guest, volume) {
                // Looked at again, as it is watched only now.
                Ok(()) => data_of(&volume.source).map(|data| Mirror { volume: volume.name.clone(), data }),
                Err(e) => {
                    tracing::warn!("watch {}: {e}: nobody will be told of changes", volume.source.display());
                    None
                }
            }
        };
        volumes.iter().filter_map(mirror).collect()
    }

    fn watch(&self, guest: &Guest, volume: &Volume) -> io::Result<()> {
        if self.watch.get().is_none() {
            let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            #[expect(
                deprecated,
                reason = "the replacement is unsafe for types that may lend a wrong descriptor; OwnedFd cannot"
            )]
            let inotify = Arc::new(AsyncFd::with_interest(inotify, Interest::READABLE)?);
            let task = tokio::spawn(follow(inotify.clone(), self.table.clone(), guest.clone())).abort_handle();
            if let Err(second) = self.watch.set(Watch { inotify, task }) {
                second.task.abort();
            }
        }
        let Some(watch) = self.watch.get() else { return Ok(()) };
        let flags = WatchFlags::MOVED_TO | WatchFlags::CREATE | WatchFlags::ONLYDIR;
        let number = inotify::add_watch(watch.inotify.get_ref(), &volume.source, flags)?;
        let watched = Watched { volume: volume.name.clone(), source: volume.source.clone() };
        self.lock().entry(number).or_default().push(watched);
        Ok(())
    }

    /// Brings the copies up to date with what changed while they were made.
    pub async fn settle(&self, guest: &Guest, made: &[Mirror]) {
        for mirror in made {
            let of = |table: &HashMap<i32, Vec<Watched>>| {
                table.values().flatten().find(|watched| watched.volume == mirror.volume).cloned()
            };
            let watched = of(&self.lock());
            if let Some(watched) = watched {
                refresh(guest, &watched, Some(&mirror.data)).await;
            }
        }
    }

    /// Forgets volumes.
    pub fn remove(&self, volumes: &[String]) {
        let mut table = self.lock();
        table.values_mut().for_each(|watched| watched.retain(|watched| !volumes.contains(&watched.volume)));
        table.retain(|number, watched| {
            if watched.is_empty()
                && let Some(watch) = self.watch.get()
            {
                // The kernel may have done it: the directory is gone with the pod.
                let _ = inotify::remove_watch(watch.inotify.get_ref(), *number);
            }
            !watched.is_empty()
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i32, Vec<Watched>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn follow(inotify: Arc<AsyncFd<OwnedFd>>, table: Arc<Mutex<HashMap<i32, Vec<Watched>>>>, guest: Guest) {
    loop {
        let changed = match changes(&inotify).await {
            Ok(changed) => changed,
            Err(e) => return tracing::error!("watch volumes: {e}: nobody will be told of changes"),
        };
        for number in changed {
            let watched = table.lock().unwrap_or_else(PoisonError::into_inner).get(&number).cloned();
            for watched in watched.into_iter().flatten() {
                refresh(&guest, &watched, None).await;
            }
        }
    }
}

/// Waits for events; returns the directories whose link was swapped.
async fn changes(inotify: &AsyncFd<OwnedFd>) -> io::Result<Vec<i32>> {
    let mut guard = inotify.readable().await?;
    let mut changed = Vec::new();
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(inotify.get_ref(), &mut buffer);
    loop {
        match reader.next() {
            Ok(event) => {
                let is_link = event.file_name().is_some_and(|name| name.to_bytes() == DATA_LINK.as_bytes());
                if is_link && !changed.contains(&event.wd()) {
                    changed.push(event.wd());
                }
            }
            Err(rustix::io::Errno::AGAIN) => {
                guard.clear_ready();
                return Ok(changed);
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Has a copy follow its volume, unless the link leads to `known` still.
async fn refresh(guest: &Guest, watched: &Watched, known: Option<&str>) {
    let source = watched.source.clone();
    let data = tokio::task::spawn_blocking(move || data_of(&source)).await.ok().flatten();
    let Some(data) = data.filter(|data| Some(data.as_str()) != known) else { return };
    tracing::debug!("volume {} is {data} now", watched.volume);
    if let Err(e) = guest.refresh(&watched.volume, &data).await {
        tracing::warn!("volume {}: {}", watched.volume, crate::chain(&e));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_kubelet_swaps_is_copied() {
        let dir = tempfile::tempdir().expect("dir");
        assert_eq!(data_of(dir.path()), None, "an ordinary directory");
        std::fs::create_dir(dir.path().join("..1")).expect("mkdir");
        std::fs::write(dir.path().join("..1/key"), b"value").expect("write");
        let link = dir.path().join(DATA_LINK);
        std::os::unix::fs::symlink("..1", &link).expect("link");
        assert_eq!(data_of(dir.path()).as_deref(), Some("..1"));
        let large = std::fs::File::create(dir.path().join("..1/large")).expect("create");
        large.set_len(MAX_BYTES).expect("grow");
        assert_eq!(data_of(dir.path()), None, "too large");
        for bad in ["/etc", "../etc", ".."] {
            std::fs::remove_file(&link).expect("remove");
            std::os::unix::fs::symlink(bad, &link).expect("link");
            assert_eq!(data_of(dir.path()), None, "{bad}");
        }
    }
}
