//! What is done for the layer cache beside a pod that runs: layers that were only indexed are converted; new images are protected
//! by the file system if it can (fs-verity), and those whose blocks are shared with the layers' files are read once for their
//! checksums; and the cache is kept within its limit (`rootfs.cache_mib`) by whoever has made it grow.
//!
//! It happens on a thread that nobody waits for, after the layers of the container at hand have got their links: what a pod
//! uses is never collected. A shim that ends in the middle of it leaves the cache sound, and the next container goes on.

use nacelle_rootfs::{Cache, Layer, Outcome};

/// Starts it if there is something to do; a limit of 0 is none.
pub fn start(cache: Cache, layers: &[Layer], limit_mib: u64) {
    let new = |layer: &Layer| matches!(layer.outcome, Outcome::Built | Outcome::Rebuilt);
    let all = layers.iter().flat_map(|layer| std::iter::once(layer).chain(&layer.devices));
    let made: Vec<_> = all.filter(|layer| new(layer)).map(|layer| layer.key.clone()).collect();
    let indexed: Vec<_> = layers.iter().flat_map(|layer| layer.data.clone()).collect();
    if indexed.is_empty() && made.is_empty() {
        return;
    }
    let work = move || {
        // This thread's alone: the guest is booting meanwhile.
        let _ = rustix::process::setpriority_process(None, 19);
        // Held until the end: else a small limit would take them again before anybody has used them.
        let complete = cache.complete(&indexed).map_err(|e| tracing::warn!("convert layers: {}", crate::chain(&e)));
        if let Err(e) = cache.settle(made.iter().map(String::as_str)) {
            tracing::warn!("settle new layers: {}", crate::chain(&e));
        }
        match cache.gc(if limit_mib == 0 { u64::MAX } else { limit_mib << 20 }) {
            Ok(done) if done.removed.is_empty() => {}
            Ok(done) => {
                let (count, freed, kept) = (done.removed.len(), done.freed >> 20, done.kept >> 20);
                tracing::info!(
                    "layer cache: {count} images of {freed} MiB removed, {kept} MiB kept (rootfs.cache_mib)"
                );
            }
            Err(e) => tracing::warn!("collect layers: {}", crate::chain(&e)),
        }
        drop(complete);
    };
    if let Err(e) = std::thread::Builder::new().name("layers".into()).spawn(work) {
        tracing::warn!("convert and collect layers: start a thread: {e}");
    }
}
