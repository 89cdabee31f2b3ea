//! What a container has written → its snapshot, so that containerd and its clients find it there.
//!
//! ```text
//!  Pause                      freeze ─► export ─► answer        (nothing exported: the container goes on, and the call fails)
//!  the main process has ended ─► export ─► Exit is told         (or before, when it takes longer than PATIENCE)
//!  Delete                     export over? ─► delete in the guest ─► answer
//!
//!  guest ── tar archive, frames ──► pump_output ──► pipe ──► Snapshot::apply (a thread) ──► Snapshot::publish
//! ```
//!
//! For containers that are no pod's: a pod's snapshots are never looked at, and go with their containers. A snapshot is
//! changed as a whole or not at all, by an archive that came to its end. What the guest writes into the archive is its
//! container's own affair; that it cannot be more is [`nacelle_rootfs::changes`]'s to see to.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nacelle_protocol::ids::ContainerId;
use nacelle_rootfs::RootfsPlan;
use nacelle_rootfs::changes::{Applied, ChangesError, Snapshot};
use thiserror::Error;
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::timeout;

use crate::bundle::{Bundle, Role};
use crate::guest::GuestError;
use crate::pod::Pod;
use crate::stream::{PumpError, pump_output};

/// How long an exit may be held back by the export that follows it.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// What an export may take, beside the time for its bytes.
const GRACE: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 60 });
/// Bytes a second that any guest can send, and any disk can take.
const RATE: u64 = 32 << 20;

/// Why a container's snapshot is not up to date. It is what it was before.
#[derive(Debug, Error)]
pub enum ExportError {
    /// The guest says no.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// No stream, or no pipe.
    #[error("export files to {snapshot}")]
    Stream {
        /// The snapshot's directory.
        snapshot: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The stream broke, or the guest does not follow the protocol.
    #[error("export files to {snapshot}")]
    Pump {
        /// The snapshot's directory.
        snapshot: PathBuf,
        /// The cause.
        #[source]
        source: PumpError,
    },
    /// The guest ended the stream before the archive's end, or is gone.
    #[error("export files to {0}: the guest broke off")]
    BrokenOff(PathBuf),
    /// It takes too long.
    #[error("export files to {snapshot}: not done after {seconds} s")]
    Timeout {
        /// The snapshot's directory.
        snapshot: PathBuf,
        /// The deadline.
        seconds: u64,
    },
    /// The files cannot be put there.
    #[error("export files to {snapshot}")]
    Changes {
        /// The snapshot's directory.
        snapshot: PathBuf,
        /// The cause.
        #[source]
        source: ChangesError,
    },
    /// A thread for blocking work is gone.
    #[error("export files to {0}: worker thread failed")]
    Worker(PathBuf),
}

/// A container's way to its snapshot. One export runs at a time.
#[derive(Debug)]
pub struct Export {
    /// The snapshot's directory.
    dir: PathBuf,
    state: Arc<Mutex<State>>,
    /// Size of the disk that everything comes from.
    bytes: u64,
}

#[derive(Debug)]
struct State {
    snapshot: Snapshot,
    /// It lacks what the container has written, as far as is known.
    behind: bool,
    /// It was for reasons of the host's, which may be over by now.
    again: bool,
}

impl Export {
    /// The way of the container in `bundle`, if it has one: it is alone, and may write to a root with this plan. Blocks.
    ///
    /// # Errors
    /// [`ChangesError`].
    pub fn of(bundle: &Bundle, plan: &RootfsPlan, bytes: u64) -> Result<Option<Arc<Self>>, ChangesError> {
        let read_only = bundle.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        if bundle.role != Role::Single || read_only {
            return Ok(None);
        }
        let snapshot = Snapshot::of(plan)?;
        Ok(snapshot.map(|snapshot| {
            let dir = snapshot.dir().to_owned();
            Arc::new(Self { dir, state: Arc::new(Mutex::new(State { snapshot, behind: false, again: false })), bytes })
        }))
    }

