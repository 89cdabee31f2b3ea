//! How a sandbox's start went, kept for people: `status.json` in its run directory, see [`nacelle_protocol::status`].
//!
//! Nothing in the shim reads it. A file that cannot be written is a line in the log, never the end of a container.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nacelle_protocol::status::{LayerUse, Phase, STATUS_FILE, Status};
use nacelle_rootfs::{Layer, Outcome};

use crate::state::Dirs;

/// Most sentences about damage that are listened to; a guest has one for each image.
const MAX_DAMAGE: usize = 256;

/// The status of one sandbox, collected while it starts and while containers come and go.
#[derive(Debug)]
pub struct Record {
    begin: Instant,
    path: PathBuf,
    status: Mutex<Status>,
}

impl Record {
    /// An empty one; `begin` is when the first request arrived.
    pub fn new(dirs: &Dirs, begin: Instant) -> Self {
        Self { begin, path: dirs.run().join(STATUS_FILE), status: Mutex::default() }
    }

    /// Changes what is recorded; written by the next [`Record::write`].
    pub fn set(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A phase that began at `from` and ends now.
    pub fn phase(&self, name: &str, from: Instant) {
        let phase = Phase { name: name.to_owned(), at_us: micros(from - self.begin), took_us: micros(from.elapsed()) };
        tracing::debug!("phase {} took {} µs", phase.name, phase.took_us);
        self.set(|status| status.phases.push(phase));
    }

    /// The lowers of a container, bottom first.
    pub fn layers(&self, container: &str, layers: &[Layer]) {
        let one = |key: &String, size, outcome| LayerUse {
            container: container.to_owned(),
            key: key.clone(),
            size,
            outcome: word(outcome).to_owned(),
        };
        let uses = layers.iter().flat_map(|layer| match layer.parts.as_slice() {
            [] => vec![one(&layer.key, layer.size, layer.outcome)],
            parts => parts.iter().map(|part| one(&part.key, part.size, layer.outcome)).collect(),
        });
        self.set(|status| status.layers.extend(uses));
    }

    /// Forgets a container's lowers.
    pub fn forget(&self, container: &str) {
        self.set(|status| status.layers.retain(|layer| layer.container != container));
    }

    /// An image in use differs from what was converted; told to people at once.
    pub fn damage(&self, image: &str, block: u64) {
        let words = format!("layer image {image}: block {block} differs from what was converted, reading it fails");
        let mut new = false;
        self.set(|status| {
            new = status.damage.len() < MAX_DAMAGE && !status.damage.contains(&words);
            if new {
                status.damage.push(words.clone());
            }
        });
        if new {
            tracing::error!("{words}");
            self.write();
        }
    }

    /// Writes the file, whole or not at all.
    pub fn write(&self) {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner).clone();
        status.phases.sort_by_key(|phase| phase.at_us);
        let temporary = self.path.with_extension("tmp");
        let written = serde_json::to_vec(&status)
            .map_err(std::io::Error::from)
            .and_then(|json| std::fs::write(&temporary, json))
            .and_then(|()| std::fs::rename(&temporary, &self.path));
        if let Err(e) = written {
            tracing::warn!("write status {}: {e}", self.path.display());
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Hit => "reused",
        Outcome::Built => "built",
        Outcome::Rebuilt => "rebuilt",
        Outcome::Ephemeral => "ephemeral",
        Outcome::Indexed => "indexed",
        Outcome::Ready => "ready",
    }
}
