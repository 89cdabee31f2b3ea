//! The layer cache kept within its limit (`rootfs.cache_mib`), by whoever has made it grow.
//!
//! It happens on a thread that nobody waits for, after the layers of the container at hand have got their links: what a pod
//! uses is never collected. A shim that ends in the middle of it leaves the cache sound, and the next conversion goes on.

use nacelle_rootfs::{Cache, Layer, Outcome};

/// Starts it if there is something to do; a limit of 0 is none.
pub fn start(cache: Cache, layers: &[Layer], limit_mib: u64) {
    let new = |layer: &Layer| matches!(layer.outcome, Outcome::Built | Outcome::Rebuilt);
    let grown = layers.iter().any(|layer| new(layer) || layer.devices.iter().any(new));
    if limit_mib == 0 || !grown {
        return;
    }
    let work = move || match cache.gc(limit_mib << 20) {
        Ok(done) if done.removed.is_empty() => {}
        Ok(done) => {
            let (count, freed, kept) = (done.removed.len(), done.freed >> 20, done.kept >> 20);
            tracing::info!("layer cache: {count} images of {freed} MiB removed, {kept} MiB kept (rootfs.cache_mib)");
        }
        Err(e) => tracing::warn!("collect layers: {}", crate::chain(&e)),
    };
    if let Err(e) = std::thread::Builder::new().name("layers".into()).spawn(work) {
        tracing::warn!("collect layers: start a thread: {e}");
    }
}