    /// Brings the snapshot up to date. The container is paused, or has ended.
    ///
    /// # Errors
    /// [`ExportError`].
    pub async fn run(&self, pod: &Pod, id: &ContainerId) -> Result<(), ExportError> {
        let mut state = self.state.clone().lock_owned().await;
        // Until it is known that it is not so.
        state.behind = true;
        state.again = false;
        let begin = Instant::now();
        let seconds = GRACE.as_secs() + self.bytes / RATE;
        let exported = timeout(Duration::from_secs(seconds), self.export(state, pod, id)).await;
        exported.unwrap_or_else(|_| Err(ExportError::Timeout { snapshot: self.dir.clone(), seconds }))?;
        tracing::debug!("container {id}: files exported to {} in {:?}", self.dir.display(), begin.elapsed());
        Ok(())
    }

    async fn export(&self, state: OwnedMutexGuard<State>, pod: &Pod, id: &ContainerId) -> Result<(), ExportError> {
        let worker = |_| ExportError::Worker(self.dir.clone());
        let changes = |source| ExportError::Changes { snapshot: self.dir.clone(), source };
        let (mut state, applied) = self.receive(state, pod, id).await?;
        state.again = matches!(applied, Err(ChangesError::Io { .. }));
        let applied = applied.map_err(changes)?;
        let publish = tokio::task::spawn_blocking(move || {
            let published = state.snapshot.publish(applied);
            state.behind = published.is_err();
            published
        });
        publish.await.map_err(worker)?.map_err(changes)
    }

    /// Gets the archive and applies it. What could be applied is an archive that came to its end.
    async fn receive(
        &self,
        state: OwnedMutexGuard<State>,
        pod: &Pod,
        id: &ContainerId,
    ) -> Result<(OwnedMutexGuard<State>, Result<Applied, ChangesError>), ExportError> {
        let broken = |source| ExportError::Stream { snapshot: self.dir.clone(), source };
        let mut ticket = pod.hub.expect().map_err(broken)?;
        pod.guest.export(id, ticket.id()).await?;
        // It was dialled before the guest answered.
        let socket = ticket.dialled().await.ok_or_else(|| ExportError::BrokenOff(self.dir.clone()))?;
        let (reader, writer) = io::pipe().map_err(broken)?;
        let sink = pipe::Sender::from_owned_fd(writer.into()).map_err(broken)?;
        let bytes = self.bytes;
        let mut work = tokio::task::spawn_blocking(move || {
            let applied = state.snapshot.apply(reader, bytes);
            (state, applied)
        });
        let pump = pump_output(socket, sink);
        tokio::pin!(pump);
        let mut pumped = None;
        let (state, applied) = loop {
            tokio::select! {
                result = &mut pump, if pumped.is_none() => pumped = Some(result),
                // An archive that cannot be applied is not received to its end.
                done = &mut work => break done.map_err(|_| ExportError::Worker(self.dir.clone()))?,
            }
        };
        match pumped {
            Some(Err(source)) if source.is_breach() => {
                pod.conduct.breach(crate::chain(&source));
                Err(ExportError::Pump { snapshot: self.dir.clone(), source })
            }
            Some(Ok(false) | Err(_)) => Err(ExportError::BrokenOff(self.dir.clone())),
            // An end, and more behind it.
            None if applied.is_ok() => Err(ExportError::BrokenOff(self.dir.clone())),
            Some(Ok(true)) | None => Ok((state, applied)),
        }
    }

    /// Waits for an export that runs, and tries again one that the host was the reason for: a disk that was full may have
    /// room. Then there will be no more. What is lost is said.
    pub async fn close(&self, pod: Option<&Pod>, id: &ContainerId) {
        let (behind, again) = {
            let state = self.state.lock().await;
            (state.behind, state.again)
        };
        if behind {
            let tried = match pod {
                Some(pod) if again => self.run(pod, id).await.map_err(|e| crate::chain(&e)),
                Some(_) => Err("its export failed".to_owned()),
                None => Err("the VM is gone".to_owned()),
            };
            if let Err(why) = tried {
                let dir = self.dir.display();
                tracing::error!("container {id}: what it has written is lost, {dir} is as it was before: {why}");
            }
        }
        let mut state = self.state.clone().lock_owned().await;
        let closed = tokio::task::spawn_blocking(move || state.snapshot.close()).await;
        if let Ok(Err(e)) = closed {
            tracing::warn!("{}", crate::chain(&e));
        }
    }

    /// The container runs: from now on its snapshot lags behind.
    pub async fn begin(&self) {
        self.state.lock().await.behind = true;
    }
}
